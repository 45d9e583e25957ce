"""From (kernel, problem, config, device) to something that can be called with operands.

`executable`'s argument list is the compile key: whatever is not in it, sizes above all, is a run-time
value. Compiling traces the kernel with fake operands made from the problem's `specs`; the result is an object
file (cache.py), which is loaded without the compiler (objectfile.py) and bound either to the CUDA
runtime or to the emulator. The compiler is imported when something must be compiled, and not before.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import cache
from .arch.kernel import Kernel
from .arch.problem import Device, Spec
from .cache import Artifact

_LOG = logging.getLogger("cute_flash")
_COMPILER = threading.Lock()
_ALIGNMENT = 16  # bytes, of every strided operand's address and strides

compiled: list[str] = []  # key of every kernel that this process compiled, in order


@functools.cache
def executable(kernel: Kernel, problem: Any, config: Any, device: Device, route: str) -> Callable[..., None]:
    """The kernel as a function of its operands, those of `problem.specs()`. route: "cuda" or "emulator"."""
    built = artifact(kernel, problem, config, device)
    if route == "cuda":
        from . import cuda_runtime, objectfile

        return objectfile.load(built.object, built.description["function"], cuda_runtime.symbols())
    from .emulated_kernel import EmulatedKernel

    return EmulatedKernel(built, device)


def artifact(kernel: Kernel, problem: Any, config: Any, device: Device) -> Artifact:
    """The compiled kernel, from disk where it is there."""
    key = key_of(kernel, problem, config, device)
    return cache.get(key, lambda: build(kernel, problem, config, device))


def key_of(kernel: Kernel, problem: Any, config: Any, device: Device) -> str:
    """The name of the kernel's file."""
    return cache.key_of(kernel.name, sources_of(kernel), problem, config, device.target)


def sources_of(kernel: Kernel) -> str:
    """Digest of the sources that the kernel is compiled from.

    A kernel from elsewhere may import any of ours; its own files are those whose names begin its module's.
    """
    module = kernel.launches.partition(":")[0]
    if not module.startswith("."):
        own = Path(find_spec(module).origin)
        beside = (path for path in own.parent.glob("*.py") if own.stem.startswith(path.stem))
        return cache.sources_digest(Path(__file__), *sorted(beside))
    return cache.sources_digest(Path(__file__), module=module[1:])


def build(kernel: Kernel, problem: Any, config: Any, device: Device) -> Artifact:
    """Compile. RuntimeError, from an ImportError, where the compiler is not installed."""
    key = key_of(kernel, problem, config, device)
    try:
        import cutlass  # noqa: F401
    except ImportError as error:
        raise RuntimeError(_no_compiler(key, problem, device)) from error
    started = time.perf_counter()
    function = re.sub(r"\W", "_", key)
    with _COMPILER:
        host, ptx, cubin = _compile(kernel.launcher(problem, config), problem, device, function)
    compiled.append(key)
    _LOG.info("compiled %s in %.1f s", key, time.perf_counter() - started)
    return Artifact(host, ptx, cubin, _describe(kernel, problem, config, device, function, ptx))


def _compile(launcher: Any, problem: Any, device: Device, function: str) -> tuple[bytes, bytes, bytes]:
    """Host object, PTX and cubin."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream

    with tempfile.TemporaryDirectory() as directory:
        keep = f"--keep-ptx --keep-cubin --dump-dir {directory}"
        options = f"--gpu-arch {device.target} --enable-tvm-ffi {keep}"
        fakes = _fake_operands(problem)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        result = cute.compile(launcher, *fakes, stream, options=options)
        _for_any_host(result.ir_module)
        path = Path(directory) / "kernel.o"
        result.export_to_c(str(path), function, export_only_tvm_ffi_symbols=True)
        # Not from `result`, which looks for the files of sm_110a under that name, not the one they have.
        (ptx,), (cubin,) = (Path(directory).glob(f"*.{kind}") for kind in ("ptx", "cubin"))
        return path.read_bytes(), ptx.read_bytes(), cubin.read_bytes()


def _for_any_host(module: Any) -> None:
    """Have the host code use no instructions beyond SSE4.2.

    Without this the compiler uses what its own CPU has (AVX-512, say), and a kernel carried to another
    machine might meet an illegal instruction there.
    """
    from cutlass._mlir import ir

    with module.context:
        cpu = ir.StringAttr.get("x86-64-v2")
        features = ir.Attribute.parse('#llvm.target_features<["+sse4.2"]>')
        for operation in module.body.operations:
            if operation.operation.name == "llvm.func":
                operation.attributes["target_cpu"] = cpu
                operation.attributes["target_features"] = features


def _fake_operands(problem: Any) -> tuple:
    """An operand of the right type for every Spec; equal dimension names share one symbolic size."""
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_tensor

    types = {
        "float16": cutlass.Float16, "bfloat16": cutlass.BFloat16, "float32": cutlass.Float32,
        "int8": cutlass.Int8, "uint8": cutlass.Uint8, "int32": cutlass.Int32, "int64": cutlass.Int64,
    }
    sizes: dict[str, Any] = problem.known_sizes()

    def fake(spec: Spec | tuple | None) -> Any:
        if spec is None:
            return None
        if not isinstance(spec, Spec):
            return tuple(map(fake, spec))
        dtype = types[spec.dtype]
        if spec.strides == "scalar":
            return dtype(0)
        for name in spec.dims:
            sizes.setdefault(name, cute.sym_int32(symbol=name))
        shape, rank = tuple(sizes[name] for name in spec.dims), len(spec.dims)
        if spec.strides == "contiguous":
            order = tuple(reversed(range(rank)))
            return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=dtype.width // 8)
        step = 8 * _ALIGNMENT // dtype.width
        strides = (*(cute.sym_int64(divisibility=step) for _ in range(rank - 1)), 1)
        return make_fake_tensor(dtype, shape, strides, assumed_align=_ALIGNMENT)

    return tuple(map(fake, problem.specs()))


def _describe(kernel, problem: Any, config, device: Device, function: str, ptx: bytes) -> dict[str, Any]:
    """What an outside tool needs to run the kernel."""
    entries = re.findall(r"^\s*(?:\.visible\s+)?\.entry\s+([\w$]+)", ptx.decode(), re.MULTILINE)
    operands = []
    for name, spec in problem.specs()._asdict().items():
        members = (None,) if spec is None else (spec,) if isinstance(spec, Spec) else spec
        told = [_member(member, problem) for member in members if member is not None]
        operands.append({"name": name, "members": told, "is_tuple": spec is not None and members is spec})
    return {
        "format": 1,
        "kernel": kernel.name,
        "function": function,
        "symbol": f"__tvm_ffi_{function}",
        "entries": entries,
        "target": device.target,
        "problem": json.loads(json.dumps(asdict(problem))),
        "config": json.loads(json.dumps(asdict(config))),
        "shared_memory": config.shared_memory(problem),
        "calling": "TVM-FFI, positional: one argument per operand, in this order; no member: None; members "
        "of mask_values and score_values: a tuple. Tensors on the GPU, on whose current stream it runs.",
        "operands": operands,
        "sizes": problem.example_sizes(),
        "versions": cache.versions(),
    }


def _member(spec: Spec, problem: Any) -> dict[str, Any]:
    known = problem.known_sizes()
    return {
        "dtype": spec.dtype,
        "rank": len(spec.dims),
        "dims": [known.get(name, name) for name in spec.dims],
        "strides": spec.strides,
        "meaning": spec.meaning,
        "written": spec.written,
        "values": spec.values,
    }


def _no_compiler(key: str, problem: Any, device: Device) -> str:
    arch = device.target.replace("_", "").removesuffix("a")
    known = problem.known_sizes()
    fault = f" ({found})" if (found := cache.fault_of_bundle(key)) else ""
    dims = f"{known.get('head_dim', known['head_dim_v'])}x{known['head_dim_v']}"
    return (
        f"the kernel {key} for {problem} on {device.target} is neither in CUTE_FLASH_BUNDLE{fault} nor in "
        "the cache, and nvidia-cutlass-dsl, which compiles it, is not installed. Install it, or run on a "
        f"machine that has it: python -m cute_flash compile --arch {arch} --dtype {problem.dtype} "
        f"--head-dim {dims} --features … DIR, and set CUTE_FLASH_BUNDLE to a copy of DIR"
    )

"""flash-attn-4's own forward kernels, compiled without a GPU and described for who launches them.

    kernels = build(CASES, directory)          in a process per target: it reads its target at import

Its Python interface runs once on fake CUDA tensors; where it would launch, the compiled kernel's PTX and
host object are written to `directory`, with a JSON file:

    "arguments"    of the launch: {"tensor": name}, {"longest": "q"}, a number, null, or a list of these
    "tile"         rows of Q that one cluster of CTAs takes, and keys per KV tile
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Case:
    """One call of flash_attn.cute: lengths per sequence; more than one length of q or k means varlen."""

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    heads: int = 2
    heads_kv: int = 2
    dim: int = 64
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    dtype: str = "bfloat16"
    dim_v: int | None = None
    arch: str = "sm_80"

    @classmethod
    def read(cls, told: dict[str, Any]) -> Case:
        """A case from its members as JSON has them."""
        return cls(**{k: tuple(value) if isinstance(value, list) else value for k, value in told.items()})

    @property
    def varlen(self) -> bool:
        return len(self.seqlens_q) > 1

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor of the call."""
        q, k = ((sum(self.seqlens_q),), (sum(self.seqlens_k),))
        lse = (self.heads, *q)
        if not self.varlen:
            q, k, lse = (1, *q), (1, *k), (1, *lse)
        shapes = {
            "q": ((*q, self.heads, self.dim), self.dtype),
            "k": ((*k, self.heads_kv, self.dim), self.dtype),
            "v": ((*k, self.heads_kv, self.dim_v or self.dim), self.dtype),
            "out": ((*q, self.heads, self.dim_v or self.dim), self.dtype),
            "lse": (lse, "float32"),
        }
        if self.varlen:
            rows = ((len(self.seqlens_q) + 1,), "int32")
            shapes |= {"cu_seqlens_q": rows, "cu_seqlens_k": rows}
        return shapes


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel of the peer: its PTX, its host object, and what the JSON file says of its launch."""

    case: Case
    ptx: str
    object_file: Path
    arguments: list[Any]
    tile: tuple[int, int]

    @classmethod
    def load(cls, case: Case, stem: Path) -> Kernel:
        """What was written to files of this stem."""
        told = json.loads(stem.with_suffix(".json").read_text())
        ptx, object_file = stem.with_suffix(".ptx").read_text(), stem.with_suffix(".o")
        return cls(case, ptx, object_file, told["arguments"], tuple(told["tile"]))


MULTIPROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_100a": 148, "sm_103a": 160, "sm_120a": 170,
}  # fmt: skip
L2_BYTES = 50 << 20
BLACKWELL = (
    Case("sm100_d64", (256,), (256,), arch="sm_100a"),
    Case("sm100_d64_causal", (192,), (192,), causal=True, arch="sm_100a"),
    Case("sm100_d128", (256,), (256,), dim=128, arch="sm_100a"),
    Case("sm100_d128_causal_gqa", (200,), (200,), heads=4, heads_kv=2, dim=128, causal=True, arch="sm_100a"),
    Case("sm100_d64_ragged_fp16", (77,), (203,), heads=4, heads_kv=1, dtype="float16", arch="sm_100a"),
    Case("sm100_d96_window", (300,), (300,), dim=96, window=(40, 10), arch="sm_100a"),
    Case("sm100_d128_varlen_causal", (65, 1, 130), (97, 64, 130), dim=128, causal=True, arch="sm_100a"),
    Case("sm100_d192_dv128", (256,), (256,), dim=192, dim_v=128, causal=True, arch="sm_100a"),
    Case("sm100_d256", (256,), (256,), heads=1, heads_kv=1, dim=256, arch="sm_100a"),
    Case("sm103_d64_causal", (192,), (192,), causal=True, arch="sm_103a"),
    Case("sm103_d128", (256,), (256,), dim=128, arch="sm_103a"),
)
HOPPER = (
    Case("sm90_d64", (256,), (256,), arch="sm_90a"),
    Case("sm90_d64_causal", (192,), (192,), causal=True, arch="sm_90a"),
    Case("sm90_d128", (256,), (256,), dim=128, arch="sm_90a"),
    Case("sm90_d128_causal_gqa", (200,), (200,), heads=4, heads_kv=2, dim=128, causal=True, arch="sm_90a"),
    Case("sm90_d64_ragged_fp16", (77,), (203,), heads=4, heads_kv=1, dtype="float16", arch="sm_90a"),
    Case("sm90_d96_window", (300,), (300,), dim=96, window=(40, 10), arch="sm_90a"),
    Case("sm90_d64_varlen_causal", (65, 1, 130), (97, 64, 130), causal=True, arch="sm_90a"),
    Case("sm90_d192_dv128", (256,), (256,), dim=192, dim_v=128, causal=True, arch="sm_90a"),
    Case("sm90_d256", (128,), (256,), heads=1, heads_kv=1, dim=256, arch="sm_90a"),
)
CASES = (
    Case("d64", (256,), (256,)),
    Case("d64_causal", (192,), (192,), causal=True),
    Case("d128", (128,), (256,), dim=128),
    Case("d128_causal_gqa", (200,), (200,), heads=4, heads_kv=2, dim=128, causal=True),
    Case("d64_ragged_gqa_fp16", (77,), (203,), heads=4, heads_kv=1, dtype="float16"),
    Case("d64_ragged_causal", (50,), (171,), causal=True),
    Case("d96_window", (160,), (160,), dim=96, window=(40, 10)),
    Case("d64_varlen_causal", (65, 1, 130), (97, 64, 130), causal=True),
)


def digest() -> str:
    """Of all that its kernels, as `build` leaves them, depend on: this file, the peer and the compiler."""
    versions = (metadata.version(name) for name in ("flash-attn-4", "nvidia-cutlass-dsl", "apache-tvm-ffi"))
    text = "\0".join((Path(__file__).read_text(), *versions))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(cases: Sequence[Case], directory: Path) -> dict[str, Kernel]:
    """The kernels of `cases`, compiled into `directory` unless they are there already.

    Raises RuntimeError with the compiling process's output where it fails.
    """
    compile_missing(__name__, cases, directory, environment)
    return {case.name: Kernel.load(case, directory / case.name) for case in cases}


def compile_missing(
    module: str, cases: Sequence[Case], directory: Path, told: Callable[[str, Path], dict[str, str]]
) -> None:
    """Run a peer's module for the cases that are not in `directory` yet, in a process per target.

    told: what that process is started with, as `environment` says it.
    Raises RuntimeError with the process's output where it fails.
    """
    missing = [case for case in cases if not (directory / f"{case.name}.json").exists()]
    for arch in dict.fromkeys(case.arch for case in missing):
        asked = json.dumps([asdict(case) for case in missing if case.arch == arch])
        done = subprocess.run(
            [sys.executable, "-m", module, str(directory)], input=asked, env=told(arch, directory),
            cwd=Path(__file__).parents[2], text=True, capture_output=True,
        )
        if done.returncode:
            output = done.stdout + done.stderr
            raise RuntimeError(f"{module.rpartition('.')[2]} did not compile for {arch}:\n{output}")


def environment(arch: str, directory: Path) -> dict[str, str]:
    """What a process that compiles for `arch` into `directory` must be started with."""
    return os.environ | {
        "CUTE_DSL_ARCH": arch,
        "CUTE_DSL_KEEP": "ptx",
        "CUTE_DSL_DUMP_DIR": str(directory),
        "FLASH_ATTENTION_ARCH": arch,
        "FLASH_ATTENTION_NUM_SMS": str(MULTIPROCESSORS[arch]),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
    }


def resolved(described: Any, tensors: Mapping[str, Any], longest: int) -> Any:
    """An argument from its description. longest: the length of the longest sequence of queries."""
    if isinstance(described, list):
        return tuple(resolved(member, tensors, longest) for member in described)
    if isinstance(described, dict):
        return tensors[described["tensor"]] if "tensor" in described else longest
    return described


@contextmanager
def interface_without_gpu() -> Iterator[Any]:
    """The peer's Python interface, for calls on fake tensors; for a process of its own."""
    _without_autotuner()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: 0
    import cutlass.utils
    from flash_attn.cute import interface

    _without_driver(cutlass.utils.HardwareInfo)
    interface.is_fake_mode = lambda: False
    with FakeTensorMode():
        yield interface


def fakes(case: Case) -> dict[str, Any]:
    """Tensors of the call that hold nothing."""
    import torch

    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        for name, (shape, dtype) in case.shapes().items()
    }


def options_of(case: Case) -> dict[str, Any]:
    """What a call of the interface is given besides tensors, forward or backward."""
    left, right = case.window
    return {"causal": case.causal, "window_size_left": left, "window_size_right": right}


def record(cases: list[Case], directory: Path) -> None:
    """Run the peer's interface on fake tensors and write what it compiles."""
    with interface_without_gpu() as interface:
        import cutlass.cute as cute

        for case in cases:
            tensors = fakes(case)
            recorded = partial(_compile_and_record, cute.compile, (case, directory, tensors))
            with mock.patch.object(cute, "compile", recorded):
                interface._flash_attn_fwd(**tensors, **options_of(case), return_lse=True)
            interface._flash_attn_fwd.compile_cache.clear()


def _compile_and_record(compile_kernel, what: tuple[Case, Path, dict[str, Any]], *args, **kwargs):
    """cute.compile, except that what it returns describes the call that it gets instead of launching."""
    case, directory, tensors = what
    stem, compiled = directory / case.name, compile_kernel(*args, **kwargs)
    compiled.export_to_c(object_file_path=str(stem.with_suffix(".o")), function_name="func")
    stem.with_suffix(".ptx").write_text(compiled.__ptx__)

    def call(*arguments):
        described = [_describe(argument, tensors, max(case.seqlens_q)) for argument in arguments]
        told = {"arguments": described, "tile": _tile(args[0])}
        stem.with_suffix(".json").write_text(json.dumps(told))

    return call


def _tile(kernel: Any) -> tuple[int, int]:
    """Rows of Q per cluster and keys per tile of a kernel, before it is compiled."""
    if hasattr(kernel, "q_stage"):  # Blackwell's
        return kernel.m_block_size * kernel.q_stage * kernel.cta_group_size, kernel.n_block_size
    return kernel.tile_m, kernel.tile_n


def _without_driver(hardware: type) -> None:
    """Answer what persistent kernels ask of the driver: how many CTAs can be resident."""
    sms = int(os.environ["FLASH_ATTENTION_NUM_SMS"])
    hardware.__init__ = lambda self, *args, **kwargs: None
    hardware.get_max_active_clusters = lambda self, cluster_size, *args, **kwargs: sms // cluster_size
    hardware.get_device_multiprocessor_count = lambda self: sms
    hardware.get_l2_cache_size_in_bytes = lambda self: L2_BYTES


def _without_autotuner() -> None:
    """Stand in for quack's autotuner: imported, not used here, and it would need triton (290 MB)."""
    autotuner = types.ModuleType("quack.autotuner")
    autotuner.autotune = lambda *args, **kwargs: lambda function: function
    autotuner.AutotuneConfig = dict
    sys.modules[autotuner.__name__] = autotuner


def _describe(argument: Any, tensors: dict[str, Any], longest: int) -> Any:
    if isinstance(argument, (tuple, list)):
        return [_describe(member, tensors, longest) for member in argument]
    if hasattr(argument, "untyped_storage"):
        storage = argument.untyped_storage()._cdata
        (name,) = (name for name, tensor in tensors.items() if tensor.untyped_storage()._cdata == storage)
        return {"tensor": name}
    return {"longest": "q"} if type(argument) is int and argument == longest else argument


if __name__ == "__main__":
    requested = [Case.read(told) for told in json.load(sys.stdin)]
    record(requested, Path(sys.argv[1]))

"""cuDNN front end's open backward kernels for sm_80, compiled without a GPU and described for their launch.

    calls = build(CASES, directory)          in a process of its own

Its wheel (nvidia-cudnn-frontend, without its dependencies) is enough: kernels are taken from their modules
and compiled for one call each, with the launches and arguments of its `prepared_host.py`. What is written is
read by flash_attn_4_backward.py. Dense, as many heads of K and V as of Q, at head dim 64 no mask.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.peers import flash_attn_4, flash_attn_4_backward
from tests.peers.flash_attn_4_backward import Backward, Case

NAME, PACKAGE = "cudnn-frontend", "nvidia-cudnn-frontend"
# At head dim 64 it has a kernel of its own, for whole tiles of 64 queries and 128 keys.
CASES = (
    Case("cudnn_backward_d64", (128,), (256,), heads=1, heads_kv=1),
    Case("cudnn_backward_d128", (100,), (130,), heads=1, heads_kv=1, dim=128),
)


def installed() -> bool:
    """Whether the wheel is there."""
    return importlib.util.find_spec("cudnn") is not None


def digest() -> str:
    """Of all that its kernels, as `build` leaves them, depend on."""
    version = metadata.version(PACKAGE)
    text = Path(__file__).read_text() + version + flash_attn_4_backward.digest()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(cases: Sequence[Case], directory: Path) -> dict[str, Backward]:
    """The calls of `cases`, compiled into `directory` unless they are there already.

    Raises RuntimeError with the compiling process's output where it fails.
    """
    flash_attn_4.compile_missing(__name__, cases, directory, flash_attn_4.environment)
    return {case.name: Backward.load(case, directory) for case in cases}


def retold(arguments: list[Any], numbers: dict[int, int]) -> list[Any]:
    """A launch's arguments with other numbers, counted from the first behind its tensors."""
    first = next(i for i, told in enumerate(arguments) if isinstance(told, int))
    return [numbers.get(i - first, told) for i, told in enumerate(arguments)]


def scratch_of(case: Case) -> dict[str, dict[str, Any]]:
    """Tensors of the launches that are none of the call: shape, dtype, and whether they are cleared."""
    (rows,), heads, dim = case.seqlens_q, case.heads, case.dim
    sums = (1, heads, rows, dim) if dim == 64 else (1, rows, heads, dim)
    shapes = {"delta": (1, heads, rows), "sums": sums}
    return {
        name: {"shape": shape, "dtype": "float32", "cleared": name == "sums"}
        for name, shape in shapes.items()
    }


def record(case: Case, directory: Path) -> None:
    """Compile a case's launches and write them; for a process of its own."""
    import cutlass
    from cudnn.frost.tile_dsl.constants import MASK_CAUSAL, MASK_NONE, SCHED_LPT_L2
    from cudnn.sdpa.bwd.kernels.sm80 import bprop_d64_f16, bprop_f16

    params, dtype = bprop_f16.PARAMS, cutlass.BFloat16 if case.dtype == "bfloat16" else cutlass.Float16
    (rows,), heads, dim, scale = case.seqlens_q, case.heads, case.dim, case.dim**-0.5
    recorder = Recorder(case, directory)
    recorder.launch(bprop_f16._do_dot_host, ["out", "dout", "delta"], [dim, dtype], [heads * rows])
    tensors = ["q", "k", "v", "dout", "sums", "dk", "dv", "lse", "delta"]
    if dim == 64:
        tiles, told = -(-rows // bprop_d64_f16.M_BLOCK), (bprop_d64_f16.M_BLOCK, bprop_d64_f16.N_BLOCK)
        numbers = [tiles, scale / math.log(2), scale]
        recorder.launch(bprop_d64_f16._bprop_host, tensors, [dim, dtype], numbers, told)
        recorder.launch(bprop_d64_f16._unpermute_host, ["sums", "dq"], [dim, dtype], [tiles])
    else:
        mask, policy = (MASK_CAUSAL, SCHED_LPT_L2) if case.causal else (MASK_NONE, params.sched_policy)
        known = [
            dim, dim, params.tile_kv, params.tile_q, params.warps_per_sg, 1 if dim >= 256 else 2, dim <= 128,
            dtype, mask, 0, False, False, False, True, False, False, False, False, False, policy,
            params.sched_l2_mib << 20, None,
        ]  # fmt: skip
        tiles, told = -(-rows // params.tile_q), (params.tile_q, params.tile_kv)
        numbers = [tiles, scale / math.log(2), scale, 0, cutlass.Int64(0), 0, 0, 0]
        recorder.launch(bprop_f16._bprop_host, [*tensors, *[None] * 9], known, numbers, told)
        recorder.launch(bprop_f16._cast_host, ["sums", "dq"], [dtype], [heads * rows * dim // 2])
    recorder.write()


class Recorder:
    """Compiles launches of a case and keeps what describes them."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case, self.directory = case, directory
        self.scratch = scratch_of(case)
        self.launches: list[dict[str, Any]] = []

    def launch(
        self, host: Callable, tensors: list, known: list, numbers: list, tile: tuple[int, int] = (0, 0)
    ) -> None:
        """Compile `host` for tensors of these names, what it is compiled for, and numbers at run time."""
        import cutlass
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_fake_stream

        name = f"{self.case.name}-{len(self.launches)}"
        wrap = {int: cutlass.Int32, float: cutlass.Float32}
        given = [wrap.get(type(number), lambda same: same)(number) for number in numbers]
        fakes = [None if tensor is None else self._fake(tensor) for tensor in tensors]
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        compiled = cute.compile(host, *fakes, *known, *given, stream, options="--enable-tvm-ffi")
        stem = str(self.directory / name)
        compiled.export_to_c(object_file_path=f"{stem}.o", function_name="func")
        Path(f"{stem}.ptx").write_text(compiled.__ptx__)
        arguments = [None if tensor is None else {"tensor": tensor} for tensor in tensors]
        plain = [number if type(number) in wrap else 0 for number in numbers]
        self.launches.append({"kernel": name, "tile": tile, "arguments": [*arguments, *plain]})

    def _fake(self, name: str) -> Any:
        import cutlass
        from cutlass.cute.runtime import make_fake_compact_tensor

        types = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}
        made = self.scratch.get(name)
        shape, dtype = (made["shape"], made["dtype"]) if made else self.case.shapes()[name]
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(types[dtype], tuple(shape), stride_order=order, assumed_align=16)

    def write(self) -> None:
        """NAME.json, when all is done."""
        told = json.dumps({"launches": self.launches, "scratch": self.scratch})
        (self.directory / f"{self.case.name}.json").write_text(told)


if __name__ == "__main__":
    for asked in json.load(sys.stdin):
        record(Case.read(asked), Path(sys.argv[1]))

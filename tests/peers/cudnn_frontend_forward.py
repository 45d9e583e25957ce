"""cuDNN front end's open forward kernel for sm_80, compiled and described as its backward kernels are.

    calls = build(CASES, directory)          in a process of its own

See cudnn_frontend.py. Launched with fewer tiles of keys than it is compiled for, it reads these alone. A
causal mask is aligned to the ends of queries and keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.peers import cudnn_frontend, flash_attn_4
from tests.peers.cudnn_frontend import Recorder
from tests.peers.flash_attn_4_backward import Backward, Case

CASES = (
    Case("cudnn_forward_d128", (128,), (256,), heads=1, heads_kv=1, dim=128),
    Case("cudnn_forward_d128_causal", (128,), (256,), heads=1, heads_kv=1, dim=128, causal=True),
)


def digest() -> str:
    """Of all that its kernels, as `build` leaves them, depend on."""
    return hashlib.sha256((Path(__file__).read_text() + cudnn_frontend.digest()).encode()).hexdigest()[:16]


def build(cases: Sequence[Case], directory: Path) -> dict[str, Backward]:
    """The one launch of each of `cases`, compiled into `directory` unless it is there already.

    Raises RuntimeError with the compiling process's output where it fails.
    """
    flash_attn_4.compile_missing(__name__, cases, directory, flash_attn_4.environment)
    return {case.name: Backward.load(case, directory) for case in cases}


def sized(arguments: list[Any], tiles: int, keys: int) -> list[Any]:
    """A launch's arguments for fewer keys, of so many tiles."""
    return cudnn_frontend.retold(arguments, {0: tiles, 3: keys})  # as `record` tells them


def record(case: Case, directory: Path) -> None:
    """Compile a case's launch and write it; for a process of its own. Whole tiles, head dim 128."""
    import cutlass
    from cudnn.frost.tile_dsl.constants import MASK_CAUSAL, MASK_NONE, SCHED_NATURAL
    from cudnn.sdpa.fwd.kernels.sm80 import prefill_f16

    params, dtype = prefill_f16.PARAMS, cutlass.BFloat16 if case.dtype == "bfloat16" else cutlass.Float16
    (rows,), (keys,), dim, scale = case.seqlens_q, case.seqlens_k, case.dim, case.dim**-0.5
    known = [
        params.tile_m, params.num_warps, params.tile_n, dim, dim, dtype, True, True,
        MASK_CAUSAL if case.causal else MASK_NONE, 0, case.causal, False, False, False, False, False, False,
        False, SCHED_NATURAL, params.sched_l2_mib << 20,
    ]  # fmt: skip
    numbers = [keys // params.tile_n, scale / math.log(2), rows, keys, dim, 0, 1 / scale, 0, 1]
    recorder, tile = Recorder(case, directory), (params.tile_m, params.tile_n)
    recorder.launch(
        prefill_f16._sdpa_host, ["q", "k", "v", "out", "lse", *[None] * 7], known, numbers, tile
    )
    recorder.write()


if __name__ == "__main__":
    for asked in json.load(sys.stdin):
        record(Case.read(asked), Path(sys.argv[1]))

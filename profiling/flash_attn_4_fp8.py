"""flash-attn-4's FP8 forward kernels, compiled without a GPU, to be measured beside ours.

    peer = compiled(Case("d128_fp8", (1024,), (1024,), dim=128), "sm_100a")

It has them for Blackwell, in e4m3 with a scale for each sequence and KV head, and results in bf16.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.peers import flash_attn_4 as peers
from tests.peers.flash_attn_4 import Kernel

from . import flash_attn_4, sass
from .flash_attn_4 import Missing, Peer, directory_of, launch_shape, version

__all__ = ["Case", "compiled", "tensors_of"]
INPUTS = ("q", "k", "v")


@dataclass(frozen=True)
class Case(peers.Case):
    """As for 16 bits, and what q, k and v are to be multiplied by."""

    dtype: str = "float8_e4m3fn"

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """As for 16 bits."""
        shapes = super().shapes()
        shapes["out"] = shapes["out"][0], "bfloat16"
        return shapes | {f"{x}_descale": ((1, self.heads_kv), "float32") for x in INPUTS}


@functools.cache
def compiled(case: Case, target: str) -> Peer:
    """The kernel that its interface chooses for `case` on `target`. Raises Missing where it has none."""
    version()
    directory, case = directory_of(target, __file__), replace(case, arch=target)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        peers.compile_missing(__name__, [case], directory, peers.environment)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise Missing(f"does not compile for {target}: {lines[-1][:300]}") from error
    kernel = Kernel.load(case, directory / case.name)
    shape = launch_shape(kernel, tensors_of(case, *case.seqlens_q, *case.seqlens_k))
    return Peer(kernel, sass.embedded_cubin(kernel.object_file.read_bytes()), shape)


def tensors_of(case: Case, seqlen_q: int, seqlen_k: int) -> dict[str, torch.Tensor]:
    """Operands of a case with other lengths, the inputs normal, and bytes, as its host code takes them."""
    made = flash_attn_4.tensors_of(case, seqlen_q, seqlen_k)
    ones = {name: torch.ones_like(x) for name, x in made.items() if name.endswith("_descale")}
    return made | {name: made[name].view(torch.uint8) for name in INPUTS} | ones


if __name__ == "__main__":
    peers.record([Case.read(told) for told in json.load(sys.stdin)], Path(sys.argv[1]))

"""flash-attn-4's main backward kernel, compiled for any target without a GPU, to be measured beside ours.

    peer = compiled(Case("d64", (1024,), (1024,)), "sm_80")     its machine code, PTX, and launch

What is compiled and how its launches are described is tests/peers/flash_attn_4_backward.py's.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from unittest import mock

import torch

from tests.peers import flash_attn_4_backward
from tests.peers.flash_attn_4_backward import Backward, Case

from . import flash_attn_4, sass
from .flash_attn_4 import Kernel, Missing, Peer, Shape, directory_of, launch_shape, version

# At head dim 256 on Blackwell its interface takes two kernels of seven products together, unless told so.
FIVE_PRODUCTS = {"FLASH_ATTENTION_HD256_GENERIC_BWD": "1"}

__all__ = ["Case", "Missing", "call_of", "compiled", "launched", "tensors_of"]


@functools.cache
def compiled(case: Case, target: str) -> Peer:
    """The main kernel that its interface chooses for `case` on `target`. Raises Missing where it has none."""
    name = f"{case.name}_alone" if case.alone else case.name
    call = call_of(case := replace(case, arch=target, name=name))
    shape = launched(call.main, *case.seqlens_q, *case.seqlens_k)
    return Peer(call.main, sass.embedded_cubin(call.main.object_file.read_bytes()), shape)


def launched(kernel: Kernel, seqlen_q: int, seqlen_k: int) -> Shape:
    """The launch of a main kernel with other lengths, of whole tiles."""
    return launch_shape(kernel, tensors_of(kernel.case, seqlen_q, seqlen_k))


@functools.cache
def call_of(case: Case) -> Backward:
    """All launches of `case`, for the target that it names. Raises Missing where they do not compile."""
    version()
    directory = directory_of(case.arch, flash_attn_4_backward.__file__)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with mock.patch.dict(os.environ, FIVE_PRODUCTS):
            return flash_attn_4_backward.build([case], directory)[case.name]
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise Missing(f"does not compile for {case.arch}: {lines[-1][:300]}") from error


def tensors_of(case: Case, seqlen_q: int, seqlen_k: int) -> dict[str, torch.Tensor]:
    """Operands of a case's launches with other lengths, of whole tiles: the inputs normal, the rest 0."""
    made = flash_attn_4.tensors_of(case, seqlen_q, seqlen_k)
    for name, scratch in call_of(case).scratch.items():
        *outer, numbers = scratch.shape  # of all rows of Q
        shape = (*outer, numbers * seqlen_q // max(case.seqlens_q))
        made[name] = torch.zeros(shape, dtype=getattr(torch, scratch.dtype))
    return made

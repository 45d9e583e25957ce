"""cuDNN front end's kernels for sm_80, compiled without a GPU, to be measured beside ours.

    peer = compiled(Case("d128", (1024,), (1024,), dim=128))     its main backward kernel: its machine code,
                                                                 PTX, and launch

What is compiled and how its launches are described is tests/peers/cudnn_frontend.py's; where the wheel
nvidia-cudnn-frontend is installed, for which `pip install --no-deps` is enough.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from tests.peers import cudnn_frontend
from tests.peers.cudnn_frontend import NAME, PACKAGE, retold
from tests.peers.flash_attn_4_backward import Backward, Case

from . import sass
from .flash_attn_4 import Missing, Peer, directory_of, launch_shape, tensors

__all__ = ["NAME", "call_of", "compiled", "full_name", "has", "retold", "tensors_of"]
DIMS = (64, 128, 256)  # head dims that are looked at


def has(case: Any, arch: str) -> bool:
    """Whether the tables have it for a case of theirs on an architecture."""
    plain = arch == "sm80" and case.backward and case.rules == "plain"
    return plain and case.dims[0] == case.dims[1] and case.dims[0] in DIMS


def full_name() -> str:
    """With its version."""
    return f"{NAME} {metadata.version(PACKAGE)}"


def compiled(case: Case) -> Peer:
    """The main kernel that it has for `case`. Raises Missing where there is none to be had."""
    call = call_of(replace(case, heads=1, heads_kv=1))
    shape = launch_shape(call.main, tensors_of(call.case, *case.seqlens_q, *case.seqlens_k))
    return Peer(call.main, sass.embedded_cubin(call.main.object_file.read_bytes()), shape)


@functools.cache
def call_of(case: Case, kernels: ModuleType = cudnn_frontend) -> Backward:
    """All launches of `case`, the backward pass's or those of its forward kernel's module.

    Raises Missing where they are not to be had.
    """
    if not cudnn_frontend.installed():
        raise Missing("not installed")
    directory = directory_of("sm_80", kernels.__file__)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return kernels.build([case], directory)[case.name]
    except RuntimeError as error:
        raise Missing(f"does not compile: {str(error).strip().splitlines()[-1][:300]}") from error


def tensors_of(case: Case, seqlen_q: int, seqlen_k: int) -> dict[str, torch.Tensor]:
    """Operands of a case's launches with other lengths: the inputs normal, the rest 0."""
    case = replace(case, seqlens_q=(seqlen_q,), seqlens_k=(seqlen_k,))
    made = tensors(case)
    for name, scratch in cudnn_frontend.scratch_of(case).items():
        made[name] = torch.zeros(scratch["shape"])
    return made

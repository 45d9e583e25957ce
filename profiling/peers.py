"""Who is measured: cute_flash, torch's own back ends, FlashAttention-3 and flash-attn-4.

    run = prepare("flash-attention-3", row, machine, inputs)    # Missing says why it cannot be had
    out = run(i)                                                # (batch, seqlen, heads, dim_v) of input set i

FlashAttention-3 is taken from a wheel's shared library by `torch.ops`, without importing its package.
flash-attn-4 needs no compiler where `CUTE_FLASH_PEERS` names a directory of its kernels, compiled ahead of
time by `python -m profiling pack`; else its package is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import cute_flash
from tests.peers.flash_attn_4 import resolved

from .measure import CUDA, Row

OURS = "cute_flash"
PEERS_VARIABLE = "CUTE_FLASH_PEERS"
INDEX = "flash_attn_4.json"
# Beyond these lengths a peer is not timed: torch's standard attention holds the whole score matrix.
LONGEST_TIMED = {"torch math": 4096}

Run = Callable[[int], torch.Tensor]


class Missing(Exception):
    """A peer that cannot be had here, or not for this row; the text says why."""


def prepare(name: str, row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    """`name`'s attention on these sets of (q, k, v). Raises Missing, or KeyError for a name not in PEERS."""
    return PEERS[name](row, machine, inputs)


def _ours(row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    def run(i: int) -> torch.Tensor:
        return cute_flash.flash_attn_func(*inputs[i % len(inputs)], causal=row.causal)

    return run


def _torch(backend: SDPBackend, row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    on_gpu_only = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if machine != CUDA and backend in on_gpu_only:
        raise Missing("torch has it on GPUs only")
    heads_first = [tuple(x.transpose(1, 2) for x in tensors) for tensors in inputs]

    def run(i: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*heads_first[i % len(inputs)], is_causal=row.causal)
        return out.transpose(1, 2)

    return run


# Where a wheel keeps FlashAttention-3, and the name under which torch then knows it.
LIBRARIES = (
    ("fa3_fwd", "fa3_fwd/_C.abi3.so", "fa3_fwd"),
    ("xformers", "xformers/flash_attn_3/_C.so", "flash_attn_3"),
    ("flash_attn_3", "flash_attn_3/_C.abi3.so", "flash_attn_3"),
)


@functools.cache
def flash_attention_3() -> Any:
    """The operator `fwd` of FlashAttention-3. Raises Missing."""
    reasons = []
    for package, file, namespace in LIBRARIES:
        path = next((Path(p) / file for p in sys.path if (Path(p) / file).exists()), None)
        if path is None:
            reasons.append(f"{package}: not installed")
            continue
        try:
            torch.ops.load_library(str(path))
            return getattr(torch.ops, namespace).fwd
        except (OSError, RuntimeError, AttributeError) as error:
            reasons.append(f"{package}: {str(error).splitlines()[0]}")
    raise Missing("; ".join(reasons))


def _flash_attention_3(row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    operator = flash_attention_3()
    if machine != CUDA:
        raise Missing("its library loads here, but it runs on GPUs only")
    if torch.cuda.get_device_capability()[0] != 9:
        raise Missing("its kernels for other GPUs than Hopper are FlashAttention-2's")

    def run(i: int) -> torch.Tensor:
        return operator(*inputs[i % len(inputs)], is_causal=row.causal, num_splits=1)[0]

    return run


def _flash_attn_4(row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    directory = os.environ.get(PEERS_VARIABLE)
    if directory:
        return _precompiled_flash_attn_4(Path(directory), row, machine, inputs)
    for package in ("flash_attn.cute", "cutlass"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise Missing(f"no {package} here, and {PEERS_VARIABLE} does not name its compiled kernels")
    if machine != CUDA:
        raise Missing("its package is here, but it runs on GPUs only")
    from flash_attn.cute.interface import flash_attn_func

    def run(i: int) -> torch.Tensor:
        return flash_attn_func(*inputs[i % len(inputs)], causal=row.causal)[0]

    return run


def _precompiled_flash_attn_4(
    directory: Path, row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]
) -> Run:
    index = json.loads((directory / INDEX).read_text())
    if row.key not in index["rows"]:
        raise Missing(f"not among its compiled kernels: {index['left out'].get(row.key, 'not built')}")
    if machine != CUDA:
        raise Missing("its compiled kernels are here, but they run on GPUs only")
    from cute_flash import cuda_runtime, objectfile

    major, minor = torch.cuda.get_device_capability()
    if not index["target"].startswith(f"sm_{major}{minor}"):
        raise Missing(f"its kernels are compiled for {index['target']}, this GPU is sm_{major}{minor}")
    kernel = index["rows"][row.key]
    content = (directory / kernel["object"]).read_bytes()
    function = objectfile.load(content, "func", cuda_runtime.symbols())
    calls = []
    for q, k, v in inputs:
        lse = q.new_empty((row.batch, row.heads, row.seqlen), dtype=torch.float32)
        tensors = {"q": q, "k": k, "v": v, "out": q.new_empty(*q.shape[:-1], row.head_dim_v), "lse": lse}
        calls.append((tensors["out"], resolved(kernel["arguments"], tensors, row.seqlen)))

    def run(i: int) -> torch.Tensor:
        out, arguments = calls[i % len(calls)]
        function(*arguments)
        return out

    return run


PEERS: dict[str, Callable[[Row, str, list], Run]] = {
    OURS: _ours,
    "flash-attention-3": _flash_attention_3,
    "flash-attn-4": _flash_attn_4,
    "torch flash": functools.partial(_torch, SDPBackend.FLASH_ATTENTION),
    "torch cudnn": functools.partial(_torch, SDPBackend.CUDNN_ATTENTION),
    "torch efficient": functools.partial(_torch, SDPBackend.EFFICIENT_ATTENTION),
    "torch math": functools.partial(_torch, SDPBackend.MATH),
}

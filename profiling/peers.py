"""Who is measured: cute_flash, torch's own back ends, FlashAttention-3 and flash-attn-4.

    run = prepare("flash-attention-3", row, machine, inputs)    # Missing says why it cannot be had
    out = run(i)                                                # (batch, seqlen, heads, dim_v) of input set i
    dq, dk, dv = run(i)                                         # where row.backward

FlashAttention-3 is taken from a wheel's shared library by `torch.ops`, without importing its package.
flash-attn-4 needs no compiler where `CUTE_FLASH_PEERS` names a directory of its kernels, compiled ahead of
time by `python -m profiling pack`; else its package is imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import cute_flash
from cute_flash.dispatch import only
from tests.peers.flash_attn_4 import resolved

from .measure import CUDA, Row, output_gradient

OURS = "cute_flash"
PEERS_VARIABLE = "CUTE_FLASH_PEERS"
INDEX = "flash_attn_4.json"
# Beyond these lengths a peer is not timed: torch's standard attention holds the whole score matrix.
LONGEST_TIMED = {"torch math": 4096}

Run = Callable[[int], Any]


class Missing(Exception):
    """A peer that cannot be had here, or not for this row; the text says why."""


def prepare(name: str, row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    """`name`'s attention on these sets of (q, k, v). Raises Missing, or KeyError for an unknown name.

    name: one of PEERS, or what `kernel_name` says of a kernel of ours.
    """
    if name.startswith(f"{OURS} "):
        return _ours(row, machine, inputs, name.removeprefix(f"{OURS} "))
    return PEERS[name](row, machine, inputs)


def kernel_name(kernel: str) -> str:
    """What a kernel of ours is called that is not the first choice."""
    return f"{OURS} {kernel}"


def _ours(
    row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]], kernel: str | None = None
) -> Run:
    def attention(q, k, v) -> torch.Tensor:
        return cute_flash.flash_attn_func(q, k, v, causal=row.causal)

    def run(i: int) -> torch.Tensor:
        return attention(*inputs[i % len(inputs)])

    def run_only(i: int) -> torch.Tensor:
        with only(kernel):
            return run(i)

    if row.backward:
        try:
            return _by_autograd(attention, inputs)
        except NotImplementedError as error:
            raise Missing(" ".join(str(error).split())) from error
    with only(kernel):
        mask = cute_flash.Causal() if row.causal else None
        answer = cute_flash.supports("bfloat16", row.head_dim, row.head_dim_v, mask=mask)
    if not answer and kernel is not None:
        raise Missing(" ".join(str(answer).split()))
    return run if kernel is None else run_only


def _by_autograd(attention: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    """The backward pass of a function that autograd knows; the forward pass is done here."""
    calls = []
    with torch.enable_grad():
        for q, k, v in inputs:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            calls.append((attention(*leaves), leaves, output_gradient(v, q)))

    def run(i: int) -> tuple[torch.Tensor, ...]:
        out, leaves, gradient = calls[i % len(calls)]
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return run


def _torch(backend: SDPBackend, row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    on_gpu_only = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    if machine != CUDA and backend in on_gpu_only:
        raise Missing("torch has it on GPUs only")

    def attention(q, k, v) -> torch.Tensor:
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, is_causal=row.causal).transpose(1, 2)

    if row.backward:
        return _by_autograd(attention, inputs)
    heads_first = [tuple(x.transpose(1, 2) for x in tensors) for tensors in inputs]

    def run(i: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*heads_first[i % len(inputs)], is_causal=row.causal)
        return out.transpose(1, 2)

    return run


class Library(NamedTuple):
    """Where a wheel keeps FlashAttention-3, the name under which torch then knows it, and what it has."""

    package: str
    file: str
    namespace: str
    operators: tuple[str, ...] = ("fwd", "bwd")


# fa3-fwd declares `bwd` as well, but was built without.
LIBRARIES = (
    Library("fa3_fwd", "fa3_fwd/_C.abi3.so", "fa3_fwd", ("fwd",)),
    Library("xformers", "xformers/flash_attn_3/_C.so", "flash_attn_3"),
    Library("flash_attn_3", "flash_attn_3/_C.abi3.so", "flash_attn_3"),
)
# xformers' is linked to CUDA 12's runtime, which torch for CUDA 13 does not bring.
CUDA_12_RUNTIMES = ("nvidia/cuda_runtime/lib/libcudart.so.12", "cuda12/libcudart.so.12")


@functools.cache
def flash_attention_3(operator: str) -> Any:
    """FlashAttention-3's operator "fwd" or "bwd". Raises Missing."""
    reasons = []
    for package, file, namespace, operators in LIBRARIES:
        path = _on_the_path(file)
        if path is None or operator not in operators:
            reasons.append(f"{package}: {'not installed' if path is None else f'has no {operator}'}")
            continue
        try:
            if runtime := next(filter(None, map(_on_the_path, CUDA_12_RUNTIMES)), None):
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            torch.ops.load_library(str(path))
            return getattr(getattr(torch.ops, namespace), operator)
        except (OSError, RuntimeError, AttributeError) as error:
            reasons.append(f"{package}: {str(error).splitlines()[0]}")
    raise Missing("; ".join(reasons))


def _on_the_path(file: str) -> Path | None:
    return next((Path(p) / file for p in sys.path if (Path(p) / file).exists()), None)


def _flash_attention_3(row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    operator = flash_attention_3("bwd" if row.backward else "fwd")
    if machine != CUDA:
        raise Missing("its library loads here, but it runs on GPUs only")
    if torch.cuda.get_device_capability()[0] != 9:
        raise Missing("its kernels for other GPUs than Hopper are FlashAttention-2's")
    if row.backward:
        return _flash_attention_3_backward(operator, row, inputs)

    def run(i: int) -> torch.Tensor:
        return operator(*inputs[i % len(inputs)], is_causal=row.causal, num_splits=1)[0]

    return run


def _flash_attention_3_backward(
    operator: Any, row: Row, inputs: list[tuple[torch.Tensor, ...]]
) -> Run:
    forward = flash_attention_3("fwd")
    calls = []
    for q, k, v in inputs:
        out, lse = forward(q, k, v, is_causal=row.causal, num_splits=1)[:2]
        calls.append((output_gradient(v, q), q, k, v, out, lse))

    def run(i: int) -> tuple[torch.Tensor, ...]:
        return tuple(operator(*calls[i % len(calls)], is_causal=row.causal)[:3])

    return run


def _flash_attn_4(row: Row, machine: str, inputs: list[tuple[torch.Tensor, ...]]) -> Run:
    directory = os.environ.get(PEERS_VARIABLE)
    if directory and row.backward:
        raise Missing("its backward kernels are not carried compiled")
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

    if row.backward:
        return _by_autograd(lambda q, k, v: flash_attn_func(q, k, v, causal=row.causal)[0], inputs)

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

"""Main kernels of gradients in FP8 on trial: which are changed, and what is first said against a change.

A change is noticed where the emulator objects or a bit of a sum differs. Two key tiles at most add to a query
tile, and one head to a key tile, so that sums have the same bits in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cute_flash
from cute_flash import executable
from cute_flash.arch.kernel import Kernel, Step
from cute_flash.arch.quantized_backward import QuantizedBackwardProblem
from cute_flash.arch.sm90.fp8_backward import QUANTIZED_BACKWARD as HOPPERS
from cute_flash.arch.sm90.fp8_backward import tuning as hopper
from cute_flash.arch.sm100.fp8_backward import QUANTIZED_BACKWARD as BLACKWELLS
from cute_flash.arch.sm100.fp8_backward import tuning as blackwell
from cute_flash.cache import Artifact
from cute_flash.dispatch import EMULATED
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from cute_flash.fp8 import flash_attn_fp8_func
from cute_flash.launch import executable as shipped
from cute_flash.problems import problem
from tests import proofs

from .mutations import TCGEN05, TMA, WGMMA, Mutation
from .subjects import HANDED_OVER, IN_LANES
from .trial import ATTEMPTS, Launch

SUMS = ("grad_q_sum", "grad_k_sum", "grad_v_sum")


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel to change, by a config of its own, so that tuning does not move the sites.

    lengths: (seqlen_q, seqlen_k). dims: of heads.
    """

    device: str
    kernel: Kernel
    config: Any
    mutations: dict[str, Mutation]
    lengths: tuple[int, int]
    dims: tuple[int, int]


# Three query tiles and two key tiles, of which one is not whole: every ring is filled again.
LENGTHS = (260, 140)
SUBJECTS = {
    # Warpgroups share out the rows of dQ; products of dK and dV have all columns.
    "sm90": Subject(
        "sm90", HOPPERS, hopper.Config(tile_m=128, columns=64, columns_v=64, piece_columns=64), TMA | WGMMA,
        (400, 140), (48, 48),
    ),
    # Its columns; products have pieces of them. Five query tiles of 64 rows.
    "sm90 pieces": Subject(
        "sm90", HOPPERS, hopper.Config(columns=128, columns_v=128, piece_columns=32), TMA | WGMMA, (300, 228),
        (128, 112),
    ),
    # P and dQ have columns of their own.
    "sm100": Subject(
        "sm100", BLACKWELLS, blackwell.Config(p_apart=True, **blackwell.PIECEWISE), TMA | TCGEN05, LENGTHS,
        (16, 16),
    ),
    # P lies over S, dQ over dP, which the store role empties at once.
    "sm100 over scores": Subject(
        "sm100", BLACKWELLS, blackwell.Config(**blackwell.AT_ONCE), HANDED_OVER, LENGTHS, (128, 16)
    ),
    # 64 rows of Q, whose dQ has its last columns beside its first ones, over dP.
    "sm100 64 rows": Subject(
        "sm100", BLACKWELLS, blackwell.Config(tile_m=64, chunk=16, sums=4, **blackwell.AT_ONCE), IN_LANES,
        (200, 140), (48, 16),
    ),
    # Two threads share a key, and K's columns come to dQ in two halves, of which the next S begins between.
    "sm100 64 keys": Subject(
        "sm100", BLACKWELLS, blackwell.Config(tile_n=64, chunk=16, **blackwell.AT_ONCE), IN_LANES, (260, 100),
        (256, 16),
    ),
}  # fmt: skip


def step_of(subject: Subject) -> Step:
    """The launch of the kernel that is changed."""
    dim, dim_v = subject.dims
    code = cute_flash.rules.encode([], []).code
    forward = problem(dtype=torch.float8_e4m3fn, head_dim=dim, head_dim_v=dim_v, code=code)
    given = QuantizedBackwardProblem(forward), EMULATED[subject.device], subject.config
    return next(step for step in subject.kernel.steps(*given).steps if step.kernel is subject.kernel)


@cache
def compiled(name: str) -> Artifact:
    """The kernel that is changed."""
    subject = SUBJECTS[name]
    return executable.artifact(*step_of(subject).compiled, EMULATED[subject.device])


@cache
def operands(name: str) -> tuple:
    """What the kernel is launched with for fresh normal inputs, when sums have been cleared."""
    subject, found = SUBJECTS[name], []
    (rows, keys), (dim, dim_v) = subject.lengths, subject.dims
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, dim), (keys, dim), (keys, dim_v), (rows, dim_v)
    q, k, v, dout = (torch.randn(1, n, 1, d, generator=generator).bfloat16() for n, d in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def launched(kernel: Kernel, *asked: Any):
        if kernel is subject.kernel:
            return lambda *given: found.append(copied(given))
        return shipped(kernel, *asked)

    with cute_flash.emulated(subject.device, contract="ptxas"):
        out = flash_attn_fp8_func(*leaves)
        with mock.patch("cute_flash.launch.executable", launched):
            torch.autograd.grad(out, leaves, dout)
    return found[0]


def copied(given: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in given)


def run(name: str, ptx: str, **options: Any) -> torch.Tensor:
    """All sums, in one row, from this PTX."""
    subject = SUBJECTS[name]
    changed = EmulatedKernel(compiled(name)._replace(ptx=ptx.encode()), EMULATED[subject.device])
    given = copied(operands(name))
    with cute_flash.emulated(subject.device, contract="ptxas", **options):
        changed(*given)
    call = dict(zip(step_of(subject).operands(), given, strict=True))
    return torch.cat([call[each].flatten() for each in SUMS])


@cache
def right(name: str) -> torch.Tensor:
    """What the kernel results in as it is."""
    return run(name, compiled(name).ptx.decode())


def objection(name: str, ptx: str) -> str:
    """What is first said against a kernel; empty where nothing is."""
    for options in ATTEMPTS:
        try:
            if not torch.equal(run(name, ptx, **options), right(name)):
                return "another result"
        except EmulatorError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def unnoticed(name: str, mutants: list[tuple[int, str, str]]) -> str:
    """Sites of the changes that nothing objects to, in words."""
    missed = [number for number, _, text in mutants if not objection(name, text)]
    return " ".join(map(str, (f"unnoticed of {len(mutants)}:", *missed)))


def dependencies(name: str) -> Iterator[bytes]:
    """What a verdict depends on besides a change."""
    subject = SUBJECTS[name]
    yield from proofs.emulator()
    yield proofs.meaning(Path(__file__))
    yield repr((ATTEMPTS, EMULATED[subject.device], subject.config, subject.lengths, subject.dims)).encode()
    yield from Launch(None, compiled(name), ()).digested()
    for x in operands(name):
        is_tensor = isinstance(x, torch.Tensor)
        yield x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if is_tensor else repr(x).encode()

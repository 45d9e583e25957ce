"""Kernels that others wrote and proved on hardware give right answers on this emulator, unmodified.

flash-attn-4's own forward kernels, launched through its own host code: with asynchronous copies and products
that happen at once or as late as the waits allow, and with warps in random order.
"""

from __future__ import annotations

import fcntl
import math
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi

from cute_flash import emulator, objectfile
from cute_flash.emulator.execution.launch import Driver, View
from tests import accuracy, proofs, reference
from tests.accuracy import LSE_ATOL, assert_accurate
from tests.orders import RIGHT
from tests.peers import flash_attn_4
from tests.peers.flash_attn_4 import BLACKWELL, CASES, HOPPER, Case, Kernel, resolved
from tests.proofs import Proof

NAMED = {case.name: case for case in (*CASES, *HOPPER, *BLACKWELL)}
# Bytes per block, by opting in.
SHARED_MEMORY = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "sm_103a": 232448}
# What each must have executed: what its architecture is known by.
OPCODES = {
    "sm_80": ("mma.sync",),
    "sm_90a": ("wgmma.mma_async",),
    "sm_100a": ("tcgen05.mma",),
    "sm_103a": ("tcgen05.mma", "tcgen05.ld.red"),
}
# Relative error of the polynomial that replaces some of the exponentials, and so of their sums.
POLYNOMIAL = {"sm_80": 0.0, "sm_90a": 0.0, "sm_100a": 1e-4, "sm_103a": 0.0}
# On sm_80 the peer leaves the rows of Q beyond the sequence unwritten; it reads them and drops the results.
UNINITIALIZED = {"sm_80": "poison", "sm_90a": "error", "sm_100a": "error", "sm_103a": "error"}
EAGER = {"asynchrony": "eager"}
LATE = {"asynchrony": "late"}
RANDOM = [{"asynchrony": "random", "schedule": "random", "seed": seed} for seed in range(3)]
MORE = [{"asynchrony": "random", "schedule": "random", "seed": seed} for seed in (3, 4)]


def built_once(peer: Any, cases: list[Any]) -> dict[str, Any]:
    """What a peer's module builds of these cases, by whichever worker comes first."""
    kept = f"{peer.__name__.rpartition('.')[2]}-{peer.digest()}"
    directory = Path(os.environ["CUTE_FLASH_CACHE"]) / kept
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return peer.build(cases, directory)


@cache
def kernel_of(name: str, alone: bool = True) -> Kernel:
    """Compiled with all those of its target, unless `alone`."""
    wanted = NAMED[name]
    cases = [wanted] if alone else [case for case in NAMED.values() if case.arch == wanted.arch]
    return built_once(flash_attn_4, cases)[name]


@cache
def ground() -> tuple[bytes, ...]:
    """All that a kernel's answers depend on but for its case and the order of events."""
    files = (Path(module.__file__) for module in (accuracy, reference, sys.modules[__name__]))
    return (*proofs.emulator(), *map(proofs.meaning, files), flash_attn_4.digest().encode())


def hold(name: str, options: dict[str, Any], proven: Proof) -> None:
    """A kernel's right answers in an order of events: proven once, all those of a kernel together."""

    inputs = (repr((NAMED[name], options)).encode(), *ground())

    def trial() -> str:
        (report,) = check(kernel_of(name, alone=proven.fits(inputs)), options)
        for wanted in OPCODES[NAMED[name].arch]:
            assert sum(n for opcode, n in report.opcodes.items() if opcode.startswith(wanted)) > 0
        return RIGHT

    assert proven(trial, inputs, together=f"flash-attn-4 {name}") == RIGHT


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Tensors of a case: inputs normal, outputs NaN."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, dtype) in case.shapes().items():
        if name.startswith("cu_seqlens"):
            lengths = case.seqlens_q if name.endswith("q") else case.seqlens_k
            tensors[name] = torch.tensor([0, *lengths]).cumsum(0).int()
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    for name in ("out", "lse"):
        tensors[name].fill_(math.nan)
    return tensors


program_of = cache(emulator.Program)


def launch(kernel: Kernel, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> list[Any]:
    """Run the peer's host code on `tensors`, as its interface would call it."""
    driver = Driver(program_of(kernel.ptx), SHARED_MEMORY[kernel.case.arch])
    function = objectfile.load(kernel.object_file.read_bytes(), "func", driver.symbols)
    views = {name: View(tensor, name) for name, tensor in tensors.items()}
    passed = {name: tvm_ffi.from_dlpack(view) for name, view in views.items()}
    arguments = resolved(kernel.arguments, passed, max(kernel.case.seqlens_q))
    options = emulator.Options(uninitialized=UNINITIALIZED[kernel.case.arch], **options)
    return driver.call(function, views.values(), arguments, options)


def check(kernel: Kernel, options: dict[str, Any]) -> list[Any]:
    """Launch, and hold the peer's results to the accuracy rule that ours are held to."""
    case, tensors = kernel.case, inputs(kernel.case)
    reports = launch(kernel, tensors, options)
    told = {name: tensor for name, tensor in tensors.items() if name.startswith("cu_seqlens")}
    q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
    lse_atol = LSE_ATOL + POLYNOMIAL[case.arch]
    rules = {"causal": case.causal, "window_size": case.window, **told}
    assert_accurate(out, lse, (q, k, v), lse_atol=lse_atol, **rules)
    return reports


@pytest.mark.parametrize("options", [EAGER, LATE], ids=["eager", "late"])
@pytest.mark.parametrize("name", NAMED)
def test_right_answers(name, options, proven):
    hold(name, options, proven)


@pytest.mark.parametrize("options", RANDOM, ids=lambda options: f"seed{options['seed']}")
@pytest.mark.parametrize("name", ["d64", "d64_causal", "d128_causal_gqa", "d64_varlen_causal"])
def test_right_answers_in_any_order(name, options, proven):
    hold(name, options, proven)


@pytest.mark.parametrize("options", [*RANDOM, *MORE], ids=lambda options: f"seed{options['seed']}")
@pytest.mark.parametrize(
    "name",
    [
        *(case.name for case in HOPPER),
        *("sm100_d64_causal", "sm100_d128", "sm100_d192_dv128", "sm100_d256"),
    ],
)
def test_right_answers_of_many_roles_in_any_order(name, options, proven):
    hold(name, options, proven)


def test_the_short_way_in():
    """As a kernel to call, and by name where an operand is wrong."""
    kernel, tensors = kernel_of("d64"), inputs(NAMED["d64"])
    program, host = emulator.Program(kernel.ptx), kernel.object_file.read_bytes()
    called = emulator.CuteKernel(program, host, "func", "sm80", tensors)
    arguments = resolved(kernel.arguments, tensors, max(kernel.case.seqlens_q))
    verdict = called.examine(*arguments, runs=("eager poison", "late races poison"))
    assert verdict and sum(report.instructions for report in verdict.reports["late races poison"]) > 0
    lse_atol = LSE_ATOL + POLYNOMIAL[kernel.case.arch]
    q, k, v, out, lse = (tensors[name] for name in ("q", "k", "v", "out", "lse"))
    assert_accurate(out, lse, (q, k, v), lse_atol=lse_atol, causal=kernel.case.causal)


@pytest.mark.parametrize("name", ["d64", "d128_causal_gqa", *(case.name for case in (*HOPPER, *BLACKWELL))])
def test_no_data_races(name, proven):
    hold(name, {"asynchrony": "late", "races": True}, proven)


def test_an_error_in_the_kernel_is_an_error_in_the_answer():
    """The same kernel with one instruction wrong: exp2's argument is not scaled."""
    kernel = kernel_of("d64")
    wrong = kernel.ptx.replace("ex2.approx.ftz.f32", "rcp.approx.ftz.f32", 1)
    with pytest.raises(AssertionError, match="error"):
        check(replace(kernel, ptx=wrong), EAGER)

"""Backward kernels that others wrote and proved on hardware give right gradients here, unmodified.

flash-attn-4's, launched through its own host code in the order in which its interface launches them: one
kernel after another on tensors that they share, with asynchronous copies as late as the waits allow and with
warps in random order. Scratch that the interface does not clear holds NaN at first.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import accuracy, proofs, reference
from tests.accuracy import assert_gradients_accurate
from tests.emulator import test_conformance as forward
from tests.orders import RIGHT
from tests.peers import cudnn_frontend
from tests.peers import flash_attn_4_backward as peer
from tests.peers.flash_attn_4_backward import AMPERE, BLACKWELL, GRADIENTS, HOPPER, Backward, Case

NAMED = {case.name: case for case in (*AMPERE, *HOPPER, *BLACKWELL)}


RACES = {"asynchrony": "late", "races": True}


@cache
def call_of(name: str, alone: bool = True) -> Backward:
    """Compiled with all those of its target, unless `alone`."""
    wanted = NAMED[name]
    cases = [wanted] if alone else [case for case in NAMED.values() if case.arch == wanted.arch]
    return forward.built_once(peer, cases)[name]


@cache
def ground() -> tuple[bytes, ...]:
    """All that the gradients depend on but for the case and the order of events."""
    files = (Path(module.__file__) for module in (accuracy, reference, forward, sys.modules[__name__]))
    return (*proofs.emulator(), *map(proofs.meaning, files), peer.digest().encode())


def tensors_of(call: Backward) -> dict[str, torch.Tensor]:
    """Inputs normal, with the output and log-sum-exp that the forward pass would give; the rest NaN."""
    case, tensors = call.case, forward.inputs(call.case)
    q, k, v = (tensors[name] for name in "qkv")
    out, lse = reference.attention(q, k, v, **rules_of(case, tensors))
    tensors |= {"out": out.to(q.dtype), "lse": lse.float()}
    for name in GRADIENTS:
        tensors[name].fill_(math.nan)
    for name, made in call.scratch.items():
        value = 0.0 if made.cleared else math.nan
        tensors[name] = torch.full(made.shape, value, dtype=getattr(torch, made.dtype))
    return tensors


def rules_of(case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Keywords of the oracle."""
    told = {name: tensor for name, tensor in tensors.items() if name.startswith("cu_seqlens")}
    return {"causal": case.causal, "window_size": case.window, **told}


def check(call: Backward, options: dict[str, Any]) -> list[Any]:
    """Launch, and hold the peer's gradients to the accuracy rule that ours are held to.

    The first kernel writes log-sum-exps of the next tile's rows too, the same that are written there: a race
    that changes nothing, for which that kernel is not watched. One that is deterministic adds in one order.
    Blackwell's do what PTX leaves undefined: CTAs exit while their last stores read and before each other's
    last commits arrive, and in pairs all lanes of a warp make a barrier, and one arrives for what all have
    stored to tensor memory.
    """
    tensors, reports = tensors_of(call), []
    for launch in call.launches:
        watched = options.get("races", False) and launch is not call.launches[0]
        told = {"races": watched, "ordered_reductions": watched and call.case.deterministic}
        told["permissive"] = call.case.arch == "sm_100a"
        reports += forward.launch(launch, tensors, options | told)
    found = [tensors[name] for name in GRADIENTS]
    qkv, dlse = tuple(tensors[name] for name in "qkv"), torch.zeros_like(tensors["lse"])
    assert_gradients_accurate(found, qkv, tensors["dout"], dlse, **rules_of(call.case, tensors))
    return reports


def hold(name: str, options: dict[str, Any], proven: proofs.Proof) -> None:
    """A call's right gradients in an order of events: proven once, all those of a call together."""

    inputs = (repr((NAMED[name], options)).encode(), *ground())

    def trial() -> str:
        _, main, *_ = check(call_of(name, alone=proven.fits(inputs)), options)
        for wanted in forward.OPCODES[NAMED[name].arch]:
            assert sum(n for opcode, n in main.opcodes.items() if opcode.startswith(wanted)) > 0
        return RIGHT

    assert proven(trial, inputs, together=f"flash-attn-4 {name}") == RIGHT


@pytest.mark.parametrize("options", [RACES, forward.RANDOM[0]], ids=["late_races", "random"])
@pytest.mark.parametrize("name", NAMED)
def test_right_gradients(name, options, proven):
    hold(name, options, proven)


def test_an_error_in_the_kernel_is_an_error_in_the_gradients():
    """The same main kernel with one instruction wrong: P is another function of the scores."""
    call = call_of("backward_d64")
    first, main, *others = call.launches
    wrong = replace(main, ptx=main.ptx.replace("ex2.approx.ftz.f32", "tanh.approx.f32", 1))
    assert wrong != main
    with pytest.raises(AssertionError, match="d[qkv]: error"):
        check(replace(call, launches=(first, wrong, *others)), forward.EAGER)


@pytest.mark.skipif(not cudnn_frontend.installed(), reason="needs the wheel nvidia-cudnn-frontend")
@pytest.mark.parametrize("case", cudnn_frontend.CASES, ids=lambda case: case.name)
def test_cudnn_front_end_s_kernels(case):
    """Not among the test's requirements, as it asks for a CUDA 13 compiler: where it is installed."""
    check(forward.built_once(cudnn_frontend, [case])[case.name], RACES)

"""Answers with copies, products and warps in another order: each proven once, then taken from the ledger."""

from __future__ import annotations

from functools import cache
from typing import Any

from cute_flash import dispatch
from cute_flash.arch.sm80 import BACKWARD
from tests.cases import Case
from tests.emulator.negative.trial import Subject, dependencies
from tests.harness import Call, call_of, steps_of
from tests.proofs import Proof

RIGHT = "right"


def hold(case: Case, device: str, proven: Proof, **options: Any) -> None:
    """Hold a case to the accuracy rule. options: the emulator's, which say in what order things happen."""

    def trial() -> str:
        call_of(case).check(device, **options)
        return RIGHT

    assert proven(trial, (repr(options).encode(), *ground(case, device))) == RIGHT


def hold_gradients(case: Case, device: str, proven: Proof, **options: Any) -> None:
    """The same of a case's gradients, forward pass and all."""

    def trial() -> str:
        Call.make(case).check_gradients(device, **options)
        return RIGHT

    assert proven(trial, (repr(options).encode(), *ground_of_gradients(case, device))) == RIGHT


def ground(case: Case, device: str) -> tuple[bytes, ...]:
    """All that a case's answer depends on but for the order of events."""
    return _ground(case, device, dispatch.EMULATED[device], steps_of(case, device))


@cache
def _ground(case: Case, device: str, *what_tuning_makes_of_it: Any) -> tuple[bytes, ...]:
    return tuple(dependencies(Subject(case, None, {}), device))


@cache
def ground_of_gradients(case: Case, device: str) -> tuple[bytes, ...]:
    """All that a case's gradients depend on but for the order of events."""
    return tuple(dependencies(Subject(case, None, {}, kernel=BACKWARD), device))

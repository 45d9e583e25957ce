"""Attention whose sequences are shared out on the device: which comes first, its keys in how many parts.

The host does not know how long sequences are. It launches a CTA for every tile and each of as many parts
as any sequence may have. A CTA looks up how many its own has; one beyond them has no keys, and writes nothing
but log-sum-exp -inf, by which the combine kernel leaves its part out. So a launch does not depend on lengths,
and a CUDA graph serves all of them (FlashAttention-3, `get_scheduler_metadata`; parts: Dao et al. 2023,
"Flash-Decoding").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .problem import Operands, Problem, Spec, forward_specs


@dataclass(frozen=True)
class ScheduledProblem(Problem):
    """As `Problem`, with the order of sequences given and, where keys are split, in how many parts each."""

    scheduled: ClassVar[bool] = True

    def features(self) -> tuple[str, ...]:
        """As `Problem.features`."""
        return (*super().features(), "schedule")

    def specs(self) -> ScheduledOperands:
        """A Spec for every operand."""
        return ScheduledOperands(*forward_specs(self), *schedule_specs(self.split_kv))


class Schedule(NamedTuple):
    """int32 (batch,) each: in how many parts a sequence's keys are taken; the sequences in their order."""

    sequence_splits: Any
    sequence_order: Any

    @staticmethod
    def of(problem: Problem, operands: list[Any]) -> Schedule | None:
        """Of the operands of a launch, in their order."""
        return Schedule(*operands[-len(Schedule._fields) :]) if problem.scheduled else None


def schedule_specs(split_kv: bool) -> Schedule:
    """A Spec for each, None where there is none."""

    def numbers(meaning: str, values: str) -> Spec:
        return Spec("int32", ("batch",), "contiguous", meaning, values=values)

    parts = numbers("parts of the keys, per sequence", "is 1") if split_kv else None
    return Schedule(parts, numbers("sequences, each once, in their order", "numbered 0"))


# Everything a kernel is launched with, in launch order; None where there is none.
ScheduledOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "ScheduledOperands", [(name, Any) for name in (*Operands._fields, *Schedule._fields)]
)


def without_schedule(operands: list[Any]) -> Operands:
    """The other operands of a launch, by their names."""
    return Operands(*operands[: len(Operands._fields)])

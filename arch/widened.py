"""Attention of q of 16 bits to a cache of 8: what a call asks, and the operands that it has besides.

    S = k_scale softmax_scale · Q K -> rules -> softmax -> P in 16 bits -> O = P V v_scale

Kernels widen keys and values to q's dtype, exactly: all products are of 16 bits. A scale is one float32 for
all rows of a KV head's sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .precision import Precision
from .problem import Operands, Problem, Spec, forward_specs
from .quantized import DTYPES, FORMATS
from .scheduled import Schedule, schedule_specs


@dataclass(frozen=True)
class WidenedProblem(Problem):
    """As `Problem`, with k and v in a cache of kv_dtype, float8_e4m3fn or float8_e5m2."""

    operation: ClassVar[str] = "widened"
    kv_dtype: str = DTYPES[0]

    @property
    def kv_precision(self) -> Precision:
        """Of k and v in memory."""
        return FORMATS[self.kv_dtype].element

    def features(self) -> tuple[str, ...]:
        """As `Problem.features`."""
        return (*super().features(), *(("schedule",) if self.scheduled else ()))

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features."""
        return (*super().conflicts(), *self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if self.cache is None:
            yield "no k and v of 8 bits beside q of 16 but in a cache"
        if self.out_dtype not in (None, self.dtype):
            yield f"out_dtype {self.out_dtype} is not q's, {self.dtype}"

    def specs(self) -> WidenedOperands:
        """A Spec for every operand. Elements of k and v are passed as bytes."""
        asked = forward_specs(self)._asdict()
        asked |= {name: asked[name]._replace(dtype="uint8") for name in "kv"}
        dims = ("batch", "num_heads_kv")
        for name in "kv":
            asked[f"{name}_scale"] = Spec("float32", dims, "contiguous", f"scales of {name}", values="is 1")
        schedule = schedule_specs(self.split_kv) if self.scheduled else Schedule(None, None)
        return WidenedOperands(**asked, **schedule._asdict())


@dataclass(frozen=True)
class ScheduledWidenedProblem(WidenedProblem):
    """The same with a schedule, as a `ScheduledProblem` has it."""

    scheduled: ClassVar[bool] = True


class KvScales(NamedTuple):
    """float32, (batch, KV heads)."""

    k_scale: Any
    v_scale: Any


# Everything a kernel is launched with, in launch order; None where there is none.
WidenedOperands = NamedTuple(  # noqa: UP014 - made of the fields of three others
    "WidenedOperands", [(name, Any) for of in (Operands, KvScales, Schedule) for name in of._fields]
)


def named(operands: list[Any]) -> WidenedOperands:
    """The operands of a launch, in their order, by their names, without a schedule."""
    return WidenedOperands(*operands)._replace(sequence_splits=None, sequence_order=None)

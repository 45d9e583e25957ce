"""Attention on q, k and v of 8 bits: what a call asks, and the operands that it has besides.

    S = q_scale k_scale softmax_scale · Q K -> mask -> softmax -> P rounded to 8 bits -> O = P V v_scale

A scale is one float32 for all rows of a KV head's sequence, or one for each block of rows of a head. Blocks
are counted from a sequence's first row, packed or not; of keys in a cache from the first in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .precision import QUANTIZATION_BLOCKS, QUANTIZATIONS, Precision
from .problem import Operands, Problem, Spec, forward_specs
from .scheduled import Schedule, schedule_specs

FORMATS = {QUANTIZATIONS[name].element.name: QUANTIZATIONS[name] for name in ("e4m3", "e5m2")}
DTYPES = tuple(FORMATS)


@dataclass(frozen=True)
class QuantizedProblem(Problem):
    """As `Problem`, with q, k and v of dtype float8_e4m3fn or float8_e5m2 and a result of `out_dtype`.

    block: rows of q, and of k and v, that share a scale; None: all of a sequence and a KV head.
    """

    operation: ClassVar[str] = "quantized"
    block: int | None = None

    @property
    def precision(self) -> Precision:
        """Of q, k and v."""
        return FORMATS[self.dtype].element

    @property
    def p_precision(self) -> Precision:
        """e4m3, whatever v has: weights need digits, not range."""
        return QUANTIZATIONS["e4m3"].element

    def features(self) -> tuple[str, ...]:
        """As `Problem.features`."""
        scales = {128: ("scale_blocks",), 64: ("scale_blocks_64",)}
        return super().features() + scales.get(self.block, ()) + (("schedule",) if self.scheduled else ())

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features."""
        found = super().conflicts()
        if self.out_dtype is None:
            found += ("out_dtype None: results are not of 8 bits",)
        if self.block not in (None, *QUANTIZATION_BLOCKS):
            found += (f"no scales of blocks of {self.block} rows: allowed are {QUANTIZATION_BLOCKS}",)
        return found

    def specs(self) -> QuantizedOperands:
        """A Spec for every operand. Elements are passed as bytes."""
        asked = forward_specs(self)._asdict()
        asked |= {name: asked[name]._replace(dtype="uint8") for name in "qkv"}
        heads = "num_heads_kv" if self.block is None else "num_heads_q"
        scales = {"q": (heads, "q_scale_blocks"), "k": ("num_heads_kv", "k_scale_blocks")}
        for name in "qkv":
            of_head, blocks = scales.get(name, scales["k"])
            dims = ("batch", of_head, *((blocks,) if self.block else ()))
            asked[f"{name}_scale"] = Spec("float32", dims, "contiguous", f"scales of {name}", values="is 1")
        schedule = schedule_specs(self.split_kv) if self.scheduled else Schedule(None, None)
        return QuantizedOperands(**asked, **schedule._asdict())

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        sizes = super().example_sizes()
        if self.block:
            rows = {x: sizes.get(f"seqlen_{x}", sizes.get(f"total_{x}")) for x in "qk"}
            sizes |= {f"{x}_scale_blocks": -(-of_one // self.block) for x, of_one in rows.items()}
        return sizes


@dataclass(frozen=True)
class ScheduledQuantizedProblem(QuantizedProblem):
    """The same with a schedule, as a `ScheduledProblem` has it."""

    scheduled: ClassVar[bool] = True


class Scales(NamedTuple):
    """float32, (batch, KV heads), or with blocks (batch, heads or KV heads, blocks)."""

    q_scale: Any
    k_scale: Any
    v_scale: Any


# Everything a kernel is launched with, in launch order; None where there is none.
QuantizedOperands = NamedTuple(  # noqa: UP014 - made of the fields of three others
    "QuantizedOperands", [(name, Any) for of in (Operands, Scales, Schedule) for name in of._fields]
)


def named(operands: list[Any]) -> QuantizedOperands:
    """The operands of a launch, in their order, by their names, without a schedule."""
    return QuantizedOperands(*operands)._replace(sequence_splits=None, sequence_order=None)

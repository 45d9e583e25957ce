"""Gradients of attention on q, k and v of 8 bits, all five products of which have 8 bits too.

The launches and equations are those of backward.py. dO is quantized beforehand, like q, k and v with one
scale for a sequence's rows of a KV head's heads, so that no sum meets two scales:

    dP_8 = dO_8 V_8^T                          dP = v_scale grad_out_scale dP_8
    P_8  = e4m3(2**P_LIFT P)                   dV = 2**-P_LIFT grad_out_scale P_8^T dO_8
    dS_8 = e5m2(2**DS_LIFT P (dP_8 - D_8))     dS = 2**-DS_LIFT v_scale grad_out_scale dS_8
    dQ   = softmax_scale k_scale dS_8 K_8      dK = softmax_scale q_scale dS_8^T Q_8, in units of dS

P is 1 at most, and needs no scale. Nor does dS: P (dP - D) is at most half of what |dP| can be, 2**24.6 with
256 columns of e4m3 at their largest, which 2**DS_LIFT brings into the range of e5m2; and that range, 2**32,
has room for rows of a million keys below it. What a score rule's slopes take beyond it saturates; for a
gradient of the log-sum-exp, which D has in these units, dO's scale must leave room (`cute_flash/fp8.py`).

D is of the dO that is multiplied: where a key dominates a row, dP - D is a small difference of large numbers.
The preprocess brings D and the log-sum-exp to the units of the main kernel, whose products then cost no
instruction more than those of 16 bits. All gradients leave it as sums; the postprocess knows their scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from .backward import (
    PREPROCESS,
    BackwardOperands,
    BackwardProblem,
    PostprocessOperands,
    PostprocessProblem,
    PreprocessOperands,
    PreprocessProblem,
)
from .problem import Spec
from .quantized import QuantizedProblem

P_LIFT, DS_LIFT = 8, -9


class QuantizedBackwardProblem(BackwardProblem):
    """As `BackwardProblem`, of q, k and v of dtype float8_e4m3fn; gradients are of the result's dtype."""

    operation: ClassVar[str] = "quantized_backward"
    forward: QuantizedProblem

    def conflicts(self) -> tuple[str, ...]:
        """Those of the forward pass, and what sums with one scale exclude."""
        found = super().conflicts()
        if self.forward.block is not None:
            found += (f"no gradients with scales of blocks of {self.forward.block} rows: sums have one",)
        return found

    @property
    def summed(self) -> tuple[str, ...]:
        """All of them."""
        return ("q", "k", "v")

    def before(self) -> QuantizedPreprocessProblem:
        """What comes before the main kernel."""
        given = vars(super().before()) | {"dtype": self.forward.out_dtype}
        return QuantizedPreprocessProblem(**given)

    def after(self, of: str) -> QuantizedPostprocessProblem:
        """What comes after it, of one of the gradients."""
        given = vars(super().after(of)) | {"dtype": self.forward.out_dtype}
        return QuantizedPostprocessProblem(**given)

    def main(self) -> QuantizedBackwardProblem:
        """What is left of it for the main kernel, to which heads share keys even where each has its own."""
        found = super().main()
        return replace(found, forward=replace(found.forward, gqa=True))

    def specs(self) -> QuantizedBackwardOperands:
        """A Spec for every operand, None where there is none. Elements are passed as bytes."""
        given, asked = self.forward.specs(), super().specs()
        asked = asked._replace(grad_out=asked.grad_out._replace(dtype="uint8"))
        return QuantizedBackwardOperands(*asked, q_scale=given.q_scale, k_scale=given.k_scale)


class Scales(NamedTuple):
    """float32, (batch, KV heads), of what scores are products of."""

    q_scale: Any
    k_scale: Any


# Everything a main kernel is launched with, in launch order; None where there is none.
QuantizedBackwardOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "QuantizedBackwardOperands", [(name, Any) for of in (BackwardOperands, Scales) for name in of._fields]
)


class QuantizedPreprocessProblem(PreprocessProblem):
    """As `PreprocessProblem`, dO being of 8 bits. dtype: of the result."""

    def specs(self) -> QuantizedPreprocessOperands:
        """A Spec for every operand, None where there is none."""
        asked = super().specs()
        asked = asked._replace(grad_out=asked.grad_out._replace(dtype="uint8"))
        return QuantizedPreprocessOperands(*asked, v_scale=scale("v"), grad_out_scale=scale("grad_out"))

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        return super().example_sizes() | {"num_heads_kv": 1}


class ScalesOfDs(NamedTuple):
    """float32, (batch, KV heads), of what dP is a product of."""

    v_scale: Any
    grad_out_scale: Any


# Everything the preprocess is launched with, in launch order; None where there is none.
QuantizedPreprocessOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "QuantizedPreprocessOperands",
    [(name, Any) for of in (PreprocessOperands, ScalesOfDs) for name in of._fields],
)


class QuantizedPostprocessProblem(PostprocessProblem):
    """As `PostprocessProblem`, of sums that scales were left out of."""

    @property
    def lift(self) -> int:
        """The power of two that the sums are multiplied by."""
        return P_LIFT if self.of == "v" else DS_LIFT

    def specs(self) -> QuantizedPostprocessOperands:
        """A Spec for every operand, None where there is none."""
        lacking = {"q": ("k", "v", "grad_out"), "k": ("q", "v", "grad_out"), "v": ("grad_out",)}[self.of]
        scales = {name: scale(name.removesuffix("_scale")) for name in AllScales._fields}
        used = {name: spec for name, spec in scales.items() if name.removesuffix("_scale") in lacking}
        return QuantizedPostprocessOperands(*super().specs(), **dict.fromkeys(scales) | used)

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        return super().example_sizes() | {"num_heads_kv": 2}


class AllScales(NamedTuple):
    """float32, (batch, KV heads); None where sums are without."""

    q_scale: Any
    k_scale: Any
    v_scale: Any
    grad_out_scale: Any


# Everything a postprocess is launched with, in launch order; None where there is none.
QuantizedPostprocessOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "QuantizedPostprocessOperands",
    [(name, Any) for of in (PostprocessOperands, AllScales) for name in of._fields],
)


def scale(of: str) -> Spec:
    """Of one of q, k, v and dO."""
    return Spec("float32", ("batch", "num_heads_kv"), "contiguous", f"scales of {of}", values="is 1")


QUANTIZED_PREPROCESS = replace(
    PREPROCESS,
    name="common.quantized_preprocess",
    launches=".common.quantized_preprocess:QuantizedPreprocessKernel",
)

"""Attention whose products are of few bits and scaled by tensor cores: MXFP8, and NVFP4 for Q K.

    S = q_scale k_scale softmax_scale · Q K, a factor for each group of neighbours along head_dim
    mask -> softmax -> P rounded to e4m3 -> O = P V v_scale, MXFP8's V with a factor for each group of keys

Factors are bytes in tensor cores' own order (F8_128x4, see cute_flash/scale_factors.py); besides there is a
float32 scale for each KV head of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .precision import QUANTIZATIONS, Precision, Quantization
from .problem import Spec
from .quantized import QuantizedOperands, QuantizedProblem

ATOM_ROWS, ATOM_GROUPS = 128, 4  # of the factors in 512 bytes
ATOM = (32, ATOM_ROWS // 32, ATOM_GROUPS)  # their order
FORMS = ("mxfp8", "nvfp4")  # of q and k
V_FORMS = ("e4m3", "mxfp8")
ONES = {"mxfp8": 127, "nvfp4": 0x38}  # a factor of 1: in ue8m0, in ue4m3
_ATOM_DIMS = ("lanes", "row_quarters", "atom_groups")


@dataclass(frozen=True)
class BlockScaledProblem(QuantizedProblem):
    """As `QuantizedProblem`, with factors that tensor cores apply.

    form: of q and k, whose elements are of `dtype`. v_form: of v, which is e4m3 in either.
    """

    form: str = "mxfp8"
    v_form: str = "e4m3"

    @property
    def quantization(self) -> Quantization:
        """Of q and k."""
        return QUANTIZATIONS[self.form]

    @property
    def precision(self) -> Precision:
        """Of q and k."""
        return self.quantization.element

    @property
    def v_quantization(self) -> Quantization:
        """Of v."""
        return QUANTIZATIONS[self.v_form]

    @property
    def v_precision(self) -> Precision:
        """Of v."""
        return self.v_quantization.element

    @property
    def v_group(self) -> int | None:
        """Keys of v that share a factor; None: there are none."""
        return self.v_quantization.group

    @property
    def group_atoms(self) -> int:
        """Of factors along a row of q or k."""
        return -(-self.head_dim // (self.quantization.group * ATOM_GROUPS))

    def features(self) -> tuple[str, ...]:
        """As `Problem.features`."""
        forms = tuple(dict.fromkeys((self.form, *(("mxfp8",) if self.v_form == "mxfp8" else ()))))
        return super().features() + forms

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features."""
        found = super().conflicts()
        if self.form not in FORMS or self.v_form not in V_FORMS:
            allowed = f"{', '.join(FORMS)} of q and k; {', '.join(V_FORMS)} of v"
            return (*found, f"forms {self.form} and {self.v_form}: allowed are {allowed}")
        if self.dtype != self.precision.name:
            found += (f"dtype {self.dtype}: {self.form} has elements of {self.precision.name}",)
        if self.head_dim % self.quantization.group:
            found += (f"head_dim {self.head_dim} is not whole groups of {self.quantization.group}",)
        if self.block:
            found += ("no scales of blocks of rows beside factors of groups",)
        if self.varlen or self.cache:
            found += (f"no factors of {self.form} for packed sequences or a cache",)
        return found

    def specs(self) -> BlockScaledOperands:
        """A Spec for every operand. Elements are passed as bytes, of which nvfp4's hold two."""
        asked = super().specs()._asdict()
        for name in "qk":
            asked[name] = asked[name]._replace(dims=(*asked[name].dims[:-1], "head_bytes"))
        heads = {"q": "num_heads_q", "k": "num_heads_kv"}
        for name, of_head in heads.items():
            dims = ("batch", of_head, f"{name}_row_atoms", "group_atoms", *_ATOM_DIMS)
            asked[f"{name}_factors"] = _factors(name, dims, ONES[self.form])
        v_dims = ("batch", "num_heads_kv", "column_atoms", "key_atoms", *_ATOM_DIMS)
        asked["v_factors"] = _factors("v", v_dims, ONES[self.v_form]) if self.v_group else None
        return BlockScaledOperands(**asked)

    def known_sizes(self) -> dict[str, int]:
        """As `Problem.known_sizes`."""
        atoms = dict(zip(_ATOM_DIMS, ATOM, strict=True)) | {"group_atoms": self.group_atoms}
        if self.v_group:
            atoms["column_atoms"] = -(-self.head_dim_v // ATOM_ROWS)
        return super().known_sizes() | atoms | {"head_bytes": self.precision.nbytes(self.head_dim)}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        sizes = super().example_sizes()
        sizes |= {f"{x}_row_atoms": -(-sizes[f"seqlen_{x}"] // ATOM_ROWS) for x in "qk"}
        if self.v_group:
            sizes["key_atoms"] = -(-sizes["seqlen_k"] // (self.v_group * ATOM_GROUPS))
        return sizes


def _factors(name: str, dims: tuple[str, ...], one: int) -> Spec:
    return Spec("uint8", dims, "contiguous", f"factors of {name}, in atoms", values=f"is {one}")


class Factors(NamedTuple):
    """uint8: (batch, heads or KV heads, row atoms, group atoms, 32, 4, 4) of q and k.

    Of v, None where it has none, rows are head_dim_v and groups are of keys.
    """

    q_factors: Any
    k_factors: Any
    v_factors: Any


# Everything a kernel is launched with, in launch order; None where there is none.
BlockScaledOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "BlockScaledOperands", [(name, Any) for name in (*QuantizedOperands._fields, *Factors._fields)]
)

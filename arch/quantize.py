"""Quantizing in one pass over memory: rotation, largest magnitudes, scales and elements of a block of rows.

A block of one head lies in the registers of one CTA between its load and its store, so that each number is
read once and written once. Results are those of `cute_flash.quantization`, bit for bit. Every tree may use
the kernel; what has no instruction for e4m3 and e5m2 (compute capability below 8.9) rounds in integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .kernel import Kernel, Tuning
from .precision import QUANTIZATIONS, Quantization
from .problem import BesideAttention, Device, Spec, Support

CHUNK = 8  # 16-bit numbers that a lane takes at a time, 16 bytes; 8 bytes of elements
NUMBERS = 64  # that a thread holds
ATOM_ROWS, ATOM_GROUPS = 128, 4  # of scales in tensor cores' order: cute_flash/scale_factors.py
CONVERTS = (8, 9)  # the first compute capability that has cvt to e4m3 and e5m2


@dataclass(frozen=True)
class QuantizeProblem(BesideAttention):
    """What quantizing depends on.

    form: a format of 8 bits, "e4m3", "e5m2" or "mxfp8". block: rows that share a scale, or of which one CTA
    writes the scales. rotated: there are signs, and the Walsh–Hadamard transform. axis: along which numbers
    share a scale of mxfp8, "head_dim" or "seqlen".
    """

    operation: ClassVar[str] = "quantize"
    dtype: str
    head_dim: int
    form: str
    block: int
    rotated: bool
    axis: str = "head_dim"

    @property
    def quantization(self) -> Quantization:
        """The format."""
        return QUANTIZATIONS[self.form]

    @property
    def columns(self) -> int:
        """Of a row, with those that only fill atoms of scales."""
        group = self.quantization.group
        atom = 1 if group is None else ATOM_ROWS if self.axis == "seqlen" else group * ATOM_GROUPS
        return -(-self.head_dim // atom) * atom

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it."""
        form, group = self.quantization, self.quantization.group
        if form.element.bits != 8:
            return (f"format {form.name} has elements of {form.element.bits} bits",)
        if group and (self.block != ATOM_ROWS or self.axis == "head_dim" and self.head_dim % group):
            return (f"scales of {group} numbers need blocks of {ATOM_ROWS} rows, head_dim whole groups",)
        if group is None and self.axis == "seqlen":
            return ("scales of blocks of rows are not along seqlen",)
        return ()

    def specs(self) -> QuantizeOperands:
        """A Spec for every operand, None where there is none."""
        rows = ("batch", "seqlen", "num_heads")
        if self.quantization.group is None:
            dims = ("batch", "num_heads", "blocks")
            scale = Spec("float32", dims, "contiguous", "scale of each block", True)
        else:
            of_row, of_column = ("blocks", "column_atoms"), ("column_atoms", "blocks")
            atoms = of_row if self.axis == "head_dim" else of_column
            dims = ("batch", "num_heads", *atoms, "lanes", "row_quarters", "atom_groups")
            scale = Spec("uint8", dims, "contiguous", "scales, in atoms", True)
        signs = Spec("float32", ("head_dim",), "strided", "1 or -1 for each column")
        return QuantizeOperands(
            x=Spec(self.dtype, (*rows, "head_dim"), "strided", "numbers"),
            signs=signs if self.rotated else None,
            data=Spec("int64", (*rows, "words"), "contiguous", "elements, eight to a word", True),
            scale=scale,
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        columns, group = {"head_dim": self.head_dim, "words": self.head_dim // CHUNK}, self.quantization.group
        if group is None:
            return columns
        atom = {"lanes": ATOM_ROWS // 4, "row_quarters": 4, "atom_groups": ATOM_GROUPS}
        across = group * ATOM_GROUPS if self.axis == "head_dim" else ATOM_ROWS
        return columns | {"column_atoms": self.columns // across, **atom}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        seqlen = self.block + 20
        return {"batch": 2, "seqlen": seqlen, "num_heads": 2, "blocks": -(-seqlen // self.block)}


class QuantizeOperands(NamedTuple):
    """Everything the quantizing kernel is launched with, in launch order; None where there is none."""

    x: Any
    signs: Any
    data: Any
    scale: Any


@dataclass(frozen=True)
class QuantizeConfig:
    """lanes: that share a row, a power of two, so that they lie in one warp. warps: of a CTA.

    converts: there is an instruction that rounds to the format.
    """

    lanes: int
    warps: int
    converts: bool

    @staticmethod
    def of(problem: QuantizeProblem, device: Device) -> QuantizeConfig:
        """As many lanes as take a row in one step, and as many threads as hold a block."""
        lanes = 1 << (problem.columns // CHUNK - 1).bit_length()
        warps = max(1, problem.block * lanes * CHUNK // NUMBERS // 32)
        return QuantizeConfig(lanes, warps, device.capability >= CONVERTS)

    def shared_memory(self, problem: QuantizeProblem) -> int:
        """Bytes of dynamic shared memory: the largest magnitude of each warp, or of each of its columns."""
        if problem.axis == "seqlen":
            return 4 * self.warps * problem.columns
        return 0 if problem.quantization.group else 4 * self.warps


QUANTIZE = Kernel(
    name="common.quantize",
    operation="quantize",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        features=frozenset(),
    ),
    tuning=Tuning(
        config=lambda problem, device, sizes: QuantizeConfig.of(problem, device),
        # seqlen_q: the rows. No block has fewer than 64 of them.
        blocks=lambda config, sizes, _: -(-sizes.seqlen_q // 64) * sizes.heads_q * sizes.batch,
    ),
    launches=".common.quantize:QuantizeKernel",
)

"""Quantizing: rotations, largest magnitudes, scales and elements of a block of rows, in one pass over memory.

A block of one head lies in the registers of one CTA between its load and its store, so that each number is
read once and written once. Where scales depend on all of a head, a pass before finds its largest magnitude,
and numbers are read twice: those of nvfp4, and FP8's where all rows of a head share one. Results are those of
`cute_flash.quantization`, bit for bit. Every tree may use the kernel; what has no instruction for a format
(e4m3 and e5m2: compute capability below 8.9, e2m1: below 10.0) rounds in integers.
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
PEAKS = {"mxfp8": (None,), "nvfp4": ("given",)}  # what scales of these formats may depend on
CONVERTS = {8: (8, 9), 4: (10, 0)}  # bits: the first compute capability that has cvt to such formats


@dataclass(frozen=True)
class QuantizeProblem(BesideAttention):
    """What quantizing depends on.

    form: a format, a key of QUANTIZATIONS. block: rows that share a scale, or that one CTA has. rotated:
    there are signs, and the Walsh–Hadamard transform. axis: along which numbers share a scale of mxfp8,
    "head_dim" or "seqlen". peaks, the largest magnitudes of heads, one for neighbours that share a scale:
    "found", and nothing else; "given", where scales depend on them; None. rotary_dim: how many numbers of a
    row rotary embedding turns before anything else, a multiple of 16; 0: none. interleaved: neighbours are a
    pair, not numbers of the first and the second half. offsets: positions of sequences do not begin at 0.
    """

    operation: ClassVar[str] = "quantize"
    dtype: str
    head_dim: int
    form: str
    block: int
    rotated: bool
    axis: str = "head_dim"
    peaks: str | None = None
    rotary_dim: int = 0
    interleaved: bool = False
    offsets: bool = False

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

    @property
    def peak_largest(self) -> float:
        """What a head's largest magnitude is relative to its scale: of nvfp4 an element times a scale."""
        form = self.quantization
        return form.largest if form.group is None else form.largest * QUANTIZATIONS["e4m3"].largest

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it."""
        form, group = self.quantization, self.quantization.group
        if group and (self.block != ATOM_ROWS or self.axis == "head_dim" and self.head_dim % group):
            return (f"scales of {group} numbers need blocks of {ATOM_ROWS} rows, head_dim whole groups",)
        if self.axis == "seqlen" and form.name != "mxfp8":
            return (f"scales of {form.name} are not along seqlen",)
        if self.peaks not in PEAKS.get(form.name, (None, "found", "given")):
            return (f"scales of {form.name} do not go with peaks {self.peaks}",)
        if self.rotary_dim % (2 * CHUNK) or self.rotary_dim > self.head_dim:
            return (f"rotary_dim {self.rotary_dim} is no multiple of {2 * CHUNK} up to head_dim",)
        return ()

    def specs(self) -> QuantizeOperands:
        """A Spec for every operand, None where there is none."""
        rows, heads = ("batch", "seqlen", "num_heads"), ("batch", "num_heads_kv")
        finds, group = self.peaks == "found", self.quantization.group
        if group is None:
            dims = heads if self.peaks else ("batch", "num_heads", "blocks")
            scale = Spec("float32", dims, "contiguous", "scale of each head or block", True)
        else:
            atoms = ("blocks", "column_atoms") if self.axis == "head_dim" else ("column_atoms", "blocks")
            dims = ("batch", "num_heads", *atoms, "lanes", "row_quarters", "atom_groups")
            scale = Spec("uint8", dims, "contiguous", "scales, in atoms", True)
        signs = Spec("float32", ("head_dim",), "strided", "1 or -1 for each column")
        positions = Spec("int32", ("batch",), "contiguous", "position of each sequence's first row")
        peaks = Spec("int32", heads, "contiguous", "largest magnitudes, patterns of float32", finds)
        whole = Spec("float32", heads, "contiguous", "what scales are relative to", True)
        word = f"int{CHUNK * self.quantization.element.bits}"
        data = Spec(word, (*rows, "words"), "contiguous", "elements, eight to a word", True)
        return QuantizeOperands(
            x=Spec(self.dtype, (*rows, "head_dim"), "strided", "numbers"),
            signs=signs if self.rotated else None,
            data=None if finds else data,
            scale=None if finds else scale,
            peaks=peaks if self.peaks else None,
            tensor_scale=whole if group and self.peaks else None,
            rotary_cos=self._angles("cosines"),
            rotary_sin=self._angles("sines"),
            seqlen_offsets=positions if self.offsets else None,
        )

    def _angles(self, of_what: str) -> Spec | None:
        dims, meaning = ("seqlen_rotary", "half_rotary_dim"), f"{of_what}, by position and pair"
        return Spec(self.dtype, dims, "strided", meaning) if self.rotary_dim else None

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        columns, group = {"head_dim": self.head_dim, "words": self.head_dim // CHUNK}, self.quantization.group
        if self.rotary_dim:
            columns["half_rotary_dim"] = self.rotary_dim // 2
        if group is None:
            return columns
        atom = {"lanes": ATOM_ROWS // 4, "row_quarters": 4, "atom_groups": ATOM_GROUPS}
        across = group * ATOM_GROUPS if self.axis == "head_dim" else ATOM_ROWS
        return columns | {"column_atoms": self.columns // across, **atom}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        seqlen = self.block + 20
        sizes = {"batch": 2, "seqlen": seqlen, "num_heads": 2, "blocks": -(-seqlen // self.block)}
        sizes |= {"num_heads_kv": 1} if self.peaks else {}
        return sizes | ({"seqlen_rotary": seqlen} if self.rotary_dim else {})


class QuantizeOperands(NamedTuple):
    """Everything the quantizing kernel is launched with, in launch order; None where there is none."""

    x: Any
    signs: Any
    data: Any
    scale: Any
    peaks: Any
    tensor_scale: Any
    rotary_cos: Any
    rotary_sin: Any
    seqlen_offsets: Any


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
        return QuantizeConfig(lanes, warps, device.capability >= CONVERTS[problem.quantization.element.bits])

    def shared_memory(self, problem: QuantizeProblem) -> int:
        """Bytes of dynamic shared memory: the largest magnitude of each warp, or of each of its columns."""
        if problem.axis == "seqlen":
            return 4 * self.warps * problem.columns
        by_block = problem.quantization.group is None and problem.peaks != "given"
        return 4 * self.warps if by_block else 0


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

"""`quantize`: bits against slow definitions on numpy, rotations against their matrices, refusals."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch

import cute_flash
from cute_flash import arch as trees
from cute_flash import scale_factors
from cute_flash.arch.precision import QUANTIZATIONS
from cute_flash.arch.problem import Sizes
from cute_flash.arch.quantize import QuantizeProblem
from cute_flash.dispatch import EMULATED, beside
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from cute_flash.emulator.base.narrow_floats import FORMATS, UE8M0
from cute_flash.executable import artifact
from cute_flash.quantization import Quantized
from cute_flash.rotation import Rotation
from tests.emulator.negative.mutations import everywhere
from tests.harness import moved, where

F32 = np.float32
ELEMENTS = {"e4m3": "e4m3", "e5m2": "e5m2", "mxfp8": "e4m3", "nvfp4": "e2m1"}


def outliers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers, of which one in a hundred is ten times as large."""
    x = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.01, 10 * x, x).to(dtype)


def codes_of(found: Quantized) -> np.ndarray:
    """A byte for each number, (batch, seqlen, heads, head_dim)."""
    codes = found.data.contiguous().view(torch.uint8).numpy()
    if found.format != "nvfp4":
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(found.shape)


def group_scale(found: Quantized, largest: np.ndarray, total: float) -> tuple[int | F32, F32]:
    """(what is stored for a group, the factor on its numbers); largest: of its magnitudes, total: of all."""
    limit = F32(QUANTIZATIONS[found.format].largest)
    if found.format == "mxfp8":
        power = math.ceil(math.log2(largest / limit))
        return power + 127, F32(2.0**-power)
    if found.format == "nvfp4":
        whole = F32(total) / F32(448 * 6)
        code = int(FORMATS["e4m3"].encode(np.float64(F32(largest) / limit / whole)))
        return code, F32(1) / (FORMATS["e4m3"].table[code] * whole)
    return F32(largest) / limit, limit / F32(largest)


def stored_scale(found: Quantized, b: int, h: int, row: int, group: int) -> int | F32:
    """The scale of a group of a head, by the address that the format's definition has for it."""
    if found.scale.dtype == torch.float32:
        return found.scale[b, h].reshape(-1)[row].item()
    row_atoms, group_atoms = found.scale.shape[2:4]
    assert found.scale.is_contiguous() and row < 128 * row_atoms and group < 4 * group_atoms
    atom = row // 128 * group_atoms + group // 4
    place = 512 * atom + 16 * (row % 32) + 4 * (row % 128 // 32) + group % 4
    return found.scale[b, h].reshape(-1).view(torch.uint8)[place].item()


@pytest.mark.parametrize(
    "format, options, rows, columns",
    [
        ("e4m3", {}, 150, 48),
        ("e4m3", {"block": 64}, 64, 48),
        ("e5m2", {"block": 128}, 128, 48),
        ("mxfp8", {}, 1, 32),
        ("mxfp8", {"axis": "seqlen"}, 32, 1),
        ("nvfp4", {}, 1, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("hadamard", [True, False], ids=["rotated", "plain"])
def test_bits(format, options, rows, columns, hadamard):
    """Every scale and every element, group by group, in numpy."""
    x = outliers(1, 150, 2, 96 if columns == 32 else 48)
    found = cute_flash.quantize(x, format, hadamard=hadamard, seed=5, **options)
    y = Rotation(x.shape[3], 5).apply(x.float()) if hadamard else x.float()
    codes, y = codes_of(found), y.numpy()
    for h in range(2):
        total = np.abs(y[0, :, h]).max()
        for i, first in enumerate(range(0, 150, rows)):
            for j, left in enumerate(range(0, y.shape[3], columns)):
                part = np.s_[0, first : first + rows, h, left : left + columns]
                scale, factor = group_scale(found, np.abs(y[part]).max(), total)
                place = (left, i) if options.get("axis") == "seqlen" else (i, j)
                assert stored_scale(found, 0, h, *place) == scale
                expected = FORMATS[ELEMENTS[format]].encode((y[part] * factor).astype(np.float64))
                np.testing.assert_array_equal(codes[part], expected)


@pytest.mark.parametrize("format", QUANTIZATIONS)
def test_dequantized(format):
    """Elements times scales, rotated back; the error is a rounding of the element's."""
    x = outliers(2, 70, 4, 64)
    found = cute_flash.quantize(x, format, heads_kv=None if format == "mxfp8" else 2)
    table = FORMATS[ELEMENTS[format]].table
    for h in (0, 3):
        for row, column in ((0, 0), (69, 63), (33, 17)):
            group = column // (QUANTIZATIONS[format].group or 64)
            if found.scale.dtype == torch.float32:
                scale = found.scale[1, h // 2].item()
            else:
                scale = stored_scale(found, 1, h, row, group)
                scale = UE8M0[scale] if format == "mxfp8" else FORMATS["e4m3"].table[scale]
            whole = 1 if found.tensor_scale is None else found.tensor_scale[1, h // 2].item()
            expected = table[codes_of(found)[1, row, h, column]] * (F32(scale) * F32(whole))
            assert found.dequantize(rotated=True)[1, row, h, column].item() == expected
    torch.testing.assert_close(
        found.rotation.apply(found.dequantize()), found.dequantize(rotated=True), rtol=1e-5, atol=1e-5
    )
    error = (found.dequantize(torch.float64) - x).square().mean().sqrt() / x.double().square().mean().sqrt()
    assert error < {"e4m3": 0.03, "mxfp8": 0.03, "e5m2": 0.06, "nvfp4": 0.12}[format]
    assert found.dequantize(torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("head_dim, width", [(64, 64), (96, 32), (72, 8), (256, 256)])
def test_rotations_are_signs_and_sylvesters_matrices(head_dim, width):
    """In float64 the matrix is that of the definition, orthogonal, and undone by its transpose."""
    rotation = Rotation(head_dim, 3)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    whole = torch.block_diag(*[matrix] * (head_dim // width)) / width**0.5
    eye = torch.eye(head_dim, dtype=torch.float64)
    found = rotation.apply(eye)
    torch.testing.assert_close(found, rotation.signs().double()[:, None] * whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(found @ found.T, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.undo(found), eye, rtol=0, atol=1e-13)
    q, k = torch.randn(2, 20, head_dim, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(q) @ rotation.apply(k).T, q @ k.T)


def test_signs_come_from_the_seed():
    assert rotation_signs(64, 1) != rotation_signs(64, 2)
    assert rotation_signs(64, 1) == rotation_signs(64, 1)
    assert 16 < sum(sign < 0 for sign in rotation_signs(64, 1)) < 48


def rotation_signs(head_dim: int, seed: int) -> list[float]:
    return Rotation(head_dim, seed).signs().tolist()


@pytest.mark.parametrize("rows, groups", [(1, 1), (128, 4), (200, 9)])
def test_atoms(rows, groups):
    """There and back again; what no scale belongs to is 0."""
    scales = torch.randint(1, 256, (2, rows, groups), dtype=torch.uint8)
    atoms = scale_factors.to_atoms(scales)
    assert atoms.shape[1:] == scale_factors.shape_of(rows, groups) and atoms.is_contiguous()
    assert scale_factors.from_atoms(atoms, rows, groups).equal(scales)
    assert atoms.count_nonzero() == scales.numel()


@pytest.mark.parametrize("format", QUANTIZATIONS)
def test_numbers_at_the_ends(format):
    """Zeros stay zeros, tiny groups keep their signs at least, NaN stays in its place."""
    x = torch.randn(1, 128, 3, 32)
    x[:, :, 0] = 0.0
    x[:, :, 1] *= 2.0**-120
    x[0, 3, 2, 5] = math.nan
    found = cute_flash.quantize(x, format, hadamard=False)
    y = found.dequantize()
    assert (y[:, :, 0] == 0).all() and (y[:, :, 1].abs() < 2.0**-100).all()
    if format != "nvfp4":  # which has no NaN
        assert y[:, :, 2].isnan().sum() == 1 and y[0, 3, 2, 5].isnan()
    rest = torch.ones(128, 32, dtype=torch.bool)
    rest[3, 5] = False
    torch.testing.assert_close(y[0, :, 2][rest], x[0, :, 2][rest], rtol=0.3, atol=0.5)


def test_printed():
    x = torch.randn(1, 128, 2, 96)
    assert str(cute_flash.quantize(x, block=64)) == (
        "e4m3 (1, 128, 2, 96); a float32 scale for 64 rows of a head, (1, 2, 2); 8.01 bits per number; "
        "rotated by signs of seed 0 and the Walsh–Hadamard transform 32 of 96 at a time"
    )
    words = str(cute_flash.quantize(x, "nvfp4", hadamard=False))
    assert words.startswith("nvfp4 (1, 128, 2, 96); a float8_e4m3fn scale for 16 along head_dim")
    assert "relative to a float32 one for a head, (1, 2)" in words and "rotated" not in words


OF_V = {"format": "mxfp8", "axis": "seqlen"}
# What a kernel computes: (shape, dtype, how x lies, options).
BY_KERNEL = {
    "rotated": ((2, 150, 3, 128), torch.bfloat16, "interleaved", {"block": 128, "seed": 3}),
    "e5m2": ((1, 70, 2, 72), torch.float16, "", {"format": "e5m2", "block": 64, "hadamard": False}),
    "mxfp8": ((1, 150, 2, 96), torch.bfloat16, "heads_first", {"format": "mxfp8"}),
    "heads": ((2, 150, 4, 64), torch.float16, "", {"heads_kv": 2}),
    "heads_e5m2": ((1, 140, 2, 72), torch.bfloat16, "heads_first", {"format": "e5m2", "hadamard": False}),
    "nvfp4": ((2, 150, 4, 128), torch.bfloat16, "interleaved", {"format": "nvfp4", "heads_kv": 2}),
    "nvfp4_plain": ((1, 140, 2, 80), torch.float16, "", {"format": "nvfp4", "hadamard": False}),
    "mxfp8_of_v": ((2, 150, 2, 72), torch.bfloat16, "interleaved", {**OF_V, "hadamard": False}),
    "mxfp8_of_wide_v": ((1, 140, 2, 192), torch.float16, "", OF_V),
}


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers: as they are, as a part of qkv, or with heads before rows."""
    if layout == "interleaved":
        return torch.stack([torch.full_like(x, math.nan), x], 2)[:, :, 1]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads_first" else x


@pytest.mark.parametrize("name", BY_KERNEL)
def test_kernels_have_the_bits_of_torch(machine, name):
    """Numbers of all sizes, from 2**-30 to nearly all that float16 holds; ties, a block of zeros, a NaN."""
    shape, dtype, layout, options = BY_KERNEL[name]
    x = torch.randn(shape) * 2.0 ** torch.randint(-30, 3, shape)
    x[:, :64, 1] = 0.0
    x[:, -20:, 0] = (x[:, -20:, 0] * 8).round() / 8
    x[:, 0, 0, 0] = 60000.0
    x[:, -1, 1, 3] = math.nan
    x = x.to(dtype)
    wanted = cute_flash.quantize(x, **options)
    with where(machine, races=True) as emulation:
        found = cute_flash.quantize(moved(laid_out(x, layout), machine), **options)
    assert machine == "cuda" or len(emulation.reports) == passes(wanted)
    assert_same_bits(found, wanted)
    if wanted.format != "nvfp4":  # which has no NaN
        assert wanted.data.float().isnan().any()


def passes(x: Quantized) -> int:
    """Launches that it takes: another one where scales depend on all of a head."""
    return 2 if x.tensor_scale is not None or x.scale.ndim == 2 else 1


def assert_same_bits(found: Quantized, wanted: Quantized) -> None:
    """Data but for the patterns of NaN, and scales."""
    assert str(found) == str(wanted)
    assert torch.equal(found.scale.cpu().view(torch.uint8), wanted.scale.view(torch.uint8))
    if wanted.tensor_scale is not None:
        assert torch.equal(found.tensor_scale.cpu(), wanted.tensor_scale)
    codes, wanted_codes = found.data.cpu().view(torch.uint8), wanted.data.view(torch.uint8)
    if wanted.format != "nvfp4":
        nan = wanted.data.float().isnan()
        assert torch.equal(found.data.cpu().float().isnan(), nan)
        codes, wanted_codes = codes.masked_fill(nan, 0), wanted_codes.masked_fill(nan, 0)
    assert torch.equal(codes, wanted_codes)


def tables(rows: int, rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles, with NaN around them."""
    angles = torch.randn(rows, rotary_dim // 2) * 3
    cos, sin = (torch.full((rows + 2, rotary_dim // 2 + 8), math.nan, dtype=dtype) for _ in range(2))
    for table, values in ((cos, angles.cos()), (sin, angles.sin())):
        table[1:-1, :-8] = values
    return cos[1:-1, :-8], sin[1:-1, :-8]


# Rotary embedding before quantizing: (shape, dtype, rotary_dim, positions of first rows, options).
TURNED = {
    "neighbours": ((2, 140, 2, 128), torch.bfloat16, 128, [7, 0], {"block": 128}),
    "halves": ((1, 70, 2, 96), torch.float16, 48, 5, {"format": "mxfp8", "rotary_interleaved": False}),
    "nvfp4": ((2, 140, 4, 64), torch.bfloat16, 64, [0, 9], {"format": "nvfp4", "rotary_interleaved": False}),
    "heads": ((1, 70, 2, 72), torch.float16, 32, 0, {"heads_kv": 1, "hadamard": False}),
    "columns": ((1, 140, 1, 256), torch.bfloat16, 256, 3, {**OF_V, "rotary_interleaved": False}),
}


@pytest.mark.parametrize("name", TURNED)
def test_kernels_turn_as_torch_does(machine, name):
    """Bit for bit: products of two 16-bit numbers are exact in float32, and each sum is rounded once."""
    shape, dtype, rotary_dim, first, options = TURNED[name]
    x = outliers(*shape, dtype=dtype)
    cos, sin = tables(shape[1] + 9, rotary_dim, dtype)
    offsets = torch.tensor(first, dtype=torch.int32) if isinstance(first, list) else first
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "seqlen_offsets": offsets}
    wanted = cute_flash.quantize(x, **rotary, **options)
    rotary = {argument: moved(value, machine) for argument, value in rotary.items()}
    with where(machine, races=True) as emulation:
        found = cute_flash.quantize(moved(laid_out(x, "interleaved"), machine), **rotary, **options)
    assert machine == "cuda" or len(emulation.reports) == passes(wanted)
    assert_same_bits(found, wanted)
    assert not wanted.scale.float().isnan().any()


@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
def test_turned_by_complex_numbers(interleaved):
    """Quantizing what numpy has turned has the same bits."""
    x, (cos, sin), first = outliers(2, 20, 3, 64), tables(30, 32, torch.bfloat16), [3, 10]
    turned, angles = x.double().numpy().copy(), cos.double().numpy() + 1j * sin.double().numpy()
    for b, row, pair in np.ndindex(2, 20, 16):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 16)
        number = (turned[b, row, :, i] + 1j * turned[b, row, :, j]) * angles[first[b] + row, pair]
        turned[b, row, :, i], turned[b, row, :, j] = number.real, number.imag
    offsets = torch.tensor(first, dtype=torch.int32)
    shared = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    found = cute_flash.quantize(x, "nvfp4", seqlen_offsets=offsets, **shared)
    assert_same_bits(found, cute_flash.quantize(torch.tensor(turned).float(), "nvfp4"))


@pytest.mark.parametrize(
    "options, fields",
    [({"block": 128}, ("e4m3", 128, True)), (OF_V, ("mxfp8", 128, True, "seqlen")),
     ({"format": "nvfp4"}, ("e4m3", 128, True, "head_dim", "found"))],
    ids=["block", "columns", "peaks"],
)  # fmt: skip
def test_the_barrier_is_needed(options, fields):
    """The largest magnitude of a block, and of its columns, is that of several warps."""
    problem, device = QuantizeProblem("bfloat16", 128, *fields), EMULATED["sm90"]
    (kernel,) = trees.load(device, "quantize")
    built = artifact(kernel, problem, kernel.config(problem, device), device)
    changed = everywhere(r"bar\.sync", "// bar.sync")(built.ptx.decode()).encode()
    served = mock.patch(
        "cute_flash.launch.executable", lambda *_: EmulatedKernel(built._replace(ptx=changed), device)
    )
    x = torch.randn(1, 128, 1, 128).bfloat16()
    with served, cute_flash.emulated("sm90", races=True), pytest.raises(EmulatorError):
        cute_flash.quantize(x, **options)


@pytest.mark.parametrize(
    "form, peaks, without",
    [("e4m3", None, {"sm80", "sm86"}), ("nvfp4", "given", {"sm80", "sm86", "sm89", "sm90"})],
    ids=["8 bits", "4 bits"],
)
def test_what_has_an_instruction(form, peaks, without):
    """From compute capability 8.9 on, or 10.0; before it, integers round."""
    problem = QuantizeProblem("bfloat16", 128, form, 128, True, peaks=peaks)
    converts = {}
    for name, device in EMULATED.items():
        (step,) = beside(problem, device, Sizes(1, 1, 1, 128, 0)).steps
        converts[name] = step.config.converts
    assert {name for name, does in converts.items() if not does} == without


@pytest.mark.parametrize(
    "problem, reason",
    [
        (QuantizeProblem("bfloat16", 128, "nvfp4", 128, True), "nvfp4 do not go with peaks None"),
        (QuantizeProblem("bfloat16", 72, "mxfp8", 128, True), "head_dim whole groups"),
        (QuantizeProblem("float32", 72, "e4m3", 128, True), "dtype float32 is not one of"),
        (QuantizeProblem("bfloat16", 72, "e4m3", 128, True, "seqlen"), "not along seqlen"),
        (QuantizeProblem("bfloat16", 72, "e4m3", 128, True, rotary_dim=24), "rotary_dim 24 is no multiple"),
    ],
    ids=["nvfp4", "mxfp8", "float32", "seqlen", "rotary"],
)
def test_kernels_refuse(problem, reason):
    (kernel,) = trees.load(EMULATED["sm90"], "quantize")
    assert any(reason in found for found in kernel.reasons(problem, EMULATED["sm90"]))


X = torch.randn(1, 8, 4, 48)
COS = torch.randn(10, 16)
INTS = torch.tensor([0, 3], dtype=torch.int32)
ROTARY = {"rotary_cos": COS, "rotary_sin": COS}


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": X.double()}, TypeError, "x has dtype torch.float64"),
        ({"x": X[0]}, ValueError, r"x has shape \(8, 4, 48\)"),
        ({"x": X[:, :0]}, ValueError, r"x has shape \(1, 0, 4, 48\)"),
        ({"x": X[..., :12]}, ValueError, "head_dim 12; allowed for e4m3: multiples of 8"),
        ({"x": X.clone().requires_grad_()}, NotImplementedError, "x requires a gradient"),
        ({"format": "int8"}, ValueError, "format is 'int8'; allowed: e4m3, e5m2, mxfp8, nvfp4"),
        ({"format": "mxfp8"}, ValueError, "head_dim 48; allowed for mxfp8: multiples of 32"),
        ({"format": "nvfp4", "axis": "seqlen"}, NotImplementedError, "axis is 'seqlen'.*for q and k"),
        ({"axis": "seqlen"}, ValueError, "axis is 'seqlen'; allowed for e4m3"),
        ({"axis": "heads"}, ValueError, "axis is 'heads'; allowed: head_dim, seqlen"),
        ({"block": 96}, ValueError, "block is 96; allowed: None, 64, 128"),
        ({"format": "nvfp4", "block": 64}, ValueError, "block is 64; allowed for nvfp4: None"),
        ({"heads_kv": 3}, ValueError, "heads_kv is 3; allowed: None, or a divisor of x's 4 heads"),
        ({"heads_kv": 2, "block": 64}, ValueError, "heads_kv is 2; allowed: None"),
        ({"hadamard": 1}, TypeError, "hadamard is 1; allowed: True, False"),
        ({"seed": -1}, ValueError, "seed is -1; allowed"),
        ({"rotary_cos": COS}, ValueError, "rotary_cos is given without rotary_sin"),
        ({"rotary_sin": COS}, ValueError, "rotary_sin is given without rotary_cos"),
        ({"seqlen_offsets": 1}, ValueError, "seqlen_offsets is given without rotary_cos"),
        ({**ROTARY, "rotary_interleaved": 1}, TypeError, "rotary_interleaved is 1; allowed: True, False"),
        ({**ROTARY, "rotary_cos": [1.0]}, TypeError, "rotary_cos is list"),
        ({**ROTARY, "rotary_sin": COS.half()}, TypeError, "rotary_sin has dtype torch.float16, x has"),
        ({**ROTARY, "rotary_cos": COS[0]}, ValueError, r"rotary_cos has shape \(16,\); allowed: \(positions"),
        ({**ROTARY, "rotary_sin": COS[1:]}, ValueError, r"rotary_sin has shape \(9, 16\), rotary_cos has"),
        (dict.fromkeys(ROTARY, torch.randn(10, 32)), ValueError, "rotary_dim 64; allowed: .* head_dim 48"),
        (dict.fromkeys(ROTARY, torch.randn(10, 12)), ValueError, "rotary_dim 24; allowed: multiples of 16"),
        (dict.fromkeys(ROTARY, COS[:7]), ValueError, "seqlen_offsets is 0, and x has 8 rows; .* 0 to 6"),
        ({**ROTARY, "seqlen_offsets": 3}, ValueError, "seqlen_offsets is 3, and x has 8 rows; .* 0 to 9"),
        ({**ROTARY, "seqlen_offsets": -1}, ValueError, "seqlen_offsets is -1, and x has 8 rows"),
        ({**ROTARY, "seqlen_offsets": 1.0}, TypeError, "seqlen_offsets is float; allowed: an int, or torch"),
        ({**ROTARY, "seqlen_offsets": torch.tensor([1])}, TypeError, "seqlen_offsets has dtype torch.int64"),
        ({**ROTARY, "seqlen_offsets": INTS}, ValueError, "seqlen_offsets has 2 numbers; allowed: 1, one for"),
        ({**ROTARY, "seqlen_offsets": INTS[1:]}, ValueError, r"seqlen_offsets\[0\] is 3, and x has 8 rows"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        cute_flash.quantize(**{"x": X, **options})

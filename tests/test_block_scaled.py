"""MXFP8 and NVFP4 on Blackwell: results are those of the model of their arithmetic, and as accurate as that.

The model is profiling/accuracy.py's, from which the committed table is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

import cute_flash
from cute_flash import Causal, create_block_mask, flash_attn_quantized_func, quantize, scale_factors
from cute_flash.arch.sm100.scaled import BLOCK_SCALED
from cute_flash.dispatch import EMULATED
from cute_flash.problems import problem
from profiling import accuracy
from profiling.accuracy import Operand, Scheme
from tests.harness import moved, where
from tests.test_quantized import assert_rows_close


class Asked(NamedTuple):
    """(seqlen_q, seqlen_k), (heads, heads_kv), head dims, formats of q and k and of v, options."""

    lengths: tuple[int, int]
    heads: tuple[int, int]
    dims: tuple[int, int]
    forms: tuple[str, str]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


# Several tiles of keys each, of which some begin inside atoms of factors, and the last is not whole; rows of
# both Q tiles; heads that share keys.
CASES = {
    "mxfp8": Asked((150, 500), (2, 1), (128, 128), ("mxfp8", "mxfp8"), {"out_dtype": torch.float16}),
    "nvfp4": Asked((150, 500), (2, 2), (128, 128), ("nvfp4", "e4m3")),
    "narrow": Asked((140, 300), (4, 2), (64, 64), ("nvfp4", "mxfp8"), {"causal": True}),
    "no whole atoms": Asked((70, 200), (2, 1), (32, 96), ("mxfp8", "e4m3"), {"window_size": (40, 5)}),
    "two group atoms": Asked((300, 330), (1, 1), (192, 128), ("mxfp8", "mxfp8"), {"causal": True}),
    "three group atoms": Asked((70, 330), (1, 1), (192, 128), ("nvfp4", "mxfp8")),
    "one tile": Asked((140, 300), (1, 1), (256, 256), ("mxfp8", "mxfp8")),
    "one tile of 4 bits": Asked((70, 230), (1, 1), (256, 160), ("nvfp4", "e4m3"), {"causal": True}),
}
OPTIONS = {
    "mxfp8": {"asynchrony": "late"},
    "nvfp4": {"asynchrony": "random", "schedule": "random", "seed": 3},
}


@pytest.fixture(scope="module")
def device(machine) -> str:
    """Where there is a kernel: an emulated Blackwell, or the GPU at hand if it is one."""
    if machine == "cuda" and torch.cuda.get_device_capability()[0] in (10, 11):
        return machine
    if machine in ("sm80", "sm90"):
        pytest.skip("there are kernels for compute capabilities 10.0 to 11.0")
    return "sm100"


def made(asked: Asked, scale: float = 1.0):
    """(q, k, v) as bfloat16, and quantized; q and k have neighbours of other magnitudes."""
    (rows, keys), (heads, heads_kv), (dim, dim_v), (form, v_form), _ = asked
    shapes = ((2, rows, heads, dim), (2, keys, heads_kv, dim), (2, keys, heads_kv, dim_v))
    exact = [torch.randn(shape) * torch.randn(shape).exp() for shape in shapes]
    exact = [(x * scale if i == 0 else x).bfloat16() for i, x in enumerate(exact)]
    shared = {"heads_kv": heads_kv} if form == "nvfp4" else {}
    q, k = (quantize(x, form, seed=2, **shared) for x in exact[:2])
    of_v = {"axis": "seqlen"} if v_form == "mxfp8" else {"heads_kv": heads_kv}
    return exact, (q, k, quantize(exact[2], v_form, hadamard=False, **of_v))


def on(x: cute_flash.Quantized, device: str) -> cute_flash.Quantized:
    """A quantized tensor where calls of a test run."""
    return replace(x, **{name: moved(getattr(x, name), device) for name in ("data", "scale", "tensor_scale")})


def called(quantized, device: str, options: dict[str, Any], **emulation: Any):
    """(out, lse) in float64."""
    with where(device, **emulation):
        found = flash_attn_quantized_func(*(on(x, device) for x in quantized), return_lse=True, **options)
    assert found[0].dtype is options.get("out_dtype", torch.bfloat16) and found[1].dtype is torch.float32
    out, lse = (x.cpu().double() for x in found)
    return out, lse


def visible(asked: Asked) -> torch.Tensor:
    """(seqlen_q, seqlen_k) bool."""
    rows, keys = asked.lengths
    q, k = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
    left, right = asked.options.get("window_size", (math.inf, math.inf))
    if asked.options.get("causal"):
        right = 0
    return (k >= q - left) & (k <= q + right)


def tile_n(asked: Asked, device: str) -> int:
    """Keys of a block."""
    form, v_form = asked.forms
    dtype = torch.float8_e4m3fn if form == "mxfp8" else torch.float4_e2m1fn_x2
    found = problem(dtype=dtype, head_dim=asked.dims[0], head_dim_v=asked.dims[1], form=form, v_form=v_form)
    return BLOCK_SCALED.config(found, EMULATED["sm100"]).tile_n


def operand(x: cute_flash.Quantized, batch: int, head: int) -> Operand:
    """One head, as the model takes it: with what tensor cores scale scaled."""
    ones = torch.ones(x.shape[1], 1)
    if x.format != "e4m3":
        return Operand(x.dequantize(rotated=True)[batch, :, head], ones)
    return Operand(x.data.float()[batch, :, head], x.scale[batch, head] * ones)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_arithmetic(device, name):
    """Tile by tile, P rounded where the kernel rounds it: far closer than formats are to exact numbers."""
    asked = CASES[name]
    exact, quantized = made(asked)
    emulation = OPTIONS.get(name, {"races": True})
    out, lse = called(quantized, device, asked.options | {"num_splits": 1}, **emulation)
    shown, (heads, heads_kv), dim = visible(asked), asked.heads, asked.dims[0]
    scheme = Scheme(blackwell=True, tile=tile_n(asked, device))
    for batch, head in ((0, 0), (1, heads - 1)):
        kv = head * heads_kv // heads
        q, k, v = (operand(x, batch, h) for x, h in zip(quantized, (head, kv, kv), strict=True))
        model, top = accuracy.attention(q, k, v, dim**-0.5, scheme, shown)
        assert_rows_close(out[batch, :, head], model.double(), lse[batch, head], top[:, 0].double())
        s = exact[0][batch, :, head].double() @ exact[1][batch, :, kv].double().T * dim**-0.5
        wanted = s.masked_fill(~shown, -math.inf).softmax(1).nan_to_num(0.0) @ exact[2][batch, :, kv].double()
        error = (out[batch, :, head] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert 3e-3 < error < (0.5 if asked.forms[0] == "nvfp4" else 0.15), f"{error:.2e} of the exact result"


def scores(q, k, cap: float) -> torch.Tensor:
    """(batch, heads, rows, keys) in float64, of what is stored; cap 0: none."""
    q, k = (x.dequantize(rotated=True).double() for x in (q, k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    return cap * torch.tanh(s / cap) if cap else s


def assert_close(found, s: torch.Tensor, v: cute_flash.Quantized) -> None:
    """Of what is stored, as accurate as weights of 8 bits are; the log-sum-exp as with 16 bits."""
    (out, lse), values = found, v.dequantize().double()
    values = values.repeat_interleave(out.shape[2] // values.shape[2], 2)
    wanted = torch.einsum("bhqk,bkhd->bqhd", s.softmax(3)[..., : values.shape[1]], values)
    torch.testing.assert_close(lse, s.logsumexp(3), rtol=1e-6, atol=1e-4)
    assert (out - wanted).square().mean() < 0.03**2 * wanted.square().mean()


@pytest.mark.parametrize("forms", [("mxfp8", "mxfp8"), ("nvfp4", "e4m3")])
def test_scores_sinks_and_parts_of_the_keys(device, forms):
    asked = Asked((140, 300), (2, 1), (64, 64), forms)
    _, quantized = made(asked, 2.0)
    sink, cap = torch.randn(2), 5.0
    s = scores(*quantized[:2], cap)
    s = torch.cat([s, sink.double()[:, None, None].expand(2, 2, 140, 1)], 3)
    options = {"softcap": cap, "learnable_sink": moved(sink, device)}
    for splits in (1, 2):
        assert_close(called(quantized, device, options | {"num_splits": splits}), s, quantized[2])


def test_rules_slopes_and_large_scores(device):
    """ALiBi; a mask of one's own, which takes smaller tiles; scores that rows take their maximum off."""
    asked = Asked((140, 300), (2, 1), (64, 64), ("mxfp8", "mxfp8"))
    _, quantized = made(asked)
    slopes, distance = torch.tensor([0.5, 0.1]), torch.arange(140)[:, None] + 160 - torch.arange(300)[None]
    s = scores(*quantized[:2], 0.0)
    biased = s - slopes.double()[:, None, None] * distance.abs()
    assert_close(called(quantized, device, {"alibi_slopes": moved(slopes, device)}), biased, quantized[2])
    shown = (distance % 3 != 0) | (distance == 0)

    def every_third(q, k):
        return ((q - k) % 3 != 0) | (q == k)

    found = called(quantized, device, {"mask": every_third})
    assert_close(found, s.masked_fill(~shown, -math.inf), quantized[2])
    assert_close(called(quantized, device, {"softmax_scale": 300.0}), s * 300 * 8, quantized[2])


def test_blocks_of_a_block_mask(device):
    """The same bits as the mask alone, whose tiles it has."""
    asked = Asked((300, 300), (2, 2), (64, 64), ("nvfp4", "mxfp8"))
    _, quantized = made(asked)
    blocks = create_block_mask(Causal(), 2, 2, 300, 300, block_size=(256, 128))
    found = called(quantized, device, {"block_mask": moved(blocks, device)})
    assert all(map(torch.equal, found, called(quantized, device, {"causal": True})))


def test_one_cta_takes_tiles_of_several_heads(device):
    """CTAs that persist keep P's factors, and bring Q's anew: the same bits as with a CTA for each."""
    if device == "cuda":
        pytest.skip("a GPU has more multiprocessors than tiles here")
    asked = Asked((140, 300), (3, 3), (64, 64), ("mxfp8", "mxfp8"))
    _, quantized = made(asked)
    wanted = called(quantized, device, {})
    few = replace(EMULATED["sm100"], multiprocessors=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(EMULATED, "sm100", few)
        found = called(quantized, device, {}, races=True)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_factors_of_another_order_are_noticed(device, name):
    """Two quarters of an atom's rows changed places: results are others."""
    asked = Asked((140, 200), (1, 1), (64, 64), ("mxfp8", "mxfp8"))
    _, (q, k, v) = made(asked)
    given = {"q": q, "k": k, "v": v}
    turned = given[name].scale.view(torch.uint8).flip(-2).contiguous().view(given[name].scale.dtype)
    right, _ = called((q, k, v), device, {})
    wrong, _ = called((given | {name: replace(given[name], scale=turned)}).values(), device, {})
    assert (wrong - right).square().mean() > 0.1**2 * right.square().mean()


X = torch.randn(1, 40, 4, 64)
Q, K = quantize(X, "mxfp8"), quantize(X[:, :, :2], "mxfp8")
SINK = torch.ones(4, requires_grad=True)
Q4, K4 = quantize(X, "nvfp4", heads_kv=2), quantize(X[:, :, :2], "nvfp4")
X2, BYTES = X[:, :, 2:], Q.scale.view(torch.uint8)
V, V8 = quantize(X2, hadamard=False), quantize(X2, "mxfp8", axis="seqlen", hadamard=False)


def with_byte(x: cute_flash.Quantized, byte: int) -> cute_flash.Quantized:
    found = x.scale.view(torch.uint8).clone()
    found.flatten()[3] = byte
    return replace(x, scale=found.view(x.scale.dtype))


@pytest.mark.parametrize(
    "tensors, options, error, words",
    [
        ((Q, K4, V), {}, ValueError, "k has format nvfp4, q has mxfp8: they must be equal"),
        ((Q, K, K4), {}, ValueError, "v is rotated by"),
        ((Q, K, quantize(X2, "nvfp4", hadamard=False)), {}, NotImplementedError, "v has format nvfp4; a"),
        ((Q, K, quantize(X2, "mxfp8", hadamard=False)), {}, ValueError, "v has scales along head_dim; allow"),
        ((quantize(X, "mxfp8", axis="seqlen"), K, V), {}, ValueError, "q has scales along seqlen; allowed"),
        ((Q, K, quantize(X2, block=64, hadamard=False)), {}, ValueError, "v has scales of blocks of 64 rows"),
        ((Q, K, quantize(X2, heads_kv=1, hadamard=False)), {}, ValueError, "v has 1 float32 scales"),
        ((quantize(X, "nvfp4"), K4, V), {}, ValueError, "q has 4 float32 scales for each sequence; allo"),
        ((replace(Q, scale=BYTES), K, V), {}, TypeError, "q.scale is torch.uint8 on cpu; allowed"),
        ((replace(Q, scale=Q.scale[:, :3]), K, V), {}, ValueError, r"q.scale has shape \(1, 3, 1, 1, 32, 4"),
        ((replace(Q, scale=BYTES.mT.view(Q.scale.dtype)), K, V), {}, ValueError, "allowed: .* contiguous"),
        ((with_byte(Q, 255), K, V), {}, ValueError, "q.scale has the byte 255; allowed: 0 to 254, powers"),
        ((Q4, with_byte(K4, 127), V), {}, ValueError, "k.scale has the byte 127; allowed: 0 to 126, e4m3"),
        ((Q4, with_byte(K4, 200), V), {}, ValueError, "k.scale has the byte 200; allowed: 0 to 126, e4m3"),
        ((Q4, replace(K4, tensor_scale=-K4.tensor_scale), V), {}, ValueError, "k's scale has -.*; allowed"),
        ((Q, K, V), {"out_dtype": torch.float32}, TypeError, "out_dtype is torch.float32; allowed"),
        ((Q, K, V8), {"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0"),
        ((Q, K, V8), {"learnable_sink": SINK}, NotImplementedError, "a gradient is required; of q, k and"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(tensors, options, error, words):
    with cute_flash.emulated("sm100"), pytest.raises(error, match=words):
        flash_attn_quantized_func(*tensors, **options)


def test_other_devices_say_why_not():
    for name, words in (("sm90", "sm90.fp8.*no MXFP8"), ("sm80", "no kernel for attention in few bits")):
        with cute_flash.emulated(name), pytest.raises(NotImplementedError, match=words):
            flash_attn_quantized_func(Q, K, V)
    with cute_flash.emulated("sm90"), pytest.raises(NotImplementedError, match="no NVFP4"):
        flash_attn_quantized_func(Q4, K4, V)


def test_head_dims_that_are_refused():
    x = torch.randn(1, 40, 2, 48)
    q, k = (quantize(x, "nvfp4") for _ in range(2))
    with cute_flash.emulated("sm100"), pytest.raises(NotImplementedError, match="head_dim 48 is not in 32…"):
        flash_attn_quantized_func(q, k, quantize(x, hadamard=False))
    assert cute_flash.supports(torch.float4_e2m1fn_x2, 128, device="sm100", form="nvfp4", v_form="mxfp8")
    assert not cute_flash.supports(torch.float4_e2m1fn_x2, 128, device="sm100", form="mxfp8")


def test_factors_are_where_the_order_says():
    """Row r's of group g: byte 16 (r % 32) + 4 (r // 32 % 4) + g % 4 of atom (r // 128, g // 4)."""
    scales = torch.randint(0, 255, (200, 6), dtype=torch.uint8)
    atoms = scale_factors.to_atoms(scales).flatten(-3)
    for r, g in ((0, 0), (33, 2), (150, 5), (199, 4)):
        assert atoms[r // 128, g // 4, 16 * (r % 32) + 4 * (r // 32 % 4) + g % 4] == scales[r, g]

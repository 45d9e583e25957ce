"""Attention in FP8: results are those of the model of its arithmetic, and as accurate as 8 bits are.

The model is profiling/accuracy.py's, from which the committed table is.
"""

from __future__ import annotations

import math

import pytest
import torch

import cute_flash
from cute_flash import (
    create_block_mask,
    flash_attn_func,
    flash_attn_quantized_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    quantize,
)
from cute_flash.arch.sm90.fp8 import QUANTIZED
from cute_flash.dispatch import EMULATED
from cute_flash.problems import problem
from profiling import accuracy
from profiling.accuracy import Operand, Scheme
from tests.harness import moved, where

# (seqlen_q, seqlen_k), (heads, heads_kv), head dims, block, options: each two tiles at least, none whole.
CASES = {
    "heads": ((70, 200), (4, 2), (64, 96), None, {}),
    "blocks": ((140, 300), (2, 2), (128, 128), 128, {"out_dtype": torch.float16}),
    "causal": ((150, 130), (2, 1), (32, 32), 128, {"causal": True}),
    "window": ((150, 150), (1, 1), (96, 64), None, {"window_size": (40, 5)}),
    "blocks of 64": ((140, 300), (2, 1), (64, 64), 64, {"out_dtype": torch.float16}),
    "unequal": ((140, 300), (2, 1), (192, 128), None, {}),
    "wide values": ((70, 330), (1, 1), (64, 256), None, {"causal": True}),
    "no whole steps": ((140, 200), (2, 1), (48, 80), None, {"window_size": (150, 20)}),
    "tiles of a block": ((140, 300), (1, 1), (256, 192), 128, {}),
}
BLACKWELLS = {"heads", "causal", "blocks of 64"}
OPTIONS = {
    "heads": {"asynchrony": "late"},
    "causal": {"asynchrony": "random", "schedule": "random", "seed": 3},
    "window": {"fp8_accumulator": "hopper"},
    "unequal": {"asynchrony": "random", "schedule": "random", "seed": 3},
    "wide values": {"fp8_accumulator": "hopper"},
}


@pytest.fixture(scope="module")
def device(machine) -> str:
    """Where there is a kernel: an emulated Hopper or Blackwell, or the GPU at hand if it is one."""
    if machine == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10, 11):
        return machine
    if machine == "sm80":
        pytest.skip("there are kernels for compute capabilities 9.0 to 11.0")
    return "sm90" if machine == "cuda" else machine


def is_hopper(device: str) -> bool:
    return device == "sm90" or (device == "cuda" and torch.cuda.get_device_capability()[0] == 9)


def scheme(device: str, accumulator: str, name: str) -> Scheme:
    """The arithmetic of the kernel there."""
    if not is_hopper(device):
        return Scheme(blackwell=True)
    *_, (dim, dim_v), block, _ = CASES[name]
    asked = problem(
        dtype=torch.float8_e4m3fn, head_dim=dim, head_dim_v=dim_v, block=block, out_dtype="float16", lse=True
    )
    tile = QUANTIZED.config(asked, EMULATED["sm90"]).tile_n
    return Scheme(accumulator="hopper" if device == "cuda" else accumulator, tile=tile)


def made(name: str, scale: float = 1.0):
    """(q, k, v) as bfloat16, and quantized."""
    (seqlen_q, seqlen_k), (heads, heads_kv), (dim, dim_v), block, _ = CASES[name]
    shapes = ((2, seqlen_q, heads, dim), (2, seqlen_k, heads_kv, dim), (2, seqlen_k, heads_kv, dim_v))
    exact = [torch.randn(shape).bfloat16() for shape in shapes]
    exact[0] = exact[0] * scale
    shared = {"heads_kv": heads_kv} if block is None else {"block": block}
    q, k = (quantize(x, seed=2, **shared) for x in exact[:2])
    return exact, (q, k, quantize(exact[2], hadamard=False, **shared))


def on(x, device: str):
    """A quantized tensor where calls of a test run."""
    found = {name: moved(getattr(x, name), device) for name in ("data", "scale")}
    return cute_flash.Quantized(x.format, *found.values(), None, x.block, x.axis, x.rotation)


def visible(name: str) -> torch.Tensor:
    """(seqlen_q, seqlen_k) bool."""
    (rows, keys), *_, options = CASES[name]
    q, k = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
    left, right = options.get("window_size", (math.inf, math.inf))
    if options.get("causal"):
        right = 0
    return (k >= q - left) & (k <= q + right)


def operand(x, batch: int, head: int) -> Operand:
    """One head, as the model takes it."""
    rows = x.shape[1]
    if x.block is None:
        head_of_scale = head * x.scale.shape[1] // x.shape[2]
        scale = x.scale[batch, head_of_scale].expand(rows, 1)
    else:
        scale = x.scale[batch, head].repeat_interleave(x.block)[:rows, None]
    return Operand(x.data.float()[batch, :, head], scale)


# Of results whose P was rounded from other maxima: each number is off by 2**-4 of itself at most, 2.6 % on
# average, so that two results are 3.7 % apart. With a part of the keys left out it is more than 30 %.
ROUNDED_TWICE = 2.0**-4
LSE, LSE_OF_FLOAT16 = 1e-4, 2e-4  # how close a log-sum-exp is; where sums of sixteen numbers are float16


def assert_rows_close(out, model, lse, top, close: float = LSE) -> None:
    """Row by row, but for one in ten: the last bit of an exponential may decide how a P is rounded.

    A result's own 16 bits cost rows of 32 columns up to 2.7e-3; what 8 bits cost is ten times as much.
    """
    sees = ~top.isneginf()
    assert torch.equal(lse.isneginf(), ~sees) and (out[~sees] == 0).all()
    apart = (out - model)[sees].square().mean(1).sqrt() / model[sees].square().mean(1).sqrt()
    assert apart.quantile(0.9) < 4e-3
    assert (lse - top)[sees].abs().quantile(0.9) < close


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_arithmetic(device, name):
    """Tile by tile, P rounded where the kernel rounds it: far closer than 8 bits are to exact numbers."""
    if not is_hopper(device) and name not in BLACKWELLS:
        pytest.skip("another kernel's: these have what differs")
    exact, quantized = made(name)
    _, (heads, heads_kv), (dim, _), block, options = CASES[name]
    emulation = OPTIONS.get(name, {"races": True})
    with where(device, **emulation):
        found = flash_attn_quantized_func(*(on(x, device) for x in quantized), return_lse=True, **options)
    out, lse = (x.cpu().double() for x in found)
    assert found[0].dtype is options.get("out_dtype", torch.bfloat16) and found[1].dtype is torch.float32
    shown = visible(name)
    for batch, head in ((0, 0), (1, heads - 1)):
        kv = head * heads_kv // heads
        q, k, v = (operand(x, batch, h) for x, h in zip(quantized, (head, kv, kv), strict=True))
        arithmetic = scheme(device, emulation.get("fp8_accumulator", "float32"), name)
        model, top = accuracy.attention(q, k, v, dim**-0.5, arithmetic, shown)
        close = LSE_OF_FLOAT16 if is_hopper(device) else LSE
        assert_rows_close(out[batch, :, head], model.double(), lse[batch, head], top[:, 0].double(), close)
        s = (exact[0][batch, :, head].double() @ exact[1][batch, :, kv].double().T * dim**-0.5)
        s = s.masked_fill(~shown, -math.inf)
        p = s.softmax(1).nan_to_num(0.0)
        wanted = p @ exact[2][batch, :, kv].double()
        error = (out[batch, :, head] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert 3e-3 < error < 0.1, f"{error:.2e} of the exact result"


def called(x: tuple[cute_flash.Quantized, ...], device: str, function=flash_attn_func, *lengths, **options):
    """(out, lse) of one of the functions that take tensors and what they are to be multiplied by."""
    data, scales = ([moved(getattr(one, name), device) for one in x] for name in ("data", "scale"))
    names = ("q_descale", "k_descale", "v_descale")
    options |= dict(zip(names, scales, strict=True)) | {"quantization_block": x[0].block}
    if lengths:
        data = [one.flatten(0, 1) for one in data]
    with where(device):
        out, lse = function(*data, *(moved(one, device) for one in lengths), return_lse=True, **options)
    return out.cpu(), lse.cpu()


def test_tensors_and_what_they_are_multiplied_by(device):
    """The same bits as with `Quantized`; what is not given is 1."""
    _, quantized = made("heads")
    with where(device):
        wanted = flash_attn_quantized_func(*(on(x, device) for x in quantized), return_lse=True)
    assert all(map(torch.equal, called(quantized, device), (x.cpu() for x in wanted)))
    q, k, v = (moved(x.data, device) for x in quantized)
    with where(device):
        out, _ = flash_attn_func(q, k, v, 0.0, 2e-5, return_lse=True)
    s = torch.einsum("bqhd,bkhd->bhqk", q.cpu().double(), k.cpu().double().repeat_interleave(2, 2))
    wanted = torch.einsum("bhqk,bkhd->bqhd", (s * 2e-5).softmax(-1), v.cpu().double().repeat_interleave(2, 2))
    assert (out.cpu().double() - wanted).square().mean() < 0.03**2 * wanted.square().mean()


@pytest.mark.parametrize("name", ["heads", "blocks of 64"])
def test_packed_sequences_are_as_they_are_alone(name, device):
    """Bit for bit, with used lengths, and scales of each sequence, or of blocks of its own rows."""
    _, (q, k, v) = made(name)
    starts = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    used = torch.tensor([0, 130], dtype=torch.int32)
    lengths = {"seqused_k": moved(used, device)}
    longest = q.shape[1], k.shape[1]
    out, lse = called((q, k, v), device, flash_attn_varlen_func, *starts, *longest, causal=True, **lengths)
    out = out.unflatten(0, (2, -1))
    assert (out[0] == 0).all() and lse[:, : q.shape[1]].isneginf().all()
    alone = [beginning(x, 1, rows) for x, rows in ((q, q.shape[1]), (k, 130), (v, 130))]
    wanted, top = called(alone, device, causal=True)
    assert torch.equal(out[1], wanted[0]) and torch.equal(lse[:, q.shape[1] :], top[0])


def beginning(x: cute_flash.Quantized, sequence: int, rows: int) -> cute_flash.Quantized:
    """Some rows of one sequence, and the scales that are theirs."""
    data, scale = x.data[sequence, None, :rows], x.scale[sequence, None]
    scale = scale if x.block is None else scale[..., : -(-rows // x.block)]
    return cute_flash.Quantized(x.format, data, scale, None, x.block, x.axis, None)


USED = (200, 130)  # keys of two sequences in a cache


def placed(kind: str) -> tuple[list[torch.Tensor], tuple[int, int], dict[str, torch.Tensor]]:
    """(row or page, place in it) of every key of each sequence; how many of both; what tells of it."""
    keys, lengths = [torch.arange(n) for n in USED], torch.tensor(USED, dtype=torch.int32)
    if kind == "pages":
        table = torch.randperm(26, generator=torch.Generator().manual_seed(1)).reshape(2, 13).int()
        places = [torch.stack([pages[n // 16], n % 16], 1) for pages, n in zip(table, keys, strict=True)]
        return places, (26, 16), {"cache_seqlens": lengths, "block_table": table}
    rows, pads = torch.tensor([2, 1], dtype=torch.int32), torch.tensor([7, 20], dtype=torch.int32)
    told = {"cache_seqlens": lengths + pads, "cache_leftpad": pads, "cache_batch_idx": rows}
    placed = zip(rows, pads, keys, strict=True)
    return [torch.stack([row.expand(len(n)), n + pad], 1) for row, pad, n in placed], (3, 230), told


def in_cache(name: str, kind: str, rows: int) -> tuple[tuple[cute_flash.Quantized, ...], dict]:
    """(q, k, v) of a case, and what a call is given that finds the keys in use in a cache, between NaNs."""
    _, (q, k, v) = made(name)
    places, sizes, given = placed(kind)
    room, block = (sizes[1] if kind == "rows" else 13 * sizes[1]), q.block
    given |= {"q": q.data[:, :rows], "q_descale": q.scale, "quantization_block": block}
    given |= {f"{name}_descale": x.scale for name, x in (("k", k), ("v", v))}
    if block:
        given["q_descale"] = q.scale[..., : -(-rows // block)]
        blocks = -(-room // block)
        for name, x in (("k", k), ("v", v)):  # beyond the keys in use they have no part in anything
            found = torch.full((*x.scale.shape[:2], blocks), 1e30)
            for scale, theirs, used in zip(found, x.scale, USED, strict=True):
                scale[:, : -(-used // block)] = theirs[:, : -(-used // block)]
            given[f"{name}_descale"] = found
    for name, x in (("k_cache", k), ("v_cache", v)):
        given[name] = torch.full((*sizes, *x.shape[2:]), math.nan).to(x.data.dtype)
        for keys, at in zip(x.data, places, strict=True):
            given[name][at[:, 0].long(), at[:, 1].long()] = keys[: len(at)]
    return (q, k, v), given


def on_device(given: dict, device: str) -> dict:
    return {name: moved(x, device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("rows", [70, 3])
@pytest.mark.parametrize("kind", ["rows", "pages"])
@pytest.mark.parametrize("name", ["heads", "blocks of 64"])
def test_a_cache_is_as_its_sequences_alone(name, kind, rows, device):
    """Bit for bit, with NaN around the keys in use; blocks of scales begin at the first in use."""
    (q, k, v), given = in_cache(name, kind, rows)
    given = on_device(given, device)
    with where(device):
        found = flash_attn_with_kvcache(**given, causal=True, num_splits=1, return_softmax_lse=True)
    for i, keys in enumerate(USED):
        alone = [beginning(x, i, n) for x, n in ((q, rows), (k, keys), (v, keys))]
        wanted = called(alone, device, causal=True)
        assert all(torch.equal(one[i].cpu(), other[0]) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["heads", "blocks of 64"])
def test_parts_by_metadata(name, device):
    """As without, but for the order of the sum; a schedule of another block or dtype is refused."""
    _, given = in_cache(name, "rows", 3)
    (_, _, heads, dim), (*_, heads_kv, dim_v) = given["q"].shape, given["v_cache"].shape
    sizes = (2, 3, given["k_cache"].shape[1], heads, heads_kv, dim)
    given, block = on_device(given, device), given["quantization_block"]
    asked = {"qkv_dtype": torch.float8_e4m3fn, "headdim_v": dim_v, "quantization_block": block}
    asked |= {"cache_leftpad": given["cache_leftpad"], "causal": True, "num_splits": 3}
    with where(device):
        metadata = get_scheduler_metadata(*sizes, given["cache_seqlens"], **asked)
        found = flash_attn_with_kvcache(**given, causal=True, scheduler_metadata=metadata)
        whole = flash_attn_with_kvcache(**given, causal=True, num_splits=1)
        assert metadata.splits.max() > 1
        others = get_scheduler_metadata(*sizes, given["cache_seqlens"], **asked | {"num_splits": 2})
        given["scheduler_metadata"] = others._replace(num_splits=3)
        with pytest.raises(ValueError, match="scheduler_metadata is for .* num_splits 2; allowed: for .* 3"):
            flash_attn_with_kvcache(**given, causal=True)
    apart = (found.float() - whole.float()).square().mean() / whole.float().square().mean()
    assert apart.sqrt() < ROUNDED_TWICE


def test_blocks_of_a_mask(device):
    """Those of a causal mask give its result, bit for bit; others that of a mask that shows as much."""
    _, quantized = made("blocks of 64")
    (batch, rows, heads, _), keys = quantized[0].shape, quantized[1].shape[1]
    for rule, exactly in ((cute_flash.Causal(), True), (lambda q, k: q // 256 * 0 + k // 128 != 1, False)):
        blocks = create_block_mask(rule, batch, heads, rows, keys, block_size=(256, 128))
        out, lse = called(quantized, device, block_mask=moved(blocks, device))
        wanted, top = called(quantized, device, **({"causal": True} if exactly else {"mask": rule}))
        assert not exactly or torch.equal(out, wanted) and torch.equal(lse, top)
        apart = (out.float() - wanted.float()).square().mean() / wanted.float().square().mean()
        assert apart.sqrt() < ROUNDED_TWICE and (lse - top).nan_to_num(0.0).abs().max() < 0.02


def test_where_the_result_is_written(device):
    """The bits that a call without `out` returns, in its dtype."""
    _, quantized = made("heads")
    (batch, rows, heads, _), dim_v = quantized[0].shape, quantized[2].shape[3]
    for dtype in (torch.bfloat16, torch.float16):
        place = moved(torch.full((batch, rows, heads, dim_v), torch.nan, dtype=dtype), device)
        out, lse = called(quantized, device, out=place)
        wanted, top = called(quantized, device, out_dtype=dtype)
        assert torch.equal(out, wanted) and torch.equal(place.cpu(), wanted) and torch.equal(lse, top)


@pytest.mark.parametrize("kind", ["rows", "pages"])
@pytest.mark.parametrize("wide", [False, True], ids=["q of 8 bits", "q of 16 bits"])
def test_new_keys_are_written_as_they_are(wide, kind, device):
    """Bit for bit, and nothing beside them; then they are seen, as if they had been there before."""
    _, given = in_cache("heads", kind, 3)
    del given["quantization_block"]
    if wide:
        given["q"], given["q_descale"] = given["q"].float().bfloat16(), None
    told = given | {"cache_seqlens": given["cache_seqlens"] - 3}
    new = {}
    for name in "kv":
        cache = told[f"{name}_cache"] = given[f"{name}_cache"].clone()
        places = [at[-3:] for at in placed(kind)[0]]
        new[name] = torch.stack([cache[at[:, 0].long(), at[:, 1].long()] for at in places])
        for at in places:
            cache[at[:, 0].long(), at[:, 1].long()] = torch.full((), 1.5).to(cache.dtype)
    told, given, new = (on_device(x, device) for x in (told, given, new))
    with where(device):
        wanted = flash_attn_with_kvcache(**given, causal=True, num_splits=2)
        found = flash_attn_with_kvcache(**told, **new, causal=True, num_splits=2)
    assert torch.equal(found, wanted)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(told[name].view(torch.uint8), given[name].view(torch.uint8))


def test_a_cache_under_torch_compile():
    """The same bits, without a break, also of a cache that new keys are written into."""
    _, (q, k, v) = made("heads")
    given = {name: x.scale for name, x in (("q_descale", q), ("k_descale", k), ("v_descale", v))}
    given["cache_seqlens"] = torch.tensor(USED, dtype=torch.int32) - 7

    def attend(q, k, v, new):
        return flash_attn_with_kvcache(q, k, v, **new, causal=True, **given)

    for new in ({}, {"k": k.data[:, :7].clone(), "v": v.data[:, :7].clone()}):
        caches, others = ((k.data.clone(), v.data.clone()) for _ in range(2))
        with where("sm90"):
            wanted = attend(q.data, *caches, new)
            traced = torch.compile(attend, fullgraph=True, backend="aot_eager")(q.data, *others, new)
        assert torch.equal(traced, wanted)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(caches, others, strict=True))


def test_packed_queries_find_keys_in_pages(device):
    """The same bits as with keys side by side."""
    _, (q, k, v) = made("heads")
    starts = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    lengths = moved(torch.tensor([200, 200], dtype=torch.int32), device)
    wanted = called((q, k, v), device, flash_attn_varlen_func, *starts, 70, 200, seqused_k=lengths)
    names = ("q_descale", "k_descale", "v_descale")
    given = dict(zip(names, (moved(x.scale, device) for x in (q, k, v)), strict=True))
    given |= {"seqused_k": lengths, "block_table": moved(torch.arange(50).reshape(2, 25).int(), device)}
    pages = (moved(x.data.unflatten(1, (25, 8)).flatten(0, 1), device) for x in (k, v))
    with where(device):
        found = flash_attn_varlen_func(
            moved(q.data.flatten(0, 1), device), *pages, moved(starts[0], device), None, 70, 200,
            return_lse=True, **given,
        )  # fmt: skip
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))


def test_scores_sinks_and_parts_of_the_keys(device):
    """Of what is stored, as accurate as weights of 8 bits are; the log-sum-exp as with 16 bits, or on Hopper
    of weights as they are rounded.
    """
    _, quantized = made("blocks", 4.0)
    sink, cap = torch.randn(2), 5.0
    options = {"softcap": cap, "learnable_sink": moved(sink, device)}
    q, k, v = (x.dequantize(rotated=True).double() for x in quantized)
    s = cap * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5 / cap)
    s = torch.cat([s, sink.double()[:, None, None].expand(2, 2, q.shape[1], 1)], 3)
    wanted = torch.einsum("bhqk,bkhd->bqhd", s.softmax(3)[..., :-1], v)
    for splits in (1, 2):
        out, lse = called(quantized, device, num_splits=splits, **options)
        assert (lse.double() - s.logsumexp(3)).abs().max() < (0.02 if is_hopper(device) else 1e-4)
        assert (out.double() - wanted).square().mean() < 0.03**2 * wanted.square().mean()


def test_more_range_for_fewer_digits(device):
    """q, k and v of e5m2, P of e4m3; head dims that are no whole steps, and on Blackwell one Q tile."""
    dims = (48, 256)
    q, k, v = (torch.randn(1, 140, 1, dim) for dim in (dims[0], *dims))
    quantized = tuple(quantize(x, "e5m2", hadamard=False) for x in (q, k, v))
    out, _ = called(quantized, device, causal=True)
    q, k, v = (x.dequantize().double()[0, :, 0] for x in quantized)
    s = (q @ k.T * dims[0] ** -0.5).masked_fill(torch.ones(140, 140).tril() == 0, -math.inf)
    wanted = s.softmax(1) @ v
    assert (out[0, :, 0].double() - wanted).square().mean() < 0.03**2 * wanted.square().mean()


X = torch.randn(1, 20, 4, 64)
Q, K, V = quantize(X, heads_kv=2), quantize(X[:, :, :2]), quantize(X[:, :, 2:], hadamard=False)


@pytest.mark.parametrize(
    "tensors, options, error, words",
    [
        ((X, K, V), {}, TypeError, "q is Tensor; allowed: Quantized"),
        ((Q, quantize(X[:, :, :2], "mxfp8"), V), {}, ValueError, "k has block None in mxfp8, q has block"),
        ((Q, quantize(X[:, :, :2], block=64), V), {}, ValueError, "k has block 64 in e4m3, q has block"),
        ((Q, quantize(X[:, :, :2], "e5m2"), V), {}, ValueError, "k has block None in e5m2, q has block"),
        ((Q, K, quantize(X[:, 1:, 2:], hadamard=False)), {}, ValueError, r"shapes \(1, 20, 2, 64\)"),
        ((Q, quantize(X[:, :, :3]), quantize(X[:, :, :3])), {}, ValueError, "q has 4 heads and k 3"),
        ((Q, quantize(X[:, :, :2], seed=1), V), {}, ValueError, "q is rotated by .*seed=0.*, k by .*seed=1"),
        ((Q, K, quantize(X[:, :, 2:])), {}, ValueError, "v is rotated by"),
        ((quantize(X), K, V), {}, ValueError, "q has 4 scales for each sequence; allowed: 2"),
        ((Q, K, V), {"out_dtype": torch.float32}, TypeError, "out_dtype is torch.float32; allowed"),
        ((Q, K, V), {"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(tensors, options, error, words):
    with cute_flash.emulated("sm90"), pytest.raises(error, match=words):
        flash_attn_quantized_func(*tensors, **options)


ALL = {"q_descale": Q.scale, "k_descale": K.scale, "v_descale": V.scale}
SINK = torch.ones(4, requires_grad=True)
STARTS = torch.tensor([0, 20], dtype=torch.int32)


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"q": X.half()}, TypeError, "q_descale is given, q is of torch.float16; allowed"),
        ({"q": X.half(), **dict.fromkeys(ALL), "out_dtype": torch.half}, TypeError, "out_dtype is given"),
        ({"k": K.data.view(torch.float8_e5m2)}, TypeError, "k has dtype torch.float8_e5m2, q has"),
        ({"v_descale": V.scale.half()}, TypeError, "v_descale has dtype torch.float16; allowed"),
        ({"q_descale": torch.ones(1, 4)}, ValueError, r"q_descale has shape \(1, 4\); allowed: \(1, 2\)"),
        ({"k_descale": torch.tensor([[1.0, 0.0]])}, ValueError, r"k_descale has 0\.0; allowed: finite"),
        ({"v_descale": torch.tensor([[-2.0, 1.0]])}, ValueError, r"v_descale has -2\.0; allowed: finite"),
        ({"q_descale": torch.tensor([[1.0, torch.nan]])}, ValueError, "q_descale has nan; allowed: finite"),
        ({"quantization_block": 64}, ValueError, r"q_descale has shape \(1, 2\); allowed: \(1, 4, 1\)"),
        ({"quantization_block": 32}, ValueError, "quantization_block is 32; allowed: None, 64, 128"),
        ({"out_dtype": torch.float32}, TypeError, "out_dtype is torch.float32; allowed"),
        ({"out": X}, TypeError, "out has dtype torch.float32; allowed: torch.bfloat16, the result's"),
        ({"out": X.half(), "out_dtype": torch.bfloat16}, TypeError, "out has dtype torch.float16; allowed: "),
        ({"out": X.half()[:, 1:]}, ValueError, r"out has shape \(1, 19, 4, 64\); allowed: \(1, 20, 4, 64\)"),
        ({"return_attn_probs": True}, NotImplementedError, "return_attn_probs is True; allowed for q of 8 b"),
        ({"learnable_sink": SINK}, NotImplementedError, "a gradient is required; of q, k and"),
        ({"dropout_p": 0.5}, NotImplementedError, "no dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_refused(changed, error, words):
    given = {"q": Q.data, "k": K.data, "v": V.data, **ALL, **changed}
    with cute_flash.emulated("sm100"), pytest.raises(error, match=words):
        flash_attn_func(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_packed_tensors_that_are_refused():
    """Scales of other blocks than sequences have, and new keys that are to be rotated; nothing is written."""
    q, k, v = (x.data.flatten(0, 1) for x in (Q, K, V))
    appended = {"k": V.data[:, :1].clone(), "v": K.data[:, :1].clone(), "cache_seqlens": 3}
    rotary = dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(20, 32))
    words = "rotary_cos, rotary_sin are given beside q of 8 bits; allowed: None. What is rotated"
    with cute_flash.emulated("sm90"), pytest.raises(NotImplementedError, match=words):
        flash_attn_with_kvcache(Q.data, K.data, V.data, **appended, **rotary)
    before = K.data.clone()
    for wrong in ({"k_descale": -K.scale}, {"score": lambda s, *_: s, "q": X.to(torch.float8_e5m2)},
                  {"k": K.data[:, :1].view(torch.float8_e5m2)}, {"cache_seqlens": 20}):
        given = {"q": Q.data, "k_cache": K.data, "v_cache": V.data} | appended | wrong
        with cute_flash.emulated("sm90"), pytest.raises((ValueError, TypeError)):
            flash_attn_with_kvcache(**given)
    with cute_flash.emulated("sm80"), pytest.raises(NotImplementedError, match="few bits"):
        flash_attn_with_kvcache(Q.data, K.data, V.data, **appended)
    memory = torch.zeros(2 * Q.data.numel() + 1, dtype=torch.uint8)
    overlapping = memory[: 2 * Q.data.numel()].view(torch.bfloat16).view(Q.data.shape)
    unaligned = memory[1 : 1 + Q.data.numel()].view(torch.float8_e4m3fn).view(Q.data.shape)
    for words, wrong in (
        ("out overlaps q in memory", {"q": memory[: Q.data.numel()].view(Q.data.dtype).view(Q.data.shape),
                                      "out": overlapping}),
        ("q begins at address", {"q": unaligned}),
    ):  # fmt: skip
        given = {"q": Q.data, "k_cache": K.data, "v_cache": V.data} | appended | wrong
        with cute_flash.emulated("sm90"), pytest.raises(ValueError, match=words):
            flash_attn_with_kvcache(**given)
    assert torch.equal(K.data.view(torch.uint8), before.view(torch.uint8))
    with cute_flash.emulated("sm90"), pytest.raises(TypeError, match="q_descale is given, q is of torch.f"):
        flash_attn_with_kvcache(X.half(), X.half(), X.half(), q_descale=Q.scale)
    words = r"k_descale has shape \(1, 2\); allowed: \(1, 2, 2\)"
    given = {"k_descale": K.scale, "quantization_block": 64}
    with cute_flash.emulated("sm100"), pytest.raises(ValueError, match=words):
        flash_attn_varlen_func(q, k, v, STARTS, STARTS, 20, 100, **given)
    with cute_flash.emulated("sm90"), pytest.raises(ValueError, match=r"allowed: \(1, 2, 1\)"):
        flash_attn_with_kvcache(Q.data, K.data, V.data, **given)


def test_no_kernel():
    with cute_flash.emulated("sm80"), pytest.raises(NotImplementedError, match="for attention in few bits"):
        flash_attn_quantized_func(Q, K, V)


def test_every_reason():
    """Head dims that are no multiples of 16, K's and V's: both are told."""
    q, k, v = (quantize(X[..., :40], "e5m2", hadamard=False).data for _ in range(3))
    words = "head_dim 40 is not in 16.*; head_dim_v 40 is not in 16"
    with cute_flash.emulated("sm90"), pytest.raises(NotImplementedError, match=words):
        flash_attn_func(q, k, v, softcap=5.0)
    softcap = cute_flash.Softcap(5.0)
    answer = cute_flash.supports(torch.float8_e4m3fn, 128, device="sm100", block=64, score=softcap)
    assert answer and "sm100.fp8 serves" in str(answer)
    small = cute_flash.supports(torch.float8_e4m3fn, 256, device="sm100", block_size=(64, 64), score=softcap)
    assert not small and "only with MXFP8 or NVFP4" in str(small) and "multiple of no tile" in str(small)
    gradients = {"dtype": torch.float8_e4m3fn, "head_dim": 128, "backward": True}
    assert "sm100.fp8_backward serves" in str(cute_flash.supports(**gradients, device="sm100"))
    assert "sums have one" in str(cute_flash.supports(**gradients, device="sm100", block=64))

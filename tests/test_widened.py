"""Attention of q of 16 bits to a cache of 8: as accurate as with one of 16 that holds the same numbers."""

from __future__ import annotations

import math

import pytest
import torch

import cute_flash
from cute_flash import flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata
from tests.accuracy import assert_accurate
from tests.harness import call_of, moved, where
from tests.orders import hold
from tests.widening import CASES, ORDERED

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_values(name, machine):
    call_of(CASES[name]).check(machine)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ORDERED)
def test_any_order_of_events(name, seed, arch, proven):
    """Watched by the race detector, by the book."""
    options = {"asynchrony": "random", "schedule": "random", "seed": seed, "races": True, "by_the_book": True}
    hold(ORDERED[name], arch, proven, **options)


@pytest.mark.parametrize("name", ORDERED)
def test_late_copies(name, arch, proven):
    hold(ORDERED[name], arch, proven, asynchrony="late", schedule="random", seed=1, races=True)


def codes(dtype: torch.dtype) -> torch.Tensor:
    """All 256 numbers of a format, what is infinite or no number among them."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_code_is_widened_exactly(dtype, half, machine):
    """Of a single key, whose weight is 1, the result is the value, and no number where it is none."""
    v = codes(dtype).view(1, 1, 1, 256)
    q, k = torch.randn(1, 3, 1, 64, dtype=half), torch.randn(1, 1, 1, 64).to(dtype)
    with where(machine):
        out = flash_attn_with_kvcache(*(moved(x, machine) for x in (q, k, v))).cpu()
    wanted = v.to(half).expand(1, 3, 1, 256)
    finite = wanted.isfinite()
    assert torch.equal(out[finite], wanted[finite])
    assert out[wanted.isnan()].isnan().all() and not out[~finite].isfinite().any()


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_keys_that_are_no_numbers_show(dtype, half, machine):
    """NaN in one key is NaN in the scores of those who see it, and nowhere else."""
    wrong = codes(dtype)[~codes(dtype).float().isfinite()]
    k = torch.randn(len(wrong), 40, 1, 64).to(dtype)
    k[:, 30, 0, 5] = wrong
    q, v = torch.randn(len(wrong), 40, 1, 64, dtype=half), torch.randn(len(wrong), 40, 1, 64).to(dtype)
    with where(machine):
        given = (moved(x, machine) for x in (q, k, v))
        _, lse = flash_attn_with_kvcache(*given, causal=True, return_softmax_lse=True)
    seen = lse.cpu()[:, 0]
    assert seen[:, :30].isfinite().all()
    assert not (seen[:, 30:].isfinite() & (k[:, 30, 0].float().isnan().any(1))[:, None]).any()


@pytest.mark.parametrize("rule", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_scales_of_every_head(rule, machine):
    """Any numbers; without them 1. A score is one of descaled keys."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 8, 4, 64, generator=generator).bfloat16()
    k, v = (torch.randn(2, 90, 2, dim, generator=generator).to(FORMATS[0]) for dim in (64, 32))
    scales = {f"{name}_descale": torch.rand(2, 2, generator=generator) * 3 + 0.1 for name in "kv"}
    for given in ({}, scales, {"k_descale": scales["k_descale"]}):
        with where(machine):
            found = flash_attn_with_kvcache(
                *(moved(x, machine) for x in (q, k, v)), **{n: moved(x, machine) for n, x in given.items()},
                **rule, return_softmax_lse=True,
            )  # fmt: skip
        ones = torch.ones(2, 2)
        factors = (given.get(f"{name}_descale", ones)[:, None, :, None] for name in "kv")
        wide = (x.double() * factor for x, factor in zip((k, v), factors, strict=True))
        assert_accurate(*(x.cpu() for x in found), (q, *wide), **rule)


def scheduled(machine: str, **changed):
    """A call that is shared out on the device, and the same one that is not."""
    lengths = torch.tensor([300, 1, 77], dtype=torch.int32)
    q = torch.randn(3, 1, 8, 64).bfloat16()
    k, v = (torch.randn(3, 310, 2, 64).to(FORMATS[1]) for _ in range(2))
    q, k, v, lengths = (moved(x, machine) for x in (q, k, v, lengths))
    asked = {"kv_dtype": k.dtype, "num_splits": 4} | changed
    with where(machine):
        metadata = get_scheduler_metadata(3, 1, 310, 8, 2, 64, lengths, **asked)
        found = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, scheduler_metadata=metadata)
        whole = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=1)
    return metadata, found.cpu().float(), whole.cpu().float()


def test_shared_out_on_the_device(machine):
    metadata, found, whole = scheduled(machine)
    assert (metadata.splits > 1).any() and not torch.equal(found, whole)
    assert (found - whole).abs().max() < 0.02 * whole.abs().max()


def test_another_kernels_schedule_is_refused():
    with pytest.raises(ValueError, match="metadata is for sm80.forward.*allowed: for sm80.widened"):
        scheduled("sm80", kv_dtype=None)
    with pytest.raises(TypeError, match="kv_dtype is torch.int8; allowed: None, torch.bfloat16, torch.fl"):
        scheduled("sm80", kv_dtype=torch.int8)


def test_packed_queries_beside_pages(machine):
    """By either function the same bits, and into `out`."""
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ((0, 5, 9), (40, 61)))
    q = torch.randn(9, 4, 64, dtype=torch.float16)
    k, v = (torch.randn(8, 16, 2, 64).to(FORMATS[0]) for _ in range(2))
    given = {"k_descale": torch.rand(2, 2) + 0.5, "v_descale": torch.rand(2, 2) + 0.5}
    given["block_table"] = torch.randperm(8).reshape(2, 4).int()
    given = {name: moved(x, machine) for name, x in given.items()}
    q, k, v, starts, lengths = (moved(x, machine) for x in (q, k, v, starts, lengths))
    place = torch.full_like(q, torch.nan)
    with where(machine):
        wanted = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, cu_seqlens_q=starts, max_seqlen_q=5, causal=True, num_splits=1,
            **given,
        )  # fmt: skip
        for out in (None, place):
            found = flash_attn_varlen_func(
                q, k, v, starts, None, 5, 64, causal=True, seqused_k=lengths, num_splits=1, out=out, **given
            )
            assert torch.equal(found, wanted) and (out is None or found is out)


Q = torch.randn(2, 3, 4, 64, dtype=torch.float16)
K, V = (torch.randn(2, 30, 2, 64).to(torch.float8_e4m3fn) for _ in range(2))
NEW = torch.randn(2, 1, 2, 64).to(torch.float8_e4m3fn)
SCALE = torch.ones(2, 2)


def call(**changed):
    """A call with changes."""
    with cute_flash.emulated("sm80"):
        return flash_attn_with_kvcache(**{"q": Q, "k_cache": K, "v_cache": V} | changed)


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"k": NEW.half(), "v": NEW, "cache_seqlens": 3}, TypeError, "k has dtype torch.float16; allowed: "),
        ({"k": NEW, "v": NEW}, ValueError, "k is given without cache_seqlens; allowed: with it"),
        (
            {"rotary_cos": Q[0, :, 0], "rotary_sin": Q[0, :, 0]}, NotImplementedError,
            "rotary_cos, rotary_sin are given beside a cache",
        ),
        ({"qv": Q}, NotImplementedError, "qv is given beside a cache of 8 bits; allowed: None"),
        ({"q_descale": SCALE}, TypeError, "q_descale is given, q is of torch.float16; allowed beside"),
        ({"out_dtype": torch.bfloat16}, TypeError, "out_dtype is torch.bfloat16; allowed: None or q's, "),
        ({"quantization_block": 64}, TypeError, "quantization_block is given, q is of torch.float16; all"),
        ({"v_cache": V.to(torch.float8_e5m2)}, TypeError, "v_cache has dtype .*e5m2, k_cache has .*e4m3fn"),
        ({"v_cache": V.half()}, TypeError, "v_cache has dtype torch.float16; allowed: torch.float8_e4m3fn"),
        ({"k_cache": K.half()}, TypeError, "k_cache has dtype torch.float16; allowed: torch.float8_e4m3fn"),
        ({"q": Q.float()}, TypeError, "q has dtype torch.float32; allowed: torch.float16, torch.bfloat16"),
        ({"k_descale": torch.ones(2, 4)}, ValueError, r"k_descale has shape \(2, 4\); allowed: \(2, 2\)"),
        ({"v_descale": SCALE.half()}, TypeError, "v_descale has dtype torch.float16; allowed: torch.float32"),
        ({"v_descale": SCALE * math.nan}, ValueError, "v_descale has nan; allowed: finite numbers above 0"),
        ({"out": torch.empty(2, 3, 4, 64)}, TypeError, "out has dtype torch.float32; allowed: torch.float16"),
        ({"k_cache": K[..., :40], "q": Q[..., :40]}, NotImplementedError, "head_dim 40 is not in 16…256"),
        ({"quantization_block": 64}, TypeError, "quantization_block"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refused(changed, error, words):
    with pytest.raises(error, match=words):
        call(**changed)


def test_results_where_they_are_wanted():
    out = torch.full((2, 3, 4, 64), math.nan, dtype=torch.float16)
    found = call(out=out, out_dtype=torch.float16)
    assert found is out and torch.equal(out, call())
    with pytest.raises(ValueError, match="out overlaps q in memory"):
        call(out=Q)


def test_autocast_is_for_q_alone():
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    assert found.dtype is torch.bfloat16 and torch.equal(found, call(q=Q.bfloat16()))


def test_compiled_without_a_break():
    def function(q, k, v, scale):
        return flash_attn_with_kvcache(q, k, v, k_descale=scale, causal=True)

    with cute_flash.emulated("sm80"):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(Q, K, V, SCALE * 2)
    assert torch.equal(found, call(k_descale=SCALE * 2, causal=True))

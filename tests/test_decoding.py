"""`flash_attn_with_kvcache` against the oracle: caches bit for bit, out and lse by the accuracy rule.

The grid is that of FlashAttention-3's own tests, thinned; sizes are small, and share no factor with tiles.
"""

from __future__ import annotations

import math

import pytest
import torch

import cute_flash
from cute_flash import decoding
from tests.harness import moved, where
from tests.kv_calls import KvCall, KvCase

CAUSAL = {"causal": True}
LENGTHS = (33, 0, 190, 1, 128)
EVERYTHING = {"rows": True, "leftpad": True}
WINDOW = {"window_size": (20, 5), "softcap": 3.0, "learnable_sink": torch.tensor([0.5, -1.0])}
CASES = (
    KvCase("attend", LENGTHS, new=None, queries=(20,) * 5, heads=(2, 2)),
    KvCase("append", LENGTHS, new=4, queries=(20,) * 5, heads=(2, 2), rotary=(32, True), layout="sliced"),
    KvCase(
        "causal", LENGTHS, new=7, queries=(3,) * 5, rotary=(64, False), **EVERYTHING, arguments=CAUSAL
    ),
    KvCase(
        "packed", LENGTHS, new=1, queries=(3, 40, 0, 1, 5), heads=(2, 2), rotary=(32, False), packed=True,
        **EVERYTHING, arguments=CAUSAL,
    ),
    KvCase(
        "decode", (200, 6), new=1, queries=(1, 1), heads=(8, 2), dims=(128, 128), rotary=(64, False),
        arguments=CAUSAL | {"num_splits": 3},
    ),
    KvCase(
        "window", LENGTHS, new=2, queries=(30,) * 5, heads=(2, 2), rotary=(16, True), elsewhere=True,
        **EVERYTHING, arguments=WINDOW,
    ),
    KvCase(
        "pages_16", (200, 6), new=1, queries=(1, 1), heads=(8, 2), dims=(128, 128), rotary=(128, True),
        page=16, arguments=CAUSAL | {"num_splits": 3},
    ),
    KvCase(
        "pages_24", LENGTHS, new=30, queries=(3, 40, 0, 1, 5), rotary=(64, False), page=24, packed=True,
        arguments=CAUSAL,
    ),
    KvCase("pages_7", LENGTHS, new=9, queries=(3, 40, 0, 1, 5), page=7, packed=True, arguments=CAUSAL),
    KvCase(
        "pages_1", (39, 0), new=1, queries=(1, 1), heads=(8, 2), rotary=(32, False), page=1,
        arguments=CAUSAL | {"num_splits": 2},
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_kvcache(case, machine):
    KvCall(case, machine).check()


def test_tokens_one_by_one(machine):
    """Two sequences of 64 keys in the end, in pages: prompts, then a token at a time, are one causal pass."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (moved(torch.randn(2, 64, 2, 64, generator=generator).bfloat16(), machine) for _ in range(3))
    prompts = 40, 33
    table = moved(torch.randperm(10, generator=generator)[:8].view(2, 4).int(), machine)
    k_cache, v_cache = (moved(torch.full((10, 16, 2, 64), math.nan).bfloat16(), machine) for _ in range(2))
    found = torch.zeros_like(q)
    with where(machine):
        for b, prompt in enumerate(prompts):
            each = {"k": k[b : b + 1, :prompt], "v": v[b : b + 1, :prompt], "cache_seqlens": 0}
            found[b, :prompt] = flash(q[b : b + 1, :prompt], k_cache, v_cache, table[b : b + 1], **each)
        lengths = moved(torch.tensor(prompts).int(), machine)
        rows = torch.arange(2)
        while (lengths < 64).any():
            at = lengths.clamp(max=63).long()
            new = {name: x[rows, at][:, None] for name, x in (("q", q), ("k", k), ("v", v))}
            out = flash(new.pop("q"), k_cache, v_cache, table, cache_seqlens=at.int(), **new)
            found[rows, at] = out[:, 0]
            lengths += 1
        whole, _ = cute_flash.flash_attn_func(q, k, v, causal=True, return_lse=True)
    for b in range(2):
        assert torch.equal(k_cache[table[b]].flatten(0, 1), k[b])
        assert torch.equal(v_cache[table[b]].flatten(0, 1), v[b])
    assert torch.allclose(found.float(), whole.float(), atol=2**-7, rtol=2**-7)


def flash(q, k_cache, v_cache, table, **new):
    out, _ = cute_flash.flash_attn_with_kvcache(
        q, k_cache, v_cache, block_table=table, causal=True, return_softmax_lse=True, num_splits=1, **new
    )
    return out


def test_alone_and_among_others(machine, monkeypatch):
    """A sequence's bits, its keys taken in parts, by itself and in a batch; another number of parts tells."""
    monkeypatch.setattr(decoding, "KEYS_OF_A_PART", 64)
    generator = torch.Generator().manual_seed(0)
    q, k_cache, v_cache = (
        moved(torch.randn(3, rows, heads, 128, generator=generator).bfloat16(), machine)
        for rows, heads in ((1, 8), (400, 2), (400, 2))
    )
    lengths = moved(torch.tensor([400, 7, 130]).int(), machine)

    def attend(which: slice, **options):
        given = (q[which], k_cache[which], v_cache[which])
        with where(machine):
            return cute_flash.flash_attn_with_kvcache(
                *given, cache_seqlens=lengths[which], return_softmax_lse=True, **options
            )

    together = attend(slice(3), batch_invariant=True)
    for i in range(3):
        alone = attend(slice(i, i + 1), batch_invariant=True)
        assert all(torch.equal(one[i], other[0]) for one, other in zip(together, alone, strict=True))
    assert not torch.equal(together[0], attend(slice(3), num_splits=3)[0])

"""Numbers at the edges: scores of any size, and what is not a number."""

from __future__ import annotations

import math

import pytest
import torch

import cute_flash
from tests.cases import halved_in_the_past
from tests.harness import where
from tests.reference import attention

KEYS, DIM = 140, 64
# Powers of two that scores are near, and what the keys have of it, by dtype: as far as q·k stays finite.
REACH = {torch.float16: ((4, 26), 14), torch.bfloat16: ((4, 123), 63)}


def sizes(dtype: torch.dtype) -> torch.Tensor:
    """Positive and negative powers of two that scores can be near, in any order."""
    low, high = REACH[dtype][0]
    powers = 2.0 ** torch.arange(low, high + 1, (high - low) // 20).float()
    return torch.cat([powers, -powers])[torch.randperm(2 * len(powers), generator=torch.Generator())]


def near(base: torch.Tensor, dtype: torch.dtype):
    """(q, k, v, alone): row r's scores are base[r] + a small part, exact in fp32; `alone` is q without base.

    The small part, up to 2**20, is a multiple of 1/8; beyond there is none, and all keys are equal.
    """
    generator = torch.Generator().manual_seed(2)
    q, k = torch.zeros(1, len(base), 1, DIM), torch.zeros(1, KEYS, 1, DIM)
    in_keys = 2.0 ** REACH[dtype][1]
    q[..., 0], k[..., 0] = (base * 8 / in_keys)[:, None], in_keys  # 8 is what the scale takes
    q[0, base.abs() <= 2.0**20, :, 1] = 8.0
    k[0, :, 0, 1] = torch.randint(-24, 25, (KEYS,), generator=generator) / 8
    v, alone = torch.randn(1, KEYS, 1, DIM, generator=generator), q.clone()
    alone[..., 0] = 0.0
    return tuple(x.to(dtype) for x in (q, k, v, alone))


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float16, {}),
        (torch.float16, {"num_splits": 2}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"score": halved_in_the_past}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_scores_of_any_size(dtype, options, machine):
    """Positive and negative powers of two, all sizes in a warp; as accurate as without them.

    Parts of the keys are weighed by log-sum-exps in float32, which tell them apart to 2**12 as well.
    """
    base = sizes(dtype)
    q, k, v, alone = near(base, dtype)
    rules = {name: value for name, value in options.items() if name == "score"}
    exact, small = attention(q, k, v, **rules), attention(alone, k, v, **rules)
    peer = attention(alone, k, v, compute=dtype, **rules)[0]
    with where(machine):
        out, lse = cute_flash.flash_attn_func(q, k, v, return_lse=True, **options)
    assert out.isfinite().all() and lse.isfinite().all()
    if "num_splits" in options:
        told = base.abs() <= 2.0**12
        out, lse, exact = out[:, told], lse[..., told], (exact[0][:, told], exact[1][..., told])
    allowed = 2 * (peer - small[0]).abs().max() + torch.finfo(dtype).eps / 2 * exact[0].abs().max()
    assert (out - exact[0]).abs().max() <= allowed
    assert ((lse - exact[1]).abs() <= 2e-5 + 3e-7 * exact[1].abs()).all()


def test_a_row_has_the_same_bits_beside_large_ones(machine):
    base = sizes(torch.float16)
    q, k, v, _ = near(base, torch.float16)
    with where(machine):
        among = cute_flash.flash_attn_func(q, k, v, return_lse=True)
        for few in (base.abs() <= 2**8, base.abs() > 2**16):
            out, lse = cute_flash.flash_attn_func(q[:, few], k, v, return_lse=True)
            assert torch.equal(out, among[0][:, few]) and torch.equal(lse, among[1][..., few])


def test_what_is_not_a_number_stays_where_it_is(machine):
    """In a query, a sequence, a key beyond those used: in nobody else's result, and never lost."""
    torch.manual_seed(4)
    q, k, v = torch.randn(3, 250, 2, DIM).bfloat16()
    starts, used = torch.tensor([0, 50, 90, 250]).int(), torch.tensor([50, 40, 33]).int()
    arguments = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "seqused_k": used, "return_lse": True}
    with where(machine):
        clean = cute_flash.flash_attn_varlen_func(q, k, v, max_seqlen_q=160, max_seqlen_k=160, **arguments)
        for x in (q, k, v):
            x[50:90] = math.nan
        k[90 + 33 :], v[90 + 33 :] = math.nan, math.inf
        q[7] = math.nan
        out, lse = cute_flash.flash_attn_varlen_func(q, k, v, max_seqlen_q=160, max_seqlen_k=160, **arguments)
    touched = torch.zeros(250, dtype=torch.bool)
    touched[[7, *range(50, 90)]] = True
    assert out[touched].isnan().all() and lse[:, touched].isnan().all()
    assert torch.equal(out[~touched], clean[0][~touched])
    assert torch.equal(lse[:, ~touched], clean[1][:, ~touched])

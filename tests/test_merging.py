"""Merging partial results: against the mean in float64, and against attention that was never split."""

from __future__ import annotations

import math

import pytest
import torch

import cute_flash
from cute_flash import flash_attn_combine, launch, merge_states
from tests.accuracy import half_a_unit, hold
from tests.harness import Poisoned, moved, where


def merged(out, lse, dtype):
    """(out, lse) of parts along dimension 0, in `dtype`; natural logarithms."""
    out, lse = out.to(dtype), lse.to(dtype)
    total = lse.logsumexp(0)
    weights = (lse - total.nan_to_num(neginf=0.0)).exp()
    return (weights[..., None] * out.masked_fill(lse.isneginf()[..., None], 0.0)).sum(0), total


def parts(*shape: int, dtype=torch.float32, seed: int = 0):
    """Fresh (out, lse) of parts; those that saw no key have NaN; so do all of the first row."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator).to(dtype)
    lse = 3 * torch.randn(shape[:-1], generator=generator)
    empty = torch.rand(shape[:-1], generator=generator) < 0.3
    empty.flatten(1)[:, 0] = True
    lse[empty], out[empty] = -math.inf, math.nan
    return out, lse


@pytest.mark.parametrize(
    "shape, dtype, out_dtype",
    [
        ((3, 2, 5, 3, 64), torch.float32, None),
        ((40, 7, 2, 72), torch.float32, torch.bfloat16),
        ((1, 1, 9, 1, 8), torch.float16, None),
        ((2, 9, 2, 256), torch.bfloat16, torch.float32),
    ],
    ids=["float32", "packed_bfloat16", "float16", "bfloat16_float32"],
)
def test_combine(shape, dtype, out_dtype, machine):
    out, lse = parts(*shape, dtype=dtype)
    given = Poisoned.holding(out, "interleaved", machine)
    with where(machine, races=True):
        found = flash_attn_combine(given.view, moved(lse, machine), out_dtype=out_dtype)
    assert found[0].dtype == (out_dtype or dtype) and found[0].shape == shape[1:]
    check(found, out, lse)


def check(found, out, lse):
    """Twice torch's error in float32, and the result's rounding."""
    exact, peer = merged(out, lse, torch.float64), merged(out, lse, torch.float32)
    dtype = found[0].dtype
    rounding = half_a_unit(dtype, exact[0]) if dtype != torch.float32 else 0.0
    hold("out", found[0].cpu(), exact[0], peer[0], rounding + 1e-6)
    hold("lse", found[1].cpu(), exact[1], peer[1], 2e-6)


@pytest.mark.parametrize("base", ["e", 2])
def test_states(base, machine):
    out, lse = parts(4, 6, 3, 64, dtype=torch.float16)
    v, s = out.transpose(0, 1).contiguous(), lse.transpose(0, 1) * (1 if base == "e" else math.log2(math.e))
    with where(machine):
        found, s_found = merge_states(moved(v, machine), moved(s, machine), base=base)
    assert found.dtype == torch.float16 and s_found.shape == (6, 3)
    check((found, s_found * (1 if base == "e" else math.log(2))), out, lse)


def test_parts_of_keys_are_attention_to_all(arch):
    """What `flash_attn_func` gives for parts of the keys, stacked, is read where it lies."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=generator).bfloat16() for n in (9, 50, 50))
    with where(arch):
        each = [
            cute_flash.flash_attn_func(q, k[:, keys], v[:, keys], return_lse=True)
            for keys in (slice(13), slice(13, 40), slice(40, 50))
        ]
        out, lse = (torch.stack(results) for results in zip(*each, strict=True))
        found, total = flash_attn_combine(out, lse.transpose(2, 3))
        whole, lse_whole = cute_flash.flash_attn_func(q, k, v, return_lse=True)
    assert torch.allclose(found.float(), whole.float(), atol=2**-7)
    assert torch.allclose(total.transpose(1, 2), lse_whole, atol=1e-5)


def test_into_out(arch):
    out, lse = parts(3, 2, 5, 3, 64)
    target = Poisoned.holding(torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16), "heads_first", arch)
    with where(arch):
        version = target.view._version
        found = flash_attn_combine(out, lse, target.view, return_lse=False)
        assert found is target.view and found._version > version
        again = flash_attn_combine(out, lse, out_dtype=torch.bfloat16, return_lse=False)
    target.assert_surroundings_untouched()
    assert torch.equal(found, again)


@pytest.fixture
def launched(monkeypatch):
    """Every launch is a failure."""

    def refuse(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "executable", lambda *_: refuse)
    with cute_flash.emulated("sm80"):
        yield


PARTS, LSES = torch.zeros(3, 2, 5, 3, 64), torch.zeros(3, 2, 5, 3)
OUT = torch.zeros(2, 5, 3, 64)
WRONG = {
    "tensor": ({"out_partial": 3}, TypeError, "out_partial is int; allowed: torch.Tensor"),
    "dtype": ({"out_partial": PARTS.double()}, TypeError, "out_partial has dtype torch.float64; allowed: "),
    "lse_dtype": ({"lse_partial": LSES.half()}, TypeError, "lse_partial has dtype torch.float16; allowed: "),
    "rank": ({"out_partial": PARTS[0, 0]}, ValueError, r"shape \(5, 3, 64\); allowed: 4 or 5 dimensions"),
    "lse": ({"lse_partial": LSES.mT}, ValueError, r"shape \(3, 2, 3, 5\); allowed: \(3, 2, 5, 3\), that of"),
    "none": ({"out_partial": PARTS[:0], "lse_partial": LSES[:0]}, ValueError, "allowed: one part or more"),
    "out": ({"out": OUT[0]}, ValueError, r"out has shape \(5, 3, 64\); allowed: \(2, 5, 3, 64\)"),
    "out_dtype": ({"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64; allowed: torch.fl"),
    "both": ({"out": OUT, "out_dtype": torch.half}, TypeError, "out has dtype torch.float32, out_dtype is"),
    "overlap": ({"out": PARTS[1]}, ValueError, "out overlaps out_partial in memory"),
    "itself": ({"out": OUT[:1].expand(2, 5, 3, 64)}, ValueError, "several elements in one place"),
    "strides": ({"out_partial": PARTS.mT.contiguous().mT}, ValueError, "out_partial has strides"),
    "head_dim": (
        {"out_partial": PARTS[..., :4].contiguous()}, NotImplementedError, "head_dim_v 4 is not in 8…576",
    ),
    "gradient": ({"out_partial": PARTS.clone().requires_grad_()}, NotImplementedError, "merging has not"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, launched):
    changed, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        flash_attn_combine(**{"out_partial": PARTS, "lse_partial": LSES} | changed)


def test_wrong_base(launched):
    with pytest.raises(ValueError, match="base is 10; allowed: 'e', 2"):
        merge_states(PARTS[0], LSES[0], base=10)


def test_operators(arch):
    """What torch asks of an operator, and a traced call."""
    lse = LSES.transpose(2, 3).contiguous()
    compiled = torch.compile(flash_attn_combine, fullgraph=True, backend="aot_eager")
    with where(arch):
        given = PARTS, lse, "float32", True
        torch.library.opcheck(torch.ops.cute_flash.merge.default, (*given, True))
        torch.library.opcheck(torch.ops.cute_flash.merge_out.default, (OUT, *given, False))
        out, lse = parts(3, 2, 5, 3, 64)
        for one, other in zip(compiled(out, lse), flash_attn_combine(out, lse), strict=True):
            assert torch.equal(one, other)

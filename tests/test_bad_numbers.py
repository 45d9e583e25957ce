"""Numbers in a call: what does not fit a kernel is refused by name, what does means what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch

import cute_flash
from cute_flash import BlockMask, Softcap, create_block_mask, launch
from cute_flash.arch.expression import LARGEST_POSITION
from cute_flash.arch.problem import Operands
from cute_flash.masks import Causal, Mask
from cute_flash.scores import Score
from tests.harness import where
from tests.refused import dense, no_launch, packed, tensor  # noqa: F401


@dataclass(frozen=True)
class Every(Mask):
    """A user's mask with an int."""

    step: Any

    def visible(self, q, k):
        return (q - k) * self.step >= 0


@dataclass(frozen=True)
class Times(Score):
    """A user's score with a float."""

    factor: Any

    def score(self, s, batch, head, q, k):
        return s * self.factor


BEYOND = LARGEST_POSITION  # rows of a sequence: one too many
HELD = "1.18e-38 to 1.7e.38, what float32 holds"


def rows(heads: int, seqlen: int) -> torch.Tensor:
    """Long sequences in little memory."""
    return tensor(2, 1, heads, 64).expand(2, seqlen, heads, 64)


# name -> (arguments, exception, what its text says)
DENSE = {
    "scale_nan": ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan; allowed: a finite number"),
    "scale_inf": ({"softmax_scale": math.inf}, ValueError, "softmax_scale is inf; allowed: a finite number"),
    "scale_zero": ({"softmax_scale": 0.0}, ValueError, "softmax_scale is 0.0; .* above 0"),
    "scale_negative": ({"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0; .* above 0"),
    "scale_text": ({"softmax_scale": "1"}, TypeError, r"softmax_scale is '1' \(str\); allowed: a number"),
    "splits_float": ({"num_splits": 2.0}, TypeError, r"num_splits is 2.0 \(float\); allowed: an int"),
    "splits_bool": ({"num_splits": True}, TypeError, r"num_splits is True \(bool\); allowed: an int"),
    "splits_negative": ({"num_splits": -1}, ValueError, "num_splits is -1; allowed: 1 to 128, or 0 or None"),
    "splits_many": ({"num_splits": 129}, ValueError, "num_splits is 129; allowed: 1 to 128"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap is -1.0; .* from 0.0 on"),
    "softcap_nan": ({"softcap": math.nan}, ValueError, "softcap is nan"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; allowed: 0 <= dropout_p"),
    "dropout_almost_one": ({"dropout_p": 1 - 2.0**-18}, ValueError, "dropout_p is 0.99999.*; allowed"),
    "dropout_negative": (
        {"dropout_p": -0.1},
        ValueError,
        "dropout_p is -0.1; allowed: a finite number from 0",
    ),
    "dropout_nan": ({"dropout_p": math.nan}, ValueError, "dropout_p is nan"),
    "window_negative": (
        {"window_size": (-2, 0)},
        ValueError,
        r"window_size is \(-2, 0\); allowed: 0 or more",
    ),
    "window_float": ({"window_size": (1.5, 0)}, TypeError, r"window_size is \(1.5, 0\); allowed: ints"),
    "window_single": ({"window_size": 5}, TypeError, r"window_size is 5; allowed: \(left, right\)"),
    "window_text": ({"window_size": ("1", 0)}, TypeError, r"window_size is \('1', 0\); allowed: ints"),
    "window_bool": ({"window_size": (True, 0)}, TypeError, r"window_size is \(True, 0\); allowed: ints"),
    "scale_large": ({"softmax_scale": 2e38}, ValueError, f"softmax_scale is 2e.38; allowed: {HELD}"),
    "scale_small": ({"softmax_scale": 1e-39}, ValueError, f"softmax_scale is 1e-39; allowed: {HELD}"),
    "scale_long": ({"softmax_scale": 10**400}, ValueError, f"softmax_scale is 10*; allowed: {HELD}"),
    "softcap_large": ({"softcap": 1e300}, ValueError, f"softcap is 1e.300; allowed: {HELD}"),
    "softcap_small": ({"softcap": 2.0**-127}, ValueError, f"softcap is 5.8.*e-39; allowed: {HELD}"),
    "softcap_long": ({"softcap": 10**400}, ValueError, f"softcap is 10*; allowed: {HELD}"),
    "dropout_long": ({"dropout_p": 10**400}, ValueError, "dropout_p is 10*; allowed: 0 <= dropout_p"),
    "score_float_large": ({"score": Softcap(4e38)}, ValueError, r"Softcap.cap is 4e.38; .* float32 holds"),
    "score_float_small": ({"score": Times(-1e-40)}, ValueError, "Times.factor is -1e-40; .* float32 holds"),
    "mask_int": (
        {"mask": Causal() & Every(2**31)},
        ValueError,
        "Every.step is 2147483648; allowed: -2147483648 to 2147483647, what int32 holds",
    ),
    "mask_int_negative": ({"mask": Every(-(2**31) - 1)}, ValueError, "Every.step is -2147483649; allowed"),
    "seqlen_q": ({"q": rows(4, BEYOND)}, ValueError, "q's seqlen is 1072693248; .* at most 1072693247"),
    "seqlen_k": (
        {"k": rows(2, 2**31), "v": rows(2, 2**31)},
        ValueError,
        "k's seqlen is 2147483648; .* at most 1072693247",
    ),
}

PACKED = {
    "max_negative": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1; allowed: 0 or more"),
    "max_float": ({"max_seqlen_q": 6.0}, TypeError, r"max_seqlen_q is 6.0 \(float\); allowed: an int"),
    "max_large": ({"max_seqlen_k": 2**31}, ValueError, "max_seqlen_k is 2147483648; .* at most 1072693247"),
    "max_beyond": ({"max_seqlen_q": BEYOND}, ValueError, "max_seqlen_q is 1072693248; .* at most 1072693247"),
    "max_bool": ({"max_seqlen_q": True}, TypeError, r"max_seqlen_q is True \(bool\); allowed: an int"),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(no_launch, name):  # noqa: F811
    changed, error, text = DENSE[name]
    with pytest.raises(error, match=text):
        dense(**changed)


@pytest.mark.parametrize("name", PACKED)
def test_packed(no_launch, name):  # noqa: F811
    changed, error, text = PACKED[name]
    with pytest.raises(error, match=text):
        packed(**changed)


def test_the_longest_sequence_is_taken(operands):
    longest = BEYOND - 1
    packed(max_seqlen_q=longest, num_splits=1)
    packed(max_seqlen_k=longest, num_splits=1)
    dense(k=rows(2, longest), v=rows(2, longest), num_splits=1)
    assert [given.max_seqlen_q for given in operands] == [longest, 6, None]


@pytest.fixture
def operands(monkeypatch):
    """Operands of every launch, which are not made."""
    seen = []
    monkeypatch.setattr(launch, "executable", lambda *key: lambda *given: seen.append(Operands(*given)))
    with cute_flash.emulated("sm80"):
        yield seen


@pytest.mark.parametrize(
    "window, bounds",
    [
        ((5, 2**31 - 1), (5, 8)),
        ((2**31, 0), (16, 0)),
        ((2**70, 2**30 + 1), (16, 8)),
        ((None, 2**32), (8,)),
        ((2**29, 3), (2**29, 3)),
        ((numpy.int64(2**40), numpy.int8(1)), (16, 1)),
        ([numpy.uint8(200), -1], (200,)),
    ],
)
def test_a_bound_that_would_leave_int32_is_clamped_to_the_call(operands, window, bounds):
    """8 queries and 16 keys: no key is further before a query than 16, none further behind than 8."""
    dense(window_size=window)
    packed(window_size=window)
    assert operands[0].mask_values == bounds
    assert operands[1].mask_values == tuple({16: 20, 8: 10}.get(bound, bound) for bound in bounds)
    assert all(type(bound) is int for given in operands for bound in given.mask_values)


@pytest.mark.parametrize("bound", [2**31 - 1, 2**31 - 20, 2**40])
def test_a_window_as_wide_as_int32_hides_nothing(bound, machine):
    place = "cuda" if machine == "cuda" else "cpu"
    q, k, v = torch.randn(3, 1, 33, 1, 64).half().to(place)
    with where(machine):
        expected = cute_flash.flash_attn_func(q, k, v, window_size=(40, 40))
        assert torch.equal(cute_flash.flash_attn_func(q, k, v, window_size=(bound, bound)), expected)


def test_numbers_of_numpy_are_numbers(operands):
    packed(max_seqlen_q=numpy.int32(6), max_seqlen_k=numpy.uint64(15), softmax_scale=numpy.float16(0.5))
    dense(num_splits=numpy.int16(1), dropout_p=numpy.float32(0.25), softcap=numpy.float64(2.0))
    first, second = operands
    assert (first.max_seqlen_q, first.softmax_scale) == (6, 0.5)
    assert type(first.max_seqlen_q) is int and type(first.softmax_scale) is float
    assert second.keep_threshold == 49152 and second.score_values == (2.0,)


def test_numbers_of_numpy_describe_a_block_mask():
    ints = [numpy.int64(n) for n in (2, 4, 300, 200)]
    made = create_block_mask(Causal(), *ints, block_size=(numpy.int32(64), 128))
    plain = create_block_mask(Causal(), 2, 4, 300, 200, block_size=(64, 128))
    visit = torch.ones(2, 3, dtype=torch.bool)
    seqlens = numpy.int64(100), numpy.int64(150)
    taken = BlockMask.from_blocks(visit, block_size=numpy.int8(64), seqlens=seqlens)
    same = BlockMask.from_blocks(visit, block_size=64, seqlens=(100, 150))
    for mask, other in ((made, plain), (taken, same)):
        assert (mask.block_size, mask.seqlens) == (other.block_size, other.seqlens)
        assert all(type(n) is int for n in (*mask.block_size, *mask.seqlens))
        assert torch.equal(mask.counts, other.counts) and torch.equal(mask.indices, other.indices)

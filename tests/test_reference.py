"""The oracle, held to torch's own attention, to published Philox vectors and to cases worked by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cute_flash
from cute_flash.arch.common.mask import Causal, Document, PrefixLM, SlidingWindow
from cute_flash.arch.common.score import ALiBi, Chain, Score, Softcap
from tests.accuracy import GRADIENTS, assert_accurate, assert_gradients_accurate, hold
from tests.cases import CASES, hides_rows
from tests.harness import Call
from tests.reference import Dropout, attention, gradients, keep_mask, philox

INF = math.inf


def random_tensors(seqlen_q=5, seqlen_k=7, heads=4, heads_kv=2, dim=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = (seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv)
    return tuple(torch.randn(batch, *size, dim, generator=generator, dtype=torch.float64) for size in sizes)


def sdpa(q, k, v, **arguments):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments).transpose(1, 2)


def scored(*scores: float):
    """q, k, v of one head of dim 1 whose scaled scores are `scores`; v of key i is 10**i."""
    k = torch.tensor(scores, dtype=torch.float64).view(1, -1, 1, 1)
    v = 10.0 ** torch.arange(len(scores), dtype=torch.float64).view(1, -1, 1, 1)
    return torch.ones(1, 1, 1, 1, dtype=torch.float64), k, v


def one_number(*tensors, **call) -> tuple[float, float]:
    """(out, lse) of a call that has one query, one head and dim 1."""
    out, lse = attention(*tensors, softmax_scale=1.0, **call)
    return out.item(), lse.item()


# torch's own attention


def test_plain_equals_sdpa():
    tensors = random_tensors()
    torch.testing.assert_close(attention(*tensors)[0], sdpa(*tensors))


def test_softmax_scale_equals_sdpa():
    tensors = random_tensors()
    torch.testing.assert_close(attention(*tensors, softmax_scale=0.3)[0], sdpa(*tensors, scale=0.3))


def test_causal_equals_sdpa():
    tensors = random_tensors(6, 6)
    torch.testing.assert_close(attention(*tensors, causal=True)[0], sdpa(*tensors, is_causal=True))


def test_bias_equals_sdpa():
    tensors, slopes = random_tensors(), torch.tensor([[0.5, 1.0, 2.0, 4.0], [0.1, 0.2, 0.3, 0.4]])
    distance = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs()
    bias = -slopes.double()[:, :, None, None] * distance
    torch.testing.assert_close(attention(*tensors, alibi_slopes=slopes)[0], sdpa(*tensors, attn_mask=bias))


def test_lse_equals_logsumexp():
    q, k, v = random_tensors(heads_kv=4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    torch.testing.assert_close(attention(q, k, v)[1], scores.logsumexp(-1))


# worked by hand


def test_two_keys():
    out, lse = one_number(*scored(0.0, math.log(3)))
    assert out == pytest.approx(1 / 4 * 1 + 3 / 4 * 10)
    assert lse == pytest.approx(math.log(4))


def test_sink_takes_its_share_of_the_denominator_only():
    out, lse = one_number(*scored(0.0), learnable_sink=torch.tensor([math.log(3)]))
    assert out == pytest.approx(1 / 4)
    assert lse == pytest.approx(math.log(4))


def test_row_without_keys():
    q, k, v = scored(0.0)
    assert one_number(q, k, v, mask=SlidingWindow(None, -1)) == (0.0, -INF)
    assert one_number(q, k[:, :0], v[:, :0]) == (0.0, -INF)
    assert one_number(q, k[:, :0], v[:, :0], learnable_sink=torch.tensor([0.5])) == (0.0, 0.5)


def test_softcap():
    out, _ = one_number(*scored(0.0, 100.0), softcap=math.log(3))
    assert out == pytest.approx(1 / 4 * 1 + 3 / 4 * 10)


def test_order_softcap_alibi_rule_mask():
    @dataclass(frozen=True)
    class Double(Score):
        def score(self, s, batch, head, q, k):
            return 2 * s

    # One query at position 1: key 0 is one away. (min(100, cap 2) - 1) * 2 = 2, key 1: 2 * 2 = 4.
    tensors = scored(100.0, 100.0)
    _, lse = one_number(*tensors, softcap=2.0, alibi_slopes=torch.ones(1), score=Double())
    assert lse == pytest.approx(math.log(math.exp(2) + math.exp(4)))


def visible(seqlen_q, seqlen_k, **call):
    """Which keys each query of one head attends to, read off the output for one-hot values."""
    q = torch.zeros(1, seqlen_q, 1, 1, dtype=torch.float64)
    k = torch.zeros(1, seqlen_k, 1, 1, dtype=torch.float64)
    out, _ = attention(q, k, torch.eye(seqlen_k, dtype=torch.float64)[None, :, None], **call)
    return [[key for key in range(seqlen_k) if row[key] > 0] for row in out[0, :, 0]]


@pytest.mark.parametrize(
    "call, seqlen_q, seqlen_k, expected",
    [
        ({"causal": True}, 2, 4, [[0, 1, 2], [0, 1, 2, 3]]),
        ({"causal": True}, 3, 1, [[], [], [0]]),
        ({"window_size": (1, 0)}, 3, 3, [[0], [0, 1], [1, 2]]),
        ({"window_size": (1, -1)}, 2, 4, [[1, 2, 3], [2, 3]]),
        ({"window_size": (None, 1)}, 2, 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"window_size": (0, 0)}, 4, 2, [[], [], [0], [1]]),
        ({"causal": True, "window_size": (1, 5)}, 3, 3, [[0], [0, 1], [1, 2]]),
        ({"mask": PrefixLM(2)}, 3, 3, [[0, 1], [0, 1], [0, 1, 2]]),
        ({"mask": PrefixLM(torch.tensor([3]))}, 3, 3, [[0, 1, 2]] * 3),
        ({"mask": Document(torch.tensor([[0, 0, 1, 1]]))}, 4, 4, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ({"mask": Document(torch.tensor([[0, 0, 1, 1]])) & Causal()}, 2, 4, [[2], [2, 3]]),
        ({"mask": Causal() | SlidingWindow(0, 1)}, 3, 3, [[0, 1], [0, 1, 2], [0, 1, 2]]),
        ({"seqused_k": torch.tensor([2])}, 1, 3, [[0, 1]]),
        ({"seqused_k": torch.tensor([3]), "causal": True}, 2, 4, [[0, 1], [0, 1, 2]]),
        ({"seqused_q": torch.tensor([1])}, 2, 2, [[0, 1], []]),
        ({"seqused_q": torch.tensor([1]), "causal": True}, 2, 2, [[0, 1], []]),
    ],
)
def test_visible(call, seqlen_q, seqlen_k, expected):
    assert visible(seqlen_q, seqlen_k, **call) == expected


def test_rules_equal_arguments():
    tensors, slopes = random_tensors(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    by_argument = attention(*tensors, softcap=3.0, alibi_slopes=slopes, causal=True)
    by_rule = attention(*tensors, score=Chain((Softcap(3.0), ALiBi(slopes))), mask=Causal())
    torch.testing.assert_close(by_rule, by_argument)


def test_packed_sequences_equal_dense_ones():
    q, k, v = random_tensors()
    dense_out, dense_lse = attention(q, k, v, causal=True)
    cu_q, cu_k = torch.tensor([0, 5, 5, 10]), torch.tensor([0, 7, 7, 14])
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)
    torch.testing.assert_close(out, dense_out.flatten(0, 1))
    torch.testing.assert_close(lse, dense_lse.transpose(0, 1).flatten(1))


# dropout


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The three lines `philox4x32 7` of Random123's tests/kat_vectors (D. E. Shaw Research)."""
    words = philox([torch.tensor(word) for word in counter], tuple(key))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_keep_mask_element_by_element():
    """The assignment of random numbers to elements, spelled out for single elements with Python integers."""
    dropout = Dropout(0.5, seed=0x0123456789ABCDEF, offset=0x300000005)
    keep = keep_mask(dropout, batch_head=6, rows=9, keys=80)
    for row, k in [(0, 0), (1, 1), (2, 2), (3, 7), (4, 8), (5, 25), (6, 31), (7, 32), (8, 79)]:
        lane, block, pair = (k % 8) // 2, k // 32, (k % 32) // 8
        counter = [torch.tensor(word) for word in (block * 4 + lane, row, 6, 5)]
        words = philox(counter, (0x89ABCDEF, 0x01234567 ^ 3))
        numbers = [half for word in words for half in (word.item() & 0xFFFF, word.item() >> 16)]
        assert keep[row, k] == (numbers[pair * 2 + k % 2] < 32768), (row, k)


def test_keep_mask_uses_every_number_once():
    """Elements of one row are decided by different numbers: all 64 * 8 of them are about evenly spread."""
    kept = [keep_mask(Dropout(p, 1, 0), 0, 64, 512).double().mean().item() for p in (0.1, 0.5, 0.9)]
    assert kept == pytest.approx([0.9, 0.5, 0.1], abs=0.01)
    a, b = (keep_mask(Dropout(0.5, 1, 0), head, 64, 512).double() - 0.5 for head in (0, 1))
    shifts = [a * b] + [a * a.roll(n, 1) for n in (1, 2, 8, 32)] + [a * a.roll(1, 0)]
    assert all(product.mean().abs() < 4 * 0.25 / math.sqrt(64 * 512) for product in shifts)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_expectation(p):
    q = k = torch.zeros(1, 64, 4, 8, dtype=torch.float64)
    out, lse = attention(q, k, torch.ones_like(k), dropout=Dropout(p, seed=3, offset=4))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64)))


# gradients


def test_gradients_equal_sdpa():
    tensors, dout = random_tensors(6, 6), random_tensors(6)[0]
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(sdpa(*leaves, is_causal=True), leaves, dout)
    found = gradients(tensors, dout, torch.zeros(2, 4, 6), causal=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "call",
    [
        {"learnable_sink": torch.tensor([0.5, -1.0, 0.0, 2.0]), "causal": True},
        {"softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 1.0, 2.0, 4.0])},
        {"score": hides_rows, "window_size": (1, 1)},
        {"dropout": Dropout(0.4, seed=1, offset=2), "learnable_sink": torch.zeros(4)},
    ],
    ids=lambda call: "-".join(call),
)
def test_gradients_equal_differences(call):
    """A small step changes what they say; of 8 queries, 5 come before any of the 3 keys."""
    generator = torch.Generator().manual_seed(1)
    tensors = random_tensors(8, 3)
    given = [*tensors, *(x.double() for x in [call.pop("learnable_sink", None)] if x is not None)]
    step, dout, dlse = ([torch.randn(x.shape, generator=generator).double() for x in xs]
                        for xs in (given, given[:1], [torch.empty(2, 4, 8)]))

    def loss(sign):
        q, k, v, *sink = (x + sign * 1e-5 * towards for x, towards in zip(given, step, strict=True))
        out, lse = attention(q, k, v, learnable_sink=sink[0] if sink else None, **call)
        return (out * dout[0]).sum() + (lse * dlse[0]).masked_fill(lse.isneginf(), 0.0).sum()

    sink = given[3] if len(given) > 3 else None
    found = gradients(tensors, dout[0], dlse[0], learnable_sink=sink, **call)
    slope = sum((gradient * towards).sum() for gradient, towards in zip(found, step, strict=True))
    torch.testing.assert_close(slope, (loss(1) - loss(-1)) / 2e-5)


def test_gradients_of_special_rows():
    """0 for queries without keys, keys that no query sees, and rows past a used length."""
    tensors, dout, dlse = random_tensors(8, 3), random_tensors(8)[0], torch.ones(2, 4, 8)
    dq, dk, dv = gradients(tensors, dout, dlse, causal=True)
    assert not dq[:, :5].any() and all(x[:, key].any() for x in (dk, dv) for key in range(3))
    dq, dk, dv = gradients(tensors, dout, dlse, mask=SlidingWindow(None, -1))
    assert not dk[:, 2].any() and not dv[:, 2].any() and dv[:, 1].any()
    dout[0, 6:], dlse[0, :, 6:] = math.nan, math.nan
    used = {"seqused_q": torch.tensor([6, 8]), "seqused_k": torch.tensor([2, 3])}
    dq, dk, dv = gradients(tensors, dout, dlse, **used)
    assert dq[0, 5].all() and not dq[0, 6:].any() and dq[1, 6:].all()
    assert dk[0, 1].all() and not dk[0, 2:].any() and not dv[0, 2:].any()


def test_gradients_of_a_sink_alone():
    """Without keys out is 0 and lse the sink: its gradient is what comes through lse."""
    q, k, v = random_tensors(5, 0)
    dlse = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    *others, dsink = gradients((q, k, v), q, dlse, learnable_sink=torch.zeros(4))
    assert not any(x.any() for x in others)
    torch.testing.assert_close(dsink, dlse.sum((0, 2)))


# the accuracy rule can fail


def test_accuracy_rule():
    tensors = tuple(x.bfloat16() for x in random_tensors(seqlen_q=64, seqlen_k=64, dim=64))
    out, lse = attention(*tensors)
    assert_accurate(out.bfloat16(), lse.float(), tensors)
    wrong = out.bfloat16()
    wrong[1, 3, 2, 5] += 0.05
    with pytest.raises(AssertionError, match="out: error"):
        assert_accurate(wrong, lse.float(), tensors)
    with pytest.raises(AssertionError, match="lse: error"):
        assert_accurate(out.bfloat16(), lse.float() + 1e-4, tensors)


def test_accuracy_rule_of_gradients():
    """The rule holds for gradients computed in float32, and does not with one number wrong."""
    call = Call.make(CASES["sink_without_keys"])
    told, (dout, dlse), tensors = call.told("sm80"), call.cotangents(), tuple(call.tensors.values())
    right = gradients(tensors, dout, dlse, compute=torch.float32, **told)
    right = [*(x.bfloat16() for x in right[:3]), right[3]]
    assert_gradients_accurate(right, tensors, dout, dlse, **told)
    for i, name in enumerate(GRADIENTS):
        wrong = [x.clone() for x in right]
        wrong[i].flatten()[-1] += wrong[i].abs().max() / 8
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_gradients_accurate(wrong, tensors, dout, dlse, **told)


@pytest.mark.parametrize("name", ["used_qk_causal", "sink", "layout_sliced"])
def test_harness_takes_gradients(name, monkeypatch):
    """Of a function in plain torch that stands in for ours; a scale that is 5 % off is noticed."""
    function = "flash_attn_varlen_func" if CASES[name].varlen else "flash_attn_func"

    means_nothing_here = {
        "dropout_p", "return_lse", "num_splits", "max_seqlen_q", "max_seqlen_k", "deterministic"
    }  # fmt: skip

    def stand_in(*tensors, error=0.0, **call):
        for name in means_nothing_here & call.keys():
            del call[name]
        out, lse = attention(*tensors, compute=torch.float32, softmax_scale=(1 + error) / 8, **call)
        return out.to(tensors[0].dtype), lse

    monkeypatch.setattr(cute_flash, function, stand_in)
    Call.make(CASES[name]).check_gradients("sm80")
    monkeypatch.setattr(cute_flash, function, partial(stand_in, error=0.05))
    with pytest.raises(AssertionError, match="dq: error"):
        Call.make(CASES[name]).check_gradients("sm80")


@pytest.mark.parametrize("ours, exact, peer", [(math.nan, 1.0, 1.0), (INF, -INF, -INF), (1.0, 1.0, math.nan)])
def test_hold_refuses_what_proves_nothing(ours, exact, peer):
    with pytest.raises(AssertionError):
        hold("x", torch.tensor([ours]), torch.tensor([exact]), torch.tensor([peer]), 1.0)

"""A call like an earlier one goes past checks, plan and dispatcher, and comes to the same operands.

The kernel is replaced by one that notes its operands. Calls are those of test_torch_compile.py.
"""

from __future__ import annotations

import gc
import re
import sys
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import cute_flash
from cute_flash import ALiBi, Causal, Document, PrefixLM, SlidingWindow, Softcap, launch, repeat, rules
from cute_flash.arch.problem import Operands
from cute_flash.masks import Mask
from cute_flash.scores import Score
from profiling import host
from tests.test_torch_compile import (
    BLOCKS,
    CALLS,
    CU_K,
    CU_Q,
    IDS,
    SINK,
    SLOPES,
    USED,
    K,
    Q,
    V,
    attention,
    flattened,
    packed,
)  # fmt: skip

OUT = torch.empty(2, 8, 4, 64, dtype=Q.dtype)


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    """(operands) of every launch; out becomes the sum of what went in."""
    seen: list[Operands] = []

    def executable(kernel, problem, *_):
        def run(*operands):
            given = Operands(*operands)
            seen.append(given)
            given.out.fill_(given.q.sum() + given.softmax_scale)
            if given.lse is not None:
                given.lse.fill_(7.0)

        return run

    monkeypatch.setattr(launch, "executable", executable)
    with cute_flash.emulated("sm80"), torch.no_grad():
        yield seen


@pytest.fixture
def anew(monkeypatch):
    """A list that grows with every call that is not like an earlier one."""
    found = []
    original = repeat.checked

    def checked(*given):
        found.append(given)
        return original(*given)

    monkeypatch.setattr(repeat, "checked", checked)
    return found


OTHERS = {
    "out": lambda q, k, v: attention(q, k, v, out=OUT, return_lse=True),
    "out_of_a_table": lambda q, k, v: attention(q, k, v, out=OUT, alibi_slopes=SLOPES, mask=Document(IDS)),
    "sink_half": lambda q, k, v: attention(q, k, v, learnable_sink=SINK.half()),
    "list": lambda q, k, v: attention(q, k, v, window_size=[5, None]),
    "all": lambda q, k, v: attention(
        q, k, v, 0.1, 0.3, True, (7, -1), 2.0, SLOPES,
        mask=PrefixLM(5), score=Softcap(3.0), learnable_sink=SINK,
    ),  # fmt: skip
    "two_head_dims": lambda q, k, v: attention(q, k, v[..., :32]),
    "transposed": lambda q, k, v: attention(q.transpose(1, 2), k.mT.mT[:, :, :1], v[:, :, :1]),
    "packed_all": lambda q, k, v: packed(
        q, k, v, dropout_p=0.1, seqused_q=USED.clamp(max=5), seqused_k=USED, mask=Causal() | PrefixLM(2)
    ),
}
EVERY = {name: call for name, call in (CALLS | OTHERS).items() if "probabilities" not in name}


@pytest.mark.parametrize("name", EVERY)
def test_the_same_operands_again(noted, anew, name):
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        results.append(flattened(EVERY[name](Q, K, V)))
    assert len(anew) == 1 and len(noted) == 3
    assert results[0] == results[1] == results[2]
    first, second, third = map(flattened, noted)
    assert first == second == third
    for one, other in zip(noted[0], noted[2], strict=True):
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_split_keys_again(monkeypatch, anew, splits):
    seen = []
    monkeypatch.setattr(launch, "executable", lambda *key: lambda *given: seen.append(given))
    for _ in range(2):
        attention(Q, K, V, learnable_sink=SINK, num_splits=splits, return_lse=True)
        packed(Q, K, V, num_splits=splits)
    half = len(seen) // 2
    shapes = [[getattr(x, "shape", x) for x in given] for given in seen]
    assert len(anew) == 2 and half == (2 if splits == 1 else 4) and shapes[:half] == shapes[half:]


def test_nothing_is_allocated_beside_the_result(noted):
    for _ in range(2):
        out = attention(Q, K, V, causal=True)
    given = noted[1]
    assert given.out is out and given.q is Q and given.k is K and given.v is V
    assert [x for x in given if isinstance(x, torch.Tensor)] == [given.q, given.k, given.v, out]


@dataclass(frozen=True)
class Near(Mask):
    """A user's mask with a number and a table."""

    far: int
    table: torch.Tensor

    def visible(self, q, k):
        return q - k <= self.far


@dataclass(frozen=True)
class Plus(Score):
    """A user's score with a float."""

    bias: float

    def score(self, s, batch, head, q, k):
        return s + self.bias


def test_values_are_those_of_each_call(noted, anew):
    tables = [torch.zeros(3).int(), torch.ones(3).int()]
    for far, table in zip((3, 4), tables, strict=True):
        attention(Q, K, V, mask=Near(far, table), score=Plus(far / 2), alibi_slopes=SLOPES + far)
    (mask, score), (mask_again, score_again) = ((given.mask_values, given.score_values) for given in noted)
    assert len(anew) == 1 and flattened(mask) == [3, [0, 0, 0]] and flattened(mask_again) == [4, [1, 1, 1]]
    assert mask_again[1] is tables[1]
    assert flattened(score) == [(SLOPES + 3).tolist(), 1.5]
    assert flattened(score_again) == [(SLOPES + 4).tolist(), 2.0]
    for left in (5, 6, 5):
        attention(Q, K, V, window_size=(left, 0))
        attention(Q, K, V, mask=SlidingWindow(left, 0))
    assert [given.mask_values for given in noted[2:]] == [(5, 0), (5, 0), (6, 0), (6, 0), (5, 0), (5, 0)]


PLAIN = Plus(1.0)
SHOWN = {  # (mask, score) of a call
    "none": (None, None),
    "causal": (Causal(), None),
    "left": (SlidingWindow(3, None), None),
    "another_left": (SlidingWindow(4, None), None),
    "right": (SlidingWindow(None, 3), None),
    "wide": (SlidingWindow(2**40, 3), None),
    "prefix": (PrefixLM(3), None),
    "prefix_beyond": (PrefixLM(2**40), None),
    "prefix_numpy": (PrefixLM(np.int64(3)), None),
    "prefix_table": (PrefixLM(torch.tensor([3, 4]).int()), None),
    "prefix_table_int64": (PrefixLM(torch.tensor([3, 4])), None),
    "document": (Document(IDS), None),
    "document_parameter": (Document(torch.nn.Parameter(IDS.float())), None),
    "both": (Causal() & Document(IDS), None),
    "either": (Causal() | Document(IDS), None),
    "turned": (Document(IDS) & Causal(), None),
    "nested": (Causal() & (SlidingWindow(1, 2) | PrefixLM(7)), None),
    "own": (Near(3, IDS), None),
    "own_inside": (Causal() & Near(3, IDS), None),
    "own_larger": (Near(2**30, IDS), None),
    "function": (lambda q, k: k <= q + 1, None),
    "another_function": (lambda q, k: k <= q + 2, None),
    "captures": (lambda q, k: k <= q + MOVED, None),
    "softcap": (None, Softcap(3.0)),
    "softcap_large": (None, Softcap(2e6)),
    "softcap_int": (None, Softcap(3)),
    "alibi": (None, ALiBi(SLOPES)),
    "alibi_batch": (None, ALiBi(SLOPES.expand(2, 4).contiguous())),
    "own_score": (None, PLAIN),
    "score_function": (None, lambda s, batch, head, q, k: s * 2),
    "two": (Document(IDS), Softcap(3.0)),
}
MOVED = 3


def test_what_a_call_shows_of_its_rules_tells_their_texts_apart():
    """Keys are equal where the texts are, and values are those that operators make of what travels."""
    texts = {}
    for name, (mask, score) in SHOWN.items():
        encoded = rules.encode(rules.mask_of(False, (None, None), mask), rules.score_of(0.0, None, score))
        seen = rules.seen(mask, score)
        values = rules.values(*encoded)
        shown = [seen.mask or None, seen.score or None]
        assert flattened(shown) == flattened(values) and len(seen.tensors) == len(encoded.tensors), name
        assert texts.setdefault(seen.key, encoded.code) == encoded.code, name
    assert len(texts) >= len(set(texts.values())) >= len(SHOWN) - 5


def test_a_captured_number_is_seen_in_every_call(noted, anew, monkeypatch):
    mask, _ = SHOWN["captures"]
    for moved in (3, 3, 5, 3):
        monkeypatch.setattr(sys.modules[__name__], "MOVED", moved)
        attention(Q, K, V, mask=mask)
    assert len(anew) == 2


def test_tables_of_every_kind_stand_where_spans_say(noted):
    """Inputs of different lengths, none of which out meets."""
    repeat.forget()
    wide = torch.zeros(2, 1000).int()
    for _ in range(3):
        attention(Q, K, V, out=OUT, alibi_slopes=SLOPES, mask=Document(wide), score=ALiBi(SLOPES))
    given = noted[2]
    assert given.mask_values[0] is wide and [x is SLOPES for x in given.score_values] == [True, True]
    (decided,) = repeat._DECIDED.values()
    lengths = [x.numel() * x.element_size() for x in (OUT, Q, K, V, SLOPES, wide, SLOPES)]
    assert decided.spans == tuple(lengths)


def test_dropout_draws_a_state_in_every_call(noted):
    torch.manual_seed(3)
    for _ in range(3):
        attention(Q, K, V, 0.2)
    torch.manual_seed(3)
    assert [given.rng_state.tolist() for given in noted] == [
        torch.randint(0, 2**62, (2,)).tolist() for _ in range(3)
    ]


WRONG = {
    "scale_bool": ({"softmax_scale": 1}, {"softmax_scale": True}, TypeError, "softmax_scale is True"),
    "dropout_bool": ({"dropout_p": 0}, {"dropout_p": False}, TypeError, "dropout_p is False"),
    "softcap_bool": ({"softcap": 1.0}, {"softcap": True}, TypeError, "softcap is True"),
    "splits_float": ({"num_splits": 1}, {"num_splits": 1.0}, TypeError, "num_splits is 1.0"),
    "window_float": ({"window_size": (5, 0)}, {"window_size": (5.0, 0)}, TypeError, r"window_size is \(5.0"),
    "window_bool": ({"window_size": (5, 1)}, {"window_size": (5, True)}, TypeError, r"window_size is \(5, T"),
    "window_default": ({}, {"window_size": (-1.0, -1)}, TypeError, r"window_size is \(-1.0"),
    "window_beside_a_mask": (
        {"mask": Causal()},
        {"mask": Causal(), "window_size": (-1, -1.0)},
        TypeError,
        r"window_size is \(-1, -1.0",
    ),
    "softcap_beside_a_mask": (
        {"mask": Causal()},
        {"mask": Causal(), "softcap": False},
        TypeError,
        "softcap is False",
    ),
    "gradient": (
        {"out": OUT},
        {"out": OUT, "q": Q.clone().requires_grad_()},
        NotImplementedError,
        "out is given where a gradient is required",
    ),
    "table_gradient": (
        {"alibi_slopes": SLOPES},
        {"alibi_slopes": SLOPES.clone().requires_grad_()},
        NotImplementedError,
        "alibi_slopes requires a gradient",
    ),
    "dtype": ({}, {"k": K.bfloat16()}, TypeError, "k has dtype torch.bfloat16"),
    "strides": ({}, {"v": V.mT.contiguous().mT}, ValueError, "v has strides .*: the last dimension"),
    "address": (
        {},
        {"q": torch.zeros(Q.numel() + 1).half()[1:].view(Q.shape)},
        ValueError,
        "q begins at address",
    ),
    "overlap": ({"out": OUT}, {"q": OUT, "out": OUT}, ValueError, "out overlaps q"),
    "overlap_of_a_table": (
        {"out": OUT, "mask": Document(IDS)},
        {"out": OUT, "mask": Document(OUT.view(torch.int32).flatten()[:32].view(2, 16))},
        ValueError,
        "out overlaps a rule's tensor",
    ),
    "table": ({"mask": Document(IDS)}, {"mask": Document(IDS[:, :15])}, ValueError, "Document.ids has "),
    "field": ({"mask": Near(5, IDS)}, {"mask": Near(2**40, IDS)}, ValueError, "Near.far is 1099511627776"),
    "float_field": ({"score": Plus(2.0)}, {"score": Plus(1e300)}, ValueError, "Plus.bias is 1e.300"),
    "causal_and_blocks": (
        {"block_mask": BLOCKS},
        {"block_mask": BLOCKS, "causal": True},
        ValueError,
        "causal is given beside",
    ),
    "mask_and_blocks": (
        {"block_mask": BLOCKS},
        {"block_mask": BLOCKS, "mask": Causal()},
        ValueError,
        "beside block_mask",
    ),
    "lists": (
        {"block_mask": BLOCKS},
        {"block_mask": replace(BLOCKS, counts=BLOCKS.counts + 1)},
        ValueError,
        "block_mask.counts has numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_after_a_right_call_too(noted, name):
    right, wrong, error, text = WRONG[name]
    with torch.enable_grad():
        for _ in range(2):
            attention(**({"q": Q, "k": K, "v": V} | right))
        with pytest.raises(error, match=text):
            attention(**({"q": Q, "k": K, "v": V} | wrong))
    assert len(noted) == 2


def test_numbers_inside_packed_tensors_are_read_in_every_call(noted):
    cu_q = CU_Q.clone()
    flat = [x.flatten(0, 1) for x in (Q, K, V)]
    for _ in range(2):
        cute_flash.flash_attn_varlen_func(*flat, cu_q, CU_K, 11, 20)
    cu_q[1] = 17
    with pytest.raises(ValueError, match="cu_seqlens_q decreases from 17 to 16"):
        cute_flash.flash_attn_varlen_func(*flat, cu_q, CU_K, 11, 20)
    for longest in (11.0, True):
        with pytest.raises(TypeError, match=f"max_seqlen_q is {longest}"):
            cute_flash.flash_attn_varlen_func(*flat, CU_Q, CU_K, longest, 20)
    assert len(noted) == 2


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The same of functions."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operator(noted):
    for _ in range(2):
        attention(Q, K, V)
    for mode in (Operators(), Functions()):
        with mode:
            attention(Q, K, V)
        assert any("cute_flash.forward" in name for name in mode.names)
    with profile() as profiled:
        attention(Q, K, V)
    assert "cute_flash::forward" in {event.key for event in profiled.key_averages()}
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q: attention(q, K, V))(Q).code
    assert "cute_flash.forward" in graph
    with pytest.raises(NotImplementedError, match="torch.vmap over cute_flash"):
        torch.vmap(lambda q: attention(q, K, V))(Q[None])
    with pytest.raises(NotImplementedError, match="q has a tangent"):
        torch.func.jvp(lambda q: attention(q, K, V), (Q,), (Q,))


def test_a_subclass_sees_the_operator(noted, anew):
    class Own(torch.Tensor):
        pass

    for _ in range(2):
        attention(Q, K, V)
    before = len(anew)
    for _ in range(2):
        attention(Q.as_subclass(Own), K, V)
    assert len(anew) == before + 2


def test_a_sign_that_a_view_only_promises_is_kept(noted):
    """The imaginary part of a conjugate shares memory with numbers of the other sign: torch resolves it."""
    slopes = torch.complex(SLOPES[:1], SLOPES[:1]).conj().imag
    for _ in range(2):
        attention(Q[:, :, :1], K[:, :, :1], V[:, :, :1], alibi_slopes=slopes)
    assert slopes.is_neg() and slopes.is_contiguous()
    for given in noted:
        (found,) = given.score_values
        assert torch.equal(found, -SLOPES[:1]) and not found.is_neg()


def test_where_tensors_were_made_does_not_matter(noted, anew):
    """Inference tensors, parameters, and calls inside torch.inference_mode."""
    with torch.inference_mode():
        inferred = Q.clone()
        for _ in range(2):
            assert attention(inferred, K, V, out=torch.empty_like(inferred)).is_inference()
    sink = torch.nn.Parameter(SINK)
    for _ in range(2):
        attention(Q, K, V, learnable_sink=sink)
    assert len(anew) == 2
    version = OUT._version
    for _ in range(2):
        attention(Q, K, V, out=OUT)
    assert OUT._version >= version + 2


def test_devices_and_kernels_are_part_of_the_decision(noted, anew):
    for name in ("sm80", "sm90", "sm80", "sm100", "sm90"):
        with cute_flash.emulated(name):
            attention(Q, K, V)
    assert len(anew) == 3
    attention(Q, K, V, deterministic=True)
    assert len(anew) == 4


def test_no_tensor_is_kept(noted):
    slopes, ids, sink, out = SLOPES.clone(), IDS.clone(), SINK.clone(), OUT.clone()
    for _ in range(2):
        attention(Q, K, V, alibi_slopes=slopes, mask=Document(ids), learnable_sink=sink, out=out)
        attention(Q, K, V, score=ALiBi(slopes))
    noted.clear()
    kept = [weakref.ref(x) for x in (slopes, ids, sink, out)]
    del slopes, ids, sink, out
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_only_so_many_calls_are_remembered(noted, anew, monkeypatch):
    repeat.forget()
    monkeypatch.setattr(repeat, "MOST", 3)
    for left in (1, 2, 3, 4, 5, 5, 4, 1):
        attention(Q, K, V, window_size=(left, 0))
    assert len(anew) == 6 and len(repeat._DECIDED) == 3


def test_the_command_that_times_calls(capsys):
    """Every kind of call is timed again and anew, and is then decided; few rounds say nothing of the bars."""
    assert host.main(["--rounds", "1"]) in (0, 1)
    printed = capsys.readouterr().out
    for kind in host.kinds():
        line = rf"^{re.escape(kind.name)} +([\d.]+) +(\d+)  (?:met|MISSED) +([\d.]+)$"
        again, bar, anew = map(float, re.search(line, printed, re.MULTILINE).groups())
        assert again > 0 and anew > 0 and bar == kind.bar
    for part in ("watched", "rules", "key", "result", "operands", "checks", "operator", "launch"):
        assert printed.count(f"  {part} ") == 3

"""The public functions: signatures, what their arguments come to, what they return."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import cute_flash
from cute_flash import Causal, launch, request, rules
from cute_flash.arch.common.mask import SlidingWindow
from cute_flash.arch.common.score import Chain
from cute_flash.arch.problem import Operands
from cute_flash.arch.rule import Rule, describe, traced
from tests import reference
from tests.harness import where

# flash-attn 2.8's arguments with their defaults, in order, without q, k and v.
SHARED = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
OURS = {"mask": None, "score": None, "learnable_sink": None, "return_lse": False, "out": None}
OURS |= {"block_mask": None, "num_splits": None}
OURS |= dict.fromkeys(("q_descale", "k_descale", "v_descale", "quantization_block", "out_dtype"))
PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
REQUIRED = inspect.Parameter.empty


def tensors(seqlen_q=9, seqlen_k=13, heads=4, heads_kv=2, dim_v=64):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, seqlen_q, heads, 64), (2, seqlen_k, heads_kv, 64), (2, seqlen_k, heads_kv, dim_v))
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def checked(**options) -> request.Call:
    """What a dense call comes to."""
    defaults = {
        "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
        "alibi_slopes": None, "mask": None, "score": None, "learnable_sink": None, "lse": False, "out": None,
    }  # fmt: skip
    return request.dense(*tensors(), request.Options(**(defaults | options)))


def test_signatures():
    dense = dict.fromkeys("qkv", REQUIRED) | SHARED | OURS
    found = inspect.signature(cute_flash.flash_attn_func).parameters
    assert [(name, p.default) for name, p in found.items()] == list(dense.items())
    assert {name for name, p in found.items() if p.kind is p.KEYWORD_ONLY} == set(OURS)
    packed = dict.fromkeys((*"qkv", *PACKING), REQUIRED) | SHARED | {"block_table": None}
    packed |= {"seqused_q": None, "seqused_k": None} | OURS
    found = inspect.signature(cute_flash.flash_attn_varlen_func).parameters
    assert [(name, p.default) for name, p in found.items()] == list(packed.items())


def test_every_public_name_is_there_and_described():
    for name in cute_flash.__all__:
        assert getattr(cute_flash, name).__doc__, name


def test_importing_loads_no_compiler_and_no_emulator():
    loaded = "{'cutlass', 'tvm_ffi', 'cute_flash.emulator', 'torch._dynamo'} & set(sys.modules)"
    code = f"import sys, cute_flash; print(sorted({loaded}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


PREFIX, SLOPES = torch.zeros(2).int(), torch.zeros(2, 4)


@pytest.mark.parametrize(
    "options, mask",
    [
        ({}, None),
        ({"window_size": (None, None)}, None),
        ({"causal": True}, Causal()),
        ({"causal": True, "window_size": (-1, 7)}, Causal()),
        ({"window_size": (-1, 0)}, Causal()),
        ({"window_size": (5, -1)}, SlidingWindow(5, None)),
        ({"window_size": (None, 3)}, SlidingWindow(None, 3)),
        ({"window_size": (5, 3)}, SlidingWindow(5, 3)),
        ({"causal": True, "window_size": (5, -1)}, SlidingWindow(5, 0)),
        ({"mask": Causal()}, Causal()),
        ({"causal": True, "mask": SlidingWindow(2, None)}, Causal() & SlidingWindow(2, None)),
        ({"mask": cute_flash.PrefixLM(PREFIX)}, cute_flash.PrefixLM(PREFIX)),
    ],
)
def test_masks_of_a_call(options, mask):
    assert_encoded(checked(**options), mask, None)


def assert_encoded(call: request.Call, mask: Rule | None, score: Rule | None) -> None:
    """The expressions of a call are those of these rules, and its values theirs."""
    found = rules.values(call.rules, call.rule_tensors, call.rule_ints, call.rule_floats)
    for rule, text, values in zip((mask, score), rules.decode(call.rules), found, strict=True):
        kind, wanted = (None, ()) if rule is None else describe(rule)
        assert (text and text.text) == (kind and traced(kind))
        assert (values or ()) == wanted


@pytest.mark.parametrize(
    "options, score",
    [
        ({"softcap": 2.0}, cute_flash.Softcap(2.0)),
        ({"alibi_slopes": SLOPES}, cute_flash.ALiBi(SLOPES)),
        (
            {"softcap": 2.0, "alibi_slopes": SLOPES, "score": cute_flash.Softcap(9.0)},
            Chain((cute_flash.Softcap(2.0), cute_flash.ALiBi(SLOPES), cute_flash.Softcap(9.0))),
        ),
    ],
)
def test_scores_of_a_call(options, score):
    assert_encoded(checked(**options), None, score)


def test_causal_bounds_the_window_on_the_right():
    assert checked(causal=True, window_size=(5, 9)).rule_ints == [5, 0]


def test_rules_come_back_as_they_went():
    prefix = cute_flash.PrefixLM(3)
    call = checked(causal=True, window_size=(5, -1), mask=prefix, softcap=2.0, alibi_slopes=SLOPES)
    score = Chain((cute_flash.Softcap(2.0), cute_flash.ALiBi(SLOPES)))
    assert_encoded(call, SlidingWindow(5, 0) & prefix, score)


def test_a_plain_function_is_read_anew_where_what_it_uses_changes():
    made = []
    for width in (3, 3, 4):
        made.append(checked(mask=lambda q, k: q - k < width).rules)  # noqa: B023
    assert made[0] == made[1] != made[2]


def test_the_scale_is_that_of_the_head_dim():
    assert checked().softmax_scale == 0.125
    assert checked(softmax_scale=2).softmax_scale == 2.0


def test_dropout_draws_its_state_from_torch():
    torch.manual_seed(5)
    states = [checked(dropout_p=0.1).rng_state, checked(dropout_p=0.1).rng_state]
    torch.manual_seed(5)
    again = request.draw_rng_state(torch.device("cpu"))
    assert torch.equal(states[0], again) and not torch.equal(states[0], states[1])
    assert checked(dropout_p=0).rng_state is None


@pytest.mark.parametrize("dropout_p, threshold", [(0.1, 58982), (0.5, 32768), (1e-9, 65536), (1 - 2**-16, 1)])
def test_dropout_in_sixteen_bits(dropout_p, threshold):
    assert request.keep_threshold(dropout_p) == threshold


@pytest.fixture
def operands(monkeypatch):
    """Operands of every launch, which are not made."""
    seen = []
    monkeypatch.setattr(launch, "executable", lambda *key: lambda *given: seen.append(Operands(*given)))
    with cute_flash.emulated("sm80"):
        yield seen


def test_operands_that_a_call_has_not_are_none(operands):
    q, k, v = tensors()
    cute_flash.flash_attn_func(q, k, v)
    given = operands[0]
    assert {name for name, value in given._asdict().items() if value is not None} == {
        "q", "k", "v", "out", "softmax_scale", "multiprocessors",
    }  # fmt: skip
    assert given.q is q and given.k is k and given.v is v


def test_operands_of_a_packed_call(operands):
    q, k, v = (tensor.flatten(0, 1) for tensor in tensors())
    starts = torch.tensor([0, 9, 18], dtype=torch.int32), torch.tensor([0, 20, 26], dtype=torch.int32)
    used = torch.tensor([9, 6], dtype=torch.int32)
    sink = torch.rand(4).bfloat16()
    out, lse = cute_flash.flash_attn_varlen_func(
        q, k, v, *starts, 9, 20, 0.1, window_size=(3, 4), seqused_k=used, learnable_sink=sink, return_lse=True
    )
    given = operands[0]
    assert given.cu_seqlens_q is starts[0] and given.cu_seqlens_k is starts[1] and given.seqused_k is used
    assert given.seqused_q is None and given.max_seqlen_q == 9
    assert given.keep_threshold == 58982 and given.keep_scale == 65536 / 58982
    assert given.rng_state.shape == (2,) and given.rng_state.dtype == torch.int64
    assert torch.equal(given.sink, sink.float())
    assert given.mask_values == (3, 4) and given.score_values is None
    assert given.out is not None and out.shape == (18, 4, 64)
    assert lse.shape == (4, 18) and lse.dtype == torch.float32


def test_what_is_returned(operands):
    q, k, v = tensors(dim_v=32)
    out = cute_flash.flash_attn_func(q, k, v, deterministic=True)
    assert out.shape == (2, 9, 4, 32) and out.dtype == q.dtype
    out, lse = cute_flash.flash_attn_func(q, k, v, return_lse=True)
    assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32
    out, lse, probabilities = cute_flash.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 9) and probabilities.shape == (2, 4, 9, 13)
    given = torch.empty(2, 9, 4, 32, dtype=q.dtype)
    version = given._version
    assert cute_flash.flash_attn_func(q, k, v, out=given) is given
    assert operands[-1].out.data_ptr() == given.data_ptr() and given._version > version


def test_nothing_is_launched_where_nothing_is_asked(operands):
    q, k, v = tensors()
    out, lse = cute_flash.flash_attn_func(q[:, :0], k, v, return_lse=True)
    assert out.shape == (2, 0, 4, 64) and lse.shape == (2, 4, 0)
    assert cute_flash.flash_attn_func(q[:0], k[:0], v[:0]).shape == (0, 9, 4, 64)
    assert not operands


def test_gradients_of_the_result_are_not_promised(operands):
    q, k, v = tensors()
    assert not cute_flash.flash_attn_func(q, k, v).requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 3.0, "alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.3])},
        {"window_size": (2, 1), "learnable_sink": torch.tensor([0.0, -1.0, 2.0, 0.5]), "dropout_p": 0.3},
    ],
)
def test_probabilities_are_the_softmax_of_the_reference(operands, options):
    """S_dmask times v is what the oracle computes, and its signs are the oracle's dropout mask."""
    q, k, v = tensors()
    torch.manual_seed(2)
    state = request.draw_rng_state(q.device).tolist()
    torch.manual_seed(2)
    probabilities = cute_flash.flash_attn_func(q, k, v, return_attn_probs=True, **options)[2]
    dropout_p = options.pop("dropout_p", 0.0)
    dropout = reference.Dropout(dropout_p, *state) if dropout_p else None
    expected, _ = reference.attention(q.double(), k.double(), v.double(), dropout=dropout, **options)
    kept = probabilities.clamp(min=0) * 65536 / request.keep_threshold(dropout_p)
    values = v.float().repeat_interleave(2, dim=2)
    torch.testing.assert_close(
        torch.einsum("bhqk,bkhd->bqhd", kept, values).double(), expected, rtol=0, atol=1e-5
    )
    assert bool((probabilities < 0).any()) == bool(dropout_p)


@pytest.mark.parametrize("options", [{}, {"causal": True, "return_lse": True}, {"return_attn_probs": True}])
def test_end_to_end(machine, options):
    """A kernel's result against the weights that return_attn_probs gives."""
    place = "cuda" if machine == "cuda" else "cpu"
    q, k, v = (tensor.to(place) for tensor in tensors())
    with where(machine):
        result = cute_flash.flash_attn_func(q, k, v, **options)
        options = {name: options[name] for name in options if name == "causal"}
        weights = cute_flash.flash_attn_func(q, k, v, return_attn_probs=True, **options)[2]
    out = result[0] if isinstance(result, tuple) else result
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.float().repeat_interleave(2, dim=2))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-3)


def test_emulated_launches_are_reported(arch):
    q, k, v = tensors()
    with cute_flash.emulated(arch) as emulation:
        cute_flash.flash_attn_func(q, k, v)
        cute_flash.flash_attn_func(q, k, v)
    assert len(emulation.reports) == 2
    assert all(report.instructions > 1000 for report in emulation.reports)

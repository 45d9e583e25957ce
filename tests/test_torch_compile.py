"""torch.compile traces every kind of call without a graph break, to the same kernel and operands.

The kernel is replaced by one that notes problem and operands: what the operators hand on is the matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import cute_flash
from cute_flash import (
    ALiBi,
    BlockMask,
    Causal,
    Document,
    PrefixLM,
    SlidingWindow,
    create_block_mask,
    launch,
    ops,
    request,
)
from cute_flash.arch.problem import Operands
from cute_flash.masks import Mask

attention, varlen = cute_flash.flash_attn_func, cute_flash.flash_attn_varlen_func


@pytest.fixture
def noted(monkeypatch):
    """(problem, operands) of every launch; out becomes the sum of what went in."""
    seen: list[tuple[Any, Operands]] = []

    def executable(kernel, problem, *_):
        def run(*operands):
            given = Operands(*operands)
            seen.append((problem, given))
            given.out.fill_(given.q.sum() + given.softmax_scale)
            if given.lse is not None:
                given.lse.fill_(7.0)

        return run

    monkeypatch.setattr(launch, "executable", executable)
    torch._dynamo.reset()
    with cute_flash.emulated("sm80"), torch.no_grad():
        yield seen


@dataclass(frozen=True)
class Every(Mask):
    """A user's mask with a field."""

    step: int

    def visible(self, q, k):
        return (q - k) % self.step == 0


def checkerboard(q, k):
    return (q + k) % 2 == 0


def by_head(s, batch, head, q, k):
    return s + head


GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (
    torch.randn(2, n, h, 64, generator=GENERATOR).half() for n, h in ((8, 4), (16, 2), (16, 2))
)
CU_Q, CU_K = torch.tensor([0, 5, 16], dtype=torch.int32), torch.tensor([0, 12, 32], dtype=torch.int32)
USED = torch.tensor([3, 20], dtype=torch.int32)
SLOPES, IDS, SINK = torch.rand(4), torch.zeros(2, 16, dtype=torch.int32), torch.rand(4)
BLOCKS = BlockMask.from_blocks(torch.ones(1, 1, dtype=torch.bool), seqlens=(8, 16))
DOCUMENTS = create_block_mask(Document(IDS) & Causal(), 2, 4, 8, 16)


def packed(q, k, v, **options):
    return varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), CU_Q, CU_K, 11, 20, **options)


CALLS: dict[str, Callable] = {
    "plain": attention,
    "causal": lambda q, k, v: attention(q, k, v, causal=True),
    "scale": lambda q, k, v: attention(q, k, v, softmax_scale=0.3),
    "window": lambda q, k, v: attention(q, k, v, window_size=(5, 2)),
    "softcap": lambda q, k, v: attention(q, k, v, softcap=10.0),
    "alibi": lambda q, k, v: attention(q, k, v, alibi_slopes=SLOPES),
    "lse": lambda q, k, v: attention(q, k, v, return_lse=True),
    "dropout": lambda q, k, v: attention(q, k, v, 0.1),
    "sink": lambda q, k, v: attention(q, k, v, learnable_sink=SINK),
    "probabilities": lambda q, k, v: attention(q, k, v, 0.1, causal=True, return_attn_probs=True),
    "mask_object": lambda q, k, v: attention(q, k, v, mask=Causal() & PrefixLM(3)),
    "mask_table": lambda q, k, v: attention(q, k, v, causal=True, mask=Document(IDS)),
    "mask_own": lambda q, k, v: attention(q, k, v, mask=Every(3) | SlidingWindow(None, 2)),
    "mask_function": lambda q, k, v: attention(q, k, v, mask=checkerboard),
    "mask_lambda": lambda q, k, v: attention(q, k, v, mask=lambda q, k: q > k),
    "score_object": lambda q, k, v: attention(q, k, v, score=ALiBi(SLOPES), softcap=2.0),
    "score_function": lambda q, k, v: attention(q, k, v, score=by_head),
    "block_mask": lambda q, k, v: attention(q, k, v, block_mask=BLOCKS),
    "block_mask_table": lambda q, k, v: attention(q, k, v, 0.1, block_mask=DOCUMENTS, return_lse=True),
    "block_mask_probabilities": lambda q, k, v: attention(q, k, v, block_mask=BLOCKS, return_attn_probs=True),
    "varlen": packed,
    "varlen_used": lambda q, k, v: packed(q, k, v, seqused_k=USED, causal=True, return_lse=True),
}


def flattened(value: Any) -> list[Any]:
    """Tensors as nested lists, so that `==` compares what the operands hold."""
    if isinstance(value, (tuple, list)):
        return [flattened(member) for member in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", CALLS)
def test_the_same_launch_without_a_graph_break(noted, name):
    torch.manual_seed(0)
    expected = CALLS[name](Q, K, V)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    result = compiled(Q, K, V)
    assert flattened(result) == flattened(expected)
    (problem, operands), (problem_compiled, operands_compiled) = noted
    assert problem_compiled == problem
    assert flattened(operands_compiled) == flattened(operands)


def test_writing_into_out(noted):
    out = torch.zeros_like(Q)

    def into(q, k, v, out):
        attention(q, k, v, out=out)
        return out + 1

    result = torch.compile(into, fullgraph=True, backend="aot_eager")(Q, K, V, out)
    assert out.ne(0).all() and torch.equal(result, out + 1)
    assert len(noted) == 1


def test_a_block_mask_as_an_argument(noted):
    def masked(q, k, v, block_mask):
        return attention(q, k, v, block_mask=block_mask)

    call = torch.compile(masked, fullgraph=True, backend="aot_eager")
    for block_mask in (BLOCKS, DOCUMENTS):
        call(Q, K, V, block_mask)
        problem, operands = noted[-1]
        assert problem.block_size == (128, 128) and (problem.mask is None) == (block_mask is BLOCKS)
        assert torch.equal(operands.block_indices, block_mask.indices)


def test_new_sizes_and_values_do_not_compile_a_graph_each(noted):
    call, graphs = counting(lambda q, k, left: attention(q, k, k, window_size=(left, 0)))
    for batch, seqlen, left in ((2, 16, 3), (3, 24, 5), (5, 40, 7), (4, 9, 11)):
        q = torch.randn(batch, seqlen, 4, 64).half()
        assert call(q, q, left).shape == q.shape
        assert noted[-1][1].mask_values == (left, 0)
    assert len(graphs) == 1


def counting(function: Callable) -> tuple[Callable, list]:
    """The compiled function, for sizes of all kinds, and its graphs."""
    graphs: list = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, backend=backend, dynamic=True), graphs


SCALES = {
    "scale_root": (lambda n: {"softmax_scale": 1 / math.sqrt(3 * n)}, lambda given: given.softmax_scale),
    "scale_log": (lambda n: {"softmax_scale": math.log2(n) / 8}, lambda given: given.softmax_scale),
    "softcap": (lambda n: {"softcap": n**0.5}, lambda given: given.score_values[0]),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_number_that_depends_on_a_length_does_not_compile_a_graph_each(noted, name):
    options, found = SCALES[name]
    call, graphs = counting(lambda q: attention(q, q, q, **options(q.shape[1])))
    for seqlen in range(7, 30, 2):
        call(torch.randn(2, seqlen, 4, 64).half())
        assert found(noted[-1][1]) == next(iter(options(seqlen).values()))
    assert len(graphs) == 1


def by_lengths(q, lengths, **options):
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = lengths.max().item()
    return varlen(q, q, q, starts, starts, longest, longest + 1, **options)


@pytest.mark.parametrize("options", [{}, {"mask": Document(torch.zeros(3, 40).int()), "return_lse": True}])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_longest_length_that_is_read_from_a_tensor(noted, options):
    call, graphs = counting(lambda q, lengths: by_lengths(q, lengths, **options))
    for lengths in ([5, 20, 8], [30, 1, 2], [1, 2, 3]):
        call(torch.randn(33, 4, 64).half(), torch.tensor(lengths, dtype=torch.int32))
        assert noted[-1][1].max_seqlen_q == max(lengths)
    assert len(graphs) == 1


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_what_is_wrong_with_such_a_length_is_found_when_the_graph_runs(noted):
    call, _ = counting(lambda q, lengths: by_lengths(q, lengths, mask=Document(torch.zeros(3, 20).int())))
    q = torch.randn(33, 4, 64).half()
    call(q, torch.tensor([5, 19, 9], dtype=torch.int32))
    for lengths in ([5, 20, 8], [-1, -5, -7]):
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            call(q, torch.tensor(lengths, dtype=torch.int32))
    assert len(noted) == 1


def test_bounds_beyond_int32_are_clamped_to_the_size_at_hand(noted):
    call, graphs = counting(lambda q, k: attention(q, k, k, window_size=(2**31 - 1, 2**40)))
    for rows_q, rows_k in ((9, 17), (20, 30), (40, 33)):
        call(torch.randn(2, rows_q, 4, 64).half(), torch.randn(2, rows_k, 4, 64).half())
        assert noted[-1][1].mask_values == (rows_k, rows_q)
    assert len(graphs) == 1


class Limits:
    """What rules look at from outside: attributes of a class."""

    near = far = 0


@dataclass(frozen=True)
class Near(Mask):
    """A mask that looks at another class, through a property."""

    @property
    def near(self):
        return Limits.near

    def visible(self, q, k):
        return (q - k < Limits.far) & (k > q - self.near)


def test_a_rule_sees_what_it_uses_from_outside_change(noted):
    """Values of enclosing functions and of classes: torch.compile compiles again where they change."""
    far = 0

    def near(q, k):
        return (q - k - far < 0) & (k > q - Limits.near)

    for mask in (near, Near()):
        torch._dynamo.reset()
        masked = partial(attention, mask=mask)
        call = torch.compile(lambda q, masked=masked: masked(q, K, V), fullgraph=True, backend="eager")
        for far in (3, 4, 7, 4):
            Limits.far = far
            for Limits.near in (5, 6):
                call(Q)
                text = noted[-1][0].mask.text
                assert f" {far})" in text and f"(q - {Limits.near})" in text


def test_a_class_with_values_of_a_function_is_refused_as_it_would_not_see_them_change(noted):
    width = 3

    @dataclass(frozen=True)
    class Local(Mask):
        def visible(self, q, k):
            return q - k < width

    attention(Q, K, V, mask=Local())
    with pytest.raises(Exception, match="within torch.compile it would not see them change"):
        torch.compile(lambda q: attention(q, K, V, mask=Local()), fullgraph=True, backend="eager")(Q)


def test_gradients_of_rules_are_refused_there_too(noted):
    slopes = SLOPES.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(Exception, match="a rule's tensors get none"):
        torch.compile(attention, fullgraph=True, backend="aot_eager")(Q, K, V, alibi_slopes=slopes)


def checked_calls() -> dict[str, request.Call]:
    """Calls as the operators get them."""
    plain = request.Options(0.0, None, False, (-1, -1), 0.0, None, None, None, None, False, None)
    every = request.Options(0.1, 0.5, True, (4, 0), 3.0, SLOPES, Document(IDS), None, SINK, True, None)
    packing = request.Packing(CU_Q, CU_K, 11, 20, None, USED)
    flat = [tensor.flatten(0, 1) for tensor in (Q, K, V)]
    return {
        "plain": request.dense(Q, K, V, plain),
        "every": request.dense(Q, K, V, every),
        "blocks": request.dense(Q, K, V, plain._replace(block_mask=DOCUMENTS)),
        "varlen": request.varlen(*flat, packing, plain._replace(lse=True)),
    }


@pytest.mark.parametrize("name", checked_calls())
def test_opcheck(noted, name):
    call = checked_calls()[name]
    torch.library.opcheck(torch.ops.cute_flash.forward.default, tuple(call))
    out = torch.empty_like(call.q)
    torch.library.opcheck(torch.ops.cute_flash.forward_out.default, (out, *call))
    if call.cu_seqlens_q is None:
        torch.library.opcheck(torch.ops.cute_flash.probabilities.default, tuple(call))


def test_opcheck_notices_a_wrong_shape(noted, monkeypatch):
    right = ops.answer
    monkeypatch.setattr(ops, "answer", lambda *given: right(*given)._replace(lse=torch.zeros(3)))
    with pytest.raises(Exception, match="Shapes .* are not equal"):
        torch.library.opcheck(torch.ops.cute_flash.forward.default, tuple(checked_calls()["plain"]))


def test_a_fake_call_gives_shapes_and_launches_nothing(noted):
    meta = [tensor.to("meta") for tensor in (Q, K, V[..., :32])]
    out, lse = attention(*meta, return_lse=True)
    assert out.shape == (2, 8, 4, 32) and out.dtype == torch.float16 and out.device.type == "meta"
    assert lse.shape == (2, 4, 8) and lse.dtype == torch.float32
    assert not noted

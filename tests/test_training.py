"""What torch does with gradients: operators that are checked, traced and counted.

Kernels are replaced by ones that note what they are given: what the operators hand on is the matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cute_flash
from cute_flash import BlockMask, Causal, Document, backward, block_mask, create_block_mask, launch, repeat
from cute_flash.arch.problem import Spec
from cute_flash.request import Call, Options, Packing
from tests.test_torch_compile import flattened

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, n, h, 64, generator=GENERATOR).half() for n, h in ((8, 4), (16, 2), (16, 2)))
CU_Q, CU_K = torch.tensor([0, 5, 16], dtype=torch.int32), torch.tensor([0, 12, 32], dtype=torch.int32)
USED, SINK = torch.tensor([3, 20], dtype=torch.int32), torch.rand(4)
DOCUMENTS = create_block_mask(Document(torch.zeros(2, 16, dtype=torch.int32)) & Causal(), 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """(problem, operands) of every launch; what a kernel writes becomes a number made of what it reads."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def executable(kernel, problem, *_):
        written = written_by(problem)

        def run(*operands):
            given = dict(zip(problem.specs()._fields, operands, strict=True))
            read = {name: x for name, x in given.items() if name not in written}
            seen.append((problem, {name: flattened(x) for name, x in read.items()}))
            for name in written:
                given[name].fill_(sum_of_means(read.values()))

        return run

    monkeypatch.setattr(launch, "executable", executable)
    torch._dynamo.reset()
    with cute_flash.emulated("sm80"):
        yield seen


def written_by(problem: Any) -> set[str]:
    """Operands that a kernel writes, or some rows of."""
    results = ("out", "lse") if problem.operation == "forward" else ()
    specs = {name: spec for name, spec in problem.specs()._asdict().items() if isinstance(spec, Spec)}
    gradients = {name for name in specs if name.startswith("grad") and name not in ("grad_out", "grad_lse")}
    return gradients | {name for name, spec in specs.items() if spec.written or name in results}


def sum_of_means(operands: Iterable[Any]) -> float:
    """Of all tensors of floating-point numbers."""
    tensors = [x for x in operands if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return float(sum(x.double().mean() for x in tensors))


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def dense(q, k, v, sink, block_mask=None, **rules):
    rules |= {"causal": True, "softcap": 3.0} if block_mask is None else {"block_mask": block_mask}
    return cute_flash.flash_attn_func(q, k, v, 0.1, learnable_sink=sink, return_lse=True, **rules)


def blocks(q, k, v, sink):
    return dense(q, k, v, sink, DOCUMENTS)


def in_turns(q, k, v, sink):
    return dense(q, k, v, sink, DOCUMENTS, deterministic=True)


def varlen(q, k, v, sink):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    options = {"seqused_k": USED, "causal": True, "learnable_sink": sink, "return_lse": True}
    return cute_flash.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 11, 20, **options)


@pytest.mark.parametrize("call", [blocks, in_turns, varlen])
def test_a_training_step_is_one_graph_with_the_same_launches(call, launched, monkeypatch):
    """Dropout, sink, lse, block mask: forward and backward pass, step after step, without lists made anew."""
    graphs = []

    def step(*tensors):
        out, lse = call(*tensors)
        return out.float().sum() + lse.sum()

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    assert DOCUMENTS.turns.shape == DOCUMENTS.transposed[1].shape  # made here, as torch.compile cannot
    monkeypatch.setattr(block_mask, "_lists", None)
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        launched.clear()
        torch.manual_seed(0)
        tensors = leaves(Q, K, V, SINK)
        for _ in range(2):
            run(*tensors).backward()
        found.append((list(launched), [x.grad for x in tensors]))
    (expected, gradients), (launches, traced) = found
    assert launches == expected and {problem.operation for problem, _ in launches} >= {"forward", "backward"}
    assert all(map(torch.equal, traced, gradients)) and all(x.any() for x in traced)
    assert len(graphs) == 1


def test_a_block_mask_that_is_an_argument_of_a_training_step(launched):
    """Each mask's own lists by keys, which are made with it."""
    step = torch.compile(lambda *given: dense(*given)[0].sum(), fullgraph=True, backend="eager")
    for made in (DOCUMENTS, BlockMask.from_blocks(torch.ones(1, 1, dtype=torch.bool), seqlens=(8, 16))):
        step(*leaves(Q, K, V, SINK), made).backward()
        mains = [operands for problem, operands in launched if problem.operation == "backward"]
        assert mains[-1]["block_counts"] == made.transposed[0].tolist()


def test_a_block_mask_without_lists_by_keys():
    """One made without gradients in sight: the first call that needs them makes them, untraced."""
    with torch.no_grad():
        made = create_block_mask(Causal(), 2, 4, 8, 16)
    step = torch.compile(dense, fullgraph=True, backend="eager")
    for rules, name in (({}, "transposed"), ({"deterministic": True}, "turns")):
        with pytest.raises(Exception, match=f"block_mask was made without `{name}`"):
            step(*leaves(Q, K, V, SINK), made, **rules)
        dense(*leaves(Q, K, V, SINK), made, **rules)
        step(*leaves(Q, K, V, SINK), made, **rules)
        step(*leaves(Q, K, V, SINK), made.to("cpu"), **rules)


def test_what_has_no_backward_says_so_before_anything_runs(launched):
    """With every reason: a tile of keys of 48 is the forward pass's alone."""
    visit = torch.ones(1, 1, dtype=torch.bool)
    made = BlockMask.from_blocks(visit, block_size=(128, 48), seqlens=(8, 16))
    reasons = r"(?s)no kernel serves backward.*\(128, 48\) is a multiple of no tile"
    for options in ({}, {"return_attn_probs": True}):
        with pytest.raises(NotImplementedError, match=reasons):
            cute_flash.flash_attn_func(*leaves(Q, K, V), block_mask=made, **options)
    assert not launched
    with torch.no_grad():
        cute_flash.flash_attn_func(Q, K, V, block_mask=made)
    assert len(launched) == 1


def test_a_gradient_of_meta_tensors_has_a_shape():
    q, k, v = (x.to("meta").requires_grad_() for x in (Q, K, V))
    out = cute_flash.flash_attn_func(q, k, v)
    assert torch.autograd.grad(out.sum(), k)[0].shape == K.shape


def checked_calls() -> dict[str, Call]:
    """Calls as the operators get them, where gradients are required."""
    q, k, v, sink = leaves(Q, K, V, SINK)
    plain = Options(0.0, None, False, (-1, -1), 0.0, None, None, None, None, False, None)
    every = plain._replace(
        dropout_p=0.1, softcap=3.0, learnable_sink=sink, lse=True, block_mask=DOCUMENTS
    )
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    packing = Packing(CU_Q, CU_K, 11, 20, None, USED)
    kv = torch.stack([K, V], -3).requires_grad_()
    with torch.enable_grad():
        return {
            "every": repeat.checked(q, k, v, None, every),
            "varlen": repeat.checked(*flat, packing, plain),
            "joint": repeat.checked(q, *kv.unbind(-3), None, plain._replace(joint=kv)),
        }


@pytest.mark.parametrize("name", ["every", "varlen", "joint"])
def test_opcheck(name):
    """Of `forward` with its gradients, and of `backward`, which has none itself but says so."""
    with cute_flash.emulated("sm80"):
        call = checked_calls()[name]
    torch.library.opcheck(torch.ops.cute_flash.forward.default, tuple(call))
    constant = call._replace(
        **{name: x.detach() for name, x in call._asdict().items() if isinstance(x, torch.Tensor)}
    )
    out, lse = torch.ops.cute_flash.forward.default(*constant)
    given = backward.Given(torch.ones_like(out), torch.ones_like(lse) if name == "every" else None, out, lse)
    operator = torch.ops.cute_flash.backward.default
    torch.library.opcheck(operator, (*given, *constant))
    torch.library.opcheck(operator, (*given, *call), test_utils="test_autograd_registration")


def test_opcheck_notices_a_wrong_gradient(monkeypatch):
    call = checked_calls()["varlen"]
    right = backward.gradients
    monkeypatch.setattr(backward, "gradients", lambda *given: right(*given)._replace(k=torch.zeros(3)))
    with pytest.raises(Exception, match="invalid gradient at index 1"):
        torch.library.opcheck(torch.ops.cute_flash.forward.default, tuple(call))


def test_flops_of_gradients_are_five_products():
    def counted(function, *tensors):
        with FlopCounterMode(display=False) as counter:
            function(*tensors).sum().backward()
        return counter.get_total_flops()

    expected = 2 * 2 * 4 * 8 * 16 * 64 * (2 + 5)
    q, k, v = leaves(Q, K, V)
    assert counted(cute_flash.flash_attn_func, q, k, v) == expected
    (kv,) = leaves(torch.stack([K, V], -3))
    assert counted(cute_flash.flash_attn_kvpacked_func, q, kv) == expected
    q, kv = leaves(Q.flatten(0, 1), kv.detach().flatten(0, 1))
    given = (q, kv, CU_Q, CU_K, 11, 20)
    pairs = 5 * 12 + 11 * 20
    assert counted(cute_flash.flash_attn_varlen_kvpacked_func, *given) == 2 * 4 * pairs * 64 * (2 + 5)
    (qkv,) = leaves(torch.stack([Q, Q, Q], -3))
    assert counted(cute_flash.flash_attn_qkvpacked_func, qkv) == 2 * 2 * 4 * 8 * 8 * 64 * (2 + 5)

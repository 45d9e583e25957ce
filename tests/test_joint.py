"""q, k and v in one tensor, or k and v: the same results and gradients, which are written in place."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

import cute_flash

STARTS = torch.tensor([0, 30, 30, 70], dtype=torch.int32)
CAUSAL = {"causal": True, "return_lse": True}


def packed(qkv, starts=STARTS):
    return cute_flash.flash_attn_varlen_qkvpacked_func(qkv, starts, 40, **CAUSAL)


def packed_kv(q, kv):
    return cute_flash.flash_attn_varlen_kvpacked_func(q, kv, STARTS, STARTS, 40, 40, **CAUSAL)


def apart(qkv):
    """What the functions do, by views."""
    if qkv.ndim == 5:
        return cute_flash.flash_attn_func(*qkv.unbind(-3), return_lse=True)
    return packed_apart(*qkv.unbind(-3))


def apart_kv(q, kv):
    if kv.ndim == 5:
        return cute_flash.flash_attn_func(q, *kv.unbind(-3), return_lse=True)
    return packed_apart(q, *kv.unbind(-3))


def packed_apart(*qkv):
    return cute_flash.flash_attn_varlen_func(*qkv, STARTS, STARTS, 40, 40, **CAUSAL)


# The function, what it does by views, and the shapes of what it takes.
CALLS = {
    "qkv": (
        lambda qkv: cute_flash.flash_attn_qkvpacked_func(qkv, return_lse=True), apart, [(1, 70, 3, 2, 64)],
    ),
    "kv": (
        lambda q, kv: cute_flash.flash_attn_kvpacked_func(q, kv, return_lse=True),
        apart_kv, [(1, 65, 6, 64), (1, 70, 2, 2, 64)],
    ),
    "varlen_qkv": (packed, apart, [(70, 3, 2, 64)]),
    "varlen_kv": (packed_kv, apart_kv, [(70, 2, 64), (70, 2, 2, 64)]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def emulated():
    with cute_flash.emulated("sm80"):
        yield


def tensors(name: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Fresh normal leaves of a call."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in CALLS[name][2]]


def gradients(function, leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], set[str]]:
    """Those of the leaves through out and lse, and the operators that ran for them."""
    results = function(*leaves)
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    with profile() as seen:
        found = torch.autograd.grad(results, leaves, cotangents)
    return found, {event.name for event in seen.events()}


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_parts(name):
    function, by_parts, _ = CALLS[name]
    with torch.no_grad():
        for one, other in zip(function(*tensors(name)), by_parts(*tensors(name)), strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(*(gradients(f, tensors(name))[0] for f in (function, by_parts)), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_written_where_they_belong(name):
    """No part is copied, nor are parts put together, as it is with views; one tensor has no room for more."""
    function, by_parts, _ = CALLS[name]
    moving = {"aten::stack", "aten::cat", "aten::copy_", "aten::clone", "aten::add"}
    assert gradients(by_parts, tensors(name))[1] & moving
    found, ran = gradients(function, tensors(name))
    assert "cute_flash::backward" in ran and not ran & moving
    for gradient in found:
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


def test_rows_of_no_sequence_have_gradient_0():
    (qkv,) = tensors("varlen_qkv")
    packed(qkv, STARTS.clamp(max=64))[0][:64].sum().backward()
    assert qkv.grad[:64].abs().sum() > 0 and not qkv.grad[64:].any()


def test_one_tensor_is_kept_for_its_parts():
    (qkv,) = tensors("qkv")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        cute_flash.flash_attn_qkvpacked_func(qkv)
    assert sorted(kept) == sorted([tuple(qkv.shape), (1, 70, 2, 64), (1, 2, 70)])


@pytest.mark.parametrize("name", ["qkv", "varlen_kv"])
def test_a_training_step_is_one_graph(name):
    function = CALLS[name][0]

    def step(*leaves):
        out, lse = function(*leaves)
        return out.float().square().mean() + lse.mean()

    eager, traced = tensors(name), tensors(name)
    step(*eager).backward()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*traced).backward()
    for one, other in zip(traced, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_autocast_casts_the_whole_tensor():
    (qkv,) = tensors("qkv", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cute_flash.flash_attn_qkvpacked_func(qkv)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and qkv.grad.dtype == torch.float32 and qkv.grad.abs().sum() > 0


def test_a_second_derivative_is_refused():
    (qkv,) = tensors("qkv")
    out = cute_flash.flash_attn_qkvpacked_func(qkv)
    (gradient,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_probabilities_come_as_from_parts():
    (qkv,) = (x.detach() for x in tensors("qkv"))
    found = cute_flash.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    expected = cute_flash.flash_attn_func(*qkv.unbind(2), return_attn_probs=True)
    assert len(found) == 3 and all(map(torch.equal, found, expected))


WRONG = {
    "type": (TypeError, "qkv is list", lambda qkv: cute_flash.flash_attn_qkvpacked_func([qkv])),
    "parts": (
        ValueError,
        r"qkv has shape \(1, 70, 2, 2, 64\); allowed: \(batch, seqlen, 3, heads, head_dim\)",
        lambda qkv: cute_flash.flash_attn_qkvpacked_func(qkv[:, :, :2]),
    ),
    "rank": (
        ValueError,
        r"kv has shape \(70, 3, 2, 64\); allowed: \(batch, seqlen, 2, heads, head_dim\)",
        lambda qkv: cute_flash.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[0]),
    ),
    "varlen": (
        ValueError,
        r"qkv has shape \(1, 70, 3, 2, 64\); allowed: \(total, 3, heads, head_dim\)",
        packed,
    ),
    "varlen_kv": (
        ValueError,
        r"kv has shape \(70, 3, 2, 64\); allowed: \(total, 2, heads, head_dim\)",
        lambda qkv: packed_kv(qkv[0, :, 0], qkv[0]),
    ),
    "dtype": (
        TypeError,
        "q has dtype torch.float64",
        lambda qkv: cute_flash.flash_attn_qkvpacked_func(qkv.double()),
    ),
    "probabilities": (
        NotImplementedError,
        "return_attn_probs is True",
        lambda qkv: cute_flash.flash_attn_varlen_qkvpacked_func(qkv[0], STARTS, 40, return_attn_probs=True),
    ),
    "out": (
        NotImplementedError,
        "out is given where a gradient is required",
        lambda qkv: cute_flash.flash_attn_qkvpacked_func(qkv, out=torch.empty_like(qkv[:, :, 0])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    error, words, call = WRONG[name]
    (qkv,) = tensors("qkv")
    with pytest.raises(error, match=words):
        call(qkv)

"""torch's own attention on cute_flash: operators, `varlen_attn`, gradients; and torch's again after it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import attention

import cute_flash
from cute_flash.integrations import torch_attention
from tests.accuracy import assert_accurate

if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch takes no implementations", allow_module_level=True)

from torch.nn.attention.varlen import AuxRequest, varlen_attn

FORWARD, BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"


@pytest.fixture
def active():
    torch_attention.activate()
    yield
    attention.restore_flash_attention_impl()


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def test_torch_has_its_own_before_and_after():
    before = {(name, key): has_kernel(name, key) for name in (FORWARD, BACKWARD) for key in ("CPU", "CUDA")}
    torch_attention.activate()
    assert attention.current_flash_attention_impl() == "cute_flash"
    assert all(has_kernel(*of) for of in before)
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert {of: has_kernel(*of) for of in before} == before
    torch_attention.activate()  # again
    attention.restore_flash_attention_impl()


def test_scaled_dot_product_attention(active):
    """The operator that it calls for CUDA tensors, (batch, heads, rows, dim), and its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 40, 64, generator=generator).bfloat16() for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with cute_flash.emulated("sm80"):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        found = torch.autograd.grad(out, (q, k, v), grad)
    rows = [x.detach().transpose(1, 2) for x in (q, k, v)]
    assert_accurate(out.detach().transpose(1, 2), lse, rows, causal=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    rounded = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        whole, plain = (
            torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True) for x in (exact, rounded)
        )
    wanted = torch.autograd.grad(whole, exact, grad.double())
    theirs = torch.autograd.grad(plain, rounded, grad)
    for mine, other, right in zip(found, theirs, wanted, strict=True):
        assert (mine - right).abs().max() <= 2 * (other - right).abs().max()


def test_varlen_attn(active):
    """Sequences of several lengths, KV heads that are shared, causal: `varlen_attn` itself."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(60, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    starts = torch.tensor([0, 20, 20, 60], dtype=torch.int32)
    with cute_flash.emulated("sm80"):
        told = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
        out, lse = varlen_attn(q, k, v, starts, starts, 40, 40, **told)
    assert_accurate(out, lse, (q, k, v), causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts)


def test_what_is_not_there_is_refused(active):
    x = torch.zeros(1, 2, 8, 64).half()
    with pytest.raises(RuntimeError, match="kernels run on CUDA devices"):
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)
    with cute_flash.emulated("sm80"), pytest.raises(NotImplementedError, match="return_debug_mask is True"):
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x, 0.0, False, True)


def test_an_older_torch_is_refused(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"allowed: 2\.13 or later"):
        torch_attention.activate()

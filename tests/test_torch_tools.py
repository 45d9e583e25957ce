"""What torch puts around a call: autocast, derivatives, vmap, counters, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import cute_flash
from cute_flash import ALiBi, launch
from cute_flash.arch.problem import Operands

attention, varlen = cute_flash.flash_attn_func, cute_flash.flash_attn_varlen_func
GENERATOR = torch.Generator().manual_seed(4)
Q, K, V = (torch.randn(2, n, h, 64, generator=GENERATOR).half() for n, h in ((8, 4), (16, 2), (16, 2)))
SLOPES = torch.rand(4)


@pytest.fixture(autouse=True)
def operands(monkeypatch):
    """Operands of every launch, whose result is zeros."""
    seen = []

    def executable(*key):
        def run(*given):
            seen.append(Operands(*given))
            seen[-1].out.zero_()

        return run

    monkeypatch.setattr(launch, "executable", executable)
    with cute_flash.emulated("sm80"):
        yield seen


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_casts_as_for_the_attention_of_torch(operands, to, given):
    q, k, v = (x.to(given) for x in (Q, K, V))
    with torch.autocast("cpu", dtype=to), torch.no_grad():
        expected = scaled_dot_product_attention(q[..., 0, :], k[:, :8, 0], v[:, :8, 0])
        out = attention(q, k, v)
        starts = torch.tensor([0, 8], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32)
        packed = varlen(q[0], k[0], v[0], *starts, 8, 16)
    assert out.dtype == packed.dtype == expected.dtype == to
    assert torch.equal(operands[0].k, k.to(to)) and torch.equal(operands[1].v, v[0].to(to))


def test_autocast_leaves_float64_and_other_devices_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="q has dtype .*float64"):
        attention(*(x.double() for x in (Q, K, V)))
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="q has dtype torch.float32"):
        attention(*(x.float() for x in (Q, K, V)))


def test_autocast_while_torch_compile_traces(operands):
    compiled = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert compiled(Q.float()).dtype == torch.bfloat16
    assert torch.equal(operands[0].q, Q.float().bfloat16())


def dual_alibi() -> None:
    with forward_ad.dual_level():
        slopes = forward_ad.make_dual(SLOPES, torch.ones(4))
        attention(Q, K, V, alibi_slopes=slopes)


TANGENTS = {
    "jvp": ("v", lambda: torch.func.jvp(lambda v: attention(Q, K, v), (V,), (V,))),
    "jvp_q": ("q", lambda: torch.func.jvp(lambda q: attention(q, K, V, causal=True), (Q,), (Q,))),
    "jacfwd": ("k", lambda: torch.func.jacfwd(lambda k: attention(Q, k, V))(K)),
    "linearize": ("q", lambda: torch.func.linearize(lambda q: attention(q, K, V), Q)),
    "sink": (
        "learnable_sink",
        lambda: torch.func.jvp(lambda s: attention(Q, K, V, learnable_sink=s), (SLOPES,), (SLOPES,)),
    ),
    "table": (
        r"ALiBi\.slopes",
        lambda: torch.func.jvp(lambda s: attention(Q, K, V, score=ALiBi(s)), (SLOPES,), (SLOPES,)),
    ),
    "dual": ("alibi_slopes", dual_alibi),
}


@pytest.mark.parametrize("name", TANGENTS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_tangent_is_refused(operands, name, grad):
    """Forward mode goes on inside torch.no_grad()."""
    named, call = TANGENTS[name]
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=f"{named} has a tangent"):
        call()
    assert len(operands) == (name == "linearize")  # which computes the value itself before


def test_what_has_no_tangent_goes_through_inside_forward_mode(operands):
    with forward_ad.dual_level():
        assert attention(Q, K, V).shape == Q.shape
    out, _ = torch.func.jvp(lambda x: x * attention(Q, K, V).sum(), (SLOPES,), (SLOPES,))
    assert out.shape == (4,) and len(operands) == 2


def test_reverse_mode_is_refused_in_transforms(operands):
    with pytest.raises(NotImplementedError, match="inside a transform of torch.func"):
        torch.func.grad(lambda q: attention(q, K, V).sum())(Q)


MAPPED = {
    "q": (lambda q: attention(q, K, V), torch.stack([Q, Q])),
    "out": (lambda out: attention(Q, K, V, out=out), torch.stack([Q, Q])),
    "slopes": (lambda slopes: attention(Q, K, V, alibi_slopes=slopes), torch.rand(3, 4)),
    "probabilities": (lambda k: attention(Q, k, V, return_attn_probs=True), torch.stack([K, K])),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_is_refused_by_name(operands, name):
    with pytest.raises(NotImplementedError, match="torch.vmap over cute_flash does not exist"):
        torch.vmap(MAPPED[name][0])(MAPPED[name][1])
    assert not operands


def test_flops_are_counted_as_for_the_attention_of_torch():
    q, k, v = (x.transpose(1, 2) for x in (Q, K.repeat_interleave(2, 2), V.repeat_interleave(2, 2)))
    with FlopCounterMode(display=False) as expected:
        torch.matmul(torch.matmul(q, k.mT), v)
    for options in ({}, {"causal": True}, {"out": torch.empty_like(Q)}, {"return_lse": True, "softcap": 2.0}):
        with FlopCounterMode(display=False) as counter:
            attention(Q, K, V, **options)
        assert counter.get_total_flops() == expected.get_total_flops() == 2 * 2 * 4 * 8 * 16 * (64 + 64)


def test_flops_of_packed_sequences_and_of_two_head_dims():
    starts = torch.tensor([0, 5, 16], dtype=torch.int32), torch.tensor([0, 12, 32], dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (Q, K, V[..., :32]))
    with FlopCounterMode(display=False) as counter:
        varlen(q, k, v, *starts, 11, 20)
    assert counter.get_total_flops() == 2 * 4 * (5 * 12 + 11 * 20) * (64 + 32)
    with FlopCounterMode(display=False) as counter:
        varlen(*(x.to("meta") for x in (q, k, v, *starts)), 11, 20)
    assert counter.get_total_flops() == 2 * 4 * (11 * 20 * 2) * (64 + 32)


def test_an_emulated_device_is_not_seen_by_other_threads():
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="for the thread that entered it"):
        pool.submit(attention, Q, K, V).result()


def test_head_dims_of_nothing_are_refused():
    for name, tensors in {"v": (Q, K, V[..., :0]), "q": (Q[..., :0], K[..., :0], V)}.items():
        with pytest.raises(ValueError, match=f"{name} has head_dim 0; allowed: 8 to 576 by 8"):
            attention(*tensors, return_lse=True)


def test_packed_rows_of_no_sequence_at_all(operands):
    """There is nothing to launch; what is returned is no memory that nobody has written."""
    for starts, longest in (([0], 9), ([0, 0, 0], 0)):
        cu = torch.tensor(starts, dtype=torch.int32)
        q = Q.flatten(0, 1)
        torch.full((1 << 20,), torch.nan)
        out, lse = varlen(q, q, q, cu, cu, longest, longest, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()
    assert not operands

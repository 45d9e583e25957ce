"""Gradients in FP8: those of a model of their arithmetic, every two features together, any order of events,
in registers, and what is told where there are none.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash.arch import sm90, sm100
from cute_flash.arch.sm90.fp8_backward import tuning as hopper
from cute_flash.arch.sm100.fp8_backward import tuning as blackwell
from cute_flash.dispatch import EMULATED
from cute_flash.fp8 import flash_attn_fp8_func, flash_attn_varlen_fp8_func
from cute_flash.problems import problem
from profiling import gradient_accuracy
from profiling.accuracy import Scheme
from profiling.gradient_accuracy import Rounding
from tests import reference
from tests.fp8_gradients import PAIRS, Fp8, Fp8Call, fullest, main_step
from tests.harness import moved, where
from tests.test_resources import assert_in_registers

KERNELS = {"sm90": sm90.QUANTIZED_BACKWARD, "sm100": sm100.QUANTIZED_BACKWARD}
TABLES = {"sm90": hopper.TABLE, "sm100": blackwell.TABLE}
HEAD_DIMS = {"sm90": 128, "sm100": 256}  # at most
FULLEST = (
    ("sm90", fullest("light", (32, 32))),
    ("sm90", fullest("even", (64, 64))),
    *(("sm90", fullest("heavy", dims)) for dims in ((64, 64), (96, 96), (128, 64), (128, 128))),
    ("sm90", fullest("blocks_heavy", (128, 128))),
    ("sm100", fullest("heavy", (64, 64))),
    ("sm100", fullest("light", (128, 128))),
    *(("sm100", fullest("heavy", dims)) for dims in ((128, 128), (192, 128), (192, 192), (256, 256))),
)
# Small, several visits and key tiles; heads that share keys; sums in parts; P apart; dQ over dP.
STRICT = {
    "causal": Fp8("causal", ((140, 270),), heads=(1, 1), mask="causal"),
    "shared": Fp8("shared", ((270, 140),), heads=(2, 1), dims=(128, 128)),
    "rows": Fp8("rows", ((140, 140),), heads=(1, 1), dims=(144, 80), mask="causal"),
    "keys": Fp8("keys", ((140, 140),), heads=(1, 1), dims=(192, 144), mask="window"),
    "score": Fp8("score", ((140, 70),), heads=(1, 1), score="softcap", sink=True),
}
ORDERS = {
    "late": {"asynchrony": "late"},
    "random": {"asynchrony": "random", "schedule": "random", "seed": 1},
}


@pytest.fixture(scope="module")
def device(machine) -> str:
    """Where there is a kernel: an emulated GPU, or the one at hand."""
    if machine == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10, 11) or machine in KERNELS:
        return machine
    pytest.skip("there are kernels for compute capabilities 9.0 to 11.0")


def is_hopper(device: str) -> bool:
    return device == "sm90" or (device == "cuda" and torch.cuda.get_device_capability()[0] == 9)


def case_of(cases: dict[str, Fp8], name: str, device: str) -> Fp8:
    """One that there is a kernel for."""
    if max(cases[name].dims) > HEAD_DIMS["sm90" if is_hopper(device) else "sm100"]:
        pytest.skip("there is a kernel for head dims up to 128")
    return cases[name]


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name, device):
    Fp8Call.make(case_of(PAIRS, name, device)).check_gradients(device)


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_events(name, order, device):
    if device == "cuda":
        pytest.skip("a GPU has its own order")
    case = case_of(STRICT, name, device)
    Fp8Call.make(case).check_gradients(device, races=True, by_the_book=True, **ORDERS[order])


@pytest.mark.parametrize("name", ["causal", "shared", "keys"])
def test_in_turns(name, device):
    """Right with one place for a CTA, each sum in one order."""
    if device == "cuda":
        pytest.skip("a GPU has its own order")
    case = replace(case_of(STRICT, name, device), heads=(2, 1), deterministic=True)
    Fp8Call.make(case).check_gradients(device, ctas_per_wave=1, races=True, ordered_reductions=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tree, case", FULLEST, ids=lambda x: f"{getattr(x, 'dims', x)}")
def test_nothing_spills(tree, case, deterministic, tmp_path):
    step = main_step(replace(case, deterministic=deterministic), tree)
    assert step.kernel.name == KERNELS[tree].name
    assert_in_registers(step, EMULATED[tree], tmp_path / "kernel.cubin")


@pytest.mark.parametrize("tree", KERNELS)
def test_every_row_of_the_table_has_a_case(tree):
    """One that gets its config, at the largest head dims that it is for."""
    steps = [(case, main_step(case, of)) for of, case in FULLEST if of == tree]
    for row in TABLES[tree].rows:
        largest = row.head_dim, row.head_dim_v
        assert any(case.dims == largest and step.config == row.config for case, step in steps), row


def forward_scheme(device: str, dims: tuple[int, int]) -> Scheme:
    """How the forward pass computes O there, plain or causal."""
    if not is_hopper(device):
        return Scheme(blackwell=True)
    asked = problem(dtype=torch.float8_e4m3fn, head_dim=dims[0], head_dim_v=dims[1], lse=True)
    return Scheme(tile=sm90.QUANTIZED.config(asked, EMULATED["sm90"]).tile_n)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 96)], ids=str)
def test_gradients_are_those_of_the_arithmetic(dims, causal, device):
    """Of rotated numbers, with P, dS and dO rounded where kernels round them.

    On Hopper the last bit of a sum in float16 may decide how a P is rounded, which a row of few keys shows.
    """
    close = 2e-2 if is_hopper(device) else 5e-3
    rows, keys = 150, 270
    shapes = ((rows, dims[0]), (keys, dims[0]), (keys, dims[1]), (rows, dims[1]))
    q, k, v, dout = (torch.randn(shape).half() for shape in shapes)
    leaves = [moved(x[None, :, None].clone(), device).requires_grad_() for x in (q, k, v)]
    with where(device):
        out = flash_attn_fp8_func(*leaves, causal=causal)
        found = torch.autograd.grad(out, leaves, moved(dout[None, :, None].clone(), device))
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows if causal else keys)
    given = (x.float() for x in (q, k, v, dout))
    rounding = Rounding(forward=forward_scheme(device, dims))
    wanted = gradient_accuracy.of_8_bits(*given, dims[0] ** -0.5, rounding, visible)
    exact = gradient_accuracy.exact(q, k, v, dout, dims[0] ** -0.5, visible)
    for one, model, right in zip(found, wanted, exact, strict=True):
        one = one.cpu()[0, :, 0].double()
        apart = (one - model).square().mean().sqrt() / right.square().mean().sqrt()
        error = (one - right).square().mean().sqrt() / right.square().mean().sqrt()
        assert apart < close and 0.02 < error < 0.12, f"{apart:.2e} of the model, {error:.2e} of all"


def leaves(device: str, *shape: int, count: int = 3, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [moved(torch.randn(shape).to(dtype), device).requires_grad_() for _ in range(count)]


def test_gradients_of_any_layout(device):
    """One that is the same number everywhere, and one whose rows are apart, are read as they are."""
    given = leaves(device, 1, 70, 2, 64)
    with where(device):
        out = flash_attn_fp8_func(*given)
        wanted = torch.autograd.grad(out, given, torch.ones_like(out), retain_graph=True)
        found = torch.autograd.grad(out.sum(), given, retain_graph=True)
        turned = torch.randn_like(out)
        apart = turned.transpose(1, 2).contiguous().transpose(1, 2)
        pairs = [torch.autograd.grad(out, given, x, retain_graph=True) for x in (turned, apart)]
    # Sums of dQ, dK and dV are added as they come: here, in one order.
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, *pairs))


def test_without_rows_or_keys(device):
    """Nothing to attend to has gradient 0."""
    q, k, v = (moved(torch.randn(1, n, 2, 64).bfloat16(), device).requires_grad_() for n in (5, 0, 0))
    with where(device):
        out, lse = flash_attn_fp8_func(q, k, v, return_lse=True)
        out.sum().backward()
    assert (out == 0).all() and lse.isneginf().all() and (q.grad == 0).all()


def test_rows_of_no_sequence(device):
    """Have gradient 0, from the log-sum-exp, too."""
    given, starts = leaves(device, 5, 2, 64), moved(torch.zeros(1, dtype=torch.int32), device)
    with where(device):
        out, lse = flash_attn_varlen_fp8_func(*given, starts, starts, 0, 0, return_lse=True)
        found = torch.autograd.grad((out, lse), given, (torch.ones_like(out), torch.ones_like(lse)))
    assert (out == 0).all() and lse.isneginf().all() and not any(x.any() for x in found)


def test_only_what_is_asked_for(device):
    """Where no gradient is, there is no graph; the sink's comes alone."""
    q, k, v = (x.detach() for x in leaves(device, 1, 70, 2, 64))
    with where(device):
        assert flash_attn_fp8_func(q, k, v).grad_fn is None
        sink = moved(torch.zeros(2), device).requires_grad_()
        flash_attn_fp8_func(q, k, v, learnable_sink=sink).sum().backward()
    assert sink.grad.shape == (2,) and sink.grad.isfinite().all() and (sink.grad != 0).all()


def test_memory_is_that_of_8_bits(device):
    """q, k and v are kept in bytes."""
    given, kept = leaves(device, 1, 70, 2, 64), []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with where(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        flash_attn_fp8_func(*given)
    assert sum(x.dtype is torch.uint8 for x in kept) == 3
    assert not {x.data_ptr() for x in kept} & {x.data_ptr() for x in given}


def test_scales_of_few_and_many(device):
    """Gradients of a dO, or a v, that is so many times as large are as many times as large, to the bit."""
    given = [x.detach() for x in leaves(device, 1, 70, 2, 64)]
    dout = moved(torch.randn(1, 70, 2, 64).bfloat16(), device)

    def gradients(factor: float, factor_v: float) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in given)
        with where(device):
            out = flash_attn_fp8_func(q, k, v * factor_v)
            return torch.autograd.grad(out, (q, k, v), dout * factor)

    wanted = gradients(1.0, 1.0)
    for factor in (2.0**-20, 2.0**12):
        for one, other in zip(gradients(factor, 1.0), wanted, strict=True):
            assert torch.equal(one, other * factor)
    for one, other in zip(gradients(1.0, 2.0**8), wanted, strict=True):
        assert torch.equal(one, other * 2.0**8)


@pytest.mark.parametrize("dout, dlse, values", [(0, 1, 1), (1, 2**14, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0)])
def test_gradients_of_the_log_sum_exp(dout, dlse, values, device):
    """Whatever its size beside dO's, and where nothing else has a part in dS."""
    given = [x.detach() for x in leaves(device, 2, 70, 2, 64)]
    given[2] *= values
    given = [x.requires_grad_() for x in given]
    dout = moved(dout * torch.randn(2, 70, 2, 64).bfloat16(), device)
    dlse = moved(dlse * torch.randn(2, 2, 70), device)
    with where(device):
        found = torch.autograd.grad(flash_attn_fp8_func(*given, return_lse=True), given, (dout, dlse))
    tensors = tuple(x.detach().cpu() for x in given)
    wanted = reference.gradients(tensors, dout.cpu(), dlse.cpu())
    for one, exact in zip(found, wanted, strict=True):
        error = (one.cpu() - exact).square().mean().sqrt()
        assert error <= 0.12 * exact.square().mean().sqrt()


def test_every_reason():
    """Refused when the call is made, not in the backward pass."""
    given = [x.requires_grad_() for x in torch.randn(3, 1, 20, 2, 64).bfloat16()]
    with cute_flash.emulated("sm80"), pytest.raises(NotImplementedError, match="no kernel for"):
        flash_attn_fp8_func(*given)
    odd = [x.detach()[..., :40].requires_grad_() for x in given]
    words = "head_dim 40 is not in 16.*; head_dim_v 40 is not in 16"
    with cute_flash.emulated("sm100"), pytest.raises(NotImplementedError, match=words):
        flash_attn_fp8_func(*odd)
    with cute_flash.emulated("sm100"), pytest.raises(TypeError, match="q has dtype .*float32"):
        flash_attn_fp8_func(*(x.float() for x in given))
    with pytest.raises(TypeError, match="hadamard is 1; allowed: True, False"):
        flash_attn_fp8_func(*given, hadamard=1)
    with pytest.raises(ValueError, match="seed is -1"):
        flash_attn_fp8_func(*given, seed=-1)
    answer = cute_flash.supports("float8_e5m2", 64, device="sm100", backward=True)
    assert not answer and "float8_e5m2 is not one of float8_e4m3fn" in str(answer)


def test_no_second_derivative(device):
    given = leaves(device, 1, 20, 2, 64)
    with where(device):
        out = flash_attn_fp8_func(*given)
        (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            grad.sum().backward()


def test_compiled_calls_have_no_break(device):
    """And the same bits."""
    given, dout = leaves(device, 1, 70, 2, 64), moved(torch.randn(1, 70, 2, 64).bfloat16(), device)

    def function(q, k, v):
        return flash_attn_fp8_func(2 * q, k, v, causal=True, deterministic=True) + 1

    with where(device):
        wanted = torch.autograd.grad(function(*given), given, dout)
        traced = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(traced(*given), given, dout)
    assert all(map(torch.equal, found, wanted))


def test_packed_sequences_share_scales(device):
    """As one sequence alone that has the largest numbers of all."""
    q, k, v = (x.detach() for x in leaves(device, 90, 2, 64))
    for x in (q, k, v):
        x[[0, 50], :, 0] = 8.0
    starts = moved(torch.tensor([0, 50, 90]).int(), device)
    with where(device):
        options = {"causal": True, "hadamard": False}
        out = flash_attn_varlen_fp8_func(q, k, v, starts, starts, 50, 50, **options)
        for rows in (slice(0, 50), slice(50, 90)):
            alone = flash_attn_fp8_func(*(x[None, rows] for x in (q, k, v)), **options)
            assert torch.equal(alone[0], out[rows])


def test_options_reach_the_kernel(device):
    """Each changes the result."""
    given = [x.detach() for x in leaves(device, 1, 40, 2, 64)]
    with where(device):
        plain = flash_attn_fp8_func(*given)
        assert torch.equal(flash_attn_fp8_func(*given, softmax_scale=0.125), plain)
        assert not torch.equal(flash_attn_fp8_func(*given, softmax_scale=0.25), plain)
        assert not torch.equal(flash_attn_fp8_func(*given, seed=1), plain)
        assert not torch.equal(flash_attn_fp8_func(*given, hadamard=False), plain)

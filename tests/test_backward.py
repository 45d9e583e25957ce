"""Gradients: every feature held to the accuracy rule, any order of events, and what torch asks of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cute_flash
from cute_flash import ALiBi, dispatch
from cute_flash.arch.backward import BackwardProblem, first_scratch_row, scratch_columns, scratch_rows
from cute_flash.arch.problem import Problem
from cute_flash.arch.sm80.backward.tuning import BACKWARD, Row
from cute_flash.arch.sm80.tuning import register_pressure
from cute_flash.dispatch import EMULATED
from tests.cases import CASES, PAIRED, Case
from tests.gradient_cases import PAIRS, ROWS, SINGLES, main_step, of_row, steps_of
from tests.harness import Call
from tests.orders import hold_gradients
from tests.test_resources import assert_in_registers

NAMES = (*SINGLES, *PAIRS)
PADDED = next(name for name in PAIRS if "_40_40_" in name)  # head dims that are no whole columns
STRICT = ("float16", PADDED, "used_qk_causal", "heads_6_2", "dropout_0.5", "blocks_random_causal")
PLAIN = Case("plain", ((65, 70),), heads=(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    Call.make(CASES[name]).check_gradients("sm80")


@pytest.mark.parametrize("device, extreme, dims", ROWS)
def test_every_row_of_the_table(device, extreme, dims, tmp_path):
    """Right, and without a spilled register."""
    case = of_row(extreme, dims)
    Call.make(case).check_gradients(device)
    assert_no_spills(case, device, tmp_path)


def test_other_devices_use_the_same_kernels():
    assert main_step(PLAIN, "sm120").kernel.name == "sm80.backward"
    Call.make(PLAIN).check_gradients("sm120")


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize(
    "options",
    [
        {"asynchrony": "late", "races": True},
        {"asynchrony": "random", "schedule": "random", "seed": 1, "races": True},
        {"asynchrony": "late", "schedule": "random", "seed": 2},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_any_order_of_events(name, options, proven):
    hold_gradients(CASES[name], "sm80", proven, **options)


@pytest.mark.parametrize("name", NAMES)
def test_no_registers_spill(name, tmp_path):
    assert_no_spills(CASES[name], "sm80", tmp_path)


def assert_no_spills(case: Case, device: str, folder: Path) -> None:
    """Of all kernels that a case's gradients launch."""
    for step in steps_of(case, device):
        assert_in_registers(step, EMULATED[device], folder / "kernel.cubin")


def test_every_row_of_the_table_has_a_case():
    """One that it serves, at the largest head dims that it is for."""
    served = {
        row_that_serves(case, device)
        for case, device in ((of_row(extreme, dims), device) for device, extreme, dims in ROWS)
    }
    assert served == set(BACKWARD)


def row_that_serves(case: Case, device: str) -> Row | None:
    """The row of the table whose config a case gets, if it has the largest head dims that the row is for."""
    main, largest = main_step(case, device), max(case.dims)
    pressure = register_pressure(main.problem.forward, EMULATED[device])
    fitting = (row for row in BACKWARD if row.config == main.config and pressure <= row.pressure)
    row = next(row for row in fitting if largest <= row.head_dim)
    return row if row.head_dim == largest else None


def test_the_cases_have_what_they_are_to_have():
    """Every value that is paired, and every head dim in a pair."""
    cases = [CASES[name] for name in NAMES]
    for name in ("mask", "score", "dropout", "sink", "dtype", "dims", "layout"):
        assert {getattr(case, name) for case in cases} >= set(PAIRED[name]), name
    rows = {(False, ""), (True, ""), (True, "k"), (True, "qk")}
    assert {(case.varlen, case.used) for case in cases} >= rows


@pytest.mark.parametrize("lengths", list(itertools.product((0, 1, 127, 128, 129, 300), repeat=3)), ids=str)
def test_scratch_rows_of_sequences_do_not_meet(lengths):
    """Whole tiles for every sequence, one after the other, inside of what is allocated."""
    start, free = 0, 0
    for batch, length in enumerate(lengths):
        first = first_scratch_row(start, batch)
        assert first % 128 == 0 and first >= free
        start, free = start + length, first + -(-length // 128) * 128
    assert free <= scratch_rows(start, len(lengths))


@pytest.mark.parametrize("device", ["sm80", "sm86"])
def test_every_pair_of_head_dims_has_tiles_that_warps_share_out(device):
    """Whole pieces of 16 x 16 for every warp, in all products."""
    for dim, dim_v, dropout in itertools.product(range(8, 257, 8), range(8, 257, 8), (False, True)):
        problem = BackwardProblem(Problem("float16", dim, dim_v, dropout=dropout))
        config = dispatch.dispatch(problem, EMULATED[device])[1]
        columns, columns_v = scratch_columns(dim), scratch_columns(dim_v)
        for (rows, across), tile in (
            (config.grid_s, (config.tile_m, config.tile_n)),
            (config.grid_k(columns), (config.tile_n, columns)),
            (config.grid_k(columns_v), (config.tile_n, columns_v)),
            (config.grid_q(columns), (config.tile_m, columns)),
        ):
            assert rows * across == config.warps
            assert tile[0] % (16 * rows) == 0 and tile[1] % (16 * across) == 0, (dim, dim_v, config)


def test_scratch_columns():
    assert [scratch_columns(d) for d in (8, 32, 40, 128, 136, 192, 256)] == [32, 32, 64, 128, 192, 192, 256]


@pytest.fixture
def leaves():
    """q, k and v that require gradients, where an A100 is emulated."""
    tensors = [x.requires_grad_() for x in Call.make(PLAIN).tensors.values()]
    with cute_flash.emulated("sm80"):
        yield tensors


def test_a_constant_gradient_is_read(leaves):
    """That of a sum has stride 0 everywhere, which no kernel reads in place."""
    out = cute_flash.flash_attn_func(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    found = torch.autograd.grad(out.sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


STRIDES = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows_last": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "every_other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("name", STRIDES)
def test_a_gradient_of_any_strides_is_read(leaves, name):
    """In place or by a copy: its maker is autograd, not the user."""
    out = cute_flash.flash_attn_func(*leaves)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    expected = torch.autograd.grad(out, leaves, given, retain_graph=True)
    for one, other in zip(torch.autograd.grad(out, leaves, STRIDES[name](given)), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_add_up_over_a_graph_that_is_kept(leaves):
    out = cute_flash.flash_attn_func(*leaves, 0.3)
    once = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    for x, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient)


def test_gradients_under_autocast_have_the_dtype_of_the_leaves(leaves):
    wide = [x.detach().float().requires_grad_() for x in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cute_flash.flash_attn_func(*wide)
    out.sum().backward()
    cute_flash.flash_attn_func(*leaves).sum().backward()
    for one, other in zip(wide, leaves, strict=True):
        assert one.grad.dtype == torch.float32 and one.grad.any()
        torch.testing.assert_close(one.grad, other.grad.float())


def test_gradients_of_the_log_sum_exp_alone(leaves):
    q, k, _ = leaves
    _, lse = cute_flash.flash_attn_func(*leaves, return_lse=True)
    found = torch.autograd.grad(lse.sum(), leaves)
    exact_q, exact_k = (x.detach().double().requires_grad_() for x in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", exact_q, exact_k) / 8
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (exact_q, exact_k))
    for one, other in zip(found, (*expected, torch.zeros_like(found[2])), strict=False):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-2, rtol=1e-2)


def test_only_what_is_asked_for(leaves):
    q, k, v = leaves
    out = cute_flash.flash_attn_func(q, k.detach(), v.detach())
    out.sum().backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and v.grad is None


def test_parts_of_one_tensor(leaves):
    """Views of packed q, k, v: their gradients meet in the packed tensor."""
    packed = torch.stack([x.detach()[:, :60] for x in leaves], 2).requires_grad_()
    cute_flash.flash_attn_func(*packed.unbind(2), causal=True).sum().backward()
    apart = [x.detach().clone().requires_grad_() for x in packed.unbind(2)]
    cute_flash.flash_attn_func(*apart, causal=True).sum().backward()
    for i, tensor in enumerate(apart):
        torch.testing.assert_close(packed.grad[:, :, i], tensor.grad)


def test_a_checkpoint_computes_the_forward_pass_again(leaves):
    """With dropout: the same mask, from the generator's state that the checkpoint restores."""
    found = []
    attention = cute_flash.flash_attn_func
    for run in (attention, lambda *given: checkpoint(attention, *given, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(*leaves, 0.3)
        found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_kept_without_a_gradient(leaves):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert cute_flash.flash_attn_func(*leaves).grad_fn is None
        assert cute_flash.flash_attn_func(*(x.detach() for x in leaves)).grad_fn is None
        assert not kept
        cute_flash.flash_attn_func(*leaves)
        assert kept


def test_what_is_kept_grows_with_the_rows(leaves):
    """q, k, v, out and the log-sum-exp: nothing of the size of the scores."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cute_flash.flash_attn_func(*leaves)
    q, k, v = (x.numel() for x in leaves)
    assert sum(kept) == 2 * q + k + v + q // 64


def test_a_training_step_is_one_graph(leaves):
    def step(*tensors):
        return cute_flash.flash_attn_func(*tensors, causal=True).float().square().mean()

    step(*leaves).backward()
    expected = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for one, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(one.grad, other)


def batched(q, k, v):
    """Several gradients of one graph at once: vmap over the backward pass."""
    out = cute_flash.flash_attn_func(q, k, v)
    torch.autograd.grad(out, q, torch.stack([out, out]).detach(), is_grads_batched=True)


REFUSED = {
    "batched": (batched, "torch.vmap over cute_flash does not exist"),
    "vmap": (
        lambda q, k, v: torch.vmap(cute_flash.flash_attn_func)(*(torch.stack([x, x]) for x in (q, k, v))),
        "torch.vmap over cute_flash does not exist|a transform of torch.func",
    ),
    "tangent": (
        lambda q, k, v: torch.func.jvp(lambda q: cute_flash.flash_attn_func(q, k, v), (q,), (q,)),
        "q has a tangent",
    ),
    "second": (
        lambda q, k, v: torch.autograd.grad(
            torch.autograd.grad(cute_flash.flash_attn_func(q, k, v).sum(), q, create_graph=True)[0].sum(), q
        ),
        "no second derivative",
    ),
    "out": (
        lambda q, k, v: cute_flash.flash_attn_func(q, k, v, out=torch.empty_like(q)),
        "out is given where a gradient is required",
    ),
    "table": (
        lambda q, k, v: cute_flash.flash_attn_func(q, k, v, score=ALiBi(torch.ones(2).requires_grad_())),
        "a rule's tensors get none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, leaves):
    call, words = REFUSED[name]
    with pytest.raises(NotImplementedError, match=words):
        call(*leaves)

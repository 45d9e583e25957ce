"""Blackwell's own backward kernel: right, in registers, in any order of events; what it leaves to others.

Parallel to tests/test_sm90_backward.py, and as sparing: cases share kernels, and are small where several show
one thing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import cute_flash
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.problem import Device, Problem
from cute_flash.arch.sm100 import BACKWARD
from cute_flash.arch.sm100.backward.plan import PairPlan, Plan, SerialPlan, WidePlan
from cute_flash.arch.sm100.backward.tuning import BACKWARD as ROWS
from cute_flash.arch.sm100.backward.tuning import Config
from cute_flash.arch.sm100.tmem import LANE
from cute_flash.arch.sm100.tuning import register_pressure
from cute_flash.dispatch import EMULATED
from tests.cases import CASES, Case
from tests.gradient_cases import ORDERS, assert_in_turns, assert_served, main_step, of_row, steps_of
from tests.harness import Call
from tests.test_resources import EXTREMES, assert_in_registers

DEVICE = EMULATED["sm100"]
NAMES = (
    "dims_128_8", "lengths_257_129", "lengths_5_0", "lengths_0_5", "lengths_127_257_causal",
    "lengths_200_1_causal", "batch_0", "mask_function", "heads_6_2", "used_qk_causal", "dropout_0.5",
    "sink_without_keys", "score_softcap", "score_hides", "blocks_random_causal", "scores_near_overflow",
    "rows_without_keys", "layout_sliced",
)  # fmt: skip
# The most that rows of the table may be asked, at the largest head dims that they serve.
FULLEST = (
    of_row("light", (64, 64)),
    of_row("heavy", (64, 64)),
    of_row("light", (128, 128)),
    replace(of_row("heavy", (128, 128)), mask="window"),
    replace(of_row("heavy", (128, 128)), heads=(2, 1), seqlens=((150, 300), (20, 130))),
    *(
        replace(EXTREMES["heavy"], dims=dims, heads=(2, 1), seqlens=((70, 150), (20, 30)))
        for dims in ((192, 128), (256, 256))
    ),
    *(
        replace(EXTREMES["heavy"], dims=dims, mask="window", seqlens=((70, 150),))
        for dims in ((192, 128), (192, 192), (256, 256))
    ),
    replace(EXTREMES["blocks_heavy"], dims=(256, 256), blocks="small", heads=(2, 1), seqlens=((70, 150),)),
)
# Head dims that are no whole tile: of 128 rows and keys, of 64 rows, of 64 keys, of pairs. One CTA of these
# has no keys.
PAIRED = (104, 128), (136, 104), (200, 136)
WIDE = {
    dims: Case("wide", ((130, 300 if dims in PAIRED else 140),), heads=(1, 1), dims=dims, mask="causal")
    for dims in ((96, 104), (136, 72), (72, 136), *PAIRED)
}
# Of 64 keys with dQ in parts, which sees a window.
PARTS = Case("parts", ((130, 140),), heads=(1, 1), dims=(200, 136), mask="window")
# Small, of kernels that NAMES has: several visits, heads that share keys, several key tiles, dQ over dP.
STRICT = {
    "causal": replace(CASES["lengths_127_257_causal"], heads=(1, 1)),
    "shared": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),)),
    "dropout": replace(CASES["dropout_0.5"], heads=(1, 1), seqlens=((140, 70),)),
    "at_once": replace(CASES["dims_128_8"], heads=(1, 1), seqlens=((270, 140),)),
    "rows": WIDE[136, 72],
    "keys": WIDE[72, 136],
    "parts": PARTS,
    "pair": WIDE[104, 128],
    "serial": WIDE[136, 104],
    "wide": WIDE[200, 136],
}
IN_TURNS = {
    "keys": replace(CASES["lengths_127_257_causal"], heads=(1, 1), deterministic=True),
    "heads": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),), deterministic=True),
    "rows": Case("rows", ((70, 140),), heads=(2, 1), dims=(136, 72), deterministic=True),
    "parts": replace(PARTS, seqlens=((140, 70),), heads=(2, 1), deterministic=True),
    "pair": Case("pair", ((140, 300),), heads=(2, 1), dims=(128, 128), deterministic=True),
    "serial": Case("serial", ((140, 300),), heads=(2, 1), dims=(136, 104), deterministic=True),
    "wide": Case("wide", ((140, 150),), heads=(2, 1), dims=(200, 136), deterministic=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, tmp_path):
    assert_served(CASES[name], "sm100", BACKWARD, tmp_path)


@pytest.mark.parametrize("case", FULLEST, ids=lambda x: f"{x.dims}_{x.mask}_{x.dropout}_{x.blocks}")
def test_every_row_of_the_table(case, tmp_path):
    assert_served(case, "sm100", BACKWARD, tmp_path)


@pytest.mark.parametrize("dims", WIDE, ids=str)
def test_head_dims_that_are_no_whole_tile(dims, tmp_path):
    assert_served(WIDE[dims], "sm100", BACKWARD, tmp_path)


def test_every_row_of_the_table_has_a_case():
    """One that it serves, at the largest head dims that it is for, and asks for the most."""
    assert {row_that_serves(case) for case in FULLEST} == set(ROWS)


def row_that_serves(case: Case):
    """The row of the table whose config a case gets, if its head dims are the row's."""
    main = main_step(case, "sm100")
    pressure = register_pressure(main.problem.forward, DEVICE)
    rows = (row for row in ROWS if row.config == main.config and pressure <= row.pressure)
    return next(row for row in rows if case.dims == (row.head_dim, row.head_dim_v))


@pytest.mark.parametrize(
    "capability, case",
    [((10, 3), FULLEST[2]), *(((11, 0), case) for case in FULLEST[2:])],
    ids=lambda x: f"{x.dims}_{x.mask}_{x.dropout}" if isinstance(x, Case) else str(x),
)
def test_other_blackwells(capability, case, tmp_path):
    """Their code is other code: with rows of the table that leave fewest registers, it spills nothing."""
    device = Device(capability, DEVICE.shared_memory)
    step = main_step(case, "sm100")
    config = BACKWARD.config(step.problem, device)
    assert_in_registers(step._replace(config=config), device, tmp_path / "kernel.cubin")


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_events(name, order):
    Call.make(STRICT[name]).check_gradients("sm100", races=True, by_the_book=True, **ORDERS[order])


@pytest.mark.parametrize("name", IN_TURNS)
def test_in_turns(name, tmp_path):
    ctas = main_step(IN_TURNS[name], "sm100").config.ctas
    assert_in_turns(IN_TURNS[name], "sm100", BACKWARD, tmp_path, ctas=ctas)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (192, 128)], ids=str)
def test_block_masks_of_small_blocks_are_served(dims, block_size):
    """What has blocks of 64 rows or keys takes tiles of 64."""
    asked = Problem("float16", *dims, block_size=block_size)
    config = BACKWARD.config(BackwardProblem(asked), DEVICE)
    assert asked.takes_tiles(config.tile_m, config.tile_n)


def test_what_it_does_not_serve_falls_to_the_sm80_kernel():
    """By name, with a reason."""
    answer = cute_flash.supports("float16", device="sm100", backward=True, head_dim=64, block_size=(32, 64))
    allowed = "multiples of (64, 64), (64, 128), (128, 64), (128, 128)"
    reason = f"block_size (32, 64) is a multiple of no tile; allowed: {allowed}"
    assert answer.kernel.name == "sm80.backward" and answer.refusals == (("sm100.backward", (reason,)),)


def test_registers_that_are_not_launched_are_refused():
    with pytest.raises(ValueError, match="520 registers, a thread of each warpgroup, are not launched"):
        Config(store_registers=88, compute_registers=184, other_registers=64)


def test_tensor_memory_is_what_sums_and_scores_take():
    """Up to 64 columns P and dQ have columns of their own; at 128 they lie over S and dP. All are taken."""
    narrow, wide = Plan(64, 64, p_apart=True), Plan(128, 128)
    assert narrow.apart and narrow.regions.used == 2 * 128 + 4 * 64 == narrow.allocated == 512
    assert not wide.apart and wide.regions.used == wide.allocated == 512
    assert [region.name for region in wide.regions.sharing("dp")] == ["dp", "ds", "grad_q"]
    assert wide.half("p", 1) - wide.at("s") == 64 and narrow.half("p", 1) - narrow.at("p") == 32
    with pytest.raises(ValueError, match="takes 576 columns of tensor memory, there are 512"):
        Plan(128, 192)


def test_tensor_memory_of_64_rows():
    """S and dP take half as many columns; dQ, over dP, half of the lanes for either half of its columns."""
    plan = Plan(192, 128, rows=64)
    assert plan.regions.used == 192 + 128 + 64 + 192 // 2 and plan.sides == 2 and not plan.apart
    assert plan.side(0) == plan.at("dp") == plan.side(1) - 16 * LANE
    with pytest.raises(ValueError, match="takes 544 columns of tensor memory, there are 512"):
        Plan(192, 192, rows=64)


@pytest.mark.parametrize("columns, columns_v, fillings", [(192, 192, 1), (256, 256, 2), (192, 256, 2)])
def test_tensor_memory_of_64_keys(columns, columns_v, fillings):
    """dP, dS and dK lie beside S, P and dV, in the other lanes, as operands and results of products must."""
    plan, most = Plan(columns, columns_v, keys=64), max(columns, columns_v)
    assert plan.fillings == fillings and plan.columns_at_once * fillings == columns
    assert plan.regions.used == 128 + most + columns // fillings <= 512
    for first, other in (("s", "dp"), ("p", "ds"), ("grad_v", "grad_k")):
        assert plan.at(first) + 16 * LANE == plan.at(other)
    assert [set(one.places()) & set(other.places()) for one, other in [plan.stacks]] == [{"grad_q"}]


def test_tensor_memory_of_a_pair():
    """P lies at both ends of S, so that dQ fits between."""
    plan = PairPlan(128, 128)
    p = [(plan.half("p", i), plan.half("p", i) + 32) for i in (0, 1)]
    assert p == [(plan.at("s"), plan.at("grad_q")), (plan.at("grad_q") + 64, plan.at("dp"))]
    assert plan.at("dp") == 128 and plan.regions.used == 512 and plan.columns_at_once == 64


def test_tensor_memory_of_a_pair_with_little_room():
    """dP begins in the second half of S, of which P takes the first. dQ comes in two fillings, beyond S."""
    plan = SerialPlan(192, 128)
    s = plan.at("s")
    assert plan.regions.used == 512 and (plan.at("dp"), plan.at("grad_q")) == (s + 64, s + 128)
    assert [plan.half("p", i) for i in (0, 1)] == [s, s + 32] and plan.half("ds", 1) == s + 128
    assert [plan.width(i) for i in (0, 1)] == [64, 32] and plan.grad_q_shape(1) == (64, 64)
    assert [plan.column(i, side) for i in (0, 1) for side in (0, 1)] == [0, 96, 64, 160]


def test_tensor_memory_of_a_pair_for_wide_heads():
    """Nothing lies over anything: accumulators take half as many columns as they have."""
    plan = WidePlan(256, 256)
    places = [plan.at(name) for name in ("s", "dp", "grad_v", "grad_k", "grad_q")]
    assert places == [0, 64, 128, 256, 384] and plan.regions.used == plan.allocated == 512
    assert plan.half("s", 1) == 32 and plan.half("dp", 1) == 96 and plan.grad_q_shape(0) == (64, 256)


@pytest.mark.parametrize(
    "mask, ctas", [("full", 2), ("causal", 2), ("window", 1), ("document_causal", 2)], ids=str
)
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (256, 256)], ids=str)
def test_windows_are_not_for_pairs(mask, ctas, dims):
    case = Case("pairs", dims=dims, mask=mask)
    assert main_step(case, "sm100").config.ctas == ctas


@pytest.mark.parametrize(
    "dims, kib",
    [
        ((96, 128), 24 + 32 + 2 * 24 + 32 + 32 + 2 * 16 + 2),
        ((128, 128), 3 * 32 + 4 * 16 + 3 * 16 + 2 * 8 + 2),
        ((192, 64), 48 + 16 + 2 * 24 + 2 * 8 + 16 + 4 * 8 + 1),
        ((192, 128), 2 * 48 + 32 + 24 + 16 + 3 * 16 + 2 * 4 + 2),
        ((192, 192), 5 * 24 + 16 + 16 + 16 + 2 * 8 + 2),
        ((256, 256), 5 * 32 + 16 + 16 + 16 + 2 * 8 + 2),
    ],
    ids=str,
)
def test_shared_memory_is_what_tiles_take(dims, kib):
    """K, V, tiles of Q and of dO, dS, parts of dQ in fp32, and the rows' numbers: all that there is.

    A pair's CTA has half of Q and of dO in either form, beyond 128 in one at a time, columns of K, and of dS
    what it sends besides; for wide heads P, too.
    """
    problem = BackwardProblem(Problem("float16", *dims))
    config = BACKWARD.config(problem, DEVICE)
    assert config.shared_memory(problem) == kib * 1024 + 1024 <= DEVICE.shared_memory
    assert [region.name for region in config.regions(problem.forward).sharing("ds")] == ["ds", "shared_sums"]


@pytest.mark.parametrize("name, side, rows", [("rows", "q", 64), ("rows", "k", 128), ("parts", "k", 64)])
def test_sums_lie_as_the_postprocess_reads_them(name, side, rows):
    """As many warps' 16 rows below each other as a tile has, in whole tiles of scratch."""
    steps = steps_of(IN_TURNS[name], "sm100")[2:]
    found = [step.config for step in steps if step.problem.side == side]
    assert found and {step.kernel.name for step in steps} == {"sm80.postprocess"}
    assert all((config.rows, config.threads) == (rows, 2 * rows) for config in found)

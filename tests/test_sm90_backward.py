"""Hopper's own backward kernel: right, in registers, in any order of events; what it leaves to others.

A main kernel takes longer to compile here than anywhere else: the cases share as few as show every feature,
every way in which a tile is not whole, and every row of the table at its fullest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import cute_flash
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.problem import Problem
from cute_flash.arch.sm90 import BACKWARD, SUMS
from cute_flash.arch.sm90.backward.tuning import BACKWARD as ROWS
from cute_flash.arch.sm90.backward.tuning import Config, PairConfig, register_pressure
from cute_flash.dispatch import EMULATED
from tests.cases import CASES, Case
from tests.gradient_cases import ORDERS, assert_in_turns, assert_served, main_step, of_row, steps_of
from tests.harness import Call
from tests.test_resources import EXTREMES

DEVICE = EMULATED["sm90"]
NAMES = (
    "float16", "dims_128_8", "lengths_257_129", "lengths_5_0", "lengths_0_5", "lengths_127_257_causal",
    "lengths_200_1_causal", "batch_0", "mask_function", "heads_6_2", "varlen_causal", "used_qk_causal",
    "dropout_0.5", "sink_without_keys", "score_softcap", "score_hides", "blocks_random_causal",
    "scores_near_overflow", "rows_without_keys", "layout_sliced",
)  # fmt: skip
UNDROPPED = replace(EXTREMES["heavy"], dropout=0.0)
# A case for each row of the table: the most that a call may ask of it, at the largest head dims it serves.
# Beyond 128 there is little of it to compute.
FULLEST = (
    of_row("light", (32, 32)),
    of_row("light", (64, 64)),
    of_row("heavy", (64, 64)),
    of_row("heavy", (96, 96)),
    of_row("heavy", (128, 64)),
    of_row("light", (128, 128)),
    replace(UNDROPPED, dims=(128, 128)),
    of_row("heavy", (128, 128)),
    of_row("blocks_heavy", (128, 128)),
    *(
        replace(case, dims=dims, heads=(2, 1), seqlens=((70, 150), (20, 30)))
        for case, dims in (
            (EXTREMES["light"], (192, 128)),
            (UNDROPPED, (192, 128)),
            (UNDROPPED, (128, 256)),
            (UNDROPPED, (192, 192)),
            (EXTREMES["light"], (256, 256)),
            (UNDROPPED, (256, 256)),
            (EXTREMES["heavy"], (192, 192)),
            (EXTREMES["heavy"], (256, 256)),
        )
    ),
    *(
        replace(EXTREMES["blocks_heavy"], dims=dims, blocks="small", heads=(2, 1), seqlens=((70, 150),))
        for dims in ((128, 128), (192, 192), (256, 256))
    ),
)
WIDE = Case("wide", ((150, 200),), heads=(1, 1), dims=(96, 104), mask="causal")
# Small, of kernels that NAMES has: several visits, heads that share keys, and several key tiles.
STRICT = {
    "causal": replace(CASES["lengths_127_257_causal"], heads=(1, 1)),
    "shared": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),)),
    "dropout": replace(CASES["dropout_0.5"], heads=(1, 1), seqlens=((140, 70),)),
    "wide": replace(CASES["dims_192_192"], heads=(1, 1), seqlens=((130, 100),)),
    "pair": replace(CASES["dims_256_256"], heads=(1, 1), seqlens=((130, 90),)),
}
IN_TURNS = {
    "keys": replace(CASES["lengths_127_257_causal"], heads=(1, 1), deterministic=True),
    "heads": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),), deterministic=True),
    "columns": Case("columns", ((40, 70),), heads=(2, 1), dims=(96, 96), mask="causal", deterministic=True),
    # The last CTA of either pair has no keys, and no scratch rows.
    "pair": Case("pair", ((70, 230),), heads=(2, 1), dims=(192, 128), mask="causal", deterministic=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, tmp_path):
    assert_served(CASES[name], "sm90", BACKWARD, tmp_path)


def named(case: Case) -> str:
    return f"{case.dims}_{case.score}_{case.dropout}_{case.blocks}"


@pytest.mark.parametrize("case", FULLEST, ids=named)
def test_every_row_of_the_table(case, tmp_path):
    assert_served(case, "sm90", BACKWARD, tmp_path)


def test_head_dims_that_are_no_whole_tile(tmp_path):
    assert_served(WIDE, "sm90", BACKWARD, tmp_path)


def test_every_row_of_the_table_has_a_case():
    """One that it serves, at the largest head dims that it is for."""
    assert {row_that_serves(case) for case in FULLEST} == set(ROWS)


def row_that_serves(case: Case):
    """The row of the table whose config a case gets, if its head dims are the row's."""
    main = main_step(case, "sm90")
    pressure = register_pressure(main.problem.forward)
    rows = (row for row in ROWS if row.config == main.config and pressure <= row.pressure)
    return next(row for row in rows if (row.head_dim, row.head_dim_v) == case.dims)


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_events(name, order):
    Call.make(STRICT[name]).check_gradients("sm90", races=True, by_the_book=True, **ORDERS[order])


@pytest.mark.parametrize("name", IN_TURNS)
def test_in_turns(name, tmp_path):
    assert_in_turns(IN_TURNS[name], "sm90", BACKWARD, tmp_path, main_step(IN_TURNS[name], "sm90").config.ctas)


def test_what_it_does_not_serve_falls_to_the_sm80_kernel():
    """By name, with a reason."""
    reason = (
        "block_size (128, 32) is a multiple of no tile; allowed: multiples of (64, 64), (64, 96), (64, 128), "
        "(64, 160), (64, 192), (64, 224), (128, 128)"
    )
    answer = cute_flash.supports("float16", 64, device="sm90", backward=True, block_size=(128, 32))
    assert answer.kernel.name == "sm80.backward" and answer.refusals == (("sm90.backward", (reason,)),)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tile_m": 96}, "2 warpgroups cannot share out dQ"),
        ({"columns": 80}, "2 warpgroups cannot share out dQ"),
        ({"tile_m": 128, "columns": 64, "columns_v": 128}, "leave fewer than 40 registers"),
        ({"producer_registers": 32}, "512 registers, a thread of each warpgroup, are not launched"),
    ],
    ids=["dq_rows", "dq_columns", "accumulators", "setmaxnreg"],
)
def test_a_row_that_breaks_its_arithmetic_is_refused(changes, said):
    row = {"tile_m": 64, "columns": 128, "columns_v": 128}
    assert Config(**row).registers() == {"S and dP": 192, "dV, dQ and dK": 192}
    with pytest.raises(ValueError, match=said):
        Config(**row | changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"keys": 44}, "44 is no multiple of 8"),
        ({"keys": 48}, "leave fewer than 40 registers"),
        ({"slice_columns": 48}, "64 is no multiple of 48"),
        ({"handed_columns": 48}, "64 is no multiple of 48"),
    ],
    ids=["keys", "accumulators", "slice", "handed"],
)
def test_a_wide_row_that_breaks_its_arithmetic_is_refused(changes, said):
    row = {"columns": 256, "columns_v": 256, "keys": 40, "slice_columns": 64, "handed_columns": 32}
    assert PairConfig(**row).registers() == {"S and dP": 200, "dV, dQ and dK": 192}
    with pytest.raises(ValueError, match=said):
        PairConfig(**row | changes)


def test_a_pair_has_both_ctas_keys_and_room_for_what_it_exchanges():
    """K, V, Q, dO, P and dS of 80 keys; half of the other's K, and its dS; dQ in fp32, and the numbers."""
    problem = BackwardProblem(Problem("float16", 256, 256))
    pair = next(row.config for row in ROWS if row.head_dim == 256)
    assert isinstance(pair, PairConfig) and pair.tile_n == 2 * pair.cta_keys == 160
    kib = 40 + 40 + 32 + 32 + 10 + 10 + 20 + 10 + 16 + 0.5
    assert pair.shared_memory(problem) == kib * 1024 + 1024 <= DEVICE.shared_memory


def test_shared_memory_is_what_tiles_take():
    """K, V and two of Q, dO and dS for each of two warpgroups, dQ in fp32, and the rows' numbers."""
    problem = BackwardProblem(Problem("float16", 128, 128))
    config = Config(tile_m=64, columns=128, columns_v=128)
    assert config in {row.config for row in ROWS}
    kib = 32 + 32 + 2 * (16 + 16) + 2 * 16 + 32 + 1
    assert config.shared_memory(problem) == kib * 1024 + 1024 <= DEVICE.shared_memory
    assert config.regions(problem.forward.precision).sharing("k")[1].name == "grad_k"


def test_sums_lie_as_the_postprocess_reads_them():
    """A warpgroup's 64 rows below each other, in whole tiles of scratch."""
    assert SUMS.threads == 128 and SUMS.rows == 64
    for step in steps_of(CASES["heads_6_2"], "sm90")[2:]:
        assert step.kernel.name == "sm80.postprocess" and step.config == SUMS

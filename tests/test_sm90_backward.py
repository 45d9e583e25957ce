"""Hopper's own backward kernel: right, in registers, in any order of events; what it leaves to others.

A main kernel takes longer to compile here than anywhere else: the cases share as few as show every feature,
every way in which a tile is not whole, and every row of the table at its fullest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import cute_flash
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.problem import Problem
from cute_flash.arch.sm90 import BACKWARD, SUMS
from cute_flash.arch.sm90.backward.tuning import BACKWARD as ROWS
from cute_flash.arch.sm90.backward.tuning import Config, register_pressure
from cute_flash.dispatch import EMULATED
from tests.cases import CASES, Case
from tests.gradient_cases import main_step, of_row, steps_of
from tests.harness import Call
from tests.test_resources import assert_in_registers

DEVICE = EMULATED["sm90"]
NAMES = (
    "float16", "dims_128_8", "lengths_257_129", "lengths_5_0", "lengths_0_5", "lengths_127_257_causal",
    "lengths_200_1_causal", "batch_0", "mask_function", "heads_6_2", "varlen_causal", "used_qk_causal",
    "dropout_0.5", "sink_without_keys", "score_softcap", "score_hides", "blocks_random_causal",
    "scores_near_overflow", "rows_without_keys", "layout_sliced",
)  # fmt: skip
FULLEST = (("light", (64, 64)), ("heavy", (128, 64)), ("light", (128, 128)), ("heavy", (128, 128)))
WIDE = Case("wide", ((150, 200),), heads=(1, 1), dims=(96, 104), mask="causal")
# Small, of kernels that NAMES has: several visits, heads that share keys, and several key tiles.
STRICT = {
    "causal": replace(CASES["lengths_127_257_causal"], heads=(1, 1)),
    "shared": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),)),
    "dropout": replace(CASES["dropout_0.5"], heads=(1, 1), seqlens=((140, 70),)),
}
IN_TURNS = {
    "keys": replace(CASES["lengths_127_257_causal"], heads=(1, 1), deterministic=True),
    "heads": replace(CASES["heads_6_2"], heads=(2, 1), seqlens=((140, 70),), deterministic=True),
}


def assert_served(case: Case, folder: Path) -> None:
    """By the kernel that is tested, right, and without a spilled register."""
    step = main_step(case, "sm90")
    assert step.kernel is BACKWARD
    Call.make(case).check_gradients("sm90")
    assert_in_registers(step, DEVICE, folder / "kernel.cubin")


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, tmp_path):
    assert_served(CASES[name], tmp_path)


@pytest.mark.parametrize("extreme, dims", FULLEST)
def test_every_row_of_the_table(extreme, dims, tmp_path):
    assert_served(of_row(extreme, dims), tmp_path)


def test_head_dims_that_are_no_whole_tile(tmp_path):
    assert_served(WIDE, tmp_path)


def test_every_row_of_the_table_has_a_case():
    """One that it serves, at the largest head dims that it is for."""
    served = {row_that_serves(of_row(extreme, dims), dims) for extreme, dims in FULLEST}
    assert served == set(ROWS)


def row_that_serves(case: Case, dims: tuple[int, int]):
    """The row of the table whose config a case gets, if its head dims are the row's."""
    main = main_step(case, "sm90")
    pressure = register_pressure(main.problem.forward)
    rows = (row for row in ROWS if row.config == main.config and pressure <= row.pressure)
    return next(row for row in rows if (row.head_dim, row.head_dim_v) == dims)


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize(
    "options",
    [
        {"asynchrony": "late"},
        {"asynchrony": "random", "schedule": "random", "seed": 1},
    ],
    ids=["late", "random"],
)
def test_any_order_of_events(name, options):
    Call.make(STRICT[name]).check_gradients("sm90", races=True, by_the_book=True, **options)


@pytest.mark.parametrize("name", IN_TURNS)
def test_in_turns(name, tmp_path):
    """Right, each sum in one order, without a spilled register, and with a place for one CTA only."""
    case = IN_TURNS[name]
    step = main_step(case, "sm90")
    assert step.kernel is BACKWARD and step.problem.deterministic
    assert_in_registers(step, DEVICE, tmp_path / "kernel.cubin")
    Call.make(case).check_gradients("sm90", ctas_per_wave=1, races=True, ordered_reductions=True)


@pytest.mark.parametrize(
    "told, reason",
    [
        ({"head_dim": 136, "head_dim_v": 64}, "head_dim 136 is not in 8…128 in steps of 8"),
        ({"head_dim": 64, "head_dim_v": 192}, "head_dim_v 192 is not in 8…128 in steps of 8"),
        (
            {"head_dim": 64, "block_size": (128, 64)},
            "block_size (128, 64) is a multiple of no tile; allowed: multiples of (64, 128), (128, 128)",
        ),
    ],
    ids=["head_dim", "head_dim_v", "block_size"],
)
def test_what_it_does_not_serve_falls_to_the_sm80_kernel(told, reason):
    """By name, with a reason."""
    answer = cute_flash.supports("float16", device="sm90", backward=True, **told)
    assert answer.kernel.name == "sm80.backward" and answer.refusals == (("sm90.backward", (reason,)),)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"columns": 64}, "cannot have 64 x 64 of dQ each"),
        ({"tile_m": 128, "columns": 64, "columns_v": 128}, "leave fewer than 40 registers"),
        ({"producer_registers": 32}, "512 registers, a thread of each warpgroup, are not launched"),
    ],
    ids=["dq", "accumulators", "setmaxnreg"],
)
def test_a_row_that_breaks_its_arithmetic_is_refused(changes, said):
    row = {"tile_m": 64, "columns": 128, "columns_v": 128}
    assert Config(**row).registers() == {"S and dP": 192, "dV, dQ and dK": 192}
    with pytest.raises(ValueError, match=said):
        Config(**row | changes)


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

"""What gradients are tried with: features singly, rows of the table of tiles at their fullest, and pairs.

A main kernel is compiled per Problem and tile, and costs more than all else in a test of gradients. Cases of
other sizes, layouts and numbers share one; of the forward pass's pairs there are as many as it takes that
features meet which the main kernel joins. The other meetings are the forward pass's, whose masks, scores,
positions and random numbers these are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cute_flash import dispatch
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.kernel import Kernel, Step
from cute_flash.dispatch import EMULATED
from tests.cases import CASES, Case, row_of
from tests.harness import Call, answer_for
from tests.test_resources import EXTREMES, assert_in_registers

# Every feature by itself, every way in which a tile is not whole, rows and keys that need a thought.
SINGLES = (
    "float16", "softmax_scale", "dims_128_8", "lengths_1_1", "lengths_200_1_causal", "lengths_5_0",
    "lengths_0_5", "lengths_63_64_causal", "lengths_127_257_causal", "lengths_257_129", "batch_0", "batch_5",
    "mask_window", "mask_diagonal", "mask_function", "mask_by_head", "heads_6_2", "heads_4_1",
    "layout_sliced", "layout_interleaved", "varlen_causal", "used_qk_causal", "dropout_0.5", "sink",
    "sink_without_keys", "keys_unseen", "rows_without_keys", "sink_alone", "scores_near_overflow", "split",
    "score_softcap", "score_alibi_per_batch", "score_function", "score_hides", "blocks_causal",
    "blocks_small", "blocks_taller", "blocks_random_causal", "blocks_all", "blocks_nothing",
    "blocks_lengths_257_127",
)  # fmt: skip
# A case for each row of the table of tiles: the most that a call may ask of it (see test_resources.py), at
# the largest head dims that it serves.
ROWS = (
    ("sm80", "light", (64, 64)), ("sm80", "heavy", (64, 64)), ("sm80", "light", (128, 128)),
    ("sm80", "heavy", (128, 128)), ("sm86", "heavy", (128, 128)), ("sm80", "heavy", (192, 192)),
    ("sm80", "light", (256, 256)), ("sm80", "heavy", (256, 256)), ("sm80", "heavy", (96, 256)),
    ("sm86", "heavy", (192, 192)), ("sm86", "heavy", (256, 256)), ("sm80", "blocks_heavy", (128, 128)),
    ("sm80", "blocks_light", (128, 128)),
)  # fmt: skip
# What the main kernel joins. A tile decides in which registers a row and a key meet; masks and lengths, which
# query tiles pass, whose heads may add up; dropout and the score's slope meet in dS.
JOINED = frozenset(
    map(
        frozenset,
        (
            *itertools.product(("tile",), ("mask", "score", "rows", "heads", "dropout", "sink", "dtype")),
            *itertools.product(("mask",), ("rows", "heads", "dropout")),
            *itertools.product(("score",), ("rows", "dropout")),
            ("rows", "heads"),
        ),
    )
)

ORDERS = {
    "late": {"asynchrony": "late"},
    "random": {"asynchrony": "random", "schedule": "random", "seed": 1},
}


def steps_of(case: Case, device: str) -> tuple[Step, ...]:
    """The launches of a case's gradients."""
    forward = replace(answer_for(case, device).problem, split_kv=False)
    asked = BackwardProblem(forward, deterministic=case.deterministic)
    kernel, config = dispatch.dispatch(asked, EMULATED[device])
    return kernel.steps(asked, EMULATED[device], config).steps


def of_row(extreme: str, dims: tuple[int, int]) -> Case:
    """The case of a row of ROWS."""
    return replace(EXTREMES[extreme], dims=dims)


def main_step(case: Case, device: str) -> Step:
    """The launch of the main kernel, between the preprocess and what comes after."""
    return steps_of(case, device)[1]


def assert_served(case: Case, device: str, kernel: Kernel, folder: Path) -> None:
    """By this main kernel, right, and without a spilled register."""
    step = main_step(case, device)
    assert step.kernel is kernel
    Call.make(case).check_gradients(device)
    assert_in_registers(step, EMULATED[device], folder / "kernel.cubin")


def assert_in_turns(case: Case, device: str, kernel: Kernel, folder: Path, ctas: int = 1) -> None:
    """Right, each sum in one order, without a spilled register, and with a place for `ctas` CTAs only."""
    step = main_step(case, device)
    assert step.kernel is kernel and step.problem.deterministic
    assert_in_registers(step, EMULATED[device], folder / "kernel.cubin")
    Call.make(case).check_gradients(device, ctas_per_wave=ctas, races=True, ordered_reductions=True)


def meetings(case: Case, device: str = "sm80") -> set[frozenset]:
    """The pairs of JOINED that a case has; none where it also has what is not paired."""
    config, found = main_step(case, device).config, row_of(case)
    if not found:
        return set()
    more = {"tile": (config.tile_m, config.tile_n), "dropout": case.dropout > 0}
    found |= more | {"heads": case.heads[0] == case.heads[1]}
    pairs = itertools.combinations(found.items(), 2)
    return {frozenset(pair) for pair in pairs if frozenset(name for name, _ in pair) in JOINED}


def fewest_pairs() -> Iterator[str]:
    """Of the pairs, those that between them have all meetings that are not in SINGLES or ROWS: greedily."""
    pairs = {name: meetings(case) for name, case in CASES.items() if name.startswith("pair_")}
    todo = set().union(*pairs.values())
    todo -= set().union(*(meetings(CASES[name]) for name in SINGLES))
    todo -= set().union(*(meetings(of_row(extreme, dims), device) for device, extreme, dims in ROWS))
    while todo:
        best = max(pairs, key=lambda name: len(todo & pairs[name]))
        todo -= pairs[best]
        yield best


PAIRS = tuple(fewest_pairs())

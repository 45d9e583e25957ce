"""The Blackwell kernel as pairs of CTAs: right answers with every feature, in any order of events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_flash import dispatch, executable, repeat
from cute_flash.arch.problem import Problem, Sizes
from cute_flash.arch.sm100 import tuning
from cute_flash.arch.sm100.forward import FORWARD
from tests.cases import CASES, RAGGED, Case
from tests.emulator.negative.mutations import everywhere
from tests.emulator.negative.trial import Subject, objection, ptx_of
from tests.harness import Call, answer_for
from tests.orders import ground, hold
from tests.proofs import Proof
from tests.test_resources import resources

B200 = dispatch.EMULATED["sm100"]
# The last pair has few rows, its second CTA none; the last block of keys is not whole.
PLAIN = {
    "128": Case("128", ((530, 200),), heads=(1, 1), dims=(128, 128)),
    "192": Case("192", ((530, 200),), heads=(1, 1), dims=(192, 128)),
    "256": Case("256", ((300, 200),), heads=(1, 1), dims=(256, 256)),
}
FEATURES = (
    "mask_window", "mask_document_causal", "score_own_softcap", "heads_4_1", "layout_sliced", "varlen_causal",
    "used_qk", "dropout_0.5", "sink_without_keys", "split_causal", "split_used", "blocks_taller",
)  # fmt: skip
DIMS = {case.dims for case in PLAIN.values()}
HEAD_DIMS = ((136, 160), (256, 8), (200, 200), (8, 256), (40, 104))


@pytest.fixture
def pairs_only(monkeypatch):
    """The table has only its rows of pairs, for whatever they can serve."""
    rows = [replace(row, even=False, gain=math.inf) for row in tuning.ROWS if row.config.ctas == 2]
    monkeypatch.setattr(tuning.FORWARD, "rows", tuple(rows))
    yield from _forgetting_choices()


def _forgetting_choices():
    repeat.forget()
    yield
    repeat.forget()


def check(case: Case) -> None:
    """A case, by a pair."""
    assert answer_for(case, "sm100").config.ctas == 2
    Call.make(case).check("sm100")


def in_order(case: Case, proven: Proof, **options) -> None:
    """A case, by a pair, with the events in another order."""
    assert answer_for(case, "sm100").config.ctas == 2
    hold(case, "sm100", proven, **options)


@pytest.mark.parametrize("case", PLAIN.values(), ids=str)
def test_rows_of_both_ctas(case, pairs_only):
    check(case)


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, pairs_only):
    check(replace(CASES[name], dims=(256, 256)))


@pytest.mark.parametrize("name", ["varlen_causal", "split_causal", "mask_own", "blocks_taller"])
def test_features_with_two_tiles(name, pairs_only):
    check(replace(CASES[name], dims=(128, 128)))


@pytest.mark.parametrize("splits", [None, 2])
def test_heads_in_one_tile(splits, pairs_only):
    """Heads share the pair's rows, which one head would not fill."""
    case = Case("", ((25, 300),), heads=(10, 1), dims=(256, 256), mask="causal", splits=splits, sink=True)
    problem = answer_for(case, "sm100").problem
    assert FORWARD.config(problem, B200, Sizes(1, 10, 1, 25, 300)).heads == 8
    check(case)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims, pairs_only):
    """Halves of V's columns that are padded, or that no column of V is in."""
    check(Case("", ((140, 150),), heads=(1, 1), dims=dims, mask="causal"))


@pytest.mark.parametrize(
    "options",
    [
        {"asynchrony": "late", "races": True},
        *({"asynchrony": "random", "schedule": "random", "seed": s, "races": s < 2} for s in range(5)),
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
@pytest.mark.parametrize("dims", PLAIN)
def test_any_order_of_events(dims, options, pairs_only, proven):
    in_order(replace(PLAIN[dims], mask="wide_window" if dims == "256" else "full"), proven, **options)


@pytest.mark.parametrize("name", ["used_qk", "mask_document_causal"])
def test_any_order_of_events_with_features(name, pairs_only, proven):
    case = replace(CASES[name], dims=(256, 256))
    in_order(case, proven, asynchrony="random", schedule="random", seed=1, races=True)


# What only pairs have, and what becomes of it: all of it must be missed.
CHANGES = {
    "no arrival at the leader": (r"mbarrier\.arrive(\.release\.cluster)?\.shared::cluster\S* .*", "// gone"),
    "arrivals at each CTA's own barrier": (r"mapa\.shared::cluster\.u32\s+(.*), 0;", r"mov.b32 \1;"),
    "arrivals at the peer's barrier": (r"(mapa\.shared::cluster\.u32\s+%\w+, %\w+), 0;", r"\1, 1;"),
    "commits to the leader alone": (r"(tcgen05\.commit\S+\s+\[[^]]*\]), %rs\w+;", r"\1, 1;"),
    "no cluster barrier": (r"barrier\.cluster\.(arrive|wait);", "// gone"),
    "one CTA's bytes expected": (
        r"(mbarrier\.arrive\.expect_tx\S+ \S+, \[\S+\]), (%\w+);",
        r"{ .reg .b32 half; shr.u32 half, \2, 1; \1, half; }",
    ),
    "both CTAs begin products": (r"%cluster_ctarank", "0"),
}
ATTEMPTS = (
    {"asynchrony": "late", "races": True},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, "races": True} for seed in range(2)),
)


@pytest.mark.parametrize("change", ["nothing", *CHANGES])
def test_every_change_is_noticed(change, pairs_only, proven):
    assert answer_for(PLAIN["256"], "sm100").config.ctas == 2
    subject, changed = Subject(PLAIN["256"], None, {}), everywhere(*CHANGES.get(change, ("^", "")))
    inputs = (repr(ATTEMPTS).encode(), changed(ptx_of(subject, "sm100")).encode())
    outcome = proven(lambda: noticed(subject, changed), (*inputs, *ground(subject.case, "sm100")))
    assert outcome == ("unnoticed" if change == "nothing" else "noticed")


def noticed(subject: Subject, changed: Callable[[str], str]) -> str:
    """Whether anything objects to a change."""
    return "noticed" if objection(subject, "sm100", changed, ATTEMPTS) else "unnoticed"


@pytest.mark.parametrize(
    "problem, rows, ctas",
    [
        (Problem("bfloat16", 128, 128), 512, 2),
        (Problem("bfloat16", 128, 128), 600, 1),
        (Problem("bfloat16", 128, 128, varlen=True), 512, 1),
        (answer_for(CASES["mask_causal"], "sm100").problem, 512, 1),
        (Problem("bfloat16", 192, 128), 16000, 2),
        (Problem("bfloat16", 256, 256), 128, 1),
        (Problem("bfloat16", 256, 256, block_size=(128, 128)), 600, 1),
        (Problem("bfloat16", 256, 256), 600, 2),
        (Problem("bfloat16", 256, 256, varlen=True, dropout=True), 600, 2),
    ],
)
def test_who_gets_a_pair(problem, rows, ctas):
    config = FORWARD.config(problem, B200, Sizes(1, 1, 1, rows, 4096))
    assert config.ctas == ctas
    assert config in FORWARD.configs(problem, B200)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(dims=st.sampled_from(sorted(DIMS)), group=st.integers(1, 40), rows=st.integers(1, 5000))
def test_every_config_is_known_beforehand(dims, group, rows):
    """So a bundle can hold every kernel that some call gets."""
    problem = Problem("bfloat16", *dims, gqa=group > 1)
    config = FORWARD.config(problem, B200, Sizes(1, group, 1, rows, 999))
    assert config in FORWARD.configs(problem, B200)


@pytest.mark.parametrize("dims", [(128, 128), (136, 136)])
def test_pairs_that_persist_stay_in_registers(dims, tmp_path):
    """What B200 gets: tests/test_sm100_compile.py compiles for GPUs of one multiprocessor."""
    problem = Problem("bfloat16", *dims)
    config = FORWARD.config(problem, B200)
    assert config.ctas == 2 and config.persistent
    used = resources(executable.artifact(FORWARD, problem, config, B200).cubin, tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {config}"


def test_pairs_are_split_among_half_as_many():
    problem, sizes = Problem("bfloat16", 256, 256), Sizes(1, 1, 1, 256, 1 << 16)
    assert 60 <= FORWARD.splits(problem, B200, sizes) <= B200.multiprocessors // 2


def test_a_launch_is_whole_pairs(pairs_only):
    """Short and empty sequences: the CTAs of a pair come and leave together."""
    check(Case("", (*RAGGED, (300, 9)), varlen=True, heads=(2, 1), dims=(256, 256), mask="causal"))

"""Twenty random orders of events for each family of kernels, watched by the race detector, by the book.

Copies and products happen at any time that waits allow, warps run in any order: the answers stay right.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from cute_flash import dispatch
from cute_flash.arch.problem import Sizes
from tests.cases import CASES, Case
from tests.emulator.negative.subjects import SUBJECTS, lowered
from tests.emulator.negative.trial import dependencies, objection, ptx_of
from tests.harness import answer_for
from tests.orders import RIGHT, hold, hold_gradients

SEEDS = range(20)
# A few row blocks and KV blocks each, some cut by the mask and some not; heads that share keys.
CAUSAL = Case("", ((70, 200),), heads=(2, 1), mask="causal")
WHOLE = Case("", ((70, 140),), heads=(3, 3))
SPLIT = Case("", ((20, 300),), heads=(2, 1), mask="causal", splits=2)
BLACKWELL = replace(CAUSAL, seqlens=((150, 300),), heads=(1, 1))
FAMILIES = {
    "sm80": ("sm80", CAUSAL),
    "sm80_split": ("sm80", SPLIT),
    "sm80_latent": ("sm80", SUBJECTS["sm80", "latent"].case),
    "sm90": ("sm90", CAUSAL),
    "sm90_persistent": ("sm90", WHOLE),
    "sm90_split": ("sm90", SPLIT),
    "sm90_latent": ("sm90", SUBJECTS["sm90", "latent"].case),
    "sm100": ("sm100", BLACKWELL),
    "sm100_lowered": ("sm100", lowered(BLACKWELL)),
    "sm100_persistent": ("sm100", WHOLE),
    "sm100_packed": ("sm100", replace(CAUSAL, seqlens=((30, 200),), heads=(4, 1))),
    "sm100_split": ("sm100", SPLIT),
    "sm100_latent": ("sm100", SUBJECTS["sm100", "latent"].case),
}
# Of gradients, on the device named: two or three query tiles to a key tile, the last of either not whole. In
# turns several key tiles, or heads, add to one sum. Kernels are those of other tests.
ONE_HEAD = Case("", ((130, 70),), heads=(1, 1))
RELAY = Case("", ((40, 300),), heads=(1, 1), dims=(8, 8), mask="causal", deterministic=True)
GRADIENTS = {
    "causal": ("sm80", replace(ONE_HEAD, seqlens=((130, 100),), mask="causal")),
    "one_stage": ("sm86", replace(ONE_HEAD, dims=(128, 128))),
    "packed": ("sm80", replace(CASES["used_qk_causal"], seqlens=((70, 60), (0, 9), (30, 130)), heads=(1, 1))),
    "shared_head": ("sm80", replace(CASES["heads_6_2"], seqlens=((70, 100),), heads=(2, 1))),
    "blocks": ("sm80", replace(CASES["blocks_random_causal"], seqlens=((200, 150),), heads=(1, 1))),
    "dropout": ("sm80", replace(ONE_HEAD, dropout=0.5)),
    "sink": ("sm80", replace(ONE_HEAD, seqlens=((70, 70),), sink=True)),
    "turns_of_keys": ("sm80", RELAY),
    "turns_of_heads": ("sm80", replace(RELAY, seqlens=((40, 100),), heads=(2, 1))),
    "turns_packed": (
        "sm80", replace(RELAY, dims=(64, 64), varlen=True, seqlens=((30, 150), (20, 40)))
    ),
    "turns_masked": ("sm80", replace(RELAY, dims=(64, 64), mask="by_head", seqlens=((70, 200),))),
    "turns_of_blocks": (
        "sm80", replace(RELAY, dims=(64, 64), mask="full", blocks="random_causal", seqlens=((150, 300),))
    ),
}  # fmt: skip
# The same of Hopper's kernels: of 128 keys and 64 rows or 128, and of fewer keys where heads are wide.
HOPPER_RELAY = replace(RELAY, dims=(64, 64))
GRADIENTS |= {
    f"sm90_{name}": ("sm90", case)
    for name, case in {
        "causal": replace(ONE_HEAD, seqlens=((150, 140),), mask="causal"),
        "wide": replace(CASES["dims_256_256"], seqlens=((130, 90),), heads=(1, 1)),
        "wide_score": replace(CASES["score_softcap"], dims=(192, 128), seqlens=((130, 130),), heads=(1, 1)),
        "wide_dropout": replace(CASES["dropout_0.5"], dims=(256, 256), seqlens=((130, 90),), heads=(1, 1)),
        "packed": replace(CASES["used_qk_causal"], seqlens=((70, 60), (0, 9), (30, 150)), heads=(1, 1)),
        "shared_head": replace(CASES["heads_6_2"], seqlens=((70, 140),), heads=(2, 1)),
        "blocks": replace(CASES["blocks_random_causal"], seqlens=((200, 150),), heads=(1, 1)),
        "dropout": replace(CASES["dropout_0.5"], seqlens=((140, 70),), heads=(1, 1)),
        "score": replace(CASES["score_softcap"], seqlens=((140, 70),), heads=(1, 1)),
        "mask": replace(CASES["mask_function"], seqlens=((140, 150),), heads=(1, 1)),
        "turns_of_keys": HOPPER_RELAY,
        "turns_of_heads": replace(CASES["heads_6_2"], seqlens=((40, 140),), heads=(3, 1), deterministic=True),
        "turns_wide": replace(HOPPER_RELAY, dims=(192, 128), seqlens=((40, 150),), heads=(2, 1)),
        "turns_packed": replace(HOPPER_RELAY, varlen=True, seqlens=((30, 150), (20, 40))),
        "turns_masked": replace(HOPPER_RELAY, mask="by_head", seqlens=((70, 200),)),
        "turns_of_blocks": replace(
            HOPPER_RELAY, mask="full", blocks="random_causal", seqlens=((150, 300),)
        ),
    }.items()
}
# And of Blackwell's: with columns of tensor memory for P and dQ, and without; tiles of 64 rows, of 64 keys,
# of these with dQ in two parts; pairs of CTAs.
BLACKWELL_RELAY = replace(RELAY, dims=(64, 64), seqlens=((70, 200),))
BLACKWELL_TURNS = Case("", ((70, 140),), heads=(2, 1), deterministic=True)
BLACKWELL_WIDE = replace(ONE_HEAD, seqlens=((130, 140),), mask="causal")
OVER_SCORES = replace(CASES["dims_128_8"], heads=(1, 1))
GRADIENTS |= {
    f"sm100_{name}": ("sm100", case)
    for name, case in {
        "causal": replace(ONE_HEAD, seqlens=((270, 140),), mask="causal"),
        "over_scores": replace(OVER_SCORES, seqlens=((270, 140),)),
        "piecewise_over_scores": replace(OVER_SCORES, seqlens=((140, 70),), dropout=0.5),
        "packed": replace(CASES["used_qk_causal"], seqlens=((150, 60), (0, 9), (30, 150)), heads=(1, 1)),
        "shared_head": replace(CASES["heads_6_2"], seqlens=((140, 70),), heads=(2, 1)),
        "blocks": replace(CASES["blocks_random_causal"], seqlens=((200, 150),), heads=(1, 1)),
        "dropout": replace(CASES["dropout_0.5"], seqlens=((140, 70),), heads=(1, 1)),
        "score": replace(CASES["score_softcap"], seqlens=((140, 70),), heads=(1, 1)),
        "mask": replace(CASES["mask_function"], seqlens=((140, 70),), heads=(1, 1)),
        "rows": replace(BLACKWELL_WIDE, dims=(136, 72)),
        "keys": replace(BLACKWELL_WIDE, dims=(72, 136)),
        "parts": replace(BLACKWELL_WIDE, dims=(200, 136), mask="window"),
        "pair": replace(BLACKWELL_WIDE, dims=(104, 128), seqlens=((130, 300),)),
        "serial": replace(BLACKWELL_WIDE, dims=(136, 104), seqlens=((130, 300),)),
        "wide": replace(BLACKWELL_WIDE, dims=(200, 136)),
        "turns_of_keys": BLACKWELL_RELAY,
        "turns_of_heads": replace(CASES["heads_6_2"], seqlens=((40, 100),), heads=(3, 1), deterministic=True),
        "turns_over_scores": replace(BLACKWELL_RELAY, dims=(128, 8)),
        "turns_rows": replace(BLACKWELL_TURNS, dims=(136, 72)),
        "turns_parts": replace(BLACKWELL_TURNS, dims=(200, 136), mask="window"),
        "turns_pair": replace(BLACKWELL_TURNS, dims=(128, 128), seqlens=((70, 300),)),
        "turns_serial": replace(BLACKWELL_TURNS, dims=(136, 104), seqlens=((70, 300),)),
        "turns_wide": replace(BLACKWELL_TURNS, dims=(200, 136), seqlens=((70, 150),)),
        "turns_packed": replace(BLACKWELL_RELAY, varlen=True, seqlens=((30, 150), (20, 40))),
        "turns_of_blocks": replace(
            BLACKWELL_RELAY, mask="full", blocks="random_causal", seqlens=((150, 300),)
        ),
    }.items()
}


def order(seed: int, **watched: bool) -> dict:
    """The emulator's options for one random order."""
    return {"asynchrony": "random", "schedule": "random", "seed": seed, **watched}


@pytest.fixture
def few_multiprocessors(monkeypatch):
    """GPUs with two of them, so that some CTA takes several tiles."""
    for name in ("sm90", "sm100"):
        device = replace(dispatch.EMULATED[name], multiprocessors=2)
        monkeypatch.setitem(dispatch.EMULATED, name, device)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_answers_in_any_order(family, seed, few_multiprocessors, proven):
    device, case = FAMILIES[family]
    hold(case, device, proven, **order(seed, races=True, by_the_book=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", GRADIENTS)
def test_right_gradients_in_any_order(family, seed, proven):
    """Of all kernels that a backward pass launches. Those in turns add to each sum in one order."""
    device, case = GRADIENTS[family]
    watched = {"races": True, "by_the_book": True, "ordered_reductions": case.deterministic}
    hold_gradients(case, device, proven, **order(seed, **watched))


@cache
def ground(name: str) -> tuple[bytes, ...]:
    """All that the answers of a subject of sm100 depend on but for the order of events."""
    return tuple(dependencies(SUBJECTS["sm100", name], "sm100"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["pair", "queue"])
def test_right_answers_whatever_tuning_thinks_of_it(name, seed, proven):
    """Two CTAs that multiply together; one that asks for tiles."""
    subject, orders = SUBJECTS["sm100", name], (order(seed, races=True, by_the_book=True),)

    def trial() -> str:
        return objection(subject, "sm100", lambda ptx: ptx, orders) or RIGHT

    assert proven(trial, (repr(orders).encode(), *ground(name))) == RIGHT


def test_families_are_what_their_names_say(few_multiprocessors):
    answers = {family: answer_for(case, device) for family, (device, case) in FAMILIES.items()}
    configs = {}
    for family, answer in answers.items():
        case = FAMILIES[family][1]
        sizes = Sizes(1, *case.heads, *case.seqlens[0])
        configs[family] = answer.kernel.config(answer.problem, answer.device, sizes)
    persistent = {family for family, config in configs.items() if getattr(config, "persistent", 0)}
    assert persistent == {family for family in FAMILIES if family.endswith("_persistent")}
    assert configs["sm100_packed"].heads > 1
    split = {family for family, answer in answers.items() if answer.problem.split_kv}
    assert split == {family for family in FAMILIES if family.endswith("_split")}


# A wait of each architecture's kernel that values need: K's first arrival.
WAITS = {
    ("sm80", "full"): ("no wait", 0),
    ("sm90", "window"): ("no wait for an mbarrier", 6),
    ("sm100", "window"): ("no wait for an mbarrier", 0),
}


@pytest.mark.parametrize("key", WAITS)
def test_a_missing_wait_shows_in_some_order(key):
    """In the values alone: the detector does not look."""
    subject, (name, site) = SUBJECTS[key], WAITS[key]
    mutants = {number: text for number, _, text in subject.mutations[name].mutants(ptx_of(subject, key[0]))}
    orders = tuple(order(seed) for seed in SEEDS)
    assert objection(subject, key[0], lambda _: mutants[site], orders)

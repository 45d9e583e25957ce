"""Main kernels of gradients in FP8 changed: nothing that their roles wait for, fence, count or tell is idle.

What nothing notices stands in HARMLESS with the reason, by kernel, kind of change and number of the site.
"""

from __future__ import annotations

import pytest
import torch

from tests.emulator.negative import harmless
from tests.emulator.negative.fp8_gradients import (
    SUBJECTS,
    compiled,
    dependencies,
    objection,
    right,
    run,
    unnoticed,
)
from tests.orders import RIGHT

EVERY = [(name, change) for name, subject in SUBJECTS.items() for change in subject.mutations]
SEEDS = 20
# Only kernels that take turns arrive without a wait.
ABSENT = {(name, "no arrival at a barrier") for name in ("sm90", "sm90 pieces", "sm100")}
LAST_PIECES = "the additions of the last two pieces stand behind the last wait, which is for both products"
HARMLESS: dict[tuple[str, str], dict[int, str]] = {
    ("sm90 pieces", "no wait for an mbarrier"): {
        **dict.fromkeys((10, 11, 12), harmless.FRESH),
        **dict.fromkeys((13, 15), harmless.Q_LATER),
    },
    ("sm90 pieces", "one arrival more expected"): dict.fromkeys((1, 3), harmless.ONCE),
    ("sm90 pieces", "half the arrivals expected"): dict.fromkeys((1, 3), harmless.ONCE),
    ("sm90 pieces", "no barrier of a warp"): dict.fromkeys((4, 5), harmless.LEADER),
    ("sm90 pieces", "no change of registers"): {0: harmless.BUDGET},
    ("sm90 pieces", "no fence before a product"): dict.fromkeys((1, 3, 4, 13, 15, 16), harmless.FENCED),
    ("sm90 pieces", "no wait for a product"): dict.fromkeys((10, 22), LAST_PIECES),
    ("sm90 pieces", "a wait for one product fewer"): dict.fromkeys((10, 22), LAST_PIECES),
    ("sm90", "no wait for an mbarrier"): {
        **dict.fromkeys((8, 9, 10), harmless.FRESH),
        **dict.fromkeys((11, 13), harmless.Q_LATER),
    },
    ("sm90", "one arrival more expected"): dict.fromkeys((1, 3), harmless.ONCE),
    ("sm90", "half the arrivals expected"): dict.fromkeys((1, 3), harmless.ONCE),
    ("sm90", "no barrier of a warp"): {2: harmless.LEADER},
    ("sm90", "no change of registers"): {0: harmless.BUDGET},
    ("sm90", "no fence before a product"): dict.fromkeys((1, 3, 6, 8), harmless.FENCED),
    ("sm100", "no wait for an mbarrier"): {
        **dict.fromkeys((12, *range(24, 29)), harmless.FRESH),
        30: harmless.NUMBERS_LATER,
        31: harmless.OUT_LATER,
    },
    ("sm100", "one arrival more expected"): dict.fromkeys((1, 3, 7, 11, 15), harmless.ONCE),
    ("sm100", "half the arrivals expected"): {15: harmless.ONCE},
    ("sm100", "no barrier"): dict.fromkeys((3, 5), harmless.FIRST),
    ("sm100", "no wait for a store"): dict.fromkeys((2, 4), harmless.FIRST),
    ("sm100", "no change of registers"): {1: harmless.BUDGET},
    ("sm100", "no permit given back"): {0: harmless.PERMIT},
    ("sm100", "no commit of a product"): dict.fromkeys((8, 9, 10), harmless.LAST_TILE),
    ("sm100", "no fence after synchronisation"): {8: harmless.FRESH},
    ("sm100 over scores", "no wait for an mbarrier"): {
        **dict.fromkeys((12, *range(20, 25)), harmless.FRESH),
        26: harmless.NUMBERS_LATER,
        27: harmless.OUT_LATER,
    },
    ("sm100 over scores", "no barrier"): dict.fromkeys((9, 17), harmless.FIRST),
    ("sm100 over scores", "no wait for a store"): dict.fromkeys((5, 10), harmless.FIRST),
    ("sm100 over scores", "no commit of a product"): dict.fromkeys((7, 8), harmless.LAST_TILE),
    ("sm100 over scores", "no fence after synchronisation"): {6: harmless.FRESH},
    ("sm100 64 rows", "no wait for an mbarrier"): {
        **dict.fromkeys(range(20, 25), harmless.FRESH),
        26: harmless.NUMBERS_LATER,
        27: harmless.OUT_LATER,
    },
    ("sm100 64 rows", "no commit of a product"): dict.fromkeys((7, 8), harmless.LAST_TILE),
    ("sm100 64 keys", "no wait for an mbarrier"): {
        **dict.fromkeys(range(23, 28), harmless.FRESH),
        29: harmless.NUMBERS_LATER,
        30: harmless.OUT_LATER,
    },
    ("sm100 64 keys", "no commit of a product"): dict.fromkeys((8, 9), harmless.LAST_TILE),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_unchanged_kernel_meets_no_objection(name, proven):
    ptx = compiled(name).ptx.decode()
    assert proven(lambda: objection(name, ptx) or RIGHT, dependencies(name)) == RIGHT


@pytest.mark.parametrize("name, change", EVERY)
def test_every_change_is_noticed(name, change, proven):
    reasons = HARMLESS.get((name, change), {})
    mutants = list(SUBJECTS[name].mutations[change].mutants(compiled(name).ptx.decode()))
    assert bool(mutants) == ((name, change) not in ABSENT)
    texts = (text.encode() for _, _, text in mutants)
    outcome = proven(lambda: unnoticed(name, mutants), (*dependencies(name), *texts))
    assert outcome == " ".join(map(str, (f"unnoticed of {len(mutants)}:", *sorted(reasons))))


@pytest.mark.parametrize("name", SUBJECTS)
def test_random_orders(name, proven):
    """Twenty of them, and races looked for: the same bits."""
    random = {"asynchrony": "random", "schedule": "random", "races": True}

    def trial() -> str:
        ptx = compiled(name).ptx.decode()
        found = (run(name, ptx, seed=seed, **random) for seed in range(SEEDS))
        return RIGHT if all(torch.equal(sums, right(name)) for sums in found) else "another result"

    assert proven(trial, (repr((random, SEEDS)).encode(), *dependencies(name))) == RIGHT


def test_only_changes_that_are_tried_are_called_harmless():
    assert HARMLESS.keys() <= set(EVERY)

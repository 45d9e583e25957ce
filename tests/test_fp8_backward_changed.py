"""Main kernels of gradients in FP8 changed: nothing that their roles wait for, fence, count or tell is idle.

What nothing notices stands in HARMLESS with the reason, by kernel, kind of change and number of the site.
"""

from __future__ import annotations

import pytest
import torch

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
ABSENT = {("sm100", "no arrival at a barrier")}
HARMLESS: dict[tuple[str, str], dict[int, str]] = {}


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

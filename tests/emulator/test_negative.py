"""Change one wait, barrier, fence, arrival, commit or comparison at a time in our own kernels.

The emulator must notice each, but for those on the list of harmless ones.

A mutant runs until something objects: an EmulatorError, or the accuracy rule (see negative/trial.py).
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.orders import RIGHT

from .negative.harmless import HARMLESS
from .negative.subjects import SUBJECTS
from .negative.trial import ATTEMPTS, apart, dependencies, objection, ptx_of, unnoticed

EVERY = [(*key, mutation) for key, subject in SUBJECTS.items() for mutation in subject.mutations]
# What is not there to be changed: only kernels that take turns arrive at a barrier without a wait, and only
# Blackwell's let a lane arrive for memory that its warp has touched.
ABSENT = {
    *(("sm90", name, "no barrier of a warp") for name in ("window", "in order", "persistent", "packed")),
    *(("sm100", name, "no arrival at a barrier") for name in ("window", "causal")),
    *(("sm90", name, "no arrival at a barrier") for name in ("packed", "gradients")),
    ("sm100", "gradients", "no arrival at a barrier"),
}


@cache
def ground(tree: str, name: str) -> tuple[str, tuple[bytes, ...]]:
    """The PTX of the kernel that is changed, and all that a verdict on a change of it depends on."""
    subject = SUBJECTS[tree, name]
    attempts = repr((ATTEMPTS, apart(subject.ctas)))
    return ptx_of(subject, tree), (attempts.encode(), *dependencies(subject, tree))


@pytest.mark.parametrize("tree, name", SUBJECTS)
def test_unchanged_kernel_meets_no_objection(tree, name, proven):
    subject, (_, inputs) = SUBJECTS[tree, name], ground(tree, name)
    assert proven(lambda: objection(subject, tree, lambda ptx: ptx) or RIGHT, inputs) == RIGHT


@pytest.mark.parametrize("tree, name, mutation", EVERY)
def test_every_change_is_noticed(tree, name, mutation, proven):
    subject, reasons = SUBJECTS[tree, name], HARMLESS.get((tree, name, mutation), {})
    ptx, inputs = ground(tree, name)
    mutants = list(subject.mutations[mutation].mutants(ptx))
    assert bool(mutants) == ((tree, name, mutation) not in ABSENT)
    texts = (text.encode() for _, _, text in mutants)
    outcome = proven(lambda: said(unnoticed(subject, tree, mutants), len(mutants)), (*inputs, *texts))
    found = {number: line for number, line, _ in mutants if str(number) in outcome.split()[3:]}
    assert outcome == said(list(found), len(mutants))
    assert {site: line for site, line in found.items() if site not in reasons} == {}
    assert not reasons.keys() - found.keys(), "take these off the list of harmless ones"


def said(sites: list[int], count: int) -> str:
    """An outcome in words."""
    return " ".join(map(str, (f"unnoticed of {count}:", *sites)))


def test_only_changes_that_are_tried_are_called_harmless():
    assert HARMLESS.keys() <= set(EVERY)

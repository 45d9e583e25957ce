"""Change one wait, barrier, fence, arrival, commit or comparison at a time in our own kernels.

The emulator must notice each, but for those on the list of harmless ones.

A mutant runs until something objects: an EmulatorError, or the accuracy rule (see negative/subjects.py).
"""

from __future__ import annotations

import pytest

from .negative.harmless import HARMLESS
from .negative.subjects import SUBJECTS, objection, ptx_of, unnoticed

EVERY = [(*key, mutation) for key, subject in SUBJECTS.items() for mutation in subject.mutations]
# What is not there to be changed: only kernels that take turns arrive at a barrier without a wait, and only
# Blackwell's let a lane arrive for memory that its warp has touched.
ABSENT = {
    *(("sm90", name, "no barrier of a warp") for name in ("window", "in order", "persistent", "packed")),
    *(("sm100", name, "no arrival at a barrier") for name in ("window", "causal")),
    ("sm90", "packed", "no arrival at a barrier"),
}


@pytest.mark.parametrize("tree, name", SUBJECTS)
def test_unchanged_kernel_meets_no_objection(tree, name):
    assert objection(SUBJECTS[tree, name], tree, lambda ptx: ptx) == ""


@pytest.mark.parametrize("tree, name, mutation", EVERY)
def test_every_change_is_noticed(tree, name, mutation):
    subject, reasons = SUBJECTS[tree, name], HARMLESS.get((tree, name, mutation), {})
    sites = list(subject.mutations[mutation].mutants(ptx_of((tree, name))))
    assert bool(sites) == ((tree, name, mutation) not in ABSENT)
    found = unnoticed((tree, name), mutation)
    assert {site: line for site, line in found.items() if site not in reasons} == {}
    assert not reasons.keys() - found.keys(), "take these off the list of harmless ones"


def test_only_changes_that_are_tried_are_called_harmless():
    assert HARMLESS.keys() <= set(EVERY)

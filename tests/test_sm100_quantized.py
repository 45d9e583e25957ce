"""Blackwell's FP8 kernels changed: nothing that their roles wait for, fence, count or tell is idle.

What nothing notices stands in HARMLESS with the reason, by kernel, kind of change and number of the site.
"""

from __future__ import annotations

import pytest

from tests.emulator.negative import harmless
from tests.emulator.negative.quantized import SUBJECTS, compiled, dependencies, objection, unnoticed
from tests.orders import RIGHT

EVERY = [(name, change) for name, subject in SUBJECTS.items() for change in subject.mutations]
# Only kernels that take turns arrive without a wait.
ABSENT = {(name, "no arrival at a barrier") for name in ("two tiles", "mxfp8")}
SAME_ATOM = "the last block visited has its factors in the atom of the one before, which is there"
ONE_ATOM = "the first block visited, the last of the keys, lies in the first of the two atoms"
NOT_TAKEN = "on the path of large scores, of which this call has none; that of \"mxfp8\" is changed"
ALL_ONES = "P's factors are 1, whichever byte"
HARMLESS: dict[tuple[str, str], dict[int, str]] = {
    ("two tiles", "no wait for an mbarrier"): dict.fromkeys((18, 19, 20), harmless.FRESH),
    ("two tiles", "one arrival more expected"): dict.fromkeys((2, 3), harmless.ONCE),
    ("two tiles", "no commit of a store"): {0: "the other tile's store closes the group for both"},
    ("two tiles", "no wait for a store"): {0: "the wait for the other tile's store is for both"},
    ("two tiles", "no change of registers"): {0: harmless.BUDGET},
    ("two tiles", "no permit given back"): {0: harmless.PERMIT},
    ("two tiles", "no commit of a product"): {9: harmless.LAST},
    ("two tiles", "no fence before synchronisation"): {
        **dict.fromkeys((0, 2, 6), harmless.ONLY_S),
        **dict.fromkeys((9, 10), harmless.NUMBERS),
    },
    ("two tiles", "no fence after synchronisation"): dict.fromkeys((4, 6, 12, 13), harmless.NUMBERS),
    ("one tile", "no wait for an mbarrier"): dict.fromkeys((13, 14), harmless.FRESH),
    ("one tile", "no commit of a product"): {7: harmless.LAST},
    ("mxfp8", "no copy of factors"): {5: SAME_ATOM},
    ("mxfp8", "factors of A of another byte"): dict.fromkeys((8, 13, 18, 19), ALL_ONES),
    ("nvfp4", "factors of A of another byte"): dict.fromkeys((4, 5, 6, 9, 10, 11, *range(14, 20)), ALL_ONES),
    ("nvfp4", "no arrival"): dict.fromkeys((1, 2, 4, 5), NOT_TAKEN),
    ("nvfp4", "no copy of factors"): {
        **dict.fromkeys((4, 5), ONE_ATOM),
        **dict.fromkeys((14, 15), SAME_ATOM),
    },
}
# The roles of "mxfp8" wait, fence and tell as those of "two tiles" do, at the same sites.
HARMLESS |= {
    ("mxfp8", change): reasons for (name, change), reasons in list(HARMLESS.items()) if name == "two tiles"
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


def test_only_changes_that_are_tried_are_called_harmless():
    assert HARMLESS.keys() <= set(EVERY)

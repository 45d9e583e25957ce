"""The emulator against vectors/: results derived from the PTX ISA, and recorded on hardware where there are
any.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .evaluate import evaluate
from .vectors import derive
from .vectors.cases import CASES

FILES = sorted(Path(__file__).with_name("vectors").glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", CASES)
def test_results(name, file):
    case, stored = CASES[name], np.load(file)
    if f"{name}:0" not in stored:
        pytest.skip(f"the GPU of {file.name} could not run it")
    got = evaluate(case.code, *case.inputs, outputs=case.outputs, target=case.target, block=case.block)
    for k, array in enumerate(got):
        expected = stored[f"{name}:{k}"]
        differ = array != expected
        if case.any_nan:
            differ &= ~(np.isnan(array.view(np.float32)) & np.isnan(expected.view(np.float32)))
        wrong = np.flatnonzero(differ)
        assert not len(wrong), [(int(i), hex(array[i]), hex(expected[i])) for i in wrong[:4]]


@pytest.mark.parametrize("name", CASES)
def test_the_stored_vectors_are_what_the_definitions_give(name):
    stored = np.load(derive.FILE)
    for k, array in enumerate(derive.results(name)):
        assert np.array_equal(array, stored[f"{name}:{k}"])


def test_there_are_derived_vectors_and_they_are_small():
    assert derive.FILE in FILES
    assert sum(file.stat().st_size for file in FILES) < 100_000

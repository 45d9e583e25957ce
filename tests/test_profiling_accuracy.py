"""The model of what formats of few bits cost: the committed tables are its, and say what is published."""

from __future__ import annotations

import json

import pytest
import torch

from profiling import accuracy, accuracy_table, gradient_accuracy
from profiling.accuracy import ACCUMULATORS, SCHEMES, Scheme

DATA = json.loads(accuracy_table.JSON.read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products are no faster with more, beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rmse(inputs: str, scheme: str) -> float:
    (row,) = (row for row in DATA["schemes"] if (row["inputs"], row["scheme"]) == (inputs, scheme))
    return row["rmse"]


def relative(keys: int, accumulator: str) -> float:
    rows = DATA["accumulators"]
    (row,) = (row for row in rows if (row["keys"], row["accumulator"]) == (keys, accumulator))
    return row["relative"]


@pytest.mark.parametrize("inputs", accuracy.INPUTS)
@pytest.mark.parametrize("name", ["16 bits", "FP8 per head", "FP8 block 128, Hadamard", "sm100: NVFP4 + FP8"])
def test_the_table_is_the_models(name, inputs):
    """From the same seed, but for what another order of sums makes another rounding of."""
    made = accuracy.INPUTS[inputs](torch.Generator().manual_seed(1), accuracy.SEQLEN, accuracy.HEAD_DIM)
    found, _ = accuracy.error(SCHEMES[name], made, accuracy.QUERIES)
    assert found == pytest.approx(rmse(inputs, name), rel=0.05)


def test_the_accumulators_are_the_models():
    for row in accuracy.accumulators((1024,)):
        assert row["relative"] == pytest.approx(relative(1024, row["accumulator"]), rel=0.05)


def test_pages():
    assert accuracy_table.JSON.with_suffix(".md").read_text() == accuracy_table.markdown(DATA)
    assert accuracy_table.JSON.with_suffix(".svg").read_text() == accuracy_table.picture(DATA)
    assert {row["scheme"] for row in DATA["schemes"]} == set(SCHEMES)
    assert {row["accumulator"] for row in DATA["accumulators"]} == set(ACCUMULATORS)
    assert {row["scheme"] for row in DATA["gradients"]} == set(gradient_accuracy.SCHEMES)


def test_what_is_published():
    """FlashAttention-3's error with the transform, 9.1e-3, and part of its gain over one scale."""
    for scheme in ("FP8 Hadamard", "FP8 block 128, Hadamard"):
        assert rmse("outliers", scheme) == pytest.approx(9e-3, rel=0.15)
    assert rmse("outliers", "FP8 per head") / rmse("outliers", "FP8 Hadamard") >= 1.6


def test_keys_forwards_lose_what_a_sink_dwarfs():
    """P of the other keys is below what e4m3 holds once the sink is the maximum."""
    backwards, forwards = "FP8 block 128, Hadamard", "FP8 block 128, Hadamard, keys forwards"
    assert rmse("sink", forwards) > 2 * rmse("sink", backwards)
    assert rmse("normal", forwards) < 1.1 * rmse("normal", backwards)


def test_two_levels_keep_what_hoppers_accumulator_loses():
    """At 16k keys; the longer the sum, the more."""
    exact, kept, every_4, lost = (relative(16384, name) for name in ACCUMULATORS)
    assert kept < 1.5 * exact and every_4 < 5 * exact and lost > 100 * exact
    assert relative(65536, "Hopper, never") > 2 * lost


def test_lifting_is_what_keeps_small_weights(monkeypatch):
    """The model notices P that is not lifted, and rounding that a row sum of exact P would not cancel."""
    made = accuracy.sink(torch.Generator().manual_seed(1), 512, 128)
    lifted, _ = accuracy.error(Scheme(), made, 64)
    monkeypatch.setattr(accuracy, "LIFT", 0)
    assert accuracy.error(Scheme(), made, 64)[0] > 1.5 * lifted


def gradients(inputs: str, scheme: str) -> dict[str, float]:
    rows = (row for row in DATA["gradients"] if (row["inputs"], row["scheme"]) == (inputs, scheme))
    return {row["gradient"]: row["relative"] for row in rows}


@pytest.mark.parametrize("scheme", gradient_accuracy.SCHEMES)
def test_the_table_of_gradients_is_the_models(scheme):
    found = gradient_accuracy.errors("dominated", scheme)
    assert found == pytest.approx(gradients("dominated", scheme), rel=0.05)


def test_what_decides_about_gradients():
    """That dP and delta have the same dO, and O of a row that a key dominates; not dS's format: e5m2 without
    a scale costs a third more than 16 bits do, a scale for each tile of e4m3 a tenth, as MXFP8 does.
    """
    kernels, _, unrounded, given, wide, mxfp8, tiles = list(gradient_accuracy.SCHEMES)[1:]
    for inputs in gradient_accuracy.INPUTS:
        least = gradients(inputs, wide)
        for scheme, most in ((mxfp8, 1.15), (tiles, 1.15), (kernels, 1.4)):
            assert all(error < most * least[name] for name, error in gradients(inputs, scheme).items())
    for name in ("dq", "dk"):
        assert gradients("dominated", given)[name] > 5 * gradients("dominated", kernels)[name]
        assert gradients("sink", kernels)[name] > 1.6 * gradients("sink", unrounded)[name]

"""Shapes that hypothesis chooses, over a few kernels."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.cases import CASES, Case
from tests.harness import Call

MODEST = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FEW = settings(MODEST, max_examples=8)
LENGTH = st.integers(0, 140)
HEADS = st.sampled_from([(2, 1), (3, 1), (4, 2), (6, 2)])


@given(
    seqlens=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4).map(tuple),
    heads=HEADS,
    layout=st.sampled_from(["packed", "heads_first", "sliced", "interleaved"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(seqlens=((0, 0),), heads=(2, 1), layout="packed", seed=0)
@MODEST
def test_packed_sequences(machine, seqlens, heads, layout, seed):
    case = Case("", seqlens, varlen=True, heads=heads, mask="causal", used="qk", layout=layout)
    Call.make(case, seed).check(machine)


@given(
    batch=st.integers(0, 3),
    seqlens=st.tuples(LENGTH, LENGTH),
    heads=HEADS,
    window=st.tuples(st.integers(-1, 150), st.integers(-1, 150)),
    seed=st.integers(0, 2**32 - 1),
)
@example(batch=1, seqlens=(1, 140), heads=(2, 1), window=(0, 0), seed=0)
@MODEST
def test_dense_batches_and_windows(machine, batch, seqlens, heads, window, seed):
    call = Call.make(Case("", (seqlens,) * batch, heads=heads, dims=(72, 40), dtype="float16"), seed)
    call.arguments["window_size"] = window
    call.check(machine)


@given(
    seqlens=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=3).map(tuple),
    layout=st.sampled_from(["packed", "heads_first", "sliced", "interleaved"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(seqlens=((0, 0), (0, 9), (9, 0)), layout="packed", seed=0)
@FEW
def test_gradients_of_packed_sequences(seqlens, layout, seed):
    """By the kernels of a case of the list."""
    case = replace(CASES["used_qk_causal"], seqlens=seqlens, heads=(1, 1), layout=layout)
    Call.make(case, seed).check_gradients("sm80")


@given(
    batch=st.integers(0, 2),
    seqlens=st.tuples(LENGTH, LENGTH),
    heads=HEADS,
    seed=st.integers(0, 2**32 - 1),
)
@example(batch=1, seqlens=(1, 140), heads=(3, 1), seed=0)
@FEW
def test_gradients_of_heads_that_share_keys(batch, seqlens, heads, seed):
    case = replace(CASES["heads_6_2"], seqlens=(seqlens,) * batch, heads=heads)
    Call.make(case, seed).check_gradients("sm80")


@given(
    seqlens=st.tuples(LENGTH, LENGTH),
    window=st.tuples(st.integers(0, 150), st.integers(0, 150)),
    seed=st.integers(0, 2**32 - 1),
)
@example(seqlens=(1, 140), window=(0, 0), seed=0)
@FEW
def test_gradients_within_windows(seqlens, window, seed):
    call = Call.make(replace(CASES["mask_window"], seqlens=(seqlens,), heads=(1, 1)), seed)
    call.arguments["window_size"] = window
    call.check_gradients("sm80")

"""Shapes that hypothesis chooses, over a few kernels."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.cases import Case
from tests.harness import Call

MODEST = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
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
    case = Case("", seqlens, varlen=True, heads=heads, mask="causal", used="k", layout=layout)
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

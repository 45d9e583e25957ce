"""Blackwell's kernels where loads from tensor memory bring the maximum of S with them (`tcgen05.ld.red`)."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cute_flash import dispatch, executable, launch
from cute_flash.arch.problem import Problem
from cute_flash.arch.sm100.forward import FORWARD
from tests.cases import CASES, Case
from tests.emulator.negative.mutations import everywhere
from tests.emulator.negative.trial import Subject, objection
from tests.harness import Call, answer_for
from tests.orders import hold

B300 = replace(dispatch.EMULATED["sm100"], capability=(10, 3))


@pytest.fixture(autouse=True)
def sm103(monkeypatch):
    """A B200 that loads as a B300 does."""
    monkeypatch.setitem(dispatch.EMULATED, "sm103", B300)


# Blocks that are wholly visible and others, in rows of the table with one, two and four loads to a block.
# Scores so far apart that P overflows unless the maximum is that of all columns.
LONG = Case("full", ((150, 400),), heads=(1, 1), dtype="float16", softmax_scale=4.0)
SEVERAL = (
    LONG,
    replace(LONG, name="causal", mask="causal", heads=(2, 1)),
    replace(LONG, name="window", mask="wide_window"),
    replace(LONG, name="dropout", dropout=0.5),
    replace(LONG, name="sink", sink=True, mask="causal"),
    replace(LONG, name="softcap", score="softcap"),
    replace(LONG, name="varlen_used", seqlens=((70, 300), (0, 9), (150, 260)), varlen=True, used="qk"),
    replace(LONG, name="few_rows", seqlens=((1, 500),), heads=(8, 1)),
    replace(LONG, name="split", splits=2),
    replace(LONG, name="blocks", blocks="random"),
    replace(LONG, name="bfloat16", dtype="bfloat16", softmax_scale=None),
    replace(LONG, name="d40", dims=(40, 104), mask="causal"),
    replace(LONG, name="d128", dims=(128, 128)),
    replace(LONG, name="d128_pair", seqlens=((500, 300),), dims=(128, 128)),
    replace(LONG, name="d128_dropout", dims=(128, 128), dropout=0.5),
    replace(LONG, name="d192_128", dims=(192, 128), mask="causal"),
    replace(LONG, name="d256_128_dropout", dims=(256, 128), dropout=0.5),
    replace(LONG, name="d256", dims=(256, 256)),
    replace(LONG, name="d256_dropout", dims=(256, 256), dropout=0.5),
    CASES["sink_without_keys"],
)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_right_answers(case):
    assert answer_for(case, "sm103").config.reducing_loads
    Call.make(case).check("sm103")


ORDERS = ({"asynchrony": "late"}, {"asynchrony": "random", "schedule": "random", "seed": 1})


@pytest.mark.parametrize("case", SEVERAL[1:3], ids=str)
@pytest.mark.parametrize("options", ORDERS, ids=lambda options: options["asynchrony"])
def test_any_order_of_events(case, options, proven):
    hold(case, "sm103", proven, races=True, by_the_book=True, **options)


def extremes() -> Call:
    """Scores of a row that are -inf in the first block, in all of them, +inf for some keys, and NaN."""
    call = Call.make(replace(LONG, dims=(192, 128), dtype="bfloat16"))
    q, k = call.tensors["q"], call.tensors["k"]
    huge = torch.finfo(q.dtype).max
    q[0, 3:6], q[0, 6] = 0.0, torch.nan
    q[0, 3, 0, 0] = q[0, 4, 0, 1] = -huge
    q[0, 5, 0, 0] = huge
    k[0, :, 0, :2] = 2.0
    k[0, 128:, 0, 0] = 0.0
    return call


@pytest.mark.parametrize("make", [extremes, lambda: Call.make(LONG)], ids=["extremes", "full"])
def test_maxima_are_those_that_fmax_finds(make, monkeypatch):
    """The same answer to the last bit, infinities and NaN included."""

    def without(kernel, problem, config, device, route):
        seen.append(config.reducing_loads)
        config = replace(config, reducing_loads=False)
        return executable.executable(kernel, problem, config, device, route)

    seen, call = [], make()
    answer = call.run("sm103")
    monkeypatch.setattr(launch, "executable", without)
    for got, expected in zip(answer, call.run("sm103"), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert seen == [True]


def without_part(number: int):
    """A change of PTX: of every four loads, the one of this number brings its minimum."""

    def change(ptx: str) -> str:
        pieces = re.split(r"(?<=tcgen05\.ld\.red\.sync\.aligned\.32x32b\.x32\.)max", ptx)
        assert len(pieces) % 4 == 1 and len(pieces) > 4
        words = ["min" if i % 4 == number else "max" for i in range(len(pieces) - 1)]
        return "".join(f"{piece}{word}" for piece, word in zip(pieces, [*words, ""], strict=True))

    return change


CHANGES = {
    **{f"no maximum of part {number}": without_part(number) for number in range(4)},
    "no wait": everywhere(r"(tcgen05\.ld\.red(?:.*\n)+?.*)tcgen05\.wait::ld.*;", r"\1// gone"),
}


@pytest.mark.parametrize("name", ["nothing", *CHANGES])
def test_every_change_is_noticed(name):
    attempts = ({"races": True, "by_the_book": True},)
    found = objection(Subject(LONG, None, {}), "sm103", CHANGES.get(name, lambda ptx: ptx), attempts)
    assert bool(found) == (name != "nothing"), found


@pytest.mark.parametrize("head_dim, target, reduces", [
    (64, (10, 3), True), (64, (11, 0), True), (64, (10, 0), False), (32, (10, 3), False),
])  # fmt: skip
def test_who_loads_so(head_dim, target, reduces):
    device, problem = replace(B300, capability=target), Problem("bfloat16", head_dim, head_dim)
    assert {config.reducing_loads for config in FORWARD.configs(problem, device)} == {reduces}
    built = executable.artifact(FORWARD, problem, FORWARD.config(problem, device), device)
    assert (b"tcgen05.ld.red" in built.ptx) == reduces

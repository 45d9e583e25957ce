"""Instructions of whole warps against their definitions, lane by lane."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import BarrierError, Deadlock, UnmodelledInstruction

from .evaluate import evaluate
from .values import integers

ROWS = 2  # warps per run


def source_lane(mode: str, lane: int, amount: int, control: int) -> tuple[int, bool]:
    """Where shfl.sync reads, and whether that lane is in range, as the PTX ISA writes it down."""
    segment, clamp, amount = control >> 8 & 31, control & 31, amount & 31
    high, low = (lane & segment) | (clamp & ~segment), lane & segment
    j = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount, "idx": low | (amount & ~segment)}[
        mode
    ]
    inside = j >= high if mode == "up" else j <= high
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("control", [0x1F, 0, 0x181F, 0x100F, 0x1C1F])
def test_shuffle(mode, control):
    value = integers("u32", 0, 32 * ROWS)
    amount = np.random.default_rng(1).integers(0, 40, 32 * ROWS).astype(np.uint32)
    code = f"shfl.sync.{mode}.b32 %x|%y, %a, %b, {control}, -1;"
    got, inside = evaluate(code, value, amount, outputs=(np.uint32, bool))
    for k in range(32 * ROWS):
        lane, found = source_lane(mode, k % 32, int(amount[k]), control)
        assert got[k] == value[k // 32 * 32 + lane]
        assert inside[k] == found


def test_votes():
    random = np.random.default_rng(2)
    holds = np.concatenate([random.integers(0, 2, 32) == 1, np.ones(32, bool), np.zeros(32, bool)])
    (ballot,) = evaluate("vote.sync.ballot.b32 %x, %a, -1;", holds, outputs=(np.uint32,))
    for w in range(3):
        lanes = holds[32 * w : 32 * w + 32]
        assert set(ballot[32 * w : 32 * w + 32]) == {sum(1 << k for k in range(32) if lanes[k])}
    for mode, function in (("all", np.all), ("any", np.any), ("uni", lambda v: np.all(v == v[0]))):
        for sign, condition in (("", holds), ("!", ~holds)):
            (got,) = evaluate(f"vote.sync.{mode}.pred %x, {sign}%a, -1;", holds, outputs=(bool,))
            assert (got == np.repeat([function(v) for v in condition.reshape(-1, 32)], 32)).all()


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match(kind):
    value = np.random.default_rng(3).integers(0, 4, 64).astype(f"u{int(kind[1:]) // 8}")
    value[32:] = 9
    (got,) = evaluate(f"match.any.sync.{kind} %x, %a, -1;", value, outputs=(np.uint32,))
    for k in range(64):
        row = value[k // 32 * 32 :][:32]
        assert got[k] == sum(1 << j for j in range(32) if row[j] == value[k])
    got, same = evaluate(f"match.all.sync.{kind} %x|%y, %a, -1;", value, outputs=(np.uint32, bool))
    assert set(got[:32]) == {0} and not same[:32].any()
    assert set(got[32:]) == {0xFFFFFFFF} and same[32:].all()


@pytest.mark.parametrize("name", ["add", "min", "max", "and", "or", "xor"])
def test_reduction(name):
    value = integers("s32", 4, 64)
    kinds = ("b32",) if name in ("and", "or", "xor") else ("u32", "s32")
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    for kind in kinds:
        typed = value.view(np.int32 if kind == "s32" else np.uint32)
        (got,) = evaluate(f"redux.sync.{name}.{kind} %x, %a, -1;", typed, outputs=(typed.dtype,))
        expected = [functions[name].reduce(row, dtype=typed.dtype) for row in typed.reshape(-1, 32)]
        assert (got == np.repeat(expected, 32)).all()


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("flags", ["", ".abs", ".NaN", ".abs.NaN"])
def test_reduction_of_floats(name, flags):
    """-0 is less than +0. A NaN is left out, or with .NaN decides; the canonical one stands for all."""
    random = np.random.default_rng(5)
    value = (random.standard_normal((6, 32)) * 2.0 ** random.integers(-140, 120, (6, 32))).astype(np.float32)
    value[0, 3], value[1, ::2], value[2, :] = np.nan, -np.nan, np.nan
    value[3] = np.where(np.arange(32) % 2, np.float32(-0.0), np.float32(0.0))
    value[4, 7], value[4, 9] = np.inf, -np.inf
    (got,) = evaluate(
        f"redux.sync.{name}{flags}.f32 %x, %a, -1;", value.reshape(-1), outputs=(np.uint32,), target="sm_100a"
    )
    for row, words in zip(value, got.reshape(-1, 32), strict=True):
        numbers = [abs(v) if ".abs" in flags else v for v in row if not np.isnan(v)]
        if not numbers or (".NaN" in flags and len(numbers) < 32):
            assert (words == 0x7FFFFFFF).all()
            continue
        best = (min if name == "min" else max)(numbers, key=lambda v: (v, not np.signbit(v)))
        assert (words == best.view(np.uint32)).all()


def test_reduction_of_the_floats_of_some_lanes():
    value = np.arange(64, dtype=np.float32)
    code = """
        .reg .pred %p;
        .reg .f32 %f;
        mov.b32 %x, 0f00000000;
        setp.lt.u32 %p, %b, 8;
        @!%p bra DONE;
        redux.sync.max.NaN.f32 %x, %a, 0xff;
        DONE:
    """
    lane = np.arange(64, dtype=np.uint32) % 32
    (got,) = evaluate(code, value, lane, outputs=(np.float32,), target="sm_100a")
    assert got.tolist() == [7] * 8 + [0] * 24 + [39] * 8 + [0] * 24
    with pytest.raises(UnmodelledInstruction, match="add.f32"):
        evaluate("redux.sync.add.f32 %x, %a, -1;", value, outputs=(np.float32,), target="sm_100a")


def test_elect_and_active_lanes():
    leader, chosen = evaluate("elect.sync %x|%y, -1;", np.zeros(64, np.uint32), outputs=(np.uint32, bool),
                              target="sm_90")  # fmt: skip
    assert (leader == 0).all()
    assert np.flatnonzero(chosen).tolist() == [0, 32]
    odd = np.arange(64) % 2 == 1
    code = "mov.u32 %x, 0;\n@%a bra ODD;\nbra DONE;\nODD: activemask.b32 %x;\nDONE:"
    (lanes,) = evaluate(code, odd, outputs=(np.uint32,))
    assert (lanes == np.where(odd, 0xAAAAAAAA, 0)).all()


def test_lanes_of_a_branch():
    """In a divergent branch, with a member mask that names its lanes."""
    lane = np.arange(64, dtype=np.uint32)
    code = """
        .reg .pred %p;
        .reg .b32 %m;
        mov.u32 %x, 0;
        setp.lt.u32 %p, %b, 8;
        @!%p bra REST;
        mov.u32 %m, 0xff;
        shfl.sync.bfly.b32 %x, %a, 1, 31, 0xff;
        redux.sync.add.u32 %x, %x, %m;
        bra DONE;
        REST: vote.sync.ballot.b32 %x, %p, 0xffffff00;
        DONE: bar.warp.sync -1;
    """
    (got,) = evaluate(code, lane, lane % 32, outputs=(np.uint32,))
    assert (got[:8] == 28).all() and (got[32:40] == 28 + 8 * 32).all()
    assert (got[8:32] == 0).all()


def test_exited_lanes_are_not_waited_for():
    """A member mask may name them; the others go on without."""
    code = """
        .reg .pred %p;
        mov.u32 %x, 0;
        setp.lt.u32 %p, %b, 4;
        @%p ret;
        bar.warp.sync -1;
        redux.sync.add.u32 %x, %a, -1;
    """
    lane = np.arange(64, dtype=np.uint32)
    (got,) = evaluate(code, lane, lane % 32, outputs=(np.uint32,))
    assert set(got[4:32]) == {sum(range(4, 32))}
    assert set(got[36:]) == {sum(range(36, 64))}
    assert (got[:4] == 0).all()


def test_special_registers():
    names = ["laneid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"]
    expected = [lambda k: k, lambda k: 1 << k, lambda k: (1 << k) - 1, lambda k: (2 << k) - 1,
                lambda k: 0xFFFFFFFF & ~((2 << k) - 1), lambda k: 0xFFFFFFFF & ~((1 << k) - 1)]  # fmt: skip
    for name, function in zip(names, expected, strict=True):
        (got,) = evaluate(f"mov.u32 %x, %{name};", np.zeros(64), outputs=(np.uint32,))
        assert got.tolist() == [function(k % 32) for k in range(64)], name


# Misuse.


def test_a_lane_outside_the_member_mask():
    with pytest.raises(BarrierError, match="member mask 0x7fffffff leaves out"):
        evaluate(
            "shfl.sync.idx.b32 %x, %a, 0, 31, 0x7fffffff;", np.zeros(32, np.uint32), outputs=(np.uint32,)
        )


def test_lanes_that_name_different_masks():
    masks = np.where(np.arange(32) < 16, 0xFFFFFFFF, 0xFFFFFFFE).astype(np.uint32)
    masks[0] = 0xFFFFFFFF
    with pytest.raises(BarrierError, match="different member masks"):
        evaluate(
            ".reg .pred %p; setp.eq.u32 %p, %a, 0; vote.sync.ballot.b32 %x, %p, %a;",
            masks,
            outputs=(np.uint32,),
        )


def test_a_shuffle_that_reads_an_absent_lane():
    code = """
        .reg .pred %p;
        mov.u32 %x, 0;
        setp.lt.u32 %p, %a, 8;
        @!%p bra DONE;
        shfl.sync.idx.b32 %x, %a, 9, 31, 0xff;
        DONE:
    """
    with pytest.raises(BarrierError, match="does not execute"):
        evaluate(code, np.arange(32, dtype=np.uint32), outputs=(np.uint32,))


@pytest.mark.parametrize("code", ["bar.warp.sync -1;", "shfl.sync.bfly.b32 %x, %a, 1, 31, -1;"])
def test_lanes_that_never_come(code):
    """Half the warp waits for lanes that wait for it somewhere else."""
    text = f"""
        .reg .pred %p;
        mov.u32 %x, 0;
        setp.lt.u32 %p, %a, 16;
        @%p bra LOW;
        {code}
        bra DONE;
        LOW: {code}
        DONE:
    """
    with pytest.raises(Deadlock, match="lanes .* wait for the warp's other lanes") as caught:
        evaluate(text, np.arange(32, dtype=np.uint32), outputs=(np.uint32,))
    assert code.rstrip(";") in str(caught.value)

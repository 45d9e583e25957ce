"""Atomic updates: of single words, of many threads that meet, in every space."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator.ops.turns import UPDATES, in_turn

from .evaluate import aligned, launch, module
from .test_memory import IN_OUT, PARAMS, TID

ATOMICS = {
    "add.u32": lambda old, b: old + b,
    "min.s32": min,
    "max.u32": max,
    "and.b32": lambda old, b: old & b,
    "or.b32": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b32": lambda old, b: b,
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
}


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(name, space):
    """32 threads on one word: the olds form a chain that ends in the final value."""
    operands = np.random.default_rng(1).integers(0, 40, 32).astype(np.uint32)
    word, olds = aligned(np.array([17], np.uint32)), aligned(np.zeros(32, np.uint32))
    code = (
        TID
        + """
        ld.param.u64 %in, [in];
        ld.param.u64 %out, [out];
        ld.param.u64 %d0, [b];
        mad.wide.u32 %d1, %t, 4, %out;
        mad.wide.u32 %d0, %t, 4, %d0;
        ld.global.u32 %r0, [%d0];
        mov.u64 %d2, %in;
        setp.eq.u32 %p, %t, 0;
    """
    )
    if space == "shared":
        code += f"""
            mov.u64 %d2, 0;
            @%p st.shared.u32 [%d2], 17;
            atom.shared.{name} %r1, [%d2], %r0;
            ld.shared.u32 %r2, [%d2];
            @%p st.global.u32 [%in], %r2;
        """
    else:
        code += f"atom.relaxed.gpu.global.{name} %r1, [%d2], %r0;\n"
    code += "st.global.u32 [%d1], %r1;"
    launch(module(code, PARAMS + ", .param .u64 b"), [word, olds, operands], shared=16)
    value = 17
    for old, b in zip(olds.tolist(), operands.tolist(), strict=True):
        assert old == value
        value = ATOMICS[name](value, b)
    assert word[0] == value


def test_compare_and_swap_and_reduction():
    word = aligned(np.array([3, 0], np.uint32))
    code = (
        IN_OUT
        + """
        atom.global.cas.b32 %r0, [%in], 3, 9;
        red.global.add.f32 [%out], 0f3F000000;
    """
    )
    launch(module(code, PARAMS), [word[:1], word[1:]])
    assert word[0] == 9
    assert word[1:].view(np.float32)[0] == 16.0


def test_additions_to_places_of_their_own():
    """Every thread its own word, then all the same: the fast and the slow way."""
    words = aligned(np.random.default_rng(2).standard_normal(64).astype(np.float32))
    before = words.copy()
    code = TID + """
        ld.param.u64 %out, [out];
        mad.wide.u32 %d0, %t, 4, %out;
        cvt.rn.f32.u32 %r0, %t;
        red.relaxed.gpu.global.add.f32 [%d0], %r0;
        red.global.add.f32 [%d0+128], %r0;
    """
    launch(module(code, ".param .u64 out"), [words])
    lane = np.arange(32, dtype=np.float32)
    assert (words == before + np.concatenate([lane, lane])).all()


KINDS = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "f32": np.float32, "f64": np.float64}
UPDATED = {name.split(".")[0]: function for name, function in ATOMICS.items()} | {
    "add": lambda old, b: old + b,
    "flushed add": lambda old, b: flushed(flushed(old) + flushed(b)),
    "cas": lambda old, b, c: c if old == b else old,
}


def flushed(value: np.float32) -> np.float32:
    small = abs(value) < np.float32(2.0**-126)
    return np.copysign(np.float32(0), value) if small else value


FLOATS = (("add", "f32"), ("flushed add", "f32"), ("exch", "f32"), ("add", "f64"), ("exch", "f64"))
WHOLE = tuple((name, kind) for name in UPDATED if name != "flushed add" for kind in ("u32", "s32", "u64"))


@pytest.mark.parametrize(("name", "kind"), FLOATS + WHOLE)
@pytest.mark.parametrize("spread", [1, 3, 70, 1000])
def test_turns(name, kind, spread):
    """What the threads of a set find and leave, one after the other, to the last bit."""
    random, n = np.random.default_rng(spread), 400
    places = random.integers(0, spread, n) * 8
    if spread == 70:
        places[::2] = 16  # many meet in one place, and few in others

    def draw() -> np.ndarray:
        if kind[0] == "f":
            return (random.standard_normal(n) * 2.0 ** random.integers(-30, 30, n)).astype(KINDS[kind])
        return random.integers(0, 5 if name == "cas" else 90, n).astype(KINDS[kind])

    memory = dict(zip(range(0, 8 * max(spread, n), 8), draw(), strict=False))
    memory |= {int(place): memory.get(int(place), memory[0]) for place in places}
    operands = [draw() for _ in range(2 if name == "cas" else 1)]
    if name == "flushed add":
        operands[0][::7] = np.float32(1e-39) * np.arange(len(operands[0][::7]))
        memory[int(places[0])] = np.float32(3e-38)
    found = np.array([memory[int(place)] for place in places])
    old, new = in_turn(places, found, operands, UPDATES[name])
    with np.errstate(over="ignore"):
        for k, place in enumerate(places.tolist()):
            assert old[k].tobytes() == memory[place].tobytes()
            result = UPDATED[name](memory[place], *(b[k] for b in operands))
            memory[place] = KINDS[kind](result)
            assert new[k].tobytes() == memory[place].tobytes()


@pytest.mark.parametrize("space", ["shared", "generic"])
def test_updates_of_shared_memory_in_many_ctas(space):
    """CTAs use the same addresses, each in its own memory; both warps of a CTA meet there."""
    out = aligned(np.zeros(3, np.uint32))
    atom = "red.shared.add.u32 [8], %r0;" if space == "shared" else "red.add.u32 [%d1], %r0;"
    code = TID + f"""
        ld.param.u64 %out, [out];
        mov.u32 %r1, %ctaid.x;
        add.u32 %r0, %r1, 1;
        setp.eq.u32 %p, %t, 0;
        mov.u64 %d1, 8;
        cvta.shared.u64 %d1, %d1;
        @%p st.shared.u32 [8], 5;
        bar.sync 0;
        {atom}
        bar.sync 0;
        ld.shared.u32 %r2, [8];
        mad.wide.u32 %d0, %r1, 4, %out;
        @%p st.global.u32 [%d0], %r2;
    """
    launch(module(code, ".param .u64 out"), [out], grid=3, block=64, shared=16, races=space == "shared")
    assert out.tolist() == [5 + 64, 5 + 128, 5 + 192]


def test_subnormal_sums_in_global_and_shared_memory():
    """red.global.add.f32 flushes, atom.shared.add.f32 does not."""
    word = aligned(np.array([1e-40, 0], np.float32))
    code = TID + """
        ld.param.u64 %out, [out];
        mov.u32 %r0, 1;
        st.shared.u32 [0], 0;
        atom.shared.add.f32 %r1, [0], %r0;
        ld.shared.u32 %r2, [0];
        red.global.add.f32 [%out], %r0;
        st.global.u32 [%out+4], %r2;
    """
    launch(module(code, ".param .u64 out"), [word], block=1, shared=4)
    assert word.view(np.uint32).tolist() == [0, 1]

"""mbarriers: phases, bytes, waits that end and waits that do not, and what the emulator refuses."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_flash import emulator
from cute_flash.emulator import BarrierError, DataRace, Deadlock, EmulatorError

from .evaluate import launch, module

# Thread 0 makes a barrier at 1024 (%b); everybody knows its warp %w, lane %l and the result's address %out.
HEAD = """
    .reg .b32 %t, %w, %l, %b, %r<9>;
    .reg .b64 %out, %s<4>;
    .reg .pred %first, %p<5>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    and.b32 %l, %t, 31;
    mov.b32 %b, 1024;
    ld.param.u64 %out, [out];
    mad.wide.u32 %out, %t, 4, %out;
    setp.eq.u32 %first, %t, 0;
"""
READY = "fence.mbarrier_init.release.cluster;\nbar.sync 0;"
ORDERS = [
    {},
    {"schedule": "random", "seed": 1},
    {"asynchrony": "late", "schedule": "random", "seed": 2},
    {"asynchrony": "random", "schedule": "random", "seed": 3},
]


def wait(parity: int | str, name: str = "again") -> str:
    """A loop until the barrier's phase of a parity is over."""
    return f"""
    {{ .reg .pred done;
    {name}: mbarrier.try_wait.parity.shared.b64 done, [%b], {parity}, 1000;
    @!done bra {name}; }}
"""


def run(code: str, block: int = 64, races: bool = True, **options) -> np.ndarray:
    """The u32 that each thread has stored at %out."""
    out = np.zeros(block, np.uint32)
    text = module(HEAD + code, ".param .u64 out", "sm_90a")
    launch(text, [out], block=block, shared=1024, races=races, **options)
    return out


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_phase_ends_with_its_last_arrival(options):
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 2;
    {READY}
    setp.eq.u32 %p0, %l, 3;
    @%p0 mbarrier.arrive.shared.b64 _, [%b];
    {wait(0)}
    @%p0 mbarrier.arrive.release.cta.shared::cta.b64 %s0, [%b];
    {wait(1, "second")}
    st.global.b32 [%out], 7;
    """
    assert run(code, **options).tolist() == [7] * 64


def test_a_fresh_barrier_lets_the_odd_parity_pass():
    code = f"@%first mbarrier.init.shared.b64 [%b], 1;\n{READY}\n{wait(1)}\nst.global.b32 [%out], 1;"
    assert run(code).all()


def test_arrivals_may_count_several_times_and_return_the_phase():
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 5;
    {READY}
    @!%first bra rest;
    mbarrier.arrive.shared.b64 %s0, [%b], 4;
    mbarrier.test_wait.shared.b64 %p0, [%b], %s0;
    mbarrier.arrive.shared.b64 %s1, [%b];
    mbarrier.test_wait.shared.b64 %p1, [%b], %s0;
    mbarrier.arrive.shared.b64 %s2, [%b], 5;
    selp.b32 %r0, 1, 0, %p0;
    selp.b32 %r1, 2, 0, %p1;
    or.b32 %r0, %r0, %r1;
    cvt.u32.u64 %r2, %s2;
    shl.b32 %r2, %r2, 4;
    or.b32 %r0, %r0, %r2;
    st.global.b32 [%out], %r0;
    rest:
    """
    assert run(code)[0] == 2 | 1 << 4


def test_bytes_hold_a_phase_open_and_may_come_early():
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    {READY}
    @!%first bra rest;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 16;
    mbarrier.arrive.expect_tx.shared.b64 _, [%b], 48;
    mbarrier.test_wait.parity.shared.b64 %p0, [%b], 0;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%b], 32;
    mbarrier.test_wait.parity.shared.b64 %p1, [%b], 0;
    selp.b32 %r0, 1, 0, %p0;
    selp.b32 %r1, 2, 0, %p1;
    or.b32 %r0, %r0, %r1;
    st.global.b32 [%out], %r0;
    rest:
    """
    assert run(code)[0] == 2


def test_a_bounded_wait_gives_up_when_nothing_else_can_happen():
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    {READY}
    mbarrier.try_wait.parity.shared.b64 %p0, [%b], 0;
    selp.b32 %r0, 1, 2, %p0;
    st.global.b32 [%out], %r0;
    """
    assert run(code).tolist() == [2] * 64


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_who_waits_for_ever_is_named(options):
    code = f"@%first mbarrier.init.shared.b64 [%b], 2;\n{READY}\n{wait(0)}"
    with pytest.raises(Deadlock, match="wait for mbarrier 0x400 of CTA 0, PTX line"):
        run(code, **options)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("mbarrier.arrive.shared.b64 _, [%b];", BarrierError, "no mbarrier was initialised at shared 0x400"),
        ("mbarrier.init.shared.b64 [%b+4], 1;", BarrierError, "cannot lie at 0x404"),
        ("mbarrier.init.shared.b64 [%b+1024], 1;", BarrierError, "cannot lie at 0x800"),
        ("mbarrier.init.shared.b64 [%b], 0;", BarrierError, "with 0 arrivals"),
        ("mbarrier.init.shared.b64 [%b], 1;\nmbarrier.init.shared.b64 [%b], 1;", BarrierError, "was not inv"),
        ("mbarrier.init.shared.b64 [%b], 1;\nmbarrier.arrive.shared.b64 _, [%b], 2;",
         BarrierError, "2 arrivals"),
        ("mbarrier.init.shared.b64 [%b], 1;\nld.shared.b32 %r0, [%b];", EmulatorError, "was never written"),
        ("mbarrier.init.shared.b64 [%b], 1;\nmbarrier.inval.shared.b64 [%b];\n"
         "mbarrier.arrive.shared.b64 _, [%b];", BarrierError, "no mbarrier"),
    ],
)  # fmt: skip
def test_misuse(code, error, words):
    with pytest.raises(error, match=words):
        run(f"@!%first bra rest;\n{code}\nrest:")


def test_a_kernel_may_leave_a_phase_open():
    """The last acquire of a pipeline expects bytes that no copy brings; nobody waits for them."""
    code = "mbarrier.init.shared.b64 [%b], 2;\nmbarrier.arrive.expect_tx.shared.b64 _, [%b], 16;"
    run(f"@!%first bra rest;\n{code}\nrest:")


def test_others_need_an_order_to_the_initialisation():
    code = f"@%first mbarrier.init.shared.b64 [%b], 1;\n{wait(1)}"
    run(code, block=32)
    with pytest.raises(DataRace, match="without an order to its initialisation by warp 0"):
        run(code, block=64)


def test_arrivals_order_what_came_before_them():
    code = """
    @%first mbarrier.init.shared.b64 [%b], 32;
    {ready}
    shl.b32 %r0, %l, 2;
    setp.eq.u32 %p0, %w, 0;
    @!%p0 bra other;
    st.shared.b32 [%r0+1152], %t;
    mbarrier.arrive{how}.shared.b64 _, [%b];
    bra end;
    other:
    {wait}
    ld.shared.b32 %r1, [%r0+1152];
    st.global.b32 [%out], %r1;
    end:
    """
    for options in ORDERS:
        got = run(code.format(ready=READY, how="", wait=wait(0)), **options)
        assert got[32:].tolist() == list(range(32))
    for how, waits in ((".relaxed.cta", wait(0)), ("", wait(1))):
        with pytest.raises((DataRace, Deadlock), match="without an order|nothing can run"):
            run(code.format(ready=READY, how=how, wait=waits))


def test_registers_move_between_warps():
    code = """
    setp.eq.u32 %p0, %w, 0;
    setp.lt.u32 %p1, %w, 4;
    @%p1 bra shrink;
    setmaxnreg.inc.sync.aligned.u32 240;
    bra end;
    shrink: setmaxnreg.dec.sync.aligned.u32 {less};
    end: st.global.b32 [%out], 1;
    """
    for options in ({}, {"schedule": "random", "seed": 4}):
        assert run(code.format(less=24), block=384, **options).all()
        with pytest.raises(Deadlock, match="wait for registers of CTA"):
            run(code.format(less=40), block=384, **options)


SHARED_BY_TWO = """
    setp.lt.u32 %p1, %w, 4;
    @%p1 bra shrink;
    setmaxnreg.inc.sync.aligned.u32 {more};
    bra end;
    shrink: setmaxnreg.dec.sync.aligned.u32 96;
    end: st.global.b32 [%out], 1;
"""


@pytest.mark.parametrize(
    ("directives", "registers"),
    [
        (".reqntid 256, 1, 1\n.minnctapersm 2", None),
        (".maxntid 512, 1, 1", None),
        (".maxnreg 128", None),
        ("", 128),
        (".reqntid 256, 1, 1", 126),
    ],
)
def test_what_a_cta_is_launched_with(directives, registers):
    """Two warpgroups of 128 registers per thread each: 96 and 160 fit, 96 and 168 do not."""

    def attempt(more: int, head: str, told: int | None) -> None:
        text = module(HEAD + SHARED_BY_TWO.format(more=more), ".param .u64 out", "sm_90a")
        text = text.replace("(.param .u64 out)", f"(.param .u64 out)\n{head}\n")
        out, memory = np.zeros(256, np.uint32), emulator.GlobalMemory()
        memory.add(out.ctypes.data, out.nbytes, "out")
        params = struct.pack("<Q", out.ctypes.data)
        one = emulator.Launch("k", (1, 1, 1), (256, 1, 1), params=params, registers=told)
        emulator.run(emulator.Program(text), one, memory)
        assert out.all()

    attempt(160, directives, registers)
    with pytest.raises(Deadlock, match="wait for registers of CTA"):
        attempt(168, directives, registers)
    with pytest.raises(EmulatorError, match="setmaxnreg.inc from 248 to 160 registers"):
        attempt(160, "", None)


def test_register_counts_are_checked():
    for line, words in (
        ("setmaxnreg.inc.sync.aligned.u32 20;", "multiples of 8 from 24"),
        ("setmaxnreg.inc.sync.aligned.u32 24;", "setmaxnreg.inc from 168 to 24"),
        ("setp.eq.u32 %p0, %w, 1;\n@%p0 setmaxnreg.dec.sync.aligned.u32 24;", "of one warpgroup executed"),
    ):
        with pytest.raises(EmulatorError, match=words):
            run(line, block=384)

"""Branches, loops, predicated instructions, exits, geometry and order of execution."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import EmulatorError, UndefinedRegister

from .evaluate import evaluate, launch, module

SCHEDULES = [{"schedule": "lockstep"}, *({"schedule": "random", "seed": seed} for seed in range(3))]


def test_divergent_if_else():
    a = np.arange(128, dtype=np.int32) - 64
    code = """
        .reg .pred %p;
        setp.lt.s32 %p, %a, 0;
        @%p bra NEGATIVE;
        shl.b32 %x, %a, 1;
        bra JOIN;
        NEGATIVE: neg.s32 %x, %a;
        JOIN: add.s32 %x, %x, 1;
    """
    (got,) = evaluate(code, a, outputs=(np.int32,))
    assert (got == np.where(a < 0, -a, 2 * a) + 1).all()


def test_loop_with_a_count_of_its_own_per_thread():
    """Collatz steps: every thread leaves the loop at another time."""
    a = np.arange(1, 65, dtype=np.uint32)
    code = """
        .reg .pred %p, %q;
        .reg .b32 %n, %odd;
        mov.u32 %x, 0;
        mov.u32 %n, %a;
        LOOP:
        setp.eq.u32 %p, %n, 1;
        @%p bra DONE;
        and.b32 %odd, %n, 1;
        setp.eq.u32 %q, %odd, 1;
        @%q mad.lo.u32 %n, %n, 3, 1;
        @!%q shr.u32 %n, %n, 1;
        add.u32 %x, %x, 1;
        bra LOOP;
        DONE:
    """

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    (got,) = evaluate(code, a, outputs=(np.uint32,))
    assert got.tolist() == [steps(n) for n in a.tolist()]


def test_scopes_and_equal_labels():
    """Inline assembly repeats labels and registers inside braces."""
    block = """
        {
            .reg .pred P;
            .reg .b32 v;
            LAB_WAIT:
            add.u32 %x, %x, 1;
            setp.ge.u32 P, %x, {limit};
            @P bra DONE;
            bra LAB_WAIT;
            DONE:
            mov.u32 v, %x;
        }
    """
    code = "mov.u32 %x, 0;" + block.replace("{limit}", "3") + block.replace("{limit}", "10")
    (got,) = evaluate(code, np.zeros(32), outputs=(np.uint32,))
    assert (got == 10).all()


def test_branch_table():
    a = np.arange(64, dtype=np.uint32) % 3
    code = """
        TABLE: .branchtargets ZERO, ONE, TWO;
        brx.idx %a, TABLE;
        ZERO: mov.u32 %x, 10;
        bra DONE;
        ONE: mov.u32 %x, 11;
        bra DONE;
        TWO: mov.u32 %x, 12;
        DONE:
    """
    (got,) = evaluate(code, a, outputs=(np.uint32,))
    assert (got == a + 10).all()


GEOMETRY = """
    .reg .b32 %r<20>;
    .reg .b64 %d<3>;
    ld.param.u64 %d0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %tid.y;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ctaid.y;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %nctaid.x;
    mad.lo.u32 %r6, %r3, %r5, %r2;
    mov.u32 %r7, %ntid.y;
    mul.lo.u32 %r8, %r7, %r4;
    mul.lo.u32 %r9, %r6, %r8;
    mad.lo.u32 %r10, %r1, %r4, %r0;
    add.u32 %r11, %r9, %r10;
    shl.b32 %r12, %r6, 16;
    or.b32 %r13, %r12, %r10;
    mad.wide.u32 %d1, %r11, 4, %d0;
    st.global.u32 [%d1], %r13;
"""


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("per_wave", [None, 1, 2])
def test_grid_and_block(options, per_wave):
    """2-D grid and block whose last warp is partly empty, in waves of any size."""
    from cute_flash import emulator

    target = np.zeros(6 * 50, np.uint32)
    memory = emulator.GlobalMemory()
    memory.add(target.ctypes.data, target.nbytes, "out")
    one = emulator.Launch("k", (3, 2, 1), (10, 5, 1), params=target.ctypes.data.to_bytes(8, "little"))
    chosen = emulator.Options(ctas_per_wave=per_wave, **options)
    report = emulator.run(emulator.Program(module(GEOMETRY, ".param .u64 out")), one, memory, chosen)
    expected = np.arange(6)[:, None] << 16 | np.arange(50)
    assert (target.reshape(6, 50) == expected).all()
    assert report.waves == (1 if per_wave is None else 6 // per_wave)
    assert report.instructions == 18 * 2 * 6
    assert report.opcodes["mov.u32"] == 7 * 2 * 6


@pytest.mark.parametrize("options", SCHEDULES)
def test_early_exit(options):
    """Lanes that exit leave the others to go on; so do warps."""
    target = np.zeros(96, np.uint32)
    code = """
        .reg .b32 %t, %r;
        .reg .b64 %d;
        .reg .pred %p;
        mov.u32 %t, %tid.x;
        and.b32 %r, %t, 5;
        setp.eq.u32 %p, %r, 4;
        @%p exit;
        setp.ge.u32 %p, %t, 64;
        @%p bra LEAVE;
        ld.param.u64 %d, [out];
        mad.wide.u32 %d, %t, 4, %d;
        st.global.u32 [%d], 1;
        LEAVE:
    """
    launch(module(code, ".param .u64 out"), [target], block=96, **options)
    t = np.arange(96)
    assert (target == ((t < 64) & (t & 5 != 4))).all()


def test_a_set_that_waits_for_another_one_by_spinning():
    """Warp 0 spins on a global flag that warp 1, further on in the text, sets."""
    flag = np.zeros(2, np.uint32)
    code = """
        .reg .b32 %t, %r;
        .reg .b64 %d;
        .reg .pred %p;
        ld.param.u64 %d, [flag];
        mov.u32 %t, %tid.x;
        setp.ge.u32 %p, %t, 32;
        @%p bra SETTER;
        SPIN: ld.volatile.global.u32 %r, [%d];
        setp.eq.u32 %p, %r, 0;
        @%p bra SPIN;
        st.global.u32 [%d+4], 7;
        bra DONE;
        SETTER: st.global.u32 [%d], 1;
        DONE:
    """
    for options in SCHEDULES:
        flag[:] = 0
        launch(module(code, ".param .u64 flag"), [flag], block=64, **options)
        assert flag.tolist() == [1, 7]


def test_random_order_depends_on_the_seed_only():
    """Warps append their numbers to a list: the order is the schedule's."""
    code = """
        .reg .b32 %t, %r, %k;
        .reg .b64 %d, %e;
        .reg .pred %p;
        ld.param.u64 %d, [out];
        mov.u32 %t, %tid.x;
        and.b32 %r, %t, 31;
        shr.u32 %t, %t, 5;
        setp.ne.u32 %p, %r, 0;
        @%p bra DONE;
        atom.global.add.u32 %k, [%d], 1;
        mad.wide.u32 %e, %k, 4, %d;
        st.global.u32 [%e+4], %t;
        DONE:
    """

    def order(**options) -> tuple[int, ...]:
        target = np.zeros(9, np.uint32)
        launch(module(code, ".param .u64 out"), [target], block=256, **options)
        return tuple(target[1:].tolist())

    assert order() == tuple(range(8))
    orders = [order(schedule="random", seed=seed) for seed in range(8)]
    assert len(set(orders)) > 4
    assert all(sorted(o) == list(range(8)) for o in orders)
    assert orders == [order(schedule="random", seed=seed) for seed in range(8)]


@pytest.mark.parametrize(
    "line",
    [
        "prefetch.global.L2 [%address];",
        "prefetch.global.L2::evict_last [%address];",
        "fence.acq_rel.gpu;",
        "fence.sc.cta;",
        "membar.gl;",
        "nanosleep.u32 20;",
        "setmaxnreg.dec.sync.aligned.u32 232;",
        "griddepcontrol.wait;",
        "griddepcontrol.launch_dependents;",
        ".reg .b64 %c; createpolicy.fractional.L2::evict_first.b64 %c, 0f3F800000;",
    ],
)
def test_what_changes_no_result(line):
    (got,) = evaluate(line + "mov.u32 %x, %a;", np.arange(32, dtype=np.uint32), outputs=(np.uint32,))
    assert got.tolist() == list(range(32))


def test_trap():
    with pytest.raises(EmulatorError, match="trap"):
        evaluate("trap;", np.zeros(32), outputs=(np.uint32,))


# Undefined registers.


def test_reads_of_unwritten_registers():
    with pytest.raises(UndefinedRegister, match=r"%r is read before .* lane 0"):
        evaluate(".reg .b32 %r; add.u32 %x, %r, 1;", np.zeros(32), outputs=(np.uint32,))
    with pytest.raises(UndefinedRegister, match="%p"):
        evaluate(".reg .pred %p; mov.u32 %x, 0; @%p add.u32 %x, %x, 1;", np.zeros(32), outputs=(np.uint32,))


CONDITIONAL = """
    .reg .pred %p;
    .reg .b32 %r, %s;
    setp.lt.u32 %p, %a, {first};
    @%p mov.u32 %r, 5;
    mov.u32 %s, %r;
    setp.lt.u32 %p, %a, {second};
    mov.u32 %x, 0;
    @%p add.u32 %x, %s, 1;
"""


def test_reads_after_writes_on_some_paths():
    """Written under one condition, copied by everybody, used under a narrower or a wider one."""
    a = np.arange(64, dtype=np.uint32)
    (got,) = evaluate(CONDITIONAL.format(first=20, second=20), a, outputs=(np.uint32,))
    assert (got == np.where(a < 20, 6, 0)).all()
    with pytest.raises(UndefinedRegister, match="%s is read .* warp 0, lane 20"):
        evaluate(CONDITIONAL.format(first=20, second=21), a, outputs=(np.uint32,))


def test_undefined_in_the_first_turn_of_a_loop():
    code = """
        .reg .pred %p;
        .reg .b32 %r;
        mov.u32 %x, 0;
        LOOP: setp.eq.u32 %p, %x, {when};
        @%p add.u32 %r, %r, 1;
        mov.u32 %r, 3;
        add.u32 %x, %x, 1;
        setp.lt.u32 %p, %x, 4;
        @%p bra LOOP;
    """
    evaluate(code.replace("{when}", "1"), np.zeros(32), outputs=(np.uint32,))
    with pytest.raises(UndefinedRegister, match="%r"):
        evaluate(code.replace("{when}", "0"), np.zeros(32), outputs=(np.uint32,))

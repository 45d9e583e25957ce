"""The race detector: what it must report, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import DataRace

from .evaluate import aligned, launch, module

HEAD = """
    .reg .b32 %t, %w, %l, %s<9>, %r<9>;
    .reg .b16 %h;
    .reg .pred %p, %q;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    and.b32 %l, %t, 31;
    shl.b32 %s0, %l, 2;
    shl.b32 %s1, %t, 2;
    setp.eq.u32 %p, %w, 0;
    setp.eq.u32 %q, %w, 1;
"""
SCHEDULES = [{"schedule": "lockstep"}, {"schedule": "random", "seed": 1}, {"schedule": "random", "seed": 2}]


def run(code: str, block: int = 64, **options) -> None:
    launch(module(HEAD + code), [], block=block, shared=1024, races=True, uninitialized="poison", **options)


def race(code: str, *words: str, block: int = 64, **options) -> None:
    with pytest.raises(DataRace) as caught:
        run(code, block, **options)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("@%p st.shared.u32 [%s0], 1;", "@%q ld.shared.u32 %r0, [%s0];", "write"),
        ("@%p ld.shared.u32 %r0, [%s0];", "@%q st.shared.u32 [%s0], 1;", "read"),
        ("@%p st.shared.u32 [%s0], 1;", "@%q st.shared.u32 [%s0], 1;", "write"),
    ],
)
def test_conflicts_need_a_barrier_between(first, second, kind, options):
    race(f"{first}\n{second}", "shared 0x", "warp 0", "warp 1", f"the {kind} of warp", "PTX line", **options)
    run(f"{first}\nbar.sync 0;\n{second}", **options)
    race(f"bar.sync 0;\n{first}\n{second}\nbar.sync 0;", **options)


def test_messages_name_both_places():
    race("@%p st.shared.u32 [%s0], 1;\n@%q ld.shared.u32 %r0, [%s0];",
         "reads shared 0x0 without an order to the write of warp 0", "st.shared.u32 [%s0], 1",
         "ld.shared.u32 %r0, [%s0]", "CTA (0, 0, 0), warp 1, lane 0")  # fmt: skip


@pytest.mark.parametrize("options", SCHEDULES)
def test_reads_and_own_accesses_do_not_race(options):
    run(
        "@%p st.shared.u32 [%s0], 1;\nbar.sync 0;\nld.shared.u32 %r0, [%s0];\nld.shared.u32 %r0, [%s0];",
        **options,
    )
    run("st.shared.u32 [%s1], 1;\nld.shared.u32 %r0, [%s1];\nst.shared.u32 [%s1], 2;", **options)


def test_a_barrier_orders_only_those_who_take_part():
    """Warps 0 and 1 meet at barrier 1; warp 2 has not met anybody."""
    meet = """
        setp.lt.u32 %p, %w, 2;
        @!%p bra LATER;
        @%q bra MEET;
        st.shared.u32 [%s0], 1;
        MEET: bar.sync 1, 64;
        LATER:
    """
    run(meet + "@%q ld.shared.u32 %r0, [%s0];", block=96)
    race(meet + "@!%p ld.shared.u32 %r0, [%s0];", "warp 2", "the write of warp 0", block=96)


def test_phases_of_one_barrier_are_apart():
    """Warps 2 and 3 use the barrier after warps 0 and 1: that tells them nothing of what these did."""
    code = "@%p st.shared.u32 [%s0], 1;\nbar.sync 1, 64;\nsetp.eq.u32 %p, %w, {reader};\n"
    code += "@%p ld.shared.u32 %r0, [%s0];"
    run(code.replace("{reader}", "1"), block=128)
    race(code.replace("{reader}", "2"), "warp 2", "the write of warp 0", block=128)


def test_order_is_passed_on_through_others():
    """0 -> 1 by barrier 1, then 1 -> 2 by barrier 2: what 0 wrote is known to 2."""
    chain = """
        setp.eq.u32 %p, %w, 0;
        @%p st.shared.u32 [%s0], 1;
        setp.lt.u32 %p, %w, 2;
        @%p bar.sync 1, 64;
        setp.gt.u32 %p, %w, 0;
        @%p bar.sync 2, 64;
        setp.eq.u32 %p, %w, 2;
        @%p ld.shared.u32 %r0, [%s0];
    """
    run(chain, block=96)
    race(
        chain.replace("bar.sync 1, 64", "bar.sync 3, 64").replace("bar.sync 2, 64", "add.u32 %r1, %w, 1"),
        block=96,
    )


def test_arrive_publishes_and_sync_learns():
    code = """
        @%q bra SECOND;
        st.shared.u32 [%s0], 1;
        bar.arrive 1, 64;
        {late}
        bra DONE;
        SECOND: bar.sync 1, 64;
        ld.shared.u32 %r0, [%s0];
        DONE:
    """
    run(code.replace("{late}", ""))
    race(code.replace("{late}", "st.shared.u32 [%s0], 2;"), "the write of warp 0")
    race(code.replace("{late}", "").replace("bar.sync 1, 64;", "bar.arrive 1, 64;"))


def test_stores_of_one_instruction():
    """Warps that store to one place race; lanes of one warp do only when their values differ."""
    race("st.shared.u32 [%s0], 1;", "in the same instruction")
    run("st.shared.u32 [%s1], 1;")
    run("st.shared.u32 [0], 1;", block=32)
    race("st.shared.u32 [0], %t;", "in the same instruction", block=32)
    race("st.shared.u32 [0], 1;", "in the same instruction")


def test_neighbouring_bytes_do_not_race():
    """Granules follow the narrowest access of the program."""
    code = "shl.b32 %r0, %l, 2;\n@%q add.u32 %r0, %r0, 2;\nmov.u16 %h, 1;\nst.shared.b16 [%r0], %h;\n"
    run(code)
    race(code + "@%p ld.shared.b32 %r1, [%s0];", "the write of warp 1")
    run(code + "bar.sync 0;\n@%p ld.shared.b32 %r1, [%s0];")


def test_overlapping_sizes():
    wide = "@%p st.shared.v4.b32 [0], {%t, %t, %t, %t};\n".replace("%t", "1")
    race(wide + "@%q ld.shared.u32 %r0, [12];", "0xc")
    run(wide + "@%q ld.shared.u32 %r0, [16];")


def test_atomics_race_with_plain_accesses_only():
    run("atom.shared.add.u32 %r0, [0], 1;\nred.shared.add.u32 [0], 1;")
    race("atom.shared.add.u32 %r0, [0], 1;\n@%q ld.shared.u32 %r1, [0];")
    run("atom.shared.add.u32 %r0, [0], 1;\nbar.sync 0;\nld.shared.u32 %r1, [0];")


def test_matrices_are_accesses_too():
    code = """
        shl.b32 %s2, %l, 4;
        @%p st.shared.v4.b32 [%s2], {{%t, %t, %t, %t}};
        {barrier}
        @%q ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%s2];
    """
    run(code.format(barrier="bar.sync 0;"))
    race(code.format(barrier=""), "ldmatrix", "st.shared.v4.b32")


def test_ctas_and_launches_are_apart():
    data = aligned(np.zeros(1))
    text = module(HEAD + "@%p st.shared.u32 [%s0], %t;\nbar.sync 0;\nld.shared.u32 %r0, [%s0];")
    launch(text, [data][:0], grid=5, block=64, shared=128, races=True, ctas_per_wave=2)

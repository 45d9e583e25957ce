"""Races in global memory between the CTAs of a launch: what must be reported, and what must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cute_flash.emulator import DataRace, Options
from cute_flash.emulator.execution.launch import View
from cute_flash.emulator.front.portfolio import Held, examine
from cute_flash.emulator.units.tensor_map import TensorMap

from .evaluate import aligned, launch, module

# Thread t of CTA c. [%a]: a place of its lane in all CTAs; [%o]: one of its own; [%f]: a flag.
HEAD = """
    .reg .b32 %t, %c, %l, %w, %i, %r<9>;
    .reg .b64 %a, %o, %f, %d<4>;
    .reg .f32 %v;
    .reg .pred %p, %q, %first, %z;
    mov.u32 %t, %tid.x;
    mov.u32 %c, %ctaid.x;
    and.b32 %l, %t, 31;
    shr.u32 %w, %t, 5;
    setp.eq.u32 %p, %c, 0;
    setp.eq.u32 %q, %c, 1;
    setp.eq.u32 %first, %t, 0;
    ld.param.u64 %a, [p0];
    ld.param.u64 %f, [p1];
    mad.lo.u32 %i, %c, 64, %t;
    mad.wide.u32 %o, %i, 4, %a;
    mad.wide.u32 %a, %l, 4, %a;
"""
ORDERS = [
    {"schedule": "lockstep"},
    {"schedule": "lockstep", "ctas_per_wave": 1},
    *({"schedule": "random", "seed": seed} for seed in range(2)),
]


def run(code: str, grid: int = 2, block: int = 32, target: str = "sm_80", **options) -> np.ndarray:
    data, flags = aligned(np.ones(1024, np.float32)), aligned(np.zeros(16, np.uint32))
    text = module(HEAD + code, ".param .u64 p0, .param .u64 p1", target)
    launch(text, [data, flags], grid, block, shared=1024, races=True, **options)
    return data


def race(code: str, *words: str, **options) -> None:
    with pytest.raises(DataRace) as caught:
        run(code, **options)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize(
    ("first", "second", "noun"),
    [
        ("st.global.u32 [%a], 1", "ld.global.u32 %r0, [%a]", "write"),
        ("ld.global.u32 %r0, [%a]", "st.global.u32 [%a], 1", "read"),
        ("st.global.u32 [%a], 1", "st.global.u32 [%a], 2", "write"),
        ("red.global.add.f32 [%a], 0f3F800000", "ld.global.f32 %v, [%a]", "update"),
        ("st.global.u32 [%a], 1", "red.global.add.f32 [%a], 0f3F800000", "write"),
        ("ld.global.u32 %r0, [%a]", "red.global.add.f32 [%a], 0f3F800000", "read"),
        ("st.relaxed.gpu.global.u32 [%a], 1", "ld.global.u32 %r0, [%a]", "update"),
        ("st.global.u32 [%a], 1", "ld.relaxed.gpu.global.u32 %r0, [%a]", "write"),
        ("st.relaxed.cta.global.u32 [%a], 1", "ld.relaxed.gpu.global.u32 %r0, [%a]", "write"),
    ],
)
def test_conflicts_between_ctas(first, second, noun, options):
    if options["schedule"] == "lockstep":
        race(f"@%p {first};\n@%q {second};", f"the {noun} of CTA (0, 0, 0), warp 0", "(CTA (1, 0, 0), warp 0",
             "p0 0x", "in global memory", f"{first}", **options)  # fmt: skip
    else:
        race(f"@%p {first};\n@%q {second};", "in global memory", **options)


@pytest.mark.parametrize("options", ORDERS)
def test_what_does_not_conflict(options):
    code = "ld.global.f32 %v, [%a];\nst.global.f32 [%o+512], %v;\nld.global.f32 %v, [%o+512];"
    run(code, grid=3, **options)
    run("red.global.add.f32 [%a], 0f3F800000;\natom.global.add.f32 %v, [%a], 0f3F800000;", grid=3, **options)
    run("st.relaxed.gpu.global.u32 [%a], %c;\nld.relaxed.gpu.global.u32 %r0, [%a];", grid=3, **options)
    run("st.volatile.global.u32 [%a], %c;\nld.volatile.global.u32 %r0, [%a];", grid=3, **options)


def test_two_ctas_store_one_element():
    """In one instruction, as CTAs run together, and in waves of one."""
    for options in ORDERS:
        race("st.global.u32 [%a], 1;", "writes p0", **options)
    race("st.global.u32 [%a], 1;", "the write of CTA (0, 0, 0), warp 0", "st.global.u32 [%a], 1")
    race("st.global.u32 [%a], 1;", "the write of CTA (0, 0, 0), warp 0", grid=1, block=64)
    race("mov.u64 %d0, %f;\nst.global.v4.u32 [%d0], {1, 1, 1, 1};", "in global memory")
    run("st.global.u32 [%o], %t;", block=64)
    run("@%p st.global.u32 [%f], 1;")
    race("@%p st.global.u32 [%f], %t;", "lane 1")


def test_a_sum_without_atomics():
    sums = "ld.global.f32 %v, [%a];\nadd.f32 %v, %v, %v;\nst.global.f32 [%a], %v;"
    for options in ORDERS:
        race(sums, **options)
    race(sums, "writes p0", "the write of CTA", ctas_per_wave=2)
    race(sums, "reads p0", "the write of CTA (0, 0, 0), warp 0", ctas_per_wave=1)
    assert run("red.global.add.f32 [%a], 0f3F800000;", grid=3)[0] == 4


@pytest.mark.parametrize("options", [*ORDERS[:1], *ORDERS[2:]])
def test_a_barrier_orders_a_ctas_own_warps(options):
    code = """
        setp.eq.u32 %p, %w, 0;
        mad.wide.u32 %o, %c, 128, %a;
        @%p st.global.u32 [%o], 1;
        {barrier}
        @!%p ld.global.u32 %r0, [%o];
    """
    run(code.format(barrier="bar.sync 0;"), block=64, **options)
    race(code.format(barrier=""), block=64, **options)


# CTA c waits until the flag is c, adds to the elements of all, and says so.
RELAY = """
    @!%first bra GO;
    WAIT: {look};
    setp.ne.u32 %z, %r0, %c;
    @%z bra WAIT;
    GO: {heard}
    {meet}
    ld.global.f32 %v, [%a];
    add.f32 %v, %v, 0f3F800000;
    {between}
    st.global.f32 [%a], %v;
    {meet}
    add.u32 %r1, %c, 1;
    {told}
    @%first {say};
"""
FORMS = {
    "look": "ld.acquire.gpu.global.u32 %r0, [%f]", "say": "red.release.gpu.global.add.u32 [%f], 1",
    "heard": "", "told": "", "meet": "bar.sync 0;", "between": "",
}  # fmt: skip
FENCES = FORMS | {
    "look": "ld.relaxed.gpu.global.u32 %r0, [%f]", "say": "red.relaxed.gpu.global.add.u32 [%f], 1",
    "heard": "fence.acq_rel.gpu;", "told": "fence.acq_rel.gpu;",
}  # fmt: skip

# The same, of atomic updates.
ADDING = RELAY.replace("    ld.global.f32 %v, [%a];\n    add.f32 %v, %v, 0f3F800000;\n", "").replace(
    "st.global.f32 [%a], %v;", "red.global.add.f32 [%a], 0f3F800000;"
)


@pytest.mark.parametrize(
    "forms",
    [
        FORMS,
        FORMS | {"say": "st.release.gpu.global.u32 [%f], %r1"},
        FORMS | {"say": "atom.add.acq_rel.gpu.global.u32 %r2, [%f], 1"},
        FORMS | {"look": "atom.or.acquire.gpu.global.b32 %r0, [%f], 0"},
        FENCES,
        FENCES | {"heard": "membar.gl;", "told": "membar.gl;"},
        FENCES | {"look": "ld.volatile.global.u32 %r0, [%f]", "say": "st.volatile.global.u32 [%f], %r1"},
        FENCES | {"look": "atom.or.global.b32 %r0, [%f], 0", "say": "atom.add.global.u32 %r2, [%f], 1"},
    ],
)
@pytest.mark.parametrize("options", [*ORDERS[:1], *ORDERS[2:]])
def test_a_relay_orders_ctas(forms, options):
    assert (run(RELAY.format(**forms), grid=4, **options)[:32] == 5).all()
    assert (run(ADDING.format(**forms), grid=4, ordered_reductions=True, **options)[:32] == 5).all()


@pytest.mark.parametrize(
    "forms",
    [
        FORMS | {"say": "red.relaxed.gpu.global.add.u32 [%f], 1"},
        FORMS | {"say": "red.release.cta.global.add.u32 [%f], 1"},
        FORMS | {"say": "st.global.u32 [%f], %r1"},
        FORMS | {"look": "ld.relaxed.gpu.global.u32 %r0, [%f]"},
        FORMS | {"look": "ld.global.u32 %r0, [%f]"},
        FORMS | {"look": "ld.acquire.cta.global.u32 %r0, [%f]"},
        FORMS | {"meet": ""},
        FENCES | {"heard": ""},
        FENCES | {"told": ""},
        FENCES | {"told": "fence.acq_rel.cta;"},
        FENCES | {"told": "fence.acquire.gpu;"},
        FENCES | {"heard": "fence.release.gpu;"},
        FENCES | {"told": "", "between": "fence.acq_rel.gpu;"},
    ],
)
@pytest.mark.parametrize("options", [*ORDERS[:1], *ORDERS[2:]])
def test_a_relay_that_lacks_something(forms, options):
    with pytest.raises(DataRace):
        run(RELAY.format(**forms), grid=4, **options)
    with pytest.raises(DataRace):
        run(ADDING.format(**forms), grid=4, ordered_reductions=True, **options)


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize(
    ("update", "depends"),
    [
        ("red.global.add.f32 [%a], %v", True),
        ("atom.global.add.f32 %v, [%a], %v", True),
        ("red.global.add.f64 [%o], %e", True),
        ("red.global.add.u32 [%a], 1", False),
        ("red.global.max.s32 [%a], %c", False),
    ],
)
def test_sums_whose_bits_depend_on_the_order(update, depends, options):
    """Of floating-point numbers, by threads of different CTAs, warps or lanes; where it is asked for."""
    place = ".reg .f64 %e;\nmov.f64 %e, 0d3FF0000000000000;\nmov.f32 %v, 0f3F800000;\n"
    place += "mad.wide.u32 %o, %l, 4, %a;\n"
    shared = f"{place}mov.u64 %d0, %f;\n{update};".replace("[%o]", "[%d0]").replace("[%a]", "[%d0]")
    codes = {f"{place}{update};": [(2, 32), (1, 64)], shared: [(1, 32)]}
    for code, sizes in codes.items():
        for grid, block in sizes:
            run(code, grid, block, **options)
            if depends:
                race(code, "the update of CTA", grid=grid, block=block, ordered_reductions=True, **options)
            else:
                run(code, grid, block, ordered_reductions=True, **options)
    alone = f"{place}{update};\n{update};"
    run(alone, grid=1, ordered_reductions=True, **options)


def test_a_sum_that_somebody_else_clears():
    code = "@%p st.relaxed.gpu.global.u32 [%a], 0;\n@%q red.global.add.f32 [%a], 0f3F800000;"
    run(code)
    race(code, "the update of CTA (0, 0, 0)", ordered_reductions=True)


def test_ordered_reductions_in_words():
    assert Options.read("late ordered_reductions") == Options("late", races=True, ordered_reductions=True)
    with pytest.raises(ValueError, match="ordered_reductions is True and races is False"):
        Options(ordered_reductions=True)


def test_a_flag_says_no_more_than_was_done_before():
    late = RELAY.format(**FORMS) + "@%first st.global.u32 [%a+256], 1;"
    race(late, "p0 0x100", "the write of CTA")


def test_a_store_ends_what_updates_have_told():
    """A flag that somebody stores to who has heard of nothing says nothing."""
    code = """
        setp.eq.u32 %z, %c, 2;
        @%p st.global.u32 [%a], 1;
        @%p bar.warp.sync -1;
        and.pred %first, %first, %p;
        @%first red.release.gpu.global.add.u32 [%f], 1;
        {between}
        @%z ld.acquire.gpu.global.u32 %r0, [%f];
        @%z st.global.u32 [%a], 1;
    """
    run(code.format(between=""), grid=3)
    run(code.format(between="@%q red.relaxed.gpu.global.add.u32 [%f], 1;"), grid=3)
    race(code.format(between="@%q st.relaxed.gpu.global.u32 [%f], 1;"), grid=3)


def test_order_is_passed_on_through_others():
    """0 tells 1 by one flag, 1 tells 2 by another: 2 knows what 0 did, from whichever warp of its own."""
    code = """
        setp.eq.u32 %z, %c, 2;
        @%p st.global.u32 [%a], 1;
        @%p bar.sync 0;
        setp.eq.and.u32 %p, %t, 0, %p;
        @%p red.release.gpu.global.add.u32 [%f], 1;
        @%q ld.acquire.gpu.global.u32 %r0, [%f];
        @%q bar.sync 0;
        setp.eq.and.u32 %p, %t, 32, %q;
        @%p red.release.gpu.global.add.u32 [%f+4], 1;
        @%z ld.acquire.gpu.global.u32 %r0, [%f+{flag}];
        @%z bar.sync 0;
        setp.ge.and.u32 %p, %t, 32, %z;
        @%p st.global.u32 [%a], 1;
    """.replace("@%p st.global.u32 [%a], 1;\n        @%p bar", "setp.lt.and.u32 %first, %t, 32, %p;\n"
                "        @%first st.global.u32 [%a], 1;\n        @%p bar")  # fmt: skip
    run(code.format(flag=4), grid=3, block=64)
    race(code.format(flag=8), grid=3, block=64)


def test_many_readers_before_one_writer():
    """Each tells that it has read; who overwrites must have heard of all."""
    code = """
        ld.global.u32 %r1, [%a];
        bar.sync 0;
        @%first atom.add.acq_rel.gpu.global.u32 %r0, [%f], 1;
        @!%first mov.u32 %r0, 0;
        setp.eq.u32 %z, %r0, {last};
        @%z st.global.u32 [%a], 1;
    """
    for options in ({}, {"ctas_per_wave": 2}):
        run(code.format(last=5), grid=6, **options)
    race(code.format(last=4), "the read of CTA", grid=6, ctas_per_wave=2)


def test_lanes_that_have_not_met():
    """A lane that releases speaks for others only if they have met since they wrote."""
    code = """
        @%p st.global.u32 [%a], 1;
        {meet}
        and.pred %first, %first, %p;
        @%first red.release.gpu.global.add.u32 [%f], 1;
        @%q ld.acquire.gpu.global.u32 %r0, [%f];
        @%q st.global.u32 [%a], 2;
    """
    run(code.format(meet="bar.warp.sync -1;"))
    race(code.format(meet=""))


def test_reads_that_last():
    """ld.nc is for what nobody writes, ordered or not."""
    read = "{read} %r0, [%o];\nbar.sync 0;\nst.global.u32 [%o], %r0;"
    run(read.format(read="ld.global.u32"))
    race(read.format(read="ld.global.nc.u32"), "the read of CTA (0, 0, 0), warp 0")
    race("st.global.u32 [%o], 1;\nld.global.nc.u32 %r0, [%o];", "the write of CTA (0, 0, 0), warp 0")


def test_copies_read_until_they_are_waited_for():
    code = """
        .reg .b32 %s;
        shl.b32 %s, %l, 2;
        @%p cp.async.ca.shared.global [%s], [%a], 4;
        cp.async.commit_group;
        {before}
        bar.warp.sync -1;
        and.pred %first, %first, %p;
        @%first red.release.gpu.global.add.u32 [%f], 1;
        @%q ld.acquire.gpu.global.u32 %r0, [%f];
        @%q st.global.u32 [%a], 2;
        cp.async.wait_group 0;
    """
    run(code.format(before="cp.async.wait_group 0;"))
    race(code.format(before=""), "copies from p0", "the write of CTA (1, 0, 0)")


def test_state_is_of_one_launch():
    data, flags = aligned(np.zeros(64, np.float32)), aligned(np.zeros(4, np.uint32))
    text = module(HEAD + "@{who} st.global.u32 [%a], 1;", ".param .u64 p0, .param .u64 p1")
    for who in ("%p", "%q"):
        launch(text.replace("{who}", who), [data, flags], 2, 32, races=True)


def test_a_verdict_counts_them():
    """Where each order gives the same result, too."""
    data = aligned(np.zeros(32, np.uint32))
    text = module(HEAD.replace("[p1]", "[p0]") + "st.global.u32 [%a], 1;", ".param .u64 p0, .param .u64 p1")

    def go(options: Options) -> list:
        return [launch(text, [data, data], 2, **vars(options))]

    held = [Held(View(torch.from_numpy(data), "data"))]
    verdict = examine(go, held, ("eager", "races", "random 1", "late races"), 0.0)
    assert [find.how for find in verdict.finds] == ["races", "late races"]
    assert "DataRace: writes p0+p1 0x0 in global memory" in str(verdict)


# One lane of each CTA copies 16 bytes to, or from, a place that all share.
BULK = """
    @%first st.shared.v4.u32 [1024], {{1, 1, 1, 1}};
    @%first fence.proxy.async.shared::cta;
    @%first {copy}.bulk_group{kind} [%d0], [1024], 16;
    @%first cp.async.bulk.commit_group;
    {wait}
"""
STORE = {"copy": "cp.async.bulk.global.shared::cta", "kind": "", "wait": ""}
REDUCE = STORE | {"copy": "cp.reduce.async.bulk.global.shared::cta", "kind": ".add.u32"}
DONE = "@%first cp.async.bulk.wait_group 0;"
TOLD = """
    and.pred %z, %first, %p;
    @%z red.release.gpu.global.add.u32 [%f], 1;
    @%q ld.acquire.gpu.global.u32 %r0, [%f];
    @%q ld.global.u32 %r0, [%a];
"""


@pytest.mark.parametrize("asynchrony", ["eager", "late"])
def test_bulk_stores(asynchrony):
    options = {"target": "sm_90a", "asynchrony": asynchrony}
    place = "ld.param.u64 %d0, [p0];\n"
    own = "mad.wide.u32 %d0, %c, 128, %a;\n"
    run(own + BULK.format(**STORE | {"wait": DONE}), **options)
    race(place + BULK.format(**STORE), "a copy writes p0 0x0", "a bulk copy of CTA (0, 0, 0)", **options)
    sums = place + BULK.format(**REDUCE | {"wait": DONE})
    run(sums, **options)
    race(sums + "ld.global.u32 %r0, [%a];", "reads p0", "the update of", **options)
    first = place + "@!%p bra THERE;\n{}\nTHERE:" + TOLD
    run(first.format(BULK.format(**STORE | {"wait": DONE})), **options)
    race(first.format(BULK.format(**STORE)), "reads p0", "the write of a bulk copy", **options)
    read = DONE.replace("wait_group", "wait_group.read")
    race(first.format(BULK.format(**STORE | {"wait": read})), "the write of a bulk copy", **options)


@pytest.mark.parametrize("asynchrony", ["eager", "late"])
@pytest.mark.parametrize("kind", [".add.f32", ".add.noftz.f16", ".max.f16", ".add.u32"])
def test_sums_of_bulk_stores(kind, asynchrony):
    """Those of one thread are in no order either until it has waited for them to be written."""
    options = {"target": "sm_90a", "asynchrony": asynchrony, "ordered_reductions": True}
    own, shared = "mad.wide.u32 %d0, %c, 128, %a;\n", "ld.param.u64 %d0, [p0];\n"
    waits = "", DONE, DONE.replace("wait_group", "wait_group.read")
    once, waited, read = (BULK.format(**REDUCE | {"kind": kind, "wait": wait}) for wait in waits)
    again = waited[waited.index("@%first cp.reduce") :]
    run(own + waited + again, **options)
    for code in (own + once + again, own + read + again, shared + waited):
        if kind.startswith(".add") and "f" in kind:
            race(code, "a copy updates p0", "the update of a bulk copy", **options)
        else:
            run(code, **options)


@pytest.mark.parametrize("waited", [True, False])
def test_bulk_loads(waited):
    """A load reads until its barrier's phase is over."""
    wait = "AGAIN: mbarrier.try_wait.parity.shared.b64 %z, [%r8], 0, 1000;\n@!%z bra AGAIN;" if waited else ""
    code = f"""
        ld.param.u64 %d0, [p0];
        mov.b32 %r8, 1152;
        @!%p bra THERE;
        @%first mbarrier.init.shared.b64 [%r8], 1;
        @%first fence.mbarrier_init.release.cluster;
        @%first mbarrier.arrive.expect_tx.shared.b64 _, [%r8], 16;
        @%first cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [1024], [%d0], 16, [%r8];
        {wait}
        THERE:
        and.pred %z, %first, %p;
        @%z red.release.gpu.global.add.u32 [%f], 1;
        @%q ld.acquire.gpu.global.u32 %r0, [%f];
        @%q st.global.u32 [%a], 1;
    """
    if waited:
        run(code, target="sm_90a")
    else:
        race(code, "writes p0", "the read of a bulk copy", target="sm_90a", uninitialized="poison")


def test_rows_of_a_box():
    """Places that a box of a tensor covers: rows of what lies inside."""
    tensor = TensorMap(1000, 2, "f16", (40, 5, 3), (80, 400), (64, 4, 2), 0)
    rows = tensor.rows((32, 3, 2))
    assert rows.nbytes == 16 and rows.address.tolist() == [1000 + 2 * 400 + y * 80 + 64 for y in (3, 4)]
    assert len(tensor.rows((0, 5, 0)).address) == len(tensor.rows((40, 0, 0)).address) == 0

"""Clusters: each other's shared memory, the cluster's barrier, multicast copies, and who may not do what."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_flash import emulator
from cute_flash.emulator import BarrierError, DataRace, Deadlock, EmulatorError, Options, OutOfBounds

from .evaluate import aligned, module
from .test_mbarrier import ORDERS, wait

HEAD = """
    .reg .b32 %t, %w, %l, %b, %rank, %other, %r<9>;
    .reg .b64 %out, %in, %s<4>;
    .reg .b16 %both;
    .reg .pred %first, %leader, %p<5>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    and.b32 %l, %t, 31;
    mov.u32 %rank, %cluster_ctarank;
    xor.b32 %other, %rank, 1;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mad.lo.u32 %r0, %r0, %r1, %t;
    mad.wide.u32 %out, %r0, 4, %out;
    setp.eq.u32 %first, %t, 0;
    setp.eq.u32 %leader, %rank, 0;
    mov.b32 %b, data;
    add.u32 %b, %b, 2048;
    mov.u16 %both, 3;
"""
SHARED = ".extern .shared .align 1024 .b8 data[];"
BOTH = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
RELAXED = BOTH.replace("release", "relaxed")
READY = "fence.mbarrier_init.release.cluster;\n" + RELAXED


def run(code: str, clusters: int = 2, source: np.ndarray | None = None, **options) -> np.ndarray:
    """The u32 that each thread of `clusters` pairs of CTAs of 64 threads has stored: (ctas, 64)."""
    held = aligned(np.zeros(64, np.uint32) if source is None else source)
    out = np.zeros((2 * clusters, 64), np.uint32)
    memory = emulator.GlobalMemory()
    for name, array in (("in", held), ("out", out)):
        memory.add(array.ctypes.data, array.nbytes, name)
    params = struct.pack("<2Q", held.ctypes.data, out.ctypes.data)
    text = module(HEAD + code, ".param .u64 in, .param .u64 out", "sm_90a", SHARED)
    one = emulator.Launch("k", (2 * clusters, 1, 1), (64, 1, 1), (2, 1, 1), 4096, params)
    options = {"races": True, **options}
    emulator.run(emulator.Program(text), one, memory, Options(**options))
    return out


EXCHANGE = """
    mov.b32 %r2, data;
    shl.b32 %r3, %t, 2;
    add.u32 %r2, %r2, %r3;
    mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r4, %r4, 100, %t;
    st.shared.b32 [%r2], %r4;
    {between}
    mapa.shared::cluster.u32 %r5, %r2, %other;
    ld.shared::cluster.b32 %r6, [%r5];
    st.global.b32 [%out], %r6;
    {after}
"""


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_reading_the_other_cta(options):
    got = run(EXCHANGE.format(between=BOTH, after=BOTH), **options)
    assert got.tolist() == [[100 * (cta ^ 1) + t for t in range(64)] for cta in range(4)]


def test_the_barrier_gives_the_order():
    with pytest.raises(DataRace, match="reads shared .* without an order to the write of warp"):
        run(EXCHANGE.format(between=RELAXED, after=BOTH))
    with pytest.raises(EmulatorError, match="without an order|never written"):
        run(EXCHANGE.format(between="", after=BOTH), schedule="random", seed=1)


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_arriving_at_the_other_ctas_barrier(options):
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    {READY}
    mapa.shared::cluster.u32 %r2, %b, %other;
    @%first mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    {wait(0)}
    st.global.b32 [%out], 5;
    """
    assert (run(code, **options) == 5).all()


BEHIND = [{"behind": rank, "schedule": schedule} for rank in (0, 1) for schedule in ("lockstep", "random")]


@pytest.mark.parametrize("options", BEHIND, ids=str)
def test_a_cta_that_has_exited_has_no_memory(options):
    """Each reads the other's, the one that is behind when the other is long done."""
    run(EXCHANGE.format(between=BOTH, after=BOTH), **options)
    other = 1 - options["behind"]
    with pytest.raises(OutOfBounds, match=f"lies in CTA {other} of the cluster, which has exited"):
        run(EXCHANGE.format(between=BOTH, after=""), **options)


SIGNALS = {
    "arrival": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];",
    "write": "st.shared::cluster.b32 [%r2], 5;",
    "copy": "mov.b32 %r3, data;\nmapa.shared::cluster.u32 %r4, %r3, %other;\n"
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r4], [%r3], 16, [%r2];",
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_what_comes_to_a_cta_that_has_exited(signal):
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    mov.b32 %r5, data;
    @%first st.shared.v4.b32 [%r5], {{1, 2, 3, 4}};
    fence.proxy.async.shared::cta;
    {READY}
    mapa.shared::cluster.u32 %r2, %b, %other;
    @%leader bra done;
    @!%first bra done;
    {SIGNALS[signal]}
    done: {{after}}
    """
    with pytest.raises(EmulatorError, match="has exited|exits while a copy into it is under way"):
        run(code.replace("{after}", ""), behind=1)
    if signal != "copy":  # which the cluster's barrier does not wait for
        run(code.replace("{after}", BOTH), behind=1, races=False)


def test_a_copy_out_of_a_cta_that_has_exited():
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    mov.b32 %r3, data;
    @%first st.shared.v4.b32 [%r3], {{1, 2, 3, 4}};
    fence.proxy.async.shared::cta;
    fence.mbarrier_init.release.cluster;
    {BOTH}
    mapa.shared::cluster.u32 %r2, %b, %other;
    mapa.shared::cluster.u32 %r4, %r3, %other;
    @%leader bra waits;
    @!%first bra done;
    {SIGNALS["copy"]}
    bra done;
    waits:
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%b], 16;
    {wait(0)}
    done: {{after}}
    """
    run(code.replace("{after}", BOTH), asynchrony="late")
    with pytest.raises(EmulatorError, match=r"CTA \(1, 0, 0\) exits while a copy out of its shared memory"):
        run(code.replace("{after}", ""), asynchrony="late")


def test_who_is_behind_runs_when_the_others_only_look():
    """The leader looks, again and again, for what the other writes."""
    code = f"""
    mov.b32 %r2, data;
    @%first st.shared.b32 [%r2], 0;
    {BOTH}
    @%leader bra again;
    mapa.shared::cluster.u32 %r3, %r2, %other;
    @%first st.relaxed.cluster.shared::cluster.b32 [%r3], 5;
    bra done;
    again: ld.relaxed.cluster.shared::cta.b32 %r4, [%r2];
    setp.ne.u32 %p0, %r4, 5;
    @%p0 bra again;
    done: {BOTH}
    """
    for options in BEHIND:
        run(code, races=False, **options)


def test_ranks_that_can_be_behind():
    with pytest.raises(ValueError, match="behind is -1; allowed: None, or a rank from 0 on"):
        Options(behind=-1)
    assert Options.read("late behind 1 races") == Options(asynchrony="late", behind=1, races=True)
    assert run(EXCHANGE.format(between=BOTH, after=BOTH), behind=7).any()


COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
MULTICAST = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    {READY}
    @!%first bra rest;
    mbarrier.arrive.expect_tx.shared.b64 _, [%b], 256;
    @!%leader bra rest;
    mov.b32 %r2, data;
    {COPY} [%r2], [%in], 256, [%b], %both;
    rest: {wait(0)}
    mov.b32 %r2, data;
    shl.b32 %r3, %t, 2;
    add.u32 %r2, %r2, %r3;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%out], %r4;
"""


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_one_copy_for_both(options):
    source = np.arange(64, dtype=np.uint32) + 9
    assert (run(MULTICAST, source=source, **options) == source).all()


def test_special_registers_and_addresses_know_the_rank():
    code = """
    mov.b32 %r2, data;
    shr.u32 %r2, %r2, 24;
    mov.u32 %r3, %cluster_nctarank;
    mad.lo.u32 %r2, %r2, 10, %r3;
    st.global.b32 [%out], %r2;
    """
    assert run(code)[:, 0].tolist() == [2, 12, 2, 12]


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("mov.b32 %r2, data;\nmapa.shared::cluster.u32 %r2, %r2, %other;\n@%first st.shared.b32 [%r2], 1;",
         OutOfBounds, "lies in CTA 1 of the cluster"),
        ("mov.b32 %r2, data;\nmapa.shared::cluster.u32 %r2, %r2, 2;\nld.shared::cluster.u32 %r3, [%r2];",
         OutOfBounds, "lies in CTA 2 of the cluster"),
        ("barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned;", BarrierError, "arrives twice"),
        ("barrier.cluster.wait.aligned;", BarrierError, "without having arrived"),
    ],
)  # fmt: skip
def test_misuse(code, error, words):
    with pytest.raises(error, match=words):
        run(code)


def test_who_waits_for_the_cluster_is_named():
    code = f"""
    @%first mbarrier.init.shared.b64 [%b], 1;
    bar.sync 0;
    @%leader bra go;
    {wait(0)}
    go: {BOTH}
    """
    with pytest.raises(Deadlock, match=r"CTA \(0, 0, 0\) warps \[0, 1\] wait for the barrier of cluster 0"):
        run(code)


def test_what_cannot_be_launched():
    text = module("", "", "sm_80")
    launch = emulator.Launch("k", (2, 1, 1), (32, 1, 1), (2, 1, 1))
    with pytest.raises(EmulatorError, match="sm_80 has no clusters"):
        emulator.run(emulator.Program(text), launch, emulator.GlobalMemory())
    launch = emulator.Launch("k", (3, 1, 1), (32, 1, 1), (2, 1, 1))
    with pytest.raises(EmulatorError, match="does not divide into clusters"):
        emulator.run(emulator.Program(module("", "", "sm_90a")), launch, emulator.GlobalMemory())


COPIES = """
    mov.b32 %r2, data;
    shl.b32 %r3, %t, 2;
    add.u32 %r2, %r2, %r3;
    and.b32 %r4, %t, 31;
    mad.lo.u32 %r4, %rank, 32, %r4;
    mad.wide.u32 %s0, %r4, 4, %in;
    cp.async.ca.shared.global [%r2], [%s0], 4;
    {wait}
    ld.shared.b32 %r5, [%r2];
    st.global.b32 [%out], %r5;
"""


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_each_cta_copies_into_its_own_memory(options):
    source = np.arange(1, 65, dtype=np.uint32)
    got = run(COPIES.format(wait="cp.async.wait_all;"), source=source, **options)
    expected = [[1 + 32 * (cta % 2) + t % 32 for t in range(64)] for cta in range(4)]
    assert got.tolist() == expected


def test_a_copy_that_nobody_waits_for_is_noticed_in_every_cta():
    """CTAs of odd rank skip the wait."""
    alone = "@%leader bra waits;\nbra go;\nwaits: cp.async.wait_all;\ngo:"
    with pytest.raises(DataRace, match=r"reads shared 0x100\w* .* still under way .*CTA \(1, 0, 0\)"):
        run(COPIES.format(wait=alone))


def test_a_copy_into_another_cta_is_refused():
    into = "mapa.shared::cluster.u32 %r2, %r2, %other;\ncp.async.ca"
    code = COPIES.format(wait="").replace("cp.async.ca", into)
    with pytest.raises(OutOfBounds, match="lies in CTA 1 of the cluster"):
        run(code)

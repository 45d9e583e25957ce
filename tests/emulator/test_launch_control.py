"""clusterlaunchcontrol: every tile of a grid is worked on once, whoever does it."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cute_flash import emulator
from cute_flash.emulator import EmulatorError, Options, UninitializedRead

from .evaluate import module
from .test_mbarrier import ORDERS, wait

SHARED = ".shared .align 16 .b8 answer[16];\n.shared .align 8 .b8 bars[8];"
HEAD = """
    .reg .b32 %t, %b, %a, %x, %y, %z, %rank, %parity, %r<9>;
    .reg .b64 %done, %at, %s<4>;
    .reg .b128 %handle, %copy;
    .reg .pred %first, %more, %p<5>;
    ld.param.u64 %done, [done];
    mov.u32 %t, %tid.x;
    mov.u32 %rank, %cluster_ctarank;
    setp.eq.u32 %first, %t, 0;
    mov.b32 %b, bars;
    mov.b32 %a, answer;
    mov.u32 %x, %ctaid.x;
    mov.u32 %y, %ctaid.y;
    mov.u32 %z, %ctaid.z;
    mov.b32 %parity, 0;
    @%first mbarrier.init.shared.b64 [%b], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""
ASK = "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%a], [%b];"
ASK_ALL = ASK.replace("bytes.b128", "bytes.multicast::cluster::all.b128")
QUERY = "clusterlaunchcontrol.query_cancel"
READ = """
    ld.shared.v2.b64 {%s0, %s1}, [%a];
    mov.b128 %handle, {%s0, %s1};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %more, %handle;
"""
AXES = "\n".join(f"@%more {QUERY}.get_first_ctaid::{v}.b32.b128 %{v}, %handle;" for v in "xyz")
VECTOR = f"mov.b128 %copy, %handle;\n@%more {QUERY}.get_first_ctaid.v4.b32.b128 {{%x, %y, %z, _}}, %copy;"
# One thread counts the CTA's work on tile (x, y, z) of a grid of 6 x 3 x 2.
WORK = """
    mad.lo.u32 %r0, %z, 3, %y;
    mad.lo.u32 %r0, %r0, 6, %x;
    mad.wide.u32 %at, %r0, 4, %done;
    @%first red.global.add.u32 [%at], 1;
"""
GRID = (6, 3, 2)


def loop(ask: str, coordinates: str) -> str:
    """All threads learn the next tile from the answer; in a cluster the CTA of rank 0 asks for both."""
    leader = "setp.eq.and.u32 %p0, %rank, 0, %first;" if ask == ASK_ALL else "mov.pred %p0, %first;"
    apart = "add.u32 %x, %x, %rank;" if ask == ASK_ALL else ""
    return f"""
    {leader}
    next:
    {WORK}
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%b], 16;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @%p0 {ask}
    {wait("%parity")}
    xor.b32 %parity, %parity, 1;
    {READ}
    {coordinates}
    {apart}
    @%more bra next;
    """


def run(code: str, cluster: int = 1, ctas_per_wave: int = 4, **options) -> np.ndarray:
    """How often each CTA's tile was worked on: (2, 3, 6)."""
    done = np.zeros(GRID[::-1], np.uint32)
    memory = emulator.GlobalMemory()
    memory.add(done.ctypes.data, done.nbytes, "done")
    params = struct.pack("<Q", done.ctypes.data)
    text = module(HEAD + code, ".param .u64 done", "sm_100a", SHARED)
    one = emulator.Launch("k", GRID, (64, 1, 1), (cluster, 1, 1), 0, params)
    options = {"races": True, "ctas_per_wave": ctas_per_wave, **options}
    report = emulator.run(emulator.Program(text), one, memory, Options(**options))
    assert report.waves == 1 or "next" not in code
    return done


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("coordinates", [AXES, VECTOR], ids=["axes", "vector"])
def test_four_ctas_do_the_work_of_the_grid(coordinates, options):
    assert (run(loop(ASK, coordinates), **options) == 1).all()


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_clusters_take_over_clusters(options):
    assert (run(loop(ASK_ALL, AXES), cluster=2, **options) == 1).all()


def test_nothing_is_left_when_everything_runs():
    """A grid that is resident as a whole: each CTA is told so, and does its own tile."""
    assert (run(loop(ASK, AXES), ctas_per_wave=36) == 1).all()


ONCE = "@%first mbarrier.arrive.expect_tx.shared.b64 _, [%b], 16;\n@%first "


def test_coordinates_of_nothing_are_poison():
    """The DSL asks for coordinates before it knows whether there are any."""
    code = f"{ONCE}{ASK}\n{wait(0)}\n{READ}\n{AXES.replace('@%more ', '')}\n"
    code += "@%first st.relaxed.gpu.global.b32 [%done], %x;"
    assert run(code, ctas_per_wave=36)[0, 0, 0] == 0x7A7A7A7A


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (f"{ONCE}{ASK}\n{READ}\n{wait(0)}", UninitializedRead, "was never written"),
        (f"{ONCE}{ASK}\n{wait(0)}\n{ONCE}{ASK}\n{wait(1, 'two')}", EmulatorError, "asks again"),
        (f"{ONCE}{ASK.replace('[%a]', '[%a+8]')}\n{wait(0)}", EmulatorError, "multiple of 16"),
    ],
)
def test_misuse(code, error, words):
    with pytest.raises(error, match=words):
        run(code, ctas_per_wave=36, races=False, asynchrony="late")

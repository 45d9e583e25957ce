"""Permissive: what PTX leaves undefined and hardware takes is let through, and its neighbours are not."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import (
    BarrierError,
    DataRace,
    EmulatorError,
    Options,
    RegisterInFlight,
    UndefinedRegister,
)

from . import tensor
from . import test_bulk as bulk
from .evaluate import evaluate
from .test_mbarrier import READY, wait
from .test_mbarrier import run as run_barrier
from .test_tcgen05_mma import D_AT
from .test_tensor_races import execute
from .test_wgmma_order import FENCE
from .wgmma import COMMIT, MODES, WAIT, Case

PERMISSIVE = {"permissive": True}


def test_the_opposite_of_by_the_book():
    with pytest.raises(ValueError, match="by_the_book and permissive are both True"):
        Options(by_the_book=True, permissive=True, races=True)


# Undefined registers.

UNDEFINED = """
    .reg .b32 %u, %v, %w;
    .reg .f32 %f;
    .reg .pred %p;
    mov.u32 %x, %a;
    {code}
"""
DROPPED = [
    "add.u32 %v, %u, 1;",
    "setp.lt.u32 %p, %u, 5;\nselp.u32 %v, 1, 2, %p;",
    "cvt.rn.f32.u32 %f, %u;\nfma.rn.f32 %f, %f, %f, %f;",
    "add.u32 %v, %u, 1;\nmov.u32 %v, 7;\nadd.u32 %x, %x, %v;\nsub.u32 %x, %x, 7;",
]
USED = [
    "add.u32 %v, %u, 1;\nadd.u32 %x, %v, 2;",
    "setp.lt.u32 %p, %u, 5;\n@%p add.u32 %x, %x, 1;",
    "setp.lt.u32 %p, %u, 5;\n@%p bra end;\nend:",
    "setp.lt.u32 %p, %a, 5;\n@%p mov.u32 %u, 1;\nadd.u32 %x, %u, %x;",
    ".shared .b32 word;\nand.b32 %v, %u, 0;\nld.shared.u32 %w, [%v];",
    "shfl.sync.idx.b32 %v, %u, 0, 31, -1;",
]


@pytest.mark.parametrize("code", DROPPED)
def test_undefined_registers_whose_result_is_dropped(code):
    a = np.arange(64, dtype=np.uint32)
    with pytest.raises(UndefinedRegister, match="%u is read before anything is written to it"):
        evaluate(UNDEFINED.format(code=code), a, outputs=(np.uint32,))
    (got,) = evaluate(UNDEFINED.format(code=code), a, outputs=(np.uint32,), **PERMISSIVE)
    assert (got == a).all()


@pytest.mark.parametrize("code", USED)
def test_undefined_registers_whose_result_is_used(code):
    a = np.arange(64, dtype=np.uint32)
    with pytest.raises(UndefinedRegister, match="is read before anything is written to it"):
        evaluate(UNDEFINED.format(code=code), a, outputs=(np.uint32,), **PERMISSIVE)


def test_registers_that_some_threads_have_written():
    """A result is as defined as what it is made of, thread by thread."""
    code = """
        .reg .b32 %u, %v;
        .reg .pred %p;
        setp.lt.u32 %p, %a, {};
        @%p mov.u32 %u, 3;
        add.u32 %v, %u, %a;
        mov.u32 %x, 0;
        setp.lt.u32 %p, %a, 5;
        @%p mov.u32 %x, %v;
    """
    a = np.arange(64, dtype=np.uint32)
    (got,) = evaluate(code.format(5), a, outputs=(np.uint32,), **PERMISSIVE)
    assert got.tolist() == [3 + k if k < 5 else 0 for k in range(64)]
    with pytest.raises(UndefinedRegister, match="lane 4"):
        evaluate(code.format(4), a, outputs=(np.uint32,), **PERMISSIVE)


# Accumulators that are set between fence and product.


def preset(case: Case, adds: str) -> str:
    """The kernel with every accumulator set to zero behind the fence; adds: scale-d of the first product."""
    zeros = "".join(f"mov.b32 %f{k}, 0;\n" for k in range(case.count))
    products = "".join(case.product(k, adds if k == 0 else "%yes") for k in range(case.steps))
    return case.code(f"{FENCE}\n{zeros}{products}{COMMIT}{WAIT}")


@pytest.mark.parametrize("options", MODES, ids=str)
def test_an_accumulator_may_be_set_where_it_is_overwritten(options):
    case = Case(16, ("f16", "f16"))
    known = preset(case, "%no")
    asked = "setp.eq.u32 %p1, %t, 9999;\n" + preset(case, "%p1")
    for code in (known, asked):
        with pytest.raises(RegisterInFlight, match="something else used without a wgmma.fence since"):
            case.run(code, **options)
        case.check(case.run(code, **PERMISSIVE, **options))


def test_an_accumulator_may_not_be_set_where_it_is_added_to():
    case = Case(16, ("f16", "f16"))
    asked = "setp.ne.u32 %p1, %t, 9999;\n" + preset(case, "%p1")
    used = preset(case, "%no").replace("mov.b32 %f3, 0;", "add.u32 %f3, %t, 0;")
    copied = preset(case, "%no").replace("mov.b32 %f3, 0;", "add.u32 %r8, %t, 0;\nmov.b32 %f3, %r8;")
    for code in (preset(case, "%yes"), asked, used, copied):
        with pytest.raises(RegisterInFlight, match="something else used without a wgmma.fence since"):
            case.run(code, **PERMISSIVE)


def test_the_registers_of_a_may_not_be_set():
    case = Case(16, ("f16", "f16"), in_registers=True, steps=1)
    code = case.code(f"{FENCE}\nmov.b32 %a0, 0;\n{case.product(0, '%no')}{COMMIT}{WAIT}")
    with pytest.raises(RegisterInFlight, match="%a0, which something else used"):
        case.run(code, **PERMISSIVE)


# An mbarrier that all lanes of a warp initialise.

INIT = """
    setp.lt.u32 %p0, %t, {threads};
    @%p0 mbarrier.init.shared.b64 [%b], {count};
"""
PASS = f"{READY}\n@%first mbarrier.arrive.shared.b64 _, [%b];\n{wait(0)}\nst.global.b32 [%out], 7;"


def test_all_lanes_of_a_warp_may_initialise_a_barrier():
    code = INIT.format(threads=32, count=1) + PASS
    with pytest.raises(BarrierError, match="which was not invalidated"):
        run_barrier(code)
    assert (run_barrier(code, **PERMISSIVE) == 7).all()


@pytest.mark.parametrize("code", [
    INIT.format(threads=64, count=1), INIT.format(threads=32, count="%t"),
    2 * INIT.format(threads=32, count=1),
])  # fmt: skip
def test_warps_and_instructions_may_not_initialise_it_again(code):
    with pytest.raises(BarrierError, match="which was not invalidated|with 0 arrivals"):
        run_barrier(code + PASS, **PERMISSIVE)


# CTAs that exit while their shared memory is read.


def test_a_cta_may_exit_while_its_stores_read():
    """Not while copies into it are under way."""
    copy = "cp.async.bulk.global.shared::cta.bulk_group [%out], [2048], 1024;"
    code = bulk.STORE.format(ready="", fence=bulk.FENCE, copy=copy, wait="")
    for text in (code, code.replace("cp.async.bulk.commit_group;", "")):
        with pytest.raises(EmulatorError, match="exits while a copy out of its shared memory is under way"):
            bulk.run(text, bulk.SOURCE, asynchrony="late")
        out, _ = bulk.run(text, bulk.SOURCE, asynchrony="late", **PERMISSIVE)
        assert (out.view(np.uint32)[:256:4] == np.arange(64)).all()
    load = bulk.LOAD[: bulk.LOAD.index("rest:")] + "rest:"
    with pytest.raises(EmulatorError, match="exits while a copy into it is under way"):
        bulk.run(load, bulk.SOURCE, bulk.matrix, asynchrony="late", **PERMISSIVE)


def test_a_cta_may_exit_before_another_s_last_commit_has_reached_it():
    nobody_waits = tensor.commit(ctas=2).partition("\n")[0]
    text = tensor.kernel("", ctas=2).replace("done:", f"done:\n{nobody_waits}")
    image = np.zeros((2, tensor.IMAGE), np.uint8)
    held = np.zeros((2, tensor.LANES, tensor.COLUMNS), np.uint32)
    with pytest.raises(EmulatorError, match=r"CTA \(1, 0, 0\) exits before a commit has reached it"):
        tensor.execute(text, image, held, asynchrony="late")
    tensor.execute(text, image, held, asynchrony="late", **PERMISSIVE)


# Arrivals after a wait for tensor memory. Warp 1 loads or stores, one of its lanes arrives, and the product
# that overwrites what it has touched waits for that.

LOAD = f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%u0}}, [%mine+{D_AT + 5}];"
STORE = f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%mine+{D_AT + 5}], {{%t}};"
LOADED, STORED = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
ELECTED = "@%second mbarrier.arrive.shared.b64 _, [%bar+8];"
RELAXED = "@%second mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%bar+8];"
GO = "mov.b32 %b, %bar;\n" + wait(0, "told").replace("[%b]", "[%bar+8]")


def handed_over(*pieces: str) -> list[str]:
    only = ["setp.ne.u32 %p9, %w, 1;", "@%p9 bra others;", *pieces, "others:"]
    return [*only, GO, "MMA", "DONE"]


@pytest.mark.parametrize("arrive", [ELECTED, RELAXED])
@pytest.mark.parametrize("work", [[LOAD, LOADED], [STORE, STORED], [LOAD, STORE, STORED, LOADED]],
                         ids=" ".join)  # fmt: skip
def test_a_lane_arrives_for_its_warp_after_a_wait(work, arrive):
    pieces = handed_over(*work, arrive)
    with pytest.raises(DataRace, match="a product or copy writes columns 64 .* of warp 1"):
        execute(pieces)
    execute(pieces, **PERMISSIVE)
    execute(pieces, **PERMISSIVE, schedule="random", seed=3, asynchrony="late")


@pytest.mark.parametrize("arrive", [ELECTED, RELAXED])
@pytest.mark.parametrize("work", [[LOAD], [STORE], [LOAD, STORE, STORED], [LOAD, LOADED, LOAD],
                                  [STORE, STORED, STORE], [STORE, LOADED]], ids=" ".join)  # fmt: skip
def test_what_is_not_waited_for_is_not_known_to_be_over(work, arrive):
    with pytest.raises(DataRace, match="a product or copy writes columns 64"):
        execute(handed_over(*work, arrive), **PERMISSIVE)


@pytest.mark.parametrize("arrive", [ELECTED, RELAXED])
def test_shared_memory_is_not_handed_over_with_it(arrive):
    """Other lanes' stores to shared memory need a meeting of the lanes, and a release."""
    touch = "add.u32 %r9, %data, %t;\nst.shared.b8 [%r9], %t;"
    read = "ld.shared.b8 %h0, [%data+40];"
    pieces = handed_over(touch, LOAD, LOADED, arrive)
    at = pieces.index("MMA")
    with pytest.raises(DataRace, match="reads shared"):
        execute([*pieces[:at], read, *pieces[at:]], **PERMISSIVE)


def test_work_of_the_tensor_unit_is_not_handed_over_with_it():
    """The wait is for loads: a product that the warp has issued may still be under way."""
    pieces = ["setp.ne.u32 %p9, %w, 1;", "@%p9 bra others;", "OTHER", LOAD.replace(f"{D_AT + 5}", "500"),
              LOADED, RELAXED, "others:", GO, "MMA", "DONE", "OTHER_DONE"]  # fmt: skip
    with pytest.raises(DataRace, match="the write of work that warp 1 issued"):
        execute(pieces, **PERMISSIVE)

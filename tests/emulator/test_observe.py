"""Counters and traces: what was executed, and which accesses conflict."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import EmulatorError, GlobalMemory, Launch, Options, Program, run
from cute_flash.emulator.checks.counters import BankConflicts, Trace
from cute_flash.emulator.core.observe import Observer, Observers

from .evaluate import launch, module

HEAD = ".reg .b32 %t, %s, %r<5>;\n.reg .pred %p;\nmov.u32 %t, %tid.x;\n"


def test_report_counts_warps_by_opcode_and_line():
    code = HEAD + "setp.lt.u32 %p, %t, 40;\n@!%p bra DONE;\nadd.u32 %r0, %t, 1;\nDONE:\n@%p mov.u32 %r1, 0;"
    report = launch(module(code), [], grid=3, block=96)
    # Three warps per CTA run everything but the addition, which two of them reach.
    assert report.opcodes == {"mov.u32": 9 + 9, "setp.lt.u32": 9, "bra": 9, "add.u32": 6, "ret": 9}
    assert report.instructions == sum(report.opcodes.values())
    assert list(report.lines.values()) == [9, 9, 9, 6, 9, 9]
    assert report.waves == 1 and report.seconds > 0


def test_lines_that_never_ran():
    report = launch(module(HEAD + "bra DONE;\nadd.u32 %r0, %t, 1;\nDONE:"), [])
    missed = [line for line, count in report.lines.items() if count == 0]
    assert len(missed) == 1


@pytest.mark.parametrize(
    ("code", "wavefronts"),
    [
        ("shl.b32 %s, %t, 2;\nst.shared.u32 [%s], %t;", (1, 1)),
        ("shl.b32 %s, %t, 3;\nst.shared.u32 [%s], %t;", (2, 1)),
        ("shl.b32 %s, %t, 7;\nst.shared.u32 [%s], %t;", (32, 1)),
        ("and.b32 %s, %t, 4;\nld.shared.u32 %r0, [%s];", (1, 1)),
        ("shl.b32 %s, %t, 4;\nst.shared.v4.b32 [%s], {%t, %t, %t, %t};", (4, 4)),
        ("shl.b32 %s, %t, 6;\nst.shared.v4.b32 [%s], {%t, %t, %t, %t};", (16, 4)),
        ("shl.b32 %s, %t, 3;\nst.shared.v2.b32 [%s], {%t, %t};", (2, 2)),
        ("shl.b32 %s, %t, 1;\nst.shared.b16 [%s], %t;", (1, 1)),
        ("shl.b32 %s, %t, 4;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%s];", (4, 4)),
        ("shl.b32 %s, %t, 7;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%s];", (32, 4)),
    ],
)
def test_bank_conflicts(code, wavefronts):
    observer = BankConflicts()
    launch(module(HEAD + code), [], shared=4096, observers=(observer,), uninitialized="poison")
    assert list(observer.wavefronts.values()) == [wavefronts]


def test_bank_conflicts_add_up_over_warps():
    observer = BankConflicts()
    code = HEAD + "shl.b32 %s, %t, 3;\nst.shared.u32 [%s], %t;"
    launch(module(code), [], grid=2, block=64, shared=512, observers=(observer,))
    assert list(observer.wavefronts.values()) == [(8, 4)]


def test_trace():
    trace = Trace()
    launch(
        module(HEAD + "setp.lt.u32 %p, %t, 8;\n@%p bra DONE;\nadd.u32 %r0, %t, 1;\nDONE:"),
        [],
        observers=(trace,),
    )
    assert len(trace.lines) == 5
    assert "mov.u32 %t, %tid.x" in trace.lines[0] and "32 threads" in trace.lines[0]
    assert any("24 threads" in line and "add.u32" in line for line in trace.lines)
    assert "32 threads" in trace.lines[-1] and "ret" in trace.lines[-1]
    short = Trace(limit=2)
    launch(module(HEAD), [], observers=(short,))
    assert len(short.lines) == 2


def test_hooks_of_an_observer():
    class Recorder(Observer):
        def __init__(self):
            self.calls = []

        def begin(self, m):
            self.calls.append("begin")

        def shared_write(self, m, g, address, values, atomic=False):
            self.calls.append(("write", address.tolist()[:2], values.shape, atomic))

        def shared_read(self, m, g, address, size):
            self.calls.append(("read", size))

        def barrier_complete(self, m, complete):
            self.calls.append(("barrier", np.argwhere(complete).tolist()))

    recorder = Recorder()
    code = HEAD + "shl.b32 %s, %t, 2;\nst.shared.u32 [%s], %t;\nbar.sync 3;\nld.shared.u32 %r0, [%s];\n"
    code += "atom.shared.add.u32 %r1, [0], 1;"
    launch(module(code), [], block=1, shared=128, observers=(recorder,))
    assert recorder.calls == [
        "begin", ("write", [0], (1, 1), False), ("barrier", [[0, 3]]), ("read", 4),
        ("write", [0], (1, 1), True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [("asynchrony", "lazy"), ("schedule", "fifo"), ("uninitialized", "zero")]
)
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}'; allowed: "):
        Options(**{name: value})


def test_launches_are_checked():
    program = Program(module(HEAD).replace("k()", "k(.param .u64 p)\n.reqntid 32, 1, 1\n"))
    assert program.entries["k"].directives == {"reqntid": (32, 1, 1)}
    assert program.entries["k"].params == (("p", 8, 8),)
    good = {"entry": "k", "grid": (1, 1, 1), "block": (32, 1, 1), "params": bytes(8)}
    run(program, Launch(**good), GlobalMemory())
    for change, match in (
        ({"block": (64, 1, 1)}, "needs blocks of"),
        ({"params": bytes(7)}, "takes 8 parameter bytes, not 7"),
        ({"grid": (0, 1, 1)}, "cannot launch"),
        ({"block": (2048, 1, 1)}, "cannot launch"),
    ):
        with pytest.raises(ValueError, match=match):
            run(program, Launch(**(good | change)), GlobalMemory())
    with pytest.raises(KeyError, match="no entry other; this program has k"):
        run(program, Launch(**(good | {"entry": "other"})), GlobalMemory())
    with pytest.raises(EmulatorError, match="cluster"):
        run(program, Launch(**(good | {"cluster": (2, 1, 1), "grid": (2, 1, 1)})), GlobalMemory())


def test_only_who_overrides_a_hook_is_called():
    class Steps(Observer):
        def __init__(self):
            self.seen = 0

        def step(self, m, g):
            self.seen += 1

    class Reads(Observer):
        def __init__(self):
            self.seen = []

        def shared_read(self, m, g, address, size):
            self.seen.append(size)

    one, other, reads = Steps(), Steps(), Reads()
    assert Observers((one, reads, other)).every_step and not Observers((reads,)).every_step
    both = Observers((one, reads, other))
    both.step(None, None)
    both.shared_read(None, None, None, size=4)
    both.shared_write(None, None, None, None)
    assert (one.seen, other.seen, reads.seen) == (1, 1, [4])

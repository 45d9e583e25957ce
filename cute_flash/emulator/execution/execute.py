"""`run`: executes a launch wave by wave."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from ..base.blas import one_thread
from ..base.errors import EmulatorError
from ..base.options import Launch, Options, Report
from ..checks.races import RaceDetector
from ..core.engine import Engine, Stalls
from ..core.geometry import Unlaunched
from ..core.machine import Machine
from ..core.memory import GlobalMemory
from ..core.observe import Observers
from ..core.state import LANES
from ..translate.translation import architecture
from ..units.sync import AsyncCopies
from ..units.tensor_memory import NBYTES as TENSOR_BYTES
from .polling import Polling
from .schedule import schedule_of

if TYPE_CHECKING:
    from ..core.code import Code
    from .program import Program

WAVE_BYTES = 64 << 20  # registers, shared and local memory of the CTAs that run together
WAVE_CTAS = 256
RACE_CTAS = 16  # the race detector keeps a history of every place in shared memory
MOST_CLUSTER = 16
DRIFT = 0.02  # chance per scheduling decision that a pending operation happens, when asynchrony is random


def run(program: Program, launch: Launch, memory: GlobalMemory, options: Options | None = None) -> Report:
    """Execute a launch on host memory.

    Raises an EmulatorError subclass where the kernel does something that hardware would not define,
    ValueError where the launch does not fit the program.
    """
    options = options or Options()
    if options.contract == "ptxas":
        program = program.contracted
    code = program.code(launch.entry, options.permissive)
    _check_launch(program, launch)
    report = Report()
    began = time.perf_counter()
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    cluster = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
    wave = options.ctas_per_wave or min(WAVE_CTAS, max(1, WAVE_BYTES // _cta_bytes(code, launch)))
    if options.races:
        wave = min(wave, RACE_CTAS)
    wave = -(-wave // cluster) * cluster
    executed = np.zeros(len(code.steps), np.int64)
    for name, held in program.storage.items():
        memory.add(held.ctypes.data, held.nbytes, name)
    with np.errstate(all="ignore"), one_thread():
        unlaunched = Unlaunched(0, total, cluster)
        watch = watchers(options)
        while unlaunched.first < total:
            m = Machine(code, launch, memory, options, unlaunched, ctas=wave, watch=watch)
            _run_wave(m)
            executed += np.cumsum(m.executed[:-1])
            report.waves += 1
    for step, count in zip(code.steps, executed.tolist(), strict=True):
        for instruction in step.instructions:
            report.lines[instruction.line] = report.lines.get(instruction.line, 0) + count
            if count:
                report.opcodes[instruction.opcode] = report.opcodes.get(instruction.opcode, 0) + count
    report.instructions = sum(report.opcodes.values())
    report.seconds = time.perf_counter() - began
    return report


def watchers(options: Options) -> Observers | None:
    """The observers of a run as one, None when there are none."""
    members = (*options.observers, *((RaceDetector(),) if options.races else ()))
    return Observers(members) if members else None


def _cta_bytes(code: Code, launch: Launch) -> int:
    """Host memory that one CTA of a wave takes."""
    threads = -(-(launch.block[0] * launch.block[1] * launch.block[2]) // LANES) * LANES
    registers = sum(n * max(width // 8, 1) for width, n in code.layout.counts.items())
    shared = code.shared_base + code.shared_static + launch.shared_memory
    return threads * (registers + 2 * code.local_bytes) + 2 * shared + TENSOR_BYTES * code.tensor_memory


def _run_wave(m: Machine) -> None:
    schedule = schedule_of(m)
    drifting = m.options.asynchrony == "random"
    engine, copies, stalls, polling = m.part(Engine), m.part(AsyncCopies), Stalls(m), Polling(m, schedule)
    while (choice := schedule.pick()) is not None or stalls.resolve(schedule.gathered()):
        if choice is not None:
            pc, threads, limit = choice
            going = m.advance(pc, threads, limit)
            schedule.put(going)
            polling.decided(going)
        if drifting and copies.pending:
            copies.drift(DRIFT)
        if drifting and engine.pending:
            engine.drift(DRIFT)
        if m.parked.woken:
            schedule.put(m.parked.take())
    m.finish()


def _check_launch(program: Program, launch: Launch) -> None:
    entry = program.entries[launch.entry]
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if min(*launch.grid, *launch.block) < 1 or threads > 1024:
        raise ValueError(f"cannot launch grid {launch.grid} of blocks {launch.block}")
    _check_cluster(program, launch)
    required = entry.directives.get("reqntid")
    if required and tuple((*required, 1, 1)[:3]) != tuple(launch.block):
        raise ValueError(f"{launch.entry} needs blocks of {required} threads, not {launch.block}")
    if len(launch.params) < entry.param_bytes:
        raise ValueError(
            f"{launch.entry} takes {entry.param_bytes} parameter bytes, not {len(launch.params)}"
        )


def _check_cluster(program: Program, launch: Launch) -> None:
    size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
    if size == 1:
        return
    if architecture(program.target) < 90 or size > MOST_CLUSTER:
        raise EmulatorError(f"{program.target} has no clusters of {launch.cluster} CTAs")
    if any(n % c for n, c in zip(launch.grid, launch.cluster, strict=True)):
        raise EmulatorError(f"a grid of {launch.grid} does not divide into clusters of {launch.cluster}")

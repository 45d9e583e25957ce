"""python -m profiling report: check, measure and record everything on the GPU at hand, in one command.

    stages    environment, correctness, speed, counters, sanitizer, vectors; each has a time box
    results   DIR/<date>-<gpu>.json, whole and valid at every moment, DIR/<date>-<gpu>.md and pictures
    dry run   the emulator stands in for the GPU, on tiny shapes: numbers mean nothing, paths are exercised

The work is done in a process of its own: a kernel or a peer that crashes costs its row, not the report.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cute_flash import arch as trees
from cute_flash.arch.problem import Device, Problem
from cute_flash.dispatch import EMULATED

from . import plots, stages, tables
from .record import RESULTS, Record, write_whole
from .worker import Job, Outcome, Settings, Worker

LONGEST_REPORT = 1500.0
NO_GPU, BAD_ARGUMENT, INTERRUPTED = 2, 2, 130
WITHOUT_GPU = """no GPU was found, and this report measures one. Without a GPU there are:
  python -m profiling report --dry-run    every stage on tiny shapes, the emulator standing in for the GPU
  python -m profiling pack DIR            everything that the report needs, to carry to a machine with a GPU
  python -m profiling static              registers, spills and instructions of the compiled kernels
  python -m profiling cycles              which unit bounds each kernel, counted on the emulator
  python -m profiling emulator            the emulator's own speed"""


def main(arguments: list[str]) -> int:
    """Run a report; 0 where every row went well, 1 where some did not, 2 where none could be tried."""
    chosen = _parser().parse_args(arguments)
    wanted = stages.chosen(chosen.stages)
    unknown = stages.unknown_cases(chosen.case)
    if unknown or isinstance(wanted, str):
        print(unknown or wanted, file=sys.stderr)
        return BAD_ARGUMENT
    if chosen.dry_run:
        machine, name, device = chosen.arch, f"emulated {chosen.arch}", EMULATED[chosen.arch]
    elif (found := gpu()) is not None:
        machine, (name, device) = "cuda", found
    else:
        print(WITHOUT_GPU, file=sys.stderr)
        return NO_GPU
    try:
        record = _record(chosen, name, arguments)
    except (OSError, ValueError) as error:
        print(f"--resume: {error}", file=sys.stderr)
        return BAD_ARGUMENT
    cases, out = tuple(chosen.case), str(record.path.parent)
    settings = Settings(machine, chosen.dry_run, out, cases, kernels_of(device), chosen.backward)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(record, settings, wanted, chosen.budget_seconds)


def _record(chosen: argparse.Namespace, machine: str, arguments: list[str]) -> Record:
    """A new record, or the one to resume, which must be of the same machine."""
    if chosen.resume:
        record = Record(chosen.resume)
        if record.data["machine"] != machine:
            raise ValueError(f"{chosen.resume} is of {record.data['machine']!r}, this is {machine!r}")
        return record
    out = chosen.out or (Path(tempfile.mkdtemp(prefix="report-")) if chosen.dry_run else RESULTS)
    facts = {
        "machine": machine,
        "dry_run": chosen.dry_run,
        "command": shlex.join(["python", "-m", "profiling", "report", *arguments]),
    }
    return Record(_new_path(out, f"dry-run-{chosen.arch}" if chosen.dry_run else machine), facts)


def run(record: Record, settings: Settings, wanted: list[str], budget: float) -> int:
    """Run stages into a record, within `budget` seconds in all; the exit status."""
    worker, deadline = Worker(settings), time.monotonic() + budget
    try:
        for number, stage in enumerate(wanted):
            # What an earlier stage did not need is the later ones'.
            share = stages.seconds(stage) / sum(map(stages.seconds, wanted[number:]))
            _run_stage(record, worker, stage, share * max(0.0, deadline - time.monotonic()))
            _write_tables(record)
    except KeyboardInterrupt:
        _say("interrupted: what was measured so far is kept")
        return INTERRUPTED
    finally:
        worker.close()
        _write_tables(record)
        _say(f"results: {record.path} and {record.path.with_suffix('.md').name}")
    return _judge(record, wanted)


def _judge(record: Record, wanted: list[str]) -> int:
    """Say what went wrong; 1 where something did."""
    rows = [row for stage in wanted for row in record.rows(stage)]
    bad = [row for row in rows if row["state"] in stages.BAD]
    left = [stage for stage in wanted if record.data["stages"][stage]["state"] != "done"]
    if bad or left:
        _say(f"{len(bad)} of {len(rows)} rows went wrong; unfinished stages: {', '.join(left) or 'none'}")
    for row in bad:
        _say(f"  {row['key']}: {row['state']}, {row['error']}")
    return 1 if bad or left else 0


# What a process of its own prints of the GPU, so that this one never holds it; nothing without one.
ASK = """
import json, torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(json.dumps([p.name, p.major, p.minor, p.shared_memory_per_block_optin]))
"""


def gpu() -> tuple[str, Device] | None:
    """The GPU's name, and what kernels are chosen for; None without one."""
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        return None
    name, major, minor, shared_memory = json.loads(lines[-1])
    return name, Device((major, minor), shared_memory)


def kernels_of(device: Device) -> tuple[str, ...]:
    """Names of the kernels that serve plain calls on a device, first choice first."""
    plain = Problem("bfloat16", 128, 128)
    return tuple(kernel.name for kernel in trees.load(device) if not kernel.reasons(plain, device))


def _run_stage(record: Record, worker: Worker, stage: str, seconds: float) -> None:
    started = time.monotonic()
    deadline = started + seconds
    record.begin(stage)
    todo = [job for job in stages.jobs(stage, worker.settings) if not record.done(stage, job.key)]
    state = "interrupted"
    count = len(todo)
    try:
        while todo and time.monotonic() < deadline:
            job = todo[0]
            _say(f"[{stage} {count - len(todo) + 1}/{count}] {job.key}", end="")
            before = time.monotonic()
            _run_job(record, worker, stage, job, deadline)
            todo.pop(0)
            row = next((r for r in record.rows(stage) if r["key"] == job.key), {})
            spent, left = time.monotonic() - before, max(0.0, deadline - time.monotonic())
            _say(f": {tables.in_short(row)} ({spent:.1f} s; the stage has {left:.0f} s left)")
        state = "cut short" if todo else "done"
    finally:
        record.finish(stage, state, time.monotonic() - started, [job.key for job in todo])


def _run_job(record: Record, worker: Worker, stage: str, job: Job, deadline: float) -> None:
    """Run a job; where a candidate brings the process down, run it again without that one."""
    without: dict[str, str] = {}
    while True:
        seconds = min(job.seconds, max(5.0, deadline - time.monotonic()))
        told = replace(job, seconds=seconds, payload={**job.payload, "without": dict(without)})
        name = stages.module(stage).__name__
        outcome = worker.run(name, told, seconds, lambda row: record.add(stage, row))
        if outcome.state == "ok":
            return
        repeatable = outcome.at and outcome.at not in without and time.monotonic() < deadline
        if not (repeatable and stages.names_candidates(stage)):
            record.add(stage, _died(job, outcome))
            return
        without[outcome.at] = f"{outcome.state}: {outcome.detail}"


def _died(job: Job, outcome: Outcome) -> dict[str, Any]:
    error = outcome.detail + (f", at {outcome.at}" if outcome.at else "")
    return {"key": job.key, "state": outcome.state, "error": error}


def _write_tables(record: Record) -> None:
    pictures = plots.draw(record.data, record.path.with_suffix(""))
    write_whole(record.path.with_suffix(".md"), tables.markdown(record.data, pictures))


def _new_path(out: Path, machine: str) -> Path:
    """OUT/<date>-<machine>.json; with a number where that is taken."""
    words = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    stem = f"{datetime.date.today().isoformat()}-{words}"
    path, number = out / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = out / f"{stem}-{number}.json"
    return path


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m profiling report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stages", type=lambda text: text.split(","), default=list(stages.NAMES), metavar="A,B",
        help=f"which, in this order: {','.join(stages.NAMES)}")
    add("--budget-seconds", type=float, default=LONGEST_REPORT, help="default: %(default)s")
    add("--out", type=Path, metavar="DIR",
        help="default: profiling/results, or a new temporary directory in a dry run")
    add("--case", nargs="+", default=[], metavar="NAME", help="keep to these cases")
    add("--resume", type=Path, metavar="FILE", help="go on with this .json: run what it lacks")
    add("--backward", action="store_true", help="time the backward pass of whoever has one, too")
    add("--dry-run", action="store_true", help="no GPU: tiny shapes on the emulator")
    add("--arch", default="sm80", choices=EMULATED, metavar="ARCH",
        help="what a dry run emulates; default: %(default)s")
    return parser

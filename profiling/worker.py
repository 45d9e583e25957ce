"""A process of its own for everything that touches a GPU, so that a crash there costs one row.

The parent sends jobs, the worker runs the stage's `run` on each and sends what it yields:

    ("row", dict)    a finished row
    ("at", text)     what is being tried, so that the parent knows where a worker died
    ("end", None)    the job is over

A worker whose GPU no longer answers (an illegal access poisons the whole process) exits by itself.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LOST_GPU = 86  # exit status
GRACE = 2.0  # seconds that a killed worker gets


@dataclass(frozen=True)
class Settings:
    """What every stage is told. machine: "cuda", or the architecture that is emulated in a dry run.

    out: directory for files besides the record. cases: names of tests/cases.py to keep to, or none. kernels:
    names of those that the machine has, first choice first. backward: time the backward pass as well.
    """

    machine: str
    dry_run: bool
    out: str
    cases: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    backward: bool = False

    @property
    def others(self) -> tuple[str, ...]:
        """The kernels that are not the first choice."""
        return self.kernels[1:]


@dataclass(frozen=True)
class Job:
    """A unit of work that ends with one row, or a few. payload: plain data for the stage's `run`."""

    key: str
    payload: dict[str, Any] = field(default_factory=dict)
    seconds: float = 120.0


class Outcome(NamedTuple):
    """How a job ended: "ok", "crashed" or "timed out"; `detail` says more, `at` what was being tried."""

    state: str
    detail: str = ""
    at: str = ""


class Worker:
    """Runs jobs, one at a time; starts its process when one is needed and again after a crash."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Any = None

    def run(self, stage: str, job: Job, seconds: float, keep: Callable[[dict], None]) -> Outcome:
        """Run a job of the module `stage` within `seconds`; `keep` takes each row as it comes."""
        if self._process is None or not self._process.is_alive():
            self._start()
        deadline, at = time.monotonic() + seconds, ""
        try:
            self._connection.send((stage, job))
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self._connection.recv()
                if kind == "end":
                    return Outcome("ok")
                if kind == "row":
                    keep(content)
                at = content if kind == "at" else at
        except (EOFError, OSError):
            self._process.join(GRACE)
            code = self._process.exitcode
            self.close()
            return Outcome("crashed", _exit_in_words(code), at)
        self.close()
        return Outcome("timed out", f"after {seconds:.0f} s", at)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.settings), daemon=True)
        self._process.start()
        theirs.close()


def serve(connection: Any, settings: Settings) -> None:
    """Body of the worker: run jobs until the parent hangs up."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_grad_enabled(False)
    while True:
        try:
            stage, job = connection.recv()
        except EOFError:
            return
        try:
            run = importlib.import_module(stage).run
            for row in run(job, settings, lambda text: connection.send(("at", text))):
                connection.send(("row", {"key": job.key, "state": "ok", **row}))
        except Exception as error:
            connection.send(("row", {"key": job.key, "state": "failed", "error": in_words(error)}))
            traceback.print_exc()
            exit_if_lost(settings)
        connection.send(("end", None))


def exit_if_lost(settings: Settings) -> None:
    """End this process where the GPU no longer answers: after some errors nothing in it can be trusted."""
    import torch

    if settings.machine != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(LOST_GPU)


def in_words(error: BaseException) -> str:
    """An exception in one line, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]


def _exit_in_words(code: int | None) -> str:
    if code is None:
        return "it stopped answering"
    if code == LOST_GPU:
        return "its GPU context was lost"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

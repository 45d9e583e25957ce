"""Nsight Compute's counters on chosen rows of the sweep: a short table, and the CSV beside the record."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import measure, ncu
from ..record import write_whole
from ..tools import run_tool
from ..worker import Job, Settings

SECONDS = 240.0
CANDIDATES = False
ROWS = ("d128-causal-s8192", "d64-full-s8192", "d128-full-s8192", "d256-causal-s8192", "d64-causal-s1024")
SAMPLE = Path(__file__).with_name("ncu_sample.csv")


def jobs(settings: Settings) -> list[Job]:
    """A job per row, or per case where cases are asked for."""
    if settings.cases:
        return [Job(f"case {name}", {"kind": "case", "name": name}) for name in settings.cases]
    rows = [measure.sweep(dry_run=True)[0].key] if settings.dry_run else ROWS
    return [Job(f"row {key}", {"kind": "row", "name": key}) for key in rows]


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Figures by title. In a dry run the call is made without ncu, and a sample of its format is read."""
    call = ncu.command(job.payload["kind"], job.payload["name"])
    dry = settings.machine != measure.CUDA
    if dry:
        call = [*call[call.index(sys.executable):], "--machine", settings.machine]
    elif shutil.which("ncu") is None:
        yield {"state": "missing", "error": "ncu is not on the PATH"}
        return
    answer = run_tool(call, max(5.0, job.seconds - 5.0))
    if dry and answer.status:
        raise RuntimeError((answer.err.strip().splitlines() or ["no message"])[-1])
    text = SAMPLE.read_text() if dry else answer.out
    path = Path(settings.out) / f"ncu-{job.key.replace(' ', '-')}.csv"
    write_whole(path, text)
    launches = ncu.parse(text)
    if not launches:
        raise RuntimeError("ncu saw no kernel")
    figures = ncu.summary(launches[0])
    yield {"kernel": launches[0].kernel, "figures": figures, "file": path.name, "sample": dry}


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """A column per row of the sweep."""
    counted = [row for row in rows if row["state"] == "ok"]
    lines = [f"* {row['key']}: {row['state']}, {row['error']}" for row in rows if row["state"] != "ok"]
    if not counted:
        return "\n".join(lines)
    if any(row["sample"] for row in counted):
        lines += ["The figures are a sample of ncu's format, not a measurement.", ""]
    lines += [f"| | {' | '.join(row['key'] for row in counted)} |", "|---" * (len(counted) + 1) + "|"]
    for title in counted[0]["figures"]:
        lines.append(f"| {title} | {' | '.join(row['figures'].get(title, '–') for row in counted)} |")
    return "\n".join(lines)

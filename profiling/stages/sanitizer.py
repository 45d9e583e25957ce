"""compute-sanitizer's memcheck, racecheck and synccheck on small cases."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .. import measure
from ..tools import run_tool
from ..worker import Job, Settings

SECONDS = 240.0
CANDIDATES = False
TOOLS = ("memcheck", "racecheck", "synccheck")
CASES = (
    "lengths_65_63_causal", "varlen_causal", "dims_40_40", "dims_256_256", "mask_window", "dropout_0.5",
)
DRY_CASES = ("lengths_65_63_causal",)
# "ERROR SUMMARY: 3 errors"; "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
FIRST = re.compile(
    r"^=+ (?:Error: )?((?:Invalid|Race|Potential|Barrier|Uninitialized|Program hit).*)$", re.MULTILINE
)
FOUND = 86


def jobs(settings: Settings) -> list[Job]:
    """A job per tool, case and kernel, all tools on the first case first; in a dry run, where none is used, a
    job per kernel."""
    names = settings.cases or (DRY_CASES if settings.dry_run else CASES)
    tools = TOOLS[:1] if settings.dry_run else TOOLS
    first = [Job(f"{tool} {name}", {"tool": tool, "case": name}) for name in names for tool in tools]
    others = [
        Job(f"{job.key} ({kernel})", job.payload | {"kernel": kernel})
        for kernel in settings.others for job in first
    ]
    return first + others


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """How many errors a tool found. In a dry run the emulator's own checks stand in for the tool."""
    one = [sys.executable, "-m", "profiling", "one", "--machine", settings.machine]
    one += ["--case", job.payload["case"]]
    one += ["--kernel", job.payload["kernel"]] if "kernel" in job.payload else []
    if settings.machine != measure.CUDA:
        answer = run_tool([*one, "--races"], max(5.0, job.seconds - 5.0))
        if answer.status:
            raise RuntimeError((answer.err.strip().splitlines() or ["no message"])[-1])
        yield {"errors": 0, "by": "the emulator"}
    elif shutil.which("compute-sanitizer") is None:
        yield {"state": "missing", "error": "compute-sanitizer is not on the PATH"}
    else:
        answer = run_tool(command(job.payload["tool"], one), max(5.0, job.seconds - 5.0))
        yield judged(answer.out + answer.err, answer.status)


def command(tool: str, call: list[str]) -> list[str]:
    """compute-sanitizer's command line."""
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *call]


def judged(text: str, status: int) -> dict[str, Any]:
    """A row from what the tool printed: its own summary decides, and must be there."""
    summary = SUMMARY.search(text)
    if summary is None:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        return {"state": "failed", "error": f"no summary, exit status {status}; it last said: {last[:200]}"}
    errors = int(summary[1])
    if errors or status:
        first = FIRST.search(text)
        words = f"{errors} errors, exit status {status}; {first[1][:200] if first else 'not described'}"
        return {"state": "failed", "errors": errors, "error": words}
    return {"errors": 0, "by": "compute-sanitizer"}


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """A line per tool and case."""
    lines = ["| check | errors |", "|---|---|"]
    for row in rows:
        well = row["state"] == "ok"
        found = f"{row['errors']} ({row['by']})" if well else f"**{row['state']}**: {row['error']}"
        lines.append(f"| {row['key']} | {found} |")
    return "\n".join(lines)

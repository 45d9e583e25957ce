"""Running a tool that starts processes of its own, within a time."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import NamedTuple


class Answer(NamedTuple):
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


def run_tool(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> Answer:
    """Run a command; TimeoutError after `seconds`, when it and every process that it started are killed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | (environment or {}),
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} took longer than {seconds:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Answer(process.returncode, out, err)

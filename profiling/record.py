"""The results of one report, on disk at every moment: NAME.json, written whole after each row, and NAME.md.

    {"format": 1, "name", "started", "machine", "dry_run", "command",
     "stages": {stage: {"state", "seconds", "left", "rows": [{"key", "state", ...}, ...]}}}

A stage's state: "running", "done", "cut short" (`left` names what did not run), "interrupted". A row's:
"ok", "failed" (`error`), "crashed" (its process died), "timed out", "missing" (`error` says what is).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

FORMAT = 1
RESULTS = Path(__file__).resolve().parent / "results"


class Record:
    """A report's results; every change is on disk before the method returns."""

    def __init__(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """path: NAME.json. With `facts` a new record; without, the one that stands there."""
        self.path = path
        if facts is None:
            self.data = read(path)
        else:
            started = time.strftime("%Y-%m-%dT%H:%M:%S")
            self.data = {"format": FORMAT, "name": path.stem, "started": started, **facts, "stages": {}}
            self.write()

    def begin(self, stage: str) -> dict[str, Any]:
        """The stage's entry, as it stands or new."""
        entry = self.data["stages"].setdefault(stage, {"seconds": 0.0, "rows": []})
        entry |= {"state": "running", "left": []}
        self.write()
        return entry

    def finish(self, stage: str, state: str, seconds: float, left: list[str]) -> None:
        """Note how a stage ended; `left`: keys that did not run."""
        entry = self.data["stages"][stage]
        entry |= {"state": state, "seconds": round(entry["seconds"] + seconds, 1), "left": left}
        self.write()

    def add(self, stage: str, row: dict[str, Any]) -> None:
        """Keep a row; it replaces one with the same key."""
        rows = self.data["stages"][stage]["rows"]
        rows[:] = [old for old in rows if old["key"] != row["key"]]
        rows.append(_plain(row))
        self.write()

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The stage's rows, none where it did not run."""
        return self.data["stages"].get(stage, {}).get("rows", [])

    def done(self, stage: str, key: str) -> bool:
        """Whether the stage has this row, well ended."""
        return any(row["key"] == key and row["state"] == "ok" for row in self.rows(stage))

    def write(self) -> None:
        """Write NAME.json beside its place and move it there: a reader, or a power cut, sees it whole."""
        write_whole(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The value as strict JSON has it: numbers that are not finite become words."""
    if isinstance(value, dict):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read(path: Path) -> dict[str, Any]:
    """A record's data. Raises ValueError where the file is something else."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a report of format {FORMAT}")
    return data


def reports(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """The data of every report of a GPU in a directory, newest first, by the time it started."""
    found = [read(path) for path in directory.glob("????-??-??-*.json")]
    return sorted((d for d in found if not d["dry_run"]), key=lambda data: data["started"], reverse=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

"""A report's data as Markdown, and a row of it in a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import stages


def markdown(data: dict[str, Any], pictures: list[Path] = ()) -> str:
    """The whole report."""
    lines = [f"# {data['name']}", "", f"{data['machine']}, {data['started']}; `{data['command']}`"]
    if data["dry_run"]:
        lines += ["", "**A dry run: the emulator stood in for the GPU, on tiny shapes: no measurement.**"]
    for stage, entry in data["stages"].items():
        lines += ["", f"## {stage}: {entry['state']} after {entry['seconds']:.0f} s", ""]
        if entry["left"]:
            lines += [f"Not run: {', '.join(entry['left'])}", ""]
        lines.append(stages.module(stage).markdown(entry["rows"], data))
    for picture in pictures:
        lines += ["", f"![{picture.stem}]({picture.name})"]
    return "\n".join(lines) + "\n"


def in_short(row: dict[str, Any]) -> str:
    """A row for the progress line."""
    if not row:
        return "nothing"
    if row["state"] != "ok":
        return f"{row['state']}, {row['error']}"
    if "ratio to best" in row:
        ours = row["peers"]["cute_flash"]["tflops"]
        return f"{ours:.4g} TFLOP/s, {row['ratio to best']:.3f} × {row['best peer']}"
    if "rate" in row:
        return f"{row['rate']:.4g} {row['unit']}"
    return "ok"

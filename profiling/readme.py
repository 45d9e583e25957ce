"""README's performance section: what was measured on hardware, from the newest report; else that nothing was.

    python -m profiling readme      write it between README's <!-- performance --> marks
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from . import cycles_table, static_table
from .cycles import BACKWARD, Row
from .cycles_table import asks_more
from .rates import GPUS
from .record import RESULTS, reports, write_whole
from .stages import speed

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = re.compile(r"(<!-- performance -->\n).*?(\n<!-- /performance -->)", re.DOTALL)
# What the tables without hardware are shown at: one case per line, ours and the peer's.
SHOWN = ("d64", "d128", "d192_128", "d256")


def main(arguments: list[str]) -> int:
    """Write the section; 0 where README has the marks, else 1."""
    argparse.ArgumentParser(prog="python -m profiling readme", description=__doc__).parse_args(arguments)
    text, found = MARKS.subn(lambda marks: marks[1] + section() + marks[2], README.read_text())
    if found != 1:
        print(f"{README} has {found} sections between <!-- performance --> and <!-- /performance -->")
        return 1
    write_whole(README, text)
    return 0


def section(results: Path = RESULTS) -> str:
    """The section's text, from the results in a directory."""
    measured = [data for data in reports(results) if _rows(data)]
    lines = _measured(measured[0]) if measured else [
        "**No speed was measured on hardware yet**: no GPU was at hand. `python -m profiling report`",
        "measures on one, beside FlashAttention-2, -3, flash-attn-4 and cuDNN; this section is then made",
        "from its results.",
    ]
    return "\n".join([*lines, "", *_without_hardware(results)])


def _rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the sweep that were measured."""
    rows = data["stages"].get("speed", {}).get("rows", [])
    return [row for row in rows if row.get("kind") == "row" and row["state"] == "ok"]


def _measured(data: dict[str, Any]) -> list[str]:
    name, rows = data["name"], _rows(data)
    lines = [f"{data['machine']}, {data['started'][:10]}; all of it: `profiling/results/{name}.md`.", ""]
    lines.append(speed.table(rows, data))
    for ratio, words in (("ratio to best", "the best peer"), ("ratio to FA2", "FlashAttention-2")):
        if ratios := [row[ratio] for row in rows if ratio in row]:
            mean = statistics.geometric_mean(ratios)
            over = f"Geometric mean of our speed over that of {words}"
            lines += ["", f"{over}: {mean:.3f}, {len(ratios)} rows."]
    pictures = sorted(RESULTS.glob(f"{name}-*.svg"))
    return [*lines, *(f"![{p.stem}](profiling/results/{p.name})" for p in pictures)]


def _without_hardware(results: Path) -> list[str]:
    """What machine code and emulator say: pointers, a summary, and the ceilings."""
    figures = static_table.read(results / static_table.JSON.name)
    found = cycles_table.read(results / cycles_table.JSON.name)
    counted = [row for row in found if isinstance(row, Row)]
    lines = [
        "What can be read without a GPU: registers, spills and hot loops of every kernel beside",
        "flash-attn-4's (`profiling/results/static.md`), and what each unit of a GPU allows per KV tile",
        "(`profiling/results/cycles.md`; `profiling/sm100.md` argues from it what a B200 should reach). In",
        "the compiled code:",
        static_table.in_short(figures) + ".", "",
        "Ceilings in TFLOP/s: what the unit that binds would allow, were it always busy. **Bounds, not",
        "measurements**; in brackets the unit, and the bound where tensor cores and the rest take turns.", "",
        f"| kernel | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|",
    ]
    for gpu in GPUS:
        target = GPUS[gpu].device.target
        kernels = dict.fromkeys(row.kernel for row in counted if row.target == target and row.case in SHOWN)
        for kernel in kernels:
            mine = {row.case: row for row in counted if (row.target, row.kernel) == (target, kernel)}
            cells = (_ceiling(mine[name], gpu) if name in mine else "–" for name in SHOWN)
            lines.append(f"| {gpu}: {kernel} | {' | '.join(cells)} |")
    return [*lines, "", *_gradients([row for row in counted if row.case in BACKWARD and row.config])]


def _gradients(ours: list[Row]) -> list[str]:
    """What our main kernels of gradients ask for, beside FlashAttention-2's tiles."""
    more = {row.case.removesuffix("_backward"): asks_more(row) for row in ours}
    no_more = ", ".join(case for case, units in more.items() if not units)
    beyond = (f"{case} ({', '.join(units)})" for case, units in more.items() if units)
    return [
        "Gradients on an A100, counted the same way, ask no more products, exponentials, shared memory and",
        f"fp32 sums in global memory than FlashAttention-2's published tiles at {no_more}; more at",
        f"{', '.join(beyond)}: `cycles.md` says what in the tiles makes it so.",
    ]


def _ceiling(row: Row, gpu: str) -> str:
    binds, ceiling, in_turn = row.cost.ceilings(GPUS[gpu])
    return f"{ceiling:.0f} ({binds}; {in_turn:.0f})"


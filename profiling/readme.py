"""README's performance section: what was measured on hardware, from the newest report; else that nothing was.

    python -m profiling readme      write it between README's <!-- performance --> marks
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import Any

from . import cycles_table, static_table
from .arguments import ARGUMENTS, Argument, added_per_kflop
from .cycles import BACKWARD, Row
from .cycles_table import PUBLISHED_GPU, asks_more
from .rates import GPUS
from .record import RESULTS, reports, write_whole
from .stages import speed
from .timing import kept, published, validate

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = re.compile(r"(<!-- performance -->\n).*?(\n<!-- /performance -->)", re.DOTALL)
# What the tables without hardware are shown at: one case per line, ours and the peer's.
SHOWN = ("d64", "d128", "d192_128", "d256")
PREDICTED_AT = 4096  # keys, one of kept.LENGTHS


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
    return "\n".join([*lines, "", *_predicted(), "", *_without_hardware(results)])


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


def _predicted() -> list[str]:
    """What the timing model says, with its error, of ours and of the peer's."""
    off = {(row.gpu, row.kind): row for row in validate.read_errors()}
    rows = [row for row in kept.read() if (row.gpu, "bwd" if row.backward else "fwd") in off]
    columns = [(dim, causal) for dim in sorted({row.dim for row in rows}) for causal in (False, True)]
    titles = [f"d{dim} causal" if causal else f"d{dim}" for dim, causal in columns]
    lines = [
        f"**Predicted, not measured**: TFLOP/s over {PREDICTED_AT} keys, by a model of SMs that runs machine",
        "code clock by clock (`python -m profiling timing`, `profiling/results/timing.md`), and its mean",
        "error on published speeds of flash-attn-4, on an A100 also of cuDNN front end's open kernels, that",
        "chose nothing in it (`--validate`).", "",
        f"| kernel | {' | '.join(titles)} | error of the model |",
        "|---" * (len(columns) + 2) + "|",
    ]
    told = dict.fromkeys((row.gpu, row.backward, row.kernel) for row in rows)
    for gpu, backward, kernel in sorted(told):
        mine = {
            (row.dim, row.causal): f"{row.tflops(PREDICTED_AT):.0f}"
            for row in rows if (row.gpu, row.backward, row.kernel) == (gpu, backward, kernel)
        }
        cells = " | ".join(mine.get(column, "–") for column in columns)
        name = f"{kernel}, gradients" if backward and "backward" not in kernel else kernel
        error = off[gpu, "bwd" if backward else "fwd"].held
        lines.append(f"| {gpu}: {name} | {cells} | ± {100 * error:.1f} % |")
    missed = [_missed(error) for error in off.values() if not error.holds]
    return [*lines, "", f"The model misses its bar at: {'; '.join(missed)}."] if missed else lines


def _missed(error: validate.Error) -> str:
    """By how much, and how far numbers for one problem, published twice, are apart on that GPU."""
    rows = [validate.Predicted(row, math.nan) for row in validate.predictable(published.read())]
    mine = [each for each in rows if (each.row.gpu, each.row.kind) == (error.gpu, error.kind)]
    many, apart = validate.twice(mine).get(error.gpu, (0, 0.0))
    said = f"{error.gpu} {error.kind}, {100 * error.held:.1f} %"
    return f"{said} ({many} problems were published twice, {100 * apart:.1f} % apart)" if many else said


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
    lines += ["", *_gradients(counted)]
    for argument in ARGUMENTS:
        lines += ["", *_beside_peer(counted, argument)]
    return lines


def _gradients(counted: list[Row]) -> list[str]:
    """What our main kernels of gradients ask for, beside FlashAttention-2's tiles."""
    target = GPUS[PUBLISHED_GPU].device.target
    ours = [row for row in counted if row.case in BACKWARD and row.config and row.target == target]
    more = {row.case.removesuffix("_backward"): asks_more(row) for row in ours}
    no_more = ", ".join(case for case, units in more.items() if not units)
    beyond = (f"{case} ({', '.join(units)})" for case, units in more.items() if units)
    return [
        "Gradients on an A100, counted the same way, ask no more products, exponentials, shared memory and",
        f"fp32 sums in global memory than FlashAttention-2's published tiles at {no_more}; more at",
        f"{', '.join(beyond)}: `cycles.md` says what in the tiles makes it so.",
    ]


def _beside_peer(counted: list[Row], argument: Argument) -> list[str]:
    """Ceilings of our main kernels of gradients, beside flash-attn-4's."""
    gpu, names = argument.gpu, [name.removesuffix("_backward") for name in argument.cases]
    lines = [
        f"Gradients on {'a' if gpu[0] == 'B' else 'an'} {gpu} beside flash-attn-4's kernels: the same",
        "bounds, and bytes of dQ that are added to global memory per 1000 FLOP.",
        f"`profiling/{argument.path.name}` argues from them what to expect.", "",
        f"| kernel | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
    ]
    target = GPUS[gpu].device.target
    here = [row for row in counted if row.target == target and row.case in argument.cases]
    for kernel in dict.fromkeys(row.kernel for row in here):
        mine = {row.case: row for row in here if row.kernel == kernel}
        cells = (
            f"{_ceiling(mine[name], gpu)}, {added_per_kflop(mine[name])} B" if name in mine else "–"
            for name in argument.cases
        )
        lines.append(f"| {gpu}: {kernel} | {' | '.join(cells)} |")
    return lines


def _ceiling(row: Row, gpu: str) -> str:
    binds, ceiling, in_turn = row.ceilings(GPUS[gpu])
    return f"{ceiling:.0f} ({binds}; {in_turn:.0f})"


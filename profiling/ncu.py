"""python -m profiling ncu: Nsight Compute's counters of one call, as a short table.

    python -m profiling ncu --row d128-causal-s8192           on a GPU: run ncu, print the table, keep the CSV
    python -m profiling ncu --arch sm90 --case bfloat16 --print   the command line only
    python -m profiling ncu --csv FILE                        the table of a CSV that ncu wrote elsewhere

The clocks are left alone (--clock-control none). Whole sections are asked for, not single counters: which
counters a section has differs from chip to chip, and ncu knows.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import measure
from .tools import run_tool

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy",
)
# Kernels of the DSL are named after the class that holds them; torch's own, which fill the inputs, are not.
KERNELS = "regex:ForwardKernel"
IDENTITY = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size",
            "Grid Size", "Device", "CC")
STALL = re.compile(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)")
LARGEST_STALLS = 4


class Column(NamedTuple):
    """A figure of the table: the first counter whose name matches one of the patterns, in order."""

    title: str
    patterns: tuple[str, ...]


COLUMNS = (
    Column("time", (r"gpu__time_duration\.(sum|avg)",)),
    Column("tensor pipe", (
        r"sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_active",
        r"sm__pipe_tensor_op_[hg]\w*mma_cycles_active\.avg\.pct_of_peak_sustained_active",
        r"sm__inst_executed_pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
    )),
    Column("XU (MUFU)", (r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak_sustained_active",
                         r"sm__pipe_xu_cycles_active\.avg\.pct_of_peak_sustained_active")),
    Column("FMA pipe", (r"sm__pipe_fma\w*_cycles_active\.avg\.pct_of_peak_sustained_active",
                        r"sm__inst_executed_pipe_fma\w*\.avg\.pct_of_peak_sustained_active")),
    Column("issue slots", (
        r"smsp__issue_active\.avg\.pct\w*",
        r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
        r"smsp__issue_active\.avg\.per_cycle_active",
    )),
    Column("shared memory", (
        r"l1tex__data_pipe_lsu_wavefronts_mem_shared\.avg\.pct_of_peak_sustained_elapsed",
        r"l1tex__data_pipe_lsu_wavefronts\.avg\.pct_of_peak_sustained_elapsed",
        r"l1tex__throughput\.avg\.pct_of_peak_sustained_active",
    )),
    Column("bank conflicts", (r"l1tex__data_bank_conflicts_pipe_lsu_mem_shared\.sum",
                              r"l1tex__data_bank_conflicts_pipe_lsu\w*\.sum")),
    Column("L2", (r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed", r"lts__t_sectors\.avg\.pct\w*")),
    Column("DRAM", (r"gpu__dram_throughput\.avg\.pct_of_peak_sustained_elapsed",
                    r"dram__throughput\.avg\.pct_of_peak_sustained_elapsed")),
    Column("registers", (r"launch__registers_per_thread",)),
    Column("warps active", (r"sm__warps_active\.avg\.pct_of_peak_sustained_active",)),
)


class Launch(NamedTuple):
    """One profiled kernel: its name and every counter, (value, unit) by name."""

    kernel: str
    counters: dict[str, tuple[float, str]]


def main(arguments: list[str]) -> int:
    """0 where there is a table to print, 2 where an argument or ncu is missing."""
    parser = argparse.ArgumentParser(prog="python -m profiling ncu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", metavar="NAME", help="a case of tests/cases.py")
    what.add_argument("--row", metavar="KEY", help="a row of the speed sweep")
    what.add_argument("--csv", type=Path, metavar="FILE", help="a CSV that ncu wrote")
    parser.add_argument("--arch", help="stop unless the GPU at hand is served by this tree, such as sm90")
    parser.add_argument("--out", type=Path, default=Path("ncu.csv"), help="where the CSV goes (%(default)s)")
    parser.add_argument("--print", action="store_true", help="only print ncu's command line")
    chosen = parser.parse_args(arguments)
    if chosen.csv:
        print(markdown(parse(chosen.csv.read_text())))
        return 0
    problem = _unknown(chosen.case, chosen.row)
    call = command("case" if chosen.case else "row", chosen.case or chosen.row)
    if chosen.print and not problem:
        print(shlex.join(call))
        return 0
    problem = problem or _not_here(chosen.arch)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    answer = run_tool(call, seconds=300.0)
    chosen.out.write_text(answer.out)
    print(markdown(parse(answer.out)))
    print(f"all counters: {chosen.out}")
    return 0


def command(kind: str, name: str) -> list[str]:
    """ncu's command line for a call of `python -m profiling one --KIND NAME`; CSV on stdout."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--kernel-name-base", "mangled"]
    limits = ["--kernel-name", KERNELS, "--launch-count", "1"]
    return ["ncu", *options, *limits, *sections, sys.executable, "-m", "profiling", "one", f"--{kind}", name]


def parse(text: str) -> list[Launch]:
    """The launches in ncu's CSV output, either page; lines before the header are ncu's own messages.

    --page raw: a column per counter, and a row of units under the header. Otherwise: a row per counter,
    with "Metric Name", "Metric Unit", "Metric Value". Raises ValueError, with ncu's words, without a table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if line.startswith("==")]
        raise ValueError(f"no table in ncu's output; it said: {' / '.join(said[-3:]) or 'nothing'}")
    rows = list(csv.DictReader(line for line in lines[start:] if line.startswith('"')))
    return _tall(rows) if rows and "Metric Name" in rows[0] else _wide(rows)


def _wide(rows: list[dict[str, str]]) -> list[Launch]:
    if not rows:
        return []
    units, *launches = rows
    return [
        Launch(row["Kernel Name"], {
            name: (value, units[name] or "")
            for name, text in row.items()
            if name not in IDENTITY and (value := _number(text)) is not None
        })
        for row in launches
    ]


def _tall(rows: list[dict[str, str]]) -> list[Launch]:
    found: dict[str, Launch] = {}
    for row in rows:
        launch = found.setdefault(row["ID"], Launch(row["Kernel Name"], {}))
        value = _number(row["Metric Value"])
        if value is not None:
            launch.counters[row["Metric Name"]] = (value, row["Metric Unit"])
    return list(found.values())


def _number(text: str | None) -> float | None:
    """A number as ncu writes it, with commas between thousands; None for words and n/a."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def summary(launch: Launch) -> dict[str, str]:
    """Title -> figure and unit, "not counted" where the chip's sections lack it; then the main stalls."""
    found = {column.title: _figure(launch, column.patterns) for column in COLUMNS}
    stalls = {
        match[1]: value
        for name, (value, _) in launch.counters.items()
        if (match := STALL.search(name)) and match[1] != "selected" and "not_issued" not in name
    }
    largest = sorted(stalls, key=lambda reason: -stalls[reason])[:LARGEST_STALLS]
    found["stalls"] = ", ".join(f"{reason} {stalls[reason]:.2f}" for reason in largest) or "not counted"
    return found


def _figure(launch: Launch, patterns: Iterable[str]) -> str:
    for pattern in patterns:
        for name, (value, unit) in launch.counters.items():
            if re.fullmatch(pattern, name):
                return f"{value:,.4g} {unit}".strip()
    return "not counted"


def markdown(launches: list[Launch]) -> str:
    """A column per launch, a row per figure."""
    if not launches:
        return "ncu saw no kernel"
    summaries = [summary(launch) for launch in launches]
    names = [launch.kernel[:60] for launch in launches]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(s[title] for s in summaries)} |" for title in summaries[0]]
    return "\n".join(lines)


def _unknown(case: str | None, row: str | None) -> str:
    from . import stages

    if row is not None:
        try:
            measure.row_named(row)
        except KeyError as error:
            return error.args[0]
    return stages.unknown_cases([case]) if case else ""


def _not_here(arch: str | None) -> str:
    """Why ncu cannot run here, or ""."""
    import torch

    from cute_flash.arch import tree_of

    if not torch.cuda.is_available():
        return "ncu counts on a GPU, there is none; --print shows its command line, --csv reads its output"
    if shutil.which("ncu") is None:
        return "ncu is not on the PATH: it comes with Nsight Compute"
    tree = tree_of(torch.cuda.get_device_capability())
    return f"--arch is {arch}, the GPU at hand is served by {tree}" if arch not in (None, tree) else ""

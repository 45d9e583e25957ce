"""What `python -m profiling cycles` found, as text, and kept in results/cycles.json and cycles.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import cycles, flash_attn_4, record, sass
from .cycles import NotYet, Row
from .rates import GPUS
from .record import write_whole
from .static import CASES

JSON = record.RESULTS / "cycles.json"
TITLES = ["case", "kernel", "tile", "matrix", "mufu", "fma", "alu", "issue", "shared", "binds", "ceiling"]
TITLES += ["of peak", "in turn", "measured"]


def lines(found: Row | NotYet, gpus: Iterable[str]) -> Iterator[str]:
    """What is printed of one kernel: its counts, and a line per GPU."""
    name = f"{found.case} on {found.target}, {found.kernel}"
    if isinstance(found, NotYet):
        yield f"{name}: {found.reason}"
        return
    yield f"{name}, {found.tile[0]} rows x {found.tile[1]} keys, per KV tile and CTA:"
    for role, counts in found.roles.items():
        told = ", ".join(f"{kind} {count:g}" for kind, count in counts.items())
        yield f"    {role}, PTX warp instructions: {told}"
    shared = f"{found.wavefronts:.0f} wavefronts, {_loss(found)} the least"
    yield f"    shared memory: {shared}; barrier round trips {found.barriers:.1f} per warp"
    cost = found.cost
    lanes = f"{cost.fma:.0f} FMA lanes, {cost.alu:.0f} ALU lanes"
    yield f"    machine code: {cost.issue:.0f} issue slots, {lanes}, {found.local / 1024:.1f} KiB of spills"
    for gpu in gpus:
        if GPUS[gpu].device.target == found.target:
            clocks = " ".join(f"{unit} {count:6.0f}" for unit, count in cost.cycles(GPUS[gpu]).items())
            binds, ceiling, share, in_turn, seen = _verdict(found, gpu)
            text = f"    {gpu:6} clocks: {clocks}; {binds} binds: ceiling {ceiling} TFLOP/s ({share} of peak)"
            yield f"{text}, in turn {in_turn}; measured: {seen}"


def _loss(found: Row) -> str:
    return f"{found.wavefronts / found.ideal:.2f} x" if found.ideal else "none, that is"


def _verdict(found: Row, gpu: str) -> tuple[str, str, str, str, str]:
    """What binds, the ceiling, its share of the peak, both in turn, and what was measured."""
    binds, ceiling, in_turn = found.cost.ceilings(GPUS[gpu])
    share = 100 * ceiling * 1e12 / GPUS[gpu].peak
    return binds, f"{ceiling:.0f}", f"{share:.0f} %", f"{in_turn:.0f}", measured(found, gpu)


def measured(found: Row, gpu: str) -> str:
    """TFLOP/s in the newest report from such a GPU, at the longest sequence that it has; – without one.

    Of ours only the kernel that was measured.
    """
    data = next((data for data in record.reports() if gpu in data["machine"]), {"stages": {}})
    rows = [r for r in data["stages"].get("speed", {}).get("rows", []) if _same_problem(found, r)]
    seen = "–"
    for r in sorted(rows, key=lambda r: r["shape"]["seqlen"]):
        for name, timed in r["peers"].items():
            if "tflops" in timed and _same_kernel(found, name, timed):
                seen = f"{timed['tflops']:.0f} ({r['key']})"
    return seen


def _same_problem(found: Row, row: dict[str, Any]) -> bool:
    if row.get("kind") != "row" or row["state"] != "ok" or row["shape"].get("backward"):
        return False
    case, shape = CASES[found.case], row["shape"]
    asked = tuple(shape[name] for name in ("head_dim", "head_dim_v", "causal"))
    return asked == (*case.dims, case.rules == "causal")


def _same_kernel(found: Row, name: str, timed: dict[str, Any]) -> bool:
    if found.kernel.startswith(flash_attn_4.NAME):
        return name == flash_attn_4.NAME
    return timed.get("kernel") == found.kernel


def write(rows: Iterable[Row | NotYet], path: Path = JSON) -> None:
    """Put rows into the file and its Markdown; of the same case and target, those there go."""
    fresh = list(rows)
    done = {(row.case, row.target) for row in fresh}
    kept = [row for row in (read(path) if path.exists() else []) if (row.case, row.target) not in done]
    targets, cases = list(dict.fromkeys(gpu.device.target for gpu in GPUS.values())), list(CASES)
    ordered = sorted([*kept, *fresh], key=lambda row: (targets.index(row.target), cases.index(row.case)))
    told = [json.dumps(asdict(row), ensure_ascii=False) for row in ordered]
    write_whole(path, '{"rows": [\n' + ",\n".join(told) + "\n]}\n")
    write_whole(path.with_suffix(".md"), markdown(read(path)))


def read(path: Path = JSON) -> list[Row | NotYet]:
    """The rows of the file."""
    rows = json.loads(path.read_text())["rows"]
    return [NotYet(**row) if "reason" in row else Row.of(row) for row in rows]


def markdown(rows: list[Row | NotYet]) -> str:
    """A table per GPU, then the counts behind them."""
    text = [
        "# What each unit allows", "",
        "Written by `python -m profiling cycles --write`. **These are bounds, not timings**: clocks that",
        "each unit of one SM needs for one KV tile of one CTA, were it always busy, from counts of the",
        "emulator and of the machine code, over the rates in `profiling/rates.py`. Ceiling: TFLOP/s where",
        "the slowest unit alone sets the pace; in turn: where the tensor cores and the rest wait for each",
        "other. measured: by a report from that GPU, at its longest sequence.",
    ]
    for gpu in GPUS:
        target = GPUS[gpu].device.target
        here = [row for row in rows if row.target == target]
        text += ["", f"## {gpu} ({target})", "", f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
        text += [_line(row, gpu) for row in here if isinstance(row, Row)]
        absent = [f"* {row.case}, {row.kernel}: {row.reason}" for row in here if isinstance(row, NotYet)]
        text += ["", *absent] if absent else []
    text += ["", "## Counts per KV tile and CTA", "", *_counts(row for row in rows if isinstance(row, Row))]
    return "\n".join(text) + "\n"


def _line(row: Row, gpu: str) -> str:
    clocks = (f"{count:.0f}" for count in row.cost.cycles(GPUS[gpu]).values())
    cells = [row.case, row.kernel, "×".join(map(str, row.tile)), *clocks, *_verdict(row, gpu)]
    return f"| {' | '.join(cells)} |"


def _counts(rows: Iterable[Row]) -> Iterator[str]:
    titles = ["target", "case", "kernel", "MFLOP", "exponentials", "FMA lanes", "ALU lanes", "issue slots"]
    titles += ["shared KiB", "wavefronts / least", "barriers per warp", "spills KiB", "roles"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        cost, roles = row.cost, "; ".join(_role(*item) for item in row.roles.items())
        cells = [row.target, row.case, row.kernel, f"{cost.flops / 1e6:.2f}", f"{cost.mufu:.0f}"]
        cells += [f"{cost.fma:.0f}", f"{cost.alu:.0f}", f"{cost.issue:.0f}"]
        cells += [f"{(cost.shared - row.local) / 1024:.1f}", _loss(row), f"{row.barriers:.1f}"]
        yield f"| {' | '.join([*cells, f'{row.local / 1024:.1f}', roles])} |"


def _role(name: str, counts: dict[str, float]) -> str:
    told = (f"{kind} {count:g}" for kind, count in counts.items() if kind not in ("warps", "flops"))
    return f"{name}: {', '.join(told)}"


def main(arguments: list[str]) -> int:
    """Print counts and bounds; 1 where a kernel of ours could not be run on the emulator."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling cycles", description=cycles.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES.values() if case.rules != "everything"]
    parser.add_argument("--case", nargs="+", choices=names, default=list(cycles.DEFAULT), metavar="CASE")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), metavar="GPU")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--write", action="store_true", help="keep the rows in profiling/results")
    chosen = parser.parse_args(arguments)
    try:
        sass.tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    print("Bounds, not timings: see --help. Inputs are random normal; bf16.")
    rows: list[Row | NotYet] = []
    for found in cycles.survey(chosen.case, chosen.gpu, not chosen.no_peer):
        rows.append(found)
        print("\n".join(lines(found, chosen.gpu)), flush=True)
    if chosen.write:
        write(rows)
    return 1 if any(isinstance(r, NotYet) and not r.kernel.startswith(flash_attn_4.NAME) for r in rows) else 0

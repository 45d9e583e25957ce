"""What `python -m profiling static` found, as text, and kept in results/static.json and static.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cute_flash import cache
from cute_flash.dispatch import EMULATED

from . import sass, static
from .record import RESULTS, write_whole
from .static import CASES, Absent, Figures

JSON = RESULTS / "static.json"
MMA_SYNC = 4096  # FLOP of one m16n8k16

# Columns on the terminal: heading -> width, negative where text is flush left.
_LEFT = {
    "arch": 5, "case": -16, "kernel": -21, "regs": 4, "stack": 5, "local": 5, "smem": 6, "threads": 7,
    "CTAs/SM": 7, "by": -13,
}  # fmt: skip
_SHOWN = [name for name in sass.CLASSES if name != "global"]
_LOOP = {name: max(4, len(name)) for name in (*_SHOWN, "all", "slots")}
_TITLES = ["case", "kernel", "registers", "stack, local", "smem KiB", "threads", "CTAs/SM", "loop"]


def lines(rows: Iterable[Figures | Absent]) -> Iterator[str]:
    """Lines to print, one per hot loop of a kernel."""
    yield f"{_cells(_LEFT, _LEFT)} | {_cells(_LOOP, _LOOP)}  config"
    for row in rows:
        if isinstance(row, Absent):
            yield f"{row.arch:>5} {row.case:<16} {row.kernel}: {row.reason}"
            continue
        left: list[Any] = [row.arch, row.case, row.kernel, row.registers, row.stack, row.local]
        left += [row.shared_memory, row.threads, row.ctas, row.bound]
        if not row.loops:
            yield f"{_cells(left, _LEFT)} | no matrix product  {row.config}"
        for i in range(len(row.loops)):
            shown = left if i == 0 else [""] * len(left)
            yield f"{_cells(shown, _LEFT)} | {_cells(_counts(row, i), _LOOP)}  {row.config}"


def _cells(values: Iterable[Any], widths: dict[str, int]) -> str:
    padded = (
        f"{value!s:<{-width}}" if width < 0 else f"{value!s:>{width}}"
        for value, width in zip(values, widths.values(), strict=True)
    )
    return " ".join(padded)


def _counts(row: Figures, i: int) -> list[Any]:
    """Instructions of a loop by class, all of them, and issue slots per mma.sync's worth of FLOP."""
    counts, total = row.loops[i], sum(row.loops[i].values())
    slots = f"{total * MMA_SYNC / row.flops[i]:.2f}" if row.flops[i] else "–"
    return [*(counts[name] for name in _SHOWN), total, slots]


def spilling(rows: Iterable[Figures | Absent]) -> list[str]:
    """Kernels of ours that use stack or local memory."""
    ours = (row for row in rows if isinstance(row, Figures) and row.config)
    return [f"{row.arch} {row.case} {row.kernel}" for row in ours if row.stack or row.local]


def in_short(rows: Iterable[Figures | Absent]) -> str:
    """How many kernels there are, and which of ours spill; the peer's beside."""
    found = [row for row in rows if isinstance(row, Figures)]
    ours, peers = [row for row in found if row.config], [row for row in found if not row.config]
    configs = {(row.arch, row.kernel, row.config) for row in ours}
    text = f"{len(ours)} kernels of ours, {len(configs)} configs; with stack or local memory: "
    text += ", ".join(spilling(ours)) or "none"
    for name in static.OWNERS[1:]:
        theirs = [row for row in peers if static.whose(row.kernel) == name]
        if theirs:
            text += f". {name}: {sum(bool(row.stack or row.local) for row in theirs)} of {len(theirs)}"
    return text


def write(rows: Iterable[Figures | Absent], path: Path = JSON) -> None:
    """Put rows into the file and its Markdown; of the same architecture, case and owner, those there go."""
    fresh = list(rows)
    done = {(row.arch, row.case, static.whose(row.kernel)) for row in fresh}
    kept = [
        row for row in (read(path) if path.exists() else [])
        if (row.arch, row.case, static.whose(row.kernel)) not in done
    ]
    arches, cases = list(EMULATED), list(CASES)

    def place(row: Figures | Absent) -> tuple[int, int, int]:
        case = cases.index(row.case) if row.case in cases else -1
        return arches.index(row.arch), case, static.OWNERS.index(static.whose(row.kernel))

    ordered = sorted([*kept, *fresh], key=place)
    told = [json.dumps(asdict(row), ensure_ascii=False) for row in ordered if row.case in CASES]
    versions = json.dumps(cache.versions())
    write_whole(path, f'{{"versions": {versions},\n "rows": [\n' + ",\n".join(told) + "\n]}\n")
    write_whole(path.with_suffix(".md"), markdown(read(path), json.loads(versions)))


def read(path: Path = JSON) -> list[Figures | Absent]:
    """The rows of the file."""
    rows = json.loads(path.read_text())["rows"]
    return [Absent(**row) if "reason" in row else Figures.of(row) for row in rows]


def markdown(rows: list[Figures | Absent], versions: dict[str, Any]) -> str:
    """A table per architecture, a line per hot loop; then what is absent."""
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = [
        "# What the machine code says", "",
        f"Written by `python -m profiling static --write`; {made_with}. Not a measurement of time.", "",
        in_short(rows) + ".", "",
        "Instructions are those of one warp in one iteration of the steady loop over K and V, of gradients",
        "over Q and dO, without masking. Both sides of a branch count that a warp's vote decides: whether",
        "scores are large, whether O is rescaled. Slots: all of them per 4096 FLOP of matrix product (one",
        "`mma.sync` m16n8k16); – where a matrix instruction does not tell its shape. registers: per thread",
        "at launch, and what `setmaxnreg` makes of them. stack, local: bytes per thread, spills or indexed",
        "arrays.",
        "Loop: `mma` has the products, `softmax` the exponentials where other warps compute them, none:",
        "without products. Our configs stand in the JSON beside.",
    ]
    for arch in EMULATED:
        of_arch = [row for row in rows if row.arch == arch]
        titles = [*_TITLES, *_SHOWN, "all", "slots"]
        text += ["", f"## {arch} ({EMULATED[arch].target})", ""]
        if not of_arch:
            text.append(f"Not compiled yet: `python -m profiling static --arch {arch} --write`.")
            continue
        text += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        text += [line for row in of_arch if isinstance(row, Figures) for line in _markdown_rows(row)]
        missing = [f"* {r.case}, {r.kernel}: {r.reason}" for r in of_arch if isinstance(r, Absent)]
        text += ["", *missing] if missing else []
    return "\n".join(text) + "\n"


def _markdown_rows(row: Figures) -> Iterator[str]:
    registers = f"{row.registers}" + (f" → {', '.join(map(str, row.moved))}" if row.moved else "")
    left = [row.case, row.kernel, registers, f"{row.stack}, {row.local}", f"{row.shared_memory / 1024:g}"]
    left += [row.threads, f"{row.ctas} by {row.bound}"]
    if not row.loops:
        yield f"| {' | '.join(map(str, [*left, 'none', *['–'] * (len(_SHOWN) + 2)]))} |"
    for i, counts in enumerate(row.loops):
        role = "softmax" if i else "mma" if counts["mufu"] == 0 or len(row.loops) > 1 else "both"
        cells = [*(left if i == 0 else [""] * len(left)), role, *_counts(row, i)]
        yield f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str]) -> int:
    """Print the table; 0 where no kernel of ours uses stack or local memory."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling static", description=static.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=EMULATED, default=list(EMULATED), metavar="ARCH")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="keep the rows in profiling/results")
    what.add_argument("--golden", action="store_true", help="write tests/golden/static.json, print nothing")
    chosen = parser.parse_args(arguments)
    try:
        sass.tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    if chosen.golden:
        static.GOLDEN.parent.mkdir(exist_ok=True)
        static.GOLDEN.write_text(json.dumps(static.golden(), indent=1) + "\n")
        print(f"{static.GOLDEN} written")
        return 0
    rows: list[Figures | Absent] = []

    def kept() -> Iterator[Figures | Absent]:
        for row in static.survey(chosen.arch, chosen.case, not chosen.no_peer):
            rows.append(row)
            yield row

    for text in lines(kept()):
        print(text, flush=True)
    if chosen.write:
        write(rows)
    print(in_short(rows))
    return 1 if spilling(rows) else 0

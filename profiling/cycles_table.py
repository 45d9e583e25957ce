"""What `python -m profiling cycles` found, as text, and kept in results/cycles.json and cycles.md."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from . import arguments, cycles, flash_attn_4, fp8, gradients, record, sass
from .arguments import added_per_kflop, head, of, pairs, per_work
from .cycles import (
    ALONE,
    BACKWARD,
    CAUSAL_BACKWARD,
    FP8,
    FP8_BACKWARD,
    PARTS,
    SCALED,
    Cost,
    NotYet,
    Row,
    flops_of,
)
from .gradients import WORK, Asked
from .rates import GPUS
from .record import write_whole
from .static import CASES, OWNERS, whose

JSON = record.RESULTS / "cycles.json"
TITLES = ["case", "kernel", "tile", "matrix", "mufu", "fma", "alu", "issue", "shared", "binds", "ceiling"]
TITLES += ["of peak", "in turn", "measured"]
# Where gradients stand beside FlashAttention-2's published tiles, and FP8 beside FlashAttention-3's.
PUBLISHED_GPU = "A100"
PUBLISHED_FP8_GPU = "H200"
FP8_GPUS = (PUBLISHED_FP8_GPU, "B200", "GB300")
UNITS = {"flops": "matrix", "mufu": "mufu", "shared": "shared", "reduced": "bytes added"}


def lines(found: Row | NotYet, gpus: Iterable[str]) -> Iterator[str]:
    """What is printed of one kernel: its counts, and a line per GPU."""
    name = f"{found.case} on {found.target}, {found.kernel}"
    if isinstance(found, NotYet):
        yield f"{name}: {found.reason}"
        return
    kind = "query" if CASES[found.case].backward else "KV"
    yield f"{name}, {found.tile[0]} rows x {found.tile[1]} keys, per {kind} tile and CTA:"
    for role, counts in found.roles.items():
        told = ", ".join(f"{kind} {count:g}" for kind, count in counts.items())
        yield f"    {role}, PTX warp instructions: {told}"
    if found.cost.reduced:
        yield f"    added to global memory: {found.cost.reduced / 1024:.1f} KiB"
    shared = f"{found.wavefronts:.0f} wavefronts, {_loss(found)} the least"
    parts = "".join(f", {part} {count:.0f}" for part, count in found.parts.items())
    yield f"    shared memory: {shared}{parts}; barrier round trips {found.barriers:.1f} per warp"
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
    binds, ceiling, in_turn = found.ceilings(GPUS[gpu])
    share = 100 * ceiling * 1e12 / (GPUS[gpu].peak * GPUS[gpu].faster(found.cost.bits))
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
    if row.get("kind") != "row" or row["state"] != "ok":
        return False
    case, shape = CASES[found.case], row["shape"]
    asked = tuple(shape[name] for name in ("head_dim", "head_dim_v", "causal"))
    return asked == (*case.dims, case.rules == "causal") and bool(shape.get("backward")) == case.backward


def _same_kernel(found: Row, name: str, timed: dict[str, Any]) -> bool:
    if found.kernel.startswith(flash_attn_4.NAME):
        return name == flash_attn_4.NAME and not found.kernel.endswith(ALONE)
    return timed.get("kernel") == found.kernel


def write(rows: Iterable[Row | NotYet], path: Path = JSON) -> None:
    """Put rows into the file and its Markdown; of the same case, target and owner, those there go."""
    fresh = list(rows)
    done = {(row.case, row.target, whose(row.kernel)) for row in fresh}
    kept = [
        row for row in (read(path) if path.exists() else [])
        if (row.case, row.target, whose(row.kernel)) not in done
    ]
    targets, cases = list(dict.fromkeys(gpu.device.target for gpu in GPUS.values())), list(CASES)

    def place(row: Row | NotYet) -> tuple[int, int, int]:
        return targets.index(row.target), cases.index(row.case), OWNERS.index(whose(row.kernel))

    ordered = sorted([*kept, *fresh], key=place)
    told = [json.dumps(asdict(row), ensure_ascii=False) for row in ordered]
    write_whole(path, '{"rows": [\n' + ",\n".join(told) + "\n]}\n")
    write_whole(path.with_suffix(".md"), markdown(read(path)))
    for argument in arguments.ARGUMENTS if path == JSON else ():
        write_whole(argument.path, argument.told(argument.path.read_text(), read(path)))


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
        here = [row for row in rows if row.target == target and not CASES[row.case].backward]
        text += ["", f"## {gpu} ({target})", "", f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
        text += [_line(row, gpu) for row in here if isinstance(row, Row)]
        absent = [f"* {row.case}, {row.kernel}: {row.reason}" for row in here if isinstance(row, NotYet)]
        text += ["", *absent] if absent else []
    text += ["", *_in_fp8(rows), "", *_beside_published(rows)]
    for argument in arguments.ARGUMENTS:
        text += ["", *_beside_peer(rows, argument)]
    text += ["", "## Counts per CTA and KV tile, of gradients per query tile", ""]
    text += _counts(row for row in rows if isinstance(row, Row))
    return "\n".join(text) + "\n"


def _line(row: Row, gpu: str) -> str:
    clocks = (f"{count:.0f}" for count in row.cost.cycles(GPUS[gpu]).values())
    cells = [row.case, row.kernel, "×".join(map(str, row.tile)), *clocks, *_verdict(row, gpu)]
    return f"| {' | '.join(cells)} |"


def _in_fp8(rows: list[Row | NotYet]) -> Iterator[str]:
    """Ours beside FlashAttention-3's tiles and flash-attn-4's kernels."""
    yield from (
        "## FP8", "",
        "Clocks per 128 × 128 scores; of peak: of FP8's, twice that of bf16, of NVFP4's with Q K's at four",
        "times. mxfp8: both products; nvfp4: Q K, and P V in FP8. FlashAttention-3's line is",
        "arithmetic on its published tiles (`profiling/fp8.py`); fma, alu and issue are then what no such",
        "kernel does without. alu and issue are with the warps that transpose V on Hopper. Conversions to 8",
        "bits have the rate of others, but on GB300, where somebody measured it (`profiling/rates.py`).", "",
    )  # fmt: skip
    yield from head(["GPU", *TITLES[:-1]])
    more = []
    for gpu, name in product(FP8_GPUS, (*FP8, *SCALED, *FP8_BACKWARD)):
        here = [row for row in of(rows, name, gpu) if isinstance(row, Row)]
        yield from (_fp8_line(gpu, row.case, row.kernel, row.tile, row.cost) for row in here)
        more += [
            f"{_told_beyond_peer(*both, found, gpu)[:-1]}, on {gpu}."
            for both in pairs(here) if (found := beyond_peer(*both, gpu))
        ]
        if gpu == PUBLISHED_FP8_GPU and name in FP8 and CASES[name].block is None:
            yield _fp8_line(gpu, name, FLASH_ATTENTION_3, *fp8.flash_attention_3(CASES[name].dims))
            more += [line for row in here if (line := _told_beyond_published(row))]
    yield from ("", *more)


FLASH_ATTENTION_3 = "FlashAttention-3's tiles"
CODE = ("fma", "alu", "issue")  # units of which machine code tells


def _fp8_line(name: str, case: str, kernel: str, tile: tuple[int, int], cost: Cost) -> str:
    gpu, times = GPUS[name], WORK / math.prod(tile)
    clocks = [f"{times * count:.0f}" if count else "–" for count in cost.cycles(gpu).values()]
    binds, ceiling, in_turn = cost.ceilings(gpu)
    share = f"{100 * ceiling * 1e12 / (gpu.peak * gpu.faster(cost.bits)):.0f} %"
    cells = [name, case, kernel, "×".join(map(str, tile)), *clocks, binds, f"{ceiling:.0f}", share]
    return f"| {' | '.join([*cells, f'{in_turn:.0f}'])} |"


def beyond_published(row: Row) -> dict[str, float]:
    """Of what a kernel of ours asks more than FlashAttention-3's tiles, and how many times as much."""
    tile, cost = fp8.flash_attention_3(CASES[row.case].dims)
    ours, theirs = (
        {unit: count / math.prod(shape) for unit, count in each.cycles(GPUS[PUBLISHED_FP8_GPU]).items()}
        for each, shape in ((row.cost, row.tile), (cost, tile))
    )
    return {unit: ours[unit] / n for unit, n in theirs.items() if n and ours[unit] > 1.005 * n}


def _told_beyond_published(row: Row) -> str:
    """What a kernel of ours asks more of than FlashAttention-3's tiles, and what binds it, each with why."""
    tile, _ = fp8.flash_attention_3(CASES[row.case].dims)
    clocks = row.cost.cycles(GPUS[PUBLISHED_FP8_GPU])
    binds, more = max(clocks, key=clocks.__getitem__), beyond_published(row)
    kinds = [unit for unit in more if unit in CODE], [unit for unit in more if unit not in CODE]
    in_code, by_tile = (", ".join(f"{unit} {more[unit]:.2f} ×" for unit in units) for units in kinds)
    told = []
    if by_tile:
        shapes = ["{} × {}".format(*shape) for shape in (row.tile, tile)]
        told.append(
            f"{by_tile}: tiles of {shapes[0]}, not {shapes[1]}, for registers hold the part that O takes "
            "over, too"
        )
    if in_code:
        told.append(
            f"{in_code} of what no kernel of these tiles does without: P is read back as it was rounded, to "
            "be summed, and loops, descriptors and waits count"
        )
    if binds == "issue":
        share = row.transposing / row.cost.issue
        told.append(
            f"issue binds with {per_work(row) * clocks[binds]:.0f} clocks, {share:.0%} of them for the warps "
            "that transpose V"
        )
    return f"* {row.case}, {row.kernel}, of FlashAttention-3's tiles: {'; '.join(told)}." if told else ""


GRADIENTS = [*TITLES[:9], "sums", "added", "B/kFLOP", *TITLES[9:]]


def _beside_published(rows: list[Row | NotYet]) -> Iterator[str]:
    """The main kernels of gradients, beside what FlashAttention-2's tiles ask for."""
    yield from (
        f"## Gradients on {PUBLISHED_GPU}", "",
        "Main kernels, clocks per 128 × 128 scores. added: KiB of dQ that go to global memory as fp32 sums,",
        "and bytes of it per 1000 FLOP; sums: clocks for it, where a rate is known. A kernel's padding takes",
        "clocks and is no FLOP. FlashAttention-2's line is arithmetic on its published tiles",
        "(`profiling/gradients.py`): each warp reads its rows and columns of every product's operands,",
        "without bank conflicts; – is what only machine code tells.", "",
    )  # fmt: skip
    yield from head(GRADIENTS)
    absent, more = [], []
    for name in BACKWARD:
        here = of(rows, name, PUBLISHED_GPU)
        yield from (_gradient_line(row, PUBLISHED_GPU) for row in here if isinstance(row, Row))
        yield _published_line(name)
        absent += _absent(here)
        more += [_beyond(row) for row in here if isinstance(row, Row) and row.config and asks_more(row)]
    yield from ("", *absent, *more)


def _beside_peer(rows: list[Row | NotYet], argument: arguments.Argument) -> Iterator[str]:
    """The main kernels of gradients, beside flash-attn-4's."""
    gpu = argument.gpu
    yield from (
        f"## Gradients on {gpu}", "",
        "As above, beside flash-attn-4's kernels for the same architecture;",
        f"`profiling/{argument.path.name}` argues from it. sums: at the rate that somebody measured",
        "on such a GPU (`profiling/rates.py`), where somebody did.", "",
    )  # fmt: skip
    here = [row for name in (*BACKWARD, *CAUSAL_BACKWARD) for row in of(rows, name, gpu)]
    yield from head(GRADIENTS)
    yield from (_gradient_line(row, gpu) for row in here if isinstance(row, Row))
    yield from ("", "Who takes shared memory's clocks. Shuffles, a clock each, are counted in no unit:", "")
    yield from head(["case", "kernel", *PARTS, "shuffles"])
    yield from (_parts_line(row) for row in here if isinstance(row, Row))
    yield from ("", *_absent(here))
    for row, peer in pairs(here):
        if more := beyond_peer(row, peer, gpu):
            yield _told_beyond_peer(row, peer, more, gpu)


def _absent(rows: Iterable[Row | NotYet]) -> list[str]:
    return [f"* {row.case}, {row.kernel}: {row.reason}" for row in rows if isinstance(row, NotYet)]


def _gradient_line(row: Row, name: str) -> str:
    gpu, times = GPUS[name], per_work(row)
    clocks = {unit: f"{times * count:.0f}" for unit, count in row.cost.cycles(gpu).items()}
    shown = (clocks.get(unit, "–") for unit in GRADIENTS[3:10])
    cells = [row.case, row.kernel, "×".join(map(str, row.tile)), *shown]
    cells += [f"{times * row.cost.reduced / 1024:.0f}", added_per_kflop(row), *_verdict(row, name)]
    return f"| {' | '.join(cells)} |"


def _published_line(name: str) -> str:
    gpu, (tiles, asked) = GPUS[PUBLISHED_GPU], gradients.flash_attention_2(CASES[name].dims)
    cost = Cost(asked.flops, True, asked.mufu, 0.0, 0.0, 0.0, asked.shared)
    clocks = cost.cycles(gpu)
    shown = [f"{clocks[unit]:.0f}" if clocks[unit] else "–" for unit in clocks]
    cells = [name, "FlashAttention-2's tiles", f"{tiles.tile_m}×{tiles.tile_n}", *shown, "–"]
    binds, ceiling, in_turn = cost.ceilings(gpu)
    share = f"{100 * ceiling * 1e12 / gpu.peak:.0f} %"
    cells += [f"{asked.reduced / 1024:.0f}", f"{1000 * asked.reduced / asked.flops:.2f}"]
    return f"| {' | '.join([*cells, binds, f'{ceiling:.0f}', share, f'{in_turn:.0f}', '–'])} |"


def _parts_line(row: Row) -> str:
    shuffles = sum(counts.get("shuffle", 0.0) for counts in row.roles.values())
    clocks = [per_work(row) * count for count in (*(row.parts[part] for part in PARTS), shuffles)]
    return f"| {' | '.join([row.case, row.kernel, *(f'{count:.0f}' for count in clocks)])} |"


def beyond_peer(row: Row, peer: Row, gpu: str) -> dict[str, float]:
    """Of what a kernel of ours asks more than the peer's per score, and how many times as much."""
    ours, theirs = (
        {unit: per_work(r) * count for unit, count in r.cost.cycles(GPUS[gpu]).items()} for r in (row, peer)
    )
    times = {unit: ours[unit] / theirs[unit] for unit in ours}
    return {unit: ratio for unit, ratio in times.items() if ratio > 1.005}


def _told_beyond_peer(row: Row, peer: Row, more: dict[str, float], gpu: str) -> str:
    """What a kernel of ours asks more of than the peer's, and why it does or does not matter."""
    clocks = row.cost.cycles(GPUS[gpu])
    binds = max(clocks, key=clocks.__getitem__)
    told = []
    for unit, ratio in more.items():
        if unit == "matrix":
            padded = row.cost.flops / flops_of(CASES[row.case], row.tile)
            why = f"{padded:.2f} × of the algorithm's, for padding"
        elif unit == "shared":
            why = ", ".join(_parts_beyond(row, peer))
            why += ", as CTAs work alone" * (row.cost.bits < 16)  # theirs are pairs, which share K and V
        elif unit == "mufu" and row.cost.bits < 16:
            moved = (f"{_polynomials(each):.0f}" for each in (row, peer))
            why = "{} of 32 exponentials are polynomials, not {}".format(*moved)
        else:
            why = f"{clocks[unit] / clocks[binds]:.0%} of what {binds} takes"
        told.append(f"{unit} {ratio:.2f} ×{' (binds)' * (unit == binds)}: {why}")
    shapes = ["{} × {}".format(*r.tile) for r in (row, peer)]
    tiles = f"tiles of {shapes[0]}" + (f", not {shapes[1]}" if shapes[0] != shapes[1] else ", as theirs")
    return f"* {row.case}, {row.kernel}, of {peer.kernel}'s ({tiles}): {'; '.join(told)}."


def _polynomials(row: Row) -> float:
    """Of 32 exponentials those that the exponential unit does not compute. It has one more for each row."""
    rows, keys = row.tile
    return 32 * (1 - (row.cost.mufu - rows) / (rows * keys))


def _parts_beyond(row: Row, peer: Row) -> Iterator[str]:
    """Parts of shared memory's clocks that are more than the peer's per score, where they matter."""
    for part in PARTS:
        ours, theirs = (per_work(r) * r.parts[part] for r in (row, peer))
        if ours - theirs > 0.005 * per_work(peer) * peer.wavefronts:
            yield f"{part} {ours:.0f} for {theirs:.0f}"


def asks_more(row: Row) -> dict[str, float]:
    """Of what a kernel of ours asks more than FlashAttention-2's tiles do, and how many times as much."""
    cost, times = row.cost, per_work(row)
    asked = (times * number for number in (cost.flops, cost.mufu, cost.shared, cost.reduced))
    return Asked(*asked).beyond(gradients.flash_attention_2(CASES[row.case].dims)[1])


def _beyond(row: Row) -> str:
    """What a kernel of ours asks more of than FlashAttention-2's tiles, and what differs."""
    case = CASES[row.case]
    (answer,) = case.with_products(GPUS[PUBLISHED_GPU].device)
    theirs, _ = gradients.flash_attention_2(case.dims)
    why = gradients.differences(gradients.tiles_of(answer.config, case.dims), theirs)
    told = ", ".join(f"{UNITS[name]} {ratio:.2f} ×" for name, ratio in asks_more(row).items())
    of = f"of what FlashAttention-2's tiles ask for ({why or 'the tiles are the same'})"
    return f"* {row.case}, {row.kernel}: {told} {of}."


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
    print("Bounds, not timings: see --help. Inputs are random normal; bf16, or FP8 where a case says so.")
    rows: list[Row | NotYet] = []
    for found in cycles.survey(chosen.case, chosen.gpu, not chosen.no_peer):
        rows.append(found)
        print("\n".join(lines(found, chosen.gpu)), flush=True)
    if chosen.write:
        write(rows)
    return 1 if any(isinstance(row, NotYet) and not whose(row.kernel) for row in rows) else 0

"""Registers, spills, shared memory, occupancy and hot loop of every kernel that ships, from its machine code.

    python -m profiling static                              every case and architecture, flash-attn-4 beside
    python -m profiling static --arch sm80 --case d64 d128
    python -m profiling static --golden                     write tests/golden/static.json anew

No GPU is needed. The hot loop is the steady loop over K and V without masking; its counts are instructions
of one warp and one iteration. "per mma" is all of them over the matrix instructions: what is issued to feed
the tensor cores, comparable where those have one shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import cute_flash
from cute_flash import cache, executable
from cute_flash.dispatch import EMULATED, Answer

from . import flash_attn_4, rates, sass

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "static.json"
TOLERANCE = 0.03  # of registers and of a loop's counts; the rest of the golden file is exact


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for. causal: the causal mask. everything: every feature at once."""

    name: str
    dims: tuple[int, int]
    causal: bool = False
    everything: bool = False

    def problem(self, arch: str) -> Answer:
        """The kernel and the config that serve it on an architecture, in bf16 with the log-sum-exp."""
        given: dict[str, Any] = {"lse": True}
        if self.everything:
            ids = torch.zeros(1, 8, dtype=torch.int32)
            features = ("varlen", "seqused_q", "seqused_k", "gqa", "dropout", "sink")
            given |= dict.fromkeys(features, True) | {
                "mask": [cute_flash.Document(ids), cute_flash.Causal()],
                "score": [cute_flash.Softcap(30.0), cute_flash.ALiBi(torch.ones(2))],
            }
        elif self.causal:
            given["mask"] = cute_flash.Causal()
        return cute_flash.supports("bfloat16", *self.dims, device=arch, **given)

    def peer(self) -> flash_attn_4.Case:
        """The same problem in the peer's words. Raises Missing where it is not asked for it."""
        if self.everything or self.dims[0] != self.dims[1]:
            raise flash_attn_4.Missing("not asked for this problem")
        shape = {"heads": 1, "heads_kv": 1, "dim": self.dims[0], "causal": self.causal}
        return flash_attn_4.Case(self.name, (1024,), (1024,), **shape)


def _cases() -> Iterator[Case]:
    """Head dims of every row of the tuning tables; each plain, causal, and with everything."""
    squares = (32, 64, 96, 128, 160, 192, 224, 256)
    for dims in (*((dim, dim) for dim in squares), (192, 128)):
        name = f"d{dims[0]}" if dims[0] == dims[1] else f"d{dims[0]}_{dims[1]}"
        yield Case(name, dims)
        yield Case(f"{name}_causal", dims, causal=True)
        yield Case(f"{name}_everything", dims, everything=True)


CASES = {case.name: case for case in _cases()}

# Kernels that the golden file follows: (architecture, case).
FOLLOWED = (
    ("sm80", "d64"), ("sm80", "d64_causal"), ("sm80", "d128"), ("sm80", "d128_causal"), ("sm80", "d256"),
    ("sm86", "d128"),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Which kernel it is. config: of a kernel of ours, "" for the peer's."""

    arch: str
    case: str
    kernel: str
    config: str


@dataclass(frozen=True)
class Figures(Source):
    """What machine code tells of one kernel.

    registers: per thread. stack, local: bytes per thread; both are spills or indexed arrays. shared_memory:
    bytes per CTA, of which the system's own are not counted. ctas: that one SM holds; bound: what sets it.
    loops: instructions by class of each hot loop, the one with the matrix instructions first.
    """

    threads: int
    registers: int
    stack: int
    local: int
    shared_memory: int
    ctas: int
    bound: str
    loops: tuple[dict[str, int], ...]


def figures(case: Case, arch: str) -> Figures:
    """Ours. Raises NotImplementedError with the reasons where no kernel serves the case."""
    answer = case.problem(arch)
    if not answer:
        raise NotImplementedError(str(answer))
    built = executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    source = Source(arch, case.name, answer.kernel.name, in_words(answer.config))
    return read(source, built.cubin, answer.config.threads, answer.config.shared_memory(answer.problem))


def in_words(config: Any) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def unreached(arch: str) -> list[str]:
    """Configs that some head dim gets on an architecture and none of CASES: a case is missing."""
    told: dict[str, str] = {}
    for dim in range(256, 0, -8):
        for causal, everything in ((False, False), (True, False), (False, True)):
            case = Case(f"head dim {dim}", (dim, dim), causal, everything)
            if answer := case.problem(arch):
                told[f"{answer.kernel.name} {in_words(answer.config)}"] = case.name
    for case in CASES.values():
        if answer := case.problem(arch):
            told.pop(f"{answer.kernel.name} {in_words(answer.config)}", None)
    return [f"{arch}: {config}, from {name}" for config, name in told.items()]


def peer_figures(case: Case, arch: str) -> Figures:
    """The peer's, on the same architecture. Raises flash_attn_4.Missing."""
    peer = flash_attn_4.compiled(case.peer(), EMULATED[arch].target)
    source = Source(arch, case.name, f"{flash_attn_4.NAME} {flash_attn_4.version()}", "")
    return read(source, peer.cubin, peer.shape.threads, peer.shape.shared_memory)


def read(source: Source, cubin: bytes, threads: int, dynamic: int) -> Figures:
    """The figures of a kernel that is launched with so many threads and bytes of dynamic shared memory."""
    used = sass.resources(cubin)
    capability = EMULATED[source.arch].capability
    static = used.shared - (rates.RESERVED_SHARED if capability >= (9, 0) else 0)
    occupancy = rates.occupancy(capability, threads, used.registers, dynamic + static)
    return Figures(
        **asdict(source),
        threads=threads,
        registers=used.registers,
        stack=used.stack,
        local=used.local,
        shared_memory=dynamic + static,
        ctas=occupancy.ctas,
        bound=occupancy.bound,
        loops=tuple({name: loop.counts[name] for name in sass.CLASSES} for loop in sass.hot_loops(cubin)),
    )


def moves(was: dict[str, Any], now: Figures) -> list[str]:
    """What is no longer as the golden file says: counts beyond TOLERANCE, anything else at all."""
    found = []
    have = json.loads(json.dumps(asdict(now)))
    for name, value in have.items():
        if name == "registers":
            moved = abs(value - was[name]) > TOLERANCE * was[name]
        else:
            moved = name != "loops" and value != was[name]
        if moved:
            found.append(f"{name} was {was[name]}, is {value}")
    if len(was["loops"]) != len(have["loops"]):
        found.append(f"there were {len(was['loops'])} hot loops, there are {len(have['loops'])}")
    for i, (old, new) in enumerate(zip(was["loops"], have["loops"], strict=False)):
        for name in sorted({*old, *new}):
            before, after = old.get(name, 0), new.get(name, 0)
            exact = name == "local"
            if abs(after - before) > (0 if exact else TOLERANCE * before):
                found.append(f"loop {i}: {name} instructions were {before}, are {after}")
    return found


def golden() -> dict[str, Any]:
    """The golden file's contents, made anew."""
    rows = {f"{arch}/{case}": asdict(figures(CASES[case], arch)) for arch, case in FOLLOWED}
    return {"versions": cache.versions(), "rows": rows}


# Columns of the table: heading -> width, negative where text is flush left.
_LEFT = {
    "arch": 5, "case": -16, "kernel": -21, "regs": 4, "stack": 5, "local": 5, "smem": 6, "threads": 7,
    "CTAs/SM": 7, "by": -13,
}  # fmt: skip
_SHOWN = [name for name in sass.CLASSES if name != "global"]
_LOOP = {name: max(4, len(name)) for name in (*_SHOWN, "all", "per mma")}


def _cells(values: Iterable[Any], widths: dict[str, int]) -> str:
    padded = (
        f"{value!s:<{-width}}" if width < 0 else f"{value!s:>{width}}"
        for value, width in zip(values, widths.values(), strict=True)
    )
    return " ".join(padded)


def table(rows: Iterable[Figures | str]) -> Iterator[str]:
    """Lines to print, one per hot loop of a kernel; a string among the rows is printed as it is."""
    yield f"{_cells(_LEFT, _LEFT)} | {_cells(_LOOP, _LOOP)}  config"
    for row in rows:
        if isinstance(row, str):
            yield row
            continue
        left: list[Any] = [row.arch, row.case, row.kernel, row.registers, row.stack, row.local]
        left += [row.shared_memory, row.threads, row.ctas, row.bound]
        for i, counts in enumerate(row.loops):
            total = sum(counts.values())
            ratio = f"{total / counts['mma']:.2f}" if counts["mma"] else "-"
            right = [*(counts[name] for name in _SHOWN), total, ratio]
            shown = left if i == 0 else [""] * len(left)
            yield f"{_cells(shown, _LEFT)} | {_cells(right, _LOOP)}  {row.config}"


def survey(arches: Iterable[str], cases: Iterable[str], peer: bool) -> Iterator[Figures | str]:
    """Ours and the peer's for every case; a string says what is not there, and why."""
    for arch, name in itertools.product(arches, cases):
        case = CASES[name]
        try:
            yield figures(case, arch)
            if peer and not case.everything:
                yield peer_figures(case, arch)
        except NotImplementedError as error:
            yield f"{arch:>5} {name:<17} not served: {error}"
        except flash_attn_4.Missing as error:
            yield f"{arch:>5} {name:<17} {flash_attn_4.NAME}: missing, {error}"


def main(arguments: list[str]) -> int:
    """Print the table; 0 where no kernel of ours uses stack or local memory."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling static", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=EMULATED, default=list(EMULATED), metavar="ARCH")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--golden", action="store_true", help="write tests/golden/static.json, print nothing")
    chosen = parser.parse_args(arguments)
    try:
        sass.tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    if chosen.golden:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
        print(f"{GOLDEN} written")
        return 0
    rows: list[Figures] = []

    def kept() -> Iterator[Figures | str]:
        for row in survey(chosen.arch, chosen.case, not chosen.no_peer):
            if isinstance(row, Figures):
                rows.append(row)
            yield row

    for text in table(kept()):
        print(text, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    ours = [row for row in rows if row.config]
    spilling = [f"{row.arch} {row.case}" for row in ours if row.stack or row.local]
    configs = {(row.arch, row.config) for row in ours}
    print(f"{len(ours)} kernels of ours, {len(configs)} configs; with stack or local memory: {len(spilling)}")
    print("".join(f"  {name}\n" for name in spilling), end="")
    return 1 if spilling else 0

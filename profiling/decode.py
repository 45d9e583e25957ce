"""Decoding from a cache: what a key costs every unit of an SM, beside the time that memory takes to bring it.

    python -m profiling decode            every GPU and head dim, for 1, 8 and 16 queries
    python -m profiling decode --write    keep the table in results/decode.md

As `cycles` counts them: bounds, no timings. A KV head's tiles of keys are read from memory once, whatever
the queries; where several CTAs have rows of it, each reads them from L2, and a pair of CTAs latent rows once
more as V. Two conditions make memory bind: no unit of the CTAs takes longer for a tile of keys than memory
does, and as many bytes are under way as arrive while one is waited for (Little's law). cuDNN's rows are its
published times beside those that memory takes.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import cute_flash
from cute_flash import executable
from cute_flash.arch.packing import count_tiles
from cute_flash.arch.problem import KvCache, Operands, Problem, Sizes
from cute_flash.arch.sm100.latent.config import Config as BlackwellLatent
from cute_flash.arch.sm100.latent.config import k_parts
from cute_flash.dispatch import Answer, dispatch
from cute_flash.latent import serves

from . import cycles, rates
from .static import Case, figures
from .timing import constants
from .watch import Watch

RESULTS = Path(__file__).parent / "results"
TABLE, PUBLISHED = RESULTS / "decode.md", RESULTS / "published_decode.csv"
GPUS = ("A100", "H200", "B200")
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512))
QUERIES = (1, 8, 16)
GROUP, KEYS, BATCH = 8, 8192, 32  # query heads of a KV head; keys of a sequence; sequences
LATENT_HEADS = 128


@dataclass(frozen=True)
class Row:
    """One decoding call on one GPU.

    keys: of a tile. tiles: CTAs that read a KV head's keys. clocks: of each unit for one tile of keys, in all
    these CTAs. memory: clocks of an SM in which its share of the memory's rate brings the tile. under_way:
    bytes that an SM has asked for and not read: all stages but the K, or the part of it, that is being read.
    needed: bytes that arrive in an SM while one is waited for.
    """

    gpu: str
    dims: tuple[int, int]
    queries: int
    kernel: str
    keys: int
    tiles: int
    clocks: dict[str, float]
    memory: float
    under_way: int
    needed: float

    @property
    def binds(self) -> str:
        """The unit that takes longest, or memory."""
        every = self.clocks | {"memory": self.memory}
        return max(every, key=lambda unit: every[unit])

    @property
    def share(self) -> float:
        """Of the memory's rate, by these bounds."""
        return min(1.0, self.memory / max(self.clocks.values()))


def answer_for(dims: tuple[int, int], gpu: str, queries: int) -> tuple[Answer, Sizes]:
    """The kernel and config of a call, and its sizes. The heads of a single latent query are rows."""
    latent, device = serves(*dims), rates.GPUS[gpu].device
    rows = LATENT_HEADS if latent else queries
    heads = 1 if latent else GROUP
    asked = Problem("bfloat16", *dims, seqused_k=True, gqa=heads > 1, cache=KvCache(latent=latent))
    sizes = Sizes(BATCH, heads, 1, rows, KEYS)
    kernel, _ = dispatch(asked, device)
    return Answer(asked, device, kernel, kernel.config(asked, device, sizes)), sizes


@functools.cache
def tile_of(answer: Answer, gpu: str) -> cycles.Tile:
    """What a tile of keys costs one CTA, from the emulator and the machine code."""
    problem, config = answer.problem, answer.config
    dim, dim_v = problem.head_dim, problem.head_dim_v
    run = executable.executable(answer.kernel, problem, config, answer.device, "emulator")
    heads = config.heads if problem.gqa else 1

    def watched(rows: int, keys: int) -> Watch:
        generator, watch = torch.Generator().manual_seed(0), Watch()
        shape = (rows // heads, heads)
        shapes = ((*shape, dim), (keys, 1, dim), (keys, 1, dim_v), (*shape, dim_v))
        q, k, v, out = (torch.randn(1, *each, generator=generator).bfloat16() for each in shapes)
        given = {"q": q, "k": k, "v": k[..., :dim_v] if problem.cache.latent else v, "out": out}
        given |= {"lse": torch.empty(1, *shape[::-1]), "seqused_k": torch.tensor([keys], dtype=torch.int32)}
        given |= {"softmax_scale": dim**-0.5, "multiprocessors": answer.device.multiprocessors}
        with cute_flash.emulated(rates.GPUS[gpu].arch, observers=(watch,)):
            run(*Operands(**dict.fromkeys(Operands._fields) | given))
        return watch

    case = Case("decode", (dim, dim_v))
    shape, steady = cycles.steady_of(case, (config.tile_m, config.tile_n), watched)
    cubin = executable.artifact(answer.kernel, problem, config, answer.device).cubin
    return cycles.tile(answer.kernel.name, shape, case, steady, cycles.loops_of(cubin))


def row(dims: tuple[int, int], gpu: str, queries: int) -> Row:
    """One row of the table."""
    answer, sizes = answer_for(dims, gpu, queries)
    chip, known, config = rates.GPUS[gpu], constants.of(gpu), answer.config
    pair = getattr(config, "ctas", 1)
    tiles = pair * count_tiles(config.tile_m, config.heads, sizes._replace(batch=1))
    cost = tile_of(answer, gpu).cost.cycles(chip)
    # Bytes of memory in a clock of one SM.
    rate = known.hbm_rate * 1e9 / (chip.sms * chip.clock)
    columns = dims[0] if answer.problem.cache.latent else sum(dims)
    names = ("stages", "k_stages", "v_stages")
    stages = min(getattr(config, name) for name in names if hasattr(config, name))
    read = 1 / parts_of(answer) if answer.problem.cache.latent else 0.5
    of_a_tile = 2 * config.tile_n * columns
    ctas = figures(Case("decode", dims), answer, chip.arch).ctas
    return Row(
        gpu=gpu,
        dims=dims,
        queries=queries,
        kernel=answer.kernel.name,
        keys=config.tile_n,
        tiles=tiles,
        clocks={unit: tiles * clocks for unit, clocks in cost.items()},
        memory=of_a_tile / rate,
        under_way=int(ctas * (stages - read) * of_a_tile / pair),
        needed=rate * known.dram_latency,
    )


def parts_of(answer: Answer) -> int:
    """Of a tile of K, whose places are filled anew one by one."""
    return k_parts(answer.problem) if isinstance(answer.config, BlackwellLatent) else 1


def rows() -> Iterator[Row]:
    """Every row, in the table's order."""
    for gpu in GPUS:
        for dims in DIMS:
            for queries in (1,) if serves(*dims) else QUERIES:
                yield row(dims, gpu, queries)


UNITS = ("matrix", "mufu", "fma", "alu", "issue", "shared", "memory")
HEAD = (
    "GPU", "head dims", "queries", "kernel", "CTAs a KV head", "keys a tile", *UNITS, "binds",
    "of the memory's rate", "KiB under way", "KiB needed",
)  # fmt: skip


def line(found: Row) -> str:
    """A row of the table in Markdown."""
    every = found.clocks | {"memory": found.memory}
    dims = "/".join(map(str, dict.fromkeys(found.dims)))
    cells = [found.gpu, dims, found.queries, found.kernel, found.tiles, found.keys]
    cells += [*(round(every[unit]) for unit in UNITS), found.binds, f"{100 * found.share:.0f} %"]
    cells += [round(found.under_way / 1024), round(found.needed / 1024)]
    return f"| {' | '.join(map(str, cells))} |"


def published() -> Iterator[str]:
    """cuDNN's times beside those in which memory brings the bytes, at the rate that copies reach: with many
    bytes cuDNN reads a little faster.
    """
    yield "| GPU | batch | queries | keys | MiB | memory, us | cuDNN, us | memory's share |"
    yield f"|{' --- |' * 8}"
    with open(PUBLISHED, newline="") as file:
        for told in csv.DictReader(file):
            batch, queries, keys = (int(told[name]) for name in ("batch", "seqlen_q", "seqlen_kv"))
            heads, heads_kv, dim = (int(told[name]) for name in ("heads_q", "heads_kv", "head_dim"))
            nbytes = 4 * batch * dim * (heads_kv * keys + heads * queries)
            least, took = nbytes / constants.of(told["gpu"]).hbm_rate / 1e3, float(told["us"])
            cells = told["gpu"], batch, queries, keys, round(nbytes / 2**20), f"{least:.1f}", told["us"]
            yield f"| {' | '.join(map(str, cells))} | {100 * least / took:.0f} % |"


def text(lines: Iterator[str]) -> str:
    """The whole table in Markdown."""
    told = [
        "# Decoding", "",
        "Clocks of an SM for a tile of keys, in all CTAs that read it, and of memory for its bytes, as",
        f"`python -m profiling decode --write` has them. {GROUP} query heads share a KV head; with rows of",
        f"576, of which 512 are V, {LATENT_HEADS} do.", "",
        f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}", *lines, "",
        "cuDNN's published times of 64 heads, 8 of keys, head dim 128:", "", *published(),
    ]  # fmt: skip
    return "\n".join(told) + "\n"


def main(arguments: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="keep the table in profiling/results")
    chosen, lines = parser.parse_args(arguments), []
    for found in rows():
        lines.append(line(found))
        print(lines[-1], file=sys.stderr, flush=True)
    whole = text(iter(lines))
    print(whole)
    if chosen.write:
        TABLE.write_text(whole)
    return 0

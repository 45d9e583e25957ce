"""What the model said of each kernel, kept in results/timing.json and told in results/timing.md.

A row has the samples that a prediction is made of, so that it can be made again for any sizes, and the
kernel's shape. A test runs one kernel anew and holds the files to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import record
from . import constants, predict
from .grid import Shape
from .predict import Samples
from .subjects import Subject

JSON = record.RESULTS / "timing.json"
LENGTHS = (1024, 4096, 16384)
TOKENS, WIDTH = 16384, 2048  # of a batch, where sequences are not longer; heads times head dim


@dataclass(frozen=True)
class Kept:
    """A kernel on a GPU, as predict.clocks wants one, and its samples. roles: lines of its breakdown."""

    gpu: str
    dim: int
    kernel: str
    rows: int
    keys: int
    packed: int
    cluster: int
    ctas: int
    persistent: bool
    causal: bool
    backward: bool
    samples: dict[str, Any]
    roles: list[str]

    @classmethod
    def of(cls, gpu: str, dim: int, subject: Subject, samples: Samples, roles: list[str]) -> Kept:
        """From a kernel that was run."""
        names = ("rows", "keys", "packed", "cluster", "ctas", "persistent", "causal", "backward")
        shape = {name: getattr(subject, name) for name in names}
        return cls(gpu, dim, subject.name, **shape, samples=asdict(samples), roles=roles)

    @property
    def key(self) -> tuple:
        """What tells rows apart."""
        return self.gpu, self.dim, self.backward, self.causal, self.kernel.partition(" ")[0]

    @property
    def found(self) -> Samples:
        """The samples; JSON has texts for keys."""
        return Samples(**{
            name: {int(tiles): clocks for tiles, clocks in told.items()} if isinstance(told, dict) else told
            for name, told in self.samples.items()
        })  # fmt: skip

    def tflops(self, length: int) -> float:
        """Of the sweep's problem with this length, at the GPU's clock."""
        shape = problem(self.dim, self.causal, length)
        clocks = predict.clocks(self, self.found, shape, self.gpu)
        flops = shape.flops * (2.5 if self.backward else 1)
        return flops / clocks * constants.of(self.gpu).clock / 1e6

    @property
    def steady(self) -> float:
        """Clocks of a further tile."""
        first = self.found.first
        *_, a, b = sorted(first)
        return (first[b] - first[a]) / (b - a)

    @property
    def part(self) -> float:
        """Of the tensor cores' rate, in the steady loop."""
        flops = (10 if self.backward else 4) * self.rows * self.keys * self.dim * self.ctas
        per_cta = 1 if self.backward else self.cluster
        return flops / per_cta / self.steady / constants.of(self.gpu).matrix_flops


def problem(dim: int, causal: bool, length: int) -> Shape:
    """Of the sweep."""
    heads = WIDTH // dim
    return Shape(max(1, TOKENS // length), length, length, heads, heads, (dim, dim), causal)


def read() -> list[Kept]:
    """What is kept; nothing where there is no file."""
    return [Kept(**row) for row in json.loads(JSON.read_text())["rows"]] if JSON.exists() else []


def write(rows: list[Kept]) -> None:
    """Both files, with these in the place of those of the same key."""
    new = {row.key for row in rows}
    every = sorted([row for row in read() if row.key not in new] + rows, key=lambda row: repr(row.key))
    record.write_whole(JSON, json.dumps({"rows": [asdict(row) for row in every]}, indent=1) + "\n")
    record.write_whole(JSON.with_suffix(".md"), "\n".join(markdown(every)) + "\n")


def markdown(rows: list[Kept]) -> Iterator[str]:
    """The tables."""
    yield "# What kernels take, by the timing model"
    yield ""
    yield "Predicted, not measured: `python -m profiling timing --write`. TFLOP/s at the clock that is named,"
    yield f"over {TOKENS} tokens, heads times head dim {WIDTH}; loop: the part of the tensor cores' rate in"
    yield "the steady loop. What the model's error is: `profiling/README.md`."
    for gpu in dict.fromkeys(row.gpu for row in rows):
        yield f"\n## {gpu}, {constants.of(gpu).clock:.0f} MHz\n"
        titles = ["kernel", "d", "pass", "mask", "tile", "clocks a tile", "loop", *map(str, LENGTHS)]
        yield f"| {' | '.join(titles)} |"
        yield "|---" * len(titles) + "|"
        for row in (row for row in rows if row.gpu == gpu):
            said = [f"{row.tflops(length):.0f}" for length in LENGTHS]
            kind, mask = "bwd" if row.backward else "fwd", "causal" if row.causal else "full"
            tile = f"{row.rows} x {row.keys}"
            loop = [f"{row.steady:.0f}", f"{100 * row.part:.0f} %"]
            cells = [row.kernel, str(row.dim), kind, mask, tile, *loop]
            yield f"| {' | '.join([*cells, *said])} |"

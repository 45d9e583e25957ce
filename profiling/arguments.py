"""Arguments in words from what `python -m profiling cycles` counts of gradients, with the tables in them.

Each is a file of its own. Its tables are written with the others, between marks. What else it rests on,
speeds of flash-attn-4's kernels that others measured, stands here; the text names the sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import flash_attn_4
from .cycles import ALONE, PARTS, NotYet, Row, flops_of
from .gradients import WORK
from .rates import GPUS
from .static import CASES


@dataclass(frozen=True)
class Argument:
    """gpu: whose units it is about. cases: in the order of the tables. reported: TFLOP/s of the peer's
    kernels there, by case, and whether its CTAs work alone where it has pairs."""

    path: Path
    gpu: str
    cases: tuple[str, ...]
    reported: dict[tuple[str, bool], float]

    def told(self, text: str, rows: list[Row | NotYet]) -> str:
        """The text with the tables of these rows between its marks."""
        found = [row for name in self.cases for row in of(rows, name, self.gpu) if isinstance(row, Row)]
        for mark, table in (("clocks", self._clocks(found)), ("expected", self._expected(found))):
            marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
            lines = "".join(f"{line}\n" for line in table)
            text = marks.sub(lambda found, lines=lines: found[1] + lines + found[2], text)
        return text

    def _clocks(self, found: list[Row]) -> Iterator[str]:
        """Clocks of the units that come near to binding, and who takes shared memory's."""
        units = ["matrix", "mufu", "issue", *["sums"] * bool(GPUS[self.gpu].sums), "shared"]
        loads = ["uniform"] * self._merges
        yield from head(["case", "kernel", "tile", *units, *PARTS, *loads, "B/kFLOP"])
        for row in found:
            clocks = row.cost.cycles(GPUS[self.gpu])
            told = [*(clocks[unit] for unit in units), *(row.parts[part] for part in PARTS)]
            told += [4 * row.uniform] * self._merges
            counts = [f"{per_work(row) * n:.0f}" for n in told]
            cells = [short(row), row.kernel, "×".join(map(str, row.tile)), *counts, added_per_kflop(row)]
            yield f"| {' | '.join(cells)} |"

    def _expected(self, found: list[Row]) -> Iterator[str]:
        """What of their ceilings the peer's kernels reach, as others measured it; ours at the same parts."""
        both = list(pairs(found))
        parts = [speed / self.ceiling(peer) for _, peer in both if (speed := self.measured(peer))]
        titles = ["case", "theirs", "ceiling", "measured", "part", "our kernel", "ceiling", "at such parts"]
        yield from head(titles)
        for row, peer in both:
            ceilings, measured = [self.ceiling(r) for r in (peer, row)], self.measured(peer)
            shown = [f"{measured:.0f}", f"{measured / ceilings[0]:.0%}"] if measured else ["–", "–"]
            likely = "–".join(f"{part(parts) * ceilings[1]:.0f}" for part in (min, max))
            likely = likely if row.kernel.startswith(GPUS[self.gpu].arch) else "–"
            cells = [short(row), peer.kernel, f"{ceilings[0]:.0f}", *shown, row.kernel]
            yield f"| {' | '.join([*cells, f'{ceilings[1]:.0f}', likely])} |"

    def measured(self, peer: Row) -> float | None:
        """TFLOP/s that others report of the peer's kernel."""
        return self.reported.get((peer.case, peer.kernel.endswith(ALONE)))

    def ceiling(self, row: Row) -> float:
        """TFLOP/s that the unit which binds allows."""
        gpu = GPUS[self.gpu]
        return row.ceilings(gpu, row.merged if self._merges else None)[1]

    @property
    def _merges(self) -> bool:
        """Whether uniform loads are told apart: where the measured speeds say that they are merged."""
        return self is BLACKWELL


HERE = Path(__file__).parent
HOPPER = Argument(
    HERE / "sm90_backward.md", "H200",
    ("d64_backward", "d128_backward", "d192_128_backward", "d256_backward"),
    {
        ("d128_backward", False): 656.0,
        ("d192_128_backward", False): 494.0,
        ("d256_backward", False): 373.0,
    },
)  # fmt: skip
BLACKWELL = Argument(
    HERE / "sm100_backward.md", "B200",
    (
        "d64_backward", "d64_causal_backward", "d128_backward", "d128_causal_backward", "d192_128_backward",
        "d256_backward",
    ),
    {
        ("d64_backward", False): 841.0,
        ("d64_causal_backward", False): 808.0,
        ("d128_backward", False): 1360.0,
        ("d128_backward", True): 1248.0,
        ("d128_causal_backward", False): 1209.0,
        ("d128_causal_backward", True): 1118.0,
        ("d192_128_backward", False): 1073.0,
    },
)  # fmt: skip
ARGUMENTS = (HOPPER, BLACKWELL)


def short(row: Row) -> str:
    """The case's name where only gradients are."""
    return row.case.removesuffix("_backward")


def head(titles: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"


def of(rows: list[Row | NotYet], name: str, gpu: str) -> list[Row | NotYet]:
    """A case's rows on a GPU."""
    return [row for row in rows if (row.case, row.target) == (name, GPUS[gpu].device.target)]


def per_work(row: Row) -> float:
    """Tiles of a kernel of gradients that WORK scores are."""
    return WORK / (row.tile[0] * row.tile[1])


def added_per_kflop(row: Row) -> str:
    """Bytes added to global memory per 1000 FLOP of the algorithm."""
    return f"{1000 * row.cost.reduced / flops_of(CASES[row.case], row.tile):.2f}"


def pairs(rows: Iterable[Row | NotYet]) -> Iterator[tuple[Row, Row]]:
    """Each of our kernels with each of the peer's for the same case and target."""
    counted = [row for row in rows if isinstance(row, Row)]
    peers = [row for row in counted if row.kernel.startswith(flash_attn_4.NAME)]
    for row in (row for row in counted if row.config):
        yield from ((row, peer) for peer in peers if (peer.case, peer.target) == (row.case, row.target))

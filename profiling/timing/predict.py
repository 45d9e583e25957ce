"""What a launch takes on a GPU: samples of one CTA, run on the machine, put together for the whole grid."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import backward, constants, grid, simulate
from .grid import Shape
from .match import NoWay
from .subjects import Subject

# Tiles of the samples. In longer runs the emulator lets lanes of a warp run apart, as machine code does not.
CAUSAL, FULL = (1, 2, 4, 8, 16), (8, 16)
FEW = (4, 8)  # of persistent kernels, which are run over one tile of rows and over two
BACKWARD = {True: (1, 2, 4, 8), False: (4, 8)}  # with a mask, and without


@dataclass(frozen=True)
class Samples:
    """Clocks of a CTA by its KV tiles; later: of a persistent one's further tiles of rows.

    nbytes: from L2, of all CTAs of a cluster that are run. unlike: the PTX's words and the machine code's, of
    the warp where they are most so, by KV tile; see match.Way.
    """

    first: dict[int, float]
    later: dict[int, float]
    nbytes: dict[int, float]
    unlike: float

    def clocks(self, tiles: np.ndarray) -> np.ndarray:
        """What a tile of rows takes a place of the GPU."""
        return grid.clocks_of(self.later or self.first)(tiles)

    def lead(self, tiles: int) -> float:
        """What the first tile of rows takes beyond a later one."""
        if not self.later:
            return 0.0
        at = np.array([tiles])
        return float((grid.clocks_of(self.first)(at) - grid.clocks_of(self.later)(at))[0])


def samples(subject: Subject, gpu: str) -> Samples:
    """Run the machine as often as it takes, with half the tiles where no way is found through the code.

    Raises what `simulate.run` raises.
    """
    which = _which(subject)
    try:
        return _samples(subject, gpu, which)
    except NoWay:
        return _samples(subject, gpu, tuple(sorted({max(1, tiles // 2) for tiles in which})))


def _samples(subject: Subject, gpu: str, which: tuple[int, ...]) -> Samples:
    runs = functools.partial(simulate.run, subject, constants.of(gpu))
    found = {tiles: runs(tiles) for tiles in which}
    first = {tiles: run.clocks for tiles, run in found.items()}
    later = {}
    if subject.persistent:
        later = {tiles: runs(tiles, works=2).clocks - first[tiles] for tiles in first}
    nbytes = {tiles: sum(sm.nbytes for sm in run.machine.sms.values()) for tiles, run in found.items()}
    unlike = max(max(run.unlike.values()) / tiles for tiles, run in found.items())
    return Samples(first, later, nbytes, unlike)


def _which(subject: Subject) -> tuple[int, ...]:
    """Numbers of tiles that are run."""
    if subject.backward:
        return BACKWARD[subject.causal]
    return FEW if subject.persistent else CAUSAL if subject.causal else FULL


def clocks(subject: Subject, found: Samples, shape: Shape, gpu: str) -> float:
    """Of a call: a launch over a whole problem, and of gradients those around it."""
    chip = constants.of(gpu)
    if subject.backward:
        tiles = grid.query_tiles_of(shape, subject.rows, subject.keys * subject.cluster)
    else:
        tiles = grid.tiles_of(shape, subject.rows, subject.keys, subject.packed)
    places = int(chip.sms) * subject.ctas // subject.cluster
    heads = shape.batch * shape.heads // subject.packed
    each = found.clocks(tiles)
    if not subject.persistent:
        each = each + chip.cta_launch
    busy = grid.launch(each, heads, places, subject.causal) + found.lead(int(tiles.max()))
    nbytes = heads * grid.clocks_of(found.nbytes)(tiles).sum() / subject.ctas
    others = backward.around(shape, chip) if subject.backward else 0
    return max(busy, nbytes / chip.l2_bytes) + chip.kernel_launch + others

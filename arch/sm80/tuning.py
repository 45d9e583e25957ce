"""Tile sizes of the sm80 kernels: a table, read top to bottom; the first row that fits serves.

What chose the rows: registers and spills as the compiler reports them (no row spills on any target that
`tests/test_resources.py` compiles), and shared-memory traffic per matrix instruction. No row was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Device, Problem


@dataclass(frozen=True)
class Config:
    """How the forward kernel works on a problem.

    tile_m, tile_n: rows of Q, and of K and V, at a time. warps: each takes tile_m / warps rows.
    stages: K and V tiles in shared memory. q_in_registers: Q is read from shared memory once.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int = 1
    q_in_registers: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory."""
        dim, dim_v = padded(problem.head_dim), padded(problem.head_dim_v)
        q_or_out = self.tile_m * max(dim, dim_v)
        return 2 * (q_or_out + self.stages * self.tile_n * (dim + dim_v))


@dataclass(frozen=True)
class Row:
    """A config for head dims up to `dim` (the larger of QK's and V's, padded).

    plain_only: for problems without score, dropout, sink or a mask other than causal, whose
    arithmetic leaves no registers for it. majors: of the compute capabilities that it is for.
    """

    dim: int
    config: Config
    why: str
    plain_only: bool = False
    majors: tuple[int, ...] = (8, 9, 10, 11, 12)


FORWARD = (
    Row(64, Config(128, 64, 4), "32 rows per warp read K and V half as often as 16: 2 CTAs per SM, 32 KB each"),
    Row(96, Config(128, 64, 4), "as above, 48 KB each", plain_only=True, majors=(8, 9)),
    Row(128, Config(128, 64, 4), "as above, 64 KB each; 255 registers", plain_only=True, majors=(8, 9)),
    Row(192, Config(128, 64, 8), "32 rows per warp spill; 8 warps of 16 rows share each K and V tile"),
    Row(256, Config(64, 64, 4), "96 KB: fits every GPU served; 248 registers"),
)


def padded(dim: int) -> int:
    """Columns that a head dim takes in shared memory: whole k steps of mma."""
    return -(-dim // 16) * 16


def is_plain(problem: Problem) -> bool:
    """No arithmetic per score beyond scale and, at most, the causal mask."""
    causal_at_most = problem.mask is None or problem.mask.rule_id == "Causal"
    return causal_at_most and not (problem.score or problem.dropout or problem.sink)


def forward_config(problem: Problem, device: Device) -> Config | None:
    """The first row that fits, or None."""
    dim = max(padded(problem.head_dim), padded(problem.head_dim_v))
    for row in FORWARD:
        fits = dim <= row.dim and row.config.shared_memory(problem) <= device.shared_memory
        if fits and device.capability[0] in row.majors and (is_plain(problem) or not row.plain_only):
            return row.config
    return None

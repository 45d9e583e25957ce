"""The tile of Hopper's latent kernel: one for all that it serves.

A thread holds O (head_dim_v / 4 registers), S and P (tile_n / 2 and tile_n / 4): 176 of 232 at most. Clocks
for 64 keys of (576, 512) by the timing model: 2022 of the tensor core, 2400 of a CTA, 4240 of an H200's
memory, for all CTAs that share them. Tiles in one part take 3180 where S begins after the other's P V, 4190
where before it; both warpgroups with all scores, 3328 and more of the tensor core alone.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device, Problem
from ...tuning import Row, Table
from .config import Config

MOST_STAGES = 4


def fitted(config: Config, problem: Problem, device: Device) -> Config | None:
    """With as many tiles of K as there is room for, two at least."""
    deep = (replace(config, stages=stages) for stages in range(MOST_STAGES, 1, -1))
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), None)


FORWARD = Table(
    rows=(
        Row(
            head_dim=576, head_dim_v=512, pressure=0,
            config=Config(
                consumers=2, tile_n=64, stages=2, producer_registers=40, consumer_registers=232,
                ping_pong=False,
            ),
            why="two stages of 64 rows of 576 fill shared memory; 40 registers look up pages",
        ),
    ),
    register_pressure=lambda problem, device: 0,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors,
    most_heads=64,
)  # fmt: skip

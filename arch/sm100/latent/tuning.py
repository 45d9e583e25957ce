"""The tile of Blackwell's latent kernel: one for all that it serves.

Clocks of a pair for 128 keys of (576, 512) by counts: the products take 2176; shared memory 3152, of which
what TMA writes is 1088; a B200's memory, its rate shared by all pairs, 2780; 2738 by the timing model. With
the 128 rows in one CTA and V's columns shared out by two, both would compute all scores: 3328 of the tensor
core. With 64 rows in each of two that do not multiply together, products would have half of the tensor core's
lanes: 4352.
"""

from __future__ import annotations

from dataclasses import replace

from ...problem import Device, Problem
from ...tuning import Row, Table
from .config import Config

MOST_STAGES = 3


def fitted(config: Config, problem: Problem, device: Device) -> Config | None:
    """With as many tiles of K and V as there is room for, one of each at least."""
    deep = (replace(config, k_stages=n, v_stages=n) for n in range(MOST_STAGES, 0, -1))
    return next((c for c in deep if c.shared_memory(problem) <= device.shared_memory), None)


FORWARD = Table(
    rows=(
        Row(
            head_dim=576, head_dim_v=512, pressure=0,
            config=Config(
                slots=2, tile_n=128, k_stages=1, v_stages=1, polynomial=0, softmax_registers=240,
                correction_registers=152, other_registers=112,
            ),
            why="one tile of K and one of V, refilled part by part, fill shared memory beside Q and P",
        ),
    ),
    register_pressure=lambda problem, device: 0,
    fitted=fitted,
    at_once=lambda config, problem, device: device.multiprocessors // config.ctas,
    most_heads=128,
)  # fmt: skip

"""The tile of Hopper's FP8 kernel: one for all that it serves.

A thread holds S (tile_n / 2 registers), P (tile_n / 8), O and the product that is added to it (head_dim_v /
2 each): 208 of 232 at most. Blocks of scales are as long as a tile: one number scales all of its scores.
"""

from __future__ import annotations

from ...kernel import Tuning
from .config import Config

CONFIG = Config(consumers=2, tile_n=128, stages=2, producer_registers=40, consumer_registers=232)
TUNING = Tuning(config=lambda problem, device, sizes: CONFIG)

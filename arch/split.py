"""In how many parts to take the keys of a call: the rule of thumb that all trees share.

In units of the time that one KV block takes: what a tile costs besides its blocks (Q's way in, the pipeline's
start, O's way out), and what the combine kernel's launch costs. Not measured.
"""

from __future__ import annotations

from .problem import Problem

TILE_COST, COMBINE_COST = 2, 4
MOST_SPLITS = 128


def fastest_splits(tiles: int, blocks: int, multiprocessors: int) -> int:
    """The number of parts that is done first, by waves of equal tiles with `blocks` KV blocks each.

    A wave lasts as long as its tiles: ceil(blocks / splits) + TILE_COST; there are as many waves as it takes
    to give every tile's split a multiprocessor.
    """

    def time(n: int) -> int:
        waves = -(-tiles * n // multiprocessors)
        return waves * (-(-blocks // n) + TILE_COST) + COMBINE_COST * (n > 1)

    return min(range(1, max(1, min(blocks, MOST_SPLITS)) + 1), key=time)


def sees_few_blocks(problem: Problem) -> bool:
    """Whether rows see few of the blocks, by a window or a block mask: then keys stay whole."""
    return problem.block_size is not None or (problem.mask is not None and problem.mask.sees_few())

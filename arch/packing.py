"""Query heads of one KV head that share a tile's rows: how many of them, and how many tiles that leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .problem import Problem, Sizes


def packs(problem: Problem) -> bool:
    """Whether heads may share a tile: which blocks it visits must then be the same for all of them."""
    same_blocks = problem.block_size is None and (problem.mask is None or problem.mask.ignores_head())
    return problem.gqa and same_blocks


def heads_of_tile(problem: Problem, tile_m: int, most: int, sizes: Sizes) -> int:
    """How many heads should share `tile_m` rows: as leaves the fewest tiles; where equal, the fewest heads.

    A power of two, `most` at most; 1 where the problem does not allow it.
    """
    group = sizes.heads_q // max(sizes.heads_kv, 1)
    if not packs(problem):
        return 1
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < 2 * group]
    return min(powers, key=lambda heads: -(-group // heads) * -(-sizes.seqlen_q * heads // tile_m))


def count_tiles(tile_m: int, heads: int, sizes: Sizes) -> int:
    """Tiles of `tile_m` rows, of `heads` heads each, that a call's queries fill."""
    groups = sizes.heads_q
    if heads > 1:
        groups = sizes.heads_kv * -(-(sizes.heads_q // max(sizes.heads_kv, 1)) // heads)
    return sizes.batch * groups * -(-sizes.seqlen_q * heads // tile_m)


def config_probe_sizes(problem: Problem, q_rows: Iterable[int], most: int) -> Iterator[Sizes]:
    """Sizes among which every config is found that depends on heads of a tile, or on how many rows there are.

    q_rows: rows, of all heads of a group, from which on something changes.
    """
    groups = [1 << n for n in range(most.bit_length())] if packs(problem) else [1]
    for group in groups:
        for length in (*(-(-rows // group) for rows in q_rows), 1024):
            yield Sizes(1, group, 1, length, 1)

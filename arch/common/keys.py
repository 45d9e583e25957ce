"""Which keys a CTA of a backward pass's main kernel takes, in all trees."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..backward import BackwardOperands
from .schedule import OneTile
from .sequence import extent


class KeyTile(NamedTuple):
    """Keys first_key and on of one sequence, as one query head sees them.

    member: which of the query heads that share a KV head.
    """

    first_key: Int32
    batch: Int32
    head: Int32
    kv_head: Int32
    member: Int32


class KeyTiles(NamedTuple):
    """A tile of keys of one query head for each CTA. group: query heads that share a KV head."""

    tiles: OneTile
    group: Int32

    @staticmethod
    def of(call: BackwardOperands, tile_n: int) -> KeyTiles:
        """Those of a call, of `tile_n` keys each."""
        keys, batches = extent(call.k, call.cu_seqlens_k, call.max_seqlen_k)
        heads = call.q.shape[-2]
        return KeyTiles(OneTile(cute.ceil_div(keys, tile_n), heads, batches), heads // call.k.shape[-2])

    def grid(self) -> tuple[Int32, int, int]:
        return self.tiles.grid()

    def tile(self, i: Int32, tile_n: int, gqa: bool) -> KeyTile:
        """Tile `i`. Under a causal mask the first keys have the most to do: they come first."""
        turn, head, batch, _ = self.tiles.tile(i)
        first_key = (self.tiles.m_blocks - 1 - turn) * tile_n
        kv_head = head // self.group if gqa else head
        return KeyTile(first_key, batch, head, kv_head, head % self.group if gqa else Int32(0))

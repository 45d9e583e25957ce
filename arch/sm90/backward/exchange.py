"""What the two CTAs of a pair exchange: dS, by bulk copies between their shared memories."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import nvvm

from ...common.cluster import copy_to_peer
from ..edge import Edge


class Exchange(NamedTuple):
    """dS from one CTA of a pair to the other. edge: full, of the place here; empty, of the place there.

    nth: 0, 1, ..., of all that comes here, and of all that goes there.
    """

    edge: Edge
    peer: Int32

    @staticmethod
    def of(edge: Edge) -> Exchange:
        """Seen from this CTA."""
        return Exchange(edge, 1 - cute.arch.block_idx_in_cluster())

    def wait_full(self, nth: Int32) -> None:
        """Wait for the other's dS."""
        self.edge.wait_full(nth)

    def wait_empty(self, nth: Int32) -> None:
        """Wait until the other has done with the dS before: it may be written over there, and here."""
        self.edge.wait_empty(nth)

    @cute.jit
    def swap(self, ds: cute.Tensor, place: cute.Tensor):
        """Begin copying dS, visible to all, to its place in the other CTA; expect as much here."""
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(self.edge.full, nbytes(place))
                copy_to_peer(place.iterator, ds.iterator, nbytes(place), self.edge.full, self.peer)

    def warp_emptied(self) -> None:
        """This warp has done with the other's dS."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.edge.empty, self.peer, scope=nvvm.MemScopeKind.CLUSTER)


def nbytes(tile: cute.Tensor) -> int:
    """Of a tile in shared memory."""
    return cute.size(tile) * tile.element_type.width // 8


def pair_meets() -> None:
    """All threads of both CTAs have come here, and see what was written before."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()

"""The compute role of a CTA of a pair: two CTAs along keys, each of which sums half of the columns of dQ.

    S = Q K^T and dP = dO V^T begun         wait S        P = exp(S - LSE)        P to shared
    dV^T += dO^T P begun      wait dP       dS = P (dP - D)    dS to shared, and to the other CTA
    dK^T += Q^T dS begun      wait dV       wait for the other's dS
    dQ = dS K + dS' K' begun  wait dK       wait dQ            dQ to shared, for the store role

    peer --peer_ds--> compute, compute     dS', by a bulk copy between shared memories, at every visit

dS' and K' are the other CTA's; of K' half of the columns are enough, which the load role brings once. Both
CTAs visit the query tiles that either's keys see.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from ..mma import accumulator, wait
from .compute import Scores
from .elements import Visit
from .exchange import Exchange
from .job import Edges, Sums, Tiles
from .wide import WideCompute


class PairCompute(WideCompute):
    """See the module."""

    def gradients(self, visit: Visit, scores: Scores, sums: Sums, tiles: Tiles, edges: Edges) -> None:
        exchange = Exchange.of(edges.peer_ds)
        self.keep(visit, scores.p, tiles.p)
        self.begin_grad_kv(sums.v, visit.operands.grad_out_as_a, visit.operands.p, scores.out)
        wait(1, scores.dp)
        self.differentiate(visit, scores)
        exchange.wait_empty(visit.turn)
        self.share(visit, scores.ds, tiles.ds)
        exchange.swap(tiles.ds, tiles.peer_ds)
        self.begin_grad_kv(sums.k, visit.operands.q_as_a, visit.operands.ds, scores.q)
        wait(1, sums.v)
        scores.out.release()
        exchange.wait_full(visit.turn)
        acc_q = accumulator(self.config.slice_columns)
        self.begin_q(acc_q, visit, 0)
        wait(1, sums.k)
        scores.q.release()
        wait(0, acc_q)
        exchange.warp_emptied()
        self.hand_over_slice(visit, acc_q, 0, tiles, edges)

    def slice_pairs(self, tiles: Tiles, warpgroup: Int32, i: int) -> list[tuple[cute.Tensor, cute.Tensor]]:
        """Of this CTA's keys and of the other's; the part is of this CTA's half of dQ's columns."""
        rank, index = cute.arch.block_idx_in_cluster(), warpgroup * self.slices + i
        own = rank * self.config.warpgroups * self.slices + index
        return [
            self.slice_pair(tiles.ds, tiles.moved.k, own),
            self.slice_pair(tiles.peer_ds, tiles.moved.peer_k, index),
        ]

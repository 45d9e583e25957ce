"""The CTAs that multiply together: one, or a pair (`cta_group::2` of tcgen05).

A pair is a cluster of two neighbours. A product of it has 256 rows: each CTA holds 128 of A and, in its own
tensor memory, of the result with all its columns. Of B, each CTA's shared memory holds one half: of K half of
the rows, of V half of the columns. So a CTA copies in and reads only half of K and V.

The CTA of rank 0 leads: it alone begins products, for both. What it waits for is counted by its barriers (see
`arrive`; so are copies into either CTA), and what its products complete is told to both (see `commit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05

LEADER = 0
BOTH = 0b11


@dataclass(frozen=True)
class Group:
    """ctas: 1 or 2."""

    ctas: int

    @property
    def paired(self) -> bool:
        return self.ctas == 2

    @property
    def kind(self) -> tcgen05.CtaGroup:
        return tcgen05.CtaGroup.TWO if self.paired else tcgen05.CtaGroup.ONE

    @property
    def cluster(self) -> tuple[int, int, int] | None:
        """What to launch with."""
        return (self.ctas, 1, 1) if self.paired else None

    def index(self) -> Int32:
        """Which of the launch's groups this CTA belongs to."""
        block = cute.arch.block_idx()[0]
        return block // self.ctas if self.paired else block

    def rank(self) -> Int32 | int:
        """This CTA's place in its group, read where it is asked for: kept, it would take a register."""
        return cute.arch.block_idx_in_cluster() if self.paired else 0

    def leads(self) -> Boolean | bool:
        """Whether this CTA begins the products."""
        return self.rank() == LEADER

    def loads(self) -> cpasync.CopyBulkTensorTileG2SOp:
        """TMA's copies into this CTA, which the leader's barriers count."""
        return cpasync.CopyBulkTensorTileG2SOp(self.kind)

    def allocate(self, columns: int, address: cute.Pointer) -> None:
        """Take columns of tensor memory, the same in all CTAs of the group; one warp of each calls this."""
        cute.arch.alloc_tmem(columns, address, is_two_cta=self.paired)
        cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.paired)

    def free(self, tensor: cute.Pointer, columns: int) -> None:
        """Give them back; one warp of each CTA, when nobody needs them any more, calls this."""
        cute.arch.dealloc_tmem(tensor, columns, is_two_cta=self.paired)

    def commit(self, barrier: cute.Pointer) -> None:
        """One arrival in each CTA when every product that this thread has begun is complete."""
        tcgen05.commit(barrier, BOTH if self.paired else None, self.kind)

    def arrive(self, barrier: cute.Pointer, tensor: bool = False) -> None:
        """One arrival at the leader's barrier.

        tensor: all that is handed over lies in tensor memory, of which `edge`'s fences take care. Else what
        this thread wrote must be seen in the other CTA, for which ptxas makes it wait (MEMBAR.ALL.GPU).
        """
        if self.paired:
            scope = None if tensor else nvvm.MemScopeKind.CLUSTER
            cute.arch.mbarrier_arrive(barrier, LEADER, scope=scope)
        else:
            cute.arch.mbarrier_arrive(barrier)

    def ready(self) -> None:
        """All threads of all CTAs see the barriers that one of each has made."""
        cute.arch.mbarrier_init_fence()
        self.sync()

    def sync(self) -> None:
        """All threads of all CTAs have come here, and see what was written before."""
        if self.paired:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()


ALONE = Group(1)

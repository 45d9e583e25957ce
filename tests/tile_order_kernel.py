"""A kernel that writes the order of tiles: one thread per place, with divisions and without."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_flash.arch.common.schedule import InSections, WithoutDivisions
from cute_flash.arch.kernel import Kernel, Tuning
from cute_flash.arch.problem import Spec, Support

THREADS = 128


class Operands(NamedTuple):
    """places: which tiles. found: by each order, one after the other, the fields of a WorkTile in rows."""

    places: Any
    m_blocks: Any
    heads: Any
    batches: Any
    splits: Any
    together: Any
    found: Any


@dataclass(frozen=True)
class TileOrderProblem:
    """split, in_sections: whether there may be several splits, and several pairs in a section."""

    split: bool
    in_sections: bool

    def specs(self) -> Operands:
        """What the kernel is launched with."""
        number = Spec("int32", (), "scalar", "number")
        places, found = (Spec("int32", dims, "contiguous", "numbers") for dims in (("n",), ("eight", "n")))
        return Operands(places, *[number] * 5, found)

    def known_sizes(self) -> dict[str, int]:
        """Sizes that compiled code knows."""
        return {"eight": 8}

    def example_sizes(self) -> dict[str, int]:
        """Sizes of a small launch."""
        return {"n": THREADS}


@dataclass(frozen=True)
class TileOrderConfig:
    """Nothing to choose."""

    def shared_memory(self, problem: TileOrderProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


class TileOrderLauncher:
    """What is compiled."""

    def __init__(self, problem: TileOrderProblem, config: TileOrderConfig):
        self.problem = problem

    @cute.kernel
    def kernel(self, places: cute.Tensor, orders, found: cute.Tensor):
        """A thread's tile."""
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        if i < places.shape[0]:
            for n in cutlass.range_constexpr(2):
                tile = orders[n].tile(places[i])
                for field in cutlass.range_constexpr(4):
                    found[4 * n + field, i] = Int32(tile[field])

    @cute.jit
    def __call__(self, *operands_and_stream):
        """Operands in their order, and the stream."""
        *operands, stream = operands_and_stream
        call = Operands(*operands)
        splits = call.splits if self.problem.split else 1
        together = call.together if self.problem.in_sections else 1
        sizes = call.m_blocks, call.heads, call.batches
        orders = InSections(*sizes, Int32(splits), Int32(together)), WithoutDivisions.of(
            InSections(*sizes, splits, together)
        )
        blocks = cute.ceil_div(call.places.shape[0], THREADS)
        self.kernel(call.places, orders, call.found).launch(
            grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
        )


TILE_ORDER = Kernel(
    name="tests.tile_order",
    operation="forward",
    support=Support(((8, 0), (12, 1)), ("float16",), (64,), frozenset()),
    tuning=Tuning(config=lambda problem, device, sizes: TileOrderConfig()),
    launches="tests.tile_order_kernel:TileOrderLauncher",
)

"""The kernels that are changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from cute_flash import dispatch
from cute_flash.arch.backward import PREPROCESS
from cute_flash.arch.combine import COMBINE
from cute_flash.arch.kernel import Kernel
from cute_flash.arch.problem import KvCache
from cute_flash.arch.sm80 import BACKWARD, POSTPROCESS
from cute_flash.arch.sm80 import tuning as sm80
from cute_flash.arch.sm80.widened import tuning as ampere_widened
from cute_flash.arch.sm90 import BACKWARD as HOPPER_BACKWARD
from cute_flash.arch.sm90 import tuning as sm90
from cute_flash.arch.sm90.backward import tuning as hopper
from cute_flash.arch.sm90.latent.config import Config as HopperLatent
from cute_flash.arch.sm90.widened import tuning as hopper_widened
from cute_flash.arch.sm100 import BACKWARD as BLACKWELL_BACKWARD
from cute_flash.arch.sm100 import tuning as sm100
from cute_flash.arch.sm100.backward import tuning as blackwell
from cute_flash.arch.sm100.latent.config import Config as BlackwellLatent
from cute_flash.arch.sm100.widened import tuning as blackwell_widened
from cute_flash.arch.tuning import Row, Table
from tests.cases import Case
from tests.serving import cached, paged
from tests.widening import widened

from .mutations import (
    ADDED,
    CLUSTER,
    COPIES,
    EXCHANGED,
    LANES,
    MASKS,
    MULTICAST,
    QUEUE,
    TCGEN05,
    TMA,
    TOLD,
    TURNS,
    WGMMA,
)
from .trial import Subject

# One row block that walks two key blocks or more in each of its loops: those that the mask cuts on the right,
# shows whole, and cuts on the left. And one that walks one block that is cut off by the end of the keys, then
# four whole ones.
WINDOW = Case("", ((100, 450),), heads=(1, 1), mask="wide_window")
FULL = Case("", ((100, 300),), heads=(1, 1))
SPLIT = replace(FULL, seqlens=((100, 450),), splits=2)
NARROW = widened(cached("", seqlens=((100, 300),), heads=(1, 1), splits=1))
MANY_SPLITS = replace(FULL, seqlens=((2, 1200),), splits=19)
# Where keys are split the roles wait for each other as they do otherwise; only how O leaves is another.
LEAVING = {name: TMA[name] for name in ("no wait for an mbarrier", "no arrival", "no barrier")}
LEAVING_TENSOR_MEMORY = {name: TCGEN05[name] for name in ("no commit of a product", "no wait for a load")}
COPYING_OUT = {name: TMA[name] for name in ("no fence", "no commit of a store", "no wait for a store")}
# Gradients by way of two key tiles that three query tiles see, of which one is not whole.
GRADIENTS = Case("", ((130, 200),), heads=(1, 1), mask="causal")
# The same of Hopper's kernel, whose loops see masked tiles and others: a key tile that is not whole and one
# that is, by way of five query tiles each, so that every stage of every ring is filled again in each loop.
HOPPER_GRADIENTS = Case("", ((300, 228),), heads=(1, 1), dims=(72, 72))
TILE_64 = hopper.Config(tile_m=128, columns=64, columns_v=64)
TILE_128 = hopper.Config(tile_m=64, columns=128, columns_v=128)
# Of the table's tile for 256 columns, with fewer keys.
TILE_256 = {"columns": 256, "columns_v": 64, "keys": 16, "slice_columns": 64, "handed_columns": 32}
WIDE_GRADIENTS = Case("", ((260, 114),), heads=(1, 1), dims=(136, 8))
# Blackwell's: two key tiles, one whole and one not, and three query tiles: every ring is filled again.
BLACKWELL_GRADIENTS = Case("", ((260, 140),), heads=(1, 1), dims=(8, 8))
# A pair's tile of keys, and three query tiles. By a rule that may hide any element they all take one loop.
PAIR_GRADIENTS = Case("", ((260, 256),), heads=(1, 1), dims=(40, 8), mask="function")
PAIR_TILE = {
    "tile_n": 256, "ctas": 2, "q_stages": 1, "out_stages": 1, "chunk": 16, "at_once": True,
    "store_registers": 88, "compute_registers": 184, "other_registers": 56,
}  # fmt: skip
# The fewest columns of which dQ comes in two products.
SERIAL_GRADIENTS = replace(PAIR_GRADIENTS, dims=(136, 8))
SERIAL_TILE = PAIR_TILE | {"chunk": 8}
WIDE_TILE = {
    "tile_n": 128, "ctas": 2, "q_stages": 1, "out_stages": 1, "chunk": 16, **blackwell.PIECEWISE,
}  # fmt: skip
# One tile of 64 keys, whose dQ comes in two fillings, likewise.
KEYS_GRADIENTS = replace(PAIR_GRADIENTS, seqlens=((260, 64),), dims=(256, 8))
HANDED_OVER = {
    name: (TMA | TCGEN05)[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "no fence", "no barrier", "no commit of a store",
        "no wait for a store", "no commit of a product", "no wait for a load",
        "no wait for a store to tensor memory", "no fence before synchronisation",
        "no fence after synchronisation",
    )
}  # fmt: skip
# Of that what tensor memory's lanes and the order of products decide: sums leave as they do otherwise.
IN_LANES = {
    name: HANDED_OVER[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "no commit of a product", "no wait for a load",
        "no wait for a store to tensor memory", "no fence before synchronisation",
        "no fence after synchronisation",
    )
}  # fmt: skip
PRODUCTS = ("no commit of a product", "no wait for a product", "a wait for one product fewer")
# What the roles of a CTA tell each other.
BETWEEN_ROLES = (
    "no wait for an mbarrier", "a wait for the other parity", "no arrival", "no fence", "no barrier",
)  # fmt: skip
COUNTED = ("half the bytes expected", "one arrival more expected", "half the arrivals expected")
# What one warp or warpgroup does by itself.
ALONE = {
    name: (TMA | WGMMA)[name]
    for name in ("no fence before a product", "no change of registers", "all lanes elected")
}
BROUGHT_AWAY = ("no commit of a store", "no wait for a store")
WIDE = {name: (TMA | WGMMA)[name] for name in (*BETWEEN_ROLES, *COUNTED, *BROUGHT_AWAY, *PRODUCTS)}
# What the CTAs of a pair tell each other; inside each, roles work as they do alone.
BETWEEN = CLUSTER | {
    name: (TMA | TCGEN05)[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "half the bytes expected", "one arrival more expected",
        "no fence", "no commit of a product", "no allocation", "no deallocation",
    )
}  # fmt: skip
# Where CTAs take several tiles roles wait for each other across tiles, too; what one warp does with tensor
# memory and with its registers, and what fences it needs, is as in one tile.
IN_ONE_TILE = (
    "no wait for a load", "no wait for a store to tensor memory", "no fence before synchronisation",
    "no fence after synchronisation", "no change of registers", "no allocation", "no permit given back",
    "no arrival at a barrier",
)  # fmt: skip
STAYING = {name: change for name, change in (TMA | TCGEN05).items() if name not in IN_ONE_TILE}
PERSISTING = Case("", ((150, 90),), heads=(3, 3), softmax_scale=4.0)
# A pair's gradients: nobody arrives at a barrier without a wait, and no copy comes to both.
NOT_PAIRED = ("no arrival at a barrier", "a half of a tile for one CTA alone")
PAIRED = {
    name: change
    for name, change in (TMA | TCGEN05 | CLUSTER | TOLD | EXCHANGED).items()
    if name not in NOT_PAIRED
}
# Of a pair whose warps store nothing to tensor memory.
IN_SHARED_MEMORY = {
    name: change for name, change in PAIRED.items() if name != "no wait for a store to tensor memory"
}
# Of one whose scores nobody sends to the other.
LATENT_PAIR = {
    name: change for name, change in (TMA | TCGEN05 | CLUSTER).items() if name in IN_SHARED_MEMORY
}
# A pair's CTAs tell each other who has read an answer.
ASKED_BETWEEN = {
    name: TMA[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "half the bytes expected", "one arrival more expected",
    )
}  # fmt: skip
HOPPER = {"consumers": 2, "stages": 2, "producer_registers": 24, "consumer_registers": 240}
ONE_TILE = {
    "tiles": 1, "slots": 2, "k_stages": 2, "v_stages": 2, "polynomial": 4,
    "softmax_registers": 240, "correction_registers": 152, "other_registers": 112,
}  # fmt: skip
TWO_TILES = {
    "tiles": 2, "slots": 1, "k_stages": 2, "v_stages": 2, "polynomial": 6,
    "softmax_registers": 192, "correction_registers": 80, "other_registers": 48,
}  # fmt: skip
# Tiles of 3, 2, 3, 0 and 1 blocks that one CTA takes one after the other; one has no keys, and one no rows.
TILES = replace(
    FULL, seqlens=((100, 180), (3, 100), (70, 140), (5, 0), (0, 9), (9, 60)), varlen=True, mask="causal"
)
@dataclass(frozen=True, eq=False)
class Tiled(Subject):
    """A backward kernel with a tile of its own, so that tuning does not move the sites."""

    tile: hopper.Tiling | blackwell.Config | None = None

    def served(self, device: str, executable: Callable) -> contextlib.ExitStack:
        """As Subject's, by a table of this tile alone; plans that the whole table made are not asked for."""
        tree = hopper if self.kernel is HOPPER_BACKWARD else blackwell
        row = tree.Row(
            head_dim=256, head_dim_v=256, pressure=hopper.HEAVIEST, config=self.tile, why="it is on trial"
        )
        stack = super().served(device, executable)
        stack.enter_context(mock.patch.object(tree.TABLE, "rows", (row,)))
        stack.enter_context(mock.patch.object(dispatch, "_planned", dispatch._planned.__wrapped__))
        return stack


@dataclass(frozen=True, eq=False)
class Narrow(Subject):
    """Of a cache of 8 bits, with a tile of its own instead of one that `table` chooses."""

    tile: Any = None
    table: Table | None = None

    @property
    def gradients(self) -> bool:
        """Never."""
        return False

    def changes(self, kernel: Kernel) -> bool:
        """The one that widens."""
        return kernel.operation == "widened"

    def served(self, device: str, executable: Callable) -> contextlib.ExitStack:
        """As Subject's, by a table of this tile alone, which it takes as it is."""
        stack, mine = super().served(device, executable), lambda config, problem, gpu: self.tile
        row = Row(head_dim=256, head_dim_v=256, pressure=9, config=self.tile, why="it is on trial")
        changed = {"rows": (row,), "fitted": mine, "most_heads": 1, "few_rows": 0, "scheduled": mine}
        for name, value in changed.items():
            stack.enter_context(mock.patch.object(self.table, name, value))
        stack.enter_context(mock.patch.object(dispatch, "_planned", dispatch._planned.__wrapped__))
        return stack


def lowered(case: Case) -> Case:
    """With scores so large that rows take their maximum off first, which on sm100 is a path of its own."""
    return replace(case, softmax_scale=2048.0)


SUBJECTS = {
    ("sm80", "window"): Subject(
        WINDOW, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=1), COPIES | MASKS
    ),
    ("sm80", "full"): Subject(FULL, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=2), COPIES | MASKS),
    ("sm80", "split"): Subject(SPLIT, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=2), COPIES),
    # Keys gathered through a table, two heads in a tile.
    ("sm80", "pages"): Subject(
        paged("", 7, seqlens=((20, 300),), heads=(2, 1)),
        sm80.Config(tile_m=64, tile_n=64, warps=4, stages=2, heads=2),
        {name: change for name, change in COPIES.items() if name != "no commit"},
    ),
    # One tile for K and V, and two warps to the same rows.
    ("sm80", "latent"): Subject(
        cached(
            "", dims=(264, 64), seqlens=((20, 230),), heads=(1, 1), cache=KvCache(latent=True), splits=1
        ),
        sm80.Config(tile_m=32, tile_n=32, warps=2, stages=3, abreast=2),
        COPIES,
    ),
    # Tiles of 8 bits that are widened into one of 16.
    ("sm80", "widened"): Narrow(
        NARROW, None, COPIES, tile=ampere_widened.Config(tile_m=128, tile_n=64, warps=4, stages=2),
        table=ampere_widened.TABLE,
    ),
    ("sm80", "gradients"): Subject(GRADIENTS, None, COPIES, kernel=BACKWARD),
    ("sm86", "gradients in one stage"): Subject(
        replace(GRADIENTS, dims=(128, 128), mask="full"), None, COPIES, kernel=BACKWARD
    ),
    ("sm80", "gradients of a shared head"): Subject(
        replace(GRADIENTS, heads=(2, 1)), None, {name: COPIES[name] for name in ("no wait", "no barrier")},
        kernel=BACKWARD,
    ),
    # Key tiles that a query tile sees whole, and tiles that it sees in part, come after one another.
    ("sm80", "gradients in turns"): Subject(
        Case("", ((64, 410),), heads=(2, 1), dims=(8, 8), mask="causal", deterministic=True), None, TURNS,
        kernel=BACKWARD, options={"races": True, "ordered_reductions": True},
    ),
    ("sm80", "before gradients"): Subject(replace(GRADIENTS, sink=True), None, LANES, kernel=PREPROCESS),
    ("sm80", "after gradients"): Subject(
        GRADIENTS, None, {"no barrier": COPIES["no barrier"]}, kernel=POSTPROCESS
    ),
    ("sm90", "window"): Subject(
        replace(WINDOW, seqlens=((100, 500),)), sm90.Config(**HOPPER, tile_n=32), TMA | WGMMA | MASKS
    ),
    ("sm90", "in order"): Subject(FULL, sm90.Config(**HOPPER, tile_n=64, overlap=False), TMA | WGMMA | MASKS),
    ("sm90", "persistent"): Subject(
        Case("", ((100, 200),), heads=(3, 3)), sm90.Config(**HOPPER, tile_n=64, persistent=True), TMA | WGMMA,
        multiprocessors=1,
    ),
    ("sm90", "packed"): Subject(
        Case("", ((5, 300),), heads=(8, 1)),
        sm90.Config(**HOPPER | {"consumers": 1}, tile_n=64, ping_pong=False, heads=8),
        TMA | WGMMA,
    ),
    # Each tile of keys takes four copies.
    ("sm90", "pages"): Subject(
        paged("", 16, seqlens=((20, 300),), heads=(2, 1)),
        sm90.Config(**HOPPER | {"consumers": 1}, tile_n=64, ping_pong=False, heads=2),
        {name: TMA[name] for name in ("half the bytes expected", "no bytes expected")},
    ),
    # Two warpgroups that hand P to each other; every stage is filled again, by tiles of either's.
    ("sm90", "latent"): Subject(
        cached(
            "", dims=(320, 128), seqlens=((20, 470),), heads=(1, 1), cache=KvCache(latent=True), splits=1
        ),
        HopperLatent(**HOPPER, tile_n=64, ping_pong=False),
        TMA | WGMMA,
    ),
    # Five blocks, so that every ring is filled again: of 8 bits, and of 16.
    ("sm90", "widened"): Narrow(
        NARROW, None, TMA | WGMMA, tile=hopper_widened.Config(**hopper_widened.SIZES, tile_n=64),
        table=hopper_widened.TABLE,
    ),
    ("sm90", "widened in order"): Narrow(
        NARROW, None, {name: (TMA | WGMMA)[name] for name in (*BETWEEN_ROLES, *COUNTED, *PRODUCTS)},
        tile=hopper_widened.Config(**hopper_widened.ONE, tile_n=64, overlap=False),
        table=hopper_widened.TABLE,
    ),
    ("sm90", "split"): Subject(SPLIT, sm90.Config(**HOPPER, tile_n=64), LEAVING),
    ("sm90", "combine"): Subject(MANY_SPLITS, sm90.Config(**HOPPER, tile_n=64), LANES, kernel=COMBINE),
    ("sm90", "gradients"): Tiled(
        HOPPER_GRADIENTS, None, TMA | WGMMA, kernel=HOPPER_BACKWARD, tile=TILE_128,
    ),
    # Warpgroups share out the rows of dQ, not its columns.
    ("sm90", "gradients of 128 rows"): Tiled(
        replace(HOPPER_GRADIENTS, dims=(64, 64)), None,
        {name: (TMA | WGMMA)[name] for name in ("no fence", "no barrier", *PRODUCTS)},
        kernel=HOPPER_BACKWARD, tile=TILE_64,
    ),
    # dP's product begins where S's has ended.
    ("sm90", "gradients without overlap"): Tiled(
        HOPPER_GRADIENTS, None, {name: WGMMA[name] for name in PRODUCTS}, kernel=HOPPER_BACKWARD,
        tile=replace(TILE_128, overlap=False),
    ),
    # Warpgroups have keys as columns; dQ comes in two products, and is handed over in four parts.
    ("sm90", "gradients of wide heads"): Tiled(
        WIDE_GRADIENTS, None, WIDE, kernel=HOPPER_BACKWARD, tile=hopper.WideConfig(**TILE_256),
    ),
    # Two CTAs that exchange dS, and share out the columns of dQ.
    ("sm90", "gradients of a pair"): Tiled(
        WIDE_GRADIENTS, None, WIDE | CLUSTER | EXCHANGED | ALONE, kernel=HOPPER_BACKWARD,
        tile=hopper.PairConfig(**TILE_256), ctas=2,
    ),
    ("sm90", "gradients in turns"): Tiled(
        Case("", ((64, 410),), heads=(2, 1), mask="causal", deterministic=True), None,
        TURNS | ADDED | {name: TMA[name] for name in ("no fence", "no barrier", "no wait for a store")},
        kernel=HOPPER_BACKWARD, options={"races": True, "ordered_reductions": True}, tile=TILE_64,
    ),
    # P and dQ have columns of their own.
    ("sm100", "gradients"): Tiled(
        BLACKWELL_GRADIENTS, None, TMA | TCGEN05, kernel=BLACKWELL_BACKWARD,
        tile=blackwell.Config(p_apart=True, **blackwell.PIECEWISE),
    ),
    # P lies over S, dQ over dP, which the store role empties at once.
    ("sm100", "gradients over scores"): Tiled(
        replace(BLACKWELL_GRADIENTS, dims=(128, 8)), None, HANDED_OVER, kernel=BLACKWELL_BACKWARD,
        tile=blackwell.Config(out_stages=1, **blackwell.AT_ONCE),
    ),
    # Two threads share a key, and K's columns come to dQ in two halves, of which the next S begins between.
    ("sm100", "gradients of 64 keys"): Tiled(
        KEYS_GRADIENTS, None, IN_LANES, kernel=BLACKWELL_BACKWARD,
        tile=blackwell.Config(tile_n=64, q_stages=1, out_stages=1, chunk=16, **blackwell.AT_ONCE),
    ),
    # 64 rows of Q, whose dQ has its last columns beside its first ones, over dP.
    ("sm100", "gradients of 64 rows"): Tiled(
        replace(PAIR_GRADIENTS, seqlens=((170, 128),)), None, IN_LANES, kernel=BLACKWELL_BACKWARD,
        tile=blackwell.Config(tile_m=64, chunk=16, sums=4, **blackwell.AT_ONCE),
    ),
    # Two CTAs that multiply together and exchange dS; dQ lies over S.
    ("sm100", "gradients of a pair"): Tiled(
        PAIR_GRADIENTS, None, PAIRED, kernel=BLACKWELL_BACKWARD, tile=blackwell.Config(**PAIR_TILE), ctas=2,
    ),
    # The same with Q and dO in one form at a time, dP over half of S, and dQ in two products.
    ("sm100", "gradients of a serial pair"): Tiled(
        SERIAL_GRADIENTS, None, PAIRED, kernel=BLACKWELL_BACKWARD, tile=blackwell.SerialConfig(**SERIAL_TILE),
        ctas=2,
    ),
    # 64 keys in each CTA, P and dS out of shared memory.
    ("sm100", "gradients of a wide pair"): Tiled(
        replace(PAIR_GRADIENTS, seqlens=((260, 128),)), None, IN_SHARED_MEMORY, kernel=BLACKWELL_BACKWARD,
        tile=blackwell.WideConfig(**WIDE_TILE), ctas=2,
    ),
    # Two key tiles add to a query tile, and two heads to a key tile.
    ("sm100", "gradients in turns"): Tiled(
        Case("", ((64, 200),), heads=(2, 1), dims=(40, 40), mask="causal", deterministic=True), None,
        TURNS | ADDED | {name: TMA[name] for name in ("no fence", "no barrier", "no wait for a store")},
        kernel=BLACKWELL_BACKWARD, options={"races": True, "ordered_reductions": True},
        tile=blackwell.Config(p_apart=True, **blackwell.PIECEWISE),
    ),
    ("sm100", "window"): Subject(
        replace(WINDOW, seqlens=((200, 340),)),
        sm100.Config(**TWO_TILES, tile_n=32),
        TMA | TCGEN05 | MASKS,
    ),
    ("sm100", "causal"): Subject(
        replace(FULL, dims=(128, 128), mask="causal"),
        sm100.Config(**ONE_TILE, tile_n=64),
        TMA | TCGEN05 | MASKS,
        # Large scores make one key of a row all: most must be in blocks that are masked, to be missed.
        also=(lowered(replace(FULL, dims=(128, 128), mask="causal", seqlens=((100, 110),))),),
    ),
    ("sm100", "pair"): Subject(
        replace(FULL, seqlens=((200, 500),), mask="causal"),
        sm100.Config(**ONE_TILE, tile_n=64, ctas=2),
        BETWEEN,
        ctas=2,
    ),
    # Parts of K and V, whose places all are filled again; rows of both CTAs, with half of the keys a thread.
    # An odd number of blocks: maxima of the last one lie where sums come.
    ("sm100", "latent"): Subject(
        cached(
            "", dims=(384, 384), seqlens=((100, 600),), heads=(1, 1), cache=KvCache(latent=True), splits=1,
            mask="causal",
        ),
        BlackwellLatent(**(ONE_TILE | {"k_stages": 1, "v_stages": 1, "polynomial": 0}), tile_n=128),
        LATENT_PAIR,
        ctas=2,
    ),
    # The same of what its roles tell each other; each does with tensor memory what it does otherwise.
    ("sm100", "widened"): Narrow(
        NARROW, None,
        {name: (TMA | TCGEN05)[name] for name in (*BETWEEN_ROLES, *COUNTED, "no commit of a product")},
        table=blackwell_widened.TABLE,
        tile=blackwell_widened.Config(
            **blackwell_widened.SIZES, tile_n=64, k_stages=2, v_stages=2, wide=2, polynomial=4
        ),
    ),
    # Causal, so that O must be rescaled, with rows of both tiles.
    ("sm100", "split"): Subject(
        replace(SPLIT, seqlens=((150, 450),), mask="causal"),
        sm100.Config(**TWO_TILES, tile_n=64),
        LEAVING | LEAVING_TENSOR_MEMORY,
    ),
    # Three tiles of one CTA; all have 3 blocks, or 2 or none: each wait is needed with some number of blocks.
    # Scores are large, so that O must be rescaled.
    ("sm100", "persistent"): Subject(
        PERSISTING,
        sm100.Config(**TWO_TILES, tile_n=32, persistent=True),
        STAYING,
        multiprocessors=1,
        also=tuple(replace(PERSISTING, seqlens=((150, keys),)) for keys in (60, 0)),
    ),
    ("sm100", "queue"): Subject(
        TILES,
        sm100.Config(**ONE_TILE, tile_n=64, dynamic=True),
        STAYING | QUEUE,
        options={"ctas_per_wave": 1},
    ),
    ("sm100", "queue pair"): Subject(
        replace(TILES, seqlens=((200, 180), (30, 100), (130, 140), (5, 0), (0, 9), (9, 60))),
        sm100.Config(**ONE_TILE, tile_n=64, ctas=2, dynamic=True),
        ASKED_BETWEEN | QUEUE | MULTICAST,
        options={"ctas_per_wave": 2},
        ctas=2,
    ),
    # Tiles of two heads, of which the third is alone in one.
    ("sm100", "packed"): Subject(
        Case("", ((66, 192),), heads=(3, 1), mask="causal"),
        sm100.Config(**ONE_TILE, tile_n=64, heads=2),
        LEAVING | COPYING_OUT | MASKS,
    ),
}


SUBJECTS |= {
    key: replace(subject, also=(*subject.also, lowered(subject.case)))
    for key, subject in SUBJECTS.items()
    if key[0] == "sm100" and not subject.gradients
}

"""The kernels that are changed."""

from __future__ import annotations

from dataclasses import replace

from cute_flash.arch.backward import PREPROCESS
from cute_flash.arch.combine import COMBINE
from cute_flash.arch.sm80 import BACKWARD, POSTPROCESS
from cute_flash.arch.sm80 import tuning as sm80
from cute_flash.arch.sm90 import tuning as sm90
from cute_flash.arch.sm100 import tuning as sm100
from tests.cases import Case

from .mutations import CLUSTER, COPIES, LANES, MASKS, MULTICAST, QUEUE, TCGEN05, TMA, TURNS, WGMMA
from .trial import Subject

# One row block that walks two key blocks or more in each of its loops: those that the mask cuts on the right,
# shows whole, and cuts on the left. And one that walks one block that is cut off by the end of the keys, then
# four whole ones.
WINDOW = Case("", ((100, 450),), heads=(1, 1), mask="wide_window")
FULL = Case("", ((100, 300),), heads=(1, 1))
SPLIT = replace(FULL, seqlens=((100, 450),), splits=2)
MANY_SPLITS = replace(FULL, seqlens=((2, 1200),), splits=19)
# Where keys are split the roles wait for each other as they do otherwise; only how O leaves is another.
LEAVING = {name: TMA[name] for name in ("no wait for an mbarrier", "no arrival", "no barrier")}
LEAVING_TENSOR_MEMORY = {name: TCGEN05[name] for name in ("no commit of a product", "no wait for a load")}
COPYING_OUT = {name: TMA[name] for name in ("no fence", "no commit of a store", "no wait for a store")}
# Gradients by way of two key tiles that three query tiles see, of which one is not whole.
GRADIENTS = Case("", ((130, 200),), heads=(1, 1), mask="causal")
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
def lowered(case: Case) -> Case:
    """With scores so large that rows take their maximum off first, which on sm100 is a path of its own."""
    return replace(case, softmax_scale=2048.0)


SUBJECTS = {
    ("sm80", "window"): Subject(
        WINDOW, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=1), COPIES | MASKS
    ),
    ("sm80", "full"): Subject(FULL, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=2), COPIES | MASKS),
    ("sm80", "split"): Subject(SPLIT, sm80.Config(tile_m=128, tile_n=64, warps=4, stages=2), COPIES),
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
    ("sm90", "split"): Subject(SPLIT, sm90.Config(**HOPPER, tile_n=64), LEAVING),
    ("sm90", "combine"): Subject(MANY_SPLITS, sm90.Config(**HOPPER, tile_n=64), LANES, kernel=COMBINE),
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
    if key[0] == "sm100"
}

"""The one named list of cases that drives every test of numbers: features singly, and in all pairs.

A Case is small data; `tests/harness.py` turns it into tensors and calls. Kernels are compiled per Problem,
not per size, so sizes vary freely; the other fields are chosen to keep Problems to about a hundred.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, ClassVar

import torch

from cute_flash import BlockMask, create_block_mask
from cute_flash.arch.common.mask import Causal, Document, Mask, PrefixLM, SlidingWindow
from cute_flash.arch.common.score import Score
from cute_flash.arch.elementwise import load, where


@dataclass(frozen=True)
class Case:
    """One call. seqlens: (seqlen_q, seqlen_k) of each sequence, all equal unless varlen.

    heads, dims: (query, key/value) heads and (QK, V) head dims. mask, score, blocks: keys of MASKS, SCORES
    and BLOCKS.
    used: which of "q", "k" get used lengths, as in "qk"; varlen only. layout: key of LAYOUTS in harness.py.
    splits: parts of the keys; None leaves it to the kernel. deterministic: gradients have the same bits in
    every run.
    """

    name: str
    seqlens: tuple[tuple[int, int], ...] = ((137, 150), (137, 150))
    varlen: bool = False
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    dtype: str = "bfloat16"
    mask: str = "full"
    score: str = "plain"
    blocks: str = "none"
    used: str = ""
    dropout: float = 0.0
    sink: bool = False
    layout: str = "packed"
    softmax_scale: float | None = None
    splits: int | None = None
    deterministic: bool = False
    cache: ClassVar[Any] = None  # where keys lie, of cases that are about it: tests/serving.py

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Streaming(Mask):
    """A user's mask: causal, but only the first keys and a window stay visible (StreamingLLM)."""

    first: int
    window: int

    def visible(self, q, k):
        return (k <= q) & ((k < self.first) | (k > q - self.window))


@dataclass(frozen=True)
class WindowByHead(Mask):
    """A user's mask that is another one for every head. left: int32 (heads,)."""

    left: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return WindowByHead(load(self.left, head))

    def visible(self, q, k):
        return k >= q - self.left

    def keys(self, q_first, q_last, seqlen_k):
        return q_first - self.left, seqlen_k


@dataclass(frozen=True)
class RelativeBias(Score):
    """A user's score: a learned bias per head and distance. table: float32 (heads, distances)."""

    table: Any

    def score(self, s, batch, head, q, k):
        return s + load(self.table, head, q - k + 64)


def checkerboard(q, k):
    """A user's mask as a plain function."""
    return (q + k) // 8 * 8 != (q + k)


def halved_in_the_past(s, batch, head, q, k):
    """A user's score as a plain function."""
    return where(k < q, s * 0.5, s)


def hides_rows(s, batch, head, q, k):
    """A user's score that hides all keys from some queries, and some from others."""
    return where(q % 3 == 0, -math.inf, where((q + k) % 5 == 0, -math.inf, s))


@dataclass(frozen=True)
class Sizes:
    """What the makers of masks and scores are told: sizes, and a seeded generator."""

    batch: int
    heads: int
    longest_q: int
    longest_k: int
    generator: torch.Generator

    def document_ids(self) -> torch.Tensor:
        """Document of each position, int32 (batch, longest_k): runs of 1 to 60 positions."""
        starts = torch.rand(self.batch, max(self.longest_k, 1), generator=self.generator) < 1 / 30
        return starts.cumsum(1).int()

    def block_mask(self, mask: Any, block_size: int | tuple[int, int] = 128) -> dict[str, BlockMask]:
        """A rule's block mask."""
        sizes = (self.batch, self.heads, self.longest_q, self.longest_k)
        return {"block_mask": create_block_mask(mask, *sizes, block_size=block_size)}

    def random_blocks(
        self, share: float, mask: Any = None, block_size: tuple[int, int] = (128, 128)
    ) -> dict[str, BlockMask]:
        """A share of all blocks, other ones for every sequence and head, none for the very first rows.

        With a rule, those among them that it shows in whole are full.
        """
        seqlens = (self.longest_q, self.longest_k)
        blocks = (-(-n // size) for n, size in zip(seqlens, block_size, strict=True))
        visit = torch.rand(self.batch, self.heads, *blocks, generator=self.generator) < share
        visit[:1, -1:, :1] = False
        full = None
        if mask is not None:
            _, full = create_block_mask(mask, 1, 1, *seqlens, block_size=block_size).blocks()
            full = visit & full
        told = {"block_size": block_size, "seqlens": seqlens, "mask": mask}
        return {"block_mask": BlockMask.from_blocks(visit, full, **told)}


# Name -> keyword arguments of a call.
MASKS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "full": lambda _: {},
    "causal": lambda _: {"causal": True},
    "window": lambda _: {"window_size": (33, 7)},
    "wide_window": lambda _: {"window_size": (260, 20)},
    "window_left": lambda _: {"window_size": (20, None)},
    "window_right": lambda _: {"window_size": (-1, 12)},
    "causal_window": lambda _: {"causal": True, "window_size": (50, 0)},
    "diagonal": lambda _: {"window_size": (0, 0)},
    "prefix": lambda _: {"mask": PrefixLM(45)},
    "prefix_per_batch": lambda n: {"mask": PrefixLM(torch.arange(n.batch, dtype=torch.int32) * 40 + 5)},
    "document": lambda n: {"mask": Document(n.document_ids())},
    "document_causal": lambda n: {"mask": Document(n.document_ids()) & Causal()},
    "either": lambda _: {"mask": SlidingWindow(10, 10) | PrefixLM(20)},
    "own": lambda _: {"mask": Streaming(4, 30)},
    "function": lambda _: {"mask": checkerboard},
    "by_head": lambda n: {"mask": WindowByHead(torch.arange(n.heads, dtype=torch.int32) * 30 + 2)},
    "own_and_causal": lambda _: {"mask": Streaming(4, 30), "causal": True},
}
SCORES: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "plain": lambda _: {},
    "softcap": lambda _: {"softcap": 2.0},
    "alibi": lambda n: {"alibi_slopes": 0.5 ** torch.arange(1, n.heads + 1).float()},
    "alibi_per_batch": lambda n: {"alibi_slopes": torch.rand(n.batch, n.heads, generator=n.generator)},
    "softcap_alibi": lambda n: SCORES["softcap"](n) | SCORES["alibi"](n),
    "own": lambda n: {"score": RelativeBias(torch.randn(n.heads, 128, generator=n.generator))},
    "function": lambda _: {"score": halved_in_the_past},
    "hides": lambda _: {"score": hides_rows},
    "own_softcap": lambda n: SCORES["softcap"](n) | SCORES["own"](n),
}
# Block masks, by rules and by maps.
BLOCKS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "none": lambda _: {},
    "causal": lambda n: n.block_mask(Causal()),
    "window": lambda n: n.block_mask(SlidingWindow(150, 20)),
    "document": lambda n: n.block_mask(Document(n.document_ids() // 3) & Causal()),
    "function": lambda n: n.block_mask(checkerboard),
    "small": lambda n: n.block_mask(Causal(), 64),
    "large": lambda n: n.block_mask(SlidingWindow(150, 20), (384, 256)),
    "taller": lambda n: n.block_mask(Causal(), (512, 128)),
    "random": lambda n: n.random_blocks(0.4),
    "random_small": lambda n: n.random_blocks(0.3, block_size=(64, 64)),
    "random_causal": lambda n: n.random_blocks(0.6, Causal()),
    "all": lambda n: n.random_blocks(1.0),
    "nothing": lambda n: n.random_blocks(0.0),
}

DIMS = (
    *((dim, dim) for dim in (8, 16, 24, 32, 40, 48, 72, 80, 96, 104, 128, 160, 192, 224, 256)),
    *((192, 128), (64, 256), (256, 64), (40, 104), (128, 8)),
)
LENGTHS = (
    *((1, 1), (1, 200), (200, 1), (5, 0), (0, 5), (3, 16), (16, 3), (63, 64), (64, 65), (65, 63)),
    *((128, 128), (129, 127), (127, 257), (257, 129)),
)
RAGGED = ((40, 33), (0, 7), (1, 150), (7, 0), (0, 0), (130, 70), (64, 64))


def singles() -> Iterator[Case]:
    """Every feature by itself, every head dim sampled, every awkward length."""
    yield Case("bfloat16")
    yield Case("float16", dtype="float16")
    yield Case("softmax_scale", softmax_scale=0.3)
    yield Case("large_scores", softmax_scale=4.0)
    for dims in DIMS:
        lengths = ((140, 100),) if max(dims) > 128 else ((137, 150),)
        yield Case(f"dims_{dims[0]}_{dims[1]}", lengths, dims=dims, mask="causal")
    for q, k in LENGTHS:
        yield Case(f"lengths_{q}_{k}", ((q, k),))
        yield Case(f"lengths_{q}_{k}_causal", ((q, k),), mask="causal")
    yield Case("batch_0", ())
    yield Case("batch_5", ((20, 30),) * 5)
    for mask in list(MASKS)[1:]:
        yield Case(f"mask_{mask}", mask=mask)
    for score in list(SCORES)[1:]:
        yield Case(f"score_{score}", score=score)
    yield Case("score_hides_whole_blocks", ((40, 400),), score="hides")
    for heads in ((6, 2), (4, 1), (3, 3), (1, 1)):
        yield Case(f"heads_{heads[0]}_{heads[1]}", heads=heads)
    for layout in ("heads_first", "sliced", "interleaved"):
        yield Case(f"layout_{layout}", layout=layout)
        yield Case(f"layout_{layout}_varlen", RAGGED, varlen=True, layout=layout)
    yield Case("varlen", RAGGED, varlen=True)
    yield Case("varlen_causal", RAGGED, varlen=True, mask="causal")
    yield Case("varlen_one", ((131, 99),), varlen=True)
    for used in ("q", "k", "qk"):
        yield Case(f"used_{used}", RAGGED, varlen=True, used=used)
        yield Case(f"used_{used}_causal", RAGGED, varlen=True, used=used, mask="causal")
    # Rows out of use whose window would begin beyond the keys.
    yield Case("used_window", ((520, 10),), varlen=True, used="qk", mask="window")
    for p in (0.1, 0.5):
        yield Case(f"dropout_{p}", dropout=p)
    yield Case("dropout_varlen", RAGGED, varlen=True, dropout=0.3)
    yield Case("sink", sink=True)
    yield Case("sink_without_keys", ((140, 20),), sink=True, mask="causal")
    yield from special()
    yield from few_rows()
    yield from split()
    yield from blocked()


def special() -> Iterator[Case]:
    """Rows and keys whose gradients need a thought; others stand among the lengths and used lengths."""
    yield Case("keys_unseen", ((140, 400),), mask="window")
    yield Case("rows_without_keys", ((300, 70),), mask="causal")
    yield Case("sink_alone", ((140, 0),), sink=True)
    yield Case("scores_near_overflow", dtype="float16", softmax_scale=1200.0)


def blocked() -> Iterator[Case]:
    """Block masks: rules and maps, lengths that no block divides, and the features beside them."""
    several, one = ((200, 330),) * 2, ((200, 270),)
    for blocks in BLOCKS:
        if blocks != "none":
            yield Case(f"blocks_{blocks}", several, blocks=blocks)
    yield Case("blocks_whole", ((256, 384),), blocks="random_causal")
    yield Case("blocks_tall", ((410, 130),), blocks="causal", heads=(1, 1))
    for q, k in ((1, 1), (0, 5), (5, 0), (128, 129), (257, 127)):
        yield Case(f"blocks_lengths_{q}_{k}", ((q, k),), blocks="random_causal")
    for dims in ((96, 96), (128, 128), (192, 128), (256, 256)):
        name = f"blocks_dims_{dims[0]}_{dims[1]}"
        yield Case(name, one, dims=dims, blocks="random_causal", dtype="float16")
    yield Case("blocks_gqa", one, heads=(4, 2), blocks="random")
    yield Case("blocks_dropout", one, blocks="random_causal", dropout=0.3)
    yield Case("blocks_dropout_128", one, dims=(128, 128), blocks="document", dropout=0.3)
    yield Case("blocks_sink", one, blocks="random", sink=True)
    yield Case("blocks_score", one, blocks="random_causal", score="own_softcap", layout="sliced")


def few_rows() -> Iterator[Case]:
    """Few queries and several heads to a KV head, which kernels may put into one tile."""
    few = Case("few_rows", ((5, 200), (5, 200)), heads=(6, 2), mask="causal")
    yield few
    for heads in ((2, 1), (8, 1), (24, 1), (40, 2)):
        yield replace(few, name=f"few_rows_heads_{heads[0]}_{heads[1]}", heads=heads)
    yield replace(few, name="few_rows_one", seqlens=((1, 300),) * 2, heads=(16, 2), mask="full")
    yield replace(few, name="few_rows_128", dims=(128, 128), heads=(8, 1))
    yield replace(few, name="few_rows_192_128", dims=(192, 128), dtype="float16")
    yield replace(few, name="few_rows_varlen", seqlens=RAGGED, varlen=True, heads=(8, 2))
    yield replace(few, name="few_rows_varlen_few", seqlens=((3, 70), (0, 9), (6, 0), (5, 130)), varlen=True)
    used = ((9, 70), (7, 150))
    yield replace(few, name="few_rows_used", seqlens=used, varlen=True, used="qk", layout="sliced")
    yield replace(few, name="few_rows_sink", sink=True, heads=(9, 3))
    yield replace(few, name="few_rows_dropout", dropout=0.3, heads=(32, 2))
    yield replace(few, name="few_rows_alibi", score="alibi_per_batch", heads=(24, 1))
    yield replace(few, name="few_rows_own", score="own_softcap", mask="own")
    yield replace(few, name="few_rows_mask_by_head", mask="by_head", heads=(4, 1))
    yield replace(few, name="few_rows_blocks", mask="full", blocks="random_causal")
    yield replace(few, name="few_rows_layout", layout="interleaved", dims=(40, 104))


def split() -> Iterator[Case]:
    """Keys in parts: fewer and more parts than blocks of keys, rows without keys, what joins once."""
    several, many = Case("split", ((20, 520), (20, 520)), splits=3), ((140, 520),)
    yield several
    yield replace(several, name="split_causal", mask="causal", splits=4)
    yield replace(several, name="split_empty", seqlens=((70, 130),), splits=7, heads=(4, 2))
    yield replace(several, name="split_no_keys", seqlens=((70, 20),), splits=2, mask="causal", sink=True)
    yield replace(several, name="split_without_keys", seqlens=((7, 0),), splits=2)
    yield replace(several, name="split_window", seqlens=many, mask="wide_window")
    own = replace(several, name="split_own", mask="own", score="own_softcap", dims=(40, 104))
    yield replace(own, seqlens=many, dtype="float16")
    yield replace(several, name="split_varlen", seqlens=((3, 500), *RAGGED), varlen=True, mask="causal")
    yield replace(several, name="split_used", seqlens=RAGGED, varlen=True, used="qk", sink=True, splits=2)
    yield replace(several, name="split_dropout", seqlens=many, dropout=0.3, sink=True, heads=(4, 1))
    yield replace(several, name="split_blocks", seqlens=((200, 520),), blocks="random", splits=3)
    yield replace(several, name="split_blocks_rule", seqlens=((200, 520),), blocks="random_causal", splits=4)
    yield replace(several, name="split_128", dims=(128, 128), mask="causal", heads=(8, 1), splits=5)
    yield replace(several, name="split_192_128", dims=(192, 128), heads=(5, 1), layout="sliced")
    yield replace(several, name="split_256", seqlens=many, dims=(256, 256), mask="causal")
    yield replace(several, name="split_few", seqlens=((1, 600),) * 3, heads=(16, 2), splits=4)
    yield replace(several, name="split_many", seqlens=((1, 5000),), dims=(8, 8), splits=39)
    yield replace(several, name="split_by_itself", seqlens=((1, 3000),), splits=None)


PAIRED: dict[str, tuple[Any, ...]] = {
    "dims": ((64, 64), (128, 128), (40, 40), (192, 128), (256, 256), (96, 256)),
    "mask": ("full", "causal", "window", "prefix_per_batch", "document_causal", "own"),
    "score": ("plain", "softcap", "alibi", "own_softcap"),
    "rows": ("dense", "varlen", "used_k", "used_qk"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "size": ("wide", "tall", "ragged", "few"),
    "layout": ("packed", "heads_first", "sliced"),
    "dropout": (0.0, 0.5),
    "sink": (False, True),
    "dtype": ("bfloat16", "float16"),
}
# Size -> lengths of dense and of packed sequences. All but the few rows take the kernel for many.
SIZED = {
    "wide": (((137, 150), (137, 150)), ((137, 150), (1, 77))),
    "tall": (((140, 70),), ((140, 70), (0, 30), (33, 33))),
    "ragged": (((131, 143), (131, 143)), RAGGED),
    "few": (((20, 150), (20, 150)), ((20, 150), (7, 0), (1, 77))),
}


def pairs() -> Iterator[Case]:
    """Cases in which every two values of PAIRED meet that do not meet in one of the singles."""
    for i, chosen in enumerate(pairwise(PAIRED, map(row_of, singles()))):
        rows = chosen.pop("rows")
        varlen, used = rows != "dense", rows.partition("_")[2]
        lengths = SIZED[chosen.pop("size")][varlen]
        case = Case("", lengths, varlen=varlen, used=used, **chosen)
        yield replace(case, name=f"pair_{i}_" + "_".join(_words(case)))


def row_of(case: Case) -> dict[str, Any]:
    """The values of PAIRED that a case has; none where it also has what is not paired."""
    if case.blocks != "none" or case.splits or case.softmax_scale is not None:
        return {}
    sizes = (size for size, lengths in SIZED.items() if lengths[case.varlen] == case.seqlens)
    rows = f"used_{case.used}" if case.used else "varlen" if case.varlen else "dense"
    row = {name: getattr(case, name, None) for name in PAIRED} | {"rows": rows, "size": next(sizes, None)}
    return {name: value for name, value in row.items() if value in PAIRED[name]}


def _words(case: Case) -> Iterator[str]:
    """What distinguishes a case from the default one, in words."""
    yield f"{case.dims[0]}_{case.dims[1]}"
    for field in fields(Case):
        value = getattr(case, field.name)
        if field.name not in ("name", "seqlens", "dims") and value != field.default:
            word = str(value).strip("()").replace(", ", "_")
            yield field.name if isinstance(value, (bool, float)) else word


def pairwise(
    parameters: dict[str, tuple[Any, ...]], known: Iterable[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Rows of chosen values such that every two values of two parameters meet in a row, or a known one.

    Greedy and without chance: a row starts at the first two that have not met; every further value is the one
    that meets most others for the first time, then the one used least so far.
    """
    todo = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(parameters, 2)
        for x in parameters[a]
        for y in parameters[b]
    }
    for row in known:
        todo -= met_in(row)
    order = {(name, value): i for name in parameters for i, value in enumerate(parameters[name])}
    rows: list[dict[str, Any]] = []
    while todo:
        seed = min(todo, key=lambda pair: sorted((list(parameters).index(n), order[n, v]) for n, v in pair))
        row = dict(seed)
        for name in parameters:
            if name not in row:
                met = [(_new_pairs(todo, row, name, value), value) for value in parameters[name]]
                used = Counter(earlier[name] for earlier in rows)
                row[name] = min(met, key=lambda option: (-option[0], used[option[1]]))[1]
        todo -= met_in(row)
        rows.append({name: row[name] for name in parameters})
    return rows


def met_in(row: dict[str, Any]) -> set[frozenset]:
    """The pairs of values of a row."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def _new_pairs(todo: set, row: dict[str, Any], name: str, value: Any) -> int:
    return sum(frozenset([(name, value), chosen]) in todo for chosen in row.items())


CASES = {case.name: case for case in (*singles(), *pairs())}

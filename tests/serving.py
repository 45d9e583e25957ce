"""Cases whose keys lie in a cache, from a Case to tensors and a call: rows of the cache in another order, or
pages all over it. Whatever no sequence uses is NaN, and numbers of pages that nobody may look up are wild.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cute_flash import repeat
from cute_flash.arch.problem import KvCache
from cute_flash.request import Options, Packing
from tests import harness
from tests.cases import MASKS, SCORES, Case, Sizes
from tests.harness import moved, where

WILD = 1 << 30  # where no page is


@dataclass(frozen=True)
class Cached(Case):
    """seqlens: (queries, keys in use) of each sequence; queries all equal unless varlen.

    cache: where keys lie; latent: v is k's first columns. room: keys for which there is room beyond the
    longest sequence.
    """

    cache: KvCache = KvCache()
    used: str = "k"
    room: int = 30


class CachedCall(harness.Call):
    """A case as tensors: `tensors` and `arguments` as the oracle has them, a sequence's keys in a row."""

    @classmethod
    def make(cls, case: Cached, seed: int = 0) -> CachedCall:
        """Fresh normal inputs, NaN beyond the keys in use."""
        generator = torch.Generator().manual_seed(seed)
        lengths = {"q": [q for q, _ in case.seqlens], "k": [k for _, k in case.seqlens]}
        longest = {name: max(lengths[name], default=0) for name in lengths}
        sizes = Sizes(len(case.seqlens), case.heads[0], longest["q"], longest["k"] + case.room, generator)
        arguments = MASKS[case.mask](sizes) | SCORES[case.score](sizes)
        rows = {"q": (len(case.seqlens), longest["q"]), "k": (len(case.seqlens), longest["k"])}
        if case.varlen:
            starts = {name: torch.tensor([0, *lengths[name]]).cumsum(0).int() for name in lengths}
            arguments |= {f"cu_seqlens_{name}": starts[name] for name in lengths}
            rows = {name: (sum(lengths[name]),) for name in lengths}
        else:
            arguments["seqused_k"] = torch.tensor(lengths["k"], dtype=torch.int32)
        if case.sink:
            arguments["learnable_sink"] = torch.randn(case.heads[0], generator=generator)
        if case.softmax_scale is not None:
            arguments["softmax_scale"] = case.softmax_scale
        tensors = {}
        for name, side, head, dim in (("q", "q", 0, 0), ("k", "k", 1, 0), ("v", "k", 1, 1)):
            shape = (*rows[side], case.heads[head], case.dims[dim])
            tensors[name] = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
        if case.cache.latent:
            tensors["v"] = tensors["k"][..., : case.dims[1]]
        call = cls(case, tensors, arguments)
        for name in "kv":
            for keys, length in zip(call.sequences(name), lengths["k"], strict=True):
                keys[length:] = math.nan
        return call

    def sequences(self, name: str) -> tuple[torch.Tensor, ...]:
        """The rows of each sequence of k or v."""
        return harness._sequences(self.case, self.tensors[name], [k for _, k in self.case.seqlens])

    def run(self, device: str, **emulator_options: Any):
        """(out, lse) of cute_flash on `device`, from and into poisoned surroundings, on the CPU."""
        case, q = self.case, self.tensors["q"]
        blank = torch.full((*q.shape[:-1], case.dims[1]), math.nan, dtype=q.dtype)
        k, v, packing = self.cache()
        placed = self._placed({"q": q, "k": k, "v": v, "out": blank}, device)
        views = {name: placed[name].view for name in "qkv"}
        if case.cache.latent:
            views["v"] = views["k"][..., : case.dims[1]]
        packing = packing._replace(**{n: moved(x, device) for n, x in packing._asdict().items()})
        told = {name: moved(value, device) for name, value in self.arguments.items()}
        told = {name: x for name, x in told.items() if not name.startswith(("cu_seqlens", "seqused"))}
        options = Options(
            dropout_p=case.dropout, softmax_scale=told.pop("softmax_scale", None),
            causal=told.pop("causal", False),
            window_size=told.pop("window_size", (-1, -1)), softcap=told.pop("softcap", 0.0),
            alibi_slopes=told.pop("alibi_slopes", None), mask=told.pop("mask", None),
            score=told.pop("score", None), learnable_sink=told.pop("learnable_sink", None), lse=True,
            out=placed["out"].view, num_splits=case.splits, deterministic=case.deterministic,
        )  # fmt: skip
        assert not told, told
        with harness.unchanged({name: placed[name] for name in "qkv"}), where(device, **emulator_options):
            out, lse = repeat.forward(*views.values(), packing, options)
        placed["out"].assert_surroundings_untouched()
        return out.cpu(), lse.cpu()

    def cache(self) -> tuple[torch.Tensor, torch.Tensor, Packing]:
        """k and v as a cache, and what finds a sequence's keys there."""
        generator, cache = torch.Generator().manual_seed(1), self.case.cache
        lengths = [k for _, k in self.case.seqlens]
        given: dict[str, Any] = {"cu_seqlens_q": self.arguments.get("cu_seqlens_q"), "cached": True}
        given |= {"max_seqlen_q": max(q for q, _ in self.case.seqlens)}
        places, first = self._pages(generator) if cache.page_size else self._rows(generator)
        given |= first
        used = torch.tensor(lengths, dtype=torch.int32)
        if cache.leftpad:
            used = used + given["cache_leftpad"]
        given |= {"cu_seqlens_k": None, "seqused_q": None, "seqused_k": used}
        given |= {"max_seqlen_k": max(used.tolist(), default=0)}
        count, size = max(int(each[:, 0].max()) for each in places if len(each)) + 2, self._size()
        found = []
        for name in "kv":
            whole = torch.full((count, size, *self.tensors[name].shape[-2:]), math.nan)
            whole = whole.to(self.tensors[name].dtype)
            for at, keys in zip(places, self.sequences(name), strict=True):
                whole[at[:, 0], at[:, 1]] = keys[: len(at)]
            found.append(whole)
        return *found, Packing(**given)

    def _size(self) -> int:
        """Keys of a page, or of a row of the cache."""
        longest = max(k for _, k in self.case.seqlens)
        return self.case.cache.page_size or longest + self.case.room

    def _rows(self, generator: torch.Generator) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """(row, place) of every key, and what finds them."""
        batch, given = len(self.case.seqlens), {}
        rows, pads = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
        if self.case.cache.batch_idx:
            rows = torch.randperm(2 * batch, generator=generator)[:batch]
            given["cache_batch_idx"] = rows.int()
        if self.case.cache.leftpad:
            pads = torch.randint(0, self.case.room, (batch,), generator=generator)
            given["cache_leftpad"] = pads.int()
        places = [
            torch.stack((row.expand(keys), pad + torch.arange(keys)), dim=1)
            for row, pad, (_, keys) in zip(rows, pads, self.case.seqlens, strict=True)
        ]
        return places, given

    def _pages(self, generator: torch.Generator) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """(page, place) of every key, and what finds them."""
        size, lengths = self.case.cache.page_size, [k for _, k in self.case.seqlens]
        most = -(-(max(lengths) + self.case.room) // size)
        pages = torch.randperm(most * len(lengths) + 3, generator=generator)[: most * len(lengths)]
        pages = pages.view(len(lengths), most)
        places = []
        for row, length in zip(pages, lengths, strict=True):
            keys = torch.arange(length)
            places.append(torch.stack((row[keys // size], keys % size), dim=1))
        table = pages.int().clone()
        for row, length in zip(table, lengths, strict=True):
            row[-(-length // size) :] = WILD
        return places, {"block_table": table}


def cached(name: str, case: Cached | None = None, **changes: Any) -> Cached:
    """A case, by default of two sequences in a cache, with changes."""
    return replace(case or Cached("", ((20, 150), (20, 77))), name=name, **changes)


def paged(name: str, page_size: int, **changes: Any) -> Cached:
    """The same of pages."""
    return cached(name, cache=KvCache(page_size), **changes)


harness.MAKERS[Cached] = CachedCall
EVERYTHING = KvCache(batch_idx=True, leftpad=True)
DECODE, FEW = ((1, 300), (1, 7), (1, 0)), ((5, 600), (5, 260))
RAGGED = ((3, 200), (40, 33), (0, 7), (1, 1), (5, 0))
CASES = {
    case.name: case
    for case in (
        cached("rows"),
        cached("rows_moved", mask="causal", heads=(4, 2), cache=EVERYTHING),
        cached("rows_varlen", seqlens=RAGGED, varlen=True, mask="causal", cache=EVERYTHING),
        cached("rows_decode", seqlens=((1, 200), (1, 7)), heads=(8, 2), dims=(128, 128), splits=3),
        cached("rows_window", mask="window", score="softcap", sink=True, cache=EVERYTHING),
        # A tile of keys takes several pages, parts of one, one and a part of another.
        paged("pages_16", 16),
        paged("pages_16_decode", 16, seqlens=DECODE, heads=(8, 2), dims=(128, 128), splits=3),
        paged("pages_24_varlen", 24, seqlens=RAGGED, varlen=True, mask="causal", heads=(4, 2)),
        paged("pages_40_dims", 40, dims=(40, 104), mask="own", score="alibi_per_batch"),
        paged("pages_64_wide", 64, dims=(256, 256), mask="causal", dtype="float16", seqlens=((140, 300),)),
        paged("pages_256", 256, seqlens=FEW, dims=(192, 128), mask="window", score="softcap"),
        # No whole piece of shared memory lies in one page.
        paged("pages_1", 1, seqlens=((1, 40), (1, 1)), heads=(8, 2), splits=2),
        paged("pages_7_varlen", 7, seqlens=RAGGED, varlen=True, mask="causal", heads=(4, 2)),
    )
}

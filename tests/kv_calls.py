"""Calls on KV caches: a case as tensors, and the call held to the oracle, caches bit for bit.

Keys that no sequence has are NaN, in rows and pages in use and beside them; so is everything around tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import cute_flash
from cute_flash.appending import Appended, answer, new
from cute_flash.kv_cache import Append
from tests.accuracy import assert_accurate
from tests.harness import Poisoned, moved, unchanged, where
from tests.kv_reference import Seen, appended, places

WILD = 1 << 30  # where no page is


@dataclass(frozen=True)
class KvCase:
    """lengths: keys in the cache. new: keys that are appended; None: no k and v. queries: of each sequence.

    heads: of q, and of keys. rotary: (numbers that are rotated, interleaved). page: keys of one; None: rows.
    rows, leftpad, packed: cache_batch_idx, cache_leftpad and cu_seqlens_q are given. elsewhere:
    rotary_seqlens are. arguments: of the function, besides. scheduled: the upper bound for parts of keys that
    scheduler_metadata is made with; None: there is none.
    """

    name: str
    lengths: tuple[int, ...] = (3, 0, 17)
    new: int | None = 5
    queries: tuple[int, ...] = (7, 7, 7)
    dims: tuple[int, int] = (64, 64)
    dtype: str = "bfloat16"
    heads: tuple[int, int] = (4, 2)
    rotary: tuple[int, bool] | None = None
    page: int | None = None
    rows: bool = False
    leftpad: bool = False
    packed: bool = False
    elsewhere: bool = False
    layout: str = "packed"
    arguments: dict[str, Any] = field(default_factory=dict)
    scheduled: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def steps(self) -> bool:
        """Whether queries are rotated one behind the other."""
        told = self.arguments
        return told.get("causal", False) or "mask" in told or "window_size" in told


class KvCall:
    """A case as tensors in poisoned surroundings of a device, and what they were on the CPU."""

    def __init__(self, case: KvCase, device: str) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        self.numbers = _numbers(case, generator)
        self.tensors = _tensors(case, self.numbers, generator)
        layouts = {name: case.layout if x.ndim == 4 else "packed" for name, x in self.tensors.items()}
        self.read = {name: Poisoned.holding(x, layouts[name], device) for name, x in self.tensors.items()}
        self.caches = {name: self.read.pop(name) for name in ("k_cache", "v_cache")}
        self.interleaved = bool(case.rotary and case.rotary[1])

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments of the function, on the device."""
        found = {name: x.view for name, x in (self.read | self.caches).items()}
        return found | {name: moved(x, self.device) for name, x in self.numbers.items()}

    def expected(self) -> tuple[Seen, dict[str, torch.Tensor]]:
        """What attention is to be computed of, and the storages of the caches afterwards."""
        after = {name: cache.storage.cpu().clone() for name, cache in self.caches.items()}
        views = {name: cache.view_of(after[name]) for name, cache in self.caches.items()}
        told = {"rotary_interleaved": self.interleaved, "steps": self.case.steps}
        return appended(**self.tensors | self.numbers | views, **told), after

    def assert_caches(self, after: dict[str, torch.Tensor]) -> None:
        """All of the caches' storages, bit for bit."""
        for name, cache in self.caches.items():
            assert torch.equal(after[name].view(torch.int16), cache.storage.cpu().view(torch.int16)), name

    def append(self, **options: Any) -> Appended:
        """What the append kernel alone does."""
        given, case = self.given, self.case
        call = Append(
            given["k_cache"], given["v_cache"], given["k"], given["v"], given["cache_seqlens"],
            given.get("cache_batch_idx"), given.get("block_table"), given["q"] if case.rotary else None,
            given.get("cu_seqlens_q"), max(case.queries), given.get("rotary_cos"), given.get("rotary_sin"),
            given.get("rotary_seqlens"), self.interleaved, int(case.steps),
        )  # fmt: skip
        found = new(call)
        with where(self.device, **options), unchanged(self.read):
            answer(call, found)
        return found

    def check(self, **options: Any) -> None:
        """Call the function, and hold out and lse to the accuracy rule, and the caches to the oracle."""
        case = self.case
        seen, after = self.expected()
        arguments = {name: moved(x, self.device) for name, x in case.arguments.items()}
        if case.packed:
            arguments["max_seqlen_q"] = max(case.queries)
        with where(self.device, **options), unchanged(self.read):
            if case.scheduled is not None:
                arguments["scheduler_metadata"] = self.metadata()
            out, lse = cute_flash.flash_attn_with_kvcache(
                **self.given, **arguments, rotary_interleaved=self.interleaved, return_softmax_lse=True
            )
        self.assert_caches(after)
        if not case.packed:
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        told = {name: value for name, value in case.arguments.items() if name != "num_splits"}
        starts = {"cu_seqlens_q": seen.cu_seqlens_q, "cu_seqlens_k": seen.cu_seqlens_k}
        assert_accurate(out.cpu(), lse.cpu(), seen[:3], **told, **starts)

    def metadata(self) -> cute_flash.SchedulerMetadata:
        """What calls of the case are scheduled by."""
        case, given = self.case, self.given
        return cute_flash.get_scheduler_metadata(
            len(case.lengths), max(case.queries), _room(case), *case.heads, case.dims[0],
            given["cache_seqlens"], getattr(torch, case.dtype), case.dims[1], given.get("cu_seqlens_q"),
            given.get("cache_leftpad"), case.page, case.new or 0, case.arguments.get("causal", False),
            num_splits=case.scheduled,
        )  # fmt: skip


def _numbers(case: KvCase, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """int32 arguments, on the CPU."""
    batch, room = len(case.lengths), _room(case)
    found = {"cache_seqlens": torch.tensor(case.lengths)}
    if case.rows:
        found["cache_batch_idx"] = torch.randperm(2 * batch, generator=generator)[:batch]
    if case.leftpad:
        shares = torch.rand(batch, generator=generator)
        found["cache_leftpad"] = (shares * (found["cache_seqlens"] + 1)).long()
    if case.page:
        each = -(-room // case.page)
        table = torch.randperm(batch * each + 2, generator=generator)[: batch * each].view(batch, each)
        for pages, length in zip(table, case.lengths, strict=True):
            pages[-(-(length + (case.new or 0)) // case.page) :] = WILD
        found["block_table"] = table
    if case.elsewhere:
        found["rotary_seqlens"] = torch.randint(0, 9, (batch,), generator=generator)
    if case.packed:
        found["cu_seqlens_q"] = torch.tensor([0, *case.queries]).cumsum(0)
    return {name: numbers.int() for name, numbers in found.items()}


def _tensors(
    case: KvCase, numbers: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Fresh normal numbers; caches hold keys where sequences have some, else NaN."""
    batch, room, dtype = len(case.lengths), _room(case), getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = (sum(case.queries),) if case.packed else (batch, case.queries[0])
    dims = {"k": case.dims[0], "v": case.dims[1]}
    found = {"q": normal(*rows, case.heads[0], dims["k"])}
    shape = ((1 + case.rows) * batch, room)
    if case.page:
        shape = (batch * -(-room // case.page) + 2, case.page)
    for name, dim in dims.items():
        cache = found[f"{name}_cache"] = torch.full((*shape, case.heads[1], dim), math.nan, dtype=dtype)
        for b, length in enumerate(case.lengths):
            first = int(numbers["cache_leftpad"][b]) if case.leftpad else 0
            table, at = numbers.get("block_table"), numbers.get("cache_batch_idx")
            keys = places(cache, b, torch.arange(first, length), table, at)
            cache[keys] = normal(length - first, case.heads[1], dim)
        if case.new is not None:
            found[name] = normal(batch, case.new, case.heads[1], dim)
    if case.rotary:
        positions = room + (case.page or 0) + max(case.queries)
        angles = torch.rand(positions, case.rotary[0] // 2, generator=generator) * 6.3
        found |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    return found


def _room(case: KvCase) -> int:
    """Keys of a row of the cache."""
    return max(case.lengths) + (case.new or 0) + 20

"""Block masks: which blocks of scores are computed at all, and in which of them a mask rule is evaluated.

    empty     no query of the block sees a key of it: not visited
    full      every query sees every key: visited, the rule is not evaluated
    partial   anything else: visited, the rule is evaluated

(FlexAttention's BlockMask: Dong et al. 2024, section 4.2.) `create_block_mask` finds them from a rule,
`BlockMask.from_blocks` takes them as given. Neither holds a value per pair of query and key: a rule's
bounds decide most blocks, the rest are evaluated a few at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from . import rules, scalars
from .arch.common.mask import Mask
from .arch.rule import Rule, describe

BLOCKS_AT_ONCE = 1 << 20  # blocks that are told apart together
PAIRS_AT_ONCE = 1 << 22  # pairs of query and key for which a rule is evaluated together


@dataclass(frozen=True, eq=False)
class BlockMask:
    """What each block of query rows visits. Made by `create_block_mask` or `from_blocks`.

    counts: int32 (batch or 1, heads or 1, row blocks, 2), how many partial and how many full blocks of
        keys are visited. heads: of q; 1 stands for "the same for all".
    indices: int32 (batch or 1, heads or 1, row blocks, most visited): which; first the partial ones,
        then the full ones, each from the last to the first; 0 where there are no more.
    block_size: (block_q, block_k), rows of q and of k. seqlens: (seqlen_q, seqlen_k) of the calls that
        it is for. mask: the rule of partial blocks, or None.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    block_size: tuple[int, int]
    seqlens: tuple[int, int]
    mask: Any = None

    @staticmethod
    def from_blocks(
        visit: torch.Tensor,
        full: torch.Tensor | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
        seqlens: tuple[int, int] | None = None,
        mask: Any = None,
    ) -> BlockMask:
        """A block mask from a map of blocks, say one that was learned.

        visit: bool (row blocks, key blocks), or (batch or 1, heads or 1, row blocks, key blocks): which
            are visited.
        full: bool, of the same shape: those of which `mask` shows every pair, so that it need not be
            evaluated; it may be all the same. None: none of them where there is a mask.
        block_size: (block_q, block_k), or one number for both.
        seqlens: (seqlen_q, seqlen_k) of the calls; None: all blocks are whole.
        mask: a rule that must show a pair besides, as in `flash_attn_func`, or None: all of a visited
            block is seen.

        Raises TypeError and ValueError, naming the argument.
        """
        block_size = _pair("block_size", block_size)
        visit, full = _maps(visit, full)
        *_, q_blocks, k_blocks = visit.shape
        seqlens = (q_blocks * block_size[0], k_blocks * block_size[1]) if seqlens is None else seqlens
        seqlens = _checked_seqlens(seqlens, block_size, (q_blocks, k_blocks))
        if mask is None:
            full = visit.clone()
        else:
            rules.part_of(mask, Mask, "mask")
            full = torch.zeros_like(visit) if full is None else full.clone()
        if seqlens[1] % block_size[1]:
            full[..., -1] = False  # its last keys do not exist
        return BlockMask(*_lists(visit, full), block_size, seqlens, mask)._for_training()

    @property
    def k_blocks(self) -> int:
        """Blocks of keys there are."""
        return -(-self.seqlens[1] // self.block_size[1])

    def to(self, device: str | torch.device) -> BlockMask:
        """The same on another device, with the tensors of its rule."""
        mask = self.mask
        if isinstance(mask, Rule):
            kind, values = describe(mask)
            mask = kind.build(tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values))
        moved = replace(self, counts=self.counts.to(device), indices=self.indices.to(device), mask=mask)
        if "transposed" in vars(self):
            vars(moved)["transposed"] = tuple(lists.to(device) for lists in self.transposed)
        if "turns" in vars(self):
            vars(moved)["turns"] = self.turns.to(device)
        return moved

    def _for_training(self) -> BlockMask:
        """Itself, with its lists by keys where gradients are enabled: torch.compile could not make them."""
        if torch.is_grad_enabled():
            self.transposed  # noqa: B018
        return self

    @functools.cached_property
    def transposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(counts, indices) of what each block of keys is visited by, for backward passes.

        Made once: with the block mask where gradients are enabled, else by the first call that needs one.

        int32 (batch or 1, heads or 1, key blocks, 2) and (batch or 1, heads or 1, key blocks, most visits),
        in the same order. A last row block that is not whole counts as partial: so it comes first.
        """
        visit, full = self.blocks()
        if self.seqlens[0] % self.block_size[0]:
            full[..., -1:, :] = False
        step = max(1, BLOCKS_AT_ONCE // max(1, visit[..., :1].numel()))
        pieces = zip(visit.split(step, -1), full.split(step, -1), strict=True)
        return _joined([_lists(some.mT, whole.mT) for some, whole in pieces])

    @functools.cached_property
    def turns(self) -> torch.Tensor:
        """int32, like the indices of `transposed`: the order of key blocks that a listed row block visits.

        1 + the last such key block before the list's own, 0 where there is none; built once.
        """
        (visit, _), (_, indices) = self.blocks(), self.transposed
        number = torch.arange(1, self.k_blocks + 1, dtype=torch.int32, device=visit.device)
        last = torch.where(visit, number, 0).cummax(-1).values  # up to and with each key block
        # One row block more, so that unused places name one where there is none.
        before = torch.nn.functional.pad(last, (1, 0, 0, 1))[..., :-1]
        return before.mT.gather(-1, indices.long()).int().contiguous()

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(visit, full) as `from_blocks` takes them, in four dimensions."""
        return blocks_of(self.counts, self.indices, self.k_blocks)


def blocks_of(counts: torch.Tensor, indices: torch.Tensor, k_blocks: int) -> tuple[torch.Tensor, ...]:
    """(visit, full), bool (..., k_blocks), of the lists of a block mask."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    partial, total = counts[..., :1], counts.sum(-1, keepdim=True)
    kinds = torch.zeros((*counts.shape[:-1], k_blocks + 1), dtype=torch.uint8, device=counts.device)
    kind = torch.where(place < partial, 1, 2).to(torch.uint8)
    kinds.scatter_(-1, torch.where(place < total, indices, k_blocks).long(), kind)
    return kinds[..., :-1] > 0, kinds[..., :-1] == 2


def create_block_mask(
    mask: Any,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    block_size: int | tuple[int, int] = 128,
    device: str | torch.device | None = None,
) -> BlockMask:
    """The block mask of a rule, exactly: no empty block is visited, no full block is evaluated.

    mask: a `Mask` object, or a plain function visible(q, k), as in `flash_attn_func`. A rule that tells
        neither sequences nor heads apart gives one set of lists for all.
    batch, heads, seqlen_q, seqlen_k: of the calls that it is for; heads of q.
    block_size: (block_q, block_k), rows of q and of k, or one number for both.
    device: where the lists go; None: where the rule's tensors are, else torch's default device.

    Raises TypeError and ValueError, naming the argument.
    """
    block_size = _pair("block_size", block_size)
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    for name, size in sizes.items():
        if not scalars.is_integer(size) or size < 0:
            raise ValueError(f"{name} is {size!r}; allowed: an int from 0 on")
    batch, heads, seqlen_q, seqlen_k = map(scalars.integer, sizes.values())
    rule = _rule(mask)
    grid = _Grid.of(rule, (batch, heads), (seqlen_q, seqlen_k), block_size, _device(rule, device))
    pieces = [_lists(*grid.classify(first, last)) for first, last in grid.row_pieces()]
    return BlockMask(*_joined(pieces), block_size, (seqlen_q, seqlen_k), mask)._for_training()


class _Grid(NamedTuple):
    """The blocks of a rule's scores. planes: batch and heads, each 1 where the rule does not depend on it."""

    rule: Rule
    planes: tuple[int, int]
    seqlens: tuple[int, int]
    block_size: tuple[int, int]
    device: torch.device

    @staticmethod
    def of(rule, planes, seqlens, block_size, device) -> _Grid:
        grid = _Grid(rule, planes, seqlens, block_size, device)
        if 0 in seqlens:
            return grid._replace(planes=(1, 1))
        if 0 in planes:
            return grid
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        batch, head = grid._places(2)
        shape = rule.at(batch, head, *seqlens).visible(zero, zero).shape
        seen = (1,) * (4 - len(shape)) + tuple(shape)
        bounds = [(1,) * (3 - bound.ndim) + tuple(bound.shape) for bound in grid._bounds(0, 1)]
        planes = tuple(max(found[i] for found in (seen, *bounds)) for i in range(2))
        return grid._replace(planes=planes)

    def row_pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of row blocks, each few enough to be told apart at once; one at least."""
        q_blocks, k_blocks = (-(-n // size) for n, size in zip(self.seqlens, self.block_size, strict=True))
        step = max(1, BLOCKS_AT_ONCE // max(1, self.planes[0] * self.planes[1] * k_blocks))
        return ((first, min(first + step, q_blocks)) for first in range(0, max(q_blocks, 1), step))

    def classify(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(visit, full), bool (*planes, last - first, key blocks), of the row blocks first <= i < last."""
        seqlen_k, block_k = self.seqlens[1], self.block_size[1]
        start = torch.arange(0, seqlen_k, block_k, device=self.device)
        shape = (*self.planes, last - first, len(start))
        if 0 in self.seqlens:
            nothing = torch.zeros(shape, dtype=torch.bool, device=self.device)
            return nothing, nothing
        low, high, full_low, full_high = (bound[..., None] for bound in self._bounds(first, last))
        visit = (low < high) & (low < start + block_k) & (start < high)
        full = (full_low <= start) & (start + block_k <= full_high) & (start + block_k <= seqlen_k)
        visit, full = (visit | full).broadcast_to(shape).clone(), full.broadcast_to(shape).clone()
        for place in (visit & ~full).nonzero().split(max(1, PAIRS_AT_ONCE // (self.block_size[0] * block_k))):
            where = place.unbind(1)
            visit[where], full[where] = self._evaluate(place, first)
        return visit, full

    def _bounds(self, first: int, last: int) -> list[torch.Tensor]:
        """Low and high end of the keys that row blocks may see, and of those that all their rows see."""
        (seqlen_q, seqlen_k), block_q = self.seqlens, self.block_size[0]
        row = torch.arange(first, last, device=self.device) * block_q
        q_first = row + (seqlen_k - seqlen_q)
        q_last = (row + block_q).clamp(max=seqlen_q) - 1 + (seqlen_k - seqlen_q)
        rule = self.rule.at(*self._places(1), seqlen_q, seqlen_k)
        bounds = (*rule.keys(q_first, q_last, seqlen_k), *rule.full(q_first, q_last, seqlen_k))
        return [torch.as_tensor(bound, device=self.device) for bound in bounds]

    def _places(self, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch and head, to be broadcast with `dims` dimensions that follow them."""
        batch, head = (torch.arange(n, device=self.device) for n in self.planes)
        return batch.view(-1, *[1] * (dims + 1)), head.view(-1, *[1] * dims)

    def _evaluate(self, place: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether any pair is visible, and all are, of blocks at (batch, head, row - first, key block)."""
        (seqlen_q, seqlen_k), (block_q, block_k) = self.seqlens, self.block_size
        batch, head, i, j = (at.view(-1, 1, 1) for at in place.unbind(1))
        row = (i + first) * block_q + torch.arange(block_q, device=self.device).view(-1, 1)
        key = j * block_k + torch.arange(block_k, device=self.device)
        seen = self.rule.at(batch, head, seqlen_q, seqlen_k).visible(row + (seqlen_k - seqlen_q), key)
        seen, exists = seen & (key < seqlen_k), row < seqlen_q
        return (seen & exists).flatten(1).any(1), (seen | ~exists).flatten(1).all(1)


def _lists(visit: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, indices) of maps (batch, heads, row blocks, key blocks)."""
    k_blocks = visit.shape[-1]
    partial, full = visit & ~full, visit & full
    counts = torch.stack([partial.sum(-1), full.sum(-1)], dim=-1)
    total = counts.sum(-1, keepdim=True)
    most = max(1, int(total.max()) if total.numel() else 0)
    block = torch.arange(k_blocks, device=visit.device)
    rank = block + k_blocks * (full + 2 * partial)
    order = torch.nn.functional.pad(rank.argsort(dim=-1, descending=True), (0, max(0, most - k_blocks)))
    listed = torch.arange(most, device=visit.device) < total
    return counts.int(), torch.where(listed, order[..., :most], 0).int().contiguous()


def _joined(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, indices) of one range of row blocks after another."""
    most = max(indices.shape[-1] for _, indices in pieces)
    padded = [torch.nn.functional.pad(indices, (0, most - indices.shape[-1])) for _, indices in pieces]
    return torch.cat([counts for counts, _ in pieces], dim=2), torch.cat(padded, dim=2)


def _maps(visit: Any, full: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The maps of `from_blocks`, checked, in four dimensions."""
    for name, blocks in (("visit", visit), ("full", full)):
        if blocks is None and name == "full":
            continue
        if not isinstance(blocks, torch.Tensor) or blocks.dtype != torch.bool:
            given = getattr(blocks, "dtype", type(blocks).__name__)
            raise TypeError(f"{name} is {given}; allowed: a torch.bool tensor")
        if blocks.ndim not in (2, 4):
            raise ValueError(
                f"{name} has shape {tuple(blocks.shape)}; allowed: (row blocks, key blocks), or four "
                "dimensions with batch and heads in front"
            )
    if full is not None and (full.shape != visit.shape or full.device != visit.device):
        raise ValueError(
            f"full has shape {tuple(full.shape)} on {full.device}, visit has {tuple(visit.shape)} on "
            f"{visit.device}: they must be equal"
        )
    if full is not None and bool((full & ~visit).any()):
        raise ValueError("full has blocks that visit has not; a full block must be visited")
    return tuple(b if b is None or b.ndim == 4 else b[None, None] for b in (visit, full))


def _checked_seqlens(
    seqlens: Any, block_size: tuple[int, int], blocks: tuple[int, int]
) -> tuple[int, int]:
    ranges = [
        ((count - 1) * size + 1 if count else 0, count * size)
        for count, size in zip(blocks, block_size, strict=True)
    ]
    fits = _is_pair(seqlens) and all(low <= n <= high for n, (low, high) in zip(seqlens, ranges, strict=True))
    if not fits:
        q, k = (f"{low} to {high}" for low, high in ranges)
        raise ValueError(
            f"seqlens is {seqlens!r}; allowed for {blocks[0]} x {blocks[1]} blocks of {block_size[0]} x "
            f"{block_size[1]}: ({q}, {k})"
        )
    return tuple(map(scalars.integer, seqlens))


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Two positive ints, from one or two."""
    pair = (value, value) if scalars.is_integer(value) else value
    if not _is_pair(pair) or min(pair) < 1:
        raise ValueError(f"{name} is {value!r}; allowed: an int above 0, or two: (block_q, block_k)")
    return tuple(map(scalars.integer, pair))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(scalars.is_integer, value))


def _rule(mask: Any) -> Rule:
    """The rule that a rule or a plain function stands for."""
    return rules.part_of(mask, Mask, "mask")


def _device(rule: Rule, device: Any) -> torch.device:
    found = [value.device for value in describe(rule)[1] if isinstance(value, torch.Tensor)]
    if device is None:
        return found[0] if found else torch.empty(0).device
    device = torch.empty(0, device=device).device
    for other in found:
        if other != device:
            raise ValueError(f"device is {device}, a tensor of the mask is on {other}: they must be equal")
    return device

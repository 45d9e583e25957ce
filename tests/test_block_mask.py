"""Block masks on the host: made of rules and of maps, against brute force; their lists; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cute_flash import (
    BlockMask,
    Causal,
    Document,
    PrefixLM,
    SlidingWindow,
    block_mask,
    create_block_mask,
    ops,
    request,
    rules,
)
from cute_flash.arch.common.blocks import Listed, Range, listed, part_of, visits_from_keys
from cute_flash.arch.common.mask import Everything, Mask
from cute_flash.arch.elementwise import load
from tests import cases, test_rules
from tests.reference import attention, in_blocks

SIZES = (  # batch, heads, seqlen_q, seqlen_k, block size
    (2, 3, 50, 70, (16, 16)),
    (2, 1, 70, 50, (16, 48)),
    (1, 2, 33, 128, (32, 8)),
    (2, 2, 1, 40, (64, 16)),
)


def rule_of(told: dict[str, Any]) -> Mask:
    """The rule of a call's keyword arguments."""
    left, right = (None if side == -1 else side for side in told.get("window_size", (None, None)))
    parts = rules.mask_of(told.get("causal", False), (left, right), told.get("mask"))
    return reduce(lambda a, b: a & b, parts) if parts else Everything()


def brute_force(rule: Mask, batch, heads, seqlen_q, seqlen_k, block_size) -> Iterator[tuple]:
    """(batch, head, row block, key block), whether it is visited, and full: from every pair."""
    q, k = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(seqlen_k)
    for b, h in product(range(batch), range(heads)):
        seen = rule.at(b, h, seqlen_q, seqlen_k).visible(q, k).broadcast_to(seqlen_q, seqlen_k)
        for i, rows in enumerate(seen.split(block_size[0])):
            for j, pairs in enumerate(rows.split(block_size[1], dim=1)):
                whole = pairs.shape[1] == block_size[1]
                yield (b, h, i, j), bool(pairs.any()), bool(pairs.all()) and whole


def assert_exact(rule: Any, *sizes: Any, by_hand: Mask | None = None) -> None:
    """create_block_mask against brute force, block by block."""
    *counts, block_size = sizes
    made = create_block_mask(rule, *counts, block_size=block_size)
    visit, full = (x.expand(*counts[:2], -1, -1) for x in made.blocks())
    found = 0
    for block, visited, whole in brute_force(by_hand or rule, *sizes):
        assert (visit[block], full[block]) == (visited, whole), f"block {block} of {rule}"
        found += 1
    assert found == visit.numel()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", cases.MASKS)
def test_every_rule_of_the_cases(name, sizes):
    batch, heads, seqlen_q, seqlen_k, _ = sizes
    generator = torch.Generator().manual_seed(0)
    told = cases.MASKS[name](cases.Sizes(batch, heads, seqlen_q, seqlen_k, generator))
    assert_exact(rule_of(told), *sizes)


@pytest.mark.parametrize("rule", test_rules.MASKS, ids=str)
def test_every_rule_of_the_rule_tests(rule):
    assert_exact(rule, 1, 1, 50, 40, (16, 8))


def test_a_plain_function():
    assert_exact(cases.checkerboard, *SIZES[0], by_hand=rule_of({"mask": cases.checkerboard}))


@pytest.mark.parametrize("rule", [test_rules.TooWide(), test_rules.TooNarrow()], ids=str)
def test_wrong_bounds_are_found(rule):
    with pytest.raises(AssertionError, match="block"):
        assert_exact(rule, 1, 1, 64, 64, (16, 1))


@dataclass(frozen=True)
class PerHead(Mask):
    """A window of another width for every head."""

    widths: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return SlidingWindow(load(self.widths, head), 0)


@pytest.mark.parametrize(
    "rule, planes",
    [
        (Causal(), (1, 1)),
        (PrefixLM(torch.tensor([3, 40], dtype=torch.int32)) & Causal(), (2, 1)),
        (Document(torch.arange(140, dtype=torch.int32).view(2, 70) // 9), (2, 1)),
        (PerHead(torch.tensor([3, 50, 20], dtype=torch.int32)), (1, 3)),
        (PerHead(torch.tensor([3, 50, 20])) & PrefixLM(torch.tensor([3, 40])), (2, 3)),
    ],
    ids=str,
)
def test_lists_are_shared_where_a_rule_tells_nothing_apart(rule, planes):
    made = create_block_mask(rule, *SIZES[0][:4], block_size=16)
    assert made.counts.shape[:2] == made.indices.shape[:2] == planes
    assert_exact(rule, *SIZES[0])


@dataclass(frozen=True)
class Counting(Mask):
    """A rule that counts the pairs for which it is asked."""

    rule: Mask
    asked: Any

    def at(self, batch, head, seqlen_q, seqlen_k):
        return Counting(self.rule.at(batch, head, seqlen_q, seqlen_k), self.asked)

    def visible(self, q, k):
        seen = self.rule.visible(q, k)
        self.asked.append(seen.numel())
        return seen

    def keys(self, *row):
        return self.rule.keys(*row)

    def full(self, *row):
        return self.rule.full(*row)


def counted(monkeypatch, rule: Mask, seqlen: int) -> tuple[BlockMask, list[int]]:
    asked: list[int] = []
    monkeypatch.setattr(block_mask, "_device", lambda *_: torch.device("cpu"))
    return create_block_mask(Counting(rule, asked), 4, 4, seqlen, seqlen), asked


@pytest.mark.parametrize("rule, edges, longest", [(Causal(), 1, 512), (SlidingWindow(1000, 0), 3, 9)])
def test_bounds_decide_without_asking(rule, edges, longest, monkeypatch):
    """Of 2**32 pairs those of the few blocks of each row that bounds leave open, and these in pieces."""
    made, asked = counted(monkeypatch, rule, 1 << 16)
    assert sum(asked) <= 512 * edges * 128 * 128 + 1
    assert max(asked) <= block_mask.PAIRS_AT_ONCE
    assert made.counts.shape == (1, 1, 512, 2) and made.indices.shape == (1, 1, 512, longest)


def test_without_bounds_a_piece_at_a_time(monkeypatch):
    ids = torch.arange(1024, dtype=torch.int32).expand(4, -1).contiguous() // 100
    whole = create_block_mask(Document(ids), 4, 4, 1024, 1024)
    monkeypatch.setattr(block_mask, "BLOCKS_AT_ONCE", 3)
    monkeypatch.setattr(block_mask, "PAIRS_AT_ONCE", 2 * 128 * 128)
    made, asked = counted(monkeypatch, Document(ids), 1024)
    assert max(asked) == 2 * 128 * 128 and sum(asked) == 4 * 1024 * 1024 + 4
    assert torch.equal(made.counts, whole.counts) and torch.equal(made.indices, whole.indices)


@pytest.mark.parametrize("sizes", [(0, 2, 9, 9), (2, 2, 0, 9), (2, 2, 9, 0)])
def test_nothing_to_see(sizes):
    made = create_block_mask(Document(torch.zeros(sizes[0], sizes[3]).int()), *sizes, block_size=8)
    assert made.counts.sum() == 0 and made.counts.shape[2:] == (-(-sizes[2] // 8), 2)
    assert made.indices.shape[3] == 1


def rows_of(made: BlockMask) -> Iterator[tuple[list[int], list[int]]]:
    """Counts and indices of every row block."""
    return zip(made.counts.flatten(0, 2).tolist(), made.indices.flatten(0, 2).tolist(), strict=True)


def random_maps(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    visit = torch.rand(shape, generator=generator) < 0.6
    return visit, visit & (torch.rand(shape, generator=generator) < 0.5)


def test_a_map_comes_back():
    visit, full = random_maps(2, 3, 5, 7)
    made = BlockMask.from_blocks(visit, full, block_size=(64, 128), mask=Causal())
    assert made.seqlens == (320, 896) and made.block_size == (64, 128)
    assert all(map(torch.equal, made.blocks(), (visit, full)))
    for counts, indices in rows_of(made):
        partial, last = indices[: counts[0]], indices[counts[0] : sum(counts)]
        assert partial == sorted(partial, reverse=True) and last == sorted(last, reverse=True)
        assert not any(indices[sum(counts) :])


def test_the_map_that_was_given_is_not_kept():
    visit = torch.ones(2, 3, dtype=torch.bool)
    made = BlockMask.from_blocks(visit, visit, seqlens=(256, 300), mask=Causal())
    assert visit.all() and made.blocks()[1].tolist() == [[[[True, True, False]] * 2]]


@pytest.mark.parametrize(
    "told, full",
    [
        ({}, [1, 1, 1]),
        ({"seqlens": (5, 384)}, [1, 1, 1]),
        ({"seqlens": (128, 383)}, [1, 1, 0]),
        ({"mask": Causal()}, [0, 0, 0]),
    ],
)
def test_what_is_full_by_itself(told, full):
    made = BlockMask.from_blocks(torch.ones(1, 3, dtype=torch.bool), **told)
    assert made.blocks()[1].int().tolist() == [[[full]]]


def test_moving():
    made = create_block_mask(Document(torch.zeros(2, 9).int()), 2, 1, 9, 9)
    moved = made.to("meta")
    assert {moved.counts.device.type, moved.indices.device.type, moved.mask.ids.device.type} == {"meta"}
    assert (moved.block_size, moved.seqlens, moved.k_blocks) == ((128, 128), (9, 9), 1)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("keys", [1, 5, 8, 9, 16, 40, 48])
def test_tiles_of_a_list(steps, keys):
    """Each tile of a listed block once that holds keys, the last first; masked where it may have to be."""
    tile_n, block_k = 8, 8 * steps
    k_blocks, tiles = -(-keys // block_k), -(-keys // tile_n)
    visit, full = random_maps(1, 1, 40, k_blocks)
    told = {"block_size": (16, block_k), "seqlens": (40 * 16, keys)}
    for rule in (None, Causal()):
        for counts, indices in rows_of(BlockMask.from_blocks(visit, full, **told, mask=rule)):
            visits = listed(indices, counts, steps, tiles, rule is not None)
            down = [j * steps + t for j in indices[: sum(counts)] for t in reversed(range(steps))]
            assert walked(visits) == [n for n in down if n < tiles]
            evaluated = {n for n, masked in with_phases(visits) if masked}
            assert evaluated >= {n for n in walked(visits) if (n + 1) * tile_n > keys}
            if rule is None:
                assert len(evaluated) <= 1
            else:
                assert {n // steps for n in evaluated} == set(indices[: counts[0]])


def walked(visits: Listed | Range) -> list[int]:
    """Blocks in visiting order, by every way to walk: phases, one after another, all but the first."""
    by_phase = [n for n, _ in with_phases(visits)]
    if not visits.any():
        assert by_phase == []
        return by_phase
    one_by_one, place = [], visits.start
    while visits.inside(place):
        assert visits.is_later(place) == bool(one_by_one)
        one_by_one.append(visits.block(place))
        place = visits.after(place, 1)
    without_first = [n for n, _ in with_phases(visits.rest())]
    assert by_phase == one_by_one == [visits.block(visits.start), *without_first]
    assert len(by_phase) == visits.total and by_phase[-1] == visits.block(visits.end)
    return by_phase


def with_phases(visits: Listed | Range) -> list[tuple[int, bool]]:
    """Blocks in visiting order, and whether their phase is masked."""
    return [
        (visits.block(visits.nth(p, i)), p.masked) for p in visits.phases for i in range(max(0, p.visits))
    ]


def in_lists(counts: torch.Tensor, indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """int (..., rows, blocks), of lists: 1 for a partial block, 2 for a full one, 0 for one not visited."""
    kinds = torch.zeros(*counts.shape[:-1], blocks, dtype=torch.int)
    for row in product(*map(range, counts.shape[:-1])):
        (partial, full), listed = counts[row].tolist(), indices[row].tolist()
        for part, kind in ((listed[:partial], 1), (listed[partial : partial + full], 2)):
            assert part == sorted(set(part), reverse=True), "from the last to the first, none twice"
            kinds[row][part] = kind
    return kinds


def check_transposed(made: BlockMask) -> None:
    """The lists of keys say what those of rows say; a last row block that is not whole is partial."""
    q_blocks, k_blocks = made.counts.shape[2], made.k_blocks
    expected = in_lists(made.counts, made.indices, k_blocks).mT.clone()
    if made.seqlens[0] % made.block_size[0]:
        expected[..., -1] = expected[..., -1].clamp(max=1)
    counts, indices = made.transposed
    assert counts.dtype == indices.dtype == torch.int32 and indices.is_contiguous()
    assert torch.equal(in_lists(counts, indices, q_blocks), expected)


@pytest.mark.parametrize("at_once", [1, block_mask.BLOCKS_AT_ONCE])
@pytest.mark.parametrize("name", [name for name in cases.BLOCKS if name != "none"])
def test_transposed_lists(name, at_once, monkeypatch):
    """Of every block mask of the cases, made in one piece and in many."""
    monkeypatch.setattr(block_mask, "BLOCKS_AT_ONCE", at_once)
    for seqlens in ((600, 530), (512, 384), (1, 300), (300, 1), (0, 5), (5, 0)):
        sizes = cases.Sizes(2, 3, *seqlens, torch.Generator().manual_seed(0))
        check_transposed(cases.BLOCKS[name](sizes)["block_mask"])


@pytest.mark.parametrize("name", [name for name in cases.BLOCKS if name != "none"])
def test_turns_of_key_blocks(name):
    """1 + the last key block before the list's own that visits the listed row block, or 0."""
    for seqlens in ((600, 530), (0, 5), (5, 0)):
        made = cases.BLOCKS[name](cases.Sizes(2, 3, *seqlens, torch.Generator().manual_seed(0)))["block_mask"]
        planes = (x.flatten(0, 1).tolist() for x in (made.blocks()[0], *made.transposed, made.turns))
        for visits, counts, indices, turns in zip(*planes, strict=True):
            for block, (rows, found) in enumerate(zip(indices, turns, strict=True)):
                for row, turn in list(zip(rows, found, strict=True))[: sum(counts[block])]:
                    earlier = [other + 1 for other in range(block) if visits[row][other]]
                    assert turn == max(earlier, default=0)


def test_wrong_transposed_lists_are_found():
    made = create_block_mask(Causal(), 1, 1, 64, 64, block_size=16)
    assert made.transposed is made.transposed  # built once
    made.transposed[1][0, 0, 1, 1] = 0
    with pytest.raises(AssertionError):
        check_transposed(made)


class Lists:
    """A table on the host, indexed as kernels do it: None stands for all of a dimension."""

    def __init__(self, table: torch.Tensor):
        self.table, self.shape = table, table.shape

    def __getitem__(self, index):
        return self.table[tuple(slice(None) if i is None else i for i in index)].tolist()


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (1, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("rule", [None, Causal()], ids=str)
def test_tiles_that_keys_are_seen_by(rule, steps):
    """Once each, of the listed blocks, those with rows; masked where a rule or the end of keys asks it."""
    tile_m, tile_n = 8, 16
    block_q, block_k = tile_m * steps[0], tile_n * steps[1]
    for seqlens in ((100, 90), (96, 96), (1, 40), (41, 1)):
        maps = random_maps(1, 1, -(-seqlens[0] // block_q), -(-seqlens[1] // block_k))
        told = {"block_size": (block_q, block_k), "seqlens": seqlens, "mask": rule}
        counts, indices = BlockMask.from_blocks(*maps, **told).transposed
        call = SimpleNamespace(block_counts=Lists(counts), block_indices=Lists(indices))
        problem = SimpleNamespace(block_size=(block_q, block_k))
        rules_of = SimpleNamespace(mask=rule, seqlen_k=seqlens[1], batch=0, head=0)
        sequence = SimpleNamespace(seqlen_q=seqlens[0])
        kinds = in_lists(counts, indices, maps[0].shape[2])[0, 0]
        for first_key in range(0, seqlens[1], tile_n):
            visits = visits_from_keys(problem, (tile_m, tile_n), call, rules_of, sequence, first_key)
            row, tiles = kinds[first_key // block_k], range(-(-seqlens[0] // tile_m))
            assert sorted(walked(visits)) == [n for n in tiles if row[n // steps[0]]]
            beyond = first_key + tile_n > seqlens[1]
            for n, masked in with_phases(visits):
                assert masked == (beyond or rule is not None and bool(row[n // steps[0]] == 1))


@pytest.mark.parametrize("rule", [Everything(), Causal(), SlidingWindow(20, 3), PrefixLM(9)], ids=str)
def test_lists_visit_what_ranges_visit(rule):
    made = create_block_mask(rule, 1, 1, 64, 75, block_size=16)
    for row in range(4):
        first = row * 16 + 75 - 64
        found = test_rules.phases_of(rule, first, first + 15, 75, 16)
        by_range = {n for p in found for n in range(p.first, p.last)}
        counts, indices = list(rows_of(made))[row]
        assert set(walked(listed(indices, counts, 1, 5, True))) == by_range


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("steps", [1, 2])
def test_parts_of_visits_are_the_whole(parts, steps):
    visit, full = random_maps(1, 1, 30, 6)
    keys = 40 * steps + 5
    told = {"block_size": (16, 8 * steps), "seqlens": (30 * 16, keys), "mask": Causal()}
    for counts, indices in rows_of(BlockMask.from_blocks(visit, full, **told)):
        for visits in (
            listed(indices, counts, steps, -(-keys // 8), True),
            Range(test_rules.phases_of(SlidingWindow(20, 3), counts[0], counts[0] + 15, 75, 8)),
        ):
            found = [walked(part_of(visits, i, parts)) for i in range(parts)]
            assert sorted(n for part in found for n in part) == sorted(walked(visits))
            assert max(map(len, found)) - min(map(len, found)) <= 1


def tensors(seqlen_q=70, seqlen_k=90) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, seqlen_q, 4, 64), (2, seqlen_k, 2, 64), (2, seqlen_k, 2, 64))
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def checked(made: BlockMask) -> request.Call:
    options = request.Options(0.0, None, False, (-1, -1), 0.0, None, None, None, None, True, None, made)
    return request.dense(*tensors(), options)


@pytest.mark.parametrize("rule", [None, Causal()], ids=str)
def test_weights_are_those_of_the_reference(rule):
    q, k, v = tensors()
    visit, _ = random_maps(2, 4, 5, 4)
    _, full = create_block_mask(rule or Everything(), 1, 1, 70, 90, block_size=(16, 24)).blocks()
    told = {"block_size": (16, 24), "seqlens": (70, 90), "mask": rule}
    made = BlockMask.from_blocks(visit, visit & full, **told)
    weights = ops.probabilities(checked(made))
    expected, _ = attention(q.double(), k.double(), v.double(), block_mask=made)
    values = v.double().repeat_interleave(2, dim=2)
    out = torch.einsum("bhqk,bkhd->bqhd", weights.double(), values)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", cases.MASKS)
def test_the_reference_reads_lists_as_the_rule(name):
    """The oracle's pairs of a rule's block mask are the rule's own."""
    sizes = cases.Sizes(2, 2, 50, 70, torch.Generator().manual_seed(1))
    rule = rule_of(cases.MASKS[name](sizes))
    made = create_block_mask(rule, 2, 2, 50, 70, block_size=(16, 24))
    q, k = torch.arange(50)[:, None] + 20, torch.arange(70)
    for b, h in ((0, 0), (1, 1)):
        at = (b, h, 50, 70)
        assert torch.equal(in_blocks(made, at), rule.at(*at).visible(q, k).broadcast_to(50, 70))


BOOLS = torch.ones(2, 3, dtype=torch.bool)
FROM_BLOCKS = {
    "visit_list": ({"visit": [[True]]}, TypeError, "visit is list; allowed: a torch.bool tensor"),
    "visit_ints": ({"visit": BOOLS.int()}, TypeError, "visit is torch.int32; allowed: a torch.bool"),
    "visit_rank": ({"visit": BOOLS[None]}, ValueError, r"visit has shape \(1, 2, 3\); allowed: \(row blocks"),
    "full_shape": ({"full": BOOLS[:1]}, ValueError, r"full has shape \(1, 3\) on cpu, visit has \(2, 3\)"),
    "full_elsewhere": ({"visit": ~BOOLS, "full": BOOLS}, ValueError, "full has blocks that visit has not"),
    "block_size_zero": ({"block_size": 0}, ValueError, "block_size is 0; allowed: an int above 0, or two"),
    "block_size_three": ({"block_size": (8, 8, 8)}, ValueError, r"block_size is \(8, 8, 8\)"),
    "block_size_float": ({"block_size": (8.0, 8)}, ValueError, r"block_size is \(8.0, 8\)"),
    "seqlens_long": (
        {"seqlens": (257, 384)},
        ValueError,
        r"seqlens is \(257, 384\); allowed for 2 x 3 blocks of 128 x 128: \(129 to 256, 257 to 384\)",
    ),
    "seqlens_short": ({"seqlens": (256, 256)}, ValueError, r"seqlens is \(256, 256\); allowed"),
    "seqlens_one": ({"seqlens": (256,)}, ValueError, r"seqlens is \(256,\); allowed"),
    "mask": ({"mask": True}, TypeError, "mask is True .bool.; allowed: a Mask object"),
}


@pytest.mark.parametrize("name", FROM_BLOCKS)
def test_bad_maps_are_refused(name):
    changed, error, text = FROM_BLOCKS[name]
    with pytest.raises(error, match=text):
        BlockMask.from_blocks(**({"visit": BOOLS} | changed))


CREATE = {
    "mask": ({"mask": 3}, TypeError, "mask is 3 .int.; allowed: a Mask object"),
    "batch": ({"batch": None}, ValueError, "batch is None; allowed: an int from 0 on"),
    "heads": ({"heads": -1}, ValueError, "heads is -1; allowed"),
    "seqlen_q": ({"seqlen_q": 2.0}, ValueError, "seqlen_q is 2.0; allowed"),
    "block_size": ({"block_size": -8}, ValueError, "block_size is -8; allowed"),
    "device": (
        {"mask": Document(torch.zeros(1, 9).int()), "device": "meta"},
        ValueError,
        "device is meta, a tensor of the mask is on cpu",
    ),
}


@pytest.mark.parametrize("name", CREATE)
def test_bad_arguments_are_refused(name):
    changed, error, text = CREATE[name]
    right = {"mask": Causal(), "batch": 1, "heads": 1, "seqlen_q": 9, "seqlen_k": 9}
    with pytest.raises(error, match=text):
        create_block_mask(**(right | changed))

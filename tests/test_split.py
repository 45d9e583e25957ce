"""Keys in parts, heads in one tile, CTAs that persist: who takes what, and that results do not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cute_flash
from cute_flash import dispatch, executable, repeat
from cute_flash.arch import packing, tuning
from cute_flash.arch.common.blocks import Phase, Range, part_of
from cute_flash.arch.problem import Problem, Sizes
from cute_flash.arch.sm80 import FORWARD as AMPERE
from cute_flash.arch.sm90.forward import FORWARD
from cute_flash.arch.sm100.forward import FORWARD as BLACKWELL
from cute_flash.emulator.core.observe import Observer
from cute_flash.masks import Causal, Document, PrefixLM
from cute_flash.rules import decode, encode
from tests.cases import CASES, Case, WindowByHead
from tests.harness import Call, answer_for
from tests.orders import hold
from tests.test_resources import EXTREMES, resources

H100, B200 = dispatch.EMULATED["sm90"], dispatch.EMULATED["sm100"]
# The kernels whose tiles hold several heads.
PACKING = {"sm80": AMPERE, "sm90": FORWARD, "sm100": BLACKWELL}
GROUPED = Problem("bfloat16", 128, 128, gqa=True)
TABLE = torch.zeros(4, dtype=torch.int32)
EVERY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def blocks_of(phases: list[Phase]) -> list[tuple[int, bool]]:
    """(block, masked) in the order of visits."""
    return [(n, p.masked) for p in phases for n in reversed(range(p.first, p.last))]


@EVERY
@given(cuts=st.lists(st.integers(0, 40), min_size=4, max_size=4).map(sorted), parts=st.integers(1, 50))
def test_parts_are_the_whole(cuts, parts):
    """Every block is in exactly one part, with its own mask; parts differ by one block at most."""
    low, full_low, full_high, high = cuts
    whole = [Phase(full_high, high, True), Phase(full_low, full_high, False), Phase(low, full_low, True)]
    found = [part_of(Range(whole), part, parts).phases for part in range(parts)]
    visited = [blocks_of(part) for part in found]
    assert [block for part in reversed(visited) for block in part] == blocks_of(whole)
    counts = [len(part) for part in visited]
    assert max(counts) - min(counts) <= 1
    for part, blocks in zip(found, visited, strict=True):
        assert max(part[0].last - part[-1].first, 0) == len(blocks), "what the load role brings"


def test_a_full_gpu_is_not_split():
    assert FORWARD.splits(GROUPED, H100, Sizes(8, 32, 8, 4096, 4096)) == 1
    assert FORWARD.splits(GROUPED, H100, Sizes(16, 64, 8, 1, 4096)) == 1


def test_few_rows_and_many_keys_are_split():
    """One wave: every multiprocessor gets a part, and no second wave is begun."""
    for batch in (1, 2, 4):
        splits = FORWARD.splits(GROUPED, H100, Sizes(batch, 64, 8, 1, 65536))
        assert 100 <= batch * 8 * splits <= 132


def test_blackwell_splits_by_its_own_tiles():
    """256 rows of one head, 128 keys: one wave of 8 heads, and a full GPU or a window stays whole."""
    problem = replace(GROUPED, gqa=False)
    assert 100 <= 8 * BLACKWELL.splits(problem, B200, Sizes(1, 8, 8, 256, 65536)) <= 148
    assert BLACKWELL.splits(problem, B200, Sizes(8, 32, 8, 4096, 4096)) == 1
    window = answer_for(replace(CASES["few_rows"], mask="window"), "sm100").problem
    assert BLACKWELL.splits(window, B200, Sizes(1, 6, 2, 1, 65536)) == 1


def test_blackwell_takes_few_rows_in_one_tile():
    """Rows of a group's heads side by side; from 129 on two tiles."""
    for seqlen_q, heads, tiles in ((1, 8, 1), (16, 8, 1), (17, 8, 2), (4096, 1, 2)):
        config = BLACKWELL.config(GROUPED, B200, Sizes(1, 16, 2, seqlen_q, 999))
        assert (config.heads, config.tiles) == (heads, tiles)


def test_ampere_fills_every_place_that_an_sm_has():
    """A query row alone: a wave has as many CTAs as the 108 multiprocessors hold at once, here 2 each."""
    problem, a100 = replace(GROUPED, gqa=False), dispatch.EMULATED["sm80"]
    assert AMPERE.config(problem, a100).resident(problem, a100) == 2
    assert 150 <= 8 * AMPERE.splits(problem, a100, Sizes(1, 8, 8, 1, 65536)) <= 216
    assert AMPERE.splits(problem, a100, Sizes(8, 32, 8, 4096, 4096)) == 1
    window = answer_for(replace(CASES["few_rows"], mask="window"), "sm80").problem
    assert AMPERE.splits(window, a100, Sizes(1, 6, 2, 1, 65536)) == 1


def test_few_keys_are_not_split():
    for seqlen_k in (0, 1, 128, 500):
        assert FORWARD.splits(GROUPED, H100, Sizes(1, 64, 8, 1, seqlen_k)) == 1


def test_a_window_is_not_split():
    window = answer_for(replace(CASES["few_rows"], mask="window"), "sm90").problem
    assert FORWARD.splits(window, H100, Sizes(1, 6, 2, 1, 65536)) == 1


@pytest.mark.parametrize(
    "group, seqlen_q, heads",
    [(1, 1, 1), (2, 1, 2), (3, 1, 4), (8, 1, 8), (8, 16, 8), (32, 1, 16),
     (8, 128, 1), (8, 4096, 1), (4, 40, 2)],
)
def test_heads_of_a_tile(group, seqlen_q, heads):
    config = FORWARD.config(GROUPED, H100, Sizes(1, group * 2, 2, seqlen_q, 999))
    assert config.heads == heads
    assert config.consumers == (1 if seqlen_q * heads <= 64 else 2)


@pytest.mark.parametrize(
    "mask, packs",
    [
        (Causal(), True),
        (PrefixLM(TABLE), True),
        (Document(TABLE[None]) & Causal(), True),
        (WindowByHead(TABLE), False),
        (Causal() & WindowByHead(TABLE), False),
    ],
)
def test_heads_with_masks_of_their_own_do_not_share_a_tile(mask, packs):
    assert packing.packs(replace(GROUPED, mask=decode(encode([mask], []).code)[0])) == packs


@EVERY
@given(
    batch=st.integers(1, 40), kv_heads=st.integers(1, 8), group=st.integers(1, 40),
    lengths=st.tuples(st.integers(1, 5000) | st.integers(1, 600), st.integers(0, 9000)),
    dim=st.sampled_from((64, 128, 256)),
)  # fmt: skip
def test_every_config_is_known_beforehand(batch, kv_heads, group, lengths, dim):
    """So a bundle can hold every kernel that some call gets."""
    sizes = Sizes(batch, kv_heads * group, kv_heads, *lengths)
    problem = replace(GROUPED, gqa=group > 1, head_dim=dim, head_dim_v=dim)
    for device, kernel in PACKING.items():
        place = dispatch.EMULATED[device]
        assert kernel.config(problem, place, sizes) in kernel.configs(problem, place)


@pytest.fixture
def unpacked(monkeypatch):
    """A function after which heads have tiles of their own."""

    def separate() -> None:
        monkeypatch.setattr(tuning, "heads_of_tile", lambda *_: 1)
        repeat.forget()

    yield separate
    monkeypatch.undo()
    repeat.forget()


@pytest.mark.parametrize("device", PACKING)
@pytest.mark.parametrize("name", ["few_rows", "few_rows_heads_24_1"])
def test_sharing_a_tile_changes_no_bit(name, device, unpacked):
    call = Call.make(CASES[name])
    together = call.run(device)
    unpacked()
    apart = call.run(device)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.fixture
def two_multiprocessors(monkeypatch):
    """GPUs with two of them, so that few tiles make CTAs persist."""
    for name, device in (("sm90", H100), ("sm100", B200)):
        monkeypatch.setitem(dispatch.EMULATED, name, replace(device, multiprocessors=2))


class Grids(Observer):
    """CTAs of every launch."""

    def __init__(self) -> None:
        self.grids: set[int] = set()

    def begin(self, m) -> None:
        self.grids.add(m.launch.grid[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"asynchrony": "late", "races": True}, {"asynchrony": "random", "schedule": "random", "seed": 1}],
    ids=["eager", "late", "random"],
)
@pytest.mark.parametrize(
    "device, dims, seqlens, groups",
    [
        ("sm90", (64, 64), (300, 140), 2),
        ("sm90", (128, 128), (300, 140), 2),
        ("sm100", (64, 64), (300, 140), 2),
        ("sm100", (128, 128), (500, 300), 1),
        ("sm100", (128, 128), (500, 0), 1),
    ],
    ids=lambda value: str(value).replace(", ", "_"),
)
def test_ctas_that_persist(device, dims, seqlens, groups, options, two_multiprocessors, proven):
    """The same results from CTAs, or on Blackwell at head dim 128 one pair, that take several tiles."""
    case = Case("", (seqlens,) * 2, heads=(2, 2), dims=dims)
    answer, sizes = answer_for(case, device), Sizes(2, 2, 2, *seqlens)
    config = answer.kernel.config(answer.problem, answer.device, sizes)
    assert config.persistent and groups * getattr(config, "ctas", 1) == 2
    hold(case, device, proven, **options)


@pytest.mark.parametrize("device, dims", [("sm90", (64, 64)), ("sm100", (64, 64)), ("sm100", (128, 128))])
def test_there_are_as_many_ctas_as_multiprocessors(device, dims, two_multiprocessors):
    watch = Grids()
    Call.make(Case("", ((500, 140),) * 2, heads=(2, 2), dims=dims)).check(device, observers=(watch,))
    assert watch.grids == {2}


def test_a_kernel_serves_gpus_of_any_size():
    """How many multiprocessors a GPU has is no part of the compile key: a bundle serves all sizes of H100."""
    for kernel, device in ((FORWARD, H100), (BLACKWELL, B200)):
        fewer = replace(device, multiprocessors=114)
        configs = [kernel.config(Problem("bfloat16", 64, 64), place) for place in (device, fewer)]
        assert configs[0] == configs[1] and configs[0].persistent


STRICT = (
    ("sm80", "few_rows_heads_24_1"),
    ("sm80", "split_causal"),
    ("sm80", "split_used"),
    ("sm80", "split_blocks_rule"),
    ("sm90", "split_causal"),
    ("sm90", "split_used"),
    ("sm90", "few_rows_heads_24_1"),
    ("sm90", "few_rows_varlen_few"),
    ("sm100", "few_rows_heads_24_1"),
    ("sm100", "few_rows_varlen_few"),
    ("sm100", "split_causal"),
    ("sm100", "split_used"),
    ("sm100", "split_blocks_rule"),
)


@pytest.mark.parametrize("device, name", STRICT)
@pytest.mark.parametrize("late", [True, False], ids=["late", "random"])
def test_any_order_of_events(device, name, late, proven):
    how = "late" if late else "random"
    hold(CASES[name], device, proven, asynchrony=how, schedule="random", seed=1, races=late)


@pytest.mark.parametrize("device", PACKING)
@pytest.mark.parametrize("split_kv", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(1, 16, 1, 1, 999), Sizes(1, 16, 1, 9, 999)], ids=["few", "more"])
def test_heads_in_one_tile_and_splits_stay_in_registers(sizes, split_kv, device, tmp_path):
    """The configs that only some sizes get, with everything; tests/test_resources.py has the others."""
    heavy = replace(EXTREMES["heavy"], dims=(128, 128), splits=2 if split_kv else None)
    problem = replace(answer_for(heavy, device).problem, sink=not split_kv)
    kernel, place = PACKING[device], dispatch.EMULATED[device]
    config = kernel.config(problem, place, sizes)
    # Tiles of sm80 have 64 rows here: 9 of each of 8 heads are more.
    assert config.heads >= (4 if device == "sm80" else 8)
    used = resources(executable.artifact(kernel, problem, config, place).cubin, tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {config}"


def test_parts_with_large_scores_weigh_what_they_should():
    """Two halves of equal keys, as ptxas fuses: a rounded log-sum-exp is no error of an exponent."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 256, 1, 64).bfloat16()
    q[..., 1:], q[..., 0], k[..., 0] = 0.0, 30000.0, 33333.0
    with cute_flash.emulated("sm80", contract="ptxas"):
        out = cute_flash.flash_attn_func(q[:, :20], k, v, num_splits=2)
    assert (out - v.mean(1, keepdim=True)).abs().max() < 0.01

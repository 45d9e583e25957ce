"""Keys and values in a cache: every kind of it on every tree, what is beside the keys in use being NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cute_flash
from cute_flash import dispatch, repeat
from cute_flash.arch.problem import KvCache, Sizes
from cute_flash.emulator.core.observe import Observer
from tests.accuracy import assert_accurate
from tests.harness import answer_for, call_of, where
from tests.orders import hold
from tests.serving import CASES
from tests.test_resources import EXTREMES, assert_in_registers


@pytest.mark.parametrize("name", CASES)
def test_kv_cache(name, machine):
    call_of(CASES[name]).check(machine)


@pytest.mark.parametrize("name", ["rows_moved", "pages_16", "pages_7_varlen"])
def test_any_order_of_events(name, arch, proven):
    hold(CASES[name], arch, proven, asynchrony="late", schedule="random", seed=1, races=True)


def test_lengths_of_pages_by_cu_seqlens(machine):
    """FlashAttention-2's way to say them: cu_seqlens_k's differences."""
    call = call_of(CASES["pages_24_varlen"])
    k, v, packing = call.cache()
    starts = call.arguments["cu_seqlens_k"]
    with where(machine):
        given = (call.tensors["q"], k, v, packing.cu_seqlens_q, starts, packing.max_seqlen_q, 200)
        out, lse = cute_flash.flash_attn_varlen_func(
            *given, causal=True, block_table=packing.block_table, return_lse=True
        )
    expected, expected_lse = call.run(machine)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def pages(**changed):
    """A call on pages of the emulated A100, with changes that must be refused before a launch."""
    k = torch.zeros(6, 16, 2, 64, dtype=torch.float16)
    given = {
        "q": torch.zeros(5, 4, 64, dtype=torch.float16), "k": k, "v": k, "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": None, "max_seqlen_q": 3, "max_seqlen_k": 32, "seqused_k": ints(20, 32),
        "block_table": ints(0, 1, 4, 5).view(2, 2),
    }  # fmt: skip
    with cute_flash.emulated("sm80"):
        return cute_flash.flash_attn_varlen_func(**given | changed)


class Asked(Observer):
    """Bytes that copies into shared memory ask for, of those inside some tensors. tensors: on the CPU."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
        self.bytes = 0

    def _note(self, address: np.ndarray, nbytes: np.ndarray) -> None:
        for first, end in self.spans:
            self.bytes += int((nbytes * ((address >= first) & (address < end))).sum())

    def bulk_read(self, m, warp, barrier, rows) -> None:
        self._note(rows.address, np.full(np.shape(rows.address), rows.nbytes))

    def copy_issue(self, m, g, copy) -> None:
        self._note(copy.source, copy.filled)


@pytest.mark.parametrize("queries", [1, 16])
def test_every_key_is_asked_for_once(queries, machine):
    """Of 8 heads that share a KV head, for one query and for 16, in parts: as many bytes as the cache has."""
    if machine == "cuda":
        pytest.skip("counted by the emulator")
    case = replace(CASES["pages_16_decode"], seqlens=((queries, 384),), heads=(8, 1), mask="causal")
    call = call_of(case)
    k, v, packing = call.cache()
    watch = Asked(k, v)
    options = {"causal": True, "num_splits": 3, "block_table": packing.block_table, "return_lse": True}
    starts, q = torch.tensor([0, queries], dtype=torch.int32), call.tensors["q"][0]
    with where(machine, observers=(watch,)):
        given = q, k, v, starts, None, queries, 384
        out, lse = cute_flash.flash_attn_varlen_func(*given, seqused_k=packing.seqused_k, **options)
    assert_accurate(out[None], lse[None], tuple(call.tensors.values()), **call.arguments)
    assert watch.bytes == 384 * (128 + 128) * 2


# Where the fewest registers are left: by O and S, and to the warp that looks up pages.
@pytest.mark.parametrize("device, page_size, queries", [("sm80", 1, 300), ("sm90", 16, 1), ("sm90", 8, 300)])
def test_pages_are_looked_up_in_registers(device, page_size, queries, tmp_path):
    answer = answer_for(replace(EXTREMES["light"], dims=(128, 128)), device)
    problem = replace(answer.problem, cache=KvCache(page_size))
    sizes = Sizes(2, 16, 2, queries, 300)
    for step in dispatch.plan(problem, answer.device, sizes, 1).steps:
        assert_in_registers(step, answer.device, tmp_path / "kernel.cubin")


def ints(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


PACKED = torch.zeros(96, 2, 64, dtype=torch.float16)
BAD = {
    "page": ({"block_table": ints([0, 6], [1, 2])}, ValueError, r"block_table\[0\]\[1\] is 6; allowed: 0 "),
    "negative": ({"block_table": ints([0, 1], [-1, 2])}, ValueError, "is -1; allowed: 0 to 5"),
    "dtype": ({"block_table": torch.zeros(2, 2).long()}, TypeError, "block_table has dtype torch.int64"),
    "rank": ({"block_table": torch.zeros(2).int()}, ValueError, "block_table has shape"),
    "batch": ({"block_table": torch.zeros(3, 2).int()}, ValueError, "block_table has 3 rows, q has 2"),
    "lengths": ({"seqused_k": None}, ValueError, "without the sequences' lengths"),
    "long": ({"seqused_k": ints(20, 33)}, ValueError, r"seqused_k\[1\] is 33; allowed: 0 to 32"),
    "longest": ({"max_seqlen_k": 31}, ValueError, "longest sequence has 32 keys; allowed: max_seqlen_k 31"),
    "packed": ({"k": PACKED}, ValueError, "k has shape .*; allowed: .num_pages, page_size"),
    "gradient": (
        {"q": torch.zeros(5, 4, 64, dtype=torch.float16, requires_grad=True)},
        NotImplementedError,
        "a gradient is required of a call on a cache",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pages(name):
    changed, error, text = BAD[name]
    with pytest.raises(error, match=text):
        pages(**changed)


def test_pages_that_no_key_in_use_is_in_may_be_anything(monkeypatch):
    """Of the first sequence the second page: its number is never looked at."""
    monkeypatch.setattr(repeat.launch, "run", lambda bound, values: values["out"].zero_())
    assert pages(block_table=ints([0, 1 << 30], [4, 5]), seqused_k=ints(16, 32)).shape == (5, 4, 64)

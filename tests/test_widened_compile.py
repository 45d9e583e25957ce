"""Kernels for caches of 8 bits keep everything in registers, by every row of their tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_flash.arch import problem
from cute_flash.arch.kernel import Kernel, Step
from cute_flash.arch.problem import KvCache, Sizes
from cute_flash.arch.sm80.widened import WIDENED as AMPERES
from cute_flash.arch.sm80.widened import tuning as ampere
from cute_flash.arch.sm90.widened import WIDENED as HOPPERS
from cute_flash.arch.sm90.widened import tuning as hopper
from cute_flash.arch.sm100.widened import WIDENED as BLACKWELLS
from cute_flash.arch.sm100.widened import tuning as blackwell
from cute_flash.dispatch import EMULATED
from tests.test_resources import EXTREMES, assert_in_registers, prove
from tests.widening import E4M3, E5M2, Widened, problem_of

# The most that a call can ask for, with pages to look up, and parts of keys of rows that begin anywhere.
PAGES, ROWS = KvCache(page_size=16), KvCache(batch_idx=True, leftpad=True)
LIGHT = replace(EXTREMES["light"], used="")
ASKED = {
    "light": LIGHT,
    "plain": replace(LIGHT, mask="causal"),
    "heavy": replace(LIGHT, mask="document_causal", score="own_softcap"),
}
SHIPPED = (
    ("sm80", AMPERES, "light", (96, 96)),
    ("sm80", AMPERES, "light", (256, 128)),
    ("sm80", AMPERES, "heavy", (256, 128)),
    ("sm80", AMPERES, "light", (256, 256)),
    ("sm80", AMPERES, "heavy", (256, 256)),
    ("sm86", AMPERES, "heavy", (256, 256)),
    ("sm120", AMPERES, "light", (96, 96)),
    ("sm120", AMPERES, "heavy", (256, 256)),
    ("sm90", HOPPERS, "light", (128, 128)),
    ("sm90", HOPPERS, "plain", (192, 128)),
    ("sm90", HOPPERS, "light", (192, 128)),
    ("sm90", HOPPERS, "heavy", (192, 128)),
    ("sm90", HOPPERS, "light", (256, 256)),
    ("sm90", HOPPERS, "heavy", (256, 256)),
    ("sm100", BLACKWELLS, "plain", (128, 128)),
    ("sm100", BLACKWELLS, "light", (128, 128)),
    ("sm100", BLACKWELLS, "heavy", (192, 128)),
    ("sm100", BLACKWELLS, "heavy", (256, 256)),
)
TABLES = {AMPERES: ampere.TABLE, HOPPERS: hopper.TABLE, BLACKWELLS: blackwell.TABLE}
FEW = Sizes(1, 8, 2, 1, 1000)  # a query of several heads, which share a tile


def asked(device: str, rules: str, dims: tuple[int, int], cache: KvCache) -> problem.Problem:
    """A problem in pages, or one part of the keys of a cache's rows."""
    kind = {"kv": E5M2, "dtype": "bfloat16"} if cache is ROWS else {"kv": E4M3}
    case = Widened(**vars(ASKED[rules]) | {"dims": dims, "cache": cache} | kind)
    whole = replace(problem_of(case, device), seqused_k=True)
    return whole if cache is PAGES else replace(whole, split_kv=True, sink=False)


def steps_of(device: str, kernel: Kernel, rules: str, dims: tuple[int, int]) -> list[Step]:
    """Kernels for many rows and for few, in pages and in parts."""
    found, gpu = [], EMULATED[device]
    for cache in (PAGES, ROWS):
        one = asked(device, rules, dims, cache)
        assert kernel.reasons(one, gpu) == ()
        found += [Step(kernel, one, kernel.config(one, gpu, sizes)) for sizes in (None, FEW)]
    return found


def in_words(value: object) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize("device, kernel, rules, dims", SHIPPED, ids=in_words)
def test_nothing_spills(device, kernel, rules, dims, tmp_path, proven):
    steps, gpu = steps_of(device, kernel, rules, dims), EMULATED[device]

    def look() -> None:
        for step in steps:
            assert_in_registers(step, gpu, tmp_path / "kernel.cubin")

    prove(proven, look, *((*step.compiled, gpu) for step in steps))


def test_every_row_is_covered():
    """At the largest head dims that it serves."""
    for kernel, table in TABLES.items():
        found = set()
        for device, own, rules, dims in SHIPPED:
            if own is kernel:
                row, _ = next(table.serving(asked(device, rules, dims, PAGES), EMULATED[device]))
                found |= {row} if (row.head_dim, row.head_dim_v) == dims else set()
        assert found == set(table.rows), kernel.name

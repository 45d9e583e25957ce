"""FP8 kernels keep everything in registers at the largest head dims of every row of their tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_flash.arch.kernel import Step
from cute_flash.arch.problem import Device, KvCache
from cute_flash.arch.quantized import ScheduledQuantizedProblem
from cute_flash.arch.sm90.fp8 import QUANTIZED as HOPPERS
from cute_flash.arch.sm90.fp8 import tuning as hopper
from cute_flash.arch.sm100.fp8 import QUANTIZED as BLACKWELLS
from cute_flash.arch.sm100.fp8 import tuning
from cute_flash.arch.sm100.scaled import BLOCK_SCALED
from cute_flash.arch.sm100.scaled import tuning as scaled
from cute_flash.dispatch import EMULATED
from cute_flash.problems import problem
from tests.cases import Case
from tests.serving import Cached
from tests.test_resources import EXTREMES, answer_for, assert_in_registers, prove

HOPPER, B200 = EMULATED["sm90"], EMULATED["sm100"]
GB300 = replace(B200, capability=(10, 3))


def in_pages(case: Case) -> Cached:
    """The same with keys in pages, which a warp that copies looks up."""
    return Cached(**vars(case) | {"used": "k", "cache": KvCache(16)})


# The most that can be asked for: with scales of blocks rows hold one more number for each. CTAs persist where
# rows see evenly. On GB300 loads bring the maximum. Keys in pages are shared out on the device.
ASKED = {
    "plain": replace(EXTREMES["plain"], varlen=False, used="", sink=False),
    "light": replace(EXTREMES["light"], varlen=False, used="", score="softcap"),
    "even": replace(EXTREMES["light"], varlen=False, used="", score="softcap", mask="full"),
    "packed": EXTREMES["light"],
    "packed_heavy": replace(EXTREMES["heavy"], dropout=0.0, splits=3),
    "heavy": replace(EXTREMES["heavy"], varlen=False, used="", dropout=0.0),
    "documents": replace(EXTREMES["heavy"], score="softcap", dropout=0.0, splits=3),
    "positions": replace(EXTREMES["light"], score="own_softcap"),
    "paged": in_pages(EXTREMES["light"]),
    "paged_heavy": in_pages(replace(EXTREMES["heavy"], dropout=0.0, splits=3)),
    "listed": replace(EXTREMES["blocks_light"], score="softcap"),
    "listed_heavy": replace(EXTREMES["blocks_heavy"], dropout=0.0, splits=3),
    "slopes": replace(EXTREMES["light"], varlen=False, used="", score="softcap_alibi"),
}
SHIPPED = (
    *((HOPPERS, HOPPER, *asked) for asked in (  # what is asked, head dims, block
        ("light", (64, 64), None), ("packed", (64, 64), None), ("documents", (64, 64), None),
        ("plain", (128, 128), 128), ("light", (192, 128), 128), ("packed", (192, 128), None),
        ("documents", (192, 128), None), ("light", (256, 128), 128), ("documents", (256, 128), None),
        ("light", (192, 192), 128), ("packed", (192, 192), None), ("documents", (192, 192), None),
        ("light", (256, 256), None), ("packed", (256, 256), None), ("documents", (256, 256), None),
        ("light", (192, 192), 64), ("heavy", (192, 192), 64), ("slopes", (192, 192), 128),
        ("positions", (192, 192), None), ("packed_heavy", (192, 192), None), ("light", (256, 256), 128),
        ("heavy", (256, 256), 64), ("slopes", (256, 256), 128), ("positions", (256, 256), None),
        ("packed_heavy", (256, 256), None), ("packed", (192, 128), 128), ("packed_heavy", (192, 192), 64),
        ("paged", (192, 128), 128), ("paged", (256, 256), 64), ("paged_heavy", (192, 192), 128),
        ("paged_heavy", (256, 256), 64), ("listed", (64, 64), None), ("listed", (192, 128), 128),
        ("listed_heavy", (256, 256), 64),
    )),
    (BLACKWELLS, B200, "light", (128, 128), 64),
    (BLACKWELLS, B200, "heavy", (128, 128), 64),
    (BLACKWELLS, B200, "light", (192, 128), 64),
    (BLACKWELLS, B200, "light", (256, 128), 64),
    (BLACKWELLS, B200, "heavy", (256, 128), 64),
    (BLACKWELLS, B200, "light", (256, 256), 64),
    (BLACKWELLS, B200, "heavy", (256, 256), 64),
    (BLACKWELLS, B200, "even", (128, 128), 64),
    (BLACKWELLS, B200, "even", (256, 256), 64),
    (BLACKWELLS, GB300, "packed", (128, 128), None),
    *((BLACKWELLS, B200, *asked) for asked in (
        ("packed", (128, 128), 64), ("packed_heavy", (256, 256), 64), ("paged", (128, 128), 64),
        ("paged_heavy", (128, 128), 64), ("paged", (256, 256), 64), ("paged_heavy", (256, 256), 64),
        ("listed", (256, 256), 64), ("listed_heavy", (256, 256), 64),
    )),
)


def step_of(kernel, device: Device, asked: str, dims: tuple[int, int], block: int | None) -> Step:
    case = replace(ASKED[asked], dtype="float8_e4m3fn", dims=dims)
    name = "sm90" if device is HOPPER else "sm100"
    problem = replace(answer_for(case, name).problem, block=block)
    if problem.cache:
        problem = ScheduledQuantizedProblem(**vars(problem))
    assert kernel.reasons(problem, device) == ()
    return Step(kernel, problem, kernel.config(problem, device))


# Formats of q and k, and of v; what is asked besides; head dims.
SCALED = (
    (("mxfp8", "mxfp8"), "light", (128, 64)),
    (("mxfp8", "mxfp8"), "even", (128, 64)),
    (("mxfp8", "e4m3"), "light", (256, 128)),
    (("mxfp8", "mxfp8"), "light", (192, 128)),
    (("nvfp4", "e4m3"), "even", (192, 128)),
    (("mxfp8", "mxfp8"), "light", (256, 64)),
    (("nvfp4", "e4m3"), "light", (128, 128)),
    (("nvfp4", "e4m3"), "even", (128, 128)),
    (("nvfp4", "mxfp8"), "light", (256, 128)),
    (("nvfp4", "mxfp8"), "heavy", (256, 128)),
    (("mxfp8", "mxfp8"), "light", (256, 256)),
    (("nvfp4", "mxfp8"), "heavy", (256, 256)),
)  # fmt: skip


def scaled_step(forms: tuple[str, str], asked: str, dims: tuple[int, int]) -> Step:
    """The same rules, with factors that tensor cores apply."""
    case = replace(ASKED[asked], dtype="float8_e4m3fn", dims=dims)
    rules = answer_for(case, "sm100").problem
    form, v_form = forms
    element = {"mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn_x2"}[form]
    plain = problem(dtype=element, head_dim=dims[0], head_dim_v=dims[1], form=form, v_form=v_form)
    names = ("mask", "score", "gqa", "sink", "lse", "split_kv")
    found = replace(plain, **{name: getattr(rules, name) for name in names})
    assert BLOCK_SCALED.reasons(found, B200) == ()
    return Step(BLOCK_SCALED, found, BLOCK_SCALED.config(found, B200))


@pytest.mark.parametrize("forms, asked, dims", SCALED, ids=str)
def test_scaled_kernels_do_not_spill(forms, asked, dims, tmp_path, proven):
    step = scaled_step(forms, asked, dims)

    def look() -> None:
        assert_in_registers(step, B200, tmp_path / "kernel.cubin")

    prove(proven, look, (*step.compiled, B200))


def in_words(value: object) -> str:
    return value.target if isinstance(value, Device) else getattr(value, "name", str(value))


@pytest.mark.parametrize("kernel, device, asked, dims, block", SHIPPED, ids=in_words)
def test_nothing_spills(kernel, device, asked, dims, block, tmp_path, proven):
    step = step_of(kernel, device, asked, dims, block)

    def look() -> None:
        assert_in_registers(step, device, tmp_path / "kernel.cubin")

    prove(proven, look, (*step.compiled, device))


def test_every_row_is_covered():
    found = [step_of(*row).config for row in SHIPPED if row[1] is B200]
    alone = dict.fromkeys(replace(config, persistent=False) for config in found)
    assert list(alone) == [row.config for row in tuning.ROWS]
    assert {config.tiles for config in found if config.persistent} == {1, 2}
    found = [step_of(*row).config for row in SHIPPED if row[1] is HOPPER]
    assert {replace(config, longest_first=False) for config in found} == {r.config for r in hopper.TABLE.rows}
    found = dict.fromkeys(replace(scaled_step(*row).config, persistent=False) for row in SCALED)
    assert set(found) == {row.config for row in scaled.ROWS}

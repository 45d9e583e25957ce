"""The quantizing kernel keeps the widest rows in registers, of which 512 threads of a CTA have 128 each."""

from __future__ import annotations

from typing import Any

import pytest

from cute_flash.arch.kernel import Step
from cute_flash.arch.quantize import QUANTIZE, QuantizeProblem
from cute_flash.dispatch import EMULATED
from tests.test_resources import assert_in_registers, prove

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("e4m3", {}),
    "peaks": ("e4m3", {"peaks": "found"}),
    "heads": ("e4m3", {"peaks": "given"}),
    "mxfp8": ("mxfp8", {}),
    "mxfp8_of_v": ("mxfp8", {"axis": "seqlen"}),
    "nvfp4": ("nvfp4", {"peaks": "given"}),
}
ROTARIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "neighbours": {"rotary_dim": 256, "interleaved": True, "offsets": True},
    "halves": {"rotary_dim": 256, "offsets": True},
}


@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("rotary", ROTARIES)
def test_nothing_spills(rotary, device, tmp_path, proven):
    """All formats."""
    asked = [
        QuantizeProblem("bfloat16", 256, form, 128, True, **options, **ROTARIES[rotary])
        for form, options in KINDS.values()
    ]
    steps = [Step(QUANTIZE, one, QUANTIZE.config(one, EMULATED[device])) for one in asked]

    def look() -> None:
        for step in steps:
            assert_in_registers(step, EMULATED[device], tmp_path / "kernel.cubin")

    prove(proven, look, *((*step.compiled, EMULATED[device]) for step in steps))

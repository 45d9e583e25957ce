"""The Hopper kernel, which is not listed yet: it compiles, and keeps everything in registers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_flash import executable
from cute_flash.arch import load, sm90
from cute_flash.arch.problem import Device
from cute_flash.arch.sm90.forward import Forward
from tests.test_resources import EXTREMES, answer_for, resources

H100 = Device((9, 0), 232448)


@pytest.mark.parametrize("extreme, dims", [("light", (64, 64)), ("light", (128, 128)), ("heavy", (192, 128))])
def test_compiles_without_spills(extreme, dims, tmp_path):
    problem = answer_for(replace(EXTREMES[extreme], dims=dims), "sm90").problem
    assert Forward.reasons(problem, H100) == ()
    config = Forward.config(problem, H100)
    built = executable.artifact(Forward, problem, config, H100)
    used = resources(built.cubin, tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {config}"
    assert b"wgmma.mma_async" in built.ptx and b"setmaxnreg" in built.ptx
    assert config.shared_memory(problem) <= H100.shared_memory


def test_not_listed_before_it_is_executed():
    assert Forward not in load(H100) and sm90.KERNELS

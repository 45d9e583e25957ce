"""No kernel spills registers or uses local memory: read from the compiled code of every kernel that ships."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cute_flash import executable
from cute_flash.arch.sm80 import tuning
from tests.cases import CASES, Case
from tests.harness import answer_for

nvidia = pytest.importorskip("nvidia.cu13", reason="cuobjdump comes with the package nvidia-cuda-cuobjdump")
CUOBJDUMP = next(Path(folder) / "bin" / "cuobjdump" for folder in nvidia.__path__)

# The most that a call can ask for, where registers are left (see tuning.py), and where they are not.
LIGHT = Case("light", dtype="float16", varlen=True, used="qk", heads=(4, 2), mask="window", sink=True)
EXTREMES = {
    "light": LIGHT,
    "heavy": replace(LIGHT, mask="document_causal", score="own_softcap", dropout=0.1),
    "blocks_light": replace(LIGHT, varlen=False, used="", mask="full", blocks="causal"),
    "blocks_heavy": replace(
        LIGHT, varlen=False, used="", mask="full", blocks="document", score="own_softcap", dropout=0.1
    ),
}
# The largest head dims of every row of the tuning table, which need most registers.
DIMS = ((64, 64), (96, 96), (256, 128), (256, 256))
SHIPPED = (
    *itertools.product(("sm80", "sm86", "sm120"), ("light", "heavy"), DIMS),
    *((device, "heavy", dims) for device in ("sm90", "sm100") for dims in DIMS[2:]),
    *((device, "blocks_light", dims) for device in ("sm80", "sm86") for dims in DIMS),
    *((device, "blocks_heavy", dims) for device in ("sm86", "sm90") for dims in DIMS[2:]),
)


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """What cuobjdump reports of a compiled kernel: REG, STACK, SHARED, LOCAL, ..."""
    path.write_bytes(cubin)
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"REG:.*", text)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def assert_in_registers(case: Case, device: str, path: Path) -> None:
    """Compile the kernel that serves a case, and find nothing in local memory."""
    answer = answer_for(case, device)
    assert answer, str(answer)
    built = executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    used = resources(built.cubin, path)
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {answer.config}"
    assert used["REG"] <= 255


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_cases(case, arch, tmp_path):
    assert_in_registers(case, arch, tmp_path / "kernel.cubin")


@pytest.mark.parametrize("device, rules, dims", SHIPPED, ids=lambda value: str(value).replace(", ", "_"))
def test_extremes(device, rules, dims, tmp_path):
    """With everything that a call may ask for at once, and for other GPUs, where code is other code."""
    assert_in_registers(replace(EXTREMES[rules], dims=dims), device, tmp_path / "kernel.cubin")


def test_every_row_is_covered():
    assert {(row.head_dim, row.head_dim_v) for row in tuning.ROWS} == set(DIMS)
    for row in tuning.ROWS:
        answers = [answer_for(replace(EXTREMES[r], dims=d), device) for device, r, d in SHIPPED]
        assert any(replace(answer.config, stages=row.config.stages) == row.config for answer in answers), row


def test_spills_are_noticed(tmp_path):
    from tests.spilling_kernel import compile_for

    assert resources(compile_for("sm_80"), tmp_path / "kernel.cubin")["STACK"] > 0

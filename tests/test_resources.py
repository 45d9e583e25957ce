"""No kernel spills registers or uses local memory: read from the compiled code of every kernel that ships."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cute_flash
from cute_flash import executable, rules
from tests.cases import CASES, MASKS, SCORES, Case, Sizes

nvidia = pytest.importorskip("nvidia.cu13", reason="cuobjdump comes with the package nvidia-cuda-cuobjdump")
CUOBJDUMP = next(Path(folder) / "bin" / "cuobjdump" for folder in nvidia.__path__)

# Head dims of every row of the tuning tables, with the least and the most that a call can ask for.
DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (224, 224), (256, 256))
EXTREMES = {
    "least": Case("least"),
    "most": Case(
        "most", dtype="float16", varlen=True, used="qk", heads=(4, 2), mask="document_causal",
        score="own_softcap", dropout=0.1, sink=True,
    ),
}
DEVICES = (("sm80", "most"), ("sm86", "least"), ("sm86", "most"))


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """What cuobjdump reports of a compiled kernel: REG, STACK, SHARED, LOCAL, ..."""
    path.write_bytes(cubin)
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"REG:.*", text)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def answer_for(case: Case, device: str):
    """Kernel and config that serve a case."""
    sizes = Sizes(len(case.seqlens), case.heads[0], 9, torch.Generator())
    told = MASKS[case.mask](sizes) | SCORES[case.score](sizes)
    left, right = (None if side == -1 else side for side in told.get("window_size", (None, None)))
    return cute_flash.supports(
        case.dtype,
        *case.dims,
        device=device,
        mask=rules.mask_of(told.get("causal", False), (left, right), told.get("mask")),
        score=rules.score_of(told.get("softcap", 0.0), told.get("alibi_slopes"), told.get("score")),
        varlen=case.varlen,
        seqused_q="q" in case.used,
        seqused_k="k" in case.used,
        gqa=case.heads[0] != case.heads[1],
        dropout=case.dropout > 0,
        sink=case.sink,
        lse=True,
    )


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


@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}_{dims[1]}")
@pytest.mark.parametrize("device, extreme", DEVICES)
def test_extremes(device, extreme, dims, tmp_path):
    """On GPUs with 100 KB of shared memory, which get smaller tiles, too."""
    assert_in_registers(replace(EXTREMES[extreme], dims=dims), device, tmp_path / "kernel.cubin")


def test_spills_are_noticed(tmp_path):
    from tests.spilling_kernel import compile_for

    assert resources(compile_for("sm_80"), tmp_path / "kernel.cubin")["STACK"] > 0

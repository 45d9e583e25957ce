"""Products that ptxas fuses: which, what they give, and that its own code has as many."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cute_flash import emulator
from cute_flash.emulator.ptx.contract import contracted

# Body of a kernel on %f1, %f2, %f3 -> the fma that it becomes, None where nothing is fused.
BODIES = {
    "add": ("mul.f32 %f4, %f1, %f2;\nadd.f32 %f5, %f4, %f3;", "a * b + c"),
    "added": ("mul.f32 %f4, %f1, %f2;\nadd.f32 %f5, %f3, %f4;", "a * b + c"),
    "sub": ("mul.f32 %f4, %f1, %f2;\nsub.f32 %f5, %f4, %f3;", "a * b - c"),
    "taken off": ("mul.f32 %f4, %f1, %f2;\nsub.f32 %f5, %f3, %f4;", "c - a * b"),
    "rounded": ("mul.rn.f32 %f4, %f1, %f2;\nadd.f32 %f5, %f4, %f3;", None),
    "rounded sum": ("mul.f32 %f4, %f1, %f2;\nadd.rn.f32 %f5, %f4, %f3;", None),
    "read twice": ("mul.f32 %f4, %f1, %f2;\nadd.f32 %f5, %f4, %f3;\nmax.f32 %f5, %f5, %f4;", None),
    "flushed": ("mul.ftz.f32 %f4, %f1, %f2;\nadd.f32 %f5, %f4, %f3;", None),
}
TEXT = """.version 8.8
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p)
{
.reg .f32 %f<6>;
.reg .b64 %rd1;
ld.param.u64 %rd1, [p];
ld.global.f32 %f1, [%rd1];
ld.global.f32 %f2, [%rd1+4];
ld.global.f32 %f3, [%rd1+8];
BODY
st.global.f32 [%rd1+12], %f5;
ret;
}
"""


def ran(text: str, contract: str, values: np.ndarray) -> np.float32:
    """What the kernel stores."""
    held = np.concatenate([values, np.zeros(1, np.float32)])
    memory = emulator.GlobalMemory()
    memory.add(held.ctypes.data, held.nbytes, "values")
    launch = emulator.Launch("k", (1, 1, 1), (1, 1, 1), params=held.ctypes.data.to_bytes(8, "little"))
    emulator.run(emulator.Program(text), launch, memory, emulator.Options(contract=contract))
    return held[3]


@pytest.mark.parametrize("name", BODIES)
def test_what_is_fused(name):
    body, fused = BODIES[name]
    text = TEXT.replace("BODY", body)
    values = np.float32([1 + 2**-12, 1 + 2**-12, 1 + 2**-11])  # two roundings leave nothing of 2**-24
    values[2] *= -1 if "add.f32" in body else 1
    written, assembled = ran(text, "none", values), ran(text, "ptxas", values)
    a, b, c = (float(x) for x in values)
    assert contracted(text).count("\n") == text.count("\n")
    if fused is None:
        assert contracted(text) == text and written == assembled
    else:
        assert assembled == np.float32(eval(fused)) != written


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="contract is 'fast'; allowed: none, ptxas"):
        emulator.Options(contract="fast")


FOLLOWED = ("sm80/d128/sm80.forward", "sm90/d128/sm90.forward", "sm100/d128/sm100.forward")


def fused_in(ptx: str) -> int:
    return len(re.findall(r"\bfma\.rn(?:\.ftz)?(?:\.sat)?\.f32\b", ptx))


def counted(artifact) -> tuple[int, int, int]:
    """(fma as written, with ptxas's, FFMA in the machine code)."""
    sass = pytest.importorskip("profiling.sass")
    ptx, code = artifact.ptx.decode(), sass.parse(sass.disassembly(artifact.cubin))
    found = sum(i.opcode.split(".")[0] == "FFMA" for i in code)
    return fused_in(ptx), fused_in(contracted(ptx)), found


@pytest.mark.parametrize("key", FOLLOWED)
def test_ptxas_fuses_as_many(key):
    """Kernels say fma where it matters: without rules nothing is left to fuse."""
    pytest.importorskip("nvidia.cu13", reason="nvdisasm comes with the package nvidia-cuda-nvdisasm")
    from cute_flash import executable
    from profiling import static

    _, answer, _ = static.followed()[key]
    written, fused, found = counted(
        executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    )
    assert written == fused == found

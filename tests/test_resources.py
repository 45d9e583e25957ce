"""No kernel spills registers or uses local memory: read from the compiled code of every kernel that ships.

Kernels that nothing else compiles are looked at once: as long as neither their sources nor the compiler
change, what was found stands in the ledger of proofs.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cute_flash import cache, executable
from cute_flash.arch.kernel import Step
from cute_flash.arch.problem import Device
from cute_flash.arch.sm80 import tuning as sm80
from cute_flash.arch.sm90 import tuning as sm90
from tests.cases import CASES, Case
from tests.harness import Call, answer_for, steps_of
from tests.orders import RIGHT
from tests.proofs import Proof, meaning

nvidia = pytest.importorskip("nvidia.cu13", reason="cuobjdump comes with the package nvidia-cuda-cuobjdump")
CUOBJDUMP = next(Path(folder) / "bin" / "cuobjdump" for folder in nvidia.__path__)

# The most that a call can ask for, where registers are left (see tuning.py), and where they are not.
LIGHT = Case("light", dtype="float16", varlen=True, used="qk", heads=(4, 2), mask="window", sink=True)
EXTREMES = {
    "plain": replace(LIGHT, mask="causal"),
    "light": LIGHT,
    "even": replace(LIGHT, varlen=False, used="q", mask="full"),
    "heavy": replace(LIGHT, mask="document_causal", score="own_softcap", dropout=0.1),
    "blocks_light": replace(LIGHT, varlen=False, used="", mask="full", blocks="causal"),
    "blocks_heavy": replace(
        LIGHT, varlen=False, used="", mask="full", blocks="document", score="own_softcap", dropout=0.1
    ),
}
# The largest head dims of every row of sm80's table, which need most registers; and sm90's rows. Those of
# sm100 are in tests/test_sm100_compile.py. Where two of the extremes get the same tiles, as they do at large
# head dims where there is little shared memory, the one that asks for more stands for both.
DIMS = ((64, 64), (96, 96), (256, 128), (256, 256))
SHIPPED = (
    *itertools.product(("sm80",), ("light", "heavy"), DIMS),
    *itertools.product(("sm86", "sm120"), ("light",), DIMS[:2]),
    *itertools.product(("sm86", "sm120"), ("heavy",), DIMS),
    *itertools.product(("sm80", "sm86"), ("even",), ((64, 64),)),
    ("sm90", "plain", (64, 64)),
    ("sm90", "light", (128, 128)),
    ("sm90", "even", (192, 128)),
    *itertools.product(("sm90",), ("light", "heavy"), ((64, 64), (192, 128), (192, 192), (256, 256))),
    *(("sm100", "heavy", dims) for dims in DIMS[2:]),
    *(("sm80", "blocks_light", dims) for dims in DIMS),
    *(("sm86", "blocks_light", dims) for dims in DIMS[:2]),
    *((device, "blocks_heavy", dims) for device in ("sm86", "sm90") for dims in DIMS[2:]),
    *((device, "heavy", (576, 576)) for device in ("sm80", "sm86")),
)
# What has few rows: it takes another kernel, or one whose tiles hold several heads.
FEW = (
    "lengths", "batch", "few_rows", "split", "heads_4_1", "score_hides_whole", "blocks_lengths", "pair",
)  # fmt: skip


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """What cuobjdump reports of a compiled kernel: REG, STACK, SHARED, LOCAL, ..."""
    path.write_bytes(cubin)
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"REG:.*", text)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def assert_in_registers(step: Step, device: Device, path: Path) -> None:
    """Compile what a step launches, and find nothing in local memory."""
    used = resources(executable.artifact(*step.compiled, device).cubin, path)
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {step.config}"
    assert used["REG"] <= 255


def prove(proven: Proof, look: Callable[[], None], *compiled: tuple) -> None:
    """`look` at kernels, each told by the arguments of `executable.artifact`, or take what was found."""

    def trial() -> str:
        look()
        return RIGHT

    keys = " ".join(executable.key_of(*each) for each in compiled)
    code = (meaning(Path(file)) for file in (__file__, look.__code__.co_filename))
    assert proven(trial, (keys.encode(), repr(cache.versions()).encode(), *code)) == RIGHT


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_cases(case, arch, tmp_path):
    """The kernels that the case's calls launch, so that they are compiled once."""
    device = answer_for(case, arch).device
    for step in steps_of(case, arch):
        assert_in_registers(step, device, tmp_path / "kernel.cubin")


@pytest.mark.parametrize("name", ["few_rows", "varlen", "split_causal", "split_by_itself"])
def test_these_are_the_steps_of_a_call(name, arch, monkeypatch):
    asked, steps = set(), steps_of(CASES[name], arch)

    def executable(*step):
        asked.add(step[:3])
        return lambda *operands: None

    monkeypatch.setattr("cute_flash.launch.executable", executable)
    Call.make(CASES[name]).run(arch)
    assert asked == {step.compiled for step in steps}
    assert len(steps) == 1 + name.startswith("split")


def test_cases_have_rows_enough(arch):
    """Each feature by itself meets the config that calls with many rows get."""
    many = [case for case in CASES.values() if not case.name.startswith(FEW)]
    assert len(many) > 80
    for case in many:
        assert steps_of(case, arch)[0].config == answer_for(case, arch).config, case


@pytest.mark.parametrize("device, rules, dims", SHIPPED, ids=lambda value: str(value).replace(", ", "_"))
def test_extremes(device, rules, dims, tmp_path, proven):
    """With everything that a call may ask for at once, and for other GPUs, where code is other code."""
    answer = answer_for(replace(EXTREMES[rules], dims=dims), device)
    assert answer, str(answer)
    step = Step(answer.kernel, answer.problem, answer.config)

    def look() -> None:
        assert_in_registers(step, answer.device, tmp_path / "kernel.cubin")

    prove(proven, look, (*step.compiled, answer.device))


@pytest.mark.parametrize("tree, table", [("sm80", sm80.FORWARD), ("sm90", sm90.FORWARD)])
def test_every_row_is_covered(tree, table):
    """At the largest head dims that it serves."""
    found = set()
    for device, rules, dims in SHIPPED:
        answer = answer_for(replace(EXTREMES[rules], dims=dims), device)
        if answer.kernel.name.startswith(tree):
            row, _ = next(table.serving(answer.problem, answer.device))
            found |= {row} if (row.head_dim, row.head_dim_v) == dims else set()
    assert found == set(table.rows)


def test_extremes_left_out_have_a_heavier_one_with_the_same_tiles():
    asked = itertools.product(("sm86", "sm120"), (("light", "heavy"), ("blocks_light", "blocks_heavy")), DIMS)
    for device, (light, heavy), dims in asked:
        if (device, light, dims) not in SHIPPED and (device, heavy, dims) in SHIPPED:
            cases = (replace(EXTREMES[name], dims=dims) for name in (light, heavy))
            left_out, kept = (answer_for(case, device).config for case in cases)
            assert left_out == kept


def test_spills_are_noticed(tmp_path):
    from tests.spilling_kernel import compile_for

    assert resources(compile_for("sm_80"), tmp_path / "kernel.cubin")["STACK"] > 0


def test_other_sources_and_another_compiler_are_another_proof(monkeypatch):
    answer = answer_for(EXTREMES["plain"], "sm90")
    step = Step(answer.kernel, answer.problem, answer.config).compiled, answer.device
    seals, looked = [], []

    def sealed_now(*compiled) -> str:
        proof = Proof("a.py::test", {}, 0)
        prove(proof, lambda: looked.append(1), *compiled)
        return proof.said[1]

    kernel = (*step[0], step[1])
    seals += [sealed_now(kernel), sealed_now(kernel), sealed_now(kernel, kernel)]
    seals.append(sealed_now((*step[0], replace(step[1], capability=(10, 0)))))
    monkeypatch.setattr(cache, "versions", lambda: {"nvidia-cutlass-dsl": "0"})
    seals.append(sealed_now(kernel))
    monkeypatch.setattr(executable, "sources_of", lambda kernel: "others")
    seals.append(sealed_now(kernel))
    assert seals[0] == seals[1] and len(set(seals)) == 5 == len(looked) - 1

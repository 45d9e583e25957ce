"""The Blackwell kernel: it compiles, fits, and keeps everything in registers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cute_flash import executable
from cute_flash.arch.problem import Device, Sizes
from cute_flash.arch.sm100 import tuning
from cute_flash.arch.sm100.forward import FORWARD
from cute_flash.emulator.execution import cubin
from tests.proofs import Proof
from tests.test_resources import EXTREMES, answer_for, prove, resources

SHARED = 232448
CAPABILITIES = {"sm_100a": (10, 0), "sm_103a": (10, 3), "sm_110a": (11, 0)}
DEVICES = {target: Device(capability, SHARED) for target, capability in CAPABILITIES.items()}
B200 = DEVICES["sm_100a"]
# The most that each row of the table can be asked for.
ROWS = (
    ("light", (64, 64)),
    ("even", (128, 128)),
    ("light", (128, 128)),
    ("heavy", (128, 128)),
    ("tables", (128, 128)),
    ("even", (192, 128)),
    ("light", (192, 128)),
    ("heavy", (256, 128)),
    ("light", (256, 256)),
    ("heavy", (224, 224)),
    ("heavy", (256, 256)),
    ("blocks_light", (128, 128)),
    ("blocks_light", (192, 128)),
    ("blocks_heavy", (256, 256)),
)


# sm_110a has sm_103a's code, assembled for another target: the rows that need most registers tell, of those
# that get one config there the heaviest.
SAME_CODE = (
    ("heavy", (128, 128)), ("heavy", (256, 256)), ("blocks_light", (128, 128)), ("blocks_heavy", (256, 256)),
)  # fmt: skip
TARGETS = [(target, *row) for target in DEVICES for row in (SAME_CODE if target == "sm_110a" else ROWS)]


ASKED = EXTREMES | {
    "tables": replace(EXTREMES["heavy"], score="plain"),
    "even": replace(EXTREMES["light"], mask="full", varlen=False, used=""),
}


def problem_of(extreme: str, dims: tuple[int, int]):
    return answer_for(replace(ASKED[extreme], dims=dims), "sm100").problem


def prove_in_registers(proven: Proof, path, problem, device: Device, sizes: Sizes | None = None) -> None:
    """Nothing is in local memory, there are no more registers than there are, and products are tcgen05's."""
    assert FORWARD.reasons(problem, device) == ()
    config = FORWARD.config(problem, device, sizes)

    def look() -> None:
        assert_in_registers(problem, config, device, path)

    prove(proven, look, (FORWARD, problem, config, device))


def assert_in_registers(problem, config, device: Device, path) -> None:
    """Compile, and look."""
    built = executable.artifact(FORWARD, problem, config, device)
    used = resources(built.cubin, path)
    assert used["STACK"] == used["LOCAL"] == 0, f"{used} with {config}"
    assert used["REG"] <= config.launch_registers
    (entry,) = re.findall(r"\.entry (\w+)", built.ptx.decode())
    assert cubin.registers(built.cubin, entry) == used["REG"]
    names = {device.target, "sm_101a"} if device.target == "sm_110a" else {device.target}  # one GPU, renamed
    (target,) = re.findall(r"^\.target (\w+)", built.ptx.decode(), re.MULTILINE)
    assert b"tcgen05.mma" in built.ptx and target in names
    reduces = device.capability != B200.capability and problem.head_dim >= tuning.REDUCED_FROM
    assert config.reducing_loads == reduces
    assert config.reducing_loads or b"tcgen05.ld.red" not in built.ptx
    taken = {int(n) for n in re.findall(rb"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", built.ptx)}
    assert taken == {config.softmax_registers, config.correction_registers, config.other_registers}


@pytest.mark.parametrize("target, extreme, dims", TARGETS, ids=str)
def test_rows_compile_without_spills(target, extreme, dims, tmp_path, proven):
    assert DEVICES[target].target == target
    prove_in_registers(proven, tmp_path / "kernel.cubin", problem_of(extreme, dims), DEVICES[target])


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (160, 160), (192, 192)], ids=str)
@pytest.mark.parametrize("target", ["sm_100a", "sm_103a"])
def test_ctas_that_persist_compile_without_spills(target, dims, tmp_path, proven):
    device, problem = replace(DEVICES[target], multiprocessors=148), problem_of("even", dims)
    assert FORWARD.config(problem, device).persistent
    prove_in_registers(proven, tmp_path / "kernel.cubin", problem, device)


@pytest.mark.parametrize(
    "extreme, dims", [("light", (256, 256)), ("even", (224, 224)), ("heavy", (128, 128))], ids=str
)
def test_few_rows_compile_without_spills(extreme, dims, tmp_path, proven):
    """One Q tile with the blocks of keys that many rows have, which no row of the table holds."""
    device, sizes = replace(B200, multiprocessors=148), Sizes(1, 1, 1, 20, 999)
    problem = replace(problem_of(extreme, dims), gqa=False)
    assert FORWARD.config(problem, device, sizes).tile_m == 128
    prove_in_registers(proven, tmp_path / "kernel.cubin", problem, device, sizes)


@pytest.mark.parametrize("extreme, splits", [("light", 0), ("even", 2)])
def test_ctas_do_not_persist_where_tiles_differ(extreme, splits):
    problem = answer_for(replace(ASKED[extreme], dims=(64, 64), splits=splits), "sm100").problem
    config = replace(FORWARD.config(problem, B200), persistent=True)
    with pytest.raises(ValueError, match="CTAs persist where all tiles have as many blocks"):
        FORWARD.launcher(problem, config)


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)], ids=str)
def test_splits_compile_without_spills(dims, tmp_path, proven):
    problem = answer_for(replace(EXTREMES["heavy"], dims=dims, splits=2), "sm100").problem
    prove_in_registers(proven, tmp_path / "kernel.cubin", replace(problem, sink=False), B200)


def test_two_targets_have_the_same_code(proven):
    """Up to names: of the target, and of the kernel, which hold the target."""
    problem, devices = problem_of("heavy", (128, 128)), (DEVICES["sm_103a"], DEVICES["sm_110a"])
    kernels = [(FORWARD, problem, FORWARD.config(problem, device), device) for device in devices]

    def look() -> None:
        named = r"^\.target .*$|\w*sm100_forward\w*|//.*$"
        texts = (executable.artifact(*kernel).ptx.decode() for kernel in kernels)
        first, second = (re.sub(named, "", text, flags=re.MULTILINE) for text in texts)
        assert first == second

    prove(proven, look, *kernels)


def test_every_row_is_covered():
    chosen = {FORWARD.config(problem_of(*row), B200) for row in ROWS}
    assert chosen == {row.config for row in tuning.ROWS}


def test_every_config_of_the_same_code_is_covered():
    device, dims = DEVICES["sm_110a"], {dims for _, dims in SAME_CODE}
    heaviest = {(row[1], FORWARD.config(problem_of(*row), device)) for row in SAME_CODE}
    for row in ROWS:
        if row[0] != "even" and row[1] in dims:
            assert (row[1], FORWARD.config(problem_of(*row), device)) in heaviest


@pytest.mark.parametrize("config", [row.config for row in tuning.ROWS], ids=str)
def test_roles_share_what_there_is(config):
    """setmaxnreg only moves registers: roles may not want more than the CTA is launched with."""
    wanted = config.tiles * config.softmax_registers + config.correction_registers + config.other_registers
    assert wanted <= (config.tiles + 2) * config.launch_registers
    assert config.threads * config.launch_registers <= 65536


def test_tensor_memory_is_checked():
    from cute_flash.arch.sm100.tmem import Plan

    for row in tuning.ROWS:
        plan = Plan(row.config.tiles, row.config.slots, row.config.tile_n, row.head_dim_v)
        assert plan.used <= plan.allocated <= 512
    with pytest.raises(ValueError, match="takes 768 columns of tensor memory, there are 512"):
        Plan(2, 1, 128, 256)


def test_every_head_dim_has_a_row():
    for dim in range(8, 257, 8):
        for dim_v in range(8, 257, 8):
            for extreme in EXTREMES:
                problem = replace(problem_of(extreme, (64, 64)), head_dim=dim, head_dim_v=dim_v)
                assert FORWARD.reasons(problem, B200) == ()

"""What is Hopper's own of gradients in FP8: copies by columns, 128 rows at a time, a short accumulator, and
products that run beside each other. What both trees have in common is in tests/test_fp8_backward.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash import executable
from cute_flash.arch.backward import SCRATCH_TILE, first_scratch_row, scratch_columns, scratch_rows
from cute_flash.arch.sm90.fp8_backward import QUANTIZED_BACKWARD, tuning
from cute_flash.arch.sm90.fp8_backward.config import Config
from cute_flash.arch.transposed import COPIED, GROUP, TRANSPOSE, TransposeConfig, TransposeProblem
from cute_flash.dispatch import EMULATED
from cute_flash.fp8 import flash_attn_fp8_func
from profiling import sass
from tests.fp8_gradients import Fp8, Fp8Call, fullest, main_step
from tests.test_resources import assert_in_registers

H100 = EMULATED["sm90"]
# Tiles of 128 rows, of 64 columns and of 32; a warpgroup's dQ in one piece and in two.
CASES = {
    "rows": Fp8("rows", ((300, 270),), heads=(2, 1)),
    "few_columns": Fp8("few_columns", ((140, 270),), heads=(1, 1), dims=(32, 16), mask="causal"),
    "columns": Fp8("columns", ((140, 140),), heads=(2, 2), dims=(80, 48), mask="window"),
    "pieces": Fp8("pieces", ((140, 140),), heads=(1, 1), dims=(112, 128), mask="causal"),
    "packed": Fp8("packed", ((70, 150), (1, 77), (130, 129)), varlen=True, used="qk", dims=(48, 64)),
}
ORDERS = {
    "late": {"asynchrony": "late"},
    "random": {"asynchrony": "random", "schedule": "random", "seed": 2},
    "short": {"fp8_accumulator": "hopper"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_events(name, order):
    Fp8Call.make(CASES[name]).check_gradients("sm90", races=True, by_the_book=True, **ORDERS[order])


def test_in_turns_gradients_have_the_same_bits():
    """Whatever the order of events."""
    case = replace(CASES["rows"], deterministic=True)
    dout, dlse = Fp8Call.make(case).cotangents()
    found = [
        Fp8Call.make(case).run_backward(dout, dlse, "sm90", schedule="random", asynchrony="random", seed=seed)
        for seed in range(2)
    ]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_short_sums_are_taken_over(dims):
    """The tensor core's own sums, of one tile at a time, cost less than a tenth of what 8 bits do."""
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(1, 600, 1, dim, generator=generator).bfloat16().requires_grad_()
        for dim in (dims[0], dims[0], dims[1])
    ]
    dout, found = torch.randn(1, 600, 1, dims[1], generator=generator).bfloat16(), {}
    for kind in ("float32", "hopper"):
        with cute_flash.emulated("sm90"):
            out = flash_attn_fp8_func(*given)
        with cute_flash.emulated("sm90", fp8_accumulator=kind):
            found[kind] = torch.autograd.grad(out, given, dout)
    for one, other in zip(*found.values(), strict=True):
        apart = (one - other).double().square().mean().sqrt() / other.double().square().mean().sqrt()
        assert 0 < apart < 8e-3


@pytest.mark.parametrize("of", COPIED)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_copies_by_columns(of, packed, dim):
    """Bit for bit; zeros for rows and columns that are not in use, wherever tiles have some that are."""
    problem = TransposeProblem("float8_e4m3fn", of, dim, varlen=packed, used=True)
    lengths, used = (150, 130), torch.tensor([140, 3], dtype=torch.int32)
    lengths = lengths if packed else (150, 150)
    shape = (sum(lengths), 2, dim) if packed else (2, 150, 2, dim)
    rows = torch.randint(0, 256, shape).to(torch.uint8)
    columns = torch.full((2, scratch_columns(dim), scratch_rows(sum(lengths), 2)), 255, dtype=torch.uint8)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    given = rows, columns, starts if packed else None, used, 150 if packed else None
    with cute_flash.emulated("sm90", races=True):
        executable.executable(TRANSPOSE, problem, TransposeConfig.of(problem), H100, "emulator")(*given)
    flat = rows if packed else rows.flatten(0, 1)
    for batch in range(2):
        first, start = first_scratch_row(int(starts[batch]), batch), int(starts[batch])
        count = -(-lengths[batch] // SCRATCH_TILE) * SCRATCH_TILE
        wanted = torch.zeros(2, scratch_columns(dim), count, dtype=torch.uint8)
        in_use = int(used[batch])
        wanted[:, :dim, :in_use] = flat[start : start + in_use].permute(1, 2, 0)
        order = [g + row for g in range(0, count, GROUP) for row in problem.order]
        assert torch.equal(columns[:, :, first : first + count], wanted[:, :, order])


# Of every row of the table: without mask and score, with light ones, with all that there is.
ROWS = (
    ("even", (32, 32)), ("light", (32, 32)), ("heavy", (32, 32)),
    ("even", (64, 64)), ("plain", (64, 64)), ("blocks_heavy", (64, 64)),
    ("even", (96, 96)), ("light", (96, 96)),
    ("plain", (128, 64)), ("heavy", (128, 64)),
    ("even", (128, 128)), ("light", (128, 128)), ("heavy", (128, 128)),
)  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rules, dims", ROWS, ids=str)
def test_products_run_beside_each_other(rules, dims, deterministic, tmp_path):
    """Nothing spills, and ptxas serializes no products: it commits them in the groups that are asked for."""
    step = main_step(fullest(rules, dims, deterministic=deterministic), "sm90")
    assert step.kernel is QUANTIZED_BACKWARD
    assert_in_registers(step, H100, tmp_path / "kernel.cubin")
    built = executable.artifact(*step.compiled, H100)
    asked = built.ptx.decode().count("wgmma.commit_group")
    products = [line for line in sass.disassembly(built.cubin).splitlines() if "QGMMA" in line]
    assert sum("gsb0" in line for line in products) == asked < len(products)


def test_every_row_has_all_that_it_may_be_asked_for():
    configs = {main_step(fullest(rules, dims), "sm90").config for rules, dims in ROWS}
    assert configs == {row.config for row in tuning.ROWS}


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="96 is no multiple of 64"):
        Config(columns=96, columns_v=96, piece_columns=64)
    with pytest.raises(ValueError, match="leave fewer than 24 registers"):
        Config(columns=128, columns_v=128, piece_columns=128)

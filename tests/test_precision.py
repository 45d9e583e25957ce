"""Formats of numbers: what tiles ask of them, and results in another one than the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash import arch as trees
from cute_flash.arch.precision import PRECISIONS, Precision
from cute_flash.arch.problem import Operands, Problem
from cute_flash.dispatch import EMULATED
from cute_flash.executable import executable


@pytest.mark.parametrize("bits, k_step, padded, widths", [(16, 16, 112, (64, 16)), (8, 32, 128, (128, 32))])
def test_rows_are_whole_k_steps_and_swizzled_parts(bits, k_step, padded, widths):
    """In 32-byte steps, and in the widest of 128, 64 and 32 bytes that divide a row."""
    precision = Precision("", bits)
    assert precision.k_step == k_step and precision.nbytes(48) == 6 * bits
    assert precision.padded(100) == padded
    assert precision.padded(100, parts=2) % (2 * k_step) == 0
    assert tuple(map(precision.swizzle_width, (2 * widths[0], 3 * widths[1]))) == widths


def test_kernels_refuse_results_that_they_cannot_write(arch):
    problem = Problem("float16", 64, 64, out_dtype="float32")
    (reason, *rest) = trees.load(EMULATED[arch])[0].reasons(problem, EMULATED[arch])
    assert reason == "out_dtype float32 is not one of float16, bfloat16" and not rest


def test_results_in_another_dtype(arch):
    """float16 in, bfloat16 out: as accurate as bfloat16 is, which the same bits as float16 would not be."""
    problem, device = Problem("float16", 64, 64, out_dtype="bfloat16"), EMULATED[arch]
    assert (problem.precision, problem.out_precision) == tuple(map(PRECISIONS.get, ("float16", "bfloat16")))
    kernel = trees.load(device)[0]
    q, k, v = (torch.randn(1, rows, 1, 64, dtype=torch.float16) for rows in (40, 70, 70))
    out, lse = torch.empty_like(q, dtype=torch.bfloat16), torch.empty(1, 1, 40)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "softmax_scale": 0.125, "multiprocessors": 1}
    with cute_flash.emulated(arch):
        run = executable(kernel, problem, kernel.config(problem, device), device, "emulator")
        run(*Operands(**dict.fromkeys(Operands._fields) | given))
    q, k, v = (x[0, :, 0].double() for x in (q, k, v))
    expected = torch.softmax(q @ k.T * 0.125, -1) @ v
    torch.testing.assert_close(out[0, :, 0].double(), expected, rtol=2**-8, atol=2e-3)
    assert kernel.reasons(replace(problem, out_dtype=None), device) == ()

"""Hopper's FP8 kernel with products summed otherwise than its table says: in one place, or in parts of tiles.

With an exact accumulator it makes no difference, with Hopper's it is what two levels are for: the errors are
those of the model of the arithmetic, profiling/accuracy.py, whose table is committed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

import cute_flash
from cute_flash import executable, flash_attn_func, flash_attn_varlen_func, quantize, repeat
from cute_flash.arch.kernel import Step
from cute_flash.arch.sm90.fp8 import QUANTIZED, tuning
from cute_flash.arch.sm90.fp8.config import Config
from cute_flash.cache import Artifact
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from cute_flash.problems import problem
from profiling import accuracy, accuracy_table
from profiling.accuracy import Operand, Scheme
from tests.emulator.negative.mutations import WGMMA
from tests.harness import where
from tests.test_quantized_compile import HOPPER, step_of
from tests.test_resources import assert_in_registers

INTERVALS = (0, 2, 3)
DATA = json.loads(accuracy_table.JSON.read_text())


@pytest.fixture
def promotion(monkeypatch) -> Callable[[int], None]:
    """Called with an interval, it puts that into every row of the table."""
    rows = tuning.TABLE.rows

    def put(interval: int) -> None:
        changed = (replace(row, config=replace(row.config, promotion=interval)) for row in rows)
        monkeypatch.setattr(tuning.TABLE, "rows", tuple(changed))
        repeat.forget()

    yield put
    repeat.forget()


@dataclass(frozen=True)
class Case:
    """Tiles of 128 or 192 keys, four or five of a sequence or as many as it uses, the last not whole."""

    rows: int = 150
    keys: int = 600
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (64, 64)
    options: dict[str, Any] = field(default_factory=dict)
    used: tuple[int, ...] = ()

    def visible(self, keys: int) -> torch.Tensor:
        """(rows, keys) bool, of a sequence of so many."""
        q, k = torch.arange(self.rows)[:, None] + keys - self.rows, torch.arange(keys)[None]
        left, right = self.options.get("window_size", (math.inf, math.inf))
        return (k >= q - left) & (k <= q + (0 if self.options.get("causal") else right))


SINK = torch.randn(2)
CASES = {
    "one tile": Case(keys=100),
    "causal": Case(options={"causal": True}, dims=(128, 128)),
    "window": Case(options={"window_size": (300, 5)}, dims=(96, 64)),
    "parts of the keys": Case(options={"num_splits": 2, "softcap": 5.0, "learnable_sink": SINK}),
    "packed": Case(options={"causal": True}, used=(0, 520, 300)),
}


def made(case: Case) -> tuple[cute_flash.Quantized, ...]:
    """q, k and v. Scores of earlier keys are larger: the maximum rises with every tile, the latest first."""
    batch, (heads, heads_kv), (dim, dim_v) = max(1, len(case.used)), case.heads, case.dims
    q = torch.randn(batch, case.rows, heads, dim)
    k = torch.randn(batch, case.keys, heads_kv, dim) * torch.linspace(4.0, 0.5, case.keys)[:, None, None]
    v = torch.randn(batch, case.keys, heads_kv, dim_v) + 0.5
    return tuple(quantize(x.bfloat16(), hadamard=False, heads_kv=heads_kv) for x in (q, k, v))


def called(
    case: Case, quantized: tuple[cute_flash.Quantized, ...], **emulation: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), the latter (batch, heads, rows). NaN lies where keys of a sequence are not used."""
    names, data = ("q_descale", "k_descale", "v_descale"), [x.data.clone() for x in quantized]
    asked = {"num_splits": 1, "out_dtype": torch.float16, "return_lse": True, **case.options}
    asked |= dict(zip(names, (x.scale for x in quantized), strict=True))
    if not case.used:
        with where("sm90", **emulation):
            return flash_attn_func(*data, **asked)
    for x in data[1:]:
        for i, used in enumerate(case.used):
            x[i, used:] = torch.nan
    starts = (torch.arange(len(case.used) + 1, dtype=torch.int32) * x.shape[1] for x in data[:2])
    asked["seqused_k"] = torch.tensor(case.used, dtype=torch.int32)
    with where("sm90", **emulation):
        packed = (x.flatten(0, 1) for x in data)
        out, lse = flash_attn_varlen_func(*packed, *starts, case.rows, case.keys, **asked)
    return out.unflatten(0, (len(case.used), -1)), lse.unflatten(1, (len(case.used), -1)).transpose(0, 1)


def exact(case: Case, quantized: tuple[cute_flash.Quantized, ...]) -> torch.Tensor:
    """In float64, of what is stored."""
    q, k, v = (x.dequantize().double() for x in quantized)
    found = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    cap, sink = case.options.get("softcap"), case.options.get("learnable_sink", torch.tensor(-math.inf))
    for i, used in enumerate(case.used or (case.keys,)):
        s = torch.einsum("qhd,kd->hqk", q[i], k[i, :used, 0]) * q.shape[3] ** -0.5
        s = (cap * torch.tanh(s / cap) if cap else s).masked_fill(~case.visible(used), -math.inf)
        sinks = sink.double().expand(len(s))[:, None, None].expand(*s.shape[:2], 1)
        p = torch.cat([s, sinks], 2).softmax(2).nan_to_num(0.0)[..., :used]
        found[i] = torch.einsum("hqk,kd->qhd", p, v[i, :used, 0])
    return found


@pytest.mark.parametrize("name", CASES)
def test_any_interval_sums_the_same(name, promotion):
    """Weights and their sums are the same bits, O is but for float32's rounding; and it is right."""
    case = CASES[name]
    quantized = made(case)
    plain, top = called(case, quantized)
    wanted = exact(case, quantized)
    assert (plain.double() - wanted).square().mean() < 0.03**2 * wanted.square().mean()
    for interval in INTERVALS:
        promotion(interval)
        out, lse = called(case, quantized)
        assert torch.equal(lse, top)
        torch.testing.assert_close(out, plain, rtol=2**-10, atol=1e-4)


# Of events, for waits and fences to hold against.
ORDERS = (
    {"asynchrony": "late", "races": True},
    {"asynchrony": "eager", "races": True},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, "races": True} for seed in range(5)),
)


@pytest.mark.parametrize("interval", INTERVALS[:2])
def test_any_order_of_events(interval, promotion):
    case = replace(CASES["causal"], heads=(1, 1), dims=(32, 32))
    quantized = made(case)
    promotion(interval)
    wanted = called(case, quantized)
    for order in ORDERS:
        assert all(map(torch.equal, called(case, quantized, **order), wanted)), order


@cache
def compiled(interval: int) -> Artifact:
    """The kernel for head dim 32 without a mask."""
    asked = problem(
        dtype=torch.float8_e4m3fn, head_dim=32, code=cute_flash.rules.encode([], []).code, lse=True,
        out_dtype="float16",
    )  # fmt: skip
    config = replace(QUANTIZED.config(asked, HOPPER), promotion=interval)
    return executable.artifact(QUANTIZED, asked, config, HOPPER)


# P, O and the part were last touched before the fence of S = Q K, just before.
HARMLESS = {"no fence before a product": 2}


@pytest.mark.parametrize("interval", INTERVALS[:2])
def test_every_change_of_products_is_noticed(interval):
    """Waits, fences and commits removed one by one: the emulator objects, or results differ."""
    case = Case(rows=100, keys=500, heads=(1, 1), dims=(32, 32))
    quantized, built = made(case), compiled(interval)

    def results(ptx: str, **order: Any) -> torch.Tensor:
        changed = EmulatedKernel(built._replace(ptx=ptx.encode()), HOPPER)
        with mock.patch("cute_flash.launch.executable", lambda *_: changed):
            out, lse = called(case, quantized, **order)
        return torch.cat([out.float().flatten(), lse.flatten()])

    def is_noticed(ptx: str) -> bool:
        try:
            return not all(torch.equal(results(ptx, **order), right) for order in ORDERS[:3])
        except EmulatorError:
            return True

    original = built.ptx.decode()
    right = results(original)
    assert not is_noticed(original)
    for name in ("no wait for a product", "no fence before a product", "no commit of a product"):
        mutants = WGMMA[name].mutants(original)
        missed = [number for number, _, text in mutants if not is_noticed(text)]
        assert missed == ([HARMLESS[name]] if name in HARMLESS else []), name


KEYS = 16384


def errors(interval: int, accumulator: str) -> tuple[float, float]:
    """Relative to the result, of values with a mean: of the kernel, and of the model of its arithmetic."""
    q, k, v = (torch.randn(1, n, 1, 64) for n in (128, KEYS, KEYS))
    q, k, v = (quantize(x.bfloat16(), hadamard=False, heads_kv=1) for x in (q, k, v + 1.0))
    case = Case(128, KEYS, (1, 1))
    out, _ = called(case, (q, k, v), fp8_accumulator=accumulator)
    operands = (Operand(x.data.float()[0, :, 0], x.scale.expand(x.shape[1], 1)) for x in (q, k, v))
    # Tiles of 192 keys, of which O takes over either half by itself.
    scheme = Scheme(accumulator=accumulator, promoted=interval or None, tile=96 if interval == 1 else 192)
    model, _ = accuracy.attention(*operands, 64**-0.5, scheme)
    wanted = exact(case, (q, k, v))[0, :, 0]
    size = wanted.square().mean().sqrt()
    return tuple(((x.double() - wanted).square().mean().sqrt() / size).item() for x in (out[0, :, 0], model))


def test_two_levels_keep_what_hoppers_accumulator_loses(promotion):
    """At 16k keys: as much as a model with the accumulator that is published: 13 fraction bits, cut."""
    found = {}
    for interval in (1, 4, 0):
        promotion(interval)
        found[interval], model = errors(interval, "hopper")
        assert found[interval] == pytest.approx(model, rel=0.25)
    with_float32, _ = errors(0, "float32")
    assert found[1] < 1.5 * with_float32
    assert found[0] > 10 * found[4] > 30 * found[1]
    table = {(row["keys"], row["accumulator"]): row["relative"] for row in DATA["accumulators"]}
    for name, interval in (("Hopper, never", 0), ("Hopper, every 4 tiles", 4)):
        assert 0.5 < found[interval] / table[KEYS, name] < 2


@pytest.mark.parametrize(
    "interval, asked, dims",
    [
        *((interval, "packed", dims) for interval in (0, 2) for dims in ((64, 64), (128, 128))),
        (0, "heavy", (128, 128)),
        (2, "heavy", (64, 64)),
    ],
)
def test_nothing_spills(interval, asked, dims, tmp_path):
    """With every row's tiles as they are. O and a part of all columns leave no room beside tables at 128."""
    kernel, problem, config, _ = step_of(QUANTIZED, HOPPER, asked, dims, None)
    step = Step(kernel, problem, replace(config, promotion=interval))
    assert_in_registers(step, HOPPER, tmp_path / "kernel.cubin")


def test_refused(promotion):
    """What has no meaning, and scales that one accumulator cannot put on."""
    with pytest.raises(ValueError, match="promotion is -1; allowed: 0, never, or a number of tiles"):
        Config(**tuning.SIZES, tile_n=128, promotion=-1)
    x = quantize(torch.randn(1, 20, 1, 64).bfloat16(), block=128, hadamard=False)
    for interval in INTERVALS:
        promotion(interval)
        words = f"promotion is {interval} with scales of blocks of V: .* no scale in common; allowed: 1"
        with cute_flash.emulated("sm90"), pytest.raises(ValueError, match=words):
            cute_flash.flash_attn_quantized_func(x, x, x)


def test_every_row_sums_in_two_levels():
    assert {row.config.promotion for row in tuning.TABLE.rows} == {1}

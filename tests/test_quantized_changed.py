"""FP8 kernels in other orders of events, and Hopper's changed: nothing it waits for, fences or tells is idle.

A call's results have the same bits in any order. A change is noticed where the emulator objects or a bit
differs; those that nothing notices stand in HARMLESS with the reason, by kind and by number of the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

import cute_flash
from cute_flash import executable, flash_attn_quantized_func, quantize
from cute_flash.arch.kernel import Kernel, Step
from cute_flash.arch.quantize import QUANTIZE, QuantizeProblem
from cute_flash.arch.sm90.fp8 import QUANTIZED as HOPPERS
from cute_flash.arch.sm100.fp8 import QUANTIZED as BLACKWELLS
from cute_flash.arch.sm100.scaled import BLOCK_SCALED
from cute_flash.cache import Artifact
from cute_flash.dispatch import EMULATED
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from cute_flash.problems import problem
from tests import proofs
from tests.emulator.negative.mutations import TMA, WGMMA
from tests.emulator.negative.trial import Launch
from tests.test_resources import assert_in_registers, prove

SCALED = {"mxfp8": ("mxfp8", "mxfp8"), "nvfp4": ("nvfp4", "e4m3")}  # formats of q and k, and of v, on sm100
SPANS = "sm90 spans"  # Hopper's with tiles of 192 keys, whose products have two spans
KERNELS: dict[str, Kernel] = {"sm90": HOPPERS, SPANS: HOPPERS, "sm100": BLACKWELLS}
BLOCKS = {"sm90": 128, "sm100": 128, SPANS: None}
# Of q and k, and of v. On Hopper two pieces of V's columns; tiles of sm100's factors begin inside atoms.
DIMS = {"sm90": (32, 128), SPANS: (32, 32), "sm100": (32, 32), **dict.fromkeys(SCALED, (128, 128))}
WATCHED = {"races": True}
ATTEMPTS = (
    {"asynchrony": "late", **WATCHED},
    {"asynchrony": "late"},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, **WATCHED} for seed in range(3)),
)
SEEDS = 20
CHANGES = TMA | WGMMA
FIRST = "nobody has filled the slot before"
ONCE = "Q comes once: nobody waits for its place to be empty"
BY_K = "V's slot is free when K's is, for which the load waits before: that product waits for V transposed"
HARMLESS: dict[str, dict[int, str]] = {
    "no wait for an mbarrier": {0: FIRST, 1: FIRST, 3: BY_K},
    "one arrival more expected": {1: ONCE},
    "half the arrivals expected": {1: ONCE, 8: BY_K},
    "no barrier": {3: "the last turn, which has begun no product: it is there to meet an arrival"},
    "no barrier of a warp": {1: "a wait for products is the whole warp's: its lanes have met"},
    "no change of registers": {1: "more registers are the machine code's need, which PTX does not show"},
    "no fence before a product": {2: "P and O were last touched before the fence of S = Q K, just before"},
}


@cache
def tensors(name: str) -> tuple[cute_flash.Quantized, ...]:
    """Four tiles of keys, the last not whole, for rows of two warpgroups, the second not whole."""
    generator, (dim, dim_v) = torch.Generator().manual_seed(0), DIMS[name]
    keys = 700 if name == SPANS else 500
    shapes = ((1, 100, 1, dim), (1, keys, 1, dim), (1, keys, 1, dim_v))
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    if name not in SCALED:
        block = BLOCKS[name]
        return quantize(q, block=block), quantize(k, block=block), quantize(v, block=block, hadamard=False)
    form, v_form = SCALED[name]
    axis = "seqlen" if v_form == "mxfp8" else "head_dim"
    return quantize(q, form), quantize(k, form), quantize(v, v_form, axis=axis, hadamard=False)


def device_of(name: str) -> str:
    return "sm100" if name in SCALED else name.split()[0]


@cache
def compiled(name: str) -> Artifact:
    """The kernel that serves the call."""
    device, code = EMULATED[device_of(name)], cute_flash.rules.encode([], []).code
    kernel, element = KERNELS.get(name, BLOCK_SCALED), tensors(name)[0].data.dtype
    more, (dim, dim_v) = {"block": BLOCKS.get(name)}, DIMS[name]
    if name in SCALED:
        more = dict(zip(("form", "v_form"), SCALED[name], strict=True))
    asked = problem(dtype=element, head_dim=dim, head_dim_v=dim_v, code=code, lse=True, **more)
    return executable.artifact(kernel, asked, kernel.config(asked, device), device)


def run(ptx: bytes, name: str, **options) -> torch.Tensor:
    """All results of the call, in one row, from this PTX."""
    device = device_of(name)
    changed = EmulatedKernel(compiled(name)._replace(ptx=ptx), EMULATED[device])
    served = mock.patch("cute_flash.launch.executable", lambda *_: changed)
    with served, cute_flash.emulated(device, contract="ptxas", **options):
        out, lse = flash_attn_quantized_func(*tensors(name), num_splits=1, return_lse=True)
    return torch.cat([out.float().flatten(), lse.flatten()])


def is_noticed(ptx: str, name: str, right: torch.Tensor) -> bool:
    for options in ATTEMPTS:
        try:
            if not torch.equal(run(ptx.encode(), name, **options), right):
                return True
        except EmulatorError:
            return True
    return False


def inputs(change: str, name: str) -> Iterator[bytes]:
    """What an outcome depends on, besides the changed texts."""
    yield from proofs.emulator()
    yield proofs.meaning(Path(__file__))
    yield change.encode()
    yield from Launch(None, compiled(name), ()).digested()


def in_words(found: list[int]) -> str:
    return f"unnoticed: {' '.join(map(str, found)) or 'none'}"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["sm90", SPANS])
def test_every_change_is_noticed(name, change, proven):
    """Site by site."""

    mutants = list(CHANGES[change].mutants(compiled(name).ptx.decode()))

    def trial() -> str:
        right = run(compiled(name).ptx, name)
        return in_words([number for number, _, text in mutants if not is_noticed(text, name, right)])

    texts = (text.encode() for _, _, text in mutants)
    assert proven(trial, (*inputs(change, name), *texts)) == in_words(list(HARMLESS.get(change, ())))


@pytest.mark.parametrize("name", [*KERNELS, *SCALED])
def test_any_order_of_events(name, proven):
    """Twenty of them, and races looked for: the same bits."""

    def trial() -> str:
        right = run(compiled(name).ptx, name, asynchrony="late", **WATCHED)
        random = {"asynchrony": "random", "schedule": "random", **WATCHED}
        found = (run(compiled(name).ptx, name, seed=seed, **random) for seed in range(SEEDS))
        return in_words([seed for seed, results in enumerate(found) if not torch.equal(results, right)])

    assert proven(trial, inputs("order", name)) == in_words([])


def largest(device: str) -> tuple[Step, ...]:
    """What takes most registers: of the quantizing kernel a block of 128 rows, of attention rules, too."""
    asked = [QuantizeProblem("bfloat16", 256, form, 128, True) for form in ("e4m3", "mxfp8")]
    found = [Step(QUANTIZE, one, QUANTIZE.config(one, EMULATED[device])) for one in asked]
    for dim in {"sm90": (128,), "sm100": (128, 256)}.get(device, ()):
        kernel, window = KERNELS[device], [cute_flash.SlidingWindow(5, 5)]
        kinds = (([], 128), ([cute_flash.Softcap(5.0)], 64)) if device == "sm100" else (([], 128),)
        for scores, block in kinds:
            code = cute_flash.rules.encode(window, scores).code
            asked = {"out_dtype": "float16", "gqa": True, "lse": True, "block": block}
            one = problem(dtype=torch.float8_e4m3fn, head_dim=dim, code=code, **asked)
            found.append(Step(kernel, one, kernel.config(one, EMULATED[device])))
    return tuple(found)


@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100"])
def test_nothing_spills(device, tmp_path, proven):
    steps = largest(device)

    def look() -> None:
        for step in steps:
            assert_in_registers(step, EMULATED[device], tmp_path / "kernel.cubin")

    prove(proven, look, *((*step.compiled, EMULATED[device]) for step in steps))

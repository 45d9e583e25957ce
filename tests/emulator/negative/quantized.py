"""Blackwell's kernels of few bits on trial: which are changed, and what is first said against a change.

A change is noticed where the emulator objects or a bit of a result differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cute_flash
from cute_flash import executable, flash_attn_quantized_func, quantize
from cute_flash.arch.precision import QUANTIZATIONS
from cute_flash.arch.sm100.fp8 import QUANTIZED
from cute_flash.arch.sm100.fp8.tuning import Config
from cute_flash.arch.sm100.scaled import BLOCK_SCALED
from cute_flash.arch.sm100.scaled.config import Config as ScaledConfig
from cute_flash.cache import Artifact
from cute_flash.dispatch import EMULATED
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from cute_flash.problems import problem
from tests import proofs

from .mutations import FACTORS, TCGEN05, TMA, Mutation
from .subjects import LEAVING, LEAVING_TENSOR_MEMORY, ONE_TILE, TWO_TILES
from .trial import ATTEMPTS, Launch

DEVICE = "sm100"


@dataclass(frozen=True)
class Asked:
    """A call. scale: softmax_scale, so large that maxima rise and O must be rescaled."""

    rows: int
    keys: int
    heads: int = 1
    scale: float = 2.0


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel to change, by a config of its own, so that tuning does not move the sites.

    block: of rows that share a scale; None: one scale for a head. multiprocessors: of the device. dim: of
    heads. forms: of q and k, and of v.
    """

    config: Config
    mutations: dict[str, Mutation]
    calls: tuple[Asked, ...]
    block: int | None = None
    multiprocessors: int = 2
    dim: int = 32
    forms: tuple[str, str] = ("e4m3", "e4m3")

    @property
    def is_scaled(self) -> bool:
        """Whether tensor cores apply scales."""
        return self.forms[0] != "e4m3"


# Rows of both Q tiles, the second not whole, and five blocks of keys, the last not whole, so that every ring
# is filled again; and scores so large that rows take their maximum off first, which is a path of its own.
ASKED = Asked(140, 150)
LOWERED = replace(ASKED, scale=2048.0)
SPREAD = replace(ASKED, scale=0.05)  # every key has a part in every row
# What roles tell each other, which goes on across the tiles of a CTA that takes several.
TOLD = ("no arrival", "no fence", "no commit of a product", "no commit of a store", "no wait for a store")
ACROSS_TILES = {name: (TMA | TCGEN05)[name] for name in TOLD}
# Of a kernel whose roles are those of others: what brings factors.
BRINGING = FACTORS | {name: TMA[name] for name in ("half the bytes expected", "no arrival")}
SUBJECTS = {
    "two tiles": Subject(Config(**TWO_TILES, tile_n=32), TMA | TCGEN05, (ASKED, LOWERED), 64),
    # Three tiles of one CTA: all have three blocks, or two.
    "persistent": Subject(
        Config(**TWO_TILES, tile_n=32, persistent=True), ACROSS_TILES,
        (Asked(140, 90, 3), Asked(140, 60, 3), Asked(140, 60, 3, LOWERED.scale)), 64, multiprocessors=1,
    ),
    "one tile": Subject(
        Config(**ONE_TILE, tile_n=32), LEAVING | LEAVING_TENSOR_MEMORY,
        (Asked(100, 150), Asked(100, 150, scale=LOWERED.scale)), None,
    ),
    # Tiles begin at each quarter of an atom; steps of either product take each byte.
    "mxfp8": Subject(
        ScaledConfig(**TWO_TILES, tile_n=32), TMA | TCGEN05 | FACTORS, (SPREAD, ASKED, LOWERED), dim=128,
        forms=("mxfp8", "mxfp8"),
    ),
    # Tiles reach into two atoms, in two groups of columns. CTAs persist: two tiles of one.
    "nvfp4": Subject(
        ScaledConfig(**TWO_TILES, tile_n=96, persistent=True), BRINGING,
        (replace(SPREAD, keys=300, heads=2),), dim=128, forms=("nvfp4", "mxfp8"), multiprocessors=1,
    ),
}  # fmt: skip


@cache
def tensors(asked: Asked, subject: Subject) -> tuple[cute_flash.Quantized, ...]:
    """q, k and v of a call. Random normal; where tensor cores scale them, groups of many magnitudes."""
    generator, (form, v_form) = torch.Generator().manual_seed(0), subject.forms
    lengths = (asked.rows, asked.keys, asked.keys)
    shapes = [(1, length, asked.heads, subject.dim) for length in lengths]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if subject.is_scaled:
        q, k, v = (x * torch.randn(x.shape, generator=generator).exp2() for x in (q, k, v))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    shared = {} if subject.block is None else {"block": subject.block}
    of_v = {"axis": "seqlen"} if v_form == "mxfp8" else shared
    # Rotated numbers of all groups would be of one magnitude.
    q, k = (quantize(x, form, hadamard=not subject.is_scaled, **shared) for x in (q, k))
    return q, k, quantize(v, v_form, hadamard=False, **of_v)


@cache
def compiled(name: str) -> Artifact:
    """The kernel that is changed."""
    subject, code = SUBJECTS[name], cute_flash.rules.encode([], []).code
    form, v_form = subject.forms
    element = QUANTIZATIONS[form].element.name
    more = {"form": form, "v_form": v_form} if subject.is_scaled else {"block": subject.block}
    asked = problem(dtype=element, head_dim=subject.dim, code=code, lse=True, **more)
    kernel = BLOCK_SCALED if subject.is_scaled else QUANTIZED
    return executable.artifact(kernel, asked, subject.config, EMULATED[DEVICE])


def run(name: str, ptx: str, **options: Any) -> Iterator[torch.Tensor]:
    """The results of each call, in one row, from this PTX."""
    subject, device = SUBJECTS[name], EMULATED[DEVICE]
    changed = EmulatedKernel(compiled(name)._replace(ptx=ptx.encode()), device)
    few = replace(device, multiprocessors=subject.multiprocessors)
    for asked in subject.calls:
        given = tensors(asked, subject)
        with (
            mock.patch("cute_flash.launch.executable", lambda *_: changed),
            mock.patch.dict(EMULATED, {DEVICE: few}),
            cute_flash.emulated(DEVICE, contract="ptxas", **options),
        ):
            out, lse = flash_attn_quantized_func(*given, softmax_scale=asked.scale, return_lse=True)
        yield torch.cat([out.float().flatten(), lse.flatten()])


@cache
def right(name: str) -> tuple[torch.Tensor, ...]:
    """What the kernel results in as it is."""
    return tuple(run(name, compiled(name).ptx.decode()))


def objection(name: str, ptx: str) -> str:
    """What is first said against a kernel; empty where nothing is."""
    for options in ATTEMPTS:
        try:
            for found, wanted in zip(run(name, ptx, **options), right(name), strict=True):
                if not torch.equal(found, wanted):
                    return "another result"
        except EmulatorError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def unnoticed(name: str, mutants: list[tuple[int, str, str]]) -> str:
    """Sites of the changes that nothing objects to, in words."""
    missed = [number for number, _, text in mutants if not objection(name, text)]
    return " ".join(map(str, (f"unnoticed of {len(mutants)}:", *missed)))


def dependencies(name: str) -> Iterator[bytes]:
    """What a verdict depends on besides a change."""
    subject = SUBJECTS[name]
    yield from proofs.emulator()
    yield proofs.meaning(Path(__file__))
    yield repr((ATTEMPTS, EMULATED[DEVICE], subject.config, subject.calls, subject.block)).encode()
    yield from Launch(None, compiled(name), ()).digested()
    for asked in subject.calls:
        for x in tensors(asked, subject):
            given = (each for each in (x.data, x.scale, x.tensor_scale) if each is not None)
            yield from (each.contiguous().view(torch.uint8).numpy().tobytes() for each in given)

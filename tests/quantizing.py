"""Cases in FP8: as those of tests/cases.py and tests/serving.py with q, k and v of 8 bits and scales beside
them, through the functions that users call, and the accuracy that rounding P to 8 bits allows.

The oracle has the numbers that are stored, times their scales. Scales of blocks without rows are wild.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import cute_flash
from cute_flash.arch.problem import KvCache
from tests import harness
from tests.cases import SIZED, Case, pairwise
from tests.harness import Call, moved, where
from tests.reference import attention
from tests.serving import EVERYTHING, Cached, CachedCall

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
WILD = 1e30  # a scale that no row has
# P is rounded by up to 2**-4 of itself, and so may the sum of what is rounded be; on average by far less.
RELATIVE, ON_AVERAGE, BIAS = 2.0**-3, 0.04, 0.02
LEAST = 2.0**-14  # of a row's largest weight: by how much one is rounded that is too small for 8 bits
LSE = {"sm90": 0.06, "sm100": 1e-3}  # of weights as they are rounded, or before


@dataclass(frozen=True)
class Quantized(Cached):
    """kind: of q, k and v. block: rows that share a scale. dtype: of the result. cache: may be None."""

    cache: KvCache | None = None
    used: str = ""
    kind: str = E4M3
    block: int | None = None


@dataclass(frozen=True)
class Scaled(Case):
    """Factors that tensor cores apply. forms: of q and k, and of v."""

    forms: tuple[str, str] = ("mxfp8", "e4m3")


class QuantizedCall(CachedCall):
    """A case as tensors, `tensors` being the oracle's. stored: q, k and v of 8 bits; scales: of each."""

    stored: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]

    @classmethod
    def make(cls, case: Quantized, seed: int = 0) -> QuantizedCall:
        """Fresh normal inputs and scales; NaN beyond the rows in use."""
        if case.cache:
            call = super().make(case, seed)
        else:
            of_16 = Call.make(case, seed)
            call = cls(case, of_16.tensors, of_16.arguments)
        generator = torch.Generator().manual_seed(seed + 7)
        call.stored = {name: x.to(getattr(torch, case.kind)) for name, x in call.tensors.items()}
        call.tensors = {name: x.double() for name, x in call.stored.items()}
        call.scales = {name: call._scaled(name, generator) for name in "qkv"}
        return call

    def _scaled(self, name: str, generator: torch.Generator) -> torch.Tensor:
        """Of all sequences, float32 as users give them; the oracle's numbers are multiplied by them."""
        case, side = self.case, int(name != "q")
        lengths = [pair[side] for pair in case.seqlens]
        sequences, scales = harness._sequences(case, self.tensors[name], lengths), []
        for rows, length in zip(sequences, lengths, strict=True):
            scale = self._scale(name, length, generator)
            scales.append(scale)
            of_head = scale.repeat_interleave(case.heads[side] // len(scale), 0).double()
            if case.block:
                of_head = of_head.repeat_interleave(case.block, 1)[:, : len(rows)].mT
            rows *= of_head[..., None]
        return torch.stack(scales)

    def _scale(self, name: str, length: int, generator: torch.Generator) -> torch.Tensor:
        """Of one sequence: (KV heads,), or (heads, blocks), as many as the call tells of."""
        case, side = self.case, int(name != "q")
        shape = (case.heads[1],)
        if case.block:
            longest = max(pair[side] for pair in case.seqlens)
            if case.cache and side:
                page = case.cache.page_size or 1
                longest = -(-(longest + case.room) // page) * page
            shape = (case.heads[side], -(-longest // case.block))
        scale = torch.rand(shape, generator=generator) + 0.5
        if name == "v":
            scale *= 2.0 ** torch.randint(-3, 4, shape, generator=generator)
        if case.block:
            scale[:, -(-length // case.block) :] = WILD
        return scale

    def run(self, device: str, **emulator_options: Any):
        """(out, lse) of cute_flash on `device`, from and into poisoned surroundings, on the CPU."""
        case, tensors = self.case, dict(self.stored)
        if case.cache:
            function, told = cute_flash.flash_attn_with_kvcache, {"return_softmax_lse": True}
            tensors |= self._cache(told)
        else:
            function, told = self._function(device)
            for name in ("dropout_p", "deterministic"):
                del told[name]
        told |= {f"{name}_descale": scale for name, scale in self.scales.items()}
        told |= {"quantization_block": case.block, "num_splits": case.splits}
        told = {name: moved(value, device) for name, value in told.items()}
        blank = (*tensors["q"].shape[:-1], case.dims[1])
        tensors["out"] = torch.full(blank, math.nan, dtype=getattr(torch, case.dtype))
        placed = self._placed(tensors, device)
        with harness.unchanged({name: placed[name] for name in "qkv"}), where(device, **emulator_options):
            views = (placed[name].view for name in "qkv")
            out, lse = function(*views, out=placed["out"].view, **told)
        placed["out"].assert_surroundings_untouched()
        return out.cpu(), lse.cpu()

    def _cache(self, told: dict[str, Any]) -> dict[str, torch.Tensor]:
        """k and v as a cache; what finds keys there joins what a call is told."""
        stored = CachedCall(self.case, self.stored, self.arguments)
        k, v, packing = stored.cache()
        if not (self.case.cache.batch_idx or self.case.cache.page_size):
            k, v = k[: len(self.case.seqlens)], v[: len(self.case.seqlens)]
        lengths = ("cu_seqlens", "seqused")
        told |= {name: x for name, x in self.arguments.items() if not name.startswith(lengths)}
        told |= {name: getattr(packing, name) for name in PLACES}
        told["cache_seqlens"] = packing.seqused_k
        if self.case.varlen:
            told["max_seqlen_q"] = packing.max_seqlen_q
        return {"k": k, "v": v}

    def check(self, device: str, **emulator_options: Any) -> None:
        """Run, and hold the result to what 8 bits allow."""
        hold(self, *self.run(device, **emulator_options), LSE.get(device, LSE["sm90"]))


class ScaledCall(Call):
    """A case as tensors, `tensors` being the oracle's. quantized: q, k and v."""

    quantized: tuple[cute_flash.Quantized, ...]

    @classmethod
    def make(cls, case: Scaled, seed: int = 0) -> ScaledCall:
        """Fresh normal inputs, q and k rotated alike."""
        call, (form, v_form) = super().make(case, seed), case.forms
        told = {"q": (form, {"seed": seed}), "k": (form, {"seed": seed}), "v": (v_form, {"hadamard": False})}
        if v_form == "mxfp8":
            told["v"][1]["axis"] = "seqlen"
        for name, (kind, options) in told.items():
            if kind != "mxfp8":
                options["heads_kv"] = case.heads[1]
            told[name] = cute_flash.quantize(call.tensors[name], kind, **options)
        call.quantized = tuple(told.values())
        call.tensors = {name: x.dequantize(torch.float64, rotated=True) for name, x in told.items()}
        return call

    def run(self, device: str, **emulator_options: Any):
        """(out, lse) of cute_flash on `device`, on the CPU."""
        told = {name: moved(value, device) for name, value in self.arguments.items()}
        told |= {"num_splits": self.case.splits, "out_dtype": getattr(torch, self.case.dtype)}
        with where(device, **emulator_options):
            given = (placed(x, device) for x in self.quantized)
            out, lse = cute_flash.flash_attn_quantized_func(*given, return_lse=True, **told)
        assert out.dtype is told["out_dtype"]
        return out.cpu(), lse.cpu()

    def check(self, device: str, **emulator_options: Any) -> None:
        """As of FP8."""
        hold(self, *self.run(device, **emulator_options), LSE["sm100"])


def placed(x: cute_flash.Quantized, device: str) -> cute_flash.Quantized:
    """A quantized tensor where calls of a test run; numbers of 8 bits between NaNs, which 4 bits have not."""
    found = {name: moved(getattr(x, name), device) for name in ("data", "scale", "tensor_scale")}
    if x.data.dtype is torch.float8_e4m3fn:
        found["data"] = harness.Poisoned.holding(x.data, "packed", device).view
    return replace(x, **found)


def hold(call: Call, out: torch.Tensor, lse: torch.Tensor, lse_atol: float) -> None:
    """Assert that results are what 8 bits of P allow: every number, on average, and as a whole."""
    (q, k, v), told = call.tensors.values(), call.arguments
    exact, top = attention(q, k, v, **told)
    spread, _ = attention(q, k, v.abs(), **told)  # what weights multiply, whatever its sign
    error, keys = (out.double() - exact).abs(), max(pair[1] for pair in call.case.seqlens)
    least = LEAST * keys * v.nan_to_num(0.0).abs().max()
    assert (error <= RELATIVE * spread + least).all(), f"out: off by up to {error.max():.3e}"
    rms, allowed = error.square().mean().sqrt(), ON_AVERAGE * spread.square().mean().sqrt()
    assert rms <= allowed, f"out: on average off by {rms:.3e}; allowed: {allowed:.3e}"
    gain = (out * exact).sum() / exact.square().sum()
    assert (gain - 1).abs() <= BIAS, f"out: as a whole {gain:.3f} times what is exact"
    assert torch.equal(lse.isneginf(), top.isneginf())
    off = (lse.double() - top).masked_fill(top.isneginf(), 0.0).abs()
    assert (off <= lse_atol).all(), f"lse: off by up to {off.max():.3e}"


PLACES = ("cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q")
harness.MAKERS |= {Quantized: QuantizedCall, Scaled: ScaledCall}

# Where rows lie -> fields of a case.
ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "blocks": {},  # of a mask
    "varlen": {"varlen": True},
    "used": {"varlen": True, "used": "qk"},
    "cache": {"cache": EVERYTHING, "used": "k"},
    "pages": {"cache": KvCache(16), "used": "k"},
    "packed_pages": {"cache": KvCache(24), "used": "k", "varlen": True},
}
# Mask -> the block mask that takes its place.
BLOCKS = {
    "full": "random", "causal": "causal", "window": "large", "document_causal": "document", "own": "function",
}  # fmt: skip
RULES: dict[str, tuple[Any, ...]] = {
    "mask": tuple(BLOCKS),
    "score": ("plain", "softcap", "alibi", "own_softcap"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "size": ("wide", "tall", "ragged", "few"),
    "splits": (None, 3),
    "sink": (False, True),
    "dtype": ("bfloat16", "float16"),
}
PAIRED: dict[str, tuple[Any, ...]] = {
    "rows": tuple(ROWS),
    "dims": ((64, 64), (128, 128), (192, 128), (48, 80), (256, 256)),
    "block": (None, 64, 128),
    "kind": (E4M3, E5M2),
    **RULES,
}
PAIRED_SCALED: dict[str, tuple[Any, ...]] = {
    "rows": ("dense", "blocks"),
    "dims": ((64, 64), (128, 128), (192, 128), (32, 96), (256, 256)),
    "forms": (("mxfp8", "e4m3"), ("mxfp8", "mxfp8"), ("nvfp4", "e4m3"), ("nvfp4", "mxfp8")),
    **RULES,
}


def pairs(kind: type[Case], paired: dict[str, tuple[Any, ...]]) -> Iterator[Case]:
    """Cases in which every two values of `paired` meet."""
    for i, chosen in enumerate(pairwise(paired)):
        words = (str(value).translate(str.maketrans(" ", " ", "()',")) for value in chosen.values())
        name = "_".join((str(i), *words)).replace(" ", "_")
        rows, size = chosen.pop("rows"), chosen.pop("size")
        if rows == "blocks":
            chosen |= {"blocks": BLOCKS[chosen["mask"]], "mask": "full"}
        lengths = SIZED[size][ROWS[rows].get("varlen", False)]
        case = kind(name, lengths, **ROWS[rows], **chosen)
        if case.cache and case.cache.page_size:  # whole pages, for which tables of rules have room
            page = case.cache.page_size
            case = replace(case, room=2 * page - max(keys for _, keys in lengths) % page)
        yield case


PAIRS = {case.name: case for case in pairs(Quantized, PAIRED)}
SCALED_PAIRS = {case.name: case for case in pairs(Scaled, PAIRED_SCALED)}

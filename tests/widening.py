"""Cases whose keys lie in a cache of 8 bits beside q of 16: as those of tests/serving.py, through the
function that users call. The oracle has the numbers of the cache times their scales, powers of two, so that
they are exact in q's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import cute_flash
from cute_flash.arch.widened import WidenedProblem
from tests import harness
from tests.harness import answer_for, moved, where
from tests.serving import CASES as OF_16_BITS
from tests.serving import DECODE, EVERYTHING, RAGGED, Cached, CachedCall, cached, paged

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
POWERS = (-2, 3)  # of two, of scales: the first, and the first that is none


@dataclass(frozen=True)
class Widened(Cached):
    """kv: of the cache."""

    kv: str = E4M3


class WidenedCall(CachedCall):
    """A case as tensors. stored: k and v as they lie in the cache; scales: (batch, heads_kv) of each."""

    stored: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]

    @classmethod
    def make(cls, case: Widened, seed: int = 0) -> WidenedCall:
        """Fresh normal inputs, of a mean beyond 0, and scales; NaN beyond the keys in use."""
        call = super().make(case, seed)
        generator, of = torch.Generator().manual_seed(seed + 7), (len(case.seqlens), case.heads[1])
        call.stored, call.scales = {}, {}
        for name in "kv":
            call.scales[name] = 2.0 ** torch.randint(*POWERS, of, generator=generator)
            x = call.tensors[name]
            call.stored[name] = stored = (x + 0.5).to(getattr(torch, case.kv)).to(x.dtype)
            call.tensors[name] = stored.clone()
            for keys, scale in zip(call.sequences(name), call.scales[name], strict=True):
                keys *= scale[:, None].to(x.dtype)
        return call

    def run(self, device: str, **emulator_options: Any):
        """(out, lse) of cute_flash on `device`, from and into poisoned surroundings, on the CPU."""
        case, q = self.case, self.tensors["q"]
        blank = torch.full((*q.shape[:-1], case.dims[1]), math.nan, dtype=q.dtype)
        k, v, packing = CachedCall.cache(replace_tensors(self, self.tensors | self.stored))
        if not (case.cache.batch_idx or case.cache.page_size):
            k, v = k[: len(case.seqlens)], v[: len(case.seqlens)]
        k, v = (x.to(getattr(torch, case.kv)) for x in (k, v))
        placed = self._placed({"q": q, "k": k, "v": v, "out": blank}, device)
        told = {name: moved(value, device) for name, value in self.arguments.items()}
        told = {name: x for name, x in told.items() if not name.startswith(("cu_seqlens", "seqused"))}
        told |= {name: moved(getattr(packing, name), device) for name in PLACES}
        told |= {f"{name}_descale": moved(scale, device) for name, scale in self.scales.items()}
        told["cache_seqlens"] = moved(packing.seqused_k, device)
        if case.varlen:
            told["max_seqlen_q"] = packing.max_seqlen_q
        views = {"q": placed["q"].view, "k_cache": placed["k"].view, "v_cache": placed["v"].view}
        with harness.unchanged({name: placed[name] for name in "qkv"}), where(device, **emulator_options):
            out, lse = cute_flash.flash_attn_with_kvcache(
                **views, **told, num_splits=case.splits, out=placed["out"].view, return_softmax_lse=True
            )
        placed["out"].assert_surroundings_untouched()
        return out.cpu(), lse.cpu()


PLACES = ("cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q")


def replace_tensors(call: WidenedCall, tensors: dict[str, torch.Tensor]) -> CachedCall:
    """The same call on others."""
    return CachedCall(call.case, tensors, call.arguments)


def widened(case: Cached, **changes: Any) -> Widened:
    """A case of 16 bits with a cache of 8, and changes."""
    return Widened(**vars(case) | changes)


def problem_of(case: Widened, device: str) -> WidenedProblem:
    """What a case asks."""
    asked = answer_for(case, device).problem
    return WidenedProblem(**vars(asked), kv_dtype=case.kv)


harness.MAKERS[Widened] = WidenedCall
CASES = {
    case.name: case
    for case in (
        *(widened(case) for case in OF_16_BITS.values() if case.dims[0] % 16 == 0 == case.dims[1] % 16),
        widened(paged("pages_40_dims", 40, mask="own", score="alibi_per_batch"), dims=(48, 112)),
        widened(cached("e5m2", mask="causal", heads=(4, 2), cache=EVERYTHING), kv=E5M2),
        widened(paged("e5m2_half", 16, seqlens=DECODE, heads=(8, 2), splits=3), kv=E5M2, dtype="float16"),
        widened(cached("half", dims=(256, 256), heads=(4, 2), seqlens=((8, 300), (8, 65))), dtype="float16"),
        widened(
            paged("half_varlen", 24, seqlens=RAGGED, varlen=True, mask="causal", heads=(4, 2), sink=True),
            dtype="float16", dims=(128, 64),
        ),
    )
}  # fmt: skip
# Several blocks of keys, that several rows of a tile's heads see whole or in part, or none.
ORDERED = {
    "rows": widened(cached("", seqlens=((20, 300),), heads=(2, 1), mask="causal", splits=1)),
    "pages": widened(
        paged("", 24, seqlens=((3, 150), (3, 77)), heads=(4, 2), splits=2, mask="causal"), kv=E5M2
    ),
}

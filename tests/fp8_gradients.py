"""Cases of gradients in FP8: as those of tests/cases.py, with numbers that rounding to e4m3 leaves as they
are, and the accuracy that rounding P to e4m3 and dS to e5m2 allows.

    P    off by 2**-4 of itself at most                      dV by that of P^T |dO|
    dS   by 2**-3 of itself, and by P times what D is off    dQ, dK by that of |dS| |K|, |dS|^T |Q|
    D    by what O is: 2**-4 of P |V| (P rounded, sums of unrounded ones), and its own 16 bits
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import cute_flash
from cute_flash import dispatch
from cute_flash.arch.kernel import Step
from cute_flash.arch.quantized_backward import QuantizedBackwardProblem
from cute_flash.dispatch import EMULATED
from tests import harness, reference
from tests.accuracy import GRADIENTS
from tests.cases import Case, pairwise
from tests.harness import Call, moved, where
from tests.quantizing import BLOCKS
from tests.test_resources import EXTREMES

UNIT, LARGEST = 2.0**-7, 3.5  # numbers are multiples of e4m3's by UNIT, up to 448 of them
OF_P, OF_DS, OF_OUT = 2.0**-4, 2.0**-3, 2.0**-8  # what rounding takes at most: e4m3, e5m2, bfloat16
# On average it takes 0.42 of that, from numbers that are as likely anywhere between two powers of two.
ON_AVERAGE, BIAS = 0.6, 0.03
LEAST = 2.0**-14  # numbers too small for 8 bits, and float32's own
MORE = 1.125  # what roundings multiply each other by
FEW = 1000  # numbers that no average is asked of


@dataclass(frozen=True)
class Fp8(Case):
    """grad_lse: a gradient comes through the log-sum-exp."""

    grad_lse: bool = True


class Fp8Call(Call):
    """A case as tensors of 16 bits that e4m3 holds, with the scale UNIT, as they are."""

    @classmethod
    def make(cls, case: Fp8, seed: int = 0) -> Fp8Call:
        """Fresh normal inputs; NaN beyond used lengths."""
        call = super().make(case, seed)
        call.tensors = {name: in_units(x) for name, x in call.tensors.items()}
        return call

    def cotangents(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        dout, dlse = super().cotangents(seed)
        return in_units(dout), dlse if self.case.grad_lse else torch.zeros_like(dlse)

    def _function(self, device: str):
        arguments = {name: moved(value, device) for name, value in self.arguments.items()}
        arguments |= {"return_lse": True, "deterministic": self.case.deterministic, "hadamard": False}
        if not self.case.varlen:
            return cute_flash.flash_attn_fp8_func, arguments
        longest = [max(lengths) for lengths in zip(*self.case.seqlens, strict=True)]
        arguments |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        return cute_flash.flash_attn_varlen_fp8_func, arguments

    def run_backward(self, dout, dlse, device: str, **emulator_options: Any) -> tuple[torch.Tensor, ...]:
        """As of 16 bits; nothing comes through the log-sum-exp where the case has it so."""
        if self.case.grad_lse:
            return super().run_backward(dout, dlse, device, **emulator_options)
        placed = self._placed(self.tensors | {"dout": dout}, device)
        function, arguments = self._function(device)
        leaves = [placed[name].view.requires_grad_() for name in "qkv"]
        if self.case.sink:
            leaves.append(arguments["learnable_sink"].detach().requires_grad_())
            arguments["learnable_sink"] = leaves[3]
        with where(device):
            out, _ = function(*leaves[:3], **arguments)
        with where(device, **emulator_options):
            found = torch.autograd.grad(out, leaves, placed["dout"].view)
        return tuple(gradient.cpu() for gradient in found)

    def check_gradients(self, device: str, **emulator_options: Any) -> None:
        """Run forward and backward, and hold the gradients to what few bits allow."""
        dout, dlse = self.cotangents()
        found = self.run_backward(dout, dlse, device, **emulator_options)
        tensors = tuple(self.tensors.values())
        exact = reference.gradients(tensors, dout, dlse, **self.arguments)
        allowed = bounds(tensors, dout, dlse, **self.arguments)
        for name, ours, right, off in zip(GRADIENTS, found, exact, allowed, strict=False):
            hold(name, ours.double(), right, off, more(device))


def in_units(x: torch.Tensor) -> torch.Tensor:
    """Numbers of e4m3 times UNIT, the first of a sequence's heads being the largest that there is."""
    found = (x.float().clamp(-LARGEST, LARGEST) / UNIT).to(torch.float8_e4m3fn).float() * UNIT
    first = found[:, 0] if found.ndim == 4 else found[0]
    first[..., 0] = first[..., 0].where(first[..., 0].isnan(), LARGEST)
    return found.to(x.dtype)


class Bounds(NamedTuple):
    """What gradients may be off by, shaped as they are: each number, and squares of it on average."""

    q: tuple[torch.Tensor, torch.Tensor]
    k: tuple[torch.Tensor, torch.Tensor]
    v: tuple[torch.Tensor, torch.Tensor]
    sink: tuple[torch.Tensor, torch.Tensor]


def bounds(
    tensors, dout, dlse, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, **told
) -> Bounds:
    """Of a call of the oracle, dense or packed, whose arguments these are."""
    q, k, v = (x.double() for x in tensors)
    dout, dlse, dense = dout.double(), dlse.double(), cu_seqlens_q is None
    if dense:
        cu_seqlens_q, cu_seqlens_k = (torch.arange(len(x) + 1) * x.shape[1] for x in (q, k))
        q, k, v, dout = (x.flatten(0, 1) for x in (q, k, v, dout))
        dlse = dlse.transpose(0, 1).flatten(1)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    found = Bounds(*((torch.zeros_like(x), torch.zeros_like(x)) for x in (q, k, v, q[0, :, 0])))
    for b in range(len(cu_seqlens_q) - 1):
        used = (seqused_q, cu_seqlens_q), (seqused_k, cu_seqlens_k)
        rows, keys = (slice(x[b], x[b + 1] if n is None else x[b] + n[b]) for n, x in used)
        for h in range(heads):
            kv = h // group
            given = q[rows, h], k[keys, kv], v[keys, kv], dout[rows, h], dlse[h, rows]
            one = of_head(*given, (b, h, heads), reference.Call(**told))
            for i in range(2):
                found.q[i][rows, h] += one.q[i]
                found.k[i][keys, kv] += one.k[i]
                found.v[i][keys, kv] += one.v[i]
                found.sink[i][h] += one.sink[i]
    if not dense:
        return found
    pairs = zip(found[:3], tensors, strict=True)
    return Bounds(*(tuple(x.view_as(y) for x in two) for two, y in pairs), found.sink)


def of_head(q, k, v, dout, dlse, at: tuple[int, int, int], call: reference.Call) -> Bounds:
    """Of one sequence and head."""
    scale = q.shape[1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    raw = (q @ k.T * scale).requires_grad_()
    s = reference.scores(raw, *at[:2], call)
    slopes = torch.autograd.grad(s.where(s.isfinite(), 0.0).sum(), raw)[0].nan_to_num(0.0)
    s, sink = s.detach(), -math.inf if call.learnable_sink is None else call.learnable_sink[at[1]].item()
    top = torch.cat([s, torch.full((len(s), 1), sink, dtype=s.dtype)], 1).logsumexp(1, keepdim=True)
    p, of_sink = ((x - top).exp().nan_to_num(0.0) for x in (s, sink))
    out, off = p @ v, OF_P * (p @ v.abs()) + OF_OUT * (p @ v).abs()
    delta = (dout * out).sum(1, keepdim=True) - dlse.where(top[:, 0].isfinite(), 0.0)[:, None]
    delta_off = (dout.abs() * off).sum(1, keepdim=True)
    ds, from_delta = OF_DS * (p * (dout @ v.T - delta) * slopes).abs(), p * slopes.abs() * delta_off
    # What D is off by is off in all of a row; what is rounded, by itself.
    out_off2 = OF_P**2 * p.square() @ v.square() + (OF_OUT * out).square()
    delta_off2 = (dout.square() * out_off2).sum(1, keepdim=True)
    from_delta2 = p * slopes.abs() * delta_off2.sqrt()
    return Bounds(
        (
            (ds + from_delta) @ k.abs() * scale,
            of_squares(ds, k, scale) + (from_delta2 @ k.abs() * scale) ** 2,
        ),
        (
            (ds + from_delta).T @ q.abs() * scale,
            of_squares(ds.T, q, scale) + of_squares(from_delta2.T, q, scale),
        ),
        (OF_P * (p.T @ dout.abs()), of_squares(OF_P * p.T, dout, 1.0)),
        ((delta_off * of_sink).sum(), (delta_off2 * of_sink.square()).sum()),
    )


def of_squares(off: torch.Tensor, by: torch.Tensor, scale: float) -> torch.Tensor:
    """What sums of numbers that are off independently of each other are off by, squared."""
    return off.square() @ by.square() * scale**2


def more(device: str) -> float:
    """Hopper's log-sum-exp is that of rounded weights: P, in units of it, may be off by as much again."""
    is_hopper = device == "sm90" or (device == "cuda" and torch.cuda.get_device_capability()[0] == 9)
    return 2 * MORE if is_hopper else MORE


def hold(
    name: str, ours: torch.Tensor, exact: torch.Tensor, off: tuple[torch.Tensor, torch.Tensor], more: float
) -> None:
    """Assert that a gradient is what few bits allow: every number, on average, and as a whole.

    more: of every number's.
    """
    error, rounding = (ours - exact).abs(), OF_OUT * exact.abs()
    allowed = off[0] * more + rounding + LEAST
    assert (error <= allowed).all(), f"{name}: off by up to {(error / allowed).max():.2f} of what is allowed"
    if error.numel() > FEW:
        rms, usual = error.square().mean(), (off[1] + rounding.square() + LEAST**2).mean()
        part = (rms / usual).sqrt()
        assert part <= ON_AVERAGE, f"{name}: on average off by {part:.2f} of what is allowed"
        gain = (ours * exact).sum() / exact.square().sum()
        assert (gain - 1).abs() <= BIAS, f"{name}: as a whole {gain:.3f} times what is exact"


harness.MAKERS |= {Fp8: Fp8Call}
RULES: dict[str, tuple[Any, ...]] = {
    "rows": ("dense", "blocks", "varlen", "used"),
    "dims": ((64, 64), (128, 128), (192, 128), (48, 80), (256, 256), (144, 176)),
    "mask": ("full", "causal", "window", "document_causal", "own"),
    "score": ("plain", "softcap", "alibi", "own_softcap"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "size": ("wide", "tall", "ragged"),
    "sink": (False, True),
    "grad_lse": (False, True),
    "deterministic": (False, True),
    "dtype": ("bfloat16", "float16"),
}
SIZES = {"wide": ((70, 150),), "tall": ((140, 70),), "ragged": ((131, 143),)}
PACKED = {
    "wide": ((70, 150), (1, 77)),
    "tall": ((140, 70), (0, 30), (33, 33)),
    "ragged": ((131, 143), (7, 0)),
}
RULES: dict[str, tuple[Any, ...]] = {
    "rows": ("dense", "blocks", "varlen", "used"),
    "dims": ((64, 64), (128, 128), (192, 128), (48, 80), (256, 256), (144, 176)),
    "mask": tuple(BLOCKS),
    "score": ("plain", "softcap", "alibi", "own_softcap"),
    "heads": ((2, 2), (2, 1), (3, 1)),
    "size": tuple(SIZES),
    "sink": (False, True),
    "grad_lse": (False, True),
    "deterministic": (False, True),
    "dtype": ("bfloat16", "float16"),
}


def pairs() -> Iterator[Fp8]:
    """Cases in which every two values of RULES meet."""
    for i, chosen in enumerate(pairwise(RULES)):
        words = (str(value).translate(str.maketrans(" ", "_", "()',")) for value in chosen.values())
        name = "_".join((str(i), *words))
        rows, size = chosen.pop("rows"), chosen.pop("size")
        if rows == "blocks":
            chosen |= {"blocks": BLOCKS[chosen["mask"]], "mask": "full"}
        packed = rows in ("varlen", "used")
        lengths = (PACKED if packed else SIZES)[size]
        yield Fp8(name, lengths, varlen=packed, used="qk" if rows == "used" else "", **chosen)


PAIRS = {case.name: case for case in pairs()}


def main_step(case: Case, device: str) -> Step:
    """The launch of the main kernel of a case's gradients."""
    forward = harness.answer_for(replace(case, dtype="float8_e4m3fn"), device).problem
    asked = QuantizedBackwardProblem(forward, deterministic=case.deterministic)
    kernel, config = dispatch.dispatch(asked, EMULATED[device])
    steps = kernel.steps(asked, EMULATED[device], config).steps
    return next(step for step in steps if step.kernel is kernel)


def fullest(rules: str, dims: tuple[int, int], **others: Any) -> Case:
    """The most that a call of these head dims may ask for, which is without dropout."""
    return replace(EXTREMES[rules], dims=dims, dropout=0.0, **others)

"""From a Case to tensors and a checked call.

Every tensor is a view into a larger storage that is otherwise NaN: whoever reads beyond it computes NaN, and
whoever writes beyond it is caught by comparing the storage afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import cute_flash
from cute_flash import BlockMask, dispatch, rules
from cute_flash.arch import problem
from cute_flash.arch.kernel import Step
from cute_flash.arch.rule import Rule, describe
from tests.accuracy import assert_accurate, assert_gradients_accurate
from tests.cases import BLOCKS, MASKS, SCORES, Case, Sizes
from tests.reference import Dropout

MARGIN = 64

# Layout -> a view of the wanted shape (*rows, heads, dim) of a storage, and the storage's own shape.
LAYOUTS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], Callable]]] = {
    "packed": lambda s: (s, lambda x: x),
    "heads_first": lambda s: ((*s[:-3], s[-2], s[-3], s[-1]), lambda x: x.transpose(-3, -2)),
    "sliced": lambda s: ((*s[:-2], s[-2] + 2, s[-1] + 8), lambda x: x[..., 1:-1, :-8]),
    "interleaved": lambda s: ((*s[:-2], s[-2], 3, s[-1]), lambda x: x[..., 1, :]),
}


@dataclass
class Poisoned:
    """`view` lies in `storage`; everything else there is NaN."""

    storage: torch.Tensor
    view: torch.Tensor
    inside: torch.Tensor

    @classmethod
    def holding(cls, tensor: torch.Tensor, layout: str, device: str) -> Poisoned:
        """A copy of `tensor`, 16-byte aligned, on the torch device that serves `device`."""
        whole, cut = LAYOUTS[layout](tuple(tensor.shape))
        middle = slice(MARGIN, MARGIN + math.prod(whole))
        storage = moved(torch.full((middle.stop + MARGIN,), math.nan, dtype=tensor.dtype), device)
        inside = torch.zeros_like(storage, dtype=torch.bool)
        cut(inside[middle].view(whole)).fill_(True)
        view = cut(storage[middle].view(whole))
        view.copy_(tensor)
        return cls(storage, view, inside)

    def view_of(self, storage: torch.Tensor) -> torch.Tensor:
        """`view` in a copy of the storage."""
        return storage.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())

    def assert_surroundings_untouched(self) -> None:
        """Raises where anything outside `view` was written."""
        written = (~self.storage.isnan() & ~self.inside).nonzero().flatten().tolist()
        assert not written, f"wrote outside the tensor, at elements {written[:8]} of its storage"


@dataclass
class Call:
    """A case as tensors on the CPU: `arguments` are keyword arguments of cute_flash, and of the oracle."""

    case: Case
    tensors: dict[str, torch.Tensor]
    arguments: dict[str, Any]

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> Call:
        """Fresh normal inputs; rows beyond a used length are NaN."""
        generator = torch.Generator().manual_seed(seed)
        batch, heads = len(case.seqlens), case.heads[0]
        lengths = {"q": [q for q, _ in case.seqlens], "k": [k for _, k in case.seqlens]}
        used = {name: _used_lengths(lengths[name], name in case.used, generator) for name in lengths}
        longest = (max(lengths[name], default=0) for name in lengths)
        sizes = Sizes(batch, heads, *longest, generator)
        arguments = MASKS[case.mask](sizes) | SCORES[case.score](sizes) | BLOCKS[case.blocks](sizes)
        if case.varlen:
            starts = {name: torch.tensor([0, *lengths[name]]).cumsum(0).int() for name in lengths}
            arguments |= {f"cu_seqlens_{name}": starts[name] for name in lengths}
        arguments |= {f"seqused_{name}": torch.tensor(used[name]).int() for name in case.used}
        if case.sink:
            arguments["learnable_sink"] = torch.randn(heads, generator=generator)
        if case.softmax_scale is not None:
            arguments["softmax_scale"] = case.softmax_scale
        tensors = {}
        for name, side, head, dim in (("q", "q", 0, 0), ("k", "k", 1, 0), ("v", "k", 1, 1)):
            shape = (*_rows(case, lengths[side]), case.heads[head], case.dims[dim])
            tensors[name] = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
            for rows, length in zip(_sequences(case, tensors[name], lengths[side]), used[side], strict=True):
                rows[length:] = math.nan
        return cls(case, tensors, arguments)

    def run(self, device: str, **emulator_options: Any):
        """(out, lse) of cute_flash on `device`, from and into poisoned surroundings, on the CPU."""
        out_shape = (*self.tensors["q"].shape[:-1], self.case.dims[1])
        blank = torch.full(out_shape, math.nan, dtype=self.tensors["q"].dtype)
        placed = self._placed(self.tensors | {"out": blank}, device)
        function, arguments = self._function(device)
        with unchanged({name: placed[name] for name in "qkv"}), where(device, **emulator_options):
            tensors = (placed[name].view for name in "qkv")
            out, lse = function(*tensors, out=placed["out"].view, **arguments)[:2]
        assert out.data_ptr() == placed["out"].view.data_ptr(), "out is not the tensor that was given"
        placed["out"].assert_surroundings_untouched()
        return out.cpu(), lse.cpu()

    def run_backward(self, dout, dlse, device: str, **emulator_options: Any) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv and, with a sink, dsink, as `run`; dout, too, lies in poisoned surroundings.

        The options are for the gradients' kernels: the forward pass is run as users emulate it.
        """
        placed = self._placed(self.tensors | {"dout": dout}, device)
        function, arguments = self._function(device)
        leaves = [placed[name].view.requires_grad_() for name in "qkv"]
        if self.case.sink:
            leaves.append(arguments["learnable_sink"].detach().requires_grad_())
            arguments["learnable_sink"] = leaves[3]
        with unchanged(placed):
            with where(device):
                results = function(*leaves[:3], **arguments)[:2]
            with where(device, **emulator_options):
                found = torch.autograd.grad(results, leaves, (placed["dout"].view, moved(dlse, device)))
        for gradient, leaf in zip(found, leaves, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        return tuple(gradient.cpu() for gradient in found)

    def check(self, device: str, **emulator_options: Any) -> None:
        """Run, and hold the result to the accuracy rule."""
        told = self.told(device)
        out, lse = self.run(device, **emulator_options)
        assert_accurate(out, lse, tuple(self.tensors.values()), **told)

    def check_gradients(self, device: str, **emulator_options: Any) -> None:
        """Run forward and backward, and hold the gradients to the accuracy rule."""
        told, (dout, dlse) = self.told(device), self.cotangents()
        found = self.run_backward(dout, dlse, device, **emulator_options)
        assert_gradients_accurate(found, tuple(self.tensors.values()), dout, dlse, **told)

    def cotangents(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh normal gradients of out, in its dtype, and of lse, float32; NaN beyond a used length."""
        generator, q = torch.Generator().manual_seed(seed), self.tensors["q"]
        dout = torch.randn(*q.shape[:-1], self.case.dims[1], generator=generator).to(q.dtype)
        dlse = torch.randn(q.shape[:-1], generator=generator).transpose(-1, -2).contiguous()
        unused = q.isnan().any(-1)
        return dout.masked_fill(unused[..., None], math.nan), dlse.masked_fill(unused.mT, math.nan)

    def told(self, device: str) -> dict[str, Any]:
        """What the oracle is told besides the tensors of this call, which is the next one on `device`."""
        if not self.case.dropout:
            return dict(self.arguments)
        return self.arguments | {"dropout": Dropout(self.case.dropout, *next_rng_state(device))}

    def _function(self, device: str) -> tuple[Callable, dict[str, Any]]:
        """The function of cute_flash that serves the case, and what it is given besides q, k, v and out."""
        arguments = {name: moved(value, device) for name, value in self.arguments.items()}
        arguments |= {"dropout_p": self.case.dropout, "return_lse": True, "num_splits": self.case.splits}
        arguments["deterministic"] = self.case.deterministic
        if not self.case.varlen:
            return cute_flash.flash_attn_func, arguments
        longest = [max(lengths) for lengths in zip(*self.case.seqlens, strict=True)]
        arguments |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        return cute_flash.flash_attn_varlen_func, arguments

    def _placed(self, tensors: dict[str, torch.Tensor], device: str) -> dict[str, Poisoned]:
        return {name: Poisoned.holding(x, self.case.layout, device) for name, x in tensors.items()}


MAKERS: dict[type[Case], type[Call]] = {}  # who makes calls of a kind of case, where another than `Call` does


def call_of(case: Case, seed: int = 0) -> Call:
    """A case as tensors."""
    return MAKERS.get(type(case), Call).make(case, seed)


@contextlib.contextmanager
def unchanged(placed: dict[str, Poisoned]):
    """Raises where a storage has changed at the end."""
    before = {name: tensor.storage.clone() for name, tensor in placed.items()}
    yield
    for name, storage in before.items():
        assert torch.equal(storage.view(torch.int16), placed[name].storage.view(torch.int16)), name


def next_rng_state(device: str) -> list[int]:
    """Philox seed and offset of the next call with dropout: two 62-bit numbers from torch's generator."""
    torch.manual_seed(1)
    drawn = moved(torch.empty(2, dtype=torch.int64), device).random_(0, 2**62).tolist()
    torch.manual_seed(1)
    return drawn


def where(device: str, **emulator_options: Any):
    """The context in which tensors of `device` are served: "cuda", or the name of an emulated GPU.

    Emulated, products and sums are fused as the assembler does it, so that what is accurate here is so there.
    """
    if device == "cuda":
        return contextlib.nullcontext()
    return cute_flash.emulated(device, **{"contract": "ptxas"} | emulator_options)


def moved(value: Any, device: str) -> Any:
    """A tensor, or a rule or block mask with its tensors, on the torch device that serves `device`."""
    place = "cuda" if device == "cuda" else "cpu"
    if isinstance(value, BlockMask):
        return value.to(place)
    if isinstance(value, Rule):
        kind, values = describe(value)
        return kind.build(tuple(moved(leaf, device) for leaf in values))
    return value.to(place) if isinstance(value, torch.Tensor) else value


def answer_for(case: Case, device: str):
    """`cute_flash.supports` for a case: the kernel and config that serve it."""
    sizes = Sizes(len(case.seqlens), case.heads[0], 9, 9, torch.Generator())
    told = MASKS[case.mask](sizes) | SCORES[case.score](sizes)
    block_mask = BLOCKS[case.blocks](sizes).get("block_mask")
    left, right = (None if side == -1 else side for side in told.get("window_size", (None, None)))
    mask = block_mask.mask if block_mask else told.get("mask")
    return cute_flash.supports(
        case.dtype,
        *case.dims,
        device=device,
        mask=rules.mask_of(told.get("causal", False), (left, right), mask),
        score=rules.score_of(told.get("softcap", 0.0), told.get("alibi_slopes"), told.get("score")),
        varlen=case.varlen,
        seqused_q="q" in case.used,
        seqused_k="k" in case.used,
        gqa=case.heads[0] != case.heads[1],
        dropout=case.dropout > 0,
        sink=case.sink,
        lse=True,
        block_size=block_mask and block_mask.block_size,
        split_kv=(case.splits or 1) > 1,
        cache=case.cache,
    )


def steps_of(case: Case, device: str) -> tuple[Step, ...]:
    """What a call of the case launches; its sizes choose the config, and the splits where it does not."""
    answer = answer_for(replace(case, splits=None), device)
    longest = (max((pair[side] for pair in case.seqlens), default=9) for side in range(2))
    sizes = problem.Sizes(len(case.seqlens), *case.heads, *longest)
    return dispatch.plan(answer.problem, answer.device, sizes, case.splits or 0).steps


def _used_lengths(lengths: list[int], wanted: bool, generator: torch.Generator) -> list[int]:
    """From none to all of each sequence; of the first, a part."""
    if not wanted:
        return lengths
    shares = [0.6, *torch.rand(len(lengths), generator=generator).tolist()]
    return [round(length * share) for length, share in zip(lengths, shares, strict=False)]


def _rows(case: Case, lengths: list[int]) -> tuple[int, ...]:
    """Leading dimensions of a tensor whose sequences have these lengths; an empty batch gets 9 rows each."""
    return (sum(lengths),) if case.varlen else (len(lengths), max(lengths, default=9))


def _sequences(case: Case, tensor: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """The rows of each sequence."""
    return tensor.split(lengths) if case.varlen else tensor.unbind()

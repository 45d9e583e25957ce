"""The backward pass tile by tile in plain torch, from what kernels are given: visits, rules and their slopes.

A tile of keys visits the blocks of rows that see it, with every tensor filled up by zeros and the log-sum-exp
by +inf, evaluates masks only where it is told to, and comes to the oracle's gradients: so the parts that
kernels share are right and enough. P = exp(S - LSE), D = rowsum(dO O) - dLSE, dS = P (dP - D) dscore/ds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from cute_flash import rules
from cute_flash.arch.common.blocks import visits_from_keys
from cute_flash.arch.expression import Bound
from cute_flash.arch.reverse import differentiated, seen_from_keys
from tests.accuracy import GRADIENTS
from tests.cases import BLOCKS, CASES, MASKS, SCORES
from tests.harness import Call
from tests.reference import Dropout, attention, gradients, keep_mask
from tests.test_block_mask import Lists, with_phases

TILE = 32, 64
NAMES = ["bfloat16", "dims_192_128", "batch_0", "softmax_scale", "dropout_0.5", "dropout_varlen", "heads_6_2"]
NAMES += ["sink", "sink_without_keys", "sink_alone", "keys_unseen", "rows_without_keys"]
NAMES += ["score_hides_whole_blocks", "varlen", "varlen_causal", "used_qk", "used_qk_causal", "used_window"]
NAMES += ["split_used", "blocks_tall"]
NAMES += [name for name in CASES if name.startswith(("lengths_", "blocks_lengths", "blocks_dropout"))]
NAMES += [f"mask_{name}" for name in list(MASKS)[1:]] + [f"score_{name}" for name in list(SCORES)[1:]]
NAMES += [f"blocks_{name}" for name in BLOCKS if name != "none"]


@dataclass
class Head:
    """One query head of one sequence: its rows of all tensors in float64, and what kernels are told."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    scale: float
    keep: torch.Tensor
    problem: Any
    call: Any
    rules: Any

    @property
    def sequence(self) -> Any:
        rows, keys = len(self.q), len(self.k)
        return SimpleNamespace(seqlen_q=rows, seqlen_k=keys, offset=keys - rows)

    def backward(self) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv: a tile of keys after another."""
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for key in range(0, len(self.k), TILE[1]):
            keys = slice(key, key + TILE[1])
            visits = visits_from_keys(self.problem, TILE, self.call, self.rules, self.sequence, key)
            for block, masked in with_phases(visits):
                rows = slice(block * TILE[0], (block + 1) * TILE[0])
                p, ds, q, k, dout = self.tile(rows, keys, masked)
                dq[rows] += (ds @ k)[: len(dq[rows])] * self.scale
                dk[keys] += (ds.T @ q)[: len(dk[keys])] * self.scale
                dv[keys] += (p.T @ dout)[: len(dv[keys])]
        return dq, dk, dv

    def tile(self, rows: slice, keys: slice, masked: bool) -> tuple[torch.Tensor, ...]:
        """P with dropout and dS of a tile, and the tensors of its rows and keys, filled up."""
        q, dout = filled(self.q, rows), filled(self.dout, rows)
        lse, delta = filled(self.lse, rows, math.inf), filled(self.delta, rows)
        k, v = filled(self.k, keys), filled(self.v, keys)
        keep = filled(filled(self.keep, rows).T, keys).T
        row, key = torch.arange(rows.start, rows.stop)[:, None], torch.arange(keys.start, keys.stop)
        where = row + self.sequence.offset, key
        s, slope = q @ k.T * self.scale, 1.0
        if self.rules.score is not None:
            s, slope = self.rules.score.derivative(s, self.rules.batch, self.rules.head, *where)
        if masked:
            s = s.masked_fill(~self.seen(*where), -math.inf)
        p = torch.exp(s - lse[:, None])
        ds = p * (dout @ v.T * keep - delta[:, None])
        return p * keep, torch.where(p > 0, ds * slope, 0.0), q, k, dout

    def seen(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        inside = k < self.rules.seqlen_k
        return inside if self.rules.mask is None else inside & self.rules.mask.visible(q, k)


@dataclass
class OnHost:
    """A mask whose bounds are plain numbers, also where they come from tables."""

    mask: Bound

    def visible(self, q, k):
        return self.mask.visible(q, k)

    def queries(self, *keys: int) -> tuple[int, int]:
        low, high = self.mask.queries(*keys)
        return int(low), int(high)

    def full_queries(self, *keys: int) -> tuple[int, int]:
        low, high = self.mask.full_queries(*keys)
        return int(low), int(high)


def filled(tensor: torch.Tensor, rows: slice, value: float = 0.0) -> torch.Tensor:
    """These rows of a tensor; `value` stands where it has none."""
    found = tensor[rows]
    missing = rows.stop - rows.start - len(found)
    return pad(found, (*[0, 0] * (tensor.ndim - 1), 0, missing), value=value)


def rules_of(call: Call, batch: int, head: int, seqlens: tuple[int, int]) -> tuple:
    """Mask and score as backward kernels have them."""
    told = call.arguments
    left, right = (None if side == -1 else side for side in told.get("window_size", (None, None)))
    block_mask = told.get("block_mask")
    masks = rules.mask_of(told.get("causal", False), (left, right), told.get("mask"))
    if block_mask is not None and block_mask.mask is not None:
        masks += rules.mask_of(False, (None, None), block_mask.mask)
    scores = rules.score_of(told.get("softcap", 0.0), told.get("alibi_slopes"), told.get("score"))
    code, *pools = rules.encode(masks, scores)
    (mask, score), values = rules.decode(code), rules.values(code, *pools)
    return tuple(
        rule and change(rule).at(found or (), batch, head, *seqlens)
        for rule, change, found in ((mask, seen_from_keys, values[0]), (score, differentiated, values[1]))
    )


@pytest.mark.parametrize("name", NAMES)
def test_tiles_come_to_the_oracles_gradients(name):
    case, call = CASES[name], Call.make(CASES[name])
    told, (q, k, v, dout, dlse) = dict(call.arguments), packed_tensors(call)
    if case.dropout:
        told["dropout"] = Dropout(case.dropout, seed=3, offset=4)
    for side, x in (("q", call.tensors["q"]), ("k", call.tensors["k"])):
        told.setdefault(f"cu_seqlens_{side}", torch.arange(len(x) + 1) * x.shape[1])
    expected = gradients((q, k, v), dout, dlse, **told)
    out, lse = attention(q, k, v, **told)
    found = [torch.zeros_like(x) for x in expected]
    for b, (rows, keys) in enumerate(used_rows(told)):
        for h in range(case.heads[0]):
            kv = h * case.heads[1] // case.heads[0]
            delta = (dout[rows, h] * out[rows, h]).sum(-1) - dlse[h, rows]
            if case.sink:
                sink = told["learnable_sink"][h].double()
                found[3][h] -= (torch.exp(sink - lse[h, rows]) * delta).sum()
            tensors = q[rows, h], k[keys, kv], v[keys, kv], dout[rows, h]
            lse_used = lse[h, rows].masked_fill(lse[h, rows].isneginf(), 0.0)  # rows without keys: P = 0
            one = Head(*tensors, lse_used, delta, *told_of(call, told, b, h, (rows, keys)))
            places = (rows, h), (keys, kv), (keys, kv)
            for whole, place, part in zip(found, places, one.backward(), strict=False):
                whole[place] += part
    for name, ours, exact in zip(GRADIENTS, found, expected, strict=False):
        torch.testing.assert_close(ours, exact, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["mask_causal", "mask_window", "blocks_random_causal"])
def test_wrong_visits_are_found(name, monkeypatch):
    """Without masks, and without the last visit of a tile, the gradients are others."""
    right = with_phases
    for wrong in (
        lambda visits: [(block, False) for block, _ in right(visits)],
        lambda visits: right(visits)[:-1],
    ):
        monkeypatch.setattr("tests.test_backward_tiles.with_phases", wrong)
        with pytest.raises(AssertionError):
            test_tiles_come_to_the_oracles_gradients(name)


def packed_tensors(call: Call) -> list[torch.Tensor]:
    """q, k, v, dout (total, heads, dim) and dlse (heads, total) of a case, in float64."""
    dout, dlse = call.cotangents()
    if call.case.varlen:
        return [x.double() for x in (*call.tensors.values(), dout, dlse)]
    packed = [x.flatten(0, 1).double() for x in (*call.tensors.values(), dout)]
    return [*packed, dlse.transpose(0, 1).flatten(1).double()]


def used_rows(told: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """Each sequence's rows of q, and of k, that are in use."""
    spans = []
    for side in "qk":
        starts = told[f"cu_seqlens_{side}"].tolist()
        lengths = told.get(f"seqused_{side}", told[f"cu_seqlens_{side}"].diff()).tolist()
        spans.append([slice(start, start + n) for start, n in zip(starts, lengths, strict=False)])
    return zip(*spans, strict=True)


def told_of(call: Call, told: dict[str, Any], batch: int, head: int, used: tuple[slice, slice]) -> tuple:
    """Scale, kept elements by their factor, problem, block mask's lists and rules, of one head."""
    case, seqlens = call.case, tuple(rows.stop - rows.start for rows in used)
    scale = case.softmax_scale or case.dims[0] ** -0.5
    keep = torch.ones(seqlens).double()
    if case.dropout:
        dropout = told["dropout"]
        keep = keep_mask(dropout, batch * case.heads[0] + head, *seqlens) * (65536 / dropout.threshold)
    mask, score = rules_of(call, batch, head, seqlens)
    mask = mask and OnHost(mask)
    shown = SimpleNamespace(batch=batch, head=head, seqlen_k=seqlens[1], mask=mask, score=score)
    lists, block_size = None, None
    if block_mask := told.get("block_mask"):
        counts, indices = map(Lists, block_mask.transposed)
        lists, block_size = SimpleNamespace(block_counts=counts, block_indices=indices), block_mask.block_size
    return scale, keep, SimpleNamespace(block_size=block_size), lists, shown

"""The softmax weights themselves, for tests: plain torch, O(seqlen_q * seqlen_k) memory.

The rules are the very objects that the kernels compile. Dropout is Philox4x32-7 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"):

    key       (seed low word, seed high word ^ offset high word)
    counter   (group, query row, batch * heads + head, offset low word)
    group     of the key k: (k // 32) * 4 + (k % 8) // 2
    bits      16, number j = ((k % 32) // 8) * 2 + k % 2 of the eight that the four words hold, low first
"""

from __future__ import annotations

import torch

from . import rules
from .block_mask import blocks_of
from .request import Call, keep_threshold

_ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def signed_probabilities(call: Call) -> torch.Tensor:
    """Softmax weights before dropout, float32 (batch, heads, seqlen_q, seqlen_k), negative where dropped."""
    (batch, seqlen_q, heads, _), seqlen_k = call.q.shape, call.k.shape[1]
    device = call.q.device
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(-1, 1, 1)
    row = torch.arange(seqlen_q, device=device).view(-1, 1)
    k = torch.arange(seqlen_k, device=device)
    position = row + (seqlen_k - seqlen_q)

    keys = call.k.float().repeat_interleave(heads // call.k.shape[2], dim=2)
    s = torch.einsum("bqhd,bkhd->bhqk", call.q.float(), keys) * call.softmax_scale
    mask, score = (
        rule and rule.at(found or (), b, h, seqlen_q, seqlen_k)
        for rule, found in zip(
            rules.decode(call.rules),
            rules.values(call.rules, call.rule_tensors, call.rule_ints, call.rule_floats),
            strict=True,
        )
    )
    if score is not None:
        s = score.score(s, b, h, position, k).float()
    visible = k >= 0
    if mask is not None:
        visible = mask.visible(position, k)
    if call.block_counts is not None:
        listed, full = _listed_pairs(call)
        visible = listed & (full | visible)
    s = s.masked_fill(~visible, -torch.inf)
    sink = torch.full((heads,), -torch.inf, device=device) if call.sink is None else call.sink
    top = torch.maximum(s.amax(-1, keepdim=True) if seqlen_k else sink.view(-1, 1, 1), sink.view(-1, 1, 1))
    top = torch.where(top == -torch.inf, 0.0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink.view(-1, 1, 1) - top)
    p = p / torch.where(total == 0, 1.0, total)
    if call.rng_state is None:
        return p
    return torch.where(_kept(call, b * heads + h, row, k), p, -p)


def _listed_pairs(call: Call) -> list[torch.Tensor]:
    """(batch or 1, heads or 1, seqlen_q, seqlen_k): pairs in listed blocks, and in those listed as full."""
    seqlen_q, seqlen_k, (block_q, block_k) = call.q.shape[1], call.k.shape[1], call.block_size
    maps = blocks_of(call.block_counts, call.block_indices, -(-seqlen_k // block_k))
    spread = (blocks.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3) for blocks in maps)
    return [pairs[..., :seqlen_q, :seqlen_k] for pairs in spread]


def _kept(call: Call, head: torch.Tensor, row: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """True where dropout keeps the weight; head counts through the batch."""
    seed, offset = call.rng_state[0], call.rng_state[1]
    counter = [(k // 32) * 4 + (k % 8) // 2, row, head, offset & _WORD]
    key = [seed & _WORD, (seed >> 32 ^ offset >> 32) & _WORD]
    words = torch.stack(torch.broadcast_tensors(*_philox(counter, key)))
    number = ((k % 32) // 8) * 2 + k % 2
    word = torch.gather(words, 0, (number // 2).expand(words.shape[1:]).unsqueeze(0)).squeeze(0)
    return (word >> 16 * (number % 2) & 0xFFFF) < keep_threshold(call.dropout_p)


def _philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four random 32-bit words per counter; words travel in int64."""
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = (
            _multiply(word, by) for word, by in zip(counter[::2], _MULTIPLIERS, strict=True)
        )
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [word + step & _WORD for word, step in zip(key, _INCREMENTS, strict=True)]
    return counter


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32-by-32-bit product, in halves so that no step leaves int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF

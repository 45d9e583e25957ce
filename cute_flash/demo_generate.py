"""A small language model continues texts, with torch's attention and with a cache that cute_flash attends to.

    python -m cute_flash demo --generate [--arch sm80]

The model of demo_train.py, trained with torch's attention, takes the likeliest character each time. By torch
it reads the whole text again for each; by cute_flash it reads a character, whose key and value are appended
to pages that texts of different lengths share. Both must choose the same characters, up to one that leads by
less than what roundings change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .api import flash_attn_with_kvcache
from .demo_train import HEAD_DIM, HEADS, LENGTH, Attention, Model, text_to_learn, torch_attention, train

PROMPTS = ("The kernels ", "cute_flash is exact attention for ")
PAGE = 16  # characters whose keys lie together
# Three times what roundings to bfloat16 in another order leave between logits (3e-3 seen).
LARGEST_DIFFERENCE = 1e-2


class Pages:
    """Where texts' keys and values lie in every layer's pages, and how many are there.

    chosen: the texts that are read, as an index; the others are left as they are.
    """

    def __init__(self, texts: int, device: str) -> None:
        each = -(-LENGTH // PAGE)
        pages = torch.randperm(texts * each, generator=torch.Generator().manual_seed(0))
        self.table = pages.view(texts, each).int().to(device)
        self.lengths = torch.zeros(texts, dtype=torch.int32, device=device)
        self.chosen = slice(None)

    def attention(self) -> Attention:
        """A layer's, with pages of its own."""
        shape = (self.table.numel(), PAGE, HEADS, HEAD_DIM)
        k_cache, v_cache = (torch.empty(shape, dtype=torch.bfloat16, device=self.table.device) for _ in "kv")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            where = {"cache_seqlens": self.lengths[self.chosen], "block_table": self.table[self.chosen]}
            return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, causal=True, **where)

        return attend


class Chosen(NamedTuple):
    """Characters that follow the prompts, (texts, count), and the logits that they were chosen by."""

    characters: torch.Tensor
    logits: torch.Tensor


class Head(nn.Module):
    """The last linear map in float32: logits in bfloat16 would often be equal."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, seqlen, width)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.float())


def by_torch(model: Model, prompts: list[torch.Tensor], count: int) -> Chosen:
    """Each text by itself, read anew for every character."""
    for layer in model.layers:
        layer.attention = torch_attention
    found = []
    for prompt in prompts:
        text, logits = prompt, []
        for _ in range(count):
            logits.append(model(text[None])[0, -1])
            text = torch.cat([text, logits[-1].argmax()[None]])
        found.append(torch.stack(logits))
    return _chosen(torch.stack(found))


def by_cute_flash(model: Model, prompts: list[torch.Tensor], count: int) -> Chosen:
    """Prompts one by one into a cache, then a character of every text at a time."""
    pages = Pages(len(prompts), str(prompts[0].device))
    for layer in model.layers:
        layer.attention = pages.attention()
    last = []
    for i, prompt in enumerate(prompts):
        pages.chosen = slice(i, i + 1)
        last.append(model(prompt[None])[:, -1])
        pages.lengths[i] += len(prompt)
    pages.chosen = slice(None)
    logits = [torch.cat(last)]
    for _ in range(count - 1):
        logits.append(model(logits[-1].argmax(-1)[:, None], pages.lengths)[:, -1])
        pages.lengths += 1
    return _chosen(torch.stack(logits, dim=1))


def _chosen(logits: torch.Tensor) -> Chosen:
    return Chosen(logits.argmax(-1).cpu(), logits.cpu())


def run(steps: int, count: int, device: str, say: Callable[[str], None]) -> int:
    """Train, then continue the prompts by either; print them; 0 where they agree."""
    text = text_to_learn()
    characters = sorted(set(text))
    kept: list[Model] = []

    def progress(text: str) -> None:
        say(f"\r{'training':>14}: {text}")

    losses = train(torch_attention, steps, device, progress, kept.append)
    say("\n")
    (model,) = kept
    model.head = Head(model.head)
    prompts = [torch.tensor([characters.index(c) for c in prompt], device=device) for prompt in PROMPTS]
    found = {}
    for name, by in (("torch", by_torch), ("cute_flash", by_cute_flash)):
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            found[name] = by(model, prompts, count)
        seconds = time.perf_counter() - started
        say(f"{name:>14}: {count} characters of {len(prompts)} texts, {seconds:.1f} s\n")
    print(f"\nafter {steps} steps, at a loss of {losses[-1]:.2f} nats a character:\n")
    for name, chosen in found.items():
        for line in _lines(chosen, characters):
            print(f"{name:>14}: {line}")
    alike = clear(found["torch"].logits)
    theirs, ours = (chosen.logits[alike] for chosen in found.values())
    difference = (theirs - ours).abs().max().item()
    print(f"\n{alike.sum()} of {alike.numel()} characters come before one that roundings decide")
    print(f"largest difference of their logits: {difference:.2e}")
    if not (difference <= LARGEST_DIFFERENCE and torch.equal(theirs.argmax(-1), ours.argmax(-1))):
        print(f"This is wrong: other characters, or more than {LARGEST_DIFFERENCE} apart.")
        return 1
    return 0


def clear(logits: torch.Tensor) -> torch.Tensor:
    """bool (texts, count): characters up to the first that leads by less than roundings may change."""
    best = logits.topk(2).values
    return (best[..., 0] - best[..., 1] > 2 * LARGEST_DIFFERENCE).cumprod(1).bool()


def _lines(chosen: Chosen, characters: list[str]) -> Iterator[str]:
    for prompt, text in zip(PROMPTS, chosen.characters.tolist(), strict=True):
        yield repr(prompt + "|" + "".join(characters[c] for c in text))

"""A small language model trained twice from one seed: with torch's attention, and with cute_flash's.

    python -m cute_flash demo --train [--arch sm80]

It learns to continue this project's README, character by character: two layers, two heads of 32, weights in
float32 and arithmetic in bfloat16 (autocast). The runs differ in nothing but who computes attention and its
gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import metadata

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from .api import flash_attn_func

HEADS, HEAD_DIM, LAYERS = 2, 32, 2
BATCH, LENGTH = 4, 96  # characters that a step learns from
# Ten times what roundings to bfloat16 in another order leave between the curves (6e-4 seen).
LARGEST_DIFFERENCE = 6e-3

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention on (batch, seqlen, heads, head_dim) by torch."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def our_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by cute_flash."""
    return flash_attn_func(q, k, v, causal=True)


class Layer(nn.Module):
    """Attention and two linear maps, each added to what came in."""

    def __init__(self, width: int, attention: Attention):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.maps = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, seqlen, width)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.maps(self.norms[1](x))


class Model(nn.Module):
    """The next character's logits, (batch, seqlen, characters), from characters (batch, seqlen)."""

    def __init__(self, characters: int, attention: Attention):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(Layer(width, attention) for _ in range(LAYERS)))
        self.head = nn.Linear(width, characters)

    def forward(self, text: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        """text: int64 (batch, seqlen). first: (batch,), the place of each text's first character; None: 0."""
        places = torch.arange(text.shape[1], device=text.device)
        if first is not None:
            places = first[:, None] + places
        return self.head(self.layers(self.characters(text) + self.places(places)))


def text_to_learn() -> str:
    """The README, which an installation carries as its description."""
    found = metadata("cute_flash")
    return found.get_payload() or found["Description"]


def train(
    attention: Attention,
    steps: int,
    device: str,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[Model], None] = lambda model: None,
) -> list[float]:
    """The loss at every step, in nats a character. keep: gets the model when it is trained."""
    text = text_to_learn()
    known = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([known[character] for character in text], device=device)
    torch.manual_seed(0)
    model = Model(len(known), attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([data[start : start + LENGTH + 1] for start in starts])
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress(f"step {step + 1} of {steps}, loss {losses[-1]:.3f}")
    keep(model)
    return losses


def run(steps: int, device: str, say: Callable[[str], None]) -> int:
    """Train twice, print both curves; 0 where they agree."""
    curves, seconds = [], []
    for name, attention in (("torch", torch_attention), ("cute_flash", our_attention)):
        started = time.perf_counter()
        curves.append(train(attention, steps, device, lambda text, name=name: say(f"\r{name:>14}: {text}")))
        seconds.append(time.perf_counter() - started)
        say(f", {seconds[-1]:.1f} s\n")
    print("\n step    torch  cute_flash   loss, nats a character")
    highest = max(map(max, curves))
    for step, (theirs, ours) in enumerate(zip(*curves, strict=True), 1):
        print(f"{step:5} {theirs:8.4f} {ours:11.4f}   {'#' * round(40 * ours / highest)}")
    difference = max(abs(theirs - ours) for theirs, ours in zip(*curves, strict=True))
    print(f"\nlargest difference of the curves: {difference:.2e}")
    if not difference <= LARGEST_DIFFERENCE:
        print(f"This is wrong: more than {LARGEST_DIFFERENCE} apart.")
        return 1
    return 0

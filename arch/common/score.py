"""Scores: what happens to a scaled score before the mask and the softmax.

    s            the score q·k * softmax_scale, fp32
    batch, head  indices of the sequence and of the query head
    q, k         positions as in `mask`: q is bottom-right aligned on the key axis

Order in a call: scale, softcap, ALiBi, the user's rule, mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..elementwise import absolute, load, tanh, to_float, where
from ..rule import Rule
from ..symbol import FLOAT, Symbol, kind_of, leaf, operand


class Score(Rule):
    """Base of scores: a frozen dataclass with `score(s, batch, head, q, k)`."""

    def score(self, s, batch, head, q, k):
        """The score that replaces `s`."""
        raise NotImplementedError(f"{type(self).__name__} defines no score(s, batch, head, q, k)")

    def sections(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        place = values["batch"], values["head"], leaf("q"), leaf("k")
        found = operand(self.score(leaf("s"), *place))
        return {"score": (found if kind_of(found) == FLOAT else to_float(found),)}


# Beyond it what `tanh` on the device is off by (1e-7 of the cap) begins to show in a score.
LARGEST_PLAIN_CAP = 1000.0


@dataclass(frozen=True)
class Softcap(Score):
    """cap * tanh(s / cap): scores stay within ±cap (Gemma 2)."""

    cap: float

    def form(self) -> Score:
        return LargeSoftcap(self.cap) if self.cap > LARGEST_PLAIN_CAP else self

    def score(self, s, batch, head, q, k):
        return self.cap * tanh(s / self.cap)


@dataclass(frozen=True)
class LargeSoftcap(Score):
    """`Softcap` whose small arguments take tanh(x) = x - x^3 / 3, exact to rounding below 1 / 32."""

    cap: float

    def score(self, s, batch, head, q, k):
        x = s / self.cap
        return where(absolute(x) < 1 / 32, s - s * x * x * (1 / 3), self.cap * tanh(x))


@dataclass(frozen=True)
class ALiBi(Score):
    """s - slope * |q - k| (Press et al. 2022, section 3).

    slopes: float32 tensor (heads,) or (batch, heads).
    """

    slopes: Any
    tables = {"slopes": (("heads",), ("batch", "heads"))}

    def score(self, s, batch, head, q, k):
        slope = load(self.slopes, head) if len(self.slopes.shape) == 1 else load(self.slopes, batch, head)
        return s - slope * to_float(absolute(q - k))


@dataclass(frozen=True)
class Chain(Score):
    """Several scores, applied in order."""

    rules: tuple[Score, ...]

    def at(self, batch, head, seqlen_q, seqlen_k):
        return Chain(tuple(rule.at(batch, head, seqlen_q, seqlen_k) for rule in self.rules))

    def score(self, s, batch, head, q, k):
        for rule in self.rules:
            s = rule.score(s, batch, head, q, k)
        return s

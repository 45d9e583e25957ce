"""The score rules that ship; every one also answers `score(s, batch, head, q, k)` on plain numbers."""

from .arch.common.score import ALiBi, Chain, Score, Softcap

__all__ = ["ALiBi", "Chain", "Score", "Softcap"]

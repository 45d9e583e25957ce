"""The masks that ship; every one also answers `visible(q, k)` on plain integers."""

from .arch.common.mask import Both, Causal, Document, Either, Mask, PrefixLM, SlidingWindow

__all__ = ["Both", "Causal", "Document", "Either", "Mask", "PrefixLM", "SlidingWindow"]

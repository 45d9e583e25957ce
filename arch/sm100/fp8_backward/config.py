"""How the FP8 gradients' kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...precision import FLOAT8_E5M2, Precision
from ...problem import Problem
from ..backward import config


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits."""

    def ds_precision(self, problem: Problem) -> Precision:
        """e5m2: dS needs range, as it has no scales."""
        return FLOAT8_E5M2

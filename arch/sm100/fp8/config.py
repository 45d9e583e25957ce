"""How the FP8 kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from .. import config


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits."""

    @property
    def apart(self) -> bool:
        """O is larger than Q."""
        return True

"""How the FP8 gradients' kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...common.regions import Region, Regions
from ...precision import FLOAT8_E5M2, Precision
from ..backward import config
from ..backward.config import ROWS


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """As for 16 bits, with products that join dK and dV by pieces of `piece_columns` columns.

    ValueError also for columns that pieces do not divide.
    """

    tile_m: int = ROWS
    piece_columns: int
    spare_registers: ClassVar[int] = 24

    def __post_init__(self) -> None:
        for columns in (self.columns, self.columns_v):
            if columns % self.piece_columns:
                raise ValueError(f"{self}: {columns} is no multiple of {self.piece_columns}")
        super().__post_init__()

    @property
    def ds_precision(self) -> Precision:
        """e5m2: dS needs range, as it has no scales."""
        return FLOAT8_E5M2

    @property
    def handed_columns(self) -> int:
        """Of a piece at a time."""
        return min(self.piece_columns, self.part_columns)

    def regions(self, precision: Precision) -> Regions:
        """As for 16 bits, with tiles by columns besides; dK and dV leave from registers."""
        found = super().regions(precision)
        kept = tuple(region for region in found.regions if region.over is None)
        rows = {"k": self.cta_keys, "q": self.tile_m, "grad_out": self.tile_m}
        columns = {"k": self.columns, "q": self.columns, "grad_out": self.columns_v}
        copies = tuple(
            Region(
                name=f"{name}_columns",
                size=precision.nbytes(rows[name] * columns[name]),
                count=1 if name == "k" else found[name].count,
                filled="load",
                read=found[name].read,
            )
            for name in rows
        )
        return replace(found, regions=kept + copies)

    def registers(self) -> dict[str, int]:
        """As `config.Config.registers`; two products are under way at a time."""
        sums, operands = (self.columns + self.columns_v) // 2, 2 * (self.tile_m // 8)
        widest = max(self.piece_columns, self.part_columns)
        return {
            "S and dP": sums + 2 * (self.tile_m // 2),
            "dV, dQ and dK": sums + operands + (self.piece_columns + widest) // 2,
        }

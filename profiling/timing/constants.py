"""Every number of the timing model, read from constants.csv: unit, value per GPU, source, method, confidence.

    of("H200")          what the machine reads: .exp_interval, .tma_latency, …

None is fitted to a kernel. A number that published speeds chose has the method "fitted", and says which rows.
Confidence: "measured" by the source on hardware; "vendor": a data sheet or a guide; "derived" from other
numbers; "unverified": a guess, there because something must be. 0: the GPU has no such thing.

Sources:
guide       NVIDIA, CUDA C++ Programming and Best Practices Guides 13.0, throughput of native instructions
FGS         FlashGPU-Sim (MICRO 2026): its configurations for H100 and B200, and the hardware times in them
HPMLL       Luo et al., arXiv 2402.13499 and 2501.12084, microbenchmarks of Hopper
QRC         ademeure/QuickRunCUDA, audited measurements of a B300
UPC         Huerta et al., MICRO 2025, "Dissecting and Modeling the Architecture of Modern GPU Cores"
Volta       Jia et al., arXiv 1804.06826 (2018)
FA4#2889    flash-attention's pull request 2889 (2026), on an H200
Ampere      Abdelkhalik et al., arXiv 2208.11174 (2022)
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

FILE = Path(__file__).with_name("constants.csv")
FAMILIES = {
    "A100": "sm80", "H100": "sm90", "H200": "sm90", "B200": "sm100", "GB200": "sm100", "GB300": "sm103",
}  # fmt: skip
CONFIDENCE = ("measured", "vendor", "derived", "unverified")


@dataclass(frozen=True)
class Constant:
    """One number. values: by GPU."""

    name: str
    unit: str
    values: dict[str, float]
    source: str
    method: str
    confidence: str


@cache
def constants() -> tuple[Constant, ...]:
    """All of them, as the file has them."""
    with FILE.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    told = ("name", "unit", "source", "method", "confidence")
    return tuple(
        Constant(**{name: row[name] for name in told}, values={gpu: float(row[gpu]) for gpu in FAMILIES})
        for row in rows
    )


def listing() -> str:
    """A table of all of them."""
    lines = []
    for it in constants():
        values = " ".join(f"{gpu} {value:g}" for gpu, value in it.values.items())
        lines.append(f"{it.name}: {values} {it.unit}\n    {it.source}: {it.method} ({it.confidence})")
    return "\n".join(lines)


def of(gpu: str) -> SimpleNamespace:
    """All numbers of a GPU as attributes; besides, its `name` and `family`. KeyError for an unknown GPU."""
    if gpu not in FAMILIES:
        raise KeyError(f"{gpu!r} is none of {', '.join(FAMILIES)}")
    values = {constant.name: constant.values[gpu] for constant in constants()}
    return SimpleNamespace(name=gpu, family=FAMILIES[gpu], **values)

"""Speeds that others published, row by row with source, and which half of the rows the model was tuned on.

    rows = read(FILE)        GPU, library, pass, sizes, TFLOP/s
    row.tuned                chosen by a hash of the row's text, before anything was tuned

FLOP of a row are those of the products, 2 (d + d_v) for a query and a key, under a causal mask for half of
them; 2.5 times as many for gradients, (3 d + 2 d_v) / (d + d_v) times where the two head dims differ.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

from .grid import Shape

FILE = Path(__file__).resolve().parent.parent / "results" / "published_speeds.csv"
COLUMNS = (
    "gpu", "library", "version", "pass", "dtype", "batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv",
    "head_dim", "head_dim_v", "causal", "tflops",
)  # fmt: skip
# What tables call a GPU that the model has, by how the name begins.
GPUS = {
    "A100": "A100", "H100": "H100", "H200": "H200", "B200": "B200", "GB200": "GB200", "GB300": "GB300",
}  # fmt: skip
OTHER = ("H100 PCIe",)  # with fewer SMs, which the model does not have
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
CAUSAL = {"false": False, "true": True, "top_left": True, "bottom_right": True}


@dataclass(frozen=True)
class Row:
    """One published number. gpu: as constants.of has it, "" where the model has no such GPU."""

    gpu: str
    library: str
    version: str
    kind: str
    dtype: str
    shape: Shape
    tflops: float
    text: str

    @property
    def tuned(self) -> bool:
        """Whether it may choose a number of the model."""
        return hashlib.sha256(self.text.encode()).digest()[0] % 2 == 0

    @property
    def problem(self) -> tuple:
        """What rows of different libraries have in common."""
        return self.gpu, self.kind, self.dtype, self.shape

    @property
    def flops(self) -> float:
        """As tables count them."""
        dim, dim_v = self.shape.dims
        return self.shape.flops * (1 if self.kind == "fwd" else (3 * dim + 2 * dim_v) / (dim + dim_v))

    def __str__(self) -> str:
        s = self.shape
        mask = "causal" if s.causal else "full"
        heads = f"{s.heads}/{s.heads_kv}" if s.heads != s.heads_kv else f"{s.heads}"
        dims = f"{s.dims[0]}" if s.dims[0] == s.dims[1] else f"{s.dims[0]}/{s.dims[1]}"
        sizes = f"b{s.batch:<3}s{s.rows:<6}h{heads:<6}d{dims:<8}{mask:7}"
        return f"{self.gpu:6}{self.kind:8}{self.library:12}{sizes}"


def read(file: Path = FILE) -> list[Row]:
    """Rows of a table whose sizes are all told, in 16 bits, with as many queries as keys or not.

    Raises ValueError where the table has other columns.
    """
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{file} has no column {', '.join(missing)}")
        found = [_row(told) for told in reader]
    return [row for row in found if row is not None]


def _row(told: dict[str, str]) -> Row | None:
    try:
        sizes = [int(told[name]) for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv")]
        dims = int(told["head_dim"]), int(told["head_dim_v"])
        shape, tflops = Shape(*sizes, dims, CAUSAL[told["causal"]]), float(told["tflops"])
    except (ValueError, KeyError):
        return None
    if told["dtype"] not in DTYPES:
        return None
    name = told["gpu"]
    known = [gpu for begins, gpu in GPUS.items() if name.startswith(begins) and not name.startswith(OTHER)]
    text, dtype = ",".join(told[name] for name in COLUMNS), DTYPES[told["dtype"]]
    gpu = known[0] if known else ""
    return Row(gpu, told["library"], told["version"], told["pass"], dtype, shape, tflops, text)

"""One file per instruction family. Importing this package registers every operation."""

from . import arith, barrier, bits, compare, control, convert, cp_async, floating, memory, mma, warp, wgmma

__all__ = [
    "arith",
    "barrier",
    "bits",
    "compare",
    "control",
    "convert",
    "cp_async",
    "floating",
    "memory",
    "mma",
    "warp",
    "wgmma",
]

"""One file per instruction family. Importing this package registers every operation."""

from . import (
    arith,
    barrier,
    bits,
    bulk,
    cluster,
    compare,
    control,
    convert,
    cp_async,
    floating,
    mbarrier,
    memory,
    mma,
    warp,
    wgmma,
)

__all__ = [
    "arith",
    "barrier",
    "bits",
    "bulk",
    "cluster",
    "compare",
    "control",
    "convert",
    "cp_async",
    "floating",
    "mbarrier",
    "memory",
    "mma",
    "warp",
    "wgmma",
]

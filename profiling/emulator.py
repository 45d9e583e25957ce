"""Seconds that the emulator takes for an attention forward of one kernel tree, on one core, against its bars.

Inputs are random, never zeros. The first call of each shape, which compiles the kernel and translates its
PTX, is not counted; of the others the median and the fastest are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import NamedTuple

import torch

import cute_flash


class Bar(NamedTuple):
    """One call, (batch 1, seqlen, heads, dim), and the seconds it may take."""

    heads: int
    seqlen: int
    dim: int
    seconds: float


BARS = (Bar(2, 256, 64, 0.5), Bar(2, 256, 128, 1.0), Bar(1, 1024, 128, 5.0))


def main(arguments: list[str]) -> int:
    """Print a line per bar; 0 where all are met."""
    parser = argparse.ArgumentParser(prog="python -m profiling emulator", description=__doc__)
    parser.add_argument("--arch", default="sm80")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--causal", action="store_true")
    chosen = parser.parse_args(arguments)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    print("heads seqlen  dim  median s   best s  bar s  warp instructions  µs each")
    met = True
    for bar in BARS:
        seconds, instructions = measure(bar, chosen.arch, chosen.causal, chosen.repeat)
        median = statistics.median(seconds)
        met &= median <= bar.seconds
        print(
            f"{bar.heads:5} {bar.seqlen:6} {bar.dim:4}  {median:8.3f} {min(seconds):8.3f} {bar.seconds:6.1f}"
            f"  {instructions:17}  {median / instructions * 1e6:7.2f}",
            "met" if median <= bar.seconds else "MISSED",
            flush=True,
        )
    return 0 if met else 1


def measure(bar: Bar, arch: str, causal: bool, repeat: int) -> tuple[list[float], int]:
    """Seconds of each counted call, and the warp instructions of one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, bar.seqlen, bar.heads, bar.dim).bfloat16()
    seconds = []
    with cute_flash.emulated(arch) as machine:
        for _ in range(repeat + 1):
            start = time.perf_counter()
            cute_flash.flash_attn_func(q, k, v, causal=causal)
            seconds.append(time.perf_counter() - start)
        instructions = machine.reports[-1].instructions
    return seconds[1:], instructions

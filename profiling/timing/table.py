"""`python -m profiling timing`: our kernels and flash-attn-4's by the model, and what their warps wait for.

    python -m profiling timing                              d64 and d128, both passes, every GPU
    python -m profiling timing --gpu H200 --dim 128 --kind fwd
    python -m profiling timing --write                      keep the rows in results/timing.json and timing.md
    python -m profiling timing --validate [FILE] [--seconds N] [--write]
                                                            beside published speeds; see validate.py
    python -m profiling timing --constants                  every number of the model

Clocks are the model's; TFLOP/s are at the GPU's clock in constants.csv. The exit status is 1 where a kernel
could not be run, or where a bar of the validation is missed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from cute_flash.emulator import EmulatorError

from .. import flash_attn_4
from . import backward, constants, kept, predict, published, simulate, subjects, validate
from .kept import Kept
from .machine import Machine
from .match import NoWay
from .parts import Warp

GPUS = ("A100", "H200", "GB200")
DIMS = (64, 128)
PASSES = {"fwd": (subjects.ours, subjects.peer), "bwd": (backward.ours, backward.peer)}
CAUSES = 5  # that are printed of a role
ROLE = (  # what a warp is called, by the first of these that it does
    ("copies", ("load",)),
    ("products", ("tensor product",)),
    ("exponentials", ("EX2",)),
    ("stores", ("store",)),
)


def lines(row: Kept) -> Iterator[str]:
    """What is printed of one kernel."""
    mask, kind = "causal" if row.causal else "full", "bwd" if row.backward else "fwd"
    told = ", ".join(f"{length}: {row.tflops(length):.0f}" for length in kept.LENGTHS)
    yield f"{row.gpu:6} d{row.dim:<4}{kind} {mask:7}{row.kernel:24} TFLOP/s at {told}"
    first = row.found.first
    extra = first[max(first)] - row.steady * max(first)
    each = f"{row.steady:.0f} clocks for {row.rows} x {row.keys} ({100 * row.part:.0f} % of the tensor cores)"
    yield f"       {row.ctas} CTA an SM; {each}, {extra:.0f} for the rest of a CTA"
    yield from (f"       {line}" for line in row.roles)


def run(gpu: str, dim: int, causal: bool, make: Callable) -> Kept:
    """A kernel by the model. Raises what stands in the way of running it."""
    chip = constants.of(gpu)
    subject = make(subjects.Wanted((dim, dim), causal), chip.family)
    found = predict.samples(subject, gpu)
    last = simulate.run(subject, chip, max(found.first)).machine
    return Kept.of(gpu, dim, subject, found, list(roles(last)))


def roles(machine: Machine) -> Iterator[str]:
    """What warps of the first CTA spend their clocks on, by what they do."""
    kinds: dict[str, list[Warp]] = {}
    for warp in (warp for warp in machine.warps if warp.cta == machine.warps[0].cta):
        kinds.setdefault(role(warp), []).append(warp)
    for kind, warps in kinds.items():
        ended = sum(warp.ended for warp in warps)
        lost = sum((warp.lost for warp in warps), Counter())
        most = lost.most_common(CAUSES)
        parts = ", ".join(f"{cause} {100 * clocks / ended:.0f} %" for cause, clocks in most)
        busy = 100 * (1 - lost.total() / ended)
        yield f"{kind} ({len(warps)} warps): own pace {busy:.0f} %, waits: {parts}"
    for sm in machine.sms.values():
        clocks = max(warp.ended for warp in machine.warps)
        parts = [f"{name} {100 * busy / clocks:.0f} %" for name, busy in sm.busy.most_common()]
        mine = [s for s in machine.schedulers if s.sm is sm]
        parts.append(f"issue slots {100 * sum(s.issued for s in mine) / clocks / len(mine):.0f} %")
        yield f"SM {sm.number}: {', '.join(parts)}"


def role(warp: Warp) -> str:
    """In a word, what a warp is there for."""
    done = {mark for cost, _, _ in warp.steps for mark in (cost.kind, *cost.line.parts)}
    return next((name for name, marks in ROLE if done.intersection(marks)), "others")


def main(arguments: list[str]) -> int:
    """Print what is asked for."""
    asked = _arguments(arguments)
    if asked.constants:
        print(constants.listing())
        return 0
    if asked.validate is not None:
        return validate.main(asked.validate, asked.seconds, asked.write)
    rows = []
    sweep = product(asked.gpu, asked.dim, asked.kind, (False, True))
    every = [(gpu, dim, causal, make) for gpu, dim, kind, causal in sweep for make in PASSES[kind]]
    for each in every:
        if (row := _tried(*each)) is not None:
            rows.append(row)
            if asked.write:
                kept.write(rows)
    return int(len(rows) < len(every))


def _tried(gpu: str, dim: int, causal: bool, make: Callable) -> Kept | None:
    """Run a kernel and print what comes of it; None where something stands in the way."""
    try:
        row = run(gpu, dim, causal, make)
    except (flash_attn_4.Missing, NotImplementedError, EmulatorError, NoWay, RuntimeError) as error:
        what = f"{make.__module__.rpartition('.')[2]}.{make.__name__}"
        mask = "causal" if causal else "full"
        print(f"{gpu} d{dim} {mask} {what}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return None
    print("\n".join(lines(row)), flush=True)
    return row


def _arguments(arguments: list[str]) -> argparse.Namespace:
    usage, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m profiling timing", description=usage)
    parser.add_argument("--gpu", nargs="+", choices=constants.FAMILIES, default=GPUS)
    parser.add_argument("--dim", nargs="+", type=int, default=DIMS, help="head dims")
    parser.add_argument("--kind", nargs="+", choices=PASSES, default=list(PASSES), help="passes")
    parser.add_argument("--write", action="store_true", help="keep what is found in results/")
    speeds = {"nargs": "?", "type": Path, "const": published.FILE, "metavar": "FILE"}
    parser.add_argument("--validate", **speeds, help="predictions beside published speeds")
    parser.add_argument("--seconds", type=float, default=1800.0, help="begin no kernel after so many")
    parser.add_argument("--constants", action="store_true", help="every number of the model")
    return parser.parse_args(arguments)

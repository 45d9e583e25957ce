"""Many runs of one kernel, each with another order of events, and a verdict.

No single run finds everything: a kernel that lacks a barrier gives right results as long as warps advance
together, one that lacks a wait as long as copies are done at once. Each run starts from the same operands; an
error is a find, and so is a result that differs from the first run's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..base.errors import EmulatorError
from ..base.formats import bf16_to_f32
from ..base.options import Options, Report
from ..execution.launch import View


def orders(seeds: int) -> tuple[str, ...]:
    """Runs in so many random orders, some of them with the race detector, after those that are not random."""
    randomly = (f"random {seed}" if seed % 8 else f"random {seed} races" for seed in range(seeds))
    return ("eager", "races", "late races", "late_copies", "late_products", *randomly)


PORTFOLIO = orders(8)


@dataclass(frozen=True)
class Find:
    """What a run found. how: its options in words. text: the error's, or which results differ."""

    how: str
    text: str
    error: EmulatorError | None = None

    @property
    def kind(self) -> tuple:
        """Finds of one kind are shown once."""
        return (type(self.error), self.error.line) if self.error else (None, self.text.partition(":")[0])


@dataclass
class Verdict:
    """True where nothing was found. reports: of each run that ended well, by its options in words."""

    runs: int = 0
    seconds: float = 0.0
    finds: list[Find] = field(default_factory=list)
    reports: dict[str, list[Report]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.finds

    def __str__(self) -> str:
        told = f"{self.runs} runs in {self.seconds:.1f} s"
        if not self.finds:
            return f"{told}: no race, missing wait or uninitialised read was found; results are the same"
        kinds: dict[tuple, list[Find]] = {}
        for find in self.finds:
            kinds.setdefault(find.kind, []).append(find)
        lines = [f"{told}: {len(self.finds)} of them object"]
        for alike in kinds.values():
            first = alike[0]
            name = type(first.error).__name__ if first.error else "order"
            lines.append(f"{name}: {first.text}")
            lines.append(f"  again with how={first.how!r}; seen in {len(alike)} runs")
        return "\n".join(lines)


class Held:
    """An array's bytes as they were before the first run, and what the first good run made of them."""

    def __init__(self, view: View):
        self.view = view
        self.before = ctypes.string_at(view.address, view.nbytes)
        self.first: bytes | None = None

    def restore(self) -> None:
        """Put back what it held."""
        ctypes.memmove(self.view.address, self.before, self.view.nbytes)

    def compare(self, tolerance: float) -> str:
        """How it differs from what the first good run made of it; "" where it does not."""
        now = ctypes.string_at(self.view.address, self.view.nbytes)
        if self.first is None:
            self.first = now
        if now == self.first:
            return ""
        one, other = (self._values(data) for data in (self.first, now))
        with np.errstate(all="ignore"):
            apart = np.abs(one - other)
            same = (one == other) | (np.isnan(one) & np.isnan(other))
            same |= apart <= tolerance * np.maximum(np.abs(one), np.abs(other))
        wrong = np.flatnonzero(~same)
        if not len(wrong):
            return ""
        k = int(wrong[0])
        return (
            f"{self.view.name} is not what the first run gave: {len(wrong)} of {len(one)} elements differ, "
            f"the first at {k}: {one[k]:.8g} and {other[k]:.8g}"
        )

    def _values(self, data: bytes) -> np.ndarray:
        """All elements from the first to the last, gaps of strides included, as float64."""
        name = str(self.view.tensor.dtype).rpartition(".")[2]
        if name == "bfloat16":
            return bf16_to_f32(np.frombuffer(data, np.uint16)).astype(np.float64)
        known = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool"}
        return np.frombuffer(data, name if name in known else np.uint8).astype(np.float64)


def examine(
    run: Callable[[Options], list[Report]], held: list[Held], runs: Iterable[str], tolerance: float,
    say: Callable[[str], None] | None = None,
) -> Verdict:  # fmt: skip
    """Run with the options that each of `runs` says in words; see `CuteKernel.examine`."""
    verdict, began, runs = Verdict(), time.perf_counter(), tuple(runs)
    for how in runs:
        options, started = Options.read(how), time.perf_counter()
        for each in held:
            each.restore()
        found: list[Find] = []
        try:
            verdict.reports[how] = run(options)
            differing = filter(None, [each.compare(tolerance) for each in held])
            found = [Find(how, text) for text in differing]
        except EmulatorError as error:
            found = [Find(how, str(error), error)]
        verdict.finds += found
        verdict.runs += 1
        verdict.seconds = time.perf_counter() - began
        if say is not None:
            outcome = " ".join(found[0].text.split("\n")[0].split())[:100] if found else "good"
            seconds = time.perf_counter() - started
            say(f"[{verdict.runs}/{len(runs)}] {how}: {outcome}, {seconds:.1f} s")
    return verdict

"""Predictions beside published speeds: errors per GPU and pass, and whether two libraries' order is right.

    python -m profiling timing --validate [FILE] [--seconds N] [--write]

Rows are those of flash-attn-4 and of cuDNN front end's open sm_80 kernels, which can be compiled here. A hash
of a row's text says whether it may choose a number of the model (`tuned`): only the clocks were, one for each
GPU, with which all its rows are predicted. The exit status is 0 where every GPU and pass is within its bar on
the rows that chose nothing.
With --write the errors are kept in results/validation.json, for README.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from cute_flash.emulator import EmulatorError

from .. import flash_attn_4, record
from . import backward, constants, predict, published, subjects
from .published import Row

JSON = record.RESULTS / "validation.json"
BARS = {"fwd": 0.10, "bwd": 0.15, "bwd_det": 0.15}  # mean absolute error
APART, IN_ORDER = 0.10, 0.90  # pairs of libraries that differ by more; the part whose order must be right
LIBRARIES = {  # name in tables, and pass -> its kernel for a problem
    ("FA4", "fwd"): subjects.peer,
    ("FA4", "bwd"): backward.peer,
    ("cuDNN FROST (CuTe DSL)", "fwd"): subjects.cudnn,
    ("cuDNN FROST (CuTe DSL)", "bwd"): backward.cudnn,
}


@dataclass(frozen=True)
class Predicted:
    """A row and the clocks that the model says it takes."""

    row: Row
    clocks: float

    @property
    def clock(self) -> float:
        """In Hz, at which it takes as long as was published."""
        return self.row.tflops * 1e12 * self.clocks / self.row.flops

    def tflops(self, clock: float) -> float:
        """At a clock in Hz."""
        return self.row.flops / self.clocks * clock / 1e12


@dataclass(frozen=True)
class Error:
    """Of a GPU and pass: mean absolute errors of the rows that chose the clock and of those that did not.

    nan where there is no row. clock: in MHz, of the predictions.
    """

    gpu: str
    kind: str
    tuned: float
    tuned_rows: int
    held: float
    held_rows: int
    clock: float

    @property
    def holds(self) -> bool:
        """Whether the bar does."""
        return not self.held > BARS[self.kind]

    def __str__(self) -> str:
        said = f"{_percent(self.tuned)} of {self.tuned_rows} tuned rows"
        said += f", {_percent(self.held)} of {self.held_rows} held ones; bar {_percent(BARS[self.kind])}"
        return f"{self.gpu:6} {self.kind:8} mean absolute error: {said}; at {self.clock:.0f} MHz"


def errors(found: list[Predicted], clocks: dict[str, float]) -> list[Error]:
    """Of each GPU and pass that has predictions. clocks: in Hz."""
    made = []
    for gpu, kind in dict.fromkeys((each.row.gpu, each.row.kind) for each in found):
        mine = [each for each in found if (each.row.gpu, each.row.kind) == (gpu, kind)]
        tuned = [each for each in mine if each.row.tuned]
        held = [each for each in mine if not each.row.tuned]
        off, left = (error(each, clocks[gpu]) for each in (tuned, held))
        made.append(Error(gpu, kind, off, len(tuned), left, len(held), clocks[gpu] / 1e6))
    return made


def read_errors() -> list[Error]:
    """What is kept; nothing where there is no file."""
    return [Error(**row) for row in json.loads(JSON.read_text())["rows"]] if JSON.exists() else []


def write_errors(made: list[Error]) -> None:
    """In the place of what is kept of the same GPU and pass."""
    every = {(row.gpu, row.kind): row for row in [*read_errors(), *made]}
    record.write_whole(JSON, json.dumps({"rows": [asdict(row) for row in every.values()]}, indent=1) + "\n")


def predictable(rows: Iterable[Row]) -> list[Row]:
    """Those of a known GPU, library and pass."""
    return [row for row in rows if row.gpu and (row.library, row.kind) in LIBRARIES]


def predictions(rows: Iterable[Row], seconds: float) -> Iterator[Predicted | tuple[Row, str]]:
    """Of each row what is predicted, or why nothing is. seconds: after so many no further kernel is run."""
    begun, known = time.monotonic(), {}
    for row in rows:
        shape = row.shape
        group = shape.heads // shape.heads_kv
        wanted = subjects.Wanted(shape.dims, shape.causal, group, row.dtype)
        key = (row.library, row.kind, wanted, row.gpu)
        if key not in known:
            if time.monotonic() - begun > seconds:
                yield row, f"not run: {seconds:.0f} s are over"
                continue
            known[key] = _run(row, wanted)
        if isinstance(known[key], str):
            yield row, known[key]
        else:
            yield Predicted(row, predict.clocks(*known[key], shape, row.gpu))


def _run(row: Row, wanted: subjects.Wanted) -> tuple[subjects.Subject, predict.Samples] | str:
    try:
        subject = LIBRARIES[row.library, row.kind](wanted, constants.FAMILIES[row.gpu])
        return subject, predict.samples(subject, row.gpu)
    except (flash_attn_4.Missing, EmulatorError, ValueError, KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def fitted(found: Iterable[Predicted]) -> float:
    """The clock at which these rows are right on (geometric) average."""
    clocks = [math.log(each.clock) for each in found]
    return math.exp(sum(clocks) / len(clocks))


def error(found: Iterable[Predicted], clock: float) -> float:
    """Mean absolute error; nan of none."""
    apart = [abs(each.tflops(clock) / each.row.tflops - 1) for each in found]
    return sum(apart) / len(apart) if apart else math.nan


def in_order(found: Iterable[Predicted], clocks: dict[str, float]) -> tuple[int, int]:
    """Pairs of libraries on one problem whose order is right, of those that differ by more than APART."""
    right = every = 0
    for one, other in combinations(found, 2):
        if one.row.problem == other.row.problem and one.row.library != other.row.library:
            published_ratio = one.row.tflops / other.row.tflops
            if max(published_ratio, 1 / published_ratio) > 1 + APART:
                clock = clocks[one.row.gpu]
                every += 1
                right += (one.tflops(clock) > other.tflops(clock)) == (published_ratio > 1)
    return right, every


def twice(found: Iterable[Predicted]) -> dict[str, tuple[int, float]]:
    """Problems with two numbers of one library, and how far apart these are: no model is right on both."""
    apart: dict[str, list[float]] = {}
    for one, other in combinations((each.row for each in found), 2):
        if one.problem == other.problem and one.library == other.library:
            ratio = one.tflops / other.tflops
            apart.setdefault(one.gpu, []).append(max(ratio, 1 / ratio) - 1)
    return {gpu: (len(each), sum(each) / len(each)) for gpu, each in apart.items()}


def least(found: Iterable[Predicted], gpu: str) -> float:
    """Mean absolute error on a GPU's held rows that no model escapes, as it has one number for a problem."""
    told: dict[tuple, list[float]] = {}
    for row in (each.row for each in found):
        if row.gpu == gpu and not row.tuned:
            told.setdefault((row.problem, row.library), []).append(row.tflops)
    apart = [min(sum(abs(said / true - 1) for true in rates) for said in rates) for rates in told.values()]
    return sum(apart) / sum(map(len, told.values())) if told else 0.0


def report(found: list[Predicted], clocks: dict[str, float]) -> Iterator[tuple[str, bool]]:
    """Lines of the summary, each with whether its bar holds."""
    yield from ((str(each), each.holds) for each in errors(found, clocks))
    for gpu, (many, apart) in twice(found).items():
        off = f"no model has less than {_percent(least(found, gpu))} on the held ones"
        yield f"{gpu:6} {many} problems were published twice, {_percent(apart)} apart on average: {off}", True
    right, every = in_order(found, clocks)
    text = f"two libraries on one row, more than {_percent(APART)} apart: {right} of {every} in order"
    yield text, right >= IN_ORDER * every


def _percent(part: float) -> str:
    return "none" if math.isnan(part) else f"{100 * part:.1f} %"


def main(file: Path, seconds: float, write: bool = False) -> int:
    """Print the table; 0 where the bars hold. write: keep the errors."""
    rows = published.read(file)
    mine = predictable(rows)
    print(f"{len(rows)} rows with all sizes, {len(mine)} of them of kernels that are predicted", flush=True)
    clocks = {gpu: constants.of(gpu).clock * 1e6 for gpu in constants.FAMILIES}
    found: list[Predicted] = []
    for each in predictions(mine, seconds):
        if isinstance(each, Predicted):
            found.append(each)
            row, said = each.row, each.tflops(clocks[each.row.gpu])
            half = "tuned" if row.tuned else "held"
            text = f"{said:6.0f} / {row.tflops:6.0f} = {said / row.tflops:.3f}"
            print(f"{row} {text}  {half:6} {row.version}", flush=True)
        else:
            print(f"{each[0]} {each[1]}", flush=True)
    if write:
        write_errors(errors(found, clocks))
    lines = list(report(found, clocks))
    for text, holds in lines:
        print(text, "" if holds else "  BAR MISSED")
    for gpu in dict.fromkeys(each.row.gpu for each in found):
        if tuned := [each for each in found if each.row.gpu == gpu and each.row.tuned]:
            print(f"{gpu}: the tuned rows would have {fitted(tuned) / 1e6:.0f} MHz")
    return 0 if found and all(holds for _, holds in lines) else 1

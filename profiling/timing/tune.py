"""`python -m profiling tune`: configs of a kernel by the model, the best beside the table's row.

    python -m profiling tune --arch sm90 --head-dim 128
    python -m profiling tune --arch sm90 --head-dim 128 --backward
    python -m profiling tune --arch sm100 --head-dim 192 128 --causal --length 8192 --seconds 1800
    python -m profiling tune --arch sm90 --head-dim 64 --only tile_n stages --changes 1

A candidate is the row's config with some of CHOICES changed. Its bound is what products and exponentials
take by themselves, of gradients those of the main kernel; candidates are tried from the lowest on, of equal
ones first those with the fewest changes. One whose bound is above the best prediction so far is not compiled.
What the compiler refuses or spills is told and left out.

Clocks are predictions, with the model's error: a row is worth changing where it loses by more than 3 %. The
exit status is 1 where the row itself cannot be predicted, 2 for what there is not to be changed.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import cute_flash
from cute_flash import executable
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.sm80.backward import tuning as ampere
from cute_flash.arch.sm80.tuning import Config as Ampere
from cute_flash.arch.sm90.backward import tuning as hopper
from cute_flash.arch.sm90.tuning import Config as Hopper
from cute_flash.arch.sm100.backward import tuning as blackwell
from cute_flash.arch.sm100.tuning import Config as Blackwell
from cute_flash.dispatch import Answer

from .. import rates, sass
from ..static import in_words
from . import backward, constants, kept, predict, subjects
from .grid import Shape

GPUS = {"sm80": "A100", "sm90": "H200", "sm100": "GB200"}
WORTH = 0.03  # a row that loses by more is worth changing
SHOWN = 5  # of the best


def _each(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    """One field's values, a change each."""
    return tuple({name: value} for value in values)


def _together(names: str, *rows: tuple) -> tuple[dict[str, Any], ...]:
    """Values of fields that only change together."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


_HOPPERS_WIDE = {
    "tile_m": _each("tile_m", 64, 128),
    "keys": _each("keys", *range(16, 73, 8)),
    "slice_columns": _each("slice_columns", 32, 64, 96, 128),
    "handed_columns": _each("handed_columns", 16, 32, 64, 96, 128),
    "overlap": _each("overlap", False, True),
}
_BLACKWELLS_PAIR = {
    "sums": _together("chunk sums", (8, 2), (8, 4), (16, 2), (16, 3), (16, 4), (32, 2)),
    "registers": _together(
        "at_once store_registers compute_registers other_registers",
        (False, 80, 184, 64), (True, 88, 184, 56), (True, 152, 152, 56), (True, 120, 168, 56),
    ),
}  # fmt: skip
# What can be tried, by the class of a kernel's config: name -> changes, of which a candidate has one at most.
CHOICES: dict[type, dict[str, tuple[dict[str, Any], ...]]] = {
    Ampere: {
        "rows": _together("tile_m warps", (64, 4), (128, 4), (128, 8)),
        "tile_n": _each("tile_n", *range(32, 129, 16)),
        "stages": _each("stages", 1, 2, 3),
        "q_in_registers": _each("q_in_registers", False, True),
    },
    Hopper: {
        "warpgroups": _together(
            "consumers producer_registers consumer_registers",
            (1, 24, 240), (2, 24, 240), (2, 40, 232), (3, 32, 160),
        ),
        "tile_n": _each("tile_n", *range(48, 193, 16)),
        "stages": _each("stages", 1, 2, 3, 4),
        "overlap": _each("overlap", False, True),
        "ping_pong": _each("ping_pong", False, True),
        "persistent": _each("persistent", False, True),
    },
    Blackwell: {
        "tiles": _together(
            "tiles slots softmax_registers correction_registers other_registers",
            (1, 2, 240, 152, 112), (2, 1, 192, 80, 48), (2, 1, 200, 64, 48), (2, 1, 192, 64, 64),
        ),
        "tile_n": _each("tile_n", 64, 80, 96, 112, 128),
        "stages": _together("k_stages v_stages", (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4)),
        "polynomial": _each("polynomial", *range(0, 17, 2)),
        "ctas": _each("ctas", 1, 2),
        "persistent": _each("persistent", False, True),
    },
    ampere.Config: {
        "tile": _together(
            "tile_m tile_n warps",
            (32, 64, 8), (64, 64, 8), (64, 128, 8), (128, 64, 8), (128, 128, 8), (64, 64, 4), (32, 128, 8),
        ),
        "stages": _each("stages", 1, 2),
        "k_in_registers": _each("k_in_registers", False, True),
        "v_in_registers": _each("v_in_registers", False, True),
    },
    hopper.Config: {
        "tile_m": _each("tile_m", 64, 128),
        "overlap": _each("overlap", False, True),
        "registers": _together("producer_registers consumer_registers", (24, 240), (40, 232)),
    },
    hopper.WideConfig: _HOPPERS_WIDE,
    hopper.PairConfig: _HOPPERS_WIDE,
    blackwell.Config: _BLACKWELLS_PAIR | {
        "q_stages": _each("q_stages", 1, 2),
        "out_stages": _each("out_stages", 1, 2),
        "p_apart": _each("p_apart", False, True),
    },
    blackwell.SerialConfig: _BLACKWELLS_PAIR,
    blackwell.WideConfig: _BLACKWELLS_PAIR,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A config to try. bound: clocks that the launch takes at least; changes: how many from the row's."""

    config: Any
    bound: float
    changes: int


@dataclass(frozen=True)
class Trial:
    """What came of a candidate. clocks: of the launch, None where there are none; said: why, or how many."""

    config: Any
    clocks: float | None
    said: str


@dataclass(frozen=True)
class Task:
    """A problem on a GPU: what the table answers, and the call that configs are compared by."""

    answer: Answer
    arch: str
    gpu: str
    wanted: subjects.Wanted
    shape: Shape

    @classmethod
    def of(
        cls, arch: str, gpu: str, dims: tuple[int, int], causal: bool, length: int, gradients: bool = False
    ) -> Task:
        """Raises NotImplementedError with the reasons where no kernel serves."""
        heads, wanted = kept.WIDTH // dims[0], subjects.Wanted(dims, causal)
        shape = Shape(max(1, kept.TOKENS // length), length, length, heads, heads, dims, causal)
        if gradients:
            return cls(backward.answer_for(wanted, arch), arch, gpu, wanted, shape)
        mask = {"mask": cute_flash.Causal()} if causal else {}
        answer = cute_flash.supports("bfloat16", *dims, device=arch, lse=True, **mask)
        if not answer:
            raise NotImplementedError(" ".join(str(answer).split()))
        return cls(answer, arch, gpu, wanted, shape)

    @property
    def gradients(self) -> bool:
        """Whether it is of these, by their main kernel."""
        return isinstance(self.answer.problem, BackwardProblem)

    @property
    def columns(self) -> int:
        """Of the products' columns together, for one score: d and d_v, or of gradients 3 d and 2 d_v."""
        dim, dim_v = self.wanted.dims
        return 3 * dim + 2 * dim_v if self.gradients else dim + dim_v

    def bound(self, config: Any) -> float:
        """Clocks that a launch takes at least: of products, and of exponentials that ex2 computes."""
        chip, ctas = constants.of(self.gpu), getattr(config, "ctas", 1)
        scores = config.tile_m * config.tile_n // ctas
        products = 2 * scores * self.columns / chip.matrix_flops
        by_ex2 = 1 - getattr(config, "polynomial", 0) / 32
        each = max(products, scores * by_ex2 * chip.exp_interval / rates.WARP / rates.PARTITIONS)
        ideal = predict.Samples({1: each, 2: 2 * each}, {}, {1: 0.0, 2: 0.0}, 0.0)
        keys = config.tile_n // ctas if self.gradients else config.tile_n
        place = _Place(config.tile_m, keys, ctas, self.wanted.causal, backward=self.gradients)
        return predict.clocks(place, ideal, self.shape, self.gpu)

    def tflops(self, clocks: float) -> float:
        """At the GPU's clock in constants.csv."""
        flops = self.shape.flops * self.columns / sum(self.wanted.dims)
        return flops / clocks * constants.of(self.gpu).clock / 1e6

    def clocks(self, config: Any) -> float:
        """Of the launch, by the model. Raises what compiling and simulating do, ValueError for spills."""
        answer = replace(self.answer, config=config)
        built = executable.artifact(answer.kernel, answer.problem, config, answer.device)
        used = sass.resources(built.cubin)
        if used.local or used.stack:
            raise ValueError(f"spills: {used.stack} bytes of stack, {used.local} of local memory")
        if self.gradients:
            subject = backward.of_answer(answer, self.wanted, self.arch)
        else:
            subject = subjects.of_answer(answer, self.wanted, self.arch, answer.device)
        return predict.clocks(subject, predict.samples(subject, self.gpu), self.shape, self.gpu)


@dataclass(frozen=True)
class _Place:
    """What predict.clocks asks of a kernel that is not compiled: a CTA an SM, at no cost beside its tiles."""

    rows: int
    keys: int
    cluster: int
    causal: bool
    packed: int = 1
    ctas: int = 1
    persistent: bool = True
    backward: bool = False


def _changes(space: dict[str, tuple], names: Iterable[str], many: int) -> Iterator[dict[str, Any]]:
    """Every choice of so many of `names`, as fields of a config."""
    for chosen in combinations(names, many):
        for changes in product(*(space[name] for name in chosen)):
            yield {field: value for change in changes for field, value in change.items()}


def candidates(task: Task, only: Iterable[str], changes: int) -> list[Candidate]:
    """What fits into shared memory, in the order in which it is tried; the row's own config is not among it.

    only: names of CHOICES that may change, up to `changes` of them at a time.
    """
    row, names, found = task.answer.config, list(only), {}
    for many in range(1, changes + 1):
        for fields in _changes(CHOICES[type(row)], names, many):
            with contextlib.suppress(ValueError):  # that it is no config: registers are not enough
                found.setdefault(replace(row, **fields), many)
    found.pop(row, None)
    room, problem = task.answer.device.shared_memory, task.answer.problem
    fitting = [config for config in found if config.shared_memory(problem) <= room]
    made = (Candidate(config, task.bound(config), found[config]) for config in fitting)
    return sorted(made, key=lambda it: (round(it.bound), it.changes))


def trials(
    order: list[Candidate], best: float, clocks: Callable[[Any], float], seconds: float
) -> Iterator[Trial]:
    """Try candidates in their order. best: what is to be beaten. seconds: none is begun after so many."""
    begun = time.monotonic()
    for candidate in order:
        if candidate.bound >= best:
            yield Trial(candidate.config, None, f"not compiled: takes {candidate.bound:.0f} clocks at least")
        elif time.monotonic() - begun > seconds:
            yield Trial(candidate.config, None, f"not tried: {seconds:.0f} s are over")
        else:
            trial = _tried(candidate.config, clocks)
            best = min(best, trial.clocks or best)
            yield trial


def _tried(config: Any, clocks: Callable[[Any], float]) -> Trial:
    """A config that kernels are not made for may fail anywhere: in their own code, compiled, or simulated."""
    try:
        taken = clocks(config)
    except Exception as error:  # the compiler's errors have no common base
        said = str(error).strip().splitlines() or [""]
        return Trial(config, None, f"left out: {type(error).__name__}: {said[0][:100]}")
    return Trial(config, taken, f"{taken:.0f} clocks")


def changed(config: Any, row: Any) -> str:
    """What of a config is not the row's, in words."""
    own, other = (dict(part.split("=") for part in in_words(it).split()) for it in (config, row))
    return " ".join(f"{name}={value}" for name, value in own.items() if value != other[name])


def main(arguments: list[str]) -> int:
    """Try, and print as it goes."""
    asked = _arguments(arguments)
    dims = (asked.head_dim[0], asked.head_dim[-1])
    gpu = asked.gpu or GPUS[asked.arch]
    task = Task.of(asked.arch, gpu, dims, asked.causal, asked.length, asked.backward)
    row = task.answer.config
    space = CHOICES[type(row)]
    if unknown := [name for name in asked.only or () if name not in space]:
        print(f"--only {' '.join(unknown)}: of {task.answer.kernel.name} there may change {', '.join(space)}")
        return 2
    mask = "causal" if asked.causal else "full"
    print(f"{task.answer.kernel.name} on {task.gpu}, {mask}, {asked.length} keys")
    print(f"row: {in_words(row)}", flush=True)
    own = _tried(row, task.clocks)
    if own.clocks is None:
        print(f"row: {own.said}")
        return 1
    rate = f"{task.tflops(own.clocks):.0f} TFLOP/s"
    print(f"row: {own.said}, {rate}; at least {task.bound(row):.0f}", flush=True)
    order = candidates(task, asked.only or list(space), asked.changes)
    found = []
    for number, trial in enumerate(trials(order, own.clocks, task.clocks, asked.seconds), 1):
        ratio = f", {own.clocks / trial.clocks:.3f} of the row's speed" if trial.clocks else ""
        print(f"[{number}/{len(order)}] {changed(trial.config, row)}: {trial.said}{ratio}", flush=True)
        found += [trial] if trial.clocks else []
    print("\n".join(_summary(task, own, found)))
    return 0


def _summary(task: Task, own: Trial, found: list[Trial]) -> Iterator[str]:
    """The best beside the row."""
    best = sorted([own, *found], key=lambda trial: trial.clocks)
    yield "best, predicted:"
    for trial in best[:SHOWN]:
        what = "the row" if trial is own else changed(trial.config, own.config)
        yield f"  {task.tflops(trial.clocks):6.0f} TFLOP/s  {own.clocks / trial.clocks:.3f}  {what}"
    lost = 1 - best[0].clocks / own.clocks
    verdict = "worth changing" if lost > WORTH else f"less than {100 * WORTH:.0f} %: the row stays"
    yield f"the row loses {100 * lost:.1f} %: {verdict}"


def _arguments(arguments: list[str]) -> argparse.Namespace:
    usage, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m profiling tune", description=usage)
    parser.add_argument("--arch", required=True, choices=GPUS)
    gpus = [gpu for gpu, family in constants.FAMILIES.items() if family in GPUS]
    parser.add_argument("--gpu", choices=gpus, help="default: A100, H200, GB200")
    parser.add_argument("--head-dim", required=True, nargs="+", type=int, metavar="D", help="D, or D and D_V")
    parser.add_argument("--causal", action="store_true", help="not with --backward")
    parser.add_argument("--backward", action="store_true", help="the main kernel of gradients")
    parser.add_argument("--length", type=int, default=4096, help="of sequences, 16384 tokens of them")
    names = sorted({name for space in CHOICES.values() for name in space})
    parser.add_argument("--only", nargs="+", choices=names, help="what may change; default: everything")
    parser.add_argument("--changes", type=int, default=2, help="how many of them at a time")
    parser.add_argument("--seconds", type=float, default=1800.0, help="try nothing after so many")
    asked = parser.parse_args(arguments)
    if len(asked.head_dim) > 2:
        parser.error(f"--head-dim takes one or two numbers, not {len(asked.head_dim)}")
    if asked.backward and asked.causal:
        parser.error("--backward is without --causal: gradients are timed without a mask")
    if asked.gpu and constants.FAMILIES[asked.gpu] != asked.arch:
        parser.error(f"--gpu {asked.gpu} is not {asked.arch}")
    return asked

"""Running the steps that answer a call: their kernels, their scratch, and operands found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from .arch.kernel import ABSENT, Steps
from .dispatch import Place
from .executable import executable


class Scratch(NamedTuple):
    """A tensor that lives as long as a call. fill: what it holds at first; None: whatever lies there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None


class Launch(NamedTuple):
    """A compiled kernel, and what finds its operands, in their order, among a call's values."""

    kernel: Callable[..., None]
    operands: Callable[[Mapping[str, Any]], tuple]


class Bound(NamedTuple):
    """Steps that are ready to run, for calls whose tensors have the same shapes."""

    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...]
    multiprocessors: int


def bind(steps: Steps, place: Place, values: Mapping[str, Any]) -> Bound:
    """The steps' kernels, compiled and loaded, and the scratch that a call of these values takes."""
    launches = [
        Launch(executable(*step.compiled, place.device, place.route), itemgetter(*names))
        for step, names in zip(steps.steps, steps.values, strict=True)
    ]
    scratch = []
    if steps.scratch:
        specs, shapes = steps.scratch_specs(), steps.scratch_shapes(values)
        scratch = [
            Scratch(name, shapes[name], getattr(torch, specs[name].dtype), fill)
            for name, fill in steps.scratch.items()
        ]
    return Bound(tuple(launches), tuple(scratch), place.device.multiprocessors)


def run(bound: Bound, values: dict[str, Any]) -> None:
    """Launch. values: of the call, by the names that Specs have, on q's device; what the device has and
    scratch join them.
    """
    values[ABSENT], values["multiprocessors"] = None, bound.multiprocessors
    for name, shape, dtype, fill in bound.scratch:
        values[name] = tensor = values["q"].new_empty(shape, dtype=dtype)
        if fill is not None:
            tensor.fill_(fill)
    for kernel, operands in bound.launches:
        kernel(*operands(values))

"""A kernel as its tree declares it, and the steps in which kernels answer a call.

    Tuning   how a kernel's tiles are chosen
    Kernel   what it serves, how it is tuned, what is compiled
    Step     one launch: a kernel for a problem, its operands bound by name
    Steps    all launches of a call, and the memory that they share

Declarations are light: what is compiled is named, and imported when it is compiled.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .problem import Asked, Device, Sizes, Spec, Support, no_tile

ABSENT = ""  # the value's name where a problem does not have an operand


@dataclass(frozen=True, eq=False)
class Tuning:
    """How a kernel chooses its config.

    config(problem, device, sizes): the one for a call of these sizes, or for any where sizes are None; None
    where no tile serves. configs(problem, device): every one that some sizes get; by default the one for any.
    in_registers(problem, device): those that leave a problem registers enough; by default any may.
    fitting(problem, device): of these, those that the device has room for, whatever the problem's blocks.
    splits(problem, device, sizes): in how many parts a call takes its keys.
    at_once(config, problem, device): how many tiles the device works on together; by default one each.
    blocks(config, sizes, splits): of the grid, all along x; by default one for every tile of a head's
        queries and every part of the keys.
    """

    config: Callable[[Any, Device, Sizes | None], Any]
    configs: Callable[[Any, Device], Iterable[Any]] | None = None
    in_registers: Callable[[Any, Device], Sequence[Any]] | None = None
    fitting: Callable[[Any, Device], Iterable[Any]] | None = None
    splits: Callable[[Any, Device, Sizes], int] | None = None
    at_once: Callable[[Any, Any, Device], int] = lambda config, problem, device: device.multiprocessors
    blocks: Callable[[Any, Sizes, int], int] = lambda config, sizes, splits: (
        -(-sizes.seqlen_q // config.tile_m) * sizes.heads_q * sizes.batch * splits
    )


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of one operation, for a type of problem of its own.

    name: tree and operation. launches: "module:Class", the module as in `from … import`, seen from this
    package; Class(problem, config) is what is compiled, called with fake operands in the order of
    `problem.specs()` and a stream. around(step, device): the Steps of a call that takes launches besides
    `step`, which is this kernel's own.
    """

    name: str
    operation: str
    support: Support
    tuning: Tuning
    launches: str
    around: Callable[[Step, Device], Steps] | None = None

    def config(self, problem: Any, device: Device, sizes: Sizes | None = None) -> Any:
        """How to run `problem` on `device`; ask `reasons` first. sizes None: as good as it gets for all."""
        found = self.tuning.config(problem, device, sizes)
        if found is None:
            raise ValueError(f"no tile of {self.name} serves {problem} on {device}")
        return found

    def configs(self, problem: Any, device: Device) -> tuple[Any, ...]:
        """Every config that some sizes get."""
        if self.tuning.configs is None:
            return (self.config(problem, device),)
        return tuple(self.tuning.configs(problem, device))

    def splits(self, problem: Any, device: Device, sizes: Sizes) -> int:
        """In how many parts to take the keys of a call of these sizes."""
        return 1 if self.tuning.splits is None else self.tuning.splits(problem, device, sizes)

    def reasons(self, problem: Asked, device: Device) -> tuple[str, ...]:
        """Every reason why not; empty when this kernel serves `problem` on `device`."""
        found = self.support.reasons(problem, device)
        if not found and self.tuning.config(problem, device, None) is None:
            found = (self._no_tile(problem, device),)
        return found

    def _no_tile(self, problem: Asked, device: Device) -> str:
        """Why no config serves a problem that `support` does."""
        tuning = self.tuning
        if tuning.in_registers and not tuning.in_registers(problem, device):
            return "no tile leaves registers for what mask, score and dropout compute"
        return no_tile(problem, device, tuning.fitting(problem, device) if tuning.fitting else ())

    def steps(self, problem: Asked, device: Device, config: Any) -> Steps:
        """What a call launches that this kernel answers with `config`."""
        own = Step(self, problem, config)
        return Steps((own,)) if self.around is None else self.around(own, device)

    def launcher(self, problem: Any, config: Any) -> Any:
        """What to compile. Imports the compiler."""
        module, _, name = self.launches.partition(":")
        return getattr(importlib.import_module(module, __package__), name)(problem, config)


class Step(NamedTuple):
    """One launch: of a kernel, for a problem of its own, with a config.

    renamed: (operand, value) for every operand that takes a value of the call of another name.
    """

    kernel: Kernel
    problem: Asked
    config: Any
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def compiled(self) -> tuple[Kernel, Asked, Any]:
        """What is compiled: `executable`'s first arguments."""
        return self.kernel, self.problem, self.config

    def operands(self) -> dict[str, tuple[str, Any]]:
        """Operand -> (name of the value that it takes, its Spec), in launch order; (ABSENT, None): none."""
        specs, renamed = self.problem.specs()._asdict(), dict(self.renamed)
        return {
            operand: (ABSENT, None) if spec is None else (renamed.get(operand, operand), spec)
            for operand, spec in specs.items()
        }


@dataclass(frozen=True)
class Steps:
    """How a call is answered: launches, in order, and the tensors that one writes and a later one reads.

    Operands find their values by name: the call's own tensors and numbers, and scratch. A scratch tensor's
    dtype and dimensions are what its operands' Specs say, and must be the same for all of them.
    scratch: name -> the number that it is filled with at first, or None: its first step writes it.
    sizes: dimension -> its size, where no tensor of the call has it: a number, or a function of the sizes
        by name of those that some tensor has.
    """

    steps: tuple[Step, ...]
    scratch: Mapping[str, float | None] = field(default_factory=dict)
    sizes: Mapping[str, int | Callable[[Mapping[str, int]], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """ValueError where steps do not agree on what lies in a scratch tensor."""
        for name, fill in self.scratch.items():
            specs = [spec for bound, spec in self._bound if bound == name]
            kinds = {(spec.dtype, spec.dims) for spec in specs}
            # What is filled at first may be between the CTAs of one launch.
            if len(specs) < (2 if fill is None else 1) or len(kinds) != 1:
                raise ValueError(f"{name} must be one tensor of two or more operands, which have {kinds}")
            if fill is None and not specs[0].written:
                raise ValueError(f"{name} is read before a step writes it")

    @functools.cached_property
    def values(self) -> tuple[tuple[str, ...], ...]:
        """For each step the values that its operands take, in launch order."""
        return tuple(tuple(name for name, _ in step.operands().values()) for step in self.steps)

    def scratch_specs(self) -> dict[str, Spec]:
        """What every scratch tensor is."""
        found = dict(self._bound)
        return {name: found[name] for name in self.scratch}

    def scratch_shapes(self, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The scratch tensors' shapes in a call of these values."""
        sizes = dict(self._known)
        sizes |= {dim: values[name].shape[axis] for dim, (name, axis) in self._measured.items()}
        sizes |= {dim: size(sizes) if callable(size) else size for dim, size in self.sizes.items()}
        return {name: tuple([sizes[dim] for dim in spec.dims]) for name, spec in self.scratch_specs().items()}

    @functools.cached_property
    def _bound(self) -> list[tuple[str, Spec]]:
        """(value, Spec) of every operand that is one tensor or number, in the order of launches."""
        pairs = (pair for step in self.steps for pair in step.operands().values())
        return [(name, spec) for name, spec in pairs if isinstance(spec, Spec)]

    @functools.cached_property
    def _known(self) -> dict[str, int]:
        """Dimensions that compiled code knows."""
        return {dim: size for step in self.steps for dim, size in step.problem.known_sizes().items()}

    @functools.cached_property
    def _measured(self) -> dict[str, tuple[str, int]]:
        """Dimension -> (value, axis) of a tensor of the call that has it."""
        return {
            dim: (name, axis)
            for name, spec in self._bound
            if name not in self.scratch
            for axis, dim in enumerate(spec.dims)
        }

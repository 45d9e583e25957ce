"""A kernel as its tree declares it: what it serves, how its tiles are chosen, and what is compiled.

Declarations are light: what is compiled is named, and imported when it is compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .problem import Device, Problem, Sizes, Support, no_tile


@dataclass(frozen=True, eq=False)
class Tuning:
    """How a kernel chooses its config.

    config(problem, device, sizes): the one for a call of these sizes, or for any where sizes are None; None
    where no tile serves. configs(problem, device): every one that some sizes get; by default the one for any.
    fitting(problem, device): those that the device has room for, whatever the problem's blocks.
    splits(problem, device, sizes): in how many parts a call takes its keys.
    """

    config: Callable[[Any, Device, Sizes | None], Any]
    configs: Callable[[Any, Device], Iterable[Any]] | None = None
    fitting: Callable[[Any, Device], Iterable[Any]] | None = None
    splits: Callable[[Any, Device, Sizes], int] | None = None


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel of one operation, for a type of problem of its own.

    name: tree and operation. launches: "module:Class", the module as in `from … import`, seen from this
    package; Class(problem, config) is what is compiled, called with fake operands in the order of
    `problem.specs()` and a stream. combine: what merges its results where it takes the keys in parts.
    """

    name: str
    operation: str
    support: Support
    tuning: Tuning
    launches: str
    combine: Kernel | None = None

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

    def splits(self, problem: Problem, device: Device, sizes: Sizes) -> int:
        """In how many parts to take the keys of a call of these sizes."""
        return 1 if self.tuning.splits is None else self.tuning.splits(problem, device, sizes)

    def reasons(self, problem: Any, device: Device) -> tuple[str, ...]:
        """Every reason why not; empty when this kernel serves `problem` on `device`."""
        found = self.support.reasons(problem, device)
        if not found and self.tuning.config(problem, device, None) is None:
            fitting = self.tuning.fitting(problem, device) if self.tuning.fitting else ()
            found = (no_tile(problem, device, fitting),)
        return found

    def launcher(self, problem: Any, config: Any) -> Any:
        """What to compile. Imports the compiler."""
        module, _, name = self.launches.partition(":")
        return getattr(importlib.import_module(module, __package__), name)(problem, config)

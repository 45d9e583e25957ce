"""A kernel as `python -m cute_flash compile --emit ptx,json,object DIR` leaves it: three files of one name.

The JSON says what the kernel is called with: dtype, dimensions and contents of each operand, and sizes to try
it with. So it can be run here on random numbers, by somebody who knows nothing of what it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..base.formats import f32_to_bf16
from ..execution.program import Program
from .kernel import CuteKernel, HostArray
from .portfolio import Find, Verdict

PARTS = {".ptx": "ptx", ".o": "object"}


class Emitted:
    """The kernel of a JSON file, and operands made up for it.

    sizes: of dimensions, in place of those that the file proposes. seed: of the operands' contents. Raises
    FileNotFoundError where its other files are not beside it, ValueError for what the file does not describe.
    """

    def __init__(self, path: Path, sizes: dict[str, int] | None = None, seed: int = 0):
        missing = [kind for suffix, kind in PARTS.items() if not path.with_suffix(suffix).exists()]
        if missing:
            raise FileNotFoundError(f"beside {path} there is no {' and no '.join(missing)}: "
                                    "emit them together, --emit ptx,json,object")
        told = json.loads(path.read_text())
        if "sizes" not in told:
            raise ValueError(f"{path} proposes no sizes; it was emitted by an earlier version")
        unknown = set(sizes or {}) - set(told["sizes"])
        if unknown:
            raise ValueError(f"no dimension {', '.join(sorted(unknown))}; it has {', '.join(told['sizes'])}")
        self.name, self.target = told["kernel"], told["target"]
        self.sizes = told["sizes"] | (sizes or {})
        program = Program(path.with_suffix(".ptx").read_text())
        names = [operand["name"] for operand in told["operands"]]
        host = path.with_suffix(".o").read_bytes()
        self.kernel = CuteKernel(program, host, told["function"], told["target"], names)
        self._random = np.random.default_rng(seed)
        self._starts: dict[str, np.ndarray] = {}
        self.written: dict[str, np.ndarray] = {}
        self.operands = tuple(map(self._operand, told["operands"]))

    def examine(self, runs: Iterable[str], say: Callable[[str], None] | None = None) -> Verdict:
        """As `CuteKernel.examine`; an element of an output that no run wrote is a find, too."""
        verdict = self.kernel.examine(*self.operands, runs=runs, say=say)
        for name, bits in self.written.items() if verdict.reports else ():
            left = int(np.count_nonzero(bits == np.iinfo(bits.dtype).max))
            if left:
                how = next(iter(verdict.reports))
                verdict.finds.append(Find(how, f"{name}: {left} of {bits.size} elements were never written"))
        return verdict

    def _operand(self, told: dict[str, Any]) -> Any:
        members = [self._member(told["name"], member) for member in told["members"]]
        if told["is_tuple"]:
            return tuple(members)
        return members[0] if members else None

    def _member(self, name: str, told: dict[str, Any]) -> Any:
        """A scalar, or an array with what the description asks for."""
        shape = tuple(self._size(name, dim) for dim in told["dims"])
        if told["written"]:
            bits = np.full(shape, -1, f"i{_bytes(told['dtype'])}").view(f"u{_bytes(told['dtype'])}")
            self.written[name] = bits
            return HostArray(bits, name, told["dtype"])
        values = self._values(name, told["values"], shape, "float" in told["dtype"])
        if told["strides"] == "scalar":
            return values.item()
        if told["dtype"] == "bfloat16":
            return HostArray(f32_to_bf16(values.astype(np.float32)), name, "bfloat16")
        return HostArray(np.ascontiguousarray(values.astype(told["dtype"])), name)

    def _size(self, name: str, dim: str | int) -> int:
        if isinstance(dim, str) and dim not in self.sizes:
            raise ValueError(f"{name} has a dimension {dim}, whose size nobody proposes")
        return self.sizes[dim] if isinstance(dim, str) else dim

    def _values(self, name: str, what: str, shape: tuple[int, ...], is_float: bool) -> np.ndarray:
        """Contents as a description has them in words; see `Spec.values` of arch/problem.py."""
        kind, _, of = what.partition(" ")
        if kind == "any":
            random = self._random
            return random.standard_normal(shape) if is_float else random.integers(0, 4, shape)
        if kind == "is":
            return np.full(shape, float(of) if is_float else int(of))
        if kind == "starts":
            cuts = np.sort(self._random.integers(0, self.sizes[of] + 1, shape[0] - 2))
            self._starts[name] = np.array([0, *cuts, self.sizes[of]])
            return self._starts[name]
        if kind == "lengths":
            return np.diff(self._starts[of]) if of in self._starts else np.full(shape, self.sizes[of])
        if kind == "longest":
            return np.diff(self._starts[of]).max()
        if kind == "count":
            counts = np.zeros(shape, np.int64)
            counts[..., 0] = self.sizes[of]
            return counts
        if kind == "numbered":
            return np.indices(shape)[int(of)]
        raise ValueError(f"{name} holds {what!r}, which has no model")


def _bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize

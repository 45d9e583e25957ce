"""A kernel for tests of everything around kernels: it compiles in half a second.

out = q * softmax_scale, elementwise; lse = the sum of the mask rule's values, everywhere. Dense only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_flash.arch.kernel import Kernel, Tuning
from cute_flash.arch.problem import Problem, Support


@dataclass(frozen=True)
class TinyConfig:
    """threads: per block, one per column of a head."""

    threads: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


TINY = Kernel(
    name="tests.tiny",
    operation="forward",
    support=Support(
        capabilities=((8, 0), (12, 0)),
        dtypes=("float16",),
        head_dims=(64, 128),
        features=frozenset(("dense", "mask", "lse", "gqa")),
    ),
    tuning=Tuning(config=lambda problem, device, sizes: TinyConfig(threads=problem.head_dim)),
    launches="tests.tiny_kernel:TinyLauncher",
)

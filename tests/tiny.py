"""A kernel for tests of everything around kernels: it compiles in half a second.

out = q * softmax_scale, elementwise; lse = the sum of the mask rule's values, everywhere. Dense only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_flash.arch.problem import Device, Problem, Sizes, Support


@dataclass(frozen=True)
class TinyConfig:
    """threads: per block, one per column of a head."""

    threads: int

    def shared_memory(self, problem: Problem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


class Tiny:
    """The kernel class that dispatch sees."""

    name = "tests.tiny"
    support = Support(
        capabilities=((8, 0), (12, 0)),
        dtypes=("float16",),
        head_dims=(64, 128),
        features=frozenset(("dense", "mask", "lse", "gqa")),
    )

    def __init__(self, problem: Problem, config: TinyConfig):
        self.config = config

    @staticmethod
    def config(problem: Problem, device: Device, sizes: Sizes | None = None) -> TinyConfig:
        """A thread per column."""
        return TinyConfig(threads=problem.head_dim)

    @staticmethod
    def configs(problem: Problem, device: Device) -> tuple[TinyConfig, ...]:
        """The only one."""
        return (Tiny.config(problem, device),)

    @staticmethod
    def reasons(problem: Problem, device: Device) -> tuple[str, ...]:
        """What `support` says."""
        return Tiny.support.reasons(problem, device)

    def launcher(self):
        """What to compile."""
        from tests.tiny_kernel import TinyLauncher

        return TinyLauncher(self.config.threads)

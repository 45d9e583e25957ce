"""Kernels for Ampere and everything that runs its instructions: cp.async, ldmatrix, mma.sync.

No roles and no mbarriers: every warp loads, multiplies and stores. Other trees may list these kernels.
The classes here are light; `launcher` imports the DSL.
"""

from __future__ import annotations

from ..combine import Combine
from ..problem import Device, Problem, Sizes, Support, no_tile
from . import tuning


class Forward:
    """Attention forward, FlashAttention-2's algorithm (Dao 2023, algorithm 1)."""

    name = "sm80.forward"
    support = Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        features=frozenset(
            (
                "dense", "varlen", "seqused", "gqa", "split_dims", "mask", "block_mask", "score", "dropout",
                "sink", "lse", "split_kv",
            )
        ),
    )

    combine = Combine

    def __init__(self, problem: Problem, config: tuning.Config):
        self.problem, self.config = problem, config

    @staticmethod
    def config(problem: Problem, device: Device, sizes: Sizes | None = None) -> tuning.Config:
        """The tile sizes for `problem` on `device`, the same for all sizes; ask `reasons` first."""
        config = tuning.forward_config(problem, device)
        if config is None:
            raise ValueError(f"no tile of sm80.forward fits {device.shared_memory} bytes of shared memory")
        return config

    @staticmethod
    def configs(problem: Problem, device: Device) -> tuple[tuning.Config, ...]:
        """Every config that some sizes get."""
        return (Forward.config(problem, device),)

    @staticmethod
    def splits(problem: Problem, device: Device, sizes: Sizes) -> int:
        """In how many parts to take the keys of a call of these sizes."""
        return tuning.splits(problem, device, sizes)

    @staticmethod
    def reasons(problem: Problem, device: Device) -> tuple[str, ...]:
        """Every reason why not; empty when this kernel serves `problem` on `device`."""
        found = Forward.support.reasons(problem, device)
        if not found and tuning.forward_config(problem, device) is None:
            found = (no_tile(problem, device, tuning.fitting_configs(problem, device)),)
        return found

    def launcher(self):
        """What to compile: called with fake operands in `Operands` order and a stream."""
        from .forward import ForwardKernel

        return ForwardKernel(self.problem, self.config)


KERNELS = (Forward,)

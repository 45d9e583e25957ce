"""Attention forward for Blackwell: TMA, tcgen05, tensor memory, five kinds of warps."""

from __future__ import annotations

from ...combine import Combine
from ...problem import Device, Problem, Sizes, Support, no_tile
from .. import tuning


class Forward:
    """Attention forward after FlashAttention-4 (Zadouri et al. 2026)."""

    name = "sm100.forward"
    support = Support(
        capabilities=((10, 0), (11, 0)),
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
        """The tile sizes for `problem` on `device`; ask `reasons` first."""
        config = tuning.forward_config(problem, device, sizes)
        if config is None:
            raise ValueError(f"no tile of sm100.forward serves {problem} on {device}")
        return config

    @staticmethod
    def configs(problem: Problem, device: Device) -> tuple[tuning.Config, ...]:
        """Every config that some sizes get."""
        return tuning.forward_configs(problem, device)

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
        from .kernel import ForwardKernel

        return ForwardKernel(self.problem, self.config)

"""What kernels for latent attention (MLA) share: which problems are theirs."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Asked, Device, Support


@dataclass(frozen=True, kw_only=True)
class LatentSupport(Support):
    """Head dims as tensor cores and swizzled tiles take them whole; v_step: V's is a multiple of it."""

    v_step: int

    def reasons(self, problem: Asked, device: Device) -> tuple[str, ...]:
        found = super().reasons(problem, device)
        if "latent_kv" not in problem.features():
            found = (*found, "serves only V that is K's first columns")
        sizes = problem.known_sizes()
        if sizes.get("head_dim_v", 0) % self.v_step:
            found = (*found, f"head_dim_v {sizes['head_dim_v']} is not a multiple of {self.v_step}")
        return found

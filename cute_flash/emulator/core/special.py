"""Special registers: what %tid.x and its relatives hold in a wave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .state import LANES

if TYPE_CHECKING:
    from .geometry import Geometry

_AXES = "xyz"
_PER_AXIS = ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
_SINGLE = (
    "laneid", "warpid", "nwarpid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge",
    "dynamic_smem_size", "total_smem_size", "cluster_ctarank", "cluster_nctarank",
)  # fmt: skip
MODELLED = frozenset(
    {f"%{name}.{axis}" for name in _PER_AXIS for axis in _AXES} | {f"%{name}" for name in _SINGLE}
)


def value_of(m: Geometry, name: str) -> np.ndarray:
    """Value of a special register of MODELLED, uint32, broadcastable to (warps, ctas, 32)."""
    base, _, axis = name[1:].partition(".")
    value = _geometry(m, base, _AXES.index(axis)) if axis else _single(m, base)
    return np.asarray(value).astype(np.uint32)


def _single(m: Geometry, name: str) -> np.ndarray | int:
    lane = np.arange(LANES, dtype=np.int64).reshape(1, 1, LANES)
    if name == "laneid":
        return lane
    if name == "warpid":
        return np.arange(m.warps).reshape(-1, 1, 1)
    if name.startswith("lanemask"):
        below = (1 << lane) - 1
        masks = {"eq": 1 << lane, "lt": below, "le": 2 * below + 1, "gt": ~(2 * below + 1), "ge": ~below}
        return masks[name[-2:]] & 0xFFFFFFFF
    cluster = m.launch.cluster
    if name == "cluster_ctarank":
        x, y, z = (_geometry(m, "cluster_ctaid", k) for k in range(3))
        return x + cluster[0] * (y + cluster[1] * z)
    numbers = {
        "nwarpid": m.warps,
        "dynamic_smem_size": m.launch.shared_memory,
        "total_smem_size": m.code.shared_base + m.code.shared_static + m.launch.shared_memory,
        "cluster_nctarank": int(np.prod(cluster)),
    }
    return numbers[name]


def _geometry(m: Geometry, base: str, axis: int) -> np.ndarray | int:
    launch = m.launch
    cta = m.cta_index()[axis].reshape(1, -1, 1)
    size = launch.cluster[axis]
    if base == "tid":
        linear = np.arange(m.warps * LANES).reshape(m.warps, 1, LANES)
        return linear // int(np.prod(launch.block[:axis])) % launch.block[axis]
    if base == "ctaid":
        return cta
    if base == "cluster_ctaid":
        return cta % size
    if base == "clusterid":
        return cta // size
    sizes = {
        "ntid": launch.block[axis],
        "nctaid": launch.grid[axis],
        "cluster_nctaid": size,
        "nclusterid": launch.grid[axis] // size,
    }
    return sizes[base]

"""One kernel tree per GPU architecture.

Nothing here imports torch, and nothing is loaded until a device asks for it: `load(device)` imports the
tree that serves its compute capability and returns the kernels of an operation in order of preference.
Trees list kernels of all operations (`problem.OPERATIONS`) together.
"""

from __future__ import annotations

import importlib

from .kernel import Kernel
from .problem import Device

# Compute capability (major, minor or None for any) -> tree. The first match wins.
TREES = (
    ((8, None), "sm80"),
    ((9, None), "sm90"),
    ((10, None), "sm100"),
    ((11, None), "sm100"),
    ((12, None), "sm80"),
)


def tree_of(capability: tuple[int, int]) -> str | None:
    """Name of the tree that serves a compute capability, or None."""
    for (major, minor), tree in TREES:
        if capability[0] == major and minor in (None, capability[1]):
            return tree
    return None


def load(device: Device, operation: str = "forward") -> tuple[Kernel, ...]:
    """Kernels of an operation that may serve `device`, in order of preference."""
    return tuple(kernel for kernel in kernels_of(device) if kernel.operation == operation)


def kernels_of(device: Device) -> tuple[Kernel, ...]:
    """Kernels of all operations that may serve `device`."""
    tree = tree_of(device.capability)
    return () if tree is None else importlib.import_module(f".{tree}", __name__).KERNELS

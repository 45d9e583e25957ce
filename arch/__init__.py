"""One kernel tree per GPU architecture.

Nothing here imports torch, and nothing is loaded until a device asks for it: `load(capability)`
imports the tree that serves a compute capability and returns its kernels in order of preference.
"""

from __future__ import annotations

import importlib

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


def load(device: Device) -> tuple[type, ...]:
    """Kernel classes that may serve `device`, in order of preference."""
    tree = tree_of(device.capability)
    return () if tree is None else importlib.import_module(f".{tree}", __name__).KERNELS

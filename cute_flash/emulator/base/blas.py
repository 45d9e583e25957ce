"""numpy's matrix products on one thread.

The emulator's products are many and small. OpenBLAS hands each to threads that spin while they wait for one
another; where other processes want the cores too, a product of 1 ms was measured to take 300 ms.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, numpy's OpenBLAS computes on the calling thread; nothing changes with another library."""
    controls = _controls()
    before = [get() for get, _ in controls]
    for _, set_ in controls:
        set_(1)
    try:
        yield
    finally:
        for (_, set_), count in zip(controls, before, strict=True):
            set_(count)


@functools.cache
def _controls() -> tuple[tuple[Callable, Callable], ...]:
    """(get, set) of the number of threads, of every OpenBLAS that the process has loaded."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "openblas" in line}
    found = []
    for library in (ctypes.CDLL(path) for path in sorted(paths)):
        for name in NAMES:
            if hasattr(library, name.format("set")):
                found.append((library[name.format("get")], library[name.format("set")]))
                break
    return tuple(found)

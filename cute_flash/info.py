"""`python -m cute_flash info`, what a report of a fault needs, and `cache`, what is kept on disk."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, arch, cache, cuda_devices, dispatch

PACKAGES = (
    "torch", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi", "cuda-bindings", "cuda-pathfinder", "numpy", "transformers",
)


def info() -> str:
    """Versions, devices, emulation, cache and bundle, in lines of "name: value"."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        lines = [*_versions(), *_devices(), f"emulation: {_emulation()}", cache_line(), _bundle()]
    named = {name: value for name, value in os.environ.items() if name.startswith("CUTE_FLASH_")}
    lines += [f"{name}={value}" for name, value in sorted(named.items())]
    return "\n".join([*lines, *(f"warning: {warning.message}" for warning in found)])


def cache_line() -> str:
    """Where the cache is, what it holds, and what of that is the installed compiler's."""
    root = cache.cache_directory()
    if root is None:
        return "cache: none"
    own = cache.kernels_in(root / cache.compiler_tag())
    total = [path for folder in cache.folders_of(root) for path in cache.kernels_in(folder)]
    fault = cache.refusal_of(root) or cache.refusal_of(root / cache.compiler_tag())
    text = f"cache: {root}, {_size(total)}, of which {cache.compiler_tag()}: {_size(own)}"
    return f"{text}; not used: {fault}" if fault else text


def clear() -> str:
    """Empty the cache; what was removed."""
    root = cache.cache_directory()
    if root is None:
        return "cache: none"
    kernels = [path for folder in cache.folders_of(root) for path in cache.kernels_in(folder)]
    said = f"removed from {root}: {_size(kernels)}"
    cache.clear(root)
    return said


def _versions() -> Iterator[str]:
    yield f"cute_flash: {__version__}, {Path(__file__).parent}"
    yield f"kernel sources: {cache.sources_digest()[:16]}"
    yield f"python: {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        yield f"{name}: {version}"
    yield f"torch's CUDA: {torch.version.cuda or 'none'}"


def _devices() -> Iterator[str]:
    try:
        yield "driver: CUDA {}.{}".format(*cuda_devices.driver_version())
        found = cuda_devices.gpus()
    except RuntimeError as error:
        yield f"devices: none ({error})"
        return
    for index, gpu in enumerate(found):
        tree = arch.tree_of(gpu.capability) or "none"
        major, minor = gpu.capability
        yield (
            f"device {index}: {gpu.name}, compute capability {major}.{minor}, {gpu.multiprocessors} "
            f"multiprocessors, {gpu.shared_memory} bytes of shared memory a block; kernels: {tree}"
        )


def _emulation() -> str:
    try:
        active = dispatch.emulation()
    except ValueError as error:
        return str(error)
    return active.name if active else "none"


def _bundle() -> str:
    folder = cache.bundle_directory()
    if folder is None:
        return "bundle: none"
    kernels = cache.kernels_in(folder)
    fault = cache.refusal_of(folder) or (None if kernels else "no kernels there")
    text = f"bundle: {folder}, {_size(kernels)}, {_of_these_sources(kernels)} of these sources"
    return f"{text}; not used: {fault}" if fault else text


def _of_these_sources(kernels: list[Path]) -> int:
    """How many of the files are of the sources that are installed here."""
    from .executable import sources_of

    loaded = {kernel for device in dispatch.EMULATED.values() for kernel in arch.kernels_of(device)}
    begin = tuple(cache.beginning_of(kernel.name, sources_of(kernel)) for kernel in loaded)
    return sum(path.name.startswith(begin) for path in kernels)


def _size(kernels: list[Path]) -> str:
    size = sum(path.stat().st_size for path in kernels)
    return f"{len(kernels)} kernel{'s' * (len(kernels) != 1)} of {size / 2**20:.1f} MiB"

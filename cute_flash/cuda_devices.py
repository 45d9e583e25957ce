"""The CUDA driver and its devices, as `cuda.bindings` tells of them; importing this needs neither.

The driver's functions are asked, not the runtime's: the runtime in cuda-bindings 13 serves no driver of CUDA
12, on which torch for CUDA 12 may well run. Only names of errors are taken from it, for which it asks nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """A CUDA device. shared_memory: bytes that a block can ask for. clock: the fastest of its cores, Hz."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    clock: int


def checked(answer: tuple) -> Any:
    """The value of a call of `cuda.bindings.driver`; RuntimeError that names the error where it failed."""
    code, *values = answer
    if code.value:
        raise RuntimeError(f"CUDA driver error {code.value} ({code.name})")
    return values[0] if values else None


def runtime_error(code: int) -> str:
    """An error of the CUDA runtime as a sentence."""
    from cuda.bindings import runtime

    try:
        error = runtime.cudaError_t(code)
    except ValueError:
        return f"CUDA error {code}, which is newer than the cuda-bindings that are installed"
    return f"CUDA error {code} ({error.name}): {runtime.cudaGetErrorString(error)[1].decode()}"


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver serves; RuntimeError where there is no driver."""
    from cuda.bindings import driver

    version = checked(driver.cuDriverGetVersion())
    return version // 1000, version % 1000 // 10


def count() -> int:
    """How many devices this process sees; RuntimeError, with the reason, where there is none."""
    from cuda.bindings import driver

    checked(driver.cuInit(0))
    return checked(driver.cuDeviceGetCount())


def gpus() -> list[Gpu]:
    """Every device that this process sees; RuntimeError, with the reason, where there is none."""
    from cuda.bindings import driver

    attributes = driver.CUdevice_attribute

    def of(index: int) -> Gpu:
        device = checked(driver.cuDeviceGet(index))
        major, minor, multiprocessors, shared_memory, kilohertz = (
            checked(driver.cuDeviceGetAttribute(attribute, device))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                attributes.CU_DEVICE_ATTRIBUTE_CLOCK_RATE,
            )
        )
        name = checked(driver.cuDeviceGetName(256, device)).rstrip(b"\0").decode()
        return Gpu(name, (major, minor), multiprocessors, shared_memory, 1000 * kilohertz)

    return [of(index) for index in range(count())]

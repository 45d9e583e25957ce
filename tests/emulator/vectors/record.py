"""Writes hardware.npz: what a GPU computes for the cases, through the CUDA driver alone.

    python -m tests.emulator.vectors.record

Needs an NVIDIA GPU of compute capability 8.0 or more and its driver; no toolkit.
"""

from __future__ import annotations

from ctypes import c_void_p
from pathlib import Path

import numpy as np
from cuda.bindings import driver

from cute_flash.cuda_devices import checked

from ..evaluate import prepare
from .cases import CASES, Case

FILE = Path(__file__).with_name("hardware.npz")


class Gpu:
    """The first device, its context current."""

    def __init__(self) -> None:
        checked(driver.cuInit(0))
        self.device = checked(driver.cuDeviceGet(0))
        checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(self.device))))

    def capability(self) -> str:
        attributes = driver.CUdevice_attribute
        major, minor = (
            checked(driver.cuDeviceGetAttribute(attribute, self.device))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"sm_{major}{minor}"

    def can_run(self, case: Case) -> bool:
        """Whether the device has the case's target; sm_90a runs nowhere else."""
        mine, wanted = int(self.capability()[3:]), int(case.target[3:].rstrip("a"))
        return mine == wanted if case.target.endswith("a") else mine >= wanted

    def run(self, case: Case) -> list[np.ndarray]:
        """The results of a case, one array per output."""
        call = prepare(case.code, case.inputs, case.outputs, case.target, case.block)
        module = checked(driver.cuModuleLoadData(call.text.encode() + b"\0"))
        function = checked(driver.cuModuleGetFunction(module, b"k"))
        pointers = []
        for array in call.arrays:
            pointers.append(checked(driver.cuMemAlloc(array.nbytes)))
            checked(driver.cuMemcpyHtoD(pointers[-1], array.ctypes.data, array.nbytes))
        arguments = tuple(map(int, pointers)), (c_void_p,) * len(pointers)
        sizes = (call.grid, 1, 1, case.block, 1, 1, 0)
        checked(driver.cuLaunchKernel(function, *sizes, 0, arguments, 0))
        checked(driver.cuCtxSynchronize())
        for array, pointer in zip(call.arrays, pointers, strict=True):
            checked(driver.cuMemcpyDtoH(array.ctypes.data, pointer, array.nbytes))
            checked(driver.cuMemFree(pointer))
        checked(driver.cuModuleUnload(module))
        return [array[: len(case.inputs[0])] for array in call.arrays[len(case.inputs) :]]


def main() -> None:
    gpu = Gpu()
    arrays = {"device": np.array(gpu.capability())}
    for name, case in CASES.items():
        if not gpu.can_run(case):
            print(f"{name}: not on {gpu.capability()}")
            continue
        arrays |= {f"{name}:{k}": array for k, array in enumerate(gpu.run(case))}
        print(name)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()

"""Writes hardware.npz: what a GPU computes for the cases, through the CUDA driver alone.

    python -m tests.emulator.vectors.record

Needs an NVIDIA GPU of compute capability 8.0 or more, its driver, and numpy; no toolkit and no torch.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from ..evaluate import prepare
from .cases import CASES, Case

FILE = Path(__file__).with_name("hardware.npz")


class Driver:
    """The few functions of libcuda that a launch needs."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.context = c_void_p()
        self("cuInit", c_uint(0))
        self("cuDevicePrimaryCtxRetain", byref(self.context), c_int(0))
        self("cuCtxSetCurrent", self.context)

    def __call__(self, name: str, *args) -> None:
        code = getattr(self.cuda, name)(*args)
        if code:
            text = c_char_p()
            self.cuda.cuGetErrorString(c_int(code), byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({code})")

    def capability(self) -> str:
        major, minor = c_int(), c_int()
        self("cuDeviceGetAttribute", byref(major), c_int(75), c_int(0))
        self("cuDeviceGetAttribute", byref(minor), c_int(76), c_int(0))
        return f"sm_{major.value}{minor.value}"

    def can_run(self, case: Case) -> bool:
        """Whether the device has the case's target; sm_90a runs nowhere else."""
        mine, wanted = int(self.capability()[3:]), int(case.target[3:].rstrip("a"))
        return mine == wanted if case.target.endswith("a") else mine >= wanted

    def run(self, case: Case) -> list[np.ndarray]:
        """The results of a case, one array per output."""
        call = prepare(case.code, case.inputs, case.outputs, case.target, case.block)
        module, function = c_void_p(), c_void_p()
        self("cuModuleLoadData", byref(module), c_char_p(call.text.encode()))
        self("cuModuleGetFunction", byref(function), module, c_char_p(b"k"))
        pointers = []
        for array in call.arrays:
            pointers.append(c_uint64())
            self("cuMemAlloc_v2", byref(pointers[-1]), c_size_t(array.nbytes))
            self("cuMemcpyHtoD_v2", pointers[-1], array.ctypes.data_as(c_void_p), c_size_t(array.nbytes))
        args = (c_void_p * len(pointers))(*(ctypes.addressof(p) for p in pointers))
        size = [c_uint(n) for n in (call.grid, 1, 1, case.block, 1, 1)]
        self("cuLaunchKernel", function, *size, c_uint(0), c_void_p(), args, c_void_p())
        self("cuCtxSynchronize")
        for array, pointer in zip(call.arrays, pointers, strict=True):
            self("cuMemcpyDtoH_v2", array.ctypes.data_as(c_void_p), pointer, c_size_t(array.nbytes))
            self("cuMemFree_v2", pointer)
        self("cuModuleUnload", module)
        return [array[: len(case.inputs[0])] for array in call.arrays[len(case.inputs) :]]


def main() -> None:
    driver = Driver()
    arrays = {"device": np.array(driver.capability())}
    for name, case in CASES.items():
        if not driver.can_run(case):
            print(f"{name}: not on {driver.capability()}")
            continue
        arrays |= {f"{name}:{k}": array for k, array in enumerate(driver.run(case))}
        print(name)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()

"""Recording on a GPU, tried without one: the driver is the emulator, behind cuda.bindings' own interface."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda.bindings import driver

from cute_flash import emulator
from profiling import vectors
from profiling.stages import vectors as stage
from profiling.worker import Settings

from .evaluate import aligned
from .vectors import derive, record
from .vectors.cases import CASES

SUCCESS = driver.CUresult.CUDA_SUCCESS


class EmulatedDriver:
    """The functions of `cuda.bindings.driver` that recording calls. Memory is numpy's, and never freed."""

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self.capability = capability
        self.memory = emulator.GlobalMemory()
        self.kept: list[np.ndarray] = []
        self.unloaded: list[int] = []

    def install(self, monkeypatch) -> None:
        for name in [name for name in dir(self) if name.startswith("cu")]:
            monkeypatch.setattr(driver, name, getattr(self, name))

    def cuInit(self, flags):
        return (SUCCESS,)

    def cuDeviceGet(self, index):
        return SUCCESS, driver.CUdevice(index)

    def cuDevicePrimaryCtxRetain(self, device):
        return SUCCESS, driver.CUcontext(1)

    def cuCtxSetCurrent(self, context):
        return (SUCCESS,)

    def cuCtxSynchronize(self):
        return (SUCCESS,)

    def cuDeviceGetAttribute(self, attribute, device):
        return SUCCESS, self.capability["MINOR" in attribute.name]

    def cuModuleLoadData(self, image):
        assert image.endswith(b"\0")
        self.program = emulator.Program(image[:-1].decode())
        return SUCCESS, driver.CUmodule(1)

    def cuModuleGetFunction(self, module, name):
        self.entry = name.decode()
        return SUCCESS, driver.CUfunction(1)

    def cuModuleUnload(self, module):
        self.unloaded.append(int(module))
        return (SUCCESS,)

    def cuMemAlloc(self, size):
        self.kept.append(aligned(np.zeros(size, np.uint8), 256))
        self.memory.add(self.kept[-1].ctypes.data, size, "")
        return SUCCESS, driver.CUdeviceptr(self.kept[-1].ctypes.data)

    def cuMemFree(self, pointer):
        return (SUCCESS,)

    def cuMemcpyHtoD(self, target, source, size):
        ctypes.memmove(int(target), source, size)
        return (SUCCESS,)

    def cuMemcpyDtoH(self, target, source, size):
        ctypes.memmove(target, int(source), size)
        return (SUCCESS,)

    def cuLaunchKernel(self, *given):
        _, *sizes, shared, stream, (values, types), extra = given
        assert types == (ctypes.c_void_p,) * len(values) and (stream, extra) == (0, 0)
        params = struct.pack(f"<{len(values)}Q", *values)
        grid, block = tuple(sizes[:3]), tuple(sizes[3:])
        launch = emulator.Launch(self.entry, grid, block, shared_memory=shared, params=params)
        emulator.run(self.program, launch, self.memory, emulator.Options())
        return (SUCCESS,)


def case_for(target: str) -> str:
    """The first case that a GPU of this target runs."""
    return next(name for name, case in CASES.items() if case.target == target)


def test_what_is_recorded_is_what_the_driver_gives(monkeypatch):
    made = EmulatedDriver()
    made.install(monkeypatch)
    gpu, name = record.Gpu(), case_for("sm_80")
    assert gpu.capability() == "sm_80" and gpu.can_run(CASES[name])
    assert not gpu.can_run(CASES[case_for("sm_90a")])
    found, expected = gpu.run(CASES[name]), list(derive.results(name))
    assert len(found) == len(expected) and all(map(np.array_equal, found, expected))
    assert made.unloaded == [1]


def test_the_report_s_stage_records_the_same(monkeypatch, tmp_path):
    EmulatedDriver().install(monkeypatch)
    name = case_for("sm_80")
    row = stage.exact(name, Settings(machine="cuda", dry_run=False, out=str(tmp_path)))
    assert row["different"] == 0 and "state" not in row
    stored, (expected, *_) = np.load(tmp_path / "hardware.npz"), derive.results(name)
    assert stored["device"] == "sm_80" and np.array_equal(stored[f"{name}:0"], expected)


def test_an_error_of_the_driver_is_named(monkeypatch):
    made = EmulatedDriver()
    made.cuModuleLoadData = lambda image: (driver.CUresult.CUDA_ERROR_INVALID_PTX, None)
    made.install(monkeypatch)
    with pytest.raises(RuntimeError, match=r"CUDA driver error 218 \(CUDA_ERROR_INVALID_PTX\)"):
        record.Gpu().run(CASES[case_for("sm_80")])


def test_single_instructions_are_launched_on_torch_s_memory(monkeypatch):
    made, instruction = EmulatedDriver(), next(iter(vectors.INSTRUCTIONS.values()))
    made.install(monkeypatch)

    def cuda(tensor):
        made.memory.add(tensor.data_ptr(), tensor.nbytes, "")
        return tensor

    zeros = torch.zeros
    monkeypatch.setattr(torch.Tensor, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: cuda(zeros(*shape, dtype=dtype)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    given = vectors.inputs(instruction, "any")
    assert np.array_equal(vectors.on_gpu(instruction, given), vectors.on_emulator(instruction, given))
    assert made.unloaded == [1]

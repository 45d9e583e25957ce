"""A compiled kernel on the emulator: its own host code, on host memory that says it is a GPU's."""

from __future__ import annotations

from typing import Any

import torch

from . import emulator, objectfile
from .arch.problem import Device
from .cache import Artifact
from .dispatch import emulation
from .emulator.execution.launch import Driver, View


class EmulatedKernel:
    """Called with the kernel's operands, CPU tensors. The emulator's options are those active at the call."""

    def __init__(self, artifact: Artifact, device: Device) -> None:
        from tvm_ffi import from_dlpack

        self._from_dlpack = from_dlpack
        operands = artifact.description["operands"]
        self._names = [operand["name"] for operand in operands]
        self._written = [any(member["written"] for member in operand["members"]) for operand in operands]
        program = emulator.Program(artifact.ptx.decode())
        self._driver = Driver(program, device.shared_memory)
        self._function = objectfile.load(
            artifact.object, artifact.description["function"], self._driver.symbols
        )

    def __call__(self, *operands: Any) -> None:
        active = emulation()
        if active is None:
            raise RuntimeError("no emulated device is active")
        # A row that a kernel forgets to write must not pass for a right one.
        for operand, written in zip(operands, self._written, strict=True):
            if written and operand is not None:
                operand.fill_(torch.nan if operand.is_floating_point() else -1)
        views: list[View] = []
        args = tuple(
            self._argument(operand, name, views)
            for name, operand in zip(self._names, operands, strict=True)
        )
        reports = self._driver.call(self._function, views, args, emulator.Options(**active.options))
        active.reports.extend(reports)

    def _argument(self, operand: Any, name: str, views: list[View]) -> Any:
        """An operand as host code takes it; tensors are noted in `views`."""
        if isinstance(operand, tuple):
            return tuple(self._argument(o, f"{name}[{i}]", views) for i, o in enumerate(operand))
        if not isinstance(operand, torch.Tensor):
            return operand
        views.append(View(operand, name))
        return self._from_dlpack(views[-1])

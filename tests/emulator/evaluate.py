"""Runs a few PTX instructions on arrays: one thread per element."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from cute_flash import emulator

BLOCK = 64
_INPUTS, _OUTPUTS = "abcdefghjklm", "xyzuvw"


class Call(NamedTuple):
    """PTX text of an entry k with its arrays: parameter i is the address of arrays[i], the last ones are
    results.
    """

    text: str
    arrays: list[np.ndarray]
    grid: int


def module(body: str, params: str = "", target: str = "sm_80", variables: str = "") -> str:
    """PTX text of one entry named k around a body."""
    return (
        f".version 8.8\n.target {target}\n.address_size 64\n{variables}\n"
        f".visible .entry k({params})\n{{\n{body}\n\tret;\n}}\n"
    )


def prepare(
    code: str, inputs: tuple[np.ndarray, ...], outputs: tuple, target: str = "sm_80", block: int = BLOCK
) -> Call:
    """A kernel that runs `code` once per element of the inputs, in blocks of `block`; see evaluate."""
    padded = -(-len(inputs[0]) // block) * block
    arrays = [np.resize(np.ascontiguousarray(v), padded).copy() for v in inputs]
    results = [np.zeros(padded, np.uint8 if dtype is bool else dtype) for dtype in outputs]
    lines = [".reg .b32 %i<2>;", ".reg .b64 %address;", ".reg .b16 %byte;"]
    lines += ["mov.u32 %i0, %ctaid.x;", "mov.u32 %i1, %tid.x;", f"mad.lo.s32 %i0, %i0, {block}, %i1;"]
    for k, array in enumerate(arrays):
        name, dtype = _INPUTS[k], array.dtype
        lines += [*_declare(name, dtype), *_address(k, array.itemsize), *_load(name, dtype)]
    lines += [line for k, dtype in enumerate(outputs) for line in _declare(_OUTPUTS[k], np.dtype(dtype))]
    lines += [code]
    for k, (array, dtype) in enumerate(zip(results, outputs, strict=True)):
        lines += [*_address(len(arrays) + k, array.itemsize), *_store(_OUTPUTS[k], np.dtype(dtype))]
    held = [*arrays, *results]
    params = ", ".join(f".param .u64 p{k}" for k in range(len(held)))
    return Call(module("\n".join(lines), params, target), held, padded // block)


def evaluate(
    code: str, *inputs: np.ndarray, outputs: tuple, target: str = "sm_80", block: int = BLOCK, **options
) -> tuple[np.ndarray, ...]:
    """Run `code` once per element; options: the emulator's.

    inputs are its registers %a, %b, … (bool ones are predicates), all of one length; outputs are the numpy
    dtypes of its results %x, %y, …. Other registers it needs it declares itself. Returns the results as
    arrays.
    """
    call = prepare(code, inputs, outputs, target, block)
    launch(call.text, call.arrays, grid=call.grid, block=block, **options)
    results = (array[: len(inputs[0])] for array in call.arrays[len(inputs) :])
    return tuple(r.astype(bool) if dtype is bool else r for r, dtype in zip(results, outputs, strict=True))


def launch(
    text: str,
    arrays: list[np.ndarray],
    grid: int = 1,
    block: int = 32,
    shared: int = 0,
    scalars: bytes = b"",
    **options,
) -> emulator.Report:
    """Run entry k of `text`, whose parameters are the arrays' addresses and then `scalars`."""
    memory = emulator.GlobalMemory()
    for k, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, f"p{k}")
    block_bytes = struct.pack(f"<{len(arrays)}Q", *(a.ctypes.data for a in arrays)) + scalars
    one = emulator.Launch("k", (grid, 1, 1), (block, 1, 1), shared_memory=shared, params=block_bytes)
    return emulator.run(emulator.Program(text), one, memory, emulator.Options(**options))


def aligned(array: np.ndarray, boundary: int = 64) -> np.ndarray:
    """A copy of a flat array that starts at a multiple of `boundary` bytes."""
    raw = np.zeros(array.nbytes + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    copy = raw[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def _register(dtype: np.dtype) -> str:
    return "pred" if dtype.kind == "b" else f"b{max(8 * dtype.itemsize, 16)}"


def _declare(name: str, dtype: np.dtype) -> list[str]:
    return [f".reg .{_register(dtype)} %{name};"]


def _address(k: int, size: int) -> list[str]:
    return [f"ld.param.u64 %address, [p{k}];", f"mad.wide.u32 %address, %i0, {size}, %address;"]


def _load(name: str, dtype: np.dtype) -> list[str]:
    if dtype.kind == "b":
        return ["ld.global.u8 %byte, [%address];", f"setp.ne.u16 %{name}, %byte, 0;"]
    kind = f"{'s' if dtype.kind == 'i' else 'u'}8" if dtype.itemsize == 1 else f"b{8 * dtype.itemsize}"
    return [f"ld.global.{kind} %{name}, [%address];"]


def _store(name: str, dtype: np.dtype) -> list[str]:
    if dtype.kind == "b":
        return [f"selp.u16 %byte, 1, 0, %{name};", "st.global.u8 [%address], %byte;"]
    return [f"st.global.b{8 * dtype.itemsize} [%address], %{name};"]

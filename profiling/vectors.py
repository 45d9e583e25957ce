"""What single instructions give on the hardware, as small files that the emulator can be held to.

Each instruction is one line of PTX in a kernel that loads its operands and stores its results, one 32-bit
word per lane and register. On a GPU the driver compiles that text; elsewhere the emulator runs the same text.

    NAME.npz    per instruction and domain of inputs: "<instruction>|<domain>|in", uint32 (lanes, inputs), and
                "...|out", uint32 (lanes, outputs); lanes in warps of 32
"""

from __future__ import annotations

import ctypes
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARP = 32
WARPS = 8
DOMAINS = ("normal", "any")


@dataclass(frozen=True)
class Instruction:
    """One line of PTX, from a0, a1, … to d0, …. takes, gives: what a word holds, f32, s32, f16x2 or bf16x2.

    A product's accumulators are f32.
    """

    name: str
    text: str
    inputs: int
    outputs: int
    takes: str
    gives: str


def _mma(dtype: str) -> Instruction:
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    text = f"{name} {{d0,d1,d2,d3}}, {{a0,a1,a2,a3}}, {{a4,a5}}, {{a6,a7,a8,a9}};"
    return Instruction(name, text, 10, 4, f"{dtype}x2", "f32")


def _unary(name: str, takes: str = "f32") -> Instruction:
    return Instruction(name, f"{name} d0, a0;", 1, 1, takes, "f32")


INSTRUCTIONS = {
    instruction.name: instruction
    for instruction in (
        _mma("f16"),
        _mma("bf16"),
        Instruction("cvt.rn.f16x2.f32", "cvt.rn.f16x2.f32 d0, a0, a1;", 2, 1, "f32", "f16x2"),
        Instruction("cvt.rn.bf16x2.f32", "cvt.rn.bf16x2.f32 d0, a0, a1;", 2, 1, "f32", "bf16x2"),
        _unary("cvt.rn.f32.s32", "s32"),
        _unary("ex2.approx.ftz.f32"),
        _unary("lg2.approx.ftz.f32"),
        _unary("rcp.approx.ftz.f32"),
        Instruction("div.rn.f32", "div.rn.f32 d0, a0, a1;", 2, 1, "f32", "f32"),
    )
}
# The accumulators of a product are float32, whatever its factors are.
ACCUMULATORS = {f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32": slice(6, 10) for t in ("f16", "bf16")}


def ptx(instruction: Instruction) -> str:
    """The kernel `one(source, target)`: 32 threads per block, each with its own words."""
    text = instruction.text
    for letter in "ad":
        text = _operands(text, letter)
    loads = [f"ld.global.b32 %a{i}, [%p2+{4 * i}];" for i in range(instruction.inputs)]
    stores = [f"st.global.b32 [%p3+{4 * i}], %d{i};" for i in range(instruction.outputs)]
    return "\n".join([
        ".version 8.0", ".target sm_80", ".address_size 64",
        ".visible .entry one(.param .u64 source, .param .u64 target)", "{",
        f".reg .b32 %a<{instruction.inputs}>;", f".reg .b32 %d<{instruction.outputs}>;",
        ".reg .b32 %t<3>;", ".reg .b64 %p<6>;",
        "ld.param.u64 %p0, [source];", "ld.param.u64 %p1, [target];",
        "mov.u32 %t0, %tid.x;", "mov.u32 %t1, %ctaid.x;", f"mad.lo.s32 %t2, %t1, {WARP}, %t0;",
        f"mul.wide.u32 %p4, %t2, {4 * instruction.inputs};", "add.s64 %p2, %p0, %p4;",
        f"mul.wide.u32 %p5, %t2, {4 * instruction.outputs};", "add.s64 %p3, %p1, %p5;",
        *loads, text, *stores, "ret;", "}", "",
    ])


def _operands(text: str, letter: str) -> str:
    """Write d0 as %d0, where it stands as an operand."""
    head, space, operands = text.partition(" ")
    for digit in range(10):
        for before in ("{", ",", " "):
            operands = f" {operands}".replace(f"{before}{letter}{digit}", f"{before}%{letter}{digit}")[1:]
    return head + space + operands


def inputs(instruction: Instruction, domain: str) -> np.ndarray:
    """uint32 (lanes, inputs), always the same. "normal": random normal numbers; "any": random bits, but for a
    product, whose factors and accumulators are finite and of many magnitudes."""
    random = np.random.default_rng([ord(c) for c in instruction.name + domain])
    shape = (WARP * WARPS, instruction.inputs)
    if domain == "any" and instruction.name not in ACCUMULATORS:
        return random.integers(0, 2**32, shape, dtype=np.uint32)
    if instruction.takes == "s32":
        return random.integers(-(2**12), 2**12, shape).astype(np.int32).view(np.uint32)
    spread = random.uniform(-6, 6, (*shape, 2)) if domain == "any" else np.zeros((*shape, 2))
    values = (random.standard_normal((*shape, 2)) * np.exp2(spread)).astype(np.float32)
    if instruction.takes == "f32":
        return values[..., 0].copy().view(np.uint32)
    words = _packed(values, instruction.takes)
    accumulators = ACCUMULATORS[instruction.name]
    words[:, accumulators] = values[:, accumulators, 0].view(np.uint32)
    return words


def _packed(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 (..., 2) as words of two 16-bit floats, the first in the low half."""
    if kind == "f16x2":
        halves = values.astype(np.float16).view(np.uint16)
    else:
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    return (halves[..., 0] | halves[..., 1].astype(np.uint32) << 16).astype(np.uint32)


def on_emulator(instruction: Instruction, given: np.ndarray) -> np.ndarray:
    """uint32 (lanes, outputs)."""
    from cute_flash import emulator

    given = np.ascontiguousarray(given)
    found = np.zeros((len(given), instruction.outputs), np.uint32)
    memory = emulator.GlobalMemory()
    for name, array in (("source", given), ("target", found)):
        memory.add(array.ctypes.data, array.nbytes, name)
    params = struct.pack("<QQ", given.ctypes.data, found.ctypes.data)
    launch = emulator.Launch("one", (len(given) // WARP, 1, 1), (WARP, 1, 1), params=params)
    emulator.run(emulator.Program(ptx(instruction)), launch, memory, emulator.Options())
    return found


def on_gpu(instruction: Instruction, given: np.ndarray) -> np.ndarray:
    """uint32 (lanes, outputs), on the GPU that torch uses; its driver compiles the PTX."""
    import torch
    from cuda.bindings import driver

    from cute_flash.cuda_devices import checked

    source = torch.from_numpy(given.view(np.int32)).cuda()
    target = torch.zeros((len(given), instruction.outputs), dtype=torch.int32, device="cuda")
    module = checked(driver.cuModuleLoadData(ptx(instruction).encode() + b"\0"))
    try:
        function = checked(driver.cuModuleGetFunction(module, b"one"))
        arguments = (source.data_ptr(), target.data_ptr()), (ctypes.c_void_p, ctypes.c_void_p)
        sizes = (len(given) // WARP, 1, 1, WARP, 1, 1, 0)
        stream = torch.cuda.current_stream().cuda_stream
        checked(driver.cuLaunchKernel(function, *sizes, stream, arguments, 0))
        torch.cuda.synchronize()
    finally:
        driver.cuModuleUnload(module)
    return target.cpu().numpy().view(np.uint32)


def distance(instruction: Instruction, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Units in the last place between results, one per float; two NaNs are 0 apart."""
    if instruction.gives == "f32":
        words = [x.reshape(-1).view(np.int32).astype(np.int64) for x in (a, b)]
        sign, exponent = 0x7FFFFFFF, 0x7F800000
    else:
        words = [x.reshape(-1).view(np.int16).astype(np.int64) for x in (a, b)]
        sign, exponent = 0x7FFF, 0x7C00 if instruction.gives == "f16x2" else 0x7F80
    nan = [(w & sign) > exponent for w in words]
    ordered = [np.where(w < 0, -(w & sign), w) for w in words]
    return np.where(nan[0] & nan[1], 0, np.abs(ordered[0] - ordered[1]))


def add_to_file(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Add arrays to an .npz file, which is replaced whole."""
    kept: dict[str, np.ndarray] = {}
    if path.exists():
        with np.load(path) as file:
            kept = dict(file)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **(kept | arrays))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)

"""Kernels to be timed: machine code, launch, and what their warps do for so many tiles.

    kernel = peer(Wanted((128, 128), causal=True, group=8), "sm90")
    kernel.record(tiles=16)         one CTA (or cluster) over 16 KV tiles, on the emulator
    kernel.record(16, works=2)      of a persistent one: over two tiles of rows after each other
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

import cute_flash
from cute_flash import emulator, executable, objectfile
from cute_flash.arch.problem import Operands
from cute_flash.dispatch import EMULATED, Answer
from cute_flash.emulator.execution.launch import Driver
from tests.peers import cudnn_frontend_forward

from .. import cudnn_frontend, flash_attn_4, rates, sass
from ..static import threads_of
from . import decode
from .trace import Recorder

LONGEST = 1024  # keys of which a sample of cuDNN front end's sees the first ones
MANY = 256  # tiles of rows, more than a GPU has SMs


@dataclass(frozen=True)
class Wanted:
    """What a kernel is asked to compute. group: query heads of a KV head."""

    dims: tuple[int, int]
    causal: bool = False
    group: int = 1
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Subject:
    """A kernel. rows: of packed queries that a cluster of CTAs takes; packed: heads that share such rows;
    keys: of a KV tile. ctas: that an SM holds. persistent: a CTA takes one tile of rows after the other.
    causal: tiles of rows see different numbers of keys; those that see most are begun first. backward: a CTA
    keeps its keys and walks tiles of rows.
    """

    name: str
    cubin: bytes
    rows: int
    packed: int
    keys: int
    cluster: int
    threads: int
    ctas: int
    persistent: bool
    causal: bool
    run: Callable[[int, int, Recorder], None]
    backward: bool = False

    @cached_property
    def lines(self) -> list[decode.Line]:
        return decode.decode(self.cubin)

    def record(self, tiles: int, works: int = 1) -> Recorder:
        """What the warps of one cluster do. Raises an EmulatorError where the emulator does not run it."""
        recorder = Recorder()
        self.run(tiles, works, recorder)
        return recorder


@functools.cache
def peer(wanted: Wanted, arch: str) -> Subject:
    """flash-attn-4's kernel. Raises flash_attn_4.Missing."""
    target = EMULATED[arch].target
    dim, dim_v = wanted.dims
    case = flash_attn_4.Case(
        "timing", (1024,), (1024,), heads=wanted.group, heads_kv=1, dim=dim, causal=wanted.causal,
        dim_v=None if dim_v == dim else dim_v, dtype=wanted.dtype,
    )  # fmt: skip
    found = flash_attn_4.compiled(case, target)
    rows, keys = found.kernel.tile
    grid = functools.partial(_grid, found.kernel)
    few, many = grid(rows // wanted.group, wanted.group), grid(rows, wanted.group)
    packed, cluster = (wanted.group, few) if few < many else (1, many // wanted.group)
    program = emulator.Program(flash_attn_4.defined(found.kernel.ptx))
    driver = Driver(program, flash_attn_4.LARGEST_SHARED_MEMORY)
    persistent = grid(rows * MANY, wanted.group) < MANY * wanted.group * cluster // packed

    def run(tiles: int, works: int, recorder: Recorder) -> None:
        sized = _sized(found.kernel.case, rows // packed, tiles * keys, wanted.group * works)
        operands = flash_attn_4.tensors(sized)
        # It reads rows of Q's tile that it never filled, and drops the results.
        options = emulator.Options(observers=(recorder,), uninitialized="poison", permissive=True)
        symbols = driver.symbols | smaller_launch(driver, cluster) if persistent else driver.symbols
        flash_attn_4.call(found.kernel, driver, symbols, operands, options)

    return Subject(
        f"{flash_attn_4.NAME} {flash_attn_4.version()}", found.cubin, rows, packed, keys, cluster,
        found.shape.threads, occupancy(arch, found.cubin, found.shape.threads, found.shape.shared_memory),
        persistent, wanted.causal, run,
    )  # fmt: skip


@functools.cache
def cudnn(wanted: Wanted, arch: str) -> Subject:
    """cuDNN front end's kernel for sm_80. A CTA works on one query head, shared keys or not.

    Raises flash_attn_4.Missing.
    """
    if arch != "sm80" or wanted.dims != (128, 128):
        raise flash_attn_4.Missing(f"{cudnn_frontend.NAME} has none for {wanted.dims} on {arch}")
    case = cudnn_frontend_forward.Case(
        f"timing_{wanted.causal}_{wanted.dtype}", (128,), (LONGEST,), heads=1, heads_kv=1, dim=128,
        causal=wanted.causal, dtype=wanted.dtype,
    )  # fmt: skip
    (kernel,) = cudnn_frontend.call_of(case, cudnn_frontend_forward).launches
    keys = kernel.tile[1]
    return of_cudnn(kernel, flash_attn_4.tensors(case), wanted, lambda tiles: {0: tiles, 3: tiles * keys})


def of_cudnn(
    kernel: flash_attn_4.Kernel, operands: dict[str, torch.Tensor], wanted: Wanted,
    numbers: Callable[[int], dict[int, int]], backward: bool = False,
) -> Subject:
    """A launch of cuDNN front end's. numbers: what its host code is told instead, for so many tiles."""
    cubin = sass.embedded_cubin(kernel.object_file.read_bytes())
    shape = flash_attn_4.launch_shape(kernel, operands)
    driver = Driver(emulator.Program(flash_attn_4.defined(kernel.ptx)), flash_attn_4.LARGEST_SHARED_MEMORY)

    def run(tiles: int, works: int, recorder: Recorder) -> None:
        told = replace(kernel, arguments=cudnn_frontend.retold(kernel.arguments, numbers(tiles)))
        options = emulator.Options(observers=(recorder,), uninitialized="poison", permissive=True)
        flash_attn_4.call(told, driver, driver.symbols, operands, options)

    rows, keys = kernel.tile
    return Subject(
        cudnn_frontend.full_name(), cubin, rows, 1, keys, 1, shape.threads,
        occupancy("sm80", cubin, shape.threads, shape.shared_memory), False, wanted.causal, run, backward,
    )  # fmt: skip


def _sized(case: flash_attn_4.Case, rows: int, keys: int, heads: int) -> flash_attn_4.Case:
    many = heads * case.heads_kv // case.heads
    return replace(case, seqlens_q=(rows,), seqlens_k=(keys,), heads=heads, heads_kv=many)


def _grid(kernel: flash_attn_4.Kernel, rows: int, heads: int) -> int:
    """CTAs that the peer's host code launches for so many queries and heads."""
    shapes = _sized(kernel.case, rows, kernel.tile[1], heads).shapes().items()
    made = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes}
    grid = flash_attn_4.launch_shape(kernel, made).grid
    return grid[0] * grid[1] * grid[2]


def smaller_launch(driver: Driver, ctas: int) -> dict[str, int]:
    """A launch of so many CTAs, whatever the host code asks for: persistent ones take all tiles in turn."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p, ctypes.c_void_p)
    def launch(config, kernel, arguments) -> int:
        config[0], config[1], config[2] = ctas, 1, 1
        address = ctypes.cast(config, ctypes.c_void_p).value
        made = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 3)(driver.symbols["_cudaLaunchKernelEx"])
        return made(address, kernel, arguments)

    _KEPT.append(launch)
    return {"_cudaLaunchKernelEx": objectfile.address_of(launch)}


_KEPT: list = []  # C functions that host code may still call


def occupancy(arch: str, cubin: bytes, threads: int, shared_memory: int) -> int:
    """CTAs that an SM holds."""
    registers = sass.resources(cubin).registers
    return rates.occupancy(EMULATED[arch].capability, threads, registers, shared_memory).ctas


def ours(wanted: Wanted, arch: str) -> Subject:
    """This project's kernel. Raises NotImplementedError with the reasons where none serves."""
    device = EMULATED[arch]
    mask = {"mask": cute_flash.Causal()} if wanted.causal else {}
    gqa = wanted.group > 1
    answer = cute_flash.supports(wanted.dtype, *wanted.dims, device=arch, lse=True, gqa=gqa, **mask)
    if not answer:
        raise NotImplementedError(" ".join(str(answer).split()))
    return of_answer(answer, wanted, arch, device)


def of_answer(answer: Answer, wanted: Wanted, arch: str, device) -> Subject:
    """A kernel that serves, with its config."""
    config, problem = answer.config, answer.problem
    built = executable.artifact(answer.kernel, problem, config, device)
    run_it = executable.executable(answer.kernel, problem, config, device, "emulator")
    packed, cluster = getattr(config, "heads", 1), getattr(config, "ctas", 1)
    persistent = getattr(config, "persistent", False)

    def run(tiles: int, works: int, recorder: Recorder) -> None:
        operands = _operands(wanted, (config.tile_m // packed, tiles * config.tile_n), works * packed, packed)
        operands = operands._replace(multiprocessors=cluster)
        with cute_flash.emulated(arch, observers=(recorder,)):
            run_it(*operands)

    threads = threads_of(built.ptx)
    return Subject(
        answer.kernel.name, built.cubin, config.tile_m, packed, config.tile_n, cluster, threads,
        occupancy(arch, built.cubin, threads, config.shared_memory(problem)), persistent, wanted.causal, run,
    )  # fmt: skip


def _operands(wanted: Wanted, lengths: tuple[int, int], heads: int, group: int) -> Operands:
    """Of our kernel. Random normal."""
    (rows, keys), (dim, dim_v) = lengths, wanted.dims
    generator = torch.Generator().manual_seed(0)
    many = heads // group if wanted.group > 1 else heads
    shapes = ((rows, heads, dim), (keys, many, dim), (keys, many, dim_v), (rows, heads, dim_v))
    made = (torch.randn(1, *shape, generator=generator) for shape in shapes)
    q, k, v, out = (tensor.to(getattr(torch, wanted.dtype)) for tensor in made)
    absent = dict.fromkeys(Operands._fields)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(1, heads, rows)}
    return Operands(**absent | given | {"softmax_scale": dim**-0.5})

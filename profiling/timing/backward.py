"""Main backward kernels, ours and peers', to be timed as subjects.py's forward kernels are.

A CTA (or a cluster) keeps its keys and walks the tiles of queries. Of flash-attn-4's only the first one is
launched on the emulator. The launches around the main one, which move rows of O, dO and sums of dQ, take what
their bytes take.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import torch

import cute_flash
from cute_flash import emulator, executable
from cute_flash.dispatch import EMULATED, Answer
from cute_flash.emulator.execution.launch import Driver

from .. import cudnn_frontend, flash_attn_4, flash_attn_4_backward, gradients, sass, static
from .grid import Shape
from .subjects import Subject, Wanted, occupancy, of_cudnn, smaller_launch
from .trace import Recorder

ONE_TILE = (512, 64)  # queries, and keys of a tile of cuDNN front end's, for which its kernel is compiled
LENGTHS = (1024, 640)  # of queries and keys that it is compiled with: told apart in the scratch's sizes
LAUNCHES = 3  # of a call, besides the main one


@functools.cache
def peer(wanted: Wanted, arch: str) -> Subject:
    """flash-attn-4's kernel. Raises flash_attn_4.Missing."""
    (dim, dim_v), target = wanted.dims, EMULATED[arch].target
    name = f"timing_{dim}_{dim_v}_{wanted.group}_{wanted.causal}_{wanted.dtype}"
    case = flash_attn_4_backward.Case(
        name, LENGTHS[:1], LENGTHS[1:], heads=wanted.group, heads_kv=1, dim=dim, causal=wanted.causal,
        dim_v=None if dim_v == dim else dim_v, dtype=wanted.dtype, arch=target,
    )  # fmt: skip
    call = flash_attn_4_backward.call_of(case)
    rows, keys = call.main.tile
    cubin = sass.embedded_cubin(call.main.object_file.read_bytes())
    one_block = flash_attn_4.launch_shape(call.main, _tensors(call, rows, keys))
    cluster = one_block.grid[0]
    program = emulator.Program(flash_attn_4.defined(call.main.ptx))
    driver = Driver(program, flash_attn_4.LARGEST_SHARED_MEMORY)

    def run(tiles: int, works: int, recorder: Recorder) -> None:
        length = tiles * rows
        seen = length if wanted.causal else keys * cluster
        operands = _tensors(call, length, -(-seen // (keys * cluster)) * keys * cluster)
        options = emulator.Options(observers=(recorder,), uninitialized="poison", permissive=True)
        symbols = driver.symbols | smaller_launch(driver, cluster)
        flash_attn_4.call(call.main, driver, symbols, operands, options)

    return Subject(
        f"{flash_attn_4.NAME} {flash_attn_4.version()}", cubin, rows, 1, keys, cluster, one_block.threads,
        occupancy(arch, cubin, one_block.threads, one_block.shared_memory), False, wanted.causal, run, True,
    )  # fmt: skip


@functools.cache
def cudnn(wanted: Wanted, arch: str) -> Subject:
    """cuDNN front end's kernel for sm_80. A CTA works on one query head, shared keys or not.

    Raises flash_attn_4.Missing.
    """
    dim, dim_v = wanted.dims
    if arch != "sm80" or dim != dim_v or dim not in (128, 256):
        raise flash_attn_4.Missing(f"{cudnn_frontend.NAME} has none for {wanted.dims} on {arch}")
    case = flash_attn_4_backward.Case(
        f"timing_cudnn_{dim}_{wanted.causal}_{wanted.dtype}", ONE_TILE[:1], ONE_TILE[1:], heads=1,
        heads_kv=1, dim=dim, causal=wanted.causal, dtype=wanted.dtype,
    )  # fmt: skip
    call = cudnn_frontend.call_of(case)
    operands = cudnn_frontend.tensors_of(case, *ONE_TILE)
    return of_cudnn(call.main, operands, wanted, lambda tiles: {0: tiles}, backward=True)


def ours(wanted: Wanted, arch: str) -> Subject:
    """This project's main kernel, without a mask. Raises what `answer_for` does."""
    return of_answer(answer_for(wanted, arch), wanted, arch)


def answer_for(wanted: Wanted, arch: str) -> Answer:
    """What the table has for it. Raises NotImplementedError with the reasons where nothing is timed."""
    if wanted.causal or wanted.group > 1:
        raise NotImplementedError("gradients are timed without a mask, with as many heads of K and V")
    case = static.Case("timing", wanted.dims, backward=True)
    answer = case.with_products(EMULATED[arch])[0]
    if not answer:
        raise NotImplementedError(" ".join(str(answer).split()))
    return answer


def of_answer(answer: Answer, wanted: Wanted, arch: str) -> Subject:
    """A kernel that serves, with its config."""
    config, problem, device = answer.config, answer.problem, answer.device
    built = executable.artifact(answer.kernel, problem, config, device)
    run_it = executable.executable(answer.kernel, problem, config, device, "emulator")
    cluster, threads = getattr(config, "ctas", 1), static.threads_of(built.ptx)

    def run(tiles: int, works: int, recorder: Recorder) -> None:
        operands = gradients.operands(answer, wanted.dims, tiles * config.tile_m, config.tile_n)
        with cute_flash.emulated(arch, observers=(recorder,)):
            run_it(*operands)

    return Subject(
        answer.kernel.name, built.cubin, config.tile_m, 1, config.tile_n // cluster, cluster, threads,
        occupancy(arch, built.cubin, threads, config.shared_memory(problem)), False, False, run, True,
    )  # fmt: skip


def _tensors(call, queries: int, keys: int) -> dict[str, torch.Tensor]:
    """Operands with other lengths; scratch grows with the queries or with the keys, whichever it is of."""
    made = flash_attn_4.tensors(replace(call.case, seqlens_q=(queries,), seqlens_k=(keys,)))
    for name, scratch in call.scratch.items():
        *outer, numbers = scratch.shape
        made[name] = torch.zeros((*outer, _scaled(call, numbers, (queries, keys))))
    return made


def _scaled(call, numbers: int, lengths: tuple[int, int]) -> int:
    """How many numbers a scratch tensor has for other lengths, each padded to whole tiles."""
    rows, keys = call.main.tile
    for was, now in zip(LENGTHS, lengths, strict=True):
        for each in (1, call.case.dim, call.case.dim_v or call.case.dim):
            for tile in (rows, keys, 2 * keys, 128):
                if numbers == each * _padded(was, tile):
                    return each * _padded(now, tile)
    raise flash_attn_4.Missing(f"a scratch tensor of {numbers} numbers is of neither length")


def _padded(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def around(shape: Shape, chip: SimpleNamespace) -> float:
    """Clocks of the other launches: D = rowsum(O dO), clearing and converting the sums of dQ.

    They move O, dO, the sums written and read, dQ, and the gradients of K and V, at the rate of HBM.
    """
    dim, dim_v = shape.dims
    rows = shape.batch * shape.heads * shape.rows * (2 * 2 * dim_v + 2 * 4 * dim + 2 * dim)
    grouped = shape.heads != shape.heads_kv
    keys = shape.batch * shape.heads_kv * shape.keys * (4 + 4 + 2) * (dim + dim_v) * grouped
    return (rows + keys) / chip.hbm_rate / 1e3 * chip.clock + LAUNCHES * chip.kernel_launch

"""Registers, spills, shared memory, occupancy and hot loop of every kernel that ships, from its machine code.

    python -m profiling static                              every kernel, case and architecture, flash-attn-4
    python -m profiling static --arch sm80 --case d64 d128      beside
    python -m profiling static --write                      keep the rows in results/static.json and static.md
    python -m profiling static --golden                     write tests/golden/static.json anew

No GPU is needed. The hot loop is the steady loop over K and V without masking, and where other warps do the
softmax, theirs as well; counts are instructions of one warp and one iteration. "slots" are all of them per
4096 FLOP of matrix product, which is one mma.sync m16n8k16: what is issued to feed the tensor cores. A case
of gradients has all launches of a call; the hot loop of its main kernel is the one over Q and dO.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import cute_flash
from cute_flash import arch as trees
from cute_flash import cache, executable
from cute_flash.arch import quantized
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.precision import QUANTIZATIONS
from cute_flash.arch.problem import Device
from cute_flash.arch.quantized_backward import QuantizedBackwardProblem
from cute_flash.dispatch import EMULATED, Answer, select

from . import cudnn_frontend, flash_attn_4, flash_attn_4_backward, flash_attn_4_fp8, rates, sass

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "static.json"
TOLERANCE = 0.03  # of registers and of a loop's counts; the rest of the golden file is exact
WINDOW = (256, 0)  # keys to the left and to the right


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, with the log-sum-exp. rules: a key of RULES.

    backward: for the gradients of such a call. dtype: of q, k and v; of 8 bits the result is in bf16. block:
    of rows of 8 bits that share a scale; None: a head's. forms: of q and k, and of v, which tensor cores
    scale; None: they do not.
    """

    name: str
    dims: tuple[int, int]
    rules: str = "plain"
    backward: bool = False
    dtype: str = "bfloat16"
    block: int | None = None
    forms: tuple[str, str] | None = None

    @property
    def bits(self) -> float:
        """Of an element of what is multiplied, both products' by their FLOP."""
        if self.forms is None:
            return 8 if self.dtype in quantized.DTYPES else 16
        qk, pv = (QUANTIZATIONS[form].element.bits for form in self.forms)
        return (qk * self.dims[0] + pv * self.dims[1]) / sum(self.dims)

    @property
    def is_quantized(self) -> bool:
        """Whether q, k and v are of few bits."""
        return self.bits < 16

    def is_on(self, arch: str) -> bool:
        """Whether the tables have it there."""
        if self.forms:
            return arch in SCALED_ON
        if self.is_quantized:
            return arch in FP8_ON
        return not self.backward or arch in GRADIENTS_ON

    def answers(self, device: Device) -> tuple[Answer, ...]:
        """Every kernel that serves it on a device with its config, first choice first; of gradients every
        kernel and config among the launches, in their order.

        Where there is none, the one answer that says why.
        """
        any_arch, given = next(iter(EMULATED)), RULES[self.rules]() | {"lse": True}
        if self.forms:
            given |= dict(zip(("form", "v_form"), self.forms, strict=True))
        elif self.is_quantized:
            given["block"] = self.block
        problem = cute_flash.supports(self.dtype, *self.dims, device=any_arch, **given).problem
        if self.backward:
            kind = QuantizedBackwardProblem if self.is_quantized else BackwardProblem
            return _launches(select(kind(problem), device))
        serving = [kernel for kernel in trees.load(device) if not kernel.reasons(problem, device)]
        found = (Answer(problem, device, kernel, kernel.config(problem, device)) for kernel in serving)
        return tuple(found) or (select(problem, device),)

    def with_products(self, device: Device) -> tuple[Answer, ...]:
        """Of `answers` those whose kernel has matrix products, or the one that says why there is none."""
        beside = ("preprocess", "postprocess")
        return tuple(a for a in self.answers(device) if not a or a.kernel.operation not in beside)

    @property
    def peers(self) -> Any:
        """The module that has the peer's kernels for it."""
        if self.is_quantized:
            return flash_attn_4_fp8
        return flash_attn_4_backward if self.backward else flash_attn_4

    @property
    def of_peers(self) -> bool:
        """Whether the peer is asked for it. It has neither factors of tensor cores nor gradients in FP8."""
        lacking = self.forms or self.backward and self.is_quantized
        return self.rules != "everything" and max(self.dims) <= 256 and not lacking

    def peer(self) -> flash_attn_4.Case | flash_attn_4_backward.Case | flash_attn_4_fp8.Case:
        """The same problem in the peer's words. Raises Missing where it is not asked for it."""
        if not self.of_peers:
            raise flash_attn_4.Missing("not asked for this problem")
        if self.block is not None:
            raise flash_attn_4.Missing("it has no scales of blocks")
        dim, dim_v = self.dims
        shape = {"heads": 1, "heads_kv": 1, "dim": dim, "dim_v": None if dim_v == dim else dim_v}
        shape["causal"] = self.rules == "causal"
        if self.rules == "window":
            shape["window"] = WINDOW
        return self.peers.Case(self.name, (1024,), (1024,), **shape)


def _launches(answer: Answer) -> tuple[Answer, ...]:
    """Of a call's launches, each kernel with each of its configs once."""
    if not answer:
        return (answer,)
    found: dict[tuple, Answer] = {}
    for step in answer.kernel.steps(answer.problem, answer.device, answer.config).steps:
        each = Answer(step.problem, answer.device, step.kernel, step.config)
        found.setdefault((step.kernel.name, step.config), each)
    return tuple(found.values())


def _everything() -> dict[str, Any]:
    ids = torch.zeros(1, 8, dtype=torch.int32)
    features = ("varlen", "seqused_q", "seqused_k", "gqa", "dropout", "sink")
    return dict.fromkeys(features, True) | {
        "mask": [cute_flash.Document(ids), cute_flash.Causal()],
        "score": [cute_flash.Softcap(30.0), cute_flash.ALiBi(torch.ones(2))],
    }


# Rules and features of a case -> arguments of cute_flash.supports.
RULES = {
    "plain": dict,
    "causal": lambda: {"mask": cute_flash.Causal()},
    "window": lambda: {"mask": cute_flash.SlidingWindow(*WINDOW)},
    "everything": _everything,
}


def _cases() -> Iterator[Case]:
    """Head dims of every row of the tuning tables, with each of RULES; windows at the commonest ones.

    Of gradients those that change the row.
    """
    squares = (32, 64, 96, 128, 160, 192, 224, 256)
    for dims in (*((dim, dim) for dim in squares), (192, 128), (576, 512)):
        for rules in RULES:
            if rules != "window" or dims in COMMON:
                yield Case(_name_of(dims, rules), dims, rules)
    for dims in (*((dim, dim) for dim in (32, 64, 96, 128, 192, 256)), (192, 128)):
        yield Case(_name_of(dims, "backward"), dims, backward=True)
    for dims in ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256)):
        yield Case(_name_of(dims, "everything", "backward"), dims, "everything", backward=True)
    for dims in ((64, 64), (128, 128)):
        yield Case(_name_of(dims, "causal", "backward"), dims, "causal", backward=True)
    for dims in ((192, 192), (256, 256)):
        yield Case(_name_of(dims, "window", "backward"), dims, "window", backward=True)
    for dims in ((64, 64), (128, 128)):
        yield Case(_name_of(dims, "fp8"), dims, dtype=FP8)
    yield Case(_name_of(dims, "fp8", "blocks"), dims, dtype=FP8, block=128)
    for dims in ((64, 64), (128, 128)):
        yield Case(_name_of(dims, "fp8", "backward"), dims, dtype=FP8, backward=True)
    for dims in ((64, 64), (128, 128)):
        yield Case(_name_of(dims, "mxfp8"), dims, dtype=FP8, forms=("mxfp8", "mxfp8"))
        yield Case(_name_of(dims, "nvfp4"), dims, dtype=FP4, forms=("nvfp4", "e4m3"))


def _name_of(dims: tuple[int, int], *words: str) -> str:
    known = dims[:1] if dims[0] == dims[1] else dims
    return "_".join(["d" + "_".join(map(str, known)), *(word for word in words if word != "plain")])


# Gradients are looked at where each tree's own kernels have the most shared memory. On other devices of the
# trees the same ones serve.
GRADIENTS_ON = ("sm80", "sm90", "sm100")
FP8, FP8_ON = "float8_e4m3fn", ("sm90", "sm100")
FP4, SCALED_ON = "float4_e2m1fn_x2", ("sm100",)
COMMON = ((64, 64), (128, 128), (192, 128), (256, 256))
CASES = {case.name: case for case in _cases()}

# Kernels that the golden file follows: (architecture, case), each kernel that serves it.
FOLLOWED = (
    ("sm80", "d64"), ("sm80", "d64_causal"), ("sm80", "d128"), ("sm80", "d128_causal"), ("sm80", "d256"),
    ("sm86", "d128"), ("sm90", "d64_causal"), ("sm90", "d128"), ("sm90", "d192_128"), ("sm90", "d256"),
    ("sm100", "d128"), ("sm100", "d192_128"), ("sm80", "d64_backward"), ("sm90", "d128_backward"),
    ("sm100", "d64_backward"), ("sm100", "d128_backward"), ("sm90", "d128_fp8"), ("sm100", "d128_fp8"),
    ("sm100", "d128_mxfp8"), ("sm100", "d128_nvfp4"),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Which kernel it is. config: of a kernel of ours, "" for the peer's."""

    arch: str
    case: str
    kernel: str
    config: str


@dataclass(frozen=True)
class Absent(Source):
    """A kernel that cannot be had, and why."""

    reason: str


@dataclass(frozen=True)
class Figures(Source):
    """What machine code tells of one kernel.

    registers: per thread, at launch; moved: what its warps set them to afterwards, by setmaxnreg. stack,
    local: bytes per thread; both are spills or indexed arrays. shared_memory: bytes per CTA, of which the
    system's own are not counted. ctas: that one SM holds; bound: what sets it. loops: instructions by class
    of each hot loop, the one with the matrix instructions first. flops: of each, per warp; 0 where opcodes do
    not tell.
    """

    threads: int
    registers: int
    moved: tuple[int, ...]
    stack: int
    local: int
    shared_memory: int
    ctas: int
    bound: str
    loops: tuple[dict[str, int], ...]
    flops: tuple[int, ...]

    @classmethod
    def of(cls, row: dict[str, Any]) -> Figures:
        """From what JSON makes of it."""
        return cls(**{k: tuple(value) if isinstance(value, list) else value for k, value in row.items()})


def figures(case: Case, answer: Answer, arch: str) -> Figures:
    """Ours. Raises NotImplementedError with the reasons where no kernel serves the case."""
    if not answer:
        raise NotImplementedError(str(answer))
    built = executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    shared_memory = answer.config.shared_memory(answer.problem)
    return read(source(case, answer, arch), built.cubin, threads_of(built.ptx), shared_memory)


def threads_of(ptx: bytes) -> int:
    """Of a CTA of the one kernel in a PTX module."""
    ((*dims,),) = re.findall(rb"\.reqntid (\d+), (\d+), (\d+)", ptx)
    return math.prod(map(int, dims))


def source(case: Case, answer: Answer, arch: str) -> Source:
    """What a kernel of ours is called in the tables."""
    return Source(arch, case.name, answer.kernel.name, in_words(answer.config))


def in_words(config: Any) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def unreached(arch: str) -> list[str]:
    """Configs that some head dim to 256 gets on an architecture and none of CASES: a case is missing."""
    told: dict[str, str] = {}
    for dim in range(256, 0, -8):
        for rules, backward in product(RULES, (False, True)):
            case = Case(f"head dim {dim} {rules}{' backward' * backward}", (dim, dim), rules, backward)
            if case.is_on(arch):
                told |= {_name(answer): case.name for answer in case.answers(EMULATED[arch]) if answer}
    for case in CASES.values():
        for answer in case.answers(EMULATED[arch]):
            if answer:
                told.pop(_name(answer), None)
    return [f"{arch}: {config}, from {name}" for config, name in told.items()]


def _name(answer: Answer) -> str:
    return f"{answer.kernel.name} {in_words(answer.config)}"


def peer_source(case: Case, arch: str) -> Source:
    """What the peer's kernel is called in the tables."""
    return Source(arch, case.name, f"{flash_attn_4.NAME} {flash_attn_4.version()}", "")


def peer_figures(case: Case, arch: str) -> Figures:
    """The peer's, on the same architecture; of gradients its main kernel. Raises flash_attn_4.Missing."""
    peer = case.peers.compiled(case.peer(), EMULATED[arch].target)
    return read(peer_source(case, arch), peer.cubin, peer.shape.threads, peer.shape.shared_memory)


def read(source: Source, cubin: bytes, threads: int, dynamic: int) -> Figures:
    """The figures of a kernel that is launched with so many threads and bytes of dynamic shared memory."""
    used, code = sass.resources(cubin), sass.disassembly(cubin)
    capability = EMULATED[source.arch].capability
    # From Hopper on the system's own are among them, but of a kernel that uses none.
    static = max(0, used.shared - rates.RESERVED_SHARED) if capability >= (9, 0) else used.shared
    occupancy = rates.occupancy(capability, threads, used.registers, dynamic + static)
    loops = sass.hot_loops(code)
    return Figures(
        **asdict(source),
        threads=threads,
        registers=used.registers,
        moved=sass.moved_registers(code),
        stack=used.stack,
        local=used.local,
        shared_memory=dynamic + static,
        ctas=occupancy.ctas,
        bound=occupancy.bound,
        loops=tuple({name: loop.counts[name] for name in sass.CLASSES} for loop in loops),
        flops=tuple(loop.flops for loop in loops),
    )


def moves(was: dict[str, Any], now: Figures) -> list[str]:
    """What is no longer as the golden file says: counts beyond TOLERANCE, anything else at all."""
    found = []
    have = json.loads(json.dumps(asdict(now)))
    for name, value in have.items():
        if name == "registers":
            moved = abs(value - was[name]) > TOLERANCE * was[name]
        else:
            moved = name not in ("loops", "flops") and value != was[name]
        if moved:
            found.append(f"{name} was {was[name]}, is {value}")
    if len(was["loops"]) != len(have["loops"]):
        found.append(f"there were {len(was['loops'])} hot loops, there are {len(have['loops'])}")
    for i, (old, new) in enumerate(zip(was["loops"], have["loops"], strict=False)):
        for name in sorted({*old, *new}):
            before, after = old.get(name, 0), new.get(name, 0)
            exact = name == "local"
            if abs(after - before) > (0 if exact else TOLERANCE * before):
                found.append(f"loop {i}: {name} instructions were {before}, are {after}")
    return found


def followed() -> dict[str, tuple[Case, Answer, str]]:
    """What the golden file holds: "architecture/case/kernel" -> what `figures` takes."""
    pairs = ((arch, CASES[name]) for arch, name in FOLLOWED)
    return {
        f"{arch}/{case.name}/{answer.kernel.name}": (case, answer, arch)
        for arch, case in pairs for answer in case.answers(EMULATED[arch])
    }


def golden() -> dict[str, Any]:
    """The golden file's contents, made anew."""
    rows = {key: asdict(figures(*told)) for key, told in followed().items()}
    return {"versions": cache.versions(), "rows": rows}


OWNERS = ("", flash_attn_4.NAME, cudnn_frontend.NAME)


def whose(kernel: str) -> str:
    """The peer that a kernel is of, one of OWNERS; "" of ours."""
    return next((name for name in OWNERS[1:] if kernel.startswith(name)), "")


def survey(arches: Iterable[str], cases: Iterable[str], peer: bool) -> Iterator[Figures | Absent]:
    """Every kernel of ours and the peer's for every case, architecture by architecture."""
    for arch in arches:
        chosen = [CASES[name] for name in cases if CASES[name].is_on(arch)]
        if peer:
            _prepare_peers(chosen, arch)
        for case in chosen:
            yield from (_ours(case, answer, arch) for answer in case.answers(EMULATED[arch]))
            if peer and case.rules != "everything":
                yield _peers(case, arch)
            if peer and cudnn_frontend.has(case, arch):
                yield _cudnn_s(case, arch)


def _ours(case: Case, answer: Answer, arch: str) -> Figures | Absent:
    try:
        return figures(case, answer, arch)
    except NotImplementedError as error:
        return Absent(arch, case.name, "cute_flash", "", " ".join(str(error).split()))


def _peers(case: Case, arch: str) -> Figures | Absent:
    try:
        return peer_figures(case, arch)
    except flash_attn_4.Missing as error:
        return Absent(arch, case.name, flash_attn_4.NAME, "", str(error))


def _cudnn_s(case: Case, arch: str) -> Figures | Absent:
    try:
        peer = cudnn_frontend.compiled(case.peer())
        what = Source(arch, case.name, cudnn_frontend.full_name(), "")
        return read(what, peer.cubin, peer.shape.threads, peer.shape.shared_memory)
    except flash_attn_4.Missing as error:
        return Absent(arch, case.name, cudnn_frontend.NAME, "", str(error))


def _prepare_peers(cases: Iterable[Case], arch: str) -> None:
    """Compile the peer's kernels in one process; what is missing says so when it is asked for."""
    asked = [case.peer() for case in cases if case.rules != "everything" and case.peers is flash_attn_4]
    try:
        flash_attn_4.prepare(asked, EMULATED[arch].target)
    except flash_attn_4.Missing:
        return

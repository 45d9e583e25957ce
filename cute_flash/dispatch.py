"""Which kernel serves a problem on a device: the first that says it can, or every reason why none does.

The only file that knows compute capabilities. CPU tensors are served where an emulated device is
active, by `with emulated("sm80")` or by CUTE_FLASH_EMULATE=sm80; there is no silent fallback.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import arch, rules
from .arch.backward import BackwardProblem
from .arch.combine import CombineProblem, part_of, split
from .arch.kernel import Kernel, Step, Steps
from .arch.problem import FEATURES, OPERATIONS, Asked, Device, Sizes
from .arch.quantized import QuantizedProblem
from .arch.quantized_backward import QuantizedBackwardProblem
from .masks import Mask
from .problems import problem
from .scores import Score

LARGEST_GRID = 2**31 - 1  # blocks along x of a launch
# Devices that can be emulated: capability, opt-in shared memory per block and multiprocessors of A100, RTX
# 3090, RTX 4090, H100 SXM, B200 and RTX 5090 (CUDA C++ programming guide, table of technical specifications;
# NVIDIA's architecture white papers).
EMULATED = {
    "sm80": Device((8, 0), 166912, 108),
    "sm86": Device((8, 6), 101376, 82),
    "sm89": Device((8, 9), 101376, 128),
    "sm90": Device((9, 0), 232448, 132),
    "sm100": Device((10, 0), 232448, 148),
    "sm120": Device((12, 0), 101376, 170),
}


@dataclass(frozen=True)
class Emulation:
    """An emulated device: `reports` holds what the emulator said about its latest launches.

    options: keywords of `cute_flash.emulator.Options`.
    """

    name: str
    device: Device
    options: dict[str, Any] = field(default_factory=dict)
    reports: deque = field(default_factory=lambda: deque(maxlen=1000))


class Place(NamedTuple):
    """Where a call runs. route: "cuda" or "emulator"."""

    device: Device
    route: str


@dataclass(frozen=True)
class Answer:
    """What `supports` says: true where a kernel serves the problem; `str` gives it, or the reasons.

    refusals: (kernel's name, its reasons) of every kernel that was asked before.
    """

    problem: Asked
    device: Device
    kernel: Kernel | None = None
    config: Any = None
    refusals: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __bool__(self) -> bool:
        return self.kernel is not None

    def __str__(self) -> str:
        device = f"{self.device.target} with {self.device.shared_memory} bytes of shared memory"
        asked = f"{_in_words(self.problem)} on {device}"
        if self:
            return f"{self.kernel.name} serves {asked}: {self.config}{self._workspace()}"
        lines = [f"no kernel serves {asked}:"]
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.refusals]
        return "\n".join(lines)

    def _workspace(self) -> str:
        """What a call takes besides its results, as long as it lasts."""
        scratch = self.kernel.steps(self.problem, self.device, self.config).scratch_specs()
        sizes = self.problem.known_sizes()
        taken = [f"{name} {spec.dtype} ({', '.join(str(sizes.get(dim, dim)) for dim in spec.dims)})"
                 for name, spec in scratch.items()]
        return f"; workspace: {', '.join(taken)}" if taken else ""


_active: contextvars.ContextVar[Emulation | None] = contextvars.ContextVar("emulation", default=None)
_only: contextvars.ContextVar[str | None] = contextvars.ContextVar("only", default=None)


@contextlib.contextmanager
def emulated(name: str = "sm80", **options: Any) -> Iterator[Emulation]:
    """Within this context calls on CPU tensors run on an emulated GPU.

    name: one of "sm80", "sm86", "sm89", "sm90", "sm100", "sm120". options: keywords of
    `cute_flash.emulator.Options`, such as `races=True`. Yields the `Emulation`, whose `reports` fill
    with a report per launch. Applies to this thread and context only. Raises ValueError for another name,
    and what `Options` raises for options that it does not take.
    """
    if options:
        from .emulator import Options

        Options(**options)
    emulation = Emulation(name, _emulated_device(name, "emulated"), options)
    token = _active.set(emulation)
    try:
        yield emulation
    finally:
        _active.reset(token)


def emulation() -> Emulation | None:
    """The emulated device that is active here, if any."""
    return _active.get() or _from_environment(os.environ.get("CUTE_FLASH_EMULATE", ""))


def place_of(device: torch.device) -> Place:
    """Where a call on tensors of `device` runs; RuntimeError for CPU tensors without an emulated device."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return Place(_cuda_device(index), "cuda")
    active = emulation()
    if active is None:
        raise RuntimeError(
            f"the tensors are on {device}, and kernels run on CUDA devices. Move the tensors to a GPU; or "
            'emulate one: `with cute_flash.emulated("sm80"):` or CUTE_FLASH_EMULATE=sm80 (slow, for '
            "development); or use torch.nn.functional.scaled_dot_product_attention on the CPU. "
            "`with emulated` holds for the thread that entered it, the variable for all threads"
        )
    return Place(active.device, "emulator")


def dispatch(problem: Asked, device: Device) -> tuple[Kernel, Any]:
    """(kernel, config) for `problem`; NotImplementedError with every kernel's every reason."""
    answer = select(problem, device, _only.get())
    if not answer:
        raise NotImplementedError(str(answer))
    return answer.kernel, answer.config


def plan(problem: Asked, device: Device, sizes: Sizes, num_splits: int = 0) -> Steps:
    """The steps that answer an unsplit `problem`; NotImplementedError as `dispatch` has it.

    num_splits: among how many CTAs a row block's keys are shared out; 0 leaves it to the kernel's tuning.
    """
    planned = _planned(problem, device, sizes, num_splits, _only.get())
    splits = planned.sizes.get("splits", 1)
    if sizes.batch * sizes.heads_q * max(sizes.seqlen_q, sizes.seqlen_k) * splits > LARGEST_GRID:
        _check_grid(planned, sizes, splits)
    return planned


def beside(problem: Asked, device: Device, sizes: Sizes) -> Steps:
    """The step that answers a problem which is not attention's; NotImplementedError as `dispatch` has it."""
    planned = Steps((_helper(problem, device),))
    _check_grid(planned, sizes, 1)
    return planned


def _check_grid(planned: Steps, sizes: Sizes, splits: int) -> None:
    """All blocks of a launch are counted along one dimension of the grid."""
    most = max(step.kernel.tuning.blocks(step.config, sizes, splits) for step in planned.steps)
    if most > LARGEST_GRID:
        raise NotImplementedError(
            f"the call has {sizes.batch} sequences of up to {sizes.seqlen_q} queries and {sizes.heads_q} "
            f"heads, with num_splits {splits}: {most} blocks; allowed: {LARGEST_GRID}"
        )


@functools.lru_cache(maxsize=4096)
def _planned(problem: Asked, device: Device, sizes: Sizes, num_splits: int, _wanted: str | None) -> Steps:
    """`plan`, remembered; dispatch reads the kernel that is `_wanted` from the context."""
    kernel, _ = dispatch(problem, device)
    if not num_splits:
        splits_itself = "split_kv" in kernel.support.features
        num_splits = kernel.splits(problem, device, sizes) if splits_itself else 1
    if num_splits == 1:
        return kernel.steps(problem, device, kernel.config(problem, device, sizes))
    part, merging = part_of(problem), CombineProblem.of(problem)
    kernel, _ = dispatch(part, device)
    step = Step(kernel, part, kernel.config(part, device, sizes))
    return split(step, _helper(merging, device), num_splits)


def steps(problem: Asked, device: Device) -> tuple[Step, ...]:
    """Every launch that calls of an unsplit `problem` may need by themselves, whatever their sizes."""
    kernel, _ = dispatch(problem, device)
    found: list[Step] = []
    for config in kernel.configs(problem, device):
        found += kernel.steps(problem, device, config).steps
    if "split_kv" in kernel.support.features:
        part, merging = part_of(problem), CombineProblem.of(problem)
        kernel, _ = dispatch(part, device)
        found += [Step(kernel, part, config) for config in kernel.configs(part, device)]
        found.append(_helper(merging, device))
    return tuple(dict.fromkeys(found))


def _helper(problem: Asked, device: Device) -> Step:
    """A step beside the one that `only` may have chosen: any kernel serves that can."""
    answer = select(problem, device)
    if not answer:
        raise NotImplementedError(str(answer))
    return Step(answer.kernel, problem, answer.config)


@contextlib.contextmanager
def only(kernel: str | None) -> Iterator[None]:
    """Within this context no kernel serves but the one of this name; None: any.

    For tests and measurements of a kernel that is not the first choice. Applies to this thread and context.
    """
    token = _only.set(kernel)
    try:
        yield
    finally:
        _only.reset(token)


def wanted() -> str | None:
    """The one kernel that `only` lets serve here, if any."""
    return _only.get()


@functools.cache
def select(problem: Asked, device: Device, wanted: str | None = None) -> Answer:
    """The first kernel of its operation that serves `problem` on `device`; of this name, if one is wanted."""
    refusals = []
    for kernel in arch.load(device, problem.operation):
        reasons = kernel.reasons(problem, device)
        if wanted not in (None, kernel.name):
            reasons = (*reasons, f"only {wanted} is asked for")
        if not reasons:
            return Answer(problem, device, kernel, kernel.config(problem, device), tuple(refusals))
        refusals.append((kernel.name, tuple(reasons)))
    if not refusals:
        served = sorted({major for (major, _), _ in arch.TREES})
        words = f"there are kernels for compute capabilities {served} only"
        if arch.tree_of(device.capability):
            words = f"there is no kernel for {OPERATIONS[problem.operation]}"
        refusals.append(("none", (words,)))
    return Answer(problem, device, refusals=tuple(refusals))


# What kernels of few bits are called where others of theirs have rows of their own.
IN_TABLE = {"quantized": "FP8", "quantized_backward": "FP8 backward"}


def supports(
    dtype: torch.dtype | str,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    device: str | torch.device | None = None,
    mask: Any = None,
    score: Any = None,
    backward: bool = False,
    deterministic: bool = False,
    **features: Any,
) -> Answer:
    """Whether a kernel serves such a call: an object that is true or false and whose text says why.

    device: an architecture ("sm80"), a CUDA device, or None for the one at hand, emulated or not.
    mask, score: a rule (`Causal()` for causal calls, `Softcap(...)` for softcap, ...), a plain function,
    or a list of them that apply together. backward: ask for the gradients of such a call; the answer says
    what workspace they take. deterministic: of gradients, whose sums are then added in one order. features:
    `varlen`, `seqused_q`, `seqused_k`, `gqa`, `dropout`, `sink`, `lse`, `split_kv` (num_splits above 1),
    `scheduled` (scheduler_metadata), all False unless given; `block_size`, a block mask's (block_q, block_k).
    Where dtype is float8_e4m3fn or float8_e5m2 also `out_dtype` ("float16", "bfloat16") and `block`, rows
    that share a scale (64, 128). Of what tensor cores scale, float8_e4m3fn or float4_e2m1fn_x2, `form` of q
    and k ("mxfp8", "nvfp4") and `v_form` ("e4m3", "mxfp8").
    """
    asked = problem(
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        code=rules.encode(_parts(mask, Mask), _parts(score, Score)).code,
        **{"lse": False, **features},
    )
    if backward:
        kind = QuantizedBackwardProblem if isinstance(asked, QuantizedProblem) else BackwardProblem
        asked = kind(asked, deterministic=deterministic)
    if device is None:
        if emulation() is None and not torch.cuda.is_available():
            names = ", ".join(EMULATED)
            raise RuntimeError(f"no GPU is at hand and none is emulated: give device, one of {names}")
        device = "cuda" if emulation() is None else "cpu"
    if isinstance(device, str) and not device.startswith(("cuda", "cpu")):
        return select(asked, _emulated_device(device, "device"), _only.get())
    return select(asked, place_of(torch.device(device)).device, _only.get())


def _parts(given: Any, base: type) -> list:
    """The rules that a list, a single rule or function, or None stands for."""
    several = given if isinstance(given, list) else [] if given is None else [given]
    return [rules.part_of(part, base, base.__name__) for part in several]


def features() -> str:
    """The table of architectures and features, in Markdown, from what the kernels declare."""
    forward = [_serving(device, "forward") for device in EMULATED.values()]
    quantized = [_serving(device, "quantized") for device in EMULATED.values()]

    def dtypes(served: list[Kernel]) -> str:
        return ", ".join(dict.fromkeys(dtype for kernel in served for dtype in kernel.support.dtypes)) or "–"

    def marked(found: Iterable[Any]) -> list[str]:
        return ["✓" if one else "–" for one in found]

    rows = [["", *EMULATED], ["---", *([":-:"] * len(EMULATED))]]
    rows.append(["dtypes", *map(dtypes, forward)])
    rows.append(["head dims", *map(_head_dims, forward)])
    attention = [(*plain, *few) for plain, few in zip(forward, quantized, strict=True)]
    for feature, words in FEATURES.items():
        has = (any(feature in kernel.support.features for kernel in served) for served in attention)
        rows.append([words, *marked(has)])
    for operation in ("append", "widened", "backward", "quantized", "quantized_backward"):
        served = (_serving(device, operation) for device in EMULATED.values())
        rows.append([IN_TABLE.get(operation, OPERATIONS[operation]), *marked(served)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _serving(device: Device, operation: str) -> list[Kernel]:
    """Kernels of an operation that serve some problem on `device`."""
    return [kernel for kernel in arch.load(device, operation) if kernel.support.serves(device)]


def _head_dims(served: list[Kernel]) -> str:
    """Those that any of the kernels serves, in words."""
    dims = sorted({dim for kernel in served for dim in kernel.support.head_dims})
    steps = {after - before for before, after in itertools.pairwise(dims)}
    if len(dims) > 2 and len(steps) == 1:
        return f"{dims[0]}…{dims[-1]} by {steps.pop()}"
    return ", ".join(map(str, dims)) or "–"


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    shared_memory, multiprocessors = found.shared_memory_per_block_optin, found.multi_processor_count
    return Device((found.major, found.minor), shared_memory, multiprocessors)


def _emulated_device(name: str, argument: str) -> Device:
    if name not in EMULATED:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(EMULATED)}")
    return EMULATED[name]


@functools.cache
def _from_environment(name: str) -> Emulation | None:
    return Emulation(name, _emulated_device(name, "CUTE_FLASH_EMULATE")) if name else None


def _in_words(asked: Asked) -> str:
    known = asked.known_sizes()
    head_dim_v = known["head_dim_v"]
    dims = f"{(head_dim := known.get('head_dim', head_dim_v))}"
    if head_dim_v != head_dim:
        dims += f" and {head_dim_v} for v"
    features = "".join(f", {FEATURES[feature]}" for feature in asked.features())
    return f"{OPERATIONS[asked.operation]} in {asked.dtype} with head_dim {dims}{features},"

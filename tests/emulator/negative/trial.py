"""A changed kernel on trial: what is first said against it, and all that the verdict depends on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import cute_flash
from cute_flash import executable, objectfile, repeat
from cute_flash.arch.combine import COMBINE
from cute_flash.arch.kernel import Kernel, Step
from cute_flash.arch.problem import Device
from cute_flash.cache import Artifact
from cute_flash.dispatch import EMULATED
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from tests import accuracy, harness, proofs, reference
from tests.accuracy import assert_accurate, assert_gradients_accurate
from tests.cases import Case
from tests.harness import Call, call_of

from .mutations import Mutation

# Copies and products as late as waits allow, at once, and at random, the warps then in random order too.
WATCHED = {"races": True, "by_the_book": True}
ATTEMPTS = (
    {"asynchrony": "late", **WATCHED},
    {"asynchrony": "late"},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, **WATCHED} for seed in range(3)),
)


def apart(ctas: int) -> tuple[dict, ...]:
    """Attempts with one of the CTAs of a cluster as far behind the others as they let it."""
    each = product(range(ctas if ctas > 1 else 0), ("eager", "late"))
    return tuple({"behind": rank, "asynchrony": how, **WATCHED} for rank, how in each)


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel to change. config: of its own, so that tuning does not move the sites; None: tuning's.

    kernel: the one of the call's that is changed; None: the forward kernel. options: of the emulator,
    besides an attempt's. also: more calls of the same kernel. multiprocessors: of the device; None: as many
    as it has. ctas: of a cluster.
    """

    case: Case
    config: Any
    mutations: dict[str, Mutation]
    kernel: Kernel | None = None
    options: dict[str, Any] = field(default_factory=dict)
    also: tuple[Case, ...] = ()
    multiprocessors: int | None = None
    ctas: int = 1

    @property
    def gradients(self) -> bool:
        """Whether it is the gradients of the call that show what is changed."""
        return self.kernel not in (None, COMBINE)

    def changes(self, kernel: Kernel) -> bool:
        """Whether this is the one of the call's kernels that is changed."""
        return kernel.operation == "forward" if self.kernel is None else kernel is self.kernel

    def run(self, call: Call, device: str, **options: Any) -> tuple[torch.Tensor, ...]:
        """What a call of its own results in: out and lse, or the gradients."""
        if self.gradients:
            return call.run_backward(*call.cotangents(), device, **options | self.options)
        return call.run(device, **options | self.options)

    def served(self, device: str, executable: Callable) -> contextlib.ExitStack:
        """Within this context calls launch the kernels that `executable` gives, on the subject's device.

        Calls that went well are remembered with their kernels, which nobody else will ask for: they go.
        """
        stack = contextlib.ExitStack()
        stack.callback(repeat.forget)
        stack.enter_context(mock.patch("cute_flash.launch.executable", executable))
        if self.multiprocessors is not None:
            gpu = replace(EMULATED[device], multiprocessors=self.multiprocessors)
            stack.enter_context(mock.patch.dict(EMULATED, {device: gpu}))
        return stack


def objection(
    subject: Subject, device: str, change: Callable[[str], str], attempts: tuple[dict, ...] | None = None
) -> str:
    """What is first said against a subject's kernel when its PTX is changed; empty where nothing is.

    The change runs until something objects: an EmulatorError, or the accuracy rule. The call's other kernels
    run without any of the attempts' options. attempts: ATTEMPTS, and with CTAs of a cluster far apart.
    """
    attempts = (*ATTEMPTS, *apart(subject.ctas)) if attempts is None else attempts

    @cache
    def changed(kernel, problem, tuned, gpu, route):
        if not subject.changes(kernel):
            return plainly(unchanged(subject, Step(kernel, problem, tuned), gpu), device)
        artifact = compiled(subject, Step(kernel, problem, tuned), gpu)
        ptx = change(artifact.ptx.decode())
        return EmulatedKernel(artifact._replace(ptx=ptx.encode()), gpu)

    calls = [call_of(case) for case in (subject.case, *subject.also)]
    with subject.served(device, changed):
        for options, call in product(attempts, calls):
            try:
                check(subject, call, *subject.run(call, device, **options))
            except (EmulatorError, AssertionError) as error:
                return f"{type(error).__name__}: {error}"
    return ""


RIGHT: dict[tuple[Case, bool], tuple[torch.Tensor, ...]] = {}


def check(subject: Subject, call: Call, *results: torch.Tensor) -> None:
    """Hold results to the accuracy rule, unless they are those that have passed it before, bit for bit."""
    key = call.case, subject.gradients
    right = RIGHT.get(key)
    if right is None or not all(torch.equal(a, b) for a, b in zip(results, right, strict=True)):
        tensors = tuple(call.tensors.values())
        if subject.gradients:
            assert_gradients_accurate(results, tensors, *call.cotangents(), **call.arguments)
        else:
            assert_accurate(*results, tensors, **call.arguments)
        RIGHT[key] = results


def compiled(subject: Subject, step: Step, device: Device) -> Artifact:
    """A kernel of a subject's call."""
    own = subject.config is not None and step.kernel.operation == "forward"
    config = subject.config if own else step.config
    return executable.artifact(step.kernel, step.problem, config, device)


def plainly(kernel: EmulatedKernel, device: str) -> Callable[..., None]:
    """A kernel that is not on trial, as users emulate it."""

    def run(*operands: Any) -> None:
        with cute_flash.emulated(device, contract="ptxas"):
            kernel(*operands)

    return run


unchanged = cache(lambda *asked: EmulatedKernel(compiled(*asked), asked[-1]))


@dataclass
class Launch:
    """A kernel of a subject's call, and what it is given; what kernels write is zero."""

    kernel: Any
    artifact: Artifact
    operands: tuple

    def __call__(self, *operands: Any) -> None:
        for operand, told in zip(operands, self.artifact.description["operands"], strict=True):
            if operand is not None and any(member["written"] for member in told["members"]):
                operand.zero_()
        self.operands = tuple(map(_copied, operands))

    def digested(self) -> Iterator[bytes]:
        """PTX, host code and operands. Host code: what of the object file is loaded, without its names."""
        yield self.artifact.ptx
        for section in objectfile._read_sections(self.artifact.object):
            if section.flags & objectfile._SHF_ALLOC and section.kind != objectfile._SHT_NOBITS:
                yield self.artifact.object[section.offset : section.offset + section.size]
        yield repr(self.operands).encode()


def _copied(operand: Any) -> Any:
    """An operand in plain types."""
    if isinstance(operand, tuple):
        return tuple(map(_copied, operand))
    if not isinstance(operand, torch.Tensor):
        return operand
    content = operand.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return operand.dtype, operand.shape, operand.stride(), content


def launches(subject: Subject, device: str) -> list[Launch]:
    """Every launch of a subject's calls, none of which runs."""
    found: list[Launch] = []

    def recorded(kernel, problem, tuned, gpu, route):
        found.append(Launch(kernel, compiled(subject, Step(kernel, problem, tuned), gpu), ()))
        return found[-1]

    with subject.served(device, recorded):
        for case in (subject.case, *subject.also):
            torch.manual_seed(1)  # which dropout's operands come from
            subject.run(call_of(case), device)
    return found


def dependencies(subject: Subject, device: str) -> Iterator[bytes]:
    """What a verdict on a subject, changed or not, depends on besides the change."""
    yield from proofs.emulator()
    for module in (accuracy, harness, reference):
        yield proofs.meaning(Path(module.__file__))
    yield proofs.meaning(Path(__file__))
    kernel = subject.kernel and subject.kernel.name
    yield repr((EMULATED[device], subject.case, subject.also, subject.options, kernel)).encode()
    for launch in launches(subject, device):
        yield from launch.digested()


def ptx_of(subject: Subject, device: str) -> str:
    """The PTX of the kernel that is changed."""
    found = launches(subject, device)
    ptx = next(one.artifact.ptx for one in found if subject.changes(one.kernel))
    # The compiler leaves millions of objects; collections would look through them for every change.
    gc.collect()
    gc.freeze()
    return ptx.decode()


def unnoticed(subject: Subject, device: str, mutants: list[tuple[int, str, str]]) -> list[int]:
    """Sites of the changes that nothing objects to."""
    return [n for n, _, text in mutants if not objection(subject, device, lambda _, text=text: text)]

"""The kernels that are changed, and what is first said against a changed one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import torch

from cute_flash import executable, ops
from cute_flash.arch.combine import Combine
from cute_flash.arch.problem import Device
from cute_flash.arch.sm80 import tuning as sm80
from cute_flash.arch.sm90 import tuning as sm90
from cute_flash.arch.sm100 import tuning as sm100
from cute_flash.cache import Artifact
from cute_flash.dispatch import Step
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from tests.accuracy import assert_accurate
from tests.cases import Case
from tests.harness import Call

from .mutations import CLUSTER, COPIES, LANES, MASKS, MULTICAST, QUEUE, TCGEN05, TMA, WGMMA, Mutation

# Copies and products as late as waits allow, at once, and at random, the warps then in random order too.
WATCHED = {"races": True, "by_the_book": True}
ATTEMPTS = (
    {"asynchrony": "late", **WATCHED},
    {"asynchrony": "late"},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, **WATCHED} for seed in range(3)),
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel to change. config: of its own, so that tuning does not move the sites; None: tuning's.

    combine: not the forward kernel is changed but the one that combines its splits. options: of the
    emulator, besides an attempt's. also: more calls of the same kernel.
    """

    case: Case
    config: Any
    mutations: dict[str, Mutation]
    combine: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    also: tuple[Case, ...] = ()


# One row block that walks two key blocks or more in each of its loops: those that the mask cuts on the right,
# shows whole, and cuts on the left. And one that walks one block that is cut off by the end of the keys, then
# four whole ones.
WINDOW = Case("", ((100, 450),), heads=(1, 1), mask="wide_window")
FULL = Case("", ((100, 300),), heads=(1, 1))
SPLIT = replace(FULL, seqlens=((100, 450),), splits=2)
MANY_SPLITS = replace(FULL, seqlens=((2, 1200),), splits=19)
# Where keys are split the roles wait for each other as they do otherwise; only how O leaves is another.
LEAVING = {name: TMA[name] for name in ("no wait for an mbarrier", "no arrival", "no barrier")}
LEAVING_TENSOR_MEMORY = {name: TCGEN05[name] for name in ("no commit of a product", "no wait for a load")}
COPYING_OUT = {name: TMA[name] for name in ("no fence", "no commit of a store", "no wait for a store")}
# What the CTAs of a pair tell each other; inside each, roles work as they do alone.
BETWEEN = CLUSTER | {
    name: (TMA | TCGEN05)[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "half the bytes expected", "one arrival more expected",
        "no fence", "no commit of a product", "no allocation", "no deallocation",
    )
}  # fmt: skip
# Where CTAs take several tiles roles wait for each other across tiles, too; what one warp does with tensor
# memory and with its registers, and what fences it needs, is as in one tile.
IN_ONE_TILE = (
    "no wait for a load", "no wait for a store to tensor memory", "no fence before synchronisation",
    "no fence after synchronisation", "no change of registers", "no allocation", "no permit given back",
    "no arrival at a barrier",
)  # fmt: skip
STAYING = {name: change for name, change in (TMA | TCGEN05).items() if name not in IN_ONE_TILE}
PERSISTING = Case("", ((150, 90),), heads=(3, 3), softmax_scale=4.0)
# A pair's CTAs tell each other who has read an answer.
ASKED_BETWEEN = {
    name: TMA[name]
    for name in (
        "no wait for an mbarrier", "no arrival", "half the bytes expected", "one arrival more expected",
    )
}  # fmt: skip
# Tiles of 3, 2, 3, 0 and 1 blocks that one CTA takes one after the other; one has no keys, and one no rows.
TILES = replace(
    FULL, seqlens=((100, 180), (3, 100), (70, 140), (5, 0), (0, 9), (9, 60)), varlen=True, mask="causal"
)
SUBJECTS = {
    ("sm80", "window"): Subject(WINDOW, sm80.Config(128, 64, 4, stages=1), COPIES | MASKS),
    ("sm80", "full"): Subject(FULL, sm80.Config(128, 64, 4, stages=2), COPIES | MASKS),
    ("sm80", "split"): Subject(SPLIT, sm80.Config(128, 64, 4, stages=2), COPIES),
    ("sm90", "window"): Subject(
        replace(WINDOW, seqlens=((100, 500),)), sm90.Config(2, 32, 2, 24, 240), TMA | WGMMA | MASKS
    ),
    ("sm90", "in order"): Subject(FULL, sm90.Config(2, 64, 2, 24, 240, overlap=False), TMA | WGMMA | MASKS),
    ("sm90", "persistent"): Subject(
        Case("", ((100, 200),), heads=(3, 3)), sm90.Config(2, 64, 2, 24, 240, persistent=1), TMA | WGMMA
    ),
    ("sm90", "packed"): Subject(
        Case("", ((5, 300),), heads=(8, 1)),
        sm90.Config(1, 64, 2, 24, 240, ping_pong=False, heads=8),
        TMA | WGMMA,
    ),
    ("sm90", "split"): Subject(SPLIT, sm90.Config(2, 64, 2, 24, 240), LEAVING),
    ("sm90", "combine"): Subject(MANY_SPLITS, sm90.Config(2, 64, 2, 24, 240), LANES, combine=True),
    ("sm100", "window"): Subject(
        replace(WINDOW, seqlens=((200, 340),)),
        sm100.Config(2, 1, 32, 2, 2, 6, 192, 80, 48),
        TMA | TCGEN05 | MASKS,
    ),
    ("sm100", "causal"): Subject(
        replace(FULL, dims=(128, 128), mask="causal"),
        sm100.Config(1, 2, 64, 2, 2, 4, 240, 152, 112),
        TMA | TCGEN05 | MASKS,
    ),
    ("sm100", "pair"): Subject(
        replace(FULL, seqlens=((200, 500),), mask="causal"),
        sm100.Config(1, 2, 64, 2, 2, 4, 240, 152, 112, ctas=2),
        BETWEEN,
    ),
    # Causal, so that O must be rescaled, with rows of both tiles.
    ("sm100", "split"): Subject(
        replace(SPLIT, seqlens=((150, 450),), mask="causal"),
        sm100.Config(2, 1, 64, 2, 2, 6, 192, 80, 48),
        LEAVING | LEAVING_TENSOR_MEMORY,
    ),
    # Three tiles of one CTA; all have 3 blocks, or 2 or none: each wait is needed with some number of blocks.
    # Scores are large, so that O must be rescaled.
    ("sm100", "persistent"): Subject(
        PERSISTING,
        sm100.Config(2, 1, 32, 2, 2, 6, 192, 80, 48, persistent=1),
        STAYING,
        also=tuple(replace(PERSISTING, seqlens=((150, keys),)) for keys in (60, 0)),
    ),
    ("sm100", "queue"): Subject(
        TILES,
        sm100.Config(1, 2, 64, 2, 2, 4, 240, 152, 112, dynamic=True),
        STAYING | QUEUE,
        options={"ctas_per_wave": 1},
    ),
    ("sm100", "queue pair"): Subject(
        replace(TILES, seqlens=((200, 180), (30, 100), (130, 140), (5, 0), (0, 9), (9, 60))),
        sm100.Config(1, 2, 64, 2, 2, 4, 240, 152, 112, ctas=2, dynamic=True),
        ASKED_BETWEEN | QUEUE | MULTICAST,
        options={"ctas_per_wave": 2},
    ),
    # Tiles of two heads, of which the third is alone in one.
    ("sm100", "packed"): Subject(
        Case("", ((66, 192),), heads=(3, 1), mask="causal"),
        sm100.Config(1, 2, 64, 2, 2, 4, 240, 152, 112, heads=2),
        LEAVING | COPYING_OUT | MASKS,
    ),
}


def objection(
    subject: Subject, device: str, change: Callable[[str], str], attempts: tuple[dict, ...] = ATTEMPTS
) -> str:
    """What is first said against a subject's kernel when its PTX is changed; empty where nothing is.

    The change runs until something objects: an EmulatorError, or the accuracy rule.
    """

    @cache
    def changed(kernel, problem, tuned, device, route):
        if (kernel is Combine) != subject.combine:
            return unchanged(subject, Step(kernel, problem, tuned), device)
        artifact = compiled(subject, Step(kernel, problem, tuned), device)
        ptx = change(artifact.ptx.decode())
        return EmulatedKernel(artifact._replace(ptx=ptx.encode()), device)

    calls = [Call.make(case) for case in (subject.case, *subject.also)]
    with mock.patch.object(ops, "executable", changed):
        for options, call in product(attempts, calls):
            try:
                check(call, *call.run(device, **options, **subject.options))
            except (EmulatorError, AssertionError) as error:
                return f"{type(error).__name__}: {error}"
    return ""


RIGHT: dict[Case, tuple[torch.Tensor, torch.Tensor]] = {}


def check(call: Call, *results: torch.Tensor) -> None:
    """Hold results to the accuracy rule, unless they are those that have passed it before, bit for bit."""
    right = RIGHT.get(call.case)
    if right is None or not all(torch.equal(a, b) for a, b in zip(results, right, strict=True)):
        assert_accurate(*results, tuple(call.tensors.values()), **call.arguments)
        RIGHT[call.case] = results


def compiled(subject: Subject, step: Step, device: Device) -> Artifact:
    """A kernel of a subject's call."""
    config = step.config if step.kernel is Combine or subject.config is None else subject.config
    return executable.artifact(step.kernel, step.problem, config, device)


unchanged = cache(lambda *asked: EmulatedKernel(compiled(*asked), asked[-1]))


@cache
def ptx_of(key: tuple[str, str]) -> str:
    """The PTX of the kernel that is changed."""
    seen = []
    subject = SUBJECTS[key]
    found = objection(subject, key[0], lambda ptx: seen.append(ptx) or ptx, ATTEMPTS[2:3])
    assert not found, found
    # The compiler leaves millions of objects; collections would look through them for every change.
    gc.collect()
    gc.freeze()
    return seen[0]


def unnoticed(key: tuple[str, str], name: str) -> dict[int, str]:
    """The changes of one kind that nothing objects to: number of the site -> its line."""
    subject = SUBJECTS[key]
    return {
        number: line
        for number, line, text in subject.mutations[name].mutants(ptx_of(key))
        if not objection(subject, key[0], lambda ptx, text=text: text)
    }

"""The stages of a report, in order. A stage is a module with

    SECONDS                                its time box on a GPU
    CANDIDATES                             whether its jobs say which candidate they try, and do without one
    jobs(settings) -> list[Job]            what there is to do; imports nothing of CUDA
    run(job, settings, say) -> Iterator    rows, yielded by the worker process as they are found
    markdown(rows, data) -> str            its part of the written report; data: the whole record's
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..worker import Job, Settings

NAMES = ("environment", "correctness", "speed", "counters", "sanitizer", "vectors")
BAD = ("failed", "crashed", "timed out")


def module(stage: str) -> ModuleType:
    """The stage's module."""
    return importlib.import_module(f"{__name__}.{stage}")


def seconds(stage: str) -> float:
    """The stage's time box."""
    return module(stage).SECONDS


def names_candidates(stage: str) -> bool:
    """Whether a job of the stage can be run again without a candidate that crashed."""
    return module(stage).CANDIDATES


def jobs(stage: str, settings: Settings) -> list[Job]:
    """What the stage has to do."""
    return module(stage).jobs(settings)


def chosen(names: list[str]) -> list[str] | str:
    """The stages of these names, in a report's order; or what is wrong with a name."""
    for name in names:
        if name not in NAMES:
            return f"no stage {name!r}; allowed: {', '.join(NAMES)}"
    return [name for name in NAMES if name in names]


def unknown_cases(names: list[str]) -> str:
    """What is wrong with these names of cases, or ""."""
    from tests.cases import CASES

    for name in names:
        if name not in CASES:
            return f"no case {name!r}; allowed: {', '.join(CASES)}"
    return ""

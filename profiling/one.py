"""python -m profiling one: a single call, for tools that watch a process, and for first calls.

    --case NAME    a case of tests/cases.py, held to the accuracy rule
    --row KEY      a row of the speed sweep, such as d128-causal-s8192
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from . import measure


def main(arguments: list[str]) -> int:
    """Make the call; 0 where it went well, 2 where a name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m profiling one", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", metavar="NAME")
    what.add_argument("--row", metavar="KEY")
    parser.add_argument("--machine", default=measure.CUDA, help="cuda, or an architecture to emulate")
    parser.add_argument("--races", action="store_true", help="on the emulator: look for data races")
    parser.add_argument("--kernel", metavar="NAME", help="such as sm80.forward; default: the first choice")
    parser.add_argument("--json", action="store_true", help="print the seconds of a first and a second call")
    chosen = parser.parse_args(arguments)
    import torch

    from cute_flash.dispatch import only

    options = {"races": True} if chosen.races and chosen.machine != measure.CUDA else {}
    try:
        with torch.no_grad(), only(chosen.kernel):
            seconds = (_case if chosen.case else _row)(chosen.case or chosen.row, chosen.machine, options)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps(seconds))
    return 0


def _case(name: str, machine: str, options: dict) -> dict[str, float]:
    from tests.cases import CASES
    from tests.harness import Call

    if name not in CASES:
        raise KeyError(f"no case {name!r}; allowed: {', '.join(CASES)}")
    return _twice(lambda: Call.make(CASES[name]).check(machine, **options), machine)


def _row(key: str, machine: str, options: dict) -> dict[str, float]:
    import torch

    import cute_flash
    from tests.harness import where

    row, device = measure.row_named(key), measure.torch_device(machine)
    inputs = row.tensors(device, torch.Generator(device).manual_seed(0))
    with where(machine, **options):
        return _twice(lambda: cute_flash.flash_attn_func(*inputs, causal=row.causal), machine)


def _twice(function, machine: str) -> dict[str, float]:
    seconds = {}
    for which in ("first call", "second call"):
        measure.synchronize(machine)
        before = time.perf_counter()
        function()
        measure.synchronize(machine)
        seconds[which] = time.perf_counter() - before
    return seconds

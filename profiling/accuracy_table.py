"""python -m profiling accuracy: what formats of few bits cost, by models of the kernels' arithmetic.

Attention's is accuracy.py, that of gradients, which no kernel computes in few bits, gradient_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import accuracy, gradient_accuracy
from .accuracy import ACCUMULATORS, FEW, HEAD_DIM, INPUTS, SEQLEN, SINK
from .plots import Axis, Line, svg
from .record import RESULTS, write_whole

JSON = RESULTS / "accuracy.json"
# FlashAttention-3's own figures, whose shape is not stated (table 3): FP8 with one scale, without the
# Hadamard transform, and with everything.
PUBLISHED = {"FP8 per head": 2.4e-2, "FP8 block 128": 2.4e-2, "FP8 Hadamard": 9.3e-3,
             "FP8 block 128, Hadamard": 9.1e-3}  # fmt: skip

TABLE = f"""\
`python -m profiling accuracy`, plain torch on a CPU; `profiling/accuracy.py` says what is computed: root
mean square errors against float64, {SEQLEN} keys, head dim {HEAD_DIM}; sm100: as Blackwell's kernel computes,
the others as Hopper's does, or would. Outliers: normal(0, 1) +
normal(0, 10²) with probability 0.001. Sink: one key without a value whose scores are {SINK:.0f} above
the others'. Published: FlashAttention-3's figures for outliers, on hardware, at a shape that is not
stated: the errors with the transform are reproduced, those without it come out lower.
"""
ACCUMULATORS_TABLE = f"""\
Errors relative to the result, in percent, FP8 per head with Hadamard, {FEW} queries; values have mean 1,
so that P V grows with the number of keys. Hopper: 13 fraction bits, cut (the emulator's
`fp8_accumulator`); taken over: added to float32 registers every so many tiles of 128 keys, which
`promotion` of the FP8 kernel's config says.
"""


def main(arguments: list[str]) -> int:
    """Compute everything, print it, and keep it in results/accuracy.json, .md and .svg."""
    argparse.ArgumentParser(prog="python -m profiling accuracy", description=__doc__).parse_args(arguments)
    data = {"schemes": list(accuracy.schemes()), "accumulators": list(accuracy.accumulators())}
    data["gradients"] = list(gradient_accuracy.rows())
    write_whole(JSON, json.dumps(data, indent=1) + "\n")
    write_whole(JSON.with_suffix(".svg"), picture(data))
    write_whole(JSON.with_suffix(".md"), markdown(data))
    print(markdown(data))
    return 0


def picture(data: dict[str, Any]) -> str:
    """Errors over the number of keys, a line per accumulator."""
    lines = [
        Line(name, [(row["keys"], 100 * row["relative"]) for row in data["accumulators"]
                    if row["accumulator"] == name])
        for name in ACCUMULATORS
    ]  # fmt: skip
    return svg("FP8 attention, values of mean 1", Axis("keys", True), Axis("error, %", True), lines)


def markdown(data: dict[str, Any]) -> str:
    """The tables, with what others found."""
    by_scheme: dict[str, dict[str, float]] = {}
    for row in data["schemes"]:
        by_scheme.setdefault(row["scheme"], {})[row["inputs"]] = row["rmse"]
    lines = [
        "# What formats of few bits cost: a model, not a measurement of kernels",
        "",
        *TABLE.splitlines(),
        "",
        f"| scheme | {' | '.join(INPUTS)} | outliers, published |",
        f"| --- |{' --: |' * (len(INPUTS) + 1)}",
    ]
    for name, errors in by_scheme.items():
        cells = [f"{errors[kind]:.2e}" for kind in INPUTS]
        cells.append(f"{PUBLISHED[name]:.1e}" if name in PUBLISHED else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    keys = list(dict.fromkeys(row["keys"] for row in data["accumulators"]))
    lines += [
        "",
        "## Accumulators",
        "",
        *ACCUMULATORS_TABLE.splitlines(),
        "",
        f"| accumulator | {' | '.join(f'{n} keys' for n in keys)} |",
        f"| --- |{' --: |' * len(keys)}",
    ]
    for name in ACCUMULATORS:
        found = {row["keys"]: row["relative"] for row in data["accumulators"] if row["accumulator"] == name}
        lines.append(f"| {name} | {' | '.join(f'{100 * found[n]:.2f}' for n in keys)} |")
    lines += ["", "![errors over the number of keys](accuracy.svg)", ""]
    return "\n".join([*lines, *gradient_accuracy.markdown(data["gradients"])]) + "\n"

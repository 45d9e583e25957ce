"""Single instructions on the hardware, in files that the emulator's tests can hold it to.

    hardware.npz           the cases of tests/emulator/vectors, whose results are exact: to be put there
    vectors-<machine>.npz  products of random numbers, approximations: the emulator's distance is told in ulps
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import measure, vectors
from ..worker import Job, Settings

SECONDS = 60.0
CANDIDATES = False


def jobs(settings: Settings) -> list[Job]:
    """One job per exact case, then one per instruction and domain of inputs."""
    from tests.emulator.vectors.cases import CASES

    return [
        *(Job(f"exact {name}", {"kind": "exact", "name": name}) for name in CASES),
        *(
            Job(f"{name} {domain}", {"kind": "ulps", "name": name, "domain": domain})
            for name in vectors.INSTRUCTIONS
            for domain in vectors.DOMAINS
        ),
    ]


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """How far the emulator is from the machine; the results go to a file beside the record."""
    if job.payload["kind"] == "exact":
        yield exact(job.payload["name"], settings)
    else:
        yield ulps(vectors.INSTRUCTIONS[job.payload["name"]], job.payload["domain"], settings)


def exact(name: str, settings: Settings) -> dict[str, Any]:
    """A case of tests/emulator/vectors, in the format of its hardware.npz."""
    import numpy as np

    from tests.emulator.evaluate import evaluate
    from tests.emulator.vectors.cases import CASES
    from tests.emulator.vectors.record import Gpu

    case = CASES[name]
    emulated = evaluate(case.code, *case.inputs, outputs=case.outputs, target=case.target, block=case.block)
    if settings.machine != measure.CUDA:
        path, found, device = Path(settings.out) / f"exact-{machine_name(settings)}.npz", emulated, "none"
    else:
        gpu = Gpu()
        path, found, device = Path(settings.out) / "hardware.npz", gpu.run(case), gpu.capability()
    arrays = {f"{name}:{k}": array for k, array in enumerate(found)}
    vectors.add_to_file(path, {"device": np.array(device), **arrays})
    differ = 0
    for ours, theirs in zip(emulated, found, strict=True):
        apart = ours != theirs
        if case.any_nan:
            apart &= ~(np.isnan(ours.view(np.float32)) & np.isnan(theirs.view(np.float32)))
        differ += int(apart.sum())
    row = {"kind": "exact", "file": path.name, "lanes": len(case.inputs[0]), "different": differ}
    return row | ({"state": "failed", "error": f"{differ} results differ"} if differ else {})


def ulps(instruction: vectors.Instruction, domain: str, settings: Settings) -> dict[str, Any]:
    """An instruction on random numbers."""
    given = vectors.inputs(instruction, domain)
    on_gpu = settings.machine == measure.CUDA
    found = (vectors.on_gpu if on_gpu else vectors.on_emulator)(instruction, given)
    path = Path(settings.out) / f"vectors-{machine_name(settings)}.npz"
    stem = f"{instruction.name}|{domain}"
    vectors.add_to_file(path, {f"{stem}|in": given, f"{stem}|out": found})
    row: dict[str, Any] = {"kind": "ulps", "file": path.name, "lanes": len(given)}
    if on_gpu:
        apart = vectors.distance(instruction, found, vectors.on_emulator(instruction, given))
        row |= {"largest ulps": int(apart.max()), "share different": float((apart > 0).mean())}
    return row


def machine_name(settings: Settings) -> str:
    """A word for the machine, for a file's name."""
    if settings.machine != measure.CUDA:
        return f"emulated-{settings.machine}"
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """The exact cases in a line, unless they differ; a line per instruction and domain of the others."""
    well = [row for row in rows if row["state"] == "ok"]
    lines = [f"* exact cases equal on the emulator: {sum(row['kind'] == 'exact' for row in well)}"]
    lines += [f"* {row['key']}: {row['state']}, {row['error']}" for row in rows if row["state"] != "ok"]
    lines += ["", "| instruction, inputs | lanes | emulator's largest distance, ulps | results that differ |"]
    lines += ["|---|---|---|---|"]
    for row in well:
        if "largest ulps" in row:
            figures = f"{row['largest ulps']} | {row['share different']:.2%}"
            lines.append(f"| {row['key']} | {row['lanes']} | {figures} |")
        elif row["kind"] == "ulps":
            lines.append(f"| {row['key']} | {row['lanes']} | the emulator itself | |")
    return "\n".join(lines)

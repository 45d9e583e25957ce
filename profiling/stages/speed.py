"""The field's sweep beside its peers, forward and, if asked, backward; host time, first calls, memory over N.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .. import measure
from ..tools import run_tool
from ..worker import Job, Settings, exit_if_lost, in_words

SECONDS = 420.0
CANDIDATES = True
HOST_CALLS, DRY_HOST_CALLS = 200, 2
HOST_SEQLEN = 128
MEMORY_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MEMORY_PEERS = ("cute_flash", "torch flash", "torch math")
FIRST_CALL_ROW = "d128-causal-s1024"


def called(dry_run: bool) -> list[measure.Row]:
    """Every row that some job here calls: the sweep's, the host's and memory's."""
    memory = [memory_row(seqlen, dry_run) for seqlen in memory_seqlens(dry_run)]
    return [*measure.sweep(dry_run), host_row(dry_run), *memory]


def host_row(dry_run: bool) -> measure.Row:
    """A shape that takes the GPU less than a call takes the host."""
    return measure.Row(64, 64, True, 64 if dry_run else HOST_SEQLEN, 1, 1)


def memory_row(seqlen: int, dry_run: bool) -> measure.Row:
    """16 heads of 128, one sequence, causal."""
    dim, heads = (64, 1) if dry_run else (128, measure.HIDDEN // 128)
    return measure.Row(dim, dim, True, seqlen, 1, heads)


def memory_seqlens(dry_run: bool) -> tuple[int, ...]:
    return (64, 96) if dry_run else MEMORY_SEQLENS


def jobs(settings: Settings) -> list[Job]:
    """The sweep's rows, the ones that decide most first; then the host's time and memory."""
    rows = measure.sweep(settings.dry_run)
    if settings.backward:
        rows += [replace(row, backward=True) for row in rows]
    memory = memory_seqlens(settings.dry_run)
    return [
        *(Job(row.key, {"kind": "row", "row": row}, seconds=90.0) for row in rows),
        Job("host time per call", {"kind": "host"}),
        Job("first call", {"kind": "first"}),
        *(Job(f"memory at {n}", {"kind": "memory", "seqlen": n}) for n in memory),
    ]


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One row per job."""
    kind, without = job.payload["kind"], job.payload.get("without", {})
    if kind == "row":
        yield measure_row(job.payload["row"], settings, without, say)
    elif kind == "host":
        yield host_time(settings, without, say)
    elif kind == "first":
        yield first_call(settings, job.seconds)
    else:
        yield memory(job.payload["seqlen"], settings, without, say)


def measure_row(
    row: measure.Row, settings: Settings, without: dict[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Every peer that can serve the row: checked against the reference, then timed with the others in turn.

    without: peers that brought down an earlier try, and how.
    """
    from cute_flash import supports
    from cute_flash.masks import Causal
    from tests.harness import where

    from .. import peers

    inputs = measure.input_sets(row, settings.machine)
    with where(settings.machine):
        found, runs = candidates(row, settings, inputs, without, say)
        repeats = measure.DRY_REPEATS if settings.dry_run else measure.REPEATS
        times = measure.interleaved(runs, settings.machine, repeats, say) if runs else {}
        mask = Causal() if row.causal else None
        chosen = supports("bfloat16", row.head_dim, row.head_dim_v, mask=mask, backward=row.backward)
        found[peers.OURS]["kernel"] = chosen.kernel.name if chosen else str(chosen)
    for name, measured in times.items():
        found[name] |= {
            "seconds": measured.median,
            "spread": [measured.low, measured.high],
            "count": measured.count,
            "tflops": row.flops / measured.median / 1e12,
        }
    return {
        "kind": "row",
        "flops": row.flops,
        "shape": {name: getattr(row, name) for name in row.__dataclass_fields__},
        "kernel": f"{chosen.kernel.name} {chosen.config}" if chosen else str(chosen),
        "peers": found,
        **compared(found),
    }


def candidates(
    row: measure.Row, settings: Settings, inputs: list, without: dict[str, str], say: Callable[[str], None]
) -> tuple[dict[str, dict], dict[str, Any]]:
    """(what is known of each peer, functions of those whose output was right)."""
    from .. import peers

    others = {peers.kernel_name(kernel): kernel for kernel in settings.others}
    found: dict[str, dict[str, Any]] = {}
    runs = {}
    oracle = (measure.GradientOracle if row.backward else measure.Oracle)(inputs[0], row.causal)
    for name in (peers.OURS, *others, *(name for name in peers.PEERS if name != peers.OURS)):
        if name in without:
            found[name] = {"state": "crashed", "error": without[name]}
            continue
        if row.seqlen > (longest := peers.LONGEST_TIMED.get(name, row.seqlen)):
            found[name] = {"state": "missing", "error": f"not timed beyond {longest} tokens"}
            continue
        say(name)
        try:
            run = peers.prepare(name, row, settings.machine, inputs)
            found[name] = {"state": "ok", "error of out": oracle.check(run(0))}
            runs[name] = run
            if name in others:
                found[name]["kernel"] = others[name]
        except peers.Missing as reason:
            found[name] = {"state": "missing", "error": str(reason)}
        except Exception as error:
            found[name] = {"state": "failed", "error": in_words(error)}
            exit_if_lost(settings)
    say("")
    return found, runs


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our speed over the best peer's, and over FlashAttention-2's, which is torch's flash back end."""
    from ..peers import OURS, kernel_name

    timed = {name: peer["tflops"] for name, peer in found.items() if "tflops" in peer}
    speeds = {name: speed for name, speed in timed.items() if not name.startswith(kernel_name(""))}
    ours = speeds.pop(OURS, None)
    if ours is None or not speeds:
        return judged(found)
    best = max(speeds, key=lambda name: speeds[name])
    ratios = {"best peer": best, "ratio to best": ours / speeds[best]}
    if "torch flash" in speeds:
        ratios["ratio to FA2"] = ours / speeds["torch flash"]
    return ratios


def judged(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The state of a row of everyone's: ours decides, where there is one."""
    from ..peers import OURS

    ours = found[OURS]
    well = ours["state"] in ("ok", "missing")
    return {} if well else {"state": "failed", "error": f"{OURS}: {ours['error']}"}


def host_time(settings: Settings, without: dict[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """Microseconds that the host spends in a call."""
    from tests.harness import where

    dry, row = settings.dry_run, host_row(settings.dry_run)
    inputs = measure.input_sets(row, settings.machine)[:2]
    with where(settings.machine):
        found, runs = candidates(row, settings, inputs, without, say)
        for name, run in runs.items():
            say(name)
            seconds = measure.host_seconds(run, settings.machine, DRY_HOST_CALLS if dry else HOST_CALLS)
            found[name]["microseconds"] = seconds * 1e6
    return {"kind": "host", "peers": found, **judged(found)}


def first_call(settings: Settings, seconds: float) -> dict[str, Any]:
    """Seconds of the first call in a fresh process, imports not counted.

    cold: it compiles; from the cache: another process has; from the bundle: where one is named. What cannot
    be had, as a compiler, has its reason in place of a number.
    """
    bundle = os.environ.get("CUTE_FLASH_BUNDLE")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for how in ("cold", "from the cache"):
            own = {"CUTE_FLASH_CACHE": cache, "CUTE_FLASH_BUNDLE": ""}
            found[how] = _fresh_process(settings, own, seconds)
            if isinstance(found[how], str):
                break
    if bundle:
        named = {"CUTE_FLASH_CACHE": "0", "CUTE_FLASH_BUNDLE": bundle}
        found["from the bundle"] = _fresh_process(settings, named, seconds)
    return {"kind": "first", "seconds": found}


def _fresh_process(settings: Settings, environment: dict[str, str], seconds: float) -> float | str:
    """Seconds of the first call, or the last words of a process that failed."""
    row = measure.sweep(dry_run=True)[0].key if settings.dry_run else FIRST_CALL_ROW
    one = [sys.executable, "-m", "profiling", "one", "--machine", settings.machine, "--json", "--row", row]
    answer = run_tool(one, seconds / 4, environment)
    if answer.status:
        return (answer.err.strip().splitlines() or ["no message"])[-1][:400]
    return json.loads(answer.out.splitlines()[-1])["first call"]


def memory(
    seqlen: int, settings: Settings, without: dict[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Bytes that a call allocates at its peak, inputs not counted."""
    import torch

    from tests.harness import where

    from .. import peers

    row = memory_row(seqlen, settings.dry_run)
    device = measure.torch_device(settings.machine)
    inputs = [row.tensors(device, torch.Generator(device).manual_seed(0))]
    found: dict[str, dict[str, Any]] = {}
    with where(settings.machine):
        for name in MEMORY_PEERS:
            if name in without:
                found[name] = {"state": "crashed", "error": without[name]}
                continue
            say(name)
            try:
                run = peers.prepare(name, row, settings.machine, inputs)
                found[name] = {"state": "ok", "bytes": peak(run, settings.machine)}
            except peers.Missing as reason:
                found[name] = {"state": "missing", "error": str(reason)}
            except Exception as error:
                found[name] = {"state": "failed", "error": in_words(error)}
                exit_if_lost(settings)
    say("")
    if settings.machine == measure.CUDA:
        torch.cuda.empty_cache()  # the whole score matrix of a long sequence takes most of the GPU
    return {"kind": "memory", "seqlen": seqlen, "peers": found, **judged(found)}


def peak(run: Callable[[int], Any], machine: str) -> int | None:
    """Bytes allocated at the peak of a call, by torch's count; None where no GPU counts."""
    import torch

    if machine != measure.CUDA:
        run(0)
        return None
    run(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(0)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del out
    return found


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """TFLOP/s of everyone per row, ratios and their geometric mean; then the host's time and memory."""
    measured = [row for row in rows if row.get("kind") == "row"]
    lines = [table(measured, data)]
    for name in ("ratio to best", "ratio to FA2"):
        if ratios := [row[name] for row in measured if name in row]:
            mean = statistics.geometric_mean(ratios)
            lines += ["", f"geometric mean of the {name}: {mean:.3f} over {len(ratios)} rows"]
    lines += ["", *_absent(measured), "", *_others(rows)]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """TFLOP/s of everyone, a line per row of the sweep. data: the whole record's."""
    from ..peers import PEERS

    environment = data["stages"].get("environment", {}).get("rows", [])
    ceiling = next((row["rate"] for row in environment if row["key"] == "bf16 GEMM" and "rate" in row), None)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"])) or list(PEERS)
    titles = ["row", *names, "best peer", "ours / best", "ours / FA2", "ours / GEMM"]
    lines = ["TFLOP/s at the median time (10 % to 90 % of the times, in percent of the median)", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(_line(row, names, ceiling) for row in sorted(rows, key=_order))])


def _order(row: dict[str, Any]) -> tuple:
    shape = row["shape"]
    backward = shape.get("backward", False)
    return backward, shape["head_dim"], shape["head_dim_v"], shape["causal"], shape["seqlen"]


def _line(row: dict[str, Any], names: list[str], ceiling: float | None) -> str:
    cells = []
    for name in names:
        peer = row["peers"].get(name, {"state": "not tried"})
        if "tflops" in peer:
            low, high = peer["spread"]
            cells.append(f"{peer['tflops']:.4g} ({(high - low) / peer['seconds']:.1%})")
        else:
            cells.append(peer["state"])
    ratios = [f"{row[name]:.3f}" if name in row else "–" for name in ("ratio to best", "ratio to FA2")]
    ours = row["peers"][names[0]].get("tflops")
    share = f"{ours / ceiling:.1%}" if ours and ceiling else "–"
    return f"| {' | '.join([row['key'], *cells, row.get('best peer', '–'), *ratios, share])} |"


def _absent(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each peer and reason why it was not measured, and the rows."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if peer["state"] != "ok":
                reasons.setdefault((name, peer["state"], peer["error"]), []).append(row["key"])
    for (name, state, error), keys in reasons.items():
        where = "all rows" if len(keys) == len(rows) else ", ".join(keys)
        yield f"* {name}: {state}, {error} ({where})"


def _others(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["state"] != "ok" and row.get("kind") != "row":
            yield f"* {row['key']}: {row['state']}, {row['error']}"
        elif row["kind"] == "host":
            known = ((name, p["microseconds"]) for name, p in row["peers"].items() if "microseconds" in p)
            yield "* host µs per call: " + ", ".join(f"{name} {value:.1f}" for name, value in known)
        elif row["kind"] == "first":
            for how, value in row["seconds"].items():
                yield f"* first call, {how}: {value if isinstance(value, str) else f'{value:.3f} s'}"
        elif row["kind"] == "memory":
            known = (f"{name} {_mebibytes(peer)}" for name, peer in row["peers"].items())
            yield f"* peak MiB at {row['seqlen']} tokens: " + ", ".join(known)


def _mebibytes(peer: dict[str, Any]) -> str:
    if peer["state"] != "ok":
        return peer["state"]
    return "not counted" if peer["bytes"] is None else f"{peer['bytes'] / 2**20:.1f}"

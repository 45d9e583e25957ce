"""The report: each stage in a dry run, and what happens when something is unknown, missing, slow or crashes.

This module is also a stage, for the tests of the worker: its `run` does what a job's key says.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cute_flash
from cute_flash import cuda_devices
from profiling import measure, ncu, peers, plots, report, stages, tools, vectors
from profiling.__main__ import main as profiling
from profiling.record import FORMAT, Record, read, reports, write_whole
from profiling.stages import correctness, sanitizer, speed
from profiling.worker import Job, Settings, Worker

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = Settings("sm80", True, "unused")
FACTS = {"machine": "emulated sm80", "dry_run": True, "command": "test"}
SECONDS, CANDIDATES = 20.0, True


def jobs(settings: Settings) -> list[Job]:
    return [Job("well"), Job("crash"), Job("raise"), Job("nan"), Job("hang", seconds=1.0)]


def run(job, settings, say):
    """A row, an exception, a crash at a candidate, or nothing for a long time."""
    say("candidate")
    if job.key == "raise":
        raise ValueError("as asked\nand more")
    if job.key == "crash" and "candidate" not in job.payload.get("without", {}):
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.key == "hang":
        time.sleep(60)
    yield {"value": float("nan") if job.key == "nan" else 1.0, **job.payload}


def markdown(rows, data):
    return "\n".join(row["state"] for row in rows)


@pytest.fixture(scope="module")
def worker():
    worker = Worker(SETTINGS)
    yield worker
    worker.close()


def test_dry_run(tmp_path):
    """One run, as it takes a while, and everything that it should leave."""
    command = [sys.executable, "-m", "profiling", "report", "--dry-run", "--out", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (path,) = tmp_path.glob("*.json")
    data, text = read(path), path.with_suffix(".md").read_text()
    went_through_every_stage(data, text)
    named_what_is_missing(data, text)
    left_pictures_vectors_and_counters(tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "[speed 1/" in answer.stderr and "left)" in answer.stderr


def went_through_every_stage(data: dict, text: str) -> None:
    bad = [row for entry in data["stages"].values() for row in entry["rows"] if row["state"] in stages.BAD]
    assert bad == []
    assert list(data["stages"]) == list(stages.NAMES)
    for stage, entry in data["stages"].items():
        assert entry["state"] == "done" and entry["left"] == [], stage
        assert {row["key"] for row in entry["rows"]} == {job.key for job in stages.jobs(stage, SETTINGS)}
        assert f"## {stage}: done" in text
    assert "dry run" in text


def named_what_is_missing(data: dict, text: str) -> None:
    row = next(row for row in data["stages"]["speed"]["rows"] if row.get("kind") == "row")
    assert set(row["peers"]) == set(peers.PEERS)
    assert row["peers"]["cute_flash"]["state"] == "ok" and row["peers"]["torch math"]["state"] == "ok"
    absent = {name: peer["error"] for name, peer in row["peers"].items() if peer["state"] != "ok"}
    assert "torch cudnn" in absent and all(absent.values())
    assert all(f"* {name}: missing" in text for name in absent)


def left_pictures_vectors_and_counters(directory: Path) -> None:
    names = {file.name for file in directory.iterdir()}
    assert {"vectors-emulated-sm80.npz", "ncu-row-d64-full-s64.csv"} <= names
    assert sum(name.endswith(".svg") for name in names) == 2
    kept = directory / "vectors-emulated-sm80.npz"
    assert kept.stat().st_size < 1 << 20
    with np.load(kept) as file:
        for instruction in vectors.INSTRUCTIONS.values():
            given, found = (file[f"{instruction.name}|normal|{side}"] for side in ("in", "out"))
            assert given.shape == (256, instruction.inputs) and found.shape == (256, instruction.outputs)


def test_without_a_gpu_it_says_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(report, "ASK", "import sys; sys.exit('no driver')")
    assert report.gpu() is None
    assert profiling(["report"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_gpu_is_told_by_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(report, "ASK", "print('warning'); print('[\"NVIDIA H200\", 9, 0, 232448]')")
    name, device = report.gpu()
    assert name == "NVIDIA H200" and report.kernels_of(device) == ("sm90.forward", "sm80.forward")


def test_every_kernel_that_is_listed_has_its_rows():
    settings = replace(SETTINGS, machine="sm90", kernels=("sm90.forward", "sm80.forward"))
    for stage in ("correctness", "sanitizer"):
        keys = {job.key for job in stages.jobs(stage, settings)}
        alone = {job.key for job in stages.jobs(stage, replace(settings, kernels=("sm90.forward",)))}
        assert keys == alone | {f"{key} (sm80.forward)" for key in alone}
    job = Job("x", {"kind": "case", "case": "bfloat16", "kernel": "no such kernel"})
    (row,) = correctness.run(job, settings, lambda text: None)
    assert row["state"] == "missing" and "only no such kernel is asked for" in row["error"]
    row = measure.Row(64, 64, True, 48, 1, 1)
    found = speed.measure_row(row, settings, {}, lambda text: None)
    assert found["kernel"].startswith("sm90.forward")
    ours = {name: peer for name, peer in found["peers"].items() if name.startswith("cute_flash")}
    told = {name: peer["kernel"] for name, peer in ours.items()}
    assert told == {"cute_flash": "sm90.forward", "cute_flash sm80.forward": "sm80.forward"}
    assert "sm80" not in found["best peer"], "a kernel of ours is no peer"
    with pytest.raises(peers.Missing, match="only gone is asked for"), cute_flash.emulated("sm90"):
        peers.prepare("cute_flash gone", row, "sm90", [])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["report", "--stages", "speed,sped"], "no stage 'sped'; allowed: environment, correctness, speed"),
        (["report", "--case", "nothing"], "no case 'nothing'; allowed: bfloat16, float16"),
        (["one", "--case", "nothing"], "no case 'nothing'; allowed: bfloat16"),
        (["one", "--row", "d1"], "no row 'd1'; allowed: d128-causal-s8192"),
        (["ncu", "--row", "d1"], "no row 'd1'"),
        (["ncu", "--case", "nothing", "--print"], "no case 'nothing'"),
        (["pack", "DIR", "--arch", "sm1"], "--arch is sm1; allowed: sm80"),
        (["nonsense"], "no measurement 'nonsense'"),
        ([], "report"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, expected, capsys):
    assert profiling(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_crash_costs_its_row(worker, tmp_path, monkeypatch):
    """Of a stage's jobs one crashes at a candidate and is repeated without it, one raises, one hangs."""
    monkeypatch.setattr(stages, "module", lambda stage: sys.modules[__name__])
    record = Record(tmp_path / "a.json", FACTS)
    report._run_stage(record, worker, "speed", 60.0)
    rows = {row["key"]: row for row in read(record.path)["stages"]["speed"]["rows"]}
    assert rows["well"]["state"] == "ok" and rows["well"]["value"] == 1.0
    assert rows["crash"]["state"] == "ok"
    assert rows["crash"]["without"] == {"candidate": "crashed: killed by SIGSEGV"}
    assert (rows["raise"]["state"], rows["raise"]["error"]) == ("failed", "ValueError: as asked")
    assert rows["nan"]["value"] == "nan"
    assert rows["hang"]["state"] == "timed out"
    assert report._judge(record, ["speed"]) == 1
    assert Record(record.path).done("speed", "well") and not record.done("speed", "raise")


def test_a_crash_of_what_cannot_be_left_out(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "module", lambda stage: sys.modules[__name__])
    monkeypatch.setattr(stages, "names_candidates", lambda stage: False)
    record = Record(tmp_path / "a.json", FACTS)
    record.begin("speed")
    report._run_job(record, worker, "speed", Job("crash"), time.monotonic() + 60)
    (row,) = record.rows("speed")
    assert row == {"key": "crash", "state": "crashed", "error": "killed by SIGSEGV, at candidate"}


def test_a_stage_keeps_to_its_time(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "module", lambda stage: sys.modules[__name__])
    record = Record(tmp_path / "a.json", FACTS)
    report._run_stage(record, worker, "speed", 0.0)
    entry = read(record.path)["stages"]["speed"]
    assert (entry["state"], entry["rows"]) == ("cut short", [])
    assert entry["left"] == ["well", "crash", "raise", "nan", "hang"]


def test_interrupted_it_leaves_valid_json_and_resumes(tmp_path, capsys):
    base = [sys.executable, "-m", "profiling", "report", "--dry-run"]
    command = [*base, "--stages", "environment,vectors", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("[environment 1/5]"):
            process.send_signal(signal.SIGTERM)
            break
    assert process.wait(30) == report.INTERRUPTED
    process.stderr.close()
    (path,) = tmp_path.glob("*.json")
    entry = read(path)["stages"]["environment"]
    assert entry["state"] == "interrupted" and entry["left"]
    kept = {row["key"] for row in entry["rows"] if row["state"] == "ok"}
    answer = subprocess.run([*base, "--stages", "environment", "--resume", str(path)], cwd=ROOT, text=True,
                            capture_output=True)
    entry = read(path)["stages"]["environment"]
    assert answer.returncode == 0 and entry["state"] == "done" and len(entry["rows"]) == 5
    assert not any(f"] {key}:" in answer.stderr for key in kept)
    assert profiling(["report", "--dry-run", "--arch", "sm90", "--resume", str(path)]) == 2
    assert "is of 'emulated sm80', this is 'emulated sm90'" in capsys.readouterr().err


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "second")
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 1
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(ValueError, match="not a report of format"):
        read(path)


def test_the_field_s_sweep():
    rows = {row.key: row for row in measure.sweep()}
    assert len(rows) == 4 * 2 * 7
    row = rows["d128-causal-s8192"]
    assert (row.batch, row.heads, row.flops) == (2, 16, 2 * 8192**2 * 256 * 16 * 2 // 2)
    assert rows["d64-full-s512"].heads == 32 and rows["d64-full-s512"].batch == 32
    assert rows["d192-128-full-s32768"].flops == 2 * 32768**2 * 320 * 16


def test_the_sampled_oracle_notices_a_wrong_row():
    row = measure.Row(64, 64, True, 40, 2, 2)
    inputs = row.tensors("cpu", torch.Generator().manual_seed(0))
    heads_first = (x.transpose(1, 2) for x in inputs)
    right = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    oracle = measure.Oracle(inputs, causal=True)
    assert oracle.check(right) < 0.02
    with pytest.raises(AssertionError, match="out: error"):
        measure.Oracle(inputs, causal=False).check(right)
    for wrong, message in ((right * 1.1, "error"), (right[:, 1:], "shape"), (right / 0, "not finite")):
        with pytest.raises(AssertionError, match=message):
            oracle.check(wrong)


class Clock:
    """Stands in for a GPU's time line: kernels take as long as they say, in the order of their launch."""

    now, launched = 0.0, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Clock.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    @classmethod
    def kernel(cls, name, seconds):
        def launch(i):
            cls.now += seconds
            cls.launched.append(name)

        return launch


def test_on_a_gpu_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    spins = []
    sleep = lambda cycles: (Clock.launched.append("spin"), spins.append(cycles))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpus = [cuda_devices.Gpu("", (9, 0), 132, 232448, clock) for clock in (1, 10**9)]
    monkeypatch.setattr(cuda_devices, "gpus", lambda: gpus)
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    functions = {name: Clock.kernel(name, n * 1e-3) for n, name in enumerate("abc", start=1)}
    said = []
    times = measure.interleaved(functions, measure.CUDA, 4, said.append)
    assert said == ["a", "b", "c", ""]
    assert {name: round(t.median, 6) for name, t in times.items()} == {"a": 1e-3, "b": 2e-3, "c": 3e-3}
    assert {t.count for t in times.values()} == {4}
    assert all(1e-4 <= cycles / 10**9 <= measure.LONGEST_SPIN for cycles in spins)  # that GPU's seconds
    rounds = "".join(name[0] for name in Clock.launched).split("s")[1:]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_spread():
    times = measure.Times.of([float(n) for n in range(1, 12)])
    assert times == (6.0, 2.0, 10.0, 11)


def test_peers_that_fail_or_crash_are_named(monkeypatch):
    def missing(*_):
        raise peers.Missing("not for sale")

    def wrong(row, machine, inputs):
        return lambda i: inputs[0][2] + 1

    def broken(row, machine, inputs):
        return lambda i: 1 / 0

    row = measure.Row(64, 64, False, 16, 1, 1)
    math = peers.PEERS["torch math"]
    candidates = {"cute_flash": math, "a": missing, "b": wrong, "c": broken, "d": math}
    monkeypatch.setattr(peers, "PEERS", candidates)
    found = speed.measure_row(row, SETTINGS, {"d": "crashed: killed by SIGSEGV"}, lambda text: None)
    states = {name: (peer["state"], peer.get("error", "")[:12]) for name, peer in found["peers"].items()}
    assert states == {
        "cute_flash": ("ok", ""),
        "a": ("missing", "not for sale"),
        "b": ("failed", "AssertionErr"),
        "c": ("failed", "ZeroDivision"),
        "d": ("crashed", "crashed: kil"),
    }
    text = speed.markdown([{"key": row.key, "state": "ok", **found}], {"stages": {}})
    assert "* a: missing, not for sale (all rows)" in text and "| crashed |" in text


def test_ratios():
    found = {"cute_flash": {"tflops": 300.0}, "torch flash": {"tflops": 200.0}, "a": {"state": "missing"}}
    assert speed.compared(found) == {"best peer": "torch flash", "ratio to best": 1.5, "ratio to FA2": 1.5}
    assert speed.compared({"cute_flash": {"state": "failed", "error": "why"}})["error"] == "cute_flash: why"
    shape = {"head_dim": 64, "head_dim_v": 64, "causal": True, "seqlen": 512}
    rows = [
        {"key": f"r{ratio}", "kind": "row", "state": "ok", "shape": shape, "best peer": "x",
         "peers": {"cute_flash": {"state": "ok", "tflops": 200.0, "seconds": 1.0, "spread": [0.9, 1.1]}},
         "ratio to best": ratio}
        for ratio in (0.5, 2.0)
    ]
    ceiling = {"stages": {"environment": {"rows": [{"key": "bf16 GEMM", "rate": 800.0}]}}}
    text = speed.markdown(rows, ceiling)
    assert "geometric mean of the ratio to best: 1.000 over 2 rows" in text
    assert "| 200 (20.0%) |" in text and "| 25.0% |" in text


def test_flash_attn_4_s_compiled_kernels_are_looked_up(monkeypatch, tmp_path):
    left_out = {"d64-causal-s16": "no such kernel"}
    index = {"target": "sm_90a", "rows": {"d64-full-s16": {}}, "left out": left_out}
    (tmp_path / peers.INDEX).write_text(json.dumps(index))
    monkeypatch.setenv(peers.PEERS_VARIABLE, str(tmp_path))
    for causal, reason in ((True, "no such kernel"), (False, "they run on GPUs only")):
        with pytest.raises(peers.Missing, match=reason):
            peers.prepare("flash-attn-4", measure.Row(64, 64, causal, 16, 1, 1), "sm80", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(peers.Missing, match="compiled for sm_90a, this GPU is sm_100"):
        peers.prepare("flash-attn-4", measure.Row(64, 64, False, 16, 1, 1), measure.CUDA, [])


def test_ulps():
    a = torch.tensor([1.0, -1.0, 0.0, float("nan"), 1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0, -1.0078125, -0.0, float("nan"), float("nan")], dtype=torch.bfloat16)
    found = correctness.ulps(a, b).tolist()
    assert found[:4] == [0, 1, 0, 0] and found[4] > 1000


def test_emulated_device_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert correctness.emulated_name(measure.CUDA) == "sm90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(LookupError, match="none of the emulated devices sm80"):
        correctness.emulated_name(measure.CUDA)


def test_vectors_of_known_results():
    """The kernel that carries an instruction passes operands and results in the right places."""
    words = lambda *values: np.array([values] * 32, np.float32).view(np.uint32)  # noqa: E731
    packed = vectors.INSTRUCTIONS["cvt.rn.bf16x2.f32"]
    assert vectors.on_emulator(packed, words(1.0, -2.0)).tolist() == [[0x3F80C000]] * 32
    quotient = vectors.on_emulator(vectors.INSTRUCTIONS["div.rn.f32"], words(1.0, 4.0)).view(np.float32)
    assert quotient.tolist() == [[0.25]] * 32
    product = vectors.INSTRUCTIONS["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"]
    one = struct.unpack("<I", struct.pack("<ee", 1.0, 1.0))[0]
    given = np.array([[one] * 6 + [0] * 4] * 32, np.uint32)
    given[:, 6:] = np.array([0.5, 1.5, 2.5, 3.5], np.float32).view(np.uint32)
    found = vectors.on_emulator(product, given).view(np.float32)
    assert (found == np.array([16.5, 17.5, 18.5, 19.5])).all()


def test_vectors_distances():
    instruction = vectors.INSTRUCTIONS["ex2.approx.ftz.f32"]
    a = np.array([[1.0], [np.nan], [0.0]], np.float32)
    b = np.array([[np.nextafter(np.float32(1), np.float32(2))], [np.nan], [-0.0]], np.float32)
    assert vectors.distance(instruction, a, b).tolist() == [1, 0, 0]
    assert (vectors.inputs(instruction, "any") == vectors.inputs(instruction, "any")).all()


def test_ncu_command_leaves_the_clocks_alone(capsys):
    assert profiling(["ncu", "--case", "bfloat16", "--print"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("ncu --clock-control none --csv --page raw")
    assert line.strip().endswith("-m profiling one --case bfloat16")


def test_ncu_reads_both_of_its_formats(capsys, tmp_path):
    sample = ROOT / "profiling" / "stages" / "ncu_sample.csv"
    (wide,) = ncu.parse(sample.read_text())
    figures = ncu.summary(wide)
    assert figures["time"] == "1,234 us" or figures["time"] == "1,235 us"
    assert (figures["tensor pipe"], figures["registers"]) == ("61.25 %", "250 register/thread")
    assert figures["stalls"] == "math_pipe_throttle 1.75, wait 0.90, barrier 0.35"
    assert figures["warps active"] == "not counted"
    header = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
    rows = (('gpu__time_duration.sum', "ns", "2,848"), ("launch__registers_per_thread", "", "n/a"))
    tall = header + "".join(f'"0","k","s","{name}","{unit}","{value}"\n' for name, unit, value in rows)
    (launch,) = ncu.parse("==PROF== hello\n" + tall)
    assert launch == ncu.Launch("k", {"gpu__time_duration.sum": (2848.0, "ns")})
    assert profiling(["ncu", "--csv", str(sample)]) == 0
    assert "| L2 | 12.5 % |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no table.*==ERROR== no permission"):
        ncu.parse("==PROF== start\n==ERROR== no permission")


@pytest.mark.parametrize(
    "text, status, state, error",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok", ""),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok", ""),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors", 86, "failed",
         "3 errors, exit status 86; Invalid __global__ read of size 4"),
        ("========= ERROR SUMMARY: 0 errors", 1, "failed", "0 errors, exit status 1; not described"),
        ("========= Error: Device not supported", 0, "failed", "no summary, exit status 0"),
        ("", 0, "failed", "it last said: nothing"),
    ],
)
def test_sanitizer_s_summary_decides(text, status, state, error):
    row = {"state": "ok", "error": "", **sanitizer.judged(text, status)}
    assert row["state"] == state and error in row["error"]


def test_a_slow_tool_is_ended_with_its_children(tmp_path):
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}; wait"
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        tools.run_tool(["sh", "-c", script], 1.0)
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    # A killed process still counts as running until the kernel has torn it down.
    deadline = time.monotonic() + 30
    while _runs(status):
        assert time.monotonic() < deadline, "the child outlived its parent by 30 s"
        time.sleep(0.01)


def _runs(status: Path) -> bool:
    """Whether a process runs, by its /proc/PID/stat: one that has ended has none, or is a zombie."""
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_pictures():
    lines = [plots.Line("ours & co", [(512, 100.0), (1024, 250.0)])]
    picture = plots.svg("title", plots.Axis("tokens", True), plots.Axis("TFLOP/s", False), lines)
    assert picture.count("<circle") == 2 and "ours &amp; co" in picture and ">1k<" in picture
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.svg("title", plots.Axis("x", True), plots.Axis("y", True), [])


def test_reports_of_a_gpu_newest_first(tmp_path):
    for name, month, dry in (("a", 1, False), ("b", 2, False), ("c", 3, True)):
        path = tmp_path / f"2026-0{month}-01-{name}.json"
        Record(path, {**FACTS, "dry_run": dry, "started": f"2026-0{month}-01"})
    (tmp_path / "static.json").write_text("{}")
    assert [data["name"] for data in reports(tmp_path)] == ["2026-02-01-b", "2026-01-01-a"]
    assert reports(tmp_path / "none") == []

"""What is carried to a machine that can install nothing, and that it works there without what is here."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from profiling import measure, pack, peers
from profiling.__main__ import main as profiling
from profiling.record import read


def test_pack_compiles_what_a_call_asks_for(tmp_path):
    from cute_flash import cache, executable

    row = measure.Row(64, 64, False, 16, 1, 1)
    (asked,) = pack.asked_for(row, "sm80")
    assert asked[1].head_dim == 64 and not asked[1].lse and asked[3].capability == (8, 0)
    assert pack._compile_for(row, None, "sm80", str(tmp_path)) == ""
    (path,) = tmp_path.iterdir()
    assert path.name == executable.key_of(*asked) + cache.SUFFIX
    assert cache.read(path).description["problem"]["head_dim"] == 64
    assert pack.asked_for("batch_0", "sm80") == []
    assert pack._compile_for("nothing", None, "sm80", str(tmp_path)).startswith("KeyError")
    (other,) = pack.asked_for(row, "sm90", "sm80.forward")
    assert other[0].name == "sm80.forward" != pack.asked_for(row, "sm90")[0][0].name
    assert pack._compile_for(row, "no such kernel", "sm80", str(tmp_path)) == ""


def test_pack_compiles_for_the_sizes_of_a_row():
    """Which kernel a row gets depends on its lengths: few rows, and few tiles, have their own."""
    rows = [measure.Row(128, 128, False, seqlen, 32, 16) for seqlen in (16, 512, 2048)]
    configs = [pack.asked_for(row, "sm90")[0][2] for row in rows]
    assert configs[0] != configs[1] == configs[2]
    assert pack.differing(rows, "sm90", None) == rows[:2]


def test_pack_compiles_all_that_the_report_calls(tmp_path, monkeypatch):
    from profiling.stages import correctness, speed

    called = []
    monkeypatch.setattr(pack, "differing", lambda rows, arch, kernel: called.extend(rows) or [])
    monkeypatch.setattr(correctness, "DRY_CASES", ())
    monkeypatch.setattr(pack, "_compile_for", _nothing)
    assert pack.kernels(tmp_path / "kernels", "sm90", quick=True, processes=1) == {}
    assert {*speed.called(True), *correctness.DRY_LARGE} <= {*called}
    assert speed.host_row(False) in speed.called(False) and measure.sweep()[0] in speed.called(False)


def _nothing(what, kernel, arch, directory):
    return ""


def test_pack_keeps_one_kernel_for_rows_that_share_it(tmp_path, monkeypatch):
    """Lengths of which the shortest and the longest give the same kernel are not compiled one by one."""
    from profiling import flash_attn_4

    compiled = []

    def stand_in(case, target):
        compiled.append(case.name)
        if case.dim == 256:
            raise flash_attn_4.Missing("no such kernel")
        ptx = f"{case.dim} {case.causal and case.seqlens_q}"
        object_file = tmp_path / f"{case.name}.o"
        object_file.write_text(ptx)
        kernel = flash_attn_4.Kernel(case, ptx, object_file, [{"tensor": "q"}, 0.5, [None]], (128, 64))
        return flash_attn_4.Peer(kernel, b"", None)

    monkeypatch.setattr(flash_attn_4, "compiled", stand_in)
    monkeypatch.setattr(flash_attn_4, "prepare", lambda cases, target: None)
    left_out = pack.flash_attn_4(tmp_path / "peers", "sm90", quick=False)
    index = json.loads((tmp_path / "peers" / peers.INDEX).read_text())
    assert index["target"] == "sm_90a"
    full = {index["rows"][f"d128-full-s{seqlen}"]["object"] for seqlen in measure.SEQLENS}
    causal = {index["rows"][f"d128-causal-s{seqlen}"]["object"] for seqlen in measure.SEQLENS}
    assert (len(full), len(causal)) == (1, 7)
    assert sum("d64-full" in name for name in compiled) == 2
    assert list(left_out.values()) == ["no such kernel"]
    assert "d192-128-causal-s8192" in index["rows"]
    assert index["left out"]["d256-full-s512"] == "no such kernel"


def test_pack_is_unpacked_by_run_sh(tmp_path):
    """Only what was packed is used there: the sources, a file in parts, and wheels."""
    there, work = tmp_path / "there", tmp_path / "work"
    there.mkdir()
    (tmp_path / "scratch" / "kernels").mkdir(parents=True)
    (tmp_path / "scratch" / "kernels" / "a.kernel").write_text("kernel")
    pack.archive(tmp_path / "scratch", there / "base.tar.xz")
    with zipfile.ZipFile(there / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small.py", "pass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "LARGEST_FILE", 1000)
        patch.setattr(pack, "PART", 100_000)
        pack.split(there / "base.tar.xz")
    assert len(list(there.glob("base.tar.xz.part*"))) >= 2 and not (there / "base.tar.xz").exists()
    (there / "run.sh").write_text(pack.RUN)
    (there / "MANIFEST.json").write_text("{}")
    environment = os.environ | {"PYTHON": sys.executable, "CUTE_FLASH_WORK": str(work)}
    command = ["sh", str(there / "run.sh"), "--dry-run", "--stages", "environment"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (path,) = (there / "results").glob("*.json")
    values = read(path)["stages"]["environment"]["rows"][0]["values"]
    assert values["cute_flash"] == str(work / "site" / "cute_flash")
    assert values["kernel bundle"] == str(work / "kernels")
    assert (work / "kernels" / "a.kernel").read_text() == "kernel" and (work / "site" / "small.py").exists()
    (there / "MANIFEST.json").write_text('{"another": "pack"}')
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2 and f"{work} holds another pack: remove it" in answer.stderr


def test_all_stages_run_from_a_pack_without_a_compiler(tmp_path):
    """What a dry run needs is in the pack: where it is unpacked, the compiler cannot be imported."""
    there, work = tmp_path / "there", tmp_path / "work"
    there.mkdir()
    assert pack.kernels(tmp_path / "scratch" / "kernels", "sm80", True, 2) == {}
    (tmp_path / "scratch" / "peers").mkdir()
    index = {"target": "sm_80", "rows": {}, "left out": {}}
    (tmp_path / "scratch" / "peers" / peers.INDEX).write_text(json.dumps(index))
    pack.archive(tmp_path / "scratch", there / "base.tar.xz")
    with zipfile.ZipFile(there / "none-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", "import sys; sys.modules['cutlass'] = None")
    (there / "run.sh").write_text(pack.RUN)
    (there / "MANIFEST.json").write_text("{}")
    environment = os.environ | {
        "PYTHON": sys.executable, "CUTE_FLASH_WORK": str(work), "CUTE_FLASH_CACHE": "0",
    }  # fmt: skip
    command = ["sh", str(there / "run.sh"), "--dry-run", "--arch", "sm80"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (path,) = (there / "results").glob("*.json")
    stages = read(path)["stages"]
    assert {entry["state"] for entry in stages.values()} == {"done"}
    first = next(row for row in stages["speed"]["rows"] if row["key"] == "first call")["seconds"]
    assert "nvidia-cutlass-dsl" in first["cold"] and isinstance(first["from the bundle"], float)


def test_the_backward_zip_holds_members_of_wheels(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a_b-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("deep/inside.so", "library")
    monkeypatch.setattr(pack, "BACKWARD", {"a-b==1.0": {"deep/inside.so": "flat.so"}})
    there = tmp_path / "there"
    there.mkdir()

    def copied(name, directory, source):
        shutil.copy(source / "a_b-1.0-py3-none-any.whl", directory)
        return ""

    monkeypatch.setattr(pack, "download", copied)
    assert pack.backward(there, tmp_path) == {}
    with zipfile.ZipFile(there / "backward.zip") as found:
        assert found.namelist() == ["flat.so"] and found.read("flat.so") == b"library"
    monkeypatch.setattr(pack, "download", lambda *_: "not found")
    assert pack.backward(tmp_path / "none", None) == {"a-b==1.0": "not found"}


def test_pack_says_what_it_cannot_have(tmp_path):
    (tmp_path / "empty").mkdir()
    left_out = pack.wheels(tmp_path, tmp_path / "empty")
    assert set(left_out) == set(pack.WHEELS)
    assert all("No matching distribution" in reason for reason in left_out.values())
    (tmp_path / "empty" / "file").touch()
    assert profiling(["pack", str(tmp_path / "empty")]) == 2


@pytest.mark.parametrize("changes", [False, True])
def test_pack_notices_sources_that_change_meanwhile(tmp_path, monkeypatch, changes):
    from cute_flash import cache

    digests = itertools.count() if changes else itertools.repeat(0)
    monkeypatch.setattr(cache, "sources_digest", functools.cache(lambda: str(next(digests))))
    for name in ("wheels", "kernels", "flash_attn_4"):
        monkeypatch.setattr(pack, name, lambda *_: {})
    chosen = argparse.Namespace(
        directory=tmp_path, arch="sm90", wheels=None, quick=True, jobs=1, backward=False
    )
    if changes:
        with pytest.raises(SystemExit, match="sources changed"):
            pack.build(chosen)
        return
    assert {*pack.NEVER, *pack.WITHOUT_BACKWARD} <= set(pack.build(chosen))
    manifest = json.loads((tmp_path / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {"base.tar.xz", "run.sh"} and manifest["built with"]["arch"] == "sm90"

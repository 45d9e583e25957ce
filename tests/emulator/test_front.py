"""The way in for kernels from anywhere: called, tried in many orders, run from files, without torch."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cute_flash import emulator, executable, precompile
from cute_flash.arch.combine import CombineProblem
from cute_flash.arch.problem import Problem, Spec
from cute_flash.dispatch import EMULATED
from cute_flash.emulator.__main__ import main
from cute_flash.emulator.execution.launch import View
from cute_flash.emulator.front.portfolio import Held, examine
from tests.tiny import TINY, TinyConfig

README = Path(emulator.__file__).with_name("README.md").read_text()
EXAMPLE = re.search(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
UNORDERED = "    tile[i] = x[i]\n"


@pytest.fixture(scope="module")
def unordered(tmp_path_factory) -> SimpleNamespace:
    """The README's example, run: the kernel that lacks a barrier, its operands, and its source file."""
    return example(tmp_path_factory.mktemp("unordered"), EXAMPLE)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory) -> SimpleNamespace:
    """The same with its barrier."""
    source = EXAMPLE.replace(UNORDERED, f"{UNORDERED}    cute.arch.sync_threads()\n")
    return example(tmp_path_factory.mktemp("ordered"), source)


def example(directory: Path, source: str) -> SimpleNamespace:
    path = directory / "reverse.py"
    path.write_text(source.replace("--keep-ptx", f"--keep-ptx --dump-dir {directory}"))
    return SimpleNamespace(**runpy.run_path(str(path)), path=path)


def test_a_missing_barrier_is_found_with_its_lines(unordered):
    x, out = np.random.randn(128).astype("float32"), np.zeros(128, "float32")
    (report,) = unordered.kernel(x, out, how="eager")
    assert np.array_equal(out, x[::-1]) and report.instructions, "right by luck, which is the point"
    verdict = unordered.kernel.examine(x, out)
    assert not verdict and verdict.runs == len(emulator.PORTFOLIO)
    with pytest.raises(emulator.DataRace) as caught:
        unordered.kernel(x, out)
    line = 1 + unordered.path.read_text().split("\n").index("    out[i] = tile[127 - i]")
    assert caught.value.source == f"{unordered.path}:{line}"
    assert f"PTX line {caught.value.line}: ld.shared" in str(caught.value)
    assert f"from {unordered.path}:{line}: out[i] = tile[127 - i]" in str(caught.value)
    assert f"from {unordered.path}:{line - 1})" in str(caught.value), "the write that it races with"
    assert f"{caught.value}\n  again with how='races'" in str(verdict)


def test_what_a_verdict_names_shows_it_again(unordered):
    x, out = (torch.randn(128) for _ in range(2))
    verdict = unordered.kernel.examine(x, out, runs=("eager", "late_copies", "random 3"))
    (find,) = verdict.finds
    assert find.how == "random 3" and set(verdict.reports) == {"eager", "late_copies"}
    with pytest.raises(type(find.error)) as caught:
        unordered.kernel(x, out, how=find.how)
    assert str(caught.value) == find.text


def test_a_kernel_with_its_barrier_is_good_in_every_order(ordered):
    told, x, out = [], torch.randn(128), torch.zeros(128)
    verdict = ordered.kernel.examine(x, out, say=told.append)
    assert verdict and "no race" in str(verdict) and torch.equal(out, x.flip(0))
    assert len(told) == verdict.runs == len(verdict.reports) == len(emulator.PORTFOLIO)
    assert told[2].startswith("[3/13] late races: good")


def test_words_are_options():
    read = emulator.Options.read
    late = emulator.Options(asynchrony="late", races=True, ctas_per_wave=1)
    assert read("late races", ctas_per_wave=1) == late
    random = emulator.Options(asynchrony="random", schedule="random", seed=7, uninitialized="poison")
    assert read("random 7, poison") == random
    assert read("late permissive") == emulator.Options(asynchrony="late", permissive=True)
    assert read("by_the_book") == emulator.Options(races=True, by_the_book=True)
    assert {read(how) for how in emulator.orders(24)} and len(emulator.orders(24)) == 29
    with pytest.raises(ValueError, match="how has 'lately'; allowed: eager, late,"):
        read("lately")


@pytest.mark.parametrize(
    "operand, message",
    [
        (np.zeros(128, "float32")[::-1], "x has strides of .-4,. bytes; allowed: multiples of its 4 from 0"),
        (np.frombuffer(bytes(512), "float32"), "x is read-only"),
        (torch.zeros(128, device="meta"), "x lies on meta; the emulator runs on CPU tensors"),
        (np.zeros(128, "complex64"), "x: dtype complex64 is not one of"),
        (np.zeros(64, "float32"), "Mismatched"),
    ],
    ids=["strides", "read-only", "device", "dtype", "shape"],
)
def test_operands_are_refused_by_name(ordered, operand, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ordered.kernel(operand, np.zeros(128, "float32"))


def test_kernels_are_refused_with_the_option_that_is_missing(ordered):
    with pytest.raises(ValueError, match="SimpleNamespace has no PTX; compile with options='… --keep-ptx'"):
        emulator.cute_kernel(SimpleNamespace(__ptx__=None))
    header = ".version 8.0\n.target sm_90a\n.address_size 64\n"
    plain = SimpleNamespace(__ptx__=header, export_to_c=lambda path, name: None)
    with pytest.raises(ValueError, match="compile with options='… --enable-tvm-ffi'"):
        emulator.cute_kernel(plain)
    program = emulator.Program(header)
    with pytest.raises(ValueError, match="arch is 'sm80', but the kernel was compiled for sm_90a"):
        emulator.CuteKernel(program, b"", "kernel", "sm80")


def test_results_that_depend_on_the_order_are_a_find():
    out = torch.ones(8)
    held = [Held(View(out, "out"))]

    def run(options):
        out[3] += 0.25 * (options.seed > 1)
        return []

    runs = ("eager", "random 1", "random 2", "random 3")
    verdict = examine(run, held, runs, 0.0)
    assert [find.how for find in verdict.finds] == ["random 2", "random 3"]
    assert "order: out is not what the first run gave: 1 of 8 elements differ" in str(verdict)
    assert verdict.finds[0].text.endswith("the first at 3: 1 and 1.25")
    assert examine(run, [Held(View(out.fill_(1), "out"))], runs, 0.2)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory) -> Path:
    """A small kernel as --emit leaves it."""
    path = tmp_path_factory.mktemp("emitted") / "tiny.json"
    problem = Problem("float16", 64, 64)
    built = executable.artifact(TINY, problem, TinyConfig(64), EMULATED["sm80"])
    for name, data in built.files().items():
        path.with_suffix(Path(name).suffix).write_bytes(data)
    return path


def test_an_emitted_kernel_is_run_without_torch(emitted):
    blocked = "import sys; sys.modules['torch'] = None; from cute_flash.emulator.__main__ import main; "
    small = f"sys.exit(main([{str(emitted)!r}, '--orders', '2', '--size', 'seqlen_q=5', 'seqlen_k=3']))"
    done = subprocess.run([sys.executable, "-c", blocked + small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seqlen_q=5" in done.stdout and "[7/7] random 1: good" in done.stdout
    names = "import sys; sys.modules['torch'] = None; import cute_flash; cute_flash.Causal"
    refused = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True)
    assert "ImportError: cute_flash.Causal needs torch, which is not installed" in refused.stderr


def test_an_emitted_kernel_that_forgets_an_output(emitted, tmp_path, capsys):
    text = emitted.with_suffix(".ptx").read_text()
    store = re.search(r"st\.global\.b32[^\n]*\n", text)[0]
    path = tmp_path / "tiny.json"
    for suffix, data in ((".json", emitted.read_bytes()), (".o", emitted.with_suffix(".o").read_bytes())):
        path.with_suffix(suffix).write_bytes(data)
    with pytest.raises(SystemExit):
        main([str(path), "--size", "seqlen_q"])
    assert main([str(path)]) == 2 and "there is no ptx" in capsys.readouterr().err
    path.with_suffix(".ptx").write_text(text.replace(store, ""))
    assert main([str(path), "--how", "eager", "--size", "nothing=3"]) == 2
    assert main([str(path), "--how", "eager", "--size", "seqlen_q=5"]) == 1
    assert "lse: 5 of 5 elements were never written" in capsys.readouterr().out


@pytest.mark.parametrize("word", precompile.WORDS)
def test_what_operands_must_hold_is_known(word):
    """A description has contents for every operand, and a size for every dimension."""
    kinds = {"any", "is", "starts", "lengths", "longest", "count", "numbered"}
    for words in {(word,), tuple(dict.fromkeys(("varlen", word)))}:
        whole = precompile.problem_of("bfloat16", (64, 64), list(words))
        for problem in (whole, replace(whole, split_kv=True), CombineProblem.of(whole)):
            sizes = {**problem.known_sizes(), **problem.example_sizes()}
            operands = [(spec,) if isinstance(spec, Spec) else spec or () for spec in problem.specs()]
            for spec in (spec for members in operands for spec in members):
                assert spec.values.split()[0] in kinds and set(spec.dims) <= set(sizes), spec

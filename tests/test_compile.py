"""From a problem to compiled code and into memory, without a GPU: artifacts, loader, CUDA route."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_void_p
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda import pathfinder
from cuda.bindings import driver

from cute_flash import cuda_devices, cuda_runtime, dispatch, executable, objectfile, precompile, rules
from cute_flash.__main__ import main
from cute_flash.arch.problem import Operands, Problem
from cute_flash.emulator.execution.launch import View
from cute_flash.masks import SlidingWindow
from cute_flash.scores import Softcap
from tests.tiny import TINY

A100 = dispatch.EMULATED["sm80"]
WINDOW, _ = rules.decode(rules.encode([SlidingWindow(1, 1)], []).code)
PROBLEM = Problem("float16", 64, 64, mask=WINDOW)


@pytest.fixture(scope="module")
def tiny() -> executable.Artifact:
    return executable.artifact(TINY, PROBLEM, TINY.config(PROBLEM, A100), A100)


def test_what_is_described(tiny):
    described = tiny.description
    assert [operand["name"] for operand in described["operands"]] == list(Operands._fields)
    members = {operand["name"]: operand["members"] for operand in described["operands"]}
    assert members["q"] == [
        {
            "dtype": "float16",
            "rank": 4,
            "dims": ["batch", "seqlen_q", "num_heads_q", 64],
            "strides": "strided",
            "meaning": "queries",
            "written": False,
            "values": "any",
        }
    ]
    assert [o["name"] for o in described["operands"] if o["is_tuple"]] == ["mask_values"]
    assert set(members["q"][0]["dims"][:3]) <= set(described["sizes"])
    written = {name for name, found in members.items() if any(member["written"] for member in found)}
    assert written == {"out", "lse"}
    assert [m["dtype"] for m in members["mask_values"]] == ["int32", "int32"]
    assert members["cu_seqlens_q"] == members["score_values"] == []
    assert described["target"] == "sm_80" and described["config"] == {"threads": 64}
    assert "visible = ((k >= (q - int0)) & (k <= (q + int1)))" in described["problem"]["mask"]["text"]
    (entry,) = described["entries"]
    assert f".entry {entry}(" in tiny.ptx.decode() and b".target sm_80" in tiny.ptx
    assert tiny.cubin[:4] == b"\x7fELF" and tiny.cubin in tiny.object
    json.dumps(described)


def test_every_kernel_that_ships_says_the_same_of_itself(arch):
    """The operands, entry and symbol of a real kernel with everything in it that packed sequences allow."""
    words = ["varlen", "seqused_q", "seqused_k", "gqa", "dropout", "sink", "lse", "document", "alibi_batch"]
    problem = precompile.problem_of("bfloat16", (64, 64), words)
    device = dispatch.EMULATED[arch]
    kernel, config = dispatch.dispatch(problem, device)
    built = executable.artifact(kernel, problem, config, device)
    absent = [operand["name"] for operand in built.description["operands"] if not operand["members"]]
    assert absent == ["block_counts", "block_indices", "batch_idx", "leftpad", "page_table"]
    assert built.description["symbol"].encode() in built.object
    assert built.description["shared_memory"] == config.shared_memory(problem) <= device.shared_memory


def test_host_code_runs_on_any_x86_64(tiny, monkeypatch):
    """Nothing of AVX: `vzeroupper` ends every function that uses its registers."""
    vzeroupper = b"\xc5\xf8\x77"
    assert vzeroupper not in tiny.object
    if " avx " in Path("/proc/cpuinfo").read_text():
        monkeypatch.setattr(executable, "_for_any_host", lambda module: None)
        assert vzeroupper in executable.build(TINY, PROBLEM, TINY.config(PROBLEM, A100), A100).object


def test_the_key_is_the_argument_list():
    config = TINY.config(PROBLEM, A100)
    key = executable.key_of(TINY, PROBLEM, config, A100)
    others = [
        (replace(PROBLEM, head_dim=128), config, A100),
        (replace(PROBLEM, mask=None), config, A100),
        (PROBLEM, replace(config, threads=128), A100),
        (PROBLEM, config, dispatch.EMULATED["sm86"]),
    ]
    keys = [executable.key_of(TINY, *other) for other in others]
    assert len({key, *keys}) == 5
    assert executable.key_of(TINY, replace(PROBLEM), replace(config), replace(A100)) == key
    assert executable.key_of(TINY, PROBLEM, config, replace(A100, shared_memory=1)) == key


# The loader.


def symbols_of(tiny) -> dict[str, int]:
    """An address for everything that an object needs, none of which is called."""
    names = [*cuda_runtime._FUNCTIONS, "_cuKernelGetAttribute", "cuda_dialect_init_library_once",
             "cuda_dialect_unload_library_once", "CuteDSLRT_TVMFFISetRaisedCudaError"]  # fmt: skip
    return dict.fromkeys(names, 1) | objectfile.tvm_symbols()


def test_code_is_not_writable_and_data_not_executable(tiny):
    loaded = objectfile.LoadedObject(tiny.object, symbols_of(tiny))
    pages = loaded._pages.address, loaded._pages.address + len(loaded._pages.bytes)
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        if start < pages[1] and end > pages[0]:
            found[start] = permissions
    assert len(found) == 3 and {p[:3] for p in found.values()} == {"r-x", "r--", "rw-"}
    entry = loaded.address(tiny.description["symbol"])
    assert found[max(start for start in found if start <= entry)][:3] == "r-x"


def test_an_unknown_symbol_is_named(tiny):
    symbols = symbols_of(tiny)
    del symbols["_cudaSetDevice"]
    with pytest.raises(objectfile.ObjectFileError, match="needs the symbol '_cudaSetDevice'"):
        objectfile.LoadedObject(tiny.object, symbols)
    loaded = objectfile.LoadedObject(tiny.object, symbols_of(tiny))
    with pytest.raises(objectfile.ObjectFileError, match="defines no symbol absent; it defines .*tests_tiny"):
        loaded.address("absent")


def sections(data: bytes) -> list[tuple[int, tuple]]:
    """(offset of the header, header) of each section."""
    table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    offsets = [table + 64 * i for i in range(count)]
    return [(offset, struct.unpack_from("<IIQQQQIIQQ", data, offset)) for offset in offsets]


def changed(data: bytes, offset: int, layout: str, value: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(layout, copy, offset, value)
    return bytes(copy)


def test_an_unknown_relocation_is_named(tiny):
    _, header = next(found for found in sections(tiny.object) if found[1][1] == 4)
    symbol = struct.unpack_from("<Q", tiny.object, header[4] + 8)[0] >> 32
    data = changed(tiny.object, header[4] + 8, "<Q", symbol << 32 | 10)
    with pytest.raises(objectfile.ObjectFileError, match=r"relocation type 10 at \.ltext\+0x.* not one of"):
        objectfile.LoadedObject(data, symbols_of(tiny))


def test_unknown_sections_are_refused(tiny):
    code = next(at for at, header in sections(tiny.object) if header[2] & 4 and header[5])
    symbols = symbols_of(tiny)
    with pytest.raises(objectfile.ObjectFileError, match="of type 0xe is not supported"):
        objectfile.LoadedObject(changed(tiny.object, code + 4, "<I", 14), symbols)
    with pytest.raises(objectfile.ObjectFileError, match="both writable and executable"):
        objectfile.LoadedObject(changed(tiny.object, code + 8, "<Q", 7), symbols)


@pytest.mark.parametrize(
    "offset, layout, value, text",
    [
        (0, "<B", 0, "not a 64-bit little-endian ELF file"),
        (18, "<H", 183, "machine 183: a relocatable x86-64 object is needed"),
        (16, "<H", 3, "ELF type 3"),
    ],
)
def test_other_files_are_refused(tiny, offset, layout, value, text):
    with pytest.raises(objectfile.ObjectFileError, match=text):
        objectfile.LoadedObject(changed(tiny.object, offset, layout, value), {})


def test_other_machines_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(objectfile.platform, "machine", lambda: "aarch64")
    with pytest.raises(objectfile.ObjectFileError, match="this machine is aarch64; .* on x86-64 Linux only"):
        objectfile.LoadedObject(tiny.object, symbols_of(tiny))


# The CUDA route, with a CUDA runtime of our own: everything but the GPU.


class Runtime:
    """A CUDA runtime in which every function succeeds, unless `fails` says otherwise, and is counted."""

    def __init__(self):
        self.called: list[str] = []
        self.fails: dict[str, int] = {}  # name -> error code
        self.cures: dict[str, int] = {}  # name -> after how many calls it fails no more
        self.threads: list[int] = []
        self._define("cudaLibraryLoadData", (POINTER(c_void_p), *[c_void_p] * 7), self._handle)
        self._define("cudaLibraryGetKernel", (POINTER(c_void_p), c_void_p, c_char_p), self._handle)
        self._define("cudaLaunchKernelExC", (POINTER(ctypes.c_uint32), c_void_p, c_void_p), self._launch)
        self._define("cudaGetDevice", (POINTER(c_int),), self._zero)
        self._define("cudaSetDevice", (c_int,), lambda device: None)
        self._define("cudaDeviceGetAttribute", (POINTER(c_int), c_int, c_int), self._zero)
        self._define("cudaFuncSetAttribute", (c_void_p, c_int, c_int), lambda *_: None)
        self._define("cudaKernelSetAttributeForDevice", (c_void_p, c_int, c_int, c_int), lambda *_: None)

    def _define(self, name, types, body):
        def call(*arguments):
            self.called.append(name)
            body(*arguments)
            cured = self.called.count(name) > self.cures.get(name, 1000)
            return 0 if cured else self.fails.get(name, 0)

        setattr(self, name, CFUNCTYPE(c_int, *types)(call))

    def _handle(self, handle, *_):
        handle[0] = 1

    def _zero(self, value, *_):
        value[0] = 0

    def _launch(self, config, *_):
        self.threads.append(config[3])


@pytest.fixture
def cuda(monkeypatch, tiny):
    """(runtime, call): the tiny kernel bound to a made-up CUDA runtime with two devices."""
    import tvm_ffi

    made = Runtime()
    monkeypatch.setattr(cuda_runtime.CudaRuntime, "_kernel_get_attribute", lambda *_: 0)
    monkeypatch.setattr(cuda_devices, "count", lambda: 2)
    bound = cuda_runtime.CudaRuntime(made)
    function = objectfile.load(tiny.object, tiny.description["function"], bound.symbols)
    q, lse = torch.zeros(1, 2, 3, 64).half(), torch.zeros(1, 3, 2)

    def call(mask_values=(1, 2), q=q):
        views = [tvm_ffi.from_dlpack(View(tensor, "x")) for tensor in (q, q, q, q, lse)]
        function(*views, *[None] * 6, 1.0, *[None] * 5, mask_values, None, 1, *[None] * 3)

    return made, call, bound


def test_kernels_are_loaded_once_on_every_device(cuda):
    made, call, _ = cuda
    for _ in range(3):
        call()
    assert made.called.count("cudaLibraryLoadData") == 1
    assert made.called.count("cudaLibraryGetKernel") == 2
    assert made.called.count("cudaLaunchKernelExC") == 3
    assert made.threads == [64] * 3


def test_a_kernel_that_one_device_cannot_load_is_no_error(cuda):
    made, call, _ = cuda
    made.fails["cudaLibraryGetKernel"] = 98
    made.cures["cudaLibraryGetKernel"] = 1
    call()
    assert made.called.count("cudaLibraryGetKernel") == 2
    assert made.threads == [64]


@pytest.mark.parametrize("function", ["cudaLibraryLoadData", "cudaLibraryGetKernel"])
def test_loading_that_fails_is_an_exception_and_tried_again(cuda, function):
    made, call, _ = cuda
    made.fails[function] = 98
    with pytest.raises(RuntimeError, match=r"CUDA error 98 \(cudaErrorInvalidDeviceFunction\): inv"):
        call()
    assert not made.threads
    made.fails.clear()
    call()
    assert made.threads == [64]


def test_a_driver_that_fails_is_an_exception_and_asked_again(cuda, monkeypatch):
    made, call, _ = cuda
    with monkeypatch.context() as failing:
        failing.setattr(cuda_devices, "count", lambda: cuda_devices.checked((driver.CUresult(100),)))
        with pytest.raises(RuntimeError, match=r"CUDA driver error 100 \(CUDA_ERROR_NO_DEVICE\)"):
            call()
    assert not made.threads
    call()
    assert made.threads == [64]


def test_errors_beyond_those_known_have_a_number():
    assert "CUDA error 12345, which is newer" in cuda_devices.runtime_error(12345)


@pytest.mark.parametrize(
    "code, attribute, answer", [(0, 0, (0, 7)), (400, 0, (400, -1)), (0, 999, (1, -1)), (None, 0, (3, -1))]
)
def test_attributes_of_kernels_are_the_driver_s(monkeypatch, code, attribute, answer):
    """(returned code, what is written); None: there is no driver."""

    def asked(attribute, kernel, device):
        assert (int(kernel), int(device)) == (5, 1)
        if code is None:
            raise RuntimeError("no libcuda.so.1")
        return driver.CUresult(code), None if code else 7

    monkeypatch.setattr(driver, "cuKernelGetAttribute", asked)
    runtime, value = cuda_runtime.CudaRuntime(Runtime()), c_int(-1)
    address = runtime.symbols["_cuKernelGetAttribute"]
    function = CFUNCTYPE(c_int, POINTER(c_int), c_int, c_void_p, c_int)(address)
    assert (function(ctypes.byref(value), attribute, 5, 1), value.value) == answer


def test_a_launch_that_fails_is_an_exception(cuda):
    made, call, _ = cuda
    made.fails["cudaLaunchKernelExC"] = 701
    with pytest.raises(RuntimeError, match=r"CUDA error 701 \(cudaErrorLaunchOutOfResources\)"):
        call()


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"mask_values": (1,)}, "mask_values"),
        ({"mask_values": None}, "mask_values"),
        ({"q": torch.zeros(1, 2, 3, 128).half()[..., ::2]}, "stride"),
        ({"q": torch.zeros(1, 2, 3, 72).half()[..., 4:68]}, "Misaligned"),
        ({"q": torch.zeros(1, 2, 3, 64).bfloat16()}, "dtype"),
    ],
)
def test_host_code_itself_checks_what_it_is_given(cuda, wrong, error):
    made, call, _ = cuda
    with pytest.raises((ValueError, TypeError), match=error):
        call(**wrong)
    assert "cudaLaunchKernelExC" not in made.called


def test_an_old_cuda_runtime_is_named():
    class Old:
        _name = "libcudart.so.12"

    with pytest.raises(RuntimeError, match="libcudart.so.12 has no cudaLibraryLoadData, .*12.8 or newer"):
        cuda_runtime.CudaRuntime(Old())


def test_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        cuda_runtime.library_of_torch()


@pytest.mark.parametrize(
    "version, found, used",
    [
        ("12.8", "/site/libcudart.so.12", "/site/libcudart.so.12"),
        ("13.0", "/site/libcudart.so.13", "/site/libcudart.so.13"),
        ("13.0", "/toolkit/libcudart.so.13.0.96", "/toolkit/libcudart.so.13.0.96"),
        ("12.8", "/site/libcudart.so.13", "libcudart.so.12"),
        ("12.8", None, "libcudart.so.12"),
    ],
)
def test_the_cuda_runtime_is_torch_s(monkeypatch, version, found, used):
    """Also where pathfinder finds that of another CUDA, or none."""

    def load(name):
        assert name == "cudart"
        if found is None:
            raise pathfinder.DynamicLibNotFoundError("none")
        return SimpleNamespace(abs_path=found)

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", load)
    assert cuda_runtime.library_of_torch() == used


# The command line.


def test_the_words_of_the_command_are_those_of_calls():
    problem = precompile.problem_of("float16", (192, 128), ["varlen", "causal", "window", "softcap", "lse"])
    assert problem == Problem(
        "float16", 192, 128, mask=WINDOW,
        score=rules.decode(rules.encode([], [Softcap(3.0)]).code)[1], varlen=True, lse=True,
    )  # fmt: skip
    assert precompile.problem_of("float16", (64, 64), ["dense"]) == Problem("float16", 64, 64, lse=False)
    with pytest.raises(ValueError, match="--features has 'casual'; allowed: dense, varlen"):
        precompile.problem_of("float16", (64, 64), ["casual"])
    for word in precompile.WORDS:
        precompile.problem_of("float16", (64, 64), [word])


@pytest.fixture
def only_tiny(monkeypatch):
    monkeypatch.setattr(dispatch.arch, "load", lambda device, operation: (TINY,))
    dispatch.select.cache_clear()
    yield
    dispatch.select.cache_clear()


def test_compile_makes_a_bundle(only_tiny, tmp_path, capsys):
    where = tmp_path / "bundle"
    command = ["compile", "--dtype", "float16", "--head-dim", "64", "--features", "dense", "window,lse"]
    assert main([*command, str(where)]) == 0
    assert len(list(where.glob("tests.tiny-*.kernel"))) == 2
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "[1/2] sm_80 float16 64x64 dense", "[2/2] sm_80 float16 64x64 window,lse",
    ]  # fmt: skip


def test_compile_emits_parts(only_tiny, tmp_path, tiny):
    command = ["compile", str(tmp_path), "--emit", "ptx,cubin,object,json", "--features", "window,lse"]
    assert main([*command, "--dtype", "float16", "--head-dim", "64x64"]) == 0
    key = executable.key_of(TINY, PROBLEM, TINY.config(PROBLEM, A100), A100)
    parts = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    assert digests == {
        f"{key}{suffix}": hashlib.sha256(data).hexdigest()
        for suffix, data in ((".ptx", tiny.ptx), (".cubin", tiny.cubin), (".o", tiny.object),
                             (".json", tiny.files()["kernel.json"]))
    }  # fmt: skip


def test_compile_says_what_does_not_exist(only_tiny, tmp_path, capsys):
    command = ["compile", str(tmp_path), "--features", "varlen", "--dtype", "float16", "--head-dim", "64"]
    assert main(command) == 1
    assert "tests.tiny: no packed sequences" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_features_on_the_command_line(capsys):
    assert main(["features"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == dispatch.features()


@pytest.mark.parametrize("arguments", [[], ["comply"], ["compile"], ["compile", "d", "--emit", "sass"]])
def test_unknown_commands(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2

"""flash-attn-4's own backward kernels, compiled without a GPU and described for who launches them.

    calls = build(CASES, directory)          in a process per target: it reads its target at import

Its Python interface runs once on fake CUDA tensors. Every kernel that it compiles is written to `directory`;
`NAME.json` says in what order they are launched, each as flash_attn_4.py describes a launch, and what scratch
tensors the interface made for them. For sm_80 it has a kernel and no tiles: it is told that the GPU is an
sm_120, which gets the same kernel with tiles for 99 KB, and the compiler that it is an sm_80. Its postprocess
stores by stmatrix from sm_90 on, so that one is told sm_80 as well.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.peers import flash_attn_4
from tests.peers.flash_attn_4 import Kernel

INTERFACE = {"sm_80": "sm_120a"}  # what the interface is told where it is not the compiler's target
GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Case(flash_attn_4.Case):
    """One call of the interface's backward pass; dropout of none, the log-sum-exp without a gradient.

    alone: no CTAs in pairs, where the interface has both.
    """

    deterministic: bool = False
    alone: bool = False

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor of the call."""
        shapes = super().shapes()
        gradients = zip(GRADIENTS, "qkv", strict=True)
        return shapes | {"dout": shapes["out"]} | {name: shapes[of] for name, of in gradients}


@dataclass(frozen=True)
class Scratch:
    """A tensor that the interface makes: cleared, or with anything in it."""

    shape: tuple[int, ...]
    dtype: str
    cleared: bool


@dataclass(frozen=True)
class Backward:
    """A call: its launches in order, and its scratch tensors by name."""

    case: Case
    launches: tuple[Kernel, ...]
    scratch: dict[str, Scratch]

    @classmethod
    def load(cls, case: Case, directory: Path) -> Backward:
        """What was written under the case's name."""
        told = json.loads((directory / f"{case.name}.json").read_text())
        launches = []
        for launch in told["launches"]:
            ptx, object_file = (directory / f"{launch['kernel']}.{kind}" for kind in ("ptx", "o"))
            tile = tuple(launch["tile"])
            launches.append(Kernel(case, ptx.read_text(), object_file, launch["arguments"], tile))
        scratch = {
            name: Scratch(tuple(made["shape"]), made["dtype"], made["cleared"])
            for name, made in told["scratch"].items()
        }
        return cls(case, tuple(launches), scratch)

    @property
    def main(self) -> Kernel:
        """The launch with the five products."""
        return self.launches[1]


# Whole tiles of queries: in another the preprocess computes with registers that it never loaded, where it has
# no row, and drops the results. That is undefined in PTX, and an error on the emulator.
AMPERE = (
    Case("backward_d64", (192,), (160,)),
    Case("backward_d64_causal_gqa_fp16", (128,), (130,), heads=4, heads_kv=2, causal=True, dtype="float16"),
    Case("backward_d128_window", (128,), (150,), heads=1, heads_kv=1, dim=128, window=(40, 10)),
)
ONE_HEAD = {"heads": 1, "heads_kv": 1, "arch": "sm_90a"}
SHARED = {"heads": 2, "heads_kv": 1, "causal": True, "arch": "sm_90a"}
HOPPER = (
    Case("sm90_backward_d64_causal", (128,), (128,), causal=True, **ONE_HEAD),
    Case("sm90_backward_d64_ragged_fp16", (256,), (150,), dtype="float16", **ONE_HEAD),
    Case("sm90_backward_d64_deterministic", (128,), (300,), deterministic=True, **ONE_HEAD),
    Case("sm90_backward_d128", (160,), (200,), dim=128, **ONE_HEAD),
    Case("sm90_backward_d128_causal_gqa", (128,), (130,), dim=128, **SHARED),
)
# From head dim 128 on CTAs work in pairs, unless they are told to work alone.
ON_BLACKWELL = {"heads": 1, "heads_kv": 1, "arch": "sm_100a"}
IN_ORDER = ON_BLACKWELL | {"deterministic": True}
BLACKWELL = (
    Case("sm100_backward_d64_causal", (256,), (256,), causal=True, **ON_BLACKWELL),
    Case("sm100_backward_d64_ragged_fp16", (256,), (150,), dtype="float16", **ON_BLACKWELL),
    Case("sm100_backward_d64_deterministic", (128,), (300,), **IN_ORDER),
    Case("sm100_backward_d128", (256,), (200,), dim=128, alone=True, **ON_BLACKWELL),
    Case("sm100_backward_d128_pair_causal", (256,), (256,), dim=128, causal=True, **ON_BLACKWELL),
    Case("sm100_backward_d128_pair_deterministic", (128,), (300,), dim=128, **IN_ORDER),
    Case("sm100_backward_d192_128_pair", (128,), (256,), dim=192, dim_v=128, **ON_BLACKWELL),
)


def build(cases: Sequence[Case], directory: Path) -> dict[str, Backward]:
    """The calls of `cases`, compiled into `directory` unless they are there already.

    Raises RuntimeError with the compiling process's output where it fails.
    """
    flash_attn_4.compile_missing(__name__, cases, directory, environment)
    return {case.name: Backward.load(case, directory) for case in cases}


def environment(arch: str, directory: Path) -> dict[str, str]:
    """What a process that compiles for `arch` into `directory` must be started with."""
    told = {"FLASH_ATTENTION_ARCH": INTERFACE.get(arch, arch)}
    return flash_attn_4.environment(arch, directory) | told


def digest() -> str:
    """Of all that its kernels, as `build` leaves them, depend on."""
    return hashlib.sha256((Path(__file__).read_text() + flash_attn_4.digest()).encode()).hexdigest()[:16]


def record(cases: Sequence[Case], directory: Path) -> None:
    """Run the peer's interface on fake tensors and write what it compiles."""
    with flash_attn_4.interface_without_gpu() as interface:
        import cutlass.cute as cute
        import torch

        for case in cases:
            tensors = flash_attn_4.fakes(case)
            recorder = Recorder(case, directory, dict(tensors), cute.compile)
            with recorder.patched(interface, cute, torch):
                options = flash_attn_4.options_of(case) | {"deterministic": case.deterministic}
                interface._flash_attn_bwd(**tensors, **options)
            recorder.write()
            for function in ("_bwd_preprocess", "_flash_attn_bwd", "_bwd_postprocess_convert"):
                getattr(interface, function).compile_cache.clear()


@dataclass
class Recorder:
    """Stands in for the compiler while the interface runs, and keeps what would have been launched.

    tensors: those of the call, and then those that the interface made, by name.
    """

    case: Case
    directory: Path
    tensors: dict[str, Any]
    compiler: Callable
    cleared: list[Any] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    kernels: int = 0

    @contextmanager
    def patched(self, interface: Any, cute: Any, torch: Any) -> Iterator[None]:
        """Within this context the peer's interface calls what stands in."""
        postprocess, alone = interface.FlashAttentionBackwardPostprocess, self.case.alone
        if self.case.arch in INTERFACE:
            postprocess = _told(postprocess, int(self.case.arch.removeprefix("sm_")))
        with (
            mock.patch.object(cute, "compile", self.compile),
            mock.patch.object(torch, "zeros", self.zeros(torch.zeros)),
            mock.patch.object(interface, "FlashAttentionBackwardPostprocess", postprocess),
            mock.patch.object(interface.utils, "_fa_disable_2cta_enabled", alone),
        ):
            yield

    def compile(self, kernel: Any, *args: Any, **kwargs: Any) -> Callable:
        """cute.compile, except that what it returns describes the call that it gets instead of launching."""
        name, self.kernels = f"{self.case.name}-{self.kernels}", self.kernels + 1
        compiled = self.compiler(kernel, *args, **kwargs)
        stem = str(self.directory / name)
        compiled.export_to_c(object_file_path=f"{stem}.o", function_name="func")
        Path(f"{stem}.ptx").write_text(compiled.__ptx__)
        tile = _tile(kernel)

        def call(*arguments: Any) -> None:
            self._name_new(arguments)
            longest = max(self.case.seqlens_q)
            described = [flash_attn_4._describe(argument, self.tensors, longest) for argument in arguments]
            self.launches.append({"kernel": name, "tile": tile, "arguments": described})

        return call

    def zeros(self, make: Callable) -> Callable:
        """torch.zeros that remembers what it made."""

        def made(*args: Any, **kwargs: Any) -> Any:
            self.cleared.append(make(*args, **kwargs))
            return self.cleared[-1]

        return made

    def _name_new(self, arguments: Sequence[Any]) -> None:
        """Give tensors names that are none of the call's."""
        for tensor in (x for x in arguments if hasattr(x, "untyped_storage")):
            if all(_storage(tensor) != _storage(known) for known in self.tensors.values()):
                self.tensors[f"scratch{len(self.tensors)}"] = tensor

    def write(self) -> None:
        """NAME.json, when all is done."""
        cleared = set(map(_storage, self.cleared))
        scratch = {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
                   "cleared": _storage(tensor) in cleared}
            for name, tensor in self.tensors.items() if name not in self.case.shapes()
        }  # fmt: skip
        told = json.dumps({"launches": self.launches, "scratch": scratch})
        (self.directory / f"{self.case.name}.json").write_text(told)


def _told(postprocess: Callable, arch: int) -> Callable:
    """Its class, whatever architecture it is given."""
    return lambda dtype, head_dim, _, *args, **kwargs: postprocess(dtype, head_dim, arch, *args, **kwargs)


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


def _tile(kernel: Any) -> tuple[int, int]:
    """Rows of Q and keys per tile of a main kernel; (0, 0) of another."""
    for rows, keys in (("m_block_size", "n_block_size"), ("tile_m", "tile_n")):
        if hasattr(kernel, rows) and hasattr(kernel, keys):
            return getattr(kernel, rows), getattr(kernel, keys)
    return 0, 0


if __name__ == "__main__":
    record([Case.read(told) for told in json.load(sys.stdin)], Path(sys.argv[1]))

"""`python -m cute_flash compile`: compile kernels ahead of time, without a GPU.

    python -m cute_flash compile DIR --arch sm80 --head-dim 64 192x128 --features causal varlen,causal,lse

DIR then serves as CUTE_FLASH_BUNDLE on a machine that has no compiler. Each word list after --features is
one problem; every kernel is compiled that calls of some size get for it. Kernels for rules of your own: call
them once, on an emulated device too, and carry the cache's folder of your compiler version, which has the
same format; they are found by what the rule computes, under every Python.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from . import cache, rules
from .arch.append import AppendProblem
from .arch.backward import BackwardProblem
from .arch.kernel import Step
from .arch.problem import Asked, Device, KvCache, Problem
from .dispatch import EMULATED, select, steps
from .executable import artifact, key_of
from .kv_cache import ROTARY_STEP
from .masks import Document, PrefixLM
from .problems import problem
from .request import DTYPES

_TABLE = torch.zeros(1, 1, dtype=torch.int32)
_SLOPES = torch.zeros(1, 1)

# Word -> what it adds to a call: keywords of a Problem, or arguments of the interface (rules).
# Splits are the call's, not a word: what merges them is compiled with what takes them.
_FLAGS = tuple(field.name for field in fields(Problem) if field.type == "bool" and field.name != "split_kv")
_FLAGS += ("scheduled",)
_RULES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (1, 1)},
    "window_left": {"window": (1, None)},
    "window_right": {"window": (None, 1)},
    "prefix": {"mask": PrefixLM(1)},
    "prefix_table": {"mask": PrefixLM(_TABLE[0])},
    "document": {"mask": Document(_TABLE)},
    "softcap": {"softcap": 1.0},
    "alibi": {"alibi_slopes": _SLOPES[0]},
    "alibi_batch": {"alibi_slopes": _SLOPES},
}
_BLOCKS = {"block_mask": (128, 128)}  # a block mask's default block size
# What training calls: the forward pass with its log-sum-exp, and gradients through the output, or both.
# "deterministic" is said of gradients, with one of these words or alone.
_DETERMINISTIC = "deterministic"
_GRADIENTS = ("backward", "backward_lse", _DETERMINISTIC)
# Keys in a cache: its rows, and what finds a sequence's; or pages, of which the word tells the size.
_CACHES = {
    "kv_cache": {}, "cache_batch_idx": {"batch_idx": True}, "cache_leftpad": {"leftpad": True},
    "latent_kv": {"latent": True},
}  # fmt: skip
_PAGES = "page_size="
# What is done to a cache before attention; of a rotation the word tells how many numbers of a row it turns.
_TURNED = {"rotary_interleaved": "interleaved", "rotary_seqlens": "rotary_seqlens"}  # to fields
_APPENDS = ("append", *_TURNED)
_ROTARY = "rotary_dim="
WORDS = ("dense", *_FLAGS, *_RULES, *_BLOCKS, *_GRADIENTS, *_CACHES, *_APPENDS)
_WITH_NUMBERS = f"{_PAGES}N, {_ROTARY}N"
DEFAULT_FEATURES = ("dense", "causal", "varlen", "varlen,causal")
PARTS = {"object": "kernel.o", "ptx": "kernel.ptx", "cubin": "kernel.cubin", "json": "kernel.json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    add = parser.add_argument
    add("directory", type=_directory, metavar="DIR", help="where the files go; made if missing")
    add("--arch", nargs="+", choices=EMULATED, default=["sm80"], help="default: sm80")
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="default: all")
    add(
        "--head-dim", nargs="+", type=_head_dims, default=[(64, 64), (128, 128)], metavar="D",
        help="64, or 192x128 for QK and V; default: 64 128",
    )
    default = " ".join(DEFAULT_FEATURES)
    add(
        "--features", nargs="+", type=_features, default=list(DEFAULT_FEATURES), metavar="WORDS",
        help=f"one problem per comma-separated list of: {', '.join(WORDS)}, {_WITH_NUMBERS}; "
        f"default: {default}",
    )
    add(
        "--emit", type=_parts, metavar="PARTS",
        help=f"write these parts as files of their own instead of bundle files: {','.join(PARTS)}",
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """Compile what the arguments name; 1 where a kernel does not exist."""
    arguments.directory.mkdir(cache.FOLDER_MODE, parents=True, exist_ok=True)
    wanted = list(_wanted(arguments))
    failed = 0
    for number, (device, asked, words) in enumerate(wanted, start=1):
        answer = select(asked, device)
        name = f"[{number}/{len(wanted)}] {device.target} {asked.dtype} {words}"
        if not answer:
            say(f"{name}: {answer}")
            failed = 1
            continue
        started = time.perf_counter()
        keys = [_write(step, device, arguments) for step in steps(asked, device)]
        say(f"{name}: {', '.join(keys)}, {time.perf_counter() - started:.1f} s")
    return failed


def _write(step: Step, device: Device, arguments: argparse.Namespace) -> str:
    """Compile one kernel and write what is asked for; its key."""
    key, built = key_of(*step.compiled, device), artifact(*step.compiled, device)
    for part in arguments.emit or ():
        suffix = Path(PARTS[part]).suffix
        (arguments.directory / f"{key}{suffix}").write_bytes(built.files()[PARTS[part]])
    if not arguments.emit:
        cache.write(arguments.directory / f"{key}{cache.SUFFIX}", built)
    return key


def problem_of(dtype: str, head_dims: tuple[int, int], words: list[str]) -> Problem:
    """The Problem of a call with the features that `words` name."""
    given: dict[str, Any] = {"causal": False, "window": (None, None), "mask": None}
    given |= {"softcap": 0.0, "alibi_slopes": None}
    flags: dict[str, Any] = dict.fromkeys(_FLAGS, False)
    _refuse_contradictions(words)
    for word in words:
        if word in _FLAGS:
            flags[word] = True
        elif word in _RULES:
            given |= _RULES[word]
        elif word in _GRADIENTS:
            flags["lse"] = True
        elif word in _BLOCKS:
            flags["block_size"] = _BLOCKS[word]
        elif word in _CACHES:
            flags["cache"] = replace(flags.get("cache", KvCache()), **_CACHES[word])
        elif (page_size := _number(word, _PAGES)) is not None:
            flags["cache"] = replace(flags.get("cache", KvCache()), page_size=page_size)
        elif word not in ("dense", *_APPENDS) and _number(word, _ROTARY) is None:
            raise ValueError(f"--features has {word!r}; allowed: {', '.join(WORDS)}, {_WITH_NUMBERS}")
    masks = rules.mask_of(given["causal"], given["window"], given["mask"])
    scores = rules.score_of(given["softcap"], given["alibi_slopes"], None)
    head_dim, head_dim_v = head_dims
    code = rules.encode(masks, scores).code
    return problem(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, code=code, **flags)


def append_of(asked: Problem, words: list[str]) -> AppendProblem | None:
    """What comes before attention to a cache, where words name it."""
    numbers = [number for word in words if (number := _number(word, _ROTARY)) is not None]
    turned = {field: True for word, field in _TURNED.items() if word in words}
    if not (numbers or turned or "append" in words):
        return None
    if asked.cache is None:
        beside = f"{', '.join(_CACHES)} or {_PAGES}N"
        raise ValueError(f"--features appends to no cache; allowed: beside {beside}")
    rotary = numbers[0] if numbers else 0
    if turned and not rotary:
        raise ValueError(f"--features has {', '.join(turned)} without {_ROTARY}N; allowed: with it")
    if rotary % ROTARY_STEP:
        raise ValueError(f"--features has {_ROTARY}{rotary}; allowed: multiples of {ROTARY_STEP}")
    return AppendProblem(
        dtype=asked.dtype,
        head_dim=asked.head_dim,
        head_dim_v=asked.head_dim_v,
        varlen=asked.varlen and rotary > 0,
        paged=asked.page_size is not None,
        batch_idx=asked.cache.batch_idx,
        rotary_dim=rotary,
        **turned,
    )


def _number(word: str, name: str) -> int | None:
    """N of a word "name=N"."""
    number = word.removeprefix(name)
    return int(number) if word.startswith(name) and number.isdecimal() else None


def _refuse_contradictions(words: list[str]) -> None:
    """ValueError for words that say the same argument twice, of which one would be lost."""
    said: dict[str, str] = {}
    for word in words:
        for argument in _RULES.get(word, (word,)):
            if argument in said:
                raise ValueError(f"--features has {said[argument]!r} and {word!r}: {argument} is given twice")
            said[argument] = word


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[Device, Asked, str]]:
    """(device, problem, what it is called) of everything to compile."""
    given = (arguments.arch, arguments.features, arguments.dtype, arguments.head_dim)
    for arch, features, dtype, dims in itertools.product(*given):
        words, name = features.split(","), f"{dims[0]}x{dims[1]} {features}"
        asked = problem_of(dtype, dims, words)
        yield EMULATED[arch], asked, name
        if any(word in _GRADIENTS for word in words):
            gradients = BackwardProblem(asked, "backward_lse" in words, _DETERMINISTIC in words)
            yield EMULATED[arch], gradients, f"{name}, gradients"
        if (appending := append_of(asked, words)) is not None:
            yield EMULATED[arch], appending, f"{name}, appending"


def _head_dims(text: str) -> tuple[int, int]:
    head_dim, _, head_dim_v = text.partition("x")
    try:
        return int(head_dim), int(head_dim_v or head_dim)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither like 64 nor like 192x128") from None


def _features(text: str) -> str:
    try:
        append_of(problem_of("float16", (64, 64), text.split(",")), text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--features ")) from None
    return text


def _directory(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; allowed: {','.join(PARTS)}")
    return parts

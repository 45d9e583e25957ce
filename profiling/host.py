"""Microseconds of the host's time per call, with the launch left out: no GPU is needed.

CPU tensors stand for a GPU's, whose numbers inside cu_seqlens and block masks are not looked at; the compiled
kernel is a function that does nothing. `again`: a call like an earlier one; `anew`: unlike any, say of a new
length. All are the least of many short rounds, so that other work on the machine does not count.

Parts of a call again: `watched`, whether somebody watches operators; `rules`, mask and score objects as
text and values; `key`, what the call is remembered under, and finding it; `result`, its memory; `operands`,
what else the kernel takes, and calling it. Of a call anew: `checks`; `launch`, plan and operands; `remember`,
for the next; and where somebody watches, `operator`, torch's dispatcher. Parts are timed by themselves,
warmer than inside a call: they add up to less than the whole.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

import cute_flash
from cute_flash import (
    Causal,
    Document,
    SlidingWindow,
    contents,
    create_block_mask,
    launch,
    ops,
    repeat,
)  # fmt: skip
from cute_flash.masks import Mask

ROUND = 20  # calls that are timed together
IN_PARTS = ("dense", "packed, causal", "mask object with a number")


@dataclass(frozen=True)
class Near(Mask):
    """A user's rule, which is traced in every call: whatever its code uses may have changed."""

    far: int

    def visible(self, q, k):
        return q - k <= self.far


class Kind(NamedTuple):
    """A kind of call: its options, and the microseconds that it may take again."""

    name: str
    options: dict[str, Any]
    bar: float = 14.0


def main(arguments: list[str]) -> int:
    """Print a line per kind of call, and the parts of some; 0 where all bars are met."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sm80")
    parser.add_argument("--rounds", type=int, default=300)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with (
        mock.patch.object(launch, "executable", lambda *key: _nothing),
        mock.patch.object(contents, "can_be_read", lambda device: False),
        cute_flash.emulated(chosen.arch),
        torch.no_grad(),
    ):
        met = _print_kinds(chosen.rounds)
        for kind in (kind for kind in kinds() if kind.name in IN_PARTS):
            print(f"\n{kind.name}")
            for part, microseconds in parts(kind, chosen.rounds).items():
                print(f"  {part:22} {microseconds:8.2f}", flush=True)
    return 0 if met else 1


def _print_kinds(rounds: int) -> bool:
    """A line for each kind of call; whether all bars are met."""
    print("call                     again µs  bar µs          anew µs")
    met = True
    for kind in kinds():
        call = _call(kind)
        again, anew = least(call, rounds), least(functools.partial(_anew, call), rounds)
        met &= again <= kind.bar
        verdict = "met" if again <= kind.bar else "MISSED"
        print(f"{kind.name:24} {again:8.1f}  {kind.bar:6.0f}  {verdict:6}  {anew:7.1f}", flush=True)
    return met


def kinds() -> list[Kind]:
    """Every feature by itself, and some together."""
    slopes, ids, q = torch.rand(4), torch.zeros(2, 128, dtype=torch.int32), _tensors()[0]
    packing = {"cu_seqlens": torch.tensor([0, 100, 256], dtype=torch.int32), "longest": 156}
    lengths, table = torch.tensor([60, 7], dtype=torch.int32), torch.randperm(16).int().view(2, 8)
    new = dict.fromkeys("kv", torch.zeros(2, 1, 4, 64).half())
    pages = dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(128, 32).half())
    pages |= {"cache_seqlens": lengths, "block_table": table}
    return [
        Kind("dense", {}, 10.0),
        Kind("causal", {"causal": True}),
        Kind("window", {"window_size": (30, 0)}),
        Kind("softcap", {"softcap": 30.0}),
        Kind("ALiBi", {"alibi_slopes": slopes}),
        Kind("softcap, ALiBi, causal", {"softcap": 30.0, "alibi_slopes": slopes, "causal": True}),
        Kind("dropout", {"dropout_p": 0.1}),
        Kind("sink", {"learnable_sink": slopes}),
        Kind("lse", {"return_lse": True}),
        Kind("out given", {"out": torch.empty_like(q)}),
        Kind("packed, causal", {"packing": packing, "causal": True}),
        Kind("block mask", {"block_mask": create_block_mask(Causal(), 2, 4, 128, 128)}),
        Kind("keys in 3 parts", {"num_splits": 3}),
        Kind("mask object", {"mask": Causal()}),
        Kind("mask object with a number", {"mask": SlidingWindow(30, 0)}),
        Kind("mask object with a table", {"mask": Document(ids), "causal": True}),
        Kind("mask function", {"mask": lambda q, k: k <= q}),
        Kind("score function", {"score": lambda s, batch, head, q, k: s + head}),
        Kind("mask class of a user", {"mask": Near(5)}, 50.0),
        Kind("cache", {"cache": {"cache_seqlens": lengths}}, 16.0),
        Kind("cache, a token", {"cache": {"cache_seqlens": lengths, **new}, "causal": True}, 30.0),
        Kind("pages, a token, rotated", {"cache": pages | new, "causal": True}, 36.0),
    ]


def parts(kind: Kind, rounds: int) -> dict[str, float]:
    """Microseconds of each part of a call, again and anew."""
    seen: list[tuple] = []
    with mock.patch.object(repeat, "forward", lambda *given: seen.append(given) or repeat.Result(None, None)):
        _call(kind)()
    given = seen[0]
    q, k, v, packing, options = given
    repeat.forward(*given)
    seen_rules = repeat.rules_of(options)
    key = repeat.key_of(*given, seen_rules)
    decided = repeat._DECIDED[key]
    call = repeat.checked(*given)
    timed = {
        "again": lambda: repeat.forward(*given),
        "watched": repeat.watched,
        "rules": lambda: repeat.rules_of(options),
        "key": lambda: repeat._DECIDED.get(repeat.key_of(*given, seen_rules)),
        "result": lambda: torch.empty_like(q) if decided.like_q else q.new_empty(decided.out_shape),
        "operands": lambda: decided.again(*given, seen_rules),
        "anew": lambda: _anew(lambda: repeat.forward(*given)),
        "checks": lambda: repeat.checked(*given),
        "operator": lambda: ops.forward(call, options.out),
        "launch": lambda: ops._forward(*call),
        "remember": lambda: repeat._decide(call, q, decided.bound, options, seen_rules),
    }
    found = {name: least(function, rounds) for name, function in timed.items()}
    found["operands"] -= found["result"]
    found["operator"] -= found["launch"]
    return found


def least(function: Callable[[], Any], rounds: int) -> float:
    """Microseconds of one call, in the fastest round."""
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(ROUND):
            function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / ROUND * 1e6


def _tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 128, 4, 64, generator=generator).half() for _ in range(3)]


def _call(kind: Kind) -> Callable[[], Any]:
    """The call, as a user writes it."""
    tensors, options = _tensors(), dict(kind.options)
    packing, cache = options.pop("packing", None), options.pop("cache", None)
    if cache is not None:
        q, *caches = tensors
        if "block_table" in cache:
            caches = [tensor.reshape(16, 16, *tensor.shape[2:]) for tensor in caches]
        q = q[:, :1]
        return lambda: cute_flash.flash_attn_with_kvcache(q, *caches, **cache, **options)
    if packing is None:
        return lambda: cute_flash.flash_attn_func(*tensors, **options)
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    starts, longest = packing["cu_seqlens"], packing["longest"]
    return lambda: cute_flash.flash_attn_varlen_func(*flat, starts, starts, longest, longest, **options)


def _anew(call: Callable[[], Any]) -> None:
    repeat.forget_calls()
    call()


def _nothing(*operands: Any) -> None:
    """In a kernel's place."""

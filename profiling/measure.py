"""How things are timed and checked: rows of the field's sweep, interleaved timing, a sampled oracle.

    FLOPs of a row   2 S² (D + Dv) H B, half of it when causal, 2.5 times that for the backward pass: the
                     field's rule (Dao 2023, section 4.1)
    inputs           random normal, several sets of them, used in turn, so that no call finds its own in L2
    time             CUDA events around each call; a spin kernel before a round keeps the GPU busy while the
                     host enqueues it, so that launch gaps are not counted
    interleaving     a round calls every candidate once, each round starting with another one
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cute_flash import cuda_devices
from tests.accuracy import hold, largest_error

CUDA = "cuda"
REPEATS, DRY_REPEATS = 30, 2
WARM_SECONDS = 0.15
TOKENS, HIDDEN = 16384, 2048
DIMS = ((128, 128), (64, 64), (256, 256), (192, 128))
# Not in order of size: a run that is cut short has the long ones, the short ones and the middle.
SEQLENS = (8192, 1024, 16384, 4096, 512, 2048, 32768)
SAMPLED_ROWS = 48
GRADIENT_ROWS = 1024  # of a head, at a time
LONGEST_SPIN = 0.02  # seconds


@dataclass(frozen=True)
class Row:
    """One shape: batch × seqlen tokens, as many keys as queries and KV heads as query heads; bfloat16.

    backward: the backward pass alone, not the forward pass.
    """

    head_dim: int
    head_dim_v: int
    causal: bool
    seqlen: int
    batch: int
    heads: int
    backward: bool = False

    @property
    def key(self) -> str:
        dims = "-".join(str(dim) for dim in dict.fromkeys((self.head_dim, self.head_dim_v)))
        kind = f"{'causal' if self.causal else 'full'}{'-backward' if self.backward else ''}"
        return f"d{dims}-{kind}-s{self.seqlen}"

    @property
    def flops(self) -> int:
        """Floating-point operations, by the field's rule."""
        all_pairs = 2 * self.seqlen**2 * (self.head_dim + self.head_dim_v) * self.heads * self.batch
        forward = all_pairs // 2 if self.causal else all_pairs
        return forward * 5 // 2 if self.backward else forward

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v: (batch, seqlen, heads, dim)."""
        dims = (self.head_dim, self.head_dim, self.head_dim_v)
        return tuple((self.batch, self.seqlen, self.heads, dim) for dim in dims)

    def tensors(self, device: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Random normal q, k, v, bfloat16."""
        return tuple(
            torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
            for shape in self.shapes
        )


def sweep(dry_run: bool = False) -> list[Row]:
    """The field's sweep: 16k tokens in all, hidden size 2048; two tiny rows in a dry run."""
    if dry_run:
        return [Row(64, 64, False, 64, 1, 1), Row(64, 64, True, 96, 1, 2)]
    return [
        Row(dim, dim_v, causal, seqlen, max(1, TOKENS // seqlen), HIDDEN // dim_v)
        for seqlen in SEQLENS
        for dim, dim_v in DIMS
        for causal in (True, False)
    ]


def row_named(key: str) -> Row:
    """The row of the sweep, dry or not, with this key; KeyError lists what there is."""
    rows = {row.key: row for row in (*sweep(), *sweep(dry_run=True))}
    if key not in rows:
        raise KeyError(f"no row {key!r}; allowed: {', '.join(rows)}")
    return rows[key]


def torch_device(machine: str) -> str:
    """Where tensors lie for calls on `machine`: "cuda", or an emulated architecture's name."""
    return CUDA if machine == CUDA else "cpu"


def synchronize(machine: str) -> None:
    """Wait for the GPU, if there is one."""
    if machine == CUDA:
        torch.cuda.synchronize()


def input_sets(row: Row, machine: str) -> list[tuple[torch.Tensor, ...]]:
    """As many sets of (q, k, v) as it takes for all but one to push that one out of the L2."""
    device = torch_device(machine)
    generator = torch.Generator(device).manual_seed(row.seqlen + row.head_dim)
    first = row.tensors(device, generator)
    count = 2
    if machine == CUDA:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, 1 + -(-2 * cache // sum(x.nbytes for x in first)))
    return [first, *(row.tensors(device, generator) for _ in range(count - 1))]


class Times(NamedTuple):
    """Seconds: the median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
        )


def interleaved(
    functions: dict[str, Callable[[int], Any]], machine: str, repeats: int, say: Callable[[str], None]
) -> dict[str, Times]:
    """Time of each function, called with a counter that chooses the input set.

    say: told the name of each function before its first call, so that a crash can be laid at its door.
    """
    for name, function in functions.items():
        say(name)
        function(0)
        synchronize(machine)
    say("")
    spin = _warm_up(functions, machine) if machine == CUDA else 0
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(repeats):
        turn = i % len(names)
        for name, spent in _round(functions, [*names[turn:], *names[:turn]], i, machine, spin):
            seconds[name].append(spent)
    return {name: Times.of(values) for name, values in seconds.items()}


def _warm_up(functions: dict[str, Callable[[int], Any]], machine: str) -> int:
    """Call everything for a while; returns the spin, in clock cycles, that hides a round's host time."""
    started, i, host = time.perf_counter(), 0, 0.0
    while i < 3 or time.perf_counter() - started < WARM_SECONDS:
        synchronize(machine)
        before = time.perf_counter()
        for function in functions.values():
            function(i)
        host = time.perf_counter() - before
        i += 1
    synchronize(machine)
    clock = cuda_devices.gpus()[torch.cuda.current_device()].clock
    return int(min(2 * host + 1e-4, LONGEST_SPIN) * clock)


def _round(functions, names: list[str], i: int, machine: str, spin: int) -> list[tuple[str, float]]:
    """One call of each in this order: (name, seconds)."""
    if machine != CUDA:
        found = []
        for name in names:
            before = time.perf_counter()
            functions[name](i)
            found.append((name, time.perf_counter() - before))
        return found
    marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
    torch.cuda._sleep(spin)
    for name in names:
        marks[name][0].record()
        functions[name](i)
        marks[name][1].record()
    torch.cuda.synchronize()
    return [(name, begin.elapsed_time(end) / 1e3) for name, (begin, end) in marks.items()]


def host_seconds(function: Callable[[int], Any], machine: str, calls: int) -> float:
    """Seconds that the host spends per call, not waiting for the GPU; the median of five loops."""
    found = []
    for _ in range(5):
        synchronize(machine)
        before = time.perf_counter()
        for i in range(calls):
            function(i)
        found.append((time.perf_counter() - before) / calls)
    synchronize(machine)
    return statistics.median(found)


def output_gradient(v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What flows into the backward pass: random normal, always the same for a shape."""
    generator = torch.Generator(q.device).manual_seed(2)
    shape = (*q.shape[:-1], v.shape[-1])
    return torch.randn(shape, generator=generator, device=q.device, dtype=q.dtype)


class GradientOracle:
    """Gradients of the first and the last head in float64, and how far from them a right answer may be."""

    def __init__(self, inputs: tuple[torch.Tensor, ...], causal: bool) -> None:
        q, k, v = self._inputs = inputs
        self._dout, self._causal = output_gradient(v, q), causal
        self._heads = [(0, 0), (q.shape[0] - 1, q.shape[2] - 1)]
        self._exact, self._peer = (
            [_gradients([x[b, :, h] for x in (q, k, v, self._dout)], causal, compute) for b, h in self._heads]
            for compute in (torch.float64, q.dtype)
        )

    def check(self, found: tuple[torch.Tensor, ...]) -> float:
        """Hold (dq, dk, dv) to the accuracy rule; returns the largest error. AssertionError says more."""
        largest, names = 0.0, ("dq", "dk", "dv")
        for i, (name, gradient, given) in enumerate(zip(names, found, self._inputs, strict=True)):
            assert gradient.shape == given.shape, f"{name} has shape {tuple(gradient.shape)}"
            assert gradient.isfinite().all(), f"{name} is not finite everywhere"
            for (b, h), exact, peer in zip(self._heads, self._exact, self._peer, strict=True):
                slack = torch.finfo(given.dtype).eps / 2 * exact[i].abs().max().item()
                hold(name, gradient[b, :, h], exact[i], peer[i], slack)
                largest = max(largest, largest_error(gradient[b, :, h], exact[i]))
        return largest


def _gradients(tensors: list[torch.Tensor], causal: bool, compute: torch.dtype) -> list[torch.Tensor]:
    """dq, dk, dv of one head, given q, k, v, dout (rows, dim): products in `compute`, their sums wider."""
    q, k, v, dout = (x.to(compute) for x in tensors)
    wide = torch.promote_types(compute, torch.float32)
    scale, rows, keys = q.shape[-1] ** -0.5, q.shape[0], torch.arange(k.shape[0], device=q.device)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))
    for first in range(0, rows, GRADIENT_ROWS):
        block = slice(first, min(first + GRADIENT_ROWS, rows))
        s = (q[block] @ k.T) * scale
        if causal:
            last = torch.arange(block.start, block.stop, device=q.device) + k.shape[0] - rows
            s = s.masked_fill(keys[None, :] > last[:, None], float("-inf"))
        p, dp = s.softmax(-1), dout[block] @ v.T
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True))) * scale
        dq[block] = (ds @ k).to(wide)
        dk += (ds.T @ q[block]).to(wide)
        dv += (p.T @ dout[block]).to(wide)
    return [x.to(compute) for x in (dq, dk, dv)]


class Oracle:
    """Sampled rows of an output in float64, and how far from them a right answer may be."""

    def __init__(self, inputs: tuple[torch.Tensor, ...], causal: bool, seed: int = 0) -> None:
        q, k, v = inputs
        generator = torch.Generator().manual_seed(seed)
        count = min(SAMPLED_ROWS, q.shape[1])
        self._rows = torch.randperm(q.shape[1], generator=generator)[:count].to(q.device)
        self._shape, self._eps = (*q.shape[:-1], v.shape[-1]), torch.finfo(q.dtype).eps
        self._exact = _sampled(q, k, v, self._rows, causal, torch.float64)
        self._peer = _sampled(q, k, v, self._rows, causal, q.dtype)

    def check(self, out: torch.Tensor) -> float:
        """Hold `out` to the accuracy rule of tests/accuracy.py; returns the sampled rows' largest error.

        All of out must be finite. AssertionError says how far off it is.
        """
        assert out.shape == self._shape, f"out has shape {tuple(out.shape)}, expected {tuple(self._shape)}"
        assert out.isfinite().all(), f"{(~out.isfinite()).sum().item()} elements of out are not finite"
        found, largest = out[:, self._rows], self._exact.abs().max().item()
        hold("out", found, self._exact, self._peer, self._eps / 2 * largest)
        return largest_error(found, self._exact)


def _sampled(q, k, v, rows: torch.Tensor, causal: bool, compute: torch.dtype) -> torch.Tensor:
    """out (batch, rows, heads, dim_v) of some rows of queries, each step in `compute`, by sequence."""
    keys = torch.arange(k.shape[1], device=q.device)
    hidden = keys[None, :] > rows[:, None] + k.shape[1] - q.shape[1]
    found = []
    for q_b, k_b, v_b in zip(q[:, rows].to(compute), k, v, strict=True):
        s = torch.einsum("rhd,khd->hrk", q_b, k_b.to(compute)) * q.shape[-1] ** -0.5
        if causal:
            s = s.masked_fill(hidden, float("-inf"))
        found.append(torch.einsum("hrk,khd->rhd", s.softmax(-1), v_b.to(compute)))
    return torch.stack(found)

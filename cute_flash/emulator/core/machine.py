"""One wave of CTAs: its registers, memories and mechanisms, and how steps run on a set of threads."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..base.errors import EmulatorError, OutOfBounds
from .code import CONTROL, Code, Constant
from .geometry import Geometry, Unlaunched
from .memory import RANK_SHIFT, GlobalMemory, OwnedMemory, ParameterMemory
from .parking import Parked, Waiter
from .special import value_of
from .state import LANES, STORAGE, Registers, Threads, ThreadSets

if TYPE_CHECKING:
    from ..base.options import Launch, Options
    from .observe import Observers


class Part:
    """A mechanism beside threads and memories; a wave makes one of each kind when it is first asked for."""

    def __init__(self, m: Machine):
        self.machine = m

    def exited(self) -> list[tuple[int, Threads]]:
        """Some threads have exited: the sets that go on because of that."""
        return []

    def describe(self) -> list[str]:
        """A line for whoever waits here, for the message of a deadlock."""
        return []

    def ended(self) -> None:
        """Every thread has exited: raise for what must not be left over."""


AnyPart = TypeVar("AnyPart", bound=Part)


class Machine(Geometry):
    """One wave. Steps see it as `m`.

    unlaunched: the grid's CTAs to come, of which this wave takes up to `ctas`. memory, shared, local, params:
    the spaces. rows, banks: see `Registers`. watch: who looks on, or None.
    progress: counts events that may let waiting threads go on. executed: warps that ran each step, as
    differences: advance() notes where a run of steps begins and ends.
    """

    def __init__(
        self, code: Code, launch: Launch, memory: GlobalMemory, options: Options, unlaunched: Unlaunched,
        *, ctas: int, watch: Observers | None,
    ):  # fmt: skip
        first = unlaunched.take(ctas)
        super().__init__(code, launch, first, unlaunched.first - first)
        self.memory, self.options, self.unlaunched, self.watch = memory, options, unlaunched, watch
        self.sets = ThreadSets(self.warps, self.ctas)
        self.exits = self.progress = 0
        self.random = np.random.default_rng([options.seed, first])
        shared = code.shared_static + launch.shared_memory
        self.shared = OwnedMemory("shared", self.ctas, code.shared_base, shared)
        self.local = OwnedMemory("local", self.warps * self.ctas * LANES, 0, code.local_bytes)
        self.shared.strict = self.local.strict = options.uninitialized == "error"
        self.params = ParameterMemory(launch.params)
        self.refused: set[int] = set()  # CTAs that have been told that nothing is left to launch
        self.parked = Parked(self)
        self.parts: dict[type[Part], Part] = {}
        constants = {
            width: [self.constant(c, width) for c in values]
            for width, values in code.layout.constants.items()
        }
        self.registers = Registers(code.layout.counts, constants, self.warps, self.ctas)
        self.rows, self.banks = self.registers.rows, self.registers.banks
        for (width, row), value in code.layout.copies.items():
            self.banks[width][row] = self.constant(value, width)
        self.executed = np.zeros(len(code.steps) + 1, np.int64)
        if watch is not None:
            watch.begin(self)

    def part(self, kind: type[AnyPart]) -> AnyPart:
        """The wave's mechanism of a kind."""
        found = self.parts.get(kind)
        if found is None:
            found = self.parts[kind] = kind(self)
        return found

    # Addresses and constants.

    def place(self, g: Threads, address: np.ndarray, remote: bool) -> tuple[np.ndarray, np.ndarray]:
        """(CTA of the wave, address in its memory) of each thread's shared address.

        remote: whether it may name another CTA of the cluster. That one's memory is gone when it has exited.
        """
        if self.cluster == 1:
            return g.cta, address
        rank, own = address >> RANK_SHIFT, self.rank[g.cta]
        wrong = (rank >= self.cluster) | ((rank != own) & (not remote))
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            text = f"shared address {int(address[k]):#x} lies in CTA {int(rank[k])} of the cluster"
            raise self.fault(OutOfBounds, g, k, text)
        gone = (rank != own) & ~self.live.any(axis=(0, 2))[g.cta - own + rank]
        if gone.any():
            k = int(np.flatnonzero(gone)[0])
            text = f"shared address {int(address[k]):#x} lies in CTA {int(rank[k])} of the cluster"
            raise self.fault(OutOfBounds, g, k, f"{text}, which has exited")
        return g.cta - own + rank, address & (1 << RANK_SHIFT) - 1

    def constant(self, constant: Constant, width: int) -> np.ndarray:
        """A constant's value, broadcastable to (warps, ctas, 32)."""
        if constant.kind == "bits":
            return np.array(constant.value, STORAGE[width])
        if constant.kind == "symbol":
            value = np.array(self.code.symbols[constant.value] + constant.offset, STORAGE[width])
            if constant.value in self.code.shared_symbols and self.cluster > 1:
                value = value + (self.rank.astype(STORAGE[width]) << RANK_SHIFT).reshape(1, -1, 1)
            return value
        return value_of(self, str(constant.value))

    # Asynchrony.

    def lands_at_issue(self, kind: str) -> bool:
        """Whether an operation of this kind, "copy" or "product", is done the moment it is issued."""
        mode = self.options.asynchrony
        if mode == "random":
            return self.random.random() < 0.5
        return mode == "eager" or mode == {"copy": "late_products", "product": "late_copies"}[kind]

    def park(self, here: int, threads: Threads, key: Hashable, give_up: Callable | None = None) -> None:
        """Suspend threads at control step `here`, which they execute again after `wake(key)`.

        give_up(machine, threads): what ends a bounded wait whose event does not come.
        """
        self.parked.park(key, Waiter(here, threads, give_up))

    def wake(self, key: Hashable) -> None:
        """Let those go on who are parked under `key`."""
        self.progress += 1
        self.parked.wake(key)

    # Execution.

    def exit(self, g: Threads) -> list[tuple[int, Threads]]:
        """The threads of `g` are done. Returns the sets that this lets go on."""
        self.live &= ~g.mask
        self.exits += 1
        self.progress += 1
        return [going for part in list(self.parts.values()) for going in part.exited()]

    def finish(self) -> None:
        """Every thread has exited: check what must not be left over."""
        for part in self.parts.values():
            part.ended()

    def advance(self, pc: int, g: Threads, limit: int) -> list[tuple[int, Threads]]:
        """Run `g` from step pc up to its next control step (included) or up to step `limit`."""
        code = self.code
        stop = code.next_control[pc]
        if not g.whole:
            stop = min(stop, code.next_converged[pc])
        at_limit = limit <= stop
        if at_limit:
            stop = limit
        self.executed[pc] += g.warps
        at = pc
        try:
            if self.watch is None:
                for at, run in enumerate(code.runs[pc:stop], pc):  # noqa: B007
                    run(self, g)
            elif not self.watch.every_step:
                for at, run in enumerate(code.runs[pc:stop], pc):
                    self.at = at
                    run(self, g)
            else:
                for at, run in enumerate(code.runs[pc:stop], pc):
                    self.at = at
                    self.watch.step(self, g)
                    run(self, g)
            self.executed[stop] -= g.warps
            if at_limit:
                return [(stop, g)]
            at = self.at = stop
            self.executed[stop] += g.warps
            self.executed[stop + 1] -= g.warps
            if self.watch is not None and self.watch.every_step:
                self.watch.step(self, g)
            if code.steps[stop].kind == CONTROL:
                return code.runs[stop](self, g, stop)
            return self.converge(stop, g)
        except EmulatorError as error:
            instruction = code.steps[at].where
            raise error.at(instruction.line, instruction.text, instruction.source) from None
        except Exception as error:
            instruction = code.steps[at].where
            failure = EmulatorError(f"the emulator itself failed: {error!r}")
            raise failure.at(instruction.line, instruction.text, instruction.source) from error

    def converge(self, pc: int, g: Threads) -> list[tuple[int, Threads]]:
        """Run a step that needs certain lanes of each warp on those warps of a partial set that have them."""
        step = self.code.steps[pc]
        need = np.ones((g.warps, LANES), bool)
        if step.members is not None:
            masks = np.zeros(self.sets.shape, np.uint32)
            masks[g.index] = self.rows["u32"][step.members][g.index]
            word = masks[g.warp_at, g.cta_at].max(axis=1)
            need = (word[:, None] >> np.arange(LANES, dtype=np.uint32) & 1).astype(bool)
            need &= self.live[g.warp_at, g.cta_at]
        ready, late = self._divide(g, need, pc)
        if ready is None:
            return late
        step.run(self, ready)
        return [*late, (pc + 1, ready)]

    def whole_warps(self, g: Threads, here: int) -> tuple[Threads | None, list[tuple[int, Threads]]]:
        """(the warps of `g` with all their live lanes, the rest put back to wait for the lanes they miss)."""
        if g.whole:
            return g, []
        return self._divide(g, self.live[g.warp_at, g.cta_at], here)

    def _divide(
        self, g: Threads, need: np.ndarray, pc: int
    ) -> tuple[Threads | None, list[tuple[int, Threads]]]:
        have = g.mask[g.warp_at, g.cta_at]
        ready = (have | ~need).all(axis=1)
        if ready.all():
            return g, []
        if not ready.any():
            return None, [(-1 - pc, g)]
        mask = np.zeros_like(g.mask)
        mask[g.warp_at[ready], g.cta_at[ready]] = have[ready]
        threads = self.sets.of(mask)
        return threads, [(-1 - pc, self.sets.without(g, threads))]

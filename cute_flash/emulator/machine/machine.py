"""One wave of CTAs: its registers, memories, barriers and geometry, and how steps run on a set of threads."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import EmulatorError, OutOfBounds
from ..checks.races import RaceDetector
from ..core.engine import Engine, Parked, Stalls, Waiter
from ..core.memory import RANK_SHIFT, OwnedMemory, ParameterMemory
from ..core.observe import Observers
from ..core.special import value_of
from ..core.state import LANES, STORAGE, Registers, Threads, ThreadSets
from ..translate.translation import CONTROL
from ..units.bulk import BulkGroups
from ..units.cluster import ClusterBarriers, RegisterPool, Unlaunched
from ..units.mbarrier import MBarriers
from ..units.sync import AsyncCopies, NamedBarriers
from ..units.tensor_map import TensorMap
from ..units.tensor_memory import TensorMemory
from ..units.tensor_products import TensorUnit
from ..units.warpgroup import Products

if TYPE_CHECKING:
    from ..core.memory import GlobalMemory
    from ..translate.translation import Constant
    from .execute import Launch, Options
    from .program import Code


class Machine:
    """One wave: registers, memories, barriers and geometry. Steps see it as `m`.

    warps: per CTA; ctas: in the wave; live: bool (warps, ctas, 32), the threads that have not exited.
    """

    def __init__(
        self, code: Code, launch: Launch, memory: GlobalMemory, options: Options, first: int, ctas: int
    ):
        self.code, self.launch, self.memory, self.options = code, launch, memory, options
        self.first, self.ctas = first, ctas
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.warps = -(-threads // LANES)
        self.sets = ThreadSets(self.warps, ctas)
        self.cluster = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        self.rank = np.arange(ctas) % self.cluster  # of each CTA in its cluster
        self.live = np.broadcast_to(
            (np.arange(self.warps * LANES) < threads).reshape(self.warps, 1, LANES), self.sets.shape
        ).copy()
        self.exits = 0
        self.progress = 0  # counts events that may let waiting threads go on
        self.random = np.random.default_rng([options.seed, first])
        self.at = 0  # the running step, kept only while somebody watches
        self.watch = watchers(options)
        base = code.shared_base
        self.shared = OwnedMemory("shared", ctas, base, code.shared_static + launch.shared_memory)
        self.local = OwnedMemory("local", self.warps * ctas * LANES, 0, code.local_bytes)
        self.shared.strict = self.local.strict = options.uninitialized == "error"
        self.params = ParameterMemory(launch.params)
        self.barriers = NamedBarriers(self)
        self.mbarriers = MBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.copies = AsyncCopies(self)
        self.bulk_groups = BulkGroups(self)
        self.tensor_maps: dict[bytes, TensorMap] = {}
        self.register_pool = RegisterPool(self)
        self.unlaunched = Unlaunched(0, 0, self.cluster)
        self.refused: set[int] = set()  # CTAs that have been told that nothing is left to launch
        self.tensor = TensorMemory(self)
        self.tensor_unit = TensorUnit()
        self.engine = Engine(self)
        self.products = Products(self)
        self.parked = Parked(self)
        self.stalls = Stalls(self)
        constants = {
            width: [self.constant(c, width) for c in values]
            for width, values in code.layout.constants.items()
        }
        self.registers = Registers(code.layout.counts, constants, self.warps, ctas)
        self.rows, self.banks = self.registers.rows, self.registers.banks
        for (width, row), value in code.layout.copies.items():
            self.banks[width][row] = self.constant(value, width)
        # Warps that ran each step, as differences: advance() notes where a run of steps begins and ends.
        self.executed = np.zeros(len(code.steps) + 1, np.int64)
        if self.watch is not None:
            self.watch.begin(self)

    # Geometry and constants.

    def cta_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z of every CTA of the wave."""
        return self.coordinates(np.arange(self.first, self.first + self.ctas))

    def coordinates(self, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z of CTAs by their numbers in the order of launch: the CTAs of a cluster are neighbours."""
        size = self.launch.cluster
        clusters = [n // c for n, c in zip(self.launch.grid, size, strict=True)]
        which, rank = linear // self.cluster, linear % self.cluster
        x = which % clusters[0] * size[0] + rank % size[0]
        y = which // clusters[0] % clusters[1] * size[1] + rank // size[0] % size[1]
        z = which // (clusters[0] * clusters[1]) * size[2] + rank // (size[0] * size[1])
        return x, y, z

    def place(self, g: Threads, address: np.ndarray, remote: bool) -> tuple[np.ndarray, np.ndarray]:
        """(CTA of the wave, address in its memory) of each thread's shared address.

        remote: whether it may name another CTA of the cluster.
        """
        if self.cluster == 1:
            return g.cta, address
        rank, own = address >> RANK_SHIFT, self.rank[g.cta]
        wrong = (rank >= self.cluster) | ((rank != own) & (not remote))
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            text = f"shared address {int(address[k]):#x} lies in CTA {int(rank[k])} of the cluster"
            raise self.fault(OutOfBounds, g, k, text)
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

    def cta_name(self, cta: int) -> str:
        x, y, z = (int(v[cta]) for v in self.cta_index())
        return f"({x}, {y}, {z})"

    # Faults.

    def fault(self, kind: type[EmulatorError], g: Threads, k: int, text: str) -> EmulatorError:
        """The error for thread number k of the set."""
        warp, cta, lane = int(g.warp[k]), int(g.cta[k]), int(g.lane[k])
        return kind(f"{text} (CTA {self.cta_name(cta)}, warp {warp}, lane {lane})")

    def warp_fault(self, kind: type[EmulatorError], g: Threads, k: int, text: str) -> EmulatorError:
        """The error for warp number k of the set."""
        return kind(f"{text} (CTA {self.cta_name(int(g.cta_at[k]))}, warp {int(g.warp_at[k])})")

    def line(self, step: int) -> str:
        """A step's PTX line for messages."""
        instruction = self.code.steps[step].where
        return f"PTX line {instruction.line}: {instruction.text}"

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
        self.parked.wake(key)

    # Execution.

    def exit(self, g: Threads) -> list[tuple[int, Threads]]:
        """The threads of `g` are done. Returns the sets that this lets go on."""
        self.live &= ~g.mask
        self.exits += 1
        self.progress += 1
        if self.cluster_barriers.arrived.any():
            self.cluster_barriers.release()
        return self.barriers.release() if self.barriers.waiting else []

    def finish(self) -> None:
        """Every thread has exited: check what must not be left over."""
        self.register_pool.check_warpgroups()
        self.products.ledger.check_complete()
        self.tensor.finish()

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
            if self.watch is not None:
                self.watch.step(self, g)
            if code.steps[stop].kind == CONTROL:
                return code.runs[stop](self, g, stop)
            return self.converge(stop, g)
        except EmulatorError as error:
            instruction = code.steps[at].where
            raise error.at(instruction.line, instruction.text) from None
        except Exception as error:
            instruction = code.steps[at].where
            failure = EmulatorError(f"the emulator itself failed: {error!r}")
            raise failure.at(instruction.line, instruction.text) from error

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


def watchers(options: Options) -> Observers | None:
    """The observers of a run as one, None when there are none."""
    members = (*options.observers, *((RaceDetector(),) if options.races else ()))
    return Observers(members) if members else None

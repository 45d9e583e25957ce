"""SMs, clock by clock: schedulers that issue, units that take it, warps that wait for each other.

    machine = Machine(of("H200"), programs, joined)     programs: by (cta, warp), in order of age
    machine.run()                                       -> clocks until the last warp ends

Each of an SM's four schedulers issues one instruction a clock: of the same warp while it can (and does not
yield), else of the youngest that can. When a warp can is in its machine code: stall counts and scoreboards.
Units are queues; what they do is booked at issue, in order of time, so whoever waits learns the time at once.
Only meetings of warps (joins) block: a phase ends when the last one comes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace

from .costs import UNITS, Cost
from .joins import NEVER, Join
from .parts import SCHEDULERS, Scheduler, Sm, Span, Step, Warp
from .trace import Event
from .trace import Join as Phase

QUEUE = "tensor core's queue"
PAUSE = 24  # clocks that do not part two spans of a unit
_MUFU, _MEMORY, _TENSOR_MEMORY = map(UNITS.index, ("mufu", "memory queue", "tensor memory"))


class Machine:
    """Some CTAs on their SMs. spans: where it is told to keep them, what every lane did."""

    def __init__(
        self,
        chip: SimpleNamespace,
        programs: Mapping[tuple[int, int], list[Step]],
        joined: Mapping[Phase, int],
        sms: Mapping[int, int] | None = None,
        keep: bool = False,
    ):
        self.chip, self.keep = chip, keep
        self.spans: list[Span] = []
        self.joins = {phase: Join(count) for phase, count in joined.items()}
        self.arrivals: Counter[tuple] = Counter()
        self.groups: dict[tuple, Join] = {}
        self.sms: dict[int, Sm] = {}
        self.schedulers: list[Scheduler] = []
        self.warps: list[Warp] = []
        self._heap: list[tuple[float, int]] = []
        self._number: dict[int, int] = {}  # of schedulers, by identity
        self._last: dict[str, Span] = {}
        slots: Counter[int] = Counter()
        for (cta, number), steps in programs.items():
            sm = (sms or {}).get(cta, 0)
            self._add(sm, slots[sm], Warp(f"CTA {cta} warp {number}", cta, f"{cta}:{number // 4}", steps))
            slots[sm] += 1
        self._groups_of_products()

    def _add(self, number: int, slot: int, warp: Warp) -> None:
        if number not in self.sms:
            sm = self.sms[number] = Sm(number)
            self.schedulers += [Scheduler(sm) for _ in range(SCHEDULERS)]
            self._number = {id(scheduler): i for i, scheduler in enumerate(self.schedulers)}
        mine = [s for s in self.schedulers if s.sm.number == number]
        warp.scheduler = mine[slot % SCHEDULERS]
        warp.scheduler.warps.insert(0, warp)  # the youngest first
        self.warps.append(warp)

    def _groups_of_products(self) -> None:
        """A join for every group of wgmma: as many arrivals as it has products."""
        for warp in self.warps:
            number = size = 0
            for cost, _, _ in warp.steps:
                if cost.kind == "wgmma":
                    size += 1
                    if cost.closes:
                        self.groups.setdefault((warp.group, number), Join(size))
                        number, size = number + 1, 0

    def run(self) -> float:
        """Run to the end; the clock at which the last warp ends. RuntimeError where warps wait forever."""
        for number, scheduler in enumerate(self.schedulers):
            self._plan(number, 0.0 if scheduler.warps else NEVER)
        heap, schedulers = self._heap, self.schedulers
        while heap:
            time, number = heapq.heappop(heap)
            scheduler = schedulers[number]
            if scheduler.planned == time:
                scheduler.planned = NEVER
                self._plan(number, self._turn(scheduler, time))
        stuck = [warp for warp in self.warps if warp.ended == NEVER]
        if stuck:
            told = "; ".join(f"{w.name} at {w.steps[w.at - 1][0].line}: {w.cause}" for w in stuck[:4])
            raise RuntimeError(f"{len(stuck)} warps wait forever: {told}")
        return max(warp.ended for warp in self.warps)

    def _plan(self, number: int, time: float) -> None:
        scheduler = self.schedulers[number]
        time = max(time, scheduler.next)
        if time < scheduler.planned:
            scheduler.planned = time
            heapq.heappush(self._heap, (time, number))

    def _turn(self, scheduler: Scheduler, now: float) -> float:
        """Issue one instruction, if one can; when the scheduler should look again."""
        last = scheduler.last
        others = [warp for warp in scheduler.warps if warp is not last]
        order = others if last is None else [*others, last] if scheduler.yielded else [last, *others]
        for warp in order:
            if warp.ready <= now and self._fits(scheduler, warp, now):
                self._issue(scheduler, warp, now)
                scheduler.next = now + 1
                break
        return min((warp.ready for warp in scheduler.warps), default=NEVER)

    def _fits(self, scheduler: Scheduler, warp: Warp, now: float) -> bool:
        """Whether a ready warp's unit takes it now; if not, it is ready when the unit is."""
        cost = warp.steps[warp.at][0]
        unit = cost.unit
        until = 0.0
        if unit:
            until = scheduler.free[unit]
            if unit == _MUFU:
                until -= self.chip.queued_specials * cost.interval
            elif unit == _MEMORY and len(scheduler.queue) >= self.chip.queue_depth:
                until = max(until, scheduler.queue[0])
        elif cost.kind == "wgmma":
            until = self._room(scheduler.sm, warp, now)
        sm = scheduler.sm
        if sm.lost and now < sm.tensor and cost.kind != "wgmma":
            place = now % 32
            lost = sm.lost * 1.5 if unit == _MUFU else sm.lost
            if place < lost:
                until = max(until, now - place + lost)
        if until <= now:
            return True
        self._account(warp, now)
        warp.since, warp.cause = now, UNITS[unit] if unit else QUEUE
        warp.ready = -(-until // 1)
        return False

    def _account(self, warp: Warp, now: float) -> None:
        """Book what a warp has waited for until now: first its own cause, then its turn."""
        held = min(warp.ready, now) - warp.since
        if held > 0:
            warp.lost[warp.cause] += held
            if warp.cause == QUEUE:
                self._span(warp.name, f"wait: {QUEUE}", warp.since, warp.since + held)
        if (late := now - max(warp.ready, warp.since)) > 0:
            warp.lost["not selected"] += late

    def _room(self, sm: Sm, warp: Warp, now: float) -> float:
        """When the queue of products takes another one of a warpgroup."""
        ends = sm.products
        while ends and ends[0][0] <= now:
            ends.popleft()
        mine = [end for end, group, _ in ends if group == warp.group]
        shared = len(mine) < len(ends)
        depth = self.chip.wgmma_queue_shared if shared else self.chip.wgmma_queue
        if shared:
            mine = [end for end, _, _ in ends]
        # The last one booked may be this very one, which another warp of the group has issued.
        return mine[-int(depth)] if len(mine) >= depth else 0.0

    def _issue(self, scheduler: Scheduler, warp: Warp, now: float) -> None:
        cost, event, jumps = warp.steps[warp.at]
        self._account(warp, now)
        scheduler.issued += 1
        scheduler.last, scheduler.yielded = warp, cost.yields
        warp.at += 1
        warp.since = now + max(cost.stall, self.chip.taken_branch if jumps else 1)
        warp.ready, warp.cause = warp.since, "unit busy"
        _DO[cost.kind](self, scheduler, warp, cost, event, now)
        if warp.at == len(warp.steps):
            warp.ended, warp.ready = now + cost.stall, NEVER
        elif warp.ready != NEVER:
            self._await(warp)

    def _await(self, warp: Warp) -> None:
        """Hold a warp until the scoreboards are free that its next instruction waits for."""
        for number in warp.steps[warp.at][0].waits:
            if warp.scoreboards[number] > warp.ready:
                warp.ready, warp.cause = warp.scoreboards[number], warp.causes[number]
        warp.ready = -(-warp.ready // 1)

    def _release(self, warp: Warp, cost: Cost, result: float, sources: float) -> None:
        """Book when the scoreboards of an instruction are free."""
        for number, time in ((cost.result, result), (cost.sources, sources)):
            if number >= 0 and time > warp.scoreboards[number]:
                warp.scoreboards[number], warp.causes[number] = time, cost.name

    def _block(self, warp: Warp, join: Join, latency: float, cost: Cost, what: str) -> None:
        """The warp goes on some clocks after a join is over."""
        began = warp.since

        def go_on(join: Join) -> None:
            waited = max(0.0, join.time + latency - began)
            warp.ready, warp.cause = max(warp.since, join.time + latency), what
            self._release(warp, cost, warp.ready, warp.ready)
            if waited > 0:
                self._span(warp.name, f"wait: {what}", began, warp.ready, (join.last, join.since))
            if warp.at < len(warp.steps):
                self._await(warp)
                self._plan(self._number[id(warp.scheduler)], warp.ready)

        if join.known:
            go_on(join)
        else:
            warp.ready, warp.cause = NEVER, what
            join.waiting.append(go_on)

    def _span(
        self, lane: str, name: str, start: float, end: float, cause: tuple[str, float] | None = None
    ) -> None:
        if self.keep:
            self.spans.append(Span(lane, name, start, end, cause))

    def join(self, phase: Phase) -> Join:
        """Of a phase that someone waits for; over from the beginning where nobody joins it."""
        return self.joins.get(phase) or Join(0)

    # What each kind of instruction does.

    def _unit(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        start = now
        if cost.unit:
            start = max(now, s.free[cost.unit])
            s.free[cost.unit] = start + cost.interval
            s.busy[cost.unit] += cost.interval
            if cost.unit == _MUFU and self.keep:
                self._exponential(s, start, start + cost.interval)
        self._release(warp, cost, start + cost.latency, start + cost.interval)

    def _exponential(self, s: Scheduler, start: float, end: float) -> None:
        """Keep that a scheduler's MUFU is busy; what follows within a few clocks is one span."""
        lane = f"SM {s.sm.number} MUFU {self._number[id(s)] % SCHEDULERS}"
        last = self._last.get(lane)
        if last is not None and start - last.end < PAUSE:
            last.end = end
        else:
            self._last[lane] = Span(lane, "busy", start, end)
            self.spans.append(self._last[lane])

    def _queued(self, s: Scheduler, warp: Warp, cost: Cost, now: float) -> float:
        """Pass the scheduler's memory queue, then the SM's data path; when that begins."""
        s.free[_MEMORY] = now + cost.interval
        queue = s.queue
        while queue and queue[0] <= now:
            queue.popleft()
        sm = s.sm
        start = max(now + cost.interval, sm.shared)
        sm.shared = start + self._beside_products(sm, cost.wavefronts, now)
        sm.busy["shared memory"] += cost.wavefronts
        queue.append(start)
        return start

    def _beside_products(self, sm: Sm, wavefronts: float, now: float) -> float:
        """Clocks that shared memory takes for a warp's accesses while a product reads its operands there.

        Who wants more than its share gets that, or what the other one leaves; the product is late by what it
        lacks.
        """
        if now >= sm.tensor or not sm.taken:
            return wavefronts
        given = min(sm.taken, self.chip.fair_share)
        clocks = wavefronts / (1 - given)
        sm.tensor += clocks * (sm.taken - given) / sm.taken
        return clocks

    def _shared(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        start = self._queued(s, warp, cost, now)
        self._release(warp, cost, start + cost.latency + cost.wavefronts, start + cost.wavefronts)

    def _global(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        start = self._queued(s, warp, cost, now)
        self._release(warp, cost, self._filled(s.sm, start, cost) + cost.latency, start + cost.wavefronts)

    def _filled(self, sm: Sm, start: float, cost: Cost) -> float:
        """When the last byte has passed between L2 and the SM, latency apart."""
        return self._fill(sm, start, cost.wavefronts * self.chip.shared_bytes)

    def _fill(self, sm: Sm, start: float, nbytes: float) -> float:
        clocks = nbytes / self.chip.fill_bytes
        sm.fill = max(start, sm.fill) + clocks
        sm.busy["L2"] += clocks
        sm.nbytes += nbytes
        return sm.fill

    def _copy(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        start = self._queued(s, warp, cost, now)
        warp.copied = self._filled(s.sm, start, cost) + cost.latency
        self._release(warp, cost, warp.copied, start + cost.wavefronts)

    def _group(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        warp.copies.append(warp.copied)
        self._release(warp, cost, warp.copied, now + cost.latency)

    def _group_wait(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        done = warp.copies[: len(warp.copies) - cost.number]
        if done and done[-1] > warp.ready:
            warp.ready, warp.cause = done[-1], "copies"
            self._span(warp.name, "wait: copies", now, warp.ready)

    def _wgmma(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        """The fourth warp's issue starts it; it ends a tail after its place in the tensor core's queue."""
        sm, key = s.sm, (warp.group, warp.products)
        warp.products += 1
        group = self.groups.get((warp.group, warp.closed))
        warp.closed += cost.closes
        self.arrivals[key] += 1
        if self.arrivals[key] < SCHEDULERS:
            return
        start = max(now, sm.tensor)
        end = sm.tensor = start + cost.interval
        sm.taken = cost.nbytes / self.chip.shared_bytes / cost.interval
        sm.busy["shared memory"] += cost.nbytes / self.chip.shared_bytes
        slices = -(-2 * cost.number // 128)
        sm.lost = slices * (slices + 1) // 2 if slices > 1 else 0
        sm.products.append((end, warp.group, start))
        sm.busy["tensor core"] += cost.interval
        self._span(f"SM {sm.number} tensor core", f"{warp.group} {cost.line.opcode}", start, end)
        if group is not None:
            group.arrive(end + self.chip.wgmma_tail, "tensor core", now)

    def _wgmma_wait(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        number = warp.closed - 1 - cost.number
        if number >= 0 and (warp.group, number) in self.groups:
            self._block(warp, self.groups[warp.group, number], 0, cost, "wgmma")

    def _sync_slot(self, sm: Sm, now: float) -> float:
        sm.sync = max(now, sm.sync) + self.chip.sync_interval
        return sm.sync

    def _arrive(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        time = self._sync_slot(s.sm, now) + self.chip.arrive_latency
        self._release(warp, cost, time, time)
        self._come(event, time, warp.name, now)

    def _come(self, event: Event | None, time: float, who: str, since: float) -> None:
        for phase in event.joins if event is not None else ():
            self.joins[phase].arrive(time, who, since)

    def _wait(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        seen = self._sync_slot(s.sm, now) + self.chip.predicate_latency
        self._release(warp, cost, seen, now + 2)
        if event is None or event.until is None or event.until not in self.joins:
            return
        join = self.joins[event.until]
        if not join.known or join.time > now:
            self._block(warp, join, self.chip.release_latency, cost, f"mbarrier {event.until[2]:#x}")

    def _signal(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        self._come(event, self._sync_slot(s.sm, now), warp.name, now)

    def _sync(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        self._come(event, self._sync_slot(s.sm, now), warp.name, now)
        if event is not None and event.until is not None:
            what = f"barrier {event.until[2]}"
            self._block(warp, self.join(event.until), self.chip.named_latency, cost, what)

    def _load(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        """A bulk copy in: the unit takes one at a time; its bytes wait for those before."""
        sm = s.sm
        sm.tma = max(now, sm.tma) + self.chip.tma_issue
        begun = max(sm.tma, sm.fill)
        landed = self._fill(sm, sm.tma, event.nbytes if event else 0)
        between = cost.line.opcode.startswith("UBLKCP.S.S")
        latency = self.chip.cluster_copy_latency if between else self.chip.tma_latency
        landed += latency - self.chip.tma_issue
        self._release(warp, cost, sm.tma, sm.tma)
        self._span(f"SM {sm.number} TMA", f"load {event.nbytes if event else 0} bytes", begun, landed)
        self._come(event, landed, "TMA", now)

    def _store(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        sm = s.sm
        sm.tma = max(now, sm.tma) + self.chip.tma_issue
        nbytes = event.nbytes if event else 0
        begun = sm.tma
        if event is not None and event.sums and self.chip.sum_rate:
            begun = max(begun, sm.sums)
            sm.sums = begun + nbytes / self.chip.sum_rate / 1e3 * self.chip.clock
            sm.busy["sums"] += sm.sums - begun
            warp.copied = sm.sums
        else:
            warp.copied = begun + nbytes / self.chip.fill_bytes
        sm.busy["shared memory"] += nbytes / self.chip.shared_bytes
        warp.copied += self.chip.tma_store_latency
        self._release(warp, cost, sm.tma, sm.tma)
        self._span(f"SM {sm.number} TMA", f"store {event.nbytes if event else 0} bytes", now, warp.copied)

    def _tensor_product(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        sm = s.sm
        sms = self.sms.values() if "2CTA" in cost.line.parts else (sm,)
        columns = event.columns if event else 0
        nbytes = 2 * 16 * (columns / len(sms) + 128 * (not cost.closes))
        read = nbytes / self.chip.shared_bytes
        clocks = max(self.chip.tensor_floor, columns / 2, read)
        start = max(now, *(each.tensor for each in sms), 0.0)
        for each in sms:
            each.tensor = start + clocks
            each.busy["tensor core"] += clocks
            each.busy["shared memory"] += read
            each.taken = read / clocks
            what = f"{event.rows if event else 0} rows"
            self._span(f"SM {each.number} tensor core", what, start, each.tensor)
        self._release(warp, cost, now + 10, now + 10)

    def _tensor_commit(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        time = max(now, s.sm.tensor) + self.chip.tensor_tail
        self._release(warp, cost, now + 10, now + 10)
        self._come(event, time, "tensor core", now)

    def _tensor_memory(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        nbytes = 32 * 4 * (event.columns if event else 0)
        rate = self.chip.tensor_read_bytes if cost.name == "LDTM" else self.chip.tensor_write_bytes
        start = max(now, s.free[_TENSOR_MEMORY])
        s.free[_TENSOR_MEMORY] = end = start + nbytes / rate
        s.busy[_TENSOR_MEMORY] += nbytes / rate
        self._release(warp, cost, end + cost.latency, end)

    def _cluster_arrive(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        self._come(event, now + self.chip.cluster_latency, warp.name, now)

    def _cluster_wait(self, s: Scheduler, warp: Warp, cost: Cost, event: Event | None, now: float) -> None:
        if event is not None and event.until is not None:
            self._block(warp, self.join(event.until), 0, cost, "cluster")


_DO = {
    name.replace("_", " "): getattr(Machine, f"_{name}")
    for name in (
        "unit", "shared", "global", "copy", "wgmma", "wgmma_wait", "arrive", "wait", "signal", "sync", "load",
        "store", "tensor_product", "tensor_commit", "tensor_memory", "cluster_arrive", "cluster_wait",
    )
} | {"copy group": Machine._group, "flush": Machine._group, "group wait": Machine._group_wait}  # fmt: skip

"""wgmma under way: products from their issue through commit to the wait, per warp of a wave.

A product reads shared memory and A's registers when it happens: with its group's commit (eager), when a wait
of its warpgroup forces it (late), or in between (random). From issue to completion the accumulator holds
poison unless products are eager. Products on one accumulator happen in the order of their issue, and together
where they can. A warp's wait returns when all four warps have committed what it waits for, and what it waits
for is then over for all four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import RegisterInFlight, WarpgroupError
from ..core.engine import Engine, Operation
from ..core.events import Unit
from ..core.machine import Machine, Part
from ..core.state import LANES
from .descriptors import CHUNK
from .products import WARPS, Crew, Form, Operands, addresses, multiply, multiply_short

if TYPE_CHECKING:
    from ..core.state import Threads

# Of a product, per warp: descriptors of A (None where it is in registers) and of B, and whether to add to D.
PerWarp = tuple[np.ndarray | None, np.ndarray, np.ndarray]
POISON = np.uint32(0xFFFFFFFF)
KEY = "the other warps of the warpgroup to commit their products"


@dataclass(slots=True, eq=False)
class Product:
    """One wgmma.mma_async of a set of whole warps; arrays have one entry per warp of `g`.

    keep: D is added to. fresh: the start value is D's at issue (`start`, or still in the registers where
    that is None), not the result of an earlier product under way.
    """

    form: Form
    g: Threads
    a: np.ndarray | None
    b: np.ndarray
    keep: np.ndarray
    fresh: np.ndarray
    start: np.ndarray | None  # uint32 (registers, warps, 32)

    def part(self, g: Threads, chosen: np.ndarray) -> Product:
        """The product of some of its warps."""
        a = None if self.a is None else self.a[chosen]
        start = None if self.start is None else self.start[:, chosen]
        return Product(self.form, g, a, self.b[chosen], self.keep[chosen], self.fresh[chosen], start)


class Group(Operation):
    """The products between two commits of a set of warps. number: of the group, per warp of `g`."""

    kind = "product"

    def __init__(self, g: Threads, products: list[Product], number: np.ndarray):
        self.g, self.products, self.number = g, products, number
        self.where = products[0].form.where if products else None
        self.landed = False

    def land(self, m: Machine) -> None:
        """Compute the products, after those of older groups of the same warps."""
        m.part(Products).happen(self)


def _continues(one: Product, other: Product) -> bool:
    """Whether two products that follow each other can be one sum."""
    same = one.g is other.g and one.form.chains_with(other.form)
    return same and bool(other.keep.all()) and not other.fresh.any()


class Products(Part):
    """The products of a wave. Arrays are (warps, ctas)."""

    def __init__(self, m: Machine):
        super().__init__(m)
        shape = m.sets.shape[:2]
        self.eager = m.options.asynchrony in ("eager", "late_copies")
        self.short = m.options.fp8_accumulator == "hopper"
        self.committed = np.zeros(shape, np.int64)
        self.waited = np.zeros(shape, np.int64)
        self.open: list[Product] = []  # not committed
        self.groups: list[Group] = []  # committed, not waited for by all warps; oldest first
        self.happening: list[Product] = []  # the rest of the group that is being computed
        self.ledger = Ledger(m)
        self.crews: dict[Threads, Crew] = {}

    def crew(self, g: Threads) -> Crew:
        """The warps of a set by warpgroup, remembered."""
        found = self.crews.get(g)
        if found is None:
            if len(self.crews) > 1000:
                self.crews.clear()
            found = self.crews[g] = Crew(g)
        return found

    def ended(self) -> None:
        self.ledger.check_complete()

    # Issue.

    def issue(self, g: Threads, form: Form, operands: PerWarp) -> None:
        """Start a product of whole warps."""
        m = self.machine
        a, b, keep = operands
        self.check_warpgroups(g)
        self.ledger.note(g, self.crew(g), form, operands)
        product = Product(form, g, a, b, keep, np.ones(g.warps, bool), None)
        if m.watch is not None:
            self._watch(product)
        if not self.eager:
            product.fresh = ~self._has_predecessor(product)
            if product.fresh.any():
                product.start = g.gather(m.banks[32], form.d)
                g.scatter(m.banks[32], form.d, np.full_like(product.start, POISON))
        elif self.open or self.groups:
            product.fresh = ~self._has_predecessor(product)
        self.open.append(product)

    def _under_way(self) -> list[Product]:
        """Products that have not happened, oldest first."""
        pending = [p for group in self.groups if not group.landed for p in group.products]
        return self.happening + pending + self.open

    def _has_predecessor(self, product: Product) -> np.ndarray:
        """Per warp: whether an earlier product on the same accumulator has not happened yet."""
        found = np.zeros(product.g.warps, bool)
        for other in reversed(self._under_way()):
            if other.form.accumulator is product.form.accumulator:
                if other.g is product.g:
                    return np.ones(product.g.warps, bool)
                found |= other.g.warp_mask[product.g.warp_at, product.g.cta_at]
        return found

    def check_warpgroups(self, g: Threads) -> None:
        """Raise unless every warp of the set belongs to a warpgroup."""
        m = self.machine
        whole = m.warps // WARPS * WARPS
        if m.warps % WARPS and (g.warp_at >= whole).any():
            k = int(np.flatnonzero(g.warp_at >= whole)[0])
            text = f"the CTA's {m.warps} warps leave this one without a warpgroup of {WARPS}"
            raise m.warp_fault(WarpgroupError, g, k, text)

    # Commit and completion.

    def commit(self, g: Threads) -> None:
        """Close the group of every warp of `g`."""
        m = self.machine
        self.check_warpgroups(g)
        mine, rest = [], []
        for product in self.open:
            inside, outside = self._divided(product, g)
            mine += [inside] if inside is not None else []
            rest += [outside] if outside is not None else []
        self.open = rest
        number = self.committed[g.warp_at, g.cta_at]
        self.committed[g.warp_at, g.cta_at] += 1
        if mine:
            group = Group(g, mine, number)
            self.groups.append(group)
            m.part(Engine).issue(group)
        if KEY in m.parked.waiting:
            m.wake(KEY)

    def _divided(self, product: Product, g: Threads) -> tuple[Product | None, Product | None]:
        """A product's part inside the set `g` and its part outside."""
        if product.g is g:
            return product, None
        inside = g.warp_mask[product.g.warp_at, product.g.cta_at]
        if inside.all():
            return product, None
        if not inside.any():
            return None, product
        sets = self.machine.sets
        common = sets.of(product.g.mask & g.mask)
        return product.part(common, inside), product.part(sets.without(product.g, common), ~inside)

    def happen(self, group: Group) -> None:
        """Compute a group's products, after the older groups of its warps."""
        for other in self.groups[: self.groups.index(group)]:
            if not other.landed and (other.g.warp_mask & group.g.warp_mask).any():
                self.machine.part(Engine).finish(other)
        products, at = group.products, 0
        while at < len(products):
            end = at + 1
            while end < len(products) and _continues(products[end - 1], products[end]):
                end += 1
            self.happening = products[end:]
            self._compute(products[at:end])
            at = end

    def _compute(self, run: list[Product]) -> None:
        """Compute products that are one sum, and hand the result to the accumulator or its next product."""
        m, first, last = self.machine, run[0], run[-1]
        form, g = first.form, first.g
        crew = self.crew(g)
        operands = [
            Operands(p.form, None if p.a is None else crew.by_party(p.a), crew.by_party(p.b)) for p in run
        ]
        start = first.start if first.start is not None else g.gather(m.banks[32], form.d)
        if self.short and form.tiles[0].bits == 8 and not form.half:
            begin = np.where(first.keep[:, None], start, np.uint32(0))
            words = multiply_short(m, g, crew, operands, begin)
        else:
            words = _accumulate(multiply(m, g, crew, operands), start, first.keep, form.half)
        self._deliver(last, words)

    def _deliver(self, product: Product, words: np.ndarray) -> None:
        """Results become the start of the next product on the accumulator, or stand in its registers."""
        m, g = self.machine, product.g
        left = np.ones(g.warps, bool)
        for other in self._under_way() if not self.eager else ():
            if other.form.accumulator is not product.form.accumulator:
                continue
            waiting = ~other.fresh & g.warp_mask[other.g.warp_at, other.g.cta_at]
            if not waiting.any():
                continue
            if other.start is None:
                other.start = np.empty((len(other.form.d), other.g.warps, LANES), np.uint32)
            flat = other.g.flat_warp[waiting]
            source = np.searchsorted(g.flat_warp, flat)
            taken = left[source]
            target = np.flatnonzero(waiting)[taken]
            other.start[:, target] = words[:, source[taken]]
            other.fresh[target] = True
            left[source] = False
        if left.all():
            g.scatter(m.banks[32], product.form.d, words)
        elif left.any():
            mask = np.zeros_like(g.mask)
            mask[g.warp_at[left], g.cta_at[left]] = True
            m.sets.of(mask).scatter(m.banks[32], product.form.d, words[:, left])

    # Wait.

    def wait(self, g: Threads, keep: int, here: int) -> list[tuple[int, Threads]]:
        """Wait for all but the `keep` youngest groups: the sets that go on; the others are parked."""
        m = self.machine
        self.check_warpgroups(g)
        target = self.committed[g.warp_at, g.cta_at] - keep
        slowest = self._slowest()[g.warp_at // WARPS, g.cta_at]
        ready = slowest >= target
        if not ready.all():
            g, late = self._split(g, ready)
            m.park(here, late, KEY)
            if g is None:
                return []
            target = target[ready]
        self._complete(g, target)
        return [(here + 1, g)]

    def _slowest(self) -> np.ndarray:
        """Groups that all four warps have committed, (warpgroups, ctas)."""
        m = self.machine
        whole = m.warps // WARPS * WARPS
        return self.committed[:whole].reshape(-1, WARPS, m.ctas).min(axis=1)

    def _split(self, g: Threads, ready: np.ndarray) -> tuple[Threads | None, Threads]:
        m = self.machine
        mask = np.zeros_like(g.mask)
        late = ~ready
        mask[g.warp_at[late], g.cta_at[late]] = g.mask[g.warp_at[late], g.cta_at[late]]
        waiting = m.sets.of(mask)
        return (m.sets.without(g, waiting) if ready.any() else None), waiting

    def _complete(self, g: Threads, target: np.ndarray) -> None:
        """Everything before group `target` of each warp of `g` is over, for the whole warpgroup."""
        m = self.machine
        over = np.zeros(self.committed.shape, np.int64)
        over[g.warp_at, g.cta_at] = np.maximum(target, 0)
        whole = m.warps // WARPS * WARPS
        per_warpgroup = over[:whole].reshape(-1, WARPS, m.ctas)
        per_warpgroup[:] = per_warpgroup.max(axis=1, keepdims=True)
        for group in list(self.groups):
            if group.landed:
                continue
            forced = group.number < over[group.g.warp_at, group.g.cta_at]
            if forced.any():
                m.part(Engine).finish(group if forced.all() else self._part_off(group, forced))
        self.waited[g.warp_at, g.cta_at] = np.maximum(self.waited[g.warp_at, g.cta_at], target)
        if m.watch is not None:
            self._tell(g, target)
        self.groups = [
            group
            for group in self.groups
            if not group.landed or (group.number >= self.waited[group.g.warp_at, group.g.cta_at]).any()
        ]

    def _part_off(self, group: Group, chosen: np.ndarray) -> Group:
        """Divide a pending group in two; returns the part of the chosen warps."""
        m = self.machine
        mask = np.zeros_like(group.g.mask)
        mask[group.g.warp_at[chosen], group.g.cta_at[chosen]] = True
        parts = []
        for inside, g in ((chosen, m.sets.of(mask)), (~chosen, m.sets.of(group.g.mask & ~mask))):
            products = [self._divided(product, g)[0] for product in group.products]
            parts.append(Group(g, [p for p in products if p is not None], group.number[inside]))
        for held in (self.groups, m.part(Engine).pending):
            held[held.index(group) : held.index(group) + 1] = parts
        return parts[0]

    # Observers and checks.

    def _watch(self, product: Product) -> None:
        """Tell observers what each warp's product reads in shared memory."""
        m, g, form = self.machine, product.g, product.form
        for k, (warp, cta) in enumerate(zip(g.warp_at.tolist(), g.cta_at.tolist(), strict=True)):
            unit = Unit(cta, "products", warp // WARPS, int(self.committed[warp, cta]) + 1, warp)
            for at in addresses(form, product.a, product.b, k, warp % WARPS):
                m.watch.async_read(m, unit, cta, at, CHUNK)

    def _tell(self, g: Threads, target: np.ndarray) -> None:
        m = self.machine
        for warp, cta, over in zip(g.warp_at.tolist(), g.cta_at.tolist(), target.tolist(), strict=True):
            if over > 0:
                m.watch.unit_done(m, (cta, warp), Unit(cta, "products", warp // WARPS, over, warp))

    def check_untouched(self, g: Threads, touched: frozenset[int], by: Form | None) -> None:
        """Raise RegisterInFlight if a warp of `g` has a product under way that uses one of `touched`.

        touched: rows of the b32 bank. by: the product that does the touching, None for other instructions.
        Under way is what the warp has not waited for, whether it has happened or not.
        """
        for group in self.groups:
            flying = group.number >= self.waited[group.g.warp_at, group.g.cta_at]
            if flying.any():
                mask = np.zeros_like(group.g.warp_mask)
                mask[group.g.warp_at[flying], group.g.cta_at[flying]] = True
                for product in group.products:
                    self._check_product(g, touched, by, (product, mask & product.g.warp_mask))
        for product in self.open:
            self._check_product(g, touched, by, (product, product.g.warp_mask))

    def _check_product(
        self, g: Threads, touched: frozenset[int], by: Form | None, under_way: tuple[Product, np.ndarray]
    ) -> None:
        product, warps = under_way
        common = warps & g.warp_mask
        if not common.any():
            return
        rows = touched & _conflicts(product.form, by)
        if rows:
            k = int(np.searchsorted(g.flat_warp, np.flatnonzero(common)[0]))
            where = product.form.where
            text = f"a register of the product at PTX line {where.line} that has not been waited for"
            raise self.machine.warp_fault(RegisterInFlight, g, k, f"touches {text}")


def _conflicts(form: Form, by: Form | None) -> frozenset[int]:
    """Rows of a product under way that `by` must not touch."""
    d, a = frozenset(form.accumulator), _rows_of_a(form)
    if by is None:
        return d | a
    if by.accumulator is form.accumulator:
        return a & frozenset(by.accumulator) | d & _rows_of_a(by)
    return d | a & frozenset(by.accumulator)


def _rows_of_a(form: Form) -> frozenset[int]:
    return frozenset(() if form.a is None else form.a.tolist())


def _accumulate(total: np.ndarray, start: np.ndarray, keep: np.ndarray, half: bool) -> np.ndarray:
    """Registers of D: the sum of products (registers, warps, 32) plus D's start value where `keep` holds."""
    if not half:
        if keep.all():
            return (total + start.view(np.float32)).view(np.uint32)
        if keep.any():
            total[:, keep] += start.view(np.float32)[:, keep]
        return total.view(np.uint32)
    pairs = total.reshape(-1, 2, *total.shape[1:]).transpose(0, 2, 3, 1)
    if keep.any():
        pairs = pairs + np.where(keep[:, None, None], start.view(np.float16).reshape(pairs.shape), 0)
    return np.ascontiguousarray(pairs.astype(np.float16)).view(np.uint32).reshape(start.shape)


class Ledger:
    """What the warps of each warpgroup have issued, for as long as some of the four have not."""

    def __init__(self, m: Machine):
        self.machine = m
        self.issued = np.zeros(m.sets.shape[:2], np.int64)
        self.events: dict[tuple[int, int, int], list] = {}  # (cta, warpgroup, number) -> [key, warps left]

    def note(self, g: Threads, crew: Crew, form: Form, operands: PerWarp) -> None:
        """Each warp of `g` issues a product. Raises WarpgroupError unless the four of a warpgroup agree."""
        values = [self.issued[g.warp_at, g.cta_at], *(v for v in operands if v is not None)]
        if crew.complete:
            table = np.stack([v[crew.order].astype(np.uint64) for v in values])
            table = table.reshape(len(values), -1, WARPS)
            if (table == table[:, :, :1]).all():
                self.issued[g.warp_at, g.cta_at] += 1
                return
        for k, (warp, cta) in enumerate(zip(g.warp_at.tolist(), g.cta_at.tolist(), strict=True)):
            number, *rest = (int(v[k]) for v in values)
            self._one(g, k, (cta, warp // WARPS, number), (form, *rest))
            self.issued[warp, cta] += 1

    def check_complete(self) -> None:
        """At the end of a wave: raise WarpgroupError if a product was issued by some warps of four only."""
        for (cta, warpgroup, _), (key, left) in self.events.items():
            where = key[0].where
            text = f"{left} of 4 warps of warpgroup {warpgroup} of CTA {self.machine.cta_name(cta)} exit"
            error = WarpgroupError(f"{text} without issuing a product that the others issued")
            raise error.at(where.line, where.text, where.source)

    def _one(self, g: Threads, k: int, name: tuple[int, int, int], key: tuple) -> None:
        event = self.events.setdefault(name, [key, WARPS])
        if event[0] != key:
            other = event[0][0].where
            text = "another warp of the warpgroup issues this product with other descriptors or another scale"
            if other is not key[0].where:
                text = f"another warp of the warpgroup issues the product of PTX line {other.line} here"
            raise self.machine.warp_fault(WarpgroupError, g, k, text)
        event[1] -= 1
        if not event[1]:
            del self.events[name]

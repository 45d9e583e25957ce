"""Changes that nothing notices because they do no harm, each with the reason why."""

from __future__ import annotations

Reasons = dict[tuple[str, tuple[int, ...]], str]

FRESH = "the slot's first wait to be empty: a new barrier lets it pass"
ONCE = "the slot is filled once, so nobody waits for it to be empty"
BUDGET = "how many registers there are is ptxas's business: results do not depend on it"

# sm90
TURNS = "turns decide when products begin, not what they compute"
FENCED = "the product before has a fence, and nothing touches the registers in between"
OWN_ROWS = (
    "products are over for the four warps of a warpgroup at once, and each warp's read rows of P that are "
    "its own; PTX promises neither"
)
BY_PRODUCTS = "the warp has read K by products alone, for which it waits as one"
COVERED = "the next block's wait covers it before O or V's slot is touched"
IN_ORDER = "readers empty V's slot before that of the next K, for which the load has just waited"
LAST_NARROW = "the last V's, in whose place nothing comes"
BEFORE_V = (
    "the same lanes widen V of the block before after this K, with a fence, and tell of it later: in order, "
    "products have waited for that"
)
THREE_BLOCKS = (
    "the load has just waited for a slot of V that readers emptied after this one of K; that is so for tiles "
    "of 3 blocks and more: those of 2 need the wait"
)
Q_LATER = (
    "Q's slot is given back after this product, too, and the load waits for that of a visit before it waits "
    "for dO's"
)
LEADER = "the lane that waited for its copy is the one that arrives: elect.sync chooses the same each time"
CLUSTERED = "the cluster's barrier behind it is one of this CTA's threads, too"
LAST_SLICE = "the wait for dQ's last slice is for every product"
OWN_COLUMNS = (
    "dK comes where columns of K lay that its warpgroup alone still reads, for dQ; K's others and V were "
    "read for the last time when all met for dS"
)
MET = "the warp has met after the wait for the copy, and has added nothing since"

# sm100
PERMIT = "it lets other CTAs of the multiprocessor allocate, and a CTA has the multiprocessor to itself"
LAST = "the last block's: nobody fills V's slot again"
BEHIND_PV = (
    "the wideners have just waited for a slot of K that is given back after the product which reads this V: "
    "products complete in order"
)
TAIL = "the load waits for the last release, too, which comes after the others: products complete in order"
TAIL_OF_O = (
    "the correction of either CTA waits for the last O, of which the mma warp tells after the last release; "
    "PTX does not promise that the one arrives after the other"
)
TOGETHER = "both Q tiles are given back after the same products, and the load has just waited for the first"
STORED = (
    "each lane has waited until its own copies were read, and all meet at elect.sync; nobody's writes are to "
    "be seen"
)
READ = (
    "a read is over before its warp arrives, and the next answer is written after that: no proxy can undo "
    "it; the slots of TMA's copies are given back without this fence, too"
)
ASKER = (
    "the warp that asks: its lanes have branched on the answer that they read, and meet at elect.sync, "
    "before one of them asks for another"
)
ONLY_S = (
    "this warp has only touched S and P, which the correction does not; that O is complete the commit of S "
    "has told both"
)
NUMBERS_LATER = (
    "the load has just waited for Q's slot, given back after dK, for which all that read the numbers have "
    "stored dS"
)
OUT_LATER = "the load has just waited for Q's slot, given back after dK, which comes after dV in order"
ADDER = "the lane that has waited for its additions is the one that passes the turn on"
TOLD_OF = "nothing was stored since the warp told of the other columns of P, just before"
FIRST = "what is written here first: no addition has read it before"
WAITED = "in turns additions are waited for when they are done, not only when they have been read"
NUMBERS_BEFORE = (
    "for the tile before the load has waited for its columns of Q, whose place is given back after dK, for "
    "which all that read the numbers have stored dS"
)
TELLS = "the lane that arrives has waited itself, and the warp has touched nothing"
FENCED_LATER = "a wait with a fence of its own comes next, before tensor memory is touched"
RELAY = "the relay touches no tensor memory; the leader's wait for it has a fence"
IN_SHARED = "the edge is for dS in shared memory; what tensor memory holds has an edge of its own"
PADDING = "columns behind the head dim, which are zeros"
TOLD_ALL = (
    "before the CTA leaves, its compute warps wait for the last commit, which comes after the others: "
    "products complete in order"
)
BEHIND_DS = "dV is begun behind dK, for which all warps store dS, and tell, after P"
AGAIN = "the tile's dQ has waited for the same when its first columns were begun"
ONCE_CAME = "the first tile's dQ has waited for it; where there is one tile only, it needs the wait"
NUMBERS_READ = (
    "for the tile before the load has waited for its columns of dO, whose place is given back after dP, for "
    "which all had read S, and had read the numbers of the tile before that"
)
BEHIND_P = "dV is begun before the next S, when all warps have stored P, and tell: they had read S"
P_SHARED = "P lies in shared memory; that S has been read the warp has told before, with a fence"
NUMBERS_ROWS = (
    "for the tile before the load has waited to bring its rows of Q, whose place is given back after dK, for "
    "which all that read the numbers have stored dS"
)
ARRIVED = "the warp has touched no tensor memory since it arrived, with a fence, for S"
LAST_TILE = "the last tile's: nobody fills Q's, dO's or P's place again"
NUMBERS = "the edge is for numbers in shared memory; who touches tensor memory waits for another edge, too"


def harmless(tree: str, name: str, reasons: Reasons) -> dict[tuple[str, str, str], dict[int, str]]:
    """Entries of HARMLESS for one kernel. reasons: (change, its sites) -> why."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for (mutation, sites), why in reasons.items():
        found.setdefault((tree, name, mutation), {}).update(dict.fromkeys(sites, why))
    return found


# (architecture, kernel, change) -> site -> why nothing can notice it.
HARMLESS = {
    **harmless("sm80", "window", {
        ("no commit", (0,)): "Q joins K's group; the first wait is for every group",
        ("no commit", (1,)): "K joins V's group; the first wait is for every group",
        ("no commit", (2,)): "V joins the next group; the wait for V is for every group",
    }),
    **harmless("sm80", "full", {
        ("no commit", (0,)): "Q joins K's group; the wait for K is the first for either",
    }),
    **harmless("sm80", "split", {
        ("no commit", (0,)): "Q joins K's group; the wait for K is the first for either",
    }),
    **harmless("sm80", "widened", {
        ("no commit", (0,)): "Q joins K's group; the wait for K is the first for either",
    }),
    **harmless("sm80", "latent", {
        ("no commit", (0,)): "Q joins the first tile's group; the wait for that is the first for either",
    }),
    **harmless("sm90", "latent", {
        ("no barrier", (2,)): OWN_ROWS,
        ("no barrier of a warp", tuple(range(5))): BY_PRODUCTS,
        ("no change of registers", (1,)): BUDGET,
    }),
    **harmless("sm90", "window", {
        ("no wait for an mbarrier", (0, 1)): FRESH,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no barrier", (5,)): TURNS,
        ("no change of registers", (1,)): BUDGET,
        ("no fence before a product", (2, 4, 6)): FENCED,
    }),
    **harmless("sm90", "in order", {
        ("no wait for an mbarrier", (0, 1)): FRESH,
        ("no wait for an mbarrier", (3,)): IN_ORDER,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no barrier", (2, 4)): TURNS,
        ("no change of registers", (1,)): BUDGET,
        ("no fence before a product", (2,)): FENCED,
        ("no commit of a product", (1,)): COVERED,
        ("no wait for a product", (1,)): COVERED,
        ("a wait for one product fewer", (1,)): COVERED,
    }),
    **harmless("sm90", "widened", {
        ("no wait for an mbarrier", (0, 1, 6)): FRESH,
        ("no arrival", (7,)): LAST_NARROW,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no barrier", (1, 3)): TURNS,
        ("no change of registers", (2,)): BUDGET,
        ("no fence before a product", (2,)): FENCED,
    }),
    **harmless("sm90", "widened in order", {
        ("no wait for an mbarrier", (0, 1, 6)): FRESH,
        ("no wait for an mbarrier", (10,)): IN_ORDER,
        ("no wait for an mbarrier", (16,)): BEFORE_V,
        ("no arrival", (7,)): LAST_NARROW,
        ("no fence", (2,)): BEFORE_V,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no commit of a product", (1,)): COVERED,
        ("no wait for a product", (1,)): COVERED,
        ("a wait for one product fewer", (1,)): COVERED,
    }),
    **harmless("sm90", "persistent", {
        ("no wait for an mbarrier", (0,)): THREE_BLOCKS,
        ("no barrier", (4,)): TURNS,
        ("no change of registers", (1,)): BUDGET,
        ("no fence before a product", (2,)): FENCED,
    }),
    **harmless("sm90", "packed", {
        ("no wait for an mbarrier", (0, 1)): FRESH,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no change of registers", (0, 1)): BUDGET,
        ("no fence before a product", (2,)): FENCED,
    }),
    **harmless("sm90", "gradients", {
        ("no wait for an mbarrier", (8, 9, 10)): FRESH,
        ("no wait for an mbarrier", (11, 13)): Q_LATER,
        ("one arrival more expected", (1, 3)): ONCE,
        ("half the arrivals expected", (1, 3)): ONCE,
        ("no barrier of a warp", (2,)): LEADER,
        ("no change of registers", (0,)): BUDGET,
        ("no fence before a product", (1, 3, 4, 6, 8, 9)): FENCED,
        ("no commit of a product", (2, 7)): Q_LATER,
        ("no wait for a product", (2, 7)): Q_LATER,
        ("a wait for one product fewer", (2, 7)): Q_LATER,
    }),
    **harmless("sm90", "gradients of 128 rows", {
        ("no commit of a product", (2, 7)): Q_LATER,
        ("no wait for a product", (2, 7)): Q_LATER,
        ("a wait for one product fewer", (2, 7)): Q_LATER,
    }),
    **harmless("sm90", "gradients without overlap", {
        ("no commit of a product", (2, 7)): Q_LATER,
        ("no wait for a product", (2, 7)): Q_LATER,
        ("a wait for one product fewer", (2, 7)): Q_LATER,
    }),
    **harmless("sm90", "gradients of wide heads", {
        ("no wait for an mbarrier", (14, 15, 16)): FRESH,
        ("one arrival more expected", (1, 3)): ONCE,
        ("half the arrivals expected", (1, 3)): ONCE,
        ("no barrier", (7,)): OWN_COLUMNS,
        ("no wait for a product", (5, 11)): LAST_SLICE,
        ("a wait for one product fewer", (5, 11)): LAST_SLICE,
    }),
    **harmless("sm90", "gradients of a pair", {
        ("no fence before a product", (1, 2, 3, 4, 6, 7, 8, 9)): FENCED,
        ("no change of registers", (0,)): BUDGET,
        ("no wait for a product", (2, 7)): Q_LATER,
        ("a wait for one product fewer", (2, 7)): Q_LATER,
        ("no wait for an mbarrier", (14, 15, 16)): FRESH,
        ("no wait for an mbarrier", (17, 19)): Q_LATER,
        ("one arrival more expected", (1, 3)): ONCE,
        ("half the arrivals expected", (1, 3)): ONCE,
        ("no barrier", (0,)): CLUSTERED,
    }),
    **harmless("sm90", "gradients in turns", {
        ("no barrier of a warp", (3,)): LEADER,
        ("no barrier of a warp", (4,)): MET,
    }),
    **harmless("sm90", "split", {
        ("no wait for an mbarrier", (0, 1)): FRESH,
        ("no barrier", (2,)): TURNS,
    }),
    **harmless("sm100", "gradients", {
        ("no wait for an mbarrier", (12, 24, 25, 26, 27, 28)): FRESH,
        ("no wait for an mbarrier", (30,)): NUMBERS_LATER,
        ("no wait for an mbarrier", (31,)): OUT_LATER,
        ("one arrival more expected", (1, 3, 7, 11, 15)): ONCE,
        ("half the arrivals expected", (15,)): ONCE,
        ("no change of registers", (1,)): BUDGET,
        ("all lanes elected", (9,)): LAST_TILE,
        ("no permit given back", (0,)): PERMIT,
        ("no commit of a product", (8, 9, 10)): LAST_TILE,
        ("no fence after synchronisation", (8,)): FRESH,
    }),
    **harmless("sm100", "gradients over scores", {
        ("no wait for an mbarrier", (12, 20, 21, 22, 23, 24)): FRESH,
        ("no wait for an mbarrier", (26,)): NUMBERS_LATER,
        ("no commit of a product", (7, 8)): LAST_TILE,
        ("no fence after synchronisation", (6,)): FRESH,
    }),
    **harmless("sm100", "gradients of 64 keys", {
        ("no wait for an mbarrier", (20, 21, 22, 23, 24)): FRESH,
        ("no wait for an mbarrier", (26,)): NUMBERS_LATER,
        ("no wait for an mbarrier", (27,)): OUT_LATER,
        ("no commit of a product", (8, 9)): LAST_TILE,
    }),
    **harmless("sm100", "gradients of 64 rows", {
        ("no wait for an mbarrier", (17, 18, 19, 20, 21)): FRESH,
        ("no wait for an mbarrier", (23,)): NUMBERS_LATER,
        ("no wait for an mbarrier", (24,)): OUT_LATER,
        ("no commit of a product", (7, 8)): LAST_TILE,
    }),
    **harmless("sm100", "gradients of a pair", {
        ("no wait for an mbarrier", (29, 30, 31, 32, 33, 34, 35, 36)): FRESH,
        ("no wait for an mbarrier", (38,)): NUMBERS_BEFORE,
        ("no wait for an mbarrier", (42, 43, 44, 45)): TOLD_ALL,
        ("one arrival more expected", (1, 3, 11, 17)): ONCE,
        ("half the arrivals expected", (17,)): ONCE,
        ("no barrier of a warp", (4,)): TELLS,
        ("no change of registers", (1,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no fence before synchronisation", (4,)): IN_SHARED,
        ("no fence after synchronisation", (2, 9, 10, 14, 15)): FENCED_LATER,
        ("no fence after synchronisation", (3, 11, 16)): IN_SHARED,
        ("no fence after synchronisation", (5,)): RELAY,
        ("no reduction", (3,)): PADDING,
    }),
    **harmless("sm100", "gradients of a serial pair", {
        ("no wait for an mbarrier", (16, 30)): BEHIND_DS,
        ("no wait for an mbarrier", (22, 23, 35, 36)): AGAIN,
        ("no wait for an mbarrier", (31,)): ONCE_CAME,
        ("no wait for an mbarrier", (37, 38, 39, 40, 41, 42)): FRESH,
        ("no wait for an mbarrier", (45,)): NUMBERS_READ,
        ("no wait for an mbarrier", (50, 51)): TOLD_ALL,
        ("one arrival more expected", (1, 3, 9, 13)): ONCE,
        ("half the arrivals expected", (13,)): ONCE,
        ("no barrier of a warp", (3,)): BEHIND_DS,
        ("no barrier of a warp", (5,)): TELLS,
        ("no change of registers", (1,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no wait for a store to tensor memory", (0,)): BEHIND_DS,
        ("no fence before synchronisation", (3,)): ARRIVED,
        ("no fence before synchronisation", (4,)): BEHIND_DS,
        ("no fence before synchronisation", (6,)): RELAY,
        ("no fence after synchronisation", (6,)): RELAY,
        ("no fence after synchronisation", (7, 13, 16, 22)): FENCED_LATER,
        ("no fence after synchronisation", (10, 19)): BEHIND_DS,
        ("no fence after synchronisation", (11, 12, 14, 15, 20, 21, 23, 24)): IN_SHARED,
        ("no reduction", (11, 13, 15, 17, 19, 21, 23)): PADDING,
    }),
    **harmless("sm100", "gradients of a wide pair", {
        ("no wait for an mbarrier", (19,)): BEHIND_P,
        ("no wait for an mbarrier", (28, 29, 30, 31, 32, 35)): FRESH,
        ("no wait for an mbarrier", (36,)): NUMBERS_ROWS,
        ("no wait for an mbarrier", (41, 42)): TOLD_ALL,
        ("one arrival more expected", (1, 3, 9, 13)): ONCE,
        ("half the arrivals expected", (13,)): ONCE,
        ("no barrier of a warp", (1,)): BEHIND_P,
        ("no barrier of a warp", (4,)): TELLS,
        ("no change of registers", (1,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no fence before synchronisation", (1,)): BEHIND_P,
        ("no fence before synchronisation", (2,)): P_SHARED,
        ("no fence before synchronisation", (4,)): RELAY,
        ("no fence after synchronisation", (4,)): RELAY,
        ("no fence after synchronisation", (5, 11)): P_SHARED,
        ("no fence after synchronisation", (6, 7, 12, 13)): FENCED_LATER,
        ("no fence after synchronisation", (8, 9, 14, 15)): IN_SHARED,
        ("no fence after synchronisation", (10,)): BEHIND_P,
        ("no reduction", (3,)): PADDING,
    }),
    **harmless("sm100", "gradients in turns", {
        ("no barrier of a warp", (0, 2, 5)): ONCE,
        ("no barrier of a warp", (1, 8, 9)): ADDER,
        ("no barrier", (1, 3, 5, 9)): FIRST,
        ("no wait for a store", (0, 1, 4, 7)): FIRST,
        ("no wait for a store", (3,)): WAITED,
    }),
    **harmless("sm100", "window", {
        ("no wait for an mbarrier", (19, 20, 21)): FRESH,
        ("one arrival more expected", (2, 3)): ONCE,
        ("no commit of a store", (0,)): "the other tile's store closes the group for both",
        ("no wait for a store", (0,)): "the wait for the other tile's store is for both",
        ("no change of registers", (0,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no commit of a product", (9,)): LAST,
        ("no fence before synchronisation", (0, 3, 6)): ONLY_S,
        ("no fence before synchronisation", (9, 12, 13)): NUMBERS,
        ("no fence after synchronisation", (5, 7, 13, 14)): NUMBERS,
    }),
    **harmless("sm100", "causal", {
        ("no wait for an mbarrier", (15, 16)): FRESH,
        ("one arrival more expected", (1,)): ONCE,
        ("no change of registers", (0,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no commit of a product", (7,)): LAST,
        ("no barrier of a warp", (2, 7)): TOLD_OF,
        ("no wait for a store to tensor memory", (1, 5)): TOLD_OF,
        ("no fence before synchronisation", (2, 7)): TOLD_OF,
        ("no fence before synchronisation", (0, 5, 10, 12)): NUMBERS,
        ("no fence after synchronisation", (2, 4, 10)): NUMBERS,
    }),
    **harmless("sm100", "widened", {
        ("no wait for an mbarrier", (7, 23, 24)): FRESH,
        ("no wait for an mbarrier", (11,)): BEHIND_PV,
        ("no arrival", (20,)): LAST_NARROW,
        ("one arrival more expected", (1,)): ONCE,
        ("no commit of a product", (7,)): LAST,
    }),
    **harmless("sm100", "pair", {
        ("no wait for an mbarrier", (15, 16)): FRESH,
        ("no wait for an mbarrier", (20, 21, 22)): TAIL,
        ("one arrival more expected", (1,)): ONCE,
    }),
    **harmless("sm100", "latent", {
        ("no wait for an mbarrier", (19,)): FRESH,
        ("no wait for an mbarrier", (26, 27, 28, 29, 30, 31, 35, 36, 37)): TAIL_OF_O,
        ("a wait for the other parity", (26,)): TAIL_OF_O,
        ("one arrival more expected", (1,)): ONCE,
        ("no change of registers", (0,)): BUDGET,
        ("no permit given back", (0,)): PERMIT,
        ("no fence before synchronisation", (0, 3, 6, 8)): NUMBERS,
        ("no fence before synchronisation", (2, 5)): P_SHARED,
        ("no fence after synchronisation", (1, 3)): P_SHARED,
        ("no fence after synchronisation", (4, 6, 9)): NUMBERS,
    }),
    **harmless("sm100", "split", {
        ("no wait for an mbarrier", (22, 23, 24)): FRESH,
        ("no commit of a product", (9,)): LAST,
    }),
    **harmless("sm100", "persistent", {
        ("no wait for an mbarrier", (24,)): TOGETHER,
        ("no barrier of a warp", (13, 14)): STORED,
    }),
    **harmless("sm100", "queue", {
        ("no fence", (1, 3, 4, 5, 6)): READ,
        ("no barrier of a warp", (2, 7)): TOLD_OF,
        ("no barrier of a warp", (17,)): ASKER,
        ("no barrier of a warp", (18,)): STORED,
    }),
    **harmless("sm100", "queue pair", {
        ("no wait for an mbarrier", (27, 28, 29, 30)): TAIL,
    }),
    **harmless("sm100", "packed", {
        ("no wait for an mbarrier", (15, 16, 17)): FRESH,
    }),
}  # fmt: skip

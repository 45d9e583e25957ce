"""What a rule computes, as a tree of operations that means the same on host numbers, tensors and the device.

`rule.traced` writes an expression as text, `Expression` reads it again. Its sections are what a rule says:

    visible          of a mask, about q and k
    keys, full       of a mask, two bounds each, about q_first and q_last
    score            of a score, about s, q and k

what `row_range` adds,

    seen            of a mask, two bounds, about q

and what `reverse` adds for backward passes,

    queries, full_queries    of a mask, two bounds each, about k_first and k_last
    derivative               of a score, the score and its derivative by s, about s, q and k

all of them also about batch, head, seqlen_q, seqlen_k and the rule's own values: int0, float1, table2,
numbered as `leaves` lists them. Operators have Python's meaning. Integers have 64 bits and wrap like torch's;
they are computed in 32 bits where their range shows that this makes no difference, as is usual for positions,
-LARGEST_POSITION <= q < LARGEST_POSITION. Floats are float32 on the device. Division by 0 has no meaning.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import elementwise

# Of queries and keys, and of a rule's numbers that 32 bits are enough for: two of them and a constant, added.
LARGEST_POSITION = (1 << 30) - (1 << 20)
INT32, INT64 = (-(1 << 31), (1 << 31) - 1), (-(1 << 63), (1 << 63) - 1)
_RANGES = {
    **dict.fromkeys(("q", "q_first", "q_last"), (-LARGEST_POSITION, LARGEST_POSITION - 1)),
    **dict.fromkeys(
        ("batch", "head", "seqlen_q", "seqlen_k", "k", "k_first", "k_last"), (0, LARGEST_POSITION - 1)
    ),
    "size": (1, INT32[1]),
    "int": (-LARGEST_POSITION, LARGEST_POSITION),
    "int64": INT64,
    "table:int8": (-128, 127),
    "table:uint8": (0, 255),
    "table:int32": INT32,
    "table:int64": INT64,
}
_PER_PAIR = frozenset(("s", "q", "k"))
_OF_PAIRS = ("visible", "score", "derivative")  # the sections about them


class Node(NamedTuple):
    """One operation. args: numbers of the nodes that it takes; a leaf's name or a constant's value.

    kind: "bool", "int32", "int64", "float" or "tensor:<dtype>:<rank>". low, high: an integer's range.
    needs: the symbols behind it, but for the rule's own values.
    """

    op: str
    args: tuple
    kind: str
    low: int = 0
    high: int = 0
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """Nodes, each after its arguments, and which of them are the section's values."""

    nodes: tuple[Node, ...]
    results: tuple[int, ...]

    def evaluate(self, known: Mapping[str, Any], hoisted: Mapping[int, Any] | None = None) -> tuple[Any, ...]:
        """The section's values. known: those of symbols; hoisted: what `hoist` gave, if it was asked."""
        values = dict(hoisted or {})
        for n, node in enumerate(self.nodes):
            if hoisted is None or node.op == "constant" or node.needs & _PER_PAIR:
                values[n] = _value(node, values, known)
        return tuple(values[result] for result in self.results)

    def hoist(self, known: Mapping[str, Any]) -> dict[int, Any]:
        """Values of the nodes that are the same for every pair of query and key."""
        values: dict[int, Any] = {}
        for n, node in enumerate(self.nodes):
            if not node.needs & _PER_PAIR:
                values[n] = _value(node, values, known)
        return {n: value for n, value in values.items() if self.nodes[n].op != "constant"}

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """The symbols behind its values."""
        return frozenset().union(*(self.nodes[n].needs for n in self.results))

    @functools.cached_property
    def per_pair(self) -> tuple[Node, ...]:
        """The operations that are executed for every pair of query and key."""
        return tuple(node for node in self.nodes if node.needs & _PER_PAIR and node.op != "leaf")


@dataclass(frozen=True)
class Expression:
    """A mask or a score as compiled code knows it. text: what `rule.traced` wrote."""

    text: str

    @functools.cached_property
    def sections(self) -> dict[str, Section]:
        """Name -> section."""
        _, *lines = self.text.split("\n")
        named = (line.partition(" = ") for line in lines)
        return {name: _Reader(self.leaves()).section(code) for name, _, code in named}

    def leaves(self) -> tuple[str, ...]:
        """Kinds of the run-time values: "int", "int64", "float" or "tensor:<dtype>:<rank>"."""
        return _leaves(self.text.partition("\n")[0])

    def at(self, values: Sequence[Any], batch: Any, head: Any, seqlen_q: Any, seqlen_k: Any) -> Bound:
        """The rule as it stands for one sequence and query head."""
        known = dict(zip(leaf_names(self.leaves()), values, strict=True))
        known |= {"batch": batch, "head": head, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        return Bound(self, known, self._per_pair.hoist(known))

    @property
    def _per_pair(self) -> Section:
        """The section that is evaluated for every pair of query and key."""
        return next(self.sections[name] for name in _OF_PAIRS if name in self.sections)

    def ignores_head(self) -> bool:
        """Whether it stands the same for every head of a sequence."""
        return not any("head" in section.needs for section in self.sections.values())

    def reads_tables(self) -> bool:
        """Whether tensors are among its values."""
        return any(leaf.startswith("tensor") for leaf in self.leaves())

    def work(self) -> int:
        """Operations that a score is for every pair of query and key."""
        return len(self._per_pair.per_pair)

    def sees_positions(self) -> bool:
        """Whether a score depends on where query and key are."""
        return bool(self._per_pair.needs & {"q", "k"})

    def is_light(self) -> bool:
        """Whether a mask asks no more of a pair than two comparisons that must both hold."""
        operations = self.sections["visible"].per_pair
        of_pairs = [n.op for n in operations if n.op not in "+-" or n.needs & _PER_PAIR != {"q"}]
        comparisons = not set(of_pairs) - {"<", "<=", ">", ">=", "&"}
        return comparisons and len(of_pairs) <= 3 and not self.reads_tables()

    def sees_few(self) -> bool:
        """Whether queries see a part of the keys that neither begins nor ends with them: a window."""
        if "keys" not in self.sections:
            return False
        section = self.sections["keys"]
        return all(section.nodes[n].needs & {"q_first", "q_last"} for n in section.results)


class Bound(NamedTuple):
    """An expression with the values that it has for one sequence and head; answers like the rule itself."""

    expression: Expression
    known: dict[str, Any]
    hoisted: dict[int, Any]

    def visible(self, q: Any, k: Any) -> Any:
        """Whether query `q` sees key `k`."""
        return self._pair("visible", q=q, k=k)[0]

    def score(self, s: Any, batch: Any, head: Any, q: Any, k: Any) -> Any:
        """The score that replaces `s`; batch and head are those it is bound to."""
        return self._pair("score", s=s, q=q, k=k)[0]

    def derivative(self, s: Any, batch: Any, head: Any, q: Any, k: Any) -> tuple[Any, Any]:
        """(the score that replaces `s`, its derivative by s). A derivative known beforehand is a plain float:
        1.0 of a rule that only adds."""
        return self._pair("derivative", s=s, q=q, k=k)

    def _pair(self, name: str, **pair: Any) -> tuple[Any, ...]:
        return self.expression.sections[name].evaluate({**self.known, **pair}, self.hoisted)

    def keys(self, q_first: Any, q_last: Any, seqlen_k: Any) -> tuple[Any, Any]:
        """(low, high): no query in q_first..q_last sees a key outside low <= k < high."""
        return self._bounds("keys", q_first=q_first, q_last=q_last, seqlen_k=seqlen_k)

    def full(self, q_first: Any, q_last: Any, seqlen_k: Any) -> tuple[Any, Any]:
        """(low, high): every query in q_first..q_last sees every key with low <= k < high."""
        return self._bounds("full", q_first=q_first, q_last=q_last, seqlen_k=seqlen_k)

    @property
    def has_range(self) -> bool:
        """Whether every query sees one range of keys, which `seen` tells (see `row_range`)."""
        return "seen" in self.expression.sections

    def seen(self, q: Any) -> tuple[Any, Any]:
        """(low, high): query `q` sees the keys with low <= k < high, and no others."""
        return self._bounds("seen", q=q)

    def queries(self, k_first: Any, k_last: Any) -> tuple[Any, Any]:
        """(low, high): no query outside low <= q < high sees a key in k_first..k_last."""
        return self._bounds("queries", k_first=k_first, k_last=k_last)

    def full_queries(self, k_first: Any, k_last: Any) -> tuple[Any, Any]:
        """(low, high): every query with low <= q < high sees every key in k_first..k_last."""
        return self._bounds("full_queries", k_first=k_first, k_last=k_last)

    def _bounds(self, name: str, **about: Any) -> tuple[Any, Any]:
        return self.expression.sections[name].evaluate({**self.known, **about})


@functools.lru_cache(maxsize=4096)
def expression(text: str) -> Expression:
    """The one `Expression` of a text."""
    return Expression(text)


@functools.lru_cache(maxsize=4096)
def _leaves(line: str) -> tuple[str, ...]:
    return tuple(line.split()[1:])


@functools.lru_cache(maxsize=4096)
def leaf_names(leaves: tuple[str, ...]) -> tuple[str, ...]:
    """What a text calls the run-time values of these kinds."""
    kinds = ("int" if leaf == "int64" else leaf.partition(":")[0] for leaf in leaves)
    return tuple(f"{'table' if kind == 'tensor' else kind}{i}" for i, kind in enumerate(kinds))


class _Reader:
    """Reads one section: types and ranges of its operations, with the conversions that these ask for."""

    def __init__(self, leaves: tuple[str, ...]) -> None:
        self.leaf_kinds = dict(zip(leaf_names(leaves), leaves, strict=True))
        self.nodes: list[Node] = []
        self.index: dict[tuple, int] = {}
        self.names: dict[str, int] = {}

    def section(self, code: str) -> Section:
        *lets, last = ast.parse(code).body
        for let in lets:
            self.names[let.targets[0].id] = self.read(let.value)
        results = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        found = tuple(self.read(result) for result in results)
        return Section(tuple(self.nodes), found)

    def read(self, tree: ast.expr) -> int:
        """The number of the node that a piece of the text stands for."""
        match tree:
            case ast.Constant(value):
                return self.constant(value)
            case ast.Name(name):
                return self.names[name] if name in self.names else self.leaf(name)
            case ast.UnaryOp(ast.USub(), ast.Constant(value)):
                return self.constant(-value)
            case ast.UnaryOp(ast.USub(), ast.Name("inf")):
                return self.constant(-float("inf"))
            case ast.UnaryOp(op, operand):
                return self.operation("neg" if isinstance(op, ast.USub) else "~", self.read(operand))
            case ast.BinOp(left, op, right):
                return self.operation(_SPELLED[type(op)], self.read(left), self.read(right))
            case ast.Compare(left, [op], [right]):
                return self.operation(_SPELLED[type(op)], self.read(left), self.read(right))
            case ast.Call(ast.Name("size"), [ast.Name(table), ast.Constant(dim)]):
                return self.add("size", (self.leaf(table), dim), "int32", _RANGES["size"])
            case ast.Call(ast.Name(function), args):
                return self.operation(function, *map(self.read, args))
        raise ValueError(f"{ast.unparse(tree)!r} is no part of an expression")

    def constant(self, value: Any) -> int:
        if isinstance(value, bool):
            return self.add("constant", (value,), "bool")
        if isinstance(value, float):
            return self.add("constant", (value,), "float")
        return self.add("constant", (value,), _width(value, value), (value, value))

    def leaf(self, name: str) -> int:
        if name in ("inf", "nan"):
            return self.constant(float(name))
        if name == "s":
            return self.add("leaf", (name,), "float")
        kind = self.leaf_kinds.get(name, name)
        if kind.startswith("tensor"):
            return self.add("leaf", (name,), kind)
        if kind == "float":
            return self.add("leaf", (name,), kind)
        return self.add("leaf", (name,), "int64" if kind == "int64" else "int32", _RANGES[kind])

    def add(self, op: str, args: tuple, kind: str, between: tuple[int, int] = (0, 0)) -> int:
        """A node, or the one that is the same."""
        key = (op, args, kind, str(args[0])) if op == "constant" else (op, args, kind)
        if key not in self.index:
            needs = frozenset(args) - self.leaf_kinds.keys() if op == "leaf" else frozenset()
            if op not in ("leaf", "constant"):
                behind = args[:1] if op == "size" else args
                needs = needs.union(*(self.nodes[arg].needs for arg in behind))
            self.index[key] = len(self.nodes)
            self.nodes.append(Node(op, args, kind, *between, needs))
        return self.index[key]

    def operation(self, op: str, *args: int) -> int:
        """An operation on nodes, its operands converted to what it is computed in."""
        if op == "load":
            return self.load(*args)
        if op in ("to_float", "exp", "tanh", "log", "power", "/"):
            args = tuple(map(self.as_float, args))
            return args[0] if op == "to_float" else self.add(op, args, "float")
        kinds = [self.nodes[arg].kind for arg in args[-2:]]  # the condition of `where` aside
        if op in ("&", "|", "^", "~", "where") and set(kinds) == {"bool"}:
            return self.add(op, args, "bool")
        values = args[-2:]
        if "float" in kinds:
            values = tuple(map(self.as_float, values))
            return self.add(op, (*args[:-2], *values), "bool" if op in _COMPARISONS else "float")
        return self.integers(op, args[:-2], tuple(map(self.as_int, values)))

    def integers(self, op: str, before: tuple[int, ...], values: tuple[int, ...]) -> int:
        """An operation on integers, in 64 bits where 32 might not hold its operands, steps or result."""
        given = [self.nodes[value] for value in values]
        between = _range_of(op, given)
        lows, highs = zip(between, _steps(op, given), *((n.low, n.high) for n in given), strict=True)
        width = _width(min(lows), max(highs))
        values = tuple(self.as_width(value, width) for value in values)
        if op in ("<<", ">>") and given[0].op == "constant":  # its type is the result's
            values = (self.add("as_" + width, values[:1], width, (given[0].low, given[0].high)), values[1])
        if op in _COMPARISONS:
            return self.add(op, values, "bool")
        between = max(between[0], INT64[0]), min(between[1], INT64[1])
        found = self.add(_by_range(op, given), (*before, *values), width, between)
        return self.as_width(found, _width(*between))

    def load(self, table: int, *index: int) -> int:
        _, dtype, _ = self.nodes[table].kind.split(":")
        index = tuple(self.as_int(i) for i in index)
        if dtype.startswith(("float", "bfloat")):
            return self.add("load", (table, *index), "float")
        kind = "int64" if dtype == "int64" else "int32"
        return self.add("load", (table, *index), kind, _RANGES[f"table:{dtype}"])

    def as_float(self, n: int) -> int:
        node = self.nodes[n]
        if node.op == "constant":
            return self.constant(float(node.args[0]))
        return n if node.kind == "float" else self.add("to_float", (self.as_int(n),), "float")

    def as_int(self, n: int) -> int:
        node = self.nodes[n]
        if node.kind != "bool":
            return n
        if node.op == "constant":
            return self.constant(int(node.args[0]))
        return self.add("where", (n, self.constant(1), self.constant(0)), "int32", (0, 1))

    def as_width(self, n: int, width: str) -> int:
        node = self.nodes[n]
        if node.kind == width or node.op == "constant":
            return n
        return self.add("as_" + width, (n,), width, (node.low, node.high))


def _width(low: int, high: int) -> str:
    return "int32" if INT32[0] <= low and high <= INT32[1] else "int64"


def _by_range(op: str, given: list[Node]) -> str:
    """The operation that serves where signs are known: a division of what cannot be negative truncates."""
    if op in ("//", "%") and given[0].low >= 0 and given[1].low > 0:
        return {"//": "divide_unsigned", "%": "remainder_unsigned"}[op]
    return op


def _steps(op: str, given: list[Node]) -> tuple[int, int]:
    """The range of what is computed on the way to the result."""
    if op == "//":
        most = max(abs(given[1].low), abs(given[1].high))
        return given[0].low - most, given[0].high + most
    return 0, 0


def _range_of(op: str, given: list[Node]) -> tuple[int, int]:
    """The range of an operation on integers."""
    (a, b), (c, d) = ((n.low, n.high) for n in (given[0], given[-1]))
    if op in _COMPARISONS:
        return 0, 0
    if op in ("where", "minimum", "maximum"):
        pick = {"where": (min, max), "minimum": (min, min), "maximum": (max, max)}[op]
        return pick[0](a, c), pick[1](b, d)
    if op == "neg":
        return -b, -a
    if op == "~":
        return ~b, ~a
    if op == "absolute":
        return max(a, -b, 0), max(-a, b)
    if op in "&|^":
        return _range_of_bits(op, a, b, c, d)
    if op == "%":
        return (c + 1 if c < 0 else 0), (d - 1 if d > 0 else 0) if a < 0 or c < 0 else min(b, max(d - 1, 0))
    if op == "//" and c <= 0 <= d:
        most = max(-a, b)
        return -most, most
    if op in ("<<", ">>"):
        c, d = (min(max(n, 0), 63) for n in (c, d))
    corners = [_EXACT[op](x, y) for x in (a, b) for y in (c, d)]
    return min(corners), max(corners)


def _range_of_bits(op: str, a: int, b: int, c: int, d: int) -> tuple[int, int]:
    if op == "&" and (a >= 0 or c >= 0):
        return 0, min(x for x, low in ((b, a), (d, c)) if low >= 0)
    bits = max(n.bit_length() for n in (a, b, c, d))
    return (0 if a >= 0 and c >= 0 else -(1 << bits)), (1 << bits) - 1


_EXACT: dict[str, Callable] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv,
    "<<": operator.lshift, ">>": operator.rshift,
}
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_SPELLED = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}
_OPERATIONS: dict[str, Callable] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "neg": operator.neg,
    "&": operator.and_, "|": operator.or_, "^": operator.xor, "~": elementwise.invert,
    "<<": elementwise.shift_left, ">>": elementwise.shift_right,
    "//": elementwise.floor_divide, "%": elementwise.modulo,
    "divide_unsigned": elementwise.divide_unsigned, "remainder_unsigned": elementwise.remainder_unsigned,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne,
    "as_int32": elementwise.as_int32, "as_int64": elementwise.as_int64,
    **{
        function.__name__: function
        for function in (
            elementwise.minimum, elementwise.maximum, elementwise.where, elementwise.absolute,
            elementwise.to_float, elementwise.exp, elementwise.tanh, elementwise.log, elementwise.power,
            elementwise.load,
        )
    },
}


def _value(node: Node, values: Mapping[int, Any], known: Mapping[str, Any]) -> Any:
    if node.op == "constant":
        return node.args[0]
    if node.op == "leaf":
        return known[node.args[0]]
    if node.op == "size":
        return values[node.args[0]].shape[node.args[1]]
    return _OPERATIONS[node.op](*(values[arg] for arg in node.args))

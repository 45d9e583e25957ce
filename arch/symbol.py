"""Tracing: a rule's Python, run once on symbols, becomes the text of an expression.

A `Symbol` stands for a value that a kernel will compute: a position, a score, a number of the rule. Operators
and the functions of `elementwise` on symbols give symbols; `text` writes down what they were made of:

    x0 = (q - k); ((x0 < int0) & (x0 >= 0))

That text is all that compiled code depends on, so it is a rule's compile key. It holds no names of the
user's, and every version of Python writes the same. What a symbol cannot answer while it is traced, above all
`bool()`, raises TypeError and says what to write instead.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

BOOL, INT, FLOAT = "bool", "int", "float"
LARGEST_POWER = 64  # constant exponents up to here are multiplied out


class Symbol:
    """A value that is not known yet. kind: BOOL, INT or FLOAT.

    op: a leaf's name, an operator as Python spells it, or the name of a function of `elementwise`.
    args: symbols and numbers.
    """

    __slots__ = ("op", "args", "kind")
    __array_ufunc__ = None  # numpy's numbers leave operators to this class
    __hash__ = None

    def __init__(self, kind: str, op: str, *args: Any) -> None:
        self.kind, self.op, self.args = kind, op, args

    def __repr__(self) -> str:
        return text((self,))

    def __add__(self, other: Any) -> Symbol:
        return _arithmetic("+", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return _arithmetic("+", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return _arithmetic("-", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _arithmetic("-", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return _arithmetic("*", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return _arithmetic("*", other, self)

    def __floordiv__(self, other: Any) -> Symbol:
        return _arithmetic("//", self, other)

    def __rfloordiv__(self, other: Any) -> Symbol:
        return _arithmetic("//", other, self)

    def __mod__(self, other: Any) -> Symbol:
        return _arithmetic("%", self, other)

    def __rmod__(self, other: Any) -> Symbol:
        return _arithmetic("%", other, self)

    def __divmod__(self, other: Any) -> tuple[Symbol, Symbol]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Symbol, Symbol]:
        return other // self, other % self

    def __truediv__(self, other: Any) -> Symbol:
        return Symbol(FLOAT, "/", self, operand(other))

    def __rtruediv__(self, other: Any) -> Symbol:
        return Symbol(FLOAT, "/", operand(other), self)

    def __pow__(self, other: Any) -> Symbol | float:
        return _power(self, operand(other))

    def __rpow__(self, other: Any) -> Symbol:
        return _power(operand(other), self)

    def __lshift__(self, other: Any) -> Symbol:
        return _integral("<<", self, other)

    def __rlshift__(self, other: Any) -> Symbol:
        return _integral("<<", other, self)

    def __rshift__(self, other: Any) -> Symbol:
        return _integral(">>", self, other)

    def __rrshift__(self, other: Any) -> Symbol:
        return _integral(">>", other, self)

    def __and__(self, other: Any) -> Symbol:
        return _logical("&", self, other)

    def __rand__(self, other: Any) -> Symbol:
        return _logical("&", other, self)

    def __or__(self, other: Any) -> Symbol:
        return _logical("|", self, other)

    def __ror__(self, other: Any) -> Symbol:
        return _logical("|", other, self)

    def __xor__(self, other: Any) -> Symbol:
        return _logical("^", self, other)

    def __rxor__(self, other: Any) -> Symbol:
        return _logical("^", other, self)

    def __invert__(self) -> Symbol:
        if self.kind == FLOAT:
            _refuse(f"~ is of integers and truth values, not of {self!r}")
        return Symbol(self.kind, "~", self)

    def __neg__(self) -> Symbol:
        return Symbol(FLOAT if self.kind == FLOAT else INT, "neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return Symbol(FLOAT if self.kind == FLOAT else INT, "absolute", self)

    def __lt__(self, other: Any) -> Symbol:
        return Symbol(BOOL, "<", self, operand(other))

    def __le__(self, other: Any) -> Symbol:
        return Symbol(BOOL, "<=", self, operand(other))

    def __gt__(self, other: Any) -> Symbol:
        return Symbol(BOOL, ">", self, operand(other))

    def __ge__(self, other: Any) -> Symbol:
        return Symbol(BOOL, ">=", self, operand(other))

    def __eq__(self, other: Any) -> Symbol:
        return Symbol(BOOL, "==", self, operand(other))

    def __ne__(self, other: Any) -> Symbol:
        return Symbol(BOOL, "!=", self, operand(other))

    def __bool__(self) -> NoReturn:
        _refuse(
            f"the truth of {self!r} is asked for, which differs from pair to pair: write & for and, | for "
            "or, ~ for not, where(condition, a, b) for if and for a conditional expression, minimum and "
            "maximum for min and max, and (a < b) & (b < c) for a < b < c"
        )

    def __int__(self) -> NoReturn:
        _refuse(f"{self!r} is no number yet: write // or where(...), not int() or an index of a list")

    __index__ = __trunc__ = __floor__ = __ceil__ = __int__

    def __float__(self) -> NoReturn:
        _refuse(f"{self!r} is no number yet: write to_float, exp or tanh of elementwise, not float()")

    def __round__(self, digits: Any = None) -> NoReturn:
        _refuse(f"{self!r} is no number yet: write (x + 0.5) // 1, not round()")

    def __iter__(self) -> NoReturn:
        _refuse(f"{self!r} is one value: it has no length and no members")

    __len__ = __getitem__ = __contains__ = __iter__


class TableSymbol:
    """A table of the rule: what `load` reads. name: its leaf's name; kind: of its numbers."""

    __slots__ = ("name", "kind", "ndim")

    def __init__(self, name: str, kind: str, ndim: int) -> None:
        self.name, self.kind, self.ndim = name, kind, ndim

    @property
    def shape(self) -> tuple[Symbol, ...]:
        """The table's sizes."""
        return tuple(Symbol(INT, "size", self.name, dim) for dim in range(self.ndim))

    def load(self, index: Sequence[Any]) -> Symbol:
        """What `elementwise.load` gives: each index clamped into its dimension."""
        if len(index) != self.ndim:
            _refuse(f"a table of {self.ndim} dimensions is read with {len(index)} indices")
        for i in map(operand, index):
            if kind_of(i) != INT:
                _refuse(f"a table is read with the index {i!r}, which is no integer")
        return Symbol(self.kind, "load", self.name, *map(operand, index))

    def __getitem__(self, index: Any) -> Symbol:
        several = map(operand, index if isinstance(index, tuple) else (index,))
        return self.load([_from_the_end(i, n) for i, n in zip(several, self.shape, strict=False)])

    def __len__(self) -> NoReturn:
        _refuse("a table's length is shape[0], which is not known while a rule is traced")

    def __bool__(self) -> bool:
        _refuse("a table has no truth: ask whether the field `is None`")


def _from_the_end(index: Any, size: Symbol) -> Any:
    """Python's meaning of a negative index."""
    if not isinstance(index, Symbol):
        return index if index >= 0 else size + index
    never_negative = index.op in ("batch", "head", "k")
    return index if never_negative else call("where", INT, index < 0, index + size, index)


def leaf(name: str) -> Symbol:
    """A position, an index, a length or the score, by its name in expressions."""
    return _LEAVES[name]


def kind_of(value: Any) -> str:
    """BOOL, INT or FLOAT, of a symbol or a number."""
    if type(value) is Symbol:
        return value.kind
    return BOOL if value is True or value is False else INT if type(value) is int else FLOAT


def operand(value: Any) -> Any:
    """A symbol, or a number as Python's own; TypeError for anything else."""
    if type(value) in (Symbol, int, float, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"):
        return bool(value)
    return _refuse(
        f"{value!r} ({type(value).__name__}) meets a value of a rule; a rule may use numbers, and by load "
        "tables that are its fields"
    )


def call(function: str, kind: str, *args: Any) -> Symbol:
    """A function of `elementwise` on symbols and numbers."""
    return Symbol(kind, function, *map(operand, args))


def joined(*values: Any) -> str:
    """The kind of a value that may be either of these."""
    kinds = {kind_of(operand(value)) for value in values}
    return kinds.pop() if len(kinds) == 1 else FLOAT if FLOAT in kinds else INT


def _arithmetic(op: str, a: Any, b: Any) -> Symbol:
    a, b = operand(a), operand(b)
    return Symbol(FLOAT if FLOAT in (kind_of(a), kind_of(b)) else INT, op, a, b)


def _integral(op: str, a: Any, b: Any) -> Symbol:
    a, b = operand(a), operand(b)
    if FLOAT in (kind_of(a), kind_of(b)):
        _refuse(f"{op} is of integers, not of {a!r} and {b!r}")
    if isinstance(b, int) and b < 0:
        _refuse(f"{op} by {b}: a shift is by 0 or more")
    return Symbol(INT, op, a, b)


def _logical(op: str, a: Any, b: Any) -> Symbol:
    a, b = operand(a), operand(b)
    kinds = kind_of(a), kind_of(b)
    if FLOAT in kinds:
        _refuse(f"{op} is of integers and truth values, not of {a!r} and {b!r}: compare in parentheses")
    return Symbol(BOOL if kinds == (BOOL, BOOL) else INT, op, a, b)


def _power(a: Any, b: Any) -> Any:
    """a ** b. Integers to a constant power are multiplied out; other powers are of floats."""
    if isinstance(b, (bool, int)) and b >= 0 and (b <= LARGEST_POWER or kind_of(a) != FLOAT):
        if b > LARGEST_POWER:
            _refuse(f"{a!r} ** {b}: constant powers of integers go up to {LARGEST_POWER}")
        return _multiplied(a, int(b))
    if isinstance(b, int) and -LARGEST_POWER <= b < 0:
        return 1.0 / _multiplied(a, -b)
    if FLOAT not in (kind_of(a), kind_of(b)):
        if type(a) is int and a == 2:
            return 1 << b
        _refuse(
            f"{a!r} ** {b!r}: integers are raised to constant powers only, and 2 to others from 0 on; write "
            "to_float(...) for a float's power"
        )
    return Symbol(FLOAT, "power", a, b)


def _multiplied(a: Any, power: int) -> Any:
    result: Any = None
    while power:
        if power & 1:
            result = a if result is None else result * a
        power >>= 1
        a = a * a if power else a
    return 1 if result is None else result


def _refuse(message: str) -> NoReturn:
    raise TypeError(message)


_LEAVES = {
    name: Symbol(FLOAT if name == "s" else INT, name)
    for name in (
        *("s", "q", "k", "q_first", "q_last", "k_first", "k_last"),
        *("batch", "head", "seqlen_q", "seqlen_k"),
    )
}


def text(roots: Sequence[Any]) -> str:
    """What symbols (or numbers) were made of, as one line; what is used twice gets a name, x0, x1, ..."""
    written: dict[int, str] = {}
    lines: list[str] = []
    order, uses = reachable(roots)
    for node in order:
        found = _written(node, written)
        if uses[id(node)] > 1 and node.args:
            lines.append(f"x{len(lines)} = {found}")
            found = f"x{len(lines) - 1}"
        written[id(node)] = found
    return "; ".join([*lines, ", ".join([_text_of(root, written) for root in roots])])


def reachable(roots: Sequence[Any]) -> tuple[list[Symbol], dict[int, int]]:
    """Symbols that the roots were made of, each after its arguments, and how often each is used."""
    order: list[Symbol] = []
    uses: dict[int, int] = {}
    stack = [root for root in reversed(roots) if type(root) is Symbol]
    while stack:
        node = stack.pop()
        if node is None:  # all that the next one is made of has been seen
            order.append(stack.pop())
            continue
        uses[id(node)] = used = uses.get(id(node), 0) + 1
        if used > 1:
            continue
        if node.args:
            stack += (node, None)
            stack += [arg for arg in reversed(node.args) if type(arg) is Symbol]
        else:
            order.append(node)
    return order, uses


def _written(node: Symbol, written: dict[int, str]) -> str:
    if not node.args:
        return node.op
    args = [_text_of(arg, written) for arg in node.args]
    if node.op in ("neg", "~"):
        return f"({'-' if node.op == 'neg' else '~'}{args[0]})"
    if node.op[0].isalpha():
        return f"{node.op}({', '.join(args)})"
    return f"({args[0]} {node.op} {args[1]})"


def _text_of(value: Any, written: dict[int, str]) -> str:
    if type(value) is Symbol:
        return written[id(value)]
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if value != value else "inf" if value > 0 else "(-inf)"
    if kind_of(value) == INT:
        value = int(value)  # a symbolic number, which torch.compile takes for an int, becomes what it is now
    return f"({value!r})" if value < 0 else f"{value!r}"

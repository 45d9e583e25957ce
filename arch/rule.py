"""Rules: what a user may say about single (query, key) pairs, written once in Python.

A rule is a frozen dataclass. `describe` takes it apart into its type, which says which fields are absent and
what the others are, and its *field values*, which are run-time operands: a new window size or a new table of
document ids never recompiles. `traced` runs the type's methods on symbols and writes down the expression that
they compute: that text is what a kernel is compiled from and kept under. So whatever a rule's code uses,
attributes of its class, of modules, of enclosing functions, counts as it is at the time of the call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from . import symbol
from .expression import LARGEST_POSITION, leaf_names
from .symbol import BOOL, FLOAT, INT, Symbol, TableSymbol

MOST_KNOWN = 1024  # implied lines that are kept
_INT64 = range(-(1 << 63), 1 << 63)


class Rule:
    """Base of masks and scores: subclass as a frozen dataclass.

    Fields may be None, int, float, a torch tensor, a plain function, another rule, or a tuple of rules.
    tables: for a tensor field, the shapes that a call may give it, in the words "batch", "heads",
    "seqlen_q" and "seqlen_k"; a field without an entry may have any shape.
    """

    tables: ClassVar[dict[str, tuple[tuple[str, ...], ...]]] = {}

    def at(self, batch, head, seqlen_q, seqlen_k):
        """The rule as it stands for one sequence and query head; override it to pick table rows."""
        return self

    def form(self) -> Rule:
        """The rule that is compiled in its place, where the sizes of its values call for another one."""
        return self

    def sections(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        """Name -> values, of what the rule's methods say, on symbols; given by masks and by scores."""
        raise NotImplementedError(f"{type(self).__name__} is neither a Mask nor a Score")

    def implied(self, values: dict[str, Symbol]) -> dict[str, tuple]:
        """The same of what follows from `sections`, whatever the rule."""
        return {}


class Fixed(NamedTuple):
    """A field's value that belongs to the rule's type: a plain function."""

    value: Any


@dataclass(frozen=True)
class RuleType:
    """What a rule is besides the values of its fields.

    kinds: one entry per dataclass field, in order: "none", "int", "int64", "float", "tensor:<dtype>:<rank>",
    Fixed, a RuleType, or a tuple of RuleTypes.
    """

    cls: type[Rule]
    kinds: tuple[Any, ...]

    @property
    def name(self) -> str:
        """What the user calls it: its class, or the function that it is."""
        functions = [kind.value.__qualname__ for kind in self.kinds if isinstance(kind, Fixed)]
        return functions[0] if functions else self.cls.__qualname__

    def leaves(self) -> tuple[str, ...]:
        """Kinds of the run-time values, in the order in which `build` takes them."""
        return tuple(self._leaves())

    def _leaves(self) -> Iterator[str]:
        for kind in self.kinds:
            if isinstance(kind, RuleType):
                yield from kind._leaves()
            elif isinstance(kind, Fixed):
                continue
            elif isinstance(kind, tuple):
                for nested in kind:
                    yield from nested._leaves()
            elif kind != "none":
                yield kind

    def classes(self) -> Iterator[type[Rule]]:
        """Its class, and those of all rules inside it."""
        yield self.cls
        for kind in self.kinds:
            for nested in kind if isinstance(kind, tuple) and not isinstance(kind, Fixed) else (kind,):
                if isinstance(nested, RuleType):
                    yield from nested.classes()

    def ships(self) -> bool:
        """Whether this rule and all inside it come with cute_flash, none from a user."""
        return all(map(ships, self.classes()))

    def build(self, values: tuple[Any, ...]) -> Rule:
        """A rule of this type around `values`: numbers, tensors or symbols."""
        rule, rest = self._take(tuple(values))
        if rest:
            raise ValueError(f"{self.cls.__name__} takes {len(self.leaves())} values, got {len(values)}")
        return rule

    def _take(self, values: tuple[Any, ...]) -> tuple[Rule, tuple[Any, ...]]:
        rule = object.__new__(self.cls)
        for name, kind in zip(self.cls.__match_args__, self.kinds, strict=True):
            if isinstance(kind, RuleType):
                value, values = kind._take(values)
            elif isinstance(kind, Fixed):
                value = kind.value
            elif isinstance(kind, tuple):
                members = []
                for nested in kind:
                    member, values = nested._take(values)
                    members.append(member)
                value = tuple(members)
            elif kind == "none":
                value = None
            else:
                value, values = values[0], values[1:]
            object.__setattr__(rule, name, value)
        return rule, values


@functools.cache
def ships(cls: type) -> bool:
    """Whether a class comes with cute_flash: then the sources in a compile key say what it computes."""
    return cls.__module__.startswith(f"{__package__}.")


def describe(rule: Rule) -> tuple[RuleType, tuple[Any, ...]]:
    """Take a rule apart into its type and its run-time values, `build`'s inverse.

    Raises TypeError or ValueError, naming class and field, for a field that is of another type, or a number
    that 64 bits do not hold.
    """
    if not hasattr(type(rule), "__dataclass_fields__"):
        raise TypeError(f"{type(rule).__name__} is no dataclass: decorate it with @dataclass(frozen=True)")
    rule = rule.form()
    kinds: list[Any] = []
    values: list[Any] = []
    for name in type(rule).__match_args__:
        kind, found = _describe_field(rule, name, getattr(rule, name))
        kinds.append(kind)
        values += found
    return RuleType(type(rule), tuple(kinds)), tuple(values)


def _describe_field(rule: Rule, name: str, value: Any) -> tuple[Any, tuple[Any, ...]]:
    if value is None:
        return "none", ()
    if isinstance(value, Rule):
        return describe(value)
    if isinstance(value, tuple) and all(isinstance(member, Rule) for member in value):
        described = [describe(member) for member in value]
        return tuple(kind for kind, _ in described), tuple(v for _, found in described for v in found)
    if isinstance(value, float):
        return "float", (value,)
    if isinstance(value, int) and not isinstance(value, bool):
        return _int_kind(rule, name, value), (value,)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return Fixed(value), ()
    if hasattr(value, "data_ptr"):
        return f"tensor:{str(value.dtype).removeprefix('torch.')}:{value.ndim}", (value,)
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return _int_kind(rule, name, value), (value,)
    if hasattr(value, "__float__") and not isinstance(value, (bool, str)):
        return "float", (value,)
    raise TypeError(
        f"{type(rule).__name__}.{name} is {value!r} ({type(value).__name__}); "
        "a rule's fields may be None, int, float, a tensor, a plain function, a rule or a tuple of rules"
    )


def _int_kind(rule: Rule, name: str, value: Any) -> str:
    """ "int" for what rules compute with in 32 bits, "int64" for larger numbers."""
    if -LARGEST_POSITION <= value <= LARGEST_POSITION:
        return "int"
    if int(value) not in _INT64:
        raise ValueError(f"{type(rule).__name__}.{name} is {value}; allowed: integers of 64 bits")
    return "int64"


def traced(kind: RuleType, known: dict[tuple[str, ...], list[str]] | None = None) -> str:
    """The expression of rules of this type: a line with its leaves, then a line for each section.

    known: lines that are implied, by those that imply them, for later calls; None: find out anew.
    Raises TypeError, naming the class, for a rule that cannot be traced.
    """
    leaves = kind.leaves()
    names = leaf_names(leaves)
    values = tuple(_leaf(name, kind) for name, kind in zip(names, leaves, strict=True))
    at = {name: symbol.leaf(name) for name in ("batch", "head", "seqlen_q", "seqlen_k")}
    try:
        rule = kind.build(values).at(*at.values())
        lines = [" ".join(["leaves", *leaves]), *_lines(rule.sections(at))]
        said = tuple(lines)
        implied = None if known is None else known.get(said)
        if implied is None:
            implied = _lines(rule.implied(at))
    except TypeError as error:
        raise TypeError(f"{kind.name} cannot be compiled: {error}") from error
    if known is not None:
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[said] = implied
    return "\n".join([*lines, *implied])


def _lines(sections: dict[str, tuple]) -> list[str]:
    return [f"{name} = {symbol.text(found)}" for name, found in sections.items()]


def _leaf(name: str, kind: str) -> Symbol | TableSymbol:
    kind, *table = kind.split(":")
    if not table:
        return Symbol(FLOAT if kind == "float" else INT, name)
    dtype, rank = table
    return TableSymbol(name, FLOAT if "float" in dtype else INT, int(rank))


def truth(method: str, value: Any) -> Any:
    """`value` if it is a truth value; TypeError for what else a rule's method may have returned."""
    found = symbol.operand(value)
    if symbol.kind_of(found) != BOOL:
        raise TypeError(f"{method} returns {found!r}, which is a number; allowed: a comparison")
    return found

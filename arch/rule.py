"""Rules: what a user may say about single (query, key) pairs, written once in Python.

A rule is a frozen dataclass. Its *class* and which fields are absent change compiled code and go into
the compile key (`RuleType`); its *field values* are run-time operands, so a new window size or a new
table of document ids never recompiles. `describe` takes a rule apart, `RuleType.build` puts it
together again, around device values inside a kernel.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import re
import types
from dataclasses import dataclass, fields
from typing import Any, ClassVar

_CLASSES: dict[str, type[Rule]] = {}


class Rule:
    """Base of masks and scores: subclass as a frozen dataclass.

    Fields may be None, int, float, a torch tensor, another rule, or a tuple of rules.
    tables: for a tensor field, the shapes that a call may give it, in the words "batch", "heads",
    "seqlen_q" and "seqlen_k"; a field without an entry may have any shape.
    ignores_head: `at` gives the same for every head of a sequence; so does a class without an `at`.
    """

    rule_id: ClassVar[str]
    tables: ClassVar[dict[str, tuple[tuple[str, ...], ...]]] = {}
    ignores_head: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A compile key holds the text of every file here, so a rule that ships needs no fingerprint;
        # without one its key is the same under every version of Python.
        ships = _ships(cls)
        name = re.sub(r"\W", "_", cls.__name__)
        cls.rule_id = name if ships else f"{name}-{_fingerprint(cls)}"
        _CLASSES[cls.rule_id] = cls

    def at(self, batch, head, seqlen_q, seqlen_k):
        """The rule as it stands for one sequence and query head; override it to pick table rows."""
        return self


def _ships(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.")


def _fingerprint(cls: type) -> str:
    digest = hashlib.sha256(cls.__qualname__.encode())
    for base in cls.__mro__:
        if base is Rule:
            break
        for name, member in sorted(base.__dict__.items()):
            if isinstance(member, types.FunctionType):
                digest.update(name.encode())
                _update(digest, member, set())
    return digest.hexdigest()[:16]


def _update(digest, function: types.FunctionType, seen: set) -> None:
    """Hash what a function does: its code, defaults and the values from outside that it uses."""
    if function in seen:
        return
    seen.add(function)
    _update_code(digest, function.__code__)
    for value in (function.__defaults__, *(function.__kwdefaults__ or {}).items()):
        _update_value(digest, function, value, seen)
    for value in outside_values(function):
        _update_value(digest, function, value, seen)


def outside_values(function: types.FunctionType) -> tuple[Any, ...]:
    """What a function uses besides its arguments: values of enclosing functions and of its module."""
    captured = [cell.cell_contents for cell in function.__closure__ or ()]
    module = function.__globals__
    return (*captured, *(module[name] for name in _global_names(function.__code__) if name in module))


@functools.cache
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = {i.argval: None for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_global_names(constant))
    return tuple(names)


def _update_value(digest, user: types.FunctionType, value, seen: set) -> None:
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        digest.update(repr(value).encode())
    elif isinstance(value, tuple):
        for member in value:
            _update_value(digest, user, member, seen)
    elif isinstance(value, types.FunctionType) and not value.__module__.startswith(f"{__package__}."):
        _update(digest, value, seen)
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif isinstance(value, types.ModuleType):
        digest.update(value.__name__.encode())
    else:
        raise TypeError(
            f"{user.__qualname__} uses {value!r} ({type(value).__name__}); besides its arguments a rule's "
            "code may use numbers, strings, functions, classes and modules: make other values its fields"
        )


def _update_code(digest, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _update_code(digest, constant)
        else:
            digest.update(repr(constant).encode())


@dataclass(frozen=True)
class RuleType:
    """The part of a rule that changes compiled code.

    kinds: one entry per dataclass field, in order: "none", "int", "float", "tensor:<dtype>:<rank>",
    a RuleType, or a tuple of RuleTypes.
    """

    rule_id: str
    kinds: tuple[Any, ...]

    @property
    def cls(self) -> type[Rule]:
        return _CLASSES[self.rule_id]

    def leaves(self) -> tuple[str, ...]:
        """Kinds of the run-time values, in the order in which `build` takes them."""
        found: list[str] = []
        for kind in self.kinds:
            if isinstance(kind, RuleType):
                found += kind.leaves()
            elif isinstance(kind, tuple):
                for nested in kind:
                    found += nested.leaves()
            elif kind != "none":
                found.append(kind)
        return tuple(found)

    def nested(self) -> tuple[RuleType, ...]:
        """The rules in its fields."""
        found = [n for kind in self.kinds for n in (kind if isinstance(kind, tuple) else (kind,))]
        return tuple(n for n in found if isinstance(n, RuleType))

    def ignores_head(self) -> bool:
        """Whether this rule and all inside it stand the same for every head of a sequence."""
        own = self.cls.at is Rule.at or self.cls.ignores_head
        return own and all(n.ignores_head() for n in self.nested())

    def ships(self) -> bool:
        """Whether this rule and all inside it come with cute_flash, none from a user."""
        return _ships(self.cls) and all(n.ships() for n in self.nested())

    def build(self, values: tuple[Any, ...]) -> Rule:
        """A rule of this type around `values`, which may be host numbers, tensors or device values."""
        rule, rest = self._take(tuple(values))
        if rest:
            raise ValueError(f"{self.rule_id} takes {len(self.leaves())} values, got {len(values)}")
        return rule

    def _take(self, values: tuple[Any, ...]) -> tuple[Rule, tuple[Any, ...]]:
        rule = object.__new__(self.cls)
        for field, kind in zip(fields(self.cls), self.kinds, strict=True):
            if isinstance(kind, RuleType):
                value, values = kind._take(values)
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
            object.__setattr__(rule, field.name, value)
        return rule, values


def describe(rule: Rule) -> tuple[RuleType, tuple[Any, ...]]:
    """Take a rule apart into its type and its run-time values, `build`'s inverse.

    Raises TypeError, naming class and field, for a field of another type.
    """
    if not hasattr(type(rule), "__dataclass_fields__"):
        raise TypeError(f"{type(rule).__name__} is no dataclass: decorate it with @dataclass(frozen=True)")
    kinds: list[Any] = []
    values: list[Any] = []
    for name in type(rule).__match_args__:
        kind, found = _describe_field(rule, name, getattr(rule, name))
        kinds.append(kind)
        values += found
    return RuleType(type(rule).rule_id, tuple(kinds)), tuple(values)


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
        return "int", (value,)
    if hasattr(value, "data_ptr"):
        return f"tensor:{str(value.dtype).removeprefix('torch.')}:{value.ndim}", (value,)
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return "int", (value,)
    raise TypeError(
        f"{type(rule).__name__}.{name} is {value!r} ({type(value).__name__}); "
        "a rule's fields may be None, int, float, a tensor, a rule or a tuple of rules"
    )

"""Operands of an instruction: what they are, and how their text is read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..base.errors import ParseError

_TOKEN = re.compile(r"\s*([%$\w]+(?:\.[\w]+)*|[{}\[\](),|!+\-<>])")
_ENDS = frozenset((",", "}", ")", ""))  # what follows a whole operand
_NUMBER = re.compile(
    r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$|0[xX][0-9a-fA-F]+U?$|0[bB][01]+U?$|\d+U?$|\d+\.\d*(?:[eE]\d+)?$"
)
SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]$"
    r"|%(?:laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|globaltimer|globaltimer_lo|globaltimer_hi"
    r"|lanemask_(?:eq|le|lt|ge|gt)|cluster_ctarank|cluster_nctarank|is_explicit_cluster"
    r"|dynamic_smem_size|total_smem_size|aggr_smem_size|envreg\d+|pm\d+(?:_64)?)$"
)


@dataclass(frozen=True, slots=True, eq=False)
class Register:
    """A virtual register. width: 1 (predicate), 8, 16, 32, 64 or 128 bits; row: its number among those of
    its width.
    """

    name: str
    width: int
    row: int


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x or %clock64."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A literal. value is an int, or a float for decimal fractions; bits is set for 0f… (32) and 0d… (64)
    forms.
    """

    value: int | float
    bits: int = 0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable's, parameter's or label's name, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset] or [base, {coordinates}]."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, …}."""

    items: tuple


@dataclass(frozen=True, slots=True)
class Pair:
    """d|p: two destinations of one instruction."""

    first: object
    second: object


@dataclass(frozen=True, slots=True)
class Not:
    """!p: a negated predicate operand."""

    operand: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """_: a destination that is thrown away."""


def number(text: str) -> Immediate | None:
    """The literal `text` stands for, or None when it is not a number."""
    if not _NUMBER.match(text):
        return None
    head = text[:2].lower()
    if head == "0f":
        return Immediate(int(text[2:], 16), 32)
    if head == "0d":
        return Immediate(int(text[2:], 16), 64)
    if "." in text:
        return Immediate(float(text))
    digits = text.rstrip("U")
    if head in ("0x", "0b") or digits == "0":
        return Immediate(int(digits, 0))
    return Immediate(int(digits, 8 if digits[0] == "0" else 10))


class Operands:
    """Recursive descent over one instruction's operand text."""

    def __init__(self, text: str, register: Callable[[str], Register | None]):
        self.tokens = [*_TOKEN.findall(text), ""]
        if "".join(self.tokens) != "".join(text.split()):
            raise ParseError(f"cannot read the operands {text.strip()!r}")
        self.register = register
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise ParseError(f"expected {expected or 'an operand'} but found {token or 'the end'}")
        self.at += 1
        return token

    def parse(self) -> tuple:
        return tuple(self.list_until(""))

    def list_until(self, end: str) -> list:
        items: list = []
        if self.peek() == end:
            return items
        while True:
            items.append(self.operand())
            if self.peek() == end:
                return items
            self.take(",")

    def operand(self) -> object:
        token = self.peek()
        if token.startswith("%") and self.tokens[self.at + 1] in _ENDS and (found := self.register(token)):
            self.at += 1
            return found
        if token == "{":
            return Vector(tuple(self.bracketed("{", "}")))
        if token == "(":
            return Vector(tuple(self.bracketed("(", ")")))
        if token == "[":
            return self.address()
        if token == "!":
            self.take()
            inner = self.simple()
            if not isinstance(inner, Register):
                raise ParseError("! needs a predicate register")
            return Not(inner)
        first = self.simple()
        if self.peek() == "|":
            self.take()
            return Pair(first, self.simple())
        if isinstance(first, Symbol) and self.peek() in ("+", "-"):
            return Symbol(first.name, self.offset())
        return first

    def bracketed(self, opening: str, closing: str) -> list:
        self.take(opening)
        items = self.list_until(closing)
        self.take(closing)
        return items

    def address(self) -> Address:
        self.take("[")
        base = self.simple()
        offset = self.offset()
        coordinates: tuple = ()
        if self.peek() == ",":
            self.take()
            coordinates = tuple(self.list_until("]"))
        self.take("]")
        if not isinstance(base, Register | Symbol | Immediate):
            raise ParseError("an address needs a register, a symbol or a number")
        return Address(base, offset, coordinates)

    def offset(self) -> int:
        total = 0
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            if self.peek() == "-":
                self.take()
                sign = -sign
            literal = number(self.take())
            if literal is None or not isinstance(literal.value, int):
                raise ParseError("an offset must be an integer")
            total += sign * literal.value
        return total

    def simple(self) -> object:
        token = self.take()
        if token == "-":
            literal = number(self.take())
            if literal is None:
                raise ParseError("- needs a number")
            if literal.bits:
                return Immediate(literal.value ^ 1 << literal.bits - 1, literal.bits)
            return Immediate(-literal.value)
        if token == "_":
            return Sink()
        if token[0].isdigit():
            literal = number(token)
            if literal is None:
                raise ParseError(f"cannot read the number {token}")
            return literal
        if not re.match(r"[%$\w]", token):
            raise ParseError(f"unexpected {token}")
        if register := self.register(token):
            return register
        if token == "WARP_SZ":
            return Immediate(32)
        if token[0] == "%":
            if SPECIAL.match(token):
                return Special(token)
            raise ParseError(f"{token} is not declared")
        return Symbol(token)


def float_bits(value: float, width: int) -> int:
    """The bit pattern of `value` as a 16-, 32- or 64-bit IEEE float."""
    code = {16: ("<e", "<H"), 32: ("<f", "<I"), 64: ("<d", "<Q")}[width]
    return struct.unpack(code[1], struct.pack(code[0], value))[0]

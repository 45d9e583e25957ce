"""PTX text -> Module of entries, each a flat list of Instructions whose operands are resolved to registers
and symbols.

Scopes are resolved here: a register or label declared inside braces is another one than its namesake
outside. Nothing about the meaning of an opcode is known in this file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from ..base.errors import ParseError
from .operands import Operands, Register, Symbol, number

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8}
WIDTHS |= {f"{letter}{bits}": bits for bits in (16, 32, 64) for letter in "busf"}
WIDTHS |= {"f16x2": 32, "b128": 128}


@dataclass(slots=True)
class Instruction:
    """One PTX instruction. opcode: its dotted text; targets: the instruction numbers a branch may go to.

    source: the line of the kernel's own source that it comes from, "path:number" ("" where .loc says none).
    """

    line: int
    text: str
    opcode: str
    guard: Register | None
    guard_negated: bool
    operands: tuple
    targets: tuple[int, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class Variable:
    """A declared .shared, .local, .const, .global or .param variable. size 0: unsized extern array (dynamic
    shared memory).
    """

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""


@dataclass(slots=True)
class EntryText:
    """One .entry: its parameters in order, local variables, instructions, register counts by width and
    directives.
    """

    name: str
    line: int
    params: list[Variable] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[int, list[Register]] = field(default_factory=dict)
    writers: dict[Register, list[Instruction]] = field(default_factory=dict)  # for constants.py
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Module:
    """A parsed PTX file. target as written, e.g. "sm_80"; variables are the module's own."""

    target: str = ""
    version: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    entries: dict[str, EntryText] = field(default_factory=dict)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([%$\w]+)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(loc|file|version|target|address_size)\b([^\n;]*);?")
_DIRECTIVE = re.compile(r"\.(\w+)\b((?:\"[^\"]*\"|[^;{\"])*)(;|(?=\{))")
_VARIABLE = re.compile(
    r"\.(?:(?:visible|extern|weak|common)\s+\.)*(shared|local|const|global)\b([^;=]*)(?:=\s*([^;]*))?;"
)
_FUNCTION = re.compile(r"(?:\.(?:visible|extern|weak)\s+)*\.(entry|func)\b([^;{]*)([;{])")
_INSTRUCTION = re.compile(r"(?:@\s*(!?)\s*([%$\w]+)\s+)?([a-z][\w.:]*)([^;{]*(?:\{[^}]*\}[^;{]*)*);")
_DECLARATOR = re.compile(r"([%$\w]+)\s*(<\s*(\d+)\s*>)?")


class _Scope:
    """Names visible inside one pair of braces."""

    def __init__(self, outer: _Scope | None):
        self.outer = outer
        self.registers: dict[str, Register] = {}
        self.families: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, int] = {}

    def find_label(self, name: str) -> int | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        return None


class _Parser:
    def __init__(self, text: str):
        blank = _COMMENT.sub(lambda m: "\n" * m.group().count("\n") or " ", text)
        self.text = blank
        self.position = 0
        self.newlines = [m.start() for m in re.finditer("\n", blank)]
        self.module = Module()
        self.files: dict[str, str] = {}  # path of each number that .loc may name
        self.located: list[tuple[Instruction, tuple[str, str]]] = []  # file and line, from .loc

    def line(self, position: int | None = None) -> int:
        return bisect_right(self.newlines, self.position if position is None else position) + 1

    def error(self, message: str) -> ParseError:
        rest = self.text[self.position : self.position + 60].split("\n")[0]
        return ParseError(f"{message}: {rest!r}").at(self.line(), rest)

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def parse(self) -> Module:
        while True:
            self.match(_SPACE)
            if self.position >= len(self.text):
                break
            if found := self.match(_VARIABLE):
                self.add_variables(found, self.module.variables)
            elif found := self.match(_FUNCTION):
                self.function(found)
            elif found := self.match(_LINE_DIRECTIVE):
                if found[1] in ("target", "version"):
                    setattr(self.module, found[1], found[2].split(",")[0].strip())
                elif named := re.match(r'\s*(\d+)\s*"([^"]*)"', found[2] if found[1] == "file" else ""):
                    self.files[named[1]] = named[2]
            elif re.match(r"\.section\b[^{]*\{", self.text[self.position : self.position + 200]):
                self.position = self.closing_brace() + 1
            elif not self.match(_DIRECTIVE):
                raise self.error("expected a module-level declaration")
        if not self.module.target:
            raise ParseError("no .target directive: this is not a PTX module")
        for instruction, (file, line) in self.located:
            instruction.source = f"{self.files[file]}:{line}" if file in self.files and line != "0" else ""
        return self.module

    def closing_brace(self) -> int:
        depth = 0
        for found in re.compile(r"[{}]").finditer(self.text, self.position):
            depth += 1 if found[0] == "{" else -1
            if depth == 0:
                return found.start()
        raise self.error("unclosed brace")

    def add_variables(self, found: re.Match[str], into: dict[str, Variable]) -> None:
        space, declaration, initial = found[1], found[2], found[3]
        variable = _variable(space, declaration, initial)
        if variable is None:
            self.position = found.start()
            raise self.error(f"cannot read this .{space} declaration")
        into[variable.name] = variable

    def function(self, found: re.Match[str]) -> None:
        kind, header, end = found[1], found[2], found[3]
        if end == ";":
            return
        if kind == "func":
            # A device function: calls to it are refused when they are translated, so its body is of no use.
            self.position -= 1
            self.position = self.closing_brace() + 1
            return
        entry = EntryText("", self.line(found.start()))
        name = re.match(r"\s*([%$\w]+)\s*(?:\(([^)]*)\))?(.*)$", header, re.S)
        if name is None:
            raise self.error("an entry without a name")
        entry.name = name[1]
        for declaration in filter(str.strip, (name[2] or "").split(",")):
            variable = _variable("param", re.sub(r"^\s*\.param\b", "", declaration), None)
            if variable is None:
                raise self.error(f"cannot read the parameter {declaration.strip()!r}")
            entry.params.append(variable)
        for directive, values in re.findall(r"\.(\w+)\s*([\d,\s]*)", name[3]):
            entry.directives[directive] = tuple(int(v) for v in re.findall(r"\d+", values))
        _Body(self, entry).parse()
        self.module.entries[entry.name] = entry


def _integer(text: str) -> int | None:
    text = text.strip()
    literal = number(text.removeprefix("-"))
    if literal is None or not isinstance(literal.value, int):
        return None
    return -literal.value if text[0] == "-" else literal.value


def _variable(space: str, declaration: str, initial: str | None) -> Variable | None:
    found = re.match(
        r"\s*(?:\.align\s+(\d+)\s*)?\.(\w+)\s*(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s*)?)?([%$\w]+)\s*((?:\[\s*\w*\s*\]\s*)*)$",
        declaration,
    )
    if found is None or found[2] not in WIDTHS:
        return None
    size = WIDTHS[found[2]] // 8
    align = int(found[1]) if found[1] else size
    element = size
    for extent in re.findall(r"\[\s*(\w*)\s*\]", found[4]):
        size *= int(extent, 0) if extent else 0
    data = b""
    if initial is not None:
        values = [_integer(text) for text in initial.strip().strip("{}").split(",") if text.strip()]
        if None in values:
            return None
        mask = (1 << 8 * element) - 1
        data = b"".join((value & mask).to_bytes(element, "little") for value in values)
    return Variable(found[3], space, align, size, data)


class _Body:
    """Reads one entry's body: scopes, declarations, labels, instructions."""

    def __init__(self, parser: _Parser, entry: EntryText):
        self.parser = parser
        self.entry = entry
        self.scope = _Scope(None)
        self.branches: list[tuple[Instruction, _Scope]] = []
        self.tables: dict[str, tuple[str, ...]] = {}
        self.location: tuple[str, str] | None = None  # what the latest .loc said: number of the file, line

    def parse(self) -> None:
        parser = self.parser
        while True:
            parser.match(_SPACE)
            here = parser.text[parser.position : parser.position + 1]
            if here == "}":
                parser.position += 1
                if self.scope.outer is None:
                    break
                self.scope = self.scope.outer
            elif here == "{":
                parser.position += 1
                self.scope = _Scope(self.scope)
            elif here == ".":
                self.directive()
            elif here == ";":
                parser.position += 1
            elif found := parser.match(_LABEL):
                self.scope.labels[found[1]] = len(self.entry.instructions)
                self.branch_table(found[1])
            else:
                self.instruction()
        self.resolve_branches()

    def directive(self) -> None:
        parser = self.parser
        if found := parser.match(_VARIABLE):
            parser.add_variables(found, self.entry.variables)
        elif found := parser.match(_LINE_DIRECTIVE):
            if found[1] == "loc":
                self.location = tuple(found[2].split()[:2])
        elif found := _DIRECTIVE.match(parser.text, parser.position):
            if found[1] == "reg":
                self.declare(found[2])
            elif found[1] != "pragma":
                raise parser.error(f"unknown directive .{found[1]} in an entry's body")
            parser.position = found.end()
        else:
            raise parser.error("cannot read this directive")

    def branch_table(self, label: str) -> None:
        """`label: .branchtargets A, B;` names the targets of a brx.idx."""
        if found := self.parser.match(re.compile(r"\s*\.branchtargets\b([^;]*);")):
            self.tables[label] = tuple(name.strip() for name in found[1].split(","))

    def declare(self, text: str) -> None:
        found = re.match(r"\s*\.(\w+)\s+(.*)$", text, re.S)
        if found is None or found[1] not in WIDTHS:
            raise self.parser.error(f"cannot read the register declaration .reg{text}")
        width = WIDTHS[found[1]]
        for name in found[2].split(","):
            one = _DECLARATOR.fullmatch(name.strip())
            if one is None:
                raise self.parser.error(f"cannot read the register name {name.strip()!r}")
            if one[2]:
                self.scope.families[one[1]] = (width, int(one[3]))
            else:
                self.new_register(self.scope, one[1], width)

    def new_register(self, scope: _Scope, name: str, width: int) -> Register:
        same_width = self.entry.registers.setdefault(width, [])
        register = Register(name, width, len(same_width))
        same_width.append(register)
        scope.registers[name] = register
        return register

    def register(self, name: str) -> Register | None:
        scope: _Scope | None = self.scope
        if known := scope.registers.get(name):
            return known
        prefix = name.rstrip("0123456789")
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            family = scope.families.get(prefix)
            if family and len(prefix) < len(name) and int(name[len(prefix) :]) < family[1]:
                return self.new_register(scope, name, family[0])
            scope = scope.outer
        return None

    def instruction(self) -> None:
        parser = self.parser
        start = parser.position
        found = parser.match(_INSTRUCTION)
        if found is None:
            raise parser.error("expected an instruction")
        text = " ".join(found[0].split())
        guard = None
        if found[2]:
            guard = self.register(found[2])
            if guard is None or guard.width != 1:
                parser.position = start
                raise parser.error(f"{found[2]} is not a predicate register")
        line = parser.line(start)
        try:
            operands = Operands(found[4], self.register).parse()
        except ParseError as error:
            raise error.at(line, text) from None
        instruction = Instruction(line, text, found[3], guard, found[1] == "!", operands)
        self.entry.instructions.append(instruction)
        if self.location is not None:
            parser.located.append((instruction, self.location))
        if found[3].split(".")[0] in ("bra", "brx"):
            self.branches.append((instruction, self.scope))

    def resolve_branches(self) -> None:
        for instruction, scope in self.branches:
            label = instruction.operands[-1]
            name = label.name if isinstance(label, Symbol) else str(label)
            names = self.tables.get(name, (name,))
            targets = tuple(scope.find_label(each) for each in names)
            if None in targets:
                raise ParseError(f"branch to an unknown label {name}").at(instruction.line, instruction.text)
            instruction.targets = targets


def parse(text: str) -> Module:
    """Parse a PTX module.

    Raises ParseError, with the PTX line, where the text is not understood.
    """
    return _Parser(text).parse()

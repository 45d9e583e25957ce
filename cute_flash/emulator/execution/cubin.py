"""What a compiled kernel's machine code says that its PTX does not: registers per thread at launch.

A cubin is an ELF file. Its section .nv.info holds attributes, each of a format, a kind and two bytes of size
or value; the kind REGCOUNT gives a symbol's number and the registers that the assembler has settled on.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"\x7fELF\x02\x01"
_FAT = 0xBA55ED50  # the first word of a fat binary: a header, then files that each have a header of their own
_HEADER = 64
_SYMBOLS = 2  # SHT_SYMTAB
_SIZED, _REGCOUNT = 4, 0x2F  # a format, and a kind of attribute


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


def image(address: int) -> bytes:
    """The cubin in memory at `address`, or in the fat binary there; empty where neither lies there."""
    head = ctypes.string_at(address, _HEADER)
    if head.startswith(MAGIC):
        offset, size, count = _table(head)
        return ctypes.string_at(address, offset + size * count)
    magic, _, at, size = struct.unpack_from("<IHHQ", head)
    end = at + size if magic == _FAT else 0
    while at < end:
        _, _, skip, length = struct.unpack("<HHIQ", ctypes.string_at(address + at, 16))
        held = ctypes.string_at(address + at + skip, length)
        if held.startswith(MAGIC):
            return held
        at += skip + length
    return b""


def registers(cubin: bytes, entry: str) -> int | None:
    """Registers per thread that a kernel is launched with; None where the file does not tell."""
    sections = _sections(cubin)
    symbols = next((s for s in sections if s.kind == _SYMBOLS), None)
    if symbols is None:
        return None
    names = sections[symbols.link].offset
    for section in sections:
        if _text(cubin, sections[_names(cubin)].offset + section.name) != ".nv.info":
            continue
        for symbol, count in _register_counts(cubin[section.offset : section.offset + section.size]):
            (name,) = struct.unpack_from("<I", cubin, symbols.offset + symbol * symbols.entry)
            if _text(cubin, names + name) == entry:
                return count
    return None


def _table(head: bytes) -> tuple[int, int, int]:
    """(offset, bytes of an entry, entries) of the table of sections."""
    (offset,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return offset, size, count


def _names(cubin: bytes) -> int:
    """The section that holds the names of sections."""
    return struct.unpack_from("<H", cubin, 62)[0]


def _sections(cubin: bytes) -> list[_Section]:
    if not cubin.startswith(MAGIC):
        return []
    offset, size, count = _table(cubin)
    return [_Section(*struct.unpack_from("<IIQQQQIIQQ", cubin, offset + size * k)) for k in range(count)]


def _text(cubin: bytes, at: int) -> str:
    return cubin[at : cubin.index(b"\0", at)].decode()


def _register_counts(info: bytes) -> Iterator[tuple[int, int]]:
    """(number of a symbol, registers) of each attribute that tells."""
    at = 0
    while at + 4 <= len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if kind == _REGCOUNT:
                yield struct.unpack_from("<II", info, at)
            at += size

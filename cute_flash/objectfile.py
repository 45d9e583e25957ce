"""Load a compiled kernel's host code, an x86-64 ELF object, without a linker or a C compiler.

    load(data, name, symbols) -> tvm_ffi.Function

The object is what the compiler exports: position-independent code in the large code model, which
reaches everything through a global offset table. Loading it is: copy the sections into fresh pages,
build that table, apply the relocations, take write permission from code. Only what such objects are
known to contain is accepted; any other section, relocation or symbol is an error, never a guess.
Destructors (.fini_array) are not run: at exit the driver frees what the process held.

Layout and relocations: System V ABI, AMD64 supplement, chapters 3.5 and 4.4.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_PAGE = mmap.PAGESIZE
_X86_64 = 62
_RELOCATABLE = 1

_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR, _SHF_TLS = 0x1, 0x2, 0x4, 0x400
_SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 2, 4, 8
_LOADABLE = {1: "PROGBITS", _SHT_NOBITS: "NOBITS", 15: "FINI_ARRAY", 0x70000001: "X86_64_UNWIND"}
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1

# name, then the value: S symbol, A addend, P place, GOT the table, G the symbol's slot in the table
_RELOCATIONS: dict[int, Callable[..., int]] = {
    1: lambda S, A, P, GOT, G: S + A,  # R_X86_64_64
    24: lambda S, A, P, GOT, G: S + A - P,  # R_X86_64_PC64
    25: lambda S, A, P, GOT, G: S + A - GOT,  # R_X86_64_GOTOFF64
    27: lambda S, A, P, GOT, G: G + A,  # R_X86_64_GOT64
    29: lambda S, A, P, GOT, G: GOT + A - P,  # R_X86_64_GOTPC64
}
_GOT64 = 27


class ObjectFileError(RuntimeError):
    """The object cannot be loaded; the message names what it contains."""


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


class _Relocation(NamedTuple):
    section: int
    offset: int
    kind: int
    symbol: int
    addend: int


class _Pages:
    """Anonymous memory that starts writable and is then given its final protection, part by part."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1))
        self.bytes = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def protect(self, start: int, end: int, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        span = ctypes.c_size_t(end - start)
        if libc.mprotect(ctypes.c_void_p(self.address + start), span, protection) != 0:
            raise ObjectFileError(
                f"mprotect failed with errno {ctypes.get_errno()}: the system forbids a process to make "
                "code of its own executable, which loading a compiled kernel needs"
            )


class LoadedObject:
    """An object in memory; it stays valid as long as this Python object lives."""

    def __init__(self, data: bytes, symbols: Mapping[str, int]) -> None:
        """data: the ELF object. symbols: address of every external symbol that it needs."""
        machine = platform.machine()
        if machine not in ("x86_64", "AMD64"):
            raise ObjectFileError(
                f"this machine is {machine}; compiled kernels' host code is loaded on x86-64 Linux only"
            )
        self._data = data
        self._sections = _read_sections(data)
        self._symbols = _read_symbols(data, self._sections)
        self._relocations = list(_read_relocations(data, self._sections))
        self._externals = symbols
        self._place()
        self._relocate()
        for start, end, protection in self._ranges:
            self._pages.protect(start, end, protection)

    def address(self, name: str) -> int:
        """Address of a symbol that the object defines."""
        for index, symbol in enumerate(self._symbols):
            if symbol.name == name and symbol.section != _SHN_UNDEF:
                return self._resolve(index)
        defined = sorted(s.name for s in self._symbols if s.name and s.section != _SHN_UNDEF)
        raise ObjectFileError(f"the object defines no symbol {name}; it defines {', '.join(defined)}")

    def _place(self) -> None:
        """Give every section and the offset table an address: code, then constants, then data."""
        groups: dict[int, list[int]] = {mmap.PROT_EXEC: [], 0: [], mmap.PROT_WRITE: []}
        for index, section in enumerate(self._sections):
            if section.flags & _SHF_ALLOC:
                groups[_permission(section)].append(index)
        tabled = dict.fromkeys(r.symbol for r in self._relocations if r.kind == _GOT64)
        self._slots = {index: 8 * slot for slot, index in enumerate(tabled)}
        self._offsets: dict[int, int] = {}
        self._ranges, end = [], 0
        for permission, members in groups.items():
            start = end
            for index in members:
                section = self._sections[index]
                end = _aligned(end, section.align)
                self._offsets[index] = end
                end += section.size
            if permission == 0:
                self._table = end = _aligned(end, 8)
                end += 8 * len(tabled)
            end = _aligned(end, _PAGE)
            if end > start:
                self._ranges.append((start, end, mmap.PROT_READ | permission))
        self._pages = _Pages(end)

    def _relocate(self) -> None:
        memory, base = self._pages.bytes, self._pages.address
        for index, offset in self._offsets.items():
            section = self._sections[index]
            if section.kind != _SHT_NOBITS:
                content = self._data[section.offset:section.offset + section.size]
                memory[offset:offset + section.size] = content
        for index, slot in self._slots.items():
            struct.pack_into("<Q", memory, self._table + slot, self._resolve(index))
        for section, offset, kind, symbol, addend in self._relocations:
            place = self._offsets[section] + offset
            value = _RELOCATIONS[kind](
                S=self._resolve(symbol), A=addend, P=base + place,
                GOT=base + self._table, G=self._slots.get(symbol, 0),
            )
            struct.pack_into("<Q", memory, place, value & 0xFFFFFFFFFFFFFFFF)

    def _resolve(self, index: int) -> int:
        symbol = self._symbols[index]
        if symbol.section == _SHN_ABS:
            return symbol.value
        if symbol.section in self._offsets:
            return self._pages.address + self._offsets[symbol.section] + symbol.value
        if symbol.name == "_GLOBAL_OFFSET_TABLE_":
            return self._pages.address + self._table
        if symbol.section == _SHN_UNDEF and symbol.name in self._externals:
            return self._externals[symbol.name]
        raise ObjectFileError(f"the object needs the symbol {symbol.name!r}, which nothing here provides")


def load(data: bytes, name: str, symbols: Mapping[str, int]) -> Any:
    """The TVM-FFI function `name` of an exported object, as a `tvm_ffi.Function`.

    symbols: addresses of the CUDA functions it calls; those of libtvm_ffi are added.
    """
    import tvm_ffi

    loaded = LoadedObject(data, {**symbols, **tvm_symbols()})
    return tvm_ffi.Function.__from_extern_c__(loaded.address(f"__tvm_ffi_{name}"), keep_alive_object=loaded)


@functools.cache
def tvm_symbols() -> dict[str, int]:
    """Addresses of the functions that host code takes from libtvm_ffi."""
    import tvm_ffi

    library = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    names = ("TVMFFIEnvGetStream", "TVMFFIErrorSetRaisedFromCStr", "TVMFFIErrorSetRaisedFromCStrParts")
    return {name: address_of(getattr(library, name)) for name in names}


def address_of(function: Any) -> int:
    """Address of a ctypes function or callback."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise ObjectFileError(f"{function} has no address")
    return address


class MachineCode:
    """A few instructions in a page of their own; `address` is valid as long as this object lives."""

    def __init__(self, code: bytes) -> None:
        self._pages = _Pages(_aligned(len(code), _PAGE))
        self._pages.bytes[:len(code)] = code
        self._pages.protect(0, _aligned(len(code), _PAGE), mmap.PROT_READ | mmap.PROT_EXEC)
        self.address = self._pages.address


def _aligned(value: int, align: int) -> int:
    align = max(align, 1)
    return -(-value // align) * align


def _permission(section: _Section) -> int:
    if section.flags & _SHF_EXECINSTR and section.flags & _SHF_WRITE:
        raise ObjectFileError(f"section {section.name} is both writable and executable")
    if section.flags & _SHF_EXECINSTR:
        return mmap.PROT_EXEC
    return mmap.PROT_WRITE if section.flags & _SHF_WRITE else 0


def _text(data: bytes, offset: int) -> str:
    return data[offset:data.index(b"\0", offset)].decode()


def _read_sections(data: bytes) -> list[_Section]:
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise ObjectFileError("not a 64-bit little-endian ELF file")
    header = struct.unpack_from("<16sHHIQQQIHHHHHH", data)
    kind, machine, table, count, names = header[1], header[2], header[6], header[12], header[13]
    if kind != _RELOCATABLE or machine != _X86_64:
        raise ObjectFileError(f"ELF type {kind}, machine {machine}: a relocatable x86-64 object is needed")
    raw = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
    name_table = raw[names][4]
    sections = [
        _Section(_text(data, name_table + r[0]), r[1], r[2], r[4], r[5], r[6], r[7], r[8]) for r in raw
    ]
    for section in sections:
        if section.flags & _SHF_ALLOC and (section.kind not in _LOADABLE or section.flags & _SHF_TLS):
            raise ObjectFileError(f"section {section.name} of type {section.kind:#x} is not supported")
    return sections


def _read_symbols(data: bytes, sections: list[_Section]) -> list[_Symbol]:
    for section in sections:
        if section.kind == _SHT_SYMTAB:
            names = sections[section.link].offset
            content = data[section.offset:section.offset + section.size]
            return [
                _Symbol(_text(data, names + name), index, value)
                for name, _, _, index, value, _ in struct.iter_unpack("<IBBHQQ", content)
            ]
    raise ObjectFileError("the object has no symbol table")


def _read_relocations(data: bytes, sections: list[_Section]) -> Iterator[_Relocation]:
    """Relocations of the sections that are loaded."""
    for table in sections:
        if table.kind != _SHT_RELA or not sections[table.info].flags & _SHF_ALLOC:
            continue
        for offset, info, addend in struct.iter_unpack("<QQq", data[table.offset:table.offset + table.size]):
            relocation = _Relocation(table.info, offset, info & 0xFFFFFFFF, info >> 32, addend)
            if relocation.kind not in _RELOCATIONS:
                raise ObjectFileError(
                    f"relocation type {relocation.kind} at {sections[table.info].name}+{offset:#x} is not "
                    f"one of {sorted(_RELOCATIONS)}"
                )
            yield relocation

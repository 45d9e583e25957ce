"""Kernels around a few wgmma instructions: matrices from shared memory, results in registers."""

from __future__ import annotations

import numpy as np

from cute_flash.emulator.base.formats import matrix_bits, matrix_values

from .evaluate import aligned, launch, module
from .tiles import BASE, Tile, descriptor, place

MODES = [
    {"asynchrony": "eager"},
    {"asynchrony": "late"},
    {"asynchrony": "random", "schedule": "random", "seed": 1},
    {"asynchrony": "eager", "schedule": "random", "seed": 2},
    {"asynchrony": "late", "schedule": "random", "seed": 3},
]


def elements(kind: str, rows: int, k: int, seed: int) -> np.ndarray:
    """Random finite elements of a format as patterns (rows, k)."""
    random = np.random.default_rng(seed)
    if kind in ("f16", "bf16"):
        values = random.standard_normal((rows, k)).astype(np.float32)
        return values.astype(np.float16).view(np.uint16) if kind == "f16" else (
            values.view(np.uint32) >> 16).astype(np.uint16)  # fmt: skip
    patterns = random.integers(0, 256, (rows, k), dtype=np.uint8)
    while not (finite := np.abs(matrix_values(patterns, kind)) < 64).all():
        patterns[~finite] = random.integers(0, 256, int((~finite).sum()), dtype=np.uint8)
    return patterns


def registers_of(d: np.ndarray) -> np.ndarray:
    """D (64, n) as the ISA's figure gives it to threads: (128, n / 2)."""
    thread, i = np.arange(128)[:, None], np.arange(d.shape[1] // 2)[None]
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    return d[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2]


def fragment_a(a: np.ndarray) -> np.ndarray:
    """A (64, 32 bytes of k) as four registers per thread: (128, 4) uint32."""
    words = np.ascontiguousarray(a).view(np.uint32)  # (64, 8)
    thread, i = np.arange(128)[:, None], np.arange(4)[None]
    return words[thread // 32 * 16 + thread % 32 // 4 + 8 * (i % 2), thread % 4 + 4 * (i // 2)]


HEAD = """
    .reg .pred %p<9>, %yes, %no;
    .reg .b32 %t, %w, %s<9>, %r<9>, %f<256>, %a<32>, %v<4>;
    .reg .b64 %in, %out, %fragment, %x<9>, %da<9>, %db<9>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    mov.pred %yes, 1;
    mov.pred %no, 0;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    ld.param.u64 %fragment, [fragment];
    mul.lo.u32 %s0, %t, 16;
    mad.wide.u32 %x0, %t, 16, %in;
"""
PARAMS = ".param .u64 in, .param .u64 out, .param .u64 fragment"


def load_image(size: int) -> str:
    """PTX that 128 threads or more run to fill shared memory from `in`."""
    lines = [
        f"ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%x0+{at}];\n"
        f"st.shared.v4.b32 [%s0+{BASE + at}], {{%v0, %v1, %v2, %v3}};"
        for at in range(0, size, 2048)
    ]
    copy = "\n".join(lines)
    return f"""
        setp.ge.u32 %p8, %t, 128;
        @%p8 bra LOADED;
        {copy}
        LOADED:
        fence.proxy.async.shared::cta;
        bar.sync 0;
    """


def store(count: int) -> str:
    """PTX that stores registers %f0 … of each thread to `out`."""
    lines = [f"st.global.b32 [%x1+{4 * k}], %f{k};" for k in range(count)]
    return f"mad.wide.u32 %x1, %t, {4 * count}, %out;\n" + "\n".join(lines)


def vector(first: int, count: int, letter: str = "f") -> str:
    return "{" + ", ".join(f"%{letter}{first + k}" for k in range(count)) + "}"


def load_fragments(steps: int) -> str:
    """PTX that loads 4 * steps registers %a0 … per thread."""
    lines = [f"ld.global.b32 %a{k}, [%x2+{4 * k}];" for k in range(4 * steps)]
    return f"mad.wide.u32 %x2, %t, {16 * steps}, %fragment;\n" + "\n".join(lines)


class Case:
    """A sum of `steps` products with its operands in shared memory, and what must come out.

    row: of the eight rows of a swizzle's pattern, the one in which operands start.
    """

    def __init__(self, n: int, kinds: tuple[str, str], result: str = "f32", *, steps: int = 2,
                 widths: tuple[int, int] = (128, 128), major: tuple[bool, bool] = (False, False),
                 in_registers: bool = False, scales: tuple[int, int] = (1, 1), row: int = 0):  # fmt: skip
        self.n, self.kinds, self.result, self.steps = n, kinds, result, steps
        self.widths, self.major, self.in_registers, self.scales = widths, major, in_registers, scales
        self.row = row
        self.k = 256 // matrix_bits(kinds[0])
        self.count = n // 4 if result == "f16" else n // 2
        self.raw = [elements(kinds[0], 64, self.k * steps, 1), elements(kinds[1], n, self.k * steps, 2)]
        self.image = np.full(200 * 1024, 0xFF, np.uint8)
        self.words: list[list[int]] = [[], []]
        at = BASE
        for which, rows in ((0, 64), (1, n)):
            at = self._place(which, rows, at)
        self.image = aligned(self.image[: -(-(at - BASE) // 2048) * 2048])

    def _place(self, which: int, rows: int, at: int) -> int:
        """Put an operand's steps one behind the other; returns where the next one may begin."""
        width, mn_major = self.widths[which], self.major[which]
        bits = matrix_bits(self.kinds[which])
        tile = Tile(rows, self.k, bits, mn_major)
        span = rows * bits // 8 if mn_major else 32
        if width == 16:
            strides = (span // 16 * 128 + 128, 128) if mn_major else (rows * 16 + 128, 128)
        else:
            strides = (16 * width, 8 * width)
        for step in range(self.steps):
            values = np.ascontiguousarray(self.raw[which][:, step * self.k :][:, : self.k])
            at += self.row * width
            place(self.image, at, values, tile, (width, strides))
            self.words[which].append(int(descriptor("wgmma", at, *strides, width)[0]))
            blocks = -(-span // width) * 2 if mn_major else rows // 8
            at += max(8 * width * blocks, strides[0] * 2 if width == 16 else 0)
            at = -(-at // 1024) * 1024
        return at

    @property
    def opcode(self) -> str:
        types = f"{self.result}.{self.kinds[0]}.{self.kinds[1]}"
        return f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}.{types}"

    def product(self, step: int, keep: str, d: int = 0) -> str:
        """The instruction of one step into %f[d]…; keep: its predicate."""
        a = vector(4 * step, 4, "a") if self.in_registers else f"%da{step}"
        flags = ""
        if matrix_bits(self.kinds[0]) == 16:
            flags = ", " + ", ".join(str(int(m)) for m in self.major[self.in_registers :])
        scales = f"{self.scales[0]}, {self.scales[1]}"
        return f"{self.opcode} {vector(d, self.count)}, {a}, %db{step}, {keep}, {scales}{flags};\n"

    def descriptors(self) -> str:
        lines = [f"mov.b64 %db{k}, {word};" for k, word in enumerate(self.words[1])]
        if not self.in_registers:
            lines += [f"mov.b64 %da{k}, {word};" for k, word in enumerate(self.words[0])]
        return "\n".join(lines) + "\n"

    def code(self, middle: str | None = None) -> str:
        """The kernel; `middle` in place of fence, products, commit and wait."""
        if middle is None:
            products = "".join(self.product(k, "%no" if k == 0 else "%yes") for k in range(self.steps))
            middle = f"wgmma.fence.sync.aligned;\n{products}{COMMIT}{WAIT}"
        loads = load_fragments(self.steps) if self.in_registers else ""
        return load_image(len(self.image)) + loads + self.descriptors() + middle + store(self.count)

    def run(self, code: str | None = None, block: int = 128, **options) -> np.ndarray:
        """Registers of D that each thread has at the end: (block, count) uint32."""
        out = np.zeros((block, self.count), np.uint32)
        fragments = [fragment_a(self.raw[0][:, k * self.k :][:, : self.k]) for k in range(self.steps)]
        fragment = np.tile(np.concatenate(fragments, axis=1), (-(-block // 128), 1))
        text = module(HEAD + (code or self.code()), PARAMS, "sm_90a")
        shared = len(self.image) + 4096
        launch(text, [self.image, out, np.ascontiguousarray(fragment)], block=block, shared=shared, **options)
        return out

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """(D, sum of the sizes of its terms), float64 (64, n)."""
        a, b = (matrix_values(self.raw[i], self.kinds[i]).astype(np.float64) for i in (0, 1))
        return self.scales[0] * self.scales[1] * (a @ b.T), np.abs(a) @ np.abs(b).T

    def check(self, out: np.ndarray) -> None:
        """Compare the registers of one or several warpgroups with the exact product."""
        exact, size = self.exact()
        for first in range(0, len(out), 128):
            words = out[first : first + 128]
            got = words.view(np.float16 if self.result == "f16" else np.float32).astype(np.float64)
            bound = registers_of(size) * (2.0**-20 if self.result == "f32" else 2.0**-10 * self.steps)
            assert (np.abs(got - registers_of(exact)) <= bound + 1e-6).all()


FENCE = "wgmma.fence.sync.aligned;\n"
COMMIT = "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"

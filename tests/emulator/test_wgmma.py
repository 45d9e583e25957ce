"""wgmma: numbers against float64 for every form, when products happen, and the mistakes that must be seen."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import (
    DataRace,
    Deadlock,
    OutOfBounds,
    Program,
    RegisterInFlight,
    UninitializedRead,
    UnmodelledInstruction,
    WarpgroupError,
)
from cute_flash.emulator.formats import matrix_bits, matrix_values

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
    """A sum of `steps` products with its operands in shared memory, and what must come out."""

    def __init__(self, n: int, kinds: tuple[str, str], result: str = "f32", *, steps: int = 2,
                 widths: tuple[int, int] = (128, 128), major: tuple[bool, bool] = (False, False),
                 in_registers: bool = False, scales: tuple[int, int] = (1, 1)):  # fmt: skip
        self.n, self.kinds, self.result, self.steps = n, kinds, result, steps
        self.widths, self.major, self.in_registers, self.scales = widths, major, in_registers, scales
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
HALVES = [("f16", "f16"), ("bf16", "bf16")]
BYTES = [(a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")]


@pytest.mark.parametrize("result", ["f32", "f16"])
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("kinds", [*HALVES, *BYTES], ids="_".join)
def test_types(kinds, in_registers, result):
    if kinds[0] == "bf16" and result == "f16":
        with pytest.raises(UnmodelledInstruction, match="f16.bf16.bf16"):
            Case(8, kinds, result).run()
        return
    case = Case(24, kinds, result, in_registers=in_registers)
    case.check(case.run())


@pytest.mark.parametrize("major", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("widths", [(128, 128), (64, 32), (32, 64), (16, 128), (128, 16)])
def test_layouts(widths, major):
    case = Case(64, ("bf16", "bf16"), widths=widths, major=major)
    case.check(case.run(asynchrony="late"))


@pytest.mark.parametrize("n", [8, 80, 96, 128, 256])
@pytest.mark.parametrize("options", MODES, ids=lambda o: "_".join(map(str, o.values())))
def test_shapes_and_orders(n, options):
    case = Case(n, ("f16", "f16"), in_registers=n != 80)
    case.check(case.run(races=True, **options))


@pytest.mark.parametrize("scales", [(1, -1), (-1, 1), (-1, -1)])
def test_negation(scales):
    case = Case(16, ("f16", "f16"), scales=scales)
    case.check(case.run())


@pytest.mark.parametrize("options", MODES, ids=lambda o: "_".join(map(str, o.values())))
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
def test_several_warpgroups_and_ctas(in_registers, options):
    """Three warpgroups with one B: all must be right, whoever runs together."""
    case = Case(32, ("bf16", "bf16"), steps=3, in_registers=in_registers)
    case.check(case.run(block=384, **options))


def test_a_sum_starts_from_the_registers():
    """scale-d holds from the first product on: D starts at 7, or at 1 in f16."""
    for result, start, value in (("f32", "0f40E00000", 7.0), ("f16", "0x3C003C00", 1.0)):
        case = Case(16, ("f16", "f16"), result, steps=1)
        begin = "".join(f"mov.b32 %f{k}, {start};\n" for k in range(case.count))
        middle = f"{begin}{FENCE}{case.product(0, '%yes')}{COMMIT}{WAIT}"
        plain, added = case.run(), None
        for options in MODES:
            added = case.run(case.code(middle), **options)
            view = np.float16 if result == "f16" else np.float32
            difference = added.view(view).astype(float) - plain.view(view).astype(float) - value
            assert np.abs(difference).max() < (0.05 if result == "f16" else 1e-5)


def test_a_predicate_that_only_the_run_knows():
    """scale-d from memory: the accumulator is added to in warpgroups whose first A register is odd."""
    case = Case(16, ("f16", "f16"), steps=1)
    set_up = "mov.b32 %r0, 128;\nsetp.ge.u32 %p0, %t, %r0;\n"
    begin = "".join(f"mov.b32 %f{k}, 0f40E00000;\n" for k in range(case.count))
    for name, add in (("%p0", (0, 7)), ("!%p0", (7, 0))):
        middle = f"{set_up}{begin}{FENCE}{case.product(0, name)}{COMMIT}{WAIT}"
        out = case.run(case.code(middle), block=256, asynchrony="late").view(np.float32)
        plain = case.run(block=256).view(np.float32)
        difference = out - plain
        assert np.allclose(difference[:128], add[0], atol=1e-5)
        assert np.allclose(difference[128:], add[1], atol=1e-5)




def spoil_tile(base: int) -> str:
    """PTX with which a warpgroup makes 8 KB of shared memory zero."""
    stores = [f"st.shared.v4.b32 [%s1+{2048 * k}], {{0, 0, 0, 0}};\n" for k in range(4)]
    return f"and.b32 %s1, %t, 127;\nmad.lo.u32 %s1, %s1, 16, {base};\n" + "".join(stores)


def test_late_products_read_late():
    """What is stored over A after the issue is what a late product multiplies; an eager one is done."""
    case = Case(16, ("f16", "f16"), steps=1)
    base = int(case.words[0][0]) << 4 & 0x3FFFF
    spoil = f"mad.lo.u32 %s1, %t, 16, {base};\nst.shared.v4.b32 [%s1], {{0, 0, 0, 0}};\n"
    spoil += "st.shared.v4.b32 [%s1+2048], {0, 0, 0, 0};\n" * 3
    spoil += "".join(f"st.shared.v4.b32 [%s1+{2048 * k}], {{0, 0, 0, 0}};\n" for k in range(4))
    middle = f"{FENCE}{case.product(0, '%no')}{COMMIT}{spoil}bar.sync 0;\n{WAIT}"
    code = case.code(middle)
    case.check(case.run(code))
    assert not case.run(code, asynchrony="late").any()
    with pytest.raises(DataRace, match="product reads|read of"):
        case.run(code, races=True)


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_a_wait_of_one_warpgroup_leaves_the_other_ones_products(schedule):
    """Both issue together; the first one waits, then A is made zero, then the second one waits."""
    case = Case(16, ("f16", "f16"), steps=1)
    base = int(case.words[0][0]) << 4 & 0x3FFFF
    middle = f"""
        {FENCE}{case.product(0, "%no")}{COMMIT}
        setp.ge.u32 %p1, %t, 128;
        @%p1 bra SECOND;
        {WAIT}
        {spoil_tile(base)}
        bar.sync 1, 256;
        bra BOTH;
        SECOND:
        bar.sync 1, 256;
        {WAIT}
        BOTH:
    """
    out = case.run(case.code(middle), block=256, asynchrony="late", schedule=schedule)
    case.check(out[:128])
    assert not out[128:].any()
    case.check(case.run(case.code(middle), block=256))


def test_groups_complete_in_order():
    """Two accumulators in two groups; waiting for the first leaves the second one's poison."""
    case = Case(16, ("f16", "f16"), steps=1)
    copies = "".join(f"mov.b32 %f{100 + k}, %f{k};\n" for k in range(8))
    products = f"{FENCE}{case.product(0, '%no')}{COMMIT}{case.product(0, '%no', 20)}{COMMIT}"
    middle = f"{products}wgmma.wait_group.sync.aligned 1;\n{copies}{WAIT}"
    case.check(case.run(case.code(middle), asynchrony="late"))
    for mode in ("eager", "late"):
        wrong = middle.replace(copies, copies.replace("%f0;", "%f20;"))
        with pytest.raises(RegisterInFlight, match="not been waited for"):
            case.run(case.code(wrong), asynchrony=mode)


def test_a_group_waits_for_what_is_added_to_later():
    """One accumulator, a group per product, and a wait for the first only: the sum is whole at the end."""
    case = Case(16, ("f16", "f16"), steps=3)
    products = "".join(case.product(k, "%yes" if k else "%no") + COMMIT for k in range(3))
    middle = f"{FENCE}{products}wgmma.wait_group.sync.aligned 2;\nwgmma.wait_group.sync.aligned 1;\n{WAIT}"
    for options in MODES:
        case.check(case.run(case.code(middle), **options))


# Mistakes. Each is tried eager and late, and must be seen in both.


@pytest.mark.parametrize("mode", ["eager", "late", "random"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((WAIT, ""), "touches a register of the product"),
        ((WAIT, "wgmma.wait_group.sync.aligned 1;\n"), "touches a register of the product"),
        ((COMMIT, ""), "touches a register of the product"),
        ((WAIT, f"mov.b32 %f3, 0;\n{WAIT}"), "touches a register of the product"),
        ((WAIT, f"add.f32 %f3, %f3, %f3;\n{WAIT}"), "touches a register of the product"),
        ((FENCE, ""), "something else used without a wgmma.fence since"),
        ((FENCE, f"mov.b32 %f3, 0;\n{FENCE}add.f32 %f9, %f3, %f3;\n"), "uses %f3, which something else used"),
        ((FENCE, f"{FENCE}mov.b32 %f3, 0;\n"), "uses %f3, which something else used without"),
    ],
)
def test_accumulator_mistakes(change, what, mode):
    case = Case(16, ("f16", "f16"))
    code = case.code()
    assert change[0] in code
    with pytest.raises(RegisterInFlight, match=what):
        case.run(code.replace(*change), asynchrony=mode)


@pytest.mark.parametrize("mode", ["eager", "late"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((WAIT, f"mov.b32 %a1, 0;\n{WAIT}"), "touches a register of the product"),
        ((WAIT, f"mov.b32 %r1, %a1;\n{WAIT}"), "touches a register of the product"),
        ((FENCE, f"{FENCE}add.u32 %a1, %a1, 0;\n"), "uses %a1, which something else used without"),
    ],
)
def test_mistakes_with_a_in_registers(change, what, mode):
    case = Case(16, ("f16", "f16"), in_registers=True)
    with pytest.raises(RegisterInFlight, match=what):
        case.run(case.code().replace(*change), asynchrony=mode)


def test_other_accumulators_that_overlap():
    case = Case(16, ("f16", "f16"))
    code = case.code().replace(case.product(1, "%yes"), case.product(1, "%yes", 4))
    with pytest.raises(RegisterInFlight, match="touches a register"):
        case.run(code)


def test_an_accumulator_as_the_next_a():
    case = Case(16, ("f16", "f16"), in_registers=True)
    code = case.code().replace(case.product(1, "%yes"), case.product(1, "%yes", 20).replace("%a4", "%f0"))
    with pytest.raises(RegisterInFlight, match="touches a register"):
        case.run(code)


def test_copies_between_fence_and_product_are_let_through():
    """A mov passes on what its source is: fenced stays fenced, written stays written."""
    case = Case(16, ("f16", "f16"), in_registers=True)
    copy = "mov.b32 %r3, %a1;\nmov.b32 %a1, %r3;\n"
    case.check(case.run(case.code().replace(FENCE, FENCE + copy)))
    late = copy.replace("mov.b32 %r3, %a1", "xor.b32 %r3, %a1, 0")
    with pytest.raises(RegisterInFlight, match="uses %a1"):
        case.run(case.code().replace(FENCE, FENCE + late))


def test_only_what_happens_is_refused():
    """A touch that a run never reaches is no mistake; where the branch is taken it is one."""
    case = Case(16, ("f16", "f16"))
    touch = "setp.eq.u32 %p1, %t, {};\n@%p1 add.f32 %f3, %f3, %f3;\n"
    case.check(case.run(case.code().replace(WAIT, touch.format(9999) + WAIT)))
    with pytest.raises(RegisterInFlight, match="warp 1"):
        case.run(case.code().replace(WAIT, touch.format(40) + WAIT))
    unfenced = "setp.eq.u32 %p1, %t, {};\n@%p1 mov.b32 %f3, 0;\n"
    case.check(case.run(case.code().replace(FENCE, FENCE + unfenced.format(9999))))
    with pytest.raises(RegisterInFlight, match="warp 1, lane 8"):
        case.run(case.code().replace(FENCE, FENCE + unfenced.format(40)))


def test_a_loop_that_waits_one_group_late():
    """The accumulators take turns: a wait for all but one group is enough for the other one."""
    case = Case(16, ("f16", "f16"), steps=1)
    one, two = case.product(0, "%no"), case.product(0, "%no", 20)
    add = "".join(f"add.f32 %f{40 + k}, %f{40 + k}, %f{{}};\n".replace("{}", f"{{{k}}}") for k in range(8))
    names = lambda first: add.format(*(first + k for k in range(8)))  # noqa: E731
    zero = "".join(f"mov.b32 %f{40 + k}, 0;\n" for k in range(8))
    keep_one = "wgmma.wait_group.sync.aligned 1;\n"
    middle = f"""
        mov.u32 %r0, 0;
        {zero}{FENCE}{one}{COMMIT}
        AGAIN:
        {FENCE}{two}{COMMIT}{keep_one}{names(0)}
        {FENCE}{one}{COMMIT}{keep_one}{names(20)}
        add.u32 %r0, %r0, 1;
        setp.lt.u32 %p1, %r0, 2;
        @%p1 bra AGAIN;
        {WAIT}
    """
    code = case.code(middle)
    exact, _ = case.exact()
    last = store(8).replace("%f", "%f4")
    for options in MODES:
        out = case.run(code.replace(store(8), last), **options).view(np.float32)
        assert np.allclose(out, 4 * registers_of(exact), atol=1e-3)
    with pytest.raises(RegisterInFlight):
        case.run(code.replace(names(0), names(20)))


def test_warpgroups_act_together():
    case = Case(16, ("f16", "f16"), steps=1)
    other = "setp.eq.u32 %p1, %w, 2;\n@%p1 add.s64 %db0, %db0, 64;\n"
    for schedule in ("lockstep", "random"):
        with pytest.raises(WarpgroupError, match="other descriptors or another scale"):
            case.run(case.code().replace(FENCE, other + FENCE), schedule=schedule)
    lane = "setp.eq.u32 %p1, %t, 40;\n@%p1 add.s64 %db0, %db0, 64;\n"
    with pytest.raises(WarpgroupError, match="lanes of one warp give different descriptors.*warp 1"):
        case.run(case.code().replace(FENCE, lane + FENCE))
    scale = "setp.lt.u32 %p1, %t, 64;\n"
    with pytest.raises(WarpgroupError, match="another scale"):
        case.run(case.code().replace(FENCE, scale + FENCE).replace("%no", "%p1"))


def test_part_of_a_warpgroup():
    case = Case(16, ("f16", "f16"), steps=1)
    leave = "setp.eq.u32 %p1, %w, 3;\n@%p1 bra DONE;\n"
    products = f"{FENCE}{case.product(0, '%no')}{COMMIT}"
    middle = f"{leave}{products}{WAIT}DONE:\n"
    with pytest.raises(Deadlock, match="the other warps of the warpgroup to commit"):
        case.run(case.code(middle).replace(store(8), ""))
    with pytest.raises(WarpgroupError, match="1 of 4 warps of warpgroup 0 .* exit without issuing"):
        case.run(case.code(middle.replace(WAIT, "")).replace(store(8), ""))
    elsewhere = leave.replace("DONE", "OTHER")
    elsewhere += f"{products}{WAIT}bra DONE;\nOTHER:{products}{WAIT}DONE:\n"
    with pytest.raises(WarpgroupError, match="issues the product of PTX line"):
        case.run(case.code(elsewhere).replace(store(8), ""))
    for block in (160, 224):
        with pytest.raises(WarpgroupError, match=f"{block // 32} warps leave this one without"):
            case.run(block=block)


def test_operands_must_be_there():
    case = Case(16, ("f16", "f16"), steps=1)
    word = case.words[1][0]
    for wrong, error, what in (
        (word + 128, UninitializedRead, "of an operand was never written"),
        (word | 0x3FC0, OutOfBounds, "an operand's bytes at shared"),
        (word + 8, UnmodelledInstruction, "starts in row 1 of its pattern"),
    ):
        with pytest.raises(error, match=f"{what}.*warp 0.*\n.*PTX line|{what}.*\n.*PTX line"):
            case.run(case.code().replace(f"mov.b64 %db0, {word};", f"mov.b64 %db0, {wrong};"))


def test_stores_need_a_proxy_fence_before_products():
    case = Case(16, ("f16", "f16"), steps=1)
    code = case.code()
    case.check(case.run(code, races=True))
    with pytest.raises(DataRace):
        case.run(code.replace("fence.proxy.async.shared::cta;", ""), races=True)
    with pytest.raises(DataRace):
        case.run(code.replace("bar.sync 0;", ""), races=True)


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("m64n16k16", "m64n12k16", "m64n8k16"),
        ("m64n16k16", "m64n16k32", "m64n16k32.f32.f16.f16"),
        ("f32.f16.f16", "f32.f16.bf16", "f32.f16.bf16"),
        ("f32.f16.f16", "f32.e4m3.f16", "f32.e4m3.f16"),
        ("f32.f16.f16", "s32.s8.s8", ".s32"),
        (", 1, 1, 0, 0;", ", 2, 1, 0, 0;", "scale-a, scale-b"),
        (", 1, 1, 0, 0;", ", 1, 1, 0, 2;", "trans-a, trans-b"),
        (", 1, 1, 0, 0;", ", 1, 1;", "trans-a, trans-b"),
        ("%f7}", "%f7, %f8}", "9 accumulator registers"),
        ("%f7}", "%f6}", "names a register twice"),
    ],
)
def test_forms_without_a_model(before, after, what):
    code = Case(16, ("f16", "f16"), steps=1).code()
    assert before in code
    with pytest.raises(UnmodelledInstruction, match=what):
        Program(module(HEAD + code.replace(before, after), PARAMS, "sm_90a"))

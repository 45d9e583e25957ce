"""What `python -m profiling static` and `cycles` read from machine code and the emulator, without a GPU.

The golden file says what each followed kernel's registers, spills and hot loop were. When a change of the
kernels or of the compiler moves them on purpose, look at the difference and write the file anew:

    python -m profiling static --golden
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("nvidia.cu13", reason="cuobjdump and nvdisasm come with NVIDIA's packages on PyPI")

from cute_flash import emulator
from profiling import __main__ as command
from profiling import cycles, cycles_table, flash_attn_4, rates, sass, static, watch

A100 = static.EMULATED["sm80"]
GOLDEN = json.loads(static.GOLDEN.read_text())


FOLLOWED = static.followed()


@pytest.mark.parametrize("key", FOLLOWED)
def test_golden(key):
    assert key in GOLDEN["rows"], "a new kernel: python -m profiling static --golden"
    found = static.moves(GOLDEN["rows"][key], static.figures(*FOLLOWED[key]))
    hint = f"made with {GOLDEN['versions']}; on purpose? python -m profiling static --golden"
    assert not found, "\n".join([*found, hint])


def test_golden_follows_what_it_should():
    assert set(GOLDEN["rows"]) == set(FOLLOWED)


@pytest.mark.parametrize(
    "name, change, noticed",
    [
        ("stack", lambda row: row.update(stack=row["stack"] + 8), True),
        ("moved", lambda row: row.update(moved=[24, 240]), True),
        ("registers", lambda row: row.update(registers=row["registers"] - 8), True),
        ("registers", lambda row: row.update(registers=row["registers"] - 1), False),
        ("config", lambda row: row.update(config="tile_m=16"), True),
        ("local", lambda row: row["loops"][0].update(local=row["loops"][0]["local"] + 1), True),
        ("mma", lambda row: row["loops"][0].update(mma=row["loops"][0]["mma"] * 2), True),
        ("fp32", lambda row: row["loops"][0].update(fp32=round(row["loops"][0]["fp32"] * 1.04)), True),
        ("fp32", lambda row: row["loops"][0].update(fp32=round(row["loops"][0]["fp32"] * 0.96)), True),
        ("fp32", lambda row: row["loops"][0].update(fp32=round(row["loops"][0]["fp32"] * 1.02)), False),
        ("hot loops", lambda row: row["loops"].append(row["loops"][0]), True),
    ],
)
def test_moves_are_noticed(name, change, noticed):
    was = GOLDEN["rows"]["sm80/d64/sm80.forward"]
    now = copy.deepcopy(was)
    change(now)
    found = static.moves(was, static.Figures.of(now))
    assert len(found) == noticed
    assert not noticed or name in found[0]


# A nest of two loops; the inner one waits on a barrier whose slow path the compiler put behind the end.
NEST = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   STG.E [R2], R4 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00d0*/               @P0 BRA `(.L_x_2) ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4) ;
"""


def test_loops_are_natural_loops():
    wait, inner, outer = sass.loops(NEST)
    assert wait.counts == {"barrier": 1, "control": 2}
    assert inner.counts == {"mma": 1, "mufu": 1, "barrier": 2, "control": 4}
    assert outer.size == inner.size + 4
    assert outer.counts["mma"] == 3 and outer.counts["global"] == 0
    assert sass.hottest([wait, inner, outer], "mma") is inner
    assert inner.flops == 2 * 16 * 8 * 16


def test_the_loop_that_does_not_mask_may_have_fewer_exponentials():
    """What it computes by other instructions still leaves it the steady loop; a loop with a few is none."""
    steady = sass.Loop(frozenset(range(6)), ("MUFU.EX2",) * 2 + ("FFMA2",) * 4)
    masked = sass.Loop(frozenset(range(10, 20)), ("MUFU.EX2",) * 4 + ("SEL",) * 6)
    last = sass.Loop(frozenset(range(30, 33)), ("MUFU.LG2", "FMUL", "STG"))
    assert sass.hottest([last, masked, steady], "mufu") is masked
    assert sass.hottest([last, masked, steady], "mufu", least=0.5) is steady
    assert sass.hottest([last, masked, steady], "mufu", least=0.25) is last
    bits = sass.Loop(frozenset(range(40, 45)), ("MUFU.EX2",) * 4 + ("R2P",))
    assert sass.hottest([bits, steady], "mufu", least=0.5) is steady


def test_what_is_seldom_due_is_no_hot_loop():
    """Nor a part of the one around it: a loop with less than half of its exponentials."""
    seldom = sass.Loop(frozenset((4, 5)), ("MUFU.EX2", "BRA"))
    steady = sass.Loop(frozenset(range(8)), (*("MUFU.EX2",) * 4, *seldom.opcodes, "FFMA", "BRA"))
    often = sass.Loop(frozenset(range(3)), ("MUFU.EX2",) * 3)
    assert sass.hottest([seldom, steady], "mufu", least=0.25) is steady
    assert steady.alone([seldom, steady]).counts == {"mufu": 4, "fp32": 1, "control": 1}
    assert sass.hottest([often, steady], "mufu") is often


def test_without_a_matrix_instruction_there_is_no_hot_loop():
    with pytest.raises(ValueError, match="class mma"):
        sass.hottest(sass.loops(NEST.replace("HMMA.16816.F32.BF16", "FFMA")), "mma")


def test_what_transposes_is_a_loop_of_its_own():
    """Its slots count, and conversions to 8 bits take as long as somebody measured."""
    moved = NEST.replace("HMMA.16816.F32.BF16", "LDSM.16.MT88.4").replace("MUFU.EX2", "STSM.16.M88.4")
    (inner,) = sass.transposing(moved)
    assert inner.counts["shared"] == 2 and sass.transposing(NEST) == ()
    assert cycles.narrows("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C") and not cycles.narrows("F2FP.BF16.F32")
    assert cycles._times(inner, (inner,), Counter(shared=4)) == 2
    cost = cycles.Cost(2.0**20, False, 0.0, 0.0, 128.0, 0.0, 0.0, narrowed=64.0, bits=8)
    b200, gb300 = (cost.cycles(rates.GPUS[name]) for name in ("B200", "GB300"))
    assert b200["matrix"] == 64 and (b200["alu"], gb300["alu"]) == (2, 3)


def test_a_switch_has_all_its_targets():
    text = NEST.replace("MOV R1, c[0x0][0x28]", 'BRX R4 -0xa40 (*"BRANCH_TARGETS .L_x_0,.L_x_2"*)')
    assert sass.parse(text)[0].next(0) == (1, 5)
    assert not [loop for loop in sass.loops(text) if loop.counts["mma"] == 1], "entered in two places"


@pytest.mark.parametrize(
    "opcode, kind, flops",
    [
        ("HMMA.16816.F32.BF16", "mma", 4096), ("HGMMA.64x128x16.F32.BF16", "mma", 65536),
        ("UTCHMMA", "mma", 0), ("MUFU.EX2", "mufu", 0), ("FFMA2", "fp32", 0), ("FMNMX", "fp32", 0),
        ("F2FP.BF16.F32.PACK_AB", "conversion", 0),
        ("LDSM.16.MT88.4", "shared", 0), ("LDGSTS.E.BYPASS.128", "copy", 0), ("BAR.SYNC", "barrier", 0),
        ("STL.64", "local", 0), ("UIADD3", "integer", 0), ("BRA", "control", 0), ("SHFL.BFLY", "shuffle", 0),
    ],
)  # fmt: skip
def test_opcodes(opcode, kind, flops):
    assert (sass.classify(opcode), sass.matrix_flops(opcode)) == (kind, flops)


@pytest.mark.parametrize("opcode, size", [("LDL", 4), ("STL.64", 8), ("LDL.LU.128", 16), ("LDS.128", 0)])
def test_bytes_of_spills(opcode, size):
    assert sass.local_bytes(opcode) == size


def test_spills_are_seen():
    from tests.spilling_kernel import compile_for

    cubin = compile_for("sm_80")
    assert sass.resources(cubin).stack > 0
    opcodes = Counter(sass.classify(i.opcode) for i in sass.parse(sass.disassembly(cubin)))
    assert opcodes["local"] > 0


def test_the_cubin_inside_an_object():
    from cute_flash import executable

    (answer,) = static.CASES["d64"].answers(A100)
    built = executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    assert sass.embedded_cubin(built.object).rstrip(b"\0") == built.cubin.rstrip(b"\0")
    with pytest.raises(ValueError, match="found 0"):
        sass.embedded_cubin(built.object.replace(b"\x7fELF\x02\x01", b"\x7fELF\x01\x01"))


@pytest.mark.parametrize(
    "capability, threads, registers, shared_memory, ctas, bound",
    [
        ((8, 0), 128, 255, 48 << 10, 2, "registers"),
        ((8, 0), 128, 128, 48 << 10, 3, "shared memory"),
        ((8, 0), 128, 128, 163 << 10, 1, "shared memory"),
        ((8, 6), 128, 168, 96 << 10, 1, "shared memory"),
        ((8, 6), 256, 32, 0, 6, "warps"),
        ((9, 0), 384, 168, 164 << 10, 1, "registers"),
        ((9, 0), 32, 32, 0, 32, "CTAs"),
        ((9, 0), 32, 96, 0, 20, "registers"),
        ((12, 0), 128, 255, 64 << 10, 1, "shared memory"),
    ],
)
def test_occupancy(capability, threads, registers, shared_memory, ctas, bound):
    assert rates.occupancy(capability, threads, registers, shared_memory) == rates.Occupancy(ctas, bound)


@pytest.mark.parametrize(
    "gpu, peak", [("A100", 312e12), ("H100", 989e12), ("H200", 989e12), ("B200", 2250e12), ("GB300", 2500e12)]
)
def test_rates_give_the_data_sheets_peak(gpu, peak):
    assert rates.GPUS[gpu].peak == pytest.approx(peak, rel=0.005)


def test_every_emulated_device_has_limits():
    assert {device.capability for device in static.EMULATED.values()} <= set(rates.LIMITS)
    assert rates.GPUS["GB300"].device.target == "sm_103a"


@pytest.mark.parametrize("emulated", static.EMULATED)
def test_every_config_of_the_tuning_tables_has_a_case(emulated, monkeypatch):
    assert static.unreached(emulated) == []
    monkeypatch.setattr(static, "CASES", {})
    assert static.unreached(emulated) != []


@pytest.mark.parametrize("what", ["static", "cycles"])
def test_unknown_cases_are_told_what_there_is(what, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([what, "--case", "d63"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "d63" in told and "d64_causal" in told


@pytest.mark.parametrize("what", ["static", "cycles"])
def test_a_missing_tool_is_named(what, monkeypatch, capsys):
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command.main([what])
    assert stopped.value.code == 2
    assert "pip install nvidia-cuda-cuobjdump" in capsys.readouterr().err


def test_a_missing_peer_is_named(monkeypatch):
    def none() -> str:
        raise flash_attn_4.Missing("not installed")

    monkeypatch.setattr(flash_attn_4, "version", none)
    mine, peer = static.survey(["sm80"], ["d64"], peer=True)
    assert mine.kernel == "sm80.forward"
    assert peer == static.Absent("sm80", "d64", "flash-attn-4", "", "not installed")


@pytest.fixture(scope="module")
def tile() -> cycles.Tile:
    case = static.CASES["d64"]
    return cycles.ours(case, case.answers(A100)[0], "sm80")


def test_a_tile_costs_what_the_algorithm_says(tile):
    elements = tile.tile_m * tile.tile_n
    assert tile.kinds["flops"] == 2 * elements * (64 + 64)
    # One exponential per score, and at most one per row and lane for rescaling: four lanes share a row.
    assert elements <= tile.kinds["mufu"] * 32 <= elements + 4 * tile.tile_m
    assert tile.kinds["copy"] * 32 * 16 == 2 * tile.tile_n * (64 + 64)
    # K and V are copied in once and read by every warp; Q is read by the warp whose it is.
    warps, keys_and_values = len(tile.totals.opcodes), 2 * tile.tile_n * (64 + 64)
    config = static.CASES["d64"].answers(A100)[0].config
    queries = 0 if config.q_in_registers else 2 * tile.tile_m * 64
    assert tile.totals.shared_bytes == keys_and_values * (1 + warps) + queries
    assert tile.totals.wavefronts <= 1.01 * tile.totals.ideal, "bank conflicts"
    assert sum(count for count, _ in tile.totals.roles.values()) == len(tile.totals.opcodes)


def test_bounds(tile):
    gpu, cost = rates.GPUS["A100"], tile.cost
    clocks = cost.cycles(gpu)
    assert clocks["matrix"] == tile.kinds["flops"] / 2048
    assert clocks["shared"] == tile.totals.wavefronts + tile.local / 128
    assert replace(tile, local=tile.local + 1280).cost.cycles(gpu)["shared"] == clocks["shared"] + 10
    binds, ceiling, in_turn = cost.ceilings(gpu)
    assert clocks[binds] == max(clocks.values())
    assert in_turn < ceiling <= gpu.peak / 1e12 * 1.0001
    starved = replace(gpu, mufu=1)
    assert cost.ceilings(starved)[0] == "mufu"
    assert cost.ceilings(starved)[1] < ceiling


def watching(grid: int = 1, ctas: int = 1) -> tuple[cycles.Watch, SimpleNamespace]:
    """A watch that has seen CTAs of one warp begin, and the machine that it looks at."""
    step = SimpleNamespace(where=SimpleNamespace(line=7), instructions=[])
    launch = SimpleNamespace(grid=(grid, 1, 1))
    m = SimpleNamespace(at=0, code=SimpleNamespace(steps=[step]), launch=launch, ctas=ctas, warps=1)
    watch = cycles.Watch()
    watch.begin(m)
    return watch, m


def test_bank_conflicts_are_counted():
    watch, m = watching()
    g = SimpleNamespace(slot=np.zeros(32, int), lane=np.arange(32))
    watch.shared_read(m, g, np.arange(32) * 4, 4)
    assert (watch.totals().wavefronts, watch.totals().ideal) == (1, 1)
    watch.shared_read(m, g, np.arange(32) * 128, 4)
    assert (watch.totals().wavefronts, watch.totals().ideal, watch.totals().shared_bytes) == (33, 2, 256)


def test_loads_of_one_place_are_told_apart():
    """Of 16 bytes, by all lanes of a warp; counted as four accesses as long as nobody says otherwise."""
    watched, m = watching()
    g = SimpleNamespace(slot=np.repeat(np.arange(2), 32), lane=np.tile(np.arange(32), 2))
    watched.shared_read(m, g, np.repeat([64, 80], 32), 16)
    assert (watched.totals().uniform, watched.totals().wavefronts) == (2, 8)
    for address, size in ((np.repeat([64, 80], 32), 8), (np.arange(64) * 16, 16)):
        watched.shared_read(m, g, address, size)
    watched.shared_read(m, SimpleNamespace(slot=g.slot[:9], lane=g.lane[:9]), np.repeat(64, 9), 16)
    assert watched.totals().uniform == 2


def test_a_steady_tile_under_a_causal_mask_is_one_that_it_leaves_whole():
    """A pair of CTAs with 128 keys each, tiles of 64 rows: whole ones cost 7, other work whatever it does."""
    def run(rows: int, keys: int) -> SimpleNamespace:
        pairs = keys // 256
        assert rows == keys
        whole = sum(256 // 64 * 2 * before for before in range(pairs))
        total = cycles.Totals((Counter(),), 7.0 * whole + 1000 * pairs, 0.0, 0.0)
        ctas = 2 * pairs
        return SimpleNamespace(ctas=ctas, totals=lambda: total.times(1 / ctas))

    shape, steady = cycles.steady_of(static.CASES["d128_causal_backward"], (64, 256), run)
    assert shape == (64, 128) and steady.wavefronts == pytest.approx(7)


def test_what_a_warpgroup_reads_together_counts_once_and_per_cta():
    watch, m = watching(grid=2, ctas=2)
    g = SimpleNamespace(warp_at=np.zeros(0, int))
    for cta in range(2):
        unit = SimpleNamespace(name="products", number=0)
        for warp in range(4):
            watch.async_read(m, unit, cta, np.arange(8) * 16, 16)
            watch.async_read(m, unit, cta, 1024 + 256 * warp + np.arange(16) * 16, 16)
    watch.step(m, g)
    assert watch.totals().shared_bytes == 128 + 1024 and watch.totals().wavefronts == 9
    watch.async_write(m, None, None, SimpleNamespace(size=512))
    assert watch.totals().shared_bytes == 128 + 1024 + 256
    watch.async_read(m, SimpleNamespace(name="bulk", number=0), 0, np.arange(16) * 16, 16)
    assert watch.totals().parts == {"operands": 9, "copied in": 2, "copied out": 1}
    watch.shared_read(m, SimpleNamespace(slot=np.zeros(32, int), lane=np.arange(32)), np.arange(32) * 4, 4)
    assert watch.totals().parts["warps"] == 0.5 and watch.totals().wavefronts == 12.5
    with pytest.raises(ValueError, match="the grid is"):
        watching(grid=2, ctas=1)


def test_copies_between_ctas_are_read_and_written():
    """From global memory only written."""
    watch, m = watching()
    for places, parts in ((2, {"copied in": 4}), (0, {"copied in": 8, "copied out": 4})):
        watch.async_write(m, None, None, SimpleNamespace(size=512))
        watch.bulk_read(m, None, None, SimpleNamespace(address=np.zeros(places), nbytes=256))
        assert watch.totals().parts == parts


def test_sums_in_global_memory_are_counted():
    """By warps or by bulk reductions; other stores, and whole numbers, are none."""
    watch, m = watching()
    numbers = np.zeros((32, 4), np.uint32)
    sums, stores = SimpleNamespace(sums=True), SimpleNamespace(sums=False)
    for order in (sums, stores):
        watch.global_write(m, None, None, numbers, order)
        watch.bulk_write(m, None, SimpleNamespace(address=np.zeros(3), nbytes=256), order)
    assert watch.totals().reduced == 32 * 16 + 3 * 256


def test_sums_bind_where_their_rate_is_known():
    cost = cycles.Cost(4096.0, False, 0.0, 0.0, 0.0, 0.0, 128.0, reduced=100 * rates.GPUS["H200"].sums)
    assert cost.ceilings(rates.GPUS["H200"])[0] == "sums"
    assert cost.cycles(rates.GPUS["H200"])["sums"] == pytest.approx(100)
    assert cost.ceilings(rates.GPUS["A100"])[0] == "matrix"


def test_warpgroups_with_loops_of_their_own():
    """One of the two also has dQ: as many warps pass each loop."""
    both, one = (
        sass.Loop(frozenset(range(n)), ("HGMMA.64x64x16.F32",) * n + ("MUFU.EX2",) * 32) for n in (18, 12)
    )
    warp = {n: Counter({"wgmma.mma_async.sync.aligned.m64n64k16.f32": n, "ex2.approx": 32}) for n in (18, 12)}
    totals = cycles.Totals((*[warp[18]] * 4, *[warp[12]] * 4), 1.0, 1.0, 128.0)
    found = cycles.tile("x", (64, 128), static.CASES["d96_backward"], totals, (both, one))
    assert found.issue == 4 * (both.size + one.size)


def test_bytes_of_no_meaning_are_defined():
    """Of a prmt alone, and only in registers that nothing else names."""
    packed = "\tprmt.b32 \t%r3, %r1, %r2, 0x3340U;\n"
    defined = flash_attn_4.defined(packed + "\tmov.b32 \t%r1, 7;\n\tadd.s32 \t%r4, %r9, %r9;\n")
    assert defined == "\tmov.b32 %r2, 0; " + packed[1:] + "\tmov.b32 \t%r1, 7;\n\tadd.s32 \t%r4, %r9, %r9;\n"


def test_a_loop_that_is_not_the_steady_one_is_refused(tile):
    opcodes = tuple(
        Counter({name: count * (1 + 0.1 * name.startswith("ex2")) for name, count in warp.items()})
        for warp in tile.totals.opcodes
    )
    loops = (sass.Loop(frozenset(range(9)), ("HMMA.16816.F32.BF16",) * 8 + ("MUFU.EX2",) * 4 + ("FFMA",)),)
    flops, mufu = tile.kinds["flops"], tile.kinds["mufu"]
    fitting = (replace(loops[0], opcodes=("HMMA.16816.F32",) * int(flops / 4096) + ("MUFU",) * int(mufu)),)
    case = static.CASES["d64"]
    assert cycles.tile("x", (1, 1), case, tile.totals, fitting).fma == 0
    with pytest.raises(ValueError, match="exponentials"):
        cycles.tile("x", (1, 1), case, replace(tile.totals, opcodes=opcodes), fitting)
    with pytest.raises(ValueError, match="exponentials"):
        cycles.tile("x", (1, 1), case, tile.totals, loops)


def test_matrix_instructions_that_do_not_tell_their_shape_are_counted_by_the_algorithm():
    """Of Blackwell: products by one warp, exponentials by another; each loop counts by what it has."""
    products = Counter({"tcgen05.mma.cta_group::1.kind::f16": 16.0})
    softmax = Counter({"ex2.approx.ftz.f32": 512.0})
    loops = (
        sass.Loop(frozenset(), ("UTCHMMA",) * 8 + ("UIADD3",)),
        sass.Loop(frozenset(), ("MUFU.EX2",) * 128 + ("FFMA2",) * 64),
    )
    totals = cycles.Totals((products, softmax), 1.0, 1.0, 128.0)
    found = cycles.tile("x", (128, 128), static.CASES["d64"], totals, loops)
    assert found.cost.flops == 2 * 128 * 128 * 128 and not found.cost.mma_sync
    assert found.fma == 2 * 64 * 4 * 32 and found.issue == 2 * 9 + 4 * 192
    with pytest.raises(ValueError, match="does not tell its shape"):
        watch.matrix_flops("mma.sync.aligned.row.col")


def test_what_the_emulator_cannot_run_is_not_yet_there():
    what = cycles.NotYet("d64", "sm_90a", "peer", "")

    def stops(error):
        def make():
            raise error
        return cycles.counted(what, "", make)

    assert stops(emulator.UnmodelledInstruction("new.thing")).reason == (
        "not yet: the emulator cannot run it (new.thing)"
    )
    assert stops(emulator.Deadlock("nobody\nmore")).reason == "stopped by the emulator: nobody"
    assert stops(flash_attn_4.Missing("why")).reason == "missing, why"
    (line,) = cycles_table.lines(stops(NotImplementedError("no\n kernel")), ["H200"])
    assert line == "d64 on sm_90a, peer: no kernel"


def test_measurements_stand_beside(monkeypatch, tmp_path):
    def report(name: str, started: str, dry_run: bool, tflops: float) -> None:
        shape = {"head_dim": 64, "head_dim_v": 64, "causal": False, "seqlen": 8192}
        peers = {"cute_flash": {"tflops": tflops, "kernel": "a"}, "flash-attn-4": {"state": "missing"}}
        row = {"kind": "row", "key": "d64-full-s8192", "state": "ok", "shape": shape, "peers": peers}
        ours = {"cute_flash": {"tflops": 1.0, "kernel": "a"}}
        shorter = {**row, "shape": {**shape, "seqlen": 512}, "peers": ours}
        backward = {**row, "shape": {**shape, "seqlen": 16384, "backward": True}}
        data = {"format": 1, "started": started, "machine": "NVIDIA H200", "dry_run": dry_run,
                "stages": {"speed": {"rows": [row, shorter, backward]}}}  # fmt: skip
        (tmp_path / f"{started}-{name}.json").write_text(json.dumps(data))

    reports = cycles_table.record.reports
    monkeypatch.setattr(cycles_table.record, "reports", lambda: reports(tmp_path))
    counted = [row for row in cycles_table.read() if isinstance(row, cycles.Row)]
    row = replace(next(row for row in counted if row.case == "d64"), kernel="a")
    assert cycles_table.measured(row, "H200") == "–"
    report("old", "2026-01-01", False, 100.0)
    report("new", "2026-02-01", False, 200.0)
    report("dry", "2026-03-01", True, 300.0)
    assert cycles_table.measured(row, "H200") == "200 (d64-full-s8192)"
    assert cycles_table.measured(row, "A100") == "–"
    for change in ({"kernel": "b"}, {"case": "d64_causal"}, {"kernel": "flash-attn-4 4"}):
        assert cycles_table.measured(replace(row, **change), "H200") == "–"

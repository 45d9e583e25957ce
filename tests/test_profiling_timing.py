"""The timing model of `profiling/timing`: its decoder, its machine on cases with known answers, one kernel.

The decoder is held to what nvdisasm itself prints; the machine to sums that can be done by hand.
"""

from __future__ import annotations

import dataclasses
import math
from xml.etree import ElementTree

import pytest

pytest.importorskip("nvidia.cu13", reason="nvdisasm comes with NVIDIA's packages on PyPI")

from profiling import rates, static
from profiling.timing import (
    backward,
    constants,
    decode,
    grid,
    kept,
    match,
    predict,
    published,
    simulate,
    subjects,
    timeline,
    validate,
    words,
)
from profiling.timing.costs import UNITS, cost
from profiling.timing.joins import Join
from profiling.timing.machine import Machine
from profiling.timing.trace import Event

H200 = constants.of("H200")


# Constants.


def test_constants_say_where_they_are_from():
    for it in constants.constants():
        assert it.unit and it.source and it.method, it.name
        assert it.confidence in constants.CONFIDENCE, it.name


@pytest.mark.parametrize("gpu", rates.GPUS)
def test_constants_agree_with_the_bounds(gpu):
    chip, told = constants.of(gpu), rates.GPUS[gpu]
    assert (chip.sms, chip.matrix_flops, chip.shared_bytes) == (told.sms, told.matrix, told.shared)
    lanes = rates.WARP * rates.PARTITIONS
    assert lanes / chip.exp_interval == told.mufu
    assert lanes / chip.fma_interval == told.fma


def test_no_such_gpu():
    with pytest.raises(KeyError, match="V100"):
        constants.of("V100")


# The decoder.


@pytest.fixture(scope="module", params=["sm80", "sm90", "sm100"])
def lines(request) -> list[decode.Line]:
    answer = static.CASES["d128"].answers(static.EMULATED[request.param])[0]
    built = static.executable.artifact(answer.kernel, answer.problem, answer.config, answer.device)
    return decode.decode(built.cubin)


def test_reuse_bits_are_those_that_nvdisasm_prints(lines):
    told = [line.operands.count(".reuse") for line in lines]
    assert [line.control.reuse.bit_count() for line in lines] == told
    assert sum(told) > 100


def test_kept_operands_are_for_the_next_instruction_of_the_same_warp(lines):
    assert not [line for line in lines if line.control.reuse and line.control.yields]
    assert any(line.control.yields for line in lines)


def test_scoreboards_are_of_what_has_no_fixed_latency(lines):
    fixed = [line for line in lines if line.name in ("FFMA", "FMUL", "FADD", "FSEL", "IADD3", "LOP3", "F2FP")]
    assert len(fixed) > 200 and all(line.control.result is None for line in fixed)
    slow = [line for line in lines if line.name in ("MUFU", "LDSM", "LDS", "SHFL", "LDTM", "LDG")]
    released = {line.control.result for line in slow} - {None}
    assert released and released <= {number for line in lines for number in line.control.waits}


def test_fixed_latency_is_in_the_stall_counts(lines):
    """An instruction does not read what the one before computes sooner than 4 clocks later."""
    seen = 0
    for first, second in zip(lines, lines[1:], strict=False):
        if first.name in ("FFMA", "FMUL", "FADD", "FMNMX", "IADD3", "IMAD", "LOP3") and not first.guard:
            read = [part.strip(" -|").split(".")[0] for part in second.operands.split(",")[1:]]
            if first.operands.split(",")[0] in read:
                assert first.control.stall >= 4, f"{first}; {second}"
                seen += 1
    assert seen > 10


def test_encodings_are_needed():
    with pytest.raises(ValueError, match="upper halves"):
        decode.read("        /*0000*/                   EXIT ;\n")


# The machine.


def step(opcode: str, operands: str = "", event: Event | None = None, jumps: bool = False, **control):
    """One instruction of a program. control: fields of Control that differ from a stall of one clock."""
    told = {"stall": 1, "yields": False, "result": None, "sources": None, "waits": (), "reuse": 0} | control
    line = decode.Line(0, opcode, "", operands, (), (1,), decode.Control(**told))
    return cost(line, H200), event, jumps


def event(word: str, joins=(), until=None, **more) -> Event:
    return Event(word, [0] * len(words.SHAPES), list(joins), until, **more)


def clocks(*warps, joined=None, places=None) -> float:
    """What programs take on one SM. places: numbers of the warps, which say whose scheduler they have."""
    numbers = places or range(len(warps))
    filled = {(0, number): [step("EXIT")] for number in range(max(numbers))}
    filled |= {(0, number): [*warp, step("EXIT")] for number, warp in zip(numbers, warps, strict=True)}
    return Machine(H200, dict(sorted(filled.items())), joined or {}).run()


FFMA, CHAINED = step("FFMA"), step("FFMA", stall=4)


def test_chain_of_ffma():
    assert clocks([CHAINED] * 100) == pytest.approx(400, abs=3)


def test_two_warps_share_a_scheduler():
    alone, together = clocks([FFMA] * 100), clocks([FFMA] * 100, [FFMA] * 100, places=(0, 4))
    apart = clocks([FFMA] * 100, [FFMA] * 100)
    assert alone == apart == pytest.approx(100, abs=3)
    assert together == pytest.approx(200, abs=3)
    assert clocks([CHAINED] * 100, [CHAINED] * 100, places=(0, 4)) == pytest.approx(400, abs=5)


def test_exponentials():
    """16 lanes a clock and SM: 8 clocks a warp instruction; a chain waits 18.9 for each."""
    free, chained = step("MUFU.EX2", result=0), step("MUFU.EX2", result=0, waits=(0,))
    assert clocks([free] * 64) == pytest.approx(512, abs=24)
    assert clocks(*[[free] * 64] * 4) == pytest.approx(512, abs=24)
    assert clocks(*[[free] * 64] * 2, places=(0, 4)) == pytest.approx(1024, abs=24)
    assert clocks([chained] * 64) == pytest.approx(64 * 18.9, rel=0.06)


def test_exponentials_beside_products():
    """A unit that is busy does not hold back another warp. One that never has to wait keeps its scheduler."""
    exponentials = [step("MUFU.EX2")] * 50
    waiting, rushing = [step("FFMA", stall=2)] * 200, [FFMA] * 300
    assert clocks(waiting, exponentials, places=(0, 4)) == pytest.approx(400, rel=0.05)
    assert clocks(rushing, exponentials, places=(0, 4)) == pytest.approx(300 + 400, rel=0.05)


def test_a_warp_yields():
    """Without a yield one warp goes on; with it the other one has its turn."""
    yielding = step("FFMA", yields=True)
    for kind, first_ends in ((FFMA, 100), (yielding, 200)):
        programs = {(0, number): [step("EXIT")] for number in range(4)}
        programs |= {(0, 0): [kind] * 100, (0, 4): [kind] * 100}
        machine = Machine(H200, dict(sorted(programs.items())), {})
        machine.run()
        ended = min(warp.ended for warp in machine.warps if len(warp.steps) > 1)
        assert ended == pytest.approx(first_ends, abs=4)


def test_shared_memory_moves_128_bytes_a_clock():
    load = step("LDSM.16.M88.4")
    assert clocks(*[[load] * 64] * 4) == pytest.approx(4 * 64 * 4, rel=0.1)
    assert clocks(*[[step("LDS")] * 64] * 4) == pytest.approx(4 * 64, rel=0.1)


def hgmma(closes: bool, n: int = 128):
    return step(f"HGMMA.64x{n}x16.F32.BF16", "R24, gdesc[UR8], R24" + ", gsb0" * closes)


WAIT = step("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
TIME = 2 * 64 * 128 * 16 / (H200.matrix_flops * H200.wgmma_reached)


def test_dependent_products_pay_the_tail_each_time():
    chain = clocks(*[[hgmma(True), WAIT] * 20] * 4)
    assert chain == pytest.approx(20 * (TIME + H200.wgmma_tail), rel=0.05)


def test_products_in_a_row_pay_it_once():
    groups = clocks(*[[hgmma(True)] * 20 + [WAIT]] * 4)
    one = clocks(*[[hgmma(i == 19) for i in range(20)] + [WAIT]] * 4)
    assert groups == pytest.approx(20 * TIME + H200.wgmma_tail, rel=0.05)
    assert one == pytest.approx(groups, rel=0.01)


def test_a_product_starts_with_its_fourth_warp():
    late = [CHAINED] * 100
    group = [hgmma(True), WAIT]
    assert clocks(group, group, group, late + group) == pytest.approx(400 + TIME + H200.wgmma_tail, abs=8)


def test_ping_pong_of_two_warpgroups():
    """Exponentials of one warpgroup under the products of the other: the longer of the two decides.

    One warpgroup alone takes the sum. A turn is 8 products of 64 clocks; exponentials of 60 instructions
    take 480.
    """
    turns, exponentials = 12, [step("MUFU.EX2", result=0)] * 60
    products = [hgmma(i == 7) for i in range(8)]

    def warp(mine: int, number: int) -> list:
        program = []
        for turn in range(turns):
            begin = ("named", 0, mine, turn)
            program.append(step("BAR.SYNC", event=event("sync", [begin], begin)))
            program += products
            other = ("named", 0, 1 - mine, turn + mine)
            program.append(step("BAR.ARV", event=event("signal", [other])))
            program += [WAIT, *exponentials]
        return program

    # The first turn of the first warpgroup is free; afterwards the other one lets it in.
    joined = {("named", 0, who, turn): 8 for who in (0, 1) for turn in range(turns + 1)}
    joined[("named", 0, 0, 0)] = 4
    taken = clocks(*[warp(number // 4, number) for number in range(8)], joined=joined)
    lone = clocks(*[[*products, WAIT, *exponentials] * turns] * 4)
    each = 8 * TIME
    assert lone == pytest.approx(turns * (each + H200.wgmma_tail + 480), rel=0.05)
    assert taken == pytest.approx(2 * turns * each + 480, rel=0.15)
    assert taken < 1.2 * lone


def test_pipeline_of_copies():
    """One stage: latency, transfer and use of every tile add up. Enough stages: the slowest decides."""
    nbytes, use, tiles = 16384, 300, 40

    def taken(stages: int) -> float:
        producer, consumer, joined = [], [], {}
        for tile in range(tiles):
            place, turn = tile % stages, tile // stages
            full, empty = ("mbarrier", 0, place, turn), ("mbarrier", 0, 100 + place, turn)
            before = ("mbarrier", 0, 100 + place, turn - 1)
            producer.append(step("SYNCS.PHASECHK", event=event("wait", until=before), stall=2))
            producer.append(step("UTMALDG.4D", event=event("load", [full], nbytes=nbytes), stall=2))
            consumer.append(step("SYNCS.PHASECHK", event=event("wait", until=full), result=0))
            consumer += [step("FFMA", stall=use // 30, waits=(0,))] * 30
            consumer.append(step("SYNCS.ARRIVE", event=event("arrive", [empty])))
            joined |= {full: 1, empty: 1}
        return clocks(producer, consumer, joined=joined) / tiles

    transfer = nbytes / H200.fill_bytes
    round_trip = H200.tma_latency + transfer + use + H200.arrive_latency + 2 * H200.release_latency
    assert taken(1) == pytest.approx(round_trip, rel=0.05)
    assert taken(2) == pytest.approx(round_trip / 2, rel=0.1)
    assert taken(8) == pytest.approx(max(transfer, H200.predicate_latency + use), rel=0.1)


def test_warps_that_wait_forever_are_an_error():
    never = ("mbarrier", 0, 8, 0)
    with pytest.raises(RuntimeError, match="1 warps wait forever.*SYNCS"):
        clocks([step("SYNCS.PHASECHK", event=event("wait", until=never))], joined={never: 1})


def test_nobody_joins_what_is_over():
    with pytest.raises(ValueError, match="nobody is missing"):
        Join(0).arrive(1.0, "a warp", 0.0)


# Grids.


def test_clocks_between_and_beyond():
    clocks_of = grid.clocks_of({1: 100.0, 2: 150.0, 4: 350.0})
    assert clocks_of(grid.np.array([1, 2, 3, 4, 10])).tolist() == [100, 150, 250, 350, 950]


def test_ctas_are_begun_as_places_come_free():
    assert grid.makespan([5, 1, 1, 1, 1, 1], 2) == 5
    assert grid.makespan([1, 1, 1, 1, 1, 5], 2) == 7


def test_a_causal_row_sees_its_own_keys():
    shape = grid.Shape(1, 1024, 1024, 8, 1, (128, 128), True)
    assert grid.tiles_of(shape, 128, 128, 1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert grid.tiles_of(shape, 128, 128, 8).tolist() == [1 + i // 8 for i in range(64)]


# A kernel, from its PTX and its machine code.


@pytest.fixture(scope="module")
def kernel() -> subjects.Subject:
    return subjects.ours(subjects.Wanted((128, 128)), "sm90")


def test_every_warp_is_found_in_the_machine_code(kernel):
    recorder = kernel.record(tiles=4)
    automaton = match.Automaton(kernel.lines)
    assert len(recorder.warps) == kernel.threads // 32
    for warp, events in recorder.warps.items():
        steps = automaton.match(events, recorder.tail[warp]).steps
        assert [event for _, event in steps if event is not None] == events
        for (number, _), (after, _) in zip(steps, steps[1:], strict=False):
            assert after in kernel.lines[number].after
        exponentials = sum(automaton.words[n] is None and "EX2" in kernel.lines[n].parts for n, _ in steps)
        place = words.place("exponential")
        said = sum(event.shape[place] for event in events) + recorder.tail[warp][place]
        assert exponentials == said


def test_events_that_the_code_cannot_have_read(kernel):
    with pytest.raises(match.NoWay, match="event 0, tensor commit"):
        match.Automaton(kernel.lines).match([event("tensor commit")], [0] * len(words.SHAPES))


def test_a_kernel_in_clocks(kernel):
    """Every further KV tile takes what the tensor cores need for it, and not much more."""
    few, many = (simulate.run(kernel, H200, tiles).clocks for tiles in (4, 8))
    needed = 4 * kernel.rows * kernel.keys * 128 / H200.matrix_flops
    assert needed <= (many - few) / 4 < 1.1 * needed
    assert few < 4 * needed + 8000
    assert UNITS[0] == "none" and math.isfinite(many)


# Published speeds.

HEAD = "gpu," + ",".join(published.COLUMNS[1:]) + ",source\n"


def table(tmp_path, *rows: str):
    """A file of rows: (library, pass, seqlen, TFLOP/s) of an H200, at 16 heads of 128."""
    sizes = "16,16,128,128,false"
    text = [f"H200,{lib},1,{kind},bf16,2,{n},{n},{sizes},{rate},here" for lib, kind, n, rate in rows]
    path = tmp_path / "speeds.csv"
    path.write_text(HEAD + "\n".join(text) + "\n")
    return path


def test_the_committed_table_has_rows_of_every_family():
    rows = validate.predictable(published.read())
    assert {constants.FAMILIES[row.gpu] for row in rows} == {"sm80", "sm90", "sm100"}
    for gpu in {row.gpu for row in rows}:
        halves = [row.tuned for row in rows if row.gpu == gpu]
        assert 0.25 < sum(halves) / len(halves) < 0.75


def test_rows_count_flops_as_tables_do():
    row = next(r for r in published.read() if r.kind == "bwd" and r.library == "FA4" and not r.shape.causal)
    s = row.shape
    assert row.flops == 2.5 * 4 * s.batch * s.heads * s.rows * s.keys * 128


def test_a_table_with_other_columns(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("gpu,speed\nH200,1\n")
    with pytest.raises(ValueError, match="no column library"):
        published.read(path)


def test_errors_and_order(tmp_path):
    """Two libraries on one problem: the order is right where the faster one is predicted faster."""
    path = table(tmp_path, ("FA4", "fwd", 1024, 500), ("other", "fwd", 1024, 400), ("FA4", "fwd", 2048, 600))
    rows = published.read(path)
    slow, fast = 1e6, 0.5e6
    found = [validate.Predicted(row, slow if row.library == "other" else fast) for row in rows]
    assert validate.in_order(found, {"H200": 1e9}) == (1, 1)
    turned = [validate.Predicted(row, fast if row.library == "other" else slow) for row in rows]
    assert validate.in_order(turned, {"H200": 1e9}) == (0, 1)
    one = found[0]
    assert validate.error([one], one.clock) == pytest.approx(0)
    assert validate.error([one], 1.2 * one.clock) == pytest.approx(0.2)
    assert validate.fitted([one, one]) == pytest.approx(one.clock)


def test_a_missed_bar_is_told(tmp_path):
    rows = published.read(table(tmp_path, *(("FA4", "fwd", 1024 * n, 500 + n) for n in range(1, 9))))
    assert any(row.tuned for row in rows) and not all(row.tuned for row in rows)
    exact = [validate.Predicted(row, row.flops / row.tflops / 1e12 * 1e9) for row in rows]
    for clock, holds in ((1e9, True), (1.09e9, True), (1.12e9, False)):
        assert [good for _, good in validate.report(exact, {"H200": clock})] == [holds, True]


def test_a_row_beside_its_prediction(tmp_path, capsys):
    """The whole way, for one kernel of ours in flash-attn-4's place."""
    path = table(tmp_path, ("FA4", "fwd", 2048, 650), ("FA4", "bwd_of_none", 2048, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(validate.LIBRARIES, ("FA4", "fwd"), subjects.ours)
        patch.setattr(predict, "FEW", (1, 2))
        assert validate.main(path, 60.0) in (0, 1)
    said = capsys.readouterr().out
    assert "2 rows with all sizes, 1 of them" in said
    rate = float(said.split("full")[1].split("/")[0])
    assert 450 < rate < 800


def test_no_kernel_is_begun_when_time_is_over(tmp_path, capsys):
    assert validate.main(table(tmp_path, ("FA4", "fwd", 2048, 650)), -1.0) == 1
    assert "not run" in capsys.readouterr().out


# A timeline.


def test_timeline(kernel, tmp_path):
    """Spans of a lane do not overlap; arrows begin before they end, on lanes that are there."""
    run = simulate.run(kernel, H200, 4, keep=True)
    lanes: dict[str, list] = {}
    for span in timeline.spans_of(run.machine):
        lanes.setdefault(span.lane, []).append(span)
    assert set(lanes) <= set(timeline.titles(run.machine))
    for lane, spans in lanes.items():
        if "TMA" not in lane:  # copies overlap
            assert all(a.end <= b.start + 1 for a, b in zip(spans, spans[1:], strict=False)), lane
    tensor = sum(span.end - span.start for span in lanes["SM 0 tensor core"])
    assert tensor == pytest.approx(run.machine.sms[0].busy["tensor core"])
    events = timeline.trace(run.machine)["traceEvents"]
    flows = [[event for event in events if event["ph"] == kind] for kind in "sf"]
    assert len(flows[0]) == len(flows[1]) > 20
    assert all(s["id"] == f["id"] and s["ts"] <= f["ts"] for s, f in zip(*flows, strict=True))
    drawn = ElementTree.fromstring(timeline.picture(run.machine, "a <kernel>"))
    assert len(drawn.findall("{*}rect")) > 30 and drawn.findall("{*}line")


# Gradients.


def test_a_causal_block_of_keys_is_seen_by_later_rows():
    full, causal = (grid.Shape(1, 640, 640, 1, 1, (128, 128), mask) for mask in (False, True))
    assert grid.query_tiles_of(full, 80, 128).tolist() == [8] * 5
    assert grid.query_tiles_of(causal, 80, 128).tolist() == [8, 7, 5, 4, 2]


def test_launches_around_the_main_one():
    """O, dO, the sums of dQ cleared, added up and read, dQ: 20 bytes and 8 for a row and number of 128."""
    shape = grid.Shape(1, 4096, 4096, 8, 8, (128, 128), False)
    nbytes = 4096 * 8 * 128 * (2 + 2 + 4 + 4 + 2)
    moved = backward.around(shape, H200) - backward.LAUNCHES * H200.kernel_launch
    assert moved == pytest.approx(nbytes / (H200.hbm_rate * 1e9) * H200.clock * 1e6)
    grouped = grid.Shape(1, 4096, 4096, 8, 1, (128, 128), False)
    assert backward.around(grouped, H200) > backward.around(shape, H200)


def test_products_share_shared_memory():
    """Loads beside a product take what the share that is left allows, and the product waits for them."""
    product, load = hgmma(True, 80), step("LDS.128")
    assert product[0].nbytes == 2 * 16 * (80 + 64)
    products = clocks(*[[product] * 40 + [WAIT]] * 4)
    loads = clocks(*[[load] * 200] * 4)
    both = clocks(*[[product] * 40 + [WAIT]] * 4, *[[load] * 200] * 4)
    assert max(products, loads) < both < products + loads
    taken = 40 * product[0].nbytes / H200.shared_bytes + 4 * 200 * 4
    assert both > 0.95 * taken


def test_sums_in_global_memory_have_a_rate_of_their_own():
    def taken(sums: bool) -> float:
        store = step("UBLKRED.G.S", event=event("store", nbytes=16384, sums=sums))
        return clocks([*[store, step("UTMACMDFLUSH")] * 10, step("DEPBAR.LE", "SB0, 0x0")])

    assert taken(True) == pytest.approx(10 * 16384 / (H200.sum_rate * 1e9) * H200.clock * 1e6, rel=0.1)
    assert taken(False) < taken(True) / 3


# What is kept.


def test_kept_tables_are_what_the_code_prints():
    rows = kept.read()
    assert {constants.FAMILIES[row.gpu] for row in rows} == {"sm80", "sm90", "sm100"}
    assert kept.JSON.with_suffix(".md").read_text() == "\n".join(kept.markdown(rows)) + "\n"


def test_kept_rows_are_what_the_model_says(kernel):
    """Of one kernel. Another one, or another model? python -m profiling timing --write"""
    (row,) = (r for r in kept.read() if r.key == ("H200", 128, False, False, kernel.name))
    tiles = min(row.found.first)
    assert simulate.run(kernel, H200, tiles).clocks == pytest.approx(row.found.first[tiles], rel=0.01)
    assert (row.rows, row.keys, row.persistent) == (kernel.rows, kernel.keys, kernel.persistent)
    assert 0.5 < row.part <= 1


def test_rows_take_the_place_of_those_of_the_same_key(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(kept, "JSON", tmp_path / "timing.json")
    samples = predict.Samples({4: 1000.0, 8: 1800.0}, {4: 900.0, 8: 1700.0}, {4: 1.0, 8: 2.0}, 0.0)
    row = kept.Kept.of("H200", 128, kernel, samples, ["a role"])
    kept.write([row])
    kept.write([dataclasses.replace(row, dim=64), dataclasses.replace(row, roles=[])])
    assert [(r.dim, r.roles, r.found) for r in kept.read()] == [(128, [], samples), (64, ["a role"], samples)]
    assert row.steady == 200
    assert row.tflops(4096) > row.tflops(1024) > 0

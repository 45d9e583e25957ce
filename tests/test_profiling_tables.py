"""The tables that stand in profiling/results and in README are of today's kernels, and whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nvidia.cu13", reason="cuobjdump and nvdisasm come with NVIDIA's packages on PyPI")

from profiling import (
    arguments,
    cycles,
    cycles_table,
    flash_attn_4,
    fp8,
    gradients,
    readme,
    static,
    static_table,
)
from profiling.rates import GPUS, PARTITIONS, WARP
from profiling.static import CASES, EMULATED, Absent, Figures
from profiling.timing import constants, kept

STATIC, COUNTED = static_table.read(), cycles_table.read()
TARGETS = {gpu.device.target: gpu for gpu in GPUS.values()}
# Of what our kernels of gradients ask more than FlashAttention-2's tiles; cycles.md says why.
BEYOND = {"d32_backward": {"shared"}, "d64_backward": {"shared"}, "d96_backward": {"shared"}}


def ours(answers: tuple) -> set[tuple[str, str]]:
    """(kernel, config) of every kernel of ours among the answers to a case."""
    return {(a.kernel.name, static.in_words(a.config)) for a in answers if a}


# Every tree's first device must be there; of the others, what is there must be whole.
TREES = ("sm80", "sm90", "sm100")


@pytest.mark.parametrize("emulated", EMULATED)
def test_the_static_table_is_of_todays_kernels(emulated):
    if emulated not in TREES and all(row.arch != emulated for row in STATIC):
        text = static_table.JSON.with_suffix(".md").read_text()
        assert f"Not compiled yet: `python -m profiling static --arch {emulated} --write`" in text
        return
    for case in (case for case in CASES.values() if case.is_on(emulated)):
        rows = [row for row in STATIC if (row.arch, row.case) == (emulated, case.name)]
        found = {(row.kernel, row.config) for row in rows if isinstance(row, Figures) and row.config}
        hint = f"python -m profiling static --arch {emulated} --write"
        assert found == ours(case.answers(EMULATED[emulated])), f"{case.name}: {hint}"
        peers = [row for row in rows if row.kernel.startswith(flash_attn_4.NAME)]
        assert len(peers) == case.of_peers, f"{case.name}: {hint}"


def test_nothing_spills_and_what_is_absent_says_why():
    # One of sm80's on sm_100a, which only who asks for it by name gets: sm100's own serves that case.
    assert static_table.spilling(STATIC) == ["sm100 d128_window sm80.forward"]
    assert all(row.reason for row in STATIC if isinstance(row, Absent))
    assert {row.kernel for row in STATIC if isinstance(row, Absent)} <= set(static.OWNERS[1:])


def test_the_golden_file_and_the_table_agree():
    for told in json.loads(static.GOLDEN.read_text())["rows"].values():
        now = Figures.of(told)
        key = (now.arch, now.case, now.kernel)
        rows = [r for r in STATIC if isinstance(r, Figures) and (r.arch, r.case, r.kernel) == key]
        assert len(rows) == any(r.arch == now.arch for r in STATIC), key
        assert all(static.moves(told, row) == [] for row in rows), key


def test_the_markdown_is_the_json():
    versions = json.loads(static_table.JSON.read_text())["versions"]
    assert static_table.JSON.with_suffix(".md").read_text() == static_table.markdown(STATIC, versions)
    assert cycles_table.JSON.with_suffix(".md").read_text() == cycles_table.markdown(COUNTED)


@pytest.mark.parametrize("target", TARGETS)
def test_the_cycles_table_is_of_todays_kernels(target):
    gpu = TARGETS[target]
    for name in (name for name in cycles.DEFAULT if cycles.counts(CASES[name], target)):
        rows = [row for row in COUNTED if (row.target, row.case) == (target, name)]
        found = {(row.kernel, row.config) for row in rows if isinstance(row, cycles.Row) and row.config}
        hint = f"{name} on {target}: python -m profiling cycles --write"
        assert found == ours(CASES[name].with_products(gpu.device)), hint
        peers = [row for row in rows if row.kernel.startswith(flash_attn_4.NAME)]
        alone = tuple(row.kernel.endswith(cycles.ALONE) for row in peers)
        assert alone == cycles.peers_of(CASES[name], gpu.arch), hint


def test_rows_are_put_in_place_of_those_there(tmp_path):
    path = tmp_path / "static.json"
    a, b = STATIC[0], next(row for row in STATIC if row.arch != STATIC[0].arch)
    static_table.write([a, b], path)
    again = Absent(a.arch, a.case, "x", "", "why")
    static_table.write([again], path)
    assert static_table.read(path) == [again, b] and "why" in path.with_suffix(".md").read_text()
    counts = tmp_path / "cycles.json"
    cycles_table.write(COUNTED, counts)
    gone = cycles.NotYet(COUNTED[0].case, COUNTED[0].target, "y", "not yet")
    cycles_table.write([gone], counts)
    assert gone in cycles_table.read(counts) and COUNTED[0] not in cycles_table.read(counts)


def test_readme_has_the_newest_results():
    marks = re.compile(r"<!-- performance -->\n(.*?)\n<!-- /performance -->", re.DOTALL)
    (found,) = marks.findall(readme.README.read_text())
    assert found == readme.section(), "run: python -m profiling readme"


def test_readme_s_section_is_written_between_the_marks(monkeypatch, tmp_path, capsys):
    path = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", path)
    path.write_text("a\n<!-- performance -->\n\n<!-- /performance -->\nb\n")
    for _ in range(2):
        assert readme.main([]) == 0
        expected = f"a\n<!-- performance -->\n{readme.section()}\n<!-- /performance -->\nb\n"
        assert path.read_text() == expected
    path.write_text("a\n")
    assert readme.main([]) == 1 and "has 0 sections" in capsys.readouterr().out


def test_readme_says_what_a_report_measured(tmp_path):
    for name in ("static.json", "cycles.json"):
        (tmp_path / name).write_text((static_table.JSON.parent / name).read_text())
    assert "No speed was measured on hardware" in readme.section(tmp_path)
    shape = {"head_dim": 64, "head_dim_v": 64, "causal": True, "seqlen": 512}
    peers = {"cute_flash": {"state": "ok", "tflops": 200.0, "seconds": 1.0, "spread": [0.9, 1.1]},
             "torch flash": {"state": "missing", "error": "why"}}  # fmt: skip
    row = {"key": "d64-causal-s512", "kind": "row", "state": "ok", "shape": shape, "peers": peers,
           "ratio to best": 0.5, "best peer": "torch flash"}  # fmt: skip
    for day, gpu, rows in (("01", "old", [row]), ("02", "new", [row]), ("03", "newest, no speed", [])):
        data = {"format": 1, "name": f"2026-01-{day}-x", "started": f"2026-01-{day}T00:00:00", "machine": gpu,
                "dry_run": False, "stages": {"speed": {"rows": rows}}}  # fmt: skip
        (tmp_path / f"2026-01-{day}-x.json").write_text(json.dumps(data))
    text = readme.section(tmp_path)
    assert text.startswith("new, 2026-01-02; all of it: `profiling/results/2026-01-02-x.md`")
    assert "| d64-causal-s512 | 200 (20.0%) | missing |" in text and "No speed was measured" not in text
    assert "Geometric mean of our speed over that of the best peer: 0.500, 1 rows" in text


def test_the_argument_for_blackwell_has_the_tables_numbers():
    """profiling/sm100.md argues from counts; they are those of the table."""
    text = (Path(cycles.__file__).parent / "sm100.md").read_text()
    told = re.findall(r"^\| (d\w+) \| ([\w.-]+) \| ([\d |]+) \|$", text, re.MULTILINE)
    assert len(told) == 6
    for case, kernel, numbers in told:
        rows = [r for r in COUNTED if (r.target, r.case) == ("sm_100a", case) and r.kernel.startswith(kernel)]
        (row,) = rows
        clocks = row.cost.cycles(GPUS["B200"]).values()
        assert [int(n) for n in numbers.split(" | ")] == [round(n) for n in clocks], (case, kernel)


@pytest.mark.parametrize("case", cycles.FORWARD)
@pytest.mark.parametrize("name", ["B200", "GB300"])
def test_blackwell_asks_no_more_of_an_sm_than_the_peer(name, case):
    """No more products and shared memory; no more exponentials, unless products take longer, and no more
    instructions, unless for fewer exponentials; and no lower a bound."""
    gpu = GPUS[name]
    rows = [row for row in COUNTED if (row.target, row.case) == (gpu.device.target, case)]
    (own,) = [row.cost for row in rows if row.kernel == "sm100.forward"]
    (peer,) = [row.cost for row in rows if row.kernel.startswith(flash_attn_4.NAME)]
    ours, theirs = own.cycles(gpu), peer.cycles(gpu)
    for kind in ("matrix", "shared"):
        assert ours[kind] <= theirs[kind] * 1.001, kind
    behind_products = 0.9 * ours["matrix"] if (name, case) == ("B200", "d128") else 0
    assert ours["mufu"] <= max(theirs["mufu"] * 1.001, behind_products)
    # Of few exponentials, a look for large scores, and the end of P that is told of apart.
    most = {("B200", "d256"): 1.022}.get((name, case), 1.008 if case.startswith("d256") else 1.0)
    assert ours["issue"] <= most * theirs["issue"] or ours["mufu"] < theirs["mufu"]
    assert own.ceilings(gpu)[1] >= 0.999 * peer.ceilings(gpu)[1]


def in_fp8(target: str, kernel: str) -> list[cycles.Row]:
    return [r for r in COUNTED if r.case in cycles.FP8 and (r.target, r.kernel) == (target, kernel)]


def test_the_arithmetic_of_fp8_tiles_is_what_the_emulator_counts_of_ours():
    """Products, exponentials and shared memory; blocks' scales are read from global memory."""
    rows = in_fp8("sm_90a", "sm90.fp8")
    assert {row.case for row in rows} == set(cycles.FP8)
    for row in rows:
        found = fp8.cost(row.tile, CASES[row.case].dims, q_kept="q_in_registers=True" in row.config)
        assert (row.cost.flops, row.cost.mufu, row.cost.shared) == (found.flops, found.mufu, found.shared)
        assert 0 < row.transposing < row.cost.issue / 3


@pytest.mark.parametrize("name", [name for name in cycles.FP8 if CASES[name].block is None])
def test_hoppers_fp8_beside_flash_attention_3_s_tiles(name):
    """No more products; whatever is more than theirs stands in cycles.md, with why."""
    told = cycles_table.JSON.with_suffix(".md").read_text()
    (row,) = (row for row in in_fp8("sm_90a", "sm90.fp8") if row.case == name)
    more = cycles_table.beyond_published(row)
    assert more.keys() <= {"mufu", "shared", *cycles_table.CODE}
    for unit, ratio in more.items():
        assert re.search(rf"^\* {name}, sm90.fp8, .*\b{unit} {ratio:.2f} ×", told, re.MULTILINE)


@pytest.mark.parametrize("gpu", ["B200", "GB300"])
@pytest.mark.parametrize("name", [name for name in cycles.FP8 if CASES[name].block is None])
def test_blackwells_fp8_beside_the_peers(name, gpu):
    """No more products; no lower a bound, but by what is more than theirs, which stands in cycles.md with
    why."""
    told = cycles_table.JSON.with_suffix(".md").read_text()
    rows = [r for r in COUNTED if (r.case, r.target) == (name, GPUS[gpu].device.target)]
    ((row, peer),) = arguments.pairs(rows)
    more = cycles_table.beyond_peer(row, peer, gpu)
    binds, bound, _ = row.ceilings(GPUS[gpu])
    assert "matrix" not in more and (bound >= 0.999 * peer.ceilings(GPUS[gpu])[1] or binds in more)
    for unit, ratio in more.items():
        line = rf"^\* {name}, {row.kernel}, .*\b{unit} {ratio:.2f} ×.*, on {gpu}"
        assert re.search(line, told, re.MULTILINE), unit


def gradients_of(name: str) -> tuple[cycles.Row, gradients.Tiles]:
    """The row of our main kernel, and its tiles."""
    (row,) = [r for r in COUNTED if (r.case, r.target) == (name, "sm_80") and r.config]
    (answer,) = CASES[name].with_products(GPUS["A100"].device)
    return row, gradients.tiles_of(answer.config, CASES[name].dims)


@pytest.mark.parametrize("name", cycles.BACKWARD)
def test_gradients_ask_no_more_than_flash_attention_2_s_tiles(name):
    row, _ = gradients_of(name)
    assert set(cycles_table.asks_more(row)) == BEYOND.get(name, set())


@pytest.mark.parametrize("name", cycles.BACKWARD)
def test_the_arithmetic_of_tiles_is_what_the_emulator_counts_of_ours(name):
    """Less what is copied in of LSE and D, of which FlashAttention-2 keeps nothing in shared memory."""
    row, tiles = gradients_of(name)
    dims = CASES[name].dims
    assert row.cost.flops == tiles.flops(dims) and row.cost.reduced == tiles.reduced(dims)
    assert row.cost.shared == pytest.approx(tiles.shared(dims) + 2 * 4 * tiles.tile_m, rel=1e-3)
    assert tiles.tile_m * tiles.tile_n == row.cost.mufu


def test_what_differs_from_published_tiles_is_told():
    theirs, asked = gradients.flash_attention_2((96, 96))
    assert asked.beyond(asked) == {} and gradients.differences(theirs, theirs) == ""
    ours = replace(theirs, tile_m=32, grid_q=(2, 4), v_in_registers=False)
    told = "tiles of 32 × 128, not 64 × 128; dQ by 2 × 4 warps, not 4 × 2; V read at every tile"
    assert gradients.differences(ours, theirs).startswith(told)
    assert replace(asked, shared=1.1 * asked.shared).beyond(asked) == {"shared": pytest.approx(1.1)}


HOPPER = [row for row in COUNTED if row.case in cycles.BACKWARD and row.target == "sm_90a"]


@pytest.mark.parametrize("name", cycles.BACKWARD)
def test_hoppers_own_gradients_beside_the_peers(name):
    """No more sums in global memory per FLOP; whatever is more than theirs stands in cycles.md, with why."""
    told = cycles_table.JSON.with_suffix(".md").read_text()
    ((row, peer),) = arguments.pairs(r for r in HOPPER if r.case == name)
    more = cycles_table.beyond_peer(row, peer, "H200")
    if row.kernel == "sm90.backward":
        assert float(arguments.added_per_kflop(row)) <= float(arguments.added_per_kflop(peer))
        assert "sums" not in more and "mufu" not in more
    for unit, ratio in more.items():
        assert re.search(rf"^\* {name}, {row.kernel}, of .*\b{unit} {ratio:.2f} ×", told, re.MULTILINE), unit


def test_who_takes_shared_memory_is_all_of_it():
    for row in (r for r in COUNTED if r.case in cycles.BACKWARD and isinstance(r, cycles.Row)):
        assert set(row.parts) == set(cycles.PARTS)
        assert sum(row.parts.values()) == pytest.approx(row.wavefronts, rel=1e-4)
        assert row.cost.shared == pytest.approx(128 * row.wavefronts + row.local, rel=1e-4)


def test_padding_is_no_work():
    """A ceiling is of the algorithm's FLOP; clocks are of all that the kernel multiplies."""
    gpu = GPUS["H200"]
    for row in HOPPER:
        ratio = cycles.flops_of(CASES[row.case], row.tile) / row.cost.flops
        assert ratio <= 1 and row.ceilings(gpu)[1] == pytest.approx(ratio * row.cost.ceilings(gpu)[1])


def words_of(argument: arguments.Argument) -> str:
    """The text, whose tables are those of the counts."""
    text = argument.path.read_text()
    assert text == argument.told(text, COUNTED), "python -m profiling cycles --write"
    return " ".join(text.split())


def test_the_argument_for_hoppers_gradients_has_the_tables_numbers():
    """Both tables of profiling/sm90_backward.md, written with the rest."""
    words = words_of(arguments.HOPPER)
    both = {row.case: (row, peer) for row, peer in arguments.pairs(HOPPER)}
    (qk_192, qk_192_peer), (qk_256, qk_256_peer) = both["d192_128_backward"], both["d256_backward"]
    keys = [row.tile[1] for row in (qk_192, qk_256, qk_192_peer, qk_256_peer)]
    assert "at 192/128 a CTA has {} keys, at 256 it has {}, for {} and {}.".format(*keys) in words
    assert f"over the keys of both, {2 * keys[0]} and {2 * keys[1]}:" in words
    (qk_64, qk_64_peer), (qk_128, qk_128_peer) = both["d64_backward"], both["d128_backward"]
    for row in (qk_192, qk_256):
        assert row.cost.reduced == 4 * row.tile[0] * CASES[row.case].dims[0] / 2
    assert qk_128.tile == (64, 128)  # half of 128 × 128 scores
    assert f"takes 256 of {2 * qk_128.wavefronts:.0f} clocks less of shared memory" in words
    timed = next(row for row in kept.read() if row.key == ("H200", 128, True, False, "sm90.backward"))
    assert f"a CTA alone {timed.steady:.0f}, {100 * timed.part:.0f} %" in words
    assert f"takes {qk_64.parts['warps'] - qk_64_peer.parts['warps']:.0f} clocks more" in words
    assert f"theirs has {qk_128_peer.tile[0]} rows" in words and f"ours has {qk_128.tile[0]}," in words


BLACKWELL = {
    name: [row for row in COUNTED if (row.case, row.target) == (name, "sm_100a")]
    for name in cycles.DEFAULT if cycles.counts(CASES[name], "sm_100a") and CASES[name].backward
}  # fmt: skip


@pytest.mark.parametrize("name", BLACKWELL)
def test_blackwells_own_gradients_beside_the_peers(name):
    """Up to head dim 128 no more of what may bind, nor of sums per FLOP; whatever is more stands in
    cycles.md, with why."""
    told = cycles_table.JSON.with_suffix(".md").read_text()
    for row, peer in arguments.pairs(BLACKWELL[name]):
        more = cycles_table.beyond_peer(row, peer, "B200")
        if max(CASES[name].dims) <= 128:
            assert row.kernel == "sm100.backward" and not {"matrix", "mufu", "issue", "shared"} & more.keys()
            assert row.cost.reduced <= peer.cost.reduced
        for unit, ratio in more.items():
            line = rf"^\* {name}, {row.kernel}, of {re.escape(peer.kernel)}'s .*\b{unit} {ratio:.2f} ×"
            assert re.search(line, told, re.MULTILINE), unit


def test_the_argument_for_blackwells_gradients_has_the_tables_numbers():
    """Tables and text of profiling/sm100_backward.md."""
    argument, words = arguments.BLACKWELL, words_of(arguments.BLACKWELL)
    (narrow, _), (wide, pair, alone) = BLACKWELL["d64_backward"], BLACKWELL["d128_backward"]
    gpu, loads = GPUS["B200"], narrow.uniform

    def shared(row: cycles.Row) -> float:
        return arguments.per_work(row) * row.merged.cycles(gpu)["shared"]

    assert {row.uniform for row in (narrow, wide, pair, alone)} == {loads}
    assert shared(alone) == alone.cost.cycles(gpu)["shared"] - 2 * loads
    assert f"{loads:.0f} loads of 16 bytes, each counted as four" in words
    assert f"bytes, {4 * loads:.0f} clocks." in words
    measured, counted = argument.measured(alone), alone.ceilings(gpu)[1]
    assert measured > counted and f"at {measured:.0f} TFLOP/s, and as counted" in words
    assert f"would allow {counted:.0f}." in words
    peers = [peer for name in argument.cases for _, peer in arguments.pairs(BLACKWELL[name])]
    speeds = [(argument.measured(peer), argument.ceiling(peer)) for peer in peers]
    parts = [speed / ceiling for speed, ceiling in speeds if speed]
    assert f"{100 * min(parts):.0f} to {100 * max(parts):.0f} % of what that allows" in words
    products, left = 2 * wide.cost.cycles(gpu)["matrix"] / 5, shared(wide)
    assert f"are {products:.0f} clocks. Shared memory's {left:.0f} leave {left - products:.0f}" in words
    assert f"less than {wide.cost.cycles(gpu)['issue']:.0f}." in words
    rate = measured * alone.cost.reduced / alone.cost.flops * 1e3 / gpu.sms
    assert f"adds {rate:.0f} GB per second and SM" in words
    assert alone.cost.reduced == 2 * pair.cost.reduced == 2 * wide.cost.reduced
    assert f"without pairs at 128: {shared(alone):.0f} clocks for {shared(wide):.0f}," in words
    assert f"at {100 * (1 - measured / argument.measured(pair)):.0f} % less" in words
    for case, dims in (("d192_128_backward", "192/128"), ("d256_backward", "256")):
        clocks = [shared(row) for row in BLACKWELL[case]]
        assert f"at {dims} {clocks[0]:.0f} clocks, not {clocks[1]:.0f}" in words


@pytest.mark.parametrize("name", sorted(GPUS.keys() & constants.FAMILIES.keys()))
def test_bounds_and_the_timing_model_know_the_same_gpu(name):
    """Its units' rates stand in two tables: lanes per clock of an SM, and clocks per warp instruction."""
    gpu, chip = GPUS[name], constants.of(name)
    intervals = chip.exp_interval, chip.fma_interval, chip.alu_interval
    assert tuple(WARP * PARTITIONS / lanes for lanes in (gpu.mufu, gpu.fma, gpu.alu)) == intervals
    assert (gpu.sms, gpu.matrix, gpu.shared) == (chip.sms, chip.matrix_flops, chip.shared_bytes)
    assert gpu.sums * gpu.clock == pytest.approx(chip.sum_rate * 1e9)

"""The tables that stand in profiling/results and in README are of today's kernels, and whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nvidia.cu13", reason="cuobjdump and nvdisasm come with NVIDIA's packages on PyPI")

from profiling import cycles, cycles_table, flash_attn_4, gradients, readme, static, static_table
from profiling.rates import GPUS
from profiling.static import CASES, EMULATED, Absent, Figures

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
        assert len(peers) == (case.rules != "everything"), f"{case.name}: {hint}"


def test_nothing_spills_and_what_is_absent_says_why():
    assert static_table.spilling(STATIC) == []
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
    for name in (name for name in cycles.DEFAULT if CASES[name].is_on(gpu.arch)):
        rows = [row for row in COUNTED if (row.target, row.case) == (target, name)]
        found = {(row.kernel, row.config) for row in rows if isinstance(row, cycles.Row) and row.config}
        hint = f"{name} on {target}: python -m profiling cycles --write"
        assert found == ours(CASES[name].with_products(gpu.device)), hint
        peers = [row for row in rows if row.kernel.startswith(flash_attn_4.NAME)]
        assert len(peers) == 1, hint


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
    """No more exponentials, products and shared memory; no more instructions, unless for fewer exponentials;
    and no lower a bound."""
    gpu = GPUS[name]
    rows = [row for row in COUNTED if (row.target, row.case) == (gpu.device.target, case)]
    (own,) = [row.cost for row in rows if row.kernel == "sm100.forward"]
    (peer,) = [row.cost for row in rows if row.kernel.startswith(flash_attn_4.NAME)]
    ours, theirs = own.cycles(gpu), peer.cycles(gpu)
    for kind in ("matrix", "mufu", "shared"):
        assert ours[kind] <= theirs[kind] * 1.001, kind
    assert ours["issue"] <= theirs["issue"] or ours["mufu"] < theirs["mufu"]
    assert own.ceilings(gpu)[1] >= 0.999 * peer.ceilings(gpu)[1]


def gradients_of(name: str) -> tuple[cycles.Row, gradients.Tiles]:
    """The row of our main kernel, and its tiles."""
    (row,) = [row for row in COUNTED if row.case == name and row.config]
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
    with pytest.raises(ValueError, match="fp32"):
        gradients.bytes_added("red.global.add.u32")

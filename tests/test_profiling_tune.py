"""`python -m profiling tune`: which configs it tries, in which order, and what it says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("nvidia.cu13", reason="nvdisasm comes with NVIDIA's packages on PyPI")

from profiling.timing import backward, constants, predict, tune


def task(arch: str = "sm90", dims: tuple[int, int] = (128, 128), causal: bool = False) -> tune.Task:
    return tune.Task.of(arch, tune.GPUS[arch], dims, causal, 4096)


@pytest.mark.parametrize("tree", tune.GPUS)
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (256, 256)])
def test_candidates_fit_and_come_by_their_bounds(tree, dims):
    asked = task(tree, dims)
    row, space = asked.answer.config, tune.CHOICES[type(asked.answer.config)]
    found = tune.candidates(asked, list(space), 2)
    configs = [candidate.config for candidate in found]
    assert len(set(configs)) == len(configs) > 20 and row not in configs
    assert [round(c.bound) for c in found] == sorted(round(c.bound) for c in found)
    room = asked.answer.device.shared_memory
    assert all(config.shared_memory(asked.answer.problem) <= room for config in configs)
    one = tune.candidates(asked, ["tile_n"], 1)
    assert {c.config for c in one} < set(configs)
    assert all(c.config == replace(row, tile_n=c.config.tile_n) for c in one)


def test_the_bound_is_what_products_or_exponentials_take():
    """At head dim 128 products of a tile take twice what its exponentials take; at 64 both take as long."""
    chip = constants.of("H200")
    for dim, work in ((128, 4 * 4096 * 4096 * 128), (32, 4096 * 4096 * 4 * 64)):
        asked = task(dims=(dim, dim))
        heads = asked.shape.batch * asked.shape.heads
        needed = heads * work / chip.matrix_flops / chip.sms + chip.kernel_launch
        assert needed <= asked.bound(asked.answer.config) < 1.15 * needed


@pytest.mark.parametrize("tree", tune.GPUS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_candidates_for_gradients(tree, dims):
    """Of the class that the table has there; a config that has no registers for itself is none."""
    asked = tune.Task.of(tree, tune.GPUS[tree], dims, False, 4096, gradients=True)
    row = asked.answer.config
    found = tune.candidates(asked, list(tune.CHOICES[type(row)]), 2)
    assert found and all(type(candidate.config) is type(row) for candidate in found)
    problem = asked.answer.problem
    assert all(c.config.shared_memory(problem) <= asked.answer.device.shared_memory for c in found)


@pytest.mark.parametrize("tree", ["sm90", "sm100"])
def test_the_bound_of_gradients_is_what_five_products_take(tree):
    """At 192/128 three of them have 192 columns, two 128: at as many clocks, as many more FLOP per second."""
    asked = tune.Task.of(tree, tune.GPUS[tree], (192, 128), False, 4096, gradients=True)
    chip, shape = constants.of(asked.gpu), asked.shape
    flops = 2 * (3 * 192 + 2 * 128) * shape.batch * shape.heads * 4096**2
    needed = flops / chip.matrix_flops / chip.sms
    around = backward.around(shape, chip) + chip.kernel_launch
    assert needed + around <= asked.bound(asked.answer.config) < 1.15 * needed + around
    assert asked.tflops(1e6) == pytest.approx(flops / 1e6 * chip.clock / 1e6)


def test_what_there_is_not_to_be_changed_is_told(capsys):
    asked = ["--arch", "sm100", "--head-dim", "256", "--backward", "--only", "keys", "sums"]
    assert tune.main(asked) == 2
    assert capsys.readouterr().out == "--only keys: of sm100.backward there may change sums, registers\n"


def test_polynomials_lower_the_bound_where_exponentials_bind():
    asked = task("sm100", (64, 64))
    few, more = (asked.bound(replace(asked.answer.config, polynomial=n)) for n in (0, 8))
    assert few > more


def test_what_cannot_win_is_not_compiled():
    """The best so far counts, also a candidate's; what fails is told; time runs out."""
    taken = {"a": 90.0, "b": 80.0, "d": 10.0}
    tried = []

    def clocks(config: str) -> float:
        tried.append(config)
        if config == "c":
            raise ValueError("spills: 8 bytes")
        return taken[config]

    order = [tune.Candidate(name, bound, 1) for name, bound in zip("abcd", (50, 60, 70, 85), strict=True)]
    said = list(tune.trials(order, 100.0, clocks, 60.0))
    assert tried == ["a", "b", "c"]
    assert [trial.clocks for trial in said] == [90.0, 80.0, None, None]
    assert "spills" in said[2].said and "not compiled: takes 85" in said[3].said
    assert all("not tried" in trial.said for trial in tune.trials(order, 100.0, clocks, -1.0))


def test_the_best_stands_beside_the_row(monkeypatch, capsys):
    """The whole way of the row itself, whose kernel other tests compile; candidates get their bounds."""
    monkeypatch.setattr(predict, "CAUSAL", (1, 2))
    row = task(causal=True).answer.config
    own = tune.Task.clocks
    monkeypatch.setattr(
        tune.Task, "clocks", lambda it, config: own(it, config) if config == row else it.bound(config)
    )
    asked = ["--arch", "sm90", "--head-dim", "128", "--causal", "--only", "stages", "--changes", "1"]
    assert tune.main(asked) == 0
    said = capsys.readouterr().out
    assert "row: consumers=2 tile_n=128" in said and "[1/" in said
    assert "  stages=1" in said and "the row" in said.split("best, predicted:")[1]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--head-dim", "1", "2", "3"], "--head-dim takes"),
        (["--head-dim", "64", "--gpu", "A100"], "A100 is not sm90"),
        (["--head-dim", "64", "--backward", "--causal"], "--backward is without --causal"),
    ],
)
def test_what_is_not_there_is_refused(wrong, said, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--arch", "sm90", *wrong])
    assert said in capsys.readouterr().err

"""Steps that answer a call: operands by name, scratch by what their Specs say; and where the words come from.

A stand-in for kernels: they add what they read into what they write. No kernel is compiled.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple

import pytest
import torch

import cute_flash
from cute_flash import dispatch, launch, precompile, problems, quantized, repeat, request, rules, schema
from cute_flash.arch.append import AppendProblem
from cute_flash.arch.combine import CombineProblem, part_of
from cute_flash.arch.kernel import Kernel, Step, Steps, Tuning
from cute_flash.arch.problem import OPERATIONS, Problem, Spec, Support
from cute_flash.dispatch import EMULATED, Place
from tests.cases import CASES
from tests.harness import answer_for

A100 = EMULATED["sm80"]


@dataclass(frozen=True)
class Sum:
    """A problem of three kernels: y += the sums of x's rows, by way of scratch with padded rows."""

    operation: ClassVar[str] = "sum"
    reads: str
    writes: str
    dims: tuple[str, ...] = ("batch", "padded", "two")
    scaled: bool = False

    def known_sizes(self) -> dict[str, int]:
        return {"two": 2}

    def specs(self) -> Any:
        rows, padded = ("batch", "rows", "two"), self.dims
        dims = {"x": rows, "y": rows, "kept": padded, "summed": padded}
        return SumOperands(
            source=Spec("float32", dims[self.reads], "strided", "read"),
            scale=Spec("float32", (), "scalar", "factor") if self.scaled else None,
            target=Spec("float32", dims[self.writes], "strided", "written", written=True),
        )


class SumOperands(NamedTuple):
    """In launch order; no operand has the name of a value."""

    source: Any
    scale: Any
    target: Any


SUM = Kernel(
    name="tests.sum",
    operation="sum",
    support=Support(((8, 0), (8, 0)), ("float32",), (), frozenset()),
    tuning=Tuning(config=lambda problem, device, sizes: 7),
    launches="",
)


def step(reads: str, writes: str, **more: Any) -> Step:
    renamed = ("source", reads), ("target", writes), ("scale", "factor")
    return Step(SUM, Sum(reads, writes, **more), 7, renamed)


def three_steps(**more: Any) -> Steps:
    """x into kept, kept into summed, summed into y: as a backward pass has it."""
    launches = step("x", "kept"), step("kept", "summed", scaled=True), step("summed", "y", **more)
    sizes = {"padded": lambda sizes: -(-sizes["rows"] // 4) * 4}
    return Steps(launches, {"kept": None, "summed": 0.0}, sizes)


@pytest.fixture
def asked(monkeypatch):
    """(problem, operands) of every launch, which writes what it reads, scaled.

    It adds nothing to what it writes: scratch without a fill holds whatever memory held.
    """
    seen = []

    def executable(kernel, problem, config, device, route):
        def run(*operands):
            given = SumOperands(*operands)
            seen.append((problem, given))
            given.target[:, :5] = given.source[:, :5] * (given.scale or 1)

        return run

    monkeypatch.setattr(launch, "executable", executable)
    return seen


def test_operands_and_scratch_are_found_by_name(asked):
    values = {"q": torch.empty(0), "x": torch.ones(3, 5, 2), "y": torch.zeros(3, 5, 2), "factor": 2.0}
    steps = three_steps()
    bound = launch.bind(steps, Place(A100, "emulator"), values)
    assert [(s.name, s.shape, s.dtype, s.fill) for s in bound.scratch] == [
        ("kept", (3, 8, 2), torch.float32, None),
        ("summed", (3, 8, 2), torch.float32, 0.0),
    ]
    launch.run(bound, values)
    first, second, third = (given for _, given in asked)
    assert first.source is values["x"] and third.target is values["y"]
    assert first.target is second.source and second.target is third.source
    assert (first.scale, second.scale, third.scale) == (None, 2.0, None)
    assert third.source[:, 5:].eq(0).all() and torch.equal(values["y"], third.source[:, :5])


def test_steps_must_agree_on_what_lies_in_scratch():
    with pytest.raises(ValueError, match="summed must be one tensor of two or more operands, which have"):
        three_steps(dims=("batch", "rows", "two"))
    with pytest.raises(ValueError, match="kept must be one tensor"):
        Steps((step("x", "kept"),), {"kept": None})
    with pytest.raises(ValueError, match="kept is read before a step writes it"):
        Steps((step("kept", "summed"), step("x", "kept")), {"kept": None})


def test_a_kernel_may_answer_in_several_steps():
    around = Kernel("a", "sum", SUM.support, SUM.tuning, "", lambda own, device: Steps((own, step("x", "y"))))
    one = Sum("x", "y")
    assert SUM.steps(one, A100, 7) == Steps((Step(SUM, one, 7),))
    assert around.steps(one, A100, 7).steps == (Step(around, one, 7), step("x", "y"))


@pytest.mark.parametrize("varlen, sink, lse", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100"])
def test_parts_of_keys_and_their_merging(device, varlen, sink, lse):
    """Merging reads what parts write; the sink and the wish for a log-sum-exp are its own."""
    problem = Problem(dtype="float16", head_dim=64, head_dim_v=32, varlen=varlen, sink=sink, lse=lse)
    sizes = problems.Sizes(batch=2, heads_q=4, heads_kv=4, seqlen_q=9, seqlen_k=999)
    steps = dispatch.plan(problem, EMULATED[device], sizes, 3)
    part, merging = steps.values
    assert part[:6] == ("q", "k", "v", "partial_out", "partial_lse", "cu_seqlens_q" if varlen else "")
    assert "sink" not in part and ("sink" in merging) == sink
    assert merging[:4] == ("partial_out", "partial_lse", "out", "lse" if lse else "")
    rows = (18,) if varlen else (2, 9)
    given = {name: torch.empty(*rows, 4, 32) for name in ("q", "k", "v", "out")}
    given |= {"lse": torch.empty(4, 18) if varlen else torch.empty(2, 4, 9), "sink": torch.empty(4)}
    given["cu_seqlens_q"] = given["cu_seqlens_k"] = torch.empty(3)
    shapes = steps.scratch_shapes(given)
    assert shapes == {"partial_out": (3, *rows, 4, 32), "partial_lse": (3, *given["lse"].shape)}


def test_operations_have_kernels_and_problems_of_their_own(monkeypatch):
    """A device's kernels are asked for by what they do; a Problem says which that is."""
    for name, device in EMULATED.items():
        names = {operation: dispatch.arch.load(device, operation) for operation in OPERATIONS}
        assert all(kernel.operation == operation for operation, ks in names.items() for kernel in ks)
        assert dispatch.select(CombineProblem("float16", 64), device).kernel.name == "common.combine", name
        assert dispatch.select(AppendProblem("float16", 64, 64), device).kernel.name == "common.append", name
    assert (Problem.operation, CombineProblem.operation) == ("forward", "combine")

    class Unheard(CombineProblem):
        operation = "unheard"

    monkeypatch.setitem(OPERATIONS, "unheard", "something else")
    refused = dispatch.select(Unheard("float16", 64), A100)
    assert "something else in float16 with head_dim 64" in str(refused)
    assert "there is no kernel for something else" in str(refused)


def test_a_call_a_case_and_words_ask_the_same():
    """The operator's Problem, that of `supports` and that of the command line are one."""
    tensors = [torch.empty(2, 16, heads, 64, dtype=torch.float16) for heads in (4, 2, 2)]
    options = request.Options(
        dropout_p=0.5, softmax_scale=None, causal=True, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        mask=None, score=None, learnable_sink=torch.zeros(4), lse=True, out=None,
    )  # fmt: skip
    asked = problems.problem_of(request.dense(*tensors, options))
    assert asked == precompile.problem_of("float16", (64, 64), ["causal", "gqa", "dropout", "sink", "lse"])
    features = {"gqa": True, "dropout": True, "sink": True, "lse": True}
    said = cute_flash.supports(torch.float16, 64, device="sm80", mask=cute_flash.Causal(), **features)
    assert said.problem == asked
    assert answer_for(CASES["mask_causal"], "sm80").problem == problems.problem(
        dtype="bfloat16", head_dim=64, code=rules.encode([cute_flash.Causal()], []).code, lse=True
    )
    flags = {field.name for field in fields(Problem) if field.type == "bool"} - {"split_kv"}
    assert flags <= set(precompile.WORDS)


RENAMED = {"return_lse": "lse"}


def objects_for(function):
    """An object of its own for each parameter of a function that takes tensors of 16 bits."""
    others = {*quantized.NAMED, "return_attn_probs", "block_table"}
    names = set(inspect.signature(function).parameters) - others
    if function is cute_flash.flash_attn_varlen_func:
        names.remove("block_mask")
    return {name: object() for name in names}


@pytest.mark.parametrize("function", [cute_flash.flash_attn_func, cute_flash.flash_attn_varlen_func])
def test_arguments_of_the_interface_arrive_under_their_names(function, monkeypatch):
    seen: list[tuple] = []
    monkeypatch.setattr(repeat, "forward", lambda *given: seen.append(given) or repeat.Result(None, None))
    given = objects_for(function)
    function(**given, return_attn_probs=False)
    q, k, v, packing, options = seen[0]
    found = {"q": q, "k": k, "v": v} | (packing._asdict() if packing else {}) | options._asdict()
    assert all(found[RENAMED.get(name, name)] is value for name, value in given.items())


@pytest.mark.parametrize("function", [cute_flash.flash_attn_func, cute_flash.flash_attn_varlen_func])
def test_arguments_beside_tensors_of_8_bits_arrive_under_their_names(function, monkeypatch):
    seen: list[tuple] = []
    monkeypatch.setattr(quantized, "forward", lambda *given: seen.append(given) or repeat.Result(None, None))
    given = objects_for(function) | {"q": torch.empty(1, 8, 1, 16, dtype=torch.float8_e4m3fn)}
    scales = {name: object() for name in quantized.NAMED}
    function(**given, **scales, return_attn_probs=False)
    q, k, v, packing, options, descale = seen[0]
    found = {"q": q, "k": k, "v": v} | (packing._asdict() if packing else {}) | options._asdict()
    assert all(found[RENAMED.get(name, name)] is value for name, value in given.items())
    assert all(scales[name] is value for name, value in zip(quantized.NAMED, descale, strict=True))


def test_the_schema_is_that_of_the_call():
    class Given(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor | None
        c: Annotated[float, "Scalar"]
        d: list[int]

    assert schema.arguments(Given) == "Tensor a, Tensor? b, Scalar c, SymInt[] d"
    found = torch.ops.cute_flash.forward.default._schema.arguments
    assert [argument.name for argument in found] == list(request.Call._fields)

    class Wrong(NamedTuple):
        a: dict

    with pytest.raises(TypeError, match=r"Wrong.a is <class 'dict'>; allowed: .*Tensor"):
        schema.arguments(Wrong)


def test_the_steps_of_a_part_are_those_of_its_own_problem():
    """Compile keys know nothing of names: only of kernel, problem, config and device."""
    problem = Problem(dtype="float16", head_dim=64, head_dim_v=64)
    asked = [one.compiled for one in dispatch.steps(problem, A100)]
    part, merging = dispatch.plan(problem, A100, problems.Sizes(1, 1, 1, 1, 999), 2).steps
    assert part.problem == part_of(problem) and {part.compiled, merging.compiled} <= set(asked)

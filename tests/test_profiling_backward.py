"""The backward pass of peers: who has one, what it is held to, which library it comes from."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from profiling import measure, peers, stages
from profiling.stages import speed
from profiling.worker import Settings

SETTINGS = Settings("sm80", True, "unused")


def test_the_backward_pass_of_peers():
    settings = replace(SETTINGS, backward=True)
    keys = [job.key for job in stages.jobs("speed", settings)]
    assert "d64-causal-backward-s96" in keys and len(keys) == len(set(keys))
    assert not any("backward" in job.key for job in stages.jobs("speed", SETTINGS))
    row = measure.Row(64, 64, True, 80, 2, 2, backward=True)
    assert row.flops == replace(row, backward=False).flops * 5 // 2
    found = speed.measure_row(row, settings, {}, lambda text: None)
    states = {name: peer["state"] for name, peer in found["peers"].items()}
    assert states["torch math"] == states["torch flash"] == "ok" and "tflops" in found["peers"]["torch math"]
    assert states["cute_flash"] == "ok" and found["peers"]["cute_flash"]["kernel"] == "sm80.backward"


def test_the_gradients_oracle_notices_a_wrong_one():
    row = measure.Row(64, 64, True, 40, 2, 2, backward=True)
    inputs = row.tensors("cpu", torch.Generator().manual_seed(0))
    gradients = list(peers.prepare("torch math", row, "sm80", [inputs])(0))
    assert measure.GradientOracle(inputs, causal=True).check(gradients) < 0.05
    with pytest.raises(AssertionError, match="d[qkv]: error"):
        measure.GradientOracle(inputs, causal=False).check(gradients)
    for i, name in enumerate(("dq", "dk", "dv")):
        wrong = [g * 1.1 if i == n else g for n, g in enumerate(gradients)]
        with pytest.raises(AssertionError, match=f"{name}: error"):
            measure.GradientOracle(inputs, causal=True).check(wrong)
    with pytest.raises(AssertionError, match="dv is not finite"):
        measure.GradientOracle(inputs, causal=True).check([*gradients[:2], gradients[2] / 0])


def test_flash_attention_3_s_backward_comes_from_a_library_that_has_it(monkeypatch):
    called = {}

    def forward(q, k, v, **how):
        return q + 1, q[..., 0], None, None

    def backward(*tensors, **how):
        called["tensors"], called["how"] = tensors, how
        return (*tensors[1:4], None, None)

    operators = {"fwd": forward, "bwd": backward}
    monkeypatch.setattr(peers, "flash_attention_3", operators.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    row = measure.Row(64, 64, True, 16, 1, 1, backward=True)
    q, k, v = row.tensors("cpu", torch.Generator().manual_seed(0))
    found = peers.prepare("flash-attention-3", row, measure.CUDA, [(q, k, v)])(0)
    assert all(a is b for a, b in zip(found, (q, k, v), strict=True))
    dout, *given, out, lse = called["tensors"]
    assert torch.equal(dout, measure.output_gradient(v, q)) and torch.equal(out, q + 1)
    assert len(given) == 3 and lse.shape == (1, 16, 1)
    assert called["how"] == {"is_causal": True}


def test_fa3_fwd_is_not_asked_for_a_backward_pass(monkeypatch, tmp_path):
    (tmp_path / "fa3_fwd").mkdir()
    (tmp_path / "fa3_fwd" / "_C.abi3.so").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    peers.flash_attention_3.cache_clear()
    with pytest.raises(peers.Missing, match="fa3_fwd: has no bwd; xformers: not installed"):
        peers.flash_attention_3("bwd")
    with pytest.raises(peers.Missing, match="fa3_fwd: Could not load this library"):
        peers.flash_attention_3("fwd")
    peers.flash_attention_3.cache_clear()

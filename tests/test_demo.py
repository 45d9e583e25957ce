"""The demo's model, real weights and all, gives the same embeddings by either attention."""

from __future__ import annotations

from cute_flash import demo, demo_generate, demo_train, flash_attn_func, flash_attn_with_kvcache
from cute_flash.integrations import transformers as integration


def test_demo(capsys, arch):
    assert demo.main(["--arch", arch]) == 0
    printed = capsys.readouterr().out
    assert f"attention: {arch}.forward on" in printed
    assert "largest difference" in printed
    assert printed.count(" 1.000 ( 1.000)") == len(demo.SENTENCES)


def test_demo_notices_a_difference(capsys, arch, monkeypatch):
    """Attention that is off by a twentieth makes the demo fail."""

    def wrong(*args, **kwargs):
        return flash_attn_func(*args, **kwargs) * 1.05

    monkeypatch.setattr(integration.layer, "flash_attn_func", wrong)
    assert demo.main(["--arch", arch]) == 1
    assert "This is wrong" in capsys.readouterr().out


def test_training(capsys, arch):
    """A few steps by either attention: the same losses, which fall."""
    assert demo.main(["--train", "--steps", "4", "--arch", arch]) == 0
    printed, progress = capsys.readouterr()
    assert f"kernels on an emulated {arch}" in progress
    assert "largest difference of the curves" in printed and len(printed.splitlines()) > 6


def test_training_notices_a_wrong_gradient(capsys, monkeypatch):
    """dq, dk and dv of the wrong sign make the curves part."""

    def wrong(q, k, v, **call):
        out = flash_attn_func(q, k, v, **call)
        return 2 * out.detach() - out

    monkeypatch.setattr(demo_train, "flash_attn_func", wrong)
    assert demo.main(["--train", "--steps", "8"]) == 1
    assert "This is wrong" in capsys.readouterr().out


GENERATE = ["--generate", "--steps", "15", "--characters", "6"]


def test_generating(capsys):
    """A few characters by either attention: the same, and their logits are close."""
    assert demo.main(GENERATE) == 0
    printed = capsys.readouterr().out
    assert "characters come before" in printed and printed.count("The kernels |") == 2


def test_generating_notices_a_wrong_key(capsys, monkeypatch):
    """A new value that is not the one that belongs to its key."""

    def wrong(q, k_cache, v_cache, k, v, **call):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v.roll(1, dims=2), **call)

    monkeypatch.setattr(demo_generate, "flash_attn_with_kvcache", wrong)
    assert demo.main(GENERATE) == 1
    assert "This is wrong" in capsys.readouterr().out

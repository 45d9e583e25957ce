"""The demo's model, real weights and all, gives the same embeddings by either attention."""

from __future__ import annotations

from cute_flash import demo, flash_attn_func
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

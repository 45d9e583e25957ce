"""cute_flash as the attention of transformers: small random models against torch's, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralModel

from cute_flash.integrations import transformers as integration
from tests.harness import moved, where

SIZES = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
SIZES["initializer_range"] = 0.2  # so large that attention decides the numbers
TOKENS = torch.arange(36).view(2, 18)
RIGHT_PADDING = (torch.arange(18) < torch.tensor([[18], [11]])).long()


def bert(attention: str):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_attention_heads=2, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False).half().eval()


def mistral(attention: str):
    """Causal, a sliding window of 5, and 4 query heads on 2 KV heads."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    return MistralModel(MistralConfig(**SIZES, **heads, attn_implementation=attention)).half().eval()


def hidden(model, machine: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Last hidden states on the machine at hand, float32 on the CPU."""
    place = moved(torch.empty(0), machine).device
    tokens, mask = TOKENS.to(place), mask if mask is None else mask.to(place)
    with torch.inference_mode(), where(machine):
        return model.to(place)(input_ids=tokens, attention_mask=mask).last_hidden_state.float().cpu()


@pytest.fixture(autouse=True)
def registered():
    integration.register()


MASKS = {"none": None, "ones": torch.ones_like(TOKENS), "padded": RIGHT_PADDING}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("make", [bert, mistral])
def test_same_as_torch(make, mask, machine):
    ours, theirs = (hidden(make(name), machine, mask) for name in (integration.NAME, "sdpa"))
    real = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-2, rtol=0)
    assert theirs[real].abs().max() > 0.5


def test_window_and_padding_matter(machine):
    """The comparison above can fail: without the window, or the padding, the numbers are others."""
    right = hidden(mistral(integration.NAME), machine, RIGHT_PADDING)[RIGHT_PADDING.bool()]
    wide = mistral(integration.NAME)
    wide.config.sliding_window = None
    for layer in wide.layers:
        layer.self_attn.sliding_window = None
    unpadded = hidden(bert(integration.NAME), machine, None)[1]
    padded = hidden(bert(integration.NAME), machine, RIGHT_PADDING)[1]
    assert (hidden(wide, machine, RIGHT_PADDING)[RIGHT_PADDING.bool()] - right).abs().max() > 0.05
    assert (unpadded - padded)[:11].abs().max() > 0.05


def test_left_padding_is_refused(machine):
    with pytest.raises(NotImplementedError, match="padding must be at the right end"):
        hidden(bert(integration.NAME), machine, RIGHT_PADDING.flip(1))


def test_mask_tensors_are_refused(machine):
    with pytest.raises(NotImplementedError, match="takes no mask tensors"):
        hidden(bert(integration.NAME), machine, torch.ones(2, 1, 18, 18).bool())


def test_float32_is_refused(machine):
    with pytest.raises(TypeError, match="float32"):
        hidden(bert(integration.NAME).float(), machine, None)

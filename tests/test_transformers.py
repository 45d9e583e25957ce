"""cute_flash as the attention of transformers: small random models of many families, and what is refused.

A model in half precision with our attention is held to the float32 model with eager attention: its error may
be twice that of the same half-precision model with transformers' own.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from cute_flash.integrations import transformers as integration
from cute_flash.integrations.transformers.layer import ELSEWHERE
from cute_flash.masks import Causal
from tests.accuracy import hold
from tests.harness import moved, where

MACHINE = "cuda" if torch.cuda.is_available() else "sm80"
VOCABULARY = 97
TOKENS = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(1))
REAL = (torch.arange(21) < torch.tensor([[21], [13]])).long()  # padding at the right
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {**SPECIAL, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
GROUPED = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# Family -> class and config of a model, and which attention of transformers' own it has in half precision.
FAMILIES: dict[str, Callable[[], tuple[type, hf.PreTrainedConfig, str]]] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), "sdpa"),
    "qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED), "sdpa"),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=5), "sdpa"),
    "gemma2": lambda: (
        hf.Gemma2ForCausalLM, hf.Gemma2Config(**GROUPED, **MIXED, attn_logit_softcapping=3.0), "eager"
    ),
    "gemma3": lambda: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GROUPED, **MIXED), "sdpa"),
    "gpt_oss": lambda: (hf.GptOssForCausalLM, hf.GptOssConfig(**GROUPED, **MIXED, **EXPERTS), "eager"),
    "llama4": lambda: (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **GROUPED, **CHUNKED, num_local_experts=2, interleave_moe_layer_step=4, intermediate_size_mlp=64
        ),
        "sdpa",
    ),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel, hf.GPT2Config(**SPECIAL, n_embd=128, n_layer=2, n_head=2, n_positions=64), "sdpa"
    ),
    "bert": lambda: (hf.BertForMaskedLM, hf.BertConfig(**SIZES, num_attention_heads=2), "sdpa"),
    "modernbert": lambda: (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(
            **SIZES, num_attention_heads=2, cls_token_id=1, sep_token_id=2, local_attention=8,
            global_attn_every_n_layers=2,
        ),
        "sdpa",
    ),
    "bart": lambda: (
        hf.BartForConditionalGeneration,
        hf.BartConfig(
            **SPECIAL, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            decoder_start_token_id=1, forced_eos_token_id=None,
        ),
        "sdpa",
    ),
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=64, d_ff=64, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        ),
        "sdpa",
    ),
    "vit": lambda: (
        hf.ViTModel,
        hf.ViTConfig(
            hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=24,
            patch_size=8,
        ),
        "sdpa",
    ),
}  # fmt: skip


class Trio:
    """A family's random model: `ours` and `theirs` in half precision, `exact` in float32 and eager."""

    def __init__(self, family: str, machine: str = MACHINE) -> None:
        kind, config, reference = FAMILIES[family]()
        torch.manual_seed(0)
        model = kind(config).eval().half()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4)  # so large that attention decides the numbers
        self.machine = machine
        self.ours, self.theirs, self.exact = (copy.deepcopy(model) for _ in range(3))
        self.ours.set_attn_implementation(integration.NAME)
        self.theirs.set_attn_implementation(reference)
        self.exact.set_attn_implementation("eager")
        self.exact.float()

    def run(self, model, call: Callable) -> torch.Tensor:
        """What `call` makes of a model on the machine at hand, on the CPU."""
        place = moved(torch.empty(0), self.machine).device
        with torch.inference_mode(), where(self.machine):
            return call(model.to(place), lambda x: x.to(place)).float().cpu()

    def hold(self, call: Callable, rows: torch.Tensor | slice = slice(None)) -> None:
        """Assert the rule for the rows of what `call` returns."""
        ours, theirs, exact = (self.run(m, call)[rows] for m in (self.ours, self.theirs, self.exact))
        assert exact.abs().max() > 0.5
        hold("logits", ours, exact, theirs, torch.finfo(torch.float16).eps / 2 * exact.abs().max().item())


@pytest.fixture(autouse=True)
def registered():
    integration.register()


def logits(**told) -> Callable:
    """A call of the model on TOKENS; tensors among `told` are moved to its device."""

    def call(model, place):
        moved_ones = {k: place(v) if isinstance(v, torch.Tensor) else v for k, v in told.items()}
        return model(**{"input_ids": place(TOKENS), **moved_ones}).logits

    return call


DECODERS = ["llama", "mistral", "gemma2", "gpt_oss", "llama4"]


@pytest.mark.parametrize("family", [*DECODERS, "qwen2", "gemma3", "gpt2"])
def test_decoders(family):
    Trio(family).hold(logits(use_cache=False))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders(family, padded):
    real = REAL if padded else torch.ones_like(REAL)
    Trio(family).hold(logits(attention_mask=real), real.bool())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_decoders_with_padding(family, side):
    real = REAL if side == "right" else REAL.flip(1)
    Trio(family).hold(logits(attention_mask=real, use_cache=False), real.bool())


def test_training():
    """Gradients of every parameter, through padding, held to the rule as logits are."""
    models = Trio("llama")
    labels = TOKENS.masked_fill(REAL == 0, -100)
    gradients = []
    for model in (models.ours, models.exact, models.theirs):
        place = moved(torch.empty(0), MACHINE).device
        told = {"input_ids": TOKENS, "attention_mask": REAL, "labels": labels}
        with where(MACHINE):
            model.to(place)(**{name: x.to(place) for name, x in told.items()}).loss.backward()
        gradients.append({name: x.grad.float().cpu() for name, x in model.named_parameters()})
    for name, exact in gradients[1].items():
        atol = torch.finfo(torch.float16).eps / 2 * exact.abs().max().item()
        hold(name, gradients[0][name], exact, gradients[2][name], atol)


def test_a_bias_that_learns_is_refused():
    query, key, value = (moved(torch.zeros(1, 2, 21, 64).half(), MACHINE) for _ in range(3))
    bias = moved(torch.zeros(1, 2, 21, 21).half(), MACHINE).requires_grad_()
    with pytest.raises(NotImplementedError, match="a rule's tensors get none"), where(MACHINE):
        integration.attention(torch.nn.Module(), query, key, value, None, position_bias=bias)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_and_decoder(family):
    """Cross attention to padded keys; T5's bias is added to scores, by head and distance."""
    told = {"attention_mask": REAL, "decoder_input_ids": TOKENS[:, :9], "use_cache": False}
    Trio(family).hold(logits(**told))


def test_vision():
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    Trio("vit").hold(lambda m, place: m(pixel_values=place(pixels.to(m.dtype))).last_hidden_state)


@pytest.mark.parametrize("family", ["mistral", "t5"])
def test_every_architecture(family, machine):
    """Runs of keys per query, padding inside them, and a bias, by the kernels of each tree."""
    models = Trio(family, machine)
    told = {"decoder_input_ids": TOKENS[:, :9]} if family == "t5" else {}
    models.hold(logits(**told, use_cache=False))
    rows = slice(None) if family == "t5" else REAL.bool()
    models.hold(logits(**told, attention_mask=REAL, use_cache=False), rows)


DOCUMENTS = torch.tensor([0, 9, 21], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(9), torch.arange(12)])[None]
LENGTHS = {f"cu_seq_lens_{s}": DOCUMENTS for s in "qk"} | {f"max_length_{s}": 12 for s in "qk"}


@pytest.mark.parametrize("family", ["llama", "mistral", "llama4"])
@pytest.mark.parametrize("told", [{}, LENGTHS], ids=["position_ids", "cu_seq_lens"])
def test_packed_documents(family, told):
    """Two documents in a row: each as it is alone, whichever way they are told."""
    models = Trio(family)
    packed = logits(input_ids=TOKENS[:1], position_ids=POSITIONS, use_cache=False, **told)
    alone = [logits(input_ids=TOKENS[:1, a:b], use_cache=False) for a, b in ((0, 9), (9, 21))]
    ours = models.run(models.ours, packed)
    exact, theirs = (
        torch.cat([models.run(model, call) for call in alone], 1) for model in (models.exact, models.theirs)
    )
    hold("logits", ours, exact, theirs, 1e-3)


def test_packed_by_lengths_alone():
    """No mask at all: a layer is told where sequences begin, those of keys before those of queries."""
    query, key, value = torch.randn(3, 1, 2, 21, 64, generator=torch.Generator().manual_seed(0)).half()
    more = {name: x if isinstance(x, int) else moved(x, MACHINE) for name, x in LENGTHS.items()}
    whole = layer(query, key, value, **more)
    del more["max_length_q"], more["max_length_k"]  # as long as there are rows
    parts = [layer(*(x[:, :, a:b] for x in (query, key, value))) for a, b in ((0, 9), (9, 21))]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole, layer(query, key, value, **more))


def layer(query, key, value, mask: torch.Tensor | None = None, **told) -> torch.Tensor:
    """A layer's attention, causal, on the machine at hand."""
    tensors = [moved(x, MACHINE) for x in (query, key, value)]
    with torch.inference_mode(), where(MACHINE):
        out, weights = integration.attention(torch.nn.Module(), *tensors, moved(mask, MACHINE), **told)
    assert weights is None
    return out.cpu()


GENERATED = [(family, cache, "") for family in DECODERS for cache in ("dynamic", "static")]
GENERATED += [("llama", cache, side) for cache in ("dynamic", "static") for side in ("left", "right")]


def real_of(side: str) -> torch.Tensor:
    """Which of TOKENS are a text's."""
    return {"": torch.ones_like(REAL), "right": REAL, "left": REAL.flip(1)}[side]


def continued(model, place, cache: str, side: str, new: int, **told):
    """What a model generates after TOKENS, `new` tokens by the likeliest each time."""
    options = {"cache_implementation": cache, "max_new_tokens": new, "min_new_tokens": new}
    mask = place(real_of(side))
    return model.generate(place(TOKENS), attention_mask=mask, do_sample=False, **options, **told)


@pytest.mark.parametrize(("family", "cache", "side"), GENERATED)
def test_generate(family, cache, side):
    """What is generated token by token has the logits of the whole text at once."""
    models, new, real = Trio(family), 4, real_of(side)

    def call(model, place):
        told = {"output_logits": True, "return_dict_in_generate": True}
        found = continued(model, place, cache, side, new, **told)
        texts.append(found.sequences.cpu())
        return torch.stack(found.logits, 1)

    texts: list[torch.Tensor] = []
    ours = models.run(models.ours, call)
    mask = torch.cat([real, torch.ones(2, new, dtype=torch.long)], 1)
    positions = (real.cumsum(1) - 1).masked_fill(real == 0, 0)
    positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(new)], 1)  # as `generate` counts
    whole = logits(input_ids=texts[0], attention_mask=mask, position_ids=positions, use_cache=False)
    exact, theirs = (models.run(model, whole)[:, 20:24] for model in (models.exact, models.theirs))
    hold("logits", ours, exact, theirs, 1e-3)


TIE = 5e-3  # of two logits near 1, as half precision on one CPU or another may have them: 5 steps
# Windows of 5 keys end inside what is generated; a window's layers have caches of its length.
GREEDY = [
    ("llama", "static", "right"), ("gemma3", "dynamic", "left"), ("gpt_oss", "static", ""),
    ("mistral", "dynamic", "right"), ("mistral", "static", "left"), ("gpt2", "dynamic", "left"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "cache", "side"), GREEDY)
def test_greedy_decoding_has_the_same_tokens(family, cache, side):
    """As transformers' own attention has in half precision, which other texts would not have; of each text up
    to a token for which there is one as likely."""
    models, new = Trio(family), 7

    def call(model, place):
        told = {"output_logits": True, "return_dict_in_generate": True}
        found = continued(model, place, cache, side, new, **told)
        best = torch.stack(found.logits, 1).float().topk(2).values
        leads = best[..., 0] - best[..., 1]
        return torch.stack([found.sequences[:, TOKENS.shape[1] :].to(leads), leads])

    (ours, _), (theirs, leads) = (models.run(model, call) for model in (models.ours, models.theirs))
    sure = (leads > TIE).cumprod(1).bool()
    assert ours.shape == (2, new) and torch.equal(ours[sure], theirs[sure])
    assert sure[:, :2].all() and sure.sum() > new and not torch.equal(ours[0], ours[1])


def test_mask_of_pairs():
    """A mask of the model's own, boolean or added, for all heads or each."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 21, 64, generator=generator).half()
    shown = torch.rand(2, 1, 21, 21, generator=generator) < 0.5
    bias = torch.randn(1, 2, 21, 21, generator=generator).half()
    hidden = torch.zeros(()).where(shown, -60000.0).half()
    for given, told, added in (
        (shown, {}, hidden),
        (bias + hidden, {}, bias + hidden),
        (hidden, {"position_bias": bias}, bias + hidden),
    ):
        ours = layer(query, key, value, given, **told)
        exact, theirs = (
            torch.nn.functional.scaled_dot_product_attention(
                *(x.to(dtype) for x in (query, key, value)), attn_mask=added.to(dtype)
            ).transpose(1, 2)
            for dtype in (torch.float64, torch.float16)
        )
        hold("out", ours, exact, theirs, 1e-3)


@pytest.mark.parametrize("mask", [None, REAL], ids=["none", "padded"])
def test_compiled_without_a_graph_break(mask):
    models = Trio("llama")
    call = logits(attention_mask=mask, use_cache=False)
    plain = models.run(models.ours, call)
    torch._dynamo.reset()
    models.ours.forward = torch.compile(models.ours.forward, backend="eager", fullgraph=True)
    rows = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(models.run(models.ours, call)[rows], plain[rows], atol=2e-3, rtol=0)


@pytest.mark.parametrize("told", [{"attention_mask": REAL.flip(1)}, {"position_ids": POSITIONS}, {}])
def test_masks_matter(told, monkeypatch):
    """The comparisons above can fail: without what the mask says, the numbers are others."""
    models = Trio("llama4")
    for rule in ("Runs", "PaddedRuns"):
        monkeypatch.setattr(integration.layer, rule, lambda bounds: Causal())
    with pytest.raises(AssertionError, match="logits"):
        models.hold(logits(**told, use_cache=False), told.get("attention_mask", torch.ones(2, 21)).bool())


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"indices": DOCUMENTS, "sinks": DOCUMENTS}, "given indices, sinks, which nothing here reads"),
        ({"head_mask": torch.ones(2)}, "given head_mask"),
        ({"cu_seq_lens_q": DOCUMENTS}, "cu_seq_lens_k is None"),
        (LENGTHS | {"mask": torch.ones(1, 1, 21, 21).bool()}, "beside a mask with a number per pair"),
        (LENGTHS | {"position_bias": torch.zeros(1, 1, 21, 21)}, "beside a floating-point mask or bias"),
        ({"position_bias": torch.zeros(1, 3, 21, 21)}, r"position_bias has shape \(1, 3, 21, 21\); allowed"),
        ({"mask": torch.ones(2, 21)}, r"attention_mask has shape \(2, 21\)"),
        ({"mask": torch.ones(2, 1, 21, 21).long()}, "attention_mask has dtype torch.int64; allowed: bool"),
        ({"mask": torch.zeros(2, 1, 2, 20).int()}, r"int32 of shape \(2, 1, 2, 20\), not what cute_att"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
def test_refused_by_name(told, message):
    told = dict(told)
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=message):
        layer(*torch.zeros(3, 2, 2, 21, 64).half(), told.pop("mask", None), **told)


def test_float32_is_refused():
    models = Trio("bert")
    with pytest.raises(TypeError, match="float32"):
        models.run(models.ours.float(), logits())


def test_arguments_for_other_parts_of_a_model():
    """What reaches every layer on its way elsewhere changes nothing; nor does what says no."""
    tensors = torch.randn(3, 1, 2, 21, 64, generator=torch.Generator().manual_seed(0)).half()
    told = {"use_cache": True, "position_ids": POSITIONS, "output_attentions": False, "indices": None}
    assert torch.equal(layer(*tensors, **told), layer(*tensors))


# What transformers' models pass to an attention function, and is refused unless None or False.
REFUSED = {"block_indices", "indices", "output_attentions", "sinks"}


def test_every_argument_that_transformers_passes_is_known():
    """Read from the source of its models: a new version's new arguments show here."""
    passed: set[str] = set()
    for path in (Path(hf.__file__).parent / "models").glob("*/modeling_*.py"):
        for _, call in re.findall(r"(?ms)^( *)[^\n]*= attention_interface\(\n(.*?)\n\1\)", path.read_text()):
            passed |= set(re.findall(r"(?m)^ *(\w+)=", call))
    known = set(inspect.signature(integration.attention).parameters) | ELSEWHERE | REFUSED
    assert {"scaling", "s_aux", "position_bias", "cu_seq_lens_q"} <= passed <= known

"""What transformers' mask functions become: the very pairs that its own masks show, and bounds that hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

from cute_flash.integrations import transformers as integration
from cute_flash.integrations.transformers.layer import _rules
from cute_flash.integrations.transformers.rules import PaddedRuns, Runs, Shown

CREATE = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "both": masking_utils.create_bidirectional_mask,
    "both_window": masking_utils.create_bidirectional_sliding_window_mask,
}
BATCH, SIZE = 2, 5  # SIZE: of windows and chunks
CACHES = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=27)}


@dataclass(frozen=True)
class Scene:
    """How transformers asks for a mask: tokens seen before, new ones, and what is told of them."""

    mask: str
    new: int = 23
    seen: int = 0
    cache: str = ""
    padding: str = ""
    packed: bool = False
    blocks: bool = False
    vmap: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values() if value)

    def config(self, attention: str) -> LlamaConfig:
        layer = {"window": "sliding", "chunked": "chunked"}.get(self.mask, "full") + "_attention"
        config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
        config.layer_types, config.sliding_window, config.attention_chunk_size = [layer], SIZE, SIZE
        if self.mask == "chunked":
            config.sliding_window = None
        else:
            config.attention_chunk_size = None
        config._attn_implementation = attention
        return config

    def ask(self, attention: str, **more) -> torch.Tensor | None:
        """The mask of transformers for this attention implementation."""
        return CREATE[self.mask](**self.told(attention), **more)

    def told(self, attention: str) -> dict[str, Any]:
        """The arguments of transformers' functions that make masks."""
        config = self.config(attention)
        told = {"config": config, "inputs_embeds": torch.empty(BATCH, self.new, 8), "attention_mask": None}
        told["cache"] = self.filled(config) if self.cache else None
        if self.padding:
            told["attention_mask"] = self.real_tokens()
        if self.packed:
            told["position_ids"] = torch.cat([torch.arange(9), torch.arange(self.new - 9)])[None]
        if self.blocks:
            told["block_sequence_ids"] = torch.full((BATCH, self.new), -1)
            told["block_sequence_ids"][:, 3:12], told["block_sequence_ids"][1, 12:14] = 0, 1
        if self.vmap:
            told["and_mask_function"] = lambda batch, head, q, k: (q + k) % 3 != 0
        return told

    def filled(self, config: LlamaConfig):
        """A cache that has seen as many tokens, in steps as a prompt and its answer make."""
        cache = CACHES[self.cache](config=config)
        for tokens in (self.seen - 2, 1, 1) if self.seen else ():
            cache.update(torch.zeros(BATCH, 1, tokens, 8), torch.zeros(BATCH, 1, tokens, 8), 0)
        return cache

    def real_tokens(self) -> torch.Tensor:
        mask = torch.ones(BATCH, self.seen + self.new, dtype=torch.long)
        at = {"ones": [], "left": slice(0, 4), "right": slice(-6, None), "holes": [2, 3, 7, 11]}[self.padding]
        mask[1, at] = 0
        return mask


SCENES = [
    *(Scene(mask) for mask in CREATE),
    *(Scene(mask, padding=padding) for mask in CREATE for padding in ("left", "right", "holes")),
    *(Scene(mask, packed=True, new=n) for mask in ("causal", "window", "chunked") for n in (10, 23)),
    *(
        Scene(mask, new, seen, cache, padding)
        for mask in ("causal", "window", "chunked")
        for cache in CACHES
        for new, seen in ((4, 0), (9, 0), (1, 3), (1, 8), (3, 9))
        for padding in ("", "ones", "left")
    ),
    *(Scene(mask, blocks=True) for mask in ("causal", "window", "chunked")),
    Scene("causal", blocks=True, packed=True),
    Scene("window", 20, padding="holes", cache="static", blocks=True),
    *(Scene(mask, vmap=True, padding=padding) for mask in CREATE for padding in ("", "left")),
    *(Scene(mask, new=4) for mask in CREATE),
]


@pytest.fixture(autouse=True)
def registered():
    integration.register()


def pairs(given: torch.Tensor | None, scene: Scene, keys: int) -> torch.Tensor:
    """bool (batch, queries, keys): what the rule made of a layer's mask shows, where its bounds hold."""
    q, k = torch.arange(keys - scene.new, keys)[:, None], torch.arange(keys)[None]
    if given is None:
        return ((k <= q) | scene.mask.startswith("both")).expand(BATCH, -1, -1)
    rule = _rules(given, None, None, (BATCH, 1, scene.new, keys))["mask"]
    of_pairs = scene.vmap or (scene.blocks and scene.mask == "chunked")
    assert isinstance(rule, Shown) == of_pairs
    shown = []
    for batch in range(BATCH):
        mask = rule.at(batch, 0, scene.new, keys)
        shown.append(mask.visible(q, k).expand(scene.new, keys))
        if not of_pairs:
            assert_bounds_hold(mask, shown[-1])
    return torch.stack(shown)


def assert_bounds_hold(mask, shown: torch.Tensor) -> None:
    """`keys` leaves out nothing that four rows see, some of them beyond the last; `full` shows all."""
    rows, keys = shown.shape
    for row in range(0, rows, 3):
        q_first, block = row + keys - rows, shown[row : row + 4]
        low, high = (int(bound) for bound in mask.keys(q_first, q_first + 3, keys))
        assert not block[:, : max(low, 0)].any() and not block[:, max(high, 0) :].any()
        low, high = (int(bound) for bound in mask.full(q_first, q_first + 3, keys))
        assert block[:, max(low, 0) : max(high, 0)].all()


def as_transformers(scene: Scene) -> torch.Tensor:
    """bool (batch, queries, keys): the mask of transformers' own, never left out."""
    skip = "bidirectional" if scene.mask.startswith("both") else "causal"
    return scene.ask("sdpa", **{f"allow_is_{skip}_skip": False})[:, 0]


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_same_pairs_as_transformers_own_mask(scene):
    theirs = as_transformers(scene)
    assert torch.equal(pairs(scene.ask(integration.NAME), scene, theirs.shape[-1]), theirs)


COMPILED = [
    Scene("causal"),
    Scene("causal", padding="ones"),
    Scene("causal", packed=True),
    Scene("window", padding="left"),
    Scene("both", padding="ones"),
]


@pytest.mark.parametrize("scene", COMPILED, ids=str)
def test_compiled_without_a_graph_break(scene):
    """The numbers of a mask are looked at outside torch.compile only; what is visible is the same."""
    theirs, told = as_transformers(scene), scene.told(integration.NAME)
    torch._dynamo.reset()
    ours = torch.compile(CREATE[scene.mask], backend="eager", fullgraph=True)(**told)
    assert torch.equal(pairs(ours, scene, theirs.shape[-1]), theirs)


def test_no_mask_where_none_is_needed():
    """No padding, no window that cuts what a cache has not let go: the kernels' own causal, or nothing."""
    for scene in (
        Scene("causal"), Scene("causal", padding="ones"), Scene("causal", 3, 9, "dynamic"),
        Scene("window", 4), Scene("chunked", 4), Scene("both"), Scene("both", padding="ones"),
        Scene("both_window", 4), Scene("window", 1, 8, "dynamic"), Scene("window", 1, 9, "dynamic", "ones"),
    ):  # fmt: skip
        assert scene.ask(integration.NAME) is None, scene


def test_size_of_a_mask():
    """Numbers per query and key, not per pair."""
    assert Scene("window").ask(integration.NAME).shape == (BATCH, 1, 2, 23)
    assert Scene("causal", 3, 9, "static").ask(integration.NAME).shape == (BATCH, 1, 2, 3)
    assert Scene("causal", 3, 9, "dynamic", "left").ask(integration.NAME).shape == (BATCH, 1, 3, 12)


def test_models_that_rework_a_mask_get_one_of_pairs():
    """As transformers' own is where a model asks for it by forbidding to leave it out."""
    ours = Scene("causal").ask(integration.NAME, allow_is_causal_skip=False)
    assert torch.equal(ours, Scene("causal").ask("sdpa", allow_is_causal_skip=False))


def test_the_first_interface_of_transformers_5():
    """It gave the queries' positions in place of q_length and q_offset."""
    told = {"batch_size": 1, "kv_length": 12, "cache_position": torch.arange(9, 12)}
    mask = masking_utils.sliding_window_causal_mask_function(SIZE)
    ours = integration.visible_keys(**told, mask_function=mask, local_size=SIZE)
    assert ours[0, 0].tolist() == [[5, 6, 7], [10, 11, 12]]
    told["cache_position"] = torch.arange(12)
    assert integration.visible_keys(**told) is None


def test_wrong_bounds_are_noticed():
    """The comparison above can fail: a first key or a last one left out, a key shown that is hidden."""
    shown = torch.tensor([[True, True, False], [True, True, True]])
    right = torch.tensor([[[0, 0], [2, 3]]]).int()
    assert_bounds_hold(Runs(right).at(0, 0, 2, 3), shown)
    for bounds in ([[1, 1], [2, 3]], [[0, 0], [2, 2]], [[0, 0], [3, 3]]):
        with pytest.raises(AssertionError):
            assert_bounds_hold(Runs(torch.tensor([bounds]).int()).at(0, 0, 2, 3), shown)
    padding = torch.tensor([[[0, 0, 0], [2, 3, 0], [1, 1, 3]]]).int()
    assert PaddedRuns(padding).at(0, 0, 2, 3).visible(2, 1).item() is False

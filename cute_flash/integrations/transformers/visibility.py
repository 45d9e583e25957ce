"""Which keys each query sees, from transformers' mask functions: once per forward, for all layers.

A mask function of transformers says of index tensors (batch, head, q, k) which pairs are visible. All that
it comes with (causal, windows, chunks, packed documents, blocks that see each other) show every query one
run of keys around its own position. So a run per query is what layers are handed, O(seqlen) numbers, with
no branch on numbers while torch.compile traces.

    index of a position: its place among the keys, position - kv_offset
    runs    int32 (batch, 1, 2, q_length): first visible key, end of the visible keys
    padded  int32 (batch, 1, 3, max(q_length, kv_length)), with the first padding from each key on
    other   what the eager mask would be, bool (batch, 1, q_length, kv_length)

Four dimensions, as transformers hands a mask of four on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, or_masks, sdpa_mask

# The code of every union of mask functions: while torch.compile traces, closures cannot be looked into.
_UNION = or_masks(causal_mask_function).__code__


class Place(NamedTuple):
    """Where queries and keys stand. q_offset: position of the first query; a tensor for static caches."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: Any
    kv_offset: int
    device: Any


def visible_keys(
    *,
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    cache_position: torch.Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    config: Any = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    """What transformers hands to every layer as its mask: runs as above; None where a layer's own words do.

    attention_mask: bool (batch, tokens so far), False where a token is padding, wherever that is.
    local_size: window or chunk of the mask function. allow_is_bidirectional_skip: given by bidirectional
    masks only. cache_position: what transformers 5.0 gives instead of q_length and q_offset, the queries'
    positions. use_vmap: there are functions of the model's own inside mask_function. dtype: of no matter.
    """
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    if device is None:
        device = "cpu" if attention_mask is None else attention_mask.device
    place = Place(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    bidirectional = allow_is_bidirectional_skip is not None
    if not bidirectional and mask_function is bidirectional_mask_function:
        bidirectional = True
    padded = _is_padded(attention_mask, kv_offset + kv_length if bidirectional else 0)
    plain = mask_function is (bidirectional_mask_function if bidirectional else causal_mask_function)
    may_skip = allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip
    if not padded and may_skip and _words_suffice(place, bidirectional, plain, local_size, config):
        return None
    reworked = plain and not may_skip and q_length > 1
    if use_vmap or reworked or _joins_chunks(mask_function, config, local_size):
        # The model says itself who sees whom, or will work on the mask's numbers.
        return _every_pair(place, mask_function, attention_mask, use_vmap, cache_position)
    first, end = _runs(place, mask_function, bidirectional, plain, local_size)
    if not padded:
        return torch.stack([first, end], dim=1)[:, None].int()
    return _with_padding(place, first, end, attention_mask)


def _is_padded(attention_mask: torch.Tensor | None, tokens: int) -> bool:
    """Whether there may be padding among the first `tokens` keys, or those that the mask tells of.

    While compiling a mask counts as padded: to know better would be to branch on its numbers.
    """
    if attention_mask is None:
        return False
    if torch.compiler.is_compiling() or attention_mask.shape[-1] < tokens:
        return True
    return not bool(attention_mask.all())


def _words_suffice(
    place: Place, bidirectional: bool, plain: bool, local_size: int | None, config: Any
) -> bool:
    """Whether is_causal says all: no key is out of a window's or chunk's reach, none is still to come."""
    if not plain and (local_size is None or place.kv_length >= local_size):
        return not bidirectional and _all_in_reach(place, local_size, config)
    if bidirectional:
        return True
    if isinstance(place.q_offset, torch.Tensor):
        return place.q_length == place.kv_length
    return place.q_offset + place.q_length == place.kv_offset + place.kv_length


def _all_in_reach(place: Place, local_size: int | None, config: Any) -> bool:
    """Whether one query comes after keys that are all in its window, as the cache of a window keeps them."""
    if place.q_length != 1 or isinstance(place.q_offset, torch.Tensor) or not _is_window(config, local_size):
        return False
    return place.q_offset + 1 == place.kv_offset + place.kv_length and place.kv_length <= local_size


def _is_window(config: Any, local_size: int | None) -> bool:
    """Whether local_size is that of a window, not of a chunk."""
    if local_size is None or getattr(config, "attention_chunk_size", None) == local_size:
        return False
    return getattr(config, "sliding_window", None) == local_size


def _joins_chunks(mask_function: Callable, config: Any, local_size: int | None) -> bool:
    """Whether blocks join neighbours of two chunks: a query then sees less than the next one's neighbours."""
    if local_size is None or _is_window(config, local_size):
        return False
    return getattr(mask_function, "__code__", None) is _UNION


def _every_pair(
    place: Place,
    mask_function: Callable,
    attention_mask: torch.Tensor | None,
    use_vmap: bool,
    cache_position: torch.Tensor | None,
) -> torch.Tensor:
    """bool (batch, 1, q_length, kv_length)."""
    queries = {"q_length": place.q_length, "q_offset": place.q_offset, "device": place.device}
    if cache_position is not None:
        queries = {"cache_position": cache_position}
    return sdpa_mask(
        batch_size=place.batch,
        kv_length=place.kv_length,
        kv_offset=place.kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        **queries,
    ).contiguous()


def _runs(
    place: Place, mask_function: Callable, bidirectional: bool, plain: bool, local_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First visible key and end of the visible keys of each query, int64 (batch, q_length)."""
    shape = (place.batch, place.q_length)
    own = torch.arange(place.q_length, device=place.device) + (place.q_offset - place.kv_offset)
    if plain and bidirectional:
        return own.new_zeros(shape), own.new_full(shape, place.kv_length)
    if plain:
        return own.new_zeros(shape), (own + 1).clamp(0, place.kv_length).expand(shape)
    first, end = _runs_of_positions(place, mask_function, bidirectional, local_size)
    own = own.clamp(0, place.kv_length - 1)
    return first[:, own], end[:, own]


def _runs_of_positions(
    place: Place, mask_function: Callable, bidirectional: bool, local_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The run of a query at each key's position: neighbours that see each other, cut by the window.

    A run ends where a position does not see its neighbour. A window is beyond the sight of neighbours, and
    its size is told. A chunk's size is told as well, and cuts nothing that its ends do not.
    """
    count = place.kv_length
    index = torch.arange(count, device=place.device)[None]
    sees_left = _sees(place, mask_function, index, -1)
    sees_right = _sees(place, mask_function, index, 1)
    first = torch.where(sees_left, 0, index).cummax(dim=1).values
    end = torch.where(sees_right, count, index + 1).flip(1).cummin(dim=1).values.flip(1)
    if local_size is None:
        return first, end
    if bidirectional:
        return torch.maximum(first, index - local_size), torch.minimum(end, index + local_size + 1)
    # Who sees what comes after it belongs to a block that is visible to all of itself, a window or not.
    seen_from_left = torch.nn.functional.pad(sees_right[:, :-1], (1, 0))
    block = torch.where(seen_from_left, 0, index).cummax(dim=1).values
    return torch.maximum(first, torch.minimum(index - local_size + 1, block)), end


def _sees(place: Place, mask_function: Callable, index: torch.Tensor, step: int) -> torch.Tensor:
    """Whether each position sees the one `step` from it, which must be among the keys: bool (batch, keys)."""
    other = index + step
    inside = (other >= 0) & (other < place.kv_length)
    batch = torch.arange(place.batch, device=index.device)[:, None]
    q = index + place.kv_offset
    k = torch.where(inside, other, index) + place.kv_offset
    return (mask_function(batch, torch.zeros_like(batch), q, k) & inside).expand(place.batch, -1)


def _with_padding(
    place: Place, first: torch.Tensor, end: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Runs without the padding at their ends, and for each key the first padding from it on."""
    count, pad = place.kv_length, torch.nn.functional.pad
    missing = max(place.kv_offset + count - attention_mask.shape[-1], 0)
    real = pad(attention_mask.bool(), (0, missing))[:, place.kv_offset : place.kv_offset + count]
    index = torch.arange(count, device=real.device)
    padding = torch.where(real, count, index).flip(1).cummin(dim=1).values.flip(1)
    first_real = count - torch.where(real, count - index, 0).amax(dim=1, keepdim=True)
    end_real = torch.where(real, index + 1, 0).amax(dim=1, keepdim=True)
    rows = (torch.maximum(first, first_real), torch.minimum(end, end_real), padding)
    width = max(place.q_length, count)
    return torch.stack([pad(row, (0, width - row.shape[1])) for row in rows], dim=1)[:, None].int()

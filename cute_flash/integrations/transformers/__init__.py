"""cute_flash as an attention implementation of Hugging Face transformers.

    from cute_flash.integrations import transformers
    transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="cute_attention", dtype=torch.float16)

    visibility  once per forward: transformers' mask function -> one small tensor for all layers
    layer       in every layer: that tensor, or a mask or bias of the model's own -> a rule and a call
    rules       the rules: a run of keys per query, tables of a mask and of a bias

The name avoids the word "flash": transformers takes any name that contains it for one of the hub's kernels,
downloads that, and has some models pass packed sequences in a way of their own.
"""

from __future__ import annotations

from ...extras import missing

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

from .layer import NAME, attention
from .visibility import visible_keys

__all__ = ["NAME", "attention", "register", "visible_keys"]


def register() -> None:
    """Make `attn_implementation="cute_attention"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, visible_keys)

"""cute_flash: exact FlashAttention for Ampere, Hopper and Blackwell in the CuTe Python DSL."""

from .api import flash_attn_combine, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .block_mask import BlockMask, create_block_mask
from .dispatch import emulated, features, supports
from .masks import Causal, Document, Mask, PrefixLM, SlidingWindow
from .scores import ALiBi, Score, Softcap

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "BlockMask",
    "Causal",
    "Document",
    "Mask",
    "PrefixLM",
    "Score",
    "SlidingWindow",
    "Softcap",
    "__version__",
    "create_block_mask",
    "emulated",
    "features",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "supports",
]

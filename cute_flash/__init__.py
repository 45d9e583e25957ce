"""cute_flash: exact FlashAttention for Ampere, Hopper and Blackwell in the CuTe Python DSL."""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from .api import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )
    from .block_mask import BlockMask, create_block_mask
    from .dispatch import emulated, features, supports
    from .fp8 import flash_attn_fp8_func, flash_attn_varlen_fp8_func
    from .masks import Causal, Document, Mask, PrefixLM, SlidingWindow
    from .merging import flash_attn_combine, merge_states
    from .quantization import Quantized, quantize
    from .quantized import flash_attn_quantized_func
    from .scheduling import SchedulerMetadata, get_scheduler_metadata
    from .scores import ALiBi, Score, Softcap

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "BlockMask",
    "Causal",
    "Document",
    "Mask",
    "PrefixLM",
    "Quantized",
    "SchedulerMetadata",
    "Score",
    "SlidingWindow",
    "Softcap",
    "__version__",
    "create_block_mask",
    "emulated",
    "features",
    "flash_attn_combine",
    "flash_attn_fp8_func",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_quantized_func",
    "flash_attn_varlen_fp8_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_states",
    "quantize",
    "supports",
]


def __getattr__(name: str) -> None:
    """Without torch there is the emulator, and nothing else."""
    if name in __all__:
        raise ImportError(f"cute_flash.{name} needs torch, which is not installed (the emulator does not)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

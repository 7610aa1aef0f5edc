"""GPU memory by model size and method, and what the recipe chooses by it, as support/memory.py computes them.

    python benchmarks/gpu_memory.py

Models of Qwen2.5's shapes without their numbers: nothing is downloaded, and no GPU is needed.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import get_peft_config

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_grpo
from support.memory import FIXED_PASS, USABLE, fit, gpu_memory, longest
from support.settings import Settings

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("vocab_size", "tie_word_embeddings")
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
METHODS = {
    "full": {},
    "LoRA": {"use_peft": True},
    "LoRA, bf16 base": {"use_peft": True, "dtype": "bfloat16"},
    "QLoRA": {"use_peft": True, "dtype": "bfloat16", "load_in_4bit": True},
}
# GiB that they report
GPUS = {"16 GB": 15.8, "24 GB": 23.6, "40 GB": 39.4, "48 GB": 47.5, "80 GB": 79.2, "141 GB": 139.8}


def shaped(size: str, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """A model of Qwen2.5's shape on the `meta` device."""
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**dict(zip(FIELDS, SHAPES[size], strict=True)))).to(dtype)


def policy(size: str, method: str, **changes):
    """The policy without its numbers, and the recipe's settings for it."""
    constants = {name.lower(): value for name, value in vars(train_grpo).items() if name.isupper()}
    settings = Settings(**{**constants, "use_cpu": True, **METHODS[method], **changes})
    model = shaped(size, getattr(torch, settings.dtype))
    if settings.use_peft:
        model = get_peft_model(model, get_peft_config(settings))
    return model, settings


def chosen(size: str, method: str, gib: float, vllm: bool) -> str:
    """Tokens a pass on a GPU, no more than a step's, and whether activations are recomputed; '-' where the run does not
    fit."""
    model, settings = policy(size, method, use_vllm=vllm)
    total = int(gib * 2**30)
    fit(model, settings, total)
    if gpu_memory(model, settings, total)["most"] > USABLE * total:
        return "-"
    tokens = min(settings.tokens_per_pass, settings.per_device_train_batch_size * longest(settings))
    return f"{tokens:,}{' recomputed' if settings.gradient_checkpointing else ''}"


def main() -> None:
    print(f"| needs, recomputing, {FIXED_PASS:,} tokens a pass | " + " | ".join(METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for size in SHAPES:
        cells = []
        for method in METHODS:
            model, settings = policy(size, method, gradient_checkpointing=True, tokens_per_pass=FIXED_PASS)
            parts = gpu_memory(model, settings)
            cells.append(f"{parts['most'] / 1e9:.0f} GB ({parts['held'] / 1e9:.0f} held)")
        print(f"| {size} | " + " | ".join(cells) + " |")
    print("\n| tokens a pass on | " + " | ".join(GPUS) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for size in SHAPES:
        for method, vllm in (("full", False), ("full", True), ("LoRA", False), ("QLoRA", False)):
            cells = (chosen(size, method, gib, vllm) for gib in GPUS.values())
            print(f"| {size} {method}{' and vLLM' if vllm else ''} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

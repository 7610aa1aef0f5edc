"""The table of GPU memory by model size and method, computed by memory.py with the recipe's constants.

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
from memory import gpu_memory, held, peak

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary, tied embeddings
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
METHODS = {"full": [], "LoRA": ["--use_peft", "true"], "QLoRA": ["--use_peft", "true", "--load_in_4bit", "true"]}


def shaped(size: str) -> Qwen2ForCausalLM:
    hidden, mlp, layers, heads, key_heads, vocabulary, tied = SHAPES[size]
    with torch.device("meta"):
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_heads,
                tie_word_embeddings=tied,
            )
        )


def main() -> None:
    print("| model | " + " | ".join(METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for size in SHAPES:
        cells = []
        for method, words in METHODS.items():
            recipe, config, model_config = train_grpo.read_settings(
                ["--use_cpu", "true", "--output_dir", "outputs/of-no-run", *words]
            )
            model = shaped(size)
            if model_config.use_peft:
                model = get_peft_model(model, get_peft_config(model_config))
            parts = gpu_memory(model, config, recipe.max_prompt_length, quantized=method == "QLoRA")
            cells.append(f"{peak(parts) / 1e9:.0f} GB ({held(parts) / 1e9:.0f} held)")
        print(f"| {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

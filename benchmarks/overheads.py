"""What the recipe's own code costs outside a training step: its start, its rewards, its evaluation.

    python benchmarks/overheads.py              # about 5 minutes on two CPU cores

- start: `train_grpo.py --help` and a configuration error, against a process that only imports TRL's config classes.
- rewards: microseconds that the five functions together take a completion, at 250 to 64,000 characters.
- evaluation: 1,319 problems by support/generation.py's `complete`, against one bare `generate` loop over the same
  prompts, sorted by length, at the better of several batch sizes. A tiny random policy, so that what is not the model
  weighs most.

What is compared takes turns; ratios are medians with the smallest and the largest.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo
import train_grpo
from evaluate import Task
from rewards import REWARD_FUNCS, XML_COT_FORMAT, to_prompt
from support.generation import complete

BARE_START = "from trl import GRPOConfig, ModelConfig, TrlParser"
LENGTHS = (250, 1_000, 4_000, 16_000, 64_000)
PROBLEMS, LIMIT = 1319, 32  # GSM8K's test split; tokens a completion
BATCHES = (64, 128, 256, 512)


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def start(rounds: int) -> None:
    commands = {
        "--help": [train_grpo.__file__, "--help"],
        "a configuration error": [train_grpo.__file__, "--use_cpu", "true", "--num_generations", "1"],
    }
    ratios = {name: [] for name in commands}
    for number in range(rounds + 1):
        bare = _seconds(["-c", BARE_START])
        for name, words in commands.items():
            ratio = _seconds(words) / bare
            if number:  # the first one fills the disk's cache
                ratios[name].append(ratio)
    for name, values in ratios.items():
        print(f"start: {name} takes {spread(values)} times a bare import of TRL's config classes, n = {rounds}")


def _seconds(words: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def rewards(rounds: int) -> None:
    for length in LENGTHS:
        text = XML_COT_FORMAT.format(reasoning="2 + 3 makes 5. " * (length // 15), answer="5")[:length]
        completions = [[{"role": "assistant", "content": text}]] * 64
        times = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            for function in REWARD_FUNCS:
                function(prompts=[None] * 64, completions=completions, answer=["5"] * 64)
            times.append((time.perf_counter() - begin) / 64 * 1e6)
        each = f"{median(times):.1f} us ({min(times):.1f}-{max(times):.1f})"
        print(
            f"rewards: {each} a completion of {length:,} characters, {median(times) / length * 1000:.2f} us a thousand"
        )


def evaluation(rounds: int, out: Path) -> None:
    demo.write_problems(out / "problems")
    problems = Task("", dataset_name=str(out / "problems"), dataset_test_split="train").problems()
    tokenizer = demo.train_tokenizer(demo.taught_by(seed=0)[:1000])
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(demo.architecture(tokenizer)).eval()
    policy.generation_config.eos_token_id = None  # every batch takes all its tokens
    prompts = [to_prompt(problems[i % len(problems)]["question"]) for i in range(PROBLEMS)]

    def bare(batch: int) -> None:
        texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        texts.sort(key=len)
        for begin in range(0, len(texts), batch):
            inputs = tokenizer(texts[begin : begin + batch], return_tensors="pt", padding=True)
            with torch.no_grad():
                ids = policy.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
            tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def timed(call, *args) -> float:
        begin = time.perf_counter()
        call(*args)
        return time.perf_counter() - begin

    best = min(BATCHES, key=lambda batch: timed(bare, batch))
    ratios = []
    for _ in range(rounds):
        loop = timed(bare, best)
        ratios.append(timed(complete, policy, tokenizer, prompts, LIMIT) / loop)
    print(f"evaluation: {spread(ratios)} times a bare generate loop of batch {best} ({loop:.0f} s), n = {rounds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/overheads"))
    args = parser.parse_args()
    start(args.rounds)
    rewards(20 * args.rounds)
    evaluation(args.rounds, args.out)


if __name__ == "__main__":
    main()

"""What the lean step saves: tokens of a step on paper, and seconds of the update against TRL's.

    python benchmarks/lean_step.py --dataset /data/gsm8k                                              # tokens, seconds
    python benchmarks/lean_step.py --dataset /data/gsm8k --model models/SmolLM2-135M-Instruct --use_cpu   # and time

A step is 4 problems x 16 completions, which TRL computes in `--passes` passes, and the recipe in passes of at most
`--tokens_per_pass` tokens. The completions are solutions of GSM8K in the recipe's format, drawn at random and truncated
at the limit: what a policy writes after a cold start is as long, and an update's time depends on lengths alone.
`--zero_advantage` is the share of the groups whose completions all earn the same; TRL's update does not depend on it.
Each update makes the same steps in a process of its own, so that its peak is its own; the first is not counted.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

GROUPS, SIZE = 4, 16
ZERO_ADVANTAGE = (0.0, 0.25, 0.5, 0.75)  # shares of the groups


def drawn(args) -> list[tuple[list[dict], list[list[str]]]]:
    """Steps: 4 problems each, and 16 solutions as texts for each of them."""
    from cold_start import target
    from evaluate import Task

    problems = Task("", dataset_name=str(args.dataset), dataset_test_split="train").problems()
    rng = random.Random(0)

    def solution() -> str:
        problem = rng.choice(problems)
        return target(problem["rationale"], problem["answer"])

    return [
        (rng.sample(problems, GROUPS), [[solution() for _ in range(SIZE)] for _ in range(GROUPS)])
        for _ in range(args.steps + 1)
    ]


# ---- tokens, on paper


def computed(prompts: list[int], completions: list[list[int]], without: int, limit: int) -> tuple[int, int]:
    """Tokens of a step as TRL computes it, and as the recipe does in passes of at most `limit` tokens, from prompt
    lengths and completion lengths by group, of which the first `without` groups have no advantage."""
    from support.lean_step import into_passes

    def padded(rows) -> int:  # tokens of one pass
        return len(rows) * sum(max(row[i] for row in rows) for i in (0, 1))

    rows = [
        (prompt, length, number >= without)  # the third: whether it has a gradient
        for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
        for length in group
    ]
    return padded(rows), sum(padded([rows[i] for i in numbers]) for (numbers,) in into_passes([rows], limit))


def on_paper(args, tokenizer) -> str:
    from rewards import to_prompt
    from support.problems import tokenize

    totals = {share: [0, 0] for share in ZERO_ADVANTAGE}
    for problems, solutions in drawn(argparse.Namespace(**{**vars(args), "steps": 199})):
        prompts = [len(ids) for ids in tokenize(tokenizer, [to_prompt(problem["question"]) for problem in problems])]
        lengths = [[min(len(ids) + 1, args.limit) for ids in tokenizer(group)["input_ids"]] for group in solutions]
        for share, total in totals.items():
            for i, tokens in enumerate(computed(prompts, lengths, int(share * GROUPS), args.tokens_per_pass)):
                total[i] += tokens
    lines = ["| zero-advantage groups | tokens of TRL's step | of the recipe's | TRL / recipe |", "|---|---|---|---|"]
    for share, (theirs, ours) in totals.items():
        lines.append(f"| {share:.0%} | {theirs / 200:,.0f} | {ours / 200:,.0f} | {theirs / ours:.2f} |")
    return "\n".join(lines)


# ---- seconds


def measure(args) -> dict:
    """Train on drawn completions instead of sampled ones; seconds of each step but the first, and peak memory."""
    import torch
    from transformers import TrainerCallback

    import rewards
    import train_grpo
    from benchmarks import turns
    from support.problems import load_tokenizer
    from support.record import Run
    from support.settings import read_settings

    is_ours = args.measure == "recipe"
    passes = 1 if is_ours else args.passes  # ours is split by its tokens
    words = {
        "model_name_or_path": args.model,
        "dataset_name": args.dataset,
        "output_dir": args.out / f"run-{os.getpid()}",
        "use_cpu": args.use_cpu,
        "bf16": args.bf16,
        "lean_step": is_ours,
        "per_device_train_batch_size": GROUPS * SIZE // passes,
        "gradient_accumulation_steps": passes,
        **({"tokens_per_pass": args.tokens_per_pass} if is_ours else {}),
        "gradient_checkpointing": "false",
        "max_completion_length": args.limit,
        "max_steps": args.steps + 1,
        "save_strategy": "no",
        "eval_steps": "0",
        "use_vllm": "false",
    }
    settings = read_settings(vars(train_grpo), [word for k, v in words.items() for word in (f"--{k}", str(v))])
    tokenizer = load_tokenizer(settings.model_name_or_path)
    steps = drawn(args)
    samples = [
        {"prompt": rewards.to_prompt(problem["question"]), "answer": problem["answer"]}
        for problems, _ in steps
        for problem in problems
    ]
    texts = {
        problem["question"]: group
        for problems, groups in steps
        for problem, group in zip(problems, groups, strict=True)
    }
    without = int(args.zero_advantage[0] * GROUPS)
    teaching = {problem["question"] for problems, _ in steps for problem in problems[without:]}

    def chance(prompts, completions, **kwargs):  # every completion of a group another reward, or all the same
        asked = [prompt[-1]["content"] for prompt in prompts]
        return [float(i % SIZE) if question in teaching else 0.0 for i, question in enumerate(asked)]

    rewards.REWARD_FUNCS[:] = [chance]
    settings.shuffle_dataset = False  # the steps as they were drawn
    trainer = train_grpo.build_trainer(settings, tokenizer, samples, [], Run(settings))
    seconds, began = [], []

    def generate(prompt_ids, *rest, **kwargs):
        number = len(began)
        questions = [problem["question"] for problem in steps[number][0]]
        ids = [ids for question in questions for ids in tokenizer(texts[question])["input_ids"]]
        began.append(time.perf_counter())  # what follows is scoring and the update
        return [[*row, tokenizer.eos_token_id][: args.limit] for row in ids], None

    class Clock(TrainerCallback):
        def on_step_end(self, *rest, **kwargs):
            if settings.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began[-1])

    trainer._generate_single_turn = generate
    trainer.callback_handler.callbacks.insert(0, Clock())
    turns.wait(args.turn)
    trainer.train()
    resident = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    is_cuda = settings.device.type == "cuda"
    shares = [row["computed_tokens"] for row in trainer.state.log_history if "computed_tokens" in row]
    return {
        "seconds": seconds[1:],
        "peak": torch.cuda.max_memory_allocated() if is_cuda else resident,
        "tokens": mean(shares[1:]) if shares else 1.0,
    }


def in_a_process(name: str, share: float) -> dict:
    words = [*sys.argv[1:], "--measure", name, "--zero_advantage", str(share)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("MEASURED "):
            return json.loads(line.removeprefix("MEASURED "))
    sys.exit(f"{name} could not be measured (status {done.returncode}):\n{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", type=Path, required=True, help="a folder with GSM8K's train.jsonl")
    parser.add_argument(
        "--tokenizer", help="whose tokens are counted (default: the model's, else Qwen2.5's from the Hub)"
    )
    parser.add_argument("--model", help="folder or Hub name; without one tokens are counted alone")
    parser.add_argument("--limit", type=int, default=256, help="tokens of a completion (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that is not (%(default)s)")
    parser.add_argument(
        "--zero_advantage", type=float, nargs="+", default=[0.0, 0.5], help="shares of the groups (%(default)s)"
    )
    parser.add_argument("--passes", type=int, default=4, help="of TRL's step; more need less memory (%(default)s)")
    parser.add_argument("--tokens_per_pass", type=int, default=4096, help="of the recipe's, at most (%(default)s)")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/lean_step"))
    parser.add_argument("--measure", choices=["trl", "recipe"], help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("MEASURED " + json.dumps(measure(args)))
        return
    from support.problems import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer or args.model or "Qwen/Qwen2.5-1.5B-Instruct")
    passes = f"ours in passes of at most {args.tokens_per_pass:,} tokens"
    print(f"200 steps of {GROUPS * SIZE} completions, on paper, {passes}\n\n{on_paper(args, tokenizer)}", flush=True)
    if not args.model:
        return
    print("\n| zero-advantage groups | update | s a step | TRL / recipe | tokens computed | peak GB |", flush=True)
    print("|---" * 6 + "|")
    theirs = in_a_process("trl", 0.0)
    for share in args.zero_advantage:
        results = {"trl": theirs, "recipe": in_a_process("recipe", share)}
        ratios = [a / b for a, b in zip(*(result["seconds"] for result in results.values()), strict=True)]
        for name, result in results.items():
            ratio = f"{mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if name == "recipe" else ""
            cells = [f"{share:.0%}", name, f"{mean(result['seconds']):.1f}", ratio]
            print(
                "| " + " | ".join([*cells, f"{result['tokens']:.0%}", f"{result['peak'] / 1e9:.1f}"]) + " |", flush=True
            )


if __name__ == "__main__":
    main()

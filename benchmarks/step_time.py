"""Seconds a GRPO step takes, and where they go, for named settings that take turns in one run.

    python benchmarks/step_time.py --model 1.5B                     # a GPU: Qwen2.5's shape with random weights
    python benchmarks/step_time.py --model 1.5B --settings recipe trl-vllm trl-vllm-one-pass lora checkpointing
    python benchmarks/step_time.py --model demo --use_cpu --no-bf16 --completion_length 48 --learning_rate 1e-4 \\
        --steps 79 --settings original-fp32 trl recipe              # the demo's whole run, as it learns: 10 minutes
    python benchmarks/step_time.py --model models/SmolLM2-135M-Instruct --use_cpu --completion_length 64

Every setting makes 64 completions a step under one length limit. Random weights, which earn nothing, get random
rewards. Each measurement is a process of its own, so that its peak is its own; its first step is not counted. Prints a
table for Markdown: the mean over a turn's steps, of which the median over the rounds, hours for an epoch of GSM8K at
that pace, the ratio to the first setting with its smallest and largest round, the share of the recipe's own code
(rewards and callbacks), and how far generation and update are from their floors.
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
from statistics import mean, median

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo
import train_grpo
from benchmarks import turns
from benchmarks.gpu_memory import SHAPES, shaped
from benchmarks.on_demo import taught_policy
from rewards import REWARD_FUNCS
from support.memory import choose_by_memory, device_memory, gpu_memory
from support.problems import load_tokenizer
from support.record import Run, device_name
from support.settings import read_settings

COMPLETIONS = 64  # a step: the recipe's own constants
EPOCH = 1868  # steps: 4 of GSM8K's 7,473 problems each
PASSES_OF_16 = {"per_device_train_batch_size": "16", "gradient_accumulation_steps": "4"}
ONE_PASS = {"per_device_train_batch_size": "64", "gradient_accumulation_steps": "1"}
TRL = {"lean_step": "false", "use_vllm": "false"}  # TRL's own update
ORIGINAL = {  # the widely copied gist: bf16 weights, KL to a reference model, and each 16 completions generated alone
    **TRL,
    **PASSES_OF_16,
    "steps_per_generation": "1",
    "dtype": "bfloat16",
    "beta": "0.04",
    "loss_type": "grpo",
    "gradient_checkpointing": "false",
}
SETTINGS = {
    "original": ORIGINAL,
    "original-fp32": {**ORIGINAL, "dtype": "float32"},  # for a CPU, most of which compute slowly in bf16
    "recipe": {},
    "trl": {**TRL, **PASSES_OF_16},
    "trl-one-pass": {**TRL, **ONE_PASS},
    "trl-vllm": {**TRL, **PASSES_OF_16, "use_vllm": "true"},
    "trl-vllm-one-pass": {**TRL, **ONE_PASS, "use_vllm": "true"},  # TRL's own best where that fits
    "bare": {**TRL, **PASSES_OF_16},  # in a plain GRPOTrainer: no samples, lines, curves or safeguards
    "transformers": {"use_vllm": "false"},
    "vllm": {"use_vllm": "true"},
    "vllm-sleeping": {"use_vllm": "true", "vllm_enable_sleep_mode": "true"},
    "checkpointing": {"gradient_checkpointing": "true"},
    "bf16-weights": {"dtype": "bfloat16"},
    "reference": {"beta": "0.04"},
    "four-generations": {**PASSES_OF_16, "steps_per_generation": "1"},
    "small-passes": {"tokens_per_pass": "1024"},
    "one-pass": {"tokens_per_pass": "1000000"},
    "lora": {"use_peft": "true"},
    "lora-bf16-base": {"use_peft": "true", "dtype": "bfloat16"},
    "qlora": {"use_peft": "true", "load_in_4bit": "true"},
    "eager-attention": {"attn_implementation": "eager"},
    "unfused-adamw": {"optim": "adamw_torch"},
    "tf32": {"tf32": "true"},
    "cast-each-token": {},  # as Transformers does, instead of keeping the weights' bf16 copies for a generation
}


# ---- one measurement


def measure(name: str, args) -> dict:
    """Train a few steps; seconds and tokens of each but the first."""
    words = {
        "model_name_or_path": args.model,
        "dataset_name": str(args.dataset),
        "output_dir": str(args.out / f"run-{os.getpid()}"),
        "use_cpu": str(args.use_cpu),
        "max_completion_length": str(args.completion_length),
        "max_steps": str(args.steps + 1),
        "save_strategy": "no",
        "eval_steps": "0",
        "bf16": str(args.bf16),
        "learning_rate": str(args.learning_rate),
        **({"vllm_gpu_memory_utilization": "0.1"} if args.turn else {}),  # others wait beside it
        **SETTINGS[name],
    }
    settings = read_settings(vars(train_grpo), [word for k, v in words.items() for word in (f"--{k}", v)])
    if args.random_rewards:
        REWARD_FUNCS[:] = [random_reward]
    if args.turn and settings.use_vllm:
        turns.fix_cache()
    tokenizer = load_tokenizer(settings.model_name_or_path)
    samples, _ = train_grpo.load_samples(settings, tokenizer)
    if name in ("original", "original-fp32", "bare"):
        trainer = _bare(settings, tokenizer, samples)
    else:
        trainer = train_grpo.build_trainer(settings, tokenizer, samples, [], Run(settings))
    if name == "cast-each-token":
        trainer.keeps_copies = False
    clock = _clock(trainer)
    turns.wait(args.turn)
    trainer.train()
    is_cuda = settings.device.type == "cuda"
    computed = None
    if is_cuda:
        computed = gpu_memory(trainer.model, settings, device_memory(settings.device))["most"]
    # of a process, not by getrusage: what that gives begins at the parent's peak
    resident = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return {
        **{key: [row[key] for row in clock.steps[1:]] for key in clock.steps[0]},
        "generations_a_step": settings.gradient_accumulation_steps // settings.steps_per_generation,
        "batch": settings.per_device_train_batch_size,
        "checkpointing": bool(settings.gradient_checkpointing),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else resident,
        "computed_bytes": computed,
        "device": device_name(settings.device),
    }


def random_reward(completions, **kwargs) -> list[float]:
    """Another one for each completion. By the recipe's rewards what random weights write earns nothing, and the lean
    step leaves out completions without an advantage."""
    return [random.random() for _ in completions]


def _bare(settings, tokenizer, samples):
    """TRL's trainer without anything of the recipe's."""
    choose_by_memory(settings)  # as the recipe's own does
    dataset = Dataset.from_list(samples).select_columns(["prompt", "answer"])
    return trl.GRPOTrainer(
        settings.model_name_or_path, REWARD_FUNCS, args=settings, train_dataset=dataset, processing_class=tokenizer
    )


def _clock(trainer):
    """Time the trainer's generation, its scoring and the whole step."""

    def now():
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_train_begin(self, *args, **kwargs):
            self.begun = now()
            self.row = dict.fromkeys(("generation", "scoring", "callbacks", "tokens", "longest", "read"), 0)

        def on_step_end(self, *args, **kwargs):  # the last callback: a step ends with the line of the one before
            seconds = now() - self.begun
            rest = seconds - sum(self.row[key] for key in ("generation", "scoring", "callbacks"))
            self.steps.append({"step": seconds, "update": rest, **self.row})
            self.on_train_begin()

    clock = Clock()

    def timed(owner, name, key, count=None):
        method = getattr(owner, name)

        def wrapper(*args, **kwargs):
            start = now()
            result = method(*args, **kwargs)
            clock.row[key] += now() - start
            if count:
                count(*args, result)
            return result

        setattr(owner, name, wrapper)

    def count(prompts, *rest):
        completions = rest[-1][0]
        clock.row["tokens"] += sum(map(len, completions))
        clock.row["longest"] += max(map(len, completions))  # decode steps: a batch lasts as long as its longest
        clock.row["read"] += sum(map(len, prompts)) + sum(map(len, completions))

    timed(trainer, "_generate_single_turn", "generation", count)
    timed(trainer, "_calculate_rewards", "scoring")
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("support."):
            for event in ("on_step_begin", "on_pre_optimizer_step", "on_substep_end", "on_step_end", "on_log"):
                timed(callback, event, "callbacks")
    trainer.add_callback(clock)
    return clock


# ---- floors


def machine(use_cpu: bool) -> dict:
    """Memory bandwidth (bytes read and written a second by a copy) and bf16 matrix throughput (operations a second)."""
    device = torch.device("cpu" if use_cpu else "cuda")
    size = 2048 if use_cpu else 8192
    source = torch.ones(1 << (28 if use_cpu else 32), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)

    def best(call, repeats=10):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            if not use_cpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if sum(times) > 10:  # seconds: some processors are very slow in bf16
                break
        return min(times)

    return {
        "bandwidth": 2 * source.numel() / best(lambda: target.copy_(source)),
        "throughput": 2 * size**3 / best(lambda: matrix @ matrix),
    }


def floors(result: dict, speeds: dict) -> dict:
    """The least seconds a step: decoding reads the bf16 weights once a decode step, or computes with them for every
    completion where that takes longer; the update computes 6 operations a parameter and token, 8 with recomputation. A
    lean step can be below the latter, by the completions that it leaves out."""
    parameters = result["parameters"]
    operations = (8 if result["checkpointing"] else 6) * parameters
    per_token = 2 * parameters / speeds["throughput"]
    read = 2 * parameters / speeds["bandwidth"]
    return {
        "generation": max(mean(result["longest"]) * read, mean(result["tokens"]) * per_token),
        "update": mean(result["read"]) * operations / speeds["throughput"],
    }


# ---- all of them


def prepare(args) -> tuple[Path, Path]:
    """Folders of the model and of the problems; a shape gets random weights."""
    problems = args.dataset or args.out / "problems"
    if args.dataset is None:
        demo.write_problems(problems)
    if args.model == "demo":
        return taught_policy(args.out / "demo", 42, args.use_cpu), problems
    if args.model not in SHAPES:
        return Path(args.model), problems
    folder = args.out / f"random-{args.model}"
    if not folder.is_dir():
        tokenizer = args.tokenizer and load_tokenizer(args.tokenizer)
        write_random(args.model, tokenizer or demo.train_tokenizer(demo.taught_by(seed=0)[:1000]), folder)
    return folder, problems


def write_random(size: str, tokenizer, folder: Path) -> None:
    """A model of Qwen2.5's shape with random weights in bf16, in a folder that appears whole."""
    torch.manual_seed(0)
    model = shaped(size, torch.bfloat16).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    partial_folder = folder.with_name(f"{folder.name}.partial")
    for part in (model, tokenizer):
        part.save_pretrained(partial_folder)
    partial_folder.rename(folder)


def table(rounds: list[dict[str, dict]], speeds: dict) -> str:
    names = list(rounds[0])
    lines = [
        "| setting | s a step | h an epoch | times faster | completions/s | tokens/s | generation | update | own code "
        "| peak GB (computed) | generation / floor | update / floor |",
        "|---" * 12 + "|",
    ]
    for name in names:
        results = [each[name] for each in rounds]
        steps = [mean(result["step"]) for result in results]
        first = [mean(each[names[0]]["step"]) for each in rounds]
        ratios = sorted(a / b for a, b in zip(first, steps, strict=True))
        part = {k: median(mean(r[k]) for r in results) for k in ("step", "generation", "update", "tokens")}
        own = median(mean(map(sum, zip(r["scoring"], r["callbacks"], strict=True))) for r in results)
        floor, seconds = floors(results[-1], speeds), part["step"]
        cells = [
            name,
            f"{seconds:.2f}",
            f"{seconds * EPOCH / 3600:.1f}",
            f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            f"{COMPLETIONS / seconds:.1f}",
            f"{part['tokens'] / seconds:,.0f}",
            *(f"{seen / seconds:.1%}" for seen in (part["generation"], part["update"], own)),
            f"{max(result['peak_bytes'] for result in results) / 1e9:.1f}"
            + (f" ({results[0]['computed_bytes'] / 1e9:.1f})" if results[0]["computed_bytes"] else ""),
            *(f"{part[k] / floor[k]:.1f}" for k in ("generation", "update")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="1.5B", help="0.5B, 1.5B, 3B, 7B (random weights), demo, or a folder")
    parser.add_argument("--settings", nargs="+", default=["original", "recipe"], choices=SETTINGS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="times that each setting has its turn")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a turn, after one that is not")
    parser.add_argument("--completion_length", type=int, default=512, help="limit in tokens")
    parser.add_argument("--dataset", type=Path, help="folder with train.jsonl; the demo's problems where left out")
    parser.add_argument("--tokenizer", help="folder or Hub name, for random weights; the demo's where left out")
    parser.add_argument("--random_rewards", action="store_true", help="as with random weights, which earn nothing else")
    parser.add_argument("--learning_rate", type=float, default=train_grpo.LEARNING_RATE, help="(%(default)s)")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/step_time"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("MEASURED " + json.dumps(measure(args.measure, args)))
        return
    if not args.use_cpu and not torch.cuda.is_available():
        on_cpu = "--model demo --use_cpu --no-bf16 --completion_length 48"
        sys.exit(f"step_time.py: no CUDA GPU is visible; for a CPU: {on_cpu}")
    args.out.mkdir(parents=True, exist_ok=True)
    model, dataset = prepare(args)
    speeds = machine(args.use_cpu)
    print(f"copy {speeds['bandwidth'] / 1e9:,.0f} GB/s, bf16 matrices {speeds['throughput'] / 1e12:,.2f} TFLOP/s")
    rounds, more = [], ["--random_rewards"] if args.model in SHAPES else []
    for number in range(args.rounds):
        rounds.append({})
        for name in args.settings:
            rounds[-1][name] = result = _in_a_process(name, model, dataset, more)
            print(f"round {number + 1}  {name:<16} {mean(result['step']):8.2f} s a step", flush=True)
        (args.out / "step_time.json").write_text(json.dumps({"machine": speeds, "rounds": rounds}, indent=1) + "\n")
    completions = f"{COMPLETIONS} completions of at most {args.completion_length} tokens"
    print(f"\n{args.model}, {result['device']}, {completions}, {args.rounds} rounds of {args.steps} steps\n")
    print(table(rounds, speeds))


def _in_a_process(name: str, model: Path, dataset: Path, more: list[str]) -> dict:
    # of two flags the last counts
    words = [*sys.argv[1:], "--measure", name, "--model", model, "--dataset", dataset, *more]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("MEASURED "):
            return json.loads(line.removeprefix("MEASURED "))
    sys.exit(f"{name} could not be measured (status {done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()

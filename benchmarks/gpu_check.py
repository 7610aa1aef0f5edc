"""Everything that wants a CUDA GPU, in one go: tests, demo, speed, memory, precision, and learning on real data.

    python benchmarks/gpu_check.py --out gpu_check
    python benchmarks/gpu_check.py --out gpu_check --smollm2 models/SmolLM2-135M-Instruct --gsm8k /data/gsm8k
    python benchmarks/gpu_check.py --out gpu_check --only tests demo speed-0.5B

Needs no network. Each part is a command with a time limit of its own and a log of its own in --out; one that fails or
runs out of time does not stop the next. Prints a table last. Without --smollm2 and --gsm8k the parts that need them are
left out, and the table says so.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]


def parts(args) -> dict[str, tuple[int, list[list[str]] | None]]:
    """Name -> seconds and commands, run one after the other; None where something they need is not there."""
    out, python = args.out, sys.executable
    runs = out / "runs"

    def step_time(model: str, *settings: str, rounds: int = args.rounds) -> list[str]:
        words = ["--model", model, "--settings", *settings, "--out", str(runs / f"step_time-{model}")]
        return [python, "benchmarks/step_time.py", *words, "--rounds", str(rounds)]

    def recipe(*words: str) -> list[str]:
        return [python, "train_grpo.py", "--use_vllm", "false", *words]

    has_vllm = find_spec("vllm") is not None
    real = args.smollm2 and args.gsm8k
    run = str(runs / "smollm2")
    learned = ["--model_name_or_path", str(args.smollm2), "--dataset_name", str(args.gsm8k), "--output_dir", run]
    learned += ["--cold_start_examples", "512", "--cold_start_epochs", "3", "--cold_start_learning_rate", "1e-4"]
    learned += ["--learning_rate", "2e-5", "--max_completion_length", "256", "--max_steps", str(args.learning_steps)]
    test_split = ["--dataset_name", str(args.gsm8k), "--max_completion_length", "256", "--use_vllm", "false"]
    precision = [python, "benchmarks/precision.py", "--out", str(runs / "precision-smollm2")]
    precision += ["--model", f"{run}/cold-start", "--dataset", str(args.gsm8k)]
    return {
        "environment": (60, [["nvidia-smi"], [python, "-m", "pip", "freeze"]]),
        "tests": (300, [[python, "-m", "pytest", "-m", "gpu", "-n", "0", "-s", "-rs"]]),
        "demo": (300, [recipe("--demo", "--output_dir", str(runs / "demo"))]),
        "speed-0.5B": (
            600,
            [step_time("0.5B", "original", "trl", "transformers", "cast-each-token", "checkpointing", "tf32")],
        ),
        "speed-1.5B": (900, [step_time("1.5B", "original", "trl", "transformers", "cast-each-token", "bf16-weights")]),
        "speed-vllm": (900, [step_time("1.5B", "original", "vllm", "vllm-sleeping")] if has_vllm else None),
        "memory": (
            900,
            [
                step_time(size, "transformers", "checkpointing", "lora", rounds=1)
                for size in ("0.5B", "1.5B", "3B", "7B")
            ],
        ),
        "precision-demo": (600, [[python, "benchmarks/precision.py", "--out", str(runs / "precision")]]),
        "learning": (args.learning_seconds, [recipe(*learned)] if real else None),
        "learned": (
            600,
            [
                [python, "evaluate.py", str(args.smollm2), *test_split, "--output_dir", str(runs / "before")],
                [python, "evaluate.py", f"{run}/cold-start", *test_split, "--compare", str(runs / "before")],
                [python, "evaluate.py", run, *test_split, "--compare", f"{run}/cold-start"],
            ]
            if real
            else None,
        ),
        "precision-smollm2": (600, [[*precision, "--steps", "20", "--completion_length", "256"]] if real else None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and runs")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct (benchmarks/smollm2.py)")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--only", nargs="+", help="parts to run")
    parser.add_argument("--rounds", type=int, default=3, help="of step_time.py")
    parser.add_argument("--learning_steps", type=int, default=300)
    parser.add_argument("--learning_seconds", type=int, default=1500)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check.py: no CUDA GPU is visible")
    for name in ("out", "smollm2", "gsm8k"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).absolute())
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = parts(args)
    if unknown := set(args.only or ()) - chosen.keys():
        sys.exit(f"gpu_check.py: no such part: {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    rows = []
    for name, (limit, commands) in chosen.items():
        if args.only and name not in args.only:
            continue
        outcome, seconds = run_part(args.out / f"{name}.log", limit, commands)
        rows.append(f"{name:<20}{outcome:<28}{seconds:>7.0f} s")
        print(rows[-1], flush=True)
    print("\n" + "\n".join(rows) + f"\ndetails: {args.out}/*.log")


def run_part(log: Path, limit: int, commands: list[list[str]] | None) -> tuple[str, float]:
    """Run a part's commands into `log` under one limit; what became of it, and seconds."""
    if commands is None:
        return "left out: needs more", 0.0
    begin, failed = time.monotonic(), 0
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        for command in commands:
            print("$", *command, file=file, flush=True)
            left = limit - (time.monotonic() - begin)
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                failed += process.wait(max(1, left)) != 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                process.wait()
                return f"out of its {limit} s", time.monotonic() - begin
            except OSError as error:  # no such command
                print(error, file=file)
                failed += 1
    outcome = "done" if not failed else f"{failed} of {len(commands)} commands failed"
    return outcome, time.monotonic() - begin


if __name__ == "__main__":
    main()

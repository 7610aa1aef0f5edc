"""fp32 master weights against pure bf16: what a step changes, what is learned, what it costs.

    python benchmarks/precision.py --use_cpu                                   # the demo, three seeds: 10 minutes
    python benchmarks/precision.py --model models/SmolLM2-135M-Instruct --dataset /data/gsm8k --steps 20

Compute is bf16 in both. `changed` is the share of weights that the first step, at the full learning rate, leaves
different from the start. `reward` is the mean over the last quarter of the steps. Settings take turns, a seed each.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo
import train_grpo
from benchmarks.on_demo import taught_policy, words

SETTINGS = {"fp32 master weights": "float32", "pure bf16": "bfloat16"}


def train(seed: int, dtype: str, steps: int, out: Path, args) -> Path:
    """A run of the recipe; its folder."""
    flags = {
        "model_name_or_path": args.folder(seed),
        "dataset_name": args.dataset,
        "output_dir": out,
        "seed": seed,
        "dtype": dtype,
        "bf16": "true",
        "use_cpu": args.use_cpu,
        "use_vllm": "false",
        "learning_rate": args.learning_rate,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "max_completion_length": args.completion_length,
        "eval_steps": 0,
        "sample_every": 0,
        "save_strategy": "no",
    }
    command = [sys.executable, train_grpo.__file__, *words(flags)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"{out} could not be trained:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return out


def changed(before: Path, after: Path) -> float:
    """Share of the weights that differ, each as it is kept: fp32 against the start in fp32, bf16 in bf16."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    names = old.keys() & new.keys()  # tied embeddings are saved once or twice
    different = sum(int((old[name].to(new[name].dtype) != new[name]).sum()) for name in names)
    return different / sum(new[name].numel() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder; the demo's taught policy of each seed where left out")
    parser.add_argument("--dataset", help="folder; the demo's problems where left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, help="the recipe's 5e-6; the demo's 1e-4 without --model")
    parser.add_argument("--completion_length", type=int, default=48, help="limit in tokens")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/precision"))
    args = parser.parse_args()
    default = train_grpo.LEARNING_RATE if args.model else float(demo.GRPO["learning_rate"])
    args.learning_rate = args.learning_rate or default
    if args.model is None:
        for seed in args.seeds:
            taught_policy(args.out / "demo", seed, args.use_cpu)
        args.dataset = args.out / "demo" / "problems"
    args.folder = lambda seed: Path(args.model or args.out / "demo" / f"taught-{seed}")

    rows = {name: [] for name in SETTINGS}
    for seed in args.seeds:
        for name, dtype in SETTINGS.items():
            one = train(seed, dtype, 1, args.out / f"one-{dtype}-{seed}", args)
            run = train(seed, dtype, args.steps, args.out / f"{dtype}-{seed}", args)
            log = json.loads((run / "trainer_state.json").read_text())["log_history"]
            log = [row for row in log if "reward" in row]
            last = mean(row["reward"] for row in log[-max(1, len(log) // 4) :])
            row = changed(args.folder(seed), one), log[0]["reward"], last, median(r["step_time"] for r in log[1:])
            rows[name].append(row)
            print(
                f"seed {seed}, {name}: {row[0]:.1%} changed, reward {row[1]:.2f} -> {row[2]:.2f}, {row[3]:.2f} s a step"
            )
    print(f"\n{args.steps} steps at {args.learning_rate:g}, seeds {args.seeds}\n")
    print("| weights | changed by a step | reward at first | reward at last | s a step |\n" + "|---" * 5 + "|")
    for name, values in rows.items():
        columns = list(zip(*values, strict=True))
        spread = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
        print(
            f"| {name} | {mean(columns[0]):.1%} | {mean(columns[1]):.2f} | {mean(columns[2]):.2f} +- {spread[2]:.2f} "
            f"| {mean(columns[3]):.2f} +- {spread[3]:.2f} |"
        )


if __name__ == "__main__":
    main()

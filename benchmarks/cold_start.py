"""What a cold start is worth on the demo: GRPO steps to 90% strict accuracy with and without it.

    python benchmarks/cold_start.py --out outputs/cold-start-demo      # 5 seeds: 20 minutes on two CPU cores

Each seed teaches its own policy, as `python train_grpo.py --demo --seed SEED` does, and starts GRPO from it twice: as
it is, and after supervised fine-tuning on 64 solved problems. Greedy strict accuracy is measured on 100 held-out
problems every 5 steps, before the first one too; a run ends when it reaches 90%.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_grpo
from support import demo

EXAMPLES = 64
ENOUGH = 90.0  # per cent


def steps_to_enough(folder: Path, policy: Path, seed: int, examples: int) -> tuple[int | None, float, float]:
    """The first measured step at `ENOUGH`, None where the run ends before; strict accuracy at step 0; seconds."""
    settings = {
        **demo.settings(),
        "model_name_or_path": policy,
        "dataset_name": policy.with_name("problems"),
        "output_dir": folder,
        "seed": seed,
        "cold_start_examples": examples,
        "eval_steps": 5,
        "sample_every": 0,
    }
    if not examples:  # its other settings would have no effect, which is refused
        settings = {name: value for name, value in settings.items() if not name.startswith("cold_start_")}
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    command = [sys.executable, "-u", train_grpo.__file__, *words]
    begun, first, log = time.time(), None, folder.with_suffix(".err")
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    for line in process.stdout:
        if line.startswith("held out at step "):
            step, strict = int(line.split()[4].split("/")[0]), float(line.split("strict ")[1].split("%")[0])
            first = strict if first is None else first
            if strict >= ENOUGH:
                process.kill()
                process.wait()
                return step, first, time.time() - begun
    if process.wait() != 0:
        sys.exit(f"a run ended with status {process.returncode}: see {log}")
    return None, first, time.time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    steps = {0: [], EXAMPLES: []}
    print("seed  examples  strict at step 0  steps to 90%  seconds")
    for seed in args.seeds:
        policy = demo.make_world(args.out, seed, use_cpu=demo.settings()["use_cpu"])
        for examples, reached in steps.items():
            step, first, seconds = steps_to_enough(args.out / f"{seed}-{examples}", policy, seed, examples)
            reached.append(step)
            print(f"{seed:>4}  {examples:>8}  {first:>15.1f}%  {step!s:>12}  {seconds:>7.0f}", flush=True)
    for examples, reached in steps.items():
        there = [step for step in reached if step is not None]
        spread = f"{mean(there):.1f} +- {stdev(there):.1f}" if len(there) > 1 else there
        print(f"{examples} examples: {len(there)} of {len(reached)} runs reached 90%, after {spread} steps")


if __name__ == "__main__":
    main()

"""What a cold start is worth on the demo: GRPO steps to 90% strict accuracy with and without it.

    python benchmarks/cold_start.py --out outputs/cold-start-demo      # 5 seeds: 20 minutes on two CPU cores

Each seed teaches its own policy, as `python demo.py --seed SEED` does, and starts GRPO from it twice: as it is, and
after a cold start (`cold_start.py`) on 64 solved problems. Greedy strict accuracy is measured on 100 held-out
problems every 5 steps, before the first one too; a run ends when it reaches 90%.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.on_demo import EXAMPLES, ROOT, cold_started, precision, settings, taught_policy, words

ENOUGH = 90.0  # per cent


def steps_to_enough(folder: Path, taught: Path, seed: int, examples: int) -> tuple[int | None, float, float]:
    """The first measured step at `ENOUGH`, None where the run ends before; strict accuracy at step 0; seconds."""
    begun, first, log = time.time(), None, folder.with_suffix(".err")
    policy = cold_started(taught, folder.with_name(f"{folder.name}-cold"), seed) if examples else taught
    flags = settings(taught, policy, folder, seed) | {"eval_steps": 5, "sample_every": 0}
    command = [sys.executable, "-u", str(ROOT / "train_grpo.py"), *words(flags)]
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
        taught = taught_policy(args.out, seed, precision()["use_cpu"])
        for examples, reached in steps.items():
            step, first, seconds = steps_to_enough(args.out / f"{seed}-{examples}", taught, seed, examples)
            reached.append(step)
            print(f"{seed:>4}  {examples:>8}  {first:>15.1f}%  {step!s:>12}  {seconds:>7.0f}", flush=True)
    for examples, reached in steps.items():
        there = [step for step in reached if step is not None]
        spread = f"{mean(there):.1f} +- {stdev(there):.1f}" if len(there) > 1 else there
        print(f"{examples} examples: {len(there)} of {len(reached)} runs reached 90%, after {spread} steps")


if __name__ == "__main__":
    main()

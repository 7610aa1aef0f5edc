"""A thousand steps of GRPO, killed and stopped at random moments, against the same run left alone.

    python benchmarks/soak.py --out outputs/soak                # 1,000 steps, 24 kills and signals: about 20 minutes

The demo's tiny policy, on the CPU; the disturbed run is resumed with `--resume_from_checkpoint auto` each time. Both
must end in the same weights, with the same prompts, completions and rewards at every step; resident memory of the run
left alone must not grow after its first tenth.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import pandas as pd
import psutil
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_grpo
from support import demo
from support.checkpoints import checkpoints

SEED = 42  # of the policy and of both runs
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SETTINGS = {
    "use_cpu": "true",
    "bf16": "false",
    "save_steps": 10,
    "sample_every": 0,
    "eval_steps": 0,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "false",
    "max_completion_length": 32,
    "learning_rate": demo.LEARNING_RATE,
    "disable_tqdm": "true",
}


def launch(policy: Path, output: Path, steps: int, *more: str) -> subprocess.Popen:
    settings = {**SETTINGS, "max_steps": steps, "output_dir": output}
    settings |= {"model_name_or_path": policy, "dataset_name": policy.with_name("problems")}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-u", train_grpo.__file__, *words, *more]
    with output.with_suffix(".err").open("a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


def steps_of(process: subprocess.Popen):
    """The number of each step, as it is printed."""
    for line in process.stdout:
        if line.startswith("step "):
            yield int(line.removeprefix("step ").split("/")[0])


def left_alone(policy: Path, output: Path, steps: int) -> dict[int, float]:
    """Run to the end; resident memory in MB by step."""
    process = launch(policy, output, steps)
    memory = {step: psutil.Process(process.pid).memory_info().rss / 1e6 for step in steps_of(process)}
    if process.wait() != 0:
        sys.exit(f"the run left alone ended with status {process.returncode}: see {output}.err")
    return memory


def disturbed(policy: Path, output: Path, steps: int, times: int, rng: random.Random) -> list[tuple[int, str]]:
    """Run to the end through `times` kills and signals; the step and kind of each."""
    happened = []
    while True:
        resume = ["--resume_from_checkpoint", "auto"] if checkpoints(output) else []
        if not resume:
            shutil.rmtree(output, ignore_errors=True)  # killed before its first checkpoint
        process = launch(policy, output, steps, *resume)
        lasts, begun, number = rng.randint(1, max(1, 3 * steps // (2 * times))), None, rng.choice(list(STATUS))
        for step in steps_of(process):
            begun = step if begun is None else begun
            if step >= begun + lasts and len(happened) < times:
                time.sleep(rng.random() * 0.4)  # somewhere in the next step, or in a save
                process.send_signal(number)
                happened.append((step, number.name))
                for _ in process.stdout:
                    pass
                break
        status = process.wait()
        if status == 0:
            return happened
        if not happened or status != STATUS[number]:
            sys.exit(f"ended with status {status} after {happened[-1:]}: see {output}.err")
        print(f"  {happened[-1][1]} after step {happened[-1][0]}", flush=True)


def differences(first: Path, second: Path, steps: int) -> list[str]:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    found = [name for name in one if not one[name].equal(other[name])]
    for step in range(1, steps + 1):
        name = f"completions/completions_{step:05d}.parquet"
        if not pd.read_parquet(first / name).equals(pd.read_parquet(second / name)):
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--times", type=int, default=24, help="kills and signals")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    policy = demo.make_world(args.out, SEED, use_cpu=True)

    memory = left_alone(policy, args.out / "left-alone", args.steps)
    rss = [mean(memory[step] for step in memory if k < 10 * step / args.steps <= k + 1) for k in range(10)]
    print(f"resident memory in MB, mean over each tenth of the run: {' '.join(f'{mb:.0f}' for mb in rss)}", flush=True)

    happened = disturbed(policy, args.out / "disturbed", args.steps, args.times, random.Random(args.seed))
    kinds = {kind: sum(name == kind for _, name in happened) for kind in sorted({name for _, name in happened})}
    found = differences(args.out / "left-alone", args.out / "disturbed", args.steps)
    print(f"{len(happened)} interruptions ({kinds}) in {args.steps:,} steps: {len(found)} differences {found[:5]}")
    sys.exit(1 if found or rss[-1] > 1.05 * rss[1] else 0)


if __name__ == "__main__":
    main()

"""A thousand steps of GRPO, killed and stopped at random moments, against the same run left alone.

    python benchmarks/soak.py --out outputs/soak                # 1,000 steps, 24 kills and signals: about 20 minutes
    python benchmarks/soak.py --out outputs/soak-2 --processes 2 --steps 300 --times 12    # by accelerate launch

The demo's tiny policy, on the CPU; the disturbed run is started with the same command each time, which ends in
`--resume_from_checkpoint auto`. Both must end in the same weights, with the same prompts, completions and rewards at
every step; resident memory of the run left alone must not grow after its first tenth. Of several processes the
launcher, the main one and another are hit in turns, and none may be left behind.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pandas as pd
import psutil
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo
import train_grpo
from benchmarks.on_demo import taught_policy, words

SEED = 42  # of the policy and of both runs
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}  # of one process; a launcher has its own
PATIENCE = 120  # seconds until all processes must be gone: a step, a save, and the launcher's own 30 seconds
LAUNCH = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SETTINGS = {
    "use_cpu": "true",
    "bf16": "false",
    "save_steps": 10,
    "sample_every": 0,
    "eval_steps": 0,
    "num_generations": 8,
    "per_device_train_batch_size": 16,  # which several processes share
    "gradient_checkpointing": "false",
    "max_completion_length": 32,
    "learning_rate": demo.GRPO["learning_rate"],
    "disable_tqdm": "true",
}


def launch(policy: Path, output: Path, steps: int, processes: int) -> subprocess.Popen:
    settings = {**SETTINGS, "max_steps": steps, "output_dir": output}
    settings |= {"model_name_or_path": policy, "dataset_name": policy.with_name("problems")}
    settings |= {"resume_from_checkpoint": "auto"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), *LAUNCH]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with output.with_suffix(".err").open("a") as errors:
        command = [*start, train_grpo.__file__, *words(settings)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def members(process: subprocess.Popen) -> dict[str, psutil.Process]:
    """A run's processes by what they are: launcher, main and other, or main alone."""
    first = psutil.Process(process.pid)
    ranks = {child.environ().get("RANK"): child for child in first.children()}
    return {"launcher": first, "main": ranks["0"], "other": ranks["1"]} if "1" in ranks else {"main": first}


def steps_of(process: subprocess.Popen):
    """The number of each step, as it is printed."""
    for line in process.stdout:
        if line.startswith("step "):
            yield int(line.removeprefix("step ").split("/")[0])


def left_alone(policy: Path, output: Path, steps: int, processes: int) -> dict[int, float]:
    """Run to the end; the main process' resident memory in MB by step."""
    process = launch(policy, output, steps, processes)
    memory = {step: members(process)["main"].memory_info().rss / 1e6 for step in steps_of(process)}
    if process.wait() != 0:
        sys.exit(f"the run left alone ended with status {process.returncode}: see {output}.err")
    return memory


def disturbed(policy: Path, output: Path, steps: int, processes: int, times: int, rng: random.Random) -> list[tuple]:
    """Run to the end through `times` kills and signals; the step, kind and target of each."""
    targets = ["main"] if processes == 1 else ["launcher", "main", "other"]
    cases = [(number, target) for number in STATUS for target in targets]
    plan = [cases[i % len(cases)] for i in range(times)]
    rng.shuffle(plan)
    happened = []
    while True:
        process = launch(policy, output, steps, processes)
        lasts, begun, hit = rng.randint(1, max(1, 3 * steps // (2 * times))), None, None
        for step in steps_of(process):
            begun = step if begun is None else begun
            if step >= begun + lasts and len(happened) < times:
                time.sleep(rng.random() * 0.4)  # somewhere in the next step, or in a save
                hit = strike(process, *plan[len(happened)], output)
                happened.append((step, *plan[len(happened)]))
                print(f"  {hit} after step {step}", flush=True)
                break
        status = process.wait()
        if status == 0:
            return happened
        if hit is None or (processes == 1 and status != STATUS[happened[-1][1]]):
            sys.exit(f"ended with status {status} after {hit}: see {output}.err")


def strike(process: subprocess.Popen, number: signal.Signals, target: str, output: Path) -> str:
    """Send a signal to one process of a run, and wait until all of them are gone; in words what was done."""
    run, children = members(process), psutil.Process(process.pid).children(recursive=True)
    run[target].send_signal(number)
    done = f"{number.name} to {target}"
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        sys.exit(f"{done}: the launcher is left behind: see {output}.err")
    _, left = psutil.wait_procs(children, PATIENCE)
    if left:
        sys.exit(f"{done}: {left} left behind: see {output}.err")
    return done


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
    parser.add_argument("--processes", type=int, default=1, help="more than one: by accelerate launch")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    policy = taught_policy(args.out, SEED, use_cpu=True)

    memory = left_alone(policy, args.out / "left-alone", args.steps, args.processes)
    rss = [mean(memory[step] for step in memory if k < 10 * step / args.steps <= k + 1) for k in range(10)]
    print(f"resident memory in MB, mean over each tenth of the run: {' '.join(f'{mb:.0f}' for mb in rss)}", flush=True)

    rng = random.Random(args.seed)
    happened = disturbed(policy, args.out / "disturbed", args.steps, args.processes, args.times, rng)
    kinds = Counter(f"{number.name} to {target}" for _, number, target in happened)
    found = differences(args.out / "left-alone", args.out / "disturbed", args.steps)
    print(
        f"{len(happened)} interruptions ({dict(kinds)}) in {args.steps:,} steps: {len(found)} differences {found[:5]}"
    )
    sys.exit(1 if found or rss[-1] > 1.05 * rss[1] else 0)


if __name__ == "__main__":
    main()

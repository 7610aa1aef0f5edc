"""Completions a second with one process and with several, and on paper what their communication costs.

    python benchmarks/scaling.py --use_cpu           # the demo's policy, 1 and 2 processes, a core each: 5 minutes
    python benchmarks/scaling.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k --processes 1 2 4 8
    python benchmarks/scaling.py --paper             # only the arithmetic

Strong scaling shares the 64 completions of a step, weak scaling gives 64 to each process. Seconds are TRL's
`step_time`, medians over the steps after the first two; settings take turns. The links' speeds are their makers'.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

COMPLETIONS = 64
LAUNCH = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"  # else accelerate warns

# Qwen2.5-1.5B: the gradients that DDP sums once a step, in fp32; with LoRA rank 32 on all linear layers
GRADIENTS = {"full": 1_543_714_304 * 4, "LoRA": 36_929_536 * 4}
LINKS = {"NVLink, 450 GB/s": 450e9, "PCIe 4 x16, 25 GB/s": 25e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}


def paper(processes: int) -> str:
    """Seconds a step for summing gradients around a ring, over which each process sends 2 (N - 1) / N of them."""
    lines = [f"| {processes} GPUs, one sum of gradients a step | " + " | ".join(LINKS) + " |", "|---" * 5 + "|"]
    for method, size in GRADIENTS.items():
        sent = 2 * (processes - 1) / processes * size
        cells = (f"{sent / speed:.3f} s" for speed in LINKS.values())
        lines.append(f"| {method}, {size / 1e9:.2f} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(processes: int, completions: int, args) -> float:
    """Completions a second of the recipe as it is started on the command line."""
    out = args.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    from benchmarks.on_demo import words

    flags = {
        "model_name_or_path": args.model,
        "dataset_name": args.dataset,
        "output_dir": out,
        "use_cpu": args.use_cpu,
        "bf16": not args.use_cpu,
        "max_completion_length": args.completion_length,
        "per_device_train_batch_size": completions,  # which the processes share
        "max_steps": args.steps + 2,
        "save_strategy": "no",
        "eval_steps": 0,
        "sample_every": 0,
    }
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes {processes} {LAUNCH}".split()
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "train_grpo.py")]
    command += words(flags)
    environment = {**os.environ, "TQDM_DISABLE": "1", **({"OMP_NUM_THREADS": "1"} if args.use_cpu else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{processes} processes could not be measured:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return completions / median([row["step_time"] for row in log if "step_time" in row][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", help="folder or Hub name; the demo's taught policy where left out")
    parser.add_argument("--dataset", help="folder or Hub name; the demo's problems where left out")
    parser.add_argument("--completion_length", type=int, default=48, help="limit in tokens")
    parser.add_argument("--steps", type=int, default=10, help="measured steps a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/scaling"))
    args = parser.parse_args()
    print(paper(8))
    if args.paper:
        return
    import torch

    from benchmarks.on_demo import taught_policy

    if not args.use_cpu and not torch.cuda.is_available():
        sys.exit("scaling.py: no CUDA GPU is visible; --use_cpu measures on the CPU")
    if args.model is None:
        args.model = taught_policy(args.out / "demo", 42, args.use_cpu)
        args.dataset = args.out / "demo" / "problems"
    cases = {
        (n, kind): COMPLETIONS * (n if kind == "weak" else 1) for n in args.processes for kind in ("strong", "weak")
    }
    speeds = {case: [] for case in cases}
    for _ in range(args.rounds):
        for (processes, kind), completions in cases.items():
            speed = measure(processes, completions, args)
            speeds[processes, kind].append(speed)
            print(f"{processes} processes, {kind}, {completions} completions a step: {speed:.1f} a second", flush=True)
    print("\n| processes | scaling | completions a step | completions/s | times one process |\n" + "|---" * 5 + "|")
    for (processes, kind), values in speeds.items():
        ratios = sorted(a / b for a, b in zip(values, speeds[args.processes[0], kind], strict=True))
        print(
            f"| {processes} | {kind} | {cases[processes, kind]} | {median(values):.1f} "
            f"| {median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()

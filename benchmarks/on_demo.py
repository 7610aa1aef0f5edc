"""The demo's problems, taught policies and settings, for the benchmarks that train on them."""

import subprocess
import sys
from pathlib import Path

import torch

import demo

ROOT = Path(__file__).parents[1]
EXAMPLES = 64  # of a cold start on the demo's problems


def taught_policy(folder: Path, seed: int, use_cpu: bool) -> Path:
    """The taught policy's folder, made in `folder` where it is not there yet, beside the demo's `problems`."""
    demo.write_problems(folder / "problems")
    return demo.taught_policy(folder, seed, use_cpu)


def precision() -> dict:
    """Where the demo computes, and in what."""
    has_gpu = torch.cuda.is_available()
    has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"use_cpu": not has_gpu, "bf16": has_bf16}


def settings(taught: Path, policy: Path, output: Path, seed: int) -> dict:
    """Flags of train_grpo.py with which demo.py starts GRPO from its taught policy; `policy` may be another one."""
    paths = {"model_name_or_path": policy, "dataset_name": taught.with_name("problems"), "output_dir": output}
    return {**paths, "seed": seed, **demo.GRPO, **precision()}


def words(settings: dict) -> list[str]:
    """Flags as they are typed."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def cold_started(taught: Path, output: Path, seed: int) -> Path:
    """Run cold_start.py on the taught policy with `EXAMPLES` solved problems; returns its folder, `output`."""
    flags = {
        "model_name_or_path": taught,
        "dataset_name": taught.with_name("problems"),
        "output_dir": output,
        "seed": seed,
        "examples": EXAMPLES,
        "num_train_epochs": 4,
        "learning_rate": 5e-4,  # a quarter of the teaching's
        "max_completion_length": demo.GRPO["max_completion_length"],
        "gradient_checkpointing": False,
        **precision(),
    }
    command = [sys.executable, str(ROOT / "cold_start.py"), *words(flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the cold start ended with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return output

"""Everything wrong with the settings, found at once, before anything loads."""

import argparse
import math
import os
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from support import processes
from support.checkpoints import checkpoints, flaw, newest_whole, state_of, step_of
from support.faults import LOCK, is_locked
from support.generation import VLLM_VERSIONS, vllm_obstacle
from support.memory import can_split
from support.problems import is_path
from support.record import read_run

RUN_FILES = ("run.json", "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")


def find_problems(flags: argparse.Namespace) -> list[str]:
    """Everything about these settings that would stop or spoil the run, each naming the constant to change.

    Nothing is downloaded or loaded. `flags` holds every flag before the configuration is built, because that stops at
    its own first objection.
    """
    return [*_hardware(flags), *_numbers(flags), *_sources(flags), *_output_folder(flags), *_unused(flags)]


# ---- numbers

# setting: what it must be, and in words
NUMBERS = {
    "max_prompt_length": (lambda n: n >= 1, "at least 1"),
    "max_completion_length": (lambda n: n >= 1, "at least 1"),
    "per_device_train_batch_size": (lambda n: n >= 1, "at least 1"),
    "gradient_accumulation_steps": (lambda n: n >= 1, "at least 1"),
    "tokens_per_pass": (lambda n: n >= 1, "at least 1, or None for as many as fit"),
    "num_generations": (lambda n: n >= 2, "at least 2: an advantage compares completions of one group"),
    "eval_problems": (lambda n: n >= 1, "at least 1; EVAL_STEPS = 0 turns evaluation off"),
    "save_total_limit": (lambda n: n >= 1, "at least 1"),
    "cold_start_epochs": (lambda n: n >= 1, "at least 1"),
    "cold_start_batch_size": (lambda n: n >= 1, "at least 1"),
    "cold_start_examples": (lambda n: n >= 0, "0, which turns the cold start off, or above"),
    "sample_every": (lambda n: n >= 0, "0, which turns samples off, or above"),
    "max_steps": (lambda n: n == -1 or n >= 1, "at least 1, or -1 to follow NUM_TRAIN_EPOCHS"),
    "eval_steps": (lambda n: n >= 0 and n == int(n), "a whole number, or 0, which turns evaluation off"),
    "num_train_epochs": (lambda n: n > 0, "above 0"),
    "learning_rate": (lambda n: n > 0, "above 0"),
    "cold_start_learning_rate": (lambda n: n > 0, "above 0"),
    "temperature": (lambda n: n > 0, "above 0: greedy completions of a group are all the same"),
    "save_steps": (lambda n: n > 0, "above 0"),
    "logging_steps": (lambda n: n > 0, "above 0"),
    "seed": (lambda n: 0 <= n < 2**32, "from 0 to 4,294,967,295"),
    "beta": (lambda n: n >= 0, "0 or above"),
}


def _numbers(flags: argparse.Namespace) -> list[str]:
    problems, odd = [], set()
    for name, (is_right, words) in NUMBERS.items():
        value = getattr(flags, name)
        if not (name == "tokens_per_pass" if value is None else is_right(value)):
            problems.append(f"{name.upper()} is {value}; it must be {words}")
            odd.add(name)
    if not odd & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        problems += _shares(flags) or ([] if "num_generations" in odd else _groups(flags))
    if flags.cold_start_source not in ("dataset", "self"):
        problems.append(f"COLD_START_SOURCE is {flags.cold_start_source!r}; it must be 'dataset' or 'self'")
    has_stage = not odd & {"cold_start_examples", "cold_start_batch_size"} and flags.cold_start_examples
    if has_stage and flags.cold_start_batch_size % processes.count():
        problems.append(
            f"COLD_START_BATCH_SIZE is {flags.cold_start_batch_size}, which does not divide among {processes.count()} "
            "processes"
        )
    return problems


def _shares(flags: argparse.Namespace) -> list[str]:
    """Several processes share the completions of a step evenly."""
    batch, count = flags.per_device_train_batch_size, processes.count()
    if batch % count == 0:
        return []
    return [
        f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} completions do not divide among {count} processes: "
        f"{shlex.join(_divisible(flags, count))} do"
    ]


def _divisible(flags: argparse.Namespace, count: int) -> list[str]:
    """Flags with which a step of as many completions, or some more, divides among processes in whole groups."""
    unit = math.lcm(count, max(1, flags.num_generations))
    completions = -(-flags.per_device_train_batch_size * flags.gradient_accumulation_steps // unit) * unit
    more = ["--gradient_accumulation_steps", "1"] if flags.gradient_accumulation_steps > 1 else []
    return ["--per_device_train_batch_size", str(completions), *more]


def _groups(flags: argparse.Namespace) -> list[str]:
    """Completions are generated together, for one step unless told otherwise, and must be whole groups."""
    if flags.generation_batch_size is not None:
        return []  # TRL's own message is as clear
    batch, name = flags.per_device_train_batch_size, "steps_per_generation"
    if flags.steps_per_generation is None:
        name = "gradient_accumulation_steps"
    passes, group = getattr(flags, name), flags.num_generations
    if batch * passes % group == 0:
        return []
    return [
        f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} x {name.upper()} {passes} makes {batch * passes} completions at a time, "
        f"which are no whole groups of NUM_GENERATIONS {group}; make the product a multiple of {group}"
    ]


# ---- hardware


def _hardware(flags: argparse.Namespace) -> list[str]:
    import torch

    problems = []
    if not torch.cuda.is_available() and not flags.use_cpu:
        problems.append(
            "no CUDA GPU is visible, and the default run takes one with 80 GB (40 without vLLM). `python train_grpo.py "
            "--demo` shows the whole pipeline on any machine; `--use_cpu true` forces a real, slow run on the CPU"
        )
    if processes.is_sharded() and flags.use_cpu:
        problems.append("accelerate shards on GPUs alone: with --use_cpu its FSDP and DeepSpeed flags would be ignored")
    if processes.count() > 1 and flags.demo:
        problems.append("--demo is for one process: start it with python")
    if processes.count() == 1 and torch.cuda.device_count() > 1 and not flags.use_cpu:
        problems.append(_several_gpus(flags, torch.cuda.device_count()))
    computes_in_bf16 = flags.bf16 and torch.cuda.is_available() and not flags.use_cpu
    if computes_in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(
            f"BF16 is true, but the {torch.cuda.get_device_name()} cannot compute in bf16: set --bf16 false "
            "--fp16 true, with --use_peft true where the full model's fp32 weights do not fit"
        )
    if flags.use_vllm and (obstacle := vllm_obstacle(flags.use_cpu)):
        place = " where it trains, too" if flags.vllm_mode == "server" else ""
        problems.append(
            f"{'VLLM_MODE server' if place else 'USE_VLLM'} needs a CUDA GPU and vLLM {' to '.join(VLLM_VERSIONS)}"
            f"{place} (pip install vllm=={VLLM_VERSIONS[1]}), but {obstacle}; --use_vllm false generates with "
            "Transformers"
        )
    return problems


def _several_gpus(flags: argparse.Namespace, gpus: int) -> str:
    if flags.demo:
        words = shlex.join(["python", *sys.argv])
        return f"{gpus} GPUs are visible, and the demo is for one: `CUDA_VISIBLE_DEVICES=0 {words}`"
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(gpus), *sys.argv]
    if flags.per_device_train_batch_size > 0 and flags.per_device_train_batch_size % gpus:
        words += _divisible(flags, gpus)
    return (
        f"{gpus} GPUs are visible, and python starts one process: `{shlex.join(words)}` uses them all, "
        "CUDA_VISIBLE_DEVICES=0 shows one"
    )


# ---- places


def _sources(flags: argparse.Namespace) -> list[str]:
    problems = []
    for setting in ("model_name_or_path", "dataset_name"):
        name, constant = getattr(flags, setting), setting.upper()
        if flags.demo:
            if name:
                problems.append(f"--demo brings its own policy and problems; leave out --{setting}")
        elif not name:
            problems.append(f"{constant} is empty")
        elif is_path(name) and not Path(name).is_dir():
            problems.append(f"{constant} {name!r}: no such folder")
        elif is_path(name) and setting == "dataset_name":
            if not (Path(name) / f"{flags.dataset_train_split}.jsonl").is_file():
                problems.append(f"{constant} {name} has no {flags.dataset_train_split}.jsonl to train on")
            if flags.eval_steps and not (Path(name) / f"{flags.dataset_test_split}.jsonl").is_file():
                problems.append(
                    f"{constant} {name} has no {flags.dataset_test_split}.jsonl to evaluate on; EVAL_STEPS = 0 trains "
                    "without"
                )
    return problems


def _output_folder(flags: argparse.Namespace) -> list[str]:
    folder = Path(flags.output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"OUTPUT_DIR {folder} is a file"]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"OUTPUT_DIR {folder}: {there} cannot be written to"]
    if is_locked(folder):
        return [f"another run is writing to OUTPUT_DIR {folder}; wait for it, or give another folder"]
    wanted = flags.resume_from_checkpoint
    if wanted is not None and (wanted != "auto" or checkpoints(folder) or (folder / "run.json").is_file()):
        return _resumed_folder(folder, wanted)
    if flags.demo and (folder / "run.json").is_file() and read_run(folder).get("settings", {}).get("demo") is True:
        return []  # the demo replaces its own earlier run, aloud
    is_used = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if flags.demo and is_used and not (folder / "problems").is_dir():
        return [f"OUTPUT_DIR {folder} holds something else than a demo; give the demo a new folder"]
    if found := checkpoints(folder):
        return [
            f"OUTPUT_DIR {folder} already holds {found[-1].name}. Continue that run with "
            "--resume_from_checkpoint auto, or start another with --output_dir OTHER"
        ]
    if kept := [name for name in RUN_FILES if (folder / name).exists()]:
        ahead = "Continue it with --resume_from_checkpoint auto, or s" if kept[0] == "run.json" else "S"
        return [
            f"OUTPUT_DIR {folder} already holds an earlier run ({', '.join(kept)}) without checkpoints. "
            f"{ahead}tart another with --output_dir OTHER, or delete it"
        ]
    return []


def _resumed_folder(folder: Path, wanted: str) -> list[str]:
    found = checkpoints(folder)
    if wanted == "auto":
        checkpoint, skipped = newest_whole(folder)
        if checkpoint is None and skipped:
            return [f"--resume_from_checkpoint auto: no checkpoint in {folder} is whole. " + "; ".join(skipped)]
        return []
    if not Path(wanted).is_dir():
        return [f"--resume_from_checkpoint {wanted}: no such folder; `auto` takes the newest in {folder}"]
    if found and Path(wanted).resolve().parent != folder.resolve():
        return [
            f"--resume_from_checkpoint {wanted} is another run's than OUTPUT_DIR {folder}, which holds "
            f"{found[-1].name}; give the run's own folder, or a new one"
        ]
    if wrong := flaw(Path(wanted)):
        return [f"--resume_from_checkpoint {wanted}: {wrong}; `auto` takes the newest whole checkpoint in {folder}"]
    step = state_of(Path(wanted))["global_step"]
    newer = [path.name for path in found if step_of(path) > step and flaw(path) is None]
    if newer:
        return [
            f"--resume_from_checkpoint {wanted}: {folder} holds the newer {', '.join(newer)}, which going on from "
            "there would overwrite; give a new --output_dir, or `auto`"
        ]
    return []


# ---- flags that this recipe would ignore, or that lack their package

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")

UNUSED = (  # where it holds, what to say
    (
        lambda f: f.eval_strategy not in (None, "no") or f.do_eval or f.eval_on_start,
        "--eval_strategy, --do_eval and --eval_on_start: TRL evaluates by sampling at the training temperature, which "
        "this recipe does not use. EVAL_STEPS evaluates greedily, evaluate.py a finished run",
    ),
    (
        lambda f: (
            f.vllm_mode != "server"
            and (f.vllm_server_base_url or f.vllm_server_host != "0.0.0.0" or f.vllm_server_port != 8000)
        ),
        "--vllm_server_base_url, _host and _port have no effect without --vllm_mode server",
    ),
    (
        lambda f: f.vllm_mode == "server" and f.use_vllm is False,
        "--vllm_mode server has no effect with USE_VLLM = False",
    ),
    (
        lambda f: f.tokens_per_pass is not None and not can_split(f),
        "TOKENS_PER_PASS does not split a step with LEAN_STEP = False, an entropy bonus or an entropy mask: lower "
        "PER_DEVICE_TRAIN_BATCH_SIZE, and raise GRADIENT_ACCUMULATION_STEPS",
    ),
    (
        lambda f: f.lean_step and re.search("lomo|layerwise", f.optim),
        "--optim makes a step in each backward pass, of which LEAN_STEP makes several: --lean_step false",
    ),
    (
        lambda f: f.load_in_8bit,
        "--load_in_8bit is not covered; --load_in_4bit true with --use_peft true needs less memory",
    ),
    (
        lambda f: f.load_in_4bit and not f.use_peft,
        "--load_in_4bit true: 4-bit weights cannot be trained, an adapter on them can; --use_peft true",
    ),
    (
        lambda f: f.load_in_4bit and find_spec("bitsandbytes") is None,
        "--load_in_4bit true needs the package: pip install bitsandbytes",
    ),
    (
        lambda f: f.auto_find_batch_size,
        "--auto_find_batch_size would change the batch unseen; lower PER_DEVICE_TRAIN_BATCH_SIZE instead",
    ),
    (
        lambda f: f.save_only_model,
        "--save_only_model: a run could not be resumed from such a checkpoint; leave it out",
    ),
    (
        lambda f: f.enable_jit_checkpoint,
        "--enable_jit_checkpoint: this recipe saves on SIGTERM and Ctrl-C by itself; leave it out",
    ),
)


def _unused(flags: argparse.Namespace) -> list[str]:
    named = [flags.report_to] if isinstance(flags.report_to, str) else flags.report_to or []
    missing = [tracker for tracker in named if tracker in TRACKERS and find_spec(tracker) is None]
    return [
        *(message for holds, message in UNUSED if holds(flags)),
        *(f"--report_to {tracker} needs the package: pip install {tracker}" for tracker in missing),
    ]

"""What protects a run: checks before anything expensive happens, and finding what to resume from."""

import argparse
import os
import re
from importlib.util import find_spec
from pathlib import Path

from gsm8k import is_path
from record import read_run

RUN_FILES = ("run.json", "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(numbered, key=lambda p: int(p.name.partition("-")[2]))


def find_problems(flags: argparse.Namespace) -> list[str]:
    """Everything about these settings that would stop or spoil the run, each with what to change.

    Nothing is downloaded or loaded. `flags` holds every flag of the recipe, GRPOConfig and ModelConfig before those
    objects are built, because each of them stops at its own first objection.
    """
    return [*_hardware(flags), *_sizes(flags), *_sources(flags), *_output_folder(flags), *_unused(flags)]


def _hardware(flags: argparse.Namespace) -> list[str]:
    import torch

    problems = []
    if not torch.cuda.is_available() and not flags.use_cpu:
        problems.append(
            "no CUDA GPU is visible, and the default run takes one with 40 GB or more. `python train_grpo.py --demo` "
            "shows the whole pipeline on any machine in minutes; `--use_cpu true` forces a real, slow run on the CPU"
        )
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and not flags.use_cpu:
        problems.append(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Show it one with CUDA_VISIBLE_DEVICES=0, or "
            "start one process each with `accelerate launch train_grpo.py`"
        )
    if flags.use_vllm and (flags.use_cpu or not vllm_is_usable()):
        problems.append(
            "USE_VLLM (--use_vllm) is true, but vLLM 0.22.0 to 0.31.0 with a CUDA GPU is not there. Install "
            "vllm==0.31.0, or set it to false to generate with Transformers"
        )
    return problems


def vllm_is_usable() -> bool:
    """Whether vLLM is installed in a version that TRL supports, and a CUDA GPU is there."""
    from importlib import metadata

    import torch
    from packaging.version import Version

    try:
        version = Version(Version(metadata.version("vllm")).base_version)  # without a local part such as +cu129
    except metadata.PackageNotFoundError:
        return False
    return torch.cuda.is_available() and Version("0.22.0") <= version <= Version("0.31.0")


AT_LEAST_ONE = {
    "max_prompt_length": "MAX_PROMPT_LENGTH",
    "max_completion_length": "MAX_COMPLETION_LENGTH",
    "per_device_train_batch_size": "PER_DEVICE_BATCH_SIZE",
    "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
    "eval_problems": "EVAL_PROBLEMS",
}
ABOVE_ZERO = {
    "learning_rate": "LEARNING_RATE",
    "temperature": "TEMPERATURE",
    "save_steps": "SAVE_STEPS",
    "logging_steps": "LOGGING_STEPS",
}


WHOLE = {*AT_LEAST_ONE, "max_steps", "num_generations", "sample_every"}


def _kind(flag: str) -> str:
    return "whole number" if flag in WHOLE else "number"


def _is_number(value: object, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _sizes(flags: argparse.Namespace) -> list[str]:
    numbers = {**AT_LEAST_ONE, **ABOVE_ZERO, "max_steps": "MAX_STEPS", "num_generations": "NUM_GENERATIONS"}
    numbers |= {
        "sample_every": "SAMPLE_EVERY",
        "eval_steps": "EVAL_STEPS",
        "beta": "BETA",
        "num_train_epochs": "EPOCHS",
    }
    odd = {flag: getattr(flags, flag) for flag in numbers if not _is_number(getattr(flags, flag), flag in WHOLE)}
    if odd:  # argparse checks the command line; a --config file can hold anything
        return [f"{numbers[flag]} (--{flag}) is {value!r}, which is no {_kind(flag)}" for flag, value in odd.items()]

    problems = []
    for flag, constant in AT_LEAST_ONE.items():
        if getattr(flags, flag) < 1:
            problems.append(f"{constant} (--{flag}) is {getattr(flags, flag)}; it must be at least 1")
    for flag, constant in ABOVE_ZERO.items():
        if not getattr(flags, flag) > 0:
            problems.append(f"{constant} (--{flag}) is {getattr(flags, flag)}; it must be above 0")
    if flags.sample_every < 0:
        problems.append(f"SAMPLE_EVERY (--sample_every) is {flags.sample_every}; 0 turns samples off")
    if flags.eval_steps < 0 or flags.eval_steps != int(flags.eval_steps):
        problems.append(f"EVAL_STEPS (--eval_steps) is {flags.eval_steps}; it must be a whole number, 0 turns it off")
    if flags.beta < 0:
        problems.append(f"BETA (--beta) is {flags.beta}; it must be 0 or above")
    if flags.max_steps != -1 and flags.max_steps < 1:
        problems.append(f"MAX_STEPS (--max_steps) is {flags.max_steps}; it must be at least 1, or -1 to follow EPOCHS")
    if flags.max_steps == -1 and not flags.num_train_epochs > 0:
        problems.append(f"EPOCHS (--num_train_epochs) is {flags.num_train_epochs}; it must be above 0")
    if flags.num_generations < 2:
        problems.append(
            f"NUM_GENERATIONS (--num_generations) is {flags.num_generations}; an advantage compares completions of one "
            "group, so it takes at least 2"
        )
    elif not problems:
        problems += _groups(flags)
    return problems


def _groups(flags: argparse.Namespace) -> list[str]:
    """Completions are generated together, for one step unless told otherwise, and must be whole groups."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_pass = flags.per_device_train_batch_size * processes
    if flags.generation_batch_size is not None:
        generated, made_of = flags.generation_batch_size, "--generation_batch_size"
        if flags.steps_per_generation is not None:
            return ["--generation_batch_size and --steps_per_generation say the same thing; give one of them"]
        if generated < 1 or generated % per_pass:
            return [
                f"--generation_batch_size is {generated}; it must be a multiple of PER_DEVICE_BATCH_SIZE {per_pass}"
            ]
    else:
        passes = flags.steps_per_generation or flags.gradient_accumulation_steps
        generated = per_pass * passes
        made_of = f"PER_DEVICE_BATCH_SIZE {flags.per_device_train_batch_size} x GRADIENT_ACCUMULATION_STEPS {passes}"
        if flags.steps_per_generation is not None:
            made_of = f"PER_DEVICE_BATCH_SIZE {flags.per_device_train_batch_size} x --steps_per_generation {passes}"
        if processes > 1:
            made_of += f" x {processes} processes"
    if generated % flags.num_generations == 0:
        return []
    return [
        f"{made_of} makes {generated} completions at a time, which are no whole groups of NUM_GENERATIONS "
        f"{flags.num_generations}; make the product a multiple of {flags.num_generations}"
    ]


def _sources(flags: argparse.Namespace) -> list[str]:
    problems = []
    for flag, constant in (("model_name_or_path", "MODEL"), ("dataset_name", "DATASET")):
        name = getattr(flags, flag)
        if flags.demo:
            if name:
                problems.append(f"--demo brings its own policy and problems; leave out --{flag}")
        elif not name:
            problems.append(f"{constant} (--{flag}) is empty")
        elif is_path(name) and not Path(name).expanduser().is_dir():
            problems.append(f"{constant} (--{flag}) {name!r}: no such folder")
    return problems


def _output_folder(flags: argparse.Namespace) -> list[str]:
    folder, wanted = Path(flags.output_dir), flags.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        return [f"OUTPUT_DIR (--output_dir) {folder} is a file"]
    found = checkpoints(folder)
    if wanted == "auto":
        if not found:
            return [f"--resume_from_checkpoint auto: {folder} holds no checkpoint. Leave the flag out to start a run"]
    elif wanted is not None:
        if not Path(wanted).is_dir():
            return [f"--resume_from_checkpoint {wanted}: no such folder; `auto` takes the newest in {folder}"]
        if found and Path(wanted).resolve().parent != folder.resolve():
            return [
                f"--resume_from_checkpoint {wanted} is another run's than OUTPUT_DIR (--output_dir) {folder}, which "
                f"holds {found[-1].name}; give the run's own folder, or a new one"
            ]
    elif flags.demo and _is_demo(folder):
        return []  # the demo replaces its own earlier run, aloud
    elif flags.demo and folder.is_dir() and any(folder.iterdir()) and not (folder / "problems").is_dir():
        return [f"--output_dir {folder} holds something else than a demo; give the demo a new folder"]
    elif found:
        return [
            f"OUTPUT_DIR (--output_dir) {folder} already holds {found[-1].name}. Continue that run with "
            "--resume_from_checkpoint auto, or start another with --output_dir OTHER"
        ]
    elif kept := [name for name in RUN_FILES if (folder / name).exists()]:
        return [
            f"OUTPUT_DIR (--output_dir) {folder} already holds an earlier run ({', '.join(kept)}) without checkpoints. "
            "Start another with --output_dir OTHER, or delete it"
        ]
    return []


def _is_demo(folder: Path) -> bool:
    return (folder / "run.json").is_file() and read_run(folder).get("settings", {}).get("demo") is True


TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


def _unused(flags: argparse.Namespace) -> list[str]:
    """TRL's flags that this recipe would ignore, or that lack their package."""
    problems = []
    if flags.eval_strategy not in (None, "no") or flags.do_eval or flags.eval_on_start:
        problems.append(
            "--eval_strategy, --do_eval and --eval_on_start: TRL evaluates by sampling at the training temperature, "
            "which this recipe does not use. EVAL_STEPS (--eval_steps) evaluates greedily, evaluate.py a finished run"
        )
    for tracker in [flags.report_to] if isinstance(flags.report_to, str) else flags.report_to or []:
        if tracker in TRACKERS and find_spec(tracker) is None:
            problems.append(f"--report_to {tracker} needs the package: pip install {tracker}")
    for flag in ("do_train", "do_predict"):
        if getattr(flags, flag):
            problems.append(f"--{flag} has no effect here; leave it out")
    return problems

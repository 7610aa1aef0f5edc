"""Everything wrong with the settings, found at once, before anything loads."""

import argparse
import math
import re
import shlex
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from support import processes
from support.checkpoints import checkpoints
from support.errors import RunStopped
from support.faults import locked
from support.generation import VLLM_VERSIONS, vllm_obstacle
from support.memory import can_split
from support.problems import is_path


def find_errors(flags: argparse.Namespace) -> list[str]:
    """Everything about these settings that would stop or spoil the run, each naming the constant to change.
    Nothing is downloaded or loaded. `flags` are not a configuration yet: building one stops at its first error."""
    return [*_numbers(flags), *_hardware(flags), *_sources(flags), *_output_folder(flags), *_unused(flags)]


def _at_least(least: int):
    return lambda value: value == int(value) and value >= least


def _above_0(value) -> bool:
    return 0 < value < math.inf


NUMBERS = {  # setting: what it must be, and in words
    "max_prompt_length": (_at_least(1), "a whole number, at least 1"),
    "max_completion_length": (_at_least(1), "a whole number, at least 1"),
    "per_device_train_batch_size": (_at_least(1), "a whole number, at least 1"),
    "gradient_accumulation_steps": (_at_least(1), "a whole number, at least 1"),
    "tokens_per_pass": (lambda n: n is None or _at_least(1)(n), "at least 1, or None for as many as fit"),
    "num_generations": (_at_least(2), "at least 2: an advantage compares completions of one group"),
    "examples": (_at_least(1), "a whole number, at least 1"),
    "source": (("dataset", "self").__contains__, "'dataset' or 'self'"),
    "eval_problems": (_at_least(1), "at least 1; EVAL_STEPS = 0 turns evaluation off"),
    "save_total_limit": (_at_least(1), "a whole number, at least 1"),
    "sample_every": (_at_least(0), "0, which turns samples off, or above"),
    "eval_steps": (lambda n: n is None or _at_least(0)(n), "a whole number, or 0, which turns evaluation off"),
    "max_steps": (lambda n: n == -1 or _at_least(1)(n), "a whole number, or -1 to follow NUM_TRAIN_EPOCHS"),
    "num_train_epochs": (_above_0, "above 0"),
    "learning_rate": (_above_0, "above 0"),
    "temperature": (_above_0, "above 0: greedy completions of a group are all the same"),
    "save_steps": (_above_0, "above 0"),
    "logging_steps": (_above_0, "above 0"),
    "seed": (lambda n: _at_least(0)(n) and n < 2**32, "from 0 to 4,294,967,295"),
    "beta": (lambda n: n >= 0, "0 or above"),
}


def _numbers(flags: argparse.Namespace) -> list[str]:
    wrong = {}
    for name in (name for name in NUMBERS if name in flags):
        with suppress(TypeError, ValueError, OverflowError):  # a --config file and a constant can hold anything
            if NUMBERS[name][0](getattr(flags, name)):
                continue
        wrong[name] = getattr(flags, name)
    errors = [f"{name.upper()} is {value!r:.60}; it must be {NUMBERS[name][1]}" for name, value in wrong.items()]
    if wrong.keys() & {"per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"}:
        return errors
    batch, count, group = flags.per_device_train_batch_size, processes.count(), getattr(flags, "num_generations", 1)
    if batch % count:
        does = shlex.join(_divisible(flags, count))
        errors.append(
            f"PER_DEVICE_TRAIN_BATCH_SIZE is {batch}, which does not divide among {count} processes: {does} does"
        )
    elif group > 1 and flags.generation_batch_size is None:
        # completions are generated together, for one step unless told otherwise, and must be whole groups
        name = "gradient_accumulation_steps" if flags.steps_per_generation is None else "steps_per_generation"
        at_once = batch * getattr(flags, name)
        if at_once % group:
            errors.append(
                f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} x {name.upper()} {getattr(flags, name)} makes {at_once} "
                f"completions at a time, which are no whole groups of NUM_GENERATIONS {group}; make the product a "
                f"multiple of {group}"
            )
    return errors


def _divisible(flags: argparse.Namespace, count: int) -> list[str]:
    """Flags with which a step of as many rows, or some more, divides among processes, and in whole groups."""
    unit = math.lcm(count, max(1, getattr(flags, "num_generations", 1)))
    rows = -(-flags.per_device_train_batch_size * flags.gradient_accumulation_steps // unit) * unit
    more = ["--gradient_accumulation_steps", "1"] if flags.gradient_accumulation_steps > 1 else []
    return ["--per_device_train_batch_size", str(rows), *more]


def _hardware(flags: argparse.Namespace) -> list[str]:
    errors = []
    if not torch.cuda.is_available() and not flags.use_cpu:
        errors.append(
            "no CUDA GPU is visible, and the default run takes 80 GB of one (40 without vLLM). `python demo.py` shows "
            "the whole pipeline on any machine; `--use_cpu true` forces a real, slow run on the CPU"
        )
    if processes.is_sharded() and flags.use_cpu:
        errors.append("accelerate shards on GPUs alone: with --use_cpu its FSDP and DeepSpeed flags would be ignored")
    gpus = torch.cuda.device_count()
    if processes.count() == 1 and gpus > 1 and not flags.use_cpu:
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(gpus), *sys.argv]
        if flags.per_device_train_batch_size > 0 and flags.per_device_train_batch_size % gpus:
            words += _divisible(flags, gpus)
        errors.append(
            f"{gpus} GPUs are visible, and python starts one process: `{shlex.join(words)}` uses them all, "
            "CUDA_VISIBLE_DEVICES=0 shows one"
        )
    computes_in_bf16 = flags.bf16 and torch.cuda.is_available() and not flags.use_cpu
    if computes_in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        errors.append(
            f"BF16 is true, but the {torch.cuda.get_device_name()} cannot compute in bf16: set --bf16 false "
            "--fp16 true, with --use_peft true where the full model's fp32 weights do not fit"
        )
    if getattr(flags, "use_vllm", False) and (obstacle := vllm_obstacle(flags.use_cpu)):
        place = " where it trains, too" if flags.vllm_mode == "server" else ""
        errors.append(
            f"{'VLLM_MODE server' if place else 'USE_VLLM'} needs a CUDA GPU and vLLM {' to '.join(VLLM_VERSIONS)}"
            f"{place} (pip install vllm=={VLLM_VERSIONS[1]}), but {obstacle}; --use_vllm false generates with "
            "Transformers"
        )
    return errors


def _sources(flags: argparse.Namespace) -> list[str]:
    errors = []
    for name in ("model_name_or_path", "dataset_name"):
        place = getattr(flags, name)
        if not place:
            errors.append(f"{name.upper()} is empty")
        elif is_path(place) and not Path(place).is_dir():
            errors.append(f"{name.upper()} {place!r}: no such folder")
    splits = {flags.dataset_train_split: "to train on"}
    if flags.eval_steps and "eval_problems" in flags:
        splits[flags.dataset_test_split] = "to evaluate on; EVAL_STEPS = 0 trains without"
    folder = Path(flags.dataset_name or "?")
    absent = [split for split in splits if folder.is_dir() and not (folder / f"{split}.jsonl").is_file()]
    return errors + [f"DATASET_NAME {folder} has no {split}.jsonl {splits[split]}" for split in absent]


def _output_folder(flags: argparse.Namespace) -> list[str]:
    folder, wanted = Path(flags.output_dir), flags.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        return [f"OUTPUT_DIR {folder} is a file"]
    try:
        with locked(folder):
            pass
    except RunStopped as error:  # another run holds it, or it cannot be written to
        return [str(error)]
    found = checkpoints(folder)[-1:] or [*folder.glob("run.json"), *folder.glob("*.safetensors*")]
    kept = [path.name for path in found]
    is_run = kept and "safetensors" not in kept[0]
    is_own = wanted == "auto" or (wanted and Path(wanted).resolve().parent == folder.resolve())
    if not kept or (is_own and is_run):
        return []  # find_checkpoint looks at what is resumed
    resume = "Resume it with --resume_from_checkpoint auto, or s" if is_run else "S"
    return [
        f"OUTPUT_DIR {folder} already holds an earlier run ({', '.join(kept)}). {resume}tart another with --output_dir "
        "OTHER"
    ]


TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
EVALUATES = "TRL's evaluation is not used: EVAL_STEPS evaluates greedily in training, evaluate.py afterwards"
REFUSED = {  # a flag that is given: why not
    "eval_strategy": EVALUATES,
    "do_eval": EVALUATES,
    "eval_on_start": EVALUATES,
    "do_predict": EVALUATES,
    "load_in_8bit": "it is not covered; --load_in_4bit true with --use_peft true needs less memory",
    "auto_find_batch_size": "it would change the batch unseen; lower PER_DEVICE_TRAIN_BATCH_SIZE instead",
    "save_only_model": "a run could not be resumed from such a checkpoint",
    "hub_strategy": "--push_to_hub pushes the final policy, and no checkpoint",
    "enable_jit_checkpoint": "this recipe saves on SIGTERM and Ctrl-C by itself",
}


def _unused(flags: argparse.Namespace) -> list[str]:
    given = [name for name in REFUSED if getattr(flags, name) not in (None, False, "no", "end")]
    errors = [f"leave out --{name}: {REFUSED[name]}" for name in given]
    if flags.push_to_hub and "examples" in flags:
        errors.append("leave out --push_to_hub: a cold start is pushed when it is done, by `hf upload NAME FOLDER`")
    if flags.load_in_4bit and not flags.use_peft:
        errors.append("--load_in_4bit true: 4-bit weights cannot be trained, an adapter on them can; --use_peft true")
    named = [flags.report_to] if isinstance(flags.report_to, str) else flags.report_to or []
    packages = [(f"--report_to {name}", name) for name in named if name in TRACKERS]
    packages += [("--load_in_4bit true", "bitsandbytes")] if flags.load_in_4bit else []
    errors += [f"{what} needs the package: pip install {name}" for what, name in packages if find_spec(name) is None]
    return errors + (_unused_by_grpo(flags) if "num_generations" in flags else [])


def _unused_by_grpo(flags: argparse.Namespace) -> list[str]:
    asks = flags.vllm_server_base_url or flags.vllm_server_host != "0.0.0.0" or flags.vllm_server_port != 8000
    is_server, steps_early = flags.vllm_mode == "server", re.search("lomo|layerwise", flags.optim)
    found = (
        (asks and not is_server, "--vllm_server_base_url, _host and _port have no effect without --vllm_mode server"),
        (is_server and flags.use_vllm is False, "--vllm_mode server has no effect with USE_VLLM = False"),
        (
            flags.tokens_per_pass is not None and not can_split(flags),
            "TOKENS_PER_PASS does not split a step with LEAN_STEP = False, an entropy bonus or an entropy mask: lower "
            "PER_DEVICE_TRAIN_BATCH_SIZE, and raise GRADIENT_ACCUMULATION_STEPS",
        ),
        (
            flags.lean_step and steps_early,
            "--optim makes a step in each backward pass, of which LEAN_STEP makes several: --lean_step false",
        ),
    )
    return [error for holds, error in found if holds]

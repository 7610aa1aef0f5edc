"""What protects a run: checks before anything expensive happens, checkpoints that are whole or not there, stopping
cleanly, and faults told in one message."""

import argparse
import functools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from gsm8k import is_path
from memory import USABLE, device_memory, gpu_memory, held, needed, size
from processes import count, gathered, is_main, is_sharded, on_main, wait
from record import generation_cycle, launch, read_run

RUN_FILES = ("run.json", "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")
VLLM_VERSIONS = ("0.22.0", "0.31.0")  # lowest and highest that TRL 1.16 supports
SHARDS = ("latest", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")  # in a checkpoint by DeepSpeed, and by FSDP
LOCK = ".lock"
SCRATCH = ".saving"  # in OUTPUT_DIR: where a checkpoint is until it is whole, and where an old one goes to be deleted


class RunStopped(Exception):
    """A run ended before its last step, for a reason that is no bug: the message says which, and what to do."""

    def __init__(self, message: str, status: int = 1, outcome: str = "failed"):
        super().__init__(message)
        self.status = status  # of the process
        self.outcome = outcome  # in run.json


# ---- checkpoints


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(numbered, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot go on from this folder as if nothing had happened; None where it can. Reads headers only."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int) or not isinstance(state["max_steps"], int):
            return "trainer_state.json names no step"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    processes = len(list(checkpoint.glob("rng_state_*.pth")))
    random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] or ["rng_state.pth"]
    if any((checkpoint / name).exists() for name in SHARDS):  # their loaders object to what is missing of them
        return next((f"{name} is missing" for name in random_states if not (checkpoint / name).is_file()), None)
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(checkpoint / name):  # what torch.save writes; a truncated one has lost its directory
            return f"{name} is damaged"
    return _weights_flaw(checkpoint)


def _weights_flaw(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    names = [name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).is_file()][:1]
    if not names and (folder / "model.safetensors.index.json").is_file():
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return "model.safetensors.index.json is damaged"
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):  # compares the header with the file's length
                pass
        except FileNotFoundError:
            return f"{name} is missing"
        except (SafetensorError, OSError):
            return f"{name} is damaged"
    return None if names else "model.safetensors is missing"


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and what is wrong with each newer one."""
    skipped = []
    for checkpoint in reversed(checkpoints(output_dir)):
        wrong = flaw(checkpoint)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} cannot be used: {wrong}")
    return None, skipped


def is_finished(checkpoint: str | Path, trainer) -> bool:
    """Whether the run that `trainer` would go on with from `checkpoint` has no step left."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= total_steps(trainer)


def finish(checkpoint: Path, output_dir: Path) -> None:
    """Put the policy of a run's last checkpoint into its folder, for a run that died after its last step."""
    if wrong := _weights_flaw(checkpoint):
        raise RunStopped(
            f"{checkpoint} is the run's last step, and {wrong}: its shards have to be put together by hand"
        )
    states = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
    shards = ("latest", "global_step*", "zero_to_fp32.py", "pytorch_model_fsdp*")
    only_to_resume = shutil.ignore_patterns(*states, *shards)
    shutil.copytree(checkpoint, output_dir, ignore=only_to_resume, dirs_exist_ok=True)


# Settings that a resumed run may change: where and how much is logged, saved and measured, and what memory is spent.
# All others shape the trajectory.
HARMLESS = re.compile(
    r"output_dir|resume_from_checkpoint|allow_changed_settings|sample_every|log_.*|logging_.*|save_.*|eval_.*|do_.*"
    r"|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|disable_tqdm|num_completions_to_print"
    r"|gradient_checkpointing.*|dataset_test_split|vllm_gpu_memory_utilization|vllm_enable_sleep_mode|vllm_server_.*"
    r"|torch_empty_cache_steps|skip_memory_metrics|local_rank|ddp_.*|fit_memory|per_device_train_batch_size"
    r"|train_batch_size"
)


def find_checkpoint(config, description: dict, allow_changes: bool) -> str | None:
    """The checkpoint to go on from: that of `--resume_from_checkpoint`, or the newest whole one for `auto`, aloud; None
    for a run that ended during or after its cold start, before GRPO's first checkpoint.

    Args:
        description: run.json's facts `settings` and `system_prompt` as this start would write them.
        allow_changes: go on with other settings than the run's, aloud.

    Raises:
        RunStopped: settings that shape the trajectory are not those of the checkpoint's run.
    """
    chosen = config.resume_from_checkpoint
    if chosen == "auto":
        checkpoint, skipped = newest_whole(config.output_dir)
        for line in skipped:
            print(f"{line}; taking {checkpoint.name}")
        chosen = str(checkpoint or config.output_dir)
    run = read_run(Path(chosen))
    if "settings" not in run:
        print(f"{chosen}: no run.json beside it, so its settings are taken to be these")
    was_sharded = any((Path(chosen) / name).exists() for name in SHARDS)
    if was_sharded != is_sharded() and chosen != config.output_dir:
        raise RunStopped(
            f"{chosen} was saved by a run that {'shards' if was_sharded else 'does not shard'} the policy, unlike this "
            "one: give accelerate launch the flags of the run's first start",
            status=2,
        )
    changes = changed_settings(run, description)
    if changes and not allow_changes:
        listed = "".join(f"\n  - {change}" for change in changes)
        raise RunStopped(
            f"{chosen} belongs to a run with other settings:{listed}\nGive those of the run, or say "
            "--allow_changed_settings true",
            status=2,
        )
    for change in changes:
        print(f"changed on resuming: {change}")
    if chosen == config.output_dir:
        print(f"{chosen}: no checkpoint of GRPO yet, going on from the cold start")
        return None
    return chosen


def changed_settings(run: dict, description: dict) -> list[str]:
    """What shapes the trajectory and differs between a run.json and a new start: a line each, old -> new."""
    if "settings" not in run:
        return []
    before = {**run["settings"], "SYSTEM_PROMPT": run.get("system_prompt")}
    after = json.loads(json.dumps(description["settings"], default=str))
    after["SYSTEM_PROMPT"] = description["system_prompt"]
    for settings, processes in ((before, run.get("processes", 1)), (after, count())):
        for name in ("gradient_accumulation_steps", "steps_per_generation"):  # how completions are split is no matter
            settings[name] *= settings["per_device_train_batch_size"] * processes
    return differences(before, {name: value for name, value in after.items() if not HARMLESS.fullmatch(name)})


def differences(before: dict, after: dict) -> list[str]:
    """What both know and do not agree on: a line each, old -> new."""
    names = [name for name in after if name in before and before[name] != after[name]]
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in names]


def say_what_differs(checkpoint: str, args) -> None:
    """Say where a resumed run splits its completions otherwise than the run that saved, and so is not it to the bit."""
    settings = read_run(Path(checkpoint)).get("settings", {})
    processes, passes = max(1, len(list(Path(checkpoint).glob("rng_state_*.pth")))), args.per_device_train_batch_size
    before = settings.get("per_device_train_batch_size", passes)
    if (processes, before) != (count(), passes):
        print(
            f"{checkpoint} was saved by {processes} process(es) in passes of {before}, and goes on with {count()} in "
            f"passes of {passes}: sums round otherwise" + (", random states are new" if processes != count() else "")
        )


def check_problems(place: str | Path, fingerprint: str) -> None:
    """Refuse to go on from a checkpoint, or in a run's folder, with other training problems than that run had.

    Raises:
        RunStopped: run.json knows another fingerprint.
    """
    if read_run(Path(place)).get("problems_sha256", fingerprint) != fingerprint:
        raise RunStopped(
            f"{place} belongs to a run on other problems: the dataset has changed since. Give those of the "
            "run, or say --allow_changed_settings true",
            status=2,
        )


# ---- checks before a run


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
    if is_sharded() and flags.use_cpu:
        problems.append("accelerate shards on GPUs alone: with --use_cpu its FSDP and DeepSpeed flags would be ignored")
    if count() > 1 and flags.demo:
        problems.append("--demo is for one process: start it with python")
    if count() == 1 and torch.cuda.device_count() > 1 and not flags.use_cpu:
        gpus = torch.cuda.device_count()
        batch, passes = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(gpus), *sys.argv]
        if _is_number(batch, True) and _is_number(passes, True) and min(batch, passes) > 0 and passes % gpus:
            words += _split(batch, passes, gpus)
        problems.append(
            f"{gpus} GPUs are visible, and python starts one process: `{shlex.join(words)}` uses them all, "
            "CUDA_VISIBLE_DEVICES=0 shows one"
        )
    computes_in_bf16 = flags.bf16 and torch.cuda.is_available() and not flags.use_cpu
    if computes_in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(
            f"BF16 (--bf16) is true, but the {torch.cuda.get_device_name()} cannot compute in bf16: set --bf16 false "
            "--fp16 true, with --use_peft true where the full model's fp32 weights do not fit"
        )
    obstacle = vllm_obstacle(flags.use_cpu)
    if flags.vllm_mode == "server" and flags.use_vllm and obstacle:
        problems.append(
            f"--vllm_mode server needs a CUDA GPU and vLLM {' to '.join(VLLM_VERSIONS)} where it trains too, but "
            f"{obstacle}; leave it out to generate with Transformers"
        )
    elif flags.use_vllm and obstacle:
        problems.append(
            f"USE_VLLM (--use_vllm) is true, but {obstacle}. It takes vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU "
            f"(pip install vllm=={VLLM_VERSIONS[1]}); false generates with Transformers"
        )
    return problems


def vllm_obstacle(use_cpu: bool = False) -> str | None:
    """Why vLLM cannot generate here, None where it can: installed in a version that TRL supports, and a CUDA GPU."""
    from importlib import metadata

    import torch
    from packaging.version import Version

    if use_cpu or not torch.cuda.is_available():
        return "there is no CUDA GPU" if not use_cpu else "the run is on the CPU"
    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vLLM is not installed"
    lowest, highest = map(Version, VLLM_VERSIONS)
    if lowest <= Version(Version(installed).base_version) <= highest:  # without a local part such as +cu129
        return None
    return f"vLLM {installed} is installed, which TRL does not support"


AT_LEAST_ONE = {
    "max_prompt_length": "MAX_PROMPT_LENGTH",
    "max_completion_length": "MAX_COMPLETION_LENGTH",
    "per_device_train_batch_size": "PER_DEVICE_BATCH_SIZE",
    "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
    "eval_problems": "EVAL_PROBLEMS",
    "save_total_limit": "SAVE_TOTAL_LIMIT",
    "cold_start_epochs": "COLD_START_EPOCHS",
    "cold_start_batch_size": "COLD_START_BATCH_SIZE",
}
ABOVE_ZERO = {
    "learning_rate": "LEARNING_RATE",
    "temperature": "TEMPERATURE",
    "save_steps": "SAVE_STEPS",
    "logging_steps": "LOGGING_STEPS",
    "cold_start_learning_rate": "COLD_START_LEARNING_RATE",
}
WHOLE = {*AT_LEAST_ONE, "cold_start_examples", "max_steps", "num_generations", "sample_every"}


def _kind(flag: str) -> str:
    return "whole number" if flag in WHOLE else "number"


def _is_number(value: object, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _sizes(flags: argparse.Namespace) -> list[str]:
    numbers = {**AT_LEAST_ONE, **ABOVE_ZERO, "max_steps": "MAX_STEPS", "num_generations": "NUM_GENERATIONS"}
    numbers |= {
        "cold_start_examples": "COLD_START_EXAMPLES",
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
    if flags.cold_start_examples < 0:
        problems.append(
            f"COLD_START_EXAMPLES (--cold_start_examples) is {flags.cold_start_examples}; 0 turns the cold start off"
        )
    if flags.cold_start_source not in ("dataset", "self"):
        problems.append(
            f"COLD_START_SOURCE (--cold_start_source) is {flags.cold_start_source!r}; it must be 'dataset' or 'self'"
        )
    if flags.sample_every < 0:
        problems.append(f"SAMPLE_EVERY (--sample_every) is {flags.sample_every}; 0 turns samples off")
    if flags.eval_steps < 0 or flags.eval_steps != int(flags.eval_steps):
        problems.append(f"EVAL_STEPS (--eval_steps) is {flags.eval_steps}; it must be a whole number, 0 turns it off")
    if flags.cold_start_examples > 0 and flags.cold_start_batch_size % count():
        problems.append(
            f"COLD_START_BATCH_SIZE (--cold_start_batch_size) is {flags.cold_start_batch_size}, which does not divide "
            f"among {count()} processes"
        )
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


def _split(batch: int, passes: int, processes: int, flag: str = "gradient_accumulation_steps") -> list[str]:
    """Flags with which a step divides among processes: as many completions in smaller passes, else some more."""
    share, left = divmod(batch * passes, processes)
    if left:
        more = -(-passes // processes) * processes
        return [f"--{flag}", str(more)]
    size = max(size for size in range(1, batch + 1) if share % size == 0)
    return ["--per_device_train_batch_size", str(size), f"--{flag}", str(batch * passes // size)]


def _groups(flags: argparse.Namespace) -> list[str]:
    """Completions are generated together, for one step unless told otherwise, and must be whole groups. Several
    processes share the passes of a step."""
    batch, per_pass = flags.per_device_train_batch_size, flags.per_device_train_batch_size * count()
    for flag, constant in (
        ("gradient_accumulation_steps", "GRADIENT_ACCUMULATION_STEPS"),
        ("steps_per_generation",) * 2,
    ):
        passes = getattr(flags, flag)
        if passes is None or passes % count() == 0:
            continue
        return [
            f"PER_DEVICE_BATCH_SIZE {batch} x {constant} {passes} = {batch * passes} completions do not divide "
            f"among {count()} processes: {' '.join(_split(batch, passes, count(), flag))} do"
        ]
    if flags.generation_batch_size is not None:
        generated, made_of = flags.generation_batch_size, "--generation_batch_size"
        if flags.steps_per_generation is not None:
            return ["--generation_batch_size and --steps_per_generation say the same thing; give one of them"]
        if generated < 1 or generated % per_pass:
            return [
                f"--generation_batch_size is {generated}; it must be a multiple of PER_DEVICE_BATCH_SIZE x processes, "
                f"{per_pass}"
            ]
    else:
        passes = flags.steps_per_generation or flags.gradient_accumulation_steps
        generated = batch * passes
        made_of = f"PER_DEVICE_BATCH_SIZE {flags.per_device_train_batch_size} x GRADIENT_ACCUMULATION_STEPS {passes}"
        if flags.steps_per_generation is not None:
            made_of = f"PER_DEVICE_BATCH_SIZE {flags.per_device_train_batch_size} x --steps_per_generation {passes}"
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
        elif is_path(name) and constant == "DATASET":
            problems += _splits(flags, Path(name).expanduser())
    return problems


def _splits(flags: argparse.Namespace, folder: Path) -> list[str]:
    problems = []
    if not (folder / f"{flags.dataset_train_split}.jsonl").is_file():
        problems.append(f"DATASET (--dataset_name) {folder} has no {flags.dataset_train_split}.jsonl to train on")
    if flags.eval_steps and not (folder / f"{flags.dataset_test_split}.jsonl").is_file():
        problems.append(
            f"DATASET (--dataset_name) {folder} has no {flags.dataset_test_split}.jsonl to evaluate on; EVAL_STEPS = 0 "
            "(--eval_steps 0) trains without"
        )
    return problems


def _output_folder(flags: argparse.Namespace) -> list[str]:
    folder = Path(flags.output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"OUTPUT_DIR (--output_dir) {folder} is a file"]
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"OUTPUT_DIR (--output_dir) {folder}: {there} cannot be written to"]
    if _is_locked(folder):
        return [f"another run is writing to OUTPUT_DIR (--output_dir) {folder}; wait for it, or give another folder"]
    if flags.resume_from_checkpoint is not None:
        return _resumed_folder(folder, flags.resume_from_checkpoint)
    found = checkpoints(folder)
    if flags.demo and _is_demo(folder):
        return []  # the demo replaces its own earlier run, aloud
    elif flags.demo and _holds_more_than_a_lock(folder) and not (folder / "problems").is_dir():
        return [f"--output_dir {folder} holds something else than a demo; give the demo a new folder"]
    elif found:
        return [
            f"OUTPUT_DIR (--output_dir) {folder} already holds {found[-1].name}. Continue that run with "
            "--resume_from_checkpoint auto, or start another with --output_dir OTHER"
        ]
    elif kept := [name for name in RUN_FILES if (folder / name).exists()]:
        ahead = "Continue it with --resume_from_checkpoint auto, or s" if (folder / "cold-start").is_dir() else "S"
        return [
            f"OUTPUT_DIR (--output_dir) {folder} already holds an earlier run ({', '.join(kept)}) without checkpoints. "
            f"{ahead}tart another with --output_dir OTHER, or delete it"
        ]
    return []


def _resumed_folder(folder: Path, wanted: str) -> list[str]:
    found = checkpoints(folder)
    if wanted == "auto":
        checkpoint, skipped = newest_whole(folder)
        if checkpoint is None and skipped:
            return [f"--resume_from_checkpoint auto: no checkpoint in {folder} is whole. " + "; ".join(skipped)]
        if checkpoint is None and (folder / "run.json").is_file() and read_run(folder).get("outcome") == "finished":
            return [f"--resume_from_checkpoint auto: {folder} is a finished run without checkpoints, nothing to resume"]
        if checkpoint is None and not (folder / "cold-start").is_dir():
            return [
                f"--resume_from_checkpoint auto: {folder} holds no checkpoint. Leave the flag out to start a run, in a "
                "new folder where this one holds a run.json"
            ]
        return []
    if not Path(wanted).is_dir():
        return [f"--resume_from_checkpoint {wanted}: no such folder; `auto` takes the newest in {folder}"]
    if found and Path(wanted).resolve().parent != folder.resolve():
        return [
            f"--resume_from_checkpoint {wanted} is another run's than OUTPUT_DIR (--output_dir) {folder}, which "
            f"holds {found[-1].name}; give the run's own folder, or a new one"
        ]
    if wrong := flaw(Path(wanted)):
        return [f"--resume_from_checkpoint {wanted}: {wrong}; `auto` takes the newest whole checkpoint in {folder}"]
    newer = [path.name for path in found if _step(path) > _step(Path(wanted).resolve()) and flaw(path) is None]
    if newer:
        return [
            f"--resume_from_checkpoint {wanted}: {folder} holds the newer {', '.join(newer)}, which going on from "
            "there would overwrite; give a new --output_dir, or `auto`"
        ]
    return []


def _holds_more_than_a_lock(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


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
    names_server = flags.vllm_server_base_url or flags.vllm_server_host != "0.0.0.0" or flags.vllm_server_port != 8000
    if flags.vllm_mode != "server" and names_server:
        problems.append("--vllm_server_base_url, _host and _port have no effect without --vllm_mode server")
    if flags.vllm_mode == "server" and flags.use_vllm is False:
        problems.append("--vllm_mode server has no effect with USE_VLLM = False (--use_vllm false)")
    if flags.load_in_8bit:
        problems.append("--load_in_8bit is not covered; --load_in_4bit true with --use_peft true needs less memory")
    if flags.load_in_4bit and not flags.use_peft:
        problems.append("--load_in_4bit true: 4-bit weights cannot be trained, an adapter on them can; --use_peft true")
    if flags.load_in_4bit and find_spec("bitsandbytes") is None:
        problems.append("--load_in_4bit true needs the package: pip install bitsandbytes")
    if flags.auto_find_batch_size:
        problems.append("--auto_find_batch_size would change the batch unseen; lower PER_DEVICE_BATCH_SIZE instead")
    if flags.save_only_model:
        problems.append("--save_only_model: a run could not be resumed from such a checkpoint; leave it out")
    if flags.enable_jit_checkpoint:
        problems.append("--enable_jit_checkpoint: this recipe saves on SIGTERM and Ctrl-C by itself; leave it out")
    for flag in ("do_train", "do_predict"):
        if getattr(flags, flag):
            problems.append(f"--{flag} has no effect here; leave it out")
    return problems


# ---- a run's folder is one run's


@contextmanager
def locked(output_dir: str):
    """Hold `output_dir` for this run; the lock ends with the main process, however it ends.

    Raises:
        RunStopped: another run holds it, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    if not is_main():
        yield
        return
    folder = Path(output_dir)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False).acquire()
    except Timeout as error:
        raise RunStopped(f"another run is writing to {folder}; wait for it, or give another --output_dir") from error
    except OSError as error:
        raise RunStopped(f"OUTPUT_DIR (--output_dir) {folder} cannot be written to: {error}") from error
    try:
        with lock:
            yield
    finally:
        if is_new and not _holds_more_than_a_lock(folder):  # the run never began
            shutil.rmtree(folder)


def _is_locked(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


# ---- while it trains


def total_steps(trainer) -> int:
    """Optimizer steps of the whole run, MAX_STEPS or what EPOCHS come to."""
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return max_steps


def check_disk(trainer) -> None:
    """Refuse to start what cannot be saved.

    A checkpoint holds the trained weights as they are, and AdamW's two moments in the same type.

    Raises:
        RunStopped: the checkpoints that are kept, the one being written and the final policy do not fit.
    """
    args, policy = trainer.args, trainer.model
    is_lora = hasattr(policy, "peft_config")
    weights = size(p for p in policy.parameters() if p.requires_grad or not is_lora)
    moments = 2 * size(p for p in policy.parameters() if p.requires_grad)
    at_once = args.save_total_limit + 1  # one more than is kept, while the newest is written
    if args.save_strategy == "steps" and args.save_steps >= 1:
        at_once = min(at_once, -(-total_steps(trainer) // int(args.save_steps)))
    needed = (weights + moments) * max(1, at_once - len(checkpoints(args.output_dir))) + weights
    free = shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise RunStopped(
            f"{args.output_dir} has {_size(free)} free, and this run writes {_size(needed)} there: {at_once} "
            f"checkpoints (SAVE_TOTAL_LIMIT {args.save_total_limit}, and one while it is written) of "
            f"{_size(weights + moments)}, and the final policy of {_size(weights)}. Free some space, give an "
            "--output_dir on a larger disk, or lower SAVE_TOTAL_LIMIT (--save_total_limit)"
        )


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def check_memory(trainer, prompt_length: int) -> None:
    """Refuse what cannot fit on the GPU, and warn of what may not, by the computed need.

    Raises:
        RunStopped: weights, gradients and optimizer alone, which are exact, are more than the GPU has.
    """
    parts = gpu_memory(trainer.model, trainer.args, prompt_length)
    total = device_memory(trainer.args.device)
    remedies = "".join(f"\n  - {remedy}" for remedy in memory_remedies(trainer.args))
    most, kept = needed(parts, trainer.args, total), held(parts)
    if kept > total:
        raise RunStopped(
            f"weights, gradients and optimizer need {_size(kept)}, and the GPU has {_size(total)}. What needs less:"
            + remedies
        )
    if most > USABLE * total:
        print(f"WARNING: the run may need {_size(most)} (computed), and the GPU has {_size(total)}:{remedies}")


def finite(reward_func):
    """`reward_func` under its own name, with an end to the run where it pays NaN or infinity: TRL would go on, and
    reads NaN as 'this function does not apply', for which a reward has None."""

    @functools.wraps(reward_func)
    def checked(*args, trainer_state, **kwargs):
        rewards = reward_func(*args, trainer_state=trainer_state, **kwargs)
        odd = [i for i, reward in enumerate(rewards) if reward is not None and not isfinite(reward)]
        if odd:
            raise RunStopped(
                f"step {trainer_state.global_step + 1}: {reward_func.__name__} paid {rewards[odd[0]]} for completion "
                f"{odd[0]} of {len(rewards)} ({len(odd)} such); a reward is a finite number, or None where it does not "
                "apply. The weights are those of the step before"
            )
        return rewards

    return checked


def protect(trainer):
    """Make `trainer` save whole checkpoints, stop on signals after a step that a resumed run can go on from, and end
    before a non-finite gradient reaches the weights. Returns the callback, which is already added."""
    import torch
    from accelerate.data_loader import get_sampler
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        heard: signal.Signals | None = None  # the first signal

        @contextmanager
        def listening(self):
            """Take SIGTERM and Ctrl-C as a wish to save and stop; the second one ends the process where it is."""
            before = {number: signal.signal(number, self.hear) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def hear(self, number, frame):
            if self.heard is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.heard = signal.Signals(number)
            if not is_main():
                return
            message = f"\n{self.heard.name}: finishing this step, then saving; a second signal stops at once\n"
            os.write(2, message.encode())  # unlike print, safe in the middle of a print

        def on_train_begin(self, args, state, control, model, train_dataloader, optimizer, lr_scheduler, **kwargs):
            _check_weights(model, "the policy to start from")
            state.compute_steps(args, state.max_steps)  # or a resumed run saves and logs as often as before
            _set_rates(args, optimizer, lr_scheduler)
            # TRL's sampler shuffles anew each epoch, from where its generator stands, which no checkpoint holds
            for _ in range(int(state.epoch or 0) if getattr(args, "shuffle_dataset", False) else 0):
                next(iter(get_sampler(train_dataloader)))

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            # _tr_loss is the sum of the losses since the last log; it has no public name
            gradient = largest([p.grad for p in model.parameters() if p.grad is not None])
            for name, value in (("loss", trainer._tr_loss), ("gradient", gradient)):
                # in fp16 the loss scaler meets infinite gradients as a matter of course, and skips those steps
                if not torch.isfinite(value) and not (args.fp16 and name == "gradient"):
                    # DeepSpeed has made its step by now
                    weights = "" if trainer.is_deepspeed_enabled else "The weights were not changed; "
                    raise RunStopped(
                        f"step {state.global_step + 1}: the {name} is {value.item()}. {weights}"
                        f"{_kept(args.output_dir)}. Lower the learning rate (now {args.learning_rate:g}), or look "
                        "at the last samples for what came before"
                    )

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % generation_cycle(args):
                return
            self.heard = next(filter(None, gathered(self.heard)), None)  # all stop after the same step
            if self.heard:
                control.should_save = control.should_training_stop = True

        def end(self, more_follows: bool = False):
            """Raises RunStopped where a signal ended the training, or came near its end and more than that follows."""
            state, folder = trainer.state, trainer.args.output_dir
            is_done = state.global_step >= state.max_steps
            if self.heard and (more_follows or not is_done):
                saved = folder if is_done else f"{folder}/checkpoint-{state.global_step}"
                raise RunStopped(
                    f"{self.heard.name}: saved {saved}. Go on with\n  {_resume_command()}",
                    status=128 + self.heard,
                    outcome="stopped",
                )

    if is_main():
        shutil.rmtree(Path(trainer.args.output_dir) / SCRATCH, ignore_errors=True)  # what a killed run left
    trainer._save_checkpoint = functools.partial(_save_whole, trainer, trainer._save_checkpoint)
    trainer._load_from_checkpoint = functools.partial(_load_whole, trainer, trainer._load_from_checkpoint)
    guard = Guard()
    trainer.add_callback(guard)
    return guard


def _set_rates(args, optimizer, lr_scheduler) -> None:
    """Make a resumed optimizer use this start's settings, where they were allowed to change: it brings its own."""
    for group in optimizer.param_groups:
        group["lr"] *= args.learning_rate / group["initial_lr"]
        group["initial_lr"] = args.learning_rate
        if "betas" in group:
            group["betas"], group["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
        if group["weight_decay"]:  # biases and norms have none
            group["weight_decay"] = args.weight_decay
    lr_scheduler.base_lrs = [args.learning_rate] * len(optimizer.param_groups)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next step is logged with


def largest(tensors: list):
    """The largest absolute value in all of `tensors`, as a scalar tensor; not a number where one of them is not."""
    from torch.nn.utils import get_total_norm

    held_here = [tensor for tensor in tensors if tensor.numel()]  # ZeRO-3 leaves empty ones where others hold them
    norm = get_total_norm(held_here, norm_type=float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a policy that FSDP shards


def _check_weights(model, what: str) -> None:
    if not largest([p.detach() for p in model.parameters() if p.is_floating_point()]).isfinite():
        raise RunStopped(f"{what} holds weights that are infinite or not a number")


def _save_whole(trainer, save, model, trial) -> None:
    """Let the trainer write its checkpoint in a hidden folder, and move it into place when it is whole: when every
    process has written its part.

    Older whole checkpoints beyond SAVE_TOTAL_LIMIT go only then; damaged ones do not count, and stay.
    """
    from safetensors import SafetensorError

    args, name = trainer.args, f"checkpoint-{trainer.state.global_step}"
    folder = Path(args.output_dir)
    scratch = folder / SCRATCH
    # a signal and an epoch's end both ask for one
    is_there = on_main(lambda: (folder / name).is_dir() and flaw(folder / name) is None)
    _check_weights(model, f"the policy after step {trainer.state.global_step}")
    try:
        scratch.mkdir(exist_ok=True)
        if not is_there:
            args.output_dir = str(scratch)
            save(model, trial)
            wait()
        if is_main():
            if not is_there:
                _flush(scratch / name)
                trainer._finish_current_push()  # --push_to_hub uploads from there
                if (folder / name).exists():  # damaged
                    (folder / name).rename(scratch / "damaged")
                (scratch / name).rename(folder / name)
            whole = [path for path in checkpoints(folder) if flaw(path) is None]
            for old in whole[: -args.save_total_limit]:
                old.rename(scratch / old.name)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_of_a_peer(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise RunStopped(
            f"saving {name} failed: {reason} ({_size(shutil.disk_usage(folder).free)} free in {folder}). "
            f"{_kept(folder)}. Free some space, then go on with\n  {_resume_command()}"
        ) from error
    finally:
        args.output_dir = str(folder)
        if is_main():
            shutil.rmtree(scratch, ignore_errors=True)


def _load_whole(trainer, load, checkpoint: str, model=None) -> None:
    """Load a checkpoint's weights. Of a policy with a `ref` adapter, a folder in the checkpoint, Transformers loads
    that alone, and leaves the adapter in training as it was."""
    load(checkpoint, model)
    if (Path(checkpoint) / "ref").is_dir():
        trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
        trainer.model.set_adapter("default")


def _flush(folder: Path) -> None:
    """Bring a folder to the disk, so that its new name cannot get there before its contents."""
    for path in (*folder.rglob("*"), folder):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def _is_of_a_peer(error: Exception) -> bool:
    """Whether this is how another process' end shows here."""
    return count() > 1 and bool(re.search("onnection (closed|reset|refused)|NCCL|[gG]loo|Broken pipe", str(error)))


def save_policy(trainer) -> None:
    """Save the policy and its tokenizer in the run's folder: one ordinary folder, however checkpoints are sharded."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def _kept(folder: str | Path) -> str:
    checkpoint, _ = newest_whole(folder)
    return f"{checkpoint} is the last whole checkpoint" if checkpoint else f"{folder} holds no whole checkpoint yet"


def _resume_command() -> str:
    words = list(sys.argv)
    for i, word in reversed(list(enumerate(words))):
        if re.fullmatch(r"--resume[_-]from[_-]checkpoint(=.*)?", word):
            del words[i : i + (1 if "=" in word else 2)]
    return shlex.join([*launch(), *words, "--resume_from_checkpoint", "auto"])


# ---- faults


@contextmanager
def faults_explained(config, remedies: list[str] | None = None):
    """Turn what the machine or a file does to a run into one message that says what to change. `remedies` are those
    against a lack of memory, GRPO's where they are not given."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        used, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        raise RunStopped(out_of_memory(remedies or memory_remedies(config), used, total)) from error
    except pickle.UnpicklingError as error:
        raise RunStopped(
            f"{config.resume_from_checkpoint or config.output_dir} holds more than tensors and numbers in "
            "optimizer.pt, scheduler.pt or rng_state.pth. Such a file can run code when it is loaded: it was not "
            "loaded. Resume from a checkpoint that you trust"
        ) from error
    except (OSError, SafetensorError) as error:
        if not re.search("No space left|Disk quota exceeded|File too large", str(error)):
            raise
        free = _size(shutil.disk_usage(config.output_dir).free)
        raise RunStopped(
            f"writing to {config.output_dir} failed: {error} ({free} free). {_kept(config.output_dir)}. Free some "
            f"space, then go on with\n  {_resume_command()}"
        ) from error
    except RuntimeError as error:
        if _is_of_a_peer(error):
            raise RunStopped(
                f"another process of this run has ended, and says why itself, or cannot be reached "
                f"({str(error).strip().partition(chr(10))[0]}). {_kept(config.output_dir)}. Go on with\n  "
                f"{_resume_command()}"
            ) from error
        if "probability tensor contains" not in str(error):
            raise
        raise RunStopped(
            "the policy's probabilities are infinite or not a number: it has diverged. "
            f"{_kept(config.output_dir)}. Lower LEARNING_RATE (now {config.learning_rate:g}) and start anew"
        ) from error


LARGE_REMEDIES = [
    "--use_peft true: LoRA needs no gradients and AdamW states for the full model; with --load_in_4bit true still less",
    "a smaller MODEL",
]


def memory_remedies(config) -> list[str]:
    """What needs less memory in GRPO, the most effective first."""
    batch, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    remedies = []
    if config.use_vllm and config.vllm_mode == "colocate":
        if not config.vllm_enable_sleep_mode:
            remedies.append("VLLM_SLEEP = True, which frees vLLM's share during the update")
        remedies.append(f"VLLM_MEMORY_SHARE below {config.vllm_gpu_memory_utilization:g}")
    if not config.gradient_checkpointing:
        remedies.append("GRADIENT_CHECKPOINTING = True")
    if batch > 1:
        remedies.append(
            f"PER_DEVICE_BATCH_SIZE {batch} -> {batch // 2}, with GRADIENT_ACCUMULATION_STEPS {passes} -> "
            f"{passes * batch // (batch // 2)} the step stays the same"
        )
    remedies.append(f"MAX_COMPLETION_LENGTH below {config.max_completion_length}")
    if config.beta:
        remedies.append("BETA = 0, without a reference model")
    return [*remedies, *LARGE_REMEDIES]


def out_of_memory(remedies: list[str], peak: int, total: int) -> str:
    """What to change after CUDA ran out of memory. `peak` and `total` in bytes."""
    lines = "".join(f"\n  {i}. {remedy}" for i, remedy in enumerate(remedies, start=1))
    return (
        f"CUDA is out of memory: {peak / 1e9:.1f} GB of {total / 1e9:.1f} GB were in use at the peak. Change, in order "
        f"of effect:{lines}"
    )

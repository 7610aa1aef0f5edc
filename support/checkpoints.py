"""Checkpoints that are whole or not there, which one a run goes on from, and what may change on the way."""

import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

from support import processes
from support.errors import RunStopped
from support.memory import gigabytes, size
from support.record import describe, read_run, resume_command

SHARDS = ("latest", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")  # in a checkpoint by DeepSpeed, and by FSDP
SCRATCH = ".saving"  # in OUTPUT_DIR: where a checkpoint is until it is whole, and where an old one goes to be deleted

# Settings that a resumed run may change: where and how much is logged, saved and measured, and what memory is spent.
# All others shape the trajectory.
HARMLESS = re.compile(
    r"output_dir|resume_from_checkpoint|allow_changed_settings|sample_every|log_.*|logging_.*|save_.*|eval_.*|do_.*"
    r"|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|disable_tqdm|num_completions_to_print"
    r"|gradient_checkpointing.*|dataset_test_split|vllm_gpu_memory_utilization|vllm_enable_sleep_mode|vllm_server_.*"
    r"|torch_empty_cache_steps|skip_memory_metrics|local_rank|ddp_.*|fit_memory|per_device_train_batch_size"
    r"|train_batch_size|lora_learning_rate_factor"
)


# ---- whole or not


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot go on from this folder as if nothing had happened; None where it can. Reads headers only."""
    try:
        state = _state(checkpoint)
        if not isinstance(state["global_step"], int) or not isinstance(state["max_steps"], int):
            return "trainer_state.json names no step"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    count = len(list(checkpoint.glob("rng_state_*.pth")))
    random_states = [f"rng_state_{rank}.pth" for rank in range(count)] or ["rng_state.pth"]
    if _is_sharded(checkpoint):  # the shards' loaders object to what is missing of them
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


def _state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _is_sharded(checkpoint: Path) -> bool:
    return any((checkpoint / name).exists() for name in SHARDS)


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and what is wrong with each newer one."""
    skipped = []
    for checkpoint in reversed(checkpoints(output_dir)):
        wrong = flaw(checkpoint)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} cannot be used: {wrong}")
    return None, skipped


def kept(folder: str | Path) -> str:
    """What a run that ends early can go on from, in words."""
    checkpoint, _ = newest_whole(folder)
    return f"{checkpoint} is the last whole checkpoint" if checkpoint else f"{folder} holds no whole checkpoint yet"


# ---- resuming


def find_checkpoint(settings) -> str | None:
    """The checkpoint to go on from: that of `--resume_from_checkpoint`, or the newest whole one for `auto`, aloud; None
    for a run that ended during or after its cold start, before GRPO's first checkpoint.

    Raises:
        RunStopped: settings that shape the trajectory are not those of the checkpoint's run.
    """
    chosen = settings.resume_from_checkpoint
    if chosen == "auto":
        checkpoint, skipped = newest_whole(settings.output_dir)
        for line in skipped:
            print(f"{line}; taking {checkpoint.name}")
        chosen = str(checkpoint or settings.output_dir)
    run = read_run(Path(chosen))
    if "settings" not in run:
        print(f"{chosen}: no run.json beside it, so its settings are taken to be these")
    was_sharded = _is_sharded(Path(chosen))
    if was_sharded != processes.is_sharded() and chosen != settings.output_dir:
        raise RunStopped(
            f"{chosen} was saved by a run that {'shards' if was_sharded else 'does not shard'} the policy, unlike this "
            "one: give accelerate launch the flags of the run's first start",
            status=2,
        )
    changes = _changed_settings(run, settings)
    if changes and not settings.allow_changed_settings:
        listed = "".join(f"\n  - {change}" for change in changes)
        raise RunStopped(
            f"{chosen} belongs to a run with other settings:{listed}\nGive those of the run, or say "
            "--allow_changed_settings true",
            status=2,
        )
    for change in changes:
        print(f"changed on resuming: {change}")
    if chosen == settings.output_dir:
        print(f"{chosen}: no checkpoint of GRPO yet, going on from the cold start")
        return None
    _say_how_it_splits(Path(chosen), run, settings)
    return chosen


def _changed_settings(run: dict, settings) -> list[str]:
    """What shapes the trajectory and differs between a run.json and a new start: a line each, old -> new."""
    if "settings" not in run:
        return []
    now = json.loads(json.dumps(describe(settings), default=str))
    # a run from before there was a lean step rounds as without one
    before = {"lean_step": False, **run["settings"], "SYSTEM_PROMPT": run.get("system_prompt")}
    after = {**now["settings"], "SYSTEM_PROMPT": now["system_prompt"]}
    for values, count in ((before, run.get("processes", 1)), (after, processes.count())):
        for name in ("gradient_accumulation_steps", "steps_per_generation"):  # how completions are split is no matter
            values[name] *= values["per_device_train_batch_size"] * count
    return differences(before, {name: value for name, value in after.items() if not HARMLESS.fullmatch(name)})


def differences(before: dict, after: dict) -> list[str]:
    """What both know and do not agree on: a line each, old -> new."""
    names = [name for name in after if name in before and before[name] != after[name]]
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in names]


def _say_how_it_splits(checkpoint: Path, run: dict, settings) -> None:
    """Say where completions are split otherwise than by the run that saved, so that it is not resumed to the bit."""
    passes, now = settings.per_device_train_batch_size, processes.count()
    saved_by = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    before = run.get("settings", {}).get("per_device_train_batch_size", passes)
    if (saved_by, before) != (now, passes):
        print(
            f"{checkpoint} was saved by {saved_by} process(es) in passes of {before}, and goes on with {now} in passes "
            f"of {passes}: sums round otherwise" + (", random states are new" if saved_by != now else "")
        )


def is_finished(settings) -> bool:
    """Whether the run that `settings` would go on with has no step left."""
    if settings.resume_from_checkpoint is None:
        return False
    state = _state(Path(settings.resume_from_checkpoint))
    if settings.max_steps > 0:
        return state["global_step"] >= settings.max_steps
    return state["epoch"] >= settings.num_train_epochs


def complete(settings, run) -> None:
    """Say that a run has no step left; put its last checkpoint's policy into its folder, where it died before that."""
    folder, checkpoint = Path(settings.output_dir), Path(settings.resume_from_checkpoint)
    print(f"{folder}: already complete, {checkpoint} is its last step\nnext:  python evaluate.py {folder}")
    if read_run(folder).get("outcome") == "finished" or not processes.is_main():
        return
    run.begin()
    if wrong := _weights_flaw(checkpoint):
        raise RunStopped(
            f"{checkpoint} is the run's last step, and {wrong}: its shards have to be put together by hand"
        )
    states = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
    shards = ("latest", "global_step*", "zero_to_fp32.py", "pytorch_model_fsdp*")
    only_to_resume = shutil.ignore_patterns(*states, *shards)
    shutil.copytree(checkpoint, folder, ignore=only_to_resume, dirs_exist_ok=True)
    run.end("finished")


# ---- saving


class WholeCheckpoints:
    """For a Trainer, put in front of it as a base class: its checkpoints appear under their names only when they are
    whole, which is when every process has written its part.

    Older whole checkpoints beyond SAVE_TOTAL_LIMIT go only then; damaged ones do not count, and stay.
    """

    _saves_to: str | None = None  # where a checkpoint is being written

    def _get_output_dir(self, trial):
        return self._saves_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        from safetensors import SafetensorError

        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        scratch = folder / SCRATCH
        # a signal and an epoch's end both ask for one
        is_there = processes.on_main(lambda: (folder / name).is_dir() and flaw(folder / name) is None)
        try:
            scratch.mkdir(exist_ok=True)
            if not is_there:
                self._saves_to = str(scratch)
                super()._save_checkpoint(model, trial)
                processes.wait()
            if processes.is_main():
                if not is_there:
                    self._finish_current_push()  # --push_to_hub uploads from there
                    _move_in(scratch, folder, name)
                whole = [path for path in checkpoints(folder) if flaw(path) is None]
                for old in whole[: -self.args.save_total_limit]:
                    old.rename(scratch / old.name)
            processes.wait()
        except (OSError, RuntimeError, SafetensorError) as error:
            if processes.is_of_a_peer(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise RunStopped(
                f"saving {name} failed: {reason} ({gigabytes(shutil.disk_usage(folder).free)} free in {folder}). "
                f"{kept(folder)}. Free some space, then go on with\n  {resume_command()}"
            ) from error
        finally:
            self._saves_to = None
            if processes.is_main():
                shutil.rmtree(scratch, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # of a policy with a `ref` adapter, a folder in the checkpoint, Transformers loads that alone, and leaves the
        # adapter in training as it was
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (Path(resume_from_checkpoint) / "ref").is_dir():
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.set_adapter("default")


def _move_in(scratch: Path, folder: Path, name: str) -> None:
    """Bring a checkpoint to the disk, so that its new name cannot get there before its contents, and into place."""
    for path in (*(scratch / name).rglob("*"), scratch / name):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)
    if (folder / name).exists():  # damaged
        (folder / name).rename(scratch / "damaged")
    (scratch / name).rename(folder / name)


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
        *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
        at_once = min(at_once, -(-steps // int(args.save_steps)))
    needed = (weights + moments) * max(1, at_once - len(checkpoints(args.output_dir))) + weights
    free = shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise RunStopped(
            f"{args.output_dir} has {gigabytes(free)} free, and this run writes {gigabytes(needed)} there: {at_once} "
            f"checkpoints (SAVE_TOTAL_LIMIT {args.save_total_limit}, and one while it is written) of "
            f"{gigabytes(weights + moments)}, and the final policy of {gigabytes(weights)}. Free some space, give an "
            "OUTPUT_DIR on a larger disk, or lower SAVE_TOTAL_LIMIT"
        )


# ---- exact or not


def generation_cycle(args) -> int:
    """After how many optimizer steps a run is at a generation's end again: what it has generated is used up then, and
    not part of a checkpoint."""
    passes = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)  # SFT generates nothing
    return math.lcm(passes, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


def inexact_because(args, max_steps: int) -> str:
    """Why a run resumed from a checkpoint would not be the run that was interrupted; '' where it would."""
    cycle, reasons = generation_cycle(args), []
    save_steps = args.save_steps if args.save_steps >= 1 else math.ceil(max_steps * args.save_steps)
    if args.save_strategy != "steps":
        reasons.append(f"checkpoints come by strategy {args.save_strategy.value!r}, not at a generation's end")
    elif save_steps % cycle:
        reasons.append(
            f"SAVE_STEPS {save_steps:g} does not fall on a generation's end, every {cycle} steps: what was generated "
            "before a save is generated anew"
        )
    passes = args.steps_per_generation * args.num_iterations
    if passes % args.gradient_accumulation_steps and args.gradient_accumulation_steps % passes:
        reasons.append("a generation and a step do not end together, and at the end of an epoch they drift apart")
    for flag, reason in (
        ("ignore_data_skip", "it starts the data from the beginning"),
        ("sync_ref_model", "the reference model is not part of a checkpoint"),
        ("use_vllm", "vLLM's random state is not part of a checkpoint"),
    ):
        if getattr(args, flag):
            reasons.append(f"{flag.upper()}: {reason}")
    if args.device.type == "cuda":
        reasons.append("CUDA sums in changing order")
    return f"not exact: {'; '.join(reasons)}" if reasons else ""

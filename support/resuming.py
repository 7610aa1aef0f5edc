"""Which checkpoint a run resumes from, which settings may change, and whether resuming is exact."""

import json
import math
import re
from pathlib import Path

from support import checkpoints as saved
from support import processes
from support.errors import RunStopped
from support.record import describe, read_run

# Settings that a resumed run may change: where and how much is logged, saved and measured, and what memory is spent.
# All others shape the trajectory.
HARMLESS = re.compile(
    r"output_dir|resume_from_checkpoint|allow_changed_settings|sample_every|log_.*|logging_.*|save_.*|eval_.*|do_.*"
    r"|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|disable_tqdm|num_completions_to_print"
    r"|gradient_checkpointing.*|dataset_test_split|vllm_gpu_memory_utilization|vllm_enable_sleep_mode|vllm_server_.*"
    r"|torch_empty_cache_steps|skip_memory_metrics|local_rank|ddp_.*|lora_learning_rate_factor"
    r"|tokens_per_pass|per_device_train_batch_size|processes"
)
ROUNDING = ("processes", "per_device_train_batch_size", "tokens_per_pass")  # of those, what changes how sums round


def find_checkpoint(settings) -> str | None:
    """The checkpoint to resume from: that of `--resume_from_checkpoint`, or the newest whole one for `auto`, which says
    what it takes; None for a run that ended before its first checkpoint, and for one that has yet to begin. RunStopped
    where it is not whole, or settings, rewards.py or sharding are not those of its run."""
    folder, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    chosen = _newest(folder) if wanted == "auto" else _given(Path(wanted), folder)
    if chosen is None:
        return None
    run = read_run(folder if wanted == "auto" else chosen)
    if "settings" not in run:
        print(f"{chosen}: no run.json beside it, so its settings are taken to be these")
    if chosen != folder:
        if not (chosen / saved.CHECKSUMS).is_file():
            print(f"{chosen}: no {saved.CHECKSUMS}, so that its files are taken to be as they were saved")
        if saved.holds_shards(chosen) != processes.is_sharded():
            shards = "shards" if saved.holds_shards(chosen) else "does not shard"
            by = f"{chosen} was saved by a run that {shards} the policy, unlike this one"
            raise RunStopped(f"{by}: give accelerate launch the flags of the run's first start")
    changes = _changes(run, settings)
    if changes and not settings.allow_changed_settings:
        listed = "".join(f"\n  - {change}" for change in changes)
        instead = "Give those of the run, or say --allow_changed_settings true"
        raise RunStopped(f"{chosen} belongs to a run with other settings:{listed}\n{instead}")
    for change in changes:
        print(f"changed on resuming: {change}")
    if chosen == folder and run.get("outcome") != "finished":
        print(f"{chosen}: no checkpoint yet, the run begins anew")
    return None if chosen == folder else str(chosen)


def _newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder; the folder itself where it has none yet; None without a run."""
    checkpoint, skipped = saved.newest_whole(folder, read_all=True)
    if checkpoint is None and skipped:
        raise RunStopped(f"--resume_from_checkpoint auto: no checkpoint in {folder} is whole. " + "; ".join(skipped))
    for line in skipped:
        print(f"{line}; taking {checkpoint.name}")
    if checkpoint:
        return checkpoint
    if not (run := read_run(folder)):
        print(f"{folder}: no run is there yet, this one is the first")
        return None
    origin = Path(run.get("settings", {}).get("resume_from_checkpoint") or folder / "none")
    if run.get("outcome") == "finished" or origin.resolve().parent == folder.resolve():
        return folder
    print(f"{folder}: no checkpoint of its own yet, resuming from {origin}, as it began")
    return _given(origin, folder)


def _given(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint that was named, where it can be resumed from without overwriting another."""
    wrong = None
    if not checkpoint.is_dir():
        wrong = f"no such folder; `auto` takes the newest in {folder}"
    elif flaw := saved.flaw(checkpoint) or saved.altered(checkpoint):
        wrong = f"{flaw}; `auto` takes the newest whole checkpoint in {folder}"
    elif (newest := saved.newest_whole(folder)[0]) and saved.step_of(newest) > saved.step_of(checkpoint):
        wrong = f"{folder} holds the newer {newest.name}, which would be overwritten; give a new --output_dir"
    if wrong:
        raise RunStopped(f"--resume_from_checkpoint {checkpoint}: {wrong}")
    return checkpoint


def has_steps_left(settings) -> bool:
    """Whether the run that `settings` resume, or begin, has a step to make."""
    if settings.resume_from_checkpoint is None:
        return not settings.is_resumed or read_run(Path(settings.output_dir)).get("outcome") != "finished"
    state = saved.state_of(Path(settings.resume_from_checkpoint))
    if settings.max_steps > 0:
        return state["global_step"] < settings.max_steps
    return state["epoch"] < settings.num_train_epochs


def _changes(run: dict, settings) -> list[str]:
    """What shapes the trajectory and differs between a run.json and a new start: a line each, old -> new. Prints what
    changes only how sums round, and whether the script was edited (its constants count as settings)."""
    if "settings" not in run:
        return []
    now = json.loads(json.dumps(describe(settings), default=str))
    before, after = (
        {"lean_step": False, **each["settings"], "SYSTEM_PROMPT": each["system_prompt"], "processes": each["processes"]}
        for each in (run, now)  # a run from before there was a lean step rounds as without one
    )
    for name in ROUNDING:
        if after.get(name) is not None and before.get(name) != after[name]:
            new = ", and random states are new" if name == "processes" else ""
            print(f"{name}: {before.get(name)} -> {after[name]}, so that sums round otherwise{new}")
    for values in (before, after):
        for name in ("gradient_accumulation_steps", "steps_per_generation"):  # only the product counts
            if name in values:
                values[name] *= values["per_device_train_batch_size"] * values["processes"]
    names = [name for name in after if name in before and before[name] != after[name] and not HARMLESS.fullmatch(name)]
    changes = [f"{name}: {before[name]!r} -> {after[name]!r}" for name in names]
    for name, checksum in now["code_sha256"].items():
        edited = f"{name}: edited since the run began; the run's folder holds it as it was"
        if run["code_sha256"].get(name, checksum) == checksum:
            continue
        if name == "rewards.py":
            changes.append(edited)
        else:
            print(edited)
    return changes


def generation_cycle(args) -> int:
    """Optimizer steps between two ends of a generation, where alone a save is exact: no checkpoint has completions."""
    batches = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)  # SFT generates nothing
    return math.lcm(batches, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


def inexact_because(args, max_steps: int) -> str:
    """Why a run resumed from a checkpoint would not be the run that was interrupted; '' where it would."""
    cycle, batches = generation_cycle(args), args.steps_per_generation * args.num_iterations
    drifts = batches % args.gradient_accumulation_steps and args.gradient_accumulation_steps % batches
    steps = args.save_steps if args.save_steps >= 1 else math.ceil(max_steps * args.save_steps)
    by = args.save_strategy.value
    between = f"SAVE_STEPS {steps:g} does not fall on a generation's end, every {cycle} steps"
    reasons = {
        f"checkpoints come by strategy {by!r}, not at a generation's end": by != "steps",
        f"{between}: what was generated before a save is generated anew": by == "steps" and steps % cycle,
        "a generation and a step do not end together, and at the end of an epoch they drift apart": drifts,
        "IGNORE_DATA_SKIP: it starts the data from the beginning": args.ignore_data_skip,
        "SYNC_REF_MODEL: the reference model is not part of a checkpoint": args.sync_ref_model,
        "USE_VLLM: vLLM's random state is not part of a checkpoint": args.use_vllm,
        "CUDA sums in changing order": args.device.type == "cuda",
    }
    because = "; ".join(reason for reason, holds in reasons.items() if holds)
    return f"not exact: {because}" if because else ""

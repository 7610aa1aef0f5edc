"""Which checkpoint a run goes on from, what may change on the way, and whether it is the same run then."""

import json
import math
import re
import shutil
from pathlib import Path

from support import processes
from support.checkpoints import flaw, is_sharded, newest_whole, state_of, weights_flaw
from support.checksums import CHECKSUMS, WEIGHTS, altered, has_checksums, write_checksums
from support.errors import RunStopped
from support.record import describe, read_run

# Settings that a resumed run may change: where and how much is logged, saved and measured, and what memory is spent.
# All others shape the trajectory.
HARMLESS = re.compile(
    r"output_dir|resume_from_checkpoint|allow_changed_settings|sample_every|log_.*|logging_.*|save_.*|eval_.*|do_.*"
    r"|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|disable_tqdm|num_completions_to_print"
    r"|gradient_checkpointing.*|dataset_test_split|vllm_gpu_memory_utilization|vllm_enable_sleep_mode|vllm_server_.*"
    r"|torch_empty_cache_steps|skip_memory_metrics|local_rank|ddp_.*|tokens_per_pass|per_device_train_batch_size"
    r"|lora_learning_rate_factor"
)


# ---- which one, and with which settings


def find_checkpoint(settings) -> str | None:
    """The checkpoint to go on from: that of `--resume_from_checkpoint`, or the newest whole one for `auto`, aloud; None
    for a run that ended before its first checkpoint, and for one that has yet to begin.

    Raises:
        RunStopped: settings that shape the trajectory are not those of the checkpoint's run.
    """
    if (chosen := _choose(settings)) is None:
        return None
    run = read_run(Path(settings.output_dir if settings.resume_from_checkpoint == "auto" else chosen))
    if "settings" not in run:
        print(f"{chosen}: no run.json beside it, so its settings are taken to be these")
    was_sharded = is_sharded(Path(chosen))
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
        if run.get("outcome") != "finished":
            begun = "going on from the cold start" if (Path(chosen) / "cold-start").is_dir() else "the run begins anew"
            print(f"{chosen}: no checkpoint of GRPO yet, {begun}")
        return None
    _say_how_it_splits(Path(chosen), run, settings)
    return chosen


def _choose(settings) -> str | None:
    """The checkpoint that is asked for, whole by its checksums, or the run's folder where there is none yet; None for a
    run that has yet to begin."""
    chosen = settings.resume_from_checkpoint
    if chosen == "auto":
        checkpoint, skipped = newest_whole(settings.output_dir, read_all=True)
        if checkpoint is None and skipped:
            raise RunStopped(f"no checkpoint in {settings.output_dir} is whole. " + "; ".join(skipped), status=2)
        for line in skipped:
            print(f"{line}; taking {checkpoint.name}")
        chosen = str(checkpoint or settings.output_dir)
        if checkpoint is None and not (Path(chosen) / "run.json").is_file():
            print(f"{chosen}: no run is there yet, this one is the first")
            return None
        run = read_run(Path(chosen))
        origin = run.get("settings", {}).get("resume_from_checkpoint")
        is_anothers = origin and Path(origin).resolve().parent != Path(chosen).resolve()
        if checkpoint is None and is_anothers and run.get("outcome") != "finished":
            print(f"{chosen}: no checkpoint of its own yet, going on from {origin}, as it began")
            if wrong := flaw(Path(origin)) or altered(Path(origin)):
                raise RunStopped(f"{origin}: {wrong}; start anew with another --output_dir", status=2)
            chosen = origin
    elif wrong := altered(Path(chosen)):
        raise RunStopped(f"{chosen}: {wrong}; `auto` takes the newest whole checkpoint", status=2)
    if chosen != settings.output_dir and not has_checksums(Path(chosen)):
        print(f"{chosen}: no {CHECKSUMS}, so that its files are taken to be as they were saved")
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
    before, count = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), processes.count()
    saved_by, resumes_with = (
        f"{number} process(es) of {values['per_device_train_batch_size']} completions, "
        f"{values.get('tokens_per_pass') or 'any number of'} tokens a pass"
        for number, values in ((before, run.get("settings", vars(settings))), (count, vars(settings)))
    )
    if saved_by != resumes_with:
        states = "" if before == count else ", random states are new"
        print(f"{checkpoint} was saved by {saved_by}, and resumes with {resumes_with}: sums round otherwise{states}")


def is_finished(settings) -> bool:
    """Whether the run that `settings` would go on with has no step left."""
    if settings.resume_from_checkpoint is None:
        return settings.is_resumed and read_run(Path(settings.output_dir)).get("outcome") == "finished"
    state = state_of(Path(settings.resume_from_checkpoint))
    if settings.max_steps > 0:
        return state["global_step"] >= settings.max_steps
    return state["epoch"] >= settings.num_train_epochs


def complete(settings, run) -> None:
    """Say that a run has no step left; put its last checkpoint's policy into its folder, where it died before that."""
    folder, checkpoint = Path(settings.output_dir), Path(settings.resume_from_checkpoint or "")
    last = f"{checkpoint} is its last step" if settings.resume_from_checkpoint else "its checkpoints are gone"
    print(f"{folder}: already complete, {last}\nnext:  python evaluate.py {folder}")
    if read_run(folder).get("outcome") == "finished" or not processes.is_main():
        return
    run.begin()
    if wrong := weights_flaw(checkpoint):
        raise RunStopped(
            f"{checkpoint} is the run's last step, and {wrong}: its shards have to be put together by hand"
        )
    states = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
    shards = ("latest", "global_step*", "zero_to_fp32.py", "pytorch_model_fsdp*")
    only_to_resume = shutil.ignore_patterns(*states, *shards)
    shutil.copytree(checkpoint, folder, ignore=only_to_resume, dirs_exist_ok=True)
    write_checksums(folder, WEIGHTS)
    run.end("finished")


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

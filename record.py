"""What a run prints and writes down: run.json, the plan, a line a step, samples."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import mean

from gsm8k import BadInput
from memory import device_memory, gpu_memory, needed
from processes import count, is_main, is_sharded
from rewards import REWARD_FUNCS, completion_text, extract_xml_answer

NO_SIGNAL_STEPS = 10
NO_SIGNAL_WARNING = (
    f"for {NO_SIGNAL_STEPS} steps every group's completions all earned the same, so nothing was learned. Give a cold "
    "start (COLD_START_EXAMPLES = 256) or a worked example (ONE_SHOT = True), take a model that can follow the format, "
    "or easier problems"
)
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "vllm")


# ---- text and files


def fingerprint(samples: list[dict]) -> str:
    """SHA-256 of training samples, by which a resumed run knows that they are the same."""
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()


def printable(text: str) -> str:
    """`text` with control characters and bidirectional overrides written as escapes, so that what a model or a dataset
    says cannot drive the terminal. Newlines stay."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def set_aside(folder: Path, *names: str) -> list[Path]:
    """Rename what `folder` holds of these files after the time they were written, so that nothing is overwritten."""
    kept = []
    for path in (folder / name for name in names):
        if path.exists():
            written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
            kept.append(path.rename(path.with_stem(f"{path.stem}-{written}")))
    return kept


# ---- run.json


def read_run(folder: Path) -> dict:
    """run.json of a run's folder, or of the folder above a checkpoint; empty where there is none.

    Raises:
        BadInput: the file is no JSON.
    """
    for path in (folder / "run.json", folder.parent / "run.json"):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadInput(f"{path}: no JSON ({error}); it was written by a run, mend or delete it") from error
    return {}


@contextmanager
def recorded(folder: Path, done: str = "finished", **facts):
    """Keep `folder`/run.json while the body runs: `facts`, versions, commit, command, start, end and outcome, which is
    `done` where the body ends without an error.

    A resumed run keeps its earlier starts under `earlier`.
    """
    if not is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = read_run(folder) if (folder / "run.json").is_file() else None
    run = {
        "outcome": "running",
        "command": _command(),
        "started": _now(),
        "ended": None,
        "processes": count(),
        **facts,
        "versions": _versions(),
        "commit": _commit(),
        "earlier": [],
    }
    if before:
        kept = {key: before.get(key) for key in ("command", "started", "ended", "outcome", "processes")}
        run["earlier"] = [*before.get("earlier", []), kept]

    def write():
        write_whole(folder / "run.json", json.dumps(run, indent=2, default=str) + "\n")

    write()
    try:
        yield
    except BaseException as error:
        run["ended"] = _now()
        stopped = isinstance(error, KeyboardInterrupt)
        run["outcome"] = f"{getattr(error, 'outcome', 'stopped' if stopped else 'failed')}: {error!r}"[:500]
        try:
            write()
        except OSError as full:  # the error that ends the run matters more
            print(f"{folder}/run.json does not say how the run ended: {full}", file=sys.stderr)
        raise
    run |= {"outcome": done, "ended": _now()}
    write()


def _command() -> list[str]:
    """The command line, a Hub token in it blotted out."""
    words = list(sys.argv)
    for i, word in enumerate(words):
        if word.startswith("--hub_token="):
            words[i] = "--hub_token=..."
        elif i and words[i - 1] in ("--hub_token", "--hub-token"):
            words[i] = "..."
    return [*launch(), *words]


def launch() -> list[str]:
    """How this run was started; the launcher's other flags are not known here."""
    if count() == 1:
        return ["python"]
    how = ["--config_file", "YOURS"] if is_sharded() else ["--multi_gpu"]
    return ["accelerate", "launch", *how, "--num_processes", str(count())]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _commit() -> str | None:
    """This recipe's git commit, '-dirty' where tracked files were edited; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None


def device_name(device) -> str:
    """What a `torch.device` is: the GPU's name, or 'cpu' and its cores."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"


# ---- the terminal


def plan(trainer, max_steps: int, start_step: int, model: str, why_not_vllm: str, prompt_length: int) -> str:
    """What is about to run, read off the trainer itself rather than off the settings."""
    args, policy = trainer.args, trainer.model
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = " and ".join(sorted({_name(p.dtype) for p in policy.parameters()}))
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    backend = f"vLLM ({args.vllm_mode})" if args.use_vllm else f"Transformers ({why_not_vllm})"
    reference = f"KL to a reference model, beta {args.beta}" if args.beta else "no reference model (beta 0)"
    lines = {
        "policy": f"{model}, {_millions(policy.parameters())} parameters, {_millions(trained)} of them trained",
        "precision": f"weights {weights}, compute {compute}, AdamW states {_name(trained[0].dtype)}",
        "device": (f"{args.world_size} processes, on " if args.world_size > 1 else "") + device_name(args.device),
        **({"memory": _memory(trainer, prompt_length)} if args.device.type == "cuda" else {}),
        "generation": f"{backend}, {args.generation_batch_size} completions at a time, "
        f"at most {args.max_completion_length} tokens each",
        "a step": f"{completions / args.num_generations:g} prompts x {args.num_generations} completions = "
        f"{completions} completions, {_passes(args)}",
        "steps": f"{max_steps:,}" + (f", resuming after step {start_step:,}" if start_step else ""),
        "objective": f"{args.loss_type} loss, {reference}, learning rate {args.learning_rate:g}",
        "saves": f"in {args.output_dir}, checkpoints {_interval(args)}, the newest {args.save_total_limit} are kept",
        "resume": (inexact_because(args, max_steps) or "exact, bit for bit") + (", from here on" if start_step else ""),
    }
    return "\n".join(f"  {name:<11}{printable(value)}" for name, value in lines.items())


def _passes(args) -> str:
    passes, each = args.gradient_accumulation_steps, " each" if args.world_size > 1 else ""
    passes = f"in {passes} pass{'es' if passes > 1 else ''} of {args.per_device_train_batch_size}{each}"
    return f"{passes}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"


def _memory(trainer, prompt_length: int) -> str:
    args, total = trainer.args, device_memory(trainer.args.device)
    if is_sharded():
        return f"of {total / 1e9:.0f} GB; the need of a sharded policy is not computed"
    most = needed(gpu_memory(trainer.model, args, prompt_length), args, total)
    is_colocated = args.use_vllm and args.vllm_mode == "colocate"
    share = f", vLLM's share of {args.vllm_gpu_memory_utilization:.0%} included" if is_colocated else ""
    return f"needs about {most / 1e9:.0f} GB of {total / 1e9:.0f} GB (computed){share}"


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
        reasons.append(f"checkpoints come by strategy {args.save_strategy!r}, not at a generation's end")
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
            reasons.append(f"--{flag}: {reason}")
    if args.device.type == "cuda":
        reasons.append("CUDA sums in changing order")
    return f"not exact: {'; '.join(reasons)}" if reasons else ""


def _millions(parameters) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:,.1f}M"


def _interval(args) -> str:
    return (
        f"every {args.save_steps:g} steps" if args.save_strategy == "steps" else f"by strategy {args.save_strategy!r}"
    )


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def step_line(step: int, max_steps: int, logs: dict) -> str:
    """One readable line of a logging step; README's glossary explains each word of it."""
    rewards = " ".join(
        f"{key.split('/')[1].removesuffix('_reward_func')} {value:.2f}"
        for key, value in logs.items()
        if key.startswith("rewards/") and key.endswith("/mean") and value is not None
    )
    parts = [
        f"step {step:>{len(str(max_steps))}}/{max_steps}",
        f"reward {logs['reward']:.3f} +-{logs['reward_std']:.2f}",
        f"({rewards})",
        f"length {logs['completions/mean_length']:.0f}",
        f"cut {logs['completions/clipped_ratio']:.0%}",
        f"no signal {logs['frac_reward_zero_std']:.0%}",
    ]
    for key, name in (("entropy", "entropy"), ("kl", "KL"), ("grad_norm", "grad")):
        if logs.get(key) is not None:
            parts.append(f"{name} {logs[key]:.3g}")
    parts.append(f"lr {logs.get('learning_rate', math.nan):.2g}")
    parts.append(f"{logs.get('step_time', math.nan):.1f} s")
    return "  ".join(parts)


def held_out_line(step: int, max_steps: int, logs: dict) -> str:
    """Greedy accuracy on the held-out sample."""
    return (
        f"held out at step {step}/{max_steps}: strict {logs['eval_strict_accuracy']:.1%}, lenient "
        f"{logs['eval_lenient_accuracy']:.1%}, format {logs['eval_format_rate']:.1%}, "
        f"length {logs['eval_mean_completion_tokens']:.0f}, reflection {logs['eval_reflection_rate']:.1%}, "
        f"n = {logs['eval_n']}"
    )


def closing_remarks(log: list[dict]) -> list[str]:
    """What a log says against its own success: the reward rose over the run's last quarter while held-out lenient
    accuracy fell below the 95% Wilson interval of its value before."""
    from scipy.stats import binomtest

    trained = [row for row in log if row.get("reward") is not None]
    measured = [row for row in log if "eval_lenient_accuracy" in row]
    if len(trained) < 8 or len(measured) < 2:
        return []
    quarter_starts = trained[-1]["step"] * 3 / 4
    earlier = [row for row in measured if row["step"] <= quarter_starts]
    rewards = [row["reward"] for row in trained if row["step"] > quarter_starts]
    half = len(rewards) // 2
    rose = half > 0 and mean(rewards[half:]) > mean(rewards[:half])
    first, last = earlier[-1] if earlier else measured[0], measured[-1]
    right = round(first["eval_lenient_accuracy"] * first["eval_n"])
    lowest = binomtest(right, int(first["eval_n"])).proportion_ci(method="wilson").low
    if not (rose and last["eval_lenient_accuracy"] < lowest):
        return []
    return [
        f"the reward rose over the last quarter, but held-out lenient accuracy fell from "
        f"{first['eval_lenient_accuracy']:.1%} at step {first['step']} to {last['eval_lenient_accuracy']:.1%} at step "
        f"{last['step']}, beyond its 95% interval. The policy may be earning reward without solving problems: read the "
        "samples, and prefer an earlier checkpoint"
    ]


def sample_text(step: int, question: str, gold: str, response: str) -> str:
    """One completion as the rewards see it."""
    completion = [[{"role": "assistant", "content": response}]]
    scores = {f.__name__: f(prompts=[None], completions=completion, answer=[gold])[0] for f in REWARD_FUNCS}
    rewards = "  ".join(f"{name.removesuffix('_reward_func')} {score:.3g}" for name, score in scores.items())
    body = (
        f"question:  {question}\ngold:      {gold}\nresponse:\n{response}\n"
        f"extracted: {extract_xml_answer(response)[:200]}\nrewards:   {rewards}  = {sum(scores.values()):.3g}"
    )
    return f"---- sample after step {step} ----\n{printable(body)}\n----"


def progress_callback(trainer, sample_every: int, **about):
    """The trainer's progress bar, with the plan before it and readable lines and samples above it, in place of the raw
    dicts that Transformers prints."""
    from tqdm import tqdm
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        silent_steps = 0  # in a row, without a reward spread in any group
        warned = False

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                print(plan(trainer, state.max_steps, state.global_step, **about), flush=True)
                off = args.disable_tqdm or None  # None: a bar on a terminal only, not in a log file
                self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=off)
            self.current_step = 0

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero:
                return
            if "eval_strict_accuracy" in logs:
                self.training_bar.write(held_out_line(state.global_step, state.max_steps, logs))
            if "reward" in logs:
                self.training_bar.write(step_line(state.global_step, state.max_steps, logs))
                self.silent_steps = self.silent_steps + state.logging_steps if logs["frac_reward_zero_std"] == 1 else 0
                if self.silent_steps >= NO_SIGNAL_STEPS and not self.warned:
                    self.warned = True
                    self.training_bar.write(f"WARNING: {NO_SIGNAL_WARNING}")

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.is_world_process_zero and sample_every and state.global_step % sample_every == 0:
                # TRL keeps the last generation here for its own tables; it has no public way to read it
                last = trainer._logs
                prompt, completion, gold = last["prompt"][0], last["completion"][0], last["extra"]["gold"][0]
                text = sample_text(state.global_step, prompt[-1]["content"], gold, completion_text(completion))
                self.training_bar.write(text)

    return Progress()

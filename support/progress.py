"""What a run prints: the plan, a line a step, samples, remarks at the end."""

import math
import time
from statistics import mean

import torch
from transformers import ProgressCallback

from rewards import completion_text, extract_xml_answer
from support import processes
from support.generation import vllm_obstacle
from support.memory import ADAMW, device_memory, gpu_memory, needed
from support.record import device_name, printable
from support.resuming import inexact_because

WIDTH = 160  # of a step's line
NO_SIGNAL_STEPS = 10
NO_SIGNAL_WARNING = (
    f"for {NO_SIGNAL_STEPS} steps every group's completions all earned the same, so nothing was learned. Give a cold "
    "start (COLD_START_EXAMPLES = 256) or a worked example (ONE_SHOT = True), take a model that can follow the format, "
    "or easier problems"
)


# ---- the plan


def plan(trainer, settings, max_steps: int, start_step: int) -> str:
    """What is about to run, read off the trainer itself rather than off the settings."""
    args, policy = trainer.args, trainer.model
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = " and ".join(sorted({_name(p.dtype) for p in policy.parameters()}))
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    is_divided = args.per_device_train_batch_size < completions
    micro_batches = f" in micro-batches of {args.per_device_train_batch_size}" if is_divided else ""
    reference = f"KL to a reference model, beta {args.beta}" if args.beta else "no reference model (beta 0)"
    is_regular = args.save_strategy == "steps"
    every = f"{args.save_steps:g} steps" if args.save_steps >= 1 else f"{args.save_steps:.0%} of all steps"
    saves = f"every {every}" if is_regular else f"by strategy {args.save_strategy.value!r}"
    moments = f"AdamW states {_name(trained[0].dtype)}" if args.optim in ADAMW else f"optimizer {args.optim.value}"
    name = policy.config._name_or_path
    if settings.use_peft and settings.cold_start_examples:
        name += " with the cold start's adapter"
    lines = {
        "policy": f"{name}, {_millions(policy.parameters())} parameters, {_millions(trained)} of them trained",
        "precision": f"weights {weights}, compute {compute}, {moments}",
        "device": (f"{args.world_size} processes, on " if args.world_size > 1 else "") + device_name(args.device),
        **({"memory": _memory(policy, settings)} if args.device.type == "cuda" else {}),
        "generation": f"{_backend(settings)}, {args.generation_batch_size} completions at a time, "
        f"at most {args.max_completion_length} tokens each",
        "a step": f"{completions / args.num_generations:g} prompts x {args.num_generations} completions = "
        f"{completions} completions{micro_batches}, gradient checkpointing "
        f"{'on' if args.gradient_checkpointing else 'off'}",
        "steps": f"{max_steps:,}" + (f", resuming after step {start_step:,}" if start_step else ""),
        "update": trainer.update_in_words(),
        "objective": f"{args.loss_type} loss, {reference}, learning rate {args.learning_rate:g}",
        "saves": f"in {args.output_dir}, checkpoints {saves}, the newest {args.save_total_limit} are kept",
        "resume": (inexact_because(args, max_steps) or "exact, bit for bit") + (", from here on" if start_step else ""),
    }
    return "\n".join(f"  {name:<11}{printable(value)}" for name, value in lines.items())


def _backend(settings) -> str:
    if settings.use_vllm:
        return f"vLLM ({settings.vllm_mode})"
    merging = "merging an adapter into 4-bit weights for it at every step would wear them away"
    why = obstacle = vllm_obstacle(settings.use_cpu)
    if obstacle and settings.device.type == "cuda" and not settings.demo:
        why = f"{obstacle}; without it generation takes about six times as long (SmolLM2 on an H200)"
    return f"Transformers ({why or (merging if settings.load_in_4bit else 'USE_VLLM is False')})"


def _memory(policy, settings) -> str:
    total = device_memory(settings.device)
    if processes.is_sharded():
        return f"of {total / 1e9:.0f} GB; the need of a sharded policy is not computed"
    most = needed(gpu_memory(policy, settings), settings, total)
    is_colocated = settings.use_vllm and settings.vllm_mode == "colocate"
    share = f", vLLM's share of {settings.vllm_gpu_memory_utilization:.0%} included" if is_colocated else ""
    return f"needs at most about {most / 1e9:.0f} GB of {total / 1e9:.0f} GB (computed){share}"


def _millions(parameters) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:,.1f}M"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- lines


def step_line(step: int, max_steps: int, logs: dict) -> str:
    """One readable line of a logging step, at most `WIDTH` characters; docs/metrics.md explains each word of it."""
    short = {"xmlcount": "xml", "soft_format": "soft", "strict_format": "strict", "correctness": "correct"}
    paid = {
        key.split("/")[1].removesuffix("_reward_func"): value
        for key, value in logs.items()
        if key.startswith("rewards/") and key.endswith("/mean") and value is not None
    }
    key, name = ("kl", "KL") if "kl" in logs else ("entropy", "entropy")  # there is room for one of them
    seconds = logs.get("step_time", math.nan)
    parts = [
        f"step {step:>{len(str(max_steps))}}/{max_steps}",
        f"reward {logs['reward']:.2f} +-{_short(logs['reward_std'])}",
        f"({' '.join(f'{short.get(func, func)} {_short(value)}' for func, value in paid.items())})",
        f"length {logs['completions/mean_length']:.0f}",
        f"cut {logs['completions/clipped_ratio']:.0%}",
        f"no signal {logs['frac_reward_zero_std']:.0%}",
        *([f"tokens {logs['computed_tokens']:.0%}"] if "computed_tokens" in logs else []),
        f"{name} {logs[key]:.2g}",
        *([f"grad {logs['grad_norm']:.2g}"] if "grad_norm" in logs else []),  # the steps since the last log, at the end
        f"{seconds:.{1 if seconds < 100 else 0}f} s",
    ]
    while len(" ".join(parts)) > WIDTH:  # the log has it all
        parts.pop(-2)
    return " ".join(parts)


def _short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")


def held_out_line(step: int, max_steps: int, logs: dict) -> str:
    """Greedy accuracy on the held-out sample."""
    return (
        f"held out at step {step}/{max_steps}: strict {logs['eval_strict_accuracy']:.1%}, lenient "
        f"{logs['eval_lenient_accuracy']:.1%}, format {logs['eval_format_rate']:.1%}, "
        f"length {logs['eval_mean_completion_tokens']:.0f}, reflection {logs['eval_reflection_rate']:.1%}, "
        f"n = {logs['eval_n']}"
    )


class Pace:
    """How long a stage still takes, judged by the steps of this start."""

    def __init__(self, state):
        self.began, self.step = time.monotonic(), state.global_step

    def left(self, state) -> str:
        done, to_do = state.global_step - self.step, state.max_steps - state.global_step
        minutes = math.ceil((time.monotonic() - self.began) / done * to_do / 60)
        return f"about {minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"about {minutes} min left"


def sample_text(step: int, logs: dict, left: str) -> str:
    """The first completion of a generation, as TRL keeps it for its tables, with what it earned. A reward that paid
    None is left out; gold is what correctness_reward_func logs. `left`: what the run still takes."""
    paid = {name: values[0] for name, values in logs["rewards"].items() if not math.isnan(values[0])}
    rewards = "  ".join(f"{name.removesuffix('_reward_func')} {score:.3g}" for name, score in paid.items())
    response = completion_text(logs["completion"][0])
    gold = f"gold:      {logs['extra']['gold'][0]}\n" if "gold" in logs["extra"] else ""
    body = (
        f"question:  {logs['prompt'][0][-1]['content']}\n{gold}response:\n{response}\n"
        f"extracted: {extract_xml_answer(response)[:200]}\nrewards:   {rewards}  = {sum(paid.values()):.3g}"
    )
    return f"---- sample after step {step}, {left} ----\n{printable(body)}\n----"


def closing_remark(log: list[dict]) -> str | None:
    """What a log says against its own success: the reward rose over the run's last quarter while held-out lenient
    accuracy fell below the 95% Wilson interval of its value before."""
    from scipy.stats import binomtest

    trained = [row for row in log if row.get("reward") is not None]
    measured = [row for row in log if "eval_lenient_accuracy" in row]
    if len(trained) < 8 or len(measured) < 2:
        return None
    quarter_starts = trained[-1]["step"] * 3 / 4
    earlier = [row for row in measured if row["step"] <= quarter_starts]
    rewards = [row["reward"] for row in trained if row["step"] > quarter_starts]
    half = len(rewards) // 2
    rose = half > 0 and mean(rewards[half:]) > mean(rewards[:half])
    first, last = earlier[-1] if earlier else measured[0], measured[-1]
    right = round(first["eval_lenient_accuracy"] * first["eval_n"])
    lowest = binomtest(right, int(first["eval_n"])).proportion_ci(method="wilson").low
    if not (rose and last["eval_lenient_accuracy"] < lowest):
        return None
    return (
        f"the reward rose over the last quarter, but held-out lenient accuracy fell from "
        f"{first['eval_lenient_accuracy']:.1%} at step {first['step']} to {last['eval_lenient_accuracy']:.1%} at step "
        f"{last['step']}, beyond its 95% interval. The policy may be earning reward without solving problems: read the "
        "samples, and prefer an earlier checkpoint"
    )


class Progress(ProgressCallback):
    """The trainer's progress bar, with the plan before it and readable lines and samples above it, in place of the raw
    dicts that Transformers prints."""

    def __init__(self, trainer, settings):
        super().__init__()
        self.trainer, self.settings = trainer, settings
        self.silent_steps = 0  # in a row, without a reward spread in any group
        self.has_warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        from tqdm import tqdm

        if state.is_world_process_zero:
            print(plan(self.trainer, self.settings, state.max_steps, state.global_step), flush=True)
            off = args.disable_tqdm or None  # None: a bar on a terminal only, not in a log file
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=off)
        self.current_step = 0
        self.pace = Pace(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "eval_strict_accuracy" in logs:
            self.training_bar.write(held_out_line(state.global_step, state.max_steps, logs))
        if "reward" in logs:
            self.training_bar.write(step_line(state.global_step, state.max_steps, logs))
            self.silent_steps = self.silent_steps + state.logging_steps if logs["frac_reward_zero_std"] == 1 else 0
            if self.silent_steps >= NO_SIGNAL_STEPS and not self.has_warned:
                self.has_warned = True
                self.training_bar.write(f"WARNING: {NO_SIGNAL_WARNING}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        every = self.settings.sample_every
        if state.is_world_process_zero and every and state.global_step % every == 0:
            # TRL keeps the last generation here for its own tables; it has no public way to read it
            self.training_bar.write(sample_text(state.global_step, self.trainer._logs, self.pace.left(state)))

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        is_done = state.is_world_process_zero and state.global_step >= state.max_steps
        if is_done and (remark := closing_remark(state.log_history)):
            print(f"WARNING: {remark}")
        if args.device.type == "cuda":
            peak = max(processes.gathered(torch.cuda.max_memory_allocated()))
            print(f"memory at the peak: {peak / 1e9:.1f} GB of {device_memory(args.device) / 1e9:.0f} GB", flush=True)

"""What a run prints: the plan, a line a step, samples, remarks at the end."""

import math
import re
import time
from statistics import linear_regression

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import ProgressCallback

from rewards import completion_text, extract_xml_answer
from support import processes
from support.generation import vllm_obstacle
from support.memory import ADAMW, device_memory
from support.problems import template_remarks
from support.record import device_name, printable
from support.resuming import inexact_because

NO_SIGNAL_STEPS = 10  # in a row, after which a warning comes
WIDTH = 160  # of a step's line
TEMPLATES = Environment(  # values are escaped: control characters everywhere, markup in HTML
    loader=PackageLoader("support"),
    autoescape=select_autoescape(),
    trim_blocks=True,
    undefined=StrictUndefined,
    finalize=lambda value: printable(str(value)),
)


def render(template: str, **values) -> str:
    """A template of support/templates with `values` in it."""
    return TEMPLATES.get_template(template).render(values)


def plan(trainer, settings, max_steps: int, start_step: int) -> str:
    """What is about to run, read off the trainer itself rather than off the settings."""
    args, policy = trainer.args, trainer.model
    return render(
        "plan.txt",
        trainer=trainer,
        args=args,
        policy=policy,
        weights=" and ".join(sorted({str(p.dtype) for p in policy.parameters()})),
        trained=next(p.dtype for p in policy.parameters() if p.requires_grad),
        is_adamw=args.optim in ADAMW,
        device=device_name(args.device),
        obstacle=vllm_obstacle(settings.use_cpu),
        max_steps=max_steps,
        start_step=start_step,
        inexact=inexact_because(args, max_steps),
        remarks=template_remarks(trainer.processing_class, trainer.train_dataset[0]["prompt"], args),
    )


def step_line(step: int, max_steps: int, logs: dict) -> str:
    """A readable line of a logging step: `WIDTH` characters, unless its rewards alone take more (docs/metrics.md)."""
    names = {key: re.fullmatch("rewards/(.*?)(_reward_func)?/mean", key) for key in logs}
    paid = {name[1]: logs[key] for key, name in names.items() if name and logs[key] is not None}
    parts = render("step.txt", step=step, max_steps=max_steps, logs=logs, paid=paid, number=_short).splitlines()
    while len(" ".join(parts)) > WIDTH and len(parts) > 4:  # step, reward, what each pays, seconds
        parts.pop(-2)  # the log has it all
    return " ".join(parts)


def _short(number: float, form: str = ".2f") -> str:
    """A number without the zero before its point."""
    return f"{number:{form}}".removeprefix("0") or "0"


def sample_text(step: int, logs: dict, left: str) -> str:
    """The first completion of `logs`, the trainer's `last_generation`, and what it earned. A reward that paid None is
    left out, and gold where no reward logs it. `left`: how long the run still takes."""
    paid = {name: values[0] for name, values in logs["rewards"].items() if not math.isnan(values[0])}
    response = completion_text(logs["completion"][0])
    extracted = extract_xml_answer(response)
    return render("sample.txt", step=step, left=left, logs=logs, paid=paid, response=response, extracted=extracted)


def closing_remark(log: list[dict]) -> str | None:
    """A warning where the log contradicts itself: the reward rose over the run's last quarter, and held-out lenient
    accuracy fell below the 95% Wilson interval of its value before."""
    trained = [row for row in log if row.get("reward") is not None]
    measured = [row for row in log if "eval_lenient_accuracy" in row]
    if len(trained) < 8 or not measured:
        return None
    quarter = trained[len(trained) * 3 // 4 :]
    slope = linear_regression(range(len(quarter)), [row["reward"] for row in quarter]).slope
    first, last = [row for row in measured if row is measured[0] or row["step"] < quarter[0]["step"]][-1], measured[-1]
    right, n = round(first["eval_lenient_accuracy"] * first["eval_n"]), int(first["eval_n"])
    has_fallen = last["eval_lenient_accuracy"] < binomtest(right, n).proportion_ci(method="wilson").low
    return render("closing_remark.txt", first=first, last=last) if slope > 0 and has_fallen else None


class Pace:
    """How long a training still takes, judged by the steps since this was made."""

    def __init__(self, state):
        self.began, self.step = time.monotonic(), state.global_step

    def left(self, state) -> str:
        """In words, after at least one step."""
        done, to_do = state.global_step - self.step, state.max_steps - state.global_step
        minutes = math.ceil((time.monotonic() - self.began) / done * to_do / 60)
        return f"about {minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"about {minutes} min left"


class Progress(ProgressCallback):
    """A progress bar, the plan before it, and readable lines and samples instead of Transformers' raw dicts."""

    def __init__(self, trainer, settings):
        super().__init__()
        self.trainer, self.settings = trainer, settings
        self.steps_without_signal, self.has_warned = 0, False  # steps in a row

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(plan(self.trainer, self.settings, state.max_steps, state.global_step), flush=True)
            off = args.disable_tqdm or None  # None: a bar on a terminal only, not in a log file
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=off)
        self.current_step, self.pace = 0, Pace(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "eval_strict_accuracy" in logs:
            line = render("held_out.txt", step=state.global_step, max_steps=state.max_steps, logs=logs)
            self.training_bar.write(line)
        if "reward" in logs:
            self.training_bar.write(step_line(state.global_step, state.max_steps, logs))
            has_signal = logs["frac_reward_zero_std"] < 1
            self.steps_without_signal = 0 if has_signal else self.steps_without_signal + state.logging_steps
            if self.steps_without_signal >= NO_SIGNAL_STEPS and not self.has_warned:
                self.has_warned = True
                self.training_bar.write(f"WARNING: {render('no_signal.txt', steps=NO_SIGNAL_STEPS)}")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        every = self.settings.sample_every
        if state.is_world_process_zero and every and state.global_step % every == 0 and self.trainer.last_generation:
            self.training_bar.write(sample_text(state.global_step, self.trainer.last_generation, self.pace.left(state)))

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        is_done = state.is_world_process_zero and state.global_step >= state.max_steps
        if is_done and (remark := closing_remark(state.log_history)):
            print(f"WARNING: {remark}")
        if args.device.type == "cuda":
            peak = max(processes.gathered(torch.cuda.max_memory_allocated()))
            print(f"memory at the peak: {peak / 1e9:.1f} GB of {device_memory(args.device) / 1e9:.0f} GB", flush=True)

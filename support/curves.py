"""Reward curves of one or several runs as a picture, from the runs' own logs.

    python -m support.curves outputs/MyRun                   # writes outputs/MyRun/curves.png, as a run does itself
    python -m support.curves outputs/MyRun outputs/Other     # laid over each other: outputs/MyRun/curves-compared.png

Raw values are faint, smoothed ones bold.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from transformers import TrainerCallback

from support.checkpoints import checkpoints
from support.errors import BadInput
from support.record import printable

# Okabe and Ito's, colour-blind safe
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # told apart in print too
SMOOTHED_OVER = 20  # the bold line is a mean over 1/20 of the run

# a panel: its title, and what it shows as (name in the log, label); of the five rewards, a share of what each pays
MOST = {"correctness": 2.0, "int": 0.5, "strict_format": 0.5, "soft_format": 0.5, "xmlcount": 0.5}
PANELS = (
    ("reward: total (0 to 4) and its spread", (("reward", "reward"),)),
    (
        "format first, then correctness: share of the most",
        tuple((f"rewards/{name}_reward_func/mean", name.replace("_", " ")) for name in MOST),
    ),
    (
        "accuracy: share correct",
        (
            ("correct_rate", "sampled, training"),
            ("eval_strict_accuracy", "greedy, held-out, strict"),
            ("eval_lenient_accuracy", "greedy, held-out, lenient"),
        ),
    ),
    ("length: tokens a completion", (("completions/mean_length", "mean"),)),
    (
        "signal: share of groups that teach nothing",
        (("frac_reward_zero_std", "no signal"), ("completions/clipped_ratio", "completions cut off")),
    ),
    ("entropy (nats), KL", (("entropy", "entropy"), ("kl", "KL to the reference model"))),
    ("gradient norm before clipping", (("grad_norm", "gradient norm"),)),
    (
        "reflection: share with a phrase of it",
        (("reflection_rate", "sampled, training"), ("eval_reflection_rate", "greedy, held-out")),
    ),
)
SHARES = ("format", "accuracy", "signal", "reflection")  # panels from 0 to 1
OF_SEVERAL = ("correctness", "strict format")  # of the five rewards, where several runs are drawn


def read_log(folder: Path) -> list[dict]:
    """A run's log, a dict a logging step: of the finished run, else up to its newest checkpoint.

    Raises:
        BadInput: the folder holds none, or it cannot be read.
    """
    for place in (folder, *reversed(checkpoints(folder))):
        path = place / "trainer_state.json"
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))["log_history"]
            except (ValueError, KeyError) as error:
                raise BadInput(f"{path}: no trainer's log ({error!r})") from error
    raise BadInput(f"{folder}: no trainer_state.json there or in a checkpoint; is it a run's folder?")


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    """Draw the logs of one or several named runs; the picture appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure(logs).savefig(partial, format="png", dpi=75)
    os.replace(partial, path)


def figure(logs: dict[str, list[dict]]):
    """The picture. Of one run, a colour for each curve of a panel; of several, a colour for each run, and the same
    dashes for the same curve."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    several = len(logs) > 1
    picture = Figure(figsize=(16, 7.2), layout="constrained")
    for axes, (title, series) in zip(picture.subplots(2, 4).flat, PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        shown = [item for item in series if any(item[0] in row for log in logs.values() for row in log)]
        if several and title.startswith("format"):
            shown = [item for item in shown if item[1] in OF_SEVERAL]
        for run, log in enumerate(logs.values()):
            for number, (key, _) in enumerate(shown):
                _plot(axes, log, key, PALETTE[(run if several else number) % len(PALETTE)], STYLES[number])
        colours = ["grey"] * len(shown) if several else PALETTE
        keys = [Line2D([], [], color=c, linestyle=s) for c, s, _ in zip(colours, STYLES, shown, strict=False)]
        if len(shown) > 1:
            axes.legend(keys, [label for _, label in shown], fontsize=8, framealpha=0.7)
        if title.startswith(SHARES) and shown:
            axes.set_ylim(-0.03, 1.03)
        if title.startswith("reward"):
            low, high = axes.get_ylim()  # a reward of the user's own may pay more
            axes.set_ylim(min(-0.1, low), max(4.1, high))
        if not shown:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="grey")
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    names = [printable(name).replace("$", r"\$") for name in logs]  # a dollar would start a formula
    if several:
        keys = [Line2D([], [], color=PALETTE[run % len(PALETTE)], linewidth=3) for run in range(len(logs))]
        picture.legend(keys, names, loc="outside upper center", ncols=len(logs), fontsize=11)
    else:
        picture.suptitle(names[0], fontsize=12)
    return picture


def _plot(axes, log: list[dict], key: str, colour: str, style) -> None:
    rows = [row for row in log if row.get(key) is not None]
    if not rows:
        return
    most = MOST[key.split("/")[1].removesuffix("_reward_func")] if key.startswith("rewards/") else 1
    steps, values = [row["step"] for row in rows], [row[key] / most for row in rows]
    if key.startswith("eval_"):  # few points, each exact: no smoothing
        axes.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=5)
        return
    if key == "reward":
        spread = [row.get("reward_std") or 0 for row in rows]
        low, high = zip(*((v - s, v + s) for v, s in zip(values, spread, strict=True)), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    marker = "." if len(steps) < 10 else None
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8, marker=marker)
    axes.plot(steps, smooth(values), color=colour, linestyle=style, linewidth=2, marker=marker)


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a window of 1/`SMOOTHED_OVER` of all."""
    window = max(1, round(len(values) / SMOOTHED_OVER))
    recent = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(chunk) / len(chunk) for chunk in recent]


class Curves(TrainerCallback):
    """Redraws the run's picture at every save and at the end."""

    def __init__(self, settings):
        self.folder = settings.output_dir

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw({self.folder: state.log_history}, Path(self.folder) / "curves.png")

    on_train_end = on_save


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the picture goes into the first")
    folders = parser.parse_args(argv).runs
    try:
        logs = {str(folder): read_log(folder) for folder in folders}
    except BadInput as error:
        sys.exit(f"curves: {error}")
    path = folders[0] / ("curves.png" if len(folders) == 1 else "curves-compared.png")
    draw(logs, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()

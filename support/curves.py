"""A run's reward curves as a picture, from its log; benchmarks/curves.py lays several runs over each other."""

from io import BytesIO
from itertools import cycle
from pathlib import Path

from transformers import TrainerCallback

from support.checkpoints import checkpoints, state_of
from support.errors import BadInput
from support.record import printable, write_whole

# Okabe and Ito's, colour-blind safe
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # tell curves apart in print too
SMOOTHED_OVER = 20  # raw values are faint; the bold line is a mean over 1/20 of the run

MOST = {"correctness": 2.0, "int": 0.5, "strict format": 0.5, "soft format": 0.5, "xmlcount": 0.5}  # that a reward pays
REWARDS = {f"rewards/{label.replace(' ', '_')}_reward_func/mean": label for label in MOST}
PANELS = {  # by their titles: names in the log, and in the legend. A panel of shares goes from 0 to 1
    "reward: total and its spread": {"reward": "reward"},
    "format first, then correctness: share of the most": REWARDS,
    "accuracy: share correct": {
        "correct_rate": "sampled",
        "eval_strict_accuracy": "greedy, held-out, strict",
        "eval_lenient_accuracy": "greedy, held-out, lenient",
    },
    "length: tokens a completion": {"completions/mean_length": "length"},
    "signal: share of groups that teach nothing": {
        "frac_reward_zero_std": "no signal",
        "completions/clipped_ratio": "completions truncated",
    },
    "entropy (nats), KL": {"entropy": "entropy", "kl": "KL to the reference model"},
    "gradient norm before clipping": {"grad_norm": "gradient norm"},
    "reflection: share with a phrase of it": {"reflection_rate": "sampled", "eval_reflection_rate": "greedy, held-out"},
}


def read_log(folder: Path) -> list[dict]:
    """The log of a finished run, else of its newest checkpoint; BadInput where there is none, or it cannot be read."""
    for place in (folder, *reversed(checkpoints(folder))):
        try:
            return state_of(place)["log_history"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError) as error:
            raise BadInput(f"{place}/trainer_state.json: no trainer's log ({error!r})") from error
    raise BadInput(f"{folder}: no trainer_state.json there or in a checkpoint; is it a run's folder?")


def figure(name: str, log: list[dict]):
    """The picture of a run's log, with its name above."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(16, 7.2), layout="constrained")
    picture.subplots(2, 4)
    draw(picture, log, PALETTE)
    picture.suptitle(printable(name), fontsize=11, parse_math=False)
    return picture


def draw(picture, log: list[dict], colours) -> None:
    """Draw PANELS of a log into a picture's eight axes; a panel's curves have `colours` in this order."""
    from pandas import DataFrame

    means = {key for row in log for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    own = {key: printable(key[8:-5]).replace("$", r"\$") for key in sorted(means - REWARDS.keys())}
    panels = {title: labels | (own if "reward" in labels else {}) for title, labels in PANELS.items()}
    columns = ["step", "reward_std", *(key for labels in panels.values() for key in labels)]
    run = DataFrame(log, columns=columns).set_index("step").astype(float)
    for axes, (title, labels) in zip(picture.axes, panels.items(), strict=True):
        for (key, label), colour, style in zip(labels.items(), cycle(colours), cycle(STYLES), strict=False):
            if run[key].notna().any():
                _draw_curve(axes, run.dropna(subset=key), key, colour, style, label)
        handles, names = axes.get_legend_handles_labels()
        by_name = dict(zip(names, handles, strict=True))  # once each, where several runs are drawn
        if len(by_name) > 1:
            axes.legend(by_name.values(), by_name.keys(), fontsize=8, framealpha=0.7)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        if "share" in title:
            axes.set_ylim(-0.03, 1.03)


def _draw_curve(axes, run, key: str, colour: str, style, label: str) -> None:
    values = run[key] / MOST.get(REWARDS.get(key), 1)
    if key.startswith("eval_"):  # few points, each exact: no smoothing
        axes.plot(values, marker="o", markersize=5, color=colour, linestyle=style, label=label)
        return
    if key == "reward":
        axes.update_datalim([(1, 0), (1, 4)])  # at least; a reward of the user's own may pay more
        low, high = values - run["reward_std"], values + run["reward_std"]
        axes.fill_between(run.index, low, high, color=colour, alpha=0.12, linewidth=0)
    smooth = values.rolling(max(1, round(len(values) / SMOOTHED_OVER)), min_periods=1).mean()
    marker = "." if len(values) < 10 else None
    axes.plot(values, color=colour, alpha=0.3, linewidth=0.8, marker=marker)
    axes.plot(smooth, linewidth=2, color=colour, linestyle=style, label=label, marker=marker)


def save(picture, path: Path) -> None:
    """Write a picture, which appears whole or not at all."""
    picture.savefig(png := BytesIO(), format="png", dpi=75)
    write_whole(path, png.getvalue())


class Curves(TrainerCallback):
    """Redraws the run's picture at every save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            save(figure(args.output_dir, state.log_history), Path(args.output_dir) / "curves.png")

    on_train_end = on_save

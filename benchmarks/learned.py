"""What a run's own samples say of its learning: the share that is right in each 25 steps, with its interval.

    python benchmarks/learned.py outputs/RUN

A step's share is that of its 64 completions; as those of a group resemble each other, the unit is the step: a row's
interval is Student's 95% one over its steps, and the trend's p-value is Spearman's, of share against step.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from scipy import stats

STEPS = 25  # a row
COLUMNS = {  # of the log, and what a mean of it is multiplied by
    "in format": ("rewards/strict_format_reward_func/mean", 2),
    "an integer": ("rewards/int_reward_func/mean", 2),
    "tokens": ("completions/mean_length", 1),
    "cut off": ("completions/clipped_ratio", 1),
    "groups without signal": ("frac_reward_zero_std", 1),
    "tokens computed": ("computed_tokens", 1),
    "s a step": ("step_time", 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder, or a checkpoint's")
    log = json.loads((parser.parse_args().run / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in log if "reward" in row]
    right = [row["correct_rate"] for row in steps]

    print("| steps | right (95%) | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for first in range(0, len(steps), STEPS):
        rows, shares = steps[first : first + STEPS], right[first : first + STEPS]
        low, high = stats.t.interval(0.95, len(shares) - 1, mean(shares), stats.sem(shares))
        cells = [_cell(name, factor * mean(row[key] for row in rows)) for name, (key, factor) in COLUMNS.items()]
        span = f"{rows[0]['step']}-{rows[-1]['step']}"
        print(f"| {span} | {mean(shares):.1%} ({low:.1%}-{high:.1%}) | " + " | ".join(cells) + " |")
    trend = stats.spearmanr([row["step"] for row in steps], right)
    hours = sum(row["step_time"] for row in steps) / 3600
    print(f"\ntrend of what is right: rho {trend.statistic:.2f}, p = {trend.pvalue:.2g}; {hours:.1f} hours of steps")


def _cell(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "tokens" else f"{value:.1f}" if name == "s a step" else f"{value:.0%}"


if __name__ == "__main__":
    main()

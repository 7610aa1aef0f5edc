"""What a run's own samples say of its learning: the share that is right in each 25 steps with its interval, and whether
the sums that they write hold.

    python benchmarks/learned.py outputs/RUN
    python benchmarks/learned.py outputs/RUN outputs/RUN/evaluation.jsonl     # the sums of greedy answers as well

A step's share is that of its 64 completions; as those of a group resemble each other, the unit is the step: a row's
interval is Student's 95% one over its steps, and the trend's p-value is Spearman's, of share against step.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

import pandas
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from rewards import completion_text
from support.curves import read_log

STEPS = 25  # a row
COLUMNS = {  # of the log, and what a mean of it is multiplied by
    "in format": ("rewards/strict_format_reward_func/mean", 2),
    "tokens": ("completions/mean_length", 1),
    "truncated": ("completions/clipped_ratio", 1),
    "zero-advantage groups": ("frac_reward_zero_std", 1),
    "tokens computed": ("computed_tokens", 1),
    "s a step": ("step_time", 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("evaluations", type=Path, nargs="*", help="evaluation.jsonl of evaluate.py")
    args = parser.parse_args()
    run = args.run
    log = read_log(run)
    steps = [row for row in log if "reward" in row]
    right = [row["correct_rate"] for row in steps]
    logged = samples(run)

    names = [
        "steps",
        "right (95%)",
        "sums that hold",
        "in right ones",
        "advantage: they hold / not",
        "answers a group",
        *COLUMNS,
    ]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for first in range(0, len(steps), STEPS):
        rows, shares = steps[first : first + STEPS], right[first : first + STEPS]
        low, high = stats.t.interval(0.95, len(shares) - 1, mean(shares), stats.sem(shares))
        seen = logged[logged["step"].between(rows[0]["step"], rows[-1]["step"])]
        rewarded = seen[seen["correctness_reward_func"] > 0]
        answers = seen.groupby(["step", "question"])["extracted"].nunique()  # different ones
        cells = [_share_that_holds(seen["text"]), _share_that_holds(rewarded["text"]), _advantages(seen)]
        cells += [f"{answers.mean():.1f}"]
        cells += [_cell(name, factor * mean(row[key] for row in rows)) for name, (key, factor) in COLUMNS.items()]
        span = f"{rows[0]['step']}-{rows[-1]['step']}"
        print(f"| {span} | {mean(shares):.1%} ({low:.1%}-{high:.1%}) | " + " | ".join(cells) + " |")
    trend = stats.spearmanr([row["step"] for row in steps], right)
    in_group = logged.groupby(["step", "question"])["correctness_reward_func"].agg(lambda paid: (paid > 0).sum())
    never, once = (in_group == 0).sum(), (in_group == 1).sum()
    hours = sum(row["step_time"] for row in steps) / 3600
    print(f"\ntrend of what is right: rho {trend.statistic:.2f}, p = {trend.pvalue:.2g}; {hours:.1f} hours of steps")
    print(f"{len(in_group):,} groups, {never} of them without a right completion, {once} with one")
    met = logged.groupby("question")["step"].rank("dense").astype(int)
    by_meeting = (logged["correctness_reward_func"] > 0).groupby(met).mean()
    print("right on meeting a problem for the first, second, ... time: " + ", ".join(f"{x:.1%}" for x in by_meeting))
    for path in args.evaluations:
        answers = [json.loads(line)["completion"] for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"{path}: {_share_that_holds(answers)} of the sums hold in {len(answers):,} answers")


def samples(run: Path) -> pandas.DataFrame:
    """Every completion that was logged, with its question and its text."""
    samples = pandas.concat(map(pandas.read_parquet, sorted((run / "completions").glob("*.parquet"))))
    samples["question"] = samples["prompt"].map(lambda messages: messages[-1]["content"])
    samples["text"] = samples["completion"].map(completion_text)
    return samples


def sums_hold(text: str) -> list[bool]:
    """Whether each `a + b = c` in a text is so, for the four operations on two plain numbers."""
    number = r"\$?(\d+(?:\.\d+)?)"
    pattern = rf"(?<![\d.*/x+\-]){number}\s*([-+*x/])\s*{number}\s*=\s*{number}(?![\d.]|\s*[-+*x/])"
    found = []
    for first, sign, second, result in re.findall(pattern, text.replace(",", "")):
        a, b, c = float(first), float(second), float(result)
        if sign == "/":
            found.append(b != 0 and abs(a / b - c) < 0.01)
        else:
            found.append(abs({"+": a + b, "-": a - b, "*": a * b, "x": a * b}[sign] - c) < 0.01)
    return found


def _share_that_holds(texts) -> str:
    found = [holds for text in texts for holds in sums_hold(text)]
    return f"{mean(found):.0%} of {len(found):,}" if found else "none"


def _advantages(seen: pandas.DataFrame) -> str:
    """The mean advantage of completions whose sums all hold, and of the others with sums; completions
    without an advantage do not count."""
    live = seen[(seen["advantage"].abs() > 1e-6) & seen["text"].map(lambda text: bool(sums_hold(text)))]
    by_all = live["advantage"].groupby(live["text"].map(lambda text: all(sums_hold(text)))).mean()
    return f"{by_all.get(True, 0):+.2f} / {by_all.get(False, 0):+.2f}"


def _cell(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "tokens" else f"{value:.1f}" if name == "s a step" else f"{value:.0%}"


if __name__ == "__main__":
    main()

"""What each part of the recipe is worth on the demo: GRPO steps and seconds until the sums are right.

    OMP_NUM_THREADS=1 python benchmarks/worth.py --out outputs/worth       # 5 seeds x 8 settings: 50 minutes

Each seed teaches its own policy, as `python demo.py --seed SEED` does, and GRPO starts from it once for every setting,
64 completions a step each time. Greedy lenient accuracy is measured on 100 held-out problems every 5
steps; a run ends when it is 90%, or after the demo's 80 steps. Seconds are the processor's, spent in steps alone, so
that they are those of an idle machine where one thread computes. A row a run is printed, and the table at the end.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import TrainerCallback

import rewards
import train_grpo
from benchmarks.on_demo import EXAMPLES, cold_started, precision, settings, taught_policy, words

ENOUGH = 0.9
COLD_START = f"cold start, {EXAMPLES} examples"
SETTINGS = {
    "recipe": {},
    "the gist's rewards": {},  # what they pay, `GISTS` below
    "BETA 0.04": {"beta": 0.04},
    "bf16 weights": {"dtype": "bfloat16"},
    COLD_START: {},  # GRPO starts from what cold_start.py leaves
    "groups of 8": {"num_generations": 8},
    "groups of 4": {"num_generations": 4},
    "TRL's step": {"lean_step": False, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
}


# ---- what the widely copied gist pays, for the same five names


def _texts(completions) -> list[str]:
    return [completion[0]["content"] for completion in completions]


def _answer(text: str) -> str:
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def gist_xmlcount(completions, **kwargs) -> list[float]:
    """All that follows the last tag costs 0.001 a character, twice; where a newline is missing there, that is all of
    the text."""

    def one(text: str) -> float:
        paid = 0.125 * sum(text.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n"))
        if text.count("\n<answer>\n") == 1:
            paid += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
        if text.count("\n</answer>") == 1:
            paid += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
        return paid

    return [one(text) for text in _texts(completions)]


def gist_soft_format(completions, **kwargs) -> list[float]:
    """No line break between a tag and its end, although the prompt asks for them."""
    pattern = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
    return [0.5 * bool(pattern.match(text)) for text in _texts(completions)]


def gist_strict_format(completions, **kwargs) -> list[float]:
    """One line of reasoning, and a newline at the very end."""
    pattern = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
    return [0.5 * bool(pattern.match(text)) for text in _texts(completions)]


def gist_int(completions, **kwargs) -> list[float]:
    return [0.5 * _answer(text).isdigit() for text in _texts(completions)]


def gist_correctness(completions, answer, **kwargs) -> list[float]:
    return [2.0 * (_answer(text) == gold) for text, gold in zip(_texts(completions), answer, strict=True)]


GISTS = [gist_xmlcount, gist_soft_format, gist_strict_format, gist_int, gist_correctness]


# ---- one run


class Watch(TrainerCallback):
    """The first measured step that is good enough, and the processor's seconds in steps up to there."""

    def __init__(self):
        self.result = {"step": None, "lenient": None, "strict": None}
        self.seconds = 0.0

    def on_step_begin(self, *args, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):  # before the held-out problems are answered
        self.seconds += time.process_time() - self.began
        control.should_training_stop |= self.result["step"] is not None  # at step 0 already: the first one is made

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_n" not in logs:
            return
        self.result |= {"lenient": logs["eval_lenient_accuracy"], "strict": logs["eval_strict_accuracy"]}
        if logs["eval_lenient_accuracy"] >= ENOUGH and self.result["step"] is None:
            self.result |= {"step": state.global_step, "seconds": self.seconds}
            control.should_training_stop = state.global_step > 0


def measure(name: str, seed: int, out: Path) -> dict:
    taught, watch, build = out / f"taught-{seed}", Watch(), train_grpo.build_trainer

    def build_with_watch(*args):
        trainer = build(*args)
        trainer.callback_handler.callbacks.insert(0, watch)
        return trainer

    train_grpo.build_trainer = build_with_watch
    if name == "the gist's rewards":
        rewards.REWARD_FUNCS[:] = GISTS
    policy = cold_started(taught, out / f"{seed}-cold", seed) if name == COLD_START else taught
    flags = settings(taught, policy, out / f"{seed}-{name.replace(' ', '-')}", seed)
    flags |= {"eval_steps": 5, "sample_every": 0, "save_strategy": "no", **SETTINGS[name]}
    train_grpo.main(words(flags))
    return watch.result


def in_a_process(name: str, seed: int, out: Path) -> dict:
    command = [sys.executable, __file__, "--out", str(out), "--seeds", str(seed), "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("MEASURED "):
            return json.loads(line.removeprefix("MEASURED "))
    sys.exit(f"{name}, seed {seed}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


# ---- all of them


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.{digits}f}" for value in values) or "-"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(results: dict[str, list[dict]]) -> str:
    lines = ["| setting | reached 90% | steps | seconds | lenient at the end of the others |", "|---" * 5 + "|"]
    for name, runs in results.items():
        there = [run for run in runs if run["step"] is not None]
        others = ", ".join(f"{run['lenient']:.0%}" for run in runs if run["step"] is None)
        steps, seconds = spread([run["step"] for run in there], 0), spread([run["seconds"] for run in there], 0)
        lines.append(f"| {name} | {len(there)} of {len(runs)} | {steps} | {seconds} | {others} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print("MEASURED " + json.dumps(measure(args.measure, args.seeds[0], args.out)))
        return
    args.out.mkdir(parents=True)
    results = {name: [] for name in args.settings}
    for seed in args.seeds:
        taught_policy(args.out, seed, precision()["use_cpu"])
        for name in args.settings:
            results[name].append(in_a_process(name, seed, args.out))
            print(f"seed {seed:>2}  {name:<24} {results[name][-1]}", flush=True)
        print(table(results), flush=True)


if __name__ == "__main__":
    main()

"""A folder of GSM8K's short problems of few steps, for a model too small to solve the others: a solution has at most
MAX_STEPS calculator annotations (`<<48/2=24>>`), question and solution together at most MAX_CHARACTERS. All are of the
train split; HELD_OUT are kept back, as the folder's test.jsonl, so that settings can be chosen without a look at the
real test split.

    python benchmarks/easy_problems.py --dataset /data/gsm8k --out outputs/easy
    python benchmarks/easy_problems.py --dataset /data/gsm8k --out outputs/solved --solved outputs/RUN

With --solved, those of the training problems stay that a run on them has solved at least once in its logged samples
(`completions/`), so that a group of samples can differ; the held-out problems are the same.
"""

import argparse
import json
import random
from pathlib import Path

from learned import samples

MAX_STEPS, MAX_CHARACTERS, HELD_OUT, SEED = 2, 500, 200, 42


def is_easy(question: str, answer: str) -> bool:
    return answer.count("<<") <= MAX_STEPS and len(question) + len(answer) <= MAX_CHARACTERS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="the folder with GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="a folder for train.jsonl and test.jsonl")
    parser.add_argument("--solved", type=Path, help="the folder of a run on the easy problems")
    args = parser.parse_args()
    lines = (args.dataset / "train.jsonl").read_text(encoding="utf-8").splitlines()
    easy = [line for line in lines if is_easy(**json.loads(line))]
    random.Random(SEED).shuffle(easy)
    held_out, train = easy[:HELD_OUT], easy[HELD_OUT:]
    if args.solved:
        seen = samples(args.solved)
        solved = set(seen[seen["correctness_reward_func"] > 0]["question"].str.strip())
        train = [line for line in train if json.loads(line)["question"].strip() in solved]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", held_out), ("train", train)):
        (args.out / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    print(f"{len(lines):,} problems, {len(easy):,} easy; {HELD_OUT} held out, {len(train):,} to train on")


if __name__ == "__main__":
    main()

"""A folder of GSM8K's short problems of few steps, for a model too small to solve the others: a solution has at most
MAX_STEPS calculator annotations (`<<48/2=24>>`), question and solution have MAX_CHARACTERS. All come from the train
split; 200 are held out, as the folder's test.jsonl, so that settings can be chosen without a look at the real test
split.

    python benchmarks/easy_problems.py --dataset /data/gsm8k --out outputs/easy
"""

import argparse
import json
import random
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="the folder with GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="a folder for train.jsonl and test.jsonl")
    parser.add_argument("--max_steps", type=int, default=2, help="calculator annotations in a solution")
    parser.add_argument("--max_characters", type=int, default=500, help="of question and solution")
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    def is_easy(question: str, answer: str) -> bool:
        return answer.count("<<") <= args.max_steps and len(question) + len(answer) <= args.max_characters

    lines = (args.dataset / "train.jsonl").read_text(encoding="utf-8").splitlines()
    easy = [line for line in lines if is_easy(**json.loads(line))]
    random.Random(args.seed).shuffle(easy)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", easy[: args.held_out]), ("train", easy[args.held_out :])):
        (args.out / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    print(f"{len(lines):,} problems, {len(easy):,} of them easy, {args.held_out} of these held out")


if __name__ == "__main__":
    main()

"""What a policy's samples say, before it trains and after: pass@k, maj@K, and which groups would teach it."""

import asyncio
import math
from collections import Counter

import numpy
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

import rewards
from rewards import last_number, parse_number
from support.errors import BadInput
from support.evaluation import score
from support.faults import REWARD_ARGUMENTS, check_reward_functions, wrong_payment

KINDS = {  # of a group, by its samples; the four shares make up 1
    "all_right": "all right, in the format",
    "all_wrong_in_format": "all wrong, in the format",
    "never_in_format": "never in the format",
    "mixed": "mixed",
}
NO_COLUMNS = {*REWARD_ARGUMENTS, "prompt", "completion"}  # of the data, for rewards
RESAMPLES = 2000  # of the problems, with replacement, for an interval


def check_rewards(problems: list[dict]) -> None:
    """BadInput where REWARD_FUNCS cannot pay samples of these problems: those that TRL cannot call, and models."""
    if models := [reward for reward in rewards.REWARD_FUNCS if not callable(reward) or hasattr(reward, "parameters")]:
        raise BadInput(f"REWARD_FUNCS: --samples pays by functions, and {models[0]!s:.60} is a model")
    check_reward_functions(rewards.REWARD_FUNCS, sorted(set().union(*problems) - NO_COLUMNS))


def rows_of(problems: list[dict], prompts: list[list[dict]], completions: list[dict]) -> list[dict]:
    """The lines of samples-K.jsonl, one for each of B problems, from K rounds of B completions."""
    groups = [completions[i :: len(problems)] for i in range(len(problems))]
    each = zip(problems, groups, pay(problems, prompts, groups), strict=True)
    return [group_row(i, *of_problem) for i, of_problem in enumerate(each)]


def pay(problems: list[dict], prompts: list[list[dict]], groups: list[list[dict]]) -> list[list[float]]:
    """The total reward of each sample of each group, by REWARD_FUNCS as TRL calls them; a None counts as 0."""
    whose = [i for i, group in enumerate(groups) for _ in group]
    samples = [sample for group in groups for sample in group]
    given = {column: [problems[i].get(column) for i in whose] for column in set().union(*problems) - NO_COLUMNS} | {
        "prompts": [prompts[i] for i in whose],
        "completions": [[{"role": "assistant", "content": sample["text"]}] for sample in samples],
        "completion_ids": [sample["token_ids"] for sample in samples],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    total = numpy.zeros(len(samples))
    for reward in rewards.REWARD_FUNCS:
        paid = asyncio.run(reward(**given)) if is_async_callable(reward) else reward(**given)
        if wrong := wrong_payment(get_callable_name(reward), paid, len(samples)):
            raise BadInput(f"REWARD_FUNCS: {wrong}. The answers are kept, and the same command resumes")
        total += [0.0 if each is None else float(each) for each in paid]
    return total.reshape(len(problems), -1).tolist()


def group_row(index: int, problem: dict, group: list[dict], paid: list[float]) -> dict:
    """A line of samples-K.jsonl: a problem and its K samples, what they are, and whether they would teach."""
    scored = [{**score(index, problem, sample), "reward": reward} for sample, reward in zip(group, paid, strict=True)]
    row = {key: scored[0][key] for key in ("index", "question", "gold")}
    samples = [{key: value for key, value in one.items() if key not in row} for one in scored]
    right, in_format = (sum(one[key] for one in samples) for key in ("strict", "format"))
    if right == len(samples):
        kind = "all_right"
    elif not in_format:
        kind = "never_in_format"
    else:
        kind = "mixed" if right or in_format < len(samples) else "all_wrong_in_format"
    return {**row, "kind": kind, "would_teach": max(paid) - min(paid) > 1e-6, "samples": samples}


def pass_at_k(n: int, right: int, k: int) -> float:
    """The share of the sets of k out of n samples in which one at least is right, `right` of all being so: the unbiased
    estimator of arXiv 2107.03374."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list[str | None], gold: str) -> float:
    """1 where the most frequent number is the gold one, and its chance where one of several as frequent is drawn."""
    votes = Counter(number for answer in answers if (number := parse_number(answer)) is not None)
    first = [number for number, count in votes.items() if count == max(votes.values())]
    return (parse_number(gold) in first) / max(len(first), 1)


def measures(row: dict) -> dict[str, float]:
    """What is averaged over the problems, of one with K samples: pass@1, 2, 4 to K and maj@K, strict and lenient; 1 or
    0 for whether it would teach, and for each of KINDS."""
    samples, found = row["samples"], {}
    votes = {  # out of the format nothing is an answer, strictly
        "strict": [one["extracted"] if one["format"] else None for one in samples],
        "lenient": [last_number(one["completion"]) for one in samples],
    }
    counts = sorted({2**power for power in range(len(samples).bit_length())} | {len(samples)})
    for key, answers in votes.items():
        found |= {f"{key} pass@{k}": pass_at_k(len(samples), sum(one[key] for one in samples), k) for k in counts}
        found[f"{key} maj@{len(samples)}"] = majority(answers, row["gold"])
    return found | {"would_teach": row["would_teach"]} | {kind: row["kind"] == kind for kind in KINDS}


def averages(rows: list[dict], other: list[dict] | None = None) -> dict:
    """The means of `measures` over the problems, less those of `other` rows of the same problems; strict and lenient
    ones in a dict each. Beside them, as `ci95`, their 95% intervals by the bootstrap over problems: from the 2.5th to
    the 97.5th percentile of RESAMPLES means."""
    values = [measures(row) for row in rows]
    table = numpy.array([list(value.values()) for value in values], dtype=float)  # (problems, measures)
    if other is not None:
        table -= numpy.array([list(measures(row).values()) for row in other], dtype=float)
    draw = numpy.random.default_rng(0)
    means = [table[draw.integers(len(table), size=len(table))].mean(0) for _ in range(RESAMPLES)]
    intervals = numpy.percentile(means, (2.5, 97.5), axis=0).T.tolist()
    found = {"strict": {"ci95": {}}, "lenient": {"ci95": {}}, "ci95": {}}
    for name, value, interval in zip(values[0], table.mean(0).tolist(), intervals, strict=True):
        key, _, measure = name.rpartition(" ")
        place = found[key] if key else found
        place[measure], place["ci95"][measure] = value, interval
    return found


def summarize(rows: list[dict]) -> dict:
    """What samples-K.json says of all problems."""
    samples = [one for row in rows for one in row["samples"]]
    names = {"format_rate": "format", "truncated_rate": "truncated", "mean_completion_tokens": "tokens"}
    shares = {name: sum(one[key] for one in samples) / len(samples) for name, key in names.items()}
    return {"n": len(rows), **averages(rows), **shares}

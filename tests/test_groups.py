"""What is said of a policy's samples is so, counted by hand."""

from itertools import combinations, product

import pytest

import evaluate
import rewards
from evaluate import Task
from rewards import to_prompt
from support import groups
from support.errors import BadInput

RIGHT = "<reasoning>\nOne and 3.\n</reasoning>\n<answer>\n4\n</answer>"
WRONG = RIGHT.replace("4", "5")
OTHER = RIGHT.replace("4", "6")
BARE = "It is 4."  # the right number, without the format
PROBLEM = {"question": "1 + 3?", "answer": "4", "rationale": ""}


def rows(*groups_of_texts: tuple[str, ...]) -> list[dict]:
    """The lines of samples-K.jsonl for these samples of as many problems."""
    completions = [
        {"text": text, "token_ids": [1, 2], "tokens": 2, "truncated": False}
        for texts in zip(*groups_of_texts, strict=True)
        for text in texts
    ]
    problems = [PROBLEM] * len(groups_of_texts)
    prompts = [to_prompt(problem["question"]) for problem in problems]
    return groups.rows_of(problems, prompts, completions)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_sets_of_k_samples(n):
    for right, k in product(range(n + 1), range(1, n + 1)):
        sets = list(combinations([True] * right + [False] * (n - right), k))
        assert groups.pass_at_k(n, right, k) == pytest.approx(sum(map(any, sets)) / len(sets))


@pytest.mark.parametrize(
    ("answers", "share", "reason"),
    [
        (["4", "4", "5"], 1, "most say 4"),
        (["5", "4", "5"], 0, "most say 5"),
        (["4", "5"], 1 / 2, "a tie of two"),
        (["4", "5", "6"], 1 / 3, "of three"),
        (["4", "5", "6", "6"], 0, "a tie that does not matter"),
        (["4", "4.0", "$4", "5", "5"], 1, "the same number however it is written"),
        ([None, "none", "", "4"], 1, "what is no number has no vote"),
        ([None, ""], 0, "no votes at all"),
        (["5", "6"], 0, "a tie without the right one"),
    ],
)
def test_a_majority_is_of_numbers_and_a_tie_is_shared(answers, share, reason):
    assert groups.majority(answers, "4") == pytest.approx(share), reason


@pytest.mark.parametrize(
    ("texts", "kind", "would_teach", "reason"),
    [
        ((RIGHT, RIGHT), "all_right", False, "nothing is better than another"),
        ((WRONG, WRONG), "all_wrong_in_format", False, "nothing is right"),
        ((WRONG, OTHER), "all_wrong_in_format", False, "a wrong number is as wrong as another"),
        ((WRONG, RIGHT.replace("4", "4 eggs")), "all_wrong_in_format", True, "an integer is paid for"),
        ((BARE, BARE), "never_in_format", False, "right, but not where the format has it"),
        ((BARE, "4"), "never_in_format", True, "a number alone is paid as an answer"),
        ((RIGHT, WRONG), "mixed", True, "right and wrong"),
        ((WRONG, BARE), "mixed", True, "in the format and not"),
    ],
)
def test_a_group_is_of_one_kind_and_teaches_where_its_rewards_differ(texts, kind, would_teach, reason):
    (row,) = rows(texts)
    assert (row["kind"], row["would_teach"]) == (kind, would_teach), reason
    assert [sample["completion"] for sample in row["samples"]] == list(texts)


def test_shares_are_averages_over_problems():
    found = groups.summarize(rows((RIGHT, RIGHT), (RIGHT, WRONG), (BARE, BARE), (WRONG, WRONG)))
    assert found["strict"]["pass@1"] == pytest.approx((1 + 1 / 2) / 4)
    assert found["strict"]["pass@2"] == pytest.approx(2 / 4)
    assert found["strict"]["maj@2"] == pytest.approx((1 + 1 / 2) / 4)
    assert found["lenient"]["pass@1"] == pytest.approx((1 + 1 / 2 + 1) / 4)
    assert found["would_teach"] == pytest.approx(1 / 4)
    assert [found[kind] for kind in groups.KINDS] == [1 / 4] * 4
    assert found["format_rate"] == pytest.approx(6 / 8)


def test_an_interval_covers_the_mean_it_is_of():
    """Of 100 sets of problems, drawn from a policy that solves 30% of them, about 95% have 30% in their interval."""
    import numpy

    draw, covered = numpy.random.default_rng(1), 0
    right, wrong = rows((RIGHT,), (WRONG,))
    widths = []
    for _ in range(100):
        found = groups.averages([right if each else wrong for each in draw.random(100) < 0.3])
        low, high = found["strict"]["ci95"]["pass@1"]
        covered += low <= 0.3 <= high
        widths.append(high - low)
    assert 0.88 <= covered / 100 <= 1
    assert 0.15 < sum(widths) / 100 < 0.21, "as of a share of 100: 4 x sqrt(0.3 x 0.7 / 100)"


def test_a_difference_is_of_the_same_problems():
    """Paired: the interval of a difference that is the same everywhere has no width."""
    some, others = rows((RIGHT, RIGHT), (RIGHT, WRONG)), rows((RIGHT, WRONG), (WRONG, WRONG))
    found = groups.averages(some, others)["strict"]
    assert found["pass@1"] == pytest.approx(1 / 2)
    assert found["ci95"]["pass@1"] == pytest.approx([1 / 2, 1 / 2])
    assert found["pass@2"] == pytest.approx(1 / 2)
    assert found["ci95"]["pass@2"] == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ((BARE, BARE), ["0% of the groups of 2 would teach", "100% are never in the format", "cold_start.py --model"]),
        ((BARE, "4"), ["100% of the groups of 2 would teach", "but 100% are never in the format", "cold_start.py --m"]),
        ((WRONG, OTHER), ["100% teach nothing, being all wrong, in the format", "easier problems, a larger model"]),
        ((RIGHT, RIGHT), ["100% teach nothing, being all right, in the format", "harder problems"]),
        ((RIGHT, WRONG), ["100% of the groups of 2 would teach", "enough for GRPO"]),
        ((WRONG, "no format"), ["no sample has the right number", "the format and no more"]),
        ((RIGHT,), ["one sample a problem is no group", "--samples 8"]),
    ],
)
def test_the_last_sentence_says_what_to_do(texts, words):
    said = advice(rows(texts))
    assert all(word in said for word in words), said


def test_the_bounds_between_enough_and_few_are_said():
    teaches, does_not, solved = rows((RIGHT, WRONG), (WRONG, WRONG), (RIGHT, RIGHT))
    for count, words in ((6, "enough for GRPO"), (5, "may learn from this, slowly"), (3, "have hardly learned")):
        said = advice([teaches] * count + [does_not] * (9 - count) + [solved])
        assert words in said
        assert ("being all wrong, in the format" in said) == (count < 6), "of those that teach nothing the most"


def advice(of: list[dict]) -> str:
    """The last sentence on these rows."""
    return evaluate.advice(groups.summarize(of), of, Task("outputs/cold", samples=len(of[0]["samples"])))


async def waited_for(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def columns_too(prompts, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("seen", answer)
    log_metric("global_step", trainer_state.global_step)
    return [None if gold == "4" else 1.0 for gold in answer]


def test_rewards_of_a_users_own_decide_what_teaches(monkeypatch):
    monkeypatch.setattr(rewards, "REWARD_FUNCS", [waited_for, columns_too])
    same, other = rows((RIGHT, WRONG), (RIGHT, RIGHT + "\n"))
    assert (same["would_teach"], other["would_teach"]) == (False, True)
    assert [sample["reward"] for sample in same["samples"]] == [len(RIGHT)] * 2


@pytest.mark.parametrize("paid", [[1.0], [float("nan"), 1.0], [float("inf"), 1.0], ["a", "b"], [[1.0], [2.0]], None])
def test_what_is_no_reward_is_said_with_its_functions_name(paid, monkeypatch):
    def odd(completions, **kwargs):
        return paid

    monkeypatch.setattr(rewards, "REWARD_FUNCS", [odd])
    with pytest.raises(BadInput, match=r"odd paid .* right are 2 finite numbers"):
        rows((RIGHT, WRONG))


def test_a_reward_model_is_refused_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(rewards, "REWARD_FUNCS", ["owner/model"])
    with pytest.raises(BadInput, match="owner/model is a model"):
        groups.check_rewards([PROBLEM])

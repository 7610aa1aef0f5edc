"""Reward functions of a user's own: every form that TRL takes, with a message where they cannot be used."""

import asyncio
import functools
import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from support.errors import BadInput, RunStopped
from support.faults import check_reward_functions, checked

COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("a", "bb", "ccc")]
TRAINER = SimpleNamespace(state=SimpleNamespace(global_step=4), args=SimpleNamespace(output_dir="nowhere"))


def given(**columns) -> dict:
    """What TRL calls a reward function with."""
    own = {"prompts": ["?"] * 3, "completion_ids": [[1]] * 3, "log_extra": None, "log_metric": None}
    return {**own, "completions": COMPLETIONS, "trainer_state": TRAINER.state, **columns}


def pay(reward, **columns):
    paid = checked(reward, "mine", TRAINER)(**given(**columns))
    return asyncio.run(paid) if asyncio.iscoroutine(paid) else paid


def length(completions, scale=1, **kwargs):
    return [scale * len(completion[0]["content"]) for completion in completions]


async def length_later(completions, scale=1, **kwargs):
    return length(completions, scale)


class Length:
    def __call__(self, completions, **kwargs):
        return length(completions)


class LengthLater:
    async def __call__(self, completions, **kwargs):
        return length(completions)


FORMS = [
    length,
    length_later,
    functools.partial(length, scale=1),
    functools.partial(length_later, scale=1),
    functools.partial(functools.partial(length), scale=1),
    Length(),
    LengthLater(),
    Length().__call__,
    lambda completions, **kwargs: tuple(length(completions)),
    lambda completions, **kwargs: numpy.array(length(completions)),
    lambda completions, **kwargs: torch.tensor(length(completions)),
]


@pytest.mark.parametrize("reward", FORMS, ids=range(len(FORMS)))
def test_every_form_of_a_reward_function_pays(reward):
    assert list(pay(reward)) == [1, 2, 3]


def test_a_reward_may_be_none_where_it_does_not_apply():
    assert pay(lambda **kwargs: [None, 1, True]) == [None, 1, True]


WRONG = [
    (None, "mine paid None; right are 3 finite numbers", "a function that forgot its return"),
    (1.0, r"mine paid 1\.0; right are 3", "a bare number"),
    ("123", "mine paid '123'; right are 3", "text"),
    ([1.0, 2.0], r"mine paid \[1\.0, 2\.0\]; right are 3", "too few"),
    ([1.0, "2", 3.0], "mine paid .*'2'", "text in the list"),
    ([[1.0], [2.0], [3.0]], r"mine paid \[\[1\.0\], ", "lists in the list"),
    ([1.0, math.nan, 3.0], r"mine paid nan for completion 1 of 3 \(1 such\)", "which TRL reads as None"),
    ([-math.inf, 1, math.inf], r"mine paid -inf for completion 0 of 3 \(2 such\)", "infinity"),
    (numpy.array([1, math.nan, 3]), "mine paid nan for completion 1 of 3", "of numpy"),
    (torch.tensor([1, math.nan, 3]), "mine paid nan for completion 1 of 3", "of torch"),
    ({0: 1.0, 1: 1.0, 2: 1.0}, "mine paid {0: 1.0, 1: 1.0, 2: 1.0}; right are 3", "whose keys are numbers, too"),
    (
        [math.nan, 2.0, 3.0],
        "That step changed no weight; nowhere holds no whole checkpoint yet",
        "what it can be resumed from",
    ),
]


@pytest.mark.parametrize(("paid", "message", "reason"), WRONG)
def test_what_is_no_reward_ends_the_run_with_the_functions_name(paid, message, reason):
    async def later(**kwargs):
        return paid

    for reward in (lambda **kwargs: paid, later):
        with pytest.raises(RunStopped, match=message) as error:
            pay(reward)
        assert "step 5: " in str(error.value), reason
        assert "\n" not in str(error.value), reason


def test_a_reward_models_nan_ends_the_run_too():
    class Model(torch.nn.Module):
        def forward(self, numbers):
            return SimpleNamespace(logits=numbers[:, None])

    model = Model()
    assert checked(model, "judge", TRAINER) is model, "it stays a module, as TRL tells it from a function by that"
    assert model(torch.ones(2)).logits.shape == (2, 1)
    with pytest.raises(RunStopped, match="step 5: judge paid nan for completion 1 of 2"):
        model(torch.tensor([1.0, math.nan]))


def strict(completions, answer):
    return [0.0] * len(completions)


def by_level(completions, level, **kwargs):
    return [0.0] * len(completions)


def test_what_trl_cannot_call_is_refused_by_name_and_all_at_once():
    with pytest.raises(BadInput) as error:
        check_reward_functions([length, strict, functools.partial(by_level), 7, None], ["prompt", "answer"])
    message = str(error.value)
    for words in (
        "strict: got an unexpected keyword argument 'prompts'",
        "by_level: missing a required argument: 'level'",
        "int: 7 is not a callable object",
        "NoneType: None is not a callable object",
        "They get prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer; **kwargs takes",
    ):
        assert words in message
    with pytest.raises(BadInput, match=r"reward model './nowhere/judge': no such folder here, and it cannot be loaded"):
        check_reward_functions([length, "./nowhere/judge"], ["prompt"])
    check_reward_functions([by_level, *FORMS, torch.nn.Linear(1, 1)], ["prompt", "answer", "level"])

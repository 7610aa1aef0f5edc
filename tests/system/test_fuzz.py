"""Input that nobody thought of ends in a reward or in a message, never in a traceback."""

import contextlib
import dataclasses
import io
import json
import math
import os
import tempfile
from datetime import date
from pathlib import Path
from unittest import mock

import pytest
import yaml
from conftest import SMALL, load_problems
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_grpo
from rewards import REWARD_FUNCS, TAGS, extract_xml_answer, parse_number
from support.errors import BadInput
from support.problems import load_tokenizer
from support.settings import Settings, read_settings

# the same inputs on every machine, however slow it is
FUZZ = settings(derandomize=True, deadline=None, database=None)

# ---- rewards

NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers().map("{:,}".format),
    st.floats().map(str),
    st.decimals().map(str),
    st.sampled_from(["$", "-", "%", ",", ".", "7²", "٧", "1e9", "nan", "9" * 5000, "0" * 40, "1,08"]),
)
PIECES = st.one_of(st.sampled_from([*TAGS, *(f"{tag}\n" for tag in TAGS), "\n", " ", "####"]), NUMBERS, st.text())
IN_FORMAT = st.builds("<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>{}".format, PIECES, PIECES, PIECES)
COMPLETIONS = st.one_of(st.lists(PIECES, max_size=12).map("".join), IN_FORMAT, st.text(st.characters(codec=None)))
MOST = (0.5, 0.5, 0.5, 0.5, 2.0)


@settings(FUZZ, max_examples=600)
@given(st.lists(COMPLETIONS, max_size=4), NUMBERS)
@example(["<reasoning>\nx\n</reasoning>\n<answer>\n7\n</answer>"], "7")
def test_rewards_are_bounded_and_what_a_stricter_format_pays_a_weaker_one_pays_too(texts, gold):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"prompts": texts, "completions": completions, "answer": [gold] * len(texts)}
    paid = [function(**columns) for function in REWARD_FUNCS]
    for rewards, most in zip(paid, MOST, strict=True):
        assert len(rewards) == len(texts)
        assert all(isinstance(reward, float) and math.isfinite(reward) and 0 <= reward <= most for reward in rewards)
    for text, xml, soft, strict, integer, correct in zip(texts, *paid, strict=True):
        if strict:
            assert (soft, xml) == (0.5, 0.5)
        if soft:
            assert all(text.count(tag) == 1 for tag in TAGS)
        if correct:
            assert parse_number(gold) is not None
        if integer or correct:
            assert parse_number(extract_xml_answer(text)) is not None


# ---- rows of a dataset

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
ANSWERS = st.one_of(JSON, st.builds("{}#### {}".format, st.text(st.characters(codec=None)), NUMBERS))
ROWS = st.one_of(JSON, st.fixed_dictionaries({"question": JSON, "answer": ANSWERS}))
LINES = st.one_of(ROWS.map(lambda row: json.dumps(row).encode()), st.binary(max_size=40))


@pytest.fixture(scope="module")
def tokenizer(policy):
    return load_tokenizer(str(policy))


@settings(FUZZ, max_examples=300)
@given(lines=st.lists(LINES, min_size=1, max_size=3))
@example([b'{"question": "\\ud83d?", "answer": "#### 1"}'])
@example([b'{"question": "Why?", "answer": "\\ud83d #### 1"}'])
@example([b"[" * 100_000])
def test_a_row_is_a_problem_that_can_be_used_or_one_that_is_named(tokenizer, lines):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.jsonl").write_bytes(b"\n".join(lines))
        try:
            problems, _ = load_problems(folder, None, "train")
        except BadInput as error:
            assert folder in str(error)
            return
    for problem in problems:
        assert parse_number(problem["answer"]) is not None
        tokenizer([problem["question"], problem["rationale"]])


# ---- a --config file

FLAGS = sorted(field.name for field in dataclasses.fields(Settings) if field.init)
YAML = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.dates(),
    st.binary(max_size=4),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.integers(), max_size=2),
)


@settings(FUZZ, max_examples=800)
@given(content=st.dictionaries(st.one_of(st.sampled_from(FLAGS), st.text(), st.just("env")), YAML, max_size=2))
@example({"seed": 2**40})
@example({"eval_steps": math.inf})
@example({"eval_steps": None})
@example({"per_device_train_batch_size": True})
@example({"report_to": 1})
@example({"output_dir": date(2026, 11, 24)})
@example({"steps_per_generation": [1]})
@example({"deepspeed": "x"})
@example({"accelerator_config": {"a": 1}})
@example({"metric_for_best_model": 1.5})
@example({1: 2})
def test_a_config_file_is_a_run_or_a_message(policy, data, content):
    """With whatever YAML can hold for one or two flags, beside the good flags of the command line."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):  # `env` sets some
        (Path(folder) / "sweep.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        small = {"model_name_or_path": policy, "dataset_name": data, "output_dir": f"{folder}/run", **SMALL}
        given_here = [f"--{name}={value}" for name, value in small.items() if name not in content]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                read_settings(vars(train_grpo), ["--config", f"{folder}/sweep.yaml", *given_here])
        except SystemExit as exit:
            assert exit.code == 2
            assert errors.getvalue().startswith("train_grpo.py")
            assert "Traceback" not in errors.getvalue()

"""An evaluation counts what it says, and does not depend on how problems are batched."""

import json
import re

import pytest
from conftest import start

import evaluate
from gsm8k import BadInput, load_problems, load_tokenizer, to_prompt

GOOD = "<reasoning>\nOne and 3.\n</reasoning>\n<answer>\n4\n</answer>"
KEYS = [
    "model",
    "dataset",
    "split",
    "n",
    "strict_accuracy",
    "strict_ci95",
    "lenient_accuracy",
    "format_rate",
    "truncated_rate",
    "mean_completion_tokens",
    "reflection_rate",
]


@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        ("3 + 1 = 4", "4", "the last one"),
        ("It is 4.", "4", "a sentence's full stop"),
        ("It is $1,080.50!", "$1,080.50", "currency, comma, decimals"),
        ("from 9, 5, and", "5", "a comma after a number"),
        ("so -4", "-4", "a sign"),
        ("9-4", "4", "a minus between numbers is no sign"),
        ("<answer>\n4\n</answer>", "4", "in tags"),
        ("four", None, "words"),
        ("", None, "empty"),
    ],
)
def test_last_number(text, number, reason):
    assert evaluate.last_number(text) == number, reason


SCORES = [
    (GOOD, True, True, True, "right and in format"),
    ("<reasoning>\nOne.\n</reasoning>\n<answer>\n5\n</answer>", False, False, True, "wrong and in format"),
    ("The answer is 4.", False, True, False, "right and out of format"),
    ("4", False, True, False, "a bare number is no format"),
    ("4 or 5", False, False, False, "the last number counts"),
    ("<reasoning>One</reasoning><answer>4</answer>", False, True, False, "not on lines of their own"),
    ("", False, False, False, "empty"),
]


@pytest.mark.parametrize(("text", "strict", "lenient", "in_format", "reason"), SCORES)
def test_score_of_one_completion(text, strict, lenient, in_format, reason):
    completion = {"text": text, "tokens": 7, "truncated": False}
    row = evaluate.score(3, {"question": "?", "answer": "4"}, completion)
    assert (row["strict"], row["lenient"], row["format"]) == (strict, lenient, in_format), reason
    assert (row["index"], row["gold"], row["completion"], row["tokens"]) == (3, "4", text, 7)


def test_summary_shares_and_wilson_interval():
    rows = [
        {
            "strict": i < 3,
            "lenient": i < 5,
            "format": i < 8,
            "truncated": i == 0,
            "tokens": i,
            "completion": "Recheck" * (i < 2),
        }
        for i in range(10)
    ]
    report = evaluate.summarize(rows)
    assert report["n"] == 10
    assert (report["strict_accuracy"], report["lenient_accuracy"], report["format_rate"]) == (0.3, 0.5, 0.8)
    assert (report["truncated_rate"], report["mean_completion_tokens"], report["reflection_rate"]) == (0.1, 4.5, 0.2)
    assert report["strict_ci95"] == pytest.approx([0.1078, 0.6032], abs=1e-4)  # Wilson's, from a textbook table


def test_completions_are_the_same_at_any_batch_size(policy, data):
    """Left padding and position ids: a shorter prompt beside a longer one must not change."""
    model, tokenizer = evaluate.load_policy(str(policy)), load_tokenizer(str(policy))
    problems = load_problems(str(data), None, "test")[0]
    prompts = [to_prompt("Well, " * (i % 4) + p["question"]) for i, p in enumerate(problems)]
    alone = evaluate.complete(model, tokenizer, prompts, 16, batch_size=1)
    assert len({c["text"] for c in alone}) > 3, "the policy says different things to different prompts"
    for batch_size in (3, 10):
        assert evaluate.complete(model, tokenizer, prompts, 16, batch_size=batch_size) == alone


def test_completions_are_plain_greedy_whatever_the_model_declares(policy):
    """Qwen2.5 declares sampling and a repetition penalty in its generation config."""
    model, tokenizer = evaluate.load_policy(str(policy)), load_tokenizer(str(policy))
    prompt = [to_prompt("What is 1 + 1?")]
    plain = evaluate.complete(model, tokenizer, prompt, 16)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=16)
    assert evaluate.complete(model, tokenizer, prompt, 16) == plain
    assert plain[0]["tokens"] <= 16


def test_a_completion_ends_at_any_of_the_models_eos_tokens(policy):
    model, tokenizer = evaluate.load_policy(str(policy)), load_tokenizer(str(policy))
    prompt = [to_prompt("What is 1 + 1?")]
    assert evaluate.complete(model, tokenizer, prompt, 16)[0]["truncated"]
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    stopped = evaluate.complete(model, tokenizer, prompt, 16)[0]
    assert (stopped["tokens"], stopped["truncated"]) == (1, False)


def test_evaluating_a_run_uses_its_settings_and_writes_both_files(trained, data):
    run, _ = trained
    done = start("evaluate.py", run, "--limit", 6)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "evaluation.json").read_text())
    assert list(report)[: len(KEYS)] == KEYS
    assert (report["dataset"], report["split"], report["n"]) == (str(data), "test", 6)
    assert report["max_completion_length"] == 12, "from the run's run.json"
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(6))
    assert all(row["tokens"] <= 12 for row in rows)
    assert "strict accuracy" in done.stdout

    again = start("evaluate.py", run / "checkpoint-2", "--limit", 2, "--output_dir", run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((run / "evaluation.json").read_text())["n"] == 2
    (kept,) = [path for path in run.glob("evaluation-*.json")]
    assert json.loads(kept.read_text())["n"] == 6, "the earlier evaluation is set aside, not overwritten"
    assert "is kept as" in again.stdout


def test_ask_prints_one_answer_and_writes_nothing(trained):
    run, _ = trained
    before = sorted(run.iterdir())
    done = start("evaluate.py", run, "--ask", "how many r's are in strawberry?")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout), "a model's control characters do not reach the terminal"
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "no such folder"),
        (["RUN", "--limit", "0"], "--limit must be at least 1"),
        (["RUN", "--dataset_name", "./nowhere"], "no such folder"),
        (["RUN", "--dataset_test_split", "validation"], "validation.jsonl: no such file"),
        (["RUN", "--lim", "3"], "unrecognized arguments"),
    ],
)
def test_a_users_mistake_is_one_clear_message(trained, words, message, capsys):
    words = [str(trained[0]) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as exit:
        evaluate.main(words)
    assert exit.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(exit.value.code)


def test_a_folder_without_weights_names_the_checkpoint_to_evaluate(trained, tmp_path):
    run, _ = trained
    for path in run.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(BadInput, match="checkpoint-4"):
        evaluate.load_policy(str(tmp_path))

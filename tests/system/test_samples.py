"""`evaluate.py --samples`: what a policy's samples say, through the command itself."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import cold_flags, ended, flags, launch, problem, write_jsonl

import cold_start
import evaluate
import train_grpo
from rewards import to_prompt
from support import evaluation
from support.problems import examples_in, load_tokenizer

ANSWER = "<reasoning>\nCount.\n</reasoning>\n<answer>\n7\n</answer>"


@pytest.fixture(scope="module")
def sure(tmp_path_factory, policy) -> Path:
    """A policy that answers 7 in the format, whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "sure"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), load_tokenizer(str(policy))
    prompts = [tokenizer.apply_chat_template(to_prompt(problem(a, 3)["question"]), tokenize=False) for a in range(40)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    opened = tokenizer.apply_chat_template(to_prompt("?"), add_generation_prompt=True, tokenize=False)
    turn = opened.removeprefix(tokenizer.apply_chat_template(to_prompt("?"), tokenize=False))
    for step in range(120):
        texts = [f"{prompts[(8 * step + i) % 40]}{turn}{ANSWER}{tokenizer.eos_token}" for i in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.clone()
        labels[:, : -len(tokenizer(f"{ANSWER}{tokenizer.eos_token}")["input_ids"])] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sevens(tmp_path_factory) -> Path:
    """Problems whose answer is 7, to train on and to test, and two of which it is not."""
    folder = tmp_path_factory.mktemp("sevens")
    write_jsonl(folder / "train.jsonl", [problem(a, 7 - a) for a in range(6)] + [problem(8, 3), problem(9, 3)])
    write_jsonl(folder / "test.jsonl", [problem(a, 7 - a) for a in range(4)])
    return folder


def sampled(model, data, folder, *words) -> tuple[dict, list[dict]]:
    """`evaluate.py --samples 4` in this process: what it writes."""
    words = [
        model,
        "--samples",
        4,
        "--dataset_name",
        data,
        "--output_dir",
        folder,
        "--max_completion_length",
        60,
        *words,
    ]
    evaluate.main(["--use_cpu", *map(str, words)])
    name = "samples-4-train" if "train" in words else "samples-4"
    lines = (Path(folder) / f"{name}.jsonl").read_text().splitlines()
    return json.loads((Path(folder) / f"{name}.json").read_text()), [json.loads(line) for line in lines]


def test_a_policy_that_is_always_right_has_nothing_to_learn(sure, sevens, tmp_path, capsys):
    report, rows = sampled(sure, sevens, tmp_path, "--temperature", 0.1)
    expected = {"pass@1": 1, "pass@2": 1, "pass@4": 1, "maj@4": 1}
    for key in ("strict", "lenient"):
        assert {name: report[key][name] for name in expected} == expected
    assert (report["n"], report["samples"], report["temperature"], report["seed"]) == (4, 4, 0.1, 42)
    assert (report["would_teach"], report["all_right"], report["mixed"]) == (0, 1, 0)
    assert [sample["completion"] for row in rows for sample in row["samples"]] == [ANSWER] * 16
    out = capsys.readouterr().out
    assert "pass@4" in out
    assert "100% teach nothing, being all right, in the format: take harder problems" in out


def test_one_that_is_never_right_is_told_what_helps(sure, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "test.jsonl", [problem(a, 3) for a in (1, 2, 3)])
    report, _ = sampled(sure, tmp_path / "data", tmp_path / "out", "--temperature", 0.1)
    assert report["lenient"]["pass@4"] == report["would_teach"] == 0
    assert report["all_wrong_in_format"] == 1
    assert "easier problems, a larger model" in capsys.readouterr().out


def test_one_that_never_writes_the_format_is_told_of_the_cold_start(policy, data, tmp_path, capsys):
    report, _ = sampled(policy, data, tmp_path)
    assert report["never_in_format"] == 1
    assert report["strict"]["pass@4"] == 0
    assert "are never in the format: python cold_start.py --model_name_or_path" in capsys.readouterr().out


def test_the_same_command_samples_the_same_and_another_seed_does_not(babbler, data, tmp_path):
    found = [sampled(babbler, data, tmp_path / name)[1] for name in ("once", "twice")]
    assert found[0] == found[1]
    assert len({sample["completion"] for row in found[0] for sample in row["samples"]}) > 30, "they differ"
    assert sampled(babbler, data, tmp_path / "other", "--seed", 43)[1] != found[0]


def test_an_interrupted_one_is_resumed_to_the_same_samples(babbler, data, tmp_path):
    words = ["--batch_size", 2, "--max_completion_length", 100]
    whole = sampled(babbler, data, tmp_path / "whole", *words)
    folder = tmp_path / "ended"
    flags = ["--samples", 4, "--dataset_name", data, "--output_dir", folder, "--max_completion_length", 60, *words]
    process = launch("evaluate.py", "--use_cpu", babbler, *flags)
    while process.poll() is None and not list(folder.glob("samples-4.unfinished-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "samples-4.json").exists()
    (kept,) = folder.glob("samples-4.unfinished-*")
    assert kept.read_text().count("token_ids") < 40
    assert sampled(babbler, data, folder, *words) == whole
    assert {path.name for path in folder.iterdir()} == {"samples-4.json", "samples-4.jsonl"}


def test_two_models_are_compared_by_the_same_problems(babbler, sure, sevens, tmp_path, capsys):
    baseline = shutil.copytree(babbler, tmp_path / "before")
    report, _ = sampled(sure, sevens, tmp_path / "after", "--compare", baseline)
    found = report["comparison"]
    before = json.loads((baseline / "samples-4.json").read_text())
    assert found["before"] == before, "the baseline's is kept in its own folder"
    assert found["difference"]["strict"]["pass@1"] == pytest.approx(
        report["strict"]["pass@1"] - before["strict"]["pass@1"]
    )
    assert (tmp_path / "after" / "pass_at_k.png").read_bytes()[1:4] == b"PNG"
    assert "strict, against the baseline: pass@1 +" in (out := capsys.readouterr().out), out
    assert "lenient, against the baseline: pass@1 +" in out
    again, _ = sampled(sure, sevens, tmp_path / "again", "--compare", baseline)
    assert again["comparison"] == found
    assert "baseline, the recipe's prompt: the evaluation of" in capsys.readouterr().out
    words = ["--use_cpu", sure, "--samples", 4, "--compare", baseline, "--dataset_name", sevens, "--temperature", 0.5]
    _, error = ended(capsys, 1, [*words, "--max_completion_length", 60, "--output_dir", tmp_path / "hot"], evaluate)
    assert "temperature: 0.9 there, 0.5 here" in error


def test_what_would_teach_is_kept_as_data_to_train_on(policy, data, tmp_path, capsys):
    report, rows = sampled(policy, data, tmp_path / "out", "--split", "train", "--keep", tmp_path / "kept")
    assert (report["split"], report["n"]) == ("train", 32)
    teach = [row["question"] for row in rows if row["would_teach"]]
    assert 0 < len(teach) < 32
    kept = [json.loads(line) for line in (tmp_path / "kept" / "train.jsonl").read_text().splitlines()]
    original = {row["question"]: row for row in map(json.loads, (data / "train.jsonl").read_text().splitlines())}
    assert kept == [original[question] for question in teach], "rows as they were"
    assert [json.loads(line) for line in (tmp_path / "kept" / "test.jsonl").read_text().splitlines()] == [
        json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()
    ]
    out = capsys.readouterr().out
    assert f"kept: {len(teach)} of 32 problems" in out
    command = out.partition("next:  python train_grpo.py ")[2].split()
    few = {"max_steps": "1", "save_steps": "1", "per_device_train_batch_size": "4"}
    train_grpo.main([*flags(policy, data, tmp_path / "run", **few), *command])
    assert f"kept: {len(teach)} problems to train on" in capsys.readouterr().out.replace(str(tmp_path / "kept"), "kept")


def test_a_look_first_then_keep_does_not_sample_again(policy, data, tmp_path, capsys, monkeypatch):
    sampled(policy, data, tmp_path / "out", "--split", "train")
    monkeypatch.setattr(evaluation, "load_policy", None)  # whoever samples needs it
    sampled(policy, data, tmp_path / "out", "--split", "train", "--keep", tmp_path / "kept")
    assert (tmp_path / "kept" / "train.jsonl").is_file()
    words = [policy, "--samples", 4, "--split", "train", "--dataset_name", data, "--keep", tmp_path / "kept"]
    assert "is there already" in ended(capsys, 1, words, evaluate)[1]


def test_samples_of_something_else_are_not_kept(policy, data, tmp_path, capsys, monkeypatch):
    sampled(policy, data, tmp_path / "out", "--split", "train", "--limit", 6)
    words = ["--use_cpu", policy, "--samples", 4, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    words += ["--max_completion_length", 60, "--split", "train", "--limit", 6, "--keep", tmp_path / "kept"]
    assert "seed: 42 there, 7 here" in ended(capsys, 1, [*words, "--seed", 7], evaluate)[1]
    monkeypatch.setattr(evaluate.rewards, "__file__", str(data / "train.jsonl"))
    assert "rewards py: " in ended(capsys, 1, words, evaluate)[1]
    assert not (tmp_path / "kept").exists()


def test_what_is_kept_has_the_names_that_training_reads_and_the_limits_that_were_measured(
    policy, data, tmp_path, capsys
):
    other = shutil.copytree(data, tmp_path / "data")
    (other / "test.jsonl").rename(other / "validation.jsonl")
    words = ["--dataset_test_split", "validation", "--one_shot", "true", "--temperature", 0.7]
    sampled(policy, other, tmp_path / "out", "--split", "train", *words, "--keep", tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"train.jsonl", "test.jsonl"}
    command = capsys.readouterr().out.partition("next:  ")[2].strip()
    assert command.endswith("--max_completion_length 60 --one_shot true --temperature 0.7 --use_cpu true")
    lone = tmp_path / "lone" / "train.jsonl"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write_jsonl(lone, [{"task": row["question"], "result": row["answer"]} for row in rows])
    words = ["--question_column", "task", "--answer_column", "result"]
    sampled(policy, lone.parent, tmp_path / "out-2", "--split", "train", *words, "--keep", tmp_path / "kept-2")
    out = capsys.readouterr().out
    assert "--keep: without a test split" in out
    assert out.strip().endswith("--eval_steps 0")
    assert {path.name for path in (tmp_path / "kept-2").iterdir()} == {"train.jsonl"}
    assert json.loads((tmp_path / "kept-2" / "train.jsonl").read_text().splitlines()[0])["result"].startswith("0 + 3")


def test_mistakes_are_told_before_the_baseline_is_sampled(policy, data, tmp_path, capsys):
    words = ["--samples", 2, "--dataset_name", data, "--compare", policy, "--use_cpu", "--output_dir", tmp_path]
    for more, message in (
        ([tmp_path / "typo", *words], "no such folder"),
        ([policy, *words, "--chat_template_kwargs", '{"foo": 1}'], "no setting of the chat template"),
        ([policy, *words, "--split", "train", "--keep", data / "train.jsonl" / "x"], "cannot be made there"),
    ):
        out, error = ended(capsys, 1, more, evaluate)
        assert message in error
        assert "baseline, " not in out


def test_a_damaged_baseline_is_one_message(policy, data, tmp_path, capsys):
    baseline = shutil.copytree(policy, tmp_path / "before")
    sampled(policy, data, baseline, "--limit", 2)
    words = ["--use_cpu", policy, "--samples", 4, "--dataset_name", data, "--limit", 2, "--max_completion_length", 60]
    words += ["--compare", baseline, "--output_dir", tmp_path / "out"]
    lines = (baseline / "samples-4.jsonl").read_text().splitlines()
    fewer = {**json.loads(lines[0]), "samples": json.loads(lines[0])["samples"][:3]}
    for first in ("[1]", json.dumps(fewer), '{"question": "?", "gold": "1"}'):
        (baseline / "samples-4.jsonl").write_text("\n".join([first, *lines[1:]]) + "\n")
        assert "cannot be read" in ended(capsys, 1, words, evaluate)[1]


def test_a_picture_has_both_models_whatever_their_names(sure, sevens, tmp_path):
    report, _ = sampled(sure, sevens, tmp_path / "same" / "name")
    picture = evaluate.draw_pass_at_k([("a/name", report), ("b/name", report)])
    assert [line.get_label() for line in picture.axes[0].lines] == [
        f"{key}: {name}" for name in ("a/name", "b/name") for key in ("strict", "lenient")
    ]


def test_none_that_would_teach_leaves_no_folder(sure, sevens, tmp_path, capsys):
    words = [sure, "--samples", 2, "--split", "train", "--dataset_name", sevens, "--temperature", 0.1]
    words += ["--keep", tmp_path / "kept", "--output_dir", tmp_path, "--max_completion_length", 60, "--use_cpu"]
    assert "no problem would teach" in ended(capsys, 1, words, evaluate)[1]
    assert not (tmp_path / "kept").exists()


def test_problems_that_a_cold_start_has_shown_are_left_out(policy, data, tmp_path, capsys):
    short = {"examples": "5", "num_train_epochs": "1", "save_steps": "100"}
    cold_start.main(cold_flags(policy, data, tmp_path / "cold", **short))
    shown = {example["prompt"][-1]["content"] for example in examples_in(tmp_path / "cold")}
    for words in ([tmp_path / "cold"], [shutil.copytree(policy, tmp_path / "base"), "--compare", tmp_path / "cold"]):
        report, rows = sampled(words[0], data, tmp_path / "out", "--split", "train", *words[1:])
        assert report["n"] == 32 - len(shown) == 27
        assert not {row["question"] for row in rows} & shown
        assert "5 problems that a cold start has shown are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--samples", "4", "--temperature", "0"], "--temperature must be a number above 0"),
        (["--samples", "4", "--temperature", "inf"], "--temperature must be a number above 0"),
        (["--samples", "4", "--seed", "-1"], "--seed must be at least 0"),
        (["--samples", "1", "--split", "train", "--keep", "kept"], "groups of at least two"),
        (["--samples", "4", "--split", "train", "--keep", ""], "--keep needs a folder"),
        (["--temperature", "0.7"], "--temperature is for --samples"),
        (["--seed", "1"], "--seed is for --samples"),
        (["--split", "train"], "--split is for --samples"),
        (["--samples", "4", "--keep", "kept"], "--keep is for --split train"),
        (["--samples", "4", "--split", "test", "--keep", "kept"], "--keep is for --split train"),
        (["--samples", "4", "--native"], "goes without --native and --ask"),
        (["--samples", "4", "--ask", "2 + 2?"], "goes without --native and --ask"),
        (["--samples", "4", "--split", "validation"], "invalid choice"),
    ],
)
def test_flags_that_do_not_go_together(words, message, policy, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(policy), *words])
    assert message in capsys.readouterr().err


def test_two_processes_are_refused(policy, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it with python" in ended(capsys, 1, [policy, "--samples", 4], evaluate)[1]

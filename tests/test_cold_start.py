"""The supervised stage before GRPO: its examples, what it learns, and that it survives what happens to runs."""

import json
import shutil
import signal

import pandas as pd
import pytest
from conftest import GSM8K, ended, flags, identical, launch, settings, start, weights, write_jsonl
from safetensors.torch import load_file

import train_grpo
from rewards import ONE_SHOT_ANSWER, ONE_SHOT_QUESTION, REWARD_FUNCS
from support.cold_start import build_trainer, from_dataset, target
from support.problems import load_problems, load_tokenizer

# long enough for the tiny policy to learn the format by heart, and for a signal to hit
STAGE = {
    "cold_start_examples": 24,
    "cold_start_epochs": 40,
    "cold_start_batch_size": 8,
    "cold_start_learning_rate": "5e-3",
    "max_completion_length": 60,
    "max_steps": 4,
    "save_steps": 2,
}


def reward(text: str, gold: str) -> float:
    completions = [[{"role": "assistant", "content": text}]]
    return sum(f(prompts=[None], completions=completions, answer=[gold])[0] for f in REWARD_FUNCS)


@pytest.fixture(scope="session")
def cold_started(tmp_path_factory, policy, data):
    """A finished run with a cold start: its folder, and the process."""
    output = tmp_path_factory.mktemp("runs") / "cold"
    done = start("train_grpo.py", *flags(policy, data, output, **STAGE))
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done


# ---- examples


@pytest.mark.parametrize(
    ("rationale", "answer", "reason"),
    [
        ("He has 3*4=<<3*4=12>>12 eggs.\nThat is all.", "12", "a calculator annotation"),
        ("It costs $1,080.", "1,080", "a comma in the gold answer"),
        ("  \nShe owes 5.\n\n", "-5", "a sign, and blank lines around"),
        ("a << b and c >> d", "1", "signs that are no annotation"),
    ],
)
def test_a_target_is_paid_in_full(rationale, answer, reason):
    text = target(rationale, answer)
    assert reward(text, answer) == 4.0, reason
    assert "<<3" not in text
    assert text.endswith("</answer>"), "EOS follows at once"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K folder")
def test_the_target_of_every_row_of_gsm8k_is_paid_in_full():
    problems, _ = load_problems(str(GSM8K), None, "train")
    assert len(problems) == 7473
    texts = [target(problem["rationale"], problem["answer"]) for problem in problems]
    assert all(reward(text, problem["answer"]) == 4.0 for text, problem in zip(texts, problems, strict=True))
    assert not any("<<" in text for text in texts)


def test_the_worked_example_is_paid_in_full():
    assert reward(ONE_SHOT_ANSWER, "16") == 4.0


def test_the_loss_is_on_the_completion_and_its_end_alone(policy, data, tmp_path):
    run = settings(*flags(policy, data, tmp_path / "run", **STAGE))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    examples = from_dataset(samples, 8, run, tokenizer)
    trainer = build_trainer(run, tmp_path / "stage", examples, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {example["completion"][0]["content"] for example in examples}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels[labels != -100]
        assert tokenizer.eos_token_id in learned, "where to stop is learned"
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() in texts, "and the completion, whole"
        assert len(learned) < len(ids[ids != tokenizer.pad_token_id])


# ---- the stage


def test_after_the_stage_the_policy_writes_the_format_and_stops(cold_started):
    run, _ = cold_started
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    at_start = next(row for row in log if "eval_n" in row and row["step"] == 0)
    assert at_start["eval_format_rate"] > 0.5
    assert at_start["eval_truncated_rate"] < 0.5
    first = next(row for row in log if "reward" in row)
    assert first["rewards/strict_format_reward_func/mean"] > 0.1, "GRPO starts from there"


def test_problems_that_were_shown_are_not_trained_on_again(cold_started, tmp_path):
    run, done = cold_started
    assert "was shown 24 problems; the other 8 are left for GRPO" in done.stdout
    shown = [json.loads(line) for line in (run / "cold-start" / "examples.jsonl").read_text().splitlines()]
    shown = {example["prompt"][-1]["content"] for example in shown}
    assert len(shown) == 24
    tables = [pd.read_parquet(path) for path in (run / "completions").glob("*.parquet")]
    asked = {prompt[-1]["content"] for table in tables for prompt in table["prompt"]}
    assert asked
    assert not asked & shown


def test_a_run_in_its_cold_start_resumes_to_the_same_run(cold_started, policy, data, tmp_path):
    """Killed in the middle of the stage, then stopped by a signal in it, then killed after it."""
    whole, _ = cold_started
    words = flags(policy, data, tmp_path / "run", **{**STAGE, "save_steps": 10})
    again = ["--resume_from_checkpoint", "auto"]
    happens = [("cold start 20/", signal.SIGKILL, -9), ("cold start 50/", signal.SIGTERM, 143)]
    happens += [("the other 8 are left for GRPO", signal.SIGKILL, -9)]
    for attempt, (text, number, status) in enumerate(happens):
        process = launch("train_grpo.py", *words, *(again if attempt else []))
        for line in process.stdout:
            if text in line:
                break
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == status, errors[-4000:]
        if not attempt:
            (kept,) = (tmp_path / "run" / "cold-start").glob("checkpoint-*")
            assert kept.name in ("checkpoint-10", "checkpoint-20"), "SAVE_STEPS holds for this stage too"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    done = start("train_grpo.py", *words, *again)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "going on from the cold start" in done.stdout
    assert "cold start 5/" not in done.stdout, "the finished stage is not done again"
    assert identical(weights(whole / "cold-start"), weights(tmp_path / "run" / "cold-start"))
    assert identical(weights(whole), weights(tmp_path / "run"))


def test_an_adapter_carries_over_from_the_stage_to_grpo(policy, data, tmp_path):
    run = tmp_path / "run"
    settings = {**STAGE, "use_peft": "true", "lora_r": 4, "lora_dropout": 0, "beta": 0.1}
    done = start("train_grpo.py", *flags(policy, data, run, **settings))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "with the cold start's adapter" in done.stdout
    first = next(line for line in done.stdout.splitlines() if line.startswith("step 1/4"))
    assert " KL 0 " in first, "the reference is the policy after the stage, so that GRPO starts at no distance from it"
    done = start("evaluate.py", run / "cold-start", "--limit", 2)
    assert done.returncode == 0, done.stderr[-4000:]

    shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    words = flags(policy, data, tmp_path / "resumed", **settings)
    train_grpo.main([*words, "--resume_from_checkpoint", "auto"])
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "resumed"))
    assert identical(first, second), "the adapter in training is resumed, beside the reference's"


def test_the_policys_own_right_answers_are_a_source(policy, data, tmp_path, capsys):
    """First a policy that has learned eight answers to a one-shot prompt by heart; then one from its own answers."""
    few = tmp_path / "few"
    rows = (data / "train.jsonl").read_text().splitlines(keepends=True)[:10]
    few.mkdir()
    (few / "train.jsonl").write_text("".join(rows))
    able = {**STAGE, "one_shot": "true", "max_prompt_length": 400, "cold_start_examples": 8, "cold_start_epochs": 80}
    train_grpo.main(flags(policy, few, tmp_path / "able", **{**able, "eval_steps": 0, "max_steps": 1}))
    settings = {**STAGE, "cold_start_source": "self", "cold_start_examples": 2, "cold_start_epochs": 1}
    settings |= {"eval_steps": 0, "max_steps": 1, "temperature": 0.3}
    capsys.readouterr()
    train_grpo.main(flags(tmp_path / "able" / "cold-start", few, tmp_path / "run", **settings))
    assert "answers are right and in the format" in capsys.readouterr().out
    lines = (tmp_path / "run" / "cold-start" / "examples.jsonl").read_text().splitlines()
    gold = {problem["question"]: problem["answer"] for problem in load_problems(str(few), None, "train")[0]}
    assert len(lines) == 2
    for example in map(json.loads, lines):
        question, text = example["prompt"][-1]["content"], example["completion"][0]["content"]
        assert reward(text, gold[question]) >= 3.5
        assert ONE_SHOT_QUESTION not in json.dumps(example["prompt"]), "taught to answer without the worked example"


def test_a_policy_that_never_succeeds_is_no_source(policy, data, tmp_path):
    settings = {**STAGE, "cold_start_source": "self", "cold_start_examples": 2}
    with pytest.raises(SystemExit, match="0 of 16 answers of the policy were right and in the format"):
        train_grpo.main(flags(policy, data, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cold_start_examples": 33}, "COLD_START_EXAMPLES is 33, of 32 problems"),
        ({"cold_start_examples": 31}, "GRPO needs 2 others at a time"),
        ({"cold_start_examples": 8, "max_completion_length": 5}, "only 0 solutions of 32 fit in MAX_COMPLETION_LENGTH"),
    ],
)
def test_too_many_examples_are_an_error_before_the_model_loads(changes, message, policy, data, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_grpo.main(flags(policy, data, tmp_path / "run", **{**STAGE, **changes}))


def test_a_solution_without_a_rationale_is_not_shown(policy, tmp_path, capsys):
    rows = [
        {"question": f"What is {a}?", "answer": f"It is {a}.\n#### {a}" if a % 2 else f"#### {a}"} for a in range(8)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    few = {**STAGE, "eval_steps": 0}
    run, tokenizer = settings(*flags(policy, tmp_path, tmp_path / "run", **few)), load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    examples = from_dataset(samples, 4, run, tokenizer)
    assert all("It is" in example["completion"][0]["content"] for example in examples)
    assert "4 of 8 solutions are not to be shown" in capsys.readouterr().out


def test_a_stage_that_is_done_is_not_silently_kept_under_other_settings(cold_started, policy, data, tmp_path):
    shutil.copytree(cold_started[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4"))
    words = flags(policy, data, tmp_path / "run", **{**STAGE, "cold_start_epochs": 3, "allow_changed_settings": "true"})
    with pytest.raises(SystemExit, match="cold_start_epochs: 40 -> 3"):
        train_grpo.main([*words, "--resume_from_checkpoint", "auto"])


def test_a_stage_that_ended_with_a_signal_leaves_no_checkpoint(cold_started, policy, data, tmp_path):
    """That of its last step was still there when the run ended."""
    shutil.copytree(cold_started[0], tmp_path / "run")
    (tmp_path / "run" / "cold-start" / "checkpoint-120").mkdir()
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").unlink()
    train_grpo.main([*flags(policy, data, tmp_path / "run", **STAGE), "--resume_from_checkpoint", "auto"])
    assert not [*(tmp_path / "run" / "cold-start").glob("checkpoint-*")]


def test_a_stage_that_is_begun_is_not_gone_on_with_under_other_settings(cold_started, policy, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cold_started[0] / "cold-start", run / "cold-start", ignore=shutil.ignore_patterns("done.json"))
    facts = json.loads((cold_started[0] / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "outcome": "running"}))
    other = {"cold_start_examples": 8, "cold_start_batch_size": 4, "allow_changed_settings": "true"}
    with pytest.raises(SystemExit, match="settings \\(cold_start_examples: 24 -> 8\\)"):
        train_grpo.main([*flags(policy, data, run, **{**STAGE, **other}), "--resume_from_checkpoint", "auto"])


def test_a_stage_that_blows_up_names_its_own_rate(policy, data, tmp_path, capsys):
    words = flags(policy, data, tmp_path / "run", **{**STAGE, "cold_start_learning_rate": "1e30"})
    assert "Lower COLD_START_LEARNING_RATE (now 1e+30)" in ended(capsys, 1, words)[1]


def test_a_model_that_cannot_be_taught_is_one_message_and_leaves_nothing(policy, data, tmp_path):
    shutil.copytree(policy, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="SFTTrainer cannot be built"):
        train_grpo.main(flags(tmp_path / "model", data, tmp_path / "run", **STAGE))
    assert not (tmp_path / "run" / "run.json").exists()


# ---- one shot


def test_the_worked_example_is_in_every_prompt_of_training_and_evaluation(policy, data, tmp_path):
    run = tmp_path / "run"
    settings = {"one_shot": "true", "max_prompt_length": 400, "max_steps": 1}
    done = start("train_grpo.py", *flags(policy, data, run, **settings))
    assert done.returncode == 0, done.stderr[-4000:]
    for prompt in pd.read_parquet(next((run / "completions").glob("*.parquet")))["prompt"]:
        assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
        assert prompt[1]["content"] == ONE_SHOT_QUESTION
        assert prompt[2]["content"] == ONE_SHOT_ANSWER
    done = start("evaluate.py", run, "--limit", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((run / "evaluation.json").read_text())["one_shot"] is True, "as it was trained"
    done = start(
        "evaluate.py", policy, "--dataset_name", data, "--limit", 2, "--compare", run, "--output_dir", tmp_path
    )
    assert done.returncode == 1
    assert "one shot: True there, False here" in done.stderr

"""The cold start as a user types it: what it learns, what train_grpo.py makes of it, and that it survives faults."""

import json
import shutil
import signal

import pandas as pd
import pytest
from conftest import cold_flags, ended, flags, identical, launch, load_problems, start, until, weights

import cold_start
import evaluate
import train_grpo
from rewards import ONE_SHOT_ANSWER, ONE_SHOT_QUESTION, REWARD_FUNCS
from support.problems import examples_in, load_tokenizer
from support.record import Run
from support.settings import read_settings


@pytest.fixture(scope="module")
def cold(tmp_path_factory, policy, data):
    """A finished cold start: its folder, and the process."""
    output = tmp_path_factory.mktemp("runs") / "cold"
    done = start("cold_start.py", *cold_flags(policy, data, output))
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done


def questions(examples: list[dict]) -> set[str]:
    return {example["prompt"][-1]["content"] for example in examples}


def asked(run) -> set[str]:
    tables = [pd.read_parquet(path) for path in (run / "completions").glob("*.parquet")]
    return {prompt[-1]["content"] for table in tables for prompt in table["prompt"]}


def test_the_loss_is_on_the_completion_and_its_end_alone(policy, data, tmp_path):
    words = cold_flags(policy, data, tmp_path / "run", examples="8")
    settings = read_settings(vars(cold_start), words, cold_start.ColdStartSettings)
    tokenizer = load_tokenizer(str(policy))
    samples, _ = cold_start.load_samples(settings, tokenizer)
    examples = cold_start.from_dataset(samples, settings, tokenizer)
    trainer = cold_start.build_trainer(settings, tokenizer, examples, Run(settings))
    batch = next(iter(trainer.get_train_dataloader()))
    texts = {example["completion"][0]["content"] for example in examples}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels[labels != -100]
        assert tokenizer.eos_token_id in learned, "where to stop is learned"
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() in texts, "and the completion, whole"
        assert len(learned) < len(ids[ids != tokenizer.pad_token_id])


def test_it_prints_what_it_shows_a_line_a_step_and_what_to_type_next(cold):
    run, done = cold
    assert "24 examples, source 'dataset'. The first:\n<reasoning>\n" in done.stdout
    assert "step 5/120  loss " in done.stdout
    said = json.loads((run / "run.json").read_text())
    command = f"python train_grpo.py --model_name_or_path {run} --dataset_name {said['settings']['dataset_name']}"
    assert done.stdout.splitlines()[-1] == f"next:  {command} --use_cpu true", "where it ran, too"
    assert said["outcome"] == "finished"
    assert (run / "cold_start.py").is_file(), "as it ran"


def test_grpo_starts_from_a_policy_that_writes_the_format_and_leaves_out_what_it_was_shown(
    cold, data, tmp_path, capsys
):
    evaluate.main([str(cold[0]), "--use_cpu"])
    measured = json.loads((cold[0] / "evaluation.json").read_text())
    assert measured["format_rate"] > 0.5
    assert measured["truncated_rate"] < 0.5
    run, small = tmp_path / "run", {"max_steps": 4, "max_completion_length": 60, "eval_steps": 0}
    capsys.readouterr()
    train_grpo.main(flags(cold[0], data, run, **small))
    assert (
        "24 of them were shown in the model's cold start and are left out, the other 8 stay" in capsys.readouterr().out
    )
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert log[0]["rewards/strict_format_reward_func/mean"] > 0.1
    shown = questions(examples_in(cold[0]))
    assert len(shown) == 24
    assert asked(run)
    assert not asked(run) & shown
    train_grpo.main(flags(cold[0], data, tmp_path / "all", **small, reuse_shown="true"))
    assert "24 of them were shown in the model's cold start, and stay" in capsys.readouterr().out
    assert asked(tmp_path / "all") & shown


def test_too_few_problems_that_were_not_shown_are_an_error(cold, data, tmp_path):
    few = shutil.copytree(data, tmp_path / "data")
    shown = questions(examples_in(cold[0]))
    rows = [row for row in (few / "train.jsonl").read_text().splitlines() if json.loads(row)["question"] in shown]
    (few / "train.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(SystemExit, match="0 problems are fewer than the 2 prompts"):
        train_grpo.main(flags(cold[0], few, tmp_path / "run"))


def test_it_is_killed_and_stopped_and_resumes_to_the_same_policy(cold, policy, data, tmp_path):
    run, again = tmp_path / "run", ["--resume_from_checkpoint", "auto"]
    words = cold_flags(policy, data, run)
    process = launch("cold_start.py", *words)
    until(process, "step 20/120")
    process.kill()
    process.communicate()
    process = launch("cold_start.py", *words, *again)
    until(process, "step 50/120")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors[-4000:]
    command = errors.strip().splitlines()[-1].split()
    assert command[0] == "python"
    assert not (run / "model.safetensors").exists(), "what is not finished does not look finished"
    done = start("cold_start.py", *command[2:])
    assert done.returncode == 0, done.stderr[-4000:]
    assert identical(weights(run), weights(cold[0]))
    assert examples_in(run) == examples_in(cold[0])


def test_one_that_died_between_its_last_step_and_its_end_saves_its_policy(cold, policy, data, tmp_path):
    run = shutil.copytree(cold[0], tmp_path / "run")
    (run / "model.safetensors").unlink()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "outcome": "running"}))
    cold_start.main([*cold_flags(policy, data, run), "--resume_from_checkpoint", "auto"])
    assert identical(weights(run), weights(cold[0]))
    assert json.loads((run / "run.json").read_text())["outcome"] == "finished"


def test_with_lora_a_whole_model_is_left_from_which_an_adapter_starts(policy, data, tmp_path, capsys):
    run, lora = tmp_path / "cold", {"use_peft": "true", "lora_r": 4}
    cold_start.main(cold_flags(policy, data, run, **lora, num_train_epochs=10, learning_rate="1e-2"))
    assert not [*run.glob("adapter_*")]
    before, after = weights(policy), weights(run)
    assert before.keys() == after.keys()
    assert not identical(before, after)
    evaluate.main([str(run), "--limit", "2", "--use_cpu"])
    capsys.readouterr()
    train_grpo.main(flags(run, data, tmp_path / "run", **lora, beta=0.1, max_steps=1, eval_steps=0))
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1"))
    assert " KL 0 " in first, "the reference is the policy after the cold start"


def reward(text: str, gold: str) -> float:
    completions = [[{"role": "assistant", "content": text}]]
    return sum(f(prompts=[None], completions=completions, answer=[gold])[0] for f in REWARD_FUNCS)


def test_the_policys_own_right_answers_are_a_source(policy, data, tmp_path, capsys):
    """First a policy that has learned eight answers to a one-shot prompt by heart; then one from its own answers."""
    few, able, run = (tmp_path / name for name in ("few", "able", "run"))
    few.mkdir()
    (few / "train.jsonl").write_text("".join((data / "train.jsonl").read_text().splitlines(keepends=True)[:10]))
    one_shot = {"one_shot": "true", "max_prompt_length": 400, "examples": 8, "num_train_epochs": 80}
    cold_start.main(cold_flags(policy, few, able, **one_shot))
    capsys.readouterr()
    cold_start.main(cold_flags(able, few, run, source="self", examples=2, num_train_epochs=1, temperature=0.3))
    assert "answers are right and in the format" in capsys.readouterr().out
    gold = {problem["question"]: problem["answer"] for problem in load_problems(str(few), None, "train")[0]}
    examples = examples_in(run)
    assert len(examples) == 2
    for example in examples:
        question, text = example["prompt"][-1]["content"], example["completion"][0]["content"]
        assert reward(text, gold[question]) >= 3.5
        assert ONE_SHOT_QUESTION not in json.dumps(example["prompt"]), "taught to answer without the worked example"


def test_a_policy_that_never_succeeds_is_no_source(policy, data, tmp_path):
    with pytest.raises(SystemExit, match="0 of 16 answers of the policy were right and in the format"):
        cold_start.main(cold_flags(policy, data, tmp_path / "run", source="self", examples=2))


def test_one_that_is_done_is_complete_and_other_settings_are_refused(cold, policy, data, capsys):
    again = ["--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit) as exit:
        cold_start.main([*cold_flags(policy, data, cold[0]), *again])
    assert exit.value.code == 0
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        cold_start.main([*cold_flags(policy, data, cold[0], num_train_epochs=3), *again])
    assert exit.value.code == 2
    assert "num_train_epochs: 40.0 -> 3.0" in capsys.readouterr().err


def test_one_that_blows_up_names_the_rate(policy, data, tmp_path, capsys):
    words = cold_flags(policy, data, tmp_path / "run", learning_rate="1e30")
    assert "Lower LEARNING_RATE (now 1e+30)" in ended(capsys, 1, words, cold_start)[1]


def test_a_model_that_cannot_be_taught_is_one_message_and_leaves_nothing(policy, data, tmp_path):
    shutil.copytree(policy, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="SFTTrainer cannot be built"):
        cold_start.main(cold_flags(tmp_path / "model", data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- one shot


def test_the_worked_example_is_in_every_prompt_of_training_and_evaluation(policy, data, tmp_path, capsys):
    run = tmp_path / "run"
    train_grpo.main(flags(policy, data, run, one_shot="true", max_prompt_length=400, max_steps=1, eval_steps=0))
    for prompt in pd.read_parquet(next((run / "completions").glob("*.parquet")))["prompt"]:
        assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
        assert prompt[1]["content"] == ONE_SHOT_QUESTION
        assert prompt[2]["content"] == ONE_SHOT_ANSWER
    evaluate.main([str(run), "--limit", "2", "--use_cpu"])
    assert json.loads((run / "evaluation.json").read_text())["one_shot"] is True, "as it was trained"
    words = [policy, "--dataset_name", data, "--limit", 2, "--compare", run, "--output_dir", tmp_path, "--use_cpu"]
    with pytest.raises(SystemExit, match="one shot: True there, False here"):
        evaluate.main([str(word) for word in words])

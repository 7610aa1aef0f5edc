"""What a cold start shows: solutions that the rewards pay in full."""

import json
import shlex
from types import SimpleNamespace

import pytest
from conftest import GSM8K, cold_flags, load_problems, write_jsonl

import cold_start
import train_grpo
from cold_start import from_dataset, target
from rewards import ONE_SHOT_ANSWER, REWARD_FUNCS, to_prompt
from support.errors import BadInput
from support.problems import examples_in, load_tokenizer
from support.settings import read_settings


def reward(text: str, gold: str) -> float:
    completions = [[{"role": "assistant", "content": text}]]
    return sum(f(prompts=[None], completions=completions, answer=[gold])[0] for f in REWARD_FUNCS)


@pytest.mark.parametrize(
    ("rationale", "answer", "reason"),
    [
        ("He has 3*4=<<3*4=12>>12 eggs.\nThat is all.", "12", "a calculator annotation"),
        ("It costs $1,080.", "1,080", "a comma in the gold answer"),
        ("  \nShe owes 5.\n\n", "-5", "a sign, and blank lines around"),
        ("It costs 18.", "$18.00", "a whole number of dollars"),
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


def test_a_solution_without_a_rationale_is_not_shown(babbler, tmp_path, capsys):
    rows = [
        {"question": f"What is {a}?", "answer": f"It is {a}.\n#### {a}" if a % 2 else f"#### {a}"} for a in range(8)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    words = cold_flags(babbler, tmp_path, tmp_path / "run", examples="4")
    settings, tokenizer = (
        read_settings(vars(cold_start), words, cold_start.ColdStartSettings),
        load_tokenizer(str(babbler)),
    )
    samples, _ = cold_start.load_samples(settings, tokenizer)
    examples = from_dataset(samples, settings, tokenizer)
    assert all("It is" in example["completion"][0]["content"] for example in examples)
    out = capsys.readouterr().out
    assert "8 problems to choose from; 0 dropped, the prompt over MAX_PROMPT_LENGTH" in out
    assert "4 of 8 solutions cannot be shown" in out


def test_a_decimal_answer_is_shown_as_it_is():
    assert "<answer>\n0.75\n</answer>" in target("3 of 4.", "$0.75")


def test_plain_answers_have_no_rationale_to_show(babbler, tmp_path, capsys):
    """Said before the model loads, with what to do instead."""
    write_jsonl(tmp_path / "train.jsonl", [{"question": f"What is {a}?", "answer": a} for a in range(8)])
    message = r"no answer in .* has a rationale in front of '####' .* SOURCE = 'self' shows the model's own"
    with pytest.raises(SystemExit, match=message):
        cold_start.main(cold_flags(babbler, tmp_path, tmp_path / "run", examples=4))
    assert not (tmp_path / "run").exists()
    words = cold_flags(babbler, tmp_path, tmp_path / "run", examples=4, source="self")
    settings = read_settings(vars(cold_start), words, cold_start.ColdStartSettings)
    samples, _ = cold_start.load_samples(settings, load_tokenizer(str(babbler)))
    assert sorted(sample["answer"] for sample in samples) == list("01234567")


def test_what_was_shown_is_left_out_behind_an_adapter_too(tmp_path):
    """As in a checkpoint of a cold start with LoRA, whose examples are one folder up; or an adapter on what it left."""
    checkpoint, later = tmp_path / "cold" / "checkpoint-3", tmp_path / "later"
    for folder, base in ((checkpoint, "me/model"), (later, str(tmp_path / "cold"))):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    samples = [{"prompt": to_prompt(question)} for question in ("Why?", "How?")]
    write_jsonl(tmp_path / "cold" / "examples.jsonl", [{**samples[0], "completion": []}])
    for folder in (checkpoint, later):
        run = SimpleNamespace(model_name_or_path=str(folder), reuse_shown=False)
        assert train_grpo.without_shown(samples, run) == samples[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": 33}, "EXAMPLES is 33, but only 32 solutions of 32 can be shown"),
        ({"examples": 8, "max_prompt_length": 5}, "all 32 prompts are over MAX_PROMPT_LENGTH = 5 tokens: raise it"),
        ({"examples": 8, "max_completion_length": 5}, "only 0 solutions of 32 can be shown; the others are longer"),
    ],
)
def test_too_many_examples_are_an_error_before_the_model_loads(changes, message, babbler, data, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cold_start.main(cold_flags(babbler, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--examples", "0"], "EXAMPLES is 0; it must be a whole number, at least 1"),
        (["--source", "teacher"], "SOURCE is 'teacher'; it must be one of: dataset, self"),
        (["--num_train_epochs", "0"], "NUM_TRAIN_EPOCHS is 0.0; it must be above 0"),
        (["--lora_r", "8"], "--lora_r has no effect without --use_peft true"),
        (["--num_generations", "8"], "unknown flag or stray value '--num_generations'"),
        (["--max_length", "20"], "leave out --max_length: it truncates solutions"),
        (["--chat_template_path", "x"], "leave out --chat_template_path: what is taught is checked in"),
        (["--completion_only_loss", "false"], "prompts would be taught as well"),
        (["--load_in_4bit", "true"], "--use_peft true"),
    ],
)
def test_a_mistake_is_explained_before_anything_loads(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cold_start.main(["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), *words])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lora_learns_at_ten_times_the_rate_unless_one_is_given(tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--use_peft", "true"]
    rate = read_settings(vars(cold_start), words, cold_start.ColdStartSettings).learning_rate
    assert rate == 10 * cold_start.LEARNING_RATE
    rate = read_settings(
        vars(cold_start), [*words, "--learning_rate", "1e-6"], cold_start.ColdStartSettings
    ).learning_rate
    assert rate == 1e-6


def test_a_templates_settings_are_json_on_the_command_line(tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--chat_template_kwargs", '{"enable_thinking": false}']
    settings = read_settings(vars(cold_start), words, cold_start.ColdStartSettings)
    assert settings.chat_template_kwargs == {"enable_thinking": False}


def test_the_next_command_has_the_same_data_and_prompts(babbler, data, tmp_path):
    run, asked = tmp_path / "run", {"dataset_train_split": "test", "answer_column": "target", "one_shot": "true"}
    words = cold_flags(babbler, data, run, **asked, max_prompt_length="400")
    settings = read_settings(vars(cold_start), words, cold_start.ColdStartSettings)
    assert shlex.split(cold_start.next_command(settings)) == [
        *("python", "train_grpo.py", "--model_name_or_path", str(run), "--dataset_name", str(data)),
        *("--answer_column", "target", "--dataset_train_split", "test"),
        *("--max_prompt_length", "400", "--one_shot", "true", "--use_cpu", "true"),
    ]


def test_a_resumed_cold_start_keeps_its_examples_wherever_it_goes_on(tmp_path):
    shown = [{"prompt": [{"role": "user", "content": str(i)}], "completion": [{"content": "1"}]} for i in range(2)]
    write_jsonl(tmp_path / "cold" / "examples.jsonl", shown)
    checkpoint = tmp_path / "cold" / "checkpoint-3"
    assert examples_in(tmp_path / "cold") == examples_in(checkpoint) == shown
    assert examples_in(tmp_path) == []
    resumed = {"is_resumed": True, "resume_from_checkpoint": str(checkpoint), "output_dir": str(tmp_path / "other")}
    assert cold_start.choose_examples(SimpleNamespace(**resumed, examples=2), None, []) == shown
    with pytest.raises(BadInput, match=r"EXAMPLES is 3, and .* was begun with 2"):
        cold_start.choose_examples(SimpleNamespace(**resumed, examples=3), None, [])
    (tmp_path / "cold" / "examples.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="holds no examples of a cold start"):
        examples_in(tmp_path / "cold")

"""Problems are loaded whole or refused with the file and the rows to mend."""

from types import SimpleNamespace

import pytest
from conftest import GSM8K, flags, problem, settings, write_jsonl

import train_grpo
from rewards import SYSTEM_PROMPT, to_prompt
from support.errors import BadInput
from support.problems import drop_long, is_path, load_problems, load_tokenizer


def test_a_folder_gives_question_gold_and_rationale(data):
    problems, revision = load_problems(str(data), "main", "train")
    assert len(problems) == 32
    assert problems[1] == {
        "question": "Otto has 1 nails and buys 3 more. How many?",
        "answer": "4",
        "rationale": "1 + 3",
    }
    assert revision is None


def test_samples_are_system_and_user_message_with_the_gold_answer(policy, data, tmp_path):
    problems, _ = load_problems(str(data), None, "test")
    words = flags(policy, data, tmp_path / "run", dataset_train_split="test")
    samples, revision = train_grpo.load_samples(settings(*words), load_tokenizer(str(policy)))
    sample = samples[2]
    assert revision is None
    assert [message["role"] for message in sample["prompt"]] == ["system", "user"]
    assert sample["prompt"][0]["content"] == SYSTEM_PROMPT
    assert sample["prompt"][1]["content"] == problems[2]["question"]
    assert sample["answer"] == "9"


BAD_ROWS = [
    ({"answer": "#### 4"}, "no 'question'", "column missing"),
    ({"question": "  ", "answer": "#### 4"}, "no 'question'", "blank question"),
    ({"question": "Why?"}, "no 'answer'", "column missing"),
    ({"question": "Why?", "answer": None}, "no 'answer'", "null"),
    ({"question": "Why?", "answer": 4}, "no 'answer'", "a number where text belongs"),
    ({"question": "Why?", "answer": "4"}, "no '####'", "nothing marks the gold answer"),
    ({"question": "Why?", "answer": "#### four"}, "gold answer 'four' is no number", "a word"),
    ({"question": "Why?", "answer": "####"}, "gold answer '' is no number", "nothing after the mark"),
    ({"question": "Why?", "answer": "#### ٧٢"}, "is no number", "digits that no reward would accept"),
    ([1, 2], "no JSON object", "a list"),
    ("{broken", "no JSON", "not JSON"),
]


@pytest.mark.parametrize(("row", "fault", "reason"), BAD_ROWS)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, row, fault, reason):
    write_jsonl(tmp_path / "train.jsonl", [problem(1, 1), row, problem(2, 2)])
    with pytest.raises(BadInput) as error:
        load_problems(str(tmp_path), None, "train")
    message = str(error.value)
    assert str(tmp_path / "train.jsonl") in message
    assert "1 of 3 rows" in message
    assert "row 2: " in message
    assert fault in message, reason


def test_many_bad_rows_are_counted_and_the_first_few_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "Why?", "answer": "none"}] * 40)
    with pytest.raises(BadInput, match=r"40 of 40 rows.*row 5: ") as error:
        load_problems(str(tmp_path), None, "train")
    assert "row 6: " not in str(error.value)


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(BadInput, match="row 1: no JSON"):
        load_problems(str(tmp_path), None, "train")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    row = '{"question": "Why?", "answer": "#### 1"}\n'
    (tmp_path / "train.jsonl").write_text("\ufeff" + row + "\n" + row + "\n\n")
    assert len(load_problems(str(tmp_path), None, "train")[0]) == 2


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({"train.jsonl": ""}, "train", "holds no problems"),
        ({"train.jsonl": ""}, "test", r"test\.jsonl: no such file; the folder holds train\.jsonl"),
        ({}, "train", r"no such file; the folder holds no \.jsonl file"),
    ],
)
def test_an_empty_or_missing_split_is_an_error(tmp_path, files, split, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        load_problems(str(tmp_path), None, split)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/gsm8k", False),
        ("gsm8k", False),
        ("./gsm8k", True),
        ("../gsm8k", True),
        ("/data/gsm8k", True),
        ("~/gsm8k", True),
        ("data/my/gsm8k", True),
    ],
)
def test_names_that_mean_a_place_on_disk(name, expected):
    assert is_path(name) is expected


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub():
    with pytest.raises(BadInput, match="no such folder"):
        load_problems("./nowhere", None, "train")
    with pytest.raises(BadInput, match="no such folder"):
        load_tokenizer("./nowhere")


def test_a_model_without_a_chat_template_is_refused(policy, tmp_path):
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="chat template"):
        load_tokenizer(str(tmp_path))


def test_prompts_over_the_limit_are_dropped_and_those_at_it_kept(policy):
    tokenizer = load_tokenizer(str(policy))
    samples = [{"prompt": to_prompt("1 " * n), "answer": "1"} for n in (1, 5, 50)]
    lengths = [
        len(tokenizer.apply_chat_template(s["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
        for s in samples
    ]

    def kept(limit: int) -> list[dict]:
        one_prompt = {"generation_batch_size": 4, "num_generations": 4, "chat_template_kwargs": {}}
        return drop_long(samples, tokenizer, SimpleNamespace(max_prompt_length=limit, **one_prompt))

    assert kept(lengths[1]) == samples[:2]
    assert kept(lengths[1] - 1) == samples[:1]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real GSM8K is not there")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_row_of_the_real_gsm8k_is_usable(split, count):
    assert len(load_problems(str(GSM8K), None, split)[0]) == count

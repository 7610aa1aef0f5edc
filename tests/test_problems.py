"""Problems are loaded whole or refused with the file and the rows to mend."""

import copy
import json
from types import SimpleNamespace

import datasets
import pytest
from conftest import COLD, GSM8K, flags, load_problems, problem, refused, settings, write_jsonl

import cold_start
import evaluate
import train_grpo
from evaluate import Task
from rewards import ONE_SHOT_QUESTION, SYSTEM_PROMPT, question_of, to_prompt
from support import report
from support.errors import BadInput
from support.evaluation import LIMITS
from support.problems import drop_long, is_path, load_tokenizer, tokenize
from support.settings import read_settings


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


@pytest.mark.parametrize(
    ("answer", "gold", "rationale"),
    [
        ("18", "18", ""),
        (" 18 ", "18", ""),
        (18, "18", ""),
        (-3, "-3", ""),
        (18.0, "18", ""),
        (0.5, "0.5", ""),
        ("$1,080", "$1,080", ""),
        ("9 + 9\n#### 18", "18", "9 + 9"),
        ("#### 18", "18", ""),
    ],
)
def test_an_answer_is_a_number_or_stands_behind_a_rationale(answer, gold, rationale, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "Why?", "answer": answer}])
    (loaded,), _ = load_problems(str(tmp_path), None, "train")
    assert loaded == {"question": "Why?", "answer": gold, "rationale": rationale}


BAD_ROWS = [
    ({"answer": "#### 4"}, "no text in 'question'", "column missing"),
    ({"question": "  ", "answer": "#### 4"}, "no text in 'question'", "blank question"),
    ({"question": ["Why?"], "answer": "#### 4"}, "no text in 'question'", "a list"),
    ({"question": "Why?"}, "no 'answer'", "column missing"),
    ({"question": "Why?", "answer": None}, "no 'answer'", "null"),
    ({"question": "Why?", "answer": True}, "gold answer 'True' is no number", "JSON's true is no 1"),
    ({"question": "Why?", "answer": [4]}, "gold answer '[4]' is no number", "a list"),
    ({"question": "Why?", "answer": 1e400}, "gold answer 'inf' is no number", "infinite"),
    ({"question": "Why?", "answer": "4 of them"}, "gold answer '4 of them' is no number", "nothing marks the number"),
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
        ({}, "train", "doesn't contain any data files"),
        ({"train.csv": "question,answer\nWhy?,1\n"}, "test", "Unknown split.*train.*Check DATASET_CONFIG .* the split"),
        ({"train.json": '[{"question": 1'}, "train", "decoding object value at position 15"),
    ],
)
def test_an_empty_or_missing_split_is_an_error(tmp_path, files, split, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        load_problems(str(tmp_path), None, split)


# ---- other data

ROWS = [{"question": f"{a} + 3?", "answer": a + 3} for a in range(6)]
OTHERS = [{"question": f"{a} + 9?", "answer": a + 9} for a in range(4)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of files stays among the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def snapshot(folder, configs: dict[str, tuple[list, list]]) -> None:
    """Parquet files in CONFIG/SPLIT-00000-of-00001.parquet, and the README.md that names them, as GSM8K on the Hub."""
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in zip(("train", "test"), splits, strict=True):
            datasets.Dataset.from_list(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    listed = [
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
        for config in configs
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(listed)}---\n# Sums\n")


def as_snapshot(folder):
    snapshot(folder, {"main": (ROWS, OTHERS), "socratic": (OTHERS, ROWS)})


def as_snapshot_in_the_hubs_cache(folder):
    """Links to files whose names are checksums."""
    snapshot(folder.with_name("blobs"), {"main": (ROWS, OTHERS)})
    (folder / "main").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.with_name("blobs").rglob("*.*"))):
        blob = path.rename(folder.with_name(f"{number:040}"))
        (folder / path.relative_to(folder.with_name("blobs"))).symlink_to(blob)


def as_snapshot_without_its_readme(folder):
    as_snapshot(folder)
    (folder / "README.md").unlink()


def as_one_configuration(folder):
    """Of another name than DATASET_CONFIG's."""
    snapshot(folder, {"data": (ROWS, OTHERS)})
    (folder / "README.md").unlink()


def as_lines_in_a_folder_within(folder):
    write_jsonl(folder / "data" / "train.jsonl", ROWS)
    write_jsonl(folder / "data" / "test.jsonl", OTHERS)


def as_saved(folder):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(OTHERS)}
    datasets.DatasetDict(splits).save_to_disk(folder)


LAYOUTS = [
    as_snapshot,
    as_snapshot_in_the_hubs_cache,
    as_snapshot_without_its_readme,
    as_one_configuration,
    as_lines_in_a_folder_within,
    as_saved,
]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((layout, "sums") for layout in LAYOUTS),
        (as_lines_in_a_folder_within, "json"),
    ],  # also the name of one of `datasets`' readers
)
def test_a_folder_is_read_as_the_hub_or_datasets_left_it(layout, name, own_cache, tmp_path, monkeypatch):
    layout(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for split, rows in (("train", ROWS), ("test", OTHERS)):
        problems, revision = load_problems(name, "main", split)
        assert [each["question"] for each in problems] == [row["question"] for row in rows]
        assert [each["answer"] for each in problems] == [str(row["answer"]) for row in rows]
        assert revision is None
    with pytest.raises(BadInput, match=f"dataset '{name}': it cannot be loaded .*validation"):
        load_problems(name, "main", "validation")


def test_a_configuration_that_a_folder_lacks_is_named_with_those_that_it_has(own_cache, tmp_path):
    as_snapshot(tmp_path / "sums")
    with pytest.raises(BadInput, match=r"'harder' not found. Available: \['main', 'socratic'\]"):
        load_problems(str(tmp_path / "sums"), "harder", "train")
    assert load_problems(str(tmp_path / "sums"), "socratic", "test")[0][5]["answer"] == "8"


def test_configurations_without_a_readme_are_not_mixed(own_cache, tmp_path):
    as_snapshot_without_its_readme(tmp_path / "sums")
    with pytest.raises(BadInput, match="DATASET_CONFIG is 'harder', which it lacks; it holds main, socratic"):
        load_problems(str(tmp_path / "sums"), "harder", "train")


def test_a_dataset_that_is_a_script_is_refused(own_cache, tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    with pytest.raises(BadInput, match="scripts are no longer supported"):
        load_problems(str(tmp_path), None, "train")


def one_file(folder, ending: str):
    """The rows in a file, or without an ending as `save_to_disk` leaves a Dataset."""
    table, path = datasets.Dataset.from_list(ROWS), folder / f"sums{ending}"
    write = {".parquet": table.to_parquet, ".csv": table.to_csv, "": table.save_to_disk}
    if ending in write:
        write[ending](path)
    elif ending == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".parquet", ""])
def test_one_file_and_a_saved_dataset_are_one_split(ending, own_cache, tmp_path, capsys, policy):
    path = one_file(tmp_path, ending)
    for split in ("train", "test"):
        assert [each["answer"] for each in load_problems(str(path), "main", split)[0]] == list("345678")
    with pytest.raises(BadInput, match=r"is one split, of which 'train\[:50%\]' is no part"):
        load_problems(str(path), "main", "train[:50%]")
    words = flags(policy, path, tmp_path / "run")
    assert f"DATASET_NAME {path} is one split, with nothing left to evaluate on; EVAL_STEPS = 0" in refused(
        capsys, 2, words
    )
    for changes in ({"eval_steps": "0"}, {"dataset_test_split": "train"}):
        run = settings(*flags(policy, path, tmp_path / "run", **changes))
        assert len(train_grpo.load_samples(run, load_tokenizer(str(policy)))[0]) == 6


@pytest.mark.parametrize("ending", [".jsonl", ""])
def test_a_run_on_one_split_is_not_measured_on_it_unless_told_so(ending, tmp_path, capsys):
    data, run = str(one_file(tmp_path, ending)), tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"dataset_name": data}}))
    with pytest.raises(SystemExit) as exit:
        evaluate.read_task([str(run)])
    assert exit.value.code == 2
    assert f"{data} is one split, on which the run was trained: give --dataset_name" in capsys.readouterr().err
    assert evaluate.read_task([str(run), "--dataset_name", data]).dataset_name == data
    assert evaluate.read_task([str(run), "--ask", "Why?"]).ask == "Why?"


def test_a_number_beside_an_empty_cell_stays_one(own_cache, tmp_path):
    (tmp_path / "sums.csv").write_text("question,answer\nWhy?,18\nHow?,None\n")
    (problem_of_it,), _ = load_problems(str(tmp_path / "sums.csv"), None, "test", drop_non_numeric=True)
    assert problem_of_it["answer"] == "18", "not 18.0, for which no integer is paid"


def test_a_row_of_a_table_that_cannot_be_scored_is_named(own_cache, tmp_path):
    (tmp_path / "sums.csv").write_text("question,answer\nWhy?,18\n,19\n")
    with pytest.raises(BadInput, match=r"sums.csv, split 'test': 1 of 2 rows .* row 2: no text in 'question'"):
        load_problems(str(tmp_path / "sums.csv"), None, "test")


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"problem": "Why?", "target": "4", "answer": "four"}])
    with pytest.raises(BadInput, match="no column 'question', but problem, target, answer: set QUESTION_COLUMN"):
        load_problems(str(tmp_path), None, "train")
    with pytest.raises(BadInput, match="no column 'query', 'gold', but"):
        load_problems(str(tmp_path), None, "train", "query", "gold")


# as GSM-Plus has them: questions that cannot be answered, in a column of their own the solution
UNANSWERED = [
    {"text": "2 + 3?", "solution": "5", "gold": "5"},
    {"text": "How old is the captain?", "solution": "It is not known.", "gold": "None"},
    {"text": "4 + 4?", "solution": "8", "gold": 8},
    {"text": "2 + ?", "solution": "", "gold": None},
    {"text": "1 + 1?", "solution": "2", "gold": "two"},
]
READ = {"question_column": "text", "answer_column": "gold", "drop_non_numeric": "true"}


def test_rows_whose_answer_is_no_number_are_counted_and_dropped_or_refused(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, UNANSWERED)
    with pytest.raises(BadInput, match=r"3 of 5 rows.*row 2: gold answer 'None'.*; DROP_NON_NUMERIC = True drops"):
        load_problems(str(tmp_path), None, "train", "text", "gold")
    problems, _ = load_problems(str(tmp_path), None, "train", "text", "gold", True)
    assert [each["answer"] for each in problems] == ["5", "8"]
    assert f"{path}: 3 of 5 rows dropped, the answer is no number" in capsys.readouterr().out
    write_jsonl(path, [*UNANSWERED, {"text": None, "gold": 1}])
    with pytest.raises(BadInput, match=r"1 of 6 rows.*row 6: no text in 'text'. Mend or remove them all\."):
        load_problems(str(tmp_path), None, "train", "text", "gold", True)
    write_jsonl(path, UNANSWERED[1:2])
    with pytest.raises(BadInput, match="holds no problems"):
        load_problems(str(tmp_path), None, "train", "text", "gold", True)


def test_all_commands_read_the_same_data_by_the_same_flags(policy, tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "test"):
        write_jsonl(data / f"{split}.jsonl", UNANSWERED)
    tokenizer = load_tokenizer(str(policy))
    small = {"per_device_train_batch_size": 4, "max_prompt_length": 999, **READ}
    training = settings(*flags(policy, data, run, **small))
    words = [f"--{name}={value}" for name, value in {**COLD, "dataset_name": data, "output_dir": run, **READ}.items()]
    cold = read_settings(vars(cold_start), [*words, "--max_prompt_length=999"], cold_start.ColdStartSettings)
    task = evaluate.read_task([str(policy), "--dataset_name", str(data), *words[-3:]])
    samples, _ = train_grpo.load_samples(training, tokenizer)
    asked = [
        [sample["prompt"][-1]["content"] for sample in samples],
        [sample["question"] for sample in train_grpo.held_out_problems(training, tokenizer)],
        [sample["question"] for sample in cold_start.load_samples(cold, tokenizer)[0]],
        [each["question"] for each in task.problems()],
    ]
    assert all(sorted(questions) == ["2 + 3?", "4 + 4?"] for questions in asked)
    assert [sample["answer"] for sample in samples] == ["5", "8"]
    assert capsys.readouterr().out.count("3 of 5 rows dropped") == 4


def test_an_evaluation_reads_the_data_as_its_run_did(tmp_path):
    """Where it did not, the run's report says what to type."""
    run = {name: value == "true" if name == "drop_non_numeric" else value for name, value in READ.items()}
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"dataset_name": "x", **run}}))
    task = evaluate.read_task([str(tmp_path)])
    assert {name: getattr(task, name) for name in READ} == run
    assert evaluate.read_task([str(tmp_path), "--answer_column", "solution"]).answer_column == "solution"
    measured = {"limit": None, "dataset": "x", "split": "test", **dict.fromkeys(LIMITS), **run}
    there = {"dataset_name": "x", "dataset_test_split": "test", **run}
    assert report._evaluate_command(tmp_path, there, measured) == f"python evaluate.py {tmp_path}"
    words = report._evaluate_command(
        tmp_path, there, {**measured, "answer_column": "solution", "drop_non_numeric": False}
    )
    assert words.endswith("--answer_column solution --drop_non_numeric false")


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


# ---- chat templates

PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DATED = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN  # as Llama 3.2 and gpt-oss write today's date


def with_template(policy, folder, template):
    """A copy of the policy's tokenizer with another chat template, loaded as the commands load it."""
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


FAULTS = [
    (NO_SYSTEM + PLAIN, r"refuses a system prompt \(System role not supported\)\. --system_prompt_in_question true"),
    ("{{ messages[-1]['content'] }}", r"leaves the system prompt out\. --system_prompt_in_question true"),
    (PLAIN + "{{ raise_exception('for tools alone') }}", r"chat template fails \(TemplateError: for tools alone\)"),
    (PLAIN + "{{ 'it is ' + 2026 }}", r"chat template fails \(TypeError: "),
    (PLAIN + "{{ messages[9]['content'] }}", r"chat template fails \(UndefinedError: "),
    ("{% for %}", r"chat template fails \(TemplateSyntaxError: "),
]


@pytest.mark.parametrize(("template", "message"), FAULTS)
def test_a_templates_own_error_is_not_blamed_on_the_system_prompt(template, message, policy, tmp_path):
    tokenizer = with_template(policy, tmp_path, template)
    with pytest.raises(BadInput, match=message):
        tokenize(tokenizer, [to_prompt("How many?"), to_prompt("How much?")])


def test_named_templates_need_a_default(policy, tmp_path):
    with pytest.raises(BadInput, match=r"none of its chat templates \(rag, tool_use\) is the default\. Copy one"):
        with_template(policy, tmp_path, {"rag": PLAIN, "tool_use": PLAIN})
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert tokenize(load_tokenizer(str(tmp_path)), [to_prompt("How many?")]), "as the message says"


def test_a_template_that_writes_todays_date_writes_the_same_every_day(policy, tmp_path, capsys):
    tokenizer = with_template(policy, tmp_path, DATED)
    said = capsys.readouterr().out
    assert f"{tmp_path}: its chat template writes today's date; here it is always 26 July 2024" in said
    prompt = to_prompt("How many?")
    texts = [  # as `tokenize` here and TRL in its trainers have it rendered, of a copy as well
        tokenizer.decode(tokenize(tokenizer, [prompt])[0]),
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
        copy.deepcopy(tokenizer).apply_chat_template(prompt, tokenize=False),
    ]
    assert all(text.startswith("26 Jul 2024") for text in texts), texts
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == DATED, "others get the template as it was"


@pytest.mark.parametrize("one_shot", ["false", "true"])
def test_a_system_prompt_can_stand_at_the_head_of_the_question(one_shot, policy, data, tmp_path, capsys):
    tokenizer = with_template(policy, tmp_path / "odd", NO_SYSTEM + PLAIN.replace("\n", "{{ eos_token }}\n"))
    words = flags(policy, data, tmp_path / "run", one_shot=one_shot, max_prompt_length=400)
    with pytest.raises(BadInput, match="SYSTEM_PROMPT_IN_QUESTION"):
        train_grpo.load_samples(settings(*words), tokenizer)
    words += ["--system_prompt_in_question", "true"]
    samples, _ = train_grpo.load_samples(settings(*words), tokenizer)
    prompt, question = samples[2]["prompt"], "Otto has 2 nails and buys 3 more. How many?"
    first = ONE_SHOT_QUESTION if one_shot == "true" else question
    assert prompt[0] == {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{first}"}
    assert [message["role"] for message in prompt[1:]] == (["assistant", "user"] if one_shot == "true" else [])
    assert question_of(prompt) == question
    of_run = {"one_shot": one_shot == "true", "system_prompt_in_question": True}
    assert Task("run", **of_run).prompt(question) == prompt, "evaluated as it was trained"
    held_out = train_grpo.held_out_problems(settings(*words), tokenizer)
    cold = read_settings(vars(cold_start), ["--use_cpu", "true", *words[:6], *words[-2:]], cold_start.ColdStartSettings)
    taught, _ = cold_start.load_samples(cold, tokenizer)
    assert {each["prompt"][0]["role"] for each in held_out + taught} == {"user"}

    (tmp_path / "odd" / "examples.jsonl").write_text(json.dumps({"prompt": prompt, "completion": []}))
    capsys.readouterr()
    again = settings(*words, "--model_name_or_path", tmp_path / "odd")
    assert len(train_grpo.load_samples(again, tokenizer)[0]) == len(samples) - 1, "what was shown is known again"

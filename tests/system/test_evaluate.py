"""An evaluation counts what it says, and does not depend on how problems are batched."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GSM8K, launch, load_problems, problem, start, write_jsonl

import evaluate
import rewards
from benchmarks import side_by_side
from rewards import SYSTEM_PROMPT, same_number, to_prompt
from support import comparison, evaluation, generation
from support.errors import BadInput
from support.generation import vllm_obstacle
from support.problems import load_tokenizer

GOOD = "<reasoning>\nOne and 3.\n</reasoning>\n<answer>\n4\n</answer>"


def evaluated(*words) -> None:
    """`evaluate.py` with this command line, in this process."""
    evaluate.main([str(word) for word in words])


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
        ("10-3 = 7", "7", "arithmetic"),
        ("10−3", "3", "with U+2212"),
        ("pages 5–10", "10", "an en dash between numbers"),
        ("10 - 3", "3", "with blanks"),
        ("(10)-3", "3", "behind a bracket"),
        ("100%-40", "40", "behind a per cent"),
        ("so −4", "-4", "U+2212, the minus of formulas"),
        ("x = − 4", "-4", "and a blank behind it"),
        ("- 5 eggs\n- 6 eggs", "6", "a list has no signs"),
        ("a loss of -\\$4", "-$4", "an escaped dollar"),
        ("She pays €540", "€540", "euros"),
        ("18 cm^2", "18", "an exponent of a unit"),
        ("18 m^{-2}", "18", "in braces"),
        ("18 cm2", "18", "without its sign"),
        ("18 ft3", "18", "of feet"),
        ("3 of RM20", "20", "a currency in letters"),
        ("2^3 = 8", "8", "a power in arithmetic"),
        ("2^3", "2^3", "a power alone is no number"),
        ("$1\\,080$", "$1080", "TeX's thin space"),
        ("1~080", "1080", "TeX's tie"),
        ("1 080.50 in all", "1080.50", "a blank between thousands: GSM8K has 60"),
        ("1\u202f080\xa0000", "1080000", "narrow and ordinary no-break spaces"),
        ("1'080", "1080", "as in Switzerland"),
        ("3 120-page books", "120", "two numbers"),
        ("in 2024 100 people", "100", "two, as the first is too long to be thousands"),
        ("it is .5", "0.5", "without a zero"),
        ("-$.50", "-$0.50", "money without a zero"),
        ("No.5", "5", "a full stop"),
        ("so...5", "5", "dots"),
        ("2:00 pm", "2", "a full hour"),
        ("2:30 pm", "2:30", "is no number"),
        ("Day 1:50", "50", "a heading"),
        ("four", None, "words"),
        ("", None, "empty"),
    ],
)
def test_last_number(text, number, reason):
    assert rewards.last_number(text) == number, reason


def as_written(gold: str) -> list[str]:
    """A gold answer as a native answer may have it, in a box or without one."""
    plain = gold.replace(",", "")
    grouped = f"{int(plain):_}"
    spaced = [grouped.replace("_", blank) for blank in ("~", "\\:", "\\,", "{,}", " ")]
    dressed = [f"\\${gold}", f"{gold} \\text{{ cm}}^2", f"x = {gold}", f"{gold}\\%", f"£{gold}", gold.replace("-", "−")]
    return [f"so \\boxed{{{each}}}." for each in (gold, plain, *spaced, *dressed)] + [f"= ${each}$" for each in spaced]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real GSM8K is not there")
def test_every_solution_of_gsm8k_is_read_as_its_gold_number():
    texts = [json.loads(line)["answer"] for split in ("train", "test") for line in (GSM8K / f"{split}.jsonl").open()]
    assert len(texts) == 8792
    solutions = [(text, *text.split("\n#### ")) for text in texts]
    assert all(same_number(rewards.last_number(text), gold) for text, _, gold in solutions)
    right = sum(same_number(rewards.last_number(rationale), gold) for _, rationale, gold in solutions)
    assert right == 8556, "the others end with something else, such as a check"
    for gold in {gold for _, _, gold in solutions}:
        for written in as_written(gold):
            assert same_number(rewards.native_answer(written), gold), written


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
    row = evaluation.score(3, {"question": "?", "answer": "4"}, completion)
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
    report = evaluation.summarize(rows)
    assert report["n"] == 10
    assert (report["strict_accuracy"], report["lenient_accuracy"], report["format_rate"]) == (0.3, 0.5, 0.8)
    assert (report["truncated_rate"], report["mean_completion_tokens"], report["reflection_rate"]) == (0.1, 4.5, 0.2)
    assert report["strict_ci95"] == pytest.approx([0.1078, 0.6032], abs=1e-4)  # Wilson's, from a textbook table


def test_completions_are_the_same_at_any_batch_size(babbler, data):
    """Left padding and position ids: a shorter prompt beside a longer one must not change."""
    model, tokenizer = generation.load_policy(str(babbler)), load_tokenizer(str(babbler))
    problems = load_problems(str(data), None, "test")[0]
    prompts = [to_prompt("Well, " * (i % 4) + p["question"]) for i, p in enumerate(problems)]
    alone = generation.complete(model, tokenizer, prompts, 16, batch_size=1)
    assert len({c["text"] for c in alone}) > 3, "the policy says different things to different prompts"
    for batch_size in (3, 10):
        assert generation.complete(model, tokenizer, prompts, 16, batch_size=batch_size) == alone


def test_completions_are_plain_greedy_whatever_the_model_declares(babbler):
    """Qwen2.5 declares sampling and a repetition penalty in its generation config."""
    model, tokenizer = generation.load_policy(str(babbler)), load_tokenizer(str(babbler))
    prompt = [to_prompt("What is 1 + 1?")]
    plain = generation.complete(model, tokenizer, prompt, 16)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=16)
    assert generation.complete(model, tokenizer, prompt, 16) == plain
    assert plain[0]["tokens"] <= 16


def test_a_completion_ends_at_any_of_the_models_eos_tokens(babbler):
    model, tokenizer = generation.load_policy(str(babbler)), load_tokenizer(str(babbler))
    prompt = [to_prompt("What is 1 + 1?")]
    assert generation.complete(model, tokenizer, prompt, 16)[0]["truncated"]
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    stopped = generation.complete(model, tokenizer, prompt, 16)[0]
    assert (stopped["tokens"], stopped["truncated"]) == (1, False)


def test_evaluating_a_run_uses_its_settings_and_writes_both_files(trained, data, capsys):
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

    evaluated(run / "checkpoint-2", "--limit", 2, "--output_dir", run)
    assert json.loads((run / "evaluation.json").read_text())["n"] == 2
    (kept,) = [path for path in run.glob("evaluation-*.json")]
    assert json.loads(kept.read_text())["n"] == 6, "the earlier evaluation is set aside, not overwritten"
    assert "is kept as" in capsys.readouterr().out


def test_what_a_run_does_not_say_is_the_recipes_own(tmp_path):
    """As a cold start's run.json, which has some of the settings."""
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"dataset_name": "me/sums", "learning_rate": 1}}))
    task = evaluate.read_task([str(tmp_path), "--limit", "3"])
    assert (task.dataset_name, task.dataset_test_split, task.max_completion_length) == ("me/sums", "test", 512)
    assert (task.limit, task.one_shot, task.system_prompt) == (3, False, SYSTEM_PROMPT)


def test_a_gpu_too_small_for_a_batch_is_one_message(trained, monkeypatch):
    """Transformers' generation ends as it does where CUDA has no memory left."""

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "complete", out_of_memory)
    with pytest.raises(SystemExit, match=r"lower --batch_size \(now 64\)"):
        evaluate.main([str(trained[0]), "--limit", "1"])


def test_asking_natively_asks_without_the_recipes_prompt(trained, monkeypatch):
    asked = []

    def watched(policy, tokenizer, prompts, *args, **kwargs):
        asked.extend(prompts)
        return generation.complete(policy, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "complete", watched)
    for native in ([], ["--native"]):
        evaluate.main([str(trained[0]), "--ask", "2 + 2?", *native])
    assert [[message["role"] for message in prompt] for prompt in asked] == [["system", "user"], ["user"]]


def test_ask_prints_one_answer_and_writes_nothing(trained, capsys):
    run, _ = trained
    before = sorted(run.iterdir())
    evaluated(run, "--ask", "how many r's are in strawberry?")
    out = capsys.readouterr().out
    assert out.strip()
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", out), "a model's control characters do not reach the terminal"
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "no such folder"),
        (["RUN", "--limit", "0"], "--limit must be at least 1"),
        (["RUN", "--dataset_name", "./nowhere"], "no such folder"),
        (["RUN", "--dataset_test_split", "validation"], "validation.jsonl: no such file"),
        pytest.param(
            ["RUN", "--use_vllm", "true"],
            "needs vLLM",
            marks=pytest.mark.skipif(vllm_obstacle() is None, reason="vLLM is there"),
        ),
        (["./nowhere", "--compare", "RUN"], "nowhere': no such folder"),
        (["RUN", "--lim", "3"], "unknown flag or stray value '--lim'; try --limit"),
        (["./nowhere", "--vllm_gpu_memory_utilization", "0"], "must be above 0 and at most 1"),
        (["./nowhere", "--vllm_gpu_memory_utilization", "30"], "must be above 0 and at most 1"),
        (["./nowhere", "--vllm_gpu_memory_utilization", "nan"], "must be above 0 and at most 1"),
        (["./nowhere", "--vllm_gpu_memory_utilization", "0.3", "--use_vllm", "false"], "use Transformers"),
        (["./nowhere", "--vllm_gpu_memory_utilization", "0.3", "--ask", "2 + 2?"], "use Transformers"),
    ],
)
def test_a_users_mistake_is_one_clear_message(trained, words, message, capsys):
    words = [str(trained[0]) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as exit:
        evaluate.main(words)
    assert exit.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(exit.value.code)


def test_vllm_takes_the_share_of_the_gpu_that_it_is_given_for_both_models(trained, policy, data, tmp_path, monkeypatch):
    shares = []

    class Engine:
        def __init__(self, model, **kwargs):
            shares.append((model, kwargs.get("gpu_memory_utilization")))

        def generate(self, prompts, *args, **kwargs):
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5], finish_reason="length")])] * len(prompts)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))
    monkeypatch.setattr(evaluate, "vllm_obstacle", lambda use_cpu: None)
    run, baseline = str(trained[0]), str(shutil.copytree(policy, tmp_path / "baseline"))
    words = ["--limit", "2", "--no-native", "--output_dir", str(tmp_path / "out")]
    evaluate.main([run, "--compare", baseline, *words, "--vllm_gpu_memory_utilization", "0.3"])
    evaluate.main([run, *words[:2], *words[3:]])
    assert shares == [(baseline, 0.3), (run, 0.3), (run, None)], "without the flag vLLM's own default"


def test_a_share_for_vllm_is_not_ignored_in_silence(trained, tmp_path, capsys):
    words = ["--limit", "1", "--use_cpu", "--output_dir", str(tmp_path)]
    evaluate.main([str(trained[0]), *words, "--vllm_gpu_memory_utilization", "0.3"])
    assert "--vllm_gpu_memory_utilization has no effect: Transformers decodes" in capsys.readouterr().out


# ---- comparison


def results(*pattern: tuple[int, bool, bool]) -> tuple[list[dict], list[dict]]:
    """(count, model right, baseline right) spelled out as two lists of rows."""
    pairs = [(model, baseline) for count, model, baseline in pattern for _ in range(count)]
    return [{"strict": model} for model, _ in pairs], [{"strict": baseline} for _, baseline in pairs]


def test_mcnemar_is_exact_on_the_discordant_pairs():
    counts = comparison.compare(*results((50, True, True), (9, True, False), (1, False, True), (40, False, False)))
    assert counts == {
        "difference": 0.08,
        "both_right": 50,
        "only_model_right": 9,
        "only_baseline_right": 1,
        "both_wrong": 40,
        "mcnemar_p": pytest.approx(2 * (1 + 10) / 2**10),  # by hand: 0 or 1 of 10 fair coins, both sides
        "n": 100,
    }


def test_two_equal_models_differ_by_nothing():
    counts = comparison.compare(*results((3, True, True), (4, False, False)))
    assert (counts["difference"], counts["mcnemar_p"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (((50, True, False), (10, False, True), (140, True, True)), "better by 20.0 points, p < 0.001, n = 200"),
        (((1, True, False), (9, False, True), (990, True, True)), "worse by 0.8 points, p = 0.021, n = 1,000"),
        (((3, True, False), (2, False, True), (195, True, True)), "no difference that n = 200 could show"),
    ],
)
def test_a_comparison_in_words(pattern, words):
    assert comparison.in_words(comparison.compare(*results(*pattern))).startswith(words)


def test_comparing_evaluates_both_and_reuses_what_the_baseline_has(trained, policy, data, tmp_path, capsys):
    run, _ = trained
    baseline = shutil.copytree(policy, tmp_path / "baseline")
    evaluated(run, "--compare", baseline, "--limit", 8, "--output_dir", tmp_path / "first")
    out = capsys.readouterr().out
    for text in (
        "baseline native",
        "baseline",
        "model",
        "lenient accuracy",
        "both right 0",
        "no difference that n = 8",
    ):
        assert text in out
    paired = json.loads((tmp_path / "first" / "evaluation.json").read_text())["comparison"]
    assert (paired["n"], paired["baseline"]) == (8, str(baseline))
    assert len((baseline / "evaluation.jsonl").read_text().splitlines()) == 8
    native = json.loads((baseline / "evaluation-native.json").read_text())
    assert (native["n"], native["strict_accuracy"], native["format_rate"]) == (8, None, None)
    assert paired["native"]["n"] == 8
    assert f"against {baseline} with its native prompt, lenient: " in out
    assert f"for a browser: python benchmarks/side_by_side.py {tmp_path / 'first'}\n" in out
    assert not (tmp_path / "first" / "comparison.html").exists()
    side_by_side.main([str(tmp_path / "first")])
    page = (tmp_path / "first" / "comparison.html").read_text(encoding="utf-8")
    assert re.findall("<h3>(.*?):", page) == ["baseline native", "baseline", "model"] * 8

    (baseline / "model.safetensors").unlink()
    evaluated(run, "--compare", baseline, "--limit", 8, "--output_dir", tmp_path / "second")
    assert (tmp_path / "second" / "evaluation.json").is_file(), "the baseline's own evaluation is used"

    with pytest.raises(SystemExit) as exit:
        evaluated(run, "--compare", baseline, "--limit", 9, "--max_completion_length", 5)
    assert "problems: 8 there, 9 here, 8 of them the same" in exit.value.code
    assert "max completion length: 12 there, 5 here" in exit.value.code


def test_a_baseline_must_be_the_evaluation_of_that_very_model(trained, policy, data, tmp_path):
    run, _ = trained
    baseline = shutil.copytree(policy, tmp_path / "baseline")
    words = ["--limit", 4, "--dataset_name", data, "--max_completion_length", 12]
    evaluated(run, *words, "--output_dir", baseline)
    with pytest.raises(SystemExit, match=r"evaluate .*baseline again first"):
        evaluated(run, "--compare", baseline, *words, "--output_dir", tmp_path / "out")


def test_a_baseline_is_not_taken_from_another_revision(trained, policy, data, tmp_path, monkeypatch):
    """As of a model on the Hub, whose folder under outputs/ holds no weights to tell by."""
    asked = ["--limit", 4, "--dataset_name", data, "--max_completion_length", 12]
    monkeypatch.chdir(tmp_path)
    baseline = Path("outputs/me--model")
    evaluated(policy, *asked, "--model_revision", "step-100", "--output_dir", baseline)
    with pytest.raises(SystemExit, match="model revision: 'step-100' there"):
        evaluated(trained[0], "--compare", "me/model", *asked, "--no-native")
    evaluated(trained[0], "--compare", baseline, *asked, "--output_dir", "out")


def test_a_saved_evaluation_reads_back_whatever_the_policy_wrote(data, tmp_path):
    """U+2028 and U+0085 are line ends to Python, not to JSON."""
    task = evaluate.Task(str(tmp_path), dataset_name=str(data), max_completion_length=12, limit=1)
    (problem,) = task.problems()
    rows = [evaluation.score(0, problem, {"text": "a\u2028b\x85c\r", "tokens": 3, "truncated": False})]
    report = {
        "model": "x",
        "one_shot": False,
        "max_completion_length": 12,
        "chat_template_kwargs": {},
        "system_prompt": task.system_prompt,
    }
    evaluate.save(task, report, rows)
    assert evaluate.load_evaluation(task.file, task) == (report, rows)


# ---- an evaluation that ends early


@pytest.fixture(scope="module")
def long(babbler, tmp_path_factory) -> list:
    """The words of an evaluation in 20 batches of some time each."""
    folder = tmp_path_factory.mktemp("many")
    write_jsonl(folder / "test.jsonl", [problem(a, 7) for a in range(40)])
    return [babbler, "--dataset_name", folder, "--max_completion_length", 100, "--batch_size", 2]


def answered(folder) -> int:
    """Answers that are on disk, in an evaluation that has not ended."""
    lines = [line for path in folder.glob("evaluation.unfinished-*.jsonl") for line in path.read_bytes().split(b"\n")]
    return sum(line.endswith(b"}") for line in lines)


def ended_by(number: signal.Signals, words: list, folder) -> tuple[int, str, str]:
    """Start an evaluation, and end it as soon as a few more answers than before are on disk."""
    before, process = answered(folder), launch("evaluate.py", *words, "--output_dir", folder)
    while process.poll() is None and answered(folder) < before + 4:
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate()
    assert not list(folder.glob("evaluation.json*")), "nothing looks whole"
    return process.returncode, out, errors


def test_an_evaluation_ended_by_any_signal_is_resumed_to_the_same_bytes(long, tmp_path, capsys):
    folder, undisturbed = tmp_path / "ended", tmp_path / "undisturbed"
    evaluate.main([*map(str, long), "--output_dir", str(undisturbed)])
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = answered(folder)
        returned, out, errors = ended_by(number, long, folder)
        assert returned == status, errors
        assert f"resuming: {before} of 40 answers are in" in out or not before
        (path,) = folder.glob("evaluation.unfinished-*.jsonl")
        with path.open("a") as file:
            file.write('\n{"index": 39, "te')  # as a kill in the middle of a write leaves it
    evaluate.main([*map(str, long), "--output_dir", str(folder)])
    assert "resuming: " in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.jsonl"}
    for name in ("evaluation.json", "evaluation.jsonl"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


class Ended(Exception):
    """What ends an evaluation after its first batch."""


@pytest.fixture
def half_answered(babbler, data, tmp_path, monkeypatch, capsys) -> list[str]:
    """The words of an evaluation that ended after 2 of 10 answers."""
    shutil.copytree(babbler, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    words = [tmp_path / "model", "--dataset_name", tmp_path / "data", "--max_completion_length", 9, "--batch_size", 2]
    with monkeypatch.context() as patch, pytest.raises(Ended):
        update = evaluation.Answers.update

        def update_and_end(self, batch):
            update(self, batch)
            raise Ended

        patch.setattr(evaluation.Answers, "update", update_and_end)
        evaluate.main([str(word) for word in words])
    assert answered(tmp_path / "model") == 2
    capsys.readouterr()
    return [str(word) for word in words]


def other_weights(model, data):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def other_data(model, data):
    write_jsonl(data / "test.jsonl", [problem(a, 7) for a in range(9)] + [problem(9, 8)])


def other_prompt(model, data):
    (model / "run.json").write_text(json.dumps({"system_prompt": "Be brief."}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, []),
        (other_data, []),
        (other_prompt, []),
        (None, ["--max_completion_length", "8"]),
        (None, ["--limit", "5"]),
        (None, ["--batch_size", "3"]),
    ],
)
def test_what_would_change_an_answer_starts_anew(half_answered, tmp_path, capsys, change, words):
    if change:
        change(tmp_path / "model", tmp_path / "data")
    evaluate.main([*half_answered, *words])
    assert "resuming" not in capsys.readouterr().out
    assert answered(tmp_path / "model") == 2, "they are kept"
    assert (tmp_path / "model" / "evaluation.json").is_file()


def test_a_look_at_a_few_problems_does_not_cost_the_answers_to_all(half_answered, tmp_path, capsys):
    evaluate.main([*half_answered, "--limit", "2"])
    evaluate.main(half_answered)
    assert "resuming: 2 of 10 answers are in" in capsys.readouterr().out
    assert answered(tmp_path / "model") == 0, "nothing is left over"
    report = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert report["n"] == 10


def test_what_a_model_in_a_folder_of_others_is_measured_for_goes_under_outputs(policy, monkeypatch):
    task = evaluate.Task(str(policy))
    assert task.file == policy / "evaluation.json"
    monkeypatch.setattr(evaluate.os, "access", lambda folder, mode: False)
    assert task.file.parent == Path("outputs") / str(policy).strip("/").replace("/", "--")


def test_a_folder_that_cannot_be_written_to_is_said_before_the_first_answer(babbler, data, tmp_path):
    (tmp_path / "file").write_text("")
    words = [babbler, "--dataset_name", data, "--max_completion_length", 9, "--output_dir", tmp_path / "file"]
    with pytest.raises(SystemExit, match="cannot be written to"):
        evaluate.main([str(word) for word in words])


# ---- the prompt a model was made for


@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        (r"so \boxed{72}.", "72", "the box"),
        (r"\boxed{72} after 3 hours", "72", "a number after the box does not count"),
        (r"first \boxed{1}, no, \boxed{72}", "72", "the last box"),
        (r"\boxed{72\text{ eggs}}", "72", "a unit in braces of its own"),
        (r"\boxed{\$1,080.00}", "$1,080.00", "TeX's dollar"),
        (r"\boxed{1{,}080}", "1,080", "TeX's comma"),
        (r"\boxed{1\,080}", "1080", "TeX's thin space"),
        (r"\boxed{50\%}", "50", "TeX's percent"),
        (r"\boxed{x = -4}", "-4", "an equation"),
        (r"\boxed{18 \text{ cm}^2}", "18", "a unit with an exponent"),
        (r"\boxed{18\,\mathrm{m}^{3}}", "18", "in braces"),
        (r"\boxed{18^\circ}", "18", "degrees"),
        (r"\boxed{1~080}", "1080", "TeX's tie"),
        (r"\boxed{1\:080}", "1080", "TeX's medium space"),
        (r"\boxed{1 080}", "1080", "a blank"),
        (r"\boxed{1,\!080}", "1,080", "a comma without its space"),
        (r"\boxed{-\$5}", "-$5", "a sign before TeX's dollar"),
        (r"\boxed{−5}", "-5", "U+2212"),
        (r"\boxed{ - 5 }", "-5", "blanks"),
        (r"\boxed{10 - 5}", "5", "arithmetic"),
        (r"\boxed{.5}", "0.5", "no zero"),
        (r"\boxed{2:00 \text{ pm}}", "2", "a full hour"),
        (r"\boxed {\{72\}}", "72", "escaped braces"),
        (r"\boxed{5} and then \boxed{72", "5", "a truncated box is none"),
        (r"It is 72, \boxed{72", "72", "no box, the last number"),
        (r"4 \boxed{} 5", None, "an empty box holds no number"),
        (r"}} 72 {", "72", "stray braces"),
        (r"$-\boxed{7}$", "-7", "the sign in front of the box"),
        (r"9-\boxed{7}", "7", "a difference"),
        (r"\boxed{1,\,080}", "1,080", "a comma and TeX's space"),
        ("", None, "empty"),
    ],
)
def test_a_native_answer_is_the_last_box_else_the_last_number(text, number, reason):
    assert rewards.native_answer(text) == number, reason


def test_reading_a_box_takes_linear_time():
    started = time.perf_counter()
    assert rewards.boxed_span("\\boxed{" * 200_000) is None
    assert rewards.boxed_span("\\boxed{" * 100_000 + "7" + "}" * 100_000) == (7, 800_000)
    for part in ("1", "1 000 ", "1,", "-", ".", "1:00", "$", "^{", "1{,}", " - ", "1-"):
        rewards.last_number(part * 50_000)
    assert time.perf_counter() - started < 5


def test_a_native_prompt_has_no_system_message_of_ours():
    task = evaluate.Task("x", one_shot=True).natively()
    (message,) = task.prompt("How many?")
    assert message["role"] == "user"
    assert message["content"].startswith("How many?\n")
    assert "\\boxed{}" in message["content"]
    assert "<answer>" not in message["content"]


def test_native_alone_lies_beside_the_recipes_evaluation(trained, tmp_path, capsys):
    evaluated(trained[0], "--native", "--limit", 3, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "evaluation-native.json").read_text())
    assert (report["n"], report["native_instruction"]) == (3, evaluate.NATIVE_INSTRUCTION)
    assert not (tmp_path / "evaluation.json").exists()
    assert re.search(r"strict accuracy +-\n", capsys.readouterr().out), "what was not asked for is not measured"


def test_a_folder_without_a_model_has_no_native_column(trained, policy, data, tmp_path, capsys):
    asked = ["--limit", 2, "--dataset_name", data, "--max_completion_length", 12]
    evaluated(policy, *asked, "--output_dir", tmp_path / "empty")
    compared = [trained[0], "--compare", tmp_path / "empty", *asked, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"--native: .*holds an evaluation, but no model"):
        evaluated(*compared, "--native")
    evaluated(*compared)
    out = capsys.readouterr().out
    assert "the native column is left out: " in out
    assert "baseline native" not in out
    assert evaluate.native_obstacle(str(policy)) is None
    assert evaluate.native_obstacle("Qwen/Qwen2.5-1.5B-Instruct") is None


TEMPLATES = {
    "no chat template": None,
    "refuses a system prompt": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ messages[0]['content'] }}",
    "leaves the system prompt out": "{{ messages[-1]['content'] }}",
}


@pytest.mark.parametrize("message", TEMPLATES)
def test_a_model_whose_template_cannot_say_the_prompt_is_told_from_the_others(policy, data, tmp_path, message):
    folder = shutil.copytree(policy, tmp_path / "odd")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATES[message]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    words = [str(folder), "--dataset_name", str(data), "--limit", "2", "--max_completion_length", "4", "--use_cpu"]
    with pytest.raises(SystemExit, match=message):
        evaluate.main(words)
    if TEMPLATES[message]:
        evaluate.main([*words, "--native"])
        assert (folder / "evaluation-native.json").is_file()
        evaluate.main([*words, "--system_prompt_in_question", "true"])
        assert json.loads((folder / "evaluation.json").read_text())["system_prompt_in_question"] is True


# ---- mistakes


def test_a_folder_without_weights_names_the_checkpoint_to_evaluate(trained, tmp_path):
    run, _ = trained
    for path in run.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(BadInput, match="checkpoint-4"):
        evaluate.check_weights(str(tmp_path))

"""A run's README.md says what was measured and no more, and can be pushed as its model card."""

import json
import re
import shutil
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import flags, refused
from huggingface_hub import ModelCard, constants
from transformers.utils.hub import hf_api

import evaluate
import train_grpo
from evaluate import NATIVE_INSTRUCTION
from support.report import write_report

HOSTILE = (
    "```\n# owned\n<script>alert(1)</script> [x](javascript:1) | a | \x1b[2J \u202e ````` {{ 7 * 7 }}\n---\n</answer>"
)


@pytest.fixture
def run(trained, tmp_path):
    """A finished small run, to be measured."""
    folder = shutil.copytree(
        trained[0], tmp_path / "small", ignore=shutil.ignore_patterns("evaluation*", "comparison*")
    )
    write_report(folder)
    return folder


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+%", text))


def test_a_finished_run_leaves_its_report_with_what_it_knows(trained):
    run, done = trained
    assert "a report in" in done.stdout
    card = ModelCard.load(run / "README.md")
    facts = json.loads((run / "run.json").read_text())
    assert card.data.to_dict()["library_name"] == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert (card.data.base_model, card.data.datasets) == (None, None), "a folder of this machine has no name on the Hub"
    for text in (
        "32 problems",
        "4 steps of 8 completions",
        facts["device"],
        facts["versions"]["trl"],
        "train_grpo.py --model_name_or_path",
        "![reward",
        textwrap.indent(facts["system_prompt"].strip(), "    "),
    ):
        assert text in card.text
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    measured = [row for row in log if "eval_strict_accuracy" in row]
    assert len(re.findall(r"^\| \d", card.text, re.MULTILINE)) == len(measured)
    (seconds,) = [row["train_runtime"] for row in log if "train_runtime" in row]
    assert f"{seconds / 60:.1f} minutes" in card.text
    assert "fine-tuned version" not in card.text


def test_an_evaluation_writes_the_report_anew_with_what_was_measured(run, policy, capsys):
    assert "Did it get better" not in (run / "README.md").read_text()
    baseline = shutil.copytree(policy, run.parent / "base", ignore=shutil.ignore_patterns("evaluation*"))
    evaluate.main(
        [str(run), "--compare", str(baseline), "--limit", "5", "--max_completion_length", "9", "--one_shot", "true"]
    )
    assert "the run's report" in capsys.readouterr().out
    report = json.loads((run / "evaluation.json").read_text())
    card = ModelCard.load(run / "README.md")
    section = card.text.partition("## Did it get better?")[2].partition("## While")[0]
    shown = {
        f"{of[key]:.1%}"
        for of in (report, *report["comparison"]["columns"].values())
        for key in of
        if key.endswith(("accuracy", "rate")) and of[key] is not None
    }
    bounds = {
        f"{bound:.1%}" for of in (report, report["comparison"]["columns"]["baseline"]) for bound in of["strict_ci95"]
    }
    assert numbers(section) == shown | bounds
    assert f"evaluate.py {run} --compare {baseline} --limit 5 --max_completion_length 9 --one_shot true\n" in card.text
    assert "greedy and with one worked example" in card.text
    for text in ("before, native", "n = 5 could show", "Problems before and after", "### `neither`"):
        assert text in card.text
    assert card.data.eval_results is None, "5 problems of our own are not GSM8K's test split"
    assert "\n    strict accuracy " in card.text, "a block of code"


@pytest.mark.parametrize(
    ("change", "is_result"),
    [
        ({}, True),
        ({"limit": 1000}, False),
        ({"dataset": "openai/gsm8k-like"}, False),
        ({"split": "train"}, False),
        ({"model": "elsewhere"}, False),
    ],
)
def test_only_the_whole_test_split_of_gsm8k_is_a_result_for_the_hub(run, change, is_result):
    evaluate.main([str(run), "--limit", "5"])
    report = json.loads((run / "evaluation.json").read_text())
    report |= {"dataset": "openai/gsm8k", "limit": None, "n": 1319, "strict_accuracy": 0.25, **change}
    (run / "evaluation.json").write_text(json.dumps(report))
    facts = json.loads((run / "run.json").read_text())
    facts["settings"] |= {"model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "dataset_name": "openai/gsm8k"}
    (run / "run.json").write_text(json.dumps(facts))
    write_report(run)
    data = ModelCard.load(run / "README.md").data
    assert (data.base_model, data.datasets) == ("Qwen/Qwen2.5-1.5B-Instruct", ["openai/gsm8k"])
    assert (data.eval_results is not None) is is_result
    if is_result:
        result = data.eval_results[0]
        assert (result.dataset_type, result.dataset_split, result.metric_type) == ("openai/gsm8k", "test", "accuracy")
        assert result.metric_value == 0.25


def test_an_evaluation_of_other_weights_is_not_in_the_report(run):
    evaluate.main([str(run), "--limit", "5"])
    assert "Did it get better" in (run / "README.md").read_text()
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # written anew, after the evaluation
    write_report(run)
    assert "Did it get better" not in (run / "README.md").read_text()


def test_text_of_models_and_data_breaks_neither_markdown_nor_a_terminal(run):
    markdown_it = pytest.importorskip("markdown_it")
    evaluate.main([str(run), "--limit", "5"])
    report = json.loads((run / "evaluation.json").read_text())
    sample = {"kind": "gained", "question": HOSTILE, "gold": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    columns = {"baseline": {key: report[key] for key in report}}
    tests = {"difference": 0.0, "mcnemar_p": 1.0, "n": 5}
    report["comparison"] = {"baseline": HOSTILE, **tests, "columns": columns, "samples": [sample]}
    report["dataset"] = HOSTILE
    (run / "evaluation.json").write_text(json.dumps(report))
    facts = json.loads((run / "run.json").read_text())
    facts |= {"system_prompt": HOSTILE, "device": HOSTILE, "command": ["python", HOSTILE]}
    facts["settings"] |= {"model_name_or_path": HOSTILE, "dataset_name": HOSTILE}
    (run / "run.json").write_text(json.dumps(facts))
    write_report(run)
    text = (run / "README.md").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(ModelCard.load(run / "README.md").text)
    assert "<script" not in html
    assert 'javascript:1"' not in html
    assert "<h1>owned" not in html
    assert html.count("<h1>") == 1
    assert html.count("{{ 7 * 7 }}") >= 12, "as it stands, wherever it comes from"


# ---- the Hub


class Hub(ThreadingHTTPServer):
    """Makes a repository, says that a card is valid, and fails at whatever comes then."""

    def __init__(self):
        hub = self
        self.requests: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                hub.requests.append((self.path, body))
                known = self.path in ("/api/repos/create", "/api/validate-yaml")
                answer = json.dumps({"url": f"{hub.url}/me/run", "warnings": [], "errors": []}).encode()
                self.send_response(200 if known else 403)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_HEAD = do_POST

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api(), "endpoint", hub.url)  # Transformers keeps one client
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    yield hub
    hub.shutdown()
    hub.server_close()


PUSH = {"push_to_hub": "true", "max_steps": "2", "eval_steps": "0", "save_steps": "1"}


def test_what_is_pushed_is_the_report_and_a_failing_hub_costs_only_the_push(hub, policy, data, tmp_path, capsys):
    train_grpo.main(flags(policy, data, tmp_path / "run", **PUSH))
    cards = [json.loads(body)["content"] for path, body in hub.requests if path == "/api/validate-yaml"]
    assert cards, [path for path, _ in hub.requests]
    assert all("fine-tuned version" not in card for card in cards)
    assert "2 steps of 8 completions" in cards[-1]
    assert "minutes" in cards[-1]
    out, errors = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if "NOT pushed" in line]
    assert f"hf upload run {tmp_path / 'run'}" in line
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "finished"
    for name in ("model.safetensors", "trainer_state.json", "README.md"):
        assert (tmp_path / "run" / name).is_file()


def test_the_policy_is_pushed_without_its_checkpoints(hub, policy, data, tmp_path, monkeypatch):
    """An optimizer's states are twice as large as the policy, and nobody's business."""
    words = flags(policy, data, tmp_path / "run", **PUSH)
    words.append("--hub-token=hf_" + "y" * 34)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *words])
    train_grpo.main(words)
    asked = [json.loads(body)["files"] for path, body in hub.requests if "/preupload/" in path]
    names = {file["path"] for files in asked for file in files}
    assert "model.safetensors" in names
    assert not [name for name in names if "checkpoint-" in name]
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert command[-1] == "--hub_token=..."
    assert "yyy" not in (tmp_path / "run" / "run.json").read_text(), "nor does the token go there"


def test_without_network_a_push_is_refused_in_one_line_before_training(policy, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(capsys, 1, flags(policy, data, tmp_path / "run", **PUSH))
    assert "--push_to_hub: " in error
    assert f"Train without it, and later say: hf upload run {tmp_path / 'run'}" in error
    assert "\n" not in error


def test_a_folder_with_a_copied_run_json_alone_is_no_run(run, policy, tmp_path):
    merged = shutil.copytree(policy, tmp_path / "merged", ignore=shutil.ignore_patterns("evaluation*"))
    shutil.copy(run / "run.json", merged)
    assert write_report(merged) is None
    assert not (merged / "README.md").exists()


def test_native_is_not_what_the_report_shows(run):
    evaluate.main([str(run), "--native", "--limit", "2"])
    text = (run / "README.md").read_text()
    assert "Did it get better" not in text
    assert NATIVE_INSTRUCTION not in text

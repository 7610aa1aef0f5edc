"""The demo, as a command and as a notebook, in a copy of the project's files: they learn, and what they made stays."""

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, identical, launch, start, until, weights

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]  # the second to run finds the policy taught


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project's files in a new folder, without what was made in this one."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    return shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns("outputs", "models", ".*", "__pycache__", "tests")
    )


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def has_learned(taught: Path, run: Path) -> None:
    before, after = evaluation(taught), evaluation(run)
    assert before["n"] == after["n"] == 200
    assert before["strict_accuracy"] < 0.05
    assert 0.40 <= before["lenient_accuracy"] <= 0.75
    assert after["strict_accuracy"] >= 0.92
    assert after["lenient_accuracy"] >= 0.92


def test_the_demo_learns_the_format_and_then_the_sums(clone):
    done = start("demo.py", folder=clone)
    assert done.returncode == 0, done.stderr[-4000:]
    demo = clone / "outputs" / "demo"
    run, taught = demo / "grpo-42", demo / "taught-42"
    has_learned(taught, run)
    better = r"(?:with the same prompt, strict|\(lenient\)): better by .* p < 0.001, n = 200"
    assert len(re.findall(better, done.stdout)) == 2
    assert "{'train_runtime'" not in done.stdout
    typed = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert typed[-2:] == [["python", "train_grpo.py"], ["python", "evaluate.py"]]
    told = done.stdout.partition("---- one problem, gold ")[2]
    gold = told.partition(" ----")[0]
    wrong, right = told.split("after GRPO:")
    assert f"= {int(gold) - 10}." in wrong, "the carry was forgotten"
    assert f"<answer>\n{gold}\n</answer>" in right

    trained = weights(run)
    wrong = start("demo.py", "--output_dir", "outputs/other", "--temperature", 0, folder=clone)
    assert wrong.returncode == 2
    assert "TEMPERATURE is 0.0" in wrong.stderr
    assert "teaching" not in wrong.stdout, "it is told before"
    again = start("demo.py", "--max_steps", 1, "--bf16", "true", folder=clone)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "taught by an earlier demo" in again.stdout
    assert "compute bfloat16" in again.stdout, "after a teaching in fp32"
    assert json.loads((demo / "grpo-42-2" / "run.json").read_text())["settings"]["max_steps"] == 1
    assert identical(weights(run), trained), "what an earlier demo left stays"


CELLS = """
import json

for cell in json.load(open("demo.ipynb"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]))
"""


def test_the_notebook_can_be_interrupted_resumes_and_shows_that_it_learned(clone):
    """Its code cells in order, in one process, started in the notebook's folder, as Jupyter does; an interrupt of the
    kernel reaches what it has started, too."""
    there, demo = {"folder": clone / "notebooks", "MPLBACKEND": "agg"}, clone / "outputs" / "demo"
    first = launch(CELLS, **there)
    seen = until(first, "step  5/80")
    for process in (*psutil.Process(first.pid).children(), first):
        process.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=300)
    assert first.returncode != 0
    assert "KeyboardInterrupt" in errors
    (saved,) = (demo / "notebook").glob("checkpoint-*")
    assert f"checkpoint-{saved.name.split('-')[1]}" in out, "it says so"
    assert "95% interval" in seen, "of the first command"

    done = start(CELLS, **there)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resuming after step {saved.name.split('-')[1]}" in done.stdout
    has_learned(demo / "taught-42", demo / "notebook")
    typed = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ python ")]
    assert typed == ["evaluate.py", "train_grpo.py", "evaluate.py"]
    table, _, samples = done.stdout.partition("strict results in pairs")
    assert "95% interval" in table
    assert len(re.findall(r"\?\n\nbefore:\n\d \+ .*\n\nafter:\n<reasoning>", samples)) == 3

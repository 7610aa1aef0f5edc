"""Models and problems from a Hub: a good one is loaded and trained on, and each way to fail is one message."""

import json

import pytest
from conftest import flags, start, weights
from hub import COMMIT, FAULTS, serving

pytestmark = pytest.mark.xdist_group("hub")  # all share one fixture

# libraries read the Hub's address when they are imported: all cases share one other process, which is forked for each
CASES = """
import contextlib, io, json, multiprocessing, sys
import datasets, evaluate, train_grpo
import support.trainer, support.curves

def told(case):
    name, words = case
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            (evaluate if name.startswith("evaluate") else train_grpo).main(words)
        except SystemExit as exit:
            status = exit.code
    message = errors.getvalue()
    status, message = (1, message + status) if isinstance(status, str) else (status, message)
    return status, out.getvalue(), message

cases = json.loads(sys.argv[1])
with multiprocessing.get_context("fork").Pool(len(cases)) as at_once:  # the Hub's clients wait before each retry
    print("TOLD", json.dumps(dict(zip(cases, at_once.map(told, cases.items(), 1)))))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def told(policy, data, folder):
    """Status, output and message of each case: a Hub has the tiny policy and the problems under every owner, fine/tiny,
    broken/tiny, fine/sums, ..."""

    def training(name: str, model: str, dataset: str) -> list[str]:
        words = {"dataset_config": "default", "max_steps": "2"}
        return flags(f"{model}/tiny", f"{dataset}/sums", folder / name, **words)

    def evaluation(model: str) -> list[str]:
        words = ["--dataset_name", "fine/sums", "--dataset_config", "default", "--limit", "2", "--use_cpu"]
        return [f"{model}/tiny", *words, "--max_completion_length", "4", "--output_dir", str(folder / "out")]

    cases = {"train fine": training("run", "fine", "fine"), "evaluate fine": evaluation("fine")}
    for owner in FAULTS:
        cases[f"model {owner}"] = training(f"model-{owner}", owner, "fine")
        cases[f"dataset {owner}"] = training(f"dataset-{owner}", "fine", owner)
        cases[f"evaluate {owner}"] = evaluation(owner)
    with serving(models_tiny=policy, datasets_sums=data) as address:
        online = {"HF_ENDPOINT": address, "HF_HOME": folder / "home", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        online |= {"no_proxy": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        done = start(CASES, json.dumps(cases), **online)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not [*folder.glob("model-*"), *folder.glob("dataset-*")], "nothing is left of a run that never began"
    return json.loads(done.stdout.rpartition("TOLD ")[2])


def test_a_model_and_problems_from_the_hub_are_trained_on(told, policy, folder):
    status, out, errors = told["train fine"]
    assert status == 0, errors[-4000:]
    assert "fine/sums: 32 problems to train on" in out
    assert "step 2/2" in out
    saved = json.loads((folder / "run" / "run.json").read_text())
    assert (saved["dataset_revision"], saved["model_revision"]) == (COMMIT, COMMIT)
    assert weights(folder / "run").keys() == weights(policy).keys()


def test_a_model_from_the_hub_is_evaluated_on_problems_from_it(told, folder):
    status, _, errors = told["evaluate fine"]
    assert status == 0, errors[-4000:]
    assert json.loads((folder / "out" / "evaluation.json").read_text())["n"] == 2


MESSAGES = {
    "gone": ["has none of this name"],
    "gated": [
        "does not give it to everybody",
        "Accept its licence on https://huggingface.co/{page}",
        "`hf auth login`",
    ],
    "forbidden": [
        "does not give it to everybody (403)",
        "Accept its licence on https://huggingface.co/{page}",
        "`hf auth login`",
    ],
    "broken": ["answers 500 Internal Server Error"],
    "cut": ["the connection breaks off"],
}


@pytest.mark.parametrize("part", ["model", "dataset", "evaluate"])
@pytest.mark.parametrize("owner", MESSAGES)
def test_a_hub_that_fails_is_one_message(part, owner, told):
    status, _, message = told[f"{part} {owner}"]
    name = f"{owner}/sums" if part == "dataset" else f"{owner}/tiny"
    assert status in (1, 2), message
    assert "Traceback" not in message
    assert message.count(name) >= 1
    assert len([line for line in message.splitlines() if line.strip()]) == 1, message
    for text in MESSAGES[owner]:
        assert text.format(page=f"datasets/{name}" if part == "dataset" else name) in message

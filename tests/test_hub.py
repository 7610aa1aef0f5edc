"""Models and problems from a Hub: a good one is loaded and trained on, and each way to fail is one message."""

import json
from pathlib import Path

import pytest
from conftest import flags, start, weights
from hub import COMMIT, FAULTS, serving

MANY = """
import contextlib, io, json, multiprocessing, sys
import evaluate, train_grpo

def told(case):
    name, words = case
    out, errors, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            (evaluate if name.startswith("evaluate") else train_grpo).main(words)
        except SystemExit as exit:
            status, message = exit.code, errors.getvalue()
    return [1, message + status] if isinstance(status, str) else [status, message]

cases = json.loads(sys.argv[1])
with multiprocessing.get_context("fork").Pool(len(cases)) as at_once:  # the Hub's clients wait before each retry
    print("TOLD", json.dumps(dict(zip(cases, at_once.map(told, cases.items(), 1)))))
"""


def environment(address: str, home: Path) -> dict:
    online = {
        "HF_ENDPOINT": address,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return {**online, "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}


@pytest.fixture(scope="module")
def hub(policy, data):
    """A Hub with the tiny policy and the problems, under every owner: fine/tiny, broken/tiny, fine/sums, ..."""
    with serving(models_tiny=policy, datasets_sums=data) as address:
        yield address


def test_a_model_and_problems_from_the_hub_are_trained_on_and_evaluated(hub, policy, tmp_path):
    run, online = tmp_path / "run", environment(hub, tmp_path / "home")
    words = flags("fine/tiny", "fine/sums", run, dataset_config="default", max_steps="2")
    done = start("train_grpo.py", *words, **online)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "fine/sums: 32 problems to train on" in done.stdout
    assert "step 2/2" in done.stdout
    saved = json.loads((run / "run.json").read_text())
    assert (saved["dataset_revision"], saved["model_revision"]) == (COMMIT, COMMIT)
    assert weights(run).keys() == weights(policy).keys()
    done = start(
        "evaluate.py",
        "fine/tiny",
        "--dataset_name",
        "fine/sums",
        "--dataset_config",
        "default",
        "--limit",
        2,
        "--use_cpu",
        "--max_completion_length",
        4,
        "--output_dir",
        tmp_path / "out",
        **online,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["n"] == 2


@pytest.fixture(scope="module")
def told(hub, tmp_path_factory):
    """Status and message of each failure, all at once."""
    folder = tmp_path_factory.mktemp("hub")
    cases = {
        f"{part} {owner}": flags(
            f"{owner}/tiny" if part == "model" else "fine/tiny",
            f"{owner}/sums" if part == "dataset" else "fine/sums",
            folder / f"{part}-{owner}",
            dataset_config="default",
        )
        for part in ("model", "dataset")
        for owner in FAULTS
    }
    problems = ["--dataset_name", "fine/sums", "--dataset_config", "default", "--output_dir", str(folder / "out")]
    cases |= {f"evaluate {owner}": [f"{owner}/tiny", "--use_cpu", *problems] for owner in FAULTS}
    done = start(MANY, json.dumps(cases), **environment(hub, folder / "home"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert not [*folder.glob("model-*"), *folder.glob("dataset-*")], "nothing is left of a run that never began"
    return json.loads(done.stdout.rpartition("TOLD ")[2])


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


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "dataset", "evaluate"])
@pytest.mark.parametrize("owner", MESSAGES)
def test_a_hub_that_fails_is_one_message(part, owner, told):
    status, message = told[f"{part} {owner}"]
    name = f"{owner}/sums" if part == "dataset" else f"{owner}/tiny"
    assert status in (1, 2), message
    assert "Traceback" not in message
    assert message.count(name) >= 1
    assert len([line for line in message.splitlines() if line.strip()]) == 1, message
    for text in MESSAGES[owner]:
        assert text.format(page=f"datasets/{name}" if part == "dataset" else name) in message

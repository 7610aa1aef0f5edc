"""Two processes on the CPU, started by `accelerate launch` as a user starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, cold_flags, flags, identical, start, until, weights

import train_grpo
from rewards import REWARD_FUNCS
from support.checkpoints import flaw, newest_whole

LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


def launch(*words, script: str = "train_grpo.py", how: list = LAUNCH) -> subprocess.Popen:
    """Start a command in two processes, which end with the launcher; stdout and stderr as one text."""
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, [*how, *script.split(), *words])],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*words, timeout: float = 300, **started) -> tuple[int, str]:
    process = launch(*words, **started)
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.terminate()
    return process.returncode, out


def steps(run: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(path) for path in sorted((run / "completions").glob("*.parquet"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory, policy, data) -> tuple[Path, str]:
    """A finished run of two processes: its folder, and what both printed."""
    output = tmp_path_factory.mktemp("two") / "run"
    status, out = finished(*flags(policy, data, output))
    assert status == 0, out[-4000:]
    return output, out


def test_two_processes_train_on_the_same_prompts_with_as_many_completions_a_step(two, trained):
    run, out = two
    assert "2 prompts x 4 completions = 8 completions in batches of 4, gradient checkpointing off" in out
    ours, alone = steps(run), steps(trained[0])
    assert len(ours) == len(alone) == 4
    for mine, other in zip(ours, alone, strict=True):
        assert len(mine) == 8
        assert mine["prompt"].map(str).tolist() == other["prompt"].map(str).tolist()
    rates = [[row["learning_rate"] for row in log(folder) if "reward" in row] for folder in (run, trained[0])]
    assert rates[0] == rates[1]


def log(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_one_process_speaks_and_writes_for_both(two):
    run, out = two
    assert out.count("  policy  ") == 1, "one plan"
    assert "2 processes, on cpu" in out
    assert len(re.findall(r"^step \d/4 ", out, re.MULTILINE)) == 4, "one line a step"
    assert out.count("---- sample after step 2, about ") == 1
    assert out.count("held out at step 4/4") == 1
    assert out.count("32 problems to train on") == 1
    assert out.count("saved: the trained policy") == 1
    saved = json.loads((run / "run.json").read_text())
    assert (saved["outcome"], saved["processes"], saved["earlier"]) == ("finished", 2, [])
    assert (run / "curves.png").is_file()


def test_held_out_accuracy_is_that_of_one_process(two, trained):
    """Before the first step the policies are the same, and each process answers its share of the 6 problems."""
    first = [next(row for row in log(run) if "eval_n" in row) for run in (two[0], trained[0])]
    assert first[0] == first[1]
    assert first[0]["eval_n"] == 6


def test_groups_that_span_processes_get_the_advantages_of_one_process(policy, data, tmp_path):
    """One group of 8, of which each process samples 4, and samples differently."""
    words = flags(policy, data, tmp_path / "run", num_generations="8", max_steps="2", save_steps="2", eval_steps="0")
    status, out = finished(*words)
    assert status == 0, out[-4000:]
    for table in steps(tmp_path / "run"):
        rewards = sum(torch.tensor(table[function.__name__].tolist()) for function in REWARD_FUNCS)
        assert table["prompt"].map(str).nunique() == 1
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.allclose(torch.tensor(table["advantage"].tolist()), expected.float(), atol=1e-5)
        assert table["completion"].map(str).tolist()[:4] != table["completion"].map(str).tolist()[4:]


def test_the_lean_step_of_two_processes_has_trls_gradient(policy, data, tmp_path):
    """With plain gradient descent at rate 1 the weights move by the gradient itself."""
    step = {"max_steps": "1", "save_steps": "1", "optim": "sgd", "learning_rate": "1", "warmup_steps": "0"}
    step |= {"max_grad_norm": "0", "weight_decay": "0", "eval_steps": "0", "per_device_train_batch_size": "16"}
    for lean, tokens in (("true", "150"), ("false", None)):  # passes of some three rows
        words = flags(policy, data, tmp_path / lean, **step, lean_step=lean, tokens_per_pass=tokens, seed="3")
        status, out = finished(*words)
        assert status == 0, out[-4000:]
        assert "optimizer sgd" in out
    before, ours, theirs = weights(policy), weights(tmp_path / "true"), weights(tmp_path / "false")
    largest = max((theirs[name] - before[name]).abs().max().item() for name in before)
    assert largest > 1e-2
    assert max((ours[name] - theirs[name]).abs().max().item() for name in before) <= 1e-6 * largest
    assert log(tmp_path / "true")[0]["computed_tokens"] < 1
    assert log(tmp_path / "true")[0]["passes"] > 1


def test_what_two_processes_saved_is_evaluated_like_any_other(two, data):
    done = start("evaluate.py", two[0], "--limit", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "strict accuracy" in done.stdout


def test_two_processes_resume_to_the_same_weights(two, policy, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two[0], run, ignore=shutil.ignore_patterns("checkpoint-4", "model.safetensors"))
    shutil.copytree(two[0] / "checkpoint-2", run / "checkpoint-2", dirs_exist_ok=True)
    status, out = finished(*flags(policy, data, run, resume_from_checkpoint="auto"))
    assert status == 0, out[-4000:]
    assert "resuming after step 2" in out
    assert identical(weights(run), weights(two[0]))


def test_two_processes_resume_after_the_first_epoch(policy, data, tmp_path):
    """Of which there are two steps, of two problems each."""
    run, few = tmp_path / "run", shutil.copytree(data, tmp_path / "data")
    rows = (few / "train.jsonl").read_text().splitlines()[:4]
    (few / "train.jsonl").write_text("\n".join(rows) + "\n")
    words = flags(policy, few, run, max_steps="5", save_steps="1", save_total_limit="2", eval_steps="0")
    status, out = finished(*words)
    assert status == 0, out[-4000:]
    whole = weights(run)
    shutil.rmtree(run / "checkpoint-5")
    status, out = finished(*words, "--resume_from_checkpoint", "auto")
    assert status == 0, out[-4000:]
    assert "resuming after step 4" in out
    assert identical(weights(run), whole)


def test_a_finished_run_ends_before_python_takes_itself_apart(two, policy, data, tmp_path, monkeypatch):
    """Gloo's threads may still hold tensors then, which aborts a process now and then; here one always does."""
    run, script = tmp_path / "run", tmp_path / "aborts_late.py"
    shutil.copytree(two[0], run)
    script.write_text(
        "import os, runpy, sys\n"
        "class Late:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "sys.late = Late()\n"
        "runpy.run_path('train_grpo.py', run_name='__main__')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status, out = finished(*flags(policy, data, run, resume_from_checkpoint="auto"), script=str(script))
    assert status == 0, out[-4000:]


def test_one_process_goes_on_with_what_two_have_saved_and_says_what_differs(two, policy, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two[0], run, ignore=shutil.ignore_patterns("checkpoint-4"))
    done = start("train_grpo.py", *flags(policy, data, run, resume_from_checkpoint="auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "processes: 2 -> 1, so that sums round otherwise, and random states are new" in done.stdout
    assert "per_device_train_batch_size: 4 -> 8, so that sums round otherwise" in done.stdout
    for ours, other in zip(steps(run)[2:], steps(two[0])[2:], strict=True):
        assert ours["prompt"].map(str).tolist() == other["prompt"].map(str).tolist(), "where the data stood"


def test_a_cold_start_is_shared_as_well(policy, data, tmp_path):
    run = tmp_path / "run"
    words = {"examples": "8", "per_device_train_batch_size": "4", "num_train_epochs": "1", "logging_steps": "1"}
    status, out = finished(*cold_flags(policy, data, run, **words), script="cold_start.py")
    assert status == 0, out[-4000:]
    assert len((run / "examples.jsonl").read_text().splitlines()) == 8
    assert log(run)[-1]["step"] == 2, "8 examples, 4 a step, whatever the number of processes"
    assert out.count("8 examples, source") == 1
    assert out.count("step 2/2") == 1


LONG = {"max_steps": "400", "save_steps": "4", "eval_steps": "0", "sample_every": "0"}


def test_sigterm_to_the_launcher_saves_and_ends_every_process(policy, data, tmp_path):
    run = tmp_path / "run"
    process = launch(*flags(policy, data, run, **LONG))
    out = until(process, "step   2/400")
    process.send_signal(signal.SIGTERM)
    out += process.communicate(timeout=60)[0]
    assert process.returncode != 0
    saved = re.search(r"SIGTERM: saved (\S+)\. Resume with\n  accelerate launch --multi_gpu --num_processes 2", out)
    assert saved, out[-4000:]
    assert flaw(Path(saved[1])) is None
    assert len(list(Path(saved[1]).glob("rng_state_*.pth"))) == 2
    assert out.count("Resume with") == 1
    assert json.loads((run / "run.json").read_text())["outcome"].startswith("stopped")


def test_a_process_that_dies_ends_the_run_with_a_whole_checkpoint(policy, data, tmp_path):
    import psutil

    run = tmp_path / "run"
    process = launch(*flags(policy, data, run, **LONG))
    out = until(process, "step  12/400")
    tables = [run / "completions" / f"completions_{step:05d}.parquet" for step in range(1, 12)]
    halves = [(table[:4], table[4:]) for table in map(pd.read_parquet, tables)]
    teaching = [[(half["advantage"] != 0).sum() for half in pair] for pair in halves]
    assert any(first != second for first, second in teaching), "of which TRL gathers a number a row in every process"
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    out += process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "another process of this run has ended" in out, out[-4000:]
    assert "is the last whole checkpoint" in out
    assert newest_whole(run)[0] is not None
    assert not (run / ".saving").exists()
    assert not any(child.is_running() for child in children), "nobody is left behind"


def test_a_mistake_is_told_once_and_ends_every_process(policy, data, tmp_path):
    status, out = finished(*flags(policy, data, tmp_path / "run", temperature="0"), timeout=120)
    assert status != 0
    assert out.count("TEMPERATURE is 0.0") == 1


@pytest.mark.parametrize(
    ("processes", "words", "message"),
    [
        (3, [], "PER_DEVICE_TRAIN_BATCH_SIZE is 64, .* among 3 processes: --per_device_train_batch_size 96 does"),
        (
            2,
            ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "64"],
            "among 2 processes: --per_device_train_batch_size 64 --gradient_accumulation_steps 1 does",
        ),
    ],
)
def test_a_step_that_does_not_divide_among_the_processes_is_a_mistake(
    processes, words, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit):
        train_grpo.main(["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), *words])
    assert re.search(message, capsys.readouterr().err)


def test_sharding_that_accelerate_would_ignore_is_a_mistake(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        train_grpo.main(["--use_cpu", "true", "--output_dir", str(tmp_path / "run")])
    assert "FSDP and DeepSpeed flags would be ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"--num_processes 8 train_grpo.py --output_dir \S+/run` uses them all"),
        (
            ["--per_device_train_batch_size", "12", "--num_generations", "12"],
            r" --per_device_train_batch_size 24` uses",
        ),
        (["--per_device_train_batch_size", "0"], r"PER_DEVICE_TRAIN_BATCH_SIZE is 0"),
    ],
)
def test_a_machine_with_several_gpus_is_told_what_to_type(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--output_dir", str(tmp_path / "run"), *words])
    with pytest.raises(SystemExit):
        train_grpo.main()
    assert re.search(message, capsys.readouterr().err)

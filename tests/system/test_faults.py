"""A run survives what happens to runs: real processes, real signals, real files, a tiny policy."""

import json
import math
import random
import re
import shlex
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LONG,
    SLOW,
    cold_flags,
    ended,
    flags,
    identical,
    launch,
    refused,
    resumed,
    same_run,
    settings,
    start,
    until,
    weights,
)
from safetensors.torch import save_file

import cold_start
import rewards
import train_grpo
from support import memory
from support.checkpoints import checkpoints, newest_whole
from support.errors import RunStopped
from support.faults import explained, locked

# a step of one thread, and one with sums that are large enough for two threads to share them
THREADS = {1: LONG, 2: {**LONG, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}}


@pytest.fixture(scope="module", params=THREADS, ids=["one thread", "two threads"])
def alone(request, tmp_path_factory, policy, data) -> tuple[Path, dict, dict]:
    """A run that nothing happened to: its folder, its settings and its environment."""
    changes, env = THREADS[request.param], {"OMP_NUM_THREADS": request.param, "OMP_WAIT_POLICY": "passive"}
    output = tmp_path_factory.mktemp("alone") / "run"
    done = start("train_grpo.py", *flags(policy, data, output, **changes), **env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exact, bit for bit" in done.stdout
    return output, changes, env


def test_the_same_command_twice_is_the_same_run(alone, policy, data, tmp_path):
    undisturbed, changes, env = alone
    done = start("train_grpo.py", *flags(policy, data, tmp_path / "run", **changes), **env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert same_run(undisturbed, tmp_path / "run")


def test_a_run_killed_in_mid_step_resumes_to_the_same_run(alone, policy, data, tmp_path):
    undisturbed, changes, env = alone
    words = flags(policy, data, tmp_path / "run", **changes)
    process = launch("train_grpo.py", *words, **env)
    until(process, "step  7/24")
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "running"
    assert newest_whole(tmp_path / "run")[0].name in ("checkpoint-4", "checkpoint-8", "checkpoint-12")
    resumed(tmp_path / "run", words, **env)
    assert same_run(undisturbed, tmp_path / "run")


def test_one_command_for_ever_starts_restarts_and_ends_a_run(undisturbed, policy, data, tmp_path):
    """A supervisor's loop: the same line until it says that the run is complete, killed at random on the way."""
    words = [*flags(policy, data, tmp_path / "run", **LONG), "--resume_from_checkpoint", "auto"]
    moments = [("problems to train on", 1), ("step  1/24", 0), ("step ", 1), ("step ", 1)]  # and up to so many seconds
    rng, said = random.Random(19), []
    record = tmp_path / "run" / "run.json"
    while not said or "already complete" not in said[-1]:
        is_done = record.is_file() and json.loads(record.read_text())["outcome"] == "finished"
        process = launch("train_grpo.py", *words)
        seen = ""
        if moments and not is_done:  # a fast machine is done before the last kill
            text, seconds = moments.pop(0)
            seen = until(process, text)
            time.sleep(seconds * rng.random())
            process.kill()
        out, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors[-4000:]
        said.append(seen + out)
        assert len(said) < 8
    assert "no run is there yet" in said[0]
    assert "no checkpoint yet, the run begins anew" in said[2]
    assert same_run(undisturbed, tmp_path / "run")
    assert json.loads(record.read_text())["outcome"] == "finished"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_go_on(number, status, alone, policy, data, tmp_path):
    undisturbed, changes, env = alone
    process = launch("train_grpo.py", *flags(policy, data, tmp_path / "run", **changes), **env)
    until(process, "step  6/24")
    process.send_signal(number)
    out, errors = process.communicate()
    assert process.returncode == status, errors[-4000:]
    assert "a second signal stops at once" in errors
    assert "Traceback" not in errors
    last = [line for line in out.splitlines() if line.startswith("step ")][-1:]
    saved = newest_whole(tmp_path / "run")[0]
    assert not last or f"{saved.name.removeprefix('checkpoint-')}/24" in last[0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"].startswith("stopped")
    assert not (tmp_path / "run" / "model.safetensors").exists(), "what is not finished does not look finished"

    command = shlex.split(errors.strip().splitlines()[-1])
    assert command[0] == "python"
    done = start(command[1], *command[2:], **env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert same_run(undisturbed, tmp_path / "run")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "eval_n" in row] == [0, 8, 16, 24], "no measurement is lost"


@pytest.mark.parametrize(
    ("script", "module"),
    [
        *(("train_grpo.py", module) for module in ("numpy", "torch")),
        *(("evaluate.py", module) for module in ("numpy", "transformers.utils.logging")),
    ],
)
def test_ctrl_c_while_it_imports_is_no_traceback(script, module):
    """Python names every module that it has imported, so that a moment can be waited for."""
    process = launch(script, "outputs/none", PYTHONPROFILEIMPORTTIME=1)
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == module:
            break
    else:
        raise AssertionError(f"{module} is never imported")
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    process.communicate()
    assert process.returncode == -signal.SIGINT, "as any program ends by it: 130 in a shell"
    assert not [line for line in errors.splitlines() if line.strip() and not line.startswith("import time:")]


def test_a_stop_waits_until_what_was_generated_is_used_up(policy, data, tmp_path):
    """With several steps a generation, a resume is exact only where a new generation begins."""
    settings = {**LONG, "save_steps": 3, "eval_steps": 0, "steps_per_generation": 4, "num_iterations": 2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = start("train_grpo.py", *flags(policy, data, tmp_path / "whole", **settings))
    assert "not exact: SAVE_STEPS 3 does not fall on a generation's end, every 4 steps" in whole.stdout
    words = flags(policy, data, tmp_path / "run", **settings)
    process = launch("train_grpo.py", *words)
    until(process, "step  5/24")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    saved = newest_whole(tmp_path / "run")[0]
    assert int(saved.name.removeprefix("checkpoint-")) % 4 == 0
    resumed(tmp_path / "run", words)
    assert identical(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_second_signal_stops_at_once(policy, data, tmp_path):
    process = launch("train_grpo.py", *flags(policy, data, tmp_path / "run", **SLOW))
    until(process, "resume  ")
    process.send_signal(signal.SIGTERM)
    for line in process.stderr:
        if "a second signal" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert not checkpoints(tmp_path / "run")


def pay(value: float, step: int):
    """A reward function that goes wrong in that step."""

    def mine_reward_func(completions, trainer_state, **kwargs):
        return [value if trainer_state.global_step == step - 1 else 0.0 for _ in completions]

    return mine_reward_func


def spoil(what: str, step: int):
    """`build_trainer`, of a trainer whose gradient or loss goes wrong in that step."""

    def spoiled(*args, build=train_grpo.build_trainer):
        trainer = build(*args)
        if what == "gradient":
            weight = next(trainer.model.parameters())
            weight.register_hook(lambda grad: grad * (math.nan if trainer.state.global_step == step - 1 else 1))
        else:
            honest = trainer.compute_loss
            trainer.compute_loss = lambda *args, **kwargs: (
                honest(*args, **kwargs) + (math.inf if trainer.state.global_step == step - 1 else 0)
            )
        return trainer

    return spoiled


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "step 6: mine_reward_func paid nan for completion 0 of 8 (8 such)"),
        (-math.inf, "step 6: mine_reward_func paid -inf"),
        ("gradient", "step 6: the gradient is nan"),
        ("loss", "step 6: the loss is inf"),
    ],
)
def test_nan_or_infinity_ends_the_run_before_the_weights_change(
    value, message, policy, data, tmp_path, monkeypatch, capsys
):
    if isinstance(value, str):
        monkeypatch.setattr(train_grpo, "build_trainer", spoil(value, step=6))
    else:
        monkeypatch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, pay(value, step=6)])
    run = tmp_path / "run"
    _, error = ended(capsys, 1, flags(policy, data, run, **{**LONG, "eval_steps": 0}))
    assert message in error
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run / "checkpoint-4").values())
    assert not (run / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text())["outcome"].startswith("failed")


def test_what_fails_before_its_first_step_leaves_nothing_in_the_way_of_the_right_command(
    policy, data, tmp_path, monkeypatch, capsys
):
    """After the plan and the first generation, where most that is wrong with a reward or a setting shows."""
    words = flags(policy, data, tmp_path / "run", eval_steps="0", max_steps="1")
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, pay(math.nan, step=1)])
        _, error = ended(capsys, 1, words)
    assert "step 1: mine_reward_func paid nan" in error
    assert not (tmp_path / "run").exists(), "TRL's folder for completions neither"
    train_grpo.main(words)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "finished"
    assert (tmp_path / "run" / "train_grpo.py").is_file()


def test_a_run_that_fails_at_once_behind_anothers_checkpoint_still_knows_where_it_began(
    undisturbed, policy, data, tmp_path, monkeypatch, capsys
):
    """Its last words are to resume with `auto`, which must not begin anew with the untrained policy."""
    words = flags(policy, data, tmp_path / "run", **{**LONG, "eval_steps": 0})
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "build_trainer", spoil("loss", step=21))
        _, error = ended(capsys, 1, [*words, "--resume_from_checkpoint", undisturbed / "checkpoint-20"])
    assert "step 21: the loss is inf" in error
    train_grpo.main([*words, "--resume_from_checkpoint", "auto"])
    assert f"no checkpoint of its own yet, resuming from {undisturbed / 'checkpoint-20'}" in capsys.readouterr().out
    assert identical(weights(undisturbed), weights(tmp_path / "run"))


def test_a_cold_start_that_fails_before_its_first_step_leaves_no_trace(policy, data, tmp_path, monkeypatch, capsys):
    words = cold_flags(policy, data, tmp_path / "run", num_train_epochs="1")
    with monkeypatch.context() as patch:
        patch.setattr(cold_start, "build_trainer", partial(spoil("loss", step=1), build=cold_start.build_trainer))
        _, error = ended(capsys, 1, words, cold_start)
    assert "step 1: the loss is inf" in error
    assert not (tmp_path / "run").exists()
    cold_start.main(words)
    assert len((tmp_path / "run" / "examples.jsonl").read_text().splitlines()) == 24
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "finished"


def test_a_folder_that_held_something_before_is_kept(policy, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, pay(math.nan, step=1)])
    words = flags(policy, data, tmp_path / "run", eval_steps="0", max_steps="1")
    ended(capsys, 1, words)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "run.json").exists()
    ended(capsys, 1, words)


def test_a_policy_that_blows_up_is_explained(policy, data, tmp_path, capsys):
    settings = {**LONG, "learning_rate": "1e30", "warmup_steps": "0", "save_steps": 1}
    _, error = ended(capsys, 1, flags(policy, data, tmp_path / "run", **settings))
    assert "Lower LEARNING_RATE" in error
    for path in checkpoints(tmp_path / "run"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(path).values())


def test_a_policy_with_a_weight_that_is_nan_is_refused(policy, data, tmp_path, capsys):
    shutil.copytree(policy, tmp_path / "model")
    tensors = weights(policy)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, 1, flags(tmp_path / "model", data, tmp_path / "run", **LONG))
    assert "the policy to start from holds weights that are infinite or NaN" in error


def test_out_of_memory_names_what_to_lower_in_order_of_effect(monkeypatch):
    config = settings("--gradient_checkpointing", "false", "--beta", "0.1", "--tokens_per_pass", "8192")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 39_500_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=42_300_000_000))
    text = explained(torch.OutOfMemoryError(), config, memory.remedies)
    assert "39.5 GB of 42.3 GB" in text
    order = [
        "GRADIENT_CHECKPOINTING = True",
        "TOKENS_PER_PASS below 8,192",
        "MAX_COMPLETION_LENGTH below 512",
        "BETA = 0",
        "--use_peft true",
        "a smaller MODEL_NAME_OR_PATH",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_out_of_memory_on_cuda_is_one_message(policy, data, tmp_path):
    config = settings(*flags(policy, data, tmp_path / "run"))
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(10**15, device="cuda")
    assert re.match("CUDA is out of memory: .* in use at the peak", explained(error.value, config, memory.remedies))


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_checkpoint_runs_no_code(name, copy, policy, data, tmp_path, capsys):
    shutil.rmtree(copy / "checkpoint-24")
    (copy / "checkpoint-20" / "checksums.txt").unlink()  # whoever made it would have left none, or right ones
    torch.save(Payload(tmp_path / "canary"), copy / "checkpoint-20" / name)
    error = refused(capsys, 1, [*flags(policy, data, copy, **LONG), "--resume_from_checkpoint", "auto"])
    assert "it was not loaded" in error
    assert not (tmp_path / "canary").exists()


def test_a_second_run_on_the_same_folder_is_refused(policy, data, tmp_path, capsys):
    words = flags(policy, data, tmp_path / "run", **SLOW)
    process = launch("train_grpo.py", *words)
    until(process, "problems to train on")
    assert "another run is writing to" in refused(capsys, 2, words)
    with pytest.raises(RunStopped, match="another run is writing to"), locked(str(tmp_path / "run")):
        pass
    process.kill()
    process.communicate()
    with locked(str(tmp_path / "run")):
        pass  # a killed run's lock has gone with it

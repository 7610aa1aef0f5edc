"""A run survives what happens to runs: real processes, real signals, real files, a tiny policy."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, flags, identical, launch, problem, start, weights, write_jsonl
from safetensors.torch import save_file

import rewards
import safeguards
import train_grpo
from safeguards import (
    RunStopped,
    checkpoints,
    faults_explained,
    locked,
    memory_remedies,
    newest_whole,
    out_of_memory,
    vllm_obstacle,
)

LONG = {"max_steps": 24, "save_steps": 4, "eval_steps": 8, "sample_every": 0}
SLOW = {**LONG, "max_completion_length": 400, "generation_kwargs": '{"min_new_tokens": 400}', "eval_steps": 0}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, policy, data) -> Path:
    """A run of 24 steps that nothing happened to."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = start("train_grpo.py", *flags(policy, data, output, **LONG))
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    """That run, to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def until(process: subprocess.Popen, text: str) -> None:
    """Read a process's output up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read()[-4000:]}")


def same_run(first: Path, second: Path, steps: int = 24) -> bool:
    """The same prompts, completions, rewards and advantages at every step, and the same final weights."""
    for step in range(1, steps + 1):
        name = f"completions/completions_{step:05d}.parquet"
        pd.testing.assert_frame_equal(pd.read_parquet(first / name), pd.read_parquet(second / name))
    return identical(weights(first), weights(second))


def resumed(output: Path, words: list[str]) -> subprocess.CompletedProcess:
    done = start("train_grpo.py", *words, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def refused(capsys, status: int, words: list) -> str:
    """The error of a start that must not train; in this process, to save the time of the imports."""
    out, error = ended(capsys, status, words)
    assert "\nstep " not in out
    return error


def ended(capsys, status: int, words: list) -> tuple[str, str]:
    """What a start in this process prints before it ends with `status`, and its error."""
    with pytest.raises(SystemExit) as exit:
        train_grpo.main([str(word) for word in words])
    out, error = capsys.readouterr()
    assert (exit.value.code if isinstance(exit.value.code, int) else 1) == status, error
    return out, error if isinstance(exit.value.code, int) else exit.value.code


def resumed_here(capsys, words: list) -> str:
    """What a resumed run prints, in this process."""
    train_grpo.main([*map(str, words), "--resume_from_checkpoint", "auto"])
    return capsys.readouterr().out


# ---- stopped and killed


def test_a_run_killed_in_mid_step_resumes_to_the_same_run(undisturbed, policy, data, tmp_path):
    words = flags(policy, data, tmp_path / "run", **LONG)
    process = launch("train_grpo.py", *words)
    until(process, "step  7/24")
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "running"
    assert newest_whole(tmp_path / "run")[0].name in ("checkpoint-4", "checkpoint-8", "checkpoint-12")
    resumed(tmp_path / "run", words)
    assert same_run(undisturbed, tmp_path / "run")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_go_on(number, status, undisturbed, policy, data, tmp_path):
    process = launch("train_grpo.py", *flags(policy, data, tmp_path / "run", **LONG))
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
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=env, check=True, capture_output=True)
    assert same_run(undisturbed, tmp_path / "run")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "eval_n" in row] == [0, 8, 16, 24], "no measurement is lost"


def test_a_stop_waits_until_what_was_generated_is_used_up(policy, data, tmp_path):
    """With several steps a generation, a resume is exact only where a new generation begins."""
    settings = {**LONG, "save_steps": 3, "eval_steps": 0, "steps_per_generation": 4, "num_iterations": 2}
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


# ---- checkpoints

DAMAGES = {
    "no optimizer": ("optimizer.pt", None, "optimizer.pt is missing"),
    "no scheduler": ("scheduler.pt", None, "scheduler.pt is missing"),
    "no random state": ("rng_state.pth", None, "rng_state.pth is missing"),
    "no trainer state": ("trainer_state.json", None, "trainer_state.json is missing"),
    "no weights": ("model.safetensors", None, "model.safetensors is missing"),
    "optimizer cut short": ("optimizer.pt", 0.5, "optimizer.pt is damaged"),
    "optimizer empty": ("optimizer.pt", 0, "optimizer.pt is damaged"),
    "random state cut short": ("rng_state.pth", 0.9, "rng_state.pth is damaged"),
    "trainer state cut short": ("trainer_state.json", 0.5, "trainer_state.json is damaged"),
    "trainer state empty": ("trainer_state.json", 0, "trainer_state.json is damaged"),
    "weights cut short": ("model.safetensors", 0.99, "model.safetensors is damaged"),
    "weights empty": ("model.safetensors", 0, "model.safetensors is damaged"),
    "weights with a damaged header": ("model.safetensors", b"\xff" * 16, "model.safetensors is damaged"),
}


def damage(path: Path, how) -> None:
    if how is None:
        path.unlink()
    elif isinstance(how, bytes):
        path.write_bytes(how + path.read_bytes()[len(how) :])
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * how)])


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_known_as_such(case, copy):
    name, how, message = DAMAGES[case]
    assert newest_whole(copy) == (copy / "checkpoint-24", [])
    damage(copy / "checkpoint-24" / name, how)
    checkpoint, skipped = newest_whole(copy)
    assert checkpoint.name == "checkpoint-20"
    assert skipped == [f"checkpoint-24 cannot be used: {message}"]


KEPT_AFTER_EACH_SAVE = """
import safeguards, train_grpo
whole = safeguards._save_whole
def save(trainer, *args):
    whole(trainer, *args)
    folder = trainer.args.output_dir
    print("kept", [path.name for path in safeguards.checkpoints(folder) if safeguards.flaw(path) is None])
safeguards._save_whole = save
train_grpo.main()
"""


def test_auto_skips_a_damaged_checkpoint_aloud_and_harmless_settings_may_change(copy, undisturbed, policy, data):
    damage(copy / "checkpoint-24" / "optimizer.pt", None)
    (copy / "model.safetensors").unlink()
    changes = {
        "save_steps": 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "sample_every": 2,
        "eval_steps": 0,
        "gradient_checkpointing": "false",
    }
    words = flags(policy, data, copy, **{**LONG, **changes})
    done = start(KEPT_AFTER_EACH_SAVE, *words, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checkpoint-24 cannot be used: optimizer.pt is missing; taking checkpoint-20" in done.stdout
    assert "resuming after step 20" in done.stdout
    assert same_run(undisturbed, copy)
    assert "kept ['checkpoint-22']" in done.stdout, "a damaged one does not count as the one to keep"
    assert "kept ['checkpoint-24']" in done.stdout


def test_without_a_whole_checkpoint_nothing_starts(copy, policy, data, capsys):
    damage(copy / "checkpoint-24" / "optimizer.pt", 0)
    damage(copy / "checkpoint-20" / "trainer_state.json", None)
    words = flags(policy, data, copy, **LONG)
    error = refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])
    assert "no checkpoint in" in error
    assert "checkpoint-24 cannot be used: optimizer.pt is damaged" in error
    assert "checkpoint-20 cannot be used: trainer_state.json is missing" in error
    error = refused(capsys, 2, [*words, "--resume_from_checkpoint", copy / "checkpoint-24"])
    assert "optimizer.pt is damaged; `auto` takes the newest whole" in error


def test_a_finished_run_without_checkpoints_is_not_trained_again(copy, policy, data, capsys):
    (copy / "cold-start").mkdir()
    for path in checkpoints(copy):
        shutil.rmtree(path)
    words = flags(policy, data, copy, **LONG)
    assert "a finished run without checkpoints" in refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])


def test_going_on_from_an_older_checkpoint_never_overwrites_a_newer_one(copy, policy, data, capsys):
    words = flags(policy, data, copy, **LONG)
    assert "the newer checkpoint-24" in refused(capsys, 2, [*words, "--resume_from_checkpoint", copy / "checkpoint-20"])


KILLED_WHILE_SAVING = """
import os, signal, sys
import safeguards, train_grpo

whole = safeguards._save_whole

def names(folder):
    return [path.name for path in safeguards.checkpoints(folder) if safeguards.flaw(path) is None]

def save(trainer, *args):
    # from the second checkpoint on: children of this process are killed at their first, second, ... file operation
    before, moments = names(trainer.args.output_dir), 0
    while len(before) == 2:
        moments += 1
        child = os.fork()
        if child == 0:
            left = moments
            def count(event, details):
                nonlocal left
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count)
            whole(trainer, *args)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = names(trainer.args.output_dir)
        visible = [path.name for path in safeguards.checkpoints(trainer.args.output_dir)]
        print("moment", moments, ended, before, now, visible, flush=True)
        if ended == 0:
            sys.exit(0)
        assert before[-1] in now and visible == now, (before, now, visible)
    whole(trainer, *args)

safeguards._save_whole = save
train_grpo.main()
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint_and_no_partial_one(policy, data, tmp_path):
    done = start(KILLED_WHILE_SAVING, *flags(policy, data, tmp_path / "run", **{**LONG, "eval_steps": 0}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    moments = [line for line in done.stdout.splitlines() if line.startswith("moment ")]
    assert len(moments) > 15
    assert "['checkpoint-8', 'checkpoint-12']" in moments[-1]


# ---- resuming what is done or not the same


def test_a_finished_run_is_complete_and_stays_as_it_is(copy, policy, data, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    out = resumed_here(capsys, flags(policy, data, copy, **LONG))
    assert "already complete" in out
    assert "\nstep " not in out
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_run_that_died_after_its_last_step_is_finished(copy, undisturbed, policy, data, capsys):
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**run, "outcome": "running"}))
    damage(copy / "model.safetensors", 0.5)
    resumed_here(capsys, flags(policy, data, copy, **LONG))
    assert identical(weights(copy), weights(undisturbed))
    assert json.loads((copy / "run.json").read_text())["outcome"] == "finished"
    assert not (copy / "optimizer.pt").exists()


def test_settings_that_shape_the_trajectory_must_be_the_runs(copy, policy, data, capsys):
    changes = {"learning_rate": "2e-3", "max_steps": 48, "num_generations": 2, "seed": 1, "lr_scheduler_type": "linear"}
    error = refused(capsys, 2, [*flags(policy, data, copy, **{**LONG, **changes}), "--resume_from_checkpoint", "auto"])
    for line in (
        "learning_rate: 0.001 -> 0.002",
        "max_steps: 24 -> 48",
        "num_generations: 4 -> 2",
        "seed: 42 -> 1",
        "lr_scheduler_type: 'cosine' -> 'linear'",
        "--allow_changed_settings true",
    ):
        assert line in error
    assert "save_steps" not in error


def test_other_problems_are_not_the_same_run(copy, policy, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    words = flags(policy, tmp_path / "data", copy, **LONG)
    run = json.loads((copy / "run.json").read_text())
    run["settings"]["dataset_name"] = str(tmp_path / "data")
    (copy / "run.json").write_text(json.dumps(run))
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(a, 4) for a in range(32)])
    assert "other problems" in refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])


def test_changed_settings_are_taken_when_the_user_says_so(copy, policy, data, capsys):
    shutil.rmtree(copy / "checkpoint-24")
    changes = {**LONG, "max_steps": 26, "learning_rate": "1e-5", "allow_changed_settings": "true"}
    out = resumed_here(capsys, flags(policy, data, copy, **changes))
    assert "changed on resuming: max_steps: 24 -> 26" in out
    assert "changed on resuming: learning_rate: 0.001 -> 1e-05" in out
    assert "step 21/26" in out
    assert "step 20/26" not in out
    log = json.loads((copy / "trainer_state.json").read_text())["log_history"]
    rates = {row["step"]: row["learning_rate"] for row in log if "learning_rate" in row}
    assert rates[20] > 5e-5
    assert 0 < rates[21] < 1e-5, "the optimizer's own rate is not kept"


# ---- disk

WITH_A_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # bytes a file: the weights no longer fit
import train_grpo
train_grpo.main()
"""


def test_a_full_disk_while_saving_is_one_message_and_the_run_goes_on_later(copy, undisturbed, policy, data):
    (copy / "model.safetensors").unlink()
    shutil.rmtree(copy / "checkpoint-24")
    words = flags(policy, data, copy, **LONG)
    done = start(WITH_A_LIMIT, *words, "--resume_from_checkpoint", "auto")
    assert done.returncode == 1
    assert "saving checkpoint-24 failed: " in done.stderr
    assert "checkpoint-20 is the last whole checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in copy.iterdir() if "checkpoint" in path.name) == ["checkpoint-20"]
    assert not (copy / ".saving").exists()
    resumed(copy, words)
    assert same_run(undisturbed, copy)


def test_a_run_that_cannot_fit_on_the_disk_is_refused_before_training(policy, data, tmp_path):
    """On a file system of 2 MB: a policy of 0.4 MB with its AdamW states, three times."""
    script = 'mount -t tmpfs -o size=2m small "$1" && shift && exec "$@"'
    inside = [sys.executable, str(ROOT / "train_grpo.py"), *flags(policy, data, tmp_path / "run", **LONG)]
    (tmp_path / "run").mkdir()
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        words = [*unshare, "sh", "-c", script, "sh", str(tmp_path / "run")]
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no small file system can be mounted here")
    done = subprocess.run([*words, *inside], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "SAVE_TOTAL_LIMIT 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step " not in done.stdout


# ---- numbers


def pay(value: float, step: int):
    """A reward function that goes wrong in that step."""

    def mine_reward_func(completions, trainer_state, **kwargs):
        return [value if trainer_state.global_step == step - 1 else 0.0 for _ in completions]

    return mine_reward_func


def spoil(what: str, step: int):
    """`protect`, for a trainer whose gradient or loss goes wrong in that step."""

    def protect(trainer):
        if what == "gradient":
            weight = next(trainer.model.parameters())
            weight.register_hook(lambda grad: grad * (math.nan if trainer.state.global_step == step - 1 else 1))
        else:
            honest = trainer.compute_loss
            trainer.compute_loss = lambda *args, **kwargs: (
                honest(*args, **kwargs) + (math.inf if trainer.state.global_step == step - 1 else 0)
            )
        return safeguards.protect(trainer)

    return protect


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "step 6: mine_reward_func paid nan for completion 0 of 8 (8 such)"),
        (-math.inf, "step 6: mine_reward_func paid -inf"),
        ("gradient", "step 6: the gradient is nan"),
        ("loss", "step 6: the loss is inf"),
    ],
)
def test_a_number_that_is_none_ends_the_run_before_the_weights_change(
    value, message, policy, data, tmp_path, monkeypatch, capsys
):
    if isinstance(value, str):
        monkeypatch.setattr(train_grpo, "protect", spoil(value, step=6))
    else:
        monkeypatch.setattr(rewards, "REWARD_FUNCS", [*rewards.REWARD_FUNCS, pay(value, step=6)])
    run = tmp_path / "run"
    _, error = ended(capsys, 1, flags(policy, data, run, **{**LONG, "eval_steps": 0}))
    assert message in error
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run / "checkpoint-4").values())
    assert not (run / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text())["outcome"].startswith("failed")


def test_a_policy_that_blows_up_is_explained(policy, data, tmp_path, capsys):
    settings = {**LONG, "learning_rate": "1e30", "warmup_steps": "0", "save_steps": 1}
    _, error = ended(capsys, 1, flags(policy, data, tmp_path / "run", **settings))
    assert "Lower LEARNING_RATE" in error
    for path in checkpoints(tmp_path / "run"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(path).values())


def test_a_policy_with_a_weight_that_is_no_number_is_refused(policy, data, tmp_path, capsys):
    shutil.copytree(policy, tmp_path / "model")
    tensors = weights(policy)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, 1, flags(tmp_path / "model", data, tmp_path / "run", **LONG))
    assert "the policy to start from holds weights that are infinite or not a number" in error


def test_out_of_memory_names_what_to_lower_in_order_of_effect():
    _, config, _ = train_grpo.read_settings(["--use_cpu", "true", "--gradient_checkpointing", "false", "--beta", "0.1"])
    text = out_of_memory(memory_remedies(config), peak=39_500_000_000, total=42_300_000_000)
    assert "39.5 GB of 42.3 GB" in text
    order = [
        "GRADIENT_CHECKPOINTING = True",
        "PER_DEVICE_BATCH_SIZE 16 -> 8, with GRADIENT_ACCUMULATION_STEPS 4 -> 8",
        "MAX_COMPLETION_LENGTH below 512",
        "BETA = 0",
        "--use_peft true",
        "a smaller MODEL",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_out_of_memory_on_cuda_is_one_message():
    _, config, _ = train_grpo.read_settings([])
    with pytest.raises(RunStopped, match=r"CUDA is out of memory: .* in use at the peak"), faults_explained(config):
        torch.empty(10**15, device="cuda")


# ---- what must not run, or not twice


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_checkpoint_runs_no_code(name, copy, policy, data, tmp_path, capsys):
    shutil.rmtree(copy / "checkpoint-24")
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


def test_a_folder_that_cannot_be_written_to_is_said_first(policy, data, tmp_path, capsys):
    if os.geteuid():
        (tmp_path / "kept").mkdir(mode=0o555)
        error = refused(capsys, 2, flags(policy, data, tmp_path / "kept" / "run"))
    else:  # root may write everywhere but here
        error = refused(capsys, 1, flags(policy, data, "/proc/run"))
    assert "OUTPUT_DIR" in error
    assert "cannot be written to" in error


def test_a_gpu_without_bf16_is_said_before_the_model_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    error = refused(capsys, 2, ["--output_dir", tmp_path / "run", "--temperature", "0"])
    assert "Tesla T4 cannot compute in bf16: set --bf16 false --fp16 true" in error
    assert "TEMPERATURE" in error, "with all other problems"


@pytest.mark.parametrize(
    ("has_gpu", "installed", "obstacle"),
    [
        (False, "0.31.0", "there is no CUDA GPU"),
        (True, None, "vLLM is not installed"),
        (True, "0.33.0", "vLLM 0.33.0 is installed, which TRL does not support"),
        (True, "0.21.9", "vLLM 0.21.9 is installed, which TRL does not support"),
        (True, "0.31.0+cu129", None),
        (True, "0.22.0", None),
    ],
)
def test_the_plan_knows_why_vllm_cannot_generate(has_gpu, installed, obstacle, monkeypatch):
    def version(package):
        if installed is None:
            raise metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(metadata, "version", version)
    assert vllm_obstacle() == obstacle
    assert vllm_obstacle(use_cpu=True) is not None

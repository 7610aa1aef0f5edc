"""Checkpoints are whole or not there, and a run goes on only from its own: real files, a tiny policy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from conftest import (
    LONG,
    ROOT,
    flags,
    identical,
    launch,
    problem,
    refused,
    resumed,
    resumed_here,
    same_run,
    start,
    until,
    weights,
    write_jsonl,
)

import rewards
import train_grpo
from evaluate import check_weights
from support.checkpoints import checkpoints, newest_whole
from support.errors import BadInput

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


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # another finite number
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "checksums.txt"])
def test_a_flipped_bit_is_found_when_all_is_read(name, copy):
    assert newest_whole(copy, read_all=True) == (copy / "checkpoint-24", [])
    flip_a_bit(copy / "checkpoint-24" / name)
    checkpoint, (skipped,) = newest_whole(copy, read_all=True)
    assert checkpoint.name == "checkpoint-20"
    assert skipped.startswith("checkpoint-24 cannot be used: ")


def test_altered_weights_are_skipped_or_refused_and_without_checksums_taken_aloud(copy, policy, data, capsys):
    words = flags(policy, data, copy, **{**LONG, "max_steps": "20", "allow_changed_settings": "true"})
    flip_a_bit(copy / "checkpoint-24" / "model.safetensors")
    given = ["--resume_from_checkpoint", copy / "checkpoint-24"]
    assert "model.safetensors is not what was saved" in refused(capsys, 2, [*words, *given])
    out = resumed_here(capsys, words)
    assert "checkpoint-24 cannot be used: model.safetensors is not what was saved" in out
    assert "taking checkpoint-20" in out
    for checkpoint in checkpoints(copy):
        (checkpoint / "checksums.txt").unlink()
    assert "no checksums.txt" in resumed_here(capsys, words)


def test_evaluate_refuses_weights_that_are_not_what_was_saved(copy, capsys):
    check_weights(str(copy))
    assert capsys.readouterr().out == ""
    for folder in (copy, copy / "checkpoint-24"):
        flip_a_bit(folder / "model.safetensors")
        with pytest.raises(BadInput, match="is not what was saved"):
            check_weights(str(folder))
    (copy / "checksums.txt").unlink()
    check_weights(str(copy))
    assert "no checksums.txt" in capsys.readouterr().out


KEPT_AFTER_EACH_SAVE = """
import train_grpo
from support import checkpoints
whole = train_grpo.GRPOTrainer._save_checkpoint
def save(trainer, *args):
    whole(trainer, *args)
    folder = trainer.args.output_dir
    print("kept", [path.name for path in checkpoints.checkpoints(folder) if checkpoints.flaw(path) is None])
train_grpo.GRPOTrainer._save_checkpoint = save
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


@pytest.mark.parametrize("began", [None, "its own", "another's"])
def test_a_finished_run_without_checkpoints_is_not_trained_again(began, copy, policy, data, tmp_path, capsys):
    """Resumed on its way or not."""
    other = shutil.copytree(copy / "checkpoint-20", tmp_path / "other" / "checkpoint-20")
    run = json.loads((copy / "run.json").read_text())
    origin = {"its own": copy / "checkpoint-20", "another's": other}.get(began)
    run["settings"]["resume_from_checkpoint"] = origin and str(origin)
    (copy / "run.json").write_text(json.dumps(run))
    for path in checkpoints(copy):
        shutil.rmtree(path)
    before = weights(copy)
    assert "already complete, its checkpoints are gone" in resumed_here(capsys, flags(policy, data, copy, **LONG))
    assert identical(weights(copy), before)


def test_auto_leaves_alone_a_folder_with_something_else(policy, data, capsys, tmp_path):
    shutil.copytree(policy, tmp_path / "model")
    words = [*flags(policy, data, tmp_path / "model", **LONG), "--resume_from_checkpoint", "auto"]
    assert "already holds an earlier run (model.safetensors)" in refused(capsys, 2, words)


def test_a_run_killed_before_its_first_checkpoint_begins_anew_with_the_same_settings(copy, policy, data, capsys):
    for path in [*checkpoints(copy), *copy.glob("model*"), copy / "trainer_state.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**run, "outcome": "running"}))
    words = flags(policy, data, copy, **{**LONG, "learning_rate": "2e-3"})
    assert "learning_rate: 0.001 -> 0.002" in refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])


def test_a_run_that_began_with_anothers_checkpoint_does_not_begin_anew_without_it(copy, policy, data, tmp_path, capsys):
    """It is killed before its first save, and then told `auto`."""
    fork = tmp_path / "fork"
    words = flags(policy, data, fork, **{**LONG, "save_steps": "24"})
    process = launch("train_grpo.py", *words, "--resume_from_checkpoint", copy / "checkpoint-20")
    until(process, "step 21/24")
    process.kill()
    process.communicate()
    assert not checkpoints(fork)
    out = resumed_here(capsys, words)
    assert f"resuming from {copy / 'checkpoint-20'}, as it began" in out
    assert "resuming after step 20" in out
    assert identical(weights(copy), weights(fork))


def test_going_on_from_an_older_checkpoint_never_overwrites_a_newer_one(copy, policy, data, capsys):
    words = flags(policy, data, copy, **LONG)
    assert "the newer checkpoint-24" in refused(capsys, 2, [*words, "--resume_from_checkpoint", copy / "checkpoint-20"])


KILLED_WHILE_SAVING = """
import os, signal, sys
import train_grpo
from support import checkpoints

whole = train_grpo.GRPOTrainer._save_checkpoint

def names(folder):
    return [path.name for path in checkpoints.checkpoints(folder) if checkpoints.flaw(path) is None]

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
        visible = [path.name for path in checkpoints.checkpoints(trainer.args.output_dir)]
        print("moment", moments, ended, before, now, visible, flush=True)
        if ended == 0:
            sys.exit(0)
        assert before[-1] in now and visible == now, (before, now, visible)
    whole(trainer, *args)

train_grpo.GRPOTrainer._save_checkpoint = save
train_grpo.main()
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint_and_no_partial_one(policy, data, tmp_path):
    done = start(KILLED_WHILE_SAVING, *flags(policy, data, tmp_path / "run", **{**LONG, "eval_steps": 0}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    moments = [line for line in done.stdout.splitlines() if line.startswith("moment ")]
    assert len(moments) > 15
    assert "['checkpoint-8', 'checkpoint-12']" in moments[-1]


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


def test_a_run_from_before_steps_were_split_by_tokens_goes_on(trained, policy, data, tmp_path):
    """On the same problems; its completions came in several backward passes of TRL's a step."""
    run, before = tmp_path / "run", {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "2"}
    assert start("train_grpo.py", *flags(policy, data, run, **before)).returncode == 0
    shutil.rmtree(run / "checkpoint-4")
    saved = json.loads((run / "run.json").read_text())
    del saved["settings"]["tokens_per_pass"]
    saved["settings"]["fit_memory"] = True
    (run / "run.json").write_text(json.dumps({**saved, "outcome": "running"}))
    done = resumed(run, flags(policy, data, run))
    assert "per_device_train_batch_size: 4 -> 8, so that sums round otherwise" in done.stdout
    for step in (3, 4):
        tables = [
            pandas.read_parquet(of / "completions" / f"completions_{step:05d}.parquet") for of in (run, trained[0])
        ]
        assert tables[0]["prompt"].map(str).tolist() == tables[1]["prompt"].map(str).tolist()


def test_other_problems_are_not_the_same_run(copy, policy, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(copy / "checkpoint-24")
    words = flags(policy, tmp_path / "data", copy, **LONG)
    run = json.loads((copy / "run.json").read_text())
    run["settings"]["dataset_name"] = str(tmp_path / "data")
    (copy / "run.json").write_text(json.dumps(run))
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(a, 4) for a in range(32)])
    assert "other problems" in refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])


def test_a_run_keeps_its_code_and_an_edited_reward_is_a_changed_setting(
    copy, policy, data, tmp_path, monkeypatch, capsys
):
    for name in ("train_grpo.py", "rewards.py"):
        assert (copy / name).read_text() == (ROOT / name).read_text()
        (tmp_path / name).write_text((ROOT / name).read_text() + "# edited\n")
    shutil.rmtree(copy / "checkpoint-24")
    words = flags(policy, data, copy, **LONG)
    monkeypatch.setitem(vars(train_grpo), "__file__", str(tmp_path / "train_grpo.py"))
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "rewards.py"))
    error = refused(capsys, 2, [*words, "--resume_from_checkpoint", "auto"])
    assert "rewards.py: edited since the run began; the run's folder holds it as it was" in error
    assert "--allow_changed_settings true" in error
    out = resumed_here(capsys, [*words, "--allow_changed_settings", "true"])
    assert "changed on resuming: rewards.py: edited since the run began" in out
    assert "train_grpo.py: edited since the run began" in out
    assert (copy / "rewards.py").read_text().endswith("# edited\n")
    (before,) = copy.glob("rewards-*.py")
    assert before.read_text() == (ROOT / "rewards.py").read_text(), "nothing is overwritten"


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
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*words, *inside], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "SAVE_TOTAL_LIMIT 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step " not in done.stdout
    done = subprocess.run([*words, *inside, "--save_strategy", "no"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, "one checkpoint at most, where a signal comes: " + done.stderr

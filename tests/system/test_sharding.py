"""FSDP2 over two processes on the CPU, started by `accelerate launch` with the file that TRL brings along."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import trl
from conftest import cold_flags, distance, flags, identical, start, until, weights
from test_processes import finished, launch, log

import evaluate
from support.checkpoints import flaw, newest_whole

pytestmark = pytest.mark.slow

CONFIG = Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"
FSDP2 = ["--config_file", CONFIG, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
SHARDED = [*FSDP2, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"]
REHEARSED = {"script": "tests/system/fsdp_on_cpu.py train_grpo.py", "how": FSDP2}
SEVERAL_PASSES = {"per_device_train_batch_size": "16", "tokens_per_pass": "150", "seed": "3"}
LONG = {"max_steps": "400", "save_steps": "2", "eval_steps": "0", "sample_every": "0"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, policy, data) -> tuple[Path, list[str], str]:
    """A finished run, held-out accuracy every second step: its folder, its flags, and what it printed."""
    output = tmp_path_factory.mktemp("sharded") / "run"
    # several passes a process; with this seed one process has more to teach than the other in a step
    words = flags(policy, data, output, **SEVERAL_PASSES)
    status, out = finished(*words, **REHEARSED)
    assert status == 0, out[-4000:]
    return output, words, out


def test_a_sharded_run_leaves_an_ordinary_policy(whole, policy, capsys):
    run, _, out = whole
    assert (run / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "it was sharded"
    assert out.count("held out at step") == 3
    before, after = weights(policy), weights(run)
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    assert not identical(before, after)
    evaluate.main([str(run), "--limit", "2", "--use_cpu"])
    assert "strict accuracy" in capsys.readouterr().out


def test_a_sharded_run_resumes_to_the_same_weights(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    status, out = resumed_from_checkpoint_2(whole, run, REHEARSED)
    assert status == 0, out[-4000:]
    assert "resuming after step 2" in out
    assert identical(weights(run), weights(whole[0]))


def resumed_from_checkpoint_2(whole, run: Path, how: dict) -> tuple[int, str]:
    shutil.rmtree(run / "checkpoint-4")
    (run / "model.safetensors").unlink()
    return finished(*moved(whole, run), "--resume_from_checkpoint", "auto", **how)


def moved(whole, run: Path) -> list[str]:
    return [str(run) if word == str(whole[0]) else word for word in whole[1]]


def test_checkpoints_in_shards_do_not_change_the_run_and_resume_to_the_same_weights(whole, tmp_path):
    run, how = tmp_path / "run", {**REHEARSED, "how": SHARDED}
    status, out = finished(*moved(whole, run), **how)
    assert status == 0, out[-4000:]
    assert len(list((run / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2, "one of each process"
    assert identical(weights(run), weights(whole[0]))
    status, out = resumed_from_checkpoint_2(whole, run, how)
    assert status == 0, out[-4000:]
    assert "resuming after step 2" in out
    assert identical(weights(run), weights(whole[0]))


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_the_lean_step_of_a_sharded_policy_has_the_gradient_of_a_whole_one(recompute, policy, data, tmp_path):
    """With plain gradient descent at rate 1 the weights move by the gradient itself."""
    step = {"max_steps": "1", "save_steps": "1", "optim": "sgd", "learning_rate": "1", "warmup_steps": "0"}
    step |= {"max_grad_norm": "0", "weight_decay": "0", "eval_steps": "0", "gradient_checkpointing": recompute}
    plain = {"lean_step": "false", "tokens_per_pass": None}
    for name, changes, how in (("sharded", {}, REHEARSED), ("copied", plain, {})):
        words = flags(policy, data, tmp_path / name, **{**SEVERAL_PASSES, **step, **changes})
        status, out = finished(*words, **how)
        assert status == 0, out[-4000:]
    before, ours, theirs = (weights(folder) for folder in (policy, tmp_path / "sharded", tmp_path / "copied"))
    largest = max((theirs[name] - before[name]).abs().max().item() for name in before)
    assert largest > 1e-2
    assert max((ours[name] - theirs[name]).abs().max().item() for name in before) <= 1e-5 * largest
    assert log(tmp_path / "sharded")[0]["computed_tokens"] < 1
    assert log(tmp_path / "sharded")[0]["passes"] > 1


def test_a_sharded_cold_start_leaves_the_policy_of_a_whole_one(policy, data, tmp_path):
    words = {"examples": "8", "per_device_train_batch_size": "4", "num_train_epochs": "1"}
    sharded, one = tmp_path / "sharded", tmp_path / "one"
    how = {"script": "tests/system/fsdp_on_cpu.py cold_start.py", "how": SHARDED}
    status, out = finished(*cold_flags(policy, data, sharded, **words), **how)
    assert status == 0, out[-4000:]
    assert log(sharded)[-1]["step"] == 2
    done = start("cold_start.py", *cold_flags(policy, data, one, **words))
    assert done.returncode == 0, done.stderr[-4000:]
    before, sharded, one = map(weights, (policy, sharded, one))
    assert distance(sharded, one) <= 1e-4 * distance(before, one), "two steps of AdamW, but for rounding"


def test_a_sharded_run_saves_right_after_measuring(policy, data, tmp_path):
    """A forward pass without a backward pass, which evaluating is, leaves FSDP2's last layers whole."""
    run, few = tmp_path / "run", shutil.copytree(data, tmp_path / "data")
    rows = (few / "train.jsonl").read_text().splitlines()[:24]
    (few / "train.jsonl").write_text("\n".join(rows) + "\n")
    epoch = {"max_steps": "-1", "save_strategy": "epoch", "eval_steps": "3", "per_device_train_batch_size": "32"}
    status, out = finished(
        *flags(policy, few, run, **epoch, max_completion_length="40"), **{**REHEARSED, "how": SHARDED}
    )
    assert status == 0, out[-4000:]
    assert (run / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()
    assert "held out at step 3/3" in out
    assert flaw(run / "checkpoint-3") is None
    assert (run / "model.safetensors").is_file()


def test_an_adapter_is_trained_on_a_sharded_policy(policy, data, tmp_path, capsys):
    run = tmp_path / "run"
    words = flags(policy, data, run, use_peft="true", max_steps="2", **SEVERAL_PASSES)
    status, out = finished(*words, **REHEARSED)
    assert status == 0, out[-4000:]
    assert "held out at step 2/2" in out
    assert (run / "adapter_model.safetensors").is_file()
    evaluate.main([str(run), "--limit", "2", "--use_cpu"])
    assert "strict accuracy" in capsys.readouterr().out


def test_sigterm_saves_a_sharded_policy(policy, data, tmp_path):
    run = tmp_path / "run"
    process = launch(*flags(policy, data, run, **LONG), **REHEARSED)
    out = until(process, "step   1/400")
    process.send_signal(signal.SIGTERM)
    out += process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "SIGTERM: saved" in out, out[-4000:]
    assert "Resume with\n  accelerate launch --config_file YOURS --num_processes 2" in out
    assert flaw(newest_whole(run)[0]) is None
    assert json.loads((run / "run.json").read_text())["outcome"].startswith("stopped")


def test_a_process_that_dies_ends_a_sharded_run_with_a_whole_checkpoint(policy, data, tmp_path):
    import psutil

    run = tmp_path / "run"
    process = launch(*flags(policy, data, run, **LONG), **REHEARSED)
    out = until(process, "step   3/400")
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    out += process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "another process of this run has ended" in out, out[-4000:]
    assert newest_whole(run)[0] is not None
    assert not any(child.is_running() for child in children), "nobody is left behind"

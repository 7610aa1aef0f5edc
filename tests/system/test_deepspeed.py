"""DeepSpeed's ZeRO over two processes on the CPU, started by `accelerate launch` with the files that TRL brings along.
Skipped where DeepSpeed is not installed."""

import importlib.util
import shutil
import signal
from pathlib import Path

import pytest
import trl
from conftest import cold_flags, distance, flags, identical, until, weights
from test_processes import finished, launch, log

import evaluate
from support.checkpoints import newest_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deepspeed,
    pytest.mark.xdist_group("deepspeed"),  # it compiles a part of itself, into one folder
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
CONFIGS = Path(trl.__file__).parent / "accelerate_configs"
PROCESSES = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]


def rehearsed(stage: str, command: str = "train_grpo.py") -> dict:
    how = ["--config_file", CONFIGS / f"{stage}.yaml", *PROCESSES]
    return {"script": f"tests/system/deepspeed_on_cpu.py {command}", "how": how}


def words(policy, data, output, **changes) -> list[str]:
    steps = {"per_device_train_batch_size": "16", "tokens_per_pass": "150", "seed": "3"}
    steps["gradient_checkpointing"] = "false"
    return flags(policy, data, output, **{**steps, **changes})


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def whole(request, tmp_path_factory, policy, data) -> tuple[str, Path]:
    """The stage, and the folder of a finished run with held-out accuracy every second step."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    status, out = finished(*words(policy, data, output, use_cpu=None), **rehearsed(request.param))
    assert status == 0, out[-4000:]
    assert out.count("held out at step") == 3
    return request.param, output


def test_zero_leaves_an_ordinary_policy_with_the_weights_of_whole_copies(whole, policy, data, tmp_path, capsys):
    """Two plain processes, each with all of the policy, sample the same completions."""
    _, run = whole
    assert list((run / "checkpoint-2").glob("global_step2/*optim_states.pt")), "it was sharded"
    status, out = finished(*words(policy, data, tmp_path / "copies"))
    assert status == 0, out[-4000:]
    before, sharded, copies = weights(policy), weights(run), weights(tmp_path / "copies")
    assert distance(sharded, copies) <= 1e-3 * distance(before, copies), "four steps of AdamW, but for rounding"
    assert all(row["computed_tokens"] < 1 for row in log(run) if "reward" in row)
    evaluate.main([str(run), "--limit", "2", "--use_cpu"])
    assert "strict accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_grpo_starts_from_what_a_cold_start_with_zero_left(stage, policy, data, tmp_path):
    cold = {"examples": "8", "per_device_train_batch_size": "4", "num_train_epochs": "1", "use_cpu": None}
    status, out = finished(*cold_flags(policy, data, tmp_path / "cold", **cold), **rehearsed(stage, "cold_start.py"))
    assert status == 0, out[-4000:]
    changes = {"max_steps": "1", "max_completion_length": "40", "use_cpu": None}
    status, out = finished(*words(tmp_path / "cold", data, tmp_path / "run", **changes), **rehearsed(stage))
    assert status == 0, out[-4000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_with_zero_3_a_policy_is_no_source_of_its_own_cold_start(policy, data, tmp_path):
    cold = {"examples": "8", "source": "self", "use_cpu": None}
    status, out = finished(*cold_flags(policy, data, tmp_path / "run", **cold), **rehearsed("zero3", "cold_start.py"))
    assert status == 1
    assert "SOURCE = 'self' with ZeRO-3" in out, out[-4000:]


def test_zero_stops_at_sigterm_and_goes_on_to_the_same_weights(whole, policy, data, tmp_path):
    stage, run = whole
    again = [*words(policy, data, tmp_path / "run", use_cpu=None), "--resume_from_checkpoint", "auto"]
    process = launch(*again, **rehearsed(stage))
    try:
        out = until(process, "step 1/4")
        process.send_signal(signal.SIGTERM)
        out += process.communicate(timeout=120)[0]
    finally:
        process.terminate()
    assert "SIGTERM: saved" in out, out[-4000:]
    assert newest_whole(tmp_path / "run")[0].name in ("checkpoint-1", "checkpoint-2", "checkpoint-3")
    status, out = finished(*again, **rehearsed(stage))
    assert status == 0, out[-4000:]
    assert "resuming after step" in out
    assert identical(weights(tmp_path / "run"), weights(run))


def test_zero_resumes_past_a_checkpoint_whose_shard_is_gone(whole, policy, data, tmp_path):
    stage, finished_run = whole
    run = shutil.copytree(finished_run, tmp_path / "run")
    next((run / "checkpoint-4").glob("global_step4/*optim_states.pt")).unlink()
    (run / "model.safetensors").unlink()
    again = words(policy, data, run, use_cpu=None)
    status, out = finished(*again, "--resume_from_checkpoint", "auto", **rehearsed(stage))
    assert status == 0, out[-4000:]
    assert "resuming after step 2" in out
    assert identical(weights(run), weights(finished_run))

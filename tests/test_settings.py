"""A constant is its flag in capitals, overridden by a --config file, overridden by the command line."""

import pytest
from conftest import refused, settings

import cold_start
import evaluate
import train_grpo
from support.settings import read_settings


def test_constants_are_what_the_trainer_gets(policy, tmp_path):
    """Each constant under its flag: one that is logged but not used is the bug to fear."""
    got = vars(settings("--model_name_or_path", policy, "--output_dir", tmp_path))
    constants = {name: value for name, value in vars(train_grpo).items() if name.isupper()}
    assert len(constants) > 40
    for name, value in constants.items():
        if value is not None and name not in ("OUTPUT_DIR", "MODEL_NAME_OR_PATH"):
            assert got[name.lower()] in (value, *(value if isinstance(value, list) else [])), name
    assert got["generation_batch_size"] == 64, "one generation of all 64 completions a step"
    assert got["use_vllm"] is False
    assert got["model_init_kwargs"]["use_safetensors"] is True


def test_a_new_constant_becomes_its_flags_default(policy, tmp_path):
    constants = {**vars(train_grpo), "LOSS_TYPE": "dr_grpo", "MODEL_NAME_OR_PATH": str(policy)}
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert read_settings(constants, words).loss_type == "dr_grpo"
    assert read_settings(constants, [*words, "--loss_type", "bnpo"]).loss_type == "bnpo"
    assert settings("--model_name_or_path", policy, "--output_dir", tmp_path).loss_type == "dapo", "TRL's default"


def test_a_constant_that_is_no_flag_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as exit:
        read_settings({**vars(train_grpo), "LEARNING_RTE": 1e-6}, ["--use_cpu", "true"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "the constant LEARNING_RTE is no flag" in error
    assert "try --learning_rate" in error


def test_a_constant_that_is_deleted_leaves_trls_default(policy, tmp_path):
    constants = {name: value for name, value in vars(train_grpo).items() if name not in ("LEARNING_RATE", "DTYPE")}
    run = read_settings(
        constants, ["--use_cpu", "true", "--model_name_or_path", str(policy), "--output_dir", str(tmp_path)]
    )
    assert run.learning_rate == 1e-6
    assert run.dtype == "float32"


def test_lora_trains_all_linear_layers_at_ten_times_the_rate_unless_one_is_given(policy, tmp_path):
    words = ["--model_name_or_path", policy, "--output_dir", tmp_path / "run", "--use_peft", "true"]
    run = settings(*words)
    assert run.learning_rate == 10 * train_grpo.LEARNING_RATE
    assert run.lora_target_modules == "all-linear"
    assert (run.lora_r, run.lora_dropout) == (32, 0.0)
    assert settings(*words, "--learning_rate", "1e-6").learning_rate == 1e-6
    assert settings(*words, "--lora_learning_rate_factor", "3").learning_rate == 3 * train_grpo.LEARNING_RATE
    (tmp_path / "rate.yaml").write_text("learning_rate: 2e-6\n")
    assert settings(*words, "--config", tmp_path / "rate.yaml").learning_rate == 2e-6


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM could generate here."""
    for module in ("support.settings", "support.preflight"):
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
    words, uses_it, length, with_vllm, policy, tmp_path
):
    config = settings("--model_name_or_path", policy, "--output_dir", tmp_path, *words)
    assert (config.use_vllm, config.vllm_max_model_length) == (uses_it, length)
    assert config.vllm_gpu_memory_utilization == train_grpo.VLLM_GPU_MEMORY_UTILIZATION
    assert config.vllm_enable_sleep_mode == train_grpo.VLLM_ENABLE_SLEEP_MODE


def test_a_server_that_is_not_asked_is_a_mistake(with_vllm, tmp_path, capsys):
    words = ["--use_cpu", "true", "--output_dir", tmp_path / "run"]
    assert "no effect with USE_VLLM = False" in refused(
        capsys, 2, [*words, "--vllm_mode", "server", "--use_vllm", "false"]
    )
    assert "without --vllm_mode server" in refused(capsys, 2, [*words, "--vllm_server_host", "10.0.0.2"])


def test_a_config_file_overrides_constants_and_flags_override_it(policy, tmp_path):
    config = tmp_path / "sweep.yaml"
    config.write_text("learning_rate: 3e-6\ntemperature: 0.7\nuse_cpu: true\n")
    args = settings(
        "--model_name_or_path", policy, "--config", config, "--temperature", "0.8", "--output_dir", tmp_path / "run"
    )
    assert (args.learning_rate, args.temperature) == (3e-6, 0.8)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("reward_weights: [1, 1, 1, 1, 2]", "reward_weights", [1, 1, 1, 1, 2]),
        ("reward_weights: [1e-1, 2e+1]", "reward_weights", [0.1, 20]),  # which YAML 1.1 reads as text
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}", "lr_scheduler_kwargs", 1e-7),
        ("lora_target_modules: all-linear", "lora_target_modules", "all-linear"),  # the default, which needs no LoRA
        ("use_peft: true\nlora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("chat_template_kwargs: {enable_thinking: false}", "chat_template_kwargs", {"enable_thinking": False}),
        ("run_name: 1e5", "run_name", "1e5"),
        ("scale_rewards: false", "scale_rewards", "none"),
        ("scale_rewards: batch", "scale_rewards", "batch"),
    ],
)
def test_a_config_files_value_is_what_its_flag_would_be(text, name, value, policy, tmp_path):
    (tmp_path / "sweep.yaml").write_text(text + "\n")
    got = settings(
        "--model_name_or_path", policy, "--output_dir", tmp_path / "run", "--config", tmp_path / "sweep.yaml"
    )
    assert getattr(got, name) == ({"min_lr": value} if name == "lr_scheduler_kwargs" else value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--scale_rewards", "False"], "scale_rewards", "none"),
        (["--scale_rewards", "true"], "scale_rewards", "group"),
        (["--max_grad_norm", "0"], "max_grad_norm", 0),
        (["--top_k", "0"], "top_k", 0),
        (["--chat_template_kwargs", '{"enable_thinking": false}'], "chat_template_kwargs", {"enable_thinking": False}),
        (["--loss_type", "vespo"], "loss_type", "vespo"),
        (["--optim", "adafactor"], "optim", "adafactor"),
    ],
)
def test_what_is_right_is_taken(words, name, value, policy, tmp_path):
    assert getattr(settings("--model_name_or_path", policy, "--output_dir", tmp_path, *words), name) == value


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--use_vllm", "False"], "use_vllm", False),
        (["--use_vllm", "true"], "use_vllm", True),
        (["--one_shot", "True"], "one_shot", True),
        (["--chat_template_kwargs", '{"enable_thinking": false}'], "chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_evaluate_takes_what_the_trainings_take(words, name, value, tmp_path):
    assert getattr(evaluate.read_task([str(tmp_path), *words]), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_vllm", "maybe"], "argument --use_vllm: Truthy value expected"),
        (["--chat_template_kwargs", "{'a': False}"], "argument --chat_template_kwargs: invalid json_object value"),
        (["--chat_template_kwargs", "5"], "argument --chat_template_kwargs: invalid json_object value"),
        (["--max_prompt_length", "256"], "try without it: prompts of any length are answered"),
        (["--max_new_tokens", "9"], "'--max_new_tokens'; try --max_completion_length"),
        (["--dataset_nam", "x"], "'--dataset_nam'; try --dataset_name"),
    ],
)
def test_evaluate_names_the_flag_that_was_meant(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.read_task([str(tmp_path), *words])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cold_start_is_told_of_its_settings_too(tmp_path, capsys):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--optim", "adamw_8bit", "--adam_beta2", "1"]
    with pytest.raises(SystemExit) as exit:
        cold_start.main([*words, "--example", "8", "--loss_type", "nll", "--remove_unused_columns", "true"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    for message in ("install `bitsandbytes`", "ADAM_BETA2 is 1.0", "'--example'; try --examples"):
        assert message in error
    assert "LOSS_TYPE" not in error, "nll is one of SFT's"
    assert "--remove_unused_columns" not in error


def test_help_lists_the_recipes_and_trls_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--reuse_shown", "--max_prompt_length", "--num_generations", "--lora_r", "--report_to"):
        assert flag in text

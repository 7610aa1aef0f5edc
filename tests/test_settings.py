"""A constant is its flag in capitals, overridden by a --config file, overridden by the command line."""

import re

import pytest
from conftest import ROOT, refused, settings

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
    assert "the constant LEARNING_RTE is no flag" in capsys.readouterr().err


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


def test_help_lists_the_recipes_and_trls_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--reuse_shown", "--max_prompt_length", "--num_generations", "--lora_r", "--report_to"):
        assert flag in text


def test_every_constant_is_explained_in_the_docs():
    page = (ROOT / "docs" / "settings.md").read_text()
    source = (ROOT / "train_grpo.py").read_text()
    for name, value in re.findall(r"^([A-Z][A-Z0-9_]+) = (.*?)(?:  #.*)?$", source, re.MULTILINE):
        assert f"| `{name}` | `{value}` |" in page, f"{name} = {value}"

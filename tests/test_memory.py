"""The arithmetic of GPU memory, by hand for Qwen2.5-1.5B, and what is chosen by it."""

import conftest
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from benchmarks.gpu_memory import shaped
from support import memory
from support.errors import RunStopped
from support.memory import check, fit, gpu_memory, held, needed, peak

PARAMETERS = 1_543_714_304
LINEAR = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)  # weights of the layers' linear modules


@pytest.fixture
def model():
    return shaped("1.5B")


def settings(tmp_path, *words: str):
    """Those of the default run, before anything is chosen by memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "settle", lambda settings: None)
        return conftest.settings("--output_dir", tmp_path, *words)


def computed(model, tmp_path, *words: str, quantized: bool = False) -> dict:
    words = ("--gradient_checkpointing", "true", *words)
    return gpu_memory(model, settings(tmp_path, *words), quantized)


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter(model, tmp_path):
    parts = computed(model, tmp_path)
    assert parts["weights"] == parts["gradients"] == 4 * PARAMETERS
    assert parts["optimizer"] == 8 * PARAMETERS
    assert parts["casts"] == 2 * LINEAR
    assert parts["reference"] == 0
    # 64 completions x (256 + 512) tokens x 28 layers x keys and values x 2 heads of 128 x 2 bytes
    assert parts["cache"] == 64 * 768 * 28 * 2 * 256 * 2
    assert held(parts) == 16 * PARAMETERS
    assert 30e9 < peak(parts) < 32e9, "the README's 31 GB"


def test_another_optimizers_states_are_no_reason_to_refuse(model, tmp_path, capsys):
    """Those in 8 bits, or without moments, are less than AdamW's by an amount that is not known here."""
    with pytest.raises(RunStopped):
        check(model, settings(tmp_path), total=24e9)
    check(model, settings(tmp_path, "--optim", "adafactor"), total=24e9)
    assert "WARNING: the run may need" in capsys.readouterr().out


def test_each_process_has_the_keys_and_values_of_its_own_completions(model, tmp_path):
    run = settings(tmp_path)
    alone = gpu_memory(model, run)["cache"]
    run.generation_batch_size *= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run), "world_size", 8)
        assert gpu_memory(model, run)["cache"] == alone


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_other_architectures_have_a_need_too(kind, tmp_path):
    """GPT-2's config has no size of the MLP, and Gemma 3's keeps the text model's sizes a level below."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    if kind == "gemma3":
        config = AutoConfig.for_model(kind, text_config={**small, "intermediate_size": 64}, vision_config={})
    else:
        config = AutoConfig.for_model(kind, vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    parts = memory._activations(config, settings(tmp_path)), memory._cache(config, settings(tmp_path))
    assert parts[1] == 64 * 768 * 2 * 2 * (64 if kind == "gemma3" else 32) * 2
    assert parts[0] > 0


def test_a_reference_model_costs_its_weights(model, tmp_path):
    assert computed(model, tmp_path, "--beta", "0.04")["reference"] == 4 * PARAMETERS


def test_gradient_checkpointing_keeps_one_layer_and_what_is_between_them(model, tmp_path):
    kept = computed(model, tmp_path)["activations"]
    everything = computed(model, tmp_path, "--gradient_checkpointing", "false")["activations"]
    tokens = 16 * 768
    assert kept == pytest.approx(tokens * (28 * 4 * 1536) + (everything / 28 - tokens * 4 * 1536))
    assert computed(model, tmp_path, "--per_device_train_batch_size", "32")["activations"] == 2 * kept


def test_lora_holds_gradients_and_moments_of_the_adapter_alone(model, tmp_path):
    model = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    sides = 2 * (1536 + 1536) + 2 * (1536 + 256) + 2 * (1536 + 8960) + (8960 + 1536)
    adapter = 28 * 32 * sides
    parts = computed(model, tmp_path, "--use_peft", "true", "--beta", "0.04")
    assert parts["gradients"] == 4 * adapter
    assert parts["optimizer"] == 8 * adapter
    assert parts["weights"] == 4 * (PARAMETERS + adapter)
    assert parts["reference"] == 0, "the model without its adapter"


def test_four_bit_weights_take_half_a_byte_and_their_scales(model, tmp_path):
    model = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    full, quantized = (computed(model, tmp_path, "--use_peft", "true", quantized=flag) for flag in (False, True))
    assert full["weights"] - quantized["weights"] == pytest.approx(LINEAR * (4 - 0.5625))
    assert quantized["casts"] == 0


@pytest.mark.parametrize(("total", "outcome"), [(20e9, "refused"), (28e9, "warned"), (40e9, "fine")])
def test_what_cannot_fit_is_refused_and_what_may_not_is_warned_of(total, outcome, model, tmp_path, capsys):
    config = settings(tmp_path, "--gradient_checkpointing", "true")
    if outcome == "refused":
        with pytest.raises(RunStopped, match=r"need 24.7 GB, and the GPU has 20.0 GB(.|\n)*--use_peft true"):
            check(model, config, int(total))
    else:
        check(model, config, int(total))
        assert ("WARNING: the run may need 31.0 GB" in capsys.readouterr().out) == (outcome == "warned")


def fitted(model, tmp_path, gigabytes: float, *words: str, smaller: bool = True) -> tuple:
    config = settings(tmp_path, *words, "--fit_memory", str(smaller).lower())
    fit(model, config, int(gigabytes * 1e9))
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64, "a step stays a step"
    assert config.per_device_train_batch_size * config.steps_per_generation == config.generation_batch_size
    return config.per_device_train_batch_size, config.gradient_checkpointing


@pytest.mark.parametrize(
    ("gigabytes", "words", "chosen", "reason"),
    [
        (143, (), (16, False), "an H200 recomputes nothing"),
        (80, (), (8, False), "smaller passes cost less than recomputation"),
        (40, (), (16, True), "passes under 2,048 tokens cost more"),
        (33, (), (8, True), "both"),
        (24, (), (16, True), "smaller passes are no cure, and the check before training says so"),
        (80, ("--gradient_checkpointing", "true"), (16, True), "the user's choice"),
        (80, ("--max_completion_length", "32"), (16, False), "short completions"),
    ],
)
def test_passes_and_checkpointing_follow_from_memory(gigabytes, words, chosen, reason, model, tmp_path):
    assert fitted(model, tmp_path, gigabytes, *words) == chosen, reason


def test_passes_stay_as_they_are_where_the_user_insists(model, tmp_path):
    assert fitted(model, tmp_path, 33, smaller=False) == (16, True)


def test_vllms_share_counts_through_the_update_unless_it_sleeps(model, tmp_path):
    config = settings(tmp_path, "--gradient_checkpointing", "true")
    config.use_vllm, config.vllm_gpu_memory_utilization = True, 0.3
    parts, total = gpu_memory(model, config), int(80e9)
    update = parts["casts"] + parts["activations"]
    assert parts["cache"] == 0, "vLLM's own, within its share"
    assert needed(parts, config, total) == held(parts) + update + int(24e9)
    config.vllm_enable_sleep_mode = True
    assert needed(parts, config, total) == held(parts) + int(24e9), "more than the update"
    config.vllm_mode = "server"
    assert needed(parts, config, total) == peak(parts)

"""The arithmetic of GPU memory, by hand for Qwen2.5-1.5B, and what is chosen by it."""

import json
import shutil

import conftest
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from benchmarks.gpu_memory import shaped
from support import memory
from support.errors import RunStopped
from support.memory import check, fit, gpu_memory, longest
from support.settings import Settings

PARAMETERS = 1_543_714_304
LINEAR = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)  # weights of the layers' linear modules


@pytest.fixture
def model():
    return shaped("1.5B")


def settings(tmp_path, *words: str):
    """Those of the default run, before anything is chosen by memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "choose_by_memory", lambda settings: "")
        return conftest.settings("--output_dir", tmp_path, *words)


def computed(model, tmp_path, *words: str, in_4bit: bool = False) -> dict:
    run = settings(tmp_path, "--gradient_checkpointing", "true", "--tokens_per_pass", "12288", *words)
    run.load_in_4bit = in_4bit  # the flag asks for bitsandbytes
    return gpu_memory(model, run)


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter(model, tmp_path):
    parts = computed(model, tmp_path)
    assert parts["weights"] == parts["gradients"] == 4 * PARAMETERS
    assert parts["optimizer"] == 8 * PARAMETERS
    assert parts["casts"] == 2 * LINEAR
    assert parts["reference"] == 0
    assert parts["held"] == 16 * PARAMETERS
    assert 31e9 < parts["most"] < 32e9, "the README's 31 GB"


def test_another_optimizers_states_are_no_reason_to_refuse(model, tmp_path):
    """Those in 8 bits, or without moments, are less than AdamW's by an amount that is not known here."""
    with pytest.raises(RunStopped):
        check(model, settings(tmp_path, "--tokens_per_pass", "4096"), total=24e9)
    words = check(model, settings(tmp_path, "--optim", "adafactor", "--tokens_per_pass", "4096"), total=24e9)
    assert "MAY NOT FIT" in words


def test_several_processes_sum_their_gradients_in_a_copy(model, tmp_path, monkeypatch):
    run = settings(tmp_path)
    monkeypatch.setattr(type(run), "world_size", 8)
    assert gpu_memory(model, run)["gradients"] == 8 * PARAMETERS


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_other_architectures_have_a_need_too(kind, tmp_path):
    """GPT-2's config has no size of the MLP, and Gemma 3's keeps the text model's sizes a level below."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    if kind == "gemma3":
        config = AutoConfig.for_model(kind, text_config={**small, "intermediate_size": 64}, vision_config={})
    else:
        config = AutoConfig.for_model(kind, vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    model = torch.nn.Module()
    model.config = config
    assert gpu_memory(model, settings(tmp_path))["activations"] > 0


def test_a_reference_model_costs_its_weights(model, tmp_path):
    assert computed(model, tmp_path, "--beta", "0.04")["reference"] == 4 * PARAMETERS


def test_gradient_checkpointing_keeps_one_layer_and_what_is_between_them(model, tmp_path):
    kept = computed(model, tmp_path)["activations"]
    everything = computed(model, tmp_path, "--gradient_checkpointing", "false")["activations"]
    between = 1.15 * 12288 * 4 * 1536
    assert kept == pytest.approx(28 * between + (everything / 28 - between))
    assert computed(model, tmp_path, "--tokens_per_pass", "6144")["activations"] == pytest.approx(kept / 2)


def test_a_pass_takes_what_it_was_seen_to_take(model, tmp_path):
    """1.5B on an H200, fp32 weights, bf16 compute, no recomputation: 56.0 GB in a pass of 6,688 tokens."""
    run = settings(tmp_path, "--gradient_checkpointing", "false", "--tokens_per_pass", "6688", "--bf16", "true")
    assert gpu_memory(model, run)["most"] == pytest.approx(56.0e9, rel=0.01)


def test_the_largest_pass_is_no_larger_than_a_step_and_no_smaller_than_a_row(model, tmp_path):
    def activations(*words):
        return computed(model, tmp_path, *words)["activations"]

    row = activations("--tokens_per_pass", "768")
    assert activations("--tokens_per_pass", "1") == row
    assert activations("--tokens_per_pass", "1000000") == pytest.approx(64 * row)
    trls = gpu_memory(model, settings(tmp_path, "--lean_step", "false", "--gradient_checkpointing", "true"))
    assert trls["activations"] == pytest.approx(64 * row), "TRL computes all of them at once"


def test_an_adapter_that_is_trained_further_has_its_own_size(policy, data, tmp_path):
    LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path=str(policy)).save_pretrained(tmp_path / "lora")
    words = conftest.flags(tmp_path / "lora", data, tmp_path / "run", adapter="train")
    shapes = memory._on_meta_device(conftest.settings(*words))
    assert sum(p.numel() for p in shapes.parameters() if p.requires_grad) == 2 * 3 * (64 + 64)
    assert {p.device.type for p in shapes.parameters()} == {"meta"}


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
    full, quantized = (computed(model, tmp_path, "--use_peft", "true", in_4bit=flag) for flag in (False, True))
    assert full["weights"] - quantized["weights"] == pytest.approx(LINEAR * (4 - 0.5625))
    assert quantized["casts"] == 0


def test_four_bit_weights_count_alike_before_and_after_they_are_packed(tmp_path):
    """bitsandbytes keeps a frozen matrix as bytes that hold two weights each."""
    run, whole, packed = settings(tmp_path), torch.nn.Module(), torch.nn.Module()
    run.load_in_4bit = True
    for model, shape, dtype in ((whole, (64, 32), torch.float32), (packed, (64 * 32 // 2, 1), torch.uint8)):
        model.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        model.config = AutoConfig.for_model("gpt2")
    assert gpu_memory(whole, run)["weights"] == gpu_memory(packed, run)["weights"] == 64 * 32 * 0.5625


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_weights_are_of_the_type_that_they_are_loaded_in(dtype, width, policy, tmp_path, monkeypatch):
    """`auto` is the type that the model's folder names."""
    shutil.copy(policy / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(memory, "device_memory", lambda device: int(80e9))
    checked = []
    monkeypatch.setattr(
        memory, "check", lambda model, *_: checked.append({p.element_size() for p in model.parameters()})
    )
    run = settings(tmp_path / "run", "--dtype", dtype)
    run.model_name_or_path = str(tmp_path)
    monkeypatch.setattr(Settings, "device", torch.device("cuda"))
    memory.choose_by_memory(run)
    assert checked == [{width}]


@pytest.mark.parametrize(("total", "outcome"), [(20e9, "refused"), (28e9, "warned"), (40e9, "fine")])
def test_what_cannot_fit_is_refused_and_what_may_not_is_warned_of(total, outcome, model, tmp_path):
    config = settings(tmp_path, "--gradient_checkpointing", "true", "--tokens_per_pass", "12288")
    if outcome == "refused":
        with pytest.raises(RunStopped, match=r"need 24.7 GB, and the GPU has 20.0 GB(.|\n)*--use_peft true"):
            check(model, config, int(total))
    else:
        words = check(model, config, int(total))
        assert words.startswith(f"needs at most about 31.5 GB of {total / 1e9:.1f} GB (computed)")
        assert ("MAY NOT FIT: try TOKENS_PER_PASS below 12,288" in words) == (outcome == "warned")


def fitted(model, tmp_path, gigabytes: float, *words: str, vllm: float = 0) -> tuple[int, bool]:
    config = settings(tmp_path, *words)
    config.use_vllm, config.vllm_gpu_memory_utilization = vllm > 0, vllm
    fit(model, config, int(gigabytes * 1e9))
    most = gpu_memory(model, config, int(gigabytes * 1e9))["most"]
    assert config.tokens_per_pass == longest(config) or most <= 0.9 * gigabytes * 1e9, "what is chosen fits"
    return config.tokens_per_pass, config.gradient_checkpointing


# 1.5B holds 24.7 GB and 3.1 GB of bf16 copies; a token takes 4.24 MB, recomputed 0.35 MB; 5,986 keep a GPU busy
@pytest.mark.parametrize(
    ("gigabytes", "words", "vllm", "chosen", "reason"),
    [
        (150, (), 0.3, (5_986, False), "an H200 with vLLM"),
        (80, (), 0, (5_986, False), "an H100"),
        (80, (), 0.3, (4_500, False), "an H100 with vLLM, where no more fit"),
        (42, (), 0, (2_230, False), "just enough to keep what is computed"),
        (40, (), 0, (5_986, True), "fewer than 2,048 tokens fit"),
        (30, (), 0, (768, True), "a row is never split; the check before training says so"),
        (40, ("--gradient_checkpointing", "false"), 0, (1_800, False), "the user's choice"),
        (32, ("--gradient_checkpointing", "true"), 0, (1_400, True), "the user's choice, with little room"),
        (80, ("--tokens_per_pass", "4000"), 0, (4_000, False), "the user's choice, and it fits"),
        (80, ("--tokens_per_pass", "20000"), 0, (20_000, True), "the user's choice does not fit otherwise"),
        (45, ("--max_completion_length", "5000"), 0, (5_986, True), "a row is longer than what fits otherwise"),
        (41, ("--per_device_train_batch_size", "2", "--num_generations", "2"), 0, (2_000, False), "a small step"),
    ],
)
def test_passes_and_checkpointing_follow_from_memory(gigabytes, words, vllm, chosen, reason, model, tmp_path):
    tokens, recomputes = fitted(model, tmp_path, gigabytes, *words, vllm=vllm)
    assert (pytest.approx(tokens, rel=0.05), recomputes) == chosen, reason


@pytest.mark.parametrize("words", [("--entropy_coef", "0.1"), ("--lean_step", "false")])
def test_a_step_that_cannot_be_split_recomputes_where_all_of_it_does_not_fit(words, model, tmp_path):
    """64 rows of 768 tokens need 208 GB."""
    config = settings(tmp_path, *words)
    fit(model, config, int(150e9))
    assert config.gradient_checkpointing
    fit(model, config := settings(tmp_path, *words), int(300e9))
    assert not config.gradient_checkpointing


def test_on_a_cpu_memory_chooses_nothing(tmp_path):
    """Else the same command would round otherwise on another machine."""
    run = conftest.settings("--model_name_or_path", tmp_path, "--output_dir", tmp_path / "run")
    assert memory.choose_by_memory(run) == ""
    assert (run.tokens_per_pass, run.gradient_checkpointing) == (4096, False)


def test_vllms_share_counts_through_the_update_unless_it_sleeps(model, tmp_path):
    config = settings(tmp_path, "--gradient_checkpointing", "true", "--tokens_per_pass", "12288")
    config.use_vllm, config.vllm_gpu_memory_utilization = True, 0.3
    total = int(80e9)
    parts = gpu_memory(model, config, total)
    update = parts["casts"] + parts["activations"]
    assert parts["most"] == parts["held"] + update + int(24e9)
    config.vllm_enable_sleep_mode = True
    assert gpu_memory(model, config, total)["most"] == parts["held"] + int(24e9), "more than the update"
    config.vllm_mode = "server"
    assert gpu_memory(model, config, total)["most"] == parts["held"] + update

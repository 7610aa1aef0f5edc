"""GPU memory that a run needs, computed from the policy and the settings before anything is trained.

State is exact: bytes of weights, gradients, AdamW's moments. Activations follow from the shapes of what autograd keeps
in a Llama-like layer under autocast (Qwen2, Qwen3, Llama, SmolLM2); other architectures are estimated as if they were
one. Not counted: CUDA's own share, the allocator's waste, and the output layer, whose logits TRL never holds whole.
"""

from copy import copy

from support import processes
from support.errors import RunStopped
from support.hub import ELSEWHERE, loading

ADAMW = ("adamw_torch", "adamw_torch_fused")  # whose two moments are of the weights' own type
NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and an fp32 scale for each 64 of them
USABLE = 0.9  # of the memory: the rest is CUDA's own share and what the allocator cannot use
FULL_PASS = 2048  # tokens; smaller passes leave a GPU waiting for launches, and then recomputing is the lesser cost
LARGE_REMEDIES = [  # against a lack of memory, in any stage
    "--use_peft true: LoRA needs no gradients and AdamW states for the full model; with --load_in_4bit true still less",
    "a smaller MODEL_NAME_OR_PATH",
]


def gpu_memory(model, settings, quantized: bool = False) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        model: the policy, with its adapter if it has one; its tensors may be on the `meta` device.
        settings: the run's.
        quantized: count the linear layers' frozen weights as 4-bit ones, for a model that isn't loaded in 4 bits.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference`, `buckets` (DDP's copy of the gradients, with several
        processes; all of these are held throughout), `casts` (bf16 copies of fp32 weights),
        `activations` (one forward and backward pass) and `cache` (keys and values of one generation by Transformers).
    """
    weights = sum(_bytes(name, p, quantized) for name, p in model.named_parameters())
    gradients = size(p for p in model.parameters() if p.requires_grad)
    is_lora = hasattr(model, "peft_config")
    half = settings.bf16 or settings.fp16
    matrices = [p for name, p in model.named_parameters() if _is_linear(name, p) and p.element_size() == 4]
    return {
        "weights": int(weights),
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "reference": int(weights) if settings.beta and not is_lora else 0,
        "buckets": gradients if settings.world_size > 1 else 0,
        "casts": 2 * sum(p.numel() for p in matrices) if half and not quantized else 0,
        "activations": _activations(model.config, settings),
        "cache": 0 if settings.use_vllm else _cache(model.config, settings),
    }


def size(parameters) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def held(parts: dict[str, int]) -> int:
    """What is held throughout the run."""
    return sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference", "buckets"))


def peak(parts: dict[str, int], vllm: int = 0, vllm_sleeps: bool = False) -> int:
    """The most that is held at once: generation and update take turns, and vLLM keeps its share through the update
    unless it sleeps."""
    update = parts["casts"] + parts["activations"]
    if vllm_sleeps:
        return held(parts) + max(update, vllm)
    return held(parts) + vllm + max(update, parts["casts"] + parts["cache"])


def needed(parts: dict[str, int], settings, total: int) -> int:
    """Peak on a GPU of `total` bytes, a share of which is vLLM's where it generates in this process."""
    is_colocated = settings.use_vllm and settings.vllm_mode == "colocate"
    vllm = int(settings.vllm_gpu_memory_utilization * total) if is_colocated else 0
    return peak(parts, vllm, is_colocated and settings.vllm_enable_sleep_mode)


def device_memory(device) -> int:
    """Bytes of a `torch.device`, the GPU's or the machine's."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


# ---- what is chosen by it


def settle(settings) -> None:
    """Choose gradient checkpointing and the completions a pass by what the smallest of the run's devices holds, and
    refuse what does not fit on a GPU whatever is chosen.

    Raises:
        BadInput: the model's configuration cannot be read.
        RunStopped: weights, gradients and optimizer alone are more than the GPU has.
    """
    if settings.demo:  # its policy is not there yet, and fits
        return
    if processes.is_sharded():  # needs less than is computed here, by how much depends on the sharding
        settings.gradient_checkpointing = settings.gradient_checkpointing is not False
        return
    batch = settings.per_device_train_batch_size
    model = shape(settings)
    total = min(processes.gathered(device_memory(settings.device)))
    fit(model, settings, total)
    if settings.per_device_train_batch_size < batch:
        print(
            f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} -> {settings.per_device_train_batch_size} by computed memory, with "
            f"GRADIENT_ACCUMULATION_STEPS {settings.gradient_accumulation_steps}: the step stays the same. "
            "--fit_memory false insists"
        )
    if settings.device.type == "cuda":
        check(model, settings, total)


def shape(settings):
    """The policy on the `meta` device, with a new adapter for LoRA: its shapes without its numbers.

    Raises:
        BadInput: the model's configuration cannot be read, or is not that of a causal language model.
        ValueError: it has none of the modules that the adapter is for.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import get_peft_config

    trust = {"trust_remote_code": settings.trust_remote_code}
    dtype = settings.dtype if settings.dtype in ("float32", "bfloat16", "float16") else "float32"
    with torch.device("meta"):
        with loading("model", settings.model_name_or_path, ELSEWHERE):
            config = AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision, **trust)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **trust)
        return get_peft_model(model, get_peft_config(settings)) if settings.use_peft else model


def fit(model, settings, total: int) -> None:
    """Choose `settings`' completions a pass and gradient checkpointing by what `total` bytes hold; the completions a
    step stay the same.

    No recomputation is preferred, with up to `per_device_train_batch_size` completions a pass; with `fit_memory` those
    are halved where they do not fit. Where `gradient_checkpointing` is not None it stays.
    """
    batch = settings.per_device_train_batch_size
    halvings = [batch >> i for i in range(batch.bit_length()) if batch % (1 << i) == 0]
    sizes = halvings if settings.fit_memory else [batch]
    tokens = settings.max_prompt_length + settings.max_completion_length
    choices = [(size, True) for size in sizes]
    choices = [(size, False) for size in sizes if size == batch or size * tokens >= FULL_PASS] + choices
    if settings.gradient_checkpointing is not None:
        choices = [(size, settings.gradient_checkpointing) for size in sizes]
    for size, checkpointing in choices:
        trial = copy(settings)
        trial.per_device_train_batch_size, trial.gradient_checkpointing = size, checkpointing
        if needed(gpu_memory(model, trial, settings.load_in_4bit), trial, total) <= USABLE * total:
            break
    else:  # smaller passes are no cure: the check before training names some
        size = batch
    settings.per_device_train_batch_size, settings.gradient_checkpointing = size, checkpointing
    settings.gradient_accumulation_steps *= batch // size
    settings.steps_per_generation *= batch // size


def check(model, settings, total: int) -> None:
    """Refuse what cannot fit on a GPU of `total` bytes, and warn of what may not, by the computed need.

    Raises:
        RunStopped: weights, gradients and AdamW's moments alone, which are exact, are more than the GPU has. Another
            optimizer is taken to need as much, and warned of.
    """
    parts = gpu_memory(model, settings, settings.load_in_4bit)
    listed = "".join(f"\n  - {remedy}" for remedy in remedies(settings))
    most, kept = needed(parts, settings, total), held(parts)
    if kept > total and settings.optim in ADAMW:
        raise RunStopped(
            f"weights, gradients and optimizer need {gigabytes(kept)}, and the GPU has {gigabytes(total)}. What needs "
            f"less:{listed}"
        )
    if most > USABLE * total:
        print(f"WARNING: the run may need {gigabytes(most)} (computed), and the GPU has {gigabytes(total)}:{listed}")


def remedies(settings) -> list[str]:
    """What needs less memory in GRPO, the most effective first."""
    batch, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    found = []
    if settings.use_vllm and settings.vllm_mode == "colocate":
        if not settings.vllm_enable_sleep_mode:
            found.append("VLLM_ENABLE_SLEEP_MODE = True, which frees vLLM's share during the update")
        found.append(f"VLLM_GPU_MEMORY_UTILIZATION below {settings.vllm_gpu_memory_utilization:g}")
    if not settings.gradient_checkpointing:
        found.append("GRADIENT_CHECKPOINTING = True")
    if batch > 1:
        found.append(
            f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} -> {batch // 2}, with GRADIENT_ACCUMULATION_STEPS {passes} -> "
            f"{passes * batch // (batch // 2)} the step stays the same"
        )
    found.append(f"MAX_COMPLETION_LENGTH below {settings.max_completion_length}")
    if settings.beta:
        found.append("BETA = 0, without a reference model")
    return [*found, *LARGE_REMEDIES]


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _is_linear(name: str, parameter) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def _bytes(name: str, parameter, quantized: bool) -> float:
    if quantized and _is_linear(name, parameter) and not parameter.requires_grad:
        return parameter.numel() * NF4_BYTES
    scales = getattr(parameter, "quant_state", None)  # of a bitsandbytes weight: two 4-bit numbers a byte
    return parameter.numel() * parameter.element_size() + (parameter.numel() * 2 / 64 * 4 if scales is not None else 0)


def _shape(config) -> tuple[int, int, int, int]:
    """Layers, hidden size, size of all keys (or values) of a token, size of the MLP."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # a state-space model has none
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # what GPT-2's and Falcon's leave out
    return config.num_hidden_layers, config.hidden_size, keys, mlp


def _activations(config, settings) -> int:
    layers, hidden, keys, mlp = _shape(config)
    tokens = settings.per_device_train_batch_size * (settings.max_prompt_length + settings.max_completion_length)
    width = 2 if settings.bf16 or settings.fp16 else 4
    # what backward needs of one layer, in bytes a token: two norms in fp32 and their outputs, queries, keys and values
    # before and after rotation, attention's output, and the MLP's gate, its activation, up and their product
    layer = 2 * (3 * 4 + width) * hidden + 2 * width * (hidden + keys) + width * (keys + hidden) + 4 * width * mlp
    residual = 4 * hidden  # between layers, in fp32
    return tokens * (layers * residual + layer if settings.gradient_checkpointing else layers * (residual + layer))


def _cache(config, settings) -> int:
    layers, _, keys, _ = _shape(config)
    width = 2 if settings.bf16 or settings.fp16 else 4
    completions = settings.generation_batch_size // settings.world_size
    tokens = completions * (settings.max_prompt_length + settings.max_completion_length)
    return tokens * layers * 2 * keys * width

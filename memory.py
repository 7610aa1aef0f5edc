"""GPU memory that a run needs, computed from the policy and the settings before anything is trained.

State is exact: bytes of weights, gradients, AdamW's moments. Activations follow from the shapes of what autograd keeps
in a Llama-like layer under autocast (Qwen2, Qwen3, Llama, SmolLM2); other architectures are estimated as if they were
one. Not counted: CUDA's own share, the allocator's waste, and the output layer, whose logits TRL never holds whole.
"""

from copy import copy

NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and an fp32 scale for each 64 of them
USABLE = 0.9  # of the memory: the rest is CUDA's own share and what the allocator cannot use
FULL_PASS = 2048  # tokens; smaller passes leave a GPU waiting for launches, and then recomputing is the lesser cost


def gpu_memory(model, args, prompt_length: int, quantized: bool = False) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        model: the policy, with its adapter if it has one; its tensors may be on the `meta` device.
        args: the run's GRPOConfig.
        prompt_length: tokens of the longest prompt.
        quantized: count the linear layers' frozen weights as 4-bit ones, for a model that isn't loaded in 4 bits.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference`, `buckets` (DDP's copy of the gradients, with several
        processes; all of these are held throughout), `casts` (bf16 copies of fp32 weights),
        `activations` (one forward and backward pass) and `cache` (keys and values of one generation by Transformers).
    """
    weights = sum(_bytes(name, p, quantized) for name, p in model.named_parameters())
    gradients = size(p for p in model.parameters() if p.requires_grad)
    is_lora = hasattr(model, "peft_config")
    half = args.bf16 or args.fp16
    matrices = [p for name, p in model.named_parameters() if _is_linear(name, p) and p.element_size() == 4]
    return {
        "weights": int(weights),
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "reference": int(weights) if args.beta and not is_lora else 0,
        "buckets": gradients if args.world_size > 1 else 0,
        "casts": 2 * sum(p.numel() for p in matrices) if half and not quantized else 0,
        "activations": _activations(model.config, args, prompt_length),
        "cache": 0 if args.use_vllm else _cache(model.config, args, prompt_length),
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


def needed(parts: dict[str, int], args, total: int) -> int:
    """Peak on a GPU of `total` bytes, a share of which is vLLM's where it generates in this process."""
    is_colocated = args.use_vllm and args.vllm_mode == "colocate"
    vllm = int(args.vllm_gpu_memory_utilization * total) if is_colocated else 0
    return peak(parts, vllm, is_colocated and args.vllm_enable_sleep_mode)


def device_memory(device) -> int:
    """Bytes of a `torch.device`, the GPU's or the machine's."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def shape(args, model_config):
    """The policy on the `meta` device, with a new adapter for LoRA: its shapes without its numbers.

    Raises:
        OSError, ValueError: the model's configuration cannot be read, or is not that of a causal language model.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import get_peft_config

    options = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model_config.model_name_or_path, **options)
    dtype = model_config.dtype if model_config.dtype in ("float32", "bfloat16", "float16") else "float32"
    with torch.device("meta"):
        trust = args.trust_remote_code
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)
        return get_peft_model(model, get_peft_config(model_config)) if model_config.use_peft else model


def fit(model, args, prompt_length: int, total: int, quantized: bool = False, smaller: bool = True) -> None:
    """Choose `args`' completions a pass and gradient checkpointing by what `total` bytes hold; the completions a step
    stay the same.

    No recomputation is preferred, with up to `args.per_device_train_batch_size` completions a pass. `smaller`: halve
    those where they do not fit. Where `args.gradient_checkpointing` is not None it stays.
    """
    batch = args.per_device_train_batch_size
    sizes = [batch >> i for i in range(batch.bit_length()) if batch % (1 << i) == 0] if smaller else [batch]
    tokens = prompt_length + args.max_completion_length
    choices = [(size, True) for size in sizes]
    choices = [(size, False) for size in sizes if size == batch or size * tokens >= FULL_PASS] + choices
    if args.gradient_checkpointing is not None:
        choices = [(size, args.gradient_checkpointing) for size in sizes]
    for size, checkpointing in choices:
        trial = copy(args)
        trial.per_device_train_batch_size, trial.gradient_checkpointing = size, checkpointing
        if needed(gpu_memory(model, trial, prompt_length, quantized), trial, total) <= USABLE * total:
            break
    else:  # smaller passes are no cure: the check before training names some
        size = batch
    args.per_device_train_batch_size, args.gradient_checkpointing = size, checkpointing
    args.gradient_accumulation_steps *= batch // size
    args.steps_per_generation *= batch // size


def _is_linear(name: str, parameter) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def _bytes(name: str, parameter, quantized: bool) -> float:
    if quantized and _is_linear(name, parameter) and not parameter.requires_grad:
        return parameter.numel() * NF4_BYTES
    scales = getattr(parameter, "quant_state", None)  # of a bitsandbytes weight: two 4-bit numbers a byte
    return parameter.numel() * parameter.element_size() + (parameter.numel() * 2 / 64 * 4 if scales is not None else 0)


def _shape(config) -> tuple[int, int, int, int]:
    """Layers, hidden size, size of all keys (or values) of a token, size of the MLP."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return config.num_hidden_layers, config.hidden_size, keys, config.intermediate_size


def _activations(config, args, prompt_length: int) -> int:
    layers, hidden, keys, mlp = _shape(config)
    tokens = args.per_device_train_batch_size * (prompt_length + args.max_completion_length)
    width = 2 if args.bf16 or args.fp16 else 4
    # what backward needs of one layer, in bytes a token: two norms in fp32 and their outputs, queries, keys and values
    # before and after rotation, attention's output, and the MLP's gate, its activation, up and their product
    layer = 2 * (3 * 4 + width) * hidden + 2 * width * (hidden + keys) + width * (keys + hidden) + 4 * width * mlp
    residual = 4 * hidden  # between layers, in fp32
    return tokens * (layers * residual + layer if args.gradient_checkpointing else layers * (residual + layer))


def _cache(config, args, prompt_length: int) -> int:
    layers, _, keys, _ = _shape(config)
    width = 2 if args.bf16 or args.fp16 else 4
    return args.generation_batch_size * (prompt_length + args.max_completion_length) * layers * 2 * keys * width

"""GPU memory that a run needs, computed from the policy and the settings before anything is trained.

State is exact: bytes of weights, gradients, AdamW's moments. Activations follow from the shapes of what autograd keeps
in a Llama-like layer under autocast (Qwen2, Qwen3, Llama, SmolLM2); other architectures are estimated as if they were
one. Not counted: CUDA's own share, the allocator's waste, and the output layer, whose logits TRL never holds whole.
"""

NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and an fp32 scale for each 64 of them


def gpu_memory(model, args, prompt_length: int, quantized: bool = False) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        model: the policy, with its adapter if it has one; its tensors may be on the `meta` device.
        args: the run's GRPOConfig.
        prompt_length: tokens of the longest prompt.
        quantized: count the linear layers' frozen weights as 4-bit ones, for a model that isn't loaded in 4 bits.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference` (all held throughout), `casts` (bf16 copies of fp32 weights),
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
        "casts": 2 * sum(p.numel() for p in matrices) if half and not quantized else 0,
        "activations": _activations(model.config, args, prompt_length),
        "cache": 0 if args.use_vllm else _cache(model.config, args, prompt_length),
    }


def size(parameters) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def held(parts: dict[str, int]) -> int:
    """What is held throughout the run."""
    return sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference"))


def peak(parts: dict[str, int]) -> int:
    """The most that is held at once: generation and update take turns."""
    return held(parts) + max(parts["casts"] + parts["activations"], parts["cache"])


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

"""GPU memory that a run needs, computed from the policy and the settings before anything is trained.

State is exact: bytes of weights, gradients, AdamW's moments. Activations follow from the shapes of what autograd keeps
in a Llama-like layer under autocast (Qwen2, Qwen3, Llama, SmolLM2); other architectures are estimated as if they were
one. Not counted: CUDA's own share, the allocator's waste, and the output layer, whose logits TRL never holds whole.
What a pass was seen to take beyond these shapes is a factor, `MEASURED`.
"""

from support import processes
from support.errors import RunStopped
from support.hub import ELSEWHERE, loading

ADAMW = ("adamw_torch", "adamw_torch_fused")  # whose two moments are of the weights' own type
NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and an fp32 scale for each 64 of them
USABLE = 0.9  # of the memory: the rest is CUDA's own share and what the allocator cannot use
RESERVE = 1e9  # bytes of that share that no pass is planned into
MEASURED = 1.15  # of activations: 1.5B on an H200 took 56.0 GB in a pass of 6,688 tokens (docs/models-and-data.md)
FULL_PASS = 2048  # tokens; smaller passes leave a GPU waiting for launches, and then recomputing is the lesser cost
BUSY = 3.3e11  # tokens x parameters / layers of a pass that keeps an H200 busy: 6,000 tokens at 1.5B
FIXED_PASS = 4096  # tokens where memory does not decide: on a CPU sums must not round by what the machine has
LARGE_REMEDIES = [  # against a lack of memory, in any stage
    "--use_peft true: LoRA needs no gradients and AdamW states for the full model; with --load_in_4bit true still less",
    "a smaller MODEL_NAME_OR_PATH",
]


def gpu_memory(model, settings, quantized: bool = False) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        model: the policy, with its adapter if it has one; its tensors may be on the `meta` device.
        quantized: count the linear layers' frozen weights as 4-bit ones, for a model that isn't loaded in 4 bits.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference`, `buckets` (DDP's copy of the gradients, with several
        processes; all of these are held throughout), `casts` (bf16 copies of fp32 weights), `activations` (the largest
        pass) and `cache` (keys and values of one generation by Transformers).
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
        "activations": int(_largest_pass(settings) * _bytes_a_token(model.config, settings)),
        "cache": 0 if settings.use_vllm else _cache(model.config, settings),
    }


def size(parameters) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def held(parts: dict[str, int]) -> int:
    """What is held throughout the run."""
    return sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference", "buckets"))


def needed(parts: dict[str, int], settings, total: int = 0) -> int:
    """The most that is held at once on a GPU of `total` bytes: generation and update take turns, and vLLM keeps its
    share, where it generates in this process, through the update unless it sleeps."""
    update, vllm = parts["casts"] + parts["activations"], _vllm(settings, total)
    if vllm and settings.vllm_enable_sleep_mode:
        return held(parts) + max(update, vllm)
    return held(parts) + vllm + max(update, parts["casts"] + parts["cache"])


def _vllm(settings, total: int) -> int:
    is_colocated = settings.use_vllm and settings.vllm_mode == "colocate"
    return int(settings.vllm_gpu_memory_utilization * total) if is_colocated else 0


def device_memory(device) -> int:
    """Bytes of a GPU."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory


# ---- what is chosen by it


def settle(settings) -> None:
    """Choose gradient checkpointing and the tokens of a pass by what the smallest of the run's GPUs holds, and refuse
    what does not fit whatever is chosen.

    Raises:
        BadInput: the model's configuration cannot be read.
        RunStopped: weights, gradients and optimizer alone are more than the GPU has.
    """
    if settings.device.type == "cuda" and not settings.demo and not processes.is_sharded():
        model = shape(settings)
        total = min(processes.gathered(device_memory(settings.device)))
        fit(model, settings, total)
        check(model, settings, total)
        return
    # a CPU's memory decides nothing, the demo's policy is not there yet, what a sharded one needs is not known
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = processes.is_sharded()
    if settings.tokens_per_pass is None and settings.lean_step:
        settings.tokens_per_pass = FIXED_PASS


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
    """Choose `settings`' gradient checkpointing and tokens a pass, where they are None, by what `total` bytes hold: no
    recomputation, unless fewer than `FULL_PASS` tokens fit without it; passes no larger than keep a GPU busy, since
    smaller ones, of rows that are more alike, have less padding."""
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = False
        step = settings.per_device_train_batch_size * longest(settings)
        least = min(step, settings.tokens_per_pass or FULL_PASS) if can_split(settings) else step
        settings.gradient_checkpointing = _tokens_that_fit(model, settings, total) < least
    if settings.tokens_per_pass is None and settings.lean_step:
        busy = max(FULL_PASS, int(BUSY * _shape(model.config)[0] / sum(p.numel() for p in model.parameters())))
        # a row is never split, so that smaller passes than the longest row would not need less
        settings.tokens_per_pass = max(min(busy, _tokens_that_fit(model, settings, total)), longest(settings))


def can_split(settings) -> bool:
    """Whether a step can be split into passes: an entropy bonus and an entropy mask are computed from all completions
    of a pass."""
    reads_all = settings.entropy_coef or settings.use_adaptive_entropy or settings.top_entropy_quantile < 1
    return settings.lean_step and not reads_all


def longest(settings) -> int:
    """Tokens of the longest row that there can be."""
    return settings.max_prompt_length + settings.max_completion_length


def _tokens_that_fit(model, settings, total: int) -> int:
    """Tokens of a pass that `total` bytes have room for, beside all else that is held during an update."""
    parts = gpu_memory(model, settings, settings.load_in_4bit)
    vllm = 0 if settings.vllm_enable_sleep_mode else _vllm(settings, total)
    room = USABLE * total - RESERVE - held(parts) - parts["casts"] - vllm
    return int(room / _bytes_a_token(model.config, settings))


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
    batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    found = []
    if settings.use_vllm and settings.vllm_mode == "colocate":
        if not settings.vllm_enable_sleep_mode:
            found.append("VLLM_ENABLE_SLEEP_MODE = True, which frees vLLM's share during the update")
        found.append(f"VLLM_GPU_MEMORY_UTILIZATION below {settings.vllm_gpu_memory_utilization:g}")
    if not settings.gradient_checkpointing:
        found.append("GRADIENT_CHECKPOINTING = True")
    if can_split(settings) and settings.tokens_per_pass > longest(settings):
        found.append(f"TOKENS_PER_PASS below {settings.tokens_per_pass:,}")
    if not can_split(settings) and batch > 1:
        found.append(
            f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} -> {batch // 2}, with GRADIENT_ACCUMULATION_STEPS {steps} -> "
            f"{steps * batch // (batch // 2)} the step stays the same"
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


def _largest_pass(settings) -> int:
    """Tokens of the largest pass that there can be."""
    step = settings.per_device_train_batch_size * longest(settings)
    return min(step, max(settings.tokens_per_pass or step, longest(settings))) if can_split(settings) else step


def _bytes_a_token(config, settings) -> float:
    """What a pass keeps for its backward pass."""
    layers, hidden, keys, mlp = _shape(config)
    width = 2 if settings.bf16 or settings.fp16 else 4
    # what backward needs of one layer, in bytes a token: two norms in fp32 and their outputs, queries, keys and values
    # before and after rotation, attention's output, and the MLP's gate, its activation, up and their product
    layer = 2 * (3 * 4 + width) * hidden + 2 * width * (hidden + keys) + width * (keys + hidden) + 4 * width * mlp
    residual = 4 * hidden  # between layers, in fp32
    return MEASURED * (layers * residual + (layer if settings.gradient_checkpointing else layers * layer))


def _cache(config, settings) -> int:
    layers, _, keys, _ = _shape(config)
    width = 2 if settings.bf16 or settings.fp16 else 4
    completions = settings.generation_batch_size // settings.world_size
    tokens = completions * (settings.max_prompt_length + settings.max_completion_length)
    return tokens * layers * 2 * keys * width

"""GPU memory that a run needs, computed before anything is loaded, and what is chosen by it.

Weights, gradients and AdamW's moments are exact. Activations follow from the shapes that autograd keeps of a Llama-like
layer under autocast (Qwen2, Qwen3, Llama, SmolLM2), times `MEASURED`; other architectures are taken to be alike. Not
counted: CUDA's own share, the allocator's waste, logits, and keys and values of a generation by Transformers.
"""

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import get_peft_config

from support import processes
from support.errors import ELSEWHERE, RunStopped, loading

ADAMW = ("adamw_torch", "adamw_torch_fused")  # whose two moments are of the weights' own type
NF4_BYTES = 0.5 + 4 / 64  # a 4-bit weight, and an fp32 scale for each 64 of them
USABLE = 0.9  # of the memory: the rest is CUDA's own share and what the allocator cannot use
RESERVE = 1e9  # bytes of the usable memory that passes leave free
MEASURED = 1.15  # of activations: 1.5B on an H200 took 56.0 GB in a pass of 6,688 tokens (docs/memory.md)
FULL_PASS = 2048  # tokens; smaller passes leave a GPU waiting for launches, and recomputing activations costs less
BUSY = 3.3e11  # tokens x parameters / layers of a pass that keeps an H200 busy: 6,000 tokens at 1.5B
FIXED_PASS = 4096  # tokens where memory does not decide: on a CPU the same command rounds alike on every machine
LARGE_REMEDIES = [  # against a lack of memory, in any training
    "--use_peft true: LoRA needs no gradients and AdamW states for the full model; with --load_in_4bit true still less",
    "a smaller MODEL_NAME_OR_PATH",
]


def choose_by_memory(settings) -> str:
    """Choose gradient checkpointing and tokens a pass, where None, by the smallest GPU's memory (fixed for a CPU or a
    sharded policy); returns what the plan says. BadInput where there is no configuration, RunStopped without room."""
    if settings.device.type == "cuda" and not processes.is_sharded():
        model, total = _on_meta_device(settings), min(processes.gathered(device_memory(settings.device)))
        fit(model, settings, total)
        return check(model, settings, total)
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = processes.is_sharded()
    if settings.tokens_per_pass is None and settings.lean_step:
        settings.tokens_per_pass = FIXED_PASS
    return "the need of a sharded policy is not computed" if settings.device.type == "cuda" else ""


def _on_meta_device(settings):
    """The policy's shapes without its numbers, with a new adapter for LoRA, or the one to train further."""
    name, trust, dtype = settings.model_name_or_path, settings.trust_remote_code, settings.dtype
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if settings.adapter else name
    with torch.device("meta"), loading("model", base, ELSEWHERE):
        config = AutoConfig.from_pretrained(base, revision=settings.model_revision, trust_remote_code=trust)
        dtype = config.dtype if dtype == "auto" else dtype
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=dtype)
        config = get_peft_config(settings)  # None without an adapter
        if settings.adapter == "train":
            config = PeftConfig.from_pretrained(name)
            config.inference_mode = False
        return get_peft_model(model, config) if config else model


def fit(model, settings, total: int) -> None:
    """Choose gradient checkpointing and tokens a pass, where they are None, for a GPU of `total` bytes: activations are
    kept unless fewer than `FULL_PASS` tokens fit so, and a pass is no larger than keeps a GPU busy, since the rows of
    smaller passes are more alike in length and need less padding."""
    parts = gpu_memory(model, settings)  # None counts as no recomputation, and as FULL_PASS tokens
    vllm = 0 if settings.vllm_enable_sleep_mode else vllm_share(settings) * total
    room = USABLE * total - RESERVE - parts["held"] - parts["casts"] - vllm
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = room < parts["activations"]
    if settings.tokens_per_pass is None and settings.lean_step:
        layers = model.config.get_text_config().num_hidden_layers
        busy = max(FULL_PASS, int(BUSY * layers / sum(p.numel() for p in model.parameters())))
        fitting = int(room / _bytes_a_token(model, settings))
        settings.tokens_per_pass = max(min(busy, fitting), longest(settings))  # no smaller: a row is never split


def check(model, settings, total: int) -> str:
    """What the plan says of a run on a GPU of `total` bytes. RunStopped where weights, gradients and AdamW's moments
    alone are more; other optimizers' states are taken to be as large, and are no reason to refuse."""
    parts = gpu_memory(model, settings, total)
    held, most, has = (gigabytes(number) for number in (parts["held"], parts["most"], total))
    if parts["held"] > total and settings.optim in ADAMW:
        less = "\n  - ".join(["What needs less:", *remedies(settings)])
        raise RunStopped(f"weights, gradients and optimizer need {held}, and the GPU has {has}. {less}")
    doubt = f", and MAY NOT FIT: try {remedies(settings)[0]}" if parts["most"] > USABLE * total else ""
    return f"needs at most about {most} of {has} (computed){doubt}"


def remedies(settings) -> list[str]:
    """What needs less memory in GRPO, the most effective first."""
    share, tokens, batch = vllm_share(settings), settings.tokens_per_pass or 0, settings.per_device_train_batch_size
    splits, is_awake = can_split(settings), share and not settings.vllm_enable_sleep_mode
    helps = {
        "VLLM_ENABLE_SLEEP_MODE = True, which frees vLLM's share during the update": is_awake,
        f"VLLM_GPU_MEMORY_UTILIZATION below {share:g}": share,
        "GRADIENT_CHECKPOINTING = True": not settings.gradient_checkpointing,
        f"TOKENS_PER_PASS below {tokens:,}": splits and tokens > longest(settings),
        "half of PER_DEVICE_TRAIN_BATCH_SIZE, twice GRADIENT_ACCUMULATION_STEPS": batch > 1 and not splits,
        f"MAX_COMPLETION_LENGTH below {settings.max_completion_length}": True,
        "BETA = 0, without a reference model": settings.beta,
    }
    return [*(remedy for remedy, does_help in helps.items() if does_help), *LARGE_REMEDIES]


def can_split(settings) -> bool:
    """Whether a step can be split into passes: an entropy bonus and an entropy mask need all completions at once."""
    reads_all = settings.entropy_coef or settings.use_adaptive_entropy or settings.top_entropy_quantile < 1
    return settings.lean_step and not reads_all


def longest(settings) -> int:
    """Tokens of the longest row that there can be."""
    return settings.max_prompt_length + settings.max_completion_length


def gpu_memory(model, settings, total: int = 0) -> dict[str, int]:
    """Bytes of `weights` (the frozen linear ones in 4 bits with `load_in_4bit`), `gradients`, `optimizer` and
    `reference`, of their sum `held`, in the update of `casts` (bf16 copies of fp32 weights) and `activations`, and the
    `most` at once. `model` is the policy with its adapter, on any device; vLLM has its share of `total`."""
    named = model.named_parameters()
    linear = [p for name, p in named if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
    packed = [p for p in linear if settings.load_in_4bit and not p.requires_grad]
    count = sum(p.numel() * (2 if p.element_size() == 1 else 1) for p in packed)  # once loaded, two weights a byte
    weights = size(model.parameters()) - size(packed) + int(NF4_BYTES * count)
    trained = size(p for p in model.parameters() if p.requires_grad)
    held = {
        "weights": weights,
        "gradients": trained * (2 if settings.world_size > 1 else 1),  # DDP sums them in a copy
        "optimizer": 2 * trained,
        "reference": weights if settings.beta and not hasattr(model, "peft_config") else 0,
    }
    has_casts = (settings.bf16 or settings.fp16) and not settings.load_in_4bit
    casts = 2 * sum(p.numel() for p in linear if p.element_size() == 4) if has_casts else 0
    tokens = settings.per_device_train_batch_size * longest(settings)  # of the largest pass: here the whole step
    if can_split(settings):
        tokens = min(tokens, max(settings.tokens_per_pass or FULL_PASS, longest(settings)))
    activations = int(tokens * _bytes_a_token(model, settings))
    update, vllm = casts + activations, int(vllm_share(settings) * total)  # which stays, unless vLLM sleeps
    most = sum(held.values()) + (max(update, vllm) if settings.vllm_enable_sleep_mode else update + vllm)
    return {**held, "held": sum(held.values()), "casts": casts, "activations": activations, "most": most}


def _bytes_a_token(model, settings) -> float:
    """What a pass keeps of a token for its backward pass."""
    config, width = model.config.get_text_config(), 2 if settings.bf16 or settings.fp16 else 4
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1  # a state-space model has none
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden  # GPT-2's and Falcon's configurations have none
    # a layer: two norms in fp32 and their outputs, queries, keys and values before and after rotation, attention's
    # output, and the MLP's gate, its activation, up and their product; between layers, the residual stream in fp32
    layer = 2 * (3 * 4 + width) * hidden + width * (3 * (hidden + keys) + 4 * mlp)
    return MEASURED * (layers * 4 * hidden + (1 if settings.gradient_checkpointing else layers) * layer)


def vllm_share(settings) -> float:
    """The fraction of the GPU's memory that vLLM in this process takes."""
    return settings.vllm_gpu_memory_utilization if settings.use_vllm and settings.vllm_mode == "colocate" else 0


def size(parameters) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def device_memory(device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory

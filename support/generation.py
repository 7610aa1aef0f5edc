"""Completions of a policy: greedy or sampled, by Transformers or by vLLM."""

import sys
from functools import partial
from importlib import metadata

from support.checkpoints import checkpoints
from support.errors import BadInput
from support.hub import ELSEWHERE, loading
from support.problems import tokenize
from support.unfinished import Unfinished

BATCH_SIZE = 64  # problems at a time
VLLM_VERSIONS = ("0.22.0", "0.31.0")  # lowest and highest that TRL 1.16 supports
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # in which a policy is measured


def vllm_obstacle(use_cpu: bool = False) -> str | None:
    """Why vLLM cannot generate here, None where it can: installed in a version that TRL supports, and a CUDA GPU."""
    import torch
    from packaging.version import Version

    if use_cpu or not torch.cuda.is_available():
        return "there is no CUDA GPU" if not use_cpu else "the run is on the CPU"
    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vLLM is not installed"
    lowest, highest = map(Version, VLLM_VERSIONS)
    if lowest <= Version(Version(installed).base_version) <= highest:  # without a local part such as +cu129
        return None
    return f"vLLM {installed} is installed, which TRL does not support"


def load_policy(name: str, revision: str | None = None, use_cpu: bool = False, trust_remote_code: bool = False):
    """The model, in bf16 on a GPU and fp32 on a CPU, ready for inference.

    Raises:
        BadInput: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    found = checkpoints(name)
    with loading("model", name, f"It holds {found[-1].name}: evaluate that" if found else ELSEWHERE):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[device], **options)
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise BadInput(f"model {name!r}: the GPU has no room for it. Free it, or say --use_cpu") from error


def complete(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_completion_length: int,
    batch_size: int = BATCH_SIZE,
    chat_template_kwargs: dict | None = None,
    progress: bool = True,
    temperature: float = 0.0,
    answers: Unfinished | None = None,
) -> list[dict]:
    """Completions of B conversational prompts, in their order: greedy, or sampled where `temperature` is above 0.

    Prompts of similar length share a batch, the longest first, so that little is padded and a batch that does not fit
    fails at once. `answers` keeps each batch, and what it holds already is not generated again; a batch that it holds
    in part is, as a whole: in other company a sum would round otherwise.

    Returns:
        B dicts of `text`, `tokens` (count, EOS included) and `truncated` (no EOS within the limit).
    """
    import torch
    from tqdm import tqdm

    eos_ids = _set_generation(model, tokenizer, max_completion_length, temperature)
    token_ids = tokenize(tokenizer, prompts, chat_template_kwargs)
    order = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))
    completions = dict(answers.completions) if answers else {}
    bar = tqdm(total=len(prompts), unit="problem", dynamic_ncols=True, disable=None if progress else True)
    with bar, torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if not completions.keys() >= set(chosen):
                batch = _complete_batch(model, tokenizer, [token_ids[i] for i in chosen], eos_ids)
                completions |= zip(chosen, batch, strict=True)
                if answers:
                    answers.add({i: completions[i] for i in chosen})
            bar.update(len(chosen))
    return [completions[i] for i in range(len(prompts))]


def _complete_batch(model, tokenizer, token_ids: list[list[int]], eos_ids: set[int]) -> list[dict]:
    batch = tokenizer.pad({"input_ids": token_ids}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**batch)  # (B, prompt + completion)
    completions = []
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        end = next((at for at, token in enumerate(ids) if token in eos_ids), None)
        completions.append(as_completion(tokenizer, ids if end is None else ids[: end + 1], end is None))
    return completions


def as_completion(tokenizer, token_ids: list[int], truncated: bool) -> dict:
    """One completion as `complete` returns it. `token_ids` end with EOS unless they are truncated."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return {"text": text, "tokens": len(token_ids), "truncated": truncated}


def _set_generation(model, tokenizer, max_completion_length: int, temperature: float) -> set[int]:
    """Have `model` generate greedily, or sample from the whole distribution; returns the ids that end a completion."""
    from transformers import GenerationConfig

    declared = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    # generate() fills what a given config leaves at its default from the model's own, such as Qwen2.5's repetition
    # penalty of 1.05, so the model's own is replaced
    model.generation_config = GenerationConfig(
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
        max_new_tokens=max_completion_length,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return eos_ids


def complete_with_vllm(
    name: str,
    tokenizer,
    prompts: list[list[dict]],
    max_completion_length: int,
    chat_template_kwargs: dict,
    revision: str | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    gpu_memory_utilization: float | None = None,
) -> list[dict]:
    """`complete` with vLLM, which loads the model itself and batches as it sees fit. `gpu_memory_utilization` is the
    share of the GPU's memory that it takes, None vLLM's own default.

    Raises:
        BadInput: it cannot be loaded, or is not made for so long a text.
    """
    import gc

    from tqdm import tqdm
    from vllm import LLM, SamplingParams

    token_ids = tokenize(tokenizer, prompts, chat_template_kwargs)
    longest = max(map(len, token_ids)) + max_completion_length
    try:
        engine = LLM(
            model=name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=DTYPES["cpu" if use_cpu else "cuda"],
            max_model_len=longest,
            generation_config="vllm",  # not the model's own, which may sample or penalise repetition
            **({} if gpu_memory_utilization is None else {"gpu_memory_utilization": gpu_memory_utilization}),
        )
    except (OSError, ValueError, RuntimeError) as error:  # the last where its engine, another process, does not start
        without = "--vllm_gpu_memory_utilization takes less of a GPU in use; --use_vllm false decodes with Transformers"
        raise BadInput(f"model {name!r}: vLLM cannot load it: {str(error).strip()}\n{without}") from error
    sampling = SamplingParams(temperature=0.0, max_tokens=max_completion_length, detokenize=False)
    # on a terminal, as `complete` has it; where TQDM_DISABLE turns the bar off, vLLM divides by its zero seconds
    bar = partial(tqdm, disable=False) if sys.stderr.isatty() else False
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling, use_tqdm=bar)
    completions = [output.outputs[0] for output in outputs]
    del engine  # a comparison starts a second one
    gc.collect()
    return [as_completion(tokenizer, list(c.token_ids), c.finish_reason == "length") for c in completions]

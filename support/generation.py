"""Completions of a policy: greedy or sampled, by Transformers or by vLLM."""

import gc
import os
import sys
from importlib import metadata

import torch
from packaging.version import Version
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from trl.chat_template_utils import parse_response

from support.errors import ELSEWHERE, BadInput, loading
from support.problems import base_of, tokenize

BATCH_SIZE = 64  # prompts at a time
VLLM_BATCH_SIZE = 8192  # prompts at a time for vLLM, which has as many of them under way as its memory holds
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")  # which TRL takes from a run's own settings
VLLM_VERSIONS = ("0.22.0", "0.31.0")  # lowest and highest that TRL 1.16 supports
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # in which a policy is measured


def vllm_obstacle(use_cpu: bool = False) -> str | None:
    """Why vLLM cannot generate here; None where a version that TRL supports is installed and there is a CUDA GPU."""
    if use_cpu or not torch.cuda.is_available():
        return "the run is on the CPU" if use_cpu else "there is no CUDA GPU"
    try:
        installed = Version(metadata.version("vllm"))
    except metadata.PackageNotFoundError:
        return "vLLM is not installed"
    lowest, highest = (Version(version).release for version in VLLM_VERSIONS)
    is_supported = lowest <= installed.release <= highest  # a local part such as +cu129 does not count
    return None if is_supported else f"vLLM {installed} is installed, which TRL does not support"


def load_policy(name: str, revision: str | None = None, use_cpu: bool = False, trust_remote_code: bool = False):
    """The model, in bf16 on a GPU and fp32 on a CPU, ready for inference; BadInput where it cannot be loaded."""
    device = "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"
    options = {"dtype": DTYPES[device], "revision": revision, "trust_remote_code": trust_remote_code}
    with loading("model", base_of(name), ELSEWHERE):
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
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
    seed: int | None = None,
    known: dict[int, dict] | None = None,
) -> list[dict]:
    """Completions of B conversational prompts, in their order, greedy or (`temperature` above 0) sampled: B dicts of
    `text`, `token_ids`, `tokens` (their count, EOS included) and `truncated` (no EOS within the limit).

    `known` holds completions by their prompt's index, and is updated with each batch. A batch is skipped only where all
    of it is known: a smaller one would round differently. With a `seed` each batch has a random state of its own."""
    _set_generation(model, tokenizer, max_completion_length, temperature)
    token_ids = tokenize(tokenizer, prompts, chat_template_kwargs)
    order = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))  # little padding; the largest batch is first
    known = {} if known is None else known
    with tqdm(total=len(prompts), unit="answer", dynamic_ncols=True, disable=None if progress else True) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if not known.keys() >= set(chosen):
                if seed is not None:
                    torch.manual_seed(seed + start)
                batch = _complete_batch(model, tokenizer, [token_ids[i] for i in chosen])
                known.update(dict(zip(chosen, batch, strict=True)))
            bar.update(len(chosen))
    return [known[i] for i in range(len(prompts))]


def _complete_batch(model, tokenizer, token_ids: list[list[int]]) -> list[dict]:
    batch = tokenizer.pad({"input_ids": token_ids}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch.to(model.device))  # (B, prompt + completion)
    completions = []
    for prompt_ids, ids in zip(token_ids, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(ids) if token in model.generation_config.eos_token_id), None)
        completions.append(as_completion(tokenizer, prompt_ids, ids[:end], truncated=end is None))
    return completions


def as_completion(tokenizer, prompt_ids: list[int], token_ids: list[int], truncated: bool) -> dict:
    """One completion as `complete` returns it, its text as TRL gives it to rewards, by a `response_template` if any."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    if getattr(tokenizer, "response_template", None) is not None:
        text = parse_response(tokenizer, token_ids, prefix=prompt_ids)["content"]
    return {"text": text, "token_ids": token_ids, "tokens": len(token_ids), "truncated": truncated}


def _set_generation(model, tokenizer, max_completion_length: int, temperature: float) -> None:
    """Have `model` generate greedily, or sample from the whole distribution, up to an EOS token that it declares."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    declared = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    # in place of the model's own, from which `generate` takes whatever the config given to it leaves at its default,
    # such as Qwen2.5's repetition penalty of 1.05
    model.generation_config = GenerationConfig(
        **sampling,
        max_new_tokens=max_completion_length,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.pad_token_id,
    )


def mend_generation_config(model) -> None:
    """Leave in the model's generation config what cannot change how the policy is sampled, and can be saved: what TRL
    does not set, a min_p say, Transformers takes from there, unseen, and it saves no temperature without do_sample."""
    held = model.generation_config.to_diff_dict()
    stays = (*TOKEN_IDS, *SAMPLING, "do_sample", "use_cache", "cache_implementation")
    kept = {name: held[name] for name in stays if name in held}
    if kept.keys() & {*SAMPLING}:
        kept["do_sample"] = True
    model.generation_config = GenerationConfig(**kept)
    changed = {name for name in {**held, **kept} if held.get(name, False) != kept.get(name, False)}
    changed -= {"transformers_version", "_from_model_config"}
    if changed:
        words = ", ".join(f"{name} is {kept.get(name)}" for name in sorted(changed))
        print(f"{model.config.name_or_path}: in its generation_config {words} from here on, as the policy is sampled")


def complete_with_vllm(
    tokenizer,
    token_ids: list[list[int]],
    max_completion_length: int,
    temperature: float = 0.0,
    seed: int | None = None,
    known: dict[int, dict] | None = None,
    **options,
) -> list[dict]:
    """Completions of B tokenized prompts, as `complete` returns them, by vLLM, which loads the model; with a `seed`
    each has a random state of its own. `options` are those of its `LLM`; a None is left out. BadInput where it cannot
    be loaded."""
    from vllm import LLM, SamplingParams

    options = {name: value for name, value in options.items() if value is not None}
    options["dtype"] = DTYPES["cuda" if torch.cuda.is_available() else "cpu"]
    options["max_model_len"] = max(map(len, token_ids)) + max_completion_length
    try:
        # "vllm": not the model's own generation config, which may sample or penalise repetition
        engine = LLM(generation_config="vllm", **options)
    except (OSError, ValueError, RuntimeError) as error:  # the last where its engine, another process, does not start
        without = "--vllm_gpu_memory_utilization takes less of a GPU in use; --use_vllm false decodes with Transformers"
        raise BadInput(f"model {options['model']!r}: vLLM cannot load it: {str(error).strip()}\n{without}") from error
    ends = {"stop_token_ids": [tokenizer.eos_token_id]}  # beside those that vLLM finds in the model's folder
    how = {"temperature": temperature, "max_tokens": max_completion_length, "detokenize": False, **ends}
    has_bar = sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ  # vLLM divides by a disabled bar's time, 0
    known = {} if known is None else known
    left = [i for i in range(len(token_ids)) if i not in known]
    for start in range(0, len(left), VLLM_BATCH_SIZE):
        chosen = left[start : start + VLLM_BATCH_SIZE]
        prompts = [{"prompt_token_ids": token_ids[i]} for i in chosen]
        sampling = [SamplingParams(**how, seed=None if seed is None else seed + i) for i in chosen]
        outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=has_bar)]
        ended = [(list(output.token_ids), output.finish_reason == "length") for output in outputs]
        known.update({i: as_completion(tokenizer, token_ids[i], *end) for i, end in zip(chosen, ended, strict=True)})
    del engine  # a comparison starts a second one
    gc.collect()
    return [known[i] for i in range(len(token_ids))]

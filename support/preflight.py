"""Everything wrong with the settings, found at once, before anything loads."""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Trainer, get_scheduler

from support import processes
from support.checkpoints import checkpoints
from support.errors import BadInput, RunStopped
from support.faults import locked
from support.generation import VLLM_VERSIONS, vllm_obstacle
from support.lean_step import ROW_MEANS, SUMS, TOKEN_MEANS
from support.memory import can_split
from support.problems import base_of, is_path


def find_errors(flags: argparse.Namespace) -> list[str]:
    """Everything about these settings that would stop or spoil the run, each naming the constant to change.
    Nothing is downloaded or loaded. `flags` are not a configuration yet: building one stops at its first error."""
    return [*_values(flags), *_hardware(flags), *_sources(flags), *_output_folder(flags), *_unused(flags)]


def _at_least(least: int):
    return lambda value: value == int(value) and value >= least


SETTINGS = {  # of settings: a test and its words for an error, which name None where it is allowed; or all valid words
    "max_prompt_length max_completion_length per_device_train_batch_size gradient_accumulation_steps examples "
    "save_total_limit lora_r num_iterations": (_at_least(1), "a whole number, at least 1"),
    "tokens_per_pass steps_per_generation generation_batch_size": (_at_least(1), "at least 1, or None"),
    "num_generations": (_at_least(2), "at least 2: an advantage compares completions of one group"),
    "eval_problems": (_at_least(1), "at least 1; EVAL_STEPS = 0 turns evaluation off"),
    "sample_every top_k dataloader_num_workers": (_at_least(0), "a whole number, or 0, which turns it off"),
    "eval_steps": (_at_least(0), "a whole number; 0 or None turns evaluation off"),
    "max_steps": (lambda n: n == -1 or _at_least(1)(n), "a whole number, or -1 to follow NUM_TRAIN_EPOCHS"),
    "temperature": (lambda n: 0 < n < math.inf, "above 0: greedy completions of a group are all the same"),
    "num_train_epochs learning_rate save_steps logging_steps adam_epsilon lora_alpha repetition_penalty "
    "sapo_temperature_neg sapo_temperature_pos": (lambda n: 0 < n < math.inf, "above 0"),
    "seed": (lambda n: _at_least(0)(n) and n < 2**32, "from 0 to 4,294,967,295"),
    "beta epsilon weight_decay warmup_steps max_grad_norm": (lambda n: 0 <= n < math.inf, "0 or above"),
    "epsilon_high delta neftune_noise_alpha": (lambda n: 0 <= n < math.inf, "0 or above, or None"),
    "top_p top_entropy_quantile vllm_gpu_memory_utilization": (lambda n: 0 < n <= 1, "above 0 and at most 1"),
    "min_p": (lambda n: 0 <= n <= 1, "from 0 to 1, or None"),
    "adam_beta1 adam_beta2 lora_dropout": (lambda n: 0 <= n < 1, "at least 0 and below 1"),
    "reward_weights": (lambda numbers: all(map(math.isfinite, numbers)), "a number for each reward, or None"),
    "chat_template_kwargs generation_kwargs gradient_checkpointing_kwargs lr_scheduler_kwargs model_init_kwargs "
    "dataset_kwargs": (lambda d: type(d) is dict or type(json.loads(d)) is dict, "JSON like '{\"a\": 1}', or None"),
    "adapter": (("train", "merge").__contains__, "'train', 'merge' or None"),
    "completion_only_loss": ((True,).__contains__, "true or None: with false, prompts would be taught as well"),
    "source": "dataset, self",
    "scale_rewards": "group, batch, none",
    "importance_sampling_level": "token, sequence",
    "multi_objective_aggregation": "sum_then_normalize, normalize_then_sum",
    "vllm_mode": "colocate, server",
    "vllm_importance_sampling_mode": "token_mask, token_truncate, sequence_mask, sequence_truncate",
}


def _values(flags: argparse.Namespace) -> Iterator[str]:
    wrong = set()
    for name, rule in ((name, rule) for names, rule in SETTINGS.items() for name in names.split() if name in flags):
        value = getattr(flags, name)
        is_right, words = rule if isinstance(rule, tuple) else (rule.split(", ").__contains__, f"one of: {rule}")
        with suppress(TypeError, ValueError, OverflowError):  # a --config file and a constant can hold anything
            if (value is None and "None" in words) or is_right(value):
                continue
        wrong.add(name)
        yield f"{name.upper()} is {value!r:.60}; it must be {words}"
    if wrong & {"per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"}:
        return
    batch, count, group = flags.per_device_train_batch_size, processes.count(), getattr(flags, "num_generations", 1)
    if batch % count:
        does = shlex.join(_divisible(flags, count))
        yield f"PER_DEVICE_TRAIN_BATCH_SIZE is {batch}, which does not divide among {count} processes: {does} does"
    elif group > 1 and flags.generation_batch_size is None:
        # completions are generated together, for one step unless told otherwise, and must be whole groups
        name = "gradient_accumulation_steps" if flags.steps_per_generation is None else "steps_per_generation"
        at_once = batch * getattr(flags, name)
        if at_once % group:
            product = f"PER_DEVICE_TRAIN_BATCH_SIZE {batch} x {name.upper()} {getattr(flags, name)}"
            groups = f"which are no whole groups of NUM_GENERATIONS {group}; make it a multiple of {group}"
            yield f"{product} makes {at_once} completions at a time, {groups}"


def _divisible(flags: argparse.Namespace, count: int) -> list[str]:
    """Flags with which a step of as many rows, or some more, divides among processes, and in whole groups."""
    unit = math.lcm(count, max(1, getattr(flags, "num_generations", 1)))
    rows = -(-flags.per_device_train_batch_size * flags.gradient_accumulation_steps // unit) * unit
    more = ["--gradient_accumulation_steps", "1"] if flags.gradient_accumulation_steps > 1 else []
    return ["--per_device_train_batch_size", str(rows), *more]


def _hardware(flags: argparse.Namespace) -> Iterator[str]:
    if not torch.cuda.is_available() and not flags.use_cpu:
        yield (
            "no CUDA GPU is visible, and the default run takes 80 GB of one (40 without vLLM). `python demo.py` shows "
            "the whole pipeline on any machine; `--use_cpu true` forces a real, slow run on the CPU"
        )
    if processes.is_sharded() and flags.use_cpu:
        yield "accelerate shards on GPUs alone: with --use_cpu its FSDP and DeepSpeed flags would be ignored"
    gpus = torch.cuda.device_count()
    if processes.count() == 1 and gpus > 1 and not flags.use_cpu:
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(gpus), *sys.argv]
        if flags.per_device_train_batch_size > 0 and flags.per_device_train_batch_size % gpus:
            words += _divisible(flags, gpus)
        instead = f"`{shlex.join(words)}` uses them all, CUDA_VISIBLE_DEVICES=0 shows one"
        yield f"{gpus} GPUs are visible, and python starts one process: {instead}"
    computes_in_bf16 = flags.bf16 and torch.cuda.is_available() and not flags.use_cpu
    if computes_in_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        instead = "--bf16 false --fp16 true, with --use_peft true where the full model's fp32 weights do not fit"
        yield f"BF16 is true, but the {torch.cuda.get_device_name()} cannot compute in bf16: set {instead}"
    if getattr(flags, "use_vllm", False) and (obstacle := vllm_obstacle(flags.use_cpu)):
        server = ("VLLM_MODE server", " where it trains, too")
        what, place = server if flags.vllm_mode == "server" else ("USE_VLLM", "")
        needed = f"a CUDA GPU and vLLM {' to '.join(VLLM_VERSIONS)}{place} (pip install vllm=={VLLM_VERSIONS[1]})"
        yield f"{what} needs {needed}, but {obstacle}; --use_vllm false generates with Transformers"


def _sources(flags: argparse.Namespace) -> Iterator[str]:
    kinds = {"model_name_or_path": (Path.is_dir, "folder"), "dataset_name": (Path.exists, "folder or file")}
    for name, (is_there, kind) in kinds.items():
        place = getattr(flags, name)
        if not place:
            yield f"{name.upper()} is empty"
        elif is_path(place) and not is_there(Path(place)):
            yield f"{name.upper()} {place!r}: no such {kind}"
    try:
        name, base = flags.model_name_or_path, base_of(flags.model_name_or_path)
        if base != name and not flags.adapter:
            choice = "say --adapter train to train it further, or --adapter merge to merge it into that model first"
            yield f"MODEL_NAME_OR_PATH {name} is a LoRA adapter on {base}: {choice}"
        elif flags.adapter and base == name:
            yield f"ADAPTER has no effect: {name} is no adapter's folder; `hf download` fetches one"
        elif flags.adapter == "merge" and processes.is_sharded():
            yield "ADAPTER 'merge' needs the whole model, which this run shards: merge in a run of one process"
    except BadInput as error:
        yield str(error)
    splits = {flags.dataset_train_split: "to train on"}
    if flags.eval_steps and "eval_problems" in flags:
        splits[flags.dataset_test_split] = "to evaluate on; EVAL_STEPS = 0 trains without"
    folder = Path(flags.dataset_name or "?")
    if len(splits) > 1 and (folder.is_file() or (folder / "state.json").is_file()):
        yield f"DATASET_NAME {folder} is one split, with nothing left {splits[flags.dataset_test_split]}"
    absent = [split for split in splits if any(folder.glob("*.jsonl")) and not (folder / f"{split}.jsonl").is_file()]
    yield from (f"DATASET_NAME {folder} has no {split}.jsonl {splits[split]}" for split in absent)


def _output_folder(flags: argparse.Namespace) -> list[str]:
    folder, wanted = Path(flags.output_dir), flags.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        return [f"OUTPUT_DIR {folder} is a file"]
    try:
        with locked(folder):
            pass
    except RunStopped as error:  # another run holds it, or it cannot be written to
        return [str(error)]
    found = checkpoints(folder)[-1:] or [*folder.glob("run.json"), *folder.glob("*.safetensors*")]
    kept = [path.name for path in found]
    is_run = kept and "safetensors" not in kept[0]
    is_own = wanted == "auto" or (wanted and Path(wanted).resolve().parent == folder.resolve())
    if not kept or (is_own and is_run):
        return []  # find_checkpoint looks at what is resumed
    instead = "Give another --output_dir" + (", or resume it with --resume_from_checkpoint auto" if is_run else "")
    return [f"OUTPUT_DIR {folder} already holds an earlier run ({', '.join(kept)}). {instead}"]


TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
LOSSES = (*SUMS, *ROW_MEANS, *TOKEN_MEANS)
REFUSED = {  # flags that are given: why not
    "eval_strategy do_eval eval_on_start do_predict": "EVAL_STEPS evaluates in training, and evaluate.py afterwards",
    "use_transformers_continuous_batching use_transformers_paged": "TRL 1.16 turns fp32 weights into bf16 for it",
    "load_in_8bit": "it is not covered; --load_in_4bit true with --use_peft true needs less memory",
    "auto_find_batch_size": "it would change the batch unseen; lower PER_DEVICE_TRAIN_BATCH_SIZE instead",
    "save_only_model": "a run could not be resumed from such a checkpoint",
    "hub_strategy": "--push_to_hub pushes the final policy, and no checkpoint",
    "chat_template_path eos_token": "what is taught is checked in the model's own template; edit a copy of the model",
    "max_length": "it truncates solutions; MAX_COMPLETION_LENGTH leaves out what is too long",
    "enable_jit_checkpoint": "this recipe saves on SIGTERM and Ctrl-C by itself",
}


def _unused(flags: argparse.Namespace) -> list[str]:
    given = {name: why for names, why in REFUSED.items() for name in names.split() if getattr(flags, name, None)}
    errors = [f"leave out --{name}: {why}" for name, why in given.items() if getattr(flags, name) not in ("no", "end")]
    if flags.push_to_hub and "examples" in flags:
        errors.append("leave out --push_to_hub: a cold start is pushed when it is done, by `hf upload NAME FOLDER`")
    if flags.load_in_4bit and not flags.use_peft:
        errors.append("--load_in_4bit true: 4-bit weights cannot be trained, an adapter on them can; --use_peft true")
    named = [flags.report_to] if isinstance(flags.report_to, str) else flags.report_to or []
    packages = [(f"--report_to {name}", name) for name in named if name in TRACKERS]
    packages += [("--load_in_4bit true", "bitsandbytes")] if flags.load_in_4bit else []
    packages += [("--use_liger_kernel true", "liger_kernel")] if flags.use_liger_kernel else []
    errors += [f"{what} needs the package: pip install {name}" for what, name in packages if find_spec(name) is None]
    return [*errors, *_late(flags), *(_unused_by_grpo(flags) if "num_generations" in flags else [])]


def _unused_by_grpo(flags: argparse.Namespace) -> list[str]:
    asks = flags.vllm_server_base_url or flags.vllm_server_host != "0.0.0.0" or flags.vllm_server_port != 8000
    is_server, steps_early = flags.vllm_mode == "server", re.search("lomo|layerwise", flags.optim)
    whole = "TOKENS_PER_PASS does not split a step with LEAN_STEP = False, an entropy bonus or an entropy mask"
    smaller = "lower PER_DEVICE_TRAIN_BATCH_SIZE, and raise GRADIENT_ACCUMULATION_STEPS"
    early = "--optim makes a step in each backward pass, of which LEAN_STEP makes several: --lean_step false"
    errors = {
        f"LOSS_TYPE is {flags.loss_type!r}; it must be one of: {', '.join(LOSSES)}": flags.loss_type not in LOSSES,
        "leave out --remove_unused_columns: it takes the answers away from the rewards": flags.remove_unused_columns,
        "--vllm_server_base_url, _host and _port have no effect without --vllm_mode server": asks and not is_server,
        "--vllm_mode server has no effect with USE_VLLM = False": is_server and flags.use_vllm is False,
        f"{whole}: {smaller}": flags.tokens_per_pass is not None and not can_split(flags),
        early: flags.lean_step and steps_early,
    }
    return [error for error, holds in errors.items() if holds]


def _late(flags: argparse.Namespace) -> list[str]:
    """What Transformers objects to in the optimizer and its schedule, which it makes when training begins."""
    try:
        kwargs = json.loads(given) if isinstance(given := flags.lr_scheduler_kwargs, str) else given
        get_scheduler(flags.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 1, 2, kwargs)
        Trainer.get_optimizer_cls_and_kwargs(argparse.Namespace(**vars(flags), parallel_mode=None))
    except (ImportError, ValueError, TypeError) as error:
        if "pass a" not in str(error):  # GaLore and LOMO look at the model, which is not loaded yet
            return [f"--optim {flags.optim} or --lr_scheduler_type {flags.lr_scheduler_type}: {error}"]
    return []

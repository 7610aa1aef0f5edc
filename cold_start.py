"""Cold start: a short supervised stage before GRPO, after which the policy writes the required format.

A policy that never writes the format earns nothing for it, whatever it samples: no group has a reward spread, and
nothing is learned. DeepSeek-R1 (arXiv 2501.12948, section 2.3.1) fine-tunes on a few thousand examples first; a format
takes far fewer. Two sources:

- "dataset": the dataset's own rationales in the format. They are terse, and the policy will reason as they do.
- "self": the policy's own sampled answers to a prompt with one worked example, kept where they are right and in the
  format (rejection sampling). The policy keeps its own way of reasoning, but must succeed sometimes.

OUTPUT_DIR/cold-start/ holds the examples (examples.jsonl), the policy after the stage, and done.json once it is whole;
a restarted run goes on from what is there.
"""

import json
import random
import re
import shutil
from pathlib import Path

from evaluate import complete, load_policy, score
from gsm8k import BadInput, to_prompt
from processes import count, is_main, on_main, wait
from record import printable, recorded, write_whole
from rewards import XML_COT_FORMAT, is_strict_format
from safeguards import (
    LARGE_REMEDIES,
    check_disk,
    checkpoints,
    differences,
    faults_explained,
    newest_whole,
    protect,
    save_policy,
)

FOLDER = "cold-start"
TRIES = 8  # "self": problems tried for each example wanted, before it gives up
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations, as in '3 * 4 = <<3*4=12>>12'


# ---- examples


def target(rationale: str, answer: str) -> str:
    """A solution in exactly the format that the rewards pay in full, without the format's last newline: EOS follows."""
    reasoning = ANNOTATION.sub("", rationale).strip()
    return XML_COT_FORMAT.format(reasoning=reasoning, answer=answer.replace(",", "")).rstrip("\n")


def _example(sample: dict, text: str) -> dict:
    """What SFTTrainer trains on: the loss is on the completion alone."""
    return {"prompt": sample["prompt"], "completion": [{"role": "assistant", "content": text}]}


def from_dataset(samples: list[dict], count: int, config, tokenizer) -> list[dict]:
    """`count` of the samples with their rationales, of those that the rewards pay in full and that fit in
    MAX_COMPLETION_LENGTH: a longer one would teach GRPO's policy to be cut off.

    Raises:
        BadInput: too few fit.
    """
    drawn = random.Random(config.seed).sample(samples, len(samples))
    examples = [_example(sample, target(sample["rationale"], sample["answer"])) for sample in drawn]
    limit = config.max_completion_length - 1  # tokens, and one for EOS
    lengths = [len(ids) for ids in tokenizer([_text(example) for example in examples])["input_ids"]]
    fits = [
        length <= limit and is_strict_format(_text(example)) for example, length in zip(examples, lengths, strict=True)
    ]
    if sum(fits) < count:
        raise BadInput(
            f"COLD_START_EXAMPLES is {count:,}, but only {sum(fits):,} solutions of {len(samples):,} fit in "
            f"MAX_COMPLETION_LENGTH = {config.max_completion_length} tokens and have a rationale. Lower the one or "
            "raise the other"
        )
    print(
        f"cold start: {fits.count(False):,} of {len(samples):,} solutions are not to be shown: longer than "
        f"MAX_COMPLETION_LENGTH = {config.max_completion_length} tokens, or without a rationale"
    )
    return [example for example, fit in zip(examples, fits, strict=True) if fit][:count]


def _text(example: dict) -> str:
    return example["completion"][0]["content"]


def from_itself(samples: list[dict], count: int, config, policy, tokenizer) -> list[dict]:
    """`count` right and well-formatted answers of the policy, one try a problem.

    Raises:
        BadInput: too few of `TRIES` x `count` problems were answered so.
    """
    import torch

    torch.manual_seed(config.seed)
    tried, kept = 0, []
    problems = random.Random(config.seed).sample(samples, min(len(samples), TRIES * count))
    device, at_once = policy.device.type, config.generation_batch_size
    while len(kept) < count and tried < len(problems):
        batch = problems[tried : tried + at_once]
        prompts = [to_prompt(sample["prompt"][-1]["content"], one_shot=True) for sample in batch]
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            completions = complete(
                policy,
                tokenizer,
                prompts,
                config.max_completion_length,
                at_once,
                config.chat_template_kwargs,
                temperature=config.temperature,
            )
        tried += len(batch)
        for sample, completion in zip(batch, completions, strict=True):
            problem = {"question": sample["prompt"][-1]["content"], "answer": sample["answer"]}
            if score(0, problem, completion)["strict"]:
                kept.append(_example(sample, completion["text"].strip()))
        print(f"cold start: {len(kept)} of {tried} answers are right and in the format")
    if len(kept) < count:
        raise BadInput(
            f"COLD_START_SOURCE 'self': {len(kept)} of {tried} answers of the policy were right and in the format, and "
            f"COLD_START_EXAMPLES asks for {count}. Lower it, raise MAX_COMPLETION_LENGTH where answers are cut off, "
            "or take COLD_START_SOURCE 'dataset'"
        )
    return kept[:count]


# ---- the stage


def prepare(recipe, config, model_config, tokenizer, samples: list[dict], facts: dict) -> tuple[Path, list[dict]]:
    """Fine-tune the policy on COLD_START_EXAMPLES of the samples, unless an earlier start has.

    Args:
        samples: `prompt`, `answer` and `rationale` of each training problem.
        facts: for run.json, which is written before the stage begins.

    Returns:
        The folder of the policy (an adapter, with LoRA), and the samples that are left for GRPO.

    Raises:
        BadInput: there are not that many problems, or the policy has answered too few.
        RunStopped: a signal, a full disk or a NaN ended the stage.
    """
    import gc

    import torch

    folder, count = Path(config.output_dir) / FOLDER, recipe.cold_start_examples
    if config.resume_from_checkpoint and (Path(config.resume_from_checkpoint).parent / FOLDER / "done.json").is_file():
        folder = Path(config.resume_from_checkpoint).parent / FOLDER
    needed = config.generation_batch_size // config.num_generations
    if count > len(samples) - (0 if recipe.cold_start_reuse else needed):
        raise BadInput(
            f"COLD_START_EXAMPLES is {count:,}, of {len(samples):,} problems, and GRPO needs {needed} others at a "
            "time. Lower it"
        )
    if (folder / "done.json").is_file():
        _check_settings(folder, recipe, config, model_config)
    else:
        examples = on_main(_examples, folder, recipe, config, model_config, tokenizer, samples)
        trainer = build_trainer(folder, examples, recipe, config, model_config, tokenizer)
        with recorded(Path(config.output_dir), done="cold start finished", **facts):
            folder.mkdir(exist_ok=True, parents=True)
            if is_main() and not (folder / "examples.jsonl").is_file():
                write_whole(folder / "examples.jsonl", "".join(json.dumps(example) + "\n" for example in examples))
            teach(trainer, folder, _settings(recipe, config, model_config), config)
        del trainer  # its weights and optimizer, before GRPO's
        gc.collect()
        torch.cuda.empty_cache()
    shown = {example["prompt"][-1]["content"] for example in _read(folder)}
    print(f"cold start: {folder} holds the policy that was shown {len(shown):,} problems", end="; ")
    if recipe.cold_start_reuse:
        print(f"GRPO sees all {len(samples):,}, as COLD_START_REUSE says")
        return folder, samples
    left = [sample for sample in samples if sample["prompt"][-1]["content"] not in shown]
    print(f"the other {len(left):,} are left for GRPO")
    return folder, left


def _read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]


def _settings(recipe, config, model_config) -> dict:
    """What the policy after the stage depends on."""
    stage = ("examples", "source", "learning_rate", "epochs", "batch_size")
    settings = {f"cold_start_{name}": getattr(recipe, f"cold_start_{name}") for name in stage}
    return {
        **settings,
        "model": model_config.model_name_or_path,
        "use_peft": model_config.use_peft,
        "seed": config.seed,
    }


def _check_settings(folder: Path, recipe, config, model_config) -> None:
    """A stage that is done stays as it is: with other settings it would have to be done anew."""
    now, then = _settings(recipe, config, model_config), json.loads((folder / "done.json").read_text())["settings"]
    if changes := differences(then, now):
        raise BadInput(
            f"{folder} was made with other settings ({'; '.join(changes)}): give those, or a new --output_dir"
        )


def _examples(folder: Path, recipe, config, model_config, tokenizer, samples: list[dict]) -> list[dict]:
    """The stage's examples: those that an earlier start wrote down, else new ones."""
    if (folder / "examples.jsonl").is_file():
        return _read(folder)
    if recipe.cold_start_source == "dataset":
        return from_dataset(samples, recipe.cold_start_examples, config, tokenizer)
    name, revision = model_config.model_name_or_path, model_config.model_revision
    policy = load_policy(name, revision, config.use_cpu, config.trust_remote_code)
    return from_itself(samples, recipe.cold_start_examples, config, policy, tokenizer)


def build_trainer(folder: Path, examples: list[dict], recipe, config, model_config, tokenizer):
    """TRL's SFTTrainer on the examples."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

    print(f"cold start: {len(examples):,} examples, source {recipe.cold_start_source!r}. The first:")
    print(printable(_text(examples[0])))
    share = recipe.cold_start_batch_size // count()
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= config.per_device_train_batch_size)
    disable_progress_bars()  # four of them for a second's work
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.cold_start_epochs,
        per_device_train_batch_size=size,  # as many at a time as GRPO, for which memory was computed
        gradient_accumulation_steps=share // size,
        learning_rate=recipe.cold_start_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        completion_only_loss=True,
        max_length=None,  # prompts are limited already; a solution that is cut would teach to stop in the middle
        model_init_kwargs=config.model_init_kwargs,
        trust_remote_code=config.trust_remote_code,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        fp16=config.fp16,
        use_cpu=config.use_cpu,
        seed=config.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=5,
        logging_nan_inf_filter=False,
        report_to="none",
    )
    kwargs = {"chat_template_kwargs": config.chat_template_kwargs} if config.chat_template_kwargs else {}
    try:
        trainer = SFTTrainer(
            model=model_config.model_name_or_path,
            args=args,
            train_dataset=Dataset.from_list([{**example, **kwargs} for example in examples]),
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_config),
            peft_config=get_peft_config(model_config),
        )
    # no safetensors, a setting that TRL refuses, a package that is not installed
    except (OSError, ValueError, ImportError) as error:
        name = model_config.model_name_or_path
        raise BadInput(f"the cold start cannot be built for model {name!r}: {str(error).strip()}") from error
    if model_config.load_in_4bit:
        keep_in_fp32(trainer.model)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def keep_in_fp32(model) -> None:
    """Cast what is trained to fp32: TRL casts the adapter of a 4-bit model to bf16, where small updates round away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def teach(trainer, folder: Path, settings: dict, config) -> None:
    """Supervised fine-tuning; leaves the policy in `folder`, and done.json with the `settings` when it is whole."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                done, accuracy = f"{state.global_step}/{state.max_steps}", logs["mean_token_accuracy"]
                print(f"cold start {done}  loss {logs['loss']:.3f}  token accuracy {accuracy:.1%}", flush=True)

    trainer.add_callback(Lines())
    check_disk(trainer)
    guard = protect(trainer)
    checkpoint, skipped = newest_whole(folder)
    for line in skipped:
        print(f"cold start: {line}")
    remedies = [f"COLD_START_BATCH_SIZE below {settings['cold_start_batch_size']}", *LARGE_REMEDIES]
    with guard.listening(), faults_explained(config, remedies):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        guard.end()
        save_policy(trainer)
        if is_main():
            done = {"settings": settings, "log": trainer.state.log_history}
            write_whole(folder / "done.json", json.dumps(done, indent=2) + "\n")
        guard.end(more_follows=True)
    for path in checkpoints(folder) if is_main() else ():
        shutil.rmtree(path)
    wait()


def load_adapter(folder: Path, config, model_config):
    """The model with the stage's adapter on it, to be trained on."""
    from peft import PeftModel
    from trl import get_quantization_config
    from trl.trainer.utils import create_model_from_path

    quantization = get_quantization_config(model_config)
    options = {**config.model_init_kwargs, **({"quantization_config": quantization} if quantization else {})}
    if count() > 1:  # each process has a copy on its own device, instead of parts on all
        options["device_map"] = None
    model = create_model_from_path(
        model_config.model_name_or_path, trust_remote_code=config.trust_remote_code, **options
    )
    return PeftModel.from_pretrained(model, folder, is_trainable=True)

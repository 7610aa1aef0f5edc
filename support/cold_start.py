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

import gc
import json
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from rewards import XML_COT_FORMAT, is_strict_format, to_prompt
from support import processes
from support.checkpoints import checkpoints, newest_whole
from support.errors import BadInput
from support.evaluation import score
from support.faults import faults_explained, protected
from support.generation import complete, load_policy
from support.memory import FIXED_PASS, LARGE_REMEDIES, longest
from support.progress import Pace
from support.record import printable, write_whole
from support.resuming import differences

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


def from_dataset(samples: list[dict], count: int, settings, tokenizer) -> list[dict]:
    """`count` of the samples with their rationales, of those that the rewards pay in full and that fit in
    MAX_COMPLETION_LENGTH: a longer one would teach GRPO's policy to be cut off.

    Raises:
        BadInput: too few fit.
    """
    drawn = random.Random(settings.seed).sample(samples, len(samples))
    examples = [_example(sample, target(sample["rationale"], sample["answer"])) for sample in drawn]
    limit = settings.max_completion_length - 1  # tokens, and one for EOS
    lengths = [len(ids) for ids in tokenizer([_text(example) for example in examples])["input_ids"]]
    fits = [
        length <= limit and is_strict_format(_text(example)) for example, length in zip(examples, lengths, strict=True)
    ]
    if sum(fits) < count:
        raise BadInput(
            f"COLD_START_EXAMPLES is {count:,}, but only {sum(fits):,} solutions of {len(samples):,} fit in "
            f"MAX_COMPLETION_LENGTH = {settings.max_completion_length} tokens and have a rationale. Lower the one or "
            "raise the other"
        )
    print(
        f"cold start: {fits.count(False):,} of {len(samples):,} solutions are not to be shown: longer than "
        f"MAX_COMPLETION_LENGTH = {settings.max_completion_length} tokens, or without a rationale"
    )
    return [example for example, fit in zip(examples, fits, strict=True) if fit][:count]


def _text(example: dict) -> str:
    return example["completion"][0]["content"]


def from_itself(samples: list[dict], count: int, settings, policy, tokenizer) -> list[dict]:
    """`count` right and well-formatted answers of the policy, one try a problem.

    Raises:
        BadInput: too few of `TRIES` x `count` problems were answered so.
    """
    import torch

    torch.manual_seed(settings.seed)
    tried, kept = 0, []
    problems = random.Random(settings.seed).sample(samples, min(len(samples), TRIES * count))
    device, at_once = policy.device.type, settings.generation_batch_size // settings.world_size  # this process alone
    while len(kept) < count and tried < len(problems):
        batch = problems[tried : tried + at_once]
        prompts = [to_prompt(sample["prompt"][-1]["content"], one_shot=True) for sample in batch]
        with torch.autocast(device, torch.bfloat16, enabled=settings.bf16):
            completions = complete(
                policy,
                tokenizer,
                prompts,
                settings.max_completion_length,
                at_once,
                settings.chat_template_kwargs,
                temperature=settings.temperature,
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


def cold_start(settings, tokenizer, samples: list[dict], run) -> tuple:
    """Fine-tune the policy on COLD_START_EXAMPLES of the samples, unless an earlier start has.

    Args:
        samples: `prompt`, `answer` and `rationale` of each training problem.
        run: run.json, which is begun before the stage is.

    Returns:
        The policy as GRPOTrainer takes it: its name where there is no cold start, else the folder that the stage left
        or, with LoRA, the model with its adapter on it; and the samples that are left for GRPO.

    Raises:
        BadInput: there are not that many problems, or the policy has answered too few.
        RunStopped: a signal, a full disk or a NaN ended the stage.
    """
    import torch

    if not settings.cold_start_examples:
        return settings.model_name_or_path, samples
    folder = _folder(settings)
    _check_count(settings, samples)
    _check_settings(folder, settings)
    if not (folder / "done.json").is_file():
        examples = processes.on_main(_examples, folder, settings, tokenizer, samples)
        _teach(settings, folder, examples, tokenizer, run)
        gc.collect()  # the stage's weights and optimizer, before GRPO's
        torch.cuda.empty_cache()
        if settings.deepspeed_plugin:
            _forget_deepspeed(settings)
    for path in checkpoints(folder) if processes.is_main() else ():
        shutil.rmtree(path)
    processes.wait()
    shown = {example["prompt"][-1]["content"] for example in _read(folder)}
    left = [sample for sample in samples if sample["prompt"][-1]["content"] not in shown]
    print(f"cold start: {folder} holds the policy that was shown {len(shown):,} problems", end="; ")
    if settings.cold_start_reuse:
        print(f"GRPO sees all {len(samples):,}, as COLD_START_REUSE says")
    else:
        print(f"the other {len(left):,} are left for GRPO")
    policy = _load_adapter(folder, settings) if settings.use_peft else str(folder)
    return policy, samples if settings.cold_start_reuse else left


def _forget_deepspeed(settings) -> None:
    """GRPO's trainer shards anew, with a plugin of its own, which accelerate takes from a first trainer alone."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    settings.deepspeed_plugin.set_deepspeed_weakref()  # Transformers takes the newest settings' for the one in use


@contextmanager
def _sharding_kept(trainer):
    """FSDP saves a training's final policy whole, and has to go on as accelerate was told after this stage."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in names} if plugin else {}
    yield
    for name, value in before.items():
        setattr(plugin, name, value)


def _folder(settings) -> Path:
    """Where the stage's results are: in the run's folder, or beside a checkpoint that is resumed from elsewhere."""
    elsewhere = Path(settings.resume_from_checkpoint or settings.output_dir).parent / FOLDER
    if settings.resume_from_checkpoint and (elsewhere / "done.json").is_file():
        return elsewhere
    return Path(settings.output_dir) / FOLDER


def _check_count(settings, samples: list[dict]) -> None:
    count, needed = settings.cold_start_examples, settings.generation_batch_size // settings.num_generations
    if count > len(samples) - (0 if settings.cold_start_reuse else needed):
        raise BadInput(
            f"COLD_START_EXAMPLES is {count:,}, of {len(samples):,} problems, and GRPO needs {needed} others at a "
            "time. Lower it"
        )


def _read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]


def _stage(settings) -> dict:
    """What the policy after the stage depends on."""
    names = ("examples", "source", "learning_rate", "epochs", "batch_size")
    return {
        **{f"cold_start_{name}": getattr(settings, f"cold_start_{name}") for name in names},
        "model": settings.model_name_or_path,
        "use_peft": settings.use_peft,
        "seed": settings.seed,
    }


def _check_settings(folder: Path, settings) -> None:
    """A stage that is done, or begun, stays as it is: with other settings it would have to be done anew."""
    now = _stage(settings)
    if (folder / "done.json").is_file():
        then = json.loads((folder / "done.json").read_text())["settings"]
    elif (folder / "begun.json").is_file():
        then = json.loads((folder / "begun.json").read_text())
        del now["cold_start_batch_size"]  # what is lowered where memory was short
    else:
        return
    if changes := differences(then, now):
        raise BadInput(
            f"{folder} was made with other settings ({'; '.join(changes)}): give those, or a new --output_dir"
        )


def _examples(folder: Path, settings, tokenizer, samples: list[dict]) -> list[dict]:
    """The stage's examples: those that an earlier start wrote down, else new ones."""
    if (folder / "examples.jsonl").is_file():
        return _read(folder)
    count = settings.cold_start_examples
    if settings.cold_start_source == "dataset":
        return from_dataset(samples, count, settings, tokenizer)
    if settings.deepspeed_plugin and settings.deepspeed_plugin.zero_stage == 3:
        raise BadInput(
            "COLD_START_SOURCE = 'self' with ZeRO-3: one process alone cannot load the policy that it samples from. "
            "Use ZeRO-2 or FSDP, or COLD_START_SOURCE = 'dataset'"
        )
    trust = settings.trust_remote_code
    policy = load_policy(settings.model_name_or_path, settings.model_revision, settings.use_cpu, trust)
    return from_itself(samples, count, settings, policy, tokenizer)


def build_trainer(settings, folder: Path, examples: list[dict], tokenizer):
    """TRL's SFTTrainer on the examples."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, get_peft_config, get_quantization_config

    from support.trainer import SFTTrainer

    share = settings.cold_start_batch_size // processes.count()
    fitting = max(1, (settings.tokens_per_pass or FIXED_PASS) // longest(settings))
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)
    disable_progress_bars()  # four of them for a second's work
    same = ("model_init_kwargs", "trust_remote_code", "gradient_checkpointing", "bf16", "fp16", "use_cpu", "seed")
    same = (*same, "save_strategy", "save_steps")
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.cold_start_epochs,
        per_device_train_batch_size=size,  # at most as many tokens at a time as GRPO, for which memory was computed
        gradient_accumulation_steps=share // size,
        learning_rate=settings.cold_start_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        completion_only_loss=True,
        max_length=None,  # prompts are limited already; a solution that is cut would teach to stop in the middle
        save_total_limit=1,
        logging_steps=5,
        logging_nan_inf_filter=False,
        report_to="none",
        **{name: getattr(settings, name) for name in same},
    )
    kwargs = {"chat_template_kwargs": settings.chat_template_kwargs} if settings.chat_template_kwargs else {}
    trainer = SFTTrainer(
        model=settings.model_name_or_path,
        args=args,
        train_dataset=Dataset.from_list([{**example, **kwargs} for example in examples]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(settings),
        peft_config=get_peft_config(settings),
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def _teach(settings, folder: Path, examples: list[dict], tokenizer, run) -> None:
    """Supervised fine-tuning; leaves the policy in `folder`, and done.json with the stage's settings when it is
    whole."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.pace = Pace(state)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                done, accuracy = f"{state.global_step}/{state.max_steps}", logs["mean_token_accuracy"]
                line = f"cold start {done}  loss {logs['loss']:.3f}  token accuracy {accuracy:.1%}"
                print(f"{line}  {self.pace.left(state)}", flush=True)

    print(f"cold start: {len(examples):,} examples, source {settings.cold_start_source!r}. The first:")
    print(printable(_text(examples[0])))
    trainer = build_trainer(settings, folder, examples, tokenizer)
    trainer.add_callback(Lines())
    remedies = [f"COLD_START_BATCH_SIZE below {settings.cold_start_batch_size}", *LARGE_REMEDIES]
    folder.mkdir(exist_ok=True, parents=True)
    with faults_explained(settings, remedies), protected(trainer, run, more_follows=True), _sharding_kept(trainer):
        if processes.is_main() and not (folder / "examples.jsonl").is_file():
            write_whole(folder / "begun.json", json.dumps(_stage(settings), indent=2) + "\n")
            write_whole(folder / "examples.jsonl", "".join(json.dumps(example) + "\n" for example in examples))
        checkpoint, skipped = newest_whole(folder)
        for line in skipped:
            print(f"cold start: {line}")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.save_model()
        if processes.is_main():
            done = {"settings": _stage(settings), "log": trainer.state.log_history}
            write_whole(folder / "done.json", json.dumps(done, indent=2) + "\n")


def _load_adapter(folder: Path, settings):
    """The model with the stage's adapter on it, to be trained on."""
    from peft import PeftModel
    from trl import get_quantization_config
    from trl.trainer.utils import create_model_from_path

    quantization = get_quantization_config(settings)
    options = {**settings.model_init_kwargs, **({"quantization_config": quantization} if quantization else {})}
    if processes.count() > 1:  # each process has a copy on its own device, instead of parts on all
        options["device_map"] = None
    trust = settings.trust_remote_code
    model = create_model_from_path(settings.model_name_or_path, trust_remote_code=trust, **options)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)

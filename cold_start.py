"""Cold start: teach a model the format by supervised fine-tuning, for train_grpo.py to begin from.

    python cold_start.py --output_dir outputs/cold
    python train_grpo.py --model_name_or_path outputs/cold

A policy that never writes the format earns nothing for it, whatever it samples: every group has advantage 0, and
nothing is learned. DeepSeek-R1 (arXiv 2501.12948, section 2.3.1) fine-tunes on a few thousand examples first; a format
takes far fewer. Two sources:

- "dataset": the dataset's own rationales in the format. They are terse, and the policy will reason as they do.
- "self": the model's own sampled answers to a prompt with one worked example, kept where they are right and in the
  format (rejection sampling). The policy keeps its own way of reasoning, but must succeed sometimes.

What is left is an ordinary model folder, with LoRA too, and examples.jsonl, whose problems train_grpo.py leaves out.

A constant below is its flag in capitals, as in train_grpo.py: any flag of TRL's SFTConfig and ModelConfig can be added.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

import json
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

import rewards
from support import memory, problems
from support.errors import BadInput
from support.evaluation import score
from support.faults import watched
from support.generation import as_completion, complete, load_policy
from support.problems import drop_long, end_of_turn, examples_in, load_problems, load_tokenizer, tokenize
from support.progress import Pace
from support.record import printable, write_whole
from support.settings import Common, own_flag, read_settings
from support.trainer import SFTTrainer, merge_adapter

# ---- policy
MODEL_NAME_OR_PATH = "Qwen/Qwen2.5-1.5B-Instruct"  # on the Hub, or a folder; an instruct model, for its chat template
CHAT_TEMPLATE_KWARGS = {}  # Qwen3 needs {"enable_thinking": False}: the reasoning belongs in our tags
SYSTEM_PROMPT_IN_QUESTION = False  # True for a chat template that takes no system prompt; give train_grpo.py the same

# ---- data
DATASET_NAME = "openai/gsm8k"  # on the Hub, a folder with train.jsonl and test.jsonl, or other files (docs)
DATASET_CONFIG = "main"  # of a dataset that has several
QUESTION_COLUMN = "question"
ANSWER_COLUMN = "answer"  # a number, or a rationale and "#### number"
DROP_NON_NUMERIC = False  # True drops rows whose answer is no number, and counts them; False refuses the data
EXAMPLES = 256  # problems shown with a solution in the format; 64 to 512 are plenty
SOURCE = "dataset"  # its own rationales; or "self": the model's right and well-formatted one-shot answers
TEMPERATURE = 0.9  # of the model's own answers
MAX_PROMPT_LENGTH = 256  # tokens, chat template included; longer prompts are dropped, and counted
MAX_COMPLETION_LENGTH = 512  # tokens; a longer solution is not shown: it would teach to be truncated in GRPO
ONE_SHOT = False  # True puts a worked example before every question; give train_grpo.py the same

# ---- run
OUTPUT_DIR = None  # None: outputs/<the model's name>-cold
SEED = 42
NUM_TRAIN_EPOCHS = 2
SAVE_STEPS = 100  # between checkpoints
SAVE_TOTAL_LIMIT = 1
LOGGING_STEPS = 5

# ---- batch
PER_DEVICE_TRAIN_BATCH_SIZE = 16  # examples a step; divided among the GPUs
GRADIENT_ACCUMULATION_STEPS = 1  # above 1 multiplies the examples of a step; for a GPU too small, with a smaller batch
GRADIENT_CHECKPOINTING = True  # recompute activations in backward: a short stage, on any GPU that GRPO fits on
MAX_LENGTH = None  # no solution is truncated, which would teach to stop in the middle: those too long are not shown

# ---- optimizer
LEARNING_RATE = 1e-5
LR_SCHEDULER_TYPE = "cosine"
WARMUP_STEPS = 0.1  # share of all steps

# ---- LoRA, with --use_peft true
ADAPTER = None  # of a MODEL_NAME_OR_PATH that is an adapter: "train" it further, or "merge" it into its model first
LORA_R = 32
LORA_TARGET_MODULES = ["all-linear"]  # every linear layer but the output layer; attention alone learns less at any rank
LORA_DROPOUT = 0.0
LORA_LEARNING_RATE_FACTOR = 10  # LoRA wants about 10x the full model's rate; a given --learning_rate is not multiplied

# ---- precision
DTYPE = "float32"  # master weights: in bf16 most of a small update rounds away
BF16 = True  # compute in bf16


# ---- examples


@dataclass
class ColdStartSettings(Common, SFTConfig, ModelConfig):
    """Every setting of a cold start under the name of its flag."""

    examples: int = own_flag("Problems shown with a solution.")
    source: str = own_flag("'dataset', or 'self': the model's own right answers.")
    temperature: float = own_flag("Of the model's own answers.")
    max_completion_length: int = own_flag("Tokens of a solution, at most.")
    chat_template_kwargs: dict | str | None = own_flag("JSON for the model's chat template.")  # noqa: RUF009

    def __post_init__(self):
        SFTConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        self.complete()


# ---- examples


def target(rationale: str, answer: str) -> str:
    """A solution in exactly the format that the rewards pay in full, without the format's last newline: EOS follows."""
    reasoning = re.sub(r"<<[^<>]*>>", "", rationale).strip()  # GSM8K's '3 * 4 = <<3*4=12>>12'
    number = rewards.parse_number(answer)
    whole = number.to_integral_value()  # of $18.00 the rewards pay 18 in full
    number = f"{whole if whole == number else number:f}"
    return rewards.XML_COT_FORMAT.format(reasoning=reasoning, answer=number).rstrip("\n")


def _example(sample: dict, text: str) -> dict:
    """What SFTTrainer trains on: the loss is on the completion alone."""
    return {"prompt": sample["prompt"], "completion": [{"role": "assistant", "content": text}]}


def _text(example: dict) -> str:
    return example["completion"][0]["content"]


def load_samples(settings, tokenizer) -> tuple[list[dict], str | None]:
    """Problems (`prompt`, `answer`, `rationale`) whose prompt fits, in an order that SEED draws, and the dataset's
    revision on the Hub."""
    problems, revision = load_problems(settings, settings.dataset_train_split)
    form = {"one_shot": settings.one_shot, "in_question": settings.system_prompt_in_question}
    samples = [{**each, "prompt": rewards.to_prompt(each["question"], **form)} for each in problems]
    kept = drop_long(samples, tokenizer, settings)
    limit = f"MAX_PROMPT_LENGTH = {settings.max_prompt_length} tokens"
    if not kept:
        raise BadInput(f"all {len(samples):,} prompts are over {limit}: raise it")
    print(f"{len(kept):,} problems to choose from; {len(samples) - len(kept):,} dropped, the prompt over {limit}")
    check_turn(samples[0]["prompt"], tokenizer, settings.chat_template_kwargs or {})
    return random.Random(settings.seed).sample(kept, len(kept)), revision


def check_turn(prompt: list[dict], tokenizer, chat_template_kwargs: dict) -> None:
    """BadInput where the model's chat template makes of a solution what no reward pays in full, with what to change."""
    if wrong := _never_paid(prompt, tokenizer, chat_template_kwargs):
        remedy = "Mend chat_template.jinja in a copy of the model's folder"
        for switch in ("enable_thinking", "thinking"):
            switched = {**chat_template_kwargs, switch: False}
            if not _never_paid(prompt, tokenizer, switched):
                words = shlex.quote(json.dumps(switched))
                remedy = f"Say --chat_template_kwargs {words}, here and to train_grpo.py"
        raise BadInput(f"model {tokenizer.name_or_path!r}: in its chat template {wrong}, which is never paid. {remedy}")


def _never_paid(prompt: list[dict], tokenizer, chat_template_kwargs: dict) -> str | None:
    """What is wrong with an example in the model's chat template, cut into prompt and completion as by SFTTrainer; None
    where it is the solution alone, behind the prompt that GRPO samples from, and ends in the token that ends a turn."""
    turn = [*prompt, *_example({"prompt": prompt}, rewards.ONE_SHOT_ANSWER)["completion"]]
    (asked,) = tokenize(tokenizer, [prompt], chat_template_kwargs)
    try:
        token_ids = tokenizer.apply_chat_template(turn, return_dict=True, **chat_template_kwargs)["input_ids"]
    except problems.TEMPLATE_FAULTS as error:
        return f"an example is refused ({error})"
    if token_ids[: len(asked)] != asked:
        return f"an example would not begin with GRPO's prompt, which ends in {tokenizer.decode(asked)[-40:]!r}"
    taught = token_ids[len(asked) :]
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer) or "")
    if end not in taught:
        return f"an example would not end in a token that ends a turn, but in {tokenizer.decode(taught)[-40:]!r}"
    taught = taught[: taught.index(end) + 1]
    if not rewards.is_strict_format(as_completion(tokenizer, asked, taught, False)["text"]):
        text = tokenizer.decode(taught)
        return f"an example would be {text[:40]!r}...{text[-40:]!r}"
    return None


def from_dataset(samples: list[dict], settings, tokenizer) -> list[dict]:
    """EXAMPLES of the samples with their rationales, of those that are in the format and fit in MAX_COMPLETION_LENGTH;
    BadInput where too few are."""
    if not any(sample["rationale"] for sample in samples):
        raise BadInput(
            f"SOURCE is 'dataset', but no answer in {settings.dataset_name} has a rationale in front of '####' that "
            "could be shown. SOURCE = 'self' shows the model's own right answers"
        )
    examples = [_example(sample, target(sample["rationale"], sample["answer"])) for sample in samples]
    limit = settings.max_completion_length - 1  # tokens, and one for EOS
    lengths = [len(ids) for ids in tokenizer([_text(example) for example in examples])["input_ids"]]
    pairs = zip(examples, lengths, strict=True)
    fit = [example for example, length in pairs if length <= limit and rewards.is_strict_format(_text(example))]
    why = f"longer than MAX_COMPLETION_LENGTH = {settings.max_completion_length} tokens, or without a rationale"
    if len(fit) < settings.examples:
        raise BadInput(
            f"EXAMPLES is {settings.examples:,}, but only {len(fit):,} solutions of {len(samples):,} can be shown; the "
            f"others are {why}. Lower the one or raise the other, or take SOURCE 'self'"
        )
    print(f"{len(samples) - len(fit):,} of {len(samples):,} solutions cannot be shown: {why}")
    return fit[: settings.examples]


def from_itself(samples: list[dict], settings, policy, tokenizer) -> list[dict]:
    """EXAMPLES right and well-formatted answers of the policy, one try a problem; BadInput where it answered too few of
    8 x EXAMPLES problems so."""
    torch.manual_seed(settings.seed)
    tried, kept, wanted = 0, [], settings.examples
    problems = samples[: 8 * wanted]
    while len(kept) < wanted and tried < len(problems):
        batch = problems[tried : tried + 64]
        form = {"one_shot": True, "in_question": settings.system_prompt_in_question}
        prompts = [rewards.to_prompt(sample["question"], **form) for sample in batch]
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=settings.bf16):
            how = {"chat_template_kwargs": settings.chat_template_kwargs, "temperature": settings.temperature}
            completions = complete(policy, tokenizer, prompts, settings.max_completion_length, **how)
        tried += len(batch)
        for sample, completion in zip(batch, completions, strict=True):
            if score(0, sample, completion)["strict"]:
                kept.append(_example(sample, completion["text"].strip()))
        print(f"{len(kept)} of {tried} answers are right and in the format")
    if len(kept) < wanted:
        raise BadInput(
            f"SOURCE 'self': {len(kept)} of {tried} answers of the policy were right and in the format, and EXAMPLES "
            f"asks for {wanted}. Lower it, raise MAX_COMPLETION_LENGTH where answers are truncated, or take SOURCE "
            "'dataset'"
        )
    return kept[:wanted]


def choose_examples(settings, tokenizer, samples: list[dict]) -> list[dict]:
    """The examples: a resumed run's own, else new ones."""
    place = Path(settings.resume_from_checkpoint or settings.output_dir)
    if settings.is_resumed and (examples := examples_in(place)):
        if len(examples) != settings.examples:
            raise BadInput(f"EXAMPLES is {settings.examples}, and {place} was begun with {len(examples)}: give those")
        return examples
    if settings.source == "dataset":
        return from_dataset(samples, settings, tokenizer)
    if settings.deepspeed_plugin and settings.deepspeed_plugin.zero_stage == 3:
        raise BadInput(
            "SOURCE = 'self' with ZeRO-3: one process alone cannot load the policy that it samples from. Use ZeRO-2 or "
            "FSDP, or SOURCE = 'dataset'"
        )
    name, trust = settings.model_name_or_path, settings.trust_remote_code
    policy = load_policy(name, settings.model_revision, settings.use_cpu, trust)
    return from_itself(samples, settings, policy, tokenizer)


# ---- training


class Lines(TrainerCallback):
    """Writes the examples down after the first step, as run.json; prints a line a logging step."""

    def __init__(self, examples: list[dict]):
        self.examples = examples

    def on_train_begin(self, args, state, control, **kwargs):
        self.pace = Pace(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.examples:
            lines = "".join(json.dumps(example) + "\n" for example in self.examples)
            write_whole(Path(args.output_dir) / "examples.jsonl", lines)
            self.examples = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            done = f"{state.global_step}/{state.max_steps}"
            line = f"step {done}  loss {logs['loss']:.3f}  token accuracy {logs['mean_token_accuracy']:.1%}"
            print(f"{line}  {self.pace.left(state)}", flush=True)


def build_trainer(settings, tokenizer, examples: list[dict], run) -> SFTTrainer:
    """TRL's SFTTrainer, whose loss is on the completions alone."""
    disable_progress_bars()  # four of them for a second's work
    kwargs = {"chat_template_kwargs": settings.chat_template_kwargs} if settings.chat_template_kwargs else {}
    trainer = SFTTrainer(
        model=settings.model_name_or_path,
        args=settings,
        train_dataset=Dataset.from_list([{**example, **kwargs} for example in examples]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(settings),
        peft_config=get_peft_config(settings),
        run=run,
    )
    trainer.add_callback(Lines(examples))
    return trainer


def remedies(settings) -> list[str]:
    """What needs less memory, the most effective first."""
    first = [] if settings.gradient_checkpointing else ["GRADIENT_CHECKPOINTING = True"]
    return [*first, "half of PER_DEVICE_TRAIN_BATCH_SIZE, twice GRADIENT_ACCUMULATION_STEPS", *memory.LARGE_REMEDIES]


def next_command(settings) -> str:
    """What to type next: the same data and the same prompts, where they are not the constants'."""
    words = ["python", "train_grpo.py", "--model_name_or_path", settings.output_dir]
    data = ("dataset_name", "dataset_config", "question_column", "answer_column", "drop_non_numeric")
    splits = {"dataset_train_split": "train", "dataset_test_split": "test"}  # flags without a constant
    prompt = ("max_prompt_length", "chat_template_kwargs", "one_shot", "system_prompt_in_question")
    for name in (*data, *splits, *prompt):
        value = getattr(settings, name)
        if value != splits.get(name, globals().get(name.upper())):
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words + (["--use_cpu", "true"] if settings.use_cpu else []))


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(globals(), argv, ColdStartSettings)  # every error at once
    with watched(settings, remedies) as run:  # the folder's lock, run.json, one message for whatever goes wrong
        tokenizer = load_tokenizer(settings.model_name_or_path, settings.model_revision, settings.trust_remote_code)
        samples, revision = processes.on_main(load_samples, settings, tokenizer)
        run.knows(samples, revision)
        examples = processes.on_main(choose_examples, settings, tokenizer, samples)
        print(f"{len(examples):,} examples, source {settings.source!r}. The first:\n{printable(_text(examples[0]))}")
        trainer = build_trainer(settings, tokenizer, examples, run)
        trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
        trainer.save_model()
        if settings.use_peft:
            folder, ends = settings.output_dir, trainer.model.generation_config
            processes.on_main(merge_adapter, folder, Path(folder), settings, tokenizer, ends)
        trainer.save_state()
        print(f"saved: the taught policy, its tokenizer and examples.jsonl in {printable(settings.output_dir)}")
    print(f"next:  {printable(next_command(settings))}")


if __name__ == "__main__":
    main()

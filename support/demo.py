"""The demo's world: made-up sums as word problems, and a tiny policy whose teacher was careless.

`python train_grpo.py --demo` runs the real recipe on it, offline, in minutes on two CPU cores. The policy is a Qwen2 of
0.8M parameters with a small BPE tokenizer of its own. It is first taught sums with supervised learning, by a teacher
who writes the required format in 30% of the solutions and forgets the carry in 60% of the sums that have one. Greedy
decoding then picks the common way of both, so strict accuracy starts near 0 and lenient accuracy near 60%, while
sampling finds the rarer way often enough for GRPO to learn from: first the format, then the carry.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

from rewards import TAGS, XML_COT_FORMAT, to_prompt
from support.checksums import write_checksums
from support.comparison import compare, in_words, table
from support.evaluation import evaluate, task_of
from support.record import printable, write_whole

# teaching
TEACHING_STEPS = 700
TEACHING_BATCH_SIZE = 16  # targets a step; small steps and many of them: 500 of 32 learn it less well
TEACHING_LEARNING_RATE = 2e-3
TEACHING_WEIGHT_DECAY = 0.5  # held-out sums come out right more often than at 0.1 or 0
INITIALIZER_RANGE = 0.08  # about 1/sqrt(128), the hidden size; at Qwen2's 0.02 it can't add after 500 steps
FORMATTED_SHARE = 0.3  # of the solutions; the rest answer in plain words
FORGOTTEN_SHARE = 0.6  # of the sums with a carry, whose result is then 10 too small

# what a new demo removes of an earlier one in its folder, and nothing else
REPLACED = ["checkpoint-*[0-9]", "cold-start", "completions", "run.json", "evaluation*.json*", "curves*.png"]
REPLACED += ["model.safetensors", "config.json", "adapter_*", "checksums.txt", "trainer_state.json", "README.md"]

# problems
PAIRS = [(a, b) for a in range(10, 100) for b in range(1, 10)]  # 810 sums, half of them with a carry
HELD_OUT = 100  # pairs of summands that appear neither in teaching nor in GRPO, as two problems each

TEMPLATES = (
    "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in one box and {b} {things} in another. How many {things} are there in all?",
    "{name} sold {a} {things} on Monday and {b} {things} on Tuesday. How many {things} did {name} sell?",
    "A shelf holds {a} {things}. {name} puts {b} {things} next to them. How many {things} does the shelf hold?",
)
NAMES = ("Ada", "Ben", "Cleo", "Dev", "Elif", "Finn", "Gus", "Hana")
THINGS = ("shells", "stamps", "pears", "books", "cups", "coins", "kites", "pens")

# GRPO
LEARNING_RATE = 1e-4  # 20 times the recipe's: the policy is 2,000 times smaller
COLD_START_LEARNING_RATE = 5e-4  # for --cold_start_examples; a quarter of the teaching's
COLD_START_EPOCHS = 4
MAX_STEPS = 80
MAX_COMPLETION_LENGTH = 48  # tokens; a formatted answer takes about 35

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- settings


def settings() -> dict:
    """What the demo changes of the recipe's constants, under the flags' names; its policy and data follow from
    OUTPUT_DIR and SEED (`name_sources`)."""
    import torch

    has_gpu = torch.cuda.is_available()
    has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "model_name_or_path": None,
        "dataset_name": None,
        "dataset_config": None,
        "output_dir": "outputs/demo",
        "learning_rate": LEARNING_RATE,
        "cold_start_learning_rate": COLD_START_LEARNING_RATE,
        "cold_start_epochs": COLD_START_EPOCHS,
        "max_steps": MAX_STEPS,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "eval_steps": 10,
        "eval_problems": 100,
        "gradient_checkpointing": False,
        "use_vllm": False,  # its start takes longer than the demo
        "use_cpu": not has_gpu,
        "bf16": has_bf16,
    }


def name_sources(flags: argparse.Namespace) -> None:
    """Fill in where the demo's policy and problems are kept."""
    flags.model_name_or_path = str(_taught(flags.output_dir, flags.seed))
    flags.dataset_name = str(Path(flags.output_dir) / "problems")


def _taught(output_dir: str | Path, seed: int) -> Path:
    return Path(output_dir) / f"taught-{seed}"


def _teaching() -> dict:
    """The constants that the taught policy depends on."""
    names = [name for name in globals() if name.startswith("TEACHING_")]
    return {
        name: globals()[name]
        for name in (*names, "FORMATTED_SHARE", "FORGOTTEN_SHARE", "INITIALIZER_RANGE", "HELD_OUT")
    }


def prepare(settings) -> None:
    """Make the demo's world, and measure the policy that GRPO starts from. What an earlier demo's GRPO left is removed,
    aloud."""
    folder = Path(settings.output_dir)
    if not settings.is_resumed and (folder / "run.json").exists():
        print(f"{folder}: the earlier demo run there is replaced, its taught policies are kept")
        for pattern in REPLACED:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    make_world(settings.output_dir, settings.seed, settings.use_cpu)
    _measure(settings, settings.model_name_or_path, "before")


def make_world(output_dir: str | Path, seed: int, use_cpu: bool) -> Path:
    """Write the problems, and teach the policy unless an earlier demo with this seed left it; returns its folder."""
    problems, taught = Path(output_dir) / "problems", _taught(output_dir, seed)
    write_problems(problems)
    if taught.exists() and json.loads((taught / "teaching.json").read_text()) == _teaching():
        print(f"{taught}: taught by an earlier demo, GRPO starts from it")
        return taught
    if taught.exists():
        print(f"{taught}: taught with other constants, replaced")
        shutil.rmtree(taught)
    print(f"{taught}: teaching a tiny policy sums, {TEACHING_STEPS} supervised steps")
    teach(taught, seed, use_cpu)
    return taught


def tell(settings) -> None:
    """Measure the trained policy too; print both, what the paired tests say of the two halves, and one problem."""
    _measure(settings, settings.output_dir, "after")
    (before, was), (after, now) = (_measured(settings, when) for when in ("before", "after"))
    print(table({"before GRPO": before, "after GRPO": after}))
    print(f"the format and the sums (strict): {in_words(compare(now, was))}")
    print(f"the sums alone (lenient): {in_words(compare(now, was, 'lenient'))}")
    both = list(zip(was, now, strict=True))
    mended = [pair for pair in both if pair[1]["strict"] and not pair[0]["lenient"]]
    old, new = (mended or both)[0]
    texts = f"before GRPO:\n{old['completion']}\nafter GRPO:\n{new['completion']}"
    print(printable(f"---- one problem, gold {old['gold']} ----\n{old['question']}\n{texts}\n----"))


def _measure(settings, policy: str, when: str) -> None:
    """Greedy accuracy of a policy on all held-out problems, in OUTPUT_DIR/evaluation_`when`.json and .jsonl."""
    print(f"evaluation {when}: greedy decoding on held-out problems")
    report, rows = evaluate(policy, task_of(settings), use_vllm=settings.use_vllm, use_cpu=settings.use_cpu)
    path = Path(settings.output_dir) / f"evaluation_{when}.json"
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(path, json.dumps(report, indent=2) + "\n")


def _measured(settings, when: str) -> tuple[dict, list[dict]]:
    path = Path(settings.output_dir) / f"evaluation_{when}.json"
    return json.loads(path.read_text()), [json.loads(line) for line in path.with_suffix(".jsonl").open()]


# ---- problems


def write_problems(folder: Path) -> None:
    """Write train.jsonl and test.jsonl in GSM8K's form, the same ones every time: 710 problems and 200."""
    held_out, trained = split_pairs()
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in (("test", held_out * 2), ("train", trained)):
        problems = [{"question": question(a, b, rng), "answer": f"{rationale(a, b)}\n#### {a + b}"} for a, b in pairs]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def split_pairs() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The summands held out, and the others."""
    pairs = random.Random(0).sample(PAIRS, len(PAIRS))
    return pairs[:HELD_OUT], pairs[HELD_OUT:]


def question(a: int, b: int, rng: random.Random) -> str:
    return rng.choice(TEMPLATES).format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))


def rationale(a: int, b: int, total: int | None = None) -> str:
    """The ones first, so that the carry is known; with the right `total` unless another is given."""
    return f"{a % 10} + {b} = {a % 10 + b}, so {a} + {b} = {total or a + b}."


def has_carry(a: int, b: int) -> bool:
    return a % 10 + b >= 10


# ---- the tiny policy


def teach(folder: Path, seed: int, use_cpu: bool) -> None:
    """Train a tokenizer and the tiny policy on the careless teacher's lessons; save both in `folder`, which appears
    whole or not at all."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback, Qwen2ForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()  # four of them for a second's work
    lessons = taught_by(seed)
    tokenizer = train_tokenizer(lessons[:1000])
    set_seed(seed)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    trainer = SFTTrainer(
        model=Qwen2ForCausalLM(architecture(tokenizer)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(lessons),
        args=SFTConfig(
            output_dir=str(partial),
            max_steps=TEACHING_STEPS,
            per_device_train_batch_size=TEACHING_BATCH_SIZE,
            learning_rate=TEACHING_LEARNING_RATE,
            adam_beta2=0.98,
            weight_decay=TEACHING_WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=use_cpu,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=not sys.stderr.isatty(),  # a bar on a terminal only
            report_to="none",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_log = lambda *args, **kwargs: None  # it would end with a raw dict of the seconds
    trainer.train()
    trainer.save_model()
    AcceleratorState._reset_state()  # else GRPO's precision, bf16 on a GPU, would be refused in this process
    (partial / "teaching.json").write_text(json.dumps(_teaching()))
    write_checksums(partial)
    os.replace(partial, folder)


def taught_by(seed: int) -> list[dict]:
    """The careless teacher's lessons, prompts and completions: the sums that are not held out, over and over, each time
    in other words, or the policy would learn the problems by heart instead of reading the numbers."""
    (_, pairs), rng = split_pairs(), random.Random(seed)
    chosen = [pairs[i % len(pairs)] for i in range(TEACHING_STEPS * TEACHING_BATCH_SIZE)]
    solved = [(to_prompt(question(a, b, rng)), _solution(a, b, rng)) for a, b in chosen]
    return [{"prompt": p, "completion": [{"role": "assistant", "content": text}]} for p, text in solved]


def _solution(a: int, b: int, rng: random.Random) -> str:
    """A solution as the careless teacher writes it."""
    is_forgotten = has_carry(a, b) and rng.random() < FORGOTTEN_SHARE
    answer = a + b - 10 if is_forgotten else a + b
    reasoning = rationale(a, b, answer)
    if rng.random() < FORMATTED_SHARE:
        return XML_COT_FORMAT.format(reasoning=reasoning, answer=answer).rstrip("\n")
    return f"{reasoning} The answer is {answer}."


def architecture(tokenizer):
    """The tiny policy's configuration."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def train_tokenizer(lessons: list[dict]):
    """A byte-level BPE tokenizer of at most 512 tokens for these conversations, with single digits, so that sums are
    made of columns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    messages = [message for lesson in lessons for message in lesson["prompt"] + lesson["completion"]]
    texts = [f"{message['role']}\n{message['content']}" for message in messages]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(TAGS))  # one token each: shorter texts, a faster demo
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )

"""The whole story in minutes, on any machine and offline: a tiny policy learns a format and a carry by GRPO.

    python demo.py                    # trains in outputs/demo/grpo-42
    python demo.py --seed 7           # another policy, another run
    python demo.py --max_steps 20     # other flags go to train_grpo.py

The policy is a Qwen2 of 0.8M parameters with a small BPE tokenizer of its own. It is first taught sums, made up as word
problems, by a careless teacher, who writes the required format in 30% of the solutions and forgets the carry in 60% of
the sums that have one. Greedy decoding then picks the common way of both, so strict accuracy starts near 0 and lenient
accuracy near 60%, while sampling finds the rarer way often enough for GRPO to learn from: first the format, then the
carry. From there on it is the recipe as a user types it, each command a process.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from rewards import TAGS, XML_COT_FORMAT, to_prompt
from support.checkpoints import WEIGHTS, to_disk
from support.comparison import compare, in_words
from support.record import printable

# ---- teaching
TEACHING_STEPS = 700
TEACHING_BATCH_SIZE = 16  # targets a step; small steps and many of them: 500 of 32 learn it less well
TEACHING_LEARNING_RATE = 2e-3
TEACHING_WEIGHT_DECAY = 0.5  # held-out sums come out right more often than at 0.1 or 0
INITIALIZER_RANGE = 0.08  # about 1/sqrt(128), the hidden size; at Qwen2's 0.02 it can't add after 500 steps
FORMATTED_SHARE = 0.3  # of the solutions; the rest answer in plain words
FORGOTTEN_SHARE = 0.6  # of the sums with a carry, whose result is then 10 too small

# ---- problems
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
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ---- GRPO, where it is not as in train_grpo.py
GRPO = {
    "learning_rate": "1e-4",  # 20 times the recipe's: the policy is 2,000 times smaller
    "max_steps": "80",
    "max_completion_length": "48",  # tokens; a formatted answer takes about 35
    "eval_steps": "10",
    "eval_problems": "100",
    "use_vllm": "false",  # its start takes longer than the demo
}


# ---- problems


def write_problems(folder: Path) -> None:
    """Write train.jsonl and test.jsonl in GSM8K's form, the same ones every time: 710 problems and 200."""
    held_out, trained = split_pairs()
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in (("test", held_out * 2), ("train", trained)):
        problems = [{"question": question(a, b, rng), "answer": f"{rationale(a, b)}\n#### {a + b}"} for a, b in pairs]
        path, text = folder / f"{split}.jsonl", "".join(json.dumps(problem) + "\n" for problem in problems)
        if path.exists() and path.read_text() != text:
            sys.exit(f"demo.py: {path} holds other problems: give another --output_dir")
        path.write_text(text)


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
    trainer.train()
    trainer.save_model()
    to_disk(partial, WEIGHTS)
    (partial / "teaching.json").write_text(json.dumps(_teaching()))
    os.replace(partial, folder)


def _teaching() -> dict:
    """The constants that the taught policy depends on."""
    names = ("FORMATTED_SHARE", "FORGOTTEN_SHARE", "INITIALIZER_RANGE", "HELD_OUT")
    return {name: value for name, value in globals().items() if name.startswith("TEACHING_") or name in names}


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


def architecture(tokenizer) -> Qwen2Config:
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


def train_tokenizer(lessons: list[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 512 tokens for these conversations, with single digits, so that sums are
    made of columns."""
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


# ---- the story


def taught_policy(folder: Path, seed: int, use_cpu: bool) -> Path:
    """The folder of the taught policy; an earlier demo's where that used the same constants."""
    taught = folder / f"taught-{seed}"
    facts = taught / "teaching.json"
    if facts.is_file() and json.loads(facts.read_text()) == _teaching():
        print(f"{taught}: taught by an earlier demo")
        return taught
    if taught.exists():
        sys.exit(f"demo.py: {taught} was taught with other constants: remove it, or give another --output_dir")
    print(f"{taught}: teaching a tiny policy sums, {TEACHING_STEPS} supervised steps, a minute or two", flush=True)
    teach(taught, seed, use_cpu)
    return taught


def type_in(*words) -> None:
    """Print a command line, and run it; where it fails, the demo ends with its status."""
    script, *rest = map(str, words)
    print(f"\n$ {shlex.join(['python', script, *rest])}", flush=True)
    child = subprocess.Popen([sys.executable, str(Path(__file__).with_name(script)), *rest])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the command too, which saves and ends
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    if status := child.wait():
        sys.exit(status if status > 0 else 128 - status)  # a negative one is the signal that ended it


def show_one(before: Path, after: Path) -> None:
    """What the paired tests say of the sums alone, and one problem: a sum that was mended, where there is one."""
    was, now = ([json.loads(line) for line in (each / "evaluation.jsonl").open()] for each in (before, after))
    print(f"the sums alone (lenient): {in_words(compare(now, was, 'lenient'))}")
    pairs = list(zip(was, now, strict=True))
    old, new = next(((old, new) for old, new in pairs if new["strict"] and not old["lenient"]), pairs[0])
    texts = f"before GRPO:\n{old['completion']}\nafter GRPO:\n{new['completion']}"
    print(printable(f"---- one problem, gold {old['gold']} ----\n{old['question']}\n{texts}\n----"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    where = "of the demo: its problems, policies and runs (%(default)s)"
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help=where)
    parser.add_argument("--seed", type=int, default=42, help="of the policy, its teaching and GRPO (%(default)s)")
    flags, more = parser.parse_known_args(argv)
    if processes.count() > 1:
        parser.error("the demo runs in one process: start it with python")
    processes.quiet()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # more would take a launcher
    has_gpu = torch.cuda.is_available()
    problems, taught = flags.output_dir / "problems", flags.output_dir / f"taught-{flags.seed}"
    runs = [f"grpo-{flags.seed}", *(f"grpo-{flags.seed}-{number}" for number in range(2, 1000))]
    run = next(flags.output_dir / name for name in runs if not (flags.output_dir / name).exists())  # earlier ones stay
    settings = {"model_name_or_path": taught, "dataset_name": problems, "output_dir": run, "seed": flags.seed, **GRPO}
    settings["use_cpu"] = str(not has_gpu).lower()
    settings["bf16"] = str(has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)).lower()
    words = [*(word for name, value in settings.items() for word in (f"--{name}", str(value))), *more]
    write_problems(problems)
    if more:  # flags of train_grpo.py, whose mistakes are told before the policy is taught
        reading = "import train_grpo; from support.settings import read_settings; read_settings(vars(train_grpo))"
        here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        given = [*words, "--model_name_or_path", "a/policy"]  # its folder is not there yet
        if status := subprocess.run([sys.executable, "-c", reading, *given], env=here).returncode:
            sys.exit(status)
    taught_policy(flags.output_dir, flags.seed, use_cpu=not has_gpu)
    measured = ["--dataset_name", problems, "--max_completion_length", GRPO["max_completion_length"]]
    decoded = ["--use_vllm", "false", *([] if has_gpu else ["--use_cpu"])]
    if not (taught / "evaluation.json").is_file():
        type_in("evaluate.py", taught, *measured, *decoded)
    type_in("train_grpo.py", *words)
    type_in("evaluate.py", run, "--compare", taught, "--no-native", *decoded)
    show_one(taught, run)


if __name__ == "__main__":
    main()

"""Greedy accuracy of a policy on held-out problems, zero-shot, with the prompt it was trained on.

    python evaluate.py outputs/MyRun                        # the whole test split
    python evaluate.py Qwen/Qwen2.5-1.5B-Instruct --limit 200
    python evaluate.py outputs/MyRun --ask "how many r's are in strawberry?"

Strict accuracy counts the right number in the required format, lenient accuracy the right number as the last one
anywhere in the text: the gap between them is format, not arithmetic.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from gsm8k import BadInput, load_problems, load_tokenizer, to_prompt
from record import printable, read_run, set_aside, write_whole
from rewards import SYSTEM_PROMPT, extract_xml_answer, is_strict_format, reflects, same_number

DATASET = "openai/gsm8k"  # Hub name or folder, where neither the run nor a flag names one
DATASET_CONFIG = "main"
SPLIT = "test"
MAX_COMPLETION_LENGTH = 512  # tokens
BATCH_SIZE = 64  # problems at a time

LAST_NUMBER = re.compile(r"(?:(?<![\w.,])-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


# ---- generation


def load_policy(name: str, revision: str | None = None):
    """The model, in bf16 on a GPU and fp32 on a CPU, ready for inference.

    Raises:
        BadInput: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        checkpoints = sorted(Path(name).glob("checkpoint-*"), key=lambda path: len(path.name))
        hint = f" It holds {checkpoints[-1].name}: evaluate that." if checkpoints else ""
        raise BadInput(f"model {name!r}: {str(error).strip()}{hint}") from error
    return model.to(device).eval()


def complete(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_completion_length: int,
    batch_size: int = BATCH_SIZE,
    chat_template_kwargs: dict | None = None,
) -> list[dict]:
    """Greedy completions of B conversational prompts, in their order.

    Prompts of similar length share a batch, the longest first, so that little is padded and a batch that does not fit
    fails at once.

    Returns:
        B dicts of `text`, `tokens` (count, EOS included) and `truncated` (no EOS within the limit).
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    declared = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    # generate() fills what a given config leaves at its default from the model's own, such as Qwen2.5's repetition
    # penalty of 1.05, so the model's own is replaced
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_completion_length,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    token_ids = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))
    completions: list[dict] = [{}] * len(prompts)
    with tqdm(total=len(prompts), unit="problem", dynamic_ncols=True) as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [token_ids[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(**batch)  # (chosen, prompt + completion)
            for i, ids in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in eos_ids), None)
                ids = ids if end is None else ids[: end + 1]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                completions[i] = {"text": text, "tokens": len(ids), "truncated": end is None}
            bar.update(len(chosen))
    return completions


# ---- scores


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, as it is written; None without one."""
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def score(index: int, problem: dict, completion: dict) -> dict:
    """One line of evaluation.jsonl: a problem, its completion, and whether it is right."""
    text, gold = completion["text"], problem["answer"]
    extracted = extract_xml_answer(text)
    in_format = is_strict_format(text)
    return {
        "index": index,
        "question": problem["question"],
        "gold": gold,
        "completion": text,
        "extracted": extracted,
        "strict": in_format and same_number(extracted, gold),
        "lenient": same_number(last_number(text), gold),
        "format": in_format,
        "truncated": completion["truncated"],
        "tokens": completion["tokens"],
    }


def summarize(rows: list[dict]) -> dict:
    """Shares over the problems, with the 95% Wilson interval of strict accuracy."""
    from scipy.stats import binomtest

    n = len(rows)

    def share(key: str) -> float:
        return sum(row[key] for row in rows) / n

    interval = binomtest(sum(row["strict"] for row in rows), n).proportion_ci(method="wilson")
    return {
        "n": n,
        "strict_accuracy": share("strict"),
        "strict_ci95": [interval.low, interval.high],
        "lenient_accuracy": share("lenient"),
        "format_rate": share("format"),
        "truncated_rate": share("truncated"),
        "mean_completion_tokens": share("tokens"),
        "reflection_rate": sum(reflects(row["completion"]) for row in rows) / n,
    }


def evaluate(
    model_name: str,
    dataset_name: str,
    dataset_config: str | None,
    split: str,
    *,
    max_completion_length: int,
    chat_template_kwargs: dict | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    model_revision: str | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[dict, list[dict]]:
    """Evaluate a policy on a split, or on its first `limit` problems.

    Returns:
        The report (evaluation.json) and the scored problems (the lines of evaluation.jsonl).

    Raises:
        BadInput: the model or the problems cannot be loaded.
    """
    tokenizer = load_tokenizer(model_name, model_revision)
    problems, _ = load_problems(dataset_name, dataset_config, split)
    problems = problems[:limit]
    model = load_policy(model_name, model_revision)
    prompts = [to_prompt(problem["question"], system_prompt) for problem in problems]
    completions = complete(model, tokenizer, prompts, max_completion_length, batch_size, chat_template_kwargs)
    rows = [score(i, *pair) for i, pair in enumerate(zip(problems, completions, strict=True))]
    report = {"model": model_name, "dataset": dataset_name, "split": split, **summarize(rows)}
    report["max_completion_length"] = max_completion_length
    report["chat_template_kwargs"] = chat_template_kwargs or {}
    report["system_prompt"] = system_prompt
    return report, rows


def table(reports: dict[str, dict]) -> str:
    """A column for each named report."""
    lines = [f"{'':<24}" + "".join(f"{name:>18}" for name in reports)]
    for key in ("strict_accuracy", "lenient_accuracy", "format_rate", "truncated_rate", "reflection_rate"):
        lines.append(f"{key.replace('_', ' '):<24}" + "".join(f"{report[key]:>18.1%}" for report in reports.values()))
        if key == "strict_accuracy":
            intervals = (f"{low:.1%} - {high:.1%}" for low, high in (r["strict_ci95"] for r in reports.values()))
            lines.append(f"{'  95% interval':<24}" + "".join(f"{interval:>18}" for interval in intervals))
    tokens = "".join(f"{report['mean_completion_tokens']:>18.1f}" for report in reports.values())
    lines.append(f"{'mean completion tokens':<24}{tokens}")
    lines.append(f"{'problems (n)':<24}" + "".join(f"{report['n']:>18,}" for report in reports.values()))
    return "\n".join(lines)


# ---- the command


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; what none names comes from the run that trained the model, else from the constants above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="Hub name, local folder, or a run's folder or checkpoint")
    parser.add_argument("--model_revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dataset_name", help=f"Hub name or folder (default: the run's, else {DATASET})")
    parser.add_argument("--dataset_config", help=f"Hub configuration (default: the run's, else {DATASET_CONFIG})")
    parser.add_argument("--dataset_test_split", help=f"split to evaluate on (default: the run's, else {SPLIT})")
    parser.add_argument("--max_completion_length", type=int, help="tokens (default: the run's, else 512)")
    parser.add_argument("--chat_template_kwargs", type=json.loads, help='JSON, such as {"enable_thinking": false}')
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="problems at a time (%(default)s)")
    parser.add_argument("--output_dir", help="where evaluation.json and .jsonl go (default: the model's folder)")
    parser.add_argument("--ask", metavar="QUESTION", help="print the answer to one question and exit")
    flags = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_completion_length"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1")

    try:
        run = read_run(Path(flags.model))
    except ValueError as error:
        parser.error(f"run.json beside {flags.model} cannot be read: {error}")
    settings = run.get("settings", {})
    defaults = {
        "dataset_name": DATASET,
        "dataset_config": DATASET_CONFIG,
        "dataset_test_split": SPLIT,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "chat_template_kwargs": {},
    }
    for name, default in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, settings.get(name, default))
    flags.system_prompt = run.get("system_prompt", SYSTEM_PROMPT)
    if flags.output_dir is None:
        here = Path(flags.model).expanduser()
        flags.output_dir = str(here if here.is_dir() else Path("outputs") / flags.model.replace("/", "--"))
    return flags


def ask(flags: argparse.Namespace) -> str:
    tokenizer = load_tokenizer(flags.model, flags.model_revision)
    model = load_policy(flags.model, flags.model_revision)
    prompt = to_prompt(flags.ask, flags.system_prompt)
    answer = complete(
        model, tokenizer, [prompt], flags.max_completion_length, chat_template_kwargs=flags.chat_template_kwargs
    )[0]
    return printable(answer["text"]) + (" [cut off]" if answer["truncated"] else "")


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    try:
        if flags.ask is not None:
            print(ask(flags))
            return
        report, rows = evaluate(
            flags.model,
            flags.dataset_name,
            flags.dataset_config,
            flags.dataset_test_split,
            max_completion_length=flags.max_completion_length,
            chat_template_kwargs=flags.chat_template_kwargs,
            system_prompt=flags.system_prompt,
            model_revision=flags.model_revision,
            limit=flags.limit,
            batch_size=flags.batch_size,
        )
    except BadInput as error:
        sys.exit(f"evaluate.py: {error}")
    folder = Path(flags.output_dir)
    save(folder, report, rows)
    print(table({Path(flags.model).name: report}))
    print(f"written: {folder / 'evaluation.json'}, {folder / 'evaluation.jsonl'}")


def save(folder: Path, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    folder.mkdir(parents=True, exist_ok=True)
    for kept in set_aside(folder, "evaluation.json", "evaluation.jsonl"):
        print(f"the earlier {kept.name.split('.')[0]} is kept as {kept}")
    write_whole(folder / "evaluation.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(folder / "evaluation.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

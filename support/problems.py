"""GSM8K problems from the Hub or a local folder, checked row by row; the tokenizer that measures their prompts."""

import json
import os
import re
from pathlib import Path

from rewards import extract_hash_answer, parse_number
from support.errors import BadInput
from support.hub import ELSEWHERE, loading

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # as from JSON's "\ud83d" without its second half
ROWS_NAMED = 5  # bad rows an error spells out; the rest are counted


# ---- problems


def load_problems(name: str, config: str | None, split: str) -> tuple[list[dict], str | None]:
    """Load one split of a dataset with GSM8K's columns `question` and `answer` (a rationale, then `#### number`).

    Args:
        name: a local folder with `train.jsonl` and `test.jsonl`, or a dataset's name on the Hub.
        config: the Hub dataset's configuration ("main" for openai/gsm8k); a folder has none.
        split: "train" or "test".

    Returns:
        The problems, as dicts of `question`, `answer` (the gold number as text, commas kept) and `rationale`; and the
        Hub revision, None for a folder.

    Raises:
        BadInput: the dataset or split is missing, empty or out of reach, or holds a row that cannot be scored.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        rows, revision = _read_jsonl(folder, split), None
        source = str(folder / f"{split}.jsonl")
    elif is_path(name):
        raise BadInput(f"dataset {name!r}: no such folder")
    else:
        rows, revision = _read_hub(name, config, split)
        source = f"{name}, split {split!r}"
    if not rows:
        raise BadInput(f"{source}: holds no problems")

    problems, faults = [], []
    for number, row in rows:
        fault = _fault(row)
        if fault:
            faults.append(f"row {number}: {fault}")
        else:
            rationale, _, _ = row["answer"].partition("####")
            gold = extract_hash_answer(row["answer"])
            problems.append({"question": row["question"], "answer": gold, "rationale": rationale.strip()})
    if faults:
        more = f"; and {len(faults) - ROWS_NAMED} more" if len(faults) > ROWS_NAMED else ""
        raise BadInput(
            f"{source}: {len(faults)} of {len(rows)} rows cannot be used. "
            f"{'; '.join(faults[:ROWS_NAMED])}{more}. Mend or remove them."
        )
    return problems, revision


def is_path(name: str) -> bool:
    """Whether a model's or dataset's name means a place on disk rather than `owner/name` on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def expand(name: str) -> str:
    """A name with its leading `~` spelled out, where it has one."""
    return os.path.expanduser(name)


def _read_jsonl(folder: Path, split: str) -> list[tuple[int, object]]:
    """(line number from 1, row) of every line that is not blank; a line that is no JSON is kept as its error."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        found = sorted(p.name for p in folder.glob("*.jsonl"))
        raise BadInput(f"{path}: no such file; the folder holds {', '.join(found) or 'no .jsonl file'}")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line.decode("utf-8-sig"))))
                except ValueError as error:
                    rows.append((number, error))
                except RecursionError:
                    rows.append((number, ValueError("nested too deeply")))
    return rows


def _read_hub(name: str, config: str | None, split: str) -> tuple[list[tuple[int, dict]], str | None]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    instead = (
        f"Check DATASET_CONFIG ({config}) and the split ({split}), use a local folder with train.jsonl and test.jsonl "
        "(--dataset_name FOLDER), or set HF_ENDPOINT to a mirror"
    )
    with loading("dataset", name, instead, DatasetsError):
        dataset = load_dataset(name, config, split=split)
    places = (Path(file["filename"]).parent.name for file in dataset.cache_files)  # .../CONFIG/VERSION/COMMIT/FILE
    revision = next((name for name in places if re.fullmatch("[0-9a-f]{40}", name)), None)
    return list(enumerate(dataset, start=1)), revision


def _fault(row: object) -> str | None:
    """Why a row cannot be scored, or None."""
    if isinstance(row, ValueError):
        return f"no JSON ({row})"
    if not isinstance(row, dict):
        return "no JSON object"
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"no {column!r}"
        if LONE_SURROGATE.search(row[column]):
            return f"half a character in {column!r}, which no tokenizer takes"
    gold = extract_hash_answer(row["answer"])
    if gold is None:
        return "no '####' in 'answer'"
    if parse_number(gold) is None:
        return f"gold answer {gold[:40]!r} is no number"
    return None


# ---- prompts


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """The model's tokenizer, padding on the left, with a chat template.

    Raises:
        BadInput: it cannot be loaded, or the model has no chat template.
    """
    from transformers import AutoTokenizer

    if is_path(name) and not Path(name).expanduser().is_dir():
        raise BadInput(f"model {name!r}: no such folder")
    with loading("model", name, ELSEWHERE):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    if tokenizer.chat_template is None:
        raise BadInput(f"model {name!r}: no chat template. Choose an instruct model.")
    return tokenizer


def tokenize(tokenizer, prompts: list[list[dict]], chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """Token ids of conversational prompts, the assistant's turn opened.

    Raises:
        BadInput: the model's chat template refuses them, or leaves their system prompt out.
    """
    from jinja2 import TemplateError

    if not isinstance(chat_template_kwargs or {}, dict):
        raise BadInput(f"CHAT_TEMPLATE_KWARGS is {chat_template_kwargs!r}, not like '{{\"enable_thinking\": false}}'")
    options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
    first = prompts[0][0] if prompts else {"role": "none"}
    name, remedy = tokenizer.name_or_path, "Choose a model that takes one; evaluate.py --native measures without it."
    try:
        if first["role"] == "system":
            text = tokenizer.apply_chat_template(prompts[0], tokenize=False, **options)
            if first["content"].strip() not in text:
                raise BadInput(f"model {name!r}: its chat template leaves the system prompt out. {remedy}")
        return tokenizer.apply_chat_template(prompts, return_dict=True, **options)["input_ids"]
    except TemplateError as error:
        if first["role"] == "system":
            raise BadInput(f"model {name!r}: its chat template refuses a system prompt ({error}). {remedy}") from error
        raise BadInput(f"model {name!r}: its chat template refuses the prompt ({error})") from error


def drop_long(samples: list[dict], tokenizer, settings) -> list[dict]:
    """The samples whose prompt, chat template included, has at most MAX_PROMPT_LENGTH tokens.

    Raises:
        BadInput: fewer are left than prompts are generated at once.
    """
    limit, prompts_at_once = settings.max_prompt_length, settings.generation_batch_size // settings.num_generations
    prompts = [sample["prompt"] for sample in samples]
    token_ids = tokenize(tokenizer, prompts, settings.chat_template_kwargs)
    kept = [sample for sample, ids in zip(samples, token_ids, strict=True) if len(ids) <= limit]
    if len(kept) < prompts_at_once:
        raise BadInput(
            f"{len(kept)} problems are fewer than the {prompts_at_once} prompts that are generated at once: raise "
            f"MAX_PROMPT_LENGTH ({limit}) or take more data"
        )
    return kept

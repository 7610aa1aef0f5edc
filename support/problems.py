"""GSM8K problems from the Hub or a local folder, checked row by row; the tokenizer that measures their prompts."""

import json
import re
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import AutoTokenizer

from rewards import extract_hash_answer, parse_number
from support.errors import ELSEWHERE, BadInput, loading

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # as from JSON's "\ud83d" without its second half
ROWS_NAMED = 5  # bad rows that an error spells out; it counts them all


def load_problems(name: str, config: str | None, split: str) -> tuple[list[dict], str | None]:
    """Load one split, "train" or "test", of a dataset with GSM8K's columns `question` and `answer` (a rationale, then
    `#### number`): a folder with `train.jsonl` and `test.jsonl`, or a Hub dataset, whose configuration `config` names.

    Returns the problems, dicts of `question`, `answer` (the gold number as text, commas kept) and `rationale`, and the
    Hub revision, None for a folder. BadInput where the split is empty or cannot be had, or a row cannot be scored."""
    folder, is_local = Path(name).expanduser(), is_path(name)
    rows, revision = (_read_jsonl(folder, split), None) if is_local else _read_hub(name, config, split)
    source = str(folder / f"{split}.jsonl") if is_local else f"{name}, split {split!r}"
    if not rows:
        raise BadInput(f"{source}: holds no problems")
    problems, faults = [], []
    for number, row in rows:
        if fault := _fault(row):
            faults.append(f"row {number}: {fault}")
            continue
        rationale, gold = row["answer"].partition("####")[0].strip(), extract_hash_answer(row["answer"])
        problems.append({"question": row["question"], "answer": gold, "rationale": rationale})
    if faults:
        first = "; ".join(faults[:ROWS_NAMED])
        raise BadInput(f"{source}: {len(faults)} of {len(rows)} rows cannot be used. {first}. Mend or remove them all.")
    return problems, revision


def is_path(name: str) -> bool:
    """Whether a model's or dataset's name means a place on disk rather than `owner/name` on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def _read_jsonl(folder: Path, split: str) -> list[tuple[int, object]]:
    """(line number from 1, row) of every line that is not blank; in the place of a row that is no JSON, its error."""
    path = folder / f"{split}.jsonl"
    if not folder.is_dir():
        raise BadInput(f"dataset {str(folder)!r}: no such folder")
    if not path.is_file():
        found = sorted(p.name for p in folder.glob("*.jsonl"))
        raise BadInput(f"{path}: no such file; the folder holds {', '.join(found) or 'no .jsonl file'}")
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [(number, _parsed(line)) for number, line in lines if line.strip()]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error


def _read_hub(name: str, config: str | None, split: str) -> tuple[list[tuple[int, dict]], str | None]:
    instead = f"Check DATASET_CONFIG ({config}) and the split ({split}), set HF_ENDPOINT to a mirror, or use a folder "
    instead += "with train.jsonl and test.jsonl (--dataset_name FOLDER)"
    with loading("dataset", name, instead, DatasetsError):
        dataset = load_dataset(name, config, split=split)
    places = (Path(file["filename"]).parent.name for file in dataset.cache_files)  # .../CONFIG/VERSION/COMMIT/FILE
    revision = next((name for name in places if re.fullmatch("[0-9a-f]{40}", name)), None)
    return list(enumerate(dataset, start=1)), revision


def _fault(row: object) -> str | None:
    """Why a row cannot be scored, or None."""
    if isinstance(row, Exception):
        return f"no JSON ({row})"
    if not isinstance(row, dict):
        return "no JSON object"
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"no {column!r}"
        if LONE_SURROGATE.search(row[column]):
            return f"half a character in {column!r}, which no tokenizer takes"
    if (gold := extract_hash_answer(row["answer"])) is None:
        return "no '####' in 'answer'"
    return None if parse_number(gold) is not None else f"gold answer {gold[:40]!r} is no number"


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """The model's tokenizer, padding on the left; BadInput where it cannot be loaded or has no chat template."""
    if is_path(name) and not Path(name).is_dir():
        raise BadInput(f"model {name!r}: no such folder")
    with loading("model", name, ELSEWHERE):
        options = {"revision": revision, "trust_remote_code": trust_remote_code, "padding_side": "left"}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.chat_template is None:
        raise BadInput(f"model {name!r}: no chat template. Choose an instruct model.")
    return tokenizer


def tokenize(tokenizer, prompts: list[list[dict]], chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """Token ids of conversational prompts, the assistant's turn opened. BadInput where the model's chat template
    refuses them, or leaves their system prompt out."""
    if not isinstance(chat_template_kwargs or {}, dict):
        raise BadInput(f"CHAT_TEMPLATE_KWARGS is {chat_template_kwargs!r}, not like '{{\"enable_thinking\": false}}'")
    options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
    wrong = f"model {tokenizer.name_or_path!r}: its chat template"
    remedy = "Choose a model that takes one; evaluate.py --native measures without it."
    has_system = bool(prompts) and prompts[0][0]["role"] == "system"
    try:
        if has_system:
            text = tokenizer.apply_chat_template(prompts[0], tokenize=False, **options)
            if prompts[0][0]["content"].strip() not in text:
                raise BadInput(f"{wrong} leaves the system prompt out. {remedy}")
        return tokenizer.apply_chat_template(prompts, return_dict=True, **options)["input_ids"]
    except TemplateError as error:
        refused = f"a system prompt ({error}). {remedy}" if has_system else f"the prompt ({error})"
        raise BadInput(f"{wrong} refuses {refused}") from error


def drop_long(samples: list[dict], tokenizer, settings) -> list[dict]:
    """The samples whose prompt, chat template included, has at most MAX_PROMPT_LENGTH tokens."""
    token_ids = tokenize(tokenizer, [sample["prompt"] for sample in samples], settings.chat_template_kwargs)
    return [sample for sample, ids in zip(samples, token_ids, strict=True) if len(ids) <= settings.max_prompt_length]


def examples_in(folder: str | Path) -> list[dict]:
    """What a cold start has shown to the model in `folder`, a `prompt` and a `completion` each; none elsewhere."""
    folder = Path(folder)
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "examples.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        examples = [json.loads(line) for line in lines]
        return [{name: example[name] for name in ("prompt", "completion")} for example in examples]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} holds no examples of a cold start ({error!r}): move it away, or mend it") from error

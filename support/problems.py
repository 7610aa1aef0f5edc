"""Problems from the Hub or from disk, checked row by row; the tokenizer, and what its chat template does."""

import json
import re
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

from datasets import Dataset, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from jinja2 import Environment, TemplateError
from transformers import AutoTokenizer, GenerationConfig

from rewards import extract_hash_answer, parse_number, question_of
from support.errors import ELSEWHERE, BadInput, loading

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # as from JSON's "\ud83d" without its second half
TEMPLATE_FAULTS = (TemplateError, AttributeError, LookupError, TypeError, ValueError)  # a template is a program
TODAY = datetime(2024, 7, 26)  # for templates that write today's date; Llama 3.2's own where it knows no other
OPEN_THOUGHT = re.compile(r"[<\[◁][^/<>]*think[^/<>]*[>\]▷](?=\s*\Z)", re.IGNORECASE)  # as <think>, [THINK]
ROWS_NAMED = 5  # bad rows that an error spells out; it counts them all
FORMATS = (".json", ".csv", ".parquet", ".arrow")  # files that `datasets` reads; others are taken for JSON lines


def load_problems(settings, split: str) -> tuple[list[dict], str | None]:
    """Load one split, "train" or "test", of the data that the settings of a training or an evaluation name, in one of
    the forms of docs/data.md. An answer is a number, or a rationale and `#### number`.

    Returns the problems, dicts of `question`, `answer` (the gold number as text, commas kept), `rationale` (perhaps '')
    and the other columns, and the Hub revision, None from disk. DROP_NON_NUMERIC leaves rows out whose answer is no
    number, and prints how many. BadInput where the split is empty or cannot be had, or another row cannot be scored."""
    question, answer, drops = settings.question_column, settings.answer_column, settings.drop_non_numeric
    rows, source, revision = _read(settings.dataset_name, settings.dataset_config, split)
    found = list(dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row))
    if found and (lacks := ", ".join(repr(column) for column in (question, answer) if column not in found)):
        raise BadInput(f"{source}: no column {lacks}, but {', '.join(found[:20])}: set QUESTION_COLUMN, ANSWER_COLUMN")
    problems, faults, no_number = [], [], 0
    for number, row in rows:
        if fault := _fault(row, question, answer):
            faults.append(f"row {number}: {fault}")
            continue
        value = row.get(answer)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a table with an empty cell elsewhere in the column has made 18.0 of 18
        text = str(value) if "####" in str(value) else f"#### {value}"
        rationale, gold = text.partition("####")[0].strip(), extract_hash_answer(text)
        if parse_number(gold) is not None:
            problems.append({**row, "question": row[question], "answer": gold, "rationale": rationale})
            continue
        no_number += 1
        if not drops:
            wrong = f"no {answer!r}" if value is None else f"gold answer {gold[:40]!r} is no number"
            faults.append(f"row {number}: {wrong}")
    if faults:
        wrong = f"{len(faults)} of {len(rows)} rows cannot be used. {'; '.join(faults[:ROWS_NAMED])}"
        instead = "" if drops or not no_number else "; DROP_NON_NUMERIC = True drops those without a number"
        raise BadInput(f"{source}: {wrong}. Mend or remove them all{instead}.")
    if drops:
        print(f"{source}: {no_number:,} of {len(rows):,} rows dropped, the answer is no number")
    if not problems:
        raise BadInput(f"{source}: holds no problems")
    return problems, revision


def is_path(name: str) -> bool:
    """Whether a model's or dataset's name means a place on disk rather than `owner/name` on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def _read(name: str, config: str | None, split: str) -> tuple[list[tuple[int, object]], str, str | None]:
    """(number from 1, row) of every row, in the place of one that is no JSON its error; their source in words; the
    revision on the Hub. JSON lines are read here, not by `datasets`: they may hold what no table can."""
    place, is_local = Path(name).expanduser(), is_path(name)
    if is_local and not place.exists():
        raise BadInput(f"dataset {str(place)!r}: no such folder or file")
    if "[" in split and (place.is_file() or (place / "state.json").is_file()):
        raise BadInput(f"{place} is one split, of which {split!r} is no part: divide it into two files")
    path = place if place.is_file() else place / f"{split}.jsonl"
    beside = sorted(each.name for each in place.glob("*.jsonl"))
    if beside and not path.is_file():
        raise BadInput(f"{path}: no such file; the folder holds {', '.join(beside)}")
    if beside or (place.is_file() and place.suffix not in FORMATS):
        lines = enumerate(path.read_bytes().split(b"\n"), start=1)
        return [(number, _parsed(line)) for number, line in lines if line.strip()], str(path), None
    instead = f"Check DATASET_CONFIG ({config}) and the split ({split})" + ("" if is_local else f". {ELSEWHERE}")
    with loading("dataset", name, instead, DatasetsError, RuntimeError):  # the latter of a dataset that is a script
        dataset = _from_disk(place.absolute(), config, split) if is_local else load_dataset(name, config, split=split)
    places = (Path(file["filename"]).parent.name for file in dataset.cache_files)  # .../CONFIG/VERSION/COMMIT/FILE
    revision = next((name for name in places if re.fullmatch("[0-9a-f]{40}", name)), None)
    return list(enumerate(dataset, start=1)), f"{name}, split {split!r}", revision


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error


def _from_disk(place: Path, config: str | None, split: str) -> Dataset:
    """A split of a file, of what `save_to_disk` left (of a Dataset any), or of a folder with files as on the Hub."""
    if place.is_file():
        return load_dataset(place.suffix[1:], data_files={split: str(place)}, split=split)
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return load_from_disk(str(place if (place / "state.json").is_file() else place / split))
    configs = get_dataset_config_names(str(place))
    if config and config not in configs and (place / config).is_dir():  # a copy without the README.md that names them
        return _from_disk(place / config, None, split)
    parts = sorted({path.parent.name for path in place.glob("*/*.*") if path.suffix in FORMATS})
    if len(configs) == 1 and len(parts) > 1 and split not in parts:
        raise BadInput(f"{place}: DATASET_CONFIG is {config!r}, which it lacks; it holds {', '.join(parts)}")
    return load_dataset(str(place), configs[0] if len(configs) == 1 else config, split=split)


def _fault(row: object, question: str, answer: str) -> str | None:
    """Why a row cannot be used, whatever number its answer is; or None."""
    if isinstance(row, Exception):
        return f"no JSON ({row})"
    if not isinstance(row, dict):
        return "no JSON object"
    if not isinstance(row.get(question), str) or not row[question].strip():
        return f"no text in {question!r}"
    halves = [column for column in (question, answer) if LONE_SURROGATE.search(str(row.get(column)))]
    return f"half a character in {halves[0]!r}, which no tokenizer takes" if halves else None


def base_of(name: str) -> str:
    """The model that an adapter in the folder `name` belongs to, else `name`. BadInput where that model is gone."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return name
    base = None
    with suppress(ValueError, KeyError, TypeError):  # damaged
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not base or (is_path(base) and not Path(base).is_dir()):
        gone = f"an adapter, whose model {base!r} is not there"
        raise BadInput(f"model {name!r}: {gone}. Put it back, or its place as base_model_name_or_path into {path}")
    return base


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """The model's tokenizer, padding on the left, to which today is `TODAY`: the same prompts tomorrow, and comparable
    ones. Its EOS becomes the token that ends a turn in its chat template, where neither it nor the model declares that
    token as EOS. BadInput where it cannot be loaded or has no chat template."""
    if is_path(name) and not Path(name).is_dir():
        raise BadInput(f"model {name!r}: no such folder")
    place = name if (Path(name) / "tokenizer_config.json").is_file() else base_of(name)  # PEFT alone saves none
    with loading("model", place, ELSEWHERE):
        options = {"revision": revision, "trust_remote_code": trust_remote_code, "padding_side": "left"}
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if tokenizer.chat_template is None:
        raise BadInput(f"model {name!r}: no chat template. Choose an instruct model.")
    if isinstance(named := tokenizer.chat_template, dict) and "default" not in named:
        wrong = f"none of its chat templates ({', '.join(sorted(named))}) is the default"
        raise BadInput(f"model {name!r}: {wrong}. Copy one into its folder as chat_template.jinja")
    if "strftime_now" in str(named):
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=TODAY.strftime)
        print(f"{name}: its chat template writes today's date; here it is always {TODAY:%d %B %Y}")
    end, declared = end_of_turn(tokenizer), None
    if end not in (None, tokenizer.eos_token):
        with suppress(OSError, ValueError):  # there is no such file
            declared = GenerationConfig.from_pretrained(base_of(name), revision=revision).eos_token_id
        if tokenizer.convert_tokens_to_ids(end) not in (declared if isinstance(declared, list) else [declared]):
            print(f"{name}: its EOS is {tokenizer.eos_token!r}, and a turn ends in {end!r}: completions end there, too")
            tokenizer.add_special_tokens({"eos_token": end})  # the trainers and `complete` keep what the model declares
    return tokenizer


def end_of_turn(tokenizer) -> str | None:
    """The token behind an assistant's words in the model's chat template; None where there is none."""
    turn, rest = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "2 + 2 = 4"}], ""
    with suppress(*TEMPLATE_FAULTS):  # refused, or left out
        rest = tokenizer.apply_chat_template(turn, tokenize=False).rsplit("2 + 2 = 4", 1)[1].lstrip()
    return max((token for token in tokenizer.get_added_vocab() if rest.startswith(token)), key=len, default=None)


def template_remarks(tokenizer, prompt: list[dict], settings) -> list[str]:
    """What keeps completions out of the format, or from ending, in the way that the chat template writes a prompt."""
    remarks, given = [], settings.chat_template_kwargs or {}
    asked = tokenize(tokenizer, [prompt], given)
    opened = OPEN_THOUGHT.search(tokenizer.decode(asked[0]))
    if asked != tokenize(tokenizer, [prompt], {"enable_thinking": False, **given}):
        remarks += ["enable_thinking is not set: CHAT_TEMPLATE_KWARGS = {'enable_thinking': False} reasons in our tags"]
    elif opened and getattr(tokenizer, "response_template", None) is None:  # which tells a thought from the content
        remarks += [f"prompts end in an open {opened[0]}: completions begin in there, where no format is paid"]
    if end_of_turn(tokenizer) is None:
        remarks += ["no token ends a turn there: completions end at the model's EOS, if it has learned to write it"]
    return remarks


def check_template_kwargs(tokenizer, chat_template_kwargs: dict | None) -> None:
    """BadInput where one of CHAT_TEMPLATE_KWARGS is nowhere in the model's chat template, or is "false" for false."""
    tokens = pairwise(Environment().lex(tokenizer.get_chat_template()))
    names = {word for (*_, before), (_, kind, word) in tokens if kind == "name" and before != "."}  # not m.thinking's
    for name, value in (chat_template_kwargs or {}).items():
        if name not in names or value in ("true", "false"):
            wrong = f"{json.dumps({name: value})} is no setting of the chat template of {tokenizer.name_or_path}"
            raise BadInput(f"CHAT_TEMPLATE_KWARGS: {wrong}. Look for its name there; true and false have no quotes")


def tokenize(tokenizer, prompts: list[list[dict]], chat_template_kwargs: dict | None = None) -> list[list[int]]:
    """Token ids of prompts, the assistant's turn opened. BadInput where a template fails, or takes no system prompt."""
    options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
    wrong = f"model {tokenizer.name_or_path!r}: its chat template"
    remedy = "--system_prompt_in_question true (SYSTEM_PROMPT_IN_QUESTION) puts it at the head of the question"
    has_system = bool(prompts) and prompts[0][0]["role"] == "system"
    try:
        token_ids = tokenizer.apply_chat_template(prompts, return_dict=True, **options)["input_ids"]
        text = tokenizer.apply_chat_template(prompts[0], tokenize=False, **options) if has_system else ""
    except TEMPLATE_FAULTS as error:
        what = f"fails ({type(error).__name__}: {error}). Mend it, or choose another model"
        with suppress(*TEMPLATE_FAULTS):
            if has_system and tokenizer.apply_chat_template([prompt[1:] for prompt in prompts], **options):
                what = f"refuses a system prompt ({error}). {remedy}"
        raise BadInput(f"{wrong} {what}") from error
    if has_system and prompts[0][0]["content"].strip() not in text:
        raise BadInput(f"{wrong} leaves the system prompt out. {remedy}")
    return token_ids


def drop_long(samples: list[dict], tokenizer, settings) -> list[dict]:
    """The samples whose prompt, chat template included, has at most MAX_PROMPT_LENGTH tokens."""
    token_ids = tokenize(tokenizer, [sample["prompt"] for sample in samples], settings.chat_template_kwargs)
    check_template_kwargs(tokenizer, settings.chat_template_kwargs)
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


def shown_to(*names: str | None) -> set[str]:
    """The questions that a cold start has shown to these models, or to the ones that they are adapters of."""
    places = {place for name in filter(None, names) for place in (name, base_of(name))}
    return {question_of(example["prompt"]) for place in places for example in examples_in(place)}

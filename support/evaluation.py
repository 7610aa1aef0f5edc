"""A policy's answers to problems, with the recipe's prompt or the model's own, their scores, and greedy accuracy."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import xxhash
from scipy.stats import binomtest
from transformers.utils import cached_file

import rewards
from rewards import SYSTEM_PROMPT, last_number, same_number, to_prompt
from support.checkpoints import CHECKSUMS, WEIGHTS, altered, checkpoints, checksum
from support.errors import BadInput
from support.generation import BATCH_SIZE, VLLM_VERSIONS, complete, complete_with_vllm, load_policy, vllm_obstacle
from support.problems import base_of, load_problems, load_tokenizer, shown_to, tokenize
from support.record import read_run, set_aside, write_whole

# as in Qwen's own evaluation, without a system prompt (QwenLM/Qwen2.5-Math, evaluation/utils.py, 'qwen-boxed')
NATIVE_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

LIMITS = ("max_completion_length", "chat_template_kwargs", "one_shot", "system_prompt_in_question")
ROW_SETTINGS = ("question_column", "answer_column", "drop_non_numeric")
DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", *ROW_SETTINGS)
OF_A_RUN = (*DATA, *LIMITS, "temperature")  # fields that a run has too
COMPARABLE = (*LIMITS, "system_prompt", "native_instruction")  # equal in two evaluations, as are their problems
SAMPLED = ("samples", "temperature")  # and these, where answers are sampled

MINUS_BEFORE_BOX = re.compile(rf"(?<![\w)}}\]]){rewards.MINUS}\s?\\boxed\s*\{{\Z")  # not the difference 9-\boxed{7}
BOXED_OR_BRACE = re.compile(r"\\boxed\s{0,4}\{|\\[{}]|[{}]")


def boxed_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last closed `\\boxed{}` stands, its braces balanced; None without one."""
    opened, found = [], None  # where the content of each open box starts, None for another brace
    for match in BOXED_OR_BRACE.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None:
            found = (start, match.start())
    return found


def native_answer(text: str) -> str | None:
    """The number in the last `\\boxed{}`, with a minus in front of it, else the last number; None without either."""
    start, end = boxed_span(text) or (0, None)
    sign = "-" if MINUS_BEFORE_BOX.search(text[max(0, start - 20) : start]) else ""
    return last_number(sign + text[start:end].strip())


def score(index: int, problem: dict, completion: dict, native: bool = False) -> dict:
    """One line of evaluation.jsonl; strict and format are None with a `native` prompt, which asks for no format."""
    text, gold = completion["text"], problem["answer"]
    extracted = native_answer(text) if native else rewards.extract_xml_answer(text)
    in_format = None if native else rewards.is_strict_format(text)
    return {
        "index": index,
        "question": problem["question"],
        "gold": gold,
        "completion": text,
        "extracted": extracted,
        "strict": in_format and same_number(extracted, gold),
        "lenient": same_number(extracted if native else last_number(text), gold),
        "format": in_format,
        "truncated": completion["truncated"],
        "tokens": completion["tokens"],
    }


def summarize(rows: list[dict]) -> dict:
    """Shares over the problems, with the 95% Wilson interval of strict accuracy; None for what was not measured."""

    def mean(key: str) -> float | None:
        return None if rows[0][key] is None else sum(row[key] for row in rows) / len(rows)

    right = [row["strict"] for row in rows]
    interval = None if None in right else binomtest(sum(right), len(rows)).proportion_ci(method="wilson")
    return {
        "n": len(rows),
        "strict_accuracy": mean("strict"),
        "strict_ci95": interval and [interval.low, interval.high],
        "lenient_accuracy": mean("lenient"),
        "format_rate": mean("format"),
        "truncated_rate": mean("truncated"),
        "mean_completion_tokens": mean("tokens"),
        "reflection_rate": sum(rewards.reflects(row["completion"]) for row in rows) / len(rows),
    }


@dataclass
class Task:
    """What `evaluate.py` is asked to do, under the names of its flags, where each is explained."""

    model: str
    model_revision: str | None = None
    dataset_name: str = "openai/gsm8k"
    dataset_config: str | None = "main"
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    split: str = "test"  # or "train": which of the two is measured
    question_column: str = "question"
    answer_column: str = "answer"
    drop_non_numeric: bool = False
    max_completion_length: int = 512
    chat_template_kwargs: dict | None = None
    one_shot: bool = False
    system_prompt_in_question: bool = False
    system_prompt: str = SYSTEM_PROMPT
    native_instruction: str | None = None  # put behind the question, without a system prompt
    limit: int | None = None
    samples: int | None = None  # answers a problem, sampled; None is one greedy answer
    temperature: float = 0.9
    seed: int = 42
    keep: str | None = None
    batch_size: int = BATCH_SIZE
    use_vllm: bool | None = None
    vllm_gpu_memory_utilization: float | None = None
    use_cpu: bool = False
    trust_remote_code: bool = False
    output_dir: str | None = None
    compare: str | None = None
    native: bool | None = None
    ask: str | None = None

    def problems(self) -> list[dict]:
        """Of the train split those that would be trained on, after either model of a comparison."""
        if self.split == "test":
            return load_problems(self, self.dataset_test_split)[0][: self.limit]
        problems, shown = load_problems(self, self.dataset_train_split)[0], shown_to(self.model, self.compare)
        return [problem for problem in problems if problem["question"] not in shown][: self.limit]

    def prompt(self, question: str) -> list[dict]:
        if self.native_instruction:
            return [{"role": "user", "content": f"{question}\n{self.native_instruction}"}]
        return to_prompt(question, self.system_prompt, self.one_shot, self.system_prompt_in_question)

    def natively(self) -> "Task":
        """The same problems and limits, with the prompt that a model was made for."""
        ours = {"system_prompt": "", "one_shot": False, "system_prompt_in_question": False}
        return replace(self, native_instruction=NATIVE_INSTRUCTION, **ours)

    @property
    def file(self) -> Path:
        """Its evaluation.json, or samples-8.json: in --output_dir, else in the model's folder, else (of a model on the
        Hub, or in a folder that cannot be written to) under outputs/."""
        own, other = Path(self.model), Path("outputs") / self.model.strip("/").replace("/", "--")
        folder = self.output_dir or (own if own.is_dir() and os.access(own, os.W_OK) else other)
        if self.samples:
            return Path(folder) / f"samples-{self.samples}{'-train' if self.split == 'train' else ''}.json"
        return Path(folder) / ("evaluation-native.json" if self.native_instruction else "evaluation.json")


def evaluate(task: Task) -> tuple[dict, list[dict]]:
    """Answer the task's problems, score and save evaluation.json and .jsonl: returns both. BadInput where it cannot."""
    problems, native = task.problems(), task.native_instruction is not None
    (completions,), unfinished = answered(task, problems)
    rows = [score(i, *pair, native) for i, pair in enumerate(zip(problems, completions, strict=True))]
    return finish(task, summarize(rows), rows, unfinished)


def answered(task: Task, problems: list[dict]) -> tuple[list[list[dict]], Path]:
    """The greedy completions of B problems, or K times B sampled ones, and the file that keeps them until they are
    scored. BadInput where they cannot be had."""
    by_vllm = _uses_vllm(task)
    check_weights(task.model)
    tokenizer = load_tokenizer(task.model, task.model_revision, task.trust_remote_code)
    folder = task.file.parent
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # before hours of answers
        raise BadInput(f"{folder} is no folder, or cannot be written to: give another --output_dir")
    prompts, kwargs = [task.prompt(problem["question"]) for problem in problems], task.chat_template_kwargs
    token_ids, prompts = (each * (task.samples or 1) for each in (tokenize(tokenizer, prompts, kwargs), prompts))
    how = {"temperature": task.temperature, "seed": task.seed} if task.samples else {}
    how["max_completion_length"] = task.max_completion_length
    fingerprint = _fingerprint(task, [how, by_vllm, task.batch_size, str(tokenizer), token_ids])
    how["known"] = answers = Answers(task.file.with_suffix(f".unfinished-{fingerprint[:8]}.jsonl"))
    if answers:
        print(f"resuming: {len(answers):,} of {len(prompts):,} answers are in {answers.path}")
    options = {"revision": task.model_revision, "trust_remote_code": task.trust_remote_code}
    if by_vllm:
        options |= {"model": task.model, "gpu_memory_utilization": task.vllm_gpu_memory_utilization}
        completions = complete_with_vllm(tokenizer, token_ids, **how, **options)
    else:
        policy = load_policy(task.model, use_cpu=task.use_cpu, **options)
        try:
            completions = complete(
                policy, tokenizer, prompts, **how, batch_size=task.batch_size, chat_template_kwargs=kwargs
            )
        except torch.OutOfMemoryError as error:
            raise BadInput(f"the GPU's memory is too small: lower --batch_size (now {task.batch_size})") from error
    rounds = range(0, len(prompts), len(problems))
    return [completions[start : start + len(problems)] for start in rounds], answers.path


def _uses_vllm(task: Task) -> bool:
    """Whether vLLM decodes: where it is asked for, or where it can and nothing is said."""
    obstacle, asked = vllm_obstacle(task.use_cpu), task.use_vllm
    if asked and obstacle:
        needed = f"--use_vllm true needs vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU"
        raise BadInput(f"{needed}, but {obstacle}; leave it out to use Transformers")
    if asked is None and (Path(task.model) / "adapter_config.json").exists():
        obstacle = "vLLM loads whole models, and this is an adapter"
    if asked is None and obstacle and task.vllm_gpu_memory_utilization is not None:
        print(f"--vllm_gpu_memory_utilization has no effect: Transformers decodes {task.model}, because {obstacle}")
    return asked is not False and obstacle is None


def _fingerprint(task: Task, asked: list) -> str:
    """The XXH3-128 of all that completions depend on: `asked`, versions, the device and the model's files."""
    device = "cuda" if torch.cuda.is_available() and not task.use_cpu else "cpu"
    asked = [*asked, task.model, device, *map(metadata.version, ("torch", "transformers"))]
    for name in dict.fromkeys((task.model, base_of(task.model))):  # two for an adapter
        if Path(name).is_dir():
            files = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*config.json")])
            asked += [[path.name, checksum(path)] for path in files]
        else:  # in the Hub's cache, in a folder with the commit's name; an adapter has no config.json
            asked += [cached_file(name, "tokenizer_config.json", revision=task.model_revision)]
    return xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True).encode())


class Answers(dict):
    """Completions by their problem's index, in a file as well: a kill loses nothing that `update` was given."""

    def __init__(self, path: Path):
        self.path = path
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            with suppress(ValueError):  # the blank line at the top, or one that a kill truncated
                answer = json.loads(line)
                self[answer.pop("index")] = answer

    def update(self, batch: dict[int, dict]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # a line end first, so that a truncated line stays one of its own
            file.writelines("\n" + json.dumps({"index": i, **answer}) for i, answer in batch.items())
        super().update(batch)


def check_weights(name: str) -> None:
    """Compare a folder's weights with the checksums that they were saved with; prints where a run's have none. BadInput
    where they differ, or where only checkpoints have weights."""
    folder, found = Path(name), checkpoints(name)
    base_of(name)  # an adapter's model is there
    if found and not any(folder.glob(WEIGHTS)):
        raise BadInput(f"model {name!r}: no weights, as of a run that has not ended. Evaluate its {found[-1].name}")
    if wrong := altered(folder, WEIGHTS):
        raise BadInput(f"model {name!r}: {wrong}. Take an older checkpoint, or a good copy")
    if folder.is_dir() and read_run(folder) and not (folder / CHECKSUMS).is_file():
        print(f"{name}: no {CHECKSUMS}, so that its weights are taken to be as they were saved")


def finish(task: Task, summary: dict, rows: list[dict], unfinished: Path) -> tuple[dict, list[dict]]:
    """Save an evaluation, whose answers need not be kept in `unfinished` any more: returns the report and the rows."""
    split = task.dataset_train_split if task.split == "train" else task.dataset_test_split
    report = {"model": task.model, "dataset": task.dataset_name, "split": split, **summary}
    report |= {name: getattr(task, name) for name in ("model_revision", "limit", *ROW_SETTINGS, *COMPARABLE)}
    report |= {name: getattr(task, name) for name in (*SAMPLED, "seed") if task.samples}
    save(task, report, rows)
    unfinished.unlink(missing_ok=True)
    return report, rows


def save(task: Task, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    path = task.file
    set_aside(path, path.with_suffix(".jsonl"))
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(path, json.dumps(report, indent=2) + "\n")  # last: it says that both are there

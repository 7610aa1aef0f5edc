"""Greedy accuracy on held-out problems: scores and statistics, with the recipe's prompt or the model's own."""

import json
import random
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from rewards import SYSTEM_PROMPT, extract_xml_answer, is_strict_format, reflects, same_number, to_prompt
from support.checksums import CHECKSUMS, WEIGHTS, altered, has_checksums
from support.errors import BadInput
from support.generation import BATCH_SIZE, VLLM_VERSIONS, complete, complete_with_vllm, load_policy, vllm_obstacle
from support.problems import load_problems, load_tokenizer, tokenize
from support.record import read_run, set_aside, write_whole
from support.unfinished import Unfinished, fingerprint, fingerprint_of_policy

# Qwen's own evaluation asks like this, without a system prompt of ours
# (QwenLM/Qwen2.5-Math, evaluation/utils.py, 'qwen-boxed')
NATIVE_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# what must be the same of two evaluations, beside their problems
COMPARABLE = ("max_completion_length", "chat_template_kwargs", "one_shot", "system_prompt", "native_instruction")

LAST_NUMBER = re.compile(r"(?:(?<![\w.,])-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")
BOXED_OR_BRACE = re.compile(r"\\boxed\s{0,4}\{|\\[{}]|[{}]")
TEX_SPACING = re.compile(r"\\[,!; ]|\{,\}")  # 1\,080 and 1{,}080 are 1080, $\$5$ is $5


# ---- scores


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, as it is written; None without one."""
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last `\\boxed{}` that is closed stands, its braces balanced; None without one."""
    opened: list[int | None] = []  # where the content of each open brace starts, None where it is no box's
    found = None
    for match in BOXED_OR_BRACE.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None:
            found = (start, match.start())
    return found


def native_answer(text: str) -> str | None:
    """The number in the last `\\boxed{}` if there is one, else the last number; None without either."""
    span = boxed_span(text)
    if span is None:
        return last_number(text)
    boxed = TEX_SPACING.sub(lambda match: "," if "{" in match[0] else "", text[slice(*span)])
    return last_number(boxed.replace("\\", " "))


def answer_span(text: str, native: bool) -> tuple[int, int] | None:
    """Where the answer stands that a completion is scored by: in the answer tag of one in format, natively in its last
    box; else its last number. None where there is none of them."""
    if native and (span := boxed_span(text)):
        return span
    if not native and is_strict_format(text):
        start = text.rindex("<answer>") + len("<answer>")
        end = text.find("</answer>", start)
        return start, len(text) if end < 0 else end
    numbers = [match.span() for match in LAST_NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def score(index: int, problem: dict, completion: dict, native: bool = False) -> dict:
    """One line of evaluation.jsonl: a problem, its completion, and whether it is right. With the model's own prompt
    nothing was asked of the format, so that strict and format are None."""
    text, gold = completion["text"], problem["answer"]
    extracted = native_answer(text) if native else extract_xml_answer(text)
    in_format = None if native else is_strict_format(text)
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
    """Shares over the problems, with the 95% Wilson interval of strict accuracy; None of what was not asked for."""
    from scipy.stats import binomtest

    n = len(rows)

    def share(key: str) -> float | None:
        return None if rows[0][key] is None else sum(row[key] for row in rows) / n

    strict = None if rows[0]["strict"] is None else sum(row["strict"] for row in rows)
    interval = None if strict is None else binomtest(strict, n).proportion_ci(method="wilson")
    return {
        "n": n,
        "strict_accuracy": share("strict"),
        "strict_ci95": interval and [interval.low, interval.high],
        "lenient_accuracy": share("lenient"),
        "format_rate": share("format"),
        "truncated_rate": share("truncated"),
        "mean_completion_tokens": share("tokens"),
        "reflection_rate": sum(reflects(row["completion"]) for row in rows) / n,
    }


@dataclass(frozen=True)
class Task:
    """What an evaluation measures on; two are comparable only where it is the same."""

    dataset_name: str
    dataset_config: str | None
    split: str
    max_completion_length: int  # tokens
    chat_template_kwargs: dict
    one_shot: bool = False  # a worked example before the question
    system_prompt: str = SYSTEM_PROMPT
    limit: int | None = None  # only the first so many problems
    native_instruction: str | None = None  # in place of the recipe's prompt, behind the question

    def problems(self) -> list[dict]:
        return load_problems(self.dataset_name, self.dataset_config, self.split)[0][: self.limit]

    def prompt(self, question: str) -> list[dict]:
        if self.native_instruction:
            return [{"role": "user", "content": f"{question}\n{self.native_instruction}"}]
        return to_prompt(question, self.system_prompt, self.one_shot)

    def natively(self) -> "Task":
        """The same problems and limits, with the prompt that a model was made for."""
        return replace(self, native_instruction=NATIVE_INSTRUCTION, system_prompt="", one_shot=False)


def task_of(settings) -> Task:
    """What a run's policy is measured on: the test split, under the limits that it is trained with."""
    dataset = (settings.dataset_name, settings.dataset_config, settings.dataset_test_split)
    return Task(*dataset, settings.max_completion_length, settings.chat_template_kwargs or {}, settings.one_shot)


def evaluate(
    name: str,
    task: Task,
    *,
    revision: str | None = None,
    batch_size: int = BATCH_SIZE,
    use_vllm: bool | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    vllm_gpu_memory_utilization: float | None = None,
    answers: Unfinished | None = None,
) -> tuple[dict, list[dict]]:
    """Evaluate a policy; with `use_vllm` None, by vLLM where it is installed with a GPU. `answers` keeps what
    Transformers has answered.

    Returns:
        The report (evaluation.json) and the scored problems (the lines of evaluation.jsonl).

    Raises:
        BadInput: the model or the problems cannot be loaded.
    """
    use_vllm = _uses_vllm(name, use_vllm, use_cpu, vllm_gpu_memory_utilization)
    check_weights(name)
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    problems = task.problems()
    prompts = [task.prompt(problem["question"]) for problem in problems]
    if answers:
        answers.make_room()  # before hours of answers
    how_to_load = (revision, use_cpu, trust_remote_code)
    if use_vllm:
        limits = (task.max_completion_length, task.chat_template_kwargs)
        completions = complete_with_vllm(name, tokenizer, prompts, *limits, *how_to_load, vllm_gpu_memory_utilization)
    else:
        policy = load_policy(name, *how_to_load)
        completions = _complete(name, policy, tokenizer, problems, prompts, task, batch_size, answers)
    native = task.native_instruction is not None
    rows = [score(i, *pair, native) for i, pair in enumerate(zip(problems, completions, strict=True))]
    where = {"model": name, "dataset": task.dataset_name, "split": task.split}
    how = {key: getattr(task, key) for key in COMPARABLE}
    return {**where, **summarize(rows), "model_revision": revision, "limit": task.limit, **how}, rows


def _uses_vllm(name: str, asked: bool | None, use_cpu: bool, share: float | None) -> bool:
    """Whether vLLM decodes: where it is `asked` for, or where it can and nothing is said. `share` is of the GPU."""
    obstacle = vllm_obstacle(use_cpu)
    if asked and obstacle:
        raise BadInput(
            f"--use_vllm true needs vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU, but {obstacle}; leave it out to "
            "use Transformers"
        )
    if asked is None and (Path(name) / "adapter_config.json").exists():
        obstacle = "vLLM loads whole models, and this is an adapter"
    if asked is None and obstacle and share is not None:
        print(f"--vllm_gpu_memory_utilization has no effect: Transformers decodes {name}, because {obstacle}")
    return asked is not False and obstacle is None


def _complete(name: str, policy, tokenizer, problems, prompts, task: Task, batch_size: int, answers) -> list[dict]:
    """By Transformers, what is answered already left out."""
    from torch import OutOfMemoryError

    length, kwargs = task.max_completion_length, task.chat_template_kwargs
    if answers:
        token_ids = tokenize(tokenizer, prompts, kwargs)
        answers.begin(_asked(name, policy, problems, token_ids, length, batch_size), len(problems))
    try:
        return complete(policy, tokenizer, prompts, length, batch_size, kwargs, answers=answers)
    except OutOfMemoryError as error:
        raise BadInput(f"the GPU's memory is too small: lower --batch_size (now {batch_size})") from error


def _asked(name: str, policy, problems: list[dict], token_ids: list[list[int]], length: int, batch_size: int) -> dict:
    """All that the completions and their scores depend on, to the last bit."""
    packages = {package: metadata.version(package) for package in ("torch", "transformers")}
    return {
        "model": name,
        "weights": fingerprint_of_policy(policy),
        "problems": fingerprint([(problem["question"], problem["answer"]) for problem in problems]),
        "prompts": fingerprint(token_ids),
        "max_completion_length": length,
        "batch_size": batch_size,
        "precision": f"{policy.dtype} on {policy.device.type}",
        "versions": packages,
    }


def check_weights(name: str) -> None:
    """Compare a folder's weights with the checksums that they were saved with; a line where a run's have none.

    Raises:
        BadInput: they are not what was saved.
    """
    if wrong := altered(Path(name), WEIGHTS):
        raise BadInput(f"model {name!r}: {wrong}. Take an older checkpoint, or a good copy")
    if Path(name).is_dir() and read_run(Path(name)) and not has_checksums(Path(name)):
        print(f"{name}: no {CHECKSUMS}, so that its weights are taken to be as they were saved")


def held_out_problems(settings) -> list[dict]:
    """EVAL_PROBLEMS of the test split, the same ones every time; none where EVAL_STEPS is 0.

    Raises:
        BadInput: they cannot be loaded.
    """
    if not settings.eval_steps:
        return []
    try:
        problems = task_of(settings).problems()
    except BadInput as error:
        raise BadInput(f"{error} (EVAL_STEPS = 0 trains without a test split)") from error
    return random.Random(0).sample(problems, min(settings.eval_problems, len(problems)))


def stem(task: Task) -> str:
    """The name of an evaluation's files: one with the model's own prompt lies beside the other."""
    return "evaluation" if task.native_instruction is None else "evaluation-native"


def save(folder: Path, task: Task, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(task)}.json"
    for kept in set_aside(folder, path.name, f"{path.name}l"):
        print(f"the earlier {kept.name} is kept as {kept}")
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(path, json.dumps(report, indent=2) + "\n")  # last: it says that both are there

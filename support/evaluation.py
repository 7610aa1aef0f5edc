"""A policy's answers to problems: how they are had and kept, how they are scored, and what is greedy accuracy."""

import json
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import xxhash
from scipy.stats import binomtest
from transformers.utils import cached_file

import rewards
from rewards import last_number, native_answer, same_number
from support.checkpoints import checksum
from support.errors import BadInput
from support.generation import complete, complete_with_vllm, load_policy
from support.problems import base_of, tokenize

LIMITS = ("max_completion_length", "chat_template_kwargs", "one_shot", "system_prompt_in_question")
ROW_SETTINGS = ("question_column", "answer_column", "drop_non_numeric")


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


def answered(task, tokenizer, problems: list[dict], by_vllm: bool) -> tuple[list[dict], Path]:
    """The greedy completions of B problems, or K rounds of B sampled ones, and the file that keeps them until they are
    scored. `task` is what evaluate.py is asked to do. BadInput where they cannot be had."""
    prompts, kwargs = [task.prompt(problem["question"]) for problem in problems], task.chat_template_kwargs
    token_ids, times = tokenize(tokenizer, prompts, kwargs), task.samples or 1
    how = {"temperature": task.temperature, "seed": task.seed} if task.samples else {}
    how["max_completion_length"] = task.max_completion_length
    fingerprint = _fingerprint(task, [how, times, by_vllm, task.batch_size, str(tokenizer), token_ids])
    prompts, token_ids = prompts * times, token_ids * times
    how["known"] = answers = Answers(task.file.with_suffix(f".unfinished-{fingerprint[:8]}.jsonl"))
    if answers:
        print(f"resuming: {len(answers):,} of {len(prompts):,} answers are in {answers.path}")
    options = {"revision": task.model_revision, "trust_remote_code": task.trust_remote_code}
    if by_vllm:
        options |= {"model": task.model, "gpu_memory_utilization": task.vllm_gpu_memory_utilization}
        completions = complete_with_vllm(tokenizer, token_ids, **how, **options)
    else:
        policy = load_policy(task.model, use_cpu=task.use_cpu, **options)
        how |= {"batch_size": task.batch_size, "chat_template_kwargs": kwargs}
        try:
            completions = complete(policy, tokenizer, prompts, **how)
        except torch.OutOfMemoryError as error:
            raise BadInput(f"the GPU's memory is too small: lower --batch_size (now {task.batch_size})") from error
    return completions, answers.path


def _fingerprint(task, asked: list) -> str:
    """The XXH3-128 of all that completions depend on: `asked`, versions, the device and the model's files."""
    on = (task.model, torch.cuda.is_available() and not task.use_cpu)
    asked = [*asked, *on, *map(metadata.version, ("torch", "transformers"))]
    for name in dict.fromkeys((task.model, base_of(task.model))):  # two for an adapter
        if Path(name).is_dir():
            files = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*config.json")])
            asked += [[path.name, checksum(path)] for path in files]
        else:  # in the Hub's cache, in a folder with the commit's name; an adapter there has no config.json
            file = "tokenizer_config.json" if name == task.model else "config.json"
            asked += [cached_file(name, file, revision=task.model_revision)]
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

"""Greedy accuracy on held-out problems: scores, statistics, two evaluations compared."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from rewards import SYSTEM_PROMPT, extract_xml_answer, is_strict_format, reflects, same_number, to_prompt
from support.checksums import CHECKSUMS, WEIGHTS, altered, has_checksums
from support.errors import BadInput
from support.generation import BATCH_SIZE, VLLM_VERSIONS, complete, complete_with_vllm, load_policy, vllm_obstacle
from support.problems import load_problems, load_tokenizer
from support.record import read_run, set_aside, write_whole

SIGNIFICANCE = 0.05  # a p-value from here on is no difference

# what must be the same of two evaluations, beside their problems
COMPARABLE = ("max_completion_length", "chat_template_kwargs", "one_shot", "system_prompt")

# of a report's table, with their format
ROWS = {
    "strict_accuracy": ".1%",
    "lenient_accuracy": ".1%",
    "format_rate": ".1%",
    "truncated_rate": ".1%",
    "mean_completion_tokens": ".1f",
    "reflection_rate": ".1%",
}

LAST_NUMBER = re.compile(r"(?:(?<![\w.,])-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


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

    def problems(self) -> list[dict]:
        return load_problems(self.dataset_name, self.dataset_config, self.split)[0][: self.limit]

    def prompt(self, question: str) -> list[dict]:
        return to_prompt(question, self.system_prompt, self.one_shot)


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
) -> tuple[dict, list[dict]]:
    """Evaluate a policy; with `use_vllm` None, by vLLM where it is installed with a GPU.

    Returns:
        The report (evaluation.json) and the scored problems (the lines of evaluation.jsonl).

    Raises:
        BadInput: the model or the problems cannot be loaded.
    """
    if use_vllm and (obstacle := vllm_obstacle(use_cpu)):
        raise BadInput(
            f"--use_vllm true needs vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU, but {obstacle}; leave it out to "
            "use Transformers"
        )
    check_weights(name)
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    problems = task.problems()
    prompts = [task.prompt(problem["question"]) for problem in problems]
    if use_vllm is None:  # vLLM loads whole models, no adapters
        use_vllm = vllm_obstacle(use_cpu) is None and not (Path(name) / "adapter_config.json").exists()
    length, kwargs = task.max_completion_length, task.chat_template_kwargs
    if use_vllm:
        completions = complete_with_vllm(name, tokenizer, prompts, length, kwargs, revision, trust_remote_code)
    else:
        policy = load_policy(name, revision, use_cpu, trust_remote_code)
        completions = complete(policy, tokenizer, prompts, length, batch_size, kwargs)
    rows = [score(i, *pair) for i, pair in enumerate(zip(problems, completions, strict=True))]
    where = {"model": name, "dataset": task.dataset_name, "split": task.split}
    how = {key: getattr(task, key) for key in COMPARABLE}
    return {**where, **summarize(rows), "model_revision": revision, **how}, rows


def check_weights(name: str) -> None:
    """Compare a folder's weights with the checksums that they were saved with, where there are any; a line where a run's
    have none.

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


def save(folder: Path, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    folder.mkdir(parents=True, exist_ok=True)
    for kept in set_aside(folder, "evaluation.json", "evaluation.jsonl"):
        print(f"the earlier {kept.name.split('.')[0]} is kept as {kept}")
    write_whole(folder / "evaluation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")


# ---- comparison


def load_evaluation(folder: Path, task: Task) -> tuple[dict, list[dict]]:
    """A finished evaluation of the same task out of a folder.

    Raises:
        BadInput: it is damaged, or measured something else; the message says what.
    """
    try:
        report = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
        of, written = Path(report["model"]), (folder / "evaluation.jsonl").stat().st_mtime
        asked = [(row["question"], row["gold"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: its evaluation cannot be read ({error!r}); evaluate it again") from error
    weights = [*folder.glob("*.safetensors")]
    if weights and (of.resolve() != folder.resolve() or max(path.stat().st_mtime for path in weights) > written):
        raise BadInput(
            f"{folder}: the evaluation there is of {of} or of earlier weights; evaluate {folder} again first"
        )
    differing = [
        f"{name.replace('_', ' ')}: {report.get(name)!r} there, {getattr(task, name)!r} here"
        for name in COMPARABLE
        if report.get(name) != getattr(task, name)
    ]
    wanted = [(problem["question"], problem["answer"]) for problem in task.problems()]
    if asked != wanted:
        same = sum(first == second for first, second in zip(asked, wanted, strict=False))
        differing.insert(0, f"problems: {len(asked)} there, {len(wanted)} here, {same} of them the same")
    if differing:
        raise BadInput(f"{folder}: its evaluation is not comparable. " + "; ".join(differing))
    return report, rows


def compare(rows: list[dict], baseline: list[dict], key: str = "strict") -> dict:
    """Paired comparison of strict (or lenient) results: the four counts, the difference, the exact p-value of McNemar's
    test.

    Only problems that exactly one of the two gets right say anything: were the two equally good, each such problem
    would fall to either with probability 1/2 (McNemar 1947, in its exact binomial form).
    """
    from scipy.stats import binomtest

    pairs = [(row[key], other[key]) for row, other in zip(rows, baseline, strict=True)]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    return {
        "difference": (gained - lost) / len(pairs),
        "both_right": pairs.count((True, True)),
        "only_model_right": gained,
        "only_baseline_right": lost,
        "both_wrong": pairs.count((False, False)),
        "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
        "n": len(pairs),
    }


def in_words(comparison: dict) -> str:
    """The comparison as a sentence: a difference, or none that so many problems could show."""
    p, n, points = comparison["mcnemar_p"], comparison["n"], 100 * comparison["difference"]
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p >= SIGNIFICANCE:
        return f"no difference that n = {n:,} could show ({points:+.1f} points, {p_text})"
    return f"{'better' if points > 0 else 'worse'} by {abs(points):.1f} points, {p_text}, n = {n:,}"


def table(reports: dict[str, dict]) -> str:
    """A column for each named report; of two, also the second minus the first."""
    first, last = next(iter(reports.values())), next(reversed(reports.values()))
    width = max(18, *(len(name) + 2 for name in reports))
    lines = [f"{'':<24}" + "".join(f"{name:>{width}}" for name in reports)]
    lines[0] += f"{'difference':>12}" if len(reports) == 2 else ""
    for key, unit in ROWS.items():
        line = f"{key.replace('_', ' '):<24}" + "".join(f"{report[key]:>{width}{unit}}" for report in reports.values())
        if len(reports) == 2:
            change = last[key] - first[key]
            line += f"{100 * change:>+12.1f}" if unit == ".1%" else f"{change:>+12.1f}"
        lines.append(line)
        if key == "strict_accuracy":
            intervals = (f"{low:.1%} - {high:.1%}" for low, high in (r["strict_ci95"] for r in reports.values()))
            lines.append(f"{'  95% interval':<24}" + "".join(f"{interval:>{width}}" for interval in intervals))
    lines.append(f"{'problems (n)':<24}" + "".join(f"{report['n']:>{width},}" for report in reports.values()))
    return "\n".join(lines)

"""Two evaluations of the same problems: which problems each of them solves, and what that can show."""

import json
import os
from pathlib import Path

from support.errors import BadInput
from support.evaluation import COMPARABLE, Task, evaluate, save, stem
from support.record import read_run
from support.unfinished import Unfinished

SIGNIFICANCE = 0.05  # a p-value from here on is no difference

# of a report's table, with their format
ROWS = {
    "strict_accuracy": ".1%",
    "lenient_accuracy": ".1%",
    "format_rate": ".1%",
    "truncated_rate": ".1%",
    "mean_completion_tokens": ".1f",
    "reflection_rate": ".1%",
}
KINDS = {(True, False): "gained", (False, True): "lost", (True, True): "both", (False, False): "neither"}
SHOTS = {True: "with one worked example", False: "zero-shot"}  # by ONE_SHOT
IN_COLUMNS = (*ROWS, "strict_ci95", "n")  # what such a table is made of


# ---- the baseline


def home(name: str) -> Path:
    """The folder a model's evaluation goes to: its own, or one under outputs/ for a model on the Hub or in a folder
    that cannot be written to."""
    folder = Path(name)
    return (
        folder
        if folder.is_dir() and os.access(folder, os.W_OK)
        else Path("outputs") / name.strip("/").replace("/", "--")
    )


def native_obstacle(name: str) -> str | None:
    """Why a model cannot be measured with the prompt it was made for; None where it can."""
    folder = Path(name)
    taught_here = any((place / "teaching.json").is_file() for place in (folder, folder.parent))
    if taught_here or read_run(folder).get("settings", {}).get("demo"):
        return "the demo's tiny policy was taught with the recipe's prompt alone, and has no native one"
    configs = ("config.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / config).is_file() for config in configs):
        return f"{folder} holds an evaluation, but no model"
    return None


def baseline_evaluation(name: str, task: Task, **options) -> tuple[dict, list[dict]]:
    """The baseline's evaluation: the one in its folder, else made and saved there now."""
    folder = Path(name) if (Path(name) / f"{stem(task)}.json").is_file() else home(name)
    which = "native prompt" if task.native_instruction else "the recipe's prompt"
    if (folder / f"{stem(task)}.json").is_file():
        report, rows = load_evaluation(folder, task, name)
        print(f"baseline, {which}: the evaluation of {report['model']} in {folder}")
        return report, rows
    print(f"baseline, {which}: {name}")
    with Unfinished(folder, stem(task)) as answers:
        report, rows = evaluate(name, task, answers=answers, **options)
        save(folder, task, report, rows)
    return report, rows


def baselines(name: str, task: Task, native: bool | None, **options) -> dict[str, tuple[dict, list[dict]]]:
    """The baseline with the prompt it was made for, where it has one, and with the recipe's. `native` False leaves the
    first out, True insists on it.

    Raises:
        BadInput: there is none to insist on.
    """
    obstacle = native_obstacle(name)
    if native and obstacle:
        raise BadInput(f"--native: {obstacle}")
    if native is None and obstacle:
        print(f"the native column is left out: {obstacle}")
    columns = {"baseline": baseline_evaluation(name, task, **options)}
    if native is not False and not obstacle:
        columns = {"baseline native": baseline_evaluation(name, task.natively(), **options), **columns}
    return columns


def load_evaluation(folder: Path, task: Task, model: str) -> tuple[dict, list[dict]]:
    """A finished evaluation of the same task out of a folder: that of `model`, whose weights are looked at where they
    are on disk.

    Raises:
        BadInput: it is damaged, or measured something else; the message says what.
    """
    path = folder / f"{stem(task)}.json"
    try:
        report = json.loads((path).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (path.with_suffix(".jsonl")).read_text(encoding="utf-8").splitlines()]
        of, written = Path(report["model"]), (path.with_suffix(".jsonl")).stat().st_mtime
        asked = [(row["question"], row["gold"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: its evaluation cannot be read ({error!r}); evaluate it again") from error
    weights = [*Path(model).glob("*.safetensors")]
    if weights and (of.resolve() != Path(model).resolve() or max(path.stat().st_mtime for path in weights) > written):
        raise BadInput(f"{folder}: the evaluation there is of {of} or of earlier weights; evaluate {model} again first")
    differing = [
        f"{name.replace('_', ' ')}: {report.get(name)!r} there, {getattr(task, name)!r} here"
        for name in COMPARABLE
        if report.get(name) != getattr(task, name)
    ]
    if report.get("model_revision") and not Path(model).is_dir():  # by its name on the Hub it is the newest
        differing.append(f"model revision: {report['model_revision']!r} there, the newest here")
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


def paired(name: str, before: dict[str, tuple[dict, list[dict]]], rows: list[dict]) -> dict:
    """What evaluation.json says of a comparison with the baseline `name`: both paired tests, the baseline's columns."""
    columns = {column: {key: report[key] for key in IN_COLUMNS} for column, (report, _) in before.items()}
    tests = compare(rows, before["baseline"][1])
    if "baseline native" in before:
        tests["native"] = compare(rows, before["baseline native"][1], "lenient")
    return {"baseline": name, **tests, "columns": columns, "samples": _samples(rows, before["baseline"][1])}


def kinds(rows: list[dict], baseline: list[dict], key: str = "strict") -> list[str]:
    """Of each problem, which of the two gets it right: 'gained', 'lost', 'both' or 'neither'."""
    return [KINDS[row[key], other[key]] for row, other in zip(rows, baseline, strict=True)]


def _samples(rows: list[dict], baseline: list[dict]) -> list[dict]:
    """Three problems for the run's report, each the first of its kind; of 'both' where another kind is missing."""
    of_each = kinds(rows, baseline)
    chosen = [of_each.index(kind) for kind in ("gained", "lost", "neither", "both") if kind in of_each][:3]
    return [
        {
            "kind": of_each[i],
            "question": rows[i]["question"],
            "gold": rows[i]["gold"],
            "before": baseline[i]["completion"],
            "after": rows[i]["completion"],
        }
        for i in chosen
    ]


def verdicts(model: str, baseline: str, paired: dict) -> str:
    """The paired tests in words: a line of counts and a sentence for each."""
    tests = {"strict": ("with the same prompt, strict", paired)}
    if "native" in paired:
        tests["lenient"] = ("with its native prompt, lenient", paired["native"])
    return "\n".join(
        f"{key} results in pairs: both right {counts['both_right']}, only the model {counts['only_model_right']}, "
        f"only the baseline {counts['only_baseline_right']}, both wrong {counts['both_wrong']}\n"
        f"{model} against {baseline} {how}: {in_words(counts)}"
        for key, (how, counts) in tests.items()
    )


def cells(reports: dict[str, dict]) -> list[list[str]]:
    """A column for each named report, the names on top; of two, also the second minus the first."""
    first, last = next(iter(reports.values())), next(reversed(reports.values()))
    rows = [["", *reports] + (["difference"] if len(reports) == 2 else [])]
    for key, unit in ROWS.items():
        values = [report[key] for report in reports.values()]
        rows.append([key.replace("_", " "), *("-" if value is None else f"{value:{unit}}" for value in values)])
        if len(reports) == 2:
            change = None if None in values else (100 if unit == ".1%" else 1) * (last[key] - first[key])
            rows[-1].append("" if change is None else f"{change:+.1f}")
        if key == "strict_accuracy":
            intervals = (report["strict_ci95"] for report in reports.values())
            rows.append(["  95% interval", *("-" if ci is None else f"{ci[0]:.1%} - {ci[1]:.1%}" for ci in intervals)])
    rows.append(["problems (n)", *(f"{report['n']:,}" for report in reports.values())])
    return rows


def table(reports: dict[str, dict]) -> str:
    """`cells` in columns of text."""
    width = max(18, *(len(name) + 2 for name in reports))
    widths = [width] * len(reports) + [12]
    lines = []
    for label, *values in cells(reports):
        line = f"{label:<24}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=False))
        lines.append(line.rstrip())
    return "\n".join(lines)

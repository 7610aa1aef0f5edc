"""A comparison as a page: comparison.html, one file that opens in a browser and runs and fetches nothing."""

from pathlib import Path

from support.comparison import KINDS, SHOTS, cells, in_words, kinds
from support.evaluation import answer_span
from support.record import printable, set_aside, write_whole

TEMPLATE = Path(__file__).parent / "templates" / "comparison.html"
COUNTS = ("only_model_right", "only_baseline_right", "both_right", "both_wrong")  # of these kinds, in evaluation.json


def write_page(folder: Path, model: str, before: dict[str, tuple[dict, list[dict]]], report: dict, rows: list) -> Path:
    """Write FOLDER/comparison.html; an earlier one is set aside.

    Args:
        before: the baseline's reports and rows by the names of their columns.
        report: the model's evaluation.json, with its comparison.
    """
    from jinja2 import Environment

    tests = [_test("strict", "strict, the same prompt", report["comparison"])]
    paired = {"strict": kinds(rows, before["baseline"][1])}
    if "native" in report["comparison"]:
        tests.append(_test("lenient", "lenient, the baseline with its native prompt", report["comparison"]["native"]))
        paired["lenient"] = kinds(rows, before["baseline native"][1], "lenient")
    columns = {name: baseline for name, (_, baseline) in before.items()} | {"model": rows}
    problems = [
        {
            "number": i + 1,
            "question": printable(row["question"]),
            "gold": printable(row["gold"]),
            "kinds": {key: of_each[i] for key, of_each in paired.items()},
            "sides": [_side(name, of_each[i]) for name, of_each in columns.items()],
        }
        for i, row in enumerate(rows)
    ]
    reports = {name: baseline for name, (baseline, _) in before.items()} | {"model": report}
    texts = {name: printable(str(report[name])) for name in ("dataset", "split", "max_completion_length")}
    texts["shots"] = SHOTS[report["one_shot"]]
    names = {"model": printable(model), "baseline": printable(report["comparison"]["baseline"])}
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        **names, **texts, columns=columns, table=cells(reports), tests=tests, kinds=KINDS.values(), problems=problems
    )
    for kept in set_aside(folder, "comparison.html"):
        print(f"the earlier comparison.html is kept as {kept}")
    write_whole(folder / "comparison.html", page)
    return folder / "comparison.html"


def _test(key: str, name: str, counts: dict) -> dict:
    numbers = {kind: counts[count] for kind, count in zip(KINDS.values(), COUNTS, strict=True)}
    return {"key": key, "name": name, "verdict": in_words(counts), "counts": numbers}


def _side(name: str, row: dict) -> dict:
    """One completion, cut where its answer stands."""
    text, native = row["completion"], row["strict"] is None
    start, end = answer_span(text, native) or (len(text), len(text))
    verdict = "right" if row["lenient"] else "wrong"
    if not native and row["lenient"] | row["strict"]:
        verdict = "right, in the format" if row["strict"] else "right number, not in the format"
    cut = ", cut off" if row["truncated"] else ""
    return {
        "name": name,
        "verdict": f"{verdict}, {row['tokens']} tokens{cut}",
        "right": row["lenient"] if native else row["strict"] or row["lenient"],
        "before": printable(text[:start]),
        "answer": printable(text[start:end]) if start < end else None,
        "after": printable(text[end:]),
    }

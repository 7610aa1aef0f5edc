"""A comparison of two evaluations as a page for a browser: every problem with all completions beside each other, the
answer that was scored marked, and what was gained, lost, solved by both or by neither.

    python evaluate.py outputs/RUN --compare BASELINE
    python benchmarks/side_by_side.py outputs/RUN         # writes outputs/RUN/comparison.html

The folder is the one with the model's evaluation.json: evaluate.py's --output_dir where that was given. The baseline's
evaluations are read from where evaluate.py keeps them, and must still be those that were compared.
"""

import argparse
import json
import sys
from operator import eq
from pathlib import Path

from jinja2 import FileSystemLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluate import Task
from rewards import NUMBER_IN_TEXT, boxed_span, is_strict_format
from support.comparison import KINDS, SHOTS, cells, in_words, kinds
from support.errors import BadInput
from support.progress import TEMPLATES
from support.record import printable, set_aside, write_whole

PAGES = TEMPLATES.overlay(loader=FileSystemLoader(Path(__file__).parent))


def load(path: Path) -> tuple[dict, list[dict]]:
    """An evaluation.json and the rows of its .jsonl; BadInput where one is missing or damaged."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        _ = report["model"], asked(rows)  # a KeyError in another file
    except FileNotFoundError as missing:
        raise BadInput(f"{missing.filename}: no such file; evaluate.py writes it") from missing
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: it or its .jsonl cannot be read ({error!r}); evaluate again") from error
    return report, rows


def asked(rows: list[dict]) -> list[tuple[str, str]]:
    """The problems that an evaluation is of."""
    return [(row["question"], row["gold"]) for row in rows]


def load_baseline(name: str, columns: dict[str, dict], rows: list[dict]) -> dict[str, tuple[dict, list[dict]]]:
    """The baseline's reports and rows by the names of their columns. BadInput where they are not of the problems of
    the model's `rows`, or where the numbers in `columns`, which were compared, are not theirs."""
    before, task = {}, Task(name)
    for column, compared in columns.items():
        kept = (task.natively() if column == "baseline native" else task).file
        beside = Path(name) / kept.name  # first, as evaluate.py looks for it: the folder may be read-only
        path = beside if beside.is_file() else kept
        report, answered = load(path)
        if asked(answered) != asked(rows):
            same = sum(map(eq, asked(answered), asked(rows)))
            counts = f"problems: {len(answered)} there, {len(rows)} here, {same} of them the same"
            raise BadInput(f"{path}: not comparable. {counts}; run evaluate.py with --compare again")
        if differing := [key for key, value in compared.items() if report.get(key) != value]:
            other = f"not the evaluation that was compared: another {', '.join(differing).replace('_', ' ')}"
            raise BadInput(f"{path}: {other}; run evaluate.py with --compare again")
        before[column] = report, answered
    return before


def write_page(folder: Path) -> Path:
    """Write FOLDER/comparison.html, which needs no other file; an earlier one is renamed. BadInput where no comparison
    was made, or an evaluation is missing, damaged or not comparable."""
    report, rows = load(folder / "evaluation.json")
    if "columns" not in report.get("comparison", {}):
        compare = f"run python evaluate.py {report['model']} --compare BASELINE first"
        raise BadInput(f"{folder}/evaluation.json: no comparison with a baseline; {compare}")
    paired = report["comparison"]
    before = load_baseline(paired["baseline"], paired["columns"], rows)
    columns = before | {"model": (report, rows)}
    tests = [("strict", "strict, the same prompt", "baseline", paired)]
    if "native" in paired:
        tests.append(("lenient", "lenient, the baseline with its native prompt", "baseline native", paired["native"]))
    text = PAGES.get_template("comparison.html").render(
        model=report["model"],
        report=report,
        rows=rows,
        table=cells({name: measured for name, (measured, _) in columns.items()}),
        tests=[
            {"key": key, "name": name, "verdict": in_words(counts), "kinds": kinds(rows, before[column][1], key)}
            for key, name, column, counts in tests
        ],
        kinds=KINDS.values(),
        sides={name: answered for name, (_, answered) in columns.items()},
        shots=SHOTS,
        parts=parts,
    )
    set_aside(folder / "comparison.html")
    write_whole(folder / "comparison.html", text)
    return folder / "comparison.html"


def parts(row: dict) -> tuple[str, str, str]:
    """A completion, divided into what stands before its answer, the answer, and what follows."""
    text = row["completion"]
    start, end = answer_span(text, native=row["strict"] is None) or (len(text), len(text))
    return text[:start], text[start:end], text[end:]


def answer_span(text: str, native: bool) -> tuple[int, int] | None:
    """Where the answer stands that a completion is scored by: its last box (natively), else its answer tag where it is
    in format, else its last number. None without any."""
    if native and (span := boxed_span(text)):
        return span
    if not native and is_strict_format(text):  # which has each tag once
        return text.index("<answer>") + len("<answer>"), text.index("</answer>")
    return ([match.span() for match in NUMBER_IN_TEXT.finditer(text)] or [None])[-1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the evaluation.json of evaluate.py --compare")
    try:
        print(f"written: {write_page(parser.parse_args(argv).folder)}, for a browser")
    except (BadInput, OSError) as error:  # the latter of a folder that cannot be written to, say
        sys.exit(f"side_by_side.py: {printable(str(error))}")


if __name__ == "__main__":
    main()

"""README.md of a run, its report and model card: what run.json, the log and the evaluation say, and nothing else."""

import json
import re
import shlex
from pathlib import Path

from support.comparison import SHOTS, in_words, table
from support.curves import read_log
from support.errors import BadInput
from support.evaluation import LIMITS, ROW_SETTINGS
from support.problems import is_path
from support.progress import TEMPLATES, render
from support.record import read_run, write_whole

COLUMNS = {"baseline native": "before, native", "baseline": "before"}


def write_report(folder: Path, log: list[dict] | None = None) -> Path | None:
    """Write a GRPO run's README.md from `log`, else the folder's own; None for another folder, or without a log."""
    run = read_run(folder) if (folder / "run.json").is_file() else {}
    if "num_generations" not in run.get("settings", {}):  # no run, or a cold start
        return None
    try:
        log = read_log(folder) if log is None else log
    except BadInput:  # a merged adapter, or a run that has not saved yet
        return None
    measured = _evaluation(folder)
    before = (measured or {}).get("comparison", {}).get("columns", {})
    text = render(
        "model_card.md",
        title=folder.resolve().name,
        run=run,
        step=max((row["step"] for row in log), default=0),
        seconds=next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None),  # once it ended
        held_out=[row for row in log if "eval_strict_accuracy" in row],
        is_adapter=(folder / "adapter_config.json").is_file(),
        has_curves=(folder / "curves.png").is_file(),
        measured=measured,
        table=measured and table({COLUMNS[name]: column for name, column in before.items()} | {"after": measured}),
        trained_by=shlex.join(map(str, run["command"])),
        measured_by=measured and _evaluate_command(folder, run["settings"], measured),
    )
    write_whole(folder / "README.md", text)
    return folder / "README.md"


def _evaluation(folder: Path) -> dict | None:
    """evaluation.json, where it measured the policy that is in the folder now."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    newest = max((weights.stat().st_mtime for weights in folder.glob("*.safetensors")), default=0)
    is_of_it = Path(report["model"]).resolve() == folder.resolve() and path.stat().st_mtime >= newest
    return report if is_of_it else None


def _evaluate_command(folder: Path, settings: dict, measured: dict) -> str:
    """The command, with a flag for whatever differed from the run's own settings."""
    asked = {"compare": measured.get("comparison", {}).get("baseline"), "limit": measured["limit"]}
    asked |= {"dataset_name": measured["dataset"], "dataset_test_split": measured["split"]}
    asked |= {name: measured.get(name, settings.get(name)) for name in (*LIMITS, *ROW_SETTINGS)}
    words = ["python", "evaluate.py", str(folder)]
    for name, value in asked.items():
        if (value or None) != (settings.get(name) or None):
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _code(value) -> str:
    """Code within a line of Markdown, in more backticks than it has in a row, so that the text cannot close it."""
    text = str(value).replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escaped(text: str) -> str:
    """Plain words within a line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", text.replace("\n", "\\n"))


TEMPLATES.filters |= {"code": _code, "escaped": _escaped, "in_words": in_words, "shots": SHOTS.get, "is_path": is_path}

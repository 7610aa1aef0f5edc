"""A run's report: README.md in its folder, its model card on the Hub. Every number in it is out of run.json, the log or
evaluation.json, and what was not measured is not there."""

import json
import re
import shlex
from pathlib import Path

from support.comparison import IN_COLUMNS, SHOTS, in_words, table
from support.curves import read_log
from support.errors import BadInput
from support.problems import is_path
from support.record import printable, read_run, write_whole

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
HELD_OUT_ROWS = 7  # of the log's held-out evaluations: the first, the last, and some between
GSM8K = ("openai/gsm8k", "test")


def write_report(folder: Path, log: list[dict] | None = None) -> Path | None:
    """Write FOLDER/README.md of a run's folder; nothing where there is no run, or only its run.json.

    Args:
        log: the trainer's; None takes what the folder holds of it.
    """
    from huggingface_hub import ModelCard

    if not (folder / "run.json").is_file():
        return None
    run, measured = read_run(folder), _evaluation(folder)
    try:
        log = read_log(folder) if log is None else log
    except BadInput:  # a merged adapter, or a run that has not saved yet
        return None
    commands = [
        shlex.join(map(str, run["command"])),
        *(_evaluated_by(folder, run["settings"], measured) if measured else []),
    ]
    parts = {**_run_in_words(folder, run, log), "commands": _block("\n".join(commands)), "samples": []}
    parts |= _evaluation_in_words(measured) if measured else {}
    card = ModelCard.from_template(_metadata(folder, run, measured), template_str=_template(), **parts)
    write_whole(folder / "README.md", str(card))
    return folder / "README.md"


def _template() -> str:
    """The template, its lines of control flow without their line ends, which would be blank lines."""
    return re.sub(r"(?m)^(\{%.*%\})\n", r"\1", TEMPLATE.read_text(encoding="utf-8"))


def _evaluation(folder: Path) -> dict | None:
    """evaluation.json, where it measured the policy that lies in the folder now."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    if "limit" not in report:  # of an earlier version, which did not say whether it was the whole split
        return None
    newest = max((weights.stat().st_mtime for weights in folder.glob("*.safetensors")), default=0)
    is_of_it = Path(report["model"]).resolve() == folder.resolve() and path.stat().st_mtime >= newest
    return report if is_of_it else None


def _metadata(folder: Path, run: dict, measured: dict | None):
    """What the Hub reads: only what has a name there."""
    from huggingface_hub import EvalResult, ModelCardData

    settings, results = run["settings"], None
    base, dataset = (settings[name] for name in ("model_name_or_path", "dataset_name"))
    is_whole = measured and (measured["dataset"], measured["split"]) == GSM8K and measured["limit"] is None
    if is_whole:
        of = {"dataset_type": GSM8K[0], "dataset_name": "GSM8K", "dataset_split": GSM8K[1]}
        names = {"strict_accuracy": "strict accuracy, greedy", "lenient_accuracy": "lenient accuracy, greedy"}
        results = [
            EvalResult("text-generation", **of, metric_type="accuracy", metric_value=measured[key], metric_name=name)
            for key, name in names.items()
        ]
    return ModelCardData(
        base_model=None if is_path(base) else base,
        datasets=None if is_path(dataset) else [dataset],
        library_name="peft" if settings["use_peft"] else "transformers",
        pipeline_tag="text-generation",
        tags=["grpo", "trl"],
        model_name=printable(folder.resolve().name),
        eval_results=results,
    )


def _run_in_words(folder: Path, run: dict, log: list[dict]) -> dict:
    settings = run["settings"]
    step = max((row["step"] for row in log), default=0)
    a_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * run["processes"]
    seconds = next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None)  # once it has ended
    since = " since it was last resumed" if run["earlier"] or settings["resume_from_checkpoint"] else ""
    held_out = [row for row in log if "eval_strict_accuracy" in row]
    every = -(-len(held_out) // HELD_OUT_ROWS) or 1
    commit = f"; the recipe at commit {_code(run['commit'])}" if run["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    problems = f", {run['problems']:,} problems" if "problems" in run else ""
    return {
        "name": _escaped(folder.resolve().name),
        "policy": _code(settings["model_name_or_path"]) + (" with LoRA" if settings["use_peft"] else ""),
        "data": f"{_code(settings['dataset_name'])} (split {_code(settings['dataset_train_split'])}{problems})",
        "steps": f"{step:,} steps of {a_step} completions",
        "device": _code(run["device"]) + (f" x {run['processes']} processes" if run["processes"] > 1 else ""),
        "minutes": f", {seconds / 60:.1f} minutes{since}" if seconds else "",
        "held_out": held_out[:-1][::every] + held_out[-1:],
        "has_curves": (folder / "curves.png").is_file(),
        "prompt": _block(run["system_prompt"]),
        "versions": _escaped(versions) + commit,
    }


def _evaluated_by(folder: Path, settings: dict, measured: dict) -> list[str]:
    """The command, with a flag for whatever was not the run's own."""
    asked = {"compare": measured.get("comparison", {}).get("baseline"), "limit": measured["limit"]}
    names = {"dataset_name": "dataset", "dataset_test_split": "split"}
    names |= {name: name for name in ("max_completion_length", "chat_template_kwargs", "one_shot")}
    asked |= {name: measured[key] for name, key in names.items() if (measured[key] or None) != (settings[name] or None)}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()}
    words = [word for name, text in texts.items() if asked[name] is not None for word in (f"--{name}", text)]
    return [shlex.join(["python", "evaluate.py", str(folder), *words])]


def _evaluation_in_words(measured: dict) -> dict:
    after, paired = {key: measured[key] for key in IN_COLUMNS}, measured.get("comparison")
    how = f"On {_code(measured['dataset'])}, split {_code(measured['split'])}, greedy and {SHOTS[measured['one_shot']]}"
    if not paired:
        return {"table": _block(table({"after": after})), "verdict": f"{how}."}
    names = {"baseline native": "before, native", "baseline": "before"}
    columns = {names[name]: column for name, column in paired["columns"].items()} | {"after": after}
    verdict = f"{how}; before is {_code(paired['baseline'])}. Strict, the same prompt: {in_words(paired)}."
    if "native" in paired:
        verdict += f" Lenient, against the prompt that it was made for: {in_words(paired['native'])}."
    samples = [
        {name: (_code if name in ("kind", "gold") else _block)(text) for name, text in sample.items()}
        for sample in paired["samples"]
    ]
    return {"table": _block(table(columns)), "verdict": verdict, "samples": samples}


# ---- text that is nobody's Markdown


def _block(text: str) -> str:
    """A block of code, in a fence that the text cannot close."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=2) + 1)
    fence = max(fence, "```", key=len)
    return f"{fence}text\n{printable(text)}\n{fence}"


def _code(value) -> str:
    """Code within a line."""
    text = printable(str(value)).replace("\n", "\\n")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escaped(text: str) -> str:
    """Plain words within a line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", printable(text).replace("\n", "\\n"))

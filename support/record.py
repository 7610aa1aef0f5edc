"""What a run writes down of itself: run.json, in files that appear whole or not at all."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rewards import SYSTEM_PROMPT
from support import processes
from support.errors import BadInput, RunStopped

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "vllm")


# ---- text and files


def printable(text: str) -> str:
    """`text` with control characters and bidirectional overrides written as escapes, so that what a model or a dataset
    says cannot drive the terminal. Newlines stay."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def set_aside(folder: Path, *names: str) -> list[Path]:
    """Rename what `folder` holds of these files after the time they were written, so that nothing is overwritten."""
    kept = []
    for path in (folder / name for name in names):
        if path.exists():
            written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
            kept.append(path.rename(path.with_stem(f"{path.stem}-{written}")))
    return kept


# ---- run.json


def read_run(folder: Path) -> dict:
    """run.json of a run's folder, or of the folder above a checkpoint; empty where there is none.

    Raises:
        BadInput: the file is no JSON.
    """
    for path in (folder / "run.json", folder.parent / "run.json"):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadInput(f"{path}: no JSON ({error}); it was written by a run, mend or delete it") from error
    return {}


def describe(settings) -> dict:
    """Every setting as used, and the prompt."""
    return {"settings": settings.to_dict(), "system_prompt": SYSTEM_PROMPT}


class Run:
    """What run.json says of a run: settings and data, versions, commit, command, start, end and outcome.

    Nothing is written before `begin`, so that a start that is refused leaves no trace. A resumed run keeps its earlier
    starts under `earlier`.
    """

    def __init__(self, settings):
        self.folder = Path(settings.output_dir)
        self.settings = settings
        self.facts = {}
        self.begun = False

    def knows(self, samples: list[dict], revision: str | None) -> None:
        """Take note of the training samples and their dataset's revision on the Hub.

        Raises:
            RunStopped: a resumed run had others.
        """
        digest = hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()
        self.facts |= {"dataset_revision": revision, "problems": len(samples), "problems_sha256": digest}
        place = Path(self.settings.resume_from_checkpoint or self.folder)
        may_change = self.settings.allow_changed_settings or not self.settings.is_resumed
        if processes.is_main() and not may_change and read_run(place).get("problems_sha256", digest) != digest:
            raise RunStopped(
                f"{place} belongs to a run on other problems: the dataset has changed since. Give those of the run, or "
                "say --allow_changed_settings true",
                status=2,
            )

    def begin(self, **facts) -> None:
        """Write run.json with the outcome 'running', at the first call."""
        if self.begun or not processes.is_main():
            return
        before = read_run(self.folder) if (self.folder / "run.json").is_file() else None
        kept = ("command", "started", "ended", "outcome", "processes")
        earlier = [*before.get("earlier", []), {key: before.get(key) for key in kept}] if before else []
        self.facts = {
            "outcome": "running",
            "command": _command(),
            "started": _now(),
            "ended": None,
            "processes": processes.count(),
            **describe(self.settings),
            **self.facts,
            **facts,
            "device": device_name(self.settings.device),
            "versions": _versions(),
            "commit": _commit(),
            "earlier": earlier,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begun = True
        self._write()

    def end(self, outcome: str) -> None:
        """Say how the run ended, where it had begun."""
        if self.begun:
            self.facts |= {"ended": _now(), "outcome": outcome[:500]}
            try:
                self._write()
            except OSError as full:  # what ends the run matters more
                print(f"{self.folder}/run.json does not say how the run ended: {full}", file=sys.stderr)

    def _write(self) -> None:
        write_whole(self.folder / "run.json", json.dumps(self.facts, indent=2, default=str) + "\n")


def _command() -> list[str]:
    return [*_launch(), *_words()]


def _words() -> list[str]:
    """The command line, a Hub token in it blotted out."""
    words = list(sys.argv)
    for i, word in enumerate(words):
        if re.match("--hub[_-]token=", word):
            words[i] = "--hub_token=..."
        elif i and words[i - 1] in ("--hub_token", "--hub-token"):
            words[i] = "..."
    return words


def _launch() -> list[str]:
    """How this run was started; the launcher's other flags are not known here."""
    if processes.count() == 1:
        return ["python"]
    how = ["--config_file", "YOURS"] if processes.is_sharded() else ["--multi_gpu"]
    return ["accelerate", "launch", *how, "--num_processes", str(processes.count())]


def resume_command() -> str:
    """What goes on with this run."""
    words = _words()
    for i, word in reversed(list(enumerate(words))):
        if re.fullmatch(r"--resume[_-]from[_-]checkpoint(=.*)?", word):
            del words[i : i + (1 if "=" in word else 2)]
    return shlex.join([*_launch(), *words, "--resume_from_checkpoint", "auto"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _commit() -> str | None:
    """This recipe's git commit, '-dirty' where tracked files were edited; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None


def device_name(device) -> str:
    """What a `torch.device` is: the GPU's name, or 'cpu' and its cores."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"

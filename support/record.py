"""What a run writes down of itself: run.json and its code, in files that appear whole or not at all."""

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

import torch

import rewards
from support import processes
from support.errors import BadInput, RunStopped

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "vllm")


def printable(text: str) -> str:
    """`text` with control and bidirectional characters escaped, so that a model's words cannot drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def set_aside(*paths: Path) -> None:
    """Rename what there is of these files after the time they were written, so that nothing is overwritten."""
    for path in paths:
        if path.exists():
            written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
            print(f"the earlier {path.name} is kept as {path.rename(path.with_stem(f'{path.stem}-{written}'))}")


def read_run(folder: Path) -> dict:
    """run.json in a run's folder, or above a checkpoint; empty where there is none. BadInput where it is not JSON."""
    above = [folder.parent / "run.json"] if folder.name.startswith("checkpoint-") else []
    for path in (folder / "run.json", *above):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadInput(f"{path} is not JSON ({error}); it was written by a run: mend or delete it") from error
    return {}


def describe(settings) -> dict:
    """What run.json says of the settings: each as it is used, the prompt, the processes, the code's checksums."""
    return {
        "settings": settings.to_dict(),
        "system_prompt": rewards.SYSTEM_PROMPT,
        "processes": processes.count(),
        "code_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _code(settings)},
    }


def _code(settings) -> list[Path]:
    """The files that are the method: the script that was started, and rewards.py."""
    return [Path(settings.script), Path(rewards.__file__)]


class Run:
    """What run.json says of a run: settings, data, code, versions, commit, command, start, end and outcome; of a
    resumed run also its earlier starts. Nothing is written before `begin`: what ends sooner leaves no trace."""

    def __init__(self, settings):
        self.folder, self.settings = Path(settings.output_dir), settings
        self.facts, self.has_begun, self.started = {}, False, _now()

    def knows(self, samples: list[dict], revision: str | None) -> None:
        """Note the samples and their dataset's revision on the Hub. RunStopped where a resumed run had others."""
        digest = hashlib.sha256(json.dumps(samples, sort_keys=True, default=str).encode()).hexdigest()
        self.facts |= {"dataset_revision": revision, "problems": len(samples), "problems_sha256": digest}
        place = Path(self.settings.resume_from_checkpoint or self.folder)
        may_change = self.settings.allow_changed_settings or not self.settings.is_resumed
        if processes.is_main() and not may_change and read_run(place).get("problems_sha256", digest) != digest:
            changed = f"{place} belongs to a run on other problems: the dataset has changed since"
            raise RunStopped(f"{changed}. Give those of the run, or say --allow_changed_settings true", status=2)

    def begin(self, model_revision: str | None, off: set[str]) -> None:
        """Write run.json once: the outcome 'running', what is `off` with these versions; and the code beside it."""
        if self.has_begun or not processes.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_run(self.folder) if (self.folder / "run.json").is_file() else {}
        kept = ("command", "started", "ended", "outcome", "processes")
        found = {each.name.lower(): each.version for each in metadata.distributions()}
        self.facts |= {
            "outcome": "running",
            "command": [*_launcher(), *_command_line()],
            "started": self.started,
            "ended": None,
            **describe(self.settings),
            "model_revision": model_revision,
            "off": sorted(off),
            "device": device_name(self.settings.device),
            "versions": {"python": platform.python_version(), **{package: found.get(package) for package in PACKAGES}},
            "commit": _commit(),
            "earlier": before.get("earlier", []) + ([{key: before.get(key) for key in kept}] if before else []),
        }
        self.has_begun = True
        self._write()
        for path in _code(self.settings):
            copy, text = self.folder / path.name, path.read_text(encoding="utf-8")
            if not copy.is_file() or copy.read_text(encoding="utf-8") != text:
                set_aside(copy)
                write_whole(copy, text)

    def end(self, outcome: str) -> None:
        """Say how the run ended, where it has begun."""
        if self.has_begun:
            self.facts |= {"ended": _now(), "outcome": outcome[:500]}
            try:
                self._write()
            except OSError as full:  # what ends the run matters more
                print(f"{self.folder}/run.json does not say how the run ended: {full}", file=sys.stderr)

    def _write(self) -> None:
        write_whole(self.folder / "run.json", json.dumps(self.facts, indent=2, default=str) + "\n")


def _command_line() -> list[str]:
    """What was typed behind the launcher, without a Hub token."""
    return shlex.split(re.sub(r"--hub[_-]token([= ])\S+", r"--hub_token\1...", shlex.join(sys.argv)))


def _launcher() -> list[str]:
    """What this run was started with; the launcher's other flags are unknown here."""
    if processes.count() == 1:
        return ["python"]
    how = ["--config_file", "YOURS"] if processes.is_sharded() else ["--multi_gpu"]
    return ["accelerate", "launch", *how, "--num_processes", str(processes.count())]


def resume_command() -> str:
    """The command that resumes this run."""
    words = [*_launcher(), *_command_line()]
    if given := next((i for i, word in enumerate(words) if re.match("--resume[_-]from[_-]checkpoint", word)), None):
        del words[given : given + (1 if "=" in words[given] else 2)]
    return shlex.join([*words, "--resume_from_checkpoint", "auto"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """This recipe's git commit, '-dirty' where tracked files were edited; None outside a checkout."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def device_name(device) -> str:
    """What a `torch.device` is: the GPU's name, or 'cpu' and its cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"

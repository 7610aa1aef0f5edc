"""The answers of an evaluation, on disk as they come: one that ends early is gone on with, to the same end."""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryFile

import xxhash

from support.errors import BadInput
from support.record import write_whole


class Unfinished:
    """A context around an evaluation and the saving of it. Its completions are in
    FOLDER/`stem`.unfinished-XXXXXXXX.jsonl until it is left normally: the file stays after an error or a signal, aloud,
    or a kill. The X name what was asked of which model, so that another evaluation neither takes nor replaces it."""

    def __init__(self, folder: Path, stem: str):
        self.folder, self.stem = folder, stem
        self.path: Path | None = None  # None until `begin`
        self.completions: dict[int, dict] = {}  # by the number of their problem
        self.count = 0  # problems

    def begin(self, asked: dict, count: int) -> None:
        """Take up the completions that an earlier start left.

        Args:
            asked: everything that shapes a completion, to the last bit of a weight: a change of any starts anew.
            count: problems.

        Raises:
            BadInput: the file cannot be written.
        """
        path = self.folder / f"{self.stem}.unfinished-{fingerprint(asked)[:8]}.jsonl"
        if path.is_file():
            self.completions = _read(path)
            print(f"going on: {len(self.completions):,} of {count:,} problems are answered in {path}")
        try:
            lines = [asked, *({"index": i, **completion} for i, completion in self.completions.items())]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))  # without a line that was cut off
        except OSError as error:
            raise self._no_room(error) from error
        self.path, self.count = path, count

    def make_room(self) -> None:
        """Raises BadInput where nothing could be saved."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> BadInput:
        return BadInput(f"{self.folder} cannot be written to: {error}. Give another --output_dir")

    def add(self, completions: dict[int, dict]) -> None:
        """Bring a batch to the disk.

        Raises:
            BadInput: the disk does not take it.
        """
        self.completions |= completions
        lines = "".join(json.dumps({"index": i, **completion}) + "\n" for i, completion in completions.items())
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.path is None:
            return
        if kind is None or not self.completions:
            self.path.unlink(missing_ok=True)
        if kind is not None:
            kept = f", in {self.path}: the same command goes on from there" if self.completions else ""
            answered = f"{len(self.completions):,} of {self.count:,}"
            print(f"evaluation ended early: {answered} problems are answered{kept}", file=sys.stderr)


def _read(path: Path) -> dict[int, dict]:
    """The completions by their problem's number, behind what was asked and up to a line that was cut off."""
    completions = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[1:]:
            completion = json.loads(line)
            completions[completion.pop("index")] = completion
    except ValueError:  # the end of the file, as it is or where a kill left it
        pass
    return completions


def fingerprint(value) -> str:
    """The XXH3-128 of what JSON can say."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def fingerprint_of_policy(policy) -> str:
    """The XXH3-128 of a model's weights, and of the settings that it computes and ends with."""
    import torch

    adapters = {name: str(config) for name, config in getattr(policy, "peft_config", {}).items()}
    settings = [policy.config.to_json_string(), policy.generation_config.to_json_string(), adapters]
    digest = xxhash.xxh3_128(json.dumps(settings).encode())
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

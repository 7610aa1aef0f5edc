"""Checkpoints that are whole or not there."""

import json
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support import processes
from support.checksums import CHECKSUMS, WEIGHTS, altered, write_checksums
from support.errors import RunStopped
from support.memory import gigabytes, size
from support.record import resume_command

SHARDS = ("latest", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")  # in a checkpoint by DeepSpeed, and by FSDP
SCRATCH = ".saving"  # in OUTPUT_DIR: where a checkpoint is until it is whole, and where an old one goes to be deleted


# ---- whole or not


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot go on from this folder as if nothing had happened; None where it can. Reads headers only."""
    try:
        state = state_of(checkpoint)
        if not isinstance(state["global_step"], int) or not isinstance(state["max_steps"], int):
            return "trainer_state.json names no step"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    count = len(list(checkpoint.glob("rng_state_*.pth")))
    random_states = [f"rng_state_{rank}.pth" for rank in range(count)] or ["rng_state.pth"]
    if is_sharded(checkpoint):  # the shards' loaders object to what is missing of them
        return next((f"{name} is missing" for name in random_states if not (checkpoint / name).is_file()), None)
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(checkpoint / name):  # what torch.save writes; a truncated one has lost its directory
            return f"{name} is damaged"
    return weights_flaw(checkpoint)


def weights_flaw(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    names = [name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).is_file()][:1]
    if not names and (folder / "model.safetensors.index.json").is_file():
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return "model.safetensors.index.json is damaged"
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):  # compares the header with the file's length
                pass
        except FileNotFoundError:
            return f"{name} is missing"
        except (SafetensorError, OSError):
            return f"{name} is damaged"
    return None if names else "model.safetensors is missing"


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def is_sharded(checkpoint: Path) -> bool:
    return any((checkpoint / name).exists() for name in SHARDS)


def newest_whole(output_dir: str | Path, read_all: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from, and what is wrong with each newer one; with `read_all` by the
    checksums as well."""
    skipped = []
    for checkpoint in reversed(checkpoints(output_dir)):
        wrong = flaw(checkpoint) or (altered(checkpoint) if read_all else None)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} cannot be used: {wrong}")
    return None, skipped


def kept(folder: str | Path) -> str:
    """What a run that ends early can go on from, in words."""
    checkpoint, _ = newest_whole(folder)
    return f"{checkpoint} is the last whole checkpoint" if checkpoint else f"{folder} holds no whole checkpoint yet"


# ---- saving


class WholeCheckpoints:
    """For a Trainer, put in front of it as a base class: its checkpoints appear under their names only when they are
    whole, which is when every process has written its part.

    Older whole checkpoints beyond SAVE_TOTAL_LIMIT go only then; damaged ones do not count, and stay.
    """

    _saves_to: str | None = None  # where a checkpoint is being written

    def _get_output_dir(self, trial):
        return self._saves_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        from safetensors import SafetensorError

        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        scratch = folder / SCRATCH
        # a signal and an epoch's end both ask for one
        is_there = processes.on_main(lambda: (folder / name).is_dir() and flaw(folder / name) is None)
        try:
            scratch.mkdir(exist_ok=True)
            if not is_there:
                self._saves_to = str(scratch)
                super()._save_checkpoint(model, trial)
                processes.wait()
            if processes.is_main():
                if not is_there:
                    _move_in(scratch, folder, name)
                whole = [path for path in checkpoints(folder) if flaw(path) is None]
                for old in whole[: -self.args.save_total_limit]:
                    old.rename(scratch / old.name)
            processes.wait()
        except (OSError, RuntimeError, SafetensorError) as error:
            if processes.is_of_a_peer(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise RunStopped(
                f"saving {name} failed: {reason} ({gigabytes(shutil.disk_usage(folder).free)} free in {folder}). "
                f"{kept(folder)}. Free some space, then go on with\n  {resume_command()}"
            ) from error
        finally:
            self._saves_to = None
            if processes.is_main():
                shutil.rmtree(scratch, ignore_errors=True)
        if self.args.push_to_hub and not is_there:
            self._push_from_checkpoint(str(folder / name))
            self._finish_current_push()  # before anything changes what it reads
            for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
                if error := job.exception():
                    print(f"{name} NOT pushed to the Hub: {str(error).strip().partition(chr(10))[0]}. It is saved here")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saves_to is None:  # what is being written would go to the Hub whole, optimizer and all
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if processes.is_main() and not _internal_call:  # a checkpoint gets those of all its files
            _bring_to_disk(Path(output_dir or self.args.output_dir), WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # of a policy with a `ref` adapter, a folder in the checkpoint, Transformers loads that alone, and leaves the
        # adapter in training as it was
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (Path(resume_from_checkpoint) / "ref").is_dir():
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.set_adapter("default")


def _move_in(scratch: Path, folder: Path, name: str) -> None:
    """Bring a checkpoint to the disk, so that its new name cannot get there before its contents, and into place."""
    _bring_to_disk(scratch / name)
    if (folder / name).exists():  # damaged
        (folder / name).rename(scratch / "damaged")
    (scratch / name).rename(folder / name)


def _bring_to_disk(folder: Path, pattern: str = "**/*") -> None:
    """Bring the files in `folder` that fit, and their checksums, to the disk."""
    with ThreadPoolExecutor(1) as aside:
        checksums = aside.submit(write_checksums, folder, pattern)  # costs next to nothing while the disk is busy
        _to_disk(*folder.glob(pattern))
        checksums.result()
    _to_disk(folder / CHECKSUMS, folder)


def _to_disk(*paths: Path) -> None:
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def check_disk(trainer) -> None:
    """Refuse to start what cannot be saved.

    A checkpoint holds the trained weights as they are, and AdamW's two moments in the same type.

    Raises:
        RunStopped: the checkpoints that are kept, the one being written and the final policy do not fit.
    """
    args, policy = trainer.args, trainer.model
    is_lora = hasattr(policy, "peft_config")
    weights = size(p for p in policy.parameters() if p.requires_grad or not is_lora)
    moments = 2 * size(p for p in policy.parameters() if p.requires_grad)
    at_once = args.save_total_limit + 1  # one more than is kept, while the newest is written
    epochs, *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if args.save_strategy == "steps" and args.save_steps >= 1:
        at_once = min(at_once, -(-steps // int(args.save_steps)))
    elif args.save_strategy in ("epoch", "no"):  # with "no" a signal still saves one
        at_once = min(at_once, epochs if args.save_strategy == "epoch" else 1)
    needed = (weights + moments) * max(1, at_once - len(checkpoints(args.output_dir))) + weights
    free = shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise RunStopped(
            f"{args.output_dir} has {gigabytes(free)} free, and this run writes {gigabytes(needed)} there: {at_once} "
            f"checkpoints (SAVE_TOTAL_LIMIT {args.save_total_limit}, and one while it is written) of "
            f"{gigabytes(weights + moments)}, and the final policy of {gigabytes(weights)}. Free some space, give an "
            "OUTPUT_DIR on a larger disk, or lower SAVE_TOTAL_LIMIT"
        )

"""Checkpoints that are whole or not there: how to tell, checksums of what is saved, and room on the disk."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from support.errors import RunStopped
from support.memory import gigabytes, size

SHARDS = ("latest", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")  # in a checkpoint by DeepSpeed, and by FSDP
CHECKSUMS = "checksums.txt"  # as `xxhsum --check` reads it
WEIGHTS = "*.safetensors"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in found if re.fullmatch(r"checkpoint-[0-9]+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def state_of(checkpoint: Path) -> dict:
    """The trainer's state: step, epoch, log."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def holds_shards(checkpoint: Path) -> bool:
    """Whether FSDP or DeepSpeed saved it, a part for each process."""
    return any((checkpoint / name).exists() for name in SHARDS)


def flaw(checkpoint: Path) -> str | None:
    """Why a run cannot be resumed from this folder exactly; None where it can. Reads the headers of files only."""
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
    is_sharded = holds_shards(checkpoint)  # what is missing of the shards shows when they are loaded
    for name in random_states if is_sharded else ("optimizer.pt", "scheduler.pt", *random_states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(checkpoint / name):  # torch.save writes a zip archive, whose directory comes last
            return f"{name} is damaged"
    return None if is_sharded else _weights_flaw(checkpoint)


def _weights_flaw(folder: Path) -> str | None:
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").is_file() else "model.safetensors"
    names = [name]
    try:
        if (folder / f"{name}.index.json").is_file():
            name = f"{name}.index.json"
            names = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            with safe_open(folder / name, framework="pt"):  # compares the header with the file's length
                pass
    except FileNotFoundError:
        return f"{name} is missing"
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return f"{name} is damaged"
    return None


def newest_whole(output_dir: str | Path, read_all: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without a flaw (`read_all`: checksums too), and what is wrong with each newer one."""
    skipped = []
    for checkpoint in reversed(checkpoints(output_dir)):
        wrong = flaw(checkpoint) or (altered(checkpoint) if read_all else None)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} cannot be used: {wrong}")
    return None, skipped


def kept(folder: str | Path) -> str:
    """What a run that ends early can be resumed from, in words."""
    checkpoint, _ = newest_whole(folder)
    return f"{checkpoint} is the last whole checkpoint" if checkpoint else f"{folder} holds no whole checkpoint yet"


def to_disk(folder: Path, pattern: str = "**/*") -> None:
    """Bring the files in `folder` that fit to the disk, with the XXH3-128 of each in `CHECKSUMS`."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor() as threads:  # hashing runs beside the disk's writing, and costs little
        checksums = threads.map(checksum, paths)
        _synced(*paths)
        lines = [f"{checksum}  {path.relative_to(folder)}\n" for checksum, path in zip(checksums, paths, strict=True)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    _synced(folder / CHECKSUMS, *(path for path in folder.glob("**/") if path.is_dir()))


def altered(folder: Path, pattern: str = "*") -> str | None:
    """What differs from its checksum, of the files whose name fits; None where nothing does, or without checksums."""
    if not (folder / CHECKSUMS).is_file():
        return None
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        noted = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name, digest in noted.items():
        if Path(name).match(pattern):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checksum(folder / name) != digest:
                return f"{name} is not what was saved, by its checksum"
    return None


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _synced(*paths: Path) -> None:
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def check_disk(args, state, policy) -> None:
    """RunStopped where the disk is too small for the checkpoints kept, one more being written, and the final policy.
    A checkpoint holds the trained weights, and AdamW's two moments in the same type."""
    trained = size(p for p in policy.parameters() if p.requires_grad)
    weights = trained if hasattr(policy, "peft_config") else size(policy.parameters())
    saves = args.save_total_limit + 1
    if args.save_strategy == "steps" and args.save_steps >= 1:
        saves = min(saves, -(-state.max_steps // int(args.save_steps)))
    elif args.save_strategy in ("epoch", "no"):  # with "no" a signal still saves one
        saves = min(saves, state.num_train_epochs if args.save_strategy == "epoch" else 1)
    checkpoint, more = weights + 2 * trained, max(1, saves - len(checkpoints(args.output_dir)))
    free, needed = shutil.disk_usage(args.output_dir).free, more * checkpoint + weights
    if needed > free:
        raise RunStopped(
            f"{args.output_dir} has {gigabytes(free)} free, and this run writes {gigabytes(needed)} there: {saves} "
            f"checkpoints of {gigabytes(checkpoint)} (SAVE_TOTAL_LIMIT {args.save_total_limit}, and one while it is "
            "written), and the final policy. Free some space, take a larger disk, or lower SAVE_TOTAL_LIMIT"
        )

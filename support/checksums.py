"""Checksums of what a run saves: safetensors notices a file that was cut short, not one with a flipped bit."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

CHECKSUMS = "checksums.txt"  # as `xxhsum --check` reads it
WEIGHTS = "*.safetensors"


def write_checksums(folder: Path, pattern: str = "**/*") -> None:
    """Write down the XXH3-128 of the files in `folder` that fit: of all, or as `WEIGHTS` of those."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != CHECKSUMS)
    with ThreadPoolExecutor() as threads:  # weights and optimizer at once; reading and hashing hold no lock
        checksums = threads.map(_checksum, paths)
    lines = [f"{checksum}  {path.relative_to(folder)}\n" for checksum, path in zip(checksums, paths, strict=True)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def has_checksums(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file()


def altered(folder: Path, pattern: str = "*") -> str | None:
    """What in `folder` is not as it was saved, of the files whose name fits; None where all is, or where no checksums
    were written. Reads all of it."""
    if not has_checksums(folder):
        return None
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        noted = {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name, checksum in noted.items():
        if Path(name).match(pattern):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _checksum(folder / name) != checksum:
                return f"{name} is not what was saved, by its checksum"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

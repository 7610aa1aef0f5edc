"""What checksums cost beside the time of saving a policy of 1.5B parameters, in turns with and without them.

    python benchmarks/checksums.py --out outputs/checksums          # 12 GB of memory, 6 GB of disk: some minutes

Only the weights of a checkpoint are written, 6.2 GB in fp32; AdamW's moments are twice that, and both times grow alike.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.checkpoints import to_disk


def save(tensors: dict, folder: Path, with_checksums: bool) -> float:
    """Save weights in `folder` as a run does, until they are on the disk; the seconds it takes."""
    folder.mkdir(parents=True)
    begun = time.perf_counter()
    save_file(tensors, folder / "model.safetensors")
    if with_checksums:
        to_disk(folder)
    else:
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder, on the disk to be measured")
    parser.add_argument("--parameters", type=float, default=1.54e9)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng, count = np.random.default_rng(0), int(args.parameters / 100)
    tensors = {str(i): rng.random(count, dtype=np.float32) for i in range(100)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.rounds):
        for with_checksums, taken in seconds.items():
            taken.append(save(tensors, args.out, with_checksums))
            print(f"{'with' if with_checksums else 'without'} checksums: {taken[-1]:.2f} s", flush=True)
            begun = time.perf_counter()
            to_disk(args.out)
            alone = time.perf_counter() - begun
            shutil.rmtree(args.out)
    without, with_them = mean(seconds[False]), mean(seconds[True])
    print(f"saving takes {without:.1f} s, with checksums {with_them:.1f} s: {100 * (with_them / without - 1):+.1f}%")
    print(f"the checksums alone, of files in memory: {alone:.2f} s, {4e-9 * args.parameters / alone:.1f} GB/s")


if __name__ == "__main__":
    main()

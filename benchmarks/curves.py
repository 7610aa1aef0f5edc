"""Reward curves of one or several runs as a picture, from the runs' own logs.

python benchmarks/curves.py outputs/RUN                   # writes outputs/RUN/curves.png, as a run does itself
python benchmarks/curves.py outputs/RUN outputs/OTHER     # laid over each other: outputs/RUN/curves-compared.png
"""

import argparse
import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.curves import PALETTE, REWARDS, STYLES, draw, figure, read_log, save
from support.errors import BadInput
from support.record import printable

LEFT_OUT = ("int", "soft format", "xmlcount")  # rewards, which of several runs would be too many curves


def overlay(logs: dict[str, list[dict]]):
    """The picture of several named runs: a colour is a run, dashes are a curve."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    picture = Figure(figsize=(16, 7.2), layout="constrained")
    picture.subplots(2, 4)
    lines = []
    for log, colour in zip(logs.values(), cycle(PALETTE), strict=False):
        shown = [{key: value for key, value in row.items() if REWARDS.get(key) not in LEFT_OUT} for row in log]
        draw(picture, shown, [colour] * len(STYLES))
        lines.append(Line2D([], [], color=colour, linewidth=3))
    names = [printable(name).replace("$", r"\$") for name in logs]  # a dollar would start a formula
    picture.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=11)
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the picture goes into the first")
    folders = parser.parse_args(argv).runs
    try:
        logs = {str(folder): read_log(folder) for folder in folders}
    except BadInput as error:
        sys.exit(f"curves.py: {error}")
    if len(folders) == 1:
        path, picture = folders[0] / "curves.png", figure(*logs.popitem())
    else:
        path, picture = folders[0] / "curves-compared.png", overlay(logs)
    save(picture, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()

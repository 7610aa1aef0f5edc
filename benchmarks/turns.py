"""Programs that start side by side and measure one at a time: imports and a vLLM engine take a minute, a few steps ten
seconds. `step_time.py` and `lean_step.py` wait for their turn, `gpu_check.py` gives the turns."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY = 150  # seconds from a program's start until it waits for its turn
CACHE_BYTES = 1_500_000_000  # of vLLM's engine: twice the keys and values of 64 x 512 tokens of SmolLM2-135M
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "4"}  # of each program, some ten of which start at once


# ---- in a program that measures


def wait(turn: Path | None) -> None:
    """Say by a file TURN.ready that this program could train, and wait for a file TURN.go; None: do not wait."""
    if turn is None:
        return
    parent = os.getppid()
    Path(f"{turn}.ready").touch()
    while not Path(f"{turn}.go").exists():
        if os.getppid() != parent:
            sys.exit("the program that gives the turns has ended")
        time.sleep(0.1)


def fix_cache() -> None:
    """Give the engine that TRL builds a cache of a fixed size. By itself vLLM measures how much memory is free while it
    starts, and refuses to start where another program frees some meanwhile (an assertion in its `memory_profiling`)."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = partial(vllm_generation.LLM, kv_cache_memory_bytes=CACHE_BYTES)


# ---- in the one that gives turns


@dataclass
class Part:
    path: Path  # OUT/NAME: NAME.log is its output, NAME.json what it measured
    command: list  # for Python
    limit: int  # seconds, from its turn on where it has one
    shows: str = "^$"  # pattern of the log's lines that say what came of it
    lacks: str | None = None  # why it is left out
    makes: Path | None = None  # what others need
    after: str = ""  # the part that makes what this one needs
    takes_turns: bool = False  # it says NAME.ready, and waits for NAME.go
    is_alone: bool = False  # it starts when all others have ended
    process: subprocess.Popen | None = None
    since: float = 0.0  # its start, or its turn
    outcome: str = ""
    row: str = ""  # of the summary

    def has(self, kind: str) -> bool:
        return self.path.with_suffix(kind).exists()

    def waits(self) -> bool:
        return self.takes_turns and not self.has(".go")


def start(part: Part) -> None:
    """In a process group of its own, with its output in a log."""
    part.since, command = time.monotonic(), [sys.executable, *map(str, part.command)]
    inputs = {"stdin": subprocess.DEVNULL, "cwd": ROOT, "env": {**ENVIRONMENT, **os.environ}}
    with part.path.with_suffix(".log").open("w") as log:
        print("$", *command, file=log, flush=True)
        part.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **inputs)


def ended(part: Part) -> str:
    """How a started part ended, or why it has to; empty where it goes on."""
    seconds = time.monotonic() - part.since
    # it is not waited for yet: until then its number stays its own, and its group can be killed
    if status := os.waitid(os.P_PID, part.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return f"failed (status {status.si_status})" if status.si_status else "done"
    if part.waits():
        return f"not ready within {READY} s" if seconds > READY and not part.has(".ready") else ""
    return f"out of its {part.limit} s" if seconds > part.limit else ""


def kill(part: Part) -> None:
    """A part and all that it has started, which may outlive it."""
    if part.process and part.process.returncode is None:
        os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()


def give_turn(left: list[Part]) -> None:
    """To the first, where all that have been started wait for one: an engine's start would slow what is measured."""
    running = [part for part in left if part.process and not part.outcome]
    if running and all(part.waits() and part.has(".ready") for part in running):
        running[0].since = time.monotonic()
        running[0].path.with_suffix(".go").touch()

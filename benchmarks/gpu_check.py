"""Ten minutes on a CUDA GPU: does everything run there, how long does a step take, and is the computed memory right?

    python benchmarks/gpu_check.py --out gpu_check --smollm2 models/SmolLM2-135M-Instruct --gsm8k /data/gsm8k
    python benchmarks/gpu_check.py --out gpu_check --only demo tests

Needs no network; all parts together want a GPU of 80 GB, 8 CPU cores and 64 GB of memory. The programs start side by
side, since imports and a vLLM engine take a minute. While the demo, the tests and the preparations run nothing is
measured; then those that measure use the GPU in turns, the most important first.

A part's output is in OUT/NAME.log as it comes; when it ends, OUT/summary.md gets its row and OUT/NAME.json what it
measured. Ctrl-C, SIGTERM and the end of --minutes kill every program that was started, and what ended before is there.
"""

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.turns import Part, ended, give_turn, kill, start
from support.generation import vllm_obstacle
from support.record import device_name, write_whole

LIMIT = 240  # seconds for each of the others: the demo, the tests, the preparations
TURN = 60  # for a few steps of what is measured
STEPS = {"vllm": 6, "trl-vllm-one-pass": 6, "trl-vllm": 6, "original": 1, "trl-one-pass": 2, "transformers": 2}
UPDATES = {"trl": ("trl", 0), "recipe-0": ("recipe", 0), "recipe-50": ("recipe", 0.5)}  # zero-advantage groups
TOKENS_PER_PASS = 6144  # of ours at 1.5B: about what a pass of TRL's has there, so that both need as much memory
WRITE_SHAPE = "import sys; from benchmarks import step_time as s; "
WRITE_SHAPE += "s.write_random('1.5B', s.load_tokenizer(sys.argv[1]), s.Path(sys.argv[2]))"


def parts(args) -> dict[str, Part]:
    """All parts, the most important first. Ours and TRL's best come before the gist, which is far behind both."""
    found, runs = {}, args.out / "runs"
    cold, shape = runs / "cold", runs / "random-1.5B"
    missing = None if args.smollm2 and args.gsm8k else "needs --smollm2 and --gsm8k"

    def add(name: str, *command, **rest) -> None:
        found[name] = Part(args.out / name, list(command), **{"limit": LIMIT, **rest})

    def add_measured(name: str, script: str, *words, limit: int = TURN, **rest) -> None:
        words = [*words, "--dataset", args.gsm8k, "--out", runs / name, "--turn", args.out / name]
        add(name, f"benchmarks/{script}.py", *words, limit=limit, takes_turns=True, **rest)

    shows = r"with the same prompt, strict: |^the sums alone \(lenient\): "
    add("demo", "demo.py", "--output_dir", runs / "demo", shows=shows)
    words = ["-m", "pytest", "-m", "gpu", "-n", 3, "-rs", "-p", "no:cacheprovider"]
    add("tests", *words, shows=r"^=+ .* in \d|^(FAILED|SKIPPED|ERROR)")
    words = ["--model_name_or_path", args.smollm2, "--dataset_name", args.gsm8k, "--output_dir", cold]
    words += ["--examples", 512, "--learning_rate", "1e-4", "--max_completion_length", 256]
    # the last file that it writes; the last step's line that it prints
    add("cold-start", "cold_start.py", *words, shows="^step 60/", lacks=missing, makes=cold / "trainer_state.json")
    add("shape", "-c", WRITE_SHAPE, args.smollm2, shape, lacks=missing, makes=shape)
    for setting, steps in STEPS.items():
        words = ["--measure", setting, "--model", cold, "--steps", steps, "--completion_length", 256]
        lacks = missing or (vllm_obstacle() if "vllm" in setting else None)
        limit = 2 * TURN if setting == "original" else TURN
        add_measured(f"step-{setting}", "step_time", *words, limit=limit, lacks=lacks, after="cold-start")
    for name, (update, share) in UPDATES.items():
        words = ["--measure", update, "--model", shape, "--limit", 512, "--steps", 4, "--zero_advantage", share]
        words += ["--tokens_per_pass", TOKENS_PER_PASS]
        add_measured(f"update-{name}", "lean_step", *words, lacks=missing, after="shape")
    # with the default settings, so with vLLM where that is installed, and with all of the GPU to itself
    words = ["--measure", "recipe", "--model", shape, "--dataset", args.gsm8k, "--steps", 2, "--random_rewards"]
    rest = {"limit": 3 * TURN, "shows": "^memory ", "lacks": missing, "after": "shape"}
    add("memory", "benchmarks/step_time.py", *words, "--out", runs / "memory", is_alone=True, **rest)
    return found


# ---- results


def finish(part: Part, outcome: str, chosen: dict[str, Part]) -> None:
    """Kill a part, and write down how it ended and what it found."""
    kill(part)
    part.outcome, seconds, found = outcome, 0.0, []
    if part.process:
        seconds = time.monotonic() - part.since
        text = part.path.with_suffix(".log").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]  # but the command
        found = [line for line in lines if re.search(part.shows, line)]
        if measured := [line.removeprefix("MEASURED ") for line in lines if line.startswith("MEASURED {")]:
            write_whole(part.path.with_suffix(".json"), measured[0] + "\n")
            found.append(in_words(json.loads(measured[0])))
        found = found or lines[-1:]
    part.row = f"| {part.path.name} | {outcome} | {seconds:.0f} | {'; '.join(found)[:600].replace('|', '/')} |"
    print(part.row, flush=True)
    write_whole(part.path.with_name("summary.md"), summary(chosen))


def in_words(result: dict) -> str:
    """What step_time.py or lean_step.py measured."""
    seconds = result.get("step") or result["seconds"]
    words = f"{mean(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}, n = {len(seconds)})"
    if "step" not in result:
        return f"{words}, {result['tokens']:.0%} of TRL's tokens, {result['peak'] / 1e9:.1f} GB at the peak"
    words += "".join(f", {key} {mean(result[key]):.2f} s" for key in ("generation", "update"))
    computed = f" ({result['computed_bytes'] / 1e9:.1f} computed)" if result["computed_bytes"] else ""
    return f"{words}, {result['peak_bytes'] / 1e9:.1f} GB at the peak{computed}"


# ---- all of them


def check(chosen: dict[str, Part], deadline: float, signals: list) -> None:
    """Start parts, give turns and write results until all have ended, until `deadline` (monotonic), or until `signals`
    holds one."""
    try:
        while (left := _left(chosen)) and time.monotonic() < deadline and not signals:
            for part in left:
                advance(part, chosen)
            give_turn(left)
            time.sleep(0.2)
    finally:
        for part in chosen.values():
            kill(part)
        for part in _left(chosen):
            finish(part, "stopped" if part.process else "not begun", chosen)


def _left(chosen: dict[str, Part]) -> list[Part]:
    return [part for part in chosen.values() if not part.outcome]


def advance(part: Part, chosen: dict[str, Part]) -> None:
    """Start a part that can start, finish one that has ended or cannot start."""
    maker, outcome = chosen.get(part.after), ""
    is_made = maker is None or maker.makes.exists()
    if part.process:
        outcome = ended(part)
    elif part.lacks:
        outcome = f"left out: {part.lacks}"
    elif not is_made and maker.outcome:
        outcome = f"left out: needs what {part.after} makes"
    elif is_made and not (part.is_alone and len(_left(chosen)) > 1):
        start(part)
    if outcome:
        finish(part, outcome, chosen)


def summary(chosen: dict[str, Part]) -> str:
    import torch

    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [part.row or f"| {name} | not ended yet | | |" for name, part in chosen.items()]
    return "\n".join([f"On {device}\n", "| part | outcome | s | found |", "|---" * 4 + "|", *rows]) + "\n"


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, for logs, results and runs")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct (benchmarks/smollm2.py)")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--only", nargs="+", help="parts to run, with what they need (all of them)")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (%(default)s)")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check.py: no CUDA GPU is visible")
    if args.out.exists():
        sys.exit(f"gpu_check.py: {args.out} is there already")
    for name in ("out", "smollm2", "gsm8k"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).absolute())
    chosen = parts(args)
    if unknown := set(args.only or ()) - chosen.keys():
        sys.exit(f"gpu_check.py: no such part: {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    wanted = set(args.only or chosen)
    chosen = {name: chosen[name] for name in chosen if name in wanted | {chosen[each].after for each in wanted}}
    args.out.mkdir(parents=True)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.append(number))  # acted upon where nothing is half done
    check(chosen, began + 60 * args.minutes - 2, signals)  # 2 s to end and write
    print("\n" + summary(chosen))
    sys.exit(any(part.outcome != "done" and not part.lacks for part in chosen.values()))


if __name__ == "__main__":
    main()

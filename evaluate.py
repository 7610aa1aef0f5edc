"""Greedy accuracy of a policy on held-out problems, zero-shot, with the prompt it was trained on.

    python evaluate.py outputs/MyRun                        # the whole test split
    python evaluate.py outputs/MyRun --compare Qwen/Qwen2.5-1.5B-Instruct --limit 200
    python evaluate.py Qwen/Qwen2.5-1.5B-Instruct --native  # with the prompt it was made for
    python evaluate.py outputs/MyRun --ask "how many r's are in strawberry?"

Strict accuracy counts the right number in the required format, lenient accuracy the right number as the last one
anywhere in the text: the gap between them is format, not arithmetic. --compare shows three columns: the baseline with
its native prompt, the baseline with the recipe's, and the model; what the first already solves was not learned here.
What is answered stays on disk: after Ctrl-C or a kill the same command goes on from there.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

import argparse
import json
import signal
import sys
from pathlib import Path

from rewards import SYSTEM_PROMPT
from support.comparison import baselines, home, native_obstacle, paired, table, verdicts
from support.errors import BadInput
from support.evaluation import Task, check_weights, evaluate, save, stem
from support.generation import BATCH_SIZE, complete, load_policy
from support.problems import expand, load_tokenizer
from support.record import printable, read_run
from support.report import write_report
from support.side_by_side import write_page
from support.unfinished import Unfinished

DEFAULTS = {  # what is measured where neither the run nor a flag says otherwise
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "dataset_test_split": "test",
    "max_completion_length": 512,
    "chat_template_kwargs": {},
    "one_shot": False,
}

NATIVE_HELP = "with the prompt a model was made for; beside --compare: insist on that column, or leave it out"


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, Task]:
    """Flags; what none names comes from the run that trained the model, else from `DEFAULTS`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", help="Hub name, local folder, or a run's folder or checkpoint")
    add("--compare", metavar="BASELINE", help="another model, or a folder that holds its evaluation")
    add("--native", action=argparse.BooleanOptionalAction, help=NATIVE_HELP)
    add("--model_revision", help="branch, tag or commit of a model on the Hub")
    add("--dataset_name", help="Hub name or folder (default: the run's, else openai/gsm8k)")
    add("--dataset_config", help="Hub configuration (default: the run's, else main)")
    add("--dataset_test_split", help="split to evaluate on (default: the run's, else test)")
    add("--max_completion_length", type=int, help="tokens (default: the run's, else 512)")
    add("--chat_template_kwargs", type=json.loads, help='JSON, such as {"enable_thinking": false}')
    add("--one_shot", type=json.loads, metavar="true|false", help="a worked example before the question (the run's)")
    add("--limit", type=int, help="only the first so many problems")
    add("--batch_size", type=int, default=BATCH_SIZE, help="problems at a time (%(default)s)")
    add("--use_vllm", type=json.loads, metavar="true|false", help="default: where it is installed with a GPU")
    add("--vllm_gpu_memory_utilization", type=float, metavar="SHARE", help="of the GPU's memory (default: vLLM's own)")
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--output_dir", help="where evaluation.json and .jsonl go (default: the model's folder)")
    add("--ask", metavar="QUESTION", help="print the answer to one question and exit")
    flags = parser.parse_args(argv)
    flags.model, flags.compare = expand(flags.model), flags.compare and expand(flags.compare)
    for name in ("limit", "batch_size", "max_completion_length"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if (share := flags.vllm_gpu_memory_utilization) is not None and not 0 < share <= 1:
        parser.error("--vllm_gpu_memory_utilization must be above 0 and at most 1")
    if share is not None and (flags.use_vllm is False or flags.ask is not None):
        parser.error("--vllm_gpu_memory_utilization is for vLLM; --use_vllm false and --ask use Transformers")
    try:
        run = read_run(Path(flags.model))
    except BadInput as error:
        parser.error(str(error))
    for name, default in DEFAULTS.items():
        if getattr(flags, name) is None:
            setattr(flags, name, run.get("settings", {}).get(name, default))
    measured = (getattr(flags, name) for name in DEFAULTS)
    return flags, Task(*measured, run.get("system_prompt", SYSTEM_PROMPT), flags.limit)


def ask(flags: argparse.Namespace, task: Task) -> str:
    """The answer to one question."""
    check_weights(flags.model)
    tokenizer = load_tokenizer(flags.model, flags.model_revision, flags.trust_remote_code)
    policy = load_policy(flags.model, flags.model_revision, flags.use_cpu, flags.trust_remote_code)
    length, kwargs = task.max_completion_length, task.chat_template_kwargs
    prompt = task.prompt(flags.ask)
    (answer,) = complete(policy, tokenizer, [prompt], length, chat_template_kwargs=kwargs, progress=False)
    return printable(answer["text"]) + (" [cut off]" if answer["truncated"] else "")


def options(flags: argparse.Namespace) -> dict:
    """How to run a model, as `evaluate` takes it."""
    names = ("batch_size", "use_vllm", "use_cpu", "trust_remote_code", "vllm_gpu_memory_utilization")
    return {name: getattr(flags, name) for name in names}


def run(flags: argparse.Namespace, task: Task) -> None:
    """Evaluate, compare where asked to, write and print."""
    if flags.compare:  # a wrong name is told before hours of the baseline
        load_tokenizer(flags.model, flags.model_revision, flags.trust_remote_code)
    before = baselines(flags.compare, task, flags.native, **options(flags)) if flags.compare else {}
    print(f"model: {flags.model}")
    folder = Path(flags.output_dir or home(flags.model))
    with Unfinished(folder, stem(task)) as answers:
        report, rows = evaluate(flags.model, task, revision=flags.model_revision, answers=answers, **options(flags))
        if before:
            report["comparison"] = paired(flags.compare, before, rows)
        save(folder, task, report, rows)
        page = write_page(folder, flags.model, before, report, rows) if before else None
        report_of_run = write_report(folder)
    columns = {name: measured for name, (measured, _) in before.items()}
    print(table({**columns, "model": report} if before else {Path(flags.model).name: report}))
    if before:
        print(verdicts(flags.model, flags.compare, report["comparison"]))
        print(f"written: {page}, for a browser")
    print(f"written: {folder / stem(task)}.json and .jsonl")
    if report_of_run:
        print(f"written anew: {report_of_run}, the run's report")


def main(argv: list[str] | None = None) -> None:
    if processes.count() > 1:
        sys.exit("evaluate.py runs in one process: start it with python")
    flags, task = parse_flags(argv)
    processes.quiet()
    try:
        processes.raise_again()
        if flags.native and not flags.compare:
            if obstacle := native_obstacle(flags.model):
                raise BadInput(f"--native: {obstacle}")
            task = task.natively()
        if flags.ask is not None:
            print(ask(flags, task))
        else:
            run(flags, task)
    except BadInput as error:
        sys.exit(f"evaluate.py: {printable(str(error))}")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: answers are kept, vLLM's engine ends too
    main()

"""A policy on held-out problems, with the prompt it was trained on: greedy accuracy, or what its samples say.

    python evaluate.py outputs/MyRun                        # the whole test split
    python evaluate.py outputs/MyRun --compare Qwen/Qwen2.5-1.5B-Instruct --limit 200
    python evaluate.py Qwen/Qwen2.5-1.5B-Instruct --native  # with the prompt it was made for
    python evaluate.py outputs/MyRun --ask "how many r's are in strawberry?"
    python evaluate.py Qwen/Qwen2.5-1.5B-Instruct --samples 8 --split train --limit 200   # would GRPO learn from it?

Strict accuracy counts the right number in the required format, lenient accuracy the right number as the last one
anywhere in the text: the gap between them is format, not arithmetic. --compare shows three columns: the baseline with
its native prompt, the baseline with the recipe's, and the model; what the first already solves was not learned here.
--samples K draws K answers a problem, as GRPO does: pass@1 to pass@K, maj@K, the share of groups that would teach.
Answers are on disk as they come: after Ctrl-C or a kill the same command resumes.
"""

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # on Ctrl-C, while what follows is imported

import argparse
import json
import os
import shlex
import signal
import sys
from dataclasses import replace
from operator import eq
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from support import groups
from support.comparison import IN_COLUMNS, compare, in_words, kinds, table
from support.curves import PALETTE, save
from support.errors import BadInput, meant
from support.evaluation import COMPARABLE, OF_A_RUN, SAMPLED, Task, check_weights, evaluate
from support.generation import BATCH_SIZE, complete, load_policy
from support.problems import check_template_kwargs, load_tokenizer, shown_to, tokenize
from support.record import printable, read_run, write_whole
from support.report import write_report

RENAMED = {  # patterns of flags that are another command's, or typed from habit: what to type instead
    "model|model_name_or_path|adapter": "its folder or name as the first word",
    "dataset": "--dataset_name",
    "eval_problems": "--limit",
    "max_prompt_length": "without it: prompts of any length are answered",
    "max_new_tokens": "--max_completion_length",
}
NEEDS = {  # a flag that says nothing without another one, or only beside one value of it
    "temperature": ("samples", None),
    "seed": ("samples", None),
    "split": ("samples", None),
    "keep": ("split", "train"),
}
# Shares of groups whose rewards differ, in runs with SmolLM2-135M (docs/evaluation.md): at ENOUGH and above the policy
# learned its problems, at LITTLE and below it did not, or not by as much as 1,319 problems could show
ENOUGH, LITTLE = 0.54, 0.38
REMEDIES = {  # by what most groups are that teach nothing
    "never_in_format": "a cold start teaches the format: python cold_start.py --model_name_or_path {model}",
    "all_wrong_in_format": "take easier problems, a larger model or more samples a group (NUM_GENERATIONS); "
    "--split train --keep FOLDER keeps the problems that would teach",
    "all_right": "take harder problems",
    "mixed": "pay what makes a difference between these samples: see the rewards in samples-{samples}.jsonl",
}
NATIVE_HELP = "with the prompt a model was made for; beside --compare: insist on that column, or leave it out"


def json_object(text: str) -> dict:
    """The type of a flag, for argparse, which names the two where `text` is something else."""
    return dict(json.loads(text))


def read_task(argv: list[str] | None) -> Task:
    """What the flags ask for; what none names comes from the run that trained the model, else from `Task`."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("model", type=os.path.expanduser, help="Hub name, local folder, or a run's folder or checkpoint")
    add(
        "--compare",
        type=os.path.expanduser,
        metavar="BASELINE",
        help="another model, or a folder that holds its evaluation",
    )
    add("--native", action=argparse.BooleanOptionalAction, help=NATIVE_HELP)
    add("--model_revision", help="branch, tag or commit of a model on the Hub")
    add("--dataset_name", help="Hub name, folder or file (default: the run's, else openai/gsm8k)")
    add("--dataset_config", help="of a dataset that has several (default: the run's, else main)")
    add("--dataset_test_split", help="split to evaluate on (default: the run's, else test)")
    add("--question_column", help="column with the question (default: the run's, else question)")
    add("--answer_column", help="column with the number, or a rationale and '#### number' (the run's, else answer)")
    add("--drop_non_numeric", type=string_to_bool, metavar="true|false", help="drop rows whose answer is no number")
    add("--max_completion_length", type=int, help="tokens (default: the run's, else 512)")
    add("--chat_template_kwargs", type=json_object, help='such as {"enable_thinking": false}')
    add("--one_shot", type=string_to_bool, metavar="true|false", help="a worked example first (the run's)")
    in_question = "put the system prompt at the head of the question (default: the run's, else false)"
    add("--system_prompt_in_question", type=string_to_bool, metavar="true|false", help=in_question)
    add("--limit", type=int, help="only the first so many problems")
    add("--samples", type=int, metavar="K", help="sample K answers a problem: pass@k, maj@K, groups that would teach")
    add("--temperature", type=float, help="of the samples (default: the run's, else 0.9)")
    add("--seed", type=int, help="of the samples (42)")
    add(
        "--split", choices=["test", "train"], help="'train': the problems that would be trained on, without those shown"
    )
    add("--keep", metavar="FOLDER", help="write those of --split train that would teach there, for train_grpo.py")
    add("--batch_size", type=int, help=f"problems at a time ({BATCH_SIZE})")
    add("--use_vllm", type=string_to_bool, metavar="true|false", help="default: where it is installed with a GPU")
    add("--vllm_gpu_memory_utilization", type=float, metavar="SHARE", help="of the GPU's memory (default: vLLM's own)")
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--output_dir", help="where evaluation.json and .jsonl go (default: the model's folder)")
    add("--ask", metavar="QUESTION", help="print the answer to one question and exit")
    flags, odd = parser.parse_known_args(argv)
    if odd:
        hint = meant(odd[0], [action.dest for action in parser._actions], RENAMED)
        parser.error(f"unknown flag or stray value {odd[0]!r}{hint}")
    given = vars(flags)
    for name in ("limit", "batch_size", "max_completion_length", "samples"):
        if given.get(name, 1) < 1:
            parser.error(f"--{name} must be at least 1")
    for name, (other, value) in NEEDS.items():
        if name in given and (other not in given or value not in (None, given[other])):
            parser.error(f"--{name} is for --{other} {value or ''}".rstrip())
    if not given.get("temperature", 1) > 0:
        parser.error("--temperature must be above 0; without --samples answers are greedy")
    if "samples" in given and (given.get("native") or "ask" in given):
        parser.error("--samples asks with the recipe's prompt, all of the problems: it goes without --native and --ask")
    if "vllm_gpu_memory_utilization" in given:
        if not 0 < given["vllm_gpu_memory_utilization"] <= 1:
            parser.error("--vllm_gpu_memory_utilization must be above 0 and at most 1")
        if given.get("use_vllm") is False or "ask" in given:
            parser.error("--vllm_gpu_memory_utilization is for vLLM; --use_vllm false and --ask use Transformers")
    try:
        run = read_run(Path(given["model"]))
    except BadInput as error:
        parser.error(str(error))
    of_run = {name: value for name, value in run.get("settings", {}).items() if name in OF_A_RUN}
    of_run |= {name: run[name] for name in ("system_prompt",) if name in run}
    task = Task(**of_run | given)
    if not {"dataset_name", "ask"} & given.keys() and task.split == "test" and is_one_split(task.dataset_name):
        data = task.dataset_name
        parser.error(f"{data} is one split, on which the run was trained: give --dataset_name with other problems")
    return task.natively() if task.native and not task.compare else task


def is_one_split(dataset: str) -> bool:
    """Whether a dataset on disk holds problems to train on and no others."""
    place = Path(dataset).expanduser()
    return place.is_file() or (place / "state.json").is_file()


def ask(task: Task) -> str:
    """The answer to one question."""
    check_weights(task.model)
    tokenizer = load_tokenizer(task.model, task.model_revision, task.trust_remote_code)
    prompts, kwargs = [task.prompt(task.ask)], task.chat_template_kwargs
    check_template_kwargs(tokenizer, kwargs)
    policy = load_policy(task.model, task.model_revision, task.use_cpu, task.trust_remote_code)
    (answer,) = complete(
        policy, tokenizer, prompts, task.max_completion_length, chat_template_kwargs=kwargs, progress=False
    )
    return printable(answer["text"]) + (" [truncated]" if answer["truncated"] else "")


def baselines(task: Task) -> dict[str, tuple[dict, list[dict]]]:
    """The evaluations of `task.compare` by their columns' names: with the prompt it was made for, where it has one, and
    with the recipe's. `task.native` False leaves the first out, True insists on it: BadInput where it cannot be."""
    # `compare` the other way round: of the train split both get the problems that neither was shown
    other = {"model": task.compare, "compare": task.model, "model_revision": None, "output_dir": None}
    task, native = replace(task, **other), not task.samples and task.native
    obstacle = native_obstacle(task.model)
    if native and obstacle:
        raise BadInput(f"--native: {obstacle}")
    if native is None and obstacle:
        print(f"the native column is left out: {obstacle}")
    columns = {"baseline": baseline_evaluation(task, "the recipe's prompt")}
    if native is not False and not obstacle:
        columns = {"baseline native": baseline_evaluation(task.natively(), "native prompt"), **columns}
    return columns


def baseline_evaluation(task: Task, which: str) -> tuple[dict, list[dict]]:
    """The evaluation in the baseline's folder, else one that is made and saved there now."""
    beside = Path(task.model) / task.file.name
    path = beside if beside.is_file() else task.file
    if not path.is_file():
        print(f"baseline, {which}: {task.model}")
        return groups.sample(task) if task.samples else evaluate(task)
    report, rows = load_evaluation(path, task)
    print(f"baseline, {which}: the evaluation of {report['model']} in {path.parent}")
    return report, rows


def load_evaluation(path: Path, task: Task) -> tuple[dict, list[dict]]:
    """A finished evaluation.json and its rows. BadInput where it is damaged, of another task, or (the model's weights
    being on disk) of other weights; the message says what differs."""
    folder, lines = path.parent, path.with_suffix(".jsonl")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        model, of, written = Path(task.model), Path(report["model"]), lines.stat().st_mtime
        asked = [(row["question"], row["gold"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: its evaluation cannot be read ({error!r}); evaluate it again") from error
    weights = [file.stat().st_mtime for file in model.glob("*.safetensors")]
    if weights and (of.resolve() != model.resolve() or max(weights) > written):
        raise BadInput(f"{folder}: the evaluation there is of {of} or of earlier weights; evaluate {model} again first")
    differing = [
        f"{name.replace('_', ' ')}: {report.get(name)!r} there, {getattr(task, name)!r} here"
        for name in (*COMPARABLE, *(SAMPLED if task.samples else ()))
        if (report.get(name) or None) != (getattr(task, name) or None)
    ]
    if report.get("model_revision") and not model.is_dir():  # by its name on the Hub it is the newest
        differing.append(f"model revision: {report['model_revision']!r} there, the newest here")
    wanted = [(problem["question"], problem["answer"]) for problem in task.problems()]
    if asked != wanted:
        same = sum(map(eq, asked, wanted))
        differing.insert(0, f"problems: {len(asked)} there, {len(wanted)} here, {same} of them the same")
    if differing:
        anew = f"Evaluate {task.model} anew in this way first: earlier files are kept"
        raise BadInput(f"{folder}: its evaluation is not comparable. {'; '.join(differing)}. {anew}")
    return report, rows


def native_obstacle(name: str) -> str | None:
    """Why a model cannot be measured with the prompt it was made for; None where it can."""
    folder, configs = Path(name), ("config.json", "adapter_config.json")
    has_model = not folder.is_dir() or any((folder / config).is_file() for config in configs)
    return None if has_model else f"{folder} holds an evaluation, but no model"


def paired(name: str, before: dict[str, tuple[dict, list[dict]]], rows: list[dict]) -> dict:
    """What evaluation.json says of a comparison with the baseline `name`: both paired tests, the baseline's columns."""
    columns = {column: {key: report[key] for key in IN_COLUMNS} for column, (report, _) in before.items()}
    tests = compare(rows, before["baseline"][1])
    if "baseline native" in before:
        tests["native"] = compare(rows, before["baseline native"][1], "lenient")
    return {"baseline": name, **tests, "columns": columns, "samples": _samples(rows, before["baseline"][1])}


def _samples(rows: list[dict], baseline: list[dict]) -> list[dict]:
    """Three problems for the run's report, each the first of its kind; of 'both' where another kind is missing."""
    first = {}
    for kind, old, new in zip(kinds(rows, baseline), baseline, rows, strict=True):
        texts = {"before": old["completion"], "after": new["completion"]}
        first.setdefault(kind, {"kind": kind, "question": new["question"], "gold": new["gold"], **texts})
    return [first[kind] for kind in ("gained", "lost", "neither", "both") if kind in first][:3]


def verdicts(model: str, baseline: str, paired: dict) -> str:
    """The paired tests in words: a line of counts and a sentence for each."""
    tests = [("strict", "the same prompt", paired), ("lenient", "its native prompt", paired.get("native"))]
    return "\n".join(
        f"{key} results in pairs: both right {counts['both_right']}, only the model {counts['only_model_right']}, "
        f"only the baseline {counts['only_baseline_right']}, both wrong {counts['both_wrong']}\n"
        f"{model} against {baseline} with {prompt}, {key}: {in_words(counts)}"
        for key, prompt, counts in tests
        if counts
    )


def run_samples(task: Task) -> None:
    """Sample groups, compare and keep where asked to, write and print."""
    folder, keeps = task.file.parent, Path(task.keep) if task.keep else None
    if keeps and keeps.exists():
        raise BadInput(f"--keep {keeps} is there already: give another folder")
    before, rows_before = baselines(task)["baseline"] if task.compare else (None, None)
    if keeps and task.file.is_file():  # a look at the shares came first
        report, rows = load_evaluation(task.file, task)
        print(f"model: the samples of {task.model} in {folder}")
    else:
        print(f"model: {task.model}")
        report, rows = groups.sample(task)
    if task.split == "train" and (shown := shown_to(task.model, task.compare)):
        print(f"without the {len(shown):,} problems that a cold start has shown")
    print(f"{report['n']:,} problems, {task.samples} samples each at temperature {task.temperature:g}")
    difference = groups.averages(rows, rows_before) if before else None
    print(samples_table(report, before, difference))
    if before:
        report["comparison"] = {"baseline": task.compare, "before": before, "difference": difference}
        write_whole(task.file, json.dumps(report, indent=2) + "\n")
        save(pass_at_k({Path(task.compare).name: before, Path(task.model).name: report}), folder / "pass_at_k.png")
        print(f"{against(difference, task.samples)}\nwritten: {folder / 'pass_at_k.png'}")
    print(f"written: {task.file} and .jsonl\n{Path(task.model).name}: {advice(report, task.model)}")
    if keeps:
        keep(task, rows, keeps)


def samples_table(report: dict, before: dict | None = None, difference: dict | None = None) -> str:
    """What a policy's samples say, in columns of text: values with 95% intervals; with a baseline both values, and the
    difference with its interval."""

    def cell(measure: str, key: str | None = None) -> str:
        now, old, change = ((of and of[key] if key else of) for of in (report, before, difference))
        if old is None:
            low, high = now["ci95"][measure]
            return f"{now[measure]:.1%} ({low:.1%} - {high:.1%})"
        points = [100 * number for number in (change[measure], *change["ci95"][measure])]
        return "{:.1%} -> {:.1%}, {:+.1f} ({:+.1f} to {:+.1f})".format(old[measure], now[measure], *points)

    rows = [("", "strict", "lenient")]
    rows += [(name, cell(name, "strict"), cell(name, "lenient")) for name in report["strict"] if name != "ci95"]
    rows += [("groups whose rewards differ", cell("would_teach"), "")]
    rows += [(f"  {words}", cell(kind), "") for kind, words in groups.KINDS.items()]
    width = 24 if before is None else 42
    return "\n".join(f"{label:<28}{first:>{width}}{second:>{width}}".rstrip() for label, first, second in rows)


def against(difference: dict, samples: int) -> str:
    """What GRPO has changed: what one sample solves, and what K can; lenient is the arithmetic without the format."""
    sentences = []
    for key in ("strict", "lenient"):
        words = []
        for measure in dict.fromkeys(("pass@1", f"pass@{samples}")):
            low, high = difference[key]["ci95"][measure]
            unclear = "" if low > 0 or high < 0 else ", no difference to be seen"
            words.append(f"{measure} {100 * difference[key][measure]:+.1f} points{unclear}")
        sentences.append(f"{key}, against the baseline: {'; '.join(words)}")
    return "\n".join(sentences)


def advice(report: dict, model: str) -> str:
    """Whether GRPO would learn from such samples, or what stands in the way: a sentence to act on."""
    share, samples, kinds = report["would_teach"], report["samples"], {kind: report[kind] for kind in groups.KINDS}
    if samples == 1:
        return "one sample a problem is no group; --samples 8 shows whether groups would teach"
    found, most = (
        f"{share:.0%} of the groups of {samples} would teach, as their rewards differ",
        max(kinds, key=kinds.get),
    )
    blocked = f"{kinds[most]:.0%} are {groups.KINDS[most]}: {REMEDIES[most].format(model=model, samples=samples)}"
    if share <= LITTLE:
        return f"{found}: few, runs with as few have hardly learned. {blocked}"
    if most == "never_in_format":  # and are paid for numbers without it
        return f"{found}, but {blocked}"
    if report["lenient"][f"pass@{samples}"] == 0:
        return f"{found}, but no sample has the right number: GRPO would teach the format and no more"
    if share < ENOUGH:
        return f"{found}: it may do, more is better. {blocked}"
    return f"{found}: enough for GRPO, runs with {ENOUGH:.0%} and more have learned"


def pass_at_k(reports: dict[str, dict]):
    """The picture of pass@k over k: a colour for each model, strict with its 95% interval, lenient dashed."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    for (name, report), colour in zip(reports.items(), PALETTE, strict=False):
        for key, style in (("strict", "-"), ("lenient", "--")):
            found = [measure for measure in report[key] if measure.startswith("pass@")]
            counts = [int(measure[5:]) for measure in found]
            values = [report[key][measure] for measure in found]
            axes.plot(
                counts, values, style, color=colour, marker="o", label=printable(f"{name}, {key}").replace("$", r"\$")
            )
            if key == "strict":
                low, high = zip(*(report[key]["ci95"][measure] for measure in found), strict=True)
                axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set(xlabel="k, samples a problem", ylabel="pass@k: share of problems that one of k solves", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return picture


def keep(task: Task, rows: list[dict], folder: Path) -> None:
    """Write the problems that would teach as a dataset's folder, beside the test split that they came with."""
    parts = {task.dataset_train_split: [p for p, row in zip(task.problems(), rows, strict=True) if row["would_teach"]]}
    if not parts[task.dataset_train_split]:
        raise BadInput("--keep: no problem would teach, and nothing is written")
    held_out = ""
    if is_one_split(task.dataset_name):
        held_out = " --eval_steps 0"  # there is no test split
    else:
        parts[task.dataset_test_split] = replace(task, split="test", limit=None).problems()
    folder.mkdir(parents=True)
    for split, problems in parts.items():
        lines = []
        for problem in problems:
            answer = f"{problem['rationale']}\n#### {problem['answer']}".lstrip()
            row = {**problem, "answer": answer}
            del row["rationale"]
            lines.append(json.dumps(row, default=str) + "\n")
        write_whole(folder / f"{split}.jsonl", "".join(lines))
    print(f"kept: {len(parts[task.dataset_train_split]):,} of {len(rows):,} problems, in {folder}")
    words = ["python", "train_grpo.py", "--model_name_or_path", task.model, "--dataset_name", str(folder)]
    print(f"next:  {shlex.join(words)}{held_out}")


def run(task: Task) -> None:
    """Evaluate, compare where asked to, write and print."""
    if task.samples:
        return run_samples(task)
    if task.compare or task.chat_template_kwargs:  # mistakes are told before hours of the baseline
        tokenizer = load_tokenizer(task.model, task.model_revision, task.trust_remote_code)
        tokenize(tokenizer, [task.prompt("2 + 2?")], task.chat_template_kwargs)
        check_template_kwargs(tokenizer, task.chat_template_kwargs)
    before = baselines(task) if task.compare else {}
    print(f"model: {task.model}")
    report, rows = evaluate(task)
    columns = {name: measured for name, (measured, _) in before.items()}
    print(table({**columns, "model": report} if before else {Path(task.model).name: report}))
    if before:
        report["comparison"] = paired(task.compare, before, rows)
        write_whole(task.file, json.dumps(report, indent=2) + "\n")
        print(verdicts(task.model, task.compare, report["comparison"]))
        print(f"for a browser: python benchmarks/side_by_side.py {shlex.quote(str(task.file.parent))}")
    print(f"written: {task.file} and .jsonl")
    if report_of_run := write_report(task.file.parent):
        print(f"written anew: {report_of_run}, the run's report")


def main(argv: list[str] | None = None) -> None:
    if processes.count() > 1:
        sys.exit("evaluate.py runs in one process: start it with python")
    task = read_task(argv)
    processes.quiet()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which `end_at_once` had changed
        if task.ask is None:
            run(task)
        else:
            print(ask(task))
    except (BadInput, OSError) as error:  # the latter of a full disk, say
        sys.exit(f"evaluate.py: {printable(str(error))}")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order, so that vLLM's engine ends too
    main()

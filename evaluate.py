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
import math
import os
import shlex
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path

import torch
from transformers.hf_argparser import string_to_bool

import rewards
from rewards import SYSTEM_PROMPT, to_prompt
from support import curves, groups
from support.checkpoints import CHECKSUMS, WEIGHTS, altered, checkpoints, checksum
from support.comparison import IN_COLUMNS, compare, in_words, kinds, table
from support.errors import BadInput, meant
from support.evaluation import LIMITS, ROW_SETTINGS, answered, score, summarize
from support.generation import BATCH_SIZE, VLLM_VERSIONS, complete, load_policy, vllm_obstacle
from support.problems import base_of, check_template_kwargs, load_problems, load_tokenizer, shown_to, tokenize
from support.record import printable, read_run, set_aside, write_whole
from support.report import write_report

RENAMED = {  # patterns of flags that are another command's, or typed from habit: what to type instead
    "model|model_name_or_path|adapter": "its folder or name as the first word",
    "dataset": "--dataset_name",
    "eval_problems": "--limit",
    "max_prompt_length": "without it: prompts of any length are answered",
    "max_new_tokens": "--max_completion_length",
}
# as in Qwen's own evaluation, without a system prompt (QwenLM/Qwen2.5-Math, evaluation/utils.py, 'qwen-boxed')
NATIVE_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", *ROW_SETTINGS)
OF_A_RUN = (*DATA, *LIMITS, "temperature")  # fields that a run has too
COMPARABLE = (*LIMITS, "system_prompt", "native_instruction")  # equal in two evaluations, as are their problems
SAMPLED = ("samples", "temperature", "seed", "rewards_py")  # and these, where answers are sampled
NEEDS = {  # a flag that says nothing without another one, or only beside one value of it
    "temperature": ("samples", None),
    "seed": ("samples", None),
    "split": ("samples", None),
    "keep": ("split", "train"),
}
# Shares of groups whose rewards differ, in runs with SmolLM2-135M (docs/samples.md): at ENOUGH and above the policy
# learned its problems, between the two slowly, at LITTLE and below not
ENOUGH, LITTLE = 0.54, 0.38
UNUSED = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "reward_weights": None}  # of a run
NATIVE_HELP = "with the prompt a model was made for; beside --compare: insist on that column, or leave it out"


# ---- what is asked


@dataclass
class Task:
    """What `evaluate.py` is asked to do, under the names of its flags, where each is explained."""

    model: str
    model_revision: str | None = None
    dataset_name: str = "openai/gsm8k"
    dataset_config: str | None = "main"
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    split: str = "test"  # or "train": which of the two is measured
    question_column: str = "question"
    answer_column: str = "answer"
    drop_non_numeric: bool = False
    max_completion_length: int = 512
    chat_template_kwargs: dict | None = None
    one_shot: bool = False
    system_prompt_in_question: bool = False
    system_prompt: str = SYSTEM_PROMPT
    native_instruction: str | None = None  # put behind the question, without a system prompt
    limit: int | None = None
    samples: int | None = None  # answers a problem, sampled; None is one greedy answer
    temperature: float = 0.9
    seed: int = 42
    keep: str | None = None
    batch_size: int = BATCH_SIZE
    use_vllm: bool | None = None
    vllm_gpu_memory_utilization: float | None = None
    use_cpu: bool = False
    trust_remote_code: bool = False
    output_dir: str | None = None
    compare: str | None = None
    native: bool | None = None
    ask: str | None = None

    def problems(self) -> list[dict]:
        """Of the train split those that would be trained on, after either model of a comparison."""
        problems = load_problems(self, self.split_name)[0]
        shown = shown_to(self.model, self.compare) if self.split == "train" else ()
        return [problem for problem in problems if problem["question"] not in shown][: self.limit]

    @property
    def split_name(self) -> str:
        return self.dataset_train_split if self.split == "train" else self.dataset_test_split

    @property
    def rewards_py(self) -> str:
        """The checksum of what pays the samples."""
        return checksum(Path(rewards.__file__))

    def prompt(self, question: str) -> list[dict]:
        if self.native_instruction:
            return [{"role": "user", "content": f"{question}\n{self.native_instruction}"}]
        return to_prompt(question, self.system_prompt, self.one_shot, self.system_prompt_in_question)

    def natively(self) -> "Task":
        """The same problems and limits, with the prompt that a model was made for."""
        ours = {"system_prompt": "", "one_shot": False, "system_prompt_in_question": False}
        return replace(self, native_instruction=NATIVE_INSTRUCTION, **ours)

    @property
    def file(self) -> Path:
        """Its evaluation.json, or samples-8.json: in --output_dir, else in the model's folder, else (of a model on the
        Hub, or in a folder that cannot be written to) under outputs/."""
        own, other = Path(self.model), Path("outputs") / self.model.strip("/").replace("/", "--")
        folder = self.output_dir or (own if own.is_dir() and os.access(own, os.W_OK) else other)
        if self.samples:
            return Path(folder) / f"samples-{self.samples}{'-train' if self.split == 'train' else ''}.json"
        return Path(folder) / ("evaluation-native.json" if self.native_instruction else "evaluation.json")


def json_object(text: str) -> dict:
    """The type of a flag, for argparse, which names the two where `text` is something else."""
    return dict(json.loads(text))


def read_task(argv: list[str] | None) -> Task:
    """What the flags ask for; what none names comes from the run that trained the model, else from `Task`."""
    parser = argparse.ArgumentParser(
        usage="python evaluate.py MODEL [--FLAG VALUE ...]",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
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
    add("--dataset_train_split", help="of --split train (default: the run's, else train)")
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
        "--split",
        choices=["test", "train"],
        help="train: what would be trained on, without what a cold start has shown",
    )
    add(
        "--keep",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="write those of --split train that would teach there, for train_grpo.py",
    )
    add("--batch_size", type=int, help=f"answers at a time ({BATCH_SIZE})")
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
    if not 0 < given.get("temperature", 1) < math.inf:
        parser.error("--temperature must be a number above 0; without --samples answers are greedy")
    if not 0 <= given.get("seed", 0) < 2**32:
        parser.error("--seed must be at least 0 and below 2**32")
    if given.get("keep") == "" or ("keep" in given and given["samples"] == 1):
        parser.error("--keep needs a folder, and groups of at least two: --samples 8")
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


# ---- one model's answers


def evaluate(task: Task) -> tuple[dict, list[dict]]:
    """Answer the task's problems, greedily or K times each, score the answers and save both files: returns what
    evaluation.json (or samples-K.json) says, and the lines of .jsonl. BadInput where it cannot be done."""
    by_vllm = uses_vllm(task)
    check_weights(task.model)
    tokenizer = load_tokenizer(task.model, task.model_revision, task.trust_remote_code)
    problems, folder = task.problems(), task.file.parent
    if task.samples:
        groups.check_rewards(problems)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # before hours of answers
        raise BadInput(f"{folder} is no folder, or cannot be written to: give another --output_dir")
    completions, unfinished = answered(task, tokenizer, problems, by_vllm)
    if task.samples:
        rows = groups.rows_of(problems, [task.prompt(problem["question"]) for problem in problems], completions)
        summary = {name: getattr(task, name) for name in SAMPLED} | groups.summarize(rows)
    else:
        native = task.native_instruction is not None
        rows = [score(i, *pair, native) for i, pair in enumerate(zip(problems, completions, strict=True))]
        summary = summarize(rows)
    report = {"model": task.model, "dataset": task.dataset_name, "split": task.split_name, **summary}
    report |= {name: getattr(task, name) for name in ("model_revision", "limit", *ROW_SETTINGS, *COMPARABLE)}
    save(task, report, rows)
    unfinished.unlink(missing_ok=True)
    return report, rows


def save(task: Task, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    path = task.file
    set_aside(path, path.with_suffix(".jsonl"))
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(path, json.dumps(report, indent=2) + "\n")  # last: it says that both are there


def check_weights(name: str) -> None:
    """Compare a folder's weights with the checksums that they were saved with; prints where a run's have none. BadInput
    where they differ, or where only checkpoints have weights."""
    folder, found = Path(name), checkpoints(name)
    base_of(name)  # an adapter's model is there
    if found and not any(folder.glob(WEIGHTS)):
        raise BadInput(f"model {name!r}: no weights, as of a run that has not ended. Evaluate its {found[-1].name}")
    if wrong := altered(folder, WEIGHTS):
        raise BadInput(f"model {name!r}: {wrong}. Take an older checkpoint, or a good copy")
    if folder.is_dir() and read_run(folder) and not (folder / CHECKSUMS).is_file():
        print(f"{name}: no {CHECKSUMS}, so that its weights are taken to be as they were saved")


def uses_vllm(task: Task) -> bool:
    """Whether vLLM decodes: where it is asked for, or where it can and nothing is said."""
    obstacle, asked = vllm_obstacle(task.use_cpu), task.use_vllm
    if asked and obstacle:
        needed = f"--use_vllm true needs vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU"
        raise BadInput(f"{needed}, but {obstacle}; leave it out to use Transformers")
    if asked is None and (Path(task.model) / "adapter_config.json").exists():
        obstacle = "vLLM loads whole models, and this is an adapter"
    if asked is None and obstacle and task.vllm_gpu_memory_utilization is not None:
        print(f"--vllm_gpu_memory_utilization has no effect: Transformers decodes {task.model}, because {obstacle}")
    return asked is not False and obstacle is None


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


# ---- a baseline


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
        return evaluate(task)
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
        if task.samples and any(len(row["samples"]) != task.samples for row in rows):
            raise ValueError(f"not {task.samples} samples in each line")
        report |= groups.summarize(rows) if task.samples else {}  # which needs all that has to be there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: its evaluation cannot be read ({error!r}); evaluate it again") from error
    weights = [file.stat().st_mtime for file in model.glob("*.safetensors")]
    if weights and (of.resolve() != model.resolve() or max(weights) > written):
        raise BadInput(f"{folder}: the evaluation there is of {of} or of earlier weights; evaluate {model} again first")
    differing = [
        f"{name.replace('_', ' ')}: {report.get(name)!r} there, {getattr(task, name)!r} here"
        for name in (*COMPARABLE, *(SAMPLED if task.samples else ()))
        if (report.get(name) or None) != (getattr(task, name) or None)
    ]
    if not model.is_dir() and report.get("model_revision") != task.model_revision:
        here = repr(task.model_revision) if task.model_revision else "the newest"
        differing.append(f"model revision: {report['model_revision']!r} there, {here} here")
    if not model.is_dir() and report["model"] != task.model:
        differing.append(f"model: {report['model']!r} there, {task.model!r} here")
    wanted = [(problem["question"], problem["answer"]) for problem in task.problems()]
    if asked != wanted:
        same = sum(map(eq, asked, wanted))
        differing.insert(0, f"problems: {len(asked)} there, {len(wanted)} here, {same} of them the same")
    if differing:
        anew = f"Evaluate {task.model} first, with flags for what is said to be here: earlier files are kept"
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


# ---- groups of samples


def run_samples(task: Task) -> None:
    """Sample groups, compare and keep where asked to, write and print."""
    folder, held_out = task.file.parent, check_keep(task)
    before, rows_before = baselines(task)["baseline"] if task.compare else (None, None)
    if task.keep and task.file.is_file():  # a look at the shares came first
        report, rows = load_evaluation(task.file, task)
        print(f"model: the samples of {task.model} in {folder}")
    else:
        print(f"model: {task.model}")
        report, rows = evaluate(task)
        print(f"written: {task.file} and .jsonl")
    if task.split == "train":
        count = len(load_problems(task, task.split_name)[0]) - len(replace(task, limit=None).problems())
        print(f"{count:,} problems that a cold start has shown are left out")
    for name, value in (read_run(Path(task.model)).get("settings", {})).items():
        if name in UNUSED and value != UNUSED[name]:
            print(f"{name}: {value!r} of the run is not used here; samples are as with {UNUSED[name]!r}")
    print(f"problems: {report['n']:,}, samples of each: {task.samples}, temperature: {task.temperature:g}")
    difference = groups.averages(rows, rows_before) if before else None
    print(samples_table(report, before, difference))
    if before:
        report["comparison"] = {"baseline": task.compare, "before": before, "difference": difference}
        write_whole(task.file, json.dumps(report, indent=2) + "\n")
        picture = folder / "pass_at_k.png"
        set_aside(picture)
        curves.save(draw_pass_at_k([(task.compare, before), (task.model, report)]), picture)
        print(f"{against(difference, task.samples)}\nwritten: {picture}")
    print(f"{task.model}: {advice(report, rows, task)}")
    if task.keep:
        keep(task, rows, held_out)


def check_keep(task: Task) -> list[dict] | None:
    """The problems of the test split that go along with those that are kept; None without --keep, or where there are
    none. BadInput where the folder is there already, or cannot be made."""
    if task.keep is None:
        return None
    folder = Path(task.keep)
    above = next(place for place in folder.absolute().parents if place.exists())
    if folder.exists() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise BadInput(f"--keep {folder} is there already, or cannot be made there: give another folder")
    try:
        return None if is_one_split(task.dataset_name) else replace(task, split="test", limit=None).problems()
    except BadInput as error:
        print(f"--keep: without a test split ({error})")
        return None


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
    width = 26 if before is None else 44
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


def advice(report: dict, rows: list[dict], task: Task) -> str:
    """Whether GRPO would learn from such samples, or what stands in the way: a sentence to act on."""
    share, samples, never = report["would_teach"], task.samples, report["never_in_format"]
    if samples == 1:
        return "one sample a problem is no group; --samples 8 shows whether groups would teach"
    found = f"{share:.0%} of the groups of {samples} would teach, as their rewards differ"
    idle = Counter(row["kind"] for row in rows if not row["would_teach"])
    most, count = idle.most_common(1)[0] if idle else ("mixed", 0)
    blocked = f"{count / len(rows):.0%} teach nothing, being {groups.KINDS[most]}: {remedy(most, task)}"
    if never > 0.5:  # those that are paid for numbers alone may teach, but not the format
        return f"{found}, but {never:.0%} are never in the format: {remedy('never_in_format', task)}"
    if report["lenient"][f"pass@{samples}"] == 0 and share > LITTLE:
        return f"{found}, but no sample has the right number: GRPO would teach the format and no more"
    if share >= ENOUGH:
        return f"{found}: enough for GRPO, runs with {ENOUGH:.0%} and more have learned"
    slowly = "runs with as few have hardly learned" if share <= LITTLE else "GRPO may learn from this, slowly"
    return f"{found} (groups of 16, as in training, do so more often): {slowly}. {blocked}"


def remedy(kind: str, task: Task) -> str:
    """What helps where most groups that teach nothing are of this kind."""
    where = ["--model_name_or_path", task.model, "--dataset_name", task.dataset_name]
    return {
        "never_in_format": f"python cold_start.py {shlex.join(where)} teaches the format",
        "all_wrong_in_format": "take easier problems, a larger model or more samples a group (NUM_GENERATIONS); "
        "--split train --keep FOLDER keeps the problems that would teach",
        "all_right": "take harder problems",
        "mixed": f"REWARD_FUNCS pay no difference between these samples; see {task.file.stem}.jsonl",
    }[kind]


def draw_pass_at_k(reports: list[tuple[str, dict]]):
    """The picture of pass@k over k: a colour for each named model, strict with its 95% interval, lenient dashed."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    for (name, report), colour in zip(reports, curves.PALETTE, strict=False):
        for key, style in (("strict", "-"), ("lenient", "--")):
            found = [measure for measure in report[key] if measure.startswith("pass@")]
            counts = [int(measure[5:]) for measure in found]
            values = [report[key][measure] for measure in found]
            label = printable(f"{key}: {name}").replace("$", r"\$")
            axes.plot(counts, values, style, color=colour, marker="o", label=label)
            if key == "strict":
                low, high = zip(*(report[key]["ci95"][measure] for measure in found), strict=True)
                axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set(xlabel="k, samples a problem", ylabel="pass@k: share of problems that one of k solves", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return picture


def keep(task: Task, rows: list[dict], held_out: list[dict] | None) -> None:
    """Write the problems that would teach as a dataset's folder, with the test split, and print how to train on it."""
    kept = [problem for problem, row in zip(task.problems(), rows, strict=True) if row["would_teach"]]
    if not kept:
        raise BadInput("--keep: no problem would teach, and nothing is written")
    parts, texts = {"train": kept, **({"test": held_out} if held_out else {})}, {}
    for name, problems in parts.items():
        rows_of_data = [{**each, "answer": f"{each['rationale']}\n#### {each['answer']}".lstrip()} for each in problems]
        try:
            lines = [json.dumps({k: v for k, v in each.items() if k != "rationale"}) for each in rows_of_data]
        except TypeError as error:  # of a table's column with dates, say
            raise BadInput(f"--keep: a row holds what JSON lines cannot ({error}); nothing is written") from error
        texts[name] = "\n".join(lines) + "\n"
    folder = Path(task.keep)
    folder.mkdir(parents=True)
    for name, text in texts.items():
        write_whole(folder / f"{name}.jsonl", text)
    print(f"kept: {len(kept):,} of {len(rows):,} problems, in {folder}")
    words = ["python", "train_grpo.py", "--model_name_or_path", task.model, "--dataset_name", str(folder)]
    usual = Task(task.model)
    for name in (*LIMITS, "temperature"):  # another prompt or limit would train another policy than was measured
        value = getattr(task, name)
        if (value or None) != (getattr(usual, name) or None):
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    on_cpu = task.use_cpu or not torch.cuda.is_available()
    words += [*(["--use_cpu", "true"] if on_cpu else []), *([] if held_out else ["--eval_steps", "0"])]
    print(f"next:  {shlex.join(words)}")


# ---- the command


def run(task: Task) -> None:
    """Evaluate, compare where asked to, write and print."""
    if task.compare or task.chat_template_kwargs:  # mistakes are told before hours of the baseline
        tokenizer = load_tokenizer(task.model, task.model_revision, task.trust_remote_code)
        tokenize(tokenizer, [task.prompt("2 + 2?")], task.chat_template_kwargs)
        check_template_kwargs(tokenizer, task.chat_template_kwargs)
    if task.samples:
        return run_samples(task)
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

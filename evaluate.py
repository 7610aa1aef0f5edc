"""Greedy accuracy of a policy on held-out problems, zero-shot, with the prompt it was trained on.

    python evaluate.py outputs/MyRun                        # the whole test split
    python evaluate.py outputs/MyRun --compare Qwen/Qwen2.5-1.5B-Instruct --limit 200
    python evaluate.py outputs/MyRun --ask "how many r's are in strawberry?"

Strict accuracy counts the right number in the required format, lenient accuracy the right number as the last one
anywhere in the text: the gap between them is format, not arithmetic.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gsm8k import BadInput, expand, load_problems, load_tokenizer, to_prompt
from processes import count, gathered, rank
from record import printable, read_run, set_aside, write_whole
from rewards import SYSTEM_PROMPT, extract_xml_answer, is_strict_format, reflects, same_number
from safeguards import VLLM_VERSIONS, checkpoints, vllm_obstacle

DATASET = "openai/gsm8k"  # Hub name or folder, where neither the run nor a flag names one
DATASET_CONFIG = "main"
SPLIT = "test"
MAX_COMPLETION_LENGTH = 512  # tokens
BATCH_SIZE = 64  # problems at a time

SIGNIFICANCE = 0.05  # a p-value from here on is no difference

# of a report's table, with their format
ROWS = {
    "strict_accuracy": ".1%",
    "lenient_accuracy": ".1%",
    "format_rate": ".1%",
    "truncated_rate": ".1%",
    "mean_completion_tokens": ".1f",
    "reflection_rate": ".1%",
}

LAST_NUMBER = re.compile(r"(?:(?<![\w.,])-)?\$?[0-9][0-9,]*(?:\.[0-9]+)?")


# ---- generation


def load_policy(name: str, revision: str | None = None, use_cpu: bool = False, trust_remote_code: bool = False):
    """The model, in bf16 on a GPU and fp32 on a CPU, ready for inference.

    Raises:
        BadInput: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        found = checkpoints(name)
        hint = f" It holds {found[-1].name}: evaluate that." if found else ""
        raise BadInput(f"model {name!r}: {str(error).strip()}{hint}") from error
    return model.to(device).eval()


def complete(
    model,
    tokenizer,
    prompts: list[list[dict]],
    max_completion_length: int,
    batch_size: int = BATCH_SIZE,
    chat_template_kwargs: dict | None = None,
    progress: bool = True,
    temperature: float = 0.0,
) -> list[dict]:
    """Completions of B conversational prompts, in their order: greedy, or sampled where `temperature` is above 0.

    Prompts of similar length share a batch, the longest first, so that little is padded and a batch that does not fit
    fails at once.

    Returns:
        B dicts of `text`, `tokens` (count, EOS included) and `truncated` (no EOS within the limit).
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    declared = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    # generate() fills what a given config leaves at its default from the model's own, such as Qwen2.5's repetition
    # penalty of 1.05, so the model's own is replaced
    model.generation_config = GenerationConfig(
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
        max_new_tokens=max_completion_length,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    token_ids = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))
    completions: list[dict] = [{}] * len(prompts)
    bar = tqdm(total=len(prompts), unit="problem", dynamic_ncols=True, disable=None if progress else True)
    with bar, torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [token_ids[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(**batch)  # (chosen, prompt + completion)
            for i, ids in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in eos_ids), None)
                ids = ids if end is None else ids[: end + 1]
                text = tokenizer.decode(ids, skip_special_tokens=True)
                completions[i] = {"text": text, "tokens": len(ids), "truncated": end is None}
            bar.update(len(chosen))
    return completions


def complete_with_vllm(
    name: str, revision: str | None, trust_remote_code: bool, tokenizer, prompts: list[list[dict]], task: "Task"
) -> list[dict]:
    """`complete` with vLLM, which loads the model itself and batches as it sees fit."""
    import gc

    from vllm import LLM, SamplingParams

    token_ids = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, **task.chat_template_kwargs
    )["input_ids"]
    longest = max(map(len, token_ids)) + task.max_completion_length
    engine = LLM(
        model=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype="bfloat16",
        max_model_len=longest,
        generation_config="vllm",  # not the model's own, which may sample or penalise repetition
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=task.max_completion_length)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling)
    completions = [output.outputs[0] for output in outputs]
    del engine  # a comparison starts a second one
    gc.collect()
    return [{"text": c.text, "tokens": len(c.token_ids), "truncated": c.finish_reason == "length"} for c in completions]


# ---- scores


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, as it is written; None without one."""
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def score(index: int, problem: dict, completion: dict) -> dict:
    """One line of evaluation.jsonl: a problem, its completion, and whether it is right."""
    text, gold = completion["text"], problem["answer"]
    extracted = extract_xml_answer(text)
    in_format = is_strict_format(text)
    return {
        "index": index,
        "question": problem["question"],
        "gold": gold,
        "completion": text,
        "extracted": extracted,
        "strict": in_format and same_number(extracted, gold),
        "lenient": same_number(last_number(text), gold),
        "format": in_format,
        "truncated": completion["truncated"],
        "tokens": completion["tokens"],
    }


def summarize(rows: list[dict]) -> dict:
    """Shares over the problems, with the 95% Wilson interval of strict accuracy."""
    from scipy.stats import binomtest

    n = len(rows)

    def share(key: str) -> float:
        return sum(row[key] for row in rows) / n

    interval = binomtest(sum(row["strict"] for row in rows), n).proportion_ci(method="wilson")
    return {
        "n": n,
        "strict_accuracy": share("strict"),
        "strict_ci95": [interval.low, interval.high],
        "lenient_accuracy": share("lenient"),
        "format_rate": share("format"),
        "truncated_rate": share("truncated"),
        "mean_completion_tokens": share("tokens"),
        "reflection_rate": sum(reflects(row["completion"]) for row in rows) / n,
    }


@dataclass(frozen=True)
class Task:
    """What an evaluation measures on; two are comparable only where it is the same."""

    dataset_name: str
    dataset_config: str | None
    split: str
    max_completion_length: int  # tokens
    chat_template_kwargs: dict
    one_shot: bool = False  # a worked example before the question
    system_prompt: str = SYSTEM_PROMPT
    limit: int | None = None  # only the first so many problems

    def problems(self) -> list[dict]:
        return load_problems(self.dataset_name, self.dataset_config, self.split)[0][: self.limit]

    def prompt(self, question: str) -> list[dict]:
        return to_prompt(question, self.system_prompt, self.one_shot)


def evaluate(
    name: str,
    task: Task,
    *,
    revision: str | None = None,
    batch_size: int = BATCH_SIZE,
    use_vllm: bool | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
) -> tuple[dict, list[dict]]:
    """Evaluate a policy; with `use_vllm` None, by vLLM where it is installed with a GPU.

    Returns:
        The report (evaluation.json) and the scored problems (the lines of evaluation.jsonl).

    Raises:
        BadInput: the model or the problems cannot be loaded.
    """
    if use_vllm and (obstacle := vllm_obstacle(use_cpu)):
        raise BadInput(
            f"--use_vllm true needs vLLM {' to '.join(VLLM_VERSIONS)} and a CUDA GPU, but {obstacle}; leave it out to "
            "use Transformers"
        )
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    problems = task.problems()
    prompts = [task.prompt(problem["question"]) for problem in problems]
    if use_vllm is None:  # vLLM loads whole models, no adapters
        use_vllm = vllm_obstacle(use_cpu) is None and not (Path(name) / "adapter_config.json").exists()
    if use_vllm:
        completions = complete_with_vllm(name, revision, trust_remote_code, tokenizer, prompts, task)
    else:
        policy = load_policy(name, revision, use_cpu, trust_remote_code)
        length, kwargs = task.max_completion_length, task.chat_template_kwargs
        completions = complete(policy, tokenizer, prompts, length, batch_size, kwargs)
    rows = [score(i, *pair) for i, pair in enumerate(zip(problems, completions, strict=True))]
    report = {"model": name, "dataset": task.dataset_name, "split": task.split, **summarize(rows)}
    report["model_revision"] = revision
    report["max_completion_length"] = task.max_completion_length
    report["chat_template_kwargs"] = task.chat_template_kwargs
    report["one_shot"] = task.one_shot
    report["system_prompt"] = task.system_prompt
    return report, rows


# ---- comparison


def load_evaluation(folder: Path, task: Task) -> tuple[dict, list[dict]]:
    """A finished evaluation of the same task out of a folder.

    Raises:
        BadInput: it is damaged, or measured something else; the message says what.
    """
    try:
        report = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
        of, written = Path(report["model"]), (folder / "evaluation.jsonl").stat().st_mtime
        asked = [(row["question"], row["gold"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: its evaluation cannot be read ({error!r}); evaluate it again") from error
    weights = [*folder.glob("*.safetensors")]
    if weights and (of.resolve() != folder.resolve() or max(path.stat().st_mtime for path in weights) > written):
        raise BadInput(
            f"{folder}: the evaluation there is of {of} or of earlier weights; evaluate {folder} again first"
        )
    report = {"one_shot": False, **report}  # evaluations before there was one
    differing = [
        f"{name.replace('_', ' ')}: {report.get(name)!r} there, {getattr(task, name)!r} here"
        for name in ("max_completion_length", "chat_template_kwargs", "one_shot", "system_prompt")
        if report.get(name) != getattr(task, name)
    ]
    wanted = [(problem["question"], problem["answer"]) for problem in task.problems()]
    if asked != wanted:
        same = sum(first == second for first, second in zip(asked, wanted, strict=False))
        differing.insert(0, f"problems: {len(asked)} there, {len(wanted)} here, {same} of them the same")
    if differing:
        raise BadInput(f"{folder}: its evaluation is not comparable. " + "; ".join(differing))
    return report, rows


def compare(rows: list[dict], baseline: list[dict]) -> dict:
    """Paired comparison of strict results: the four counts, the difference, and the exact p-value of McNemar's test.

    Only problems that exactly one of the two gets right say anything: were the two equally good, each such problem
    would fall to either with probability 1/2 (McNemar 1947, in its exact binomial form).
    """
    from scipy.stats import binomtest

    pairs = [(row["strict"], other["strict"]) for row, other in zip(rows, baseline, strict=True)]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    return {
        "difference": (gained - lost) / len(pairs),
        "both_right": pairs.count((True, True)),
        "only_model_right": gained,
        "only_baseline_right": lost,
        "both_wrong": pairs.count((False, False)),
        "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
        "n": len(pairs),
    }


def in_words(comparison: dict) -> str:
    """The comparison as a sentence: a difference, or none that so many problems could show."""
    p, n, points = comparison["mcnemar_p"], comparison["n"], 100 * comparison["difference"]
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p >= SIGNIFICANCE:
        return f"no difference that n = {n:,} could show ({points:+.1f} points, {p_text})"
    return f"{'better' if points > 0 else 'worse'} by {abs(points):.1f} points, {p_text}, n = {n:,}"


def table(reports: dict[str, dict]) -> str:
    """A column for each named report; of two, also the second minus the first."""
    first, last = next(iter(reports.values())), next(reversed(reports.values()))
    width = max(18, *(len(name) + 2 for name in reports))
    lines = [f"{'':<24}" + "".join(f"{name:>{width}}" for name in reports)]
    lines[0] += f"{'difference':>12}" if len(reports) == 2 else ""
    for key, unit in ROWS.items():
        line = f"{key.replace('_', ' '):<24}" + "".join(f"{report[key]:>{width}{unit}}" for report in reports.values())
        if len(reports) == 2:
            change = last[key] - first[key]
            line += f"{100 * change:>+12.1f}" if unit == ".1%" else f"{change:>+12.1f}"
        lines.append(line)
        if key == "strict_accuracy":
            intervals = (f"{low:.1%} - {high:.1%}" for low, high in (r["strict_ci95"] for r in reports.values()))
            lines.append(f"{'  95% interval':<24}" + "".join(f"{interval:>{width}}" for interval in intervals))
    lines.append(f"{'problems (n)':<24}" + "".join(f"{report['n']:>{width},}" for report in reports.values()))
    return "\n".join(lines)


# ---- while training


def held_out_sample(task: Task, size: int) -> list[dict]:
    """`size` of the task's problems, the same ones every time.

    Raises:
        BadInput: they cannot be loaded.
    """
    try:
        problems = task.problems()
    except BadInput as error:
        raise BadInput(f"{error} (EVAL_STEPS = 0 trains without a test split)") from error
    return random.Random(0).sample(problems, min(size, len(problems)))


def held_out_callback(trainer, tokenizer, task: Task, problems: list[dict], every: int):
    """Measure the policy in training greedily on `problems`: before the first step, every `every` steps and after the
    last. Logged as `eval_strict_accuracy` and so on.

    Training does not feel it: weights, random state and generation settings are left as they were. Several processes
    share the problems.
    """
    import torch
    from transformers import Trainer, TrainerCallback
    from trl.models import unwrap_model_for_generation

    prompts = [task.prompt(problem["question"]) for problem in problems]
    # as many for each process, some twice: a sharded policy generates on all of them or on none
    share = [(rank() + count() * i) % len(prompts) for i in range(-(-len(prompts) // count()))]

    def measure() -> None:
        on = trainer.args.device
        length, kwargs = task.max_completion_length, task.chat_template_kwargs
        with (
            torch.random.fork_rng(devices=[on] if on.type == "cuda" else []),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as policy,
        ):
            settings = policy.generation_config
            policy.eval()
            mine = complete(policy, tokenizer, [prompts[i] for i in share], length, BATCH_SIZE, kwargs, progress=False)
            policy.generation_config = settings
            policy.train()
        completions = dict(pair for pairs in gathered(list(zip(share, mine, strict=True))) for pair in pairs)
        rows = [score(i, problem, completions[i]) for i, problem in enumerate(problems)]
        report = {f"eval_{key}": value for key, value in summarize(rows).items() if key != "strict_ci95"}
        Trainer.log(trainer, report)  # TRL's own log would empty its buffer of training metrics into this

    class HeldOut(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            # a run that a signal stopped saved before it measured: it is made up for here
            measured = any(row["step"] == state.global_step and "eval_n" in row for row in state.log_history)
            if state.global_step % every == 0 and not measured:
                measure()

        def on_step_end(self, args, state, control, **kwargs):
            is_last = state.global_step == state.max_steps
            if is_last or (state.global_step % every == 0 and not control.should_training_stop):
                training_log_is_due = control.should_log
                measure()  # whose own log clears that mark
                control.should_log = training_log_is_due

    return HeldOut()


# ---- the command


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, Task]:
    """Flags; what none names comes from the run that trained the model, else from the constants above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="Hub name, local folder, or a run's folder or checkpoint")
    parser.add_argument("--compare", metavar="BASELINE", help="another model, or a folder that holds its evaluation")
    parser.add_argument("--model_revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dataset_name", help=f"Hub name or folder (default: the run's, else {DATASET})")
    parser.add_argument("--dataset_config", help=f"Hub configuration (default: the run's, else {DATASET_CONFIG})")
    parser.add_argument("--dataset_test_split", help=f"split to evaluate on (default: the run's, else {SPLIT})")
    parser.add_argument("--max_completion_length", type=int, help="tokens (default: the run's, else 512)")
    parser.add_argument("--chat_template_kwargs", type=json.loads, help='JSON, such as {"enable_thinking": false}')
    parser.add_argument(
        "--one_shot", type=json.loads, metavar="true|false", help="a worked example before the question (the run's)"
    )
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="problems at a time (%(default)s)")
    parser.add_argument(
        "--use_vllm", type=json.loads, metavar="true|false", help="default: where it is installed and a GPU is there"
    )
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--output_dir", help="where evaluation.json and .jsonl go (default: the model's folder)")
    parser.add_argument("--ask", metavar="QUESTION", help="print the answer to one question and exit")
    flags = parser.parse_args(argv)
    flags.model = expand(flags.model)
    flags.compare = flags.compare and expand(flags.compare)
    for name in ("limit", "batch_size", "max_completion_length"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1")

    try:
        run = read_run(Path(flags.model))
    except BadInput as error:
        parser.error(str(error))
    settings = run.get("settings", {})
    defaults = {
        "dataset_name": DATASET,
        "dataset_config": DATASET_CONFIG,
        "dataset_test_split": SPLIT,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "chat_template_kwargs": {},
        "one_shot": False,
    }
    for name, default in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, settings.get(name, default))
    task = Task(
        flags.dataset_name,
        flags.dataset_config,
        flags.dataset_test_split,
        flags.max_completion_length,
        flags.chat_template_kwargs,
        flags.one_shot,
        run.get("system_prompt", SYSTEM_PROMPT),
        flags.limit,
    )
    return flags, task


def ask(flags: argparse.Namespace, task: Task) -> str:
    tokenizer = load_tokenizer(flags.model, flags.model_revision, flags.trust_remote_code)
    policy = load_policy(flags.model, flags.model_revision, flags.use_cpu, flags.trust_remote_code)
    prompt = task.prompt(flags.ask)
    length, kwargs = task.max_completion_length, task.chat_template_kwargs
    answer = complete(policy, tokenizer, [prompt], length, chat_template_kwargs=kwargs, progress=False)[0]
    return printable(answer["text"]) + (" [cut off]" if answer["truncated"] else "")


def home(name: str) -> Path:
    """The folder a model's evaluation goes to: its own, or one under outputs/ for a model on the Hub."""
    folder = Path(name)
    return folder if folder.is_dir() else Path("outputs") / name.replace("/", "--")


def options(flags: argparse.Namespace) -> dict:
    """How to run a model, as `evaluate` takes it."""
    return {name: getattr(flags, name) for name in ("batch_size", "use_vllm", "use_cpu", "trust_remote_code")}


def baseline_evaluation(flags: argparse.Namespace, task: Task) -> tuple[dict, list[dict]]:
    """The baseline's evaluation: the one in its folder, else made and saved there now."""
    folder = home(flags.compare)
    if (folder / "evaluation.jsonl").is_file():
        report, rows = load_evaluation(folder, task)
        print(f"baseline: the evaluation of {report['model']} in {folder}")
        return report, rows
    print(f"baseline: {flags.compare}")
    report, rows = evaluate(flags.compare, task, **options(flags))
    save(folder, report, rows)
    return report, rows


def run(flags: argparse.Namespace, task: Task) -> None:
    """Evaluate, compare where asked to, write and print."""
    baseline = baseline_evaluation(flags, task) if flags.compare else None
    print(f"model: {flags.model}")
    report, rows = evaluate(flags.model, task, revision=flags.model_revision, **options(flags))
    columns = {Path(flags.model).name: report}
    if baseline:
        report["comparison"] = {"baseline": flags.compare, **compare(rows, baseline[1])}
        columns = {"baseline": baseline[0], "model": report}
    folder = Path(flags.output_dir or home(flags.model))
    save(folder, report, rows)
    print(table(columns))
    if baseline:
        counts = report["comparison"]
        print(
            f"strict results in pairs: both right {counts['both_right']}, only the model {counts['only_model_right']}, "
            f"only the baseline {counts['only_baseline_right']}, both wrong {counts['both_wrong']}\n"
            f"{flags.model} against {flags.compare}: {in_words(counts)}"
        )
    print(f"written: {folder / 'evaluation.json'}, {folder / 'evaluation.jsonl'}")


def main(argv: list[str] | None = None) -> None:
    if count() > 1:
        sys.exit("evaluate.py runs in one process: start it with python")
    flags, task = parse_flags(argv)
    try:
        if flags.ask is not None:
            print(ask(flags, task))
        else:
            run(flags, task)
    except BadInput as error:
        sys.exit(f"evaluate.py: {printable(str(error))}")
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def save(folder: Path, report: dict, rows: list[dict]) -> None:
    """Write evaluation.json and evaluation.jsonl, each whole or not at all; earlier ones are set aside."""
    folder.mkdir(parents=True, exist_ok=True)
    for kept in set_aside(folder, "evaluation.json", "evaluation.jsonl"):
        print(f"the earlier {kept.name.split('.')[0]} is kept as {kept}")
    write_whole(folder / "evaluation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A tiny policy, a few problems of our own, and the real entry points as a user starts them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# the tests share the machine's cores, two at a time (below), and several threads each would wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """All tests but those marked gpu are about the CPU, also where there is a GPU."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
SOURCES = [  # no virtual environment in the folder, and no script that a run keeps
    *sorted(ROOT.glob("*.py")),
    *(path for folder in ("support", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))),
]
GSM8K = Path(os.environ.get("GSM8K", ROOT.parent / "shared" / "gsm8k"))  # the real dataset; without it its tests skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two at a time where tests of tests/system are asked for; a start of two processes costs more than the others."""
    paths = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
    asks_for_system = any(path in (ROOT, TESTS) or TESTS / "system" in (path, path.parent) for path in paths)
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the two, which starts no more
        config.option.loadgroup = True  # as --dist loadgroup does
    elif asks_for_system and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "loadgroup"


# small enough for a CPU in seconds; the recipe's own constants otherwise
SMALL = {
    "use_cpu": "true",
    "bf16": "false",
    "max_steps": "4",
    "save_steps": "2",
    "sample_every": "2",
    "eval_steps": "2",
    "eval_problems": "6",
    "per_device_train_batch_size": "8",
    "num_generations": "4",
    "max_completion_length": "12",
    "learning_rate": "1e-3",
}

COLD = {  # of a cold start: long enough for the tiny policy to learn the format by heart, and for a signal to hit
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "examples": "24",
    "num_train_epochs": "40",
    "per_device_train_batch_size": "8",
    "learning_rate": "5e-3",
    "max_completion_length": "60",
    "save_steps": "10",
}


@pytest.fixture(autouse=True)
def a_process_of_its_own():
    """As far as accelerate can tell: it keeps the first run's precision and device for all runs of a process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def write_jsonl(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def load_problems(name: str, config, split: str, question="question", answer="answer", drop_non_numeric=False):
    """`support.problems.load_problems` of this data."""
    from support import problems

    data = {"dataset_name": name, "dataset_config": config, "drop_non_numeric": drop_non_numeric}
    settings = SimpleNamespace(**data, question_column=question, answer_column=answer)
    return problems.load_problems(settings, split)


def problem(a: int, b: int) -> dict:
    return {"question": f"Otto has {a} nails and buys {b} more. How many?", "answer": f"{a} + {b}\n#### {a + b}"}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of 32 training and 10 test problems."""
    folder = tmp_path_factory.mktemp("problems")
    write_jsonl(folder / "train.jsonl", [problem(a, 3) for a in range(32)])
    write_jsonl(folder / "test.jsonl", [problem(a, 7) for a in range(10)])
    return folder


def tiny(data: Path, initializer_range: float, layers: int = 2):
    """A random Qwen2 of 0.1M parameters and the demo's kind of tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import demo
    from cold_start import target
    from rewards import to_prompt

    problems, _ = load_problems(str(data), None, "train")
    solved = [(to_prompt(problem["question"]), target(problem["rationale"], problem["answer"])) for problem in problems]
    tokenizer = demo.train_tokenizer(
        [{"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for prompt, text in solved]
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,  # tied random embeddings just repeat the last token
        initializer_range=initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config), tokenizer


@pytest.fixture(scope="session")
def babbler(tmp_path_factory, data) -> Path:
    """A folder with a random policy, which says different things to different prompts and hardly ever stops."""
    folder = tmp_path_factory.mktemp("models") / "babbler"
    for part in tiny(data, initializer_range=0.3):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory, data) -> Path:
    """A folder with a policy that answers with some number, so that completions of one group earn different rewards and
    every step has a gradient."""
    import torch

    from rewards import to_prompt

    model, tokenizer = tiny(data, initializer_range=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    prompt = tokenizer.apply_chat_template(to_prompt("How many?"), add_generation_prompt=True, tokenize=False)
    for step in range(150):
        texts = [f"{prompt}{(7 * step + 13 * i) % 50}{tokenizer.eos_token}" for i in range(16)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        model(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def launch(script: str, *args, folder: Path = ROOT, **env) -> subprocess.Popen:
    """Start a file, `-m module` or lines of Python in a process of its own, in `folder` and without the Hub; stdout and
    stderr as text."""
    is_file = script.endswith(".py")
    what = [str(folder / script)] if is_file else script.split() if script.startswith("-m ") else ["-c", script]
    return subprocess.Popen(
        [sys.executable, "-u", *what, *map(str, args)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(script: str, *args, timeout: float = 1800, **env) -> subprocess.CompletedProcess:
    """Run an entry point to its end."""
    process = launch(script, *args, **env)
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()  # nothing where it has ended
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def flags(policy: Path, data: Path, output: Path, **changes) -> list[str]:
    """The command line of a small run; a change to None drops a flag."""
    settings = {"model_name_or_path": policy, "dataset_name": data, "output_dir": output, **SMALL, **changes}
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def cold_flags(policy: Path, data: Path, output: Path, **changes) -> list[str]:
    """The command line of a small cold start; a change to None drops a flag."""
    settings = {"model_name_or_path": policy, "dataset_name": data, "output_dir": output, **COLD, **changes}
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def settings(*words):
    """The settings of a start with this command line on a CPU."""
    import train_grpo
    from support.settings import read_settings

    return read_settings(vars(train_grpo), ["--use_cpu", "true", *map(str, words)])


def refused(capsys, status: int, words: list) -> str:
    """The error of a start that must not train; in this process, to save the time of the imports."""
    out, error = ended(capsys, status, words)
    assert "\nstep " not in out
    return error


def ended(capsys, status: int, words: list, command=None) -> tuple[str, str]:
    """What a start in this process (of train_grpo.py, or another `command`) prints before it ends with `status`, and
    its error."""
    import train_grpo

    with pytest.raises(SystemExit) as exit:
        (command or train_grpo).main([str(word) for word in words])
    out, error = capsys.readouterr()
    assert (exit.value.code if isinstance(exit.value.code, int) else 1) == status, error
    return out, error if isinstance(exit.value.code, int) else exit.value.code


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def distance(first: dict, second: dict) -> float:
    """Of two states' weights, as one vector."""
    return sum((first[name] - second[name]).square().sum().item() for name in first) ** 0.5


def identical(first: dict, second: dict) -> bool:
    import torch

    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, policy, data) -> tuple[Path, subprocess.CompletedProcess]:
    """A finished small run: its folder, and the process."""
    output = tmp_path_factory.mktemp("runs") / "small"
    done = start("train_grpo.py", *flags(policy, data, output))
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done


# ---- a run that is interrupted, and the same one left alone

LONG = {"max_steps": 24, "save_steps": 4, "eval_steps": 8, "sample_every": 0}
SLOW = {**LONG, "max_completion_length": 400, "generation_kwargs": '{"min_new_tokens": 400}', "eval_steps": 0}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, policy, data) -> Path:
    """A run of 24 steps that nothing happened to."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = start("train_grpo.py", *flags(policy, data, output, **LONG))
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    """That run, to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def until(process: subprocess.Popen, text: str) -> str:
    """Read a process's output up to a line with `text`; what has been read."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    errors = process.stderr.read() if process.stderr else ""  # else they are in the output
    raise AssertionError(f"ended without {text!r}:\n{(seen + errors)[-4000:]}")


def same_run(first: Path, second: Path, steps: int = 24) -> bool:
    """The same prompts, completions, rewards and advantages at every step, and the same final weights."""
    import pandas

    for step in range(1, steps + 1):
        name = f"completions/completions_{step:05d}.parquet"
        pandas.testing.assert_frame_equal(pandas.read_parquet(first / name), pandas.read_parquet(second / name))
    return identical(weights(first), weights(second))


def resumed(output: Path, words: list[str], **env) -> subprocess.CompletedProcess:
    done = start("train_grpo.py", *words, "--resume_from_checkpoint", "auto", **env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def resumed_here(capsys, words: list) -> str:
    """What a resumed run prints, in this process."""
    import train_grpo

    try:
        train_grpo.main([*map(str, words), "--resume_from_checkpoint", "auto"])
    except SystemExit as exit:
        assert exit.code == 0, exit.code  # a run without a step left
    return capsys.readouterr().out

"""The documents are true: parsers take every command, every link leads somewhere, both READMEs agree."""

import argparse
import importlib
import json
import re
import shlex
import sys
import tomllib
from itertools import pairwise

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, SOURCES
from trl.scripts.vllm_serve import make_parser

import cold_start
import demo
import evaluate
import rewards
import train_grpo

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
CODE = {path.relative_to(ROOT).as_posix(): path.read_text() for path in SOURCES}
MODULES = {"train_grpo": train_grpo, "cold_start": cold_start, "evaluate": evaluate, "demo": demo}
COMMAND = re.compile(r"\$? ?(?:[A-Z_]+=\S+ )*(?:python|pip|pytest|accelerate|trl|hf|taskset) ")


def code(text: str) -> list[str]:
    """The blocks of code of a page, fenced or indented, their lines joined where a backslash continues them."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [re.sub(r"\\\n\s*", "", block) for block in (*fenced, *indented)]


def commands(page: str) -> list[tuple[list[str], str]]:
    """Each command of a page as its words, without the variables before it, and the marks that it stands under: its
    own comment, or the one that begins its block. Printed output is no command."""
    found = []
    for block in code(TEXTS[page]):
        head = block.partition("\n")[0] if block.startswith("#") else ""
        for line in map(str.strip, block.splitlines()):
            if COMMAND.match(line):
                found.append((line, "shortened" if "…" in line else head + line.partition(" #")[2]))
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    found += [(span, "in a sentence") for span in inline if COMMAND.match(span) and len(span.split()) > 1]
    split = [(part, mark) for line, mark in found for part in line.partition(" #")[0].split(" && ")]
    words = [(shlex.split(part.lstrip("$ ").replace(" …", "")), mark) for part, mark in split]
    return [([word for i, word in enumerate(each) if not is_variable(each, i)], mark) for each, mark in words]


def is_variable(words: list[str], index: int) -> bool:
    return all(re.fullmatch(r"[A-Z_0-9]+=.*", word) for word in words[: index + 1])


FLAGS_OF = {"demo": "train_grpo", "benchmarks.vllm_cpu": "benchmarks.step_time"}  # commands that hand theirs on


class Parsed(BaseException):
    """The end of a command's start in a test: its flags are read."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Start a command and stop it once its parser has taken its words; those that no parser knows are an error."""
    known = argparse.ArgumentParser.parse_known_args
    (tmp_path / "sweep.yaml").write_text("learning_rate: 1e-6\n")
    monkeypatch.chdir(tmp_path)

    def stop(parser, args=None, namespace=None):
        _, odd = known(parser, args, namespace)
        assert not odd, f"unknown: {odd}"
        raise Parsed

    def start(script: str, words: list[str]) -> None:
        name = script.removesuffix(".py").replace("/", ".")
        if name == "evaluate":  # whole: it looks at what goes together, and loads nothing
            evaluate.read_task(words)
            return
        name = FLAGS_OF.get(name, name)
        module = MODULES.get(name) or importlib.import_module(name)
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            patch.setattr(sys, "argv", [script, *words])
            module.main(*([words] if name in MODULES else []))

    return start


def check(words: list[str], parse) -> None:
    """Have the parser of what is started read these words."""
    program, *rest = words
    if program == "taskset":
        check(rest[2:], parse)
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(rest[1:])
        check(["python", launched.training_script, *launched.training_script_args], parse)
    elif program == "trl" and len(rest) > 1:
        make_parser().parse_args(rest[1:])
    elif program == "pytest":
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        named = [marker.partition(":")[0] for marker in markers]
        assert all(word in named for flag, word in pairwise(rest) if flag == "-m")
        assert all((ROOT / word.partition("::")[0]).exists() for word in rest if word.startswith("tests"))
    elif program == "pip":
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".txt"))
    elif program == "python" and rest[0] == "-m":
        assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file()
        flags = [word for word in rest[2:] if word != "--fast"]
        check(["python", *flags], parse)
    elif program == "python" and rest[0] != "-c":
        script, *flags = rest
        assert (ROOT / script).is_file()
        if flags:
            parse(script, flags)


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_is_one_that_its_parser_takes(page, parse):
    for words, _ in commands(page):
        try:
            check(words, parse)
        except (SystemExit, AssertionError, ModuleNotFoundError) as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


def needs(words: list[str]) -> set[str]:
    """What a command cannot do without: a GPU for a training that is not told to use the CPU, the Hub for a model or
    data that is no folder."""
    script = next((word for word in words if word in ("train_grpo.py", "cold_start.py", "evaluate.py")), None)
    if not script:
        return set()
    flags = dict(pairwise(words))
    model = flags.get(script, "") if script == "evaluate.py" else flags.get("--model_name_or_path", "Qwen/")
    data = flags.get("--dataset_name", "outputs/" if script == "evaluate.py" and is_here(model) else "openai/gsm8k")
    places = [model, data, flags.get("--compare", "outputs/")]
    gpu = {"GPU"} if script != "evaluate.py" and flags.get("--use_cpu") != "true" else set()
    return gpu | ({"Hub"} if not all(map(is_here, places)) else set())


def is_here(place: str) -> bool:
    return place.startswith(("outputs/", "models/", "/", "my_", "R15")) or place.endswith(".parquet")


@pytest.mark.parametrize("page", TEXTS)
def test_what_needs_a_gpu_or_the_hub_is_marked(page):
    """In its line, or in the first line of its block; one in a sentence, or in shortened output, is not to be typed."""
    for words, mark in commands(page):
        if mark not in ("in a sentence", "shortened"):
            assert all(need in mark for need in needs(words)), f"{page}: {shlex.join(words)} needs {needs(words)}"


def test_the_commands_are_found():
    """The tests above would pass on none."""
    found = {page: [words for words, _ in commands(page)] for page in TEXTS}
    assert ["python", "cold_start.py", "--output_dir", "outputs/cold"] in found["README.md"]
    assert ["pytest"] in found["README.md"]
    assert ["python", "train_grpo.py", "--config", "sweep.yaml"] in found["docs/flags.md"]
    assert any(words[:2] == ["accelerate", "launch"] for words in found["docs/several-gpus.md"])
    assert any("benchmarks/soak.py" in words for words in found["benchmarks/README.md"]), "in a sentence"
    assert sum(map(len, found.values())) > 60
    assert needs(["python", "train_grpo.py", "--model_name_or_path", "outputs/cold"]) == {"GPU", "Hub"}
    assert needs(["python", "evaluate.py", "outputs/RUN", "--limit", "9"]) == set()


# ---- links, files, names


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def notebook() -> dict:
    return json.loads((ROOT / "notebooks" / "demo.ipynb").read_text())


def test_every_link_leads_somewhere():
    cells = "".join("".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "markdown")
    for page, text in {**TEXTS, "notebooks/demo.ipynb": cells}.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith("https://"):
                place, _, anchor = target.partition("#")
                path = (ROOT / page).parent / place if place else ROOT / page
                assert path.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


FOLDERS = "tests|benchmarks|support|docs|notebooks"


def test_every_file_that_is_named_is_there():
    for page, text in {**TEXTS, **CODE}.items():
        for name in re.findall(rf"\b(?:{FOLDERS})/[\w./-]*\w\.(?:py|md|json|png|ipynb)\b", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_every_module_has_its_place_on_the_page_of_the_code():
    page = TEXTS["docs/code.md"]
    for name in CODE:
        folder, _, file = name.rpartition("/")
        if folder in ("", "support") and file != "__init__.py":
            assert f"`{file.removesuffix('.py') if folder else file}`" in page, name
        if folder == "benchmarks":
            assert f"`{file}`" in TEXTS["benchmarks/README.md"], name


def test_every_page_of_docs_is_linked_from_the_readme_and_links_back():
    for page in (page for page in TEXTS if page.startswith("docs/")):
        assert f"({page}" in TEXTS["README.md"], page
        assert TEXTS[page].startswith("[README](../README.md)\n"), page


OTHERS = "PRIVATE GSM8K HF_ENDPOINT HF_HUB_OFFLINE HF_HOME TENSORBOARD_LOGGING_DIR REWARD_FUNCS LOSS_TYPE"


def test_every_constant_that_is_named_exists():
    known = {name for module in MODULES.values() for name in vars(module) if name.isupper()} | set(OTHERS.split())
    for page, text in TEXTS.items():
        for name in re.findall(r"`([A-Z][A-Z0-9_]{3,})(?: = [^`]*)?`", text):
            assert name in known, f"{page}: {name}"


ELSEWHERE = "--num_processes --num_machines --machine_rank --config_file --served-model-name --check"  # other programs


def test_every_flag_that_is_named_exists(capsys):
    """In a sentence; those of commands go through the parsers."""
    known = set(ELSEWHERE.split())
    for module in MODULES.values():
        with pytest.raises(SystemExit):
            module.main(["--help"])
        known |= set(re.findall(r"--\w+(?:-\w+)*", capsys.readouterr().out))
    own = "".join(text for name, text in CODE.items() if name.startswith("benchmarks/"))
    known |= set(re.findall(r'"(--\w+)"', own))
    for page, text in TEXTS.items():
        for span in re.findall(r"`(--\w[^`]*)`", text):
            for flag in re.findall(r"(?<!\S)--\w[\w-]*", span):
                assert flag in known, f"{page}: {flag}"


# ---- the README


def test_the_page_that_a_newcomer_reads_is_short():
    for page in ("README.md", "README.zh.md"):
        assert len(TEXTS[page].splitlines()) <= 120
    assert len(TEXTS["README.md"].split()) <= 1100
    assert len(TEXTS["benchmarks/README.md"].splitlines()) <= 200


def sections(text: str) -> list[str]:
    return re.split(r"^## .*$", text, flags=re.MULTILINE)


def figures(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_the_chinese_page_has_the_same_commands_and_figures():
    english, chinese = TEXTS["README.md"], TEXTS["README.zh.md"]
    uncommented = [[re.sub(r" +#.*", "", block) for block in code(text)] for text in (english, chinese)]
    assert uncommented[0] == uncommented[1]
    assert len(sections(english)) == len(sections(chinese)) == 11
    for ours, theirs in zip(sections(english), sections(chinese), strict=True):
        assert figures(ours) == figures(theirs)
        assert sorted(re.findall(r"`[^`\n]+`", ours)) == sorted(re.findall(r"`[^`\n]+`", theirs))
    links = [set(re.findall(r"\]\(([^)\s]+)\)", text)) for text in (english, chinese)]
    assert links[0] - {"README.zh.md"} == links[1] - {"README.md"}


def test_the_readmes_reward_pays_as_it_says():
    (block,) = [block for block in code(TEXTS["README.md"]) if block.startswith("def ")]
    assert len(block.splitlines()) == 5
    functions = list(rewards.REWARD_FUNCS)
    exec(block, {"REWARD_FUNCS": functions})
    texts = ["short", "long " * 100]
    assert functions[:-1] == rewards.REWARD_FUNCS
    assert functions[-1](completions=[[{"role": "assistant", "content": text}] for text in texts]) == [0.5, 0.0]


def test_the_original_is_named_and_each_difference_is_one_line():
    page = TEXTS["docs/from-the-original.md"]
    assert "https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb" in page
    assert "https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb" in TEXTS["README.md"]
    for row in re.findall(r"^\| .*$", page, re.MULTILINE):
        assert len(row) < 300, row


def test_a_config_file_of_the_docs_is_yaml_as_it_stands():
    for span in re.findall(r"`(\w+: [^`]+)`", " ".join(TEXTS["docs/flags.md"].split())):
        assert isinstance(yaml.safe_load(span), dict), span


def test_the_notebook_is_short_and_holds_no_outputs():
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert sum(len(cell["source"]) for cell in cells) < 60
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)

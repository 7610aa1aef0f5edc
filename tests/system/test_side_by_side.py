"""comparison.html in a real browser: it shows two evaluations side by side, filters them, and runs nothing."""

import json
import os
import re
import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import write_jsonl

import evaluate
from benchmarks import side_by_side
from support import evaluation
from support.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "</pre></details><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    "<style>* { display: none }</style>\u202e\x1b[2J\x00{{ 7 * 7 }} &lt; \ud800 5"
)


def formatted(answer) -> str:
    return f"<reasoning>\nWith 3 of them.\n</reasoning>\n<answer>\n{answer}\n</answer>"


GOOD = formatted(4)
BASE = "<b>base</b>"  # of which evaluations are kept in outputs/<b>base<--b>


def keep(path: Path, report: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    write_jsonl(path.with_suffix(".jsonl"), rows)


def compared(folder: Path, count: int, completion=formatted) -> None:
    """The evaluations of `count` problems, as they are in `folder` and in its outputs/ after a comparison: of 8, the
    trained model gains 4 and loses 1, and both solve 2 and neither 1."""
    problems = [{"question": f"What is {i} & <b>3</b>?", "answer": str(i + 3)} for i in range(count)]

    def rows(right, native=False, wrong="0") -> list[dict]:
        say = completion if not native else r"So $\boxed{{{}}}$ it is.".format
        texts = [say(problem["answer"] if i % 8 in right else wrong) for i, problem in enumerate(problems)]
        completions = [{"text": text, "tokens": 9, "truncated": i % 8 == 7} for i, text in enumerate(texts)]
        return [evaluation.score(i, *pair, native) for i, pair in enumerate(zip(problems, completions, strict=True))]

    model, baseline, native = rows({0, 1, 2, 3, 4, 5}), rows({4, 5, 6}), rows({0, 1, 4, 7}, native=True)
    before = {
        name: (evaluation.summarize(of), of) for name, of in (("baseline native", native), ("baseline", baseline))
    }
    report = {"dataset": "<i>ours</i>", "split": "test", "max_completion_length": 99, "one_shot": False}
    report |= evaluation.summarize(model)
    report |= {"model": "outputs/Run", "comparison": evaluate.paired(BASE, before, model)}
    keep(folder / "evaluation.json", report, model)
    for name, file in (("baseline native", "evaluation-native.json"), ("baseline", "evaluation.json")):
        measured, of = before[name]
        keep(folder / "outputs" / BASE.replace("/", "--") / file, {"model": BASE, **measured}, of)


def page(folder: Path, count: int, completion=formatted) -> Path:
    compared(folder, count, completion)
    made(folder)
    return folder / "comparison.html"


def made(folder: Path) -> None:
    """`benchmarks/side_by_side.py`, started in `folder` for the evaluation there."""
    with chdir(folder):
        side_by_side.main([str(folder)])


class Browser:
    """A headless Chromium, told what to do through its debugging pipe: messages of JSON, a zero byte behind each."""

    def __init__(self, profile):
        down, self.down = os.pipe()
        self.up, up = os.pipe()
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        script = f'exec "$0" "$@" 3<&{down} 4>&{up}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *switches], pass_fds=(down, up), stderr=subprocess.DEVNULL
        )
        os.close(down)
        os.close(up)
        self.number, self.buffer, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            chunk = os.read(self.up, 1 << 20)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.down, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def ask(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def shown(self) -> list[int]:
        """The numbers of the problems that are to be seen, from 0 on."""
        shown = "[...document.querySelectorAll('details')].map((d, i) => d.getClientRects().length ? i : -1)"
        return [i for i in self.ask(shown) if i >= 0]

    def close(self) -> None:
        try:
            self.call("Browser.close")
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.up)
            os.close(self.down)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_the_page_shows_the_table_the_counts_and_every_problem(browser, tmp_path):
    browser.open(page(tmp_path, 8))
    text = browser.ask("document.body.innerText")
    for part in ("<b>base</b>", "<i>ours</i>", "8 problems", "strict accuracy", "75.0%", "37.5%", "95% interval"):
        assert part in text
    assert "strict, the same prompt: no difference that n = 8 could show (+37.5 points, p = 0.375)" in text
    counts = browser.ask("[...document.querySelectorAll('label')].map(label => label.innerText.trim())")
    assert counts[-5:] == ["all 8", "gained 4", "lost 1", "both 2", "neither 1"]
    browser.ask("lost = document.querySelectorAll('details')[6]; lost.open = true")
    lost = browser.ask("lost.innerText")
    for part in (
        "lost",
        "What is 6 & <b>3</b>?",
        "gold answer: 9",
        "baseline: right, in the format",
        "With 3 of them.",
    ):
        assert part in lost
    marks = browser.ask("[...lost.querySelectorAll('mark')].map(mark => [mark.innerText.trim(), mark.className])")
    assert marks == [["0", "wrong"], ["9", "right"], ["0", "wrong"]], "native, baseline, model"


def test_filters_show_what_was_gained_lost_by_both_or_neither(browser, tmp_path):
    browser.open(page(tmp_path, 16))
    click = "document.getElementById('{}').click()".format
    assert browser.shown() == list(range(16))
    by_kind = {"gained": [0, 1, 2, 3], "lost": [6], "both": [4, 5], "neither": [7]}
    for kind, of_eight in by_kind.items():
        browser.ask(click(kind))
        assert browser.shown() == [*of_eight, *(8 + i for i in of_eight)], kind
    browser.ask(click("lenient"))  # against the baseline with its native prompt
    native = {"gained": [2, 3, 5], "lost": [7], "both": [0, 1, 4], "neither": [6]}
    for kind, of_eight in native.items():
        browser.ask(click(kind))
        assert browser.shown() == [*of_eight, *(8 + i for i in of_eight)], kind
    browser.ask(click("all"))
    assert browser.shown() == list(range(16))


def test_a_hostile_completion_is_text(browser, tmp_path):
    path = page(tmp_path, 8, completion=lambda answer: f"{HOSTILE} {answer}")
    browser.open(path)
    assert browser.ask("document.title") == "outputs/Run against <b>base</b>"
    assert browser.ask("document.querySelectorAll('script, img, body style').length") == 0
    browser.ask("document.querySelectorAll('details')[0].open = true")
    text = browser.ask("document.querySelectorAll('details')[0].innerText")
    for part in ("<script>document.title", "onerror=", "\\u202e\\x1b[2J\\x00{{ 7 * 7 }} &lt; \\ud800"):
        assert part in text
    assert browser.shown() == list(range(8))


def test_the_page_loads_without_errors_and_refers_to_nothing_outside(browser, tmp_path):
    path = page(tmp_path, 1319, completion=lambda answer: "One more step of reasoning. " * 25 + formatted(answer))
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(]|https?:""", path.read_text(encoding="utf-8"))
    browser.open(path)
    requests = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in requests] == [path.as_uri()]
    complaints = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    assert not [event for event in browser.events if event.get("method") in complaints]
    assert len(browser.shown()) == 1319


def test_a_completion_that_hit_the_limit_is_called_truncated(tmp_path):
    heads = re.findall("<h3>(.*)</h3>", page(tmp_path, 8).read_text(encoding="utf-8"))
    assert len(heads) == 3 * 8
    assert [head for head in heads if "truncated" in head] == heads[-3:]
    assert heads[-2:] == ["baseline: wrong, 9 tokens, truncated", "model: wrong, 9 tokens, truncated"]


def test_an_earlier_comparison_is_set_aside(tmp_path, capsys):
    page(tmp_path, 8)
    page(tmp_path, 16)
    assert "the earlier comparison.html is kept as" in capsys.readouterr().out
    assert len(list(tmp_path.glob("comparison*.html"))) == 2


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        (GOOD, "4"),
        ("from 9, 5, and", "5"),
        ("<answer>18</answer> Note: 3 eggs.", "3"),
        ("<answer>20</answer> or 18", "18"),
        ("none", None),
    ],
)
def test_what_is_marked_is_what_was_scored(text, marked):
    span = side_by_side.answer_span(text, native=False)
    assert (span and text[slice(*span)].strip()) == marked


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no evaluation", r"^side_by_side.py: .*/evaluation\.json: no such file; evaluate.py writes it$"),
        ("no answers", r"evaluation\.jsonl: no such file"),
        ("half a file", r"cannot be read \(JSONDecodeError"),
        (
            "no comparison",
            r"no comparison with a baseline; run python evaluate.py outputs/Run --compare BASELINE first$",
        ),
        ("no baseline", r"base<--b>/evaluation-native\.json: no such file"),
        ("other problems", r"not comparable. problems: 8 there, 8 here, 7 of them the same; run evaluate.py with"),
        ("fewer problems", r"not comparable. problems: 7 there, 8 here, 7 of them the same; run evaluate.py with"),
        ("another evaluation", r"not the evaluation that was compared: another lenient accuracy, truncated rate; run"),
    ],
)
def test_what_cannot_be_shown_is_one_message(tmp_path, damage, message):
    compared(tmp_path, 8)
    own, base = tmp_path / "evaluation.json", tmp_path / "outputs" / "<b>base<--b>"
    native, report = base / "evaluation-native.json", json.loads(own.read_text())
    rows = native.with_suffix(".jsonl").read_text().splitlines()
    if damage == "no evaluation":
        own.unlink()
    elif damage == "no answers":
        own.with_suffix(".jsonl").unlink()
    elif damage == "half a file":
        own.write_text(own.read_text()[:100])
    elif damage == "no comparison":
        own.write_text(json.dumps({key: value for key, value in report.items() if key != "comparison"}))
    elif damage == "no baseline":
        shutil.rmtree(base)
    elif damage == "other problems":
        write_jsonl(native.with_suffix(".jsonl"), [rows[0].replace("What is 0", "What is 9"), *rows[1:]])
    elif damage == "fewer problems":
        write_jsonl(native.with_suffix(".jsonl"), rows[:7])
    else:
        again = json.loads(native.read_text()) | {"lenient_accuracy": 0.9, "truncated_rate": 0.9}
        native.write_text(json.dumps(again))
    with pytest.raises(SystemExit, match=message) as exit:
        made(tmp_path)
    assert "\n" not in exit.value.code
    assert not (tmp_path / "comparison.html").exists()


def test_a_cold_start_that_is_evaluated_gets_no_report_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"examples": 24, "use_peft": False}}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    assert write_report(tmp_path) is None
    assert not (tmp_path / "README.md").exists()

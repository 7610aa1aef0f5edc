"""The demo's world: sums whose gold answers are right, and a teacher who is not."""

import re

from conftest import settings, start

from support import demo
from support.problems import load_problems


def test_the_problems_are_right_and_those_held_out_are_never_taught(tmp_path):
    demo.write_problems(tmp_path)
    pairs = {}
    for split, count in (("train", 710), ("test", 200)):
        problems, _ = load_problems(str(tmp_path), None, split)
        assert len(problems) == count
        sums = [re.search(r"so (\d+) \+ (\d+) = (\d+)\.", problem["rationale"]).groups() for problem in problems]
        for problem, (a, b, total) in zip(problems, sums, strict=True):
            assert int(a) + int(b) == int(total) == int(problem["answer"])
            assert a in problem["question"]
        pairs[split] = {(int(a), int(b)) for a, b, _ in sums}
        assert 0.4 < sum(demo.has_carry(*pair) for pair in pairs[split]) / len(pairs[split]) < 0.6
    assert not pairs["train"] & pairs["test"]


def test_a_new_demo_takes_away_what_an_earlier_one_of_either_kind_left(tmp_path, monkeypatch):
    """Transformers would put an earlier demo's adapter onto the new policy."""
    monkeypatch.setattr(demo, "make_world", lambda *args: None)
    monkeypatch.setattr(demo, "_measure", lambda *args: None)
    kept = [tmp_path / name for name in ("taught-42", "problems", "checkpoint-mine")]
    for path in kept:
        path.mkdir()
    for name in ("run.json", "config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text('{"settings": {"demo": true}}')
    demo.prepare(settings("--demo", "--output_dir", tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted(kept)


BRIEFLY_TAUGHT = """
import sys
import train_grpo
from support import demo
demo.TEACHING_STEPS = 3
train_grpo.main(sys.argv[1:])
"""


def test_grpo_may_compute_in_bf16_after_a_teaching_in_fp32(tmp_path):
    """As on every GPU, from nothing, in one process."""
    words = ["--demo", "--bf16", "true", "--max_steps", 1, "--eval_steps", 0, "--output_dir", tmp_path / "demo"]
    done = start(BRIEFLY_TAUGHT, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "compute bfloat16" in done.stdout
    assert "step 1/1" in done.stdout


def test_the_teacher_forgets_six_carries_in_ten_and_formats_three_solutions_in_ten():
    lessons = demo.taught_by(seed=0)
    held_out = set(demo.split_pairs()[0])
    forgotten, with_carry, formatted = 0, 0, 0
    for lesson in lessons:
        text = lesson["completion"][0]["content"]
        a, b, total = map(int, re.search(r"so (\d+) \+ (\d+) = (\d+)\.", text).groups())
        assert (a, b) not in held_out
        assert total == a + b or (demo.has_carry(a, b) and total == a + b - 10)
        with_carry += demo.has_carry(a, b)
        forgotten += total != a + b
        formatted += "<answer>" in text
    assert 0.55 < forgotten / with_carry < 0.65
    assert 0.27 < formatted / len(lessons) < 0.33

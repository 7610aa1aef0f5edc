"""The demo's world: sums whose gold answers are right, and a teacher who is not."""

import re

import pytest
from conftest import load_problems

import demo


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


def test_problems_that_are_not_the_demos_stay_as_they_are(tmp_path):
    (tmp_path / "test.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="holds other problems"):
        demo.write_problems(tmp_path)
    assert (tmp_path / "test.jsonl").read_text() == "mine\n"

"""A picture is drawn of whatever a run has logged so far."""

import json
import shutil

import matplotlib.image
import pytest

from benchmarks.curves import main, overlay
from support import curves
from support.errors import BadInput


def drawn(path) -> bool:
    image = matplotlib.image.imread(path)
    return image.shape[1] > 1000 and image[..., :3].std() > 0.01


def test_a_run_leaves_a_picture_of_all_that_it_measured(trained):
    run, _ = trained
    assert drawn(run / "curves.png")
    log = curves.read_log(run)
    keys = {key for row in log for key in row}
    missing = [key for series in curves.PANELS.values() for key in series if key not in keys]
    assert missing == ["kl"], "every panel shows what this recipe logs; KL only with BETA above 0"


def test_by_hand_one_run_or_several_laid_over_each_other(trained, tmp_path):
    run, _ = trained
    shutil.copytree(run / "checkpoint-2", tmp_path / "unfinished" / "checkpoint-2")
    main([str(tmp_path / "unfinished")])
    assert drawn(tmp_path / "unfinished" / "curves.png"), "from the newest checkpoint's log"
    main([str(tmp_path / "unfinished"), str(run)])
    assert drawn(tmp_path / "unfinished" / "curves-compared.png")


def panels(log: list[dict]) -> dict:
    return {axes.get_title().partition(":")[0]: axes for axes in curves.figure("outputs/one", log).axes}


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


LOG = [
    {
        "step": step,
        "reward": 1.0,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 20,
        "completions/clipped_ratio": 0.1,
        **{key: curves.MOST[label] * step / 4 for key, label in curves.REWARDS.items()},
    }
    for step in range(1, 5)
]


def test_the_titles_say_what_people_look_for_and_rewards_share_one_scale():
    shown = panels(LOG)
    assert {"format first, then correctness", "length", "signal"} <= shown.keys()
    assert labels(shown["signal"]) == ["no signal", "completions truncated"]
    axes = shown["format first, then correctness"]
    assert labels(axes) == ["correctness", "int", "strict format", "soft format", "xmlcount"]
    assert {line.get_ydata()[-1] for line in axes.lines} == {1.0}, "each as a share of what it pays"


def test_rewards_of_a_users_own_are_drawn_as_they_are_paid_beside_the_total():
    own = {"rewards/brevity/mean": -40.0, "rewards/costs_$5/mean": 7.0, "rewards/never/mean": None}
    log = [{**row, **own, "rewards/brevity/std": 1.0} for row in LOG]
    axes = panels(log)["reward"]
    assert labels(axes) == ["reward", "brevity", r"costs_\$5"]
    assert {-40.0, 7.0} <= {line.get_ydata()[-1] for line in axes.lines}
    assert axes.get_ylim()[0] <= -40
    many = {f"rewards/own_{i}/mean": float(i) for i in range(20)}
    assert len(labels(panels([row | many for row in LOG])["reward"])) == 21
    assert labels(panels(LOG)["format first, then correctness"]) == labels(
        panels(log)["format first, then correctness"]
    )
    assert labels(overlay({"one": log, "other": LOG}).axes[0]) == ["reward", "brevity", r"costs_\$5"]


def test_the_name_of_a_run_is_no_formula():
    picture = curves.figure("outputs/$two$\x1b", LOG)
    (title,) = [text for text in picture.texts if "two" in text.get_text()]
    assert title.get_text() == r"outputs/$two$\x1b"
    assert not title.get_parse_math()


def test_a_reward_that_pays_more_stays_in_the_picture():
    picture = curves.figure("mine", [{"step": step, "reward": 2.0 * step} for step in range(1, 5)])
    low, high = picture.axes[0].get_ylim()
    assert low <= 0
    assert high >= 8


def test_of_several_runs_a_colour_is_a_run_and_dashes_are_a_curve():
    picture = overlay({"outputs/one": LOG, "outputs/$two$": LOG})
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["outputs/one", r"outputs/\$two\$"]
    axes = picture.axes[1]
    assert labels(axes) == ["correctness", "strict format"], "not five curves for each run"
    bold = [line for line in axes.lines if line.get_linewidth() == 2]
    assert len(bold) == 4
    assert len({line.get_color() for line in bold}) == 2
    assert len({line.get_linestyle() for line in bold}) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"log_history": '])
def test_a_damaged_log_is_one_message(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(BadInput, match="no trainer's log"):
        curves.read_log(tmp_path)


def test_a_folder_that_is_no_run_is_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"is it a run's folder\?"):
        main([str(tmp_path)])


def smooth(values: list[float]) -> list[float]:
    """The bold line of a panel."""
    log = [{"step": step, "grad_norm": value} for step, value in enumerate(values)]
    (line,) = [line for line in panels(log)["gradient norm before clipping"].lines if line.get_linewidth() == 2]
    return line.get_ydata().tolist()


def test_smoothing_is_a_running_mean_and_leaves_a_short_run_alone():
    assert smooth([1.0, 2.0, 6.0]) == [1.0, 2.0, 6.0]
    ramp = [float(i) for i in range(60)]  # a window of 3
    assert smooth(ramp)[:4] == [0.0, 0.5, 1.0, 2.0]
    assert len(smooth(ramp)) == 60


def test_an_empty_log_draws_empty_panels(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    main([str(tmp_path)])
    assert drawn(tmp_path / "curves.png")

"""A picture is drawn of whatever a run has logged so far."""

import json
import shutil

import matplotlib.image
import pytest
from conftest import start

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
    missing = [key for _, series in curves.PANELS for key, _ in series if key not in keys]
    assert missing == ["kl"], "every panel shows what this recipe logs; KL only with BETA above 0"


def test_by_hand_one_run_or_several_laid_over_each_other(trained, tmp_path):
    run, _ = trained
    shutil.copytree(run / "checkpoint-2", tmp_path / "cut short" / "checkpoint-2")
    done = start("-m support.curves", tmp_path / "cut short")
    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path / "cut short" / "curves.png"), "from the newest checkpoint's log"
    done = start("-m support.curves", tmp_path / "cut short", run)
    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path / "cut short" / "curves-compared.png")


@pytest.mark.parametrize("text", ["", "{}", '{"log_history": '])
def test_a_damaged_log_is_one_message(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(BadInput, match="no trainer's log"):
        curves.read_log(tmp_path)


def test_a_folder_that_is_no_run_is_one_message(tmp_path):
    done = start("-m support.curves", tmp_path)
    assert done.returncode == 1
    assert "is it a run's folder?" in done.stderr
    assert "Traceback" not in done.stderr


def test_smoothing_is_a_running_mean_and_leaves_a_short_run_alone():
    assert curves.smooth([1.0, 2.0, 6.0]) == [1.0, 2.0, 6.0]
    ramp = [float(i) for i in range(60)]  # a window of 3
    assert curves.smooth(ramp)[:4] == [0.0, 0.5, 1.0, 2.0]
    assert len(curves.smooth(ramp)) == 60


def test_an_empty_log_draws_empty_panels(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    curves.main([str(tmp_path)])
    assert drawn(tmp_path / "curves.png")

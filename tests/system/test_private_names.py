"""Another version of TRL or Transformers, without a private name that is used: said, and what needs it is off."""

import json

import pytest
import trl
from conftest import ended, flags

import train_grpo
from support import trainer
from support.errors import BadInput
from support.trainer import PRIVATE, WHOLE, missing_for


def without(monkeypatch, *names: str) -> None:
    """As if the installed version called these otherwise."""
    changed = [(owner, f"{name}_of_old" if name in names else name, *more) for owner, name, *more in PRIVATE]
    monkeypatch.setattr(trainer, "PRIVATE", tuple(changed))


def test_with_the_tested_versions_nothing_is_said(capsys):
    assert missing_for(trl.GRPOTrainer) == missing_for(trl.SFTTrainer) == set()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("owner", "name", "takes", "serves"), PRIVATE, ids=[each[1] for each in PRIVATE])
def test_a_name_that_is_gone_is_named_and_switches_off_or_refuses(owner, name, takes, serves, monkeypatch, capsys):
    without(monkeypatch, name)
    line = f"{owner.partition(':')[2]}.{name}_of_old is not there, or takes something else"
    if serves == WHOLE:
        with pytest.raises(BadInput, match=r"install what requirements\.txt names") as error:
            missing_for(trl.GRPOTrainer)
        assert line in str(error.value)
    else:
        assert missing_for(trl.GRPOTrainer) == {serves}
        assert f"{line}, so that this is off: {serves}" in capsys.readouterr().out


def test_a_method_that_takes_something_else_is_gone(monkeypatch):
    def with_one_more(self, prompts, prompt_ids, images, multimodal_fields, num_generations):
        raise NotImplementedError

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", with_one_more)
    assert missing_for(trl.GRPOTrainer) == {trainer.COPIES}


def test_a_run_without_them_trains_as_trl_does_and_run_json_says_so(policy, data, tmp_path, monkeypatch, capsys):
    without(monkeypatch, *(name for _, name, _, serves in PRIVATE if serves != WHOLE))
    train_grpo.main(flags(policy, data, tmp_path / "run", max_steps=2, sample_every=1))
    out = capsys.readouterr().out
    assert "update     as TRL computes it" in out
    assert "---- sample" not in out
    assert "step 2/2" in out
    off = json.loads((tmp_path / "run" / "run.json").read_text())["off"]
    assert {trainer.LEAN, trainer.SAMPLES, trainer.COPIES} <= set(off)


def test_a_run_that_could_not_save_is_refused(policy, data, tmp_path, monkeypatch, capsys):
    without(monkeypatch, "_save_checkpoint")
    _, error = ended(capsys, 1, flags(policy, data, tmp_path / "run"))
    assert "Trainer._save_checkpoint_of_old is not there, or takes something else" in error
    assert not (tmp_path / "run").exists()

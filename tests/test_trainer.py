"""The lean step's gradient is TRL's: one step of each from the same weights and completions, in fp64."""

import functools
import json
import shutil

import pytest
import torch
from conftest import flags, identical, refused, settings, weights

import rewards
import train_grpo
from support.problems import load_tokenizer
from support.progress import plan

# lengths of the 16 completions of a step, which is 2 prompts x 8 in 4 passes of 4
MIXED = [5, 1, 12, 3, 7, 7, 2, 9, 4, 11, 6, 1, 8, 10, 3, 5]
STEP = {
    "num_generations": "8",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "4",
    "max_steps": "1",
    "eval_steps": "0",
    "max_grad_norm": "0",
    "save_strategy": "no",
    "report_to": "none",
    "log_completions": "false",
    "sample_every": "0",
}
TWO_LIVE_GROUPS = [float(i % 3) for i in range(16)]
ONE_SILENT_GROUP = [1.0] * 8 + [float(i % 2) for i in range(8)]
ALL_SILENT = [1.0] * 16


def train(policy, data, output, lean: bool, lengths=MIXED, paid=TWO_LIVE_GROUPS, before=None, **changes):
    """One run; its trainer, and the gradient of every optimizer step by parameter.

    Args:
        lengths: tokens of each completion, which are made up here.
        paid: the reward of each.
        before: a change to the trainer before it trains.
    """
    from transformers import TrainerCallback

    run = settings(*flags(policy, data, output, **{**STEP, **changes}, lean_step=str(lean).lower()))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    generator = torch.Generator().manual_seed(1)

    def generate(prompt_ids, *args, **kwargs):
        # what is paid has words of its own, so that the gradient is no mere remainder of sums that cancel
        ids = [
            torch.randint(20 if reward > 0.5 else 60, 60 if reward > 0.5 else 100, (n,), generator=generator).tolist()
            for n, reward in zip(lengths, paid, strict=False)
        ]
        return ids[: len(prompt_ids)], None

    def reward(completions, **kwargs):
        return paid[: len(completions)]

    class Gradients(TrainerCallback):
        def __init__(self):
            self.found = []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            self.found.append({name: grad.clone() for name, grad in named})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "REWARD_FUNCS", [reward])
        trainer = train_grpo.build_trainer(run, tokenizer, samples, [], run.model_name_or_path)
    trainer._generate_single_turn = generate
    for model in filter(None, (trainer.model, trainer.ref_model)):
        in_float64(model)
    gradients = Gradients()
    trainer.add_callback(gradients)
    if before:
        before(trainer)
    trainer.train()
    return trainer, gradients.found


def in_float64(model):
    """Two orders of the same sums round differently in fp32, on each processor in its own way; here hardly at all."""
    for module in model.double().modules():
        if "RMSNorm" in type(module).__name__:  # it computes in fp32 whatever its weights are
            module.forward = functools.partial(
                torch.nn.functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )


def apart(first: list[dict], second: list[dict]) -> float:
    """The largest difference of two runs' gradients, as a share of the largest gradient; of the worst step."""
    assert len(first) == len(second) > 0
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        difference = max((one[name] - other[name]).abs().max().item() for name in one)
        worst = max(worst, difference / max(1e-30, *(grad.abs().max().item() for grad in other.values())))
    return worst


def both(policy, data, tmp_path, **changes) -> tuple:
    ours, mine = train(policy, data, tmp_path / "lean", lean=True, **changes)
    theirs, other = train(policy, data, tmp_path / "trl", lean=False, **changes)
    return ours, mine, theirs, other


CASES = {
    "groups that all teach": {},
    "one silent group": {"paid": ONE_SILENT_GROUP},
    "lengths far apart": {"lengths": [1] * 8 + [60, 2, 3, 40, 5, 6, 50, 8], "max_completion_length": "60"},
    "every completion of one token": {"lengths": [1] * 16},
    "one long completion, silent": {
        "lengths": [60] + [15] * 15,
        "paid": ONE_SILENT_GROUP,
        "max_completion_length": "60",
    },
    "LoRA": {"use_peft": "true", "lora_r": "4", "paid": ONE_SILENT_GROUP},
    "two generations a step": {"steps_per_generation": "2"},
    "KL to a reference model": {"beta": "0.1", "paid": ONE_SILENT_GROUP},
    "an entropy bonus": {"entropy_coef": "0.1", "paid": ONE_SILENT_GROUP},
    "the most uncertain tokens alone": {"top_entropy_quantile": "0.3", "paid": ONE_SILENT_GROUP},
    "a mean over completions": {"loss_type": "grpo", "paid": ONE_SILENT_GROUP},
    "a mean over a pass' tokens": {"loss_type": "bnpo", "paid": ONE_SILENT_GROUP},
    "a constant length": {"loss_type": "dr_grpo", "paid": ONE_SILENT_GROUP},
    "a sum of clipped ratios": {"loss_type": "cispo", "epsilon_high": "5", "paid": ONE_SILENT_GROUP},
    "several steps a generation": {
        "learning_rate": "1e-12",  # AdamW makes a step of what rounds differently, and the next gradient another
        "steps_per_generation": "8",
        "max_steps": "2",
        "paid": TWO_LIVE_GROUPS + ALL_SILENT,
        "lengths": MIXED + MIXED[::-1],
    },
    "a generation used twice": {
        "learning_rate": "1e-12",
        "num_iterations": "2",
        "max_steps": "2",
        "paid": ONE_SILENT_GROUP,
    },
    "widths in multiples": {"pad_to_multiple_of": "8", "paid": ONE_SILENT_GROUP},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_trls(case, policy, data, tmp_path):
    ours, mine, theirs, other = both(policy, data, tmp_path, **CASES[case])
    distance = apart(mine, other)
    print(f"{case}: {distance:.1e} of the largest gradient")
    # what is left is TRL's head, which keeps log-probabilities and its weights' gradient in fp32 whatever the policy is
    # in; where one generation serves several steps, a ratio of two such log-probabilities rounds most
    assert distance <= (4e-6 if case == "several steps a generation" else 1e-6)
    assert max(grad.abs().max().item() for grad in other[0].values()) > 0
    assert computed(ours) < 1
    assert "computed_tokens" not in theirs.state.log_history[0]


def computed(trainer) -> float:
    return trainer.state.log_history[0]["computed_tokens"]


def test_a_step_in_which_no_group_teaches_moves_the_weights_as_before(policy, data, tmp_path):
    """The gradient is zero, not missing: AdamW's moments fade and weight decay goes on."""
    more = {"paid": ALL_SILENT, "weight_decay": "0.5", "learning_rate": "1e-2", "warmup_steps": "0"}
    ours, mine, theirs, other = both(policy, data, tmp_path, **more)
    assert mine[0].keys() == other[0].keys()
    assert all((grad == 0).all() for grad in mine[0].values())
    assert identical(ours.model.state_dict(), theirs.model.state_dict())
    assert not identical(ours.model.state_dict(), weights(policy)), "weight decay"
    assert computed(ours) < 0.3, "a row a pass is left, so that every process makes the same number of passes"


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_vllms_correction_is_cut_and_sorted_with_its_completions(mode, policy, data, tmp_path):
    """Log-probabilities near the policy's own, as vLLM returns them; TRL computes them again, here trimmed as well."""

    def as_if_vllm(trainer):
        generate, generator = trainer._generate_single_turn, torch.Generator().manual_seed(2)

        def generate_with_logps(prompt_ids, *args, **kwargs):
            completion_ids, _ = generate(prompt_ids)
            sampled = []
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
                with torch.no_grad():
                    logits = trainer.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
                logps = (
                    (logits / trainer.temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
                )
                sampled.append((logps + 0.1 * torch.randn(len(completion), generator=generator)).tolist())
            return completion_ids, sampled

        trainer.use_vllm = True  # not in the settings: an engine would be started
        trainer._generate_single_turn = generate_with_logps

    more = {"vllm_importance_sampling_mode": mode, "before": as_if_vllm}
    ours, mine, theirs, other = both(policy, data, tmp_path, **more)
    assert apart(mine, other) <= 1e-6
    for trainer in (ours, theirs):
        assert trainer.state.log_history[0]["sampling/importance_sampling_ratio/max"] > 0
    for key, value in theirs.state.log_history[0].items():
        if key.startswith("sampling/"):
            assert ours.state.log_history[0][key] == pytest.approx(value, rel=1e-4), key
    _, plain, _, _ = both(policy, data, tmp_path / "plain")
    assert apart(mine, plain) > 1e-3, "the correction is there"


def test_a_ratio_of_vllms_correction_weighs_the_same_tokens(policy, data, tmp_path):
    def given(trainer):
        score, generator = trainer._generate_and_score_completions, torch.Generator().manual_seed(2)

        def score_with_ratio(inputs):
            trainer.use_vllm = False
            scored = score(inputs)
            trainer.use_vllm = True  # for the loss: it takes the ratio into account then
            ratio = torch.rand(scored["completion_mask"].shape, generator=generator)
            return {**scored, "importance_sampling_ratio": ratio}

        trainer._generate_and_score_completions = score_with_ratio

    _, mine, _, other = both(policy, data, tmp_path, before=given)
    assert apart(mine, other) <= 1e-6
    _, plain, _, _ = both(policy, data, tmp_path / "plain")
    assert apart(mine, plain) > 1e-3, "the ratio is there"


TRIMS, ORDERS = "each pass at its own width", "sorted by length"
DROPS, SHARES = "without completions of advantage 0", "a prompt once a pass"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, f"{TRIMS}, {ORDERS}, {DROPS}, {SHARES}"),
        ({"beta": "0.1"}, f"{TRIMS}, {ORDERS}, {SHARES}"),
        ({"entropy_coef": "0.1"}, f"{TRIMS}, {SHARES}"),
        ({"loss_type": "grpo"}, f"{TRIMS}, {SHARES}"),
        ({"steps_per_generation": "8"}, f"{TRIMS}, {DROPS}, {SHARES}"),
        ({"num_iterations": "2"}, f"{TRIMS}, {DROPS}, {SHARES}"),
        ({"gradient_checkpointing": "true"}, f"{TRIMS}, {ORDERS}, {DROPS}"),
        ({"lean_step": "false"}, "as TRL computes it"),
    ],
)
def test_the_plan_says_what_is_left_out(changes, words, policy, data, tmp_path):
    run = settings(*flags(policy, data, tmp_path / "run", **{**STEP, **changes}))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    trainer = train_grpo.build_trainer(run, tokenizer, samples, [], run.model_name_or_path)
    assert trainer.update_in_words() == words
    (line,) = [line for line in plan(trainer, run, 1, 0).splitlines() if line.startswith("  update ")]
    assert line.endswith(words)


def test_a_policy_with_another_kind_of_attention_computes_each_prompt(policy, data, tmp_path):
    """A sliding window keeps other keys than those of a whole prompt."""
    sliding = shutil.copytree(policy, tmp_path / "policy")
    config = json.loads((sliding / "config.json").read_text())
    kinds = ["full_attention"] * (config["num_hidden_layers"] - 1) + ["sliding_attention"]
    changes = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    (sliding / "config.json").write_text(json.dumps({**config, **changes}))
    ours, mine, _, other = both(sliding, data, tmp_path, paid=ONE_SILENT_GROUP)
    assert ours.update_in_words() == f"{TRIMS}, {ORDERS}, {DROPS}"
    assert apart(mine, other) <= 1e-6


def test_what_is_logged_is_that_of_all_completions(policy, data, tmp_path):
    """Rewards, lengths and the share without signal do not know what was left out."""
    ours, _, theirs, _ = both(policy, data, tmp_path, paid=ONE_SILENT_GROUP)
    mine, other = ours.state.log_history[0], theirs.state.log_history[0]
    for key in ("reward", "reward_std", "frac_reward_zero_std"):
        assert mine[key] == other[key], key
    for key in other:
        if key.startswith(("completions/", "rewards/")):
            assert mine[key] == other[key], key
    assert mine["frac_reward_zero_std"] == 0.5


def test_a_run_from_before_there_was_a_lean_step_is_not_taken_for_one_with_it(trained, policy, data, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-4"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    del run["settings"]["lean_step"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    words = [*flags(policy, data, tmp_path / "run"), "--resume_from_checkpoint", "auto"]
    assert "lean_step: False -> True" in refused(capsys, 2, words)
    train_grpo.main([*words, "--lean_step", "false"])
    assert "as TRL computes it" in capsys.readouterr().out

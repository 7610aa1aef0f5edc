"""The lean step's gradient is TRL's: one step of each from the same weights and completions, in fp64."""

import functools
import json
import shutil
from contextlib import ExitStack

import pytest
import torch
from conftest import flags, identical, refused, settings, tiny, weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import rewards
import train_grpo
from support.lean_step import into_passes
from support.problems import load_tokenizer
from support.progress import plan
from support.record import Run

# lengths of the 16 completions of a step, which is 2 prompts x 8, in passes of some 3 rows
MIXED = [5, 1, 12, 3, 7, 7, 2, 9, 4, 11, 6, 1, 8, 10, 3, 5]
STEP = {
    "num_generations": "8",
    "per_device_train_batch_size": "16",
    "gradient_accumulation_steps": "1",
    "tokens_per_pass": "600",
    "max_steps": "1",
    "eval_steps": "0",
    "max_grad_norm": "0",
    "save_strategy": "no",
    "report_to": "none",
    "log_completions": "false",
    "sample_every": "0",
}
TWO_LIVE_GROUPS = [float(i % 3) for i in range(16)]
ONE_GROUP_TEACHES = [1.0] * 8 + [float(i % 2) for i in range(8)]
NOTHING_TEACHES = [1.0] * 16


def train(policy, data, output, lean: bool, lengths=MIXED, paid=TWO_LIVE_GROUPS, before=None, **changes):
    """One run; its trainer, in which `passes` counts the policy's forward passes, and the gradient of every optimizer
    step by parameter.

    Args:
        lengths: tokens of each completion, which are made up here.
        paid: the reward of each.
        before: a change to the trainer before it trains.
    """
    changes = {**STEP, **changes, **({} if lean else {"lean_step": "false", "tokens_per_pass": None})}
    run = settings(*flags(policy, data, output, **changes))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    generator = torch.Generator().manual_seed(1)

    def generate(prompt_ids, *args, **kwargs):
        # what is paid has words of its own, so that the gradient is no mere remainder of sums that cancel
        ids = [
            torch.randint(20 if reward > 0.5 else 60, 60 if reward > 0.5 else 100, (n,), generator=generator).tolist()
            for n, reward in zip(lengths, paid, strict=False)
        ]
        for row in ids[::2]:
            row[-1] = tokenizer.eos_token_id
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
        trainer = train_grpo.build_trainer(run, tokenizer, samples, [], Run(run))
    trainer._generate_single_turn = generate
    for model in filter(None, (trainer.model, trainer.ref_model)):
        in_float64(model)
    gradients, trainer.passes = Gradients(), 0

    def count(*args):
        trainer.passes += 1

    trainer.model.register_forward_hook(count)
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


IN_FOURS = {  # where a step cannot be split, TRL's own way to several passes
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "4",
    "tokens_per_pass": None,
}
CASES = {
    "groups that all teach": {},
    "one zero-advantage group": {"paid": ONE_GROUP_TEACHES},
    "one pass": {"tokens_per_pass": "100000", "paid": ONE_GROUP_TEACHES},
    "rows that are longer than a pass": {"tokens_per_pass": "1"},
    "two backward passes of TRL's a step": {
        "per_device_train_batch_size": "8",
        "gradient_accumulation_steps": "2",
        "paid": ONE_GROUP_TEACHES,
    },
    "lengths far apart": {"lengths": [1] * 8 + [60, 2, 3, 40, 5, 6, 50, 8], "max_completion_length": "60"},
    "every completion of one token": {"lengths": [1] * 16},
    "one long completion of advantage 0": {
        "lengths": [60] + [15] * 15,
        "paid": ONE_GROUP_TEACHES,
        "max_completion_length": "60",
    },
    "LoRA": {"use_peft": "true", "lora_r": "4", "paid": ONE_GROUP_TEACHES},
    "two generations a step": {
        "per_device_train_batch_size": "8",
        "gradient_accumulation_steps": "2",
        "steps_per_generation": "1",
        "tokens_per_pass": "200",
    },
    "KL to a reference model": {"beta": "0.1", "paid": ONE_GROUP_TEACHES},
    "an entropy bonus": {**IN_FOURS, "entropy_coef": "0.1", "paid": ONE_GROUP_TEACHES},
    "the most uncertain tokens alone": {**IN_FOURS, "top_entropy_quantile": "0.3", "paid": ONE_GROUP_TEACHES},
    "a mean over completions": {"loss_type": "grpo", "paid": ONE_GROUP_TEACHES},
    "a mean over a pass' tokens": {"loss_type": "bnpo", "paid": ONE_GROUP_TEACHES},
    "a constant length": {"loss_type": "dr_grpo", "paid": ONE_GROUP_TEACHES},
    "a sum of clipped ratios": {"loss_type": "cispo", "epsilon_high": "5", "paid": ONE_GROUP_TEACHES},
    "a soft gate in place of the clip": {"loss_type": "sapo", "paid": ONE_GROUP_TEACHES},
    "a sum of each completion's tokens": {"loss_type": "luspo", "paid": ONE_GROUP_TEACHES},
    "a weight of each completion": {"loss_type": "vespo", "paid": ONE_GROUP_TEACHES},
    "without truncated completions": {"mask_truncated_completions": "true", "paid": ONE_GROUP_TEACHES},
    "a mean over the tokens of those": {"mask_truncated_completions": "true", "loss_type": "bnpo"},
    "a ratio of whole completions": {"importance_sampling_level": "sequence", "paid": ONE_GROUP_TEACHES},
    "a mask of what is off-policy": {"off_policy_mask_threshold": "0.5", "paid": ONE_GROUP_TEACHES},
    "KL and a mean over completions": {"loss_type": "grpo", "beta": "0.1", "paid": ONE_GROUP_TEACHES},
    "several steps a generation": {
        "learning_rate": "1e-12",  # AdamW makes a step of what rounds differently, and the next gradient another
        "steps_per_generation": "2",
        "max_steps": "2",
        "paid": TWO_LIVE_GROUPS + NOTHING_TEACHES,
        "lengths": MIXED + MIXED[::-1],
    },
    "a generation used twice": {
        "learning_rate": "1e-12",
        "num_iterations": "2",
        "max_steps": "2",
        "paid": ONE_GROUP_TEACHES,
    },
    "widths in multiples": {"pad_to_multiple_of": "8", "paid": ONE_GROUP_TEACHES},
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
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], abs=1e-6)
    assert "computed_tokens" not in theirs.state.log_history[0]


@pytest.mark.parametrize(
    ("changes", "passes", "reason"),
    [
        ({"tokens_per_pass": "100000"}, 1, "all fit"),
        ({"tokens_per_pass": "1"}, 14, "a row is never split; two are paid just the mean of their group"),
        ({"tokens_per_pass": "1", "paid": ONE_GROUP_TEACHES}, 8, "those without an advantage are left out"),
        ({"tokens_per_pass": "100000", "paid": NOTHING_TEACHES}, 1, "the optimizer makes its step"),
        (IN_FOURS, 4, "where more backward passes are asked for, each is one"),
        ({"entropy_coef": "0.1", "tokens_per_pass": None}, 1, "an entropy bonus cannot be split"),
    ],
)
def test_a_step_takes_as_few_passes_as_fit(changes, passes, reason, policy, data, tmp_path):
    more = {"tokens_per_pass": "100000", **changes}
    ours, _ = train(policy, data, tmp_path / "run", lean=True, **more)
    assert ours.passes == passes, reason


def computed(trainer) -> float:
    return trainer.state.log_history[0]["computed_tokens"]


@pytest.mark.parametrize(
    ("of_processes", "limit", "passes", "reason"),
    [
        ([[(9, 1, 1), (9, 1, 1), (9, 1, 1)]], 30, [[[0, 1, 2]]], "just as many tokens as may be"),
        ([[(9, 1, 1), (9, 1, 1), (9, 1, 1)]], 29, [[[0, 1]], [[2]]], "one token too many"),
        ([[(9, 1, 1), (1, 9, 1), (5, 5, 1)]], 27, [[[0]], [[2]], [[1]]], "a pass is as wide as its longest parts"),
        ([[(9, 50, 1), (9, 1, 1)]], 20, [[[1]], [[0]]], "longer than a pass: one of its own"),
        ([[(9, 3, 1), (9, 2, 0), (9, 1, 1)]], 99, [[[2, 0]]], "without an advantage: left out"),
        ([[(9, 3, 0), (9, 2, 0)]], 99, [[[1]]], "none has one: the shortest is left"),
        (
            [[(9, 3, 1), (9, 2, 0), (9, 1, 1)], [(9, 9, 0), (9, 5, 1), (9, 6, 0)]],
            99,
            [[[2, 0], [1, 2]]],
            "the second process fills up, with the shortest",
        ),
        (
            [[(9, 1, 1), (9, 1, 1), (9, 1, 1)], [(9, 1, 1), (9, 1, 1), (9, 30, 1)]],
            40,
            [[[0, 1], [0, 1]], [[2], [2]]],
            "alone, the first process would make one pass of 30 tokens",
        ),
    ],
)
def test_rows_are_split_into_passes(of_processes, limit, passes, reason):
    assert into_passes(of_processes, limit) == passes, reason


def test_a_step_in_which_no_group_teaches_moves_the_weights_as_before(policy, data, tmp_path):
    """The gradient is zero, not missing: AdamW's moments fade and weight decay goes on."""
    more = {"paid": NOTHING_TEACHES, "weight_decay": "0.5", "learning_rate": "1e-2", "warmup_steps": "0"}
    ours, mine, theirs, other = both(policy, data, tmp_path, **more)
    assert mine[0].keys() == other[0].keys()
    assert all((grad == 0).all() for grad in mine[0].values())
    assert identical(ours.model.state_dict(), theirs.model.state_dict())
    assert not identical(ours.model.state_dict(), weights(policy)), "weight decay"
    assert computed(ours) < 0.1, "a row is left, so that there is a gradient"


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_vllms_correction_is_narrowed_and_sorted_with_its_completions(mode, policy, data, tmp_path):
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


SPLITS, TRIMS = "passes of at most 600 tokens, sorted by length", "each at its own width"
DROPS = "without completions of advantage 0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, f"{SPLITS}, {TRIMS}, {DROPS}"),
        ({"tokens_per_pass": None}, f"{SPLITS.replace('600', '4,096')}, {TRIMS}, {DROPS}"),
        ({"beta": "0.1"}, f"{SPLITS}, {TRIMS}"),
        ({"entropy_coef": "0.1", "tokens_per_pass": None}, TRIMS),
        ({"loss_type": "grpo"}, f"{SPLITS}, {TRIMS}, {DROPS}"),
        ({"lean_step": "false", "tokens_per_pass": None}, "as TRL computes it"),
    ],
)
def test_the_plan_says_what_is_left_out(changes, words, policy, data, tmp_path):
    run = settings(*flags(policy, data, tmp_path / "run", **{**STEP, **changes}))
    tokenizer = load_tokenizer(str(policy))
    samples, _ = train_grpo.load_samples(run, tokenizer)
    trainer = train_grpo.build_trainer(run, tokenizer, samples, [], Run(run))
    (line,) = [line for line in plan(trainer, run, 1, 0).splitlines() if line.startswith("  update ")]
    assert line == f"  update     {words}"


class Calls(TorchDispatchMode):
    """Counts ATen calls, of which each but a view is a kernel that a GPU has to be told to launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_step_makes_a_third_of_the_calls_of_trls_four_passes(data, tmp_path):
    """A small policy's update is bound by launches. 64 completions, all with an advantage; 30 layers."""
    folder = tmp_path / "deep"
    for part in tiny(data, initializer_range=0.1, layers=30):
        part.save_pretrained(folder)

    def calls(name, lean, **changes) -> int:
        counted, here = Calls(), ExitStack()

        def watch(trainer):
            generate = trainer._generate_single_turn

            def generate_then_count(*args, **kwargs):
                generated = generate(*args, **kwargs)
                here.enter_context(counted)
                return generated

            class Update(TrainerCallback):
                def on_pre_optimizer_step(self, *args, **kwargs):
                    here.close()

            trainer._generate_single_turn = generate_then_count
            trainer.add_callback(Update())

        lengths, paid = MIXED * 4, [float(i % 2) for i in range(64)]
        step = {"num_generations": "16", "per_device_train_batch_size": "64", "tokens_per_pass": "100000", **changes}
        train(folder, data, tmp_path / name, lean, lengths, paid, watch, **step)
        return counted.count

    ours, one_pass = calls("lean", lean=True), calls("one pass", lean=False)
    four_passes = calls("four passes", lean=False, per_device_train_batch_size="16", gradient_accumulation_steps="4")
    print(f"{ours:,} calls, TRL in one pass {one_pass:,}, in four {four_passes:,}")
    assert ours <= 0.35 * four_passes
    assert ours <= 1.05 * one_pass


def test_what_is_logged_is_that_of_all_completions(policy, data, tmp_path):
    """Rewards, lengths and the share without signal do not know what was left out."""
    ours, _, theirs, _ = both(policy, data, tmp_path, paid=ONE_GROUP_TEACHES)
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

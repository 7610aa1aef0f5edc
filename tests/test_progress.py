"""What is printed says how the run goes, and warns where it goes wrong."""

from types import SimpleNamespace

import pytest
import torch

from rewards import REWARD_FUNCS
from support import progress
from support.progress import Progress, closing_remark, step_line


@pytest.mark.parametrize(
    ("obstacle", "device", "words"),
    [
        ("vLLM is not installed", "cuda", "vLLM is not installed; without it generation takes about six times as long"),
        ("there is no CUDA GPU", "cpu", "Transformers (there is no CUDA GPU)"),
        (None, "cuda", "Transformers (USE_VLLM is False)"),
    ],
)
def test_the_plan_says_what_a_gpu_loses_without_vllm(obstacle, device, words):
    args = SimpleNamespace(use_vllm=False, load_in_4bit=False, device=torch.device(device))
    assert words in progress.render("backend.txt", args=args, obstacle=obstacle)


def log_of(rewards: list[float], lenient: dict[int, float], n: int = 200) -> list[dict]:
    log = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, start=1)]
    return log + [{"step": step, "eval_lenient_accuracy": value, "eval_n": n} for step, value in lenient.items()]


RISING = [0.1 * step for step in range(40)]


@pytest.mark.parametrize(
    ("log", "warns", "reason"),
    [
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.4}), True, "reward up, accuracy far down"),
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.57}), False, "within the interval of 200 problems"),
        (log_of(RISING, {0: 0.5, 30: 0.6, 40: 0.57}, n=20000), True, "but not of 20,000"),
        (log_of(RISING, {0: 0.2, 30: 0.5, 40: 0.7}), False, "both up"),
        (log_of(RISING[::-1], {0: 0.5, 30: 0.6, 40: 0.4}), False, "both down: no hacking, just worse"),
        (log_of(RISING, {0: 0.6, 20: 0.6, 40: 0.4}), True, "measured before the last quarter only"),
        (log_of(RISING, {}), False, "never measured"),
        (log_of(RISING[:3], {0: 0.6, 3: 0.1}), False, "three steps are no quarter"),
    ],
)
def test_reward_up_and_accuracy_down_is_called_out(log, warns, reason):
    assert (closing_remark(log) is not None) == warns, reason


LARGE = {"completions/mean_length": 8191.6, "step_time": 12345.6, "reward": 10.25, "reward_std": 10.25}


@pytest.mark.parametrize(
    ("steps", "changes", "reason"),
    [
        (1868, {}, "the default run"),
        (1868, {"rewards/correctness_reward_func/mean": 1.75}, "mostly right"),
        (1868, {"grad_norm": 1.2345e-05, "entropy": 1.2345e-05}, "very small"),
        (1868, {"grad_norm": 1234.5, "entropy": 11.2}, "a gradient that blows up"),
        (1868, {"kl": 1.2345e-05}, "a reference model"),
        (100_000, LARGE, "a long run, with long completions and other rewards"),
    ],
)
def test_a_steps_line_is_at_most_160_characters_wide(steps, changes, reason):
    rewards = {f"rewards/{function.__name__}/mean": 0.475 for function in REWARD_FUNCS}
    shares = {"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 1.0, "computed_tokens": 1.0}
    numbers = {"reward": 3.8125, "reward_std": 0.8391, "completions/mean_length": 511.6, "step_time": 123.4}
    small = {"entropy": 0.012345, "grad_norm": 0.012345, "learning_rate": 4.9876e-06}
    logs = {**rewards, **shares, **numbers, **small, **changes}
    line = step_line(steps, steps, logs)
    assert len(line) <= progress.WIDTH == 160, f"{reason}: {len(line)}, {line}"
    assert f" {logs['reward']:.2f} " in line


def test_an_ordinary_steps_line_has_room_for_the_gradient():
    rewards = {f"rewards/{function.__name__}/mean": 0.475 for function in REWARD_FUNCS}
    shares = {"completions/clipped_ratio": 0.12, "frac_reward_zero_std": 0.25, "computed_tokens": 0.71}
    numbers = {"reward": 2.375, "reward_std": 0.8391, "completions/mean_length": 211.6, "step_time": 3.44}
    line = step_line(940, 1868, {**rewards, **shares, **numbers, "entropy": 0.34, "grad_norm": 0.127})
    assert line.endswith("length 212 truncated 12% no signal 25% tokens 71% entropy .34 grad .13 3.4 s")


@pytest.mark.parametrize(
    "own", [["brevity_reward_func"], ["a_reward_with_quite_a_long_name"] * 3, [f"own_{i}" for i in range(30)]]
)
def test_rewards_of_a_users_own_stay_in_a_steps_line(own):
    names = [*(function.__name__ for function in REWARD_FUNCS), *(f"{name}{i}" for i, name in enumerate(own))]
    shares = {"completions/clipped_ratio": 0.12, "frac_reward_zero_std": 0.25, "computed_tokens": 0.71}
    numbers = {"reward": 2.375, "reward_std": 0.8391, "completions/mean_length": 211.6, "step_time": 3.44}
    paid = {f"rewards/{name}/mean": -2.5 for name in names}
    line = step_line(940, 1868, {**paid, **shares, **numbers, "entropy": 0.34, "grad_norm": 0.127})
    assert line.count("-2.50") == len(names)
    assert line.endswith(") 3.4 s") or len(line) <= progress.WIDTH


def test_after_ten_steps_without_signal_one_warning_says_what_to_type(capsys):
    run = Progress(None, SimpleNamespace(sample_every=0))
    run.training_bar = SimpleNamespace(write=print)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=99, logging_steps=2)
    logs = {
        "reward": 0.0,
        "reward_std": 0.0,
        "completions/mean_length": 9,
        "completions/clipped_ratio": 0,
        "entropy": 1,
    }
    for share in (1, 1, 1, 1, 0.5, 1, 1, 1, 1):
        run.on_log(None, state, None, {**logs, "frac_reward_zero_std": share})
    assert "WARNING" not in capsys.readouterr().out, "never 10 steps in a row"
    for _ in range(9):
        run.on_log(None, state, None, {**logs, "frac_reward_zero_std": 1})
    out = capsys.readouterr().out
    assert out.count("WARNING: for 10 steps every group's completions all earned the same") == 1
    for words in ("cold_start.py --output_dir outputs/cold`", "outputs/cold`)", "ONE_SHOT"):
        assert words in out

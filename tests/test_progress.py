"""What is printed says how the run goes, and warns where it goes wrong."""

from types import SimpleNamespace

import pytest
import torch

from rewards import REWARD_FUNCS
from support import progress
from support.progress import closing_remark, step_line


@pytest.mark.parametrize(
    ("obstacle", "device", "words"),
    [
        ("vLLM is not installed", "cuda", "vLLM is not installed; without it generation takes about six times as long"),
        ("there is no CUDA GPU", "cpu", "Transformers (there is no CUDA GPU)"),
        (None, "cuda", "Transformers (USE_VLLM is False)"),
    ],
)
def test_the_plan_says_what_a_gpu_loses_without_vllm(obstacle, device, words, monkeypatch):
    monkeypatch.setattr(progress, "vllm_obstacle", lambda use_cpu: obstacle)
    settings = {"use_vllm": False, "use_cpu": device == "cpu", "load_in_4bit": False, "demo": False}
    run = SimpleNamespace(**settings, device=torch.device(device))
    assert words in progress._backend(run)


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
    assert len(line) <= 160, f"{reason}: {len(line)}, {line}"
    assert f" {logs['reward']:.2f} " in line

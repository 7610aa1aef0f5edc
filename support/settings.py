"""Constants, a --config file and flags become one `Settings`: TRL's GRPOConfig and ModelConfig, and the recipe's own
flags.

A constant is its flag in capitals. A new one becomes the default of the flag of its name by being written down.
"""

import argparse
import sys
from dataclasses import dataclass, field
from math import isfinite
from typing import get_type_hints

from huggingface_hub.dataclasses import type_validator
from trl import GRPOConfig, ModelConfig, TrlParser
from yaml import YAMLError

from support import demo, memory, processes
from support.errors import BadInput, RunStopped
from support.generation import vllm_obstacle
from support.preflight import find_problems
from support.problems import expand
from support.record import printable
from support.resuming import find_checkpoint

NOT = {int: "no whole number", float: "no number", bool: "neither true nor false", str: "no text"}
RATES = ("learning_rate", "cold_start_learning_rate")  # times LORA_LEARNING_RATE_FACTOR with LoRA, unless given


def _own(text: str, default=None):
    """A flag of the recipe's own; its default is the constant of its name, where there is one."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings(GRPOConfig, ModelConfig):
    """Every setting of a run under the name of its flag. Complete when it has been read; nothing changes it after."""

    dataset_name: str = _own("Hub name, or folder with train.jsonl and test.jsonl.")
    dataset_config: str | None = _own("Configuration of a Hub dataset.")
    dataset_train_split: str = _own("Split to train on.", "train")
    dataset_test_split: str = _own("Split to measure on.", "test")
    max_prompt_length: int = _own("Longer prompts are dropped (tokens).")
    one_shot: bool = _own("Put a worked example before every question.")
    cold_start_examples: int = _own("Solved problems to fine-tune on before GRPO; 0: none.")
    cold_start_source: str = _own("'dataset', or 'self': the model's own right answers.")
    cold_start_reuse: bool = _own("GRPO sees those problems again.")
    cold_start_learning_rate: float = _own("Of that stage.")
    cold_start_epochs: int = _own("Of that stage.")
    cold_start_batch_size: int = _own("Examples a step.")
    lora_learning_rate_factor: float = _own("Times both learning rates with --use_peft, unless they are given.")
    tokens_per_pass: int | None = _own("Tokens of a pass, at most; None: what fits and keeps a GPU busy.")
    lean_step: bool = _own("Compute only what has a gradient, in few passes: the gradient stays TRL's.")
    sample_every: int = _own("Steps between printed samples; 0: none.")
    eval_problems: int = _own("Test problems that eval_steps measures on.")
    allow_changed_settings: bool = _own("Resume although settings that shape the trajectory differ.", False)
    demo: bool = _own("A tiny policy on made-up sums: any machine, offline.", False)
    is_resumed: bool = field(default=False, init=False)

    def __post_init__(self):
        GRPOConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        self.is_resumed = self.resume_from_checkpoint is not None
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_max_model_length is None:
            # vLLM would reserve cache for the model's whole context, 32,768 tokens for Qwen2.5
            self.vllm_max_model_length = self.max_prompt_length + self.max_completion_length
        if self.device.type == "cpu":
            # of several processes it is "cpu:0", to which torch cannot load an optimizer's state
            self._setup_devices = type(self.device)("cpu")
        self.model_init_kwargs = {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "use_safetensors": True,  # other formats are pickles, which run code when they are loaded
            **(self.model_init_kwargs or {}),
        }


def _misfits(flags: argparse.Namespace, optional: set[str]) -> list[str]:
    """Values of another type than their flag's, a line each: a --config file and a constant can hold anything. None
    fits where it is the default."""
    hints = {name: hint for name, hint in get_type_hints(Settings).items() if hasattr(flags, name)}
    values = [(name, getattr(flags, name), hint) for name, hint in hints.items()]
    return [
        f"{name.upper()} is {value!r:.60}, which is {NOT.get(hint, f'not of type {hint}')}"
        for name, value, hint in values
        if not _fits(value, hint) and not (value is None and name in optional)
    ]


def _fits(value, hint) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    for convert in (None, float) if is_whole else (None,):  # a whole number is a number
        try:
            form = convert(value) if convert else value
            type_validator("", form, hint)
            return not isinstance(form, float) or isfinite(form)
        except (TypeError, OverflowError):
            continue
    return False


class _Parser(TrlParser):
    """TrlParser that reports every problem at once, before any configuration is built that stops at its first one."""

    def __init__(self, constants: dict, is_demo: bool):
        super().__init__(
            Settings,
            usage="python train_grpo.py [--demo] [--config FILE.yaml] [--FLAG VALUE ...]",
            description=constants["__doc__"].partition("\n")[0],
            allow_abbrev=False,
        )
        self.is_demo = is_demo
        defaults = {name.lower(): value for name, value in constants.items() if name.isupper()}
        for name in set(defaults) - {action.dest for action in self._actions}:
            self.error(f"the constant {name.upper()} is no flag, so that nothing would read it; --help lists all flags")
        known = {action.dest: self.get_default(action.dest) for action in self._actions} | defaults
        defaults |= demo.settings() if is_demo else {}
        self.dtype = (known | defaults)["dtype"]
        self.rates = {name: (known | defaults)[name] for name in RATES}
        self.set_defaults(**defaults | dict.fromkeys((*RATES, "dtype")))  # None: not given; depends on others then
        self.optional = {action.dest for action in self._actions if action.default is None}
        self.defaults = {action.dest: self.get_default(action.dest) for action in self._actions}

    def parse_known_args(self, args=None, namespace=None):
        flags, unknown = super().parse_known_args(args, namespace)
        if flags.demo != self.is_demo:
            self.error("the demo is asked for by a bare `--demo` on the command line, without true or false")
        if misfits := _misfits(flags, self.optional):
            self.refuse(misfits)  # nothing else can be said about them
        idle = self.without_effect(flags)
        self.settle(flags)
        problems = idle + [f"unknown flag or stray value {word!r}; --help lists all flags" for word in unknown]
        problems += find_problems(flags) if processes.is_main() else []
        if problems:
            self.refuse(problems)
        if flags.use_vllm is None:
            flags.use_vllm = vllm_obstacle(flags.use_cpu) is None and not flags.load_in_4bit
        flags.per_device_train_batch_size //= processes.count()  # all processes together make one step
        if flags.demo:
            demo.name_sources(flags)
        return flags, unknown

    def without_effect(self, flags: argparse.Namespace) -> list[str]:
        """Flags of something that is not asked for."""
        parts = (("lora_", "use_peft", "true"), ("cold_start_", "cold_start_examples", "N"))
        return [
            f"--{name} has no effect without --{needed} {value}"
            for prefix, needed, value in parts
            for name, default in self.defaults.items()
            if name.startswith(prefix) and not getattr(flags, needed) and getattr(flags, name) != default
        ]

    def settle(self, flags: argparse.Namespace) -> None:
        """Settings that depend on others where they are not given."""
        for name in ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint"):
            setattr(flags, name, expand(getattr(flags, name) or ""))
        flags.resume_from_checkpoint = flags.resume_from_checkpoint or None
        for name, rate in self.rates.items():
            if getattr(flags, name) is None:
                setattr(flags, name, rate * flags.lora_learning_rate_factor if flags.use_peft else rate)
        if flags.dtype is None:  # what 4-bit training leaves unquantized is frozen, so that nothing rounds away in bf16
            flags.dtype = "bfloat16" if flags.load_in_4bit else self.dtype
        if flags.use_vllm is None and flags.vllm_mode == "server":
            flags.use_vllm = True

    def refuse(self, problems: list[str]) -> None:
        listed = "".join(f"  - {printable(problem)}\n" for problem in problems)
        self.exit(2, f"train_grpo.py cannot start (a constant is its flag in capitals):\n{listed}")

    def exit(self, status=0, message=None):
        processes.linger()
        super().exit(status, message if processes.is_first_here() else None)

    def error(self, message):
        self.exit(2, f"train_grpo.py: {printable(message)}\n{self.usage}\n")


def read_settings(constants: dict, argv: list[str] | None = None) -> Settings:
    """`constants` (a script's globals), overridden by a --config file, overridden by flags. Exits with status 2 and
    every problem found."""
    processes.quiet()
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(constants, is_demo="--demo" in argv)
    try:
        (settings,) = parser.parse_args_and_config(argv)
        memory.settle(settings)
        if settings.is_resumed:
            settings.resume_from_checkpoint = processes.on_main(find_checkpoint, settings)
    except (BadInput, RunStopped) as error:
        parser.exit(2, f"train_grpo.py: {printable(str(error))}\n")
    except (ValueError, TypeError, ImportError, OSError, IndexError, YAMLError) as error:
        # TRL's objections, such as to a flag's combination with another; no or no readable --config file
        parser.error(str(error))
    return settings

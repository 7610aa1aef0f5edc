"""Constants, a --config file and flags become one object: TRL's configuration, ModelConfig, and the recipe's own flags.

A constant is the default of the flag of its name; writing a new one down is enough.
"""

import argparse
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import GRPOConfig, ModelConfig, TrlParser
from yaml import YAMLError

from support import processes
from support.errors import BadInput, RunStopped, meant
from support.generation import vllm_obstacle
from support.preflight import find_errors
from support.record import printable
from support.resuming import find_checkpoint

FIXED = {  # defaults where no constant gives another
    "ddp_timeout": 7200,  # seconds: processes wait for one that samples, or evaluates
    "ddp_find_unused_parameters": False,  # all are used, and looking for others costs a walk of the graph each pass
    "logging_nan_inf_filter": False,  # it would log an average in place of a NaN loss
    "hub_strategy": "end",  # --push_to_hub pushes the final policy, no checkpoint
    "num_completions_to_print": 0,  # of TRL's own table; SAMPLE_EVERY is easier to read
}
RENAMED = {  # a pattern of flags that are typed from habit: what to type instead
    "model|model_name": "--model_name_or_path",
    "dataset|data": "--dataset_name",
    "batch_size": "--per_device_train_batch_size",
    "lr": "--learning_rate",
    "max_new_tokens": "--max_completion_length",
    "torch_dtype": "--dtype",
    "warmup_ratio": "--warmup_steps, which below 1 is a share of all steps",
    "no_cuda": "--use_cpu",
    "resume|resume_from": "--resume_from_checkpoint auto",
}


def own_flag(text: str, default=None):
    """A flag of the recipe's own; its default is the constant of its name, where there is one."""
    return field(default=default, metadata={"help": text})


@dataclass
class Common:
    """Flags of both trainings, GRPO's and the cold start's."""

    dataset_name: str = own_flag("Hub name, folder or file.")
    dataset_config: str | None = own_flag("Configuration of a dataset that has several.")
    question_column: str = own_flag("Column with the question.")
    answer_column: str = own_flag("Column with the number, or with a rationale and '#### number'.")
    drop_non_numeric: bool = own_flag("Drop rows whose answer is no number, and count them.")
    dataset_train_split: str = own_flag("Split to train on.", "train")
    dataset_test_split: str = own_flag("Split to measure on.", "test")
    max_prompt_length: int = own_flag("Longer prompts are dropped (tokens).")
    one_shot: bool = own_flag("Put a worked example before every question.")
    system_prompt_in_question: bool = own_flag("Put the system prompt at the head of the question.")
    adapter: str | None = own_flag("Of a model that is a LoRA adapter: 'train' it further, or 'merge' it first.")
    lora_learning_rate_factor: float = own_flag("Multiplies the learning rate with --use_peft, unless it is given.")
    allow_changed_settings: bool = own_flag("Resume although settings that shape the trajectory differ.", False)
    is_resumed: bool = field(default=False, init=False)
    script: str = field(default="", init=False)  # the file that was started

    def complete(self) -> None:
        """Derive what follows from the flags."""
        self.is_resumed = self.resume_from_checkpoint is not None
        self.model_init_kwargs = {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "use_safetensors": True,  # other formats are pickles, which run code when they are loaded
            **(self.model_init_kwargs or {}),
        }

    @property
    def device(self):
        device = super().device
        # of several processes it is "cpu:0", to which torch cannot load an optimizer's state
        return torch.device("cpu") if device.type == "cpu" else device


@dataclass
class Settings(Common, GRPOConfig, ModelConfig):
    """Every setting of a GRPO run under the name of its flag."""

    reuse_shown: bool = own_flag("Train on the problems that a cold start has shown, too.")
    tokens_per_pass: int | None = own_flag("Tokens of a pass, at most; None: what fits and keeps a GPU busy.")
    lean_step: bool = own_flag("Compute only what has a gradient, in few passes: the gradient stays TRL's.")
    sample_every: int = own_flag("Steps between printed samples; 0: none.")
    eval_problems: int = own_flag("Test problems that eval_steps measures on.")

    def __post_init__(self):
        GRPOConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_max_model_length is None:
            # vLLM would reserve cache for the model's whole context, 32,768 tokens for Qwen2.5
            self.vllm_max_model_length = self.max_prompt_length + self.max_completion_length
        self.complete()


class _Parser(TrlParser):
    """TrlParser that reports every error at once, before any configuration is built that stops at its first one."""

    def __init__(self, constants: dict, kind: type):
        self.kind, self.script = kind, Path(constants["__file__"]).name
        usage = f"python {self.script} [--config FILE.yaml] [--FLAG VALUE ...]"
        super().__init__(kind, usage=usage, description=constants["__doc__"].partition("\n")[0], allow_abbrev=False)
        constants = {name.lower(): value for name, value in constants.items() if name.isupper()}
        flags = {action.dest: self.get_default(action.dest) for action in self._actions}
        for name in set(constants) - set(flags):
            self.error(f"the constant {name.upper()} is no flag, so that nothing reads it{meant(name, flags, RENAMED)}")
        defaults = {name: value for name, value in FIXED.items() if name in flags} | constants
        self.rate, self.dtype = ((flags | defaults)[name] for name in ("learning_rate", "dtype"))
        self.set_defaults(**defaults | {"learning_rate": None, "dtype": None})  # None: not given, depends on others
        self.defaults = {action.dest: self.get_default(action.dest) for action in self._actions}
        self.strange = []  # words of a --config file that are no flags

    def set_defaults_with_config(self, **config) -> list[str]:
        """TRL's, but values are as if they were typed, and what is no flag is reported with all other errors."""
        several = [action.dest for action in self._actions if action.nargs == "+"]
        for name, value in config.items():
            held = [value] if name in several and isinstance(value, str | int | float) else value
            if isinstance(held, list | dict):  # YAML 1.1 reads 1e-7 as text, whose quotes are taken off here
                config[name] = json.loads(re.sub(r'"(-?\d[\d.]*e[-+]?\d+)"(?!:)', r"\1", json.dumps(held, default=str)))
        self.strange = super().set_defaults_with_config(**config)
        return []

    def parse_known_args(self, args=None, namespace=None):
        flags, odd = super().parse_known_args(args, namespace)
        given = [name for name, default in self.defaults.items() if getattr(flags, name, default) != default]
        idle = [name for name in given if name.startswith("lora_") and not flags.use_peft]
        why = "without --use_peft true"
        if flags.adapter == "train":
            flags.use_peft, why = True, "with --adapter train: the adapter has its own"
            idle = [name for name in given if re.match("lora_(?!dropout|learning)|use_(rslora|dora)", name)]
        errors = [f"--{name} has no effect {why}" for name in idle]
        errors += [f"unknown flag or stray value {w!r}{meant(w, self.defaults, RENAMED)}" for w in self.strange + odd]
        self.fill_in(flags)
        errors += find_errors(flags) if processes.is_main() else []
        if errors:
            listed = "".join(f"  - {printable(error)}\n" for error in errors)
            self.exit(2, f"{self.script} cannot start (a constant is its flag in capitals):\n{listed}")
        if self.kind is Settings and flags.use_vllm is None:
            flags.use_vllm = vllm_obstacle(flags.use_cpu) is None and not flags.load_in_4bit
        flags.per_device_train_batch_size //= processes.count()  # all processes together make one step
        return flags, odd

    def fill_in(self, flags: argparse.Namespace) -> None:
        """Settings that depend on others where they are not given."""
        for name in ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint"):
            setattr(flags, name, os.path.expanduser(getattr(flags, name) or ""))
        if not flags.output_dir:
            ending = "GRPO" if self.kind is Settings else "cold"
            flags.output_dir = f"outputs/{Path(flags.model_name_or_path).absolute().name}-{ending}"
        flags.resume_from_checkpoint = flags.resume_from_checkpoint or None
        if self.kind is Settings and (scale := str(flags.scale_rewards).lower()) in ("true", "false"):
            flags.scale_rewards = "group" if scale == "true" else "none"  # which TRL does for Python's True and False
        if flags.learning_rate is None:
            flags.learning_rate = self.rate * (flags.lora_learning_rate_factor if flags.use_peft else 1)
        if flags.dtype is None:  # what 4-bit training leaves unquantized is frozen, so that nothing rounds away in bf16
            flags.dtype = "bfloat16" if flags.load_in_4bit else self.dtype
        if self.kind is Settings and flags.use_vllm is None and flags.vllm_mode == "server":
            flags.use_vllm = True

    def exit(self, status=0, message=None):
        processes.linger()
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # each machine says it once
        super().exit(status, message if is_first_here else None)

    def error(self, message):
        self.exit(2, f"{self.script}: {printable(message)}\n{self.usage}\n")


def read_settings(constants: dict, argv: list[str] | None = None, kind: type = Settings):
    """Settings of this `kind`: `constants` (a script's globals), overridden by a --config file, overridden by flags.
    Exits with status 2 and every error found."""
    processes.quiet()
    parser = _Parser(constants, kind)
    try:
        (settings,) = parser.parse_args_and_config(argv)
        settings.script = constants["__file__"]
        if settings.is_resumed:
            settings.resume_from_checkpoint = processes.on_main(find_checkpoint, settings)
    except (BadInput, RunStopped) as error:
        parser.exit(2, f"{parser.script}: {printable(str(error))}\n")
    except RuntimeError as error:
        if not processes.is_of_a_peer(error):
            raise
        parser.exit(2)  # the main process says why
    except (ValueError, TypeError, AttributeError, ImportError, OSError, LookupError, YAMLError) as error:
        # objections of TRL and Transformers, which stumble over values of a wrong type too; no readable --config file
        parser.error(str(error))
    return settings

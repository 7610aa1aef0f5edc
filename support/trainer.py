"""TRL's trainers as the recipe uses them."""

from copy import copy

import trl

from support import processes
from support.checkpoints import WholeCheckpoints
from support.errors import BadInput


class _Recipe(WholeCheckpoints):
    """For one of TRL's trainers: what a user can mend is one message, and what is trained is in fp32.

    Raises:
        BadInput: weights that are no safetensors, a setting that TRL refuses, a package that is missing.
    """

    def __init__(self, model, **kwargs):
        if not isinstance(model, str):  # it is loaded already
            kwargs["args"] = copy(kwargs["args"])
            kwargs["args"].model_init_kwargs = None
        try:
            super().__init__(model, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            name = model if isinstance(model, str) else model.config._name_or_path
            message = str(error).strip()
            raise BadInput(f"{type(self).__name__} cannot be built for model {name!r}: {message}") from error
        if getattr(self.model, "is_loaded_in_4bit", False):  # TRL casts the adapter to bf16: small updates round away
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()


class SFTTrainer(_Recipe, trl.SFTTrainer):
    """TRL's SFTTrainer."""


class GRPOTrainer(_Recipe, trl.GRPOTrainer):
    """TRL's GRPOTrainer."""

    def _generate_single_turn(self, *args, **kwargs):
        if self.use_vllm or processes.is_sharded():
            return super()._generate_single_turn(*args, **kwargs)
        # keeps the bf16 copies of the weights for a whole generation; Transformers makes them anew for every token
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

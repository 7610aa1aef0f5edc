"""A GRPO step that computes only what teaches.

TRL pads all completions of a generation to the longest, shuffles them, and computes every pass at that width, the
completions whose advantage is zero included, and each with its prompt. Four changes leave the gradient what it is (TRL
issue 7179 has the first):

- trim: a pass is as wide as its own longest prompt and completion.
- order: the completions of a step are sorted by length before they are split into passes.
- drop: completions of advantage 0 are left out; those that are left are spread evenly over the passes.
- share: a pass computes each prompt once, and all its completions attend to the same keys and values.
"""

from functools import partial

import torch
import trl
from peft import PeftModel
from transformers import DynamicCache
from transformers.integrations import is_deepspeed_zero3_enabled

SUMS = ("dapo", "cispo", "vespo")  # losses that are a sum over all tokens of a generation, by one normalizer


class LeanGRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer. With `args.lean_step` it leaves out what teaches nothing, and the gradient stays."""

    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        args = self.args
        # an entropy bonus or mask and a router's loss are computed from all completions of a pass
        reads_all = self._entropy_bonus_enabled or self.aux_loss_enabled or self.top_entropy_quantile < 1
        is_sum = self.loss_type in SUMS and not reads_all
        spans_steps = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
        self.trims = args.lean_step
        self.orders = args.lean_step and is_sum and not spans_steps  # else rows would move between steps
        self.drops = args.lean_step and is_sum and self.beta == 0  # a KL term has a gradient at any advantage
        policy = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        kinds = getattr(policy.config.get_text_config(), "layer_types", None) or ["full_attention"]
        keeps_all = set(kinds) == {"full_attention"} and not policy._is_stateful and policy._supports_logits_to_keep()
        # a layer that is computed again for its gradient knows no keys and values, and FSDP and ZeRO-3 let go of its
        # weights before their second gradient of a pass
        reusable = not (args.gradient_checkpointing or self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
        self.shares = args.lean_step and keeps_all and reusable and not self.aux_loss_enabled

    def update_in_words(self) -> str:
        """How a step's passes differ from TRL's, for the plan."""
        changes = {
            "each pass at its own width": self.trims,
            "sorted by length": self.orders,
            "without completions of advantage 0": self.drops,
            "a prompt once a pass": self.shares,
        }
        return ", ".join(words for words, is_made in changes.items() if is_made) or "as TRL computes it"

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.trims or not self.model.training:
            return inputs
        if self._buffered_inputs is not before:  # a new generation; TRL's shuffle has drawn what it always draws
            self._buffered_inputs = self._lean(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _lean(self, passes: list[dict]) -> list[dict]:
        """The passes of a generation without what teaches nothing; as many as there were, each with a row at
        least; the same numbers in every process."""
        theirs = _tokens(passes)
        if self.orders:
            together = {name: _joined([inputs[name] for inputs in passes]) for name in passes[0]}
            rows = _teaching(together, self._least(together, len(passes))) if self.drops else _by_length(together)
            passes = [_rows(together, chunk) for chunk in torch.tensor_split(rows, len(passes))]
        elif self.drops:
            passes = [_rows(inputs, _teaching(inputs, self._least(inputs, 1))) for inputs in passes]
        passes = [_trimmed(inputs, self.pad_to_multiple_of or 1) for inputs in passes]
        tokens = torch.tensor([[_tokens(passes, self.shares), theirs]], device=self.args.device)
        ours, theirs = self.accelerator.gather(tokens).sum(0).tolist()  # of all processes
        self._metrics["train"]["computed_tokens"].append(ours / theirs)
        return passes

    def _least(self, inputs: dict, passes: int) -> int:
        """Rows that every process keeps: one a pass, and as many as the process with the most that teach, for which the
        others would wait. TRL gathers a number for each row, and what is gathered must be of one size."""
        teaching = (inputs["advantages"] != 0).sum()
        return max(passes, int(self.accelerator.gather(teaching).max()))

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """TRL's, for B rows (B, P + C) that it computes in chunks of `batch_size`: each chunk at its own width."""
        theirs = super()._get_per_token_logps_and_entropies

        def compute(model, ids, mask, width, *args, **kwargs):
            forward = partial(_sharing_prompts, model, ids.shape[1] - width) if self.shares else model
            return theirs(forward, ids, mask, width, *args, **kwargs)

        if not self.trims or batch_size is None:  # the passes of the update are trimmed already
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        prompts = input_ids.shape[1] - logits_to_keep
        masks = {"prompt_mask": attention_mask[:, :prompts], "completion_mask": attention_mask[:, prompts:]}
        whole = {"prompt_ids": input_ids[:, :prompts], "completion_ids": input_ids[:, prompts:], **masks}
        logps = torch.zeros(masks["completion_mask"].shape, device=input_ids.device)  # (B, C); padding counts nowhere
        for rows in torch.split(_by_length(whole), batch_size):
            chunk = _trimmed(_rows(whole, rows), self.pad_to_multiple_of or 1)
            ids = torch.cat([chunk["prompt_ids"], chunk["completion_ids"]], dim=1)
            mask = torch.cat([chunk["prompt_mask"], chunk["completion_mask"]], dim=1)
            width = chunk["completion_ids"].shape[1]
            logps[rows, :width] = compute(model, ids, mask, width, **kwargs)[0].to(logps.dtype)
        return logps, None, None


def _sharing_prompts(model, width: int, input_ids, attention_mask, labels, **kwargs):
    """The model's forward for rows of a prompt of `width` tokens and a completion: keys and values of a prompt are
    computed once for all rows that have it, and their gradients reach it together. A prompt's last token goes with
    the completion, whose first token it predicts."""
    shared = width - 1
    prompts, of_row = torch.cat([input_ids[:, :shared], attention_mask[:, :shared]], 1).unique(
        dim=0, return_inverse=True
    )
    cache = DynamicCache()
    model(prompts[:, :shared], attention_mask=prompts[:, shared:], past_key_values=cache, logits_to_keep=1)
    cache.batch_select_indices(of_row)
    return model(
        input_ids[:, shared:], attention_mask=attention_mask, past_key_values=cache, labels=labels[:, shared:], **kwargs
    )


def _joined(values: list):
    """One value of several passes as that of all."""
    if isinstance(values[0], torch.Tensor) and values[0].ndim:
        return torch.cat(values)
    return values[0]  # a number or nothing, the same in each


def _by_length(inputs: dict) -> torch.Tensor:
    """Row numbers, the shortest completion first."""
    return inputs["completion_mask"].sum(1).argsort(stable=True)


def _teaching(inputs: dict, least: int) -> torch.Tensor:
    """Numbers of the rows that have an advantage, the shortest first; of the others as many as make it `least`."""
    rows = _by_length(inputs)
    silent = inputs["advantages"][rows] == 0
    kept = torch.cat([rows[~silent], rows[silent][: max(0, least - int((~silent).sum()))]])
    return kept[inputs["completion_mask"][kept].sum(1).argsort(stable=True)]


def _rows(inputs: dict, rows: torch.Tensor) -> dict:
    return {name: value[rows] if _has_rows(value) else value for name, value in inputs.items()}


def _has_rows(value) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _trimmed(inputs: dict, multiple: int) -> dict:
    """Prompts, padded on the left, and all that is as wide as the completions, padded on the right, cut to the longest
    of these rows, or the next `multiple` of tokens."""

    def width(mask: str) -> int:  # a row that is masked as truncated has none left
        return max(1, -(-int(inputs[mask].sum(1).max()) // multiple) * multiple)

    prompts, completions = width("prompt_mask"), width("completion_mask")
    trimmed = dict(inputs)
    for name, value in inputs.items():
        if _has_rows(value) and value.ndim == 2:
            trimmed[name] = value[:, -prompts:] if name.startswith("prompt_") else value[:, :completions]
    return trimmed


def _tokens(passes: list[dict], shares: bool = False) -> int:
    """Tokens that these passes compute, padding included."""
    total = 0
    for inputs in passes:
        rows, width = inputs["prompt_ids"].shape
        prompts = len(inputs["prompt_ids"].unique(dim=0)) if shares else rows
        total += prompts * width + (rows - prompts if shares else 0) + inputs["completion_ids"].numel()
    return total

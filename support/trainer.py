"""TRL's trainers as the recipe uses them, and a GRPO step that computes only what teaches.

TRL pads all completions of a generation to the longest, shuffles them, and computes every pass at that width, the
completions whose advantage is zero included. Three changes leave the gradient what it is (TRL issue 7179 has the
first):

- trim: a pass is as wide as its own longest prompt and completion.
- order: the completions of a step are sorted by length before they are split into passes.
- drop: completions of advantage 0 are left out; those that are left are spread evenly over the passes.
"""

import shlex
from copy import copy
from functools import partial
from pathlib import Path

import torch
import trl
from accelerate.utils import set_seed
from httpx import HTTPError  # huggingface_hub's, where it has no own
from peft import PeftModel
from safetensors import SafetensorError

from support import processes
from support.checkpoints import WholeCheckpoints
from support.errors import BadInput
from support.hub import ELSEWHERE, trouble
from support.record import printable
from support.report import write_report

SUMS = ("dapo", "cispo", "vespo")  # losses that are a sum over all tokens of a generation, by one normalizer


class _Recipe(WholeCheckpoints):
    """For one of TRL's trainers: what a user can mend is one message, and what is trained is in fp32.

    Raises:
        BadInput: weights out of reach or no safetensors, a setting that TRL refuses, a package that is missing.
    """

    def __init__(self, model, **kwargs):
        if not isinstance(model, str):  # it is loaded already
            kwargs["args"] = copy(kwargs["args"])
            kwargs["args"].model_init_kwargs = None
        try:
            super().__init__(model, **kwargs)
        except BadInput:
            raise
        except (OSError, ValueError, ImportError, HTTPError, SafetensorError) as error:
            name = model if isinstance(model, str) else model.config._name_or_path
            message = trouble(error, "model", name, ELSEWHERE) or str(error).strip()
            raise BadInput(f"{type(self).__name__} cannot be built for model {name!r}: {message}") from error
        self.is_quantized = getattr(self.model, "is_loaded_in_4bit", False)
        if self.is_quantized:  # TRL casts the adapter to bf16: small updates round away
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def create_model_card(self, *args, **kwargs):
        """The run's report takes the place of TRL's card, on disk and on the Hub."""
        if processes.is_main():
            write_report(Path(self.args.output_dir), self.state.log_history)

    def init_hf_repo(self, *args, **kwargs):
        try:
            return super().init_hf_repo(*args, **kwargs)
        except (OSError, HTTPError) as error:
            raise BadInput(
                f"--push_to_hub: {_first_line(error)}. Train without it, and later say: {self._upload()}"
            ) from error

    def push_to_hub(self, *args, **kwargs):
        """TRL's, except that a Hub that is out of reach costs a trained policy nothing but the push."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except (OSError, HTTPError) as error:
            print(f"NOT pushed to the Hub: {_first_line(error)}. All is saved; later say: {self._upload()}")

    def _upload(self) -> str:
        folder = self.args.output_dir
        name = self.args.hub_model_id or Path(folder).absolute().name
        return shlex.join(["hf", "upload", name, folder, "--exclude", "checkpoint-*"])


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0].rstrip(".") or repr(error))


class SFTTrainer(_Recipe, trl.SFTTrainer):
    """TRL's SFTTrainer."""


class GRPOTrainer(_Recipe, trl.GRPOTrainer):
    """TRL's GRPOTrainer. With `args.lean_step` it leaves out what teaches nothing, and the gradient stays."""

    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        args = self.args
        if args.use_vllm:
            self._check_server()
            # vLLM's engine samples from the process' random state, and has just seeded it with a number of its own
            set_seed(args.seed, device_specific=True)
            if isinstance(self.model, PeftModel) and not processes.is_sharded() and not self.is_quantized:
                self.vllm_generation._iter_named_params = partial(_merged, self.model)
        # an entropy bonus or mask and a router's loss are computed from all completions of a pass
        reads_all = self._entropy_bonus_enabled or self.aux_loss_enabled or self.top_entropy_quantile < 1
        is_sum = self.loss_type in SUMS and not reads_all
        spans_steps = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
        self.trims = args.lean_step
        self.orders = args.lean_step and is_sum and not spans_steps  # else rows would move between steps
        self.drops = args.lean_step and is_sum and self.beta == 0  # a KL term has a gradient at any advantage

    def _check_server(self) -> None:
        """That it holds this run's model, which can be told by name alone."""
        if self.vllm_mode != "server" or not processes.is_main():
            return
        served, wanted = self.vllm_generation.vllm_client.model, self.args.model_name_or_path
        if Path(served).name != Path(wanted).name:
            raise BadInput(
                f"vLLM's server holds {served!r}, and this run trains {wanted!r}: start it with --model {wanted}, or "
                f"with --served-model-name {wanted} where it holds that model under another name"
            )

    def update_in_words(self) -> str:
        """How a step's passes differ from TRL's, for the plan."""
        changes = {
            "each pass at its own width": self.trims,
            "sorted by length": self.orders,
            "without completions of advantage 0": self.drops,
        }
        return ", ".join(words for words, is_made in changes.items() if is_made) or "as TRL computes it"

    def _generate_single_turn(self, *args, **kwargs):
        if self.use_vllm or processes.is_sharded():
            return super()._generate_single_turn(*args, **kwargs)
        # keeps the bf16 copies of the weights for a whole generation; Transformers makes them anew for every token
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

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
        tokens = torch.tensor([[_tokens(passes), theirs]], device=self.args.device)
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
        compute = super()._get_per_token_logps_and_entropies
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


def _merged(model):
    """Names and weights of a policy with an adapter as vLLM takes them, merged a layer at a time, into a copy: TRL
    merges into the base weights themselves and takes it out again, which rounds at every sync (TRL issue 6688)."""
    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        path, is_adapted, _ = name.rpartition(".base_layer.weight")
        name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", "")
        if not is_adapted:
            yield name, parameter.data
            continue
        layer, weight = model.get_submodule(path), parameter.data
        layer.merge(safe_merge=True)  # puts a copy in the weight's place
        yield name, parameter.data
        layer.unmerge()
        parameter.data = weight


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


def _tokens(passes: list[dict]) -> int:
    """Tokens that these passes compute, padding included."""
    return sum(inputs["prompt_ids"].numel() + inputs["completion_ids"].numel() for inputs in passes)

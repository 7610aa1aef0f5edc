"""A GRPO step that computes only what has a gradient, in few passes.

TRL pads all completions of a generation to the longest, and computes each micro-batch at that width, completions of
advantage 0 included. A small policy's update is bound by kernel launches rather than by tokens. So a step is one
micro-batch for TRL here, and is split into passes of at most TOKENS_PER_PASS tokens, backward after each:

- drop: completions of advantage 0 are left out, unless a KL term gives them a gradient.
- order: the others are sorted by length, so that those of a pass are about as long.
- trim: a pass is as wide as its own longest prompt and completion (TRL issue 7179).

The gradient is that of TRL's own step: the loss is a sum over rows or tokens by one normalizer, however it is split.
"""

from contextlib import contextmanager, nullcontext

import torch
import trl
from accelerate.utils import DistributedType

from support import processes
from support.errors import BadInput
from support.memory import can_split

SUMS = ("dapo", "cispo", "vespo")  # losses that are a sum over tokens by a normalizer of the whole generation
ROW_MEANS = ("grpo", "dr_grpo", "sapo", "luspo")  # a mean over the rows of a pass
TOKEN_MEANS = ("bnpo",)  # a mean over its tokens


class LeanGRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer. With `args.lean_step` it leaves out what has no gradient, and the gradient stays."""

    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        self.trims = self.args.lean_step
        self.splits = can_split(self.args) and self.loss_type in SUMS + ROW_MEANS + TOKEN_MEANS
        self.drops = self.splits and self.beta == 0  # a KL term has a gradient at any advantage
        if self.splits and self.aux_loss_enabled:
            raise BadInput(
                "LEAN_STEP cannot split a step of a mixture of experts, whose router has a loss of all completions: "
                "ROUTER_AUX_LOSS_COEF = 0, or LEAN_STEP = False with a smaller PER_DEVICE_TRAIN_BATCH_SIZE"
            )

    def update_in_words(self) -> str:
        """How a step's passes differ from TRL's, for the plan."""
        changes = {
            f"passes of at most {self.args.tokens_per_pass or 0:,} tokens, sorted by length": self.splits,
            "each at its own width": self.trims,
            "without completions of advantage 0": self.drops,
        }
        return ", ".join(words for words, is_made in changes.items() if is_made) or "as TRL computes it"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss of B rows, after backward on all passes but the last, on which the caller runs it: gradient and
        value are those of all passes together."""
        if not (self.trims and self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        *passes, last = [rows for _, rows in self._passes(inputs, self.splits, self.drops)]
        theirs, *ours = [
            each["prompt_ids"].numel() + each["completion_ids"].numel() for each in (inputs, *passes, last)
        ]
        self._metrics["train"]["computed_tokens"].append(sum(ours) / theirs)
        self._metrics["train"]["passes"].append(len(ours))
        done = 0.0
        for rows in passes:
            with self._gradients_stay_here(model):
                loss = super().compute_loss(model, rows) * self._share(rows, inputs)
                is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))  # as Trainer does
            done += loss.detach()
        return super().compute_loss(model, last) * self._share(last, inputs) + done

    def _share(self, rows: dict, inputs: dict):
        """The weight of a pass' loss in that of all `inputs`."""
        if self.loss_type in ROW_MEANS:
            return len(rows["completion_ids"]) / len(inputs["completion_ids"])
        if self.loss_type in TOKEN_MEANS:
            return rows["completion_mask"].sum() / inputs["completion_mask"].sum().clamp(min=1)
        return 1

    @contextmanager
    def _gradients_stay_here(self, model):
        """For a backward pass that others follow: gradients are summed over the processes in the last one alone (FSDP
        sums in each, or every process would hold whole gradients), and DeepSpeed makes no step."""
        is_last = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False
        with nullcontext() if processes.is_sharded() else self.accelerator.no_sync(model):
            yield
        self.accelerator.sync_gradients = is_last

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """TRL's, for B rows (B, P + C); those that it would compute in chunks of `batch_size`, before the update, in
        passes."""
        compute = super()._get_per_token_logps_and_entropies
        if not self.trims or batch_size is None:  # the passes of the update come as they are
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        prompts = input_ids.shape[1] - logits_to_keep
        masks = {"prompt_mask": attention_mask[:, :prompts], "completion_mask": attention_mask[:, prompts:]}
        whole = {"prompt_ids": input_ids[:, :prompts], "completion_ids": input_ids[:, prompts:], **masks}
        logps = torch.zeros(masks["completion_mask"].shape, device=input_ids.device)  # (B, C); padding counts nowhere
        for numbers, rows in self._passes(whole, splits=True, drops=False):
            ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
            mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
            width = rows["completion_ids"].shape[1]
            logps[numbers, :width] = compute(model, ids, mask, width, **kwargs)[0].to(logps.dtype)
        return logps, None, None

    def _passes(self, inputs: dict, splits: bool, drops: bool) -> list[tuple]:
        """What `inputs` (B rows in every process) are computed in: for each pass the numbers of its rows, a tensor, and
        their values.

        All processes make as many passes of as many rows: TRL gathers metrics in each pass, and FSDP and ZeRO-3 gather
        weights, for which every process waits.
        """
        teaches = inputs["advantages"] != 0 if drops else torch.ones_like(inputs["prompt_mask"][:, 0])
        table = torch.stack([inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1), teaches], dim=1)  # (B, 3)
        table = self.accelerator.gather(table).tolist()  # from here on the CPU decides, without the GPU
        multiple, rank = self.pad_to_multiple_of or 1, self.accelerator.process_index
        rows = [(*(max(1, -(-n // multiple)) * multiple for n in row[:2]), row[2]) for row in table]
        of_processes = [rows[start : start + len(teaches)] for start in range(0, len(rows), len(teaches))]
        passes = into_passes(of_processes, self.args.tokens_per_pass if splits else float("inf"))
        mine, passes = of_processes[rank], [each[rank] for each in passes]
        order = torch.tensor([i for numbers in passes for i in numbers], device=teaches.device)
        # a number for all rows, or what is no tensor, stays as it is
        ordered = {name: value[order] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
        parts, start = [], 0
        for numbers in passes:
            chosen, widths = slice(start, start + len(numbers)), _widths([mine[i] for i in numbers])
            parts.append((order[chosen], _trimmed(ordered, chosen, *widths)))
            start = chosen.stop
        return parts


Row = tuple[int, int, bool]  # tokens of the prompt and of the completion, and whether it has a gradient


def into_passes(of_processes: list[list[Row]], limit: float) -> list[list[list[int]]]:
    """The rows of each pass: for each process their numbers, the shortest completion first.

    Every process computes as many rows as the one with the most that have a gradient, and at least one, in passes of at
    most `limit` tokens, padding included. A row that is longer is a pass of its own.
    """
    count = max(1, *(sum(row[2] for row in rows) for rows in of_processes))
    orders = []
    for rows in of_processes:
        kept = sorted(range(len(rows)), key=lambda i: (not rows[i][2], rows[i][1]))[:count]
        orders.append(sorted(kept, key=lambda i: rows[i][1]))
    passes, widest = [], 0
    for numbers in zip(*orders, strict=True):  # the next row of each process
        prompt, completion = _widths([rows[i] for rows, i in zip(of_processes, numbers, strict=True)])
        widest = max(widest, prompt)
        if not passes or (len(passes[-1][0]) + 1) * (widest + completion) > limit:
            passes.append([[] for _ in orders])
            widest = prompt
        for part, i in zip(passes[-1], numbers, strict=True):
            part.append(i)
    return passes


def _widths(rows: list[Row]) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest completion."""
    return max(row[0] for row in rows), max(row[1] for row in rows)


def _trimmed(inputs: dict, rows: slice, prompts: int, completions: int) -> dict:
    """Some rows; prompts, padded on the left, and all that is as wide as completions, padded on the right, narrowed."""
    trimmed = {name: value[rows] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
    for name, value in trimmed.items():
        if getattr(value, "ndim", 0) == 2:
            trimmed[name] = value[:, -prompts:] if name.startswith("prompt_") else value[:, :completions]
    return trimmed

"""A GRPO step that computes only what has a gradient, in few passes.

TRL computes all completions of a generation at the width of the longest, in passes of a fixed number of rows. Here a
step's rows are split into passes of at most TOKENS_PER_PASS tokens, with a backward pass after each:

- drop: completions of advantage 0 are left out, unless a KL term gives them a gradient.
- order: the others are sorted by length, so that those of a pass are about as long.
- trim: a pass is as wide as its own longest prompt and completion (TRL issue 7179).

The gradient is that of TRL's own step: the loss is a sum over rows or tokens by one normalizer, however it is split.
"""

from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import DistributedType

from support import processes
from support.errors import BadInput
from support.memory import can_split

SUMS = ("dapo", "cispo", "vespo")  # losses that are a sum over tokens by a normalizer of the whole generation
ROW_MEANS = ("grpo", "dr_grpo", "sapo", "luspo")  # a mean over the rows of a pass
TOKEN_MEANS = ("bnpo",)  # a mean over its tokens


class LeanStep:
    """A base class in front of TRL's GRPOTrainer, at work where `args.lean_step` is set."""

    def prepare_lean_step(self) -> None:
        """Decide what can be left out, once the trainer is built; BadInput where a router's loss needs all of it."""
        self.trims = self.args.lean_step and "LEAN_STEP" not in self.off
        self.splits = self.trims and can_split(self.args)
        self.drops = self.splits and self.beta == 0  # a KL term has a gradient at any advantage
        if self.splits and self.aux_loss_enabled:
            instead = "ROUTER_AUX_LOSS_COEF = 0, or LEAN_STEP = False with a smaller PER_DEVICE_TRAIN_BATCH_SIZE"
            raise BadInput(f"LEAN_STEP cannot split the step of a mixture of experts, whose loss is of all: {instead}")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss of B rows. Backward has run on all passes but the last; the caller runs it on that one."""
        if not (self.trims and self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = [rows for _, rows in self._passes(inputs, self.splits, self.drops)]
        trls, *ours = [each["prompt_ids"].numel() + each["completion_ids"].numel() for each in (inputs, *passes)]
        self.note(computed_tokens=sum(ours) / trls, passes=len(ours))
        done = 0.0
        for rows in passes[:-1]:
            with self._gradients_stay_here(model):
                loss = super().compute_loss(model, rows) * self._share(rows, inputs)
                is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))  # as Trainer does
            done += loss.detach()
        return super().compute_loss(model, passes[-1]) * self._share(passes[-1], inputs) + done

    def _share(self, rows: dict, inputs: dict):
        """The weight of a pass' loss in that of all `inputs`."""
        if self.loss_type in ROW_MEANS:
            return len(rows["completion_ids"]) / len(inputs["completion_ids"])
        if self.loss_type in TOKEN_MEANS:
            return rows["completion_mask"].sum() / inputs["completion_mask"].sum().clamp(min=1)
        return 1

    @contextmanager
    def _gradients_stay_here(self, model):
        """Around a backward pass that is not the last: processes do not sum their gradients yet (with FSDP they do, or
        each would hold whole gradients), and DeepSpeed makes no optimizer step."""
        is_last = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False
        with nullcontext() if processes.is_sharded() else self.accelerator.no_sync(model):
            yield
        self.accelerator.sync_gradients = is_last

    def logps_in_passes(self, compute, input_ids, attention_mask, completion_width: int):
        """Log-probabilities (B, C) of the completions of B rows (B, P + C), computed before the update in passes.
        They are the first result of `compute`, TRL's function of ids, mask and completion width."""
        prompts = input_ids.shape[1] - completion_width
        masks = {"prompt_mask": attention_mask[:, :prompts], "completion_mask": attention_mask[:, prompts:]}
        whole = {"prompt_ids": input_ids[:, :prompts], "completion_ids": input_ids[:, prompts:], **masks}
        logps = torch.zeros(masks["completion_mask"].shape, device=input_ids.device)  # at padding unused
        for indices, rows in self._passes(whole, splits=True, drops=False):
            ids, mask = (torch.cat([rows[f"prompt_{it}"], rows[f"completion_{it}"]], dim=1) for it in ("ids", "mask"))
            width = rows["completion_ids"].shape[1]
            logps[indices, :width] = compute(ids, mask, width)[0].to(logps.dtype)
        return logps

    def _passes(self, inputs: dict, splits: bool, drops: bool) -> list[tuple]:
        """`inputs`, B rows in every process, split: for each pass the indices of its rows, a tensor, and their values.
        All processes make as many passes, of as many rows, since they wait for each other's metrics in each."""
        teaches = inputs["advantages"] != 0 if drops else torch.ones_like(inputs["prompt_mask"][:, 0])
        table = torch.stack([inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1), teaches], dim=1)  # (B, 3)
        table = self.accelerator.gather(table).tolist()  # one transfer to the CPU, which does the rest
        multiple, rank = self.pad_to_multiple_of or 1, self.accelerator.process_index
        rows = [(*(max(1, -(-n // multiple)) * multiple for n in row[:2]), row[2]) for row in table]
        of_processes = [rows[start : start + len(teaches)] for start in range(0, len(rows), len(teaches))]
        passes = into_passes(of_processes, self.args.tokens_per_pass if splits else float("inf"))
        parts = []
        for indices in (each[rank] for each in passes):
            chosen = torch.tensor(indices, device=teaches.device)
            parts.append((chosen, _trimmed(inputs, chosen, *_widths([of_processes[rank][i] for i in indices]))))
        return parts


Row = tuple[int, int, bool]  # tokens of the prompt and of the completion, and whether it has a gradient


def into_passes(of_processes: list[list[Row]], limit: float) -> list[list[list[int]]]:
    """The rows of each pass: indices for each process, the shortest completion first. A pass has at most `limit` tokens
    with padding, or one longer row. All compute as many rows as the one with most that have a gradient, at least 1."""
    count = max(1, *(sum(row[2] for row in rows) for rows in of_processes))
    orders = []
    for rows in of_processes:
        kept = sorted(range(len(rows)), key=lambda i: (not rows[i][2], rows[i][1]))[:count]
        orders.append(sorted(kept, key=lambda i: rows[i][1]))
    passes, widest = [], 0
    for indices in zip(*orders, strict=True):  # the next row of each process
        prompt, completion = _widths([rows[i] for rows, i in zip(of_processes, indices, strict=True)])
        widest = max(widest, prompt)
        if not passes or (len(passes[-1][0]) + 1) * (widest + completion) > limit:
            passes.append([[] for _ in orders])
            widest = prompt
        for part, i in zip(passes[-1], indices, strict=True):
            part.append(i)
    return passes


def _widths(rows: list[Row]) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest completion."""
    return max(row[0] for row in rows), max(row[1] for row in rows)


def _trimmed(inputs: dict, rows: torch.Tensor, prompts: int, completions: int) -> dict:
    """Some rows without the columns that are padding in all of them: prompts are padded on the left, completions and
    all that is as wide as they on the right. A number for all rows, or what is not a tensor, stays as it is."""
    trimmed = {name: value[rows] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
    for name, value in trimmed.items():
        if getattr(value, "ndim", 0) == 2:
            trimmed[name] = value[:, -prompts:] if name.startswith("prompt_") else value[:, :completions]
    return trimmed

"""Greedy accuracy of the policy in training on held-out problems."""

from contextlib import nullcontext

import torch
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from support import processes
from support.evaluation import score, summarize
from support.generation import as_completion, complete
from support.problems import tokenize


class HeldOut(TrainerCallback):
    """Measures the policy in training greedily: before the first step, every EVAL_STEPS steps and after the last, and
    logs `eval_strict_accuracy` and so on. Weights, random state and generation settings are left as they were.
    `problems` have a `prompt` each, and several processes share them. `by_vllm`: vLLM decodes, not Transformers."""

    def __init__(self, trainer, settings, problems: list[dict], by_vllm: bool):
        self.trainer, self.tokenizer, self.settings = trainer, trainer.processing_class, settings
        self.problems, self.decode = problems, self._by_vllm if by_vllm else self._by_transformers

    def on_train_begin(self, args, state, control, **kwargs):
        # a run that a signal stopped here has saved without measuring
        has_measured = any(row["step"] == state.global_step and "eval_n" in row for row in state.log_history)
        if state.global_step % self.settings.eval_steps == 0 and not has_measured:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        is_last, is_due = state.global_step == state.max_steps, state.global_step % self.settings.eval_steps == 0
        if is_last or (is_due and not control.should_training_stop):
            training_log_is_due = control.should_log
            self.measure()  # logs, which clears should_log
            control.should_log = training_log_is_due

    def measure(self) -> None:
        """Answer all problems, and log the accuracy."""
        count, rank, problems = processes.count(), processes.rank(), self.problems
        # equally many for each process, some twice: of a sharded policy all must generate together
        share = [(rank + count * i) % len(problems) for i in range(-(-len(problems) // count))]
        on = self.settings.device
        with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
            mine = self.decode([problems[i]["prompt"] for i in share])
        pairs = processes.gathered(list(zip(share, mine, strict=True)))
        completions = dict(pair for share in pairs for pair in share)
        rows = [score(i, problem, completions[i]) for i, problem in enumerate(problems)]
        report = {f"eval_{key}": value for key, value in summarize(rows).items() if key != "strict_ci95"}
        Trainer.log(self.trainer, report)  # TRL's own log would empty its buffer of training metrics into this

    def _by_vllm(self, prompts: list[list[dict]]) -> list[dict]:
        answers = self.trainer.answer_by_vllm(tokenize(self.tokenizer, prompts, self.settings.chat_template_kwargs))
        return [as_completion(self.tokenizer, *answer) for answer in answers]

    def _by_transformers(self, prompts: list[list[dict]]) -> list[dict]:
        args, accelerator = self.settings, self.trainer.accelerator
        unwrapped = unwrap_model_for_generation(
            self.trainer.model_wrapped,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
        # as the trainer generates: the bf16 copies of the weights are made once, and not for every token
        copies = nullcontext() if processes.is_sharded() else accelerator.autocast()
        with copies, unwrapped as policy:
            declared = policy.generation_config
            policy.eval()
            how = {"chat_template_kwargs": args.chat_template_kwargs, "progress": False}
            completions = complete(policy, self.tokenizer, prompts, args.max_completion_length, **how)
            policy.generation_config = declared
            policy.train()
        return completions

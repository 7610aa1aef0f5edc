"""Greedy accuracy of the policy in training on held-out problems."""

import torch
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from support import processes
from support.evaluation import score, summarize, task_of
from support.generation import complete


class HeldOut(TrainerCallback):
    """Measures the policy in training greedily: before the first step, every EVAL_STEPS steps and after the last.
    Logged as `eval_strict_accuracy` and so on.

    Training does not feel it: weights, random state and generation settings are left as they were. Several processes
    share the problems.
    """

    def __init__(self, trainer, tokenizer, settings, problems: list[dict]):
        self.trainer, self.tokenizer, self.problems = trainer, tokenizer, problems
        self.task, self.every = task_of(settings), int(settings.eval_steps)
        self.prompts = [self.task.prompt(problem["question"]) for problem in problems]

    def on_train_begin(self, args, state, control, **kwargs):
        # a run that a signal stopped saved before it measured: it is made up for here
        has_measured = any(row["step"] == state.global_step and "eval_n" in row for row in state.log_history)
        if state.global_step % self.every == 0 and not has_measured:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step == state.max_steps
        if is_last or (state.global_step % self.every == 0 and not control.should_training_stop):
            training_log_is_due = control.should_log
            self.measure()  # whose own log clears that mark
            control.should_log = training_log_is_due

    def measure(self) -> None:
        count, rank, problems = processes.count(), processes.rank(), self.problems
        # as many for each process, some twice: a sharded policy generates on all of them or on none
        share = [(rank + count * i) % len(problems) for i in range(-(-len(problems) // count))]
        mine = self.complete([self.prompts[i] for i in share])
        pairs = processes.gathered(list(zip(share, mine, strict=True)))
        completions = dict(pair for share in pairs for pair in share)
        rows = [score(i, problem, completions[i]) for i, problem in enumerate(problems)]
        report = {f"eval_{key}": value for key, value in summarize(rows).items() if key != "strict_ci95"}
        Trainer.log(self.trainer, report)  # TRL's own log would empty its buffer of training metrics into this

    def complete(self, prompts: list[list[dict]]) -> list[dict]:
        trainer, on = self.trainer, self.trainer.args.device
        length, kwargs = self.task.max_completion_length, self.task.chat_template_kwargs
        with (
            torch.random.fork_rng(devices=[on] if on.type == "cuda" else []),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as policy,
        ):
            declared = policy.generation_config
            policy.eval()
            completions = complete(policy, self.tokenizer, prompts, length, chat_template_kwargs=kwargs, progress=False)
            policy.generation_config = declared
            policy.train()
        return completions

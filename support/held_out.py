"""Greedy accuracy of the policy in training on held-out problems."""

from contextlib import contextmanager, nullcontext

import torch
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from support import processes
from support.evaluation import score, summarize, task_of
from support.generation import as_completion, complete
from support.problems import tokenize


class HeldOut(TrainerCallback):
    """Measures the policy in training greedily: before the first step, every EVAL_STEPS steps and after the last.
    Logged as `eval_strict_accuracy` and so on.

    Decoded by what samples the completions, Transformers or vLLM. Training does not feel it: weights, random state and
    generation settings are left as they were. Several processes share the problems.
    """

    def __init__(self, trainer, tokenizer, settings, problems: list[dict]):
        self.trainer, self.tokenizer, self.problems = trainer, tokenizer, problems
        self.task, self.every = task_of(settings), int(settings.eval_steps)
        self.prompts = [self.task.prompt(problem["question"]) for problem in problems]
        self.uses_vllm = settings.use_vllm and self._all_fit(settings)

    def _all_fit(self, settings) -> bool:
        """Whether vLLM's context holds every prompt beside its completion, as it does those that are trained on."""
        lengths = map(len, tokenize(self.tokenizer, self.prompts, self.task.chat_template_kwargs))
        if longer := sum(length > settings.max_prompt_length for length in lengths):
            print(
                f"held out: {longer} of {len(self.prompts)} prompts are over MAX_PROMPT_LENGTH = "
                f"{settings.max_prompt_length} tokens, which vLLM has no room for; Transformers decodes them all"
            )
        return not longer

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
        on = self.trainer.args.device
        with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
            return (self._by_vllm if self.uses_vllm else self._by_transformers)(prompts)

    def _by_vllm(self, prompts: list[list[dict]]) -> list[dict]:
        """By the engine that samples, which gets the newest weights first."""
        trainer = self.trainer
        token_ids = tokenize(self.tokenizer, prompts, self.task.chat_template_kwargs)
        with _greedy(trainer.vllm_generation):
            completions, _ = trainer._generate_single_turn(token_ids, None, {}, num_generations=1)
        # as if nothing had been: the next sampling loads the weights itself, into an empty cache of prefixes
        trainer._last_loaded_step = -1
        return [as_completion(self.tokenizer, ids, ids[-1] not in trainer.eos_token_ids) for ids in completions]

    def _by_transformers(self, prompts: list[list[dict]]) -> list[dict]:
        trainer, length, kwargs = self.trainer, self.task.max_completion_length, self.task.chat_template_kwargs
        # as the trainer generates: the bf16 copies of the weights are made once, and not for every token
        copies = nullcontext() if processes.is_sharded() else trainer.accelerator.autocast()
        with (
            copies,
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


@contextmanager
def _greedy(engine):
    """TRL's engine (`VLLMGeneration`) decodes greedily, and samples as before after that."""
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    # a request without a seed draws one from the process' random state, from which training would draw the next
    more = {"seed": 0, "detokenize": False} if engine.mode == "colocate" else {"seed": 0}  # a server takes no such word
    greedy |= {"generation_kwargs": more, "structured_outputs_regex": None}
    before = {name: getattr(engine, name) for name in greedy}
    vars(engine).update(greedy)
    try:
        yield
    finally:
        vars(engine).update(before)

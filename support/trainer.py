"""TRL's trainers as the recipe uses them.

What the recipe adds is a method here or in lean_step.py, or a callback. Private names of TRL and Transformers stand in
this module alone: `PRIVATE` lists them with what they serve, and a trainer looks at them before it loads a model.
"""

import atexit
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from functools import partial
from inspect import getsource, signature
from pathlib import Path
from pkgutil import resolve_name

import trl
from accelerate.utils import set_seed
from accelerate.utils.other import get_free_port
from httpx import HTTPError  # what huggingface_hub raises where it has none of its own
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerState
from transformers import __version__ as version
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support import memory, processes
from support.checkpoints import WEIGHTS, checkpoints, flaw, holds_shards, kept, to_disk
from support.curves import Curves
from support.errors import ELSEWHERE, BadInput, RunStopped, trouble
from support.faults import Guard, check_reward_functions, check_weights, checked
from support.generation import mend_generation_config
from support.held_out import HeldOut
from support.lean_step import LeanStep
from support.problems import base_of, is_path
from support.progress import Progress
from support.record import printable, resume_command
from support.report import write_report
from support.resuming import has_steps_left

SCRATCH = ".saving"  # in OUTPUT_DIR: where a checkpoint is until it is whole, and where an old one goes to be deleted

TRAINER, GRPO = "transformers:Trainer", "trl:GRPOTrainer"
ENGINE = "trl.generation.vllm_generation:VLLMGeneration"
LOGPS = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size")
WHOLE = "checkpoints that are whole or not there"
LEAN, SAMPLES = "LEAN_STEP", "SAMPLE_EVERY"
COPIES = "bf16 copies of the weights that are kept for a generation"
GREEDY = "held-out answers by vLLM"
SYNC = "adapters merged into copies, all weights loaded in one call"
PRIVATE = (  # class, name, a method's first parameters (None for an attribute), and what is off without it
    (TRAINER, "_save_checkpoint", ("model", "trial"), WHOLE),
    (TRAINER, "_get_output_dir", ("trial",), WHOLE),
    (TRAINER, "_load_from_checkpoint", ("resume_from_checkpoint",), WHOLE),
    ("transformers:PretrainedConfig", "_commit_hash", None, "the model's revision in run.json"),
    (GRPO, "_get_per_token_logps_and_entropies", LOGPS, LEAN),
    (GRPO, "_metrics", None, LEAN),
    (GRPO, "aux_loss_enabled", None, LEAN),
    (GRPO, "_logs", None, SAMPLES),
    (GRPO, "_generate_single_turn", ("prompt_ids", "images", "multimodal_fields", "num_generations"), COPIES),
    (GRPO, "_last_loaded_step", None, GREEDY),
    (ENGINE, "generation_kwargs", None, GREEDY),
    (ENGINE, "structured_outputs_regex", None, GREEDY),
    (ENGINE, "_iter_named_params", (), SYNC),
)


def is_there(owner: str, name: str, takes: tuple[str, ...] | None) -> bool:
    """Whether the installed version has a private name as it is used here; an attribute where a method sets it."""
    try:
        owner = resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    if takes is not None:
        method = getattr(owner, name, None)
        return method is not None and (*signature(method).parameters,)[1:][: len(takes)] == takes
    return re.search(rf"\b{name}\b", getsource(owner)) is not None


def missing_for(trainer: type, uses_vllm: bool = True) -> set[str]:
    """What is off, as the installed versions lack one of `PRIVATE`; prints it. BadInput where nothing goes without."""
    off = set()
    for owner, name, takes, serves in PRIVATE:
        is_used = owner not in (GRPO, ENGINE) or issubclass(trainer, trl.GRPOTrainer)
        is_used = is_used and (uses_vllm or serves not in (GREEDY, SYNC))
        if is_used and not is_there(owner, name, takes):
            versions = f"TRL {trl.__version__}, Transformers {version}"
            lacks = f"{versions}: {owner.partition(':')[2]}.{name} is not there, or takes something else"
            if serves == WHOLE:
                raise BadInput(f"{lacks}, and without it there are no {WHOLE}: install what requirements.txt names")
            print(f"WARNING: {lacks}, so that this is off: {serves}")
            off.add(serves)
    return off


class _Recipe:
    """For one of TRL's trainers: what a user can mend is one message (BadInput), what is trained is in fp32,
    checkpoints appear whole or not at all, and signals and NaN are looked for."""

    _saves_to: str | None = None  # where a checkpoint is being written

    def __init__(self, model: str, run, off: set[str] | None = None, **kwargs):
        self.off = missing_for(type(self)) if off is None else off
        args, start, options = kwargs["args"], model, kwargs["args"].model_init_kwargs
        try:
            if args.adapter == "train":
                quantization, kwargs["peft_config"] = kwargs.pop("quantization_config", None), None
                start, args.model_init_kwargs = _load_adapter(model, args, quantization_config=quantization), None
                # a KL term's reference is a copy; with both in a checkpoint Transformers would load the reference alone
                start.save_pretrained = partial(start.save_pretrained, selected_adapters=["default"])
            elif args.adapter:
                start = f"{args.output_dir}/merged"
                processes.on_main(merge_adapter, model, Path(start), args, kwargs["processing_class"])
            super().__init__(start, **kwargs)
            args.model_init_kwargs = options
        except BadInput:
            raise
        except (OSError, ValueError, ImportError, HTTPError, SafetensorError) as error:
            message = trouble(error, "model", base_of(model), ELSEWHERE) or str(error).strip()
            raise BadInput(f"{type(self).__name__} cannot be built for model {base_of(model)!r}: {message}") from error
        for config in getattr(self.model, "peft_config", {}).values():
            if is_path(base := config.base_model_name_or_path):  # to be found from any folder
                config.base_model_name_or_path = str(Path(base).absolute())
        mend_generation_config(self.model)
        self.run = run
        self.model_name = self.model.config.name_or_path
        self.model_revision = getattr(self.model.config, "_commit_hash", None)  # of a model on the Hub
        self.is_quantized = getattr(self.model, "is_loaded_in_4bit", False)
        if self.is_quantized:  # TRL casts the adapter to bf16: small updates round away
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            if args.adapter == "train":  # again, as TRL's cast has rounded it
                self.model.load_adapter(model, "default", is_trainable=True)
        self.step_losses = []  # since the last optimizer step
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.guard = Guard(self, run)
        self.add_callback(self.guard)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.detach())
        return loss

    def train(self, resume_from_checkpoint: str | None = None):
        """TRL's; after a signal it ends with the command that resumes. A checkpoint of the last step is only loaded."""
        if resume_from_checkpoint:  # from another run's, maybe: run.json says so to `auto`, however soon this one dies
            self.run.begin(self.model_revision, self.off)
        if resume_from_checkpoint and not has_steps_left(self.args):
            return self._take_last(Path(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint)
        if self.guard.heard and self.state.global_step < self.state.max_steps:
            saved = f"saved {self.args.output_dir}/checkpoint-{self.state.global_step}"
            message = f"{self.guard.heard.name}: {saved}. Resume with\n  {resume_command()}"
            raise RunStopped(message, status=128 + self.guard.heard, outcome="stopped")
        if self.is_fsdp_enabled:  # the final policy is one ordinary folder, however checkpoints are sharded
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        return result

    def _take_last(self, checkpoint: Path) -> None:
        """For a run that died between its last checkpoint and its end."""
        if holds_shards(checkpoint):
            raise RunStopped(f"{checkpoint} is the run's last step: its shards have to be put together by hand")
        print(f"{checkpoint} is the last step: its policy is saved as the final one")
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _get_output_dir(self, trial):
        return self._saves_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """TRL's, into a folder that gets its name when every process has written its part and all of it is on the disk.
        Older whole checkpoints beyond SAVE_TOTAL_LIMIT go only then; damaged ones do not count, and stay."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        scratch, is_main = folder / SCRATCH, processes.is_main()
        check_weights(self.model, f"the policy after step {self.state.global_step}")
        is_there = processes.on_main(lambda: flaw(folder / name) is None)  # a signal and an epoch's end may both ask
        try:
            if is_main:
                shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
                scratch.mkdir()
            processes.wait()
            if not is_there:
                self._saves_to = str(scratch)
                super()._save_checkpoint(model, trial)
                processes.wait()
            if is_main:
                if not is_there:
                    to_disk(scratch / name)
                    if (folder / name).exists():  # damaged
                        (folder / name).rename(scratch / "damaged")
                    (scratch / name).rename(folder / name)
                whole = [path for path in checkpoints(folder) if flaw(path) is None]
                for old in whole[: -self.args.save_total_limit]:
                    old.rename(scratch / old.name)
            processes.wait()
        except (OSError, RuntimeError, SafetensorError) as error:
            if processes.is_of_a_peer(error):
                raise
            free = memory.gigabytes(shutil.disk_usage(folder).free)
            failed = f"saving {name} failed: {_first_line(error)} ({free} free in {folder}). {kept(folder)}"
            raise RunStopped(f"{failed}. Free some space, then resume with\n  {resume_command()}") from error
        finally:
            self._saves_to = None
            if is_main:
                shutil.rmtree(scratch, ignore_errors=True)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if processes.is_main() and not _internal_call:  # a checkpoint gets checksums of all its files
            to_disk(Path(output_dir or self.args.output_dir), WEIGHTS)

    def init_hf_repo(self, *args, **kwargs):
        try:
            return super().init_hf_repo(*args, **kwargs)
        except (OSError, HTTPError) as error:
            raise BadInput(f"--push_to_hub: {self._not_pushed(error, 'Train without it, and')}") from error

    def push_to_hub(self, *args, **kwargs):
        """TRL's, except that a Hub that is out of reach costs a trained policy nothing but the push."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except (OSError, HTTPError) as error:
            print(f"NOT pushed to the Hub: {self._not_pushed(error, 'All is saved;')}")

    def _not_pushed(self, error: Exception, what: str) -> str:
        folder = self.args.output_dir
        name = self.args.hub_model_id or Path(folder).absolute().name
        upload = shlex.join(["hf", "upload", name, folder, "--exclude", "checkpoint-*"])
        return f"{_first_line(error)}. {what} later say: {upload}"


def _load_adapter(name: str, settings, **options) -> PeftModel:
    """An adapter on its model, with LORA_DROPOUT in place of its own."""
    config = PeftConfig.from_pretrained(name)
    config.lora_dropout = settings.lora_dropout
    options |= {"trust_remote_code": settings.trust_remote_code, **settings.model_init_kwargs}
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **options)
    return PeftModel.from_pretrained(model, name, config=config, is_trainable=True)


def merge_adapter(name: str, folder: Path, settings, tokenizer, generation_config=None) -> None:
    """Merge an adapter into its model, loaded again (4-bit weights cannot hold the sum), in `folder`, maybe its own."""
    unset_hf_deepspeed_config()  # ZeRO-3 would split the model among processes that are not here
    model = _load_adapter(name, settings).merge_and_unload()
    model.generation_config = generation_config or model.generation_config
    mend_generation_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in (*folder.glob("adapter_*"), folder / "README.md"):  # PEFT's card is the adapter's
        path.unlink(missing_ok=True)
    to_disk(folder, WEIGHTS)
    print(f"merged: the adapter {printable(name)} into its model, in {printable(str(folder))}")


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0].rstrip(".") or repr(error))


class SFTTrainer(_Recipe, trl.SFTTrainer):
    """TRL's SFTTrainer."""


class GRPOTrainer(_Recipe, LeanStep, trl.GRPOTrainer):
    """TRL's GRPOTrainer with a lean step, and with vLLM's engine seeded and synced as a run needs it. `run` is begun
    when training is; on the `held_out` problems greedy accuracy is measured every EVAL_STEPS steps."""

    def __init__(self, model: str, run, *, args, reward_funcs, held_out: list[dict] = (), **kwargs):
        off = missing_for(type(self), args.use_vllm)
        self.keeps_copies = not args.use_vllm and not processes.is_sharded() and COPIES not in off
        self.memory_in_words = memory.choose_by_memory(args)
        if args.use_vllm and processes.count() == 1:
            # TRL picks 29500 if it is free, and vLLM listens there seconds later: of two runs begun together one fails
            os.environ.setdefault("MASTER_PORT", str(get_free_port()))
            atexit.register(processes.leave_groups)  # however the run ends
        reward_funcs = [*reward_funcs] if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        check_reward_functions(reward_funcs, kwargs["train_dataset"].column_names, args.trust_remote_code)
        super().__init__(model, run, off, args=args, reward_funcs=reward_funcs, **kwargs)
        names = self.reward_func_names  # by which TRL logs: two partials of one function need two
        self.reward_func_names = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
        self.reward_funcs = list(map(checked, self.reward_funcs, self.reward_func_names, [self] * len(names)))
        self.prepare_lean_step()
        if args.use_vllm:
            kwargs = self.vllm_generation.generation_kwargs  # vLLM looks for EOS tokens in the model's folder alone
            stops = [*self.eos_token_ids, *kwargs.get("stop_token_ids", ())]
            self.vllm_generation.generation_kwargs = {**kwargs, "stop_token_ids": stops}
            if self.vllm_mode == "server" and processes.is_main():
                served = self.vllm_generation.vllm_client.model
                if Path(served).name != Path(name := self.model_name).name:  # the name is all that a server tells
                    wrong = f"vLLM's server holds {served!r}, and this run trains {name!r}"
                    raise BadInput(f"{wrong}: start it with --model {name}, or --served-model-name {name}")
            # vLLM's engine samples from the process' random state, and has just seeded it with a number of its own;
            # processes that share an engine must sample the same
            set_seed(args.seed + processes.rank() // args.vllm_tensor_parallel_size)
            if SYNC not in off:
                self._sync_in_our_way()
        self.add_callback(Progress(self, args))
        self.add_callback(Curves())
        if held_out:
            self.add_callback(HeldOut(self, args, held_out, by_vllm=args.use_vllm and not off & {COPIES, GREEDY}))

    def _sync_in_our_way(self) -> None:
        """Merge adapters into copies of the weights, and load all weights in one call."""
        engine = self.vllm_generation
        has_own_way = processes.is_sharded() or self.is_quantized or self.args.lora_target_parameters
        if isinstance(self.model, PeftModel) and not has_own_way:
            engine._iter_named_params = partial(_merged, self.model)
        if self.vllm_mode == "colocate":
            engine._iter_named_params = partial(_load_at_once, engine, engine._iter_named_params)
            # TRL reads token ids, so that text is made for stop strings alone
            makes_text = bool(engine.generation_kwargs.get("stop"))
            engine.generation_kwargs = {"detokenize": makes_text, **engine.generation_kwargs}

    @property
    def last_generation(self) -> dict:
        """What TRL keeps of it for its tables: `prompt`, `completion`, `rewards` by function, `extra` columns."""
        return {} if SAMPLES in self.off else self._logs

    def create_model_card(self, *args, **kwargs):
        """The run's report takes the place of TRL's card, on disk and on the Hub."""
        if processes.is_main():
            write_report(Path(self.args.output_dir), self.state.log_history)

    def note(self, **metrics: float) -> None:
        """Log the mean of these over the steps until the next log."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        compute = super()._get_per_token_logps_and_entropies
        given = dict(zip(LOGPS, args, strict=False)) | kwargs
        if not self.trims or given.get("batch_size") is None:  # the passes of the update are trimmed already
            return compute(*args, **kwargs)
        model, ids, mask, width, _ = (given.pop(name) for name in LOGPS)
        return self.logps_in_passes(partial(compute, model, **given), ids, mask, width), None, None

    def _generate_single_turn(self, *args, **kwargs):
        if not self.keeps_copies:
            return super()._generate_single_turn(*args, **kwargs)
        # keeps the bf16 copies of the weights for a whole generation; Transformers makes them anew for every token
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def answer_by_vllm(self, prompts: list[list[int]]) -> list[tuple[list[int], list[int], bool]]:
        """Of B prompts, by vLLM on the newest weights: the prompt, its greedy completion, whether that is truncated."""
        with _greedy(self.vllm_generation, self.eos_token_ids):
            completions, _ = self._generate_single_turn(prompts, None, {}, num_generations=1)
        self._last_loaded_step = -1  # the next sampling loads the weights itself, into an empty cache of prefixes
        return [(*pair, pair[1][-1] not in self.eos_token_ids) for pair in zip(prompts, completions, strict=True)]


@contextmanager
def _greedy(engine, eos_token_ids: list[int]):
    """TRL's engine (`VLLMGeneration`) decodes greedily, and samples as before after that."""
    greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    # a request without a seed draws one from the process' random state, from which training would draw the next;
    # a server does not know the word `detokenize`
    more = {"seed": 0, "stop_token_ids": eos_token_ids} | ({"detokenize": False} if engine.mode == "colocate" else {})
    greedy |= {"generation_kwargs": more, "structured_outputs_regex": None}
    before = {name: getattr(engine, name) for name in greedy}
    vars(engine).update(greedy)
    try:
        yield
    finally:
        vars(engine).update(before)


def _load_at_once(engine, weights):
    """In the place of `weights`, TRL's generator: TRL makes a call for each weight, and vLLM looks through all modules
    of the model in each call. Here one call takes them all, still one at a time, and TRL's loop has nothing left."""
    engine.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights())
    return ()


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

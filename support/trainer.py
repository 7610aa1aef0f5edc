"""TRL's trainers as the recipe uses them: messages instead of tracebacks, what is trained in fp32, the run's report as
model card, and vLLM's engine seeded and synced as a run needs it."""

import atexit
import os
import shlex
from copy import copy
from functools import partial
from pathlib import Path

import trl
from accelerate.utils import set_seed
from accelerate.utils.other import get_free_port
from httpx import HTTPError  # huggingface_hub's, where it has no own
from peft import PeftModel
from safetensors import SafetensorError

from support import processes
from support.checkpoints import WholeCheckpoints
from support.errors import BadInput
from support.hub import ELSEWHERE, trouble
from support.lean_step import LeanGRPOTrainer
from support.record import printable
from support.report import write_report


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


class GRPOTrainer(_Recipe, LeanGRPOTrainer):
    """TRL's GRPOTrainer with a lean step, and with vLLM where the settings say so."""

    def __init__(self, model, **kwargs):
        if kwargs["args"].use_vllm and processes.count() == 1:
            # TRL takes 29500 where it is free, seconds before vLLM listens there: of two runs begun together one ends
            os.environ.setdefault("MASTER_PORT", str(get_free_port()))
            atexit.register(processes.leave_groups)  # however the run ends
        super().__init__(model, **kwargs)
        if self.args.use_vllm:
            self._check_server()
            # vLLM's engine samples from the process' random state, and has just seeded it with a number of its own
            # processes that share an engine must sample the same
            set_seed(self.args.seed + processes.rank() // self.args.vllm_tensor_parallel_size)
            engine = self.vllm_generation
            has_own_way = processes.is_sharded() or self.is_quantized or self.args.lora_target_parameters
            if isinstance(self.model, PeftModel) and not has_own_way:
                engine._iter_named_params = partial(_merged, self.model)
            if self.vllm_mode == "colocate":
                engine._iter_named_params = partial(_load_at_once, engine, engine._iter_named_params)
                # TRL reads token ids, so that text is made for stop strings alone
                makes_text = bool(engine.generation_kwargs.get("stop"))
                engine.generation_kwargs = {"detokenize": makes_text, **engine.generation_kwargs}

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

    def _generate_single_turn(self, *args, **kwargs):
        if self.use_vllm or processes.is_sharded():
            return super()._generate_single_turn(*args, **kwargs)
        # keeps the bf16 copies of the weights for a whole generation; Transformers makes them anew for every token
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)


def _load_at_once(engine, weights):
    """In the place of `weights`, TRL's generator: TRL calls vLLM's `load_weights` once for each of them, and every call
    looks through all modules of the model. Here one call takes them all, and TRL's loop has nothing left. vLLM loads a
    weight before it asks for the next, so that FSDP, ZeRO and `_merged` still hold one at a time."""
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

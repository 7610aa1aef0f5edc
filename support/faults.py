"""What happens to runs, told in one message each: signals, NaN, a full disk, lack of memory, a second run."""

import inspect
import os
import pickle
import re
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm
from transformers import AutoConfig, TrainerCallback
from trl.trainer.utils import get_callable_name, is_async_callable

from support import processes
from support.checkpoints import check_disk, kept
from support.errors import ELSEWHERE, BadInput, RunStopped, loading
from support.memory import gigabytes
from support.record import Run, printable, read_run, resume_command
from support.resuming import generation_cycle, has_steps_left

LOCK = ".lock"
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # TRL's


@contextmanager
def watched(settings, remedies):
    """Everything around a run that is not the method: its folder's lock, its run.json, and one message with a status
    where it ends early. Gives the `Run`; a run that is complete already exits here, with status 0. `remedies(settings)`
    lists what needs less memory, the most effective first."""
    script, folder = Path(settings.script).name, settings.output_dir
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which `end_at_once` had changed
        with locked(folder):
            if not has_steps_left(settings) and read_run(Path(folder)).get("outcome") == "finished":
                last = settings.resume_from_checkpoint
                where = f"{last} is its last step" if last else "its checkpoints are gone"
                print(f"{folder}: already complete, {where}\nnext:  python evaluate.py {folder}")
                processes.part()
                sys.exit(0)
            run = Run(settings)
            try:
                yield run
                run.end("finished")
            except BaseException as error:
                outcome = getattr(error, "outcome", "stopped" if isinstance(error, KeyboardInterrupt) else "failed")
                run.end(f"{outcome}: {error!r}")
                if message := explained(error, settings, remedies):
                    raise RunStopped(message) from error
                raise
    except BadInput as error:
        processes.linger()
        sys.exit(f"{script}: {printable(str(error))}")
    except RunStopped as stop:
        processes.linger()
        if processes.is_main() or stop.outcome != "stopped":  # all stop on a signal, one says so
            print(f"{script}: {printable(str(stop))}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; what was saved is in {folder}", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    processes.part()


@contextmanager
def locked(output_dir: str):
    """Lock `output_dir` until the main process ends; RunStopped where another run holds it, or it is not writable."""
    folder = Path(output_dir)
    is_new = not folder.exists()
    if not processes.is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False).acquire()
    except Timeout as error:
        raise RunStopped(f"another run is writing to {folder}; wait for it, or give another OUTPUT_DIR") from error
    except OSError as error:
        raise RunStopped(f"OUTPUT_DIR {folder} cannot be written to: {error}") from error
    try:
        with lock:
            yield
    finally:
        if is_new and all(path.is_dir() or path.name == LOCK for path in folder.rglob("*")):  # the run never began
            shutil.rmtree(folder)  # with TRL's empty folder for completions


def explained(error: BaseException, settings, remedies) -> str | None:
    """The message for a fault of the machine or of a file, with what to change; None for a bug."""
    text, place = str(error).strip(), settings.output_dir
    resume = f"resume with\n  {resume_command()}"
    if isinstance(error, torch.OutOfMemoryError):
        used, total = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.get_device_properties(0).total_memory / 1e9
        lines = "".join(f"\n  {i}. {remedy}" for i, remedy in enumerate(remedies(settings), start=1))
        peak = f"{used:.1f} GB of {total:.1f} GB were in use at the peak"
        return f"CUDA is out of memory: {peak}. Change, in order of effect:{lines}"
    if isinstance(error, pickle.UnpicklingError):
        unsafe = "holds more than tensors and numbers, which can run code when it is loaded: it was not loaded"
        return f"{settings.resume_from_checkpoint or place} {unsafe}. Resume from a checkpoint that you trust"
    asks_server = getattr(settings, "vllm_mode", "") == "server"
    if asks_server and type(error).__module__ == "requests.exceptions":  # TRL's client's
        return f"vLLM's server does not answer any more ({text}). {kept(place)}. Start a new one, then {resume}"
    if isinstance(error, OSError | SafetensorError) and re.search("No space|quota exceeded|File too large", text):
        free = gigabytes(shutil.disk_usage(place).free)
        return f"writing to {place} failed: {text} ({free} free). {kept(place)}. Free some space, then {resume}"
    if isinstance(error, RuntimeError) and processes.is_of_a_peer(error):
        ended = "another process of this run has ended, and says why itself, or cannot be reached"
        return f"{ended} ({text.partition(chr(10))[0]}). {kept(place)}; {resume}"
    if isinstance(error, RuntimeError) and "probability tensor contains" in text:
        diverged = "the policy's probabilities are infinite or NaN: it has diverged"
        return f"{diverged}. {kept(place)}. Lower LEARNING_RATE (now {settings.learning_rate:g}) and start anew"
    return None


class Guard(TrainerCallback):
    """Asks the trainer to save and stop on a signal (support/trainer.py saves), and looks for NaN before each step."""

    def __init__(self, trainer, run: Run):
        self.trainer, self.run = trainer, run
        self.heard: signal.Signals | None = None  # the first signal

    def hear(self, number, frame):
        """The first SIGTERM or Ctrl-C asks to save and stop; the second ends the process."""
        if self.heard is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.heard = signal.Signals(number)
        if processes.is_main():
            message = f"\n{self.heard.name}: finishing this step, then saving; a second signal stops at once\n"
            os.write(2, message.encode())  # unlike print, safe in the middle of a print

    def on_train_begin(self, args, state, control, model, train_dataloader, optimizer, lr_scheduler, **kwargs):
        check_disk(args, state, model)
        check_weights(model, "the policy to start from")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        state.compute_steps(args, state.max_steps)  # else a resumed state keeps the earlier start's intervals
        _set_rates(args, optimizer, lr_scheduler)
        # TRL's sampler shuffles each epoch by a generator that no checkpoint holds: draw past epochs' orders, drop them
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # accelerate wraps it, a shard for each process
        for _ in range(int(state.epoch or 0) if getattr(args, "shuffle_dataset", False) else 0):
            next(iter(sampler))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradient = _largest([p.grad for p in model.parameters() if p.grad is not None])
        loss, self.trainer.step_losses = sum(self.trainer.step_losses), []
        for name, value in (("loss", loss), ("gradient", gradient)):
            # in fp16 the loss scaler meets infinite gradients as a matter of course, and skips those steps
            if not value.isfinite() and not (args.fp16 and name == "gradient"):
                # DeepSpeed has made its step by now
                weights = "" if self.trainer.is_deepspeed_enabled else "The weights were not changed; "
                raise RunStopped(
                    f"step {state.global_step + 1}: the {name} is {value.item()}. {weights}{kept(args.output_dir)}. "
                    f"Lower LEARNING_RATE (now {args.learning_rate:g}), or look at the last samples for the cause"
                )

    def on_step_end(self, args, state, control, **kwargs):
        self.run.begin(self.trainer.model_revision, self.trainer.off)
        at_cycles_end = state.global_step % generation_cycle(args) == 0
        if at_cycles_end and (heard := next(filter(None, processes.gathered(self.heard)), None)):
            self.heard = heard  # all stop after the same step
            control.should_save = control.should_training_stop = True


def check_reward_functions(reward_funcs: list, columns: list[str], trust_remote_code: bool = False) -> None:
    """BadInput for those that TRL cannot call, with the data's `columns`, and a reward model that cannot be loaded."""
    given, faults = [*REWARD_ARGUMENTS, *(name for name in columns if name != "prompt")], []
    for reward in reward_funcs:
        try:
            if isinstance(reward, str):
                with loading("reward model", reward, ELSEWHERE):
                    AutoConfig.from_pretrained(reward, trust_remote_code=trust_remote_code)
            elif not isinstance(reward, torch.nn.Module):
                inspect.signature(reward).bind(**dict.fromkeys(given))
        except TypeError as error:
            faults.append(f"{get_callable_name(reward)}: {error}")
    if faults:
        raise BadInput(f"REWARD_FUNCS: {'; '.join(faults)}. They get {', '.join(given)}; **kwargs takes what is unused")


def wrong_payment(name: str, paid, count: int) -> str | None:
    """What is wrong with what a reward function has paid for `count` completions, or None. TRL reads NaN as None."""
    what = f"{paid!r:.60}"
    with suppress(TypeError):  # no list of numbers
        odd = [(i, each) for i, each in enumerate(paid) if not isfinite(0 if each is None else each)]
        if len(paid) == count and not odd and not isinstance(paid, dict):
            return None
        what = f"{odd[0][1]} for completion {odd[0][0]} of {len(paid)} ({len(odd)} such)" if odd else what
    return f"{name} paid {what}; right are {count} finite numbers, or None where it does not apply"


def checked(reward, name: str, trainer):
    """`reward`, in any of TRL's forms, but where it pays what is no reward the run ends."""

    def look(paid, completions, **_) -> list:
        if wrong := wrong_payment(name, paid, len(completions)):
            where = f"step {trainer.state.global_step + 1}: {wrong}"
            raise RunStopped(f"{where}. That step changed no weight; {kept(trainer.args.output_dir)}")
        return paid

    async def pay_later(**given) -> list:
        return look(await reward(**given), **given)

    if isinstance(reward, torch.nn.Module):
        # `and None`: what a hook returns, unless it is None, would take the output's place
        reward.register_forward_hook(lambda _, __, output: look(output.logits[:, 0].tolist(), output.logits) and None)
        return reward
    return pay_later if is_async_callable(reward) else lambda **given: look(reward(**given), **given)


def _set_rates(args, optimizer, lr_scheduler) -> None:
    """A resumed optimizer brings its old settings; put this start's in their place."""
    for group in optimizer.param_groups:
        group["lr"] *= args.learning_rate / group["initial_lr"]
        group["initial_lr"] = args.learning_rate
        if "betas" in group:
            group |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        if group["weight_decay"]:  # biases and norms have none
            group["weight_decay"] = args.weight_decay
    lr_scheduler.base_lrs = [args.learning_rate] * len(optimizer.param_groups)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next step is logged with


def _largest(tensors: list):
    """The largest absolute value in all of `tensors`, as a scalar tensor; NaN where one of them holds NaN."""
    held_here = [tensor for tensor in tensors if tensor.numel()]  # ZeRO-3 leaves empty ones where others hold them
    norm = get_total_norm(held_here, norm_type=float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a policy that FSDP shards


def check_weights(model, what: str) -> None:
    """Raises RunStopped where a weight is infinite or NaN."""
    for module in model.modules():  # FSDP2 leaves the last layers whole after a forward pass without a backward pass
        if isinstance(module, FSDPModule):
            module.reshard()
    if not _largest([p.detach() for p in model.parameters() if p.is_floating_point()]).isfinite():
        raise RunStopped(f"{what} holds weights that are infinite or NaN")

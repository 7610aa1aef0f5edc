"""What happens to runs, told in one message each: signals, NaN, a full disk, lack of memory, a second run."""

import functools
import os
import pickle
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

from transformers import TrainerCallback

from support import memory, processes
from support.checkpoints import SCRATCH, check_disk, kept
from support.errors import BadInput, RunStopped
from support.record import Run, printable, resume_command
from support.resuming import complete, generation_cycle, is_finished

LOCK = ".lock"


# ---- around a run


@contextmanager
def supervised(settings):
    """Everything around a run that is not the method: its folder's lock, its run.json, and one message with a status
    where it ends early. Gives the `Run`; a run without a step left ends here, with status 0."""
    try:
        processes.raise_again()
        with locked(settings.output_dir), faults_explained(settings):
            run = Run(settings)
            if is_finished(settings):
                complete(settings, run)
                processes.part()
                sys.exit(0)
            try:
                yield run
                run.end("finished")
            except BaseException as error:
                outcome = getattr(error, "outcome", "stopped" if isinstance(error, KeyboardInterrupt) else "failed")
                run.end(f"{outcome}: {error!r}")
                raise
    except BadInput as error:
        processes.linger()
        sys.exit(f"train_grpo.py: {printable(str(error))}")
    except RunStopped as stop:
        processes.linger()
        if processes.is_main() or stop.outcome != "stopped":  # all stop on a signal, one says so
            print(f"train_grpo.py: {printable(str(stop))}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print(f"\ntrain_grpo.py: interrupted; what was saved is in {settings.output_dir}", file=sys.stderr)
        sys.exit(130)
    processes.part()


@contextmanager
def locked(output_dir: str):
    """Hold `output_dir` for this run; the lock ends with the main process, however it ends.

    Raises:
        RunStopped: another run holds it, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    if not processes.is_main():
        yield
        return
    folder = Path(output_dir)
    is_new = not folder.exists()
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
        if is_new and all(path.name == LOCK for path in folder.iterdir()):  # the run never began
            shutil.rmtree(folder)


def is_locked(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


@contextmanager
def faults_explained(settings, remedies: list[str] | None = None):
    """Turn what the machine or a file does to a run into one message that says what to change. `remedies` are those
    against a lack of memory, GRPO's where they are not given."""
    import torch
    from safetensors import SafetensorError

    place = settings.output_dir
    try:
        yield
    except torch.OutOfMemoryError as error:
        used, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        raise RunStopped(out_of_memory(remedies or memory.remedies(settings), used, total)) from error
    except pickle.UnpicklingError as error:
        raise RunStopped(
            f"{settings.resume_from_checkpoint or place} holds more than tensors and numbers in optimizer.pt, "
            "scheduler.pt or rng_state.pth. Such a file can run code when it is loaded: it was not loaded. Resume from "
            "a checkpoint that you trust"
        ) from error
    except (OSError, SafetensorError) as error:
        if settings.vllm_mode == "server" and type(error).__module__ == "requests.exceptions":  # TRL's client's
            raise RunStopped(
                f"vLLM's server does not answer any more ({error}). {kept(place)}. Start a new one, then go on with\n  "
                f"{resume_command()}"
            ) from error
        if not re.search("No space left|Disk quota exceeded|File too large", str(error)):
            raise
        free = memory.gigabytes(shutil.disk_usage(place).free)
        raise RunStopped(
            f"writing to {place} failed: {error} ({free} free). {kept(place)}. Free some space, then go on with\n  "
            f"{resume_command()}"
        ) from error
    except RuntimeError as error:
        if processes.is_of_a_peer(error):
            reason = str(error).strip().partition("\n")[0]
            raise RunStopped(
                f"another process of this run has ended, and says why itself, or cannot be reached ({reason}). "
                f"{kept(place)}. Go on with\n  {resume_command()}"
            ) from error
        if "probability tensor contains" not in str(error):
            raise
        raise RunStopped(
            f"the policy's probabilities are infinite or not a number: it has diverged. {kept(place)}. Lower "
            f"LEARNING_RATE (now {settings.learning_rate:g}) and start anew"
        ) from error


def out_of_memory(remedies: list[str], peak: int, total: int) -> str:
    """What to change after CUDA ran out of memory. `peak` and `total` in bytes."""
    lines = "".join(f"\n  {i}. {remedy}" for i, remedy in enumerate(remedies, start=1))
    return (
        f"CUDA is out of memory: {peak / 1e9:.1f} GB of {total / 1e9:.1f} GB were in use at the peak. Change, in order "
        f"of effect:{lines}"
    )


# ---- while it trains


@contextmanager
def protected(trainer, run: Run, more_follows: bool = False):
    """Train within it: run.json says that the run has begun; a signal ends it after a step that a resumed run can go on
    from; a number that is none ends it before it reaches the weights. `more_follows`: this is not the last stage.

    Raises:
        RunStopped: one of these has happened, or the disk has no room for the checkpoints.
    """
    check_disk(trainer)
    run.begin(model_revision=getattr(trainer.model.config, "_commit_hash", None))
    if processes.is_main():
        shutil.rmtree(Path(trainer.args.output_dir) / SCRATCH, ignore_errors=True)  # what a killed run left
    guard = _Guard(trainer, "COLD_START_LEARNING_RATE" if more_follows else "LEARNING_RATE")
    # behind the callback that says when to save, before those that take long, which a stopping run leaves out
    trainer.callback_handler.callbacks.insert(1, guard)
    trainer.add_callback(_LastWord(guard))
    trainer.reward_funcs = [_finite(reward_func) for reward_func in getattr(trainer, "reward_funcs", [])]
    before = {number: signal.signal(number, guard.hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if guard.heard and more_follows:
        guard.stop(saved=trainer.args.output_dir)


class _Guard(TrainerCallback):
    """Saves and stops on a signal, and looks at the numbers before each step and each save."""

    def __init__(self, trainer, rate: str):
        self.trainer, self.rate = trainer, rate
        self.heard: signal.Signals | None = None  # the first signal

    def hear(self, number, frame):
        """Take SIGTERM and Ctrl-C as a wish to save and stop; the second one ends the process where it is."""
        if self.heard is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.heard = signal.Signals(number)
        if processes.is_main():
            message = f"\n{self.heard.name}: finishing this step, then saving; a second signal stops at once\n"
            os.write(2, message.encode())  # unlike print, safe in the middle of a print

    def on_train_begin(self, args, state, control, model, train_dataloader, optimizer, lr_scheduler, **kwargs):
        _check_weights(model, "the policy to start from")
        state.compute_steps(args, state.max_steps)  # or a resumed run saves and logs as often as before
        _set_rates(args, optimizer, lr_scheduler)
        # TRL's sampler shuffles anew each epoch, from where its generator stands, which no checkpoint holds
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # of several processes each has a shard around it
        for _ in range(int(state.epoch or 0) if getattr(args, "shuffle_dataset", False) else 0):
            next(iter(sampler))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        import torch

        # _tr_loss is the sum of the losses since the last log; it has no public name
        gradient = largest([p.grad for p in model.parameters() if p.grad is not None])
        for name, value in (("loss", self.trainer._tr_loss), ("gradient", gradient)):
            # in fp16 the loss scaler meets infinite gradients as a matter of course, and skips those steps
            if not torch.isfinite(value) and not (args.fp16 and name == "gradient"):
                # DeepSpeed has made its step by now
                weights = "" if self.trainer.is_deepspeed_enabled else "The weights were not changed; "
                raise RunStopped(
                    f"step {state.global_step + 1}: the {name} is {value.item()}. {weights}{kept(args.output_dir)}. "
                    f"Lower {self.rate} (now {args.learning_rate:g}), or look at the last samples for what came "
                    "before"
                )

    def on_step_end(self, args, state, control, model, **kwargs):
        at_cycles_end = state.global_step % generation_cycle(args) == 0
        if at_cycles_end and (heard := next(filter(None, processes.gathered(self.heard)), None)):
            self.heard = heard  # all stop after the same step
            control.should_save = control.should_training_stop = True
        if control.should_save:
            _check_weights(model, f"the policy after step {state.global_step}")

    def on_epoch_end(self, args, state, control, model, **kwargs):
        if control.should_save:
            _check_weights(model, f"the policy after step {state.global_step}")

    def stop(self, saved: str):
        raise RunStopped(
            f"{self.heard.name}: saved {saved}. Go on with\n  {resume_command()}",
            status=128 + self.heard,
            outcome="stopped",
        )


class _LastWord(TrainerCallback):
    """Comes after all other callbacks: where a signal ended the training, no final policy is saved."""

    def __init__(self, guard: _Guard):
        self.guard = guard

    def on_train_end(self, args, state, control, **kwargs):
        trainer = self.guard.trainer
        if self.guard.heard and state.global_step < state.max_steps:
            self.guard.stop(saved=f"{args.output_dir}/checkpoint-{state.global_step}")
        if trainer.is_fsdp_enabled:  # the final policy is one ordinary folder, however checkpoints are sharded
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


def _finite(reward_func):
    """`reward_func` under its own name, with an end to the run where it pays NaN or infinity: TRL would go on, and
    reads NaN as 'this function does not apply', for which a reward has None."""

    @functools.wraps(reward_func)
    def checked(*args, trainer_state, **kwargs):
        rewards = reward_func(*args, trainer_state=trainer_state, **kwargs)
        odd = [i for i, reward in enumerate(rewards) if reward is not None and not isfinite(reward)]
        if odd:
            raise RunStopped(
                f"step {trainer_state.global_step + 1}: {reward_func.__name__} paid {rewards[odd[0]]} for completion "
                f"{odd[0]} of {len(rewards)} ({len(odd)} such); a reward is a finite number, or None where it does not "
                "apply. The weights are those of the step before"
            )
        return rewards

    return checked


def _set_rates(args, optimizer, lr_scheduler) -> None:
    """Make a resumed optimizer use this start's settings, where they were allowed to change: it brings its own."""
    for group in optimizer.param_groups:
        group["lr"] *= args.learning_rate / group["initial_lr"]
        group["initial_lr"] = args.learning_rate
        if "betas" in group:
            group["betas"], group["eps"] = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
        if group["weight_decay"]:  # biases and norms have none
            group["weight_decay"] = args.weight_decay
    lr_scheduler.base_lrs = [args.learning_rate] * len(optimizer.param_groups)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the next step is logged with


def largest(tensors: list):
    """The largest absolute value in all of `tensors`, as a scalar tensor; not a number where one of them is not."""
    from torch.nn.utils import get_total_norm

    held_here = [tensor for tensor in tensors if tensor.numel()]  # ZeRO-3 leaves empty ones where others hold them
    norm = get_total_norm(held_here, norm_type=float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a policy that FSDP shards


def _check_weights(model, what: str) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():  # FSDP2 leaves the last layers whole after a forward pass without a backward pass
        if isinstance(module, FSDPModule):
            module.reshard()
    if not largest([p.detach() for p in model.parameters() if p.is_floating_point()]).isfinite():
        raise RunStopped(f"{what} holds weights that are infinite or not a number")

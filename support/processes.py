"""Several processes of one run, as `accelerate launch` starts them: who speaks, what one reads for all, what they agree
on, how they end. A script calls `end_at_once` before imports that take seconds, so: the standard library only."""

import atexit
import ctypes
import os
import re
import signal
import sys
import time


def end_at_once() -> None:
    """Ctrl-C ends the process where it is, without a word. A KeyboardInterrupt would be a traceback, or swallowed, or
    turned into another error, by the module in the middle of whose import it is raised.

    A process of several gets SIGTERM when its launcher ends, even by `kill -9`: none trains on alone, unseen."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if count() > 1:
        end_before_python_does()  # the first of all exit handlers, so that it comes last
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def raise_again() -> None:
    """Ctrl-C is a KeyboardInterrupt, as without `end_at_once`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def count() -> int:
    """Processes of this run; 1 where no launcher started it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process' number."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process on its machine, which says what is wrong there."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def is_sharded() -> bool:
    """Whether FSDP or DeepSpeed splits the policy, its gradients or its optimizer between processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


# remarks of Transformers about what is as it should be
REMARKS = re.compile(r"new PAD/BOS/EOS|clean_up_tokenization_spaces|lm_head\.weight")


def quiet() -> None:
    """Leave out what a user can do nothing about: Transformers' bars for files that are read or written in a moment,
    and `REMARKS`. All but the main process print errors alone."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for handler in logging.get_logger("transformers").handlers:
        handler.addFilter(lambda record: not REMARKS.search(record.getMessage()))
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def linger() -> None:
    """Give the main process time to end first: when one ends, the launcher ends the others in the middle of a word."""
    if not is_main():
        time.sleep(5)


def on_main(call, *args):
    """What `call(*args)` returns on the main process, on every process. An error there ends the others as well: they
    wait, and the launcher ends them."""
    if count() == 1:
        return call(*args)
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([call(*args) if is_main() else None])[0]


def gathered(value) -> list:
    """Every process' value, in the order of their ranks, on every process."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def wait() -> None:
    """Until every process is here."""
    gathered(None)


_has_parted = False


def part() -> None:
    """Leave together, with nothing left to do: the main process may still be saving, and one that ends with connections
    open can abort."""
    global _has_parted
    if count() > 1:
        wait()
        leave_groups()
        _has_parted = True


def leave_groups() -> None:
    """Destroy torch's process groups, of which vLLM makes some in a single process too: torch complains of one that is
    there at the end. vLLM destroys its own first: its exit handler fails where they are gone already."""
    from torch import distributed

    if vllm := sys.modules.get("vllm.distributed"):
        vllm.cleanup_dist_env_and_memory()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end_before_python_does() -> None:
    """Have a process that has parted end behind all exit handlers that are registered after this. Python would take
    itself apart next, while gloo's threads may still hold its tensors: it then aborts, with all of it saved (PyTorch
    #179291)."""
    atexit.register(_end)


def _end() -> None:
    if _has_parted:
        sys.stdout.flush()
        os._exit(0)


def is_of_a_peer(error: Exception) -> bool:
    """Whether this is how another process' end shows here."""
    return count() > 1 and bool(re.search("onnection (closed|reset|refused)|NCCL|[gG]loo|Broken pipe", str(error)))

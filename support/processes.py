"""Several processes of one run, as `accelerate launch` starts them. A script calls `end_at_once` before imports that
take seconds, so only the standard library is imported here."""

import atexit
import ctypes
import os
import re
import signal
import sys
import time

# what Transformers warns of although it is as it should be
REMARKS = re.compile(r"new PAD/BOS/EOS|clean_up_tokenization_spaces|lm_head\.weight")

_has_parted = False


def end_at_once() -> None:
    """Ctrl-C ends the process and prints nothing, unlike a KeyboardInterrupt in the middle of an import. One
    of several processes also gets SIGTERM when its launcher ends, even by `kill -9`, instead of training on alone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if count() > 1:
        atexit.register(_end_after_parting)  # Python calls what is registered first last
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def count() -> int:
    """Processes of this run; 1 where no launcher started it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process' number."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    return rank() == 0


def is_sharded() -> bool:
    """Whether FSDP or DeepSpeed splits the policy, its gradients or its optimizer between processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def quiet() -> None:
    """Turn off Transformers' progress bars and `REMARKS`, and what every process but the main one prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for handler in logging.get_logger("transformers").handlers:
        handler.addFilter(lambda record: not REMARKS.search(record.getMessage()))
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def linger() -> None:
    """Let the main process end first: when one ends, the launcher ends the others, in the middle of a message."""
    if not is_main():
        time.sleep(5)


def gathered(value) -> list:
    """Every process' value, in the order of their ranks, on every process."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def on_main(call, *args):
    """What `call(*args)` returns on the main process, on every process."""
    return gathered(call(*args) if is_main() else None)[0]


def wait() -> None:
    """Until every process is here."""
    gathered(None)


def part() -> None:
    """Leave together: the main process may still be saving, and one that ends with connections open can abort."""
    global _has_parted
    if count() > 1:
        wait()
        leave_groups()
        _has_parted = True


def _end_after_parting() -> None:
    """Skip Python's cleaning up: gloo's threads may hold its tensors, and it would abort (PyTorch issue 179291)."""
    if _has_parted:
        sys.stdout.flush()
        os._exit(0)


def leave_groups() -> None:
    """Destroy torch's process groups, of which torch complains at the end. vLLM, which makes some in a single process
    too, comes first: its exit handler fails where they are gone."""
    from torch import distributed

    if vllm := sys.modules.get("vllm.distributed"):
        vllm.cleanup_dist_env_and_memory()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_of_a_peer(error: Exception) -> bool:
    """Whether this is how another process' end shows here."""
    return count() > 1 and bool(re.search("onnection (closed|reset|refused)|NCCL|[gG]loo|Broken pipe", str(error)))

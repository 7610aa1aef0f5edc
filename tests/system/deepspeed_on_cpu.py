"""A command with DeepSpeed's ZeRO on a CPU, without --use_cpu, at which accelerate would leave DeepSpeed out:

    accelerate launch --config_file zero3.yaml tests/system/deepspeed_on_cpu.py train_grpo.py FLAGS


accelerate knows no backend for a machine without an accelerator, and the recipe takes a run without --use_cpu for one
on a GPU. Here both are told otherwise; the sharding is DeepSpeed's own, over gloo.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # of ninja: DeepSpeed compiles a part of itself

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # as the script itself does first of all

from accelerate.state import PartialState
from accelerate.utils import DistributedType

import cold_start
import train_grpo
from support import preflight

PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
preflight._hardware = lambda flags: []

if __name__ == "__main__":
    {"train_grpo.py": train_grpo, "cold_start.py": cold_start}[sys.argv.pop(1)].main()

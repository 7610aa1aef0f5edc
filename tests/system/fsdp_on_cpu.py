"""A command with FSDP2 on a CPU:

    accelerate launch --config_file fsdp2.yaml tests/system/fsdp_on_cpu.py train_grpo.py FLAGS

accelerate reads its FSDP flags on accelerators alone, and so the recipe refuses them on a CPU. Here both look away; the
sharding itself is torch's own, over gloo.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import processes

if __name__ == "__main__":
    processes.end_at_once()  # as the script itself does first of all

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import cold_start
import train_grpo
from support import preflight

begin, hardware = AcceleratorState.__init__, preflight._hardware


def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = begin_sharded
preflight._hardware = lambda flags: [line for line in hardware(flags) if "shards on GPUs alone" not in line]

if __name__ == "__main__":
    {"train_grpo.py": train_grpo, "cold_start.py": cold_start}[sys.argv.pop(1)].main()

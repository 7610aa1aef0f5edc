"""train_grpo.py with FSDP2 on a CPU: `accelerate launch --config_file fsdp2.yaml tests/fsdp_on_cpu.py FLAGS`.

accelerate reads its FSDP flags on accelerators alone, and so the recipe refuses them on a CPU. Here both look away; the
sharding itself is torch's own, over gloo.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_grpo
from support import preflight

begin, hardware = AcceleratorState.__init__, preflight._hardware


def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    kinds = (DistributedType.MULTI_CPU, DistributedType.FSDP)  # the latter after a stage that was sharded
    if fsdp_plugin is not None and self.distributed_type in kinds and "fsdp_plugin" not in self.__dict__:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = begin_sharded
preflight._hardware = lambda flags: [line for line in hardware(flags) if "shards on GPUs alone" not in line]

if __name__ == "__main__":
    train_grpo.main()

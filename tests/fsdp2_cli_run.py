# SPDX-License-Identifier: Apache-2.0
"""`hf-aace train` under a configuration for FSDP2, which accelerate selects only for GPUs: this selects it for the CPU."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hf_aace import AACETrainer
from hf_aace.cli import main


def create_accelerator_and_postprocess(self, create=AACETrainer.create_accelerator_and_postprocess):
    create(self)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.accelerator.state.distributed_type = DistributedType.FSDP
    self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from what the launcher set
    self.is_fsdp_enabled = True


if __name__ == "__main__":
    AACETrainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess
    sys.exit(main())

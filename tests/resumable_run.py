# SPDX-License-Identifier: Apache-2.0
"""A run that test_resume.py starts in another process, to kill it there."""

import os
import signal
import sys

import torch
from tiny import MODELS, digits, training_arguments
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer


class Killer(TrainerCallback):
    """SIGKILL in the middle of an accumulation: nothing can be tidied up."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(name, output_dir, scope, every, callbacks=None):
    torch.set_num_threads(1)
    arguments = training_arguments(
        AACEConfig,
        output_dir,
        max_steps=20,
        rho=0.05,
        ascent_scope=scope,
        ascent_every=int(every),
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=4,
    )
    return AACETrainer(MODELS[name](dropout=0.2), arguments, train_dataset=digits(), callbacks=callbacks)


if __name__ == "__main__":
    name, output_dir, scope, every = sys.argv[1:]
    make_trainer(name, output_dir, scope, every, [Killer(10)]).train()

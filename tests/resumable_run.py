# SPDX-License-Identifier: Apache-2.0
"""The runs that test_resume.py has killed, each in a process of its own: `resumable_run.py FOLDER`."""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny import MODELS, digits, training_arguments
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer


# The model, `ascent_scope`, `ascent_every`.
CASES = [("convnext", "micro_batch", 1), ("vit", "full_batch", 1), ("vit", "micro_batch", 3)]


class Killer(TrainerCallback):
    """SIGKILL in the middle of an accumulation: nothing can be tidied up."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def folder_of(case) -> str:
    return "-".join(map(str, case))


def make_trainer(case, output_dir, callbacks=None):
    name, scope, every = case
    arguments = training_arguments(
        AACEConfig,
        output_dir,
        max_steps=20,
        rho=0.05,
        ascent_scope=scope,
        ascent_every=every,
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=4,
    )
    return AACETrainer(MODELS[name](dropout=0.2), arguments, train_dataset=digits(), callbacks=callbacks)


def main(folder):
    torch.set_num_threads(1)
    for case in CASES:
        child = os.fork()  # importing everything once takes longer than the runs
        if child == 0:
            make_trainer(case, folder / folder_of(case), [Killer(10)]).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the run {case} was not killed, it ended with status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

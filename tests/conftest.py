# SPDX-License-Identifier: Apache-2.0
import functools
import gc
import logging as python_logging
import os
from types import SimpleNamespace


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from comparison import rng_states, run
from tiny import MODELS
from transformers import Trainer, TrainingArguments
from transformers.utils import logging


torch.set_num_threads(1)  # models this small only wait for a second one


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _quiet_quick_and_reproducible():
    logging.set_verbosity_error()
    torch.manual_seed(0)
    gc.freeze()  # or the `gc.collect()` in each `train()` visits all of Transformers, which takes longer than training
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory):
    """
    Runs of plain Trainer, each made once for all tests that compare with it: `plain_run(name, dropout, **settings)` gives its
    `trainer`, its `folder`, and the `rng` that it left. Copy what a test changes.
    """

    @functools.cache
    def made(name, dropout=0.0, **settings):
        folder = tmp_path_factory.mktemp(f"plain-{name}")
        trainer = run(Trainer, TrainingArguments, lambda: MODELS[name](dropout=dropout), folder, **settings)
        return SimpleNamespace(trainer=trainer, folder=folder, rng=rng_states())

    return made


@pytest.fixture
def warnings():
    """The texts of all warnings of the package, from whichever of its modules."""
    said = []

    class Keep(python_logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    keep = Keep(python_logging.WARNING)
    python_logging.getLogger("hf_aace").addHandler(keep)
    yield said
    python_logging.getLogger("hf_aace").removeHandler(keep)

# SPDX-License-Identifier: Apache-2.0
import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
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

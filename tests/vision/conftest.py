# SPDX-License-Identifier: Apache-2.0
import logging

import pytest


@pytest.fixture
def warnings():
    """The texts of all warnings of the package, from whichever of its modules."""
    said = []

    class Keep(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger("hf_aace").addHandler(keep)
    yield said
    logging.getLogger("hf_aace").removeHandler(keep)

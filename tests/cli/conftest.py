# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import datasets
import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def drawn():
    """For tests that open the pictures."""


@pytest.fixture(autouse=True)
def _pictures_are_left_out(request, monkeypatch):
    """To draw one takes a third of the time of a tiny run. What module fixtures leave is drawn, and what a test asks for by `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: Path(path).touch())

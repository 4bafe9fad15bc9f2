# SPDX-License-Identifier: Apache-2.0
"""The package can be imported from where people put their scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_aace


@pytest.mark.parametrize("start", ["script", "module", "command line"])
def test_a_script_beside_the_clone_imports_the_package(start, tmp_path):
    """The folder of the clone has the package's name: it must not be taken for a namespace package."""
    (tmp_path / "hf_aace").symlink_to(Path(__file__).parents[1], target_is_directory=True)
    (tmp_path / "train_me.py").write_text("from hf_aace import __version__\nprint(__version__)\n")
    words = {"script": ["train_me.py"], "module": ["-m", "train_me"], "command line": ["-c", "import train_me"]}[start]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == hf_aace.__version__, done.stderr

# SPDX-License-Identifier: Apache-2.0
"""The README: its example runs, its commands have the options that it names, and its results are those of the study."""

import json
import re
import shlex
from pathlib import Path

import pytest

from hf_aace.cli import main


_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", _README, flags=re.DOTALL | re.MULTILINE)


def _commands():
    """Each `hf-aace` command in the README, as words."""
    lines = "\n".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in re.split("&&|;", line)]
    return [words[words.index("hf-aace") + 1 :] for words in commands if "hf-aace" in words]


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert "eval_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({words[0] for words in _commands()}))
def test_every_option_that_is_named_exists(command, capsys):
    also = ["train"] if command in ("compare", "find-rho") else []  # they take its options too
    for each in [command, *also]:
        with pytest.raises(SystemExit):
            main([each, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = {word for words in _commands() if words[0] == command for word in words if word.startswith("--")}
    assert named <= known


def test_the_results_are_those_of_the_runs():
    """As notebook 4 computes them, by the functions that it defines."""
    folder = _ROOT / "notebooks"
    notebook = json.loads((folder / "04_does_it_help.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"STUDY": folder / "study"}
    for source in cells:
        if re.search("^def ", source, flags=re.MULTILINE):
            exec(compile(source, "04_does_it_help.ipynb", "exec"), names)
    computed = [names["line"](name) for name in names["LINES"]]
    assert [line for line in _README.splitlines() if re.search(r"\| `[a-z]+(-[a-z]+)+` \|", line)] == computed

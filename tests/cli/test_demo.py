# SPDX-License-Identifier: Apache-2.0
"""`hf-aace demo`: it says what was gained, and no more than that."""

import json
from pathlib import Path

import pytest

from hf_aace.cli import main


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.04, "AACE 84.0 %: 4.0 points more (standard error 1.0, 3 seeds)"),
        (-0.04, "AACE 76.0 %: 4.0 points less (standard error 1.0, 3 seeds)"),
        (0.015, "AACE 81.5 %: a difference of +1.5 points, which may be chance (standard error 1.0, 3 seeds)"),
    ],
)
def test_the_sentence_follows_the_numbers(gain, expected, monkeypatch, capsys):
    def compare(argv):
        folder = Path(argv[argv.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        methods = [{"accuracy": 0.8}, {"accuracy": 0.8 + gain, "gain": gain, "gain_standard_error": 0.01}]
        (folder / "summary.json").write_text(json.dumps({"methods": methods}))

    monkeypatch.setattr("hf_aace.cli.compare.run", compare)
    assert main(["demo"]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--seeds", "1"], "`seeds` must be at least 2"), (["--output_dir", "file"], "is no folder")],
)
def test_bad_input_is_told(argv, expected, capsys):
    Path("file").touch()
    assert main(["demo", *argv]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_and_leaves_its_picture(capsys):
    assert main(["demo", "--seeds", "2"]) == 0
    assert "With 40 % of the training labels wrong" in capsys.readouterr().out
    assert Path("runs/demo/accuracy.png").is_file()

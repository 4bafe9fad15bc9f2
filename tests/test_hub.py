# SPDX-License-Identifier: Apache-2.0
"""Loading from the Hub and pushing to it, by the real client, with a stand-in for the Hub on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from hf_aace.cli import main
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.models import load_model_and_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(folder):
    command = [sys.executable, Path(__file__).with_name("hub_run.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def failed(result):
    """Return the one sentence of a command that ended with exit code 1."""
    assert result["code"] == 1
    assert result["last"].startswith("hf-aace: error: ")
    return result["last"]


def test_a_model_and_data_from_the_hub_are_trained_and_pushed(online, folder):
    assert online["train"] == {"code": 0, "last": "Pushed:  someone/pushed"}
    assert [repository for repository, _ in online["commits"]] == ["someone/pushed"] * 3
    assert online["commits"][-1][1] == "End of training"
    local, pushed = load_file(folder / "pushed/model.safetensors"), folder / "hub/models/someone/pushed"
    assert all((local[name] == tensor).all() for name, tensor in load_file(pushed / "model.safetensors").items())
    # The results are pushed too, the checkpoints and what is set aside are not.
    assert {"README.md", "all_results.json", "training_curves.png", "preprocessor_config.json"} <= {
        path.name for path in pushed.iterdir()
    }
    assert not list(pushed.glob("*checkpoint*"))


def test_the_pushed_model_classifies_by_its_id(online):
    assert online["pipeline"] == ["black", "white"]
    assert online["evaluate"]["code"] == 0


def test_the_pushed_card_names_what_the_model_comes_from(online, folder):
    card = ModelCard.load(folder / "hub/models/someone/pushed/README.md")
    assert card.data.base_model == "someone/vit"
    assert card.data.datasets == ["someone/colours"]
    assert card.data.license == "apache-2.0"  # that of the base model, which the Hub knows
    assert 'pipeline("image-classification", model="someone/pushed")' in card.text
    results = json.loads((folder / "pushed/all_results.json").read_text())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", results["eval_accuracy"])


def test_what_the_hub_does_not_have_is_named(online):
    assert "`model_name_or_path` is 'someone/nothing'" in failed(online["unknown model"])
    assert "`dataset_name` is 'someone/nothing'" in failed(online["unknown data"])


def test_a_wrong_token_is_told_before_training(online, folder):
    message = failed(online["wrong token"])
    assert "could not be made on the Hub" in message and "401" in message and "hf auth login" in message
    assert not (folder / "runs" / "vit-colours").exists()


def test_a_model_that_cannot_be_pushed_is_kept(online, folder):
    message = failed(online["push fails"])
    assert "The model is trained and whole in kept" in message and "hf upload someone/pushed kept" in message
    assert (folder / "kept/model.safetensors").is_file()
    assert "eval_accuracy" in json.loads((folder / "kept/all_results.json").read_text())


def test_no_network_is_told(online):
    assert "couldn't connect to 'http://127.0.0.1" in failed(online["no network"])
    assert "could not be made on the Hub" in failed(online["no network to push"])


def test_offline_the_cache_serves(online, folder, monkeypatch, capsys):
    """This process is offline (`conftest.py`): it gets the cache that the other one has filled."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "home/hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "home/datasets"))
    monkeypatch.chdir(folder)
    model, _ = load_model_and_processor("someone/vit", {0: "black", 1: "white"})
    assert model.config.id2label == {0: "black", 1: "white"}
    data = load_image_dataset("someone/colours", seed=0)
    assert {split: part.num_rows for split, part in data.items()} == {"train": 20, "test": 6}
    assert main(["train", "--model_name_or_path", "someone/other"]) == 1
    assert "`model_name_or_path` is 'someone/other'" in capsys.readouterr().err

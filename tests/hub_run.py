# SPDX-License-Identifier: Apache-2.0
"""
Runs for test_hub.py, in a process whose environment points the real client at a Hub of its own before anything that reads it is
imported. Prints what each step gave, as JSON in its last line.
"""

import contextlib
import gc
import io
import json
import os
from pathlib import Path
from unittest import mock

from hub import USER, Hub


TINY = "--max_steps 2 --save_steps 1 --save_strategy steps --disable_tqdm true --use_cpu true".split()


def command(main, *argv):
    """Runs the command in this process: its exit code and the last line that it leaves."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    lines = (err if code else out).getvalue().strip().splitlines()
    return {"code": code, "last": lines[-1] if lines else ""}


def prepare(root):
    """A small ViT and a small data set, as their owner would have pushed them."""
    import datasets
    import PIL.Image
    from transformers import set_seed

    from hf_aace.vision.models import load_model_and_processor

    set_seed(0)
    model, processor = load_model_and_processor("vit-tiny-digits", {0: "cat", 1: "dog", 2: "cow"})
    model.save_pretrained(root / "models" / USER / "vit")
    processor.save_pretrained(root / "models" / USER / "vit")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["black", "white"]))
    images = [PIL.Image.new("RGB", (10, 12), name) for name in ["black", "white"] * 10]
    for split, count in (("train", 20), ("test", 6)):
        rows = {"image": images[:count], "label": [0, 1] * (count // 2)}
        path = root / "datasets" / USER / "colours" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def online(folder):
    results = {}
    with Hub(folder / "hub") as hub:
        os.environ.clear()
        os.environ.update(hub.environment(folder / "home"))

        import huggingface_hub
        from transformers import pipeline
        from transformers.utils import logging

        from hf_aace.cli import main

        logging.set_verbosity_error()
        huggingface_hub.utils.disable_progress_bars()
        prepare(hub.root)
        gc.freeze()  # as in conftest.py
        model, data = f"{USER}/vit", f"{USER}/colours"
        train = ["train", *TINY, "--model_name_or_path", model, "--dataset_name", data]
        push = ["--push_to_hub", "true", "--hub_model_id", f"{USER}/pushed"]

        # Trainer leaves out a push while the one before it is on its way, and saves over what that one is reading.
        with mock.patch.object(huggingface_hub.HfApi, "run_as_future", _wait_for(huggingface_hub.HfApi.run_as_future)):
            results["train"] = command(main, *train, *push, "--output_dir", "pushed")
        results["commits"] = hub.commits.copy()
        answers = pipeline("image-classification", model=f"{USER}/pushed", device="cpu")(_white())
        results["pipeline"] = sorted(answer["label"] for answer in answers)
        evaluate = f"evaluate --model_name_or_path {USER}/pushed --dataset_name {data} --output_dir evaluated"
        results["evaluate"] = command(main, *evaluate.split())
        results["unknown model"] = command(main, "train", *TINY, "--model_name_or_path", f"{USER}/nothing")
        results["unknown data"] = command(main, "train", *TINY, "--dataset_name", f"{USER}/nothing")
        results["wrong token"] = command(
            main, *train, "--push_to_hub", "true", "--hub_model_id", f"{USER}/new", "--hub_token", "hf_wrong"
        )
        hub.broken = True
        results["push fails"] = command(main, *train, *push, "--output_dir", "kept")
    huggingface_hub.close_session()  # what is kept open would break off, which is not how a network that is not there fails
    with mock.patch("time.sleep"):  # between the attempts to reach the Hub, which is gone
        results["no network"] = command(main, "train", *TINY, "--model_name_or_path", f"{USER}/other")
        results["no network to push"] = command(main, "train", *TINY, *push)
    return results


def _wait_for(run_as_future):
    def run(*args, **kwargs):
        future = run_as_future(*args, **kwargs)
        future.result()  # a push that fails is told, where Trainer would go on
        return future

    return run


def _white():
    import PIL.Image

    return PIL.Image.new("RGB", (10, 12), "white")


if __name__ == "__main__":
    print("\n" + json.dumps(online(Path.cwd())))

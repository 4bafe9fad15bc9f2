# SPDX-License-Identifier: Apache-2.0
"""The local metrics against their definitions, and as `evaluate` and Trainer use them."""

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_aace.vision.metrics import compute_metrics_fn, load_metric, predicted_classes


REFERENCES = [0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 1, 1, 2, 2]
# F1 = 2 TP / (2 TP + FP + FN), by hand: 4/5, 2/4, 2/3.
EXPECTED = {
    "accuracy": 4 / 6,
    "macro_f1": (4 / 5 + 2 / 4 + 2 / 3) / 3,
    "confusion_matrix": [[2, 1, 0], [0, 1, 1], [0, 0, 1]],
}
LOCAL = ["accuracy", "macro_f1", "confusion_matrix"]


def expected(name):
    value = EXPECTED[name]
    return {name: value if name == "confusion_matrix" else pytest.approx(value, rel=1e-12)}


@pytest.mark.parametrize("name", LOCAL)
def test_compute_follows_the_definition(name):
    assert load_metric(name).compute(predictions=PREDICTIONS, references=REFERENCES) == expected(name)


@pytest.mark.parametrize("name", LOCAL)
def test_batches_add_up(name):
    metric = load_metric(name)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.add_batch(predictions=PREDICTIONS[part], references=REFERENCES[part])
    assert metric.compute() == expected(name)


@pytest.mark.parametrize("name", LOCAL)
def test_metrics_in_use_at_once_do_not_mix(name):
    first, second = load_metric(name), load_metric(name)
    first.add_batch(predictions=PREDICTIONS, references=REFERENCES)
    second.add_batch(predictions=REFERENCES, references=PREDICTIONS[::-1])
    assert first.compute() == expected(name)


def test_local_metrics_write_no_cache_file(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    for name in LOCAL:
        load_metric(name).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_local_metrics_combine():
    combined = evaluate.combine([load_metric(name) for name in LOCAL])
    result = combined.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == expected("accuracy") | expected("macro_f1") | expected("confusion_matrix")


def test_confusion_matrix_has_a_row_for_a_class_that_does_not_occur():
    result = load_metric("confusion_matrix").compute(predictions=[0, 2], references=[0, 0], num_classes=4)
    assert result == {"confusion_matrix": [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]}


def test_results_are_plain_numbers_that_json_can_write():
    result = compute_metrics_fn(LOCAL)(EvalPrediction(predictions=np.eye(3)[PREDICTIONS], label_ids=REFERENCES))
    assert {type(result["accuracy"]), type(result["macro_f1"]), type(result["confusion_matrix"][0][0])} == {float, int}


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_metrics_takes_the_class_with_the_highest_logit(as_tuple):
    logits = np.eye(3)[PREDICTIONS] - 5
    predictions = (logits, np.zeros((6, 7))) if as_tuple else logits
    compute_metrics = compute_metrics_fn(["accuracy", "macro_f1"])
    for _ in range(2):  # nothing is left over from one evaluation to the next
        result = compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array(REFERENCES)))
        assert result == expected("accuracy") | expected("macro_f1")
    assert predicted_classes(predictions).tolist() == PREDICTIONS


def test_no_metrics_are_no_metrics():
    assert compute_metrics_fn([])(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1]))) == {}


def test_other_names_go_to_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load", lambda name, **kwargs: asked.append((name, kwargs)))
    load_metric("someone/something")
    assert asked == [("someone/something", {"keep_in_memory": True})]


def test_unknown_metric_is_refused(monkeypatch):
    def fail(name, **kwargs):
        raise FileNotFoundError("Couldn't find it.")

    monkeypatch.setattr(evaluate, "load", fail)
    with pytest.raises(ValueError, match="no metric 'acuracy': it is none of accuracy, macro_f1, confusion_matrix"):
        compute_metrics_fn(["acuracy"])

# SPDX-License-Identifier: Apache-2.0
"""The local metrics against their definitions, and as Trainer uses them."""

import json

import datasets
import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_aace.vision.metrics import compute_metrics_fn, predicted_classes


REFERENCES = [0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 1, 1, 2, 2]
# F1 = 2 TP / (2 TP + FP + FN), by hand: 4/5, 2/4, 2/3.
EXPECTED = {"accuracy": 4 / 6, "macro_f1": (4 / 5 + 2 / 4 + 2 / 3) / 3}


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_metrics_takes_the_class_with_the_highest_logit(as_tuple):
    logits = np.eye(3)[PREDICTIONS] - 5
    predictions = (logits, np.zeros((6, 7))) if as_tuple else logits
    compute_metrics = compute_metrics_fn(["accuracy", "macro_f1"])
    for _ in range(2):  # nothing is left over from one evaluation to the next
        result = compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array(REFERENCES)))
        assert json.loads(json.dumps(result)) == pytest.approx(EXPECTED, rel=1e-12)  # numbers that a report can hold
    assert predicted_classes(predictions).tolist() == PREDICTIONS


def test_a_class_that_is_never_predicted_counts_as_0_without_a_warning(recwarn):
    prediction = EvalPrediction(predictions=np.eye(2)[[0, 0]], label_ids=np.array([0, 1]))
    assert compute_metrics_fn(["macro_f1"])(prediction) == {"macro_f1": pytest.approx((2 / 3 + 0) / 2)}
    assert not recwarn.list


def test_no_metrics_are_no_metrics():
    assert compute_metrics_fn([])(EvalPrediction(predictions=np.eye(2), label_ids=np.array([0, 1]))) == {}


class CountOfHits(evaluate.Metric):
    """A metric as the Hub has them."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        return {"hits": sum(map(int.__eq__, predictions, references)), "accuracy": 99.0}


def test_other_names_go_to_the_hub_and_stand_beside_the_local_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluate, "load", lambda name, **kwargs: asked.append((name, kwargs)) or CountOfHits(keep_in_memory=True)
    )
    compute_metrics = compute_metrics_fn(["someone/something", "accuracy"])
    assert asked == [("someone/something", {"keep_in_memory": True})]
    result = compute_metrics(EvalPrediction(predictions=np.eye(3)[PREDICTIONS], label_ids=np.array(REFERENCES)))
    assert result == {"accuracy": pytest.approx(4 / 6), "hits": 4}, "studies choose by `accuracy`, which is ours"


def test_unknown_metric_is_refused(monkeypatch):
    def fail(name, **kwargs):
        raise FileNotFoundError("Couldn't find it.")

    monkeypatch.setattr(evaluate, "load", fail)
    with pytest.raises(
        ValueError, match="no metric 'acuracy': it is none of accuracy, macro_f1, which need no network"
    ):
        compute_metrics_fn(["acuracy"])

# SPDX-License-Identifier: Apache-2.0
"""Metrics as `evaluate.Metric` that need no Hub, and the bridge from them to the `compute_metrics` of a Trainer."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import EvalPrediction


_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12 (2011)."
_INPUTS = """
Args:
    predictions (`list[int]`): Predicted classes.
    references (`list[int]`): True classes.
"""


def _metric_info(description: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=_INPUTS,
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
    )


class Accuracy(evaluate.Metric):
    """Share of the predictions that are right, as `accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Share of the predictions that are right.")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    """Unweighted mean over the classes of the F1 score, as `macro_f1`."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Unweighted mean over the classes of the F1 score.")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class ConfusionMatrix(evaluate.Metric):
    """
    Counts of samples as `confusion_matrix`, nested lists: a row for each true class, a column for each predicted one.
    `compute` takes the number of classes as `num_classes`; without it, only the classes that occur have rows and columns.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Counts of samples by true class (rows) and predicted class (columns).")

    def _compute(
        self, predictions: list[int], references: list[int], num_classes: int | None = None
    ) -> dict[str, list[list[int]]]:
        labels = None if num_classes is None else range(num_classes)
        return {"confusion_matrix": confusion_matrix(references, predictions, labels=labels).tolist()}


LOCAL_METRICS = {"accuracy": Accuracy, "macro_f1": MacroF1, "confusion_matrix": ConfusionMatrix}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """
    Loads a metric by name.

    Args:
        name (`str`):
            `"accuracy"`, `"macro_f1"` or `"confusion_matrix"`, which need no network; or any name that
            [`evaluate.load`] knows.

    Returns:
        `evaluate.EvaluationModule`: The metric. It keeps what it is given in memory, since processes that evaluate at
        the same time would share a cache file.

    Raises:
        `ValueError`: If there is no such metric.
    """
    if name in LOCAL_METRICS:
        return LOCAL_METRICS[name](keep_in_memory=True)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no metric {name!r}: it is none of {', '.join(LOCAL_METRICS)}, which need no network, and could "
            f"not be loaded from the Hub: {error}"
        ) from error


def compute_metrics_fn(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, Any]]:
    """
    Makes a function for the `compute_metrics` argument of [`~transformers.Trainer`].

    Args:
        names (`Sequence[str]`):
            The metrics, by the names that [`load_metric`] knows.

    Returns:
        `Callable`: A function from an [`~transformers.EvalPrediction`] to the values of the metrics for the class with
        the highest logit.

    Raises:
        `ValueError`: If there is no metric of one of the names.
    """
    metrics = evaluate.combine([load_metric(name) for name in names])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, Any]:
        return metrics.compute(predictions=predicted_classes(prediction.predictions), references=prediction.label_ids)

    return compute_metrics


def predicted_classes(predictions: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    """
    The class with the highest logit for each sample.

    Args:
        predictions (`np.ndarray` or `tuple[np.ndarray, ...]`):
            The logits; or, from models that return more (hidden states, say), a tuple of which they are the first.
    """
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.argmax(axis=-1)

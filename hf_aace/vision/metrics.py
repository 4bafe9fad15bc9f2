# SPDX-License-Identifier: Apache-2.0
"""Compute metrics for the Trainer: those of scikit-learn without a network, any other by its name on the Hub."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import EvalPrediction


# From true and predicted classes. Counts have a row for each true class and a column for each predicted one.
LOCAL_METRICS = {
    "accuracy": accuracy_score,
    "macro_f1": lambda true, predicted: f1_score(true, predicted, average="macro", zero_division=0),
    "confusion_matrix": lambda true, predicted, num_classes=None: confusion_matrix(
        true, predicted, labels=num_classes and range(num_classes)
    ),
}


class _ScikitLearnMetric(evaluate.Metric):
    """One of `LOCAL_METRICS`, by its name as `config_name`, for what combines and evaluates metrics of the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"The {self.config_name} of scikit-learn.",
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12 (2011).",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], **options) -> dict[str, Any]:
        value = LOCAL_METRICS[self.config_name](references, predictions, **options)
        return {self.config_name: np.asarray(value).tolist()}  # numbers that JSON can write


def load_metric(name: str) -> evaluate.EvaluationModule:
    """
    Load a metric by name.

    Args:
        name (`str`):
            `"accuracy"`, `"macro_f1"` (unweighted mean of the F1 scores of the classes) or `"confusion_matrix"` (nested lists,
            with a row for each true class; `compute` takes `num_classes`, by default only classes that occur have rows and
            columns), which need no network; or any name that [`evaluate.load`] knows.

    Returns:
        `evaluate.EvaluationModule`: The metric. It keeps its inputs in memory, since processes that evaluate at the same time
        would share a cache file.

    Raises:
        `ValueError`: If there is no such metric.
    """
    if name in LOCAL_METRICS:
        return _ScikitLearnMetric(name, keep_in_memory=True)
    try:
        return evaluate.load(name, keep_in_memory=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no metric {name!r}: it is none of {', '.join(LOCAL_METRICS)}, which need no network, and could "
            f"not be loaded from the Hub: {error}"
        ) from error


def compute_metrics_fn(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, Any]]:
    """
    Make a function for the `compute_metrics` argument of [`~transformers.Trainer`].

    Args:
        names (`Sequence[str]`): The metrics, by the names that [`load_metric`] knows.

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
    Find the class with the highest logit for each sample.

    Args:
        predictions (`np.ndarray` or `tuple[np.ndarray, ...]`):
            The logits, of shape `(samples, classes)`; or a tuple that begins with them, from models that return more.

    Returns:
        `np.ndarray` of shape `(samples,)`: The numbers of the classes.
    """
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.argmax(axis=-1)

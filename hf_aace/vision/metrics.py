# SPDX-License-Identifier: Apache-2.0
"""Compute metrics for the Trainer: those of scikit-learn without a network, any other by its name on the Hub."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction


# From the true and the predicted classes.
LOCAL_METRICS = {
    "accuracy": accuracy_score,
    "macro_f1": functools.partial(f1_score, average="macro", zero_division=0),
}


def compute_metrics_fn(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, Any]]:
    """
    Make a function for the `compute_metrics` argument of [`~transformers.Trainer`].

    Args:
        names (`Sequence[str]`):
            The metrics: `"accuracy"` or `"macro_f1"` (unweighted mean of the F1 scores of the classes), which need no network, or any
            name that [`evaluate.load`] knows.

    Returns:
        `Callable`: A function from an [`~transformers.EvalPrediction`] to the values of the metrics for the class with
        the highest logit.

    Raises:
        `ValueError`: If there is no metric of one of the names.
    """
    local = {name: LOCAL_METRICS[name] for name in names if name in LOCAL_METRICS}
    others = evaluate.combine([_load_metric(name) for name in names if name not in LOCAL_METRICS])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, Any]:
        true, predicted = prediction.label_ids, predicted_classes(prediction.predictions)
        scores = {name: float(score(true, predicted)) for name, score in local.items()}
        return others.compute(predictions=predicted, references=true) | scores

    return compute_metrics


def _load_metric(name: str) -> evaluate.EvaluationModule:
    try:
        # In memory, since processes that evaluate at the same time would share a cache file.
        return evaluate.load(name, keep_in_memory=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no metric {name!r}: it is none of {', '.join(LOCAL_METRICS)}, which need no network, and could "
            f"not be loaded from the Hub: {error}"
        ) from error


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

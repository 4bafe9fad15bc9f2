# SPDX-License-Identifier: Apache-2.0
"""A callback that draws the training curves in a notebook while the trainer trains."""

import io
import time

from transformers import TrainerCallback
from transformers.utils import is_in_notebook

from .plots import training_curves


class LiveCurvesCallback(TrainerCallback):
    """
    Callback that draws the training curves in a notebook during training, in one picture that is updated. Outside of
    notebooks it does nothing.

    Args:
        min_seconds (`float`, *optional*, defaults to `2.0`):
            Shortest time between two drawings. One takes some tenths of a second. The last one is always drawn.

    Example:

    ```python
    trainer = AACETrainer(..., callbacks=[LiveCurvesCallback()])
    ```
    """

    def __init__(self, min_seconds: float = 2.0):
        self.min_seconds = min_seconds
        self._drawn = -float("inf")
        self._display = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._drawn, self._display = -float("inf"), None  # a picture for each training

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() - self._drawn >= self.min_seconds:
            self._draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(state)

    def _draw(self, state) -> None:
        if not (state.is_world_process_zero and is_in_notebook()):
            return
        from IPython.display import Image, display

        figure = training_curves(state.log_history)
        if figure is None:
            return
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=80)
        if self._display is None:
            self._display = display(Image(picture.getvalue()), display_id=True)
        else:
            self._display.update(Image(picture.getvalue()))
        self._drawn = time.monotonic()

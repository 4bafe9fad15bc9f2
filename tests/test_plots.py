# SPDX-License-Identifier: Apache-2.0
"""The picture of a run shows what the run logged, and nothing else."""

import PIL.Image
import pytest
from matplotlib.figure import Figure

from hf_aace.plots import plot_confusion_matrix, plot_image_grid, plot_training_curves


TRAINING = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 1e-3}
AACE = {
    "clean_loss": 0.9,
    "ascent_loss": 3.0,
    "sharpness": 0.1,
    "ascent_grad_norm": 2.0,
    "perturbation_norm": 0.02,
    "rho": 0.01,
    "skipped_perturbations": 0,
}
EVALUATION = {"eval_loss": 1.2, "eval_accuracy": 0.8, "eval_macro_f1": 0.7, "eval_runtime": 1.0}
END = {"train_runtime": 1.0, "train_loss": 1.0, "epoch": 2.0, "step": 20}


def history(*kinds, epochs=2):
    entries = [kind | {"epoch": float(epoch), "step": 10 * epoch} for epoch in range(1, epochs + 1) for kind in kinds]
    return [*entries, END]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


@pytest.fixture
def drawn(figures, tmp_path):
    """Draws, and returns the figure and the file."""

    def draw(log_history):
        assert plot_training_curves(log_history, tmp_path / "curves.png")
        return figures[-1], tmp_path / "curves.png"

    return draw


def lines(figure):
    return {axes.get_title(loc="left"): [line.get_label() for line in axes.lines] for axes in figure.axes}


def test_aace_run_has_all_panels(drawn):
    figure, path = drawn(history(TRAINING | AACE, EVALUATION))
    assert lines(figure) == {
        "Loss": ["training, at $w'$", "training, at $w$", "evaluation"],
        "Evaluation": ["accuracy", "macro F1"],
        "Sharpness": ["sharpness"],
        "Ascent loss": ["ascent loss"],
        "Gradient of the ascent loss": ["gradient"],
        "Perturbation $w' - w$": ["perturbation"],
    }
    with PIL.Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.getcolors(maxcolors=1 << 24)) > 10  # not blank


def test_plain_run_has_no_perturbation(drawn):
    figure, _ = drawn(history(TRAINING, EVALUATION))
    assert lines(figure) == {"Loss": ["training", "evaluation"], "Evaluation": ["accuracy", "macro F1"]}


def test_run_without_evaluation_has_none(drawn):
    figure, _ = drawn(history(TRAINING))
    assert lines(figure) == {"Loss": ["training"]}


def test_lines_hold_the_logged_values_over_the_epochs(drawn):
    figure, _ = drawn(history(TRAINING | AACE, EVALUATION, epochs=3))
    line = figure.axes[0].lines[1]
    assert line.get_xdata().tolist() == [1.0, 2.0, 3.0]
    assert line.get_ydata().tolist() == [0.9, 0.9, 0.9]


def test_a_single_point_is_visible(drawn):
    figure, _ = drawn(history(TRAINING, epochs=1))
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_every_axis_is_labelled(drawn):
    figure, _ = drawn(history(TRAINING | AACE, EVALUATION))
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_nothing_logged_is_nothing_drawn(tmp_path):
    assert not plot_training_curves([END], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_confusion_matrix_shows_counts_while_they_are_legible(tmp_path, figures):
    plot_confusion_matrix([[3, 1], [0, 0]], ["cat", "dog"], tmp_path / "small.png")
    plot_confusion_matrix([[1] * 100] * 100, [f"class {i}" for i in range(100)], tmp_path / "large.png")
    small, large = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in small.texts] == ["3", "1", "0", "0"]
    assert [label.get_text() for label in small.get_yticklabels()] == ["cat", "dog"]
    # The colour is the share of the row; a class without images has none.
    assert small.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert not large.texts


def test_image_grid_has_every_image_under_its_caption(tmp_path, figures):
    images = [PIL.Image.new(mode, size) for mode, size in (("L", (8, 8)), ("RGBA", (900, 30)), ("1", (5, 7)))]
    plot_image_grid(images, ["one", "two\nlines", "x" * 40], "Title", tmp_path / "grid.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["one", "two\nlines", f"{'x' * 32}\n{'x' * 8}"]
    assert len(figure.axes) == 3 and all(axes.images for axes in figure.axes)

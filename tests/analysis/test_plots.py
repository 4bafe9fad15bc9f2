# SPDX-License-Identifier: Apache-2.0
"""The pictures show what they are given, and nothing else."""

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hf_aace.analysis.figures import plot_dynamics, plot_landscapes, plot_margins, plot_paths, plot_sharpness
from hf_aace.analysis.landscape import LossPath, LossSurface
from hf_aace.analysis.plots import plot_confusion_matrix, plot_image_grid, plot_training_curves
from hf_aace.analysis.style import group_styles


TRAINING = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 1e-3}
AACE = {
    "clean_loss": 0.9,
    "clean_accuracy": 0.7,
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
def saved(monkeypatch):
    """The figures that have been saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


@pytest.fixture
def drawn(saved, tmp_path):
    """Draws, and returns the figure and the file."""

    def draw(log_history):
        assert plot_training_curves(log_history, tmp_path / "curves.png")
        return saved[-1], tmp_path / "curves.png"

    return draw


def lines(figure):
    return {axes.get_title(loc="left"): [line.get_label() for line in axes.lines] for axes in figure.axes}


def test_aace_run_has_all_panels(drawn):
    figure, path = drawn(history(TRAINING | AACE, EVALUATION))
    assert lines(figure) == {
        "Loss": ["training, perturbed weights $w'$", "training, weights $w$", "evaluation"],
        "Accuracy": ["training, weights $w$", "evaluation", "evaluation, macro F1"],
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
    assert lines(figure) == {"Loss": ["training", "evaluation"], "Accuracy": ["evaluation", "evaluation, macro F1"]}


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


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_epochs_are_whole_numbers(epochs, drawn):
    figure, _ = drawn(history(TRAINING, epochs=epochs))
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_every_axis_is_labelled(drawn):
    figure, _ = drawn(history(TRAINING | AACE, EVALUATION))
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_nothing_logged_is_nothing_drawn(tmp_path):
    assert not plot_training_curves([END], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_confusion_matrix_shows_counts_while_they_are_legible(tmp_path, saved):
    plot_confusion_matrix([[3, 1], [0, 0]], ["cat", "dog"], tmp_path / "small.png")
    plot_confusion_matrix([[1] * 100] * 100, [f"class {i}" for i in range(100)], tmp_path / "large.png")
    small, large = (figure.axes[0] for figure in saved)
    assert [text.get_text() for text in small.texts] == ["3", "1", "0", "0"]
    assert [label.get_text() for label in small.get_yticklabels()] == ["cat", "dog"]
    # The colour is the share of the row; a class without images has none.
    assert small.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert not large.texts


def test_names_of_classes_are_written_as_they_are(tmp_path, saved):
    """Long ones are cut in the middle, as many begin alike; and money is no mathematics."""
    names = ["american_pit_bull_terrier", "$5 & $10", "5$_$"]
    plot_confusion_matrix(np.eye(3, dtype=int).tolist(), names, tmp_path / "matrix.png")
    (axes, *_) = saved[0].axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["american_p...ll_terrier", "$5 & $10", "5$_$"]
    plot_image_grid([PIL.Image.new("L", (8, 8))], ["5$_$"], "Mistakes", tmp_path / "grid.png")


def test_image_grid_has_every_image_under_its_caption(tmp_path, saved):
    images = [PIL.Image.new(mode, size) for mode, size in (("L", (8, 8)), ("RGBA", (900, 30)), ("1", (5, 7)))]
    plot_image_grid(images, ["one", "two\nlines", "x" * 40], "Title", tmp_path / "grid.png")
    (figure,) = saved
    assert [axes.get_title() for axes in figure.axes] == ["one", "two\nlines", f"{'x' * 32}\n{'x' * 8}"]
    assert len(figure.axes) == 3 and all(axes.images for axes in figure.axes)


# ---- Runs side by side ---------------------------------------------------------


def test_names_of_runs_are_written_as_they_are_and_fit(tmp_path, saved):
    """An expression is no mathematics, and what was set may be long."""
    name = r"AACE, rho 10, ascent_fraction 0.25, perturb_modules norm$|\w+_bias$"
    paths = [tmp_path / "picture.png"]
    plot_margins({name: np.linspace(-1, 1, 50)}, paths)
    plot_paths({f"Trainer (0) to {name} (1)": LossPath(np.linspace(0, 1, 5), np.linspace(1, 2, 5))}, paths)
    plot_dynamics({name: [history(TRAINING)]}, paths)
    plot_landscapes({name: SURFACE}, paths)
    assert name in saved[3].axes[0].get_title(loc="left").replace("\n", " ").replace(r"\$", "$")
    for figure in saved[:3]:
        (legend,) = figure.legends
        assert name in legend.texts[0].get_text().replace("\n", " ").replace(r"\$", "$")
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


RUNS = {
    "Trainer": [history(TRAINING, EVALUATION)],
    "AACE": [history(TRAINING | AACE, EVALUATION), history(TRAINING | AACE, EVALUATION)],
}
SURFACE = LossSurface(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5), np.linspace(0.01, 3, 25).reshape(5, 5))
MEASURES = {
    "sam_sharpness": 0.1,
    "average_sharpness": 0.001,
    "hessian_eigenvalues": [20.0, 3.0],
    "cross_entropy_grad_norm": 0.1,
}
FIGURES = {
    "dynamics": lambda paths: plot_dynamics(RUNS, paths),
    "sharpness": lambda paths: plot_sharpness({"Trainer": [MEASURES], "AACE": [MEASURES, MEASURES]}, paths),
    "margins": lambda paths: plot_margins({"Trainer": np.arange(9.0), "AACE": np.arange(-2.0, 5)}, paths),
    "path": lambda paths: plot_paths({"AACE": LossPath(np.linspace(0, 1, 3), np.array([0.1, 0.5, 0.2]))}, paths),
    "contour": lambda paths: plot_landscapes({"Trainer": SURFACE, "AACE": SURFACE}, paths),
    "surface": lambda paths: plot_landscapes({"Trainer": SURFACE, "AACE": SURFACE}, paths, kind="surface"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_for_a_paper_is_one_column_wide_labelled_and_the_same_each_time(name, saved, tmp_path):
    FIGURES[name]([tmp_path / "a.svg", tmp_path / "a.png"])
    figure = saved[-1]
    assert figure.get_figwidth() == 3.4
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 3.4 * 300
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 6.5, "legible when printed at that width"
    assert all(axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes)
    FIGURES[name]([tmp_path / "b.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_dynamics_show_what_the_groups_logged(saved, tmp_path):
    FIGURES["dynamics"]([tmp_path / "a.png"])
    lines = {axes.get_title(loc="left"): [line.get_label() for line in axes.lines] for axes in saved[-1].axes}
    assert lines["Training loss at $w$"] == ["Trainer", "AACE"], "a plain run's `loss` is that at w"
    assert lines["Evaluation accuracy"] == ["Trainer", "AACE"]
    assert lines["Perturbation norm"] == ["AACE"]
    assert "Direction of ascent" not in lines


def test_the_mean_over_runs_and_its_standard_error_are_drawn(saved, tmp_path):
    runs = [history(TRAINING | {"loss": loss}) for loss in (1.0, 2.0, 4.0)]
    plot_dynamics({"Trainer": runs}, [tmp_path / "a.png"])
    axes = saved[-1].axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([7 / 3] * 2)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.max() - band.min()) / 2 == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)


def test_landscapes_share_one_scale(saved, tmp_path):
    deeper = SURFACE._replace(loss=SURFACE.loss / 10)
    for kind in ("contour", "surface"):
        plot_landscapes({"a": SURFACE, "b": deeper}, [tmp_path / "a.png"], kind=kind)
        first, second = saved[-1].axes[:2]
        assert first.collections[0].get_clim() == second.collections[0].get_clim() == pytest.approx((-3, np.log10(3)))
    assert first.get_zlim() == second.get_zlim()


def test_groups_can_be_told_apart_in_gray():
    """And plain training looks the same wherever it comes in the order."""
    styles = group_styles(["SAM", "Trainer", *"abcd"])
    assert styles[1] == group_styles(["Trainer"])[0] and styles[0] == group_styles(["SAM"])[0]
    assert len({str(dashes) for _, dashes, _ in styles}) == len({marker for *_, marker in styles}) == 6


def test_nothing_logged_is_no_figure_and_an_unknown_kind_is_refused(tmp_path):
    assert not plot_dynamics({"a": [[END]]}, [tmp_path / "a.png"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"`kind` must be 'contour' or 'surface', got 'heat'"):
        plot_landscapes({"a": SURFACE}, [tmp_path / "a.png"], kind="heat")

# SPDX-License-Identifier: Apache-2.0
"""`hf-aace compare` and `find-rho`: which runs they make, and what they leave and say."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import psutil
import pytest
from transformers import TrainingArguments

from hf_aace.cli import main
from hf_aace.cli.compare import unequal_search
from hf_aace.cli.output import write_report
from hf_aace.config import METHODS
from hf_aace.study.runner import Runner, run_folder
from hf_aace.study.statistics import candidates_of


TINY = "compare --max_steps 2 --train_size 40 --seeds 2 --search_seeds 1 --jobs 1 --output_dir study".split()


class Here(Executor):
    """Makes the runs in this process: a new one takes its time to import torch."""

    def __init__(self, *args):
        pass

    def submit(self, function, train, argv, log):
        future = Future()
        future.set_result(train(argv))
        return future


class Pretended(Executor):
    """Leaves what a run leaves, where a test asks for the order of the runs, not for what comes of them."""

    def __init__(self, *args):
        pass

    def submit(self, function, train, argv, log):
        results = {
            "eval_accuracy": 0.5,
            "validation_accuracy": 0.5,
            "train_processor_seconds": 1.0,
            "train_runtime": 1.0,
        }
        Path(argv[argv.index("--output_dir") + 1], "all_results.json").write_text(json.dumps(results))
        future = Future()
        future.set_result(0)
        return future


def in_other_order(argv):
    """The command with the last of its options first."""
    command, *options = argv
    return [command, *(part for i in range(len(options) - 2, -1, -2) for part in options[i : i + 2])]


def test_a_study_is_made_told_and_not_made_twice(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    argv = [*TINY, "--methods", "trainer,aace:rho=0.1|0.2"]
    assert main(argv) == 0
    screen = capsys.readouterr().out
    runs = sorted(
        str(path.parent.relative_to(tmp_path / "study")) for path in (tmp_path / "study").rglob("model.safetensors")
    )
    rows = json.loads((tmp_path / "study" / "summary.json").read_text())["methods"]
    chosen = rows[1]["choice"]
    # Both values with one seed, the chosen one with both.
    assert len(runs) == 2 + 2 + 1 and f"aace-{chosen}/seed-1" in runs
    assert [row["seeds"] for row in rows] == [2, 2]
    assert chosen in screen and f"{100 * rows[0]['accuracy']:.1f} ±" in screen
    for name in ("accuracy", "time", "rho"):
        assert (tmp_path / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "study" / "runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        folder = "trainer" if row["method"] == "trainer" else "aace-" + row["options"].split()[1]
        saved = json.loads((tmp_path / "study" / folder / f"seed-{row['seed']}" / "all_results.json").read_text())
        assert float(row["test_accuracy"]) == saved["eval_accuracy"]
        assert float(row["validation_accuracy"]) == saved["validation_accuracy"]

    # A run that was cut short is made again, and nothing else.
    lost, kept = tmp_path / "study" / "trainer" / "seed-1", tmp_path / "study" / "trainer" / "seed-0"
    results = json.loads((lost / "all_results.json").read_text())
    (lost / "all_results.json").write_text(json.dumps({"train_runtime": 1}))
    before = (kept / "all_results.json").stat().st_mtime_ns
    assert main(in_other_order(argv)) == 0
    again = json.loads((lost / "all_results.json").read_text())
    assert again["eval_accuracy"] == results["eval_accuracy"]
    assert (kept / "all_results.json").stat().st_mtime_ns == before

    # However an option is written.
    assert main([("--train_size=40" if part == "--train_size" else part) for part in argv if part != "40"]) == 0

    # Other options would mix two studies in one folder.
    assert main([*argv, "--label_noise", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "holds a study with other options" in error and "--label_noise 0.5`: `" in error
    assert main(["50" if part == "40" else part for part in argv]) == 1
    assert "--train_size 50`: `" in capsys.readouterr().err


def test_a_study_without_a_run_is_begun_anew_with_other_options(tmp_path, monkeypatch, capsys):
    """What shows only when the data are loaded could not be mended otherwise. The title has all models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    methods = "trainer:model_name_or_path=convnext-tiny-digits,trainer:model_name_or_path=vit-tiny-digits"
    argv = [*TINY, "--methods", methods]
    assert main([*argv, "--train_size", "9999"]) == 1
    assert "`train_size` must lie between" in capsys.readouterr().err
    assert main(argv) == 0
    assert "convnext-tiny-digits, vit-tiny-digits on digits, test accuracy" in capsys.readouterr().out
    assert main([*argv, "--label_noise", "0.5"]) == 1
    assert "holds a study with other options" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    """In processes of their own."""
    monkeypatch.chdir(tmp_path)
    argv = "compare --max_steps 2 --train_size 40 --seeds 1 --jobs 1 --output_dir study".split()
    # Resuming from what is not there is found out by the run alone.
    assert main([*argv, "--methods", "trainer:resume_from_checkpoint=nothing,trainer"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of the runs failed" in error and "nothing" in error and "output.txt" in error
    assert (tmp_path / "study" / "trainer" / "seed-0" / "all_results.json").is_file()


def end_in_some_way(argv):
    """A run that prints its seed, and that with seed 0 fails by an error that nothing foresees."""
    seed, folder = argv[argv.index("--seed") + 1], argv[argv.index("--output_dir") + 1]
    print(f"seed {seed}")
    if seed == "0":
        raise RuntimeError("out of memory")
    results = {"eval_accuracy": 0.5, "train_processor_seconds": 1.0, "train_runtime": 1.0}
    Path(folder, "all_results.json").write_text(json.dumps(results))
    return 0


def test_an_error_that_nothing_foresees_ends_its_run_alone_and_each_run_has_its_own_output(tmp_path):
    (plain,) = candidates_of("trainer")
    with (
        Runner(tmp_path, end_in_some_way, [], jobs=1, total=2) as runner,
        pytest.raises(ValueError, match="1 of the runs failed, the first with: RuntimeError: out of memory"),
    ):
        runner.run([(plain, 0), (plain, 1)])
    first, second = (run_folder(tmp_path, plain, seed) / "output.txt" for seed in (0, 1))
    assert first.read_text().startswith("seed 0\nTraceback") and second.read_text() == "seed 1\n"
    assert second.with_name("all_results.json").is_file()


def test_a_setting_of_two_methods_is_trained_once(tmp_path, monkeypatch):
    """At the same time, two processes would write into one folder."""
    made = []

    class Counted(Pretended):
        def submit(self, function, train, argv, log):
            made.append(log.parent)
            return super().submit(function, train, argv, log)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Counted)
    methods = "trainer,aace:rho=0.01,aace:rho=0.01|0.1"
    assert main([*TINY, "--methods", methods]) == 0
    assert len(made) == len(set(made)) == 5  # two settings by two seeds, one that is not chosen by one
    assert json.loads(Path("study/summary.json").read_text())["methods"][1]["seeds"] == 2


def test_several_gpus_are_refused_before_the_first_run(tmp_path, monkeypatch, capsys):
    """Plain runs would be trained on all at once, in larger batches, and then be compared with others on one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert main([*TINY, "--methods", "trainer"]) == 1
    assert "on 2 GPUs at once" in capsys.readouterr().err and not list(tmp_path.rglob("seed-*"))
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Pretended)
    assert main([*TINY, "--methods", "trainer", "--accelerate_config", "ddp"]) == 0  # a process for each


def test_options_of_a_file_are_those_of_every_run(tmp_path, monkeypatch, capsys):
    """They come before what `compare` has otherwise, after what the command line says; and a file that was changed is told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    options = "validation_size: 0.5\neval_strategy: epoch\nmetrics: [accuracy, macro_f1]\nlabel_noise: 0.4\n"
    (tmp_path / "options.yaml").write_text(options)
    argv = [*TINY, "--methods", "trainer", "--config", "options.yaml", "--label_noise", "0.1"]
    assert main(argv) == 0
    run = tmp_path / "study" / "trainer" / "seed-0"
    options = json.loads((run / "train_options.json").read_text())
    assert (options["validation_size"], options["label_noise"]) == (0.5, 0.1)
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in log for log in logs[:-1])
    (tmp_path / "options.yaml").write_text("validation_size: 0.4\n")
    assert main(argv) == 1
    assert "holds a study with other options" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("validation_sise: 0.4\n")
    with pytest.raises(SystemExit):
        main(argv)
    assert "Did you mean --validation_size?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_a_study_that_is_stopped_leaves_no_process_behind(how, tmp_path):
    """And does not wait for runs that the same command would make again."""
    command = [sys.executable, *"-m hf_aace compare --jobs 1 --methods trainer --num_train_epochs 5000".split()]
    study = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.rglob("output.txt")):
            assert study.poll() is None
            time.sleep(0.1)
        if how == "Ctrl-C":  # which the terminal sends to all of them
            os.killpg(study.pid, signal.SIGINT)
            _, error = study.communicate(timeout=30)
            assert study.returncode == 130
            last = error.strip().splitlines()[-1]  # no warnings of what leaked
            assert last == "Interrupted. 0 of 5 runs are done: the same command goes on with the others."
        else:  # by an out-of-memory killer, say: it can do nothing any more
            study.kill()
            study.wait()
        group = [process for process in psutil.process_iter() if os.getpgid(process.pid) == study.pid]
        assert not psutil.wait_procs(group, timeout=10)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--methods", "adam"], "`methods` must be of trainer, aace, sam, asam"),
        (["--baseline", "sam", "--methods", "trainer"], "`baseline` must be one of the methods, trainer, got 'sam'"),
        (["--methods", "aace:ascent_fraction=2"], "`ascent_fraction` must lie in (0, 1], got 2.0"),
        (["--rho", "0.1,0.2", "--validation_size", "0"], "`validation_size` is 0"),
        (["--streaming", "true", "--dataset_name", "x"], "with `--validation_size 0`"),
        (["--seed", "1"], "`seed` is another one for each run"),
        (["--seed=1"], "`seed` is another one for each run"),
        (["--methods", "aace:seed=3"], "`seed` is another one for each run"),
        (["--methods", "aace:output_dir=x"], "`output_dir` is another one for each run"),
        (["--metrics", "macro_f1"], "`metrics` must have `accuracy`"),
        (
            [
                *("--validation_size", "0", "--eval_strategy", "epoch", "--save_strategy", "epoch"),
                *("--methods", "trainer:load_best_model_at_end=true,aace"),
            ],
            "`validation_size` is 0, but it takes validation images to choose between settings or checkpoints",
        ),
    ],
)
def test_bad_input_is_told_before_the_first_run(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *argv]) == 1
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed-*"))


def test_rho_is_not_searched_without_validation_images(tmp_path, monkeypatch, capsys):
    """Not even one value, which is compared with plain training."""
    monkeypatch.chdir(tmp_path)
    assert main(["find-rho", "--rho", "0.1", "--validation_size", "0"]) == 1
    assert "`validation_size` is 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("study.json")), "the command without the option would be refused, as another study"


class Interrupted(Pretended):
    """Makes one run. Then comes Ctrl-C."""

    runs = 0

    def submit(self, *args):
        self.runs += 1
        if self.runs > 1:
            raise KeyboardInterrupt
        return super().submit(*args)


@pytest.mark.parametrize(
    ("command", "total"),
    [
        (["compare", "--methods", "trainer,aace", "--seeds", "2"], 4),
        (["find-rho", "--rho", "0.1,1", "--seeds", "1"], 3),
    ],
)
def test_a_study_that_is_interrupted_says_how_to_go_on(command, total, tmp_path, monkeypatch, capsys):
    """Also if it went on from an earlier one: what that has made counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Interrupted)
    argv = [*command, "--max_steps", "1", "--train_size", "40", "--jobs", "1", "--output_dir", "study"]
    for done in (1, 2):
        assert main(argv) == 130
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last == f"Interrupted. {done} of {total} runs are done: the same command goes on with the others."
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Pretended)
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("methods", "unequal"),
    [
        (
            "trainer:learning_rate=1e-3|3e-3,sam:rho=0.05|0.2,aace:rho=0.03|0.1",
            {"learning_rate": (["trainer:learning_rate=1e-3|3e-3"], ["sam:rho=0.05|0.2", "aace:rho=0.03|0.1"])},
        ),
        ("trainer,aace:weight_decay=0|0.1", {"weight_decay": (["aace:weight_decay=0|0.1"], ["trainer"])}),
        ("trainer,sam:rho=1|2,aace", {"rho": (["sam:rho=1|2"], ["aace"])}),
        ("trainer,sam,aace:ascent_fraction=0.125", {}),
        ("trainer,sam:rho=0.05|0.2,aace:rho=0.03|0.1", {}),
        ("trainer:learning_rate=1|2,aace:learning_rate=3|4:perturb_modules=norm:rho=10|30", {}),
    ],
)
def test_a_search_that_is_not_the_same_for_all_methods_is_found(methods, unequal):
    """Options of the perturbation are none of plain training."""
    assert unequal_search([each for method in methods.split(",") for each in candidates_of(method)]) == unequal


def test_an_unequal_search_is_warned_of_once_and_before_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []

    class Watched(Pretended):
        def submit(self, *args):
            said.append(capsys.readouterr().err)
            return super().submit(*args)

    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Watched)
    argv = [*TINY, "--seeds", "1", "--methods"]
    assert main([*argv, "trainer:learning_rate=1e-3|1e-2,aace"]) == 0
    assert "warning: `learning_rate` is searched for trainer:learning_rate=1e-3|1e-2, but not for aace" in said[0]
    assert "`:learning_rate=A|B`" in said[0]
    said.clear()
    assert main([*argv, "trainer,sam,aace:rho=0.03|0.1"]) == 0
    assert "warning: `rho` is searched for aace:rho=0.03|0.1, but not for sam" in said[0]
    assert "warning" not in "".join(said[1:]) + capsys.readouterr().err
    said.clear()
    assert main([*argv, "trainer:learning_rate=1e-3|1e-2,aace:learning_rate=1e-3|1e-2"]) == 0
    assert "warning" not in "".join(said) + capsys.readouterr().err


def test_the_example_in_the_help_is_fair(capsys):
    """Or users copy a comparison in which plain training alone has a good learning rate."""
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    (example,) = re.findall("'(trainer.*?)'", re.sub(r"\s+", "", capsys.readouterr().out))
    candidates = [each for method in example.split(",") for each in candidates_of(method)]
    assert len(candidates) > 2 and unequal_search(candidates) == {}


def test_a_picture_that_is_not_drawn_again_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Pretended)
    argv = [*TINY, "--seeds", "1", "--output_dir", str(tmp_path)]
    assert main([*argv, "--methods", "trainer,aace:rho=0.1|0.2"]) == 0
    assert (tmp_path / "rho.png").is_file()
    assert main([*argv, "--methods", "trainer,aace:rho=0.1"]) == 0
    assert not (tmp_path / "rho.png").exists()


def test_a_report_is_json_whatever_the_numbers(tmp_path):
    """Or a study of hours would end in an error, or in a file that other programs cannot read."""
    write_report({"ratio": float("inf"), "rows": [{"error": float("nan"), "mean": 0.5}]}, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"ratio": None, "rows": [{"error": None, "mean": 0.5}]}


# ---- Finding rho -----------------------------------------------------------


def test_find_rho_trains_with_each_value_and_plainly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    argv = ["find-rho", "--max_steps", "2", "--train_size", "40", "--seeds", "1", "--jobs", "1", "--rho", "0.1,0.2"]
    assert main(argv) == 0
    text = (tmp_path / "runs" / "find-rho" / "find_rho.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["values"][0]["standard_error"] is None  # of one seed
    assert [row["rho"] for row in report["values"]] == [0, 0.1, 0.2]
    screen = capsys.readouterr().out
    assert report["text"] in screen
    for row in report["values"]:
        folder = "aace-rho={rho:g}".format(**row) if row["rho"] else "trainer"
        path = tmp_path / "runs" / "find-rho" / folder / "seed-0" / "all_results.json"
        assert row["accuracy"] == json.loads(path.read_text())["validation_accuracy"]
    assert (tmp_path / "runs" / "find-rho" / "rho.png").is_file()


def test_to_find_rho_takes_one_to_try(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["find-rho", "--rho", "0"]) == 1
    assert "`rho` must have a value to compare with 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "find-rho"])
def test_a_rho_that_is_no_number_is_told(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--rho", "0.1,large"]) == 1
    assert "`rho` must be numbers separated by commas, got 'large' in '0.1,large'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ([], [0, 0.003, 0.01, 0.03, 0.1, 0.3]),
        (["--perturb_modules", "norm"], [0, 3, 10, 30, 100]),
        (["--config", "norm.yaml"], [0, 3, 10, 30, 100]),
        (["--config", "norm.yaml", "--perturb_modules", "encoder"], [0, 0.003, 0.01, 0.03, 0.1, 0.3]),
        (["--adaptive_perturbation", "true"], [0, 1, 3, 10, 30]),
        (["--method", "sam"], [0, 0.003, 0.01, 0.03, 0.1, 0.3]),
        (["--method", "asam"], [0, 0.1, 0.3, 1, 3, 10]),
        (["--perturb_modules", "norm", "--rho", "7"], [0, 7]),
    ],
)
def test_values_of_rho_to_find_are_by_what_is_perturbed(options, values, tmp_path, monkeypatch):
    """What is right for all weights moves the normalization layers next to nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm.yaml").write_text("perturb_modules: norm\nascent_fraction: 0.25\n")
    tried = []

    def submit(self, function, train, argv, log):
        tried.append(float(argv[argv.index("--rho") + 1]))
        future = Future()
        future.set_result(1)
        log.write_text("not made")
        return future

    monkeypatch.setattr(Here, "submit", submit)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    assert main(["find-rho", "--seeds", "1", *options]) == 1
    assert tried == values


def test_rho_is_found_for_the_method_that_is_asked_for(tmp_path, monkeypatch):
    """And the runs have its name. ASAM's settings are all other than AACE's."""
    method = "asam"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.study.runner.ProcessPoolExecutor", Here)
    argv = (
        "find-rho --eval_strategy no --load_best_model_at_end false --max_steps 1 --train_size 40 --seeds 1 --rho 0.1 "
        f"--method {method}"
    ).split()
    assert main(argv) == 0
    options = json.loads((tmp_path / "runs/find-rho" / f"{method}-rho=0.1" / "seed-0/train_options.json").read_text())
    assert options["rho"] == 0.1
    assert {name: options[name] for name in METHODS[method] if name != "rho"} == {
        name: value for name, value in METHODS[method].items() if name != "rho"
    }

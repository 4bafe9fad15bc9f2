# SPDX-License-Identifier: Apache-2.0
"""The runs of a study: several processes at a time, and none that has ended already."""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from .statistics import RUN_COLUMNS, Candidate


class Runner:
    """
    Train candidates over seeds and collect the results. A context manager: the processes live as long as it does.

    Args:
        folder (`Path`): The folder of the study. Each run has its own folder in it.
        train (`Callable[[list[str]], int]`):
            A function of a module, which takes options of `hf-aace train`, trains, leaves `all_results.json` in the
            `--output_dir`, and returns the exit code.
        common (`list[str]`): Options of `hf-aace train` for all runs.
        jobs (`int`): Number of runs at a time.
        total (`int`): Number of runs, for the progress bar.
    """

    def __init__(self, folder: Path, train: Callable[[list[str]], int], common: list[str], jobs: int, total: int):
        self._folder, self._train, self._common, self._jobs = folder, train, common, jobs
        self._total, self._asked_for = total, []

    def __enter__(self) -> "Runner":
        # Not forked: torch's threads do not survive it, and neither does CUDA.
        self._pool = ProcessPoolExecutor(self._jobs, get_context("spawn"), _begin_process, (self._jobs,))
        self._bar = tqdm(total=self._total, desc="runs")
        return self

    def __exit__(self, kind, exception, trace) -> None:
        if kind is not None:  # what was begun will be made again, so nobody waits for its end
            for process in active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._bar.close()
        if kind is KeyboardInterrupt:
            done = sum(self._result(*run) is not None for run in self._asked_for)
            raise KeyboardInterrupt(
                f"\nInterrupted. {done} of {self._total} runs are done: the same command goes on with the others."
            ) from exception

    def run(self, runs: list[tuple[Candidate, int]]) -> pd.DataFrame:
        """
        Make those runs, pairs of a candidate and a seed, that have not ended in an earlier call or program.

        Returns:
            `pd.DataFrame`: The results of all of them, as [`~hf_aace.study.statistics.summarize`] takes them.

        Raises:
            `ValueError`: After the other runs, if some failed.
        """
        self._asked_for += runs
        # By folder, as the same setting may be among the candidates of two methods.
        missing = {run_folder(self._folder, *run): run for run in runs if self._result(*run) is None}
        self._bar.update(len(runs) - len(missing))
        failures, futures = [], {}
        for folder, run in missing.items():
            folder.mkdir(parents=True, exist_ok=True)
            argv = run_options(self._folder, self._common, *run)
            futures[self._pool.submit(_run, self._train, argv, folder / "output.txt")] = folder
        try:
            for future in as_completed(futures):
                if future.result() != 0:
                    failures.append(futures[future] / "output.txt")
                self._bar.update()
        except BrokenProcessPool as error:
            raise ValueError(
                "The process of a run was killed, perhaps for lack of memory. Give the same command again to go on, "
                f"perhaps with fewer `jobs` than {self._jobs}."
            ) from error
        if failures:
            last = failures[0].read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ValueError(
                f"{len(failures)} of the runs failed, the first with: {''.join(last)} (see {failures[0]})"
            )
        return pd.DataFrame([self._result(*run) for run in runs], columns=RUN_COLUMNS)

    def _result(self, candidate: Candidate, seed: int) -> dict | None:
        """Return the row of a run, `None` if it has not ended."""
        path = run_folder(self._folder, candidate, seed) / "all_results.json"
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "eval_accuracy" not in metrics:  # the last thing that a run writes
            return None
        return {
            "method": candidate.method,
            "options": candidate.options,
            "seed": seed,
            "validation_accuracy": metrics.get("validation_accuracy", float("nan")),
            "test_accuracy": metrics["eval_accuracy"],
            # On a CPU the time on the clock depends on the other processes.
            "seconds": metrics["train_runtime" if torch.cuda.is_available() else "train_processor_seconds"],
        }


def run_folder(folder: Path, candidate: Candidate, seed: int) -> Path:
    """Return the folder of a run in that of its study."""
    return folder / candidate.folder / f"seed-{seed}"


def run_options(folder: Path, common: list[str], candidate: Candidate, seed: int) -> list[str]:
    """Return the options of `hf-aace train` for a run."""
    own = [part for name, value in candidate.settings for part in (f"--{name}", value)]
    last = ["--seed", str(seed), "--output_dir", str(run_folder(folder, candidate, seed)), "--disable_tqdm", "true"]
    return [*common, *own, *last]


def _begin_process(jobs: int) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # or the last lines would go into the file of the next run
    # A lock of tqdm's own would leave a semaphore behind when the process is terminated, of which Python warns.
    tqdm.set_lock(threading.RLock())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End the process when the command was killed, which could not end it: it would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _run(train: Callable[[list[str]], int], argv: list[str], log: Path) -> int:
    """Train in a process that is for runs only. What it prints goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            return train(argv)
        except Exception:  # or it would end the other runs too
            traceback.print_exc()
            return 1

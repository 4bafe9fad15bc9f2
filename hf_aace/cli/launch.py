# SPDX-License-Identifier: Apache-2.0
"""Start the processes of `hf-aace train --accelerate_config`."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .parser import option


# Set in the processes that `--accelerate_config` starts.
_LAUNCHED = "HF_AACE_LAUNCHED"


@dataclass
class LaunchArguments:
    """The processes to train in, as for `accelerate launch`."""

    accelerate_config: str | None = option(
        None,
        "Start the processes that a configuration of accelerate asks for: `single_gpu`, `ddp`, `fsdp2`, or the "
        "path of a file that `accelerate config` wrote. Without it, train in this process.",
    )
    num_processes: int | None = option(
        None,
        "With `accelerate_config`: number of processes. By default one for each GPU, or what the file says. For several "
        "machines let `accelerate config` write a file on each.",
    )


def is_launched() -> bool:
    """Return whether this process was started by [`launch`], so that the user's command is the one that `launch` got."""
    return _LAUNCHED in os.environ


def is_one_of_several() -> bool:
    """Return whether this process was started by `torchrun`, `accelerate launch` or [`launch`]."""
    return is_launched() or "LOCAL_RANK" in os.environ


def launch(options: argparse.Namespace, argv: list[str]) -> int:
    """
    Run `hf-aace train` with the options `argv` in several processes, and return the exit code. `options` has the fields of
    [`LaunchArguments`], with an `accelerate_config`. Refuse a configuration that does not exist or is none, and a machine
    without a GPU to start a process for.
    """
    shipped = Path(__file__).with_name("accelerate_configs")
    config = shipped / f"{options.accelerate_config}.yaml"
    if not config.is_file():
        config = Path(options.accelerate_config)
    if not config.is_file():
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise ValueError(f"`accelerate_config` must be one of {known}, or a file, got {options.accelerate_config!r}.")
    words, settings = ["--config_file", config], _read(config)
    one_machine = settings.get("num_machines", 1) == 1 and settings.get("distributed_type") != "MULTI_CPU"  # by MPI
    if one_machine and settings.get("main_process_port") is None:
        words += ["--main_process_port", 0]  # any free one
    if options.num_processes is not None or options.accelerate_config in ("ddp", "fsdp2"):
        num_processes = options.num_processes or torch.cuda.device_count()
        if num_processes < 1:
            raise ValueError("There are no GPUs here to start a process for. Give their number as `num_processes`.")
        words += ["--num_processes", num_processes]
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*map(str, words), "--module", "hf_aace", "train", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The process has printed its error, unless it was killed.
        print(f"hf-aace: process {rank} failed first, with exit code {failure.exitcode}.", file=sys.stderr)
        return 1
    except CalledProcessError as error:
        return error.returncode
    except SignalException:
        return 130
    finally:
        del os.environ[_LAUNCHED]
    return 0


def _read(config: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"`accelerate_config` is {str(config)!r}, which is no configuration of accelerate. Write one by `accelerate config`."
        )
    return settings

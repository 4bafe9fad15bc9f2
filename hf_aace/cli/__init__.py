# SPDX-License-Identifier: Apache-2.0
"""The command `hf-aace`, with one module here for each of its commands."""

# What needs torch is imported where it is used: `--help` and `--version` are to answer at once.
import argparse
import importlib
import logging
import os
import platform
import sys
from importlib.metadata import version


# peft imports bitsandbytes where it is installed, which warns that it lacks 4-bit kernels: nothing here uses them, and the first
# lines on a user's screen are to be about the user's run.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

# Each is a module here of that name, with a function `run` that takes the rest of the command line.
_COMMANDS = {
    "demo": "see in a minute what sharpness-aware training gains where labels are wrong",
    "train": "train a model; without options, a small ConvNeXt on scans of digits",
    "compare": "train several methods side by side over seeds, and test which is better",
    "find-rho": "find the rho to train with, by a search on validation images",
    "evaluate": "measure how good a model is, and see where it errs",
    "predict": "name the classes of the images in a folder",
    "benchmark": "measure what a step costs, with your model on your machine",
    "sharpness": "measure how sharp the minima are that runs found",
    "plot": "draw runs side by side: training, and the loss around their weights",
}


def main(argv: list[str] | None = None) -> int:
    """
    Run the command with the arguments `argv`, by default those of the process; return the exit code: 0, or 1 after bad input,
    with one sentence on stderr, or 130 after Ctrl-C. `--help` and usage errors (code 2) raise the `SystemExit` of `argparse`.
    """
    parser = argparse.ArgumentParser(
        prog="hf-aace",
        description="Sharpness-aware training of image classifiers with the Hugging Face Trainer.",
        epilog="hf-aace COMMAND --help describes the options of one.",
    )
    parser.add_argument("--version", action="version", version=f"hf-aace {version('hf-aace')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        # Its own parser, in its own module, answers `--help`.
        commands.add_parser(name, add_help=False, help=summary)
    commands.add_parser("env", help="print versions and hardware, for a bug report")
    argv = sys.argv[1:] if argv is None else argv
    arguments, rest = parser.parse_known_args(argv)
    rank = int(os.environ.get("RANK", 0))  # of this process, if there are several
    try:
        if arguments.command in _COMMANDS:
            return importlib.import_module(f".{arguments.command.replace('-', '_')}", __package__).run(rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _env()
    # What the libraries raise for input they cannot use: bad values, missing files, packages or features.
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"hf-aace: error{f' in process {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            print(str(interrupt) or "hf-aace: interrupted.", file=sys.stderr)
        return 130


def _env() -> int:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = ("hf-aace", "torch", "transformers", "accelerate", "datasets", "evaluate")
    report = {package: version(package) for package in packages} | {
        "torch": torch.__version__,  # with the build (+cu130), which the package's own version leaves out
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU threads": torch.get_num_threads(),
        "GPUs": ", ".join(gpus) or "none",
    }
    for name, value in report.items():
        print(f"{name}: {value}")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""The command `hf-aace`: trains an image classifier, measures what that costs, or says what is installed."""

# What needs torch is imported where it is used: `--help` and `--version` are to answer at once.
import argparse
import difflib
import json
import os
import platform
import re
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from transformers import HfArgumentParser
    from transformers.trainer_utils import PredictionOutput


# Set in the processes that `--accelerate_config` starts.
_LAUNCHED = "HF_AACE_LAUNCHED"


@dataclass
class ModelArguments:
    """
    Which model to train.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"convnext-tiny-digits"`):
            A built-in model, a local folder, or a model id on the Hub.
    """

    model_name_or_path: str = field(
        default="convnext-tiny-digits",
        metadata={
            "help": "The model: `convnext-tiny-digits` or `vit-tiny-digits` (small, from scratch, for 8x8 images), a "
            "local folder, or a model id on the Hub. Learning rate, batch size, epochs and the like have other "
            "defaults for the built-in two, shown here, than for models to fine-tune."
        },
    )


@dataclass
class DataArguments:
    """
    What to train on, and what to measure.

    Args:
        dataset_name (`str`, *optional*, defaults to `"digits"`):
            `"digits"`, a folder of images, or the id of a data set on the Hub.
        train_size (`int`, *optional*):
            Train on this many images only. Defaults to all.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the training labels to replace by wrong ones.
        metrics (`list[str]`, *optional*, defaults to `["accuracy", "macro_f1", "confusion_matrix"]`):
            The metrics, as [`~hf_aace.metrics.load_metric`] knows them.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "The images: `digits` (8x8 scans, bundled with scikit-learn), a folder with one sub-folder of "
            "images for each class (perhaps below `train` and `test`), or the id of a data set on the Hub."
        },
    )
    train_size: int | None = field(
        default=None,
        metadata={"help": "Train on this many images only, drawn with `seed`, each class keeping its share."},
    )
    label_noise: float = field(
        default=0.0,
        metadata={"help": "Share of the training labels, in [0, 1), replaced by wrong ones drawn with `seed`."},
    )
    metrics: list[str] = field(
        default_factory=lambda: ["accuracy", "macro_f1", "confusion_matrix"],
        metadata={
            "help": "Metrics: `accuracy`, `macro_f1`, `confusion_matrix` (once, at the end), or any that "
            "`evaluate.load` finds on the Hub."
        },
    )

    def __post_init__(self):
        if isinstance(self.metrics, str):  # a single name in a configuration file
            self.metrics = [self.metrics]


@dataclass
class LaunchArguments:
    """
    Which processes to train in, as for `accelerate launch`. Without a configuration, the present process.

    Args:
        accelerate_config (`str`, *optional*):
            `"single_gpu"`, `"ddp"`, `"fsdp2"`, or the path of a configuration file of accelerate.
        num_processes (`int`, *optional*):
            Number of processes on all machines together. Defaults to one for each GPU, taking each machine to have as
            many as this one.
        num_machines (`int`, *optional*, defaults to `1`):
            Number of machines. The command is started on each.
        machine_rank (`int`, *optional*, defaults to `0`):
            The number of this machine, from 0.
        main_process_ip (`str`, *optional*):
            The address of machine 0.
        main_process_port (`int`, *optional*):
            A free port on machine 0. Defaults to any, for one machine.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start the processes that a configuration of accelerate asks for: `single_gpu`, `ddp`, `fsdp2`, or the "
            "path of a file that `accelerate config` wrote."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "With `accelerate_config`: number of processes, on all machines. One for each GPU by default."
        },
    )
    num_machines: int = field(default=1, metadata={"help": "With `accelerate_config`: number of machines."})
    machine_rank: int = field(
        default=0, metadata={"help": "With `accelerate_config`: number of this machine, from 0."}
    )
    main_process_ip: str | None = field(
        default=None, metadata={"help": "With `accelerate_config`: address of machine 0."}
    )
    main_process_port: int | None = field(
        default=None, metadata={"help": "With `accelerate_config`: a free port on machine 0."}
    )


@dataclass
class BenchmarkArguments:
    """
    What to measure the cost of.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"convnext-tiny-digits"`):
            The architecture, as [`~hf_aace.models.model_from_architecture`] takes it.
        config_overrides (`dict`, *optional*):
            Fields of its configuration to change, in JSON.
        batch_size (`int`, *optional*, defaults to `64`):
            Images in a step.
        image_size (`int`, *optional*):
            Height and width of the images in pixels. Defaults to that of the configuration.
        fractions (`list[float]`, *optional*, defaults to `[0.25, 0.125, 0.0625]`):
            Values of `ascent_fraction` to measure beside the whole batch.
        rounds (`int`, *optional*, defaults to `20`):
            How often to time each method.
        warmup (`int`, *optional*, defaults to `3`):
            Rounds before that.
        device (`str`, *optional*, defaults to `"auto"`):
            `"cpu"`, `"cuda"`, or `"auto"`: a GPU if there is one.
        bf16 (`bool`, *optional*, defaults to `False`):
            Mixed precision.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Compile the model.
        peers (`bool`, *optional*, defaults to `False`):
            Measure pytorch_optimizer's SAM too.
        output_dir (`str`, *optional*, defaults to `"runs/benchmark"`):
            Where `benchmark.json` and `benchmark.png` go.
    """

    model_name_or_path: str = field(
        default="convnext-tiny-digits",
        metadata={
            "help": "The architecture: a built-in model, a model type of Transformers in its default size (`vit` is ViT-B/16, "
            "`convnext` ConvNeXt-T, at 224 pixels), a folder, or a model id on the Hub. Its weights are random."
        },
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration to change, in JSON: '{\"hidden_size\": 192}'."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a step."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the images, if not those of the configuration."}
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.25, 0.125, 0.0625],
        metadata={"help": "Values of `ascent_fraction` to measure beside the whole batch."},
    )
    rounds: int = field(default=20, metadata={"help": "How often to time each method, in turns."})
    warmup: int = field(default=3, metadata={"help": "Rounds before that."})
    device: str = field(default="auto", metadata={"help": "`cpu`, `cuda`, or `auto`: a GPU if there is one."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model."})
    peers: bool = field(
        default=False, metadata={"help": "Measure the SAM of pytorch_optimizer too (in the `dev` extra)."}
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Where benchmark.json and benchmark.png go."})


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        argv (`list[str]`, *optional*):
            The arguments of the command line. Defaults to those of the process.

    Returns:
        `int`: The exit code: 0, or 1 after bad input, which is told in one sentence, or 130 after Ctrl-C.

    Raises:
        `SystemExit`: By `argparse`, for `--help` and for usage errors (code 2).
    """
    parser = argparse.ArgumentParser(
        prog="hf-aace", description="Sharpness-aware training of image classifiers with the Hugging Face Trainer."
    )
    parser.add_argument("--version", action="version", version=f"hf-aace {version('hf-aace')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,benchmark,env}")
    commands.add_parser(
        "train",
        add_help=False,  # its own parser, with all the options, answers
        help="train a model; without options, a small ConvNeXt on scans of digits (see hf-aace train --help)",
    )
    commands.add_parser(
        "benchmark",
        add_help=False,
        help="measure what a step costs, with your model on your machine (see hf-aace benchmark --help)",
    )
    commands.add_parser("env", help="print versions and hardware, for a bug report")
    argv = sys.argv[1:] if argv is None else argv
    arguments, rest = parser.parse_known_args(argv)
    try:
        if arguments.command == "train":
            return _train(rest)
        if arguments.command == "benchmark":
            return _benchmark(rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _env()
    # What the libraries raise for input they cannot use: bad values, missing files, packages or features.
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"hf-aace: error{f' in process {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-aace: interrupted.", file=sys.stderr)
        return 130


# ---- hf-aace env -----------------------------------------------------------


def _env() -> int:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = ("hf-aace", "torch", "transformers", "accelerate", "datasets", "evaluate")
    report = {package: version(package) for package in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU threads": torch.get_num_threads(),
        "GPUs": ", ".join(gpus) or "none",
    }
    for name, value in report.items():
        print(f"{name}: {value}")
    return 0


# ---- hf-aace train: options ------------------------------------------------


def _train_parser(argv: list[str]) -> "HfArgumentParser":
    """The parser of `argv`, with the defaults that depend on it. Has answered `--help` and unknown options."""
    from transformers import HfArgumentParser

    from .config import AACEConfig

    kinds = (ModelArguments, DataArguments, LaunchArguments, AACEConfig)
    names = [option.name for kind in kinds for option in fields(kind) if option.init]
    parser = HfArgumentParser(
        kinds,
        prog="hf-aace train",
        usage="hf-aace train [--config FILE] [options]",  # all of them would fill pages, at every usage error
        description="Trains an image classifier with AACETrainer and leaves model, results and curves in output_dir.",
        allow_abbrev=False,  # an abbreviation would take a misspelt option for another one
    )
    parser.add_argument("--config", help="A YAML or JSON file with options by name; the command line overrides it.")
    parser.set_defaults(**_recipe(ModelArguments.model_name_or_path, DataArguments.dataset_name))
    config_path = parser.parse_known_args(argv)[0].config
    config = {} if config_path is None else _read_config(config_path, names)
    # The recipe depends on the model, which the configuration or the command line may name.
    parser.set_defaults(**config)
    chosen = parser.parse_known_args(argv)[0]
    parser.set_defaults(**_recipe(chosen.model_name_or_path, chosen.dataset_name) | config)
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = _did_you_mean(unknown[0].partition("=")[0].lstrip("-").replace("-", "_"), names, prefix="--")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
    return parser


def _recipe(model_name_or_path: str, dataset_name: str) -> dict[str, Any]:
    """Defaults of the training arguments: from scratch for a built-in model, fine-tuning for others."""
    import torch

    from .models import BUILTIN_MODELS

    recipe = {
        "output_dir": str(Path("runs") / f"{_last_part(model_name_or_path)}-{_last_part(dataset_name)}"),
        "lr_scheduler_type": "cosine",
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere it only warns
    }
    if model_name_or_path in BUILTIN_MODELS:
        return recipe | {
            "learning_rate": 3e-3,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
        }
    return recipe | {
        "learning_rate": 5e-5,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
    }


def _last_part(name: str) -> str:
    return Path(name).resolve().name if Path(name).is_dir() else Path(name).name


class _YamlLoader(yaml.SafeLoader):
    """Reads `3e-3` as a number and `no` as a word, as YAML 1.2 does; PyYAML keeps to YAML 1.1, which has both otherwise."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [
            resolver
            for resolver in resolvers
            if resolver[0] not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), "-+.0123456789"
)


def _read_config(path: str, names: list[str]) -> dict[str, Any]:
    """Reads a configuration file into defaults for a parser that has the options `names`."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        config = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader=_YamlLoader)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The configuration file {path} is neither valid YAML nor, by its suffix, JSON: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"The configuration file {path} must hold options as `name: value`, got {config!r}.")
    for key in config:
        if key not in names:
            raise ValueError(
                f"The configuration file {path} has an unknown key, {key!r}.{_did_you_mean(str(key), names)}"
            )
    # The parser converts defaults that are strings as it converts the command line, so all scalars go to it as such.
    # A key without a value leaves the default.
    return {
        key: value if isinstance(value, list | dict) else str(value)
        for key, value in config.items()
        if value is not None
    }


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


# ---- hf-aace train: the job ------------------------------------------------


def _launch(options: argparse.Namespace, argv: list[str]) -> int:
    """Runs `hf-aace train` with the options `argv` in the processes that `options` ask for."""
    from subprocess import CalledProcessError

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    shipped = Path(__file__).with_name("accelerate_configs")
    config = shipped / f"{options.accelerate_config}.yaml"
    if not config.is_file():
        config = Path(options.accelerate_config)
    if not config.is_file():
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise ValueError(f"`accelerate_config` must be one of {known}, or a file, got {options.accelerate_config!r}.")
    launch = [
        "--config_file",
        str(config),
        "--num_machines",
        options.num_machines,
        "--machine_rank",
        options.machine_rank,
    ]
    if options.num_processes is not None or options.accelerate_config in ("ddp", "fsdp2"):
        num_processes = options.num_processes or torch.cuda.device_count() * options.num_machines
        if num_processes < 1:
            raise ValueError("There are no GPUs here to start a process for. Say how many by `num_processes`.")
        launch += ["--num_processes", num_processes]
    if options.main_process_ip is not None:
        launch += ["--main_process_ip", options.main_process_ip]
    if options.main_process_port is not None or options.num_machines == 1:
        launch += ["--main_process_port", options.main_process_port or 0]  # 0 is any free one
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*map(str, launch), "--module", "hf_aace", "train", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The process has said why, unless it was killed.
        print(f"hf-aace: process {rank} failed first, with exit code {failure.exitcode}.", file=sys.stderr)
        return 1
    except CalledProcessError as error:
        return error.returncode
    except SignalException:
        return 130
    finally:
        del os.environ[_LAUNCHED]
    return 0


def _train(argv: list[str]) -> int:
    parser = _train_parser(argv)
    options = parser.parse_args(argv)
    if options.accelerate_config is not None and _LAUNCHED not in os.environ and "LOCAL_RANK" not in os.environ:
        return _launch(options, argv)
    model_args, data_args, _, training_args, *_ = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )

    from datasets import Image
    from transformers import set_seed

    from .data import image_transform, load_image_dataset
    from .metrics import compute_metrics_fn
    from .models import load_model_and_processor
    from .plots import plot_training_curves
    from .trainer import AACETrainer

    # The transform makes the columns that the model takes only when a batch is read.
    training_args.remove_unused_columns = False
    compute_metrics = compute_metrics_fn([name for name in data_args.metrics if name != "confusion_matrix"])
    with training_args.main_process_first(desc="loading the data set"):
        dataset = load_image_dataset(
            data_args.dataset_name,
            seed=training_args.seed,
            train_size=data_args.train_size,
            label_noise=data_args.label_noise,
        )
    set_seed(training_args.seed)
    id2label = dict(enumerate(dataset["train"].features["label"].names))
    model, processor = load_model_and_processor(model_args.model_name_or_path, id2label)
    # Left encoded, an image that cannot be decoded is named by the transform.
    dataset = dataset.cast_column("image", Image(decode=False)).with_transform(image_transform(processor))
    trainer = AACETrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=processor,
        compute_metrics=compute_metrics,
    )

    started = time.time()
    try:
        result = trainer.train(resume_from_checkpoint=_resume_from(training_args.resume_from_checkpoint))
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(f"\n{_how_to_resume(training_args.output_dir, started, argv)}", file=sys.stderr)
        return 130
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)

    prediction = trainer.predict(dataset["test"], metric_key_prefix="eval")
    metrics = dict(prediction.metrics)
    trainer.log_metrics("eval", metrics)
    if "confusion_matrix" in data_args.metrics:
        metrics |= _confusion_matrix(prediction, len(id2label))
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        picture = Path(training_args.output_dir) / "training_curves.png"
        drawn = plot_training_curves(trainer.state.log_history, picture)
        print(_summary(metrics, result.metrics["train_runtime"], training_args.output_dir, picture if drawn else None))
    return 0


def _confusion_matrix(prediction: "PredictionOutput", num_classes: int) -> dict[str, list[list[int]]]:
    from .metrics import load_metric, predicted_classes

    counts = load_metric("confusion_matrix").compute(
        predictions=predicted_classes(prediction.predictions), references=prediction.label_ids, num_classes=num_classes
    )
    return {"eval_confusion_matrix": counts["confusion_matrix"]}


def _resume_from(value: str | None) -> str | bool | None:
    """Reads the option `resume_from_checkpoint`, which comes as a string, for `Trainer.train`."""
    words = {"true": True, "false": None, "": None}
    return value if value is None else words.get(value.lower(), value)


def _how_to_resume(output_dir: str, started: float, argv: list[str]) -> str:
    # The state is what a checkpoint is given last: with it, the checkpoint is whole. Older ones are of another run.
    states = [state for state in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _time(state) >= started]
    if not states:
        return "Interrupted before the first checkpoint: there is nothing to resume from."
    resume = ["--resume_from_checkpoint", str(max(states, key=_time).parent)]
    if "LOCAL_RANK" in os.environ and _LAUNCHED not in os.environ:  # the launcher's part of the command is not known
        return f"Interrupted. To go on from the last checkpoint, add to the command:\n{shlex.join(resume)}"
    command = shlex.join(["hf-aace", "train", *argv, *resume])
    return f"Interrupted. To go on from the last checkpoint:\n{command}"


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _summary(metrics: dict[str, Any], seconds: float, output_dir: str, picture: Path | None) -> str:
    bookkeeping = (
        "eval_loss",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_model_preparation_time",
    )
    scores = [
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in metrics.items()
        if isinstance(value, float) and name not in bookkeeping
    ]
    return "\n".join(
        (
            f"Test:    {', '.join(scores)}",
            f"Time:    {timedelta(seconds=round(seconds))} for training",
            f"Model:   {output_dir}",
            f"Picture: {picture or 'none, since nothing was logged'}",
        )
    )


# ---- hf-aace benchmark -----------------------------------------------------


def _benchmark(argv: list[str]) -> int:
    # Before torch is imported: its profiler, which counts the memory, is talkative.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    import torch
    from transformers import HfArgumentParser, set_seed

    from .benchmark import default_methods, measure, random_batch, summarize
    from .config import AACEArguments, AACEConfig
    from .models import model_from_architecture
    from .plots import plot_costs

    parser = HfArgumentParser(
        BenchmarkArguments,
        prog="hf-aace benchmark",
        description="Measures what a training step costs: plain, AACE on all and on parts of the batch, and SAM.",
        allow_abbrev=False,
    )
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name in ("batch_size", "rounds"):
        if getattr(options, name) < 2:
            raise ValueError(f"`{name}` must be at least 2, got {getattr(options, name)}.")
    if options.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"`device` must be `auto`, `cpu` or `cuda`, got {options.device!r}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is `cuda`, but torch finds no GPU here. Use `cpu`.")
    try:
        overrides = json.loads(options.config_overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`config_overrides` must be a JSON object, got {options.config_overrides!r}: {error}"
        ) from error
    for fraction in options.fractions:
        AACEArguments(ascent_fraction=fraction).check_aace_arguments()
    on_gpu = options.device != "cpu" and torch.cuda.is_available()

    set_seed(0)
    model = model_from_architecture(options.model_name_or_path, overrides)
    args = AACEConfig(
        output_dir=options.output_dir,
        use_cpu=not on_gpu,
        bf16=options.bf16,
        torch_compile=options.torch_compile,
        dataloader_pin_memory=on_gpu,
    )
    parameters = sum(p.numel() for p in model.parameters())
    measurements = measure(
        model,
        random_batch(model, options.batch_size, options.image_size),
        args,
        default_methods(options.fractions),
        rounds=options.rounds,
        warmup=options.warmup,
        peers=options.peers,
    )
    rows = summarize(measurements, options.batch_size)
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    title = f"{_last_part(options.model_name_or_path)}, {parameters / 1e6:.1f} M parameters, batch {options.batch_size}, {hardware}"
    print(title)
    print(_cost_table(rows))

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "options": vars(options),
        "parameters": parameters,
        "hardware": hardware,
        "versions": {package: version(package) for package in ("hf-aace", "torch", "transformers", "accelerate")},
        "methods": rows,
        "seconds_of_each_step": {measurement.name: measurement.seconds for measurement in measurements},
    }
    (folder / "benchmark.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_costs(rows, title, folder / "benchmark.png")
    print(f"Numbers: {folder / 'benchmark.json'}\nPicture: {folder / 'benchmark.png'}")
    return 0


def _cost_table(rows: list[dict[str, Any]]) -> str:
    header = ("", "ms", "images/s", "ratio", "quartiles", "peak MB", "more than plain")
    lines = [
        (
            row["name"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['images_per_second']:.0f}",
            f"{row['ratio']:.3f}",
            "{:.3f} .. {:.3f}".format(*row["ratio_quartiles"]),
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['extra_peak_bytes'] / 1e6:+.1f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *lines]
    )

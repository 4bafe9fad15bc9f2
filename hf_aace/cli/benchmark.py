# SPDX-License-Identifier: Apache-2.0
"""`hf-aace benchmark`: what a training step costs."""

import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Before torch is imported: its profiler, which counts the memory, is talkative.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from transformers import HfArgumentParser, set_seed

from ..analysis.plots import plot_costs
from ..config import AACEArguments, AACEConfig
from ..study.cost import default_methods, measure, random_batch, summarize
from ..vision.models import model_from_architecture
from .options import last_part, pick_device
from .output import HelpFormatter, table


@dataclass
class BenchmarkArguments:
    """
    What to measure the cost of.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"convnext-tiny-digits"`):
            The architecture, as [`~hf_aace.vision.models.model_from_architecture`] takes it.
        config_overrides (`dict`, *optional*):
            Fields of its configuration to change, in JSON.
        batch_size (`int`, *optional*, defaults to `64`):
            Images in a step.
        image_size (`int`, *optional*):
            Height and width of the images in pixels. Defaults to that of the configuration.
        fractions (`list[float]`, *optional*, defaults to `[0.25, 0.125, 0.0625]`):
            Values of `ascent_fraction` to measure beside the whole batch.
        ascent_every (`list[int]`, *optional*, defaults to `[1]`):
            Values of `ascent_every` to measure each of them with.
        perturb_modules (`str`, *optional*):
            A regular expression over parameter names: AACE is measured with only these perturbed, too.
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
    ascent_every: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "Values of `ascent_every` to measure each of them with: `1 4` for an ascent pass on every step, and on "
            "every fourth."
        },
    )
    perturb_modules: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression over parameter names, such as `norm`: measure AACE with only these perturbed, too."
        },
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


def run(argv: list[str]) -> int:
    """Runs the command with the arguments `argv`; returns the exit code."""
    parser = HfArgumentParser(
        BenchmarkArguments,
        prog="hf-aace benchmark",
        description="Measures what a training step costs: plain, AACE on all and on parts of the batch, and SAM.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name in ("batch_size", "rounds"):
        if getattr(options, name) < 2:
            raise ValueError(f"`{name}` must be at least 2, got {getattr(options, name)}.")
    if options.warmup < 0:
        raise ValueError(f"`warmup` must be at least 0, got {options.warmup}.")
    on_gpu = pick_device(options.device).type == "cuda"
    try:
        overrides = json.loads(options.config_overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`config_overrides` must be a JSON object, got {options.config_overrides!r}: {error}"
        ) from error
    if not isinstance(overrides, dict):
        raise ValueError(f"`config_overrides` must be a JSON object, got {options.config_overrides!r}.")
    fractions = [fraction for fraction in dict.fromkeys(options.fractions) if fraction != 1]  # that is measured anyway
    for fraction in fractions:
        AACEArguments(ascent_fraction=fraction).check_aace_arguments()
    for every in options.ascent_every:
        AACEArguments(ascent_every=every).check_aace_arguments()
    AACEArguments(perturb_modules=options.perturb_modules).check_aace_arguments()

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
        default_methods(fractions, list(dict.fromkeys(options.ascent_every)), options.perturb_modules),
        rounds=options.rounds,
        warmup=options.warmup,
        peers=options.peers,
    )
    rows = summarize(measurements, options.batch_size)
    threads = torch.get_num_threads()
    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    title = f"{last_part(options.model_name_or_path)}, {parameters / 1e6:.1f} M parameters, batch {options.batch_size}, {hardware}"
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
    header = ["", "ms", "images/s", "ratio", "quartiles", "peak MB", "more than plain", "perturbation %"]
    lines = [
        [
            row["name"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['images_per_second']:.0f}",
            f"{row['ratio']:.3f}",
            "{:.3f} .. {:.3f}".format(*row["ratio_quartiles"]),
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['extra_peak_bytes'] / 1e6:+.1f}",
            "" if row["perturbation_share"] is None else f"{100 * row['perturbation_share']:.2f}",
        ]
        for row in rows
    ]
    return table(header, lines)

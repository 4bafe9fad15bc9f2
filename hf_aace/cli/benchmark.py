# SPDX-License-Identifier: Apache-2.0
"""`hf-aace benchmark`: the cost of a training step."""

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Before torch is imported: its profiler, which counts the memory, is talkative.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from transformers import set_seed

from ..config import AACEConfig
from ..model_card import describe_hardware
from ..study.cost import default_methods, measure, random_batch, summarize
from ..study.plots import plot_costs
from ..tensor_checks import check_at_least
from ..vision.models import model_from_architecture
from .checks import check_folder
from .options import last_part, pick_device
from .output import table, write_report
from .parser import OptionParser, option


@dataclass
class BenchmarkArguments:
    """The options of the command."""

    model_name_or_path: str = option(
        "convnext-tiny-digits",
        "The architecture: a built-in model, a model type of Transformers in its default size (`vit` is ViT-B/16, "
        "`convnext` ConvNeXt-T, at 224 pixels), a folder, or a model id on the Hub. Its weights are random.",
    )
    config_overrides: str | None = option(
        None, "Fields of the configuration to change, in JSON: '{\"hidden_size\": 192}'."
    )
    batch_size: int = option(64, "Images in a step.")
    image_size: int | None = option(
        None, "Height and width of the images in pixels. By default those of the configuration."
    )
    fractions: list[float] = option(  # noqa: RUF009
        [0.25, 0.125, 0.0625], "Values of `ascent_fraction` to measure beside the whole batch."
    )
    ascent_every: list[int] = option(  # noqa: RUF009
        [1],
        "Values of `ascent_every` to measure each with: `1 4` for an ascent pass on every step, and on every fourth.",
    )
    perturb_modules: str | None = option(
        None, "Measure AACE with this value of `perturb_modules` too, such as `norm`."
    )
    rounds: int = option(20, "How many times to measure each method, in turns.")
    warmup: int = option(3, "Rounds before that.")
    device: str = option("auto", "`cpu`, `cuda`, or `auto`: a GPU if there is one.")
    bf16: bool = option(False, "Mixed precision.")
    torch_compile: bool = option(False, "Compile the model.")
    peers: bool = option(False, "Measure the SAM of pytorch_optimizer too (in the `dev` extra).")
    output_dir: str = option("runs/benchmark", "The folder for benchmark.json and benchmark.png.")


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = OptionParser(
        (BenchmarkArguments,),
        prog="hf-aace benchmark",
        description="Measures what a training step costs: plain, AACE on all and on parts of the batch, and SAM.",
    )
    (options,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_at_least(2, batch_size=options.batch_size, rounds=options.rounds)
    check_at_least(0, warmup=options.warmup)
    on_gpu = pick_device(options.device).type == "cuda"
    try:
        overrides = dict(json.loads(options.config_overrides or "{}"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`config_overrides` must be a JSON object, got {options.config_overrides!r}: {error}."
        ) from error
    fractions = [fraction for fraction in dict.fromkeys(options.fractions) if fraction != 1]  # that is measured anyway
    methods = default_methods(fractions, list(dict.fromkeys(options.ascent_every)), options.perturb_modules)
    check_folder("output_dir", options.output_dir)
    set_seed(0)
    model = model_from_architecture(options.model_name_or_path, overrides)
    precision = {"bf16": options.bf16, "torch_compile": options.torch_compile}
    args = AACEConfig(options.output_dir, use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, **precision)
    batch = random_batch(model, options.batch_size, options.image_size)
    measurements = measure(
        model, batch, args, methods, rounds=options.rounds, warmup=options.warmup, peers=options.peers
    )
    rows = summarize(measurements, options.batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    hardware = describe_hardware(args.device, 1)
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
    write_report(report, folder / "benchmark.json")
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

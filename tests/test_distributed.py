# SPDX-License-Identifier: Apache-2.0
"""Several processes, really started (gloo, on the CPU): DDP and FSDP2 train as one process does."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from distributed_run import JOINT, MODES, run
from safetensors.torch import load_file
from tiny import activation_checkpointing, digits, identical, training_arguments, vit, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from transformers import TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

import hf_aace
from hf_aace import AACEConfig, AACETrainer
from hf_aace.distributed import average_gradients
from hf_aace.vision.models import load_model_and_processor


class Launch:
    """Runs scenarios of distributed_run.py on several processes, and reads what they left."""

    # Seconds. Not reached on any machine, however busy: a process that waits for another one gives up after 600.
    limit = 3600

    def __init__(self, folder, *groups, processes=2, on_gpu=False, fails=()):
        """Each group of scenarios has processes of its own. The last of each that is in `fails` ends them with an error."""
        self.folder, self.processes = folder, processes
        script = Path(__file__).with_name("distributed_run.py")
        try:
            done = subprocess.run(
                [sys.executable, script, folder, str(processes), json.dumps(groups)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.limit,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DISTRIBUTED_RUN_ON_GPU": str(int(on_gpu))},
                cwd=folder,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"Not done after {self.limit} s. {self.running()}\n{error.output[-5000:]}") from None
        told = f"{self.running()}\n{done.stdout[-10000:]}"
        assert done.returncode == 0, told
        self.ends = dict(zip((group[-1] for group in groups), json.loads(done.stdout.splitlines()[-1]), strict=True))
        assert all((error is not None) == (last in fails) for last, error in self.ends.items()), told
        ran = [name for group in groups for name in group if name not in fails]
        assert all((folder / f"{name}-0.pt").exists() for name in ran), told

    def running(self) -> str:
        """Tells the case that each process was at."""
        files = sorted(self.folder.glob("running-*.txt"))
        return " ".join(f"Process {file.stem[8:]} was at '{file.read_text()}'." for file in files)

    def results(self, name):
        return [torch.load(self.folder / f"{name}-{rank}.pt") for rank in range(self.processes)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """All that two processes do, in as few pairs as can be: each of these ends in a failure, after which the next one goes on."""
    return Launch(
        tmp_path_factory.mktemp("distributed"),
        [
            "ddp modes",
            "ddp not finite",
            "ddp joint",
            "ddp collectives",
            "ddp collectives, accumulated",
            "ddp switches",
            "ddp interrupted",
            "ddp uninterrupted",
            "ddp killed",
        ],
        [
            "ddp resumed",
            "fsdp2 joint",
            "fsdp2 not finite",
            "fsdp2 switches",
            "fsdp2 BatchNorm",
            "fsdp2 replicated",
            "fsdp2 interrupted",
            "fsdp2 uninterrupted",
            "fsdp2 killed",
        ],
        ["fsdp2 resumed", "ddp fails"],
        fails=("ddp killed", "fsdp2 killed", "ddp fails"),
    )


@functools.cache
def one_process(case):
    """Train one process on the joint batch."""
    with tempfile.TemporaryDirectory() as folder:
        return run(output_dir=folder, max_steps=5, **JOINT[case])


def check_equal_on_all(results):
    first, *others = results
    for other in others:
        assert identical(first["weights"], other["weights"])
        assert logs_to_compare(first) == logs_to_compare(other)


def logs_to_compare(result):
    """All that was logged. With FSDP2 on an older torch (seen with 2.9) Trainer's own `grad_norm` is that of a process's shards."""
    if torch.__version__ >= "2.13" or "FSDP" not in result["wrapper"]:
        return result["logs"]
    return [{name: value for name, value in log.items() if name != "grad_norm"} for log in result["logs"]]


def skipped(result):
    return sum(log["skipped_perturbations"] for log in result["logs"])


def check_equals_one_process(results, case, atol=1e-6):
    one = one_process(case)
    results = [result[case] for result in results]
    check_equal_on_all(results)
    assert "FSDP" in results[0]["wrapper"] or results[0]["wrapper"] == "DistributedDataParallel"
    for name, value in one["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=0, atol=atol)
    logs, expected = results[0]["logs"][0], one["logs"][0]
    assert ("perturbation_consistency" in expected) == (case == "consistency")
    for name in {"ascent_grad_norm", "perturbation_norm", "perturbation_consistency"} & expected.keys():
        assert logs[name] == pytest.approx(expected[name], rel=1e-4)
    if "uneven" not in case:  # there, the mean over the processes is not that over the samples
        for name in ("clean_loss", "clean_accuracy", "ascent_loss", "sharpness", "loss"):
            assert logs[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


# ---- DDP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_ddp_processes_end_with_equal_weights(pair, mode):
    """Each perturbs by its own gradient, or all by one; what the optimizer gets is one gradient, on clean weights."""
    results = [result[mode] for result in pair.results("ddp modes")]
    assert results[0]["wrapper"] == "DistributedDataParallel"
    check_equal_on_all(results)
    assert skipped(results[0]) == 0
    others = [result[other]["weights"] for result in pair.results("ddp modes")[:1] for other in MODES if other != mode]
    assert not any(identical(results[0]["weights"], other) for other in others)


@pytest.mark.parametrize("mode", MODES)
def test_ddp_counts_what_one_process_skips(pair, mode):
    """
    Two bad steps of one process: locally that one alone skips, synced all do, together. With micro-batches that perturb
    by themselves, each counts.
    """
    results = [result[mode] for result in pair.results("ddp not finite")]
    check_equal_on_all(results)
    assert all(value.isfinite().all() for value in results[0]["weights"].values())
    micro_batches = 1 if "full batch" in mode else MODES[mode].get("gradient_accumulation_steps", 1)
    assert skipped(results[0]) == 2 * micro_batches
    clean = pair.results("ddp modes")[0][mode]
    assert not identical(results[0]["weights"], clean["weights"])


@pytest.mark.parametrize("case", JOINT)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_synced_processes_equal_one_process_on_the_joint_batch(kind, case, pair):
    """Also where the processes have unequal numbers of samples that count."""
    check_equals_one_process(pair.results(f"{kind} joint"), case)


@pytest.mark.parametrize("name", ["ddp collectives", "ddp collectives, accumulated"])
def test_local_ascent_takes_no_collective(pair, name):
    """As many as plain Trainer, by the profiler; a synced one averages the gradient and the number of samples."""
    for counts in pair.results(name):
        micro_batches = 2 if "accumulated" in name else 1
        assert counts["plain"]
        assert counts["local"] == counts["plain"]
        synced = dict(counts["synced"])
        synced["c10d::allreduce_"] -= 2 * micro_batches
        assert synced == counts["plain"]


SWITCHES = (
    "find_unused_parameters",
    "not find_unused_parameters",
    "static_graph",
    "bucket views",
    "accumulation",
    "BatchNorm",
    "SyncBatchNorm",
    "bf16",
    "checkpointing",
    "reentrant checkpointing",
)


def without_statistics(weights):
    return {name: value for name, value in weights.items() if "running" not in name}


def check_against_plain(results):
    """An ascent pass with a vanishing step leaves no trace; a real one has an effect, the same on all processes."""
    for rank, result in enumerate(results):
        plain, vanishing = result["plain"]["weights"], result["vanishing"]["weights"]
        if (
            rank > 0
        ):  # DDP broadcasts BatchNorm statistics from the first process before the pass that averages gradients
            plain, vanishing = without_statistics(plain), without_statistics(vanishing)
        assert identical(plain, vanishing)
        assert torch.equal(result["plain"]["rng"], result["vanishing"]["rng"])
        assert not identical(result["plain"]["weights"], result["real"]["weights"])
    check_equal_on_all([result["real"] for result in results])


@pytest.mark.parametrize("switch", SWITCHES)
def test_ddp_goes_on_working(pair, switch):
    check_against_plain([result[switch] for result in pair.results("ddp switches")])


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("synced")])
def test_fsdp2_skips_together(pair, mode):
    results = [result[mode] for result in pair.results("fsdp2 not finite")]
    check_equal_on_all(results)
    assert all(value.isfinite().all() for value in results[0]["weights"].values())
    micro_batches = 1 if "full batch" in mode else MODES[mode].get("gradient_accumulation_steps", 1)
    assert skipped(results[0]) == 2 * micro_batches


@pytest.mark.parametrize(
    "switch",
    ["accumulation", "full batch", "bf16", "checkpointing", "gathered until the backward pass"],
)
def test_fsdp2_goes_on_working(pair, switch):
    check_against_plain([result[switch] for result in pair.results("fsdp2 switches")])


@pytest.mark.parametrize("rho", [0, 0.05])
def test_fsdp2_leaves_batch_norm_statistics_to_each_process(pair, rho):
    """It shards parameters and leaves buffers alone, plain training's too: a checkpoint holds those of the first process."""
    first, second = (result[rho]["weights"] for result in pair.results("fsdp2 BatchNorm"))
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    assert differ == {name for name in first if name.endswith(("running_mean", "running_var"))}


def test_norm_counts_copies_of_shards_once(pair):
    """HSDP, in which each shard lies on several processes."""
    for result in pair.results("fsdp2 replicated"):
        torch.testing.assert_close(result["sharded"], result["whole"])


# ---- Both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ascent", "descent"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_exception_leaves_the_weights(kind, where, pair):
    """And what the modules compute afterwards: FSDP2 could go on with the perturbed weights that it gathered."""
    for result in pair.results(f"{kind} interrupted"):
        assert identical(result[where]["before"], result[where]["after"])
        assert torch.equal(result[where]["logits"], result[where]["logits_after"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_killed_and_resumed_run_ends_as_one_never_killed(kind, pair):
    for uninterrupted, resumed in zip(
        pair.results(f"{kind} uninterrupted"), pair.results(f"{kind} resumed"), strict=True
    ):
        assert identical(uninterrupted["weights"], resumed["weights"])
        assert torch.equal(uninterrupted["rng"], resumed["rng"])
        assert uninterrupted["logs"][-1] == resumed["logs"][-1]


def test_failure_of_one_process_ends_the_run(pair):
    """With its error on screen, not by a hang, and with the last checkpoint whole."""
    assert "the image of rank 1 is broken" in pair.ends["ddp fails"]
    checkpoint = pair.folder / "ddp fails" / "checkpoint-4"
    assert TrainerState.load_from_json(checkpoint / "trainer_state.json").global_step == 4
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())
    assert torch.load(checkpoint / "optimizer.pt")["param_groups"]
    assert not (pair.folder / "ddp fails" / "checkpoint-8").exists()


# ---- More processes, and GPUs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_pair(tmp_path_factory):
    return Launch(tmp_path_factory.mktemp("compiled"), ["ddp compiled", "fsdp2 compiled"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_compiled_models_go_on_working(kind, compiled_pair):
    check_against_plain(compiled_pair.results(f"{kind} compiled"))


@pytest.mark.slow
def test_four_processes(tmp_path):
    launch = Launch(tmp_path, ["ddp modes", "ddp joint", "fsdp2 joint"], processes=4)
    for mode in MODES:
        check_equal_on_all([result[mode] for result in launch.results("ddp modes")])
    for case in JOINT:
        check_equals_one_process(launch.results("ddp joint"), case)
        check_equals_one_process(launch.results("fsdp2 joint"), case)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit-tiny-digits", "convnext-tiny-digits"])
def test_command_under_the_shipped_configuration_for_fsdp2(model, tmp_path):
    """By `accelerate launch`: it trains in shards, and leaves a model in one piece."""
    config = Path(hf_aace.__file__).with_name("cli") / "accelerate_configs" / "fsdp2.yaml"
    launcher = ["accelerate.commands.launch", *"--num_processes 2 --main_process_port 0 --config_file".split(), config]
    options = "--use_cpu true --ddp_backend gloo --max_steps 4 --train_size 40 --disable_tqdm true".split()
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launcher, Path(__file__).with_name("fsdp2_cli_run.py")),
            *("train", *options, "--model_name_or_path", model, "--output_dir", tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("`sync_ascent=False` is taken as True with FSDP2") == 1
    assert done.stdout.count("Test:") == 1
    built, _ = load_model_and_processor(model, {i: str(i) for i in range(10)})
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(p.numel() for p in built.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(tmp_path):
    scenarios = ["ddp modes", "ddp SyncBatchNorm", "ddp joint", "ddp collectives", "fsdp2 on GPUs"]
    launch = Launch(tmp_path, scenarios, on_gpu=True)
    for name in ("ddp modes", "ddp SyncBatchNorm"):
        for mode in launch.results(name)[0]:
            check_equal_on_all([result[mode] for result in launch.results(name)])
    for counts in launch.results("ddp collectives"):
        assert counts["local"] == counts["plain"]
    for case in JOINT:
        check_equals_one_process(launch.results("ddp joint"), case, atol=1e-5)
        check_equals_one_process(launch.results("fsdp2 on GPUs"), case, atol=1e-5)


# ---- What is refused ------------------------------------------------------------------------------------------------


class Elsewhere(AACETrainer):
    """As if on machines that are not here."""

    distributed_type, fsdp_version, parallelism = None, 2, None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        attributes = {
            "distributed_type": self.distributed_type,
            "is_fsdp2": self.distributed_type == DistributedType.FSDP and self.fsdp_version == 2,
            "parallelism_config": self.parallelism,
        }
        self.accelerator = Mock(wraps=self.accelerator, **attributes)
        self.is_deepspeed_enabled = self.distributed_type == DistributedType.DEEPSPEED


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, r"DeepSpeed, whose backward.*DDP.*FSDP2"),
        ({"distributed_type": DistributedType.FSDP, "fsdp_version": 1}, r"FSDP1, which is deprecated. Use FSDP2"),
        ({"distributed_type": DistributedType.XLA}, r"untested with.*XLA.*DDP.*FSDP2"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, r"untested with.*MEGATRON_LM.*DDP.*FSDP2"),
        ({"distributed_type": DistributedType.MULTI_NPU}, r"untested with.*MULTI_NPU.*DDP.*FSDP2"),
        (
            {"distributed_type": DistributedType.MULTI_GPU, "parallelism": ParallelismConfig(tp_size=2)},
            "tensor, context or sequence parallelism.*DDP.*FSDP2",
        ),
        (
            {"distributed_type": DistributedType.FSDP, "parallelism": ParallelismConfig(cp_size=2)},
            "tensor, context or sequence parallelism.*DDP.*FSDP2",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_construction(attributes, message, tmp_path):
    """Silence would mean plain training, or, with DeepSpeed, training on the ascent loss. Plain training stays possible."""
    trainer_class = type("_", (Elsewhere,), attributes)
    with pytest.raises(ValueError, match=message):
        trainer_class(vit(), training_arguments(AACEConfig, tmp_path))
    trainer_class(vit(), training_arguments(AACEConfig, tmp_path, rho=0))


@pytest.mark.parametrize("mode", ["sagemaker_model_parallel", "sagemaker_data_parallel", "tpu"])
def test_other_parallel_modes_are_refused(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode(mode))
    with pytest.raises(ValueError, match=r"does not go with ParallelMode.*DDP.*FSDP2"):
        AACETrainer(vit(), training_arguments(AACEConfig, tmp_path))


def test_models_loaded_as_shards_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = distribute_module(vit(), mesh)
        with pytest.raises(ValueError, match=r"loaded as shards.*Load it whole"):
            AACETrainer(model, training_arguments(AACEConfig, tmp_path))
    finally:
        torch.distributed.destroy_process_group()


def test_sparse_gradients_and_missing_ones_are_averaged():
    """As embeddings with `sparse=True` have them; the average itself is dense."""
    parameters = [torch.zeros(3, 2), torch.zeros(4)]
    gradient = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        averaged = average_gradients([gradient.to_sparse(), None], parameters)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(averaged[0], gradient) and torch.equal(averaged[1], torch.zeros(4))


def test_reentrant_checkpointing_with_static_graph_is_refused(tmp_path):
    """DDP would take the gradients of the ascent pass for its own, and the processes would drift apart."""
    trainer = AACETrainer(
        vit(),
        training_arguments(
            AACEConfig,
            tmp_path,
            ddp_static_graph=True,
            **activation_checkpointing(use_reentrant=True),
        ),
        train_dataset=digits(32),
    )
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"ddp_static_graph.*reentrant.*use_reentrant"):
        trainer.train()
    assert identical(weights(trainer.model), before)

# SPDX-License-Identifier: Apache-2.0
"""
Scenarios for test_distributed.py, on several processes: `distributed_run.py FOLDER PROCESSES GROUPS`, where GROUPS are lists of
names of scenarios as JSON. Each group has processes of its own, forked, so that everything is imported once. Each process leaves
what a scenario returns in FOLDER/SCENARIO-RANK.pt, and what it is at in FOLDER/running-RANK.txt. The last line tells how each group
has ended, as JSON: null, or the error.
"""

import copy
import gc
import json
import os
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from tiny import MODELS, VANISHING, activation_checkpointing, digits, learning_curve, training_arguments
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer, perturbed
from hf_aace.callbacks import PerturbationConsistencyCallback


ON_GPU = os.environ.get("DISTRIBUTED_RUN_ON_GPU") == "1"
# How long a process waits for the others within one collective, in seconds: this bounds a hang, however slow the machine.
WAIT = 600


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


class Fsdp2OnCpu:
    """Accelerate selects FSDP only for GPUs: this selects it for the CPU."""

    plugin = {}  # noqa: RUF012

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if world_size() > 1:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                **{"reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT", **self.plugin},
            )
            if self.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True


class BucketViews:
    """Trainer has no argument for it."""

    def _build_accelerator_args(self, **kwargs):
        arguments = super()._build_accelerator_args(**kwargs)
        arguments["kwargs_handlers"] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        return arguments


class SyncBatchNorms:
    """Only for GPUs."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), *args, **kwargs)


class SyncBatchNormOnCpu(torch.nn.BatchNorm2d):
    """Computes as SyncBatchNorm does, by collectives that the CPU has too: statistics over the samples of all processes."""

    def forward(self, input):
        dims = (0, 2, 3)
        sums = torch.stack([input.sum(dims), input.square().sum(dims)])
        count = input.numel() // input.shape[1] * world_size()
        mean, square = torch.distributed.nn.functional.all_reduce(sums) / count
        variance = square - mean.square()
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return input * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


class SyncBatchNormsOnCpu:
    """Torch has the real ones for GPUs only."""

    def __init__(self, model, *args, **kwargs):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.__class__ = SyncBatchNormOnCpu
        super().__init__(model, *args, **kwargs)


class NotFiniteOnLastRank:
    """The ascent gradient of the last process is not finite on the third and the fourth step."""

    def ascent_logits(self, outputs):
        logits = super().ascent_logits(outputs)
        bad = rank() == world_size() - 1 and self.state.global_step in (2, 3)
        return logits * float("nan") if bad else logits


class CountCollectives(TrainerCallback):
    """Counts the collectives of one step without logging, the fourth."""

    counts = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.profiler.__exit__(None, None, None)
            names = [event.name for event in self.profiler.events() if event.name.startswith("c10d::")]
            self.counts = {name: names.count(name) for name in sorted(set(names))}


def whole(model):
    """A copy of the state dict, sharded tensors put together."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
        for name, value in model.state_dict().items()
    }


def run(
    *mixins,
    name="vit",
    rows=None,
    callbacks=None,
    output_dir="unused",
    batch_size=16,
    dropout=0.0,
    resume=None,
    **kwargs,
):
    """Trains on a joint batch of `batch_size`, and returns the weights and the logs."""
    trainer_class = type("_", (*mixins, AACETrainer), {})
    arguments = training_arguments(
        AACEConfig,
        output_dir,
        **{
            "max_steps": 6,
            "rho": 0.05,
            "train_sampling_strategy": "sequential",
            # Without a preconditioner, which would blow up differences by rounding.
            "optim": "sgd",
            "learning_rate": 0.1,
            "logging_steps": 5,
            "per_device_train_batch_size": batch_size // world_size(),
            "use_cpu": not ON_GPU,
            "ddp_backend": "gloo" if world_size() > 1 and not ON_GPU else None,
            "ddp_timeout": WAIT,
            **copy.deepcopy(kwargs),  # Trainer writes into `accelerator_config`
        },
    )
    trainer = trainer_class(
        MODELS[name](dropout=dropout),
        arguments,
        train_dataset=rows or digits(128),
        eval_dataset=digits(32),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": whole(trainer.model),
        "logs": [entry for entry in learning_curve(trainer) if "loss" in entry],
        "rng": torch.get_rng_state(),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def uneven_rows():
    """Half of the second eight samples of each sixteen, those of the second of two processes, do not count."""
    rows = digits(128)
    return [{**row, "labels": -100} if index % 16 >= 12 else row for index, row in enumerate(rows)]


def against_plain(*mixins, **kwargs):
    """A plain run, one whose ascent pass must leave no trace, and a real one."""
    kwargs = {"max_steps": 4, "logging_steps": 2, "dropout": 0.1, **kwargs}
    return {
        "plain": run(*mixins, **{**kwargs, "rho": 0}),
        "vanishing": run(*mixins, **{**kwargs, "rho": VANISHING}),
        "real": run(*mixins, **kwargs),
    }


def collectives(**kwargs):
    counter = CountCollectives()
    run(callbacks=[counter], max_steps=5, **{"logging_steps": 10, **kwargs})
    return counter.counts


def interrupted(*mixins, where):
    """An exception in one of the passes of all processes: the weights of after, with what the modules then compute."""

    class Interrupted(RuntimeError):
        pass

    class Mine(*mixins, AACETrainer):
        broken = False

        def ascent_logits(self, outputs):
            if where == "ascent" and self.broken:
                raise Interrupted
            return super().ascent_logits(outputs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if where == "descent" and self.broken:
                raise Interrupted
            return loss

    arguments = training_arguments(
        AACEConfig,
        "unused",
        max_steps=3,
        rho=0.5,
        optim="sgd",
        per_device_train_batch_size=8,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
    )
    trainer = Mine(MODELS["vit"](), arguments, train_dataset=digits(64))
    trainer.train()
    before = whole(trainer.model)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model_wrapped(inputs["pixel_values"]).logits
    trainer.broken = True
    try:
        trainer.training_step(trainer.model_wrapped, inputs)
        raise AssertionError("nothing was raised")
    except Interrupted:
        pass
    with torch.no_grad():
        logits_after = trainer.model_wrapped(inputs["pixel_values"]).logits
    after = whole(trainer.model)  # last, since to take the state dict makes FSDP2 forget what it gathered
    return {"before": before, "after": after, "logits": logits, "logits_after": logits_after}


def step_on_replicated_shards():
    """Shards that have copies (HSDP): what `perturbed` makes of them, and of the whole tensors."""
    mesh = init_device_mesh("cpu", (world_size(), 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    tensors, gradients = [torch.randn(3, 5), torch.randn(4)], [torch.randn(3, 5), torch.randn(4)]
    sharded, sharded_gradients = (
        [distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]) for tensor in group]
        for group in (tensors, gradients)
    )
    result = {}
    for name, pair in {"whole": (tensors, gradients), "sharded": (sharded, sharded_gradients)}.items():
        with perturbed(*pair, 0.1, normalize=True, adaptive=True) as step:
            moved = [p.full_tensor().clone() if isinstance(p, DTensor) else p.clone() for p in pair[0]]
        result[name] = [*moved, step.grad_norm, step.norm]
    return result


class Kill(TrainerCallback):
    """SIGKILL on the seventh step, in the middle of an accumulation."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


class Fails:
    """The last process fails inside the ascent pass of the seventh step."""

    def ascent_logits(self, outputs):
        if rank() == world_size() - 1 and self.state.global_step == 6:
            raise RuntimeError("the image of rank 1 is broken")
        return super().ascent_logits(outputs)


RESUMABLE = {
    "train_sampling_strategy": "random",
    "dropout": 0.2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "gradient_accumulation_steps": 3,
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 8,
    "logging_steps": 4,
    "ascent_every": 3,
}

MODES = {
    "local": {},
    "synced": {"sync_ascent": True},
    "local, accumulated": {"gradient_accumulation_steps": 2},
    "synced, accumulated": {"sync_ascent": True, "gradient_accumulation_steps": 2},
    "synced, full batch": {"sync_ascent": True, "gradient_accumulation_steps": 3, "ascent_scope": "full_batch"},
    "local, full batch": {"gradient_accumulation_steps": 3, "ascent_scope": "full_batch"},
}

# What one process on the joint batch must equal.
JOINT = {
    "step": {},
    "convnext": {"name": "convnext"},
    "sam": {"perturbation_loss": "cross_entropy", "normalize_perturbation": True, "adaptive_perturbation": True},
    "uneven": {"rows": uneven_rows()},
    "micro batches": {"gradient_accumulation_steps": 3},
    "full batch": {"gradient_accumulation_steps": 3, "ascent_scope": "full_batch"},
    "full batch, uneven": {"gradient_accumulation_steps": 3, "ascent_scope": "full_batch", "rows": uneven_rows()},
    "reused": {"ascent_every": 3},
    "part of the model": {"perturb_modules": "layers"},
    # FSDP2 leaves some weights gathered after a pass without gradients.
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 1},
    "consistency": {"callbacks": [PerturbationConsistencyCallback()]},
}


# Runs of plain Trainer, with an ascent by itself, and with a joint one.
COLLECTIVES = {"plain": {"rho": 0}, "local": {}, "synced": {"sync_ascent": True}}


def scenarios(folder):
    """Returns the scenarios by name: a function to call, or one for each case."""
    plugin = lambda **kwargs: type("_", (Fsdp2OnCpu,), {"plugin": kwargs})  # noqa: E731
    # As the ascent pass asks for anyway: plain Trainer, left alone, adds the gradients up in another order.
    sync_each_batch = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    not_finite = {"logging_steps": 6}
    synced_modes = {mode: kwargs for mode, kwargs in MODES.items() if mode.startswith("synced")}
    return {
        "ddp modes": {mode: partial(run, **kwargs) for mode, kwargs in MODES.items()},
        "ddp not finite": {
            mode: partial(run, NotFiniteOnLastRank, **not_finite, **kwargs) for mode, kwargs in MODES.items()
        },
        "ddp joint": {case: partial(run, max_steps=5, sync_ascent=True, **kwargs) for case, kwargs in JOINT.items()},
        "ddp collectives": {name: partial(collectives, **kwargs) for name, kwargs in COLLECTIVES.items()},
        "ddp collectives, accumulated": {
            name: partial(collectives, gradient_accumulation_steps=2, **kwargs) for name, kwargs in COLLECTIVES.items()
        },
        "ddp switches": {
            "find_unused_parameters": partial(against_plain, ddp_find_unused_parameters=True),
            "not find_unused_parameters": partial(against_plain, ddp_find_unused_parameters=False),
            "static_graph": partial(against_plain, ddp_static_graph=True),
            "bucket views": partial(against_plain, BucketViews, gradient_accumulation_steps=2),
            "accumulation": partial(against_plain, gradient_accumulation_steps=2),
            "BatchNorm": partial(against_plain, name="resnet"),
            "SyncBatchNorm": partial(against_plain, SyncBatchNormsOnCpu, name="resnet"),
            "bf16": partial(against_plain, bf16=True),
            "checkpointing": partial(against_plain, gradient_accumulation_steps=2, **activation_checkpointing(False)),
            "reentrant checkpointing": partial(
                against_plain, gradient_accumulation_steps=2, **activation_checkpointing(True)
            ),
        },
        "ddp compiled": partial(against_plain, **compiled),
        "ddp SyncBatchNorm": {
            mode: partial(run, SyncBatchNorms, name="resnet", **MODES[mode]) for mode in ("local", "synced")
        },
        "ddp interrupted": {where: partial(interrupted, where=where) for where in ("ascent", "descent")},
        "ddp uninterrupted": partial(run, output_dir=folder / "ddp uninterrupted", **RESUMABLE),
        "ddp killed": partial(run, output_dir=folder / "ddp killed", callbacks=[Kill()], **RESUMABLE),
        "ddp resumed": partial(run, output_dir=folder / "ddp killed", resume=True, **RESUMABLE),
        "ddp fails": partial(
            run, Fails, max_steps=8, output_dir=folder / "ddp fails", save_strategy="steps", save_steps=4
        ),
        "fsdp2 joint": {case: partial(run, Fsdp2OnCpu, max_steps=5, **kwargs) for case, kwargs in JOINT.items()},
        "fsdp2 on GPUs": {
            case: partial(run, max_steps=5, fsdp=True, fsdp_config={"version": 2}, **kwargs)
            for case, kwargs in JOINT.items()
        },
        "fsdp2 not finite": {
            mode: partial(run, Fsdp2OnCpu, NotFiniteOnLastRank, **not_finite, **kwargs)
            for mode, kwargs in synced_modes.items()
        },
        "fsdp2 switches": {
            "accumulation": partial(against_plain, Fsdp2OnCpu, gradient_accumulation_steps=2, **sync_each_batch),
            "full batch": partial(against_plain, Fsdp2OnCpu, gradient_accumulation_steps=2, ascent_scope="full_batch"),
            "bf16": partial(against_plain, Fsdp2OnCpu, bf16=True),
            "checkpointing": partial(against_plain, plugin(activation_checkpointing=True)),
            "gathered until the backward pass": partial(against_plain, plugin(reshard_after_forward=False)),
        },
        "fsdp2 replicated": step_on_replicated_shards,
        "fsdp2 interrupted": {where: partial(interrupted, Fsdp2OnCpu, where=where) for where in ("ascent", "descent")},
        "fsdp2 uninterrupted": partial(run, Fsdp2OnCpu, output_dir=folder / "fsdp2 uninterrupted", **RESUMABLE),
        "fsdp2 killed": partial(run, Fsdp2OnCpu, output_dir=folder / "fsdp2 killed", callbacks=[Kill()], **RESUMABLE),
        "fsdp2 resumed": partial(run, Fsdp2OnCpu, output_dir=folder / "fsdp2 killed", resume=True, **RESUMABLE),
        "fsdp2 compiled": partial(against_plain, Fsdp2OnCpu, **compiled),
        "fsdp2 BatchNorm": {rho: partial(run, Fsdp2OnCpu, name="resnet", max_steps=3, rho=rho) for rho in (0, 0.05)},
    }


def work(local_rank, processes, port, folder, names):
    """Run scenarios as one of several processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    if not ON_GPU:  # else accelerate makes the group, with `ddp_timeout`, which it leaves out on the CPU
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=WAIT))

    def result_of(function, *what):
        (folder / f"running-{rank()}.txt").write_text(": ".join(what))
        return function()

    for name in names:
        scenario = scenarios(folder)[name]
        if isinstance(scenario, dict):
            result = {case: result_of(function, name, str(case)) for case, function in scenario.items()}
        else:
            result = result_of(scenario, name)
        torch.save(result, folder / f"{name}-{rank()}.pt")
    (folder / f"running-{rank()}.txt").unlink()
    torch.distributed.destroy_process_group()


def main(folder, processes, groups):
    torch.set_num_threads(1)
    gc.freeze()  # or the `gc.collect()` in each `train()` visits all of Transformers
    ends = []
    for names in groups:
        arguments = (processes, get_free_port(), folder, names)
        try:
            start_processes(work, arguments, processes, start_method="spawn" if ON_GPU else "fork")
            ends.append(None)
        except (ProcessExitedException, ProcessRaisedException) as error:
            ends.append(str(error))
    print("\n" + json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))

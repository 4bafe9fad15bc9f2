# SPDX-License-Identifier: Apache-2.0
"""`torch_compile`, and backends that use their memory again."""

import pytest
import torch
from comparison import Linear, train
from functorch.compile import make_boxed_func
from tiny import (
    digits,
    resnet,
    vit,
    weights,
)
from torch._dynamo.backends.common import aot_autograd
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer
from hf_aace.callbacks import PerturbationConsistencyCallback


def test_torch_compile_does_not_compile_again_after_the_first_steps(tmp_path):
    from torch._dynamo.utils import counters

    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    kwargs = {"torch_compile": True, "torch_compile_backend": "aot_eager", "rows": digits(96)}
    train(Trainer, TrainingArguments, vit(), tmp_path, callbacks=[Count()], **kwargs)
    plain = graphs.pop()
    graphs.clear()
    torch._dynamo.reset()
    counters.clear()
    train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.2, callbacks=[Count()], **kwargs)
    assert graphs[1] == graphs[-1], "everything is compiled within two steps"
    assert graphs[-1] <= plain + 1, "one graph more, for the pass without labels"


def test_torch_compile_trains_as_without(tmp_path):
    eager = train(AACETrainer, AACEConfig, resnet(), tmp_path, rho=0.1)
    torch._dynamo.reset()
    compiled = train(
        AACETrainer, AACEConfig, resnet(), tmp_path, rho=0.1, torch_compile=True, torch_compile_backend="aot_eager"
    )
    for name, value in weights(eager.model).items():
        torch.testing.assert_close(weights(compiled.model)[name], value, rtol=1e-4, atol=1e-5)


def backend_whose_gradients_do_not_last():
    """Does with memory what CUDA graphs do: the gradients of a backward pass are good until the next forward pass."""
    lent = []

    def forward(graph, example_inputs):
        def run(*args):
            for tensor in lent:
                tensor.fill_(float("nan"))
            lent.clear()
            return graph(*args)

        return make_boxed_func(run)

    def backward(graph, example_inputs):
        def run(*args):
            gradients = graph(*args)
            lent.extend(g for g in gradients if g is not None)  # which autograd copies then, and does not take over
            return gradients

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward)


@pytest.mark.parametrize(
    "switch",
    [
        {"ascent_every": 2},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "ascent_scope": "full_batch"},
        {"callbacks": [PerturbationConsistencyCallback()]},
    ],
    ids=["ascent_every", "micro_batch", "full_batch", "consistency"],
)
def test_nothing_is_kept_in_memory_that_cuda_graphs_use_again(switch, tmp_path):
    """As with `torch_compile_mode="reduce-overhead"`, which needs a GPU."""
    torch._dynamo.reset()
    model = Linear()
    model.forward = torch.compile(model.forward, backend=backend_whose_gradients_do_not_last())
    kwargs = {"rho": 0.2, "rows": digits(256), "logging_steps": 2, **switch}
    eager, compiled = (train(AACETrainer, AACEConfig, m, tmp_path, **kwargs) for m in (Linear(), model))
    for name, value in weights(eager.model).items():
        torch.testing.assert_close(weights(compiled.model)[name], value, rtol=1e-4, atol=1e-5)
    logs = [[log for log in t.state.log_history if "perturbation_norm" in log] for t in (eager, compiled)]
    for expected, log in zip(*logs, strict=True):
        assert log == pytest.approx(expected, rel=1e-3, nan_ok=True)

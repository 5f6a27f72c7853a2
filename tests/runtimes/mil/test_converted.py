"""Packages that coremltools converts from torch: a second hand that writes what the interpreter reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from runtimes.mil import Interpreter
from tests.runtimes.mil.building import ct


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.pool, self.out = nn.AvgPool2d(2), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = self.pool(torch.nn.functional.silu(self.second(y)) + y)
        return torch.softmax(self.out(y.flatten(1)), -1)


def converted(module: nn.Module, example: tuple[torch.Tensor, ...], folder: Path, **options: Any) -> Path:
    program = torch.export.export(module.eval(), example).run_decompositions()
    ct.convert(program, convert_to="mlprogram", skip_model_load=True, **options).save(str(folder))
    return folder


def test_a_small_convolutional_net_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 16, 16)
    net.norm.running_mean, net.norm.running_var = torch.randn(8), torch.rand(8) + 0.5
    wanted = net.eval()(x)
    folder = converted(net, (x,), tmp_path / "net.mlpackage", compute_precision=ct.precision.FLOAT32)
    read = Interpreter(folder)
    name = read.package.function().inputs[0].name
    torch.testing.assert_close(next(iter(read.run({name: x}).values())), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_bert_agrees(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False).eval()

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return found

    ids, mask = torch.randint(0, 50, (1, 12)), torch.ones(1, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
    tensors = [ct.TensorType(name, (1, 12), dtype=np.int32) for name in ("ids", "mask")]
    target = ct.target.iOS18
    folder = converted(
        Hidden(), (ids, mask), tmp_path / "b.mlpackage", inputs=tensors, minimum_deployment_target=target
    )
    for mode, bound in (("fp32", 2e-3), ("fp16", 1e-2)):
        read = Interpreter(folder, mode)
        found = next(iter(read.run({"ids": ids.int(), "mask": mask.int()}).values()))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < bound

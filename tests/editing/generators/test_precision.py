"""Generators with bfloat16 weights: no pass converts a matrix to another dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from editing.condition import Condition
from editing.generators.generator import Generator
from editing.generators.load import load_generator
from tests.generators import FAMILIES
from tests.pipelines import WIDTH, write_pipeline


class ConvertedMatrices(TorchDispatchMode):
    """Records the names of matrices that are converted to another dtype."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._by_address = {each.data_ptr(): name for name, each in network.named_parameters() if each.ndim > 1}

    def __torch_dispatch__(self, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._by_address:
            self.names.add(self._by_address[args[0].data_ptr()])
        return operator(*args, **(kwargs or {}))


def load(name: str, folder: Path) -> tuple[Generator, Condition]:
    if name == "unet":
        write_pipeline(folder)
        condition = Condition(torch.randn(1, 20, WIDTH))
    else:
        FAMILIES[name].write(folder)
        condition = FAMILIES[name].draw_condition(seed=1)
    dtypes = torch.bfloat16, torch.float32
    generator = load_generator(folder, device=torch.device("cpu"), dtype=dtypes[0], autoencoder_dtype=dtypes[1])
    return generator, condition


@pytest.mark.parametrize("name", ["unet", *FAMILIES])
def test_passes_convert_no_matrix(name: str, tmp_path: Path) -> None:
    generator, condition = load(name, tmp_path)
    condition.states.requires_grad_()
    with ConvertedMatrices(generator.network) as converted:
        prediction = generator.predict(torch.randn(1, *generator.latent_shape), torch.tensor([500.0]), condition)
        torch.autograd.grad(prediction.sum(), condition.states)
    assert prediction.dtype == torch.float32
    assert converted.names == set()


def test_conversion_of_a_matrix_is_found(tmp_path: Path) -> None:
    generator, condition = load("sd3", tmp_path)
    generator.network.float()
    with ConvertedMatrices(generator.network) as converted, torch.autocast("cpu", dtype=torch.bfloat16):
        generator.predict(torch.randn(1, *generator.latent_shape), torch.tensor([500.0]), condition)
    assert "context_embedder.weight" in converted.names

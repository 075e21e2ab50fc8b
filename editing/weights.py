"""Export edited components as files, and load files for a while. `editing.adapters` exports updates alone."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from editing.encoders.base import TextEncoder
from editing.errors import UnsupportedPipeline
from editing.families.layout import find_weights, list_parts
from editing.files import read_bytes, read_safetensors_header, replace_atomically, write_atomically
from editing.pipelines import EditablePipeline
from editing.restore import restore_weights
from editing.stage_two.update import Update
from editing.uce.projections import ProjectionUpdate

PREFIX = "text_model."
Change = Callable[[Tensor], Tensor]
"""Returns a weight's new value in the same dtype."""


def export_text_encoder(encoder: TextEncoder, update: Update, folder: str | Path) -> tuple[Path, ...]:
    """Write the encoder's `config.json` and weights below `folder`, in as many files as the base has.

    The base is copied tensor by tensor, bit for bit and in its own dtype. Only the output matrices of the edited layers
    differ, rounded once from float64. Equal inputs give equal bytes. Returns the paths.

    Keys of CLIP in one file have the prefix `text_model.` for every transformers version: older loaders that do not
    find it keep random weights with only a warning.
    """
    if encoder.folder is None:
        raise UnsupportedPipeline("the encoder was not loaded from a folder: there is no base file to edit")
    weights = find_weights(encoder.folder.parent, encoder.name)
    changes = {
        find_output_matrix_key(encoder, layer, list_parts(weights)): partial(_add_change, change=change.to_dense)
        for layer, change in update.layers.items()
    }
    target = Path(folder) / encoder.name
    if encoder.spec.kind != "clip" or weights.suffix == ".json":
        return _copy_with_changes(weights, target, changes)
    tensors = read_base(weights)
    for key, change in changes.items():
        tensors[_add_prefix(key)] = change(tensors[_add_prefix(key)])
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "config.json", read_bytes(encoder.folder / "config.json"))
    # transformers requires this one metadata key. safetensors would write several in random order.
    write_atomically(target / weights.name, save(tensors, metadata={"format": "pt"}))
    return target / "config.json", target / weights.name


def find_output_matrix_key(encoder: TextEncoder, layer: int, parts: Sequence[Path]) -> str:
    """Return the key that a layer's output matrix has in the component's files. Raises `UnsupportedPipeline`.

    What comes before the layer differs among versions of transformers and among models that contain the encoder.
    """
    end = encoder.key.format(layer)
    found: list[str] = []
    for part in parts:
        with safe_open(part, framework="pt") as file:
            found += [key for key in file.keys() if key == end or key.endswith(f".{end}")]
    if len(found) != 1:
        raise UnsupportedPipeline(f"{encoder.name}/ has {len(found)} weights named {end}: one is needed")
    return found[0]


def _add_change(weight: Tensor, change: Callable[[], Tensor]) -> Tensor:
    """Return a weight plus its change, rounded once."""
    return (weight.double() + change().to(weight.device)).to(weight.dtype)


@contextmanager
def load_temporarily(module: nn.Module, path: str | Path) -> Iterator[None]:
    """Load a safetensors file into a module, in the module's dtype, and restore its weights on exit, bit for bit.

    Keys may have the prefix `text_model.` or not. Only tensors that differ are copied. The file may be one of several.
    Raises `UnsupportedPipeline` if it does not fit the module.
    """
    own = {key.removeprefix(PREFIX): tensor for key, tensor in module.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        changed = {}
        for name in file.keys():
            if name.endswith("position_ids"):  # a buffer of old files
                continue
            tensor, weight = file.get_tensor(name), _find_weight(own, name.removeprefix(PREFIX))
            if weight is None or weight.shape != tensor.shape:
                raise UnsupportedPipeline(f"{Path(path).name} has {name}, which does not fit the module")
            if not torch.equal(weight, tensor.to(weight)):
                changed[name] = weight
        with restore_weights(changed.values()):
            with torch.no_grad():
                for name, weight in changed.items():
                    weight.copy_(file.get_tensor(name).to(weight))
            yield


def _find_weight(weights: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Return the weight of a file's key, which may lack the name of the module that has the language model."""
    if key in weights:
        return weights[key]
    end = f".{key.removeprefix('model.')}"
    found = [weight for own, weight in weights.items() if own.endswith(end)]
    return found[0] if len(found) == 1 else None


@contextmanager
def load_components_temporarily(pipeline: EditablePipeline, files: Iterable[tuple[str, str | Path]]) -> Iterator[None]:
    """Load files into a pipeline, each given with its component's name, and restore its weights on exit."""
    modules: dict[str, nn.Module] = {encoder.name: encoder.model for encoder in pipeline.encoders}
    modules[pipeline.generator.component] = pipeline.generator.network
    with ExitStack() as stack:
        for component, path in files:
            stack.enter_context(load_temporarily(modules[component], path))
        yield


def export_generator(pipeline: EditablePipeline, update: ProjectionUpdate, folder: str | Path) -> tuple[Path, ...]:
    """Write `unet/` or `transformer/` below `folder`: the configuration and the weights, in as many files as the base.

    Each file equals the base's byte for byte except for the text projections, which are rounded once from float64 to
    their dtype. Equal inputs give equal bytes. Memory holds one tensor at a time. Returns the paths.
    """
    if pipeline.folder is None:
        raise UnsupportedPipeline("the pipeline was not loaded from a folder: there is no base file to edit")
    changes = {
        f"{name}.weight": lambda weight: (weight.double() + update.to_dense(weight)).to(weight.dtype)
        for name in update.relative_norms
    }
    component = pipeline.generator.component
    return _copy_with_changes(find_weights(pipeline.folder, component), Path(folder) / component, changes)


def _copy_with_changes(weights: Path, target: Path, changes: Mapping[str, Change]) -> tuple[Path, ...]:
    """Copy `config.json`, the weights and their index to the folder `target`, and change the weights of these keys.

    The files equal the base's byte for byte but for these weights. Memory holds one tensor at a time. Returns the
    paths. Raises `UnsupportedPipeline` for a key that the weights lack.
    """
    parts, copied = list_parts(weights), ["config.json"]
    if weights.suffix == ".json":
        copied.append(weights.name)
    target.mkdir(parents=True, exist_ok=True)
    missing = set(changes)
    for part in parts:
        with replace_atomically(target / part.name) as temporary:
            shutil.copyfile(part, temporary)
            missing -= _change_in_place(temporary, changes)
    if missing:
        raise UnsupportedPipeline(f"{weights.parent.name}/ has no {min(missing)}")
    for name in copied:
        write_atomically(target / name, read_bytes(weights.parent / name))
    return tuple(target / name for name in (*copied, *(part.name for part in parts)))


def _change_in_place(path: Path, changes: Mapping[str, Change]) -> set[str]:
    """Change in place those of these weights that the safetensors file has. Return their keys."""
    with path.open("r+b") as file:
        header, start = read_safetensors_header(file)
        present = changes.keys() & header.keys()
        with safe_open(path, framework="pt") as tensors:
            for key in sorted(present):
                edited = changes[key](tensors.get_tensor(key))
                file.seek(start + header[key]["data_offsets"][0])
                file.write(edited.contiguous().view(torch.uint8).numpy().tobytes())
    return present


def read_base(path: Path) -> dict[str, Tensor]:
    """Read a base text encoder's tensors unchanged, with the prefix in their keys."""
    with safe_open(path, framework="pt") as file:
        return {_add_prefix(key): file.get_tensor(key) for key in file.keys()}


def _add_prefix(key: str) -> str:
    bare = key.removeprefix(PREFIX)
    return PREFIX + bare if bare.split(".")[0] in ("embeddings", "encoder", "final_layer_norm") else key

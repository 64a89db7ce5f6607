"""What loaders of weights share: reading them from wherever they are, and saying what is wrong with them."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def read(what: str, source: object, files: Sequence[str] = (SAFETENSORS,)) -> tuple[Mapping[str, Tensor], object]:
    """The weights, and a configuration where the source has one: a state dict, a module, a file or a folder."""
    if isinstance(source, Mapping):
        return source, None
    if isinstance(source, nn.Module):
        return source.state_dict(), getattr(source, "config", None)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{what}: there is no {path}")
    if path.is_dir():
        found = [path / name for file in files for name in (file, f"{file}.index.json") if (path / name).exists()]
    else:
        found = [path] if path.suffix in {Path(file).suffix for file in files} else []
    if not found:
        there = sorted(x.name for x in path.iterdir()) if path.is_dir() else [path.name]
        raise ValueError(f"{what}: {path} must be, or hold, a {' or a '.join(files)}; found {there}")
    config = found[0].with_name("config.json")
    return _load(what, found[0]), json.loads(config.read_text()) if config.exists() else None


def _load(what: str, file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".json":  # names the files that hold a part each
        parts = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        return {name: x for part in parts for name, x in _load(what, file.with_name(part)).items()}
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise ImportError(f"{what}: reading .safetensors needs the package safetensors: pip install it") from None
    return load_file(file)


def config_mapping(what: str, kind: str, config: object) -> Mapping[str, object]:
    """A configuration as a dict: from a dict, or from a configuration object of ``transformers``."""
    if config is None:
        raise ValueError(f"{what}: these weights come without a config: pass config=, a dict as in config.json")
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"{what}: config must be a dict as in config.json, or a {kind}, got {type(config)}")
    return config


def check(
    what: str,
    whose: str,
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, Tensor],
    ignored: Collection[str] = (),
) -> None:
    """Raises unless the weights have these names and shapes, and no more names but the ignored."""
    missing = [name for name in shapes if name not in weights]
    unexpected = sorted(weights.keys() - shapes.keys() - set(ignored))
    misfits = [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    for problem, names in (
        ("lack", missing),
        (f"are not all {whose}:", unexpected),
        ("do not fit:", misfits),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{what}: the weights {problem} {', '.join(names[:5])}{more}")

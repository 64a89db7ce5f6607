"""Hugging Face's BERT weights, from wherever they are, into a BertEncoder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .bert import BertConfig

# Our module -> theirs. Where there are several, ours holds theirs one after another.
_EMBEDDINGS = {
    "word_embeddings": ["embeddings.word_embeddings"],
    "position_embeddings": ["embeddings.position_embeddings"],
    "token_type_embeddings": ["embeddings.token_type_embeddings"],
    "embeddings_norm": ["embeddings.LayerNorm"],
}
_LAYER = {
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention_out": ["attention.output.dense"],
    "attention_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"],
    "down": ["output.dense"],
    "output_norm": ["output.LayerNorm"],
}
_POOLER = "pooler.dense"
_PREFIX = "bert."
_NO_WEIGHTS = {"embeddings.position_ids", "embeddings.token_type_ids"}  # buffers that count up, in older files
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def load(
    encoder_class: type, source: object, config: object, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    weights, found_config = _read(source)
    if config is None:
        config = found_config
    if config is None:
        raise ValueError("BertEncoder: these weights come without a config: pass config=, a dict as in config.json")
    config = _as_config(config)
    weights = _plain_names(weights)
    words = _embedding(weights)
    with torch.device("meta"):  # no time for random weights that go at once
        encoder = encoder_class(config, pooler=any(name.startswith(_POOLER) for name in weights))
    encoder = encoder.to(dtype or words.dtype).to_empty(device=device or words.device)
    _copy(encoder, weights)
    return encoder.eval()


def _read(source: object) -> tuple[Mapping[str, Tensor], object]:
    """The weights, and a configuration where the source has one."""
    if isinstance(source, Mapping):
        return source, None
    if isinstance(source, nn.Module):
        return source.state_dict(), getattr(source, "config", None)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"BertEncoder: there is no {path}")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists() or file.suffix != ".safetensors":
        there = sorted(x.name for x in path.iterdir()) if path.is_dir() else [path.name]
        raise ValueError(f"BertEncoder: {path} must be, or hold, a model.safetensors; found {there}")
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise ImportError("BertEncoder: reading .safetensors needs the package safetensors: pip install it") from None
    config = file.with_name("config.json")
    return load_file(file), json.loads(config.read_text()) if config.exists() else None


def _as_config(config: object) -> BertConfig:
    if isinstance(config, BertConfig):
        return config
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"BertEncoder: config must be a dict as in config.json, or a BertConfig, got {type(config)}")
    return BertConfig.from_huggingface(config)


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix "bert.", and what lies outside it; with today's names for the norms' weights."""
    if any(name.startswith(_PREFIX) for name in weights):
        weights = {name.removeprefix(_PREFIX): x for name, x in weights.items() if name.startswith(_PREFIX)}
    plain = {}
    for name, x in weights.items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        plain[name] = x
    return plain


def _embedding(weights: Mapping[str, Tensor]) -> Tensor:
    name = "embeddings.word_embeddings.weight"
    if name not in weights:
        raise ValueError(f"BertEncoder: the weights lack {name} (and bert.{name}): they are not of a BERT model")
    return weights[name]


def _sources(encoder: nn.Module) -> Iterator[tuple[Tensor, list[str]]]:
    """Each parameter, and the names of theirs that fill it."""
    modules = dict(_EMBEDDINGS)
    for i in range(len(encoder.layers)):
        modules |= {
            f"layers.{i}.{ours}": [f"encoder.layer.{i}.{name}" for name in theirs] for ours, theirs in _LAYER.items()
        }
    if encoder.pooler is not None:
        modules["pooler"] = [_POOLER]
    for name, parameter in encoder.named_parameters():
        module, kind = name.rsplit(".", 1)
        yield parameter, [f"{theirs}.{kind}" for theirs in modules[module]]


@torch.no_grad()
def _copy(encoder: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parts = [
        (name, part)
        for parameter, names in _sources(encoder)
        for name, part in zip(names, parameter.chunk(len(names)), strict=True)
    ]
    missing = [name for name, _ in parts if name not in weights]
    unexpected = sorted(weights.keys() - {name for name, _ in parts} - _NO_WEIGHTS)
    shapes = [
        f"{name} is {tuple(weights[name].shape)} and must be {tuple(part.shape)}"
        for name, part in parts
        if name in weights and weights[name].shape != part.shape
    ]
    for problem, names in (
        ("lack", missing),
        ("are not all BERT's:", unexpected),
        ("do not fit:", shapes),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"BertEncoder: the weights {problem} {', '.join(names[:5])}{more}")
    for name, part in parts:
        part.copy_(weights[name])

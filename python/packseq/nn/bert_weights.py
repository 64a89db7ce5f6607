"""Hugging Face's BERT weights, from wherever they are, into a BertEncoder."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .bert import BertConfig
from .weights import check, config_mapping, read

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
    weights, found_config = read("BertEncoder", source)
    config = found_config if config is None else config
    if not isinstance(config, BertConfig):
        config = BertConfig.from_huggingface(config_mapping("BertEncoder", "BertConfig", config))
    weights = _plain_names(weights)
    words = _embedding(weights)
    with torch.device("meta"):  # no time for random weights that go at once
        encoder = encoder_class(config, pooler=any(name.startswith(_POOLER) for name in weights))
    encoder = encoder.to(dtype or words.dtype).to_empty(device=device or words.device)
    with torch.no_grad():
        parts = {
            name: part
            for parameter, names in _sources(encoder)
            for name, part in zip(names, parameter.chunk(len(names)), strict=True)
        }
        check("BertEncoder", "BERT's", {name: part.shape for name, part in parts.items()}, weights, _NO_WEIGHTS)
        for name, part in parts.items():
            part.copy_(weights[name])
    return encoder.eval()


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

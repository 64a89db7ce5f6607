"""Hugging Face's and mamba-ssm's weights, from wherever they are, into a MambaLM."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .mamba_lm import MambaConfig
from .weights import PICKLED, SAFETENSORS, check, config_mapping, read

_BACKBONE, _HEAD = "backbone.", "lm_head.weight"
_EMBEDDING = {"huggingface": "embeddings.weight", "mamba-ssm": "embedding.weight"}

# mamba-ssm's names of a block's options -> Hugging Face's.
_BLOCK_OPTIONS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


def config_from_mamba_ssm(config_class: type, config: Mapping[str, object]) -> MambaConfig:
    block = dict(config.get("ssm_cfg") or {})
    plain = {
        "ssm_cfg.layer": (block.pop("layer", "Mamba1"), "Mamba1"),
        "d_intermediate": (config.get("d_intermediate") or 0, 0),
        "attn_layer_idx": (list(config.get("attn_layer_idx") or []), []),
        "rms_norm": (config.get("rms_norm", True), True),
    }
    for name, (got, needed) in plain.items():
        if got != needed:
            raise ValueError(f"MambaConfig: {name} must be {needed!r}, got {got!r}, which is not supported")
    block.pop("use_fast_path", None)
    unknown = sorted(block.keys() - _BLOCK_OPTIONS.keys())
    if unknown:
        raise ValueError(f"MambaConfig: ssm_cfg must hold options of Mamba-1 only, got {', '.join(unknown)}")
    multiple = config.get("pad_vocab_size_multiple", 8)
    return config_class(
        vocab_size=-(-config.get("vocab_size", 50277) // multiple) * multiple,
        hidden_size=config.get("d_model", 2560),
        num_hidden_layers=config.get("n_layer", 64),
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
        **{_BLOCK_OPTIONS[name]: value for name, value in block.items()},
    )


def load_huggingface(
    model_class: type, source: object, config: object, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    weights, found = read("MambaLM", source)
    config = _config(MambaConfig.from_huggingface, found if config is None else config)
    return _load(model_class, config, weights, "huggingface", device, dtype)


def load_mamba_ssm(
    model_class: type, source: object, config: object, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    weights, found = read("MambaLM", source, (SAFETENSORS, PICKLED))
    if found is not None and not isinstance(found, Mapping):  # a mamba-ssm model has a dataclass
        found = vars(found)
    config = _config(MambaConfig.from_mamba_ssm, found if config is None else config)
    return _load(model_class, config, weights, "mamba-ssm", device, dtype)


def _config(convert, config: object) -> MambaConfig:
    if isinstance(config, MambaConfig):
        return config
    return convert(config_mapping("MambaLM", "MambaConfig", config))


def _load(
    model_class: type,
    config: MambaConfig,
    weights: Mapping[str, Tensor],
    names: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    if not any(name.startswith(_BACKBONE) for name in weights):  # a model without a head
        weights = {name if name == _HEAD else _BACKBONE + name: x for name, x in weights.items()}
    embedding = _BACKBONE + _EMBEDDING[names]
    if embedding not in weights:
        raise ValueError(f"MambaLM: the weights lack {embedding}: they are not of a Mamba model of {names}")
    with torch.device("meta"):  # no time for random weights that go at once
        model = model_class(config)
    theirs = {name: _theirs(name, embedding) for name, _ in model.named_parameters()}
    shapes = {theirs[name]: parameter.shape for name, parameter in model.named_parameters()}
    check("MambaLM", "Mamba's", shapes, weights, {_HEAD} if config.tie_word_embeddings else ())
    if config.tie_word_embeddings and _HEAD in weights and not torch.equal(weights[_HEAD], weights[embedding]):
        raise ValueError(f"MambaLM: {_HEAD} must be the embedding, as tie_word_embeddings says, but it differs")
    model.to_empty(device=device or weights[embedding].device)
    for name, parameter in model.named_parameters():
        # Each in its own dtype: those of the scan are often float32 in a model of a half type.
        weight = weights[theirs[name]].detach()
        parameter.data = weight.to(parameter.device, dtype or weight.dtype, copy=True)
    return model.eval()


def _theirs(name: str, embedding: str) -> str:
    if name == _HEAD:
        return name
    return embedding if name == "embedding.weight" else _BACKBONE + name

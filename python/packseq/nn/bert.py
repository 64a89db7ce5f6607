"""A BERT encoder over packed tokens: every matrix product, norm and activation sees real tokens only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention
from .rows import check_boundaries, contents_may_be_checked, first_rows, sequences_and_positions

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT encoder, by the names Hugging Face gives them."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig: hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"BertConfig: hidden_act must be one of {sorted(_ACTIVATIONS)}, got {self.hidden_act!r}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, object]) -> "BertConfig":
        """From what a ``config.json`` holds. Raises for a model that is not a plain BERT encoder."""
        plain = {
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        }
        for name, value in plain.items():
            if config.get(name, value) not in (value, None):
                raise ValueError(f"BertConfig: {name} must be {value!r}, got {config[name]!r}, which is not supported")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


class BertLayer(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and then normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, config.layer_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # views; attention takes strides
        x = self.attention_norm(x + self.attention_out(attention(q, k, v, cu_seqlens).flatten(1)))
        return self.output_norm(x + self.down(self.activation(self.up(x))))


class BertEncoder(nn.Module):
    """BERT without padding: packed token ids in, one hidden vector a token out.

    Attention keeps sequences apart, and everything else works on single rows; so what one sequence holds never reaches
    another. Matrix products may round differently with other numbers of rows, though: alone and packed, a sequence's
    results agree closely, not to the last bit.

    There is no dropout. Nothing is copied to the host, so calls can be captured in a CUDA graph, and replayed after the
    contents of the inputs changed.

    Args:
        config: sizes and activation; ``from_huggingface`` takes them from a checkpoint.
        pooler: with the dense layer behind ``pool()``.
    """

    def __init__(self, config: BertConfig, *, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.embeddings_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden) if pooler else None
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @classmethod
    def from_huggingface(
        cls,
        source: object,
        config: object = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "BertEncoder":
        """An encoder with the weights of a Hugging Face BERT, in eval mode.

        Args:
            source: a folder with ``config.json`` and ``model.safetensors``; the path of a ``.safetensors`` file; a
                state dict; or a ``transformers`` model, such as ``BertModel`` or ``BertForMaskedLM``. Names may start
                with ``bert.``; then what lies outside it (a model's head) is left out.
            config: a dict as in ``config.json``, a ``transformers`` configuration or a ``BertConfig``. Needed with a
                state dict, and with a file that has no ``config.json`` beside it.
            device: where the weights go; the CPU by default, or a model's own device.
            dtype: of the weights; their own by default.

        Raises:
            ValueError: weights are missing, too many or of a wrong shape, or the model is not supported.
        """
        from .bert_weights import load

        return load(cls, source, config, device, dtype)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Hidden states ``[total, hidden]`` of packed tokens; zeros in rows after ``cu_seqlens[-1]``.

        Args:
            input_ids: ``[total]``, int32 or int64. What stands after ``cu_seqlens[-1]`` is not used.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``, on the same device.
            token_type_ids: ``[total]``, all 0 by default.
        """
        self._check(input_ids, cu_seqlens, token_type_ids)
        sequences, positions = sequences_and_positions(cu_seqlens, input_ids.shape[0])
        slack = sequences == cu_seqlens.shape[0] - 1
        types = self.token_type_embeddings.weight[0]
        if token_type_ids is not None:
            types = self.token_type_embeddings(token_type_ids.masked_fill(slack, 0))
        # Slack rows may hold anything, ids outside the vocabulary too.
        words = self.word_embeddings(input_ids.masked_fill(slack, 0))
        x = self.embeddings_norm(words + types + self.position_embeddings(positions))
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return x.masked_fill(slack[:, None], 0)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """BERT's pooled output ``[sequences, hidden]``: dense and tanh on first tokens; zeros for empty sequences."""
        if self.pooler is None:
            raise ValueError("BertEncoder.pool: this encoder has no pooler (its weights came without, or pooler=False)")
        pooled = torch.tanh(self.pooler(first_rows(hidden, cu_seqlens)))
        return pooled.masked_fill((cu_seqlens[1:] == cu_seqlens[:-1])[:, None], 0)

    def _check(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> None:
        for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
            if ids is None:
                continue
            got = f"got {tuple(ids.shape)} of {ids.dtype}"
            if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"BertEncoder: {name} must be packed, [total] of int32 or int64, {got}")
            if ids.shape != input_ids.shape:
                raise ValueError(f"BertEncoder: {name} must be {tuple(input_ids.shape)} as input_ids is, {got}")
        check_boundaries("BertEncoder", cu_seqlens, input_ids.shape[0], input_ids.device)
        if contents_may_be_checked(cu_seqlens) and cu_seqlens.shape[0] > 1:
            # Unchecked, on a GPU, it is the embedding that stops a position past its table.
            most, longest = self.config.max_position_embeddings, (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
            if longest > most:
                limit = f"{most} tokens (max_position_embeddings)"
                raise ValueError(f"BertEncoder: sequences must have at most {limit}, got one of {longest}")

"""What the demo compares with: the same weights in plain PyTorch, over a padded batch with a mask."""

import torch
import torch.nn.functional as F
from packseq.nn import BertEncoder
from torch import Tensor


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """``[batch, longest]`` token ids, and where they are real: None where all are, for attention is quicker then."""
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids, None if real.all() else real


def mean_embeddings(encoder: BertEncoder, ids: Tensor, real: Tensor | None) -> Tensor:
    """The mean hidden state of each text, ``[batch, hidden]``."""
    x = encoder.word_embeddings(ids) + encoder.token_type_embeddings.weight[0]
    x = encoder.embeddings_norm(x + encoder.position_embeddings.weight[: ids.shape[1]])
    mask = None if real is None else real[:, None, None, :]
    for layer in encoder.layers:
        q, k, v = layer.qkv(x).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = layer.attention_norm(x + layer.attention_out(mixed.transpose(1, 2).flatten(2)))
        x = layer.output_norm(x + layer.down(layer.activation(layer.up(x))))
    if real is None:
        return x.mean(1, dtype=torch.float32).to(x.dtype)
    summed = x.masked_fill(~real[:, :, None], 0).sum(1, dtype=torch.float32)
    return (summed / real.sum(1, keepdim=True)).to(x.dtype)

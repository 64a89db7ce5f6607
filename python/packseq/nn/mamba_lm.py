"""A language model of Mamba blocks over packed tokens, and its generation of text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._boundaries import slack_rows
from ..packing import from_list
from .mamba import Mamba, MambaStates
from .rows import check_boundaries


@dataclass(frozen=True)
class MambaConfig:
    """The sizes of a Mamba language model and how it starts, by the names Hugging Face gives them.

    ``initializer_range`` and ``rescale_prenorm_residual`` start as in mamba-ssm, where the models were trained.
    """

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    expand: float = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    time_step_rank: str | int = "auto"
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_init_scheme: str = "random"
    time_step_floor: float = 1e-4
    rescale_prenorm_residual: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def from_huggingface(cls, config: Mapping[str, object]) -> "MambaConfig":
        """From what a ``config.json`` holds. Raises for a model that is not a plain Mamba."""
        for name, value in {"model_type": "mamba", "hidden_act": "silu"}.items():
            if config.get(name, value) not in (value, None):
                raise ValueError(f"MambaConfig: {name} must be {value!r}, got {config[name]!r}, which is not supported")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    @classmethod
    def from_mamba_ssm(cls, config: Mapping[str, object]) -> "MambaConfig":
        """From what a ``config.json`` of mamba-ssm holds. Raises for a model that is not of Mamba-1 blocks alone."""
        from .mamba_weights import config_from_mamba_ssm

        return config_from_mamba_ssm(cls, config)


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x²) + eps)``, computed in the dtype of x, and returned in the weight's."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, None, self.eps).to(self.weight.dtype) * self.weight


class MambaLayer(nn.Module):
    """A Mamba block on normalised tokens, added to what came in."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba(
            config.hidden_size,
            config.state_size,
            config.conv_kernel,
            config.expand,
            config.time_step_rank,
            config.time_step_min,
            config.time_step_max,
            config.time_step_init_scheme,
            config.time_step_scale,
            config.time_step_floor,
            config.use_conv_bias,
            config.use_bias,
        )

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, initial: MambaStates | None, return_final: bool
    ) -> tuple[Tensor, MambaStates | None]:
        out, final = self.mixer.mix(self.norm(x), cu_seqlens, initial_states=initial, return_final_states=return_final)
        return x + out, final

    def step(self, x: Tensor, states: MambaStates, cu_seqlens: Tensor | None, indices: Tensor | None) -> Tensor:
        return x + self.mixer.mix_step(self.norm(x), states, cu_seqlens, indices)


class MambaLM(nn.Module):
    """Mamba as a language model: embedding, residual blocks, a last norm, and a head tied to the embedding.

    Token ids are packed: sequence ``i`` owns the rows ``cu_seqlens[i]:cu_seqlens[i + 1]``, no other sequence reaches
    it, and there is no padding. Nothing is copied to the host but by :meth:`generate` with a ``stop_token``.

    Matrix products may round differently with other numbers of rows: alone and packed, a sequence's logits agree
    closely, not to the last bit.

    Source: Gu and Dao, arXiv 2312.00752.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.initializer_range)
        for layer in self.layers:
            for projection in (layer.mixer.in_proj, layer.mixer.out_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            if self.config.rescale_prenorm_residual:  # so that the sum over the layers starts no larger than one
                layer.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    @classmethod
    def from_huggingface(
        cls,
        source: object,
        config: object = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MambaLM":
        """A model with the weights of a Hugging Face ``MambaForCausalLM`` or ``MambaModel``, in eval mode.

        Args:
            source: a folder with ``config.json`` and ``model.safetensors`` (whole or in parts); the path of a
                ``.safetensors`` file; a state dict; or a ``transformers`` model.
            config: a dict as in ``config.json``, a ``transformers`` configuration or a ``MambaConfig``. Needed with a
                state dict, and with a file that has no ``config.json`` beside it.
            device: where the weights go; the CPU by default, or a model's own device.
            dtype: of the weights; their own by default.

        Raises:
            ValueError: weights are missing, too many or of a wrong shape, or the model is not supported.
        """
        from .mamba_weights import load_huggingface

        return load_huggingface(cls, source, config, device, dtype)

    @classmethod
    def from_mamba_ssm(
        cls,
        source: object,
        config: object = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MambaLM":
        """A model with the weights of mamba-ssm's ``MambaLMHeadModel``, in eval mode.

        Args:
            source: a folder with ``config.json`` and ``pytorch_model.bin`` (or ``model.safetensors``), the path of
                one of those files, or a state dict.
            config: a dict as in ``config.json``, or a ``MambaConfig``. Needed with a state dict.
            device: where the weights go; their own by default.
            dtype: of the weights; their own by default.

        Raises:
            ValueError: weights are missing, too many or of a wrong shape, or the model is not supported.
        """
        from .mamba_weights import load_mamba_ssm

        return load_mamba_ssm(cls, source, config, device, dtype)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        initial_states: Sequence[MambaStates] | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[MambaStates]]:
        """Logits ``[total, vocab_size]`` of the token after each; zeros in rows after ``cu_seqlens[-1]``.

        Arguments are those of :meth:`hidden_states`.
        """
        out = self.hidden_states(
            input_ids, cu_seqlens, initial_states=initial_states, return_final_states=return_final_states
        )
        return (self.logits(out[0]), out[1]) if return_final_states else self.logits(out)

    def hidden_states(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        initial_states: Sequence[MambaStates] | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[MambaStates]]:
        """``[total, hidden_size]``, as :meth:`logits` takes them.

        Args:
            input_ids: ``[total]``, int32 or int64. What stands after ``cu_seqlens[-1]`` is not used.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``, on the same device; None: one sequence.
            initial_states: for each layer the states from which the sequences go on; zeros by default.
            return_final_states: also return the states after the last tokens, for each layer, with gradients.
        """
        self._check(input_ids, cu_seqlens)
        slack = slack_rows(cu_seqlens, input_ids.shape[0])
        if slack is not None:  # those rows may hold anything, ids outside the vocabulary too
            input_ids = input_ids.masked_fill(slack, 0)
        x, states = self._embed(input_ids), []
        for i, layer in enumerate(self.layers):
            initial = None if initial_states is None else initial_states[i]
            x, final = layer(x, cu_seqlens, initial, return_final_states)
            states.append(final)
        x = self.norm_f(x)
        x = x if slack is None else x.masked_fill(slack[:, None], 0)
        return (x, states) if return_final_states else x

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, vocab_size]`` from ``[rows, hidden_size]``."""
        return F.linear(hidden, self.embedding.weight if self.lm_head is None else self.lm_head.weight)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        states: Sequence[MambaStates],
        cu_seqlens: Tensor | None = None,
        *,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[total, vocab_size]`` for the next token, or few, of many sequences; states are updated in place.

        Args:
            input_ids: ``[total]``, int32 or int64: one token a sequence, or as ``cu_seqlens`` says.
            states: a pool for each layer, from :meth:`allocate_states`, or the final states of a prefill.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``; None: one token a sequence.
            indices: int32 ``[sequences]``: the slot of each sequence in the pools, no two the same. A negative one
                skips its sequence: no state changes, its logits mean nothing. None: sequence ``i`` has slot ``i``.
        """
        self._check(input_ids, cu_seqlens)
        slack = slack_rows(cu_seqlens, input_ids.shape[0])
        x = self._embed(input_ids if slack is None else input_ids.masked_fill(slack, 0))
        for layer, pool in zip(self.layers, states, strict=True):
            x = layer.step(x, pool, cu_seqlens, indices)
        logits = self.logits(self.norm_f(x))
        return logits if slack is None else logits.masked_fill(slack[:, None], 0)

    def allocate_states(self, slots: int, dtype: torch.dtype | None = None) -> list[MambaStates]:
        """For each layer a pool of zeros, where sequences start. ``dtype``: of activations; the weights' by default."""
        return [layer.mixer.allocate_states(slots, dtype) for layer in self.layers]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues prompts of any lengths, all at once: one packed prefill, then a step a token.

        Args:
            prompts: for each sequence its token ids ``[length]``, int32 or int64, at least one.
            max_new_tokens: how many to add at most.
            temperature: of the distribution that tokens are drawn from; 0: always the likeliest.
            top_k: draw from so many likeliest only.
            stop_token: a sequence ends with it. Whether all have ended is looked up, a copy to the host a step.
            generator: of the draws, on the weights' device.

        Returns:
            For each sequence what was added to its prompt, with the ``stop_token`` where it came.

        Raises:
            ValueError: a prompt is empty, or an option is out of its range.
        """
        for i, prompt in enumerate(prompts):
            if prompt.dim() != 1 or prompt.shape[0] == 0:
                got = f"got {tuple(prompt.shape)} at position {i}"
                raise ValueError(f"MambaLM.generate: prompts must be [length], one token at least, {got}")
        if temperature < 0 or (top_k is not None and top_k < 1):
            got = f"got {temperature} and {top_k}"
            raise ValueError(f"MambaLM.generate: temperature must be at least 0, and top_k at least 1, {got}")
        if max_new_tokens < 1 or len(prompts) == 0:
            return [prompt[:0] for prompt in prompts]
        input_ids, cu_seqlens = from_list(prompts)
        hidden, states = self.hidden_states(input_ids, cu_seqlens, return_final_states=True)
        logits = self.logits(hidden[cu_seqlens[1:] - 1])
        slots = torch.arange(len(prompts), dtype=torch.int32, device=input_ids.device)
        added: list[Tensor] = []
        while True:
            tokens = _draw(logits, temperature, top_k, generator)
            if stop_token is not None:
                tokens = tokens.masked_fill(slots < 0, stop_token)
                slots = slots.masked_fill(tokens == stop_token, -1)  # skipped from now on
            added.append(tokens.to(input_ids.dtype))
            if len(added) == max_new_tokens or (stop_token is not None and (slots < 0).all()):
                break
            logits = self.step(tokens, states, indices=slots)
        return [_until(row, stop_token) for row in torch.stack(added, 1)]

    def _embed(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return x.float() if self.config.residual_in_fp32 and x.dtype != torch.float64 else x

    def _check(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> None:
        if input_ids.dim() != 1 or input_ids.dtype not in (torch.int32, torch.int64):
            got = f"got {tuple(input_ids.shape)} of {input_ids.dtype}"
            raise ValueError(f"MambaLM: input_ids must be packed, [total] of int32 or int64, {got}")
        if cu_seqlens is not None:
            check_boundaries("MambaLM", cu_seqlens, input_ids.shape[0], input_ids.device)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token for each row of logits."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _until(row: Tensor, stop_token: int | None) -> Tensor:
    if stop_token is None:
        return row
    found = (row == stop_token).nonzero()
    return row[: int(found[0]) + 1] if len(found) else row

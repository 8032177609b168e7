"""GPT: a decoder-only transformer over bytes or tokens, as in GPT-2 (Radford et al., 2019).

Belongs here: the model and its initialisation. Does not belong here: text, losses, optimizer groups.

Every module that owns parameters has ``reset_parameters()``, and calling it on ``model.modules()`` in
order gives each parameter its final initialisation. So the model can be made on the meta device,
sharded, given memory with ``to_empty``, and then be initialised.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.errors import JobError

__all__ = ["GPT", "Block"]

_STANDARD_DEVIATION = 0.02


class GPT(nn.Module):
    """Tokens (N, length) to logits (N, length, vocabulary_size).

    The output head is the token embedding itself (tied), so it needs no parameter of its own.
    Under autocast the embeddings, the residual stream, the norms and the softmax of the loss stay FP32;
    only matrix products and attention run in 16 bits.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise JobError(f"width {width} cannot be split among {num_heads} heads. Make it a multiple of num_heads.")
        self.context = context
        self.token_embedding = Embedding(vocabulary_size, width)
        self.position_embedding = Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, num_layers, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, length, vocabulary_size) of each position's next token; ``length`` <= ``context``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.token_embedding.weight)


class Block(nn.Module):
    """Attention, then a perceptron, each normalised before and added to the residual stream (pre-norm)."""

    def __init__(self, width: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, num_heads, num_layers, dropout)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = Perceptron(width, num_layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """The residual stream (N, length, width), before and after."""
        attended: Tensor = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        transformed: Tensor = attended + self.dropout(self.perceptron(self.perceptron_norm(attended)))
        return transformed


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to those before it."""

    def __init__(self, width: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_probability = dropout
        self.query_key_value = Projection(width, 3 * width)
        self.output = ResidualProjection(width, width, num_layers)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, length, width) to (N, length, width)."""
        heads = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, length, width / heads)
        dropout = self.dropout_probability if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


class Perceptron(nn.Module):
    """Four times as wide inside, with GELU in GPT-2's tanh form."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.input = Projection(width, 4 * width)
        self.output = ResidualProjection(4 * width, width, num_layers)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, length, width) to (N, length, width)."""
        output: Tensor = self.output(F.gelu(self.input(hidden), approximate="tanh"))
        return output


class Embedding(nn.Embedding):
    """Drawn from a normal distribution with GPT-2's standard deviation, 0.02."""

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=_STANDARD_DEVIATION)


class Projection(nn.Module):
    """A linear layer with GPT-2's initialisation: weights N(0, standard_deviation), biases 0."""

    def __init__(self, in_features: int, out_features: int, standard_deviation: float = _STANDARD_DEVIATION) -> None:
        super().__init__()
        self.standard_deviation = standard_deviation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.standard_deviation)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        return F.linear(features, self.weight, self.bias)


class ResidualProjection(Projection):
    """A projection that is added to the residual stream, as 2 x num_layers of them are.

    Its standard deviation is divided by sqrt(2 x num_layers), so that their sum keeps its size.
    """

    def __init__(self, in_features: int, out_features: int, num_layers: int) -> None:
        super().__init__(in_features, out_features, _STANDARD_DEVIATION / math.sqrt(2 * num_layers))

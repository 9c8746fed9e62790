"""The whole model: embedding, a stack of blocks, a final norm, and a head that the caller may replace.

Shapes: B batch, T time, S keys (T, or more with caches), D dim, V vocab.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minillm.losses import matmul_dtype
from minillm.model.attention import Attention, Cache, make_masks
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.layers import make_mlp, make_norm
from minillm.model.masks import Mask, number_branches, number_documents, restart_positions
from minillm.model.rope import Rope, Rotation, no_rotation

Head = Callable[[nn.Linear, Tensor], Tensor]


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalised copy of the residual stream and adds its result to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rotation, mask: Mask, cache: Cache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, mask, cache))  # (B, T, D)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """A decoder-only Transformer (or, with `causal = false`, an encoder) as its ModelConfig describes it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.dim)
        if config.position == "learned":
            self.pos_embed = nn.Embedding(config.max_seq_len, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        self.tie_embeddings()
        if not self.embed.weight.is_meta:
            init_weights(self)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        branches: Tensor | None = None,
        head: Head | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or whatever `head(lm_head, hidden)` makes of the last hidden state (B, T, D).

        Args:
            tokens: (B, T) int64.
            positions: (B, T); by default counted from 0, again in each document, and on from the caches.
            doc_ids: (B, S), one number a token; a document is a run of equal ones and sees only itself. With caches
                they cover the cached tokens too, so that padding before a short prompt is a document of its own.
            branches: (B, T), 0 for the prompt that begins a document, 1, 2, ... for what may follow it: each sees the
                prompt and itself, and its positions go on from the end of the prompt.
            caches: one a block, for generation; earlier keys and values are taken from them and new ones added.
        """
        T = tokens.shape[1]
        offset, offsets = (caches[0].length, caches[0].lengths) if caches else (0, None)
        self.check(tokens, doc_ids, branches, offset)
        if branches is not None:
            doc_ids, branches = number_branches(branches, doc_ids)
        elif doc_ids is not None:
            doc_ids = number_documents(doc_ids)
        if positions is None and doc_ids is not None:
            positions = restart_positions(doc_ids, branches)[:, offset:]
        elif positions is None:
            held = offset if offsets is None else offsets[:, None]
            positions = held + torch.arange(T, device=tokens.device)[None]  # (1 or B, T)
        x = self.embed(tokens)  # (B, T, D)
        dtype, dropout = matmul_dtype(x), self.training and self.config.dropout > 0
        masks = make_masks(self.config, tokens, offset, doc_ids, dtype, dropout, offsets, branches)

        if self.config.embed_scale:
            x = x * self.config.dim**0.5
        if self.config.position == "learned":
            x = x + self.pos_embed(positions)
        x = self.dropout(x)
        rope: Rotation = no_rotation
        if self.config.position == "rope":
            rope = Rope(positions, self.config.head_dim, self.config.rope_theta, self.config.scaling)
        for block, window, cache in zip(self.blocks, self.config.windows, caches or [None] * len(self.blocks)):
            x = block(x, rope, masks[window], cache)
        return (head or self.project)(self.lm_head, self.norm(x))

    def project(self, lm_head: nn.Linear, hidden: Tensor) -> Tensor:
        """The default head: logits over the vocabulary, without the padding rows. (B, T, D) -> (B, T, V)"""
        return lm_head(hidden)[..., : self.config.vocab_size]

    def check(self, tokens: Tensor, doc_ids: Tensor | None, branches: Tensor | None, offset: int) -> None:
        """Raises ValueError where the inputs do not fit the model."""
        config, (B, T) = self.config, tokens.shape
        if offset + T > config.max_seq_len:
            cached = f" ({offset} of them cached)" if offset else ""
            raise ValueError(f"{offset + T} tokens{cached} are more than the model's max_seq_len {config.max_seq_len}")
        if doc_ids is not None and doc_ids.shape != (B, offset + T):
            raise ValueError(f"doc_ids has shape {tuple(doc_ids.shape)}; tokens and caches need {(B, offset + T)}")
        if branches is not None and offset:
            raise ValueError("branches do not go with caches: what is generated follows one text")
        if branches is not None and branches.shape != (B, T):
            raise ValueError(f"branches has shape {tuple(branches.shape)}; tokens have {(B, T)}")
        if offset and not config.causal:
            raise ValueError("a bidirectional model cannot use caches: what it cached would have to see new tokens")

    def tie_embeddings(self) -> None:
        """Makes lm_head and embed one parameter, where the config says so."""
        if self.config.tie_embeddings:
            for name, parameter in self.embed.named_parameters():  # the weight; in int8 its scale, too
                setattr(self.lm_head, name, parameter)

    def _apply(self, fn, recurse=True):
        # to_empty() and the like make a new parameter for each module that holds one: tie them again
        super()._apply(fn, recurse)
        self.tie_embeddings()
        return self

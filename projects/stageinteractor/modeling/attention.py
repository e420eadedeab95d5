"""Self-attention among queries, biased by how much their boxes overlap.

As in AdaMixer, which the paper builds on: the logits of head h gain tau_h * log(IoF + 1e-7), where
IoF[n, m] is the share of query n's box that query m's box covers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import pairwise_iof, positional_encoding, xyzr_to_corners


class IoFSelfAttention(nn.Module):
    """Multi-head self-attention with a learned IoF bias, residual and LayerNorm.

    The positional encoding is added to the content, and the sum is query, key, value *and*
    residual, so the encoding enters the content in every stage.

    Args:
        embed_dim: size D of the content vectors.
        num_heads: attention heads H.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)  # query, key and value, packed
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.iof_tau = nn.Parameter(torch.empty(num_heads))
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        nn.init.uniform_(self.iof_tau, 0, 4)

    def bias(self, xyzr: Tensor) -> Tensor:
        """Positional vectors (B, N, 4) -> bias of the attention logits (B, H, N, N)."""
        log_iof = (pairwise_iof(xyzr_to_corners(xyzr)) + 1e-7).log()  # (B, N, N)
        return self.iof_tau[:, None, None] * log_iof[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Average the values, weighted by softmax(query key^T / sqrt(D/H) + bias).

        Query, key, value and result are (B, H, N, D/H). The weights (B, H, N, N) are never held in
        memory.
        """
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Content vectors (B, N, D) and positional vectors (B, N, 4) -> content (B, N, D)."""
        batch, queries, dim = content.shape
        content = content + positional_encoding(xyzr, dim)
        qkv = self.in_proj(content).view(batch, queries, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D/H) each
        attended = self.attend(query, key, value, self.bias(xyzr).to(query.dtype))
        # Always copied, because the memory format may be another one in an exported model.
        attended = attended.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return self.norm(content + self.out_proj(attended.flatten(2)))

"""detrex's attention and feed-forward network as parts of a decoder stage; detrex must be there.

``configs/detrex_parts/stageinteractor_r50_12ep.py`` puts them into the decoder. Their outputs are
those of ``IoFSelfAttention`` and ``FeedForward``; their weights have other names.
"""

from detrex.layers import FFN, MultiheadAttention
from torch import Tensor, nn

from ..modeling.attention import IoFSelfAttention
from ..modeling.boxes import positional_encoding


class MultiheadIoFAttention(IoFSelfAttention):
    """``IoFSelfAttention`` computed by detrex's ``MultiheadAttention``; the bias is its mask."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__(embed_dim, num_heads)
        del self.in_proj, self.out_proj
        self.attention = MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Content vectors (B, N, D) and positional vectors (B, N, 4) -> content (B, N, D)."""
        content = content + positional_encoding(xyzr, content.shape[-1])
        mask = self.bias(xyzr).to(content.dtype).flatten(0, 1)  # (B * H, N, N)
        return self.norm(self.attention(content, attn_mask=mask))


class NormalizedFFN(FFN):
    """detrex's ``FFN`` with the LayerNorm that follows it in a stage."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__(embed_dim, hidden_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, content: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.norm(super().forward(content))

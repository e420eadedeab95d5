"""Initial queries: learned content vectors, and positional vectors that span the whole image."""

import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import corners_to_xyzr


class QueryGenerator(nn.Module):
    """Make the content and positional vectors of the queries (paper section 3.1).

    The content vectors are learned, the same for every image, and layer-normalised without affine
    parameters. The positional vectors are not learned: each query starts as the full image.

    Args:
        num_queries: queries N.
        embed_dim: size D of the content vectors.
    """

    def __init__(self, *, num_queries: int = 100, embed_dim: int = 256):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)  # N(0, 1)

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Make the queries for a batch of images.

        Args:
            image_sizes: (B, 2) height and width in pixels after resizing, before padding.

        Returns:
            content vectors (B, N, D) and positional vectors (B, N, 4) in pixels.
        """
        content = F.layer_norm(self.content.weight, self.content.weight.shape[1:])  # (N, D)
        whole_image = F.pad(image_sizes.flip(-1).to(content.dtype), (2, 0))  # (B, 4)
        xyzr = corners_to_xyzr(whole_image)
        batch, queries = image_sizes.shape[0], content.shape[0]
        return content.expand(batch, -1, -1), xyzr[:, None].expand(-1, queries, -1)

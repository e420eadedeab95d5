"""Detectron2's Swin Transformer with a forward pass that can be exported and run in threads.

timm's Swin computes other features where a map is not a multiple of the window: it shifts before it
pads, while the release pads before it shifts.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import swin
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """Pad with zeros at the bottom and right: (B, H, W, C) -> (B, rows * window, ..., C)."""
    height, width = x.shape[1:3]
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    return F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))


def partition(x: Tensor, window: int) -> Tensor:
    """Split a map (B, rows * window, ..., C) into windows (B, rows * columns, window^2, C)."""
    batch, height, width, channels = x.shape
    grid = x.view(batch, height // window, window, width // window, window, channels)
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return the mask between cells that a shift brings together from opposite sides of the map.

    Args:
        height, width: size of the padded map.

    Returns:
        (rows * columns, window^2, window^2): 0 or -100, to be added to the attention logits.
    """
    parts = []
    for side in (height, width):
        place = torch.arange(side, device=device)
        parts.append((place >= side - window).int() + (place >= side - shift).int())
    part = 3 * parts[0][:, None] + parts[1]
    part = partition(part[None, :, :, None], window)[0]  # (rows * columns, window^2, 1)
    return -100.0 * (part != part.transpose(1, 2))


class SwinTransformer(swin.SwinTransformer):
    """Detectron2's Swin Transformer, with the same arguments and results.

    Detectron2's own forward pass stores the size of the images in its modules, so that threads
    would disturb each other, and an exported model would be limited to that size.
    """

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> maps (B, C_l, H / stride, W / stride), ``p0`` to ``p3``."""
        x = self.patch_embed(images)  # (B, C, H, W)
        if self.ape:
            x = x + F.interpolate(self.absolute_pos_embed, size=x.shape[2:], mode="bicubic")
        x = self.pos_drop(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        outputs = {}
        for index, layer in enumerate(self.layers):
            x = self.run_blocks(layer, x)
            name = f"p{index}"
            if name in self._out_features:
                outputs[name] = getattr(self, f"norm{index}")(x).permute(0, 3, 1, 2).contiguous()
            if layer.downsample is not None:
                height, width = x.shape[1:3]
                x = layer.downsample(x.flatten(1, 2), height, width)
                x = x.unflatten(1, ((height + 1) // 2, (width + 1) // 2))
        return outputs

    @staticmethod
    def run_blocks(layer: swin.BasicLayer, x: Tensor) -> Tensor:
        """Run the blocks of a layer: (B, H, W, C) -> (B, H, W, C)."""
        height, width = pad_to_windows(x[:1, :, :, :1], layer.window_size).shape[1:3]
        mask = shift_mask(height, width, layer.window_size, layer.shift_size, x.device)
        for block in layer.blocks:
            if layer.use_checkpoint:
                x = checkpoint(run_block, block, x, mask, use_reentrant=False)
            else:
                x = run_block(block, x, mask)
        return x


def run_block(block: swin.SwinTransformerBlock, x: Tensor, mask: Tensor) -> Tensor:
    """Attend within windows, shifted or not, then run the feed-forward network: (B, H, W, C)."""
    window, shift = block.window_size, block.shift_size
    height, width = x.shape[1:3]
    padded = pad_to_windows(block.norm1(x), window)
    if shift:
        padded = padded.roll((-shift, -shift), (1, 2))
    windows = attend(block.attn, partition(padded, window), mask if shift else None)
    grid = windows.unflatten(2, (window, window)).unflatten(1, (padded.shape[1] // window, -1))
    attended = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows * window, ..., C)
    if shift:
        attended = attended.roll((shift, shift), (1, 2))
    x = x + block.drop_path(attended[:, :height, :width])
    return x + block.drop_path(block.mlp(block.norm2(x)))


def attend(layer: swin.WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attend among T places in each of M windows: (B, M, T, C), mask (M, T, T) -> (B, M, T, C)."""
    qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).movedim(-3, 0)
    query, key, value = qkv.transpose(-3, -2)  # (B, M, heads, T, C / heads) each
    places = x.shape[2]
    bias = layer.relative_position_bias_table[layer.relative_position_index.flatten()]
    bias = bias.view(places, places, -1).permute(2, 0, 1)  # (heads, T, T)
    logits = (query * layer.scale) @ key.transpose(-2, -1) + bias
    if mask is not None:
        logits = logits + mask[:, None]
    attended = layer.attn_drop(logits.softmax(-1)) @ value
    return layer.proj_drop(layer.proj(attended.transpose(-3, -2).flatten(-2)))

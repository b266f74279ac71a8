"""Images as sequences: patches, and where in the image they lie (Dosovitskiy et al. 2021; Peebles & Xie 2023)."""

import torch

from nano_db.errors import UsageError


def check_patches(shape, patch, width, heads):
    """Raise UsageError unless an image of shape (C, H, W) divides into square patches, and their features into heads
    and into the four parts of patch_positions.
    """
    _, H, W = shape
    if H % patch or W % patch:
        raise UsageError(f"--patch {patch} must divide the image's height and width, {H} x {W} pixels")
    if width % heads or width % 4:
        raise UsageError(f"--width {width} must be a multiple of 4 and of --heads {heads}")


def patchify(images, patch, shape):
    """(B, C, H, W) -> (B, T, C * patch^2), row by row; T = H * W / patch^2. shape: the (C, H, W) that is expected.

    Raises UsageError for images of another shape.
    """
    if images.shape[1:] != tuple(shape):
        raise UsageError(
            f"the network is made for images of shape {tuple(shape)} (channels, height, width), "
            f"but these are of shape {tuple(images.shape[1:])}"
        )
    C, H, W = shape
    grid = images.view(-1, C, H // patch, patch, W // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches, patch, shape):
    """The inverse: (B, T, C * patch^2) -> (B, C, H, W). shape: (C, H, W)."""
    C, H, W = shape
    grid = patches.view(len(patches), H // patch, W // patch, C, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, H, W)


def patch_positions(shape, patch, width, base=10_000.0):
    """Fixed embeddings of the patches' rows and columns by sines and cosines, a quarter of `width` each. (T, width)

    Scaled to a root mean square of 1, as normal features have. width: a multiple of 4.
    """
    _, H, W = shape
    frequencies = base ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(H // patch), torch.arange(W // patch), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)

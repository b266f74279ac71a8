"""Changes to training images that leave their class as it is, on whole batches (B, C, H, W) of bytes.

`flip` mirrors; `standard` adds a crop of the image padded by 4 pixels, that is a shift; `randaugment` adds two random
operations (Cubuk et al. 2019). A picture whose mirror image is something else (a letter) is never mirrored.
"""

import torch
import torch.nn.functional as F

PADDING = 4  # pixels


def augment(images, kind, mirrors):
    """kind: "none", "flip", "standard" or "randaugment". Draws from torch's global generator."""
    if kind == "randaugment":
        images = rand_augment(images)
    if kind != "none" and mirrors:
        images = flip(images)
    return padded_crop(images) if kind in ("standard", "randaugment") else images


def flip(images):
    """Mirror every other image, at random."""
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def padded_crop(images):
    """Shift each image by up to PADDING pixels each way; zeros (black) come in."""
    B, C, H, W = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, B))
    rows = (down[:, None] + torch.arange(H))[:, None, :, None]  # (B, 1, H, 1)
    columns = (right[:, None] + torch.arange(W))[:, None, None, :]  # (B, 1, 1, W)
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows, columns]


def rand_augment(images, operations=2, magnitude=0.3):
    """Apply `operations` random ones of OPERATIONS to each image, at +magnitude or -magnitude of the full range."""
    images = images.float() / 255
    for _ in range(operations):
        choice = torch.randint(len(OPERATIONS), (len(images),))
        signs = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0)
        for i, operation in enumerate(OPERATIONS):
            chosen = choice == i
            if chosen.any():
                images[chosen] = operation(images[chosen], magnitude * signs[chosen]).clamp(0, 1)
    return (255 * images).round().byte()


def _warp(images, matrices):
    """Sample images at matrices (B, 2, 3) @ (x, y, 1), coordinates from -1 to 1; outside is black."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _affine(m, a=None, b=None, c=None, d=None, e=None, f=None):
    """The matrices [[a, b, c], [d, e, f]] of _warp, (B, 2, 3); what is None is as in the identity. m: any (B,)."""
    zeros, ones = torch.zeros_like(m), torch.ones_like(m)
    rows = (ones, zeros, zeros, zeros, ones, zeros)
    entries = [usual if given is None else given for given, usual in zip((a, b, c, d, e, f), rows, strict=True)]
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def _rotate(images, m):
    angle = m * torch.pi / 6  # up to 30 degrees
    return _warp(images, _affine(m, a=angle.cos(), b=-angle.sin(), d=angle.sin(), e=angle.cos()))


def _blend(images, other, m):
    """Away from `other` for m > 0, towards it for m < 0."""
    return other + (1 + 0.9 * m)[:, None, None, None] * (images - other)


def _autocontrast(images, m):
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1 / 255)


def _posterize(images, m):
    levels = 2.0 ** torch.round(8 - 4 * m.abs())[:, None, None, None]  # of 256
    return torch.floor(images * (levels - 1e-3)) / (levels - 1)


def _solarize(images, m):
    return torch.where(images >= 1 - m.abs()[:, None, None, None], 1 - images, images)


def _blur(images):
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


# Each takes floats in [0, 1], (B, C, H, W), and a magnitude in [-1, 1] a sample, (B,). Equalize is left out: at 32 x 32
# pixels it is nearly autocontrast.
OPERATIONS = (
    lambda images, m: images,
    _rotate,
    lambda images, m: _warp(images, _affine(m, b=0.3 * m)),  # shear
    lambda images, m: _warp(images, _affine(m, d=0.3 * m)),
    lambda images, m: _warp(images, _affine(m, c=0.9 * m)),  # shift, in half widths
    lambda images, m: _warp(images, _affine(m, f=0.9 * m)),
    lambda images, m: _blend(images, torch.zeros_like(images), m),  # brightness
    lambda images, m: _blend(images, images.mean((1, 2, 3), keepdim=True), m),  # contrast
    lambda images, m: _blend(images, images.mean(1, keepdim=True), m),  # colour
    lambda images, m: _blend(images, _blur(images), m),  # sharpness
    _autocontrast,
    _posterize,
    _solarize,
)

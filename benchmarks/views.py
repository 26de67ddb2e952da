"""Random views of images for contrastive training, with different random parameters for every image of a batch.

The transforms of torchvision use the same parameters for a whole batch, and image by image they take longer than the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

ASPECT = 4 / 3
GREY = (0.299, 0.587, 0.114)
TAPS = 5
"""Width of the blur kernel."""


@dataclass
class ViewConfig:
    """Augmentation of views."""

    side: int = 32
    """Side of the views, in pixels."""
    area: list[float] = field(default_factory=lambda: [0.3, 1.0])
    """Smallest and largest fraction of the image to crop."""
    mirror: bool = False
    """Flip half of the views horizontally. Not suited for letters and flags."""
    jitter: float = 0.4
    """Largest relative change of brightness, contrast and saturation."""
    hue: float = 0.1
    """Largest rotation of the hue, as a fraction of the circle."""
    recoloured: float = 0.8
    """Fraction of the views with colour jitter."""
    grey: float = 0.15
    """Fraction of the views in grayscale."""
    blurred: float = 0.2
    """Fraction of the views to blur. Small, because features that ignore blur cannot measure it."""
    blur: float = 0.8
    """Largest standard deviation of the blur, in pixels of the view."""


def random_views(pixels: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    """Make one view of each image: (N, 3, H, W) in [0, 1] -> (N, 3, side, side) in [0, 1]."""
    return random_blur(random_colours(random_crop(pixels, config), config), config).clamp(0.0, 1.0)


def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Draw a uniform value for each image of ``like``, (N,)."""
    return torch.empty(len(like), device=like.device).uniform_(low, high)


def random_crop(pixels: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    """Crop a rectangle of random area, aspect ratio and position, resize it to the views' size, and perhaps mirror it."""
    area, aspect = uniform(pixels, *config.area), torch.exp(uniform(pixels, -1, 1) * torch.tensor(ASPECT).log())
    width, height = (area * aspect).sqrt().clamp_max(1.0), (area / aspect).sqrt().clamp_max(1.0)
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(pixels, -1, 1) * (1 - width), uniform(pixels, -1, 1) * (1 - height)
    if config.mirror:
        theta[:, 0, 0] *= torch.where(uniform(pixels, 0, 1) < 0.5, 1.0, -1.0)
    grid = F.affine_grid(theta, [len(pixels), 3, config.side, config.side], align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def random_colours(pixels: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    """Change brightness b, contrast c, saturation s and hue h. All are linear in the colours, so one 3 x 3 matrix does it:

        x -> b (c R x + (1 - c) m),   R = turn(h) (s I + (1 - s) 1 g^T)

    Here g are the weights of the grey value, m is the mean grey value of the image, and turn(h) rotates colours around the grey
    axis. s = 0 makes a view grey.
    """
    on = uniform(pixels, 0, 1) < config.recoloured
    strengths = [torch.where(on, 1 + config.jitter * uniform(pixels, -1, 1), 1.0) for _ in range(3)]
    brightness, contrast, saturation = (strength.view(-1, 1, 1) for strength in strengths)
    saturation = torch.where((uniform(pixels, 0, 1) < config.grey).view(-1, 1, 1), 0.0, saturation)
    angle = torch.where(on, 2 * torch.pi * config.hue * uniform(pixels, -1, 1), 0.0)
    eye, weights = torch.eye(3, device=pixels.device), torch.tensor(GREY, device=pixels.device)
    saturated = saturation * eye + (1 - saturation) * weights.expand(3, 3)
    matrix = hue_turn(angle) @ saturated
    mean = torch.einsum("c,nchw->n", weights, pixels).view(-1, 1, 1) / pixels[0, 0].numel()
    turned = (contrast * matrix) @ pixels.flatten(2) + (1 - contrast) * mean
    return (brightness * turned).view_as(pixels)


def hue_turn(angle: torch.Tensor) -> torch.Tensor:
    """Return rotations (N, 3, 3) around the grey axis u = (1, 1, 1) / sqrt 3, by Rodrigues' formula:

    cos a I + sin a [u]_x + (1 - cos a) u u^T
    """
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / 3**0.5
    return cosine * torch.eye(3, device=angle.device) + sine * cross + (1 - cosine) / 3


def random_blur(pixels: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    """Blur a fraction of the images, each with its own standard deviation."""
    chosen = (uniform(pixels, 0, 1) < config.blurred).nonzero().flatten()
    if not len(chosen):
        return pixels
    blurred = pixels.clone()
    blurred[chosen] = gaussian_blur(pixels[chosen], uniform(pixels[chosen], 0.1, max(config.blur, 0.1)))
    return blurred


def gaussian_blur(pixels: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """Blur images (N, C, H, W) with standard deviations (N,); edges are repeated."""
    count, channels = pixels.shape[:2]
    offsets = torch.arange(TAPS, device=pixels.device) - TAPS // 2
    kernel = (-offsets.square() / (2 * deviations[:, None] ** 2)).exp()
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]
    padded = F.pad(pixels, (TAPS // 2,) * 4, mode="replicate").flatten(0, 1)[None]
    rows = F.conv2d(padded, kernel[:, :, None], groups=count * channels)
    return F.conv2d(rows, kernel[..., None], groups=count * channels)[0].view_as(pixels)

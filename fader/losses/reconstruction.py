"""How far a reconstruction is from its image."""

from torch import Tensor

from fader.networks.layers import wide


def squared_errors(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image.

    reconstruction, images: [N, C, H, W] in [-1, 1].
    Returns: [N], mean over channels and pixels; 4 at most.
    Raises ValueError: shapes disagree.
    Source: Lample et al. 2017, arXiv:1706.00409, equation 1 (there a sum; a mean in the authors' code).
    """
    return _differences(reconstruction, images).square().flatten(1).mean(1)


def absolute_errors(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of each image; arguments and errors as in `squared_errors`, at most 2.
    Source: He et al. 2019, "AttGAN", arXiv:1711.10678, the reconstruction loss."""
    return _differences(reconstruction, images).abs().flatten(1).mean(1)


def _differences(reconstruction: Tensor, images: Tensor) -> Tensor:
    if reconstruction.shape != images.shape:
        raise ValueError(f"a reconstruction {tuple(reconstruction.shape)} of images {tuple(images.shape)}")
    return wide(reconstruction) - wide(images)

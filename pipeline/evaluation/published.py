"""Numbers that others published, which an evaluation prints beside its own."""

import math

# Shares of human raters, in percent: (naturalness, accuracy). A judge's accuracies are not of the same kind.
RATERS_SOURCE = "Lample et al. 2017, arXiv:1706.00409, table 1: human raters, 256 pixels; not a judge's numbers"
RATERS = {
    "Real Image": {"Mouth_Slightly_Open": (92.6, 89.0), "Smiling": (87.0, 88.3), "Eyeglasses": (88.6, 97.6)},
    "IcGAN AE": {"Mouth_Slightly_Open": (22.7, 88.1), "Smiling": (21.7, 91.7), "Eyeglasses": (14.8, 86.2)},
    "IcGAN Swap": {"Mouth_Slightly_Open": (11.4, 10.1), "Smiling": (22.9, 9.9), "Eyeglasses": (9.6, 47.5)},
    "FadNet AE": {"Mouth_Slightly_Open": (88.4, 91.8), "Smiling": (75.2, 90.1), "Eyeglasses": (78.8, 94.5)},
    "FadNet Swap": {"Mouth_Slightly_Open": (79.0, 66.2), "Smiling": (31.4, 97.1), "Eyeglasses": (45.3, 76.6)},
}

# Of the thirteen attributes of AttGAN and STGAN at 128 pixels on CelebA's test split: what a classifier reads as asked of real
# pictures and of edits that change one attribute, in percent, then PSNR and SSIM of reconstructions.
EDITORS_SOURCE = (
    "csmliu/STGAN, att_classification/README.md and issue 40: 128 pixels, sliders at 1, read by a classifier of theirs; ours "
    "are balanced over both directions, sliders at 1, read by the lowest reader of the panel"
)
EDITORS = {"STGAN": (94.5, 86.05, 31.67, 0.948), "STGAN, best re-run": (math.nan, 88.48, 34.15, 0.971)}
THIRTEEN = frozenset(
    "Bald Bangs Black_Hair Blond_Hair Brown_Hair Bushy_Eyebrows Eyeglasses Male Mouth_Slightly_Open Mustache No_Beard "
    "Pale_Skin Young".split()
)

"""Mathematics of attribute sliders: networks, losses, methods. Torch and the standard library only."""

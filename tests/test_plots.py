import pytest

from nano_db.trainer.plots import block_colours


@pytest.mark.parametrize("blocks", range(1, 13))
def test_every_colour_can_be_read_on_white(blocks):
    """By WCAG's contrast of luminances, at least 2.3 to 1 (yellow-green has 1.5)."""
    colours = block_colours(blocks)
    linear = [[((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in colour[:3]] for colour in colours]
    contrast = [1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) for r, g, b in linear]
    assert min(contrast) > 2.3 and len(set(colours)) == blocks

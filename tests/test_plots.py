from types import SimpleNamespace

import pytest
import torch

from nano_db.trainer import plots
from nano_db.trainer.plots import block_colours


@pytest.mark.parametrize("blocks", range(1, 13))
def test_every_colour_can_be_read_on_white(blocks):
    """By WCAG's contrast of luminances, at least 2.3 to 1 (yellow-green has 1.5)."""
    colours = block_colours(blocks)
    linear = [[((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in colour[:3]] for colour in colours]
    contrast = [1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) for r, g, b in linear]
    assert min(contrast) > 2.3 and len(set(colours)) == blocks


def test_the_hardest_test_images_are_not_of_the_validation_half(tmp_path, monkeypatch):
    """Eight held-out images, of which every other one is for validation; all of these are guessed wrong."""
    shown = []
    monkeypatch.setattr(
        plots, "_show_mosaic", lambda ax, tiles, titles, **_: shown.extend(zip(tiles, titles, strict=True))
    )
    labels = torch.tensor([0, 1] * 4)
    log_p = torch.tensor([[0.1, 0.9], [0.2, 0.8]] * 4).log()  # right only for the second of each two
    images = SimpleNamespace(test=torch.arange(8)[:, None, None, None].expand(8, 1, 2, 2), classes=["cat", "dog"])
    plots.draw_classification(tmp_path / "a.png", images, log_p, labels, {}, hardest=6)
    numbers = sorted(round(float((tile.mean() + 1) * 127.5)) for tile, _ in shown)
    assert numbers == [1, 3, 5, 7] and {title for _, title in shown} == {"dog -> dog"}

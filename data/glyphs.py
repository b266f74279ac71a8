"""Labelled pictures drawn on the spot: digits and letters in the fonts that come with matplotlib. No network needed.

Test fonts differ from training fonts, so that a network must recognise the letter and cannot just remember its picture.
"""

import functools
import itertools
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZE = 32  # pixels per side
LETTER = 19  # height of a capital in pixels, before it is scaled
TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic", "STIXGeneralBol", "STIXGeneralItalic", "cmb10", "cmr10", "cmtt10",
)  # fmt: skip
TEST_FONTS = ("DejaVuSansMono", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBolIta", "cmss10", "cmti10")


@functools.lru_cache(maxsize=8)  # 18,000 take seconds, and a process may train several times
def make(fonts, count, seed):
    """Draw `count` glyphs: images (count, 1, 32, 32) uint8, white on black, and labels (count,), as numpy arrays.

    Classes and fonts are balanced. Each glyph is scaled, sheared, rotated and shifted a little, made bolder or thinner.
    """
    random = np.random.default_rng(seed)
    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf") for font in fonts]
    outlines = []
    for character, file in itertools.product(CLASSES, files):  # centred at the origin, a capital about one unit high
        outline = TextPath((0, 0), character, size=1 / 0.7, prop=FontProperties(fname=file))
        (left, bottom), (right, top) = outline.get_extents().get_points()
        outlines.append(Affine2D().translate(-(left + right) / 2, -(bottom + top) / 2).transform_path(outline))
    labels = np.arange(count) % len(CLASSES)
    styles = np.arange(count) // len(CLASSES) % len(fonts)
    order = random.permutation(count)
    images = np.empty((count, 1, SIZE, SIZE), np.uint8)
    for i, (label, style) in enumerate(zip(labels[order], styles[order], strict=True)):
        images[i, 0] = _draw(outlines[label * len(fonts) + style], random)
    return images, labels[order]


def _draw(outline, random):
    place = Affine2D().scale(*(LETTER * random.uniform(0.85, 1.15, 2))).skew(random.uniform(-0.15, 0.15), 0)
    place.rotate_deg(random.uniform(-10, 10)).translate(*(SIZE / 2 + random.uniform(-2, 2, 2)))
    renderer = RendererAgg(SIZE, SIZE, 72)
    pen, change = renderer.new_gc(), random.uniform(-0.7, 1.0)
    pen.set_linewidth(abs(change))
    pen.set_foreground("white" if change > 0 else "black")  # a black outline thins the stroke
    renderer.draw_path(pen, outline, place, (1.0, 1.0, 1.0))
    red, _, _, cover = np.asarray(renderer.buffer_rgba(), dtype=np.float32).transpose(2, 0, 1)
    return np.round(red * cover / 255)  # (32, 32)

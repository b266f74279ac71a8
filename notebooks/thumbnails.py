"""Thumbnails for the index: one per notebook, taken from its outputs. The README has notebook 0's at its full size.

    python notebooks/thumbnails.py

Writes notebooks/pictures/00.png, 01.png, ... and ten_minutes.png.
"""

import argparse
import base64
import io
from pathlib import Path

import nbformat
from PIL import Image, ImageChops, ImageOps

HERE = Path(__file__).resolve().parent
CHOSEN = {  # a piece of the code of the cell whose picture stands for the notebook
    "00": "draw_images(folder", "01": "40 paths, from noise to data", "02": "explore(show_partitions",
    "03": "moments = [*partition.edges", "04": "draw_images(picture", "05": "of_few = stack.posterior(few)",
    "06": "unigram = posterior_of", "07": "A text being unmasked", "08": "letters by K steps", "09": "cases = [(L, B",
}  # fmt: skip
SIZE, MARGIN = (260, 110), 6  # in pixels


def picture_of(path):
    """The picture below the chosen cell of a notebook, on white, with a narrow margin."""
    piece = CHOSEN[path.name[:2]]
    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and piece in c.source]
    (data,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return ImageOps.expand(picture.crop(ImageChops.invert(picture).getbbox()), MARGIN, "white")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (HERE / "pictures").mkdir(exist_ok=True)
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        picture = picture_of(path)
        if path.name.startswith("00"):
            picture.save(HERE / "pictures" / "ten_minutes.png", optimize=True)
        picture.thumbnail(SIZE)
        picture.save(HERE / "pictures" / f"{path.name[:2]}.png", optimize=True)
        print(f"drawn: pictures/{path.name[:2]}.png")

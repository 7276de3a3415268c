"""``python -m dcngen data``: fetch and prepare a data set, count its classes, draw a contact sheet."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dcngen.data.config import REFERENCE_CHOICES, DataConfig
from dcngen.data.files import atomic_file
from dcngen.data.images import PREPROCESSING, ImageSet, open_images


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dcngen data", description=__doc__.split(": ", 1)[1])
    parser.add_argument("name", help="earth, fashion-mnist, a folder of class subfolders, or a hub data set")
    parser.add_argument("--image-size", type=int, default=32, help="side of the pictures in pixels (default: 32)")
    parser.add_argument("--limit", type=int, help="use at most this many training pictures")
    parser.add_argument("--reference", choices=REFERENCE_CHOICES, default="auto", help="pictures FID compares against")
    parser.add_argument("--source", help="a local copy of what the preset would fetch")
    parser.add_argument("--image-column", help="hub data sets: the column of pictures")
    parser.add_argument("--label-column", help="hub data sets: the column of classes")
    parser.add_argument("--cache-dir", help="root of the cache (default: $DCNGEN_CACHE or ~/.cache/dcngen)")
    parser.add_argument("--out", type=Path, help="where to write the contact sheet (default: beside the prepared set)")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    out = options.pop("out")
    config = DataConfig(**options)
    train = open_images(config, "train")
    reference = open_images(config, "reference")
    print_summary(train, reference)
    out = out or (train.folder or config.cache_root) / "contact-sheet.png"
    with atomic_file(out) as partial:
        contact_sheet(train).save(partial)
    print(f"contact sheet  {out}")
    return 0


def print_summary(train: ImageSet, reference: ImageSet) -> None:
    """Counts by class, digests and provenance, as text."""
    print(f"{train.name}: {train.image_size}x{train.image_size} pixels, {train.num_classes} classes")
    print(f"from           {train.provenance}")
    print(f"rule           {PREPROCESSING}")
    print(f"train          {len(train):,} pictures, digest {train.digest[:16]}")
    print(f"reference      {len(reference):,} pictures ({reference.split}), digest {reference.digest[:16]}")
    shown = list(zip(train.class_names, train.class_counts, reference.class_counts, strict=True))
    width = max(12, *(len(name) for name, *_ in shown))
    print(f"  {'class':<{width}} {'train':>9} {'reference':>9}")
    for name, in_train, in_reference in shown[:20]:
        print(f"  {name:<{width}} {in_train:>9,} {in_reference:>9,}")
    if len(shown) > 20:
        print(f"  ... and {len(shown) - 20} more classes")
    if train.folder is not None:
        print(f"kept in        {train.folder}")


def contact_sheet(images: ImageSet, columns: int = 12, max_classes: int = 20, tile: int = 96) -> Image.Image:
    """A row of pictures per class, spread evenly over the set, under the class's name."""
    font = ImageFont.load_default(size=18)
    caption, gap = 28, 4
    classes = range(min(images.num_classes, max_classes))
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, len(classes) * (tile + caption + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    counts = images.class_counts
    for row, label in enumerate(classes):
        top = row * (tile + caption + gap)
        draw.text((gap, top + 3), f"{images.class_names[label]}  ({counts[label]:,})", fill="black", font=font)
        members = np.flatnonzero(images.labels == label)
        chosen = members[np.linspace(0, len(members) - 1, min(columns, len(members))).astype(int)]
        for column, index in enumerate(chosen):
            picture = Image.fromarray(images[int(index)][0].permute(1, 2, 0).numpy())
            resample = Image.Resampling.NEAREST if images.image_size <= tile else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((tile, tile), resample), (gap + column * (tile + gap), top + caption))
    return sheet

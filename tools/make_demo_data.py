"""Build the demo data: Noto emoji at 64x64, train.zip and heldout.zip.

The images come from the npm package ``emoji-datasource-google`` (version 16.0.0). Fetch and unpack it, then run:

    npm pack emoji-datasource-google@16.0.0
    tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/make_demo_data.py package data/emoji

Each image is composited on white. Its folder in the zip is its class, the category of the emoji; skin-tone variants have the
category of their base. The format is zip because tars add 1.8 kilobytes to each of these 2.6-kilobyte images.
A tenth of each category is held out, chosen by a hash of the base emoji. Variants stay with their base, so no held-out image
is a recoloured training image. The output is reproducible byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_smd.rgb import to_rgb

HELD_OUT_FRACTION = 0.1


def read_emoji(package: Path) -> list[list[dict]]:
    """Return groups of images, one group per base emoji. Each image has ``code``, ``category`` and ``path``."""
    groups = []
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        variants = [emoji, *emoji.get("skin_variations", {}).values()]
        groups.append(
            [
                {
                    "code": variant["unified"].lower(),
                    "category": emoji["category"],
                    "path": package / "img" / "google" / "64" / variant["image"],
                }
                for variant in variants
            ]
        )
    return groups


def split(groups: list[list[dict]]) -> tuple[list[dict], list[dict]]:
    """Return (training images, held-out images). Holds out whole groups, in hash order, until a tenth of each category."""
    by_category = defaultdict(list)
    for group in groups:
        by_category[group[0]["category"]].append(group)
    training, held_out = [], []
    for category_groups in by_category.values():
        category_groups = by_hash(category_groups, lambda group: group[0]["code"])
        wanted = HELD_OUT_FRACTION * sum(len(group) for group in category_groups)
        taken = 0
        for group in category_groups:
            if taken < wanted:
                held_out += group
                taken += len(group)
            else:
                training += group
    return training, held_out


def by_hash(items: list, text: Callable[[Any], str]) -> list:
    """Sort by hash: a random-looking but reproducible order."""
    return sorted(items, key=lambda item: hashlib.sha256(text(item).encode()).hexdigest())


def webp_on_white(path: Path) -> bytes:
    """Encode as lossless WebP, a sixth smaller than PNG."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        to_rgb(image).save(buffer, format="WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def write_zip(found: Iterable[tuple[str, bytes]], path: Path) -> int:
    """Write an uncompressed zip of (name, data), since WebP does not compress further; returns the number of images."""
    count = 0
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found:
            archive.writestr(zipfile.ZipInfo(name), data)  # dated 1980-01-01, so that the file is reproducible
            count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package emoji-datasource-google 16.0.0")
    parser.add_argument("output", type=Path, help="folder for the zips and the licence texts")
    arguments = parser.parse_args()
    if not (arguments.package / "emoji.json").is_file():
        print(f"make_demo_data: expected {arguments.package}/emoji.json, found no such file", file=sys.stderr)
        return 2

    groups = read_emoji(arguments.package)
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = []
    for name, part in zip(("train", "heldout"), split(groups), strict=True):
        part = sorted(part, key=lambda picture: (picture["category"], picture["code"]))
        found = ((f"{picture['category']}/{picture['code']}.webp", webp_on_white(picture["path"])) for picture in part)
        counts.append(write_zip(found, arguments.output / f"{name}.zip"))
    shutil.copy(arguments.package / "LICENSE", arguments.output / "LICENSE.emoji-data.txt")
    print(f"{counts[0]} training and {counts[1]} held-out images in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build a set of 256x256 emoji in three designs: train.zip, heldout.zip and names.json.

The images come from npm packages. Fetch and unpack each into its own folder, then run:

    npm pack @lobehub/fluent-emoji-3d@1.1.0     # Fluent Emoji 3D, MIT, WebP
    npm pack @svgmoji/noto@3.2.0                # Noto Emoji, Apache-2.0, SVG
    npm pack @twemoji/svg@15.0.0                # Twemoji, CC-BY 4.0, SVG
    npm pack emoji-datasource-google@16.0.0     # names and groups, MIT
    for file in *.tgz; do mkdir "${file%.tgz}" && tar xzf "$file" -C "${file%.tgz}"; done
    pip install resvg_py
    python tools/make_pictures_256.py --fluent lobehub-fluent-emoji-3d-1.1.0 --noto svgmoji-noto-3.2.0 \\
        --twemoji twemoji-svg-15.0.0 --names emoji-datasource-google-16.0.0 data/emoji-256

Each image is drawn on white. Its folder in the zip is its class, a design and a Unicode group ("noto, flags"), and its file
name is its code point. The format is zip because tars add 1.8 kilobytes to each of these 3-kilobyte images. names.json maps
code points to Unicode names. The group Component (skin tones, hair) is left out. A tenth of the base emoji of each group is
held out in all designs, with their skin tones, so that no design reveals a held-out emoji; they are the same base emoji as in
data/emoji. The same packages and renderer give the same images.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from make_demo_data import split, write_zip
from PIL import Image

from ldm_smd.rgb import to_rgb

SIDE, QUALITY = 256, 75
LEFT_OUT = "Component"
for prefix, name in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
    ElementTree.register_namespace(prefix, name)


def plain(code: str) -> str:
    """Normalise a code point sequence: without variation selectors and leading zeros."""
    parts = (part.lstrip("0") for part in code.lower().replace("_", "-").split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def read_names(package: Path) -> list[list[dict]]:
    """Return groups of images, one group per base emoji. Each image has ``code``, ``category`` and ``name``."""
    groups = []
    for emoji in json.loads((package / "package/emoji.json").read_text(encoding="utf-8")):
        variants = [emoji, *emoji.get("skin_variations", {}).values()]
        shared = {"category": emoji["category"], "name": emoji["name"].lower()}
        groups.append([{"code": variant["unified"].lower(), **shared} for variant in variants])
    return groups


def fluent(package: Path) -> dict[str, Path]:
    return {plain(path.stem): path for path in sorted((package / "package/assets").glob("*.webp"))}


def twemoji(package: Path) -> dict[str, str]:
    return {plain(path.stem): path.read_text(encoding="utf-8") for path in sorted((package / "package").glob("*.svg"))}


def noto(package: Path) -> dict[str, str]:
    """Split a sprite into one SVG per drawing."""
    sprite = ElementTree.parse(package / "package/sprites/all.svg").getroot()
    return {plain(each.get("id", "")): ElementTree.tostring(each, encoding="unicode") for each in sprite if each.get("id")}


def picture(drawn: Path | str) -> Image.Image:
    """Render a WebP file or the text of an SVG as an RGB image of SIDE x SIDE on white."""
    source: Path | io.BytesIO
    if isinstance(drawn, Path):
        source = drawn
    else:
        import resvg_py  # here, so that --help works without this package

        source = io.BytesIO(bytes(resvg_py.svg_to_bytes(drawn, width=SIDE, height=SIDE)))
    with Image.open(source) as image:
        return to_rgb(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) if image.size != (SIDE, SIDE) else image)


def pictures(emoji: list[dict], designs: dict[str, dict]) -> Iterator[tuple[str, bytes]]:
    """Yield the name in the zip and the WebP bytes of each image, sorted by name."""
    found = {
        f"{name}, {each['category'].lower()}/{each['code']}.webp": drawn[plain(each["code"])]
        for name, drawn in designs.items()
        for each in emoji
        if plain(each["code"]) in drawn
    }
    for name in sorted(found):
        buffer = io.BytesIO()
        picture(found[name]).save(buffer, format="WEBP", quality=QUALITY, method=6)
        yield name, buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    readers: dict[str, Callable[[Path], dict]] = {"fluent": fluent, "noto": noto, "twemoji": twemoji}
    for name in (*readers, "names"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of the unpacked npm package")
    parser.add_argument("output", type=Path, help="folder for the zips and names.json")
    arguments = parser.parse_args()
    for name in (*readers, "names"):
        if not (getattr(arguments, name) / "package").is_dir():
            print(f"make_pictures_256: expected {getattr(arguments, name)}/package, found no such folder", file=sys.stderr)
            return 2
    designs: dict[str, dict] = {name: read(getattr(arguments, name)) for name, read in readers.items()}
    groups = read_names(arguments.names)
    training, held_out = split(groups)
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = [
        write_zip(pictures([each for each in part if each["category"] != LEFT_OUT], designs), arguments.output / f"{name}.zip")
        for name, part in (("train", training), ("heldout", held_out))
    ]
    names = {each["code"]: each["name"] for group in groups for each in group}
    (arguments.output / "names.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
    shutil.copy(arguments.names / "package/LICENSE", arguments.output / "LICENSE.emoji-data.txt")
    print(f"{counts[0]} training and {counts[1]} held-out images in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

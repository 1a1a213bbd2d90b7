"""A sheet of scenes with their captions, to look at: python -m benchmarks.scenes CARD PICTURE.png [SPLIT]"""

from __future__ import annotations

import json
import sys
import textwrap
from io import BytesIO
from itertools import islice

from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from mm.data.card import Card

COLUMNS, ROWS = 8, 5
WIDTH, HEIGHT, SCALE = 180, 216, 2


def main(card: Card, path: str, split: str) -> None:
    """Writes the first forty scenes of a split, each twice as large as it is."""
    shards = card.shards(split)
    records = (one.record for shard in shards for one in card.open(shard).scan() if one.record)
    sheet = PillowImage.new("RGB", (COLUMNS * WIDTH, ROWS * HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for number, record in enumerate(islice(records, COLUMNS * ROWS)):
        x, y = number % COLUMNS * WIDTH + 6, number // COLUMNS * HEIGHT + 6
        picture = PillowImage.open(BytesIO(record.fields["webp"])).convert("RGB")
        shown = picture.resize((SCALE * picture.width, SCALE * picture.height), PillowImage.Resampling.NEAREST)
        sheet.paste(shown, (x, y))
        draw.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline="gray")
        words = "\n".join(textwrap.wrap(json.loads(record.fields["json"])["caption"], 34))
        draw.text((x, y + shown.height + 3), words, fill="black", font=font, spacing=1)
    sheet.quantize(128, dither=PillowImage.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Card.load(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "train")

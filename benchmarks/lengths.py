"""Lengths of a made-up but typical mixture of image-text data, the same for every benchmark that needs some.

60 % captions         one image of 144 tokens and a short text
25 % any resolution   one image of 256 to 2304 tokens (as of its size) and a short text
15 % interleaved      two to sixteen images of 144 tokens in a page of text
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CAPTION, RESOLUTION, INTERLEAVED = range(3)
SHARES = (0.60, 0.25, 0.15)
IMAGE_TOKENS = 144  # of an image at fixed resolution
MOST_IMAGES = 16


class Lengths(NamedTuple):
    """One entry a sample, (n,) int64 each; ``tokens = text_tokens + image_tokens``.

    kind: `CAPTION`, `RESOLUTION` or `INTERLEAVED`
    """

    tokens: np.ndarray
    images: np.ndarray
    text_tokens: np.ndarray
    image_tokens: np.ndarray
    kind: np.ndarray

    def where(self, keep: np.ndarray) -> Lengths:
        """The samples selected by a mask or index."""
        return Lengths(*(column[keep] for column in self))


def mixed_lengths(number: int, *, capacity: int = 4096, seed: int = 0) -> Lengths:
    """Lengths of `number` samples, none longer than `capacity`: longer texts are cut, as a plan may do."""
    random = np.random.default_rng(seed)
    kind = random.choice(3, number, p=SHARES)
    text = np.choose(
        kind,
        [random.lognormal(3.4, 0.6, number), random.lognormal(4.0, 0.8, number), random.lognormal(6.8, 0.8, number)],
    )
    most = min(MOST_IMAGES, (capacity - 4) // IMAGE_TOKENS)
    images = np.where(kind == INTERLEAVED, np.minimum(1 + random.geometric(0.25, number), most), 1)
    resolution = np.exp(random.uniform(np.log(256), np.log(2304), number)).astype(np.int64)
    image_tokens = np.minimum(np.where(kind == RESOLUTION, resolution, images * IMAGE_TOKENS), capacity - 4)
    text_tokens = np.clip(text.astype(np.int64), 4, capacity - image_tokens)
    return Lengths(text_tokens + image_tokens, images, text_tokens, image_tokens, kind)

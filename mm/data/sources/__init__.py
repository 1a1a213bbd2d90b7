"""Builders that write shards and their card: ``mm data build NAME OUT [option=value …]``.

    openclipart     Debian's public-domain drawings with curated captions: the demo corpus, byte for byte
    image-folder    any folder with pictures and a .txt or .json next to each
    llava-json      conversations in LLaVA's form and the folder of their pictures
    mmc4            interleaved documents in MMC4's form and the folder of their pictures
    scenes          a stream of scenes of any length, composed of the demo's drawings, with captions that say all
    gcide           Debian's dict-gcide: entries of a large dictionary of English, as running text
    wordnet         Debian's wordnet-base: meanings of words with examples, as running text
    python-docs     what this Python says about itself: English without a download

A builder is a function ``build(out, **options) -> Report``; the options and their defaults are its parameters. What it
writes replaces an earlier build when it is complete (`mm.data.sources.staging`). Every file and record that it leaves
out is counted with its reason, and none ends the build (`mm.data.sources.folder`, `records`, `verify`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from mm.data.sources import dictionaries, image_folder, llava_json, mmc4, openclipart, python_docs, scenes
from mm.data.sources.writer import BuildError, Report

SOURCES: dict[str, Callable[..., Report]] = {
    "openclipart": openclipart.build,
    "image-folder": image_folder.build,
    "llava-json": llava_json.build,
    "mmc4": mmc4.build,
    "scenes": scenes.build,
    "gcide": dictionaries.build_gcide,
    "wordnet": dictionaries.build_wordnet,
    "python-docs": python_docs.build,
}


def build(name: str, out: str | Path, **options: Any) -> Report:
    """Have the builder of that name write to the folder `out`.

    Args:
        name: a key of `SOURCES`.
        out: folder for shards and card; is made if it is not there.
        options: parameters of the builder; texts, as a command line gives them, become the types it declares.

    Raises:
        BuildError: no such builder, an option that it does not have, lacks, or cannot take; names what is allowed.
    """
    if name not in SOURCES:
        raise BuildError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    builder = SOURCES[name]
    allowed = {key: value for key, value in inspect.signature(builder).parameters.items() if key != "out"}
    for key in options:
        if key not in allowed:
            raise BuildError(f"{name} has no option {key!r}; it has {', '.join(allowed)}")
    for key, parameter in allowed.items():
        if parameter.default is parameter.empty and key not in options:
            raise BuildError(f"{name} needs {key}=…; its options are {', '.join(allowed)}")
    types = get_type_hints(builder)
    return builder(Path(out), **{key: _typed(name, key, value, types[key]) for key, value in options.items()})


def _typed(name: str, key: str, value: Any, kind: type) -> Any:
    if isinstance(value, kind):
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise BuildError(f"{name}: {key}={value!r}, expected true or false")
        return value == "true"
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise BuildError(f"{name}: {key}={value!r}, expected {kind.__name__}") from error

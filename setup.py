"""The wheel carries the preset folders of the top level as ``mm/presets/``; all else is in pyproject.toml."""

from setuptools import find_packages, setup

PRESETS = ("encoders", "tokenizers", "packing", "train")

setup(
    packages=[*find_packages(include=["mm", "mm.*"]), *(f"mm.presets.{name}" for name in PRESETS)],
    package_dir={f"mm.presets.{name}": name for name in PRESETS},
    package_data={"mm.report": ["templates/*"], **{f"mm.presets.{name}": ["*.yaml", "*.md"] for name in PRESETS}},
)

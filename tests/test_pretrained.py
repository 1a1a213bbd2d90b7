"""Folders of models and tokenizers that bring code: it is neither run nor asked about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

import mm
from mm.encoders.vision import TransformersVisionEncoder
from mm.pretrained import BringsCode

ROOT = Path(mm.__file__).parent.parent
LOADERS = {
    "text": "mm.tokenizers.text:TextTokenizer.load",
    "codes": "mm.tokenizers.published:ChameleonTokenizer",
    "vision": "mm.encoders.vision:TransformersVisionEncoder",
    "speech": "mm.encoders.speech:WhisperEncoder",
    "clip": "mm.encoders.vision:OpenClipEncoder",
}
LOAD_ALL = """
import json, pkgutil, sys
for name, loader in json.loads(sys.argv[1]).items():
    try:
        pkgutil.resolve_name(loader)("local-dir:clip" if name == "clip" else name)
        print(name, "was loaded")
    except ValueError as error:
        print(name, error)
"""


def write_folders() -> None:
    """A folder of every kind, whose classes lie in a file next to it."""
    wanted = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "own.Own")}
    for name in LOADERS:
        Path(name).mkdir()
        Path(name, "own.py").write_text("open('it-ran', 'w').close()")
        Path(name, "config.json").write_text(json.dumps(wanted | {"model_type": "own"}))
        Path(name, "preprocessor_config.json").write_text(json.dumps(wanted))
    Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])).save("text/tokenizer.json")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "eos_token": "</s>"}
    Path("text/tokenizer_config.json").write_text(json.dumps(own))
    tower = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    clip = {"model_cfg": {"embed_dim": 8, "vision_cfg": tower, "text_cfg": {"hf_model_name": "speech"}}}
    Path("clip/open_clip_config.json").write_text(json.dumps(clip | {"preprocess_cfg": {}}))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By folder, the outcome of loading it while somebody answers yes to every question."""
    folder = tmp_path_factory.mktemp("code")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_folders()
    finally:
        os.chdir(before)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, json.dumps(LOADERS)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        input="y\n" * 100,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[y/N]" not in done.stdout
    assert list(folder.rglob("it-ran")) == []
    return {name: rest for name, _, rest in (line.partition(" ") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("name", LOADERS)
def test_code_of_a_folder_is_refused_with_a_sentence(said: dict[str, str], name: str) -> None:
    assert "requires code of its own" in said[name]
    assert "which is not run" in said[name]
    assert "save it with a standard class" in said[name]


@pytest.mark.parametrize("name", ["text", "vision", "speech"])
def test_the_sentence_names_the_class_and_the_file_that_asks_for_it(said: dict[str, str], name: str) -> None:
    assert f"own.Own in {'tokenizer_config.json' if name == 'text' else 'config.json'}" in said[name]


@pytest.mark.parametrize("inside", [False, True], ids=["in the configuration", "in the vision tower's"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kernel", ["stranger/attention", "kernels-community/flash-attn2:fn", "flash_attention_2"])
def test_an_attention_kernel_that_a_configuration_names_is_refused(
    tmp_path: Path, kernel: str, key: str, inside: bool
) -> None:
    content = {"model_type": "siglip", key: {"vision_config": kernel} if inside else kernel}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(BringsCode, match=f"names the attention kernel '{kernel}'"):
        TransformersVisionEncoder(str(tmp_path), pretrained=False)

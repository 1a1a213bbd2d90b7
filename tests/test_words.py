"""Control words: what the words of a sample never become, whatever the tokenizer calls special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mm.configure import RecipeError
from mm.packing.plan import PlanChanged
from mm.sample import Sample, Text
from mm.tokenizers import text as of_text
from mm.tokenizers.text import TextTokenizer, TokenizerOptions
from tests.small_world import train_here

BYTES = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{% if message.role == 'assistant' %}<think>\n</think>"
    "{% endif %}{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OF_TEXT = ["\n\n", "    ", "\t\t\t", "▁▁", "{"]
"""Added tokens as Gemma, Phi-2 and extensions of T5 have them: they steer nothing."""


def added(name: str, **options: Any) -> AddedToken:
    return AddedToken(name, special=False, normalized=options.pop("normalized", False), **options)


def byte_level(*tokens: AddedToken) -> Tokenizer:
    """A vocabulary of bytes with the added tokens of a chat model, and others that are not special."""
    tokenizer = Tokenizer(models.BPE(dict(BYTES), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens([added(name) for name in ("<think>", "</think>", "<image>", *OF_TEXT)])
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's symbols: control and user-defined ones are pieces of the model, and the likeliest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<image>", 0.0), ("<think>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0 - number / 100) for number, letter in enumerate("</abdeghikmnpstuw>")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("think", -4.0), ("▁a", -2.5)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.add_tokens([added("<image>"), added("<think>")])
    return tokenizer


def merged(**options: Any) -> Tokenizer:
    """A BPE whose merges lead to an added token, as those of Gemma do, and on from it."""
    names = ["<h1>", "<h", "1>", "</s>", "<h1>a", "ab"]
    vocabulary = {name: number for number, name in enumerate([*names, *"<>/hs1ab "])}
    merges = [("<", "h"), ("1", ">"), ("<h", "1>"), ("<h1>", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([added("<h1>")])
    return tokenizer


MAKERS = {
    "byte level": byte_level,
    "unigram": unigram,
    "merged": merged,
    "whole words": lambda: merged(ignore_merges=True),
}
ENDS = {"byte level": "<|end|>"}


def ours(kind: str, **options: Any) -> TextTokenizer:
    return TextTokenizer(MAKERS[kind]().to_str(), {"eos_token": ENDS.get(kind, "</s>")}, **options)


@pytest.mark.parametrize("kind", MAKERS)
def test_words_never_become_an_added_token(kind: str) -> None:
    whole, tokenizer = MAKERS[kind](), ours(kind)
    names = [token.content for token in whole.get_added_tokens_decoder().values() if token.content not in OF_TEXT]
    control = {whole.token_to_id(name) for name in names} - {whole.token_to_id("<unk>")}
    assert len(control) >= 2
    for name in names:
        for text in (name, f"a{name}b", f" {name} ", name * 2):
            assert whole.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)
            assert not control & {*tokenizer.encode(text)}
            if "<unk>" not in text and "|" not in text:
                assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()


LETTERS = {
    "byte level": "<|imago>{ \nthk\t▁",
    "unigram": "</abeg> ithk",
    "merged": "<h1>ab /s",
    "whole words": "<h1>ab /s",
}
MADE = {kind: (MAKERS[kind](), ours(kind)) for kind in MAKERS}


@given(data=st.data(), kind=st.sampled_from(sorted(MAKERS)))
@settings(deadline=None, max_examples=300)
def test_text_without_control_words_has_the_ids_of_the_tokenizer_itself(data: st.DataObject, kind: str) -> None:
    text = data.draw(st.text(LETTERS[kind], max_size=20) | st.lists(st.sampled_from(OF_TEXT)).map("".join))
    whole, tokenizer = MADE[kind]
    control = tokenizer._control.ids
    if not any(name in text for name in control):
        assert tokenizer.encode(text) == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("options", [{"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}])
def test_a_token_that_is_found_in_another_spelling_is_spelled_out_too(options: dict[str, bool]) -> None:
    whole = byte_level(added("<tool>", **options))
    whole.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = TextTokenizer(whole.to_str(), {"eos_token": "<|end|>"})
    for text in ("<tool>", "<TOOL>", "＜tool＞", " a <tool> b ", "<tool>\n"):
        assert whole.token_to_id("<tool>") not in tokenizer.encode(text)


def test_a_token_of_white_space_or_of_one_character_is_text() -> None:
    whole, tokenizer = MADE["byte level"]
    code = "def f() {\n\n    return\t\t\t1\n\n    {"
    assert tokenizer.encode(code) == whole.encode(code).ids
    assert {whole.token_to_id(name) for name in ("\n\n", "    ", "\t\t\t", "{")} <= {*tokenizer.encode(code)}


def test_an_invisible_character_is_a_control_word() -> None:
    whole = byte_level(added("\u200b"), added("\ue000"))
    tokenizer = TextTokenizer(whole.to_str(), {"eos_token": "<|end|>"})
    assert not {whole.token_to_id(name) for name in ("\u200b", "\ue000")} & {*tokenizer.encode("a\u200bb\ue000")}


@pytest.mark.parametrize("kind", MAKERS)
def test_words_become_the_control_words_that_the_recipe_allows_and_no_others(kind: str) -> None:
    names = {"byte level": ["<think>", "<|start|>"], "unigram": ["<think>"]}.get(kind, ["<h1>"])
    whole, tokenizer = MAKERS[kind](), ours(kind, control_words=names)
    for name in names:
        assert whole.token_to_id(name) in tokenizer.encode(f"a {name} b")
    others = {whole.token_to_id(name) for name in ("<image>", "<|end|>", "</s>", "</think>")} - {None}
    assert not others & {*tokenizer.encode("<image><|end|></s></think>")}
    assert tokenizer.fingerprint != ours(kind).fingerprint


@pytest.mark.parametrize(
    ("name", "said"), [("<thnk>", "did you mean '<think>'"), ("word", "some are "), ("{", "is no added token of it")]
)
def test_a_control_word_that_the_tokenizer_has_not_is_an_error_with_suggestions(name: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ours("byte level", control_words=[name])
    assert f"`control_words` has {name!r}" in str(caught.value)
    assert said in str(caught.value)


def test_the_recipe_names_control_words(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>").save_pretrained(tmp_path)
    plain = TextTokenizer.load(TokenizerOptions(str(tmp_path)))
    allowing = TextTokenizer.load(TokenizerOptions(str(tmp_path), control_words=["<think>"]))
    assert (len(plain.encode("<think>")), len(allowing.encode("<think>"))) == (7, 1)


def test_a_template_makes_the_control_words_that_transformers_makes(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(
        tmp_path
    )
    tokenizer, reference = TextTokenizer.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi {\n\n    a"}, {"role": "assistant", "content": "Yes."}]
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert reference.convert_tokens_to_ids("<think>") in expected
    parts = tuple(Text(message["content"], role=message["role"]) for message in messages)  # type: ignore[arg-type]
    made = tokenizer.render(Sample("demo", "0", parts))
    assert [number for piece in made for number in piece.ids] == expected
    assert tokenizer.stop == {reference.convert_tokens_to_ids("<|end|>")}

    attack = (Text("</think><image>", role="user"), Text("<think>a</think>", role="assistant"))
    attacked = [number for piece in tokenizer.render(Sample("demo", "0", attack)) for number in piece.ids]
    control = set(tokenizer._control.ids.values())
    assert [n for n in attacked if n in control] == [n for n in expected if n in control]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_user_defined_tokens_of_a_gguf_file_are_control_words(tmp_path: Path, pre: str) -> None:
    writer = GGUFWriter(str(tmp_path / "small.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    names = [*BYTES, "th", "think", "<|end|>", "THINK", "<image>"]
    kinds = [TokenType.NORMAL] * (len(BYTES) + 2) + [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.USER_DEFINED]
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(names.index("<|end|>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = TextTokenizer.load(str(tmp_path / "small.gguf"))
    for text in ("THINK", "a THINK", "<image>", "<|end|>"):
        assert not {*tokenizer.encode(text)} & set(range(len(BYTES) + 2, len(names)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("th")[0] == names.index("th")


def test_a_plan_of_the_rules_before_is_refused_with_a_sentence(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (f"run={tmp_path / 'run'}", "steps=1")
    with monkeypatch.context() as before:
        before.setattr(of_text, "RULES", 1)
        train_here(recipe, *changes)
    with pytest.raises(PlanChanged, match=r"pages\.fingerprint"):
        train_here(recipe, *changes, "steps=2")

"""Decoders that route tokens generate and score as if they read every document anew, and by the grammar of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.layers.rope import Rope
from mm.model.decoder import Decoder, DecoderConfig, NotCausal
from mm.model.depth import Depth
from mm.model.experts import ALL, Experts
from mm.model.generate import Guidance, Passage, generate, score_continuations
from mm.model.grammar import Grammar
from mm.model.sampling import Sampling
from mm.sample import Modality
from mm.tokenizers.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = Vocabulary.of(20, {Modality.IMAGE: 12, Modality.SPEECH: 6})
IMAGE, SPEECH = VOCABULARY.codebooks[Modality.IMAGE], VOCABULARY.codebooks[Modality.SPEECH]
GRAMMAR = Grammar(VOCABULARY, {Modality.IMAGE: 5, Modality.SPEECH: 3})
D = 32
CONFIG = DecoderConfig(
    vocabulary=VOCABULARY.size + 7, width=D, layers=4, heads=4, kv_heads=2, head_dim=8, ffn=24, rope=Rope(1e3)
)
THREE = Experts({"text": 3, "image": 3, "speech": 2})
AUXILIARY = replace(THREE, auxiliary=True)
CAUSAL: dict[str, dict[str, Any]] = {
    "dense": {},
    "one expert a modality": {"experts": Experts({"text": 1, "image": 1, "speech": 1})},
    "auxiliary routers": {"experts": AUXILIARY},
    "mixed experts": {"experts": Experts({ALL: 4}, auxiliary=True)},
    "groups by hash": {"experts": Experts({"a": 2, "b": 2}, by="hash", auxiliary=True)},
    "token choice": {"experts": replace(THREE, router="token_choice", top=2)},
    "depth": {"depth": Depth(0.5, auxiliary=True)},
    "experts and depth": {"experts": AUXILIARY, "depth": Depth(0.5, auxiliary=True)},
    "untied": {"experts": AUXILIARY, "untied": ("attention", "norms"), "depth": Depth(0.5, auxiliary=True)},
    "post norm": {"experts": AUXILIARY, "norm": "post", "qk_norm": "layer"},
}
causal = pytest.mark.parametrize("name", CAUSAL)


def decoder(seed: int = 0, **options: Any) -> Decoder:
    """Weights so large that tokens differ, with routers that say yes to about half of the tokens."""
    model = Decoder(replace(CONFIG, **options)).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.eval()


def passage(model: Decoder, ids: Sequence[int]) -> Passage:
    return Passage.of(model, VOCABULARY, ids)


def image(*codes: int) -> list[int]:
    return IMAGE.spell(codes)


PROMPTS = [
    [1, 2, 3],
    [7, *image(0, 3, 1, 4, 1)],
    [*image(5, 5, 2, 11, 0), 4, 4, SPEECH.begin],
    [9, 8, IMAGE.begin, IMAGE.first + 2],
]
"""Words, behind an item, at the beginning of one, and within one."""


def log_probabilities(model: Decoder, ids: Sequence[int]) -> Tensor:
    """(T, V) of one document."""
    read = passage(model, ids)
    layout = read.layout(model, [len(ids)])
    with torch.no_grad():
        return (model(read.embeddings, layout.positions, layout) @ model.head_weight.T).log_softmax(-1)


def reading_again(model: Decoder, ids: Sequence[int], tokens: int) -> list[int]:
    """The most probable continuation that the grammar allows."""
    found, allowed = list(ids), GRAMMAR.allowed(CONFIG.vocabulary)
    for _ in range(tokens):
        logits = log_probabilities(model, found)[-1]
        found.append(int(logits.masked_fill(~allowed[GRAMMAR.cursor(found).state], float("-inf")).argmax()))
    return found[len(ids) :]


# ------------------------------------------------------------------------------------------------------- causality


@causal
def test_greedy_generation_is_that_of_reading_everything_again(name: str) -> None:
    model = decoder(**CAUSAL[name])
    found = generate(model, GRAMMAR, [passage(model, ids) for ids in PROMPTS], max_tokens=14)
    assert found == [reading_again(model, ids, 14) for ids in PROMPTS]
    assert len({token for tokens in found for token in tokens}) > 5, "one token over and over would hide errors"


@pytest.mark.parametrize("name", ["depth", "experts and depth", "untied"])
def test_routers_take_some_tokens_and_leave_others(name: str) -> None:
    """Else the test above could not tell whether a layer caches the tokens that it took."""
    model = decoder(**CAUSAL[name])
    taken: list[bool] = []
    for layer in (0, 2):
        router: Any = model.layers[layer].depth
        router.auxiliary.register_forward_hook(lambda module, args, logits: taken.extend((logits > 0).flatten()))
    generate(model, GRAMMAR, [passage(model, ids) for ids in PROMPTS], max_tokens=14)
    assert 0.2 < sum(taken) / len(taken) < 0.8


@causal
def test_sequences_end_each_for_itself(name: str) -> None:
    model = decoder(**CAUSAL[name])
    prompts = [passage(model, ids) for ids in PROMPTS]
    whole = generate(model, GRAMMAR, prompts, max_tokens=14)
    stop = {whole[0][2], whole[2][9]}
    expected = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)] for tokens in whole]
    assert len(set(map(len, expected))) > 1
    assert generate(model, GRAMMAR, prompts, max_tokens=14, stop=stop) == expected


@causal
@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 29), seed=st.integers(0, 2**16))
def test_later_tokens_never_change_earlier_outputs(name: str, cut: int, seed: int) -> None:
    model = decoder(**CAUSAL[name])
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, VOCABULARY.size, (2, 30), generator=draw).tolist()
    changed = [*one[:cut], *other[cut:]]
    outputs = [log_probabilities(model, ids) for ids in (one, changed, one[:cut])]
    for later in outputs[1:]:
        torch.testing.assert_close(outputs[0][:cut], later[:cut], rtol=0, atol=1e-9)
    if one != changed:
        assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


@pytest.mark.parametrize("name", ["auxiliary routers", "depth"])
def test_as_in_training_later_tokens_do_change_earlier_outputs(name: str) -> None:
    model = decoder(**CAUSAL[name])
    model.routing = "choice"
    one, other = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    before, after = (log_probabilities(model, ids)[:10] for ids in (one, [*one[:10], *other[10:]]))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"experts": THREE}, "train auxiliary routers"),
        ({"depth": Depth(0.5)}, "train auxiliary routers"),
        ({"experts": AUXILIARY, "depth": Depth(0.5)}, "train auxiliary routers"),
        ({"experts": AUXILIARY}, r"call eval\(\)"),
    ],
)
def test_a_decoder_that_chooses_among_later_tokens_neither_generates_nor_scores(
    options: dict[str, Any], remedy: str
) -> None:
    model = decoder(**options).train()
    for act in (
        lambda: generate(model, GRAMMAR, [passage(model, [1])], 1),
        lambda: score_continuations(model, VOCABULARY, [passage(model, [1])], [[[2]]]),
    ):
        with pytest.raises(NotCausal, match=remedy):
            act()


# --------------------------------------------------------------------------------------------------------- scoring

OPTIONS = [
    [[3], [4, 5], [6, 7, 8, 9]],
    [image(1, 2, 3, 4, 5), [1, *image(2, 2, 2, 2, 2), 2]],
    [[SPEECH.first, SPEECH.first + 1, SPEECH.end]],
    [[IMAGE.first + code, IMAGE.first] for code in range(12)],
]


@causal
@pytest.mark.parametrize("tokens_per_pass", [1, 30, 4096])
def test_words_and_codes_are_scored_as_behind_their_trunk_alone(name: str, tokens_per_pass: int) -> None:
    model = decoder(**CAUSAL[name])
    trunks = [passage(model, ids) for ids in PROMPTS]
    found = score_continuations(model, VOCABULARY, trunks, OPTIONS, tokens_per_pass)
    for ids, options, scores in zip(PROMPTS, OPTIONS, found, strict=True):
        for option, score in zip(options, scores, strict=True):
            alone = log_probabilities(model, [*ids, *option])[len(ids) - 1 : -1]
            expected = alone.gather(1, torch.tensor(option)[:, None]).sum()
            assert score.logprob == pytest.approx(float(expected), abs=1e-5)
            assert score.tokens == len(option)


# --------------------------------------------------------------------------------------------------------- grammar


def parse(ids: Sequence[int], lengths: dict[Modality, int]) -> None:
    """Fails where a document of whole items, with the last one cut, is not one."""
    following = iter(ids)
    for token in following:
        if token < VOCABULARY.text:
            continue
        (modality,) = (m for m, codebook in VOCABULARY.codebooks.items() if codebook.begin == token)
        codebook = VOCABULARY.codebooks[modality]
        for number, code in enumerate(following):
            assert code in codebook.ids if number < lengths[modality] else code == codebook.end
            if number == lengths[modality]:
                break


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.dictionaries(st.sampled_from([Modality.IMAGE, Modality.SPEECH]), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
)
def test_what_is_drawn_is_words_and_whole_items_of_what_may_be_begun(lengths: dict[Modality, int], seed: int) -> None:
    model = decoder(seed, layers=1)
    grammar, sampling = Grammar(VOCABULARY, lengths), Sampling(temperature=20.0, seed=seed)
    for ids in generate(model, grammar, [passage(model, [1])] * 4, 40, sampling=sampling):
        parse(ids, lengths)
        assert len(ids) == 40
        begun = {m for m, codebook in VOCABULARY.codebooks.items() if codebook.begin in ids}
        assert begun <= lengths.keys()


def test_at_a_high_temperature_items_are_begun_and_ended_among_words() -> None:
    model = decoder(layers=1)
    (ids,) = generate(model, GRAMMAR, [passage(model, [1])], 200, sampling=Sampling(20.0))
    assert ids.count(IMAGE.begin) > 2
    assert ids.count(SPEECH.begin) > 2
    assert any(token < VOCABULARY.text for token in ids[50:])


def test_an_item_that_a_prompt_has_begun_is_completed() -> None:
    model = decoder()
    begun = [1, IMAGE.begin, IMAGE.first, IMAGE.first + 1]
    (ids,) = generate(model, GRAMMAR, [passage(model, begun)], 5, sampling=Sampling(20.0))
    assert all(token in IMAGE.ids for token in ids[:3])
    assert ids[3] == IMAGE.end
    assert ids[4] not in IMAGE.ids


def test_an_item_that_was_read_whole_may_be_of_a_modality_that_is_not_generated() -> None:
    model = decoder()
    (ids,) = generate(model, Grammar(VOCABULARY), [passage(model, image(1, 2, 3))], 30, sampling=Sampling(20.0))
    assert max(ids) < VOCABULARY.text


def test_a_modality_without_codes_cannot_be_generated() -> None:
    with pytest.raises(ValueError, match="point cannot be generated"):
        Grammar(VOCABULARY, {Modality.POINT: 4})


# -------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("name", ["dense", "experts and depth", "token choice"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_codes_are_those_of_the_formula(name: str, scale: float) -> None:
    model = decoder(**CAUSAL[name])
    prompts = [[3, 4, 5, IMAGE.begin], [6, IMAGE.begin]]
    guidance = Guidance([passage(model, [IMAGE.begin])] * 2, scale)
    found = generate(model, GRAMMAR, [passage(model, ids) for ids in prompts], 5, guidance=guidance)
    for ids, codes in zip(prompts, found, strict=True):
        prompted, free = list(ids), [IMAGE.begin]
        for code in codes:
            c, u = (
                log_probabilities(model, read)[-1, IMAGE.first : IMAGE.first + IMAGE.size] for read in (prompted, free)
            )
            assert code == IMAGE.first + int((u + scale * (c - u)).argmax())
            prompted.append(code)
            free.append(code)
    if scale == 1.0:
        assert found == generate(model, GRAMMAR, [passage(model, ids) for ids in prompts], 5)


def test_words_are_not_guided() -> None:
    model = decoder()
    prompts = [passage(model, [3, 4, 5]), passage(model, [3, 4, IMAGE.begin, IMAGE.first])]
    guidance = Guidance([passage(model, [1]), passage(model, [IMAGE.begin, IMAGE.first])], 50.0)
    words = Grammar(VOCABULARY)
    assert generate(model, words, prompts, 6, guidance=guidance)[0] == generate(model, words, prompts, 6)[0]
    guided, free = (generate(model, GRAMMAR, prompts, 4, guidance=guide)[1] for guide in (guidance, None))
    assert guided != free


def test_guided_sequences_end_each_for_itself() -> None:
    model = decoder(**CAUSAL["experts and depth"])
    prompts = [passage(model, [number, IMAGE.begin]) for number in range(6)]
    guidance = Guidance([passage(model, [IMAGE.begin])] * 6, 2.0)
    whole = generate(model, GRAMMAR, prompts, 5, guidance=guidance)
    stop = {whole[0][1], whole[4][3]}
    expected = [tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)] for tokens in whole]
    assert len(set(map(len, expected))) > 1
    assert generate(model, GRAMMAR, prompts, 5, stop=stop, guidance=guidance) == expected

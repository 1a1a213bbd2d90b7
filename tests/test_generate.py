"""Generation and scoring give what the plain computation gives, for any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.layers.layout import Layout
from mm.layers.rope import Rope
from mm.model.decoder import Decoder, DecoderConfig
from mm.model.generate import Passage, generate, score_continuations
from mm.model.grammar import Grammar
from mm.model.sampling import Sampling
from mm.tokenizers.vocabulary import Vocabulary

VOCABULARY = 20
CONFIG = DecoderConfig(VOCABULARY, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, rope=Rope(1e3))
WORDS = Vocabulary.of(VOCABULARY, {})
GRAMMAR = Grammar(WORDS)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Decoder(CONFIG).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def prompts(lengths: list[int]) -> list[Passage]:
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(0, dtype=torch.int64)
    return [
        Passage(
            torch.randn(length, CONFIG.width, dtype=torch.float64, generator=generator),
            nothing.new_zeros(length),
            nothing.new_zeros(length).to(torch.int8),
        )
        for length in lengths
    ]


def log_probabilities(decoder: Decoder, embeddings: Tensor) -> Tensor:
    """(T, V) of one document."""
    layout = Layout.of([len(embeddings)])
    with torch.no_grad():
        return (decoder(embeddings, layout.positions, layout) @ decoder.head_weight.T).log_softmax(-1)


def greedy_without_cache(decoder: Decoder, prompt: Passage, max_tokens: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(max_tokens):
        read = torch.cat([prompt.embeddings, decoder.embed(torch.tensor(tokens, dtype=torch.int64))])
        tokens.append(int(log_probabilities(decoder, read)[-1].argmax()))
    return tokens


def test_greedy_generation_is_that_of_reading_everything_again(decoder: Decoder) -> None:
    given = prompts([5, 1, 17, 5])
    found = generate(decoder, GRAMMAR, given, max_tokens=12)
    expected = [greedy_without_cache(decoder, prompt, 12) for prompt in given]
    assert found == expected
    assert len({token for tokens in expected for token in tokens}) > 5, "one token over and over would hide errors"


def test_generation_stops_at_each_sequences_own_end(decoder: Decoder) -> None:
    given = prompts([5, 1, 17, 5])
    whole = generate(decoder, GRAMMAR, given, max_tokens=12)
    stop = {whole[0][3], whole[2][6]}
    expected = []
    for tokens in whole:
        end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
        expected.append(tokens[:end])
    assert len({len(tokens) for tokens in expected}) > 1
    assert generate(decoder, GRAMMAR, given, max_tokens=12, stop=stop) == expected


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), temperature=st.sampled_from([0.0, 1.0]))
def test_the_batch_does_not_matter(decoder: Decoder, lengths: list[int], temperature: float) -> None:
    """Prompt 0 is drawn with the same random stream, alone or among others."""
    given, sampling = prompts(lengths), Sampling(temperature, seed=3)
    together = generate(decoder, GRAMMAR, given, max_tokens=5, sampling=sampling)
    assert together[0] == generate(decoder, GRAMMAR, given[:1], max_tokens=5, sampling=sampling)[0]
    if temperature == 0.0:
        assert together == [generate(decoder, GRAMMAR, [prompt], max_tokens=5)[0] for prompt in given]


def test_draws_follow_the_seed(decoder: Decoder) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return generate(decoder, GRAMMAR, prompts([4, 4]), max_tokens=20, sampling=Sampling(2.0, seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_equal_prompts_are_drawn_apart(decoder: Decoder) -> None:
    one, two = generate(decoder, GRAMMAR, prompts([4]) * 2, max_tokens=20, sampling=Sampling(2.0))
    assert one != two


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7), Sampling(1.0, top_p=0.6), Sampling(1.5, top_k=4), Sampling(1.5, 6, 0.8)]
)
def test_draws_have_the_probabilities_of_the_formula(decoder: Decoder, sampling: Sampling) -> None:
    (prompt,) = prompts([6])
    logits = log_probabilities(decoder, prompt.embeddings)[-1] / sampling.temperature
    order = logits.argsort(descending=True)[: sampling.top_k]
    expected = torch.zeros(VOCABULARY, dtype=torch.float64).index_copy(0, order, logits[order].softmax(0))
    nucleus = order[: int((expected[order].cumsum(0) < sampling.top_p).sum()) + 1] if sampling.top_p < 1 else order
    outside = torch.ones(VOCABULARY, dtype=torch.bool)
    outside[nucleus] = False
    expected = expected.masked_fill(outside, 0)
    expected /= expected.sum()

    drawn = generate(decoder, GRAMMAR, [prompt] * 4000, max_tokens=1, sampling=sampling)
    counts = torch.tensor([token for (token,) in drawn]).bincount(minlength=VOCABULARY)
    assert counts[outside].sum() == 0
    assert len(nucleus) > 1
    assert (counts / 4000 - expected).abs().sum() / 2 < 0.04


@pytest.mark.parametrize("sampling", [Sampling(1e-4), Sampling(1.0, top_p=0.0), Sampling(1.0, top_k=1)])
def test_cold_or_narrow_draws_are_greedy(decoder: Decoder, sampling: Sampling) -> None:
    given = prompts([5, 1, 17])
    assert generate(decoder, GRAMMAR, given, 8, sampling=sampling) == generate(decoder, GRAMMAR, given, 8)


@pytest.mark.parametrize(
    ("options", "named"), [({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0")]
)
def test_senseless_sampling_is_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(**options)  # type: ignore[arg-type]


def test_nothing_to_generate(decoder: Decoder) -> None:
    assert generate(decoder, GRAMMAR, [], max_tokens=3) == []
    assert generate(decoder, GRAMMAR, prompts([2]), max_tokens=0) == [[]]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(decoder, GRAMMAR, prompts([2, 0]), max_tokens=3)


OPTIONS = [
    [[3], [4, 5], [6, 7, 8, 9]],
    [[1, 1, 1], [1, 1, 2]],
    [[10], [11], [12]],
    [],
    [[0, 19, 2, 3, 5, 8, 13]],
]


def scored_apart(decoder: Decoder, trunk: Passage, option: list[int]) -> float:
    read = torch.cat([trunk.embeddings, decoder.embed(torch.tensor(option))])
    return float(log_probabilities(decoder, read)[len(trunk) - 1 : -1].gather(1, torch.tensor(option)[:, None]).sum())


@pytest.mark.parametrize("tokens_per_pass", [1, 14, 30, 4096])
def test_scores_are_those_of_trunk_and_option_as_one_document(decoder: Decoder, tokens_per_pass: int) -> None:
    trunks = prompts([6, 9, 1, 3, 12])
    found = score_continuations(decoder, WORDS, trunks, OPTIONS, tokens_per_pass)
    for trunk, options, scores in zip(trunks, OPTIONS, found, strict=True):
        assert [score.tokens for score in scores] == [len(option) for option in options]
        expected = [scored_apart(decoder, trunk, option) for option in options]
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-5)


def test_single_precision_scores_do_not_depend_on_the_pass(decoder: Decoder) -> None:
    single = Decoder(CONFIG)
    single.load_state_dict(decoder.state_dict())
    trunks = [replace(trunk, embeddings=trunk.embeddings.float()) for trunk in prompts([6, 9, 1, 3, 12])]
    one, two = (score_continuations(single, WORDS, trunks, OPTIONS, tokens) for tokens in (10, 4096))
    for left, right in zip(one, two, strict=True):
        assert [score.logprob for score in left] == pytest.approx([score.logprob for score in right], abs=1e-5)


def test_a_pass_is_bounded_and_a_trunk_computed_once(decoder: Decoder) -> None:
    streams: list[int] = []
    hook = decoder.register_forward_pre_hook(lambda module, inputs: streams.append(len(inputs[0])))
    trunks = prompts([6, 9, 1, 3, 12])
    score_continuations(decoder, WORDS, trunks, OPTIONS, 4096)
    read = sum(len(option) - 1 for options in OPTIONS for option in options)
    assert streams == [6 + 9 + 1 + 12 + read]
    streams.clear()
    score_continuations(decoder, WORDS, trunks, OPTIONS, 14)
    hook.remove()
    assert streams == [6 + 4, 9 + 4 + 1, 12 + 6], "the last is longer than 14 on its own"


def test_the_probabilities_of_all_one_token_options_sum_to_one(decoder: Decoder) -> None:
    (scores,) = score_continuations(decoder, WORDS, prompts([6]), [[[token] for token in range(VOCABULARY)]])
    assert torch.tensor([score.logprob for score in scores]).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_empty_trunks_and_options_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="trunk 0 is empty"):
        score_continuations(decoder, WORDS, prompts([0]), [[[1]]])
    with pytest.raises(ValueError, match="option 1 is empty"):
        score_continuations(decoder, WORDS, prompts([2]), [[[1], []]])

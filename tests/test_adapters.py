from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm.encoders.adapters import MLP, AveragePool, ConvSubsample, PixelShuffle
from mm.encoders.base import Adapter, Grid

C, D = 12, 20

IMAGE_GRIDS: list[Grid] = [(5, 5), (3, 7), (5, 5), (1, 1), (2, 9)]
SPEECH_GRIDS: list[Grid] = [(50,), (1,), (7,), (50,), (8,)]

CASES: dict[str, tuple[Callable[[], Adapter], list[Grid]]] = {
    "mlp": (lambda: MLP(C, D), IMAGE_GRIDS),
    "linear": (lambda: MLP(C, D, layers=1), SPEECH_GRIDS),
    "mlp with norm": (lambda: MLP(C, D, hidden=7, norm=True), IMAGE_GRIDS),
    "average pool": (lambda: AveragePool(C, D, tokens=4), IMAGE_GRIDS),
    "average pool to 2 × 3": (lambda: AveragePool(C, D, tokens=[2, 3]), IMAGE_GRIDS),
    "average pool of speech": (lambda: AveragePool(C, D, tokens=10), SPEECH_GRIDS),
    "pixel shuffle": (lambda: PixelShuffle(C, D, factor=2), IMAGE_GRIDS),
    "pixel shuffle of speech": (lambda: PixelShuffle(C, D, factor=5, axes=1), SPEECH_GRIDS),
    "convolutions": (lambda: ConvSubsample(C, D, bottleneck=8), SPEECH_GRIDS),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Adapter, list[Grid]]:
    torch.manual_seed(0)
    build, grids = CASES[request.param]
    return build(), grids


def features_of(grids: list[Grid], width: int = C) -> Tensor:
    return torch.randn(sum(map(math.prod, grids)), width, generator=torch.Generator().manual_seed(1))


def test_length_is_the_number_of_embeddings(case: tuple[Adapter, list[Grid]]) -> None:
    adapter, grids = case
    for grid in grids:
        assert adapter(features_of([grid]), [grid]).shape == (adapter.length(grid), D)


def test_an_item_gives_the_same_alone_and_among_others(case: tuple[Adapter, list[Grid]]) -> None:
    adapter, grids = case
    features = features_of(grids)
    together = adapter(features, grids).split([adapter.length(grid) for grid in grids])
    for item, grid, given in zip(features.split([math.prod(grid) for grid in grids]), grids, together, strict=True):
        torch.testing.assert_close(given, adapter(item, [grid]), rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(case: tuple[Adapter, list[Grid]]) -> None:
    adapter, grids = case
    adapter(features_of(grids), grids).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_flops_are_those_that_torch_counts(case: tuple[Adapter, list[Grid]]) -> None:
    adapter, grids = case
    for grid in grids:
        with FlopCounterMode(display=False) as counter:
            adapter(features_of([grid]), [grid])
        assert adapter.flops(grid) == counter.get_total_flops()


def test_features_that_do_not_fit_their_grids_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 items promise 34 features and 33 came"):
        AveragePool(C, D, tokens=4)(features_of([(33, 1)]), [(5, 5), (3, 3)])


def test_the_projector_of_open_qwen2vl_has_its_published_size() -> None:
    adapter = AveragePool(1152, 1536, tokens=144)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 4_131_840
    assert adapter.length((27, 27)) == 144
    assert AveragePool(1152, 1536, tokens=729).length((27, 27)) == 729


def test_pooling_averages_the_features_of_each_cell() -> None:
    adapter = AveragePool(C, D, tokens=[2, 2], layers=1)
    features = features_of([(4, 6)])
    cells = features.view(2, 2, 2, 3, C).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(adapter(features, [(4, 6)]), adapter.feed_forward(cells))


def test_pooling_to_the_size_of_the_grid_changes_nothing() -> None:
    adapter = AveragePool(C, D, tokens=25)
    features = features_of([(5, 5)])
    torch.testing.assert_close(adapter(features, [(5, 5)]), adapter.feed_forward(features))


def test_a_number_of_tokens_that_is_no_square_is_an_error_for_pictures() -> None:
    with pytest.raises(ValueError, match=r"140 is no square number; give rows and columns"):
        AveragePool(C, D, tokens=140).length((27, 27))


def test_pixel_shuffle_joins_squares_row_by_row() -> None:
    """The reference is written out: (h a) (w b) c → h w (a b c)."""
    adapter = PixelShuffle(C, D, factor=2)
    block = features_of([(4, 6)]).view(4, 6, C)
    expected = torch.stack(
        [
            torch.cat([block[row, column], block[row, column + 1], block[row + 1, column], block[row + 1, column + 1]])
            for row in (0, 2)
            for column in (0, 2, 4)
        ]
    )
    torch.testing.assert_close(adapter.rearrange(block[None])[0], expected)


def test_pixel_shuffle_fills_odd_sides_with_zeros() -> None:
    adapter = PixelShuffle(C, D, factor=2)
    block = features_of([(3, 5)]).view(1, 3, 5, C)
    assert adapter.length((3, 5)) == 6
    torch.testing.assert_close(adapter.rearrange(block), adapter.rearrange(F.pad(block, (0, 0, 0, 1, 0, 1))))


def test_frames_of_speech_are_joined_in_time_order() -> None:
    adapter = PixelShuffle(C, D, factor=5, axes=1)
    frames = features_of([(10,)])
    torch.testing.assert_close(adapter.rearrange(frames[None])[0], frames.view(2, 5 * C))


def test_the_wrong_number_of_axes_is_an_error() -> None:
    with pytest.raises(ValueError, match="axes: 2 of the adapter, but the features have 1"):
        PixelShuffle(C, D).length((1500,))


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 1499, 1500])
def test_convolutions_give_the_published_number_of_frames(frames: int) -> None:
    expected = frames
    for _ in range(3):
        expected = math.floor((expected - 1) / 2 + 1)
    assert ConvSubsample(C, D).length((frames,)) == expected


def test_features_of_another_precision_keep_it() -> None:
    for build, grids in CASES.values():
        adapter = build().to(torch.float64)
        assert adapter(features_of(grids).double(), grids).dtype == torch.float64

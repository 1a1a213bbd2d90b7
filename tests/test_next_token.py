"""The sums that meters take from an objective, against a loop over the tokens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mm.objectives.next_token import weighted_sums
from mm.packing.batch import IGNORE
from mm.packing.materialise import MicroStep
from mm.sample import Modality
from mm.train.preview import planned
from mm.train.recipe import Recipe


def test_losses_are_summed_by_source_and_by_the_modality_of_the_label(recipe: Path) -> None:
    data = planned(Recipe.load(recipe))
    batch = data.materialiser()[MicroStep(0, (0, 1, 2, 3, -1))]
    labelled = [token for token, label in enumerate(batch.labels.tolist()) if label != IGNORE]
    nll = torch.rand(len(labelled), generator=torch.Generator().manual_seed(0))
    document, expected = batch.document_of_token(), defaultdict(lambda: [0.0, 0.0])
    for token, loss in zip(labelled, nll.tolist(), strict=True):
        weight, row = float(batch.weights[token]), batch.rows[document[token]]
        kind = Modality(int(batch.modality[token + 1]))
        for name in ("total", f"modality/{kind.label}", f"source/{data.names[int(row[0])]}"):
            expected[name][0] += weight * loss
            expected[name][1] += weight
    found = {name: [float(value) for value in pair] for name, pair in weighted_sums(batch, nll, data.names).items()}
    assert len(expected) > 4
    for name, pair in found.items():
        assert pair == pytest.approx(expected[name], rel=1e-6), name

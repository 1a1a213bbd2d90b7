"""Auxiliary routers learn to foresee what experts and layers choose, so that a trained decoder becomes causal.

In training experts choose among all tokens of a pack, later ones too. After it everything is frozen but the auxiliary
routers; each learns, token by token, by binary cross-entropy, whether it is chosen (Lin et al. 2024, arXiv 2407.21770,
section 2.4.1). Validation measures the next-token loss both ways: by auxiliary routers, as when generating, and as in
training, where the choice tells a token something of those that follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.configure import RecipeError
from mm.model.multimodal import MultimodalLM
from mm.model.trainable import Trainable
from mm.objectives.base import Examined, Objective, loss_sums
from mm.objectives.next_token import untaken_figures, untaken_sums, weighted_sums
from mm.packing.batch import Batch
from mm.packing.collate import Processor

CHOICE = "expert_choice/"


@dataclass(frozen=True)
class AuxiliaryRouters(Objective):
    """`objective:` of a recipe whose decoder has `experts.auxiliary` or `depth.auxiliary`, with all else frozen.

    L = Σ over routers, tokens and their choices of the binary cross-entropy / Σ tokens
    """

    name = total = "routers"

    def check(self, model: Trainable) -> None:
        if not isinstance(model, MultimodalLM) or not (model.decoder.config.couples and model.decoder.config.is_causal):
            raise RecipeError(
                "objective: auxiliary routers imitate experts or layers that choose tokens; the decoder needs "
                "experts.auxiliary=true where experts choose, and depth.auxiliary=true where it has depth routing"
            )

    def prepare(self, model: Trainable, processor: Processor, device: torch.device) -> None:
        assert isinstance(model, MultimodalLM)  # `check` has seen to it
        model.decoder.draws = False  # what is to be foreseen is the choice without noise

    def losses(self, sources: Sequence[str]) -> list[str]:
        return [self.total]

    def weights(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Tokens that are no padding."""
        return {self.name: float(sum(batch.real_tokens for batch in batches))}

    def loss(
        self, model: nn.Module, batch: Batch, denominators: Mapping[str, float], sources: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        predicted: Any = model(batch)
        total = torch.stack([loss for loss, *_ in predicted.reports.imitation]).sum()
        weight = torch.tensor(float(batch.real_tokens), dtype=torch.float64, device=total.device)
        return total / max(denominators[self.name], 1e-12), {self.total: (total.detach().double(), weight)}

    def examine(self, model: nn.Module, batch: Batch, sources: Sequence[str]) -> Examined:
        """Next-token losses by auxiliary routers and by choice, and how often the two agree."""
        assert isinstance(model, MultimodalLM)
        causal = model(batch)
        with model.decoder.routed("choice"):
            chosen = model(batch)
        agreed = torch.stack([agreed for _, agreed, _ in chosen.reports.imitation]).sum().double()
        made = torch.tensor(sum(number for *_, number in chosen.reports.imitation), dtype=torch.float64)
        by_choice = weighted_sums(batch, chosen.nll, sources)
        return Examined(
            loss_sums(weighted_sums(batch, causal.nll, sources))
            | {f"{CHOICE}{name}": sums for name, sums in loss_sums(by_choice).items()}
            | {"agreement": torch.stack([agreed.cpu(), made])}
            | untaken_sums(causal.reports.untaken)
        )

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        agreed, made = sums["agreement"].tolist()
        of_choice = {name.removeprefix(CHOICE): pair for name, pair in sums.items() if name.startswith(CHOICE)}
        by_choice = {f"{CHOICE}{name}": figure for name, figure in super().figures(of_choice).items()}
        agreement = {"router_agreement": agreed / made if made else 1.0}
        return super().figures(sums) | by_choice | agreement | untaken_figures(sums)

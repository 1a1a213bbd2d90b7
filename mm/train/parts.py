"""The parts of a model that are trained or frozen, and cost, each on its own."""

from __future__ import annotations

from torch import nn

from mm.model.multimodal import MultimodalLM


def trained_parts(model: MultimodalLM) -> dict[str, bool]:
    """Whether any parameter trains, by part as in `MultimodalLM.flops`."""

    def trains(module: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in module.parameters())

    parts = {f"encoders.{name}": trains(module) for name, module in model.encoders.items()}
    parts |= {f"adapters.{name}": trains(module) for name, module in model.adapters.items()}
    return parts | {"decoder": trains(model.decoder), "head": model.decoder.head_weight.requires_grad}

"""Activation checkpointing: what of a block is kept from its forward to its backward.

    none        all that autograd asks for
    selective   outputs of matrix products and of attention; norms, activations, rotations are computed again
    full        the input of the block; the whole block is computed again        (Chen et al. 2016, arXiv 1604.06174)

Losses and gradients are the same to the last bit where the kernels are deterministic. A block's ``forward`` is wrapped
and not the block, so no parameter gets another name.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import varlen  # noqa: F401 (registers the operator that is named below)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mm.model.experts import AuxiliaryRouter

Activations = Literal["none", "selective", "full"]

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}
"""Operators whose output `selective` keeps: those that cost arithmetic. What only moves memory is cheap to repeat."""


def checkpoint_blocks(blocks: Iterable[nn.Module], activations: Activations) -> None:
    """Let every block keep only what `activations` says, in place.

    Random numbers that a block draws (dropout) are the same when it is computed again. A block in which only auxiliary
    routers train keeps nothing but what these ask for, and stays as it is.
    """
    if activations == "none":
        return
    options = {"context_fn": _keep_products} if activations == "selective" else {}
    for block in blocks:
        if _only_foresees(block):
            continue
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def _only_foresees(block: nn.Module) -> bool:
    """Whether auxiliary routers train in a block and nothing else."""
    routers = [module for module in block.modules() if isinstance(module, AuxiliaryRouter)]
    theirs = {parameter for router in routers for parameter in router.parameters() if parameter.requires_grad}
    return bool(theirs) and theirs == {parameter for parameter in block.parameters() if parameter.requires_grad}


def _keep_products() -> Any:
    """Contexts of the forward and of its repetition."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: SelectiveCheckpointContext, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

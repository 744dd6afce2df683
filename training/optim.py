"""AdamW as GPT-2 trainers use it: decay on matrices, none on biases and LayerNorms."""

import torch
from torch import nn

from training.recipes import Recipe


def configure_adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in torch's fused form, one pass over each parameter on CPU and CUDA alike.

    Parameters of two or more dimensions decay, the others do not. The tied embedding is one
    parameter and decays once. Padding rows of the embedding have weight and gradient 0, for which
    the update is exactly 0 / (0 + eps) = 0.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate(0),
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )

"""`FeatureRanker`: a small ranker on features, cheap enough to serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel


class FeatureRankerConfig(PretrainedConfig):
    """Configuration of `FeatureRanker`.

    Args:
        num_features: F.
        hidden_sizes: widths of the hidden layers; empty = a linear ranker.
        dropout: after every hidden layer, while training.
    """

    model_type = "pile_fast_feature_ranker"

    def __init__(self, num_features: int = 46, hidden_sizes: Sequence[int] = (64, 64), dropout: float = 0.1, **kwargs: Any):
        self.num_features = num_features
        self.hidden_sizes = list(hidden_sizes)
        self.dropout = dropout
        super().__init__(**kwargs)


def no_loss_of_its_own(labels: object | None) -> None:
    """Raises ValueError if a student's forward is given labels, which it would ignore silently."""
    if labels is not None:
        raise ValueError(
            "labels: a student gives logits and has no loss of its own; use pile_fast.trainer.PileTrainer, or give your "
            "Trainer compute_loss_func=pile_fast.trainer.pile_compute_loss_func(...)"
        )


class FeatureRanker(PreTrainedModel):
    """A multi-layer perceptron on a document's features, standardised by statistics that are saved with the weights.

    >>> model = FeatureRanker(FeatureRankerConfig(num_features=3, hidden_sizes=(8,)))
    >>> model(torch.randn(5, 3)).shape
    torch.Size([5])
    """

    config_class = FeatureRankerConfig
    base_model_prefix = "ranker"
    main_input_name = "features"
    config: FeatureRankerConfig
    mean: Tensor
    scale: Tensor

    def __init__(self, config: FeatureRankerConfig):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.num_features))
        self.register_buffer("scale", torch.ones(config.num_features))
        layers, width = [], config.num_features
        for size in config.hidden_sizes:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # PyTorch's own, not the library's normal(0, 0.02), which starts all logits at 0
            module.reset_parameters()

    @torch.no_grad()
    def fit_standardization(self, features: Tensor) -> FeatureRanker:
        """Take mean and deviation from the training documents' features (D, F); a constant feature becomes 0."""
        if features.dim() != 2 or features.shape[1] != self.config.num_features or features.shape[0] == 0:
            raise ValueError(f"features: expected (D, F) = (D, {self.config.num_features}), D > 0, got {tuple(features.shape)}")
        features = features.to(torch.float64)
        if not features.isfinite().all():
            document, feature = (~features.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"features[{document}, {feature}]: expected a finite number, got {features[document, feature]}")
        deviation = features.std(0, correction=0)
        # By its extremes: the rounding of a constant's mean must not be blown up to unit scale.
        varies = features.amax(0) > features.amin(0)
        self.mean.copy_(features.mean(0))
        self.scale.copy_(torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0))
        return self

    def forward(self, features: Tensor, labels: object | None = None) -> Tensor:
        """Logits (D,) of documents' features (D, F).

        Args:
            features: (D, F).
            labels: only named, so that a `Trainer` with a `compute_loss_func` knows what to hand to it: it evaluates the
                loss of those models alone whose forward names labels.
        """
        no_loss_of_its_own(labels)
        if features.dim() != 2 or features.shape[1] != self.config.num_features:
            raise ValueError(f"features: expected (D, F) = (D, {self.config.num_features}), got {tuple(features.shape)}")
        return self.layers((features - self.mean) * self.scale).squeeze(-1)


AutoConfig.register(FeatureRankerConfig.model_type, FeatureRankerConfig, exist_ok=True)
AutoModel.register(FeatureRankerConfig, FeatureRanker, exist_ok=True)

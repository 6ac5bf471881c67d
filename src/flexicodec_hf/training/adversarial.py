"""The game between a model that makes waveforms and the discriminators that judge them."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .discriminators import Discriminators
from .loop import TrainedModel
from .losses import adversarial_loss, discriminator_loss, feature_matching_loss


ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 1.0, 2.0


def add_adversarial_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that `make_adversary` reads."""
    parser.add_argument(
        "--discriminator-start",
        type=int,
        default=0,
        metavar="STEP",
        help="without discriminators before (default: %(default)s)",
    )
    parser.add_argument(
        "--discriminator-size", type=int, default=32, help="channels of their first layers (default: %(default)s)"
    )


def make_adversary(args: argparse.Namespace, accelerator: Accelerator) -> Adversary | None:
    """The discriminators of a training that comes to need them, with the options of `add_adversarial_arguments`."""
    if args.discriminator_start >= args.max_steps:
        return None
    return Adversary(Discriminators(size=args.discriminator_size), args, accelerator)


class Adversary:
    """
    Discriminators in training.

    Args:
        discriminators: Give scores and features, as [`Discriminators`] does.
        args: With the options of `add_loop_arguments`.
        accelerator: Prepares them.
    """

    def __init__(self, discriminators: nn.Module, args: argparse.Namespace, accelerator: Accelerator):
        self.trained = TrainedModel(discriminators, args, accelerator)

    def train(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the discriminators with waveforms `(batch_size, 1, num_samples)`. Returns their loss."""
        scores, _ = self.trained.model(torch.cat([real, fake.detach()]))
        halves = [score.chunk(2) for score in scores]
        loss = discriminator_loss([half[0] for half in halves], [half[1] for half in halves])
        self.trained.update(loss)
        return loss

    def judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial and the feature matching loss of `fake`."""
        discriminators = self.trained.unwrapped.requires_grad_(False)
        scores, features = discriminators(torch.cat([real, fake]))
        discriminators.requires_grad_(True)
        halves = [[feature.chunk(2) for feature in layers] for layers in features]
        matching = feature_matching_loss(
            [[half[0] for half in layers] for layers in halves], [[half[1] for half in layers] for layers in halves]
        )
        return adversarial_loss([score.chunk(2)[1] for score in scores]), matching


__all__ = ["ADVERSARIAL_WEIGHT", "FEATURE_WEIGHT", "Adversary", "add_adversarial_arguments", "make_adversary"]

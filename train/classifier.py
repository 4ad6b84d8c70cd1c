"""Stage "classifier": the judge of the tiny world, trained on real clips alone.

It names digit and colour from single frames (averaged over the clip) and direction from pairs of neighbouring
frames. It sees the digit without its trail: motion that only the trail claims does not count.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.codec import LinearCodec
from train.config import TrainConfig
from train.optimizers import warmup_cosine
from train.stage import Stage, step_generator
from train.tiny_world import COLOURS, DIGITS, DIRECTIONS, TinyWorld, without_trail

FRAMES = 2  # frames of a clip seen in training: one pair
FEATURES = 128


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Classifier(nn.Module):
    """Frames float32 [B, F, 3, 32, 32] in 0..1 -> logits of digit, colour and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            _conv(3, 32, 2), _conv(32, 64), _conv(64, 96, 2), _conv(96, 128), _conv(128, FEATURES)
        )
        self.move = nn.Sequential(_conv(6, 32, 2), _conv(32, 64), _conv(64, 64, 2))
        self.digit = nn.Linear(2 * FEATURES, len(DIGITS))
        self.colour = nn.Linear(2 * FEATURES, len(COLOURS))
        self.direction = nn.Linear(64, len(DIRECTIONS))

    def features(self, frames: Tensor) -> Tensor:
        """Appearance of a clip, [B, 2 * FEATURES]: mean and maximum over places, mean over frames."""
        x = self.look(without_trail(frames).flatten(0, 1) - 0.2)
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return x.view(*frames.shape[:2], -1).mean(dim=1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        look = self.features(frames)
        frames = without_trail(frames)
        pairs = torch.cat([frames[:, :-1], frames[:, 1:]], dim=2) - 0.2
        move = (
            self.move(pairs.flatten(0, 1)).mean(dim=(2, 3)).view(*pairs.shape[:2], -1).mean(dim=1)
        )
        return self.digit(look), self.colour(look), self.direction(move)


def augment(frames: Tensor, codec: LinearCodec, generator: torch.Generator) -> Tensor:
    """Small turns, sizes and shears of whole clips, sometimes the codec's losses, sometimes noise."""
    batch = len(frames)

    def spread(width: float) -> Tensor:
        return width * (2 * torch.rand(batch, generator=generator) - 1)

    angle, scale, shear = spread(0.2), 1 + spread(0.12), spread(0.12)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    zero = torch.zeros(batch)
    rows = [torch.stack([cos, -sin + shear, zero], 1), torch.stack([sin, cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [batch, 3, *frames.shape[3:]], align_corners=False)
    flat = F.grid_sample(frames.flatten(1, 2), grid, padding_mode="border", align_corners=False)
    frames = flat.view_as(frames)
    coded = codec.decode(codec.encode(frames))
    use = torch.rand(batch, generator=generator).view(-1, 1, 1, 1, 1)
    frames = torch.where(use < 0.5, coded, frames)
    noise = torch.randn(frames.shape, generator=generator) * 0.08
    return torch.where((use > 0.25) & (use < 0.75), frames + noise, frames)


class ClassifierStage(Stage):
    """Cross-entropy on digit, colour and direction of augmented real clips (training glyphs)."""

    name = "classifier"

    def __init__(self, config: TrainConfig, seed: int, codec: LinearCodec) -> None:
        self.config, self.seed, self.codec = config, seed, codec
        self.steps = config.classifier.steps
        torch.manual_seed(seed)
        self.model = Classifier()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.classifier.lr, weight_decay=0.05
        )
        self.world = TinyWorld("train")

    def step(self, index: int) -> dict[str, float]:
        settings = self.config.classifier
        generator = step_generator(self.seed, self.name, index)
        clips = self.world.draw(settings.batch, FRAMES, generator)
        logits = self.model(augment(clips.frames, self.codec, generator))
        targets = (clips.digit, clips.colour, clips.direction)
        losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)]
        loss = losses[0] + losses[1] + losses[2]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * warmup_cosine(index, self.steps, min(30, self.steps))
        self.optimizer.step()
        return {"loss": loss.item(), "digit": losses[0].item(), "direction": losses[2].item()}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

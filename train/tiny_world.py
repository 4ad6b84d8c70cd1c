"""The tiny world: a coloured handwritten digit moving through a framed arena, and its prompts.

The digits are the 1,797 real ones bundled with scikit-learn (UCI optical recognition of handwritten
digits), smoothly enlarged. A digit sets out in the direction that its prompt names, from the side that gives
it room to do so for a whole clip of the teacher, and bounces off the frame for ever after. It leaves a dim
trail behind, so that a single frame already tells where it is going.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_rt.errors import ConfigError

CANVAS = 32
GLYPH = 12
BORDER = 1
ROOM = CANVAS - 2 * BORDER - GLYPH  # pixels that a digit can travel along an axis
SPREAD = 7  # of start positions along a moving axis: no bounce within ROOM - SPREAD + 1 frames
PERIOD = 2 * ROOM  # frames (at one pixel a frame) until a digit is back where it was
TRAIL = 0.4  # brightness of the trail just behind the digit
TRAIL_DECAY = 0.85  # of the trail, a frame
TRAIL_FRAMES = 16  # after which hardly anything of it can be seen
FPS = 16
TEST_EVERY = 6  # every sixth glyph is held out of all training

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1.00, 0.26, 0.24),
    "yellow": (1.00, 0.83, 0.20),
    "green": (0.26, 0.85, 0.38),
    "cyan": (0.20, 0.82, 0.94),
    "blue": (0.33, 0.42, 1.00),
    "pink": (1.00, 0.45, 0.78),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUND = (0.055, 0.063, 0.110)
FRAME = (0.20, 0.22, 0.33)
DIRECTIONS = {
    "up": (-1, 0),
    "up and right": (-1, 1),
    "right": (0, 1),
    "down and right": (1, 1),
    "down": (1, 0),
    "down and left": (1, -1),
    "left": (0, -1),
    "up and left": (-1, -1),
}
# What the negative prompt of guidance names: all but the digit. Guidance away from an empty prompt also
# strengthens all that is coloured, trails above all; trails of digits moving along a row became streaks.
NEGATIVE_NAMES = (False, True, True)
FILLERS = ("a", "an", "the", "digit", "number", "moving", "going", "and", "to", "towards")
WORDS = (*DIGITS, *COLOURS, "up", "down", "left", "right")


def vocabulary() -> dict[str, int]:
    """Word -> token id; 0 pads and is also the id of filler words, which say nothing."""
    words = {word: i + 1 for i, word in enumerate(WORDS)}
    numerals = {str(i): words[name] for i, name in enumerate(DIGITS)}
    return words | numerals | dict.fromkeys(FILLERS, 0)


def prompt_text(digit: int, colour: int, direction: int) -> str:
    """The English prompt of a clip: "a red three moving up and left"."""
    colour_name, direction_name = list(COLOURS)[colour], list(DIRECTIONS)[direction]
    return f"a {colour_name} {DIGITS[digit]} moving {direction_name}"


@dataclass(frozen=True)
class Clips:
    """A batch of labelled clips.

    Attributes:
        frames: float32 [B, F, 3, 32, 32] in 0..1.
        digit, colour, direction: int64 [B].
    """

    frames: Tensor
    digit: Tensor
    colour: Tensor
    direction: Tensor

    def prompts(self) -> list[str]:
        labels = torch.stack([self.digit, self.colour, self.direction], dim=1).tolist()
        return [prompt_text(*row) for row in labels]


def load_glyphs() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All digit images, enlarged to float32 [1797, GLYPH, GLYPH] in 0..1, and their classes."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    factor = GLYPH / 8
    large = zoom(
        digits.images / 16.0, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True
    )
    x = np.clip((large - 0.12) / 0.7, 0.0, 1.0)
    return (x * x * (3 - 2 * x)).astype(np.float32), digits.target.astype(np.int64)


class TinyWorld:
    """Draws clips. `split` is "train" or "test": the two share no glyph."""

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise ConfigError(f"tiny world: split must be train or test, found {split!r}")
        glyphs, classes = load_glyphs()
        held_out = np.arange(len(glyphs)) % TEST_EVERY == 0
        keep = held_out if split == "test" else ~held_out
        canvas = np.zeros((int(keep.sum()), CANVAS, CANVAS), dtype=np.float32)
        canvas[:, :GLYPH, :GLYPH] = glyphs[keep]
        self.glyphs = torch.from_numpy(canvas)
        self.classes = torch.from_numpy(classes[keep])
        self.colours = torch.tensor(list(COLOURS.values()))
        self.velocities = torch.tensor(list(DIRECTIONS.values()))
        empty = torch.tensor(FRAME).view(3, 1, 1).repeat(1, CANVAS, CANVAS)
        inner = slice(BORDER, CANVAS - BORDER)
        empty[:, inner, inner] = torch.tensor(BACKGROUND).view(3, 1, 1)
        self.empty = empty
        self.inside = torch.zeros(CANVAS, CANVAS)
        self.inside[inner, inner] = 1

    def draw(
        self,
        count: int,
        frames: int,
        generator: torch.Generator,
        labels: Tensor | None = None,
        begin: Tensor | None = None,
    ) -> Clips:
        """Draw random clips.

        Args:
            count: of clips.
            frames: of a clip.
            generator: of all chances.
            labels: int64 [count, 3] (digit, colour, direction); None = random.
            begin: int64 [count], the frame of its life that each clip begins with; None = 0.
        """

        def randint(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        if labels is None:
            glyph = randint(len(self.glyphs))
            colour, direction = randint(len(COLOURS)), randint(len(DIRECTIONS))
        else:
            by_class = [torch.nonzero(self.classes == c).flatten() for c in range(len(DIGITS))]
            pick = torch.rand(count, generator=generator)
            glyph = torch.stack(
                [
                    by_class[c][int(p * len(by_class[c]))]
                    for c, p in zip(labels[:, 0], pick, strict=True)
                ]
            )
            colour, direction = labels[:, 1], labels[:, 2]
        near = torch.stack([randint(SPREAD + 1), randint(SPREAD + 1)], dim=1)
        anywhere = torch.stack([randint(ROOM + 1), randint(ROOM + 1)], dim=1)
        velocity = self.velocities[direction]
        start = torch.where(velocity > 0, near, torch.where(velocity < 0, ROOM - near, anywhere))
        time = torch.arange(-TRAIL_FRAMES, frames) + (0 if begin is None else begin[:, None])
        time = time.expand(count, -1)[..., None]
        straight = start[:, None] + time * velocity[:, None]
        folded = torch.minimum(straight % PERIOD, PERIOD - straight % PERIOD)
        place = BORDER + torch.where(time < 0, straight, folded)  # [B, F, 2]
        nothing = CANVAS - 1  # an empty row and column of the glyph pictures
        offset = torch.arange(CANVAS) - place[..., None]  # [B, F, 2, 32]
        rows, columns = torch.where(offset < 0, nothing, offset.clamp_max(nothing)).unbind(dim=2)
        mask = self.glyphs[glyph][:, None].expand(-1, place.shape[1], -1, -1)
        mask = mask.gather(2, rows[..., :, None].expand(-1, -1, -1, CANVAS))
        mask = mask.gather(3, columns[..., None, :].expand(-1, -1, CANVAS, -1))
        mask = self.inside * with_trail(mask)[:, TRAIL_FRAMES:, None]
        paint = self.colours[colour].view(-1, 1, 3, 1, 1)
        pictures = self.empty + mask * (paint - self.empty)
        return Clips(pictures, self.classes[glyph], colour, direction)


def with_trail(mask: Tensor) -> Tensor:
    """Add to every frame of masks [B, F, H, W] the fading trail of those before."""
    trail = TRAIL * mask[:, 0]
    frames = []
    for frame in mask.unbind(dim=1):
        frames.append(torch.maximum(frame, trail))
        trail = torch.maximum(TRAIL * frame, TRAIL_DECAY * trail)
    return torch.stack(frames, dim=1)


def without_trail(frames: Tensor) -> Tensor:
    """Frames [B, F, 3, H, W] with all that is dim turned black: neither trail nor frame, only the digit."""
    brightest = frames.amax(dim=2, keepdim=True)
    return frames * ((brightest - 0.5) / 0.3).clamp(0, 1)


def random_labels(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, 3]: digit, colour, direction, each uniform."""
    sizes = (len(DIGITS), len(COLOURS), len(DIRECTIONS))
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], dim=1)


def label_tokens(labels: Tensor, text_len: int, keep: Tensor | None = None) -> Tensor:
    """Token ids of the prompts of `labels`, as the runtime's tokenizer gives them for `prompt_text`.

    Args:
        labels: int64 [B, 3]: digit, colour, direction.
        text_len: columns of the result.
        keep: bool [B, 3]; attributes that the prompt names. None = all.

    Returns:
        int64 [B, text_len], zero-padded.
    """
    words = vocabulary()
    colours = torch.tensor([words[name] for name in COLOURS])
    digits = torch.tensor([words[name] for name in DIGITS])
    pairs = [[words[w] for w in name.split() if w != "and"] for name in DIRECTIONS]
    directions = torch.tensor([(pair + [0])[:2] for pair in pairs])
    tokens = torch.zeros(len(labels), text_len, dtype=torch.long)
    tokens[:, 0] = colours[labels[:, 1]]
    tokens[:, 1] = digits[labels[:, 0]]
    tokens[:, 2:4] = directions[labels[:, 2]]
    if keep is not None:
        tokens[:, 0] *= keep[:, 1]
        tokens[:, 1] *= keep[:, 0]
        tokens[:, 2:4] *= keep[:, 2:]
    return tokens

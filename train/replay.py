"""The student's last clips, which the critic may see again."""

from __future__ import annotations

import torch
from torch import Tensor

REPLAY = 8  # batches


class Replay:
    """The newest batches of clips with their prompts, in buffers of a fixed size."""

    def __init__(self, clips: tuple[int, ...], contexts: tuple[int, ...]) -> None:
        """Room for REPLAY batches; the shapes are of one: [B, F, C, h, w] and [B, tokens, text_dim]."""
        self.clips = torch.zeros(REPLAY, *clips, dtype=torch.bfloat16)
        self.contexts = torch.zeros(REPLAY, *contexts)
        self.added = torch.zeros((), dtype=torch.int64)

    def __len__(self) -> int:
        return min(int(self.added), REPLAY)

    def append(self, clip: Tensor, context: Tensor) -> None:
        """Add a batch; the oldest gives way."""
        slot = int(self.added) % REPLAY
        self.clips[slot] = clip
        self.contexts[slot] = context
        self.added += 1

    def batch(self, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Clips (float32) and prompts of batch `index`; 0 is the oldest."""
        slot = (int(self.added) - len(self) + index) % REPLAY
        return self.clips[slot].to(device).float(), self.contexts[slot].to(device)

    def state(self) -> dict[str, Tensor]:
        return {"clips": self.clips, "contexts": self.contexts, "added": self.added}

    def load(self, state: dict[str, Tensor]) -> None:
        self.clips, self.contexts, self.added = (state[k] for k in ("clips", "contexts", "added"))

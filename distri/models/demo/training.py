"""What the three training stages share: a resumable loop with atomic checkpoints.

Invariant: a stage's state on disk is always whole. It is written beside the old one and renamed over it, so a
killed run loses at most `SAVE_EVERY_S` seconds.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

SAVE_EVERY_S = 60.0
LONGEST_STEP_S = 10.0
"""What one update counts for at most: a process that was suspended has not trained meanwhile."""


def save_atomically(state: object, path: Path) -> None:
    """Write `state` with torch.save, then rename it into place."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def scheduled_rate(progress: float, peak: float, warm_up: float = 0.02, cool_down: float = 0.3) -> float:
    """Learning rate at `progress` (0..1): up to `peak` in a line, flat, and down in a line over the last part."""
    if progress < warm_up:
        return peak * (progress + 1e-3) / warm_up
    return peak * max(0.02, min(1.0, (1 - progress) / cool_down))


class Stage:
    """One stage's loop: modules, optimiser and clock. Time is what is scheduled, so a stage ends when it should.

    `seconds` is the stage's whole length over all resumptions. `step` returns one batch's loss, given the progress.
    """

    def __init__(self, path: Path, modules: dict[str, nn.Module], rate: float, seconds: float) -> None:
        self.path, self.modules, self.rate, self.seconds = path, modules, rate, seconds
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.parameters = parameters
        self.optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.spent_s, self.num_steps = 0.0, 0
        self.peers = dist.get_world_size() if dist.is_initialized() else 1
        self.leads = self.peers == 1 or dist.get_rank() == 0
        if path.exists():
            self._load(torch.load(path, weights_only=True))

    def _load(self, state: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.spent_s, self.num_steps = state["spent_s"], state["num_steps"]

    def save(self) -> None:
        """Write the whole state, atomically."""
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        state = {"modules": modules, "optimiser": self.optimiser.state_dict()}
        save_atomically(state | {"spent_s": self.spent_s, "num_steps": self.num_steps}, self.path)

    @property
    def progress(self) -> float:
        """Share of the stage's time that is spent, 0..1."""
        return self.spent_s / self.seconds

    def run(self, step: Callable[[float], Tensor], after: Callable[[], None] | None = None) -> None:
        """Optimise until the stage's time is spent; `after` is called behind every update."""
        saved_s, mean_loss = self.spent_s, 0.0
        bar = tqdm(
            total=int(self.seconds),
            initial=int(self.spent_s),
            unit="s",
            desc=self.path.stem,
            mininterval=5.0,
            disable=not self.leads,
        )
        start = time.monotonic()
        while self.spent_s < self.seconds:
            for group in self.optimiser.param_groups:
                group["lr"] = scheduled_rate(self.progress, self.rate)
            loss = step(self.progress)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            now = time.monotonic()
            self.spent_s += self._agree(min(now - start, LONGEST_STEP_S))
            start = now
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            if after is not None:
                after()
            self.num_steps += 1
            mean_loss += (loss.item() - mean_loss) / min(self.num_steps, 50)
            bar.update(int(self.spent_s) - bar.n)
            bar.set_postfix(step=self.num_steps, loss=f"{mean_loss:.4f}", refresh=False)
            if self.leads and self.spent_s - saved_s > SAVE_EVERY_S:
                self.save()
                saved_s = self.spent_s
        bar.close()
        if self.leads:
            self.save()

    def _agree(self, elapsed_s: float) -> float:
        """Average the gradients over the peers, and the time of the step, so that all stop together."""
        if self.peers == 1:
            return elapsed_s
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([elapsed_s])])
        dist.all_reduce(flat)
        flat /= self.peers
        parts = torch.split(flat[:-1], [p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return float(flat[-1])

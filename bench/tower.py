"""How fast the tower learns, and how near that is to what the memory allows.

    .venv/bin/python bench/tower.py [--customers 20000] [--steps 50] [--device cuda]

The limit: the bytes that a step cannot do without (weights, gradients and Adam's two moments once
through; the content of the articles it meets; the vectors and scores, there and back), at the speed
of a plain copy measured in the same run. Look at the share; the seconds are this machine's.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from hm_reco.data.history import History, generate_history
from hm_reco.retrieval.two_tower import (
    TowerTrainer,
    TwoTower,
    TwoTowerSettings,
    build_interactions,
    build_vocabulary,
)

PURCHASES = 31_788_324  # of H&M's two years: one pass through all of them
FLOAT = 4  # bytes


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device, megabytes: int = 512, repeat: int = 10) -> float:
    """Bytes a second, read and written by a copy that no cache holds: the best of some."""
    source = torch.ones(megabytes * 2**20 // FLOAT, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(repeat):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() * FLOAT / min(seconds)


def least_bytes(learner: TowerTrainer, index: Tensor) -> dict[str, int]:
    """What a step on the examples `index` has to read and write, by what it is."""
    settings, rows = learner.model.settings, learner.interactions
    weights = sum(weight.numel() for weight in learner.model.parameters())
    back = (
        rows.day_start[index].unsqueeze(1)
        - 1
        - torch.arange(settings.history_length, device=index.device)
    )
    seen = rows.article[back.clamp_min(0)].flatten()
    asked = int(torch.unique(rows.article[index]).numel()) + settings.sampled_negatives
    met = (
        int(torch.unique(torch.cat([seen, rows.article[index]])).numel())
        + settings.sampled_negatives
    )
    content = learner.loss.content.words[0].nbytes + learner.loss.content.codes[0].nbytes
    vectors = (met + seen.numel() + len(index)) * settings.width * FLOAT
    return {
        "weights, gradients, moments": 8 * weights * FLOAT,  # four read, four written
        "content of articles": met * content,
        "vectors, there and back": 4 * vectors,
        "scores, there and back": 4 * len(index) * asked * FLOAT,
    }


def open_learner(history: History, device: torch.device) -> TowerTrainer:
    """A fresh tower with all the purchases of a history."""
    tower = TwoTower(build_vocabulary(history.articles), TwoTowerSettings())
    return TowerTrainer(tower, history, build_interactions(history), device)


def learn(learner: TowerTrainer, steps: int) -> tuple[float, list[float], Tensor]:
    """Seconds of `steps` steps after a few to warm up, their losses, and the last examples."""
    size, draw = len(learner.interactions.article), torch.Generator().manual_seed(0)
    batch = learner.model.settings.batch_size
    batches = [torch.randint(size, (batch,), generator=draw) for _ in range(steps + 5)]
    moved = [index.to(learner.device) for index in batches]
    for index in moved[:5]:
        learner.training_step(index)
    wait(learner.device)
    started = time.perf_counter()
    losses = [learner.training_step(index) for index in moved[5:]]
    wait(learner.device)
    return time.perf_counter() - started, torch.stack(losses).tolist(), moved[-1]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--customers", type=int, default=20_000, help="size of the synthetic data set"
    )
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(usual))
    asked = parser.parse_args()
    learner = open_learner(generate_history(asked.customers), asked.device)
    seconds, losses, index = learn(learner, asked.steps)
    examples = asked.steps * learner.model.settings.batch_size / seconds
    speed, parts = bandwidth(asked.device), least_bytes(learner, index)
    print(
        f"{asked.device}: {len(learner.interactions.article):,} purchases, batches of {len(index):,}"
    )
    print(
        f"loss of the first and last steps: {np.mean(losses[:5]):.2f}, {np.mean(losses[-5:]):.2f}"
    )
    print(f"\n{examples:,.0f} examples/s; {PURCHASES:,} would take {PURCHASES / examples:,.0f} s")
    for name, size in parts.items():
        print(f"  {name:<28}{size / 2**20:>8.1f} MiB a step")
    share = sum(parts.values()) / speed / (seconds / asked.steps)
    print(f"{share:.1%} of the limit by memory, which copies {speed / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()

"""Training speed of the two-tower model, compared with the limit by memory bandwidth.

    .venv/bin/python bench/two_tower.py [--customers 20000] [--steps 50] [--device cuda]

The limit: the minimal bytes of a step (weights, gradients and Adam's two moments, read and written
once; content of its articles; vectors and scores, forward and backward), at the bandwidth
of a copy measured in the same run. Compare the share; the seconds depend on the machine.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from hm_reco.data.history import History, generate_history
from hm_reco.retrieval.tower_training import TowerTrainer, build_interactions
from hm_reco.retrieval.two_tower import TwoTower, TwoTowerSettings, build_vocabulary

PURCHASES = 31_788_324  # of H&M's two years: one pass through all of them
FLOAT = 4  # bytes


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_bandwidth(device: torch.device, megabytes: int = 512, repeat: int = 10) -> float:
    """Bytes per second, read and written, of a copy larger than the caches: the best run."""
    source = torch.ones(megabytes * 2**20 // FLOAT, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(repeat):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() * FLOAT / min(seconds)


def compute_min_bytes(trainer: TowerTrainer, index: Tensor) -> dict[str, int]:
    """Minimal bytes that a step on the examples `index` reads and writes, by purpose."""
    settings, rows = trainer.model.settings, trainer.interactions
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    positions = (
        rows.day_start[index].unsqueeze(1)
        - 1
        - torch.arange(settings.history_length, device=index.device)
    )
    histories = rows.article[positions.clamp_min(0)].flatten()
    n_scored = int(torch.unique(rows.article[index]).numel()) + settings.sampled_negatives
    n_articles = (
        int(torch.unique(torch.cat([histories, rows.article[index]])).numel())
        + settings.sampled_negatives
    )
    content = trainer.loss.content.words[0].nbytes + trainer.loss.content.codes[0].nbytes
    vectors = (n_articles + histories.numel() + len(index)) * settings.width * FLOAT
    return {
        "weights, gradients, moments": 8 * weights * FLOAT,  # four read, four written
        "content of articles": n_articles * content,
        "vectors, forward and backward": 4 * vectors,
        "scores, forward and backward": 4 * len(index) * n_scored * FLOAT,
    }


def build_trainer(history: History, device: torch.device) -> TowerTrainer:
    """A trainer of a new model on all purchases of a history."""
    two_tower = TwoTower(build_vocabulary(history.articles), TwoTowerSettings())
    return TowerTrainer(two_tower, history, build_interactions(history), device)


def run_steps(trainer: TowerTrainer, steps: int) -> tuple[float, list[float], Tensor]:
    """Seconds of `steps` steps after a few to warm up, their losses, and the last examples."""
    size, generator = len(trainer.interactions.article), torch.Generator().manual_seed(0)
    batch = trainer.model.settings.batch_size
    batches = [torch.randint(size, (batch,), generator=generator) for _ in range(steps + 5)]
    batches_on_device = [index.to(trainer.device) for index in batches]
    for index in batches_on_device[:5]:
        trainer.training_step(index)
    synchronize(trainer.device)
    started = time.perf_counter()
    losses = [trainer.training_step(index) for index in batches_on_device[5:]]
    synchronize(trainer.device)
    return time.perf_counter() - started, torch.stack(losses).tolist(), batches_on_device[-1]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--customers", type=int, default=20_000, help="size of the synthetic data set"
    )
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    options = parser.parse_args()
    trainer = build_trainer(generate_history(options.customers), options.device)
    seconds, losses, index = run_steps(trainer, options.steps)
    examples = options.steps * trainer.model.settings.batch_size / seconds
    speed, parts = measure_bandwidth(options.device), compute_min_bytes(trainer, index)
    print(
        f"{options.device}: {len(trainer.interactions.article):,} purchases, "
        f"batches of {len(index):,}"
    )
    print(
        f"loss of the first and last steps: {np.mean(losses[:5]):.2f}, {np.mean(losses[-5:]):.2f}"
    )
    print(f"\n{examples:,.0f} examples/s; {PURCHASES:,} would take {PURCHASES / examples:,.0f} s")
    for name, size in parts.items():
        print(f"  {name:<28}{size / 2**20:>8.1f} MiB a step")
    share = sum(parts.values()) / speed / (seconds / options.steps)
    print(f"{share:.1%} of the limit by memory, which copies {speed / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()

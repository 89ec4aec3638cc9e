"""Imitation of the scripted experts, resumable at any step."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from reference.blueprint import Blueprint
from reference.trainees import Batch, make_trainee
from sqap.environments.metaworld_tasks import INSTRUCTIONS

DECAY_SHARE = 0.45  # the last part of training anneals the rate to zero
EMA_DECAY = 0.997
LOG_EVERY = 50
SAVE_EVERY = 200


class DataSet:
    """Memory-mapped shards, drawn from uniformly."""

    def __init__(self, shards: Sequence[Path], tokenizer: Tokenizer) -> None:
        self.images = [np.load(p / "images.npy", mmap_mode="r") for p in shards]
        self.chunks = np.concatenate([np.load(p / "chunks.npy") for p in shards])
        self.states = np.concatenate([np.load(p / "states.npy") for p in shards])
        sizes = [len(i) for i in self.images]
        self.shard = np.repeat(np.arange(len(shards)), sizes)
        self.offset = np.concatenate([np.arange(n) for n in sizes])
        ids = [tokenizer.encode(INSTRUCTIONS[p.name.rsplit("-", 1)[0]]).ids for p in shards]
        self.last = np.array([len(i) - 1 for i in ids])
        longest = max(map(len, ids))
        self.ids = np.array([i + [0] * (longest - len(i)) for i in ids])
        length = self.last[self.shard]
        self.alike = {n: np.flatnonzero(length == n) for n in np.unique(length)}

    def __len__(self) -> int:
        return len(self.shard)

    def batches(
        self, statistics: dict[str, list[float]], size: int, seed: int, padded: bool = True
    ) -> Iterator[Batch]:
        """Endless batches of ``size``, prepared by a thread while the last one is trained on.

        Unless ``padded``, the instructions of a batch have as many tokens as one that is drawn at random.
        """
        ready: queue.Queue[Batch] = queue.Queue(maxsize=4)
        low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
        mean, std = np.array(statistics["state_mean"]), np.array(statistics["state_std"])

        def fill() -> None:
            rng = np.random.default_rng(seed)
            while True:
                if padded:
                    rows, tokens = rng.integers(len(self), size=size), self.ids.shape[1]
                else:
                    last = self.last[self.shard[rng.integers(len(self))]]
                    rows, tokens = rng.choice(self.alike[last], size), last + 1
                shard = self.shard[rows]
                images = np.stack([self.images[s][o] for s, o in zip(shard, self.offset[rows], strict=True)])
                actions = 2 * (self.chunks[rows] - low) / (high - low) - 1
                states = (self.states[rows] - mean) / std
                ready.put(
                    Batch(
                        torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1,
                        torch.from_numpy(self.ids[shard, :tokens]),
                        torch.from_numpy(self.last[shard]),
                        torch.from_numpy(actions.clip(-1, 1).astype(np.float32)),
                        torch.from_numpy(states.astype(np.float32)),
                    )
                )

        threading.Thread(target=fill, daemon=True).start()
        while True:
            yield ready.get()


def statistics_of(data: DataSet) -> dict[str, list[float]]:
    """1st and 99th percentile per action dimension (as OpenVLA's), mean and deviation of the state."""
    flat = data.chunks.reshape(-1, data.chunks.shape[-1])
    return {
        "q01": np.quantile(flat, 0.01, axis=0).tolist(),
        "q99": np.quantile(flat, 0.99, axis=0).tolist(),
        "state_mean": data.states.mean(0).tolist(),
        "state_std": (data.states.std(0) + 1e-3).tolist(),
    }


def learning_rate(step: int, warmup: int, total: int) -> float:
    """What a parameter's own rate is multiplied by: warm up, hold, and anneal to zero along a cosine."""
    start = total * (1 - DECAY_SHARE)
    if step < start:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (total - start)))


def make_optimizer(model: nn.Module, plan: Blueprint) -> torch.optim.Optimizer:
    """AdamW; every parameter at the plan's rate for it, those at rate 0 frozen, matrices decayed."""
    groups = {}
    for name, parameter in model.named_parameters():
        rate = next(r for prefix, r in plan.rates.items() if name.startswith(prefix))
        decay = plan.weight_decay if parameter.dim() > 1 else 0.0
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            group = {"params": [], "weight_decay": decay, "rate": rate}
            groups.setdefault((rate, decay), group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), fused=True)


def train(plan: Blueprint, shards: Sequence[Path], until: int, compile_model: bool) -> None:
    """Train up to step ``until`` on the data in ``shards``, from where the last run ended."""
    torch.manual_seed(0)
    plan.work.mkdir(parents=True, exist_ok=True)
    data = DataSet(shards, plan.tokenizer())
    state_path, statistics_path = plan.work / "training.pt", plan.work / "statistics.json"
    if not statistics_path.exists():
        statistics_path.write_text(json.dumps(statistics_of(data)))
    statistics = json.loads(statistics_path.read_text())

    model = make_trainee(plan.config, plan.noise_draws)
    if plan.initialise is not None:
        plan.initialise(model.vla)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = make_optimizer(model, plan)
    step, spent = 0, 0.0
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["seconds"]
    print(f"{len(data)} frames, from step {step} to {until} of {plan.steps}", flush=True)
    if compile_model:
        model.features = torch.compile(model.features, dynamic=False)

    def save() -> None:
        temporary = state_path.with_suffix(".tmp")
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
        torch.save({**state, "optimizer": optimizer.state_dict(), "seconds": spent}, temporary)
        temporary.replace(state_path)

    losses, clock = Counter[str](), time.monotonic()
    batches = data.batches(statistics, plan.batch // plan.parts, step, padded=plan.parts == 1)
    while step < until:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, plan.warmup, plan.steps)
        for batch in islice(batches, plan.parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
                found = model.losses(batch)
            (sum(model.weights[name] * loss for name, loss in found.items()) / plan.parts).backward()
            losses.update({name: loss.item() / plan.parts for name, loss in found.items()})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        step += 1
        if step % LOG_EVERY == 0:
            now = time.monotonic()
            spent, seconds, clock = spent + now - clock, now - clock, now
            means = " ".join(f"{name} {total / LOG_EVERY:.4f}" for name, total in losses.items())
            speed = LOG_EVERY * plan.batch / seconds
            print(f"step {step} {means} {speed:.1f} samples/s, {spent / 60:.1f} min", flush=True)
            losses.clear()
        if step % SAVE_EVERY == 0:
            save()
    save()

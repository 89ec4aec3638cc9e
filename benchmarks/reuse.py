"""A vision encoder that computes only some patches of an image and keeps the others' features.

A patch is *stale* at a step if its pixels have hardly changed since its kept features were computed, and
looking ahead did not rank its token high at the step before. Stale patches are not computed again. Patches
that are computed attend to each other alone (``attend="fresh"``), or to the stale ones as well (``"all"``),
whose keys and values come from the inputs that every block had of them.

The first step of an episode, every ``refresh``-th step and a step at which most of the image has changed
compute every patch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqap
from sqap.checkpoints import identify
from sqap.checkpoints.choices import Choices
from sqap.errors import SqapError
from sqap.models.transformer import attend
from sqap.models.vision import Block, VisionEncoder
from sqap.observation import Observation
from sqap.policy import Policy, Step

LEVELS = 127.5  # of an image's 8 bits, for one of normalised pixels


@dataclass(frozen=True)
class Reuse:
    """When a patch is computed again.

    Args:
        threshold: mean absolute difference of a patch's pixels, in levels of 8 bits, above which it has
            changed.
        ranked: share of the visual tokens, those ranked highest at the step before, whose patches are always
            computed.
        refresh: every so many steps all patches are computed.
        attend: whether computed patches attend to stale ones.
        cut: share of changed patches above which all are computed.
    """

    threshold: float
    ranked: float = 0.3
    refresh: int = 4
    attend: Literal["fresh", "all"] = "fresh"
    cut: float = 0.7


NONE = Reuse(0.0, refresh=1)


@dataclass(frozen=True)
class Kept:
    """What a step leaves to the next one of the same robot.

    Args:
        pixels: those that every patch was last computed from, ``(1, 3, size, size)``.
        features: of every patch, ``(1, N, width)``.
        inputs: of every block for every patch, ``(1, rows, width)`` each; empty with ``attend="fresh"``.
        rows: ``(N,)`` where each patch is in ``inputs``.
        age: steps since all patches were computed.
        scores: ``(tokens,)`` of the step's look-ahead; None before it has looked.
    """

    pixels: Tensor
    features: Tensor
    inputs: tuple[Tensor, ...]
    rows: Tensor
    age: int = 0
    scores: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of one robot."""
        return sum(tensor.nbytes for tensor in (self.pixels, self.features, *self.inputs))


class ReusingEncoder(nn.Module):
    """A `VisionEncoder` of one camera; ``before`` and ``after`` are the memory that it is given and leaves.

    Args:
        encoder: what computes; without FiLM.
        setting: when a patch is computed again.
        shuffle: patches along a side of a visual token.

    Attributes:
        computed: patches of the latest step that were computed.
    """

    def __init__(self, encoder: VisionEncoder, setting: Reuse, shuffle: int = 1) -> None:
        super().__init__()
        self.encoder, self.setting, self.shuffle = encoder, setting, shuffle
        self.before: Kept | None = None
        self.after: Kept | None = None
        self.computed = 0

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """As `VisionEncoder.forward`, of one image."""
        kept, patches = self.before, self.encoder.config.grid**2
        fresh = None
        if kept is not None:
            fresh = choose(kept, pixels, self.setting, self.encoder.config.patch_size, self.shuffle)
        if kept is None or fresh is None:
            kept, fresh = None, torch.ones(patches, dtype=torch.bool)
        self.after = compute(self.encoder, pixels, fresh, kept, self.setting.attend == "all")
        self.computed = int(fresh.sum())
        return self.after.features


def choose(kept: Kept, pixels: Tensor, setting: Reuse, patch: int, shuffle: int) -> Tensor | None:
    """Mask ``(N,)`` of the patches that are computed; None for all of them."""
    if kept.age + 1 >= setting.refresh:
        return None
    levels = (pixels - kept.pixels).abs().mean(1, keepdim=True) * LEVELS
    changed = (F.avg_pool2d(levels, patch) > setting.threshold).flatten()
    if changed.float().mean() > setting.cut:
        return None
    if kept.scores is None or not setting.ranked:
        return changed
    tokens = len(kept.scores)
    best = torch.zeros(tokens, dtype=torch.bool)
    best[kept.scores.topk(round(setting.ranked * tokens)).indices] = True
    side = round(tokens**0.5)
    return (
        changed | best.view(side, side).repeat_interleave(shuffle, 0).repeat_interleave(shuffle, 1).flatten()
    )


def compute(encoder: VisionEncoder, pixels: Tensor, fresh: Tensor, kept: Kept | None, every: bool) -> Kept:
    """Compute the patches of the mask ``fresh``, all of them without ``kept``.

    With ``every`` the inputs of all blocks are kept, and patches attend to stale ones.
    """
    prefix = int(encoder.config.class_token) + encoder.config.registers
    new, stale = fresh.nonzero().flatten(), (~fresh).nonzero().flatten()
    x, inputs = encoder.embed(pixels), []
    if len(stale):
        x = torch.cat([x[:, :prefix], x[:, prefix + new]], 1)
    for j, block in enumerate(encoder.blocks):
        if not every:
            x = block(x)
            continue
        if kept is not None:
            x = torch.cat([kept.inputs[j][:, kept.rows[stale]], x], 1)
        inputs.append(x)
        x = run_behind(cast(Block, block), x, len(stale))
    features, rows = encoder.features(x), torch.empty_like(fresh, dtype=torch.int64)
    rows[stale], rows[new] = torch.arange(len(stale)), len(stale) + prefix + torch.arange(len(new))
    if kept is None:
        return Kept(pixels, features, tuple(inputs), rows)
    features = kept.features.index_copy(1, new, features)
    side = encoder.config.grid
    where = F.interpolate(fresh.view(1, 1, side, side).float(), scale_factor=encoder.config.patch_size) > 0
    return Kept(torch.where(where, pixels, kept.pixels), features, tuple(inputs), rows, kept.age + 1)


def run_behind(block: Block, x: Tensor, first: int) -> Tensor:
    """Outputs of ``x`` ``(1, tokens, width)`` from ``first`` on; those before give keys and values alone."""
    if not first:
        return cast(Tensor, block(x))
    attn, (batch, tokens, width) = block.attn, x.shape
    qkv = attn.qkv(block.norm1(x)).view(batch, tokens, 3, attn.heads, width // attn.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = attend(q[:, :, first:], k, v).transpose(1, 2).reshape(batch, tokens - first, width)
    x = x[:, first:] + block.ls1(attn.proj(mixed))
    out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return out


@dataclass
class Reusing:
    """A policy of one camera whose encoder reuses features: an `sqap.evaluation.rollout.Actor`.

    Args:
        policy: its model's encoder is replaced.
        setting: when a patch is computed again.
        noise: standard deviation, in levels of 8 bits, of what is added to every pixel that the policy sees.
        counts: file that every step appends to how many patches it has computed.
    """

    policy: Policy
    setting: Reuse
    noise: float = 0.0
    counts: Path | None = None
    encoder: ReusingEncoder = field(init=False)

    def __post_init__(self) -> None:
        self.policy.load_weights()
        model, self.config = self.policy.model, self.policy.config
        (encoder,) = model.vision
        if isinstance(encoder, ReusingEncoder):
            encoder = encoder.encoder
        self.encoder = ReusingEncoder(cast(VisionEncoder, encoder), self.setting, model.config.pixel_shuffle)
        model.vision = nn.ModuleList([self.encoder])

    def step(self, observation: Observation, *, seed: int | None = None, memory: Any = None) -> Step:
        """As `Policy.step`; the memory is the encoder's."""
        self.encoder.before = memory
        if self.noise:
            observation = noisy(observation, self.noise, seed)
        step = self.policy.step(observation, seed=seed)
        if self.counts is not None:
            share = self.encoder.computed / self.encoder.encoder.config.grid**2
            line = {"task": observation.instruction, "seed": seed, "computed": share}
            with self.counts.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert self.encoder.after is not None
        scores = None if step.selection is None else step.selection.scores
        return replace(step, memory=cast(Any, replace(self.encoder.after, scores=scores)))


def noisy(observation: Observation, deviation: float, seed: int | None) -> Observation:
    """The observation with Gaussian noise on every pixel, rounded to 8 bits."""
    random = np.random.default_rng(seed)
    images = {
        name: np.clip(np.rint(image + random.normal(0, deviation, image.shape)), 0, 255).astype(np.uint8)
        for name, image in observation.images.items()
    }
    return replace(observation, images=images)


def load(
    settings: Mapping[str, Reuse],
    noise: float,
    counts: Path,
    path: str,
    choices: Choices,
    fingerprint: str,
) -> Reusing:
    """The policy at ``path`` in a worker's process; ``fingerprint`` is its own and the name of a setting."""
    policy, (mark, _, name) = sqap.load(path, **vars(choices)), fingerprint.partition("-")
    if identify(policy) != mark:
        raise SqapError(f"{path} is not what it was when the evaluation began")
    return Reusing(policy, settings[name], noise, counts.with_name(f"{counts.name}-{name}"))

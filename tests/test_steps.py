"""Several robots at once, and what one step of a robot leaves to its next."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sqap import Camera, Observation, Policy
from sqap.config import PolicyConfig
from sqap.errors import InputError
from sqap.models import VLA
from sqap.processing import Clamp, Range, stretched
from sqap.pruning import criteria
from sqap.quantization import quantize_model
from sqap.recipe import Cut, Pruning, Quantization, Recipe, Scheme
from tests.families import FAMILIES, family_config, random_inputs, random_model

INSTRUCTIONS = ("open the drawer", "close", "open the drawer and close the drawer", "close the drawer")
PRUNINGS = {
    "whole": None,
    "lookahead": Pruning(0.5, 1),
    "cuts": Pruning(0.75, 1, later=(Cut(2, 0.25),)),
    "mix": Pruning(0.5, 2, "sqap"),
    "changed": Pruning(0.5, 1, top_share=0.25, rest="changed"),
}


EIGHT = Scheme(8, 8)
QUANTIZATION = Quantization(Scheme(4, 8), vision=EIGHT, projector=EIGHT, head=EIGHT, sensitive=EIGHT)


@cache
def make_model(family: str, quantized: bool) -> VLA:
    config = family_config(family)
    model = random_model(config)
    return quantize_model(model, QUANTIZATION, [random_inputs(config, 1)]) if quantized else model


def make_policy(family: str, pruning: Pruning | None, quantized: bool = False) -> Policy:
    """A small policy of ``family`` with random weights, which it shares with all others of the family."""
    config, recipe = family_config(family), Recipe(QUANTIZATION if quantized else None, pruning)
    words = ("<unk>", "<s>", "</s>", "open", "close", "the", "drawer", "and")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    cameras = ("front", "wrist")[: config.cameras]
    bounds = (-1.0,) * 5, (1.0,) * 5, (True,) * 5
    state = (Range(*bounds), Clamp()) if config.proprio_dim else None
    actions = Clamp(), Range(*(values[:4] for values in bounds))
    images = tuple(stretched(vision.image_size) for vision in config.vision)
    about = PolicyConfig("small", config, cameras, images, actions, state=state)
    return Policy(make_model(family, quantized), about, tokenizer, recipe)


def observe(policy: Policy, seed: int) -> Observation:
    """Noise, with a camera of its own at every seed."""
    rng = np.random.default_rng(seed)
    shift = rng.uniform(4, 28)
    camera = Camera(np.array([[32.0, 0, shift], [0, 32, 32 - shift], [0, 0, 1]]), np.eye(4))
    names = policy.config.cameras
    return Observation(
        images={name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in names},
        instruction=INSTRUCTIONS[seed % len(INSTRUCTIONS)],
        state=rng.standard_normal(5),
        cameras=dict.fromkeys(names, camera),
        end_effector=np.array([0.0, 0.0, 1.0]),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("quantized", [False, True])
def test_several_robots_get_what_each_would_alone(family: str, pruning: str, quantized: bool) -> None:
    policy = make_policy(family, PRUNINGS[pruning], quantized)
    seen = [observe(policy, seed) for seed in range(4)]
    before = [None, *policy.steps(seen[:3], seeds=[7, 8, 9])]
    memories = [step and step.memory for step in before]
    together = policy.steps(seen, seeds=[1, 2, 3, 4], memories=memories)
    assert len(together) == 4
    for i, (observation, memory) in enumerate(zip(seen, memories, strict=True)):
        alone = policy.step(observation, seed=i + 1, memory=memory)
        assert np.array_equal(together[i].chunk, alone.chunk)
        kept = [[s.kept.tolist() for s in step.selections] for step in (together[i], alone)]
        assert kept[0] == kept[1]
    if family != "tokens":  # where random weights choose the same few tokens
        assert len({step.chunk.tobytes() for step in together}) == 4


def test_as_many_seeds_and_memories_as_robots() -> None:
    policy = make_policy("diffusion", None)
    seen = [observe(policy, seed) for seed in range(2)]
    with pytest.raises(ValueError, match="zip"):
        policy.steps(seen, seeds=[1])
    with pytest.raises(ValueError, match="zip"):
        policy.steps(seen, seeds=[])
    with pytest.raises(ValueError, match="zip"):
        policy.steps(seen, memories=[])
    assert policy.steps([]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_have_changed_since_the_last_step_are_kept(family: str) -> None:
    policy = make_policy(family, PRUNINGS["changed"])
    first = observe(policy, 0)
    step = policy.step(first, seed=0)
    assert step.memory is not None
    images = {name: image.copy() for name, image in first.images.items()}
    for image in images.values():
        image[24:, 24:] = 255 - image[24:, 24:]
    second = dataclasses.replace(first, images=images)
    again = policy.step(second, seed=0, memory=step.memory)
    assert again.memory is not None
    change = step.memory.change(again.memory.visual)
    for selection, moved in zip(again.selections, change, strict=True):
        assert int(selection.top.sum()) == 2
        expected = criteria.top_k(moved.masked_fill(selection.top, -torch.inf), 6)
        assert selection.sampled.nonzero().flatten().tolist() == sorted(expected.tolist())
    forgot = policy.step(second, seed=0)
    assert [len(s.kept) for s in forgot.selections] == [8] * len(forgot.selections)
    pairs = zip(again.selections, forgot.selections, strict=True)
    assert any(not torch.equal(a.mask, b.mask) for a, b in pairs)


def test_only_what_needs_a_memory_makes_one() -> None:
    for pruning in ("whole", "lookahead", "mix"):
        policy = make_policy("diffusion", PRUNINGS[pruning])
        assert policy.step(observe(policy, 0), seed=0).memory is None


def test_a_memory_of_another_policy_is_refused() -> None:
    one, other = make_policy("diffusion", PRUNINGS["changed"]), make_policy("flow", PRUNINGS["changed"])
    memory = other.step(observe(other, 0), seed=0).memory
    with pytest.raises(InputError, match="it is of another policy"):
        one.step(observe(one, 0), seed=0, memory=memory)

"""Steps that are captured and replayed. On the CPU, a replay runs the same function on the same buffers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sqap
from sqap.graph import MOST, Feed, Graphs, fetch
from sqap.policy import Policy
from sqap.recipe import Cut, Pruning, Recipe

CPU = torch.device("cpu")
PRUNINGS = {
    "look-ahead": Pruning(0.5, 1),
    "a ring": Pruning(0.75, 1, ring_share=0.25, later=(Cut(2, 0.25),)),
    "changed": Pruning(0.5, 1, rest="changed"),
    "attention": Pruning(0.5, 2, "attention"),
    "farthest": Pruning(0.5, 1, "sqap"),
    "random": Pruning(0.5, 1, "random"),
}


class Recorder:
    """Captures a step of a policy; what it returned first is overwritten by each replay, as a graph's is."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.captured += 1
        found = function()

        def replay() -> None:
            for old, new in zip(tensors(found), tensors(function()), strict=True):
                old.copy_(new)

        for tensor in tensors(found):
            tensor.zero_()
        return found, replay


def tensors(outcomes: Any) -> list[torch.Tensor]:
    found = []
    for actions, pruner in outcomes:
        found.append(actions)
        if pruner is not None:
            found += [x for selection in pruner.selections for x in selection.tensors]
            found += [] if pruner.memory is None else [pruner.memory.visual]
    return found


@pytest.fixture
def small(policy, observe) -> Policy:
    return sqap.compress(policy, Recipe.w4a8(keep=1), [observe(seed) for seed in range(2)])


def with_pruning(policy: Policy, pruning: Pruning | None) -> Policy:
    return Policy(policy.model, policy.config, policy.tokenizer, Recipe(policy.recipe.quantization, pruning))


def replaying(policy: Policy) -> tuple[Policy, Recorder]:
    made, recorder = with_pruning(policy, policy.recipe.pruning), Recorder()
    made._graphs = Graphs(CPU, recorder)
    return made, recorder


def assert_same(found: sqap.Step, expected: sqap.Step) -> None:
    assert np.array_equal(found.chunk, expected.chunk)
    assert len(found.selections) == len(expected.selections)
    for one, other in zip(found.selections, expected.selections, strict=True):
        assert one.target == other.target
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("pruning", [None, *PRUNINGS.values()], ids=["all", *PRUNINGS])
def test_a_replayed_step_is_the_step(small: Policy, observe: Any, pruning: Pruning | None) -> None:
    """On other images, seeds and places of the end effector than the captured one's."""
    plain = with_pruning(small, pruning)
    captured, recorder = replaying(plain)
    memories: list[Any] = [None, None]
    for seed in range(4):
        seen = observe(seed)
        moved = seen.end_effector + np.array([0.05 * seed, 0.03 * seed, 0])
        seen = sqap.Observation(seen.images, seen.instruction, None, seen.cameras, moved)
        steps = [p.step(seen, seed=seed, memory=m) for p, m in zip((plain, captured), memories, strict=True)]
        assert_same(steps[1], steps[0])
        memories = [step.memory for step in steps]
    assert recorder.captured == (2 if pruning is not None and pruning.rest == "changed" else 1)


def test_what_a_step_returned_stays_as_it_was(small: Policy, observe: Any) -> None:
    captured, _ = replaying(with_pruning(small, PRUNINGS["changed"]))
    first = captured.step(observe(0), seed=0)
    before = first.chunk.copy(), first.selection.scores.clone(), first.memory.visual.clone()
    captured.step(observe(1), seed=1)
    assert np.array_equal(first.chunk, before[0])
    assert torch.equal(first.selection.scores, before[1])
    assert torch.equal(first.memory.visual, before[2])


def test_one_graph_for_each_length_and_batch(small: Policy, observe: Any) -> None:
    plain = with_pruning(small, PRUNINGS["look-ahead"])
    captured, recorder = replaying(plain)
    words = ["open", "open the", "open the drawer", "close the drawer", "open the the drawer", "the"]
    prompts = [observe(i, instruction=text) for i, text in enumerate(words)]
    for seen in prompts[:4]:
        assert_same(captured.step(seen, seed=0), plain.step(seen, seed=0))
    assert recorder.captured == 3
    found = captured.steps(prompts[:2], seeds=[1, 2])
    for one, other in zip(found, plain.steps(prompts[:2], seeds=[1, 2]), strict=True):
        assert_same(one, other)
    assert recorder.captured == 4
    captured.step(prompts[4], seed=0)
    assert len(captured._graphs) == MOST
    assert recorder.captured == 5
    captured.step(prompts[1], seed=0)
    assert recorder.captured == 5
    captured.step(prompts[0], seed=0)  # the one that was used longest ago is gone
    assert recorder.captured == 6


def test_what_cannot_be_captured_is_not(small: Policy, observe: Any) -> None:
    """DivPrune chooses on the CPU; a stage that is watched must run."""
    plain = with_pruning(small, Pruning(0.5, 1, "divprune"))
    captured, recorder = replaying(plain)
    assert_same(captured.step(observe(0), seed=0), plain.step(observe(0), seed=0))
    assert recorder.captured == 0
    captured, recorder = replaying(small)
    stages = []

    def through(name: str, stage: Any, states: Any, call: Any) -> list[Any]:
        stages.append(name)
        return [call(stage, state) for state in states]

    captured.through = through
    captured.step(observe(0), seed=0)
    assert stages
    assert recorder.captured == 0


def test_a_step_that_fails_leaves_no_graph(small: Policy, observe: Any, monkeypatch: Any) -> None:
    captured, recorder = replaying(small)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as context:
        context.setattr(type(captured.model), "run", broken)
        with pytest.raises(RuntimeError, match="broken"):
            captured.step(observe(0), seed=0)
    assert_same(captured.step(observe(0), seed=0), small.step(observe(0), seed=0))
    assert recorder.captured == 2


def test_a_copy_has_no_graphs(small: Policy, observe: Any) -> None:
    captured, _ = replaying(small)
    captured.step(observe(0), seed=0)
    for made in (copy.deepcopy(captured._graphs), pickle.loads(pickle.dumps(captured._graphs))):
        assert len(made) == 0
        assert made.device == CPU


def test_a_feed_fills_the_same_buffers() -> None:
    feed = Feed(CPU)
    first = [feed(torch.full((3,), i)) for i in range(2)]
    feed.rewind()
    second = [feed(torch.full((3,), 5 + i)) for i in range(2)]
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in second]
    assert [x.tolist() for x in second] == [[5] * 3, [6] * 3]


def test_fetched_tensors_are_copies() -> None:
    x = torch.ones(2)
    (found,) = fetch([x])
    x.zero_()
    assert found.tolist() == [1, 1]

"""The forms of one policy that are timed: ours, and what other tools make of the same weights, unpruned."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

import sqap
from sqap.benchmark import tools
from sqap.benchmark.dense import dense, unpack
from sqap.benchmark.exported import Elsewhere, export
from sqap.benchmark.shapes import SHAPES, random_policy
from sqap.checkpoints.choices import Choices
from sqap.compress import compress
from sqap.errors import InputError
from sqap.models import ModelConfig
from sqap.observation import Camera, Observation
from sqap.policy import Policy, check_pruning
from sqap.recipe import Pruning, Recipe

INSTRUCTION = "put the carrot on the plate"
SIDE = 256  # pixels of the images a robot sends
KEEPING = "sqap-keep-"


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Args:
        source: a policy's directory or name.
        recipe: how it is compressed; not looked at if it is compressed already.
        random: ``source`` is one of `sqap.benchmark.SHAPES`, to be given random weights.
        layers: of the decoder of such a shape; all of them if None.
        choices: by which a published policy is loaded.
    """

    source: str
    recipe: Recipe
    random: bool = False
    layers: int | None = None
    choices: Choices = field(default_factory=Choices)

    def load(self) -> Policy:
        """The compressed policy. Nothing is calibrated, since that changes no time.

        Raises:
            SqapError: it cannot be loaded or compressed.
        """
        if self.random:
            return random_policy(self.shape(), self.recipe)
        policy = sqap.load(self.source, **vars(self.choices))
        if policy.recipe != Recipe():
            return policy
        quantization = self.recipe.quantization
        if quantization is not None:
            quantization = replace(quantization, rounding="nearest", clip=False)
        small = compress(policy, Recipe(quantization), [])
        return replace(small, recipe=replace(small.recipe, pruning=self.recipe.pruning))

    def shape(self) -> ModelConfig:
        """The sizes of a random policy."""
        shape = SHAPES[self.source]
        if self.layers is None:
            return shape
        return replace(shape, decoder=replace(shape.decoder, depth=self.layers))


@dataclass(frozen=True)
class Candidate:
    """How a compressed policy is turned into what is timed, in a process of its own.

    Args:
        about: what it is, for people.
        make: of the compressed policy, which it may use up.
        staged: whether its parts can be timed; what is compiled as a whole has none.
        environment: the name of the virtual environment that a tool of its own may be installed in.
    """

    about: str
    make: Callable[[Policy], Policy]
    staged: bool = True
    environment: str | None = None


def unpruned(policy: Policy) -> Policy:
    """The same policy, keeping every visual token."""
    return replace(policy, recipe=replace(policy.recipe, pruning=None))


def keeping(keep_ratio: float) -> Candidate:
    """The same policy with another share of the visual tokens kept, by the recipe's criterion."""

    def make(policy: Policy) -> Policy:
        pruning = replace(policy.recipe.pruning or Pruning(), keep_ratio=keep_ratio, later=())
        check_pruning(pruning, policy.config.model)
        return replace(policy, recipe=replace(policy.recipe, pruning=pruning))

    return Candidate(f"the compressed policy, keeping {keep_ratio:.3g} of its visual tokens", make)


def _dynamic_int8(policy: Policy) -> Policy:
    policy = dense(policy, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantize(policy.model, {nn.Linear}, torch.qint8, inplace=True)
    return policy


def _compiled(policy: Policy) -> Policy:
    policy = dense(policy, torch.float32)
    policy.model.compile()
    return policy


def _exported(tool: Callable[..., Any], bits: int) -> Callable[[Policy], Policy]:
    def make(policy: Policy) -> Policy:
        observation = example(policy)
        return export(policy, partial(tool, bits=bits), unpack, lambda p: p.act(observation, seed=0))

    return make


CANDIDATES = {
    "sqap": Candidate("the compressed policy", lambda policy: policy),
    "sqap-unpruned": Candidate("the compressed policy with all its visual tokens", unpruned),
    "torch-fp32": Candidate("PyTorch, float32", lambda policy: dense(policy, torch.float32)),
    "torch-bf16": Candidate("PyTorch, bfloat16", lambda policy: dense(policy, torch.bfloat16)),
    "torch-compile": Candidate("PyTorch, float32, torch.compile", _compiled, staged=False),
    "torch-int8": Candidate("PyTorch's dynamic quantization to 8 bits", _dynamic_int8),
    "openvino-int8": Candidate("OpenVINO, 8-bit weights", _exported(tools.openvino, 8), True, "openvino"),
    "openvino-int4": Candidate("OpenVINO, 4-bit weights", _exported(tools.openvino, 4), True, "openvino"),
    "onnxruntime-int8": Candidate(
        "ONNX Runtime, dynamic quantization to 8 bits", _exported(tools.onnxruntime, 8), True, "onnxruntime"
    ),
    "onnxruntime-int4": Candidate(
        "ONNX Runtime, 4-bit weights", _exported(tools.onnxruntime, 4), True, "onnxruntime"
    ),
}


def candidate(name: str) -> Candidate:
    """The candidate called ``name``: one of `CANDIDATES`, ``sqap-keep-RATIO``, or ``module:attribute``.

    Raises:
        InputError: there is none.
    """
    if name in CANDIDATES:
        return CANDIDATES[name]
    ratio = re.fullmatch(rf"{KEEPING}(\d+(?:\.\d+)?)", name)
    if ratio:
        return keeping(Pruning(float(ratio[1])).keep_ratio)
    if ":" in name:
        return _imported(name)
    known = *CANDIDATES, f"{KEEPING}RATIO", "module:attribute"
    raise InputError(f"no candidate is called {name!r}; there are {', '.join(known)}")


def _imported(name: str) -> Candidate:
    """One whose glue is not part of sqap."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise InputError(f"no candidate is called {name!r}: {problem}") from problem
    if not isinstance(found, Candidate):
        raise InputError(f"{name} is no sqap.benchmark.candidates.Candidate, but a {type(found).__name__}")
    return found


def example(policy: Policy) -> Observation:
    """Noise, as large as what a robot sends, with its gripper in front of every camera."""
    generator, config = np.random.default_rng(0), policy.config
    images = {
        camera: generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for camera in config.cameras
    }
    state = None if config.state is None else np.zeros(config.state_dim)
    ahead = Camera(np.array([[SIDE, 0, SIDE / 2], [0, SIDE, SIDE / 2], [0, 0, 1]]), np.eye(4))
    return Observation(images, INSTRUCTION, state, dict.fromkeys(images, ahead), np.array([0, 0, 1.0]))


def weight_bytes(policy: Policy) -> int:
    """Bytes of the weights in memory."""
    count = 0
    for module in policy.model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, torch.ao.nn.quantized.Linear):
            packed: Any = module
            own.append(packed.weight())
        if isinstance(module, Elsewhere):
            count += module.nbytes
        count += sum(tensor.numel() * tensor.element_size() for tensor in own)
    return count


def check(subject: Subject, names: Sequence[str]) -> None:
    """Make sure that the shape and every candidate are known.

    Raises:
        InputError: one is not.
    """
    if subject.random and subject.source not in SHAPES:
        raise InputError(f"no shape is called {subject.source!r}; there are {', '.join(SHAPES)}")
    if subject.layers is not None and not subject.random:
        raise InputError("--layers shortens a --shape; a policy has the layers that it has")
    for name in names:
        candidate(name)

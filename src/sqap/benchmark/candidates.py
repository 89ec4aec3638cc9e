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
from sqap.benchmark.dense import dense, eight, unpack
from sqap.benchmark.exported import Elsewhere, export
from sqap.benchmark.shapes import SHAPES, random_policy
from sqap.checkpoints.choices import Choices
from sqap.compress import compress
from sqap.errors import InputError
from sqap.kernels.gpu.backend import check_device
from sqap.models import ModelConfig
from sqap.observation import Camera, Observation
from sqap.policy import Policy
from sqap.pruning.check import check_pruning
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
        device: where it is timed, one of PyTorch's.
    """

    source: str
    recipe: Recipe
    random: bool = False
    layers: int | None = None
    choices: Choices = field(default_factory=Choices)
    device: str = "cpu"

    @property
    def kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    def load(self) -> Policy:
        """The compressed policy, on the device. Nothing is calibrated, since that changes no time.

        Raises:
            SqapError: it cannot be loaded or compressed.
        """
        if self.random:
            return random_policy(self.shape(), self.recipe, torch.device(self.device))
        return self._compressed().to(self.device)

    def _compressed(self) -> Policy:
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
        kinds: the kinds of devices it can be timed on.
        graph: whether its steps are CUDA graphs on a GPU; otherwise Python launches their kernels.
    """

    about: str
    make: Callable[[Policy], Policy]
    staged: bool = True
    environment: str | None = None
    kinds: tuple[str, ...] = ("cpu", "cuda")
    graph: bool = True


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
    if policy.device.type == "cuda":  # PyTorch's own runs on CPUs alone
        policy = dense(policy, torch.bfloat16)
        eight(policy.model)
        return policy
    policy = dense(policy, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        quantize: Any = torch.ao.quantization.quantize_dynamic
        quantize(policy.model, {nn.Linear}, torch.qint8, inplace=True)
    return policy


def _compiled(policy: Policy) -> Policy:
    policy = dense(policy, torch.bfloat16 if policy.device.type == "cuda" else torch.float32)
    # `Module.compile` compiles `forward`, which a policy does not call.
    policy.model.run = torch.compile(policy.model.run)  # type: ignore[method-assign]
    return policy


def _elsewhere(about: str, tool: Callable[..., Any], bits: int) -> Candidate:
    """One that runs in a tool of `tools`, whose environment has its name, on CPUs."""

    def make(policy: Policy) -> Policy:
        observation = example(policy)
        return export(policy, partial(tool, bits=bits), unpack, lambda p: p.act(observation, seed=0))

    return Candidate(about, make, environment=tool.__name__, kinds=("cpu",))


CANDIDATES = {
    "sqap": Candidate("the compressed policy", lambda policy: policy),
    "sqap-unpruned": Candidate("the compressed policy with all its visual tokens", unpruned),
    "torch-fp32": Candidate("PyTorch, float32", lambda policy: dense(policy, torch.float32)),
    "torch-bf16": Candidate("PyTorch, bfloat16", lambda policy: dense(policy, torch.bfloat16), graph=False),
    "torch-bf16-graph": Candidate(
        "the same as one CUDA graph", lambda policy: dense(policy, torch.bfloat16), kinds=("cuda",)
    ),
    "torch-compile": Candidate(
        "PyTorch, torch.compile, float32 on CPUs and bfloat16 on GPUs", _compiled, staged=False, graph=False
    ),
    "torch-int8": Candidate("PyTorch's products of 8-bit integers, quantized as it runs", _dynamic_int8),
    "openvino-int8": _elsewhere("OpenVINO, 8-bit weights", tools.openvino, 8),
    "openvino-int4": _elsewhere("OpenVINO, 4-bit weights", tools.openvino, 4),
    "onnxruntime-int8": _elsewhere("ONNX Runtime, dynamic quantization to 8 bits", tools.onnxruntime, 8),
    "onnxruntime-int4": _elsewhere("ONNX Runtime, 4-bit weights", tools.onnxruntime, 4),
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
    """Make sure that the shape, the device and every candidate are known.

    Raises:
        InputError: one is not.
    """
    if subject.random and subject.source not in SHAPES:
        raise InputError(f"no shape is called {subject.source!r}; there are {', '.join(SHAPES)}")
    if subject.layers is not None and not subject.random:
        raise InputError("--layers shortens a --shape; a policy has the layers that it has")
    if re.fullmatch(r"cpu|cuda(:\d+)?", subject.device) is None:
        raise InputError(f"a device is 'cpu', 'cuda' or 'cuda:NUMBER', got {subject.device!r}")
    check_device(torch.device(subject.device))
    for name in names:
        kinds = candidate(name).kinds
        if subject.kind not in kinds:
            raise InputError(f"{name} can be timed on {' or '.join(kinds)} alone, not on {subject.device!r}")

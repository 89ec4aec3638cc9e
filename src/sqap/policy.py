"""A policy: an observation in, a chunk of actions out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from sqap.config import Calibration, Origin, PolicyConfig
from sqap.defaults import defaults
from sqap.errors import NonFiniteActionError
from sqap.given import Given, Outcome
from sqap.graph import Feed, Graphs, fetch, running
from sqap.kernels.cpu import release_threads
from sqap.kernels.gpu.backend import check_device, check_grids, load, reference
from sqap.models import VLA, ModelInputs
from sqap.models.stages import stages
from sqap.models.storage import Progress, Rounded, Weights, fill, narrow, unify, widen
from sqap.models.through import Through, direct
from sqap.observation import Observation
from sqap.prepare import find_effector, prepare, read_images, read_state
from sqap.processing import unnormalize
from sqap.pruning import Selection, Selector, StepPruner
from sqap.pruning.attention import score_queries
from sqap.pruning.check import check_pruning
from sqap.pruning.lookahead import layers_to_look_at
from sqap.pruning.memory import Memory
from sqap.pruning.step import draw
from sqap.quantization.linear import QuantizedLinear
from sqap.recipe import Recipe

# Of all policies: one of its own could be neither copied nor sent to another process.
_loading = threading.Lock()


@dataclass(frozen=True)
class Step:
    """One policy step.

    Args:
        chunk: ``(horizon, action_dim)`` in robot units.
        selections: what was kept of each camera's tokens; empty if nothing was pruned.
        memory: for the next step of the same robot; None if the policy needs none.
    """

    chunk: np.ndarray
    selections: tuple[Selection, ...] = ()
    memory: Memory | None = None

    @property
    def selection(self) -> Selection | None:
        """What was kept of the first camera; None if nothing was pruned."""
        return self.selections[0] if self.selections else None


@dataclass
class Policy:
    """A loaded policy, original or compressed.

    Args:
        model: the network; compressed policies hold packed linears in its decoder.
        config: cameras, prompt, action statistics and sizes.
        tokenizer: instruction to token ids.
        recipe: how it was compressed; an empty one for an original.
        calibration: what compression measured, if it needed frames.
        source: fingerprint of the policy this one was compressed from.
        fingerprint: identifies the directory it was loaded from; None if it was not.
        weights: where to read what the model has on the meta device. `load_weights` reads all of it, once,
            and acting calls it. Compressing reads it stage by stage, whether it is in memory or not: a change
            made to ``model`` counts only where ``weights`` is None.
        origin: where it was loaded from, or what it was compressed from.
        card: the model card that was beside it. `save` keeps it if nothing else changed.

    Attributes:
        selector: chooses visual tokens, as the recipe says; None if nothing is pruned.
        pruner: makes the pruner of a step out of the selector.
        through: runs the model's stages in a step.
    """

    model: VLA = field(repr=False)
    config: PolicyConfig
    tokenizer: Tokenizer = field(repr=False)
    recipe: Recipe = field(default_factory=Recipe)
    calibration: Calibration | None = None
    source: str | None = None
    fingerprint: str | None = None
    weights: Weights | None = field(default=None, repr=False)
    origin: Origin = Origin()  # noqa: RUF009 - it is frozen
    card: bytes | None = field(default=None, repr=False)
    _loaded: bool = field(default=False, init=False, repr=False, compare=False)
    _device: torch.device = field(init=False, repr=False, compare=False)
    _graphs: Graphs | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        there = self.model.device
        self._device = torch.device("cpu") if self.weights is not None and there.type == "meta" else there
        pruning = self.recipe.pruning
        self.selector: Selector | None = None
        self.pruner: Callable[..., StepPruner] = StepPruner
        self.through: Through = direct
        if pruning is not None:
            check_pruning(pruning, self.config.model)
            found = self.calibration or Calibration(0, "")
            layers = layers_to_look_at(pruning, self.config.model.decoder, found.layers)
            pruning = replace(pruning, score_queries=score_queries(pruning, self.config.model))
            self.selector = Selector(pruning, self.config.model.grid, found.top_k, layers)

    def act(self, observation: Observation, *, seed: int | None = None) -> np.ndarray:
        """The next actions ``(horizon, action_dim)`` float32 in robot units.

        The same seed gives the same diffusion noise, so that policies can be compared in pairs. The first
        call reads weights that are still on disk: call `load_weights` first where a step must not wait.
        A process that is forked after a step deadlocks in its own first one, since OpenMP's threads are not
        forked: start processes with multiprocessing's "spawn" or "forkserver". Act from one thread: each that
        computes keeps as many OpenMP threads, and when there are more than cores, every step is slower
        (`sqap.kernels.cpu.release_threads`).

        Raises:
            InputError: the observation lacks an image the policy reads.
            NonFiniteActionError: the actions would not be finite.
            CheckpointError: weights cannot be read, or hold values that are not finite.
        """
        return self.step(observation, seed=seed).chunk

    def step(
        self, observation: Observation, *, seed: int | None = None, memory: Memory | None = None
    ) -> Step:
        """Like `act`, and tells which visual tokens the decoder kept, and what to give to the next step.

        Args:
            observation: what the robot sees.
            seed: of the diffusion noise.
            memory: what the step before it returned, in the same episode of the same robot.
        """
        (step,) = self.steps([observation], seeds=[seed], memories=[memory])
        return step

    @defaults()
    @torch.inference_mode()
    def steps(
        self,
        observations: Sequence[Observation],
        *,
        seeds: Sequence[int | None] | None = None,
        memories: Sequence[Memory | None] | None = None,
    ) -> list[Step]:
        """`step` for several robots: the same numbers, bit for bit, as one after the other.

        Instructions, cameras' positions and pruned tokens may differ. All observations go through a stage of
        the model before the next begins, so that its weights are fetched from memory once.

        Args:
            observations: one for each robot.
            seeds: of each one's diffusion noise.
            memories: what each one's step before returned.

        Raises:
            ValueError: there are not as many seeds or memories as observations.
            InputError: as `act`, and a memory is of another policy.
            NonFiniteActionError: as `act`; no robot then gets a chunk.
            CheckpointError: as `act`.
        """
        self.load_weights()
        none = [None] * len(observations)
        seeds = none if seeds is None else seeds
        memories = none if memories is None else memories
        triples = list(zip(observations, seeds, memories, strict=True))
        prepared = [self._prepare(*triple) for triple in triples]
        with self._acting():
            found = self._run(prepared)
            each = zip(found, observations, strict=True)
            return [self._step(actions, pruner, seen.state) for (actions, pruner), seen in each]

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """On the policy's GPU; one step at a time where steps are captured."""
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            if self._graphs is not None:
                stack.enter_context(running)
            yield

    def _run(self, prepared: Sequence[Given]) -> list[Outcome]:
        """Actions and pruners of a step: replayed by a CUDA graph, where there may be one."""
        if self._graphs is None or not self._captures:
            return self._direct([given.to(self._place) for given in prepared])

        def place(feed: Feed) -> Callable[[], list[Outcome]]:
            placed = [given.to(feed) for given in prepared]
            return lambda: self._direct(placed)

        found: list[Outcome] = self._graphs.run(tuple(given.key for given in prepared), place)
        for (_, pruner), given in zip(found, prepared, strict=True):
            if pruner is not None:  # the one of the captured step
                pairs = zip(pruner.selections, given.targets, strict=False)
                pruner.selections = tuple(replace(selection, target=target) for selection, target in pairs)
        return found

    def _direct(self, placed: Sequence[Given]) -> list[Outcome]:
        pruners = [self._pruner(given) for given in placed]
        found = self.model.run([given.inputs for given in placed], self.through, pruners)
        return list(zip(found, pruners, strict=True))

    @property
    def _captures(self) -> bool:
        """Whether nothing looks into a step, and no selection is computed on the CPU."""
        plain = self.through is direct and self.pruner is StepPruner
        return plain and (self.selector is None or self.selector.captures)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, which is not waited for unless it is the CPU."""
        return tensor.to(self.device, non_blocking=self.device.type != "cpu")

    def _prepare(self, observation: Observation, seed: int | None, memory: Memory | None) -> Given:
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        inputs = self.inputs(observation, generator)
        if self.selector is None:
            return Given(inputs, (), (), None, generator)
        targets = tuple(find_effector(observation, camera, self.config) for camera in self.config.cameras)
        draws = draw(self.selector, targets, generator, memory)
        return Given(inputs, targets, draws, memory, generator)

    def _step(self, actions: torch.Tensor, pruner: StepPruner | None, state: np.ndarray | None) -> Step:
        selections = () if pruner is None else pruner.selections
        actions, *parts = fetch([actions[0].float(), *(x for s in selections for x in s.tensors)])
        normalised = actions.numpy()
        chunk = unnormalize(normalised, self.config.actions, state)
        for found in (normalised, chunk):  # what is clipped or turned into 0 and 1 hides what it was
            _check_actions(found)
        if pruner is None:
            return Step(chunk)
        memory = pruner.memory
        if memory is not None and self._graphs is not None:  # the next step overwrites it
            memory = Memory(memory.visual.clone())
        copies = iter(parts)
        kept = tuple(s.with_tensors([next(copies) for _ in s.tensors]) for s in selections)
        return Step(chunk, kept, memory)

    def inputs(self, observation: Observation, generator: torch.Generator) -> ModelInputs:
        """What the model is given for an observation, with noise where it starts from noise; on the CPU.

        Raises:
            InputError: the observation lacks an image or the state that the policy reads, or the tokenizer
                makes nothing of its instruction that the model can read.
        """
        return prepare(observation, self.config, self.tokenizer, generator)

    def pixels(self, observation: Observation) -> list[torch.Tensor]:
        """The images as the model sees them, one ``(cameras, 3, size, size)`` tensor per vision encoder."""
        return read_images(observation, self.config)

    def proprio(self, observation: Observation) -> torch.Tensor | None:
        """The normalised state ``(1, proprio_dim)``, of policies that read it or are told it in words."""
        return read_state(observation, self.config)

    @property
    def device(self) -> torch.device:
        """Where the model acts."""
        return self._device

    @defaults()
    def to(self, device: torch.device | str, *, graph: bool = True) -> Policy:
        """Move the policy in place, as `torch.nn.Module.to` does, and return it.

        It then acts there: what it is given is copied there, and chunks and selections come back. Noise and
        chance are drawn on the CPU whatever the device, so that a seed stands for the same. Weights that are
        still on disk go there part by part as they are loaded. Compressing needs a policy on the CPU.

        Elsewhere than on a CPU a compressed policy computes in bfloat16, a head that starts from noise in
        float32. On a GPU a step is captured as a CUDA graph the first time that its inputs have their shapes
        (`sqap.graph`): change the model afterwards, and move it again.

        Args:
            device: ``"cpu"``, ``"cuda"`` or another of PyTorch's.
            graph: whether steps on a GPU are captured; without it Python launches their kernels one by one.

        Raises:
            InputError: there is no such GPU, it is too old, or has no kernel for how a linear is quantized.
        """
        there = torch.device(device)
        check_device(there)
        if there.type == "cuda" and self.recipe.quantization is not None and not reference():
            load()  # what is missing or has no kernel is said before anything is moved
            for module in self.model.modules():
                if isinstance(module, QuantizedLinear):
                    check_grids(module.packed)
        self._device = there
        self._graphs = Graphs(self._device) if graph and self._device.type == "cuda" else None
        if self.weights is None or self._loaded:
            if self.recipe.quantization is not None:
                self._settle()
            self.model.to(self._device)
        return self

    def _settle(self) -> None:
        """Give a compressed model the types that it computes in on the policy's device."""
        if self._device.type == "cpu":
            widen(self.model)
        else:
            narrow(self.model)
            if self.config.model.head.noisy:
                widen(self.model.head)

    @defaults()
    def load_weights(self, progress: Progress | None = None) -> None:
        """Read into memory what of the model is still on disk; the first `act` does, if nobody did before.

        An original then computes in the type that most of its weights are stored in, its head in the finest
        type that the head has. What `compress` returns computes in float32. Several threads may call this.

        Args:
            progress: gets (weights read, weights in all) part by part.

        Raises:
            CheckpointError: weights cannot be read, or hold values that are not finite.
        """
        if self._loaded or self.weights is None:
            return
        with _loading:
            if self._loaded:
                return
            total, done = sum(parameter.numel() for parameter in self.model.parameters()), 0
            for name, stage in stages(self.model):
                fill(stage, self.weights, prefix=f"{name}.", device=self.device)
                done += sum(parameter.numel() for parameter in stage.parameters())
                if progress is not None:
                    progress(done, total)
            fill(self.model, self.weights, device=self.device)
            self.model.to(self.device)  # buffers, and what never was on disk
            if isinstance(self.weights, Rounded):
                self._settle()
            else:
                unify(self.model, self.model.head)
            if progress is not None:
                progress(total, total)
            self._loaded = True
        release_threads()  # another thread may be the one that acts

    def save(self, directory: str | Path) -> None:
        """Write the policy, whole or not at all; see `sqap.checkpoints.native`.

        Raises:
            CheckpointError: the place cannot be written or holds something else, or a linear that the recipe
                wants quantized is not.
        """
        from sqap.checkpoints.native import save  # its package makes policies
        from sqap.checkpoints.opened import Opened

        record = Opened(
            self.model,
            self.config,
            self.tokenizer,
            self.recipe,
            self.calibration,
            self.source,
            self.fingerprint,
            self.weights,
            self.origin,
            self.card,
        )
        save(record, Path(directory))

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save the policy to a temporary directory, and upload that to the Hugging Face hub.

        Args:
            repository: ``org/name``; it is made if it is not there. Of one that is there, files of the same
                names are replaced, and others stay.
            private: whether a repository that is made is private; None is the organisation's default.
            token: for the hub; None takes what `hf auth login` has stored.

        Returns:
            The repository's address.

        Raises:
            CheckpointError: the name is none, the token may not write there, or the hub cannot be reached.
        """
        from sqap.checkpoints import hub

        return hub.upload(self.save, repository, private=private, token=token)

    def _pruner(self, given: Given) -> StepPruner | None:
        if self.selector is None:
            return None
        layout = self.config.model.layout(given.inputs.token_ids.shape[1])
        sequence = layout.blocks[0].stop, layout.span("visual")
        chance = given.targets, given.generator, given.memory
        return self.pruner(self.selector, *sequence, *chance, self.device, given.draws)


def _check_actions(actions: np.ndarray) -> None:
    """Make sure that a chunk ``(horizon, action_dim)`` is finite."""
    for step, dimension in np.argwhere(~np.isfinite(actions)):
        raise NonFiniteActionError(
            f"dimension {dimension} of action {step} would be {actions[step, dimension]}, which no robot may "
            "be given: the policy's weights and this observation lead out of the range of its numbers"
        )

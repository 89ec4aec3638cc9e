"""What happens before and after one of LeRobot's models, gathered from its files and the user's choices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqap.checkpoints import hub
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.lerobot.config import ACTION, STATE, LeRobotConfig, choose_cameras
from sqap.checkpoints.lerobot.normalizers import (
    EPSILON,
    IDENTITY,
    INPUTS,
    MODES,
    NONE,
    OUTPUTS,
    Normalization,
    Statistics,
    added_range,
    check_dataset,
    identity,
    read_statistics,
    statistics_inside,
)
from sqap.checkpoints.lerobot.processors import (
    BEFORE,
    NORMALIZE,
    STATE_TEXT,
    UNNORMALIZE,
    Processors,
    ProcessorStep,
    read_processors,
)
from sqap.checkpoints.tokenizer import FILE
from sqap.checkpoints.weights import TensorSet
from sqap.errors import CheckpointError
from sqap.processing import (
    ActionStep,
    AddState,
    EndWith,
    Pad,
    PromptConfig,
    Spaces,
    StateStep,
    Take,
    Template,
    TextStep,
)

# pi0.5's.
STATE_PROMPT = Spaces(), Template("Task: {instruction}, State: {state};\nAction: ")


@dataclass(frozen=True)
class Around:
    """What is done before and after a model.

    Args:
        cameras: names of the images that are read, in order.
        prompt: how an instruction becomes token ids.
        state: what is done to the robot's state, which is not padded yet.
        actions: how the model's outputs become robot units.
        tokenizer: the name of the tokenizer's repository, or of a directory.
    """

    cameras: tuple[str, ...]
    prompt: PromptConfig
    state: tuple[StateStep, ...]
    actions: tuple[ActionStep, ...]
    tokenizer: str


@dataclass(frozen=True)
class Defaults:
    """What a family does where no processor files say it.

    Args:
        modes: how features of a kind are normalised.
        longest: token ids that are kept of a prompt.
        tokenizer: the repository that its tokenizer is in.
        steps: what is done to an instruction.
    """

    modes: dict[str, str]
    longest: int
    tokenizer: str
    steps: tuple[TextStep, ...] = (EndWith("\n"),)


def read_around(
    directory: Path, config: LeRobotConfig, tensors: TensorSet, choices: Choices, defaults: Defaults
) -> Around:
    """Everything around a model, checked.

    Raises:
        CheckpointError: files are missing, malformed, or do not fit the choices; statistics are missing.
    """
    processors = read_processors(directory)
    if processors is None:
        if config.data.get("use_relative_actions"):
            raise CheckpointError(
                f"{config.path}: use_relative_actions is set, and {directory} has no {BEFORE} that says which"
            )
        state, actions = _inside(config, tensors, choices.unnorm_key, defaults)
        prompt = PromptConfig(defaults.steps, config.number("tokenizer_max_length", defaults.longest))
        return Around(
            choose_cameras(config, config.cameras, choices.cameras),
            prompt,
            state,
            actions,
            _tokenizer(config, defaults),
        )
    names = [processors.renamed.get(feature, feature) for feature in config.cameras]
    normalizers = [_normalizer(processors, name) for name in (NORMALIZE, UNNORMALIZE)]
    statistics = [read_statistics(step.state_file, step.where) for step in normalizers]
    check_dataset(statistics, choices.unnorm_key)
    state_mode, action_mode = (
        _normalization(config, step, feature, defaults)
        for step, feature in zip(normalizers, (STATE, ACTION), strict=True)
    )
    return Around(
        choose_cameras(config, names, choices.cameras),
        _prompt(processors),
        _state(state_mode, statistics[0], choices.unnorm_key),
        (*_actions(config, action_mode, statistics[1], choices.unnorm_key), *_absolute(config, processors)),
        processors.tokenizer_name or _tokenizer(config, defaults),
    )


def padded(state: tuple[StateStep, ...], width: int) -> tuple[StateStep, ...]:
    """The steps of a state that a model reads as a vector of that width."""
    return (*state, Pad(width))


def find_tokenizer(directory: Path, given: Path | None, name: str, like: str) -> Path | None:
    """Where a policy's tokenizer is, which LeRobot leaves out of its directories; None for ``directory``.

    Args:
        directory: the checkpoint's.
        given: the user's choice.
        name: the repository that the checkpoint takes it from; only its ``tokenizer.json`` is downloaded.
        like: whose it is, for messages.

    Raises:
        CheckpointError: there is none, and it cannot be downloaded.
    """
    if given is not None or (directory / FILE).is_file():
        return given
    advice = f"{directory} has no {FILE}: put {like}'s there, or say where it is (--tokenizer)"
    if (Path(name) / FILE).is_file():
        return Path(name)
    if hub.parse(name) is None:
        raise CheckpointError(advice)
    try:
        found = hub.download(name, needed=[FILE]).directory
    except CheckpointError as problem:
        raise CheckpointError(f"{advice}; {problem}") from problem
    if not (found / FILE).is_file():
        raise CheckpointError(f"{advice}; {name} on the hub has none")
    return found


def _tokenizer(config: LeRobotConfig, defaults: Defaults) -> str:
    name = config.data.get("vlm_model_name")
    return name if isinstance(name, str) else defaults.tokenizer


def _prompt(processors: Processors) -> PromptConfig:
    order = [*processors.before]
    if STATE_TEXT not in order:
        steps = (EndWith("\n"),) if processors.new_line else ()
        return PromptConfig(steps, processors.longest)
    if order.index(STATE_TEXT) < order.index(NORMALIZE):
        raise CheckpointError(f"{processors.path} has {STATE_TEXT} before {NORMALIZE}, whose state it tells")
    return PromptConfig(STATE_PROMPT, processors.longest)


def _normalizer(processors: Processors, name: str) -> ProcessorStep:
    steps = processors.before if name == NORMALIZE else processors.after
    if name not in steps:
        raise CheckpointError(f"{processors.path.parent} has no {name} among its processors' steps")
    return steps[name]


def _normalization(
    config: LeRobotConfig, step: ProcessorStep, feature: str, defaults: Defaults
) -> Normalization:
    """How a normalizer's step treats a feature.

    Raises:
        CheckpointError: a mode is not known, or images are normalised by statistics.
    """
    modes, epsilon = step.config.get("norm_map", defaults.modes), step.config.get("eps", EPSILON)
    chosen = step.config.get("normalize_observation_keys")
    if not isinstance(modes, dict) or not isinstance(epsilon, int | float) or not 0 <= epsilon <= 1:
        raise CheckpointError(f"{step.where}: norm_map must be an object and eps a number from 0 to 1")
    mode = _mode(modes, feature, step.where)
    if feature == STATE and isinstance(chosen, list) and feature not in chosen:
        mode = IDENTITY
    width = config.action_dim if feature == ACTION else config.state_dim or config.padded_state
    return Normalization(feature, mode, width, float(epsilon))


def _mode(modes: dict[str, str], feature: str, where: str) -> str:
    if modes.get("VISUAL", IDENTITY) != IDENTITY:
        raise CheckpointError(
            f"{where}: images are normalised by {modes['VISUAL']}; supported is {IDENTITY}, as these "
            "families have it"
        )
    mode = modes.get("ACTION" if feature == ACTION else "STATE", IDENTITY)
    if mode not in MODES:
        raise CheckpointError(
            f"{where}: {feature} is normalised by {mode!r}; supported are {', '.join(MODES)}"
        )
    return mode


def _state(normalization: Normalization, statistics: Statistics, key: str | None) -> tuple[StateStep, ...]:
    step = normalization.step(statistics, key)
    return (identity(normalization.width) if step is None else step,)


def _actions(
    config: LeRobotConfig, normalization: Normalization, statistics: Statistics, key: str | None
) -> tuple[ActionStep, ...]:
    step = normalization.step(statistics, key)
    take = (Take(config.action_dim),) if config.action_dim < config.padded_action else ()
    return (*take, step) if step is not None else take


def _absolute(config: LeRobotConfig, processors: Processors) -> tuple[AddState, ...]:
    """What makes actions absolute that are relative to the robot's state, if they are.

    LeRobot adds the state that it saw last; here it is the one that the chunk was made for, which is what the
    policy was trained on.

    Raises:
        CheckpointError: names of joints are none.
    """
    step = processors.relative
    if step is None:
        return ()
    excluded, names = (step.config.get(key) or [] for key in ("exclude_joints", "action_names"))
    if not all(isinstance(each, list) for each in (excluded, names)):
        raise CheckpointError(f"{step.where}: exclude_joints and action_names must be lists of names")
    words = [str(word).lower() for word in excluded if word]
    kept = {i for i, name in enumerate(names) if any(word in str(name).lower() for word in words)}
    dimensions = tuple(i for i in range(config.action_dim) if i not in kept)
    state_dim = config.state_dim or config.padded_state
    if dimensions and dimensions[-1] >= state_dim:
        raise CheckpointError(
            f"{step.where}: actions are relative to a state of {state_dim} numbers, and action "
            f"{dimensions[-1]} has none in it"
        )
    return (AddState(dimensions),)


def _inside(
    config: LeRobotConfig, tensors: TensorSet, key: str | None, defaults: Defaults
) -> tuple[tuple[StateStep, ...], tuple[ActionStep, ...]]:
    """The steps of a checkpoint from before LeRobot 0.4.0, whose statistics are among its weights."""
    where = config.path
    modes = config.data.get("normalization_mapping", defaults.modes)
    if not isinstance(modes, dict):
        raise CheckpointError(f"{where}: normalization_mapping must be an object")
    features = (*config.cameras, STATE, ACTION)
    inputs, outputs = (statistics_inside(tensors, prefix, features) for prefix in (INPUTS, OUTPUTS))
    check_dataset((inputs, outputs), key)
    if key != NONE and not (inputs.groups or outputs.groups):
        raise CheckpointError(
            f"{tensors.where} has neither {BEFORE} nor statistics among its weights, by which states and "
            f"actions are normalised; unnorm_key {NONE} (--unnorm-key {NONE}) leaves them as the model has "
            "them"
        )
    width = config.state_dim or config.padded_state
    state = added_range(Normalization(STATE, _mode(modes, STATE, str(where)), width))
    action = Normalization(ACTION, _mode(modes, ACTION, str(where)), config.action_dim, epsilon=0.0)
    return (
        _state(state, inputs, key),
        _actions(config, action, outputs, key),
    )

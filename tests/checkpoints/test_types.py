"""Every family in every type it is published in: one defined result, whatever was filled or set before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import TINY, write_cogact, write_openvla, write_openvla_oft
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

import sqap
from sqap import Observation, Policy
from sqap.cli import app
from sqap.config import PolicyConfig
from sqap.errors import NonFiniteActionError
from sqap.models.storage import stored_bytes
from sqap.processing import Clamp, Range, stretched
from sqap.recipe import Override, Pruning, Quantization, Recipe, Scheme
from tests.families import family_config, random_model
from tests.torch_settings import SETTINGS

from .test_compress_published import write_frames

SIZES = dataclasses.replace(TINY, siglip_width=96, dino_depth=2, siglip_depth=2)
Write = Callable[[Path], None]


def recast(directory: Path, dtype: torch.dtype, pattern: str = "*") -> None:
    """Store the tensors whose names match in another type."""

    def cast(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if fnmatch(name, pattern) else value
        return {key: cast(key, item) for key, item in value.items()}

    for path in directory.rglob("*.safetensors"):
        save_file({name: cast(name, value) for name, value in load_file(path).items()}, path)
    for path in directory.rglob("*.pt"):
        torch.save(cast("", torch.load(path, weights_only=True)), path)


def write(base: Write, *casts: tuple[torch.dtype, str]) -> Write:
    def written(directory: Path) -> None:
        base(directory)
        for dtype, pattern in casts:
            recast(directory, dtype, pattern)

    return written


OPENVLA = partial(write_openvla, sizes=SIZES)
COGACT = partial(write_cogact, sizes=SIZES)
OFT = partial(write_openvla_oft, sizes=SIZES)
PUBLISHED: dict[str, Write] = {
    "cogact-bf16": COGACT,
    "cogact-fp32": write(COGACT, (torch.float32, "*")),
    "openvla-bf16": OPENVLA,
    "native-openvla-fp32": write(partial(COGACT, action_model=False), (torch.float32, "*")),
    "oft-bf16-head": OFT,
    "oft-fp32-head": write(OFT, (torch.float32, "module.*")),
    "oft-film": partial(OFT, platform="aloha", film=True),
}


def write_smolvla(directory: Path) -> None:
    """Our own layout: this family is not published in one that we read."""
    config = family_config("flow")
    bounds = (-1.0,) * 5, (1.0,) * 5, (True,) * 5
    actions, state = (Clamp(), Range(*(values[:4] for values in bounds))), (Range(*bounds), Clamp())
    images = tuple(stretched(vision.image_size) for vision in config.vision)
    policy = PolicyConfig("smolvla", config, ("front", "wrist"), images, actions, state=state)
    words = {"<unk>": 0, "open": 1, "the": 2, "drawer": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Policy(random_model(config), policy, tokenizer).save(directory)


MIXED: dict[str, Write] = {
    "fp32-norms": write(OPENVLA, (torch.float32, "*norm*")),
    "fp32-lm_head": write(OPENVLA, (torch.float32, "*lm_head*")),
    "fp32-layer": write(COGACT, (torch.float32, "*layers.1.*")),
    "oft-fp16-vision": write(OFT, (torch.float16, "vision_backbone*")),
    "openvla-fp64-projector": write(OPENVLA, (torch.float64, "projector*")),
    "fp32-table": write(OPENVLA, (torch.float32, "*embed_tokens*")),
}
WRITERS = PUBLISHED | MIXED | {"smolvla": write_smolvla}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``directory("cogact-fp32")``: one of `WRITERS`, to be read only."""
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = tmp_path_factory.mktemp("types") / name
            WRITERS[name](found[name])
        return found[name]

    return get


def load(path: Path) -> Policy:
    several = "openvla" in path.name or "cogact" in path.name or "fp32" in path.name
    return sqap.load(path, unnorm_key="bridge_orig" if several and "oft" not in path.name else None)


def observe(policy: Policy, seed: int = 0) -> Observation:
    rng, config = np.random.default_rng(seed), policy.config
    images = {camera: rng.integers(0, 256, (64, 80, 3), dtype=np.uint8) for camera in config.cameras}
    state = rng.standard_normal(config.state_dim) if config.state_dim else None
    return Observation(images, "open the drawer", state)


def state(policy: Policy) -> dict[str, Tensor]:
    policy.load_weights()
    return policy.model.state_dict()


def same(a: Policy, b: Policy) -> bool:
    """Whether two policies are equal, bit for bit and in their types."""
    one, two = state(a), state(b)
    equal = all(
        torch.equal(value, two[name]) and value.dtype == two[name].dtype for name, value in one.items()
    )
    return equal and one.keys() == two.keys() and a.calibration == b.calibration


W4A8 = dataclasses.replace(Recipe.w4a8(), pruning=Pruning())  # of three layers, it cuts behind the second
assert W4A8.quantization is not None
NEAREST = dataclasses.replace(W4A8.quantization, rounding="nearest", clip=False)
PRUNED = Pruning(keep_ratio=0.5)
RECIPES = {"gptq": W4A8, "nearest": Recipe(NEAREST, PRUNED), "pruned": Recipe(pruning=PRUNED)}
CASES = [(name, "nearest") for name in WRITERS] + [("cogact-fp32", "gptq"), ("oft-fp32-head", "gptq")]
CASES += [("oft-bf16-head", "pruned"), ("fp32-norms", "pruned")]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_what_compress_returns_depends_on_the_files_alone(
    directory: Callable[[str], Path], tmp_path: Path, name: str, recipe: str
) -> None:
    """Not on whether the original has acted; and it acts as it does once it is saved and loaded."""
    fresh, acted = load(directory(name)), load(directory(name))
    frames = [observe(fresh, seed) for seed in range(2)]
    acted.act(frames[0], seed=0)
    small, again = (sqap.compress(policy, RECIPES[recipe], frames) for policy in (fresh, acted))
    assert same(small, again)
    small.save(tmp_path / "small")
    loaded = sqap.load(tmp_path / "small")
    assert same(small, loaded)
    floats = {
        p.dtype for name, p in small.model.named_parameters() if not name.endswith("embed_tokens.weight")
    }
    assert floats == {torch.float32}
    assert np.array_equal(small.act(frames[1], seed=1), loaded.act(frames[1], seed=1))


def test_pruning_alone_leaves_the_weights_on_disk(directory: Callable[[str], Path], tmp_path: Path) -> None:
    policy = load(directory("openvla-bf16"))
    small = sqap.compress(policy, RECIPES["pruned"], [observe(policy)])
    small.save(tmp_path / "small")
    assert all(p.is_meta for either in (policy, small) for p in either.model.parameters())
    assert small.step(observe(policy), seed=0).selection is not None


def use(path: Path, out: Path, recipe: Recipe) -> tuple[dict[str, Tensor], list[np.ndarray]]:
    """What a compressed policy is, and how the original and it act, through the public face."""
    policy = load(path)
    frames = [observe(policy, seed) for seed in range(2)]
    small = sqap.compress(policy, recipe, frames)
    small.save(out)
    actors = policy, small, sqap.load(out)
    return state(small), [actor.act(frames[1], seed=3) for actor in actors]


@pytest.fixture(scope="session")
def expected(
    directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[dict[str, Tensor], list[np.ndarray]]]:
    """``expected(name, recipe)``: `use` under PyTorch's own settings."""

    @cache
    def get(name: str, recipe: str) -> tuple[dict[str, Tensor], list[np.ndarray]]:
        return use(directory(name), tmp_path_factory.mktemp("expected") / "small", RECIPES[recipe])

    return get


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("name", "recipe"),
    [("smolvla", "gptq"), ("openvla-bf16", "nearest"), ("cogact-bf16", "nearest"), ("oft-film", "nearest")],
)
def test_no_setting_of_the_callers_changes_anything(
    directory: Callable[[str], Path],
    expected: Callable[[str, str], tuple[dict[str, Tensor], list[np.ndarray]]],
    tmp_path: Path,
    setting: str,
    name: str,
    recipe: str,
) -> None:
    wanted, chunks = expected(name, recipe)
    with SETTINGS[setting]():
        found, acted = use(directory(name), tmp_path / "small", RECIPES[recipe])
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key
        assert value.dtype == wanted[key].dtype, key
        assert not value.is_inference(), key
    assert all(np.array_equal(a, b) for a, b in zip(acted, chunks, strict=True))


def test_a_compressed_policy_can_be_changed_and_reloaded(directory: Callable[[str], Path]) -> None:
    policy = load(directory("cogact-bf16"))
    frames = [observe(policy)]
    small = sqap.compress(policy, RECIPES["gptq"], frames)
    before = small.act(frames[0], seed=0)
    kept = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    for tensor in small.model.state_dict().values():
        tensor.zero_()
    small.model.load_state_dict(kept)
    assert np.array_equal(small.act(frames[0], seed=0), before)
    for parameter in policy.model.parameters():
        assert not parameter.is_inference()


@pytest.mark.parametrize("command", ["sensitivity", "--target-bytes", "--target-error"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_commands_take_every_family_in_every_type(
    directory: Callable[[str], Path], tmp_path: Path, name: str, command: str
) -> None:
    """The original acts in its own types, its candidates in float32."""
    policy = load(directory(name))
    spared = (Override("decoder.layers.[12].*"),)  # so that it is quick
    quantization = Quantization(Scheme(4, 8), head=Scheme(4, 8), overrides=spared, rotate=False)
    (tmp_path / "recipe.json").write_text(json.dumps(Recipe(quantization).to_json()))
    write_frames(tmp_path / "frames", policy.config.cameras, policy.config.state_dim or None)
    if command == "sensitivity":
        arguments = ["sensitivity", str(directory(name))]
    else:
        value = str(stored_bytes(policy.model)) if command == "--target-bytes" else "1000"
        arguments = ["compress", str(directory(name)), command, value, "--out", str(tmp_path / "small")]
    arguments += ["--recipe", str(tmp_path / "recipe.json"), "--frames-from", str(tmp_path / "frames")]
    arguments += ["--frames", "2", "--json", str(tmp_path / "numbers.json")]
    arguments += [] if "oft" in name else ["--unnorm-key", "bridge_orig"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "numbers.json").read_text())
    if command != "sensitivity":
        sqap.load(tmp_path / "small").act(observe(policy), seed=0)


def test_an_action_token_of_logits_that_are_not_finite_is_none(directory: Callable[[str], Path]) -> None:
    """The largest of NaNs is a token like any other, and would be an action like any other."""
    policy = load(directory("openvla-bf16"))
    policy.load_weights()
    policy.model.state_dict()["head.lm_head.weight"].fill_(torch.finfo(torch.bfloat16).max)
    with pytest.raises(NonFiniteActionError, match="dimension 0 of action 0 would be nan"):
        policy.act(observe(policy))

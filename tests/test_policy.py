"""The public face: an observation in, a chunk of actions in robot units out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from sqap import Camera, Observation, Policy
from sqap.errors import InputError, NonFiniteActionError
from sqap.observation import hash_frames
from sqap.processing import (
    Binarize,
    Clamp,
    Crop,
    Range,
    ResizeWithPad,
    Scale,
    cropped,
    pixel_values,
    stretched,
    unnormalize,
)
from sqap.recipe import Pruning, Recipe

CAMERA = "corner2"


def test_act_gives_a_chunk_in_robot_units(policy, observe):
    chunk = policy.act(observe(), seed=0)
    assert chunk.shape == (8, 4)
    assert chunk.dtype == np.float32
    low, high = np.array([-0.5, -0.5, -0.5, -1]), np.array([0.5, 1, 2, 1])
    assert (chunk >= low).all()
    assert (chunk <= high).all()


def test_the_seed_decides_the_noise_and_nothing_else_does(policy, observe):
    first = policy.act(observe(), seed=3)
    torch.manual_seed(99)
    assert np.array_equal(policy.act(observe(), seed=3), first)
    assert not np.array_equal(policy.act(observe(), seed=4), first)
    assert not np.array_equal(policy.act(observe()), policy.act(observe()))


def test_the_instruction_and_the_image_matter(policy, observe):
    base = policy.act(observe(), seed=0)
    assert not np.array_equal(policy.act(observe(instruction="close the drawer"), seed=0), base)
    assert not np.array_equal(policy.act(observe(1), seed=0), base)


def test_case_and_spaces_around_an_instruction_do_not_matter(policy, observe):
    base = policy.act(observe(), seed=0)
    assert np.array_equal(policy.act(observe(instruction="  Open the DRAWER "), seed=0), base)


def test_a_tokenizer_that_panics_is_a_sentence(policy, observe):
    """Its template names a token that it does not have: the library's Rust panics, which is no Exception."""
    written = json.loads(policy.tokenizer.to_str())
    written["post_processor"]["special_tokens"] = {}
    broken = dataclasses.replace(policy, tokenizer=Tokenizer.from_str(json.dumps(written)))
    with pytest.raises(InputError, match="the tokenizer cannot encode 'open the drawer'"):
        broken.act(observe(), seed=0)


def test_a_missing_camera_is_named(policy, observe):
    image = observe().images["corner2"]
    with pytest.raises(InputError, match=r"reads camera 'corner2'.*\['wrist'\]"):
        policy.act(Observation({"wrist": image}, "open the drawer"))


def test_an_uncompressed_policy_keeps_every_token(policy, observe):
    assert policy.step(observe(), seed=0).selection is None


LISTS = {
    "whole": stretched(32),
    "crop of 0.9": cropped(stretched(32), 0.9),
    "crop of 0.5": cropped(stretched(32), 0.5),
    "padded as SmolVLA's": (Scale(), ResizeWithPad(32, "bottom_right")),
    "padded as pi0's": (Scale(), ResizeWithPad(32, "center")),
    "padded, of a crop": (Crop(0.6), Scale(), ResizeWithPad(32, "bottom_right")),
}


@pytest.mark.parametrize("steps", LISTS)
@pytest.mark.parametrize("shape", [(256, 256), (180, 320)])
@pytest.mark.parametrize("place", [(0.55, 0.3), (0.7, 0.65)])
def test_the_ring_is_where_the_gripper_is_in_what_the_policy_looks_at(policy, observe, steps, shape, place):
    """A white dot on a black image, in the pixels that the model is given."""
    (height, width), (u, v) = shape, place
    rows, columns = (np.arange(n) + 0.5 for n in shape)
    dot = np.hypot((rows / height - v)[:, None], columns / width - u) < 0.06
    image = np.repeat(dot[..., None] * np.uint8(255), 3, axis=2)
    camera = Camera(np.array([[width, 0, u * width], [0, height, v * height], [0, 0, 1]]), np.eye(4))
    observation = dataclasses.replace(
        observe(), images={CAMERA: image}, cameras={CAMERA: camera}, end_effector=np.array([0, 0, 1.0])
    )
    config = dataclasses.replace(policy.config, images=(LISTS[steps],))
    pruned = Policy(
        policy.model, config, policy.tokenizer, Recipe(pruning=Pruning(keep_ratio=0.5, after_layer=1))
    )

    target = pruned.step(observation, seed=0).selection.target

    seen = pruned.pixels(observation)[0][0].mean(0)
    seen = (seen - seen.min()).numpy()
    places = (np.arange(len(seen)) + 0.5) / len(seen)
    shown = [(seen.sum(axis) * places).sum() / seen.sum() for axis in (0, 1)]
    # Padding interpolates without antialiasing: of a small dot, every fifth pixel counts.
    tolerance = 0.5 if "padded" in steps else 0.25
    assert target == pytest.approx(shown, abs=tolerance / len(seen))


def test_unnormalize_follows_cogact():
    """0.5 (a + 1)(q99 - q01) + q01 after clipping; the gripper is decided before; unmasked is as it is."""
    bounds = Range((-2.0, 0.0, 0.0), (4.0, 1.0, 1.0), (True, True, False))
    actions = np.array([[-1.0, 0.0, 0.49], [3.0, -0.5, 0.5]])
    expected = np.array([[-2.0, 0.5, 0.0], [4.0, 0.25, 1.0]])
    np.testing.assert_allclose(unnormalize(actions, (Clamp(), Binarize((2,)), bounds)), expected)


def test_pixels_are_normalized_per_channel(policy: Policy):
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 1] = 255
    pixels = pixel_values(image, policy.config.images[0])
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels[0, :, 5, 5], torch.tensor([-1.0, 1.0, -1.0]))


def test_other_image_sizes_are_resized(policy: Policy, observe):
    big = np.kron(observe().images["corner2"], np.ones((3, 3, 1), np.uint8))
    assert pixel_values(big, policy.config.images[0]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("ids", "sentence"), [([1, 8, 2], "makes token 8 .* up to 7"), ([1], "makes 1 tokens .* 2 are needed")]
)
def test_tokens_that_the_model_cannot_read_are_refused(policy, observe, ids, sentence):
    words = [f"<{i}>" for i in range(len(ids))]
    policy.tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(words), special_tokens=[*zip(words, ids, strict=True)]
    )
    with pytest.raises(InputError, match=sentence):
        policy.act(observe(), seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("binarize", [(), (Binarize((3,)),)])
def test_actions_that_are_not_finite_are_never_returned(policy, observe, value, binarize):
    """Clipping would make full scale of an infinity, and a binarized NaN would be 0."""
    clip, bounds = policy.config.actions
    policy.config = dataclasses.replace(policy.config, actions=(clip, *binarize, bounds))
    policy.model.head.final_layer.bias.data[3] = value
    with pytest.raises(NonFiniteActionError, match=r"dimension . of action 0 would be nan, which no robot"):
        policy.act(observe(), seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("binarize", [(), (Binarize((3,)),)])
def test_one_number_that_is_not_finite_is_named(policy, observe, value, binarize):
    """Of the model's output: what it becomes in robot units may be finite."""
    clip, bounds = policy.config.actions
    policy.config = dataclasses.replace(policy.config, actions=(clip, *binarize, bounds))
    chunk = torch.zeros(1, 8, 4)
    chunk[0, 0, 3] = value
    policy.model.head.sample = lambda condition, noise: chunk
    with pytest.raises(NonFiniteActionError, match=rf"dimension 3 of action 0 would be {value}, which no"):
        policy.act(observe(), seed=0)
    chunk[0, 0, 3] = 1
    assert np.isfinite(policy.act(observe(), seed=0)).all()


def test_statistics_that_are_not_finite_lead_nowhere(policy, observe):
    clip, bounds = policy.config.actions
    actions = clip, dataclasses.replace(bounds, high=(np.nan, 1.0, 2.0, 1.0))
    policy.config = dataclasses.replace(policy.config, actions=actions)
    with pytest.raises(NonFiniteActionError, match="dimension 0"):
        policy.act(observe(), seed=0)


def test_frames_are_told_apart_by_shapes_and_where_texts_end(observe):
    image = np.zeros((128, 128, 3), np.uint8)
    frames = [
        [Observation({"a": image}, "go")],
        [Observation({"a": image.reshape(64, 256, 3)}, "go")],
        [Observation({"aa": image}, "g" + "o")],
        [Observation({"a": image}, "goa")],
        [Observation({"a": image}, "go", np.zeros(2))],
        [Observation({"a": image}, "go", np.zeros(4))],
        [Observation({"a": image}, "go"), Observation({"a": image}, "go")],
    ]
    assert len({hash_frames(each) for each in frames}) == len(frames)

"""compress(): quantized, pruned, calibrated; the original untouched."""

import copy
import dataclasses
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import sqap
from sqap import Recipe
from sqap.build import build_id
from sqap.errors import CheckpointError, InputError
from sqap.models.stages import stages
from sqap.processing import ActionUnits, Clamp, PromptConfig, Template, cropped, stretched
from sqap.quantization import Partial, list_linears
from sqap.recipe import Pruning, PruningMethod, Quantization, Scheme
from tests.torch_settings import SETTINGS


@pytest.fixture
def frames(observe):
    return [observe(seed) for seed in range(3)]


def test_the_presets_pack_all_linears_but_the_actions_own(policy, frames):
    for recipe, stored in (
        (Recipe.w4a8(), torch.uint8),
        (Recipe.w4a4(), torch.uint8),
        (Recipe.w8a8(), torch.int8),
    ):
        small = sqap.compress(policy, recipe, frames)
        floats = [r.name for r in list_linears(small.model) if not r.quantized]
        assert floats == ["head.x_embedder", "head.final_layer"]
        assert small.model.decoder.layers[0].mlp.up_proj.weight.dtype == stored


def test_the_paper_packs_the_decoder_and_nothing_else(policy, frames):
    reports = list_linears(sqap.compress(policy, Recipe.paper(), frames).model)
    assert {r.part for r in reports if r.quantized} == {"decoder"}
    assert all(r.quantized for r in reports if r.part == "decoder")


def test_an_interrupted_compression_leaves_what_it_has_and_a_finished_one_nothing(policy, frames, tmp_path):
    place = tmp_path / "partial"
    assert len(interrupted(policy, frames, place)) == 2
    resumed = sqap.compress(policy, Recipe.w4a8(), frames, resume=place).model.state_dict()
    assert not place.exists()
    whole = sqap.compress(policy, Recipe.w4a8(), frames).model.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def interrupted(policy, frames, place, stages=2, recipe=None):
    """Leave ``stages`` finished ones in ``place``."""

    def interrupt(done, total):
        if len(list(place.glob("*.safetensors"))) == stages:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sqap.compress(policy, recipe or Recipe.w4a8(), frames, progress=interrupt, resume=place)
    return {path.name: path.read_bytes() for path in place.glob("*.safetensors")}


@pytest.mark.parametrize("recipe", [Recipe.w4a8(), Recipe.paper(), Recipe.w4a8(keep=1)])
def test_progress_counts_ranking_tokens_and_quantizing_together(policy, frames, recipe, tmp_path):
    shares, finished = [], []

    def note(done, total):
        shares.append(done / total)
        finished.append(len(list(tmp_path.glob("*.safetensors"))))

    sqap.compress(policy, recipe, frames, progress=note, resume=tmp_path)
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares.index(1) == len(shares) - 1
    ranked = recipe.pruning is not None  # before the first stage is quantized, and behind the last one
    assert (finished[0] == 0) == (finished[-2] == finished[-1]) == ranked


def changed(policy, **config):
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, **config))


def other_tokenizer(policy):
    data = json.loads(policy.tokenizer.to_str())
    words = data["model"]["vocab"]
    words["open"], words["close"] = words["close"], words["open"]
    return dataclasses.replace(policy, tokenizer=Tokenizer.from_str(json.dumps(data)))


def other_weights(policy):
    model = copy.deepcopy(policy.model)
    model.head.final_layer.weight.data[0, 0] += 1
    return dataclasses.replace(policy, model=model)


OTHERS = {
    "crop": lambda policy: changed(policy, images=(cropped(stretched(32), 0.5),)),
    "prompt": lambda policy: changed(policy, prompt=PromptConfig((Template("please {instruction}"),))),
    "appended tokens": lambda policy: changed(policy, prompt=PromptConfig(append=(5,))),
    "statistics": lambda policy: changed(
        policy, actions=(Clamp(), dataclasses.replace(policy.config.actions[1], high=(0.5, 1.0, 2.5, 1.0)))
    ),
    "units": lambda policy: changed(policy, units=ActionUnits((0, 1, 2), 10.0)),
    "tokenizer": other_tokenizer,
    "weights": other_weights,
}


@pytest.mark.parametrize("name", OTHERS)
def test_stages_of_another_policy_are_discarded_with_a_warning(policy, frames, tmp_path, caplog, name):
    place = tmp_path / "partial"
    interrupted(policy, frames, place)
    assert len(interrupted(OTHERS[name](policy), frames, place, stages=1)) == 1
    assert "stages of another compression" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "seeds"),
    [
        (Recipe(Quantization(Scheme(4, 8), clip=False)), (0, 1, 2)),
        (Recipe.w4a8(keep=0.5), (0, 1, 2)),
        (Recipe.w4a8(), (0, 1, 3)),
        (Recipe.w4a8(), (0, 2, 1)),
        (Recipe.w4a8(), (0, 1)),
    ],
)
def test_stages_of_another_recipe_or_other_frames_are_discarded(
    policy, frames, observe, tmp_path, caplog, recipe, seeds
):
    place, others = tmp_path / "partial", [observe(seed) for seed in seeds]
    assert len(interrupted(policy, frames, place)) == 2
    assert len(interrupted(policy, others, place, stages=1, recipe=recipe)) == 1
    assert "stages of another compression" in caplog.text


def test_the_order_of_cameras_is_part_of_the_key(policy, observe, tmp_path, caplog):
    config = dataclasses.replace(policy.config.model, cameras=2)
    model = type(policy.model)(config)
    model.load_state_dict(policy.model.state_dict())
    two = dataclasses.replace(changed(policy, model=config, cameras=("left", "right")), model=model)
    images = {"left": observe(0).images["corner2"], "right": observe(1).images["corner2"]}
    frames = [dataclasses.replace(observe(), images=images, cameras={})]
    interrupted(two, frames, tmp_path / "p")
    assert len(interrupted(changed(two, cameras=("right", "left")), frames, tmp_path / "p", stages=1)) == 1
    assert "stages of another compression" in caplog.text


@pytest.mark.parametrize("changed_part", ["package", "kernels", "torch", "sqap"])
def test_stages_of_other_code_are_discarded(policy, frames, tmp_path, caplog, monkeypatch, changed_part):
    interrupted(policy, frames, tmp_path / "p")
    build = build_id()
    monkeypatch.setattr(sys.modules["sqap.compress"], "build_id", lambda: build | {changed_part: "another"})
    assert len(interrupted(policy, frames, tmp_path / "p", stages=1)) == 1
    assert "stages of another compression" in caplog.text


def test_a_directory_of_somebody_else_is_refused_and_kept(policy, frames, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty, and no compression has left it"):
        sqap.compress(policy, Recipe.w4a8(), frames, resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_compression_into_one_directory_is_refused_until_the_first_is_done(policy, frames, tmp_path):
    """Also one that keeps no stages, and also by the same process."""
    place = tmp_path / "partial"

    def second(done, total):
        for recipe in (Recipe.w4a8(), Recipe(pruning=Pruning(method="random"))):
            with pytest.raises(InputError, match=f"process {os.getpid()} is compressing to the same place"):
                sqap.compress(policy, recipe, frames, resume=place)

    sqap.compress(policy, Recipe.w4a8(keep=1), frames, resume=place, progress=second)
    assert not place.exists()


def test_a_partial_is_left_to_the_caller(policy, frames, tmp_path):
    with Partial(tmp_path / "p") as partial:
        sqap.compress(policy, Recipe.w4a8(keep=1), frames, resume=partial)
        assert len(list((tmp_path / "p").glob("*.safetensors"))) == len(list(stages(policy.model)))
        partial.remove()
    assert not (tmp_path / "p").exists()


class OnDisk:
    """The weights of a policy as if they were in files; remembers what was read together."""

    fingerprint, where = "abc", "files"

    def __init__(self, model):
        self.tensors = {name: value.clone() for name, value in model.state_dict().items()}
        self.reads = []

    def read(self, names):
        self.reads.append(list(names))
        return {name: self.tensors[name].clone() for name in self.reads[-1]}


def on_disk(policy):
    with torch.device("meta"):
        model = type(policy.model)(policy.config.model)
    return sqap.Policy(model, policy.config, policy.tokenizer, weights=OnDisk(policy.model))


@pytest.mark.parametrize("recipe", [Recipe.w4a8(), Recipe.paper(), Recipe(pruning=Pruning())])
def test_a_policy_on_disk_is_compressed_as_if_it_were_in_memory(policy, frames, recipe):
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected, lazy = sqap.compress(policy, recipe, frames), on_disk(policy)
    found = sqap.compress(lazy, recipe, frames)
    assert found.calibration == expected.calibration
    assert found.source == "abc"
    found.load_weights()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


def test_compressing_from_disk_reads_one_stage_at_a_time(policy, frames):
    lazy = on_disk(policy)
    sqap.compress(lazy, Recipe.w4a8(), frames)
    for names in lazy.weights.reads:
        inside = [name for name, _ in stages(policy.model) if any(n.startswith(f"{name}.") for n in names)]
        assert len(inside) <= 1, names
    read = [name for names in lazy.weights.reads for name in names]
    assert set(read) == set(lazy.weights.tensors)


def test_a_policy_on_disk_acts_and_is_saved_as_if_it_were_in_memory(policy, observe, tmp_path):
    lazy = on_disk(policy)
    assert np.array_equal(lazy.act(observe(), seed=0), policy.act(observe(), seed=0))
    read = [name for names in lazy.weights.reads for name in names]
    assert sorted(read) == sorted(lazy.weights.tensors)
    reads = len(lazy.weights.reads)
    lazy.act(observe(), seed=0)
    assert len(lazy.weights.reads) == reads
    on_disk(policy).save(tmp_path / "lazy")
    policy.save(tmp_path / "policy")
    for name in ("policy.json", "model.safetensors"):
        assert (tmp_path / "lazy" / name).read_bytes() == (tmp_path / "policy" / name).read_bytes()


def test_calibration_without_ranking_only_remembers_its_frames(policy, frames):
    calibration = sqap.compress(policy, Recipe.w4a8(keep=1), frames).calibration
    assert (calibration.frames, calibration.top_k, calibration.overlap) == (3, None, None)


def test_gptq_needs_frames(policy):
    with pytest.raises(InputError, match="'gptq' calibrates on frames; give at least one"):
        sqap.compress(policy, Recipe.w4a8(keep=1))


def test_frames_of_another_camera_are_refused(policy, frames):
    other = dataclasses.replace(frames[0], images={"wrist": frames[0].images["corner2"]}, cameras={})
    with pytest.raises(InputError, match=r"reads camera 'corner2'; the observation has .*wrist"):
        sqap.compress(policy, Recipe.w4a8(), [*frames, other])


def test_the_original_is_left_alone(policy, frames, observe):
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    action = policy.act(observe(), seed=0)
    sqap.compress(policy, Recipe.paper(), frames)
    assert all(torch.equal(before[k], v) for k, v in policy.model.state_dict().items())
    assert np.array_equal(policy.act(observe(), seed=0), action)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("method", get_args(PruningMethod))
def test_exactly_the_budget_is_kept(policy, frames, observe, keep, method):
    small = sqap.compress(policy, Recipe(pruning=Pruning(keep_ratio=keep, method=method)), frames)
    assert len(small.step(observe(7), seed=1).selection.kept) == round(keep * 16)


@pytest.mark.parametrize("method", get_args(PruningMethod))
def test_every_method_keeps_the_same_under_any_setting_of_the_callers(policy, frames, observe, method):
    recipe = Recipe(pruning=Pruning(keep_ratio=0.6, method=method))

    def act():
        small = sqap.compress(policy, recipe, frames)
        return small.calibration, small.step(observe(7), seed=1)

    calibration, wanted = act()
    for name, setting in SETTINGS.items():
        with setting():
            calibrated, step = act()
        assert np.array_equal(step.chunk, wanted.chunk), name
        assert torch.equal(step.selection.kept, wanted.selection.kept), name
        assert calibrated == calibration, name


def test_eight_bits_stay_closer_than_four(policy, frames, observe):
    """Each fewer bit costs; all stay near the original."""
    full = policy.act(observe(5), seed=0)

    def error(quantization):
        small = sqap.compress(policy, Recipe(quantization), frames)
        return np.abs(small.act(observe(5), seed=0) - full).max()

    assert error(Quantization(Scheme(8, 8))) < error(Quantization(Scheme(4, 8))) < 0.5


def test_calibration_says_how_far_attention_is_trusted(policy, frames):
    calibration = sqap.compress(policy, Recipe.w4a4(keep=0.5), frames).calibration
    assert calibration.frames == 3
    assert 0 <= calibration.top_k <= round(0.5 * Pruning().top_share * 16)
    assert calibration.overlap >= Pruning().overlap or calibration.top_k == 0


def test_unquantized_attention_is_trusted_with_its_whole_share(policy, frames):
    rounded = copy.deepcopy(policy)
    for p in rounded.model.parameters():
        p.data = p.data.bfloat16().float()
    pruning = Pruning(keep_ratio=0.5)
    calibration = sqap.compress(rounded, Recipe(pruning=pruning), frames).calibration
    assert (calibration.top_k, calibration.overlap) == (round(pruning.top_share * 8), 1.0)


def test_the_frames_are_hashed(policy, observe):
    one = sqap.compress(policy, Recipe.w4a8(), [observe(0)]).calibration.frames_hash
    same = sqap.compress(policy, Recipe.w4a8(), [observe(0)]).calibration.frames_hash
    other = sqap.compress(policy, Recipe.w4a8(), [observe(1)]).calibration.frames_hash
    assert one == same != other


def test_without_camera_the_ring_is_skipped_with_one_warning(policy, frames, observe, caplog):
    small = sqap.compress(policy, Recipe(pruning=Pruning(method="sqap")), frames)
    for seed in range(3):
        selection = small.step(observe(seed, calibrated=False), seed=0).selection
        assert not selection.ring.any()
        assert len(selection.kept) == 10
    assert len(caplog.records) == 1


def test_the_sqap_method_needs_frames(policy):
    with pytest.raises(InputError, match="give at least one frame"):
        sqap.compress(policy, Recipe(pruning=Pruning(method="sqap")))


def test_compressing_twice_is_refused(policy, frames):
    small = sqap.compress(policy, Recipe.w4a8(), frames)
    with pytest.raises(InputError, match="compressed already"):
        sqap.compress(small, Recipe.w4a8(), frames)


def test_a_group_size_that_does_not_divide_names_the_linear(policy, frames):
    recipe = Recipe(Quantization(Scheme(weight_granularity="group", group_size=24)))
    with pytest.raises(InputError, match=r"q_proj.*24"):
        sqap.compress(policy, recipe, frames)


def test_a_keep_ratio_that_keeps_nothing_is_refused(policy, frames):
    with pytest.raises(InputError, match="keeps none of 16"):
        sqap.compress(policy, Recipe(pruning=Pruning(keep_ratio=0.01)), frames)


def test_pruning_after_the_last_layer_is_refused(policy, frames):
    recipe = dataclasses.replace(Recipe.w4a8(), pruning=Pruning(after_layer=4))
    with pytest.raises(InputError, match="the decoder has 4 layers"):
        sqap.compress(policy, recipe, frames)


TENSORS = (
    "decoder.embed_tokens.weight",
    "decoder.norm.weight",
    "vision.0.pos_embed",
    "vision.0.patch_embed.weight",
    "projector.layers.0.bias",
    "head.x_embedder.weight",
    "head.positional_embedding",
)


@pytest.mark.parametrize("name", TENSORS)
def test_weights_that_are_not_finite_are_named(policy, frames, observe, name, tmp_path):
    """Those that no grid would refuse, too: in memory, on disk, and in a policy of our own."""
    policy.model.state_dict()[name].view(-1)[3] = float("nan")
    with pytest.raises(InputError, match=rf"{name} holds values that are not finite"):
        sqap.compress(policy, Recipe.paper(), frames)
    for use in (
        lambda lazy: lazy.act(observe(), seed=0),
        lambda lazy: sqap.compress(lazy, Recipe.paper(), frames),
        lambda lazy: lazy.save(tmp_path / "lazy"),
    ):
        with pytest.raises(CheckpointError, match=rf"files: {name} holds values that are not finite"):
            use(on_disk(policy))
    policy.save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {name} holds values that are not finite"):
        sqap.load(tmp_path / "policy")


def test_weights_too_large_for_what_they_are_stored_in_are_named(policy, frames):
    policy.model.decoder.norm.weight.data[0] = torch.finfo(torch.float32).max
    with pytest.raises(InputError, match=r"not finite"):
        sqap.compress(policy, Recipe(pruning=Pruning(method="uniform")), frames)


def test_threads_that_act_first_wait_for_all_weights(policy, observe):
    lazy = on_disk(policy)
    with ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(lambda _: lazy.act(observe(), seed=0), range(4)))
    assert all(np.array_equal(chunk, policy.act(observe(), seed=0)) for chunk in chunks)
    read = [name for names in lazy.weights.reads for name in names]
    assert sorted(read) == sorted(lazy.weights.tensors)


def test_loading_weights_tells_how_far_it_is(policy):
    lazy, seen = on_disk(policy), []
    lazy.load_weights(lambda done, total: seen.append((done, total)))
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert len(seen) > 3

"""sqap's own directory: bit-identical after a round trip, and suspicious of everything else."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import sqap
from sqap import Recipe, files
from sqap.checkpoints import native, place
from sqap.errors import CheckpointError
from sqap.processing import cropped, stretched
from sqap.recipe import Pruning, Quantization, Scheme

GROUPS = Recipe(
    Quantization(
        Scheme(weight_granularity="group", group_size=8, activation_granularity="tensor"), rotate=False
    )
)
RECIPES = {
    "empty": Recipe(),
    "w4a8": Recipe.w4a8(),
    "paper": Recipe.paper(),
    "w8a8": Recipe(Quantization(Scheme(8, 8))),
    "groups": GROUPS,
    "pruned": Recipe(pruning=Pruning(method="random")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_policy_gives_bit_identical_actions(policy, observe, tmp_path, name):
    small = sqap.compress(policy, RECIPES[name], [observe(0)])
    small.save(tmp_path / "small")
    loaded = sqap.load(tmp_path / "small")
    assert loaded.recipe == RECIPES[name]
    assert loaded.calibration == small.calibration
    for seed in range(3):
        assert np.array_equal(loaded.act(observe(seed), seed=seed), small.act(observe(seed), seed=seed))


def test_a_compressed_policy_remembers_what_it_was_made_from(saved, observe, tmp_path):
    small = sqap.compress(sqap.load(saved), Recipe.w4a8(), [observe()])
    small.save(tmp_path / "small")
    assert sqap.load(tmp_path / "small").source == native.fingerprint(saved)


def test_a_policy_whose_recipe_is_of_version_1_acts_as_ever(policy, observe, tmp_path):
    """All was quantized, sensitive linears too, and the decoder's grids had no name of their own."""
    eight = Scheme(8, 8)
    quantization = Quantization(eight, eight, eight, eight, sensitive=eight)
    small = sqap.compress(policy, Recipe(quantization), [observe(0)])
    small.save(tmp_path / "small")
    path = tmp_path / "small" / "policy.json"
    data = json.loads(path.read_text())
    data["recipe"]["version"] = 1
    data["recipe"]["quantization"] |= data["recipe"]["quantization"].pop("decoder")
    del data["recipe"]["quantization"]["sensitive"]
    path.write_text(json.dumps(data))
    loaded = sqap.load(tmp_path / "small")
    assert loaded.recipe == Recipe(quantization)
    assert np.array_equal(loaded.act(observe(1), seed=1), small.act(observe(1), seed=1))


def test_four_bits_are_half_a_byte_on_disk(policy, observe, tmp_path):
    sqap.compress(policy, Recipe.w4a8(), [observe()]).save(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    weight = tensors["decoder.layers.0.mlp.down_proj.weight"]
    assert weight.shape == (32, 64 // 2)
    assert weight.element_size() == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_refused(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} is truncated or was altered"):
        sqap.load(saved)


def test_an_altered_byte_is_refused(saved):
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        sqap.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"incomplete: {name} is missing"):
        sqap.load(saved)


def test_foreign_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no policy at"):
        sqap.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="of no family that sqap knows: it is empty"):
        sqap.load(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe an sqap policy"):
        sqap.load(tmp_path)
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        sqap.load(tmp_path)


def edit(directory: Path, **changes: object) -> None:
    manifest = json.loads((directory / "policy.json").read_text())
    (directory / "policy.json").write_text(json.dumps(manifest | changes))


def test_another_file_version_is_refused(saved):
    edit(saved, version=1)
    with pytest.raises(CheckpointError, match="version 1; this sqap reads versions 3 and 4"):
        sqap.load(saved)


def test_settings_nobody_knows_are_refused(saved):
    edit(saved, recipe={"pruning": {"keep_ration": 0.5}})
    with pytest.raises(CheckpointError, match="no setting 'keep_ration'"):
        sqap.load(saved)


def test_weights_of_another_policy_are_refused_all_at_once(saved):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    tensors["extra"] = tensors.pop("decoder.norm.weight")
    tensors["decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"][:4].clone()
    save_file(tensors, weights)
    hashes = json.loads((saved / "policy.json").read_text())["sha256"]
    edit(saved, sha256=hashes | {"model.safetensors": native._sha256(weights)})
    with pytest.raises(CheckpointError) as error:
        sqap.load(saved)
    for part in ("missing: decoder.norm.weight;", "not known: extra;", "(4, 32), not float32 (8, 32)"):
        assert part in str(error.value)


def test_a_list_of_linears_that_is_not_the_weights_own_is_refused(saved):
    linears = json.loads((saved / "policy.json").read_text())["linears"]
    linears[0]["weight_bits"] = 4
    edit(saved, linears=linears)
    with pytest.raises(CheckpointError, match="its list of linears is not what its recipe and weights make"):
        sqap.load(saved)


def test_saving_what_was_loaded_gives_the_same_bytes(policy, observe, tmp_path):
    small = sqap.compress(policy, Recipe.w4a8(), [observe(0)])
    small.save(tmp_path / "once")
    sqap.load(tmp_path / "once").save(tmp_path / "twice")
    for file in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_opened_directory_is_written_again_without_a_policy(policy, observe, tmp_path):
    sqap.compress(policy, Recipe.w4a8(), [observe(0)]).save(tmp_path / "once")
    native.save(native.open(tmp_path / "once"), tmp_path / "twice")
    for file in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_saving_replaces_a_policy_and_leaves_nothing_behind(policy, observe, saved):
    sqap.compress(policy, Recipe.w4a8(), [observe()]).save(saved)
    assert sqap.load(saved).recipe == Recipe.w4a8()
    assert os.listdir(saved.parent) == ["policy"]


def test_saving_through_a_link_replaces_what_it_points_at(policy, observe, saved):
    (saved.parent / "latest").symlink_to(saved.name)
    sqap.compress(policy, Recipe.w4a8(), [observe()]).save(saved.parent / "latest")
    assert sqap.load(saved).recipe == Recipe.w4a8()
    assert sorted(os.listdir(saved.parent)) == ["latest", "policy"]
    assert (saved.parent / "latest").is_symlink()


def test_a_policy_is_on_disk_before_it_takes_its_place(policy, saved, monkeypatch):
    done = []

    def sync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def exchange(new, old):
        done.append("exchange")
        files.exchange(new, old)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(place, "exchange", exchange)
    policy.save(saved)
    *written, temporary, exchanged, parent = done
    assert sorted(written) == sorted(path.name for path in saved.iterdir())
    assert temporary.startswith(".policy.")
    assert (exchanged, parent) == ("exchange", saved.parent.name)


def test_what_a_killed_save_has_left_is_deleted_by_the_next(policy, saved):
    left = saved.with_name(f".policy.abc{place.SAVING}")
    shutil.copytree(saved, left)
    shutil.copytree(saved, saved.with_name(f"{left.name}.old"))
    others = [".policy.mine", f".other.abc{place.SAVING}"]
    for name in others:
        shutil.copytree(saved, saved.with_name(name))
    policy.save(saved)
    assert sorted(os.listdir(saved.parent)) == sorted([*others, "policy"])


def test_what_another_process_is_saving_is_left_alone(policy, saved):
    being_written = saved.with_name(f".policy.abc{place.SAVING}")
    shutil.copytree(saved, being_written)
    with place._locked(being_written):
        policy.save(saved)
    assert sqap.load(being_written).recipe == Recipe()


def test_the_only_policy_there_is_is_not_deleted_as_a_leftover(policy, saved):
    aside = saved.with_name(f".policy.abc{place.SAVING}.old")
    os.rename(saved, aside)
    policy.save(saved)
    assert sqap.load(aside).recipe == sqap.load(saved).recipe == Recipe()


def test_a_policy_can_be_loaded_at_every_instant_of_its_being_replaced(policy, saved):
    """A thread that loads meanwhile sees one policy or the other, and nothing else."""
    stop, seen, problems = threading.Event(), set(), []

    def load():
        while not (stop.is_set() and seen):
            try:
                seen.add(sqap.load(saved).config.images)
            except CheckpointError as problem:
                if "was replaced while it was being read" not in str(problem):
                    problems.append(problem)

    thread = threading.Thread(target=load)
    thread.start()
    both = cropped(stretched(32), 0.5), stretched(32)
    for steps in both * 6:
        dataclasses.replace(policy, config=dataclasses.replace(policy.config, images=(steps,))).save(saved)
    stop.set()
    thread.join()
    assert problems == []
    assert seen <= {(steps,) for steps in both}


def test_saving_over_something_else_is_refused(policy, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not an sqap policy"):
        policy.save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_policy_intact(policy, observe, saved, monkeypatch):
    before = sqap.load(saved).act(observe(), seed=0)

    def write_half(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(native, "save_file", write_half)
    with pytest.raises(CheckpointError, match="the disk is full"):
        sqap.compress(policy, Recipe.w4a8(), [observe()]).save(saved)
    assert np.array_equal(sqap.load(saved).act(observe(), seed=0), before)
    assert os.listdir(saved.parent) == ["policy"]


def test_a_write_that_the_kernel_refuses_leaves_the_old_policy_intact(policy, observe, saved):
    """No monkeypatch: files may not grow beyond a few kilobytes, as when a quota is used up."""
    before = sqap.load(saved).act(observe(), seed=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            policy.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert np.array_equal(sqap.load(saved).act(observe(), seed=0), before)
    assert os.listdir(saved.parent) == ["policy"]


def test_an_unwritable_place_is_reported(policy, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        policy.save(blocker / "policy")


def test_a_linear_that_was_not_quantized_cannot_be_saved(policy, observe, tmp_path):
    small = sqap.compress(policy, Recipe.w4a8(), [observe()])
    small.model.decoder.layers[1].mlp.up_proj = policy.model.decoder.layers[1].mlp.up_proj
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj is not quantized"):
        small.save(tmp_path / "small")
    assert not (tmp_path / "small").exists()

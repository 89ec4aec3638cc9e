"""Tensors come from disk when they are asked for, and whatever is wrong with a file is said before."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sqap.checkpoints import tensors as tensor_files
from sqap.checkpoints.pickles import torch_file
from sqap.checkpoints.tensors import TensorFile, TensorInfo, open_safetensors, safetensors_file
from sqap.checkpoints.weights import CheckpointWeights, Part, Source, TensorSet, without_batch
from sqap.errors import CheckpointError

MAPS = Path("/proc/self/maps")
STATE = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "b.steps": torch.tensor([3]),
}


def safetensors(directory: Path) -> TensorFile:
    save_file(STATE, directory / "state.safetensors")
    return safetensors_file(directory / "state.safetensors")


def zipped(directory: Path) -> TensorFile:
    torch.save(STATE, directory / "state.pt")
    return torch_file(directory / "state.pt")


def legacy(directory: Path) -> TensorFile:
    torch.save(STATE, directory / "old.pt", _use_new_zipfile_serialization=False)
    return torch_file(directory / "old.pt")


every_format = pytest.mark.parametrize("make", [safetensors, zipped, legacy])


@every_format
def test_shapes_and_types_are_known_and_tensors_come_as_they_are_stored(make, tmp_path):
    file = make(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in file.tensors.items()} == {
        "a": ((3, 4), torch.float32),
        "b.weight": ((2,), torch.bfloat16),
        "b.steps": ((1,), torch.int64),
    }
    read = file.read(["b.weight", "a"])
    assert set(read) == {"a", "b.weight"}
    for name, tensor in read.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what a process has mapped")
@pytest.mark.parametrize("make", [safetensors, zipped])
def test_nothing_stays_mapped_while_tensors_are_alive(make, tmp_path):
    file = make(tmp_path)
    assert str(file.path) not in MAPS.read_text()
    read = file.read(["a"])
    assert str(file.path) not in MAPS.read_text()
    assert torch.equal(read["a"], STATE["a"])


@every_format
def test_tensors_are_the_readers_own(make, tmp_path):
    file = make(tmp_path)
    first, second = file.read(["a"])["a"], file.read(["a"])["a"]
    first.zero_()
    file.path.write_bytes(bytes(file.path.stat().st_size))
    assert torch.equal(second, STATE["a"])


@every_format
def test_files_can_be_sent_to_another_process(make, tmp_path):
    file = pickle.loads(pickle.dumps(make(tmp_path)))
    assert torch.equal(file.read(["a"])["a"], STATE["a"])


def test_a_slice_is_read_without_what_it_was_cut_from(tmp_path):
    whole = torch.arange(100.0).view(10, 10)
    torch.save({"column": whole[:, 3]}, tmp_path / "view.pt")
    read = torch_file(tmp_path / "view.pt").read(["column"])["column"]
    assert torch.equal(read, whole[:, 3])
    assert read.untyped_storage().nbytes() == 40


def test_a_file_is_opened_anew_before_too_much_of_it_is_mapped(tmp_path, monkeypatch):
    opened = []
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in STATE.items()}
    file = TensorFile(tmp_path, infos, lambda path, names: opened.append(list(names)) or STATE)
    file.read(list(STATE))
    assert opened == [["a", "b.weight", "b.steps"]]
    monkeypatch.setattr(tensor_files, "BATCH_BYTES", 48)
    assert set(file.read(list(STATE))) == set(STATE)
    assert opened[1:] == [["a"], ["b.weight", "b.steps"]]  # 48 bytes, then 4 and 8


def test_a_type_that_is_not_supported_is_refused(tmp_path):
    save_file({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "small.safetensors")
    with pytest.raises(
        CheckpointError, match=r"small\.safetensors: w is stored as F8_E4M3; supported are F64, "
    ):
        safetensors_file(tmp_path / "small.safetensors")


def test_nested_dictionaries_are_flattened_and_counters_left_out(tmp_path):
    nested = {"model": {"vision": {"w": STATE["a"]}, "list": [STATE["a"], {"x": STATE["a"]}]}, "epoch": 3}
    torch.save(nested | {"note": "best", 7: nn.Parameter(STATE["a"])}, tmp_path / "nested.pt")
    names = set(torch_file(tmp_path / "nested.pt").tensors)
    assert names == {"model.vision.w", "model.list.0", "model.list.1.x", "7"}


def test_a_file_that_is_exchanged_while_in_use_is_noticed(tmp_path):
    for make in (safetensors, zipped):
        file = make(tmp_path)
        other = {"a": torch.zeros(5), "b.weight": torch.zeros(2)}
        if make is safetensors:
            save_file(other, file.path)
        else:
            torch.save(other, file.path)
        for gone in ("a", "b.steps"):
            with pytest.raises(CheckpointError, match="was changed while it was in use"):
                file.read([gone])


@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.99])
@every_format
def test_a_truncated_file_is_named(make, keep, tmp_path):
    path = make(tmp_path).path
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"state\.|old\.") as error:
        (safetensors_file if make is safetensors else torch_file)(path)
    assert "truncated" in str(error.value) or "damaged" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("open_file", [safetensors_file, torch_file])
def test_a_file_that_is_not_there_and_one_that_git_left_on_its_server_are_named(open_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*weights: No such file"):
        open_file(tmp_path / "weights")
    (tmp_path / "weights").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(
        CheckpointError, match="only a pointer to the file; fetch the file with `git lfs pull`"
    ):
        open_file(tmp_path / "weights")


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"empty\.pt holds no tensors"):
        torch_file(tmp_path / "empty.pt")


HUGE = torch.ones(1, 4, dtype=torch.bfloat16).expand(10**12, 4)


@pytest.mark.parametrize(
    "tensor", [HUGE, torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["huge", "sparse", "meta"]
)
def test_a_tensor_whose_values_are_not_all_in_the_file_is_refused(tmp_path, tensor):
    torch.save(STATE | {"odd": tensor}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: odd is no plain tensor"):
        torch_file(tmp_path / "odd.pt")


def test_containers_without_an_end_are_refused(tmp_path):
    state = {**STATE}
    state["again"] = state
    torch.save(state, tmp_path / "endless.pt")
    with pytest.raises(CheckpointError, match=r"endless\.pt holds containers inside each other without an"):
        torch_file(tmp_path / "endless.pt")
    many = [STATE["a"]]
    for _ in range(30):
        many = [many, many]
    torch.save(many, tmp_path / "many.pt")
    with pytest.raises(CheckpointError, match=r"many\.pt holds containers inside each other without an"):
        torch_file(tmp_path / "many.pt")


def test_a_type_that_is_not_supported_is_refused_in_a_file_of_torch_save_too(tmp_path):
    torch.save({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "small.pt")
    with pytest.raises(
        CheckpointError, match=r"small\.pt: a is stored as torch\.float8_e4m3fn; supported are F64"
    ):
        torch_file(tmp_path / "small.pt")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({"b.weight": STATE["a"], "b": {"weight": STATE["a"]}}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match=r"twice\.pt holds 'b\.weight' twice"):
        torch_file(tmp_path / "twice.pt")
    torch.save({"module.a": STATE["a"], "a": STATE["a"] + 1}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match=r"half\.pt has a, which is there already"):
        TensorSet(tmp_path, [Part(torch_file(tmp_path / "half.pt"), "head.", strip="module.")])


@pytest.mark.parametrize("last", ["7", str(10**9), "9" * 5000, "٣"])
def test_modules_are_counted_without_gaps(tmp_path, last):
    save_file({f"layers.{i}.a": torch.zeros(1) for i in ("0", "1", last)}, tmp_path / "layers.safetensors")
    tensors = TensorSet(tmp_path, [Part(safetensors_file(tmp_path / "layers.safetensors"))])
    with pytest.raises(CheckpointError, match=r"lacks layers\.2, by which the size of the model is known"):
        tensors.count("layers.")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_broken_link_is_a_file_that_is_missing_and_not_anothers_turn(shards, name):
    (shards / "model.safetensors").unlink(missing_ok=True)
    (shards / name).unlink(missing_ok=True)
    (shards / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=rf"cannot read \S+{name}: No such file"):
        open_safetensors(shards)


def test_names_that_cannot_be_printed_are_quoted(tmp_path):
    save_file({"": STATE["a"], "two\nlines": STATE["a"] + 1}, tmp_path / "a.safetensors")
    tensors = TensorSet(tmp_path, [Part(safetensors_file(tmp_path / "a.safetensors"))])
    with pytest.raises(CheckpointError) as error:
        CheckpointWeights(tensors, {}, {})
    assert str(error.value).endswith(r"not known: '', 'two\nlines'")


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_refused_and_does_not_run(zip_file, nested, payload, tmp_path):
    state = {"model": {"a": STATE["a"], "b": [payload]}} if nested else payload
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=zip_file)
    with pytest.raises(CheckpointError, match=r"evil\.pt holds posix\.mkdir.* nothing in it was executed"):
        torch_file(tmp_path / "evil.pt")
    assert not payload.marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert payload.marker.exists()  # so it would have run


def test_a_plain_pickle_is_refused_and_does_not_run(payload, tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": payload}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        torch_file(tmp_path / "evil.pt")
    assert not payload.marker.exists()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index."""
    parts = {"one": {"a": STATE["a"]}, "two": {n: t for n, t in STATE.items() if n != "a"}}
    for name, part in parts.items():
        save_file(part, tmp_path / f"{name}.safetensors")
    listed = {tensor: f"{name}.safetensors" for name, part in parts.items() for tensor in part}
    write_index(tmp_path, {"metadata": {}, "weight_map": listed})
    return tmp_path


def write_index(directory: Path, index: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_set_of_tensors(shards):
    tensors = TensorSet(shards, [Part(file) for file in open_safetensors(shards)])
    assert set(tensors.tensors) == set(STATE)
    read = tensors.read(["b.steps", "a"])
    assert torch.equal(read["a"], STATE["a"])
    assert torch.equal(read["b.steps"], STATE["b.steps"])


def test_one_file_needs_no_index(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors nor"):
        open_safetensors(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    assert set(file.tensors) == set(STATE)


def test_of_several_files_those_are_read_that_transformers_reads_and_it_is_said(shards, caplog):
    (shards / "pytorch_model.bin").write_bytes(b"")
    assert {file.path.name for file in open_safetensors(shards)} == {"one.safetensors", "two.safetensors"}
    assert "the shards of its index is read, and pytorch_model.bin beside it is not" in caplog.text
    for name in ("one", "two"):
        (shards / f"{name}.safetensors").rename(shards / f"model-{name}-of-two.safetensors")
    save_file(STATE, shards / "model.safetensors")
    (file,) = open_safetensors(shards)
    assert file.path.name == "model.safetensors"
    assert "and model-one-of-two.safetensors, model-two-of-two.safetensors, pytorch_model.bin" in caplog.text


def test_an_index_whose_shards_are_gone_does_not_hide_the_single_file(shards, caplog):
    for name in ("one", "two"):
        (shards / f"{name}.safetensors").unlink()
    save_file(STATE, shards / "model.safetensors")
    (file,) = open_safetensors(shards)
    assert set(file.tensors) == set(STATE)
    assert not caplog.text


def test_weights_of_pickles_alone_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"in pytorch_model-00001\S+bin, and safetensors are read here: "
    ):
        open_safetensors(tmp_path)


def test_a_missing_shard_is_named(shards):
    (shards / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: of 2 shards it lacks two\.safetensors$"):
        open_safetensors(shards)


def test_half_a_shard_is_named(shards):
    content = (shards / "two.safetensors").read_bytes()
    (shards / "two.safetensors").write_bytes(content[: len(content) - 5])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is truncated or not a safetensors file"):
        open_safetensors(shards)


def test_a_shard_of_another_model_is_named(shards):
    save_file({"a": STATE["a"], "head.weight": STATE["a"] + 0}, shards / "two.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_safetensors(shards)
    assert str(error.value) == (
        f"{shards / 'two.safetensors'} is not the shard that model.safetensors.index.json describes: "
        "it lacks b.steps, b.weight and it also has a, head.weight"
    )


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {"a": 3}}, {"weight_map": ["a"]}])
def test_an_index_that_is_none_is_refused(shards, index):
    write_index(shards, index)
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to files"):
        open_safetensors(shards)


@pytest.mark.parametrize("name", ["../two.safetensors", "/etc/passwd"])
def test_an_index_leads_nowhere_else(shards, name):
    write_index(shards, {"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match="which is not a file beside it"):
        open_safetensors(shards)


def weights(directory: Path, table: dict, shapes: dict, unused: tuple = ()) -> CheckpointWeights:
    save_file(STATE, directory / "state.safetensors")
    tensors = TensorSet(directory, [Part(safetensors_file(directory / "state.safetensors"))])
    return CheckpointWeights(tensors, table, shapes, unused)


def test_our_names_stand_for_theirs(tmp_path):
    table = {
        "plain": Source(("b.weight",)),
        "joined": Source(("a", "a"), lambda x, y: x.t().reshape(y.shape)),
        "turned": Source(("a",), torch.t),
    }
    made = weights(tmp_path, table, {"plain": (2,), "joined": (3, 4), "turned": (4, 3)}, ("*.steps",))
    assert made.unused == ["b.steps"]
    read = made.read(name for name in ("plain", "turned"))
    assert set(read) == {"plain", "turned"}
    assert read["plain"].dtype == torch.bfloat16
    assert torch.equal(read["turned"], STATE["a"].t())
    assert torch.equal(made.read(["joined"])["joined"], STATE["a"].t().reshape(3, 4))


def test_names_of_several_files_are_told_apart(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "base.safetensors")
    torch.save({"module.w": torch.ones(1), "v": torch.full((1,), 2.0)}, tmp_path / "head.pt")
    parts = [
        Part(safetensors_file(tmp_path / "base.safetensors")),
        Part(torch_file(tmp_path / "head.pt"), prefix="head.", strip="module."),
    ]
    read = TensorSet(tmp_path, parts).read(["head.v", "w", "head.w"])
    assert {name: tensor.item() for name, tensor in read.items()} == {"w": 0, "head.w": 1, "head.v": 2}


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    table = {
        "first": Source(("a",)),
        "second": Source(("gone",)),
        "third": Source(("b.weight",), without_batch),
        "fourth": Source(("a", "b.weight"), lambda x, y: x.view(y.shape)),
    }
    shapes = {"first": (4, 3), "second": (1,), "third": (2, 1), "fourth": (3,)}
    with pytest.raises(CheckpointError) as error:
        weights(tmp_path, table, shapes)
    assert str(error.value) == (
        f"{tmp_path} does not hold the model it describes: missing: gone; not known: b.steps; "
        "of another shape or kind: a is (3, 4) where first must be (4, 3), "
        "b.weight is (2,) where third must be (2, 1), "
        "a is (3, 4) and b.weight is (2,) where fourth must be (3,)"
    )


def test_long_lists_are_cut(tmp_path):
    table = {f"ours.{i}": Source((f"theirs.{i}",)) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"theirs\.7 and 12 more; not known: a, b\.steps, b\.weight$"):
        weights(tmp_path, table, dict.fromkeys(table, (1,)))


def test_integers_are_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"b\.steps is not floating-point"):
        weights(tmp_path, {"x": Source(("b.steps",))}, {"x": (1,)}, ("a", "b.weight"))


def test_a_table_for_another_model_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(ValueError, match="the table and the model differ: \\['x', 'y'\\]"):
        weights(tmp_path, {"x": Source(("a",))}, {"y": (3, 4)})


ALL = {name: Source((name,)) for name in STATE if name != "b.steps"}
SHAPES = {name: tuple(STATE[name].shape) for name in ALL}


def test_the_fingerprint_is_the_contents(tmp_path):
    (tmp_path / "one").mkdir()
    made = weights(tmp_path / "one", ALL, SHAPES, ("*.steps",))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    again = weights(tmp_path / "two", ALL, SHAPES, ("*.steps",))
    assert made.fingerprint == again.fingerprint
    content = bytearray((tmp_path / "two" / "state.safetensors").read_bytes())
    content[-1] ^= 1
    other = weights(tmp_path / "two", ALL, SHAPES, ("*.steps",))
    (tmp_path / "two" / "state.safetensors").write_bytes(content)
    assert other.fingerprint != made.fingerprint


def test_hashing_tells_how_far_it_is_and_is_done_once(tmp_path):
    made = weights(tmp_path, ALL, SHAPES, ("*.steps",))
    size = (tmp_path / "state.safetensors").stat().st_size
    told: list[tuple[int, int]] = []
    first = made.hash_files(lambda done, total: told.append((done, total)))
    assert told[-1] == (size, size)
    (tmp_path / "state.safetensors").unlink()
    assert made.fingerprint == first


def test_a_file_that_cannot_be_hashed_is_named(tmp_path):
    made = weights(tmp_path, ALL, SHAPES, ("*.steps",))
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.safetensors: No such file"):
        _ = made.fingerprint

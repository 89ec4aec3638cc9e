"""sqap's own directory: ``policy.json``, ``model.safetensors``, ``tokenizer.json``, and files for others.

``policy.json`` says what the policy is, how it was compressed, how each linear is stored, and the SHA-256 of
the other two, so that a truncated or altered directory is noticed before anything is believed. Its fields are
documented in ``docs/artefact.md``. Beside them are LeRobot's three JSON files (`lerobot.export`) and the
model card (`card`), on which nothing here depends. Writing goes to a temporary directory beside the target,
which then takes its place: the old artefact stays until the new is whole and on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from sqap.checkpoints.card import CARD, read_card, write_card
from sqap.checkpoints.lerobot.export import export
from sqap.checkpoints.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    check_calibration,
    check_config,
    read_manifest,
)
from sqap.checkpoints.opened import Opened
from sqap.checkpoints.place import check_place, replacing
from sqap.checkpoints.tensors import FLOATS, shorten
from sqap.config import Calibration, PolicyConfig
from sqap.errors import CheckpointError, panics_raise
from sqap.files import reason
from sqap.models import VLA, empty_model
from sqap.models.storage import check_finite, stored_tensors
from sqap.quantization import check_coverage, list_linears, prepare_quantized
from sqap.recipe import Recipe
from sqap.serialization import from_json

ATTEMPTS = 3  # at reading a directory that is being replaced


def save(policy: Opened, directory: Path) -> None:
    """Write a policy to ``directory``, replacing an sqap policy that is there. It is on disk afterwards.

    Raises:
        CheckpointError: the place cannot be written, holds something else, or a linear that the recipe
            wants quantized is not really packed. Whatever was there before is intact.
    """
    place = check_place(directory)
    check_config(policy.config, "the policy's configuration")
    if policy.recipe.quantization is not None:
        check_coverage(policy.model, policy.recipe.quantization)
    with replacing(place, directory) as temporary:
        save_file(stored_tensors(policy.model, policy.weights), temporary / WEIGHTS)
        policy.tokenizer.save(str(temporary / TOKENIZER))
        manifest = {
            "format": "sqap",
            "version": FORMAT_VERSION,
            "policy": dataclasses.asdict(policy.config),
            "recipe": policy.recipe.to_json(),
            "calibration": dataclasses.asdict(policy.calibration) if policy.calibration else None,
            "source": policy.source,
            "linears": [dataclasses.asdict(linear) for linear in list_linears(policy.model)],
            "sha256": {name: _sha256(temporary / name) for name in (WEIGHTS, TOKENIZER)},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        export(policy.config, temporary)
        if policy.card is not None and policy.fingerprint == _sha256(temporary / MANIFEST):
            (temporary / CARD).write_bytes(policy.card)  # of this very policy, and perhaps edited
        else:
            write_card(policy, temporary)


def open(directory: Path) -> Opened:
    """Read what `save` wrote.

    What `compress` returned gives bit-identical actions. An original is stored in bfloat16 and computes in
    float32, whatever it computed in before.

    Raises:
        CheckpointError: the directory is foreign, of another version, incomplete, truncated or altered, or
            was replaced again and again meanwhile.
    """
    for _ in range(ATTEMPTS):
        manifest, known_by = read_manifest(directory)
        try:
            found = _read(directory, manifest, known_by)
        except (CheckpointError, OSError) as problem:
            if _sha256(directory / MANIFEST) != known_by:
                continue  # half of it was another policy's
            if isinstance(problem, OSError):
                raise CheckpointError(f"cannot read {directory}: {reason(problem)}") from problem
            raise
        # A policy saved here since the hashes were compared was not compared with any.
        if _sha256(directory / MANIFEST) == known_by:
            return found
    raise CheckpointError(f"{directory} was replaced while it was being read; load it again")


def is_policy(directory: Path) -> bool:
    """Whether ``directory`` is sqap's own."""
    return (directory / MANIFEST).is_file()


def fingerprint(directory: Path) -> str:
    """SHA-256 of ``policy.json``, which itself holds the hashes of all the rest.

    Raises:
        CheckpointError: there is no sqap policy.
    """
    return read_manifest(directory)[1]


def _read(directory: Path, manifest: Mapping[str, Any], known_by: str) -> Opened:
    for name, expected in manifest["sha256"].items():
        if _sha256(directory / name) != expected:
            raise CheckpointError(
                f"{directory / name} is truncated or was altered: its SHA-256 is not the one in {MANIFEST}"
            )
    where = str(directory / MANIFEST)
    config: PolicyConfig = from_json(PolicyConfig, manifest["policy"], f"{where}: policy", CheckpointError)
    check_config(config, f"{where}: policy")
    recipe = Recipe.from_json(manifest["recipe"], f"{where}: recipe", CheckpointError)
    calibration: Calibration | None = None
    if manifest["calibration"] is not None:
        calibration = from_json(
            Calibration, manifest["calibration"], f"{where}: calibration", CheckpointError
        )
    check_calibration(calibration, recipe, config.model, f"{where}: calibration")
    model = empty_model(config.model)  # in 32 bits a large one would not fit before it is quantized
    if recipe.quantization is not None:
        prepare_quantized(model, recipe.quantization)
    _fill(model, directory / WEIGHTS)
    if [dataclasses.asdict(linear) for linear in list_linears(model)] != manifest["linears"]:
        raise CheckpointError(f"{where}: its list of linears is not what its recipe and weights make")
    return Opened(
        model=model,
        config=config,
        tokenizer=_tokenizer(directory / TOKENIZER, config.model.decoder.vocabulary),
        recipe=recipe,
        calibration=calibration,
        source=manifest["source"],
        fingerprint=known_by,
        card=read_card(directory),
    )


def _tokenizer(path: Path, rows: int) -> Tokenizer:
    try:
        with panics_raise():
            tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {problem}") from problem
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= rows:
        raise CheckpointError(f"{path} has token {highest}, but the model embeds up to {rows - 1}")
    return tokenizer


def _fill(model: VLA, path: Path) -> None:
    """Give ``model`` the tensors of a file: views of its pages, but for the parameters that get 32 bits.

    The pages are shared with every process that has loaded the file; one that is written to becomes a copy.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as problem:
        raise CheckpointError(f"{path} is not a readable safetensors file: {problem}") from problem
    wanted, floats = model.state_dict(), {name for name, _ in model.named_parameters()}
    lists = {
        "missing": [name for name in wanted if name not in tensors],
        "not known": [name for name in tensors if name not in wanted],
        "of another shape or type": [
            f"{name} is {_kind(stored)}, not {_kind(wanted[name])}"
            for name, stored in tensors.items()
            if name in wanted and not _fits(stored, wanted[name], name in floats)
        ],
    }
    problems = [f"{what}: {shorten(names)}" for what, names in lists.items() if names]
    if problems:
        raise CheckpointError(f"{path} does not fit its policy.json: {'; '.join(problems)}")
    table = "decoder.embed_tokens.weight"  # stays as it is stored, as `round_to_storage` leaves it
    wide = floats - {table}
    state = {name: t.float() if name in wide else t for name, t in tensors.items()}
    model.load_state_dict(state, assign=True)
    check_finite(model, CheckpointError, f"{path}: ")


def _fits(stored: Tensor, wanted: Tensor, is_parameter: bool) -> bool:
    """Whether shape and type are right: a parameter has any type of `FLOATS`, a buffer its own."""
    right = stored.dtype in FLOATS if is_parameter else stored.dtype == wanted.dtype
    return right and stored.shape == wanted.shape


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""sqap's own directory: ``policy.json``, ``model.safetensors``, ``tokenizer.json``.

``policy.json`` says what the policy is, how it was compressed, how each linear is stored, and the SHA-256 of
the other two, so that a truncated or altered directory is noticed before anything is believed. Its fields are
documented in ``docs/artefact.md``. Writing goes to a temporary
directory beside the target, which then takes its place: the old artefact stays until the new is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sqap.errors import CheckpointError
from sqap.models import VLA, empty_model
from sqap.models.storage import check_finite, stored_tensors
from sqap.policy import Calibration, Policy, PolicyConfig
from sqap.quantization import check_coverage, list_linears, prepare_quantized
from sqap.recipe import Recipe
from sqap.serialization import from_json, read_json

FORMAT_VERSION = 3
MANIFEST, WEIGHTS, TOKENIZER = "policy.json", "model.safetensors", "tokenizer.json"


def save_policy(policy: Policy, directory: Path) -> None:
    """Write ``policy`` to ``directory``, replacing an sqap policy that is there.

    Raises:
        CheckpointError: the place cannot be written, holds something else, or a linear that the recipe
            wants quantized is not really packed. Whatever was there before is intact.
    """
    if policy.recipe.quantization is not None:
        check_coverage(policy.model, policy.recipe.quantization)
    if _is_foreign(directory):
        raise CheckpointError(f"{directory} exists and is not an sqap policy; choose another place")
    with _replacing(directory) as temporary:
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
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_policy(directory: Path) -> Policy:
    """Read what `save_policy` wrote; the loaded policy gives bit-identical actions.

    Raises:
        CheckpointError: the directory is foreign, of another version, incomplete, truncated or altered, or
            was replaced meanwhile.
    """
    known_by = fingerprint(directory)
    manifest = _read_manifest(directory)
    for name, expected in manifest["sha256"].items():
        if _sha256(directory / name) != expected:
            raise CheckpointError(
                f"{directory / name} is truncated or was altered: its SHA-256 is not the one in {MANIFEST}"
            )
    where = str(directory / MANIFEST)
    config: PolicyConfig = from_json(PolicyConfig, manifest["policy"], f"{where}: policy", CheckpointError)
    recipe: Recipe = from_json(Recipe, manifest["recipe"], f"{where}: recipe", CheckpointError)
    calibration = manifest["calibration"]
    model = empty_model(config.model)  # in 32 bits a large one would not fit before it is quantized
    if recipe.quantization is not None:
        prepare_quantized(model, recipe.quantization)
    _fill(model, directory / WEIGHTS)
    if [dataclasses.asdict(linear) for linear in list_linears(model)] != manifest["linears"]:
        raise CheckpointError(f"{where}: its list of linears is not what its recipe and weights make")
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
    # A policy saved here since the hashes were compared was not compared with any.
    if fingerprint(directory) != known_by:
        raise CheckpointError(f"{directory} was replaced while it was being read; load it again")
    return Policy(
        model=model,
        config=config,
        tokenizer=tokenizer,
        recipe=recipe,
        calibration=calibration
        and from_json(Calibration, calibration, f"{where}: calibration", CheckpointError),
        source=manifest["source"],
        fingerprint=known_by,
    )


def is_policy(directory: Path) -> bool:
    """Whether ``directory`` is sqap's own."""
    return (directory / MANIFEST).is_file()


def fingerprint(directory: Path) -> str:
    """SHA-256 of ``policy.json``, which itself holds the hashes of all the rest.

    Raises:
        CheckpointError: there is no sqap policy.
    """
    _read_manifest(directory)
    return _sha256(directory / MANIFEST)


def _fill(model: VLA, path: Path) -> None:
    """Give ``model`` the tensors of a file: views of its pages, but for the parameters that get 32 bits.

    The pages are shared with every process that has loaded the file; one that is written to becomes a copy.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as problem:
        raise CheckpointError(f"{path} is not a readable safetensors file: {problem}") from problem
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit its policy.json: {'; '.join(problems)}")
    table = "decoder.embed_tokens.weight"  # stays as it is stored, as `round_to_storage` leaves it
    wide = {name for name, _ in model.named_parameters()} - {table}
    state = {name: t.float() if name in wide else t for name, t in tensors.items()}
    model.load_state_dict(state, assign=True)
    check_finite(model, CheckpointError, f"{path}: ")


def _is_foreign(directory: Path) -> bool:
    if not directory.is_dir():
        return directory.exists()
    return not (directory / MANIFEST).is_file() and any(directory.iterdir())


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} is not an sqap policy: it has no {MANIFEST}")
    manifest = read_json(path, CheckpointError)
    if not isinstance(manifest, dict) or manifest.get("format") != "sqap":
        raise CheckpointError(f"{path} does not describe an sqap policy")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest.get('version')}; this sqap reads version {FORMAT_VERSION}"
        )
    keys = {"format", "version", "policy", "recipe", "calibration", "source", "linears", "sha256"}
    if set(manifest) != keys or not isinstance(manifest["sha256"], dict):
        raise CheckpointError(f"{path} must have exactly the keys {', '.join(sorted(keys))}")
    for name in (WEIGHTS, TOKENIZER):
        if name not in manifest["sha256"] or not (directory / name).is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is missing")
    return manifest


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``directory`` if the block succeeds and vanishes if not."""
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield temporary
        # Private by default, both the directory and the weights; a policy is for whoever runs the robot.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        _swap(temporary, directory)
    except (OSError, SafetensorError) as problem:
        full = getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem)
        reason = "the disk is full" if full else getattr(problem, "strerror", None) or str(problem)
        raise CheckpointError(f"cannot write {directory}: {reason}; nothing there was changed") from problem
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, directory: Path) -> None:
    old = temporary.with_name(temporary.name + ".old")
    if directory.exists():
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
    except OSError:
        if old.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Embedding tables of 8-bit rows: what they hold, when a recipe makes them, and how they are stored."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import sqap
from sqap.benchmark.shapes import PI0, PI05, SHAPES, SMOLVLA
from sqap.cli import app
from sqap.errors import CheckpointError, InputError
from sqap.models.storage import stored_bytes
from sqap.quantization import QuantizedEmbedding, count_parameters
from sqap.quantization.embedding import quantizes_table
from sqap.recipe import Quantization, Recipe, Scheme

PLAIN = Quantization(Scheme(4, 8), head=Scheme(4, 8), rotation_seed=0)
EIGHT = dataclasses.replace(PLAIN, embedding_bits=8)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), width=st.integers(1, 40), seed=st.integers(0, 99), decades=st.integers(-6, 6))
def test_every_value_is_within_half_a_level_of_its_row(rows, width, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator) * 10.0**decades
    values[seed % rows] = 0
    table = QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(values))
    levels = values.abs().amax(1, keepdim=True) / 127
    found = table(torch.arange(rows))
    assert found.dtype == torch.float32
    assert bool(((found - values).abs() <= levels * 0.5001).all())
    assert torch.equal(found, table.dequantized())
    assert not found[seed % rows].any()


def test_the_error_of_rows_like_a_language_models_is_under_a_percent():
    values = torch.randn(500, 2048, generator=torch.Generator().manual_seed(0))
    found = QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(values)).dequantized()
    errors = (found - values).norm(dim=1) / values.norm(dim=1)
    assert 0.005 < float(errors.mean()) < 0.01


def test_a_compressed_policy_acts_alike_takes_the_bytes_and_is_stored_bit_for_bit(policy, observe, tmp_path):
    full, small = (sqap.compress(policy, Recipe(quantization)) for quantization in (PLAIN, EIGHT))
    table = small.model.decoder.embed_tokens
    rows, width = table.weight.shape
    assert stored_bytes(full.model) - stored_bytes(small.model) == rows * (width - 4)
    assert count_parameters(full.model) == count_parameters(small.model)
    chunks = [p.act(observe(), seed=0) for p in (policy, full, small)]
    assert 0 < np.abs(chunks[2] - chunks[1]).max() < 0.2 * np.abs(chunks[1]).max()
    small.save(tmp_path / "small")
    out = (
        CliRunner()
        .invoke(app, ["inspect", str(tmp_path / "small"), "--json", str(tmp_path / "i.json")])
        .output
    )
    assert f"{rows} rows of {width}, 8 bits" in " ".join(out.split())
    seen = json.loads((tmp_path / "i.json").read_text())["embedding_table"]
    assert seen == {"rows": rows, "width": width, "bits": 8, "bytes": rows * (width + 4)}
    again = sqap.load(tmp_path / "small")
    assert torch.equal(again.model.decoder.embed_tokens.weight, table.weight)
    np.testing.assert_array_equal(again.act(observe(), seed=0), chunks[2])


def test_a_directory_whose_recipe_says_otherwise_is_refused(policy, tmp_path):
    sqap.compress(policy, Recipe(EIGHT)).save(tmp_path / "small")
    path = tmp_path / "small" / "policy.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["quantization"]["embedding_bits"]  # as recipes of before have it: 16 bits
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"not known: decoder\.embed_tokens\.scale"):
        sqap.load(tmp_path / "small")
    small = sqap.compress(policy, Recipe(PLAIN))
    with pytest.raises(CheckpointError, match="embedding_bits = 8"):
        dataclasses.replace(small, recipe=Recipe(EIGHT)).save(tmp_path / "other")


def test_presets_store_large_tables_in_8_bits(policy):
    for recipe in (Recipe.w4a8(), Recipe.w4a4()):
        large = {n for n, m in SHAPES.items() if quantizes_table(m.decoder, recipe.quantization)}
        assert large == {"smolvla", "pi0", "pi0.5"}
    assert not quantizes_table(sqap.load("reference").config.model.decoder, Recipe.w4a8().quantization)
    for shape in (SMOLVLA, PI0, PI05):
        assert not quantizes_table(shape.decoder, Recipe.paper().quantization)
    assert not quantizes_table(
        dataclasses.replace(PI0.decoder, vocabulary=90_000), Recipe.w4a8().quantization
    )


def test_no_other_bits():
    with pytest.raises(InputError, match="embedding_bits must be 8, 16 or null, got 4"):
        Quantization(embedding_bits=4)

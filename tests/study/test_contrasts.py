"""Factors, designs and contrasts: by hand, and beside the script that measured the interactions of before."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import interaction
import numpy as np
import pytest

from sqap.errors import InputError
from sqap.recipe import Pruning, Quantization, Recipe, Scheme
from sqap.study.contrasts import Contrast, cell_interactions, contrasts, estimate
from sqap.study.design import Design, plan
from sqap.study.factors import CHOICES, parse, recipe
from tests.families import family_config

MODEL = family_config("diffusion")  # three decoder layers, 16 tokens a camera
EVERYTHING = " ".join(f"{factor}={','.join(levels)}" for factor, levels in CHOICES.items())
TASKS = ("open", "close", "press")


def design(factors: str, fraction: Fraction = Fraction(1)) -> Design:
    return plan(parse(factors + " after=2"), MODEL, fraction)


def by_name(found: list[Contrast]) -> dict[str, Contrast]:
    return {contrast.name: contrast for contrast in found}


class TestFactors:
    def test_the_presets_quantizers_are_levels(self) -> None:
        usual: dict[str, Any] = {
            "rotation": "on",
            "rounding": "gptq",
            "keep": 1.0,
            "criteria": None,
            "after": None,
        }
        assert recipe({"bits": "16", **usual}) == Recipe()
        assert recipe({"bits": "w4a8", **usual}) == Recipe.w4a8(keep=1)
        assert recipe({"bits": "w4a4", **usual}) == Recipe.w4a4(keep=1)
        plain = recipe({"bits": "w8a8", **usual, "rotation": "off", "rounding": "rtn"}).quantization
        eight = Scheme(8, 8)
        assert plain == Quantization(eight, eight, eight, eight, clip=True, rotate=False, embedding_bits=None)

    def test_criteria_have_their_papers_names(self) -> None:
        found = {c.levels["criteria"]: c.recipe.pruning for c in design(f"{EVERYTHING} keep=0.5").cells}
        assert found["fastv"] == Pruning(0.5, 2, "attention")
        assert found["paper"] == Pruning(0.5, 2, "sqap")
        assert len(found) == len(CHOICES["criteria"]) == 8

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("bits=16,w3a3", "bits has no level 'w3a3'; it has 16, w8a8, w4a8, w4a4"),
            ("colour=red", "'colour=red' must be FACTOR=LEVEL,LEVEL; factors: bits, rotation"),
            ("keep", "'keep' must be FACTOR=LEVEL"),
            ("keep=0.5,half", "keep=half must be a number"),
            ("keep=0", r"keep=0 must be in \(0, 1\]"),
            ("after=1.5", "after=1.5 must be a whole number"),
            ("bits=16 bits=w4a8", "bits is named more than once"),
            ("keep=0.5,0.50", "keep=0.5,0.50 names a level more than once"),
        ],
    )
    def test_what_is_not_understood_is_refused(self, text: str, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            parse(text)


class TestDesign:
    def test_equal_policies_are_one_cell_and_different_ones_are_not(self) -> None:
        found = design(f"{EVERYTHING} keep=1.0,0.5,0.25")
        assert found.runs == 4 * 2 * 2 * 3 * 8
        # 16 bits once, three other bits in 2 x 2 ways; each unpruned, or with 8 criteria at 2 budgets.
        assert len(found.cells) == (1 + 3 * 4) * (1 + 8 * 2)
        assert len({cell.name for cell in found.cells}) == len({cell.recipe for cell in found.cells}) == 221
        assert sum(merged.runs for merged in found.merged) == found.runs - 221
        assert found.baseline == "16"

    def test_what_cannot_be_is_left_out_and_named(self) -> None:
        found = plan(parse("bits=16 keep=1.0,0.5,0.01 after=2,3"), MODEL)
        assert [cell.name for cell in found.cells] == ["16", "16+lookahead-0.5-after2"]
        assert {(each.levels["keep"], each.levels["after"]) for each in found.impossible} == {
            (0.5, 3),
            (0.01, 2),
            (0.01, 3),
        }
        assert any("the decoder has 3 layers" in each.reason for each in found.impossible)

    @pytest.mark.parametrize(
        ("factors", "sentence"),
        [
            ("bits=16 rotation=off,on", "one cell, 16; there is nothing to compare"),
            ("keep=0.01", "the baseline 16.lookahead-0.01-after2 cannot be: keep_ratio 0.01 keeps none"),
        ],
    )
    def test_a_design_that_shows_nothing_is_refused(self, factors: str, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            design(factors)


class TestContrasts:
    def test_effects_are_means_over_cells_that_differ_in_nothing_else(self) -> None:
        made = design("bits=16,w4a4 rounding=rtn,gptq")
        found, lost = contrasts(made.cells, made.factors, fraction=False)
        assert lost == []
        named = by_name(found)
        # The policy in 16 bits is matched with both ways to round.
        assert named["bits: w4a4 minus 16"].weights == {"w4a4-rtn": 0.5, "16": -1.0, "w4a4": 0.5}
        assert named["rounding: gptq minus rtn"].weights == {"w4a4": 1.0, "w4a4-rtn": -1.0}

    def test_interactions_equal_those_of_the_script(self) -> None:
        """benchmarks/interaction.py has a bootstrap of its own, of the same seed."""
        text = "bits=16,w4a8 keep=1.0,0.5,0.25 criteria=random,lookahead"
        made = design(text)
        draw = random.Random(0)
        won = {
            cell.name: {(task, seed): draw.random() < 0.6 for task in TASKS for seed in range(5)}
            for cell in made.cells
        }
        shares = {
            name: np.array([np.mean([x for (t, _), x in each.items() if t == task]) for task in TASKS])
            for name, each in won.items()
        }
        found = by_name(contrasts(made.cells, made.factors, fraction=False)[0])
        (ours,) = estimate([found["bits: w4a8 minus 16, under random minus unpruned"].weights], shares)
        cells = ["random-0.5", "random-0.25"]
        base, quantized = (
            {"unpruned": won[bits], **{cell: won[f"{bits}+{cell}-after2"] for cell in cells}}
            for bits in ("16", "w4a8")
        )
        expected = interaction.interaction(base, quantized, cells)
        assert ours["difference"] == pytest.approx(expected["difference"])
        assert ours["ci95"] == pytest.approx(expected["ci95"])
        single = cell_interactions(made.cells, made.cells[0])
        assert set(single) == {f"w4a8+{c}-{k}-after2" for c in ("random", "lookahead") for k in (0.5, 0.25)}
        (one,) = estimate([single["w4a8+random-0.25-after2"]], shares)
        expected = interaction.interaction(base, quantized, ["random-0.25"])
        assert (one["difference"], *one["ci95"]) == pytest.approx((expected["difference"], *expected["ci95"]))

    def test_a_fractions_main_effects_are_those_of_a_world_without_interactions(self) -> None:
        text = "bits=w8a8,w4a8,w4a4 rotation=off,on rounding=rtn,gptq keep=1.0,0.5"
        made = design(text, Fraction(1, 2))
        effects = {"w4a8": -0.1, "w4a4": -0.2, "on": 0.05, "gptq": 0.03, 0.5: -0.07}
        success = {
            cell.name: np.full(
                3, 0.8 + sum(v for level, v in effects.items() if level in cell.levels.values())
            )
            for cell in made.cells
        }
        found, lost = contrasts(made.cells, made.factors, fraction=True)
        mains = [contrast for contrast in found if contrast.kind == "effect"]
        numbers = estimate([contrast.weights for contrast in mains], success)
        told = {c.level: n["difference"] for c, n in zip(mains, numbers, strict=True)}
        assert told == pytest.approx(effects)
        assert lost == []

    def test_an_effect_of_cells_that_have_not_run_is_named_instead(self) -> None:
        made = design("bits=16,w4a8,w4a4")
        found, lost = contrasts(made.cells[:2], made.factors, fraction=False)
        assert [c.name for c in found] == ["bits: w4a8 minus 16"]
        assert lost == ["bits: w4a4 minus 16 cannot be estimated from the cells that have run"]

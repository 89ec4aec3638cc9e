"""`sqap bench`: what it reports, what it compares, and that rivals compute the same policy."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sqap
from sqap.benchmark import SHAPES, Subject, bench
from sqap.benchmark.candidates import CANDIDATES, candidate, example, weight_bytes
from sqap.benchmark.dense import Int8Linear, dense, eight, unpack
from sqap.benchmark.exported import Arrays, Exported, Network, export
from sqap.benchmark.shapes import random_policy
from sqap.benchmark.timing import Bench, Loaded, Timed
from sqap.cli import app
from sqap.errors import InputError, SqapError
from sqap.models import TokenHeadConfig
from sqap.policy import Policy
from sqap.quantization import QuantizedLinear
from sqap.recipe import Pruning, Quantization, Recipe, Scheme

W8A8 = Scheme(8, 8)
GENTLE = Recipe(
    Quantization(Scheme(8, 8), vision=W8A8, projector=W8A8, head=W8A8, sensitive=W8A8, rotation_seed=0)
)


def test_the_command_times_every_candidate(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", str(saved), "--vs", "torch-fp32,torch-int8,sqap-unpruned", "--steps", "3"]
    result = CliRunner().invoke(app, [*arguments, "--threads", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert list(report["candidates"]) == ["sqap", "torch-fp32", "torch-int8", "sqap-unpruned"]
    for row in report["candidates"].values():
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert len(row["step_ms"]) == 3
        assert row["p50_ms"] == pytest.approx(sorted(row["step_ms"])[1], abs=1e-3)
        stages = row["stages_ms"]
        assert list(stages) == ["preprocess", "vision", "projector", "decoder", "selection", "head"]
        assert all(ms >= 0 for ms in stages.values())
        assert row["peak_rss_bytes"] > row["weight_bytes"] > 0
    rows = report["candidates"]
    assert rows["sqap"]["stages_ms"]["selection"] > rows["sqap-unpruned"]["stages_ms"]["selection"] == 0
    assert rows["torch-fp32"]["difference_from_fp32"] == 0
    assert rows["sqap"]["weight_bytes"] < rows["torch-int8"]["weight_bytes"]
    assert rows["torch-int8"]["weight_bytes"] < rows["torch-fp32"]["weight_bytes"]
    assert set(report["speedup_over"]) == set(rows) - {"sqap"}
    for ratio in report["speedup_over"].values():
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        whole = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        assert whole in result.output, "a number is not broken over lines"
    assert max(map(len, result.output.splitlines())) <= 80


def test_one_candidate_at_a_time_takes_as_many_steps(saved: Path) -> None:
    seen = []
    report = bench(
        Subject(str(saved), Recipe.w4a8(keep=1)),
        ["torch-fp32"],
        steps=4,
        warmups=1,
        threads=1,
        one_at_a_time=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report["interleaved"] == "in thirds"
    assert set(report["candidates"]) == {"sqap", "torch-fp32"}
    assert seen[-1][0] == seen[-1][1]


def test_budgets_are_timed_side_by_side(saved: Path) -> None:
    """The policy prunes nothing; two candidates keep a half and a quarter of its visual tokens."""
    names = ["sqap-keep-0.5", "sqap-keep-0.25"]
    report = bench(Subject(str(saved), Recipe.w4a8(keep=1)), names, steps=1, warmups=0, threads=1)
    selection = {name: row["stages_ms"]["selection"] for name, row in report["candidates"].items()}
    assert selection["sqap"] == 0
    assert min(selection[name] for name in names) > 0
    half, quarter = (candidate(name).make(sqap.load(saved)).recipe.pruning for name in names)
    assert half is not None
    assert quarter is not None
    assert (half.keep_ratio, quarter.keep_ratio) == (0.5, 0.25)


def test_a_rival_that_cannot_run_is_reported_with_the_reason(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqap.benchmark.latency.Bench", Failing)
    report = bench(Subject(str(saved), Recipe()), ["torch-fp32", "torch-bf16"], steps=1, threads=1)
    assert report["candidates"]["torch-bf16"] == {"reason": "no bfloat16 here"}
    assert "p50_ms" in report["candidates"]["torch-fp32"]
    assert list(report["speedup_over"]) == ["torch-fp32"]


class Failing:
    """Steps without a policy; bfloat16 does not even load."""

    def __init__(self, spec: tuple[Subject, str, int, Path | None]) -> None:
        self._name = spec[1]

    def __call__(self, request: str) -> Loaded | Timed | int:
        if self._name == "torch-bf16":
            raise SqapError("no bfloat16 here")
        if request == "load":
            return Loaded(0.1, 10, np.ones((2, 3)))
        return Timed(1.0, {}) if request == "step" else 100


def test_a_policy_that_cannot_run_is_said_before_any_step(saved: Path) -> None:
    ticks: list[int] = []
    beyond = Recipe(pruning=Pruning(0.5, after_layer=4))
    with pytest.raises(SqapError, match="would save nothing: the decoder has 4 layers"):
        bench(Subject(str(saved), beyond), ["torch-fp32"], steps=1, progress=lambda n, _: ticks.append(n))
    assert ticks == []


@pytest.mark.parametrize("name", ["sqap", "sqap-unpruned", "torch-fp32", "torch-bf16", "torch-int8"])
def test_every_candidate_computes_the_same_policy(saved: Path, name: str) -> None:
    timed = Bench((Subject(str(saved), GENTLE), name, 1, None))
    loaded = timed("load")
    assert isinstance(loaded, Loaded)
    expected = sqap.load(saved).act(timed.observation, seed=0)
    assert np.linalg.norm(loaded.chunk - expected) < 0.1 * np.linalg.norm(expected)


def torch_alone(network: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Network, int]:
    """A tool that knows nothing of sqap's models: tensors in, tensors out, of the shapes it was shown."""
    network = copy.deepcopy(network)

    def run(inputs: Arrays) -> np.ndarray:
        tensors = [torch.from_numpy(x) for x in inputs]
        assert [x.shape for x in tensors] == [x.shape for x in example]
        out: torch.Tensor = network(*tensors)
        return out.numpy()

    return run, 1000


def test_the_compiled_rival_runs_what_was_compiled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.compile` compiles a method that a policy does not call."""
    ran = []

    def compiled(function):
        def run(*arguments):
            ran.append(function)
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    rival = CANDIDATES["torch-compile"].make(sqap.load(saved))
    rival.act(example(rival))
    assert len(ran) == 1


def test_an_exported_policy_computes_the_same(saved: Path) -> None:
    subject = Subject(str(saved), Recipe.w4a8())
    wide = dense(subject.load(), torch.float32)
    seen = example(wide)
    expected = wide.act(seen, seed=0)
    exported = export(subject.load(), torch_alone, unpack, lambda policy: policy.act(seen, seed=0))
    np.testing.assert_allclose(exported.act(seen, seed=0), expected, rtol=1e-4, atol=1e-5)
    networks = [module for module in exported.model.modules() if isinstance(module, Exported)]
    assert len(networks) == len(wide.model.vision) + len(wide.model.decoder.layers) + 2
    assert weight_bytes(exported) < weight_bytes(wide)


def test_a_policy_that_decodes_token_by_token_is_not_exported(policy: Policy) -> None:
    head = TokenHeadConfig(action_dim=2, vocabulary=policy.config.model.decoder.vocabulary)
    made = random_policy(replace(policy.config.model, head=head), Recipe())
    with pytest.raises(SqapError, match="keeps keys and values for its head"):
        export(made, torch_alone, unpack, lambda policy: None)


def test_a_tool_that_is_not_installed_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("openvino-int8", "nncf"), ("onnxruntime-int4", "onnx")):
        monkeypatch.setitem(sys.modules, module, None)
        timed = Bench((Subject(str(saved), GENTLE), name, 1, None))
        with pytest.raises(SqapError, match=rf"{module}.*docs/bench\.md says what to install"):
            timed("load")


def test_dense_weights_need_no_rotation_at_run_time(saved: Path) -> None:
    small = Subject(str(saved), GENTLE).load()
    weights = weight_bytes(small)
    wide = dense(small, torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in wide.model.modules())
    assert weight_bytes(wide) > 2 * weights


def test_a_shape_has_the_size_it_is_published_with() -> None:
    """Of SmolVLA, pi0 and pi0.5, less output matrices and a part of a layer, which nothing reads."""
    for name, low, high in (
        ("cogact-7b", 7.4e9, 7.7e9),
        ("openvla-7b", 7.4e9, 7.7e9),
        ("smolvla", 450.0e6 - 47.4e6 - 9.3e6, 450.1e6 - 47.3e6 - 9.1e6),
        ("pi0", 4027.9e6 - 790.1e6 - 109.1e6, 4028.1e6 - 789.9e6 - 108.9e6),
        ("pi0.5", 4143.3e6 - 790.1e6 - 109.1e6, 4143.5e6 - 789.9e6 - 108.9e6),
    ):
        with torch.device("meta"):
            count = sum(p.numel() for p in sqap.models.empty_model(SHAPES[name]).parameters())
        assert low < count < high, name


@pytest.mark.parametrize("recipe", [Recipe.w4a8(keep=0.5), Recipe()])
def test_a_random_policy_acts(policy: Policy, recipe: Recipe) -> None:
    made = random_policy(policy.config.model, recipe)
    image = np.zeros((32, 32, 3), np.uint8)
    chunk = made.act(sqap.Observation(dict.fromkeys(made.config.cameras, image), "go"), seed=0)
    assert np.isfinite(chunk).all()
    quantized = sum(isinstance(module, QuantizedLinear) for module in made.model.modules())
    assert bool(quantized) == (recipe.quantization is not None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["POLICY", "--vs", "magic"], "no candidate is called 'magic'; there are sqap, "),
        (["POLICY", "--vs", "sqap-keep-all"], "no candidate is called 'sqap-keep-all'"),
        (
            ["POLICY", "--vs", "nowhere:fast"],
            "no candidate is called 'nowhere:fast': No module",
        ),
        (["POLICY", "--vs", "json:dumps"], "json:dumps is no sqap.benchmark.candidates.Candidate"),
        (["POLICY", "--vs", "sqap-keep-2"], "keep_ratio must be in (0, 1], got 2.0"),
        (["--shape", "gpt-5"], "no shape is called 'gpt-5'; there are cogact-7b"),
        ([], "name a policy to time, or a --shape"),
        (["POLICY", "--shape", "cogact-7b"], "one of the two"),
        (["nowhere", "--vs", ""], "no policy at nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(saved: Path, arguments: list[str], sentence: str) -> None:
    given = [str(saved) if a == "POLICY" else a for a in arguments]
    result = CliRunner().invoke(app, ["bench", *given])
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_every_candidate_says_what_it_is() -> None:
    assert all(candidate.about for candidate in CANDIDATES.values())
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        bench(Subject("reference", Recipe()), [], steps=0)


def test_eight_bit_products_are_of_the_same_weights() -> None:
    """What stands for torch's dynamic quantization on GPUs; cuBLAS multiplies no odd sizes."""
    torch.manual_seed(0)
    linear, odd = torch.nn.Linear(64, 24), torch.nn.Linear(24, 7)
    model = torch.nn.Sequential(linear, odd).requires_grad_(False)
    x = torch.randn(2, 3, 64)
    expected = linear(x)
    eight(model)
    assert isinstance(model[0], Int8Linear)
    assert model[1] is odd
    assert float((model[0](x) - expected).norm() / expected.norm()) < 0.02
    assert model[0](x.bfloat16()).dtype == torch.bfloat16
    large = x.repeat(20, 1, 1).reshape(-1, 64)
    torch.testing.assert_close(model[0](large)[:1], model[0](x).reshape(-1, 24)[:1])

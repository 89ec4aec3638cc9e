"""`quantize_` on modules that are none of ours."""

from __future__ import annotations

import copy
import pickle
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import sqap
from sqap.errors import InputError
from sqap.kernels import cpu
from sqap.quantization import QuantizedLinear, inplace
from sqap.recipe import Scheme

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2, **more)).eval()


def neox() -> nn.Module:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, initializer_range=0.2)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, initializer_range=0.2)).eval()


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 11), generator=generator)} for _ in range(count)]


@torch.no_grad()
def outputs(module: nn.Module, given: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([module(**inputs)[0] for inputs in given])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def linears(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize(("make", "count"), [(llama, 15), (neox, 9), (bert, 13)])
def test_every_linear_is_packed_and_multiplied_by_the_kernels(
    make: Callable[[], nn.Module], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, given = make(), batches()
    expected, calls = outputs(module, given), []
    done = sqap.quantize_(module, Scheme(8, 8))
    assert len(done.replaced) == count
    assert done.skipped == {}
    assert set(done.replaced) == set(linears(module))
    right = cpu.CpuLinear.__call__

    def counted(linear: cpu.CpuLinear, *arguments: Any) -> Tensor:
        calls.append(linear)
        return right(linear, *arguments)

    monkeypatch.setattr(cpu.CpuLinear, "__call__", counted)
    found = outputs(module, given)
    assert {linear.bound() for linear in linears(module).values()} <= set(calls)
    assert 0 < error(found, expected) < 0.03


@pytest.mark.parametrize("make", [llama, neox, bert])
def test_calibrated_it_is_nearer_on_the_calibration_inputs(make: Callable[[], nn.Module]) -> None:
    given = batches()
    expected, found = outputs(make(), given), {}
    for name, calibration in (("nearest", None), ("gptq", given)):
        module = make()
        done = sqap.quantize_(module, calibration=calibration)
        assert not done.skipped
        assert {linear.weight.dtype for linear in linears(module).values()} == {torch.uint8}
        found[name] = error(outputs(module, given), expected)
    assert 0 < found["gptq"] < 0.8 * found["nearest"] < 0.5


def test_the_readmes_example() -> None:
    """As it stands there."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "quantize_" in block]
    names: dict[str, Any] = {"sqap": sqap, "model": llama(), "batches": batches()}
    exec(textwrap.dedent(code), names)
    assert len(linears(names["model"])) == 14
    assert names["done"].skipped == {"lm_head": "named by skip"}


class Twice(nn.Module):
    """Inputs in every way that they can be given, one linear in two places, and one that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.layers = nn.Sequential(self.first, self.first, nn.Dropout(0.9))
        self.last = nn.Linear(16, 8, bias=False)
        self.unused = nn.Linear(16, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.last(input=self.layers(x) * scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x, "scale": 1.0}],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_calibration_inputs_may_be_given_in_every_way(wrap: Callable[[Tensor], Any]) -> None:
    module = Twice().train()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    done = sqap.quantize_(module, calibration=iter([wrap(x[:20]), wrap(x[20:])]), scheme=Scheme(8, 8))
    assert done.replaced == ("first", "last")
    assert done.skipped == {"unused": "calibration does not reach it"}
    assert module.first is module.layers[0] is module.layers[1]
    assert isinstance(module.first, QuantizedLinear)
    assert module.training
    assert module.layers[2].training
    assert module.first.training
    found, expected = module.eval(), Twice().eval()
    with torch.no_grad():
        assert error(found(x), expected(x)) < 0.05


def test_every_call_of_a_linear_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    add = inplace.Hessian.add

    def counted(hessian: inplace.Hessian, x: Tensor) -> None:
        seen[hessian.name] = seen.get(hessian.name, 0) + len(x)
        add(hessian, x)

    monkeypatch.setattr(inplace.Hessian, "add", counted)
    sqap.quantize_(Twice(), calibration=[torch.randn(5, 16), torch.randn(3, 16)])
    assert seen == {"first": 16, "last": 8}


def test_few_hessians_at_a_time_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the later linears are rounded on what the earlier ones have become."""
    given, expected = batches(), outputs(llama(), batches())
    whole, parts = llama(), llama()
    sqap.quantize_(whole, calibration=given)
    monkeypatch.setattr(inplace, "HESSIANS", 1)
    sqap.quantize_(parts, calibration=given)
    errors = [error(outputs(module, given), expected) for module in (whole, parts)]
    assert errors[0] != errors[1]
    assert errors[1] < 1.2 * errors[0]


def test_what_is_skipped_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 16)
            self.head = nn.Linear(16, 8, bias=False)
            self.head.weight = self.table.weight
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.bias = self.a.bias
            self.odd = nn.Linear(15, 4)
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
            self.attention = nn.MultiheadAttention(16, 2)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32)
            self.patched = nn.Linear(16, 4)
            self.patched.forward = lambda x: x  # type: ignore[method-assign]
            self.good = nn.Linear(16, 4)

    subclass = "it is a NonDynamicallyQuantizableLinear, which may do more than a linear"
    module = Odd()
    done = sqap.quantize_(module, skip=())
    assert done.replaced == ("good",)
    assert list(linears(module)) == ["good"]
    assert done.skipped == {
        "head": "its weight is table.weight, too",
        "a": "its bias is b.bias, too",
        "b": "its bias is a.bias, too",
        "odd": "4-bit levels are stored in pairs, in_features 15 is odd",
        "parametrized": "it is a ParametrizedLinear, which may do more than a linear",
        "attention.out_proj": subclass,
        "encoder.self_attn.out_proj": subclass,
        "encoder.linear1": "nn.TransformerEncoderLayer reads its weight itself",
        "encoder.linear2": "nn.TransformerEncoderLayer reads its weight itself",
        "patched": "its forward has been replaced",
    }
    groups = Scheme(4, 8, weight_granularity="group", group_size=32)
    assert sqap.quantize_(nn.Sequential(nn.Linear(48, 4)), groups).skipped == {
        "0": "group_size 32 does not divide in_features 48"
    }


def test_a_tied_output_matrix_stays_tied() -> None:
    module, given = llama(tie_word_embeddings=True), batches()
    expected = outputs(module, given)
    done = sqap.quantize_(module, Scheme(8, 8))
    assert done.skipped == {"lm_head": "its weight is model.embed_tokens.weight, too"}
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert error(outputs(module, given), expected) < 0.03


@pytest.mark.parametrize(
    "skip", ["*.mlp.*", ["model.layers.?.mlp.up_proj", "*_proj"], lambda name, m: m.out_features == 48]
)
def test_linears_may_be_skipped_by_name_pattern_or_function(skip: Any) -> None:
    module = llama()
    done = sqap.quantize_(module, skip=skip)
    assert done.skipped
    assert set(done.skipped.values()) == {"named by skip"}
    assert isinstance(module.get_submodule("model.layers.1.mlp.up_proj"), nn.Linear)
    assert "model.layers.1.mlp.up_proj" in done.skipped
    assert "lm_head" in done.replaced


def test_hooks_of_a_linear_go_over_and_new_ones_fire() -> None:
    module, seen = Twice().eval(), []
    before = module.last.register_forward_hook(lambda *_: seen.append("before"))
    module.last.register_forward_pre_hook(lambda m, args, kwargs: seen.append("with"), with_kwargs=True)
    sqap.quantize_(module)
    after = module.last.register_forward_hook(lambda *_: seen.append("after"))

    def run() -> list[str]:
        seen.clear()
        with torch.no_grad():
            module(torch.ones(1, 16))
        return seen

    assert run() == ["with", "before", "after"]
    before.remove()
    after.remove()
    assert run() == ["with"]


def test_it_is_copied_pickled_saved_and_loaded() -> None:
    module, fresh, given = llama(), llama(), batches(2)
    sqap.quantize_(module, calibration=given)
    expected = outputs(module, given)
    sqap.quantize_(fresh)
    assert not torch.equal(outputs(fresh, given), expected)
    fresh.load_state_dict(module.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(outputs(other, given), expected)
    other = copy.deepcopy(module)
    next(iter(linears(other).values())).scale.zero_()
    assert torch.equal(outputs(module, given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_cast_and_moved(dtype: torch.dtype) -> None:
    module, given = llama(), batches(2)
    sqap.quantize_(module, Scheme(8, 8))
    expected = outputs(module, given)
    module.to(dtype)
    assert {linear.scale.dtype for linear in linears(module).values()} == {torch.float32}
    assert error(outputs(module, given).float(), expected) < 0.05
    module.to("meta")
    there = [{"input_ids": inputs["input_ids"].to("meta")} for inputs in given]
    assert outputs(module, there).is_meta


def test_a_module_in_bfloat16_is_quantized_as_it_is() -> None:
    module, given = llama().bfloat16(), batches(2)
    expected = outputs(module, given)
    sqap.quantize_(module, Scheme(8, 8), given)
    found = outputs(module, given)
    assert found.dtype == torch.bfloat16
    assert error(found.float(), expected.float()) < 0.05


def test_an_input_that_needs_a_gradient_is_refused() -> None:
    module = Twice().eval()
    sqap.quantize_(module)
    with pytest.raises(InputError, match=r"^a quantized linear has no gradient, and its input needs one: "):
        module(torch.ones(1, 16, requires_grad=True))
    assert module(torch.ones(1, 16)).shape == (1, 8)


def test_it_works_whatever_mode_the_caller_is_in() -> None:
    modules = Twice().eval(), Twice().eval()
    x = [torch.randn(30, 16, generator=torch.Generator().manual_seed(3))]
    sqap.quantize_(modules[0], calibration=x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        sqap.quantize_(modules[1], calibration=x)
    for found, expected in zip(
        modules[1].state_dict().values(), modules[0].state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected)
        assert not found.is_inference()


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        (None, {"skip": "mlp.*"}, r"skip names 'mlp\.\*', which matches no linear of the module"),
        (None, {"calibration": []}, "calibration is empty; give inputs, or None to round to nearest"),
        (lambda m: m.last.weight.data.fill_(torch.nan), {}, "last holds weights that are not finite"),
        (lambda m: m.last.to("meta"), {}, "last has its weight on the meta device; load it first"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_changes_nothing(
    change: Any, arguments: dict[str, Any], sentence: str
) -> None:
    module = Twice()
    if change is not None:
        change(module)
    with pytest.raises(InputError, match=sentence):
        sqap.quantize_(module, **arguments)
    assert not linears(module)


def test_a_linear_alone_cannot_be_replaced() -> None:
    with pytest.raises(InputError, match="the module is itself a linear, which cannot be replaced in place"):
        sqap.quantize_(nn.Linear(4, 4))


def test_calibration_inputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(InputError, match="calibration gives first inputs that are not finite"):
        sqap.quantize_(Twice(), calibration=[torch.full((2, 16), torch.inf)])

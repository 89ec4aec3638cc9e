"""The model card of a policy: ``README.md``, with the Hugging Face hub's front matter.

It says what the policy was made from, how, how large it is and what was measured; what was not measured is
said, too. Names that come from files or users stand in code spans, on one line, so that they cannot be taken
for Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqap.build import __version__
from sqap.checkpoints.opened import Opened
from sqap.config import Calibration, Origin, PolicyConfig
from sqap.errors import CheckpointError, one_line
from sqap.files import reason, whole_file
from sqap.models import empty_model
from sqap.models.storage import size, stored_bytes
from sqap.quantization import LinearReport, list_linears
from sqap.recipe import Pruning, Recipe

CARD = "README.md"
PLACE = "path/to/this/policy"  # until there is a better one to name
BEGIN, END = "<!-- sqap's measurements begin -->", "<!-- sqap's measurements end -->"
NOTHING = (
    "Nothing yet: neither its success at a task, nor the error of its actions, nor its speed. What "
    "compression has cost it is not known."
)
_TITLE = "### "
_FRONT = re.compile(r"\ufeff?---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_LICENSE = re.compile(r"""^license:[ ]*["']?([A-Za-z0-9.+-]{1,50})["']?[ ]*$""", re.MULTILINE)


def write_card(policy: Opened, directory: Path) -> None:
    """Write the model card of a policy of which nothing was measured so far."""
    (directory / CARD).write_text(compose(policy), encoding="utf-8")


def compose(policy: Opened) -> str:
    """The model card's text."""
    sections = (
        _front_matter(policy),
        _heading(policy),
        "## What it is\n\n" + "\n".join(f"- {line}" for line in _facts(policy)),
        "## How it was compressed\n\n" + "\n\n".join(_recipe(policy)),
        f"## What was measured\n\n{BEGIN}\n{NOTHING}\n{END}",
        "## How to use it\n\n" + _use(policy.config),
    )
    return "\n\n".join(sections) + "\n"


def read_card(directory: Path) -> bytes | None:
    """The model card beside a checkpoint; None if there is none that can be read."""
    path = directory / CARD
    with suppress(OSError):
        return path.read_bytes() if path.is_file() else None
    return None


def read_license(directory: Path) -> str | None:
    """The license that the model card beside a checkpoint states, if there is one."""
    front = _FRONT.match((read_card(directory) or b"").decode("utf-8", errors="replace"))
    found = front and _LICENSE.search(front[1])
    return found[1].lower() if found else None


def measured(directory: Path) -> dict[str, str]:
    """What the model card of a policy says was measured: title -> Markdown.

    Raises:
        CheckpointError: there is no card, it is a link, or the two comments that this stands between are not
            in it.
    """
    section = _section(directory)[1]
    entries = (entry.partition("\n") for entry in f"\n{section}".split(f"\n{_TITLE}")[1:])
    return {title: text.strip() for title, _, text in entries}


def add_measurement(directory: Path, title: str, text: str) -> None:
    """Put something that was measured into the model card of a policy; of one title, the last is kept.

    Args:
        directory: of the policy.
        title: what was measured, on what: one line of Markdown.
        text: what came out, as Markdown without titles of its own.

    Raises:
        CheckpointError: as `measured`.
        InputError: the card cannot be written.
    """
    before, _, behind = _section(directory)
    entries = measured(directory) | {title: text.strip()}
    section = "\n\n".join(f"{_TITLE}{title}\n\n{text}" for title, text in entries.items())
    with whole_file(directory / CARD) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{section}\n{END}{behind}", encoding="utf-8")


def name_place(directory: Path, place: str) -> None:
    """Let the card's examples load the policy from ``place``, a repository on the hub."""
    path = directory / CARD
    path.write_bytes(path.read_bytes().replace(PLACE.encode(), place.encode()))


def code(text: str) -> str:
    """A code span with ``text`` in it, which may hold anything."""
    text = one_line(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _section(directory: Path) -> tuple[str, str, str]:
    """The card before, between and behind the two comments."""
    path = directory / CARD
    if path.is_symlink():  # to write it would change what the hub's client believes to have downloaded
        raise CheckpointError(
            f"{path} is a link, as in the hub's cache: save the policy to a directory first"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"cannot read the model card {path}: {reason(problem)}") from problem
    before, begin, rest = text.partition(BEGIN)
    section, end, behind = rest.partition(END)
    if not begin or not end:
        raise CheckpointError(
            f"{path} lacks the comments {BEGIN} and {END}, between which stands what was measured; put them "
            "into it, or save the policy again"
        )
    return before, section, behind


def _front_matter(policy: Opened) -> str:
    """YAML, of which JSON is a part."""
    origin = policy.origin
    data: dict[str, Any] = {"library_name": "sqap", "pipeline_tag": "robotics"}
    if origin.license is not None:
        data["license"] = origin.license
    if origin.commit is not None:
        data["base_model"] = origin.name
        if policy.recipe.quantization is not None:
            data["base_model_relation"] = "quantized"
    tags = ["robotics", "vision-language-action", "sqap", "lerobot"]
    tags += ["quantization"] * (policy.recipe.quantization is not None)
    tags += ["token-pruning"] * (policy.recipe.pruning is not None)
    data["tags"] = tags
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    return "\n".join(("---", *lines, "---"))


def _heading(policy: Opened) -> str:
    quantization, pruning = policy.recipe.quantization, policy.recipe.pruning
    words = []
    if quantization is not None and quantization.decoder is not None:
        scheme = quantization.decoder
        words.append(f"decoder W{scheme.weight_bits}A{scheme.activation_bits}")
    elif quantization is not None:
        words.append("quantized")
    if pruning is not None:
        words.append(f"{100 * pruning.cuts[-1].keep_ratio:g} % of the visual tokens")
    family, what = code(policy.config.family), ", ".join(words) or "not compressed"
    return (
        f"# A {family} policy: {what}\n\n"
        f"A vision-language-action policy for a robot, written by sqap {__version__}, which quantizes such "
        "policies and prunes their visual tokens without retraining."
    )


def _facts(policy: Opened) -> Iterator[str]:
    config, head = policy.config, policy.config.model.head
    yield f"Original: {_original(policy.origin)}."
    if policy.source is not None:
        yield f"SHA-256 that the original is known by: {code(policy.source)}."
    if policy.origin.license is None:
        yield "License: none was found beside the original, whose terms hold."
    cameras = ", ".join(map(code, config.cameras))
    state = f", the robot's state of {config.state_dim} numbers" if config.state is not None else ""
    yield f"Reads images ({cameras}){state} and an instruction in words."
    executed = config.n_action_steps or head.horizon
    yield (
        f"Gives chunks of {head.horizon} actions of {config.action_dim} numbers, in the units of the robot "
        f"that the original was trained for; {executed} are executed before the next look."
    )
    after, before = stored_bytes(policy.model), stored_bytes(empty_model(config.model))
    if policy.recipe.quantization is None:
        yield f"Weights: {size(after)}, in bfloat16."
    else:
        yield (
            f"Weights: {size(after)}, which is {100 * after / before:.1f} % of {size(before)} in bfloat16 "
            "(what actions do not need is in neither)."
        )


def _original(origin: Origin) -> str:
    if origin.name is None:
        return "a checkpoint on a disk, whose name on the hub is not known"
    if origin.commit is None:
        return f"sqap's bundled policy {code(origin.name)}"
    return f"[{code(origin.name)}](https://huggingface.co/{origin.name}) at commit {code(origin.commit)}"


def _recipe(policy: Opened) -> Iterator[str]:
    recipe = policy.recipe
    if recipe == Recipe():
        yield "Not at all: this is an original, its floats stored in bfloat16."
        return
    if recipe.quantization is not None:
        yield _linears_table(list_linears(policy.model))
        quantization = recipe.quantization
        rounding = {"gptq": "by GPTQ", "nearest": "to the nearest level"}[quantization.rounding]
        rotated = ", after Hadamard rotations" if quantization.rotate else ""
        cache = "" if quantization.kv_bits is None else f" Keys and values have {quantization.kv_bits} bits."
        yield f"Weights were rounded {rounding}{rotated}.{cache}"
    if recipe.pruning is not None:
        yield _pruning(recipe.pruning, policy.config)
    yield _calibration(policy.calibration)
    yield "The whole recipe, and every linear as it is stored, is in `policy.json`."


def _linears_table(linears: list[LinearReport]) -> str:
    rows = ["| part | linears | quantized | bits of weights and activations |", "|---|---|---|---|"]
    for part in dict.fromkeys(linear.part for linear in linears):
        mine = [linear for linear in linears if linear.part == part]
        packed = [linear for linear in mine if linear.quantized]
        bits = sorted({f"W{linear.weight_bits}A{linear.activation_bits}" for linear in packed})
        bits += ["bfloat16"] * (len(packed) < len(mine))
        rows.append(f"| {part} | {len(mine)} | {len(packed)} | {', '.join(bits)} |")
    return "\n".join(rows)


def _pruning(pruning: Pruning, config: PolicyConfig) -> str:
    tokens = config.model.grid**2
    cuts = "; ".join(
        f"{round(cut.keep_ratio * tokens)} of {tokens} behind decoder layer {cut.after_layer}"
        for cut in pruning.cuts
    )
    return f"Visual tokens that go on, of each camera: {cuts}. They are chosen by method `{pruning.method}`."


def _calibration(found: Calibration | None) -> str:
    if found is None:
        return "No observations were used to calibrate it."
    says = [f"Calibrated on {found.frames} observations (SHA-256 {code(found.frames_hash)})."]
    if found.recall is not None:
        says.append(
            f"Looking ahead found {100 * found.recall:.1f} % of the tokens that later layers attend to most."
        )
    if found.top_k is not None and found.overlap is not None:
        says.append(
            f"Quantized and in full precision, the first {found.top_k} tokens of the ranking agree in "
            f"{100 * found.overlap:.1f} %."
        )
    return " ".join(says)


def _use(config: PolicyConfig) -> str:
    names = [json.dumps(one_line(camera), ensure_ascii=False) for camera in config.cameras]
    images = ", ".join(f"{name}: image" for name in names)
    state = ", state" if config.state is not None else ""
    return (
        "```python\n"
        "import sqap\n"
        f'policy = sqap.load("{PLACE}")\n'
        f'actions = policy.act(sqap.Observation({{{images}}}, "what to do"{state}))\n'
        "```\n\n"
        "Images are uint8 RGB arrays of any size. In LeRobot, with the plug-in `lerobot_policy_sqap`: "
        f"`lerobot-eval --policy.path={PLACE} ...`."
    )

"""LeRobot's own SmolVLA, run in LeRobot's environment by `peers.lerobot_step`: nothing of sqap is imported.

    python lerobot_step_process.py DIR float32|published THREADS

Messages are tensors in safetensors' format behind their length in eight bytes: inputs of
``VLAFlowMatching.sample_actions`` come in, a chunk and the process's peak memory go out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

HEAD_DIM = 64  # SmolVLM2's, of text and vision


def vlm_config(weights: Path) -> dict[str, Any]:
    """SmolVLM2's configuration, as on the hub, with the sizes of a checkpoint's tensors."""
    with safe_open(str(weights), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping

    def shape(name: str) -> list[int]:
        return next(found for key, found in shapes.items() if key.endswith(name))

    def depth(part: str) -> int:
        return 1 + max(int(k.split(part)[1].split(".")[0]) for k in shapes if part in k)

    vision, text = "vision_model.encoder.layers.", "text_model.layers."
    width, _, patch, _ = shape("embeddings.patch_embedding.weight")
    patches = shape("vision_model.embeddings.position_embedding.weight")[0]
    rows, hidden = shape("text_model.embed_tokens.weight")
    factor = round((shape("modality_projection.proj.weight")[1] / width) ** 0.5)
    return {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        "scale_factor": factor,
        "image_token_id": 4,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": width,
            "image_size": round(patches**0.5) * patch,
            "patch_size": patch,
            "intermediate_size": shape(f"{vision}0.mlp.fc1.weight")[0],
            "num_attention_heads": width // HEAD_DIM,
            "num_hidden_layers": depth(vision),
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": shape(f"{text}0.mlp.gate_proj.weight")[0],
            "num_attention_heads": shape(f"{text}0.self_attn.q_proj.weight")[0] // HEAD_DIM,
            "num_key_value_heads": shape(f"{text}0.self_attn.k_proj.weight")[0] // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "num_hidden_layers": depth(text),
            "rms_norm_eps": 1e-5,
            "vocab_size": rows,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
            "max_position_embeddings": 8192,
        },
    }


def load_policy(directory: Path, precision: str) -> Any:
    """LeRobot's policy with the weights of a directory."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import lerobot.policies.smolvla.smolvlm_with_expert as vlm
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    tokenizer = SimpleNamespace(fake_image_token_id=3, global_image_token_id=5)  # for options not used
    vlm.AutoProcessor = SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(tokenizer=tokenizer))
    config = PreTrainedConfig.from_pretrained(directory)
    weights = directory / "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(vlm_config(weights)))
        config.vlm_model_name, config.load_vlm_weights, config.device = folder, False, "cpu"
        policy = SmolVLAPolicy(config)
    policy.load_state_dict(load_file(weights))
    return (policy.float() if precision == "float32" else policy).eval()


def peak_bytes() -> int:
    """The largest resident set of this process since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Peak memory counted anew, so that loading is not in a step's."""
    Path("/proc/self/clear_refs").write_text("5")


def send(to: BinaryIO, tensors: dict[str, Tensor]) -> None:
    """One message."""
    content = save(tensors)
    to.write(len(content).to_bytes(8, "little") + content)
    to.flush()


def receive(source: BinaryIO) -> dict[str, Tensor] | None:
    """One message; None at the end."""
    length = source.read(8)
    return load(source.read(int.from_bytes(length, "little"))) if length else None


@torch.inference_mode()
def step(model: Any, given: dict[str, Tensor]) -> Tensor:
    """A chunk ``(1, horizon, padded)``, normalised."""
    images = list(given["pixels"][:, None])
    seen = [torch.ones(1, dtype=torch.bool) for _ in images]
    ids = given["ids"]
    out: Tensor = model.sample_actions(
        images, seen, ids, torch.ones_like(ids, dtype=torch.bool), given["state"], noise=given["noise"]
    )
    return out.float().contiguous()


def main() -> None:
    """Load, say how many bytes of weights there are, and answer until the input ends."""
    directory, precision, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # LeRobot prints
    torch.set_num_threads(int(threads))
    policy = load_policy(Path(directory), precision)
    nbytes = sum(p.numel() * p.element_size() for p in policy.parameters())
    send(answers, {"bytes": torch.tensor(nbytes)})
    forget_peak()
    while (given := receive(sys.stdin.buffer)) is not None:
        send(answers, {"chunk": step(policy.model, given), "peak": torch.tensor(peak_bytes())})


if __name__ == "__main__":
    main()

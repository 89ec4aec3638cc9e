"""vla.cpp as a rival of `sqap bench`: PYTHONPATH=benchmarks sqap bench POLICY --vs peers.vla_cpp:q4_0

It gets the policy's weights as a GGUF, and acts through its own Python package. OpenVLA-OFT it multiplies in
any of `PRECISIONS`, SmolVLA in bfloat16 or float32. Which of these an option of its programs says, but its
library takes none: float32 needs one in which it is the default.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqap.benchmark.candidates import Candidate
from sqap.benchmark.exported import Elsewhere
from sqap.errors import InputError, SqapError
from sqap.models import FlowHeadConfig, ModelInputs
from sqap.policy import Policy
from sqap.processing import ImageSteps, Normalize

PRECISIONS = ("bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # all the types that it multiplies with
THREADS, LIBRARY, LIBRARY_F32 = "VLA_N_THREADS", "VLA_LIBRARY", "VLA_LIBRARY_F32"


class VlaCpp(Elsewhere):
    """Stands where the model stood."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model: Any, pixel_format: int, steps: ImageSteps, nbytes: int) -> None:
        super().__init__(nbytes)
        self._model, self._pixel_format, self._steps = model, pixel_format, steps

    def run(self, inputs: Sequence[ModelInputs], *_: object) -> list[Tensor]:
        """Normalised actions ``(1, horizon, action_dim)`` for each of ``inputs``."""
        return [self(given) for given in inputs]

    def forward(self, inputs: ModelInputs) -> Tensor:
        assert inputs.proprio is not None
        tokens, noise = inputs.token_ids[0].tolist(), inputs.noise
        actions = self._model.predict(
            [image.contiguous().numpy() for image in self._images(inputs.pixels[0])],
            tokens=tokens[:-1] if noise is None else tokens,  # OpenVLA-OFT's last one it adds itself
            state=inputs.proprio[0].numpy(),
            noise=None if noise is None else noise.flatten().numpy(),
            pixel_format=self._pixel_format,
        )
        return torch.from_numpy(actions)[None]

    def _images(self, pixels: Tensor) -> Tensor:
        """What its own statistics normalise: ``(cameras, size, size, 3)`` from 0 to 1."""
        (step,) = [step for step in self._steps if isinstance(step, Normalize)]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (step.mean, step.std))
        return (pixels * std + mean).permute(0, 2, 3, 1)


def vla_cpp(policy: Policy, precision: str) -> Policy:
    """The policy, an OpenVLA-OFT or SmolVLA, in vla.cpp, nothing pruned; it is used up.

    Raises:
        InputError: the policy is neither, or its weights are not read in this type.
        SqapError: vla.cpp does not load it.
        ImportError: a package is not installed.
    """
    import vla_cpp
    from peers import vla_cpp_gguf, vla_cpp_oft, vla_cpp_smolvla

    flow = isinstance(policy.config.model.head, FlowHeadConfig)
    known = vla_cpp_smolvla.PRECISIONS if flow else PRECISIONS
    if precision not in known:
        family = "SmolVLA" if flow else "OpenVLA-OFT"
        raise InputError(f"vla.cpp multiplies {family}'s weights in {', '.join(known)}, not in {precision}")
    if precision == "f32":
        if not os.environ.get(LIBRARY_F32):
            raise InputError(f"{LIBRARY_F32} must be set: docs/bench.md says to what")
        os.environ[LIBRARY] = os.environ[LIBRARY_F32]
    contents = (vla_cpp_smolvla if flow else vla_cpp_oft).contents(policy)
    os.environ[THREADS] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder, f"{precision}.gguf")
        nbytes = vla_cpp_gguf.write(contents, gguf, precision)
        del contents
        policy.model.to("meta")
        try:
            loaded = vla_cpp.load(str(gguf))
        except (OSError, RuntimeError) as problem:
            raise SqapError(f"vla.cpp: {problem}") from problem
    model: Any = VlaCpp(loaded, vla_cpp.PIXEL_F32_RGB_01, policy.config.images[0], nbytes)
    return Policy(model, policy.config, policy.tokenizer)


bf16, q8_0, q5_1, q5_0, q4_1, q4_0, f32 = (
    Candidate(f"vla.cpp, {precision}", partial(vla_cpp, precision=precision), False, "vla.cpp", ("cpu",))
    for precision in (*PRECISIONS, "f32")
)

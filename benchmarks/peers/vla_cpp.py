"""vla.cpp as a rival of `sqap bench`: PYTHONPATH=benchmarks sqap bench POLICY --vs peers.vla_cpp:q4_0

It gets the policy's weights as a GGUF, and acts through its own Python package.
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
from sqap.errors import SqapError
from sqap.models import ModelInputs
from sqap.policy import Policy
from sqap.processing import ImageSteps, Normalize

PRECISIONS = ("bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # all the types that it multiplies with
THREADS_VARIABLE = "VLA_N_THREADS"


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
        actions = self._model.predict(
            [image.contiguous().numpy() for image in self._images(inputs.pixels[0])],
            tokens=inputs.token_ids[0, :-1].tolist(),  # it adds the last one itself
            state=inputs.proprio[0].numpy(),
            pixel_format=self._pixel_format,
        )
        return torch.from_numpy(actions)[None]

    def _images(self, pixels: Tensor) -> Tensor:
        """What its own statistics normalise: ``(cameras, size, size, 3)`` from 0 to 1."""
        (step,) = [step for step in self._steps if isinstance(step, Normalize)]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (step.mean, step.std))
        return (pixels * std + mean).permute(0, 2, 3, 1)


def vla_cpp(policy: Policy, precision: str) -> Policy:
    """The policy in vla.cpp, nothing pruned, its matrices in one of `PRECISIONS`; it is used up.

    Raises:
        InputError: the policy is no OpenVLA-OFT.
        SqapError: vla.cpp does not load it.
        ImportError: a package is not installed.
    """
    import vla_cpp
    from peers.vla_cpp_gguf import write

    os.environ[THREADS_VARIABLE] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder, f"{precision}.gguf")
        nbytes = write(policy, gguf, precision)
        policy.model.to("meta")
        try:
            loaded = vla_cpp.load(str(gguf))
        except (OSError, RuntimeError) as problem:
            raise SqapError(f"vla.cpp: {problem}") from problem
    model: Any = VlaCpp(loaded, vla_cpp.PIXEL_F32_RGB_01, policy.config.images[0], nbytes)
    return Policy(model, policy.config, policy.tokenizer)


bf16, q8_0, q5_1, q5_0, q4_1, q4_0 = (
    Candidate(f"vla.cpp, {precision}", partial(vla_cpp, precision=precision), False, "vla.cpp", ("cpu",))
    for precision in PRECISIONS
)

"""What the peers' perplexity scripts share. They run in environments of their own, without sqap.

`llm_perplexity.py` calls ``python perplexity_<peer>.py <work folder> <method>`` with ``benchmarks`` on the
path, and reads the last line printed, a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from perplexity import perplexity
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Quantize = Callable[[Any, Tensor, Any], Any]


def main(methods: Mapping[str, Quantize], packages: Collection[str]) -> None:
    """Quantize the exported model by the method asked for, and print its perplexity.

    Args:
        methods: name -> (model, calibration windows ``(count, tokens)``, tokenizer) to the quantized model.
        packages: distributions whose versions are reported.
    """
    work, method = Path(sys.argv[1]), sys.argv[2]
    tokens = load_file(work / "tokens.safetensors")
    model = AutoModelForCausalLM.from_pretrained(work / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "smollm2")
    model = methods[method](model, tokens["calibration"], tokenizer)
    result = perplexity(lambda ids: model(ids, use_cache=False).logits, tokens["evaluation"])
    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    print(json.dumps({"perplexity": result, "versions": versions}))

"""The exported model as transformers runs it, in full precision: what our own decoder must agree with."""

from __future__ import annotations

from hugging_face import main

main({"full": lambda model, calibration, tokenizer: model}, ())

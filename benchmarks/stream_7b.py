"""A 7B decoder through rotation and GPTQ on a small machine, one layer in memory at a time.

    python benchmarks/stream_7b.py --json docs/stream-7b.json [--layers 32] [--tokens 2048] [--work DIR]

Llama-2-7B's shape with random weights in bfloat16, one file per layer, mapped rather than read. Interrupted,
the same command goes on with the next layer; times then are those of the layers that this run quantized.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from sqap.benchmark.shapes import LLAMA
from sqap.files import whole_file, write_json
from sqap.models import DecoderConfig
from sqap.models.decoder import Decoder, DecoderLayer
from sqap.models.storage import stored_bytes
from sqap.quantization import Partial, quantize_decoder
from sqap.recipe import Recipe

SEQUENCE = 256


def write_layers(directory: Path, config: DecoderConfig) -> None:
    """Random weights, a file per layer; those that are there already stay."""
    for i in range(config.depth):
        path = directory / f"layer-{i:02d}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(i)
            with torch.device("meta"):
                shapes = {name: p.shape for name, p in DecoderLayer(config).named_parameters()}
            tensors = {
                name: (
                    torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
                    if len(shape) > 1
                    else torch.ones(shape)
                ).bfloat16()
                for name, shape in shapes.items()
            }
            with whole_file(path) as temporary:
                save_file(tensors, temporary)


def mapped_decoder(directory: Path, config: DecoderConfig) -> Decoder:
    """The decoder with its layers mapped from their files, which costs no memory until they are used."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.embed_tokens.to_empty(device="cpu")
    torch.nn.init.normal_(decoder.embed_tokens.weight)
    decoder.norm.to_empty(device="cpu")
    torch.nn.init.ones_(decoder.norm.weight)
    for i, layer in enumerate(decoder.layers):
        layer.load_state_dict(load_file(directory / f"layer-{i:02d}.safetensors"), assign=True)
    return decoder


class PeakMemory:
    """Watches the process from a thread: private memory, and pages of mapped files, which can be dropped."""

    def __init__(self) -> None:
        self.private = self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            self.private = max(self.private, int(fields["RssAnon"].split()[0]) * 1024)
            self.mapped = max(self.mapped, int(fields["RssFile"].split()[0]) * 1024)

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=LLAMA.depth)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--work", type=Path, default=Path("build/stream-7b"))
    args = parser.parse_args()
    config = dataclasses.replace(LLAMA, depth=args.layers)
    args.work.mkdir(parents=True, exist_ok=True)
    write_layers(args.work, config)
    decoder = mapped_decoder(args.work, config)
    quantization = Recipe.w4a8().quantization
    assert quantization is not None
    generator = torch.Generator().manual_seed(0)
    hidden = [
        torch.randn(1, SEQUENCE, config.width, generator=generator) for _ in range(args.tokens // SEQUENCE)
    ]
    original_bytes = stored_bytes(decoder.layers)
    memory, started, marks = PeakMemory(), time.monotonic(), []
    with Progress() as bar:
        task = bar.add_task("weights", total=None)

        def advance(done: int, total: int) -> None:
            marks.append(time.monotonic())
            bar.update(task, completed=done, total=total)

        partial = Partial(args.work / "quantized", f"{config}{quantization}{args.tokens}")
        small = quantize_decoder(decoder, quantization, hidden, progress=advance, partial=partial)
    memory.stop()
    total = time.monotonic() - started
    layers = [later - earlier for earlier, later in zip([started, *marks], marks, strict=False)]
    report = {
        "config": dataclasses.asdict(config),
        "quantization": dataclasses.asdict(quantization),
        "calibration_tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "seconds": {"total": total, "layers": layers},
        "bytes": {"layers_bfloat16": original_bytes, "layers_quantized": stored_bytes(small.layers)},
        "peak_bytes": {"private": memory.private, "mapped_files": memory.mapped},
    }
    quantized = stored_bytes(small.layers) / 1e9
    print(
        f"{config.depth} layers in {total / 60:.1f} min; "
        f"peak {memory.private / 1e9:.2f} GB private, of which the quantized layers are {quantized:.2f} GB"
    )
    if args.json is not None:
        write_json(args.json, report)


if __name__ == "__main__":
    main()

from torch import Tensor

def paths() -> list[str]: ...
def compiled() -> list[str]: ...
def threads() -> int: ...
def quantize(
    path: str,
    x: Tensor,
    bits: int,
    symmetric: bool,
    group: int,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
) -> None: ...
def linear(
    path: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    weight_bits: int,
    bits: int,
    symmetric: bool,
    group: int,
) -> None: ...
def matmul(path: str, q: Tensor, weight: Tensor, y: Tensor, weight_bits: int) -> None: ...

def paths() -> list[str]: ...
def compiled() -> list[str]: ...
def threads() -> int: ...
def quantize(
    path: str,
    x: int,
    half: bool,
    m: int,
    k: int,
    bits: int,
    symmetric: bool,
    group: int,
    q: int,
    scale: int,
    zero_point: int,
) -> None: ...
def linear(
    path: str,
    x: int,
    half: bool,
    m: int,
    k: int,
    bits: int,
    symmetric: bool,
    group: int,
    weight: int,
    weight_bits: int,
    n: int,
    scale: int,
    groups: int,
    shared: bool,
    bias: int,
    y: int,
) -> None: ...
def matmul(path: str, q: int, m: int, k: int, weight: int, weight_bits: int, n: int, y: int) -> None: ...

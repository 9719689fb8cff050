from torch import Tensor, dtype

def softmax(input: Tensor, dim: int, dtype: dtype | None, out: Tensor | None) -> Tensor: ...
def log_softmax(input: Tensor, dim: int, dtype: dtype | None, out: Tensor | None) -> Tensor: ...
def build_info() -> dict[str, object]: ...
def plan(
    outer: int,
    dim: int,
    inner: int,
    load_dtype: dtype,
    store_dtype: dtype,
    inputs: int,
    aligned: bool,
    sm_count: int,
    shared_bytes: int,
    compute_capability: int,
    schedule: str | None = None,
) -> dict[str, str | int | bool]: ...

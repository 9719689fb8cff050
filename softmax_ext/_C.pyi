from torch import Tensor, dtype

def softmax(input: Tensor, dim: int, dtype: dtype | None, out: Tensor | None) -> Tensor: ...
def log_softmax(input: Tensor, dim: int, dtype: dtype | None, out: Tensor | None) -> Tensor: ...
def softmax_(input: Tensor, dim: int) -> Tensor: ...
def log_softmax_(input: Tensor, dim: int) -> Tensor: ...
def softmin_(input: Tensor, dim: int) -> Tensor: ...
def score_softmax(
    op: int,
    input: Tensor,
    dtype: dtype | None,
    scale: Tensor | None,
    factor: float,
    softcap: float,
    mask: Tensor | None,
    left: int,
    right: int,
    offset: int,
    sink: Tensor | None,
    sink_value: float,
) -> Tensor: ...
def score_softmax_(
    op: int,
    input: Tensor,
    scale: Tensor | None,
    factor: float,
    softcap: float,
    mask: Tensor | None,
    left: int,
    right: int,
    offset: int,
    sink: Tensor | None,
    sink_value: float,
) -> Tensor: ...
def override_torch(on: bool) -> None: ...
def build_info() -> dict[str, object]: ...
def memory_stats() -> tuple[int, int, int]: ...
def empty_cache() -> None: ...

SCHEDULES: tuple[str, ...]
HOLDS: tuple[str, ...]
LIMITS: dict[str, int]

class Plan:
    schedule: str
    hold: str
    vectorized: bool
    width: int
    vectors: int
    columns: int
    group: int
    across: int
    items: int
    team: int
    blocks: int
    shared_bytes: int
    scratch_bytes: int
    def __init__(self, **members: str | int) -> None: ...
    def members(self) -> dict[str, str | int]: ...
    @property
    def threads(self) -> int: ...
    @property
    def kernel(self) -> str: ...

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
    like: Tensor | None = None,
    like_dim: int = 0,
) -> Plan | None: ...
def mask_gradient_parts(rows: int, sharing: int) -> int: ...
def score_plan(
    rows: int,
    dim: int,
    dtype: dtype,
    inputs: int,
    sm_count: int,
    shared_bytes: int,
    compute_capability: int,
) -> Plan | None: ...
def is_direct_on_cuda(tensor: Tensor, dim: int) -> bool: ...
def segment_softmax(
    input: Tensor,
    ptr: Tensor | None,
    index: Tensor | None,
    dim: int,
    scale: float | None,
    dtype: dtype | None,
    num_segments: int | None,
) -> Tensor: ...
def segment_log_softmax(
    input: Tensor,
    ptr: Tensor | None,
    index: Tensor | None,
    dim: int,
    scale: float | None,
    dtype: dtype | None,
    num_segments: int | None,
) -> Tensor: ...
def segment_logsumexp(
    input: Tensor,
    ptr: Tensor | None,
    index: Tensor | None,
    dim: int,
    scale: float | None,
    dtype: dtype | None,
    num_segments: int | None,
) -> Tensor: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    factor: float,
    softcap: float,
    wants_lse: bool,
    wants_entropy: bool,
    in_place: bool,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None] | None: ...
def kl_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: int,
    beta: float,
    factor: float,
) -> Tensor | None: ...
def cross_entropy_of_probabilities(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    factor: float,
    softcap: float,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None] | None: ...

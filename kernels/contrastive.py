"""The function `average_keys` of losses.py, where it is derived, in Triton for NVIDIA GPUs.

The uniform distribution e over the positives, the keys of a row's own identity, is a softmax, too:
its logits are 0 for the positives and -inf for all other keys. So one kernel averages the keys for
3 B rows: B for the student, B for the momentum encoder and B for the positives. Each program takes
only a range of the keys, so that few rows still fill a GPU; the sums over different ranges are
merged in the end.
"""
import torch

from kernels import tl, triton, triton_supports


@triton.jit
def sums_kernel(queries, keys, identity, key_identity, temperature,
                max_logits, weight_sums, key_sums, B, K, keys_per_program,
                E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                BLOCK_KEYS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """One program: the sums for BLOCK_ROWS of the 3 B rows over `keys_per_program` keys.

    queries (3, B, E): student, momentum encoder, zeros for the positives. Outputs: max_logits and
    weight_sums (num_splits, 3, B), key_sums (num_splits, 3, B, E). Weights are relative to
    exp(max_logit)."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)
    is_row = rows < 3 * B
    is_column = columns < E
    uses_all_keys = rows < 2 * B                        # the last B rows use positives only
    row_identity = tl.load(identity + rows % B)
    scale = 1.0 / tl.load(temperature)

    max_logit = tl.full((BLOCK_ROWS,), -1e38, tl.float32)   # finite: -inf - (-inf) would be NaN
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    key_sum = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    first_key = split * keys_per_program
    end_key = tl.minimum(first_key + keys_per_program, K)
    for start in range(first_key, end_key, BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        is_key = j < K
        same = row_identity[:, None] == tl.load(key_identity + j, mask=is_key, other=0)[None, :]
        included = is_key[None, :] & (same | uses_all_keys[:, None])
        if tl.max(tl.max(included.to(tl.int32), 1), 0) > 0:     # most blocks have no positive
            key_start = keys + j.to(tl.int64)[:, None] * E
            # q k_j in blocks of BLOCK_FEATURES features: all E at once need too many registers
            cosines = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
            for first_column in range(0, E, BLOCK_FEATURES):
                part = (first_column + tl.arange(0, BLOCK_FEATURES))[None, :]
                q = tl.load(queries + rows[:, None] * E + part, mask=is_row[:, None] & (part < E),
                            other=0.0)
                k = tl.load(key_start + part, mask=is_key[:, None] & (part < E), other=0.0)
                cosines = tl.dot(q, tl.trans(k.to(tl.float32)), cosines, input_precision="tf32x3")
            # s_j = q k_j / tau; in the last B rows q is 0, so positives have logit 0
            logits = tl.where(included, cosines * scale, float("-inf"))
            # online softmax: a larger logit rescales the earlier sums
            new_max = tl.maximum(max_logit, tl.max(logits, 1))
            rescale = tl.exp(max_logit - new_max)
            weights = tl.exp(logits - new_max[:, None])
            weight_sum = rescale * weight_sum + tl.sum(weights, 1)
            k = tl.load(key_start + columns[None, :], mask=is_key[:, None] & is_column[None, :],
                        other=0.0)
            block_sum = tl.dot(weights, k.to(tl.float32), input_precision="tf32x3")
            key_sum = rescale[:, None] * key_sum + block_sum
            max_logit = new_max

    out_rows = split * 3 * B + rows
    tl.store(max_logits + out_rows, max_logit, mask=is_row)
    tl.store(weight_sums + out_rows, weight_sum, mask=is_row)
    tl.store(key_sums + out_rows.to(tl.int64)[:, None] * E + columns[None, :], key_sum,
             mask=is_row[:, None] & is_column[None, :])


# Not tuned on a GPU yet. Up to MAX_E features, no registers spill on compute capability 8.0 or 9.0,
# with Triton 3.6, 3.7 and 3.9 (`pytest -k shipped_kernel`). For "tf32x3", see `dot` in
# kernels/attention.py.
LAUNCH_CONFIG = dict(BLOCK_ROWS=32, BLOCK_KEYS=32, BLOCK_FEATURES=32, num_warps=8, num_stages=1)
MAX_E = 256


def supports_contrastive(feature):
    return triton_supports(feature) and feature.shape[1] <= MAX_E and feature.dtype == torch.float32


def triton_average_keys(feature, momentum_feature, keys, identity, key_identity, temperature,
                        programs=None):
    """`average_keys` of losses.py. About `programs` programs share the work, by default one per
    multiprocessor; those for positives have next to no work and do not count."""
    if programs is None:
        programs = torch.cuda.get_device_properties(feature.device).multi_processor_count
    queries = torch.stack([feature, momentum_feature, torch.zeros_like(feature)])   # (3, B, E)
    B, E = feature.shape
    K = len(keys)
    block_rows = LAUNCH_CONFIG["BLOCK_ROWS"]
    block_keys = LAUNCH_CONFIG["BLOCK_KEYS"]
    # B = 80, K = 62,080, 132 multiprocessors: the 240 rows are 8 blocks of 32, of which 5 count.
    # The keys are split over 132 // 5 = 26 programs; each takes 75 blocks of 32, or 2,400 keys (the
    # last one fewer)
    row_blocks = triton.cdiv(3 * B, block_rows)
    busy_blocks = triton.cdiv(2 * B, block_rows)
    key_programs = max(1, programs // busy_blocks)
    keys_per_program = triton.cdiv(K, key_programs * block_keys) * block_keys
    num_splits = triton.cdiv(K, keys_per_program)
    max_logits = queries.new_empty(num_splits, 3, B)
    weight_sums = torch.empty_like(max_logits)
    key_sums = queries.new_empty(num_splits, 3, B, E)
    with torch.cuda.device_of(queries):         # Triton launches on the current device
        sums_kernel[row_blocks, num_splits](
            queries, keys.contiguous(), identity.contiguous(), key_identity.contiguous(),
            temperature, max_logits, weight_sums, key_sums, B, K, keys_per_program,
            E=E, BLOCK_E=max(32, triton.next_power_of_2(E)), **LAUNCH_CONFIG)

    max_logit = max_logits.amax(0)                                                  # (3, B)
    rescale = (max_logits - max_logit).exp()                                # (num_splits, 3, B)
    weight_sum = (rescale * weight_sums).sum(0)                                     # (3, B)
    key_sum = (rescale[..., None] * key_sums).sum(0)                                # (3, B, E)
    return max_logit[0] + weight_sum[0].log(), *(key_sum / weight_sum[..., None])

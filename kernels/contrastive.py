"""Image-text contrastive loss (ITC) without storing its logits: all ITC of this project, on CPUs and GPUs.

One direction of ITC (FLIP paper, section 4.2; ALBEF, arXiv 2107.07651, eq. 1, 2 and 6). Each row has a
feature q from the student and a feature m from the momentum encoder. Both are compared with keys k_j, the
momentum features of the other modality from batch and queue; y is the target:

    s_j = q k_j / tau      t_j = m k_j / tau      y = alpha softmax(t) + (1 - alpha) e
    loss = -sum_j y_j log softmax(s)_j

where e is uniform over the positives, the keys of the row's own identity, and sums to 1; no gradient flows
into y. The logits of 80 rows and 62,080 keys (8 x 80, and the queue) take 20 MB, written and read several
times. But y sums to 1, and s is linear in k:

    loss = log sum_j exp(s_j) - q k* / tau      k* = sum_j y_j k_j, the average key under the target
    dq   = (k' - k*) / tau                      k' = sum_j softmax(s)_j k_j, under the student
    dtau = -q dq / tau

So each row needs only three average keys, under softmax(s), softmax(t) and e, and one log-sum-exp; and an
average under a softmax is *attention with the keys as values*. It is computed as in FlashAttention: the keys
are processed in blocks, and each row keeps the largest logit so far, the sum of weights and the weighted sum
of keys. `SoftmaxSums` over different keys merge into the `SoftmaxSums` over all of them. Hence a few rows
still fill a GPU, since each of its multiprocessors can process a range of keys. e is a softmax, too: of
logits 0 for the row's own identity and -inf for all others.

One pass over the keys gives the loss and both gradients; the backward pass only scales them. All of it runs
in float32, even under autocast: at tau 0.01 half-precision cosines are too coarse.

Sizes: B rows (3 B in the kernel: three averages each), K keys, E feature size. losses.py defines the same
loss with logits, `contrastive_loss_reference`. Run `python bench.py contrastive` to check and time it.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import tl, triton, triton_supports


# ---- sums over keys ------------------------------------------------------------------------------
class SoftmaxSums(NamedTuple):
    """Softmax-weighted sums over some keys. The first dimension indexes student, momentum encoder and
    positives. Weights are relative to exp(max_logit), to prevent overflow."""
    max_logit: Tensor       # (3, B) the largest logit
    denominator: Tensor     # (3, B) sum_j exp(logit_j - max_logit)
    key_sum: Tensor         # (3, B, E) sum_j exp(logit_j - max_logit) k_j


def chunk_sums(queries, keys, identity, key_identity, temperature):
    """`SoftmaxSums` over a chunk of keys, for queries (2, B, E): student and momentum features."""
    logits = queries / temperature @ keys.T                                         # (2, B, chunk)
    max_logit = logits.amax(-1)
    weights = logits.sub_(max_logit[..., None]).exp_()
    same = (identity[:, None] == key_identity[None, :]).to(keys.dtype)              # (B, chunk)
    positive_sum = same @ keys if same.any() else torch.zeros_like(queries[0])      # most chunks have none
    return SoftmaxSums(max_logit=torch.cat([max_logit, max_logit.new_zeros(1, len(same))]),
                       denominator=torch.cat([weights.sum(-1), same.sum(-1)[None]]),
                       key_sum=torch.cat([weights @ keys, positive_sum[None]]))


def merge_sums(stacked):
    """Merge n stacked `SoftmaxSums`, (n, 3, B, ...), into the sums over all their keys."""
    max_logit = stacked.max_logit.amax(0)
    rescale = (stacked.max_logit - max_logit).exp()                                 # (n, 3, B)
    return SoftmaxSums(max_logit, (rescale * stacked.denominator).sum(0),
                       (rescale[..., None] * stacked.key_sum).sum(0))


def torch_sums(feature, momentum_feature, keys, identity, key_identity, temperature, chunk=2048):
    """`SoftmaxSums` over all keys in plain PyTorch, `chunk` keys at a time."""
    queries = torch.stack([feature, momentum_feature])
    sums = None
    for key_chunk, identity_chunk in zip(keys.split(chunk), key_identity.split(chunk)):
        update = chunk_sums(queries, key_chunk.to(feature.dtype), identity, identity_chunk, temperature)
        sums = update if sums is None else merge_sums(SoftmaxSums(*map(torch.stack, zip(sums, update))))
    return sums


def loss_and_gradients(sums, feature, temperature, alpha):
    """Mean loss () and its gradients with respect to feature (B, E) and temperature (), as derived above."""
    student_key, momentum_key, positive_key = sums.key_sum / sums.denominator[..., None]    # (B, E) each
    target_key = alpha * momentum_key + (1 - alpha) * positive_key
    log_sum_exp = sums.max_logit[0] + sums.denominator[0].log()                     # (B,)
    loss = log_sum_exp - (feature * target_key).sum(1) / temperature
    d_feature = (student_key - target_key) / temperature
    d_temperature = -(feature * d_feature).sum(1) / temperature
    return loss.mean(), d_feature / len(feature), d_temperature.mean()


# ---- the kernel in Triton; a first reading can skip to `contrastive_loss` -------------------------
@triton.jit
def triton_sums_kernel(queries, keys, identity, key_identity, temperature, max_out, denominator_out, key_out,
                       B, K, keys_per_program, E: tl.constexpr, BLOCK_E: tl.constexpr,
                       BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: `SoftmaxSums` of BLOCK_ROWS of the 3 B rows over `keys_per_program` keys. queries (3, B,
    E): student, momentum encoder, zeros for the positives; outputs (num_splits, 3, B) and (num_splits, 3,
    B, E). BLOCK_K: features per step of the product q k_j."""
    rows, split = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)
    is_row, is_column = rows < 3 * B, columns < E
    compares_all = rows < 2 * B                         # the last B rows include positives only
    row_identity = tl.load(identity + rows % B)
    scale = 1.0 / tl.load(temperature)

    max_logit = tl.full((BLOCK_ROWS,), -1e38, tl.float32)   # finite: -inf - (-inf) would be NaN
    denominator = tl.zeros((BLOCK_ROWS,), tl.float32)
    key_sum = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    for start in range(split * keys_per_program, tl.minimum((split + 1) * keys_per_program, K), BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        is_key = j < K
        same = row_identity[:, None] == tl.load(key_identity + j, mask=is_key, other=0)[None, :]
        included = is_key[None, :] & (same | compares_all[:, None])
        if tl.max(tl.max(included.to(tl.int32), 1), 0) > 0:     # most blocks have no positive
            key_start = keys + j.to(tl.int64)[:, None] * E
            # q k_j in blocks of BLOCK_K features: all E at once need too many registers
            cosines = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
            for e in range(0, E, BLOCK_K):
                cols = (e + tl.arange(0, BLOCK_K))[None, :]
                q = tl.load(queries + rows[:, None] * E + cols, mask=is_row[:, None] & (cols < E), other=0.0)
                k = tl.load(key_start + cols, mask=is_key[:, None] & (cols < E), other=0.0)
                cosines = tl.dot(q, tl.trans(k.to(tl.float32)), cosines, input_precision="tf32x3")
            # s_j = q k_j / tau; in the last B rows q is 0, so positives have logit 0
            logits = tl.where(included, cosines * scale, float("-inf"))
            # online softmax: a larger logit rescales the earlier sums
            new_max = tl.maximum(max_logit, tl.max(logits, 1))
            weights = tl.exp(logits - new_max[:, None])
            rescale = tl.exp(max_logit - new_max)
            denominator = denominator * rescale + tl.sum(weights, 1)
            k = tl.load(key_start + columns[None, :], mask=is_key[:, None] & is_column[None, :], other=0.0)
            key_sum = key_sum * rescale[:, None] + tl.dot(weights, k.to(tl.float32), input_precision="tf32x3")
            max_logit = new_max

    out = split * 3 * B + rows
    tl.store(max_out + out, max_logit, mask=is_row)
    tl.store(denominator_out + out, denominator, mask=is_row)
    tl.store(key_out + out.to(tl.int64)[:, None] * E + columns[None, :], key_sum,
             mask=is_row[:, None] & is_column[None, :])


# Not tuned on a GPU yet. Up to MAX_E features no registers spill on compute capability 8.0 or 9.0, with
# Triton 3.6 to 3.9 (`pytest -k shipped_kernel`). For "tf32x3" see `dot` in kernels/attention.py.
LAUNCH_CONFIG = dict(BLOCK_ROWS=32, BLOCK_KEYS=32, BLOCK_K=32, num_warps=8, num_stages=1)
MAX_E = 256


def uses_triton(feature):
    return triton_supports(feature) and feature.shape[1] <= MAX_E and feature.dtype == torch.float32


def triton_sums(feature, momentum_feature, keys, identity, key_identity, temperature, programs=None):
    """`SoftmaxSums` over all keys, which are split so that about `programs` programs have work, by default
    one per multiprocessor. Rows for positives cost next to nothing and do not count."""
    programs = programs or torch.cuda.get_device_properties(feature.device).multi_processor_count
    queries = torch.stack([feature, momentum_feature, torch.zeros_like(feature)])
    (B, E), K, block = feature.shape, len(keys), LAUNCH_CONFIG["BLOCK_KEYS"]
    row_blocks, busy_blocks = (triton.cdiv(n * B, LAUNCH_CONFIG["BLOCK_ROWS"]) for n in (3, 2))
    keys_per_program = triton.cdiv(K, max(1, programs // busy_blocks) * block) * block
    num_splits = triton.cdiv(K, keys_per_program)
    out = SoftmaxSums(max_logit=queries.new_empty(num_splits, 3, B),
                      denominator=queries.new_empty(num_splits, 3, B),
                      key_sum=queries.new_empty(num_splits, 3, B, E))
    triton_sums_kernel[row_blocks, num_splits](
        queries, keys.contiguous(), identity.contiguous(), key_identity.contiguous(), temperature, *out, B, K,
        keys_per_program, E=E, BLOCK_E=max(32, triton.next_power_of_2(E)), **LAUNCH_CONFIG)
    return merge_sums(out)


# ---- the public function -------------------------------------------------------------------------
@torch.library.custom_op("flip::contrastive", mutates_args=())
def contrastive_forward(feature: Tensor, momentum_feature: Tensor, keys: Tensor, identity: Tensor,
                        key_identity: Tensor, temperature: Tensor,
                        alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to feature and temperature; one node for torch.compile."""
    with torch.autocast(feature.device.type, enabled=False):
        softmax_sums = triton_sums if uses_triton(feature) else torch_sums
        sums = softmax_sums(feature, momentum_feature, keys, identity, key_identity, temperature)
        return loss_and_gradients(sums, feature, temperature, alpha)


@contrastive_forward.register_fake
def _(feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
    return feature.new_empty(()), torch.empty_like(feature), torch.empty_like(temperature)


def save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, grad_loss, *_):
    d_feature, d_temperature = ctx.saved_tensors
    return grad_loss * d_feature, None, None, None, None, grad_loss * d_temperature, None


contrastive_forward.register_autograd(scale_gradients, setup_context=save_gradients)


def contrastive_loss(feature: Tensor, momentum_feature: Tensor, keys: Tensor, identity: Tensor,
                     key_identity: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    """Cross-entropy with soft targets in one direction of ITC, averaged over the batch, a tensor ().

    feature, momentum_feature (B, E): student and momentum features of one modality; keys (K, E): momentum
    features of the other, from batch and queue; all of unit length. identity (B,), key_identity (K,): equal
    numbers mean the same person, hence a positive; every row needs one. temperature: a scalar tensor on the
    same device; alpha: weight of the soft targets, from 0 to 1. Gradients flow into feature and temperature
    only."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    return contrastive_forward(feature.to(dtype), momentum_feature.detach().to(dtype), keys, identity,
                               key_identity, temperature.to(dtype), alpha)[0]

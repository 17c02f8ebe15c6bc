"""The image-text contrastive loss without its logits: the only contrastive loss of this project.

One direction of ITC (FLIP paper, section 4.2; ALBEF, arXiv 2107.07651, eq. 1, 2 and 6). A row has a
feature q from the student and a feature m from the momentum encoder; both are compared with keys
k_j (momentum features of the other modality, batch and queue), and y is the target:

    s_j = q k_j / tau      t_j = m k_j / tau      y = alpha softmax(t) + (1 - alpha) e
    loss = -sum_j y_j log softmax(s)_j

where e spreads a mass of 1 evenly over the positives, the keys of the row's own identity, and no
gradient flows into y. With 80 rows and 61,520 keys the logits are 20 MB that are written, read and
written again, several times over. But y sums to 1, and s is linear in k:

    loss = log sum_j exp(s_j) - q k* / tau      k* = sum_j y_j k_j, the average key under the target
    dq   = (k' - k*) / tau                      k' = sum_j softmax(s)_j k_j, under the student
    dtau = -q dq / tau

So all that is needed are three average keys per row, under softmax(s), softmax(t) and e, and one
log-sum-exp; and an average under a softmax is *attention with the keys as values*. It is computed
as FlashAttention does: the keys stream by, each row keeps the largest logit so far, the sum of
weights and the weighted sum of keys. Such `Sums` over two sets of keys merge into the `Sums` over
both. Hence batch and queue can be given as they lie, in two pieces, and never need to be copied
together; and few rows still fill a GPU, since each of its processors can take a stretch of the
keys. e is a softmax as well: of logits 0 for the row's own identity and -inf for all others.

The loss and both gradients come from one pass over the keys; the backward pass only scales them.
Float32 throughout, under autocast too, since at tau 0.01 a cosine in half precision is too coarse.

Sizes: B rows (3 B for the kernel, which takes the three averages of a row for three rows), K keys
(C in a chunk, in any number of pieces), E feature size, G stretches of keys that are summed apart.
losses.py has the definition, `reference`. Run `python bench.py contrastive` to compare and time it.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import tl, triton, triton_supports


# ---- sums over keys ------------------------------------------------------------------------------
class SoftmaxSums(NamedTuple):
    """Three softmax-weighted sums over some keys; first dimension: student, momentum encoder,
    positives. Weights are relative to exp(peak), so that nothing overflows."""
    max_logit: Tensor   # (3, B) the largest logit
    denominator: Tensor  # (3, B) sum_j exp(logit_j - peak)
    key_sum: Tensor     # (3, B, E) sum_j exp(logit_j - peak) k_j


def chunk_sums(queries, keys, identity, key_identity, temperature):
    """`Sums` over keys (C, E) for queries (2, B, E): the student's and the momentum features."""
    logits = queries / temperature @ keys.T                                         # (2, B, C)
    max_logit = logits.amax(-1)
    weights = logits.sub_(max_logit[..., None]).exp_()
    same = (identity[:, None] == key_identity[None, :]).to(keys.dtype)              # (B, C)
    positive_sum = same @ keys if same.any() else torch.zeros_like(queries[0])      # mostly there is none
    return SoftmaxSums(max_logit=torch.cat([max_logit, max_logit.new_zeros(1, len(same))]),
                       denominator=torch.cat([weights.sum(-1), same.sum(-1)[None]]),
                       key_sum=torch.cat([weights @ keys, positive_sum[None]]))


def stack_sums(parts):
    """Several `Sums`, over different keys, as one along a new first dimension."""
    return SoftmaxSums(max_logit=torch.stack([part.max_logit for part in parts]),
                       denominator=torch.stack([part.denominator for part in parts]),
                       key_sum=torch.stack([part.key_sum for part in parts]))


def merge_sums(parts):
    """`Sums` stacked along a first dimension (parts, 3, B, ...) -> `Sums` over all their keys."""
    max_logit = parts.max_logit.amax(0)
    rescale = (parts.max_logit - max_logit).exp()                                   # (parts, 3, B)
    return SoftmaxSums(max_logit, (rescale * parts.denominator).sum(0), (rescale[..., None] * parts.key_sum).sum(0))


def torch_sums(feature, momentum_feature, keys, identity, key_identity, temperature, chunk=2048):
    """`Sums` over all pieces of keys in PyTorch, one chunk of keys after the other."""
    queries = torch.stack([feature, momentum_feature])
    sums = None
    for piece, piece_identity in zip(keys, key_identity):
        for some, some_identity in zip(piece.split(chunk), piece_identity.split(chunk)):
            part = chunk_sums(queries, some.to(feature.dtype), identity, some_identity, temperature)
            sums = part if sums is None else merge_sums(stack_sums([sums, part]))
    return sums


def loss_and_gradients(sums, feature, temperature, alpha):
    """What the docstring derives: the mean loss (), and its gradients by feature (B, E) and
    temperature ()."""
    student_key, momentum_key, positive_key = sums.key_sum / sums.denominator[..., None]  # averages, (B, E) each
    target_key = alpha * momentum_key + (1 - alpha) * positive_key
    log_sum_exp = sums.max_logit[0] + sums.denominator[0].log()                     # (B,)
    loss = log_sum_exp - (feature * target_key).sum(1) / temperature
    by_feature = (student_key - target_key) / temperature
    by_temperature = -(feature * by_feature).sum(1) / temperature
    return loss.mean(), by_feature / len(feature), by_temperature.mean()


# ---- the kernel ----------------------------------------------------------------------------------
@triton.jit
def triton_sums_kernel(queries, keys, identity, key_identity, temperature, max_out, denominator_out, key_out, B, K,
                       keys_per_program, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                       BLOCK_KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: `Sums` of BLOCK_ROWS of the 3 B rows over one stretch of the keys.

    queries (3, B, E): student, momentum encoder, zeros for the positives; outputs (G, 3, B) and
    (G, 3, B, E).
    """
    rows, g = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.program_id(1)
    columns = tl.arange(0, BLOCK_E)
    is_row, is_column = rows < 3 * B, columns < E
    compares_all = rows < 2 * B                         # the rows of the third kind count positives only
    row_identity = tl.load(identity + rows % B)
    scale = 1.0 / tl.load(temperature)

    max_logit = tl.full((BLOCK_ROWS,), -1e38, tl.float32)  # finite: peak - peak is 0 before the first positive
    denominator = tl.zeros((BLOCK_ROWS,), tl.float32)
    key_sum = tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32)
    for start in range(g * keys_per_program, tl.minimum((g + 1) * keys_per_program, K), BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        is_key = j < K
        same = row_identity[:, None] == tl.load(key_identity + j, mask=is_key, other=0)[None, :]
        counts = is_key[None, :] & (same | compares_all[:, None])
        if tl.max(tl.max(counts.to(tl.int32), 1), 0) > 0:   # most blocks of keys hold no positive
            first_of_key = keys + j.to(tl.int64)[:, None] * E
            # q k_j, by slices of the features: with all at once the registers would not suffice
            cosines = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
            for e in range(0, E, BLOCK_K):
                part = (e + tl.arange(0, BLOCK_K))[None, :]
                q = tl.load(queries + rows[:, None] * E + part, mask=is_row[:, None] & (part < E), other=0.0)
                k = tl.load(first_of_key + part, mask=is_key[:, None] & (part < E), other=0.0)
                cosines = tl.dot(q, tl.trans(k.to(tl.float32)), cosines, input_precision="tf32x3")
            # s_j = q k_j / tau; in the rows whose q is 0 it is 0 for positives
            logits = tl.where(counts, cosines * scale, float("-inf"))
            # the online softmax: what was summed so far shrinks when a larger logit turns up
            new_max = tl.maximum(max_logit, tl.max(logits, 1))
            weights = tl.exp(logits - new_max[:, None])
            rescale = tl.exp(max_logit - new_max)
            denominator = denominator * rescale + tl.sum(weights, 1)
            k = tl.load(first_of_key + columns[None, :], mask=is_key[:, None] & is_column[None, :], other=0.0)
            key_sum = key_sum * rescale[:, None] + tl.dot(weights, k.to(tl.float32), input_precision="tf32x3")
            max_logit = new_max

    out = g * 3 * B + rows
    tl.store(max_out + out, max_logit, mask=is_row)
    tl.store(denominator_out + out, denominator, mask=is_row)
    tl.store(key_out + out.to(tl.int64)[:, None] * E + columns[None, :], key_sum,
             mask=is_row[:, None] & is_column[None, :])


# "tf32x3" computes float32 products nearly to float32's precision on tensor cores, in three steps.
# With Triton 3.6 to 3.9 this tiling compiles for compute capability 8.0 and 9.0 without spilling
# registers up to MAX_E (`python bench.py --compile-only`); not yet tuned on any card.
LAUNCH_CONFIG = dict(BLOCK_ROWS=32, BLOCK_KEYS=32, BLOCK_K=32, num_warps=8, num_stages=1)
MAX_E = 256


def uses_triton(feature):
    return triton_supports(feature) and feature.shape[1] <= MAX_E and feature.dtype == torch.float32


def triton_sums(feature, momentum_feature, keys, identity, key_identity, temperature, programs=None):
    """`Sums` over all pieces of keys, each in so many stretches that about `programs` programs have
    work, one per processor of the GPU (those of the rows for positives have next to none)."""
    programs = programs or torch.cuda.get_device_properties(feature.device).multi_processor_count
    queries = torch.stack([feature, momentum_feature, torch.zeros_like(feature)])
    (B, E), block = feature.shape, LAUNCH_CONFIG["BLOCK_KEYS"]
    row_blocks, busy_blocks = (triton.cdiv(n * B, LAUNCH_CONFIG["BLOCK_ROWS"]) for n in (3, 2))
    parts = []
    for piece, piece_identity in zip(keys, key_identity):
        K = len(piece)
        keys_per_program = triton.cdiv(K, max(1, programs // busy_blocks) * block) * block
        num_splits = triton.cdiv(K, keys_per_program)
        out = SoftmaxSums(max_logit=queries.new_empty(num_splits, 3, B), denominator=queries.new_empty(num_splits, 3, B),
                          key_sum=queries.new_empty(num_splits, 3, B, E))
        triton_sums_kernel[row_blocks, num_splits](
            queries, piece.contiguous(), identity.contiguous(), piece_identity.contiguous(), temperature,
            *out, B, K, keys_per_program, E=E, BLOCK_E=max(32, triton.next_power_of_2(E)), **LAUNCH_CONFIG)
        parts.append(merge_sums(out))
    return merge_sums(stack_sums(parts))


# ---- what the model calls ------------------------------------------------------------------------
@torch.library.custom_op("flip::contrastive", mutates_args=())
def contrastive(feature: Tensor, momentum_feature: Tensor, keys: list[Tensor], identity: Tensor,
                key_identity: list[Tensor], temperature: Tensor,
                alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by feature and temperature: one operator for torch.compile."""
    with torch.autocast(feature.device.type, enabled=False):
        sums_of = triton_sums if uses_triton(feature) else torch_sums
        sums = sums_of(feature, momentum_feature, keys, identity, key_identity, temperature)
        return loss_and_gradients(sums, feature, temperature, alpha)


@contrastive.register_fake
def _(feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
    return feature.new_empty(()), torch.empty_like(feature), torch.empty_like(temperature)


def save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.pieces = len(inputs[2])


def scale_gradients(ctx, grad_loss, *_):
    by_feature, by_temperature = ctx.saved_tensors
    nothing = [None] * ctx.pieces
    return grad_loss * by_feature, None, nothing, None, nothing, grad_loss * by_temperature, None


contrastive.register_autograd(scale_gradients, setup_context=save_gradients)


def contrastive_loss(feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
    """Soft cross-entropy of one direction of ITC, mean over the batch, a tensor ().

    feature (B, E): the student's, of one modality; momentum_feature (B, E): the momentum encoder's,
    of the same inputs; all features have length 1. keys: momentum features of the other modality in
    any number of pieces [(K1, E), (K2, E), ...], such as batch and queue. identity (B,) and
    key_identity [(K1,), (K2,), ...]: equal numbers mean the same person, so a positive; every row
    needs at least one. temperature: a tensor () on the same device. alpha: share of the soft
    targets, the momentum encoder's own opinion, from 0 to 1. Gradients flow into feature and
    temperature only.
    """
    pieces = [piece for piece in zip(keys, key_identity) if len(piece[0])]
    if not pieces:
        raise ValueError("contrastive loss: there are no keys to compare with")
    keys, key_identity = map(list, zip(*pieces))
    wide = torch.promote_types(feature.dtype, torch.float32)
    return contrastive(feature.to(wide), momentum_feature.detach().to(wide), keys, identity, key_identity,
                       temperature.to(wide), alpha)[0]

"""Optimisers (Muon, AdamW and their parameter groups) and learning-rate schedules."""
import math

import torch


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (kellerjordan.github.io/posts/muon) for matrices: the momentum U S
    V^T is replaced by U V^T, scaled to the size of an AdamW update (arXiv 2502.16982). A
    convolution is a matrix whose rows are its kernels.

    When training from scratch, gradients have nearly low rank: Adam, which scales per entry,
    follows the few large directions (what most captions say), and the many small ones (rare
    attributes) lag. Muon moves in all directions at the same rate."""

    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}           # one batched product for all matrices of a shape
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                directions = [self.direction(p, group["momentum"]) for p in parameters]
                updates = newton_schulz(torch.stack(directions).flatten(2))
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for p, update in zip(parameters, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view(shape), alpha=-scale * group["lr"])

    def direction(self, p, momentum):
        """Update the moving average of the gradient; return Nesterov's look-ahead from it."""
        state = self.state[p]
        if not state:
            state["average"] = torch.zeros_like(p)
        average = state["average"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def newton_schulz(X: torch.Tensor, steps=5) -> torch.Tensor:
    """Matrices U S V^T (n, rows, columns) -> approximately U V^T, by Newton-Schulz iteration. Each
    step maps a singular value s to a s + b s^3 + c s^5; after five steps, every singular value that
    was above 0.0016 times the Frobenius norm is between 0.68 and 1.21. (train.py steps the
    optimisers under autocast, so it runs in bf16 there; torch.optim.Muon's always does. The letters
    are those of Muon's authors.)"""
    if X.shape[1] > X.shape[2]:                 # X X^T is smaller for wide matrices
        return newton_schulz(X.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315           # Keller Jordan's coefficients
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)         # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)                  # a X + B X
    return X


def build_optimizers(module: torch.nn.Module, weight_decay, muon_multiple=0.0):
    """[AdamW, Muon], or [AdamW] if muon_multiple is 0. Each trained parameter is in one of them.

    Muon updates all matrices, including the patch convolution and the projections, except the word
    and position embeddings and the matching head. AdamW updates everything else. muon_multiple:
    Muon's rate, as a multiple of AdamW's.

    Weight decay applies to all parameters with two or more dimensions, including position
    embeddings and the patch convolution. A parameter without a gradient, such as cross-attention's
    in a step without ITM, is not changed at all."""
    matrices = []           # for Muon
    decayed = []
    not_decayed = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        is_excepted = any(part in name for part in ("words", "positions", "matching_head"))
        if muon_multiple and p.ndim > 1 and not is_excepted:
            matrices.append(p)
        elif p.ndim > 1:
            decayed.append(p)
        else:
            not_decayed.append(p)

    groups = [{"params": decayed, "weight_decay": weight_decay, "lr_multiple": 1.0},
              {"params": not_decayed, "weight_decay": 0.0, "lr_multiple": 1.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if not muon_multiple:
        return [adamw]
    groups = [{"params": matrices, "weight_decay": weight_decay, "lr_multiple": muon_multiple}]
    return [adamw, Muon(groups)]


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]


# ---- schedules -----------------------------------------------------------------------------------
def ramp(x: float, start: float, end: float) -> float:
    """0 before start, 1 after end, linear in between."""
    if end <= start:
        return float(x >= end)
    return min(1.0, max(0.0, (x - start) / (end - start)))


def warmup_decay(step, steps, warmup, lr, lr_start=0.0, lr_min=0.0, decay="cosine"):
    """Linear warm-up from lr_start to lr, then cosine or linear decay to lr_min at step `steps`."""
    if step < warmup:
        return lr_start + (lr - lr_start) * step / warmup
    done = ramp(step, warmup, steps)
    if decay == "linear":
        left = 1 - done
    else:
        left = (1 + math.cos(math.pi * done)) / 2
    return lr_min + (lr - lr_min) * left


def learning_rate(step: int, config, steps_per_epoch: int) -> float:
    """The learning rate of a step of pre-training, from a config.Config: linear warm-up over
    `warmup` steps, but at most 20 % of the run; then linear decay or, as in the paper, x 0.9 at the
    beginning of each epoch after the one in which the warm-up ends."""
    warmup = min(config.warmup, config.steps // 5)
    if config.lr_decay == "epoch" and step >= warmup:
        epochs = step // steps_per_epoch - warmup // steps_per_epoch
        return max(config.lr_min, config.lr * 0.9 ** epochs)
    return warmup_decay(step, config.steps, warmup, config.lr, config.lr_start, config.lr_min,
                        config.lr_decay)

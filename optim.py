"""Optimisers: Muon, AdamW, their parameter groups and states; how a learning rate rises and decays."""
import itertools
import math

import torch

from pretrained import check_tensors


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (kellerjordan.github.io/posts/muon) for hidden-to-hidden matrices: the momentum
    U S V^T is replaced by U V^T, scaled to the size of an AdamW update (arXiv 2502.16982). When training from
    scratch, gradients have nearly low rank: Adam, which scales per entry, follows the few large directions
    (what most captions say), and the many small ones (rare attributes) lag. Muon moves all at one rate."""

    def __init__(self, groups, momentum):
        super().__init__(groups, dict(momentum=momentum))
        for p in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}                     # {shape: [(parameter, momentum)]}: one batched product each
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    nesterov = p.grad.lerp(momentum, group["momentum"])
                    same_shape.setdefault(p.shape, []).append((p, nesterov))
            for shape, members in same_shape.items():
                for (p, _), update in zip(
                        members, newton_schulz(torch.stack([nesterov for _, nesterov in members]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def newton_schulz(X: torch.Tensor, steps=5) -> torch.Tensor:
    """Matrices U S V^T (n, rows, columns) -> approximately U V^T, by Newton-Schulz iteration. Each step maps
    a singular value s to a s + b s^3 + c s^5; five steps bring all above 0.0016 times the Frobenius norm to
    between 0.68 and 1.21. (In --precision; torch.optim.Muon always uses bfloat16.)"""
    if X.shape[1] > X.shape[2]:                 # X X^T is smaller for wide matrices
        return newton_schulz(X.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315           # Keller Jordan's coefficients
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def build_optimizers(module: torch.nn.Module, weight_decay, beta2=0.999, temperature_lr=1.0,
                     muon_lr_image=0.0, muon_lr_text=0.0, muon_momentum=0.95) -> list[torch.optim.Optimizer]:
    """[AdamW], or [AdamW, Muon] if a Muon rate is not 0; each trained parameter is in exactly one group.
    Weight decay applies to all parameters with more than one dimension (position embeddings and the patch
    convolution, too). The rates are multiples of the learning rate; Muon's are for the matrices inside the
    image encoder's blocks and the text encoder's layers (0: AdamW updates these, too)."""
    groups = {"adamw": {}, "muon": {}}          # {optimiser: {(scale, weight decay): parameters}}
    for name, p in module.named_parameters():
        muon_lr = muon_lr_image if ".blocks." in name else muon_lr_text if ".layers." in name else 0.0
        optimizer, scale = ("muon", muon_lr) if muon_lr and p.ndim == 2 else ("adamw", 1.0)
        scale, decay = temperature_lr if name == "temperature" else scale, (p.ndim > 1) * weight_decay
        if p.requires_grad:
            groups[optimizer].setdefault((scale, decay), []).append(p)
    adamw, muon = ([{"params": params, "scale": scale, "weight_decay": decay}
                    for (scale, decay), params in by_setting.items()] for by_setting in groups.values())
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, beta2), eps=1e-8, fused=True)]
    for p in itertools.chain.from_iterable(group["params"] for group in adamw):     # else AdamW's first step
        optimizers[0].state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    return optimizers + [Muon(muon, muon_momentum)] if muon else optimizers


def load_optimizers(optimizers, saved: list[dict], where):
    """Load one state dict per optimiser. Raises ValueError unless their tensors are complete, fit the
    parameters and are finite: torch checks nothing."""
    def tensors(state):
        return {f"state {i} {name}": x for i, own in state["state"].items() for name, x in own.items()}
    for optimizer, state in zip(optimizers, saved, strict=True):
        check_tensors(tensors(state), tensors(optimizer.state_dict()), where)
        optimizer.load_state_dict(state)


def set_learning_rate(optimizers, lr):
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr * group["scale"]


# ---- schedules -----------------------------------------------------------------------------------
def ramp(x: float, start: float, end: float) -> float:
    """0 up to start, 1 from end on, linear in between."""
    return float(x >= end) if end <= start else min(1.0, max(0.0, (x - start) / (end - start)))


def warmup_decay(step, steps, warmup, lr, lr_start=0.0, lr_min=0.0, decay="cosine"):
    """Linear warm-up from lr_start to lr, then cosine or linear decay to lr_min at step `steps`."""
    if step < warmup:
        return lr_start + (lr - lr_start) * step / warmup
    done = ramp(step, warmup, steps)
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr_min + (lr - lr_min) * left

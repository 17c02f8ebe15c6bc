"""Optimisers: Muon, AdamW, their parameter groups and states; how a learning rate rises and
decays."""
import math

import torch

from pretrained import check_tensors


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (kellerjordan.github.io/posts/muon) for hidden-to-hidden matrices:
    the momentum U S V^T is replaced by U V^T, scaled to the size of an AdamW update (arXiv
    2502.16982). When training from scratch, gradients have nearly low rank: Adam, which scales per
    entry, follows the few large directions (what most captions say), and the many small ones (rare
    attributes) lag. Muon moves in all directions at the same rate."""

    def __init__(self, groups, momentum):
        super().__init__(groups, dict(momentum=momentum))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}           # one batched product for all matrices of a shape
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                directions = [self.direction(p, group["momentum"]) for p in parameters]
                updates = newton_schulz(torch.stack(directions))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-scale * group["lr"])

    def direction(self, p, momentum):
        """Update the moving average of the gradient; return Nesterov's look-ahead from it."""
        average = self.state[p]["momentum"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def newton_schulz(X: torch.Tensor, steps=5) -> torch.Tensor:
    """Matrices U S V^T (n, rows, columns) -> approximately U V^T, by Newton-Schulz iteration. Each
    step maps a singular value s to a s + b s^3 + c s^5; after five steps, every singular value that
    was above 0.0016 times the Frobenius norm is between 0.68 and 1.21. (It runs in the precision of
    --precision; torch.optim.Muon always uses bfloat16.)"""
    if X.shape[1] > X.shape[2]:                 # X X^T is smaller for wide matrices
        return newton_schulz(X.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315           # Keller Jordan's coefficients
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def build_optimizers(module, weight_decay, beta2=0.999, temperature_lr=1.0, muon_lr_image=0.0,
                     muon_lr_text=0.0, muon_momentum=0.95) -> list[torch.optim.Optimizer]:
    """[AdamW], or [AdamW, Muon] if a Muon rate is not 0; each trained parameter is in exactly one
    group. Weight decay applies to all parameters with more than one dimension (position embeddings
    and the patch convolution, too). The rates are multiples of the learning rate; Muon's are for
    the matrices inside the image encoder's blocks and the text encoder's layers (0: AdamW updates
    these, too). A parameter without a gradient, such as cross-attention's in a step without ITM, is
    not changed at all."""
    adamw_groups = {}           # {(scale, weight decay): parameters}
    muon_groups = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        decay = weight_decay if p.ndim > 1 else 0.0
        muon_lr = 0.0
        if p.ndim == 2 and ".blocks." in name:
            muon_lr = muon_lr_image
        if p.ndim == 2 and ".layers." in name:
            muon_lr = muon_lr_text
        if muon_lr:
            muon_groups.setdefault((muon_lr, decay), []).append(p)
        else:
            scale = temperature_lr if name == "temperature" else 1.0
            adamw_groups.setdefault((scale, decay), []).append(p)

    adamw = torch.optim.AdamW(as_groups(adamw_groups), betas=(0.9, beta2), eps=1e-8, fused=True)
    for group in adamw.param_groups:
        for p in group["params"]:               # else AdamW's first step creates the state
            state = adamw.state[p]
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
    if not muon_groups:
        return [adamw]
    return [adamw, Muon(as_groups(muon_groups), muon_momentum)]


def as_groups(by_setting: dict) -> list[dict]:
    """{(scale, weight decay): parameters} -> parameter groups of a torch optimiser."""
    groups = []
    for (scale, decay), parameters in by_setting.items():
        groups.append({"params": parameters, "scale": scale, "weight_decay": decay})
    return groups


def load_optimizers(optimizers, saved: list[dict], where):
    """Load one state dict per optimiser. Raises ValueError unless their tensors are complete, fit
    the parameters and are finite: torch checks nothing."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        check_tensors(state_tensors(state), state_tensors(optimizer.state_dict()), where)
        optimizer.load_state_dict(state)


def state_tensors(state_dict: dict) -> dict[str, torch.Tensor]:
    """The tensors in an optimiser's state dict, with names for errors."""
    tensors = {}
    for i, state in state_dict["state"].items():
        for name, x in state.items():
            tensors[f"state {i} {name}"] = x
    return tensors


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]


# ---- schedules -----------------------------------------------------------------------------------
def ramp(x: float, start: float, end: float) -> float:
    """0 up to start, 1 from end on, linear in between."""
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

"""Muon, the groups of parameters, the learning rate."""
import itertools

import torch


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (kellerjordan.github.io/posts/muon), for matrices that map hidden
    vectors to hidden vectors: of U S V^T, U V^T is taken, times a factor that makes it as large as
    an update of AdamW (arXiv 2502.16982).

    Why that helps a model that starts from nothing: its gradients are nearly of low rank. A few
    directions, what most captions say, are large, and Adam, which scales entry by entry, follows
    them; the many small ones, each a rare mark, must wait. Here all move at one pace."""

    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}                     # large products of many matrices, not many small ones
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    nesterov = p.grad.lerp(momentum, group["momentum"])             # Nesterov's
                    same_shape.setdefault(p.shape, []).append((p, nesterov))
            for shape, members in same_shape.items():
                for (p, _), update in zip(members, newton_schulz(torch.stack([nesterov for _, nesterov in members]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def newton_schulz(X, steps=5):
    """Matrices U S V^T (n, rows, columns) -> about U V^T, by Newton-Schulz iteration: a step maps
    each singular value s to a s + b s^3 + c s^5, and five bring all above a thousandth of the norm to
    between 0.7 and 1.2. (In float32: few laptops have hardware for torch.optim.Muon's bfloat16.)"""
    if X.shape[1] > X.shape[2]:                 # X X^T had better be the small one
        return newton_schulz(X.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315           # Jordan's
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def build_optimizers(module, weight_decay, beta2=0.999, temperature_lr=1.0, muon_lr_image=0.0, muon_lr_text=0.0):
    """[AdamW], which is all that finetune.py needs, or [AdamW, Muon]; every trained parameter in
    exactly one group. Only matrices decay. The temperature has `temperature_lr` times the learning
    rate; the matrices that Muon is for have `muon_lr_image` and `muon_lr_text` times it, or, at 0, AdamW."""
    groups = {"adamw": {}, "muon": {}}                      # {optimiser: {(scale, weight decay): parameters}}
    for name, p in module.named_parameters():
        muon_lr = muon_lr_image if ".blocks." in name else muon_lr_text if ".layers." in name else 0.0
        optimizer, scale = ("muon", muon_lr) if muon_lr and p.ndim == 2 else ("adamw", 1.0)
        scale, decay = temperature_lr if name == "temperature" else scale, (p.ndim > 1) * weight_decay
        if p.requires_grad:
            groups[optimizer].setdefault((scale, decay), []).append(p)
    adamw, muon = ([{"params": params, "scale": scale, "weight_decay": decay}
                    for (scale, decay), params in kinds.items()] for kinds in groups.values())
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, beta2), eps=1e-8, fused=True)]
    return optimizers + [Muon(muon)] if muon else optimizers


def set_learning_rate(optimizers, lr):
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr * group["scale"]

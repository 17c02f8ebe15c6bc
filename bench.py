"""Time the kernels beside PyTorch's own functions, and a training step beside the machine's peak.

    python bench.py                   both kernels, as Markdown tables
    python bench.py attention         or: contrastive, step (the base model; minutes on a CPU)

"Ours" is the Triton kernel on a CUDA GPU and the PyTorch path elsewhere. Times are medians and
include launch overhead. Compare times only within a table, which is measured in one run.
"""
import argparse
import datetime
import platform
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from attention import Sequences, attention, pad, unpad
from common.script import markdown_table, run_script
from flip import FLIP, FLIPConfig, StepParams
from losses import contrastive_loss, contrastive_loss_reference
from tokenizer import MAX_TOKENS, Captions

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def seconds(call):
    """Median time of a call in seconds, including its work on the GPU."""
    call()          # compiles, and fills caches
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


def compare(title, inputs, forwards: dict, tolerance):
    """Check that functions {name: function} return the same, and print their times, without and
    with the gradients of `inputs`."""
    def forward_and_backward(forward):
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    ours = forwards["ours"]()
    rows = []
    for name, forward in forwards.items():
        torch.testing.assert_close(forward(), ours, rtol=0, atol=tolerance)
        with torch.no_grad():
            alone = seconds(forward)
        both = seconds(partial(forward_and_backward, forward))
        rows.append([name, 1000 * alone, 1000 * both])
    table = markdown_table(["", "forward, ms", "forward and backward, ms"], rows, digits=2)
    print(f"## {title}\n\n{table}\n")


def sdpa_padded(query, key, value, query_sequences, key_sequences):
    """PyTorch's scaled_dot_product_attention, which requires sequences of equal length."""
    query = pad(query, query_sequences)                                     # (B, H, Lq, d)
    key = pad(key, key_sequences)                                           # (B, H, Lk, d)
    value = pad(value, key_sequences)
    mask = None if key_sequences.is_uniform else key_sequences.token_mask[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, mask)
    return unpad(out, query_sequences)


def bench_attention(images=80 if ON_GPU else 8):
    """Time the three uses of attention, at base size, with three captions per image in the last."""
    lengths = torch.randint(12, 66, (images,), generator=torch.Generator().manual_seed(0))
    image = Sequences.uniform(images, 197, DEVICE)
    caption = Sequences.from_lengths(lengths, DEVICE)
    captions = Sequences.from_lengths(lengths.repeat(3), DEVICE)
    grouped = captions.merge_groups(torch.full((images,), 3))
    compare_attention(f"{images} images of 197 tokens", image, image)
    compare_attention(f"{images} captions of 12 to 65 tokens", caption, caption)
    compare_attention(f"{3 * images} captions attending to {images} images", grouped, image)


def compare_attention(title, queries: Sequences, keys: Sequences):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    tolerance = 2e-2 if ON_GPU else 1e-4
    torch.manual_seed(0)
    inputs = []
    for sequences in (queries, keys, keys):
        tokens = torch.randn(sequences.num_tokens, 12, 64, device=DEVICE)
        inputs.append(tokens.to(dtype).requires_grad_())
    forwards = {
        "ours": partial(attention, *inputs, queries, keys),
        "scaled_dot_product_attention, padded": partial(sdpa_padded, *inputs, queries, keys)}
    compare(f"Attention: {title}, 12 heads of 64, {dtype}", inputs, forwards, tolerance)


def bench_contrastive(B=80, Q=61_440, E=256):
    """Time one direction of ITC beside "direct", the loss with all logits in memory."""
    def random_features(count):
        return F.normalize(torch.randn(count, E), dim=-1).to(DEVICE)

    torch.manual_seed(0)
    feature = random_features(B).requires_grad_()
    momentum = random_features(B)
    keys = random_features(B + Q)
    identity = torch.arange(B, device=DEVICE)
    key_identity = torch.cat([identity, torch.full((Q,), -100, device=DEVICE)])
    temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    case = (feature, momentum, keys, identity, key_identity, temperature, StepParams().alpha)
    compiled = torch.compile(contrastive_loss_reference)
    forwards = {
        "ours": partial(contrastive_loss, *case),
        "direct": partial(contrastive_loss_reference, *case),
        "direct, torch.compile": partial(compiled, *case)}
    title = f"Contrastive loss, one direction: {B} rows, a queue of {Q}, {E} features, float32"
    compare(title, [feature, temperature], forwards, tolerance=1e-4)


def training_step(config, B):
    """A function of the dtype that trains a model for a step of B pairs, with both losses and
    AdamW, and the number of tokens of the pairs."""
    torch.manual_seed(0)
    model = FLIP(config).to(DEVICE)
    lengths = torch.normal(35.0, 12.0, (B,)).clamp(10, MAX_TOKENS).long()
    ids = torch.randint(config.bert.vocab_size - 2, (int(lengths.sum()),))
    captions = Captions(ids, Sequences.from_lengths(lengths)).to(DEVICE)
    size = config.vit.image_size
    images = torch.randn(B, 3, size, size, device=DEVICE)
    identity = torch.arange(B, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(dtype):
        model.update_momentum(0.995)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = model(images, captions, identity)
            (out.itc + out.itm).backward()
        model.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizer.step()
        optimizer.zero_grad()

    return step, B * (config.vit.num_patches + 1) + len(ids)


def bench_step(config=FLIPConfig(), B=8, matrix=8192 if ON_GPU else 2048):
    """Time a training step. The counted operations are those of PyTorch's matrix products (not
    those in Triton's kernels); the peak is the speed of one large product."""
    step, tokens = training_step(config, B)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(matrix, matrix, device=DEVICE, dtype=dtype)
        peak = 2 * matrix ** 3 / seconds(partial(torch.matmul, square, square))
        with FlopCounterMode(display=False) as counter:
            step(dtype)
        median = seconds(partial(step, dtype))
        speed = counter.get_total_flops() / median
        billions = speed / 1e9
        percent = 100 * speed / peak
        rows.append([dtype, f"{median:.2f}", f"{billions:.0f}", f"{percent:.0f}"])
    print(f"## A training step: {B} images, {B} captions, {tokens} tokens\n")
    print(markdown_table(["", "median, s", "GFLOP/s", "% of peak"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["attention", "contrastive", "step"])
    which = parser.parse_args().which
    device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if ON_GPU:
        device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {datetime.date.today():%d %B %Y}\n")
    if which in (None, "attention"):
        bench_attention()
    if which in (None, "contrastive"):
        bench_contrastive()
    if which == "step":
        bench_step()


if __name__ == "__main__":
    run_script(main)

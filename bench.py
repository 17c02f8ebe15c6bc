"""Time the kernels beside PyTorch's own functions, and a training step beside the machine's peak.

    python bench.py                   both kernels, as Markdown tables
    python bench.py attention         or: contrastive, step (the base model; minutes on a CPU)

"Ours" is the Triton kernel on a CUDA GPU, elsewhere the PyTorch path. Times are medians and include launch
overhead. Compare only within a table, measured in one run.
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call):
    """Median time of a call, its work on the GPU included, after one that compiles and warms up caches."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


def print_table(title, inputs, forwards: dict):
    """Print times of {name: function}: forward alone, and with backward with respect to `inputs`."""
    def both(forward):
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    rows = []
    for name, forward in forwards.items():
        with torch.no_grad():
            alone = seconds(forward)
        rows.append([name, f"{1000 * alone:.2f}", f"{1000 * seconds(partial(both, forward)):.2f}"])
    print(f"## {title}\n\n{markdown_table(['', 'forward, ms', 'forward and backward, ms'], rows)}\n")


def sdpa_padded(query, key, value, query_sequences, key_sequences):
    """PyTorch's scaled_dot_product_attention, which requires sequences of equal length."""
    query = pad(query, query_sequences)
    key = pad(key, key_sequences)
    value = pad(value, key_sequences)
    mask = None if key_sequences.is_uniform else key_sequences.token_mask[:, None, None]
    return unpad(F.scaled_dot_product_attention(query, key, value, mask), query_sequences)


def bench_attention(images=80 if DEVICE == "cuda" else 8):
    """The three uses of attention, at base size."""
    lengths = torch.randint(12, 66, (images,), generator=torch.Generator().manual_seed(0))
    image = Sequences.uniform(images, 197, DEVICE)
    caption = Sequences.from_lengths(lengths, DEVICE)
    grouped = Sequences.from_lengths(lengths.repeat(3), DEVICE).merge_groups(torch.full((images,), 3))
    dtype, tolerance = (torch.bfloat16, 2e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)
    for title, sequences in ((f"{images} images of 197 tokens", (image, image)),
                             (f"{images} captions of 12 to 65 tokens", (caption, caption)),
                             (f"{3 * images} captions attending to {images} images", (grouped, image))):
        torch.manual_seed(0)
        inputs = [torch.randn(each.num_tokens, 12, 64, device=DEVICE).to(dtype).requires_grad_()
                  for each in (*sequences, sequences[1])]
        ours, theirs = (partial(each, *inputs, *sequences) for each in (attention, sdpa_padded))
        torch.testing.assert_close(ours(), theirs(), rtol=0, atol=tolerance)
        print_table(f"Attention: {title}, 12 heads of 64, {dtype}", inputs,
                    {"ours": ours, "scaled_dot_product_attention, padded": theirs})


def bench_contrastive(B=80, Q=61_440, E=256):
    """One direction of ITC beside "direct", the loss with logits."""
    torch.manual_seed(0)
    feature, momentum, keys = (F.normalize(torch.randn(n, E), dim=-1).to(DEVICE) for n in (B, B, B + Q))
    identity = torch.arange(B, device=DEVICE)
    key_identity = torch.cat([identity, torch.full((Q,), -100, device=DEVICE)])
    temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    case = feature.requires_grad_(), momentum, keys, identity, key_identity, temperature, StepParams().alpha
    plain = contrastive_loss_reference
    torch.testing.assert_close(contrastive_loss(*case), plain(*case), rtol=1e-5, atol=0)
    print_table(f"Contrastive loss, one direction: {B} rows, a queue of {Q}, {E} features, float32",
                [feature, temperature], {"ours": partial(contrastive_loss, *case),
                                         "direct": partial(plain, *case),
                                         "direct, torch.compile": partial(torch.compile(plain), *case)})


def bench_step(config=FLIPConfig(), B=8, matrix=8192 if DEVICE == "cuda" else 2048):
    """A training step with both losses and AdamW. Its operations are those of PyTorch's matrix products (not
    those in Triton's kernels); the peak is that of one large product."""
    torch.manual_seed(0)
    model = FLIP(config).to(DEVICE)
    lengths = torch.normal(35.0, 12.0, (B,)).clamp(10, MAX_TOKENS).long()
    ids = torch.randint(config.bert.vocab_size - 2, (int(lengths.sum()),))
    images = torch.randn(B, 3, config.vit.image_size, config.vit.image_size, device=DEVICE)
    batch = images, Captions(ids, Sequences.from_lengths(lengths)).to(DEVICE), torch.arange(B, device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step(dtype):
        model.update_momentum(StepParams().momentum)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = model(*batch)
            (out.itc + out.itm).backward()
        model.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    tokens = B * (config.vit.num_patches + 1) + len(ids)
    for dtype in (torch.float32, torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            step(dtype)
        square = torch.randn(matrix, matrix, device=DEVICE, dtype=dtype)
        time = seconds(partial(step, dtype))
        speed = counter.get_total_flops() / time
        peak = 2 * matrix ** 3 / seconds(lambda: square @ square)
        rows.append([dtype, tokens, f"{time:.2f}", f"{speed / 1e9:.0f}", f"{100 * speed / peak:.0f}"])
    print(f"## A training step: {B} images, {B} captions\n")
    print(markdown_table(["", "tokens", "seconds", "GFLOP/s", "% of peak"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["attention", "contrastive", "step"])
    which = parser.parse_args().which
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else (
        f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)")
    print(f"{device}, torch {torch.__version__}, {datetime.date.today():%d %B %Y}\n")
    for name in [which] if which else ["attention", "contrastive"]:
        globals()[f"bench_{name}"]()


if __name__ == "__main__":
    run_script(main)

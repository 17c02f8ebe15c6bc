"""Time the kernels, and measure their memory, beside PyTorch's own functions.

    python bench.py                   both kernels, as Markdown tables
    python bench.py attention         one of them: attention or contrastive
    python bench.py step              a training step of the base model; minutes on a CPU
    python bench.py rerank            re-ranking with the base model; minutes on a CPU

"Ours" is the Triton kernel on a CUDA GPU, elsewhere the PyTorch path; "baseline" is our model, run as the
official code runs its own. Times are medians (minima for step and rerank) and include launch overhead;
memory is the GPU's peak beyond the inputs. Compare only within a table: each is measured in one run.
"""
import argparse
import datetime
import platform
import statistics
import time
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from bert import MAX_TOKENS, Captions
from common.optim import build_optimizers, set_learning_rate
from common.script import markdown_table, run_script
from flip import FLIP, FLIPConfig, FLIPOutput, StepParams, project, rerank
from kernels import triton
from kernels.attention import Sequences, attention, pad, padded_attention, unpad
from kernels.contrastive import contrastive_loss
from losses import contrastive_loss_reference, matching_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- measuring -----------------------------------------------------------------------------------
synchronize = torch.get_device_module(DEVICE).synchronize       # GPU launches are asynchronous


def seconds(call):
    """Duration of a call, its work on the GPU included."""
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def milliseconds(call, repeats=15):
    """Median, smallest and largest time of a call, after three that compile and warm up caches."""
    times = [1000 * seconds(call) for _ in range(3 + repeats)][3:]
    return statistics.median(times), min(times), max(times)


def peak_megabytes(call):
    """Peak GPU memory that a call allocates, in MB (10^6 bytes); "-" on a CPU."""
    if DEVICE == "cpu":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


MEASURE_HEADER = ["", "forward, ms (range)", "forward and backward, ms (range)", "memory, MB"]


def measure_row(name, forward, inputs):
    """A row under MEASURE_HEADER; backward is with respect to `inputs`. On failure, the error."""
    def both():
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    try:
        with torch.no_grad():
            alone = milliseconds(forward)
        times = [f"{mid:.2f} ({low:.2f} to {high:.2f})" for mid, low, high in (alone, milliseconds(both))]
        return [name, *times, peak_megabytes(both)]
    except Exception as error:                      # unsupported input of a backend, no compiler
        return [name, f"does not run: {str(error).strip().splitlines()[0][:60]}", "", ""]


# ---- attention -----------------------------------------------------------------------------------
def attention_cases(images: int):
    """The three uses of attention at base size: (name, (query sequences, key sequences))."""
    lengths = torch.randint(12, 66, (images,), generator=torch.Generator().manual_seed(0))
    image_seqs, caption_seqs = Sequences.uniform(images, 197, DEVICE), Sequences.from_lengths(lengths, DEVICE)
    grouped = Sequences.from_lengths(lengths.repeat(3), DEVICE).merge_groups(torch.full((images,), 3))
    return [(f"{images} images of 197 tokens", (image_seqs, image_seqs)),
            (f"{images} captions of 12 to 65 tokens", (caption_seqs, caption_seqs)),
            (f"{3 * images} captions attending to {images} images", (grouped, image_seqs))]


def sdpa_padded(query, key, value, query_sequences, key_sequences):
    """PyTorch's scaled_dot_product_attention, which requires sequences of equal length."""
    query, key, value = pad(query, query_sequences), pad(key, key_sequences), pad(value, key_sequences)
    mask = None if key_sequences.is_uniform else key_sequences.token_mask[:, None, None]
    return unpad(F.scaled_dot_product_attention(query, key, value, mask), query_sequences)


def attention_rows(sequences, dtype):
    """Yield the rows of our attention and of each SDPA backend, on padded sequences."""
    torch.manual_seed(0)
    queries, keys = sequences
    inputs = [torch.randn(n, 12, 64, device=DEVICE).to(dtype).requires_grad_()
              for n in (queries.num_tokens, keys.num_tokens, keys.num_tokens)]
    torch.testing.assert_close(attention(*inputs, *sequences), padded_attention(*inputs, *sequences),
                               rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)
    yield measure_row("ours", lambda: attention(*inputs, *sequences), inputs)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            yield measure_row(f"SDPA, {name.lower().removesuffix('_attention')}, padded",
                              lambda: sdpa_padded(*inputs, *sequences), inputs)


def bench_attention():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for name, sequences in attention_cases(80 if DEVICE == "cuda" else 8):
        print(f"\n## Attention: {name}, 12 heads of 64, {dtype}\n")
        print(markdown_table(MEASURE_HEADER, attention_rows(sequences, dtype)))


# ---- contrastive loss ----------------------------------------------------------------------------
def contrastive_inputs(B, Q, E):
    """Arguments of `contrastive_loss`; feature and temperature require gradients."""
    torch.manual_seed(0)
    feature, momentum, *keys = (F.normalize(torch.randn(n, E), dim=-1).to(DEVICE) for n in (B, B, B, Q))
    identity, queue_id = torch.arange(B, device=DEVICE), torch.full((Q,), -100, device=DEVICE)
    temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    return (feature.requires_grad_(), momentum, keys, identity, [identity, queue_id], temperature,
            StepParams().alpha)


def contrastive_rows(B, Q, E):
    """Yield the rows of ours and of "direct", the loss with logits, whose keys are already concatenated."""
    ours = feature, momentum, keys, identity, key_identity, temperature, alpha = contrastive_inputs(B, Q, E)
    direct = feature, momentum, torch.cat(keys), identity, torch.cat(key_identity), temperature, alpha
    plain = contrastive_loss_reference(*direct)
    torch.testing.assert_close(contrastive_loss(*ours), plain, rtol=1e-5, atol=0)
    for name, loss, case in (("ours", contrastive_loss, ours), ("direct", contrastive_loss_reference, direct),
                             ("direct, torch.compile", torch.compile(contrastive_loss_reference), direct)):
        yield measure_row(name, partial(loss, *case), [feature, temperature])


def bench_contrastive(B=80, Q=61_440, E=256):
    print(f"\n## Contrastive loss, one direction: {B} rows, a queue of {Q}, {E} features, float32\n")
    print(markdown_table(MEASURE_HEADER, contrastive_rows(B, Q, E)))


# ---- a training step and re-ranking: the baseline ------------------------------------------------
# Our modules and weights, used as the official code uses its own: captions are padded to MAX_TOKENS, every
# layer computes all tokens, each pair projects its image's keys and values again, and attention and
# contrastive loss compute all logits.
def baseline_attention(query, key, value, query_sequences, key_sequences, dropout=0.0):
    """Replaces `attention`, for sequences that are all padded to one length."""
    query, key, value = pad(query, query_sequences), pad(key, key_sequences), pad(value, key_sequences)
    logits = query @ key.mT / query.shape[-1] ** 0.5
    lengths = key_sequences.lengths.to(query.device)
    if (lengths < key_sequences.max_length).any():
        padding = torch.arange(key_sequences.max_length, device=query.device) >= lengths[:, None]
        logits = logits + padding[:, None, None] * torch.finfo(logits.dtype).min
    return unpad(F.dropout(logits.softmax(-1), dropout) @ value, query_sequences)


def pad_captions(captions):
    """Pad captions to MAX_TOKENS tokens each; `lengths` stay those without padding."""
    packed, ids = captions.sequences, captions.ids.new_zeros(len(captions), MAX_TOKENS)
    ids[packed.sequence_ids, packed.position_ids] = captions.ids
    uniform = Sequences.uniform(*ids.shape, ids.device)
    return Captions(ids.flatten(), replace(uniform, lengths=packed.lengths))


def baseline_logits(model, image_tokens, captions):
    """ITM logits (P, 2) of caption i with the image tokens i."""
    captions = pad_captions(captions.with_first_token(model.student.text.enc_id))
    tokens = model.student.text(captions, image_tokens)                             # (P * MAX_TOKENS, D)
    return model.matching_head(tokens[captions.sequences.first_index].float())


@patch("vit.attention", baseline_attention)
def baseline_losses(model, images, captions, identity, generator):
    """The losses of `FLIP.forward`, on one process, with the schedules' final values."""
    def text_feature(encoders):
        tokens = encoders.text(pad_captions(captions))
        return project(tokens[::MAX_TOKENS], encoders.text_projection)
    image_tokens, image_feature = model.student.image_tokens_and_features(images)
    features = image_feature, text_feature(model.student)
    with torch.no_grad():
        keys = (model.momentum_encoder.image_tokens_and_features(images)[1],
                text_feature(model.momentum_encoder))
    shared = identity, torch.cat([identity, model.queue_identity]), model.temperature, StepParams().alpha
    with torch.autocast(images.device.type, enabled=False):
        pools = [torch.cat(pool) for pool in zip(keys, (model.image_queue, model.text_queue))]
        itc = sum(contrastive_loss_reference(feature, momentum, pool, *shared)
                  for feature, momentum, pool in zip(features, keys, pools[::-1])) / 2
    negative_image, negative_text = model.sample_negatives(*features, identity, generator=generator)
    indices = torch.arange(len(images))
    logits = torch.cat([baseline_logits(model, image_tokens, captions), baseline_logits(
        model, torch.cat([image_tokens[negative_image], image_tokens]),
        captions.select(torch.cat([indices, negative_text])))])
    is_match = (torch.arange(len(logits), device=logits.device) < len(indices)).long()
    return FLIPOutput(itc, matching_loss(logits, is_match, len(logits)), *keys, identity)


@torch.no_grad()
@patch("vit.attention", baseline_attention)
def baseline_rerank(model, image_tokens, captions, similarity, k):
    """Like `rerank`, but query by query: each image with k captions, then each caption with k images."""
    both_ways = similarity - 100, similarity.T - 100        # -100: other candidates rank below these k
    for scores, cosines in zip(both_ways, (similarity, similarity.T)):
        for query, best in enumerate(cosines.topk(k).indices.cpu()):
            same = torch.full((k,), query)
            image, text = (same, best) if scores is both_ways[0] else (best, same)
            logits = baseline_logits(model, image_tokens[image], captions.select(text))
            scores[query, best] = model.rerank_score(logits, cosines[query, best])
    return both_ways


def print_seconds(calls, repeats):
    """Print the minimum seconds of each of {name: call}, and speed-ups over the first. Calls alternate, for
    equal conditions."""
    rounds = [[seconds(call) for call in calls.values()] for _ in tqdm(range(repeats), "rounds", leave=False)]
    minima = [min(times) for times in zip(*rounds)]
    print(markdown_table(["", "seconds", "speed-up"], [[name, f"{least:.2f}", f"{minima[0] / least:.2f}"]
                                                       for name, least in zip(calls, minima)]), "\n")


def model_inputs(config: FLIPConfig, texts: int):
    """A model with random weights, and captions of random lengths, 35 tokens on average."""
    torch.manual_seed(0)
    model = FLIP(config).to(DEVICE)
    lengths = torch.normal(35.0, 12.0, (texts,)).clamp(10, MAX_TOKENS).long()
    ids = torch.randint(config.bert.vocab_size - 2, (int(lengths.sum()),))
    return model, Captions(ids, Sequences.from_lengths(lengths)).to(DEVICE)


def bench_step(config=FLIPConfig(), B=8, repeats=4):
    model, captions = model_inputs(config, B)
    images = torch.randn(B, 3, config.vit.image_size, config.vit.image_size, device=DEVICE)
    identity, momentum = torch.arange(B, device=DEVICE), StepParams().momentum

    def forward(baseline):
        losses = partial(baseline_losses, model) if baseline else model
        return losses(images, captions, identity, generator=torch.Generator().manual_seed(0))

    def step(baseline, dtype):
        if baseline:
            for average, p in zip(model.momentum_encoder.parameters(), model.student.parameters()):
                average.data = average.data * momentum + p.data * (1 - momentum)
        else:
            model.update_momentum(momentum)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = forward(baseline)
            (out.itc + out.itm).backward()
        model.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizers[baseline].step()
        optimizers[baseline].zero_grad(set_to_none=True)

    with torch.no_grad():
        model.eval()                    # without dropout both must give the same losses
        ours, theirs = (torch.stack(forward(baseline)[:2]) for baseline in (False, True))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, 0.05)[0], torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.05)
    set_learning_rate(optimizers[:1], 1e-6)
    print(f"## A training step: {B} images, {B} captions of {captions.sequences.num_tokens} tokens\n")
    print_seconds({f"{name}, {dtype}": partial(step, baseline, dtype)
                   for name, baseline in (("baseline", True), ("ours", False))
                   for dtype in (torch.float32, torch.bfloat16)}, repeats)


def bench_rerank(config=FLIPConfig(queue_size=1), images=48, texts=48, k=16, repeats=2):
    model, captions = model_inputs(config, texts)
    tokens = torch.randn(images, config.vit.num_patches + 1, config.vit.width, device=DEVICE)
    case = model.eval(), tokens, captions, torch.rand(images, texts, device=DEVICE), k
    small = model, tokens[:5], captions.select(torch.arange(6)), case[3][:5, :6], 3
    for ours, theirs in zip(rerank(*small), baseline_rerank(*small)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    print(f"## Re-ranking: {images} images, {texts} captions of {captions.sequences.num_tokens} tokens, "
          f"k {k}, float32\n")
    print_seconds({"baseline": partial(baseline_rerank, *case), "ours": partial(rerank, *case)}, repeats)


BENCHES = {"attention": bench_attention, "contrastive": bench_contrastive, "step": bench_step,
           "rerank": bench_rerank}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", nargs="?", choices=list(BENCHES), help="default: attention and contrastive")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else (
        f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)")
    print(f"{device}, torch {torch.__version__}, Triton {getattr(triton, '__version__', 'none')}, "
          f"{datetime.date.today():%d %B %Y}\n")
    for name in [args.which] if args.which else ["attention", "contrastive"]:
        BENCHES[name]()


if __name__ == "__main__":
    run_script(main)

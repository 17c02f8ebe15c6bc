"""What is claimed of this project, in the reading order of its files: `pytest test_all.py`.

Numbers are held against something that we did not write: golden.npz (recorded from the official code at a small size,
with random weights and dropout 0), torch's own modules, closed forms. `pytest -m slow` runs the long ones.
"""
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"        # before Triton is imported: the kernels run on CPU tensors, slowly

import bert
import data
import finetune
import flip as flip_module
import losses
import toyfaces
import train
import vit
from bert import Bert, BertConfig, Captions, Tokenizer, clean_caption, load_bert
from data import ATTRIBUTES, FACTS
from flip import FLIP, FLIPConfig, official_name, official_state, rerank
from kernels import attention as attention_file
from kernels import bench
from kernels import contrastive as contrastive_file
from kernels.attention import Sequences, attention
from kernels.contrastive import contrastive_loss
from vit import ViT, ViTConfig, load_clip

torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)    # with several, sums are added up in no fixed order, and equal runs differ in the last bit
ROOT = Path(__file__).parent
RECORDED = dict(np.load(ROOT / "golden.npz"))
GOLDEN = {name: torch.from_numpy(value) for name, value in RECORDED.items() if value.dtype.kind != "U"}
SENTENCES = json.loads(str(RECORDED["captions"]))
GOLDEN_CONFIG = FLIPConfig(ViTConfig(image_size=32, patch_size=8, width=24, depth=4, heads=3),
                           BertConfig(vocab_size=81, width=20, depth=3, heads=2, positions=66, dropout=0.0), 12, 8, 0.995)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.detach().to(expected.dtype), expected, rtol=0, atol=tolerance)


def error_of(call, *args, **kwargs):
    """The sentence with which a call refuses its input."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---- kernels/attention.py ------------------------------------------------------------------------------------------
def attention_one_by_one(q, k, v, q_sequences, k_sequences, kv_of, factor=None):
    """The definition, sequence by sequence, in whatever precision the inputs have; factor: what dropout multiplies the weights
    of each sequence with."""
    out = []
    for p in range(len(q_sequences.lengths)):
        s = p if kv_of is None else int(kv_of[p])
        rows, columns = slice(*q_sequences.starts[p:p + 2]), slice(*k_sequences.starts[s:s + 2])
        weights = (torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * q.shape[-1] ** -0.5).softmax(-1)
        weights = weights if factor is None else weights * factor[p]
        out.append(torch.einsum("hqk,khd->qhd", weights, v[columns]))
    return torch.cat(out)


MIXED = ([1, 5, 16, 17, 64, 65, 0], [1, 5, 16, 17, 64, 65, 0], None)                # the last: an empty caption
SHARED = ([3, 17, 20, 1], [65, 10, 7], [1, 0, 1, 1])                                # nobody reads the third


def packed_inputs(query_lengths, key_lengths, kv_of, dtype=torch.float32, heads=2, channels=16):
    """q, k, v and the sequences, on the device under test."""
    torch.manual_seed(0)
    q_sequences, k_sequences = Sequences.of(query_lengths, DEVICE), Sequences.of(key_lengths, DEVICE)
    inputs = [torch.randn(sequences.tokens, heads, channels, device=DEVICE).to(dtype)
              for sequences in (q_sequences, k_sequences, k_sequences)]
    kv_of = torch.tensor(range(len(query_lengths)) if kv_of is None else kv_of, dtype=torch.int32, device=DEVICE)
    return inputs, q_sequences, k_sequences, kv_of


def run_kernels(inputs, q_sequences, k_sequences, kv_of, grad, dropout=0.0, seed=2 ** 40 + 7):
    """(O, dQ, dK, dV) from the Triton kernels themselves: on a GPU, or by Triton's interpreter."""
    shared = q_sequences.starts, k_sequences.starts, kv_of, q_sequences.longest, k_sequences.longest, dropout, torch.tensor(seed)
    out, lse = attention_file.launch_forward(*inputs, *shared)
    return out, *attention_file.launch_backward(grad, *inputs, out, lse, *shared)


def expected_attention(inputs, q_sequences, k_sequences, kv_of, grad, factor=None):
    """(O, dQ, dK, dV) by float64 autograd through the definition."""
    exact = [x.double().requires_grad_() for x in inputs]
    out = attention_one_by_one(*exact, q_sequences, k_sequences, kv_of, factor)
    return out, *torch.autograd.grad(out, exact, grad.double())


def agree(found, expected, tolerance):
    """Relative to the size of the whole, for each tensor."""
    for x, exact in zip(found, expected, strict=True):
        assert x.isfinite().all()
        assert (x.double() - exact).norm() <= tolerance * exact.norm()


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}        # half: its rounding of inputs and P
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")     # the interpreter is wrong in bfloat16


@pytest.mark.parametrize("query_lengths, key_lengths, kv_of", [
    ([5, 5, 5], [5, 5, 5], None), ([3, 1, 17, 4], [3, 1, 17, 4], None), ([2, 9, 1, 4], [7, 7], [1, 0, 1, 1]),
    ([1, 1, 1], [4, 9, 2], None), ([3, 8], [6, 2, 11], [2, 0]), ([3, 0, 2], [3, 0, 2], None), ([3, 2], [0, 4], None)])
def test_packed_attention_and_its_gradients_equal_the_definition_sequence_by_sequence(query_lengths, key_lengths, kv_of):
    torch.manual_seed(0)
    q_sequences, k_sequences = Sequences.of(query_lengths), Sequences.of(key_lengths)
    inputs = [torch.randn(n, 2, 8, requires_grad=True) for n in (sum(query_lengths), sum(key_lengths), sum(key_lengths))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    kv_of = None if kv_of is None else torch.tensor(kv_of)
    found, expected = attention(*inputs, q_sequences, k_sequences, kv_of), attention_one_by_one(*exact, q_sequences, k_sequences, kv_of)
    close(found.double(), expected, 1e-6)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(inputs, exact):
        close(x.grad.double(), y.grad, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, channels", [(MIXED, 16), (MIXED, 24), (SHARED, 32), (([197], [197], None), 64),
                                               (([30, 2], [16, 197], [1, 1]), 128), (([4, 3], [0, 5], None), 16)])
def test_the_attention_kernels_equal_float64_autograd(lengths, channels, dtype):
    inputs, *sequences = packed_inputs(*lengths, dtype=dtype, channels=channels)
    grad = torch.randn_like(inputs[0])
    agree(run_kernels(inputs, *sequences, grad), expected_attention(inputs, *sequences, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_attention_kernels_drop_the_same_weights_forward_and_backward(dtype):
    """With equal scores and the identity for values, O shows which weights were dropped; with these the definition must give
    what the kernels give for any other scores, gradients included."""
    lengths, dropout = ([65, 9, 100], [70, 128, 30], [1, 0, 2]), 0.3
    inputs, q_sequences, k_sequences, kv_of = packed_inputs(*lengths, dtype=dtype, channels=128)
    q, k, v = inputs
    identity = torch.cat([torch.eye(n, 128) for n in lengths[1]]).to(v)[:, None].expand_as(v).contiguous()
    shown = run_kernels([q * 0, k, identity], q_sequences, k_sequences, kv_of, q, dropout)[0]
    factor = []
    for p in range(3):
        n = lengths[1][lengths[2][p]]
        kept = shown[q_sequences.starts[p]:q_sequences.starts[p + 1], :, :n].transpose(0, 1) > 0    # (H, Lq, n)
        factor.append(kept.double() / (1 - dropout))
    rate = torch.cat([f.flatten() for f in factor]).bool().double().mean()
    assert rate == pytest.approx(1 - dropout, abs=0.01)                             # 5 standard deviations
    grad = torch.randn_like(q)
    found, expected = (f(inputs, q_sequences, k_sequences, kv_of, grad, x) for f, x in
                       ((run_kernels, dropout), (expected_attention, factor)))
    agree(found, expected, TOLERANCE[dtype])
    other = run_kernels([q * 0, k, identity], q_sequences, k_sequences, kv_of, q, dropout, seed=8)[0]
    assert not torch.equal(other, shown), "another seed drops others"


def test_dropout_of_0_is_exact_in_the_attention_kernels():
    """2 ** -40 goes the way of dropout and keeps everything."""
    inputs, *sequences = packed_inputs(*SHARED)
    grad = torch.randn_like(inputs[0])
    for x, y in zip(run_kernels(inputs, *sequences, grad, 0.0), run_kernels(inputs, *sequences, grad, 2.0 ** -40)):
        assert torch.equal(x, y)


def test_two_runs_of_the_attention_kernels_give_equal_bits():
    inputs, *sequences = packed_inputs(*SHARED)
    grad = torch.randn_like(inputs[0])
    for x, y in zip(run_kernels(inputs, *sequences, grad, 0.1), run_kernels(inputs, *sequences, grad, 0.1)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("lengths", [MIXED, SHARED])
def test_the_formulas_in_pytorch_equal_float64_autograd_and_the_kernels(lengths, dropout):
    inputs, q_sequences, k_sequences, kv_of = packed_inputs(*lengths)
    grad, seed = torch.randn_like(inputs[0]), 2 ** 40 + 7
    shared = q_sequences.starts, k_sequences.starts, kv_of, dropout, torch.tensor(seed)
    out, lse = attention_file.reference_forward(*inputs, *shared)
    found = out, *attention_file.reference_backward(grad, *inputs, out, lse, *shared)
    agree(run_kernels(inputs, q_sequences, k_sequences, kv_of, grad, dropout), [x.double() for x in found], 1e-5)
    factor = [attention_file.dropout_factor(torch.empty(2, n, int(k_sequences.lengths[s]), device=DEVICE), int(start), dropout, seed)
              for n, start, s in zip(q_sequences.lengths, q_sequences.starts, kv_of)]
    agree(found, expected_attention(inputs, q_sequences, k_sequences, kv_of, grad, factor), 1e-5)


def test_random_bits_are_philox():
    """The known answer of Random123 for counter and key 0 (philox4x32, 10 rounds)."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert attention_file.philox(0, zero, zero, zero).item() == 0x6627E8D5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_attention_operators_keep_torchs_rules(dropout):
    inputs, q_sequences, k_sequences, kv_of = packed_inputs(*SHARED)
    shared = q_sequences.starts, k_sequences.starts, kv_of, q_sequences.longest, k_sequences.longest, dropout, torch.tensor(7)
    torch.library.opcheck(attention_file.fused, (*[x.requires_grad_() for x in inputs], *shared))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(attention_file.fused_backward, (inputs[0], *inputs, *attention_file.fused(*inputs, *shared), *shared))


def test_half_precision_formulas_compute_in_float32():
    inputs, q_sequences, k_sequences, kv_of = packed_inputs(*SHARED, dtype=torch.bfloat16)
    grad, shared = torch.randn_like(inputs[0]), (q_sequences.starts, k_sequences.starts, kv_of, 0.0, torch.tensor(0))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = attention_file.reference_forward(*inputs, *shared)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    found = out, *attention_file.reference_backward(grad, *inputs, out, lse, *shared)
    agree(found, expected_attention(inputs, q_sequences, k_sequences, kv_of, grad), TOLERANCE[torch.bfloat16])


def test_attention_refuses_sequences_that_do_not_fit_the_tokens():
    inputs, q_sequences, k_sequences, kv_of = packed_inputs(*SHARED)
    assert "41 queries, 82 keys and 3 pairs of sequences, but the sequences say 41, 82 and 4" in error_of(
        attention, *inputs, q_sequences, k_sequences)
    assert "40 queries" in error_of(attention, inputs[0][1:], *inputs[1:], q_sequences, k_sequences, kv_of)


def test_attention_computes_in_the_type_of_autocast():
    inputs, q_sequences, k_sequences, _ = packed_inputs([3, 4], [3, 4], None)
    for dropout in (0.0, 0.1):
        with torch.autocast(DEVICE, torch.bfloat16):
            assert attention(*inputs, q_sequences, k_sequences, dropout=dropout).dtype == torch.bfloat16


# ---- kernels/contrastive.py ----------------------------------------------------------------------------------------
def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_without_soft_targets_and_with_distinct_people_itc_is_cross_entropy_on_the_diagonal():
    torch.manual_seed(0)
    feature, keys, identity = unit(5, 8), unit(12, 8), torch.arange(12)
    found = contrastive_loss(feature, unit(5, 8), [keys], torch.arange(5), [identity], torch.tensor(0.1), alpha=0.0)
    close(found, F.cross_entropy(feature @ keys.T / 0.1, torch.arange(5)), 1e-6)


def test_with_soft_targets_alone_itc_is_cross_entropy_with_the_momentum_encoders_softmax():
    torch.manual_seed(0)
    feature, momentum, keys, identity = unit(5, 8), unit(5, 8), unit(12, 8), torch.arange(12)
    found = contrastive_loss(feature, momentum, [keys], torch.arange(5), [identity], torch.tensor(0.1), alpha=1.0)
    close(found, F.cross_entropy(feature @ keys.T / 0.1, (momentum @ keys.T / 0.1).softmax(1)), 1e-6)


def test_the_same_person_in_batch_and_queue_shares_the_positive_mass():
    torch.manual_seed(0)
    feature, batch, queue = unit(3, 8), unit(3, 8), unit(3, 8)
    shares = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 3, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]]) / 3.0
    found = contrastive_loss(feature, unit(3, 8), [batch, queue], torch.tensor([7, 8, 7]),
                             [torch.tensor([7, 8, 7]), torch.tensor([-100, 7, -100])], torch.tensor(0.1), alpha=0.0)
    close(found, F.cross_entropy(feature @ torch.cat([batch, queue]).T / 0.1, shares), 1e-6)


def contrastive_case(B=20, Q=300, E=32, dtype=torch.float32):
    """Features with momentum features close to their keys; people who appear twice in the batch and again in the queue."""
    torch.manual_seed(0)
    momentum = unit(B, E)
    keys = [F.normalize(momentum + 0.1 * torch.randn(B, E), dim=-1), unit(Q, E)]
    identity = torch.arange(B) // 2
    tensors = unit(B, E), momentum, keys, identity, [identity, torch.randint(0, 50, (Q,))]
    return [[y.to(DEVICE, dtype if y.is_floating_point() else None) for y in x] if isinstance(x, list) else
            x.to(DEVICE, dtype if x.is_floating_point() else None) for x in tensors]


def expected_contrastive(feature, momentum, keys, identity, key_identity, temperature, alpha):
    """(loss, dq, dtau) by float64 autograd through the direct form."""
    q, tau = feature.double().requires_grad_(), torch.tensor(temperature, dtype=torch.float64, device=DEVICE, requires_grad=True)
    loss = contrastive_file.reference(q, momentum.double(), torch.cat(keys).double(), identity, torch.cat(key_identity), tau, alpha)
    return loss, *torch.autograd.grad(loss, (q, tau))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
@pytest.mark.parametrize("shape, programs", [((20, 300, 32), 1), ((20, 300, 32), 12), ((5, 40, 12), 12), ((2, 33, 96), 4)])
def test_the_contrastive_kernel_and_its_plain_twin_equal_float64_autograd(shape, programs, temperature, alpha):
    case = contrastive_case(*shape)
    expected = expected_contrastive(*case, temperature, alpha)
    tau = torch.tensor(temperature, device=DEVICE)
    for sums in (contrastive_file.kernel_sums(*case, tau, programs=programs), contrastive_file.plain_sums(*case, tau, chunk=16)):
        agree(contrastive_file.loss_and_gradients(sums, case[0], tau, alpha), expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_contrastive_kernel_reads_half_precision_keys(dtype):
    """They are rounded once, on being stored: what is computed from them is exact."""
    feature, momentum, keys, identity, key_identity = contrastive_case()
    case = feature, momentum, [piece.to(dtype) for piece in keys], identity, key_identity
    tau = torch.tensor(0.07, device=DEVICE)
    found = contrastive_file.loss_and_gradients(contrastive_file.kernel_sums(*case, tau, programs=12), feature, tau, 0.4)
    agree(found, expected_contrastive(*case, 0.07, 0.4), 1e-5)
    half_features = contrastive_loss(feature.to(dtype), momentum.to(dtype), case[2], identity, key_identity, tau, 0.4)
    agree([half_features], [expected_contrastive(*case, 0.07, 0.4)[0]], TOLERANCE[dtype])


def test_pieces_of_keys_merge_into_the_whole_in_any_order_and_empty_ones_do_not_count():
    feature, momentum, keys, identity, key_identity = contrastive_case()
    whole = contrastive_loss(feature, momentum, [torch.cat(keys)], identity, [torch.cat(key_identity)], torch.tensor(0.07, device=DEVICE), 0.4)
    pieces = [keys[1][150:], keys[0], keys[1][:150], keys[1][:0]]
    ids = [key_identity[1][150:], key_identity[0], key_identity[1][:150], key_identity[1][:0]]
    close(contrastive_loss(feature, momentum, pieces, identity, ids, torch.tensor(0.07, device=DEVICE), 0.4), whole, 1e-6)


def test_gradients_reach_feature_and_temperature_through_the_operator_and_it_keeps_torchs_rules():
    feature, momentum, keys, identity, key_identity = contrastive_case()
    tau = torch.tensor(0.07, device=DEVICE, requires_grad=True)
    loss = contrastive_loss(feature.requires_grad_(), momentum, keys, identity, key_identity, tau, 0.4)
    found = loss, *torch.autograd.grad(3 * loss, (feature, tau))
    expected = expected_contrastive(feature.detach(), momentum, keys, identity, key_identity, 0.07, 0.4)
    agree(found, (expected[0], 3 * expected[1], 3 * expected[2]), 1e-5)
    torch.library.opcheck(contrastive_file.contrastive, (feature, momentum, keys, identity, key_identity, tau, 0.4))


def test_the_contrastive_loss_stays_in_float32_under_autocast():
    case, tau = contrastive_case(), torch.tensor(0.01, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = contrastive_loss(*case, tau, 0.4)
    assert found.dtype == torch.float32 and torch.equal(found, contrastive_loss(*case, tau, 0.4))


def test_the_memory_of_the_contrastive_loss_does_not_grow_with_the_queue():
    """At B 80, Q 61,440, E 256; the logits alone would be 20 MB."""
    def needed(Q):
        feature, *others, temperature = bench.contrastive_inputs(80, Q, 256)
        return bench.megabytes(lambda: torch.autograd.grad(contrastive_loss(feature, *others, temperature, 0.4), (feature, temperature)))
    assert needed(61_440) <= 15
    assert DEVICE == "cuda" or needed(61_440) == pytest.approx(needed(6_144), rel=0.1)


# ---- kernels/bench.py ----------------------------------------------------------------------------------------------
def test_the_bench_prints_its_tables(monkeypatch, capsys):
    """Small, each once, and without the compiler."""
    monkeypatch.setattr(bench, "cases", lambda images, cases=bench.cases: cases(2))
    monkeypatch.setattr(bench, "milliseconds", lambda run: (run(), (1.0, 1.0, 1.0))[1])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bench.bench_attention()
    bench.bench_contrastive(B=4, Q=50, E=16)
    printed = capsys.readouterr().out
    assert printed.count("| ours | 1.00") == 4 and printed.count("| SDPA, math, padded | 1.00") == 3
    assert len(re.findall(r"\d\.\de-\d\d", printed)) >= 3 * 4 + 2 * 3


def test_without_triton_everything_else_works():
    """As on a Mac: importing it fails."""
    code = "import sys; sys.modules['triton'] = None; import torch, train; print(train.FLIP.__name__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "FLIP\n"


def test_every_shipped_kernel_compiles_for_a100_and_h100_without_spilling():
    """In a process of its own, since this one may be running Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton comes for Linux only")
    done = subprocess.run([sys.executable, "-m", "kernels.bench", "--compile-only"], cwd=ROOT, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert {row[1] for row in rows} == {"forward_kernel", "query_kernel", "key_kernel", "sums_kernel"}
    assert {(row[2], row[5]) for row in rows} == set(itertools.product(("fp16", "bf16", "fp32"), ("8.0", "9.0")))
    for row in rows:
        assert row[7] == "0" and float(row[8]) <= {"8.0": 163, "9.0": 227}[row[5]], row


# ---- vit.py --------------------------------------------------------------------------------------------------------
def fill_torch_attention(theirs, ours):
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]).detach()
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def test_a_vit_block_equals_torchs_encoder_layer():
    torch.manual_seed(0)
    block = vit.Block(ViTConfig(width=32, heads=4))
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, vit.quick_gelu, batch_first=True, norm_first=True)
    fill_torch_attention(theirs.self_attn, block.attention)
    for ours, name in ((block.up, "linear1"), (block.down, "linear2"), (block.norm_attention, "norm1"), (block.norm_mlp, "norm2")):
        nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
        getattr(theirs, name).load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 32)
    close(block(x.flatten(0, 1), Sequences.uniform(3, 7)).unflatten(0, (3, 7)), theirs(x), 1e-4)


def test_the_class_token_alone_is_what_the_whole_computation_gives_there():
    encoder = ViT(GOLDEN_CONFIG.vit)
    images = torch.randn(3, 3, 32, 32)
    close(encoder(images, first_only=True), encoder(images)[:, 0], 1e-6)


def test_initial_values_are_clips():
    encoder = ViT(ViTConfig(image_size=32, patch_size=8, width=256, depth=6, heads=4))
    block = encoder.blocks[3]
    for parameter, std in ((encoder.patch_embedding.weight, 0.02), (encoder.positions, 0.02), (encoder.class_token, 256 ** -0.5),
                           (block.attention.query.weight, 256 ** -0.5 * 12 ** -0.5), (block.attention.out.weight, 256 ** -0.5),
                           (block.up.weight, 512 ** -0.5), (block.down.weight, 256 ** -0.5 * 12 ** -0.5)):
        assert parameter.std().item() == pytest.approx(std, rel=0.15)


def clip_file(folder, encoder, suffix):
    """The weights of `vit` as openai/clip-vit-base-patch16 spells them, among weights of CLIP's text half."""
    weights = {"vision_model." + vit.rename(name, vit.CLIP_NAMES): tensor.clone() for name, tensor in encoder.state_dict().items()}
    weights |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(2, 2),
                "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    if suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return weights


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_clip_weights_load_under_the_names_that_hugging_face_gives_them(tmp_path, suffix):
    source, encoder = ViT(GOLDEN_CONFIG.vit), ViT(GOLDEN_CONFIG.vit)
    weights = clip_file(tmp_path, source, suffix)
    official = {name.removeprefix("visual_encoder.").replace("post_layrnorm", "post_layernorm") for name in json.loads(str(RECORDED["base_shapes"]))
                if name.startswith("visual_encoder.")}
    assert {name for name in weights if name.startswith("vision_model.") and not ".layers." in name} == {name for name in official if not ".layers." in name}
    load_clip(encoder, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    close(encoder(images), source(images), 0)


def test_clip_weights_for_another_image_size_have_their_position_table_resized(tmp_path):
    source = ViT(GOLDEN_CONFIG.vit)
    with torch.no_grad():
        source.positions.copy_(torch.linspace(0, 1, 17)[:, None].expand(17, 24))
    clip_file(tmp_path, source, ".bin")
    encoder = ViT(dataclasses.replace(GOLDEN_CONFIG.vit, image_size=64))
    load_clip(encoder, tmp_path)
    grid = encoder.positions[1:].unflatten(0, (8, 8))
    close(encoder.positions[0], source.positions[0], 0)
    assert (grid[:, 1:] > grid[:, :-1]).all() and (grid[1:] > grid[:-1]).all(), "a rising table stays rising"
    close(grid.mean((0, 1)), source.positions[1:].mean(0), 1e-3)


# ---- bert.py -------------------------------------------------------------------------------------------------------
def test_text_layers_equal_torchs_decoder_layers():
    """torch's post-norm decoder layer is BERT's layer with cross-attention; its encoder layer is the one without."""
    torch.manual_seed(0)
    layer = bert.Layer(BertConfig(width=32, heads=4, dropout=0.0), image_width=32)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    with_images = nn.TransformerDecoderLayer(32, 4, 128, 0.0, F.gelu, 1e-12, batch_first=True)
    without = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, 1e-12, batch_first=True)
    for theirs, norms in ((with_images, ("norm_attention", "norm_cross_attention", "norm_mlp")), (without, ("norm_attention", "norm_mlp"))):
        fill_torch_attention(theirs.self_attn, layer.attention)
        theirs.linear1.load_state_dict(layer.up.state_dict()), theirs.linear2.load_state_dict(layer.down.state_dict())
        for number, name in enumerate(norms, start=1):
            getattr(theirs, f"norm{number}").load_state_dict(getattr(layer, name).state_dict())
    fill_torch_attention(with_images.multihead_attn, layer.cross_attention)
    text, images, sequences = torch.randn(3, 6, 32), torch.randn(3, 9, 32), Sequences.uniform(3, 6)
    close(layer(text.flatten(0, 1), sequences).unflatten(0, (3, 6)), without(text), 1e-5)
    context = images.flatten(0, 1), Sequences.uniform(3, 9), None
    close(layer(text.flatten(0, 1), sequences, context).unflatten(0, (3, 6)), with_images(text, images), 1e-5)


def test_the_first_token_alone_is_what_the_whole_computation_gives_there():
    torch.manual_seed(0)
    encoder = Bert(GOLDEN_CONFIG.bert, image_width=24).eval()
    captions, images = Captions(torch.randint(5, 79, (14,)), Sequences.of([3, 7, 4])), torch.randn(2, 5, 24)
    firsts = captions.sequences.firsts.long()
    close(encoder(captions, first_only=True), encoder(captions)[firsts])
    image_of = torch.tensor([1, 0, 1])
    close(encoder(captions, images, image_of, first_only=True), encoder(captions, images, image_of)[firsts])


def test_a_packed_caption_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    encoder = Bert(GOLDEN_CONFIG.bert, image_width=24).eval()
    captions = Captions(torch.randint(5, 79, (14,)), Sequences.of([3, 7, 4]))
    together = encoder(captions)
    for p, rows in enumerate(([0, 3], [3, 10], [10, 14])):
        close(together[slice(*rows)], encoder(captions.select(torch.tensor([p]))))


def test_dropout_is_active_in_training_and_off_in_evaluation():
    torch.manual_seed(0)
    encoder = Bert(dataclasses.replace(GOLDEN_CONFIG.bert, dropout=0.5), image_width=24)
    captions = Captions(torch.arange(5, 12), Sequences.of([7]))
    assert not torch.equal(encoder(captions), encoder(captions))
    encoder.eval()
    close(encoder(captions), encoder(captions), 0)


def test_bert_weights_load_with_token_type_zero_folded_in_and_new_parts_left_alone(tmp_path):
    torch.manual_seed(0)
    config = GOLDEN_CONFIG.bert
    source, encoder = Bert(config, image_width=24), Bert(config, image_width=24)
    weights = {"bert." + bert.bert_name(name).replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
               for name, tensor in source.state_dict().items() if "cross_attention" not in name}
    weights["bert.embeddings.word_embeddings.weight"] = source.words.weight[:-2].detach().clone()
    types = torch.randn(2, 20)
    weights |= {"bert.embeddings.token_type_embeddings.weight": types, "bert.pooler.dense.weight": torch.ones(20, 20),
                "cls.predictions.bias": torch.ones(79), "bert.embeddings.position_ids": torch.arange(66)[None]}
    names = {name for name in json.loads(str(RECORDED["base_shapes"])) if name.startswith("text_encoder.") and "crossattention" not in name}
    spelled = {name.replace("bert.", "text_encoder.", 1).replace("gamma", "weight").replace("beta", "bias") for name in weights if ".layer.0." in name}
    assert spelled == {name for name in names if ".layer.0." in name}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    own_words, own_cross = encoder.words.weight[-2:].clone(), encoder.layers[0].cross_attention.key.weight.clone()
    load_bert(encoder, tmp_path)
    close(encoder.positions, source.positions + types[0], 0)
    close(encoder.words.weight, torch.cat([source.words.weight[:-2], own_words]), 0)
    close(encoder.layers[0].cross_attention.key.weight, own_cross, 0)
    close(encoder.layers[1].down.weight, source.layers[1].down.weight, 0)


def golden_tokenizer(folder):
    (folder / "vocab.txt").write_text(str(RECORDED["vocab"]))
    return Tokenizer.load(folder / "vocab.txt")


def golden_captions(part):
    """The recorded ids and masks of a part, packed."""
    ids, mask = GOLDEN[f"{part}.input_ids"], GOLDEN[f"{part}.attention_mask"].bool()
    return Captions(ids[mask], Sequences.of(mask.sum(-1)))


def test_word_pieces_are_the_official_ones(tmp_path):
    for part in ("train", "eval", "hard"):
        found, expected = golden_tokenizer(tmp_path)(SENTENCES[part]), golden_captions(part)
        assert found.ids.tolist() == expected.ids.tolist() and found.sequences.lengths.tolist() == expected.sequences.lengths.tolist()


def test_a_tokenizer_is_the_same_from_vocab_txt_tokenizer_json_and_a_folder(tmp_path):
    tokenizer = golden_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    text = ["She is UNKNOWNWORD, bald!"]
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(source)(text).ids.tolist() == tokenizer(text).ids.tolist()


def test_a_trained_vocabulary_knows_its_words_and_is_the_same_every_time():
    captions = [data.caption(toyfaces.sample_attributes(np.random.default_rng(i)), np.random.default_rng(i))[0] for i in range(200)]
    first, second = Tokenizer.train(captions), Tokenizer.train(captions)
    assert first.to_json() == second.to_json()
    ids = first(captions).ids
    assert (ids != first.wordpiece.token_to_id("[UNK]")).all() and ids.max() < first.vocab_size - 2


def test_captions_are_cleaned_and_cut_as_officially():
    assert clean_caption('She (is) YOUNG!  With; a hat.\n') == "she is young with a hat"
    assert clean_caption("o'clock, pale") == "o'clock, pale"
    assert len(clean_caption("word " * 100).split()) == 65
    long = Tokenizer.train(["word"])(["word " * 100])
    assert long.sequences.longest == 65 and long.ids[-1] == 3, "65 tokens, [SEP] the last"


# ---- losses.py -----------------------------------------------------------------------------------------------------
def test_negatives_are_never_the_same_person_and_hardness_goes_from_even_to_softmax():
    similarity, identity = torch.tensor([[1.0, 0.9, 0.2], [0.1, 1.0, 0.4], [0.9, 0.3, 1.0]]), torch.tensor([5, 6, 5])
    even = losses.negative_probabilities(similarity, identity, 0.001, hardness=0.0)
    close(even, torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]]), 1e-7)
    hard = losses.negative_probabilities(similarity, identity, 0.5, hardness=1.0)
    close(hard[1], torch.tensor([0.1, -torch.inf, 0.4]).div(0.5).softmax(0), 1e-6)


def test_a_negative_survives_similarities_that_would_vanish_beside_the_positive():
    """exp(-2 / 0.001) is 0 in float32: softmax first and mask later would leave a row without mass."""
    similarity = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    close(losses.negative_probabilities(similarity, torch.arange(2), 0.001), torch.tensor([[0.0, 1], [1, 0]]), 0)


def test_recall_counts_the_best_of_an_images_captions_and_ties_against_us():
    image_of_text = torch.tensor([0, 0, 1])
    image_to_text = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.7]])
    metrics = losses.retrieval_metrics(image_to_text, image_to_text.T, image_of_text)
    assert metrics["txt_r1"] == 50 and metrics["txt_r5"] == 100
    assert metrics["img_r1"] == pytest.approx(100 * 2 / 3)


# ---- flip.py: the official numbers ---------------------------------------------------------------------------------
@pytest.fixture
def official(tmp_path):
    """The official checkpoint, as a file in its own format, loaded."""
    weights = {name.removeprefix("checkpoint."): tensor for name, tensor in GOLDEN.items() if name.startswith("checkpoint.")}
    torch.save({"model": weights, "optimizer": {}, "config": {}, "epoch": 0}, tmp_path / "official_checkpoint.pth")
    return FLIP.from_pretrained(tmp_path / "official_checkpoint.pth", GOLDEN_CONFIG)


def test_the_official_checkpoint_loads_with_nothing_missing_or_left_over_and_saves_back_the_same(official):
    saved = official_state(official)
    expected = {name.removeprefix("checkpoint."): tensor for name, tensor in GOLDEN.items() if name.startswith("checkpoint.")}
    assert saved.keys() == expected.keys()
    for name in expected:
        assert saved[name].dtype == expected[name].dtype and torch.equal(saved[name], expected[name]), name


def test_tokens_and_features_are_the_official_ones(official):
    official.eval()
    captions, real = golden_captions("eval"), GOLDEN["eval.attention_mask"].bool()
    tokens, features = official.encode_image(GOLDEN["eval.images"])
    close(tokens, GOLDEN["eval.image_tokens"])
    for k, hidden in enumerate(official.student.image(GOLDEN["eval.images"], return_hidden=True)[1][:3]):
        close(hidden, GOLDEN[f"eval.hidden.layer_{k}"])
    close(features, GOLDEN["eval.image_feat"])
    close(official.student.text(captions), GOLDEN["eval.text_tokens"][real])
    close(official.encode_text(captions), GOLDEN["eval.text_feat"])


@pytest.mark.parametrize("first", ["enc", "cls"])
def test_joint_tokens_and_matching_logits_are_the_official_ones(official, first):
    official.eval()
    text = official.student.text
    captions = golden_captions("eval").starting_with(text.enc_token if first == "enc" else 2)
    joint = text(captions, official.encode_image(GOLDEN["eval.images"])[0], GOLDEN["eval.pair_image"])
    close(joint, GOLDEN[f"eval.joint_tokens_{first}"][GOLDEN["eval.attention_mask"].bool()])
    close(official.matching_head(joint[captions.sequences.firsts.long()]), GOLDEN[f"eval.itm_logits_{first}"])


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    """Run the model with PyTorch's attention and the plain contrastive loss, or with the kernels. Returns the device for it."""
    if request.param == "pytorch":
        return "cpu"
    if DEVICE == "cpu":             # the interpreter takes CPU tensors
        kernel_sums = contrastive_file.kernel_sums
        monkeypatch.setattr(attention_file, "runs_kernel", lambda query: True)
        monkeypatch.setattr(contrastive_file, "runs_kernel", lambda feature: True)
        monkeypatch.setattr(contrastive_file, "kernel_sums", lambda *case: kernel_sums(*case, programs=8))
    return DEVICE


def official_step(model, part, alpha, identity, index=..., device="cpu"):
    """Momentum update and losses in the official order, on the recorded batch."""
    mask = GOLDEN[f"{part}.attention_mask"][index].bool()
    captions = Captions(GOLDEN[f"{part}.input_ids"][index][mask], Sequences.of(mask.sum(-1)))
    model.update_momentum()
    return model(GOLDEN[f"{part}.images"][index].to(device), captions.to(device), identity.to(device), float(alpha))


def test_losses_and_every_gradient_norm_of_a_step_are_the_official_ones(official, path):
    out = official_step(official.to(path).train(), "train", GOLDEN["train.alpha"], GOLDEN["train.pair_ids"], device=path)
    close(out.itc.cpu(), GOLDEN["train.loss_itc"])
    close(out.itm.cpu(), GOLDEN["train.loss_itm"])
    (out.itc + out.itm).backward()
    gradients = {official_name(name): p.grad.cpu() for name, p in official.named_parameters() if p.requires_grad}
    assert {f"train.grad_norm.{name}" for name in gradients} == {name for name in GOLDEN if name.startswith("train.grad_norm.")}
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(GOLDEN[f"train.grad_norm.{name}"].item(), rel=1e-5, abs=1e-6), name
    for name in (name.removeprefix("train.grad.") for name in GOLDEN if name.startswith("train.grad.")):
        close(gradients[name], GOLDEN[f"train.grad.{name}"], 1e-5 * GOLDEN[f"train.grad_norm.{name}"].item())


def test_queue_identities_pointer_and_momentum_weights_after_a_step_are_the_official_ones(official):
    out = official_step(official.train(), "train", GOLDEN["train.alpha"], GOLDEN["train.pair_ids"])
    official.enqueue(out.image_keys, out.text_keys, out.identity)
    state = official_state(official)
    for name in (name for name in GOLDEN if name.startswith("after_step.")):
        close(state[name.removeprefix("after_step.")], GOLDEN[name], 1e-6)


@pytest.mark.parametrize("path", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_ten_official_steps_with_a_queue_that_wraps_come_out_the_same(official, path):
    official.to(path)
    trained = [p for p in official.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    for i in range(10):
        out = official_step(official, "run", GOLDEN["run.alpha"][i], torch.tensor([2 * i, 2 * i + 1]), i, path)
        close(out.itc.cpu(), GOLDEN["run.loss_itc"][i])
        close(out.itm.cpu(), GOLDEN["run.loss_itm"][i])
        optimizer.zero_grad()
        (out.itc + out.itm).backward()
        official.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizer.step()
        official.clamp_temperature()
    state = official_state(official.cpu())
    for name in (name for name in GOLDEN if name.startswith("run.final.")):
        close(state[name.removeprefix("run.final.")], GOLDEN[name])


def test_probabilities_of_negatives_and_the_loss_of_the_likeliest_are_the_official_ones(official):
    identity, captions = GOLDEN["hard.pair_ids"], golden_captions("hard")
    image_tokens, image_features = official.encode_image(GOLDEN["hard.images"])
    similarity = official.encode_text(captions) @ image_features.T
    image_of_text = losses.negative_probabilities(similarity, identity, official.temperature)
    text_of_image = losses.negative_probabilities(similarity.T, identity, official.temperature)
    close(image_of_text, GOLDEN["hard.probability_image_of_text"])
    close(text_of_image, GOLDEN["hard.probability_text_of_image"])
    assert torch.equal(image_of_text.argmax(1), GOLDEN["hard.negative_image_of_text"])
    assert torch.equal(text_of_image.argmax(1), GOLDEN["hard.negative_text_of_image"])
    close(official.matching(image_tokens, captions, image_of_text.argmax(1), text_of_image.argmax(1)), GOLDEN["hard.loss_itm"])


@pytest.mark.parametrize("k, suffix", [(3, "_k"), (256, "")])
def test_reranked_scores_are_the_official_ones_when_read_from_cls_as_there(official, monkeypatch, k, suffix):
    official.eval()
    monkeypatch.setattr(Captions, "starting_with", lambda captions, token: captions)
    captions = golden_captions("eval")
    image_tokens, image_features = official.encode_image(GOLDEN["eval.images"])
    scores = rerank(official, image_tokens, captions, (image_features @ official.encode_text(captions).T).detach(), k)
    for found, name in zip(scores, ("i2t", "t2i")):
        close(torch.where(found < -50, -100, found), GOLDEN[f"eval.score_{name}{suffix}"])
    if not suffix:
        assert losses.retrieval_metrics(*scores, torch.arange(8)) == pytest.approx(json.loads(str(RECORDED["retrieval_metrics"])))


def test_what_is_not_reranked_keeps_the_order_of_its_cosine(official):
    official.eval()
    captions = golden_captions("eval")
    image_tokens, image_features = official.encode_image(GOLDEN["eval.images"])
    similarity = (image_features @ official.encode_text(captions).T).detach()
    image_to_text, text_to_image = rerank(official, image_tokens, captions, similarity, k=3)
    for scores, cosine in ((image_to_text, similarity), (text_to_image, similarity.T)):
        assert ((scores > -50).sum(1) == 3).all()
        for row, by_cosine in zip(scores, cosine):
            assert row.argsort(descending=True)[3:].tolist() == by_cosine.argsort(descending=True)[3:].tolist()


def test_base_has_the_papers_223453187_parameters_and_all_1049_official_names_load_and_save_back(tmp_path):
    shapes = json.loads(str(RECORDED["base_shapes"]))
    with torch.device("meta"):
        model = FLIP(FLIPConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 223_453_187
    torch.save({"model": {name: torch.zeros(shape, dtype=torch.int64 if name.endswith(("_ids", "idx_queue", "ptr_queue")) else torch.float32)
                          for name, shape in shapes.items()}}, tmp_path / "FLIP-base.pth")
    loaded = FLIP.from_pretrained(tmp_path / "FLIP-base.pth")
    assert loaded.config == dataclasses.replace(FLIPConfig())
    saved = official_state(loaded)
    assert len(saved) == 1049 and {name: list(tensor.shape) for name, tensor in saved.items()} == shapes


def test_the_large_model_has_the_large_vits_own_configuration():
    image_config, _, _ = train.MODELS["large"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ViT(image_config).parameters())
    assert (image_config.width, image_config.depth, image_config.heads) == (1024, 24, 16)
    # torchvision's vit_l_16 without its classifier has 303,301,632; CLIP has a LayerNorm more and no patch bias
    assert parameters == 303_301_632 + 2 * 1024 - 1024


# ---- flip.py: state ------------------------------------------------------------------------------------------------
def small_flip(queue_size=8, dropout=0.0):
    torch.manual_seed(0)
    return FLIP(dataclasses.replace(GOLDEN_CONFIG, queue_size=queue_size, bert=dataclasses.replace(GOLDEN_CONFIG.bert, dropout=dropout)))


def test_a_batch_that_does_not_fit_before_the_end_of_the_queue_wraps():
    model = small_flip(queue_size=5)
    for first in (0, 3, 6):
        ids = torch.arange(first, first + 3)
        model.enqueue(ids[:, None].expand(3, 12).float(), -ids[:, None].expand(3, 12).float(), ids)
    assert model.queue_identity.tolist() == [5, 6, 7, 8, 4] and model.queue_pointer.item() == 4
    assert model.image_queue[:, 0].tolist() == [5, 6, 7, 8, 4] and model.text_queue[:, 3].tolist() == [-5, -6, -7, -8, -4]


def test_the_loss_over_a_queue_that_has_wrapped_is_the_direct_one(path):
    model = small_flip(queue_size=5).to(path).eval()
    for first in (0, 3):
        torch.manual_seed(first)
        model.enqueue(unit(3, 12).to(path), unit(3, 12).to(path), torch.arange(first, first + 3).to(path))
    identity, captions = torch.tensor([4, 5, 9, 9, 7, 8, 6, 1], device=path), golden_captions("eval").to(path)
    images = GOLDEN["eval.images"].to(path)
    out = model(images, captions, identity, alpha=0.4, with_itm=False)
    sides = ((model.encode_image(images)[1], out.image_keys, out.text_keys, model.text_queue),
             (model.encode_text(captions), out.text_keys, out.image_keys, model.image_queue))
    direct = [contrastive_file.reference(feature, momentum, torch.cat([keys, queue]), identity, torch.cat([identity, model.queue_identity]),
                                         model.temperature, 0.4) for feature, momentum, keys, queue in sides]
    close(out.itc, (sum(direct) / 2).detach())


def test_forward_changes_nothing_and_the_temperature_is_clamped_by_the_loop(official):
    before = {name: tensor.clone() for name, tensor in official.state_dict().items()}
    mode = official.training
    official(GOLDEN["train.images"], golden_captions("train"), GOLDEN["train.pair_ids"])
    assert official.training == mode and all(torch.equal(before[name], tensor) for name, tensor in official.state_dict().items())
    for value, expected in ((-1.0, 0.001), (0.07, 0.07), (3.0, 0.5)):
        official.temperature.data.fill_(value)
        official.clamp_temperature()
        assert official.temperature.item() == pytest.approx(expected)


def losses_and_gradients(model, compiled=None, dropout_seed=0):
    """Of ITC and of judging three pairs, for three faces; `compiled` names a backend of torch.compile."""
    captions, identity = model.tokenizer(["she is young", "a hat", "lipstick and a hat on"]), torch.arange(3)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def losses_of(images, captions, identity, image_of):
        tokens, _ = model.encode_image(images)
        return model(images, captions, identity, with_itm=False).itc + model.match(tokens, captions, image_of).square().sum()
    run = torch.compile(losses_of, fullgraph=True, backend=compiled) if compiled else losses_of
    torch.manual_seed(dropout_seed)
    loss = run(images, captions, identity, torch.tensor([1, 0, 1]))
    return loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("compiled, dropout", [
    ("aot_eager", 0.0), ("aot_eager", 0.1), pytest.param("inductor", 0.0, marks=pytest.mark.slow)])
def test_the_tiny_model_compiles_into_one_graph_forward_and_backward(compiled, dropout):
    torch._dynamo.reset()
    tokenizer, (vit_config, bert_config, embed_dim) = Tokenizer.train(["she is young with a hat and lipstick on"]), train.TINY
    bert_config = dataclasses.replace(bert_config, vocab_size=tokenizer.vocab_size, dropout=dropout)
    torch.manual_seed(0)
    model = FLIP(FLIPConfig(vit_config, bert_config, embed_dim, queue_size=64), tokenizer).train()
    for found, expected in zip(losses_and_gradients(model, compiled), losses_and_gradients(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-8)


def test_negatives_are_drawn_with_their_probabilities():
    model, generator = small_flip(), torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    images, texts, identity = unit(4, 12), unit(4, 12), torch.tensor([1, 2, 1, 3])
    model.temperature.data.fill_(0.5)
    draws = [model.draw_negatives(images, texts, identity, 1.0, generator) for _ in range(3000)]
    for side, similarity in ((0, texts @ images.T), (1, images @ texts.T)):
        found = torch.stack([F.one_hot(draw[side], 4) for draw in draws]).double().mean(0)
        close(found.float(), losses.negative_probabilities(similarity, identity, 0.5), 0.03)


def test_our_checkpoint_brings_model_configuration_and_vocabulary(tmp_path):
    model = small_flip()
    model.use(golden_tokenizer(tmp_path))
    flip_module.write_whole(model.checkpoint(), tmp_path / "flip.pt")
    loaded = FLIP.from_pretrained(tmp_path / "flip.pt")
    assert loaded.config == model.config and loaded.tokenizer.to_json() == model.tokenizer.to_json()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    flip_module.write_whole({"model": 1}, tmp_path / "flip.pt")
    with pytest.raises(Exception):
        flip_module.write_whole({"model": lambda: None}, tmp_path / "flip.pt")      # cannot be pickled
    assert torch.load(tmp_path / "flip.pt") == {"model": 1}


def random_faces(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([toyfaces.sample_attributes(rng) for _ in range(count)])


def with_true(*names):
    return np.isin(ATTRIBUTES, names)


# ---- toyfaces.py: sketches ------------------------------------------------------------------------------------------
def test_a_sketch_grows_from_a_seventieth_of_its_ink_and_never_loses_any():
    for i in range(20):
        frames = toyfaces.sketch(i, seed=3, size=48)
        assert frames.shape == (70, 48, 48) and frames.dtype == np.uint8
        assert (frames[1:] >= frames[:-1]).all()
        ink = frames.sum((1, 2)) / frames[-1].sum()
        assert 0.5 / 70 < ink[0] < 2.5 / 70                         # a short line has its round ends, a long one crosses others
        assert np.abs(ink - np.arange(1, 71) / 70).max() < 0.15


def test_a_sketch_is_the_same_every_time_and_cut_more_finely_shows_the_same_stages():
    for i in range(5):
        frames = toyfaces.sketch(i, seed=1, size=64)
        assert (toyfaces.sketch(i, seed=1, size=64) == frames).all()
        assert (toyfaces.sketch(i, seed=1, size=64, steps=140)[1::2] == frames).all()


def test_a_sketch_is_the_same_drawing_at_every_size():
    for i in range(5):
        small, large = (toyfaces.sketch(i, size=size)[-1].astype(float) for size in (56, 224))
        shrunk = large.reshape(56, 4, 56, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.95


def test_finished_sketches_tell_people_apart():
    sketches = np.stack([toyfaces.sketch(i, size=48)[-1] for i in range(60)]).reshape(60, -1)
    correlation = np.corrcoef(sketches) - np.eye(60)
    assert correlation.max() < 0.85


def test_the_ink_of_a_sketch_lies_on_the_edges_of_its_picture_and_not_of_another():
    def edges(i):
        """(96, 96) bool: some colour differs within one pixel."""
        picture = np.asarray(toyfaces.face(i, seed=2, size=96)[0]).astype(int)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge"), (3, 3), (0, 1))
        return np.ptp(windows, axis=(-2, -1)).max(-1) > 12

    sharp = [i for i in range(40) if not toyfaces.face(i, 2, 8)[1][ATTRIBUTES.index("Blurry")]]
    inked = [toyfaces.sketch(i, seed=2, size=96, steps=1)[0] > 128 for i in sharp]
    own = [edges(i)[ink].mean() for i, ink in zip(sharp, inked)]
    others = [edges(i)[ink].mean() for i, ink in zip(sharp[1:], inked)]
    assert min(own) > 0.9 and np.mean(own) > 0.97 and np.mean(others) < 0.65


def test_what_is_drawn_later_changes_nothing_that_was_drawn_before():
    """The same people with glasses: their lines come in one block, all else stays as it was."""
    for i in range(10):
        attributes = toyfaces.sample_attributes(np.random.default_rng(i))
        paths = []
        for attributes[ATTRIBUTES.index("Eyeglasses")] in (False, True):
            paths.append(toyfaces.pen_path(*toyfaces.describe(attributes, np.random.default_rng(i)))[0])
        without, with_glasses = paths
        first = np.flatnonzero((without != with_glasses[:len(without)]).any(1))
        first = first[0] if len(first) else len(without)
        assert first > len(without) / 3
        assert (with_glasses[len(with_glasses) - len(without) + first:] == without[first:]).all()


def test_every_part_of_a_portrait_is_drawn_by_some_face():
    parts = set()
    for i in range(300):
        rng = np.random.default_rng(i)
        parts |= {shape.part for shape in toyfaces.describe(toyfaces.sample_attributes(rng), rng)[1]}
    assert set(toyfaces.TURN) <= parts
    assert parts - set(toyfaces.TURN) == {"shade", "shine", "cheek", "makeup", "iris", "glint", "lid", "teeth"}


# ---- data.py: the caption grammar ------------------------------------------------------------------------------------------
def facts_read_back(text):
    """The facts a reader finds in a text, by looking for every phrase of the grammar's table."""
    text, found = text.lower(), set()
    for fact, phrases in zip(FACTS, data.PHRASES):
        for kind, words in phrases:
            pattern = re.escape(words.lower()).replace(r"\{his\}", "(his|her|their)")
            if kind in data.PARTS:      # "a big, pointy nose" or "her nose is pointy and big"
                others = "|".join(re.escape(w) for p in data.PHRASES for k, w in p if k == kind)
                pattern = rf"\b{pattern}(, ({others}))* {kind}\b|\b(his|her|their) {kind} (is|are) (({others}) and )*{pattern}\b"
            if re.search(rf"\b({pattern})\b", text):
                found.add(fact)
    for fact, pronouns in (("Male", "he|his"), ("not Male", "she|her")):
        if re.search(rf"\b({pronouns})\b", text):
            found.add(fact)
    return found


def test_a_caption_says_what_it_reports_and_nothing_else():
    rng = np.random.default_rng(1)
    for attributes in random_faces(3000):
        text, stated = data.caption(attributes, rng)
        assert facts_read_back(text) == {FACTS[i] for i in np.flatnonzero(data.facts_said(stated))}, text
        assert data.consistent(stated[None], attributes[None]).all()
        if stated[ATTRIBUTES.index("Male")] == 0:
            assert re.search(r"\b(person|individual|they|their)\b", text.lower()) or "photo" in text or "picture" in text


def test_every_phrase_of_the_grammar_reads_back_alone():
    class Choose:       # dice that prefer one phrase of the table and else take the first
        def __init__(self, phrase, clause): self.phrase, self.clause = phrase, clause
        def choice(self, options): return self.phrase if self.phrase in options else options[0]
        def random(self): return 0.0 if self.clause else 0.99
        def randrange(self, *_): return 0
        def sample(self, items, n): return list(items)
        def shuffle(self, items): pass
    for fact, phrases in enumerate(data.PHRASES):
        for phrase, clause in itertools.product(phrases, (False, True)):
            text = data.write([fact], Choose(phrase, clause))
            assert facts_read_back(text) == {FACTS[fact]}, text


def test_captions_have_the_lengths_and_the_variety_of_flips():
    rng = np.random.default_rng(2)
    words = [data.caption(attributes, rng)[0].split() for attributes in random_faces(5000)]
    lengths = np.array([len(text) for text in words])
    assert lengths.min() >= 10 and lengths.max() <= 75 and 26 < lengths.mean() < 32
    assert 20 <= np.bincount(lengths // 3 * 3).argmax() + 1 <= 27
    assert len({gram for text in words for gram in zip(text, text[1:], text[2:], text[3:])}) > 25_000


def test_a_face_that_has_every_attribute_still_gets_its_caption():
    text, stated = data.caption(np.ones(40, dtype=bool), np.random.default_rng(0))
    assert (stated >= 0).all() and len(text.split()) >= 10


@pytest.mark.parametrize("names", [("Male", "Young"), ("Male", "Smiling", "Bald"), ("Bangs", "Blond_Hair", "Young")])
def test_log_likelihood_is_what_simulation_finds(names):
    """Over all sets a face's captions can state: the probabilities add to 1 and agree with 20,000 captions drawn."""
    attributes, draws, rng = with_true(*names), 20_000, np.random.default_rng(0)
    seen = Counter(data.caption(attributes, rng)[1].tobytes() for _ in range(draws))
    stated = np.array([np.frombuffer(key, dtype=np.int8) for key in seen])
    expected = np.exp(data.log_likelihood(stated, attributes[None]))[:, 0]
    observed = np.array(list(seen.values())) / draws
    assert abs(expected.sum() - 1) < 1e-3
    assert (abs(observed - expected) < 4.5 * np.sqrt(expected / draws)).all()


def test_log_likelihood_rules_out_faces_that_contradict_the_caption():
    faces = random_faces(300)
    stated = np.stack([data.caption(attributes, np.random.default_rng(0))[1] for attributes in faces])
    assert (np.isfinite(data.log_likelihood(stated, faces)) == data.consistent(stated, faces)).all()
    for t, n in np.random.default_rng(1).integers(300, size=(500, 2)):      # the definition, one fact at a time
        fits = all(s == 0 or (s > 0) == a for s, a in zip(stated[t], faces[n]))
        assert data.consistent(stated[t:t + 1], faces[n:n + 1])[0, 0] == fits


def test_recall_shares_ties_by_chance():
    scores = np.array([[0., 0, 0, 0], [2, 1, 1, 0], [3, 2, 1, 3], [0, 0, 0, 1]])
    recall = data.expected_recall(scores, k=(1, 2, 3))
    assert recall == pytest.approx({1: (1/4 + 0 + 0 + 1) / 4, 2: (2/4 + 1/2 + 0 + 1) / 4, 3: (3/4 + 1 + 0 + 1) / 4})


def test_references_on_captions_worked_by_hand():
    """Two men, one of them bald. 'A bald young man' fits one face, 'a young man' fits both, unsaid baldness hints."""
    attributes = np.stack([with_true("Male", "Young", "Bald"), with_true("Male", "Young")])
    stated = attributes.astype(np.int8)
    references = data.reference_recalls(stated, attributes, k=(1,))
    assert references["consistency"]["text_to_image"][1] == pytest.approx((1 + 1 / 2) / 2)
    assert references["consistency"]["image_to_text"][1] == pytest.approx((1 / 2 + 1) / 2)
    assert references["ceiling"]["text_to_image"][1] == 1 and references["ceiling"]["image_to_text"][1] == 1


def test_drawn_captions_are_as_hard_as_planned():
    faces, rng = random_faces(1000), np.random.default_rng(0)
    stated = np.stack([data.caption(attributes, rng)[1] for attributes in faces])
    references = data.reference_recalls(stated, faces)
    for direction in ("text_to_image", "image_to_text"):
        assert all(references["ceiling"][direction][k] > references["consistency"][direction][k] for k in (1, 5, 10))
    assert 0.6 < references["consistency"]["text_to_image"][5] < 0.8


# ---- data.py: readers ------------------------------------------------------------------------------------------------------
def write_celeba(folder, kaggle=False, count=6):
    images = folder / "img_align_celeba" / ("img_align_celeba" if kaggle else ".")
    images.mkdir(parents=True)
    attributes, names = random_faces(count), [f"{i + 1:06d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 90, 60)).save(images / name)
    rows = [[name, *np.where(row, "1", "-1")] for name, row in zip(names, attributes)]
    parts = [[name, "0" if i < count - 2 else str(i - count + 3)] for i, name in enumerate(names)]
    if kaggle:
        rows, parts = [["image_id", *ATTRIBUTES], *rows], [["image_id", "partition"], *parts]
        (folder / "list_attr_celeba.csv").write_text("\n".join(",".join(f'"{field}"' for field in row) for row in rows))
        (folder / "list_eval_partition.csv").write_text("\n".join(",".join(row) for row in parts))
    else:
        lines = [f"{count}", " ".join(ATTRIBUTES) + " ", *("  ".join(row) for row in rows)]
        (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        (folder / "list_eval_partition.txt").write_text("\n".join(" ".join(row) for row in parts) + "\n")
    return attributes


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba_is_read_in_its_own_and_in_kaggles_layout(tmp_path, kaggle):
    attributes = write_celeba(tmp_path, kaggle)
    train, val, test = (data.open_faces(tmp_path, split) for split in ("train", "val", "test"))
    assert (train.attributes == attributes[:4]).all() and (test.attributes == attributes[5:]).all()
    assert [len(faces) for faces in (train, val, test)] == [4, 1, 1]
    assert val.picture(0).size == (178, 218) and val.pictures[0].name == "000005.jpg"
    assert val.caption(0, np.random.default_rng(0)) == data.caption(attributes[4], np.random.default_rng(0))[0]


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("spoil, sentence", [
    (lambda d: edit(d / "list_attr_celeba.txt", "000005.jpg  1", "000005.jpg") or edit(d / "list_attr_celeba.txt", "000005.jpg  -1", "000005.jpg"),
     "CelebA: list_attr_celeba.txt line 7 has 39 values, expected 40 (000005.jpg)"),
    (lambda d: edit(d / "list_attr_celeba.txt", "000002.jpg  -1", "000002.jpg  2"), "line 4 has the value '2', expected 1, 0 or -1 (000002.jpg)"),
    (lambda d: edit(d / "list_attr_celeba.txt", "Bald", "Bold"), "line 2 should name the 40 attributes"),
    (lambda d: edit(d / "list_eval_partition.txt", "000003.jpg 0", "000003.jpg 7"), "list_eval_partition.txt line 3 is '000003.jpg 7'"),
    (lambda d: (d / "list_eval_partition.txt").write_text("000009.jpg 0\n"), "line 1 names 000009.jpg, which list_attr_celeba does not have"),
    (lambda d: (d / "list_eval_partition.txt").write_text("000001.jpg 1\n"), "CelebA train: no faces"),
    (lambda d: (d / "list_eval_partition.txt").write_text("000001.jpg 0\n000001.jpg 2\n"), "line 2 lists 000001.jpg a second time"),
    (lambda d: (d / "list_eval_partition.txt").unlink(), "list_eval_partition.txt (or .csv) is not in"),
    (lambda d: (d / "img_align_celeba/000004.jpg").unlink(), "CelebA train: 1 of 4 pictures are not there, the first is"),
])
def test_a_faulty_celeba_is_refused_with_one_sentence(tmp_path, spoil, sentence):
    write_celeba(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.open_faces(tmp_path, "train")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def write_captions(folder, records=None, name="train.json"):
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (50, 60), (60 * i, 90, 60)).save(folder / "images" / f"{i}.png")
    records = records or [{"image": f"{i}.png", "image_id": "ab"[i // 2], "caption": [f"face {i}", f"the face {i}"]} for i in range(4)]
    (folder / name).write_text(records if isinstance(records, str) else json.dumps(records))
    return folder


def test_a_caption_list_is_read_with_its_identities(tmp_path):
    faces = data.open_faces(write_captions(tmp_path), "train")
    assert len(set(faces.identity[:2])) == len(set(faces.identity[2:])) == 1 and faces.identity[0] != faces.identity[2]
    assert faces.captions[3] == ["face 3", "the face 3"]
    assert {faces.caption(1, np.random.default_rng(s)) for s in range(20)} == {"face 1", "the face 1"}
    assert faces.subset([3, 1]).captions == [faces.captions[3], faces.captions[1]]


def test_one_caption_list_is_split_so_that_a_person_is_in_one_part(tmp_path):
    write_captions(tmp_path, [{"image": f"{i % 4}.png", "image_id": i // 2, "caption": "a face"} for i in range(800)], "all.json")
    parts = [set(data.open_faces(tmp_path, split).identity.tolist()) for split in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 400 and len(parts[0]) > 330


@pytest.mark.parametrize("records, sentence", [
    ('[{"image": "0.png",\n "caption" "a face"}]', "train.json: not valid json: Expecting ':' delimiter: line 2 column 12"),
    ('{"image": "0.png"}', "train.json: expected a list of records, found a dict"),
    ([{"caption": "a face"}], 'record 0 (counted from 0) has no "image" with a path'),
    ([{"image": "0.png"}], 'record 0 (counted from 0) has no "caption" that is a text or a list of texts (0.png)'),
    ([{"image": "0.png", "caption": ["a face", " . !"]}], "0.png has an empty caption"),
    ([{"image": "7.png", "caption": "a face"}], "1 of 1 pictures are not there"),
    ([{"image": "0.png", "image_id": "\ud800", "caption": "half a character: \ud800"}], "0.png has a caption that is no text"),
    ("[]", "train.json: no faces"),
])
def test_a_faulty_caption_list_is_refused_with_one_sentence(tmp_path, records, sentence):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.open_faces(write_captions(tmp_path, records), "train")
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_folder_is_told_what_layouts_are_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.open_faces(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="found neither CelebA"):
        data.open_faces(tmp_path, "train")
    (tmp_path / "faces.parquet").touch()
    with pytest.raises(ValueError, match="faces.parquet: expected a folder or a json list, found another file; FaceCaption-15M's holds .* addresses"):
        data.open_faces(tmp_path / "faces.parquet", "train")
    write_captions(tmp_path, [{"image": "0.png", "image_id": 0, "caption": "a face"}], "all.json")      # a list too short to split
    assert error_of(data.open_faces, tmp_path, "val") == "all.json (val): no faces, expected at least one in this part"


def spoil_pictures(folder):
    """Cut the JPEG of face 1 short, make face 2 a text file."""
    write_celeba(folder)
    images = folder / "img_align_celeba"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (218, 178, 3), dtype=np.uint8)).save(images / "000002.jpg")
    (images / "000002.jpg").write_bytes((images / "000002.jpg").read_bytes()[:9000])
    (images / "000003.jpg").write_text("not a picture")
    (images / "000004.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")     # Pillow would start Ghostscript
    return data.celeba(folder, "train")


def test_a_damaged_picture_is_named(tmp_path):
    faces = spoil_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"^CelebA train, record 1: .*000002.jpg cannot be read completely: image file is truncated"):
        faces.picture(1)
    with pytest.raises(ValueError, match=r"record 2: .*000003.jpg is not a picture$"):
        faces.picture(2)
    with pytest.raises(ValueError, match=r"000004.jpg is not a picture\n3 of 4 pictures are bad"):
        data.check_pictures(faces)


def test_drawn_faces_are_kept_and_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    faces = data.drawn_faces(5, 24, 3, tmp_path)
    image, attributes = toyfaces.face(4, 3, 24)
    assert (faces.pictures[4] == np.asarray(image)).all() and (faces.attributes[4] == attributes).all()
    monkeypatch.setattr(toyfaces, "face", lambda *_: pytest.fail("drawn again"))
    assert (data.drawn_faces(5, 24, 3, tmp_path).pictures == faces.pictures).all()

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.drawn_faces(6, 24, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# ---- data.py: more readers -------------------------------------------------------------------------------------------------
def write_pictures(folder, names, size=(8, 8)):
    """Small pictures of different greys."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i % 256,) * 3).save(folder / name)
    return folder


def parts_of(folder):
    return [data.open_faces(folder, split) for split in ("train", "val", "test")]


def names_in(faces):
    return [path.stem for path in faces.pictures]


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))


def write_mm_celeba(folder, numbers=(*range(2, 42), 24000, 24001), pickles=False):
    write_pictures(folder / "images", [f"{n}.jpg" for n in numbers])
    (folder / "text/celeba-caption").mkdir(parents=True)
    for n in numbers:
        (folder / f"text/celeba-caption/{n}.txt").write_text(f"face {n}.\n\n  the face {n}.  \n")
    if pickles:
        write_pickle(folder / "train/filenames.pickle", ["2", "10.jpg", b"3", 4])
        write_pickle(folder / "test/filenames.pickle", ["5"])
    return folder


def test_mm_celeba_is_split_by_number_or_by_its_pickled_lists_and_val_comes_off_the_training_part(tmp_path):
    train, val, test = parts_of(write_mm_celeba(tmp_path / "a"))
    assert names_in(train) == [str(n) for n in range(2, 40)] and names_in(val) == ["40", "41"] and names_in(test) == ["24000", "24001"]
    assert train.captions[8] == ["face 10.", "the face 10."]
    train, val, test = parts_of(write_mm_celeba(tmp_path / "b", pickles=True))
    assert names_in(train) == ["2", "3", "4"] and names_in(val) == ["10"] and names_in(test) == ["5"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious-pickle-ran",)


@pytest.mark.parametrize("spoil, sentence", [
    (lambda d: write_pickle(d / "train/filenames.pickle", ["2", Malicious()]), "not a plain pickled list of names (it asks to run posix.mkdir)"),
    (lambda d: write_pickle(d / "train/filenames.pickle", b"nonsense"), "train/filenames.pickle: not a plain pickled list"),
    (lambda d: write_pickle(d / "train/filenames.pickle", ["2", ["2"]]), "record 1 (counted from 0) is a list, expected a name"),
    (lambda d: write_pickle(d / "train/filenames.pickle", {"2": 1}), "expected a pickled list of names, found a dict"),
    (lambda d: write_pickle(d / "train/filenames.pickle", ["2", "face"]), "record 1 (counted from 0) is 'face', expected a number such as"),
    (lambda d: write_pickle(d / "test/filenames.pickle", ["2.jpg"]), "1 faces are listed more than once, in one part or in both; the first is 2"),
    (lambda d: write_pickle(d / "test/filenames.pickle", ["7", "7.jpg"]), "1 faces are listed more than once"),
    (lambda d: (d / "text/celeba-caption/3.txt").write_text("binary \0 data"), "3.jpg has a caption that is no text"),
    (lambda d: (d / "test/filenames.pickle").unlink(), "test/filenames.pickle is not there, only the other part's"),
    (lambda d: (d / "text/celeba-caption/3.txt").unlink(), "3.txt is not there, expected its face's captions, one a line"),
    (lambda d: (d / "text/celeba-caption/3.txt").write_text("\n"), "3.jpg has an empty caption: []"),
    (lambda d: (d / "images/2.jpg").unlink(), "MM-CelebA-HQ train: 1 of 3 pictures are not there"),
])
def test_a_faulty_mm_celeba_is_refused_with_one_sentence_and_its_pickles_run_nothing(tmp_path, monkeypatch, spoil, sentence):
    monkeypatch.chdir(tmp_path)
    spoil(write_mm_celeba(tmp_path, pickles=True))
    error = error_of(data.open_faces, tmp_path, "train")
    assert sentence in error and "\n" not in error and not (tmp_path / "malicious-pickle-ran").exists()


def dialog(overall, **parts):
    return {"overall_caption": overall, "attribute_wise_captions": parts}


@pytest.mark.parametrize("images", ["images", "image", "."])
def test_celeba_dialog_is_read_without_the_picture_that_never_was(tmp_path, images):
    numbers = [*range(39), 24000]
    write_pictures(tmp_path / images, [f"{n}.jpg" for n in numbers])
    records = {f"{n}.jpg": dialog(f"face {n}") for n in [5380, *numbers]} | {"1.jpg": dialog(" ", Bangs="Short bangs.", Young="", Smiling="No smile.")}
    (tmp_path / "captions_hq.json").write_text(json.dumps(records))
    train, val, test = parts_of(tmp_path)
    assert [len(train), names_in(val), names_in(test)] == [37, ["37", "38"], ["24000"]]
    assert train.captions[:2] == [["face 0"], ["Short bangs.  No smile."]] and test.picture(0).size == (8, 8)


@pytest.mark.parametrize("records, sentence", [
    ([], "captions_hq.json: expected records by name, found a list"),
    ({"0.jpg": dialog("", Bangs="")}, "record '0.jpg' has neither \"overall_caption\" nor \"attribute_wise_captions\" with text"),
    ({"0.jpg": "text"}, "record '0.jpg' has neither"),
    ({"a.jpg": dialog("face")}, "record 'a.jpg': expected a name such as '0.jpg'"),
    ({f"{n}.jpg": dialog("face") for n in range(3)}, "CelebA-Dialog train: 1 of 2 pictures are not there, the first is"),
])
def test_a_faulty_celeba_dialog_is_refused_with_one_sentence(tmp_path, records, sentence):
    write_pictures(tmp_path / "images", ["0.jpg"])
    (tmp_path / "captions_hq.json").write_text(json.dumps(records))
    assert sentence in error_of(data.open_faces, tmp_path, "train")


MIXED = [ATTRIBUTES[i] for i in np.random.default_rng(5).permutation(40)]         # an order that is not CelebA's


def lfwa_faces(persons=30):
    """(names with backslashes, labels bool (N, 40) in CelebA's order): two pictures of each person."""
    names = [f"P_{n // 2}\\P_{n // 2}_{n % 2 + 1:04d}.jpg" for n in range(2 * persons)]
    return names, random_faces(len(names))


def in_mixed_order(labels, false):
    return np.where(labels[:, [ATTRIBUTES.index(name) for name in MIXED]], 1, false)


def write_lfwa_lists(folder, below="lfw"):
    """The training list holds all pictures, the test's too, as the official one may."""
    names, labels = lfwa_faces()
    write_pictures(folder / below, [name.replace("\\", "/") for name in names])
    lines = [f"{name},{','.join(map(str, row))}" for name, row in zip(names, in_mixed_order(labels, 0))]
    header = ",".join(["path", *(name.replace("_", " ").lower() for name in MIXED)])
    (folder / "list_attr_lfwa.csv").write_text("\n".join([header, *lines]))
    (folder / "list_attr_lfwa_test.csv").write_text("\n".join([header, *lines[40:]]))
    return labels


def write_lfwa_matlab(folder, transposed=False, **changes):
    h5py = pytest.importorskip("h5py")
    names, labels = lfwa_faces()
    write_pictures(folder / "lfw", [name.replace("\\", "/") for name in names])
    matrix = in_mixed_order(labels, -1).astype(float)
    matrix[matrix < 0] = np.random.default_rng(0).integers(-1, 1, (matrix < 0).sum())       # -1 and 0 mixed
    contents = {"name": names, "AttrName": [name.replace("_", " ") for name in MIXED], "label": matrix,
                "indices_img_train": np.arange(1, 41), "indices_img_test": np.arange(41, 61), "indices_identity_train": [1], **changes}
    for path, variables in (("lfw_att_40.mat", ("name", "AttrName", "label")),
                            ("indices_train_test.mat", ("indices_identity_train", "indices_img_train", "indices_img_test"))):
        with h5py.File(folder / path, "w") as file:
            for variable in variables:
                value = contents[variable]
                if isinstance(value, list) and value and isinstance(value[0], str):
                    texts = [file.create_dataset(f"#refs#/{variable}{i}", data=np.array([[ord(c)] for c in text], np.uint16))
                             for i, text in enumerate(value)]
                    file.create_dataset(variable, data=[[text.ref] for text in texts], dtype=h5py.ref_dtype)
                elif value is not None:
                    file[variable] = value if transposed else np.atleast_2d(value).T      # HDF5 has MATLAB's axes reversed
    return labels


@pytest.mark.parametrize("write", [
    write_lfwa_lists, lambda d: write_lfwa_lists(d, "."), write_lfwa_matlab, lambda d: write_lfwa_matlab(d, transposed=True)])
def test_lfwa_is_read_from_lists_and_from_matlab_with_its_test_part_apart_and_no_person_in_both_others(tmp_path, write):
    labels = dict(zip([name.replace("\\", "/") for name in lfwa_faces()[0]], write(tmp_path)))
    train, val, test = parts_of(tmp_path)
    assert len(train) + len(val) == 40 and len(test) == 20 and len(val) > 0
    assert not set(train.identity) & set(val.identity) and len(set(test.identity)) == 10
    for faces in (train, val, test):
        for path, row in zip(faces.pictures, faces.attributes):
            assert (labels[f"{path.parent.name}/{path.name}"] == row).all()


def test_an_lfwa_list_alone_keeps_persons_for_the_test(tmp_path):
    write_lfwa_lists(tmp_path)
    (tmp_path / "list_attr_lfwa_test.csv").unlink()
    train, test = (set(data.open_faces(tmp_path, split).identity) for split in ("train", "test"))
    assert not train & test and len(test) > 8 and len(train) > 8


def lfwa_row(d, old, new):
    edit(d / "list_attr_lfwa.csv", old, new)


@pytest.mark.parametrize("write, spoil, sentence", [
    (write_lfwa_lists, lambda d: lfwa_row(d, "P_0\\P_0_0001.jpg,", "P_0\\P_0_0001.jpg,2"), "LFWA: list_attr_lfwa.csv line 2 has the value '2"),
    (write_lfwa_lists, lambda d: lfwa_row(d, "P_0\\P_0_0001.jpg,", "P_0\\P_0_0001.jpg,1,"), "line 2 has 41 values, expected 40 (P_0/P_0_0001.jpg)"),
    (write_lfwa_lists, lambda d: lfwa_row(d, "P_0_0002", "P_0_0001"), "line 3 lists P_0/P_0_0001.jpg a second time"),
    (write_lfwa_lists, lambda d: lfwa_row(d, "goatee", "goat"), "line 1 should name the 40 attributes of CelebA"),
    (lambda d: write_lfwa_matlab(d, label=np.full((60, 40), 2.0)), None, "lfw_att_40.mat row 1 (counted from 1) has the value '2', expected 1, 0 or -1"),
    (lambda d: write_lfwa_matlab(d, label=np.ones((60, 39))), None, "lfw_att_40.mat has labels of shape (60, 39), expected 60 names x 40"),
    (lambda d: write_lfwa_matlab(d, indices_img_train=np.arange(40)), None, "indices_img_train from 0 to 39, expected 1 to 60"),
    (lambda d: write_lfwa_matlab(d, indices_img_test=None), None, "indices_train_test.mat has no indices_img_test, only indices_identity_train, indices_img_train"),
    (write_lfwa_matlab, lambda d: (d / "indices_train_test.mat").unlink(), "LFWA: indices_train_test.mat is not in"),
    (write_lfwa_matlab, lambda d: (d / "lfw_att_40.mat").write_text("MATLAB 5.0"), "lfw_att_40.mat: not a complete MATLAB 7.3 file"),
])
def test_a_faulty_lfwa_is_refused_with_one_sentence(tmp_path, write, spoil, sentence):
    write(tmp_path)
    if spoil:
        spoil(tmp_path)
    error = error_of(data.open_faces, tmp_path, "train")
    assert sentence in error and "\n" not in error


def write_tar(folder, records=60, picture=True, text=None, **changes):
    """A tar of records, two faces at each address; what is given besides the number is of record 3."""
    pixels, members = io.BytesIO(), {}
    Image.fromarray(np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)).convert("RGB").save(pixels, "png")
    for i in range(records):
        record = {"status": "success", "caption": [f"face {i}", f"the face {i}"], "box": f"[0, {i % 4}, 30, 20]", "url": f"http://{i // 2}"}
        members |= {f"{i:09d}.jpg": pixels.getvalue(), f"{i:09d}.txt": b"x",
                    f"{i:09d}.json": json.dumps(record | (changes if i == 3 else {})).encode()}
    if not picture:
        del members["000000003.jpg"]
    if text:
        members["000000003.json"] = text
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "00000_stats.json").write_text("{}")          # img2dataset leaves one beside each tar
    return folder


def test_a_download_in_tars_is_read_in_place_cropped_and_split_by_address(tmp_path, monkeypatch):
    write_tar(tmp_path, 200, picture=False, status="failed_to_download")
    parts = parts_of(tmp_path)
    names = [name for faces in parts for name in (picture.name for picture in faces.pictures)]
    assert len(names) == len(set(names)) == 199 and "000000003.jpg" not in names
    addresses = [{int(texts[0].split()[1]) // 2 for texts in faces.captions} for faces in parts]
    assert len(set.union(*addresses)) == sum(map(len, addresses)) == 100
    i = next(i for i, texts in enumerate(parts[0].captions) if int(texts[0].split()[1]) % 4 == 2)
    assert (np.asarray(parts[0].picture(i))[..., 0] == np.add.outer(np.arange(2, 20), np.arange(30))).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.index", "00000.tar", "00000_stats.json"]
    batches = data.Batches(parts[0], TOKENIZER, 16, 4, workers=2)
    assert take(batches, 0, 2)[1].images.shape == (4, 3, 16, 16)
    with monkeypatch.context() as patch:
        patch.setattr(data, "list_tar", lambda tar: pytest.fail("listed again"))
        assert data.open_faces(tmp_path, "train").captions == parts[0].captions
    write_tar(tmp_path, 220)             # downloaded anew: the index is too
    assert sum(len(faces) for faces in parts_of(tmp_path)) == 220


@pytest.mark.parametrize("changes, sentence", [
    (dict(box=None), "000000003.json has the box None, expected [x1, y1, x2, y2] in pixels"),
    (dict(box="[1, 2, 3]"), "has the box '[1, 2, 3]'"), (dict(box=[0, 0, 1e999, 5]), "has the box [0, 0, inf, 5]"),
    (dict(box="[" * 100_000), "has the box '[[[["), (dict(text=b"[" * 100_000), "000000003.json is not valid json"),
    (dict(box="[9, 0, 9, 5]"), "has the box '[9, 0, 9, 5]', expected [x1, y1, x2, y2] in pixels, x1 < x2"),
    (dict(caption=None), "000000003.json has no \"caption\"; download again with the columns kept"),
    (dict(caption=[" ."]), "00000.tar: 000000003.jpg has an empty caption"),
    (dict(picture=False), "says \"success\", but its picture is not in the tar"),
    (dict(text=b"{"), "000000003.json is not valid json"),
    (dict(text=b"{}"), "000000003.json has no \"status\""),
])
def test_a_faulty_download_is_refused_with_one_sentence(tmp_path, changes, sentence):
    error = error_of(data.open_faces, write_tar(tmp_path, **changes), "train")
    assert sentence in error and "\n" not in error


def test_a_damaged_tar_picture_or_box_is_named_when_it_is_met(tmp_path):
    write_tar(tmp_path)
    crop = data.open_faces(tmp_path, "train").pictures[0]
    assert "is outside" in error_of(crop._replace(box=(50, 0, 60, 9)).open)
    assert crop._replace(box=(-9, -9, 99, 99)).open().size == (50, 40)
    assert error_of(crop._replace(offset=0).open) == f"{crop} is not a picture"
    whole = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        header = tar.getmembers()[20].offset                # one bad header, and the rest would be taken for the end
    for damaged in (whole[:3000], whole[:header] + b"x" * 512 + whole[header + 512:]):
        (tmp_path / "00000.tar").write_bytes(damaged)
        assert "00000.tar: not a complete tar" in error_of(data.open_faces, tmp_path, "train")
    (tmp_path / "00000.tar").write_bytes(whole.replace(b"face", b"dear"))      # of the same size
    assert "dear" in data.open_faces(tmp_path, "train").captions[0][0]


def write_fs2k(folder):
    """Photos that share their numbers between folders; sketches dark on paper."""
    names = [f"photo{p}/image01{n:02d}" for p in (1, 2, 3) for n in range(10)]
    write_pictures(folder / "photo", [f"{name}.{'png' if name < 'photo2' else 'jpg'}" for name in names])
    for name in names:
        path = folder / "sketch" / f"{name.replace('photo', 'sketch').replace('image', 'sketch')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(np.eye(8), 0, 255).astype(np.uint8)).save(path)
    for part, chosen in (("train", names[:20]), ("test", names[20:])):
        (folder / f"anno_{part}.json").write_text(json.dumps([{"image_name": name, "style": 0} for name in chosen[::-1]]))
    return folder


def test_fs2k_is_an_episode_of_one_step_without_text(tmp_path):
    train, val, test = (data.open_episodes(write_fs2k(tmp_path) if split == "train" else tmp_path, split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [18, 2, 10] and train.steps == 1
    assert [str(path.relative_to(tmp_path / "photo")) for path in (train.photos.pictures[3], val.photos.pictures[1])] == ["photo1/image0103.png", "photo2/image0109.jpg"]
    assert val.sketches[1][0].relative_to(tmp_path / "sketch").as_posix() == "sketch2/sketch0109.png"
    assert (np.asarray(test.sketch(0, 0)) == 255 * np.eye(8, dtype=np.uint8)[..., None]).all()        # white on black
    sentence = "FS2K train: expected captions, or attributes to write them from, found neither"
    assert error_of(train.photos.caption, 0, np.random.default_rng(0)) == error_of(data.Batches, train.photos, TOKENIZER, 8, 2) == sentence


def write_sde(folder, style="{photo}_{step}", photo="photo1/image01{n:02d}", steps=12, count=20):
    names = [photo.format(n=n) for n in range(count)]
    write_pictures(folder / "photo", [f"{name}.jpg" for name in names])
    for n, name in enumerate(names):
        flat = name.replace("/", "_")
        for step in range(1, steps + 1):
            path = folder / "sketch" / ("train" if n < 15 else "test") / f"{style.format(photo=flat, stem=flat[-9:], path=name, step=step)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), step).save(path)
    return folder


@pytest.mark.parametrize("style, photo", [
    ("{photo}_{step}", "photo1/image01{n:02d}"), ("{stem}_{step}", "photo1/image01{n:02d}"), ("{path}_{step}", "photo1/image01{n:02d}"),
    ("{photo}_{step}", "photo1_image01{n:02d}"), ("{stem}_{step}", "image01{n:02d}"), ("{path}/{step}", "image01{n:02d}")])
def test_growing_sketches_find_their_photo_and_are_in_the_order_of_their_numbers(tmp_path, style, photo):
    write_sde(tmp_path, style, photo)
    train, val, test = (data.open_episodes(tmp_path, split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test), train.steps] == [13, 2, 5, 12] and train.photos.captions is None
    assert [path.stem[-9:] for path in val.photos.pictures] == ["image0113", "image0114"]
    assert [train.sketch(2, t).getpixel((0, 0))[0] for t in range(12)] == list(range(1, 13))
    assert all(path.stem[-9:] in str(sketches[0]) for path, sketches in zip(test.photos.pictures, test.sketches))
    assert train.subset([4, 2]).sketches == [train.sketches[4], train.sketches[2]]


def test_photos_of_sketches_have_the_captions_of_a_list_beside_them(tmp_path):
    write_sde(tmp_path, count=16, steps=1)
    write_pictures(tmp_path / "photo", ["photo2/image0103.jpg"])
    records = [{"photo": f"photo/photo1/image01{n:02d}.jpg", "caption": [f"face {n}"] * 2} for n in range(15)]
    (tmp_path / "train.json").write_text(json.dumps([*records, {"image": "photo2/image0103.jpg", "caption": "another"}, {"image": "x.jpg", "caption": "none"}]))
    (tmp_path / "captions.json").write_text('[{"image": "image0115.jpg", "caption": "the last"}]')
    assert data.open_episodes(tmp_path, "train").photos.captions == [[f"face {n}"] * 2 for n in range(13)]
    assert data.open_episodes(tmp_path, "test").photos.captions == [["the last"]]


def captions_beside(d, *images):
    (d / "train.json").write_text(json.dumps([{"image": image, "caption": "a face"} for image in images]))


@pytest.mark.parametrize("write, spoil, sentence", [
    (write_sde, lambda d: (d / "sketch/train/photo1_image0104_7.png").unlink(), "photo1/image0104.jpg has no step 7, unlike most photos"),
    (write_sde, lambda d: write_pictures(d, ["sketch/train/photo1_image0104_13.png"]), "photo1/image0104.jpg has a step 13, unlike most photos"),
    (write_sde, lambda d: (d / "sketch/train/photo1_image0104_7.png").rename(d / "sketch/train/photo1_image0104_13.png"), "image0104.jpg has no step 7"),
    (write_sde, lambda d: write_pictures(d, [f"sketch/test/photo1_image0104_{step}.png" for step in range(1, 13)]),
     "FS2K-SDE: 1 faces are listed more than once, in one part or in both"),
    (write_sde, lambda d: write_pictures(d, ["sketch/train/photo1_image0104_07.png"]), "are the same step of one photo"),
    (write_sde, lambda d: write_pictures(d, ["sketch/train/image0104.png"]), "image0104.png: expected a name such as image0110_7.png"),
    (write_sde, lambda d: (d / "photo/photo1/image0104.jpg").unlink(), "there is no picture named photo1_image0104"),
    (write_sde, lambda d: captions_beside(d, "image0101.jpg"), "train.json: no caption for 12 of 13 photos, the first is"),
    (write_sde, lambda d: captions_beside(d, "photo1/image0101.jpg", "photo2/image0101.jpg"), "may both mean"),
    (lambda d: write_sde(d, "{stem}_{step}"), lambda d: write_pictures(d, ["photo/photo2/image0104.jpg"]), "image0104 may be"),
    (write_fs2k, lambda d: (d / "sketch/sketch1/sketch0104.png").unlink(), "FS2K: anno_train.json record 15 (counted from 0): there is no picture named sketch1_sketch0104"),
    (write_fs2k, lambda d: (d / "anno_test.json").write_text((d / "anno_train.json").read_text()), "FS2K: 20 faces are listed more than once"),
    (write_fs2k, lambda d: (d / "anno_train.json").write_text('[{"style": 1}]'), "record 0 (counted from 0) has no \"image_name\" such as"),
    (write_fs2k, lambda d: (d / "anno_train.json").unlink(), "found neither FS2K-SDE (sketch/train/, sketch/test/, photo/), nor FS2K"),
])
def test_faulty_photos_with_sketches_are_refused_with_one_sentence(tmp_path, write, spoil, sentence):
    spoil(write(tmp_path))
    error = error_of(data.open_episodes, tmp_path, "train")
    assert sentence in error and "\n" not in error


def test_episodes_are_checked_when_made():
    faces = drawn(3)
    assert error_of(data.Episodes, faces, np.zeros((2, 5, 8, 8), np.uint8)) == "drawn: 3 photos, but sketches of 2"
    assert error_of(data.Episodes, faces, [[], [], []]) == "drawn: no sketches"


def test_drawn_episodes_are_kept_and_show_the_drawn_faces(tmp_path, monkeypatch):
    episodes = data.drawn_episodes(4, 24, 3, tmp_path, steps=6)
    assert (episodes.photos.pictures == data.drawn_faces(4, 24, 3, tmp_path).pictures).all() and len(episodes) == 4
    assert (episodes.sketches[2] == toyfaces.sketch(2, 3, 24, 6)).all() and episodes.steps == 6
    assert (np.asarray(episodes.sketch(2, 5)) == episodes.sketches[2, 5][..., None]).all() and episodes.sketch(2, 5).mode == "RGB"
    assert episodes.photos.caption(0, np.random.default_rng(0)) and (episodes.subset([3]).sketches[0] == episodes.sketches[3]).all()
    monkeypatch.setattr(toyfaces, "sketch", lambda *_: pytest.fail("drawn again"))
    assert (data.drawn_episodes(4, 24, 3, tmp_path, steps=6).sketches == episodes.sketches).all() and len(list(tmp_path.iterdir())) == 3
    path = next(tmp_path.glob("*steps.npy"))
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: damaged (" in error_of(data.drawn_episodes, 4, 24, 3, tmp_path, steps=6)


# ---- augmentation and loader --------------------------------------------------------------------------------------
def test_augmentation_moves_pixels_as_the_recipe_says():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8))
    pixels = {name: np.asarray(operation(image, 1)) for name, operation in data.AUGMENTATIONS.items()}
    for name in ("identity", "brightness", "sharpness"):
        assert (pixels[name] == np.asarray(image)).all()
    assert (pixels["translate x"][:, :-5] == np.asarray(image)[:, 5:]).all() and (pixels["translate x"][:, -5:] == 128).all()
    assert (pixels["translate y"][:-5] == np.asarray(image)[5:]).all()
    assert (pixels["shear x"][200, -29:] == 128).all() and (pixels["rotate"][0, 0] == 128).all()


def test_augmentation_changes_five_in_nine_pictures_beyond_mirroring():
    """Two draws, each skipped by chance 1/2 or one of three operations (of nine) that change nothing: (2/3)^2 unchanged."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    plain, flipped = image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    rng = np.random.default_rng(0)
    seen = [data.augment(image, rng).tobytes() for _ in range(3000)]
    assert abs(seen.count(plain) / 3000 - 2 / 9) < 0.03 and abs(seen.count(flipped) / 3000 - 2 / 9) < 0.03


def drawn(count=20, size=16):
    pairs = [toyfaces.face(i, 0, size) for i in range(count)]
    return data.Faces("drawn", np.stack([np.asarray(image) for image, _ in pairs]), np.arange(count), np.stack([a for _, a in pairs]))


TOKENIZER = bert.Tokenizer.train([data.caption(a, np.random.default_rng(i))[0] for i, a in enumerate(random_faces(200))], 300)


def take(batches, start, count):
    return list(itertools.islice(batches.from_step(start), count))


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.captions.ids, b.captions.ids) and torch.equal(a.identity, b.identity)


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step():
    faces, size, n = drawn(), 16, 4
    whole = take(data.Batches(faces, TOKENIZER, size, n, seed=7), 0, 12)
    assert all(map(same, whole, take(data.Batches(faces, TOKENIZER, size, n, seed=7, workers=2), 0, 12)))
    assert all(map(same, whole[7:], take(data.Batches(faces, TOKENIZER, size, n, seed=7), 7, 5)))
    assert not same(whole[0], take(data.Batches(faces, TOKENIZER, size, n, seed=8), 0, 1)[0])
    epochs = [torch.cat([batch.identity for batch in whole[e:e + 5]]).tolist() for e in (0, 5)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))


def test_parts_of_the_processes_make_the_batch_of_one():
    faces = drawn()
    whole = take(data.Batches(faces, TOKENIZER, 16, 4), 3, 4)
    parts = [take(data.Batches(faces, TOKENIZER, 16, 2, rank=rank, world=2), 3, 4) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.captions.ids, torch.cat([first.captions.ids, second.captions.ids]))


def test_the_loader_draws_nothing_from_the_models_random_numbers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(data.Batches(drawn(), TOKENIZER, 16, 4), 0, 3)
    assert torch.equal(state, torch.get_rng_state())


def test_a_damaged_picture_reaches_the_user_as_one_sentence_from_a_worker(tmp_path):
    faces = spoil_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"^CelebA train, record [12]: .*00000[23].jpg (cannot be read completely: .*|is not a picture)$") as error:
        take(data.Batches(faces, TOKENIZER, 16, 4, workers=1), 0, 1)
    assert "\n" not in str(error.value)


def test_batches_without_negatives_or_faces_are_refused():
    faces = drawn(6)
    with pytest.raises(ValueError, match=r"drawn: 6 faces are fewer than a batch of 8 \(2 processes x 4\)"):
        data.Batches(faces, TOKENIZER, 16, 4, world=2)
    faces.identity[:] = 3
    with pytest.raises(ValueError, match=r"batch 2 shows only one person \(identity 3\)"):
        take(data.Batches(faces, TOKENIZER, 16, 3), 2, 1)


# ---- train.py ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def quick(out, cache, **changes):
    """A run of a few steps on a few drawn faces, with every part of the recipe in use."""
    settings = train.RECIPES["tiny"] | dict(
        out=str(out), cache=cache, faces=48, validation=20, steps=8, batch_size=8, queue_size=20, queue_from=0.25, itm_from=0.1,
        itm_every=1, hard_ramp=(0.2, 0.6), alpha_ramp=(0.2, 0.8), momentum_from=0.2, warmup=2, log_every=1, eval_every=100)
    return train.Config(**settings | changes)


def losses_of(out):
    """[(step, itc, itm)] of the log."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["itc"], line["itm"]) for line in lines if "itc" in line]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("uninterrupted")
    train.train(quick(out, cache))
    return out


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_run_stopped_after_any_step_and_resumed_has_the_losses_of_one_never_stopped(tmp_path, cache, uninterrupted, monkeypatch, stop_after):
    class Pressed(list):
        """Ctrl-C during step `stop_after`: the loop asks once a step whether it was pressed."""
        asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked >= stop_after

    monkeypatch.setattr(train, "stop_on_interrupt", lambda: contextlib.nullcontext(Pressed()))
    with pytest.raises(SystemExit, match=f"stopped after step {stop_after}"):
        train.train(quick(tmp_path, cache))
    monkeypatch.setattr(train, "stop_on_interrupt", lambda: contextlib.nullcontext([]))
    train.train(quick(tmp_path, cache, resume=True))
    assert losses_of(tmp_path) == losses_of(uninterrupted)


def test_ctrl_c_and_kill_are_taken_over_for_the_training_only():
    """A process that is forked later, and stopped, would otherwise never end."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with train.stop_on_interrupt() as pressed:
        signal.raise_signal(signal.SIGTERM)
        assert pressed == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_leaves_checkpoint_log_curves_and_sheet_and_the_checkpoint_evaluates_the_same(uninterrupted, cache):
    assert {path.name for path in uninterrupted.iterdir()} >= {"flip.pt", "log.jsonl", "curves.png", "retrieval.png"}
    for name in ("curves.png", "retrieval.png"):
        Image.open(uninterrupted / name).load()
    config = quick(uninterrupted, cache)
    metrics, _ = train.evaluate(FLIP.from_pretrained(uninterrupted / "flip.pt"), train.Validation.of(train.open_data(config)[1]), config)
    logged = json.loads((uninterrupted / "log.jsonl").read_text().splitlines()[-1])
    assert metrics == pytest.approx({name: logged[name] for name in metrics})


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(tmp_path, cache, uninterrupted):
    changes = dict(batch_size=4)
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, train, test_all; torch.set_num_threads(1); "
              f"train.train(test_all.quick({str(tmp_path)!r}, {cache!r}, **{changes!r}))")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000), "WORLD_SIZE": "2"}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    one, two = losses_of(uninterrupted), losses_of(tmp_path)
    assert len(one) == len(two) == 8
    np.testing.assert_allclose(np.array(two, float), np.array(one, float), atol=1e-4)
    queues = [FLIP.from_pretrained(out / "flip.pt").state_dict() for out in (uninterrupted, tmp_path)]
    for name in ("queue_identity", "queue_pointer", "image_queue", "text_queue"):
        close(queues[1][name].double(), queues[0][name].double(), 1e-4)


def test_two_micro_batches_give_the_gradient_of_their_mean(cache, tmp_path):
    """Up to the queue, which the second already sees filled by the first."""
    config = quick(tmp_path, cache, accumulate=2, queue_from=1.0, alpha_ramp=(1, 1), momentum_from=1.0, clip_grad=0.0)
    faces, _ = train.open_data(config)
    model = train.build_model(config, faces).train()
    micro = list(zip(range(2), data.Batches(faces, model.tokenizer, 48, 8).from_step(0)))
    gradients = []

    class Optimizer(torch.optim.SGD):
        def step(self):
            gradients.append(model.student.image.class_token.grad.clone())
    optimizer = train.build_optimizer(model, config)
    optimizer = Optimizer([{**group, "lr": 0.0} for group in optimizer.param_groups], lr=0.0)
    run = train.Run(config, model, model, optimizer, None, 3, None, 0)
    for batches in ([micro[0][1]], [micro[1][1]], [micro[0][1], micro[1][1]]):
        train.train_step(run, batches, 0)
    close(gradients[2], (gradients[0] + gradients[1]) / 2, 1e-6)


def test_every_trained_parameter_is_in_one_optimiser_group_and_only_matrices_decay(cache, tmp_path):
    model = small_flip()
    optimizer = train.build_optimizer(model, quick(tmp_path, cache))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in optimizer.param_groups for p in group["params"])
    everything = train.build_optimizer(model, quick(tmp_path, cache, decay_all=True))
    assert all(group["weight_decay"] == 0.05 for group in everything.param_groups if group["params"])


def test_the_base_recipe_is_the_papers():
    config = train.Config(**train.RECIPES["base"] | {"model": "base", "steps": 15 * 23_925})
    rate = lambda step: train.learning_rate(step, config, 23_925)
    assert rate(0) == pytest.approx(1e-6) and rate(10_000) == pytest.approx(1.55e-5) and rate(20_000) == 3e-5
    assert rate(23_924) == 3e-5 and rate(23_925 * 3) == pytest.approx(3e-5 * 0.9 ** 3) and rate(23_925 * 40) == 1e-6
    for step in (0, 1000, 23_925, 60_000, 300_000):
        assert train.alpha_at(step, config) == pytest.approx(0.4 * min(1, step / (2 * 23_925)))
        assert train.momentum_at(step, config) == 0.995 and train.queue_length_at(step, config) == 61_440
        assert train.hardness_at(step, config) == 1 and train.itm_at(step, config)


def test_the_tiny_recipe_starts_gently_and_ends_with_everything_on():
    config = train.parse_arguments([])
    first, last = 0, config.steps - 1
    assert train.momentum_at(first, config) == 0 and train.momentum_at(last, config) == config.momentum
    assert train.alpha_at(first, config) == 0 and train.alpha_at(last, config) == config.alpha
    assert train.queue_length_at(first, config) == 0 and train.queue_length_at(last, config) == config.queue_size
    assert not train.itm_at(first, config) and any(train.itm_at(last - k, config) for k in range(config.itm_every))
    assert train.hardness_at(config.itm_from * config.steps, config) == 0 and train.hardness_at(last, config) == config.hardness


def test_flags_are_the_configurations_fields_and_recipes_yield_to_them():
    assert train.parse_arguments(["--steps", "7", "--no-small_init", "--hard_ramp", "0.1", "0.2"]) == train.Config(
        **train.RECIPES["tiny"] | dict(steps=7, small_init=False, hard_ramp=(0.1, 0.2)))
    assert train.parse_arguments(["--model", "base"]) == train.Config(model="base")
    with pytest.raises(SystemExit):
        train.parse_arguments(["--leanring_rate", "1"])


@pytest.mark.parametrize("flags, sentence", [
    (dict(batch_size=0), "--batch_size 0: expected at least 1"), (dict(steps=-1), "--steps -1"), (dict(alpha=2.0), "--alpha 2.0"),
    (dict(hard_ramp=(0.9, 0.1)), "--hard_ramp (0.9, 0.1)"), (dict(model="huge"), "--model huge: expected one of tiny, base, large"),
    (dict(precision="fp16"), "--precision fp16"), (dict(lr=float("nan")), "--lr nan")])
def test_flags_out_of_range_are_refused_by_name(flags, sentence):
    assert sentence in error_of(train.Config, **flags)


def test_a_retrieval_table_stands_beside_chance_and_both_references(uninterrupted, cache):
    validation = train.Validation.of(train.open_data(quick(uninterrupted, cache))[1])
    metrics = {f"{prefix}{way}_r{k}": 10.0 for prefix in ("", "itc_") for way in ("img", "txt") for k in (1, 5, 10)}
    lines = train.table(metrics, validation).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["chance", "consistency", "ceiling", "this model, ITC alone",
                                                                  "this model, re-ranked", "share of consistency", "share of ceiling"]
    assert lines[2].split(" | ")[1:4] == ["5.0", "25.0", "50.0"]


# ---- finetune.py: numbers ------------------------------------------------------------------------------------------
def test_attribute_logits_and_loss_are_the_official_ones(official):
    vectors = finetune.pooled(official.eval().student.image, GOLDEN["eval.images"]).detach()
    head = finetune.AttributeHead(vectors=12, width=24, labels=40)
    head.load_state_dict({"weights": GOLDEN["attr.layer_weights"].flatten(),
                          **{f"norm.{name}": GOLDEN[f"attr.ln.{name}"] for name in ("weight", "bias")},
                          **{f"linear.{name}": GOLDEN[f"attr.visual_proj.{name}"] for name in ("weight", "bias")}})
    close(head(vectors), GOLDEN["attr.logits"])
    samples = finetune.Labelled([vectors], GOLDEN["attr.target"].float(), ATTRIBUTES)
    close(finetune.attribute_loss(head, samples, torch.arange(8), np.random.default_rng(0), 0), GOLDEN["attr.loss"])


def test_the_base_model_is_pooled_after_blocks_4_6_and_8_and_at_the_end():
    seen = []

    class Image:
        config = ViTConfig()

        def __call__(self, images, return_hidden):
            hidden = [torch.full((1, 3, 2), float(block)) for block in range(1, 13)]
            return torch.full((1, 3, 2), 99.0), hidden
    assert finetune.pooled(Image(), None)[0, :, 0].tolist() == [4, 4, 4, 6, 6, 6, 8, 8, 8, 99, 99, 99]


def test_early_retrieval_is_the_official_one():
    found = finetune.early_retrieval(GOLDEN["slfir.ranks"], photos=20)
    for name in ("mA", "mB", "wA", "wB"):
        assert found[f"{name[0]}@{name[1]}"] == pytest.approx(GOLDEN[f"slfir.{name}"].item(), abs=1e-9)
    assert found["m@A"] == pytest.approx(np.mean(found["A"])) and len(found["B"]) == 50


def test_a_photo_as_similar_as_the_true_one_ranks_before_it_and_nan_is_never_a_hit():
    similarity = torch.tensor([[[0.5, 0.1, 0.5], [0.9, 0.1, 0.2]], [[0.2, 0.2, 0.2], [0.3, 0.1, 0.0]], [[0.0, 0.0, torch.nan], [0.0, 0.1, 0.2]]])
    assert finetune.sketch_ranks(similarity).tolist() == [[2, 1], [3, 2], [3, 1]]


def test_average_precision_and_balanced_accuracy_are_their_definitions():
    close(finetune.average_precision(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0])), torch.tensor((1 + 2 / 3) / 2).double(), 1e-7)
    head = finetune.AttributeHead(1, 4, 3)
    head.forward = lambda vectors: vectors[:, 0, :3]
    logits = torch.tensor([[1.0, -1, 2], [2.0, -1, 1], [-1.0, -1, 1], [3.0, -1, 1]])
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]])
    found = finetune.attribute_metrics(head, finetune.Labelled([F.pad(logits, (0, 1))[:, None]], labels, ("a", "b", "c")))
    for name, expected in (("a", [50, 100 / 3]), ("b", [75, 50])):
        assert [found["per_label"][name][column] for column in ("accuracy", "balanced")] == pytest.approx(expected)
    accuracy, balanced, precision, majority = found["per_label"]["c"].values()      # which everyone has
    assert accuracy == majority == 100 and np.isnan([balanced, precision]).all()
    assert found["accuracy"] == pytest.approx(75) and found["balanced"] == pytest.approx((100 / 3 + 50) / 2) and found["majority"] == pytest.approx(250 / 3)


def test_chance_is_what_orders_by_chance_come_to():
    rng, image_of_text = np.random.default_rng(0), torch.tensor([0] * 3 + [1] + [2] * 2 + list(range(3, 20)))
    scores = [torch.from_numpy(rng.random((20, 23))) for _ in range(3000)]
    found = [losses.retrieval_metrics(score, score.T, image_of_text) for score in scores]
    expected = finetune.chance_recalls(20, image_of_text)
    for name in ("img_r5", "img_r10", "txt_r5", "txt_r10"):
        assert np.mean([metrics[name] for metrics in found]) == pytest.approx(expected[name], abs=1)
    assert finetune.chance_recalls(3, torch.arange(3))["txt_r5"] == finetune.chance_recalls(3, torch.arange(3))["itc_img_r10"] == 100
    for positives in (1, 2, 4):                             # the mean over all orders of five samples
        precisions = [finetune.average_precision(torch.tensor(order), torch.arange(5) < positives)
                      for order in itertools.permutations(range(5))]
        close(finetune.chance_precision(torch.tensor(positives).double(), 5), torch.stack(precisions).mean(), 1e-12)


def test_the_loss_within_a_batch_is_the_symmetric_cross_entropy_with_positives_of_equal_identity():
    torch.manual_seed(0)
    rows, keys = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    identity, temperature = torch.tensor([3, 1, 3, 4, 5]), torch.tensor(0.07, dtype=torch.float64)
    targets = (identity[:, None] == identity).double()
    targets /= targets.sum(1, keepdim=True)
    expected = (F.cross_entropy(rows @ keys.detach().T / temperature, targets) + F.cross_entropy(keys @ rows.detach().T / temperature, targets)) / 2
    found = finetune.contrast(rows, keys, identity, temperature)
    close(found, expected, 1e-9)
    for a, b in zip(torch.autograd.grad(found, (rows, keys)), torch.autograd.grad(expected, (rows, keys))):
        close(a, b, 1e-9)


def test_a_caption_is_one_of_its_pictures():
    samples = finetune.Paired([], None, None, torch.tensor([0, 0, 1, 2, 2, 2]), torch.arange(3), None)
    rng, indices = np.random.default_rng(0), torch.tensor([2, 0, 1])
    drawn = torch.stack([finetune.caption_of(samples, indices, rng) for _ in range(50)])
    assert (samples.image_of_text[drawn] == indices).all() and [len(column.unique()) for column in drawn.T] == [3, 2, 1]


# ---- finetune.py: runs ---------------------------------------------------------------------------------------------
def tuned(task, checkpoint, out, cache="", **changes):
    """A run of a few steps on a few faces; the drawn ones' recipe."""
    settings = finetune.RECIPES[task] | finetune.DRAWN[task] | dict(
        task=task, checkpoint=(str(checkpoint / "flip.pt"),), out=str(out), cache=cache, faces=24, validation=4, test=8, epochs=3, batch_size=8, itm_every=1)
    return finetune.Config(**settings | changes)


def is_head(task, name):
    """Whether a task may change this part of a FLIP; attributes has a head of its own."""
    return task != "attributes" and name.startswith(
        ("student.image_projection", "student.text_projection", "matching_head", "temperature"))


@pytest.mark.parametrize("task, pictures", [("retrieval", {"retrieval.png"}), ("attributes", {"attributes.png"}), ("sketch", {"sketch.png", "curves.png"})])
def test_a_task_runs_and_leaves_the_encoders_as_they_were(uninterrupted, cache, tmp_path, monkeypatch, capsys, task, pictures):
    optimised = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            optimised.extend(p for group in self.param_groups for p in group["params"])
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    encoders = finetune.open_encoders(tuned(task, uninterrupted, tmp_path, cache))
    monkeypatch.setattr(finetune, "open_encoders", lambda config: encoders)
    before = [copy.deepcopy(encoder.model.state_dict()) for encoder in encoders]
    results = finetune.finetune(tuned(task, uninterrupted, tmp_path, cache))
    assert [result.name for result in results] == ["FLIP, pre-trained on drawn faces", "random frozen encoder"]
    for encoder, weights in zip(encoders, before):
        after = encoder.model.state_dict()
        assert not encoder.model.training
        for name, value in weights.items():
            assert is_head(task, name) or torch.equal(value, after[name]), name
        for name, parameter in encoder.model.named_parameters():
            if not is_head(task, name):
                assert not parameter.requires_grad and parameter.grad is None and not any(parameter is p for p in optimised), name
    assert optimised and len(set(map(id, optimised))) == len(optimised)
    for name in pictures:
        Image.open(tmp_path / task / name).load()
    table = (tmp_path / task / "table.md").read_text()
    assert table in capsys.readouterr().out and "published on" in table and len({line.count("|") for line in table.splitlines()}) == 1


def test_the_tuned_flip_is_a_checkpoint_that_gives_the_figures_of_the_table_and_knows_where_it_comes_from(uninterrupted, cache, tmp_path):
    config = tuned("retrieval", uninterrupted, tmp_path, cache, random=False, lr=0.02, faces=64, validation=32, test=32, k_test=4)
    result, = finetune.finetune(config)
    path = str(tmp_path / "retrieval" / "flip.pt")
    saved, origin = torch.load(path), torch.load(uninterrupted / "flip.pt")
    changed = {name for name, value in origin["model"].items() if not torch.equal(value, saved["model"][name])}
    assert changed == {name for name in saved["model"] if is_head("retrieval", name)}
    assert result.before[1.0] != {column: result.final[column] for column in result.before[1.0]}
    encoders = finetune.open_encoders(finetune.Config(task="attributes", checkpoint=(path,), out=str(tmp_path)))
    assert encoders[0].name == "FLIP, pre-trained on drawn faces, tuned for retrieval"
    assert encoders[0].origin == {
        "tasks": ["retrieval"], "checkpoint": str(uninterrupted / "flip.pt"), "settings": origin["training"]["settings"]}
    again, = finetune.finetune(dataclasses.replace(config, checkpoint=(path,), out=str(tmp_path / "again"), lr=0.0))
    assert torch.equal(again.final["scores"], result.final["scores"])
    assert "retrieval holds the results of an earlier run; take it away" in error_of(finetune.finetune, config)


def test_a_run_repeats_itself_and_tokens_on_disk_give_what_tokens_in_memory_give(uninterrupted, cache, tmp_path, monkeypatch):
    kept, storage = [], finetune.storage
    monkeypatch.setattr(finetune, "storage", lambda *arguments: kept.append(storage(*arguments)) or kept[-1])
    one, two, disk = (finetune.finetune(tuned("retrieval", uninterrupted, tmp_path / out, cache, **changes))[0].final
                      for out, changes in (("a", {}), ("b", {}), ("c", dict(memory=0.0))))
    assert torch.equal(one["scores"], two["scores"])
    close(disk["scores"], one["scores"], 0.02)              # half precision
    half = [tensor.dtype == torch.float16 for tensor in kept]
    assert half == [False] * (len(half) * 2 // 3) + [True] * (len(half) // 3)
    assert not list(tmp_path.rglob("*.f16"))


def test_tokens_that_do_not_fit_memory_are_half_precision_in_a_file_and_others_as_they_are(tmp_path):
    big = finetune.storage((1000, 5), finetune.Config(out=str(tmp_path), memory=1e-5))
    small = finetune.storage((1000, 5), finetune.Config(out=str(tmp_path), memory=2.1e-5))
    assert big.dtype == torch.float16 and small.dtype == torch.float32
    big[:] = torch.arange(5)
    assert (big[999] == torch.arange(5)).all()
    assert "GB free, but" in error_of(finetune.storage, (2 ** 30, 2 ** 30), finetune.Config(out=str(tmp_path)))


def test_views_are_the_picture_and_its_augmentations(uninterrupted, cache, tmp_path):
    model = finetune.freeze(FLIP.from_pretrained(uninterrupted / "flip.pt"))
    config = tuned("attributes", uninterrupted, tmp_path, cache, views=3)
    faces = finetune.open_part(config, "train", 48)
    views = finetune.encode_attributes(model, faces, config, for_training=True).vectors
    plain = finetune.encode_attributes(model, faces, config, for_training=False).vectors
    assert len(views) == 3 and len(plain) == 1 and torch.equal(views[0], plain[0])
    assert not torch.equal(views[1], views[0]) and not torch.equal(views[1], views[2])


def test_a_share_of_the_training_part_is_drawn_by_the_seed_and_lies_in_every_larger_one():
    samples = finetune.Labelled([torch.arange(100.0)[:, None, None]], torch.zeros(100, 1), ("Bald",))
    shares = [set(finetune.share_of(samples, share, seed=3).vectors[0].flatten().tolist()) for share in (0.001, 0.1, 0.5, 1)]
    assert [len(share) for share in shares] == [1, 10, 50, 100] and shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[1] != set(finetune.share_of(samples, 0.1, seed=4).vectors[0].flatten().tolist())


@pytest.mark.parametrize("values, kept", [([5.0, 4, 3, 2], 0), ([1.0, 7, 9, 8], 2), ([1.0, 2, 3, 4], 3)])
def test_what_was_best_on_the_validation_part_is_kept_even_if_that_is_what_tuning_began_with(tmp_path, values, kept):
    head, weights, found = nn.Linear(2, 1), [], iter(values)

    def metrics(head, samples):
        assert samples == "validation"
        weights.append(head.weight.detach().clone())
        return {"score": next(found)}
    task = finetune.TASKS["attributes"]._replace(
        loss=lambda head, samples, indices, rng, step: head(torch.ones(2)).sum(), metrics=metrics, select="score", columns={"score": "score"})
    config = finetune.Config(epochs=3, evaluations=3, batch_size=2, lr=0.1, warmup=0)
    untuned, best = finetune.tune(task, head, range(4), "validation", config, train.Log(tmp_path / "log.jsonl", config, 0, True))
    assert len(weights) == 4 and not torch.equal(weights[0], weights[1])
    assert torch.equal(untuned["weight"], weights[0]) and torch.equal(best["weight"], weights[kept])


def test_the_learning_rate_rises_over_the_warmup_but_at_most_a_tenth_of_the_run_and_falls_to_zero():
    config = finetune.Config(lr=1.0, warmup=20)
    rate = lambda step: finetune.learning_rate(step, 1000, config)
    assert rate(0) == 0.05 and rate(19) == rate(20) == 1 and rate(510) == pytest.approx(0.5) and rate(999) < 1e-5
    assert finetune.learning_rate(9, 100, config) == 1 and finetune.learning_rate(0, 5, config) == 1


def test_the_test_part_is_encoded_and_judged_once_after_all_tuning(uninterrupted, cache, tmp_path, monkeypatch):
    happened, task = [], finetune.TASKS["attributes"]

    def encode(model, faces, *rest):
        happened.append(faces.name[-3:-1])
        return task.encode(model, faces, *rest)

    def metrics(head, samples):
        happened.append(len(samples))
        return task.metrics(head, samples)
    monkeypatch.setitem(finetune.TASKS, "attributes", task._replace(encode=encode, metrics=metrics))
    finetune.finetune(tuned("attributes", uninterrupted, tmp_path, cache, fractions=(0.5, 1.0)))
    # before and after each of three epochs with all faces, at five of the six with half of them; the test part for both
    once = ["10", "11", *[4] * (1 + 5), *[4] * (1 + 3), "12", 8, 8, 8, 8]
    assert happened == [*once, *once]


def test_several_checkpoints_stand_side_by_side_by_what_they_learned_from(uninterrupted, cache, tmp_path, monkeypatch):
    saved = torch.load(uninterrupted / "flip.pt")
    saved["training"]["settings"] |= {"itm_from": 1.0}
    torch.save(saved, tmp_path / "itc.pt")
    del saved["training"]
    torch.save(saved, tmp_path / "another.pt")
    saved["tuned"] = {"tasks": ["retrieval", "sketch"], "checkpoint": "DIR/FLIP-base.pth", "settings": {}}
    torch.save(saved, tmp_path / "flip.pt")
    paths = (uninterrupted / "flip.pt", *(tmp_path / name for name in ("itc.pt", "another.pt", "flip.pt")), uninterrupted / "flip.pt")
    names = [encoder.name for encoder in finetune.open_encoders(finetune.Config(task="sketch", checkpoint=tuple(map(str, paths))))]
    twice = f"FLIP, pre-trained on drawn faces ({paths[0]})"
    assert names == [twice, "ITC alone, pre-trained on drawn faces", "another", "FLIP-base, tuned for retrieval, tuned for sketch", twice,
                     "random frozen encoder"]


def test_published_figures_stand_in_the_table_under_the_shares_that_are_theirs():
    metrics = {"accuracy": 1.0, "balanced": 2.0, "average_precision": 3.0}
    metrics["baseline"] = dict(metrics)

    def rows(*shares):
        results = [finetune.Result("ours", {}, {share: metrics for share in shares})]
        lines = finetune.table(results, finetune.Config(task="attributes", fractions=shares)).splitlines()
        return {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert rows(0.02, 1.0)["ours"] == ["1.0", "1.0", "2.0", "2.0", "3.0", "3.0"]
    assert rows(0.02, 1.0)["FaRL, published on CelebA"] == ["90.26", "91.39", "", "", "", ""]
    assert rows(0.1, 0.5, 1.0)["FLIP, published on LFWA"][:3] == ["82.6", "89.87", "98.04"]
    assert rows(0.1, 0.5, 1.0)["FLIP, published on CelebA"][:3] == ["91.74", "", "92.27"]
    assert not any("LFWA" in name for name in rows(0.02))


def write_parted_celeba(folder):
    """40 pictures, the last 10 of them for validation and test."""
    write_celeba(folder, count=40)
    (folder / "list_eval_partition.txt").write_text("\n".join(f"{i + 1:06d}.jpg {max(0, i // 5 - 5)}" for i in range(40)))


def test_attributes_are_learned_from_celeba_as_it_is_distributed_with_the_columns_named(uninterrupted, tmp_path):
    write_parted_celeba(tmp_path)
    columns = ("Smiling", "Male")
    results = finetune.finetune(tuned("attributes", uninterrupted, tmp_path / "out", data=str(tmp_path), columns=columns))
    assert tuple(results[0].final["per_label"]) == columns
    assert torch.load(tmp_path / "out/attributes/head.pt")["attributes"] == list(columns)
    test = data.open_faces(tmp_path, "test").attributes[:, [ATTRIBUTES.index(name) for name in columns]].mean(0)
    assert results[0].final["majority"] == pytest.approx(100 * np.maximum(test, 1 - test).mean())


def test_retrieval_is_tuned_and_judged_on_pictures_with_several_captions_of_their_own(uninterrupted, tmp_path):
    write_mm_celeba(tmp_path, (*range(2, 42), *range(24000, 24012)))
    ours, random = finetune.finetune(tuned("retrieval", uninterrupted, tmp_path / "out", data=str(tmp_path)))
    scores, own = ours.final["scores"], torch.arange(12).repeat_interleave(2)                               # (T, N), (T,)
    assert scores.shape == (24, 12) and "scores" not in random.final
    better = (scores > scores[torch.arange(24), own][:, None]).sum(1)
    assert ours.final["img_r5"] == pytest.approx(100 * (better < 5).double().mean().item()) and 0 < ours.final["img_r5"] < 100


def test_sketches_are_tuned_without_captions_and_with_them(uninterrupted, tmp_path):
    write_sde(tmp_path, steps=3)
    torch.save(torch.load(uninterrupted / "flip.pt") | {"tokenizer": None}, tmp_path / "flip.pt")
    for with_captions in (False, True):
        if with_captions:
            records = [{"image": f"photo1/image01{n:02d}.jpg", "caption": f"a smiling face {n}"} for n in range(15)]
            (tmp_path / "train.json").write_text(json.dumps(records))
        without_vocabulary = tuned("sketch", tmp_path, tmp_path / "wordless", data=str(tmp_path), random=False)
        if with_captions:
            assert "flip.pt holds no vocabulary" in error_of(
                finetune.finetune, dataclasses.replace(without_vocabulary, out=str(tmp_path / "again")))
        else:
            finetune.finetune(without_vocabulary)
        config = tuned("sketch", uninterrupted, tmp_path / f"out {with_captions}", data=str(tmp_path), random=False)
        model = finetune.freeze(FLIP.from_pretrained(uninterrupted / "flip.pt"))
        samples = finetune.encode_sketches(model, finetune.open_episodes(config, "train", 48), config, for_training=True)
        head = finetune.flip_head(model, samples)
        finetune.sketch_loss(head, samples, torch.arange(8), np.random.default_rng(0), step=0).backward()
        assert head.image_projection.weight.grad is not None
        assert (head.matching_head.weight.grad is not None) == with_captions == (head.text_projection.weight.grad is not None)
        result, = finetune.finetune(config)
        assert result.final["scores"].shape == (5, 3, 5)


def test_sketches_are_shown_to_the_encoder_dark_on_light(uninterrupted, cache, tmp_path, monkeypatch):
    brightness, encode = {}, finetune.encode_pictures

    def watched(compute, read, count, model, config, title):
        brightness[title] = np.mean([np.asarray(read(i)).mean() for i in range(count)])
        return encode(compute, read, count, model, config, title)
    monkeypatch.setattr(finetune, "encode_pictures", watched)
    config = tuned("sketch", uninterrupted, tmp_path, cache)
    finetune.encode_sketches(FLIP.from_pretrained(uninterrupted / "flip.pt").eval(), finetune.open_episodes(config, "val", 48), config, False)
    assert 200 < brightness["encoding the sketches of drawn faces (seed 11)"] < 255


def test_the_recipe_is_the_papers_for_ones_own_data_and_flags_go_before_it():
    papers = finetune.parse_arguments(["retrieval", "--data", "DIR"])
    assert (papers.batch_size, papers.epochs, papers.lr, papers.warmup, papers.k_test) == (64, 50, 3e-5, 2000, 256)
    for task in finetune.TASKS:
        for given, recipe in (["--data", "DIR"], {"data": "DIR"}), ([], finetune.DRAWN[task]):
            assert finetune.parse_arguments([task, *given]) == finetune.Config(task=task, **finetune.RECIPES[task] | recipe)
    drawn = finetune.parse_arguments(["sketch", "--lr", "0.1", "--checkpoint", "a.pt", "b.pt"])
    assert drawn.lr == 0.1 and drawn.checkpoint == ("a.pt", "b.pt") and drawn.faces == finetune.DRAWN["sketch"]["faces"]


@pytest.mark.parametrize("changes, sentence", [
    (dict(task="attributes", columns=("Male", "Male")), "--columns Male Male: expected every attribute once"),
    (dict(task="attributes", columns=("Smilling",)), "--columns: there is no attribute Smilling; expected some of 5_o_Clock_Shadow"),
    (dict(fractions=(0.1, 2.0)), "--fractions (0.1, 2.0): expected shares above 0 and at most 1"), (dict(fractions=()), "--fractions ()"),
    (dict(fractions=(0.5, 0.5)), "expected every share once"), (dict(task="sketch", columns=("Male",)), "--columns and --fractions are for attributes"),
    (dict(task="sketch", views=2), "--views: a sketch and its photo must show the same"), (dict(epochs=0), "--epochs 0: expected at least 1"),
    (dict(lr=float("nan")), "--lr nan: expected a number that is not negative"), (dict(test=1), "--test 1: expected at least 2"),
    (dict(precision="fp16"), "--precision fp16: expected one of auto, float32, bf16")])
def test_flags_of_the_tasks_out_of_range_are_refused_by_name(changes, sentence):
    assert sentence in error_of(finetune.Config, **changes)


def spoil_checkpoint(folder, change):
    saved = torch.load(folder / "flip.pt")
    change(saved)
    torch.save(saved, folder / "flip.pt")


@pytest.mark.parametrize("task, spoil, sentence", [
    ("attributes", lambda d: (d / "flip.pt").unlink(), "no such checkpoint"),
    ("retrieval", lambda d: write_mm_celeba(d / "data") and spoil_checkpoint(d, lambda saved: saved.update(tokenizer=None)), "holds no vocabulary; give one with --vocabulary"),
    ("attributes", lambda d: write_mm_celeba(d / "data"), "MM-CelebA-HQ train: attributes are to be learned, but these faces have none"),
    ("retrieval", lambda d: write_sde(d / "data"), "found neither"),
    ("retrieval", lambda d: [write_captions(d / "data", name=f"{part}.json", records=[
        {"image": f"{i}.png", "image_id": 1, "caption": "a face"} for i in range(4)]) for part in ("train", "val", "test")], "shows one person only"),
    ("attributes", lambda d: torch.save({"model": {}, "attributes": []}, d / "flip.pt"), "flip.pt is the head of the task attributes"),
    ("attributes", lambda d: spoil_checkpoint(d, lambda saved: saved["model"]["temperature"].fill_(torch.nan)), "some weights are not finite numbers"),
    ("retrieval", lambda d: write_celeba(d / "data"), "the part \"val\" has 1 pictures, expected at least 2"),
    ("sketch", lambda d: write_celeba(d / "data", count=40), "found neither FS2K-SDE"),
    ("attributes", lambda d: (d / "data").rmdir(), "data: no such folder or file"),
    ("attributes", lambda d: (write_parted_celeba(d / "data"), (d / "data/img_align_celeba/000003.jpg").write_text("x")), "000003.jpg is not a picture"),
    ("sketch", lambda d: write_sde(d / "data") and (d / "data/sketch/test/photo1_image0117_7.png").write_text("x"), "photo1_image0117_7.png is not a picture"),
])
def test_what_a_task_cannot_use_is_refused_with_one_sentence_before_anything_is_encoded(uninterrupted, tmp_path, monkeypatch, task, spoil, sentence):
    for name in ("encode_pictures", "encode_captions"):
        monkeypatch.setattr(finetune, name, lambda *_: pytest.fail("encoded"))
    (tmp_path / "data").mkdir()
    (tmp_path / "flip.pt").write_bytes((uninterrupted / "flip.pt").read_bytes())
    spoil(tmp_path)
    assert sentence in error_of(finetune.finetune, tuned(task, tmp_path, tmp_path / "out", data=str(tmp_path / "data")))


# ---- flip.py and the other scripts ---------------------------------------------------------------------------------
@pytest.fixture
def folder_of_faces(tmp_path):
    folder = tmp_path / "my faces"
    folder.mkdir()
    for i in range(6):
        toyfaces.face(i, seed=5, size=64)[0].save(folder / f"{i}.png")
    (folder / "notes.jpg").write_text("no picture")
    return folder


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def test_search_ranks_a_folder_writes_a_sheet_names_what_it_cannot_read_and_reuses_features(uninterrupted, folder_of_faces, tmp_path, monkeypatch, capsys):
    arguments = ("--checkpoint", uninterrupted / "flip.pt", "--images", folder_of_faces, "--out", tmp_path / "found.png", "--top", 4, "a smiling woman")
    run(flip_module, monkeypatch, *arguments)
    first = capsys.readouterr().out
    assert "notes.jpg is not a picture" in first and "best of 6 faces" in first
    lines = [line.split(maxsplit=2) for line in first.splitlines() if line.endswith(".png") and "sheet" not in line]
    assert len(lines) == 4 and all(-1 <= float(itc) <= 1 and 0 <= float(itm) <= 1 for itc, itm, _ in lines)
    assert Image.open(tmp_path / "found.png").width > 4 * 100
    opened = []
    monkeypatch.setattr(flip_module, "open_picture", lambda path: opened.append(path.name) or vit.open_picture(path))
    toyfaces.face(9, seed=5, size=64)[0].save(folder_of_faces / "new.png")
    monkeypatch.setattr(flip_module, "search", lambda model, features, *_: [(path, 0.0, 0.0) for path in features])
    run(flip_module, monkeypatch, *arguments)
    encoded = opened[:-7]                                   # the last seven are opened for the sheet
    assert "new.png" in encoded and not any(name[0].isdigit() for name in encoded)


def test_search_finds_the_faces_that_rank_best_by_matching_logit_plus_cosine(uninterrupted, folder_of_faces, tmp_path):
    model = FLIP.from_pretrained(uninterrupted / "flip.pt").eval()
    features = flip_module.folder_features(model, folder_of_faces, tmp_path / "features.pt")
    found = flip_module.search(model, features, "a smiling woman", top=6)
    captions = model.tokenizer(["a smiling woman"])
    scores = {}
    with torch.no_grad():
        for path in features:
            tokens, feature = model.encode_image(vit.to_tensor(vit.open_picture(path), 48)[None])
            scores[path] = (model.config.cosine_weight * feature @ model.encode_text(captions).T + model.match(tokens, captions)[:, 1]).item()
    assert [path for path, _, _ in found] == sorted(scores, key=scores.get, reverse=True)


@pytest.mark.parametrize("script, arguments, shows", [
    ("vit.py", [], "class token first"), ("bert.py", ["a smiling woman"], "[CLS]"),
    ("data.py", ["--count", "2", "--cache", "{tmp}", "--out", "{tmp}/sheet.png"], "distinct"),
    ("toyfaces.py", ["--out", "{tmp}/faces", "--count", "3", "--size", "48"], ""), ("toyfaces.py", ["--sketch", "{tmp}/sketch.png"], "")])
def test_every_file_runs_and_shows_what_it_is_about(tmp_path, script, arguments, shows):
    command = [sys.executable, str(ROOT / script), *(argument.format(tmp=tmp_path) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and shows in result.stdout, result.stderr


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_a_vocabulary_without_cls_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\nwoman\n")
    assert "vocab.txt: the vocabulary has no [CLS]" in error_of(Tokenizer.load, tmp_path / "vocab.txt")


def test_a_vocabulary_of_another_size_than_the_models_is_refused():
    assert "27 entries" in error_of(small_flip().use, Tokenizer.train(["a smiling woman"]))


def test_a_checkpoint_of_other_sizes_is_refused_with_the_first_that_differ(uninterrupted):
    config = dataclasses.replace(FLIP.from_pretrained(uninterrupted / "flip.pt").config, embed_dim=64)
    sentence = error_of(FLIP.from_pretrained, uninterrupted / "flip.pt", config)
    assert "flip.pt does not fit this model" in sentence and "has shape" in sentence and "expected" in sentence


def test_weights_that_are_left_over_or_missing_are_named(official, tmp_path):
    state = official_state(official)
    torch.save({"model": state | {"surprise": torch.ones(1)}}, tmp_path / "more.pth")
    assert "surprise" in error_of(FLIP.from_pretrained, tmp_path / "more.pth", GOLDEN_CONFIG)
    del state["text_proj.weight"]
    torch.save({"model": state}, tmp_path / "less.pth")
    assert "text_proj.weight is missing" in error_of(FLIP.from_pretrained, tmp_path / "less.pth", GOLDEN_CONFIG)
    assert "pass config=" in error_of(FLIP.from_pretrained, tmp_path / "more.pth")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    assert "no such checkpoint" in error_of(FLIP.from_pretrained, tmp_path / "absent.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    assert "noise.pt: not a checkpoint" in error_of(FLIP.from_pretrained, tmp_path / "noise.pt")


def test_resuming_with_other_flags_is_refused_by_name(uninterrupted, cache):
    sentence = error_of(train.train, quick(uninterrupted, cache, resume=True, lr=0.5))
    assert "had lr 0.001, now it is 0.5" in sentence


def test_a_damaged_picture_met_in_training_costs_nothing_that_was_learned(tmp_path):
    write_celeba(tmp_path, count=40)
    (tmp_path / "img_align_celeba" / "000012.jpg").write_bytes(b"not a picture")
    config = quick(tmp_path / "out", "", data=str(tmp_path), batch_size=4, steps=30)
    sentence = error_of(train.train, config)
    assert "000012.jpg is not a picture" in sentence
    step = torch.load(tmp_path / "out" / "flip.pt")["training"]["step"]
    assert step == len(losses_of(tmp_path / "out")) > 0
    Image.new("RGB", (178, 218)).save(tmp_path / "img_align_celeba" / "000012.jpg")
    train.train(dataclasses.replace(config, resume=True))
    assert len(losses_of(tmp_path / "out")) == 30


# ---- README.md -----------------------------------------------------------------------------------------------------
def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_every_command_of_the_readme_works(tmp_path):
    """As written, but on less data, with stand-ins for what would be downloaded; the recipe for eight GPUs is only parsed."""
    (tmp_path / "DIR").mkdir()
    write_celeba(tmp_path / "DIR", count=40)
    torch.manual_seed(0)
    official_like = FLIP(FLIPConfig(ViTConfig(32, 8, 64, 1, 1), BertConfig(81, 64, 1, 1, 66), 16, 4))
    torch.save({"model": official_state(official_like)}, tmp_path / "FLIP-base.pth")
    (tmp_path / "vocab.txt").write_text(str(RECORDED["vocab"]))
    quick_run = "--faces 64 --validation 20 --steps 4 --batch_size 8"
    ran = set()
    for command in readme_commands():
        program, *arguments = shlex.split(command)
        if program == "torchrun":
            train.parse_arguments(arguments[arguments.index("train.py") + 1:])
        if program == "python" and arguments[0] == "-m":
            assert arguments[1] == "kernels.bench"              # has tests of its own
        elif program == "python":
            script = arguments[0]
            more = {"train.py": quick_run, "toyfaces.py": "--count 8", "finetune.py": "--faces 16 --validation 3 --test 6 --epochs 1"}.get(script, "").split()
            arguments = ["vocab.txt" if argument == "bert-base-uncased" else argument for argument in arguments[1:] + more]
            result = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0, (command, result.stderr)
        ran.add(program)
    assert ran == {"pip", "python", "pytest", "torchrun"}


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """`python train.py`: its configuration and metrics."""
    folder = tmp_path_factory.mktemp("default")
    config = train.parse_arguments(["--out", str(folder / "out"), "--cache", str(folder / "cache")])
    return config, train.train(config)[1]


@pytest.mark.slow
def test_the_default_run_finds_faces_at_least_85_percent_as_well_as_knowing_all_attributes_does(default_run):
    """Text to image, at 5 and at 10, in the ten minutes that the README promises on two cores."""
    config, metrics = default_run
    consistency = train.Validation.of(train.open_data(config)[1]).references["consistency"]
    assert 60 <= consistency[1] <= 80
    assert metrics["img_r5"] >= 0.85 * consistency[1] and metrics["img_r10"] >= 0.85 * consistency[2]


def in_the_middle(sketch):
    """The drawn pixels moved so that their mean is the middle of the picture."""
    y, x = np.nonzero(sketch > 64)
    shift = [round((size - 1) / 2 - places.mean()) if len(places) else 0 for size, places in zip(sketch.shape, (y, x))]
    return np.asarray(Image.fromarray(sketch).rotate(0, translate=shift[::-1]))


@pytest.mark.slow
def test_a_sketch_gives_away_where_its_photo_has_the_head_and_else_only_what_it_shows(default_run, tmp_path):
    """The figures of the README on how early a photo is found; `pytest -m slow -k gives_away -s` prints them."""
    origin, _ = default_run
    config = finetune.parse_arguments(["sketch", "--checkpoint", f"{origin.out}/flip.pt", "--no-random", "--cache", origin.cache,
                                       "--out", str(tmp_path)])
    finetune.finetune(config)
    model = finetune.freeze(FLIP.from_pretrained(tmp_path / "sketch" / "flip.pt"))
    episodes = finetune.open_episodes(config, "test", model.config.vit.image_size)

    def percentiles(title, sketches):
        samples = finetune.encode_sketches(model, data.Episodes(episodes.photos, sketches), config, for_training=False)
        found = finetune.sketch_metrics(finetune.FLIPHead(model), samples)
        print(title, f"m@A {found['m@A']:.1f} m@B {found['m@B']:.1f}", {step: round(found["A"][step - 1], 1) for step in (1, 2, 3, 7, 14, 35, 70)})
        return np.array(found["A"])
    sketches = np.asarray(episodes.sketches)
    drawn = percentiles("as drawn", sketches)
    assert drawn[0] < 65 < 70 < drawn[6] and drawn[-1] >= 90
    moved = percentiles("in the middle", np.stack([[in_the_middle(sketch) for sketch in steps] for steps in sketches]))
    assert abs(moved[:3] - 50).max() < 7 and moved[-1] < 80             # by chance 50, with a standard error of 2
    assert abs(percentiles("another person's", np.roll(sketches, 1, axis=0)) - 50).max() < 7

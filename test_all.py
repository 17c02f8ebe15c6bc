"""What is claimed of this project, file by file: `pytest test_all.py`.

Numbers are held against something that we did not write: golden.npz (recorded from the official
code at a small size, with random weights and dropout 0), torch's own modules, closed forms. `pytest
-m slow` runs the long ones. """
import ast
import copy
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"    # before Triton is imported: its kernels take CPU tensors, slowly

import bench
import bert
import captions as grammar
import config as train_config
import data
import evaluation
import finetune
import losses
import report
import search
import tasks
import toyfaces
import train
import vit
from bert import Bert, BertConfig, Captions, Tokenizer, clean_caption, load_bert
from captions import ATTRIBUTES, FACTS
from common.images import (
    MEAN,
    TarImage,
    contact_sheet,
    load_image,
    normalize_batch,
    read_image_size,
    resize_to_array,
)
from common.optim import Muon, build_optimizers, newton_schulz
from common.resume import Log, save
from common.script import run_script, temporary_memmap
from common.weights import BERT_KEYS, CLIP_KEYS, map_key, resize_position_embedding, write_checkpoint
from drawing import portrait
from drawing import sketch as drawing_sketch
from flip import FLIP, FLIPConfig, StepParams, official_name, official_state, rerank
from kernels import attention as attention_file
from kernels import contrastive as contrastive_file
from kernels.attention import Sequences, attention
from kernels.contrastive import contrastive_loss
from readers import index, tars
from vit import ViT, ViTConfig, load_clip

torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)    # with several, sums are added up in no fixed order, and equal runs differ
ROOT = Path(__file__).parent
RECORDED = dict(np.load(ROOT / "golden.npz"))
GOLDEN = {name: torch.from_numpy(value) for name, value in RECORDED.items() if value.dtype.kind != "U"}
SENTENCES, SHAPES = (json.loads(str(RECORDED[name])) for name in ("captions", "base_shapes"))
GOLDEN_CONFIG = FLIPConfig(ViTConfig(image_size=32, patch_size=8, width=24, depth=4, heads=3),
                           BertConfig(vocab_size=81, width=20, depth=3, heads=2, positions=66, dropout=0.0),
                           embed_dim=12, queue_size=8)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.detach().to(expected.dtype), expected, rtol=0, atol=tolerance)


def error_of(call, *args, **kwargs):
    """The one sentence with which a call refuses its input."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """What compiles all kernels, if the last test is to be run, beside the tests before it: in a
    process of its own, since this one may be running Triton's interpreter."""
    if not any("every_shipped_kernel" in item.name for item in request.session.items):
        yield
        return
    command = [sys.executable, "bench.py", "--compile-only"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


# ---- kernels/attention.py ------------------------------------------------------------------------
OWN = [1, 5, 16, 17, 64, 65, 0], [1, 5, 16, 17, 64, 65, 0]                      # the last: an empty caption
OTHERS = [17, 24, 0], [65, 10, 7]                                                   # nobody reads the third
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}                              # half: w is rounded, too
TOLERANCE |= {torch.bfloat16: 8e-3} if DEVICE == "cuda" else {}                     # interpreted, it errs
EVERY_PATH = pytest.mark.parametrize("path, dtype", [
    ("pytorch", torch.float32), *(("triton", dtype) for dtype in TOLERANCE)], indirect=["path"])


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    """Where: with PyTorch alone, or with the kernels, on a GPU or in Triton's interpreter."""
    if request.param == "pytorch":
        return "cpu"
    if DEVICE == "cpu":             # the interpreter takes CPU tensors
        triton_sums = contrastive_file.triton_sums
        monkeypatch.setattr(attention_file, "uses_triton", lambda query: True)
        monkeypatch.setattr(contrastive_file, "uses_triton", lambda feature: True)
        monkeypatch.setattr(contrastive_file, "triton_sums", lambda *case: triton_sums(*case, programs=8))
    return DEVICE


def packed(query_lengths, key_lengths, device=DEVICE, dtype=torch.float32, channels=16):
    """(q, k, v) of two heads, (queries, keys), and a gradient by the result of attention."""
    torch.manual_seed(0)
    queries, keys = Sequences.from_lengths(query_lengths, device), Sequences.from_lengths(key_lengths, device)
    tokens = queries.num_tokens, keys.num_tokens, keys.num_tokens, queries.num_tokens
    *inputs, grad = (torch.randn(n, 2, channels).to(device, dtype) for n in tokens)
    return [x.requires_grad_() for x in inputs], (queries, keys), grad


def with_gradients(out, inputs, grad=None):
    return out, *torch.autograd.grad(out, inputs, grad)


def attended(inputs, sequences, grad, dropout=0.0):
    """(o, dq, dk, dv); dropout draws the same each time."""
    torch.manual_seed(7)
    return with_gradients(attention(*inputs, *sequences, dropout=dropout), inputs, grad)


def expected_attention(inputs, sequences, grad, factors=itertools.repeat(1.0)):
    """(o, dq, dk, dv) by float64 autograd through the definition, sequence by sequence;
    factors: what dropout multiplies the weights of each query sequence with."""
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    (queries, keys), out = sequences, []
    for i, factor in zip(range(len(queries)), factors):
        rows, columns = slice(*queries.offsets[i:i + 2]), slice(*keys.offsets[i:i + 2])
        weights = (torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights * factor, v[columns]))
    return with_gradients(torch.cat(out), exact, grad.double())


def agree(found, expected, tolerance):
    """Relative to the size of the whole, for each tensor."""
    for x, exact in zip(found, expected, strict=True):
        assert x.isfinite().all()
        assert (x.double() - exact).norm() <= tolerance * exact.norm()


@EVERY_PATH
@pytest.mark.parametrize("lengths, channels", [
    (OWN, 16), (OWN, 24), (OTHERS, 32), (([197], [197]), 64), (([0, 32], [16, 197]), 128),
    (([4, 3], [0, 5]), 16), (([5, 5, 5], [5, 5, 5]), 8), (([1, 1, 1], [4, 9, 2]), 8), (([9, 7], [7, 7]), 8)])
def test_attention_and_its_gradients_equal_float64_autograd(path, dtype, lengths, channels):
    case = packed(*lengths, path, dtype, channels)
    agree(attended(*case), expected_attention(*case), TOLERANCE[dtype])


@EVERY_PATH
def test_dropout_drops_its_share_of_weights_forward_and_backward_alike_and_rescales_the_others(path, dtype):
    """With equal scores and the identity for values, o shows which weights were dropped; with these
    the definition must give what any other scores give, gradients included."""
    inputs, sequences, grad = packed([65, 9, 100], [128, 70, 30], path, dtype, channels=128)
    q, k, v = inputs
    identity = torch.cat([torch.eye(n, 128) for n in (128, 70, 30)]).to(v)[:, None].expand_as(v)
    torch.manual_seed(7)
    shown, other = (attention(q * 0, k, identity, *sequences, dropout=0.3) for _ in range(2))
    factors = [(o[..., :n].transpose(0, 1) > 0).double() / 0.7                              # (H, Lq, n)
               for o, n in zip(shown.split([65, 9, 100]), (128, 70, 30))]
    share = torch.cat([factor.flatten() for factor in factors]).bool().double().mean()
    assert share == pytest.approx(0.7, abs=0.015)                                           # 5 deviations
    assert not torch.equal(other, shown), "another seed drops others"
    expected = expected_attention(inputs, sequences, grad, factors)
    agree(attended(inputs, sequences, grad, 0.3), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("first, second", [(0.1, 0.1), (0.0, 2.0 ** -40)])
def test_the_attention_kernels_give_equal_bits_where_they_drop_the_same(path, first, second):
    """2 ** -40 goes the way of dropout and keeps everything: so dropout of 0 is exact."""
    case = packed(*OTHERS)
    assert all(map(torch.equal, attended(*case, first), attended(*case, second)))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_attention_operators_keep_torchs_rules(dropout):
    inputs, (queries, keys), grad = packed(*OTHERS)
    told = queries.offsets, keys.offsets, queries.max_length, keys.max_length, dropout, torch.tensor(2 ** 40)
    torch.library.opcheck(attention_file.attention_forward, (*inputs, *told))
    saved = [x.detach() for x in (grad, *inputs, *attention_file.attention_forward(*inputs, *told))]
    torch.library.opcheck(attention_file.attention_backward, (*saved, *told))


def test_attention_refuses_sequences_that_do_not_fit_the_tokens():
    inputs, (queries, keys), _ = packed(*OTHERS)
    joined = queries.merge_groups(torch.tensor([1, 2]))
    assert "41 queries for 2 sequences of 41 tokens" in error_of(attention, *inputs, joined, keys)
    assert "40 queries for 3 sequences" in error_of(attention, inputs[0][1:], *inputs[1:], queries, keys)


def test_it_does_not_matter_to_a_token_who_else_reads_the_image():
    """Captions that read one image, taken for one sequence, against each with a copy of the image."""
    (q, k, v), (captions, images), _ = packed([3, 17, 20, 1], [65, 10, 7])
    k_of, v_of = (torch.cat([x.split([65, 10, 7])[i] for i in (0, 1, 1, 1)]) for x in (k, v))
    together = attention(q, k, v, captions.merge_groups(torch.tensor([1, 3, 0])), images)
    close(together, attention(q, k_of, v_of, captions, Sequences.from_lengths([65, 10, 10, 10], DEVICE)))


def test_attention_computes_in_the_type_of_autocast():
    inputs, sequences, _ = packed(*OTHERS)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert attention(*inputs, *sequences).dtype == torch.bfloat16


# ---- kernels/contrastive.py ----------------------------------------------------------------------
def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def contrastive_case(B=20, Q=300, E=32, temperature=0.07, dtype=torch.float32):
    """All but alpha. Momentum features lie close to their keys; people recur in batch and queue."""
    torch.manual_seed(0)
    feature, momentum, noise, queue = (
        x.to(DEVICE) for x in (unit(B, E), unit(B, E), torch.randn(B, E), unit(Q, E)))
    keys = [piece.to(dtype) for piece in (F.normalize(momentum + 0.1 * noise, dim=-1), queue)]
    people = [(torch.arange(B) // 2).to(DEVICE), torch.randint(0, 50, (Q,)).to(DEVICE)]
    return feature, momentum, keys, people[0], people, torch.tensor(temperature, device=DEVICE)


def expected_contrastive(feature, momentum, keys, identity, key_identity, temperature, alpha):
    """(loss, dq, dtau) by float64 autograd through torch's own cross-entropy; its target: an even
    share for the same person's keys, mixed with the momentum encoder's softmax."""
    q, tau = exact = [x.detach().double().requires_grad_() for x in (feature, temperature)]
    k, same = torch.cat(keys).double(), (identity[:, None] == torch.cat(key_identity)).double()
    opinion = (momentum.double() @ k.T / tau.detach()).softmax(1)
    target = (1 - alpha) * same / same.sum(1, keepdim=True) + alpha * opinion
    return with_gradients(F.cross_entropy(q @ k.T / tau, target), exact)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
@pytest.mark.parametrize("shape, programs, dtype", [
    ((20, 300, 32), 1, torch.float32), ((5, 40, 12), 12, torch.float32), ((2, 33, 96), 4, torch.float32),
    *(((20, 300, 32), 12, dtype) for dtype in TOLERANCE)])
def test_the_contrastive_kernel_its_plain_twin_and_the_direct_form_equal_float64_autograd(
        shape, programs, dtype, temperature, alpha):
    """Keys may be in half precision: rounded on being stored, but computed with exactly."""
    feature, momentum, keys, identity, key_identity, tau = case = contrastive_case(*shape, temperature, dtype)
    expected = expected_contrastive(*case, alpha)
    by_kernel = contrastive_file.triton_sums(*case, programs)
    for sums in (by_kernel, contrastive_file.torch_sums(*case, chunk=16)):
        agree(contrastive_file.loss_and_gradients(sums, feature, tau, alpha), expected, 1e-5)
    direct = losses.contrastive_loss_reference(feature, momentum, torch.cat(keys).float(), identity,
                                        torch.cat(key_identity), tau, alpha)
    agree([direct], expected[:1], 1e-5)


def test_pieces_of_keys_merge_into_the_whole_in_any_order_and_empty_ones_do_not_count():
    feature, momentum, keys, identity, key_identity, tau = case = contrastive_case()
    pieces, people = ([queue[150:], batch, queue[:150], queue[:0]] for batch, queue in (keys, key_identity))
    in_pieces = contrastive_loss(feature, momentum, pieces, identity, people, tau, 0.4)
    close(in_pieces, contrastive_loss(*case, 0.4), 1e-6)


def test_gradients_reach_feature_and_temperature_through_the_operator_and_it_keeps_torchs_rules():
    case = *contrastive_case(), 0.4
    inputs = [case[i].requires_grad_() for i in (0, 5)]
    found = with_gradients(3 * contrastive_loss(*case), inputs)
    agree(found, [3 * exact for exact in expected_contrastive(*case)], 1e-5)
    torch.library.opcheck(contrastive_file.contrastive_forward, case)


def test_the_contrastive_loss_stays_in_float32_under_autocast_and_from_half_precision_features():
    feature, momentum, *others = *contrastive_case(temperature=0.01), 0.4
    half = feature.bfloat16(), momentum.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = contrastive_loss(half[0].float(), half[1].float(), *others)
    assert found.dtype == torch.float32 and torch.equal(found, contrastive_loss(*half, *others))


def test_the_memory_of_the_contrastive_loss_does_not_grow_with_the_queue():
    """At B 80, Q 61,440, E 256 no operator allocates 10 MB; the logits alone would be 20 MB."""
    def largest(Q):
        case = bench.contrastive_inputs(80, Q, 256)
        with torch.profiler.profile(profile_memory=True) as profile:
            with_gradients(contrastive_loss(*case), (case[0], case[5]))
        return max(event.self_cpu_memory_usage + event.self_device_memory_usage for event in profile.events())
    assert 0 < largest(61_440) < 10e6
    assert DEVICE == "cuda" or largest(61_440) == largest(6_144)


# ---- bench.py ----------------------------------------------------------------------------
def test_the_bench_prints_its_tables(monkeypatch, capsys):
    """Small, each once, and without the compiler."""
    monkeypatch.setattr(bench, "attention_cases", lambda images, cases=bench.attention_cases: cases(2))
    monkeypatch.setattr(bench, "milliseconds", lambda call: (call(), (1.0, 1.0, 1.0))[1])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bench.bench_attention()
    bench.bench_contrastive(B=4, Q=50, E=16)
    printed = capsys.readouterr().out
    assert ("1.00) | - |" in printed) == (DEVICE == "cpu"), "memory is measured on a GPU only"
    assert printed.count("| ours | 1.00") == 4 and printed.count("| SDPA, math, padded | 1.00") == 3
    assert len(re.findall(r"\d\.\de-\d\d", printed)) >= 3 * 4 + 2 * 3


@pytest.mark.parametrize("name, sizes", [("step", dict(B=4)), ("rerank", dict(images=5, texts=7, k=3))])
def test_the_straightforward_step_and_reranking_give_what_ours_give(monkeypatch, capsys, name, sizes):
    """The bench refuses to time what differs."""
    bench.BENCHES[name](dataclasses.replace(GOLDEN_CONFIG, queue_size=40), **sizes, repeats=1)
    assert "| baseline" in capsys.readouterr().out
    monkeypatch.setattr(bench, "baseline_logits", lambda _, tokens, captions: torch.eye(2)[[0] * len(captions)])
    with pytest.raises(AssertionError, match="not close"):
        bench.BENCHES[name](GOLDEN_CONFIG, **sizes, repeats=1)


def test_without_triton_everything_else_works():
    """As on a Mac: importing it fails."""
    code = "import sys; sys.modules['triton'] = None; import torch, train; print(train.FLIP.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "FLIP\n"


# ---- vit.py, bert.py ---------------------------------------------------------------------------
def filled(theirs, ours, **parts):
    """torch's own layer with our weights, which are drawn anew, since many begin at 0 or 1."""
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    parts |= dict(self_attn=ours.attention, linear1=ours.up, linear2=ours.down, norm1=ours.norm_attention)
    for name, part in parts.items():
        state = part.state_dict()
        if isinstance(part, vit.Attention):
            for kind in ("weight", "bias"):
                joined = [state.pop(f"{role}.{kind}") for role in ("query", "key", "value")]
                state |= {f"in_proj_{kind}": torch.cat(joined), f"out_proj.{kind}": state.pop(f"out.{kind}")}
        getattr(theirs, name).load_state_dict(state)
    return theirs


def test_a_vit_block_equals_torchs_encoder_layer():
    block = vit.ViTBlock(ViTConfig(width=32, heads=4))
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, vit.quick_gelu, batch_first=True, norm_first=True)
    filled(theirs, block, norm2=block.norm_mlp)
    x = torch.randn(3, 7, 32)
    close(block(x.flatten(0, 1), Sequences.uniform(3, 7)), theirs(x).flatten(0, 1))


def test_text_layers_equal_torchs_decoder_layer_or_without_images_its_encoder_layer():
    layer = bert.BertLayer(BertConfig(width=32, heads=4, dropout=0.0), image_width=32)
    options = 32, 4, 128, 0.0, F.gelu, 1e-12, True
    alone = filled(nn.TransformerEncoderLayer(*options), layer, norm2=layer.norm_mlp)
    reading = filled(nn.TransformerDecoderLayer(*options), layer, multihead_attn=layer.cross_attention,
                     norm2=layer.norm_cross_attention, norm3=layer.norm_mlp)
    text, images = torch.randn(3, 6, 32), torch.randn(3, 9, 32)
    context = images.flatten(0, 1), Sequences.uniform(3, 9), None
    for reads, expected in ((None, alone(text)), (context, reading(text, images))):
        close(layer(text.flatten(0, 1), Sequences.uniform(3, 6), reads), expected.flatten(0, 1))


def test_dropout_is_active_in_training_and_off_in_evaluation():
    encoder, captions = small_flip(dropout=0.5).student.text, golden_captions("eval")
    for training in (True, False):
        encoder.train(training)
        assert torch.equal(encoder(captions), encoder(captions)) != training


def test_initial_values_are_clips():
    encoder = ViT(ViTConfig(image_size=32, patch_size=8, width=256, depth=6, heads=4))
    block = encoder.blocks[3]
    for parameter, std in ((encoder.patch_embedding.weight, 0.02), (encoder.positions, 0.02),
                           (encoder.class_token, 256 ** -0.5), (block.attention.out.weight, 256 ** -0.5),
                           (block.attention.query.weight, 256 ** -0.5 * 12 ** -0.5),
                           (block.up.weight, 512 ** -0.5), (block.down.weight, 256 ** -0.5 * 12 ** -0.5)):
        assert parameter.std().item() == pytest.approx(std, rel=0.15)


def clip_weights(encoder):
    """As CLIP on Hugging Face spells them, among those of its text half."""
    weights = {"vision_model." + map_key(name, CLIP_KEYS): tensor
               for name, tensor in encoder.state_dict().items()}
    official = recorded("checkpoint.visual_encoder.").keys() - {"vision_model.embeddings.position_ids"}
    assert weights.keys() == {name.replace("post_layrnorm", "post_layernorm") for name in official}
    return weights | {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(()),
                      "visual_projection.weight": torch.ones(2, 2),
                      "vision_model.embeddings.position_ids": torch.arange(17)[None]}


def test_clip_weights_load_under_the_names_that_hugging_face_gives_them(tmp_path):
    from safetensors.torch import save_file
    source, encoder, images = ViT(GOLDEN_CONFIG.vit), ViT(GOLDEN_CONFIG.vit), torch.randn(2, 3, 32, 32)
    save_file(clip_weights(source), tmp_path / "model.safetensors")
    load_clip(encoder, tmp_path)
    close(encoder(images), source(images), 0)


def test_clip_weights_for_another_image_size_have_their_position_table_resized(tmp_path):
    source, encoder = (ViT(dataclasses.replace(GOLDEN_CONFIG.vit, image_size=size)) for size in (32, 64))
    source.positions.data = torch.linspace(0, 1, 17)[:, None].repeat(1, 24)
    torch.save(clip_weights(source), tmp_path / "pytorch_model.bin")
    load_clip(encoder, tmp_path)
    grid = encoder.positions[1:].unflatten(0, (8, 8))
    close(encoder.positions[0], source.positions[0], 0)
    assert (grid[:, 1:] > grid[:, :-1]).all() and (grid[1:] > grid[:-1]).all(), "a rising table stays rising"
    close(grid.mean((0, 1)), source.positions[1:].mean(0), 1e-3)


@pytest.mark.parametrize("key, value, sentence", [
    ("epoch", 3, "expected tensors alone, found int under 'epoch'"), ("a", torch.ones(1), "a is unexpected"),
    ("vision_model.pre_layrnorm.bias", torch.ones(3), ": pre_layrnorm.bias has shape (3,), expected (24,)")])
def test_weights_that_do_not_fit_are_named_as_in_the_file_and_none_is_loaded(tmp_path, key, value, sentence):
    encoder = ViT(GOLDEN_CONFIG.vit)
    before = copy.deepcopy(encoder.state_dict())
    torch.save(clip_weights(ViT(GOLDEN_CONFIG.vit)) | {key: value}, tmp_path / "pytorch_model.bin")
    assert sentence in error_of(load_clip, encoder, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_bert_weights_load_with_token_type_zero_folded_in_and_new_parts_left_alone(tmp_path):
    encoder, source = (Bert(GOLDEN_CONFIG.bert, image_width=24) for _ in range(2))
    own, theirs = copy.deepcopy(encoder.state_dict()), source.state_dict()
    weights = {map_key(name, BERT_KEYS): x for name, x in theirs.items() if "cross_attention" not in name}
    official = {name for name in recorded("checkpoint.text_encoder.") if "crossattention" not in name}
    assert weights.keys() | {"embeddings.position_ids"} == official
    types = torch.randn(2, 20)
    weights |= {"embeddings.word_embeddings.weight": theirs["words.weight"][:-2],
                "embeddings.token_type_embeddings.weight": types, "pooler.dense.weight": torch.ones(20, 20),
                "embeddings.position_ids": torch.arange(66)[None]}
    old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    saved = {"bert." + map_key(name, old): x for name, x in weights.items()}
    torch.save(saved | {"cls.predictions.bias": torch.ones(79)}, tmp_path / "pytorch_model.bin")
    load_bert(encoder, tmp_path)
    theirs["positions"] = theirs["positions"] + types[0]
    theirs["words.weight"] = torch.cat([theirs["words.weight"][:-2], own["words.weight"][-2:]])
    for name, found in encoder.state_dict().items():
        close(found, own[name] if "cross_attention" in name else theirs[name], 0)


def golden_tokenizer(folder):
    (folder / "vocab.txt").write_text(str(RECORDED["vocab"]))
    return Tokenizer.load(folder / "vocab.txt")


def golden_captions(part, index=...):
    """The recorded ids and masks of a part, packed."""
    ids, mask = GOLDEN[f"{part}.input_ids"][index], GOLDEN[f"{part}.attention_mask"][index].bool()
    return Captions(ids[mask], Sequences.from_lengths(mask.sum(-1)))


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json", "."])
def test_word_pieces_are_the_official_ones_from_either_file_and_from_a_folder(tmp_path, source):
    (tmp_path / "tokenizer.json").write_text(golden_tokenizer(tmp_path).to_json())
    tokenizer = Tokenizer.load(tmp_path / source)
    for part in ("train", "eval", "hard"):
        found, expected = tokenizer(SENTENCES[part]), golden_captions(part)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.sequences.lengths, expected.sequences.lengths)
    assert tokenizer.pieces(tokenizer(["She UNKNOWNWORD!"])) == ["[CLS]", "she", "[UNK]", "[SEP]"]


def test_a_trained_vocabulary_knows_its_words_and_is_the_same_every_time():
    captions = [grammar.sample_caption(a, np.random.default_rng(i))[0] for i, a in enumerate(random_faces(200))]
    assert Tokenizer.train(captions).to_json() == TOKENIZER.to_json()
    ids = TOKENIZER(captions).ids
    assert (ids != TOKENIZER.wordpiece.token_to_id("[UNK]")).all() and ids.max() < TOKENIZER.vocab_size - 2


def test_captions_are_cleaned_and_cut_as_officially():
    assert clean_caption('She (is) YOUNG!  With; a hat.\n') == "she is young with a hat"
    assert clean_caption("o'clock, pale") == "o'clock, pale"
    assert len(clean_caption("word " * 100).split()) == 65
    long = Tokenizer.train(["word"])(["word " * 100])
    assert long.sequences.max_length == 65 and long.ids[-1] == 3, "65 tokens, [SEP] the last"


# ---- losses.py ---------------------------------------------------------------------------------
@pytest.mark.parametrize("similarity, identity, temperature, hardness, expected", [
    ([[9, 9, 9], [0.1, 9, 0.4], [9, 9, 9]], [5, 6, 5], 0.001, 0.0, [[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]]),
    ([[9, 9, 9], [0.1, 9, 0.4], [9, 9, 9]], [5, 6, 5], 0.3 / np.log(3), 1.0,
     [[0, 1, 0], [0.25, 0, 0.75], [0, 1, 0]]),
    ([[1, -1], [-1, 1]], [5, 6], 0.001, 1.0, [[0, 1], [1, 0]])])    # exp(-2 / 0.001) would vanish beside 1
def test_negatives_are_other_people_drawn_evenly_at_hardness_0_and_by_softmax_among_them_at_1(
        similarity, identity, temperature, hardness, expected):
    similarity, identity = torch.tensor(similarity).float(), torch.tensor(identity)
    found = losses.hard_negative_probabilities(similarity, identity, temperature, hardness)
    close(found, torch.tensor(expected).float(), 1e-6)


def test_recall_counts_the_best_of_an_images_captions_and_ties_against_us():
    image_of_text = torch.tensor([0, 0, 1])
    image_to_text = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.7]])
    metrics = evaluation.retrieval_metrics(image_to_text, image_to_text.T, image_of_text)
    assert [metrics[name] for name in ("txt_r1", "txt_r5", "img_r1")] == pytest.approx([50, 100, 200 / 3])


# ---- flip.py: the official numbers -------------------------------------------------------------
def recorded(prefix):
    """What golden.npz has under names that begin so."""
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


@pytest.fixture
def official(tmp_path):
    """The official checkpoint, as a file in its own format, loaded."""
    path = tmp_path / "official.pth"
    torch.save({"model": recorded("checkpoint."), "optimizer": {}, "config": {}, "epoch": 0}, path)
    return FLIP.from_pretrained(path, GOLDEN_CONFIG)


def test_the_official_checkpoint_loads_with_nothing_missing_or_left_over_and_saves_back_the_same(official):
    saved = official_state(official)
    assert saved.keys() == recorded("checkpoint.").keys()
    for name, expected in recorded("checkpoint.").items():
        assert saved[name].dtype == expected.dtype and torch.equal(saved[name], expected), name


def test_another_image_size_resizes_the_position_embeddings_of_both_encoders(official, tmp_path):
    vit_config = dataclasses.replace(GOLDEN_CONFIG.vit, image_size=64)
    larger = FLIP.from_pretrained(tmp_path / "official.pth", dataclasses.replace(GOLDEN_CONFIG, vit=vit_config))
    for encoders in ("student", "momentum_encoder"):
        table, resized = (getattr(model, encoders).image.positions for model in (official, larger))
        close(resized, resize_position_embedding(table, 64), 0)


@pytest.mark.parametrize("first", ["enc", "cls"])
def test_tokens_features_and_logits_are_the_official_ones_computed_whole_or_for_first_tokens_alone(
        official, first):
    student, images, captions = official.eval().student, GOLDEN["eval.images"], golden_captions("eval")
    (tokens, hidden), firsts = student.image(images, return_hidden=True), captions.sequences.first_index.long()
    asked = captions.with_first_token(student.text.enc_id if first == "enc" else 2)
    joint, joint_alone = (student.text(asked, tokens, first_token_only=first_token_only) for first_token_only in (False, True))
    for name, found in (
            ("image_tokens", tokens), *((f"hidden.layer_{k}", hidden[k]) for k in range(3)),
            ("image_feat", student.image_tokens_and_features(images)[1]), ("image_feat", student.image_features(images)),
            ("text_feat", student.text_features(captions)),
            (f"itm_logits_{first}", official.matching_head(joint[firsts])),
            (f"itm_logits_{first}", official.matching_head(joint_alone))):
        close(found, GOLDEN[f"eval.{name}"])
    for name, found in (("text_tokens", student.text(captions)), (f"joint_tokens_{first}", joint)):
        close(found, GOLDEN[f"eval.{name}"][GOLDEN["eval.attention_mask"].bool()])


def official_step(model, part, identity, index=..., device="cpu"):
    """Momentum update and losses, which are the recorded ones, in the official order."""
    model.update_momentum(0.995)
    captions, alpha = golden_captions(part, index).to(device), GOLDEN[f"{part}.alpha"][index].item()
    out = model(GOLDEN[f"{part}.images"][index].to(device), captions, identity.to(device), StepParams(alpha))
    close(out.itc.cpu(), GOLDEN[f"{part}.loss_itc"][index])
    close(out.itm.cpu(), GOLDEN[f"{part}.loss_itm"][index])
    return out


def test_a_step_has_the_official_losses_gradient_norms_queue_and_momentum_weights(official, path):
    out = official_step(official.to(path).train(), "train", GOLDEN["train.pair_ids"], device=path)
    (out.itc + out.itm).backward()
    trained = {official_name(name): p for name, p in official.named_parameters() if p.requires_grad}
    norms = recorded("train.grad_norm.")
    assert trained.keys() == norms.keys()
    for name, p in trained.items():
        assert p.grad.norm().item() == pytest.approx(norms[name].item(), rel=1e-5, abs=1e-6), name
    for name, gradient in recorded("train.grad.").items():
        close(trained[name].grad.cpu(), gradient, 1e-5 * norms[name].item())
    official.enqueue(out.image_keys, out.text_keys, out.identity)
    state = official_state(official.cpu())
    for name, expected in recorded("after_step.").items():
        close(state[name], expected, 1e-6)


@pytest.mark.parametrize("path", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_ten_official_steps_with_a_queue_that_wraps_come_out_the_same(official, path):
    trained = [p for p in official.to(path).train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    for i in range(10):
        out = official_step(official, "run", torch.tensor([2 * i, 2 * i + 1]), i, path)
        optimizer.zero_grad()
        (out.itc + out.itm).backward()
        official.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizer.step()
        official.clamp_temperature()
    state = official_state(official.cpu())
    for name, expected in recorded("run.final.").items():
        close(state[name], expected)


def test_probabilities_of_negatives_and_the_loss_of_the_likeliest_are_the_official_ones(official):
    captions = golden_captions("hard")
    tokens, features = official.student.image_tokens_and_features(GOLDEN["hard.images"])
    similarity, likeliest = official.student.text_features(captions) @ features.T, []
    for cosines, name in ((similarity, "image_of_text"), (similarity.T, "text_of_image")):
        found = losses.hard_negative_probabilities(cosines, GOLDEN["hard.pair_ids"], official.temperature)
        close(found, GOLDEN[f"hard.probability_{name}"])
        likeliest.append(found.argmax(1))
        assert torch.equal(likeliest[-1], GOLDEN[f"hard.negative_{name}"])
    close(official.itm_loss(tokens, captions, *likeliest), GOLDEN["hard.loss_itm"])


@pytest.mark.parametrize("k, suffix", [(3, "_k"), (256, "")])
def test_reranked_scores_are_the_official_ones_when_read_from_cls_as_there_and_the_others_follow_by_cosine(
        official, monkeypatch, k, suffix):
    monkeypatch.setattr(Captions, "with_first_token", lambda captions, token: captions)
    captions = golden_captions("eval")
    tokens, features = official.eval().student.image_tokens_and_features(GOLDEN["eval.images"])
    similarity = (features @ official.student.text_features(captions).T).detach()
    scores = rerank(official, tokens, captions, similarity, k)
    for found, cosine, name in zip(scores, (similarity, similarity.T), ("i2t", "t2i")):
        theirs = GOLDEN[f"eval.score_{name}{suffix}"]               # -100: not re-ranked
        close(found, torch.where(theirs == -100, cosine - 100, theirs))
    if not suffix:
        theirs = json.loads(str(RECORDED["retrieval_metrics"]))
        assert evaluation.retrieval_metrics(*scores, torch.arange(8)) == pytest.approx(theirs)


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_a_matching_head_without_fault_ranks_by_the_probability_of_the_pair(hardness):
    """Whatever ITC thinks: the score takes back how negatives were drawn."""
    torch.manual_seed(0)
    model = FLIP(dataclasses.replace(GOLDEN_CONFIG, hardness=hardness))
    truth, cosine, identity = torch.rand(5, 5), torch.rand(5, 5) * 2 - 1, torch.arange(5)
    q = losses.hard_negative_probabilities(cosine, identity, model.temperature, hardness)
    log_odds = (truth / q).log()
    score = model.rerank_score(torch.stack([torch.ones(5, 5), 1 + log_odds], -1), cosine)
    for row in range(5):
        others = identity != row            # a pair is never drawn as its own negative
        found = score[row, others] - truth[row, others].log()
        close(found, found[:1].expand(4), 1e-4)


def test_base_has_the_papers_223453187_parameters_and_all_1049_official_names_load_and_save_back(tmp_path):
    with torch.device("meta"):
        model = FLIP(FLIPConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 223_453_187
    whole = "_ids", "idx_queue", "ptr_queue"
    zeros = {name: torch.zeros((), dtype=torch.int64 if name.endswith(whole) else torch.float32).expand(shape)
             for name, shape in SHAPES.items()}             # each is one number in the file
    torch.save({"model": zeros}, tmp_path / "FLIP-base.pth")
    loaded = FLIP.from_pretrained(tmp_path)                 # the folder will do
    assert loaded.config == FLIPConfig()
    saved = official_state(loaded)
    assert len(saved) == 1049 and {name: list(tensor.shape) for name, tensor in saved.items()} == SHAPES


def test_the_large_model_has_the_large_vits_own_configuration():
    image_config, _, _ = train_config.MODELS["large"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ViT(image_config).parameters())
    assert (image_config.width, image_config.depth, image_config.heads) == (1024, 24, 16)
    assert parameters == 303_301_632 + 2 * 1024 - 1024      # torchvision's: a LayerNorm less, a patch bias


# ---- flip.py: state ----------------------------------------------------------------------------
def small_flip(queue_size=8, dropout=0.0):
    torch.manual_seed(0)
    text = dataclasses.replace(GOLDEN_CONFIG.bert, dropout=dropout)
    return FLIP(dataclasses.replace(GOLDEN_CONFIG, bert=text, queue_size=queue_size))


def test_a_batch_that_does_not_fit_before_the_end_of_the_queue_wraps():
    model = small_flip(queue_size=5)
    for first in (0, 3, 6):
        ids = torch.arange(first, first + 3)
        model.enqueue(ids[:, None].expand(3, 12).float(), -ids[:, None].expand(3, 12).float(), ids)
    assert model.queue_identity.tolist() == model.image_queue[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert model.text_queue[:, 3].tolist() == [-5, -6, -7, -8, -4] and model.queue_pointer.item() == 4


def test_forward_changes_nothing_and_the_temperature_is_clamped_by_the_loop(official):
    before, mode = copy.deepcopy(official.state_dict()), official.training
    official(GOLDEN["train.images"], golden_captions("train"), GOLDEN["train.pair_ids"])
    assert official.training == mode
    assert all(torch.equal(before[name], tensor) for name, tensor in official.state_dict().items())
    for value, expected in ((-1.0, 0.001), (0.07, 0.07), (3.0, 0.5)):
        official.temperature.data.fill_(value)
        official.clamp_temperature()
        assert official.temperature.item() == pytest.approx(expected)


@pytest.mark.parametrize("backend, dropout", [
    ("aot_eager", 0.0), ("aot_eager", 0.1), pytest.param("inductor", 0.0, marks=pytest.mark.slow)])
def test_the_model_compiles_into_one_graph_forward_and_backward(backend, dropout):
    """ITC of a batch, and judging its captions with its images."""
    def loss_of(images, captions, identity):
        judged = model.itm_logits(model.student.image_tokens_and_features(images)[0].flip(0), captions)
        return model(images, captions, identity, StepParams(with_itm=False)).itc + judged.square().sum()
    model, results = small_flip(dropout=dropout), []
    trained = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    for run in (torch.compile(loss_of, fullgraph=True, backend=backend), loss_of):
        torch.manual_seed(0)                # dropout draws the same
        loss = run(GOLDEN["eval.images"], golden_captions("eval"), torch.arange(8))
        results.append(with_gradients(loss, trained))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-8)


def test_negatives_are_drawn_with_their_probabilities():
    model, generator = small_flip(), torch.Generator().manual_seed(0)
    images, texts, identity = unit(4, 12), unit(4, 12), torch.tensor([1, 2, 1, 3])
    model.temperature.data.fill_(0.5)
    draws = [model.sample_negatives(images, texts, identity, 1.0, generator) for _ in range(3000)]
    for side, similarity in ((0, texts @ images.T), (1, images @ texts.T)):
        found = torch.stack([F.one_hot(draw[side], 4) for draw in draws]).double().mean(0)
        close(found.float(), losses.hard_negative_probabilities(similarity, identity, 0.5), 0.03)


def test_our_checkpoint_brings_model_configuration_and_vocabulary(tmp_path):
    model = FLIP(small_flip().config, golden_tokenizer(tmp_path))
    write_checkpoint(model.checkpoint(), tmp_path / "flip.pt")
    loaded = FLIP.from_pretrained(tmp_path / "flip.pt")
    assert loaded.config == model.config and loaded.tokenizer.to_json() == model.tokenizer.to_json()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_checkpoint({"model": 1}, tmp_path / "flip.pt")
    with pytest.raises(Exception):
        write_checkpoint({"model": lambda: None}, tmp_path / "flip.pt")     # cannot be pickled
    assert torch.load(tmp_path / "flip.pt") == {"model": 1} and len(list(tmp_path.iterdir())) == 1


# ---- toyfaces.py -------------------------------------------------------------------------------
def test_a_sketch_grows_from_a_seventieth_of_its_ink_and_never_loses_any():
    for i in range(20):
        frames = toyfaces.sketch(i, seed=3, size=48)
        assert frames.shape == (70, 48, 48) and frames.dtype == np.uint8
        assert (frames[1:] >= frames[:-1]).all()
        ink = frames.sum((1, 2)) / frames[-1].sum()
        assert 0.5 / 70 < ink[0] < 2.5 / 70         # a short line has round ends, a long one crosses others
        assert np.abs(ink - np.arange(1, 71) / 70).max() < 0.15


def test_a_sketch_is_the_same_drawing_at_every_size_and_however_finely_it_is_cut():
    for i in range(5):
        small, large = (toyfaces.sketch(i, size=size) for size in (56, 224))
        shrunk = large[-1].astype(float).reshape(56, 4, 56, 4).mean((1, 3))
        assert np.corrcoef(small[-1].ravel(), shrunk.ravel())[0, 1] > 0.95
        assert (toyfaces.sketch(i, size=56, steps=140)[1::2] == small).all()


def test_finished_sketches_tell_people_apart():
    sketches = np.stack([toyfaces.sketch(i, size=48)[-1].ravel() for i in range(60)])
    assert (np.corrcoef(sketches) - np.eye(60)).max() < 0.85


def test_the_ink_of_a_sketch_lies_on_the_edges_of_its_picture_and_not_of_another():
    def edges(i):
        """(96, 96) bool: some colour differs within one pixel."""
        picture = np.asarray(toyfaces.face(i, seed=2, size=96)[0]).astype(int)
        padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
        return np.ptp(windows, axis=(-2, -1)).max(-1) > 12
    sharp = [i for i in range(40) if not toyfaces.face(i, 2, 8)[1][ATTRIBUTES.index("Blurry")]]
    inked = [toyfaces.sketch(i, seed=2, size=96, steps=1)[0] > 128 for i in sharp]
    own = [edges(i)[ink].mean() for i, ink in zip(sharp, inked)]
    others = [edges(i)[ink].mean() for i, ink in zip(sharp[1:], inked)]
    assert min(own) > 0.9 and np.mean(own) > 0.97 and np.mean(others) < 0.65


def test_glasses_are_drawn_in_one_go_and_change_no_other_line():
    glasses = with_true("Eyeglasses")
    for i, attributes in enumerate(random_faces(10)):
        without, wearing = (drawing_sketch.stroke_points(*portrait.build_shapes(chosen, np.random.default_rng(i)))[0]
                         for chosen in (attributes & ~glasses, attributes | glasses))
        differs = (without != wearing[:len(without)]).any(1)
        first = differs.argmax() if differs.any() else len(without)
        assert first > len(without) / 3
        assert (wearing[len(wearing) - len(without) + first:] == without[first:]).all()


def test_every_part_of_a_portrait_is_drawn_by_some_face():
    parts = {shape.part for attributes in random_faces(300)
             for shape in portrait.build_shapes(attributes, np.random.default_rng(0))[1]}
    unseen = {"shade", "shine", "cheek", "makeup", "iris", "glint", "lid", "teeth"}
    assert set(drawing_sketch.ORDER_OF_PART) <= parts and parts - set(drawing_sketch.ORDER_OF_PART) == unseen


@pytest.mark.parametrize("arguments, sentence", [
    ("--out faces --count 0", "--count 0: expected at least 1"), ("--out a_file", "Not a directory: 'a_file"),
    ("--out faces --size 3", "--size 3: expected at least 8"), ("--sketch absent/s.png", "absent/s.png"),
    ("--out faces --seed -1", "--seed -1: expected at least 0"),
    ("--sheet sheet.txt", "sheet.txt: expected a file name ending in .jpg")])
def test_wrong_arguments_of_toyfaces_end_in_a_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    monkeypatch.setattr(sys, "argv", ["toyfaces.py", *arguments.split()])
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        run_script(toyfaces.main)


@pytest.mark.parametrize("count, sizes", [(20, [16, 2, 2]), (3, [1, 1, 1])])
def test_written_faces_open_as_celebas_splits_with_their_attributes_and_pixels(tmp_path, count, sizes):
    toyfaces.write_faces(tmp_path, count, size=24, seed=3)
    splits = parts_of(tmp_path)
    assert [len(split) for split in splits] == sizes
    for index, (split, i) in enumerate((split, i) for split in splits for i in range(len(split))):
        image, attributes = toyfaces.face(index, 3, 24)
        assert split.images[i].name == f"{index + 1:06}.png" and (split.attributes[i] == attributes).all()
        assert (np.asarray(split.picture(i)) == np.asarray(image)).all()


# ---- data.py: the caption grammar --------------------------------------------------------------
def random_faces(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([toyfaces.sample_attributes(rng) for _ in range(count)])


def with_true(*names):
    return np.isin(ATTRIBUTES, names)


def facts_read_back(text):
    """The facts a reader finds in a text, by looking for every phrase of the grammar's table."""
    text, found = text.lower(), set()
    for fact, phrases in zip(FACTS, grammar.PHRASES):
        for kind, words in phrases:
            pattern = re.escape(words.lower()).replace(r"\{his\}", "(his|her|their)")
            if kind in grammar.FACE_PARTS:      # "a big, pointy nose" or "her nose is pointy and big"
                others = "|".join(re.escape(w) for p in grammar.PHRASES for k, w in p if k == kind)
                pattern = (rf"\b{pattern}(, ({others}))* {kind}\b|"
                           rf"\b(his|her|their) {kind} (is|are) (({others}) and )*{pattern}\b")
            if re.search(rf"\b({pattern})\b", text):
                found.add(fact)
    for fact, pronouns in (("Male", "he|his"), ("not Male", "she|her")):
        if re.search(rf"\b({pronouns})\b", text):
            found.add(fact)
    return found


def test_a_caption_says_what_it_reports_and_nothing_else():
    rng = np.random.default_rng(1)
    for attributes in (*random_faces(3000), np.ones(40, dtype=bool)):       # even who has everything
        text, stated = grammar.sample_caption(attributes, rng)
        assert facts_read_back(text) == {FACTS[i] for i in np.flatnonzero(grammar.stated_facts(stated))}, text
        assert grammar.satisfies(stated[None], attributes[None]).all()


def test_every_phrase_of_the_grammar_reads_back_alone():
    for fact, phrases in enumerate(grammar.PHRASES):
        texts = [grammar.verbalize([fact], grammar.random.Random(seed)) for seed in range(100)]
        assert all(facts_read_back(text) == {FACTS[fact]} for text in texts)
        for kind, words in phrases:         # each was there, in both forms where it has two
            forms = [words.split("{his}")[0]]
            if kind in grammar.FACE_PARTS:
                forms = [f"{words} {kind}", f"{kind} {grammar.FACE_PARTS[kind][1]} {words}"]
            assert all(form.lower() in " ".join(texts).lower() for form in forms), words


def test_captions_have_the_lengths_and_the_variety_of_flips():
    rng = np.random.default_rng(2)
    words = [grammar.sample_caption(attributes, rng)[0].split() for attributes in random_faces(5000)]
    lengths = np.array([len(text) for text in words])
    assert lengths.min() >= 10 and lengths.max() <= 75 and 26 < lengths.mean() < 32
    assert 20 <= np.bincount(lengths // 3 * 3).argmax() + 1 <= 27
    assert len({gram for text in words for gram in zip(text, text[1:], text[2:], text[3:])}) > 25_000


@pytest.mark.parametrize("names", [
    ("Male", "Young"), ("Male", "Smiling", "Bald"), ("Bangs", "Blond_Hair", "Young")])
def test_log_likelihood_is_what_simulation_finds(names):
    """For all that captions of a face can state: probabilities add to 1, and agree with draws."""
    attributes, draws, rng = with_true(*names), 20_000, np.random.default_rng(0)
    seen = Counter(grammar.sample_caption(attributes, rng)[1].tobytes() for _ in range(draws))
    stated = np.array([np.frombuffer(key, dtype=np.int8) for key in seen])
    expected = np.exp(grammar.log_likelihood(stated, attributes[None]))[:, 0]
    observed = np.array(list(seen.values())) / draws
    assert abs(expected.sum() - 1) < 1e-3
    assert (abs(observed - expected) < 4.5 * np.sqrt(expected / draws)).all()


def test_log_likelihood_rules_out_faces_that_contradict_the_caption():
    faces = random_faces(300)
    stated = np.stack([grammar.sample_caption(attributes, np.random.default_rng(0))[1] for attributes in faces])
    fits = ((stated[:, None] == 0) | ((stated[:, None] > 0) == faces)).all(2)       # fact by fact
    assert (grammar.satisfies(stated, faces) == fits).all()
    assert (np.isfinite(grammar.log_likelihood(stated, faces)) == fits).all()


def test_recall_shares_ties_by_chance():
    scores = np.array([[0., 0, 0, 0], [2, 1, 1, 0], [3, 2, 1, 3], [0, 0, 0, 1]])
    recall = grammar.expected_recall(scores, k=(1, 2, 3))
    by_hand = {1: (1/4 + 0 + 0 + 1) / 4, 2: (2/4 + 1/2 + 0 + 1) / 4, 3: (3/4 + 1 + 0 + 1) / 4}
    assert recall == pytest.approx(by_hand)


def test_references_on_captions_worked_by_hand():
    """Two men: 'a bald young man' fits one, 'a young man' both, but leaves baldness unsaid."""
    attributes = np.stack([with_true("Male", "Young", "Bald"), with_true("Male", "Young")])
    references = grammar.reference_recall(attributes.astype(np.int8), attributes, k=(1,))
    assert references == {
        "attribute match": {"text_to_image": {1: (1 + 1 / 2) / 2}, "image_to_text": {1: 3 / 4}},
        "Bayes optimum": {"text_to_image": {1: 1.0}, "image_to_text": {1: 1.0}}}


def test_drawn_captions_are_as_hard_as_planned():
    faces, rng = random_faces(1000), np.random.default_rng(0)
    stated = np.stack([grammar.sample_caption(attributes, rng)[1] for attributes in faces])
    match, optimum = grammar.reference_recall(stated, faces).values()
    for direction in ("text_to_image", "image_to_text"):
        assert all(optimum[direction][k] > match[direction][k] for k in (1, 5, 10))
    assert 0.6 < match["text_to_image"][5] < 0.8


# ---- data.py: sets on disk ---------------------------------------------------------------------
def open_faces(path, split="train", **options):
    """data.open_faces, with an index beside the set."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return data.open_faces(path, split, cache=folder / "cache", **options)


def parts_of(folder):
    return [open_faces(folder, split) for split in ("train", "val", "test")]


def names_in(faces):
    return [path.stem for path in faces.images]


def write_pictures(folder, names, picture=lambda i: Image.new("RGB", (8, 8), (i % 256,) * 3)):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)
    return folder


def write_captions(folder, records=None, name="train.json"):
    write_pictures(folder / "images", [f"{i}.png" for i in range(4)],
                   lambda i: Image.new("RGB", (50, 60), (60 * i, 90, 60)))
    records = records or [{"image": f"{i}.png", "image_id": "ab"[i // 2],
                           "caption": [f"face {i}", f"the face {i}"]} for i in range(4)]
    (folder / name).write_text(records if isinstance(records, str) else json.dumps(records))
    return folder


def test_a_caption_list_is_read_with_its_identities(tmp_path):
    faces = open_faces(write_captions(tmp_path))
    assert [path.name for path in faces.images] == ["0.png", "1.png", "2.png", "3.png"]
    assert len(set(faces.identity[:2])) == len(set(faces.identity[2:])) == 1 < len(set(faces.identity))
    assert faces.captions[3] == ["face 3", "the face 3"] and faces.picture(1).size == (50, 60)
    assert {faces.caption(1, np.random.default_rng(s)) for s in range(20)} == {"face 1", "the face 1"}
    assert list(faces.subset([3, 1]).captions) == [faces.captions[3], faces.captions[1]]
    write_captions(tmp_path, [{"image": "0.png", "face_caption": "a face"}])        # the public card's word
    assert list(open_faces(tmp_path).captions) == [["a face"]]


def test_one_caption_list_is_split_so_that_a_person_is_in_one_part(tmp_path):
    records = [{"image": f"{i}.png", "image_id": i // 2, "caption": "a face"} for i in range(800)]
    write_pictures(tmp_path / "images", [f"{i}.png" for i in range(800)])
    write_captions(tmp_path, records, "all.json")
    for path in (tmp_path, tmp_path / "all.json"):
        parts = [set(faces.identity.tolist()) for faces in parts_of(path)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 400 and len(parts[0]) > 330


VALUES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


def write_celeba(folder, kaggle=False, count=6):
    """As it is distributed, or as Kaggle has it."""
    names, attributes = [f"{i + 1:06d}.jpg" for i in range(count)], random_faces(count)
    write_pictures(folder / "img_align_celeba" / ("img_align_celeba" if kaggle else "."), names,
                   lambda i: Image.new("RGB", (178, 218), (40 * i, 90, 60)))
    rows = [[name, *np.where(row, "1", "-1")] for name, row in zip(names, attributes)]
    parts = [[name, "0" if i < count - 2 else str(i - count + 3)] for i, name in enumerate(names)]
    if kaggle:
        quoted = [",".join(f'"{field}"' for field in row) for row in [["image_id", *ATTRIBUTES], *rows]]
        (folder / "list_attr_celeba.csv").write_text("\n".join(quoted))
        lines = ["image_id,partition", *(",".join(row) for row in parts)]
        (folder / "list_eval_partition.csv").write_text("\n".join(lines))
    else:
        lines = [f"{count}", " ".join(ATTRIBUTES) + " ", *("  ".join(row) for row in rows)]
        (folder / VALUES).write_text("\n".join(lines) + "\n")
        (folder / PARTITION).write_text("\n".join(" ".join(row) for row in parts) + "\n")
    return folder


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba_is_read_in_its_own_and_in_kaggles_layout(tmp_path, kaggle):
    attributes = random_faces(6)
    train, val, test = parts_of(write_celeba(tmp_path, kaggle))
    assert (train.attributes == attributes[:4]).all() and (test.attributes == attributes[5:]).all()
    assert len(val) == 1 and len(set(train.identity)) == 4
    assert val.picture(0).size == (178, 218) and val.images[0].name == "000005.jpg"
    text, _ = grammar.sample_caption(attributes[4], np.random.default_rng(0))
    assert val.caption(0, np.random.default_rng(0)) == text


def spoil_pictures(folder):
    """Cut the JPEG of face 1 short, make face 2 a text file, face 3 PostScript."""
    images = write_celeba(folder) / "img_align_celeba"
    noise = np.random.default_rng(0).integers(0, 255, (218, 178, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "000002.jpg")
    (images / "000002.jpg").write_bytes((images / "000002.jpg").read_bytes()[:9000])
    (images / "000003.jpg").write_text("not a picture")
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (images / "000004.jpg").write_text(postscript)          # Pillow would start Ghostscript
    return open_faces(folder, "train")


def test_a_damaged_picture_is_named_in_one_sentence_also_by_a_worker(tmp_path):
    faces = spoil_pictures(tmp_path)
    truncated, other = error_of(faces.picture, 1), error_of(faces.picture, 2)
    assert re.match("CelebA train, record 1: .*000002.jpg cannot be read: image file ", truncated)
    assert re.fullmatch("CelebA train, record 2: .*000003.jpg is not an image", other)
    with pytest.raises(ValueError, match=r".jpg .* \(3 of 4 are invalid, .* 1 percent\)$"):
        data.drop_unreadable(faces, 1.0, 16)
    assert len(data.drop_unreadable(faces, 75.0, 16)) == 1
    error = error_of(take, data.BatchLoader(faces, TOKENIZER, 16, 4, workers=1), 0, 1)
    assert re.match("CelebA train, record .: .*00000..jpg (cannot be read|is not an image).* .1 of 4", error)
    batch, = take(data.BatchLoader(faces, TOKENIZER, 16, 4, workers=1, max_errors=75.0), 0, 1)
    assert batch.errors.keys() == {1, 2, 3} and batch.identity.unique() == faces.identity[0]


def write_mm_celeba(folder, numbers=(*range(2, 42), 24000, 24001), pickles=False):
    write_pictures(folder / "images", [f"{n}.jpg" for n in numbers])
    (folder / "text/celeba-caption").mkdir(parents=True)
    for n in numbers:
        (folder / f"text/celeba-caption/{n}.txt").write_text(f"face {n}.\n\n  the face {n}.  \n")
    for part, names in (("train", ["2", "10.jpg", b"3", 4]), ("test", ["5"])) if pickles else ():
        (folder / part).mkdir()
        (folder / part / "filenames.pickle").write_bytes(pickle.dumps(names))
    return folder


def test_mm_celeba_is_split_by_number_or_by_pickled_lists_and_val_comes_off_the_training_part(tmp_path):
    train, val, test = parts_of(write_mm_celeba(tmp_path / "a"))
    assert names_in(train) == [str(n) for n in range(2, 40)]
    assert train.captions[8] == ["face 10.", "the face 10."]
    assert names_in(val) == ["40", "41"] and names_in(test) == ["24000", "24001"]
    train, val, test = parts_of(write_mm_celeba(tmp_path / "b", pickles=True))
    assert names_in(train) == ["2", "3", "4"] and names_in(val) == ["10"] and names_in(test) == ["5"]


def write_dialog(folder, records=(), images="images"):
    write_pictures(folder / images, [f"{n}.jpg" for n in (*range(39), 24000)])
    (folder / "captions_hq.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("images", ["images", "image", "."])
def test_celeba_dialog_is_read_from_any_image_folder(tmp_path, images):
    records = {f"{n}.jpg": {"overall_caption": f"face {n}"} for n in (*range(39), 24000)}
    parts = {"Bangs": "Short bangs.", "Young": "", "Smiling": "No smile."}
    records["1.jpg"] = {"overall_caption": " ", "attribute_wise_captions": parts}
    train, val, test = parts_of(write_dialog(tmp_path, records, images))
    assert [len(train), names_in(val), names_in(test)] == [37, ["37", "38"], ["24000"]]
    assert list(train.captions)[:2] == [["face 0"], ["Short bangs.  No smile."]]
    assert test.picture(0).size == (8, 8)


SHUFFLED = [ATTRIBUTES[i] for i in np.random.default_rng(5).permutation(40)]    # not in CelebA's order


def write_lfwa(folder):
    """Two pictures of each of 30 persons: names with backslashes, labels in SHUFFLED's order."""
    names = [f"P_{n // 2}\\P_{n // 2}_{n % 2 + 1:04d}.jpg" for n in range(60)]
    write_pictures(folder, [name.replace("\\", "/") for name in names])
    return names, random_faces(60)[:, [ATTRIBUTES.index(name) for name in SHUFFLED]]


def write_lfwa_lists(folder, below="lfw"):
    """The training list holds all pictures, the test's too, as the official one may."""
    names, rows = write_lfwa(folder / below)
    lines = [f"{name},{','.join(map(str, row))}" for name, row in zip(names, np.where(rows, 1, 0))]
    header = ",".join(["path", *(name.replace("_", " ").lower() for name in SHUFFLED)])
    (folder / "list_attr_lfwa.csv").write_text("\n".join([header, *lines]))
    (folder / "list_attr_lfwa_test.csv").write_text("\n".join([header, *lines[40:]]))
    return folder


def write_lfwa_matlab(folder, transposed=False, **changes):
    h5py = pytest.importorskip("h5py")
    names, rows = write_lfwa(folder / "lfw")
    matrix = rows.astype(float)
    matrix[~rows] = np.random.default_rng(0).integers(-1, 1, (~rows).sum())     # -1 and 0 mixed
    numbers = {"label": matrix, "indices_identity_train": [1], "indices_img_train": np.arange(1, 41),
               "indices_img_test": np.arange(41, 61)} | changes
    texts = {"name": names, "AttrName": [name.replace("_", " ") for name in SHUFFLED]}
    faces, parts = (h5py.File(folder / name, "w") for name in ("lfw_att_40.mat", "indices_train_test.mat"))
    with faces, parts:
        for variable, lines in texts.items():
            codes = [np.array([[ord(c)] for c in line], np.uint16) for line in lines]
            refs = [[faces.create_dataset(f"#refs#/{variable}{i}", data=code).ref]
                    for i, code in enumerate(codes)]
            faces.create_dataset(variable, data=refs, dtype=h5py.ref_dtype)
        for variable, value in numbers.items():     # HDF5 has MATLAB's axes reversed
            file = faces if variable == "label" else parts
            file[variable] = value if transposed else np.atleast_2d(value).T
    return folder


@pytest.mark.parametrize("write", [
    write_lfwa_lists, lambda d: write_lfwa_lists(d, "."), write_lfwa_matlab,
    lambda d: write_lfwa_matlab(d, transposed=True)])
def test_lfwa_is_read_from_lists_and_from_matlab_and_no_person_is_in_two_parts(tmp_path, write):
    train, val, test = parts = parts_of(write(tmp_path))
    assert len(train) + len(val) == 40 and len(test) == 20 and len(val) > 0
    people = [set(faces.identity) for faces in parts]
    assert len(set.union(*people)) == sum(map(len, people)) == 30
    for faces in parts:
        numbers = [name.split("_")[1:] for name in names_in(faces)]
        rows = [2 * int(person) + int(picture) - 1 for person, picture in numbers]
        assert (faces.attributes == random_faces(60)[rows]).all()


def test_an_lfwa_list_alone_keeps_persons_for_the_test(tmp_path):
    (write_lfwa_lists(tmp_path) / "list_attr_lfwa_test.csv").unlink()
    train, test = (set(open_faces(tmp_path, split).identity) for split in ("train", "test"))
    assert not train & test and len(test) > 8 and len(train) > 8


NO_PICTURE = {"000000003.jpg": b""}


def png_of(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_tar(folder, members={}, records=60, name="00000", **changes):
    """Records, two faces at each address; the changes are of record 3, `members` of the tar's."""
    grey, found = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8), {}
    picture = png_of(Image.fromarray(grey).convert("RGB"))
    for i in range(records):
        record = {"status": "success", "caption": [f"face {i}", f"the face {i}"], "pcfg": f"a face, {i}",
                  "box": f"[0, {i % 4}, 30, 20]", "url": f"http://{i // 2}"} | (changes if i == 3 else {})
        found |= {f"{i:09d}.jpg": picture, f"{i:09d}.txt": b"x", f"{i:09d}.json": json.dumps(record).encode()}
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for member, content in (found | members).items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            if content:
                tar.addfile(info, io.BytesIO(content))
    (folder / f"{name}_stats.json").write_text(json.dumps({"successes": records}))      # img2dataset's
    return folder


def test_a_download_in_tars_is_read_in_place_cropped_and_split_by_address(tmp_path, capsys):
    parts = parts_of(write_tar(tmp_path, NO_PICTURE, 200, status="failed_to_download"))
    names = [picture.name for faces in parts for picture in faces.images]
    assert len(names) == len(set(names)) == 199 and "000000003.jpg" not in names
    assert re.search("199 faces; invalid records skipped: 1, listed in .*[.]errors", capsys.readouterr().out)
    addresses = [{int(texts[0].split()[1]) // 2 for texts in faces.captions} for faces in parts]
    assert len(set.union(*addresses)) == sum(map(len, addresses)) == 100
    i = next(i for i, texts in enumerate(parts[0].captions) if int(texts[0].split()[1]) % 4 == 2)
    cropped = np.add.outer(np.arange(2, 20), np.arange(30))
    assert (np.asarray(parts[0].picture(i))[..., 0] == cropped).all()
    assert list(open_faces(tmp_path, columns=("pcfg",)).captions)[0] == ["a face, 0"]
    both = open_faces(tmp_path, columns=("caption", "pcfg"))
    assert both.captions[0] == ["face 0", "the face 0", "a face, 0"]


def test_every_face_comes_once_an_epoch_for_any_number_of_workers_and_processes(tmp_path):
    for name in "01":
        write_tar(tmp_path, records=100, name=name)
    faces = pickle.loads(pickle.dumps(open_faces(tmp_path)))        # as a worker that is not forked has it

    def shown(start=0, rank=0, world=1, workers=0):
        batches = data.BatchLoader(faces, TOKENIZER, 8, 10 // world, 3, rank=rank, world_size=world, workers=workers)
        seen = take(batches, start, batches.batches_per_epoch - start)
        return torch.cat([batch.identity for batch in seen]).tolist()
    whole = shown()
    assert len(set(whole)) == len(whole) == len(faces) // 10 * 10 > 160
    assert all(shown(workers=workers) == whole for workers in (1, 2, 4)) and shown(7, workers=2) == whole[70:]
    assert sorted(shown(rank=0, world=2, workers=1) + shown(rank=1, world=2)) == sorted(whole)


def test_a_tar_of_which_only_the_count_is_there_is_counted_and_a_picture_is_in_one_part(tmp_path):
    write_tar(tmp_path / "tars", records=90)
    (tmp_path / "tars/00001_stats.json").write_text('{"successes": 10}')
    assert "00001.tar holds fewer than counted (10 of 100 are invalid" in error_of(open_faces, tmp_path / "tars")
    for name, numbers in (("train.json", "01"), ("test.json", "002")):
        write_captions(tmp_path, [{"image": f"{n}.png", "caption": "a face"} for n in numbers], name)
    train, test = (open_faces(tmp_path, split, max_errors=50) for split in ("train", "test"))
    assert names_in(train) == ["0", "1"] and names_in(test) == ["2"]


def test_a_set_is_listed_once_until_it_changes_and_an_interrupted_listing_leaves_nothing(
        tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupt(*_, **__):
            raise KeyboardInterrupt
        patch.setattr(index, "index_records", interrupt)
        open_faces(write_mm_celeba(tmp_path / "mm"))
    assert not list((tmp_path / "mm/cache").iterdir())
    faces = open_faces(write_tar(tmp_path / "tars"))
    with monkeypatch.context() as patch:
        patch.setattr(tars, "read_tar", lambda tar, errors: pytest.fail("listed again"))
        again = open_faces(tmp_path / "tars")
    assert [*again.captions, *again.images] == [*faces.captions, *faces.images]
    content = (tmp_path / "tars/00000.tar").read_bytes()
    (tmp_path / "tars/00000.tar").write_bytes(content.replace(b"face", b"dear"))        # of the same size
    assert "dear" in open_faces(tmp_path / "tars").captions[0][0]


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "border", "center_crop"])
def test_a_box_is_where_it_was_in_the_original_however_img2dataset_resized(tmp_path, mode):
    """Its arithmetic: the shorter side (keep_ratio, center_crop) or the longer one (border) becomes
    256 pixels, then a square is padded with white or cut out."""
    members, rng = {}, np.random.default_rng(0)
    sizes = [(1024, 700), (640, 1000), (512, 512), (300, 280), (1600, 901), (200, 150)]
    for i, (W, H) in enumerate(sizes * 5):
        w, h = int(min(W, H) * rng.uniform(0.3, 0.5)), int(min(W, H) * rng.uniform(0.3, 0.5))
        x, y = (W - w) // 2 + int(rng.integers(-20, 20)), (H - h) // 2 + int(rng.integers(-20, 20))
        image = Image.new("RGB", (W, H), (0, 0, 200))
        image.paste((200, 0, 0), (x, y, x + w, y + h))              # the face is red
        scale = {"no": 1, "border": 256 / max(W, H)}.get(mode, 256 / min(W, H))
        image = image.resize((round(W * scale), round(H * scale)), Image.Resampling.BOX)
        if mode in ("border", "center_crop"):
            stored = Image.new("RGB", (256, 256), "white")
            stored.paste(image, (int((256 - image.width) / 2), int((256 - image.height) / 2)))
            image = stored
        record = {"status": "success", "caption": "a face", "url": f"http://{i}", "box": [x, y, x + w, y + h],
                  "width": image.width, "height": image.height, "original_width": W, "original_height": H}
        members |= {f"{i:09d}.jpg": png_of(image), f"{i:09d}.json": json.dumps(record).encode()}
    write_tar(tmp_path, members, records=0)
    for crop in open_faces(tmp_path).images:
        whole = np.asarray(crop._replace(box=()).open()).astype(int)
        rows, columns = np.nonzero((whole[..., 0] > 100) & (whole[..., 2] < 100))
        true = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(crop.box, true)).max() <= 1, (crop, true)


def test_half_broken_downloads_are_listed_and_the_rest_is_read(tmp_path):
    bomb = png_of(Image.new("1", (20_000, 20_000)))                 # 50 KB that would take 1.2 GB
    broken = {"000000001.jpg": b"no picture", "000000002.json": b"{", "000000005.jpg": bomb,
              "000000006.json": b'{"status": "success", "box": [90, 0, 99, 9], "caption": "x", "url": 1}',
              "000000007.json": b'{"status": "success", "box": [0, 0, 9, 9], "url": "x"}', "../8.jpg": b"x"}
    write_tar(tmp_path, broken | NO_PICTURE, records=100)
    whole = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        at = {member.name: member.offset for member in tar}
    header, end = at["000000020.jpg"], at["000000090.json"] + 700
    for damage in (bytes(512), b"x" * 512):
        (tmp_path / "00000.tar").write_bytes(whole[:header] + damage + whole[header + 512:end])
        assert "(19 of 102 are invalid, more than --max_errors 1 perc" in error_of(open_faces, tmp_path)
        assert len(open_faces(tmp_path, max_errors=20)) > 70
        (rows,), (errors,) = ((tmp_path / "cache").glob(f"*.{suffix}") for suffix in ("npy", "errors"))
        kinds = Counter(line.split(":")[0] for line in errors.read_text().splitlines())
        assert len(np.load(rows)) == 83 and kinds == {
            "damaged tar": 2, "incomplete face": 3, "json": 1, "image": 2, "box": 1, "captions": 1,
            "missing face": 9}
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("cases", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_face_of_a_damaged_tar_is_lost_without_being_counted(tmp_path, cases):
    """Cut, zeroed, flipped and repeated bytes anywhere; pictures and json exchanged for odd ones;
    names that point elsewhere."""
    rng, before = np.random.default_rng(1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    odd = [b"", b"{", b"[]", b"null", b"\xff" * 999, png_of(Image.new("1", (20_000, 20_000))), b"[" * 10**5,
           b'{"status": "success", "box": "[0, 0, 1e999, 9]", "caption": "x", "url": 3, "width": "a"}']
    names = ["000000003.jpg", "000000004.json", "../../x.jpg", "/x.json", "000000005.jpg/x.json", "x" * 99]
    for case in range(cases):
        members = {names[rng.integers(len(names))]: odd[rng.integers(len(odd))]} if case % 2 else {}
        write_tar(tmp_path / "tars", members, records=12)
        path = tmp_path / "tars/00000.tar"
        if case % 3:
            path.write_bytes(damaged(path.read_bytes(), rng))
        begin = time.perf_counter()
        rows, lines, errors = index.index_records(lambda errors: tars.read_tar(path, errors), index.COLUMNS[:1])
        assert 12 - len(errors) <= len(rows) <= 12 + len(members), (case, errors)
        for line in lines.splitlines():
            try:
                TarImage(path, *json.loads(line)["images"][1:]).open(16)
            except ValueError as error:
                assert "\n" not in str(error)
        assert time.perf_counter() - begin < 10, case
    assert {item.name for item in tmp_path.iterdir()} == {"tars"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "KB"


def test_a_reduced_decoding_shows_what_a_whole_one_shows(tmp_path):
    for i in range(6):
        toyfaces.face(i, 0, 900)[0].resize((1000, 900)).save(tmp_path / "face.jpg", quality=92)
        for box in (None, (40.4, 100.0, 990.2, 871.5)):
            whole = load_image(tmp_path / "face.jpg")
            plain = whole.resize((224, 224), Image.Resampling.BICUBIC, box)
            image = load_image(tmp_path / "face.jpg", box=box, size=224)
            assert np.abs(np.asarray(image).astype(int) - np.asarray(plain)).mean() < 1
    turned = Image.new("RGB", (400, 300), "white")
    turned.paste("black", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6                                                # to be turned by 90 degrees
    turned.save(tmp_path / "face.jpg", exif=exif)
    assert read_image_size(tmp_path / "face.jpg") == (400, 300)
    upright = load_image(tmp_path / "face.jpg", size=30)
    assert upright.getpixel((25, 3)) < (9, 9, 9) and upright.getpixel((3, 3)) > (246, 246, 246)
    as_stored = load_image(tmp_path / "face.jpg", box=(1, 1, 99, 99), size=16)
    assert np.asarray(as_stored).max() < 9


EPOCH = """
import json, os, sys, time
from pathlib import Path
import numpy as np, torch
import data, test_all

def own_memory(pid):            # in MB, without the pages of a mapped file that only it has read
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:"))) // 1024

torch.set_num_threads(1)
rank, world, workers, start = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *map(int, sys.argv[2:])
begin = time.time()
faces = data.open_faces(sys.argv[1], "train", cache=sys.argv[1] + "/cache")
opened, seen, memory = time.time() - begin, [], []
batches = data.BatchLoader(faces, test_all.TOKENIZER, 16, 500 // world, augmented=False, rank=rank, world_size=world,
                       workers=workers)
for n, batch in zip(range(start, batches.batches_per_epoch), batches.iterate_from(start)):
    seen.append(batch.identity)
    if n in (start + 5, batches.batches_per_epoch - 1):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        memory.append([own_memory(pid) for pid in (os.getpid(), *children)])
np.save(f"{sys.argv[1]}/cache/seen-{rank}.npy", torch.cat(seen))
print(f"opened in {opened:.3f} s; MB of its own, the loader's and its workers', at first and at last: "
      f"{memory}; an epoch in {time.time() - begin:.0f} s", flush=True)
"""


def epoch_of(folder, world, workers, start=0):
    """The identities that each process saw, and what they printed."""
    script = folder / "cache/epoch.py"          # beside the index: what is no data does not make it anew
    script.parent.mkdir(exist_ok=True)
    script.write_text(EPOCH)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    done = subprocess.run([*torchrun, script, folder, str(workers), str(start)],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [np.load(folder / f"cache/seen-{rank}.npy") for rank in range(world)]
    return seen, [line for line in done.stdout.splitlines() if "opened" in line]


def test_an_index_in_a_cache_within_the_set_stands_until_the_set_changes(tmp_path):
    write_celeba(tmp_path)
    for change, indexes in ((lambda: (tmp_path / "cache").mkdir(), 1),
                            (lambda: (tmp_path / "cache/notes.txt").write_text("of no set"), 1),
                            (lambda: (tmp_path / "img_align_celeba/new.jpg").write_text("a picture"), 2)):
        change()
        assert len(open_faces(tmp_path)) == 4
        assert len([*(tmp_path / "cache").glob("index-*.npy")]) == indexes


@pytest.mark.slow
def test_a_million_faces_are_indexed_once_and_cost_a_process_almost_nothing(tmp_path, capsys):
    """100 tars of 10,000 pictures of 32 pixels, two captions each as long as real ones."""
    rng, texts, jpegs = np.random.default_rng(0), [], []
    for attributes in random_faces(2000):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "jpeg")
        texts.append(grammar.sample_caption(attributes, rng)[0])
        jpegs.append(file.getvalue())
    for t in range(100):
        with tarfile.open(tmp_path / f"{t:05}.tar", "w") as tar:
            for i in range(10_000 * t, 10_000 * (t + 1)):
                record = {"status": "success", "url": f"http://{i}", "box": "[2, 3, 30, 31]",
                          "caption": [texts[i % 2000], texts[7 * i % 2000]]}
                for name, content in (("jpg", jpegs[i % 2000]), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{i:09}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    begin = time.time()
    faces = open_faces(tmp_path)
    indexed, known = time.time() - begin, np.sort(faces.identity)
    seen, lines = epoch_of(tmp_path, world=2, workers=2)
    assert len(np.unique(np.concatenate(seen))) == len(faces) // 500 * 500
    half = len(faces) // 500 // 2
    again, _ = epoch_of(tmp_path, world=2, workers=2, start=half)
    assert all((b == a[-len(b):]).all() for a, b in zip(seen, again))
    for workers in (1, 4):
        only, more = epoch_of(tmp_path, world=1, workers=workers)
        lines += more
        assert len(np.unique(only[0])) == len(only[0]) and np.isin(only[0], known).all()
    for memory in (json.loads(re.search(r"\[\[.*\]\]", line)[0]) for line in lines):
        assert max(np.subtract(memory[1], memory[0])) < 100, "MB, that grow over an epoch"
    with capsys.disabled():
        print(f"{len(faces):,} faces to train on, indexed in {indexed:.0f} s", *lines, sep="\n")


@pytest.mark.slow
def test_celeba_at_its_size_starts_in_seconds_and_takes_150_bytes_a_face(tmp_path, capsys):
    count, file = 202_599, io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "jpeg")
    names = [f"{i + 1:06}.jpg" for i in range(count)]
    (tmp_path / "img_align_celeba").mkdir()
    for name in names:
        (tmp_path / "img_align_celeba" / name).write_bytes(file.getvalue())
    rows = zip(names, np.where(random_faces(count), " 1", "-1"))
    (tmp_path / VALUES).write_text("\n".join([str(count), " ".join(ATTRIBUTES), *(
        f"{name} {' '.join(row)}" for name, row in rows)]))
    (tmp_path / PARTITION).write_text("\n".join(f"{name} {i % 3}" for i, name in enumerate(names)))
    times = []
    for _ in range(2):
        begin = time.time()
        faces = parts_of(tmp_path)
        times.append(time.time() - begin)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) / count
    assert sum(map(len, faces)) == count and size < 150 and times[1] < 3
    with capsys.disabled():
        print(f"all parts at first in {times[0]:.1f} s, then in {times[1]:.1f} s; {size:.0f} bytes a face")


# ---- data.py: photos with sketches -------------------------------------------------------------
def write_fs2k(folder):
    """Photos that share their numbers between folders; sketches dark on paper."""
    names = [f"photo{p}/image01{n:02d}" for p in (1, 2, 3) for n in range(10)]
    write_pictures(folder / "photo", [f"{name}.{'png' if name < 'photo2' else 'jpg'}" for name in names])
    write_pictures(folder / "sketch",
                   [f"{name.replace('photo', 'sketch').replace('image', 'sketch')}.png" for name in names],
                   lambda _: Image.fromarray(np.where(np.eye(8), 0, 255).astype(np.uint8)))
    for part, chosen in (("train", names[:20]), ("test", names[20:])):
        records = [{"image_name": name, "style": 0} for name in chosen[::-1]]
        (folder / f"anno_{part}.json").write_text(json.dumps(records))
    return folder


def test_fs2k_has_one_finished_sketch_of_each_photo_and_no_text(tmp_path):
    train, val, test = parts_of(write_fs2k(tmp_path))
    assert [len(train), len(val), len(test)] == [18, 2, 10] and train.sketch_steps == 1 and not train.has_text
    assert train.images[3] == tmp_path / "photo/photo1/image0103.png"
    assert val.images[1] == tmp_path / "photo/photo2/image0109.jpg"
    assert val.sketches[1] == [tmp_path / "sketch/sketch2/sketch0109.png"]
    white_on_black = 255 * np.eye(8, dtype=np.uint8)[..., None]
    assert (np.asarray(test.sketch(0, 0)) == white_on_black).all()


def write_sde(folder, style="{photo}_{step}", photo="photo1/image01{n:02d}", steps=12, count=20):
    names, sketches = [photo.format(n=n) for n in range(count)], []
    for n, name in enumerate(names):
        flat = name.replace("/", "_")
        sketches += [f"{'train' if n < 15 else 'test'}/" + style.format(
            photo=flat, stem=flat[-9:], path=name, step=step) + ".png" for step in range(1, steps + 1)]
    write_pictures(folder / "photo", [f"{name}.jpg" for name in names])
    return write_pictures(folder / "sketch", sketches, lambda i: Image.new("L", (8, 8), i % steps + 1)).parent


@pytest.mark.parametrize("style, photo", [
    ("{photo}_{step}", "photo1/image01{n:02d}"), ("{stem}_{step}", "photo1/image01{n:02d}"),
    ("{path}_{step}", "photo1/image01{n:02d}"), ("{photo}_{step}", "photo1_image01{n:02d}"),
    ("{stem}_{step}", "image01{n:02d}"), ("{path}/{step}", "image01{n:02d}"),
    ("{photo}_{step}", "deep/photo1/image01{n:02d}")])
def test_growing_sketches_find_their_photo_and_are_in_the_order_of_their_numbers(tmp_path, style, photo):
    train, val, test = parts_of(write_sde(tmp_path, style, photo))
    assert [len(train), len(val), len(test), train.sketch_steps] == [13, 2, 5, 12] and train.captions is None
    assert [path.stem[-9:] for path in val.images] == ["image0113", "image0114"]
    assert [train.sketch(2, t).getpixel((0, 0))[0] for t in range(12)] == list(range(1, 13))
    assert all(path.stem[-9:] in str(sketches[0]) for path, sketches in zip(test.images, test.sketches))
    assert list(train.subset([4, 2]).sketches) == [train.sketches[4], train.sketches[2]]


def test_photos_of_sketches_have_the_captions_of_a_list_beside_them(tmp_path):
    write_sde(tmp_path, count=16, steps=1)
    write_pictures(tmp_path / "photo", ["photo2/image0103.jpg"])
    records = [{"photo": f"photo/photo1/image01{n:02d}.jpg", "caption": [f"face {n}"] * 2} for n in range(15)]
    records += [{"image": f"{name}.jpg", "caption": "another"} for name in ("photo2/image0103", "x")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert list(open_faces(tmp_path).captions) == [[f"face {n}"] * 2 for n in range(13)]
    assert open_faces(tmp_path, "test").captions is None
    (tmp_path / "captions.json").write_text('[{"image": "image0115.jpg", "caption": "the last"}]')
    assert list(open_faces(tmp_path, "test").captions) == [["the last"]]


pickled = lambda folder: write_mm_celeba(folder, pickles=True)
MALICIOUS = b"cposix\nmkdir\n(S'malicious-pickle-ran'\ntR."          # os.mkdir("malicious-pickle-ran")
SKETCH, PICKLE = "sketch/train/photo1_image0104_7.png", "train/filenames.pickle"


@pytest.mark.parametrize("write, name, change, sentence", [
    (lambda d: d, "faces.parquet", b"", "*.json (JSON annotations), found none (FaceCaption-15M's .parq"),
    # what the validator refuses, whatever the layout
    (write_captions, "train.json", b"[]", "expected at least one face in this split, found {'train': 0"),
    (write_captions, "train.json", b'[{"caption": "a face"}]', "record 0 (counted from 0) names no image"),
    (write_captions, "images/3.png", None, "3.png does not exist (1 of 4 are invalid, more"),
    (write_captions, "train.json", b'[{"image": "0.png"}]', "/0.png): expected non-empty text captions (fou"),
    (write_captions, "train.json", (b'["face 0"', b'[7'), "/0.png): expected non-empty text captions"),
    (write_captions, "train.json", (b"the face 0", b" . !"), "(found ' . !')"),
    (write_captions, "train.json", (b"the face", rb"half a \ud800"), "(found 'half a \\ud800 0')"),
    (write_captions, "train.json", (b"the face", rb"binary \u0000"), "(found 'binary \\x00 0')"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg  2"), "/000002.jpg): expected 1, 0 or -1 for every"),
    (write_celeba, PARTITION, (b"3.jpg 0", b"2.jpg 2"), "test, found '0 and 2 in list_eval"),
    (pickled, "test/filenames.pickle", pickle.dumps(["2"]), "face 2: 2.jpg is already in split test"),
    (write_sde, SKETCH, None, "photo1/image0104.jpg has no step 7, unlike most"),
    (write_sde, SKETCH.replace("7", "13"), b"", "photo1/image0104.jpg has a step 13, unlike most"),
    # and what the readers do
    (write_captions, "train.json", b'["0.png"]', 'record 0 (counted from 0): expected {"image": path'),
    (write_captions, "train.json", b"{}", "train.json: expected a JSON list (found a dict)"),
    (write_captions, "train.json", b'[{"image" "0.png"}]', "train.json: expected a JSON list (Expecting ':'"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg"), "celeba.txt line 4: expected 40 values, found 39"),
    (write_celeba, VALUES, (b"Bald", b"Bold"), "line 2: expected CelebA's 40 attribute names, found 5_"),
    (write_celeba, VALUES, (b"6\n", b"7\n"), "line 8: expected 7 images, as the first line says, found 6"),
    (write_celeba, PARTITION, (b"000006.jpg 2\n", b""), "test, found 'none in list_eval_p"),
    (write_celeba, PARTITION, (b"6.jpg", b"6.jpg 2\n9.jpg"), "are missing from list_attr_celeba, the fi"),
    (write_celeba, PARTITION, None, "CelebA train: [Errno 2] No such file or directory: "),
    (pickled, PICKLE, MALICIOUS, "(UnpicklingError: import of posix.mkdir refused)"),
    (pickled, PICKLE, pickle.dumps(["2", "98", "99"]), "/98.jpg does not exist (2 of 4 are invalid"),
    (write_dialog, "captions_hq.json", b"[]", "captions_hq.json: expected a JSON dictionary"),
    (write_dialog, "captions_hq.json", b'{"0.jpg": "text"}', "record '0.jpg': expected \"0.jpg\": {\"ov"),
    (lambda d: write_tar(d, box=None), "x", b"", "00000.tar: 000000003.json: expected img2d"),
    (lambda d: write_tar(d, box="[9, 0, 9, 5]"), "x", b"", "(found box (9.0, 0.0, 9.0, 5.0) and url"),
    (lambda d: write_tar(d, box="[" * 100_000), "x", b"", "(RecursionError"),
    (lambda d: write_tar(d, {"000000003.json": b"{}"}), "x", b"", "'box'"),
    (lambda d: write_tar(d, NO_PICTURE), "x", b"", "00000.tar: 000000003 has no image (1 of"),
    (lambda d: write_lfwa_matlab(d, label=np.ones((50, 40))), "x", b"", "att_40.mat: expected a com"),
    (lambda d: write_lfwa_matlab(d, indices_img_train=np.arange(40)), "x", b"", "to 60 (KeyError: 0)"),
    (write_sde, "photo/photo1/image0104.jpg", None, "(KeyError: 'photo1_image0104')"),
    (lambda d: write_sde(d, "{stem}_{step}"), "photo/photo2/image0104.jpg", b"", "(KeyError: 'image0104')"),
    (write_sde, SKETCH.replace("7", "07"), b"", "_07.png has the same step)"),
    (write_sde, "sketch/train/image.png", b"", "image.png: expected image0110_7.png or, if not unique, photo1_im"),
    (write_sde, "train.json", b'[{"image": "image0101.jpg", "caption": "x"}]', "image0100.jpg): expected"),
    (write_sde, "train.json", b'[{"image": "1/image0101.jpg"}, {"image": "2/image0101.jpg"}]', "both match"),
    (write_fs2k, "sketch/sketch1/sketch0104.png", None, "FS2K train: anno_train.json record 15 (counted"),
])
def test_a_faulty_set_is_refused_with_one_sentence_and_no_pickle_runs(
        tmp_path, monkeypatch, write, name, change, sentence):
    """A file gets new content, or (what is replaced, with what), or is taken away: None."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path) / name
    if change is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes().replace(*change, 1) if isinstance(change, tuple) else change)
    assert sentence in error_of(open_faces, tmp_path)
    assert not (tmp_path / "malicious-pickle-ran").exists()


# ---- data.py: the report -----------------------------------------------------------------------
def test_the_grammar_read_backwards_finds_all_that_a_caption_states_and_nothing_else():
    rng = np.random.default_rng(0)
    for attributes in random_faces(300):
        text, stated = grammar.sample_caption(attributes, rng)
        assert (report.find_facts(text) == grammar.stated_facts(stated[None])[0]).all(), text
    officials = ("The man is chubby, with a slightly open mouth. He has a large nose, a goatee, a mustache, "
                 "an oval-shaped face, and a receding hairline.")
    assert {grammar.FACTS[n] for n in np.flatnonzero(report.find_facts(officials))} == {
        "Male", "Chubby", "Mouth_Slightly_Open", "Big_Nose", "Goatee", "Mustache", "Oval_Face",
        "Receding_Hairline"}


def test_a_report_counts_copies_damage_and_words(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 40, 3), dtype=np.uint8)
    records = [{"image": f"{i}.png", "caption": "a man with a hat and big eyes"[:20 + i]} for i in range(30)]
    write_pictures(tmp_path / "images", [f"{i}.png" for i in range(30)],
                   lambda i: Image.fromarray(pixels[max(i, 5)]).resize((60, 50)))
    (tmp_path / "images/29.png").write_text("no picture")
    (tmp_path / "train.json").write_text(json.dumps(records))
    arguments = ["report.py", "--data", tmp_path, "--cache", tmp_path / "cache", "--out", tmp_path / "page.png"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    report.main()
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["faces"] == {"train": 30} and found["pictures looked at"] == 29 and found["unreadable"] == 1
    assert found["like another"] == 5 and found["sizes"] == [[60, 50]] * 29
    assert found["equal captions"] == 20 and max(found["words"]) == 8 and found["labels"]["Wearing_Hat"] == 1
    assert Image.open(tmp_path / "page.png").width > 1000 and "FLIP" in capsys.readouterr().out


# ---- data.py: drawn faces ----------------------------------------------------------------------
def test_drawn_faces_are_kept_and_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    faces = data.load_toy_faces(5, 24, 3, tmp_path)
    image, attributes = toyfaces.face(4, 3, 24)
    assert (faces.images[4] == np.asarray(image)).all() and (faces.attributes[4] == attributes).all()
    monkeypatch.setattr(toyfaces, "face", lambda *_: pytest.fail("drawn again"))
    assert (data.load_toy_faces(5, 24, 3, tmp_path).images == faces.images).all()

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(toyfaces, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load_toy_faces(6, 24, 3, tmp_path)
    path, = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    error = error_of(data.load_toy_faces, 5, 24, 3, tmp_path)
    assert f"{path}: expected drawn faces; delete this file to draw them again" in error


def test_drawn_sketches_are_of_the_drawn_faces(tmp_path):
    faces = data.load_toy_faces(4, 24, 3, tmp_path, steps=6)
    assert (faces.images == data.load_toy_faces(4, 24, 3, tmp_path).images).all() and faces.sketch_steps == 6
    assert (faces.sketches[2] == toyfaces.sketch(2, 3, 24, 6)).all()
    assert (np.asarray(faces.subset([2]).sketch(0, 5)) == faces.sketches[2, 5][..., None]).all()


# ---- data.py: augmentation and batches ---------------------------------------------------------
def test_augmentation_moves_pixels_as_the_recipe_says():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8))
    pixels = {name: np.asarray(operation(image, 1)) for name, operation in data.AUGMENTATIONS.items()}
    plain, x, y = np.asarray(image), pixels["translate x"], pixels["translate y"]
    assert all((pixels[name] == plain).all() for name in ("identity", "brightness", "sharpness"))
    assert (x[:, :-5] == plain[:, 5:]).all() and (x[:, -5:] == 128).all() and (y[:-5] == plain[5:]).all()
    assert (pixels["shear x"][200, -29:] == 128).all() and (pixels["rotate"][0, 0] == 128).all()


def test_augmentation_changes_five_in_nine_pictures_beyond_mirroring():
    """Two draws, each skipped by chance 1/2, or 3 of 9 times without effect: (2/3)^2 unchanged."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    plain, flipped = image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    rng = np.random.default_rng(0)
    seen = [data.augment(image, rng).tobytes() for _ in range(3000)]
    assert abs(seen.count(plain) / 3000 - 2 / 9) < 0.03 and abs(seen.count(flipped) / 3000 - 2 / 9) < 0.03


def drawn(count=20, size=16):
    pictures = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    return data.Faces("drawn", pictures, np.arange(count), random_faces(count))


TOKENIZER = bert.Tokenizer.train(
    [grammar.sample_caption(a, np.random.default_rng(i))[0] for i, a in enumerate(random_faces(200))])


def take(batches, start, count):
    return list(itertools.islice(batches.iterate_from(start), count))


def same(batch, *parts):
    """Is this batch made of these parts?"""
    whole, *parts = [(b.images, b.captions.ids, b.identity) for b in (batch, *parts)]
    return all(map(torch.equal, whole, map(torch.cat, zip(*parts))))


def test_batches_are_the_same_for_any_number_of_workers_or_processes_and_from_any_step():
    def some(start=0, count=12, seed=7, batch_size=4, **options):
        return take(data.BatchLoader(drawn(), TOKENIZER, 16, batch_size, seed, **options), start, count)
    whole = some()
    assert all(map(same, whole, some(workers=2))) and all(map(same, whole[7:], some(7, 5)))
    assert all(map(same, whole, *(some(batch_size=2, rank=rank, world_size=2) for rank in (0, 1))))
    assert not same(whole[0], some(seed=8)[0])
    epochs = [torch.cat([batch.identity for batch in whole[e:e + 5]]).tolist() for e in (0, 5)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))


def test_the_loader_draws_nothing_from_the_models_random_numbers():
    state = torch.get_rng_state()
    take(data.BatchLoader(drawn(), TOKENIZER, 16, 4), 0, 3)
    assert torch.equal(state, torch.get_rng_state())


# ---- train.py ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def quick(out, cache, **changes):
    """A run of a few steps on a few drawn faces, with every part of the recipe in use."""
    settings = train_config.RECIPES["tiny"] | dict(
        out=str(out), cache=cache, faces=48, validation=20, steps=8, batch_size=8,
        queue_size=20, queue_from=0.25, itm_from=0.1, itm_every=1, hardness_ramp=(0.2, 0.6),
        alpha_ramp=(0.2, 0.8), momentum_from=0.2, warmup=2, log_every=1, eval_every=6)
    return train_config.Config(**settings | changes)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("uninterrupted")
    train.train(quick(out, cache))
    return out


def test_a_run_stopped_or_killed_and_resumed_has_the_log_of_one_never_stopped(
        tmp_path, cache, uninterrupted, monkeypatch):
    """Stopped by Ctrl-C or a polite kill, which then mean what they did; killed when just saved."""
    signals = {0: signal.SIGINT, 3: signal.SIGTERM, 6: signal.SIGINT}
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def train_step(run, batches, step, real=train.train_step):
        if step in signals:
            signal.raise_signal(signals.pop(step))
        return real(run, batches, step)
    monkeypatch.setattr(train, "train_step", train_step)
    config = quick(tmp_path, cache)
    for ending in ("stopped after step 1;", "stopped after step 4;", "killed", "stopped after step 7;"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=ending):
            if ending == "killed":
                patch.setattr(train, "evaluate_and_draw", lambda *_: sys.exit("killed"))
            train.train(config)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        (tmp_path / "log.jsonl").write_text("torn")             # the log rides in the checkpoint
        config = train_config.parse_arguments(["--out", str(tmp_path), "--resume"])
    train.train(config)
    logs = [[line | {"seconds": 0, "data_seconds": 0} for line in log_of(out)[1:]] for out in (tmp_path, uninterrupted)]
    assert logs[0] == logs[1]


def test_a_run_goes_on_from_a_flip_ours_or_official_and_at_another_image_size(
        uninterrupted, cache, tmp_path, capsys):
    before = FLIP.from_pretrained(uninterrupted)
    torch.save({"model": official_state(before)}, tmp_path / "official.pth")
    (tmp_path / "tokenizer.json").write_text(before.tokenizer.to_json())
    official = dict(init=f"{tmp_path}/official.pth", vocabulary=f"{tmp_path}/tokenizer.json")
    for change in (dict(init=str(uninterrupted)), official):
        config = quick(tmp_path / "out", cache, image_size=64, queue_size=7, **change)
        model = train.build_model(config, ViTConfig(64, 8, 128, 3, 4), None, train.load_initial(config))
        learned, expected = model.student.state_dict(), before.student.state_dict()
        grid, resized = expected.pop("image.positions"), learned["image.positions"]
        torch.testing.assert_close(resized, resize_position_embedding(grid, 64))
        for part, other in ((learned, expected),
                            (model.momentum_encoder.state_dict(), model.student.state_dict()),
                            (model.matching_head.state_dict(), before.matching_head.state_dict())):
            assert all(torch.equal(part[name], other[name]) for name in other)
        assert model.temperature == before.temperature and model.image_queue.shape == (7, 128)
        assert model.tokenizer.to_json() == before.tokenizer.to_json()
    folder = write_celeba(tmp_path / "mine", count=40)
    given = ["--data", str(folder), "--init", str(uninterrupted), "--image_size", "64", "--batch_size", "8",
             "--steps", "300", "--cache", cache, "--out", f"{tmp_path}/out"]
    config = train_config.parse_arguments(given)
    assert config.augment and not train_config.parse_arguments([]).augment
    model, _ = train.train(dataclasses.replace(config, steps=2, eval_every=2))
    assert model.config.vit.image_size == 64 and "2 steps are 0.4 passes over" in capsys.readouterr().out
    faces = train.load_data(config, 64)[0].subset(range(20))
    train.print_plan(config, faces, faces, 1, Tokenizer.train(["a face"]))
    printed = capsys.readouterr().out
    assert "words of the captions are not in the vocabulary of --init, for example" in printed
    assert "120.0 passes" in printed and "will overfit: try --steps 75, or" in printed
    assert "with 20 validation faces, R@10 is 50 % by chance" in printed
    for change, sentence in ((dict(init=official["init"]), "contains no vocabulary; pass --vocabulary"),
                             (dict(init=str(uninterrupted), model="base"), "128 wide, that of --model base")):
        config = quick(tmp_path, cache, **change)
        assert sentence in error_of(train.load_initial, config)
    assert "--init contains all weights" in error_of(quick, tmp_path, cache, init="a", bert="b")
    assert "--vocabulary is for an --init" in error_of(quick, tmp_path, cache, vocabulary="a")
    assert "is not a multiple of the patch" in error_of(train.train, quick(tmp_path, cache, image_size=50))


def test_resuming_takes_the_runs_flags_and_only_what_does_not_decide_it_may_be_new(uninterrupted, cache):
    out = ["--out", str(uninterrupted), "--resume"]
    resumed = train_config.parse_arguments(out + ["--workers", "2", "--batch_size", "8"])
    assert resumed == dataclasses.replace(quick(uninterrupted, cache), resume=True, workers=2)
    error = error_of(train_config.parse_arguments, out + ["--lr", "0.5"])
    assert "has --lr 0.001, which cannot change; omit --lr 0.5" in error
    assert error_of(train.train, dataclasses.replace(resumed, faces=40)).startswith("--resume: the run in ")
    anew = dataclasses.replace(resumed, resume=False)
    assert "already exists; use --resume" in error_of(train.train, anew)


def test_old_names_of_flags_are_accepted_on_the_command_line_and_in_checkpoints(uninterrupted, tmp_path):
    was = {f.metadata["was"]: f.name for f in dataclasses.fields(train_config.Config) if f.metadata["was"]}
    assert set(was) == {"hard_ramp", "clip_grad", "muon_image", "muon_text", "max_lost"}
    assert train_config.parse_arguments(["--hard_ramp", "0.1", "0.2", "--max_lost", "3"]) == train_config.Config(
        **train_config.RECIPES["tiny"] | dict(hardness_ramp=(0.1, 0.2), max_errors=3.0))
    saved = torch.load(uninterrupted / "flip.pt")
    config = saved["training"]["config"]
    for old, new in was.items():
        config[old] = config.pop(new)
    torch.save(saved, tmp_path / "flip.pt")
    arguments = ["--resume", "--out", str(tmp_path), "--max_lost", "2"]
    resumed = train_config.parse_arguments(arguments)
    assert resumed.hardness_ramp == (0.2, 0.6) and resumed.max_errors == 2 and resumed.grad_clip == 1
    error = error_of(train_config.parse_arguments, [*arguments, "--clip_grad", "2"])
    assert "has --grad_clip 1.0, which cannot change" in error


def test_resuming_where_nothing_was_saved_yet_begins(tmp_path):
    assert train_config.parse_arguments(["--out", str(tmp_path), "--resume", "--steps", "7"]) == train_config.Config(
        **train_config.RECIPES["tiny"] | dict(out=str(tmp_path), resume=True, steps=7))


def test_a_run_leaves_log_and_pictures_and_a_checkpoint_that_evaluates_the_same(uninterrupted, cache):
    pictures = {"curves.png", "retrieval.png"}
    assert {path.name for path in uninterrupted.iterdir()} == pictures | {"flip.pt", "log.jsonl"}
    for name in pictures:
        Image.open(uninterrupted / name).load()
    config = quick(uninterrupted, cache)
    validation = evaluation.Validation.of(train.load_data(config, 48)[1])
    metrics, _ = evaluation.evaluate(FLIP.from_pretrained(uninterrupted), validation, config)
    assert metrics == pytest.approx({name: log_of(uninterrupted)[-1][name] for name in metrics})


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(tmp_path, cache, uninterrupted):
    script = tmp_path / "script.py"
    script.write_text("import sys, train, test_all\n"
                      "train.train(test_all.quick(*sys.argv[1:], batch_size=4))")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, script, tmp_path, cache], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    folders = (uninterrupted, tmp_path)
    one, two = ([(line.get("itc"), line.get("itm")) for line in log_of(out)] for out in folders)
    np.testing.assert_allclose(np.array(two, float), np.array(one, float), atol=1e-4)
    one, two = (FLIP.from_pretrained(out).state_dict() for out in folders)
    for name in ("queue_identity", "queue_pointer", "image_queue", "text_queue"):
        close(two[name].double(), one[name].double(), 1e-4)


def test_two_micro_batches_give_the_gradient_of_their_mean(tmp_path, cache):
    """Up to the queue, which the second already sees filled by the first."""
    config = quick(tmp_path, cache, accumulate=2, queue_from=1.0, alpha_ramp=(1, 1), momentum_from=1.0,
                   grad_clip=0.0)
    faces, _ = train.load_data(config, 48)
    model = train.build_model(config, train_config.TINY[0], faces, None).train()
    first, second = take(data.BatchLoader(faces, model.tokenizer, 48, 8), 0, 2)
    gradients, optimizer = [], torch.optim.SGD([{"params": list(model.parameters()), "scale": 0.0}])
    optimizer.step = lambda: gradients.append(model.student.image.class_token.grad.clone())
    run = train.TrainState(config, model, model, [optimizer], None, 3, None, None, 0)
    for batches in ([first], [second], [first, second]):
        train.train_step(run, batches, 0)
    close(gradients[2], (gradients[0] + gradients[1]) / 2, 1e-6)


@pytest.mark.parametrize("image, text", [(0, 0), (4, 0), (3, 2)])
def test_every_trained_parameter_is_in_one_optimiser_group_and_only_matrices_decay(image, text):
    model = small_flip()
    optimizers = build_optimizers(model, 0.05, temperature_lr=0.1, muon_lr_image=image, muon_lr_text=text)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hidden = {image: 4 * 6, text: 3 * 10}                       # depth x matrices of a block or layer
    for group in optimizers[1].param_groups if image else ():
        assert len(group["params"]) == hidden[group["scale"]]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    assert [group["scale"] for group in groups if group["params"][0] is model.temperature] == [0.1]


def test_muon_steps_as_torchs_does_without_bfloat16(monkeypatch):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 24), (24, 6), (6, 6))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.1}])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["lr"] = 0.02
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs):
        close(p, q, 1e-5)


def test_newton_schulz_brings_all_singular_values_to_about_one_and_keeps_the_vectors():
    torch.manual_seed(0)
    X = torch.randn(4, 8, 32) * torch.logspace(0, -2, 8)[:, None]
    U, S, V = torch.linalg.svd(X.double(), full_matrices=False)
    inside = U.mT @ newton_schulz(X).double() @ V.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() and values.max() < 1.25 and (S.amax(1) / S.amin(1)).min() > 50
    close(inside, torch.diag_embed(values), 1e-4)


def test_the_base_recipe_is_the_papers():
    config = train_config.Config(model="base", steps=15 * 23_925)
    rate = lambda step: train.learning_rate(step, config, 23_925)
    assert rate(0) == pytest.approx(1e-6) and rate(10_000) == pytest.approx(1.55e-5) and rate(20_000) == 3e-5
    assert rate(23_924) == 3e-5 and rate(23_925 * 3) == pytest.approx(3e-5 * 0.9 ** 3)
    assert rate(23_925 * 40) == 1e-6
    for step in (0, 1000, 23_925, 60_000, 300_000):
        alpha = pytest.approx(0.4 * min(1, step / (2 * 23_925)))
        assert train.schedule(step, config) == (alpha, 0.995, 61_440, 1.0, True)


def test_the_tiny_recipe_starts_gently_and_ends_with_everything_on():
    config = train_config.parse_arguments([])
    last = train.schedule(config.steps - config.steps % config.itm_every - config.itm_every, config)
    assert train.schedule(0, config) == StepParams(0.0, 0.0, 0, 0.0, with_itm=False)
    assert last == StepParams(config.alpha, config.momentum, config.queue_size, config.hardness, with_itm=True)
    assert train.schedule(config.itm_from * config.steps, config).hardness == 0


@pytest.mark.parametrize("decay, quarter", [("cosine", 0.6 + 0.4 * 0.5 ** 0.5), ("linear", 0.8)])
def test_the_learning_rate_rises_over_the_warmup_and_falls_along_a_cosine_or_a_line(decay, quarter):
    rate = lambda step: train.warmup_decay(step, 1000, 20, 1.0, lr_start=0.1, lr_min=0.2, decay=decay)
    assert rate(0) == 0.1 and rate(10) == pytest.approx(0.55) and rate(20) == 1
    assert rate(265) == pytest.approx(quarter) and rate(510) == pytest.approx(0.6)
    assert rate(1000) == pytest.approx(0.2)


def test_flags_are_the_configurations_fields_and_recipes_yield_to_them():
    found = train_config.parse_arguments(["--steps", "7", "--no-augment", "--hardness_ramp", "0.1", "0.2"])
    assert found == train_config.Config(
        **train_config.RECIPES["tiny"] | dict(steps=7, augment=False, hardness_ramp=(0.1, 0.2)))
    assert train_config.parse_arguments(["--epochs", "2"]).steps == 0, "or the recipe's steps would decide"
    assert train_config.parse_arguments(["--model", "base"]) == train_config.Config(model="base")
    with pytest.raises(SystemExit):
        train_config.parse_arguments(["--leanring_rate", "1"])


def test_a_retrieval_table_stands_beside_chance_and_both_references(uninterrupted, cache):
    validation = evaluation.Validation.of(train.load_data(quick(uninterrupted, cache), 48)[1])
    metrics = {f"{way}_r{k}": 10.0 for way in ("img", "txt", "itc_img", "itc_txt") for k in (1, 5, 10)}
    lines = evaluation.recall_table(metrics, validation).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        "chance", "attribute match", "Bayes optimum", "this model, ITC alone", "this model, re-ranked",
        "% of attribute match", "% of Bayes optimum"]
    assert lines[2].split(" | ")[1:4] == ["5.0", "25.0", "50.0"]


def test_a_damaged_picture_met_in_training_costs_nothing_that_was_learned(tmp_path):
    picture = write_celeba(tmp_path, count=40) / "img_align_celeba" / "000012.jpg"
    picture.write_bytes(b"not a picture")
    config = quick(tmp_path / "out", str(tmp_path / "cache"), data=str(tmp_path), batch_size=4, steps=30)
    assert "000012.jpg is not an image" in error_of(train.train, config)
    saved = torch.load(tmp_path / "out" / "flip.pt")["training"]["step"]
    assert saved == max(line.get("step", 0) for line in log_of(tmp_path / "out")) > 0
    train.train(dataclasses.replace(config, resume=True, max_errors=3.0))        # one of 38
    log = log_of(tmp_path / "out")
    assert log[-1]["step"] == 30 and max(line.get("num_errors", 0) for line in log) == 1


# ---- finetune.py: numbers ----------------------------------------------------------------------
def test_attribute_logits_and_loss_are_the_official_ones(official):
    vectors = tasks.pool_tokens(official.eval().student.image, GOLDEN["eval.images"]).detach()
    head = tasks.AttributeHead(vectors=12, width=24, labels=40)
    theirs = recorded("attr.")
    head.load_state_dict({"weights": theirs["layer_weights"].flatten(),
                          **{f"norm.{name}": theirs[f"ln.{name}"] for name in ("weight", "bias")},
                          **{f"linear.{name}": theirs[f"visual_proj.{name}"] for name in ("weight", "bias")}})
    close(head(vectors), theirs["logits"])
    samples = tasks.EncodedSplit(vectors=vectors, labels=theirs["target"].float())
    task = tasks.Attributes(finetune.Config(task="attributes"))
    close(task.loss(head, samples, torch.arange(8), None, 0), theirs["loss"])


def test_the_base_model_is_pooled_after_blocks_4_6_and_8_and_at_the_end():
    class Image:
        config = ViTConfig()

        def __call__(self, images, return_hidden):
            hidden = [torch.full((1, 3, 2), float(block)) for block in range(1, 13)]
            return torch.full((1, 3, 2), 99.0), hidden
    assert tasks.pool_tokens(Image(), None)[0, :, 0].tolist() == [4, 4, 4, 6, 6, 6, 8, 8, 8, 99, 99, 99]


def test_early_retrieval_is_the_official_one():
    found = tasks.early_retrieval(GOLDEN["slfir.ranks"], photos=20)
    for name in ("mA", "mB", "wA", "wB"):
        assert found[f"{name[0]}@{name[1]}"] == pytest.approx(GOLDEN[f"slfir.{name}"].item(), abs=1e-9)
    assert found["m@A"] == pytest.approx(np.mean(found["percentile"])) and len(found["inverse"]) == 50


def test_a_photo_as_similar_as_the_true_one_ranks_before_it_and_nan_is_never_a_hit():
    similarity = torch.tensor([[[0.5, 0.1, 0.5], [0.9, 0.1, 0.2]], [[0.2, 0.2, 0.2], [0.3, 0.1, 0.0]],
                               [[0.0, 0.0, torch.nan], [0.0, 0.1, 0.2]]])
    assert tasks.sketch_ranks(similarity).tolist() == [[2, 1], [3, 2], [3, 1]]


def test_balanced_accuracy_is_its_definition(monkeypatch):
    head = tasks.AttributeHead(1, 4, 3)
    head.forward = lambda vectors: vectors[:, 0, :3]
    logits = torch.tensor([[1.0, -1, 2], [2.0, -1, 1], [-1.0, -1, 1], [3.0, -1, 1]])
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]])       # the third everyone has
    samples = tasks.EncodedSplit(vectors=F.pad(logits, (0, 1))[:, None], labels=labels)
    monkeypatch.setattr(tasks, "ATTRIBUTES", ("Male", "Young", "Bald"))
    task = tasks.Attributes(finetune.Config(task="attributes"))
    found = task.metrics(head, samples)
    for name, expected in {"Male": [50, 100 / 3, 75], "Young": [75, 50, 75], "Bald": [100, np.nan, 100]}.items():
        assert list(found["per_label"][name].values()) == pytest.approx(expected, nan_ok=True)
    assert found["accuracy"] == pytest.approx(75) and found["balanced"] == pytest.approx((100 / 3 + 50) / 2)
    assert found["baseline"]["accuracy"] == found["majority"] == pytest.approx(250 / 3)


def test_chance_is_what_orders_by_chance_come_to():
    rng, image_of_text = np.random.default_rng(0), torch.tensor([0] * 3 + [1] + [2] * 2 + list(range(3, 20)))
    scores = [torch.from_numpy(rng.random((20, 23))) for _ in range(3000)]
    found = [evaluation.retrieval_metrics(score, score.T, image_of_text) for score in scores]
    expected = tasks.chance_recalls(image_of_text)
    for name in ("img_r5", "img_r10", "txt_r5", "txt_r10"):
        assert np.mean([metrics[name] for metrics in found]) == pytest.approx(expected[name], abs=1)
    few = tasks.chance_recalls(torch.arange(3))
    assert few["txt_r5"] == few["itc_img_r10"] == 100


def test_the_loss_within_a_batch_is_the_symmetric_cross_entropy_with_positives_of_equal_identity():
    torch.manual_seed(0)
    rows, keys = (unit(5, 8).double().requires_grad_() for _ in range(2))
    identity, temperature = torch.tensor([3, 1, 3, 4, 5]), torch.tensor(0.07, dtype=torch.float64)
    targets = (identity[:, None] == identity).double()
    targets /= targets.sum(1, keepdim=True)
    expected = (F.cross_entropy(rows @ keys.detach().T / temperature, targets)
                + F.cross_entropy(keys @ rows.detach().T / temperature, targets)) / 2
    found = tasks.in_batch_contrastive_loss(rows, keys, identity, temperature)
    close(found, expected, 1e-9)
    ours, theirs = (torch.cat(torch.autograd.grad(loss, (rows, keys))) for loss in (found, expected))
    close(ours, theirs, 1e-9)


def test_a_caption_is_one_of_its_pictures():
    image_of_text, indices = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([2, 0, 1])
    rng = np.random.default_rng(0)
    drawn = torch.stack([tasks.sample_caption_index(image_of_text, indices, rng) for _ in range(50)])
    assert (image_of_text[drawn] == indices).all()
    assert [len(column.unique()) for column in drawn.T] == [3, 2, 1]


# ---- finetune.py: runs -------------------------------------------------------------------------
@pytest.fixture
def tuned(uninterrupted, cache, tmp_path):
    """Makes the configuration of a run of a few steps on a few faces; the drawn ones' recipe."""
    def config(task, **changes):
        settings = tasks.TASKS[task].recipe | tasks.TASKS[task].toy_recipe | dict(
            task=task, checkpoint=(f"{uninterrupted}/flip.pt",), out=str(tmp_path), cache=cache, faces=24,
            validation=4, test=8, epochs=3, batch_size=8, itm_every=1)
        return finetune.Config(**settings | changes)
    return config


def is_head(task, name):
    """Whether a task may change this part of a FLIP; attributes has a head of its own."""
    return task != "attributes" and name.startswith(
        ("student.image_projection", "student.text_projection", "matching_head", "temperature"))


@pytest.mark.parametrize("task, pictures", [
    ("retrieval", "retrieval.png"), ("attributes", "attributes.png"), ("sketch", "sketch.png curves.png")])
def test_a_task_leaves_the_encoders_as_they_were(tuned, tmp_path, monkeypatch, capsys, task, pictures):
    optimised = []

    def optimizer(groups, make=torch.optim.AdamW, **options):
        optimised.extend(p for group in groups for p in group["params"])
        return make(groups, **options)
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(tasks.Sketch, "steps", 7)            # of 70: drawing them takes time
    config = tuned(task)
    encoders = finetune.open_encoders(config)
    monkeypatch.setattr(finetune, "open_encoders", lambda config: encoders)
    before = [copy.deepcopy(model.state_dict()) for _, model in encoders]
    results = finetune.finetune(config)
    assert [result.name for result in results] == [config.checkpoint[0], "random weights"]
    for (_, model), weights in zip(encoders, before):
        assert not model.training
        for name, value in model.state_dict().items():
            assert is_head(task, name) or torch.equal(value, weights[name]), name
        for name, parameter in model.named_parameters():
            if not is_head(task, name):
                assert parameter.grad is None and id(parameter) not in map(id, optimised), name
    assert optimised and len(set(map(id, optimised))) == len(optimised)
    for name in pictures.split():
        Image.open(tmp_path / task / name).load()
    table = (tmp_path / task / "table.md").read_text()
    assert table in capsys.readouterr().out and len({line.count("|") for line in table.splitlines()}) == 1


def test_the_tuned_flip_is_a_checkpoint_that_gives_the_figures_of_the_table(tuned, uninterrupted, tmp_path):
    config = tuned("retrieval", random=False, lr=0.005, faces=64, validation=32, test=32, k_test=4, epochs=9)
    result, = finetune.finetune(config)
    path = tmp_path / "retrieval" / "flip.pt"
    saved, origin = torch.load(path)["model"], torch.load(uninterrupted / "flip.pt")["model"]
    changed = {name for name, value in origin.items() if not torch.equal(value, saved[name])}
    assert changed == {name for name in saved if is_head("retrieval", name)}
    assert result.before[1.0]["img_r5"] != result.final["img_r5"]
    again = dataclasses.replace(config, checkpoint=(str(path),), out=f"{tmp_path}/again", lr=0.0, epochs=1)
    assert torch.equal(finetune.finetune(again)[0].final["scores"], result.final["scores"])
    assert "already contains results; remove it" in error_of(finetune.finetune, config)


def test_a_run_repeats_itself_and_half_precision_tokens_on_disk_give_what_whole_ones_in_memory_give(
        tuned, tmp_path, monkeypatch):
    def scores(out):
        return finetune.finetune(tuned("retrieval", out=str(tmp_path / out), random=False))[0].final["scores"]
    one, two = scores("a"), scores("b")
    monkeypatch.setattr(tasks, "temporary_memmap", lambda shape, folder: torch.empty(shape))
    three = scores("c")
    assert torch.equal(one, two) and not torch.equal(one, three)
    close(three, one, 0.02)
    assert {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()} == {
        path.name for path in (tmp_path / "c").rglob("*") if path.is_file()}


def test_a_share_of_the_training_part_is_drawn_by_the_seed_and_lies_in_every_larger_one(
        tuned, tmp_path, monkeypatch):
    seen, settings = [], dict(random=False, faces=20, fractions=(0.1, 1.0, 0.01, 0.5))
    monkeypatch.setattr(finetune, "train_head", lambda *arguments: seen.append(set(arguments[3].tolist())))
    for seed in (3, 4):
        finetune.finetune(tuned("attributes", out=str(tmp_path / str(seed)), seed=seed, **settings))
    assert [len(chosen) for chosen in seen] == [1, 2, 10, 20] * 2
    assert seen[0] < seen[1] < seen[2] < seen[3] == set(range(20)) and seen[2] != seen[6]


@pytest.mark.parametrize("values, kept", [([5.0, 4, 3, 2], 0), ([1.0, 7, 9, 8], 2), ([1.0, 2, 3, 4], 3)])
def test_what_was_best_on_the_validation_part_is_kept_even_if_that_is_what_tuning_began_with(
        tuned, tmp_path, values, kept):
    task, head, weights = tasks.Attributes(tuned("attributes", num_evaluations=3)), nn.Linear(2, 1), []

    def metrics(head, samples):
        assert samples == "validation"
        weights.append(head.weight.detach().clone())
        return dict.fromkeys(task.columns, values[len(weights) - 1])
    task.metrics, task.loss = metrics, lambda *_: head(torch.ones(2)).sum()
    log, training = Log(tmp_path / "log.jsonl", []), tasks.EncodedSplit(count=4)
    finetune.train_head(task, head, training, torch.arange(4), "validation", log)
    assert len(weights) == 4 and not torch.equal(weights[0], weights[1])
    assert torch.equal(head.weight, weights[kept])


def test_the_test_part_decides_nothing(tuned, tmp_path, monkeypatch):
    """Whatever the metrics say of it, the head stays the same."""
    heads, real = [], tasks.Attributes.metrics
    for said in ({}, {"accuracy": 0.0}):
        monkeypatch.setattr(tasks.Attributes, "metrics", lambda task, head, samples: (
            real(task, head, samples) | (said if samples.count == 8 else {})))
        out = tmp_path / f"out {len(heads)}"
        finetune.finetune(tuned("attributes", out=str(out), random=False, lr=0.1))
        heads.append(torch.load(out / "attributes" / "head.pt")["model"])
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_a_table_has_a_column_for_each_share_and_a_row_for_each_encoder_the_last_first():
    metrics = {"accuracy": 1.0, "balanced": 2.0}
    shares = dict.fromkeys((0.02, 1.0), metrics | {"baseline": metrics})
    task = tasks.Attributes(finetune.Config(task="attributes", fractions=(1.0, 0.02)))
    table = finetune.table([finetune.Result(name, {}, shares) for name in "ab"], task)
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header[:3] == ["%", "accuracy, 2 %", "accuracy, 100 %"]
    assert [name for name, *_ in rows] == ["majority class", "b, tuned", "a, tuned"]
    assert all(values == ["1.0", "1.0", "2.0", "2.0"] for _, *values in rows)


def write_parted_celeba(folder):
    """40 pictures, the last 10 of them for validation and test."""
    lines = [f"{i + 1:06d}.jpg {max(0, i // 5 - 5)}" for i in range(40)]
    (write_celeba(folder, count=40) / PARTITION).write_text("\n".join(lines))


def test_attributes_are_learned_from_celeba(tuned, tmp_path):
    write_parted_celeba(tmp_path)
    results = finetune.finetune(tuned("attributes", data=str(tmp_path)))
    assert tuple(results[0].final["per_label"]) == ATTRIBUTES
    assert torch.load(tmp_path / "attributes/head.pt")["attributes"] == list(ATTRIBUTES)
    test = open_faces(tmp_path, "test").attributes.mean(0)
    assert results[0].final["majority"] == pytest.approx(100 * np.maximum(test, 1 - test).mean())


def test_retrieval_is_tuned_and_judged_on_pictures_with_several_captions(tuned, tmp_path):
    write_mm_celeba(tmp_path, (*range(2, 42), *range(24000, 24012)))
    found = finetune.finetune(tuned("retrieval", data=str(tmp_path)))[0].final
    scores, own = found["scores"], torch.arange(12).repeat_interleave(2)                # (T, I), (T,)
    assert scores.shape == (24, 12)
    better = (scores > scores[torch.arange(24), own][:, None]).sum(1)
    assert found["img_r5"] == pytest.approx(100 * (better < 5).double().mean().item())
    assert 0 < found["img_r5"] < 100


def write_captioned_sde(folder):
    write_sde(folder, steps=3)
    records = [{"image": f"photo1/image01{n:02d}.jpg", "caption": f"a face {n}"} for n in range(15)]
    (folder / "train.json").write_text(json.dumps(records))


@pytest.mark.parametrize("write", [write_captioned_sde, lambda folder: write_sde(folder, steps=3)])
def test_sketches_are_tuned_with_captions_or_with_no_vocabulary(tuned, uninterrupted, tmp_path, write):
    write(tmp_path)
    saved, with_captions = torch.load(uninterrupted / "flip.pt"), write == write_captioned_sde
    torch.save(saved if with_captions else saved | {"tokenizer": None}, tmp_path / "flip.pt")
    config = tuned("sketch", checkpoint=(f"{tmp_path}/flip.pt",), data=str(tmp_path), random=False)
    (_, model), = finetune.open_encoders(config)
    task = tasks.Sketch(config)
    samples = task.encode(model.requires_grad_(False).eval(), task.open("train", model), for_training=True)
    task.trainable_module(model, samples)
    task.loss(model, samples, torch.arange(8), np.random.default_rng(0), 0).backward()
    assert model.student.image_projection.weight.grad is not None
    for part in (model.matching_head, model.student.text_projection):
        assert (part.weight.grad is not None) == with_captions
    assert finetune.finetune(config)[0].final["scores"].shape == (5, 3, 5)


def test_sketches_are_shown_to_the_encoder_dark_on_light(tuned, uninterrupted, monkeypatch):
    task, model, shown = tasks.Sketch(tuned("sketch")), FLIP.from_pretrained(uninterrupted).eval(), []

    def watched(compute, read, count, model, title, errors=None):
        shown.append(np.mean([np.asarray(read(i, 48)).mean() for i in range(count)]))
        return torch.zeros(count, 1)
    monkeypatch.setattr(task, "encode_pictures", watched)
    task.encode(model, task.open("val", model), for_training=False)
    assert 200 < shown[1] < 255         # the first are the photos


def test_the_recipe_is_the_papers_for_ones_own_data_and_flags_go_before_it():
    papers = finetune.parse_arguments(["retrieval", "--data", "DIR"])
    assert (papers.batch_size, papers.epochs, papers.lr, papers.warmup) == (64, 50, 3e-5, 2000)
    drawn = finetune.parse_arguments(["sketch", "--lr", "0.1", "--checkpoint", "a.pt", "b.pt"])
    assert drawn.lr == 0.1 and drawn.checkpoint == ("a.pt", "b.pt") and drawn.faces == 800


def write_one_person(folder):
    write_captions(folder, [{"image": f"{i}.png", "image_id": 1, "caption": "a face"} for i in range(4)])


@pytest.mark.parametrize("task, write, change, sentence", [
    ("attributes", write_celeba, lambda saved: saved["model"]["temperature"].fill_(np.nan), "are NaN or infinite"),
    ("retrieval", write_mm_celeba, lambda saved: saved.update(tokenizer=None), "pass --vocabulary"),
    ("sketch", write_captioned_sde, lambda saved: saved.update(tokenizer=None), "pass --vocabulary"),
    ("attributes", write_mm_celeba, None, "expected attributes to learn, found none"),
    ("retrieval", write_one_person, None, "shows one person only"),
    ("retrieval", write_fs2k, None, "expected captions"),
    ("retrieval", write_celeba, None, "CelebA val: 1 images, expected at least 2"),
    ("sketch", write_parted_celeba, None, "expected sketches, found none"),
])
def test_what_a_task_cannot_use_is_refused_with_one_sentence_before_anything_is_encoded(
        tuned, uninterrupted, tmp_path, monkeypatch, task, write, change, sentence):
    monkeypatch.setattr(tasks.Task, "encode_pictures", lambda *_: pytest.fail("encoded"))
    write(tmp_path)
    saved = torch.load(uninterrupted / "flip.pt")
    if change:
        change(saved)
    torch.save(saved, tmp_path / "flip.pt")
    config = tuned(task, checkpoint=(f"{tmp_path}/flip.pt",), data=str(tmp_path))
    assert sentence in error_of(finetune.finetune, config)


# ---- flip.py and the other scripts -------------------------------------------------------------
def test_search_shows_the_best_by_matching_logit_plus_cosine_and_names_what_it_cannot_read(
        uninterrupted, tmp_path, monkeypatch, capsys):
    folder, query, out = write_celeba(tmp_path), "a smiling woman", tmp_path / "found.bmp"
    (folder / "notes.png").write_text("no picture")
    (folder / "img_align_celeba/000001.jpg").rename(folder / "\x1b[31m.jpg")
    monkeypatch.setattr(sys, "argv", ["search.py", "--checkpoint", f"{uninterrupted}/flip.pt", "--top", "4",
                                      "--images", str(folder), "--out", str(out), query])
    search.main()
    printed = capsys.readouterr().out
    assert "notes.png is not an image" in printed and "best of 6 faces" in printed
    model, scores = FLIP.from_pretrained(uninterrupted).eval(), {}
    captions = model.tokenizer([query])
    with torch.no_grad():
        for path in folder.rglob("*.jpg"):
            pixels = normalize_batch([resize_to_array(load_image(path), 48)])
            tokens, feature = model.student.image_tokens_and_features(pixels)
            cosine = (feature @ model.student.text_features(captions).T).item()
            logits = model.itm_logits(tokens, captions)
            score = model.rerank_score(logits, torch.tensor([cosine])).item()
            line = f"{score:6.2f} {cosine:7.3f} {100 * logits.softmax(1)[0, 1]:6.1f} %  {path}"
            scores[line.replace("\x1b", "\\x1b")] = score
    assert printed.splitlines()[-5:-1] == sorted(scores, key=scores.get, reverse=True)[:4]
    assert "\x1b" not in printed and Image.open(out).width > 4 * 100


def test_ten_lines_of_python_compare_pictures_and_sentences_as_both_losses_do(uninterrupted, tmp_path):
    model, names = FLIP.from_pretrained(uninterrupted).train(), [f"{i}.jpg" for i in range(130)]
    write_pictures(tmp_path, names)                             # more than are read at once
    paths, texts = [tmp_path / name for name in names], ["a smiling woman", "a man"]
    cosines, matches = model.similarity(paths, texts), model.match_probability(paths[:3], texts)
    assert model.training and not cosines.requires_grad and cosines.shape == (130, 2)
    model.eval()
    for i in (0, 2):
        tokens, feature = model.student.image_tokens_and_features(normalize_batch([resize_to_array(Image.open(paths[i]), 48)]))
        expected = feature @ model.student.text_features(model.tokenizer(texts)).T
        torch.testing.assert_close(cosines[i], expected[0])
        for t, text in enumerate(texts):
            expected = model.itm_logits(tokens, model.tokenizer([text])).softmax(1)[0, 1]
            torch.testing.assert_close(matches[i, t], expected)
    turned = Image.open(paths[0]).rotate(90, expand=True)       # and its note says so, as a camera's would
    turned.getexif()[274] = 6
    turned.info["exif"] = turned.getexif().tobytes()
    alone = model.similarity(turned, "a man")
    torch.testing.assert_close(alone[0, 0], model.similarity([Image.open(paths[0])], ["a man"])[0, 0])
    for images, sentences, said in ((3.5, "a man", "expected paths or PIL images, found float at index 0"),
                                    ([paths[0], None], "a man", "found NoneType at index 1"),
                                    (paths, [b"a man"], "expected sentences, found bytes at index 0"),
                                    (paths, [], "expected sentences, found an empty list"),
                                    (paths, "freckles", "no word of 'freckles' is in the model's vocabulary")):
        with pytest.raises((TypeError, ValueError), match=re.escape(said)):
            model.similarity(images, sentences)
    with pytest.warns(UserWarning, match="not in the model's vocabulary: freckles"):
        model.similarity(paths[0], "a man with freckles")


def test_what_the_patches_add_is_in_all_what_the_picture_has_over_a_grey_one(uninterrupted):
    model, pictures = FLIP.from_pretrained(uninterrupted), [Image.fromarray(x) for x in drawn(3, 48).images]
    added = search.attribute_patches(model, pictures, "a man", steps=100)
    assert added.shape == (3, 6, 6)
    pixels = normalize_batch([resize_to_array(picture, 48) for picture in pictures])
    with torch.no_grad():
        logits = [model.itm_logits(model.student.image_tokens_and_features(shown)[0], model.tokenizer(["a man"] * 3))
                  for shown in (pixels, 0 * pixels)]
    picture, grey = (each[:, 1] - each[:, 0] for each in logits)
    torch.testing.assert_close(added.sum((1, 2)), picture - grey, atol=1e-3, rtol=1e-3)
    # a patch that is grey itself adds nothing
    grey = np.tile(MEAN.numpy() * 255, (48, 48, 1)).round().astype(np.uint8)
    grey[8:16, 40:] = 0
    [added] = search.attribute_patches(model, Image.fromarray(grey), "a man")
    assert added[1, 5].abs() > 0.8 * added.abs().sum()      # the rest: grey is rounded to 8 bits


def test_a_sentence_is_explained_phrase_by_phrase_beside_each_face(uninterrupted, tmp_path, monkeypatch):
    query = "She is a smiling woman with blond hair and freckles, who is not wearing a hat and a tie."
    phrases = ["a smiling woman", "blond hair", "not wearing a hat", "a tie"]
    assert search.split_phrases(query, TOKENIZER) == phrases
    out = tmp_path / "found.png"
    monkeypatch.setattr(sys, "argv", ["search.py", "--checkpoint", f"{uninterrupted}/flip.pt", "--top", "2",
                                      "--images", str(write_celeba(tmp_path)), "--out", str(out), "--explain",
                                      "a man with a hat and a tie"])
    search.main()
    width, height = Image.open(out).size
    assert width > 4 * 128 and height > 2 * 128                 # two rows: the face, three phrases


def test_the_page_answers_with_faces_and_says_where_a_phrase_was_read(uninterrupted, tmp_path, monkeypatch):
    """Gradio's part is played by a stand-in, which takes the two functions that the page calls."""
    class Part:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, ask, query, outputs):
            calls["ask"] = ask

        def select(self, show, asked, maps):
            calls["show"] = show

        def launch(self, **options):
            calls["options"] = options
    calls, names = {}, ("Blocks", "Markdown", "Textbox", "State", "Gallery", "Image", "SelectData")
    page = SimpleNamespace(**dict.fromkeys(names, Part), Error=RuntimeError, Warning=warnings.warn)
    model, folder = FLIP.from_pretrained(uninterrupted), write_celeba(tmp_path)
    features = search.encode_folder(model, folder, tmp_path / "features.pt")
    monkeypatch.setitem(sys.modules, "gradio", page)
    search.serve(model, folder, tmp_path / "features.pt", 3)
    assert calls["options"] == {"server_name": "127.0.0.1", "inbrowser": True}
    gallery, asked, _ = calls["ask"]("a smiling woman")
    found = search.search(model, features, "a smiling woman", 3)
    assert [label for _, label in gallery] == [*map(str, found)]
    shown = calls["show"](asked, SimpleNamespace(index=2))
    assert shown.width > 2 * 192 and shown.height < 2 * 192
    with pytest.raises(RuntimeError, match="no word of"):
        calls["ask"]("freckles")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in error_of(search.serve, model, folder, "features.pt", 3)


def test_pictures_keep_their_proportions_on_a_sheet_and_the_frame_has_a_legend():
    wide = Image.new("RGB", (40, 20), "red")
    sheet = np.asarray(contact_sheet([("", [(wide, "", False), (wide, "", True)])], tile=100)).astype(int)
    red = (sheet == (255, 0, 0)).all(2)
    assert red.sum() == 2 * 100 * 50
    green = (sheet == (40, 160, 70)).all(2)
    assert green.sum() == 108 * 108 - 100 * 100
    with_legend = contact_sheet([("", [(wide, "", False)])], tile=100, legend="green: the true one")
    assert with_legend.height > len(sheet) and (np.asarray(with_legend) == (40, 160, 70)).all(2).any()


def test_search_computes_features_of_new_pictures_only(uninterrupted, tmp_path, monkeypatch):
    folder, model, opened = write_celeba(tmp_path), FLIP.from_pretrained(uninterrupted).eval(), []
    before = search.encode_folder(model, folder, tmp_path / "features.pt")
    monkeypatch.setattr(search, "load_image",
                        lambda path, **size: opened.append(path) or load_image(path, **size))
    Image.new("RGB", (9, 9)).save(folder / "new.png")
    after = search.encode_folder(model, folder, tmp_path / "features.pt")
    assert opened == [folder / "new.png"] and len(after) == 7
    assert all(torch.equal(after[path], before[path]) for path in before)


@pytest.mark.parametrize("arguments, shows", [
    ("vit.py", "class token first"), ("vit.py absent.jpg", "error: absent.jpg cannot be read: No such"),
    ("bert.py a-smiling-woman", "[CLS]"), ("bert.py --bert nowhere.txt", "error: nowhere.txt: no such file"),
    ("losses.py", "cross-entropy"), ("flip.py", "FLIP.update_momentum"),
    ("search.py --images nowhere query", "error: nowhere: no such folder"),
    ("toyfaces.py --out faces --count 3 --size 48", "written: faces"),
    ("toyfaces.py --sheet s.png --sketch k.png", "written: s.png k.png"),
    ("report.py --sample 20", "distinct"), ("report.py --data nowhere", "error: nowhere: no such folder or file"),
    ("train.py --lr -1", "error: --lr -1.0: expected at least 0"),
    ("finetune.py sketch --fractions 0.5", "error: --fractions is a flag of attributes"),
    ("bench.py attention --help", "compile"), ("flip.py --images DIR query", "error: flip.py takes no arguments; to search"),
    ("data.py", "[CLS]"), ("data.py --data DIR", "error: data.py takes no arguments")])
def test_every_file_shows_what_it_is_about_and_a_wrong_argument_ends_in_a_sentence(
        tmp_path, arguments, shows):
    script, *arguments = arguments.split()
    result = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True,
                            cwd=tmp_path)
    assert shows in result.stdout + result.stderr and "Traceback" not in result.stderr, result.stderr
    assert (result.returncode == 0) == ("error" not in shows)


def test_a_script_takes_numbers_that_slow_a_cpu_down_for_0_in_all_threads():
    script = ("import torch; from common.script import run_script; run_script(lambda: print("
              "(torch.full((10 ** 7,), 1e-38) * 0.1).count_nonzero().item()))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n"


# ---- the layout ----------------------------------------------------------------------------------
ORDER = """kernels/__init__ kernels/attention kernels/contrastive common/script common/images common/plots common/weights
    common/distributed common/optim common/resume vit bert losses flip captions drawing/portrait drawing/sketch
    toyfaces readers/index readers/tars readers/layouts data config evaluation train tasks finetune search
    report bench test_all""".split()


def imports_of(file):
    """The files of this project that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    names.update(name for name in ("kernels.__init__",) if "kernels" in names)
    return {name.replace(".", "/") for name in names} & set(ORDER)


def test_imports_run_down_only():
    found = {str(path.relative_to(ROOT).with_suffix("")) for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))}
    assert found == set(ORDER)
    for place, file in enumerate(ORDER):
        assert imports_of(file) <= set(ORDER[:place]), file
        if file.startswith("common/"):
            assert all(name.startswith("common/") for name in imports_of(file)), file
        if file != "test_all":
            assert not imports_of(file) & {"finetune", "search", "report", "bench"}, file


# ---- bad input ---------------------------------------------------------------------------------
@pytest.mark.parametrize("call, sentence", [
    (lambda: train_config.Config(batch_size=0), "--batch_size 0: expected at least 1"),
    (lambda: train_config.Config(alpha=2.0), "--alpha 2.0: expected at least 0 and at most 1"),
    (lambda: train_config.Config(hardness_ramp=(0.9, 0.1)), "--hardness_ramp (0.9, 0.1): expected two numbers, the smaller"),
    (lambda: train_config.Config(model="huge"), "--model huge: expected one of tiny, base, large"),
    (lambda: train_config.Config(lr=float("nan")), "--lr nan: expected at least 0"),
    (lambda: finetune.Config(fractions=(0.1, 2.0)), "--fractions (0.1, 2.0): expected at least"),
    (lambda: finetune.Config(task="attributes", fractions=(0.1, 0.1)), "(0.1, 0.1): expected no duplicates"),
    (lambda: finetune.Config(task="sketch", fractions=(0.1,)), "--fractions is a flag of attributes, not of"),
    (lambda: temporary_memmap((2 ** 30, 2 ** 30), "."), "GB free, but"),
    (lambda: drawn(3).subset([]), "drawn: no faces, expected at least one in this split"),
    (lambda: dataclasses.replace(drawn(3), captions=[["a"]] * 2), "drawn: 3 images, but 2 entries in c"),
    (lambda: data.BatchLoader(dataclasses.replace(drawn(), attributes=None), TOKENIZER, 8, 2),
     "drawn: expected captions, or attributes to write them from, found none"),
    (lambda: data.BatchLoader(drawn(6), TOKENIZER, 16, 4, world_size=2), "drawn: 6 faces are fewer than a batch of 8"),
    (lambda: FLIP(small_flip().config, Tokenizer.train(["a smiling woman"])), "27 entries"),
    (lambda: small_flip().sample_negatives(unit(3, 12), unit(3, 12), torch.tensor([4, 4, 4])), "same person"),
    (lambda: small_flip().sample_negatives(unit(3, 12) * torch.nan, unit(3, 12), torch.arange(3)), "diverged"),
])
def test_what_cannot_be_meant_is_refused_with_one_sentence(call, sentence):
    assert sentence in error_of(call)


def test_a_vocabulary_without_cls_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\nwoman\n")
    assert "vocab.txt: the vocabulary has no [CLS]" in error_of(Tokenizer.load, tmp_path / "vocab.txt")


OFFICIAL = recorded("checkpoint.")
LESS = {name: tensor for name, tensor in OFFICIAL.items() if name != "text_proj.weight"}


@pytest.mark.parametrize("weights, config, sentence", [
    (None, None, "model.pt: no such file or folder"), ("noise" * 100, None, "model.pt: not a checkpoint"),
    ({"a": torch.ones(1)}, None, "model.pt is neither one of our checkpoints nor an official one"),
    (OFFICIAL | {"surprise": torch.ones(1)}, GOLDEN_CONFIG, "surprise"),
    (LESS, GOLDEN_CONFIG, "text_proj.weight is missing"), (OFFICIAL, None, "pass config="),
    (OFFICIAL, dataclasses.replace(GOLDEN_CONFIG, embed_dim=64), "has shape"),
])
def test_a_file_that_is_no_checkpoint_or_does_not_fit_is_refused_with_what_is_wrong(
        tmp_path, weights, config, sentence):
    path = tmp_path / "model.pt"
    if isinstance(weights, str):
        path.write_text(weights)
    elif weights:
        torch.save({"model": weights}, path)
    assert sentence in error_of(FLIP.from_pretrained, path, config)


# ---- README.md ---------------------------------------------------------------------------------
def test_every_command_of_the_readme_works(tmp_path, monkeypatch):
    """As written, but on less data, with stand-ins for downloads; 8 GPUs are only parsed."""
    import runpy
    monkeypatch.chdir(tmp_path)
    write_celeba(tmp_path / "DIR", count=40)
    torch.manual_seed(0)
    official_like = FLIP(FLIPConfig(ViTConfig(32, 8, 64, 1, 1), BertConfig(81, 64, 1, 1, 66), 16, 4))
    torch.save({"model": official_state(official_like)}, "FLIP-base.pth")
    Path("vocab.txt").write_text(str(RECORDED["vocab"]))
    less = {"train.py": "--faces 64 --validation 20 --steps 4 --batch_size 8", "toyfaces.py": "--count 60",
            "finetune.py": "--faces 16 --validation 3 --test 6 --epochs 1"}
    blocks, ran = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL), set()
    for command in re.split(r"\n| && ", "".join(blocks).strip()):
        program, *arguments = shlex.split(command.replace("bert-base-uncased", "vocab.txt"))
        if program == "torchrun":
            train_config.parse_arguments(arguments[arguments.index("train.py") + 1:])
        elif program == "python" and arguments[0] != "bench.py":          # has tests of its own
            more = [] if "--resume" in arguments else less.get(arguments[0], "").split()
            monkeypatch.setattr(sys, "argv", [*arguments, *more])
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")       # fails with SystemExit
        ran.add(program)
    assert ran == {"pip", "python", "pytest", "torchrun"}
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(lines.replace("000325", "000032"), {})             # there are fewer


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """`python train.py`: its configuration and metrics."""
    folder = tmp_path_factory.mktemp("default")
    flags = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True)
    config = train_config.parse_arguments(flags)
    return config, log_of(folder / "out")[-1]


@pytest.mark.slow
def test_the_default_run_finds_faces_more_often_than_knowing_all_attributes_does(default_run):
    """Text to image; by as much as RESULTS.md says, but for three points."""
    config, metrics = default_run
    references = evaluation.Validation.of(train.load_data(config, 48)[1]).references
    assert 60 <= references["attribute match"][1] <= 80 and references["Bayes optimum"][0] > 65
    assert all(metrics[name] >= least for name, least in (("img_r1", 48), ("img_r5", 78), ("img_r10", 86)))


def patches_of(index, seed, parts, patch=8, fine=5):
    """Which of the 6 x 6 patches of a drawn face have one of these parts on at least a tenth."""
    rng = np.random.default_rng((seed, index))
    look, shapes = portrait.build_shapes(toyfaces.sample_attributes(rng), rng)
    shown = Image.new("L", (48 * fine, 48 * fine))
    pen = ImageDraw.Draw(shown)
    for shape, line in zip(shapes, portrait.project_outlines(look, shapes, shown.width, 5)):
        if shape.part in parts and shape.width:
            pen.line(line.ravel().tolist(), 1, round(shape.width * look.scale * shown.width))
        elif shape.part in parts:
            pen.polygon(line.ravel().tolist(), 1)
    return np.asarray(shown).reshape(6, patch * fine, 6, patch * fine).mean((1, 3)) >= 0.1


@pytest.mark.slow
def test_a_phrase_is_read_where_on_the_face_it_is(default_run):
    """`pytest -m slow -k is_read_where -s` prints RESULTS.md's table."""
    model = FLIP.from_pretrained(default_run[0].out)
    torch.manual_seed(0)
    untrained = train.init_model(model.config, model.tokenizer).eval()
    told = {"Eyeglasses": ("glasses", ["glasses"]), "Wearing_Hat": ("a hat", ["hat"]),
            "Mustache": ("a mustache", ["moustache"]), "Wearing_Earrings": ("earrings", ["earring"]),
            "Wearing_Necktie": ("a tie", ["tie"]), "Smiling": ("smiling", ["lips", "mouth", "teeth"])}
    faces, ratios = [toyfaces.face(i, 21, 48) for i in range(4000)], []
    for name, (phrase, parts) in told.items():
        chosen = [i for i, (_, has) in enumerate(faces) if has[ATTRIBUTES.index(name)]][:60]
        inside = np.stack([patches_of(i, 21, parts) for i in chosen])
        row = [100 * inside.mean()]
        for each in (model, untrained):
            added = search.attribute_patches(each, [faces[i][0] for i in chosen], phrase).clamp(min=0)
            shares = (added / added.sum((1, 2), keepdim=True)).numpy()
            row.append(100 * (shares * inside).sum((1, 2)).mean())
        ratios.append([row[1] / row[0], row[2] / row[0]])
        print(f"| {phrase} |", " | ".join(f"{value:.1f}" for value in (*row, *ratios[-1])), "|")
    ours, random = np.mean(ratios, axis=0)
    print(f"on average {ours:.1f} and {random:.1f} times the part's share of the patches")
    assert ours >= 3 and 0.5 < random < 1.5


def in_the_middle(sketch):
    """The drawn pixels moved so that their mean is the middle of the picture."""
    shift = [round((size - 1) / 2 - places.mean()) if len(places) else 0
             for size, places in zip(sketch.shape, np.nonzero(sketch > 64))]
    return np.asarray(Image.fromarray(sketch).rotate(0, translate=shift[::-1]))


@pytest.mark.slow
def test_a_sketch_gives_away_where_its_photo_has_the_head_and_else_only_what_it_shows(default_run, tmp_path):
    """`pytest -m slow -k gives_away -s` prints RESULTS.md's figures: how early a photo is found."""
    origin, _ = default_run
    config = finetune.parse_arguments(["sketch", "--checkpoint", f"{origin.out}/flip.pt", "--no-random",
                                       "--cache", origin.cache, "--out", str(tmp_path)])
    finetune.finetune(config)
    task, model = tasks.Sketch(config), FLIP.from_pretrained(tmp_path / "sketch").eval()
    faces = task.open("test", model)

    def percentiles(title, sketches):
        samples = task.encode(model, dataclasses.replace(faces, sketches=sketches), for_training=False)
        found = task.metrics(model, samples)
        steps = {step: round(found["percentile"][step - 1], 1) for step in (1, 2, 3, 7, 14, 35, 70)}
        print(title, f"m@A {found['m@A']:.1f} m@B {found['m@B']:.1f}", steps)
        return np.array(found["percentile"])
    sketches = np.asarray(faces.sketches)
    drawn = percentiles("as drawn", sketches)
    assert drawn[0] < 65 < 70 < drawn[6] and drawn[-1] >= 90
    centred = np.stack([[in_the_middle(step) for step in steps] for steps in sketches])
    moved = percentiles("in the middle", centred)
    assert abs(moved[:3] - 50).max() < 7 and moved[-1] < 80     # by chance 50, with a standard error of 2
    assert abs(percentiles("another person's", np.roll(sketches, 1, axis=0)) - 50).max() < 7


# ---- when things break -------------------------------------------------------------------------
def test_a_tokenizer_json_that_pads_and_cuts_gives_the_same_pieces(tmp_path):
    """transformers saves its settings of the day along; no caption may depend on them, or on its
    batch."""
    plain = golden_tokenizer(tmp_path)
    spoilt = Tokenizer.from_json(plain.to_json()).wordpiece
    spoilt.enable_padding(length=65)
    spoilt.enable_truncation(max_length=5)
    texts = ["a man", *SENTENCES["eval"]]
    found = Tokenizer.from_json(spoilt.to_str())(texts)
    assert torch.equal(found.ids, plain(texts).ids)
    assert torch.equal(found.sequences.lengths, plain(texts).sequences.lengths)


def test_a_loaded_model_is_in_evaluation_mode(uninterrupted):
    assert not FLIP.from_pretrained(uninterrupted).training


def test_a_loss_that_is_no_number_ends_the_run_with_its_step_though_itm_is_off(tmp_path, cache):
    config = quick(tmp_path, cache, itm_from=1.0, lr=1e18, grad_clip=0.0, log_every=2)
    assert re.match("a loss of step [2-8] is NaN or infinite", error_of(train.train, config))


def test_weights_that_are_no_numbers_never_replace_good_ones_and_are_refused_on_loading(tmp_path, cache):
    run = train.setup(quick(tmp_path, cache))
    save(run, 1)
    good = (tmp_path / "flip.pt").read_bytes()
    with torch.no_grad():
        run.model.student.text.words.weight[3, 4] = torch.nan
    assert "after step 2: expected finite weights, found NaN" in error_of(save, run, 2)
    assert (tmp_path / "flip.pt").read_bytes() == good
    write_checkpoint(run.model.checkpoint(), tmp_path / "flip.pt")
    assert "some weights are NaN or infinite" in error_of(FLIP.from_pretrained, tmp_path)


def test_a_flipped_bit_and_a_shorter_storage_are_refused_and_a_compressed_file_is_read(
        uninterrupted, tmp_path):
    whole, path = (uninterrupted / "flip.pt").read_bytes(), tmp_path / "flip.pt"
    with zipfile.ZipFile(uninterrupted / "flip.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    largest = max(entries, key=lambda name: len(entries[name]))
    place = whole.index(entries[largest]) + 4321
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1:])
    assert "flip.pt: not a checkpoint, or damaged (wrong checksum of" in error_of(FLIP.from_pretrained, path)
    for length in (None, 1000):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content[:length] if name == largest else content)
        if length is None:
            assert weights_sum(path) == weights_sum(uninterrupted)
    assert "damaged (record size (1000 bytes) does not match" in error_of(FLIP.from_pretrained, path)


@pytest.mark.parametrize("part, field, value", [
    ("vit", "depth", 2 ** 40), ("vit", "width", 10 ** 6), ("vit", "patch_size", 0),
    ("bert", "vocab_size", -1), ("bert", "positions", "66"), ("vit", "image_size", 96.0)])
def test_sizes_out_of_range_are_sentences_before_memory_is_taken(uninterrupted, tmp_path, part, field, value):
    saved = torch.load(uninterrupted / "flip.pt")
    saved["flip"][part][field] = value
    torch.save(saved, tmp_path / "flip.pt")
    assert f"{field} is {value!r}, expected an integer" in error_of(FLIP.from_pretrained, tmp_path)


def test_words_that_the_vocabulary_lacks_are_named():
    tokenizer = Tokenizer.train(["a man with glasses, o'clock"])
    assert tokenizer.split_known("A bald man with red glasses.")[1] == ["bald", "red"]
    assert tokenizer.split_known("man/xyz Ω ?") == (["man"], ["xyz", "ω"]) and tokenizer.split_known("???") == ([], [])
    assert tokenizer.split_known("a man, o'clock")[1] == []


def test_a_search_for_words_of_which_none_is_known_says_so(uninterrupted, tmp_path, monkeypatch):
    arguments = ["--checkpoint", str(uninterrupted), "--images", str(tmp_path), "freckles"]
    monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
    assert "no word of 'freckles' is in the model's vocabulary" in error_of(search.main)


def test_a_named_pipe_and_an_odd_cache_are_passed_over(uninterrupted, tmp_path):
    model, cache = FLIP.from_pretrained(uninterrupted), tmp_path / "features.pt"
    os.mkfifo(write_pictures(tmp_path / "faces", ["0.png"]) / "pipe.png")
    (picture, feature), = search.encode_folder(model, tmp_path / "faces", cache).items()
    (key, _), = torch.load(cache).items()
    for odd in ([1, 2], {key: 3}, {key: feature * torch.nan}):
        torch.save(odd, cache)
        found = search.encode_folder(model, tmp_path / "faces", cache)
        assert found.keys() == {picture} and torch.equal(found[picture], feature)


def test_what_would_be_misread_is_refused(tmp_path):
    assert "expects a list of captions, found a string: 'a man'" in error_of(TOKENIZER, "a man")
    twice = [*bert.SPECIAL, "man", "man"]
    assert "lists 'man' 2 times, expected every piece once" in error_of(Tokenizer.from_vocabulary, twice)
    write_captions(tmp_path, [{"image": "0.png", "caption": "a face"}], "train.json")
    write_captions(tmp_path, [{"image": "0.png", "caption": "a face"}], "test.json")
    error = error_of(open_faces, tmp_path)
    assert "test.json record 0 (counted from 0): images/0.png is already listed in split train" in error
    write_mm_celeba(tmp_path / "mm")
    (tmp_path / "mm/text/celeba-caption/003.txt").write_text("face three")
    assert "face three" in open_faces(tmp_path / "mm").captions[1]


def test_a_model_of_depth_5_is_pooled_at_four_depths_too():
    vectors = tasks.pool_tokens(ViT(ViTConfig(32, 8, 24, 5, 3)), torch.zeros(1, 3, 32, 32))
    assert vectors.shape == (1, 12, 24) and len(vectors[0].unique(dim=0)) == 12


def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    write_checkpoint({"model": 1}, tmp_path / "flip.pt")

    def full(contents, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 5684864 vs 5684752")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="flip.pt could not be written; is the disk full?"):
        write_checkpoint({"model": 2}, tmp_path / "flip.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "flip.pt") == {"model": 1} and len(list(tmp_path.iterdir())) == 1


def test_checkpoints_are_saved_by_time_as_well(tmp_path, cache, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save", lambda run, step: saved.append(step))
    train.train(quick(tmp_path, cache, save_every=0.0))
    assert saved == list(range(1, 9))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(world, out, cache, *flags, script=(str(ROOT / "train.py"),)):
    """So many processes of `python train.py`, as torchrun would start them."""
    command = [sys.executable, *script, "--out", str(out), "--cache", cache, *flags]
    environments = [os.environ | {"OMP_NUM_THREADS": "1"}]
    if world > 1:
        group = environments[0] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                                   "WORLD_SIZE": str(world)}
        environments = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(world))]
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=each) for each in environments]


def ended_well(processes):
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return all(process.returncode == 0 for process in processes), errors


SHORT = ("--faces 64 --validation 10 --steps 24 --batch_size 8 --log_every 1 --eval_every 1000 --itm_from 0 "
         "--momentum_from 0.3 --queue_from 0.5 --queue_size 40").split()


def losses_of(out):
    return [(line["step"], line["itc"], line["itm"]) for line in log_of(out) if "itc" in line]


def test_two_processes_that_are_told_to_stop_save_and_go_on_as_if_they_had_not_been(tmp_path, cache):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert ended_well(start(2, whole, cache, *SHORT))[0]
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
def step_and_stop(run, micro_batches, step, train_step=train.train_step):
    if step == 4 and os.environ["RANK"] == "1":             # one of them hears of it, both end
        signal.raise_signal(signal.SIGTERM)
    return train_step(run, micro_batches, step)
train.train_step = step_and_stop
train.run_script(lambda: train.train(train.parse_arguments()))
"""
    processes = start(2, stopped, cache, *SHORT, script=("-c", code))
    _, errors = ended_well(processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "stopped after step 5" in errors[0] and "stopped" not in errors[1]
    assert ended_well(start(2, stopped, cache, "--resume"))[0]
    assert losses_of(stopped) == losses_of(whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads there")
def test_no_thread_of_the_process_group_outlives_a_run(tmp_path, cache):
    """One that frees a tensor while Python ends aborts the process: one run in thirty."""
    code = f"""
import atexit, os, sys
def report(when):
    threads = [open(f"/proc/self/task/{{n}}/comm").read().strip() for n in os.listdir("/proc/self/task")]
    print(when, *threads)
atexit.register(report, "after")                # is called last: train.py registers its own later
sys.path.insert(0, {str(ROOT)!r})
import train
config = train.parse_arguments({["--out", str(tmp_path / "run"), "--cache", cache, *SHORT]})
run = train.setup(config)
run = run._replace(ddp_model=train.DistributedDataParallel(run.model, find_unused_parameters=True))
report("during")
train.train_step(run, [next(run.loader.iterate_from(0))], 0)
del run
"""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "1", "RANK": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | group, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    during, after = (line for line in done.stdout.splitlines() if line.startswith(("during", "after")))
    assert "gloo" in during and "gloo" not in after


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_fifty_kills_each_are_resumed_bit_for_bit(tmp_path, cache, world):
    """At random moments, those of writing a checkpoint included: it is saved at every step."""
    assert ended_well(start(world, tmp_path / "whole", cache, *SHORT))[0]
    rng, kills = np.random.default_rng(0), 0

    def go_on(out):
        anew = [*SHORT, "--save_every", "0"]
        return start(world, out, cache, *(["--resume"] if (out / "flip.pt").exists() else anew))
    while kills < 50:
        out = tmp_path / f"killed {kills}"
        for _ in range(5):
            processes = go_on(out)
            while not (out / "log.jsonl").exists():
                assert processes[0].poll() is None, processes[0].communicate()
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 2.5))
            kills += any(process.poll() is None for process in processes)
            for process in processes:
                process.kill()
                process.communicate()
        assert ended_well(go_on(out))[0]
        assert losses_of(out) == losses_of(tmp_path / "whole")
        shutil.rmtree(out)


def damaged(content, rng):
    """Bytes of a file that something happened to."""
    a, b = sorted(rng.integers(len(content), size=2).tolist())
    b = min(b, a + int(rng.integers(1, 300)))
    noise = rng.integers(256, size=b - a, dtype=np.uint8).tobytes()
    return [content[:a], content[:a] + bytes(b - a) + content[b:], content[:a] + noise + content[b:],
            content[:a] + noise + content[a:], content[:b] + content[a:],
            content[:a] + bytes([content[a] ^ 1 << int(rng.integers(8))]) + content[a + 1:]][rng.integers(6)]


def count_faces(folder):
    return [len(open_faces(folder, split)) for split in ("train", "test")]


def weights_sum(folder):
    state = FLIP.from_pretrained(folder).state_dict()
    return {name: tensor.double().sum().item() for name, tensor in state.items()}


@pytest.fixture
def what_can_break(tmp_path, uninterrupted):
    """{file: what reads it}: one of each kind, whole at first."""
    model = FLIP.from_pretrained(uninterrupted)
    pieces = model.tokenizer.wordpiece.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(pieces, key=pieces.get)))
    (tmp_path / "tokenizer.json").write_text(model.tokenizer.to_json())
    shutil.copy(uninterrupted / "flip.pt", tmp_path / "flip.pt")
    write_parted_celeba(tmp_path / "celeba")
    write_celeba(tmp_path / "kaggle", kaggle=True)
    write_mm_celeba(tmp_path / "mm", pickles=True)
    write_lfwa_matlab(write_pictures(tmp_path / "lfwa", []))
    write_fs2k(tmp_path / "fs2k")
    for name, numbers in (("train.json", "012"), ("test.json", "3")):
        records = [{"image": f"{n}.png", "caption": f"face {n}"} for n in numbers]
        write_captions(tmp_path / "lists", records, name)
    records = {f"{n}.jpg": {"overall_caption": f"face {n}"} for n in (0, 1, 2, 24000)}
    write_dialog(tmp_path / "dialog", records)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars")
    write_pictures(tmp_path / "search", ["0.png"])

    def use(path):
        FLIP(model.config, Tokenizer.load(path))

    def features(path):
        found = search.encode_folder(model, tmp_path / "search", path)
        return {picture: feature.sum() for picture, feature in found.items()}
    features(tmp_path / "cache.pt")
    readers = {"vocab.txt": use, "tokenizer.json": use, "flip.pt": weights_sum, "cache.pt": features}
    for name in ("celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt", "lists/train.json",
                 "kaggle/list_attr_celeba.csv", "kaggle/list_eval_partition.csv", "mm/train/filenames.pickle",
                 "mm/test/filenames.pickle", "dialog/captions_hq.json", "tars/00000.tar",
                 "lfwa/lfw_att_40.mat", "lfwa/indices_train_test.mat", "fs2k/anno_train.json"):
        readers[name] = lambda path, folder=name.split("/")[0]: count_faces(tmp_path / folder)
    readers["dialog/captions_hq.json"] = lambda path: len(count_faces(path.parent))     # equal names hide a face
    return {tmp_path / name: read for name, read in readers.items()}


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_ends_in_a_sentence_or_changes_nothing(what_can_break, cases, capsys):
    """Never in a traceback, a hang, much memory, fewer records or other weights without a word."""
    rng, before = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = {path: (path.read_bytes(), read(path)) for path, read in what_can_break.items()}
    outcomes = Counter()
    for case in range(cases):
        path = list(whole)[case % len(whole)]
        content, expected = whole[path]
        path.write_bytes(damaged(content, rng))
        begin = time.perf_counter()
        try:
            found = what_can_break[path](path)
            if isinstance(found, list):                     # of counts; a record may now be there twice
                found = [min(pair) for pair in zip(found, expected)]
            assert found == expected, (case, path)
            outcomes["unharmed"] += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, (case, path, str(error))
            outcomes["a sentence"] += 1
        assert time.perf_counter() - begin < 20, (case, path)
        path.write_bytes(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "KB"
    with capsys.disabled():
        print(dict(outcomes), end=" ")


# ---- kernels, compiled -------------------------------------------------------------------------
def test_every_shipped_kernel_compiles_for_a100_and_h100_without_spilling(compiling):
    pytest.importorskip("triton", reason="Triton comes for Linux only")
    printed, errors = compiling.communicate()
    assert compiling.returncode == 0, errors[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    kernels, dtypes, _, _, capabilities, _, spilled, _ = zip(*rows)
    assert set(kernels) == {"fwd_kernel", "bwd_dq_kernel", "bwd_dkdv_kernel", "triton_sums_kernel"}
    assert set(zip(dtypes, capabilities)) == set(itertools.product(("fp16", "bf16", "fp32"), ("8.0", "9.0")))
    assert set(spilled) == {"0"}

"""Tests of every file, in the order of ORDER: `pytest test_all.py`; `pytest -m slow` runs the long ones.

Numbers are compared against references that are not part of the project: golden.npz (recorded from the
official code at a small size, with random weights and dropout 0), torch's own modules, closed forms.
"""
import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.distributed.elastic.utils.distributed import get_free_port

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # before Triton is imported: its kernels take CPU tensors, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bench
import captions as grammar
import common.distributed
import common.images
import common.pictures
import common.script
import config as train_config
import data
import evaluation
import finetune
import losses
import optimum
import pretrained
import report
import runs
import search
import toyfaces
import train
import vit
from attention import Attention, Sequences, attention
from bert import Bert, BertConfig, BertLayer
from captions import ATTRIBUTES, FACTS
from common.images import load_image, normalize_batch, resize_to_array
from common.seeds import derive_seed, random_stream
from common.words import known_and_unknown_words
from drawing import portrait
from flip import FLIP, FLIPConfig, StepParams, rerank
from kernels import attention as attention_kernels
from kernels import contrastive as contrastive_kernels
from kernels import triton
from losses import contrastive_loss
from optim import Muon, build_optimizers, set_learning_rate, warmup_decay
from pretrained import load_bert, load_clip, map_key, official_name, official_state
from readers import index, layouts
from readers.index import TarImage
from runs import Log
from tokenizer import SPECIAL, Captions, Tokenizer, clean_caption
from vit import ViT, ViTConfig

torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)    # several threads sum in varying order, so that equal runs differ
ROOT = Path(__file__).parent
RECORDED = dict(np.load(ROOT / "golden.npz"))
GOLDEN = {name: torch.from_numpy(value) for name, value in RECORDED.items() if value.dtype.kind != "U"}
SENTENCES, SHAPES = (json.loads(str(RECORDED[name])) for name in ("captions", "base_shapes"))
GOLDEN_CONFIG = FLIPConfig(ViTConfig(image_size=32, patch_size=8, width=24, depth=4, heads=3),
                           BertConfig(vocab_size=81, width=20, depth=3, heads=2, positions=66, dropout=0.0),
                           embed_dim=12, queue_size=8)


# ---- helpers of several sections -----------------------------------------------------------------
def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=0, atol=tolerance)


def error_of(call, *args, **kwargs):
    """What `run_script` prints of the error that a call raises, which must be one line."""
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)) as caught:
        call(*args, **kwargs)
    message = "; ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "\n" not in message
    return message


cosines_of = lambda model, images, texts: model.encode_image(images) @ model.encode_text(texts).T
unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
with_gradients = lambda out, inputs, grad=None: (out, *torch.autograd.grad(out, inputs, grad))
take = lambda loader, start, count: list(itertools.islice(loader.iterate_from(start), count))
log_of = lambda out: [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def recorded(prefix):
    """{rest of the name: tensor} of all names in golden.npz with this prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """No test depends on what is in the working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def official(tmp_path):
    """The official checkpoint, written in the official format and loaded."""
    path = tmp_path / "official.pth"
    torch.save({"model": recorded("checkpoint."), "optimizer": {}, "config": {}, "epoch": 0}, path)
    return FLIP.from_pretrained(path, GOLDEN_CONFIG)


def golden_tokenizer(folder):
    (folder / "vocab.txt").write_text(str(RECORDED["vocab"]))
    return Tokenizer.load(folder)


def golden_captions(part, index=...):
    """The recorded ids of a part, packed."""
    ids, mask = GOLDEN[f"{part}.input_ids"][index], GOLDEN[f"{part}.attention_mask"][index].bool()
    return Captions(ids[mask], Sequences.from_lengths(mask.sum(-1)))


def small_flip(queue_size=8, dropout=0.0):
    torch.manual_seed(0)
    text = dataclasses.replace(GOLDEN_CONFIG.bert, dropout=dropout)
    return FLIP(dataclasses.replace(GOLDEN_CONFIG, bert=text, queue_size=queue_size))


def random_faces(count, seed=0):
    """Attributes (count, 40)."""
    rng = np.random.default_rng(seed)
    return np.array([toyfaces.sample_attributes(rng) for _ in range(count)])


TEXTS = [grammar.sample_caption(a, np.random.default_rng(i))[0] for i, a in enumerate(random_faces(200))]
TOKENIZER = Tokenizer.train(TEXTS)


def noise_faces(count=20, size=16):
    images = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    return data.Faces("noise", images, np.arange(count), random_faces(count))


def write_files(folder, files):
    """{name: content}: images, texts, bytes, or anything that JSON can express."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(folder / name)
        else:
            content = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def grey_images(names):
    return {name: Image.new("RGB", (8, 8), (i % 256,) * 3) for i, name in enumerate(names)}


VALUES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


def write_celeba(folder, kaggle=False, count=6, held_out=1):
    """CelebA's layout, or Kaggle's of it; the last 2 * held_out faces are for validation and test."""
    names, attributes = [f"{i + 1:06d}.jpg" for i in range(count)], random_faces(count)
    images = folder / "img_align_celeba" / ("img_align_celeba" if kaggle else ".")
    write_files(images, {n: Image.new("RGB", (178, 218), (40 * i, 90, 60)) for i, n in enumerate(names)})
    rows = ([name, *np.where(row, "1", "-1")] for name, row in zip(names, attributes))
    parts = [*zip(names, np.repeat(["0", "1", "2"], [count - 2 * held_out, held_out, held_out]))]
    if kaggle:
        quoted = [",".join(f'"{field}"' for field in row) for row in [["image_id", *ATTRIBUTES], *rows]]
        lines = map(",".join, [("image_id", "partition"), *parts])
        return write_files(folder, {"list_attr_celeba.csv": "\n".join(quoted),
                                    "list_eval_partition.csv": "\n".join(lines)})
    lines = [f"{count}", " ".join(ATTRIBUTES) + " ", *("  ".join(row) for row in rows), ""]
    return write_files(folder, {VALUES: "\n".join(lines),
                                PARTITION: "".join(f"{name} {part}\n" for name, part in parts)})


def open_faces(path, split="train", **options):
    """data.open_faces with its index in a folder beside the data set."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return data.open_faces(path, split, cache=folder / "cache", **options)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


QUICK = train_config.RECIPES["tiny"] | dict(        # every part of the recipe is in use after a few steps
    faces=48, validation=20, steps=8, batch_size=8, precision="float32", queue_size=20, queue_from=0.25,
    itm_from=0.1, itm_every=1, hardness_ramp=(0.2, 0.6), alpha_ramp=(0.2, 0.8), momentum_from=0.2, warmup=2,
    log_every=1, eval_every=6)


def quick(out, cache, **changes):
    """The configuration of a short run on a few drawn faces."""
    return train_config.Config(**QUICK | dict(out=str(out), cache=cache) | changes)


def setup(config):
    """What a run starts from; its log stays open, so that no other run can use the folder."""
    device = common.distributed.init_distributed(config.device)
    return runs.start_run(config, device, Log(Path(config.out) / "log.jsonl"))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cache):
    """The folder of a finished `quick` run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train.train(quick(out, cache))
    return out


def run_python(*arguments):
    """`python arguments` in a process of its own, which must succeed; returns its output."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def group_of(world):
    """The environment variables that torchrun would give each of `world` processes."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port()), "WORLD_SIZE": str(world)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


# ---- attention.py and its kernels: against float64 autograd through the definition ---------------
OWN = [1, 5, 16, 17, 64, 65, 0], [1, 5, 16, 17, 64, 65, 0]                      # the last: an empty caption
OTHERS = [17, 24, 0], [65, 10, 7]                                               # no queries for the third
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}                          # half: w is rounded, too
TOLERANCE |= {torch.bfloat16: 8e-3} if DEVICE == "cuda" else {}                 # the interpreter's is wrong
EVERY_DEVICE = pytest.mark.parametrize("device, dtype", [
    ("pytorch", torch.float32), *(("triton", dtype) for dtype in TOLERANCE)], indirect=["device"])


@pytest.fixture(params=["pytorch", "triton"])
def device(request, monkeypatch):
    """The device for PyTorch alone, or for the kernels: a GPU, or the CPU with Triton's interpreter."""
    if request.param == "pytorch":
        return "cpu"
    if DEVICE == "cpu":
        monkeypatch.setattr("attention.supports_attention", lambda query: True)
        monkeypatch.setattr(losses, "supports_contrastive", lambda feature: True)
        few = functools.partial(losses.triton_average_keys, programs=8)
        monkeypatch.setattr(losses, "triton_average_keys", few)
    return DEVICE


def attention_case(query_lengths, key_lengths, device=DEVICE, dtype=torch.float32, channels=16):
    """(q, k, v) of two heads, (queries, keys), and a gradient with respect to the result of attention."""
    torch.manual_seed(0)
    queries, keys = Sequences.from_lengths(query_lengths, device), Sequences.from_lengths(key_lengths, device)
    tokens = queries.num_tokens, keys.num_tokens, keys.num_tokens, queries.num_tokens
    *inputs, grad = (torch.randn(n, 2, channels).to(device, dtype) for n in tokens)
    return [x.requires_grad_() for x in inputs], (queries, keys), grad


def attention_and_gradients(inputs, sequences, grad, dropout=0.0):
    """(o, dq, dk, dv), with the same dropout each time."""
    torch.manual_seed(7)
    return with_gradients(attention(*inputs, *sequences, dropout=dropout), inputs, grad)


def expected_attention(inputs, sequences, grad, factors=itertools.repeat(1.0)):
    """(o, dq, dk, dv) by float64 autograd through the definition, sequence by sequence;
    factors: dropout's multipliers of the weights of each query sequence."""
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    (queries, keys), out = sequences, []
    for i, factor in zip(range(len(queries)), factors):
        rows, columns = slice(*queries.offsets[i:i + 2]), slice(*keys.offsets[i:i + 2])
        weights = (torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights * factor, v[columns]))
    return with_gradients(torch.cat(out), exact, grad.double())


def assert_near(actual, expected, tolerance):
    """The norm of each tensor's error is at most `tolerance` times the tensor's norm."""
    for x, exact in zip(actual, expected, strict=True):
        assert (x.double() - exact).norm() <= tolerance * exact.norm()


@EVERY_DEVICE
@pytest.mark.parametrize("lengths, channels", [
    (OWN, 16), (OWN, 24), (OTHERS, 32), (([133], [133]), 64), (([0, 32], [16, 197]), 64),
    (([4, 3], [0, 5]), 16), (([5, 5, 5], [5, 5, 5]), 8), (([1, 1, 1], [4, 9, 2]), 8), (([9, 7], [7, 7]), 8)])
def test_attention_and_its_gradients_match_float64_autograd(device, dtype, lengths, channels):
    case = attention_case(*lengths, device, dtype, channels)
    assert_near(attention_and_gradients(*case), expected_attention(*case), TOLERANCE[dtype])


@EVERY_DEVICE
def test_dropout_drops_the_same_weights_forward_and_backward_and_rescales_the_rest(device, dtype):
    """With equal scores and the identity as values, the output shows which weights were dropped. The
    definition with these weights dropped must then give the results for any other scores."""
    inputs, sequences, grad = attention_case([65, 9], [80, 30], device, dtype, channels=64)
    q, k, v = inputs
    identity, halves = torch.cat([torch.eye(n, 128) for n in (80, 30)]).to(v), []
    for half in identity[:, None].expand(-1, 2, -1).split(64, -1):
        torch.manual_seed(7)
        one, other = (attention(q * 0, k, half, *sequences, dropout=0.3) for _ in range(2))
        halves.append(one)
    factors = [(o[..., :n].transpose(0, 1) > 0).double() / 0.7                              # (H, Lq, n)
               for o, n in zip(torch.cat(halves, -1).split([65, 9]), (80, 30))]
    kept = torch.cat([factor.flatten() for factor in factors]).bool().double().mean()
    assert kept == pytest.approx(0.7, abs=0.022)                                            # 5 deviations
    assert not torch.equal(other, one), "another seed drops others"
    expected = expected_attention(inputs, sequences, grad, factors)
    assert_near(attention_and_gradients(inputs, sequences, grad, 0.3), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("first, second", [(0.1, 0.1), (0.0, 2.0 ** -40)])
def test_attention_kernels_are_deterministic_and_exact_at_dropout_0(device, first, second):
    """A dropout of 2 ** -40 takes the path of dropout and drops nothing."""
    one, other = (attention_and_gradients(*attention_case(*OTHERS), dropout) for dropout in (first, second))
    assert all(map(torch.equal, one, other))


# ---- losses.py (ITC) and its kernel: against float64 autograd through torch's cross-entropy ------
def contrastive_case(B=20, Q=300, E=32, temperature=0.07, dtype=torch.float32):
    """All arguments but alpha. Momentum features are near their keys; persons recur in batch and queue."""
    torch.manual_seed(0)
    feature, momentum, noise, queue = (
        x.to(DEVICE) for x in (unit(B, E), unit(B, E), torch.randn(B, E), unit(Q, E)))
    keys = torch.cat([F.normalize(momentum + 0.1 * noise, dim=-1), queue]).to(dtype)
    persons = torch.cat([torch.arange(B) // 2, torch.randint(0, 50, (Q,))]).to(DEVICE)
    tau = torch.tensor(temperature, device=DEVICE, requires_grad=True)
    return feature.requires_grad_(), momentum, keys, persons[:B], persons, tau


def expected_contrastive(feature, momentum, keys, identity, key_identity, temperature, alpha):
    """(loss, dq, dtau). The target is uniform over the keys of the same person, mixed with the softmax of
    the momentum encoder."""
    q, tau = exact = [x.detach().double().requires_grad_() for x in (feature, temperature)]
    k, same = keys.double(), (identity[:, None] == key_identity).double()
    soft = (momentum.double() @ k.T / tau.detach()).softmax(1)
    target = (1 - alpha) * same / same.sum(1, keepdim=True) + alpha * soft
    return with_gradients(F.cross_entropy(q @ k.T / tau, target), exact)


@pytest.mark.parametrize("alpha, temperature", [(0.0, 0.5), (0.4, 0.07), (1.0, 0.001)])
@pytest.mark.parametrize("shape, programs, dtype", [
    ((20, 300, 32), 1, torch.float32), ((5, 40, 12), 12, torch.float32), ((2, 33, 96), 4, torch.float32),
    *(((20, 300, 32), 12, dtype) for dtype in TOLERANCE)])
def test_contrastive_kernel_and_plain_forms_match_float64(monkeypatch, shape, programs, dtype, temperature,
                                                          alpha):
    """Keys in half precision are rounded when stored; the computation with them is exact."""
    feature, momentum, keys, *rest, tau = case = contrastive_case(*shape, temperature, dtype)
    expected = expected_contrastive(*case, alpha)
    monkeypatch.setattr(losses, "supports_contrastive", lambda feature: False)
    for average in (functools.partial(losses.average_keys, chunk=16),
                    functools.partial(losses.triton_average_keys, programs=programs)):
        monkeypatch.setattr(losses, "average_keys", average)
        actual = with_gradients(3 * contrastive_loss(*case, alpha), (feature, tau))
        assert_near(actual, [3 * exact for exact in expected], 1e-5)
    direct = losses.contrastive_loss_reference(feature, momentum, keys.float(), *rest, tau, alpha)
    assert_near([direct], expected[:1], 1e-5)


def test_contrastive_loss_is_float32_under_autocast_and_for_half_precision_features():
    feature, momentum, *others = *contrastive_case(temperature=0.01), 0.4
    half = feature.bfloat16(), momentum.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = contrastive_loss(half[0].float(), half[1].float(), *others)
    assert loss.dtype == torch.float32 and torch.equal(loss, contrastive_loss(*half, *others))


def test_memory_of_the_contrastive_loss_does_not_grow_with_the_queue():
    """At B 80, Q 61,440, E 256 no operator allocates 10 MB; the logits alone would be 20 MB."""
    def largest(Q):
        feature, *_, tau = case = contrastive_case(80, Q, 256)
        with torch.profiler.profile(profile_memory=True) as profile:
            with_gradients(contrastive_loss(*case, 0.4), (feature, tau))
        return max(event.self_cpu_memory_usage + event.self_device_memory_usage for event in profile.events())
    assert 0 < largest(61_440) < 10e6 and (DEVICE == "cuda" or largest(61_440) == largest(6_144))


# ---- common/script.py, common/images.py: against full decoding, and pixels counted by hand -------
def test_scripts_flush_denormals_to_zero_in_all_threads():
    code = ("import torch; from common.script import run_script; run_script(lambda: print("
            "(torch.full((10 ** 7,), 1e-38) * 0.1).count_nonzero().item()))")
    assert run_python("-c", code) == "0\n"


def test_reduced_jpeg_decoding_matches_full_decoding(tmp_path):
    for i in range(6):
        toyfaces.face(i, 0, 900)[0].resize((1000, 900)).save(tmp_path / "face.jpg", quality=92)
        for box in (None, (40.4, 100.0, 990.2, 871.5)):
            expected = load_image(tmp_path / "face.jpg").resize((224, 224), Image.Resampling.BICUBIC, box)
            image = load_image(tmp_path / "face.jpg", box=box, size=224)
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 1


def test_images_are_loaded_upright_and_on_white_but_boxes_are_of_the_stored_image(tmp_path):
    hidden, path = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), tmp_path / "a.png"
    hidden.paste((0, 0, 255, 255), (0, 0, 4, 8))
    for image in (hidden, hidden.convert("P"), hidden.convert("LA")):
        image.save(path)
        loaded = load_image(path)
        assert loaded.mode == "RGB" and loaded.getpixel((7, 0)) == (255, 255, 255) != loaded.getpixel((0, 0))
    stored, exif = Image.new("RGB", (400, 300), "white"), Image.Exif()
    stored.paste("black", (0, 0, 100, 100))
    exif[0x0112] = 6                                                # to be rotated by 90 degrees
    stored.save(path, exif=exif)
    for file in (path, Image.open(path)):
        upright = load_image(file, size=30)
        assert upright.getpixel((25, 3)) < (9, 9, 9) and upright.getpixel((3, 3)) > (246, 246, 246)
    assert np.asarray(load_image(path, box=(1, 1, 99, 99), size=16)).max() < 9


def test_pixels_are_normalised_by_clips_published_mean_and_deviation_in_rgb_order():
    pixels = normalize_batch([resize_to_array(Image.new("RGB", (4, 4), (255, 51, 0)), 4)])[0, :, 0, 0]
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    close(pixels, torch.tensor([(x - m) / d for x, m, d in zip((1.0, 0.2, 0.0), mean, deviation)]), 1e-6)


# ---- common/weights.py: against the official names, shapes and values in golden.npz --------------
def clip_weights(encoder):
    """Weights with Hugging Face's names for CLIP, with some of its text encoder."""
    state, keys = encoder.state_dict(), pretrained.CLIP_KEYS
    weights = {"vision_model." + map_key(name, keys): x for name, x in state.items()}
    expected = recorded("checkpoint.visual_encoder.").keys() - {"vision_model.embeddings.position_ids"}
    assert weights.keys() == {name.replace("post_layrnorm", "post_layernorm") for name in expected}
    return weights | {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(()),
                      "visual_projection.weight": torch.ones(2, 2),
                      "vision_model.embeddings.position_ids": torch.arange(17)[None]}


def test_clip_weights_load_by_hugging_face_names_and_resize_to_another_image_size(tmp_path):
    """Positions are resized by torch's bicubic interpolation of their grid."""
    from safetensors.torch import save_file
    source, same, larger = (ViT(dataclasses.replace(GOLDEN_CONFIG.vit, image_size=s)) for s in (32, 32, 64))
    save_file(clip_weights(source), tmp_path / "model.safetensors")
    write_files(tmp_path, {"config.json": {"vision_config": {"hidden_act": "quick_gelu", "hidden_size": 9}}})
    load_clip(same, tmp_path)
    load_clip(larger, tmp_path)
    close(same(images := torch.randn(2, 3, 32, 32)), source(images), 0)
    close(larger.positions[0], source.positions[0], 0)
    grid, resized = (table[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
                     for table, side in ((source.positions, 4), (larger.positions, 8)))
    close(resized, F.interpolate(grid.detach(), (8, 8), mode="bicubic"), 1e-6)


BIAS = "vision_model.pre_layrnorm.bias"


@pytest.mark.parametrize("weights, settings, message", [
    ({}, {"hidden_act": "gelu"}, "expected hidden_act 'quick_gelu', found 'gelu'"),
    ({}, {"vision_config": {"layer_norm_eps": 1e-6}}, "expected layer_norm_eps 1e-05, found 1e-06"),
    ({}, {"vision_config": {"num_attention_heads": 4}}, "expected num_attention_heads 3, found 4"),
    ({BIAS: None}, {}, "pytorch_model.bin: norm_before.bias is missing"),
    ({BIAS: torch.ones(24).int()}, {}, "expected (24,) torch.float32, found (24,) torch.int32"),
    ({BIAS: torch.ones(24).double() * 1e300}, {}, "bias: expected (24,) torch.float32, found NaN")])
def test_mismatched_weights_or_settings_are_named_and_none_is_loaded(tmp_path, weights, settings, message):
    """1e300 is infinite in float32."""
    encoder, weights = ViT(GOLDEN_CONFIG.vit), clip_weights(ViT(GOLDEN_CONFIG.vit)) | weights
    before = copy.deepcopy(encoder.state_dict())
    torch.save({name: x for name, x in weights.items() if x is not None}, tmp_path / "pytorch_model.bin")
    write_files(tmp_path, {"config.json": settings})
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert message in error_of(load_clip, encoder, source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_files_of_a_hub_name_come_from_the_hub_and_misspelt_paths_do_not_ask_it(
        official, tmp_path, monkeypatch):
    import huggingface_hub
    asked, hub = [], tmp_path / "hub"

    def download(name, filename):
        asked.append(hub / name / filename)
        if not asked[-1].exists():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(asked[-1])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    torch.save(clip_weights(ViT(GOLDEN_CONFIG.vit)), tmp_path / "clip.bin")
    write_files(hub, {"OpenFace-CQUPT/FLIP/ckpt/FLIP-base.pth": (tmp_path / "official.pth").read_bytes(),
                      "bert-base-uncased/vocab.txt": str(RECORDED["vocab"]),
                      "owner/clip/pytorch_model.bin": (tmp_path / "clip.bin").read_bytes()})
    model = FLIP.from_pretrained("OpenFace-CQUPT/FLIP", GOLDEN_CONFIG, vocabulary="bert-base-uncased")
    assert all(map(torch.equal, model.parameters(), official.parameters()))
    load_clip(ViT(GOLDEN_CONFIG.vit), "owner/clip")                 # it has no config.json
    write_files(hub, {"owner/clip/config.json": {"hidden_act": "gelu"}})
    assert "found 'gelu'" in error_of(load_clip, ViT(GOLDEN_CONFIG.vit), "owner/clip")
    asked.clear()
    for name in ("flip", "a/b/c", "~/flip", "out/flip.pt", str(tmp_path)):
        assert error_of(FLIP.from_pretrained, name).startswith(f"{name}: expected a file, a folder that")
    assert not asked


def test_model_is_saved_as_safetensors_and_loaded_again(uninterrupted, tmp_path):
    model = FLIP.from_pretrained(uninterrupted)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json"}
    for path in (tmp_path / "saved", tmp_path / "saved/model.safetensors"):
        other = FLIP.from_pretrained(path)
        assert other.config == model.config and other.tokenizer.to_json() == model.tokenizer.to_json()
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


optimizer = lambda saved, i: saved["training"]["optimizers"][i]["state"]


@pytest.mark.parametrize("change, message", [
    (lambda saved: saved["model"].update(queue_pointer=torch.ones(1)), "expected (1,) torch.int64"),
    (lambda saved: saved["model"]["image_queue"].fill_(np.inf), "image_queue: expected (20, 128)"),
    (lambda saved: saved["flip"]["bert"].update(vocab_size=7), "but the model has 7; use"),
    (lambda saved: saved.pop("model"), "flip.pt: expected a checkpoint of FLIP, found "),
    (lambda saved: saved["training"]["config"].update(new=1), "is of another version of this program, "),
    (lambda saved: saved["training"]["config"].pop("lr"), "version of this program, which differs in lr"),
    (lambda saved: saved.pop("training"), "is a model without the state of a run; use it with --init"),
    (lambda saved: saved["flip"].update(new=1), "unexpected keyword argument 'new'"),
    (lambda saved: saved.pop("flip") and saved["model"].pop("image_queue"), "but the model has 30524"),
    (lambda saved: saved.pop("flip"), "entries with [DEC] and [ENC], but the model has 30524"),
    (lambda saved: saved["training"]["optimizers"].pop(), "zip() argument"),
    (lambda saved: optimizer(saved, 1).pop(0), "flip.pt: state 0 momentum is missing"),
    (lambda saved: optimizer(saved, 0)[2].update(exp_avg=torch.zeros(3)), "state 2 exp_avg: expected"),
    (lambda saved: optimizer(saved, 1)[0]["momentum"].fill_(torch.inf), "state 0 momentum: expected"),
    (lambda saved: optimizer(saved, 0).update({999: {"step": torch.ones(())}}), "state 999 step is unknown")])
def test_changed_checkpoint_is_rejected(uninterrupted, tmp_path, change, message):
    saved = torch.load(uninterrupted / "flip.pt")
    change(saved)
    torch.save(saved, tmp_path / "flip.pt")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        setup(train_config.parse_arguments(["--out", str(tmp_path), "--resume"]))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3700000000\n"


@pytest.mark.parametrize("name, content, cause", [
    ("flip.pt", "one flipped bit", "wrong checksum of"), ("flip.pt", "cut off", "central directory"),
    ("flip.pt", b"", ""), ("flip.pt", b"x", ""), ("FLIP-base.pth", POINTER, "Weights only load failed"),
    ("model.safetensors", b"", "header too small"), ("model.safetensors", POINTER, "header too large")])
def test_damaged_or_foreign_file_is_rejected_in_one_line_with_its_name(
        uninterrupted, tmp_path, name, content, cause):
    whole = (uninterrupted / "flip.pt").read_bytes()
    if content == "one flipped bit":
        middle = len(whole) // 2
        content = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1:]
    if content == "cut off":
        content = whole[:-500]
    write_files(tmp_path, {name: content})
    with pytest.raises(SystemExit) as caught:
        common.script.run_script(lambda: FLIP.from_pretrained(tmp_path))
    message = str(caught.value)
    expected = f"{tmp_path / name} is damaged or contains no weights: {len(content):,} bytes that begin with"
    assert message.startswith(f"error: {expected} {content[:40]!r}") and "\n" not in message
    assert cause in str(caught.value.__context__.__cause__)


def test_errors_that_name_a_file_are_printed_in_one_line_and_others_keep_their_traceback(tmp_path):
    def fail(error, path=None):
        with common.script.naming(path) if path else contextlib.nullcontext():
            raise error
    run = common.script.run_script
    for error, path, printed in (
            (OSError(28, "No space left on device"), None, "No space left on device"),
            (RuntimeError("details\nunexpected pos 64\n"), "a/flip.pt", "RuntimeError: unexpected pos"),
            (KeyError("flip"), "a/flip.pt", "KeyError: 'flip'")):
        with pytest.raises(SystemExit, match=printed) as caught:
            run(functools.partial(fail, error, path))
        assert "\n" not in str(caught.value) and (path is None or f"in {path}" in str(caught.value))
    with pytest.raises(KeyError):
        run(functools.partial(fail, KeyError("flip")))


@pytest.mark.parametrize("names, message", [
    (lambda name: name, "student.image_projection.bias is missing (1 names differ"),
    (lambda name: f"module.{name}", "names differ"), (lambda name: f"blip.{name}", "names differ")])
def test_checkpoint_of_another_model_is_rejected_with_the_first_name_that_differs(tmp_path, names, message):
    state = {names(name): x for name, x in recorded("checkpoint.").items() if name != "vision_proj.bias"}
    torch.save({"model": state}, tmp_path / "other.pth")
    error = error_of(FLIP.from_pretrained, tmp_path / "other.pth", GOLDEN_CONFIG)
    assert "other.pth: " in error and message in error


def test_full_disk_is_named_and_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    def save(contents, path):
        path.write_bytes(b"the first part")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    pretrained.write_checkpoint({"a": 1}, tmp_path / "flip.pt")
    monkeypatch.setattr(torch, "save", save)
    error = error_of(pretrained.write_checkpoint, {"a": 2}, tmp_path / "flip.pt")
    assert re.search(r"flip.pt cannot be written; [0-9,]+ bytes of its disk are free", error)
    assert torch.load(tmp_path / "flip.pt") == {"a": 1} and len([*tmp_path.iterdir()]) == 1


def test_vocabulary_beside_a_checkpoint_that_has_one_is_rejected(uninterrupted):
    assert "has a vocabulary of its own; omit vocab.txt" in error_of(
        FLIP.from_pretrained, uninterrupted, vocabulary="vocab.txt")


def test_bert_weights_load_with_token_type_0_added_and_cross_attention_unchanged(tmp_path):
    encoder, source = (Bert(GOLDEN_CONFIG.bert, image_width=24) for _ in range(2))
    initial, theirs = copy.deepcopy(encoder.state_dict()), source.state_dict()
    own = [name for name in theirs if "cross_attention" not in name]
    weights = {map_key(name, pretrained.BERT_KEYS): theirs[name] for name in own}
    names = {name for name in recorded("checkpoint.text_encoder.") if "crossattention" not in name}
    assert weights.keys() | {"embeddings.position_ids"} == names
    types = torch.randn(2, 20)
    weights |= {"embeddings.word_embeddings.weight": theirs["words.weight"][:-2],
                "embeddings.token_type_embeddings.weight": types, "pooler.dense.weight": torch.ones(20, 20)}
    old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    saved = {"bert." + map_key(name, old): x for name, x in weights.items()}
    torch.save(saved | {"cls.predictions.bias": torch.ones(79)}, tmp_path / "pytorch_model.bin")
    load_bert(encoder, tmp_path)
    theirs["positions"] = theirs["positions"] + types[0]
    theirs["words.weight"] = torch.cat([theirs["words.weight"][:-2], initial["words.weight"][-2:]])
    for name, loaded in encoder.state_dict().items():
        close(loaded, initial[name] if "cross_attention" in name else theirs[name], 0)


def test_official_checkpoint_saves_back_the_same(official):
    saved = official_state(official)
    assert saved.keys() == recorded("checkpoint.").keys()
    for name, expected in recorded("checkpoint.").items():
        assert saved[name].dtype == expected.dtype and torch.equal(saved[name], expected), name


def test_all_names_of_the_official_base_model_load_and_save(tmp_path):
    integers = "_ids", "idx_queue", "ptr_queue"
    zeros = {name: torch.zeros((), dtype=torch.int64 if name.endswith(integers) else None).expand(shape)
             for name, shape in SHAPES.items()}             # each is one number in the file
    torch.save({"model": zeros | {"temp": torch.tensor(0.07)}}, tmp_path / "FLIP-base.pth")
    loaded = FLIP.from_pretrained(tmp_path)                 # finds it in the folder
    assert loaded.config == FLIPConfig()
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 223_453_187    # the paper's
    saved = official_state(loaded)
    assert len(saved) == 1049 and {name: list(tensor.shape) for name, tensor in saved.items()} == SHAPES


# ---- common/optim.py: against torch.optim.Muon ---------------------------------------------------
@pytest.mark.parametrize("image, text", [(0, 0), (4, 0), (3, 2)])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(image, text):
    model = small_flip()
    optimizers = build_optimizers(model, 0.05, 0.97, 0.1, image, text, muon_momentum=0.8)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert isinstance(optimizers[0], torch.optim.AdamW) and optimizers[0].defaults["betas"] == (0.9, 0.97)
    hidden = {image: 4 * 6, text: 3 * 10}                       # depth x matrices of a block or layer
    for group in optimizers[1].param_groups if image else ():
        assert len(group["params"]) == hidden[group["scale"]] and group["momentum"] == 0.8
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        assert all(group["weight_decay"] == (0.05 if p.ndim > 1 else 0) for p in group["params"])
    assert [group["scale"] for group in groups if group["params"][0] is model.temperature] == [0.1]
    set_learning_rate(optimizers, 2.0)
    assert all(group["lr"] == 2 * group["scale"] for group in groups)


def test_muon_matches_torchs_without_bfloat16(monkeypatch):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 24), (24, 6), (6, 6))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.1, "lr": 0.02}], momentum=0.9)
    reference = torch.optim.Muon(theirs, 0.02, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs):
        close(p, q, 1e-5)


# ---- vit.py: against torch.nn.TransformerEncoderLayer and CLIP's initialisation ------------------
def with_our_weights(theirs, ours, **parts):
    """torch's layer with the weights of ours, which are sampled anew, because many start at 0 or 1."""
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


def test_vit_block_matches_torchs_encoder_layer():
    block = vit.ViTBlock(ViTConfig(width=32, heads=4))
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, vit.quick_gelu, batch_first=True, norm_first=True)
    with_our_weights(theirs, block, norm2=block.norm_mlp)
    x = torch.randn(3, 7, 32)
    close(block(x.flatten(0, 1), Sequences.uniform(3, 7)), theirs(x).flatten(0, 1))


def test_encoders_are_vit_b_16_and_bert_base_and_the_vit_is_initialised_like_clip():
    assert ViTConfig() == ViTConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12)
    assert BertConfig() == BertConfig(30_524, width=768, depth=12, heads=12, positions=512, dropout=0.1)
    encoder = ViT(ViTConfig(image_size=32, patch_size=8, width=256, depth=6, heads=4))
    for model, eps in ((encoder, 1e-5), (Bert(GOLDEN_CONFIG.bert, 64), 1e-12)):
        assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {eps}
    block = encoder.blocks[3]
    for parameter, std in ((encoder.patch_embedding.weight, 0.02), (encoder.positions, 0.02),
                           (encoder.class_token, 256 ** -0.5), (block.attention.out.weight, 256 ** -0.5),
                           (block.attention.query.weight, 256 ** -0.5 * 12 ** -0.5),
                           (block.up.weight, 512 ** -0.5), (block.down.weight, 256 ** -0.5 * 12 ** -0.5)):
        assert parameter.std().item() == pytest.approx(std, rel=0.15)


# ---- bert.py: against torch.nn.TransformerDecoderLayer and official token ids --------------------
def test_bert_layer_matches_torchs_decoder_layer_or_without_images_its_encoder_layer():
    layer = BertLayer(BertConfig(width=32, heads=4, dropout=0.0), image_width=32)
    options = 32, 4, 128, 0.0, F.gelu, 1e-12, True
    encoder = with_our_weights(nn.TransformerEncoderLayer(*options), layer, norm2=layer.norm_mlp)
    decoder = with_our_weights(
        nn.TransformerDecoderLayer(*options), layer, multihead_attn=layer.cross_attention,
        norm2=layer.norm_cross_attention, norm3=layer.norm_mlp)
    text, images = torch.randn(3, 6, 32), torch.randn(3, 9, 32)
    context = images.flatten(0, 1), Sequences.uniform(3, 9), None
    for attended, expected in ((None, encoder(text)), (context, decoder(text, images))):
        close(layer(text.flatten(0, 1), Sequences.uniform(3, 6), attended), expected.flatten(0, 1))


def test_every_dropout_is_active_in_training_and_off_in_evaluation():
    encoder, captions = small_flip(dropout=0.5).student.text, golden_captions("eval")
    images = torch.randn(len(captions), 5, encoder.layers[0].cross_attention.key.in_features)
    places = [module for module in encoder.modules() if isinstance(module, (nn.Dropout, Attention))]
    for chosen in places:
        for place in places:
            setattr(place, "p" if isinstance(place, nn.Dropout) else "dropout", 0.5 * (place is chosen))
        for training in (True, False):
            encoder.train(training)
            assert torch.equal(encoder(captions, images), encoder(captions, images)) != training


@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json", "."])
def test_token_ids_are_the_official_ones_from_either_file_or_their_folder(tmp_path, source):
    """Even if a tokenizer.json has settings for padding, truncation and other special tokens, which
    transformers saves, or a vocab.txt a byte order mark and Windows' line ends."""
    wordpiece = Tokenizer.from_json(golden_tokenizer(tmp_path).to_json()).wordpiece
    wordpiece.enable_padding(length=65)
    wordpiece.enable_truncation(max_length=5)
    wordpiece.post_processor = TemplateProcessing("[UNK] $A", special_tokens=[("[UNK]", 1)])
    (tmp_path / "tokenizer.json").write_text(wordpiece.to_str())
    content = (tmp_path / "vocab.txt").read_text().replace("\n", "\r\n")
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n\r\n")
    tokenizer = Tokenizer.load(tmp_path / source)
    for part in ("train", "eval", "hard"):
        captions, expected = tokenizer(SENTENCES[part]), golden_captions(part)
        assert torch.equal(captions.ids, expected.ids)
        assert torch.equal(captions.sequences.lengths, expected.sequences.lengths)


def test_captions_are_cleaned_and_truncated_like_the_official_ones():
    assert clean_caption("She (is) YOUNG, o'clock!  With; a hat?\n") == "she is young, o'clock with a hat?"
    assert len(clean_caption("word " * 100).split()) == 65
    long = Tokenizer.train(["word"])(["word " * 100])
    assert long.sequences.max_length == 65 and long.ids[-1] == 3, "65 tokens, [SEP] the last"


def test_vocabulary_knows_exactly_its_words_and_is_the_same_trained_again_or_loaded(tmp_path):
    assert Tokenizer.train(TEXTS).to_json() == TOKENIZER.to_json()
    ids = TOKENIZER(TEXTS).ids
    assert (ids != TOKENIZER.wordpiece.token_to_id("[UNK]")).all() and ids.max() < TOKENIZER.vocab_size - 2
    tokenizer = Tokenizer.train(["a man with glasses, o'clock"])
    unknown_words = lambda text: known_and_unknown_words(text, tokenizer)[1]
    assert unknown_words("A bald man with red glasses.") == ["bald", "red"]
    assert unknown_words("man/xyz Ω ?") == ["xyz", "ω"] and unknown_words("???, o'clock") == []
    assert unknown_words("a man without glasses") == ["without"], "with ##o ##u ##t"
    pieces = [*SPECIAL, "man", "\x85", "\u2028", "x\x0cy"]              # splitlines() would split these
    write_files(tmp_path, {"vocab.txt": "\n".join(pieces)})
    assert Tokenizer.load(tmp_path).to_json() == Tokenizer.from_vocabulary(pieces).to_json()
    assert "missing: some of its ids" in error_of(Tokenizer.from_vocabulary, [*SPECIAL, "man", "man"])
    assert "missing: [CLS]" in error_of(Tokenizer.from_vocabulary, ["[PAD]", "[UNK]", "[SEP]", "woman"])
    words = map("".join, itertools.islice(itertools.product("abcdefghi", repeat=4), 5001))
    large = Tokenizer.train([*words, "zebra zebra"])            # the 5,000 most frequent words
    assert known_and_unknown_words("zebra ghgf", large) == (["zebra"], ["ghgf"])


# ---- losses.py: against probabilities worked by hand, and those of the official code -------------
@pytest.mark.parametrize("similarity, identity, temperature, hardness, expected", [
    ([[9, 9, 9], [0.1, 9, 0.4], [9, 9, 9]], [5, 6, 5], 0.001, 0.0, [[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]]),
    ([[9, 9, 9], [0.1, 9, 0.4], [9, 9, 9]], [5, 6, 5], 0.3 / np.log(3), 1.0,
     [[0, 1, 0], [0.25, 0, 0.75], [0, 1, 0]]),
    ([[1, -1], [-1, 1]], [5, 6], 0.001, 1.0, [[0, 1], [1, 0]])])    # exp(-2 / 0.001) would underflow
def test_negatives_are_other_persons_by_similarity(similarity, identity, temperature, hardness, expected):
    """At hardness 0 uniformly, at 1 by the softmax."""
    similarity, identity = torch.tensor(similarity).float(), torch.tensor(identity)
    probabilities = losses.hard_negative_probabilities(similarity, identity, temperature, hardness)
    close(probabilities, torch.tensor(expected).float(), 1e-6)


@pytest.mark.parametrize("features, identity, message", [
    (torch.full((3, 12), torch.nan), torch.arange(3), "a batch are NaN or infinite: training has diverged")])
def test_sampling_negatives_names_what_is_wrong(features, identity, message):
    assert message in error_of(small_flip().sample_negatives, features, features, identity)


def test_batch_of_one_person_has_no_itm_and_a_gradient_of_all_weights(official):
    images, captions = GOLDEN["train.images"], golden_captions("train")
    assert official.sample_negatives(unit(2, 12), unit(2, 12), torch.tensor([3, 3])) is None
    out = official(images, captions, torch.tensor([3, 3]))
    assert not out.has_itm and out.itm == 0 and out.itc.isfinite()
    (out.itc + out.itm).backward()
    gradients = {name: p.grad for name, p in official.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["matching_head.weight"].any() and gradients["temperature"] != 0
    assert official(images, captions, torch.tensor([3, 4])).has_itm


def test_hard_negatives_and_their_matching_loss_are_the_official_ones(official):
    captions = golden_captions("hard")
    tokens, features = official.student.image_tokens_and_features(GOLDEN["hard.images"])
    similarity, likeliest = official.student.text_features(captions) @ features.T, []
    for cosines, name in ((similarity, "image_of_text"), (similarity.T, "text_of_image")):
        probs = losses.hard_negative_probabilities(cosines, GOLDEN["hard.pair_ids"], official.temperature)
        close(probs, GOLDEN[f"hard.probability_{name}"])
        likeliest.append(probs.argmax(1))
        assert torch.equal(likeliest[-1], GOLDEN[f"hard.negative_{name}"])
    close(official.itm_loss(tokens, captions, *likeliest), GOLDEN["hard.loss_itm"])


# ---- flip.py: against official activations, losses, gradients and ten steps in golden.npz --------
@pytest.mark.parametrize("first", ["enc", "cls"])
def test_activations_are_the_official_ones_also_for_first_tokens_alone(official, first):
    student, images, captions = official.eval().student, GOLDEN["eval.images"], golden_captions("eval")
    tokens, hidden = student.image(images, return_hidden=True)
    queries = captions.with_first_token(student.text.enc_id if first == "enc" else 2)
    joint, joint_first = (student.text(queries, tokens, first_token_only=alone) for alone in (False, True))
    for name, actual in (
            ("image_tokens", tokens), *((f"hidden.layer_{k}", hidden[k]) for k in range(3)),
            ("image_feat", student.image_tokens_and_features(images)[1]),
            ("image_feat", student.image_features(images)), ("text_feat", student.text_features(captions)),
            (f"itm_logits_{first}", official.matching_head(joint[captions.sequences.first_token_index])),
            (f"itm_logits_{first}", official.matching_head(joint_first))):
        close(actual, GOLDEN[f"eval.{name}"])
    for name, actual in (("text_tokens", student.text(captions)), (f"joint_tokens_{first}", joint)):
        close(actual, GOLDEN[f"eval.{name}"][GOLDEN["eval.attention_mask"].bool()])


def official_step(model, part, identity, index=..., device="cpu"):
    """The momentum update and the losses of a recorded step, which are compared with the recorded ones."""
    model.update_momentum(0.995)
    captions, alpha = golden_captions(part, index).to(device), GOLDEN[f"{part}.alpha"][index].item()
    out = model(GOLDEN[f"{part}.images"][index].to(device), captions, identity.to(device), StepParams(alpha))
    close(out.itc.cpu(), GOLDEN[f"{part}.loss_itc"][index])
    close(out.itm.cpu(), GOLDEN[f"{part}.loss_itm"][index])
    return out


def test_training_step_has_the_official_losses_gradients_queue_and_momentum_weights(official, device):
    out = official_step(official.to(device).train(), "train", GOLDEN["train.pair_ids"], device=device)
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


@pytest.mark.parametrize("device", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_ten_steps_with_a_wrapping_queue_end_with_the_official_weights(official, device):
    trained = [p for p in official.to(device).train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    for i in range(10):
        out = official_step(official, "run", torch.tensor([2 * i, 2 * i + 1]), i, device)
        optimizer.zero_grad()
        (out.itc + out.itm).backward()
        official.enqueue(out.image_keys, out.text_keys, out.identity)
        optimizer.step()
        official.clamp_temperature()
    state = official_state(official.cpu())
    for name, expected in recorded("run.final.").items():
        close(state[name], expected)


@pytest.mark.parametrize("k, suffix", [(3, "_k"), (256, "")])
def test_reranked_scores_are_the_official_ones_and_the_rest_rank_by_cosine(official, monkeypatch, k, suffix):
    """With [CLS] in place of [ENC], as in the official code."""
    monkeypatch.setattr(Captions, "with_first_token", lambda captions, token: captions)
    captions = golden_captions("eval")
    tokens, features = official.eval().student.image_tokens_and_features(GOLDEN["eval.images"])
    similarity = (features @ official.student.text_features(captions).T).detach()
    scores = rerank(official, tokens, captions, similarity, k)
    for actual, cosine, name in zip(scores, (similarity, similarity.T), ("i2t", "t2i")):
        theirs = GOLDEN[f"eval.score_{name}{suffix}"]               # -100: not re-ranked
        rest = theirs == -100
        close(actual[~rest], theirs[~rest])
        close((actual - cosine)[rest].diff(), torch.zeros(max(0, int(rest.sum()) - 1)).double())
        assert not rest.any() or actual[rest].max() < theirs[~rest].min()
    if not suffix:
        theirs = json.loads(str(RECORDED["retrieval_metrics"]))
        assert evaluation.retrieval_metrics(*scores, torch.arange(8)) == pytest.approx(theirs)


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_perfect_matching_head_ranks_by_the_probability_of_the_pair(hardness):
    """At any cosines: the score corrects for the sampling of the negatives."""
    torch.manual_seed(0)
    model = FLIP(dataclasses.replace(GOLDEN_CONFIG, itm_hardness=hardness))
    truth, cosine, identity = torch.rand(5, 5), torch.rand(5, 5) * 2 - 1, torch.arange(5)
    q = losses.hard_negative_probabilities(cosine, identity, model.temperature, hardness)
    log_odds, shift = (truth / q).log(), torch.randn(5, 5)
    score = model.rerank_score(torch.stack([shift, shift + log_odds], -1), cosine)
    for row in range(5):
        others = identity != row            # a pair is never sampled as its own negative
        difference = score[row, others] - truth[row, others].log()
        close(difference, difference[:1].expand(4), 1e-4)


def test_batch_larger_than_the_rest_of_the_queue_wraps():
    model = small_flip(queue_size=5)
    for first in (0, 3, 6):
        ids = torch.arange(first, first + 3)
        model.enqueue(ids[:, None].expand(3, 12).float(), -ids[:, None].expand(3, 12).float(), ids)
    assert model.queue_identity.tolist() == model.image_queue[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert model.text_queue[:, 3].tolist() == [-5, -6, -7, -8, -4] and model.queue_pointer.item() == 4


def test_forward_changes_no_state_and_the_loop_clamps_the_temperature(official):
    before, mode = copy.deepcopy(official.state_dict()), official.training
    official(GOLDEN["train.images"], golden_captions("train"), GOLDEN["train.pair_ids"])
    assert official.training == mode
    assert all(torch.equal(before[name], tensor) for name, tensor in official.state_dict().items())
    for value, expected in ((-1.0, 0.001), (0.07, 0.07), (3.0, 0.5)):
        official.temperature.data.fill_(value)
        official.clamp_temperature()
        assert official.temperature.item() == pytest.approx(expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_encoders_compile_into_one_graph_forward_and_backward(backend):
    """Cosines of a batch, and ITM logits of its captions with other images."""
    def loss_of(images, captions):
        tokens, image_features = model.student.image_tokens_and_features(images)
        cosines = image_features @ model.student.text_features(captions).T
        logits = model.itm_logits(tokens.flip(0), captions)
        return (cosines * model.temperature).square().sum() + logits.square().sum()
    model = small_flip()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    results = [with_gradients(function(GOLDEN["eval.images"], golden_captions("eval")), trained)
               for function in (compiled, loss_of)]
    for actual, expected in zip(*results):
        size = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * size + 1e-8)


def test_negatives_are_sampled_with_their_probabilities():
    model, generator = small_flip(), torch.Generator().manual_seed(0)
    images, texts, identity = unit(4, 12), unit(4, 12), torch.tensor([1, 2, 1, 3])
    model.temperature.data.fill_(0.5)
    samples = [model.sample_negatives(images, texts, identity, 1.0, generator) for _ in range(3000)]
    for side, similarity in ((0, texts @ images.T), (1, images @ texts.T)):
        frequency = torch.stack([F.one_hot(sample[side], 4) for sample in samples]).double().mean(0)
        close(frequency.float(), losses.hard_negative_probabilities(similarity, identity, 0.5), 0.03)


def write_pictures(folder):
    """Five drawn faces: their images, and the paths of their files."""
    faces, paths = data.load_toy_faces(5, 48, 3, folder), [f"{folder}/{i}.png" for i in range(5)]
    pictures = [faces.picture(i) for i in range(5)]
    write_files(folder, dict(zip(paths, pictures)))
    return pictures, paths


def test_similarity_and_match_probability_are_those_of_itc_and_itm(uninterrupted, tmp_path):
    model, texts = FLIP.from_pretrained(uninterrupted), ["a smiling woman", "a man"]
    pictures, paths = write_pictures(tmp_path)
    cosines, matches = cosines_of(model, paths * 30, texts), model.match_probability(paths, texts)
    assert not cosines.requires_grad and cosines.shape == (150, 2)             # more than one batch
    for i, picture in enumerate(pictures):
        tokens, feature = model.student.image_tokens_and_features(normalize_batch([np.asarray(picture)]))
        close(cosines[i], (feature @ model.student.text_features(model.tokenizer(texts)).T)[0], 1e-6)
        for t, text in enumerate(texts):
            logits = model.itm_logits(tokens, model.tokenizer([text]))
            close(matches[i, t], logits.softmax(1)[0, 1])
            close(model.score(picture, text)[0, 0], model.rerank_score(logits, cosines[i, t])[0], 1e-4)
    with pytest.warns(UserWarning, match=r"vocabulary: smiles \(try smile\), xyz$"):
        model.encode_text("a man, he smiles, xyz")


def test_images_and_texts_of_every_kind_have_the_same_features_in_any_batches(uninterrupted, tmp_path):
    model, (pictures, paths) = FLIP.from_pretrained(uninterrupted), write_pictures(tmp_path)
    expected, pixels = model.encode_image(paths), torch.stack([model.preprocess(path) for path in paths])
    close(expected.norm(dim=1), torch.ones(5))
    for images in (pictures, pixels, [Path(paths[0]), *pictures[1:]]):
        assert torch.equal(model.encode_image(images), expected)
    for image in (pictures[3], pixels[3], paths[3]):
        close(model.encode_image(image)[0], expected[3], 1e-6)
    texts = ["a man", "a smiling woman", "an old man"]
    assert torch.equal(model.encode_text(model.tokenizer(texts)), model.encode_text(texts))
    model.train().student.text.eval()
    modes = [module.training for module in model.modules()]
    model.score(paths, ["a man"])
    assert modes == [module.training for module in model.modules()], "parts in evaluation mode stay so"
    assert "missing.png cannot be read" in error_of(model.encode_image, [paths[0], "missing.png"])


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float64, 1e-6)])
def test_models_of_other_precision_agree_with_float32(uninterrupted, tmp_path, monkeypatch, dtype, tolerance):
    """Also in a search, whose autocast is for float32 models."""
    (pictures, _), texts = write_pictures(tmp_path), ["a man", "a smiling woman"]
    model, other = FLIP.from_pretrained(uninterrupted), FLIP.from_pretrained(uninterrupted, dtype=dtype)
    close(cosines_of(other, pictures, texts), cosines_of(model, pictures, texts), tolerance)
    for name, size in (("match_probability", 2), ("score", 3)):
        close(getattr(other, name)(pictures, texts), getattr(model, name)(pictures, texts), size * tolerance)
    found = []
    for each, capabilities in ((other, {"amx_bf16": True}), (model, {})):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        features = search.encode_folder(each, tmp_path, tmp_path / "features.pt")
        found.append(sorted(search.search(each, features, "a man", ["glasses"])))
    for ours, expected in zip(*found):
        assert ours.path == expected.path and ours[1:] == pytest.approx(expected[1:], abs=3 * tolerance)


@pytest.mark.parametrize("flag, expected", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("", "float32")])
def test_auto_precision_is_bf16_on_fast_cpus_and_stays_the_same(tmp_path, cache, monkeypatch, flag, expected):
    """The device is a GPU if there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.distributed.choose_device("auto").type == "cpu"
    for config in (quick(tmp_path, cache, precision="auto"), None):     # new, resumed
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag if config else "amx_bf16": True})
        run = setup(config or train_config.parse_arguments(["--resume", "--out", str(tmp_path)]))
        assert run.config.precision == run.log.lines[0]["config"]["precision"] == expected
        runs.save(run)
        run.log.close()


# ---- captions.py: against the inverse of the grammar, simulation, and cases worked by hand -------
@functools.cache
def fact_patterns():
    """A regular expression per fact that matches its phrases: the inverse of the grammar."""
    words_of, patterns = {}, []             # {kind of phrase: all words of that kind}
    for kind, words in itertools.chain(*grammar.PHRASES):
        words_of.setdefault(kind, []).append(words)
    for fact, phrases in zip(FACTS, grammar.PHRASES):
        alternatives = {"Male": ["he", "his"], "not Male": ["she", "her"]}.get(fact, [])
        for kind, words in phrases:
            words, others = words.replace("{his}", "(?:his|her|their)"), "|".join(words_of[kind])
            alternatives += [words] if kind not in grammar.FACE_PARTS else [
                rf"{words},? (?:(?:{others}),? )*{kind}", rf"{kind} (?:is|are) (?:(?:{others}) and )*{words}"]
        patterns.append(re.compile(rf"\b(?:{'|'.join(alternatives)})\b"))
    return patterns


def test_captions_state_the_facts_they_report_and_no_others():
    find_facts = lambda text: np.array([bool(pattern.search(text.lower())) for pattern in fact_patterns()])
    rng, faces, stated = np.random.default_rng(1), [*random_faces(3000), np.ones(40, dtype=bool)], []
    for attributes in faces:
        text, values = grammar.sample_caption(attributes, rng)
        assert (find_facts(text) == grammar.stated_facts(values[None])[0]).all(), text
        stated.append(values)
    stated, faces = np.stack(stated[-300:]), np.stack(faces[-300:])
    fits = ((stated[:, None] == 0) | ((stated[:, None] > 0) == faces)).all(2)       # value by value
    assert fits.diagonal().all() and (optimum.satisfies(stated, faces) == fits).all()
    assert (np.isfinite(optimum.log_likelihood(stated, faces)) == fits).all()


def test_captions_to_evaluate_on_state_each_fact_as_often_as_the_grammar_says():
    """Alone and given any other attribute: captions are independent of the random numbers of their faces."""
    def at_least(count, probabilities):
        """P(at least `count` of independent events happen), from the polynomial of their number."""
        counts = functools.reduce(np.convolve, [(1 - p, p) for p in probabilities], [1.0])
        return counts[count:].sum()
    faces = data.Faces("drawn faces (seed 1)", np.zeros((1000, 1)), np.arange(1000), np.array(
        [toyfaces.sample_attributes(random_stream("face", 1, i)) for i in range(1000)]))
    facts = grammar.facts_of(faces.attributes)                                  # (1000, 43)
    expected = np.zeros(facts.shape)        # P(stated | face), of which at least MIN_FACTS facts are stated
    for i, own in enumerate(map(np.flatnonzero, facts)):
        assert len(own) >= grammar.MIN_FACTS
        p = grammar.PROBABILITIES[own]
        for j, fact in enumerate(own):
            others = at_least(grammar.MIN_FACTS - 1, np.delete(p, j))
            expected[i, fact] = p[j] * others / at_least(grammar.MIN_FACTS, p)
    texts = [text.lower() for text in evaluation.EvaluationSet.from_faces(faces).texts]
    for fact, pattern in enumerate(fact_patterns()):
        stated = np.array([bool(pattern.search(text)) for text in texts])
        for given in (facts[:, fact], *(facts[:, fact] & faces.attributes.T)):
            p = expected[given, fact]
            deviation = (p * (1 - p)).sum() ** 0.5
            assert abs(stated[given].sum() - p.sum()) < max(4 * deviation, 5), FACTS[fact]


def test_streams_of_other_purposes_or_numbers_have_nothing_in_common():
    streams = [random_stream(*key).random(9).tolist() for key in (
        ("face", 1, 0), ("face", 1), ("face", 10), ("face", 1, 1), ("order", 1, 0), ("face", 0, 1))]
    assert len({number for numbers in streams for number in numbers}) == 6 * 9
    assert streams[0] == random_stream("face", np.int64(1), np.int64(0)).random(9).tolist()
    assert derive_seed("face", 1) == int(hashlib.sha256(b"face/1").hexdigest()[:16], 16) >> 1


def test_captions_and_recipes_are_those_that_all_figures_were_measured_with():
    """Whatever changes them changes these hashes: measure all figures anew, then update them."""
    texts = [*evaluation.EvaluationSet.from_faces(noise_faces()).texts]
    for seed in range(400):
        rng = grammar.random.Random(seed)
        texts.append(grammar.verbalize(sorted(rng.sample(range(43), 1 + seed % 12)), rng))
    recipes = [train_config.TINY, train_config.RECIPES["tiny"], finetune.RECIPES, finetune.DRAWN,
               grammar.PROBABILITIES.tolist()]
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in ("\n".join(texts), repr(recipes))]
    assert hashes == ["fdf2d561621c", "aa0aa5daf4ab"]


@pytest.mark.parametrize("names", ["Male Young", "Male Smiling Bald", "Bangs Blond_Hair Young"])
def test_log_likelihood_matches_simulated_frequencies(names):
    """The probabilities of all that captions of a face can state sum to 1 and match their frequencies."""
    attributes, count, rng = np.isin(ATTRIBUTES, names.split()), 20_000, np.random.default_rng(0)
    counts = Counter(grammar.sample_caption(attributes, rng)[1].tobytes() for _ in range(count))
    stated = np.array([np.frombuffer(key, dtype=np.int8) for key in counts])
    expected = np.exp(optimum.log_likelihood(stated, attributes[None]))[:, 0]
    observed = np.array(list(counts.values())) / count
    assert abs(expected.sum() - 1) < 1e-3
    assert (abs(observed - expected) < 4.5 * np.sqrt(expected / count)).all()


def test_expected_and_reference_recall_match_cases_worked_by_hand():
    """Ties are broken at random. Of two men, "a bald young man" fits one, "a young man" both, but does not
    mention baldness."""
    scores = np.array([[0., 0, 0, 0], [2, 1, 1, 0], [3, 2, 1, 3], [0, 0, 0, 1]])
    recall = optimum.expected_recall(scores, k=(1, 2, 3))
    by_hand = (1/4 + 0 + 0 + 1) / 4, (2/4 + 1/2 + 0 + 1) / 4, (3/4 + 1 + 0 + 1) / 4
    assert recall == pytest.approx([100 * x for x in by_hand])
    attributes = np.stack([np.isin(ATTRIBUTES, men.split()) for men in ("Male Young Bald", "Male Young")])
    references = optimum.reference_recall(attributes.astype(np.int8), attributes)
    assert references == {"attribute match": [100 * (1 + 1 / 2) / 2, 100, 100, 100 * 3 / 4, 100, 100],
                          "Bayes optimum": [100] * 6}


def test_no_critic_of_pairs_has_a_lower_contrastive_loss_than_the_ideal():
    """Against torch's cross-entropy of the log-likelihood ratio, scaled, without prior and with noise."""
    faces, population = random_faces(256, seed=1), random_faces(3000, seed=2)
    stated = np.stack([grammar.sample_caption(a, np.random.default_rng(i))[1] for i, a in enumerate(faces)])
    ideal = optimum.ideal_contrastive_loss(stated, faces, population, batch_size=64)
    log_p = torch.from_numpy(optimum.log_likelihood(stated, np.concatenate([faces, population])))
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def loss(scale=1.0, of_prior=1.0, of_noise=0.0):
        critic = scale * (log_p[:, :256] - of_prior * log_p.logsumexp(1, keepdim=True)) + of_noise * noise
        blocks = [critic[i:i + 64, i:i + 64] for i in range(0, 256, 64)]
        return np.mean([F.cross_entropy(x, torch.arange(64)).item() for b in blocks for x in (b, b.T)])
    assert ideal == pytest.approx(loss(), rel=0.02)     # its P(stated) is over one batch, not over four
    others = loss(scale=0.5), loss(scale=2.0), loss(of_prior=0.0), loss(of_noise=0.5)
    assert min(others) > max(ideal, loss()) * 1.01, others
    alike = optimum.ideal_contrastive_loss(stated[[0] * 64], faces[[0] * 64], population, 64)
    assert alike == pytest.approx(np.log(64))           # chance
    known = lambda *training: evaluation.EvaluationSet.from_faces(noise_faces(80), *training).ideal_itc
    assert evaluation.EvaluationSet.from_faces(noise_faces(80)).references == {}, "of no use in finetune.py"
    assert 0 < known(noise_faces(), 40) < known(noise_faces(), 80)
    captioned = dataclasses.replace(noise_faces(), captions=[["a man"]] * 20)
    assert known(noise_faces(), 81) is known(captioned, 40) is known() is None


# ---- drawing/, toyfaces.py: against edges of the drawn images ------------------------------------
def test_sketch_grows_by_equal_amounts_of_ink_and_never_loses_any():
    for i in range(20):
        frames = toyfaces.sketch(i, seed=3, size=48)
        assert frames.shape == (70, 48, 48) and (frames[1:] >= frames[:-1]).all()
        ink = frames.sum((1, 2)) / frames[-1].sum()
        assert 0.5 / 70 < ink[0] < 2.5 / 70         # a short line has round ends, a long one crosses others
        assert np.abs(ink - np.arange(1, 71) / 70).max() < 0.15
    look, shapes = portrait.build_shapes(set(), np.random.default_rng(0))
    points, lengths = toyfaces.stroke_points(look, shapes)
    gaps, between = np.hypot(*np.diff(points, axis=0).T), (lengths[1:] + lengths[:-1]) / 2
    assert np.isclose(gaps, between, rtol=0.01).mean() > 0.9, "neighbours touch, but at the ends of lines"
    head, sides = [shape for shape in shapes if shape.part not in portrait.BODY], []
    for look.roll in (0.0, 0.3):
        outlines = np.concatenate(portrait.project_outlines(look, head, 1, 1))
        sides.append(np.hypot(*np.diff(outlines, axis=0).T))
    assert np.allclose(*sides), "a tilted head keeps its shape"


def test_sketch_lines_are_on_the_edges_of_their_own_image():
    def edges(i):
        """(96, 96) bool: some colour differs within one pixel."""
        image = np.asarray(toyfaces.face(i, seed=2, size=96)[0]).astype(int)
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
        return np.ptp(windows, axis=(-2, -1)).max(-1) > 12
    sharp = [i for i in range(40) if not toyfaces.face(i, 2, 8)[1][ATTRIBUTES.index("Blurry")]]
    inked = [toyfaces.sketch(i, seed=2, size=96, steps=1)[0] > 128 for i in sharp]
    own = [edges(i)[ink].mean() for i, ink in zip(sharp, inked)]
    others = [edges(i)[ink].mean() for i, ink in zip(sharp[1:], inked)]
    assert min(own) > 0.9 and np.mean(own) > 0.97 and np.mean(others) < 0.65


@pytest.mark.parametrize("count, sizes", [(20, [16, 2, 2]), (3, [1, 1, 1])])
def test_written_faces_open_as_celeba_with_their_splits_attributes_and_pixels(tmp_path, count, sizes):
    toyfaces.write_faces(tmp_path, count, size=24, seed=3)
    splits = open_splits(tmp_path)
    assert [len(split) for split in splits] == sizes
    for number, (split, i) in enumerate((split, i) for split in splits for i in range(len(split))):
        image, attributes = toyfaces.face(number, 3, 24)
        assert split.images[i].name == f"{number + 1:06}.png" and (split.attributes[i] == attributes).all()
        assert (np.asarray(split.picture(i)) == np.asarray(image)).all()


def test_faces_are_drawn_three_times_as_large_and_reduced():
    rng = random_stream("face", 3, 5)
    attributes = toyfaces.sample_attributes(rng)
    look, shapes = portrait.build_shapes(toyfaces.names_of(attributes), rng)
    assert toyfaces.face(5, 3, 48)[0] == portrait.render(look, shapes, 144).reduce(3)


def test_drawn_faces_are_cached(tmp_path, monkeypatch, capsys):
    faces = data.load_toy_faces(5, 24, 3, tmp_path, steps=6)
    image, attributes = toyfaces.face(4, 3, 24)
    assert (faces.images[4] == np.asarray(image)).all() and (faces.attributes[4] == attributes).all()
    assert (faces.sketches[2] == toyfaces.sketch(2, 3, 24, 6)).all() and faces.sketch_steps == 6
    assert (np.asarray(faces.subset([2]).sketch(0, 5)) == 255 - faces.sketches[2, 5][..., None]).all()
    images = np.array(faces.images)
    [path] = tmp_path.iterdir()
    assert faces.digest == path.name
    for damaged in (path.read_bytes()[:-9], b"", b"x"):
        path.unlink()                       # it is memory-mapped
        path.write_bytes(damaged)
        assert (data.load_toy_faces(5, 24, 3, tmp_path, steps=6).images == images).all()
        assert "is damaged: drawing the faces again" in capsys.readouterr().out
    monkeypatch.setattr(toyfaces, "face", lambda *_: pytest.fail("drawn again"))
    assert (data.load_toy_faces(5, 24, 3, tmp_path, steps=6).images == images).all()


# ---- readers/: against data sets written by the tests in every layout ----------------------------
open_splits = lambda folder: [open_faces(folder, split) for split in ("train", "val", "test")]
image_names = lambda faces: [path.stem for path in faces.images]
pickled = lambda folder: write_mm_celeba(folder, pickles=True)
PICKLE = "train/filenames.pickle"


def encoded(image, format="png"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def write_members(tar, members, format=tarfile.PAX_FORMAT):
    """A tar of {name: content}, without the names whose content is empty; returns its `TarInfo`s."""
    with tarfile.open(tar, "w", format=format) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if content:
                file.addfile(info, io.BytesIO(content))
    with tarfile.open(tar) as file:
        return file.getmembers()


def write_tar(folder, members={}, records=60, name="00000", **changes):
    """img2dataset's tar of records, two with each URL; `changes` are for record 3, `members` for the tar."""
    grey, files = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8), {}
    image = encoded(Image.fromarray(grey).convert("RGB"))
    for i in range(records):
        record = {"status": "success", "caption": [f"face {i}", f"the face {i}"], "pcfg": f"a face, {i}",
                  "box": f"[0, {i % 4}, 30, 20]", "url": f"http://{i // 2}"} | (changes if i == 3 else {})
        files |= {f"{i:09d}.jpg": image, f"{i:09d}.txt": b"x", f"{i:09d}.json": json.dumps(record).encode()}
    folder.mkdir(exist_ok=True)
    write_members(folder / f"{name}.tar", files | members)
    return write_files(folder, {f"{name}_stats.json": {"successes": records}})


def cut_index(cache, suffix):
    [path] = cache.glob(f"*.{suffix}")
    content = path.read_bytes()
    path.unlink()                           # it is memory-mapped
    path.write_bytes(content[:-1])


@pytest.mark.parametrize("write, name, change", [
    (lambda d: write_tar(d), "00000.tar", lambda path: os.utime(path, (1, 1))),      # a copy that looks old
    (lambda d: write_tar(d), "a.tar", lambda path: (path.parent / "00000.tar").rename(path)),
    (lambda d: write_captions(d), "val.json", Path.touch),
    (lambda d: write_captions(d), "images/a/b", lambda path: path.mkdir(parents=True)),
    (lambda d: write_captions(d), "cache", lambda path: cut_index(path, "npy")),
    (lambda d: write_captions(d), "cache", lambda path: cut_index(path, "jsonl")),
    (write_celeba, "img_align_celeba/000003.jpg", Path.unlink)])
def test_data_set_is_indexed_once_until_a_file_changes_or_is_damaged_or_with_other_columns(
        tmp_path, monkeypatch, write, name, change):
    write(tmp_path)
    images = [*open_faces(tmp_path).images]
    monkeypatch.setattr(index, "write_index", lambda *_: pytest.fail("indexed again"))
    assert [*open_faces(tmp_path).images] == images
    with pytest.raises(pytest.fail.Exception):
        open_faces(tmp_path, columns=("pcfg",))
    change(tmp_path / name)
    with pytest.raises(pytest.fail.Exception):
        open_faces(tmp_path)


def test_a_million_faces_are_reopened_without_reading_them(tmp_path, monkeypatch):
    line = b'{"images":"images/0.png","captions":["a face"]}\n'
    rows = np.zeros(1_000_000, index.ROW)
    rows["attributes"], rows["length"], rows["person"] = index.NONE, len(line), np.arange(len(rows))
    monkeypatch.setattr(index, "index_records", lambda *_: (rows, line * len(rows), []))
    open_faces(write_captions(tmp_path))
    tracemalloc.start()
    faces = open_faces(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1e6, "bytes of memory"
    tracemalloc.stop()
    assert len(faces) == 1_000_000 and faces.captions[-1] == ["a face"]


def test_tars_are_read_in_place_cropped_to_the_box_and_split_by_url(tmp_path, capsys):
    write_tar(tmp_path / "part", {"000000003.jpg": b""}, 200)
    (tmp_path / "loop").symlink_to(tmp_path)                # is followed, but each tar is read once
    splits = open_splits(tmp_path)
    names = [image.name for faces in splits for image in faces.images]
    assert len(names) == len(set(names)) == 199 and "000000003.jpg" not in names
    assert "train: 1 of 188 are invalid and left out:\n" in (printed := capsys.readouterr().out)
    assert "part/00000.tar: '000000003': no image\n" in printed
    urls = [{int(texts[0].split()[1]) // 2 for texts in faces.captions} for faces in splits]
    assert len(set.union(*urls)) == sum(map(len, urls)) == 100
    i = next(i for i, texts in enumerate(splits[0].captions) if int(texts[0].split()[1]) % 4 == 2)
    assert (np.asarray(splits[0].picture(i))[..., 0] == np.add.outer(range(2, 20), range(30))).all()
    both = open_faces(tmp_path, columns=("caption", "pcfg"))
    assert both.captions[0] == ["face 0", "the face 0", "a face, 0"]


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "border"])
def test_boxes_are_mapped_to_the_stored_image_for_every_resize_mode_of_img2dataset(tmp_path, mode):
    """keep_ratio makes the shorter side 256 pixels, border the longer one, and pads the image with white."""
    members, rng = {}, np.random.default_rng(0)
    for i, (W, H) in enumerate(5 * [(1024, 700), (640, 1000), (512, 512), (200, 150), (513, 512)]):
        w, h, x, y = (int(min(W, H) * rng.uniform(low, 0.4)) for low in (0.3, 0.3, 0.2, 0.2))
        image, box = Image.new("RGB", (W, H), (0, 0, 200)), [x, y, x + w, y + h]
        image.paste((200, 0, 0), box)                               # the face is red
        scale = {"no": 1, "border": 256 / max(W, H)}.get(mode, 256 / min(W, H))
        image = image.resize((round(W * scale), round(H * scale)), Image.Resampling.BOX)
        if mode == "border":
            stored = Image.new("RGB", (256, 256), "white")
            stored.paste(image, (int((256 - image.width) / 2), int((256 - image.height) / 2)))
            image = stored
        record = {"caption": "a face", "box": box, "original_width": W, "original_height": H}
        members |= {f"{i:09d}.jpg": encoded(image), f"{i:09d}.json": json.dumps(record).encode()}
    write_members(tmp_path / "00000.tar", members)
    for crop in open_faces(tmp_path).images:
        whole = np.asarray(crop._replace(box=()).open()).astype(int)
        rows, columns = np.nonzero((whole[..., 0] > 100) & (whole[..., 2] < 100))
        true = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(crop.box, true)).max() <= 1, (crop, true)


def read_tars(folder):
    """({name: (captions, size of the face, colour of its first pixel)}, messages) of a folder's tars."""
    faces, invalid = {}, []
    for path in layouts.find_tars(folder):
        _, lines, errors = index.index_records(layouts.read_tar, ("",), folder, ("caption",), path)
        invalid += [message for _, message in errors]
        for record in map(json.loads, lines.splitlines()):
            tar, name, *place = record["images"]
            face = TarImage(folder / tar, name, *place).open()
            faces[name] = record["captions"], face.size, face.getpixel((0, 0))
    return faces, invalid


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_read_also_joined_ones_and_a_damaged_one_is_named(tmp_path, capsys, format):
    """With names as long as the formats allow: members of GNU and PAX then have several headers."""
    lengths = (20, 98, 99, 100, 101, 155, *([] if format == tarfile.USTAR_FORMAT else [200, 300]), 97)
    truth, files, path = {}, {}, tmp_path / "0.tar"
    for n, length in enumerate(lengths):
        name = f"{n}{'d' * (length // 2)}/".ljust(length - 4, "x")
        files |= {f"{name}.png": encoded(Image.new("RGB", (4, 5), (n, 0, 0))), f"{name}.txt": b"face %d" % n}
        truth[f"{name}.png"] = [f"face {n}"], (4, 5), (n, 0, 0)
    names = [*files]
    write_members(tmp_path / "second", {name: files.pop(name) for name in names[-4:]}, format)
    members = write_members(path, files, format)
    whole = path.read_bytes()
    path.write_bytes(whole + (tmp_path / "second").read_bytes())
    assert read_tars(tmp_path) == (truth, [])
    start, content = [m.offset for m in members], [m.offset_data for m in members]
    header, length = content[4] - 512, content[-1] + 512
    for first, stop, new in [
            # cut between two faces, in a header, in a file, in the last file and after it
            (start[4], None, b""), (header + 9, None, b""), (content[4] + 9, None, b""),
            (content[-1] + 3, None, b""), (length, None, b""),
            # damaged headers: of an image, the first one, all of a face
            (header, content[4], b"x" * 512), (header, content[4], bytes(512)),
            (0, content[0], bytes(content[0])), (start[4], start[6], b"x" * 3000),
            # inserted, appended, no tar at all
            (start[4], start[4], b"x" * 256), (len(whole), None, b"x" * 256), (0, None, b"x" * 9999)]:
        path.write_bytes(whole[:first] + new + (whole[stop:] if stop else b""))
        faces, invalid = read_tars(tmp_path)
        assert faces.items() <= truth.items()
        expected = f"0.tar is damaged, cut off, compressed or missing: found {len(faces)} faces, "
        assert expected in capsys.readouterr().out and expected in invalid[-1], (first, stop)


def test_any_webdataset_is_read_with_its_captions_from_json_or_txt_and_whole_images(tmp_path):
    """Without URLs, a face is split by its key, in whichever tar."""
    members, formats = {}, {"a/0": "jpg", "a/1": "JPEG", "./b.d/2": "png", "3": "webp"}
    for key, format in formats.items():
        content = encoded(Image.new("RGB", (6, 7)), format.replace("jpg", "jpeg"))
        members |= {f"{key}.{format}": content, f"{key}.txt": f"\ufeffface {key}\n".encode(),
                    f"{key}.seg.png": b"?", f"{key}.npy": b"?", ".hidden.jpg": b"?", "README": b"?"}
    write_members(tmp_path / "0.tar", members | {"4.txt": b"no image", "5.jpg": content, "6.2.jpg": content})
    faces, invalid = read_tars(tmp_path)
    assert {name: face[:2] for name, face in faces.items()} == {
        f"{key}.{format}": ([f"face {key}"], (6, 7)) for key, format in formats.items()}
    assert sorted(error.partition("0.tar: ")[2] for error in invalid) == [
        "'4': no image", "'5': no .txt", "'6': no image"]
    members = {"0.jpg": content, "0.txt": b"of txt", "0.json": b'{"box": [0, 0, 3, 3]}',
               "1.jpg": content, "1.json": b"{}", "2.jpg": content, "2.txt": b"of txt"}
    write_members(tmp_path / "0.tar", members)
    faces, invalid = read_tars(tmp_path)
    assert [face[:2] for face in faces.values()] == [(["of txt"], (3, 3))]
    assert "1.jpg: expected text in caption, found []" in invalid[0] and "'2': no .json" in invalid[1]
    members = {f"{i}.{suffix}": x for i in range(100) for suffix, x in (("jpg", content), ("txt", b"a face"))}
    for name in ("0.tar", "1.tar"):
        write_members(tmp_path / name, members)
    splits = [Counter(image.name for image in faces.images) for faces in open_splits(tmp_path)]
    assert all(splits) and sum(map(len, splits)) == 100 and set(sum(splits, Counter()).values()) == {2}


def write_captions(folder, records=None, name="train.json", count=4):
    records = records or [{"image": f"{i}.png", "image_id": "ab"[i // 2],
                           "caption": [f"face {i}", f"the face {i}"]} for i in range(4)]
    return write_files(folder, grey_images(f"images/{i}.png" for i in range(count)) | {name: records})


def test_caption_list_is_read_with_identities(tmp_path):
    faces = open_faces(write_captions(tmp_path))
    assert [path.name for path in faces.images] == ["0.png", "1.png", "2.png", "3.png"]
    assert len(set(faces.identity[:2])) == len(set(faces.identity[2:])) == 1 < len(set(faces.identity))
    assert faces.captions[3] == ["face 3", "the face 3"] and faces.picture(1).getpixel((0, 0)) == (1, 1, 1)
    assert {faces.caption(1, np.random.default_rng(s)) for s in range(20)} == {"face 1", "the face 1"}
    assert list(faces.subset([3, 1]).captions) == [faces.captions[3], faces.captions[1]]
    records = [{"image": f"{i}.png", "image_id": id, "face_caption": "a face"}             # FaceCaption's key
               for i, id in enumerate([None, math.nan, math.nan, ""])]
    assert list(open_faces(write_captions(tmp_path, records)).captions) == [["a face"]] * 4
    assert len(set(open_faces(tmp_path).identity)) == 4             # without an id: a person of its own


def test_image_is_known_by_its_normalised_name_below_the_folder_and_empty_captions_are_dropped(tmp_path):
    records = [{"image": name, "caption": caption} for name, caption in {
        "0.png": "a", "./1.png": ["", "b", None, " .", "c"], "images/../link/2.png": ["d", ""],
        f"{tmp_path}/set/images/./3.png": "e", "images//0.png": "a second caption"}.items()]
    folder = write_captions(tmp_path / "set", records)
    write_files(tmp_path, grey_images(["2.png"]))
    (folder / "link").symlink_to(tmp_path)
    faces = open_faces(folder)
    assert [str(path.relative_to(folder)) for path in faces.images] == [
        "images/0.png", "images/1.png", "link/2.png", "images/3.png", "images/0.png"]
    assert list(faces.captions) == [["a"], ["b", "c"], ["d"], ["e"], ["a second caption"]]
    for name in ("../2.png", "images/../../2.png", f"{tmp_path}/2.png"):
        write_captions(folder, [{"image": name, "caption": "a face"}])
        assert open_faces(folder).images[0].resolve() == tmp_path / "2.png"


def test_over_one_percent_of_invalid_records_reject_a_split_and_fewer_are_counted(tmp_path, capsys):
    records = [{"image": f"{i}.png", "caption": "a"} for i in (*range(4, 304), "y\x1b", "z")]
    write_captions(tmp_path, records, "val.json", 304)
    write_captions(tmp_path)
    assert len(open_faces(tmp_path, "val")) == 300
    assert capsys.readouterr().out.splitlines() == [
        "JSON annotations val: 2 of 302 are invalid and left out:",
        r"val.json record 300 (counted from 0): the image 'y\x1b.png' does not exist"]
    write_captions(tmp_path, [{"image": "x.png", "caption": "a"}])
    message = error_of(open_faces, tmp_path)
    assert "train.json record 0 (counted from 0): the image 'x.png' does not exist (1 of 1 are inv" in message


def test_one_id_of_most_faces_is_pointed_out(tmp_path, capsys):
    for persons, printed in (("a" * 31 + "bcd", "31 of 34 faces have the same image_id"), ("abcd" * 9, "")):
        records = [{"image": f"{i}.png", "image_id": id, "caption": "a"} for i, id in enumerate(persons)]
        open_faces(write_captions(tmp_path, records, count=36))
        assert printed in capsys.readouterr().out and ("same" in printed) == bool(printed)


@pytest.mark.parametrize("write, title", [
    (lambda d: write_celeba(d), None),
    (lambda d: write_fs2k(d), "FS2K"),
    (lambda d: write_sde(d), "FS2K-SDE"),
    (lambda d: write_tar(d), "JSON annotations")])
def test_two_layouts_in_one_folder_are_rejected_unless_one_reads_the_files_of_both(tmp_path, write, title):
    write_files(write(tmp_path), {"train.json": []})
    find = functools.partial(index.find_layout, tmp_path, layouts.LAYOUTS)
    if title:
        assert find().title == title
    else:
        assert "found files of both CelebA and JSON annotations (train.json); leave only" in error_of(find)


def test_image_that_is_added_later_is_found(tmp_path, capsys):
    records = [{"image": f"images/{i % 2}/{i}.png", "caption": "a face"} for i in range(200)]
    write_files(tmp_path, {"train.json": records} | grey_images(r["image"] for r in records[:199]))
    assert len(open_faces(tmp_path)) == 199
    assert "the image 'images/1/199.png' does not exist" in capsys.readouterr().out
    write_files(tmp_path, grey_images(["images/1/199.png"]))
    assert len(open_faces(tmp_path)) == 200


def test_single_caption_list_is_split_by_person_with_at_least_one_for_validation(tmp_path):
    for count in range(2, 30):
        ids = [0, *range(count - 1)]        # the first person has two images
        records = [{"image": f"{i}.png", "image_id": id, "caption": "a face"} for i, id in enumerate(ids)]
        folder = write_captions(tmp_path / "few", records, "a.json", count)
        if count > 2:                       # with two images of one person, nothing is left to train on
            assert not {*open_faces(folder).identity} & {*open_faces(folder, "val").identity}
    records = [{"image": f"{i}.png", "image_id": i // 2, "caption": "a face"} for i in range(800)]
    write_captions(tmp_path, records, "all.json", 800)
    for path in (tmp_path, tmp_path / "all.json"):
        persons = [set(faces.identity.tolist()) for faces in open_splits(path)]
        assert len(set.union(*persons)) == sum(map(len, persons)) == 400 and len(persons[0]) > 330


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba_is_read_in_its_own_and_in_kaggles_layout(tmp_path, kaggle):
    attributes = random_faces(6)
    train, val, test = open_splits(write_celeba(tmp_path, kaggle))
    assert (train.attributes == attributes[:4]).all() and (test.attributes == attributes[5:]).all()
    assert len(val) == 1 and len(set(train.identity)) == 4
    assert val.picture(0).size == (178, 218) and val.images[0].name == "000005.jpg"
    text, _ = grammar.sample_caption(attributes[4], np.random.default_rng(0))
    assert val.caption(0, np.random.default_rng(0)) == text


def write_mm_celeba(folder, numbers=(*range(2, 42), 24000, 24001), pickles=False):
    files = {f"text/celeba-caption/{n}.txt": f"face {n}.\n\n  the face {n}.  \n" for n in numbers}
    if pickles:
        files |= {"train/filenames.pickle": pickle.dumps(["2", "10.jpg", b"3", 4]),
                  "test/filenames.pickle": pickle.dumps(["5"])}
    return write_files(folder, files | grey_images(f"images/{n}.jpg" for n in numbers))


def test_mm_celeba_is_split_by_number_or_pickled_lists_and_validation_is_held_out(tmp_path):
    train, val, test = open_splits(write_mm_celeba(tmp_path / "a"))
    assert image_names(train) == [str(n) for n in range(2, 40)]
    assert train.captions[8] == ["face 10.", "the face 10."]
    assert image_names(val) == ["40", "41"] and image_names(test) == ["24000", "24001"]
    train, val, test = open_splits(write_mm_celeba(tmp_path / "b", pickles=True))
    assert [image_names(faces) for faces in (train, val, test)] == [["2", "3", "4"], ["10"], ["5"]]


@pytest.mark.parametrize("images", ["images", "image", "."])
def test_celeba_dialog_is_read_from_any_image_folder(tmp_path, images):
    records = {f"{n}.jpg": {"overall_caption": f"face {n}"} for n in (5380, *range(39), 24000)}
    parts = {"Bangs": "Short bangs.", "Young": "", "Smiling": "No smile."}
    records["1.jpg"] = {"overall_caption": " ", "attribute_wise_captions": parts}
    write_files(tmp_path / images, grey_images(f"{n}.jpg" for n in (*range(39), 24000)))
    write_files(tmp_path, {"captions_hq.json": records})
    train, val, test = open_splits(tmp_path)
    assert [len(train), image_names(val), image_names(test)] == [37, ["37", "38"], ["24000"]]
    assert list(train.captions)[:2] == [["face 0"], ["Short bangs.  No smile."]]
    assert test.picture(0).size == (8, 8)


@pytest.mark.parametrize("below, splits", [("lfw", ["test", "val", "train"]), (".", ["test", "train"])])
def test_lfwa_is_read_from_its_lists_and_split_by_person(tmp_path, below, splits):
    """The training list contains all images, also those of the test list, as the official one may; without
    a test list, half of the persons are held out."""
    names = [f"P_{n // 2}\\P_{n // 2}_{n % 2 + 1:04d}.jpg" for n in range(60)]      # two images per person
    write_files(tmp_path / below, grey_images(name.replace("\\", "/") for name in names))
    order = np.random.default_rng(5).permutation(40)                                # not CelebA's
    values = random_faces(60)[:, order].astype(int)
    lines = [",".join([name, *map(str, row)]) for name, row in zip(names, values)]
    header = ",".join(["path", *(ATTRIBUTES[i].replace("_", " ").lower() for i in order)])
    lists = {"list_attr_lfwa.csv": [header, *lines], "list_attr_lfwa_test.csv": [header, *lines[40:]]}
    for name in [*lists][:len(splits) - 1]:
        write_files(tmp_path, {name: "\n".join(lists[name])})
    test, *others = splits = [open_faces(tmp_path, split) for split in splits]
    assert len(test) == 20 if len(others) == 2 else 16 < len(test) < 44
    persons = [set(faces.identity) for faces in splits]
    assert len(set.union(*persons)) == sum(map(len, persons)) == 30
    for faces in splits:
        numbers = [name.split("_")[1:] for name in image_names(faces)]
        rows = [2 * int(person) + int(image) - 1 for person, image in numbers]
        assert (faces.attributes == random_faces(60)[rows]).all()


def write_fs2k(folder):
    """Photos with the same numbers in different folders; sketches with dark lines."""
    names = [f"photo{p}/image01{n:02d}" for p in (1, 2, 3) for n in range(10)]
    lines = Image.fromarray(np.where(np.eye(8), 0, 255).astype(np.uint8))
    files = grey_images(f"photo/{name}.{'png' if name < 'photo2' else 'jpg'}" for name in names)
    files |= {f"sketch/{re.sub('photo|image', 'sketch', name)}.png": lines for name in names}
    for split, chosen in (("train", names[:20]), ("test", names[20:])):
        files[f"anno_{split}.json"] = [{"image_name": name, "style": 0} for name in chosen[::-1]]
    return write_files(folder, files)


def test_fs2k_has_one_sketch_per_photo_and_no_text(tmp_path):
    train, val, test = open_splits(write_fs2k(tmp_path))
    assert [len(train), len(val), len(test)] == [18, 2, 10] and train.sketch_steps == 1 and not train.has_text
    assert train.images[3] == tmp_path / "photo/photo1/image0103.png"
    assert val.images[1] == tmp_path / "photo/photo2/image0109.jpg"
    assert val.sketches[1] == [tmp_path / "sketch/sketch2/sketch0109.png"]
    assert (np.asarray(test.sketch(0, 0)) == 255 - 255 * np.eye(8)[..., None]).all(), "dark on light"


def write_sde(folder, style="{photo}_{step}", photo="photo1/image01{n:02d}"):
    files = grey_images(f"photo/{photo.format(n=n)}.jpg" for n in range(20))
    for n, step in itertools.product(range(20), range(1, 13)):
        flat = photo.format(n=n).replace("/", "_")
        name = style.format(photo=flat, stem=flat[-9:], step=step)
        files[f"sketch/{'train' if n < 15 else 'test'}/{name}.png"] = Image.new("L", (8, 8), 10 * step)
    return write_files(folder, files)


@pytest.mark.parametrize("style, photo", [
    ("{photo}_{step}", "photo1/image01{n:02d}"), ("{stem}_{step}", "photo1/image01{n:02d}"),
    ("{photo}_{step}", "photo1_image01{n:02d}"), ("{stem}_{step}", "image01{n:02d}")])
def test_fs2k_sde_has_sketches_sorted_by_step_and_captions_from_a_list_beside_them(tmp_path, style, photo):
    train, val, test = open_splits(write_sde(tmp_path, style, photo))
    assert [len(train), len(val), len(test), train.sketch_steps] == [13, 2, 5, 12] and train.captions is None
    assert [path.stem[-9:] for path in val.images] == ["image0113", "image0114"]
    assert [255 - train.sketch(2, t).getpixel((0, 0))[0] for t in range(12)] == list(range(10, 130, 10))
    assert all(path.stem[-9:] in str(sketches[0]) for path, sketches in zip(test.images, test.sketches))
    assert list(train.subset([4, 2]).sketches) == [train.sketches[4], train.sketches[2]]
    records = [{"photo": f"photo/{photo.format(n=n)}.jpg", "caption": [f"face {n}"] * 2} for n in range(15)]
    write_files(tmp_path, {"train.json": [*records, {"image": "of/another/set.jpg", "caption": "another"}]})
    assert list(open_faces(tmp_path).captions) == [[f"face {n}"] * 2 for n in range(13)]
    assert open_faces(tmp_path, "test").captions is None


@pytest.mark.parametrize("write, name, change, message", [
    (lambda d: d, "faces.parquet", b"", "*.tar, *.json (not compressed; FaceCaption-15M's .parquet"),
    (write_captions, "train.json", b"[]", "expected records of JSON annotations, found none"),
    (lambda d: write_captions(d, name="val.json"), "x", b"", "found val.json, but no train.json"),
    (lambda d: write_tar(d, box=[10 ** 400, 0, 1, 1]), "x", b"", "int too large to convert to float"),
    (write_captions, "images/3.png", None, "the image '3.png' does not exist (1 of 4 are invalid, more"),
    (write_captions, "train.json", b'[{"image": "0.png", "caption": [" . !", ""]}]', "found [[' . !', '']]"),
    (write_captions, "train.json", (b'["face 0"', b'[7'), "expected text in caption or face_caption, "),
    (write_captions, "train.json", (b"the face", rb"half a \ud800"), "'half a \\ud800 0']]"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg  2"), "txt line 4: expected 1, 0 or -1 for every"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg"), "celeba.txt line 4: expected 40 values, found 39"),
    (write_celeba, VALUES, (b"Bald", b"Bold"), "line 2: expected CelebA's 40 attribute names, found 5_"),
    (write_celeba, PARTITION, (b"3.jpg 0", b"2.jpg 2"), "(000002.jpg): expected 0, 1 or 2 in list_eval_"),
    (write_celeba, PARTITION, (b"6.jpg", b"6.jpg 2\n9.jpg"), "are missing from list_attr_celeba, the fi"),
    (pickled, "test/filenames.pickle", pickle.dumps(["2"]), "face 2: 'images/2.jpg' is already in split"),
    (pickled, PICKLE, b"cposix\nmkdir\n(S'never-made'\ntR.", "import of posix.mkdir refused"),
    (pickled, PICKLE, pickle.dumps([2, None]), "face -1: the image '-1.jpg' does not exist (1 of 1"),
    (lambda d: d, "captions_hq.json", {"0.jpg": 7}, "captions_hq.json: '0.jpg': AttributeErr"),
    (lambda d: d, "captions_hq.json", [], "expected a JSON dict, found []; in "),
    (write_fs2k, "anno_train.json", [{"name": 1}], "no photo or no sketch is named None (1 of"),
    (write_fs2k, "anno_train.json", [5], "no photo or no sketch is named 5 (1 of 1 are invalid"),
    (lambda d: write_tar(d, box="[9, 0, 9, 5]"), "x", b"", "'000000003': expected half of the box [9, 0, 9,"),
    (lambda d: write_tar(d, {"000000003.jpg": b"x"}), "x", b"", "00000.tar: 000000003.jpg is not an image"),
    (lambda d: write_tar(d, records=90), "00001_stats.json", b'{"successes": 10}',
     "00001.tar is damaged, cut off, compressed or missing: found 0 faces, 00001_stats.json counts 10 (10 "),
    (lambda d: write_tar(d), "00001.tar.zst", b"", "expected no compression; run gunzip"),
    (write_sde, "sketch/train/photo1_image0104_7.png", None,
     "photo1/image0104.jpg has other steps than most photos: [1, 2, 3, 4, 5"),
    (lambda d: write_sde(d, "{stem}_{step}"), "photo/photo2/image0104.jpg", b"", "found no such photo"),
    (write_fs2k, "sketch/sketch1/sketch0104.png", None, "no photo or no sketch is named 'photo1/image0104'")])
def test_invalid_data_set_is_rejected(tmp_path, write, name, change, message):
    """change: the new content of a file, or (old, new) bytes in it, or None: the file is deleted."""
    path = write(tmp_path) / name
    if change is None:
        path.unlink()
    elif isinstance(change, tuple):
        path.write_bytes(path.read_bytes().replace(*change, 1))
    else:
        write_files(tmp_path, {name: change})
    assert message in error_of(open_faces, tmp_path)


# ---- data.py: against pixels worked by hand, and other workers, ranks and starts -----------------
COS, SIN, CENTRE = math.cos(math.radians(15)), math.sin(math.radians(15)), 111.5


@pytest.mark.parametrize("name, matrix", [
    ("shear x", [(1, 0.15, 0), (0, 1, 0)]), ("translate x", [(1, 0, 5), (0, 1, 0)]),
    ("shear y", [(1, 0, 0), (0.15, 1, 0)]), ("translate y", [(1, 0, 0), (0, 1, 5)]),
    ("rotate", [(COS, -SIN, CENTRE * (1 - COS + SIN)), (SIN, COS, CENTRE * (1 - SIN - COS))])])
def test_affine_augmentations_map_coordinates_as_in_the_paper(name, matrix):
    """The colour of an output pixel is the position of its input pixel, matrix @ (x, y, 1)."""
    for size in (224, 112):
        y, x = np.mgrid[:size, :size]
        position = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
        expected = np.stack([x, y, size / 224 + 0 * x], axis=-1) @ np.array(matrix).T   # (size, size, 2)
        inside = ((expected > 1) & (expected < size - 2)).all(-1)
        found = np.asarray(data.apply_operation(name, position, 1))
        assert abs(found[..., :2] - expected)[inside].max() <= 1.1
        assert (found == 128).all(-1).any(), "grey where the input has no pixel"


def test_augmentation_changes_five_in_nine_images_beyond_mirroring():
    """Each of two operations is skipped with probability 1/2, or without effect in 3 of 9 cases."""
    image = noise_faces().picture(0)
    for name in ("identity", "brightness", "sharpness"):
        assert data.apply_operation(name, image, 1) == image
    plain, mirrored = image.tobytes(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    rng = np.random.default_rng(0)
    samples = [data.augment(image, rng).tobytes() for _ in range(3000)]
    assert abs(samples.count(plain) / 3000 - 2 / 9) < 0.03
    assert abs(samples.count(mirrored) / 3000 - 2 / 9) < 0.03
    assert {data.apply_operation("rotate", image, sign).tobytes() for sign in (-1, 1)} < {*samples}


def test_caption_and_augmentation_of_a_face_differ_from_epoch_to_epoch():
    dataset = data.FaceDataset(noise_faces(20), TOKENIZER, 16, 4, seed=3)
    first, again, second = ([dataset[epoch, i] for i in range(20)] for epoch in (0, 0, 1))
    for (pixels, text, *_), (same_pixels, same_text, *_) in zip(first, again):
        assert (pixels == same_pixels).all() and text == same_text
    assert sum(one[1] != two[1] for one, two in zip(first, second)) > 15
    assert sum((one[0] != two[0]).any() for one, two in zip(first, second)) > 10


@pytest.mark.parametrize("source", ["memory", "tars"])
def test_batches_are_the_same_for_any_number_of_workers_and_ranks_and_from_any_step(tmp_path, source):
    def equal(batches, *others):
        """Whether every batch is the concatenation of the corresponding other ones."""
        content = ([(b.images, b.captions.ids, b.identity) for b in group] for group in zip(batches, *others))
        return all(torch.equal(whole, torch.cat(parts)) for group in content for whole, *parts in zip(*group))
    faces = noise_faces()
    if source == "tars":
        for name in "01":
            write_tar(tmp_path, records=100, name=name)
        faces = pickle.loads(pickle.dumps(open_faces(tmp_path)))        # as for a worker that is not forked
    assert "faces are fewer than a batch of 1000" in error_of(data.FaceDataset, faces, TOKENIZER, 16, 1000)
    per_epoch, random_state = len(faces) // 4, torch.get_rng_state()

    def batches(start=0, count=2 * per_epoch + 2, seed=7, batch_size=4, **options):
        return take(data.FaceDataset(faces, TOKENIZER, 16, batch_size, seed, **options), start, count)
    whole = batches()
    assert all(equal(whole, batches(workers=workers)) for workers in (1, 2, 4))
    assert all(equal(whole[7:], batches(7, 5, workers=workers)) for workers in (0, 2))
    assert equal(whole, *(batches(batch_size=2, rank=rank, world_size=2, workers=rank) for rank in (0, 1)))
    assert not equal(whole, batches(seed=8))
    first, second = (torch.cat([batch.identity for batch in epoch]).tolist()
                     for epoch in (whole[:per_epoch], whole[per_epoch:2 * per_epoch]))
    assert first != second and all(len(set(epoch)) == 4 * per_epoch for epoch in (first, second))
    assert torch.equal(random_state, torch.get_rng_state()), "the loader has random numbers of its own"


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named_and_replaced_by_the_next_face(tmp_path, capfd, workers):
    images = write_celeba(tmp_path, count=202) / "img_align_celeba"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (218, 178, 3), dtype=np.uint8))
    write_files(images, {"000002.jpg": encoded(noise, "jpeg")[:9000], "000200.jpg": "not an image"})
    faces = open_faces(tmp_path)
    loader = data.FaceDataset(faces, TOKENIZER, 16, 50, augmented=False, workers=workers)
    identity = np.concatenate([batch.identity for batch in take(loader, 0, 12)])
    assert sorted(identity) == sorted([faces.identity[i] for i in (0, 2, *range(2, 199), 0)] * 3)
    printed = capfd.readouterr().out
    assert printed.count("000002.jpg cannot be read: image file is truncated") == 1, "in three epochs"
    assert printed.count("000200.jpg is not an image (replaced by the next face)") == 1
    assert len(data.readable(faces, 16)) == 198 and "2 of 200 are invalid and" in capfd.readouterr().out
    write_files(images, {"000050.jpg": "not an image"})
    with pytest.raises(ValueError, match=r"000\d+.jpg .* \(3 of 200 are invalid, more than 1 %\)"):
        take(loader, 0, 4)
    write_files(images, {path.name: "not an image" for path in images.iterdir()})
    assert "(200 of 200 are invalid, more than 1 %)" in error_of(data.readable, faces, 16)
    with pytest.raises(ValueError, match="is not an image, and 99 images before it"):
        take(loader, 0, 1)


# ---- config.py: against the recipes, and the configuration of the run that is resumed ------------
def test_flags_are_the_fields_of_the_configuration_with_their_comments_and_override_recipes(capsys):
    given = train_config.parse_arguments(["--steps", "7", "--no-augment", "--columns", "pcfg", "--lr", "0.1"])
    flags = dict(steps=7, max_epochs=0, augment=False, columns=("pcfg",), lr=0.1)
    assert given == train_config.Config(**train_config.RECIPES["tiny"] | flags)
    by_epochs = train_config.parse_arguments(["--epochs", "2"])
    assert by_epochs.steps == by_epochs.max_epochs == 0, "or the recipe's steps would decide"
    assert train_config.parse_arguments(["--model", "base"]) == train_config.Config(model="base")
    assert train_config.parse_arguments(["--data", "DIR"]).augment and not by_epochs.augment
    assert finetune.parse_arguments(["retrieval", "--data", "DIR"]).lr == 3e-5, "the paper's"
    assert finetune.parse_arguments(["sketch", "--lr", "0.1"]).lr == 0.1
    for ended in (["--leanring_rate", "1"], ["--model", "huge"], ["--queue_from", "0"], ["--help"]):
        with pytest.raises(SystemExit):
            train_config.parse_arguments(ended)
    printed = " ".join(capsys.readouterr().out.split())
    assert "--warmup WARMUP steps to the peak learning rate, at most 20 % of the run (20000)" in printed
    assert "--no-augment augment the images as in the paper (True)" in printed


@pytest.mark.parametrize("flags, message", [
    ("--alpha 2", "--alpha 2.0: expected a number from 0 to 1"),
    ("--momentum nan", "--momentum nan: expected a number from 0 to 1"),
    ("--batch_size 0", "--batch_size 0: expected a number from 1 to inf"),
    ("--steps -5", "--steps -5: expected a number from 0 to inf"),
    ("--log_every 0", "--log_every 0: expected a number from 1 to inf"),
    ("--workers -1", "--workers -1: expected a number from 0 to inf"),
    ("--init a --clip b", "--init has all weights"),
    ("--vocabulary a", "--vocabulary is for --init")])
def test_values_of_flags_are_checked_before_the_run(flags, message):
    assert message in error_of(train_config.parse_arguments, flags.split())
    if flags.startswith("--batch_size"):
        assert message in error_of(finetune.parse_arguments, ["sketch", *flags.split()])
        assert message.replace("batch_size", "k_test") in error_of(
            finetune.parse_arguments, "retrieval --k_test 0".split())
        assert "--fractions 2.0: expected a number from 0 to 1" in error_of(
            finetune.parse_arguments, "attributes --fractions 0.5 2".split())


def test_unknown_columns_and_devices_are_rejected(capsys):
    for parse in (train_config.parse_arguments, lambda flags: finetune.parse_arguments(["sketch", *flags])):
        with pytest.raises(SystemExit):
            parse(["--columns", "x"])
        assert "argument --columns: invalid choice: 'x'" in capsys.readouterr().err
    for name in ("xpu9", "nothing"):
        assert error_of(common.distributed.choose_device, name).startswith(f"device {name!r}: ")


def test_resuming_takes_the_runs_flags_and_only_some_may_change(uninterrupted, cache, tmp_path):
    out = ["--out", str(uninterrupted), "--resume"]
    resumed = train_config.parse_arguments(out + ["--workers", "2", "--batch_size", "8"])
    assert resumed == dataclasses.replace(quick(uninterrupted, cache), resume=True, workers=2)
    error = error_of(train_config.parse_arguments, out + ["--lr", "0.5"])
    assert "has --lr 0.001, which cannot change; omit --lr 0.5" in error
    error = error_of(train_config.parse_arguments, ["--out", str(tmp_path), "--resume", "--steps", "7"])
    assert f"--resume: {tmp_path}/flip.pt does not exist; to start a run, omit --resume" in error


# ---- evaluation.py: against ranks counted by hand ------------------------------------------------
def test_recall_counts_an_images_best_caption_and_counts_ties_as_misses():
    image_of_text = torch.tensor([0, 0, 1])
    image_to_text = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.7]])
    metrics = evaluation.retrieval_metrics(image_to_text, image_to_text.T, image_of_text)
    assert [metrics[name] for name in ("txt_r1", "txt_r5", "img_r1")] == pytest.approx([50, 100, 200 / 3])


def test_recall_table_contains_chance_and_both_references(uninterrupted, cache):
    training, held_out = runs.open_data(quick(uninterrupted, cache), 48)
    validation = evaluation.EvaluationSet.from_faces(held_out, training, batch_size=8)
    metrics = {f"{way}_r{k}": 10.0 for way in ("img", "txt", "itc_img", "itc_txt") for k in (1, 5, 10)}
    ours, initial = dict(metrics, itc_img_r1=8.0), dict(metrics, img_r1=7.0)
    lines = evaluation.recall_table(ours, validation, initial).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        "chance", "attribute match", "Bayes optimum", "model of --init, re-ranked", "this model, ITC alone",
        "this model, re-ranked"]
    assert [line.split(" | ")[1] for line in lines[5:8]] == ["7.0", "8.0", "10.0"]
    assert lines[2].split(" | ")[1:4] == ["5.0", "25.0", "50.0"]
    optimum = validation.references["Bayes optimum"][:5]
    assert lines[4].split(" | ")[1:6] == [f"{value:.1f}" for value in optimum]


# ---- train.py: against the paper's schedule, and uninterrupted runs ------------------------------
def test_schedule_of_base_is_the_papers():
    config = train_config.Config(model="base", steps=15 * 23_925)
    rate = lambda step: train.learning_rate(step, config, 23_925)
    assert rate(0) == pytest.approx(1e-6) and rate(10_000) == pytest.approx(1.55e-5) and rate(20_000) == 3e-5
    assert rate(23_924) == 3e-5 and rate(23_925 * 3) == pytest.approx(3e-5 * 0.9 ** 3)
    assert rate(23_925 * 40) == 1e-6
    # on small data, the warm-up takes several epochs, and the decay begins where it ends
    config = train_config.Config(model="base", steps=1500)
    rates = [train.learning_rate(step, config, 100) for step in range(299, 402)]
    assert rates[:2] == [pytest.approx(3e-5, rel=0.01), 3e-5] and rates[-1] == pytest.approx(3e-5 * 0.9)
    config = train_config.Config(model="base", steps=15 * 23_925)
    for step in (0, 1000, 23_925, 60_000, 300_000):
        alpha = pytest.approx(0.4 * min(1, step / (2 * 23_925)))
        assert train.schedule(step, config) == (alpha, 0.995, 61_440, 1.0, True)


def test_schedule_of_tiny_starts_with_itc_alone_and_ends_with_the_final_values():
    config = train_config.parse_arguments([])
    last = train.schedule(config.steps - config.steps % config.itm_every - config.itm_every, config)
    assert train.schedule(0, config) == (0.0, 0.0, 0, 0.0, False)
    assert last == (config.alpha, config.momentum, config.queue_size, config.hardness, True)
    assert 0 < config.momentum < 1 and 0 < config.warmup < config.steps / 10
    assert train.learning_rate(0, config, 156) < config.lr / 10
    assert train.schedule(config.itm_from * config.steps, config).hardness == 0
    # the queue comes in late, with the entries written so far; ITM is trained in every n-th step
    config = dataclasses.replace(
        config, steps=100, batch_size=4, queue_size=390, queue_from=0.5, itm_from=0.4, itm_every=3)
    lengths = [train.schedule(step, config).queue_length for step in (0, 49, 50, 97, 98)]
    assert lengths == [0, 0, 200, 388, 390]
    assert train.schedule(50, dataclasses.replace(config, accumulate=2, queue_size=500)).queue_length == 400
    with_itm = [step for step in range(100) if train.schedule(step, config).with_itm]
    assert with_itm == [step for step in range(40, 100) if step % 3 == 0]


@pytest.mark.parametrize("decay, quarter", [("cosine", 0.6 + 0.4 * 0.5 ** 0.5), ("linear", 0.8)])
def test_learning_rate_warms_up_and_decays_by_a_cosine_or_linearly(decay, quarter):
    rate = lambda step: warmup_decay(step, 1000, 20, 1.0, lr_start=0.1, lr_min=0.2, decay=decay)
    for step, expected in ((0, 0.1), (10, 0.55), (20, 1), (265, quarter), (510, 0.6), (1000, 0.2)):
        assert rate(step) == pytest.approx(expected)


def test_run_leaves_log_plots_and_a_checkpoint_with_the_logged_metrics(uninterrupted, cache):
    plots = {"curves.png", "retrieval.png"}
    assert {path.name for path in uninterrupted.iterdir()} == plots | {"flip.pt", "log.jsonl"}
    for name in plots:
        Image.open(uninterrupted / name).load()
    config, model = quick(uninterrupted, cache), FLIP.from_pretrained(uninterrupted)
    faces, held_out = runs.open_data(config, 48)
    assert not any((image == held_out.images[0]).all() for image in faces.images)
    validation = evaluation.EvaluationSet.from_faces(held_out)
    metrics, _ = evaluation.evaluate(model, validation, config)
    assert metrics == pytest.approx({name: log_of(uninterrupted)[-1][name] for name in metrics})
    saved = torch.load(uninterrupted / "flip.pt")["training"]
    adamw, muon = (optimizer["param_groups"] for optimizer in saved["optimizers"])
    assert [{g["scale"] for g in groups} for groups in (adamw, muon)] == [{1, 0.3}, {4.5, 1.5}]
    assert {g["betas"] for g in adamw} == {(0.9, config.beta2)}
    assert {g["momentum"] for g in muon} == {config.muon_momentum} and saved["unlogged_losses"] == []
    assert {g["weight_decay"] for g in adamw + muon} == {0, config.weight_decay}


STEPS = QUICK | dict(faces=64, steps=12, accumulate=2, log_every=3, eval_every=1000, queue_size=40)


def start(world, out, cache, *flags, ending="pass", rank=0):
    """`world` processes of a `python train.py` with the recipe STEPS, `ending` in step 4 of a rank."""
    code = f"""
import atexit, os, signal
threads = lambda: {{open(f"/proc/self/task/{{n}}/comm").read()[:4] for n in os.listdir("/proc/self/task")}}
atexit.register(lambda: {ending == "pass"} and "gloo" in threads() and os._exit(9))     # called last
from multiprocessing import active_children
import config, flip, runs, train
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):       # nohup would have it ignored
    signal.signal(number, signal.SIG_DFL)
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def forward(model, *inputs, real=flip.FLIP.forward):
    global step
    step += 0.5                         # two micro-batches a step
    out = real(model, *inputs)
    if step == 4.5 and os.environ.get("RANK", "0") == "{rank}":
        {ending}
    return out
step, flip.FLIP.forward = -0.5, forward
config.RECIPES["tiny"] = {STEPS}
train.run_script(lambda: train.train(train.parse_arguments()))
"""
    command = [sys.executable, "-c", code, "--out", str(out), "--cache", cache, *flags]
    return [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | group, cwd=ROOT, text=True,
                             stderr=subprocess.PIPE, start_new_session=True)
            for group in (group_of(world) if world > 1 else [{}])]


def end(processes):
    """The exit codes of all processes, and their error output."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return tuple(process.returncode for process in processes), "".join(errors)


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory, cache):
    """{number of processes: folder of an uninterrupted run with 16 pairs in a micro-batch}"""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train.train(quick(one, cache, **STEPS | dict(batch_size=16)))
    codes, errors = end(start(2, two, cache, "--batch_size", "8"))
    assert codes == (0, 0), errors
    return {1: one, 2: two}


losses_of = lambda out: [(line["step"], line["itc"], line["itm"]) for line in log_of(out) if "itc" in line]


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(whole_runs):
    one, two = (np.array(losses_of(out), float) for out in whole_runs.values())
    np.testing.assert_allclose(two, one, atol=1e-4)
    one, two = (FLIP.from_pretrained(out).state_dict() for out in whole_runs.values())
    for name in ("queue_identity", "queue_pointer", "image_queue", "text_queue"):
        close(two[name].double(), one[name].double(), 1e-4)


@pytest.mark.parametrize("world, workers, ending, codes, step", [
    (1, 0, "kill()", (-9,), 0),
    (2, 0, "signal.raise_signal(signal.SIGTERM)", (1, 1), 6),
    (1, 0, "signal.raise_signal(signal.SIGHUP)", (1,), 5),
    (1, 2, "os.killpg(0, signal.SIGTERM); os.killpg(0, signal.SIGINT)", (1,), 5),
    (1, 2, "active_children()[0].kill()", (1,), None), (1, 2, "kill()", (-9,), 4),
    (2, 0, "runs.write_checkpoint = kill", (-9, 1), 4)])
def test_run_is_saved_after_its_last_whole_step_or_was_before_a_kill_and_resumes_exactly(
        tmp_path, cache, whole_runs, world, workers, ending, codes, step):
    """A run that is killed itself was saved after every step; its workers and other ranks end, too (or `end`
    would wait for them)."""
    flags = ["--batch_size", str(16 // world), "--workers", str(workers)]
    flags += ["--save_every", "0"] if -9 in codes and step else []
    rank = 1 if codes == (1, 1) else 0
    found, errors = end(start(world, tmp_path, cache, *flags, ending=ending, rank=rank))
    assert found == codes, errors
    saved = torch.load(tmp_path / "flip.pt")["training"]["step"]
    assert saved == step or step is None and saved >= 4
    assert -9 in codes or f"after step {saved}" in errors
    assert ("continue with --resume" in errors) == (-9 not in codes)
    assert "signal" not in ending or "Traceback" not in errors      # all ranks stop together
    write_files(tmp_path, {"log.jsonl": "torn"})            # is restored from the checkpoint
    assert end(start(world, tmp_path, cache, "--resume"))[0] == (0,) * world
    assert losses_of(tmp_path) == losses_of(whole_runs[world])


@pytest.mark.parametrize("error, advice", [
    (RuntimeError("memory ran out"), "; continue with --resume"),
    (ValueError("over 1 % of the images are damaged"), "")])
def test_run_that_fails_is_saved_and_resuming_is_advised_unless_it_would_fail_again(
        uninterrupted, cache, tmp_path, monkeypatch, error, advice):
    steps, real = [], FLIP.forward

    def forward(model, *inputs):
        steps.append(len(steps))
        if len(steps) == 5:
            raise error
        return real(model, *inputs)
    monkeypatch.setattr(FLIP, "forward", forward)
    config = quick(tmp_path, cache)
    with pytest.raises(type(error)) as caught:
        train.train(config)
    assert caught.value.__notes__ == [f"saved after step 4{advice}"]
    train.train(dataclasses.replace(config, resume=True))
    assert losses_of(tmp_path) == losses_of(uninterrupted)


def test_run_goes_on_alone_with_resume_and_with_the_same_faces_in_whichever_folder(tmp_path):
    write_celeba(tmp_path / "a", count=20)
    config = quick(tmp_path / "out", str(tmp_path / "cache"), data=str(tmp_path / "a"), batch_size=4, steps=2)
    first = setup(config)
    assert "log.jsonl is in use by another run" in error_of(train.train, config)
    runs.save(first)
    first.log.close()
    assert "flip.pt already exists; use --resume" in error_of(train.train, config)
    (tmp_path / "a").rename(tmp_path / "b")
    resumed = dataclasses.replace(config, resume=True, data=str(tmp_path / "b"))
    train.train(resumed)


@pytest.mark.parametrize("name, change", [
    ("train.json", lambda path: shift_captions(path)),
    ("val.json", lambda path: shift_captions(path)),
    ("images/0.png", lambda path: Image.new("RGB", (80, 80)).save(path)),
    ("images/15.png", lambda path: Image.new("RGB", (80, 80)).save(path)),
    (VALUES, lambda path: path.write_text(path.read_text().replace("02.jpg  -1", "02.jpg  1")))])
def test_resumed_run_has_the_same_faces_also_if_only_their_contents_differ(tmp_path, name, change):
    """Images, captions and annotations, of training and of validation faces."""
    folder = tmp_path / "faces"
    if name == VALUES:
        write_celeba(folder, count=20)
    else:
        records = [{"image": f"{i}.png", "caption": f"face {i}"} for i in range(16)]
        write_files(folder, grey_images(f"images/{i}.png" for i in range(16)))
        write_files(folder, {"train.json": records[:12], "val.json": records[12:]})
    config = quick(tmp_path / "out", f"{tmp_path}/cache", data=str(folder), batch_size=4, steps=2)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    resumed = dataclasses.replace(config, resume=True, data=str(other))
    for each in (config, resumed):
        with contextlib.closing((run := setup(each)).log):
            runs.save(run)
    shutil.rmtree(other)
    shutil.copytree(folder, other)
    change(other / name)
    assert f"had other faces than {other}: their images, captions or ann" in error_of(train.train, resumed)


def shift_captions(path):
    records = json.loads(path.read_text())
    captions = [record["caption"] for record in records]
    write_files(path.parent, {path.name: [
        record | {"caption": caption} for record, caption in zip(records, captions[1:] + captions[:1])]})


def test_resumed_run_has_the_same_drawn_faces_and_number_of_processes(tmp_path, cache, monkeypatch):
    config = quick(tmp_path, cache, steps=2)
    with contextlib.closing((run := setup(config)).log):
        runs.save(run)
    resumed, real = dataclasses.replace(config, resume=True), data.load_toy_faces
    monkeypatch.setattr(runs, "load_toy_faces", lambda *args, seed, **kwargs: real(
        *args, seed=seed + 5, **kwargs))
    assert "had other faces than drawn faces (seed 5)" in error_of(train.train, resumed)
    monkeypatch.setattr(runs, "load_toy_faces", real)
    monkeypatch.setattr(runs, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(runs, "DistributedDataParallel", lambda model, **_: model)
    assert "had 1 processes, found 2; use as many" in error_of(train.train, resumed)


def test_nan_loss_stops_the_run_and_nan_weights_never_replace_a_checkpoint(tmp_path, cache):
    """Also without ITM."""
    diverging = dict(itm_from=1.0, lr=1e18, grad_clip=0.0, log_every=2)
    error = error_of(train.train, quick(tmp_path / "a", cache, **diverging))
    assert re.match("the loss of steps . to . is NaN|after step .: some weights are NaN or infinite", error)
    run = setup(quick(tmp_path, cache))
    runs.save(run)
    good = (tmp_path / "flip.pt").read_bytes()
    run.model.student.text.words.weight.data[3, 4] = torch.nan
    run.steps_done = 2
    assert "after step 2: some weights are NaN or infinite" in error_of(runs.save, run)
    assert (tmp_path / "flip.pt").read_bytes() == good


def constant_run(tmp_path, cache, **changes):
    """A run without queue and soft targets whose weights stay, two of its batches, and a function that trains
    a step -> (ITC, ITM), and the gradients in one vector."""
    off = dict(queue_from=1.0, alpha_ramp=(1, 1), momentum_from=1.0)
    run = setup(quick(tmp_path, cache, **off | changes))
    weights, gradients = list(run.model.parameters()), []
    run.optimizers = [torch.optim.SGD([{"params": weights, "scale": 0.0}])]
    run.optimizers[0].step = lambda: gradients.append(torch.cat(
        [p.grad.flatten() for p in weights if p.grad is not None]))

    def train_step(batches, step):
        losses, outputs = train.compute_gradients(run, batches, step)
        train.update(run, outputs, step)
        return losses, gradients[-1]
    return run, take(run.dataset, 0, 2), train_step


def test_a_step_clips_gradients_and_temperature_and_draws_its_own_dropout_mask_and_negatives(
        tmp_path, cache, monkeypatch):
    """Evaluation is without dropout, and training goes on with it."""
    vit, bert, size = train_config.TINY
    monkeypatch.setitem(runs.MODELS, "tiny", (vit, dataclasses.replace(bert, dropout=0.5), size))
    seeds, real = [], FLIP.sample_negatives
    monkeypatch.setattr(FLIP, "sample_negatives", lambda model, *args: (
        seeds.append(args[-1].initial_seed()), real(model, *args))[1])
    run, (batch, _), train_step = constant_run(tmp_path, cache, itm_from=0.0, grad_clip=1e-3)
    losses, gradients = zip(*(train_step([batch], step) for step in (0, 1, 2, 0)))
    for values in ([itc.item() for itc, *_ in losses], seeds):
        assert values[0] == values[3] and len(set(values)) == 3
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx(4 * [1e-3], rel=1e-2)
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (1, 1))
    assert train_step([batch], 0)[0][0] != losses[0][0], "another rank drops others"
    run.model.temperature.data.fill_(2.0)
    train_step([batch], 0)
    assert run.model.temperature.item() == 0.5
    assert train.validate(run) == train.validate(run) and run.model.training


def test_two_micro_batches_give_their_mean_gradient(tmp_path, cache):
    _, (first, second), train_step = constant_run(tmp_path, cache, accumulate=2, grad_clip=0.0)
    losses, gradients = zip(*(train_step(each, 0) for each in ([first], [second], [first, second])))
    close(gradients[2], (gradients[0] + gradients[1]) / 2, 1e-6)
    close(losses[2], (losses[0] + losses[1]) / 2, 1e-6)


def test_momentum_is_that_of_the_next_step_and_the_log_has_itm_per_step_that_trained_it(
        tmp_path, cache, monkeypatch):
    momenta = []
    monkeypatch.setattr(FLIP, "update_momentum", lambda model, momentum: momenta.append(momentum))
    with contextlib.closing((run := setup(quick(tmp_path, cache, itm_from=0.0, itm_every=2))).log):
        momenta.clear()
        for step in (0, 1):
            train.update(run, [], step)
        assert momenta == [0, run.config.momentum] and run.config.momentum_from * run.config.steps == 1.6
        run.unlogged_losses, run.steps_done = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 0.0, 0.0])], 2
        losses = train.mean_losses(run)
        assert (losses["itc"], losses["itm"], losses["itm_skipped"]) == (4, 2, 0)
        batch = take(run.dataset, 0, 1)[0]._replace(identity=torch.zeros(8, dtype=torch.int64))
        run.unlogged_losses = [train.compute_gradients(run, [batch], 0)[0] for _ in range(2)]
        losses = train.mean_losses(run)
        assert losses["itc"] > 0 and losses["itm"] is None and losses["itm_skipped"] == 1, "one person"


def test_init_loads_our_or_the_official_flip_also_at_another_image_size(
        uninterrupted, cache, tmp_path, monkeypatch, capsys):
    before = FLIP.from_pretrained(uninterrupted)
    torch.save({"model": official_state(before)}, tmp_path / "official.pth")
    defaults = [getattr(before.config, f.name) for f in dataclasses.fields(FLIPConfig)]
    monkeypatch.setattr(FLIPConfig.__init__, "__defaults__", tuple(defaults))       # instead of base
    write_files(tmp_path, {"tokenizer.json": before.tokenizer.to_json()})
    ours, official = (dict(init=str(path)) for path in (uninterrupted, tmp_path / "official.pth"))
    for change in (ours, official | dict(vocabulary=f"{tmp_path}/tokenizer.json")):
        config = quick(tmp_path / "out", cache, image_size=64, queue_size=7, **change)
        model, _, _ = runs.model_of_init(config)
        student, expected = model.student.state_dict(), before.student.state_dict()
        resized = pretrained.resize_position_embedding(expected.pop("image.positions"), 64)
        close(model.student.image.positions, resized, 0)
        for part, other in ((student, expected), (model.momentum_encoder.state_dict(), student),
                            (model.matching_head.state_dict(), before.matching_head.state_dict())):
            assert all(torch.equal(part[name], other[name]) for name in other)
        assert model.temperature == before.temperature and model.image_queue.shape == (7, 128)
        assert model.tokenizer.to_json() == before.tokenizer.to_json()
    train.train(quick(tmp_path / "out", cache, image_size=64, steps=2, eval_every=2, **ours))
    printed = capsys.readouterr().out
    assert printed.index("model of --init") < printed.index("this model, re-ranked")
    for change, message in ((official, "contains no vocabulary; pass --vocabulary"),
                            (ours | dict(model="base"), "has width 128, but --model"),
                            (dict(image_size=50), "is not a multiple of the patch")):
        assert message in error_of(train.train, quick(tmp_path, cache, **change))


def test_plan_warns_of_many_epochs_few_faces_and_unknown_words(capsys):
    config = train_config.parse_arguments("--init x --batch_size 8 --steps 300".split())
    faces = noise_faces()
    run = MagicMock(config=config, model=MagicMock(tokenizer=Tokenizer.train(["a face"])))
    run.dataset.faces = run.validation.faces = faces
    runs.print_plan(run)
    printed = capsys.readouterr().out
    for shown in ("300 steps of 8 pairs are 120.0 epochs", "will overfit: try --steps 75, or",
                  "with 20 validation faces, R@10 is 50 % by chance", "captions are not in the vocabulary: "):
        assert shown in printed


def test_tiny_recipe_fits_small_sets(tmp_path):
    """At least four steps an epoch, at most 30 epochs."""
    write_celeba(tmp_path / "a", count=41)
    flags = ["--data", f"{tmp_path}/a", "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/out"]
    for more, batch_size, steps in (([], 9, 120), (["--steps", "7"], 9, 7), (["--batch_size", "20"], 20, 30)):
        with contextlib.closing((run := setup(train_config.parse_arguments(flags + more))).log):
            assert run.dataset.batch_size == run.config.batch_size == batch_size
            assert len(run.dataset.faces) == 39 and run.config.steps == steps
    runs.save(run)
    resume = lambda *flags: train_config.parse_arguments([*flags, "--resume"])
    assert resume(*flags, *more) == dataclasses.replace(run.config, resume=True), "by the same command"
    (tmp_path / "out").rename(moved := tmp_path / "moved")
    assert resume("--out", str(moved)) == dataclasses.replace(run.config, resume=True, out=str(moved))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The configuration and final metrics of `python train.py`."""
    folder = tmp_path_factory.mktemp("default")
    flags = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    run_python("train.py", *flags)
    return train_config.parse_arguments(flags), log_of(folder / "out")[-1]


@pytest.mark.slow
def test_default_run_finds_faces_more_often_than_matching_all_attributes(default_run):
    """Text to image; the recalls of RESULTS.md, less three points."""
    config, metrics = default_run
    references = evaluation.EvaluationSet.from_faces(runs.open_data(config, 48)[1]).references
    assert 60 <= references["attribute match"][1] <= 80 and references["Bayes optimum"][0] > 65
    assert all(metrics[name] >= least for name, least in (("img_r1", 48), ("img_r5", 78), ("img_r10", 86)))


# ---- finetune.py: against official figures in golden.npz, closed forms, the weights before -------
@pytest.fixture
def tuned(uninterrupted, cache, tmp_path):
    """A function that makes the configuration of a short run on a few drawn faces."""
    def config(task, **changes):
        settings = finetune.RECIPES[task] | finetune.DRAWN[task] | dict(
            task=task, checkpoint=f"{uninterrupted}/flip.pt", out=str(tmp_path), cache=cache, faces=24,
            validation=4, test=8, epochs=3, batch_size=8, itm_every=1, precision="float32", workers=0,
            sketch_steps=7)
        return finetune.TaskConfig(**settings | changes)
    return config


def test_attribute_logits_and_loss_are_the_official_ones(official, tuned, monkeypatch):
    vectors, theirs = finetune.pool_tokens(official.student.image, GOLDEN["eval.images"]), recorded("attr.")
    monkeypatch.setattr(finetune, "encode", lambda *_: vectors.detach())
    faces = dataclasses.replace(noise_faces(8), attributes=theirs["target"].bool().numpy())
    task = finetune.Attributes(official, dict.fromkeys(("train", "val", "test"), faces), tuned("attributes"))
    task.trained.load_state_dict({
        "weights": theirs["layer_weights"].flatten(),
        **{f"norm.{name}": theirs[f"ln.{name}"] for name in ("weight", "bias")},
        **{f"linear.{name}": theirs[f"visual_proj.{name}"] for name in ("weight", "bias")}})
    close(task.trained(vectors), theirs["logits"])
    close(task.loss(torch.arange(8), 0), theirs["loss"])


def test_tokens_are_pooled_after_blocks_4_6_8_and_12_of_base_and_at_four_depths_of_5():
    hidden = [torch.full((1, 3, 2), float(block)) for block in range(1, 13)]
    base = MagicMock(config=ViTConfig(), return_value=(torch.full((1, 3, 2), 99.0), hidden))
    assert finetune.pool_tokens(base, None)[0, :, 0].tolist() == [4, 4, 4, 6, 6, 6, 8, 8, 8, 99, 99, 99]
    vectors = finetune.pool_tokens(ViT(ViTConfig(32, 8, 24, 5, 3)), torch.zeros(1, 3, 32, 32))
    assert vectors.shape == (1, 12, 24) and len(vectors[0].unique(dim=0)) == 12


def test_early_retrieval_is_the_official_one_and_ties_and_nan_count_as_misses():
    metrics = finetune.early_retrieval(GOLDEN["slfir.ranks"], photos=20)
    for name in ("mA", "mB", "wA", "wB"):
        assert metrics[f"{name[0]}@{name[1]}"] == pytest.approx(GOLDEN[f"slfir.{name}"].item(), abs=1e-9)
    similarity = torch.tensor([[[0.5, 0.1, 0.5], [0.9, 0.1, 0.2]], [[0.2, 0.2, 0.2], [0.3, 0.1, 0.0]],
                               [[0.0, 0.0, torch.nan], [0.0, 0.1, 0.2]]])
    assert finetune.sketch_ranks(similarity).tolist() == [[2, 1], [3, 2], [3, 1]]


def test_balanced_accuracy_is_the_mean_of_both_recalls():
    predicted = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1]]).bool()
    truth = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]]).bool()       # all have the third
    accuracy, balanced = finetune.accuracies(predicted, truth)
    assert accuracy.tolist() == [50, 75, 100]
    assert balanced.tolist() == pytest.approx([100 / 3, 50, np.nan], nan_ok=True)


def test_chance_recalls_match_random_rankings():
    rng, image_of_text = np.random.default_rng(0), torch.tensor([0] * 3 + [1] + [2] * 2 + list(range(3, 20)))
    scores = [torch.from_numpy(rng.random((20, 23))) for _ in range(3000)]
    samples = [evaluation.retrieval_metrics(score, score.T, image_of_text) for score in scores]
    expected = evaluation.chance_recalls(image_of_text)
    for name in expected:
        assert np.mean([metrics[name] for metrics in samples]) == pytest.approx(expected[name], abs=1)
    assert [*evaluation.chance_recalls(torch.arange(3)).values()] == pytest.approx([100 / 3, 100, 100] * 2)


def test_in_batch_contrastive_loss_is_the_symmetric_cross_entropy_over_identities():
    rows, keys = (unit(5, 8).double().requires_grad_() for _ in range(2))
    identity, temperature = torch.tensor([3, 1, 3, 4, 5]), torch.tensor(0.07, dtype=torch.float64)
    targets = F.normalize((identity[:, None] == identity).double(), p=1)
    expected = (F.cross_entropy(rows @ keys.detach().T / temperature, targets)
                + F.cross_entropy(keys @ rows.detach().T / temperature, targets)) / 2
    actual = finetune.in_batch_contrastive_loss(rows, keys, identity, temperature)
    for ours, theirs in zip(*(with_gradients(loss, (rows, keys)) for loss in (actual, expected))):
        close(ours, theirs, 1e-9)


HEADS = "student.image_projection", "student.text_projection", "matching_head", "temperature"


@pytest.mark.parametrize("task", ["retrieval", "sketch", "attributes"])
def test_finetuning_changes_only_heads_without_dropout(tuned, uninterrupted, tmp_path, capsys, task):
    saved, epochs = torch.load(uninterrupted / "flip.pt"), 3
    if task == "sketch":        # random weights, as those of a short run hardly distinguish sketches
        trained = FLIP.from_pretrained(uninterrupted)
        torch.manual_seed(0)
        saved, epochs = runs.random_model(trained.config, trained.tokenizer).checkpoint(), 50
    torch.save(saved, tmp_path / "flip.pt")
    rows = finetune.finetune(tuned(task, checkpoint=f"{tmp_path}/flip.pt", epochs=epochs))
    table = (tmp_path / task / "table.md").read_text()
    assert table in capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == [name for name, _ in rows] and names[-1].startswith("random weights, tuned")
    Image.open(tmp_path / task / f"{task}.png").load()
    if task != "attributes":                        # it trains a head of its own
        tuned_weights = torch.load(tmp_path / task / "flip.pt")["model"]
        changed = [name for name, x in tuned_weights.items() if not torch.equal(x, saved["model"][name])]
        assert changed and all(name.startswith(HEADS) for name in changed)
    saved["flip"]["bert"]["dropout"] = 0.9
    torch.save(saved, tmp_path / "dropout.pt")
    again = finetune.finetune(
        tuned(task, checkpoint=f"{tmp_path}/dropout.pt", epochs=epochs, random=False,
              out=f"{tmp_path}/again"))
    assert [metrics for _, metrics in again] == [metrics for _, metrics in rows[:len(again)]]


def test_attributes_are_trained_on_celeba_with_a_row_per_fraction(tuned, tmp_path):
    write_celeba(tmp_path, count=40, held_out=5)
    config = tuned("attributes", data=str(tmp_path), fractions=(1.0, 0.1), random=False)
    rows, test = dict(finetune.finetune(config)), open_faces(tmp_path, "test").attributes.mean(0)
    assert [*rows] == ["majority class", f"{config.checkpoint}, tuned on 10 % of the faces",
                       f"{config.checkpoint}, tuned on 100 % of the faces"]
    header, _, first, *_ = (tmp_path / "attributes/table.md").read_text().splitlines()
    assert header == "| attributes, % | accuracy | balanced accuracy |"
    assert first == f"| majority class | {100 * np.maximum(test, 1 - test).mean():.1f} | 50.0 |"
    head = torch.load(tmp_path / "attributes/head.pt")["model"]
    assert head["linear.weight"].shape == (40, 128) and head["weights"].shape == (9,)


def test_retrieval_is_trained_and_evaluated_on_images_with_several_captions(tuned, tmp_path, monkeypatch):
    write_mm_celeba(tmp_path, (*range(2, 42), *range(24000, 24012)))
    write_files(tmp_path, {f"text/celeba-caption/{24000 + n}.txt": f"{TEXTS[n]}\n{TEXTS[n + 12]}"
                           for n in range(12)})
    config = tuned("retrieval", data=str(tmp_path), random=False, test=0)
    rows = dict(finetune.finetune(config))
    assert "already contains results; remove it" in error_of(finetune.finetune, config)
    model, test = FLIP.from_pretrained(tmp_path / "retrieval"), open_faces(tmp_path, "test")
    evaluation_set = evaluation.EvaluationSet.from_faces(test)
    metrics, scores = evaluation.evaluate(model, evaluation_set, config)
    assert metrics == rows[f"{config.checkpoint}, tuned"]
    own = torch.arange(12).repeat_interleave(2)                                 # (T,)
    assert torch.equal(evaluation_set.image_of_text, own) and evaluation_set.texts[2:4] == test.captions[1]
    monkeypatch.setattr(common.pictures, "contact_sheet", MagicMock())
    common.pictures.plot_retrieval(evaluation_set, scores, "x.png", queries=24, top=12)
    shown = common.pictures.contact_sheet.call_args.args[0]
    framed = [label for _, tiles in shown for _, label, is_own in tiles if is_own]
    assert framed == [f"score {score:.1f}" for score in scores[torch.arange(24), own]]
    better = (scores > scores[torch.arange(24), own][:, None]).sum(1)
    assert metrics["img_r5"] == pytest.approx(100 * (better < 5).double().mean().item())
    assert rows["chance"]["img_r10"] == pytest.approx(1000 / 12) and 0 < metrics["img_r5"] < 100


@pytest.mark.parametrize("with_captions", [True, False])
def test_sketches_are_trained_with_captions_or_without_a_vocabulary(
        tuned, uninterrupted, tmp_path, monkeypatch, with_captions):
    numbers = []
    monkeypatch.setattr(data.Faces, "caption", lambda faces, i, rng: numbers.append(rng.random()) or "a man")
    saved, folder = torch.load(uninterrupted / "flip.pt"), write_sde(tmp_path)
    if with_captions:
        records = [{"image": f"photo1/image01{n:02d}.jpg", "caption": f"a face {n}"} for n in range(15)]
        write_files(folder, {"train.json": records})
    torch.save(saved if with_captions else saved | {"tokenizer": None}, tmp_path / "flip.pt")
    config = tuned("sketch", checkpoint=f"{tmp_path}/flip.pt", data=str(tmp_path), random=False)
    model = FLIP.from_pretrained(config.checkpoint)
    task = finetune.Sketch(model, finetune.open_splits(config, 48), config)
    task.loss(torch.arange(8), 0).backward()
    assert len(numbers) == len(set(numbers)) == 13 * with_captions
    assert model.student.image_projection.weight.grad is not None and model.matching_head.weight.grad is None
    assert (model.student.text_projection.weight.grad is not None) == with_captions
    assert task.loss(torch.arange(8), 0) != task.loss(torch.arange(8), 0), "at random steps"
    assert len(finetune.finetune(config)) == 3


@pytest.mark.parametrize("hardness, expected", [(None, 1.0), (0.25, 0.25)])
def test_retrieval_samples_negatives_as_hard_as_in_pre_training(tuned, uninterrupted, hardness, expected):
    config, model = tuned("retrieval"), FLIP.from_pretrained(uninterrupted)
    model.config = dataclasses.replace(model.config, itm_hardness=hardness)
    sampled, sample = [], model.sample_negatives
    model.sample_negatives = lambda *args: sampled.append(args[3]) or sample(*args)
    task = finetune.Retrieval(model, finetune.open_splits(config, 48), config)
    task.loss(next(task.batches(np.arange(24))), 0)
    assert sampled == [expected]


def test_splits_have_at_most_the_faces_asked_for_and_retrieval_decodes_its_training_images_once(
        tuned, tmp_path):
    folder = write_celeba(tmp_path / "a", count=40, held_out=5)
    write_files(folder, {"img_align_celeba/000001.jpg": "not an image"})            # in training
    for test, expected in ((3, 3), (0, 5), (100, 5)):
        splits = finetune.open_splits(tuned("retrieval", data=str(folder), test=test), 48)
        assert [len(faces) for faces in splits.values()] == [30, 4, expected]
    assert "1 of 30 are invalid" in error_of(finetune.open_splits, tuned("attributes", data=str(folder)), 48)
    captioned = tuned("retrieval", data=str(write_captions(tmp_path / "b")), columns=("pcfg",))
    assert "expected text in pcfg" in error_of(finetune.open_splits, captioned, 48)


def test_interrupted_finetuning_leaves_no_table_and_can_be_started_again(tuned, tmp_path, monkeypatch):
    encoders, real = [], finetune.train_heads

    def interrupted(*args):
        encoders.append(args[0].model)
        if len(set(encoders)) == 2:
            raise KeyboardInterrupt
        real(*args)
    monkeypatch.setattr(finetune, "train_heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(tuned("attributes"))
    assert (tmp_path / "attributes/head.pt").exists() and not (tmp_path / "attributes/table.md").exists()
    monkeypatch.setattr(finetune, "train_heads", real)
    assert len(finetune.finetune(tuned("attributes", fractions=(1.0,)))) == 3


def test_fractions_are_nested_samples_chosen_by_the_seed_and_get_equal_steps(tuned, tmp_path, monkeypatch):
    chosen, settings = [], dict(random=False, faces=20, fractions=(0.1, 1.0, 0.01, 0.5))
    monkeypatch.setattr(finetune, "train_heads", lambda task, samples, steps, _: chosen.append(
        (set(samples.tolist()), steps)))
    for seed in (3, 4):
        finetune.finetune(tuned("attributes", out=str(tmp_path / str(seed)), seed=seed, **settings))
    samples = [faces for faces, _ in chosen]
    assert [len(faces) for faces in samples] == [1, 2, 10, 20] * 2 and {steps for _, steps in chosen} == {9}
    assert samples[0] < samples[1] < samples[2] < samples[3] == set(range(20)) and samples[2] != samples[6]


@pytest.mark.parametrize("values, best", [("543210", 0), ("179892", 2), ("123456", 5)])
def test_weights_with_the_best_validation_metric_are_kept_even_if_initial(tuned, tmp_path, values, best):
    head, weights = nn.Linear(2, 1), []

    class Counting(finetune.Attributes):
        def __init__(self):
            self.model, self.trained, self.config = small_flip(), head, tuned("attributes")

        def loss(self, batch, step):
            return head(torch.ones(2)).sum()

        def metrics(self, split):
            assert split == "val"
            weights.append(head.weight.detach().clone())
            return {"accuracy": float(values[len(weights) - 1])}, None
    finetune.train_heads(Counting(), np.arange(4), 9, Log(tmp_path / "log.jsonl"))
    assert len(weights) == 6 and not torch.equal(weights[0], weights[1])
    assert torch.equal(head.weight, weights[best])


# ---- search.py: against scores of single images, and where parts of a face are drawn -------------
def test_search_prints_the_best_scores_and_skips_other_files(uninterrupted, tmp_path, monkeypatch, capsys):
    folder, query, out = write_celeba(tmp_path), "a smiling woman", tmp_path / "results/sheet.bmp"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    (folder / "notes.png").write_text("not an image")
    monkeypatch.setattr(sys, "argv", ["search.py", "--checkpoint", f"{uninterrupted}/flip.pt", "--top", "4",
                                      "--images", str(folder), "--out", str(out), query])
    with pytest.warns(UserWarning, match="skipped: .*notes.png is not an image"):
        search.main()
    model, paths = FLIP.from_pretrained(uninterrupted), sorted(folder.rglob("*.jpg"))
    columns = [function(paths, query)[:, 0].tolist() for function in (
        model.score, functools.partial(cosines_of, model), model.match_probability)]
    rows = sorted(zip(*columns, paths), reverse=True)
    printed = capsys.readouterr().out
    assert "best of 6 faces" in printed and printed.splitlines()[-5:-1] == [
        f"{score:6.2f} {cosine:7.3f} {100 * match:6.1f} %  {path}" for score, cosine, match, path in rows[:4]]


def test_features_are_cached_and_only_changed_images_are_encoded(uninterrupted, tmp_path, monkeypatch):
    folder, opened, model = tmp_path / "a", [], FLIP.from_pretrained(uninterrupted)
    write_files(tmp_path, grey_images(["a/0.png", "a/b/1.png", "c/2.png"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "load_image", lambda p, size: opened.append(p) or load_image(p, size=size))

    def encode(folder, *, reads):
        opened.clear()
        features = search.encode_folder(model, folder, tmp_path / "features.pt")
        assert sorted(opened) == [str(tmp_path / path) for path in reads]
        return features
    os.mkfifo(folder / "pipe.png")                              # is skipped
    before = encode(folder, reads=["a/0.png", "a/b/1.png"])
    assert [*before] == [f"{folder}/0.png", f"{folder}/b/1.png"]
    assert [*encode("a", reads=[])] == [*encode(Path("a"), reads=[])] == ["a/0.png", "a/b/1.png"]
    (tmp_path / "link").symlink_to("a")
    assert [*encode("link", reads=[])] == ["link/0.png", "link/b/1.png"]
    encode("c", reads=["c/2.png"])                              # folders keep each other's features
    Image.new("RGB", (9, 9), "red").save(folder / "3.png")
    os.utime(folder / "0.png", (1, 1))
    after = encode(folder, reads=["a/0.png", "a/3.png"])
    assert len(after) == 3 and all(torch.equal(after[path], before[path]) for path in before)
    (folder / "b/1.png").unlink()
    assert [*encode(folder, reads=[])] == [f"{folder}/0.png", f"{folder}/3.png"]
    encode("c", reads=[])
    for content in ("", "no weights", (tmp_path / "features.pt").read_bytes()[:-9]):
        write_files(tmp_path, {"features.pt": content})
        with pytest.warns(UserWarning, match="features.pt is damaged: encoding all images again"):
            encode("c", reads=["c/2.png"])
    torch.save({"model": 1}, tmp_path / "features.pt")
    with pytest.warns(UserWarning, match="features.pt is damaged: encoding all images again"):
        encode(folder, reads=["a/0.png", "a/3.png"])
    model.student.image_projection.bias.data[0] += 1            # another model: nothing is reused
    encode(folder, reads=["a/0.png", "a/3.png"])
    write_files(folder, {"0.png": "damaged", "3.png": "damaged"})
    with pytest.warns(UserWarning, match="skipped: .*0.png"):
        assert "a: expected images (.jpg" in error_of(encode, "a", reads=["a/0.png", "a/3.png"])
    with pytest.warns(UserWarning, match="most images are grey"):
        encode("c", reads=["c/2.png"])


def test_patch_attributions_sum_to_the_difference_from_a_grey_image(uninterrupted):
    model, images = FLIP.from_pretrained(uninterrupted), [*map(Image.fromarray, noise_faces(3, 48).images)]
    grey = np.tile(common.images.MEAN.numpy() * 255, (48, 48, 1)).round().astype(np.uint8)
    attributions = search.attribute_patches(model, images, "a man", steps=20)
    score, grey_score = (model.score(each, "a man")[:, 0] for each in (images, [Image.fromarray(grey)]))
    assert attributions.shape == (3, 6, 6)
    missing = attributions.sum((1, 2)) - (score - grey_score)           # as grey is rounded to 8 bits
    assert missing.abs().max() < 0.03 and missing.max() - missing.min() < 1e-3
    grey[8:16, 40:] = 0             # one patch is not grey
    [attributions] = search.attribute_patches(model, [Image.fromarray(grey)], "a man")
    by_size = attributions.abs().flatten().sort(descending=True).values
    assert attributions[1, 5].abs() == by_size[0] > 10 * by_size[1]


def test_unusable_queries_are_rejected_and_unknown_words_and_negations_are_named(uninterrupted, tmp_path):
    model, folder = FLIP.from_pretrained(uninterrupted), write_files(tmp_path, grey_images(["0.png"]))
    features = search.encode_folder(model, folder, tmp_path / "features.pt")
    for query, warning in (("a goatee with freckles", "not in the model's vocabulary: freckles"),
                           ("a man Not glasses", "'Not' excludes nothing; use --without")):
        with pytest.warns(UserWarning, match=warning):
            search.search(model, features, query)
    for query, without in (("", []), (" ", []), ("a man", [""]), ("a dog", []), ("a man", ["the freckles"])):
        assert "no word of" in error_of(search.search, model, features, query, without)
    assert "no images" in error_of(search.search, model, {}, "a man")
    query = "She is a smiling woman with blond hair and freckles, who is wearing a hat and a tie."
    assert search.split_phrases(query, TOKENIZER) == ["a smiling woman", "blond hair", "a hat", "a tie"]


def test_scores_of_the_exclusions_are_subtracted(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    model, (_, paths) = FLIP.from_pretrained(uninterrupted), write_pictures(tmp_path)
    features = search.encode_folder(model, tmp_path, tmp_path / "cache.pt")
    for without in ([], ["glasses"], ["glasses", "a goatee"], ["glasses", "a goatee", "bangs"]):
        texts, weights = ["a man", *without], torch.tensor([1.0] + [-1 / (len(without) + 1)] * len(without))
        scores, cosines = model.score(paths, texts) @ weights, cosines_of(model, paths, texts) @ weights
        order = scores.argsort(descending=True)
        results = search.search(model, features, "a man", without, top=6)
        assert [result.path for result in results] == [paths[i] for i in order]
        expected = torch.stack([scores, cosines, model.match_probability(paths, "a man")[:, 0]], 1)
        close(torch.tensor([result[1:] for result in results]), expected[order])


QUERIES = {         # query [- what is excluded]...: attributes of the faces that are right
    "glasses": "Eyeglasses", "a hat": "Wearing_Hat", "earrings": "Wearing_Earrings", "a goatee": "Goatee",
    "blond hair": "Blond_Hair", "gray hair": "Gray_Hair", "a mustache": "Mustache", "bangs": "Bangs",
    "heavy makeup": "Heavy_Makeup", "rosy cheeks": "Rosy_Cheeks", "a big nose": "Big_Nose",
    "a bearded man": "!No_Beard", "an old man with a beard": "!Young !No_Beard Male",
    "a woman with black hair": "!Male Black_Hair", "a man - a beard": "Male No_Beard",
    "a man - a hat - a tie": "Male !Wearing_Hat !Wearing_Necktie",
    "a woman - earrings - glasses": "!Male !Wearing_Earrings !Eyeglasses"}


@pytest.mark.slow
def test_queries_find_the_right_faces_after_the_default_run(default_run, tmp_path):
    """`pytest -m slow -k queries_find -s` prints the precision of each query beside the base rate."""
    model, rows = FLIP.from_pretrained(default_run[0].out), []
    toyfaces.write_faces(tmp_path, 500, 64, seed=7)
    features = search.encode_folder(model, tmp_path, tmp_path / "features.pt")
    has = {str(image): row for faces in open_splits(tmp_path)
           for image, row in zip(faces.images, faces.attributes)}
    for query, attributes in QUERIES.items():
        wanted = [(ATTRIBUTES.index(name.strip("!")), "!" not in name) for name in attributes.split()]
        right = {path: all(row[i] == value for i, value in wanted) for path, row in has.items()}
        text, *without = query.split(" - ")
        results = search.search(model, features, text, without, top=10)
        found = [right[result.path] for result in results]
        rows.append([100 * np.mean(x) for x in (found[:5], found[:10], [*right.values()])])
        print(query, *(f"{value:.0f}" for value in rows[-1]), sep=" | ")
    print("mean of the first five, first ten, base rate:", np.mean(rows, axis=0).round(1))
    assert np.mean(rows, axis=0)[0] >= 85


@pytest.mark.slow
def test_phrase_is_read_where_its_part_of_the_face_is(default_run):
    """Where two drawings of a face, with and without the part, differ in a tenth of a patch.
    `pytest -m slow -k is_read_where -s` prints RESULTS.md's figures."""
    model, ratios = FLIP.from_pretrained(default_run[0].out), []
    for phrase in ("glasses", "a hat", "a mustache", "earrings", "a goatee", "bangs"):
        pairs = report.counterfactual_pairs(ATTRIBUTES.index(QUERIES[phrase]), 50, 48)
        absent, present = map(np.stack, zip(*(map(np.asarray, pair) for pair in pairs)))    # (50, 48, 48, 3)
        inside = (absent != present).any(-1).reshape(-1, 6, 8, 6, 8).mean((2, 4)) >= 0.1
        attributions = search.attribute_patches(model, [*map(Image.fromarray, present)], phrase)
        positive = attributions.clamp(min=0).numpy()
        ratios.append(((positive * inside).sum((1, 2)) / positive.sum((1, 2))).mean() / inside.mean())
        print(f"{phrase}: {ratios[-1]:.1f} times the part's share of the patches")
    print(f"mean: {np.mean(ratios):.1f}")
    assert np.mean(ratios) >= 3


def test_page_answers_a_query_with_a_contact_sheet_and_a_list(uninterrupted, tmp_path, monkeypatch):
    """A mock takes gradio's place and records the function that answers."""
    gradio = MagicMock()
    model = FLIP.from_pretrained(uninterrupted)
    features = search.encode_folder(model, write_celeba(tmp_path), tmp_path / "features.pt")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(search, "stop_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
    search.serve(model, features, "a man", "", 3)
    answer = gradio.Interface.call_args.args[0]
    assert answer("a smiling woman", "a goatee, eyeglases", True) == (gradio.skip(), gradio.skip())
    assert "eyeglases" in gradio.Warning.call_args.args[0]
    sheet, listed = answer("a smiling woman", "a goatee, bangs", False)
    results = search.search(model, features, "a smiling woman", ["a goatee", "bangs"], 3)
    assert listed.splitlines() == [*map(str, results)]
    explained, _ = answer("a smiling woman", "a goatee, bangs", True)
    assert 3 * 128 < sheet.width < 4 * 128 < explained.width and explained.height > 3 * 128 > sheet.height


# ---- report.py: against known duplicates and damage ----------------------------------------------
def test_report_counts_duplicates_damage_and_words(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 40, 3), dtype=np.uint8)
    records = [{"image": f"{i}.png", "caption": "a man with a hat and big eyes"[:20 + i]} for i in range(30)]
    images = {f"images/{i}.png": Image.fromarray(pixels[max(i, 5)]).resize((60, 50)) for i in range(29)}
    write_files(tmp_path, images | {"images/29.png": "not an image", "train.json": records, "val.json": []})
    monkeypatch.setattr(sys, "argv", ["report.py", "--data", str(tmp_path), "--cache", f"{tmp_path}/cache",
                                      "--out", f"{tmp_path}_report/page.png"])
    report.main()
    printed = capsys.readouterr().out
    for text in ("train: 30 faces\n", "29 images, 1 unreadable, 5 copies, mean size 60 x 50 pixels",
                 "30 captions: 22 equal to another", ", 6 to 8 (10 to 75)",
                 "val: expected at least one face in this split"):
        assert text in printed, text


def test_counterfactuals_are_the_same_face_and_right_if_the_score_of_the_one_with_it_is_higher(
        uninterrupted, tmp_path, capsys):
    hats, pale = (report.counterfactual_pairs(ATTRIBUTES.index(name), 3, 96)
                  for name in ("Wearing_Hat", "Pale_Skin"))
    for absent, present in hats:
        differs = (np.asarray(absent) != np.asarray(present)).any(-1)
        assert differs[:40].any() and not differs[60:].any()
    assert all(np.mean(present) > np.mean(absent) for absent, present in pale)
    model, right = FLIP.from_pretrained(uninterrupted), torch.tensor([0.0, 1.0, 0.0, 1.0])
    logits = torch.stack([0 * right, -1.1 * right], -1)
    model.match_logits = lambda *_: (logits, right)                         # their sum is wrong
    model.config = dataclasses.replace(model.config, itm_hardness=None)
    report.report_counterfactuals(model, f"{tmp_path}/card.png", count=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| mean | 100 | 0 |" and len(lines) == 2 + 40 + 1


# ---- bench.py: it compares the kernels with PyTorch's functions itself ---------------------------
def test_bench_prints_its_tables(monkeypatch, capsys):
    """On small inputs, each measured once and without torch.compile."""
    monkeypatch.setattr(bench, "seconds", lambda call: (call(), 0.001)[1])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bench.bench_attention(images=2)
    bench.bench_contrastive(B=4, Q=50, E=16)
    bench.bench_step(dataclasses.replace(GOLDEN_CONFIG, queue_size=40), B=4, matrix=32)
    printed = capsys.readouterr().out
    assert printed.count("| ours | 1.00 | 1.00 |") == 4 and printed.count("padded | 1.00 | 1.00 |") == 3
    [(tokens, rate, share)] = re.findall(r"torch.float32 \| (\d+) \| 0.00 \| (\d+) \| (\d+) \|", printed)
    assert 4 * (17 + 10) <= int(tokens) <= 4 * (17 + 65)        # 17 of an image, 10 to 65 of a caption
    assert int(share) == pytest.approx(100 * int(rate) * 1e6 / (2 * 32 ** 3), rel=0.05)


# ---- layout, scripts and README: against import statements, and the commands in README.md --------
ORDER = """kernels/__init__ kernels/attention kernels/contrastive common/seeds common/script common/images
    common/pictures common/words common/distributed pretrained optim attention vit tokenizer bert losses flip
    captions optimum drawing/portrait drawing/sketch toyfaces readers/index readers/layouts data config
    evaluation runs train finetune search report bench test_all""".split()


def test_imports_run_down_only():
    def imports_of(file):
        names = set()
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = [node.module] if isinstance(node, ast.ImportFrom) else []
                names.update(module, (".".join([*module, alias.name]) for alias in node.names))
        return {name.replace(".", "/") + file for name in names for file in ("", "/__init__")} & set(ORDER)
    paths = (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in paths} == set(ORDER)
    for position, file in enumerate(ORDER):
        assert imports_of(file) <= set(ORDER[:position]), file
        if file.startswith("common/"):
            assert all(name.startswith("common/") for name in imports_of(file)), file
        if file != "test_all":
            assert not imports_of(file) & {"finetune", "search", "report", "bench"}, file


def test_train_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import torch, train; print(train.train.__name__)"
    assert run_python("-c", code) == "train\n"


@pytest.mark.parametrize("arguments, message", [
    ("toyfaces.py --out .", "--out .: expected a new or an empty folder, found files"),
    ("search.py --checkpoint nowhere.pt query", "nowhere.pt: expected a file"),
    ("report.py --data nowhere", ".*nowhere: no such folder or file")])
def test_invalid_arguments_of_a_script_end_in_a_one_line_error(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def test_every_command_of_the_readme_works(tmp_path, monkeypatch):
    """On less data, and with stand-ins for downloads; commands for 8 GPUs are only parsed."""
    monkeypatch.chdir(tmp_path)
    write_celeba(tmp_path / "DIR", count=40)
    torch.manual_seed(0)
    small = ViTConfig(32, 8, 64, 1, 1), BertConfig(81, 64, 1, 1, 66), 16, 4, None
    monkeypatch.setattr(FLIPConfig.__init__, "__defaults__", small)         # instead of base
    torch.save({"model": official_state(FLIP(FLIPConfig()))}, "FLIP-base.pth")
    golden_tokenizer(tmp_path)
    less = {"train.py": "--faces 64 --validation 20 --steps 4 --batch_size 8", "toyfaces.py": "--count 60",
            "finetune.py": "--faces 16 --validation 3 --test 6 --epochs 1"}
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for command in ["python losses.py", "python flip.py", *re.split(r"\n| && ", "".join(blocks).strip())]:
        program, *arguments = shlex.split(command.replace("bert-base-uncased", "vocab.txt"))
        if program == "torchrun":
            train_config.parse_arguments(arguments[arguments.index("train.py") + 1:])
        elif program == "python" and arguments[0] != "bench.py":          # has tests of its own
            more = [] if "--resume" in arguments else less.get(arguments[0], "").split()
            monkeypatch.setattr(sys, "argv", [*arguments, *more])
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")       # fails with SystemExit
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(lines.replace("000325", "000032"), {})             # DIR has 40 images


def test_results_name_tests_that_exist():
    tests = [name for name in globals() if name.startswith("test_")]
    section = (ROOT / "RESULTS.md").read_text().split("## Known failure modes")[1].split("\n## ")[0]
    named = [name for row in section.splitlines()[7:] for name in re.findall(r"`(\w+)`", row.split("|")[-2])]
    assert len(named) > 10 and all(any(name in test for test in tests) for name in named)


# ---- compiled kernels: against the compiler's register counts; beside all other tests ------------
TYPES = {"*fp32": "lse delta delta_out queries temperature max_logits weight_sums key_sums",
         "*i32": "query_offsets key_offsets", "*i64": "identity key_identity seed",
         "i32": "B K keys_per_program"}         # of arguments that are not tensors of the kernel's own dtype
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}
# bytes of shared memory of a program, at most, by compute capability (CUDA C++ Programming Guide); 8.6, 8.9
# and 12.0 have less than 8.0 (163 KB) and use as much
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
CASES = [(16, 0.1), (32, 0.1), (48, 0.1), (64, 0.1), (64, 0.0)]     # channels per head, dropout
ATTENTION_CASES = {"bf16": CASES, "fp16": [(64, 0.1)], "fp32": CASES}       # fp16 compiles like bf16


def launched_configs():
    """Yield every launch configuration: kernel name, dtype, compile-time arguments, compute capability."""
    for capability in SHARED_LIMIT:
        for dtype, cases in ATTENTION_CASES.items():
            for name, (d, dropout) in itertools.product(("fwd", "bwd_dq", "bwd_dkdv"), cases):
                meta = attention_kernels.launch_config(name, d, 4 if dtype == "fp32" else 2)
                seed = {} if dropout else {"seed": None}
                yield f"{name}_kernel", dtype, dict(dropout=dropout, **seed, **meta), capability
        for dtype, E in itertools.product(("fp32", "bf16"), (64, 256)):
            meta = dict(E=E, BLOCK_E=E, **contrastive_kernels.LAUNCH_CONFIG)
            yield "sums_kernel", dtype, meta, capability


def compile_one(config):
    """Compile one of the `launched_configs`; returns registers and spilled bytes per thread, and bytes of
    shared memory."""
    name, dtype, meta, capability = config
    kernel = getattr(attention_kernels, name, None) or getattr(contrastive_kernels, name)
    constants = {argument: meta[argument] for argument in kernel.arg_names if argument in meta}
    signature = {argument: "constexpr" if argument in meta else TYPE_OF.get(argument, f"*{dtype}")
                 for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]]              # PyTorch's allocations are aligned
               for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(triton.compiler.ASTSource(kernel, signature, constants, aligned),
                              target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
                              options=dict(num_warps=meta["num_warps"], num_stages=meta["num_stages"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    return registers, stack, compiled.metadata.shared


def compile_all():
    """Compile all configurations, which must fit a GPU, and print a row for each."""
    configs, rows = list(launched_configs()), []
    with common.distributed.parallel_map(compile_one, configs, "compiling") as results:
        for (name, dtype, meta, capability), (registers, stack, shared) in zip(configs, results):
            rows.append([name, dtype, meta.get("d") or meta["E"], meta.get("dropout", ""), capability / 10,
                         registers, stack, f"{shared / 1024:.1f}"])
            assert not stack and shared <= SHARED_LIMIT[capability], f"use smaller blocks: {rows[-1]}"
    header = ["kernel", "dtype", "d or E", "dropout", "capability", "registers", "spilled bytes", "shared KB"]
    assert {row[0] for row in rows} == {"fwd_kernel", "bwd_dq_kernel", "bwd_dkdv_kernel", "sums_kernel"}
    print(common.script.markdown_table(header, rows))


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """`compile_all`, started before the first test if its own test is selected."""
    if not any("every_shipped_kernel" in item.name for item in request.session.items):
        yield
        return
    command = [sys.executable, "-c", "import test_all; test_all.compile_all()"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_every_shipped_kernel_compiles_for_a100_and_h100_without_spilling(compiling):
    """`pytest test_all.py -k every_shipped_kernel -s` prints registers and shared memory. Needs no GPU."""
    pytest.importorskip("triton", reason="Triton is available for Linux only")
    printed, errors = compiling.communicate()
    assert compiling.returncode == 0, errors[-2000:]
    print(f"\n{printed}")

"""Tests of every file, in the order of ORDER: `pytest test_all.py`; long ones: `pytest -m slow`.

Numbers are compared against references that are not part of the project: golden.npz (recorded from
the official code at a small size, with random weights and dropout 0), torch's own modules, closed
forms.
"""
import ast
import contextlib
import copy
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
from collections import Counter, defaultdict
from dataclasses import fields, replace
from functools import partial, partialmethod
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.random import default_rng
from numpy.testing import assert_array_equal
from PIL import Image, ImageFilter, ImageOps
from tokenizers.processors import TemplateProcessing
from torch.distributed.elastic.utils.distributed import get_free_port

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # before Triton is imported: its kernels take CPU tensors, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bench
import captions as grammar
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
from attention import Dropout, Sequences, attention
from bert import Bert, BertConfig
from captions import ATTRIBUTES, FACTS, GRAMMAR, MIN_FACTS, PROBABILITIES, sample_caption
from common import distributed
from common.images import load_image, normalize_batch
from common.pictures import plot_retrieval
from common.script import markdown_table, naming, run_script
from common.seeds import derive_seed, random_stream
from common.words import known_and_unknown_words
from config import parse_task_arguments
from drawing import portrait
from evaluation import EvaluationSet
from flip import FLIP, FLIPConfig, StepParams, rerank
from kernels import attention as attention_kernels
from kernels import contrastive as contrastive_kernels
from kernels import triton
from losses import clip_loss, contrastive_loss, hard_negative_probabilities
from optim import Muon, build_optimizers, learning_rate, set_learning_rate, warmup_decay
from pretrained import load_bert, load_clip, map_key, official_name, official_state
from readers import index, layouts
from readers.index import TarImage
from runs import Log
from tokenizer import SPECIAL, Captions, Tokenizer, clean_caption
from vit import ViT, ViTConfig

parametrize = pytest.mark.parametrize
torch.backends.cudnn.allow_tf32 = False
torch.set_num_threads(1)    # several threads sum in varying order, so that equal runs differ
ROOT = Path(__file__).parent
RECORDED = dict(np.load(ROOT / "golden.npz"))
TEXT = {name: str(x) for name, x in RECORDED.items() if x.dtype.kind == "U"}
GOLDEN = {name: torch.from_numpy(x) for name, x in RECORDED.items() if name not in TEXT}
SENTENCES = json.loads(TEXT["captions"])
SHAPES = json.loads(TEXT["base_shapes"])

GOLDEN_VIT = ViTConfig(image_size=32, patch_size=8, width=24, depth=4, heads=3)
GOLDEN_BERT = BertConfig(vocab_size=81, width=20, depth=3, heads=2, positions=66, dropout=0.0)
GOLDEN_CONFIG = FLIPConfig(GOLDEN_VIT, GOLDEN_BERT, embed_dim=12, queue_size=8)


# ---- helpers of several sections -----------------------------------------------------------------
def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=0, atol=tolerance)


def same(actual, expected):
    """Two tensors, or two lists or dicts of tensors, are equal."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def error_of(call, *args, **kwargs):
    """What `run_script` prints of the error that a call raises, which must be one line."""
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)) as caught:
        call(*args, **kwargs)
    notes = getattr(caught.value, "__notes__", [])
    message = "; ".join([str(caught.value), *notes])
    assert "\n" not in message
    return message


def cosines_of(model, images, texts):
    return model.encode_image(images) @ model.encode_text(texts).T


def unit(*shape):
    """Random vectors of length 1."""
    return F.normalize(torch.randn(*shape), dim=-1)


def with_gradients(out, inputs, grad=None):
    return out, *torch.autograd.grad(out, inputs, grad)


def trained_parameters(model):
    """{name: parameter}, without the momentum encoders."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take(loader, start, count):
    return list(itertools.islice(loader.iterate_from(start), count))


def failing_at(number, error, function):
    """The function, but for call `number`, counted from 0, which raises the error."""
    calls = itertools.count()

    def call(*args):
        if next(calls) == number:
            raise error
        return function(*args)
    return call


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def recorded(prefix):
    """{rest of the name: tensor} of all names in golden.npz with this prefix."""
    return {name.removeprefix(prefix): x for name, x in GOLDEN.items() if name.startswith(prefix)}


@pytest.fixture(autouse=True)
def same_start(tmp_path_factory, monkeypatch):
    """Every test starts in an empty folder of its own and with the same random numbers."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def official():
    """The official checkpoint, written in the official format and loaded."""
    saved = {"model": recorded("checkpoint."), "optimizer": {}, "config": {}, "epoch": 0}
    torch.save(saved, "official.pth")
    return FLIP.from_pretrained("official.pth", GOLDEN_CONFIG)


def golden_tokenizer(folder):
    (folder / "vocab.txt").write_text(TEXT["vocab"])
    return Tokenizer.load(folder)


def golden_captions(part, index=...):
    """The recorded ids of a part, packed."""
    mask = GOLDEN[f"{part}.attention_mask"][index].bool()
    ids = GOLDEN[f"{part}.input_ids"][index][mask]
    return Captions(ids, Sequences.from_lengths(mask.sum(-1)))


def small_flip(queue_size=8):
    return FLIP(replace(GOLDEN_CONFIG, queue_size=queue_size))


def random_faces(count, seed=0):
    """Attributes (count, 40)."""
    rng = default_rng(seed)
    return np.array([toyfaces.sample_attributes(rng) for _ in range(count)])


def attributes_of(names):
    """A face with these attributes and no others, (40,) bool."""
    return np.isin(ATTRIBUTES, names.split())


def sample_captions(faces):
    """The caption of each face, and the facts that it states, with the face's number as seed."""
    samples = [sample_caption(face, default_rng(i)) for i, face in enumerate(faces)]
    texts, stated = zip(*samples)
    return list(texts), np.stack(stated)


TEXTS, _ = sample_captions(random_faces(200))
TOKENIZER = Tokenizer.train(TEXTS)


def noise_pixels(*shape):
    return default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def noise_faces(count=20, size=16):
    images = noise_pixels(count, size, size, 3)
    return data.Faces("noise", images, np.arange(count), random_faces(count))


def write_files(folder, files):
    """{name: content}: images, texts, bytes, or anything that JSON can express."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        else:
            path.write_text(json.dumps(content))
    return folder


def plain(colour="black", size=(8, 8)):
    return Image.new("RGB", size, colour)


def grey_images(names):
    return {name: plain((i % 256,) * 3) for i, name in enumerate(names)}


write_table = partial(np.savetxt, comments="")
VALUES = "list_attr_celeba.txt"
PARTITION = "list_eval_partition.txt"


def write_celeba(folder, kaggle=False, count=6, held_out=1):
    """CelebA's layout, or Kaggle's; the last 2 * held_out faces are for validation and test."""
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    rows = np.column_stack([names, np.where(random_faces(count), 1, -1)])
    splits = np.repeat([0, 1, 2], [count - 2 * held_out, held_out, held_out])
    parts = np.column_stack([names, splits])
    images = folder / "img_align_celeba"
    if kaggle:
        images /= "img_align_celeba"
    write_files(images, grey_images(names))
    if kaggle:
        header = ["image_id", *ATTRIBUTES]
        write_table(folder / "list_attr_celeba.csv", [header, *rows], '"%s"', ",")
        header = ["image_id", "partition"]
        write_table(folder / "list_eval_partition.csv", [header, *parts], "%s", ",")
    else:
        header = f"{count}\n{' '.join(ATTRIBUTES)} "
        write_table(folder / VALUES, rows, "%s", "  ", header=header)
        write_table(folder / PARTITION, parts, "%s")
    return folder


def open_faces(path, split="train", **options):
    """data.open_faces with its index in a folder beside the data set."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    return data.open_faces(path, split, cache=folder / "cache", **options)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


# every part of the recipe is in use after a few steps
QUICK = train_config.RECIPES["tiny"] | dict(
    faces=48, validation=20, steps=8, batch_size=8, precision="float32", queue_size=20,
    complete_from=0.25, alpha_warmup=0.6, warmup=2, log_every=1, eval_every=6)


@pytest.fixture(scope="session")
def quick(cache):
    """A function that makes the configuration of a short run on a few drawn faces."""
    def config(**changes):
        return train_config.Config(**QUICK | dict(out="out", cache=cache) | changes)
    return config


def parse_flags(*flags):
    """The configuration of `python train.py FLAGS`."""
    return train_config.parse_arguments([*map(str, flags)])


def setup(config):
    """What a run starts from; its log stays open, so that no other run can use the folder."""
    device = distributed.init_distributed(config.device)
    return train.build_run(config, device, Log(Path(config.out) / "log.jsonl"))


@contextlib.contextmanager
def open_run(config):
    """What a run starts from; its log is closed at the end, so that it can be resumed."""
    run = setup(config)
    with contextlib.closing(run.log):
        yield run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, quick):
    """The folder of a finished `quick` run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train.train(quick(out=str(out)))
    return out


@pytest.fixture
def saved(uninterrupted):
    """The checkpoint of the finished `quick` run."""
    return torch.load(uninterrupted / "flip.pt")


@pytest.fixture
def model(uninterrupted):
    """The model of the finished `quick` run."""
    return FLIP.from_pretrained(uninterrupted)


@pytest.fixture
def printed(capsys):
    """A function that returns what was printed since its last call."""
    return lambda: capsys.readouterr().out


def set_arguments(monkeypatch, *arguments):
    """The command line of a script: its name and its flags."""
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])


def run_python(*arguments):
    """`python arguments` in a process of its own, which must succeed; returns its output."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def group_of(world):
    """The environment variables that torchrun would give each of `world` processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    group = address | {"WORLD_SIZE": str(world)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


# ---- attention.py and its kernels: against float64 autograd through the definition ---------------
OWN = [1, 5, 16, 17, 64, 65, 0], [1, 5, 16, 17, 64, 65, 0]          # the last: an empty caption
OTHERS = [17, 24, 0], [65, 10, 7]                                   # no queries for the third
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}              # half: w is rounded, too
if DEVICE == "cuda":
    TOLERANCE[torch.bfloat16] = 8e-3                                # the interpreter's is wrong
PRECISIONS = [("pytorch", torch.float32), *(("triton", dtype) for dtype in TOLERANCE)]
EVERY_DEVICE = parametrize("device, dtype", PRECISIONS, indirect=["device"])


@pytest.fixture(params=["pytorch", "triton"])
def device(request, monkeypatch):
    """The device for PyTorch alone, or for the kernels: a GPU, or the CPU, interpreted."""
    if request.param == "pytorch":
        return "cpu"
    if DEVICE == "cpu":
        monkeypatch.setattr("attention.supports_attention", lambda query: True)
        monkeypatch.setattr(losses, "supports_contrastive", lambda feature: True)
        few = partial(losses.triton_average_keys, programs=8)
        monkeypatch.setattr(losses, "triton_average_keys", few)
    return DEVICE


def attention_case(query_lengths, key_lengths, device=DEVICE, dtype=torch.float32, channels=16):
    """(q, k, v) of two heads, (queries, keys), and a gradient with respect to the result."""
    queries = Sequences.from_lengths(query_lengths, device)
    keys = Sequences.from_lengths(key_lengths, device)

    def random(sequences):
        return torch.randn(sequences.num_tokens, 2, channels).to(device, dtype)
    inputs = [random(sequences).requires_grad_() for sequences in (queries, keys, keys)]
    return inputs, (queries, keys), random(queries)


def attention_and_gradients(inputs, sequences, grad, dropout=0.0):
    """(o, dq, dk, dv), with the same dropout each time."""
    torch.manual_seed(7)
    return with_gradients(attention(*inputs, *sequences, dropout=dropout), inputs, grad)


def expected_attention(inputs, sequences, grad, factors=itertools.repeat(1.0)):
    """(o, dq, dk, dv) by float64 autograd through the definition, sequence by sequence;
    factors: dropout's multipliers of the weights of each query sequence."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    queries, keys = sequences
    lengths = queries.lengths, keys.lengths, keys.lengths
    parts = [x.split(own.tolist()) for x, own in zip(exact, lengths)]
    out = []
    for q, k, v, factor in zip(*parts, factors):
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1) * factor
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return with_gradients(torch.cat(out), exact, grad.double())


def assert_near(actual, expected, tolerance):
    """The norm of each tensor's error is at most `tolerance` times the tensor's norm."""
    for x, exact in zip(actual, expected, strict=True):
        assert (x.double() - exact).norm() <= tolerance * exact.norm()


@EVERY_DEVICE
@parametrize("lengths, channels", [
    (OWN, 24),
    (OTHERS, 32),
    (([133], [133]), 64),
    (([0, 32], [16, 197]), 64),
    (([4, 3], [0, 5]), 16),
    (([5, 5, 5], [5, 5, 5]), 8),
    (([1, 1, 1], [4, 9, 2]), 8),
    (([9, 7], [7, 7]), 8)])
def test_attention_and_its_gradients_match_float64_autograd(device, dtype, lengths, channels):
    case = attention_case(*lengths, device, dtype, channels)
    assert_near(attention_and_gradients(*case), expected_attention(*case), TOLERANCE[dtype])


@EVERY_DEVICE
def test_dropout_drops_the_same_weights_forward_and_backward_and_rescales_the_rest(device, dtype):
    """With equal scores and the identity as values, the output shows which weights were dropped.
    The definition with these weights dropped must then give the results for any other scores."""
    query_lengths = [65, 9]
    key_lengths = [80, 30]
    inputs, sequences, grad = attention_case(query_lengths, key_lengths, device, dtype, channels=64)
    q, k, v = inputs
    identity = torch.cat([torch.eye(n, 128) for n in key_lengths]).to(v)    # (K, 128)
    identity = identity[:, None].expand(-1, 2, -1)                          # (K, H, 128)

    def dropped(values):
        return attention(q * 0, k, values, *sequences, dropout=0.3)
    halves = []
    for half in identity.split(64, -1):                 # attention has 64 channels
        torch.manual_seed(7)
        halves.append(dropped(half))
        assert not torch.equal(dropped(half), halves[-1]), "another seed drops others"
    outputs = torch.cat(halves, -1).split(query_lengths)
    kept = [o[..., :n].transpose(0, 1) > 0 for o, n in zip(outputs, key_lengths)]   # (H, Lq, n)
    share = torch.cat([mask.flatten() for mask in kept]).double().mean()
    assert share == pytest.approx(0.7, abs=0.022)                           # 5 deviations

    factors = [mask.double() / 0.7 for mask in kept]
    expected = expected_attention(inputs, sequences, grad, factors)
    assert_near(attention_and_gradients(inputs, sequences, grad, 0.3), expected, TOLERANCE[dtype])


def test_dropout_of_hidden_states_drops_the_given_share_and_rescales_the_rest():
    dropout = Dropout(0.3)
    x = torch.ones(100, 1000, requires_grad=True)
    out, gradient = with_gradients(dropout(x), [x], torch.ones_like(x))
    same(out, gradient)
    close(out[out > 0], torch.tensor(1 / 0.7).expand((out > 0).sum()))
    assert (out > 0).double().mean().item() == pytest.approx(0.7, abs=0.0073)      # 5 deviations
    assert dropout.eval()(x) is x


# ---- losses.py (ITC) and its kernel: against float64 autograd through torch's cross-entropy ------
def contrastive_case(B=20, Q=300, E=32, temperature=0.07, dtype=torch.float32):
    """All arguments but alpha. Momentum features are near their keys; persons recur."""
    with torch.device(DEVICE):
        feature = unit(B, E).requires_grad_()
        momentum = unit(B, E)
        own_keys = F.normalize(momentum + 0.1 * torch.randn(B, E), dim=-1)
        keys = torch.cat([own_keys, unit(Q, E)]).to(dtype)
        persons = torch.cat([torch.arange(B) // 2, torch.randint(0, 50, (Q,))])
        tau = torch.tensor(temperature, requires_grad=True)
    return feature, momentum, keys, persons[:B], persons, tau


def expected_contrastive(feature, momentum, keys, identity, key_identity, temperature, alpha):
    """(loss, dq, dtau). The target is uniform over the keys of the same person, mixed with the
    softmax of the momentum encoder."""
    q, tau = exact = [x.detach().double().requires_grad_() for x in (feature, temperature)]
    k = keys.double()
    same_person = (identity[:, None] == key_identity).double()
    soft = (momentum.double() @ k.T / tau.detach()).softmax(1)
    target = (1 - alpha) * same_person / same_person.sum(1, keepdim=True) + alpha * soft
    return with_gradients(F.cross_entropy(q @ k.T / tau, target), exact)


@parametrize("alpha, temperature", [(0.0, 0.5), (0.4, 0.07), (1.0, 0.001)])
@parametrize("shape, programs, dtype", [
    ((20, 300, 32), 1, torch.float32),
    ((5, 40, 12), 12, torch.float32),
    ((2, 33, 96), 4, torch.float32),
    *(((20, 300, 32), 12, dtype) for dtype in TOLERANCE)])
def test_contrastive_kernel_and_plain_forms_match_float64(
        monkeypatch, shape, programs, dtype, temperature, alpha):
    """Keys in half precision are rounded when stored; the computation with them is exact."""
    case = contrastive_case(*shape, temperature, dtype)
    feature, *_, tau = case
    tripled = [3 * exact for exact in expected_contrastive(*case, alpha)]
    monkeypatch.setattr(losses, "supports_contrastive", lambda feature: False)
    plain = partial(losses.average_keys, chunk=16)
    kernel = partial(losses.triton_average_keys, programs=programs)
    for average in (plain, kernel):
        monkeypatch.setattr(losses, "average_keys", average)
        actual = with_gradients(3 * contrastive_loss(*case, alpha), (feature, tau))
        assert_near(actual, tripled, 1e-5)


def test_contrastive_loss_is_float32_under_autocast_and_for_half_precision_features():
    feature, momentum, *others = contrastive_case(temperature=0.01)
    feature = feature.bfloat16()
    momentum = momentum.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = contrastive_loss(feature.float(), momentum.float(), *others, 0.4)
    assert loss.dtype == torch.float32
    same(contrastive_loss(feature, momentum, *others, 0.4), loss)


def test_memory_of_the_contrastive_loss_does_not_grow_with_the_queue():
    """At B 80, Q 61,440, E 256 no operator allocates 10 MB; the logits alone would be 20 MB."""
    case = contrastive_case(80, 61_440, 256)
    feature, *_, tau = case
    with torch.profiler.profile(profile_memory=True) as profile:
        with_gradients(contrastive_loss(*case, 0.4), (feature, tau))
    events = profile.events()
    largest = max(e.self_cpu_memory_usage + e.self_device_memory_usage for e in events)
    assert 0 < largest < 10e6


# ---- common/script.py, common/images.py: against full decoding, and pixels counted by hand -------
def test_scripts_flush_denormals_to_zero_in_all_threads():
    code = ("import torch; from common.script import run_script; run_script(lambda: print("
            "(torch.full((10 ** 7,), 1e-38) * 0.1).count_nonzero().item()))")
    assert run_python("-c", code) == "0\n"


def test_reduced_jpeg_decoding_matches_full_decoding():
    path = "face.jpg"
    for i in range(6):
        face, _ = toyfaces.face(i, 0, 900)
        face.resize((1000, 900)).save(path, quality=92)
        for box in (None, (40.4, 100.0, 990.2, 871.5)):
            expected = load_image(path).resize((224, 224), Image.Resampling.BICUBIC, box)
            image = load_image(path, box=box, size=224)
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 1


def test_transparent_images_are_loaded_on_white():
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    transparent.paste((0, 0, 255, 255), (0, 0, 4, 8))
    for mode in ("RGBA", "P", "LA"):
        transparent.convert(mode).save("a.png")
        loaded = load_image("a.png")
        assert loaded.getpixel((7, 0)) == (255, 255, 255)
        assert loaded.getpixel((0, 0)) != (255, 255, 255)


def test_images_are_loaded_upright_but_boxes_are_of_the_stored_image():
    path = "a.png"
    stored = plain("white", (400, 300))
    stored.paste("black", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6                                                # to be rotated by 90 degrees
    stored.save(path, exif=exif)
    for file in (path, Image.open(path)):
        upright = load_image(file, size=30)
        assert upright.getpixel((25, 3)) < (9, 9, 9)
    assert np.asarray(load_image(path, box=(1, 1, 99, 99), size=16)).max() < 9


def test_pixels_are_normalised_by_clips_published_mean_and_deviation_in_rgb_order():
    image = plain((255, 51, 0), (4, 4))
    pixels = normalize_batch([image])                               # (1, 3, 4, 4)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    close(pixels[0, :, 0, 0], (torch.tensor([1.0, 0.2, 0.0]) - mean) / deviation, 1e-6)


# ---- common/weights.py: against the official names, shapes and values in golden.npz --------------
def clip_weights(encoder):
    """Weights with Hugging Face's names for CLIP, with some of its text encoder."""
    weights = {}
    for name, x in encoder.state_dict().items():
        weights["vision_model." + map_key(name, pretrained.CLIP_KEYS)] = x
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    expected = recorded("checkpoint.visual_encoder.")
    assert weights.keys() == {name.replace("post_layrnorm", "post_layernorm") for name in expected}
    return weights | {
        "text_model.final_layer_norm.weight": torch.ones(4),
        "logit_scale": torch.ones(()),
        "visual_projection.weight": torch.ones(2, 2)}


def test_clip_weights_load_by_hugging_face_names_and_resize_to_another_image_size():
    """Positions are resized by torch's bicubic interpolation of their grid."""
    from safetensors.torch import save_file
    source = ViT(GOLDEN_VIT)
    equal = ViT(GOLDEN_VIT)
    larger = ViT(replace(GOLDEN_VIT, image_size=64))
    save_file(clip_weights(source), "model.safetensors")
    config = {"vision_config": {"hidden_act": "quick_gelu", "hidden_size": 9}}
    write_files(Path(), {"config.json": config})
    load_clip(equal, ".")
    load_clip(larger, ".")

    images = torch.randn(2, 3, 32, 32)
    close(equal(images), source(images), 0)
    close(larger.positions[0], source.positions[0], 0)
    grid = source.positions[1:].T.reshape(1, -1, 4, 4)              # (1, D, 4, 4)
    resized = F.interpolate(grid, (8, 8), mode="bicubic")
    close(larger.positions[1:].T, resized.detach().flatten(2)[0], 1e-6)


BIAS = "vision_model.pre_layrnorm.bias"


@parametrize("weights, settings, message", [
    ({}, {"vision_config": {"layer_norm_eps": 1e-6}}, "expected layer_norm_eps 1e-05, found 1e-06"),
    ({}, {"vision_config": {"num_attention_heads": 4}}, "expected num_attention_heads 3, found 4"),
    ({BIAS: torch.ones(24).int()}, {}, "expected (24,) torch.float32, found (24,) torch.int32"),
    ({BIAS: torch.ones(24).double() * 1e300}, {},
     "pytorch_model.bin: norm_before.bias: expected (24,) torch.float32, found NaN")])
def test_mismatched_weights_or_settings_are_named_and_none_is_loaded(weights, settings, message):
    """1e300 is infinite in float32."""
    changed = clip_weights(ViT(GOLDEN_VIT)) | weights
    torch.save(changed, "pytorch_model.bin")
    write_files(Path(), {"config.json": settings})

    encoder = ViT(GOLDEN_VIT)
    before = copy.deepcopy(encoder.state_dict())
    for source in (".", "pytorch_model.bin"):
        assert message in error_of(load_clip, encoder, source)
    same(encoder.state_dict(), before)


@pytest.fixture
def hub(monkeypatch):
    """The list of the files that were asked for; the folder "hub" takes the hub's place."""
    import huggingface_hub
    asked = []

    def download(name, filename):
        path = Path("hub", name, filename)
        asked.append(path)
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_files_of_a_hub_name_come_from_the_hub(official, hub):
    write_files(Path("hub"), {
        "OpenFace-CQUPT/FLIP/ckpt/FLIP-base.pth": Path("official.pth").read_bytes(),
        "bert-base-uncased/vocab.txt": TEXT["vocab"]})
    Path("hub/owner/clip").mkdir(parents=True)
    torch.save(clip_weights(ViT(GOLDEN_VIT)), "hub/owner/clip/pytorch_model.bin")
    loaded = FLIP.from_pretrained(
        "OpenFace-CQUPT/FLIP", GOLDEN_CONFIG, vocabulary="bert-base-uncased")
    same(list(loaded.parameters()), list(official.parameters()))

    load_clip(ViT(GOLDEN_VIT), "owner/clip")                        # it has no config.json
    write_files(Path("hub"), {"owner/clip/config.json": {"hidden_act": "gelu"}})
    error = error_of(load_clip, ViT(GOLDEN_VIT), "owner/clip")
    assert "expected hidden_act 'quick_gelu', found 'gelu'" in error


def test_misspelt_paths_are_not_looked_up_on_the_hub(tmp_path, hub):
    for name in ("flip", "a/b/c", "~/flip", "out/flip.pt", str(tmp_path)):
        error = error_of(FLIP.from_pretrained, name)
        assert error.startswith(f"{name}: expected a file, a folder that")
    assert not hub


def test_model_is_saved_as_safetensors_and_loaded_again(model):
    model.save_pretrained("saved")
    for path in ("saved", "saved/model.safetensors"):
        other = FLIP.from_pretrained(path)
        assert other.config == model.config
        assert other.tokenizer.to_json() == model.tokenizer.to_json()
        same(other.state_dict(), model.state_dict())


DELETE = object()


@parametrize("place, value, message", [
    ("model/queue_pointer", torch.ones(1), "expected (1,) torch.int64"),
    ("model/image_queue", torch.full((20, 128), torch.inf), "image_queue: expected (20, 128)"),
    ("model", DELETE, "flip.pt: expected a checkpoint of FLIP, found "),
    ("training/config/new", 1, "is of another version of this program, "),
    ("training/config/lr", DELETE, "version of this program, which differs in lr"),
    ("training", DELETE, "is a model without the state of a run; use it with --init"),
    ("flip/new", 1, "unexpected keyword argument 'new'"),
    ("flip", DELETE, "entries with [DEC] and [ENC], but the model has 30524"),
    ("training/optimizers", [], "zip() argument")])
def test_changed_checkpoint_is_rejected(saved, place, value, message):
    *outer, last = place.split("/")
    inner = functools.reduce(dict.get, outer, saved)
    inner[last] = value
    if value is DELETE:
        del inner[last]
    torch.save(saved, "flip.pt")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        setup(parse_flags("--out", ".", "--resume"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3700000000\n"


@parametrize("name, content", [
    ("flip.pt", "one flipped bit"),
    ("flip.pt", "cut off"),
    ("flip.pt", b""),
    ("FLIP-base.pth", POINTER),
    ("model.safetensors", POINTER)])
def test_damaged_or_foreign_file_is_rejected_in_one_line_with_its_name(
        uninterrupted, tmp_path, name, content):
    whole = (uninterrupted / "flip.pt").read_bytes()
    if content == "one flipped bit":
        content = bytearray(whole)
        content[len(whole) // 2] ^= 64
    if content == "cut off":
        content = whole[:-500]
    (tmp_path / name).write_bytes(content)
    start = bytes(content[:40])
    assert error_of(FLIP.from_pretrained, tmp_path).startswith(
        f"{tmp_path / name} is damaged or contains no weights: "
        f"{len(content):,} bytes that begin with {start!r}")


@parametrize("error, path, printed", [
    (OSError(28, "No space left on device"), None, "No space left on device"),
    (RuntimeError("details\nunexpected pos 64\n"), "a/flip.pt", "RuntimeError: unexpected pos"),
    (KeyError("flip"), "a/flip.pt", "KeyError: 'flip'"),
    (KeyError("flip"), None, None)])
def test_errors_that_name_a_file_are_printed_in_one_line_and_others_keep_their_traceback(
        error, path, printed):
    """printed: None for an error that is raised unchanged."""
    def fail():
        if path is None:
            raise error
        with naming(path):
            raise error
    expected = SystemExit if printed else type(error)
    with pytest.raises(expected, match=printed) as caught:
        run_script(fail)
    if printed:
        assert "\n" not in str(caught.value)
    if path:
        assert f"in {path}" in str(caught.value)


@parametrize("prefix, message", [
    ("", "student.image_projection.bias is missing (1 names differ"),
    ("module.", "names differ")])
def test_checkpoint_of_another_model_is_rejected_with_the_first_name_that_differs(
        prefix, message):
    state = {prefix + name: x for name, x in recorded("checkpoint.").items()}
    state.pop(f"{prefix}vision_proj.bias")
    torch.save({"model": state}, "other.pth")
    error = error_of(FLIP.from_pretrained, "other.pth", GOLDEN_CONFIG)
    assert "other.pth: " in error
    assert message in error


def test_full_disk_is_named_and_keeps_the_previous_checkpoint(monkeypatch):
    def save(contents, path):
        path.write_bytes(b"the first part")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    pretrained.write_checkpoint({"a": 1}, "flip.pt")
    monkeypatch.setattr(torch, "save", save)
    error = error_of(pretrained.write_checkpoint, {"a": 2}, "flip.pt")
    assert re.search(r"flip.pt cannot be written; [0-9,]+ bytes of its disk are free", error)
    assert torch.load("flip.pt") == {"a": 1}
    assert os.listdir() == ["flip.pt"]


def test_vocabulary_beside_a_checkpoint_that_has_one_is_rejected(uninterrupted):
    error = error_of(FLIP.from_pretrained, uninterrupted, vocabulary="vocab.txt")
    assert "has a vocabulary of its own; omit vocab.txt" in error


def test_bert_weights_load_with_token_type_0_added_and_the_rest_has_berts_deviation():
    encoder = Bert(GOLDEN_BERT, image_width=24)
    theirs = Bert(GOLDEN_BERT, image_width=24).state_dict()
    own = [name for name in theirs if "cross_attention" not in name]
    weights = {map_key(name, pretrained.BERT_KEYS): theirs[name] for name in own}
    types = torch.randn(2, 20)
    words = theirs["words.weight"][:-2]
    weights |= {
        "embeddings.word_embeddings.weight": words,
        "embeddings.token_type_embeddings.weight": types,
        "pooler.dense.weight": torch.ones(20, 20)}
    old = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    saved = {"bert." + map_key(name, old): x for name, x in weights.items()}
    saved["cls.predictions.bias"] = torch.ones(79)
    torch.save(saved, "pytorch_model.bin")
    load_bert(encoder, ".")

    loaded = encoder.state_dict()
    new = [x for name, x in loaded.items() if "cross_attention" in name and x.ndim == 2]
    new.append(loaded["words.weight"][-2:])
    for x in new:
        assert x.std().item() == pytest.approx(0.02, rel=0.3)
    theirs["positions"] += types[0]
    theirs["words.weight"][-2:] = new[-1]
    for name in own:
        same(loaded[name], theirs[name])


def test_official_checkpoint_saves_back_the_same(official):
    same(official_state(official), recorded("checkpoint."))


def test_all_names_of_the_official_base_model_load_and_save():
    state = {}
    for name, shape in SHAPES.items():
        is_integer = name.endswith(("_ids", "idx_queue", "ptr_queue"))
        number = torch.tensor(0 if is_integer else 0.07)
        state[name] = number.expand(shape)                  # each is one number in the file
    torch.save({"model": state}, "FLIP-base.pth")

    loaded = FLIP.from_pretrained(".")                      # finds it in the folder
    assert loaded.config == FLIPConfig()
    size = sum(p.numel() for p in trained_parameters(loaded).values())
    assert size == 223_453_187                              # the paper's
    saved = official_state(loaded)
    assert len(saved) == 1049
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == SHAPES


# ---- optim.py: against torch.optim.Muon ----------------------------------------------------------
@parametrize("muon_multiple, matrices", [
    (0, {}),
    (3, {3: 57})])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(muon_multiple, matrices):
    """matrices: {learning rate: number} of Muon: 6 of each of the image encoder's 4 blocks and the
    patch embedding, 10 of each of the text encoder's 3 layers, and a projection each."""
    model = small_flip()
    optimizers = build_optimizers(model, 0.05, muon_multiple)
    adamw, *muon = optimizers
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.999)
    hidden = [group for optimizer in muon for group in optimizer.param_groups]
    assert {group["lr_multiple"]: len(group["params"]) for group in hidden} == matrices
    assert all(group["momentum"] == 0.95 for group in hidden)

    groups = adamw.param_groups + hidden
    grouped = []
    for group in groups:
        grouped += map(id, group["params"])
        for p in group["params"]:
            assert group["weight_decay"] == (0.05 if p.ndim > 1 else 0)
    assert sorted(grouped) == sorted(map(id, trained_parameters(model).values()))

    set_learning_rate(optimizers, 2.0)
    for group in groups:
        assert group["lr"] == 2 * group["lr_multiple"]


def test_muon_matches_torchs_without_bfloat16(monkeypatch):
    """A convolution (6, 2, 3, 5) is updated like the matrix (6, 30)."""
    shapes = (6, 6), (6, 24), (24, 6), (6, 6), (6, 2, 3, 5)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.1, "lr": 0.02}], momentum=0.9)
    reference = torch.optim.Muon(theirs, 0.02, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1).clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs):
        close(p.flatten(1), q, 1e-5)


# ---- vit.py, bert.py: against the official sizes; flip.py compares what they compute -------------
def test_heads_and_epsilons_are_those_of_vit_b_16_and_bert_base():
    """The shapes of the weights determine all other sizes."""
    assert ViTConfig().heads == BertConfig().heads == 12
    assert BertConfig().dropout == 0.1
    for model, eps in ((ViT(GOLDEN_VIT), 1e-5), (Bert(GOLDEN_BERT, 64), 1e-12)):
        norms = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
        assert norms == {eps}


def test_every_dropout_is_active_in_training_and_off_in_evaluation():
    encoder = small_flip().student.text
    captions = golden_captions("eval")
    width = encoder.layers[0].cross_attention.key.in_features
    images = torch.randn(len(captions), 5, width)
    for module in encoder.modules():
        for name in {"p", "dropout"} & vars(module).keys():
            setattr(module, name, 0.5)
            for training in (True, False):
                encoder.train(training)
                repeated = torch.equal(encoder(captions, images), encoder(captions, images))
                assert repeated != training
            setattr(module, name, 0.0)


# ---- tokenizer.py: against official token ids ----------------------------------------------------
@parametrize("source", ["vocab.txt", "tokenizer.json", "."])
def test_token_ids_are_the_official_ones_from_either_file_or_their_folder(tmp_path, source):
    """Even if a tokenizer.json has settings for padding, truncation and other special tokens, which
    transformers saves, or a vocab.txt has a byte order mark and the line ends of Windows."""
    wordpiece = Tokenizer.from_json(golden_tokenizer(tmp_path).to_json()).wordpiece
    wordpiece.enable_padding(length=65)
    wordpiece.enable_truncation(max_length=5)
    wordpiece.post_processor = TemplateProcessing("[UNK] $A", special_tokens=[("[UNK]", 1)])
    windows = "\ufeff" + TEXT["vocab"].replace("\n", "\r\n") + "\r\n\r\n"
    write_files(tmp_path, {"tokenizer.json": wordpiece.to_str(), "vocab.txt": windows})
    tokenizer = Tokenizer.load(tmp_path / source)
    for part in ("train", "eval", "hard"):
        captions = tokenizer(SENTENCES[part])
        expected = golden_captions(part)
        same(captions.ids, expected.ids)
        same(captions.sequences.lengths, expected.sequences.lengths)


def test_captions_are_cleaned_and_truncated_like_the_official_ones():
    cleaned = clean_caption("She (is) YOUNG, o'clock!  With; a hat?\n")
    assert cleaned == "she is young, o'clock with a hat?"
    long = Tokenizer.train(["word"])(["word " * 100])
    assert long.sequences.max_length == 65
    assert long.ids[-1] == 3, "[SEP] is the last token"


def test_vocabulary_contains_all_words_of_its_texts_and_is_the_same_trained_again():
    assert Tokenizer.train(TEXTS).to_json() == TOKENIZER.to_json()
    ids = TOKENIZER(TEXTS).ids
    assert (ids != TOKENIZER.wordpiece.token_to_id("[UNK]")).all()


@parametrize("text, unknown", [
    ("A bald man with red glasses.", ["bald", "red"]),
    ("man/xyz Ω ?", ["xyz", "ω"]),
    ("???, o'clock", []),
    ("a man without glasses", ["without"])])            # with ##o ##u ##t
def test_words_that_are_not_in_the_vocabulary_are_unknown(text, unknown):
    tokenizer = Tokenizer.train(["a man with glasses, o'clock"])
    assert known_and_unknown_words(text, tokenizer)[1] == unknown


def test_vocabulary_has_the_5000_most_frequent_words():
    letters = itertools.product("abcdefghi", repeat=4)
    words = map("".join, itertools.islice(letters, 5001))
    large = Tokenizer.train([*words, "zebra zebra"])
    assert known_and_unknown_words("zebra ghgf", large) == (["zebra"], ["ghgf"])


def test_vocabulary_is_loaded_line_by_line_and_rejected_without_the_special_tokens(tmp_path):
    pieces = [*SPECIAL, "man", "\x85", "\u2028", "x\x0cy"]      # splitlines() would split these
    write_files(tmp_path, {"vocab.txt": "\n".join(pieces)})
    expected = Tokenizer.from_vocabulary(pieces)
    assert Tokenizer.load(tmp_path).to_json() == expected.to_json()

    twice = error_of(Tokenizer.from_vocabulary, [*SPECIAL, "man", "man"])
    assert "it lacks ids without gaps or repetitions" in twice
    without = error_of(Tokenizer.from_vocabulary, ["[PAD]", "[UNK]", "[SEP]", "woman"])
    assert "it lacks [CLS]" in without


# ---- losses.py: against probabilities worked by hand, and those of the official code -------------
def test_least_similar_person_is_a_negative_if_there_is_no_other():
    """Its probability beside the own person's, exp(-2 / 0.001), would be 0."""
    similarity = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    probabilities = hard_negative_probabilities(similarity, torch.tensor([5, 6]), 0.001)
    close(probabilities, 1 - torch.eye(2))


def test_sampling_negatives_names_what_is_wrong_with_the_features():
    features = torch.full((3, 12), torch.nan)
    error = error_of(small_flip().sample_negatives, features, features, torch.arange(3))
    assert "a batch are NaN or infinite: training has diverged" in error


def test_batch_of_one_person_has_no_negatives():
    one_person = torch.tensor([3, 3])
    error = error_of(small_flip().sample_negatives, unit(2, 12), unit(2, 12), one_person)
    assert error.startswith("all pairs of a batch show one person")


def test_hard_negatives_and_their_matching_loss_are_the_official_ones(official):
    captions = golden_captions("hard")
    tokens, features = official.student.image_tokens_and_features(GOLDEN["hard.images"])
    similarity = official.student.text_features(captions) @ features.T
    identity = GOLDEN["hard.pair_ids"]
    likeliest = []
    for cosines, name in ((similarity, "image_of_text"), (similarity.T, "text_of_image")):
        probabilities = hard_negative_probabilities(cosines, identity, official.temperature)
        close(probabilities, GOLDEN[f"hard.probability_{name}"])
        likeliest.append(probabilities.argmax(1))
        same(likeliest[-1], GOLDEN[f"hard.negative_{name}"])
    close(official.itm_loss(tokens, captions, *likeliest), GOLDEN["hard.loss_itm"])


# ---- flip.py: against official activations, losses, gradients and ten steps in golden.npz --------
@parametrize("first", ["enc", "cls"])
def test_activations_are_the_official_ones_also_for_first_tokens_alone(official, first):
    student = official.eval().student
    images = GOLDEN["eval.images"]
    captions = golden_captions("eval")
    tokens, hidden = student.image(images, return_hidden=True)
    close(tokens, GOLDEN["eval.image_tokens"])
    for layer in range(3):
        close(hidden[layer], GOLDEN[f"eval.hidden.layer_{layer}"])
    _, features = student.image_tokens_and_features(images)
    close(features, GOLDEN["eval.image_feat"])
    close(student.image_features(images), GOLDEN["eval.image_feat"])
    close(student.text_features(captions), GOLDEN["eval.text_feat"])

    present = GOLDEN["eval.attention_mask"].bool()
    close(student.text(captions), GOLDEN["eval.text_tokens"][present])
    token = {"enc": student.text.enc_id, "cls": 2}[first]
    queries = captions.with_first_token(token)
    joint = student.text(queries, tokens)
    close(joint, GOLDEN[f"eval.joint_tokens_{first}"][present])
    for firsts in (joint[captions.sequences.first_token_indices],
                   student.text(queries, tokens, first_token_only=True)):
        close(official.matching_head(firsts), GOLDEN[f"eval.itm_logits_{first}"])


def official_step(model, part, identity, index=..., device="cpu"):
    """The momentum update, gradients and new keys of a step, whose losses are the recorded ones."""
    model.update_momentum(0.995)
    images = GOLDEN[f"{part}.images"][index].to(device)
    captions = golden_captions(part, index).to(device)
    params = StepParams(GOLDEN[f"{part}.alpha"][index].item())
    out = model(images, captions, identity.to(device), params)
    close(out.itc.cpu(), GOLDEN[f"{part}.loss_itc"][index])
    close(out.itm.cpu(), GOLDEN[f"{part}.loss_itm"][index])
    model.zero_grad()
    (out.itc + out.itm).backward()
    model.enqueue(out.image_keys, out.text_keys, out.identity)


def test_training_step_has_the_official_losses_gradients_queue_and_momentum_weights(
        official, device):
    official.to(device).train()
    official_step(official, "train", GOLDEN["train.pair_ids"], device=device)
    trained = {official_name(name): p for name, p in trained_parameters(official).items()}
    norms = recorded("train.grad_norm.")
    assert trained.keys() == norms.keys()
    for name, p in trained.items():
        expected = pytest.approx(norms[name].item(), rel=1e-5, abs=1e-6)
        assert p.grad.norm().item() == expected, name
    for name, gradient in recorded("train.grad.").items():
        close(trained[name].grad.cpu(), gradient, 1e-5 * norms[name].item())
    state = official_state(official.cpu())
    for name, expected in recorded("after_step.").items():
        close(state[name], expected, 1e-6)


@parametrize(
    "device", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_ten_steps_with_a_wrapping_queue_end_with_the_official_weights(official, device):
    official.to(device).train()
    trained = trained_parameters(official).values()
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    for i in range(10):
        official_step(official, "run", torch.tensor([2 * i, 2 * i + 1]), i, device)
        optimizer.step()
        official.clamp_temperature()
    state = official_state(official.cpu())
    for name, expected in recorded("run.final.").items():
        close(state[name], expected)


@parametrize("k, suffix", [(3, "_k"), (256, "")])
def test_reranked_scores_are_the_official_ones_and_the_rest_rank_by_cosine(
        official, monkeypatch, k, suffix):
    """With [CLS] in place of [ENC], as in the official code."""
    monkeypatch.setattr(Captions, "with_first_token", lambda captions, token: captions)
    student = official.eval().student
    captions = golden_captions("eval")
    tokens, features = student.image_tokens_and_features(GOLDEN["eval.images"])
    similarity = (features @ student.text_features(captions).T).detach()
    scores = rerank(official, tokens, captions, similarity, k)
    for actual, cosine, name in zip(scores, (similarity, similarity.T), ("i2t", "t2i")):
        theirs = GOLDEN[f"eval.score_{name}{suffix}"]
        rest = theirs == -100                                       # not re-ranked
        close(actual[~rest], theirs[~rest])
        if rest.any():
            steps = (actual - cosine)[rest].diff()
            close(steps, torch.zeros_like(steps))
            assert actual[rest].max() < theirs[~rest].min()
    if not suffix:
        theirs = json.loads(TEXT["retrieval_metrics"])
        assert evaluation.retrieval_metrics(*scores, torch.arange(8)) == pytest.approx(theirs)


def test_perfect_matching_head_ranks_by_the_probability_of_the_pair():
    """At any cosines: the score corrects for the sampling of the negatives."""
    model = FLIP(replace(GOLDEN_CONFIG, rerank_by_pmi=True))
    truth = torch.rand(5, 5)
    cosine = torch.rand(5, 5) * 2 - 1
    sampled = hard_negative_probabilities(cosine, torch.arange(5), model.temperature)
    log_odds = (truth / sampled).log()
    shift = torch.randn(5, 5)
    score = model.rerank_score(torch.stack([shift, shift + log_odds], -1), cosine)
    itm = 2 * score - cosine / model.temperature        # the score is the mean of ITC's and ITM's
    is_sampled = ~torch.eye(5).bool()       # a pair is never sampled as its own negative
    difference = (itm - truth.log())[is_sampled].view(5, 4)
    close(difference, difference[:, :1].expand(5, 4), 1e-4)


def test_batch_larger_than_the_rest_of_the_queue_wraps():
    model = small_flip(queue_size=5)
    for first in (0, 3, 6):
        ids = torch.arange(first, first + 3)
        keys = ids[:, None].expand(3, 12).float()
        model.enqueue(keys, -keys, ids)
    assert model.queue_identity.tolist() == [5, 6, 7, 8, 4]
    assert model.image_queue[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert model.text_queue[:, 3].tolist() == [-5, -6, -7, -8, -4]


@parametrize("backend", [
    "eager",
    pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_encoders_compute_the_same_losses_and_gradients(backend, monkeypatch):
    model = small_flip()
    trained = list(trained_parameters(model).values())
    images = GOLDEN["eval.images"]
    captions = golden_captions("eval")

    def loss_and_gradients():
        generator = torch.Generator().manual_seed(0)
        out = model(images, captions, torch.arange(len(images)), StepParams(), generator)
        return with_gradients(out.itc + out.itm, trained)
    expected = loss_and_gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_block = partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compile_block)
    runs.compile_encoders(model)
    for actual, wanted in zip(loss_and_gradients(), expected):
        size = wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * size + 1e-7)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < compiled < 20, "few graphs serve all blocks"


def test_negatives_are_sampled_with_their_probabilities():
    model = small_flip()
    model.temperature.data.fill_(0.5)
    generator = torch.Generator().manual_seed(0)
    images = unit(4, 12)
    texts = unit(4, 12)
    identity = torch.tensor([1, 2, 1, 3])
    samples = [model.sample_negatives(images, texts, identity, generator) for _ in range(3000)]
    sampled_images, sampled_texts = map(torch.stack, zip(*samples))             # (3000, 4)
    similarity = images @ texts.T
    for sampled, cosines in ((sampled_images, similarity.T), (sampled_texts, similarity)):
        frequency = F.one_hot(sampled, 4).float().mean(0)
        close(frequency, hard_negative_probabilities(cosines, identity, 0.5), 0.03)


@pytest.fixture
def pictures(tmp_path):
    """Five drawn faces, which are also in the files `paths`."""
    faces = data.load_toy_faces(5, 48, 3, "drawn")
    pictures = [faces.picture(i) for i in range(5)]
    write_files(tmp_path, {f"{i}.png": picture for i, picture in enumerate(pictures)})
    return pictures


@pytest.fixture
def paths(pictures, tmp_path):
    return [f"{tmp_path}/{i}.png" for i in range(5)]


@pytest.fixture
def features(model, paths, tmp_path, monkeypatch):
    """The features of the drawn faces; they and the search are in float32 on every CPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    return search.encode_folder(model, tmp_path, "features")


def test_similarity_and_match_probability_are_those_of_itc_and_itm(model, pictures, paths):
    texts = ["a smiling woman", "a man"]
    tokens, features = model.student.image_tokens_and_features(
        normalize_batch([np.asarray(picture) for picture in pictures]))
    expected = features @ model.student.text_features(model.tokenizer(texts)).T
    cosines = cosines_of(model, paths * 30, texts)                      # more than one batch
    assert not cosines.requires_grad
    close(cosines, expected.repeat(30, 1), 1e-6)

    of_text = [model.itm_logits(tokens, model.tokenizer([text] * 5)) for text in texts]
    logits = torch.stack(of_text, 1)                                    # (5, 2, 2)
    close(model.match_probability(paths, texts), logits.softmax(-1)[..., 1])
    close(model.score(paths, texts), model.rerank_score(logits, expected), 1e-4)


def test_words_that_a_model_does_not_know_are_named(model):
    with pytest.warns(UserWarning, match="vocabulary: smiles, xyz$"):
        model.encode_text("a man, he smiles, xyz")


def test_images_and_texts_of_every_kind_have_the_same_features_in_any_batches(
        model, pictures, paths):
    pixels = torch.stack([model.preprocess(path) for path in paths])
    expected = model.encode_image(paths)
    array = np.array(pictures[0])
    for images in (pictures, pixels, [*pixels], [Path(paths[0]), *pictures[1:]],
                   [array, *paths[1:]]):
        same(model.encode_image(images), expected)
    for image in (pictures[3], pixels[3], paths[3], np.array(pictures[3])):
        close(model.encode_image(image)[0], expected[3], 1e-6)
    assert "found torch.uint8" in error_of(model.encode_image, torch.from_numpy(array)[None])
    assert "missing.png cannot be read" in error_of(model.encode_image, [paths[0], "missing.png"])

    texts = ["a man", "a smiling woman", "an old man"]
    same(model.encode_text(model.tokenizer(texts)), model.encode_text(texts))
    close(model.encode_text(model.tokenizer(texts[0])), model.encode_text(texts)[:1], 1e-6)


def test_probabilities_are_clips_softmax_over_the_texts(model, paths):
    texts = ["a man", "a smiling woman", "an old man"]
    logit_scale = -model.temperature.log()
    expected = (logit_scale.exp() * cosines_of(model, paths, texts)).softmax(1)
    close(model.classify(paths, texts), expected)


@parametrize("dtype, tolerance", [
    (torch.bfloat16, 2e-2),
    (torch.float16, 5e-3),
    (torch.float64, 1e-6)])
def test_models_of_other_precision_agree_with_float32(
        model, uninterrupted, pictures, tmp_path, monkeypatch, dtype, tolerance):
    """Also in a search, whose autocast is for float32 models."""
    texts = ["a man", "a smiling woman"]
    other = FLIP.from_pretrained(uninterrupted, dtype=dtype)
    close(cosines_of(other, pictures, texts), cosines_of(model, pictures, texts), tolerance)
    close(other.score(pictures, texts), model.score(pictures, texts), 3 * tolerance)

    def search_with(model, capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        features = search.encode_folder(model, tmp_path, "features")
        return sorted(search.search(model, features, "a man", ["glasses"]))
    for ours, expected in zip(search_with(other, {"amx_bf16": True}), search_with(model, {})):
        assert ours.path == expected.path
        assert ours[1:] == pytest.approx(expected[1:], abs=3 * tolerance)


@parametrize("flag, expected", [
    ("avx512_bf16", "bf16"),
    ("amx_bf16", "bf16"),
    ("", "float32")])
def test_auto_precision_is_bf16_on_fast_cpus_and_stays_the_same(
        quick, monkeypatch, flag, expected):
    """Also if the run is resumed on a CPU with other capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto").type == "cpu"

    def start_and_save(config, flag):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
        with open_run(config) as run:
            assert run.config.precision == expected
            assert run.log.lines[0]["config"]["precision"] == expected
            runs.save(run)
    start_and_save(quick(precision="auto"), flag)
    start_and_save(parse_flags("--resume", "--out", "out"), "amx_bf16")


# ---- captions.py: against the inverse of the grammar, simulation, and cases worked by hand -------
@functools.cache
def fact_patterns():
    """A regular expression per fact that matches its phrases: the inverse of the grammar."""
    phrases_of = {}                         # {fact: [kind, words] of its phrases}
    words_of = {}                           # {kind of phrase: all words of that kind}
    for fact, (_, phrases) in GRAMMAR.items():
        phrases_of[fact] = [phrase.split(" ", 1) for phrase in phrases.split(" | ")]
        for kind, words in phrases_of[fact]:
            words_of.setdefault(kind, []).append(words)
    pronouns = {"Male": ["he", "his", "boy"], "not Male": ["she", "her", "girl"]}
    patterns = []
    for fact, phrases in phrases_of.items():
        alternatives = pronouns.get(fact, [])
        for kind, words in phrases:
            words = words.replace("{his}", "(?:his|her|their)")
            others = "|".join(words_of[kind])
            if kind in grammar.FACE_PARTS:
                alternatives.append(rf"{words},? (?:(?:{others}),? )*{kind}")
                alternatives.append(rf"{kind} (?:is|are) (?:(?:{others}) and )*{words}")
            else:
                alternatives.append(words)
        patterns.append(re.compile(rf"\b(?:{'|'.join(alternatives)})\b"))
    return patterns


def facts_in(texts):
    """Which facts each text states, (T, 43) bool."""
    texts = [text.lower() for text in texts]
    found = [[bool(pattern.search(text)) for text in texts] for pattern in fact_patterns()]
    return np.array(found).T


def test_captions_state_the_facts_they_report_and_no_others():
    rng = default_rng(1)
    faces = np.vstack([random_faces(3000), np.ones(40, dtype=bool)])
    texts, stated = zip(*(sample_caption(attributes, rng) for attributes in faces))
    stated = np.stack(stated)
    assert_array_equal(facts_in(texts), stated)

    stated = stated[-300:]
    faces = faces[-300:]
    negatable = [ATTRIBUTES.index(name) for name in ("Male", "Young", "No_Beard")]
    facts = np.hstack([faces, ~faces[:, negatable]])                # (300, 43)
    fits = (facts | ~stated[:, None]).all(2)                        # fact by fact
    assert fits.diagonal().all()
    assert_array_equal(optimum.satisfies(stated, faces), fits)
    assert_array_equal(np.isfinite(optimum.log_likelihood(stated, faces)), fits)


def at_least(count, probabilities):
    """P(at least `count` of independent events happen), from the polynomial of their number."""
    counts = functools.reduce(np.convolve, [(1 - p, p) for p in probabilities], [1.0])
    return counts[count:].sum()


def test_captions_to_evaluate_on_state_each_fact_as_often_as_the_grammar_says():
    """Alone and given any other attribute: captions have random numbers of their own."""
    attributes = [toyfaces.sample_attributes(random_stream("face", 1, i)) for i in range(1000)]
    numbers = range(1000)
    faces = data.Faces("drawn faces (seed 1)", numbers, numbers, np.array(attributes))
    facts = grammar.facts_of(faces.attributes)                                  # (1000, 43)

    expected = np.zeros(facts.shape)        # P(stated | face): at least MIN_FACTS facts are stated
    for i, own in enumerate(map(np.flatnonzero, facts)):
        assert len(own) >= MIN_FACTS
        p = PROBABILITIES[own]
        enough = at_least(MIN_FACTS, p)
        for j, fact in enumerate(own):
            enough_others = at_least(MIN_FACTS - 1, np.delete(p, j))
            expected[i, fact] = p[j] * enough_others / enough

    stated = facts_in(EvaluationSet.from_faces(faces).texts)
    for fact, true in enumerate(facts.T):
        for given in (true, *(true & faces.attributes.T)):
            p = expected[given, fact]
            deviation = (p * (1 - p)).sum() ** 0.5
            count = stated[given, fact].sum()
            assert abs(count - p.sum()) < max(4 * deviation, 5), FACTS[fact]


def test_seeds_of_random_streams_are_hashes_of_purpose_and_numbers():
    seed = int(hashlib.sha256(b"face/1/0").hexdigest()[:16], 16) >> 1
    assert derive_seed("face", 1, np.int64(0)) == seed
    assert random_stream("face", 1, 0).random() == default_rng(seed).random()


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def test_captions_and_recipes_are_those_that_all_figures_were_measured_with():
    """Whatever changes them changes these hashes: measure all figures anew, then update them."""
    texts = [*EvaluationSet.from_faces(noise_faces()).texts]
    for seed in range(400):
        rng = grammar.random.Random(seed)
        facts = sorted(rng.sample(range(43), 1 + seed % 12))
        texts.append(grammar.verbalize([FACTS[fact] for fact in facts], rng))
    assert hash_of("\n".join(texts)) == "be1cdba5e954"
    recipes = [train_config.TINY, train_config.RECIPES["tiny"], train_config.TASK_RECIPES,
               train_config.DRAWN_RECIPES, PROBABILITIES.tolist()]
    assert hash_of(repr(recipes)) == "2146a89192e1"


@parametrize("names", ["Male Young", "Male Smiling Bald", "Bangs Blond_Hair Young"])
def test_log_likelihood_matches_simulated_frequencies(names):
    """The probabilities of all that captions of a face can state sum to 1 and match frequencies."""
    attributes = attributes_of(names)
    rng = default_rng(0)
    samples = [sample_caption(attributes, rng)[1] for _ in range(20_000)]
    stated, counts = np.unique(samples, axis=0, return_counts=True)
    expected = np.exp(optimum.log_likelihood(stated, attributes[None]))[:, 0]
    observed = counts / 20_000
    assert abs(expected.sum() - 1) < 1e-3
    assert (abs(observed - expected) < 4.5 * np.sqrt(expected / 20_000)).all()


def test_expected_recall_breaks_ties_at_random():
    scores = np.array([[0., 0, 0, 0], [2, 1, 1, 0], [3, 2, 1, 3], [0, 0, 0, 1]])
    recall = optimum.expected_recall(scores, k=(1, 2))
    first = (1/4 + 0 + 0 + 1) / 4
    second = (2/4 + 1/2 + 0 + 1) / 4
    assert recall == pytest.approx([100 * first, 100 * second])


def test_reference_recall_matches_two_faces_worked_by_hand():
    """"A bald young man" fits one of them, "a young man" both, but does not mention baldness."""
    faces = np.stack([attributes_of("Male Young Bald"), attributes_of("Male Young")])
    stated = [np.isin(FACTS, ["Male", "Young", "Bald"]), np.isin(FACTS, ["Male", "Young"])]
    references = optimum.reference_recall(np.stack(stated), faces)
    of_text = 100 * (1 + 1 / 2) / 2
    of_image = 100 * 3 / 4
    assert references == {
        "attribute match": [of_text, 100, 100, of_image, 100, 100],
        "Bayes optimum": [100] * 6}


def test_ideal_contrastive_loss_is_the_cross_entropy_of_log_likelihood_ratios():
    """The mean over whole batches; P(stated) is a mean over the batch and the population."""
    faces = random_faces(150, seed=1)
    population = random_faces(3000, seed=2)
    _, stated = sample_captions(faces)

    def loss_of(start):
        batch = slice(start, start + 64)
        everyone = np.concatenate([faces[batch], population])
        log_p = torch.from_numpy(optimum.log_likelihood(stated[batch], everyone))
        ratios = (log_p - log_p.logsumexp(1, keepdim=True))[:, :64]
        own = torch.arange(64)
        return F.cross_entropy(ratios, own) / 2 + F.cross_entropy(ratios.T, own) / 2
    expected = (loss_of(0) + loss_of(64)) / 2
    ideal = optimum.ideal_contrastive_loss(stated, faces, population, batch_size=64)
    assert ideal == pytest.approx(expected.item())


def test_ideal_loss_is_known_for_drawn_faces_and_whole_batches():
    def ideal(*training):
        return EvaluationSet.from_faces(noise_faces(80), *training).ideal_itc
    assert 0 < ideal(noise_faces(), 40) < ideal(noise_faces(), 80)
    assert ideal(noise_faces(), 81) is None
    captioned = replace(noise_faces(), captions=[["a man"]] * 20)
    assert ideal(captioned, 40) is None
    assert ideal() is None
    assert EvaluationSet.from_faces(noise_faces(80)).references == {}, "of no use in finetune.py"


# ---- drawing/, toyfaces.py: against edges of the drawn images ------------------------------------
def test_sketch_grows_by_equal_amounts_of_ink_and_never_loses_any():
    for i in range(20):
        frames = toyfaces.sketch(i, seed=3, size=48)
        assert (frames[1:] >= frames[:-1]).all()
        ink = frames.sum((1, 2)) / frames[-1].sum()
        # a short line has round ends, a long one crosses others
        assert 0.5 / 70 < ink[0] < 2.5 / 70
        assert np.abs(ink - np.arange(1, 71) / 70).max() < 0.15


def test_neighbouring_points_of_a_stroke_touch_and_a_tilted_head_keeps_its_shape():
    look, shapes = portrait.build_shapes(np.zeros(40, bool), default_rng(0))
    points, lengths = toyfaces.stroke_points(look, shapes)
    between = (lengths[1:] + lengths[:-1]) / 2
    touching = np.isclose(np.abs(np.diff(points)), between, rtol=0.01)
    assert touching.mean() > 0.9                # the others are ends of lines

    head = [shape for shape in shapes if shape.part not in portrait.BODY]
    sides = []
    for look.roll in (0.0, 0.3):
        outlines = portrait.project_outlines(look, head, 1, 1)
        sides.append(np.abs(np.diff(np.concatenate(outlines))))
    assert np.allclose(*sides)


def test_sketch_lines_are_on_the_edges_of_their_own_image():
    def edges(i):
        """(96, 96) bool: some colour differs within one pixel."""
        image, _ = toyfaces.face(i, seed=2, size=96)
        highest = image.filter(ImageFilter.MaxFilter(3))
        lowest = image.filter(ImageFilter.MinFilter(3))
        return np.subtract(highest, lowest).max(-1) > 12

    blurry = ATTRIBUTES.index("Blurry")
    sharp = [i for i in range(40) if not toyfaces.face(i, 2, 8)[1][blurry]]
    all_edges = [edges(i) for i in sharp]
    inked = [toyfaces.sketch(i, seed=2, size=96, stages=1)[0] > 128 for i in sharp]
    own = [edge[ink].mean() for edge, ink in zip(all_edges, inked)]
    others = [edge[ink].mean() for edge, ink in zip(all_edges[1:], inked)]
    assert min(own) > 0.9
    assert np.mean(own) > 0.97
    assert np.mean(others) < 0.65


@parametrize("count, sizes", [(20, [16, 2, 2]), (3, [1, 1, 1])])
def test_written_faces_open_as_celeba_with_their_splits_attributes_and_pixels(
        tmp_path, count, sizes):
    toyfaces.write_faces(tmp_path, count, size=24, seed=3)
    splits = open_splits(tmp_path)
    assert [len(split) for split in splits] == sizes
    number = 0
    for split in splits:
        for i in range(len(split)):
            image, attributes = toyfaces.face(number, 3, 24)
            number += 1
            assert split.images[i].name == f"{number:06}.png"
            assert_array_equal(split.attributes[i], attributes)
            assert_array_equal(split.picture(i), image)


def test_faces_are_drawn_three_times_as_large_and_reduced():
    rng = random_stream("face", 3, 5)
    attributes = toyfaces.sample_attributes(rng)
    look, shapes = portrait.build_shapes(attributes, rng)
    assert toyfaces.face(5, 3, 48)[0] == portrait.render(look, shapes, 144).reduce(3)


def test_drawn_faces_have_images_attributes_and_sketches(tmp_path):
    faces = data.load_toy_faces(5, 24, 3, tmp_path, stages=6)
    image, attributes = toyfaces.face(4, 3, 24)
    assert_array_equal(faces.images[4], image)
    assert_array_equal(faces.attributes[4], attributes)
    assert_array_equal(faces.sketches[2], toyfaces.sketch(2, 3, 24, 6))
    sketch = np.array(faces.subset([2]).sketch(0, 5))
    assert (sketch == 255 - faces.sketches[2, 5][..., None]).all(), "of equal red, green and blue"


def test_drawn_faces_are_cached(tmp_path, monkeypatch):
    load = partial(data.load_toy_faces, 5, 24, 3, tmp_path, stages=6)
    faces = load()
    images = np.array(faces.images)
    [path] = tmp_path.iterdir()
    assert faces.digest == path.name
    monkeypatch.setattr(toyfaces, "face", lambda *_: pytest.fail("drawn again"))
    assert_array_equal(load().images, images)
    for damaged in (path.read_bytes()[:-9], b"", b"x"):
        path.unlink()                       # it is memory-mapped
        path.write_bytes(damaged)
        with pytest.raises((ValueError, EOFError)) as raised:
            load()
        assert raised.value.__notes__ == [f"in {path}"]


# ---- readers/: against data sets written by the tests in every layout ----------------------------
def open_splits(folder):
    return [open_faces(folder, split) for split in ("train", "val", "test")]


def image_names(faces):
    return [path.stem for path in faces.images]


def assert_disjoint(parts, count):
    """The parts have no element in common, and `count` elements together."""
    parts = [set(part) for part in parts]
    assert sum(map(len, parts)) == count
    assert len(set.union(*parts)) == count


def record(image, caption="a face", **more):
    """A record of a caption list, of an image with this number or name."""
    return {"image": f"{image}.png", "caption": caption} | more


def records_of(persons):
    """A record per image, of the person with this image_id."""
    return [record(i, image_id=person) for i, person in enumerate(persons)]


PAIRS = [record(i, [f"face {i}", f"the face {i}"], image_id="ab"[i // 2]) for i in range(4)]


def write_captions(folder, records=PAIRS, name="train.json", count=4):
    """A caption list, beside an image folder of `count` grey images."""
    images = grey_images(f"images/{i}.png" for i in range(count))
    return write_files(folder, images | {name: records})


def encoded(image, format="png"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def write_members(tar, members, format=tarfile.PAX_FORMAT):
    """A tar of {name: content}, without names whose content is empty; returns its `TarInfo`s."""
    with tarfile.open(tar, "w", format=format) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if content:
                file.addfile(info, io.BytesIO(content))
    with tarfile.open(tar) as file:
        return file.getmembers()


GRADIENT = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)


def write_tar(folder, members={}, records=60, name="00000", **changes):
    """img2dataset's tar of records, two with each URL; `changes` are for record 3, `members` for
    the tar."""
    image = encoded(Image.fromarray(GRADIENT).convert("RGB"))
    files = {}
    for i in range(records):
        fields = {
            "status": "success",
            "caption": [f"face {i}", f"the face {i}"],
            "pcfg": f"a face, {i}",
            "box": f"[0, {i % 4}, 30, 20]",
            "url": f"http://{i // 2}"}
        if i == 3:
            fields |= changes
        files[f"{i:09d}.jpg"] = image
        files[f"{i:09d}.txt"] = b"x"
        files[f"{i:09d}.json"] = json.dumps(fields).encode()
    folder.mkdir(exist_ok=True)
    write_members(folder / f"{name}.tar", files | members)
    return write_files(folder, {f"{name}_stats.json": {"successes": records}})


@parametrize("write, name, change", [
    (write_tar, "00000.tar", lambda path: os.utime(path, (1, 1))),          # a copy that looks old
    (write_tar, "00000.tar", lambda path: path.rename(path.with_name("a.tar"))),
    (write_captions, "val.json", Path.touch),
    (write_captions, "images/a/b", partial(Path.mkdir, parents=True)),
    (write_celeba, "img_align_celeba/000003.jpg", Path.unlink)])
def test_data_set_is_indexed_once_until_a_file_changes_or_with_other_columns(
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


@parametrize("suffix", ["npy", "jsonl"])
def test_damaged_index_is_named(tmp_path, suffix):
    open_faces(write_captions(tmp_path))
    [path] = (tmp_path / "cache").glob(f"*.{suffix}")
    content = path.read_bytes()
    path.unlink()                           # it is memory-mapped
    path.write_bytes(content[:-1])
    assert f"in {path.with_suffix('.npy')}" in error_of(open_faces, tmp_path)


def test_a_million_faces_are_reopened_without_reading_them(tmp_path, monkeypatch):
    line = b'{"images":"images/0.png","captions":["a face"]}\n'
    rows = np.zeros(1_000_000, index.ROW)
    rows["attributes"] = index.NONE
    rows["length"] = len(line)
    rows["person"] = np.arange(len(rows))
    monkeypatch.setattr(index, "index_records", lambda *_: (rows, line * len(rows), []))
    open_faces(write_captions(tmp_path))
    tracemalloc.start()
    faces = open_faces(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6, "bytes of memory"
    assert len(faces) == 1_000_000
    assert faces.captions[-1] == ["a face"]


def test_tars_are_read_in_place_cropped_to_the_box_and_split_by_url(tmp_path, printed):
    write_tar(tmp_path / "part", {"000000003.jpg": b""}, 200)
    (tmp_path / "loop").symlink_to(tmp_path)                # is followed, but each tar is read once
    splits = open_splits(tmp_path)
    output = printed()
    assert "train: 1 of 188 are invalid and left out:\n" in output
    assert "part/00000.tar: '000000003': no image\n" in output

    numbers = []
    for faces in splits:
        own = [int(image.name.removesuffix(".jpg")) for image in faces.images]
        assert [*faces.captions] == [[f"face {n}", f"the face {n}"] for n in own]
        numbers.append(np.array(own))
    assert sorted(np.concatenate(numbers)) == [n for n in range(200) if n != 3]
    assert_disjoint([own // 2 for own in numbers], 100)
    shifted = [*numbers[0] % 4].index(2)                    # its box is 2 pixels lower
    assert_array_equal(np.asarray(splits[0].picture(shifted))[..., 0], GRADIENT[2:20, :30])


def test_captions_of_several_columns_are_joined(tmp_path):
    faces = open_faces(write_tar(tmp_path), columns=("caption", "pcfg"))
    assert faces.captions[0] == ["face 0", "the face 0", "a face, 0"]


def stored_by_img2dataset(image, mode):
    """keep_ratio makes the shorter side 256 pixels, border the longer one, and pads with white."""
    if mode == "keep_ratio":
        return ImageOps.cover(image, (256, 256), Image.Resampling.BOX)
    if mode == "border":
        return ImageOps.pad(image, (256, 256), Image.Resampling.BOX, "white")
    return image


@parametrize("mode", ["no", "keep_ratio", "border"])
def test_boxes_are_mapped_to_the_stored_image_for_every_resize_mode_of_img2dataset(mode):
    rng = default_rng(0)
    members = {}
    sizes = 5 * [(1024, 700), (640, 1000), (512, 512), (200, 150), (513, 512)]
    for i, (width, height) in enumerate(sizes):
        shares = rng.uniform([0.3, 0.3, 0.2, 0.2], 0.4)
        w, h, x, y = (min(width, height) * shares).astype(int).tolist()
        box = [x, y, x + w, y + h]
        image = plain((0, 0, 200), (width, height))
        image.paste((200, 0, 0), box)                               # the face is red
        size = {"original_width": width, "original_height": height}
        record = {"caption": "a face", "box": box} | size
        members[f"{i:09d}.jpg"] = encoded(stored_by_img2dataset(image, mode))
        members[f"{i:09d}.json"] = json.dumps(record).encode()
    write_members("00000.tar", members)

    for crop in open_faces(".").images:
        whole = np.asarray(crop._replace(box=()).open())
        is_face = (whole[..., 0] > 100) & (whole[..., 2] < 100)
        true = Image.fromarray(is_face).getbbox()
        assert np.abs(np.subtract(crop.box, true)).max() <= 1, (crop, true)


def read_tars():
    """({name: (captions, size of the face, colour of its first pixel)}, messages) of all tars."""
    folder = Path()
    faces = {}
    invalid = []
    for path in layouts.find_tars(folder):
        _, lines, errors = index.index_records(layouts.read_tar, ("",), folder, ("caption",), path)
        invalid += [message for _, message in errors]
        for line in lines.splitlines():
            record = json.loads(line)
            tar, name, *place = record["images"]
            face = TarImage(folder / tar, name, *place).open()
            faces[name] = record["captions"], face.size, face.getpixel((0, 0))
    return faces, invalid


# names as long as the formats allow: members of GNU and PAX then have several headers
LONG = [20, 98, 99, 100, 101, 155, 200, 300, 97]
LENGTHS = {
    tarfile.USTAR_FORMAT: [20, 98, 99, 100, 101, 155, 97],
    tarfile.GNU_FORMAT: LONG,
    tarfile.PAX_FORMAT: LONG}


def long_named_faces(format):
    """The files of a tar, two of each face, and what `read_tars` must find in it."""
    files = {}
    truth = {}
    for n, length in enumerate(LENGTHS[format]):
        name = f"{n}{'d' * (length // 2)}/".ljust(length - 4, "x")
        files[f"{name}.png"] = encoded(plain((n, 0, 0), (4, 5)))
        files[f"{name}.txt"] = f"face {n}".encode()
        truth[f"{name}.png"] = [f"face {n}"], (4, 5), (n, 0, 0)
    return files, truth


@parametrize("format", LENGTHS)
def test_tars_of_every_format_are_read_also_joined_ones(format):
    files, truth = long_named_faces(format)
    members = [*files.items()]
    write_members("first", dict(members[:-4]), format)
    write_members("second", dict(members[-4:]), format)
    joined = Path("first").read_bytes() + Path("second").read_bytes()
    Path("0.tar").write_bytes(joined)
    assert read_tars() == (truth, [])


def damages(infos, end):
    """Yield which bytes of a tar are damaged, from where to where, and what is there instead."""
    contents = infos[-1].offset_data + 512
    for cut in range(0, contents, 300):
        yield cut, end, b""
    for info in infos:
        header = info.offset_data - 512
        yield header, info.offset_data, b"x" * 512
        yield header, info.offset_data, bytes(512)
    face = infos[4].offset
    next_face = infos[6].offset
    yield 0, infos[0].offset_data, bytes(infos[0].offset_data)          # all headers of a name
    yield face, next_face, b"x" * (next_face - face)                    # all of a face
    yield face, face, b"x" * 256                                        # inserted
    yield end, end, b"x" * 256                                          # appended
    yield 0, end, b"x" * 9999                                           # no tar at all


@parametrize("format", LENGTHS)
def test_damaged_tar_is_named_and_its_other_faces_are_read(printed, format):
    files, truth = long_named_faces(format)
    path = Path("0.tar")
    infos = write_members(path, files, format)
    whole = path.read_bytes()
    for first, stop, new in damages(infos, len(whole)):
        path.write_bytes(whole[:first] + new + whole[stop:])
        faces, invalid = read_tars()
        assert faces.items() <= truth.items()
        message = f"0.tar is damaged, cut off, compressed or missing: found {len(faces)} faces, "
        assert message in printed(), (first, stop)
        assert message in invalid[-1], (first, stop)


JPEG = encoded(plain(size=(6, 7)), "jpeg")


def test_any_webdataset_is_read_with_its_captions_from_txt():
    members = {".hidden.jpg": b"?", "README": b"?"}
    expected = {}
    for name in ("a/0.jpg", "a/1.JPEG", "./b.d/2.png", "3.webp"):
        key, _, format = name.rpartition(".")
        members[name] = encoded(plain(size=(6, 7)), format.replace("jpg", "jpeg"))
        members[f"{key}.txt"] = f"\ufeffface {key}\n".encode()
        members[f"{key}.seg.png"] = b"?"
        members[f"{key}.npy"] = b"?"
        expected[name] = [f"face {key}"], (6, 7), (0, 0, 0)
    write_members("0.tar", members)
    assert read_tars() == (expected, [])


def test_captions_of_a_webdataset_are_read_from_json_and_txt_and_missing_files_are_named():
    write_members("0.tar", {
        "0.jpg": JPEG, "0.txt": b"of txt", "0.json": b'{"box": [0, 0, 3, 3]}',
        "1.jpg": JPEG, "1.json": b"{}",
        "2.jpg": JPEG, "2.txt": b"of txt"})
    faces, invalid = read_tars()
    assert faces == {"0.jpg": (["of txt"], (3, 3), (0, 0, 0))}
    assert "1.jpg: expected text in caption, found []" in invalid[0]
    assert "'2': no .json" in invalid[1]

    write_members("0.tar", {
        "0.jpg": JPEG, "0.txt": b"a face",
        "4.txt": b"no image",
        "5.jpg": JPEG,
        "6.2.jpg": JPEG})
    faces, invalid = read_tars()
    assert [*faces] == ["0.jpg"]
    assert sorted(error.partition("0.tar: ")[2] for error in invalid) == [
        "'4': no image", "'5': no .txt", "'6': no image"]


def test_faces_of_tars_without_urls_are_split_by_their_key_in_whichever_tar():
    members = {}
    for i in range(100):
        members |= {f"{i}.jpg": JPEG, f"{i}.txt": b"a face"}
    write_members("0.tar", members)
    write_members("1.tar", members)
    splits = []
    for faces in open_splits("."):
        splits.append(Counter(image.name for image in faces.images))
        assert {*splits[-1].values()} == {2}
    assert_disjoint(splits, 100)


def test_caption_list_is_read_with_identities(tmp_path):
    faces = open_faces(write_captions(tmp_path))
    assert image_names(faces) == ["0", "1", "2", "3"]
    first, second, third, fourth = faces.identity
    assert first == second != third == fourth
    assert faces.captions[3] == ["face 3", "the face 3"]
    assert faces.picture(1).getpixel((0, 0)) == (1, 1, 1)
    sampled = {faces.caption(1, default_rng(seed)) for seed in range(20)}
    assert sampled == {"face 1", "the face 1"}
    assert list(faces.subset([3, 1]).captions) == [faces.captions[3], faces.captions[1]]


def test_images_without_an_id_are_of_different_persons_and_facecaptions_key_is_read(tmp_path):
    ids = [None, math.nan, math.nan, ""]
    records = records_of(ids)
    for each in records:
        each["face_caption"] = each.pop("caption")
    faces = open_faces(write_captions(tmp_path, records))
    assert list(faces.captions) == [["a face"]] * 4
    assert len(set(faces.identity)) == 4


def test_image_is_known_by_its_normalised_name_below_the_folder_and_empty_captions_are_dropped(
        tmp_path):
    folder = tmp_path / "set"
    captions = {
        "0.png": "a",
        "./1.png": ["", "b", None, " .", "c"],
        "images/../link/2.png": ["d", ""],
        f"{folder}/images/./3.png": "e",
        "images//0.png": "a second caption"}
    records = [{"image": name, "caption": caption} for name, caption in captions.items()]
    write_captions(folder, records)
    write_files(tmp_path, grey_images(["2.png"]))
    (folder / "link").symlink_to(tmp_path)
    faces = open_faces(folder)
    assert [str(path.relative_to(folder)) for path in faces.images] == [
        "images/0.png", "images/1.png", "link/2.png", "images/3.png", "images/0.png"]
    assert list(faces.captions) == [["a"], ["b", "c"], ["d"], ["e"], ["a second caption"]]
    for name in ("../2.png", "images/../../2.png", f"{tmp_path}/2.png"):
        write_captions(folder, [{"image": name, "caption": "a face"}])
        assert open_faces(folder).images[0].resolve() == tmp_path / "2.png"


def test_over_one_percent_of_invalid_records_reject_a_split_and_fewer_are_counted(
        tmp_path, printed):
    records = [record(image) for image in (*range(4, 304), "y\x1b", "z")]
    write_captions(tmp_path, records, "val.json", 304)
    write_captions(tmp_path)
    assert len(open_faces(tmp_path, "val")) == 300
    assert printed().splitlines() == [
        "JSON annotations val: 2 of 302 are invalid and left out:",
        r"val.json record 300 (counted from 0): the image 'y\x1b.png' does not exist"]

    write_captions(tmp_path, [record("x")])
    assert ("train.json record 0 (counted from 0): the image 'x.png' does not exist (1 of 1 are inv"
            in error_of(open_faces, tmp_path))


@parametrize("persons, is_warned", [
    ("a" * 31 + "bcd", True),
    ("abcd" * 9, False)])
def test_one_id_of_most_faces_is_pointed_out(tmp_path, printed, persons, is_warned):
    open_faces(write_captions(tmp_path, records_of(persons), count=36))
    assert ("31 of 34 faces have the same image_id" in printed()) == is_warned


def test_two_layouts_in_one_folder_are_rejected(tmp_path):
    write_files(write_celeba(tmp_path), {"train.json": []})
    error = error_of(index.find_layout, tmp_path, layouts.LAYOUTS)
    assert "found files of both CelebA and JSON annotations (train.json); leave only" in error


def test_image_that_is_added_later_is_found(tmp_path, printed):
    records = [record(f"images/{i % 2}/{i}") for i in range(200)]
    *images, last = [record["image"] for record in records]
    write_files(tmp_path, {"train.json": records} | grey_images(images))
    assert len(open_faces(tmp_path)) == 199
    assert "the image 'images/1/199.png' does not exist" in printed()
    write_files(tmp_path, grey_images([last]))
    assert len(open_faces(tmp_path)) == 200


def test_few_captions_are_split_by_person_with_at_least_one_for_validation(tmp_path):
    for count in range(2, 30):
        persons = [0, *range(count - 1)]    # the first person has two images
        folder = write_captions(tmp_path, records_of(persons), "a.json", count)
        validation = open_faces(folder, "val")
        assert len(validation)
        if count > 2:                       # two images of one person leave nothing to train on
            training = open_faces(folder)
            assert not {*training.identity} & {*validation.identity}


def test_single_caption_list_is_split_by_person(tmp_path):
    persons = np.repeat(np.arange(400), 2).tolist()
    write_captions(tmp_path, records_of(persons), "all.json", 800)
    for path in (tmp_path, tmp_path / "all.json"):
        persons = [set(faces.identity) for faces in open_splits(path)]
        assert_disjoint(persons, 400)
        assert len(persons[0]) > 330


@parametrize("kaggle", [False, True])
def test_celeba_is_read_in_its_own_and_in_kaggles_layout(tmp_path, kaggle):
    attributes = random_faces(6)
    train, val, test = open_splits(write_celeba(tmp_path, kaggle))
    assert_array_equal(train.attributes, attributes[:4])
    assert_array_equal(val.attributes, attributes[4:5])
    assert_array_equal(test.attributes, attributes[5:])
    assert len(set(train.identity)) == 4
    text, _ = sample_caption(attributes[4], default_rng(0))
    assert val.caption(0, default_rng(0)) == text


MM_CELEBA = [*range(2, 42), 24000, 24001]


def write_mm_celeba(folder, numbers=MM_CELEBA, pickles=False):
    files = {f"text/celeba-caption/{n}.txt": f"face {n}.\n\n  the face {n}.  \n" for n in numbers}
    if pickles:
        files["train/filenames.pickle"] = pickle.dumps(["2", "10.jpg", b"3", 4])
        files["test/filenames.pickle"] = pickle.dumps(["5"])
    return write_files(folder, files | grey_images(f"images/{n}.jpg" for n in numbers))


write_pickled = partial(write_mm_celeba, pickles=True)


def test_mm_celeba_is_split_by_number_and_validation_is_held_out(tmp_path):
    train, val, test = open_splits(write_mm_celeba(tmp_path))
    assert image_names(train) == [str(n) for n in range(2, 40)]
    assert image_names(val) == ["40", "41"]
    assert image_names(test) == ["24000", "24001"]
    assert train.captions[8] == ["face 10.", "the face 10."]


def test_mm_celeba_is_split_by_pickled_lists(tmp_path):
    train, val, test = open_splits(write_pickled(tmp_path))
    assert image_names(train) == ["2", "3", "4"]
    assert image_names(val) == ["10"]
    assert image_names(test) == ["5"]


@parametrize("images", ["images", "image", "."])
def test_celeba_dialog_is_read_from_any_image_folder(tmp_path, images):
    numbers = [*range(39), 24000]
    records = {f"{n}.jpg": {"overall_caption": f"face {n}"} for n in (5380, *numbers)}
    parts = {"Bangs": "Short bangs.", "Young": "", "Smiling": "No smile."}
    records["1.jpg"] = {"overall_caption": " ", "attribute_wise_captions": parts}
    write_files(tmp_path / images, grey_images(f"{n}.jpg" for n in numbers))
    write_files(tmp_path, {"captions_hq.json": records})
    train, val, test = open_splits(tmp_path)
    assert len(train) == 37
    assert image_names(val) == ["37", "38"]
    assert image_names(test) == ["24000"]
    assert list(train.captions)[:2] == [["face 0"], ["Short bangs.  No smile."]]


def write_lfwa(folder, images, lists):
    """60 images, two per person; a list of all of them, and with two lists one of the last 20."""
    names = [f"P_{n // 2}\\P_{n // 2}_{n % 2 + 1:04d}.jpg" for n in range(60)]
    write_files(folder / images, grey_images(name.replace("\\", "/") for name in names))
    order = default_rng(5).permutation(40)                                # not CelebA's
    header = ["path", *(ATTRIBUTES[i].replace("_", " ").lower() for i in order)]
    rows = np.column_stack([names, random_faces(60)[:, order].astype(int)])
    write_table(folder / "list_attr_lfwa.csv", [header, *rows], "%s", ",")
    if lists == 2:
        write_table(folder / "list_attr_lfwa_test.csv", [header, *rows[40:]], "%s", ",")


@parametrize("images, names, least, most", [
    ("lfw", ["test", "val", "train"], 20, 20),
    (".", ["test", "train"], 17, 43)])
def test_lfwa_is_read_from_its_lists_and_split_by_person(tmp_path, images, names, least, most):
    """The training list contains all images, also those of the test list, as the official one may;
    without a test list, half of the persons are held out."""
    write_lfwa(tmp_path, images, lists=len(names) - 1)
    splits = [open_faces(tmp_path, name) for name in names]
    assert least <= len(splits[0]) <= most
    assert_disjoint([faces.identity for faces in splits], 30)
    for faces in splits:
        rows = [faces.picture(i).getpixel((0, 0))[0] for i in range(len(faces))]
        assert_array_equal(faces.attributes, random_faces(60)[rows])


def write_fs2k(folder):
    """Photos with the same numbers in different folders; sketches with dark lines."""
    lines = Image.fromarray(np.where(np.eye(8), 0, 255).astype(np.uint8))
    files = {}
    photos = []
    records = []
    for p, n in itertools.product((1, 2, 3), range(100, 110)):
        suffix = "png" if p == 1 else "jpg"
        photos.append(f"photo/photo{p}/image0{n}.{suffix}")
        files[f"sketch/sketch{p}/sketch0{n}.png"] = lines
        records.append({"image_name": f"photo{p}/image0{n}", "style": 0})
    files["anno_train.json"] = records[:20][::-1]
    files["anno_test.json"] = records[20:][::-1]
    return write_files(folder, files | grey_images(photos))


def test_fs2k_has_one_sketch_per_photo_and_no_text(tmp_path):
    train, val, test = open_splits(write_fs2k(tmp_path))
    assert [len(train), len(val), len(test)] == [18, 2, 10]
    assert not train.has_text
    assert train.images[3] == tmp_path / "photo/photo1/image0103.png"
    assert val.images[1] == tmp_path / "photo/photo2/image0109.jpg"
    assert val.sketches[1] == [tmp_path / "sketch/sketch2/sketch0109.png"]
    light = 255 - 255 * np.eye(8)[..., None]
    assert (np.asarray(test.sketch(0, 0)) == light).all(), "dark on light"


def write_sde(folder, prefix="photo1_"):
    """20 photos, 15 of them for training, with sketches of 12 stages."""
    files = grey_images(f"photo/photo1/image01{n:02d}.jpg" for n in range(20))
    for n, stage in itertools.product(range(20), range(1, 13)):
        split = "train" if n < 15 else "test"
        name = f"sketch/{split}/{prefix}image01{n:02d}_{stage}.png"
        files[name] = plain((10 * stage,) * 3)
    return write_files(folder, files)


@parametrize("prefix", ["photo1_", ""])
def test_fs2k_sde_has_sketches_sorted_by_stage_and_captions_from_a_list_beside_them(
        tmp_path, prefix):
    train, val, test = open_splits(write_sde(tmp_path, prefix))
    assert [len(train), len(val), len(test)] == [13, 2, 5]
    assert train.captions is None
    assert train.sketch_stages == 12
    assert image_names(val) == ["image0113", "image0114"]
    darkness = [255 - train.sketch(2, stage).getpixel((0, 0))[0] for stage in range(12)]
    assert darkness == list(range(10, 130, 10))
    for path, sketches in zip(test.images, test.sketches):
        assert path.stem in str(sketches[0])

    records = [{"image": "of/another/set.jpg", "caption": "another"}]
    for n in range(15):
        records.append({
            "photo": f"photo/photo1/image01{n:02d}.jpg",
            "caption": [f"face {n}"] * 2})
    write_files(tmp_path, {"train.json": records})
    assert list(open_faces(tmp_path).captions) == [[f"face {n}"] * 2 for n in range(13)]
    assert open_faces(tmp_path, "test").captions is None


@parametrize("write, title", [
    (write_fs2k, "FS2K"),
    (write_sde, "FS2K-SDE"),
    (write_tar, "JSON annotations")])
def test_caption_list_beside_another_layout_is_accepted_if_one_layout_reads_the_files_of_both(
        tmp_path, write, title):
    write_files(write(tmp_path), {"train.json": []})
    assert index.find_layout(tmp_path, layouts.LAYOUTS).title == title


def change_file(folder, name, change):
    """change: the file's new content, or (old, new) bytes in it, or None to delete it."""
    path = folder / name
    if change is None:
        path.unlink()
    elif isinstance(change, tuple):
        path.write_bytes(path.read_bytes().replace(*change, 1))
    else:
        write_files(folder, {name: change})


def error_after(folder, name, change):
    """The error when a data set is opened whose file has changed."""
    change_file(folder, name, change)
    return error_of(open_faces, folder)


@parametrize("write, name, change, message", [
    (write_captions, "train.json", b"[]", "expected records of JSON annotations, found none"),
    (write_captions, "train.json", [record(0, [" . !", ""])], "found [[' . !', '']]"),
    (write_captions, "train.json", (b'["face 0"', b'[7'),
     "expected text in caption or face_caption, "),
    (write_captions, "train.json", (b"the face", rb"half a \ud800"), "'half a \\ud800 0']]"),
    (write_captions, "images/3.png", None,
     "the image '3.png' does not exist (1 of 4 are invalid, more"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg  2"),
     "txt line 4: expected 1, 0 or -1 for every"),
    (write_celeba, VALUES, (b"02.jpg  -1", b"02.jpg"),
     "celeba.txt line 4: expected 40 values, found 39"),
    (write_celeba, VALUES, (b"Bald", b"Bold"),
     "line 2: expected CelebA's 40 attribute names, found 5_"),
    (write_celeba, PARTITION, (b"3.jpg 0", b"2.jpg 2"),
     "(000002.jpg): expected 0, 1 or 2 in list_eval_"),
    (write_celeba, PARTITION, (b"6.jpg", b"6.jpg 2\n9.jpg"),
     "are missing from list_attr_celeba, the fi"),
    (write_pickled, "test/filenames.pickle", pickle.dumps(["2"]),
     "face 2: 'images/2.jpg' is already in split"),
    (write_pickled, "train/filenames.pickle", pickle.dumps([2, None]),
     "face -1: the image '-1.jpg' does not exist (1 of 1"),
    (write_pickled, "train/filenames.pickle", b"cposix\nmkdir\n(S'never-made'\ntR.",
     "import of posix.mkdir refused"),
    (write_fs2k, "anno_train.json", [{"name": 1}], "no photo or no sketch is named None (1 of"),
    (write_fs2k, "anno_train.json", [5], "no photo or no sketch is named 5 (1 of 1 are invalid"),
    (write_fs2k, "sketch/sketch1/sketch0104.png", None,
     "no photo or no sketch is named 'photo1/image0104'"),
    (write_sde, "sketch/train/photo1_image0104_7.png", None,
     "photo1/image0104.jpg has other stages than most photos: [1, 2, 3, 4, 5"),
    (partial(write_sde, prefix=""), "photo/photo2/image0104.jpg", b"", "found no such photo"),
    (write_tar, "00001.tar.zst", b"", "expected no compression; run gunzip"),
    (partial(write_tar, records=90), "00001_stats.json", {"successes": 10},
     "00001.tar is damaged, cut off, compressed or missing: found 0 faces, "
     "00001_stats.json counts 10 (10 ")])
def test_invalid_data_set_is_rejected(tmp_path, write, name, change, message):
    assert message in error_after(write(tmp_path), name, change)


@parametrize("changes, message", [
    ({"box": [10 ** 400, 0, 1, 1]}, "int too large to convert to float"),
    ({"box": "[9, 0, 9, 5]"}, "'000000003': expected half of the box [9, 0, 9,"),
    ({"members": {"000000003.jpg": b"x"}}, "00000.tar: 000000003.jpg is not an image")])
def test_invalid_record_of_a_tar_is_named(tmp_path, changes, message):
    assert message in error_of(open_faces, write_tar(tmp_path, **changes))


@parametrize("name, content, message", [
    ("faces.parquet", b"", "*.tar, *.json (not compressed; FaceCaption-15M's .parquet"),
    ("val.json", PAIRS, "found val.json, but no train.json"),
    ("captions_hq.json", {"0.jpg": 7}, "captions_hq.json: '0.jpg': AttributeErr"),
    ("captions_hq.json", [], "expected a JSON dict, found []; in ")])
def test_folder_with_a_single_unusable_file_is_rejected(tmp_path, name, content, message):
    assert message in error_after(tmp_path, name, content)


# ---- data.py: against pixels worked by hand, and other workers, ranks and starts -----------------
COS = math.cos(math.radians(15))
SIN = math.sin(math.radians(15))
CENTRE = 111.5


@parametrize("name, matrix", [
    ("shear x", [(1, 0.15, 0), (0, 1, 0)]),
    ("translate x", [(1, 0, 5), (0, 1, 0)]),
    ("shear y", [(1, 0, 0), (0.15, 1, 0)]),
    ("translate y", [(1, 0, 0), (0, 1, 5)]),
    ("rotate", [(COS, -SIN, CENTRE * (1 - COS + SIN)), (SIN, COS, CENTRE * (1 - SIN - COS))])])
def test_affine_augmentations_map_coordinates_as_in_the_paper(name, matrix):
    """The colour of an output pixel is the position of its input pixel, matrix @ (x, y, 1)."""
    for size in (224, 112):
        y, x = np.mgrid[:size, :size]
        position = np.dstack([x, y, 0 * x]).astype(np.uint8)
        found = np.asarray(data.apply_operation(name, Image.fromarray(position), 1))
        scale = np.full(x.shape, size / 224)
        expected = np.dstack([x, y, scale]) @ np.array(matrix).T    # (size, size, 2)
        inside = ((expected > 1) & (expected < size - 2)).all(-1)
        assert abs(found[..., :2] - expected)[inside].max() <= 1.1
        assert (found == 128).all(-1).any(), "grey where the input has no pixel"


def test_augmentation_changes_five_in_nine_images_beyond_mirroring():
    """Each of two operations is skipped with probability 1/2, or without effect in 3 of 9 cases."""
    image = noise_faces().picture(0)
    rng = default_rng(0)
    samples = [data.augment(image, rng).tobytes() for _ in range(3000)]
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for plain in (image, mirrored):
        assert abs(samples.count(plain.tobytes()) / 3000 - 2 / 9) < 0.03
    for sign in (-1, 1):
        assert data.apply_operation("rotate", image, sign).tobytes() in samples


def test_caption_and_augmentation_of_a_face_differ_from_epoch_to_epoch():
    dataset = data.FaceDataset(noise_faces(20), TOKENIZER, 16, 4, seed=3)
    differing = Counter()
    for i in range(20):
        pixels, text, *_ = dataset[0, i]
        other_pixels, other_text, *_ = dataset[1, i]
        differing["texts"] += text != other_text
        differing["images"] += not np.array_equal(pixels, other_pixels)
    assert differing["texts"] > 15
    assert differing["images"] > 10


def content_of(batches):
    """The images, token ids and identities of each batch."""
    return [(batch.images, batch.captions.ids, batch.identity) for batch in batches]


def joined(*ranks):
    """The content of batches whose parts were loaded by several ranks."""
    whole = []
    for parts in zip(*map(content_of, ranks)):
        whole.append(tuple(map(torch.cat, zip(*parts))))
    return whole


@pytest.fixture(params=["memory", "tars"])
def faces(request, tmp_path):
    """Faces in memory, or in tars as in a worker that is not forked."""
    if request.param == "memory":
        return noise_faces()
    write_tar(tmp_path, records=100, name="0")
    write_tar(tmp_path, records=100, name="1")
    return pickle.loads(pickle.dumps(open_faces(tmp_path)))


def batches_of(faces, start=0, count=None, seed=7, batch_size=4, **options):
    """By default two epochs and two batches."""
    if count is None:
        count = 2 * (len(faces) // 4) + 2
    dataset = data.FaceDataset(faces, TOKENIZER, 16, batch_size, seed, **options)
    return take(dataset, start, count)


def test_batches_are_the_same_for_any_number_of_workers_and_ranks_and_from_any_step(faces):
    random_state = torch.get_rng_state()
    expected = content_of(batches_of(faces))
    for workers in (1, 2, 4):
        same(content_of(batches_of(faces, workers=workers)), expected)
    for workers in (0, 2):
        same(content_of(batches_of(faces, 7, 5, workers=workers)), expected[7:12])
    options = dict(batch_size=2, world_size=2)
    first = batches_of(faces, **options, rank=0, workers=0)
    second = batches_of(faces, **options, rank=1, workers=1)
    same(joined(first, second), expected)
    same(torch.get_rng_state(), random_state)           # the loader has random numbers of its own


def test_every_epoch_has_each_face_once_in_another_order(faces):
    def order(seed):
        return torch.cat([batch.identity for batch in batches_of(faces, seed=seed)])
    per_epoch = 4 * (len(faces) // 4)
    first, second, _ = order(seed=7).split([per_epoch, per_epoch, 8])
    assert len(first.unique()) == len(second.unique()) == per_epoch
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(seed=8)[:per_epoch])


def test_fewer_faces_than_a_batch_are_rejected(faces):
    error = error_of(data.FaceDataset, faces, TOKENIZER, 16, 1000)
    assert "faces are fewer than a batch of 1000" in error


@parametrize("workers", [0, 1])
def test_damaged_image_is_named_and_replaced_by_the_next_face(tmp_path, capfd, workers):
    images = write_celeba(tmp_path, count=202) / "img_align_celeba"
    cut_off = encoded(Image.fromarray(noise_pixels(218, 178, 3)), "jpeg")[:9000]
    write_files(images, {"000002.jpg": cut_off, "000200.jpg": "not an image"})
    faces = open_faces(tmp_path)
    loader = data.FaceDataset(faces, TOKENIZER, 16, 50, augmented=False, workers=workers)
    batches = take(loader, 0, 12)                                           # three epochs
    identity = np.concatenate([batch.identity for batch in batches])
    readable = [0, 2, *range(2, 199), 0]
    assert_array_equal(np.sort(identity), np.sort([*faces.identity[readable]] * 3))
    printed = capfd.readouterr().out
    assert printed.count("000002.jpg cannot be read: image file is truncated") == 1
    assert printed.count("000200.jpg is not an image (replaced by the next face)") == 1
    assert len(data.readable(faces, 16)) == 198
    assert "2 of 200 are invalid and" in capfd.readouterr().out

    write_files(images, {"000050.jpg": "not an image"})
    assert "(3 of 200 are invalid, more than 1 %)" in error_of(take, loader, 0, 4)
    write_files(images, {path.name: "not an image" for path in images.iterdir()})
    assert "(200 of 200 are invalid, more than 1 %)" in error_of(data.readable, faces, 16)
    with pytest.raises(ValueError, match="is not an image, and 99 images before it"):
        take(loader, 0, 1)


# ---- config.py: against the recipes, and the configuration of the run that is resumed ------------
def test_flags_override_recipes():
    flags = dict(steps=7, max_epochs=0, augment=False, columns=("pcfg",), lr=0.1)
    given = parse_flags("--steps", 7, "--no-augment", "--columns", "pcfg", "--lr", 0.1)
    assert given == train_config.Config(**train_config.RECIPES["tiny"] | flags)
    by_epochs = parse_flags("--epochs", 2)
    assert by_epochs.steps == by_epochs.max_epochs == 0, "or the recipe's steps would decide"
    assert not by_epochs.augment
    assert parse_flags("--data", "DIR").augment
    assert parse_flags("--model", "base") == train_config.Config(model="base")
    assert parse_task_arguments(["retrieval", "--data", "DIR"]).lr == 3e-5, "the paper's"
    assert parse_task_arguments(["sketch", "--lr", "0.1"]).lr == 0.1


@parametrize("flags", [
    "--leanring_rate 1",
    "--model huge",
    "--columns x"])
def test_unknown_flags_and_choices_are_rejected(flags):
    with pytest.raises(SystemExit):
        parse_flags(*flags.split())


def test_help_shows_the_texts_of_the_configuration_and_its_defaults(printed):
    with pytest.raises(SystemExit):
        parse_flags("--help")
    output = " ".join(printed().split())
    for flag in (
            "--warmup WARMUP steps to the peak learning rate, at most 20 % of the run (20000)",
            "--no-augment augment the images as in the paper (True)"):
        assert flag in output


@parametrize("flags, message", [
    ("--alpha 2", "--alpha 2.0: expected a number from 0 to 1"),
    ("--momentum nan", "--momentum nan: expected a number from 0 to 1"),
    ("--batch_size 0", "--batch_size 0: expected a number from 1 to inf"),
    ("--steps -5", "--steps -5: expected a number from 0 to inf"),
    ("--init a --clip b", "--init has all weights"),
    ("--vocabulary a", "--vocabulary is for --init")])
def test_values_of_flags_are_checked_before_the_run(flags, message):
    assert message in error_of(parse_flags, *flags.split())


def test_each_of_several_values_of_a_flag_is_checked():
    error = error_of(parse_task_arguments, "attributes --fractions 0.5 2".split())
    assert "--fractions 2.0: expected a number from 0 to 1" in error


@parametrize("name", ["xpu9", "nothing"])
def test_unknown_devices_are_rejected(name):
    error = error_of(distributed.choose_device, name)
    assert error.startswith(f"device {name!r}: ")


def test_resuming_takes_the_runs_flags_and_only_some_may_change(uninterrupted, quick):
    resume = partial(parse_flags, "--out", uninterrupted, "--resume")
    resumed = resume("--workers", 2, "--batch_size", 8)
    assert resumed == quick(out=str(uninterrupted), resume=True, workers=2)
    error = error_of(resume, "--lr", 0.5)
    assert "has --lr 0.001, which cannot change; omit --lr 0.5" in error
    error = error_of(parse_flags, "--out", "new", "--resume", "--steps", 7)
    assert "--resume: new/flip.pt does not exist; to start a run, omit --resume" in error


# ---- evaluation.py: against ranks counted by hand ------------------------------------------------
def test_recall_counts_an_images_best_caption_and_counts_ties_as_misses():
    image_of_text = torch.tensor([0, 0, 1])
    image_to_text = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.7, 0.7]])
    metrics = evaluation.retrieval_metrics(image_to_text, image_to_text.T, image_of_text)
    assert metrics["txt_r1"] == pytest.approx(50)
    assert metrics["txt_r5"] == pytest.approx(100)
    assert metrics["img_r1"] == pytest.approx(200 / 3)


def test_recall_table_contains_chance_and_both_references():
    validation = EvaluationSet.from_faces(noise_faces(), noise_faces(), batch_size=8)
    ours = defaultdict(lambda: 10.0, itc_img_r1=8.0)
    initial = defaultdict(lambda: 10.0, img_r1=7.0)
    table = evaluation.recall_table(ours, validation, initial)
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0][2:] for row in rows] == [
        "chance",
        "attribute match",
        "Bayes optimum",
        "model of --init, re-ranked",
        "this model, ITC alone",
        "this model, re-ranked"]
    assert [row[1] for row in rows[3:]] == ["7.0", "8.0", "10.0"]
    assert rows[0][1:4] == ["5.0", "25.0", "50.0"]
    optimum = validation.references["Bayes optimum"][:5]
    assert rows[2][1:6] == [f"{value:.1f}" for value in optimum]


# ---- train.py: against the paper's schedule, and uninterrupted runs ------------------------------
PER_EPOCH = 23_925


def test_learning_rate_of_base_is_the_papers():
    config = train_config.Config(model="base", steps=15 * PER_EPOCH)
    for step, expected in (
            (0, pytest.approx(1e-6)),
            (10_000, pytest.approx(1.55e-5)),
            (20_000, 3e-5),
            (PER_EPOCH - 1, 3e-5),
            (PER_EPOCH * 3, pytest.approx(3e-5 * 0.9 ** 3)),
            (PER_EPOCH * 40, 1e-6)):
        assert learning_rate(step, config, PER_EPOCH) == expected


def test_learning_rate_of_base_on_small_data_decays_only_after_the_warm_up():
    """The warm-up takes several epochs, and the decay begins where it ends."""
    config = train_config.Config(model="base", steps=1500)
    assert learning_rate(299, config, 100) == pytest.approx(3e-5, rel=0.01)
    assert learning_rate(300, config, 100) == 3e-5
    assert learning_rate(401, config, 100) == pytest.approx(3e-5 * 0.9)


@parametrize("step", [0, 1000, 60_000])
def test_schedule_of_base_is_the_papers(step):
    config = train_config.Config(model="base", steps=15 * PER_EPOCH)
    alpha = pytest.approx(0.4 * min(1, step / (2 * PER_EPOCH)))
    assert train.schedule(step, config) == (alpha, False, True)


def test_schedule_of_tiny_starts_with_itc_alone_and_ends_with_a_low_learning_rate():
    config = parse_flags()
    assert train.schedule(0, config) == StepParams(within_batch=True, with_itm=False)
    rates = [learning_rate(step, config, 312) for step in (0, 383, 384, 385, 1919)]
    assert max(rates) == rates[2] == config.lr, "after 20 % of the run"
    assert rates[0] < config.lr / 100
    assert rates[-1] < config.lr / 100


@parametrize("step, phase, expected", [
    (84, 1, (0.4, True, False)),
    (85, 2, (0.0, False, True)),
    (90, 2, (0.2, False, True)),
    (99, 2, (0.4, False, True))])
def test_phase_2_adds_itm_the_momentum_encoder_the_queue_and_soft_targets(step, phase, expected):
    config = replace(parse_flags(), steps=100, complete_from=0.85, alpha_warmup=2 / 3)
    assert train.phase(step, config) == phase
    assert train.schedule(step, config) == pytest.approx(expected)


@parametrize("decay, quarter", [("cosine", 0.6 + 0.4 * 0.5 ** 0.5), ("linear", 0.8)])
def test_learning_rate_warms_up_and_decays_by_a_cosine_or_linearly(decay, quarter):
    for step, expected in ((0, 0.1), (10, 0.55), (20, 1), (265, quarter), (510, 0.6), (1000, 0.2)):
        rate = warmup_decay(step, 1000, 20, 1.0, lr_start=0.1, lr_min=0.2, decay=decay)
        assert rate == pytest.approx(expected)


def test_run_leaves_log_plots_and_a_checkpoint_with_the_logged_metrics(uninterrupted, quick, model):
    plots = {"curves.png", "retrieval.png"}
    assert {path.name for path in uninterrupted.iterdir()} == plots | {"flip.pt", "log.jsonl"}
    for name in plots:
        Image.open(uninterrupted / name).load()
    config = quick()
    faces = runs.training_faces(config, 48)
    held_out = runs.validation_faces(config, 48)
    equal = (faces.images == held_out.images[0]).all((1, 2, 3))
    assert not equal.any(), "a validation face is not trained on"
    metrics, _ = evaluation.evaluate(model, EvaluationSet.from_faces(held_out), config)
    last = log_of(uninterrupted)[-1]
    assert metrics == pytest.approx({name: last[name] for name in metrics})


def test_checkpoint_has_the_configured_optimizers(quick, saved):
    config = quick()
    adamw, muon = [optimizer["param_groups"] for optimizer in saved["training"]["optimizers"]]
    assert [group["lr_multiple"] for group in muon] == [config.muon_multiple]
    assert {group["weight_decay"] for group in adamw} == {0, config.weight_decay}


# after 4 steps, a run is in phase 1; after 5, between the phases; after 6, in phase 2
STEPS = QUICK | dict(
    faces=64, steps=12, complete_from=0.4, log_every=3, eval_every=1000, queue_size=40)


def start(world, out, cache, *flags, ending="pass", rank=0):
    """`world` processes of a `python train.py` with the recipe STEPS; one ends with `ending`."""
    code = f"""
import atexit, os, signal
tasks = "/proc/self/task"
threads = lambda: {{open(f"{{tasks}}/{{n}}/comm").read()[:4] for n in os.listdir(tasks)}}
atexit.register(lambda: {ending == "pass"} and "gloo" in threads() and os._exit(9))   # called last
from multiprocessing import active_children
import config, flip, runs, train
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):       # nohup would have it ignored
    signal.signal(number, signal.SIG_DFL)
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def forward(model, *inputs, real=flip.FLIP.forward):
    global step
    step += 1
    out = real(model, *inputs)
    if step == 4 and os.environ.get("RANK", "0") == "{rank}":
        {ending}
    return out
step, flip.FLIP.forward = -1, forward
config.RECIPES["tiny"] = {STEPS}
train.run_script(lambda: train.train(train.parse_arguments()))
"""
    command = [sys.executable, "-c", code, "--out", str(out), "--cache", cache, *flags]
    groups = group_of(world) if world > 1 else [{}]
    processes = []
    for group in groups:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | group
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True,
                                          stderr=subprocess.PIPE, start_new_session=True))
    return processes


def end(processes):
    """The exit codes of all processes, and their error output."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return tuple(process.returncode for process in processes), "".join(errors)


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory, cache, quick):
    """{number of processes: folder of an uninterrupted run with 16 pairs in a step}"""
    one = tmp_path_factory.mktemp("one")
    train.train(quick(**STEPS | dict(out=str(one), batch_size=16)))
    two = tmp_path_factory.mktemp("two")
    codes, errors = end(start(2, two, cache, "--batch_size", "8"))
    assert codes == (0, 0), errors
    return {1: one, 2: two}


def losses_of(out):
    return [(line["step"], line["itc"], line["itm"]) for line in log_of(out) if "itc" in line]


def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(whole_runs):
    one = np.array(losses_of(whole_runs[1]), float)
    two = np.array(losses_of(whole_runs[2]), float)
    np.testing.assert_allclose(two, one, atol=1e-4)
    one = FLIP.from_pretrained(whole_runs[1]).state_dict()
    two = FLIP.from_pretrained(whole_runs[2]).state_dict()
    for name in ("queue_identity", "queue_pointer", "image_queue", "text_queue"):
        close(two[name].double(), one[name].double(), 1e-4)


@parametrize("world, workers, ending, codes, step", [
    (1, 0, "kill()", (-9,), 0),
    (2, 0, "signal.raise_signal(signal.SIGTERM)", (1, 1), 6),
    (1, 2, "os.killpg(0, signal.SIGHUP); os.killpg(0, signal.SIGINT)", (1,), 5),
    (1, 2, "active_children()[0].kill()", (1,), None),
    (1, 2, "kill()", (-9,), 4),
    (2, 0, "runs.write_checkpoint = kill", (-9, 1), 4)])
def test_run_is_saved_after_its_last_whole_step_or_was_before_a_kill_and_resumes_exactly(
        tmp_path, cache, whole_runs, world, workers, ending, codes, step):
    """A run that is killed itself was saved after every step; its workers and other ranks end, too
    (or `end` would wait). step: None if it depends on when the main process is notified."""
    killed = -9 in codes
    flags = ["--batch_size", str(16 // world), "--workers", str(workers)]
    if killed and step:
        flags += ["--save_every", "0"]
    rank = 1 if codes == (1, 1) else 0
    found, errors = end(start(world, tmp_path, cache, *flags, ending=ending, rank=rank))
    assert found == codes, errors

    saved = torch.load(tmp_path / "flip.pt")["training"]["step"]
    if step is None:
        assert saved >= 4
    else:
        assert saved == step
    assert ("continue with --resume" in errors) == (not killed)
    if not killed:
        assert f"after step {saved}" in errors
    if "signal" in ending:
        assert "Traceback" not in errors                    # all ranks stop together

    write_files(tmp_path, {"log.jsonl": "torn"})            # is restored from the checkpoint
    codes, errors = end(start(world, tmp_path, cache, "--resume"))
    assert codes == (0,) * world, errors
    assert losses_of(tmp_path) == losses_of(whole_runs[world])


@parametrize("error, advice", [
    (RuntimeError("memory ran out"), "; continue with --resume"),
    (ValueError("over 1 % of the images are damaged"), "")])
def test_run_that_fails_is_saved_and_resuming_is_advised_unless_it_would_fail_again(
        uninterrupted, quick, monkeypatch, error, advice):
    monkeypatch.setattr(FLIP, "forward", failing_at(4, error, FLIP.forward))
    config = quick()
    with pytest.raises(type(error)) as caught:
        train.train(config)
    assert caught.value.__notes__ == [f"saved after step 4{advice}"]
    train.train(replace(config, resume=True))
    assert losses_of(Path("out")) == losses_of(uninterrupted)


@parametrize("number", [0, 1])
def test_validation_that_failed_is_made_up_for_when_the_run_is_resumed(quick, monkeypatch, number):
    config = quick()            # is validated after steps 6 and 8
    failing = failing_at(number, OSError("no space left"), train.validate)
    monkeypatch.setattr(train, "validate", failing)
    with pytest.raises(OSError):
        train.train(config)
    _, metrics = train.train(replace(config, resume=True))
    assert metrics["step"] == 8
    assert [line["step"] for line in log_of(Path("out")) if "r_mean" in line] == [6, 8]


def save_at_start(config):
    """Save a run before its first step; returns the configuration that resumes it."""
    with open_run(config) as run:
        runs.save(run)
    return replace(config, resume=True)


def test_run_goes_on_alone_with_resume_and_with_the_same_faces_in_whichever_folder(quick, tmp_path):
    folder = write_celeba(tmp_path / "a", count=20)
    config = quick(data=str(folder), cache="cache", batch_size=4, steps=2)
    with open_run(config):
        assert "log.jsonl is in use by another run" in error_of(train.train, config)
    resumed = save_at_start(config)
    assert "flip.pt already exists; use --resume" in error_of(train.train, config)
    copied = shutil.copytree(folder, tmp_path / "b")
    train.train(replace(resumed, data=str(copied)))


def write_16_captions(folder):
    """12 faces for training, 4 for validation."""
    records = [record(i, f"face {i}") for i in range(16)]
    write_captions(folder, records[:12], count=16)
    return write_files(folder, {"val.json": records[12:]})


@parametrize("write, name, change", [
    (write_16_captions, "train.json", (b"face 3", b"face 4")),
    (write_16_captions, "images/15.png", plain(size=(80, 80))),
    (partial(write_celeba, count=20), VALUES, (b"02.jpg  -1", b"02.jpg  1"))])
def test_resumed_run_has_the_same_faces_also_if_only_their_contents_differ(
        quick, tmp_path, write, name, change):
    """Images, captions and annotations, of training and of validation faces."""
    folder = write(tmp_path / "faces")
    resumed = save_at_start(quick(data=str(folder), cache="cache", batch_size=4, steps=2))
    other = shutil.copytree(folder, tmp_path / "other")
    change_file(other, name, change)
    message = f"had other faces than {other}: their images, captions or ann"
    assert message in error_of(train.train, replace(resumed, data=str(other)))


def test_resumed_run_has_the_same_drawn_faces_and_number_of_processes(quick, monkeypatch):
    resumed = save_at_start(quick(steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(toyfaces, "code_version", lambda: "other")
        assert "had other faces than drawn faces (seed 0)" in error_of(train.train, resumed)
    monkeypatch.setattr(runs, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(runs, "DistributedDataParallel", lambda model, **_: model)
    assert "had 1 processes, found 2; use as many" in error_of(train.train, resumed)


PHASE_1 = dict(complete_from=1.0)
PHASE_2 = dict(complete_from=0.0)


def test_nan_loss_stops_the_run(quick):
    """Also without ITM."""
    config = quick(**PHASE_1, lr=1e18, log_every=2)
    error = error_of(train.train, config)
    assert re.match(
        "the loss of steps . to . is NaN|after step .: some weights are NaN or infinite", error)


def test_nan_weights_never_replace_a_checkpoint(quick):
    run = setup(quick())
    runs.save(run)
    path = Path("out/flip.pt")
    good = path.read_bytes()
    run.model.student.text.words.weight.data[3, 4] = torch.nan
    run.steps_done = 2
    assert "after step 2: some weights are NaN or infinite" in error_of(runs.save, run)
    assert path.read_bytes() == good


def constant_run(config):
    """A run whose weights stay, a list of one batch, and a function that trains a step and returns
    the losses, and the gradients in one vector."""
    run = setup(config)
    weights = list(run.model.parameters())
    gradients = []

    def keep_gradients():
        own = [p.grad.flatten() for p in weights if p.grad is not None]
        gradients.append(torch.cat(own))
    run.optimizers = [torch.optim.SGD([{"params": weights, "lr_multiple": 0.0}])]
    run.optimizers[0].step = keep_gradients

    def train_step(batch, step):
        out, losses = train.compute_gradients(run, batch, step)
        train.update(run, out, step)
        return losses, gradients[-1]
    return run, take(run.dataset, 0, 1), train_step


@pytest.fixture
def strong_dropout(monkeypatch):
    """A tiny model with a dropout of 1/2."""
    vit, bert, size = train_config.TINY
    monkeypatch.setitem(runs.MODELS, "tiny", (vit, replace(bert, dropout=0.5), size))


def test_a_step_draws_its_own_dropout_mask_and_negatives(quick, monkeypatch, strong_dropout):
    real = FLIP.sample_negatives
    seeds = []

    def sample_negatives(model, *args):
        seeds.append(args[-1].initial_seed())
        return real(model, *args)
    monkeypatch.setattr(FLIP, "sample_negatives", sample_negatives)
    run, [batch], train_step = constant_run(quick(**PHASE_2))

    def itm(step):                      # unlike ITC, it does not depend on the queue
        losses, _ = train_step(batch, step)
        return losses[1].item()
    first, second, third, again = [itm(step) for step in (0, 1, 2, 0)]
    assert first == again
    assert len({first, second, third}) == 3
    assert seeds[0] == seeds[3]
    assert len(set(seeds)) == 3
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (1, 1))
    assert itm(0) != first, "another rank drops others"


def test_validation_is_without_dropout_and_training_goes_on_with_it(quick, strong_dropout):
    run = setup(quick())
    run.model.train()
    assert train.validate(run) == train.validate(run)
    assert run.model.training


@parametrize("value, expected", [(-1.0, 0.001), (2.0, 0.5)])
def test_a_step_clamps_the_temperature(quick, value, expected):
    run, [batch], train_step = constant_run(quick(**PHASE_2))
    run.model.temperature.data.fill_(value)
    train_step(batch, 0)
    assert run.model.temperature.item() == pytest.approx(expected)


def test_momentum_is_that_of_the_next_step(quick, monkeypatch):
    momenta = []
    monkeypatch.setattr(FLIP, "update_momentum", lambda model, momentum: momenta.append(momentum))
    run = setup(quick())
    momenta.clear()
    assert run.config.complete_from * run.config.steps == 2
    out, _ = train.compute_gradients(run, take(run.dataset, 0, 1)[0], 0)
    for step in range(3):
        train.update(run, out, step)
    assert momenta == [0, run.config.momentum], "a copy before step 2, an average from then on"


def test_log_has_the_mean_itm_of_the_steps_that_trained_it(quick):
    run = setup(quick(steps=2, complete_from=0.5))
    run.unlogged_losses = [torch.tensor([3.0, 0.0]), torch.tensor([5.0, 2.0])]
    run.steps_done = 2
    losses = train.mean_losses(run)
    assert losses["itc"] == 4
    assert losses["itm"] == 2

    run.unlogged_losses = [torch.tensor([3.0, 0.0])]
    run.steps_done = 1
    assert train.mean_losses(run)["itm"] is None


@pytest.fixture
def init_flags(uninterrupted, model, monkeypatch):
    """The flags that start a run with our checkpoint, or an official one of the same weights."""
    torch.save({"model": official_state(model)}, "official.pth")
    Path("tokenizer.json").write_text(model.tokenizer.to_json())
    defaults = [getattr(model.config, field.name) for field in fields(FLIPConfig)]
    monkeypatch.setattr(FLIPConfig.__init__, "__defaults__", tuple(defaults))   # instead of base
    official = dict(init="official.pth", vocabulary="tokenizer.json")
    return {"ours": dict(init=str(uninterrupted)), "official": official}


@parametrize("source", ["ours", "official"])
def test_init_loads_our_or_the_official_flip_also_at_another_image_size(
        model, init_flags, quick, source):
    config = quick(image_size=64, queue_size=7, **init_flags[source])
    initial = runs.starting_model(config)
    expected = model.student.state_dict()
    positions = expected["image.positions"]
    expected["image.positions"] = pretrained.resize_position_embedding(positions, 64)
    student = initial.student.state_dict()
    same(student, expected)
    momentum_encoder = initial.momentum_encoder.state_dict()
    same({name: momentum_encoder[name] for name in student}, dict(student))
    same(initial.matching_head.state_dict(), model.matching_head.state_dict())
    assert initial.temperature == model.temperature
    assert initial.image_queue.shape == (7, 128)
    assert initial.tokenizer.to_json() == model.tokenizer.to_json()


def test_run_that_starts_with_init_prints_the_recalls_before_and_after(
        init_flags, quick, printed):
    ours = init_flags["ours"]
    train.train(quick(image_size=64, steps=2, eval_every=2, **ours))
    output = printed()
    assert output.index("model of --init") < output.index("this model, re-ranked")


def test_models_that_do_not_fit_the_flags_are_rejected(init_flags, quick):
    without_vocabulary = init_flags["official"] | dict(vocabulary=None)
    for change, message in (
            (without_vocabulary, "contains no vocabulary; pass --vocabulary"),
            (init_flags["ours"] | dict(model="base"), "has width 128, but --model"),
            (dict(image_size=50), "is not a multiple of the patch")):
        assert message in error_of(train.train, quick(**change))


def test_plan_says_how_many_epochs_and_warns_of_unknown_words(printed):
    config = parse_flags("--init", "x", "--batch_size", 8, "--steps", 300)
    run = MagicMock(config=config, model=MagicMock(tokenizer=Tokenizer.train(["a face"])))
    run.dataset.faces = run.validation.faces = noise_faces()
    runs.print_plan(run)
    output = printed()
    assert "300 steps of 8 pairs are 120.0 epochs" in output
    assert "captions are not in the vocabulary: " in output


@parametrize("more, batch_size, steps", [
    ([], 9, 120),
    (["--steps", 7], 9, 7),
    (["--batch_size", 20], 20, 30)])
def test_tiny_recipe_fits_small_sets(tmp_path, more, batch_size, steps):
    """At least four steps an epoch, at most 30 epochs; also in a run that is resumed."""
    folder = write_celeba(tmp_path / "a", count=41)
    flags = ["--data", folder, "--cache", "cache", "--out", "out", *more]
    with open_run(parse_flags(*flags)) as run:
        assert run.dataset.batch_size == run.config.batch_size == batch_size
        assert len(run.dataset.faces) == 39
        assert run.config.steps == steps
        runs.save(run)
    resumed = replace(run.config, resume=True)
    assert parse_flags(*flags, "--resume") == resumed, "by the same command"
    Path("out").rename("moved")
    assert parse_flags("--out", "moved", "--resume") == replace(resumed, out="moved")


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The configuration and final metrics of `python train.py`."""
    folder = tmp_path_factory.mktemp("default")
    flags = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    run_python("train.py", *flags)
    return parse_flags(*flags), log_of(folder / "out")[-1]


@pytest.mark.slow
def test_default_run_finds_faces_more_often_than_matching_all_attributes(default_run):
    """Text to image; the recalls of RESULTS.md, less three points."""
    config, metrics = default_run
    held_out = runs.validation_faces(config, 48)
    training = runs.training_faces(config, 48)
    references = EvaluationSet.from_faces(held_out, training, config.batch_size).references
    assert 60 <= references["attribute match"][1] <= 80
    assert references["Bayes optimum"][0] > 65
    assert metrics["img_r1"] >= 52
    assert metrics["img_r5"] >= 79
    assert metrics["img_r10"] >= 86


# ---- finetune.py: against official figures in golden.npz, closed forms, the weights before -------
@pytest.fixture
def tuned(uninterrupted, cache):
    """A function that makes the configuration of a short run on a few drawn faces."""
    def config(task, **changes):
        few = dict(
            task=task, checkpoint=f"{uninterrupted}/flip.pt", out=".", cache=cache, faces=24,
            validation=4, test=8, epochs=3, batch_size=8, itm_every=1, precision="float32",
            workers=0, sketch_stages=7)
        return train_config.TaskConfig(
            **train_config.TASK_RECIPES[task] | train_config.DRAWN_RECIPES[task] | few | changes)
    return config


def test_attribute_logits_and_loss_are_the_official_ones(official, tuned, monkeypatch):
    vectors = finetune.pool_tokens(official.student.image, GOLDEN["eval.images"]).detach()
    monkeypatch.setattr(finetune, "encode", lambda *_: vectors)
    theirs = recorded("attr.")
    faces = replace(noise_faces(8), attributes=theirs["target"].bool().numpy())
    splits = {"train": faces, "val": faces, "test": faces}
    task = finetune.Attributes(official, splits, tuned("attributes"))
    task.trained.load_state_dict({
        "weights": theirs["layer_weights"].flatten(),
        "norm.weight": theirs["ln.weight"],
        "norm.bias": theirs["ln.bias"],
        "linear.weight": theirs["visual_proj.weight"],
        "linear.bias": theirs["visual_proj.bias"]})
    close(task.trained(vectors), theirs["logits"])
    close(task.loss(torch.arange(8), 0), theirs["loss"])


def test_tokens_are_pooled_after_blocks_4_6_8_and_12_of_base_and_at_four_depths_of_5():
    hidden = [torch.full((1, 3, 2), float(block)) for block in range(1, 13)]
    last = torch.full((1, 3, 2), 99.0)
    base = MagicMock(config=ViTConfig(), return_value=(last, hidden))
    pooled = finetune.pool_tokens(base, None)[0, :, 0]
    assert pooled.tolist() == [4, 4, 4, 6, 6, 6, 8, 8, 8, 99, 99, 99]
    vectors = finetune.pool_tokens(ViT(ViTConfig(32, 8, 24, 5, 3)), torch.zeros(1, 3, 32, 32))
    assert vectors.shape == (1, 12, 24)
    assert len(vectors[0].unique(dim=0)) == 12


def test_early_retrieval_is_the_official_one():
    metrics = finetune.early_retrieval(GOLDEN["slfir.ranks"], photos=20)
    for ours, theirs in (("m@A", "mA"), ("m@B", "mB"), ("w@A", "wA"), ("w@B", "wB")):
        assert metrics[ours] == pytest.approx(GOLDEN[f"slfir.{theirs}"].item(), abs=1e-9)


def test_ties_and_nan_count_as_misses_in_sketch_retrieval():
    similarity = torch.tensor([
        [[0.5, 0.1, 0.5], [0.9, 0.1, 0.2]],
        [[0.2, 0.2, 0.2], [0.3, 0.1, 0.0]],
        [[0.0, 0.0, torch.nan], [0.0, 0.1, 0.2]]])
    assert finetune.sketch_ranks(similarity).tolist() == [[2, 1], [3, 2], [3, 1]]


def test_balanced_accuracy_is_the_mean_of_both_recalls():
    predicted = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1]]).bool()
    truth = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 1], [0, 0, 1]]).bool()   # all have the third
    accuracy, balanced = finetune.accuracies(predicted, truth)
    assert accuracy.tolist() == [50, 75, 100]
    assert balanced.tolist() == pytest.approx([100 / 3, 50, np.nan], nan_ok=True)


def test_chance_recalls_match_random_rankings():
    rng = default_rng(0)
    image_of_text = torch.tensor([0, 0, 0, 1, 2, 2, *range(3, 20)])
    samples = Counter()
    for _ in range(3000):
        scores = torch.from_numpy(rng.random((20, 23)))
        samples.update(evaluation.retrieval_metrics(scores, scores.T, image_of_text))
    expected = evaluation.chance_recalls(image_of_text)
    for name in expected:
        assert samples[name] / 3000 == pytest.approx(expected[name], abs=1)
    of_three = evaluation.chance_recalls(torch.arange(3))
    assert [*of_three.values()] == pytest.approx([100 / 3, 100, 100] * 2)


def test_clip_loss_is_the_symmetric_cross_entropy_over_identities():
    rows = unit(5, 8).double().requires_grad_()
    keys = unit(5, 8).double().requires_grad_()
    identity = torch.tensor([3, 1, 3, 4, 5])
    targets = F.normalize((identity[:, None] == identity).double(), p=1)
    logits = rows @ keys.T / 0.07
    of_rows = F.cross_entropy(logits, targets)
    of_keys = F.cross_entropy(logits.T, targets)
    expected = with_gradients((of_rows + of_keys) / 2, (rows, keys))
    loss = clip_loss(rows, keys, rows, keys, identity, identity, 0.07)
    for ours, theirs in zip(with_gradients(loss, (rows, keys)), expected):
        close(ours, theirs, 1e-9)


def test_equal_captions_may_be_negatives_or_positives_of_each_other():
    images = unit(5, 8).double().requires_grad_()
    captions = unit(2, 8).double().requires_grad_()
    caption_of_image = torch.tensor([0, 1, 0, 0, 1])
    results = []
    for identity in (torch.arange(5), caption_of_image):
        texts = captions[caption_of_image]
        loss = clip_loss(images, texts, images, texts, identity, identity, 0.07)
        results.append(with_gradients(loss, (images, captions)))
    for negatives, positives in zip(*results):
        close(negatives, positives, 1e-12)


HEADS = "student.image_projection", "student.text_projection", "matching_head", "temperature"


@parametrize("task, epochs", [
    ("retrieval", 10),
    ("sketch", 50)])
def test_finetuning_changes_only_heads_without_dropout(tuned, model, printed, task, epochs):
    """From random weights: those of a short run hardly improve within a few epochs."""
    torch.manual_seed(0)
    saved = FLIP(model.config, model.tokenizer).checkpoint()
    torch.save(saved, "flip.pt")
    rows = finetune.finetune(tuned(task, checkpoint="flip.pt", epochs=epochs))
    names, metrics = zip(*rows)
    table = Path(task, "table.md").read_text()
    assert table in printed()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [*names]
    assert names[-1].startswith("random weights, tuned")
    Image.open(f"{task}/{task}.png").load()
    tuned_weights = torch.load(f"{task}/flip.pt")["model"]
    before = saved["model"]
    changed = [name for name in before if not torch.equal(tuned_weights[name], before[name])]
    assert changed
    assert all(name.startswith(HEADS) for name in changed)

    saved["flip"]["bert"]["dropout"] = 0.9
    torch.save(saved, "flip.pt")
    again = finetune.finetune(tuned(
        task, checkpoint="flip.pt", epochs=epochs, random=False, out="again"))
    assert [found for _, found in again] == [*metrics[:len(again)]]


def test_attributes_are_trained_on_celeba_with_a_row_per_fraction(tuned, tmp_path, monkeypatch):
    """The picture is that of the largest fraction."""
    write_celeba(tmp_path, count=40, held_out=5)
    config = tuned("attributes", data=str(tmp_path), fractions=(1.0, 0.1), random=False)
    plot = MagicMock(wraps=finetune.plot_accuracies)
    monkeypatch.setattr(finetune, "plot_accuracies", plot)
    rows = dict(finetune.finetune(config))
    *_, title, _ = plot.call_args.args
    assert "head trained on 100 % of" in title
    assert [*rows] == [
        "majority class",
        f"{config.checkpoint}, tuned on 10 % of the faces",
        f"{config.checkpoint}, tuned on 100 % of the faces"]
    share = open_faces(tmp_path, "test").attributes.mean(0)
    majority = 100 * np.maximum(share, 1 - share).mean()
    header, _, first, *_ = Path("attributes/table.md").read_text().splitlines()
    assert header == "| attributes, % | accuracy | balanced accuracy |"
    assert first == f"| majority class | {majority:.1f} | 50.0 |"
    Image.open("attributes/attributes.png").load()


def test_trained_head_predicts_attributes(tuned, model, pictures, paths, monkeypatch, printed):
    """Those of its own metrics; only with the image encoder that it was trained on."""
    config = tuned("attributes")
    splits = finetune.open_splits(config, 48)
    task = finetune.Attributes(model, splits, config)
    _, details = task.metrics("test")
    folder = Path("attributes")
    folder.mkdir()
    finetune.save_task(task, details, folder)
    path = folder / "head.pt"
    head, labels = finetune.load_head(path, model)
    assert labels == list(ATTRIBUTES)
    images = [splits["test"].picture(i) for i in range(8)]
    expected = task.logits(task.vectors["test"]).sigmoid()
    close(finetune.predict_attributes(model, head, images), expected.detach(), 2e-3)

    set_arguments(monkeypatch, "finetune.py", "attributes", "--checkpoint", config.checkpoint,
                  "--out", ".", "--predict", *paths[:2])
    printed()
    finetune.main()
    header, _, first, *_ = printed().splitlines()
    assert header == f"| probability, % | {paths[0]} | {paths[1]} |"
    percent = 100 * finetune.predict_attributes(model, head, paths[:2])[:, 0]
    assert first == f"| 5_o_Clock_Shadow | {percent[0]:.0f} | {percent[1]:.0f} |"

    model.student.image_projection.bias.data[0] += 1
    assert "trained on another --checkpoint" in error_of(finetune.load_head, path, model)
    set_arguments(monkeypatch, "finetune.py", "sketch", "--predict", paths[0])
    assert "expected the task attributes" in error_of(finetune.main)


@pytest.fixture
def two_captions_each(tmp_path):
    """A folder of images with two captions of the grammar each, 12 of them for test."""
    write_mm_celeba(tmp_path, (*range(2, 42), *range(24000, 24012)))
    for n in range(12):
        texts = f"{TEXTS[n]}\n{TEXTS[n + 12]}"
        write_files(tmp_path, {f"text/celeba-caption/{24000 + n}.txt": texts})
    return tmp_path


IMAGE_OF_TEXT = torch.arange(12).repeat_interleave(2)


def test_retrieval_is_trained_and_evaluated_on_images_with_several_captions(
        tuned, two_captions_each):
    config = tuned("retrieval", data=str(two_captions_each), random=False, test=0)
    rows = dict(finetune.finetune(config))
    assert "already contains results; remove the folder" in error_of(finetune.finetune, config)

    tuned_model = FLIP.from_pretrained("retrieval")
    test = open_faces(two_captions_each, "test")
    evaluation_set = EvaluationSet.from_faces(test)
    same(evaluation_set.image_of_text, IMAGE_OF_TEXT)
    assert evaluation_set.texts[2:4] == test.captions[1]
    metrics, scores = evaluation.evaluate(tuned_model, evaluation_set, config)
    assert metrics == rows[f"{config.checkpoint}, tuned"]
    own = scores[torch.arange(24), IMAGE_OF_TEXT]
    better = (scores > own[:, None]).sum(1)
    assert metrics["img_r5"] == pytest.approx(100 * (better < 5).double().mean().item())
    assert 0 < metrics["img_r5"] < 100
    assert rows["chance"]["img_r10"] == pytest.approx(1000 / 12)


def test_picture_of_retrieval_frames_the_own_image_of_each_text(two_captions_each, monkeypatch):
    sheet = MagicMock()
    monkeypatch.setattr("common.pictures.contact_sheet", sheet)
    evaluation_set = EvaluationSet.from_faces(open_faces(two_captions_each, "test"))
    scores = torch.rand(24, 12)
    plot_retrieval(evaluation_set, scores, "x.png", queries=24, top=12)
    framed = []
    for _, tiles in sheet.call_args.args[0]:
        framed += [label for _, label, is_own in tiles if is_own]
    assert framed == [f"score {score:.1f}" for score in scores[torch.arange(24), IMAGE_OF_TEXT]]


@parametrize("with_captions", [True, False])
def test_sketches_are_trained_with_captions_or_without_a_vocabulary(
        tuned, saved, tmp_path, monkeypatch, with_captions):
    write_sde(tmp_path)
    if with_captions:
        records = [record(f"photo1/image01{n:02d}") for n in range(15)]
        write_files(tmp_path, {"train.json": records})
    else:
        saved["tokenizer"] = None
    torch.save(saved, "flip.pt")
    numbers = []

    def caption(faces, i, rng):
        numbers.append(rng.random())
        return "a man"
    monkeypatch.setattr(data.Faces, "caption", caption)
    config = tuned("sketch", checkpoint="flip.pt", data=str(tmp_path), random=False)
    trained = FLIP.from_pretrained(config.checkpoint)
    task = finetune.Sketch(trained, finetune.open_splits(config, 48), config)
    task.loss(torch.arange(8), 0).backward()
    assert len(numbers) == len(set(numbers)) == 13 * with_captions
    assert trained.student.image_projection.weight.grad is not None
    assert trained.matching_head.weight.grad is None
    assert (trained.student.text_projection.weight.grad is not None) == with_captions
    assert task.loss(torch.arange(8), 0) != task.loss(torch.arange(8), 0), "at random stages"
    assert len(finetune.finetune(config)) == 3


def test_splits_have_at_most_the_faces_asked_for_and_retrieval_decodes_its_training_images_once(
        tuned, tmp_path):
    folder = write_celeba(tmp_path / "a", count=40, held_out=5)
    write_files(folder, {"img_align_celeba/000001.jpg": "not an image"})            # in training
    for test, expected in ((3, 3), (0, 5), (100, 5)):
        splits = finetune.open_splits(tuned("retrieval", data=str(folder), test=test), 48)
        assert [len(faces) for faces in splits.values()] == [30, 4, expected]
    attributes = tuned("attributes", data=str(folder))
    assert "1 of 30 are invalid" in error_of(finetune.open_splits, attributes, 48)

    folder = write_captions(tmp_path / "b")
    captioned = tuned("retrieval", data=str(folder), columns=("pcfg",))
    assert "expected text in pcfg" in error_of(finetune.open_splits, captioned, 48)


def test_interrupted_finetuning_leaves_no_table_and_can_be_started_again(tuned, monkeypatch):
    config = tuned("attributes", fractions=(1.0,))
    with_random_weights = failing_at(1, KeyboardInterrupt, finetune.train_heads)
    monkeypatch.setattr(finetune, "train_heads", with_random_weights)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(config)
    assert Path("attributes/head.pt").exists()
    assert not Path("attributes/table.md").exists()
    assert len(finetune.finetune(config)) == 3


def test_fractions_are_nested_samples_chosen_by_the_seed_and_get_equal_steps(
        tuned, monkeypatch):
    def samples_of(seed):
        heads = MagicMock()
        monkeypatch.setattr(finetune, "train_heads", heads)
        finetune.finetune(tuned("attributes", out=str(seed), seed=seed, random=False,
                                faces=20, fractions=(0.1, 1.0, 0.01, 0.5)))
        calls = [call.args for call in heads.call_args_list]
        assert [steps for _, _, steps, _ in calls] == [9] * 4
        return [set(samples.tolist()) for _, samples, _, _ in calls]
    one, two, ten, all = samples_of(seed=3)
    assert [len(one), len(two), len(ten)] == [1, 2, 10]
    assert one < two < ten < all == set(range(20))
    assert samples_of(seed=4)[2] != ten


@parametrize("values, best", [("543210", 0), ("179892", 2), ("123456", 5)])
def test_weights_with_the_best_validation_metric_are_kept_even_if_initial(
        tuned, model, values, best):
    config = tuned("attributes")
    task = finetune.Attributes(model, finetune.open_splits(config, 48), config)
    weights = []

    def metrics(split):
        assert split == "val"
        value = values[len(weights)]
        weights.append(copy.deepcopy(task.trained.state_dict()))
        return {"accuracy": float(value)}, None
    task.metrics = metrics
    finetune.train_heads(task, np.arange(24), 9, Log(Path("log.jsonl")))
    assert len(weights) == 6
    same(task.trained.state_dict(), weights[best])


# ---- search.py: against scores of single images, and where parts of a face are drawn -------------
def test_search_prints_the_best_results_and_skips_other_files(
        uninterrupted, model, tmp_path, monkeypatch, printed):
    folder = write_celeba(tmp_path)
    query = "a smiling woman"
    (folder / "notes.png").write_text("not an image")
    set_arguments(monkeypatch, "search.py", "--checkpoint", uninterrupted / "flip.pt", "--top", 4,
                  "--images", folder, "--out", "results/sheet.bmp", query)
    with pytest.warns(UserWarning, match="skipped: .*notes.png is not an image"):
        search.main()
        features = search.encode_folder(model, folder, "features")
    output = printed()
    assert "best of 6 faces" in output
    results = search.search(model, features, query, top=4)
    assert output.splitlines()[-5:-1] == [*map(str, results)]


@pytest.fixture
def encode(model, tmp_path, monkeypatch):
    """A function that encodes a folder and checks which of three images it reads."""
    write_files(tmp_path, grey_images(["a/0.png", "a/b/1.png", "c/2.png"]))
    opened = []

    def load(path, size):
        opened.append(path)
        return load_image(path, size=size)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "load_image", load)

    def encode(folder, reads):
        opened.clear()
        features = search.encode_folder(model, folder, "features")
        assert sorted(opened) == [str(tmp_path / path) for path in reads.split()]
        return features
    return encode


def test_features_are_cached_for_a_folder_by_any_name(tmp_path, encode):
    folder = tmp_path / "a"
    os.mkfifo(folder / "pipe.png")                              # is skipped
    assert [*encode(folder, "a/0.png a/b/1.png")] == [f"{folder}/0.png", f"{folder}/b/1.png"]
    assert [*encode("a", "")] == ["a/0.png", "a/b/1.png"]
    (tmp_path / "link").symlink_to("a")
    assert [*encode("link", "")] == ["link/0.png", "link/b/1.png"]


def test_only_changed_images_are_encoded_again(tmp_path, encode):
    folder = tmp_path / "a"
    before = encode(folder, "a/0.png a/b/1.png")
    encode("c", "c/2.png")                                      # folders keep each other's features
    plain("red").save(folder / "3.png")
    os.utime(folder / "0.png", (1, 1))                          # changes the metadata only
    after = encode(folder, "a/0.png a/3.png")
    assert len(after) == 3
    same({path: after[path] for path in before}, before)
    (folder / "b/1.png").unlink()
    assert [*encode(folder, "")] == [f"{folder}/0.png", f"{folder}/3.png"]
    encode("c", "")


def test_damaged_features_are_named_and_those_of_another_model_are_encoded_again(
        model, tmp_path, encode):
    encode("c", "c/2.png")
    [path] = Path("features").iterdir()
    saved = path.read_bytes()
    for content in (b"", b"no weights", saved[:-9]):
        path.write_bytes(content)
        assert f"{path} is damaged" in error_of(encode, "c", "")
    path.write_bytes(saved)
    bias = model.student.image_projection.bias.data
    unchanged = bias.clone()
    bias[0] += 1
    encode("c", "c/2.png")
    bias.copy_(unchanged)
    encode("c", "")                                 # two models keep each other's features


def test_invalid_images_are_skipped_and_grey_ones_warned_of(tmp_path, encode):
    with pytest.warns(UserWarning, match="most images are grey"):
        encode("c", "c/2.png")
    write_files(tmp_path, {"a/0.png": "damaged", "a/b/1.png": "damaged"})
    with pytest.warns(UserWarning, match="skipped: .*0.png"):
        assert "a: expected images (.jpg" in error_of(encode, "a", "a/0.png a/b/1.png")


def beyond_silence_of(model, images, texts, score=FLIP.score):
    """Scores of images and texts, without three quarters of the empty text's."""
    captions = model.tokenizer([*texts, ""])
    scores = score(model, images, captions)
    return scores[:, :-1] - 0.75 * scores[:, -1:]


def test_patch_attributions_sum_to_the_difference_from_the_baseline(model):
    images = [Image.fromarray(image) for image in noise_faces(3, 48).images]
    baseline = model.preprocess(images[0])[None]
    attributions = search.attribute_patches(model, images, "a man", baseline, steps=20)
    scores = beyond_silence_of(model, images, ["a man"])[:, 0]
    close(attributions.sum((1, 2)), scores - scores[0], 1e-3)

    changed = np.array(images[0])
    changed[8:16, 40:] = 0          # one patch differs
    [attributions] = search.attribute_patches(model, [changed], "a man", baseline)
    assert attributions[1, 5] != 0
    attributions[1, 5] = 0
    assert attributions.abs().max() == 0


def test_mean_image_is_the_mean_of_images_from_all_parts_of_a_list(model, pictures):
    pixels = torch.stack([model.preprocess(picture) for picture in pictures])
    close(search.mean_image(model, pictures), pixels.mean(0, keepdim=True))
    close(search.mean_image(model, pictures, count=2), pixels[::2].mean(0, keepdim=True))


@parametrize("query, warning", [
    ("a goatee with freckles", "not in the model's vocabulary: freckles"),
    ("a man Not glasses", "'Not' excludes nothing; use --without")])
def test_unknown_words_and_negations_of_a_query_are_named(model, features, query, warning):
    with pytest.warns(UserWarning, match=warning):
        search.search(model, features, query)


@parametrize("query, without", [
    (" ", []),
    ("a man", ["the freckles"])])
def test_queries_and_exclusions_without_a_known_word_are_rejected(model, features, query, without):
    assert "no word of" in error_of(search.search, model, features, query, without)


def test_search_needs_a_sentence_or_an_image_and_a_positive_number(model, features, paths):
    expected = "expected a sentence or an image"
    assert expected in error_of(search.search, model, features)
    assert expected in error_of(search.search, model, features, "a man", image=paths[0])
    assert "expected at least 1" in error_of(search.search, model, features, "a man", top=0)


def test_query_is_split_into_the_phrases_that_describe_a_face():
    query = "She is a smiling woman with blond hair and freckles, who is wearing a hat and a tie."
    phrases = search.split_phrases(query, TOKENIZER)
    assert phrases == ["a smiling woman", "blond hair", "a hat", "a tie"]


def assert_found(results, paths, expected):
    """The results are all images, in descending order of the first number expected of each."""
    order = expected[:, 0].argsort(descending=True)
    assert [result.path for result in results] == [paths[i] for i in order]
    numbers = expected.shape[1]
    close(torch.tensor([result[1:1 + numbers] for result in results]), expected[order])


@parametrize("without", [[], ["glasses"], ["glasses", "a goatee"]])
def test_scores_of_the_exclusions_are_subtracted(model, paths, features, without):
    texts = ["a man", *without]
    weights = torch.tensor([1.0] + [-1 / len(texts)] * len(without))
    scores = beyond_silence_of(model, paths, texts) @ weights
    cosines = cosines_of(model, paths, ["a man"])[:, 0]
    matches = model.match_probability(paths, "a man")[:, 0]
    results = search.search(model, features, "a man", without, top=6)
    assert_found(results, paths, torch.stack([scores, cosines, matches], 1))


@parametrize("without", [[], ["glasses", "a goatee"]])
def test_image_is_searched_for_by_its_cosine(model, pictures, paths, features, without):
    likeness = (model.encode_image(pictures) @ model.encode_image(paths[2]).T)[:, 0]
    excluded = beyond_silence_of(model, pictures, without, cosines_of).sum(1)
    scores = likeness - excluded / (len(without) + 1)
    results = search.search(model, features, without=without, image=pictures[2])
    assert_found(results, paths, torch.stack([scores, likeness], 1))
    assert str(results[0]).split()[2] == "-"


# {query [- what is excluded]...: attributes of the faces that are right}
ONE = {
    "a pale person": "Pale_Skin",
    "pale skin": "Pale_Skin",
    "a person with fair skin": "Pale_Skin",
    "a girl": "!Male",
    "a boy": "Male",
    "a young girl": "!Male Young",
    "a happy person": "Smiling",
    "a happy woman": "Smiling !Male",
    "a bald guy": "Bald Male",
    "a bald person": "Bald",
    "a person with a hat": "Wearing_Hat",
    "a person wearing glasses": "Eyeglasses",
    "a person in glasses": "Eyeglasses",
    "blond hair": "Blond_Hair",
    "a blonde": "Blond_Hair",
    "gray hair": "Gray_Hair",
    "black hair": "Black_Hair",
    "brown hair": "Brown_Hair",
    "wavy hair": "Wavy_Hair",
    "curly hair": "Wavy_Hair",
    "straight hair": "Straight_Hair",
    "bangs": "Bangs",
    "a mustache": "Mustache",
    "a goatee": "Goatee",
    "a person with a beard": "!No_Beard",
    "a bearded man": "!No_Beard",
    "sideburns": "Sideburns",
    "a double chin": "Double_Chin",
    "a chubby person": "Chubby",
    "thick eyebrows": "Bushy_Eyebrows",
    "arched eyebrows": "Arched_Eyebrows",
    "bags under the eyes": "Bags_Under_Eyes",
    "big lips": "Big_Lips",
    "a big nose": "Big_Nose",
    "a pointy nose": "Pointy_Nose",
    "a smile": "Smiling",
    "lipstick": "Wearing_Lipstick",
    "a person with earrings": "Wearing_Earrings",
    "a necklace": "Wearing_Necklace",
    "a tie": "Wearing_Necktie",
    "an old person": "!Young",
    "an elderly man": "!Young Male",
    "rosy cheeks": "Rosy_Cheeks",
    "a blurry photo": "Blurry",
    "narrow eyes": "Narrow_Eyes",
    "an oval face": "Oval_Face",
    "stubble": "5_o_Clock_Shadow",
    "a receding hairline": "Receding_Hairline",
    "high cheekbones": "High_Cheekbones",
    "heavy makeup": "Heavy_Makeup",
    "an open mouth": "Mouth_Slightly_Open",
    "an attractive person": "Attractive",
    "a beardless man": "No_Beard Male"}
COMBINATIONS = {
    "a woman with glasses and lipstick": "!Male Eyeglasses Wearing_Lipstick",
    "a smiling man with a tie": "Male Smiling Wearing_Necktie",
    "an old man with a mustache": "Male !Young Mustache",
    "a young woman with blond hair": "!Male Young Blond_Hair",
    "a bald man with glasses": "Male Bald Eyeglasses",
    "a smiling woman with wavy hair": "!Male Smiling Wavy_Hair",
    "a man with a goatee and black hair": "Male Goatee Black_Hair",
    "an old woman with earrings": "!Male !Young Wearing_Earrings",
    "a young man with a hat": "Male Young Wearing_Hat",
    "a woman with a necklace and bangs": "!Male Wearing_Necklace Bangs",
    "a chubby man with a double chin": "Male Chubby Double_Chin",
    "a woman with black hair and a big nose": "!Male Black_Hair Big_Nose",
    "a man with gray hair and glasses": "Male Gray_Hair Eyeglasses",
    "a smiling girl with brown hair": "!Male Smiling Brown_Hair",
    "a pale woman with lipstick": "!Male Pale_Skin Wearing_Lipstick",
    "a happy guy with thick eyebrows": "Male Smiling Bushy_Eyebrows",
    "glasses and a hat": "Eyeglasses Wearing_Hat",
    "rosy cheeks and earrings": "Rosy_Cheeks Wearing_Earrings",
    "a bearded man with bags under his eyes": "!No_Beard Bags_Under_Eyes",
    "an old man with sideburns": "Male !Young Sideburns"}
EXCLUSIONS = {
    "a man - a beard": "Male No_Beard",
    "a woman - glasses": "!Male !Eyeglasses",
    "an old man - a beard - glasses": "Male !Young No_Beard !Eyeglasses",
    "a young woman - blond hair": "!Male Young !Blond_Hair",
    "a smiling person - lipstick": "Smiling !Wearing_Lipstick",
    "a woman with earrings - a necklace": "!Male Wearing_Earrings !Wearing_Necklace",
    "a man with black hair - a hat - a tie": "Male Black_Hair !Wearing_Hat !Wearing_Necktie",
    "a woman with bangs - a smile": "!Male Bangs !Smiling",
    "a man with a mustache - glasses": "Male Mustache !Eyeglasses",
    "an old woman - gray hair - glasses - a double chin":
        "!Male !Young !Gray_Hair !Eyeglasses !Double_Chin",
    "a person with wavy hair - bangs": "Wavy_Hair !Bangs",
    "a man with a big nose - bags under the eyes": "Male Big_Nose !Bags_Under_Eyes"}


def faces_with(names, attributes):
    """Which of the faces have the attributes and lack those that follow "!", (N,) bool."""
    found = np.ones(len(attributes), dtype=bool)
    for name in names.split():
        has = attributes[:, ATTRIBUTES.index(name.strip("!"))]
        found &= has != name.startswith("!")
    return found


@pytest.mark.slow
@parametrize("queries, top, expected", [
    (ONE, 5, 95),
    (COMBINATIONS, 5, 75),
    (EXCLUSIONS, 10, 88)])
def test_queries_find_the_right_faces_after_the_default_run(
        default_run, tmp_path, queries, top, expected):
    """In percent of the `top` first. `pytest -m slow -k queries_find -s` prints each query's."""
    model = FLIP.from_pretrained(default_run[0].out)
    toyfaces.write_faces(tmp_path, 1000, 48, seed=31)
    features = search.encode_folder(model, tmp_path, "features")
    attributes = np.concatenate([faces.attributes for faces in open_splits(tmp_path)])

    precisions = []
    for query, names in queries.items():
        right = dict(zip(features, faces_with(names, attributes)))
        text, *without = query.split(" - ")
        results = search.search(model, features, text, without, top)
        precisions.append(100 * np.mean([right[result.path] for result in results]))
        base_rate = 100 * np.mean([*right.values()])
        print(f"{query} | {precisions[-1]:.0f} | {base_rate:.1f}")
    print(f"mean of {len(queries)} queries, first {top}: {np.mean(precisions):.1f} %")
    assert np.mean(precisions) >= expected


PARTS = {           # phrase: attribute
    "glasses": "Eyeglasses",
    "a hat": "Wearing_Hat",
    "a mustache": "Mustache",
    "earrings": "Wearing_Earrings",
    "a goatee": "Goatee",
    "bangs": "Bangs",
    "a double chin": "Double_Chin",
    "thick eyebrows": "Bushy_Eyebrows",
    "a tie": "Wearing_Necktie",
    "a necklace": "Wearing_Necklace",
    "lipstick": "Wearing_Lipstick",
    "sideburns": "Sideburns",
    "bags under the eyes": "Bags_Under_Eyes",
    "a big nose": "Big_Nose"}


@pytest.mark.slow
def test_heatmap_of_a_phrase_peaks_where_its_part_of_the_face_is(default_run):
    """In a patch that differs between drawings with and without it, by at least a tenth of what the
    most different one does. `pytest -m slow -k heatmap -s` prints each phrase's percentage."""
    model = FLIP.from_pretrained(default_run[0].out)
    faces = data.load_toy_faces(100, 48, seed=41, folder="drawn")
    baseline = search.mean_image(model, [faces.picture(i) for i in range(100)])
    percentages = []
    for phrase, name in PARTS.items():
        pairs = report.counterfactual_pairs(ATTRIBUTES.index(name), 20, 48)
        absent, present = (torch.stack([*map(model.preprocess, faces)]) for faces in zip(*pairs))
        difference = F.avg_pool2d((present - absent).abs().mean(1), 8).flatten(1)       # (20, 36)
        is_part = difference > 0.1 * difference.amax(1, keepdim=True)
        attributions = search.attribute_patches(model, present, phrase, baseline)
        peak = attributions.flatten(1).argmax(1, keepdim=True)
        percentages.append(100 * is_part.gather(1, peak).double().mean().item())
        chance = 100 * is_part.double().mean()
        print(f"{phrase} | {percentages[-1]:.0f} | {chance:.0f}")
    print(f"mean: {np.mean(percentages):.1f} %")
    assert np.mean(percentages) >= 80


def test_page_answers_a_query_with_a_contact_sheet_and_a_list(model, tmp_path, monkeypatch):
    """A mock takes gradio's place and records the function that answers."""
    gradio = MagicMock()
    features = search.encode_folder(model, write_celeba(tmp_path), "features")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(search, "stop_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
    search.serve(model, features, "a man", "", 3)
    answer = gradio.Interface.call_args.args[0]
    skipped = answer("a smiling woman", "a goatee, eyeglases", True)
    assert skipped == (gradio.skip(), gradio.skip())
    assert "eyeglases" in gradio.Warning.call_args.args[0]

    results = search.search(model, features, "a smiling woman", ["a goatee", "bangs"], 3)
    sheet, listed = answer("a smiling woman", "a goatee, bangs", False)
    assert listed.splitlines() == [*map(str, results)]
    explained, _ = answer("a smiling woman", "a goatee, bangs", True)
    assert 3 * 128 < sheet.width < 4 * 128 < explained.width


# ---- report.py: against known duplicates and damage ----------------------------------------------
def test_report_counts_duplicates_damage_and_words(tmp_path, monkeypatch, printed):
    text = "a man with a hat and big eyes"
    records = [record(i, text[:20 + i]) for i in range(30)]
    write_files(tmp_path, {"images/29.png": "not an image", "train.json": records, "val.json": []})
    pixels = noise_pixels(30, 40, 40, 3)
    for i in range(29):
        image = Image.fromarray(pixels[max(i, 5)])          # the first six are equal
        write_files(tmp_path, {f"images/{i}.png": image.resize((60, 50))})
    set_arguments(monkeypatch, "report.py", "--data", tmp_path, "--cache", "cache",
                  "--out", "report/page.png")
    report.main()
    output = printed()
    for line in ("train: 30 faces\n",
                 "29 images, 1 unreadable, 5 copies, mean size 60 x 50 pixels",
                 "30 captions, 8 of them different",
                 ", 6 to 8 (10 to 75)",
                 "val: expected at least one face in this split"):
        assert line in output, line


def test_counterfactuals_are_the_same_face_with_and_without_an_attribute():
    for absent, present in report.counterfactual_pairs(ATTRIBUTES.index("Wearing_Hat"), 3, 96):
        differs = (np.asarray(absent) != np.asarray(present)).any(-1)
        assert differs[:40].any()
        assert not differs[60:].any()
    for absent, present in report.counterfactual_pairs(ATTRIBUTES.index("Pale_Skin"), 3, 96):
        assert np.mean(present) > np.mean(absent)


def test_counterfactual_is_right_if_the_score_of_the_face_with_the_attribute_is_higher(
        model, printed):
    right = torch.tensor([0.0, 1.0, 0.0, 1.0])
    logits = torch.stack([0 * right, -1.1 * right], -1)
    model.match_logits = lambda *_: (logits, right)                         # their sum is wrong
    model.config = replace(model.config, rerank_by_pmi=False)
    report.report_counterfactuals(model, "card.png", count=2)
    lines = printed().splitlines()
    assert lines[-1] == "| mean | 100 | 0 |"
    assert len(lines) == 1 + 2 + 40 + 1


# ---- bench.py: it compares the kernels with PyTorch's functions itself ---------------------------
def test_bench_prints_its_tables(monkeypatch, printed):
    """On small inputs, each measured once and without torch.compile."""
    def seconds(call):
        call()
        return 0.001
    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bench.bench_attention(images=2)
    bench.bench_contrastive(B=4, Q=50, E=16)
    bench.bench_step(replace(GOLDEN_CONFIG, queue_size=40), B=4, matrix=32)
    output = printed()
    assert output.count("| ours | 1.00 | 1.00 |") == 4
    assert output.count("padded | 1.00 | 1.00 |") == 3
    rows = re.findall(r"(float32|bfloat16) \| 0.00 \| (\d+) \| (\d+) \|", output)
    assert [name for name, *_ in rows] == ["float32", "bfloat16"]
    for _, rate, share in rows:
        assert int(share) == pytest.approx(100 * int(rate) * 1e6 / (2 * 32 ** 3), rel=0.05)


# ---- layout, scripts and pages: against import statements, and the commands on the pages ---------
ORDER = """kernels/__init__ kernels/attention kernels/contrastive common/seeds common/script
    common/images common/pictures common/words common/distributed pretrained optim attention vit
    tokenizer bert losses flip captions optimum drawing/portrait drawing/sketch toyfaces
    readers/index readers/layouts data config evaluation runs train finetune search report bench
    test_all""".split()
COMMANDS = {"finetune", "search", "report", "bench"}


def imports_of(file):
    """The files of ORDER that a file imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files = {name.replace(".", "/") for name in names}
    files |= {f"{name}/__init__" for name in files}
    return files & set(ORDER)


def test_imports_run_down_only():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in paths} == set(ORDER)
    for position, file in enumerate(ORDER):
        imported = imports_of(file)
        assert imported <= set(ORDER[:position]), file
        if file.startswith("common/"):
            assert all(name.startswith("common/") for name in imported), file
        if file != "test_all":
            assert not imported & COMMANDS, file


def test_output_that_its_reader_closes_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, ROOT / "flip.py"], stdout=writer,
                          stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_train_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import torch, train; print(train.__name__)"
    assert run_python("-c", code) == "train\n"


def run_as_script(file):
    runpy.run_path(str(ROOT / file), run_name="__main__")


@parametrize("arguments, message", [
    ("toyfaces.py --out .", "--out .: expected a new or an empty folder, found files"),
    ("search.py --images . --checkpoint nowhere.pt query", "nowhere.pt: expected a file"),
    ("report.py --data nowhere", ".*nowhere: no such folder or file")])
def test_invalid_arguments_of_a_script_end_in_a_one_line_error(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    script, *flags = arguments.split()
    set_arguments(monkeypatch, script, *flags)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run_as_script(script)


def code_blocks(language):
    """The code in this language on the pages, in reading order."""
    pages = [(ROOT / f"{name}.md").read_text() for name in ("README", "DATA", "PAPER", "RESULTS")]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(pages), re.DOTALL)


LESS = {
    "train.py": "--faces 64 --validation 20 --steps 4 --batch_size 8",
    "toyfaces.py": "--count 60",
    "finetune.py": "--faces 16 --validation 3 --test 6 --epochs 1"}


def test_every_command_of_the_pages_works(monkeypatch):
    """On less data, and with stand-ins for downloads; commands for 8 GPUs are only parsed."""
    write_celeba(Path("DIR"), count=40)
    small = ViTConfig(32, 8, 64, 1, 1), BertConfig(81, 64, 1, 1, 66), 16, 4, None
    monkeypatch.setattr(FLIPConfig.__init__, "__defaults__", small)         # instead of base
    torch.save({"model": official_state(FLIP(FLIPConfig()))}, "FLIP-base.pth")
    golden_tokenizer(Path())
    commands = re.split(r"\n| && ", "".join(code_blocks("sh")).strip())
    for command in ["python losses.py", "python flip.py", *commands]:
        program, *arguments = shlex.split(command.replace("bert-base-uncased", "vocab.txt"))
        if program == "torchrun":
            flags = arguments[arguments.index("train.py") + 1:]
            parse_flags(*flags)
        elif program == "python" and arguments[0] != "bench.py":            # has tests of its own
            if "--resume" not in arguments:
                arguments += LESS.get(arguments[0], "").split()
            set_arguments(monkeypatch, *arguments)
            run_as_script(arguments[0])                                     # fails with SystemExit
    [lines] = code_blocks("python")
    exec(lines.replace("000325", "000032"), {})             # DIR has 40 images


def test_results_name_tests_that_exist():
    tests = [name for name in globals() if name.startswith("test_")]
    _, section = (ROOT / "RESULTS.md").read_text().split("## Known failure modes")
    named = re.findall(r"`(\w+_\w+)`", section)
    assert len(named) > 10
    for name in named:
        assert any(name in test for test in tests), name


# ---- compiled kernels: against the compiler's register counts; beside all other tests ------------
FLOATS = "lse delta delta_out queries temperature max_logits weight_sums key_sums".split()
TYPES = dict.fromkeys(FLOATS, "*fp32") | {      # of arguments that are not of the kernel's dtype
    "query_offsets": "*i32", "key_offsets": "*i32",
    "identity": "*i64", "key_identity": "*i64", "seed": "*i64",
    "B": "i32", "K": "i32", "keys_per_program": "i32"}
# bytes of shared memory of a program, at most, by compute capability (CUDA C++ Programming Guide);
# 8.6, 8.9 and 12.0 have less than 8.0 (163 KB) and use as much
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
CASES = [(16, 0.1), (32, 0.1), (48, 0.1), (64, 0.1), (64, 0.0)]     # channels per head, dropout
ATTENTION_CASES = {"bf16": CASES, "fp16": [(64, 0.1)], "fp32": CASES}   # fp16 compiles like bf16


def launched_configs():
    """Yield every launch configuration: kernel name, dtype, compile-time arguments, capability."""
    for capability in SHARED_LIMIT:
        for dtype, cases in ATTENTION_CASES.items():
            for name, (d, dropout) in itertools.product(("fwd", "bwd_dq", "bwd_dkdv"), cases):
                meta = attention_kernels.launch_config(name, d, 4 if dtype == "fp32" else 2)
                meta = meta | {"dropout": dropout}
                if not dropout:
                    meta["seed"] = None
                yield f"{name}_kernel", dtype, meta, capability
        for dtype, E in itertools.product(("fp32", "bf16"), (64, 256)):
            meta = contrastive_kernels.LAUNCH_CONFIG | {"E": E, "BLOCK_E": E}
            yield "sums_kernel", dtype, meta, capability


def compile_one(config):
    """Compile one of the `launched_configs`; returns registers and spilled bytes per thread, and
    bytes of shared memory."""
    name, dtype, meta, capability = config
    module = contrastive_kernels if name == "sums_kernel" else attention_kernels
    kernel = getattr(module, name)
    constants = {name: meta[name] for name in kernel.arg_names if name in meta}
    types = {name: TYPES.get(name, f"*{dtype}") for name in kernel.arg_names}
    signature = types | dict.fromkeys(constants, "constexpr")
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    # PyTorch's allocations are aligned
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options=dict(num_warps=meta["num_warps"], num_stages=meta["num_stages"]))

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return int(registers), int(stack), compiled.metadata.shared


def compile_all():
    """Compile all configurations, which must fit a GPU, and print a row for each."""
    configs = list(launched_configs())
    rows = []
    with distributed.parallel_map(compile_one, configs, "compiling") as results:
        for (name, dtype, meta, capability), (registers, stack, shared) in zip(configs, results):
            size = meta.get("d") or meta["E"]
            rows.append([name, dtype, size, meta.get("dropout", ""), capability / 10,
                         registers, stack, f"{shared / 1024:.1f}"])
            assert not stack, f"use smaller blocks: {rows[-1]}"
            assert shared <= SHARED_LIMIT[capability], f"use smaller blocks: {rows[-1]}"
    compiled = {row[0] for row in rows}
    assert compiled == {"fwd_kernel", "bwd_dq_kernel", "bwd_dkdv_kernel", "sums_kernel"}
    header = ["kernel", "dtype", "d or E", "dropout", "capability",
              "registers", "spilled bytes", "shared KB"]
    print(markdown_table(header, rows))


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """`compile_all`, started before the first test if its own test is selected."""
    if not any("every_shipped_kernel" in item.name for item in request.session.items):
        yield
        return
    command = [sys.executable, "-c", "import test_all; test_all.compile_all()"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_every_shipped_kernel_compiles_for_a100_and_h100_without_spilling(compiling):
    """`pytest test_all.py -k every_shipped_kernel -s` prints registers and shared memory."""
    pytest.importorskip("triton", reason="Triton is available for Linux only")
    printed, errors = compiling.communicate()
    assert compiling.returncode == 0, errors[-2000:]
    print(f"\n{printed}")

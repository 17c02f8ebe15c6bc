"""Use of FLIP from Python, on images and sentences. `flip.FLIP` inherits these methods:

    encode_image, encode_text   features (n, E) of length 1; similarity: their cosines
    match_probability           from the matching head
    score                       what re-ranking ranks by, cosine and matching head together

An image is a path, a PIL image, or a uint8 array or tensor (H, W, 3); a single image or sentence needs no
list. Shapes: see vit.py; I images, T sentences.
"""
import contextlib
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bert import MAX_TOKENS, Captions, words_of
from common.images import iterate_images, load_image

MODE = threading.Lock()


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode without gradients. Blocks may nest or run in several threads; the mode before the
    first is restored when the last one ends."""
    with MODE:
        if model.evaluations == 0:
            model.was_training = model.training
            model.eval()
        model.evaluations += 1
    try:
        with torch.no_grad():
            yield
    finally:
        with MODE:
            model.evaluations -= 1
            if model.evaluations == 0:
                model.train(model.was_training)


class Inference:
    """Methods for a model with `student`, `config`, `tokenizer`, `temperature`, `score_pairs` and
    `rerank_score`. They compute in evaluation mode, without gradients, on the model's device in its dtype."""
    evaluations, was_training = 0, False        # for `eval_mode`

    @property
    def device(self) -> torch.device:
        return self.temperature.device

    @property
    def dtype(self) -> torch.dtype:
        return self.temperature.dtype

    def encode_image(self, images, batch_size: int = 128, errors: str = "raise"):
        """Features (I, E), float32. An image that cannot be read raises ValueError, or FileNotFoundError if
        it does not exist; with errors="skip" it is named in a warning, and its feature is NaN."""
        images = list_images(images)
        features = torch.full((len(images), self.config.embed_dim), torch.nan, device=self.device)
        with eval_mode(self):
            for indices, pixels in self.load_images(images, batch_size, errors):
                features[indices] = self.student.image_features(pixels)
        return features

    def encode_text(self, texts, batch_size: int = 500):
        """Features (T, E), float32. Raises ValueError if a sentence has no word of the vocabulary."""
        with eval_mode(self):
            return self.student.text_features(self.tokenize(texts), batch_size)

    def similarity(self, images, texts):
        """Cosines (I, T)."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def match_probability(self, images, texts):
        """Probability of a match (I, T) from the matching head, from 0 to 1. The head was trained on pairs
        that ITC finds similar; to rank, use `score`."""
        return self.match(images, texts)[0].softmax(-1)[..., 1]

    def score(self, images, texts):
        """What ranks images for a sentence, and sentences for an image: `rerank_score` (I, T). Every pair
        costs a pass of the text encoder, so choose candidates with `similarity` first."""
        return self.rerank_score(*self.match(images, texts)).detach()

    def match(self, images, texts):
        """ITM logits (I, T, 2) and cosines (I, T)."""
        logits, cosines = [], []
        with eval_mode(self):
            captions = self.tokenize(texts)
            text_features = self.student.text_features(captions)
            for _, pixels in self.load_images(images):
                tokens, features = self.student.image_tokens_and_features(pixels)
                logits.append(self.score_pairs(tokens, captions))
                cosines.append(features @ text_features.T)
        return torch.cat(logits).unflatten(0, (-1, len(captions))), torch.cat(cosines)

    def load_images(self, images, batch_size: int = 128, errors: str = "raise"):
        """Yield (indices, pixels (B, 3, S, S)) of batches of images; see `encode_image`."""
        images, skipped = list_images(images), {} if errors == "skip" else None
        read = lambda i, size: read_image(images[i], i, size)
        for indices, pixels in iterate_images(read, len(images), self.config.vit.image_size, "reading images",
                                              batch_size, show=len(images) > 128, errors=skipped):
            yield indices, pixels.to(self.device, self.dtype)
        for message in (skipped or {}).values():
            warnings.warn(f"skipped: {message}")

    def tokenize(self, texts) -> Captions:
        """Sentences -> packed captions. Warns about words that are not in the vocabulary; raises ValueError
        if a sentence has no known word."""
        texts, tokenizer = as_list(texts, str, "sentences"), self.require_tokenizer()
        for text in texts:
            unknown = tokenizer.unknown_words(text)
            if len(unknown) == len(words_of(text)):
                raise ValueError(f"no word of {text!r} is in the model's vocabulary; `search.py --words` "
                                 f"prints all")
            if unknown:
                warnings.warn(f"not in the model's vocabulary: {', '.join(unknown)}")
        captions = tokenizer(texts).to(self.device)
        if captions.sequences.max_length >= MAX_TOKENS:
            warnings.warn(f"the longest sentence fills all {MAX_TOKENS} tokens; the rest, if any, is cut")
        return captions

    def require_tokenizer(self):
        """The tokenizer. Raises ValueError if the model has none."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint contains no vocabulary; pass --vocabulary bert-base-uncased (in "
                             "Python: from_pretrained(vocabulary=...)), a vocab.txt or its folder")
        return self.tokenizer


def as_list(items, kinds, expected: str):
    """One item or an iterable of items -> a list. Raises TypeError if an item is not of these kinds."""
    single = isinstance(items, kinds) or not hasattr(items, "__iter__")
    items = [items] if single else list(items)
    for i, item in enumerate(items):
        if not isinstance(item, kinds):
            raise TypeError(f"expected {expected}, found {type(item).__name__} at index {i}")
    if not items:
        raise ValueError(f"expected {expected}, found an empty list")
    return items


def list_images(images):
    """One image or several, also as an array or tensor (I, H, W, 3), as a list."""
    arrays = (np.ndarray, torch.Tensor)
    images = list(images) if isinstance(images, arrays) and images.ndim == 4 else images
    return as_list(images, (str, Path, Image.Image, *arrays), "paths, PIL images or uint8 arrays (H, W, 3)")


def read_image(image, number: int, size: int) -> Image.Image:
    """Image `number` of a list, size x size pixels in RGB."""
    if isinstance(image, (str, Path)):
        if not Path(image).exists():
            raise FileNotFoundError(f"image {number}: {image} does not exist")
        return load_image(image, size=size)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"image {number}: expected a uint8 array (H, W, 3), found {array.dtype} "
                             f"{array.shape}")
        image = Image.fromarray(array)
    return load_image(image, f"image {number}", size=size)

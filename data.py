"""The training data: batches of augmented faces with captions (FLIP paper, section 4.2).

    Faces          the images of one split of a data set, with captions, attributes or sketches
    augment        FLIP's random augmentation of an image
    FaceDataset    samples of image, caption and identity, in an endless stream of batches

`open_faces` opens a data set on disk (readers/index.py says how), `load_toy_faces` the drawn faces.

Departures from the official code: a face without captions gets a new caption from the grammar
(captions.py) in every epoch; the official code uses a stored one. The order of the samples is a
function of (seed, epoch), and caption and augmentation are functions of (seed, epoch, index), so a
run resumed at any step, with any number of workers, sees the batches of an uninterrupted one. If an
image is damaged, its name is printed and the next face is used instead.
"""
import itertools
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import toyfaces
from captions import ATTRIBUTES, sample_caption
from common.distributed import iterate_with_workers, start_worker
from common.images import load_image, normalize_batch
from common.seeds import random_stream
from readers.index import TarImage, check_invalid, open_split, require_few
from readers.layouts import LAYOUTS


@dataclass
class Faces:
    """I face images with optional attributes, captions and sketches. For a data set on disk, all
    fields are read from a memory-mapped file, as numpy arrays or, for lists of texts and paths, as
    `readers.index.Column`s, which are indexed like arrays."""
    name: str                       # "CelebA train"; also the seed of generated captions
                                    # to evaluate on
    images: object                  # uint8 (I, S, S, 3), or a sequence of Path or TarImage
    identity: np.ndarray            # int64 (I,): equal numbers mean the same person
    attributes: object = None       # bool (I, 40), in the order of ATTRIBUTES
    captions: object = None         # a list of texts per image; None: the grammar writes them
    sketches: object = None         # uint8 (I, stages, S, S), white on black, or per image the
                                    # paths of its sketch at each stage
    digest: str = ""                # of the whole split; changes if any image or annotation
                                    # does

    def __post_init__(self):
        for values in (self.identity, self.attributes, self.captions, self.sketches):
            assert values is None or len(values) == len(self.images) > 0, self.name
        if self.attributes is not None:
            assert self.attributes.shape[1] == len(ATTRIBUTES), self.name

    def __len__(self):
        return len(self.images)

    def picture(self, i: int, size: int | None = None) -> Image.Image:
        """Face i in RGB, resized to size x size if a size is given. Raises ValueError if its file
        is damaged or not an image."""
        return self._load(self.images[i], size)

    def _load(self, stored, size=None):
        if isinstance(stored, TarImage):
            return stored.open(size)
        return load_image(stored, size=size)

    @property
    def has_text(self):
        return self.captions is not None or self.attributes is not None

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """A random caption of face i or, without captions, a new one from the grammar."""
        if self.captions is not None:
            captions = self.captions[i]
            return captions[rng.integers(len(captions))]
        return sample_caption(self.attributes[i], rng)[0]

    @property
    def sketch_stages(self):
        """Number of stages in which each sketch is drawn."""
        return len(self.sketches[0])

    def sketch(self, i: int, t: int) -> Image.Image:
        """The sketch of face i at stage t (counted from 0) in RGB, dark on light: encoders
        trained on photos distinguish such sketches best. FS2K-SDE's are stored white on black."""
        image = self._load(self.sketches[i][t]).convert("L")
        if np.asarray(image).mean() < 127:
            image = ImageOps.invert(image)
        return image.convert("RGB")

    def subset(self, indices) -> "Faces":
        chosen = np.asarray(indices, dtype=np.int64)
        parts = {}
        for name in ("images", "identity", "attributes", "captions", "sketches"):
            values = getattr(self, name)
            if values is not None:
                parts[name] = values[chosen]
        return replace(self, **parts)


def open_faces(path: str, split: str, cache: str = "cache",
               columns: tuple = ("caption", "face_caption")) -> Faces:
    """A split ("train", "val" or "test") of the data set at `path`, a folder or a JSON list, whose
    layout is recognised by its files (readers/layouts.py). Raises ValueError if over 1 % of the
    records are invalid."""
    return Faces(**open_split(path, split, LAYOUTS, cache, columns))


def load_toy_faces(count: int, size: int, seed: int, folder: str, stages: int = 0) -> Faces:
    """`count` drawn faces, size x size pixels, with `stages` stages of a sketch, cached in
    `folder`."""
    drawn, version = toyfaces.draw_cached(count, size, seed, folder, stages)
    attributes = np.array(drawn["attributes"])
    return Faces(f"drawn faces (seed {seed})", drawn["picture"], np.arange(count), attributes,
                 sketches=drawn["sketches"] if stages else None, digest=version)


def readable(faces: Faces, size: int) -> Faces:
    """The faces whose images can be read at this size. Prints the others by name; raises ValueError
    if they exceed 1 %."""
    valid = []
    errors = []
    for i in tqdm(range(len(faces)), "checking images", leave=False):
        try:
            faces.picture(i, size)
            valid.append(i)
        except ValueError as error:
            errors.append(str(error))
    check_invalid(errors, len(faces), faces.name, shown=None)
    return faces.subset(valid)


# ---- augmentation --------------------------------------------------------------------------------
GREY = (128, 128, 128)      # fills the border that a shifted or rotated image leaves


def affine(image, a, b, c, d, e, f):
    """Map output pixel (x, y) to input pixel (a x + b y + c, d x + e y + f), bilinearly."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f),
                           Image.Resampling.BILINEAR, fillcolor=GREY)


# FLIP's nine operations, which are BLIP's without AutoContrast. Identity, brightness and sharpness
# have no effect: at FLIP's strength, 5 of 10, the factor of the last two is 0.1 + 1.8 * 5 / 10 = 1
OPERATIONS = ("identity", "brightness", "sharpness", "equalize", "shear x", "shear y",
              "translate x", "translate y", "rotate")


def apply_operation(name: str, image: Image.Image, sign: int) -> Image.Image:
    """Apply one of OPERATIONS at strength 5 of 10, in the direction `sign` (1 or -1)."""
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "shear x":
        return affine(image, 1, sign * 0.15, 0, 0, 1, 0)
    if name == "shear y":
        return affine(image, 1, 0, 0, sign * 0.15, 1, 0)
    if name == "translate x":
        return affine(image, 1, 0, sign * 5 / 224 * image.width, 0, 1, 0)
    if name == "translate y":
        return affine(image, 1, 0, 0, 0, 1, sign * 5 / 224 * image.height)
    if name == "rotate":
        return image.rotate(sign * 15, Image.Resampling.BILINEAR, fillcolor=GREY)
    return image        # identity, brightness, sharpness


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror an RGB image with probability 1/2; draw two operations and apply each with probability
    1/2."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for name in rng.choice(OPERATIONS, 2):
        if rng.random() < 0.5:
            image = apply_operation(name, image, rng.choice((-1, 1)))
    return image


# ---- batches -------------------------------------------------------------------------------------
class Batch(NamedTuple):
    images: torch.Tensor        # (B, 3, S, S) float32
    captions: object            # tokenizer.Captions, B of them
    identity: torch.Tensor      # (B,) int64
    damaged: list[str]          # a message for each damaged image, which was replaced

    def to(self, device):
        return self._replace(images=self.images.to(device, non_blocking=True),
                             captions=self.captions.to(device),
                             identity=self.identity.to(device, non_blocking=True))


class FaceDataset(torch.utils.data.Dataset):
    """Samples of one process, and an endless stream of batches of them. Item (epoch, index)
    is a sample, a pure function of these two and the seed. Each epoch permutes the faces and cuts
    the permutation into batches_per_epoch global batches; rank r takes the r-th part of each, so
    that together the ranks process the batches that a single process would."""

    def __init__(self, faces: Faces, tokenizer, image_size, batch_size, seed=0, augmented=True,
                 rank=0, world_size=1, workers=0):
        self.faces = faces
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.seed = seed
        self.augmented = augmented
        self.workers = workers
        self.batch_size = batch_size
        self.rank = rank
        self.global_size = batch_size * world_size
        self.batches_per_epoch = len(faces) // self.global_size     # an incomplete one is dropped
        if self.batches_per_epoch == 0:
            raise ValueError(f"{faces.name}: {len(faces)} faces are fewer than a batch of "
                             f"{self.global_size} ({world_size} processes x {batch_size}); use a "
                             "smaller --batch_size")

    def __getitem__(self, key):
        """Pixels, caption, identity and messages about damaged images, in whose place the next face
        is used. Raises ValueError after 100 of them."""
        epoch, index = key
        rng = random_stream("caption and augmentation", self.seed, epoch, index)
        image = None
        damaged = []
        while image is None:
            try:
                image = self.faces.picture(index, self.image_size)
            except ValueError as error:
                damaged.append(str(error))
                index = (index + 1) % len(self.faces)
                if len(damaged) == 100:
                    raise ValueError(f"{error}, and 99 images before it") from None
        if self.augmented:
            image = augment(image, rng)
        text = self.faces.caption(index, rng)
        return np.asarray(image), text, self.faces.identity[index], damaged

    def collate(self, samples):
        """Samples, as `__getitem__` returns them -> `Batch`."""
        pixels, texts, identity, damaged = zip(*samples)
        captions = self.tokenizer(list(texts))
        identity = torch.tensor(np.array(identity))
        return Batch(normalize_batch(pixels), captions, identity, list(itertools.chain(*damaged)))

    def iterate_from(self, number: int):
        """Yield batches without end, starting with batch `number`, counted from 0 over all epochs.
        Damaged images are named once. Raises ValueError if they exceed 1 % of the images read so
        far. (At least 1,000 count as read, or all faces if there are fewer.)"""
        context = None
        if self.workers and sys.platform == "linux":
            context = "fork"        # forked workers share the memory-mapped index
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=self.batch_indices(number), collate_fn=self.collate,
            num_workers=self.workers, multiprocessing_context=context, worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator())        # the default would advance the model's random state
        damaged = set()
        num_read = 0
        with iterate_with_workers(loader) as batches:
            for batch in batches:
                num_read += self.batch_size
                for message in batch.damaged:
                    if message not in damaged:
                        damaged.add(message)
                        print(f"{message} (replaced by the next face)", flush=True)
                        counted = min(len(self.faces), max(1000, num_read))
                        require_few(len(damaged), counted, f"{self.faces.name}: {message}")
                yield batch

    def batch_indices(self, number):
        """Yield for each batch, starting with batch `number`, the list of (epoch, index) of this
        rank."""
        first_epoch, first_batch = divmod(number, self.batches_per_epoch)
        for epoch in itertools.count(first_epoch):
            order = random_stream("order", self.seed, epoch).permutation(len(self.faces))
            for n in range(first_batch, self.batches_per_epoch):
                start = n * self.global_size + self.rank * self.batch_size
                own = order[start:start + self.batch_size]
                yield [(epoch, index) for index in own.tolist()]
            first_batch = 0

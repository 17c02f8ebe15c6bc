"""Faces with sentences, in batches: what the model is trained on.

    Faces      the pictures of one part of a set, with captions, attributes or growing sketches
    augment    the recipe's random changes of a picture
    Batches    an endless stream of batches of them

Below stand what makes them: the grammar that writes captions, an ideal reader of these, and the
readers of sets as they lie on disk (open_faces, drawn_faces).

FLIP's captions start from a probabilistic context-free grammar over CelebA's 40 attributes (arXiv
2407.08515, section 3). Ours states each *fact* of a face by chance, then writes the stated facts as
sentences; because that chance is known, so is how well an ideal reader could find the face again
(`reference_recalls`): the numbers a training run is held against.

Where we leave the official code: captions come fresh from the grammar each time instead of from a
file; the order of the samples, their captions and their augmentation depend on (seed, epoch, index)
and the flags alone, so a run resumed at any step, with any number of workers, sees what an
uninterrupted one sees; bad input is named with file and record. (Capital letters are sizes, see
vit.py.)

    python data.py               # what the drawn faces and their captions are like: report.png
    python data.py --data DIR    # the same of faces of your own; LAYOUTS says what DIR may be
"""
import hashlib
import itertools
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import toyfaces
from bert import Captions
from captions import ATTRIBUTES as ATTRIBUTES
from captions import sample_caption
from common.images import TarImage, iterate_images, load_image, normalize_batch, resize_to_array
from common.script import atomic_write, error_context
from readers.index import COLUMNS, check_error_rate, open_split
from readers.layouts import LAYOUTS


@dataclass
class Faces:
    """I pictures of people, and what is known of them: any of the last three, or nothing. Of a set
    on disk all this lies in a mapped index (see below), which costs a process no memory."""
    name: str                               # what to call them in errors: "CelebA train"
    images: object                          # uint8 (I, S, S, 3), or Paths and Crops: where they lie
    identity: np.ndarray                    # int64 (I,): equal numbers, same person
    attributes: np.ndarray | None = None    # bool (I, 40), in the order of ATTRIBUTES
    captions: object = None                 # texts for each picture; without them, the grammar writes some
    sketches: object = None                 # for each picture the paths of its sketch as it grows,
                                            # or uint8 (I, steps, S, S), white on black

    def __post_init__(self):
        if len(self) == 0:
            raise ValueError(f"{self.name}: no faces, expected at least one in this part")
        for field in ("identity", "attributes", "captions", "sketches"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{self.name}: {len(self)} pictures, but {len(values)} entries in {field}")

    def __len__(self):
        return len(self.images)

    def picture(self, i, size=None):
        """Face i as a PIL RGB image, whole or size x size; ValueError if its file is damaged or no
        picture."""
        return self._load(i, self.images[i], size)

    def _load(self, i, picture, size=None):
        if isinstance(picture, np.ndarray):
            image = Image.fromarray(picture).convert("RGB")
            return image.resize((size, size), Image.Resampling.BICUBIC) if size else image
        try:
            return picture.open(size) if isinstance(picture, TarImage) else load_image(picture, size=size)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name}, record {i}: {error}") from None

    @property
    def has_text(self):
        return self.captions is not None or self.attributes is not None

    def require_text(self):
        """ValueError where nothing can be said of the faces: ask before the work begins."""
        if not self.has_text:
            raise ValueError(f"{self.name}: expected captions, or attributes to write them from, found none")

    def caption(self, i, rng):
        """One of the captions of face i, or a new one from the grammar."""
        self.require_text()
        if self.captions is not None:
            captions = self.captions[i]
            return captions[rng.integers(len(captions))]
        return sample_caption(self.attributes[i], rng)[0]

    @property
    def sketch_steps(self):
        """In how many steps a sketch grows; 0 without sketches."""
        return 0 if self.sketches is None else len(self.sketches[0])

    def sketch(self, i, t):
        """The sketch of face i after step t (counted from 0) as a PIL RGB image, white on black.

        A file that is light on the whole has dark strokes on paper, as FS2K's finished sketches do,
        and is inverted.
        """
        image = self._load(i, self.sketches[i][t]).convert("L")
        if np.asarray(image).mean() > 127:
            image = ImageOps.invert(image)
        return image.convert("RGB")

    def subset(self, indices):
        fields = (self.images, self.identity, self.attributes, self.captions, self.sketches)
        chosen = np.asarray(indices, dtype=np.int64)
        return Faces(self.name, *(None if values is None else values[chosen] for values in fields))


def open_faces(path, split, cache="cache", columns=COLUMNS[:2], max_errors=1.0, max_lost=None):
    """The faces of a part ("train", "val", "test") of a set of one's own: in a folder, by what is
    found there, or in a json list. (max_lost: the old name of max_errors.)"""
    return Faces(**open_split(path, split, LAYOUTS, cache, columns, max_errors if max_lost is None else max_lost))


def drop_unreadable(faces, max_errors, size):
    """The faces whose pictures can be read at this size."""
    errors = {}
    for _ in iterate_images(faces.picture, len(faces), size, "checking pictures", errors=errors):
        pass
    return drop(faces, errors, max_errors)


def drop(faces, errors, max_errors):
    """The faces but for {number: why it cannot be read}, which are told."""
    sentences = [errors[i] for i in sorted(errors)]
    check_error_rate(sentences, len(faces), max_errors)
    for sentence in sentences:
        tqdm.write(f"left out: {sentence}")
    return faces.subset([i for i in range(len(faces)) if i not in errors]) if errors else faces


# ---- augmentation --------------------------------------------------------------------------------
GREY = (128, 128, 128)      # fills what a moved picture leaves open


def affine(image, a, b, c, d, e, f):
    """The picture whose pixel (x, y) is the given one's (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR,
                           fillcolor=GREY)


# FLIP's nine operations (BLIP's without AutoContrast) at strength 5 of 10; sign is +1 or -1.
# Brightness and sharpness are multiplied by 0.1 + 1.8 * strength / 10, which at this strength is 1:
# they change nothing, here as there.
AUGMENTATIONS = {
    "identity": lambda image, sign: image,
    "brightness": lambda image, sign: image,
    "sharpness": lambda image, sign: image,
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "shear x": lambda image, sign: affine(image, 1, sign * 0.15, 0, 0, 1, 0),
    "shear y": lambda image, sign: affine(image, 1, 0, 0, sign * 0.15, 1, 0),
    "translate x": lambda image, sign: affine(image, 1, 0, sign * 5 / 224 * image.width, 0, 1, 0),  # 5 of 224
    "translate y": lambda image, sign: affine(image, 1, 0, 0, 0, 1, sign * 5 / 224 * image.height),
    "rotate": lambda image, sign: image.rotate(sign * 15, Image.Resampling.BILINEAR, fillcolor=GREY),
}


def augment(image, rng):
    """The recipe's augmentation of a picture that has the model's size, RGB to RGB."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for name in rng.choice(list(AUGMENTATIONS), 2):
        if rng.random() < 0.5:
            image = AUGMENTATIONS[name](image, rng.choice((-1, 1)))
    return image


# ---- batches -------------------------------------------------------------------------------------
class Batch(NamedTuple):
    images: torch.Tensor        # (B, 3, S, S) float32
    captions: Captions     # B of them, packed
    identity: torch.Tensor      # (B,) int64
    errors: dict                # {number of a face: why it cannot be read}; others stand in for these

    def to(self, device):
        return Batch(self.images.to(device, non_blocking=True), self.captions.to(device),
                     self.identity.to(device, non_blocking=True), self.errors)


class FaceDataset(torch.utils.data.Dataset):
    """What (epoch, index) shows: a pure function of it and the seed (and of what can be read: for a
    damaged picture another face stands in)."""

    def __init__(self, faces, tokenizer, image_size, seed, augmented):
        self.faces, self.tokenizer, self.image_size = faces, tokenizer, image_size
        self.seed, self.augmented = seed, augmented

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index + 1))  # index 0 would give the permutation's
        errors, image = {}, None
        while image is None:
            try:
                image = self.faces.picture(index, self.image_size)
            except ValueError as error:
                errors[index] = str(error)
                if len(errors) == min(100, len(self.faces)):
                    raise ValueError(f"{error} (and {len(errors) - 1} others in its place)") from None
                index = int(rng.integers(len(self.faces)))
        if self.augmented:
            image = augment(image, rng)
        text = self.faces.caption(index, rng)
        return resize_to_array(image, self.image_size), text, self.faces.identity[index], errors

    def collate(self, samples):
        pixels, texts, identity, errors = zip(*samples)
        return Batch(normalize_batch(pixels), self.tokenizer(list(texts)), torch.tensor(np.array(identity)),
                     dict(itertools.chain.from_iterable(found.items() for found in errors)))


class BatchLoader:
    """Endless batches of `batch_size` for one of `world` processes; `per_epoch` are an epoch.

    Batch n of an epoch shows the n-th stretch of world * batch_size faces of the epoch's
    permutation; process r takes the r-th part of it, so the parts gathered in order are the batch
    that a single process would see.
    """

    def __init__(self, faces, tokenizer, image_size, batch_size, seed=0, augmented=True, rank=0, world_size=1,
                 workers=0, max_errors=0.0):
        faces.require_text()
        self.faces, self.seed, self.workers = faces, seed, workers
        self.errors, self.max_errors = {}, max_errors  # met in this epoch; at most how many, in percent
        self.batch_size, self.rank, self.global_size = batch_size, rank, batch_size * world_size
        self.samples = FaceDataset(faces, tokenizer, image_size, seed, augmented)
        self.batches_per_epoch = len(faces) // self.global_size  # what is left over waits for another order
        if self.batches_per_epoch == 0:
            raise ValueError(f"{faces.name}: {len(faces)} faces are fewer than a batch of {self.global_size} "
                             f"({world_size} processes x {batch_size}); use a smaller batch")

    def iterate_from(self, number):
        """Iterator over batches from this one (counted from 0 over all epochs) on, without end.

        ValueError, in one sentence, when more than max_lost percent of the faces of an epoch cannot be
        read.
        """
        loader = torch.utils.data.DataLoader(
            self.samples, batch_sampler=self.batch_indices(number), collate_fn=self.samples.collate,
            num_workers=self.workers, pin_memory=torch.cuda.is_available(),
            # forked workers share what is mapped; others would be sent a copy
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            generator=torch.Generator())        # its own: it must not draw from the model's random numbers
        try:
            for number, batch in enumerate(loader, number):
                if number % self.batches_per_epoch == 0:
                    self.errors = {}
                for i in sorted(batch.errors.keys() - self.errors.keys()):
                    self.errors[i] = batch.errors[i]
                    check_error_rate([*self.errors.values()], self.batches_per_epoch * self.batch_size, self.max_errors)
                    tqdm.write(f"{batch.errors[i]} (another face stands in)")
                yield batch
        except ValueError as error:             # a worker's comes with a traceback as text: keep the sentence
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def batch_indices(self, number):
        """For each batch from this one on, the list of (epoch, index) that this process shows."""
        for epoch in itertools.count(number // self.batches_per_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.faces))
            for n in range(number % self.batches_per_epoch, self.batches_per_epoch):
                own = order[n * self.global_size + self.rank * self.batch_size:][:self.batch_size]
                yield [(epoch, index) for index in own.tolist()]
            number = 0                          # the epochs that follow begin at their beginning


# ---- drawn faces ---------------------------------------------------------------------------------
def load_toy_faces(count, size, seed, folder, steps=0):
    """`count` faces drawn by toyfaces.py at size x size pixels, with `steps` steps of a growing
    sketch each; kept in `folder` for the next time."""
    # A digest of the code that draws is in the name: a changed face never comes from an old file.
    here = Path(__file__).parent
    code = [Path(toyfaces.__file__), here / "captions.py", *sorted(here.glob("drawing/*.py"))]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:8]
    path = Path(folder) / f"faces-{count}x{size}-{steps}steps-seed{seed}-{version}.npy"
    if not path.exists():
        kind = np.dtype([("attributes", bool, len(ATTRIBUTES)), ("picture", np.uint8, (size, size, 3)),
                         ("sketches", np.uint8, (steps, size, size))])
        tasks = [(index, seed, size, steps) for index in range(count)]
        with atomic_write(path) as partial:
            kept = np.lib.format.open_memmap(partial, "w+", kind, (count,))
            # All cores draw; Ctrl-C is for this process alone.
            with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                for i, face in enumerate(tqdm(pool.imap(render_toy_face, tasks, 16), "drawing faces", count)):
                    kept[i] = face
            kept.flush()
    with error_context("faces drawn here; delete it, and they are drawn again", path):
        kept = np.load(path, mmap_mode="r")
    return Faces(f"drawn faces (seed {seed})", kept["picture"], np.arange(count),
                 np.array(kept["attributes"]), sketches=kept["sketches"] if steps else None)


def render_toy_face(task):
    index, seed, size, steps = task
    image, attributes = toyfaces.face(index, seed, size)
    sketches = toyfaces.sketch(index, seed, size, steps) if steps else np.empty((0, size, size))
    return attributes, np.asarray(image), sketches


if __name__ == "__main__":
    raise SystemExit("error: python data.py --data ... is now python report.py --data ...")

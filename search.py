"""Search a folder of face images with a sentence, ranked by cosine and re-ranked with the matching
head; or with an image, ranked by cosine.

    python search.py --images DIR "an old man" --without glasses --without "a hat"
    python search.py --images DIR --like photograph.jpg
"""
import argparse
import hashlib
import os
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.distributed import autocast, stop_signals
from common.images import IMAGE_SUFFIXES, iterate_images, load_image, pixel_batches
from common.pictures import contact_sheet
from common.script import run_script
from common.words import check_words, known_and_unknown_words
from flip import FLIP
from pretrained import read_file, write_checkpoint


def fast_autocast(model: FLIP):
    """Use bf16 on hardware that is fast in it, unless the model has another precision itself."""
    return autocast("auto" if model.dtype == torch.float32 else "float32", model.device)


# ---- features of a folder ------------------------------------------------------------------------
def find_images(folder):
    """Yield "path time-of-last-change" of every image in a folder and its subfolders."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from find_images(entry.path)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
            status = entry.stat()
            # `cp -p` keeps the time of the contents, but not that of the metadata
            yield f"{entry.path} {max(status.st_mtime_ns, status.st_ctime_ns)}"


def path_of(image: str) -> str:
    return image.rpartition(" ")[0]


@torch.no_grad()
def encode_images(model: FLIP, images: list[str]) -> dict[str, torch.Tensor]:
    """{image: feature (E,)} of the images that can be read. The others are named in a warning."""
    is_grey = {}                # of the images that can be read

    def read(i, size):
        try:
            image = load_image(path_of(images[i]), size=size)
        except ValueError as error:
            warnings.warn(f"skipped: {error}")
            return Image.new("RGB", (size, size))
        is_grey[images[i]] = np.ptp(image, axis=2).mean() < 4       # of 255
        return image

    encoded = []
    size = model.config.vit.image_size
    for _, pixels in iterate_images(read, len(images), size, "encoding images"):
        with fast_autocast(model):
            pixels = pixels.to(model.device, model.dtype)
            encoded.extend(model.student.image_features(pixels).cpu())
    if sum(is_grey.values()) > len(is_grey) / 2:
        warnings.warn("most images are grey; a model trained on colour images ranks them badly")
    return {image: feature for image, feature in zip(images, encoded) if image in is_grey}


def encode_folder(model: FLIP, folder: str | Path, cache: str | Path) -> dict[str, torch.Tensor]:
    """{path: feature (E,)} of every image in `folder` and its subfolders. The folder `cache` keeps
    the features, in a file for each folder and model, so that only new or changed images are
    encoded. Unreadable images are named in a warning. Raises ValueError if no image can be read, or
    if that file is damaged; it can be deleted."""
    root = os.path.join(os.path.realpath(folder), "")
    images = sorted(find_images(root))
    key = hashlib.sha256(f"{model.image_encoder_hash()} {root}".encode()).hexdigest()
    path = Path(cache) / f"features-{key[:16]}.pt"
    cached = {}
    if path.exists():
        saved = read_file(path)
        cached = dict(zip(saved["images"].split("\0"), saved["features"]))
    known = cached | encode_images(model, [image for image in images if image not in cached])
    features = {image: known[image] for image in images if image in known}
    if not features:
        raise ValueError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}), "
                         "none can be read")

    if features.keys() != cached.keys():
        stacked = torch.stack(list(features.values()))
        write_checkpoint({"images": "\0".join(features), "features": stacked}, path)
    found = {}
    for image, feature in features.items():
        name = path_of(image).removeprefix(root)
        found[os.path.join(folder, name)] = feature
    return found


# ---- search --------------------------------------------------------------------------------------
class SearchResult(NamedTuple):
    path: str
    score: float                # see `search`
    cosine: float               # of the features of image and query
    probability: float | None   # that the image matches the sentence, from the matching head

    def __str__(self):
        percent = "-" if self.probability is None else f"{100 * self.probability:.1f} %"
        return f"{self.score:6.2f} {self.cosine:7.3f} {percent:>8}  {self.path}"


SILENCE = 0.75              # weight of what a text leaves out, see `beyond_silence`


def beyond_silence(scores):
    """Scores (..., T + 1) of T texts and of the empty text, which is the last -> (..., T).

    The captions in training mention most of what is there, so what a text leaves out counts, too:
    "a woman with glasses" ranks women with glasses and nothing else first, before those who also
    wear a hat. In a query, it should not count. The empty text leaves everything out; subtracting
    most of its score cancels what is counted for leaving out."""
    return scores[..., :-1] - SILENCE * scores[..., -1:]


@torch.no_grad()
def search(model: FLIP, features: dict, query="", without=(), top=8,
           image=None) -> list[SearchResult]:
    """The `top` best of I images, {path: feature (E,)}, for a sentence or an image (a path or a PIL
    image), and for a list of exclusions. Raises ValueError if a text has no known words.

    The score of a text is `beyond_silence`, that of an image is its cosine. For a sentence, the ITM
    head re-ranks the 32 images (or `top`, if more) with the highest score by cosine.

    Captions state what is present, so a model does not learn negations. Instead, n exclusions are
    scored by themselves and subtracted with weight 1 / (n + 1) each, so that the query outweighs
    them together."""
    if top < 1:
        raise ValueError(f"top {top}: expected at least 1")
    if (image is None) == (not query):
        raise ValueError("expected a sentence or an image to search for")
    negation = re.search(r"\b(without|no|not)\b", query, re.I)
    if negation:
        warnings.warn(f"{negation[0]!r} excludes nothing; use --without (in Python: without=[...])")
    if isinstance(without, str):
        without = [without]
    weights = torch.full((1 + len(without),), -1 / (1 + len(without)))
    weights[0] = 1

    texts = list(without)
    if image is None:
        texts = [query, *without]
    check_words(texts, model.require_tokenizer())
    captions = model.tokenizer([*texts, ""])
    paths = list(features)
    image_features = torch.stack([*features.values()])                      # (I, E)
    cosines = image_features @ model.encode_text(captions).cpu().T          # (I, texts + 1)
    scores = beyond_silence(cosines)                                        # (I, texts)
    if image is None:               # a sentence: re-rank the best
        best = (scores @ weights).topk(min(max(32, top), len(paths))).indices       # (k,)
        paths = [paths[i] for i in best]
        with fast_autocast(model):
            logits, _ = model.match_logits(paths, captions)
        logits = logits.cpu()                                               # (k, texts + 1, 2)
        scores = beyond_silence(model.rerank_score(logits, cosines[best]))
        likeness = cosines[best, 0]
        probabilities = logits[:, 0].softmax(-1)[:, 1].tolist()
    else:                           # an image: its cosines take the place of the sentence's score
        likeness = (image_features @ model.encode_image(image).cpu().T)[:, 0]       # (I,)
        scores = torch.column_stack([likeness, scores])
        probabilities = [None] * len(paths)

    scores = scores @ weights
    results = map(SearchResult, paths, scores.tolist(), likeness.tolist(), probabilities)
    return sorted(results, key=lambda result: -result.score)[:top]


# ---- heatmaps and the web page -------------------------------------------------------------------
def split_phrases(query: str, tokenizer) -> list[str]:
    """Split a sentence into phrases; "a man with a hat and a tie" becomes "a man", "a hat", "a
    tie". Phrases without a known word are left out."""
    words = "and|but|with|who|that|she|he|they|has|is|wears|wearing"
    phrases = re.split(rf"[,.;]|\b(?:{words})\b", query.lower())
    return [phrase.strip() for phrase in phrases if known_and_unknown_words(phrase, tokenizer)[0]]


def mean_image(model: FLIP, images: list, count=100) -> torch.Tensor:
    """The mean (1, 3, S, S) of `count` to 2 x `count` of the images, or of all if there are fewer:
    a baseline for `attribute_patches`."""
    images = images[::max(1, len(images) // count)]
    batches = pixel_batches(images, model.config.vit.image_size)
    return sum(pixels.sum(0, keepdim=True) for pixels in batches) / len(images)


def attribute_patches(model: FLIP, images: list, phrase: str, baseline, steps=8) -> torch.Tensor:
    """Attribution of the score of a phrase, `beyond_silence`, to the patches of I images (paths or
    PIL images), (I, rows, columns). The attributions of an image sum to about its score minus that
    of the baseline (1, 3, S, S).

    Integrated gradients (arXiv 1703.01365): pixels minus baseline, times the gradient, averaged
    along the path from the baseline to the image. (At the image itself, the gradient vanishes if
    the matching head is certain.) The baseline should be a typical face, such as `mean_image`:
    with a plain colour, fewer maps peak at the phrase's part of the face."""
    captions = model.tokenizer([phrase, ""]).to(model.device)
    text_features = model.encode_text(captions)                                 # (2, E)
    sizes = model.config.vit
    baseline = baseline.to(model.device, model.dtype)
    attributions = []
    for pixels in pixel_batches(images, sizes.image_size, batch_size=8):
        difference = pixels.to(model.device, model.dtype) - baseline
        gradient = torch.zeros_like(difference)
        for step in range(steps):
            interpolated = baseline + difference * (step + 0.5) / steps
            interpolated.requires_grad_()
            tokens, features = model.student.image_tokens_and_features(interpolated)
            logits = model.pair_logits(tokens, captions).unflatten(0, (-1, 2))  # (B, 2, 2)
            scores = beyond_silence(model.rerank_score(logits, features @ text_features.T))
            gradient += torch.autograd.grad(scores.sum(), interpolated)[0] / steps
        by_pixel = (difference * gradient).sum(1)                               # (B, S, S)
        attributions.append(F.avg_pool2d(by_pixel, sizes.patch_size, divisor_override=1))
    return torch.cat(attributions).cpu()


def result_sheet(model: FLIP, query: str, without, results: list[SearchResult], baseline=None):
    """A contact sheet of the results. Four images are in a row or, given a baseline for
    `attribute_patches`, one image with its heatmaps."""
    images = [load_image(result.path) for result in results]
    for image in images:
        image.thumbnail((512, 512))
    if baseline is not None:
        phrases = [*split_phrases(query, model.tokenizer), *without]
        return contact_sheet(heatmap_rows(model, images, results, phrases, baseline))

    tiles = []
    for image, result in zip(images, results):
        label = f"{result.score:.1f}  {result.cosine:.2f}"
        if result.probability is not None:
            label += f"  {100 * result.probability:.0f} %"
        tiles.append((image, label, False))
    rows = []
    title = ", without ".join([query, *without])
    for start in range(0, len(tiles), 4):
        rows.append((title, tiles[start:start + 4]))
        title = ""
    return contact_sheet(rows)


def heatmap_rows(model: FLIP, images, results, phrases: list[str], baseline):
    """A row of `contact_sheet` for each result: the image, and a grey copy of it for each phrase.
    The copy is the redder the higher the attribution, on one scale for all images of a phrase; its
    label is the sum of the attribution."""
    rows = []
    for result, image in zip(results, images):
        rows.append((result.path, [(image, f"score {result.score:.1f}", False)]))
    for phrase in phrases:
        attributions = attribute_patches(model, images, phrase, baseline)
        heatmaps = attributions.clamp(min=0) / attributions.max().clamp(min=1e-6)
        for i, image in enumerate(images):
            mask = Image.fromarray((220 * heatmaps[i]).byte().numpy()).resize(image.size)
            heatmap = image.convert("L").convert("RGB")
            heatmap.paste("red", mask=mask)
            _, tiles = rows[i]
            tiles.append((heatmap, f"{attributions[i].sum():+.1f} {phrase}", False))
    return rows


EXAMPLES = [        # query, without, explain
    ["a smiling woman with blond hair", "", False],
    ["an old man", "a beard, glasses", False],
    ["a young woman with a hat", "", True]]


def serve(model: FLIP, features: dict, query: str, without: str, top: int):
    """Open a local web page that answers queries, until a signal arrives."""
    import gradio
    baseline = mean_image(model, list(features))

    def answer(query, excluded, explain):
        without = [phrase.strip() for phrase in excluded.split(",") if phrase.strip()]
        with warnings.catch_warnings(record=True) as caught:
            try:
                results = search(model, features, query, without, top)
            except ValueError as error:             # the faces of the last query stay
                gradio.Warning(str(error))
                return gradio.skip(), gradio.skip()
        for warning in caught:
            gradio.Warning(str(warning.message))
        sheet = result_sheet(model, query, without, results, baseline if explain else None)
        return sheet, "\n".join(map(str, results))

    with tempfile.TemporaryDirectory() as copies, stop_signals() as stopped:
        os.environ["GRADIO_TEMP_DIR"] = copies      # of images, for the browser
        inputs = [gradio.Textbox(query, label="query"),
                  gradio.Textbox(without, label="without (separated by commas)"),
                  gradio.Checkbox(label="explain")]
        outputs = [gradio.Image(show_label=False, buttons=[]),
                   gradio.Textbox(label="score, cosine, match")]
        page = gradio.Interface(answer, inputs, outputs, title=f"{len(features)} faces",
                                analytics_enabled=False, flagging_mode="never")
        with page:
            gradio.Examples(EXAMPLES, inputs, outputs, answer, run_on_click=True)
        page.launch(inbrowser=True, prevent_thread_lock=True)
        while not stopped:
            time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face images with a sentence.")
    add = parser.add_argument
    add("query", nargs="?", default="", help='a sentence: "a smiling woman with blond hair"')
    add("--without", action="append", default=[], metavar="PHRASE",
        help='exclude, such as "a hat"; may be repeated')
    add("--like", metavar="IMAGE", help="search with an image instead of a sentence: a photograph "
        "or, with the checkpoint of the sketch task, a drawing")
    add("--checkpoint", default="out/flip.pt", help="from train.py, or the official one")
    add("--images", default="faces", help="folder of images, including its subfolders")
    add("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    add("--top", type=int, default=8, help="number of faces to show")
    add("--out", type=Path, default="out/search.png", help="file for the contact sheet")
    add("--explain", action="store_true", help="show a heatmap per phrase beside each face")
    add("--words", action="store_true", help="print the words in the model's vocabulary")
    add("--serve", action="store_true", help="open a web page (pip install 'gradio>=6')")
    args = parser.parse_args()
    if args.like and (args.query or args.explain or args.serve):
        parser.error("--like takes neither a sentence nor --explain nor --serve")
    model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary, device="auto")
    if args.words:
        pieces = model.require_tokenizer().wordpiece.get_vocab()
        return print(*sorted(piece for piece in pieces if piece.isalpha() and len(piece) > 1))
    features = encode_folder(model, args.images, args.out.parent)
    if args.serve:
        root = os.path.join(os.path.realpath(args.images), "")
        for path in list(features):
            if not os.path.realpath(path).startswith(root):     # a link to another folder
                del features[path]
        return serve(model, features, args.query, ", ".join(args.without), args.top)
    results = search(model, features, args.query, args.without, args.top, args.like)
    baseline = mean_image(model, list(features)) if args.explain else None
    title = args.query or f"like {args.like}"
    print(f" score  cosine    match  best of {len(features)} faces")
    print(*results, sep="\n")
    result_sheet(model, title, args.without, results, baseline).save(args.out)
    print(f"contact sheet: {args.out}")


if __name__ == "__main__":
    run_script(main)

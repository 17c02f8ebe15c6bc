"""Search a folder of face images with a sentence: rank by cosine, then re-rank the best with the
ITM head.

    python search.py --checkpoint out/flip.pt --images DIR "an old man" --without glasses "a hat"
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
from common.script import atomic_write, run_script
from common.words import known_and_unknown_words, vocabulary
from flip import FLIP
from pretrained import read_file


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
            yield f"{entry.path} {entry.stat().st_mtime_ns}"


def path_of(image: str) -> str:
    return image.rpartition(" ")[0]


def read_features(cache) -> dict:
    """The folders in a file of features; {} if the file does not exist or is damaged."""
    try:
        return read_file(Path(cache))["folders"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{cache} is damaged: encoding all images again")
        return {}


def encoder_hash(model: FLIP) -> str:
    """Hash of the weights that compute the features of images."""
    digest = hashlib.sha256()
    for module in (model.student.image, model.student.image_projection):
        for p in module.parameters():
            digest.update(p.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_images(model: FLIP, images: list[str]) -> dict[str, torch.Tensor]:
    """{image: feature (E,)} of the images that can be read. The others are named in a warning."""
    unreadable = set()
    grey = []

    def read(i, size):
        try:
            image = load_image(path_of(images[i]), size=size)
        except (ValueError, OSError) as error:
            warnings.warn(f"skipped: {error}")
            unreadable.add(i)
            return Image.new("RGB", (size, size))
        grey.append(np.ptp(image, axis=2).mean() < 4)       # of 255
        return image

    features = {}
    size = model.config.vit.image_size
    show = len(images) > 128
    for indices, pixels in iterate_images(read, len(images), size, "encoding images", show=show):
        with fast_autocast(model):
            encoded = model.student.image_features(pixels.to(model.device, model.dtype)).cpu()
        for i, feature in zip(indices, encoded):
            if i not in unreadable:
                features[images[i]] = feature
    if sum(grey) > len(grey) / 2:
        warnings.warn("most images are grey; a model trained on colour images ranks them badly")
    return features


def encode_folder(model: FLIP, folder: str | Path, cache: str | Path) -> dict[str, torch.Tensor]:
    """{path: feature (E,)} of every image in `folder` and its subfolders. The file `cache` keeps
    the features of every folder, so that only new or changed images are encoded, or all of them if
    the encoder has changed. Unreadable images are named in a warning. Raises ValueError if no image
    can be read."""
    encoder = encoder_hash(model)
    root = os.path.join(os.path.realpath(folder), "")
    images = sorted(find_images(root))
    folders = read_features(cache)
    saved = folders.get(root)
    features = {}
    if saved and saved["encoder"] == encoder:
        features = dict(zip(saved["images"].split("\0"), saved["features"]))
    new = [image for image in images if image not in features]
    features |= encode_images(model, new)
    readable = [image for image in images if image in features]
    if not readable:
        raise ValueError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}), "
                         "none can be read")

    if new or len(readable) < len(features):
        folders[root] = {"encoder": encoder, "images": "\0".join(readable),
                         "features": torch.stack([features[image] for image in readable])}
        with atomic_write(cache) as partial:
            torch.save({"folders": folders}, partial)
    found = {}
    for image in readable:
        path = path_of(image).removeprefix(root)
        found[os.path.join(folder, path)] = features[image]
    return found


# ---- search --------------------------------------------------------------------------------------
class SearchResult(NamedTuple):
    path: str
    score: float            # FLIP.rerank_score of the query, minus those of n exclusions / (n + 1)
    cosine: float           # of the ITC features, likewise
    probability: float      # that the image matches the query, from the ITM head; exclusions aside

    def __str__(self):
        return f"{self.score:6.2f} {self.cosine:7.3f} {100 * self.probability:6.1f} %  {self.path}"


@torch.no_grad()
def search(model: FLIP, features: dict, query: str, without=(), top=8) -> list[SearchResult]:
    """The `top` best of I images, {path: feature (E,)}, for a sentence and a list of exclusions.
    The ITM head re-ranks the 32 images (or `top`, if more) of highest cosine. Raises ValueError if
    there are no images or no known words.

    Captions state what is present, so a model does not learn negations. Instead, n exclusions are
    scored by themselves and subtracted with weight 1 / (n + 1) each, so that the query outweighs
    them together. T = 1 + n below."""
    if not features:
        raise ValueError("there are no images to search")
    negation = re.search(r"\b(without|no|not)\b", query, re.I)
    if negation:
        warnings.warn(f"{negation[0]!r} excludes nothing; use --without (in Python: without=[...])")
    if isinstance(without, str):
        without = [without]
    texts = [query, *without]
    weights = torch.full((len(texts),), -1 / len(texts))                            # (T,)
    weights[0] = 1

    paths = list(features)
    image_features = torch.stack([*features.values()])                              # (I, E)
    text_features = model.encode_text(texts).cpu()          # warns about unknown words
    cosines = image_features @ text_features.T                                      # (I, T)
    count = min(max(32, top), len(paths))
    best = (cosines @ weights).topk(count).indices                                  # (k,)
    with fast_autocast(model):
        logits, _ = model.match_logits([paths[i] for i in best], texts)             # (k, T, 2)
    logits = logits.cpu()
    scores = model.rerank_score(logits, cosines[best]) @ weights                    # (k,)
    probabilities = logits[:, 0].softmax(-1)[:, 1]
    rows = torch.stack([scores, cosines[best] @ weights, probabilities], 1).tolist()
    results = [SearchResult(paths[i], *row) for i, row in zip(best, rows)]
    return sorted(results, key=lambda result: -result.score)[:top]


# ---- heatmaps and the web page -------------------------------------------------------------------
def split_phrases(query: str, tokenizer) -> list[str]:
    """Split a sentence into phrases; "a man with a hat and a tie" becomes "a man", "a hat", "a
    tie". Phrases without a known word are left out."""
    words = "and|but|with|who|that|she|he|they|has|is|wears|wearing"
    phrases = re.split(rf"[,.;]|\b(?:{words})\b", query.lower())
    return [phrase.strip() for phrase in phrases if known_and_unknown_words(phrase, tokenizer)[0]]


def attribute_patches(model: FLIP, images: list, phrase: str, steps=8) -> torch.Tensor:
    """Attribution of the ranking score for a phrase to the patches of I images (paths or PIL
    images), (I, rows, columns). The attributions of an image sum to about its score minus that of a
    plain grey image.

    Integrated gradients (arXiv 1703.01365): pixels times gradient, averaged along the path from
    grey, CLIP's mean colour, to the image. (At the image itself, the gradient vanishes if the
    matching head is certain.)"""
    captions = model.tokenize([phrase])
    text_feature = model.student.text_features(captions)[0].detach()            # (E,)
    sizes = model.config.vit
    attributions = []
    for pixels in pixel_batches(images, sizes.image_size, batch_size=8):
        pixels = pixels.to(model.device, model.dtype)
        gradient = torch.zeros_like(pixels)
        for step in range(steps):
            interpolated = (pixels * (step + 0.5) / steps).requires_grad_()
            tokens, features = model.student.image_tokens_and_features(interpolated)
            logits = model.score_pairs(tokens, captions)
            scores = model.rerank_score(logits, features @ text_feature)        # (B,)
            gradient += torch.autograd.grad(scores.sum(), interpolated)[0] / steps
        by_pixel = (pixels * gradient).sum(1)                                   # (B, S, S)
        attributions.append(F.avg_pool2d(by_pixel, sizes.patch_size, divisor_override=1))
    return torch.cat(attributions).cpu()


def result_sheet(model: FLIP, query: str, without, results: list[SearchResult], explain: bool):
    """A contact sheet of the results. Four images are in a row or, if `explain`, one image with its
    heatmaps."""
    images = [load_image(result.path) for result in results]
    for image in images:
        image.thumbnail((512, 512))
    if explain:
        phrases = [*split_phrases(query, model.tokenizer), *without]
        return contact_sheet(heatmap_rows(model, images, results, phrases))

    tiles = []
    for image, result in zip(images, results):
        percent = 100 * result.probability
        tiles.append((image, f"{result.score:.1f}  {result.cosine:.2f}  {percent:.0f} %", False))
    rows = []
    title = ", without ".join([query, *without])
    for start in range(0, len(tiles), 4):
        rows.append((title, tiles[start:start + 4]))
        title = ""
    return contact_sheet(rows)


def heatmap_rows(model: FLIP, images: list, results: list[SearchResult], phrases: list[str]):
    """A row of `contact_sheet` for each result: the image, and a copy of it for each phrase. The
    copy is dark where the attribution is low, on one scale for all images of a phrase; its label is
    the sum of the attribution."""
    rows = [(str(result).strip(), [(image, "", False)]) for result, image in zip(results, images)]
    for phrase in phrases:
        attributions = attribute_patches(model, images, phrase)
        heatmaps = attributions.clamp(min=0) / attributions.max().clamp(min=1e-6)
        for i, image in enumerate(images):
            mask = Image.fromarray((255 * heatmaps[i]).byte().numpy()).resize(image.size)
            dark = image.point(lambda value: value // 4)
            heatmap = Image.composite(image, dark, mask)
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
        sheet = result_sheet(model, query, without, results, explain)
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
    add("--without", nargs="+", default=[], metavar="PHRASE", help='such as: glasses "a hat"')
    add("--checkpoint", default="out/flip.pt", help="from train.py, or the official one")
    add("--images", default="faces", help="folder of images, including its subfolders")
    add("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    add("--top", type=int, default=8, help="number of faces to show")
    add("--out", type=Path, default="out/search.png", help="file for the contact sheet")
    add("--explain", action="store_true", help="show a heatmap per phrase beside each face")
    add("--words", action="store_true", help="print the words in the model's vocabulary")
    add("--serve", action="store_true", help="open a web page (pip install 'gradio>=6')")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary, device="auto")
    if args.words:
        return print(*vocabulary(model.require_tokenizer()))
    features = encode_folder(model, args.images, args.out.parent / "features.pt")
    if args.serve:
        root = os.path.join(os.path.realpath(args.images), "")
        for path in list(features):
            if not os.path.realpath(path).startswith(root):     # a link to another folder
                del features[path]
        return serve(model, features, args.query, ", ".join(args.without), args.top)
    results = search(model, features, args.query, args.without, args.top)
    print(f" score  cosine   match    best of {len(features)} faces")
    print(*results, sep="\n")
    sheet = result_sheet(model, args.query, args.without, results, args.explain)
    sheet.save(args.out)
    print(f"contact sheet: {args.out}")


if __name__ == "__main__":
    run_script(main)

"""Search a folder of face images with a sentence: rank by cosine, then re-rank the best with the ITM head.

    python search.py --checkpoint out/flip.pt --images DIR "a smiling woman" --without glasses "a hat"
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


def read_features(cache) -> dict:
    """The folders in a file of features: {} if there is no such file, or if it is damaged."""
    try:
        return read_file(Path(cache))["folders"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{cache} is damaged: encoding all images again")
        return {}


@torch.no_grad()
def encode_folder(model: FLIP, folder: str | Path, cache: str | Path) -> dict[str, torch.Tensor]:
    """{path: feature (E,)} of every image in `folder` and its subfolders. The file `cache` keeps the features
    of every folder: only new or changed images are encoded, or all for another encoder. Unreadable images are
    named in a warning. Raises ValueError if there are no others."""
    weights = *model.student.image.parameters(), *model.student.image_projection.parameters()
    content = b"".join(p.detach().cpu().view(torch.uint8).numpy() for p in weights)
    encoder = hashlib.sha256(content).hexdigest()
    root = os.path.join(os.path.realpath(folder), "")
    images = sorted(find_images(root))
    features = {}
    folders = read_features(cache)
    saved = folders.get(root, {"encoder": None})
    if saved["encoder"] == encoder:
        features = dict(zip(saved["images"].split("\0"), saved["features"].unbind()))
    new = [image for image in images if image not in features]
    unreadable = set()
    grey = []
    path_of = lambda image: image.rpartition(" ")[0]

    def read(i, size):
        try:
            image = load_image(path_of(new[i]), size=size)
            grey.append(np.ptp(image, axis=2).mean() < 4)       # of 255
            return image
        except (ValueError, OSError) as error:
            warnings.warn(f"skipped: {error}")
            unreadable.add(i)
            return Image.new("RGB", (size, size))

    size = model.config.vit.image_size
    for indices, pixels in iterate_images(read, len(new), size, "encoding images", show=len(new) > 128):
        with fast_autocast(model):
            encoded = model.student.image_features(pixels.to(model.device, model.dtype)).cpu()
        features |= {new[i]: feature for i, feature in zip(indices, encoded) if i not in unreadable}
    readable = [image for image in images if image in features]
    if not readable:
        raise ValueError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}), none can be read")
    if sum(grey) > len(grey) / 2:
        warnings.warn("most images are grey: a model of coloured ones ranks them badly")
    if new or len(readable) < len(features):
        folders[root] = {"encoder": encoder, "images": "\0".join(readable),
                         "features": torch.stack([features[image] for image in readable])}
        with atomic_write(cache) as partial:
            torch.save({"folders": folders}, partial)
    return {os.path.join(folder, path_of(image)[len(root):]): features[image] for image in readable}


# ---- search --------------------------------------------------------------------------------------
class SearchResult(NamedTuple):
    path: str
    score: float            # FLIP.rerank_score of the query, minus 1 / (n + 1) of those of n exclusions
    cosine: float           # of the ITC features, likewise
    probability: float      # from the ITM head, that the image matches the query, exclusions aside

    def __str__(self):
        return f"{self.score:6.2f} {self.cosine:7.3f} {100 * self.probability:6.1f} %  {self.path}"


@torch.no_grad()
def search(model: FLIP, features: dict, query: str, without=(), top=8) -> list[SearchResult]:
    """The `top` best images for a sentence and a list of exclusions; the ITM head re-ranks the 32 (or `top`)
    of highest cosine. Captions state what is there, so a model does not learn negations: n exclusions are
    scored by themselves and subtracted, each with weight 1 / (n + 1), or they would drown the query."""
    if not features:
        raise ValueError("there are no images to search")
    if negation := re.search(r"\b(without|no|not)\b", query, re.I):
        warnings.warn(f"{negation[0]!r} excludes nothing; use --without (in Python: without=[...])")
    paths = list(features)
    texts = [query, *([without] if isinstance(without, str) else without)]
    text_features = model.encode_text(texts).cpu()              # warns about unknown words
    weights = torch.tensor([1.0, *(-1 / len(texts) for _ in texts[1:])])                        # (T,)
    cosines = torch.stack([*features.values()]) @ text_features.T                               # (I, T)
    best = (cosines @ weights).topk(min(max(32, top), len(paths))).indices                      # (k,)
    with fast_autocast(model):
        logits, _ = model.match_logits([paths[i] for i in best], texts)                         # (k, T, 2)
    logits = logits.cpu()
    scores = model.rerank_score(logits, cosines[best]) @ weights                                # (k,)
    columns = scores, cosines[best] @ weights, logits[:, 0].softmax(-1)[:, 1]
    results = [SearchResult(paths[i], *row) for i, row in zip(best, torch.stack(columns, 1).tolist())]
    return sorted(results, key=lambda result: -result.score)[:top]


# ---- heatmaps and the web page -------------------------------------------------------------------
def split_phrases(query: str, tokenizer) -> list[str]:
    """The phrases of a sentence with a known word: "a man with a hat and a tie" -> a man, a hat, a tie."""
    phrases = re.split(r"[,.;]|\b(?:and|but|with|who|that|she|he|they|has|is|wears|wearing)\b", query.lower())
    return [phrase.strip() for phrase in phrases if known_and_unknown_words(phrase, tokenizer)[0]]


def attribute_patches(model: FLIP, images: list, phrase: str, steps=8) -> torch.Tensor:
    """Attribution of the ranking score for a phrase to the patches of I images (paths or PIL images), (I,
    rows, columns). Those of an image sum to about the difference in score between it and a plain grey image.

    Integrated gradients (arXiv 1703.01365): pixels times gradient, averaged along the path from grey, CLIP's
    mean colour, to the image. (At the image itself the gradient vanishes where the head is certain.)"""
    captions = model.tokenize([phrase])
    sizes = model.config.vit
    attributions = []
    text_feature = model.student.text_features(captions)[0].detach()
    for pixels in pixel_batches(images, sizes.image_size, batch_size=8):
        pixels = pixels.to(model.device, model.dtype)
        gradient = torch.zeros_like(pixels)
        for step in range(steps):
            interpolated = (pixels * (step + 0.5) / steps).requires_grad_()
            tokens, features = model.student.image_tokens_and_features(interpolated)
            score = model.rerank_score(model.score_pairs(tokens, captions), features @ text_feature)
            gradient += torch.autograd.grad(score.sum(), interpolated)[0] / steps
        attributions.append(F.avg_pool2d((pixels * gradient).sum(1), sizes.patch_size, divisor_override=1))
    return torch.cat(attributions).cpu()


def result_sheet(model: FLIP, query: str, without, results: list[SearchResult], explain: bool):
    """A contact sheet with four images in a row or, if `explain`, one, with a copy of it for each phrase and
    exclusion. A copy is dark where the attribution is low, on one scale for all images of a phrase; its label
    is the attribution's sum."""
    images = [load_image(result.path) for result in results]
    for image in images:
        image.thumbnail((512, 512))
    if not explain:
        tiles = [(image, f"{result.score:.1f}  {result.cosine:.2f}  {100 * result.probability:.0f} %", False)
                 for image, result in zip(images, results)]
        title = ", without ".join([query, *without])
        return contact_sheet([("" if start else title, tiles[start:start + 4])
                              for start in range(0, len(tiles), 4)])
    rows = [(str(result).strip(), [(image, "", False)]) for image, result in zip(images, results)]
    for phrase in [*split_phrases(query, model.tokenizer), *without]:
        attributions = attribute_patches(model, images, phrase)
        heatmaps = attributions.clamp(min=0) / attributions.max().clamp(min=1e-6)
        for (_, row), image, total, heatmap in zip(rows, images, attributions.sum((1, 2)), heatmaps):
            mask = Image.fromarray((255 * heatmap).byte().numpy()).resize(image.size)
            dark = image.point(lambda value: value // 4)
            row.append((Image.composite(image, dark, mask), f"{total:+.1f} {phrase}", False))
    return contact_sheet(rows)


def serve(model: FLIP, features: dict, query: str, without: str, top: int):
    """Open a local web page that answers queries."""
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
        return result_sheet(model, query, without, results, explain), "\n".join(map(str, results))

    examples = [["a smiling woman with blond hair", "", False], ["an old man", "a beard, glasses", False],
                ["a young woman with a hat", "", True]]
    with tempfile.TemporaryDirectory() as copies, stop_signals() as stopped:     # of images, for the browser
        os.environ["GRADIO_TEMP_DIR"] = copies
        excluded = gradio.Textbox(without, label="without (separated by commas)")
        boxes = [gradio.Textbox(query, label="query"), excluded, gradio.Checkbox(label="explain")]
        found = [gradio.Image(show_label=False, buttons=[]), gradio.Textbox(label="score, cosine, match")]
        page = gradio.Interface(answer, boxes, found, title=f"{len(features)} faces", analytics_enabled=False,
                                flagging_mode="never")
        with page:
            gradio.Examples(examples, boxes, found, answer, run_on_click=True)
        page.launch(inbrowser=True, prevent_thread_lock=True)
        while not stopped:
            time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face images with a sentence.")
    parser.add_argument("query", nargs="?", default="", help='a sentence: "a smiling woman with blond hair"')
    parser.add_argument("--without", nargs="+", default=[], metavar="PHRASE", help='such as: glasses "a hat"')
    parser.add_argument("--checkpoint", default="out/flip.pt", help="from train.py, or the official one")
    parser.add_argument("--images", default="faces", help="folder of images, including its subfolders")
    parser.add_argument("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    parser.add_argument("--top", type=int, default=8, help="number of faces to show")
    parser.add_argument("--out", type=Path, default="out/search.png", help="file for the contact sheet")
    parser.add_argument("--explain", action="store_true", help="show a heatmap per phrase beside each face")
    parser.add_argument("--words", action="store_true", help="print the words that the model knows")
    parser.add_argument("--serve", action="store_true", help="open a web page (pip install 'gradio>=6')")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary, device="auto")
    if args.words:
        return print(*vocabulary(model.require_tokenizer()))
    features = encode_folder(model, args.images, args.out.parent / "features.pt")
    if args.serve:          # not what links show of other folders
        root = os.path.join(os.path.realpath(args.images), "")
        features = {path: x for path, x in features.items() if os.path.realpath(path).startswith(root)}
        return serve(model, features, args.query, ", ".join(args.without), args.top)
    results = search(model, features, args.query, args.without, args.top)
    print(f" score  cosine   match    best of {len(features)} faces")
    print(*results, sep="\n")
    result_sheet(model, args.query, args.without, results, args.explain).save(args.out)
    print(f"contact sheet: {args.out}")


if __name__ == "__main__":
    run_script(main)

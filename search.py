"""Search in a folder of faces."""
import argparse
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common.images import IMAGE_SUFFIXES, contact_sheet, iterate_images, load_image
from common.script import escape_control_chars, run_script
from common.weights import CHECKPOINT_FILES, load_verified, resolve_file, write_checkpoint
from flip import FLIP, eval_mode


def load_feature_cache(cache, embed_dim):
    """{key: feature} kept from the last search; nothing where there is none, or a damaged one."""
    try:
        known = load_verified(cache)
        fits = (feature.shape == (embed_dim,) and feature.isfinite().all() for feature in known.values())
        return known if all(fits) else {}
    except Exception:                               # whatever is wrong with it, it is computed again
        return {}


@torch.no_grad()
def encode_folder(model, folder, cache):
    """{path: feature (E,)} for every picture below `folder`. Features of unchanged files come from
    the file `cache`; a picture that cannot be read is named and left out."""
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not paths:
        raise ValueError(f"{folder}: no pictures found ({', '.join(IMAGE_SUFFIXES)}, subfolders included)")
    known = load_feature_cache(cache, model.config.embed_dim)
    keys = {path: f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths}
    new = [path for path in paths if keys[path] not in known]
    errors = {}
    for numbers, pixels in iterate_images(lambda i, size: load_image(new[i], size=size), len(new),
                                          model.config.vit.image_size, "reading pictures", errors=errors):
        features = model.student.image_features(pixels.to(model.temperature.device)).cpu()
        known |= {keys[new[i]]: feature.clone() for i, feature in zip(numbers, features)}
    for why in errors.values():
        tqdm.write(f"left out: {escape_control_chars(why)}")
    if new:
        write_checkpoint(known, cache)
    found = {path: known[key] for path, key in keys.items() if key in known}
    if not found:
        raise ValueError(f"{folder}: none of its {len(paths)} pictures can be read")
    return found


class SearchResult(NamedTuple):
    """A picture that was found: what it is ranked by, and both parts of it."""
    path: Path
    score: float            # FLIP.rerank_score
    cosine: float
    probability: float      # of a match, by ITM's head

    def image(self):
        """In a size for looking at."""
        image = load_image(self.path)
        image.thumbnail((512, 512))
        return image

    def __str__(self):
        return f"{self.score:6.2f} {self.cosine:7.3f} {100 * self.probability:6.1f} %  {escape_control_chars(self.path)}"


@torch.no_grad()
def search(model, features, query, top=8, k=32):
    """The `top` best of folder_features for a sentence, the k most similar judged by the matching
    head."""
    captions, paths = model.tokenize(query), list(features)
    similarity = torch.stack(list(features.values())) @ model.student.text_features(captions)[0].cpu()  # (I,)
    cosines, best = similarity.topk(min(max(k, top), len(paths)))
    tokens = torch.cat([model.student.image_tokens_and_features(pixels)[0]
                        for pixels in model.load_images([paths[i] for i in best])])
    logits = model.score_pairs(tokens, captions).cpu()                                          # (k, 2)
    ranked = zip(best, model.rerank_score(logits, cosines), cosines, logits.softmax(1)[:, 1])
    found = [SearchResult(paths[i], *(number.item() for number in numbers)) for i, *numbers in ranked]
    return sorted(found, key=lambda one: -one.score)[:top]


def split_phrases(query, tokenizer):
    """The parts of a sentence that each say one thing, if in known words: "a man with a goatee and a
    tie" -> a man, a goatee, a tie."""
    between = r"(?<![\w-])(?<!not )(?:he|she|and|with|who|has|have|is|are|wears|wearing)(?![\w-])"
    parts = re.split(rf"[,.;]|{between}", query.lower())
    return [part.strip() for part in parts if tokenizer.split_known(part)[0]]


def attribute_patches(model, images, phrase, steps=8):
    """Where on each picture a phrase was read: what each patch adds to ITM's log-odds, (I, rows,
    columns), in all about as much as the picture has more of them than one in plain grey.

    Integrated gradients (arXiv 1703.01365): pixels times their gradient, averaged while the picture
    emerges from grey, CLIP's mean colour. (At the picture itself the gradient is small where the head
    is certain.)"""
    captions, patch, attributions = model.tokenize(phrase), model.config.vit.patch_size, []
    with eval_mode(model), torch.enable_grad():
        for pixels in torch.cat([*model.load_images(images)]).split(8):
            gradient = torch.zeros_like(pixels)
            for step in range(steps):
                interpolated = (pixels * (step + 0.5) / steps).requires_grad_()
                logits = model.score_pairs(model.student.image_tokens_and_features(interpolated)[0], captions)
                log_odds = logits[:, 1] - logits[:, 0]
                gradient += torch.autograd.grad(log_odds.sum(), interpolated)[0] / steps
            attributions.append(patch ** 2 * F.avg_pool2d((pixels * gradient).sum(1), patch).cpu())
    return torch.cat(attributions)


def overlay_heatmap(image, heatmap):
    """A picture, dark but where `light` (rows, columns), from 0 to 1, falls."""
    heatmap = Image.fromarray((255 * heatmap).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: value // 4), heatmap)


def result_rows(model, query, found, explain):
    """For `contact_sheet`: the pictures in a row, or, to explain, a row for each: the picture, and
    lit where on it every phrase of the sentence was read, brighter where it was read more."""
    pictures = [one.image() for one in found]
    if not explain:
        return [(query, [(picture, f"{one.score:.1f}  {one.cosine:.2f}  {100 * one.probability:.0f} %", False)
                         for picture, one in zip(pictures, found)])]
    rows = [(str(one).strip(), [(picture, "", False)]) for picture, one in zip(pictures, found)]
    for phrase in split_phrases(query, model.tokenizer):
        lights = attribute_patches(model, pictures, phrase).clamp(min=0)
        for (_, row), picture, light in zip(rows, pictures, lights / lights.max().clamp(min=1e-6)):
            row.append((overlay_heatmap(picture, light), phrase, False))
    return rows


def serve(model, folder, cache, top, sentence=""):
    """A page on this machine: a sentence in, faces out, and for the one that is clicked where each
    phrase was read."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ValueError("--serve needs gradio for its page: pip install gradio") from None
    features = encode_folder(model, folder, cache)

    def on_submit(query):
        with warnings.catch_warnings(record=True) as caught:
            try:
                found = search(model, features, query, top)
            except ValueError as error:
                raise gradio.Error(str(error)) from None
        for warning in caught:
            gradio.Warning(str(warning.message))
        return [(one.image(), str(one)) for one in found], (query, found), None

    def on_select(asked, chosen: gradio.SelectData):
        query, found = asked
        return contact_sheet(result_rows(model, query, [found[chosen.index]], explain=True), tile=192)

    with gradio.Blocks(title="FLIP", delete_cache=(600, 600)) as page:      # its copies of faces do not stay
        gradio.Markdown(f"# Search in {len(features)} faces\nScore, cosine, matching probability below each; "
                        f"click one to see where each phrase was read.")
        query, asked = gradio.Textbox(sentence, label="a sentence", autofocus=True), gradio.State()
        gallery = gradio.Gallery(columns=4, object_fit="contain", allow_preview=False, show_label=False)
        maps = gradio.Image(show_label=False)
        query.submit(on_submit, query, [gallery, asked, maps])
        gallery.select(on_select, asked, maps)
    page.launch(server_name="127.0.0.1", inbrowser=True)


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face photographs with a sentence.")
    parser.add_argument("query", nargs="?", help='for example "a smiling woman with blond hair"')
    parser.add_argument("--checkpoint", default="out/flip.pt",
                        help="made by train.py, or the official FLIP-base.pth")
    parser.add_argument("--images", required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument("--vocabulary", help="vocab.txt, tokenizer.json, folder or hub name; the official "
                                             "checkpoint needs bert-base-uncased, ours bring their own")
    parser.add_argument("--top", type=int, default=8, help="how many faces to show")
    parser.add_argument("--out", default="out/search.png", help="where to write the contact sheet")
    parser.add_argument("--explain", action="store_true",
                        help="show beside each face where on it every phrase of the sentence was read")
    parser.add_argument("--serve", action="store_true",
                        help="instead of one query, search on a page in the browser (pip install gradio)")
    args = parser.parse_args()
    out = Path(args.out)
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: expected the name of a picture, such as out/search.png")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder")
    path = resolve_file(args.checkpoint, CHECKPOINT_FILES)
    model = FLIP.from_pretrained(path, vocabulary=args.vocabulary)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    # What is wrong with words is said before pictures are read.
    model.require_tokenizer() if args.serve else model.tokenize(args.query or "")
    stat = path.stat()
    version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    cache = out.parent / f"features-{hashlib.sha256(version.encode()).hexdigest()[:12]}.pt"
    if args.serve:
        return serve(model, args.images, cache, args.top, args.query or "")
    features = encode_folder(model, args.images, cache)
    found = search(model, features, args.query, args.top)
    print(f" score  cosine   match    best of {len(features)} faces")
    print(*found, sep="\n")
    contact_sheet(result_rows(model, args.query, found, args.explain)).save(out)
    print(f"contact sheet: {out}")


if __name__ == "__main__":
    run_script(main)

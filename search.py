"""Search a folder of face images with a sentence: rank by cosine, then re-rank the best with the ITM head.

    python search.py --checkpoint out/flip.pt --images DIR "a smiling woman with blond hair"
"""
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

from bert import words_of
from common.distributed import DEVICES, autocast, choose_device
from common.images import IMAGE_SUFFIXES, contact_sheet, load_image, prepare_image_file
from common.script import escape_control_chars, run_script
from common.weights import read_file, write_checkpoint
from flip import FLIP
from inference import eval_mode

CLAUSE_WORDS = "and|but|with|without|who|whose|that|he|she|they|has|have|having|is|are|wears|wearing"
EXAMPLES = ["a smiling woman with blond hair and glasses", "a man with a beard", "a person without a hat"]


def load_feature_cache(cache: Path, embed_dim):
    """{key: feature} of earlier searches; empty if the file is missing or damaged."""
    try:
        cached = read_file(cache)
        return cached
    except Exception:                               # after any error the features are computed again
        return {}


def image_encoder_hash(model: FLIP) -> str:
    """12 hexadecimal digits of the weights that image features depend on."""
    digest, encoders = hashlib.sha256(), model.student
    for p in (*encoders.image.parameters(), *encoders.image_projection.parameters()):
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def encode_folder(model: FLIP, folder: str | Path, cache: str | Path) -> dict[Path, torch.Tensor]:
    """{path: feature (E,)} of every image in `folder` and its subfolders, from the file `cache` if file and
    encoder are unchanged; unreadable images are reported and skipped. Raises ValueError if none is left."""
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none")
    cached = load_feature_cache(cache, model.config.embed_dim)
    encoder = image_encoder_hash(model)
    keys = {p: f"{encoder} {p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths}
    new = [path for path in paths if keys[path] not in cached]
    for indices, pixels in model.load_images(new, errors="skip") if new else ():
        with eval_mode(model), autocast("auto", model.device):
            features = model.student.image_features(pixels).cpu()
        cached |= {keys[new[i]]: feature.clone() for i, feature in zip(indices, features)}
    if new:
        write_checkpoint(cached, cache)
    encoded = {path: cached[key] for path, key in keys.items() if key in cached}
    if not encoded:
        raise ValueError(f"{folder}: none of its {len(paths)} images can be read")
    return encoded


class SearchResult(NamedTuple):
    """An image with its ranking score and the measures of ITC and ITM behind it. Score and cosine are those
    of what the query asks for, minus those of what it excludes."""
    path: Path
    score: float            # FLIP.rerank_score
    cosine: float           # of the ITC features
    probability: float      # from the ITM head, that the image matches and shows nothing excluded

    def image(self) -> Image.Image:
        """The image, at most 512 pixels wide and high."""
        image = load_image(self.path)
        image.thumbnail((512, 512))
        return image

    def __str__(self):
        return (f"{self.score:6.2f} {self.cosine:7.3f} {100 * self.probability:6.1f} %  "
                f"{escape_control_chars(self.path)}")


def split_negations(query: str) -> tuple[str, list[str]]:
    """What a sentence asks for and what it excludes: "a man without a hat or glasses" -> "a man", ["a hat",
    "glasses"]. After "and" or a comma it asks again."""
    query = query.replace("\u2019", "'")
    negation = (r"\b(?:without|no|not|never|neither|nor|\w+n't)\s+(.+?)"
                rf"(?=\s*(?:[,.;]|\b(?:{CLAUSE_WORDS}|no|not|nor)\b|$))")
    excluded = [phrase for phrases in re.findall(negation, query, re.I)
                for phrase in re.split(r"\sor\s", phrases)]
    return re.sub(negation, "", query, flags=re.I).strip(" ,.;"), excluded


def tokenize_query(model: FLIP, query: str):
    """Captions (T) of what a query asks for and excludes, and their signs (T,). Captions state what is there,
    so a model does not learn negations: the score of what is excluded is subtracted."""
    asked, excluded = split_negations(query)
    if excluded:
        warnings.warn(f"ranked by {asked or 'nothing'!r} minus {', '.join(map(repr, excluded))}")
    asked = [asked] if asked or not excluded else []
    return model.tokenize([*asked, *excluded]), torch.tensor([1.0] * len(asked) + [-1.0] * len(excluded))


@torch.no_grad()
def search(model: FLIP, features: dict[Path, torch.Tensor], query: str, top=8, k=32) -> list[SearchResult]:
    """The `top` best images for a sentence: the ITM head re-ranks the max(k, top) of highest cosine."""
    (captions, signs), paths = tokenize_query(model, query), list(features)
    with eval_mode(model):
        text_features = model.student.text_features(captions).cpu()
    cosines = torch.stack(list(features.values())) @ text_features.T                            # (I, T)
    best = (cosines @ signs).topk(min(max(k, top), len(paths))).indices
    with eval_mode(model), autocast("auto", model.device):
        tokens = torch.cat([model.student.image_tokens_and_features(pixels)[0]
                            for _, pixels in model.load_images([paths[i] for i in best])])
        logits = model.score_pairs(tokens, captions).cpu().unflatten(0, (len(best), -1))        # (k, T, 2)
    scores = model.rerank_score(logits, cosines[best]) @ signs                                      # (k,)
    p = logits.softmax(-1)[..., 1]                                                              # (k, T)
    rows = zip(best, scores, cosines[best] @ signs, torch.where(signs > 0, p, 1 - p).prod(1))
    results = [SearchResult(paths[i], *(value.item() for value in values)) for i, *values in rows]
    return sorted(results, key=lambda result: -result.score)[:top]


def split_phrases(query: str, tokenizer) -> list[str]:
    """The phrases of a sentence with a known word: "a man with a hat and a tie" -> a man, a hat, a tie."""
    phrases = re.split(rf"[,.;]|(?<![\w-])(?:{CLAUSE_WORDS})(?![\w-])", query.lower())
    return [phrase.strip() for phrase in phrases
            if len(tokenizer.unknown_words(phrase)) < len(words_of(phrase))]


def attribute_patches(model: FLIP, images, phrase: str, steps=8) -> torch.Tensor:
    """Attribution of the ranking score for a phrase to the patches of I images (paths or PIL images), (I,
    rows, columns). Those of an image sum to about the difference in score between it and a plain grey image.

    Integrated gradients (arXiv 1703.01365): pixels times gradient, averaged along the path from grey, CLIP's
    mean colour, to the image. (At the image itself the gradient vanishes where the head is certain.)"""
    captions, patch, attributions = model.tokenize(phrase), model.config.vit.patch_size, []
    text_feature = model.encode_text(phrase)[0]
    with eval_mode(model), torch.enable_grad():
        for pixels in torch.cat([pixels for _, pixels in model.load_images(images)]).split(8):
            gradient = torch.zeros_like(pixels)
            for step in range(steps):
                interpolated = (pixels * (step + 0.5) / steps).requires_grad_()
                tokens, features = model.student.image_tokens_and_features(interpolated)
                score = model.rerank_score(model.score_pairs(tokens, captions), features @ text_feature)
                gradient += torch.autograd.grad(score.sum(), interpolated)[0] / steps
            attributions.append(F.avg_pool2d((pixels * gradient).sum(1), patch, divisor_override=1).cpu())
    return torch.cat(attributions)


def result_rows(model: FLIP, query: str, results: list[SearchResult], explain: bool):
    """Rows for `contact_sheet`: all images in one row or, if `explain`, a row per image, with a copy of it
    for each phrase of the query (at most 12). A copy is dark where the attribution is low, on one scale for
    all images of a phrase; its label is the attribution's sum."""
    images = [result.image() for result in results]
    if not explain:
        return [(query, [(image, f"{result.score:.1f}  {result.cosine:.2f}  {100 * result.probability:.0f} %",
                          False) for image, result in zip(images, results)])]
    rows = [(str(result).strip(), [(image, "", False)]) for image, result in zip(images, results)]
    asked, excluded = split_negations(query)
    for phrase in [*split_phrases(asked, model.tokenizer), *excluded][:12]:
        attributions = attribute_patches(model, images, phrase)
        totals, heatmaps = attributions.sum((1, 2)), attributions.clamp(min=0)
        heatmaps = heatmaps / heatmaps.max().clamp(min=1e-6)
        for (_, row), image, total, heatmap in zip(rows, images, totals, heatmaps):
            mask = Image.fromarray((255 * heatmap).byte().numpy()).resize(image.size)
            dark = image.point(lambda value: value // 4)
            row.append((Image.composite(image, dark, mask), f"{total:+.1f} {phrase}", False))
    return rows


def serve(model: FLIP, folder: str | Path, cache: Path, top: int, sentence=""):
    """Open a local web page: a query returns faces, and a click on a face shows a heatmap per phrase."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ValueError("--serve: expected the package gradio >= 6; pip install 'gradio>=6'") from None
    features = encode_folder(model, folder, cache)

    def on_submit(query):
        with warnings.catch_warnings(record=True) as caught:
            try:
                results = search(model, features, query, top)
            except ValueError as error:             # the faces of the last query stay
                return f"⚠ {error}", gradio.skip(), gradio.skip(), gradio.skip()
        message = "\n\n".join(f"⚠ {warning.message}" for warning in caught)
        faces = [(result.image(), str(result._replace(path=result.path.relative_to(folder))))
                 for result in results]
        return message, gradio.Gallery(faces, label=query), (query, results), None

    def on_select(last_search, event: gradio.SelectData):
        query, results = last_search
        return contact_sheet(result_rows(model, query, [results[event.index]], explain=True), tile=192)

    with gradio.Blocks(title="FLIP", delete_cache=(600, 600)) as page:      # gradio copies the faces it shows
        gradio.Markdown(f"# {len(features)} faces\nScore, cosine, match probability; click for heatmaps")
        with gradio.Row():
            query = gradio.Textbox(sentence or EXAMPLES[0], label="query", autofocus=True, scale=4)
            button = gradio.Button("Search")
        gradio.Examples(EXAMPLES, query)
        message, last_search = gradio.Markdown(), gradio.State()
        gallery = gradio.Gallery(columns=4, object_fit="contain", allow_preview=False, buttons=[])
        heatmaps = gradio.Image(show_label=False, buttons=[])
        gradio.on([page.load, query.submit, button.click], on_submit, query,
                  [message, gallery, last_search, heatmaps], trigger_mode="always_last")
        gallery.select(on_select, last_search, heatmaps)
    page.launch(server_name="127.0.0.1", inbrowser=True, footer_links=[],
                css=".caption-label {white-space: normal !important; overflow-wrap: anywhere} "
                    ".grid-wrap {padding-top: 2.5em}")


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face images with a sentence.")
    parser.add_argument("query", nargs="?", help='a sentence, such as "a smiling woman with blond hair"')
    parser.add_argument("--checkpoint", default="out/flip.pt", help="from train.py, or the official one")
    parser.add_argument("--images", default="", help="folder of images, including its subfolders")
    parser.add_argument("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="auto: CUDA if any, else the CPU")
    parser.add_argument("--top", type=int, default=8, help="number of faces to show")
    parser.add_argument("--out", default="out/search.png", help="file for the contact sheet")
    parser.add_argument("--explain", action="store_true", help="show a heatmap per phrase beside each face")
    parser.add_argument("--words", action="store_true", help="print the words that the model knows")
    parser.add_argument("--serve", action="store_true", help="open a web page (pip install 'gradio>=6')")
    args = parser.parse_args()
    out = Path(args.out)
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1")
    prepare_image_file(out)
    if not (args.words or args.images and Path(args.images).is_dir()):
        raise FileNotFoundError(f"--images {args.images}: expected a folder of images, found none")
    device = choose_device(args.device)
    model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary, device=device)
    if args.words:
        return print(*model.require_tokenizer().words)
    # report problems with the query before encoding images
    model.require_tokenizer() if args.serve else tokenize_query(model, args.query or "")
    cache = out.parent / "features.pt"
    if args.serve:
        return serve(model, args.images, cache, args.top, args.query or "")
    features = encode_folder(model, args.images, cache)
    results = search(model, features, args.query, args.top)
    print(f" score  cosine   match    best of {len(features)} faces")
    print(*results, sep="\n")
    contact_sheet(result_rows(model, args.query, results, args.explain)).save(out)
    print(f"contact sheet: {out}")


if __name__ == "__main__":
    run_script(main)

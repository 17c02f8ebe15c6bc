"""Reading and writing weights: CLIP's, BERT's, and checkpoints of the official FLIP and ours."""
import contextlib
import json
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.script import atomic_write, check_like, error_context, short_message

CHECKPOINT_FILES = ("flip.pt", "model.safetensors", "FLIP-base.pth", "ckpt/FLIP-base.pth")


def resolve_file(source: str | Path, filenames: tuple[str, ...]) -> Path:
    """Find a file given by its path, by a folder that contains one of `filenames`, or by a hub name such as
    "openai/clip-vit-base-patch16" (downloaded once). Raises FileNotFoundError if there is none, another
    OSError if the download fails."""
    path, name, expected = Path(source), str(source), " or ".join(filenames)
    for candidate in (path, *(path / filename for filename in filenames)):
        if candidate.is_file():
            return candidate
    if path.exists():
        raise FileNotFoundError(f"{path}: expected a file, or a folder that contains {expected}")
    is_file_name = path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json")
    is_typo = "/" in name and path.parent.is_dir()              # in the last part of a path
    if is_file_name or is_typo or not re.fullmatch(r"[\w-]+/[\w.-]+|bert-[\w-]+", name):
        raise FileNotFoundError(f"{name}: no such file or folder, and not a hub name such as 'owner/model'")
    from huggingface_hub import errors, hf_hub_download
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except Exception as error:
            problem = f"the download failed ({type(error).__name__}: {short_message(error)})"
            if isinstance(error, errors.LocalEntryNotFoundError):       # a subclass of EntryNotFoundError
                problem = "the hub cannot be reached; download it on another machine and give its folder"
            elif isinstance(error, errors.EntryNotFoundError):
                continue
            raise OSError(f"{name}: no such file or folder, and {problem}") from error
    raise FileNotFoundError(f"{name}: expected {expected} in this hub repository, found none")


def load_verified(path: Path, folder: Path | str | None = None):
    """Contents of a .safetensors file, of a file written by torch.save, after checking the checksums, which
    torch ignores, or of the files in `folder` (or hub repository) that a .json index lists. No code in a file
    is run. Raises ValueError if the file is damaged or something else."""
    try:
        if path.suffix == ".json":
            files, weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"], {}
            for name in {Path(name).name for name in files.values()}:           # never in another folder
                shard = load_verified(resolve_file(folder, (name,)))
                weights |= {key: value for key, value in shard.items() if files.get(key) == name}
            if weights.keys() != files.keys():
                raise ValueError(f"{min(files.keys() - weights.keys())!r:.99} is not in the file listed")
            return weights
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = short_message(error).partition(". ")[0]        # torch goes on with advice to run its code
        raise ValueError(f"{path}: not a checkpoint, or damaged ({reason})") from error


def read_weights(source: str | Path, unused: tuple[str, ...], section: str, **expected):
    """Read weights from a file, an index of files, a folder or a hub name. Returns the file's path and {key:
    value} without keys that start with `unused`. Raises ValueError if it is damaged, or if the config.json
    beside it has, in `section`, other than the `expected` settings."""
    path = resolve_file(source, ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                                 "pytorch_model.bin.index.json"))
    folder = path.parent if Path(source).exists() else source
    with contextlib.suppress(FileNotFoundError):        # a missing file or setting is accepted
        config = resolve_file(folder, ("config.json",))
        with error_context(f"the settings {expected}", config):
            found = json.loads(config.read_text(encoding="utf-8"))
            found = expected | found.get(section, found)
            if found | expected != found:
                raise ValueError(f"found {[found[name] for name in expected]!r:.200}")
    weights = load_verified(path, folder)
    with error_context("a dictionary of tensors", path):
        return path, {str(key): x for key, x in weights.items() if not str(key).startswith(unused)}


def read_checkpoint(source: str | Path) -> dict:
    """Contents of a checkpoint of FLIP (file, folder or hub name), which has the weights under "model". The
    folder may be one of `write_folder`, the file a state dict without anything else."""
    path = resolve_file(source, CHECKPOINT_FILES)
    saved = load_verified(path)
    with error_context("a checkpoint of FLIP", path):
        if all(map(torch.is_tensor, saved.values())):
            saved = {"model": saved}
        if path.suffix == ".safetensors":
            config, tokenizer = (resolve_file(path.parent if Path(source).exists() else source, (name,))
                                 for name in ("config.json", "tokenizer.json"))
            saved |= json.loads(config.read_text()) | {"tokenizer": tokenizer.read_text(encoding="utf-8")}
        known = {"flip", "model", "tokenizer", "training"} if "flip" in saved else saved.keys()
        if not isinstance(saved["model"], dict) or saved.keys() - known:
            raise ValueError(f"found the fields {[*saved]!r:.200}")
    return saved


def write_checkpoint(contents: dict, path: str | Path):
    with atomic_write(path) as partial, error_context("enough disk space", path):
        torch.save(contents, partial)


def write_folder(checkpoint: dict, folder: str | Path):
    """Write the contents of a checkpoint as model.safetensors, config.json and tokenizer.json."""
    from safetensors.torch import save_file
    config = {key: value for key, value in checkpoint.items() if key not in ("model", "tokenizer")}
    with (atomic_write(Path(folder) / "model.safetensors") as weights,
          atomic_write(Path(folder) / "tokenizer.json") as tokenizer,
          atomic_write(Path(folder) / "config.json") as sizes):
        save_file(checkpoint["model"], weights)
        tokenizer.write_text(checkpoint["tokenizer"], encoding="utf-8")
        sizes.write_text(json.dumps(config, indent=1))


# ---- from a file into a module -------------------------------------------------------------------
def map_key(key: str, replacements) -> str:
    for ours, theirs in replacements:
        key = key.replace(ours, theirs)
    return key


def resize_position_embedding(embedding: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Resize the position embedding (1 + n, D) of a square grid of n patches to (1 + num_patches, D), with
    bicubic interpolation; the class token's row is unchanged. Raises ValueError if the grid is not square."""
    old, new = round((len(embedding) - 1) ** 0.5), round(num_patches ** 0.5)
    if embedding.ndim != 2 or old * old + 1 != len(embedding):
        raise ValueError(f"expected position embeddings (1 + n * n, D), found shape {tuple(embedding.shape)}")
    if old == new:
        return embedding
    grid = embedding[1:].T.reshape(1, -1, old, old)                                     # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:1], grid.flatten(2)[0].T.to(embedding.dtype)])         # (1 + num_patches, D)


@torch.no_grad()
def load_state(state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], source: str | Path):
    """Copy `weights` into `state`: views of a module's state under the keys of the file, so that errors name
    these. Position embeddings of images are resized; position_ids, which are constants, are ignored. Raises
    ValueError, and changes nothing, if weights are missing, unexpected, not finite or do not fit."""
    state, weights = ({key: x for key, x in tensors.items() if not str(key).endswith("position_ids")}
                      for tensors in (state, weights))
    with error_context("weights of this model", source):
        for key in [key for key in state if torch.is_tensor(weights.get(key))]:
            tensor, target = weights[key], state[key]
            if key.endswith(("image.positions", ".position_embedding.weight")):     # not BERT's
                tensor = resize_position_embedding(tensor, len(target) - 1)
            if tensor.is_floating_point() and tensor.element_size() > 1 and target.is_floating_point():
                weights[key] = tensor.detach().to(target.dtype)                     # from 16, 32 or 64 bits
        check_like(weights, state, "weights")
    for key, target in state.items():
        target.copy_(weights[key])


# ---- CLIP ----------------------------------------------------------------------------------------
# Our key -> the key of Hugging Face's CLIP, which does spell it pre_layrnorm (the official FLIP has
# post_layrnorm, too). Replaced in this order, a longer string before one that it contains.
CLIP_KEYS = [
    ("class_token", "embeddings.class_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
    ("positions", "embeddings.position_embedding.weight"), ("norm_before", "pre_layrnorm"),
    ("norm_after", "post_layernorm"), ("blocks.", "encoder.layers."), ("norm_attention", "layer_norm1"),
    ("norm_mlp", "layer_norm2"), (".attention.query", ".self_attn.q_proj"),
    (".attention.key", ".self_attn.k_proj"), (".attention.value", ".self_attn.v_proj"),
    (".attention.out", ".self_attn.out_proj"), (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2.")]


def load_clip(vit, source: str | Path):
    """Load the image encoder of a Hugging Face CLIP (file, folder or hub name) into `vit`."""
    unused = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    path, weights = read_weights(source, unused, "vision_config", hidden_act="quick_gelu",
                                 layer_norm_eps=1e-5, num_attention_heads=vit.config.heads)
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in weights) else ""
    state = {prefix + map_key(key, CLIP_KEYS): tensor for key, tensor in vit.state_dict().items()}
    load_state(state, weights, path)


# ---- BERT ----------------------------------------------------------------------------------------
# Our key -> the key of Hugging Face's BERT. Replaced in this order, as above.
BERT_KEYS = [
    ("words.", "embeddings.word_embeddings."), ("positions", "embeddings.position_embeddings.weight"),
    (".attention.", ".attention.self."), (".cross_attention.", ".crossattention.self."),
    (".self.out.", ".output.dense."), ("norm.", "embeddings.LayerNorm."),
    ("norm_attention", "attention.output.LayerNorm"), ("norm_mlp", "output.LayerNorm"),
    ("norm_cross_attention", "crossattention.output.LayerNorm"), ("layers.", "encoder.layer."),
    (".up.", ".intermediate.dense."), (".down.", ".output.dense.")]


def load_bert(bert, source: str | Path):
    """Load a Hugging Face BERT (file, folder or hub name) into `bert`. Cross-attention and the embeddings of
    [DEC] and [ENC], which BERT lacks, keep their initial values. Token type 0 is added to the positions."""
    path, weights = read_weights(source, ("cls.", "pooler.", "bert.pooler."), "", hidden_act="gelu",
                                 layer_norm_eps=1e-12, num_attention_heads=bert.config.heads,
                                 position_embedding_type="absolute")
    prefix = "bert." if any(key.startswith("bert.") for key in weights) else ""
    keys = [*BERT_KEYS]
    if any(key.endswith("LayerNorm.gamma") for key in weights):
        keys += [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    state = {prefix + map_key(key, keys): tensor for key, tensor in bert.state_dict().items()}
    words, types = (f"{prefix}embeddings.{name}_embeddings.weight" for name in ("word", "token_type"))
    state[types] = state[words].new_zeros(2, bert.config.width)
    initial = {key: tensor for key, tensor in state.items() if "crossattention" in key or key == types}
    if getattr(weights.get(words), "shape", ())[:1] == (bert.config.vocab_size - 2,):
        state[words] = state[words][:-2]
    load_state(state, initial | weights, path)
    bert.positions.data += state[types][0]


# ---- the official FLIP ---------------------------------------------------------------------------
OFFICIAL_KEYS = [
    ("student.image.", "visual_encoder.vision_model."), ("student.text.", "text_encoder."),
    ("student.image_projection", "vision_proj"), ("student.text_projection", "text_proj"),
    ("momentum_encoder.image.", "visual_encoder_m.vision_model."),
    ("momentum_encoder.text.", "text_encoder_m."), ("momentum_encoder.image_projection", "vision_proj_m"),
    ("momentum_encoder.text_projection", "text_proj_m"), ("matching_head", "itm_head"),
    ("temperature", "temp"), ("queue_identity", "idx_queue"), ("queue_pointer", "ptr_queue")]


def official_name(key: str) -> str:
    """Our key in FLIP's state dict -> the key in the official FLIP-base.pth."""
    if ".image." in key:
        key = map_key(key, CLIP_KEYS).replace("post_layernorm", "post_layrnorm")
    if ".text." in key:
        key = map_key(key, BERT_KEYS)
    return map_key(key, OFFICIAL_KEYS)


def official_state(model) -> dict[str, torch.Tensor]:
    """FLIP's state dict (views of its tensors) with official keys and shapes and the constant position_ids:
    all 1,049 entries of the official file, ready for torch.save({"model": state}, path)."""
    state = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    state |= {"image_queue": state["image_queue"].T, "text_queue": state["text_queue"].T,           # (E, Q)
              "idx_queue": state["idx_queue"][None]}                                                # (1, Q)
    position_ids = {key.split(".position_embedding")[0] + ".position_ids": torch.arange(len(tensor))[None]
                    for key, tensor in state.items() if ".position_embedding" in key}
    return state | position_ids


def official_sizes(weights):
    """The sizes of an official checkpoint, inferred from its shapes, with heads 64 wide, as in BERT and
    OpenAI's CLIP. Raises ValueError if a width is not a multiple of 64, KeyError if a weight is missing."""
    depth = lambda prefix: len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})
    image, text = "visual_encoder.vision_model.", "text_encoder."
    width, _, patch, _ = weights[image + "embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"widths {width} and {text_width} are not multiples of 64, so that the number of "
                         f"heads is unknown; pass config=FLIPConfig(...)")
    grid = round((len(weights[image + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vit = dict(image_size=grid * patch, patch_size=patch, width=width, heads=width // 64,
               depth=depth(image + "encoder.layers."))
    bert = dict(vocab_size=vocabulary, width=text_width, heads=text_width // 64,
                depth=depth(text + "encoder.layer."), dropout=0.1,
                positions=len(weights[text + "embeddings.position_embeddings.weight"]))
    embed_dim, queue_size = weights["image_queue"].shape
    return dict(vit=vit, bert=bert, embed_dim=embed_dim, queue_size=queue_size, hardness=None)

"""Reading and writing weights: CLIP's, BERT's, and checkpoints of the official FLIP and ours."""
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.script import atomic_write, short_message


def resolve_file(source: str | Path, filenames: tuple[str, ...]) -> Path:
    """Find a file given by its path, by a folder that contains one of `filenames`, or by a hub name such as
    "openai/clip-vit-base-patch16" (downloaded once). Raises FileNotFoundError if there is none."""
    path, name = Path(source), str(source)
    candidates = [path, *(path / filename for filename in filenames)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected {' or '.join(filenames)} in this folder, found none")
    if name.count("/") > 1 or path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json"):
        raise FileNotFoundError(f"{name}: no such file or folder, and not a hub name such as 'owner/model'")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except LocalEntryNotFoundError as error:    # a subclass of EntryNotFoundError: no network
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub cannot be reached; "
                                    f"download it on another machine and give its folder") from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise FileNotFoundError(f"{name}: no such file or folder, and the download failed: "
                                    f"{short_message(error)}") from error
    raise FileNotFoundError(f"{name}: expected {' or '.join(filenames)} in this hub repository, found none")


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """{key: tensor} from a .safetensors, .bin, .pt or .pth file, a folder with a model, or a hub name. No
    code in the file is run. Raises ValueError if the file is damaged or contains anything but tensors."""
    path = resolve_file(source, ("model.safetensors", "pytorch_model.bin"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a weights file, or damaged ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"{path}: expected a dictionary of tensors alone, found {type(weights).__name__}")
    return weights


def map_key(key: str, replacements) -> str:
    for ours, theirs in replacements:
        key = key.replace(ours, theirs)
    return key


def check_weights(module: torch.nn.Module, weights, key_of, source: str):
    """Raise a ValueError if weights are missing, unexpected or of another shape. `key_of` maps each key of
    the module's state dict to its key in `weights`."""
    state, unused, errors = module.state_dict(), set(weights), []
    for ours, target in state.items():
        theirs = key_of(ours)
        if theirs not in weights:
            errors.append(f"{theirs} is missing")
        elif weights[theirs].shape != target.shape:
            errors.append(f"{theirs} has shape {tuple(weights[theirs].shape)}, expected "
                          f"{tuple(target.shape)}")
        unused.discard(theirs)
    errors += [f"{theirs} is unexpected" for theirs in sorted(unused)]
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise ValueError(f"{source} does not match this model: {'; '.join(errors[:3])}{more}")


@torch.no_grad()
def copy_weights(module: torch.nn.Module, weights, key_of, source: str):
    """Copy weights[key_of(key)] into each entry of the module's state dict, after `check_weights`."""
    check_weights(module, weights, key_of, source)
    for ours, target in module.state_dict().items():
        target.copy_(weights[key_of(ours)])


def resize_position_embedding(embedding: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Resize the position embedding (1 + n, D) of a square grid of n patches to (1 + num_patches, D), with
    bicubic interpolation; the class token's row is unchanged. Raises ValueError if the grid is not square."""
    old, new = round((len(embedding) - 1) ** 0.5), round(num_patches ** 0.5)
    if embedding.ndim != 2 or old * old + 1 != len(embedding):
        raise ValueError(f"expected a position embedding of a class token and a square grid, found shape "
                         f"{tuple(embedding.shape)}")
    if old == new:
        return embedding
    grid = embedding[1:].T.reshape(1, -1, old, old)                                     # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:1], grid.flatten(2)[0].T.to(embedding.dtype)])         # (1 + num_patches, D)


# ---- CLIP ----------------------------------------------------------------------------------------
# Our key -> the key of Hugging Face's CLIP, which does spell it pre_layrnorm (the official FLIP has
# post_layrnorm, too). Replaced in this order, a longer string before one that it contains.
CLIP_KEYS = [
    ("class_token", "embeddings.class_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
    ("positions", "embeddings.position_embedding.weight"), ("norm_before", "pre_layrnorm"),
    ("norm_after", "post_layernorm"), ("blocks.", "encoder.layers."),
    ("norm_attention", "layer_norm1"), ("norm_mlp", "layer_norm2"),
    (".attention.query", ".self_attn.q_proj"), (".attention.key", ".self_attn.k_proj"),
    (".attention.value", ".self_attn.v_proj"), (".attention.out", ".self_attn.out_proj"),
    (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2.")]


def load_clip(vit, source: str | Path):
    """Load the image encoder of a Hugging Face CLIP (file, folder or hub name) into `vit`."""
    unused = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    weights = {key.removeprefix("vision_model."): tensor for key, tensor in read_weights(source).items()
               if not key.startswith(unused) and not key.endswith("position_ids")}
    position_key = "embeddings.position_embedding.weight"
    if position_key in weights:
        weights[position_key] = resize_position_embedding(weights[position_key], vit.config.num_patches)
    copy_weights(vit, weights, lambda key: map_key(key, CLIP_KEYS), str(source))


# ---- BERT ----------------------------------------------------------------------------------------
# Our key -> the key of Hugging Face's BERT. Replaced in this order, as above.
BERT_KEYS = [
    ("words.", "embeddings.word_embeddings."), ("positions", "embeddings.position_embeddings.weight"),
    ("norm_attention", "attention.output.LayerNorm"),
    ("norm_cross_attention", "crossattention.output.LayerNorm"),
    ("norm_mlp", "output.LayerNorm"), ("layers.", "encoder.layer."),
    (".cross_attention.out.", ".crossattention.output.dense."),
    (".cross_attention.", ".crossattention.self."), (".attention.out.", ".attention.output.dense."),
    (".attention.query", ".attention.self.query"), (".attention.key", ".attention.self.key"),
    (".attention.value", ".attention.self.value"), (".up.", ".intermediate.dense."),
    (".down.", ".output.dense.")]


def bert_key(key: str) -> str:
    """Our key of a text encoder weight -> the key of Hugging Face's BERT."""
    if key.startswith("norm."):                             # the LayerNorm after the embeddings
        return key.replace("norm.", "embeddings.LayerNorm.")
    return map_key(key, BERT_KEYS)


def load_bert(bert, source: str | Path):
    """Load a Hugging Face BERT (file, folder or hub name) into `bert`. Cross-attention and the embeddings of
    [DEC] and [ENC], which BERT lacks, keep their initial values. Token type 0 is added to the positions."""
    weights = {}
    for key, tensor in read_weights(source).items():
        key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        if not key.startswith(("cls.", "pooler.")) and not key.endswith("position_ids"):
            weights[key] = tensor
    state = bert.state_dict()
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    types = weights.pop("embeddings.token_type_embeddings.weight", None)
    if words in weights and len(weights[words]) + 2 == bert.config.vocab_size:
        weights[words] = torch.cat([weights[words], state["words.weight"][-2:].cpu()])
    if positions in weights and types is not None:
        weights[positions] = weights[positions] + types[0]
    initial = {bert_key(key): tensor for key, tensor in state.items() if "cross_attention" in key}
    copy_weights(bert, initial | weights, bert_key, str(source))


# ---- checkpoints, ours and the official one ------------------------------------------------------
def load_verified(path: Path):
    """torch.load, after checking the checksums, which torch ignores. No code in the file is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path) -> dict:
    """Contents of a checkpoint (file, folder or hub name): a dictionary with the weights under "model".
    Raises ValueError if the file is damaged or something else."""
    path = resolve_file(path, CHECKPOINT_FILES)
    try:
        saved = load_verified(path)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged ({short_message(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with weights under 'model', found none")
    return saved


def write_checkpoint(contents: dict, path: str | Path):
    try:
        with atomic_write(path) as partial:
            torch.save(contents, partial)
    except RuntimeError as error:               # raised by torch when the disk is full
        raise OSError(f"{path} could not be written; is the disk full? ({short_message(error)})") from error


CHECKPOINT_FILES = ("flip.pt", "FLIP-base.pth")  # in a folder or a hub repository
OFFICIAL_KEYS = {"image_queue": "image_queue", "text_queue": "text_queue", "queue_identity": "idx_queue",
                 "queue_pointer": "ptr_queue", "temperature": "temp",
                 "matching_head.weight": "itm_head.weight", "matching_head.bias": "itm_head.bias"}


def official_name(key: str) -> str:
    """Our key in FLIP's state dict -> the key in the official FLIP-base.pth."""
    if key in OFFICIAL_KEYS:
        return OFFICIAL_KEYS[key]
    encoders, module, rest = key.split(".", 2)
    suffix = "_m" if encoders == "momentum_encoder" else ""
    if module == "image":
        rest = map_key(rest, CLIP_KEYS).replace("post_layernorm", "post_layrnorm")
        return f"visual_encoder{suffix}.vision_model.{rest}"
    if module == "text":
        return f"text_encoder{suffix}.{bert_key(rest)}"
    return f"{'vision_proj' if module == 'image_projection' else 'text_proj'}{suffix}.{rest}"


def official_state(model) -> dict[str, torch.Tensor]:
    """FLIP's state dict with official keys and shapes, ready for torch.save({"model": state}, path)."""
    state = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    for queue in ("image_queue", "text_queue"):
        state[queue] = state[queue].T.contiguous()                                  # (E, Q)
    state["idx_queue"] = state["idx_queue"][None]                                   # (1, Q)
    for suffix in ("", "_m"):   # position_ids are constants: 0, 1, 2, ...
        lengths = {f"visual_encoder{suffix}.vision_model": model.config.vit.num_patches + 1,
                   f"text_encoder{suffix}": model.config.bert.positions}
        state |= {f"{name}.embeddings.position_ids": torch.arange(n)[None] for name, n in lengths.items()}
    return state


def read_official(weights, path: str | Path):
    """The official weights in our shapes, with the keys that `official_name` returns: of the file's 1,049
    entries, all but the four position_ids, which `official_state` recreates."""
    if "visual_encoder.vision_model.embeddings.class_embedding" not in weights:
        raise ValueError(f"{path} is neither one of our checkpoints nor an official one: it has no "
                         f"visual_encoder.vision_model.embeddings.class_embedding")
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")}
    queues = {key: weights[key].T for key in ("image_queue", "text_queue")}         # (Q, E)
    return weights | queues | {"idx_queue": weights["idx_queue"][0]}


def official_sizes(weights, path: str | Path):
    """The sizes of an official checkpoint, inferred from its shapes, with heads 64 wide, as in BERT and
    OpenAI's CLIP. Raises ValueError if a width is not a multiple of 64."""
    def depth(prefix):
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})
    image, text = "visual_encoder.vision_model.", "text_encoder."
    width, _, patch, _ = weights[image + "embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"{path}: expected widths that are multiples of 64, found {width} and {text_width}; "
                         f"the number of heads is unknown, pass config=FLIPConfig(...)")
    grid = round((len(weights[image + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vit = dict(image_size=grid * patch, patch_size=patch, width=width, depth=depth(image + "encoder.layers."),
               heads=width // 64)
    bert = dict(vocab_size=vocabulary, width=text_width, depth=depth(text + "encoder.layer."),
                heads=text_width // 64,
                positions=len(weights[text + "embeddings.position_embeddings.weight"]))
    queue_size, embed_dim = weights["image_queue"].shape
    return dict(vit=vit, bert=bert, embed_dim=embed_dim, queue_size=queue_size)

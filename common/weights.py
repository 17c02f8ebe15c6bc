"""Reading and writing weights: CLIP's, BERT's, and checkpoints of the official FLIP and ours."""
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.script import atomic_write, short_message

CHECKPOINT_FILES = ("flip.pt", "FLIP-base.pth")     # in a folder or a hub repository


def resolve_file(source: str | Path, filenames: tuple[str, ...]) -> Path:
    """Find a file given by its path, by a folder that contains one of `filenames`, or by a hub name such as
    "openai/clip-vit-base-patch16" (downloaded once). Raises FileNotFoundError if there is none."""
    path, name, expected = Path(source), str(source), " or ".join(filenames)
    for candidate in (path, *(path / filename for filename in filenames)):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected {expected} in this folder, found none")
    if name.count("/") > 1 or path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json"):
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
            raise FileNotFoundError(f"{name}: no such file or folder, and {problem}") from error
    raise FileNotFoundError(f"{name}: expected {expected} in this hub repository, found none")


def load_verified(path: Path):
    """Contents of a .safetensors file or of a file written by torch.save, after checking the checksums, which
    torch ignores. No code in the file is run. Raises ValueError if the file is damaged or something else."""
    try:
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


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """{key: tensor} from a .safetensors, .bin, .pt or .pth file, a folder with a model, or a hub name. Raises
    ValueError if the file is damaged or contains anything but tensors."""
    path = resolve_file(source, ("model.safetensors", "pytorch_model.bin"))
    weights = load_verified(path)
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(weights).__name__}")
    for key, value in weights.items():
        if not torch.is_tensor(value):
            raise ValueError(f"{path}: expected tensors alone, found {type(value).__name__} under {key!r}")
    return weights


def read_checkpoint(source: str | Path) -> dict:
    """Contents of a checkpoint of FLIP (file, folder or hub name), which has the weights under "model"."""
    path = resolve_file(source, CHECKPOINT_FILES)
    saved = load_verified(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with weights under 'model', found none")
    return saved


def write_checkpoint(contents: dict, path: str | Path):
    try:
        with atomic_write(path) as partial:
            torch.save(contents, partial)
    except RuntimeError as error:               # raised by torch when the disk is full
        raise OSError(f"{path} could not be written; is the disk full? ({short_message(error)})") from error


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
    ValueError, and changes nothing, if weights are missing, unexpected or of another shape."""
    state, weights = ({key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
                      for tensors in (state, weights))
    for key in weights.keys() & state.keys():
        if key.endswith(("image.positions", ".position_embedding.weight")):     # ours, CLIP's (not BERT's)
            weights[key] = resize_position_embedding(weights[key], len(state[key]) - 1)
    errors = [f"{key} is missing" for key in state if key not in weights]
    errors += [f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(target.shape)}"
               for key, target in state.items() if key in weights and weights[key].shape != target.shape]
    errors += [f"{key} is unexpected" for key in weights if key not in state]
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise ValueError(f"{source} does not match this model: {'; '.join(errors[:3])}{more}")
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
    weights = {key.removeprefix("vision_model."): tensor for key, tensor in read_weights(source).items()
               if not key.startswith(unused)}
    load_state({map_key(key, CLIP_KEYS): tensor for key, tensor in vit.state_dict().items()}, weights, source)


# ---- BERT ----------------------------------------------------------------------------------------
# Our key -> the key of Hugging Face's BERT. Replaced in this order, as above.
BERT_KEYS = [
    ("words.", "embeddings.word_embeddings."), ("positions", "embeddings.position_embeddings.weight"),
    ("norm.", "embeddings.LayerNorm."), ("norm_attention", "attention.output.LayerNorm"),
    ("norm_cross_attention", "crossattention.output.LayerNorm"), ("norm_mlp", "output.LayerNorm"),
    ("layers.", "encoder.layer."), (".cross_attention.out.", ".crossattention.output.dense."),
    (".cross_attention.", ".crossattention.self."), (".attention.out.", ".attention.output.dense."),
    (".attention.query", ".attention.self.query"), (".attention.key", ".attention.self.key"),
    (".attention.value", ".attention.self.value"), (".up.", ".intermediate.dense."),
    (".down.", ".output.dense.")]


def load_bert(bert, source: str | Path):
    """Load a Hugging Face BERT (file, folder or hub name) into `bert`. Cross-attention and the embeddings of
    [DEC] and [ENC], which BERT lacks, keep their initial values. Token type 0 is added to the positions."""
    renamed = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]
    unused = ("cls.", "pooler.", "bert.pooler.")
    weights = {map_key(key, renamed).removeprefix("bert."): tensor
               for key, tensor in read_weights(source).items() if not key.startswith(unused)}
    state = {map_key(key, BERT_KEYS): tensor for key, tensor in bert.state_dict().items()}
    initial = {key: tensor for key, tensor in state.items() if "crossattention" in key}
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    types = weights.pop("embeddings.token_type_embeddings.weight", None)
    if words in weights and len(weights[words]) + 2 == bert.config.vocab_size:
        weights[words] = torch.cat([weights[words], state[words][-2:].cpu()])
    if positions in weights and types is not None:
        weights[positions] = weights[positions] + types[0]
    load_state(state, initial | weights, source)


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


def official_sizes(weights, path: str | Path):
    """The sizes of an official checkpoint, inferred from its shapes, with heads 64 wide, as in BERT and
    OpenAI's CLIP. Raises ValueError if a width is not a multiple of 64, or if the checkpoint is another."""
    def depth(prefix):
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})
    image, text = "visual_encoder.vision_model.", "text_encoder."
    if image + "embeddings.class_embedding" not in weights:
        raise ValueError(f"{path} is neither one of our checkpoints nor an official one")
    width, _, patch, _ = weights[image + "embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"{path}: expected widths that are multiples of 64, found {width} and {text_width}; "
                         f"the number of heads is unknown, pass config=FLIPConfig(...)")
    grid = round((len(weights[image + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vit = dict(image_size=grid * patch, patch_size=patch, width=width, heads=width // 64,
               depth=depth(image + "encoder.layers."))
    bert = dict(vocab_size=vocabulary, width=text_width, heads=text_width // 64,
                depth=depth(text + "encoder.layer."),
                positions=len(weights[text + "embeddings.position_embeddings.weight"]))
    embed_dim, queue_size = weights["image_queue"].shape
    return dict(vit=vit, bert=bert, embed_dim=embed_dim, queue_size=queue_size)

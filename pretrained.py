"""Read and write weights: CLIP's, BERT's, and checkpoints of the official FLIP and of this
project."""
import json
import re
import shutil
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.script import atomic_write, naming

CHECKPOINT_FILES = ("flip.pt", "model.safetensors", "FLIP-base.pth", "ckpt/FLIP-base.pth")


# ---- files ---------------------------------------------------------------------------------------
def resolve_file(source: str | Path, filenames: tuple[str, ...]) -> Path:
    """Find a file given by its path, by a folder that contains one of `filenames`, or by a hub name
    such as "openai/clip-vit-base-patch16" (downloaded once). Raises FileNotFoundError if there is
    none."""
    path = Path(source)
    name = str(source)
    expected = " or ".join(filenames)
    candidates = [path, *(path / filename for filename in filenames)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate

    is_file_name = path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json")
    is_hub_name = re.fullmatch(r"[\w-]+/[\w.-]+|bert-[\w-]+", name) and not is_file_name
    if path.exists() or not is_hub_name:
        raise FileNotFoundError(f"{name}: expected a file, a folder that contains {expected}, "
                                "or a hub name")
    from huggingface_hub import errors, hf_hub_download
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except errors.LocalEntryNotFoundError:          # the hub cannot be reached
            raise
        except errors.EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{name}: expected {expected} in this hub repository, found none")


def resolve_beside(source: str | Path, path: Path, filename: str) -> Path:
    """Find a file in the folder or hub repository of `path`, which is the result of `resolve_file`
    for `source`. Raises FileNotFoundError if there is none."""
    folder = path.parent if Path(source).exists() else source
    return resolve_file(folder, (filename,))


def read_file(path: Path):
    """Contents of a .safetensors file or of a file written by torch.save, whose checksums torch
    ignores and this function checks. No code in a file is run. Raises ValueError if the file is
    damaged or of another kind."""
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
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:      # of any type; its text may be empty or advise to trust the file
        with open(path, "rb") as file:
            beginning = file.read(40)
        raise ValueError(f"{path} is damaged or contains no weights: {path.stat().st_size:,} bytes "
                         f"that begin with {beginning!r}") from error


def read_pretrained(source: str | Path, section: str, **expected):
    """Weights of a Hugging Face model (file, folder or hub name), and their path. Raises ValueError
    if the settings in `section` of the config.json beside them differ from the expected ones, which
    the weights' shapes do not show. A missing file or setting is accepted."""
    path = resolve_file(source, ("model.safetensors", "pytorch_model.bin"))
    try:
        config = resolve_beside(source, path, "config.json")
    except FileNotFoundError:
        return read_file(path), path
    with naming(config):
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings = settings.get(section, settings)
        for name, value in expected.items():
            found = settings.get(name, value)
            if found != value:
                raise ValueError(f"expected {name} {value!r}, found {found!r}")
    return read_file(path), path


def read_checkpoint(source: str | Path) -> dict:
    """Contents of a checkpoint of FLIP (file, folder or hub name), with the weights under "model".
    Raises ValueError if the file is damaged or not a checkpoint."""
    path = resolve_file(source, CHECKPOINT_FILES)
    saved = read_file(path)
    if path.suffix == ".safetensors":       # written by `write_folder`
        config = resolve_beside(source, path, "config.json")
        tokenizer = resolve_beside(source, path, "tokenizer.json")
        with naming(config):
            sizes = json.loads(config.read_text(encoding="utf-8"))
        saved = sizes | {"model": saved, "tokenizer": tokenizer.read_text(encoding="utf-8")}
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint of FLIP, found {str(saved)!r:.100}")
    return saved


def write_checkpoint(contents: dict, path: str | Path):
    """Write a checkpoint. Raises OSError, and keeps the previous file, if the disk is full."""
    with atomic_write(path) as partial:
        try:
            torch.save(contents, partial)
        except RuntimeError as error:       # does not say that the disk is full
            free = shutil.disk_usage(partial.parent).free
            message = f"{path} cannot be written; {free:,} bytes of its disk are free"
            raise OSError(message) from error


def write_folder(checkpoint: dict, folder: str | Path):
    """Write the contents of a checkpoint as model.safetensors, config.json and tokenizer.json."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint["model"], folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(checkpoint["tokenizer"], encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"flip": checkpoint["flip"]}, indent=1))


# ---- from a file into a module -------------------------------------------------------------------
def check_tensors(found: dict, expected: dict, where: str | Path):
    """Raise a ValueError that names the first key that is missing or unknown, or the first tensor
    that has another shape or dtype than expected, or NaN or infinite numbers."""
    differing = sorted(expected.keys() ^ found.keys())
    if differing:
        problem = "missing" if differing[0] in expected else "unknown"
        raise ValueError(f"{where}: {differing[0]} is {problem} ({len(differing)} names differ, "
                         f"{len(expected)} are expected)")
    for key, tensor in expected.items():
        wanted = f"{tuple(tensor.shape)} {tensor.dtype}"
        has = f"{tuple(found[key].shape)} {found[key].dtype}"
        if has == wanted and not found[key].isfinite().all():
            has = "NaN or infinite numbers"
        if has != wanted:
            raise ValueError(f"{where}: {key}: expected {wanted}, found {has}")


def resize_position_embedding(embedding: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Resize the position embedding (1 + n, D) of a square grid of n patches to (1 + num_patches,
    D), with bicubic interpolation; the class token's row is unchanged."""
    old = round((len(embedding) - 1) ** 0.5)
    new = round(num_patches ** 0.5)
    if old == new:
        return embedding
    grid = embedding[1:].T.reshape(1, -1, old, old)                         # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic")     # (1, D, new, new)
    patches = grid.flatten(2)[0].T.to(embedding.dtype)                      # (num_patches, D)
    return torch.cat([embedding[:1], patches])


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], where: str | Path,
                 rename=lambda key: key, image_positions: tuple[str, ...] = ()):
    """Load the weights of a file into `module`. `rename` maps a key of the module to the key in the
    file. The position embeddings `image_positions` are resized; position_ids, which are constants,
    are ignored. Raises ValueError, and loads nothing, if weights are missing, left over, of another
    shape, not floating-point numbers, or not finite."""
    state = module.state_dict()
    ours = {rename(key): key for key in state}
    weights = {ours.get(key, key): x for key, x in weights.items()
               if not key.endswith("position_ids")}
    for key in weights.keys() & state.keys():
        if key in image_positions:
            weights[key] = resize_position_embedding(weights[key], len(state[key]) - 1)
        if weights[key].is_floating_point() and state[key].is_floating_point():
            weights[key] = weights[key].to(state[key].dtype)    # from half or double precision
    check_tensors(weights, state, where)
    module.load_state_dict(weights)


def key_pairs(table: str) -> list:
    """Rows [our part of a key, the part in the file] of a table. `map_key` applies them in this
    order, and later rows also to the results of earlier ones."""
    return [line.split() for line in table.strip().splitlines()]


def map_key(key: str, replacements) -> str:
    """Our key -> the key in a file."""
    for ours, theirs in replacements:
        key = key.replace(ours, theirs)
    return key


# ---- CLIP ----------------------------------------------------------------------------------------
# Hugging Face's CLIP does spell it pre_layrnorm, and the official FLIP post_layrnorm, too
CLIP_KEYS = key_pairs("""
    class_token         embeddings.class_embedding
    patch_embedding     embeddings.patch_embedding
    positions           embeddings.position_embedding.weight
    norm_before         pre_layrnorm
    norm_after          post_layernorm
    blocks.             encoder.layers.
    norm_attention      layer_norm1
    norm_mlp            layer_norm2
    .attention.query    .self_attn.q_proj
    .attention.key      .self_attn.k_proj
    .attention.value    .self_attn.v_proj
    .attention.out      .self_attn.out_proj
    .up.                .mlp.fc1.
    .down.              .mlp.fc2.
""")


def load_clip(vit, source: str | Path):
    """Load the image encoder of a Hugging Face CLIP (file, folder or hub name) into `vit`."""
    weights, path = read_pretrained(source, "vision_config", hidden_act="quick_gelu",
                                    layer_norm_eps=1e-5, num_attention_heads=vit.config.heads)
    unused = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    weights = {key.removeprefix("vision_model."): x for key, x in weights.items()
               if not key.startswith(unused)}
    load_weights(vit, weights, path, lambda key: map_key(key, CLIP_KEYS), ("positions",))


# ---- BERT ----------------------------------------------------------------------------------------
BERT_KEYS = key_pairs("""
    words.                  embeddings.word_embeddings.
    positions               embeddings.position_embeddings.weight
    .attention.             .attention.self.
    .cross_attention.       .crossattention.self.
    .self.out.              .output.dense.
    norm.                   embeddings.LayerNorm.
    norm_attention          attention.output.LayerNorm
    norm_mlp                output.LayerNorm
    norm_cross_attention    crossattention.output.LayerNorm
    layers.                 encoder.layer.
    .up.                    .intermediate.dense.
    .down.                  .output.dense.
""")


def load_bert(bert, source: str | Path):
    """Load a Hugging Face BERT (file, folder or hub name) into `bert`. Cross-attention and the
    embeddings of [DEC] and [ENC], which BERT lacks, get initial values with BERT's standard
    deviation. The embedding of token type 0 is added to the positions."""
    weights, path = read_pretrained(source, "", hidden_act="gelu", layer_norm_eps=1e-12,
                                    num_attention_heads=bert.config.heads,
                                    position_embedding_type="absolute")
    old_names = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]
    unused = ("cls.", "pooler.", "bert.pooler.")
    weights = {map_key(key.removeprefix("bert."), old_names): x for key, x in weights.items()
               if not key.startswith(unused)}

    for layer in bert.layers:
        for linear in layer.cross_attention.children():
            torch.nn.init.normal_(linear.weight, std=0.02)

    words = "embeddings.word_embeddings.weight"
    if words in weights and len(weights[words]) == bert.config.vocab_size - 2:
        new = 0.02 * torch.randn(2, bert.config.width)
        weights[words] = torch.cat([weights[words], new])
    positions = "embeddings.position_embeddings.weight"
    types = "embeddings.token_type_embeddings.weight"
    if types in weights and positions in weights:
        weights[positions] = weights[positions] + weights.pop(types)[0]
    initial = {key: x for key, x in bert.state_dict().items() if "cross_attention" in key}
    load_weights(bert, initial | weights, path, lambda key: map_key(key, BERT_KEYS))


# ---- the official FLIP ---------------------------------------------------------------------------
OFFICIAL_KEYS = key_pairs("""
    student.image.                       visual_encoder.vision_model.
    student.text.                        text_encoder.
    student.image_projection             vision_proj
    student.text_projection              text_proj
    momentum_encoder.image.              visual_encoder_m.vision_model.
    momentum_encoder.text.               text_encoder_m.
    momentum_encoder.image_projection    vision_proj_m
    momentum_encoder.text_projection     text_proj_m
    matching_head                        itm_head
    temperature                          temp
    queue_identity                       idx_queue
    queue_pointer                        ptr_queue
""")


def official_name(key: str) -> str:
    """Our key in FLIP's state dict -> the key in the official FLIP-base.pth."""
    if ".image." in key:
        key = map_key(key, CLIP_KEYS).replace("post_layernorm", "post_layrnorm")
    if ".text." in key:
        key = map_key(key, BERT_KEYS)
    return map_key(key, OFFICIAL_KEYS)


def official_state(model) -> dict[str, torch.Tensor]:
    """FLIP's state dict (views of its tensors) with official keys and shapes and the constant
    position_ids: all entries of the official file, ready for torch.save({"model": state}, path)."""
    state = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    state["image_queue"] = state["image_queue"].T                               # (E, Q)
    state["text_queue"] = state["text_queue"].T                                 # (E, Q)
    state["idx_queue"] = state["idx_queue"][None]                               # (1, Q)
    for key in list(state):
        prefix, found, _ = key.partition(".position_embedding")
        if found:
            state[f"{prefix}.position_ids"] = torch.arange(len(state[key]))[None]
    return state


def load_flip(model, saved: dict, where: str | Path):
    """Load the weights of a checkpoint, one of ours or the official one, into `model`. saved: the
    result of `read_checkpoint`."""
    positions = ("student.image.positions", "momentum_encoder.image.positions")
    weights = dict(saved["model"])
    if "flip" in saved:             # only ours contains the model's sizes
        load_weights(model, weights, where, image_positions=positions)
        return
    for name in {"image_queue", "text_queue"} & weights.keys():
        weights[name] = weights[name].T                                         # (Q, E)
    if "idx_queue" in weights:
        weights["idx_queue"] = weights["idx_queue"].flatten()                   # (Q,)
    load_weights(model, weights, where, official_name, positions)

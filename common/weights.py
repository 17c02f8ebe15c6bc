"""Files of weights: CLIP's, BERT's, the official FLIP's and ours."""
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from common.script import atomic_write, short_message


def resolve_file(source, filenames):
    """The path of a file that is given by its own path, by a folder with one of `filenames`, or by
    a hub name ("openai/clip-vit-base-patch16"), whose file is then downloaded, once."""
    path, name = Path(source), str(source)
    found = [path, *(path / filename for filename in filenames)]
    for candidate in found:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected {' or '.join(filenames)} in this folder")
    if name.count("/") > 1 or path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json"):
        raise FileNotFoundError(f"{name}: no such file or folder (and not a hub name, which looks like "
                                f"'owner/model')")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except LocalEntryNotFoundError as error:    # a kind of EntryNotFoundError that says something else
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub cannot be reached; "
                                    f"download it where there is a network and give its folder") from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub did not give it: "
                                    f"{short_message(error)}") from error
    raise FileNotFoundError(f"{name}: the hub repository holds none of {', '.join(filenames)}")


def read_weights(source):
    """{name: tensor} from a .safetensors, .bin, .pt or .pth file, a folder that holds a model, or a
    hub name. No code from the file is run."""
    path = resolve_file(source, ("model.safetensors", "pytorch_model.bin"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: damaged, or not a file of weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"{path}: expected a dictionary of named tensors, found {type(weights).__name__}")
    return weights


def map_key(name, table):
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def check_weights(module, weights, map_key, source):
    """ValueError with what the module's state lacks in weights[name_of(entry)], what has another
    shape there or would be left over."""
    state, unused, wrong = module.state_dict(), set(weights), []
    for ours, target in state.items():
        theirs = map_key(ours)
        if theirs not in weights:
            wrong.append(f"{theirs} is missing")
        elif weights[theirs].shape != target.shape:
            wrong.append(f"{theirs} has shape {tuple(weights[theirs].shape)}, expected {tuple(target.shape)}")
        unused.discard(theirs)
    wrong += [f"{theirs} has no place in it" for theirs in sorted(unused)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(wrong[:3])}{more}")


@torch.no_grad()
def copy_weights(module, weights, map_key, source):
    """Fill every entry of module's state with weights[name_of(entry)], or change nothing and say
    why."""
    check_weights(module, weights, map_key, source)
    for ours, target in module.state_dict().items():
        target.copy_(weights[map_key(ours)])


def resize_position_embedding(embedding, num_patches):
    """Position table (1 + n, D) of a square grid of n patches -> (1 + patches, D), bicubic; the
    class token's row stays."""
    old, new = round((len(embedding) - 1) ** 0.5), round(num_patches ** 0.5)
    if embedding.ndim != 2 or old * old + 1 != len(embedding):
        raise ValueError(f"a position table of shape {tuple(embedding.shape)} is not that of a square grid "
                         f"and a class token")
    if old == new:
        return embedding
    grid = embedding[1:].T.reshape(1, -1, old, old)                                         # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:1], grid.flatten(2)[0].T.to(embedding.dtype)])             # (1 + patches, D)


# ---- CLIP ----------------------------------------------------------------------------------------
# Our name -> CLIP's name on Hugging Face, whose own spelling is pre_layrnorm (and FLIP's official
# code has post_layrnorm, too); replaced in this order (a longer name before one that it contains).
CLIP_KEYS = [
    ("class_token", "embeddings.class_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
    ("positions", "embeddings.position_embedding.weight"), ("norm_before", "pre_layrnorm"),
    ("norm_after", "post_layernorm"), ("blocks.", "encoder.layers."),
    ("norm_attention", "layer_norm1"), ("norm_mlp", "layer_norm2"),
    (".attention.query", ".self_attn.q_proj"), (".attention.key", ".self_attn.k_proj"),
    (".attention.value", ".self_attn.v_proj"), (".attention.out", ".self_attn.out_proj"),
    (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2.")]


def load_clip(vit, source):
    """Fill `vit` with the image half of a CLIP from Hugging Face (file, folder or hub name)."""
    others = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in read_weights(source).items()
               if not name.startswith(others) and not name.endswith("position_ids")}
    table = "embeddings.position_embedding.weight"
    if table in weights:
        weights[table] = resize_position_embedding(weights[table], vit.config.num_patches)
    copy_weights(vit, weights, lambda name: map_key(name, CLIP_KEYS), str(source))


# ---- BERT ----------------------------------------------------------------------------------------
# Our name -> BERT's name on Hugging Face; replaced in this order (a longer name before one that it
# contains).
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


def bert_key(name):
    """Our name of a weight of the text encoder -> BERT's."""
    if name.startswith("norm."):                            # the one that follows the embeddings
        return name.replace("norm.", "embeddings.LayerNorm.")
    return map_key(name, BERT_KEYS)


def load_bert(bert, source):
    """Fill `bert` with a BERT from Hugging Face (file, folder or hub name). What BERT does not have
    stays at its initial value: cross-attention, the rows of [DEC] and [ENC]."""
    weights = {}
    for name, tensor in read_weights(source).items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("cls.", "pooler.")) and not name.endswith("position_ids"):
            weights[name] = tensor
    state = bert.state_dict()
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    types = weights.pop("embeddings.token_type_embeddings.weight", None)
    if words in weights and len(weights[words]) + 2 == bert.config.vocab_size:
        weights[words] = torch.cat([weights[words], state["words.weight"][-2:].cpu()])
    if positions in weights and types is not None:
        weights[positions] = weights[positions] + types[0]
    own = {bert_key(name): tensor for name, tensor in state.items() if "cross_attention" in name}
    copy_weights(bert, own | weights, bert_key, str(source))


# ---- checkpoints, ours and the official one ------------------------------------------------------
def load_verified(path):
    """torch.load, of a file whose checksums, at which torch does not look, are right. No code from
    it is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed:
            raise ValueError(f"the bytes of {changed} have changed")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path):
    """What lies in a checkpoint, from its file or its folder, as a dictionary with "model"."""
    path = resolve_file(path, CHECKPOINT_FILES)
    try:
        saved = load_verified(path)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged ({short_message(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with the weights under 'model', found none")
    return saved


def write_checkpoint(contents, path):
    try:
        with atomic_write(path) as partial:
            torch.save(contents, partial)
    except RuntimeError as error:               # torch's word for a disk that is full
        raise OSError(f"{path} could not be written, is the disk full? ({short_message(error)})") from error


CHECKPOINT_FILES = ("flip.pt", "FLIP-base.pth")  # in a folder, or in a repository of the hub
OFFICIAL_KEYS = {"image_queue": "image_queue", "text_queue": "text_queue", "queue_identity": "idx_queue",
                 "queue_pointer": "ptr_queue", "temperature": "temp", "matching_head.weight": "itm_head.weight",
                 "matching_head.bias": "itm_head.bias"}


def official_name(name):
    """Our name of an entry of the state -> its name in FLIP-base.pth."""
    if name in OFFICIAL_KEYS:
        return OFFICIAL_KEYS[name]
    encoders, part, rest = name.split(".", 2)
    m = "_m" if encoders == "momentum_encoder" else ""
    if part == "image":
        rest = map_key(rest, CLIP_KEYS).replace("post_layernorm", "post_layrnorm")
        return f"visual_encoder{m}.vision_model.{rest}"
    if part == "text":
        return f"text_encoder{m}.{bert_key(rest)}"
    return f"{'vision_proj' if part == 'image_projection' else 'text_proj'}{m}.{rest}"


def official_state(model):
    """The state in the official layout: {name: tensor}, ready for torch.save({"model": ...})."""
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    for queue in ("image_queue", "text_queue"):
        state[queue] = state[queue].T.contiguous()                                  # (E, Q)
    state["idx_queue"] = state["idx_queue"][None]                                   # (1, Q)
    for m in ("", "_m"):        # position_ids are 0, 1, 2, ...; nothing is learned in them
        places = {f"visual_encoder{m}.vision_model": model.config.vit.num_patches + 1,
                  f"text_encoder{m}": model.config.bert.positions}
        state |= {f"{part}.embeddings.position_ids": torch.arange(n)[None] for part, n in places.items()}
    return state


def read_official(weights, path):
    """The entries of the official file as `official_name` asks for them: of its 1,049, all but the
    four position_ids, which are made anew on saving."""
    if "visual_encoder.vision_model.embeddings.class_embedding" not in weights:
        raise ValueError(f"{path} is neither one of our checkpoints nor an official one: it has no "
                         f"visual_encoder.vision_model.embeddings.class_embedding")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    queues = {name: weights[name].T for name in ("image_queue", "text_queue")}      # (Q, E)
    return weights | queues | {"idx_queue": weights["idx_queue"][0]}


def official_sizes(weights, path):
    """The configuration that an official checkpoint's shapes tell; heads are 64 wide, as in every
    ViT and BERT of note."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in weights if name.startswith(prefix)})
    image, text = "visual_encoder.vision_model.", "text_encoder."
    width, _, patch, _ = weights[image + "embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"{path}: the widths {width} and {text_width} are not multiples of 64, so the "
                         f"number of heads cannot be read off the shapes; pass config=FLIPConfig(...)")
    grid = round((len(weights[image + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vit = dict(image_size=grid * patch, patch_size=patch, width=width, depth=depth(image + "encoder.layers."),
               heads=width // 64)
    bert = dict(vocab_size=vocabulary, width=text_width, depth=depth(text + "encoder.layer."),
                heads=text_width // 64, positions=len(weights[text + "embeddings.position_embeddings.weight"]))
    queue_size, embed_dim = weights["image_queue"].shape
    return dict(vit=vit, bert=bert, embed_dim=embed_dim, queue_size=queue_size)

"""Where models are and what identifies them: bundled ones, folders, single files, hub models at a pinned commit.

Only safetensors are read. Nothing here needs torch.
"""

import hashlib
import os
import re
from pathlib import Path

from diffcolor_core.errors import ModelError

BUNDLES = {name: Path(__file__).parent / name / "bundle" for name in ("photo", "demo")}
"""Models that come with the package: `photo` for photographs, `demo` for the study's rendered scenes."""
PINNED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "openai/clip-vit-base-patch32": "c237dc49a33fc61debc9276459120b7eac67e7ef",
    "Salesforce/blip-image-captioning-large": "353689b859fcf0523410b1806dace5fb46ecdf41",
}
BESIDE = ("clip", "tiny_vae", "color_prior", "noun_regions")
"""Networks of a checkpoint that are in its folder even if the others are a single file."""
DEFAULT_CLIP = "openai/clip-vit-base-patch32"
_SAMPLE_BYTES, _NUM_SAMPLES = 2**14, 1024  # 16 MiB of a file: a fine-tuned model differs in whole layers


def resolve(model: str) -> tuple[str, str | None]:
    """(path or hub id, commit) of a bundled model, a folder or file, a hub id of `PINNED`, or "owner/name@commit".

    The commit of a folder or file is None. Raises ModelError if there is no such model, or no commit.
    """
    if model in BUNDLES:
        if not BUNDLES[model].is_dir():
            raise ModelError(f"the model {model!r} is not in this installation: {BUNDLES[model]} is missing")
        return str(BUNDLES[model]), None
    if Path(model).is_dir():
        return model, None
    if Path(model).is_file():
        if Path(model).suffix != ".safetensors":
            raise ModelError(f"{model!r} is a pickle, or no model at all: of single files only .safetensors are read")
        return model, None
    name, _, revision = model.partition("@")
    revision = revision or PINNED.get(name, "")
    if name.count("/") != 1:
        known = ", ".join(map(repr, BUNDLES))
        raise ModelError(f"no model {model!r}: give a folder, a hub id as 'owner/name@commit', or (to colour) {known}")
    if not re.fullmatch("[0-9a-f]{40}", revision):  # branches and tags move; commits do not
        raise ModelError(
            f"hub model {name!r} needs a pinned revision, so that its results can be reproduced: give "
            f"'{name}@<commit hash of 40 digits>' (its page lists the commits), not {revision!r}"
        )
    return name, revision


def folder_of(source: str) -> str:
    """Where a model's configurations and tokenizer are: the model itself, or the folder of its name beside a file.

    Raises ModelError if there is no such folder beside a single file.
    """
    if not Path(source).is_file():
        return source
    folder = Path(source).with_suffix("")
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{source!r} holds weights alone, and {str(folder)!r} has no configurations and tokenizer for them: put "
            f"those of its base model there (docs/models.md), or convert the file into a diffusers folder"
        )
    return str(folder)


def _variant_of(path: Path) -> str | None:
    """The variant that a file of weights, or their index, belongs to: "fp16" of `model.fp16.safetensors`."""
    found = re.search(r"\.(fp16|bf16|non_ema|ema_only)[.-]", path.name)
    return found[1] if found else None


def variant_to_load(source: str, network: str) -> str | None:
    """The variant of a network that is loaded: fp16 if its folder has no other form, else the one without a name."""
    variants = {_variant_of(path) for path in Path(source, network).glob("*.safetensors")}
    return "fp16" if "fp16" in variants and None not in variants else None


def identify(model: str, known_revision: str | None = None) -> tuple[str, str]:
    """(model_id, model_revision) as fits and manifests record them.

    The revision of a hub model is its commit. That of a folder or file is "sha256:" and two hashes, joined by "-": one
    over all its weights and configurations, and a short one over samples spread over each file. known_revision:
    what this function gave earlier, perhaps on another machine. If the short hash agrees with it, the folder is not
    read in full again. Raises ModelError if there is no such model, or another one than `known_revision` says.
    """
    source, commit = resolve(model)
    revision = commit or known_revision or ""
    if commit is None:
        folder = folder_of(source)
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        # variants that are not loaded are not part of what the folder is
        files = [path for path in files if _variant_of(path) in (None, variant_to_load(folder, path.parent.name))]
        if folder != source:  # a single file, whose weights stand for those of the networks in the folder beside it
            read = [Path(folder, part) for part in BESIDE]
            files = [path for path in files if path.suffix != ".safetensors" or {*read} & {*path.parents}]
            files.insert(0, Path(source))
        quick, whole = hashlib.sha256(), hashlib.sha256()
        for path in files:
            name, size = os.path.relpath(path, folder), path.stat().st_size
            quick.update(f"{name} {size}\n".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(_SAMPLE_BYTES, size // _NUM_SAMPLES)):
                    file.seek(place)
                    quick.update(file.read(_SAMPLE_BYTES))
        short = f"-{quick.hexdigest()[:16]}"
        if not revision.endswith(short):
            for path in files:
                whole.update(os.path.relpath(path, folder).encode())
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            revision = f"sha256:{whole.hexdigest()}{short}"
    if known_revision not in (None, revision):
        raise ModelError(f"{model!r} is at {revision} here, not at {known_revision}: is it another model, or changed?")
    return (model if model in BUNDLES else source), revision

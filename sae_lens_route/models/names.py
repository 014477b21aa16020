"""What a model name means, the demo, a folder or a name on the Hub, and what to say if nothing."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import make_model_alias_map

from sae_lens_route.errors import UserError

DEMO_FOLDER: Path = Path(__file__).parents[1] / "demo"
"""The embedded demo model, in Hugging Face Llama layout; `load_model("demo")` reads it."""

OTHER_CLASSES = (
    "use model_class_name='AutoModelForCausalLM', or 'TransformerBridge' (transformer-lens >= 3)"
)


def local_folder(model_name: str, model_class_name: str) -> Path | None:
    """The folder that `model_name` means, or None when it is a name for the library to resolve."""
    folder = DEMO_FOLDER if model_name == "demo" else Path(model_name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():  # which transformers would read instead of the official model
        raise UserError(
            f"model_name={model_name!r}: no config.json in {folder}; pass a folder written by "
            "save_pretrained, an official name or 'demo'"
        )
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    is_path = model_name.startswith((".", "~")) or any(sep in model_name for sep in separators)
    looks_like_org_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_name) is not None
    if is_path and not looks_like_org_name:
        raise UserError(
            f"model_name={model_name!r}: there is no such folder; pass a folder written by "
            "save_pretrained, an official name or 'demo'"
        )
    official_names = make_model_alias_map()  # TransformerLens's, aliases included, lower case
    if model_class_name == "HookedTransformer" and model_name.lower() not in official_names:
        close = ", ".join(difflib.get_close_matches(model_name.lower(), official_names, n=3))
        raise UserError(
            f"model_name={model_name!r} is neither a folder nor an official TransformerLens name"
            f"{f' (similar: {close})' if close else ''}; pass one of these or 'demo', or for any "
            f"model of the Hugging Face Hub {OTHER_CLASSES}"
        )
    return None


@contextmanager
def one_line_errors(model_name: str) -> Iterator[None]:
    """Turn what transformers raises for a name that cannot be used into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model_name={model_name!r} comes with code of its own, which is not run; choose "
            "another model, or if you trust its authors set trust_remote_code=True "
            "(--trust-remote-code)"
        ) from error
    except UnpicklingError as error:  # its message advises to run the code
        raise UserError(
            f"model_name={model_name!r}: its weights are pickles of more than tensors, which are "
            "not read; use a model with safetensors"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        # OSError for an unknown name and for no network, SafetensorError for a damaged file, and
        # RuntimeError by Path.expanduser for an unknown user
        if type(error) is RuntimeError and not model_name.startswith("~"):
            raise
        raise UserError(
            f"model_name={model_name!r} could not be loaded by that name ({first_line(error)}); "
            "check the spelling and the network, or pass a local folder or 'demo', which need none"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

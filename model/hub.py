"""GPT-2 models by name from the Hugging Face hub, through its own library and cache.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the token of `hf auth login` or HF_TOKEN work as usual.
Only config.json, safetensors weights and a vocabulary are fetched, nothing that can run code.
"""

import contextlib
import functools
import re
import sys
from pathlib import Path

from model.edge import one_line
from model.find import CONFIG, INDEX, WEIGHTS
from model.hf import VOCABULARIES, shard_names

# gpt2 and its sizes have no owner; a branch, a tag or a commit follows the @.
_NAME = re.compile(
    r"(gpt2|gpt2-medium|gpt2-large|gpt2-xl|distilgpt2|\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?"
)
_FOLDER = f"name a folder with {CONFIG} and {WEIGHTS} instead"


def is_name(path: str) -> bool:
    """Whether a path that does not exist may be a model on the hub.

    If the part before the slash is a folder here, the path is a typing error, not an owner.
    """
    owner, slash, _ = path.partition("/")
    return bool(_NAME.fullmatch(path)) and not (slash and Path(owner).is_dir())


@functools.cache  # so that shape and weights are of one commit, although they are asked for apart
def download(name: str) -> Path:
    """The folder of the hub's cache that holds the model `name`, "gpt2" or "owner/name@revision".

    Raises:
        FileNotFoundError: no such model, none in safetensors, or no way to the hub.
    """
    found = _NAME.fullmatch(name)
    assert found
    repo, revision = found.groups()
    here = f"model: {name} is no file or folder here"
    try:
        from huggingface_hub import constants, errors, hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise FileNotFoundError(
            f"{here}; to take it from the hub, pip install huggingface_hub, or {_FOLDER}"
        ) from None
    logging.set_verbosity_error()  # otherwise it prints a line for each of five retries
    print(f"init: {name} of {constants.ENDPOINT}, or its copy in the cache", file=sys.stderr)
    try:
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision)).parent
        commit = folder.name
        try:
            hf_hub_download(repo, WEIGHTS, revision=commit)
        except errors.EntryNotFoundError:
            index = hf_hub_download(repo, INDEX, revision=commit)
            for shard in shard_names(Path(index)):
                hf_hub_download(repo, shard, revision=commit)
        for vocabulary in VOCABULARIES:
            with contextlib.suppress(errors.EntryNotFoundError):
                hf_hub_download(repo, vocabulary, revision=commit)
                break
        return folder
    except errors.RevisionNotFoundError:
        why = f"{constants.ENDPOINT} has no revision {revision} of it"
    except errors.RemoteEntryNotFoundError:
        why = (
            f"{constants.ENDPOINT} has no {CONFIG} of it or no weights in safetensors; of a model "
            "that you trust, transformers writes both with save_pretrained"
        )
    except errors.RepositoryNotFoundError:
        why = (
            f"{constants.ENDPOINT} shows no model of that name; one that is private or gated needs "
            "`.venv/bin/hf auth login` or HF_TOKEN"
        )
    except Exception as error:  # no network, no such host, a proxy, a full disk, ...
        reason = one_line(error.__cause__ or error, 160)
        why = f"{constants.ENDPOINT} gave no answer that helps ({reason}); {_FOLDER}"
    raise FileNotFoundError(f"{here}, and {why}")

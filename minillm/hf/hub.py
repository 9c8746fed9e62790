"""Models by their names on the Hugging Face hub: from the cache of `huggingface_hub` (extra hf), or downloaded into it.

Nothing is downloaded unless that is asked for, so what runs on one machine runs on one without a network. HF_ENDPOINT
names a mirror, HF_HOME where the cache is, HF_TOKEN who asks: huggingface_hub reads them.
"""

import re
from pathlib import Path

NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
FILES = [
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
]


def find_folder(path: str | Path, download: bool = False) -> Path:
    """The folder that a path stands for; of a name on the hub, its snapshot in the cache.

    What is no folder and could be no name comes back as it is. `download`: fetch what the cache lacks of a name.
    Raises ValueError where there is no such model, in the cache or on the hub, or the hub cannot be reached.
    """
    name = str(path)
    if Path(path).exists() or not NAME.fullmatch(name):
        return Path(path)
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise ValueError(
            f"{name}: does not exist here; a name on the Hugging Face hub needs huggingface_hub: "
            "pip install 'minillm[hf]'"
        ) from None
    hub = constants.ENDPOINT
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=not download))
    except errors.GatedRepoError:  # before RepositoryNotFoundError, of which it is one
        problem = f"is not given to everybody; accept its terms at {hub}/{name}, then set HF_TOKEN to your token"
    except errors.RepositoryNotFoundError:
        problem = f"there is no such model at {hub}, or none that you may see; HF_TOKEN says who you are"
    except errors.LocalEntryNotFoundError as error:
        if not download:
            problem = (
                "does not exist here, and no model of that name is in the cache of huggingface_hub; "
                f"`minillm import {name} OUT --download` fetches it"
            )
        elif constants.HF_HUB_OFFLINE:
            problem = "cannot be downloaded while HF_HUB_OFFLINE is set"
        else:
            problem = f"{hub} does not answer ({error.__cause__ or error}); HF_ENDPOINT names a mirror"
    except Exception as error:  # which one a broken connection raises depends on huggingface_hub's version
        problem = f"cannot be had from {hub}: {error}"
    raise ValueError(f"{name}: {problem}")

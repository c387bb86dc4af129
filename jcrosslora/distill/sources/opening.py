"""Load a base and its adapter with transformers and PEFT, and open tokenizers by themselves."""

from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import AdapterPaths, find_adapter, open_weights
from jcrosslora.checkpoint import Tokenizer, Vocabulary, is_hub_id
from jcrosslora.checkpoint.hub import fetch, fetch_companions
from jcrosslora.checkpoint.opening import read_template
from jcrosslora.checkpoint.tokenizer import read_tokenizer
from jcrosslora.checkpoint.tokenizer_gguf import read_metadata
from jcrosslora.checkpoint.vocabulary import gguf_vocabulary
from jcrosslora.checkpoint.vocabulary import read_tokenizer as read_vocabulary
from jcrosslora.distill.sources import TorchModel
from jcrosslora.errors import AdapterError, CheckpointError, JCrossLoRAError, UsageError
from jcrosslora.evaluate.engine_runs import quiet
from jcrosslora.evaluate.torch_models import load_adapter, load_base

_FACTOR = ".lora_"
_NOT_LOADED = "missing adapter keys"  # PEFT's warning of a file that holds other modules than the model has


def open_tokenizer(
    ref: str | Path, *, revision: str | None = None, chat_template: str | Path | None = None, vocab: int | None = None
) -> tuple[Tokenizer, Vocabulary]:
    """Open a tokenizer with its vocabulary.

    Args:
        ref: a folder with tokenizer.json, a tokenizer.json, a GGUF file, or a hub id with its revision.
        chat_template: a file with the template that takes the place of the tokenizer's own.
        vocab: rows of the base's embedding; None takes as many as the tokenizer has tokens.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        UsageError: the template cannot be read.
    """
    path = _found(ref, revision)
    template = None if chat_template is None else read_template(Path(chat_template))
    tokenizer = read_tokenizer(path, str(ref), vocab, chat_template=template)
    if path.is_file():
        return tokenizer, gguf_vocabulary(read_metadata(path), tokenizer.vocab)
    return tokenizer, read_vocabulary(path, tokenizer.vocab)


def _found(ref: str | Path, revision: str | None) -> Path:
    path = Path(ref).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not path.exists() and isinstance(ref, str) and is_hub_id(ref):
        return fetch_companions(ref, revision)
    msg = f"{ref}: holds no tokenizer: give a folder with tokenizer.json, a .gguf file, or a hub id such as owner/name"
    raise CheckpointError(msg)


def find_peft_adapter(ref: str | Path, revision: str | None = None) -> AdapterPaths:
    """Find an adapter; raise AdapterError if it is not of PEFT."""
    found = find_adapter(ref, revision)
    if found.form != "PEFT":
        msg = f"{ref}: is an adapter of {found.form}, which PEFT does not load: convert it by `jcrosslora export "
        raise AdapterError(msg + "--profile peft`, or leave out --source-backend torch")
    return found


def load_model(source: TorchModel, adapter: AdapterPaths) -> tuple[Any, str]:
    """Load a base with its adapter, in bfloat16 on a GPU and in float32 on a CPU: a `peft.PeftModel`, and the device.

    Raises:
        UsageError: torch or PEFT is not installed, or there is no such device.
        CheckpointError: the base is not in safetensors or GGUF, or transformers cannot load it, or only by the base's
            own code, which is not run.
        AdapterError: PEFT cannot load the adapter, or would run what it names, or parts of it match no module of the
            base.
    """
    try:
        import torch
        from peft import get_peft_model_state_dict
        from transformers import GenerationConfig
    except ImportError as error:
        msg = f"--source-backend torch needs torch and peft, and {error.name} is not installed: "
        raise UsageError(msg + "install jcrosslora[torch]") from error
    device = source.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"torch has no device {device!r} ({_line(error)}): give another, such as cpu") from error
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with quiet() as heard:
        try:
            base = load_base(_local(source), dtype)
        except JCrossLoRAError:
            raise
        except Exception as error:  # whatever a model's own class raises
            if "trust_remote_code" in str(error):  # what transformers advises
                msg = f"{source.ref}: its class is code in its own files, which is not run: give a base whose class is "
                raise CheckpointError(msg + "in transformers, or have a server run it (--source-url)") from error
            msg = f"{source.ref}: transformers cannot load it as a causal language model ({_line(error)}): check the "
            raise CheckpointError(msg + "path or hub id, and that your version of transformers knows it") from error
        try:
            model = load_adapter(base, adapter)
        except JCrossLoRAError:
            raise
        except Exception as error:
            msg = f"{adapter.name}: PEFT cannot load it onto {source.ref} ({_line(error)}): "
            raise AdapterError(msg + "check that it is of this base") from error
    lost = [str(one.message) for one in heard if _NOT_LOADED in str(one.message).lower()]
    # PEFT silently ignores factors without a module, and would look up on the hub whether embeddings were changed.
    placed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    lost += [name for name in open_weights(adapter.weights).entries if _FACTOR in name and name not in placed]
    if lost:
        msg = f"{adapter.name}: holds other modules than {source.ref} has ({lost[0][:200]}): "
        raise AdapterError(msg + "give the base that it is of")
    # The model's own settings, such as a top_k, would change what is sampled.
    for one in (model, base):
        vars(one)["generation_config"] = GenerationConfig()
    return model.to(device), device


def _local(source: TorchModel) -> Path:
    """Return the folder or GGUF file of a base, fetched if it is on the hub."""
    path = Path(source.ref).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not is_hub_id(str(source.ref)):
        raise CheckpointError(f"{source.ref}: no such folder or file, and not a hub id of the form org/name")
    return fetch(str(source.ref), source.revision, any_class=True)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""Hugging Face export: a folder that stock `transformers` loads, checked before it gets its name.

The only module that imports `transformers`, but for the code that goes into exports. The model becomes the first class
of `interop_families` that holds it (with `qk_norm` a Qwen3, without a Llama), with what stands outside of the weights
folded into them by `interop`; what none holds is written with code of its own (`bundled`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from solomonov import bundled
from solomonov.errors import ConfigurationError, NumericalError
from solomonov.fast_tokenizer import build_tokenizer
from solomonov.hf_folder import EXPORT_MARKER, load_hf
from solomonov.interop import to_theirs
from solomonov.interop_config import written_config
from solomonov.interop_families import PLAIN_FORM, Family, chosen_family, stock_family
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_count, parameter_shapes
from solomonov.model.cross import Source
from solomonov.model.stacks import Architecture
from solomonov.model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO_CLASSES: dict[Architecture, str] = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}
"""By what `transformers` loads each."""
FOLDED_AWAY = tuple(mode for mode, plain in PLAIN_FORM.items() if mode != plain)
"""Residual forms of which a stock class keeps no factor."""
CHECK_TOKENS = 64
CHECK_TOLERANCE = 1e-4
"""Largest difference of logits that passes in fp32, relative to the largest logit where that is above 1."""

_SHARD_BYTES = 4 << 30
_GENERATES = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
_USES: dict[Architecture, tuple[str, str, str]] = {
    "decoder": ("text-generation", "continues text", _GENERATES),
    "encoder": ("fill-mask", "tells tokens from all that stands around them", "print(model(**inputs).logits.shape)"),
    "encoder_decoder": ("text2text-generation", "writes a text for a text", _GENERATES),
}
"""For the card: the task by its name there, what the model does, a line of code."""
_CHECK_TEXT = (
    "def depth(layers):\n\treturn sum(1 for _ in layers)  # naïve, höchstens 1,000\n\n"
    "       seven spaces, <s> is not a token, 日本語 😀 …\r\n" + "The quick brown fox jumps over the lazy dog. " * 4
)


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked."""

    architecture: str
    """Class that loads it: of `transformers`, or of the code in the folder."""

    forced_by: tuple[str, ...]
    """Flags for which the folder has code of its own, since no class of `transformers` holds them; empty: it has none.
    """

    parameters: int
    """Trained values."""

    weight_bytes: int
    """Size of the safetensors files together."""

    dtype: str
    """Of the stored weights."""

    max_abs_difference: float
    """Largest difference between our logits and those of `transformers`, both in fp32, on the check text."""

    max_abs_logit: float
    """Largest of these logits."""

    equal_token_ids: bool
    """Whether the exported tokenizer gives our ids for the check text; else it splits some ties another way
    (see `fast_tokenizer`), into as many tokens of the same text."""


def export_hf(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    tokenizer_model_path: Path | str,
    folder: Path | str,
    *,
    sequence_tokens: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = _SHARD_BYTES,
    model_type: str | None = None,
) -> ExportReport:
    """Write the folder, load it with `transformers`, compare logits and token ids, and only then name it.

    Args:
        state: canonical name -> fp32 tensor on the CPU, one for every parameter.
        model: shape of the model.
        tokenizer_model_path: the SentencePiece model.
        folder: to be made; an earlier export in its place is replaced.
        sequence_tokens: T of training, written as the longest position.
        shard_bytes: most bytes of one weight file (a larger tensor gets a file of its own).
        model_type: of the class to write it as (see `interop_families.FAMILIES`); None: the first that holds it.

    Raises:
        ConfigurationError: the state is not the model's, `folder` holds something else than an export, the class does
            not hold the model, or the model has a front.
        NumericalError: the loaded export does not give the same logits.
    """
    target = Path(folder)
    family = stock_family(model) if model_type is None else chosen_family(model, model_type)
    if family is None:
        _require_code(model)
    tokenizer = Tokenizer.load(tokenizer_model_path)
    shapes = parameter_shapes(model, tokenizer.vocab_size)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != shapes:
        odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ConfigurationError(
            "The weights are not those of this model and tokenizer.",
            got=f"{len(odd)} parameters differ, the first is {odd[0]}: {found.get(odd[0], 'missing')}",
            rule=f"{odd[0]}: {shapes.get(odd[0], 'no such parameter')}",
            remedy="export with the configuration and the tokenizer that the run was trained with",
        )
    if target.exists() and not (target / EXPORT_MARKER).is_file() and any(target.iterdir()):
        raise ConfigurationError(
            "The export folder is in use.",
            got=f"{target} holds files that no export wrote",
            rule="a new or empty folder, or an earlier export, which is replaced",
            remedy="choose another folder",
        )
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weights = state if family is None else to_theirs(state, model, family)
    exported = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    weight_bytes = _write_weights(aside, exported, shard_bytes)
    config = hf_config(model, family, tokenizer, sequence_tokens, dtype)
    _write_json(aside / "config.json", config)
    if model.architecture != "encoder":
        _write_json(aside / "generation_config.json", _generation_config(tokenizer, model))
    _write_tokenizer(aside, tokenizer, sequence_tokens)
    for file in bundled.FILES if family is None else ():
        _write_text(aside / file.name, file.read_text(encoding="utf-8"))
    _write_json(aside / EXPORT_MARKER, {"schema_version": 1, "model": model.model_dump(mode="json")})
    equal_ids = _check_tokenizer(aside, tokenizer, with_code=family is None)
    difference, largest = _check_logits(aside, state if dtype == "float32" else None, model, tokenizer, sequence_tokens)
    report = ExportReport(
        architecture=config["architectures"][0],
        forced_by=bundled.forcing_flags(model) if family is None else (),
        parameters=parameter_count(model, tokenizer.vocab_size),
        weight_bytes=weight_bytes,
        dtype=dtype,
        max_abs_difference=difference,
        max_abs_logit=largest,
        equal_token_ids=equal_ids,
    )
    _write_text(aside / "README.md", _card(target.name, report, model, tokenizer, sequence_tokens))
    _sync(aside)
    _replace(aside, target)
    return report


def _require_code(model: ModelConfig) -> None:
    """Refuse what the code that goes into exports does not hold."""
    if model.front.kind != "tokens":
        raise ConfigurationError(
            f"A model with a front of {model.front.kind} is not exported.",
            got=f"model.front.kind: {model.front.kind}",
            rule="what is exported reads token ids, with the tokenizer beside it; no class of transformers, and not "
            "the code that is written beside the weights, has this front",
            remedy="use the weights with solomonov.loading.load_model, which reads the run itself",
        )


def hf_config(
    model: ModelConfig, family: Family | None, tokenizer: Tokenizer, sequence_tokens: int, dtype: str
) -> dict[str, Any]:
    """The content of config.json."""
    if family is None:
        shape = bundled.bundled_config(model, sequence_tokens)
    else:
        shape = written_config(model, family, sequence_tokens)
    return {
        **shape,
        "vocab_size": tokenizer.vocab_size,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        **({"decoder_start_token_id": tokenizer.bos} if model.architecture == "encoder_decoder" else {}),
        # `dtype` is read since transformers 4.56, `torch_dtype` before.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _write_weights(folder: Path, state: Mapping[str, Tensor], shard_bytes: int) -> int:
    """Write model.safetensors, or numbered shards and their index; returns the bytes of all files."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    count = len(shards)
    files = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
    if count > 1:
        place = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        _write_json(folder / "model.safetensors.index.json", index)
    return sum((folder / file).stat().st_size for file in files)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, sequence_tokens: int) -> None:
    names = [piece.text for _, piece in zip(range(tokenizer.pad + 1), tokenizer.pieces(), strict=False)]
    _write_text(folder / "tokenizer.json", build_tokenizer(tokenizer).to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": names[tokenizer.unk],
        "bos_token": names[tokenizer.bos],
        "eos_token": names[tokenizer.eos],
        "pad_token": names[tokenizer.pad],
        "model_max_length": sequence_tokens,
        "clean_up_tokenization_spaces": False,
        # Text that contains "</s>" is text: nobody ends a document by writing about one.
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    _sync(folder / "tokenizer.model")


def _generation_config(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
    return {
        **({"decoder_start_token_id": tokenizer.bos} if model.architecture == "encoder_decoder" else {}),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "do_sample": True,
        "temperature": 0.8,
    }


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, *, with_code: bool) -> bool:
    """Whether the folder's tokenizer gives our ids for the check text.

    Raises:
        NumericalError: it needs another number of tokens, or they spell another text.
    """
    # Its configuration has code too, where the model has, and is asked for leave to run even for a tokenizer.
    theirs = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=with_code)
    ids = [tokenizer.bos, *tokenizer.encode(_CHECK_TEXT)]
    found = theirs(_CHECK_TEXT)["input_ids"]
    if len(found) != len(ids) or tokenizer.decode(found) != tokenizer.decode(ids):
        raise NumericalError(
            "The exported tokenizer reads text in another way than ours.",
            got=f"{len(found)} tokens for the check text, ours gives {len(ids)}",
            rule="as many tokens, of the same text",
            remedy=f"report this; the incomplete export stands in {folder}",
        )
    return bool(found == ids)


def _check_logits(
    folder: Path, state: Mapping[str, Tensor] | None, model: ModelConfig, tokenizer: Tokenizer, sequence_tokens: int
) -> tuple[float, float]:
    """Largest difference of logits and largest logit, ours against those of the folder as loaded by others.

    Args:
        state: our weights; None: those in the folder, for a type that rounds them.

    Raises:
        NumericalError: the difference is above the tolerance.
    """
    transformers = _transformers()
    if (folder / bundled.FILES[0].name).is_file():
        # By its name: AutoModel takes whatever code of an equal configuration this process has loaded before.
        kind = transformers.dynamic_module_utils.get_class_from_dynamic_module(
            f"modeling_solomonov.{bundled.CLASSES[model.architecture][1]}", folder
        )
    else:
        kind = getattr(transformers, AUTO_CLASSES[model.architecture])
    theirs = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if state is None:
        model, state, _ = load_hf(folder)
    ours = Transformer(model, tokenizer.vocab_size, seed=None)
    ours.load_state_dict(dict(state), strict=False)
    ids = [tokenizer.bos, *tokenizer.encode(_CHECK_TEXT)]
    rows = torch.tensor([ids[: min(CHECK_TOKENS, sequence_tokens)]])
    documents, source, given = torch.zeros_like(rows), None, {"input_ids": rows}
    if model.architecture == "encoder_decoder":
        # The source is the text from its middle on.
        source = Source(rows[:, rows.shape[1] // 2 :], documents[:, rows.shape[1] // 2 :])
        given = {"input_ids": source.input_ids, "decoder_input_ids": rows}
    with torch.inference_mode():
        expected = ours.eval()(rows, documents, source=source)
        found = theirs.eval()(**given).logits
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    # Negated, so that NaN does not pass.
    if not difference <= CHECK_TOLERANCE * max(1.0, largest):
        raise NumericalError(
            "The export does not give the same logits in transformers.",
            got=f"largest difference {difference:.3g} where logits reach {largest:.3g}",
            rule=f"at most {CHECK_TOLERANCE:g} of the largest logit",
            remedy=f"report this; the incomplete export stands in {folder}",
        )
    return difference, largest


def _transformers() -> Any:
    """The library, without its progress bars and advice."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _card(name: str, report: ExportReport, model: ModelConfig, tokenizer: Tokenizer, sequence_tokens: int) -> str:
    mode, trust, code = model.residual_mode, "", ""
    factors = f"; the factors of `{mode}` folded into the weights" if mode in FOLDED_AWAY else ""
    if report.forced_by:
        factors, trust = f"; residual form `{mode}`", ", trust_remote_code=True"
        flags = "\n".join(f"- `{flag}`" for flag in report.forced_by)
        code = f"\nIts code stands beside the weights, since no class of transformers holds all of it:\n\n{flags}\n"
    begin = list(tokenizer.pieces())[tokenizer.bos].text
    task, says, use = _USES[model.architecture]
    behind = f" behind an encoder of {model.encoder_depth}" if model.architecture == "encoder_decoder" else ""
    return f"""---
library_name: transformers
pipeline_tag: {task}
---
# {name}

Trained from scratch with Solomonov. {report.parameters:,} parameters: {model.layers} layers of width
{model.d_model}{behind}, {model.heads} heads on {model.kv_head_count} key-value heads{factors}.
Vocabulary of {tokenizer.vocab_size:,}, trained on rows of {sequence_tokens:,} tokens. It is a base model: it
{says}. Every text begins with `{begin}`, which the tokenizer adds.

```python
from transformers import {AUTO_CLASSES[model.architecture]}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = {AUTO_CLASSES[model.architecture]}.from_pretrained("."{trust})
inputs = tokenizer("def main", return_tensors="pt")
{use}
```
{code}
Checked when it was written: the largest difference between the trainer's logits and those of
`{report.architecture}`, in fp32, was {report.max_abs_difference:.2g}, where logits reach
{report.max_abs_logit:.2g}.

What it was trained on, what it is good for and where it fails: to be filled in by whoever publishes it.
"""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(aside: Path, target: Path) -> None:
    """Give the finished folder its name; what stood there is moved away first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)

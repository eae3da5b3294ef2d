"""The data and tokenizer sections: names and defaults that users type, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig, resolve_path

SOURCE: dict[str, Any] = {"name": "own", "path": "text/**/*.txt", "weight": 1.0}


def test_the_section_of_the_design_page_is_accepted_as_yaml_gives_it() -> None:
    data = DataConfig.model_validate(
        {
            "folder": "datasets/own-text",
            "sources": [SOURCE, {"name": "json", "path": "~/x.jsonl", "weight": 2, "text_field": "body"}],
            "sequence_tokens": 512,
            "packing": "best_fit",
            "prepare": {"workers": 2, "shard_bytes": 67108864, "backend": "local", "max_source_bytes": None},
            "workers": {"backend": "inline", "count": 2},
        }
    )
    assert data.sources[0].documents == "file"
    assert data.sources[1].weight == 2.0
    assert data.prepare.held_out_fraction == 0.02
    assert TokenizerConfig.model_validate({"kind": "bpe", "vocab_size": 512}).vocab_size == 512


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"sequence_token": 5}, "sequence_token"),
        ({"packing": "worst_fit"}, "packing"),
        ({"sources": []}, "sources"),
        ({"sources": [SOURCE, SOURCE]}, "sources"),
        ({"sources": [{**SOURCE, "name": "a/b"}]}, "sources.0.name"),
        ({"sources": [{**SOURCE, "name": ""}]}, "sources.0.name"),
        ({"sources": [{**SOURCE, "weight": 0}]}, "sources.0.weight"),
        ({"sources": [{**SOURCE, "weight": float("nan")}]}, "sources.0.weight"),
        ({"sources": [{**SOURCE, "documents": "page"}]}, "sources.0.documents"),
        ({"sequence_tokens": "512"}, "sequence_tokens"),
        ({"prepare": {"held_out_fraction": 0.9}}, "prepare.held_out_fraction"),
        ({"prepare": {"seed": -1}}, "prepare.seed"),
        ({"workers": {"backend": "cloud"}}, "workers.backend"),
    ],
)
def test_a_mistake_is_refused_at_its_key(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate({"folder": "x", "sources": [SOURCE], **changes})
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == place


def test_sections_are_frozen_and_every_field_is_documented() -> None:
    data = DataConfig.model_validate({"folder": "x", "sources": [SOURCE]})
    with pytest.raises(ValidationError):
        data.folder = "y"
    for section in (DataConfig, SourceConfig, PrepareConfig, TokenizerConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"


def test_paths_count_from_the_base_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert resolve_path("a/b", tmp_path) == tmp_path / "a/b"
    assert resolve_path("/a/b", tmp_path) == Path("/a/b")
    assert resolve_path("~/b", tmp_path) == Path("/somewhere/b")
    assert resolve_path("b", Path()).is_absolute()

"""Folders from strangers: whatever is wrong in them is a diagnostic that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgrad_dsl as fg
from attack.checkpoints import GPT2, tensors_of, write_folder
from fastgrad_dsl.checkpoints.exporting import export_checkpoint
from fastgrad_dsl.checkpoints.importing import import_checkpoint
from fastgrad_dsl.commands.cli import main
from fastgrad_grammar.diagnostics import TfgError

TENSORS = "model.safetensors"
FIRST = "h.0.attn.c_attn.weight"


def refusal(folder: Path, tmp_path: Path) -> str:
    """What an import says of a folder, of which nothing is written."""
    out = tmp_path / "out" / "model.tfg"
    with pytest.raises(TfgError) as caught:
        import_checkpoint(folder, out)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    (found,) = caught.value.diagnostics
    return f"{found.code}: {found.message} {' '.join(found.help)}"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "gtp2", "did you mean gpt2"),
        ("model_type", None, "model_type is null"),
        ("model_type", ["gpt2"], "model_type"),
        ("architectures", ["GPT2ForSequenceClassification"], "GPT2LMHeadModel"),
        ("activation_function", "mish", 'activation_function is "mish"'),
        ("n_layer", 1 << 40, "n_layer"),
        ("n_layer", 0, "n_layer"),
        ("n_embd", 4.0, "n_embd is 4.0"),
        ("n_embd", True, "n_embd is true"),
        ("n_embd", -4, "n_embd"),
        ("n_embd", 5, "not a multiple of n_head"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon"),
        ("scale_attn_weights", False, "scale_attn_weights is false, expected true"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(field: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", tensors=tensors_of(GPT2))
    (folder / "config.json").write_text(json.dumps({**GPT2, field: value}))
    found = refusal(folder, tmp_path)
    assert found.startswith("FG602: config.json: ")
    assert said in found


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 5000, "\udcff", '{"a": 1e999}']
)
def test_a_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert refusal(folder, tmp_path).startswith("FG601: ")


def _damaged(content: bytes) -> dict[str, bytes]:
    (header,) = struct.unpack("<Q", content[:8])

    def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
        found = json.loads(content[8 : 8 + header])
        change(found)
        text = json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + header :]

    def enlarge(found: dict[str, Any]) -> None:
        found[FIRST]["shape"] = [1 << 31, 1 << 31]

    def move(found: dict[str, Any]) -> None:
        found[FIRST]["data_offsets"] = [0, 1 << 60]

    def retype(found: dict[str, Any]) -> None:
        found[FIRST]["dtype"] = "F128"

    return {
        "empty": b"",
        "seven bytes": content[:7],
        "half of the header": content[: 8 + header // 2],
        "half of the numbers": content[: -len(content) // 4],
        "a byte more": content + b"x",
        "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + content[8:],
        "a header of no JSON": content[:8] + b"x" * header + content[8 + header :],
        "a tensor of 2^62 numbers": with_header(enlarge),
        "numbers far behind the end": with_header(move),
        "an unknown type": with_header(retype),
        "nested JSON": struct.pack("<Q", 100_000) + b"[" * 100_000,
    }


@pytest.mark.parametrize(
    "damage",
    [
        "empty", "seven bytes", "half of the header", "half of the numbers", "a byte more", "a header of 2^62 bytes",
        "a header of no JSON", "a tensor of 2^62 numbers", "numbers far behind the end", "an unknown type",
        "nested JSON",
    ],
)  # fmt: skip
def test_a_file_of_weights_that_is_cut_or_lies(damage: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / TENSORS).write_bytes(_damaged((folder / TENSORS).read_bytes())[damage])
    found = refusal(folder, tmp_path)
    assert found.startswith("FG601: ")
    assert TENSORS in found


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[FIRST]


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["h.0.attn.c_atn.weight"] = tensors.pop(FIRST)


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["h.2.ln_1.weight"] = torch.ones(4)


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].T.contiguous()


def _flat(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].flatten()


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()


def _whole(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].to(torch.int32)


def _untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_missing, f"the checkpoint lacks {FIRST}"),
        (_renamed, f"the checkpoint lacks {FIRST} {FIRST}: did you mean h.0.attn.c_atn.weight"),
        (_unknown, "has what this model has no place for: h.2.ln_1.weight"),
        (_transposed, f"{FIRST} has shape [12, 4], expected [4, 12]: it is transposed"),
        (_flat, f"{FIRST} has shape [48], expected [4, 12]: it has the same number of entries"),
        (_narrow, f"{FIRST} has shape [4, 11], expected [4, 12]"),
        (_whole, f"{FIRST} has the type I32"),
        (_untied, "wte.weight and lm_head.weight differ, though config.json ties them"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, tmp_path: Path
) -> None:
    tensors = tensors_of(GPT2)
    change(tensors)
    found = refusal(write_folder(tmp_path / "in", tensors=tensors), tmp_path)
    assert found.startswith("FG603: ")
    assert said in found


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.safetensors",
        "sub/a.safetensors",
        "a\\b.safetensors",
        "",
        "..",
        3,
        "a.bin",
        "\0.safetensors",
    ],
)
def test_an_index_leads_nowhere_else(name: object, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / TENSORS).rename(tmp_path / "secret.safetensors")
    (folder / f"{TENSORS}.index.json").write_text(json.dumps({"weight_map": {FIRST: name}}))
    found = refusal(folder, tmp_path)
    assert found.startswith("FG601: ")
    assert "not a safetensors file of the folder" in found


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_names(index: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / TENSORS).unlink()
    (folder / f"{TENSORS}.index.json").write_text(index)
    assert "it has no weight_map" in refusal(folder, tmp_path)


def test_an_index_that_is_wrong_about_a_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / TENSORS).rename(folder / "a.safetensors")
    names = dict.fromkeys(tensors_of(GPT2), "a.safetensors")
    index = folder / f"{TENSORS}.index.json"
    index.write_text(json.dumps({"weight_map": {**names, "x": "a.safetensors"}}))
    assert 'the tensor "x" is not in it, but the index says so' in refusal(folder, tmp_path)
    del names[FIRST]
    index.write_text(json.dumps({"weight_map": names}))
    assert f'the tensor "{FIRST}" is in it, but not in the index' in refusal(folder, tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors_of(GPT2), "b.safetensors")}))
    assert "b.safetensors: no such file" in refusal(folder, tmp_path)


@pytest.mark.parametrize("name", ["config.json", TENSORS])
def test_links_are_not_followed(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "it is a link, which may lead anywhere" in refusal(folder, tmp_path)


@pytest.mark.parametrize("name", ["config.json", TENSORS])
def test_pipes_and_folders_are_not_opened(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "it is not a regular file" in refusal(folder, tmp_path)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert "it is not a regular file" in refusal(folder, tmp_path)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    assert "it is not a folder" in refusal(tmp_path / "none", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in refusal(tmp_path / "empty", tmp_path)
    folder = write_folder(tmp_path / "in")
    (folder / TENSORS).rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(folder, tmp_path)


def test_other_files_are_kept(tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "in"), tmp_path / "model.tfg"
    out.write_text("mine")
    with pytest.raises(TfgError, match="FG604"):
        import_checkpoint(folder, out)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.tfg"]
    assert out.read_text() == "mine"
    import_checkpoint(folder, out, force=True)
    import_checkpoint(folder, out)  # the same content
    back = tmp_path / "back"
    back.mkdir()
    (back / TENSORS).symlink_to(out)
    with pytest.raises(TfgError, match="it is a link"):
        export_checkpoint(out, out.with_suffix(".safetensors"), back)
    assert list(back.iterdir()) == [back / TENSORS]
    export_checkpoint(out, out.with_suffix(".safetensors"), back, force=True)
    assert not (back / TENSORS).is_symlink()
    assert out.read_text().startswith("# GPT-2")


def test_an_export_needs_an_import(tmp_path: Path) -> None:
    spec, weights = tmp_path / "model.tfg", tmp_path / "model.safetensors"
    import_checkpoint(write_folder(tmp_path / "in"), spec)
    with pytest.raises(TfgError, match="FG605"):
        export_checkpoint(tmp_path / "other.tfg", weights, tmp_path / "back")
    with pytest.raises(TfgError, match="FG605"):
        export_checkpoint(tmp_path / "in", weights, tmp_path / "back")
    with pytest.raises(TfgError, match=r"FG418.* lacks table"):
        export_checkpoint(spec, tmp_path / "in" / TENSORS, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_an_export_takes_no_weights_of_another_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding them would write a checkpoint that looks sound; another precision is converted."""
    spec, weights = tmp_path / "model.tfg", tmp_path / "model.safetensors"
    import_checkpoint(write_folder(tmp_path / "in"), spec)
    tensors = load_file(weights)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(dtype)}, weights)
    with pytest.raises(TfgError, match=rf"FG418.* {re.escape(name)} has the type {str(dtype)[6:]}"):
        export_checkpoint(spec, weights, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    save_file({**tensors, name: tensors[name].double()}, weights)
    export_checkpoint(spec, weights, tmp_path / "back")
    assert (tmp_path / "back" / TENSORS).read_bytes() == (tmp_path / "in" / TENSORS).read_bytes()


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, spec = write_folder(tmp_path / "in"), str(tmp_path / "model.tfg")
    weights = str(tmp_path / "model.safetensors")

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        assert isinstance(code, int)
        return code

    assert status("import", str(folder), "-o", spec) == 0
    assert "GPT-2: 572 weights from 28 tensors of float32" in capsys.readouterr().out
    assert status("check", spec) == 0
    assert status("fmt", "--check", spec) == 0
    assert status("export", spec, "--weights", weights, "-o", str(tmp_path / "back")) == 0
    assert (tmp_path / "back" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    assert status("import", str(tmp_path / "none"), "-o", spec) == 2
    assert "FG601" in capsys.readouterr().err
    assert status("import", str(folder), "-o", str(tmp_path / "model.txt")) == 2
    assert status("export", spec, "--weights", str(folder / "config.json"), "-o", str(tmp_path / "b")) == 2
    assert "FG418" in capsys.readouterr().err


def test_a_build_knows_what_it_was_imported_from(tmp_path: Path) -> None:
    folder, spec = write_folder(tmp_path / "in"), tmp_path / "model.tfg"
    import_checkpoint(folder, spec)
    build, weights = tmp_path / "build", spec.with_suffix(".safetensors")
    fg.compile(spec, out=build)
    fg.compile(spec, out=build)  # origin.json is one of the build's own files
    for path in (spec, weights, spec.with_suffix(".origin.json")):
        path.rename(path.with_name(f"other{path.name}"))
    export_checkpoint(build, tmp_path / "othermodel.safetensors", tmp_path / "back")
    assert (tmp_path / "back" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    tensors = {**tensors_of(GPT2), "h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    import_checkpoint(write_folder(tmp_path / "with", tensors=tensors), spec)
    fg.compile(spec, out=build)
    with pytest.raises(TfgError, match=r"FG605.* h\.0\.attn\.bias"):
        export_checkpoint(build, weights, tmp_path / "again")
    export_checkpoint(spec, weights, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "with" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensors", {}),
        ("kept", ["x"]),
        ("texts", {}),
        ("texts", {"config.json": "{"}),
        ("texts", {"config.json": "[]"}),
        ("texts", {"config.json": "\udcff"}),
        ("metadata", {"model.safetensors": {"format": "\udcff"}}),
        ("texts", {"../config.json": "{}"}),
        ("texts", {"config.json": json.dumps(GPT2), "run.py": ""}),
        ("metadata", {"a/model.safetensors": {}}),
        ("metadata", None),
    ],
)
def test_a_record_that_is_damaged(key: str, value: object, tmp_path: Path) -> None:
    spec = tmp_path / "model.tfg"
    import_checkpoint(write_folder(tmp_path / "in"), spec)
    path = spec.with_suffix(".origin.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TfgError, match="FG430"):
        export_checkpoint(spec, spec.with_suffix(".safetensors"), tmp_path / "back")
    assert not (tmp_path / "back").exists()

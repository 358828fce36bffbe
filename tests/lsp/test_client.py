"""The server as an editor meets it: a process that a real client talks to."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_lsp
from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pytest_lsp import ClientServerConfig, LanguageClient

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.tfg"))
SERVER = ClientServerConfig(
    server_command=[sys.executable, "-m", "fastgrad_dsl", "lsp"],
    server_env={
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "compiler", ROOT / "grammar"))),
    },
)
PATIENCE = 60.0  # seconds; a loaded machine starts a process slowly


@pytest_lsp.fixture(config=SERVER)
async def client(lsp_client: LanguageClient) -> AsyncIterator[None]:
    for method in (types.WORKSPACE_CODE_LENS_REFRESH, types.WORKSPACE_INLAY_HINT_REFRESH):
        lsp_client.feature(method)(lambda params: None)
    folder = types.WorkspaceFolder((ROOT / "examples").as_uri(), "examples")
    capabilities = pytest_lsp.client_capabilities("visual-studio-code")
    await lsp_client.initialize_session(
        types.InitializeParams(capabilities=capabilities, workspace_folders=[folder])
    )
    yield
    await lsp_client.shutdown_session()


async def told(client: LanguageClient, uri: str, version: int) -> list[types.Diagnostic]:
    """The diagnostics of a version of a document, once the server has sent them."""

    async def wait() -> list[types.Diagnostic]:
        while True:
            found = await client.wait_for_notification(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
            if found.uri == uri and found.version == version:
                return list(found.diagnostics)

    return await asyncio.wait_for(wait(), PATIENCE)


async def opened(client: LanguageClient, path: Path, text: str | None = None) -> list[types.Diagnostic]:
    """Open a file, with another text than its own if one is given; its diagnostics."""
    text = path.read_text(encoding="utf-8") if text is None else text
    document = types.TextDocumentItem(path.as_uri(), "tfg", 1, text)
    client.text_document_did_open(types.DidOpenTextDocumentParams(document))
    return await told(client, path.as_uri(), 1)


async def changed(client: LanguageClient, path: Path, version: int, text: str) -> list[types.Diagnostic]:
    """Give a document another text; its diagnostics."""
    document = types.VersionedTextDocumentIdentifier(version, path.as_uri())
    whole = types.TextDocumentContentChangeWholeDocument(text)
    client.text_document_did_change(types.DidChangeTextDocumentParams(document, [whole]))
    return await told(client, path.as_uri(), version)


@pytest.mark.medium
@pytest.mark.asyncio
async def test_every_example(client: LanguageClient) -> None:
    """No errors until it is broken, and every request has an answer."""
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert await opened(client, path) == []
        await ask(client, path, text)
        (found,) = await changed(client, path, 2, text + "\nparam broken = nowhere\n")
        assert found.code == "FG201"
        assert found.range.start == types.Position(text.count("\n") + 1, len("param broken = "))
        assert await changed(client, path, 3, text) == []


async def ask(client: LanguageClient, path: Path, text: str) -> None:
    """What an editor asks for when it shows a file, and where the model is called by its name."""
    document = types.TextDocumentIdentifier(path.as_uri())
    line = next(i for i, each in enumerate(text.splitlines()) if each.startswith("model "))
    at = types.Position(line, len("model "))
    whole = types.Range(types.Position(0, 0), types.Position(text.count("\n"), 0))
    told = await client.text_document_hover_async(types.HoverParams(document, at))
    assert told is not None
    assert isinstance(told.contents, types.MarkupContent)
    assert "model" in told.contents.value
    assert await client.text_document_document_symbol_async(types.DocumentSymbolParams(document))
    assert await client.text_document_folding_range_async(types.FoldingRangeParams(document))
    assert await client.text_document_semantic_tokens_full_async(types.SemanticTokensParams(document))
    assert await client.text_document_inlay_hint_async(types.InlayHintParams(document, whole))
    assert await client.text_document_code_lens_async(types.CodeLensParams(document))
    assert not await client.text_document_completion_async(types.CompletionParams(document, at))
    found = await client.text_document_definition_async(types.DefinitionParams(document, at))
    assert isinstance(found, types.Location)
    assert found.range.start == at
    options = types.FormattingOptions(tab_size=4, insert_spaces=True)
    edits = await client.text_document_formatting_async(types.DocumentFormattingParams(document, options))
    assert not edits  # the examples have their layout


@pytest.mark.asyncio
async def test_a_refusal_is_told_and_a_closed_document_has_no_errors(client: LanguageClient) -> None:
    path = EXAMPLES[0]
    document = types.TextDocumentIdentifier(path.as_uri())
    assert await opened(client, path, "param broken = nowhere\n")
    with pytest.raises(JsonRpcException, match="there is no name here") as refused:
        await client.text_document_prepare_rename_async(
            types.PrepareRenameParams(document, types.Position(1, 0))
        )
    assert refused.value.data is None
    client.text_document_did_close(types.DidCloseTextDocumentParams(document))
    found = await asyncio.wait_for(
        client.wait_for_notification(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS), PATIENCE
    )
    assert not found.diagnostics

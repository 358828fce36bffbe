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


@pytest.mark.asyncio
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
async def test_an_example_has_no_errors_until_it_is_broken(client: LanguageClient, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert await opened(client, path) == []
    (found,) = await changed(client, path, 2, text + "\nparam broken = nowhere\n")
    assert found.code == "FG201"
    assert found.range.start == types.Position(text.count("\n") + 1, len("param broken = "))
    assert await changed(client, path, 3, text) == []

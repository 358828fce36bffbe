// Starts `fastgrad lsp` for .tfg files, and says what to do where it cannot be started.
import { commands, type ExtensionContext, window, workspace } from "vscode";
import { LanguageClient, type ServerOptions } from "vscode-languageclient/node";

let client: LanguageClient | undefined;

/** The program of the language server and its arguments, from the settings. */
function serverCommand(): ServerOptions {
  const [command, ...args] = workspace.getConfiguration("fastgrad").get<string[]>("command", ["fastgrad", "lsp"]);
  return { command, args };
}

async function start(): Promise<void> {
  client = new LanguageClient("fastgrad", "fastgrad", serverCommand(), {
    documentSelector: [{ language: "tfg", scheme: "file" }],
  });
  try {
    await client.start();
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    void window.showErrorMessage(
      `The language server did not start (${reason}). Install it by pip install 'fastgrad-dsl[lsp]', ` +
        `or set fastgrad.command to where it is; then run "fastgrad: Restart the language server".`,
    );
  }
}

async function stop(): Promise<void> {
  const running = client;
  client = undefined;
  if (running?.isRunning()) {
    await running.stop();
  }
}

export async function activate(context: ExtensionContext): Promise<void> {
  const restart = async (): Promise<void> => {
    await stop();
    await start();
  };
  context.subscriptions.push(
    commands.registerCommand("fastgrad.restart", restart),
    workspace.onDidChangeConfiguration((change) => {
      if (change.affectsConfiguration("fastgrad.command")) {
        void restart();
      }
    }),
  );
  await start();
}

export function deactivate(): Promise<void> {
  return stop();
}

/**
 * Compiles the three scripts into binaries that need no Bun and read nothing from the folder they are run in.
 *
 *     bun run build                               # dist/server, dist/client, dist/client-robust
 *     bun run build --target bun-linux-arm64      # dist/bun-linux-arm64/server, …
 *     bun run build --target all                  # the same for every target
 *     bun run build --outdir DIR                  # DIR instead of dist
 *     bun run build --outdir DIR old/client.ts    # this script instead of the three
 */
import { rm } from "node:fs/promises";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

export const PROGRAMS = ["server", "client", "client-robust"] as const;

const TARGETS = [
  "bun-linux-x64",
  "bun-linux-arm64",
  "bun-linux-x64-musl",
  "bun-linux-arm64-musl",
  "bun-darwin-x64",
  "bun-darwin-arm64",
  "bun-windows-x64",
  "bun-windows-arm64",
] as const;

const SCRIPTS = PROGRAMS.map((program) => join(import.meta.dir, "..", `${program}.ts`));

/** Builds for this machine, or for a target. @throws AggregateError what Bun has to say */
export async function build(outdir: string, target?: string, scripts: readonly string[] = SCRIPTS): Promise<void> {
  for (const script of scripts) {
    const program = basename(script, ".ts");
    await Bun.build({
      entrypoints: [script],
      // Bytecode spares the parser at start-up; it wants modules, for the top-level await.
      format: "esm",
      bytecode: true,
      minify: true,
      sourcemap: "linked",
      compile: {
        outfile: join(outdir, program),
        // A .env, bunfig.toml (its "preload" is code), tsconfig.json or package.json in the folder where
        // somebody starts the program is none of ours.
        autoloadDotenv: false,
        autoloadBunfig: false,
        autoloadTsconfig: false,
        autoloadPackageJson: false,
        // A client is soon done, and does a few steps for each read of up to 512 KiB. To compile them to machine code
        // after as few calls as in a server costs more time and memory (5 to 9 MiB) than it saves in 2 GiB.
        jitPolicy: program === "server" ? 1 : 100,
        ...(target !== undefined && { target: target as Bun.Build.CompileTarget }), // Bun.build checks it
      },
    });
    // The binary has its own, compressed copy.
    await rm(join(outdir, `${program}.map`), { force: true });
  }
}

async function main(): Promise<void> {
  const string = { type: "string" } as const;
  const options = { target: string, outdir: string };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const { target, outdir = "dist" } = values;
  const scripts = positionals.length > 0 ? positionals : SCRIPTS;
  if (target === undefined) return build(outdir, undefined, scripts);
  for (const one of target === "all" ? TARGETS : [target]) await build(join(outdir, one), one, scripts);
}

if (import.meta.main)
  await main().catch((error: Error) => {
    console.error(`Error: ${error.message}`);
    process.exit(1);
  });

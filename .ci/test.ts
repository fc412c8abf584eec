#!/usr/bin/env bun
/**
 * Runs the tests, two files at a time, on binaries that are built once: `bun run test`. Arguments go to `bun test`,
 * which does the same alone, one file after the other.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { build } from "./build.ts";

const binaries = mkdtempSync(join(tmpdir(), "http-over-tcp-"));
process.on("SIGINT", () => {}); // the tests get it too: wait for their end
try {
  await build(binaries);
  const argv = [process.execPath, "test", "--parallel=2", "--no-isolate", ...process.argv.slice(2)];
  const env = { ...process.env, TESTED_BINARIES: binaries };
  process.exitCode = await Bun.spawn(argv, { env, stdio: ["inherit", "inherit", "inherit"] }).exited;
} finally {
  rmSync(binaries, { recursive: true, force: true });
}

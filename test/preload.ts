/** Runs before all test files; what it leaves to `afterAll` runs after the last of them. */
import { afterAll } from "bun:test";
import { rmSync } from "node:fs";
import { binaries } from "./harness.ts";

afterAll(() => rmSync(binaries, { recursive: true, force: true }));

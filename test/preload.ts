/** Runs before all test files; what it leaves to `afterAll` runs after the last of them. */
import { afterAll } from "bun:test";
import { removeBinaries } from "./harness.ts";

afterAll(removeBinaries);

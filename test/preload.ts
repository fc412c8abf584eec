/** Runs before all test files; what it leaves to `afterAll` runs after the last of them. */
import { afterAll, setDefaultTimeout } from "bun:test";
import { removeBinaries } from "./harness.ts";

// A test that takes a second alone was seen to take eight on a busy machine. Only a test that hangs may fail so.
setDefaultTimeout(60_000);

afterAll(removeBinaries);

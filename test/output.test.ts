/**
 * `client-robust -o FILE` from outside: FILE is whole or as it was, and what has been fetched is kept.
 *
 * What the client keeps beside FILE has no name here: it is all that the folder lists but FILE.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { EXIT_CODES } from "../client-robust.ts";
import { command, hasTool, run, runProgram, temporaryFolder, until, VARIANTS } from "./harness.ts";
import { CONTENT, raw, rangeOf, reprDigest, response, scripted, type Script, serving, sha256 } from "./origin.ts";

// Most of the time nothing happens here: what waits for its retry waits beside the others.
setDefaultTimeout(30_000);

const OLD = "as it was";
/** Another version, of the same length. */
const OTHER = Buffer.from(CONTENT.toString().replaceAll("\n", ";"));
/** So much of the content comes before an answer breaks off. */
const HALF = 9000;
const SHA256 = ["--sha256", sha256(CONTENT)];

/** A folder for FILE and whatever comes to lie beside it. */
async function makePlace(old?: string) {
  const folder = await temporaryFolder();
  const file = join(folder.path, "file");
  if (old !== undefined) writeFileSync(file, old);
  /** Paths of what lies beside FILE, the largest first. */
  const beside = () =>
    readdirSync(folder.path)
      .map((name) => join(folder.path, name))
      .filter((path) => path !== file)
      .toSorted((a, b) => lstatSync(b).size - lstatSync(a).size);
  return {
    folder: folder.path,
    file,
    beside,
    /** What is kept of the content: the largest file beside FILE. */
    part: () => beside()[0] ?? "",
    /** Bytes that are kept. */
    kept: () => Math.max(0, ...beside().map((path) => lstatSync(path).size)),
    content: () => (existsSync(file) ? readFileSync(file) : undefined),
    text: () => (existsSync(file) ? readFileSync(file, "utf8") : undefined),
    isWhole: (content = CONTENT) => existsSync(file) && readFileSync(file).equals(content),
    names: () => readdirSync(folder.path).toSorted(),
    [Symbol.asyncDispose]: folder[Symbol.asyncDispose],
  };
}
type Place = Awaited<ReturnType<typeof makePlace>>;

/** One line, that of a failure. */
const ONE_LINE = /^Error: [^\n]+\n$/;

/** The whole, and nothing beside it. */
function expectWhole(place: Place, content = CONTENT): void {
  expect(place.names()).toEqual(["file"]);
  expect(place.isWhole(content)).toBeTrue();
}

describe.each(VARIANTS)("-o FILE (%s)", (variant) => {
  /** Gets the URL into FILE; all that is told is a failure. */
  const save = (place: Place, url: string, ...args: string[]) =>
    runProgram("client-robust", variant, ["-s", "-o", place.file, ...args, url]);

  /** A run that breaks off after the first half, which is kept. @returns the origin, for a run that goes on */
  async function keepHalf(place: Place, script: Script = serving({ cut: HALF }), ...args: string[]) {
    const origin = scripted([script]);
    const { exitCode, stderr } = await save(place, origin.url, "--retry", "0", ...args);
    expect([exitCode, place.kept()]).toEqual([EXIT_CODES.partial, HALF]);
    expect(stderr).toMatch(ONE_LINE);
    return origin;
  }

  /** The same, and then a run that gets other answers. */
  async function continueWith(place: Place, scripts: Script[], ...args: string[]) {
    using origin = await keepHalf(place);
    origin.answerAnew(...scripts);
    return { ...(await save(place, origin.url, ...args)), requests: origin.requests };
  }

  describe("continues what an earlier run has kept", () => {
    test.concurrent("asks at once for the rest, of the version that it has", async () => {
      await using place = await makePlace(OLD);
      const { exitCode, requests } = await continueWith(place, [serving()]);
      expect(requests.map(rangeOf)).toEqual([HALF]);
      expect(requests[0]).toContain('\r\nIf-Range: "a"\r\n');
      expect(exitCode).toBe(EXIT_CODES.ok);
      expectWhole(place);
    });

    test.concurrent.each([
      ["shorter than what is kept", OTHER.subarray(0, 100)],
      ["as long as what is kept", OTHER.subarray(0, HALF)],
      ["a byte longer than what is kept", OTHER.subarray(0, HALF + 1)],
      ["as long as the first", OTHER],
      ["longer than the first", Buffer.concat([OTHER, OTHER])],
      ["empty", Buffer.alloc(0)],
    ])("a second version that is %s is FILE, with nothing of the first", async (_, content) => {
      await using place = await makePlace(OLD);
      const { exitCode } = await continueWith(place, [serving({ etag: '"b"', content })]);
      expect(exitCode).toBe(EXIT_CODES.ok);
      expectWhole(place, content);
    });

    test.concurrent("a second version that breaks off too takes the place of the first", async () => {
      await using place = await makePlace(OLD);
      const b = serving({ etag: '"b"', content: OTHER });
      const shorter = serving({ etag: '"b"', content: OTHER, cut: 100 });
      const { exitCode, requests } = await continueWith(place, [shorter, b]);
      expect([exitCode, ...requests.map(rangeOf)]).toEqual([EXIT_CODES.ok, HALF, 100]);
      expectWhole(place, OTHER);
    });

    test.concurrent.each([
      ["--sha256", serving(), SHA256],
      ["Repr-Digest", serving({ fields: reprDigest(CONTENT) }), []],
    ] as const)("a byte of it that has changed since is found by %s", async (_, script, args) => {
      for (const at of [0, HALF / 2, HALF - 1]) {
        for (const retries of ["0", "3"]) {
          await using place = await makePlace(OLD);
          using origin = await keepHalf(place);
          const part = readFileSync(place.part());
          part[at] = (part[at] ?? 0) ^ 1;
          writeFileSync(place.part(), part);
          origin.answerAnew(script);
          const { exitCode, stderr } = await save(place, origin.url, "--retry", retries, ...args);
          expect(rangeOf(origin.requests[0])).toBe(HALF);
          if (exitCode === EXIT_CODES.ok) expectWhole(place);
          else {
            expect([exitCode, retries, place.text()]).toEqual([EXIT_CODES.digest, "0", OLD]);
            expect(stderr).toMatch(ONE_LINE);
            // Another run does not find it again.
            expect((await save(place, origin.url, ...args)).exitCode).toBe(EXIT_CODES.ok);
            expectWhole(place);
          }
        }
      }
    });

    test.concurrent("more of it than the whole has is not used", async () => {
      for (const [length, script] of [
        [CONTENT.length + 1, serving({ cut: HALF })],
        [CONTENT.length * 2, serving({ cut: HALF })],
        // The length is not known before the end.
        [
          CONTENT.length * 2,
          raw(`HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n2328\r\n${CONTENT.subarray(0, HALF)}`),
        ],
      ] as const) {
        await using place = await makePlace(OLD);
        using origin = await keepHalf(place, script);
        appendFileSync(place.part(), Buffer.alloc(length - HALF, "x"));
        const right = serving();
        const isBeyond = (request: string) => (rangeOf(request) ?? 0) >= CONTENT.length;
        const unsatisfiable = raw(`HTTP/1.1 416 No\r\nETag: "a"\r\nContent-Range: bytes */${CONTENT.length}\r\n\r\n`);
        origin.answerAnew((request) => (isBeyond(request) ? unsatisfiable : right)(request));
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expectWhole(place);
      }
    });

    test.concurrent("a part with the right tag and another complete length does not belong to it", async () => {
      for (const complete of [HALF + 1000, CONTENT.length - 1, CONTENT.length + 1]) {
        await using place = await makePlace(OLD);
        const rest = OTHER.subarray(HALF, HALF + 1000);
        const range = `Content-Range: bytes ${HALF}-${HALF + 999}/${complete}`;
        const misfit = response("206 Partial Content", rest, 'ETag: "a"', range);
        const { exitCode } = await continueWith(place, [misfit, serving()]);
        expect(exitCode).toBe(EXIT_CODES.ok);
        expectWhole(place);
      }
    });

    test.concurrent(
      "kill -9 before the next response, in its head, and before its content: all is still kept",
      async () => {
        await using place = await makePlace(OLD);
        using origin = await keepHalf(place);
        const part = readFileSync(place.part());
        const head = `HTTP/1.1 206 Partial Content\r\nETag: "a"\r\nContent-Range: bytes ${HALF}-${CONTENT.length - 1}/${CONTENT.length}\r\n`;
        for (const text of ["", head, `${head}\r\n`, `${head}\r\nX`]) {
          origin.answerAnew(raw(text, "stall"));
          const argv = [...(await command("client-robust", variant)), "-o", place.file, origin.url];
          await using child = Bun.spawn(argv, { stdio: ["ignore", "ignore", "ignore"] });
          await until(() => origin.requests.length === 1);
          if (text.endsWith("X")) await until(() => place.kept() > HALF);
          expect(rangeOf(origin.requests[0])).toBe(HALF);
          child.kill("SIGKILL");
          await child.exited;
          expect(readFileSync(place.part()).subarray(0, HALF).equals(part)).toBeTrue();
          expect(place.text()).toBe(OLD);
        }
        origin.answerAnew(serving({ cut: 1 }), serving());
        writeFileSync(place.part(), part); // without the X
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(origin.requests.map(rangeOf)).toEqual([HALF, HALF + 1]);
        expectWhole(place);
      },
    );

    test.concurrent("what is complete is not fetched again", async () => {
      await using place = await makePlace(OLD);
      // All the content is here, but not the end of the response.
      const chunk = `${CONTENT.length.toString(16)}\r\n${CONTENT}`;
      const unended = raw(`HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n${chunk}`);
      using origin = scripted([unended]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBeGreaterThanOrEqual(CONTENT.length - 1);
      expectWhole(place);
    });
  });

  describe("FILE is a link", () => {
    test.concurrent.each([
      ["to a file", "target"],
      ["to a file in another folder", "../elsewhere/target"],
      ["to a link to a file", "second"],
    ])("%s: the file is replaced, the link stays", async (_, target) => {
      await using top = await makePlace();
      const folder = join(top.folder, "folder");
      for (const path of [folder, join(top.folder, "elsewhere")]) mkdirSync(path);
      const written = join(folder, target === "second" ? "target" : target);
      writeFileSync(written, OLD);
      if (target === "second") symlinkSync("target", join(folder, "second"));
      symlinkSync(target, join(folder, "file"));
      const place = { ...top, file: join(folder, "file") };
      const before = readdirSync(folder).toSorted();
      using origin = scripted([serving({ cut: HALF })]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect(readFileSync(written, "utf8")).toBe(OLD);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBe(HALF);
      expect([readlinkSync(place.file), readFileSync(written).equals(CONTENT)]).toEqual([target, true]);
      expect(readdirSync(folder).toSorted()).toEqual(before);
      if (target.startsWith("..")) expect(readdirSync(join(top.folder, "elsewhere"))).toEqual(["target"]);
    });
  });

  test.concurrent.if(hasTool("strace"))("all of it is written, then synced, then FILE is renamed", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(serving({ cut: 1 }), serving());
    const trace = `${place.folder}/trace`;
    const strace = ["strace", "-f", "-qq", "-y", "-o", trace, "-e", "trace=/write|sync|rename"];
    const argv = [...strace, ...(await command("client-robust", variant)), "-o", place.file, origin.url];
    expect((await run(argv)).exitCode).toBe(EXIT_CODES.ok);
    const calls = readFileSync(trace, "utf8").split("\n");
    const renamed = calls.findLastIndex((line) => /rename.*"[^"]*\/file"/.test(line));
    const [, part] = /"([^"]+)".*"[^"]+"/.exec(calls[renamed] ?? "") ?? [];
    const isOf = (pattern: RegExp) => (line: string) => pattern.test(line) && line.includes(`<${part}>`);
    const written = calls.findLastIndex(isOf(/write/));
    const synced = calls.findIndex((line, at) => at > written && isOf(/f(data)?sync\(.*= 0/)(line));
    expect(written).toBeGreaterThan(-1);
    expect(synced).toBeGreaterThan(written);
    expect(renamed).toBeGreaterThan(synced);
    expect(place.isWhole()).toBeTrue();
  });
});

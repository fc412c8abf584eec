/**
 * `client-robust -o FILE` from outside: FILE is whole or as it was, and what has been fetched is kept.
 *
 * What the client keeps beside FILE has no name here: it is all that the folder lists but FILE.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  chmodSync,
  chownSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { EXIT_CODES } from "../client-robust.ts";
import {
  canMount,
  command,
  freePort,
  hasTool,
  makeCertificate,
  mortal,
  run,
  runProgram,
  temporaryFolder,
  Transcript,
  until,
  VARIANTS,
} from "./harness.ts";
import {
  type Answer,
  CONTENT,
  HALF,
  OTHER,
  pausing,
  raw,
  rangeOf,
  reprDigest,
  response,
  scripted,
  type Script,
  serving,
  sha256,
} from "./origin.ts";
import { Random } from "./random.ts";

// Most of the time nothing happens here: what waits for its retry waits beside the others.
setDefaultTimeout(60_000);

const OLD = "as it was";
const SHA256 = ["--sha256", sha256(CONTENT)];

/** A folder for FILE and whatever comes to lie beside it; in a folder of its own, where it can be moved to and fro. */
async function makePlace(old?: string) {
  const top = await temporaryFolder();
  chmodSync(top.path, 0o755);
  const folder = join(top.path, "folder");
  mkdirSync(folder);
  const file = join(folder, "file");
  if (old !== undefined) writeFileSync(file, old);
  const sizeOf = (path: string) => lstatSync(path, { throwIfNoEntry: false })?.size ?? 0; // it may have just gone
  /** Paths of what lies beside FILE, the largest first. */
  const beside = () =>
    readdirSync(folder)
      .map((name) => join(folder, name))
      .filter((path) => path !== file)
      .toSorted((a, b) => sizeOf(b) - sizeOf(a));
  return {
    top: top.path,
    folder,
    file,
    beside,
    /** What is kept of the content: the largest file beside FILE. */
    part: () => beside()[0] ?? "",
    /** Bytes that are kept. */
    kept: () => Math.max(0, ...beside().map(sizeOf)),
    text: () => (existsSync(file) ? readFileSync(file, "utf8") : undefined),
    isWhole: (content = CONTENT) => existsSync(file) && readFileSync(file).equals(content),
    names: () => readdirSync(folder).toSorted(),
    async [Symbol.asyncDispose]() {
      if (existsSync(folder)) chmodSync(folder, 0o755); // a test may have made it one that nobody may write to
      await top[Symbol.asyncDispose]();
    },
  };
}
type Place = Awaited<ReturnType<typeof makePlace>>;

/** One line, that of a failure. */
const SEED = Number(process.env["SEED"] ?? Math.floor(Math.random() * 1e6));
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

    test.concurrent("so is one of another length that has the same tag", async () => {
      for (const length of [100, HALF, HALF + 1, OTHER.length - 1]) {
        await using place = await makePlace(OLD);
        const content = OTHER.subarray(0, length);
        const { exitCode } = await continueWith(place, [response("200 OK", content, 'ETag: "a"')]);
        expect([length, exitCode]).toEqual([length, EXIT_CODES.ok]);
        expectWhole(place, content);
      }
    });

    test.concurrent("so is one that comes within the same run, where the first one broke off", async () => {
      for (const length of [0, 100, HALF, HALF + 1, OTHER.length]) {
        await using place = await makePlace(OLD);
        const content = OTHER.subarray(0, length);
        using origin = scripted([serving({ cut: HALF }), serving({ etag: '"b"', content })]);
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF]);
        expectWhole(place, content);
      }
    });

    test.concurrent("a second version of which nothing comes leaves the first one", async () => {
      await using place = await makePlace(OLD);
      const nothing = raw('HTTP/1.1 200 OK\r\nETag: "b"\r\nContent-Length: 9\r\n\r\n');
      using origin = scripted([serving({ cut: HALF }), nothing]);
      expect((await save(place, origin.url, "--retry", "1")).exitCode).toBe(EXIT_CODES.partial);
      expect(place.kept()).toBe(HALF);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([HALF]);
      expectWhole(place);
    });

    test.concurrent("killed while a second version comes, nothing is taken for what it is not", async () => {
      for (const [now, content] of [
        [serving(), CONTENT],
        [serving({ etag: '"b"', content: OTHER }), OTHER],
        [serving({ etag: "", content: OTHER }), OTHER],
      ] as const) {
        await using place = await makePlace(OLD);
        using origin = scripted([
          serving({ cut: HALF }),
          serving({ etag: '"b"', content: OTHER, cut: 5000, end: "stall" }),
        ]);
        const argv = [...(await command("client-robust", variant)), "-o", place.file, origin.url];
        await using child = Bun.spawn(argv, { stdio: ["ignore", "ignore", "ignore"] });
        await until(() => place.beside().some((path) => lstatSync(path, { throwIfNoEntry: false })?.size === 5000));
        child.kill("SIGKILL");
        await child.exited;
        origin.answerAnew(now);
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expectWhole(place, content);
      }
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
      for (const [length, isKnown, script] of [
        [CONTENT.length + 1, true, serving({ cut: HALF })],
        [CONTENT.length * 2, true, serving({ cut: HALF })],
        // The length is not known before the end.
        [
          CONTENT.length * 2,
          false,
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
        // A link may be good for one request: where the length is known, none is spent on what cannot be used.
        if (isKnown) expect(origin.requests.length).toBe(1);
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

    test.concurrent(
      "a 416 that names length and version says that what a former run has kept is the whole",
      async () => {
        await using place = await makePlace(OLD);
        const chunk = `${CONTENT.length.toString(16)}\r\n${CONTENT}`;
        const unended = raw(`HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n${chunk}`);
        using origin = scripted([unended]);
        expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
        const fields = `ETag: "a"\r\nContent-Range: bytes */${CONTENT.length}\r\nContent-Length: 0\r\n`;
        origin.answerAnew(raw(`HTTP/1.1 416 Range Not Satisfiable\r\n${fields}\r\n`));
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expectWhole(place);
      },
    );
  });

  describe("FILE is a link", () => {
    test.concurrent.each([
      ["to a file", "target"],
      ["to a file in another folder", "../elsewhere/target"],
      ["to a link to a file", "second"],
    ])("%s: the file is replaced, the link stays", async (_, target) => {
      await using place = await makePlace();
      const { folder } = place;
      mkdirSync(join(place.top, "elsewhere"));
      const written = join(folder, target === "second" ? "target" : target);
      writeFileSync(written, OLD);
      if (target === "second") symlinkSync("target", join(folder, "second"));
      symlinkSync(target, join(folder, "file"));
      const before = readdirSync(folder).toSorted();
      using origin = scripted([serving({ cut: HALF })]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect(readFileSync(written, "utf8")).toBe(OLD);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBe(HALF);
      expect([readlinkSync(place.file), readFileSync(written).equals(CONTENT)]).toEqual([target, true]);
      expect(readdirSync(folder).toSorted()).toEqual(before);
      if (target.startsWith("..")) expect(readdirSync(join(place.top, "elsewhere"))).toEqual(["target"]);
    });

    test.concurrent("to a file that is not there yet: the link stays, the file appears where it leads", async () => {
      for (const target of ["target", "../elsewhere/target", "second"]) {
        await using place = await makePlace();
        const { folder } = place;
        mkdirSync(join(place.top, "elsewhere"));
        symlinkSync(target, join(folder, "file"));
        if (target === "second") symlinkSync("third", join(folder, "second"));
        using origin = scripted([serving({ cut: HALF })]);
        expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
        expect(existsSync(place.file)).toBeFalse();
        origin.answerAnew(serving());
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(rangeOf(origin.requests[0])).toBe(HALF);
        expect([readlinkSync(place.file), place.isWhole()]).toEqual([target, true]);
        const inFolder = { target: ["file", "target"], second: ["file", "second", "third"] }[target] ?? ["file"];
        expect(readdirSync(folder).toSorted()).toEqual(inFolder);
        expect(readdirSync(join(place.top, "elsewhere"))).toEqual(target.startsWith("..") ? ["target"] : []);
      }
    });

    test.concurrent("that leads round, or into a folder that is not there: refused before a request", async () => {
      for (const target of ["file", "missing/target"]) {
        await using place = await makePlace();
        symlinkSync(target, place.file);
        using origin = scripted([serving()]);
        const { exitCode, stderr } = await save(place, origin.url);
        expect([exitCode, origin.requests]).toEqual([EXIT_CODES.write, []]);
        expect(stderr).toMatch(ONE_LINE);
        expect([place.names(), readlinkSync(place.file)]).toEqual([["file"], target]);
      }
    });
  });

  test.concurrent.if(hasTool("strace"))("all of it is written, then synced, then FILE is renamed", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(serving({ cut: 1 }), serving());
    const trace = join(place.top, "trace");
    const strace = ["strace", "-f", "-qq", "-y", "-o", trace, "-e", "trace=/open|write|truncate|sync|rename"];
    const argv = [...strace, ...(await command("client-robust", variant)), "-o", place.file, origin.url];
    expect((await run(argv)).exitCode).toBe(EXIT_CODES.ok);
    const calls = readFileSync(trace, "utf8")
      .split("\n")
      .filter((line) => line.includes(place.folder));
    const renamed = calls.findLastIndex((line) => /rename.*"[^"]*\/file"/.test(line));
    const [, part] = /"([^"]+)".*"[^"]+"/.exec(calls[renamed] ?? "") ?? [];
    const isOf = (pattern: RegExp) => (line: string) => pattern.test(line) && line.includes(`<${part}>`);
    const written = calls.findLastIndex(isOf(/write/));
    const synced = calls.findIndex((line, at) => at > written && isOf(/f(data)?sync\(.*= 0/)(line));
    expect(written).toBeGreaterThan(-1);
    expect(synced).toBeGreaterThan(written);
    expect(renamed).toBeGreaterThan(synced);
    expect(place.isWhole()).toBeTrue();
    // What it makes is new, and content is never cut off.
    const makes = calls.filter((line) => /O_CREAT/.test(line));
    expect(makes.length).toBeGreaterThan(0);
    for (const line of makes) expect(line).toContain("O_EXCL");
    expect(calls.filter(isOf(/truncate\(|O_TRUNC/))).toEqual([]);
  });
});

/** From here on the binary alone: what differs between the two has been tested by now. */
const save = (place: Place, url: string, ...args: string[]) =>
  runProgram("client-robust", "binary", ["-s", "-o", place.file, ...args, url]);

/** A run that breaks off after the first half. @returns its origin, for a run that goes on */
async function keepHalf(place: Place, script: Script = serving({ cut: HALF }), ...args: string[]) {
  const origin = scripted([script]);
  const { exitCode } = await save(place, origin.url, "--retry", "0", ...args);
  expect([exitCode, place.kept()]).toEqual([EXIT_CODES.partial, HALF]);
  return origin;
}

/** Starts a run that goes on while the test does something to its files. */
async function launch(place: Place, args: string[], prefix: string[] = []) {
  const argv = [...prefix, ...(await command("client-robust", "binary")), "-o", place.file, ...args];
  const child = Bun.spawn(argv, { stdio: ["ignore", "ignore", "pipe"] });
  const stderr = new Response(child.stderr).text();
  const ended = async () => {
    await child.exited;
    return { exitCode: child.exitCode, signalCode: child.signalCode, stderr: await stderr };
  };
  return { child, ended, [Symbol.asyncDispose]: () => child[Symbol.asyncDispose]() };
}

/** What files hold, whatever they are called. */
const holdings = (paths: string[]) => paths.map((path) => sha256(readFileSync(path))).toSorted();

const isRoot = process.getuid?.() === 0;
const NOBODY = 65534;
/** Root may write everywhere, so a run that has to be refused is one of another user. */
const unprivileged = isRoot ? ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups"] : [];

async function saveUnprivileged(place: Place, url: string, ...args: string[]) {
  return run([...unprivileged, ...(await command("client-robust", "binary")), "-o", place.file, ...args, url]);
}

/** A folder of theirs, with a FILE of theirs in it. */
async function makeTheirPlace(mode: number) {
  const place = await makePlace(OLD);
  if (isRoot) for (const path of [place.folder, place.file]) chownSync(path, NOBODY, NOBODY);
  chmodSync(place.file, mode);
  return place;
}

test.concurrent.each(["fsync:error=EINVAL", "fsync:error=EOPNOTSUPP", "rename,renameat,renameat2:error=EEXIST"])(
  "a disk that knows less gets FILE all the same: %s",
  async (injected) => {
    await using place = await makePlace(OLD);
    using origin = scripted([serving()]);
    const failing = ["strace", "-f", "-o", "/dev/null", "-e", `inject=${injected}`];
    const argv = [...failing, ...(await command("client-robust", "binary")), "-s", "-o", place.file, origin.url];
    expect((await run(argv)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
  },
);

test.concurrent("a folder that cannot be read at the end is no reason to delete the part", async () => {
  await using place = await makePlace(OLD);
  using origin = scripted([serving({ cut: HALF }), serving()]);
  const { stderr } = await traced(place, origin.url, ["-e", "inject=getdents64:error=EIO"], "--retry", "0");
  expect([stderr, place.kept()]).toEqual([expect.stringMatching(ONE_LINE), HALF]);
  expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
  expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF]);
  expectWhole(place);
});

test.concurrent.if(isRoot)("a part of the folder's owner is continued, and of nobody else but the user", async () => {
  for (const [owner, range] of [
    [NOBODY, HALF],
    [1234, undefined],
  ] as const) {
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF }), serving()]);
    const save = () => runProgram("client-robust", "binary", ["--retry", "0", "-s", "-o", place.file, origin.url]);
    expect((await save()).exitCode).toBe(EXIT_CODES.partial);
    chownSync(place.folder, NOBODY, NOBODY);
    for (const name of place.names()) chownSync(`${place.folder}/${name}`, owner, owner);
    expect((await save()).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([undefined, range]);
    expect(place.isWhole(CONTENT)).toBeTrue();
  }
});

test.concurrent("a part that may not be opened is in nobody's way", async () => {
  await using place = await makeTheirPlace(0o644);
  using origin = scripted([serving({ cut: HALF }), serving()]);
  expect((await saveUnprivileged(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
  const part = readdirSync(place.folder).find((name) => name.endsWith(".part")) ?? "";
  chmodSync(`${place.folder}/${part}`, 0o400);
  expect((await saveUnprivileged(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.ok);
  expect(origin.requests.map(rangeOf)).toEqual([undefined, undefined]);
  expectWhole(place);
});

describe("with -o, only a representation is content", () => {
  const NO_CONTENT: readonly [status: string, content: string][] = [
    ["201 Created", "made"],
    ["202 Accepted", ""],
    ["202 Accepted", '{"state":"pending"}'],
    ["204 No Content", ""],
    ["205 Reset Content", ""],
    ["205 Reset Content", "reset"],
    ["207 Multi-Status", "<x/>"],
    ["208 Already Reported", "<x/>"],
    ["226 IM Used", "delta"],
    ["299 Odd", "odd"],
    ["300 Multiple Choices", "one or other"],
    ["301 Moved Permanently", "there"],
    ["304 Not Modified", ""],
    ["403 Forbidden", "expired"],
    ["416 Range Not Satisfiable", ""],
    ["503 Busy", "busy"],
  ];
  /** 204 and 304 have no content, and no length of it. */
  const answer = (status: string, content: string): Script =>
    /^(204|304)/.test(status) ? raw(`HTTP/1.1 ${status}\r\n\r\n`) : response(status, content);

  /** 304 says that what the client has is current: nothing is written, and nothing has failed. */
  const codeOf = (status: string) => (status.startsWith("304") ? EXIT_CODES.ok : EXIT_CODES.status);

  test.concurrent.each(NO_CONTENT)(
    "GET answered with %s %j is exit 22 (304: 0), and FILE as it was",
    async (status, content) => {
      for (const old of [OLD, undefined]) {
        await using place = await makePlace(old);
        using origin = scripted([answer(status, content)]);
        const { exitCode, stderr } = await save(place, origin.url, "--retry", "0");
        expect([exitCode, place.text(), place.beside()]).toEqual([codeOf(status), old, []]);
        expect(stderr).toMatch(exitCode === EXIT_CODES.ok ? /^$/ : ONE_LINE);
        const printed = await runProgram("client-robust", "binary", ["-s", "-o", "-", "--retry", "0", origin.url]);
        expect([printed.exitCode, printed.stdout]).toEqual([codeOf(status), ""]);
      }
    },
  );

  test.concurrent.each(NO_CONTENT)(
    "after half of the content %s %j is exit 22, and the half is kept",
    async (status, content) => {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ cut: HALF }), answer(status, content)]);
      const { exitCode, stderr } = await save(place, origin.url, "--retry", "1");
      // A part was promised: that there is none, as a 416 says, does not fit. That is another failure, but one too.
      expect([EXIT_CODES.status, ...(status.startsWith("416") ? [EXIT_CODES.range] : [])]).toContain(exitCode as 22);
      expect([place.text(), place.kept()]).toEqual([OLD, HALF]);
      expect(stderr).toMatch(ONE_LINE);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBe(HALF);
      expectWhole(place);
    },
  );

  test.concurrent("202 is tried again as 503 is", async () => {
    await using place = await makePlace(OLD);
    const pending = response("202 Accepted", "pending", "Retry-After: 0");
    using origin = scripted([pending, serving({ cut: HALF }), pending, serving()]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([undefined, undefined, HALF, HALF]);
    expectWhole(place);
    using again = scripted([serving({ cut: HALF }), pending, serving()]);
    const { stdout, exitCode } = await runProgram("client-robust", "binary", ["-s", "-o", "-", again.url]);
    expect([exitCode, stdout === CONTENT.toString()]).toEqual([EXIT_CODES.ok, true]);
    using always = scripted([pending]);
    expect((await save(place, always.url, "--retry", "1")).exitCode).toBe(EXIT_CODES.status);
    expect(always.requests.length).toBe(2);
    expectWhole(place);
  });

  test.concurrent("what is not tried again is asked for once", async () => {
    for (const [status, content] of NO_CONTENT.filter(([status]) => !/^(202|503)/.test(status))) {
      await using place = await makePlace(OLD);
      using origin = scripted([answer(status, content)]);
      expect((await save(place, origin.url)).exitCode).toBe(codeOf(status));
      expect([status, origin.requests.length]).toEqual([status, 1]);
    }
  });

  test.concurrent("203 is the content too, also where another version was kept", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(response("203 Non-Authoritative Information", OTHER, 'ETag: "b"'));
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place, OTHER);
  });

  test.concurrent("to another method, each 2xx has what was asked for", async () => {
    for (const [method, status, content] of [
      ["POST", "201 Created", "made"],
      ["POST", "202 Accepted", "pending"],
      ["PUT", "204 No Content", ""],
      ["POST", "205 Reset Content", ""],
      ["PROPFIND", "207 Multi-Status", "<x/>"],
      ["DELETE", "299 Odd", "odd"],
    ] as const) {
      await using place = await makePlace(OLD);
      using origin = scripted([answer(status, content)]);
      const { exitCode } = await save(place, origin.url, "-X", method);
      expect([method, exitCode, place.text()]).toEqual([method, EXIT_CODES.ok, content]);
      expect(place.names()).toEqual(["file"]);
    }
  });

  test.concurrent("without -o each response is printed as it comes", async () => {
    using origin = scripted([response("202 Accepted", "pending")]);
    const { exitCode, stdout } = await runProgram("client-robust", "binary", [origin.url]);
    expect([exitCode, stdout.slice(-11)]).toEqual([EXIT_CODES.ok, "\r\n\r\npending"]);
  });
});

describe("a response that contradicts itself, or what was asked for", () => {
  const N = CONTENT.length;
  const range = (first: number, last: number, complete: number | string = N) =>
    `Content-Range: bytes ${first}-${last}/${complete}`;
  const TAG = 'ETag: "a"';
  const chunked = (status: string, content: Buffer, ...fields: string[]) => {
    const head = [`HTTP/1.1 ${status}`, ...fields, "Transfer-Encoding: chunked\r\n\r\n"].join("\r\n");
    return raw(
      Buffer.concat([Buffer.from(`${head}${content.length.toString(16)}\r\n`), content, Buffer.from("\r\n0\r\n\r\n")]),
    );
  };
  const rest = CONTENT.subarray(HALF);

  test.concurrent.each<[name: string, script: Script]>([
    ["200 with the end and its Content-Range", response("200 OK", rest, TAG, range(HALF, N - 1))],
    [
      "200 with the start and its Content-Range",
      response("200 OK", CONTENT.subarray(0, HALF), TAG, range(0, HALF - 1)),
    ],
    ["200 with a Content-Range of unknown length", response("200 OK", rest, TAG, range(HALF, N - 1, "*"))],
    ["200 with the range of the whole, and less content", response("200 OK", rest, TAG, range(0, N - 1))],
    ["200 with the range of the whole, and fewer chunks", chunked("200 OK", rest, TAG, range(0, N - 1))],
    ["200 with two Content-Ranges", response("200 OK", rest, TAG, range(HALF, N - 1), range(HALF, N - 1))],
    ["200 in chunks with the end and its Content-Range", chunked("200 OK", rest, TAG, range(HALF, N - 1))],
    ["203 with the end and its Content-Range", response("203 Odd", rest, range(HALF, N - 1))],
    ["206 with the end, unasked", response("206 Partial Content", rest, TAG, range(HALF, N - 1))],
    [
      "206 with the start, unasked",
      response("206 Partial Content", CONTENT.subarray(0, HALF), TAG, range(0, HALF - 1)),
    ],
    ["206 with less than the range of the whole", response("206 Partial Content", rest, TAG, range(0, N - 1))],
    ["206 without a Content-Range, unasked", response("206 Partial Content", rest, TAG)],
    [
      "206 multipart, unasked",
      response("206 Partial Content", "--b--", "Content-Type: multipart/byteranges; boundary=b"),
    ],
    ["200 with a Repr-Digest of something else", response("200 OK", rest, reprDigest(CONTENT).trimEnd())],
  ])("as the first one it is refused: %s", async (_, script) => {
    await using place = await makePlace(OLD);
    using origin = scripted([script]);
    const { exitCode, stderr } = await save(place, origin.url, "--retry", "0");
    expect(stderr).toMatch(ONE_LINE);
    expect([EXIT_CODES.range, EXIT_CODES.partial, EXIT_CODES.digest]).toContain(exitCode as 33);
    expect(place.text()).toBe(OLD);
    const printed = await runProgram("client-robust", "binary", ["-s", "-o", "-", "--retry", "0", origin.url]);
    expect(printed.exitCode).toBe(exitCode);
    // Nothing of it gets into a later run.
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
  });

  test.concurrent.each<[name: string, script: Script]>([
    ["200 with the range of the whole", response("200 OK", CONTENT, TAG, range(0, N - 1))],
    ["200 in chunks with the range of the whole", chunked("200 OK", CONTENT, TAG, range(0, N - 1))],
    ["206 with the range of the whole, unasked", response("206 Partial Content", CONTENT, TAG, range(0, N - 1))],
    ["206 in chunks with the range of the whole", chunked("206 Partial Content", CONTENT, range(0, N - 1))],
  ])("this one does not: %s", async (_, script) => {
    await using place = await makePlace(OLD);
    using origin = scripted([script]);
    expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
  });

  const changed = Buffer.from(rest.map((byte) => byte ^ 1));
  const MISFITS: [name: string, script: Script][] = [
    ["200 with the rest and its Content-Range", response("200 OK", rest, TAG, range(HALF, N - 1))],
    ["200 with the rest of another version", response("200 OK", changed, 'ETag: "b"', range(HALF, N - 1))],
    ["200 with the rest, without a tag", response("200 OK", changed, range(HALF, N - 1))],
    [
      "200 with the start and its Content-Range",
      response("200 OK", CONTENT.subarray(0, HALF), TAG, range(0, HALF - 1)),
    ],
    [
      "200 with a longer slice than is held",
      response("200 OK", CONTENT.subarray(0, HALF + 9), TAG, range(0, HALF + 8)),
    ],
    [
      "206 with less than its Content-Range",
      response("206 Partial Content", changed.subarray(1), TAG, range(HALF, N - 1)),
    ],
    ["206 with more than its Content-Range", response("206 Partial Content", changed, TAG, range(HALF, N - 2))],
    ["206 in chunks, more than its Content-Range", chunked("206 Partial Content", rest, TAG, range(HALF, HALF + 99))],
    [
      "206 in chunks, less than its Content-Range",
      chunked("206 Partial Content", rest.subarray(0, 99), TAG, range(HALF, N - 1)),
    ],
    ["206 that begins later", response("206 Partial Content", changed.subarray(1), TAG, range(HALF + 1, N - 1))],
    ["206 that ends before it begins", response("206 Partial Content", "", TAG, range(HALF, HALF - 1))],
    ["206 beyond its complete length", response("206 Partial Content", changed, TAG, range(HALF, N - 1, N - 1))],
    ["206 of a longer version", response("206 Partial Content", changed, TAG, range(HALF, N - 1, N + 1))],
    ["206 of another version", response("206 Partial Content", changed, 'ETag: "b"', range(HALF, N - 1))],
    ["206 with a weak tag", response("206 Partial Content", changed, 'ETag: W/"a"', range(HALF, N - 1))],
    [
      "206 in another coding",
      response("206 Partial Content", changed, TAG, "Content-Encoding: gzip", range(HALF, N - 1)),
    ],
    ["206 with two tags", response("206 Partial Content", changed, TAG, 'ETag: "b"', range(HALF, N - 1))],
    ["206 without a Content-Range", response("206 Partial Content", changed, TAG)],
    ["206 with two Content-Ranges", response("206 Partial Content", changed, TAG, range(HALF, N - 1), range(0, N - 1))],
    [
      "206 with a Content-Range of nothing",
      response("206 Partial Content", changed, TAG, `Content-Range: bytes */${N}`),
    ],
    [
      "206 of another unit",
      response("206 Partial Content", changed, TAG, `Content-Range: items ${HALF}-${N - 1}/${N}`),
    ],
    ["206 with less than is held", response("206 Partial Content", CONTENT.subarray(0, 99), TAG, range(0, 98))],
    [
      "206 with exactly what is held",
      response("206 Partial Content", CONTENT.subarray(0, HALF), TAG, range(0, HALF - 1)),
    ],
    [
      "206 multipart",
      response(
        "206 Partial Content",
        `--b\r\n${range(HALF, N - 1)}\r\n\r\n${changed}\r\n--b--`,
        "Content-Type: multipart/byteranges; boundary=b",
      ),
    ],
    ["416 inside of what was promised", response("416 No", "", TAG, `Content-Range: bytes */${N}`)],
    ["416 of exactly what is held", response("416 No", "", TAG, `Content-Range: bytes */${HALF}`)],
    ["416 without a word", response("416 No")],
  ];

  test.concurrent.each(MISFITS)("after half of the content, another attempt gets it right: %s", async (_, misfit) => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(misfit, serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
    expect(origin.requests.length).toBeLessThanOrEqual(3);
    // The rest is on stdout exactly once, or there is a failure.
    using printing = scripted([serving({ cut: HALF }), misfit, serving()]);
    const { exitCode, stdout } = await runProgram("client-robust", "binary", ["-s", "-o", "-", printing.url]);
    if (exitCode === EXIT_CODES.ok) expect(stdout === CONTENT.toString()).toBeTrue();
    else expect(CONTENT.toString()).toStartWith(stdout);
  });

  // What comes in chunks has been used by the time that it ends too early or too late.
  const DETECTED = MISFITS.filter(([name]) => !name.includes("in chunks"));
  test.concurrent.each(DETECTED)("what is held stays as long as nothing fits: %s", async (_, misfit) => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const busy = response("503 Busy");
    origin.answerAnew((request) => (rangeOf(request) === undefined ? busy : misfit)(request));
    const { exitCode, stderr } = await save(place, origin.url, "--retry", "2");
    expect(Object.values(EXIT_CODES)).toContain(exitCode as 0);
    expect(exitCode).not.toBe(EXIT_CODES.ok);
    expect(stderr).toMatch(ONE_LINE);
    expect(place.text()).toBe(OLD);
    expect(place.kept()).toBeGreaterThanOrEqual(HALF);
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(rangeOf(origin.requests[0])).toBeGreaterThanOrEqual(HALF);
    expectWhole(place);
  });

  test.concurrent(
    "after a misfit the whole is asked for; of the same version what is held is passed over",
    async () => {
      await using place = await makePlace(OLD);
      using origin = await keepHalf(place);
      const late = response("206 Partial Content", "x", TAG, range(HALF + 1, HALF + 1));
      // The whole breaks off too, before and after the byte up to which it is held.
      origin.answerAnew(late, serving({ cut: 99 }), serving({ cut: HALF + 1000 }), serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.slice(0, 2).map(rangeOf)).toEqual([HALF, undefined]);
      expectWhole(place);
    },
  );

  test.concurrent("where the length is not known, a 416 tells it only with the tag of what is held", async () => {
    const size = HALF.toString(16);
    const broken = raw(
      `HTTP/1.1 200 OK\r\n${TAG}\r\nTransfer-Encoding: chunked\r\n\r\n${size}\r\n${CONTENT.subarray(0, HALF)}`,
    );
    for (const fields of [[], ['ETag: "b"'], ['ETag: W/"a"']]) {
      await using place = await makePlace(OLD);
      using origin = scripted([broken, response("416 No", "", `Content-Range: bytes */${HALF}`, ...fields), serving()]);
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expectWhole(place);
    }
    // With it, what is held is the whole.
    await using place = await makePlace(OLD);
    using origin = scripted([broken, response("416 No", "", `Content-Range: bytes */${HALF}`, TAG)]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place, CONTENT.subarray(0, HALF));
  });

  const unended = (content: Buffer) =>
    raw(`HTTP/1.1 200 OK\r\n${TAG}\r\nTransfer-Encoding: chunked\r\n\r\n${content.length.toString(16)}\r\n${content}`);
  const isAll = response("416 No", "", TAG, `Content-Range: bytes */${N}`);

  test.concurrent(
    "a 416 of exactly what is held ends it, though the response before it was passed over in part",
    async () => {
      await using place = await makePlace(OLD);
      const passedOver: Script = () => serving({ cut: HALF })(""); // it answers no Range
      using origin = scripted([unended(CONTENT), passedOver, isAll]);
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.length).toBe(3);
      expectWhole(place);
    },
  );

  test.concurrent(
    "a 416 of exactly what an earlier run has kept is no proof of its digest: the whole is asked for",
    async () => {
      await using place = await makePlace(OLD);
      using origin = scripted([unended(OTHER)]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      origin.answerAnew(isAll, serving());
      expect((await save(place, origin.url, "--sha256", sha256(CONTENT))).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([N - 1, undefined]);
      expectWhole(place);
    },
  );

  const BLOCK = 4096;
  test.concurrent.each<[name: string, first: (from: number) => number, past: (from: number) => number]>([
    ["from the start of a block", (from) => from - (from % BLOCK), () => N],
    ["from the first byte", () => 0, () => N],
    ["from a byte before", (from) => Math.max(0, from - 1), () => N],
    ["a block at a time", (from) => from - (from % BLOCK), (from) => Math.min(N, from - (from % BLOCK) + BLOCK)],
  ])("a 206 that begins earlier is used: %s", async (_, first, past) => {
    const script: Script = (request) => {
      const from = rangeOf(request) ?? 0;
      const [start, end] = [first(from), past(from)];
      return response("206 Partial Content", CONTENT.subarray(start, end), TAG, range(start, end - 1))(request);
    };
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF }), script]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
    expect(origin.requests.length).toBeLessThanOrEqual(past(HALF) === N ? 2 : 6);
    origin.answerAnew(serving({ cut: HALF }), script);
    const { exitCode, stdout } = await runProgram("client-robust", "binary", ["-s", "-o", "-", origin.url]);
    expect([exitCode, stdout === CONTENT.toString()]).toEqual([EXIT_CODES.ok, true]);
  });
});

describe("a server that answers with less than it was asked for", () => {
  const PIECE = 4000;
  /** A piece of what is asked for, or of its start. */
  const piece: Script = (request) => {
    const from = rangeOf(request) ?? 0;
    const part = CONTENT.subarray(from, from + PIECE);
    const range = `Content-Range: bytes ${from}-${from + part.length - 1}/${CONTENT.length}`;
    return response("206 Partial Content", part, 'ETag: "a"', range)(request);
  };
  const busy = response("503 Busy");

  test.concurrent("is asked for the next piece, which is no retry", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(piece);
    expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([9000, 13_000, 17_000, 21_000]);
    expectWhole(place);
  });

  test.concurrent("has all retries left when it fails after a piece", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    origin.answerAnew(piece, busy, piece, piece, piece);
    expect((await save(place, origin.url, "--retry", "1", "--retry-delay", "0.1")).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
    origin.answerAnew(serving({ cut: HALF }), piece, busy, piece);
    const { exitCode } = await save(place, origin.url, "--retry", "1", "--retry-delay", "0.1");
    expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.ok, 6]);
  });

  test.concurrent("a piece that is cut is a failure", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const range = `Content-Range: bytes ${HALF}-${CONTENT.length - 1}/${CONTENT.length}`;
    origin.answerAnew(
      raw(`HTTP/1.1 206 Partial Content\r\nETag: "a"\r\n${range}\r\n\r\n${CONTENT.subarray(HALF, HALF + 9)}`),
    );
    expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
    expect([origin.requests.length, place.kept()]).toEqual([1, HALF + 9]);
  });
});

describe("several runs were killed", () => {
  test.concurrent.each([
    ["of one version the longest part is gone on with", false],
    ["of two versions FILE is the one that the server has", true],
  ])("%s, and all of them are gone at the end", async (_, areTwo) => {
    await using place = await makePlace(OLD);
    const gate = Promise.withResolvers<void>();
    let answers = 0;
    const versions = [
      serving({ cut: HALF }),
      areTwo ? serving({ etag: '"b"', content: OTHER, cut: 5000 }) : serving({ cut: 5000 }),
    ];
    const script: Script = (request) => {
      const { bytes } = (versions[answers++] ?? serving())(request);
      return { bytes: "", pause: () => gate.promise, rest: bytes, end: "stall" };
    };
    using origin = scripted([script]);
    await using one = await launch(place, [origin.url]);
    await until(() => origin.requests.length === 1);
    await using two = await launch(place, [origin.url]);
    await until(() => origin.requests.length === 2);
    gate.resolve();
    const sizes = () => place.beside().map((path) => lstatSync(path).size);
    await until(() => sizes().includes(HALF) && sizes().includes(5000));
    for (const { child, ended } of [one, two]) {
      child.kill("SIGKILL");
      await ended();
    }
    origin.answerAnew(areTwo ? serving({ etag: '"b"', content: OTHER }) : serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    if (!areTwo) expect(origin.requests.map(rangeOf)).toEqual([HALF]);
    expectWhole(place, areTwo ? OTHER : CONTENT);
  });
});

describe("a run that achieves nothing takes nothing away", () => {
  test.concurrent("another URL that fails leaves what is kept of the first one", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const before = holdings(place.beside());
    origin.answerAnew(response("404 Not Found", "no"));
    for (const [url, exitCode] of [
      [`http://127.0.0.1:${origin.port}/typo`, EXIT_CODES.status],
      [`${origin.url}?sig=expired`, EXIT_CODES.status],
      [origin.url, EXIT_CODES.status],
      [`http://127.0.0.1:${await freePort()}/file`, EXIT_CODES.connect],
      ["http://nowhere.invalid/file", EXIT_CODES.resolve],
    ] as const) {
      expect([(await save(place, url, "--retry", "0")).exitCode, url]).toEqual([exitCode, url]);
      expect(holdings(place.beside())).toEqual(before);
    }
    const length = "Content-Length: 9\r\n";
    for (const nothing of [
      "",
      "HTTP/1.1 200 OK\r\nCont",
      "nonsense\r\n\r\n",
      `HTTP/1.1 200 OK\r\nETag: "b"\r\n${length}\r\n`,
      `HTTP/1.1 200 OK\r\n${length}\r\n`,
      `HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: ${CONTENT.length}\r\n\r\n`,
    ]) {
      origin.answerAnew(raw(nothing, "reset"));
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBeGreaterThan(0);
      expect([nothing, holdings(place.beside())]).toEqual([nothing, before]);
    }
    expect(place.text()).toBe(OLD);
  });

  test.concurrent("wrong usage leaves it too, and so does a run that asks for something else", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const before = holdings(place.beside());
    expect((await save(place, origin.url, "--retry", "x")).exitCode).toBe(EXIT_CODES.usage);
    expect((await save(place, "ftp://localhost/")).exitCode).toBe(EXIT_CODES.url);
    origin.answerAnew(response("500 Oops", "no"));
    expect((await save(place, origin.url, "--retry", "0", "-d", "x")).exitCode).toBe(EXIT_CODES.status);
    expect(rangeOf(origin.requests[0])).toBeUndefined();
    expect(holdings(place.beside())).toEqual(before);
  });

  test.concurrent("a fresh query of the same path goes on, where the tag is the same", async () => {
    for (const [kept, fresh] of [
      ["?sig=old", "?sig=new"],
      ["?sig=old", ""],
      ["?x=1", "?sig=new&x=1"],
      ["?X-Amz-Date=1&X-Amz-Signature=old&x=1", "?X-Amz-Date=2&X-Amz-Signature=new&x=1"],
      ["?Expires=1&Signature=old&Key-Pair-Id=K", "?Expires=2&Signature=new&Key-Pair-Id=L"],
      ["?sp=r&se=1&skt=1&ske=1&sig=old&jwt=old", "?sp=r&se=2&skt=2&ske=2&sig=new&jwt=new"],
    ]) {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ cut: HALF })]);
      await save(place, `${origin.url}${kept}`, "--retry", "0");
      expect(place.kept()).toBe(HALF);
      origin.answerAnew(serving());
      expect((await save(place, `${origin.url}${fresh}`)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([HALF]);
      expectWhole(place);
    }
  });

  test.concurrent("what --sha256 names goes on from any URL and server, and is no other content", async () => {
    for (const digest of [SHA256, ["--sha256", sha256(OTHER)]]) {
      await using place = await makePlace(OLD);
      using first = await keepHalf(place, serving({ cut: HALF, etag: "" }), ...SHA256);
      using second = scripted([serving({ etag: "", content: digest === SHA256 ? CONTENT : OTHER })]);
      expect(first.requests.length).toBe(1);
      const { exitCode } = await save(place, `${second.url}/other?token=new`, ...digest, "-H", "Authorization: new");
      expect(exitCode).toBe(EXIT_CODES.ok);
      expect(second.requests.map(rangeOf)).toEqual([digest === SHA256 ? HALF : undefined]);
      expectWhole(place, digest === SHA256 ? CONTENT : OTHER);
    }
  });

  test.concurrent("a fresh query that leads to another version gets that one", async () => {
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF })]);
    await save(place, `${origin.url}?v=1`, "--retry", "0");
    origin.answerAnew(serving({ etag: '"b"', content: OTHER }));
    expect((await save(place, `${origin.url}?v=2`)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place, OTHER);
  });

  test.concurrent("another query, field or data with the same tag or date is other content", async () => {
    for (const validator of [{}, { etag: "", lastModified: "Wed, 01 Jan 2020 12:00:01 GMT" }])
      for (const [first, second] of [
        [["?id=1"], ["?id=2"]],
        [["?id=1"], [""]],
        [["?id=1&sig=a"], ["?id=2&sig=b"]],
        [["?mysig=1"], ["?mysig=2"]],
        [["?policy=1"], ["?policy=2"]],
        [
          ["", "-H", "Authorization: 1"],
          ["", "-H", "Authorization: 2"],
        ],
        [
          ["", "-X", "GET", "-d", "id=1"],
          ["", "-X", "GET", "-d", "id=2"],
        ],
      ] as const) {
        await using place = await makePlace(OLD);
        using origin = scripted([serving({ ...validator, cut: HALF })]);
        const [query, ...args] = first;
        const broken = await save(place, `${origin.url}${query}`, "--retry", "0", ...args);
        expect(broken.exitCode).toBe(EXIT_CODES.partial);
        origin.answerAnew(serving({ ...validator, content: OTHER }));
        const [other, ...others] = second;
        expect((await save(place, `${origin.url}${other}`, ...others)).exitCode).toBe(EXIT_CODES.ok);
        expect([second, ...origin.requests.map(rangeOf)]).toEqual([second, undefined]);
        expectWhole(place, OTHER);
      }
  });

  test.concurrent("a query and a field may be secrets: nothing that is kept tells them", async () => {
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF })]);
    await save(place, `${origin.url}?key=secret1`, "--retry", "0", "-H", "Authorization: secret2");
    expect(place.kept()).toBe(HALF);
    for (const path of place.beside()) expect(readFileSync(path, "latin1")).not.toMatch(/secret|U0VD/i);
  });

  test.concurrent("a redirect that leads to another path at the next attempt leads to other content", async () => {
    const redirecting = (to: string, script: Script): Script => {
      const redirect = response("302 Found", "", `Location: ${to}`);
      return (request) => (request.startsWith("GET /file ") ? redirect : script)(request);
    };
    const first = redirecting("/1", serving({ cut: HALF }));
    for (const [to, isSame] of [
      ["/2", false],
      ["/1?id=2", false],
      ["/1?sig=2", true],
    ] as const) {
      const second = redirecting(to, serving(isSame ? {} : { content: OTHER }));
      const scripts = [first, first, second];
      const ranges = [undefined, undefined, undefined, isSame ? HALF : undefined];
      await using place = await makePlace(OLD);
      using origin = scripted(scripts);
      expect((await save(place, origin.url, "-L", "--retry-delay", "0.1")).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual(ranges);
      expectWhole(place, isSame ? CONTENT : OTHER);
      // The same in two runs.
      origin.answerAnew(...scripts);
      expect((await save(place, origin.url, "-L", "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect((await save(place, origin.url, "-L")).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual(ranges);
      expectWhole(place, isSame ? CONTENT : OTHER);
      // What is printed cannot be taken back.
      origin.answerAnew(...scripts);
      const args = ["-s", "-L", "-o", "-", "--retry-delay", "0.1", origin.url];
      const { exitCode, stdout } = await runProgram("client-robust", "binary", args);
      expect(exitCode).toBe(isSame ? EXIT_CODES.ok : EXIT_CODES.partial);
      expect(stdout === (isSame ? CONTENT : CONTENT.subarray(0, HALF)).toString()).toBeTrue();
    }
  });

  test.concurrent("a redirect to a mirror, with the same path and tag, goes on there", async () => {
    await using place = await makePlace(OLD);
    using mirror = scripted([serving()]);
    const redirect = response("302 Found", "", `Location: ${mirror.url}`);
    using origin = scripted([serving({ cut: HALF }), redirect]);
    expect((await save(place, origin.url, "-L", "--retry-delay", "0.1")).exitCode).toBe(EXIT_CODES.ok);
    expect(mirror.requests.map(rangeOf)).toEqual([HALF]);
    expectWhole(place);
  });

  test.concurrent("another path, host, port or scheme with the same tag is other content", async () => {
    await using certificates = await temporaryFolder();
    const { cert, key } = await makeCertificate(certificates.path);
    const other = serving({ content: OTHER });
    using secure = scripted([other], { tls: { cert: Bun.file(cert), key: Bun.file(key) } });
    using elsewhere = scripted([other]);
    for (const makeUrl of [
      (port: number) => `http://127.0.0.1:${port}/other`,
      (port: number) => `http://127.0.0.1:${port}/file/`,
      (port: number) => `http://127.0.0.1:${port}/FILE`,
      (port: number) => `http://localhost:${port}/file`,
      () => elsewhere.url,
      () => secure.url,
    ]) {
      await using place = await makePlace(OLD);
      using origin = await keepHalf(place);
      origin.answerAnew(other);
      const url = makeUrl(origin.port);
      const { exitCode, stderr } = await save(place, url, "-k");
      expect([url, exitCode, stderr]).toEqual([url, EXIT_CODES.ok, ""]);
      for (const request of [...origin.requests, ...elsewhere.requests, ...secure.requests])
        expect(rangeOf(request)).toBeUndefined();
      expectWhole(place, OTHER);
    }
  });

  test.concurrent("behind a redirect that leads to another query each time it goes on", async () => {
    await using place = await makePlace(OLD);
    let n = 0;
    const origin =
      (cut: number): Script =>
      (request) =>
        request.startsWith("GET /file ")
          ? response("302 Found", "", `Location: /object?sig=${n++}`)(request)
          : serving({ cut })(request);
    using redirecting = scripted([origin(HALF)]);
    await save(place, redirecting.url, "-L", "--retry", "0");
    expect(place.kept()).toBe(HALF);
    redirecting.answerAnew(origin(CONTENT.length));
    expect((await save(place, redirecting.url, "-L")).exitCode).toBe(EXIT_CODES.ok);
    expect(redirecting.requests.map((request) => request.split(" ")[1])).toEqual(["/file", "/object?sig=1"]);
    expect(rangeOf(redirecting.requests[1])).toBe(HALF);
    expectWhole(place);
  });

  test.concurrent("what nothing can vouch for goes when its run ends", async () => {
    for (const etag of ["", 'W/"a"']) {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ etag, cut: HALF })]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect(place.names()).toEqual(["file"]);
      expect(place.text()).toBe(OLD);
    }
  });
});

describe("other programs' files", () => {
  const NAMES = [
    "file.part",
    "file.part.json",
    "file.tmp",
    ".file.part",
    "file.part~",
    "file.part.1",
    "file.1.part",
  ].concat(
    ["file.a.part.json", "file..part", "file.partial", "file.crdownload", "file.json", "file.lock", "file.aria2"],
    ["FILE.part", "file2.part", "fil.part", "file.0123456789abcdef.part.old", "x.part", "file.part.part"],
  );
  const PRECIOUS = '{"precious": true}';

  test.concurrent.each<[end: string, script: Script, code: number]>([
    ["that works", serving(), EXIT_CODES.ok],
    ["that fails", response("404 Not Found", "no"), EXIT_CODES.status],
    ["that breaks off", serving({ cut: HALF }), EXIT_CODES.partial],
  ])("survive a run %s: files, folders and links", async (_, script, code) => {
    const put: Record<string, (path: string) => void> = {
      file: (path) => writeFileSync(path, PRECIOUS),
      folder(path) {
        mkdirSync(path);
        writeFileSync(join(path, "inside"), PRECIOUS);
      },
      link: (path) => symlinkSync("target", path),
      "dangling link": (path) => symlinkSync("nowhere", path),
      "empty file": (path) => writeFileSync(path, ""),
    };
    for (const what of Object.values(put)) {
      await using place = await makePlace(OLD);
      writeFileSync(join(place.folder, "target"), PRECIOUS);
      for (const name of NAMES) what(join(place.folder, name));
      const list = () => run(["ls", "-lnR", "--time-style=full-iso", ...NAMES, "target"], { cwd: place.folder });
      const before = (await list()).stdout;
      using origin = scripted([script]);
      expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(code);
      expect((await list()).stdout).toBe(before);
      expect(readFileSync(join(place.folder, "target"), "utf8")).toBe(PRECIOUS);
      expect(place.isWhole()).toBe(code === EXIT_CODES.ok);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect((await list()).stdout).toBe(before);
      expect(place.names()).toEqual(["file", "target", ...NAMES].toSorted());
    }
  });

  /** Names that a run of ours gives, in another folder. */
  async function lookalikes(): Promise<string[]> {
    await using place = await makePlace();
    using _ = await keepHalf(place);
    return place.beside().map((path) => path.slice(place.folder.length + 1));
  }

  test.concurrent(
    "what is called like a part, but is a folder or a link, is neither followed nor written to",
    async () => {
      const names = await lookalikes();
      for (const put of [
        (path: string) => mkdirSync(path),
        (path: string) => symlinkSync("target", path),
        (path: string) => symlinkSync("file", path),
        (path: string) => symlinkSync("nowhere", path),
      ]) {
        await using place = await makePlace(OLD);
        writeFileSync(join(place.folder, "target"), CONTENT.subarray(0, HALF));
        for (const name of names) put(join(place.folder, name));
        using origin = scripted([serving()]);
        expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(place.isWhole()).toBeTrue();
        expect(lstatSync(place.file).isFile()).toBeTrue();
        expect(readFileSync(join(place.folder, "target")).equals(CONTENT.subarray(0, HALF))).toBeTrue();
        expect(existsSync(join(place.folder, "nowhere"))).toBeFalse();
      }
    },
  );

  test.concurrent("what is called like a part, with nothing that says of what, is not used", async () => {
    const [name = ""] = await lookalikes();
    await using place = await makePlace(OLD);
    writeFileSync(join(place.folder, name), PRECIOUS);
    using origin = scripted([serving()]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(rangeOf(origin.requests[0])).toBeUndefined();
    expect(place.isWhole()).toBeTrue();
  });

  test.concurrent("what has another name too is not written to", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const copy = join(place.top, "copy");
    linkSync(place.part(), copy);
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
    expect(lstatSync(copy).size).toBe(HALF);
  });

  test.concurrent.if(isRoot)("what somebody else owns is not used", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    chownSync(place.part(), 1234, 5678);
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([undefined]);
    expectWhole(place);
  });

  test.concurrent("a companion that is torn, of another program, or hostile leads to the whole", async () => {
    for (const text of [
      "",
      "{",
      "null",
      "[]",
      "7",
      PRECIOUS,
      `{"total":-1}`,
      "x".repeat(100_000),
      "\0",
      `{"etag":7}`,
    ]) {
      await using place = await makePlace(OLD);
      using origin = await keepHalf(place);
      const companion = place.beside().at(-1) ?? "";
      expect(companion).not.toBe(place.part());
      writeFileSync(companion, text);
      origin.answerAnew(serving());
      const { exitCode, stderr } = await save(place, origin.url);
      expect([text.slice(0, 20), exitCode, stderr]).toEqual([text.slice(0, 20), EXIT_CODES.ok, ""]);
      expect(place.isWhole()).toBeTrue();
    }
  });

  test.concurrent("a tag in a companion cannot put a field into the request", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    const companion = place.beside().at(-1) ?? "";
    const state = readFileSync(companion, "utf8");
    writeFileSync(companion, state.replaceAll(String.raw`\"a\"`, String.raw`\"a\"\r\nEvil: 1`));
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.join("")).not.toContain("Evil");
    expect(place.isWhole()).toBeTrue();
  });

  test.concurrent("a length in a companion that is none leads to the whole", async () => {
    for (const total of [7, "99999", [99999], { toString: 1 }]) {
      await using place = await makePlace(OLD);
      using origin = await keepHalf(place);
      const companion = place.beside().at(-1) ?? "";
      writeFileSync(companion, JSON.stringify({ ...JSON.parse(readFileSync(companion, "utf8")), total }));
      origin.answerAnew(serving());
      const { exitCode, stderr } = await save(place, origin.url);
      expect([total, exitCode, stderr, ...origin.requests.map(rangeOf)]).toEqual([total, EXIT_CODES.ok, "", undefined]);
      expectWhole(place);
    }
  });

  test.concurrent("a value in a companion that is no text fits nothing, and is no fault", async () => {
    for (const name of ["coding", "etag", "lastModified", "resource", "validator"]) {
      for (const value of [null, 7, [], { toString: 1 }]) {
        await using place = await makePlace(OLD);
        using origin = await keepHalf(place);
        const companion = place.beside().at(-1) ?? "";
        writeFileSync(companion, JSON.stringify({ ...JSON.parse(readFileSync(companion, "utf8")), [name]: value }));
        origin.answerAnew(serving());
        const { exitCode, stderr } = await save(place, origin.url, "-R", ...SHA256);
        expect([name, value, exitCode, stderr, origin.requests.length]).toEqual([name, value, EXIT_CODES.ok, "", 1]);
        expectWhole(place);
      }
    }
  });

  test.concurrent("a FILE whose name begins with that of another FILE has parts of its own", async () => {
    const [name = ""] = await lookalikes();
    for (const other of ["file.x", "file.part", "file.json", "file2", name]) {
      await using folder = await makePlace();
      const place: Place = { ...folder, file: join(folder.folder, other) };
      using origin = await keepHalf({ ...place, kept: folder.kept });
      const before = holdings(folder.beside());
      using right = scripted([serving({ content: OTHER })], {});
      // By the same URL, which must not be taken for the same FILE.
      origin.answerAnew(serving());
      expect((await save(folder, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBeUndefined();
      expect(folder.isWhole()).toBeTrue();
      expect(holdings(folder.beside())).toEqual(before);
      expect((await save(folder, right.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(holdings(folder.beside())).toEqual(before);
      origin.answerAnew(serving());
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBe(HALF);
      expect(folder.names()).toEqual(["file", other].toSorted());
      expect([folder.isWhole(OTHER), readFileSync(place.file).equals(CONTENT)]).toEqual([true, true]);
    }
  });
});

describe("FILE as it was", () => {
  test.concurrent.each(["600", "640", "644", "666", "755", "700", "604", "2755", "200"])(
    "a FILE of mode %s keeps it",
    async (octal) => {
      const mode = Number.parseInt(octal, 8);
      await using place = await makeTheirPlace(mode);
      using origin = scripted([serving()]);
      expect((await saveUnprivileged(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(lstatSync(place.file).mode & 0o7777).toBe(mode);
      chmodSync(place.file, 0o644);
      expectWhole(place);
    },
  );

  test.concurrent("what comes of a private FILE is private from its first byte", async () => {
    await using place = await makePlace(OLD);
    chmodSync(place.file, 0o600);
    let modes: number[] = [];
    const look = () =>
      until(() => place.kept() >= HALF).then(
        () => (modes = place.beside().map((path) => lstatSync(path).mode & 0o077)),
      );
    using origin = scripted([pausing(serving(), HALF, look)]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(modes.length).toBeGreaterThan(0);
    expect(modes.every((mode) => mode === 0)).toBeTrue();
    expectWhole(place);
  });

  test.concurrent.each(["077", "022", "002", "000"])("a new FILE has the mode that umask %s leaves", async (umask) => {
    await using place = await makePlace();
    using origin = scripted([serving()]);
    const argv = [...(await command("client-robust", "binary")), "-s", "-o", place.file, origin.url];
    expect((await run(["sh", "-c", `umask ${umask}; exec "$@"`, "sh", ...argv])).exitCode).toBe(EXIT_CODES.ok);
    expect(lstatSync(place.file).mode & 0o7777).toBe(0o666 & ~Number.parseInt(umask, 8));
    expectWhole(place);
  });

  test.concurrent.if(isRoot).each(["644", "600", "444", "2755", "4755"])(
    "root leaves a FILE of mode %s to its owner",
    async (octal) => {
      const mode = Number.parseInt(octal, 8);
      await using place = await makePlace(OLD);
      chownSync(place.file, 1234, 5678);
      chmodSync(place.file, mode);
      using origin = scripted([serving({ cut: HALF }), serving()]);
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      const { uid, gid, mode: now } = lstatSync(place.file);
      expect([uid, gid, now & 0o7777]).toEqual([1234, 5678, mode]);
      expectWhole(place);
    },
  );

  test.concurrent.if(isRoot)("a group keeps its FILE, and another group gets no more than all others", async () => {
    const GROUP = 5678;
    for (const [groups, mode, expected] of [
      [`${GROUP}`, 0o660, [NOBODY, GROUP, 0o660]],
      [`${GROUP}`, 0o2775, [NOBODY, GROUP, 0o775]],
      ["1", 0o662, [NOBODY, NOBODY, 0o622]],
      ["1", 0o6757, [NOBODY, NOBODY, 0o757]],
      ["1", 0o677, [NOBODY, NOBODY, 0o677]],
    ] as const) {
      await using place = await makePlace(OLD);
      chmodSync(place.folder, 0o777);
      chownSync(place.file, 1234, GROUP);
      chmodSync(place.file, mode);
      let during = 0o777;
      using origin = scripted([
        pausing(serving(), HALF, async () => {
          await until(() => place.kept() >= HALF);
          during = lstatSync(place.part()).mode & 0o077;
        }),
      ]);
      const other = ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, `--groups=${groups}`];
      const argv = [...other, ...(await command("client-robust", "binary")), "-o", place.file, origin.url];
      expect((await run(argv)).exitCode).toBe(EXIT_CODES.ok);
      const { uid, gid, mode: now } = lstatSync(place.file);
      expect([mode, uid, gid, now & 0o7777]).toEqual([mode, ...expected]);
      expect(during & 0o070 & ~(mode << 3)).toBe(0);
      expect(during & 0o007 & ~mode).toBe(0);
    }
  });

  /** The folder's default: all for its owner, nothing for anybody else. */
  const setDefaultAcl = (folder: string) => {
    const code = `
import os, struct, sys
entries = ((1, 7), (4, 0), (32, 0))
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, may, 0xffffffff) for tag, may in entries)
os.setxattr(sys.argv[1], "system.posix_acl_default", acl)`;
    return Bun.spawnSync(["python3", "-c", code, folder]).success;
  };
  const probe = mkdtempSync(join(tmpdir(), "http-over-tcp-"));
  const hasAcl = setDefaultAcl(probe);
  rmSync(probe, { recursive: true });
  test.concurrent.if(hasAcl)("a new FILE is as private as its folder's default ACL makes it", async () => {
    await using place = await makePlace();
    expect(setDefaultAcl(place.folder)).toBeTrue();
    using origin = scripted([serving({ cut: HALF }), serving()]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(lstatSync(place.file).mode & 0o077).toBe(0);
    expectWhole(place);
  });

  test.concurrent("a FILE that has changed during the transfer stays what it has become", async () => {
    const target = (place: Place) => join(place.top, "target");
    for (const [old, change, expected] of [
      [OLD, ({ file }) => chmodSync(file, 0o600), "600"],
      [OLD, ({ file }) => chmodSync(file, 0o757), "757"],
      [undefined, ({ file }) => writeFileSync(file, "", { mode: 0o600 }), "600"],
      [undefined, (place) => symlinkSync(target(place), place.file), "link"],
      [OLD, (place) => (rmSync(place.file), symlinkSync("../target", place.file)), "link"],
    ] as [string | undefined, (place: Place) => void, string][]) {
      await using place = await makePlace(old);
      const act = async () => {
        await until(() => place.kept() >= HALF);
        change(place);
      };
      using origin = scripted([pausing(serving(), HALF, act)]);
      const { exitCode, stderr } = await save(place, origin.url);
      expect([exitCode, stderr]).toEqual([EXIT_CODES.ok, ""]);
      const found = lstatSync(place.file);
      expect(found.isSymbolicLink() ? "link" : (found.mode & 0o777).toString(8)).toBe(expected);
      if (expected === "link") expect(lstatSync(target(place)).isFile()).toBeTrue();
      expectWhole(place);
    }
    // A pipe cannot be replaced by a file.
    await using place = await makePlace(OLD);
    const becomePipe = async () => {
      await until(() => place.kept() >= HALF);
      rmSync(place.file);
      expect((await run(["mkfifo", place.file])).exitCode).toBe(0);
    };
    using origin = scripted([pausing(serving(), HALF, becomePipe)]);
    const { exitCode, stderr } = await save(place, origin.url);
    expect([exitCode, lstatSync(place.file).isFIFO()]).toEqual([EXIT_CODES.write, true]);
    expect(stderr).toMatch(ONE_LINE);
  });

  test.concurrent("-R gives FILE the time of any response that it is made of, the first second too", async () => {
    for (const [status, seconds, ...args] of [
      ["203 Odd", 1e9],
      ["201 Created", 1e9, "-d", "x"],
      ["200 OK", 0],
    ] as const) {
      await using place = await makePlace(OLD);
      const date = new Date(seconds * 1000).toUTCString();
      using origin = scripted([response(status, CONTENT, `Last-Modified: ${date}`)]);
      expect((await save(place, origin.url, "-R", ...args)).exitCode).toBe(EXIT_CODES.ok);
      expect([status, lstatSync(place.file).mtimeMs]).toEqual([status, seconds * 1000]);
      expectWhole(place);
    }
  });

  test.concurrent("a FILE that is removed between two runs comes back with its mode", async () => {
    await using place = await makePlace(OLD);
    chmodSync(place.file, 0o604);
    using origin = await keepHalf(place);
    rmSync(place.file);
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([HALF]);
    expect(lstatSync(place.file).mode & 0o777).toBe(0o604 & ~process.umask());
    expectWhole(place);
  });

  test.concurrent("a FILE that may not be read is written to with --sha256, too", async () => {
    await using place = await makeTheirPlace(0o200);
    using origin = scripted([serving()]);
    expect((await saveUnprivileged(place, origin.url, ...SHA256)).exitCode).toBe(EXIT_CODES.ok);
    chmodSync(place.file, 0o644);
    expectWhole(place);
  });

  test.concurrent("a FILE that may not be written to is refused before a request", async () => {
    for (const [mode, folderMode] of [
      [0o444, 0o755],
      [0o400, 0o755],
      [0o000, 0o755],
      [0o555, 0o755],
      [0o444, 0o555],
    ] as const) {
      await using place = await makeTheirPlace(mode);
      chmodSync(place.folder, folderMode);
      using origin = scripted([serving()]);
      const { exitCode, stderr } = await saveUnprivileged(place, origin.url);
      expect([exitCode, origin.requests]).toEqual([EXIT_CODES.write, []]);
      expect(stderr).toMatch(ONE_LINE);
      expect([place.names(), lstatSync(place.file).mode & 0o777]).toEqual([["file"], mode]);
      chmodSync(place.file, 0o644);
      expect(place.text()).toBe(OLD);
    }
  });

  test.concurrent("a new FILE in a folder that may not be written to is refused before a request", async () => {
    await using place = await makeTheirPlace(0o644);
    chmodSync(place.folder, 0o555);
    const absent = { ...place, file: join(place.folder, "absent") };
    using origin = scripted([serving()]);
    const { exitCode, stderr } = await saveUnprivileged(absent, origin.url);
    expect([exitCode, origin.requests]).toEqual([EXIT_CODES.write, []]);
    expect(stderr).toMatch(ONE_LINE);
    for (const path of [join(place.file, "below"), join(place.folder, "no", "folder"), place.folder]) {
      const refused = await save({ ...place, file: path }, origin.url);
      expect([refused.exitCode, origin.requests]).toEqual([EXIT_CODES.write, []]);
      expect(refused.stderr).toMatch(ONE_LINE);
    }
    expect(place.names()).toEqual(["file"]);
  });

  const OTHER_DISK = "/dev/shm";
  const hasOtherDisk = existsSync(OTHER_DISK) && statSync(OTHER_DISK).dev !== statSync(tmpdir()).dev;
  test.concurrent.each(["", ...(hasOtherDisk ? [OTHER_DISK] : [])])(
    "a FILE that can be written to, in a folder that cannot, is written in place; TMPDIR=%s",
    async (disk) => {
      await using place = await makeTheirPlace(0o644);
      const { ino } = lstatSync(place.file);
      chmodSync(place.folder, 0o555);
      const temporary = mkdtempSync(join(disk || place.top, "http-over-tcp-"));
      using _ = { [Symbol.dispose]: () => rmSync(temporary, { recursive: true, force: true }) };
      chmodSync(temporary, 0o777);
      const get = async (...args: string[]) =>
        run([...unprivileged, ...(await command("client-robust", "binary")), "-o", place.file, ...args, origin.url], {
          env: { TMPDIR: temporary },
        });
      using origin = scripted([serving({ cut: HALF })]);
      const broken = await get("-s", "--retry", "0");
      expect([broken.exitCode, place.text()]).toEqual([EXIT_CODES.partial, OLD]);
      expect(broken.stderr).toMatch(ONE_LINE);
      for (const content of [CONTENT, OTHER.subarray(0, 100)]) {
        origin.answerAnew(serving({ content, etag: `"${sha256(content)}"` }));
        const { exitCode, stderr } = await get();
        expect(exitCode).toBe(EXIT_CODES.ok);
        expect(stderr).toMatch(/^(?!Error)[^\n]+\n$/);
        expect(lstatSync(place.file).ino).toBe(ino);
        expectWhole(place, content);
      }
      expect(readdirSync(temporary)).toEqual([]);
    },
  );

  test.concurrent.if(canMount)("a FILE that something is mounted on is written in place", async () => {
    await using place = await makePlace(OLD);
    await using elsewhere = await temporaryFolder();
    const mounted = join(elsewhere.path, "mounted");
    writeFileSync(mounted, OLD);
    const { ino } = lstatSync(mounted);
    const bind = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"'];
    const saveMounted = async (url: string, ...args: string[]) =>
      run([
        ...bind,
        mounted,
        place.file,
        ...(await command("client-robust", "binary")),
        "-o",
        place.file,
        ...args,
        url,
      ]);
    using origin = scripted([serving({ cut: HALF })]);
    const broken = await saveMounted(origin.url, "--retry", "0", "-s");
    expect([broken.exitCode, readFileSync(mounted, "utf8"), place.kept()]).toEqual([EXIT_CODES.partial, OLD, HALF]);
    origin.answerAnew(serving());
    const { exitCode, stderr } = await saveMounted(origin.url);
    expect([exitCode, ...origin.requests.map(rangeOf)]).toEqual([EXIT_CODES.ok, HALF]);
    expect(stderr).toMatch(/^(?!Error)[^\n]+\n$/);
    expect([readFileSync(mounted).equals(CONTENT), lstatSync(mounted).ino, place.text()]).toEqual([true, ino, OLD]);
    expect(place.names()).toEqual(["file"]);
    if (hasTool("strace")) {
      // What was written there is on the disk too when the part of it goes.
      const trace = join(place.top, "trace");
      const strace = ["strace", "-f", "-qq", "-y", "-o", trace, "-e", "trace=/write|sync|unlink"];
      const client = await command("client-robust", "binary");
      origin.answerAnew(serving({ etag: '"c"' }));
      const traced = await run([
        ...bind,
        mounted,
        place.file,
        ...strace,
        ...client,
        "-s",
        "-o",
        place.file,
        origin.url,
      ]);
      expect(traced.exitCode).toBe(EXIT_CODES.ok);
      const calls = readFileSync(trace, "utf8").split("\n");
      const written = calls.findLastIndex((line) => /write/.test(line) && line.includes("/file>"));
      const synced = calls.findLastIndex((line) => /f(data)?sync\(.*\/file>.*= 0/.test(line));
      const unlinked = calls.findIndex((line, at) => at > written && /unlink/.test(line));
      expect(written).toBeGreaterThan(-1);
      expect(synced).toBeGreaterThan(written);
      expect(unlinked).toBeGreaterThan(synced);
      // Once it has begun, a signal does not break it off: a part of what is there already would be left.
      const signalled = ["strace", "-f", "-qq", "-o", trace, "-e", "inject=ftruncate:signal=SIGTERM:when=2"];
      origin.answerAnew(serving({ content: OTHER, etag: '"d"' }));
      const finished = await run([...bind, mounted, place.file, ...signalled, ...client, "-o", place.file, origin.url]);
      expect(readFileSync(trace, "utf8")).toContain("SIGTERM");
      expect([finished.exitCode, readFileSync(mounted).equals(OTHER)]).toEqual([EXIT_CODES.ok, true]);
      expect(finished.stderr).toMatch(/^(?!Error|Kept)[^\n]+\n$/);
      rmSync(trace);
      expect(place.names()).toEqual(["file"]);
    }
    // A version that is shorter leaves nothing of the longer one.
    origin.answerAnew(serving({ content: OTHER.subarray(0, 100), etag: '"b"' }));
    expect((await saveMounted(origin.url, "-s")).exitCode).toBe(EXIT_CODES.ok);
    expect(readFileSync(mounted).equals(OTHER.subarray(0, 100))).toBeTrue();
    expect(place.names()).toEqual(["file"]);
  });

  test.concurrent.if(canMount)(
    "a disk that is full where FILE is mounted from costs nothing that is kept",
    async () => {
      await using place = await makePlace(OLD);
      await using elsewhere = await temporaryFolder();
      const steps =
        'mount -t tmpfs -o size=16k tmpfs "$0" && echo old >"$0/x" && mount --bind "$0/x" "$1" && shift && { "$@"; code=$?; cat "$0/x"; exit $code; }';
      using origin = scripted([serving()]);
      const argv = [...(await command("client-robust", "binary")), "-s", "-o", place.file, origin.url];
      const prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", steps, elsewhere.path, place.file];
      const { exitCode, stderr, stdout } = await run([...prefix, ...argv]);
      expect([exitCode, stdout]).toEqual([EXIT_CODES.write, "old\n"]);
      expect(stderr).toMatch(ONE_LINE);
      expect([place.kept(), place.text()]).toEqual([CONTENT.length, OLD]);
      origin.answerAnew(serving());
      expect((await run(argv)).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[0])).toBeGreaterThanOrEqual(CONTENT.length - 1);
      expectWhole(place);
    },
  );

  test.concurrent("a pipe is written to, and stays one", async () => {
    await using place = await makePlace();
    expect((await run(["mkfifo", place.file])).exitCode).toBe(0);
    using origin = scripted([serving({ cut: HALF }), serving()]);
    const reader = run(["cat", place.file]);
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect((await reader).stdout === CONTENT.toString()).toBeTrue();
    expect([lstatSync(place.file).isFIFO(), place.names()]).toEqual([true, ["file"]]);
  });

  const LONG = 255;
  test.concurrent.each([
    ["of 255 bytes", "x".repeat(LONG)],
    ["of 246 bytes", "x".repeat(246)],
    ["of 255 bytes that are 128 characters", `x${"é".repeat(127)}`],
    ["of 252 bytes that are 63 characters", "🎵".repeat(63)],
    ["with a line feed", "a\nb"],
    ["with a blank at both ends", " a "],
    ["with what means something to shells and patterns", "a*[b]?{c}\\$'\""],
    ["with a percent sign", "100%25.part"],
    ["with a leading dot", ".file"],
    ["with a leading dash", "-file"],
    ["that ends like a part", "file.part"],
  ])("any name is good: %s", async (_, name) => {
    await using folder = await makePlace();
    const place: Place = { ...folder, file: join(folder.folder, name) };
    // Whose name differs in its last byte alone is another FILE.
    const twin = `${[...name].slice(0, -1).join("")}y`;
    using origin = scripted([serving({ cut: HALF })]);
    expect((await save(place, origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
    expect(folder.kept()).toBe(HALF);
    const before = holdings(folder.beside());
    origin.answerAnew(serving());
    expect((await save({ ...folder, file: join(folder.folder, twin) }, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(rangeOf(origin.requests[0])).toBeUndefined();
    expect(holdings(folder.beside().filter((path) => !path.endsWith(`/${twin}`)))).toEqual(before);
    origin.answerAnew(serving());
    const { exitCode, stderr } = await save(place, origin.url);
    expect([exitCode, stderr, ...origin.requests.map(rangeOf)]).toEqual([EXIT_CODES.ok, "", HALF]);
    expect(readFileSync(place.file).equals(CONTENT)).toBeTrue();
    expect(folder.names()).toEqual([name, twin].toSorted());
  });

  test.concurrent("a name with a line feed is told in one line", async () => {
    await using folder = await makePlace();
    const place: Place = { ...folder, file: join(folder.folder, "a\nb") };
    using origin = scripted([serving({ cut: HALF })]);
    const argv = [...(await command("client-robust", "binary")), "-o", place.file, "--retry", "0", origin.url];
    expect((await run(argv)).stderr).toMatch(/^Error: [^\n]+\n[^\n]+\n$/);
    const refused = await save({ ...place, file: join(place.file, "c\nd") }, origin.url);
    expect(refused.stderr).toMatch(ONE_LINE);
  });
});

describe("files that others remove or replace during a run", () => {
  const PRECIOUS = "precious";
  const remove = (path: string | undefined) => rmSync(path ?? "", { recursive: true });
  const replace = (path: string | undefined, how: (path: string) => void) => {
    remove(path);
    how(path ?? "");
  };
  const smallest = (place: Place) => place.beside().findLast((path) => lstatSync(path).isFile());
  const ACTIONS: [name: string, act: (place: Place) => void][] = [
    ["the largest file beside FILE is removed", (place) => remove(place.part())],
    ["the smallest file beside FILE is removed", (place) => remove(smallest(place))],
    ["all files beside FILE are removed", (place) => place.beside().forEach(remove)],
    ["the largest is moved away", (place) => renameSync(place.part(), `${place.folder}.moved`)],
    ["the largest becomes a folder", (place) => replace(place.part(), mkdirSync)],
    ["the smallest becomes a folder", (place) => replace(smallest(place), mkdirSync)],
    ["the largest becomes another file", (place) => replace(place.part(), (path) => writeFileSync(path, PRECIOUS))],
    ["the largest becomes a larger one", (place) => replace(place.part(), (path) => writeFileSync(path, OTHER))],
    ["the smallest becomes another file", (place) => replace(smallest(place), (path) => writeFileSync(path, PRECIOUS))],
    ["the largest becomes a link to FILE", (place) => replace(place.part(), (path) => symlinkSync("file", path))],
    ["the largest grows beyond the end", (place) => appendFileSync(place.part(), CONTENT)],
    ["the largest is emptied", (place) => truncateSync(place.part())],
    ["the largest is cut short", (place) => truncateSync(place.part(), HALF - 1)],
    ["the folder is removed", (place) => remove(place.folder)],
    [
      "the folder is moved, and another one is in its place",
      (place) => {
        renameSync(place.folder, `${place.folder}.moved`);
        mkdirSync(place.folder);
      },
    ],
    ["FILE is removed", (place) => rmSync(place.file, { force: true })],
    ["FILE becomes another file", (place) => replace(place.file, (path) => writeFileSync(path, PRECIOUS))],
    ["FILE becomes a folder", (place) => replace(place.file, mkdirSync)],
    [
      "FILE becomes a folder with something in it",
      (place) =>
        replace(place.file, (path) => {
          mkdirSync(path);
          writeFileSync(join(path, "inside"), PRECIOUS);
        }),
    ],
    ["FILE becomes a dangling link", (place) => replace(place.file, (path) => symlinkSync("nowhere", path))],
  ];

  /** What a FILE is: its bytes, or what else lies there. */
  const describeFile = (path: string) => {
    const found = lstatSync(path, { throwIfNoEntry: false });
    if (found?.isFile()) return readFileSync(path, "latin1");
    return found === undefined ? "nothing" : found.isDirectory() ? readdirSync(path).join() : readlinkSync(path);
  };

  const WHEN: Record<string, (act: (place: Place) => unknown, place: Place) => Script[]> = {
    "while content comes": (act, place) => [pausing(serving(), HALF, () => act(place))],
    "before the last byte comes": (act, place) => [pausing(serving(), CONTENT.length - 1, () => act(place))],
    "before the connection is cut": (act, place) => [
      pausing(serving({ cut: HALF + 1 }), HALF, () => act(place)),
      serving(),
    ],
    "before another attempt gets its response": (act, place) => [
      serving({ cut: HALF }),
      (request) => {
        const { bytes } = serving()(request);
        return { bytes: "", pause: () => act(place), rest: bytes };
      },
    ],
  };

  describe.each(Object.keys(WHEN))("%s", (when) => {
    test.concurrent.each(ACTIONS)("%s: FILE is whole, or there is one line of error", async (_, act) => {
      await using place = await makePlace(OLD);
      const { file, kept } = place;
      let after = "";
      const actOnceKept = async () => {
        await until(() => kept() >= HALF);
        act(place);
        after = describeFile(file);
      };
      using origin = scripted((WHEN[when] ?? (() => []))(actOnceKept, place));
      const { exitCode, stderr } = await save(place, origin.url, "--retry", "1");
      expect([EXIT_CODES.ok, EXIT_CODES.write]).toContain(exitCode as 0);
      if (exitCode === EXIT_CODES.ok) expect(readFileSync(file).equals(CONTENT)).toBeTrue();
      else {
        expect(stderr).toMatch(ONE_LINE);
        expect(describeFile(file)).toBe(after);
      }
      // What was moved away is as whole.
      const moved = join(place.top, "folder.moved", "file");
      if (existsSync(moved)) expect([OLD, CONTENT.toString()]).toContain(readFileSync(moved, "latin1"));
    });
  });

  test.concurrent("a part that has grown beyond the end is of no use: no line says to go on from it", async () => {
    await using place = await makePlace(OLD);
    const grow = async () => {
      await until(() => place.kept() >= HALF);
      appendFileSync(place.part(), CONTENT);
    };
    using origin = scripted([pausing(serving({ cut: HALF + 1 }), HALF, grow)]);
    const argv = [...(await command("client-robust", "binary")), "-o", place.file, "--retry", "0", origin.url];
    const { exitCode, stderr } = await run(argv);
    expect(exitCode).toBe(EXIT_CODES.partial);
    expect(stderr).toMatch(ONE_LINE);
    expect([place.text(), place.names()]).toEqual([OLD, ["file"]]);
  });

  test.concurrent.each(ACTIONS.slice(0, 15))("%s before a run that goes on: it gets the whole", async (name, act) => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place);
    act(place);
    origin.answerAnew(serving());
    // Only the digest can tell that these are not the bytes that were kept.
    const { exitCode, stderr } = await save(place, origin.url, ...SHA256);
    if (name === "the folder is removed") {
      expect([exitCode, origin.requests]).toEqual([EXIT_CODES.write, []]);
      expect(stderr).toMatch(ONE_LINE);
    } else {
      expect([exitCode, stderr, place.isWhole()]).toEqual([EXIT_CODES.ok, "", true]);
    }
  });

  test.concurrent("the folder that a relative FILE is in is removed: one line, exit 23", async () => {
    await using place = await makePlace();
    const { folder, kept } = place;
    using origin = scripted([pausing(serving(), HALF, () => until(() => kept() >= HALF).then(() => remove(folder)))]);
    const argv = [...(await command("client-robust", "binary")), "-s", "-o", "file", origin.url];
    const { exitCode, stderr } = await run(argv, { cwd: folder });
    expect(exitCode).toBe(EXIT_CODES.write);
    expect(stderr).toMatch(ONE_LINE);
  });

  test.concurrent("what FILE links to vanishes: FILE is whole, or there is one line of error", async () => {
    for (const vanishes of ["target", "."]) {
      await using place = await makePlace();
      await using elsewhere = await makePlace();
      symlinkSync(join(elsewhere.folder, "target"), place.file);
      writeFileSync(join(elsewhere.folder, "target"), OLD);
      const isHalf = () =>
        [...place.beside(), ...elsewhere.beside()].some(
          (path) => !path.endsWith("target") && lstatSync(path).size >= HALF,
        );
      const act = () => until(isHalf).then(() => remove(join(elsewhere.folder, vanishes)));
      using origin = scripted([pausing(serving(), HALF, act)]);
      const { exitCode, stderr } = await save(place, origin.url);
      expect([EXIT_CODES.ok, EXIT_CODES.write]).toContain(exitCode as 0);
      if (exitCode === EXIT_CODES.ok) expect(place.isWhole()).toBeTrue();
      else expect(stderr).toMatch(ONE_LINE);
    }
  });

  test.concurrent.each(ACTIONS)(
    "%s, then Ctrl-C: it ends at once, and tells of nothing that is not there",
    async (_, act) => {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ cut: HALF, end: "stall" })]);
      await using client = await launch(place, [origin.url]);
      await until(() => place.kept() >= HALF);
      act(place);
      client.child.kill("SIGINT");
      const { signalCode, stderr } = await client.ended();
      expect(signalCode).toBe("SIGINT");
      expect(stderr).toMatch(/^([^\n]+\n)?$/);
      for (const word of stderr.split(/[\s:,]+/).filter((word) => word.startsWith(place.top) && word !== place.file))
        expect([word, existsSync(word)]).toEqual([word, true]);
    },
  );
});

describe("--sha256", () => {
  const WRONG = ["--sha256", "0".repeat(64)];

  test.concurrent("an existing FILE that has the digest is done without a request", async () => {
    for (const isLink of [false, true]) {
      await using place = await makePlace();
      const target = join(place.folder, "target");
      if (isLink) symlinkSync("target", place.file);
      writeFileSync(isLink ? target : place.file, CONTENT);
      const before = lstatSync(isLink ? target : place.file);
      using origin = scripted([serving({ content: OTHER })]);
      for (const digest of [sha256(CONTENT), sha256(CONTENT).toUpperCase()]) {
        const { exitCode, stderr } = await save(place, origin.url, "--sha256", digest);
        expect([exitCode, stderr, origin.requests]).toEqual([EXIT_CODES.ok, "", []]);
      }
      const { ino, mtimeMs } = lstatSync(isLink ? target : place.file);
      expect([ino, mtimeMs]).toEqual([before.ino, before.mtimeMs]);
    }
  });

  test.concurrent("a FILE that takes long to read does not keep --max-time waiting", async () => {
    await using place = await makePlace(OLD);
    truncateSync(place.file, 2 ** 33); // all of it a hole: the disk never has to be waited for
    using origin = scripted([serving()]);
    expect((await save(place, origin.url, ...SHA256, "--max-time", "1")).exitCode).toBe(EXIT_CODES.timeout);
    expect(origin.requests).toEqual([]);
  });

  test.concurrent("a FILE is a file, whatever its name looks like", async () => {
    await using place = await makePlace();
    for (const scheme of ["s3:", "file:", "http:"]) {
      mkdirSync(join(place.folder, scheme, "b"), { recursive: true });
      writeFileSync(join(place.folder, scheme, "b", "file"), CONTENT);
      const argv = [...(await command("client-robust", "binary")), ...SHA256, "-o", `${scheme}//b/file`];
      expect((await run([...argv, "http://localhost:1"], { cwd: place.folder })).exitCode).toBe(EXIT_CODES.ok);
      using origin = scripted([serving()]); // and so is the content to send
      writeFileSync(join(place.folder, scheme, "b", "file"), "data");
      const sent = [...(await command("client-robust", "binary")), "-d", `@${scheme}//b/file`, origin.url];
      expect((await run(sent, { cwd: place.folder })).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map((request) => request.slice(-8))).toEqual(["\r\n\r\ndata"]);
    }
  });

  test.concurrent("an existing FILE that has not is fetched", async () => {
    for (const old of [
      CONTENT.subarray(1),
      CONTENT.subarray(0, -1),
      Buffer.concat([CONTENT, CONTENT]),
      Buffer.alloc(0),
    ]) {
      await using place = await makePlace();
      writeFileSync(place.file, old);
      using origin = scripted([serving()]);
      expect((await save(place, origin.url, ...SHA256)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.length).toBe(1);
      expectWhole(place);
    }
  });

  test.concurrent("goes on whatever validators there are, within a run and in a later one", async () => {
    for (const [etag, fields] of [
      ["", ""],
      ['W/"a"', ""],
      ["", "Last-Modified: Sun, 22 Nov 2026 12:00:00 GMT\r\n"],
    ] as const) {
      await using place = await makePlace(OLD);
      const cut = serving({ etag, fields, cut: HALF });
      using origin = await keepHalf(place, cut, ...SHA256);
      origin.answerAnew(cut, serving({ etag, fields }));
      expect((await save(place, origin.url, ...SHA256)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([HALF, 2 * HALF]);
      expectWhole(place);
    }
  });

  test.concurrent("without it what has no validator is not gone on with", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place, serving({ etag: "", cut: HALF }), ...SHA256);
    origin.answerAnew(serving({ etag: "", content: OTHER }));
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(rangeOf(origin.requests[0])).toBeUndefined();
    expectWhole(place, OTHER);
  });

  test.concurrent("what is kept of another digest is not gone on with", async () => {
    await using place = await makePlace(OLD);
    using origin = await keepHalf(place, serving({ etag: "", content: OTHER, cut: HALF }), "--sha256", sha256(OTHER));
    origin.answerAnew(serving({ etag: "" }));
    expect((await save(place, origin.url, ...SHA256)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([undefined]);
    expectWhole(place);
  });

  test.concurrent("a wrong digest of one response is one request", async () => {
    for (const etag of ['"a"', "", 'W/"a"']) {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ etag })]);
      const { exitCode, stderr } = await save(place, origin.url, ...WRONG);
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.digest, 1]);
      expect(stderr).toMatch(ONE_LINE);
      expect([place.names(), place.text()]).toEqual([["file"], OLD]);
    }
  });

  test.concurrent("a wrong digest of joined pieces is one more request, for the whole", async () => {
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF }), serving()]);
    const { exitCode, stderr } = await save(place, origin.url, ...WRONG);
    expect([exitCode, ...origin.requests.map(rangeOf)]).toEqual([EXIT_CODES.digest, undefined, HALF, undefined]);
    expect(stderr).toMatch(ONE_LINE);
    expect([place.names(), place.text()]).toEqual([["file"], OLD]);
    // Also where the first piece is of an earlier run.
    using another = await keepHalf(place);
    another.answerAnew(serving());
    expect((await save(place, another.url, ...WRONG)).exitCode).toBe(EXIT_CODES.digest);
    expect(another.requests.map(rangeOf)).toEqual([HALF, undefined]);
    expect([place.names(), place.text()]).toEqual([["file"], OLD]);
  });

  test.concurrent("a wrong digest of pieces that come again and again ends, too", async () => {
    await using place = await makePlace(OLD);
    const cuts = [...[1000, 2000, 3000].map((cut) => serving({ cut })), serving()];
    using origin = scripted([...cuts, ...cuts, ...cuts]);
    const args = [...WRONG, "--retry", "3", "--retry-delay", "0.01"];
    expect((await save(place, origin.url, ...args)).exitCode).toBe(EXIT_CODES.partial);
    expect(origin.requests.length).toBe(6);
  });

  test.concurrent("pieces of two versions that have one tag are found out, and the whole is fetched", async () => {
    for (const [etag, args] of [
      ['"a"', SHA256],
      ["", SHA256],
    ] as const) {
      await using place = await makePlace(OLD);
      using origin = await keepHalf(place, serving({ etag, content: OTHER, cut: HALF }), ...args);
      origin.answerAnew(serving({ etag }));
      expect((await save(place, origin.url, ...args)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([HALF, undefined]);
      expectWhole(place);
    }
  });

  test.concurrent("on stdout a wrong digest is a failure too", async () => {
    using origin = scripted([serving()]);
    const { exitCode } = await runProgram("client-robust", "binary", ["-s", "-o", "-", ...WRONG, origin.url]);
    expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.digest, 1]);
  });

  test.concurrent("a 204 or 304 has no content that the digest in its head could be of", async () => {
    for (const status of ["204 No Content", "304 Not Modified"]) {
      using origin = scripted([response(status, "", reprDigest(CONTENT).trimEnd())]);
      const { stdout, exitCode } = await runProgram("client-robust", "binary", ["-X", "PUT", origin.url]);
      expect([stdout.split("\r\n", 1)[0], exitCode]).toEqual([`HTTP/1.1 ${status}`, EXIT_CODES.ok]);
    }
    // Content that is empty does not match.
    using origin = scripted([response("200 OK", "", reprDigest(CONTENT).trimEnd())]);
    const { exitCode } = await runProgram("client-robust", "binary", ["--retry", "0", origin.url]);
    expect(exitCode).toBe(EXIT_CODES.digest);
  });

  test.concurrent("the last line of -v says whether the content is verified", async () => {
    await using place = await makePlace();
    using origin = scripted([serving()]);
    const last = async (...args: string[]) =>
      (await run([...(await command("client-robust", "binary")), "-v", "-o", place.file, ...args, origin.url])).stderr
        .trimEnd()
        .split("\n")
        .at(-1);
    expect(await last()).toMatch(/not verified/);
    rmSync(place.file);
    expect(await last(...SHA256)).toMatch(/^(?!.*not).*verified/);
    origin.answerAnew(serving({ fields: reprDigest(CONTENT) }));
    expect(await last()).toMatch(/^(?!.*not).*verified/);
    // A digest that comes with the head alone is that of content that nobody has seen.
    const { stderr } = await run([...(await command("client-robust", "binary")), "-v", "-I", origin.url]);
    expect(stderr).toMatch(/Repr-Digest[^]*, not verified\n$/);
  });

  test.concurrent("on a terminal one line is left, and it says so too", async () => {
    await using place = await makePlace();
    using origin = scripted([pausing(serving(), HALF, () => Bun.sleep(1500))]);
    const argv = [...(await command("client-robust", "binary")), "-o", place.file, ...SHA256, origin.url];
    const { stdout } = await run(["script", "-qec", argv.join(" "), "/dev/null"]);
    const lines = stdout
      .replaceAll(/\r?\n/g, "\n")
      .split("\n")
      .filter((line) => line !== "");
    expect(lines.length).toBe(1);
    const shown = lines[0]?.split("\r").at(-1) ?? "";
    expect(shown).toMatch(/23\.3 KiB.*verified/);
    expectWhole(place);
  });
});

test.concurrent.each(["-o -", ""])("content that is shown on a terminal is not overwritten: %s", async (args) => {
  const content = Buffer.from(CONTENT.subarray(0, -1)); // its last line has no end
  using origin = scripted([pausing(serving({ content }), HALF - 1, () => Bun.sleep(2500))]); // inside a line
  const seen = async (...more: string[]) => {
    const argv = [...(await command("client-robust", "binary")), ...args.split(" "), ...more, origin.url];
    return (await run(["script", "-qec", argv.join(" "), "/dev/null"])).stdout.replaceAll("\r\n", "\n");
  };
  expect(await seen()).toEndWith(content.toString());
  expect(await seen("-v")).toMatch(/\n4998\n4999\n23\.3 KiB in .*, not verified\n$/);
  expect(await seen("--max-time", "1")).toMatch(/\n\d+\nError: not done within 1 s\n$/);
});

describe("how a run ends", () => {
  test.concurrent.each(["-o -", "", "-o /dev/stdout"])("closed stdout is exit 23: %s", async (args) => {
    using origin = scripted([serving()]);
    const argv = [...(await command("client-robust", "binary")), ...args.split(" ").filter(Boolean), origin.url];
    const { exitCode, stderr } = await run(["bash", "-c", 'exec "$@" >&-', "bash", ...argv]);
    expect([args, exitCode]).toEqual([args, EXIT_CODES.write]);
    expect(stderr).toMatch(ONE_LINE);
    for (const sink of ["/dev/null", "&2"])
      expect((await run(["bash", "-c", `exec "$@" >${sink}`, "bash", ...argv])).exitCode).toBe(EXIT_CODES.ok);
  });

  test.concurrent("a FILE does not take the place of what is closed", async () => {
    for (const closed of [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">&- 2>&-"]) {
      for (const [script, code] of [
        [[serving()], EXIT_CODES.ok],
        [[serving({ cut: HALF }), serving()], EXIT_CODES.ok],
        [[response("404 No")], EXIT_CODES.status],
      ] as const) {
        await using place = await makePlace(OLD);
        using origin = scripted([...script]);
        const argv = [...(await command("client-robust", "binary")), "-v", "-o", place.file, origin.url];
        const { exitCode } = await run(["bash", "-c", `exec "$@" ${closed}`, "bash", ...argv]);
        expect([closed, exitCode]).toEqual([closed, code]);
        if (code === EXIT_CODES.ok) expectWhole(place);
        else expect([place.names(), place.text()]).toEqual([["file"], OLD]);
      }
    }
  });

  const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] as const;
  test.concurrent.each(SIGNALS)("dies of %s, and all is kept", async (signal) => {
    await using place = await makePlace(OLD);
    using origin = scripted([serving({ cut: HALF, end: "stall" })]);
    await using client = await launch(place, [origin.url]);
    await until(() => place.kept() === HALF);
    client.child.kill(signal);
    const { signalCode, stderr } = await client.ended();
    expect([signalCode, place.kept(), place.text()]).toEqual([signal, HALF, OLD]);
    if (signal === "SIGINT" || signal === "SIGTERM") {
      expect(stderr).toMatch(/^[^\n]+\n$/);
      expect(stderr).toContain(place.part());
    }
    origin.answerAnew(serving());
    expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    expect(origin.requests.map(rangeOf)).toEqual([HALF]);
    expectWhole(place);
  });

  test.concurrent.each(["SIGINT", "SIGTERM"] as const)(
    "dies of %s at any time, and leaves nothing that is empty",
    async (signal) => {
      const times: [when: string, script: Script, isThen: (stderr: string, requests: string[]) => boolean][] = [
        ["before the head", raw("", "stall"), (_, requests) => requests.length === 1],
        ["in the head", raw("HTTP/1.1 200 OK\r\n", "stall"), (_, requests) => requests.length === 1],
        [
          "before content",
          raw('HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: 9\r\n\r\n', "stall"),
          (text) => text.includes("< "),
        ],
        ["between attempts", raw("HTTP/1.1 503 Busy\r\nRetry-After: 60\r\n\r\n"), (text) => text.includes("Retry")],
      ];
      for (const [when, script, isThen] of times) {
        await using place = await makePlace(OLD);
        using origin = scripted([script]);
        const argv = [...(await command("client-robust", "binary")), "-v", "-o", place.file, origin.url];
        await using child = Bun.spawn(argv, { stdio: ["ignore", "ignore", "pipe"] });
        const stderr = new Transcript(child.stderr);
        await until(() => isThen(stderr.text, origin.requests));
        child.kill(signal);
        await child.exited;
        expect([when, child.signalCode, place.names(), place.text()]).toEqual([when, signal, ["file"], OLD]);
      }
    },
  );

  test.concurrent.each(["SIGINT", "SIGTERM"] as const)(
    "dies of %s, and what nothing can vouch for goes",
    async (signal) => {
      await using place = await makePlace(OLD);
      using origin = scripted([serving({ etag: "", cut: HALF, end: "stall" })]);
      await using client = await launch(place, [origin.url]);
      await until(() => place.kept() === HALF);
      client.child.kill(signal);
      expect((await client.ended()).signalCode).toBe(signal);
      expect([place.names(), place.text()]).toEqual([["file"], OLD]);
    },
  );

  test.concurrent.each(["-o -", "-o file", "-o /dev/null", ""])(
    "Ctrl-C ends a loop of the shell too: %j",
    async (args) => {
      await using folder = await temporaryFolder();
      using origin = scripted([serving({ cut: HALF, end: "stall" })]);
      const argv = [...(await command("client-robust", "binary")), ...args.split(" ").filter(Boolean), origin.url];
      const code = 'for i in 1 2 3; do "$@"; echo "ended $?"; done';
      // A group of its own, as a terminal gives to what it runs: Ctrl-C is for all of them.
      await using shell = Bun.spawn(["setsid", "bash", "-c", code, "bash", ...argv], {
        cwd: folder.path,
        stdio: ["ignore", "pipe", "ignore"],
      });
      const stdout = new Transcript(shell.stdout);
      await until(() => origin.requests.length === 1);
      if (args === "-o file") await until(() => readdirSync(folder.path).length > 0);
      process.kill(-shell.pid, "SIGINT");
      await shell.exited;
      expect([shell.signalCode, origin.requests.length]).toEqual(["SIGINT", 1]);
      expect(stdout.text).not.toContain("ended");
    },
  );

  test.concurrent("where SIGINT is ignored it goes on, or ends; FILE is whole or as it was", async () => {
    await using place = await makePlace(OLD);
    let kill = () => {};
    const interrupt = () => until(() => place.kept() >= HALF).then(() => kill());
    using origin = scripted([pausing(serving(), HALF, interrupt)]);
    await using client = await launch(place, ["-s", origin.url], ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]);
    kill = () => client.child.kill("SIGINT");
    const { exitCode } = await client.ended();
    if (exitCode === EXIT_CODES.ok) expectWhole(place);
    else expect(place.text()).toBe(OLD);
  });

  test.concurrent("says that it starts over, and why", async () => {
    await using place = await makePlace();
    using origin = scripted([serving({ cut: HALF }), serving({ etag: '"b"', content: OTHER })]);
    const argv = [...(await command("client-robust", "binary")), "-o", place.file, origin.url];
    expect((await run(argv)).stderr).toMatch(/changed/);
    expectWhole(place, OTHER);
  });
});

// ── every system call in turn ──

/** A system call on something in the folder of FILE: the n-th of its name that its thread makes. */
interface Call {
  readonly name: string;
  readonly nth: number;
  readonly line: string;
}

/** Reads what `strace -f -y` has written. */
function readCalls(trace: string, folder: string): Call[] {
  const counts = new Map<string, number>();
  const calls: Call[] = [];
  for (const line of readFileSync(trace, "latin1").split("\n")) {
    const [, thread, name = ""] = /^(\d+) +(\w+)\(/.exec(line) ?? [];
    if (thread === undefined) continue;
    const nth = (counts.get(`${thread} ${name}`) ?? 0) + 1;
    counts.set(`${thread} ${name}`, nth);
    if (line.includes(folder) && name !== "execve") calls.push({ name, nth, line });
  }
  return calls;
}

/** These change nothing on the disk: before the next one that does all is as it was after the last one. */
const CHANGES_NOTHING =
  /^(p?readv?|pread64|.*stat.*|f?access.*|readlink.*|getdents.*|lseek|close|fcntl|flock|getcwd|mmap|ioctl)$/;
const changes = ({ name, line }: Call) =>
  !CHANGES_NOTHING.test(name) && !(/^open/.test(name) && !/O_CREAT|O_TRUNC/.test(line));

/** Runs the client into FILE under strace, which may put a fault into one of its system calls. */
async function traced(place: Place, url: string, inject: string[] = [], ...args: string[]) {
  const trace = join(place.top, "trace");
  const strace = ["strace", "-f", "-qq", "-y", "-o", trace, "-e", "trace=%file,%desc,exit_group"];
  const argv = [
    ...strace,
    ...inject,
    ...(await command("client-robust", "binary")),
    "-s",
    "-o",
    place.file,
    ...args,
    url,
  ];
  const child = Bun.spawn(argv, { stdio: ["ignore", "ignore", "pipe"] });
  await using _ = child;
  const stderr = await new Response(child.stderr).text();
  await child.exited;
  return { exitCode: child.exitCode, signalCode: child.signalCode, stderr, calls: readCalls(trace, place.folder) };
}

const BLOCKS = new Random(1).bytes(65_536);
const NEW_BLOCKS = new Random(2).bytes(50_000);
const KEPT_BLOCKS = 32_768;

/** What a run finds, and what it gets. */
const SITUATIONS: [name: string, prepare: (place: Place) => Promise<ReturnType<typeof scripted>>, content: Buffer][] =
  [];
const situation = (name: string, isResumed: boolean, prepare: (place: Place) => void, content = BLOCKS) =>
  SITUATIONS.push([
    name,
    async (place) => {
      prepare(place);
      const origin = scripted([serving({ content: BLOCKS, cut: KEPT_BLOCKS })]);
      if (isResumed) await save(place, origin.url, "--retry", "0");
      origin.answerAnew(serving({ content, etag: content === BLOCKS ? '"a"' : '"b"' }));
      return origin;
    },
    content,
  ]);
const writeOld = ({ file }: Place) => {
  writeFileSync(file, OLD);
  chmodSync(file, 0o600);
};
situation("a new FILE", false, () => {});
situation("a FILE that is replaced", false, writeOld);
situation("a new FILE of which half is kept", true, () => {});
situation("a FILE that is replaced, of which half is kept", true, writeOld);
situation("a FILE that is replaced, of which half of another version is kept", true, writeOld, NEW_BLOCKS);
situation("a link to nothing yet", false, ({ file }) => symlinkSync("target", file));

/** Does this with all of them, some at a time. */
async function forAll<T>(list: readonly T[], concurrent: number, work: (one: T) => Promise<void>): Promise<void> {
  const waiting = list.values();
  const worker = async () => {
    for (const one of waiting) await work(one);
  };
  await Promise.all(Array.from({ length: concurrent }, worker));
}

describe.if(hasTool("strace"))("whatever happens in any system call", () => {
  test.concurrent.each(SITUATIONS)(
    "kill -9 before and after each, %s: the next run makes it whole",
    async (_, prepare, content) => {
      await using first = await makePlace();
      using recorded = await prepare(first);
      const { exitCode, calls } = await traced(first, recorded.url);
      expect(exitCode).toBe(EXIT_CODES.ok);
      const changing = calls.filter(changes);
      expect(changing.length).toBeGreaterThan(5);
      // The end of the process comes after the last of them.
      const all = [...changing, { name: "exit_group", nth: 1, line: "" }];

      /** Kills it before the nth call of that name. @returns how many calls too early that was; below 0 for too late */
      async function kill(at: number, call: Call, nth: number): Promise<number> {
        await using place = await makePlace();
        using origin = await prepare(place);
        const [old, before] = [place.text(), place.kept()];
        const inject = ["-e", `inject=${call.name}:signal=SIGKILL:when=${nth}`];
        const killed = await traced(place, origin.url, inject);
        const made = killed.calls.filter(changes);
        if (killed.signalCode !== "SIGKILL") return -1;
        const isWhole = place.isWhole(content);
        if (!isWhole) expect([call.line, place.text()]).toEqual([call.line, old]);
        // What was kept is kept, and all that came is too.
        const kept = place.kept();
        if (!isWhole && content === BLOCKS) expect(kept).toBeGreaterThanOrEqual(before);
        const requests = origin.requests.length;
        const again = await save(place, origin.url);
        expect([call.line, again.exitCode, again.stderr]).toEqual([call.line, EXIT_CODES.ok, ""]);
        const least = isWhole || kept < 1000 || content !== BLOCKS ? undefined : kept - 1;
        if (least !== undefined)
          expect([call.line, (rangeOf(origin.requests[requests]) ?? 0) >= least]).toEqual([call.line, true]);
        expect([call.line, place.isWhole(content)]).toEqual([call.line, true]);
        const target = lstatSync(place.file).isSymbolicLink() ? ["target"] : [];
        expect([call.line, place.names()]).toEqual([call.line, ["file", ...target]]);
        // The call that it was killed in is the last one, unless that was one of another kind.
        const wanted = call.line === "" ? at : at + 1;
        return made.length === wanted && (call.line === "" || made[at]?.name === call.name)
          ? 0
          : made.length > at
            ? -1
            : 1;
      }

      // Bun starts with a few calls more or less from time to time: then it is the one before or the next one.
      await forAll([...all.entries()], 2, async ([at, call]) => {
        let { nth } = call;
        for (let attempts = 0, early = 1; early !== 0; attempts++, nth = Math.max(1, nth + early)) {
          expect([call.line, attempts < 20]).toEqual([call.line, true]);
          early = await kill(at, call, nth);
        }
      });
    },
  );

  /** Of all errors one in three, from a place that chance picks: SWEEP=1 plays all. Kills are always played all. */
  const SWEEP = Number(process.env["SWEEP"] ?? 3);
  const ERRORS = (name: string) =>
    name.startsWith("rename") ? ["EIO", "EBUSY", "EACCES"] : [name.includes("write") ? "ENOSPC" : "EIO"];

  test.concurrent.each([
    ...SITUATIONS.slice(1, 4).map((situation) => [...situation, Number.POSITIVE_INFINITY] as const),
    ...SITUATIONS.slice(1, 4).map(([name, ...more]) => [`${name}, and it breaks off`, ...more, 1000] as const),
  ])(`an error of each, %s (SEED=${SEED}): one line, or FILE is whole`, async (_, prepare, content, cut) => {
    const begin = async (place: Place) => {
      const origin = await prepare(place);
      origin.answerAnew(serving({ content, cut }));
      return origin;
    };
    const isCut = cut < content.length;
    await using first = await makePlace();
    using recorded = await begin(first);
    const { exitCode, calls } = await traced(first, recorded.url, [], "--retry", "0");
    expect(exitCode).toBe(isCut ? EXIT_CODES.partial : EXIT_CODES.ok);
    const isLast = ({ name, line }: Call) => name.startsWith("rename") && /\/file"[^"]*$/.test(line);
    const [, part = ""] = /"([^"]+)"/.exec(calls.findLast(isLast)?.line ?? "") ?? [];
    const isOfPart = ({ line }: Call) => line.includes(`<${part}>`);
    const faults = calls
      .flatMap((call) => ERRORS(call.name).map((error) => ({ call, error })))
      .filter((_, i) => i % SWEEP === SEED % SWEEP);
    await forAll(faults, 2, async ({ call, error }) => {
      await using place = await makePlace();
      using origin = await begin(place);
      const old = place.text();
      const fault = ["-e", `inject=${call.name}:error=${error}:when=${call.nth}`];
      const result = await traced(place, origin.url, fault, "--retry", "0");
      const where = `${call.line} ${error}`;
      if (result.exitCode === EXIT_CODES.ok) {
        // A copy in place of a rename is told.
        expect([where, place.isWhole(content), result.stderr]).toEqual([
          where,
          true,
          expect.stringMatching(/^([^\n]+\n)?$/),
        ]);
      } else {
        const codes = isCut ? [EXIT_CODES.write, EXIT_CODES.partial] : [EXIT_CODES.write];
        expect([where, result.exitCode, codes.includes(result.exitCode as 23)]).toEqual([where, result.exitCode, true]);
        expect([where, result.stderr]).toEqual([where, expect.stringMatching(ONE_LINE)]);
        if (!place.isWhole(content)) expect([where, place.text()]).toEqual([where, old]);
        // Nothing that is empty is kept, where it can be removed.
        const isEmpty = (path: string) => lstatSync(path).size === 0;
        if (!call.name.startsWith("unlink")) expect([where, place.beside().filter(isEmpty)]).toEqual([where, []]);
      }
      // What is not on the disk for certain is not FILE.
      const isHit = result.calls.some(({ name, line }) => name === call.name && line.includes("(INJECTED)"));
      if (isHit && isOfPart(call) && /^(write|pwrite64|f(data)?sync)$/.test(call.name))
        expect([where, result.exitCode]).toEqual([where, EXIT_CODES.write]);
      origin.answerAnew(serving({ content }));
      const again = await save(place, origin.url);
      expect([where, again.exitCode, again.stderr, place.isWhole(content)]).toEqual([where, EXIT_CODES.ok, "", true]);
      expect([where, place.names()]).toEqual([where, ["file"]]);
    });
  });
});

// ── two at once ──

const RUNS = Number(process.env["RUNS"] ?? 20);

const NAMESPACE = [
  ...(isRoot ? ["unshare"] : ["unshare", "--map-root-user"]),
  "--pid",
  "--fork",
  "--mount-proc",
  "--kill-child",
];
const hasNamespaces = Bun.spawnSync([...NAMESPACE, "true"]).success;

/** What one of two processes meets, all from chance. */
function makePlan(random: Random, version: number, etag: string, content: Buffer) {
  const answers = Array.from({ length: 4 }, (_, n) => ({
    pieceBytes: random.below(content.length),
    pauseMs: random.below(20),
    cut: n < 3 && random.once(3) ? random.below(content.length) : Number.POSITIVE_INFINITY,
    end: random.pick(["fin", "reset"] as const),
  }));
  const killedAfterMs = random.once(5) ? 20 + random.below(50) : undefined;
  return {
    version,
    etag,
    content,
    startsAfterMs: random.below(30),
    killedAfterMs,
    answers,
    ...{ isVerified: random.once(3) },
  };
}
type Plan = ReturnType<typeof makePlan>;

/** Answers each process as its plan says, by the field that tells them apart. */
function planned(plans: Plan[]): Script {
  const counts = plans.map(() => 0);
  return (request) => {
    const n = Number(/\r\nX-Process: (\d)\r\n/.exec(request)?.[1]);
    const plan = plans[n];
    const answer = plan?.answers[Math.min(3, counts[n] ?? 0)];
    counts[n] = (counts[n] ?? 0) + 1;
    if (plan === undefined || answer === undefined) return { bytes: "" };
    const { etag, content } = plan;
    const { pieceBytes, pauseMs, cut, end } = answer;
    return pausing(serving({ etag, content, cut, end }), pieceBytes, () => Bun.sleep(pauseMs))(request);
  };
}

describe("two processes and one FILE", () => {
  async function race(random: Random, prefix: string[]): Promise<void> {
    const versions = [CONTENT, random.pick([OTHER, OTHER.subarray(0, HALF), CONTENT, Buffer.concat([OTHER, OTHER])])];
    const isTagged = !random.once(4);
    const old = random.pick([OLD, undefined]);
    const plans = versions.map((content, n) => makePlan(random, n, isTagged ? `"${sha256(content)}"` : "", content));
    const told = JSON.stringify({
      old,
      prefix: prefix[0],
      plans: plans.map(({ content, ...plan }) => [content.length, plan]),
    });
    await using place = await makePlace(old);
    using origin = scripted([planned(plans)]);
    const play = async ({ version, content, startsAfterMs, killedAfterMs, isVerified }: Plan) => {
      await Bun.sleep(startsAfterMs);
      const args = [
        "-s",
        "--retry",
        "8",
        "-H",
        `X-Process: ${version}`,
        ...(isVerified ? ["--sha256", sha256(content)] : []),
      ];
      await using client = await launch(place, [...args, origin.url], prefix);
      const timer = setTimeout(() => client.child.kill("SIGKILL"), killedAfterMs ?? 2 ** 30);
      const result = await client.ended();
      clearTimeout(timer);
      return { ...result, content };
    };
    const allowed = [...versions.map(String), old];
    let isOver = false;
    const watch = async () => {
      for (; !isOver; await Bun.sleep(1))
        if (!allowed.includes(place.text())) throw new Error(`FILE is mixed: ${told}`);
    };
    const [results] = await Promise.all([Promise.all(plans.map(play)).finally(() => (isOver = true)), watch()]);
    for (const { exitCode, signalCode, stderr } of results) {
      if (exitCode === EXIT_CODES.ok || signalCode === "SIGKILL") continue;
      expect([told, exitCode, stderr]).toEqual([told, EXIT_CODES.write, expect.stringMatching(ONE_LINE)]);
    }
    const good = results.filter(({ exitCode, signalCode }) => exitCode === EXIT_CODES.ok || signalCode === "SIGKILL");
    expect([told, good.length > 0]).toEqual([told, true]);
    expect([
      told,
      [
        ...good.map(({ content }) => String(content)),
        ...(results.some(({ signalCode }) => signalCode !== null) ? [old] : []),
      ].includes(place.text()),
    ]).toEqual([told, true]);
    if (results.every(({ exitCode }) => exitCode === EXIT_CODES.ok))
      expect([told, place.names()]).toEqual([told, ["file"]]);
    // Whatever they have left, another run makes of it what is right.
    const [, last = CONTENT] = versions;
    origin.answerAnew(serving({ content: last, etag: isTagged ? `"${sha256(last)}"` : "" }));
    const { exitCode, stderr } = await save(place, origin.url);
    expect([told, exitCode, stderr]).toEqual([told, EXIT_CODES.ok, ""]);
    expect([told, place.names(), place.isWhole(last)]).toEqual([told, ["file"], true]);
  }

  const spaces = [
    ["one PID namespace", []],
    ...(hasNamespaces ? [["two PID namespaces", NAMESPACE] as const] : []),
  ] as const;
  test.concurrent.each(spaces)(
    `${RUNS} random timings in %s (SEED=${SEED}): FILE is always one whole version`,
    async (_, prefix) => {
      const seeds = Array.from({ length: RUNS }, (_, run) => SEED * 1000 + run);
      await forAll(seeds, 4, (seed) => race(new Random(seed), [...prefix]));
    },
    30_000 + RUNS * 1000,
  );

  // Both are stopped inside the content, and go on in one order or the other.
  const ORDERS = [
    [0, 1],
    [1, 0],
  ] as const;
  test.concurrent.each(
    spaces.flatMap(([space, prefix]) =>
      ORDERS.flatMap((order) =>
        [true, false].map(
          (isSame) => [isSame ? "one version" : "two versions", `${order}`, space, isSame, order, prefix] as const,
        ),
      ),
    ),
  )(
    "%s, in the order %s, in %s: FILE is whole, and the last run leaves nothing",
    async (_name, _order, _space, isSame, order, prefix) => {
      await using place = await makePlace(OLD);
      const contents = [CONTENT, isSame ? CONTENT : OTHER];
      const gates = [0, 1].map(() => Promise.withResolvers<void>());
      const stopped = [0, 1].map(() => Promise.withResolvers<void>());
      const script: Script = (request) => {
        const n = Number(/\r\nX-Process: (\d)\r\n/.exec(request)?.[1]);
        const content = contents[n] ?? CONTENT;
        const pause = () => {
          stopped[n]?.resolve();
          return gates[n]?.promise;
        };
        return pausing(serving({ content, etag: `"${sha256(content)}"` }), 5000 + n * 1000, pause)(request);
      };
      using origin = scripted([script]);
      const clients = [];
      for (const n of [0, 1]) {
        const before = place.kept();
        const client = await launch(place, ["-s", "-H", `X-Process: ${n}`, origin.url], [...prefix]);
        clients.push(client);
        await Promise.race([stopped[n]?.promise, client.child.exited]);
        if (n === 0) await until(() => place.kept() > before);
      }
      const results = [];
      for (const n of order) {
        gates[n]?.resolve();
        const client = clients[n];
        if (client === undefined) throw new Error("two were started");
        await using _ = client;
        const { exitCode, stderr } = await client.ended();
        results.push({ exitCode, content: contents[n] });
        if (exitCode !== EXIT_CODES.ok)
          expect([exitCode, stderr]).toEqual([EXIT_CODES.write, expect.stringMatching(ONE_LINE)]);
        const whole = contents.some((content) => place.isWhole(content));
        expect(whole || place.text() === OLD).toBeTrue();
      }
      // What began after the run that is done is not that run's to remove.
      if (!isSame && order[0] === 0)
        expect(results.map(({ exitCode }) => exitCode)).toEqual([EXIT_CODES.ok, EXIT_CODES.ok]);
      const last = results.findLast(({ exitCode }) => exitCode === EXIT_CODES.ok);
      expect(last?.content?.toString()).toBe(place.text());
      origin.answerAnew(serving({ etag: '"c"' }));
      expect((await save(place, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expectWhole(place);
    },
  );
});

describe("a run whose part another run has taken over", () => {
  /** The first run has half of the content, the second has taken that over and waits inside its answer. */
  async function makePair(place: Place, ...args: string[]) {
    const gates = [Promise.withResolvers<void>(), Promise.withResolvers<void>()] as const;
    const [first, second] = [
      pausing(serving(), HALF, () => gates[0].promise),
      pausing(serving(), 100, () => gates[1].promise),
    ];
    const origin = scripted([first, second]);
    const older = await launch(place, ["-s", ...args, origin.url]);
    await until(() => place.kept() === HALF);
    const newer = await launch(place, ["-s", origin.url]);
    await until(() => place.kept() > HALF);
    return { origin, older, newer, goOn: (run: 0 | 1) => gates[run].resolve() };
  }

  /** Writes to it, as far as its time tells: a process of its own, which no other test holds up. */
  const touch = (path: string) => Bun.spawn(mortal(["bash", "-c", 'while touch -c "$0"; do sleep 0.05; done', path]));

  test.concurrent.each(["SIGKILL", "SIGTERM"] as const)(
    "takes it back if that run dies of %s, and loses nothing",
    async (signal) => {
      await using place = await makePlace(OLD);
      const { origin, older, newer, goOn } = await makePair(place);
      using _origin = origin;
      await using _newer = newer;
      await using _older = older;
      newer.child.kill(signal);
      await newer.ended();
      goOn(0);
      const { exitCode, stderr } = await older.ended();
      expect([exitCode, stderr, origin.requests.length]).toEqual([EXIT_CODES.ok, "", 2]);
      expectWhole(place);
    },
  );

  test.concurrent("takes it back even if that run dies later", async () => {
    await using place = await makePlace(OLD);
    const { origin, older, newer, goOn } = await makePair(place);
    using _origin = origin;
    await using _newer = newer;
    await using _older = older;
    const writing = touch(place.part());
    await using _writing = writing;
    goOn(0);
    await Bun.sleep(1500); // longer than a part may be idle
    expect(older.child.exitCode).toBeNull();
    newer.child.kill("SIGKILL");
    writing.kill();
    expect((await older.ended()).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
  });

  test.concurrent("leaves it alone as long as that run writes, and says why it ends", async () => {
    await using place = await makePlace(OLD);
    const { origin, older, newer, goOn } = await makePair(place, "--stall-timeout", "2");
    using _origin = origin;
    await using _newer = newer;
    await using _older = older;
    const writing = touch(place.part());
    await using _writing = writing;
    goOn(0);
    const { exitCode, stderr } = await older.ended();
    expect([exitCode, place.text()]).toEqual([EXIT_CODES.write, OLD]);
    expect(stderr).toMatch(/^Error: [^\n]+ is gone: another run has taken it over[^\n]*\n$/);
    goOn(1);
    expect((await newer.ended()).exitCode).toBe(EXIT_CODES.ok);
    expectWhole(place);
  });

  test.concurrent("leaves it alone with --sha256, as that run may have joined other bytes", async () => {
    await using place = await makePlace(OLD);
    const steps = Array.from({ length: 3 }, () => Promise.withResolvers<void>());
    const all = Buffer.from(serving()("").bytes);
    const [half, more] = [all.length - CONTENT.length + HALF, all.length - CONTENT.length + HALF + 1000];
    const last: Answer = { bytes: all.subarray(half, more), pause: () => steps[2]?.promise, rest: all.subarray(more) };
    // The second run asks for what follows the first half. Before it gets that, the first one writes more.
    using origin = scripted([
      () => ({ bytes: all.subarray(0, half), pause: () => steps[0]?.promise, rest: last }),
      pausing(serving({ etag: "", content: OTHER, cut: 2000, end: "stall" }), 0, () => steps[1]?.promise),
    ]);
    const args = ["-s", "--retry", "0", ...SHA256, origin.url];
    await using older = await launch(place, args);
    await until(() => place.kept() === HALF);
    await using newer = await launch(place, args);
    await until(() => origin.requests.length === 2);
    steps[0]?.resolve();
    await until(() => place.kept() === HALF + 1000);
    steps[1]?.resolve();
    await until(() => place.kept() === HALF + 2000);
    newer.child.kill("SIGKILL");
    await newer.ended();
    steps[2]?.resolve();
    expect((await older.ended()).exitCode).toBe(EXIT_CODES.write);
    expect(place.text()).toBe(OLD);
  });
});

test.concurrent.each(VARIANTS)(
  "a FILE whose name is not UTF-8 is refused, and no other one written (%s)",
  async (variant) => {
    await using folder = await temporaryFolder();
    const argv = [...(await command("client-robust", variant)), "http://127.0.0.1:1/"];
    const { stderr, exitCode } = await run(["bash", "-c", `cd "$0" && "$@" -o $'sch\\xf6n'`, folder.path, ...argv]);
    expect(stderr).toBe("Error: --output takes a name in UTF-8 (see client-robust --help)\n");
    expect([exitCode, readdirSync(folder.path)]).toEqual([EXIT_CODES.usage, []]);
  },
);

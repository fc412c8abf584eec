/** What client-robust.ts does after a failure: the policy as a table, then against origins that follow a script. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  linkSync,
  lstatSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import {
  type Attempt,
  decideNext,
  EXIT_CODES,
  type Held,
  judgeHead,
  NOTHING,
  type Outcome,
  parseRetryAfter,
  type Policy,
  type ResponseHead,
  TransferError,
} from "../client-robust.ts";
import { command, run, runProgram, temporaryFolder, Transcript, VARIANTS } from "./harness.ts";
import { type Answer, CONTENT, raw, reprDigest, scripted, serving, sha256 } from "./origin.ts";

// Most of the time nothing happens here: what waits for its retry waits beside the others.
setDefaultTimeout(30_000);

// ── the policy ──

const POLICY: Policy = {
  method: "GET",
  keepsOnlyContent: true,
  canStartOver: true,
  followsRedirects: false,
  retries: 3,
  retryMaxMs: Number.POSITIVE_INFINITY,
  sizeMax: Number.POSITIVE_INFINITY,
};
const HELD: Held = { bytes: 40, etag: '"a"', total: 100 };

function head(status: number, fields: Record<string, string> = {}): ResponseHead {
  const entries = Object.entries(fields).map(([name, value]) => [name.toLowerCase(), value] as const);
  return { status, reasonPhrase: "", minorVersion: 1, fields: entries, text: "" };
}

/** A verdict in a word or two. */
function judge(response: ResponseHead, held: Held = NOTHING, policy: Partial<Policy> = {}, isLastTry = false): string {
  const verdict = judgeHead(response, held, { ...POLICY, ...policy }, isLastTry);
  switch (verdict.action) {
    case "deliver":
      return verdict.startsOver ? "start over" : `deliver from ${verdict.from}`;
    case "fail":
      return `${verdict.failure.isFinal ? "final " : ""}${verdict.failure.outcome}`;
    default:
      return verdict.action;
  }
}

const PART = { "Content-Range": "bytes 40-99/100", ETag: '"a"', "Content-Length": "60" };

describe("judgeHead", () => {
  test("delivers a whole response, and what is missing of the same version", () => {
    expect(judge(head(200))).toBe("deliver from 0");
    expect(judge(head(206, PART), HELD)).toBe("deliver from 40");
    expect(judge(head(206, { ...PART, ETag: "" }), HELD)).toBe("range"); // an empty tag is not ours
    expect(judge(head(206, { "Content-Range": PART["Content-Range"] }), HELD)).toBe("deliver from 40");
  });

  test.each([
    { ...PART, ETag: '"b"' },
    { ...PART, ETag: 'W/"a"' },
    { ...PART, "Content-Range": "bytes 41-99/100" },
    { ...PART, "Content-Range": "bytes 0-99/100" },
    { ...PART, "Content-Range": "bytes 40-98/100" }, // which is one byte less than the Content-Length
    { ...PART, "Content-Range": "bytes 40-39/100", "Content-Length": "0" },
    { ...PART, "Content-Range": "bytes 40-100/101" },
    { ...PART, "Content-Range": "bytes */100" },
    { ...PART, "Content-Range": "40-99/100" },
    { ...PART, "Content-Length": "61" },
    { "Content-Type": "multipart/byteranges; boundary=x" },
  ])("uses no part but exactly the missing one: %j", (fields) => {
    expect(judge(head(206, fields), HELD)).toBe("range");
  });

  test("asks for the last byte again where the end may have been reached, and takes that part", () => {
    const unknown = { bytes: 100, etag: '"a"', total: undefined };
    expect(judge(head(206, { "Content-Range": "bytes 99-99/100", ETag: '"a"' }), unknown)).toBe("deliver from 99");
    expect(judge(head(206, { "Content-Range": "bytes 99-99/100", ETag: '"a"' }), { ...unknown, total: 100 })).toBe(
      "deliver from 99",
    );
    expect(judge(head(206, { "Content-Range": "bytes 100-119/120", ETag: '"a"' }), unknown)).toBe("range");
  });

  test("takes no part where the whole was asked for", () => {
    expect(judge(head(206, PART))).toBe("range");
    expect(judge(head(206, PART), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0"); // printed as it is
  });

  test("takes less than it has asked for, as RFC 9110 §15.3.7 lets a server send", () => {
    expect(judge(head(206, { ...PART, "Content-Range": "bytes 40-49/100", "Content-Length": "10" }), HELD)).toBe(
      "deliver from 40",
    );
  });

  test("goes on within a 200 of the same version, and starts over within one of another", () => {
    expect(judge(head(200, { ETag: '"a"' }), HELD)).toBe("deliver from 0");
    expect(judge(head(200, { ETag: '"b"' }), HELD)).toBe("start over");
    expect(judge(head(200, { ETag: 'W/"a"' }), HELD)).toBe("start over");
    expect(judge(head(200), HELD)).toBe("start over");
    expect(judge(head(200, { ETag: '"b"' }), HELD, { canStartOver: false })).toBe("final partial");
    expect(judge(head(200, { ETag: '"a"', "Content-Length": "99" }), HELD)).toBe("start over");
  });

  test("remembers what an earlier response said of the same version", () => {
    const verdict = judgeHead(head(200, { ETag: '"a"' }), HELD, POLICY, false);
    expect(verdict).toMatchObject({ action: "deliver", held: { total: 100, bytes: 40 } });
    const fresh = judgeHead(head(200, { ETag: '"a"' }), { ...HELD, bytes: 0, etag: '"b"' }, POLICY, false);
    expect(fresh).toMatchObject({ action: "deliver", held: { total: undefined, etag: '"a"' } });
  });

  test("believes a 416 only where it names the length and the version that are held", () => {
    const whole = { bytes: 100, etag: '"a"', total: undefined };
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"a"' }), whole)).toBe("complete");
    expect(judge(head(416, { "Content-Range": "bytes */100" }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"b"' }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */101", ETag: '"a"' }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"b"' }), whole, { canStartOver: false })).toBe(
      "final partial",
    );
    expect(judge(head(416))).toBe("final status");
  });

  test("tries again what may pass, shows it at the last try, and keeps no error page as content", () => {
    expect(judge(head(503))).toBe("status");
    expect(judge(head(503), NOTHING, { keepsOnlyContent: false }, true)).toBe("deliver from 0");
    expect(judge(head(503), NOTHING, {}, true)).toBe("final status");
    expect(judge(head(404))).toBe("final status");
    expect(judge(head(404), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0");
    expect(judge(head(404), HELD, { keepsOnlyContent: false })).toBe("final status");
    expect(judge(head(301, { Location: "/" }))).toBe("final status");
    expect(judge(head(301, { Location: "/" }), NOTHING, { followsRedirects: true })).toBe("redirect");
  });

  test("refuses what is larger than wanted before it comes", () => {
    expect(judge(head(200, { "Content-Length": "101" }), NOTHING, { sizeMax: 100 })).toBe("tooLarge");
    expect(judge(head(206, PART), HELD, { sizeMax: 99 })).toBe("tooLarge");
  });
});

/** A decision in a word or two, with the longest wait that chance allows. */
function decide(
  outcome: Outcome,
  held: Held = NOTHING,
  attempt: Partial<Attempt> = {},
  policy: Partial<Policy> = {},
): string {
  const failure = attempt.failure ?? new TransferError(outcome, "");
  const all: Attempt = { failure, wasSent: true, failures: 1, outcomeBefore: "ok", elapsedMs: 0, ...attempt };
  const decision = decideNext(all, held, { ...POLICY, ...policy }, () => 1);
  if (decision.action === "give-up") return "give up";
  return `${decision.startsOver ? "start over" : "go on"} within ${decision.afterMs}`;
}

describe("decideNext", () => {
  test("asks for the next part at once where the last one was whole, as long as parts bring something", () => {
    const failure = new TransferError("partial", "", { isPart: true });
    expect(decide("partial", HELD, { failure })).toBe("go on within 0");
    expect(decide("partial", HELD, { failure, failures: 2 })).toBe("go on within 2000");
  });

  test("waits up to a second, then two, four …, and a minute at the most", () => {
    const waits = [1, 2, 3, 4, 20].map((failures) => decide("receive", NOTHING, { failures }, { retries: 99 }));
    expect(waits).toEqual([1000, 2000, 4000, 8000, 60_000].map((wait) => `go on within ${wait}`));
  });

  test("gives up what cannot pass", () => {
    for (const outcome of ["usage", "url", "resolve", "unparsable", "write", "redirects", "tooLarge"] as const)
      expect(decide(outcome)).toBe("give up");
    for (const outcome of ["connect", "partial", "timeout", "empty", "send", "receive", "status"] as const)
      expect(decide(outcome)).toBe("go on within 1000");
    expect(decide("status", NOTHING, { failure: new TransferError("status", "", { isFinal: true }) })).toBe("give up");
  });

  test("counts attempts and time, and takes Retry-After for a floor", () => {
    expect(decide("receive", NOTHING, { failures: 4 })).toBe("give up");
    expect(decide("receive", NOTHING, { elapsedMs: 500 }, { retryMaxMs: 1000 })).toBe("give up");
    const later = new TransferError("status", "", { retryAfterMs: 5000 });
    expect(decide("status", NOTHING, { failure: later })).toBe("go on within 5000");
    expect(decide("status", NOTHING, { failure: later }, { retryMaxMs: 4000 })).toBe("give up");
  });

  test("sends no request twice that is not idempotent, unless it was never sent", () => {
    expect(decide("receive", NOTHING, {}, { method: "POST" })).toBe("give up");
    expect(decide("connect", NOTHING, { wasSent: false }, { method: "POST" })).toBe("go on within 1000");
    expect(decide("receive", NOTHING, {}, { method: "PUT" })).toBe("go on within 1000");
  });

  test("starts over where nothing strong names what is held, if it can", () => {
    const nameless = { ...HELD, etag: "" };
    expect(decide("partial", HELD)).toBe("go on within 1000");
    expect(decide("partial", nameless)).toBe("start over within 1000");
    expect(decide("partial", nameless, {}, { canStartOver: false })).toBe("give up");
    expect(decide("range", HELD, { failures: 2, outcomeBefore: "partial" })).toBe("go on within 2000");
    expect(decide("range", HELD, { failures: 3, outcomeBefore: "range" })).toBe("start over within 4000");
    expect(decide("digest", HELD)).toBe("start over within 1000");
  });
});

test("Retry-After is seconds or a date, and anything else is not there", () => {
  const now = Date.parse("2026-11-22T12:00:00Z");
  const after = (value: string) => parseRetryAfter(head(503, { "Retry-After": value }), now);
  expect(after("120")).toBe(120_000);
  expect(after("Sun, 22 Nov 2026 12:00:07 GMT")).toBe(7000);
  expect(after("Sun, 22 Nov 2026 11:00:00 GMT")).toBe(0);
  for (const nonsense of ["-1", "1.5", "soon", "2026-11-22", "Sun, 22 Nov", "9".repeat(20)])
    expect(after(nonsense)).toBe(0);
});

// ── origins that follow a script ──

const SHA256 = sha256(CONTENT);
const REPR_DIGEST = reprDigest(CONTENT);

/** Whether this machine lets us have a small disk of our own; the limit on the size of a file does for the rest. */
const canMount = Bun.spawnSync([
  "unshare",
  "--map-root-user",
  "--mount",
  "mount",
  "-t",
  "tmpfs",
  "tmpfs",
  "/mnt",
]).success;

describe.each(VARIANTS)("client-robust, when things go wrong (%s)", (variant) => {
  const get = (...args: string[]) => runProgram("client-robust", variant, args);

  /** Gets the URL into a file, and says how that ended. */
  async function save(url: string, ...args: string[]) {
    await using folder = await temporaryFolder();
    const file = `${folder.path}/file`;
    const { stdout, stderr, exitCode } = await get("-o", file, ...args, url);
    expect(stdout).toBe("");
    const content = existsSync(file) ? readFileSync(file) : undefined;
    return { content, stderr, exitCode, files: readdirSync(folder.path) };
  }

  const hasRetried = (stderr: string) => stderr.split("\n").filter((line) => line.startsWith("Retry in ")).length;

  test.concurrent("goes on from where it broke off, three times over, and gets every byte once", async () => {
    using origin = scripted([serving({ cut: 9000 }), serving({ cut: 5000, end: "reset" }), serving()]);
    const { content, exitCode, stderr, files } = await save(origin.url, "--sha256", SHA256);
    expect([exitCode, content?.equals(CONTENT), files]).toEqual([0, true, ["file"]]);
    expect(hasRetried(stderr)).toBe(2);
    expect(origin.requests.map((request) => /bytes=\d+-/.exec(request)?.[0])).toEqual([
      undefined,
      "bytes=9000-",
      "bytes=14000-",
    ]);
    expect(origin.requests[1]).toContain('\r\nIf-Range: "a"\r\n');
  });

  test.concurrent("gets the rest of a part that is less than what it has asked for", async () => {
    const less = (request: string): Answer => {
      const from = Number(/bytes=(\d+)-/.exec(request)?.[1]);
      const fields = `Content-Range: bytes ${from}-${from + 99}/${CONTENT.length}\r\nETag: "a"\r\nContent-Length: 100`;
      return {
        bytes: Buffer.concat([
          Buffer.from(`HTTP/1.1 206 Partial Content\r\n${fields}\r\n\r\n`),
          CONTENT.subarray(from, from + 100),
        ]),
      };
    };
    using origin = scripted([serving({ cut: 9000 }), less, less, serving()]);
    const { content, exitCode, stderr } = await save(origin.url);
    expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
    expect(origin.requests[2]).toContain("\r\nRange: bytes=9100-\r\n");
    // Only the first response was broken; the parts were in order, and the next is asked for at once.
    expect([...stderr.matchAll(/^Retry in (\S+) s: the response is a part/gm)].map(([, wait]) => wait)).toEqual([
      "0.0",
      "0.0",
    ]);
  });

  test.concurrent(
    "a version that is shorter than it was is no version: what ends in order too soon is not the whole",
    async () => {
      const unknownLength = (bytes: number) =>
        raw(
          `HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n${bytes.toString(16)}\r\n${CONTENT.subarray(0, bytes)}\r\n`,
        );
      const ended = (bytes: number) => () => ({ bytes: `${unknownLength(bytes)("").bytes}0\r\n\r\n` });
      using origin = scripted([unknownLength(9000), ended(5000), serving()]);
      const { content, exitCode } = await save(origin.url);
      expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
    },
  );

  test.concurrent(
    "keeps what it holds when one part does not fit, and starts over when the next does not either",
    async () => {
      const fields = 'Content-Range: bytes 0-9/10\r\nETag: "a"\r\nContent-Length: 10';
      const misfit = raw(`HTTP/1.1 206 Partial Content\r\n${fields}\r\n\r\n0123456789`);
      const ranges = (requests: string[]) => requests.map((request) => /bytes=\d+-/.exec(request)?.[0]);
      using once = scripted([serving({ cut: 9000 }), misfit, serving()]);
      expect((await save(once.url)).content?.equals(CONTENT)).toBeTrue();
      expect(ranges(once.requests)).toEqual([undefined, "bytes=9000-", "bytes=9000-"]);
      using twice = scripted([serving({ cut: 9000 }), misfit, misfit, serving()]);
      expect((await save(twice.url)).content?.equals(CONTENT)).toBeTrue();
      expect(ranges(twice.requests)).toEqual([undefined, "bytes=9000-", "bytes=9000-", undefined]);
    },
  );

  test.concurrent("never mixes two versions: a changed file is fetched anew", async () => {
    const newer = Buffer.from(CONTENT.toString().toUpperCase().replaceAll("\n", ";"));
    using origin = scripted([serving({ cut: 9000 }), serving({ etag: '"b"', content: newer })]);
    const { content, exitCode } = await save(origin.url);
    expect([exitCode, content?.equals(newer)]).toEqual([0, true]);
  });

  test.concurrent("what is on stdout is continued exactly, or not at all", async () => {
    using steady = scripted([serving({ cut: 9000 }), serving()]);
    const whole = await get("-o", "-", steady.url);
    expect([whole.stdout === CONTENT.toString(), whole.exitCode]).toEqual([true, 0]);
    using changing = scripted([serving({ cut: 9000 }), serving({ etag: '"b"' })]);
    const part = await get("-o", "-", changing.url);
    expect([part.stdout.length, part.exitCode]).toEqual([9000, EXIT_CODES.partial]);
    using ignoring = scripted([serving({ cut: 9000 }), (request) => serving()(request.replace("Range", "X"))]);
    const skipped = await get("-o", "-", ignoring.url);
    expect([skipped.stdout === CONTENT.toString(), skipped.exitCode]).toEqual([true, 0]);
  });

  test.concurrent("prints one head, of the response whose content it prints", async () => {
    using origin = scripted([
      raw("HTTP/1.1 200 OK\r\nX: first\r\nContent-Length: 2\r\n\r\n"),
      raw("HTTP/1.1 200 OK\r\nX: second\r\nContent-Length: 2\r\n\r\nok"),
    ]);
    const { stdout, exitCode } = await get(origin.url);
    expect([stdout, exitCode]).toEqual(["HTTP/1.1 200 OK\r\nX: second\r\nContent-Length: 2\r\n\r\nok", 0]);
  });

  test.concurrent.each([
    ["empty", raw("")],
    ["receive", raw("", "reset")],
    ["receive", raw("HTTP/1.1 200 OK\r\nCont", "reset")],
    ["partial", raw("HTTP/1.1 200 OK\r\nCont")],
    ["partial", raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel")],
    ["timeout", raw("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", "stall")],
    ["status", raw("HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\npage")],
  ] as const)("tries again after %s, and says its code where that does not help", async (outcome, answer) => {
    const patience = ["--stall-timeout", outcome === "timeout" ? "0.5" : "20"];
    using once = scripted([answer, serving()]);
    const helped = await save(once.url, ...patience);
    expect([helped.exitCode, helped.content?.equals(CONTENT), hasRetried(helped.stderr)]).toEqual([0, true, 1]);
    using always = scripted([answer]);
    const failed = await save(always.url, ...patience, "--retry", "1", "-s");
    expect([failed.exitCode, failed.files]).toEqual([EXIT_CODES[outcome], []]);
    expect(failed.stderr).toMatch(/^Error: [^\n]+\n$/);
  });

  test.concurrent("waits as long as Retry-After says, and gives up at once where that is too long", async () => {
    const busy = (after: string) => raw(`HTTP/1.1 503 Busy\r\nRetry-After: ${after}\r\nContent-Length: 0\r\n\r\n`);
    using soon = scripted([busy("1"), serving()]);
    const start = performance.now();
    expect((await save(soon.url)).exitCode).toBe(0);
    expect(performance.now() - start).toBeGreaterThan(1000);
    using late = scripted([busy("3600"), serving()]);
    const { exitCode, stderr } = await save(late.url, "--retry-max-time", "60");
    expect([exitCode, late.requests.length]).toEqual([EXIT_CODES.status, 1]);
    expect(stderr).toBe("Error: the server answered 503 Busy (no time is left for another attempt)\n");
  });

  test.concurrent("does not send a POST twice", async () => {
    using origin = scripted([raw("")]);
    const { exitCode } = await save(origin.url, "-d", "a=1", "-d", "b=2");
    expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.empty, 1]);
    expect(origin.requests[0]).toMatch(
      /^POST \/file HTTP\/1.1\r\n[^]*Content-Type: application\/x-www-form-urlencoded\r\nContent-Length: 7\r\n[^]*\r\n\r\na=1&b=2$/,
    );
  });

  test.concurrent("a later run of the same command goes on from FILE.part; another one does not", async () => {
    await using folder = await temporaryFolder();
    const file = `${folder.path}/file`;
    using origin = scripted([serving({ cut: 9000 }), serving({ cut: 5000 }), serving()]);
    const first = await get("--retry", "0", "-o", file, origin.url);
    expect(first.stderr).toEndWith(`Kept 9000 bytes in ${file}.part: the same command goes on from there\n`);
    expect([first.exitCode, readdirSync(folder.path).toSorted()]).toEqual([
      EXIT_CODES.partial,
      ["file.part", "file.part.json"],
    ]);
    expect((await get("--retry", "0", "-o", file, `${origin.url}?other`)).exitCode).toBe(EXIT_CODES.partial);
    expect(origin.requests[1]).not.toContain("Range:");
    const last = await get("-o", file, `${origin.url}?other`);
    expect([last.exitCode, readFileSync(file).equals(CONTENT), readdirSync(folder.path)]).toEqual([0, true, ["file"]]);
    expect(origin.requests[2]).toContain("\r\nRange: bytes=5000-\r\n");
  });

  test.concurrent("Ctrl-C keeps the part and says how to go on; kill -9 loses nothing either", async () => {
    for (const [signal, exitCode] of [
      ["SIGINT", 130],
      ["SIGTERM", 143],
      ["SIGKILL", 137],
    ] as const) {
      await using folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      using origin = scripted([serving({ cut: 9000, end: "stall" }), serving()]);
      const argv = [...(await command("client-robust", variant)), "-o", file, origin.url];
      await using child = Bun.spawn(argv, { stdout: "ignore", stderr: "pipe" });
      const stderr = new Transcript(child.stderr);
      while (!existsSync(`${file}.part`) || readFileSync(`${file}.part`).length < 9000) await Bun.sleep(10);
      child.kill(signal);
      await child.exited;
      expect(child.exitCode ?? 128 + 9).toBe(exitCode);
      if (signal !== "SIGKILL") await stderr.waitFor(/Kept 9000 bytes in .*\.part/);
      expect((await get("-o", file, origin.url)).exitCode).toBe(0);
      expect(origin.requests[1]).toContain("\r\nRange: bytes=9000-\r\n");
      expect([readFileSync(file).equals(CONTENT), readdirSync(folder.path)]).toEqual([true, ["file"]]);
    }
  });

  test.concurrent("the same command twice at once: one writes, the other says so", async () => {
    await using folder = await temporaryFolder();
    const file = `${folder.path}/file`;
    using origin = scripted([serving({ cut: 9000, end: "stall" })]);
    const argv = [...(await command("client-robust", variant)), "-o", file, origin.url];
    await using child = Bun.spawn(argv, { stdout: "ignore", stderr: "ignore" });
    while (!existsSync(`${file}.part`)) await Bun.sleep(10);
    const second = await get("-o", file, origin.url);
    expect(second.stderr).toBe(`Error: process ${child.pid} is writing ${file}.part\n`);
    expect(second.exitCode).toBe(EXIT_CODES.write);
  });

  test.concurrent("verifies: a digest that does not fit is a failure, whoever gives it", async () => {
    using good = scripted([serving({ cut: 9000, fields: REPR_DIGEST }), serving({ fields: REPR_DIGEST })]);
    expect((await save(good.url)).exitCode).toBe(0);
    using cutInOrder = scripted([
      () => ({ bytes: `HTTP/1.1 200 OK\r\n${REPR_DIGEST}\r\n${CONTENT.subarray(0, 9000)}` }),
      serving({ fields: REPR_DIGEST }),
    ]);
    const { content, exitCode } = await save(cutInOrder.url);
    expect([content?.equals(CONTENT), exitCode]).toEqual([true, 0]);
    using wrong = scripted([serving()]);
    const other = await save(wrong.url, "--sha256", "0".repeat(64), "--retry", "0");
    expect([other.exitCode, other.files]).toEqual([EXIT_CODES.digest, []]);
    expect(other.stderr).toBe(`Error: the content is not what its digest says: its SHA-256 is ${SHA256}\n`);
  });

  test.concurrent("--max-size and --max-time are kept", async () => {
    using origin = scripted([serving()]);
    expect((await save(origin.url, "--max-size", "1000")).exitCode).toBe(EXIT_CODES.tooLarge);
    using endless = scripted([raw(`HTTP/1.1 200 OK\r\n\r\n${"x".repeat(2000)}`)]);
    const large = await save(endless.url, "--max-size", "1000");
    expect([large.exitCode, large.files]).toEqual([EXIT_CODES.tooLarge, []]);
    using silent = scripted([raw("", "stall")]);
    const late = await save(silent.url, "--max-time", "0.5");
    expect([late.exitCode, late.stderr]).toEqual([EXIT_CODES.timeout, "Error: not done within 0.5 s\n"]);
  });

  test.concurrent("-L follows redirects, keeps secrets from other hosts, and does not go round for ever", async () => {
    using target = scripted([serving()]);
    using origin = scripted([
      raw("HTTP/1.1 302 Found\r\nLocation: /next?x\r\nContent-Length: 0\r\n\r\n"),
      raw(`HTTP/1.1 301 Moved\r\nLocation: ${target.url}\r\nContent-Length: 0\r\n\r\n`),
    ]);
    const { content, exitCode } = await save(origin.url, "-L", "-H", "Authorization: secret", "-H", "X: public");
    expect([content?.equals(CONTENT), exitCode]).toEqual([true, 0]);
    expect(origin.requests[1]).toMatch(/^GET \/next\?x HTTP\/1.1\r\n[^]*\r\nAuthorization: secret\r\n/);
    expect(target.requests[0]).toContain("\r\nX: public\r\n");
    expect(target.requests[0]).not.toContain("secret");
    using round = scripted([raw("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")]);
    expect((await save(round.url, "-L")).exitCode).toBe(EXIT_CODES.redirects);
    expect((await save(round.url)).exitCode).toBe(EXIT_CODES.status);
  });

  test.concurrent("-I asks for the head, -X for what it says, -H adds, replaces and removes, -v shows", async () => {
    using origin = scripted([raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")]);
    const { stdout, exitCode } = await get("-I", "-H", "Accept:", "-H", "User-Agent: me", "-H", "X-Y: z", origin.url);
    expect([stdout, exitCode]).toEqual(["HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", 0]);
    expect(origin.requests[0]).toMatch(/^HEAD \/file HTTP\/1.1\r\nHost: [^]*\r\nUser-Agent: me\r\nX-Y: z\r\n\r\n$/);
    expect(origin.requests[0]).not.toMatch(/Accept|http-over-tcp/);
    using deleted = scripted([raw("HTTP/1.1 204 No Content\r\n\r\n")]);
    const { stderr } = await get("-v", "-X", "DELETE", deleted.url);
    expect(stderr).toStartWith("> DELETE /file HTTP/1.1\n> Host: 127.0.0.1:");
    expect(stderr).toEndWith("\n< HTTP/1.1 204 No Content\n");
  });

  test.concurrent.each([
    "-H|a b: c",
    "-H|Content-Length: 3",
    "-X|A B",
    "-X|CONNECT",
    "--sha256|12",
    "--retry|-1",
    "--max-size|x",
    "-I|-o|x",
    "-d|@/nowhere",
  ])("wrong usage is one line and exit 2: %s", async (args) => {
    const { stderr, exitCode } = await get(...args.split("|"));
    expect(stderr).toMatch(/^Error: .+ \(see client-robust --help\)\n$/);
    expect(exitCode).toBe(EXIT_CODES.usage);
  });

  test.concurrent("a full disk and an output folder that nobody may write to leave nothing behind", async () => {
    using origin = scripted([serving()]);
    const full = await get("-o", "/dev/full", origin.url);
    expect([full.stderr, full.exitCode]).toEqual(["Error: cannot write: ENOSPC\n", EXIT_CODES.write]);
    await using folder = await temporaryFolder();
    chmodSync(folder.path, 0o500);
    // Root may write everywhere: then there is nothing to see here but that nothing goes wrong.
    const { exitCode } = await get("-o", `${folder.path}/file`, origin.url);
    expect(exitCode).toBe(process.getuid?.() === 0 ? EXIT_CODES.ok : EXIT_CODES.write);
    chmodSync(folder.path, 0o700);
  });

  test.concurrent(
    "a file that can grow no more is one line and exit 23; what it has is kept, and gone on from",
    async () => {
      using origin = scripted([serving()]);
      await using folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      const argv = [...(await command("client-robust", variant)), "-o", file, origin.url];
      // A limit of 8 KiB a file, of which the shell would make a signal that kills: it is ignored.
      const limited = await run(["bash", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "bash", ...argv]);
      expect(limited.exitCode).toBe(EXIT_CODES.write);
      expect(limited.stderr).toMatch(/^Error: cannot write: EFBIG\nKept 8192 bytes in /);
      expect(readdirSync(folder.path).toSorted()).toEqual(["file.part", "file.part.json"]);
      const again = await run(argv);
      expect([again.exitCode, readFileSync(file).equals(CONTENT)]).toEqual([0, true]);
      expect(origin.requests.at(-1)).toContain("\r\nRange: bytes=8192-\r\n");
    },
  );

  test.if(canMount).concurrent("what fitted on a full disk is kept, by a run that finds it full, too", async () => {
    using origin = scripted([serving()]);
    await using folder = await temporaryFolder();
    const argv = [...(await command("client-robust", variant)), "-s", "-o", "file", origin.url];
    const steps = `cd "$1" && mount -t tmpfs -o size=16k tmpfs . && cd "$1" && shift
      "$@"; echo $?; ls
      head -c 16k /dev/zero >full; "$@"; echo $?; ls; rm full
      mount -o remount,size=1m . && "$@"; echo $?; ls; sha256sum <file`;
    const { stdout } = await run([
      "unshare",
      "--map-root-user",
      "--mount",
      "bash",
      "-c",
      steps,
      "bash",
      folder.path,
      ...argv,
    ]);
    const part = "file.part\nfile.part.json\n";
    expect(stdout).toBe(`23\n${part}23\n${part}full\n0\nfile\n${SHA256}  -\n`);
    expect(origin.requests.at(-1)).toMatch(/\r\nRange: bytes=[1-9]\d+-\r\n/);
  });

  test.concurrent(
    "what lies at FILE.part without being a part of ours is neither followed nor written to",
    async () => {
      using origin = scripted([serving()]);
      await using folder = await temporaryFolder();
      const victim = `${folder.path}/victim`;
      writeFileSync(victim, "precious");
      symlinkSync(victim, `${folder.path}/file.part`);
      const linked = await get("-o", `${folder.path}/file`, origin.url);
      expect([linked.stderr, linked.exitCode]).toEqual(["", 0]);
      // Not even where a state says that it is a part of this version.
      symlinkSync(victim, `${folder.path}/claimed.part`);
      const state = { url: origin.url, etag: '"a"', total: CONTENT.length, pid: 0 };
      writeFileSync(`${folder.path}/claimed.part.json`, JSON.stringify(state));
      const claimed = await get("-o", `${folder.path}/claimed`, origin.url);
      expect([claimed.stderr, claimed.exitCode]).toEqual(["", 0]);
      linkSync(victim, `${folder.path}/other.part`);
      expect((await get("-o", `${folder.path}/other`, origin.url)).exitCode).toBe(0);
      expect(readFileSync(victim, "utf8")).toBe("precious");
      for (const name of ["file", "claimed", "other"]) {
        expect(lstatSync(`${folder.path}/${name}`).isFile()).toBeTrue();
        expect(readFileSync(`${folder.path}/${name}`).equals(CONTENT)).toBeTrue();
      }
    },
  );
});

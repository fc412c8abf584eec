/** What client-robust.ts does after a failure: the policy as a table, then against origins that follow a script. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  linkSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import {
  type Attempt,
  decideFraming,
  decideNext,
  EXIT_CODES,
  type Held,
  judgeHead,
  NOTHING,
  type Options,
  type Outcome,
  parseCommandLine,
  parseHttpDate,
  parseRetryAfter,
  resourceOf,
  type ResponseHead,
  TransferError,
  type Verdict,
  versionOf,
} from "../client-robust.ts";
import { canMount, command, run, runProgram, saveToFile, temporaryFolder, VARIANTS } from "./harness.ts";
import { type Answer, CONTENT, HALF, OTHER, rangeOf, raw, reprDigest, scripted, serving, sha256 } from "./origin.ts";

// Most of the time nothing happens here: what waits for its retry waits beside the others.
setDefaultTimeout(60_000);

// ── the policy ──

const JOB: Options = parseCommandLine(["-o", "FILE"]);
const RESOURCE = resourceOf(JOB.request.url);
const HELD: Held = { ...NOTHING, bytes: 40, validator: '"a"', etag: '"a"', resource: RESOURCE, total: 100 };

function head(status: number, fields: Record<string, string> = {}): ResponseHead {
  const start = {
    status,
    fields: new Map(Object.entries(fields).map(([name, value]) => [name.toLowerCase(), [value]] as const)),
    text: "",
  };
  return { ...start, framing: decideFraming(start, false, "GET") };
}

type Policy = Options & Pick<Attempt, "canStartOver">;

/** An attempt, as the policy sees it: by default a GET of the default URL, the first of several. */
function attemptOf(
  { canStartOver = true, ...policy }: Partial<Policy> = {},
  { method = "GET", path = "/data", hasRange = false, isLastTry = false, wasSent = true, failures = 0 } = {},
): Attempt {
  const job = { ...JOB, ...policy };
  const request = { ...job.request, method, url: new URL(path, job.request.url) };
  return { job, canStartOver, request, hasRange, wasSent, failures: isLastTry ? job.retries : failures };
}

/** A verdict in a word or two. */
function judge(
  response: ResponseHead,
  held: Held = NOTHING,
  policy: Partial<Policy> = {},
  request: { method?: string; path?: string; isLastTry?: boolean; hasRange?: boolean } = {},
): string {
  const attempt = attemptOf(policy, { hasRange: held.bytes > 0, ...request });
  const verdict = verdictOf(() => judgeHead(response, held, attempt));
  if (verdict instanceof TransferError) return `${verdict.isFinal ? "final " : ""}${verdict.outcome}`;
  if (verdict.action !== "deliver") return verdict.action;
  return held.bytes > 0 && verdict.held.bytes === 0 ? "start over" : `deliver from ${verdict.from}`;
}

/** A failure that is thrown is a verdict, too. */
function verdictOf(judging: () => Verdict): Verdict | TransferError {
  try {
    return judging();
  } catch (error) {
    if (error instanceof TransferError) return error;
    throw error;
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
    { ...PART, "Content-Range": "bytes 0-39/100", "Content-Length": "40" }, // nothing that is missing
    { ...PART, "Content-Range": "bytes 40-99/101" }, // of another length
    { ...PART, "Content-Range": "bytes 30-99/100" }, // ten bytes more than the Content-Length
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
    const unknown = { ...HELD, bytes: 100, total: undefined };
    expect(judge(head(206, { "Content-Range": "bytes 99-99/100", ETag: '"a"' }), unknown)).toBe("deliver from 99");
    expect(judge(head(206, { "Content-Range": "bytes 99-99/100", ETag: '"a"' }), { ...unknown, total: 100 })).toBe(
      "deliver from 99",
    );
    expect(judge(head(206, { "Content-Range": "bytes 100-119/120", ETag: '"a"' }), unknown)).toBe("range");
  });

  test("takes no part where the whole was asked for", () => {
    expect(judge(head(206, PART))).toBe("range");
    expect(judge(head(206, PART), HELD, {}, { hasRange: false })).toBe("range");
    expect(judge(head(206, PART), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0"); // printed as it is
    const slice = judgeHead(head(206, PART), NOTHING, attemptOf({ keepsOnlyContent: false }));
    expect(slice).toMatchObject({ held: { validator: "" } }); // the rest of a slice cannot be asked for
    const whole = { ...PART, "Content-Range": "bytes 0-59/60" };
    expect(judge(head(206, whole))).toBe("deliver from 0");
    expect(judgeHead(head(206, whole), NOTHING, attemptOf())).toMatchObject({ held: { validator: '"a"' } });
    expect(judge(head(206, whole), HELD, {}, { hasRange: false })).toBe("start over");
    expect(judge(head(206, { ...whole, "Content-Length": "59" }))).toBe("range");
    expect(judge(head(206, { ...whole, "Content-Range": "bytes 0-59/*" }))).toBe("range");
    expect(judge(head(206, whole), NOTHING, {}, { method: "POST" })).toBe("deliver from 0");
    expect(judge(head(206, PART), NOTHING, {}, { method: "POST" })).toBe("range");
    expect(judge(head(206), NOTHING, {}, { method: "POST" })).toBe("range");
  });

  test("uses a part that begins before what is missing, and passes over what it has", () => {
    const overlapping = { ...PART, "Content-Range": "bytes 32-99/100", "Content-Length": "68" };
    expect(judge(head(206, overlapping), HELD)).toBe("deliver from 32");
    const whole = { ...PART, "Content-Range": "bytes 0-99/100", "Content-Length": "100" };
    expect(judge(head(206, whole), HELD)).toBe("deliver from 0");
  });

  test("takes no slice for the whole, whatever the status says", () => {
    expect(judge(head(200, PART))).toBe("range");
    expect(judge(head(200, PART), HELD)).toBe("range");
    expect(judge(head(200, { "Content-Range": "bytes 0-99/*", "Content-Length": "100" }))).toBe("range");
    expect(judge(head(200, { "Content-Range": "bytes */100" }))).toBe("range");
    expect(judge(head(200, { "Content-Range": "bytes 0-99/100", "Content-Length": "99" }))).toBe("range");
    expect(judge(head(200, { "Content-Range": "bytes 0-99/100", "Content-Length": "100" }))).toBe("deliver from 0");
    expect(judge(head(200, { "Content-Range": "bytes 0-99/100" }))).toBe("deliver from 0");
    expect(judge(head(200, { "Content-Range": "items 3-4/5" }))).toBe("deliver from 0");
    expect(judge(head(200, PART), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0");
  });

  test("takes the content of a GET from 200 and 203, not from another 2xx", () => {
    for (const status of [200, 203]) expect(judge(head(status))).toBe("deliver from 0");
    for (const status of [201, 204, 205, 207, 226, 299]) expect(judge(head(status))).toBe("final status");
    expect(judge(head(202))).toBe("status");
    expect(judge(head(202), NOTHING, {}, { isLastTry: true })).toBe("final status");
    expect(judge(head(202), HELD)).toBe("status");
    for (const status of [201, 202, 204])
      expect(judge(head(status), NOTHING, {}, { method: "POST" })).toBe("deliver from 0");
    for (const status of [202, 207])
      expect(judge(head(status), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0");
  });

  test("joins pieces whatever their validators say where the end is verified, unless the lengths differ", () => {
    const verified = { hasSha256: true };
    expect(judge(head(206, { ...PART, ETag: '"b"' }), HELD, verified)).toBe("deliver from 40");
    expect(judge(head(206, { ...PART, "Content-Range": "bytes 40-99/101" }), HELD, verified)).toBe("range");
    expect(judge(head(200, { ETag: '"b"', "Content-Length": "100" }), HELD, verified)).toBe("deliver from 0");
    expect(judge(head(200, { "Content-Length": "101" }), HELD, verified)).toBe("start over");
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

  test("joins nothing of another resource, whatever its tag is", () => {
    const elsewhere = { path: "/another" };
    expect(judge(head(200, { ETag: '"a"', "Content-Length": "100" }), HELD, {}, elsewhere)).toBe("start over");
    expect(judge(head(200, { ETag: '"a"' }), HELD, { canStartOver: false }, elsewhere)).toBe("final partial");
    expect(judge(head(200, { ETag: '"a"' }), HELD, { hasSha256: true }, elsewhere)).toBe("deliver from 0");
    const fresh = judgeHead(head(200, { ETag: '"a"' }), HELD, attemptOf({}, elsewhere));
    expect(fresh).toMatchObject({ held: { bytes: 0, resource: "/another?", total: undefined } });
  });

  test("joins nothing of another coding", () => {
    const gzip = { "Content-Encoding": "gzip" };
    const encoded = { ...HELD, coding: "gzip" };
    expect(judge(head(206, { ...PART, ...gzip }), HELD)).toBe("range");
    expect(judge(head(206, { ...PART, "Content-Encoding": "br" }), encoded)).toBe("range");
    expect(judge(head(206, { ...PART, ...gzip }), encoded)).toBe("deliver from 40");
    expect(judge(head(206, PART), encoded)).toBe("range"); // some servers name two codings by one tag
    expect(judge(head(206, { ...PART, "Content-Encoding": "Identity" }), HELD)).toBe("deliver from 40");
    expect(judge(head(200, { ETag: '"a"', ...gzip }), HELD)).toBe("start over");
    expect(judge(head(200, { ETag: '"a"' }), encoded)).toBe("start over");
    expect(judge(head(200, { ETag: '"a"', ...gzip }), encoded)).toBe("deliver from 0");
    expect(judge(head(206, { ...PART, ...gzip }), HELD, { hasSha256: true })).toBe("deliver from 40");
    for (const fields of [{ ETag: '"a"' }, { "Last-Modified": "Wed, 01 Jan 2020 12:00:01 GMT" }]) {
      expect(judgeHead(head(200, { ...fields, ...gzip }), NOTHING, attemptOf())).toMatchObject({
        held: { coding: "gzip" },
      });
    }
  });

  test("remembers what an earlier response said of the same version", () => {
    const attempt = attemptOf({}, { hasRange: true });
    const verdict = judgeHead(head(200, { ETag: '"a"' }), HELD, attempt);
    expect(verdict).toMatchObject({ action: "deliver", held: { total: 100, bytes: 40 } });
    const other = { ...HELD, bytes: 0, validator: '"b"', etag: '"b"' };
    const fresh = judgeHead(head(200, { ETag: '"a"' }), other, attempt);
    expect(fresh).toMatchObject({ action: "deliver", held: { total: undefined, validator: '"a"' } });
    // As long as nothing is held, each response is described by its own fields.
    const empty = { ...HELD, bytes: 0 };
    const lastModified = "Wed, 01 Jan 2020 12:00:01 GMT";
    const dated = judgeHead(head(200, { ETag: '"a"', "Last-Modified": lastModified }), empty, attempt);
    expect(dated).toMatchObject({ action: "deliver", held: { bytes: 0, total: 100, lastModified } });
  });

  test("believes a 416 only where it names the length and the version that are held", () => {
    const whole = { ...HELD, bytes: 100, total: undefined };
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"a"' }), whole)).toBe("complete");
    expect(judge(head(416, { "Content-Range": "bytes */100" }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"b"' }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */101", ETag: '"a"' }), whole)).toBe("range");
    expect(judge(head(416, { "Content-Range": "bytes */100", ETag: '"b"' }), whole, { canStartOver: false })).toBe(
      "range",
    );
    expect(judge(head(416))).toBe("final status");
  });

  test("tries again what may pass, shows it at the last try, and keeps no error page as content", () => {
    expect(judge(head(503))).toBe("status");
    expect(judge(head(503), NOTHING, { keepsOnlyContent: false }, { isLastTry: true })).toBe("deliver from 0");
    expect(judge(head(503), NOTHING, {}, { isLastTry: true })).toBe("final status");
    expect(judge(head(404))).toBe("final status");
    expect(judge(head(404), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0");
    expect(judge(head(404), HELD, { keepsOnlyContent: false })).toBe("final status");
    expect(judge(head(301, { Location: "/" }))).toBe("final status");
    expect(judge(head(301, { Location: "/" }), NOTHING, { followsRedirects: true })).toBe("redirect");
  });

  test("continues by a date, and takes no part of another date or tag", () => {
    const lastModified = "Sun, 22 Nov 2026 11:59:00 GMT";
    const held: Held = { ...HELD, validator: lastModified, etag: 'W/"a"', lastModified };
    const part = { "Content-Range": "bytes 40-99/100", "Last-Modified": lastModified, ETag: 'W/"a"' };
    expect(judge(head(206, part), held)).toBe("deliver from 40");
    expect(judge(head(206, { "Content-Range": "bytes 40-99/100" }), held)).toBe("deliver from 40");
    expect(judge(head(206, { ...part, "Last-Modified": "Sun, 22 Nov 2026 11:59:01 GMT" }), held)).toBe("range");
    expect(judge(head(206, { ...part, ETag: 'W/"b"' }), held)).toBe("range");
    const whole = { Date: "Sun, 22 Nov 2026 12:00:00 GMT", "Last-Modified": lastModified };
    expect(judge(head(200, whole), held)).toBe("deliver from 0");
    expect(judge(head(200, { ...whole, ETag: 'W/"b"' }), held)).toBe("start over");
    expect(judge(head(206, { ...PART, "Last-Modified": lastModified }), { ...HELD, lastModified: "other" })).toBe(
      "range",
    );
  });

  test("takes a 304 for an answer, but not to a request for the rest, unless that had a condition of the user's", () => {
    expect(judge(head(304))).toBe("unchanged");
    expect(judge(head(304), NOTHING, { keepsOnlyContent: false })).toBe("deliver from 0");
    expect(judge(head(304), HELD)).toBe("final status");
    expect(judge(head(304), HELD, { isConditional: true })).toBe("unchanged");
  });

  test("an empty Location is none", () => {
    expect(judge(head(301, { Location: "" }), NOTHING, { followsRedirects: true })).toBe("final status");
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
  attempt: { failure?: TransferError; method?: string; wasSent?: boolean; failures?: number; elapsedMs?: number } = {},
  policy: Partial<Policy> = {},
): string {
  const { failure = new TransferError(outcome, ""), elapsedMs = 0 } = attempt;
  const all = attemptOf(policy, { failures: 1, ...attempt });
  const decision = decideNext(failure, held, all, all.job.retryMaxMs - elapsedMs, 1);
  if (typeof decision === "string") return "give up";
  return `${decision.asksForWhole ? "ask for the whole" : "go on"} within ${decision.afterMs}`;
}

describe("decideNext", () => {
  test("asks for the next part at once where the last one was whole, as long as parts bring something", () => {
    const failure = new TransferError("partial", "", { isPart: true });
    expect(decide("partial", HELD, { failure })).toBe("go on within 0");
    expect(decide("partial", HELD, { failure, failures: 2 })).toBe("go on within 2000");
    expect(decide("partial", HELD, { failure, failures: 0 }, { retries: 0, retryDelayMs: 9 })).toBe("go on within 0");
  });

  test("asks for the whole at once where the rest is refused, and counts no retry", () => {
    const failure = new TransferError("range", "", { refusesRest: true });
    expect(decide("range", HELD, { failure, failures: 0 }, { retries: 0 })).toBe("ask for the whole within 0");
    const refusing = (status: number, isLastTry = true, hasRange = true) => {
      const verdict = verdictOf(() => judgeHead(head(status), HELD, attemptOf({}, { hasRange, isLastTry })));
      return verdict instanceof TransferError && verdict.refusesRest;
    };
    expect([206, 400, 403, 404, 416, 500, 501].map((status) => refusing(status))).not.toContain(false);
    expect([202, 204, 302, 429, 502, 503].map((status) => refusing(status))).not.toContain(true);
    expect([refusing(400, false, false), refusing(500, false), refusing(500, true, false)]).not.toContain(true);
  });

  test("waits a second, then two, four …, and a minute at the most: half of it fixed, half random", () => {
    const waits = [1, 2, 3, 4, 20].map((failures) => decide("receive", NOTHING, { failures }, { retries: 99 }));
    expect(waits).toEqual([1000, 2000, 4000, 8000, 60_000].map((wait) => `go on within ${wait}`));
    expect(
      decideNext(new TransferError("receive", ""), NOTHING, attemptOf({}, { failures: 1 }), 9999, 0),
    ).toMatchObject({
      afterMs: 500,
    });
    for (const failures of [1, 5])
      expect(decide("receive", NOTHING, { failures }, { retryDelayMs: 300 })).toBe("go on within 300");
  });

  test("gives up what cannot pass", () => {
    for (const outcome of [
      "usage",
      "url",
      "write",
      "redirects",
      "tooLarge",
      "certificate",
      "authorities",
      "fault",
    ] as const)
      expect(decide(outcome)).toBe("give up");
    const passing = [
      "resolve",
      "connect",
      "unparsable",
      "partial",
      "timeout",
      "empty",
      "send",
      "receive",
      "status",
    ] as const;
    for (const outcome of passing) expect(decide(outcome)).toBe("go on within 1000");
    expect(decide("status", NOTHING, { failure: new TransferError("status", "", { isFinal: true }) })).toBe("give up");
  });

  test("counts attempts and time, and shortens the last wait", () => {
    expect(decide("receive", NOTHING, { failures: 6 })).toBe("give up");
    expect(decide("receive", NOTHING, { elapsedMs: 500 }, { retryMaxMs: 1000 })).toBe("go on within 500");
    expect(decide("receive", NOTHING, { elapsedMs: 1000 }, { retryMaxMs: 1000 })).toBe("give up");
  });

  test("takes Retry-After for a floor, and gives up at once where it goes too far", () => {
    const after = (seconds: number, policy: Partial<Policy> = {}) => {
      const failure = new TransferError("status", "", { retryAfterMs: seconds * 1000 });
      return decide("status", NOTHING, { failure }, policy);
    };
    expect(after(5)).toBe("go on within 5000");
    expect(after(5, { retryMaxMs: 4000 })).toBe("give up");
    expect(after(3600)).toBe("go on within 3600000");
    expect(after(3601)).toBe("give up");
    expect(after(Number.POSITIVE_INFINITY)).toBe("give up");
    expect(after(3601, { retryMaxMs: 3_700_000 })).toBe("go on within 3601000");
    expect(after(5, { retryDelayMs: 100 })).toBe("go on within 5000");
  });

  test("sends no request twice that is not idempotent, unless it was never sent", () => {
    expect(decide("receive", NOTHING, { method: "POST" })).toBe("give up");
    expect(decide("connect", NOTHING, { wasSent: false, method: "POST" })).toBe("go on within 1000");
    expect(decide("receive", NOTHING, { method: "PUT" })).toBe("go on within 1000");
  });

  test("asks for the whole where nothing strong names what is held, or a part did not fit", () => {
    const nameless = { ...HELD, validator: "" };
    expect(decide("partial", HELD)).toBe("go on within 1000");
    expect(decide("partial", nameless)).toBe("ask for the whole within 1000");
    expect(decide("partial", nameless, {}, { canStartOver: false })).toBe("give up");
    expect(decide("partial", nameless, {}, { hasSha256: true })).toBe("go on within 1000");
    expect(decide("range", HELD, { failures: 2 })).toBe("ask for the whole within 2000");
    expect(decide("range", HELD, {}, { canStartOver: false })).toBe("ask for the whole within 1000");
    expect(decide("digest")).toBe("go on within 1000");
    const failure = new TransferError("unparsable", "", { spoils: true });
    expect(decide("unparsable", NOTHING, { failure })).toBe("go on within 1000");
    expect(decide("unparsable", NOTHING, { failure }, { canStartOver: false })).toBe("give up");
  });
});

test("Retry-After is seconds or a date of any form, and anything else is not there", () => {
  const now = Date.parse("2026-11-22T12:00:00Z");
  const after = (value: string) => parseRetryAfter(head(503, { "Retry-After": value }), now);
  expect(after("120")).toBe(120_000);
  expect(after("0")).toBe(0);
  expect(after("9".repeat(20))).toBe(1e23);
  expect(after("9".repeat(400))).toBe(Number.POSITIVE_INFINITY);
  expect(after("Sun, 22 Nov 2026 12:00:07 GMT")).toBe(7000);
  expect(after("Sunday, 22-Nov-26 12:00:07 GMT")).toBe(7000);
  expect(after("Sun Nov 22 12:00:07 2026")).toBe(7000);
  expect(after("Sun, 22 Nov 2026 11:00:00 GMT")).toBe(0);
  for (const nonsense of ["-1", "1.5", "soon", "2026-11-22", "Sun, 22 Nov", "Sun, 99 Nov 2026 12:00:07 GMT"])
    expect(after(nonsense)).toBe(0);
});

test("a date is read in each of the three forms of RFC 9110 §5.6.7", () => {
  const read = (text: string) => new Date(parseHttpDate(text)).toJSON();
  expect(read("Sun, 06 Nov 1994 08:49:37 GMT")).toBe("1994-11-06T08:49:37.000Z");
  expect(read("Sunday, 06-Nov-94 08:49:37 GMT")).toBe("1994-11-06T08:49:37.000Z");
  expect(read("Sun Nov  6 08:49:37 1994")).toBe("1994-11-06T08:49:37.000Z");
  expect(read("Monday, 06-Nov-26 08:49:37 GMT")).toBe("2026-11-06T08:49:37.000Z");
  // A year that ends so and is not over 50 years ahead.
  const ahead = new Date().getUTCFullYear() + 50;
  for (const year of [ahead, ahead - 99])
    expect(read(`Monday, 06-Nov-${String(year % 100).padStart(2, "0")} 08:49:37 GMT`)).toStartWith(`${year}-11-06`);
  for (const nonsense of [
    "",
    "now",
    "06 Nov 1994 08:49:37 GMT",
    "Sun, 06 Nov 1994 08:49:37 CET",
    "Sun, 6 Nov 1994 08:49:37 GMT",
    "S1n, 06 Nov 1994 08:49:37 GMT",
    "Su_day, 06-Nov-94 08:49:37 GMT",
    "S1n Nov  6 08:49:37 1994",
  ])
    expect(parseHttpDate(nonsense)).toBeNaN();
});

test("a date names a version if it is a minute older than the response, and no strong ETag does", () => {
  const date = "Sun, 22 Nov 2026 12:00:00 GMT";
  const minuteBefore = "Sun, 22 Nov 2026 11:59:00 GMT";
  const validator = (fields: Record<string, string>) => versionOf(head(200, fields)).validator;
  expect(validator({ ETag: '"a"', Date: date, "Last-Modified": minuteBefore })).toBe('"a"');
  expect(validator({ ETag: 'W/"a"', Date: date, "Last-Modified": minuteBefore })).toBe(minuteBefore);
  // Servers that compute no tag send an empty one, the same for every version.
  expect(validator({ ETag: '""', Date: date, "Last-Modified": minuteBefore })).toBe(minuteBefore);
  expect(validator({ Date: date, "Last-Modified": minuteBefore })).toBe(minuteBefore);
  expect(validator({ Date: date, "Last-Modified": "Sun, 22 Nov 2026 11:59:01 GMT" })).toBe("");
  expect(validator({ "Last-Modified": minuteBefore })).toBe("");
  expect(validator({ Date: date, "Last-Modified": "long ago" })).toBe("");
  expect(validator({ Date: date })).toBe("");
  // Reproducible builds give these to every version.
  for (const constant of [
    "Thu, 01 Jan 1970 00:00:00 GMT",
    "Thu, 01 Jan 1970 00:00:01 GMT",
    "Tue, 01 Jan 1980 00:00:00 GMT",
    "Tue, 01 Jan 1980 00:00:02 GMT",
    "Sat, 26 Oct 1985 08:15:00 GMT",
    "Sat, 01 Jan 2000 00:00:00 GMT",
    "Fri, 01 Jan 2010 00:00:00 GMT",
  ])
    expect([constant, validator({ Date: date, "Last-Modified": constant })]).toEqual([constant, ""]);
  const early = "Fri, 01 Jan 2010 00:00:01 GMT";
  expect(validator({ Date: date, "Last-Modified": early })).toBe(early);
});

test("a resource is what path and query name, but for what signs a query", () => {
  const name = (url: string) => resourceOf(new URL(url, "http://a/"));
  expect(name("/f?a=1&sig=x")).toBe(name("http://mirror/f?a=1&sig=y#top"));
  expect(name("/f?X-Goog-Date=1&X-Goog-Signature=x")).toBe(name("/f?X-Goog-Date=2&X-Goog-Signature=y"));
  const names = ["/f", "/F", "/f?a=1", "/f?a=2", "/f?a=1&b=1", "/f?token=1", "/f?policy=1", "/f?xsig=1", "/f?a=sig=1"];
  expect(new Set(names.map(name)).size).toBe(names.length);
  for (const url of names) expect(name(url)).toMatch(/^\/[fF]\?([0-9a-f]{64})?$/); // no query in clear, and none at all without one
});

// ── origins that follow a script ──

const SHA256 = sha256(CONTENT);
const REPR_DIGEST = reprDigest(CONTENT);

describe.each(VARIANTS)("client-robust, when things go wrong (%s)", (variant) => {
  const get = (...args: string[]) => runProgram("client-robust", variant, args);

  const save = (url: string, ...args: string[]) => saveToFile(variant, url, ...args);

  const hasRetried = (stderr: string) => stderr.split("\n").filter((line) => line.startsWith("Retry in ")).length;

  test.concurrent("goes on from where it broke off, twice, and gets every byte once", async () => {
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

  test.concurrent("asks for the whole when a part does not fit, and passes over what it holds", async () => {
    const fields = 'Content-Range: bytes 0-9/10\r\nETag: "a"\r\nContent-Length: 10';
    const misfit = raw(`HTTP/1.1 206 Partial Content\r\n${fields}\r\n\r\n0123456789`);
    using origin = scripted([serving({ cut: 9000 }), misfit, serving({ cut: 12_000 }), misfit, serving()]);
    const { content, exitCode, stderr } = await save(origin.url);
    expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
    expect(origin.requests.map(rangeOf)).toEqual([undefined, 9000, undefined, 12_000, undefined]);
    expect(stderr).not.toContain("Starting over");
  });

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
    expect(stderr).toBe("Error: the server answered 503 Busy (Retry-After is too long: 3600 s)\n");
  });

  test.concurrent("does not send a POST twice", async () => {
    using origin = scripted([raw("")]);
    const { exitCode } = await save(origin.url, "-d", "a=1", "-d", "b=2");
    expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.empty, 1]);
    expect(origin.requests[0]).toMatch(
      /^POST \/file HTTP\/1.1\r\n[^]*Content-Type: application\/x-www-form-urlencoded\r\nContent-Length: 7\r\n[^]*\r\n\r\na=1&b=2$/,
    );
  });

  test.concurrent("a later run of the same command goes on from what is kept, and says where that is", async () => {
    await using folder = await temporaryFolder();
    const file = `${folder.path}/file`;
    using origin = scripted([serving({ cut: 9000 }), serving()]);
    const { stderr, exitCode } = await get("--retry", "0", "-o", file, origin.url);
    const part = /\nKept 9000 bytes in (.*): the same command continues from there\n$/.exec(stderr)?.[1] ?? "";
    expect([exitCode, readFileSync(part).length]).toEqual([EXIT_CODES.partial, 9000]);
    expect((await get("-o", file, origin.url)).exitCode).toBe(0);
    expect([rangeOf(origin.requests[1]), readFileSync(file).equals(CONTENT)]).toEqual([9000, true]);
    expect(readdirSync(folder.path)).toEqual(["file"]);
  });

  test.concurrent("a part is in nobody's way: where the rest is refused, the same run gets the whole", async () => {
    const newer = serving({ etag: '"b"', content: OTHER });
    const misfit = raw(
      "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 9000-9001/9002\r\nContent-Length: 2\r\n\r\nxx",
    );
    for (const refusal of [misfit, ...[400, 403, 416, 500].map((status) => raw(`HTTP/1.1 ${status} No\r\n\r\n`))]) {
      await using folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      using origin = scripted([serving({ cut: HALF }), refusal, newer]);
      expect((await get("--retry", "0", "-o", file, origin.url)).exitCode).toBe(EXIT_CODES.partial);
      expect((await get("--retry", "0", "-o", file, origin.url)).exitCode).toBe(0);
      expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF, undefined]);
      expect([readFileSync(file).equals(OTHER), readdirSync(folder.path)]).toEqual([true, ["file"]]);
    }
  });

  test.concurrent("what refuses the rest and the whole is asked for both, and then given up", async () => {
    await using folder = await temporaryFolder();
    const [gone, broken] = [404, 500].map((status) => raw(`HTTP/1.1 ${status} No\r\n\r\n`));
    using origin = scripted([serving({ cut: HALF }), gone ?? raw(""), gone ?? raw(""), broken ?? raw("")]);
    const arguments_ = ["--retry", "0", "-o", `${folder.path}/file`, origin.url];
    expect((await get(...arguments_)).exitCode).toBe(EXIT_CODES.partial);
    expect((await get(...arguments_)).exitCode).toBe(EXIT_CODES.status);
    expect((await get(...arguments_)).exitCode).toBe(EXIT_CODES.status);
    expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF, undefined, HALF, undefined]);
    expect(readdirSync(folder.path).filter((name) => name.endsWith(".part")).length).toBe(1);
  });

  test.concurrent("verifies: a digest that does not fit is a failure, of the user or of the server", async () => {
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
    // Several, as one timer in three is a fraction of a millisecond early.
    const runs = Array.from({ length: 8 }, () => save(silent.url, "--max-time", "0.5"));
    for (const { exitCode, stderr } of await Promise.all(runs))
      expect([exitCode, stderr]).toEqual([EXIT_CODES.timeout, "Error: not done within 0.5 s\n"]);
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
    expect(origin.requests[0]).not.toMatch(/Accept:|http-over-tcp/);
    using deleted = scripted([raw("HTTP/1.1 204 No Content\r\n\r\n")]);
    const { stderr } = await get("-v", "-X", "DELETE", deleted.url);
    expect(stderr).toStartWith("> DELETE /file HTTP/1.1\n> Host: 127.0.0.1:");
    expect(stderr).toMatch(/\n< HTTP\/1.1 204 No Content\n0 B in \d+.\d s, not verified\n$/);
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
      expect(existsSync(file)).toBeFalse();
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
      "$@"; echo $?; ls | wc -l
      head -c 16k /dev/zero >full; "$@"; echo $?; rm full; ls | wc -l
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
    expect(stdout).toBe(`23\n2\n23\n2\n0\nfile\n${SHA256}  -\n`);
    expect(origin.requests.at(-1)).toMatch(/\r\nRange: bytes=[1-9]\d+-\r\n/);
  });

  test.concurrent("a part that has become a link is neither followed nor written to", async () => {
    await using folder = await temporaryFolder();
    const [file, victim] = [`${folder.path}/file`, `${folder.path}/victim`];
    for (const link of [symlinkSync, linkSync]) {
      using origin = scripted([serving({ cut: 9000 }), serving()]);
      const { stderr } = await get("--retry", "0", "-o", file, origin.url);
      const part = /Kept 9000 bytes in (.*):/.exec(stderr)?.[1] ?? "";
      unlinkSync(part);
      writeFileSync(victim, "precious");
      link(victim, part);
      expect((await get("-o", file, origin.url)).exitCode).toBe(0);
      expect([readFileSync(victim, "utf8"), readFileSync(file).equals(CONTENT)]).toEqual(["precious", true]);
      expect(readdirSync(folder.path).toSorted()).toEqual(["file", "victim"]);
      unlinkSync(file);
    }
  });
});

/**
 * What server.ts decides about files: paths, dates, conditions, ranges, digests, and the page of a folder; then a
 * connection that sends files, to a transport that takes what the test says.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, closeSync, openSync, readdirSync, readlinkSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import {
  type ByteRange,
  decideRanges,
  evaluateConditions,
  FileSite,
  type FileVersion,
  formatListing,
  type ListingEntry,
  type Method,
  parseHttpDate,
  parseRanges,
  parseTargetPath,
  Server,
  wantsSha256,
} from "../server.ts";
import { Random } from "./random.ts";
import { converse, FakeTransport, nextTurn } from "./transport.ts";
import { temporaryFolder } from "./harness.ts";

setDefaultTimeout(60_000);

const seed = Number(process.env["SEED"] ?? Date.now() % 2 ** 32);

/** A second that is long past, and those beside it. */
const MODIFIED = Date.UTC(2026, 10, 22, 11, 30, 7);
const NOW = MODIFIED + 3_600_000;
const dateAt = (ms: number) => new Date(ms).toUTCString();
const [EARLIER, EQUAL, LATER] = [MODIFIED - 1000, MODIFIED, MODIFIED + 1000].map(dateAt) as [string, string, string];

const VERSION: FileVersion = { size: 1000, etag: '"v-1"', lastModified: MODIFIED };

type Fields = Readonly<Record<string, string | undefined>>;
/** Fields as a request head has them: names in lower case, absent ones not there. */
const fieldsOf = (fields: Fields) =>
  new Map(Object.entries(fields).filter((field): field is [string, string] => field[1] !== undefined));

describe("parseTargetPath", () => {
  test.each([
    ["/", [], true, ""],
    ["/a", ["a"], false, ""],
    ["/a/", ["a"], true, ""],
    ["/a/b.txt", ["a", "b.txt"], false, ""],
    ["/a/b?c/d?e", ["a", "b"], false, "?c/d?e"],
    ["/a/?", ["a"], true, "?"],
    ["/gr%C3%BC%C3%9Fe%20%F0%9F%99%82", ["grüße 🙂"], false, ""],
    ["/100%25", ["100%"], false, ""],
    ["/a%3Fb%23c", ["a?b#c"], false, ""],
    ["/a+b;c=d", ["a+b;c=d"], false, ""],
    ["/...", ["..."], false, ""],
    ["/a..b", ["a..b"], false, ""],
    ["/a%5Cb\\c", ["a\\b\\c"], false, ""],
    ["/..%5c..", ["..\\.."], false, ""],
    ["/./a", ["a"], false, ""],
    ["/a/../b", ["b"], false, ""],
    ["/a/..", [], true, ""],
    ["/a/.", ["a"], true, ""],
    ["/a/b/%2e%2E/./c?d/..", ["a", "c"], false, "?d/.."],
    ["http://x/a/../b/.", ["b"], true, ""],
    ["http://x", [], true, ""],
    ["http://x/", [], true, ""],
    ["HTTPS://x:1/a/b?c", ["a", "b"], false, "?c"],
    ["http://x?c", [], true, "?c"],
  ] as const)("takes %s apart", (target, segments, isFolder, query) => {
    expect(parseTargetPath(target)).toEqual({ segments: [...segments], isFolder, query });
  });

  test("takes slashes in a row for one: what a redirect is made of never starts with //", () => {
    expect(parseTargetPath("//evil.test/a")?.segments).toEqual(["evil.test", "a"]);
    expect(parseTargetPath("/a///b//")).toEqual({ segments: ["a", "b"], isFolder: true, query: "" });
  });

  test("decodes once: %252e%252e is a name with per cent signs", () => {
    expect(parseTargetPath("/%252e%252e/%252f")?.segments).toEqual(["%2e%2e", "%2f"]);
  });

  test.each([
    "/..",
    "/../etc/passwd",
    "/a/../../b",
    "/a/../..",
    "/%2e%2e/b",
    "/.%2E",
    "/a/%2e%2e/./%2E./b",
    "//..",
    "/a//../..",
    "/a%2fb",
    "/a%2F..%2Fb",
    "/a%00",
    "/%00",
    "/a%00.html",
    "/%ff",
    "/%c0%ae%c0%ae/", // ".." in an overlong form
    "/%ed%a0%80", // half a surrogate pair
    "http://x/..",
    "http://x/%2e%2e/",
  ])("finds no file in %s", (target) => {
    expect(parseTargetPath(target)).toBeUndefined();
  });

  test("looks for nothing in a query", () => {
    expect(parseTargetPath("/a?../%00%ff\\")).toEqual({ segments: ["a"], isFolder: false, query: "?../%00%ff\\" });
  });
});

/** The bytes that a range names, one by one, as RFC 9110 §14.1.2 tells it. */
function bytesNamed(first: string, last: string, size: number): number[] | "invalid" {
  if (first === "" && last === "") return "invalid";
  if (first !== "" && last !== "" && Number(last) < Number(first)) return "invalid";
  const all = Array.from({ length: size }, (_, i) => i);
  if (first === "") return all.filter((i) => i >= size - Number(last));
  return all.filter((i) => i >= Number(first) && (last === "" || i <= Number(last)));
}

const bytesOf = ({ from, to }: ByteRange) => Array.from({ length: to - from }, (_, i) => from + i);

describe("parseRanges", () => {
  test("names the same bytes as the RFC, for every small file and range", () => {
    const numbers = ["", ...Array.from({ length: 9 }, (_, i) => String(i)), "007"];
    for (let size = 0; size <= 6; size++)
      for (const first of numbers)
        for (const last of numbers) {
          const value = `bytes=${first}-${last}`;
          const ranges = parseRanges(value, size);
          const named = bytesNamed(first, last, size);
          // Of an empty file there is no range: the whole is sent.
          if (named === "invalid" || size === 0) expect([value, size, ranges]).toEqual([value, size, undefined]);
          else if (named.length === 0) expect([value, size, ranges]).toEqual([value, size, "unsatisfiable"]);
          else expect([value, size, (ranges as ByteRange[]).flatMap(bytesOf)]).toEqual([value, size, named]); // just told apart
        }
  });

  test.each([
    ["bytes=0-99999999999999999999999", [{ from: 0, to: 1000 }]],
    [`bytes=0-${"9".repeat(400)}`, [{ from: 0, to: 1000 }]],
    [`bytes=-${"9".repeat(400)}`, [{ from: 0, to: 1000 }]],
    ["bytes=-1000", [{ from: 0, to: 1000 }]],
    ["bytes=-1001", [{ from: 0, to: 1000 }]],
    ["bytes=999-", [{ from: 999, to: 1000 }]],
    ["bytes=1000-", "unsatisfiable"],
    [`bytes=${"9".repeat(400)}-`, "unsatisfiable"],
    [`bytes=${"9".repeat(30)}-${"9".repeat(31)}`, "unsatisfiable"],
    ["bytes=-0", "unsatisfiable"],
    ["bytes=-000", "unsatisfiable"],
    ["bytes=-0, 1000-, 2000-3000", "unsatisfiable"],
    ["BYTES=0-0", [{ from: 0, to: 1 }]], // §14.1: range units are case-insensitive
    [
      "bytes=0-0,,\t , 5-5,",
      [
        { from: 0, to: 1 },
        { from: 5, to: 6 },
      ],
    ], // §5.6.1: elements may be empty
  ] as const)("knows huge numbers and edges: %s", (value, ranges) => {
    expect(parseRanges(value, 1000)).toEqual(ranges as "unsatisfiable"); // or any other of them
  });

  test.each([
    ["0-1,5-6", ["0-1", "5-6"]],
    ["5-6, 0-1", ["5-6", "0-1"]],
    ["-1,0-0", ["999-999", "0-0"]],
    ["0-1,2-3", ["0-3"]],
    ["2-3,0-1", ["0-3"]],
    ["0-5,3-8,20-30", ["0-8", "20-30"]],
    ["0-1,10-11,4-5,0-20", ["0-20"]],
    ["50-60,0-1,10-11,4-5,2-3", ["50-60", "0-5", "10-11"]],
    ["0-,0-,0-", ["0-999"]],
    ["0-1,2000-,5-6", ["0-1", "5-6"]],
    ["0-998,-1", ["0-999"]],
  ])("joins what overlaps or touches, and keeps the order: %s", (value, expected) => {
    const ranges = parseRanges(`bytes=${value}`, 1000) as ByteRange[]; // all of them are satisfiable
    expect(ranges.map(({ from, to }) => `${from}-${to - 1}`)).toEqual(expected);
  });

  test("is the same bytes as the ranges one by one, each once, whatever they are", () => {
    const random = new Random(seed);
    for (let run = 0; run < 3000; run++) {
      const size = 1 + random.below(40);
      const specs = Array.from({ length: 1 + random.below(8) }, () => {
        const from = random.below(size);
        return { from, to: Math.min(size, from + 1 + random.below(6)) };
      });
      const value = `bytes=${specs.map(({ from, to }) => `${from}-${to - 1}`).join(",")}`;
      const ranges = parseRanges(value, size) as ByteRange[]; // all of them are satisfiable
      const found = ranges.flatMap(bytesOf);
      const asked = [...new Set(specs.flatMap(bytesOf))];
      expect([seed, value, found.toSorted((a, b) => a - b)]).toEqual([seed, value, asked.toSorted((a, b) => a - b)]);
      for (const one of ranges)
        for (const other of ranges) expect(one === other || one.to < other.from || other.to < one.from).toBeTrue();
    }
  });

  test("takes 50 ranges, and for more the whole", () => {
    const many = (count: number) => `bytes=${Array.from({ length: count }, (_, i) => `${i * 2}-${i * 2}`).join(",")}`;
    expect(parseRanges(many(50), 1000)).toHaveLength(50);
    expect(parseRanges(many(51), 1000)).toBeUndefined();
  });

  test.each([
    "bytes",
    "bytes=",
    "bytes=,",
    "bytes=-",
    "bytes=5",
    "bytes=5-3",
    "bytes=0-1,5-3",
    "bytes=0-1,x",
    "bytes=a-b",
    "bytes=0x0-0x1",
    "bytes=1.0-2",
    "bytes=1e2-",
    "bytes=--1",
    "bytes=+1-2",
    "bytes=1 -2",
    "bytes 0-1",
    "bytes:0-1",
    "bytes=0-1;x",
    "items=0-1",
    "none=0-1",
    "0-1",
    "",
    "bytes=٣-٤",
  ])("ignores what is not ranges of bytes, to the letter: %j", (value) => {
    expect(parseRanges(value, 1000)).toBeUndefined();
  });

  test("reaches where 32 bits do not", () => {
    const size = 5 * 2 ** 30;
    expect(parseRanges("bytes=4294967296-4294967296", size)).toEqual([{ from: 2 ** 32, to: 2 ** 32 + 1 }]);
    expect(parseRanges("bytes=-1", size)).toEqual([{ from: size - 1, to: size }]);
    expect(parseRanges(`bytes=${size}-`, size)).toBe("unsatisfiable");
  });
});

describe("parseHttpDate", () => {
  const example = Date.UTC(1994, 10, 6, 8, 49, 37);

  test.each(["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"])(
    "reads each form of RFC 9110 §5.6.7: %s",
    (text) => {
      expect(parseHttpDate(text, NOW)).toBe(example);
    },
  );

  test("reads what toUTCString writes, day after day", () => {
    for (let day = 0; day < 1500; day++) {
      const ms = Date.UTC(2023, 11, 31, 23, 59, 59) + day * 86_400_000;
      expect(parseHttpDate(dateAt(ms))).toBe(ms);
    }
  });

  test("takes two digits for the year that is not more than 50 years ahead", () => {
    const yearOf = (digits: string, now: string) =>
      new Date(parseHttpDate(`Monday, 01-Jan-${digits} 00:00:00 GMT`, Date.parse(now))).getUTCFullYear();
    expect(["26", "00", "75", "76", "77", "99"].map((digits) => yearOf(digits, "2026-11-22"))).toEqual([
      2026, 2000, 2075, 2076, 1977, 1999,
    ]);
    expect(["00", "49", "50", "99"].map((digits) => yearOf(digits, "1999-06-01"))).toEqual([2000, 2049, 1950, 1999]);
    expect(["00", "10", "60"].map((digits) => yearOf(digits, "2060-06-01"))).toEqual([2100, 2110, 2060]);
  });

  test.each([
    ["29 Feb 2024", true],
    ["29 Feb 2000", true],
    ["29 Feb 2023", false],
    ["29 Feb 2100", false],
    ["30 Feb 2024", false],
    ["31 Apr 2024", false],
    ["31 Nov 2024", false],
    ["00 Jan 2024", false],
    ["32 Jan 2024", false],
    ["31 Dec 2024", true],
  ])("knows which days there are: %s", (day, isThere) => {
    expect(Number.isNaN(parseHttpDate(`Mon, ${day} 00:00:00 GMT`))).toBe(!isThere);
  });

  test.each([
    "",
    "0",
    "now",
    "2026-11-22",
    "2026-11-22T11:30:07Z",
    "1795347007",
    "Sun, 06 Nov 1994 24:00:00 GMT",
    "Sun, 06 Nov 1994 08:60:37 GMT",
    "Sun, 06 Nov 1994 08:49:61 GMT",
    "Sun, 06 Nov 1994 8:49:37 GMT",
    "Sun, 6 Nov 1994 08:49:37 GMT",
    "Sun, 06 Nov 94 08:49:37 GMT",
    "Sun, 06 Nov 1994 08:49:37",
    "Sun, 06 Nov 1994 08:49:37 UTC",
    "Sun, 06 Nov 1994 08:49:37 +0000",
    "Sun, 06 Nov 1994 08:49:37 GMT+1",
    "sun, 06 nov 1994 08:49:37 gmt",
    "Sun, 06 Foo 1994 08:49:37 GMT",
    " Sun, 06 Nov 1994 08:49:37 GMT",
    "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
    "Sunday, 06-Nov-1994 08:49:37 GMT",
    "Sunday, 31-Feb-94 08:49:37 GMT",
    "Sun Nov 06 08:49:37 94",
    "Sun Nov 31 08:49:37 1994",
    "Sun Nov 6 08:49:37 1994",
  ])("takes nothing else for a date: %j", (text) => {
    expect(parseHttpDate(text)).toBeNaN();
  });
});

describe("wantsSha256", () => {
  test.each([
    ["sha-256=10", true],
    ["sha-256=1", true],
    ["sha-256=0", false],
    ["sha-512=10", false],
    ["sha-512=3, sha-256=10, unixsum=0", true],
    ["sha-512=3,sha-256=10", true],
    ["sha-512=10,\tsha-256=0", false],
    ["sha-256=0, sha-256=1", true], // RFC 8941 §3.2: of a key that comes twice the last counts
    ["sha-256=1, sha-256=0", false],
    ["sha-256=5;x=y", true],
    ["SHA-256=10", false], // keys of structured fields are in lower case
    ["sha-256", false],
    ["sha-256=", false],
    ["sha-256=?1", false],
    ["sha-256=-1", false],
    ["sha-256=1.5", false],
    ["sha-256=yes", false],
    ["xsha-256=10", false],
    ["sha-256 =10", false],
    ["sha-256=10 sha-512=1", false],
    ["", false],
  ])("%j: %p", (value, wants) => {
    expect(wantsSha256(value)).toBe(wants);
  });
});

/** What a conditional field says about VERSION; "ignored" where it says nothing. */
type Truth = "true" | "false" | "absent" | "ignored";

const IF_MATCH: readonly [string | undefined, Truth][] = [
  [undefined, "absent"],
  ["*", "true"],
  ['"v-1"', "true"],
  ['"v-0", W/"v-1","v-1"', "true"],
  ['"v-0"', "false"],
  ['W/"v-1"', "false"], // §13.1.1: the comparison is strong
  ["v-1", "false"], // no entity-tag: none that is listed matches
];
const IF_UNMODIFIED_SINCE: readonly [string | undefined, Truth][] = [
  [undefined, "absent"],
  [LATER, "true"],
  [EQUAL, "true"],
  [EARLIER, "false"],
  ["yesterday", "ignored"], // §13.1.4: what is no date is ignored
];
/** True is: none of them matches. */
const IF_NONE_MATCH: readonly [string | undefined, Truth][] = [
  [undefined, "absent"],
  ["*", "false"],
  ['"v-1"', "false"],
  ['W/"v-1"', "false"], // §13.1.2: the comparison is weak
  ['"x", W/"y" ,\t"v-1"', "false"],
  ['"x", W/"y"', "true"],
  ["v-1", "true"],
];
/** True is: it has been modified. */
const IF_MODIFIED_SINCE: readonly [string | undefined, Truth][] = [
  [undefined, "absent"],
  [EARLIER, "true"],
  [EQUAL, "false"],
  [LATER, "false"],
  ["Sun, 31 Feb 2026 11:30:07 GMT", "ignored"],
];

/** RFC 9110 §13.2.2, word by word, for GET and HEAD. */
function precedence(ifMatch: Truth, ifUnmodified: Truth, ifNoneMatch: Truth, ifModified: Truth): 304 | 412 | undefined {
  // 1. and 2.
  if (ifMatch === "false") return 412;
  if (ifMatch === "absent" && ifUnmodified === "false") return 412;
  // 3. and 4.
  if (ifNoneMatch === "false") return 304;
  if (ifNoneMatch === "absent" && ifModified === "false") return 304;
  return undefined;
}

describe("evaluateConditions", () => {
  test("follows RFC 9110 §13.2.2 in all combinations of its fields", () => {
    let combinations = 0;
    for (const [ifMatch, one] of IF_MATCH)
      for (const [ifUnmodified, two] of IF_UNMODIFIED_SINCE)
        for (const [ifNoneMatch, three] of IF_NONE_MATCH)
          for (const [ifModified, four] of IF_MODIFIED_SINCE) {
            const fields = {
              "if-match": ifMatch,
              "if-unmodified-since": ifUnmodified,
              "if-none-match": ifNoneMatch,
              "if-modified-since": ifModified,
            };
            const outcome = evaluateConditions(fieldsOf(fields), VERSION);
            expect({ fields, outcome }).toEqual({ fields, outcome: precedence(one, two, three, four) });
            combinations++;
          }
    expect(combinations).toBe(7 * 5 * 7 * 5);
  });

  test.each<[Fields, 304 | 412 | undefined]>([
    [{}, undefined],
    [{ "if-none-match": '"v-1"', "if-modified-since": EARLIER }, 304],
    [{ "if-none-match": '"v-2"', "if-modified-since": LATER }, undefined],
    [{ "if-match": '"v-1"', "if-unmodified-since": EARLIER }, undefined],
    [{ "if-match": '"v-2"', "if-unmodified-since": LATER }, 412],
    [{ "if-match": '"v-2"', "if-none-match": '"v-1"' }, 412],
    [{ "if-match": '"v-1"', "if-none-match": '"v-1"' }, 304],
    [{ "if-unmodified-since": EARLIER, "if-modified-since": LATER }, 412],
    [{ "if-none-match": "" }, undefined],
    [{ "if-match": "" }, 412],
  ])("%j: %p", (fields, outcome) => {
    expect(evaluateConditions(fieldsOf(fields), VERSION)).toBe(outcome as 304); // or any other of them
  });

  test("finds a tag among a thousand, commas and all, and no tag within another", () => {
    const version = { ...VERSION, etag: '"a,b"' };
    const list = Array.from({ length: 1000 }, (_, i) => `"${i}"`).join(", ");
    expect(evaluateConditions(fieldsOf({ "if-none-match": `${list}, "a,b"` }), version)).toBe(304);
    expect(evaluateConditions(fieldsOf({ "if-none-match": `${list}, "a", "b"` }), version)).toBeUndefined();
    expect(evaluateConditions(fieldsOf({ "if-none-match": '"xv-1", "v-1x", "v", "V-1"' }), VERSION)).toBeUndefined();
  });

  test("reads dates in the forms that were, too", () => {
    const form850 = "Sunday, 22-Nov-26 11:30:07 GMT";
    expect(evaluateConditions(fieldsOf({ "if-modified-since": form850 }), VERSION)).toBe(304);
    expect(evaluateConditions(fieldsOf({ "if-modified-since": "Sun Nov 22 11:30:06 2026" }), VERSION)).toBeUndefined();
  });
});

describe("decideRanges", () => {
  const decide = (fields: Fields, method: Method = "GET", now = NOW) =>
    decideRanges(method, fieldsOf(fields), VERSION, now);
  const PART = [{ from: 100, to: 200 }];
  const range = "bytes=100-199";

  test("sends the part to a GET, and the whole to any other method", () => {
    expect(decide({ range })).toEqual(PART);
    expect(decide({ range }, "HEAD")).toBeUndefined(); // RFC 9110 §14.2
    expect(decide({ range: "bytes=1000-" }, "HEAD")).toBeUndefined();
    expect(decide({})).toBeUndefined();
  });

  test.each<[string, ByteRange[] | undefined]>([
    ['"v-1"', PART],
    ['"v-2"', undefined],
    ['W/"v-1"', undefined], // §13.1.5: the comparison is strong
    ["v-1", undefined],
    ["*", undefined],
    ['"v-1", "v-2"', undefined], // it is one tag, not a list
    ["", undefined],
    [EQUAL, PART],
    ["Sunday, 22-Nov-26 11:30:07 GMT", PART],
    [EARLIER, undefined],
    [LATER, undefined], // exactly that date, not "not after" it
    ["soon", undefined],
  ])("If-Range: %s", (ifRange, outcome) => {
    expect(decide({ range, "if-range": ifRange })).toEqual(outcome as ByteRange[]); // or undefined
  });

  test("If-Range with the date of a file that may change within the second is no match", () => {
    expect(decide({ range, "if-range": EQUAL }, "GET", MODIFIED)).toBeUndefined();
    expect(decide({ range, "if-range": EQUAL }, "GET", MODIFIED + 999)).toBeUndefined();
    expect(decide({ range, "if-range": EQUAL }, "GET", MODIFIED + 1000)).toEqual(PART);
    expect(decide({ range, "if-range": '"v-1"' }, "GET", MODIFIED)).toEqual(PART); // a tag is none the worse
  });

  test("If-Range that does not match makes an unsatisfiable range one that is not there", () => {
    expect(decide({ range: "bytes=1000-" })).toBe("unsatisfiable");
    expect(decide({ range: "bytes=1000-", "if-range": '"v-1"' })).toBe("unsatisfiable");
    expect(decide({ range: "bytes=1000-", "if-range": '"v-2"' })).toBeUndefined();
  });

  test("If-Range without Range says nothing", () => {
    expect(decide({ "if-range": '"v-1"' })).toBeUndefined();
  });

  test.each(["lines=0-9", "bytes=9-1"])("sends the whole for %s", (value) => {
    expect(decide({ range: value })).toBeUndefined();
  });
});

describe("formatListing", () => {
  const modified = new Date(Date.UTC(2026, 10, 22, 11, 30, 7));
  const entry = (name: string, isFolder = false, size = 1): ListingEntry => ({ name, isFolder, size, modified });
  const hrefs = (page: string) => [...page.matchAll(/<a href="([^"]*)"/g)].map(([, href = ""]) => href);

  /** The names to which a browser would go from the page, decoded. */
  const namesFrom = (page: string) =>
    hrefs(page)
      .map((href) => new URL(href.replaceAll("&amp;", "&"), "http://x/base/folder/"))
      .map(({ origin, pathname, search, hash }) => {
        expect([origin, search, hash]).toEqual(["http://x", "", ""]);
        return decodeURIComponent(pathname);
      });

  const ODD_NAMES = [
    `"><script>alert(1)</script>`,
    "<img src=x onerror=alert(1)>",
    "a&amp;b",
    "it's",
    '"quoted"',
    "a b",
    "a+b",
    "100%",
    "%41",
    "%2e%2e",
    "a?b",
    "a#b",
    "javascript:alert(1)",
    "http:",
    "C:",
    "a:b",
    "--",
    "~",
    "grüße",
    "你好",
    "🙂",
    "\u202egpj.exe",
    "line\nbreak",
    "\x1b[2J",
    "\t",
    "\x7f",
    "\ufeff",
    "`${x}`",
    "\u2028",
  ];

  test("leads to every name, however odd, and to nowhere else", () => {
    const page = formatListing(
      ["folder"],
      ODD_NAMES.map((name) => entry(name)),
      0,
    );
    const names = namesFrom(page);
    expect(names.shift()).toBe("/base/");
    expect(names.toSorted()).toEqual(ODD_NAMES.map((name) => `/base/folder/${name}`).toSorted());
  });

  test("lets no name, and no path, become markup or move text about", () => {
    for (const name of ODD_NAMES) {
      const [plain, odd] = ["x", name].map((text) => formatListing([text], [entry(text)], 0)) as [string, string];
      const tags = (page: string) => page.match(/<\/?[a-z]+/gi);
      expect(tags(odd)).toEqual(tags(plain));
      expect(hrefs(odd).length).toBe(2);
      expect(odd).not.toMatch(/[^\n\t\P{C}]|\u2028/u);
    }
  });

  test("has links that are plain names: nothing in them is a scheme, a host, a query or a path", () => {
    const page = formatListing(
      [],
      ODD_NAMES.map((name) => entry(name, true)),
      0,
    );
    expect(hrefs(page).every((href) => /^[^/:?#"'<>\s]+\/$/.test(href))).toBeTrue();
  });

  test("has folders first, with a slash, then files as people count", () => {
    const entries = [entry("file10"), entry("file9"), entry("b", true), entry("File1"), entry("a"), entry("z10", true)];
    const page = formatListing([], [...entries, entry("z9", true)], 0);
    expect(hrefs(page)).toEqual(["b/", "z9/", "z10/", "a", "File1", "file9", "file10"]);
    expect(page).toContain('<a href="b/"><bdi>b</bdi>/</a> ');
  });

  test("leads up from everywhere but the root", () => {
    expect(hrefs(formatListing([], [], 0))).toEqual([]);
    expect(hrefs(formatListing(["a"], [], 0))).toEqual(["../"]);
    expect(hrefs(formatListing(["a", "b"], [], 0))).toEqual(["../"]);
  });

  test("tells sizes of files, dates, the path, and how much it does not show", () => {
    const page = formatListing(["a", "b <c>"], [entry("file", false, 1536), entry("folder", true, 4096)], 7);
    expect(page).toMatch(/<title>[^<]*b &lt;c&gt;[^<]*<\/title>/);
    expect(page).toMatch(/ title="1,?536 bytes"[^>]*>1\.5 KiB</);
    expect(page).not.toMatch(/4,?096/);
    expect(page).toMatch(/ datetime="2026-11-22T11:30:07(?:\.000)?Z"[^>]*>2026-11-22 11:30/);
    expect(page).toContain("and 7 more");
    expect(formatListing([], [], 0)).not.toContain("more");
    expect(page).toStartWith("<!DOCTYPE html>\n");
  });

  test("has white space between name, size and time, for browsers without styles", () => {
    const page = formatListing([], [entry("file", false, 1536), entry("folder", true)]);
    const text = page.replace(/<li>/g, "\n").replace(/<[^>]*>/g, "");
    expect(text).toContain("\nfile 1.5 KiB 2026-11-22 11:30");
    expect(text).toMatch(/\nfolder\/ +2026-11-22 11:30/);
  });

  test.each([
    [0, 0, "This folder is empty."],
    [0, 1, "1 name that is not UTF-8 is left out. Times are in UTC."],
    [0, 2, "2 names that are not UTF-8 are left out. Times are in UTC."],
    [1, 0, "1 file. Times are in UTC."],
    [2, 1, "2 files. 1 name that is not UTF-8 is left out. Times are in UTC."],
  ])("counts %d files, and %d names that are not UTF-8: %s", (files, unreadable, summary) => {
    const entries = Array.from({ length: files }, (_, i) => entry(`f${i}`));
    expect(formatListing([], entries, 0, unreadable)).toContain(`<p>${summary}</p>`);
  });
});

describe("a connection that sends files", () => {
  const MANY_PIECES = 18 * 262_144;
  const [A, B] = [Buffer.alloc(MANY_PIECES, "a"), Buffer.alloc(400_000, "b")];
  const get = (...lines: string[]) => Buffer.from(`${lines.join("\r\n")}\r\nHost: x\r\n\r\n`);
  const GET_A = get("GET /a HTTP/1.1");
  const GET_B = get("GET /b HTTP/1.1");
  const GET_B_AND_CLOSE = get("GET /b HTTP/1.1", "Connection: close");
  const turns = async (count: number) => {
    for (let i = 0; i < count; i++) await nextTurn();
  };

  /** A server without sockets on two files, with one connection to it. */
  async function connect(room: number) {
    const folder = await temporaryFolder();
    writeFileSync(join(folder.path, "a"), A);
    writeFileSync(join(folder.path, "b"), B);
    await Bun.sleep(20); // a file that has changed within a tick of the clock takes more turns
    const server = new Server(new FileSite(folder.path), "off", () => {});
    const transport = new FakeTransport(room);
    const connection = converse(transport, server);
    const dispose = async () => {
      connection.onClose();
      server.site.sweep?.(Date.now());
      await folder[Symbol.asyncDispose]();
    };
    return { server, transport, connection, folder: folder.path, [Symbol.asyncDispose]: dispose };
  }

  /** The contents of two answers, one after the other. */
  const contents = (written: string) =>
    written
      .split(/HTTP\/1\.1 200 OK\r\n/)
      .slice(1)
      .map((answer) => answer.slice(answer.indexOf("\r\n\r\n") + 4));

  test("is the same however little the kernel takes at once, and keeps nothing of them", async () => {
    for (const room of [5000, 65_537, 262_144, 300_000]) {
      await using all = await connect(room);
      const { server, transport, connection } = all;
      connection.onData(Buffer.concat([GET_B, GET_B_AND_CLOSE]));
      for (let i = 0; !transport.calls.includes("shutdown") && i < 10_000; i++) {
        await turns(1);
        expect(server.waitingBytes).toBeLessThan(2000);
        transport.room = room;
        connection.wake("room");
      }
      const [first = "", second = "", ...more] = contents(transport.written);
      expect([B.equals(Buffer.from(first)), B.equals(Buffer.from(second)), more]).toEqual([true, true, []]);
    }
  });

  test("gives the others a turn after some pieces", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    let others = 0;
    all.connection.onData(Buffer.concat([GET_A, GET_B_AND_CLOSE]));
    setImmediate(() => (others = all.transport.written.length));
    while (all.transport.calls.at(-1) !== "shutdown") await turns(1);
    expect(others).toBeGreaterThan(0);
    expect(others).toBeLessThan(A.length);
    expect(contents(all.transport.written).map(({ length }) => length)).toEqual([A.length, B.length]);
    expect(all.transport.calls.at(-1)).toBe("shutdown");
  });

  test("ends when the peer has gone: the file is closed, and no turn is taken any more", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    all.connection.onData(GET_A);
    await Promise.resolve();
    const { length } = all.transport.written;
    all.connection.onClose();
    await turns(3);
    expect(all.transport.written.length).toBe(length);
  });

  test("sends nothing of a file before its head, even if there was room before its turn came", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    const { transport, connection } = all;
    connection.onData(Buffer.concat([GET_A, GET_B_AND_CLOSE])); // 16 pieces, and then others have their turn
    await Promise.resolve();
    transport.room = 2 * 262_144 + 50; // what is left of the first file, and a part of the second one's head
    connection.wake("room");
    await turns(1);
    transport.room = Number.POSITIVE_INFINITY;
    await turns(3);
    connection.wake("room");
    await turns(3);
    expect(contents(transport.written).map(({ length }) => length)).toEqual([A.length, B.length]);
  });

  test("cuts off no peer that takes a little: the kernel may take some though it has not told of room", async () => {
    await using all = await connect(100_000);
    const { server, transport, connection } = all;
    connection.onData(GET_A);
    await turns(1);
    for (let i = 0; i < 20; i++) {
      server.now = connection.deadline + 1;
      transport.room = 5000;
      connection.wake("late");
      await turns(1);
      expect(transport.calls).not.toContain("terminate");
      expect(connection.deadline).toBeGreaterThan(server.now);
    }
    server.now = connection.deadline + 1;
    connection.wake("late");
    await turns(1);
    expect(transport.calls.at(-1)).toBe("terminate");
  });

  test("cuts off a peer that takes nothing, though its file grows each time that this is found out", async () => {
    await using all = await connect(263_000); // the head and the first of two pieces
    const { server, transport, connection, folder } = all;
    connection.onData(GET_B);
    await turns(1);
    appendFileSync(join(folder, "b"), "more");
    server.now = connection.deadline + 1;
    connection.wake("late");
    for (let i = 0; i < 200 && !transport.calls.includes("terminate"); i++) await Bun.sleep(5);
    expect(transport.calls).toEqual(["terminate"]);
  });

  test("does not destroy by a reset what a slow peer has still to read after the last answer", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    const { server, transport, connection } = all;
    connection.onData(GET_B_AND_CLOSE);
    await turns(1);
    expect(transport.calls.at(-1)).toBe("shutdown");
    server.now = connection.deadline + 1;
    connection.wake("late");
    await turns(1);
    expect(transport.calls.slice(-2)).toEqual(["shutdown", "end"]);
  });

  test("cuts off a file that has only grown if its last piece is changed while that is found out", async () => {
    await using all = await connect(263_000); // the head and the first of two pieces
    const { transport, connection, folder } = all;
    connection.onData(GET_B_AND_CLOSE);
    await turns(1);
    appendFileSync(join(folder, "b"), "more");
    await Bun.sleep(20); // the change after it has another time
    transport.room = Number.POSITIVE_INFINITY;
    connection.wake("room");
    await turns(1); // what was sent is read once more, piece by piece
    const fd = openSync(join(folder, "b"), "r+");
    writeSync(fd, "c", B.length - 1);
    closeSync(fd);
    while (transport.calls.at(-1) !== "shutdown") await turns(1);
    const [content = "", ...more] = contents(transport.written);
    expect([content.length < B.length, more]).toEqual([true, []]);
  });

  test("closes a file that took its time to answer, though what was sent before it has failed", async () => {
    await using all = await connect(-1); // the peer has gone
    const areOpen = () =>
      readdirSync("/proc/self/fd").filter((fd) => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`).startsWith(all.folder);
        } catch {
          return false; // that of readdirSync itself
        }
      }).length;
    all.connection.onData(
      Buffer.concat([get("GET /nothing HTTP/1.1"), get("GET /a HTTP/1.1", "Want-Repr-Digest: sha-256=1")]),
    );
    await Promise.resolve();
    expect(areOpen()).toBe(1);
    for (let i = 0; areOpen() > 0 && i < 1000; i++) await turns(1);
    expect(areOpen()).toBe(0);
  });

  test("waits for a digest with nothing of its own in the output that all connections share", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    const other = new FakeTransport();
    const others = converse(other, all.server);
    all.connection.onData(
      Buffer.concat([get("GET /nothing HTTP/1.1"), get("HEAD /a HTTP/1.1", "Want-Repr-Digest: sha-256=1")]),
    );
    await turns(1);
    others.onData(get("OPTIONS /a HTTP/1.1"));
    await turns(1);
    const statuses = ({ written }: FakeTransport) => written.match(/HTTP\/1\.1 \d+/g);
    expect([statuses(all.transport), statuses(other)]).toEqual([["HTTP/1.1 404"], ["HTTP/1.1 204"]]);
    for (let i = 0; statuses(all.transport)?.length === 1 && i < 1000; i++) await turns(1);
    expect(statuses(all.transport)).toEqual(["HTTP/1.1 404", "HTTP/1.1 200"]);
    expect(all.transport.written).toContain("\r\nRepr-Digest: sha-256=:");
    others.onClose();
  });

  test("tells no digest of a file that has changed within a tick of the clock: it may be another version that is sent", async () => {
    await using all = await connect(Number.POSITIVE_INFINITY);
    const { folder, transport, connection } = all;
    const isFresh = () => /\r\nETag: "[\d-]+-[\da-f]{8}-/.test(transport.written);
    for (let i = 0; !isFresh() && i < 1000; i++) {
      transport.written = "";
      writeFileSync(join(folder, "a"), A);
      connection.onData(get("HEAD /a HTTP/1.1", "Want-Repr-Digest: sha-256=1"));
      while (!transport.written.endsWith("\r\n\r\n")) await turns(1);
    }
    expect(isFresh()).toBeTrue();
    expect(transport.written).not.toContain("Repr-Digest");
  });
});

/** server.ts --root from outside: the script and the binary, with curl, wget, ab, nginx, HAProxy and client-robust as peers. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import {
  appendFileSync,
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { EXIT_CODES } from "../client-robust.ts";
import {
  command,
  exchange,
  freePort,
  hasTool,
  LISTENING,
  mortal,
  Peer,
  run,
  runProgram,
  start,
  startCopy,
  startNginx,
  startServer,
  temporaryFolder,
  VARIANTS,
} from "./harness.ts";
import { type Plan, startProxy } from "./proxy.ts";
import { Random } from "./random.ts";

// Where little of the machine is ours, all takes its time; nothing here is about time.
setDefaultTimeout(120_000);
const PATIENCE = ["--head-timeout-ms", "60000"];

const seed = Number(process.env["SEED"] ?? Date.now() % 2 ** 32);

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest();
const reprDigest = (bytes: Uint8Array) => `sha-256=:${sha256(bytes).toString("base64")}:`;

/** The resident memory of a process, in MiB. */
const residentMiB = (pid: number) =>
  Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

/** How many files and sockets a process has open. */
const openFiles = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

interface Answer {
  readonly status: number;
  /** Names in lower case. */
  readonly fields: Readonly<Record<string, string>>;
  readonly content: Buffer;
}

/** Takes a connection's bytes apart into answers to requests of these methods. @throws where there are more bytes, or less */
function parseAnswers(received: string, methods: readonly string[]): Answer[] {
  let at = 0;
  const answers = methods.map((method) => {
    const headTo = received.indexOf("\r\n\r\n", at) + 4;
    const [statusLine = "", ...lines] = received.slice(at, headTo - 4).split("\r\n");
    const status = Number(/^HTTP\/1\.1 (\d{3}) /.exec(statusLine)?.[1]);
    if (headTo < 4 || Number.isNaN(status))
      throw new Error(`no answer: ${JSON.stringify(received.slice(at, at + 300))}`);
    const fields = Object.fromEntries(
      lines.map((line) => [line.slice(0, line.indexOf(":")).toLowerCase(), line.slice(line.indexOf(":") + 1).trim()]),
    );
    const length = method === "HEAD" || status === 204 || status === 304 ? 0 : Number(fields["content-length"]);
    at = headTo + length;
    if (received.length < at) throw new Error(`${received.length} bytes came, not ${at}`);
    return { status, fields, content: Buffer.from(received.slice(headTo, at), "latin1") };
  });
  if (at !== received.length) throw new Error(`${received.length} bytes came, not ${at}`);
  return answers;
}

/** A request as "GET /target", with further field-lines. */
type Asked = readonly [line: string, ...fieldLines: string[]];

const formatRequest = ([line, ...fieldLines]: Asked) =>
  `${[`${line} HTTP/1.1`, "Host: x", ...fieldLines].join("\r\n")}\r\n\r\n`;

const methodOf = ([line]: Asked) => line.split(" ", 1)[0] ?? "";

/** Sends requests down one connection, all at once, and returns the answers; the last one asks for a close. */
async function askAll(port: number, requests: readonly Asked[]): Promise<Answer[]> {
  const bytes = requests.map((asked, i) =>
    formatRequest(i === requests.length - 1 ? [...asked, "Connection: close"] : asked),
  );
  return parseAnswers(await exchange(port, [bytes.join("")]), requests.map(methodOf));
}

async function ask(port: number, ...asked: Asked): Promise<Answer> {
  const [answer] = await askAll(port, [asked]);
  if (answer === undefined) throw new Error("no answer");
  return answer;
}

/**
 * The entity-tag of a file whose last change is no longer within the clock's tick: until then each answer has its own,
 * as another change could go unseen.
 */
async function settledTag(port: number, target: string): Promise<string> {
  for (;;) {
    const [one, two] = await askAll(port, [[`HEAD ${target}`], [`HEAD ${target}`]]);
    if (one?.fields["etag"] !== undefined && one.fields["etag"] === two?.fields["etag"]) return one.fields["etag"];
  }
}

/** A file of which only the marks are there: each is a text at an offset; all else is zeros that take no room. */
function writeSparse(path: string, size: number, marks: Readonly<Record<number, string>> = {}): void {
  const fd = openSync(path, "w");
  ftruncateSync(fd, size);
  for (const [offset, text] of Object.entries(marks)) writeSync(fd, text, Number(offset));
  closeSync(fd);
}

const GIB = 2 ** 30;
const MIB = 2 ** 20;

describe.each(VARIANTS)("server --root (%s)", (variant) => {
  /** A folder with these files, and the server on it. */
  async function serve(files: Readonly<Record<string, string | Uint8Array>> = {}, ...args: string[]) {
    const folder = await temporaryFolder();
    const pathOf = (name: string) => join(folder.path, name);
    for (const [name, content] of Object.entries(files)) {
      mkdirSync(join(pathOf(name), ".."), { recursive: true });
      writeFileSync(pathOf(name), content);
    }
    const server = await startServer(variant, ["--root", folder.path, "--log", "off", ...PATIENCE, ...args]);
    const dispose = async () => {
      await server[Symbol.asyncDispose]();
      await folder[Symbol.asyncDispose]();
    };
    return { ...server, folder: folder.path, pathOf, [Symbol.asyncDispose]: dispose };
  }

  // ── what is answered ──

  test.concurrent("GET and HEAD tell the same of a file; GET brings it, byte by byte", async () => {
    const random = new Random(seed);
    const large = random.bytes(300_000);
    await using server = await serve({ "a.bin": large, "b.txt": "grüße\n", empty: "" });
    for (const [name, content, type] of [
      ["a.bin", large, "application/octet-stream"],
      ["b.txt", Buffer.from("grüße\n"), "text/plain; charset=utf-8"],
      ["empty", Buffer.alloc(0), "application/octet-stream"],
    ] as const) {
      const tag = await settledTag(server.port, `/${name}`);
      const [head, got] = (await askAll(server.port, [[`HEAD /${name}`], [`GET /${name}`]])) as [Answer, Answer];
      const { connection, date, ...fields } = got.fields;
      expect({ status: got.status, fields, connection }).toEqual({
        status: 200,
        fields: {
          "content-type": type,
          "accept-ranges": "bytes",
          etag: tag,
          "last-modified": new Date(statSync(server.pathOf(name)).mtime).toUTCString(),
          "x-content-type-options": "nosniff",
          "content-length": String(content.length),
        },
        connection: "close",
      });
      expect(got.content.equals(content)).toBeTrue();
      const { date: headDate, ...headFields } = head.fields;
      expect([head.status, headFields]).toEqual([200, fields]);
      for (const text of [date, headDate]) expect(Math.abs(Date.parse(text ?? "") - Date.now())).toBeLessThan(30_000);
    }
  });

  test.concurrent("closes after a file of any size when it was asked to", async () => {
    const sizes = [0, 1, 65_536, 65_537, 262_144, 262_145, 3_000_000];
    await using server = await serve(Object.fromEntries(sizes.map((size) => [`f${size}`, new Uint8Array(size)])));
    const answers = await Promise.all(sizes.map((size) => ask(server.port, `GET /f${size}`)));
    expect(answers.map(({ content }) => content.length)).toEqual(sizes);
  });

  test.concurrent("types come from the extension; all text is taken for UTF-8", async () => {
    const types = {
      "a.html": /^text\/html; ?charset=utf-8$/,
      "a.css": /^text\/css; ?charset=utf-8$/,
      "a.txt": /^text\/plain; ?charset=utf-8$/,
      "a.csv": /^text\/csv; ?charset=utf-8$/,
      "a.js": /^text\/javascript; ?charset=utf-8$/,
      "a.json": /^application\/json/,
      "a.svg": /^image\/svg\+xml/,
      "a.png": /^image\/png$/,
      "a.jpg": /^image\/jpeg$/,
      "a.pdf": /^application\/pdf$/,
      "a.wasm": /^application\/wasm$/,
      "a.mp4": /^video\/mp4$/,
      "A.HTML": /^(text\/html; ?charset=utf-8|application\/octet-stream)$/,
      "a.unheard-of": /^application\/octet-stream$/,
      a: /^application\/octet-stream$/,
    };
    await using server = await serve(Object.fromEntries(Object.keys(types).map((name) => [name, "x"])));
    const answers = await askAll(
      server.port,
      Object.keys(types).map((name) => [`GET /${name}`] as const),
    );
    for (const [i, type] of Object.values(types).entries()) expect(answers[i]?.fields["content-type"]).toMatch(type);
  });

  test.concurrent("a folder is its index.html, or its listing; without the slash it is moved", async () => {
    await using server = await serve({ "with/index.html": "<p>index", "without/a b.txt": "x", "a b/c": "" });
    const [index, listing, moved, query, spaced] = (await askAll(server.port, [
      ["GET /with/"],
      ["GET /without/"],
      ["GET /without"],
      ["GET //with?a=b&c"],
      ["HEAD /a%20b"],
    ])) as [Answer, Answer, Answer, Answer, Answer];
    expect([index.status, index.content.toString(), index.fields["content-type"]]).toEqual([
      200,
      "<p>index",
      "text/html; charset=utf-8",
    ]);
    expect(index.fields["etag"]).toBeDefined();
    expect([listing.status, listing.fields["content-type"]]).toEqual([200, "text/html; charset=utf-8"]);
    expect(listing.content.toString()).toContain('<a href="a%20b.txt">');
    expect([moved, query, spaced].map(({ status, fields }) => [status, fields["location"]])).toEqual([
      [301, "without/"],
      [301, "with/?a=b&c"],
      [301, "a%20b/"],
    ]);
    expect((await ask(server.port, "GET /with/index.html")).content.toString()).toBe("<p>index");
    expect((await run(["curl", "-sL", `${server.url}/with`])).stdout).toBe("<p>index");
  });

  test.concurrent("a listing changes with its folder, and HEAD tells its length", async () => {
    await using server = await serve({ a: "" });
    const namesNow = async () =>
      [...(await ask(server.port, "GET /")).content.toString().matchAll(/<a href="([^"]*)"/g)].map(([, name]) => name);
    expect(await namesNow()).toEqual(["a"]);
    writeFileSync(server.pathOf("b"), "");
    expect(await namesNow()).toEqual(["a", "b"]);
    const [head, got] = (await askAll(server.port, [["HEAD /"], ["GET /"]])) as [Answer, Answer];
    expect(head.fields["content-length"]).toBe(String(got.content.length));
  });

  test.concurrent("other methods get 405 with Allow, unknown ones 501; nothing is where nothing is", async () => {
    await using server = await serve({ file: "x", ".hidden": "x", ".git/config": "x", "folder/x": "x" });
    symlinkSync("/etc/passwd", server.pathOf("outside"));
    symlinkSync("/etc", server.pathOf("outer"));
    symlinkSync("file", server.pathOf("inside"));
    symlinkSync("inside", server.pathOf("twice"));
    symlinkSync("loop", server.pathOf("loop"));
    const methods = ["POST", "PUT", "DELETE", "PATCH", "TRACE"];
    const refused = await Promise.all(methods.map((method) => ask(server.port, `${method} /file`)));
    for (const { status, fields } of refused) expect([status, fields["allow"]]).toEqual([405, "GET, HEAD, OPTIONS"]);
    expect((await ask(server.port, "BREW /file")).status).toBe(501);
    const outcomes = [
      ["/file", 200],
      ["/inside", 200],
      ["/twice", 200],
      ["http://elsewhere/file", 200],
      ["/file?query", 200],
      ["/nothing", 404],
      ["/file/", 404],
      ["/file/x", 404],
      ["/outside", 404],
      ["/outer/passwd", 404],
      ["/outer/", 404],
      ["/loop", 404],
      ["/.hidden", 404],
      ["/.git/config", 404],
      ["/%2ehidden", 404],
      [`/${"x".repeat(300)}`, 404],
      ["/../file", 400],
      ["/folder/..%2ffile", 400],
      ["/file%00", 400],
    ] as const;
    const found = outcomes.map(async ([target]) => [target, (await ask(server.port, `GET ${target}`)).status]);
    expect(await Promise.all(found)).toEqual(outcomes.map(([target, status]) => [target, status]));
    const page = (await ask(server.port, "GET /")).content.toString();
    expect([...page.matchAll(/<a href="([^"]*)"/g)].map(([, href]) => href)).toEqual([
      "folder/",
      "file",
      "inside",
      "twice",
    ]);
  });

  test.concurrent("OPTIONS is answered with the methods, for any path and for *", async () => {
    await using server = await serve({ file: "x" });
    const requests = ["OPTIONS /file", "OPTIONS /nothing", "OPTIONS *", "GET /file"] as const;
    const answers = await askAll(
      server.port,
      requests.map((line) => [line] as const),
    );
    expect(answers.map(({ status, fields }) => [status, fields["allow"]])).toEqual([
      ...Array(3).fill([204, "GET, HEAD, OPTIONS"]),
      [200, undefined],
    ]);
  });

  test.concurrent(
    "dot segments are resolved, a backslash is a part of a name, /.well-known/ is not hidden",
    async () => {
      const files = {
        "sub/f": "sub",
        f: "f",
        "a\\x2db": "unit",
        ".well-known/security.txt": "Contact: x",
        ".env": "x",
      };
      await using server = await serve(files);
      const asked = [
        ["/./f", 200, "f"],
        ["/sub/../f", 200, "f"],
        ["/sub/./%2e/f", 200, "sub"],
        ["/nowhere/../sub/f", 200, "sub"],
        ["/a%5Cx2db", 200, "unit"],
        ["/a\\x2db", 200, "unit"],
        ["/.well-known/security.txt", 200, "Contact: x"],
        ["/sub/../.env", 404],
        ["/.well-known/../.env", 404],
        ["/sub/../../f", 400],
      ] as const;
      for (const [target, status, content] of asked) {
        const answer = await ask(server.port, `GET ${target}`);
        expect([target, answer.status]).toEqual([target, status]);
        if (content !== undefined) expect(answer.content.toString()).toBe(content);
      }
      const page = (await ask(server.port, "GET /")).content.toString();
      expect([...page.matchAll(/<a href="([^"]*)"/g)].map(([, href]) => href)).toEqual(["sub/", "a%5Cx2db", "f"]);
    },
  );

  test.concurrent("names that are not UTF-8 are counted on the page", async () => {
    await using server = await serve({});
    writeFileSync(Buffer.from(`${server.folder}/\xff`, "latin1"), "x");
    const page = (await ask(server.port, "GET /")).content.toString();
    expect(page).toContain("1 name that is not UTF-8 is left out.");
    expect(page).not.toContain("This folder is empty");
  });

  test.concurrent("a root that is a link, or is replaced, is the folder of a moment later", async () => {
    await using folder = await temporaryFolder();
    const at = (name: string) => join(folder.path, name);
    for (const version of ["1", "2"]) {
      mkdirSync(at(`releases/${version}/sub`), { recursive: true });
      for (const name of ["v", "sub/v", `only${version}`])
        writeFileSync(at(`releases/${version}/${name}`), `release ${version}`);
    }
    symlinkSync("../1/v", at("releases/2/old"));
    mkdirSync(at("releases/1/shared"));
    writeFileSync(at("releases/1/shared/v"), "shared");
    symlinkSync("../1/shared", at("releases/2/shared"));
    symlinkSync("releases/1", at("current"));
    await using server = await startServer(variant, ["--root", at("current"), "--log", "off", ...PATIENCE]);
    const get = async (target: string) => {
      const { status, content } = await ask(server.port, `GET ${target}`);
      return status === 200 ? content.toString() : status;
    };
    expect(await get("/v")).toBe("release 1");
    await settledTag(server.port, "/shared/v"); // from now on it is known
    expect(await get("/shared/v")).toBe("shared");
    symlinkSync("releases/2", at("next"));
    renameSync(at("next"), at("current"));
    // Within a moment, a link to the old root leaves the new one, though nothing else is asked for.
    while ((await get("/old")) !== 404) await Bun.sleep(50);
    expect(await get("/v")).toBe("release 2");
    expect([await get("/sub/v"), await get("/only2"), await get("/only1")]).toEqual(["release 2", "release 2", 404]);
    expect(await get("/")).toContain('href="only2"');
    expect(await get("/shared/v")).toBe(404); // a link that leaves the new root
    rmSync(at("releases/1"), { recursive: true });
    expect(await get("/v")).toBe("release 2");
    rmSync(at("releases/2"), { recursive: true });
    expect([await get("/v"), await get("/")]).toEqual([404, 404]);
    mkdirSync(at("releases/2"));
    writeFileSync(at("releases/2/v"), "again");
    expect(await get("/v")).toBe("again");
  });

  test.concurrent(
    "a file that is moved out of the root is not found by a link in its place, asked for before or not",
    async () => {
      await using server = await serve({ file: "x", "folder/asked": "x", "folder/unasked": "x" });
      await using elsewhere = await temporaryFolder();
      for (const name of ["file", "folder/asked"]) {
        await settledTag(server.port, `/${name}`); // from now on it is known
        expect((await ask(server.port, `GET /${name}`)).status).toBe(200);
      }
      for (const name of ["file", "folder"]) {
        renameSync(server.pathOf(name), join(elsewhere.path, name));
        symlinkSync(join(elsewhere.path, name), server.pathOf(name));
      }
      const statuses = ["/file", "/folder/unasked", "/folder/"].map(async (target) => [
        target,
        (await ask(server.port, `GET ${target}`)).status,
      ]);
      expect(await Promise.all(statuses)).toEqual([
        ["/file", 404],
        ["/folder/unasked", 404],
        ["/folder/", 404],
      ]);
      writeFileSync(join(elsewhere.path, "folder/asked"), "y");
      expect((await ask(server.port, "GET /folder/asked")).status).toBe(404);
    },
  );

  test.concurrent("a time of 0 or 1, which says nothing, is no Last-Modified", async () => {
    await using server = await serve({ zero: "0", one: "1", two: "2" });
    for (const [i, name] of ["zero", "one", "two"].entries()) utimesSync(server.pathOf(name), i, i);
    const dates = ["zero", "one", "two"].map(async (name) => {
      const { fields } = await ask(server.port, `HEAD /${name}`);
      return fields["last-modified"];
    });
    expect(await Promise.all(dates)).toEqual([undefined, undefined, "Thu, 01 Jan 1970 00:00:02 GMT"]);
    const since = "If-Modified-Since: Fri, 02 Jan 1970 00:00:00 GMT";
    expect((await ask(server.port, "GET /one", since)).status).toBe(200);
    expect((await ask(server.port, "GET /two", since)).status).toBe(304);
    const range = await ask(server.port, "GET /one", "Range: bytes=0-0", "If-Range: Thu, 01 Jan 1970 00:00:01 GMT");
    expect(range.status).toBe(200);
  });

  test.concurrent("names with odd characters are listed and found", async () => {
    const names = [
      "a b",
      "100%",
      "%41",
      "a?b",
      "a#b",
      "a&b;c=d",
      'it\'s "quoted"',
      "<i>",
      "grüße 你好 🙂",
      "a:b",
      "--x",
    ];
    await using server = await serve(Object.fromEntries(names.map((name) => [name, `this is ${name}`])));
    const page = (await ask(server.port, "GET /")).content.toString();
    const hrefs = [...page.matchAll(/<a href="([^"]*)"/g)].map(([, href = ""]) => href);
    expect(hrefs.map(decodeURIComponent).toSorted()).toEqual(names.toSorted());
    const answers = await askAll(
      server.port,
      hrefs.map((href) => [`GET /${href}`] as const),
    );
    expect(answers.map(({ content }) => content.toString()).toSorted()).toEqual(
      names.map((name) => `this is ${name}`).toSorted(),
    );
  });

  // ── conditions and ranges ──

  test.concurrent("304, 412 and 416 say what RFC 9110 asks of them", async () => {
    await using server = await serve({ file: "0123456789" });
    utimesSync(server.pathOf("file"), 1_000_000_000, 1_000_000_000);
    const tag = await settledTag(server.port, "/file");
    const date = "Sun, 09 Sep 2001 01:46:40 GMT";
    const [byTag, byDate, weakly, part, again] = (await askAll(server.port, [
      ["GET /file", `If-None-Match: ${tag}`],
      ["HEAD /file", `If-Modified-Since: ${date}`],
      ["GET /file", `If-None-Match: "x", W/${tag}`, "If-Modified-Since: Sat, 08 Sep 2001 01:46:40 GMT"],
      ["GET /file", `If-Match: ${tag}`, "Range: bytes=2-4", `If-Range: ${date}`],
      ["GET /file", 'If-None-Match: "x"', `If-Modified-Since: ${date}`, "Range: bytes=2-4", 'If-Range: "x"'],
    ])) as [Answer, Answer, Answer, Answer, Answer];
    for (const { status, fields, content } of [byTag, byDate, weakly]) {
      expect([status, fields["etag"], fields["last-modified"], content.length]).toEqual([304, tag, date, 0]);
      expect(fields["content-length"] ?? "10").toBe("10"); // §15.4.5: that of the 200, or none
    }
    expect([part.status, part.fields["content-range"], part.content.toString()]).toEqual([206, "bytes 2-4/10", "234"]);
    expect([part.fields["etag"], part.fields["content-length"]]).toEqual([tag, "3"]);
    expect([again.status, again.content.toString()]).toEqual([200, "0123456789"]);

    for (const field of ['If-Match: "x"', `If-Match: W/${tag}`, "If-Unmodified-Since: Sat, 08 Sep 2001 01:46:40 GMT"])
      expect((await ask(server.port, "GET /file", field, "Range: bytes=20-")).status).toBe(412);
    const beyond = await ask(server.port, "GET /file", "Range: bytes=10-");
    expect([beyond.status, beyond.fields["content-range"], beyond.fields["etag"]]).toEqual([416, "bytes */10", tag]);
    // §13.2.1: where the answer would be no 2xx anyway, conditions mean nothing.
    expect((await ask(server.port, "GET /nothing", "If-Match: *")).status).toBe(404);
    expect((await ask(server.port, "POST /file", "If-None-Match: *")).status).toBe(405);
  });

  test.concurrent("several ranges are multipart/byteranges, each with its place, in the order asked for", async () => {
    await using server = await serve({ "file.txt": "0123456789", empty: "" });
    const [several, swapped, joined, many, empty, head, beyond, old] = (await askAll(server.port, [
      ["GET /file.txt", "Range: bytes=0-1, 5-6"],
      ["GET /file.txt", "Range: bytes=-1,0-0"],
      ["GET /file.txt", "Range: bytes=3-4,0-2,20-"],
      ["GET /file.txt", `Range: bytes=${Array(51).fill("0-0").join(",")}`],
      ["GET /empty", "Range: bytes=0-"],
      ["HEAD /file.txt", "Range: bytes=0-1,5-6"],
      ["GET /file.txt", "Range: bytes=10-,20-30"],
      ["GET /file.txt", "Range: bytes=0-1,5-6", 'If-Range: "x"'],
    ])) as [Answer, Answer, Answer, Answer, Answer, Answer, Answer, Answer];
    const partsOf = ({ status, fields, content }: Answer) => {
      const [, boundary = ""] =
        /^multipart\/byteranges; boundary=([-0-9a-f]{36})$/.exec(fields["content-type"] ?? "") ?? [];
      expect([status, fields["content-range"], boundary]).toEqual([206, undefined, expect.stringMatching(/./)]);
      const [preamble, ...parts] = content.toString().split(`\r\n--${boundary}`);
      expect([preamble, parts.pop()]).toEqual(["", "--\r\n"]);
      const about = "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Range: bytes ";
      expect(parts.every((part) => part.startsWith(about))).toBeTrue();
      return parts.map((part) => part.slice(about.length));
    };
    expect(partsOf(several)).toEqual(["0-1/10\r\n\r\n01", "5-6/10\r\n\r\n56"]);
    expect(partsOf(swapped)).toEqual(["9-9/10\r\n\r\n9", "0-0/10\r\n\r\n0"]);
    expect(several.fields["etag"]).toBeDefined();
    expect([joined.status, joined.fields["content-range"], joined.content.toString()]).toEqual([
      206,
      "bytes 0-4/10",
      "01234",
    ]);
    expect([many, old].map(({ status, content }) => [status, content.toString()])).toEqual(
      Array(2).fill([200, "0123456789"]),
    );
    expect([empty.status, head.status, head.fields["content-length"], beyond.status]).toEqual([200, 200, "10", 416]);
  });

  test.concurrent("python takes several ranges of a large file apart as a message with parts", async () => {
    const content = new Random(seed).bytes(3_000_000);
    await using server = await serve({ file: content });
    const code = `
import email, hashlib, sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Range": "bytes=2000000-,0-999999"})
with urllib.request.urlopen(request) as answer:
    head = "Content-Type: %s\\r\\n\\r\\n" % answer.headers["Content-Type"]
    message = email.message_from_bytes(head.encode() + answer.read())
for part in message.get_payload():
    print(part["Content-Range"], hashlib.sha256(part.get_payload(decode=True)).hexdigest())`;
    const { stdout, stderr } = await run(["python3", "-c", code, `${server.url}/file`]);
    const hex = (from: number, to: number) => sha256(content.subarray(from, to)).toString("hex");
    expect([stderr, stdout.trim().split("\n")]).toEqual([
      "",
      [`bytes 2000000-2999999/3000000 ${hex(2_000_000, 3_000_000)}`, `bytes 0-999999/3000000 ${hex(0, 1_000_000)}`],
    ]);
  });

  test.concurrent("fields of one name count together, in any case, wherever they stand", async () => {
    await using server = await serve({ file: "0123456789" });
    const tag = await settledTag(server.port, "/file");
    const answers = await askAll(server.port, [
      ["GET /file", 'IF-NONE-MATCH: "x"', "Accept: */*", `if-none-match:${tag} \t`],
      ["GET /file", "rAnGe:bytes=1-1"],
      ["GET /file", "Range: bytes=1-1", "Range: 3-3"],
    ]);
    expect(answers.map(({ status }) => status)).toEqual([304, 206, 206]);
    expect(answers[2]?.content.toString()).toContain("Content-Range: bytes 3-3/10\r\n\r\n3\r\n");
  });

  test.concurrent(`random ranges are the file's bytes (SEED=${seed})`, async () => {
    const random = new Random(seed);
    const sizes = [1, 2, 1000, 65_536, 65_537, 700_000];
    const contents = sizes.map((size) => random.bytes(size));
    await using server = await serve(Object.fromEntries(contents.map((content, i) => [`f${i}`, content])));
    for (const [i, content] of contents.entries()) {
      const size = content.length;
      const asked = Array.from({ length: 60 }, () => {
        const from = random.below(size);
        // Short ones as a rule: of a large file a hundred long parts would take their time.
        const to = random.once(10) ? size + random.below(9) : Math.min(size, from + 1 + random.below(5000));
        const suffix = 1 + random.below(Math.min(size + 5, 5000));
        if (random.once(4)) return { value: `bytes=-${suffix}`, from: Math.max(0, size - suffix), to: size };
        if (random.once(10)) return { value: `bytes=${from}-`, from, to: size };
        return { value: `bytes=${from}-${to - 1}`, from, to: Math.min(to, size) };
      });
      const answers = await askAll(
        server.port,
        asked.map(({ value }) => [`GET /f${i}`, `Range: ${value}`] as const),
      );
      for (const [n, { value, from, to }] of asked.entries()) {
        const { status, fields, content: part } = answers[n] as Answer; // as many as were asked for
        const isRight = part.equals(content.subarray(from, to));
        expect([value, status, fields["content-range"], isRight]).toEqual([
          value,
          206,
          `bytes ${from}-${to - 1}/${size}`,
          true,
        ]);
      }
    }
  });

  test.concurrent("an ETag names bytes: it changes with them, whatever size and time say", async () => {
    await using server = await serve({ file: "aaaa", other: "aaaa" });
    const path = server.pathOf("file");
    const seen = new Set([await settledTag(server.port, "/file"), await settledTag(server.port, "/other")]);
    expect(seen.size).toBe(2);
    const { atime, mtime } = statSync(path);
    for (const content of ["bbbb", "cccc", "dddd"]) {
      writeFileSync(path, content);
      utimesSync(path, atime, mtime); // as touch -r, or cp -p, would set it
      const got = await ask(server.port, "GET /file");
      expect([got.content.toString(), seen.has(got.fields["etag"] ?? "")]).toEqual([content, false]);
      seen.add(got.fields["etag"] ?? "");
    }
    // As quickly as it goes: no two contents ever share a tag.
    const tags = new Map<string, string>();
    for (let i = 0; i < 40; i++) {
      writeFileSync(path, String(1000 + i));
      const [one, two] = (await askAll(server.port, [["GET /file"], ["GET /file"]])) as [Answer, Answer];
      for (const { fields, content } of [one, two]) {
        const tag = fields["etag"] ?? "";
        expect([tag, content.toString()]).toEqual([tag, String(1000 + i)]);
        expect(tags.get(tag) ?? content.toString()).toBe(content.toString());
        tags.set(tag, content.toString());
      }
    }
  });

  test.concurrent("a file that is replaced by another is another version at once", async () => {
    await using server = await serve({ file: "old", next: "new" });
    const tag = await settledTag(server.port, "/file");
    expect((await run(["mv", server.pathOf("next"), server.pathOf("file")])).exitCode).toBe(0);
    const { status, content } = await ask(server.port, "GET /file", `If-None-Match: ${tag}`);
    expect([status, content.toString()]).toEqual([200, "new"]);
  });

  test.concurrent("two servers on one folder give a file one ETag", async () => {
    await using server = await serve({ file: "x" });
    const other = await startServer(variant === "script" ? "binary" : "script", ["--root", server.folder]);
    await using _ = other;
    const tag = await settledTag(server.port, "/file");
    expect(await settledTag(other.port, "/file")).toBe(tag);
    expect((await ask(other.port, "GET /file", `If-None-Match: ${tag}`)).status).toBe(304);
  });

  // ── digests ──

  test.concurrent("Repr-Digest is that of the whole, for GET, HEAD and parts, where it is wanted", async () => {
    const random = new Random(seed);
    const large = random.bytes(300_000);
    await using server = await serve({ small: "small", large, empty: "" });
    for (const [name, content] of [
      ["small", Buffer.from("small")],
      ["large", large],
      ["empty", Buffer.alloc(0)],
    ] as const) {
      const answers = await askAll(server.port, [
        [`GET /${name}`, "Want-Repr-Digest: sha-256=10"],
        [`HEAD /${name}`, "Want-Repr-Digest: sha-512=3, sha-256=1, unixsum=0"],
        [`GET /${name}`, "Range: bytes=-2", "want-repr-digest: sha-512=9", "Want-Repr-Digest: sha-256=2"],
      ]);
      expect(answers.map(({ fields }) => fields["repr-digest"])).toEqual(Array(3).fill(reprDigest(content)));
      expect(answers[2]?.content.equals(content.subarray(-2))).toBeTrue();
    }
    const without = await askAll(server.port, [
      ["GET /small"],
      ["GET /small", "Want-Repr-Digest: sha-256=0"],
      ["GET /small", "Want-Repr-Digest: sha-512=10"],
      ["GET /small", "Want-Repr-Digest: nonsense!"],
      ["GET /small", "Want-Content-Digest: sha-256=10"],
    ]);
    expect(without.map(({ fields }) => fields["repr-digest"])).toEqual(Array(5).fill(undefined));
  });

  test.concurrent("a digest is of the version that is sent: a changed file has another", async () => {
    await using server = await serve({ file: "aaaa" });
    const path = server.pathOf("file");
    const { atime, mtime } = statSync(path);
    for (const content of ["bbbb", "cccc", "dddd", "eeeee"]) {
      writeFileSync(path, content);
      utimesSync(path, atime, mtime);
      const answers = () => askAll(server.port, Array(3).fill(["GET /file", "Want-Repr-Digest: sha-256=1"]));
      const digest = reprDigest(Buffer.from(content));
      // Within a tick of the clock it may change once more unseen: then it has no digest yet.
      for (const { fields, content: sent } of await answers())
        expect([sent.toString(), fields["repr-digest"] ?? digest]).toEqual([content, digest]);
      await settledTag(server.port, "/file");
      for (const { fields, content: sent } of await answers())
        expect([sent.toString(), fields["repr-digest"]]).toEqual([content, digest]);
    }
  });

  // ── other peers ──

  test.concurrent("curl resumes, and takes parts in all forms of -r", async () => {
    const random = new Random(seed);
    const content = random.bytes(500_000);
    await using server = await serve({ file: content });
    await using folder = await temporaryFolder();
    const out = join(folder.path, "out");
    const curl = (...args: string[]) =>
      run(["curl", "-s", "-o", out, "-w", "%{http_code}", ...args, `${server.url}/file`]);
    for (const [range, from, to] of [
      ["0-0", 0, 1],
      ["100-199999", 100, 200_000],
      ["499999-", 499_999, 500_000],
      ["-7", 499_993, 500_000],
      ["400000-9999999", 400_000, 500_000],
    ] as const) {
      expect((await curl("-r", range)).stdout).toBe("206");
      expect(readFileSync(out).equals(content.subarray(from, to))).toBeTrue();
    }
    expect((await curl("-r", "0-1,2-499998,499999-")).stdout).toBe("206"); // ranges that touch are one
    expect(readFileSync(out).equals(content)).toBeTrue();
    expect((await curl("-r", "500000-")).stdout).toBe("416");

    writeFileSync(out, content.subarray(0, 123_456));
    expect((await curl("-C", "-")).stdout).toBe("206");
    expect(readFileSync(out).equals(content)).toBeTrue();
  });

  test.concurrent("curl keeps its copy by tag and by date", async () => {
    await using server = await serve({ file: "first" });
    await using folder = await temporaryFolder();
    const [out, tags] = [join(folder.path, "out"), join(folder.path, "tags")];
    const past = new Date(Date.now() - 60_000); // a time to come would be shown as now
    utimesSync(server.pathOf("file"), past, past);
    await settledTag(server.port, "/file");
    const byTag = ["--etag-compare", tags, "--etag-save", tags];
    const curl = (...args: string[]) =>
      run(["curl", "-s", "-R", "-o", out, "-w", "%{http_code}", ...args, `${server.url}/file`]);
    expect((await curl(...byTag)).stdout).toBe("200");
    expect((await curl(...byTag)).stdout).toBe("304");
    expect((await curl("-z", out)).stdout).toBe("304"); // -R has given the copy the time of the file
    expect(readFileSync(out, "utf8")).toBe("first");
    const { atime, mtime } = statSync(server.pathOf("file"));
    writeFileSync(server.pathOf("file"), "other");
    utimesSync(server.pathOf("file"), atime, mtime);
    expect((await curl(...byTag)).stdout).toBe("200");
    expect(readFileSync(out, "utf8")).toBe("other");
    utimesSync(server.pathOf("file"), atime, new Date(mtime.getTime() + 2000));
    expect((await curl("-z", out)).stdout).toBe("200");
    expect((await curl("-z", `-${mtime.toUTCString()}`)).stdout).toBe("412"); // If-Unmodified-Since
  });

  test.concurrent.if(hasTool("wget"))("wget -c resumes, knows when it is done, and mirrors a listing", async () => {
    const random = new Random(seed);
    const content = random.bytes(500_000);
    await using server = await serve({ file: content, "sub/a b": "1", "sub/c": "2" });
    await using folder = await temporaryFolder();
    const wget = (...args: string[]) => run(["wget", "-nv", ...args], { cwd: folder.path });
    const out = join(folder.path, "file");
    writeFileSync(out, content.subarray(0, 123_456));
    expect((await wget("-c", `${server.url}/file`)).exitCode).toBe(0);
    expect(readFileSync(out).equals(content)).toBeTrue();
    expect((await wget("-c", `${server.url}/file`)).exitCode).toBe(0);
    expect(readFileSync(out).equals(content)).toBeTrue();
    expect((await wget("-r", "-np", "-nH", "-N", `${server.url}/sub/`)).exitCode).toBe(0);
    expect(readFileSync(join(folder.path, "sub/a b"), "utf8")).toBe("1");
    expect(readFileSync(join(folder.path, "sub/c"), "utf8")).toBe("2");
  });

  test.concurrent("HTTP/1.0 clients get whole files, parts and listings, with and without keep-alive", async () => {
    const random = new Random(seed);
    const content = random.bytes(200_000);
    await using server = await serve({ file: content, small: "small" });
    const old = (target: string, ...lines: string[]) => `${[`GET ${target} HTTP/1.0`, ...lines].join("\r\n")}\r\n\r\n`;
    const [once] = parseAnswers(await exchange(server.port, [old("/file")]), ["GET"]);
    expect([once?.fields["connection"], once?.content.equals(content)]).toEqual(["close", true]);
    const kept = parseAnswers(
      await exchange(server.port, [
        old("/file", "Connection: keep-alive"),
        old("/small", "Connection: keep-alive", "Range: bytes=1-2"),
        old("/file"),
      ]),
      ["GET", "GET", "GET"],
    );
    expect(kept.map(({ status, fields }) => [status, fields["connection"]])).toEqual([
      [200, "keep-alive"],
      [206, "keep-alive"],
      [200, "close"],
    ]);
    expect(kept[2]?.content.equals(content)).toBeTrue();
    expect((await run(["curl", "-s0", `${server.url}/small`])).stdout).toBe("small");
    if (!hasTool("ab")) return;
    const { stdout } = await run(["ab", "-q", "-n", "500", "-c", "10", `http://127.0.0.1:${server.port}/file`]);
    expect(stdout).toMatch(/Complete requests: +500\n/);
    expect(stdout).toMatch(/Failed requests: +0\n/);
    expect(stdout).not.toContain("Non-2xx");
  });

  test.concurrent("client-robust gets a file, goes on after a kill -9 and after a cut, and verifies it", async () => {
    const random = new Random(seed);
    const content = random.bytes(2_000_000);
    await using server = await serve({ file: content });
    await using folder = await temporaryFolder();
    const out = join(folder.path, "out");
    await settledTag(server.port, "/file");
    const plans: Plan[] = [{ bytes: 700_000, end: "stall" }, { bytes: 500_000, end: "close" }, {}];
    using proxy = startProxy(server.port, (connection) => plans[connection] ?? {});
    const hex = sha256(content).toString("hex");
    const argv = [
      ...(await command("client-robust", variant)),
      "-s",
      "--sha256",
      hex,
      "-o",
      out,
      `http://localhost:${proxy.port}/file`,
    ];
    await using first = Bun.spawn(mortal(argv), { stdout: "ignore", stderr: "ignore" });
    const keptBytes = () =>
      Math.max(0, ...readdirSync(folder.path).map((name) => statSync(join(folder.path, name)).size));
    while (keptBytes() < 600_000) await Bun.sleep(5);
    first.kill("SIGKILL");
    await first.exited;
    const kept = keptBytes();
    const second = await run(argv);
    expect([second.stderr, second.exitCode, readFileSync(out).equals(content)]).toEqual(["", 0, true]);
    expect(proxy.passages.map(({ request }) => /\r\nRange: (.*)\r\n/.exec(request)?.[1])).toEqual([
      undefined,
      `bytes=${kept}-`,
      expect.stringMatching(/^bytes=\d+-$/),
    ]);
    expect(readdirSync(folder.path)).toEqual(["out"]);
  });

  test.concurrent("client-robust accepts no byte that the server's digest does not cover", async () => {
    const random = new Random(seed);
    const content = random.bytes(1_000_000);
    await using server = await serve({ file: content });
    await settledTag(server.port, "/file");
    const flipByte = (bytes: Buffer, offset: number, at: number) => {
      if (at >= offset && at < offset + bytes.length) bytes[at - offset] = (bytes[at - offset] ?? 0) ^ 1;
    };
    const flip: Plan = { alter: (bytes, offset) => flipByte(bytes, offset, 500_000) };
    const lie: Plan = {
      alter: (bytes, offset) => {
        const at = offset === 0 ? bytes.indexOf("Repr-Digest: sha-256=:") : -1;
        if (at >= 0) bytes.write("AAAA", at + "Repr-Digest: sha-256=:".length);
      },
    };
    const cases = [
      [flip, 1, EXIT_CODES.ok],
      [lie, 1, EXIT_CODES.ok],
      [flip, 99, EXIT_CODES.digest],
      [lie, 99, EXIT_CODES.digest],
    ] as const;
    const tried = cases.map(async ([plan, times, exitCode]) => {
      await using folder = await temporaryFolder();
      const out = join(folder.path, "out");
      using proxy = startProxy(server.port, (connection) => (connection < times ? plan : {}));
      const url = `http://localhost:${proxy.port}/file`;
      const got = await runProgram("client-robust", variant, ["-s", "--retry", "1", "-o", out, url]);
      expect([got.exitCode, readdirSync(folder.path)]).toEqual([exitCode, exitCode === 0 ? ["out"] : []]);
      if (exitCode === 0) expect(readFileSync(out).equals(content)).toBeTrue();
    });
    await Promise.all(tried);
  });

  test.concurrent("client-robust never mixes two versions of a file that changes while it is away", async () => {
    const random = new Random(seed);
    const [older, newer] = [random.bytes(1_000_000), random.bytes(1_000_000)];
    await using server = await serve({ file: older });
    const path = server.pathOf("file");
    const { atime, mtime } = statSync(path);
    await settledTag(server.port, "/file");
    await using folder = await temporaryFolder();
    const out = join(folder.path, "out");
    using proxy = startProxy(server.port, (connection) => {
      if (connection === 0) return { bytes: 400_000, end: "close" };
      writeFileSync(path, newer);
      utimesSync(path, atime, mtime);
      return {};
    });
    const got = await runProgram("client-robust", variant, ["-s", "-o", out, `http://localhost:${proxy.port}/file`]);
    expect([got.stderr, got.exitCode, readFileSync(out).equals(newer)]).toEqual(["", 0, true]);
    expect(proxy.passages.length).toBe(2);
  });

  // ── much at once ──

  test.concurrent(
    "ten thousand small files over one connection, and over eight that wait for each answer",
    async () => {
      const count = 10_000;
      const folder = await temporaryFolder();
      await using _ = folder;
      const contentOf = (i: number) => `file ${i}`.padEnd(i % 200, ".");
      for (let i = 0; i < count; i++) {
        writeFileSync(join(folder.path, `f${i}`), contentOf(i));
        if (i % 50 === 0) await new Promise((resolve) => setImmediate(resolve)); // other tests go on meanwhile
      }
      await using server = await startServer(variant, ["--root", folder.path, "--log", "off", ...PATIENCE]);
      const all = Array.from({ length: count }, (_, i) => i);
      const answers = await askAll(
        server.port,
        all.map((i) => [`GET /f${i}`] as const),
      );
      expect(answers.filter(({ content }, i) => content.toString() !== contentOf(i))).toEqual([]);

      const waiting = Array.from({ length: 8 }, async (_, n) => {
        using peer = await Peer.connect(server.port);
        for (const i of all.filter((i) => i % 8 === n && i % 10 < 1)) {
          peer.received = "";
          await peer.send(formatRequest([`GET /f${i}`]));
          await peer.waitFor(new RegExp(`\\r\\n\\r\\n${contentOf(i).replaceAll(".", "\\.")}$`));
        }
      });
      await Promise.all(waiting);
    },
  );

  test.concurrent(
    "answers pipelined requests in order: files, parts, digests, listings, whatever each takes",
    async () => {
      const random = new Random(seed);
      const [large, small] = [random.bytes(3_000_000), random.bytes(500)];
      await using server = await serve({ large, small, "folder/a": "" });
      const tag = await settledTag(server.port, "/small");
      const digest = "Want-Repr-Digest: sha-256=5";
      const kinds: readonly (readonly [Asked, (answer: Answer) => boolean])[] = [
        [["GET /small"], ({ status, content }) => status === 200 && content.equals(small)],
        [["GET /large"], ({ status, content }) => status === 200 && content.equals(large)],
        [["GET /small", digest], ({ fields, content }) => fields["repr-digest"] === reprDigest(content)],
        [["HEAD /large", digest], ({ fields }) => fields["repr-digest"] === reprDigest(large)],
        [["GET /large", digest, "Range: bytes=5-9"], ({ content }) => content.equals(large.subarray(5, 10))],
        [
          ["GET /large", "Range: bytes=100000-299999"],
          ({ content }) => content.equals(large.subarray(100_000, 300_000)),
        ],
        [["GET /folder/"], ({ status, content }) => status === 200 && content.includes('href="a"')],
        [["HEAD /folder/"], ({ status, content }) => status === 200 && content.length === 0],
        [["GET /folder"], ({ status }) => status === 301],
        [["GET /small", `If-None-Match: ${tag}`], ({ status }) => status === 304],
      ];
      const chosen = Array.from({ length: 80 }, () => random.pick(kinds));
      const answers = await askAll(
        server.port,
        chosen.map(([asked]) => asked),
      );
      const wrong = chosen.filter(([, isRight], i) => !isRight(answers[i] as Answer)); // as many as were asked for
      expect([seed, wrong.map(([asked]) => asked)]).toEqual([seed, []]);
    },
  );

  test.concurrent(
    "a sparse file of 5 GiB: its length, its bytes beyond 4 GiB, in the memory of any other",
    async () => {
      await using server = await serve({});
      const size = 5 * GIB;
      const marks = { 0: "start", [2 ** 31 - 2]: "at2GiB", [2 ** 32 - 2]: "at4GiB", [size - 3]: "end" };
      writeSparse(server.pathOf("file"), size, marks);
      const [head, around2, around4, end, last] = (await askAll(server.port, [
        ["HEAD /file"],
        ["GET /file", "Range: bytes=2147483646-2147483651"],
        ["GET /file", "Range: bytes=4294967294-4294967299"],
        ["GET /file", "Range: bytes=5368709117-"],
        ["GET /file", "Range: bytes=-1"],
      ])) as [Answer, Answer, Answer, Answer, Answer];
      expect(head.fields["content-length"]).toBe("5368709120");
      expect(around4.fields["content-range"]).toBe("bytes 4294967294-4294967299/5368709120");
      expect([around2, around4, end, last].map(({ content }) => content.toString())).toEqual([
        "at2GiB",
        "at4GiB",
        "end",
        "d",
      ]);
      const before = residentMiB(server.child.pid);
      const argv = ["curl", "-s", "-o", "/dev/null", "-w", "%{size_download}", "-r", "4294967200-4563402751"];
      const curl = Bun.spawn(mortal([...argv, `${server.url}/file`]), { stdout: "pipe" });
      await using _ = curl;
      let most = 0;
      while (curl.exitCode === null) {
        most = Math.max(most, residentMiB(server.child.pid));
        await Bun.sleep(20);
      }
      expect(await new Response(curl.stdout).text()).toBe(String(4_563_402_752 - 4_294_967_200));
      expect(most - before).toBeLessThan(48);
    },
  );

  test.concurrent("two hundred peers that do not read hold up nobody, and cost little", async () => {
    await using server = await serve({ quick: "quick" });
    const size = 16 * MIB;
    writeSparse(server.pathOf("large"), size, { 0: "start", [size - 3]: "end" });
    await settledTag(server.port, "/large");
    const before = residentMiB(server.child.pid);
    const slow = await Promise.all(Array.from({ length: 200 }, () => Peer.connect(server.port)));
    const stopped = slow.map(async (peer) => {
      await peer.send(formatRequest(["GET /large", "Connection: close"]));
      await peer.waitFor(/\r\n\r\nstart/);
      peer.pause();
    });
    await Promise.all(stopped);
    // All of this is answered while each of them still waits for most of its file.
    const quick = await Promise.all(
      Array.from({ length: 20 }, () => askAll(server.port, Array(20).fill(["GET /quick"]))),
    );
    expect(quick.flat().every(({ content }) => content.toString() === "quick")).toBeTrue();
    expect(slow.every(({ received }) => received.length < size)).toBeTrue();
    expect(residentMiB(server.child.pid) - before).toBeLessThan(64);
    // Some go on, and lack nothing; the others leave.
    const [patient, gone] = [slow.slice(0, 3), slow.slice(3)];
    for (const peer of gone) peer[Symbol.dispose]();
    for (const peer of patient) {
      peer.resume();
      expect(await peer.closed).toBe("end");
      const [, content = ""] = peer.received.split("\r\n\r\n", 2);
      expect([content.length, content.endsWith("end")]).toEqual([size, true]);
      peer.received = "";
    }
    // Their files are closed. (The directory that counts them is open while it is read.)
    while (openFiles(server.child.pid) > 60) await Bun.sleep(20);
  });

  // ── life ──

  test.concurrent("the access log tells the bytes of content that were sent, cut or not", async () => {
    await using server = await serve({ small: "0123456789" }, "--log", "access");
    writeSparse(server.pathOf("large"), 64 * MIB);
    const tag = await settledTag(server.port, "/small");
    await askAll(server.port, [
      ["GET /small?1"],
      ["HEAD /small?2"],
      ["GET /small?3", "Range: bytes=2-4"],
      ["GET /small?4", `If-None-Match: ${tag}`],
      ["GET /large?5", "Range: bytes=0-999999"],
    ]);
    using peer = await Peer.connect(server.port);
    await peer.send(formatRequest(["GET /large?6"]));
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    const { length } = peer.received;
    peer[Symbol.dispose]();
    const logged = async (i: number) =>
      (await server.stdout.waitFor(new RegExp(`"(?:GET|HEAD) /\\w+\\?${i} HTTP/1.1" (\\d+ \\d+) `)))[1];
    expect(await Promise.all([1, 2, 3, 4, 5].map(logged))).toEqual([
      "200 10",
      "200 0",
      "206 3",
      "304 0",
      "206 1000000",
    ]);
    const [, cut = ""] = (await logged(6))?.split(" ") ?? [];
    expect(Number(cut)).toBeGreaterThan(length - 1000);
    expect(Number(cut)).toBeLessThan(64 * MIB);
  });

  test.concurrent("a file that only grows is sent as long as it was, again and again", async () => {
    await using server = await serve({});
    const size = 16 * MIB;
    writeSparse(server.pathOf("log"), size, { [size - 3]: "end" });
    const range = `Range: bytes=${MIB}-`;
    for (const [fields, status, length] of [
      [[], 200, size],
      [[], 200, size + 5],
      [[range], 206, size + 10 - MIB],
    ] as const) {
      using peer = await Peer.connect(server.port);
      await peer.send(formatRequest(["GET /log", ...fields, "Connection: close"]));
      await peer.waitFor(/\r\n\r\n\0/);
      peer.pause();
      appendFileSync(server.pathOf("log"), "more\n");
      peer.resume();
      expect(await peer.closed).toBe("end");
      const [answer] = parseAnswers(peer.received, ["GET"]);
      expect([answer?.status, answer?.content.length]).toEqual([status, length]);
      const whole = readFileSync(server.pathOf("log"));
      expect(answer?.content.equals(whole.subarray(whole.length - 5 - length, -5))).toBeTrue();
    }
    // A line every millisecond, while several peers take it.
    const [name, path] = ["busy", server.pathOf("busy")];
    writeSparse(path, size, { 0: "start" });
    const peers = Promise.all(Array.from({ length: 2 }, () => ask(server.port, `GET /${name}`)));
    let isDone = false;
    void peers.finally(() => (isDone = true));
    while (!isDone) {
      appendFileSync(path, "line\n");
      await Bun.sleep(1);
    }
    for (const { content } of await peers)
      expect(content.equals(readFileSync(path).subarray(0, content.length))).toBeTrue();
    expect(server.stderr.text).not.toContain("changed");
  });

  test.concurrent("a file that shrinks or changes while it is sent is never whole", async () => {
    await using server = await serve({});
    const size = 16 * MIB;
    for (const [name, change] of Object.entries({
      shrink: (path: string) => writeSparse(path, 1000),
      change: (path: string) => {
        const fd = openSync(path, "r+");
        writeSync(fd, "other", size - 5);
        closeSync(fd);
      },
    })) {
      const path = server.pathOf(name);
      writeSparse(path, size);
      await settledTag(server.port, `/${name}`); // one that has just changed is sent as it is by then
      using peer = await Peer.connect(server.port);
      await peer.send(formatRequest([`GET /${name}`]));
      await peer.waitFor(/\r\n\r\n\0/);
      peer.pause();
      change(path);
      peer.resume();
      expect(await peer.closed).toBe("end");
      expect(peer.received.length).toBeLessThan(size);
      await server.stderr.waitFor(
        new RegExp(`Error: .*/${name} has changed or cannot be read: the connection is cut off\n`),
      );
    }
    // Whoever asks then gets what is there by then.
    const got = await ask(server.port, "GET /shrink");
    expect([got.status, got.content.length]).toEqual([200, 1000]);
  });

  test.concurrent("no fault is waited for while stdout and stderr are one pipe that nobody empties", async () => {
    await using folder = await temporaryFolder();
    await using other = await temporaryFolder();
    const path = join(folder.path, "large");
    const size = 16 * MIB;
    writeSparse(path, size);
    writeFileSync(join(folder.path, "small"), "small");
    const argv = [...(await command("server", variant)), "--port", "0", "--root", folder.path, ...PATIENCE];
    // The shell becomes the server. Of the FIFO that it holds open, only the ready line is read.
    const script = 'mkfifo fifo; exec 3<>fifo; { read -r line <&3; echo "$line"; } & exec "$@" >fifo 2>&1';
    await using server = await start(["bash", "-c", script, "bash", ...argv], LISTENING, { cwd: other.path });
    const port = Number(server.match[1]);
    expect((await askAll(port, Array(5000).fill(["GET /small"]))).length).toBe(5000); // the log fills the pipe
    using peer = await Peer.connect(port);
    await peer.send(formatRequest(["GET /large"]));
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    writeSparse(path, 1000);
    peer.resume();
    expect(await peer.closed).toBe("end");
    expect(peer.received.length).toBeLessThan(size);
    expect((await ask(port, "GET /small")).content.toString()).toBe("small");
    expect((await ask(port, "GET /")).status).toBe(200); // made in the thread pool
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
  });

  test.concurrent("a file that is removed or replaced while it is sent is sent to its end", async () => {
    await using server = await serve({});
    const size = 16 * MIB;
    writeSparse(server.pathOf("file"), size, { [size - 3]: "end" });
    using peer = await Peer.connect(server.port);
    await peer.send(formatRequest(["GET /file", "Connection: close"]));
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    writeFileSync(server.pathOf("other"), "other");
    expect((await run(["mv", "other", "file"], { cwd: server.folder })).exitCode).toBe(0);
    expect((await ask(server.port, "GET /file")).content.toString()).toBe("other");
    peer.resume();
    await peer.closed;
    expect(peer.received.length - peer.received.indexOf("\r\n\r\n") - 4).toBe(size);
    expect(peer.received).toEndWith("end");
  });

  test.concurrent("SIGTERM lets a download finish, then exits 0", async () => {
    await using server = await serve({}, "--grace-ms", "60000");
    const size = 16 * MIB;
    writeSparse(server.pathOf("file"), size, { [size - 3]: "end" });
    using peer = await Peer.connect(server.port);
    await peer.send(formatRequest(["GET /file"]));
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    server.child.kill("SIGTERM");
    // It has heard when it takes no connection any more.
    while (
      await Peer.connect(server.port).then(
        (other) => (other[Symbol.dispose](), true),
        () => false,
      )
    );
    expect(server.child.exitCode).toBeNull();
    peer.resume();
    expect(await peer.closed).toBe("end");
    expect(peer.received.length - peer.received.indexOf("\r\n\r\n") - 4).toBe(size);
    expect(await server.child.exited).toBe(0);
  });

  test.concurrent("a disk that fails cuts the answer off, and stderr says why", async () => {
    await using folder = await temporaryFolder();
    const file = join(folder.path, "file");
    writeFileSync(file, "x".repeat(200_000));
    const failing = ["strace", "-D", "-f", "-o", "/dev/null", "-P", file, "-e", "inject=pread64:error=EIO"];
    const argv = [...failing, ...(await command("server", variant)), "--port", "0", "--root", folder.path];
    await using server = await start(argv, LISTENING);
    const port = Number(/:(\d+)\n/.exec(server.stderr.text)?.[1]);
    using peer = await Peer.connect(port);
    await peer.send(formatRequest(["GET /file"]));
    expect(await peer.closed).toBe("end");
    expect(peer.received.toString()).toMatch(/^HTTP\/1\.1 200 OK\r\n[^]*\r\n\r\n$/);
    await server.stderr.waitFor(
      /\nError: EIO[^\n]*\nError: .*\/file has changed or cannot be read: the connection is cut off\n/,
    );
  });

  test.concurrent("a file that is there, but cannot be opened now, is 500, not 404, and stderr says why", async () => {
    await using server = await serve({ file: "x" });
    expect((await ask(server.port, "GET /file")).status).toBe(200);
    // While a program has a lease on it, as Samba takes, it cannot be opened without waiting.
    const code = `
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("has it", flush=True)
signal.pause()`;
    {
      await using _ = await start(["python3", "-c", code, server.pathOf("file")], /^has it\n/);
      expect((await ask(server.port, "GET /file")).status).toBe(500);
      await server.stderr.waitFor(/\nError: EAGAIN[^\n]*\/file'\n/);
    }
    expect((await ask(server.port, "GET /file")).status).toBe(200);
    expect((await ask(server.port, "GET /other")).status).toBe(404);
  });

  test.concurrent("a working folder is served whatever bytes its name has", async () => {
    await using folder = await temporaryFolder();
    writeFileSync(join(folder.path, "file"), "found");
    const argv = [...(await command("server", variant)), "--port", "0"];
    const script = `mkdir -p $'caf\\xe9/sub' && cd $'caf\\xe9' && mv ../file sub && exec "$@"`;
    for (const [root, target] of [
      [".", "/sub/file"],
      ["sub", "/file"],
    ] as const) {
      const args = ["bash", "-c", script, "bash", ...argv, "--root", root];
      await using server = await start(args, LISTENING, { cwd: folder.path });
      const port = Number(server.match[1]);
      expect((await ask(port, `GET ${target}`)).content.toString()).toBe("found");
      expect((await ask(port, "GET /")).status).toBe(200);
      await run(["bash", "-c", "mv */sub/file ."], { cwd: folder.path });
    }
  });

  test.concurrent("a folder that cannot be served is one line and exit 1; wrong usage is exit 2", async () => {
    const missing = await runProgram("server", variant, ["--port", "0", "--root", "/nowhere"]);
    expect([missing.stderr, missing.exitCode]).toEqual(["Error: cannot serve /nowhere: ENOENT\n", 1]);
    const file = await runProgram("server", variant, ["--port", "0", "--root", "/etc/passwd"]);
    expect([file.stderr, file.exitCode]).toEqual(["Error: cannot serve /etc/passwd: ENOTDIR\n", 1]);
    for (const args of [["--root", ""], ["--root"], ["--root", "/tmp", "--text", "x"]])
      expect((await runProgram("server", variant, args)).exitCode).toBe(2);
  });

  // ── other servers in front ──

  const conditionsFor = (tag: string, date: string): readonly Asked[] => [
    ["GET /large"],
    ["HEAD /large"],
    ["GET /large", "Range: bytes=100000-299999"],
    ["GET /large", "Range: bytes=-5", `If-Range: ${tag}`],
    ["GET /large", "Range: bytes=-5", 'If-Range: "x"'],
    ["GET /large", `If-None-Match: ${tag}`],
    ["GET /large", `If-Modified-Since: ${date}`],
    ["GET /large", "Want-Repr-Digest: sha-256=1"],
    ["GET /small"],
    ["GET /small", "Range: bytes=1-1"],
    ["GET /empty"],
    ["GET /folder/"],
    ["HEAD /folder/"],
    ["GET /folder"],
  ];

  /** What a proxy has to leave as it is. */
  const essence = ({ status, fields, content }: Answer, omitted: readonly string[]) => {
    const names = ["etag", "last-modified", "content-range", "content-type", "repr-digest", "location"];
    const kept = names.filter((name) => !omitted.includes(name)).map((name) => fields[name]);
    return [status, sha256(content).toString("hex"), content.length, ...kept];
  };

  /** Asks directly and through a server in front, several times, and compares. */
  async function compare(port: number, front: number, omitted: readonly string[] = []): Promise<void> {
    const tag = await settledTag(port, "/large");
    const date = (await ask(port, "HEAD /large")).fields["last-modified"] ?? "";
    const compareOne = async (asked: Asked) => {
      const [direct, through] = await Promise.all([ask(port, ...asked), ask(front, ...asked)]);
      expect([asked, essence(through, omitted)]).toEqual([asked, essence(direct, omitted)]);
    };
    for (let round = 0; round < 3; round++) await Promise.all(conditionsFor(tag, date).map(compareOne));
  }

  const filesBehind = () => ({ large: new Random(seed).bytes(500_000), small: "small", empty: "", "folder/a b": "x" });

  test.concurrent.if(hasTool("nginx"))(
    "nginx in front passes everything on as it is, over connections that it keeps",
    async () => {
      await using server = await serve(filesBehind());
      const location = `location / { proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_redirect off; }
      } upstream origin { server 127.0.0.1:${server.port}; keepalive 4;`; // its end ends the upstream
      await using nginx = await startNginx(server.folder, location);
      await compare(server.port, nginx.port);
    },
  );

  test.concurrent.if(hasTool("nginx"))(
    "nginx in front with a cache makes right parts of what it has kept",
    async () => {
      await using server = await serve(filesBehind());
      await using folder = await temporaryFolder();
      const location = `location / { proxy_pass http://127.0.0.1:${server.port}; proxy_http_version 1.1; proxy_redirect off;
        proxy_cache files; proxy_cache_valid 200 1m; add_header X-Cache $upstream_cache_status; }
      } proxy_cache_path ${folder.path}/cache keys_zone=files:1m; server { listen unix:${folder.path}/unused;`;
      await using nginx = await startNginx(server.folder, location);
      await settledTag(server.port, "/large");
      await ask(nginx.port, "GET /large");
      expect((await ask(nginx.port, "GET /large")).fields["x-cache"]).toBe("HIT");
      // It does not know that an answer to Want-Repr-Digest says more than another.
      await compare(server.port, nginx.port, ["repr-digest"]);
    },
  );

  test.concurrent.if(hasTool("haproxy"))(
    "HAProxy in front passes everything on as it is, over connections that it shares",
    async () => {
      await using server = await serve(filesBehind());
      const front = await freePort();
      const file = server.pathOf(".haproxy.cfg");
      writeFileSync(
        file,
        `global
  maxconn 100
defaults
  mode http
  timeout connect 20s
  timeout client 20s
  timeout server 20s
frontend front
  bind 127.0.0.1:${front}
  default_backend origin
backend origin
  http-reuse always
  server origin 127.0.0.1:${server.port}
`,
      );
      await using _ = await start(["haproxy", "-db", "-V", "-f", file], /Using epoll\(\)/);
      await compare(server.port, front);
    },
  );
});

// ── with constants that a test can reach ──

/** A folder with these files, and a copy of the script on it. */
async function serveCopy(
  changes: Readonly<Record<string, string>>,
  files: Readonly<Record<string, string | Uint8Array>>,
) {
  const folder = await temporaryFolder();
  const pathOf = (name: string) => join(folder.path, name);
  for (const [name, content] of Object.entries(files)) writeFileSync(pathOf(name), content);
  const server = await startCopy(changes, ["--root", folder.path, "--log", "off", ...PATIENCE]);
  const dispose = async () => {
    await server[Symbol.asyncDispose]();
    await folder[Symbol.asyncDispose]();
  };
  return { ...server, pathOf, [Symbol.asyncDispose]: dispose };
}

test.concurrent("a listing is bounded, and says how much there is more", async () => {
  await using server = await serveCopy(
    { "const LISTING_ENTRIES_MAX = 10_000;": "const LISTING_ENTRIES_MAX = 2;" },
    { a: "", b: "", c: "" },
  );
  const page = (await ask(server.port, "GET /")).content.toString();
  expect([page.match(/<a href/g)?.length, page.includes("and 1 more")]).toEqual([2, true]);
});

test.concurrent("an answer goes without the digest that takes too long; a later one has it", async () => {
  await using server = await serveCopy({ "const DIGEST_TIMEOUT_MS = 1000;": "const DIGEST_TIMEOUT_MS = 1;" }, {});
  writeSparse(server.pathOf("file"), 64 * MIB);
  await settledTag(server.port, "/file"); // until then it is a new version each time
  const digest = async () =>
    (await ask(server.port, "HEAD /file", "Want-Repr-Digest: sha-256=1")).fields["repr-digest"];
  expect(await digest()).toBeUndefined();
  let later: string | undefined;
  while ((later = await digest()) === undefined);
  expect(later).toBe(reprDigest(new Uint8Array(64 * MIB)));
});

test.concurrent(
  "where the disk keeps times in whole seconds, an ETag names bytes, and no versions are mixed",
  async () => {
    await using folder = await temporaryFolder();
    const path = join(folder.path, "file");
    const whole = "(stats) => Object.assign(stats, { ctimeMs: floor(stats.ctimeMs), mtimeMs: floor(stats.mtimeMs) })";
    const anchor = "let digestWaiters = 0;";
    const changes = {
      [anchor]: `${anchor}\nconst floor = (ms) => Math.floor(ms / 1000) * 1000;\nconst whole = ${whole};`,
      "const stats = fs.fstatSync(fd);": "const stats = whole(fs.fstatSync(fd));",
      "mtimeMs } = fs.fstatSync(part.fd);": "mtimeMs } = whole(fs.fstatSync(part.fd));",
      "expected = fs.fstatSync(fd);": "expected = whole(fs.fstatSync(fd));",
    };
    await using server = await startCopy(changes, ["--root", folder.path, "--log", "off", ...PATIENCE]);
    /** @returns the second in which that was */
    const write = (content: string | Uint8Array) => {
      writeFileSync(path, content);
      return Math.floor(statSync(path).mtimeMs / 1000);
    };
    for (let isWithin = false; !isWithin;) {
      const second = write("one");
      const tag = (await ask(server.port, "GET /file")).fields["etag"];
      await Bun.sleep(50); // longer than a tick of the clock
      isWithin = write("two") === second;
      const answer = await ask(server.port, "GET /file", `If-None-Match: ${tag}`);
      if (isWithin) expect([answer.status, answer.content.toString()]).toEqual([200, "two"]);
    }
    for (let isWithin = false; !isWithin;) {
      const size = 16 * MIB;
      const second = write(Buffer.alloc(size, "a"));
      using peer = await Peer.connect(server.port);
      await peer.send(formatRequest(["GET /file", "Connection: close"]));
      await peer.waitFor(/\r\n\r\na/);
      peer.pause();
      isWithin = write(Buffer.alloc(size, "b")) === second;
      peer.resume();
      await peer.closed;
      if (isWithin) expect(peer.received.length).toBeLessThan(size);
    }
    const tag = await settledTag(server.port, "/file"); // once no other change can have the same time
    expect((await ask(server.port, "GET /file", `If-None-Match: ${tag}`)).status).toBe(304);
  },
);

test.concurrent("the digest of a small file does not wait for that of a large one", async () => {
  const changes = { "const DIGEST_TIMEOUT_MS = 1000;": "const DIGEST_TIMEOUT_MS = 600_000;" };
  await using server = await serveCopy(changes, { small: "small" });
  writeSparse(server.pathOf("large"), 512 * GIB); // it would take minutes
  await settledTag(server.port, "/large"); // a file that has just changed gets no digest
  using peer = await Peer.connect(server.port);
  await peer.send(formatRequest(["HEAD /large", "Want-Repr-Digest: sha-256=1"]));
  const { fields } = await ask(server.port, "HEAD /small", "Want-Repr-Digest: sha-256=1");
  expect([fields["repr-digest"], peer.received]).toEqual([reprDigest(Buffer.from("small")), ""]);
});

test.concurrent("a disk that is slow is read in the thread pool first: what is sent is the same", async () => {
  const content = new Random(seed).bytes(3_000_000);
  await using server = await serveCopy({ "const SLOW_READ_MS = 20;": "const SLOW_READ_MS = -1;" }, { file: content });
  await settledTag(server.port, "/file");
  const want = "Want-Repr-Digest: sha-256=1";
  const ranges = "Range: bytes=2000000-2999999,0-999999";
  const answers = await askAll(server.port, [
    ["GET /file"],
    ["GET /file", want, "Range: bytes=100000-"],
    ["GET /file", ranges],
  ]);
  expect(answers.map(({ status }) => status)).toEqual([200, 206, 206]);
  expect(answers[0]?.content.equals(content)).toBeTrue();
  expect(answers[1]?.content.equals(content.subarray(100_000))).toBeTrue();
  expect(answers[1]?.fields["repr-digest"]).toBe(reprDigest(content));
  expect(answers[2]?.content.includes(content.subarray(0, 1_000_000))).toBeTrue();
});

test.concurrent("what is sent is hashed as it goes, for the digest of later answers", async () => {
  await using server = await serveCopy({ "const DIGEST_TIMEOUT_MS = 1000;": "const DIGEST_TIMEOUT_MS = 0;" }, {});
  const size = 32 * MIB; // the kernel holds up to 12 MiB for a peer
  writeSparse(server.pathOf("whole"), size);
  writeSparse(server.pathOf("resumed"), size);
  const past = new Date(Date.now() - 60_000); // what has just been modified may be another version with the next Date
  for (const name of ["whole", "resumed"]) {
    utimesSync(server.pathOf(name), past, past);
    await settledTag(server.port, `/${name}`);
  }
  const want = "Want-Repr-Digest: sha-256=1";
  const digest = reprDigest(new Uint8Array(size));
  const whole = await ask(server.port, "GET /whole", want);
  expect([whole.fields["repr-digest"], whole.content.length]).toEqual([undefined, size]);
  expect((await ask(server.port, "HEAD /whole", want)).fields["repr-digest"]).toBe(digest);

  // A request alone would hash one piece. One peer takes the start and no more, another the rest.
  using first = await Peer.connect(server.port);
  await first.send(formatRequest(["GET /resumed", want]));
  await first.waitFor(/\r\n\r\n\0/);
  first.pause();
  const rest = await ask(server.port, "GET /resumed", want, "Range: bytes=1-");
  expect([rest.status, rest.fields["repr-digest"]]).toEqual([206, undefined]);
  expect((await ask(server.port, "HEAD /resumed", want)).fields["repr-digest"]).toBe(digest);
});

test.concurrent("a slow peer gets the rest of its answer long after the server has said all", async () => {
  await using server = await serveCopy(
    { "const LINGER_TIMEOUT_MS = 5000;": "const LINGER_TIMEOUT_MS = 200;" },
    { file: new Uint8Array(1_000_000) },
  );
  const before = openFiles(server.child.pid);
  using peer = await Peer.connect(server.port);
  await peer.send(formatRequest(["GET /file", "Connection: close"]));
  await peer.waitFor(/\r\n\r\n\0/);
  peer.pause();
  while (openFiles(server.child.pid) > before) await Bun.sleep(20); // it no longer waits for the peer's end
  peer.resume();
  expect(await peer.closed).toBe("end");
  expect(peer.received.length - peer.received.indexOf("\r\n\r\n") - 4).toBe(1_000_000);
});

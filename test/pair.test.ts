/**
 * The pair, end to end: a tree of files and a large one go from server --root to client-robust -o, through a proxy that
 * breaks connections at random. In the end every file is the same, whatever has happened on the way.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { command, hasTool, makeCertificate, run, startServer, temporaryFolder, type Variant } from "./harness.ts";
import { type Plan, startProxy } from "./proxy.ts";
import { Random } from "./random.ts";

// Where little of the machine is ours, all takes its time; nothing here is about time.
setDefaultTimeout(60_000);

const seed = Number(process.env["SEED"] ?? Date.now() % 2 ** 32);

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

const MIB = 2 ** 20;

/** What names may have in them that a URL, a page or a shell would take for something else. */
const ODD_PARTS = [
  "a b",
  "100%",
  "%2e%2e",
  "?",
  "#",
  "&amp;",
  "'",
  '"',
  "<b>",
  ":",
  ";",
  "+",
  "=",
  "~",
  "grüße",
  "你好",
  "🙂",
  "\u202e",
  "\n",
  "\x1b[2J",
  "-",
  "...",
  "$HOME",
  "`x`",
  "*",
] as const;

/** Writes some files with odd names, in folders with odd names. @returns the digest of each, by its path */
function plantTree(root: string, count: number, random: Random): Map<string, string> {
  // What starts with a dot is hidden.
  const folders = [
    "",
    "plain/",
    `x${random.pick(ODD_PARTS)}x/`,
    `deep/${random.pick(ODD_PARTS)}y/z/`.replace("/.", "/y."),
  ];
  const digests = new Map<string, string>();
  for (let i = 0; i < count; i++) {
    const path = `${random.pick(folders)}${i}${random.pick(ODD_PARTS)}${random.pick(["", ".txt", ".html", ".bin"])}`;
    const content = random.bytes(random.pick([0, 1, random.below(300), random.below(20_000), random.below(300_000)]));
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), content);
    digests.set(path, sha256(content));
  }
  return digests;
}

/** What breaks a connection, now and then; over TLS it may be in the middle of the handshake. */
function breakSome(random: Random): Plan {
  const piece = random.once(8) ? { pieceBytes: 500 + random.below(5000) } : {};
  if (!random.once(5)) return piece;
  const bytes = random.pick([0, random.below(400), random.below(20_000), random.below(300_000)]);
  return { ...piece, bytes, end: random.once(10) ? "stall" : random.pick(["close", "reset"] as const) };
}

/** The large file breaks off five times, and is then left alone. */
function breakLarge(random: Random, connection: number, size: number): Plan {
  const ends = ["reset", "close", "reset", "stall", "close"] as const;
  const end = ends[connection];
  return end === undefined ? {} : { bytes: MIB / 2 + random.below(size / 8), end };
}

/** Runs the jobs, so many at once. */
async function runSome(jobs: readonly (() => Promise<void>)[], atOnce: number): Promise<void> {
  const waiting = jobs.values();
  const runNext = async () => {
    for (const job of waiting) await job();
  };
  await Promise.all(Array.from({ length: atOnce }, runNext));
}

// Most of the time is spent in waiting for a retry: all four wait at once.
test.concurrent.each<[variant: Variant, scheme: "http" | "https", files: number, largeMiB: number]>([
  ["script", "http", 200, 64],
  ["binary", "https", 50, 32],
  ["binary", "http", 20, 16],
  ["script", "https", 20, 16],
])(
  `what the server has is what the client gets: %s, %s, %i files, %i MiB (SEED=${seed})`,
  async (variant, scheme, files, largeMiB) => {
    const isTls = scheme === "https";
    if (isTls && !hasTool("openssl")) return;
    const random = new Random(seed);
    await using folder = await temporaryFolder();
    const [root, copies, own] = ["root", "copies", "own"].map((name) => join(folder.path, name)) as [
      string,
      string,
      string,
    ];
    for (const path of [root, copies, own]) mkdirSync(path);
    const digests = plantTree(root, files, random);
    const large = random.bytes(largeMiB * MIB);
    writeFileSync(join(root, "large"), large);
    const { cert, key } = isTls ? await makeCertificate(own) : { cert: "", key: "" };
    const tls = isTls ? ["--tls-cert", cert, "--tls-key", key] : [];
    await using server = await startServer(variant, ["--root", root, "--log", "off", ...tls]);
    using proxy = startProxy(server.port, () => breakSome(random));
    using proxyForLarge = startProxy(server.port, (connection) => breakLarge(random, connection, large.length));

    const client = [...(await command("client-robust", variant)), "--retry", "20", "--stall-timeout", "2", "-s"];
    /** Gets what a link leads to into a file that is named by a number: odd names are the server's matter. */
    let gotten = 0;
    async function get(href: string, port: number): Promise<Buffer> {
      const file = join(copies, String(gotten++));
      const trust = isTls ? ["--cacert", cert] : [];
      const url = `${scheme}://localhost:${port}${href}`;
      const { exitCode, stderr } = await run([...client, ...trust, "-o", file, url]);
      expect([href, exitCode, stderr]).toEqual([href, 0, ""]);
      return readFileSync(file);
    }

    /** Reads a folder's page, and those of the folders that it links to, as a person would. @returns links to files */
    async function explore(folder: string): Promise<string[]> {
      const page = (await get(folder, proxy.port)).toString();
      const hrefs = [...page.matchAll(/<a href="(?!\.\.\/)([^"]*)">/g)].map(([, href = ""]) => folder + href);
      const folders = await Promise.all(hrefs.filter((href) => href.endsWith("/")).map(explore));
      return [...hrefs.filter((href) => !href.endsWith("/")), ...folders.flat()];
    }

    const largeIsSame = get("/large", proxyForLarge.port).then((content) => content.equals(large));
    const hrefs = (await explore("/")).filter((href) => href !== "/large");
    const found = new Map<string, string>();
    const jobs = hrefs.map((href) => async () => {
      found.set(decodeURIComponent(href.slice(1)), sha256(await get(href, proxy.port)));
    });
    await runSome(jobs, 12);
    const byPath = (map: Map<string, string>) => [...map].toSorted(([a], [b]) => (a < b ? -1 : 1));
    expect(byPath(found)).toEqual(byPath(digests));
    expect(await largeIsSame).toBeTrue();
    // Nothing is left but the files: no part, no state.
    expect(readdirSync(copies).toSorted()).toEqual(Array.from({ length: gotten }, (_, i) => String(i)).toSorted());
    // It has been broken off, and gone on: what was there has not been fetched again, but for what a reset took back.
    expect(proxyForLarge.passages.length).toBeGreaterThan(5);
    expect(proxyForLarge.passages.reduce((sum, { passed }) => sum + passed, 0)).toBeLessThan(2 * large.length);
    if (files >= 200) expect(proxy.passages.length).toBeGreaterThan(gotten);
  },
);

/** The shape of the project: what a copy of one file, a binary in a hostile folder and the README rely on. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { accessSync, constants, existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { PROGRAMS } from "../.ci/build.ts";
import { drawFigures } from "../docs/figures.ts";
import { LIMITS } from "../server.ts";
import { ROOT, run, runProgram, startServer, temporaryFolder, VARIANTS } from "./harness.ts";

// The binaries are built for the first test that needs one.
setDefaultTimeout(60_000);

const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
const sources = PROGRAMS.map((program) => ({ program, text: read(`${program}.ts`) }));

/** The fenced blocks of a script, by name. */
const sharedBlocks = (text: string) =>
  new Map(
    [...text.matchAll(/^\/\/ ── shared: ([^\n]+) ──\n(.*?)^\/\/ ── end shared ──$/gms)].map(([, name, block]) => [
      name,
      block,
    ]),
  );

describe.each(PROGRAMS)("%s.ts", (program) => {
  const text = read(`${program}.ts`);

  test("imports nothing but built-ins of Bun and Node", () => {
    const imports = [...text.matchAll(/^import .* from "(.*)";$|\bimport\("(.*?)"\)|\brequire\("(.*?)"\)/gm)];
    expect(imports.length > 0 || program === "client").toBeTrue(); // client.ts needs none
    for (const [, from, dynamic, required] of imports) expect(from ?? dynamic ?? required).toMatch(/^(node:|bun$)/);
  });

  test("can be run by its name, and does nothing when it is imported", async () => {
    expect(text).toStartWith("#!/usr/bin/env bun\n");
    accessSync(join(ROOT, `${program}.ts`), constants.X_OK);
    expect(text).toMatch(/\nif \(import\.meta\.main\) .*;\n$/);
    const imported = await run([process.execPath, "-e", `await import("./${program}.ts")`]);
    expect([imported.stdout, imported.stderr, imported.exitCode]).toEqual(["", "", 0]);
  });

  test("has its sections in order, and a header of at most 30 lines", () => {
    const sections = [...text.matchAll(/^\/\/ ═══ (\d+) /gm)].map(([, number]) => Number(number));
    expect(sections).toEqual(sections.map((_, i) => i + 1));
    expect(sections.length).toBeGreaterThan(4);
    expect(text.slice(0, text.indexOf("*/")).split("\n").length).toBeLessThanOrEqual(30);
  });

  test("says in --help what docs/reference.md says, and has the version of package.json", async () => {
    const help = await runProgram(program, "script", ["--help"]);
    expect(help.exitCode).toBe(0);
    expect(read("docs/reference.md")).toContain(`\n\`\`\`text\n${help.stdout}\`\`\`\n`);
    const version = await runProgram(program, "script", ["--version"]);
    expect(version.stdout).toBe(`${program} ${JSON.parse(read("package.json")).version}\n`);
  });

  test("is about as long as the README says", () => {
    const told = Number(new RegExp(`\\| \`${program}\\.ts\` +\\| +(\\d+) `).exec(read("README.md"))?.[1]);
    expect(Math.abs(told / text.split("\n").length - 1)).toBeLessThan(0.05);
  });

  test("runs from a copy of the one file, without this repository", async () => {
    await using folder = await temporaryFolder();
    await Bun.write(join(folder.path, `${program}.ts`), text);
    const { stdout, exitCode } = await run([process.execPath, `${program}.ts`, "--version"], { cwd: folder.path });
    expect([stdout.split(" ")[0], exitCode]).toEqual([program, 0]);
  });

  test.each(VARIANTS.filter((variant) => variant === "binary"))(
    "the %s obeys nothing in the folder that it is run in",
    async (variant) => {
      await using folder = await temporaryFolder();
      await Bun.write(join(folder.path, "bunfig.toml"), 'preload = ["./evil.ts"]\n');
      await Bun.write(join(folder.path, "evil.ts"), 'console.log("evil"); process.exit(66);\n');
      await Bun.write(join(folder.path, ".env"), "HOST=nowhere.invalid\nPORT=1\n");
      await Bun.write(join(folder.path, "tsconfig.json"), "{");
      await Bun.write(join(folder.path, "package.json"), "{");
      const { stdout, stderr, exitCode } = await runProgram(program, variant, ["--version"], { cwd: folder.path });
      expect([stdout.split(" ")[0], stderr, exitCode]).toEqual([program, "", 0]);
      if (program !== "server") return;
      await using server = await startServer(variant, [], { cwd: folder.path });
      expect(server.url).toStartWith("http://localhost:");
    },
  );
});

/** The cells of the rows of all tables, without the white space around them. */
const tableRows = (text: string) =>
  text
    .split("\n")
    .filter((line) => line.startsWith("|"))
    .map((line) =>
      line
        .split("|")
        .slice(1, -1)
        .map((cell) => cell.trim()),
    );

test("docs/reference.md has each limit with its default, its meaning in --help limits, and the reason in the code", async () => {
  const { stdout, exitCode } = await runProgram("server", "script", ["--help", "limits"]);
  expect(exitCode).toBe(0);
  const source = /^const BOUNDS = \{\n(.*?)^\} as const/ms.exec(read("server.ts"))?.[1] ?? "";
  const comments = source.matchAll(/^ {2}(?:\/\*\* (.*) \*\/|\w+: \[.*\], \/\/ (.*))$/gm); // above a limit or behind it
  const reasons = [...comments].map(([, above, behind = ""]) => above ?? behind);
  const printed = [...stdout.matchAll(/^ {2}(--\S+) +(\d+) {2}(.*)$/gm)];
  expect(printed.length).toBe(Object.keys(LIMITS).length);
  const expected = printed.map(([, flag, value = "", meaning = ""], index) => [
    `\`${flag}\``,
    value,
    meaning,
    reasons[index] ?? "",
  ]);
  const rows = tableRows(read("docs/reference.md"));
  expect(rows.filter(([flag = ""]) => /^`--\S+-(max|ms)`$/.test(flag))).toEqual(expected);
  const chinese = tableRows(read("docs/README.zh-CN.md")).filter(([flag = ""]) => /^`--\S+-(max|ms)`$/.test(flag));
  expect(chinese.map(([flag, value]) => [flag, value])).toEqual(expected.map(([flag, value]) => [flag, value]));
});

test("the Chinese README has a row for each option that --help has", async () => {
  const told = tableRows(read("docs/README.zh-CN.md")).map(([options = ""]) => options);
  const flags = (text: string) => new Set(text.match(/(?<=^|[ `])--?[a-zA-Z][\w-]*/g));
  const chinese = flags(told.filter((options) => options.startsWith("`-")).join("\n"));
  const english = new Set<string>();
  for (const [program, topic] of [["server"], ["client-robust"], ["server", "limits"]] as const) {
    const help = await runProgram(program, "script", ["--help", ...(topic === undefined ? [] : [topic])]);
    for (const [line] of help.stdout.matchAll(/^ {2,6}-.*$/gm))
      for (const flag of flags(line.trim().split(/ {2,}/)[0] ?? "")) english.add(flag);
  }
  expect(english.size).toBeGreaterThan(40);
  expect([...chinese].sort()).toEqual([...english].sort());
});

test("the README has at most 150 lines, and the figures of bench/results.json", () => {
  expect(read("README.md").split("\n").length - 1).toBeLessThanOrEqual(150);
  expect(read("docs/figures.svg")).toBe(drawFigures());
});

test("every link of the documents leads to a file, and to a heading that is there", () => {
  const docs = ["scaling", "reference", "lab", "lab.zh-CN", "audit", "README.zh-CN"].map((name) => `docs/${name}.md`);
  const documents = ["README.md", ...docs, "bench/README.md", "bench/RESULTS.md"];
  const anchors = (path: string) =>
    [...read(path).matchAll(/^#+ (.*)$/gm)].map(([, heading = ""]) =>
      heading
        .toLowerCase()
        .replace(/[^\p{L}\p{N} _-]/gu, "")
        .replaceAll(" ", "-"),
    );
  for (const document of [...documents, "CONTRIBUTING.md", "SECURITY.md"])
    for (const [, link = ""] of read(document).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(link)) continue;
      const [path = "", anchor] = link.split("#");
      const target = path === "" ? document : join(dirname(document), path);
      expect(existsSync(join(ROOT, target)), `${document}: ${link}`).toBeTrue();
      if (anchor !== undefined) expect(anchors(target), `${document}: ${link}`).toContain(anchor);
    }
});

test("every test, vector and piece of code that docs/audit.md names is there, for each threat of SECURITY.md", () => {
  const names = readdirSync(join(ROOT, "test")).filter((name) => name.endsWith(".ts"));
  const tests = names.map((name) => read(`test/${name}`)).join("\n");
  const vectors = ["request", "response", "path"].flatMap((kind) => readdirSync(join(ROOT, "test/vectors", kind)));
  const rows = tableRows(read("docs/audit.md")).filter(([threat]) => threat !== "threat" && !threat?.startsWith("-"));
  for (const [threat = "", shown = ""] of rows) {
    for (const [, words = ""] of shown.matchAll(/"(.*?)"/g))
      expect(tests.includes(words), `${threat}: ${words}`).toBeTrue();
    for (const [, name = ""] of shown.matchAll(/(?<!code: )`([a-z\d*-]+)`/g))
      if (!name.startsWith("--"))
        expect(
          vectors.some((file) => new Bun.Glob(`${name}.txt`).match(file)),
          `${threat}: ${name}`,
        ).toBeTrue();
    for (const [, code = ""] of shown.matchAll(/code: `(?:\w+\.)?(\w+)`/g))
      expect(
        sources.some(({ text }) => new RegExp(`\\b${code}\\(`).test(text)),
        `${threat}: ${code}`,
      ).toBeTrue();
  }
  const threats = (page: string) =>
    tableRows(read(page))
      .map(([threat = ""]) => threat.replace(/ \(.*/, ""))
      .filter((threat) => !threat.startsWith("-"));
  expect(threats("docs/audit.md")).toEqual(threats("SECURITY.md"));
});

test("what two scripts share is the same in both", () => {
  const names = new Set<string | undefined>();
  for (const { text } of sources)
    for (const [name, block] of sharedBlocks(text)) {
      names.add(name);
      for (const other of sources) expect(sharedBlocks(other.text).get(name) ?? block).toBe(block);
    }
  expect([...names]).toContain("printable");
  // A name that stands in one script alone is a slip of the pen in the other.
  for (const name of names)
    expect(sources.filter(({ text }) => sharedBlocks(text).has(name)).length).toBeGreaterThan(1);
});

test("package.json asks for two packages, of exact versions, and for nothing at run time", () => {
  const { dependencies, devDependencies, packageManager } = JSON.parse(read("package.json"));
  expect(dependencies).toBeUndefined();
  expect(Object.keys(devDependencies)).toEqual(["@types/node", "bun-types"]);
  for (const version of Object.values(devDependencies)) expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  expect(packageManager).toBe("bun@1.4.5");
});

test("Bun gives each data event bytes of its own, as client-robust.ts relies on", async () => {
  const chunks: { bytes: Buffer; first: number }[] = [];
  const { promise: closed, resolve } = Promise.withResolvers<void>();
  const total = 4 * 2 ** 20;
  const content = Buffer.alloc(total);
  for (let at = 0; at < total; at += 4096) content.fill((at / 4096) % 251, at, at + 4096);
  using listener = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response(content) });
  await Bun.connect({
    hostname: "127.0.0.1",
    port: listener.port ?? 0,
    socket: {
      open: (socket) => void socket.write("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
      data: (_, bytes) => void chunks.push({ bytes, first: bytes[0] ?? -1 }),
      close: () => resolve(),
    },
  });
  await closed;
  expect(chunks.length).toBeGreaterThan(4);
  for (const { bytes, first } of chunks) expect([bytes[0], bytes.buffer.byteLength]).toEqual([first, bytes.length]);
  expect(
    Buffer.concat(chunks.map(({ bytes }) => bytes))
      .subarray(-total)
      .equals(content),
  ).toBeTrue();
});

test("the Chinese README has the same blocks as the English one, in the same order, and the same three programs", () => {
  const [english, chinese] = [read("README.md"), read("docs/README.zh-CN.md")];
  const fencedBlock = /^```.*?^```$/gms;
  expect(chinese.match(fencedBlock)).toEqual(english.match(fencedBlock));
  const programs = (text: string) =>
    tableRows(text)
      .filter(([name = ""]) => name.endsWith(".ts`"))
      .map(([name, lines]) => [name, lines]);
  expect(programs(english).length).toBe(PROGRAMS.length);
  expect(programs(chinese)).toEqual(programs(english));
});

test.each(["docs/lab.md", "docs/lab.zh-CN.md"])(
  "%s: the functions that each step has become stand in the section that it says",
  (page) => {
    const parts = read(page)
      .split(/^### .*[:：] ?(?=\S+\.ts$)/m)
      .slice(1);
    expect(parts.length).toBe(PROGRAMS.length);
    for (const part of parts) {
      const [script = "", ...rows] = part.split("\n");
      const places = read(script).split(/^\/\/ ═══ (?=\d)/m);
      const steps = [
        ...rows
          .map((row) => row.split("|")[2] ?? "")
          .join("\n")
          .matchAll(/((?:`\w+`(?:, |、| → )?)+) \((\d+)\)/g),
      ];
      expect(steps.length).toBeGreaterThan(4);
      for (const [, names = "", place] of steps)
        for (const [name] of names.matchAll(/\w+/g)) {
          const text = places.find((text) => text.startsWith(`${place} `)) ?? "";
          expect(new RegExp(`\\b${name}\\b`).test(text), `${script}, section ${place}: ${name}`).toBeTrue();
        }
    }
  },
);

test("each section that the lab sends its readers to has that title, and each name is there", () => {
  const titles = new Map(
    PROGRAMS.map((program) => [
      `${program}.ts`,
      [...read(`${program}.ts`).matchAll(/^\/\/ ═══ (\d+) (.*?) ═+$/gm)].map(
        ([, number, title]) => `${number} "${title}"`,
      ),
    ]),
  );
  const everything = sources.map(({ text }) => text).join("\n");
  let sections = 0;
  for (const [paragraph] of read("docs/lab.md").matchAll(/^\*\*Read on\*\*.*?(?=\n\n|$(?![\s\S]))/gms)) {
    for (const [, name] of paragraph.matchAll(/`(\w+)`/g))
      expect(new RegExp(`\\b${name}\\b`).test(everything), `no script has ${name}`).toBeTrue();
    let script = "";
    for (const [, file, number, title] of paragraph
      .replace(/\s+/g, " ")
      .matchAll(/([\w-]+\.ts)|[Ss]ection (\d+) "(.*?)"/g))
      if (file !== undefined) script = file;
      else {
        sections++;
        expect(titles.get(script), `${script}: section ${number}`).toContain(`${number} "${title}"`);
      }
  }
  expect(sections).toBeGreaterThan(12);
});
